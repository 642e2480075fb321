"""Every setting once: its name, the paper's value, what may be given, what it is.

The parser of train.py, the check of a resumed run and that of a checkpoint are made of this table.
To add a setting, add a row; older checkpoints, which lack it, are read with its value. Below: what
differs by data set and by method; by autoencoder it stands in rae.AUTOENCODERS.
A line that ends in "# laptop" can be deleted with laptop/.
"""
import os
from pathlib import Path
from typing import NamedTuple

from baselines import METHODS, NOISE
from data import DATASETS
from laptop import toy  # laptop
from model import SiT_models
from rae import AUTOENCODERS
from sphere import angle_to_sigma
from utils.cli import ArgumentParser, add_flags, number, printable
from utils.processes import torchrun_environment


class Setting(NamedTuple):
    name: str                       # of the flag, too; where the value is True that is --no-NAME
    value: object                   # the paper's (Table A); ours where the paper does not give it
    given: object                   # choices, a type, [a type] for several, or bool: no value
    same: bool                      # SAME: a run is resumed with the same value; ANY: it may change
    what: str                       # --help


SAME, ANY = True, False
COUNT, AMOUNT, ANGLE = number(int, 1), number(float, 0), number(float, 1, 89.9)
DATASET, RAE_OF_PATH = "flowers", "dinov2-b"                  # of a PATH; with laptop/ the toy's
DATASET, RAE_OF_PATH = "toy", "toy"  # laptop

TABLE = [                           # a text starts a group of --help
    "data",
    ("dataset", DATASET, str, ANY, f"{', '.join(DATASETS)}, or the PATH of a folder of classes"),
    ("split", "all", ("train", "val", "test", "all"), SAME, "which pictures of flowers"),
    ("skip_bad", False, bool, ANY, "leave out pictures that cannot be read, and count them"),
    ("flips", True, bool, SAME, "no mirror images: where left and right matter, as for letters"),
    ("image_size", 256, number(int, 1, 4096), SAME, "side in pixels: 256 for dinov2-b"),
    ("rae", "dinov2-b", AUTOENCODERS, SAME,
     "the autoencoder; it decides about other defaults, too; pixels: none"),
    ("rae_patch", 16, number(int, 1, 4096), SAME,
     "side of a patch in pixels; of --rae toy and --rae pixels"),
    ("decoder_steps", 11000, COUNT, SAME, "steps of lite0's decoder, before the denoiser"),
    ("weights_dir", None, str, ANY, "folder with the files of dinov2-b; without it: the Hub"),
    ("data_dir", "datasets", str, ANY, "where downloads and caches of latents go"),
    ("cache_latents", "auto", ("auto", "yes", "no"), ANY,
     "encode once; auto: if the disk has room"),
    ("encode_only", False, bool, ANY, "fill the cache of latents, and end"),

    "method (sphere.py, model.py, baselines.py)",
    ("method", "sphere", METHODS, SAME, "the paper's, or what it compares with"),
    ("model", "SiT-B/1", SiT_models, SAME, "size and patch of the denoiser"),
    ("noise_dist", "lognorm", NOISE, SAME, "how noise levels are drawn"),
    # The two (mean, std) of the paper's Table 3 are not given; its sources use (0, 1), (-0.4, 1).
    ("p_mean", 0.0, number(float), SAME, "mean of lognorm, before the sigmoid"),
    ("p_std", 1.0, AMOUNT, SAME, "standard deviation of lognorm, before the sigmoid"),
    ("alpha_max", 85.0, ANGLE, SAME,     # not given; this and alpha_mix are Sphere Encoder's code's
     "largest noise angle, degrees; for other latents try arctan(sqrt(L) / 8)"),
    ("alpha_mix", 89.0, ANGLE, SAME,
     "largest noise angle of the harder range mixed in, degrees"),
    ("mix_prob", 0.2, number(float, 0, 1), SAME, "share of examples from the harder range"),
    ("reconstruct", "low", ("low", "both"), SAME,                         # the text allows both
     "noise levels on which Eq. 2 is taken"),
    ("consistency", 1.0, AMOUNT, SAME, "factor of Eq. 3 (25 L1 + 1 - cos); 0: Eq. 2 alone"),
    ("latent_consistency", 0.0, AMOUNT, SAME, "factor of Eq. 4; the paper drops it"),
    ("spherify", True, bool, SAME, "the identity in the place of f, in training and in sampling"),
    ("init_from", None, str, SAME,
     "CKPT: start from the weights, averages and autoencoder of another run, at step 0; its "
     "classes may be others"),
    ("pairs", 10_000, number(int, 1, 10 ** 8), SAME,
     "distill: number of noises, each with what the run of --init-from makes of it"),
    ("teacher_steps", 4, number(int, 1, 1000), SAME, "distill: sampling steps of that run"),
    ("teacher_cfg", None, AMOUNT, SAME, "distill: its guidance (default: its own)"),

    "optimisation (AdamW)",
    ("steps", None, COUNT, ANY, "steps in all; raise it to continue a finished run"),
    ("epochs", 500, COUNT, ANY, "the same in passes over the data"),
    ("batch_size", 256, number(int, 1, 10 ** 6), SAME, "examples a step, over all processes"),
    ("accumulate", 1, number(int, 1, 10 ** 6), ANY,
     "micro-batches a step in each process, to save memory"),
    ("lr", 1e-4, AMOUNT, SAME, "learning rate of AdamW"),
    ("warmup_steps", 0, number(int, 0), SAME, "steps over which the rate rises to --lr"),
    ("clip", 0.0, AMOUNT, SAME, "largest gradient norm; 0: no limit"),    # none is mentioned
    ("ema_decay", [0.9995, 0.9999], [number(float, 0, 1)], SAME,          # the second is ours
     "decays of the averaged weights; samples use the first"),
    ("dtype", "bfloat16", ("float32", "bfloat16"), SAME,                  # not given
     "of the network; weights stay float32"),
    ("compile", None, bool, ANY,
     "compile the network (default: on a GPU, where a compiler is there)"),
    ("checkpoint_activations", False, bool, ANY,
     "compute each block twice: less memory, a third more time"),

    "run",
    ("seed", 0, number(int, 0, 2 ** 63), SAME, "of everything random"),
    ("out_dir", None, str, ANY,
     "default: out/<dataset>-<model>, and what else is not the data set's own"),
    ("device", "auto", str, ANY, "auto, cpu, cuda or mps"),
    ("log_every", 50, COUNT, ANY, "steps between lines of the log"),
    ("sample_every", 2000, COUNT, ANY, "steps between grids of samples"),
    ("save_every", 1000, COUNT, ANY, "steps between checkpoints"),
    ("report", 500, number(int, 0), ANY,
     "pictures a row of the quality report at the end; 0: none"),

    "sampling (the grids; sample.py starts from it)",
    ("cfg", 1.0, AMOUNT, ANY, "guidance scale; 1 is none"),
    ("sampling_noise", "fresh", ("fresh", "same"), ANY,                   # not given
     "new at each step, or the first again"),
    ("sigma", None, AMOUNT, ANY, "noise (no angle) where the decay starts; if not given "
     "tan(alpha_max) times sigma_scale"),

    None,                                                                 # train.py has no flag for
    ("sigma_scale", 1.0, AMOUNT, ANY, ""),
    ("gamma", 1.0, AMOUNT, ANY, "of sphere.decay"),                       # not given, nor its form
    ("sample_steps", 4, COUNT, ANY, "of the grids"),
    ("class_dropout_prob", 0.1, number(float, 0, 1), SAME, "labels dropped, for guidance"),
    ("betas", [0.9, 0.95], [number(float, 0, 1)], SAME, "of AdamW"),      # not given
    ("weight_decay", 0.0, AMOUNT, SAME, ""),
    ("decay_last", 0.0, number(float, 0, 1), SAME,
     "last share of the steps, in which the rate falls to 5%"),
]
SETTINGS = {row[0]: Setting(*row) for row in TABLE if isinstance(row, tuple)}
PAPER = {name: setting.value for name, setting in SETTINGS.items()}

# ---- What differs --------------------------------------------------------------------------------

# The paper's FID at 2, 4, 6 steps, in this order: 12.22 8.61 7.85; 10.63 6.89 6.18; 6.85 2.25 2.11.
# The guidance of flowers is not given: Sphere Encoder's. The paper has another gamma for imagenet.
BY_DATASET = {
    "flowers":      dict(rae="dinov2-b", model="SiT-B/1",  epochs=2000, batch_size=256, cfg=1.6),
    "animal-faces": dict(rae="dinov2-b", model="SiT-B/1",  epochs=500,  batch_size=256, cfg=1.0),
    "imagenet":     dict(rae="dinov2-b", model="SiT-XL/1", epochs=600,  batch_size=512, cfg=3.2,
                         sample_every=10_000, save_every=5000),
}
BY_DATASET["toy"] = dict(rae="toy", **toy.SETTINGS_OF_FLOWERS)  # laptop
BY_METHOD = {
    "meanflow":       dict(p_mean=-0.4),                                  # of its paper
    "sphere-encoder": dict(rae="pixels", noise_dist="sphere-encoder"),
    # Ours. The teacher's guidance is in what is learnt: none of its own, so no label is dropped.
    "distill":        dict(cfg=1.0, sample_steps=1, sampling_noise="same", class_dropout_prob=0.0,
                           flips=False),
}


def defaults(dataset, rae=None, method=None):
    """Settings where no flag is given. Each overrides what stands before it: the paper's; those of
    the autoencoder; those of the data set, unless another autoencoder than its own was asked for
    (one without settings, as pixels, counts as its own); those of the method.
    """
    of_dataset = {"rae": RAE_OF_PATH, **BY_DATASET.get(dataset, {})}
    if rae not in AUTOENCODERS or rae == of_dataset["rae"] or AUTOENCODERS[rae].settings is None:
        differs = {**(AUTOENCODERS[of_dataset["rae"]].settings or {}), **of_dataset}
    else:
        differs = {**AUTOENCODERS[rae].settings, "rae": rae}
    return {**PAPER, **differs, **BY_METHOD.get(method, {})}


# ---- The command line ----------------------------------------------------------------------------

def parse_args(argv=None, description=None):
    """Returns a namespace with every setting."""
    first = ArgumentParser(add_help=False)                    # these decide about the defaults
    for flag in ("--dataset", "--rae", "--method"):
        first.add_argument(flag)
    known = first.parse_known_args(argv)[0]
    known.dataset = known.dataset or DATASET
    values = defaults(known.dataset, known.rae, known.method)
    parser = ArgumentParser(description=description)
    add_flags(parser, TABLE)
    parser.set_defaults(**{**values, "dataset": known.dataset, "epochs": None})
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (None if args.steps else values["epochs"])
    for name, why in idle(vars(args)):
        if getattr(args, name) != values[name]:
            flag = f"no-{name}" if SETTINGS[name].value is True else name.replace("_", "-")
            parser.error(f"--{flag} means nothing to {why}")
    if args.sigma is None and args.method != "distill":       # which has its teacher's
        args.sigma = args.sigma_scale * angle_to_sigma(args.alpha_max)
    if not args.out_dir:
        name = printable(Path(os.path.realpath(args.dataset)).name)[:80]
        parts = [name, args.model.replace("/", "-")]
        parts += [args.rae] * (args.rae != defaults(args.dataset, None, args.method)["rae"])
        parts += [args.method] * (args.method != PAPER["method"])
        args.out_dir = f"out/{'-'.join(parts)}"
    check_args(parser, args)
    return args


def idle(values):
    """Yields the settings that have no effect under the chosen method, autoencoder or noise, and
    under which. The registries' `flags` are settings that not all of their entries know."""
    for kind, registry in (("method", METHODS), ("rae", AUTOENCODERS), ("noise_dist", NOISE)):
        known = registry[values[kind]].flags
        if kind == "noise_dist" and kind not in METHODS[values["method"]].flags:
            continue
        for name in dict.fromkeys(flag for entry in registry.values() for flag in entry.flags):
            if name not in known:
                yield name, f"--{kind.replace('_', '-')} {values[kind]}"
    if not values["mix_prob"]:
        yield "alpha_mix", "--mix-prob 0"
    if values["init_from"]:
        yield "decoder_steps", "--init-from, which brings its autoencoder"
    if not AUTOENCODERS[values["rae"]].fetch:
        yield "weights_dir", f"--rae {values['rae']}"


def check_args(parser, args):
    """What no flag can tell of itself."""
    if args.alpha_mix < args.alpha_max and args.mix_prob:
        parser.error(f"--alpha-mix {args.alpha_mix:g} is below --alpha-max {args.alpha_max:g}: "
                     "the mix is harder")
    only = BY_METHOD.get(args.method, {}).get("rae", args.rae)
    if args.rae != only:
        parser.error(f"--method {args.method} works on pictures: not --rae {args.rae}, but {only}")
    if METHODS[args.method].forward_mode and (args.compile or args.checkpoint_activations):
        parser.error(f"--method {args.method} differentiates forward, too: no --compile and no "
                     "--checkpoint-activations")
    if args.method == "distill" and (not args.init_from or args.cache_latents != "auto"):
        parser.error("--method distill wants a run to learn from, --init-from CKPT, and keeps what "
                     "that makes: no --cache-latents")
    if args.method == "sphere" and not args.consistency and args.reconstruct == "low":
        parser.error("--consistency 0 leaves the noisier level without a loss: add --reconstruct "
                     "both")
    if args.encode_only and args.cache_latents == "no":
        parser.error("--encode-only fills the cache: no --cache-latents no")
    if args.report == 1:
        parser.error("--report 1: a row wants two pictures or more; 0: none")
    if len(set(args.ema_decay)) < len(args.ema_decay):
        parser.error(f"--ema-decay {args.ema_decay}: one of them is there twice")
    world = torchrun_environment()[1]
    if args.batch_size % (world * args.accumulate):
        parser.error(f"--batch-size {args.batch_size} does not divide into {world} processes x "
                     f"{args.accumulate} micro-batches")
    if args.dataset not in DATASETS:
        for flag, folder in (("--data-dir", args.data_dir), ("--out-dir", args.out_dir)):
            inside = Path(os.path.realpath(folder))
            if inside.is_relative_to(os.path.realpath(args.dataset)):
                parser.error(f"{flag} {folder} is inside {args.dataset}, and would be taken for a "
                             "class of pictures")


def defining(values):
    """Of all settings (a dict) those with which alone a run is resumed."""
    return {name: values[name] for name, setting in SETTINGS.items() if setting.same}
