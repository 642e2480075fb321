"""Train a Sphere Latent Encoder.

    python train.py                               # the toy: drawn flowers, minutes on two CPU cores
    python train.py --dataset path/to/photos --rae lite0     # a folder of class folders of pictures
    torchrun --nproc-per-node gpu train.py --dataset flowers  # the paper's; animal-faces, imagenet

The same command again resumes the run; Ctrl-C and SIGTERM save before they end it. Everything
random is a function of (seed, step, example), so neither a stop nor (but for the order of sums) the
number of processes changes it. out/<run>/ receives args.json, pictures.json (the files and their
sums), log.jsonl (a line a logged step), samples-*.png, quality.json and ckpt.pt, from which
sample.py draws.
"""
import contextlib
import json
import math
import os
import time
from argparse import BooleanOptionalAction
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import sphere
from common import (ArgumentParser, Stop, UserError, autocast, barrier, first_not_finite,
                    first_process_first, global_batch, keyed_generator, locked, number, on_signals,
                    one_line, peak_memory_gb, prefetch, printable, save_tensors, say, setup, sweep,
                    user_errors, write_json, write_whole)
from baselines import METHODS, build_network
from data import IMAGE_SIZE, describe, load_dataset
from fid import default_features, held_out_set, quality_report, report_text
from laptop import lite0, toy  # laptop
from model import SiT, SiT_models
from rae import OF_PATCHES, load_checkpoint, open_latents, open_rae, picture_sides
from sample import draw, picture_grid, predict, sampling_settings

# ---- Settings ------------------------------------------------------------------------------------

# The paper's (table A). Where its text gives no number the line says so: that default is ours.
PAPER = dict(
    method="sphere", rae="dinov2-b", image_size=256, model="SiT-B/1", epochs=500, batch_size=256,
    lr=1e-4, weight_decay=0.0, ema_decay=[0.9995, 0.9999],    # the second is ours, to compare
    betas=[0.9, 0.95], dtype="bfloat16",                # not given
    warmup_steps=0, decay_last=0.0, clip=0.0,           # constant rate; a clip is not mentioned
    noise_dist="lognorm", p_mean=0.0, p_std=1.0,        # mean and std not given
    alpha_max=85.0, alpha_mix=89.0, mix_prob=0.2,       # angles not given: Sphere Encoder's code
    reconstruct="low", latent_consistency=0.0, class_dropout_prob=0.1,        # low or both: unclear
    consistency=1.0, pair_noise="one", spherify=True, init_from=None,
    flips=True,                                         # not given
    cfg=1.0, guidance="linear", gamma=1.0, decay="power", sample_steps=4,
    sampling_noise="fresh",                             # this, gamma and its form: not given
    sigma=None, sigma_scale=1.0,                        # sampling starts at scale * tan(alpha_max)
    log_every=50, sample_every=2000, save_every=1000, report=500, rae_patch=16)
PRESETS = {
    # FID at 2, 4, 6 steps: 12.22, 8.61, 7.85. The guidance is not given: Sphere Encoder's.
    "flowers": dict(PAPER, epochs=2000, cfg=1.6),
    "animal-faces": dict(PAPER, epochs=500),                                    # 10.63, 6.89, 6.18
    "imagenet": dict(PAPER, model="SiT-XL/1", epochs=600, batch_size=512, cfg=3.2,
                     sample_every=10_000, save_every=5000),                     # 6.85, 2.25, 2.11
}
BY_METHOD = {"meanflow": dict(p_mean=-0.4),                   # its paper's, for ImageNet
             "sphere-encoder": dict(rae="pixels", noise_dist="sphere-encoder")}
BY_RAE = {"dinov2-b": PAPER}                            # of other pictures, or with another --rae
DATASET, RAE_OF_PATH = "flowers", "dinov2-b"
BY_RAE["toy"] = {**PAPER, **toy.SETTINGS}  # laptop
BY_RAE |= {r: {**PAPER, **lite0.SETTINGS, "rae": r} for r in lite0.PRETRAINED}  # laptop
PRESETS["toy"] = {**BY_RAE["toy"], **toy.SETTINGS_OF_FLOWERS}  # laptop
DATASET, RAE_OF_PATH = "toy", "toy"  # laptop

# A run is resumed with the settings that define it, and the same pictures; its length, its pace and
# how it samples may change.
DEFINING = ("method", "seed", "split", "rae", "rae_patch", "image_size", "model", "batch_size",
            "lr", "betas", "weight_decay", "warmup_steps", "decay_last", "clip", "ema_decay",
            "dtype", "noise_dist", "p_mean", "p_std", "alpha_max", "alpha_mix", "mix_prob",
            "reconstruct", "latent_consistency", "class_dropout_prob", "flips", "decoder_steps",
            "consistency", "pair_noise", "spherify", "init_from")


def build_parser():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DATASET,
        help=f"{', '.join(IMAGE_SIZE)}, or the PATH of a folder of classes")
    add("--split", default="all", choices=("train", "val", "test", "all"), help="of flowers")
    add("--skip-bad", action="store_true",
        help="leave out pictures that cannot be read, and count them")
    add("--no-flips", dest="flips", action="store_false",
        help="no mirror images: where left and right matter, as for letters")
    add("--image-size", type=number(int, 1, 4096), help="side in pixels: 256 for dinov2-b")
    add("--rae", choices=(*BY_RAE, "pixels"),
        help="the autoencoder; it decides about other defaults, too; pixels: none")
    add("--rae-patch", type=number(int, 1, 4096),
        help="pixels to a side of a patch, of toy and pixels")
    add("--decoder-steps", type=number(int, 1), default=1200,
        help="steps in which the decoder of lite0 is trained first")
    add("--weights-dir", help="folder with the files of dinov2-b; without it: the Hub")
    add("--data-dir", default="datasets", help="where downloads and caches of latents go")
    add("--cache-latents", default="auto", choices=("auto", "yes", "no"),
        help="encode once; auto: if the disk has room")
    add("--encode-only", action="store_true", help="fill the cache of latents, and end")
    add = parser.add_argument_group("method (model.py, sphere.py, baselines.py)").add_argument
    add("--method", choices=METHODS, help="the paper's, or what it compares with")
    add("--model", choices=SiT_models, help="size and patch of the denoiser")
    add("--noise-dist", choices=("lognorm", "uniform", "sphere-encoder"),
        help="how noise levels are drawn")
    add("--p-mean", type=number(float), help="mean of lognorm, before the sigmoid")
    add("--p-std", type=number(float, 0), help="standard deviation of lognorm, before the sigmoid")
    add("--alpha-max", type=number(float, 1, 89.9),
        help="largest noise angle, degrees; for other latents try arctan(sqrt(L) / 8)")
    add("--alpha-mix", type=number(float, 1, 89.9),
        help="largest noise angle of the harder range mixed in, degrees")
    add("--mix-prob", type=number(float, 0, 1), help="share of examples from the harder range")
    add("--reconstruct", choices=("low", "both"), help="noise levels on which Eq. 2 is taken")
    add("--consistency", type=number(float, 0), help="weight of Eq. 3; 0: the paper's R")
    add("--latent-consistency", type=number(float, 0), help="weight of Eq. 4; the paper drops it")
    add("--pair-noise", choices=("one", "two"), help="one eps for both noise levels, or one each")
    add("--no-spherify", dest="spherify", action="store_false",
        help="the identity in the place of f, in training and in sampling")
    add("--init-from", metavar="CKPT",
        help="start from the weights, averages and autoencoder of another run, at step 0")
    group = parser.add_argument_group("optimisation")
    add, length = group.add_argument, group.add_mutually_exclusive_group().add_argument
    length("--steps", type=number(int, 1), help="steps in all; raise it to continue a finished run")
    length("--epochs", type=number(int, 1), help="the same in passes over the data")
    add("--batch-size", type=number(int, 1, 10 ** 6), help="examples a step, over all processes")
    add("--accumulate", type=number(int, 1, 10 ** 6), default=1,
        help="micro-batches a step in each process, to save memory")
    add("--lr", type=number(float, 0), help="learning rate of AdamW")
    add("--warmup-steps", type=number(int, 0), help="steps over which the rate rises to --lr")
    add("--clip", type=number(float, 0), help="largest gradient norm; 0: no limit")
    add("--ema-decay", type=number(float, 0, 1), nargs="+",
        help="decays of the averaged weights; samples use the first")
    add("--dtype", choices=("float32", "bfloat16"), help="of the network; weights stay float32")
    add("--compile", action=BooleanOptionalAction,
        help="compile the network (default: on a GPU, where a compiler is there)")
    add("--checkpoint-activations", action="store_true",
        help="compute each block twice: less memory, a third more time")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0, 2 ** 63), default=0, help="of everything random")
    add("--out-dir", help="default: out/<dataset>-<model>, with the method's name if not sphere")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--log-every", type=number(int, 1), help="steps between lines of the log")
    add("--sample-every", type=number(int, 1), help="steps between grids of samples")
    add("--save-every", type=number(int, 1), help="steps between checkpoints")
    add("--report", type=number(int, 0),
        help="pictures a row of the quality report at the end; 0: none (fid.py makes it, too)")
    add = parser.add_argument_group("sampling (the grids; sample.py starts from it)").add_argument
    add("--cfg", type=number(float, 0), help="guidance scale; 1 is none")
    add("--sampling-noise", choices=("fresh", "same"), help="new at each step, or the first again")
    add("--sigma", type=number(float, 0), help="where the decay starts; by default it follows "
        "--alpha-max: its tangent, times the preset's sigma_scale")

    return parser


def parse_args(argv):
    parser, first = build_parser(), ArgumentParser(add_help=False)
    first.add_argument("--method")                            # these decide about the defaults
    first.add_argument("--dataset", default=DATASET)
    first.add_argument("--rae")
    known = first.parse_known_args(argv)[0]
    preset = PRESETS.get(known.dataset) or BY_RAE[RAE_OF_PATH]
    if known.rae != preset["rae"]:
        preset = BY_RAE.get(known.rae, preset)
    preset = {**preset, **BY_METHOD.get(known.method, {})}
    parser.set_defaults(**{"steps": None, **preset, "epochs": None})
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (None if args.steps else preset["epochs"])
    unused = {name: f"--method {args.method}" for name in METHODS["sphere"].flags
              if name not in METHODS[args.method].flags}
    if "noise_dist" not in unused and args.noise_dist != "lognorm":
        unused |= dict.fromkeys(("p_mean", "p_std"), f"--noise-dist {args.noise_dist}")
    if "mix_prob" not in unused and not args.mix_prob:
        unused["alpha_mix"] = "--mix-prob 0"
    for name, flag in unused.items():
        if getattr(args, name) != preset[name]:
            ours = {"spherify": "no-spherify"}.get(name, name).replace("_", "-")
            parser.error(f"--{ours} means nothing to {flag}")
    if args.sigma is None:
        args.sigma = args.sigma_scale * sphere.angle_to_sigma(args.alpha_max)
    name = printable(Path(os.path.realpath(args.dataset)).name)[:80]
    ending = f"-{args.method}" * (args.method != "sphere")
    args.out_dir = args.out_dir or f"out/{name}-{args.model.replace('/', '-')}{ending}"
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What no flag can tell of itself."""
    if args.alpha_mix < args.alpha_max and args.mix_prob:
        parser.error(f"--alpha-mix {args.alpha_mix:g} is below --alpha-max {args.alpha_max:g}: "
                     "the mix is harder")
    if args.method == "sphere-encoder" and args.rae != "pixels":
        parser.error(f"--method sphere-encoder works on pictures: not --rae {args.rae}, but pixels")
    if args.method == "meanflow" and (args.compile or args.checkpoint_activations):
        parser.error("--method meanflow differentiates forward, too: no --compile and no "
                     "--checkpoint-activations")
    if args.rae not in OF_PATCHES and args.rae_patch != PAPER["rae_patch"]:
        parser.error(f"--rae-patch means nothing to --rae {args.rae}")
    if args.method == "sphere" and not args.consistency and args.reconstruct == "low":
        parser.error("--consistency 0 leaves the noisier level without a loss: add --reconstruct "
                     "both")
    if args.rae not in lite0.PRETRAINED and args.decoder_steps != 1200:  # laptop
        parser.error(f"--decoder-steps: the decoder of {args.rae} is not trained")  # laptop
    if args.dataset not in IMAGE_SIZE:
        for flag, folder in (("--data-dir", args.data_dir), ("--out-dir", args.out_dir)):
            inside = Path(os.path.realpath(folder))
            if inside.is_relative_to(os.path.realpath(args.dataset)):
                parser.error(f"{flag} {folder} is inside {args.dataset}, and would be taken for a "
                             "class of pictures")


# ---- A step --------------------------------------------------------------------------------------

class Learner:
    """The denoiser with its optimizer and EMAs, and a step of its training.

    run: a dict of settings, as PAPER. model is always the raw one; parallel averages gradients over
    `world` processes; a process takes its share of a batch in `accumulate` micro-batches.
    """

    def __init__(self, run, latent_shape, num_classes, device, rank=0, world=1, accumulate=1,
                 compiles=False, checkpoint_activations=False):
        torch.manual_seed(run["seed"])
        self.run, self.device, self.world, self.accumulate = run, device, world, accumulate
        self.micro = run["batch_size"] // (world * accumulate)
        self.first = rank * accumulate * self.micro           # of the global batch
        self.method = METHODS[run["method"]]
        self.model = build_network(run["method"], run["model"], latent_shape, num_classes)
        self.model.to(device)
        for part in self.model.modules():
            if isinstance(part, SiT):
                part.checkpoint_activations = checkpoint_activations
        self.parallel = (DistributedDataParallel(self.model, broadcast_buffers=False)
                         if world > 1 else self.model)
        if compiles:
            self.parallel = self.compiled(latent_shape)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]    # not positions
        self.optimizer = torch.optim.AdamW(self.weights, lr=run["lr"], betas=run["betas"],
                                           weight_decay=run["weight_decay"], fused=True)
        self.emas = [{key: value.clone() for key, value in self.model.state_dict().items()}
                     for _ in run["ema_decay"]]
        self.bad_step, self.waited = torch.tensor(-1, device=device), 0.0     # seconds, for data

    def state(self):
        emas = {str(decay): ema for decay, ema in zip(self.run["ema_decay"], self.emas)}
        return {"model": self.model.state_dict(), "ema": emas,
                "optimizer": self.optimizer.state_dict()}

    def load(self, checkpoint, with_optimizer=True):
        self.model.load_state_dict(checkpoint["model"])
        if with_optimizer:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(),
                                            "state": checkpoint["optimizer"]["state"]})
        self.emas = [{k: v.to(self.device) for k, v in checkpoint["ema"][str(decay)].items()}
                     for decay in self.run["ema_decay"]]

    def compiled(self, latent_shape):
        """The network compiled and tried on zeros; as it is, with a word, where that fails."""
        started, n = time.perf_counter(), 2 * self.micro
        network, v = torch.compile(self.parallel, dynamic=False), torch.zeros(n, *latent_shape)
        y, drop = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
        more = [torch.zeros(n, k) for k in self.method.network.values()]     # the times
        try:
            with autocast(self.run["dtype"], self.device):
                predicted = network(*(t.to(self.device) for t in (v, y, *more)),
                                    drop=drop.to(self.device))
            predicted.float().mean().backward()
            say(f"compiled in {time.perf_counter() - started:.0f} s")
        except Exception as error:                            # compilers fail in many ways
            say(f"note: not compiled, and slower for it ({one_line(error)}); --no-compile "
                "does without trying")
            network = self.parallel
        self.model.zero_grad(set_to_none=True)
        return network

    def denoise(self, drop, v, y, *more):
        """Several noise levels of the same examples, one below the other, drop the same labels."""
        with autocast(self.run["dtype"], self.device):
            return self.parallel(v, y, *more, drop=drop.repeat(len(v) // len(drop)))

    def micro_batch(self, latents, step, m):
        """z (b, C, h, w), and y, two noise levels, drop, (b,) each, of the m-th micro-batch of a
        step: a function of (seed, step), so that a thread may ask for it ahead."""
        run, n = self.run, self.run["batch_size"]
        # What is small is drawn for the global batch; then each process takes its part.
        g = keyed_generator("batch", run["seed"], step)
        if self.method.times:
            levels = self.method.times(n, run["p_mean"], run["p_std"], generator=g)
        else:
            levels = sphere.noise_pair(
                n, run["noise_dist"], run["p_mean"], run["p_std"], run["alpha_max"],
                run["alpha_mix"], run["mix_prob"], generator=g)
        drop = torch.rand(n, generator=g) < run["class_dropout_prob"]
        flips = torch.randint(2, (n,), generator=g) * run["flips"]
        indices = global_batch(len(latents), n, step, run["seed"])
        first = self.first + m * self.micro
        mine = slice(first, first + self.micro)
        found = *latents.batch(indices[mine], flips[mine].numpy()), *(
            t[mine] for t in (*levels, drop))
        pins = self.device.type == "cuda"                     # then the copy is not waited for
        return [t.pin_memory() if pins and t.device.type == "cpu" else t for t in found]

    def add_gradients(self, step, batches, to_log=False):
        """Forward and backward -> sums over the batch for the log: losses, and those by angle.

        batches: an iterator of what micro_batch gives.
        """
        run, sums = self.run, {}
        for m in range(self.accumulate):
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            z, y, hi, lo, dropped = (t.to(self.device, non_blocking=True) for t in batch)
            z, first = z.float(), self.first + m * self.micro
            eps = example_noise("eps", run["seed"], step, first, z)
            more = {}
            if run["method"] == "sphere":
                more = {"reconstruct": run["reconstruct"],
                        "f": sphere.spherify if run["spherify"] else sphere.full_precision}
            if run["latent_consistency"]:
                more["eps_again"] = example_noise("eps again", run["seed"], step, first, z)
            if run["pair_noise"] == "two":
                more["eps_lo"] = example_noise("eps low", run["seed"], step, first, z)
            last = m == self.accumulate - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.parallel.no_sync():
                losses, predictions = self.method.training_losses(
                    partial(self.denoise, dropped), z, y, hi, lo, eps, **more)
                weights = {"consistency": run["consistency"], "squared_error": 0,
                           "latent_consistency": run["latent_consistency"]}
                loss = sum(weights.get(name, 1) * value for name, value in losses.items())
                (loss / self.accumulate).backward()
            if to_log:
                parts = {name: value.detach() / (self.accumulate * self.world)
                         for name, value in {"loss": loss, **losses}.items()}
                if predictions:
                    l1, cosine = sphere.l1_and_cosine(torch.cat(predictions).detach(),
                                                      torch.cat([z, z]))
                    parts["loss_by_angle"] = by_angle(50 * l1 + cosine, torch.cat([hi, lo]))
                sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
        return sums

    def update(self, step, lr):
        """-> the norm of the gradients before they were clipped, on the device, as all here: the
        CPU waits for nothing. See check."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.run["clip"] or math.inf)
        first_bad = ~norm.isfinite() & (self.bad_step < 0)
        self.bad_step = torch.where(first_bad, step, self.bad_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for decay, ema in zip(self.run["ema_decay"], self.emas):
            if not self.run["init_from"]:                     # or random weights would linger
                decay = min(decay, (1 + step) / (10 + step))
            average = get_ema_multi_avg_fn(decay)
            average(list(ema.values()), list(self.model.state_dict().values()), None)
        return norm

    def check(self):
        """UserError: a gradient was not finite. For a GPU a wait; before a log line and a save."""
        if (step := self.bad_step.item()) >= 0:
            raise UserError(f"step {step}: the gradient norm is not finite; what is on the disk is "
                            "from before: try a lower --lr, --clip 1 or --dtype float32")


def compiles(asked, device):
    """--compile, --no-compile, or by default on a GPU for which there is a compiler."""
    return device.type == "cuda" and bool(find_spec("triton")) if asked is None else asked


def example_noise(name, seed, step, first, z):
    """N(0, I) like z; that of an example is its own, whichever process computes it."""
    generators = [keyed_generator(name, seed, step, first + i, device=z.device)
                  for i in range(len(z))]
    return sphere.draw_noise(z.shape, generators, z.device)


def learning_rate(step, steps, lr, warmup_steps, decay_last):
    """It rises over warmup_steps, and falls to 5% over the last share of the steps."""
    rate, falling = lr * min(1, (step + 1) / max(1, warmup_steps)), steps * decay_last
    return rate * min(1, 0.05 + 0.95 * (steps - step) / falling) if falling else rate


def by_angle(values, sigma):
    """values (n,) -> sums and counts (2, 4) in four bins of the noise angle, each 22.5 deg."""
    bins = (torch.rad2deg(torch.atan(sigma)) / 22.5).long().clamp(max=3)
    both = torch.stack([values, torch.ones_like(values)])
    return torch.zeros(2, 4, device=values.device).index_add(1, bins, both)


# ---- A run ---------------------------------------------------------------------------------------

def check_same_run(out, run, before, dataset):
    """run: what defines this one; before: the arguments of the checkpoint in out."""
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in run.items()
               if name != "pictures" and before.get(name) != value]
    if before["pictures"] != run["pictures"] and not changed:
        changed = [what_changed(out / "pictures.json", dataset)]
    if changed:
        raise UserError(f"{out} holds another run ({'; '.join(changed)}): resume that, or give a "
                        "new --out-dir")


def check_init(path, init, args, dataset):
    """UserError: the checkpoint `init` is of another kind than the run that starts from it."""
    names = ("method", "model", "rae", "rae_patch", "image_size", "ema_decay")
    other = [f"{name} {init['args'].get(name)}, not {getattr(args, name)}" for name in names
             if init["args"].get(name) != getattr(args, name)]
    if init["classes"] != dataset.classes:
        other.append("other classes")
    if other:
        raise UserError(f"--init-from {path} has {'; '.join(other)}")


def what_changed(path, dataset):
    """In words: how a data set differs from the one whose files and their sums are in path."""
    try:
        old, new = json.loads(path.read_text()), sums_of(dataset)
        kinds = {"added": new.keys() - old.keys(), "removed": old.keys() - new.keys(),
                 "changed": {file for file in new.keys() & old.keys() if new[file] != old[file]}}
    except (OSError, ValueError, AttributeError):
        kinds = {}
    words = [f"{len(files)} {kind}, {min(files)} first" for kind, files in kinds.items() if files]
    return "its pictures have changed: " + ("; ".join(words) or "their number, crop or labels")


def sums_of(dataset):
    return dict(zip(getattr(dataset, "files", ()), getattr(dataset, "sums", ())))


def cut_log(path, step):
    """Leaves the log up to the checkpoint's step: what came after it is done again."""
    lines, kept, broken = [], [], False
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            broken = True
    if broken:
        aside = path.with_name(f"log-with-broken-lines-{time.time_ns()}.jsonl")
        print(f"note: {path} had lines that are not of the log; as it was it is now {aside}")
        path.replace(aside)
    with write_whole(path) as part:
        part.write_text("".join(kept))


def plain(sums):
    """Sums for the log, of this process -> of all processes, as plain numbers."""
    if dist.is_initialized():
        for value in sums.values():
            dist.all_reduce(value)
    line = {name: value.tolist() for name, value in sums.items()}
    if "loss_by_angle" in line:
        line["loss_by_angle"] = [total / n if n else None
                                 for total, n in zip(*line["loss_by_angle"])]
    return line


LOSSES = ("loss", "reconstruction", "consistency", "latent_consistency", "latent_again", "velocity",
          "average_velocity", "squared_error")


def log_line(line):
    angles = " ".join("-" if value is None else f"{value:.1f}"
                      for value in line.get("loss_by_angle", ()))
    return (f"step {line['step']} " +
            " ".join(f"{name} {line[name]:.2f}" for name in LOSSES if name in line) +
            f" | by angle 0-22-45-68-90 deg: {angles}" * bool(angles) +
            f" | gradient {line['grad_norm']:.1f}, {line['images_per_s']:.0f} images/s, "
            f"waiting {100 * line['waiting']:.1f}%, {line['memory_gb']:.1f} GB")


def write_grid(path, sampler, classes, steps):
    """Up to four pictures of each class, 40 at most."""
    indices = torch.arange(min(4 * len(classes), 40))
    labels = indices % len(classes)
    images = sampler(indices, labels, steps=steps)
    with write_whole(path) as part:
        grid = picture_grid(images, min(len(classes), 10), [classes[label] for label in labels])
        grid.save(part)


@user_errors
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup(args.device)
    if args.batch_size % (world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} does not divide into {world} processes x "
                        f"{args.accumulate} micro-batches")
    sides = picture_sides(args.rae, args.image_size, args.rae_patch)
    with first_process_first(rank):
        dataset = load_dataset(args.dataset, *sides, args.data_dir, args.split, args.skip_bad)
    say(f"{printable(args.dataset)}: {len(dataset.labels):,} pictures of {describe(dataset)}")
    if len(dataset.classes) == 1 and args.cfg != 1:
        say(f"note: {args.dataset} has one class: there is nothing that guidance (--cfg) could "
            "tell apart")
    alone = rank == 0 and not args.encode_only                # one run writes in a folder
    with locked(Path(args.out_dir)) if alone else contextlib.nullcontext():
        run_on(args, dataset, rank, world, device)


def run_on(args, dataset, rank, world, device):
    """Autoencoder, latents, model: new, or as the checkpoint has them; then the training."""
    out, N, num_classes = Path(args.out_dir), len(dataset.labels), len(dataset.classes)
    run = {name: getattr(args, name) for name in DEFINING} | {"pictures": dataset.recipe}
    checkpoint = load_checkpoint(out / "ckpt.pt") if (out / "ckpt.pt").exists() else None
    if checkpoint:
        check_same_run(out, run, checkpoint["args"], dataset)
    init = load_checkpoint(args.init_from) if args.init_from and not checkpoint else None
    if init:
        check_init(args.init_from, init, args, dataset)
    rae = open_rae(args.rae, dataset, args.image_size, args.rae_patch, args.seed, device,
                   args.weights_dir, (checkpoint or init or {}).get("rae"))
    latents = open_latents(dataset, rae, Path(args.data_dir) / "latents",
                           "yes" if args.encode_only else args.cache_latents, rank, world,
                           args.flips, check=args.encode_only)
    if args.encode_only:
        return
    if args.rae in lite0.PRETRAINED and not (checkpoint or init):  # laptop
        lite0.train_decoder(rae, dataset, latents, Path(args.data_dir) / "decoders",  # laptop
                            args.decoder_steps, args.seed, rank, args.flips)  # laptop

    # Model, optimizer, EMAs; the step at which the run is resumed.
    start = checkpoint["step"] if checkpoint else 0
    if args.epochs is not None:
        args.steps = -(-args.epochs * N // args.batch_size)
    learner = Learner(run, rae.latent_shape, num_classes, device, rank, world, args.accumulate,
                      start < args.steps and args.method != "meanflow"
                      and compiles(args.compile, device),
                      args.checkpoint_activations)
    if checkpoint or init:
        learner.load(checkpoint or init, with_optimizer=not init)
        checkpoint = init = None                              # their tensors are no longer needed
    C, side, _ = rae.latent_shape
    parameters = sum(p.numel() for p in learner.model.parameters())
    say(f"latents {C} x {side} x {side}, L = {C * side ** 2:,}, "
        f"{'with' if args.flips else 'without'} mirror images\n"
        f"{args.model}: {parameters:,} parameters, {args.dtype} on {world} x {device.type}\n"
        f"{args.steps} steps of {args.batch_size} = {world} processes x {args.accumulate} x "
        f"{learner.micro} pictures, {args.steps * args.batch_size / N:.1f} epochs"
        + f"; resuming {out} at step {start}" * bool(start))
    train(args, learner, dataset, rae, latents, start, rank)


def train(args, learner, dataset, rae, latents, start, rank):
    """The loop, from step `start`, and the report."""
    out, N, classes = Path(args.out_dir), len(dataset.labels), dataset.classes
    arguments = {**vars(args), "pictures": dataset.recipe}
    denoiser = partial(predict, learner.model, learner.emas[0], args.dtype)
    sampler = partial(draw, denoiser, rae, seed=args.seed, null_class=len(classes),
                      **sampling_settings(arguments))

    def save(step):
        learner.check()
        state = learner.state()
        if name := first_not_finite(state):
            raise UserError(f"step {step}: {name} is not finite; what is on the disk is from "
                            "before: try a lower --lr, --clip 1 or --dtype float32")
        save_tensors(out / "ckpt.pt", {**state, "step": step, "args": arguments,
                                       "classes": classes, "rae": rae.saved()})

    def grid(step, again=True):
        path, due = out / f"samples-{step:07d}.png", step % args.sample_every == 0
        if (due or step >= args.steps) and (again or not path.exists()):
            write_grid(path, sampler, classes, args.sample_steps)

    if rank == 0 and start < args.steps:
        sweep(out)
        write_json(out / "args.json", arguments)
        write_json(out / "pictures.json", sums_of(dataset))
        cut_log(out / "log.jsonl", start)
    if rank == 0 and start:
        grid(start, again=False)                              # if it was killed before it

    stop = Stop(args.log_every)
    jobs = ((step, m) for step in range(start, args.steps) for m in range(args.accumulate))
    batches = prefetch(lambda job: learner.micro_batch(latents, *job), jobs)
    clock, clock_step = time.perf_counter(), start
    bar = tqdm(total=args.steps, initial=min(start, args.steps), desc=printable(out), unit="step",
               disable=rank > 0 or start >= args.steps)
    with on_signals(stop.receive):
        for step in range(start, args.steps):
            to_log = step + 1 == args.steps or (step + 1) % args.log_every == 0
            sums = learner.add_gradients(step, batches, to_log)
            lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.decay_last)
            grad_norm = learner.update(step, lr)
            step += 1
            bar.update()
            if to_log:
                learner.check()
                now = time.perf_counter()
                line = {"step": step, "epoch": round(step * args.batch_size / N, 3), **plain(sums),
                        "grad_norm": grad_norm.item(), "lr": lr,
                        "images_per_s": (step - clock_step) * args.batch_size / (now - clock),
                        "waiting": learner.waited / (now - clock),
                        "memory_gb": peak_memory_gb(learner.device)}
                clock, clock_step, learner.waited = now, step, 0.0
                if rank == 0:
                    with open(out / "log.jsonl", "a") as file:
                        file.write(json.dumps(line) + "\n")
                    bar.write(log_line(line))
            stops = stop.after(step)
            if rank == 0 and (stops or step == args.steps or step % args.save_every == 0):
                save(step)
            if stops:
                barrier()                                     # nobody leaves before it is saved
                raise UserError(f"stopped at step {step} and saved: the same command resumes it",
                                status=128 + stops)
            if rank == 0:
                grid(step)
    bar.close()
    if rank == 0:
        finish(args, arguments, dataset, rae, sampler, max(start, args.steps))


def finish(args, arguments, dataset, rae, sampler, step):
    """The quality report, if it is not there since a former end of the run."""
    out = Path(args.out_dir)
    print(f"{printable(out)}/ckpt.pt is finished at step {step}; draw from it: python sample.py "
          f"--ckpt {printable(out)}/ckpt.pt; raise --steps to continue it")
    quality, saved = out / "quality.json", os.stat(out / "ckpt.pt").st_mtime_ns
    if not args.report or quality.exists() and quality.stat().st_mtime_ns >= saved:
        return
    try:
        test_set = held_out_set(args.dataset, args.image_size)
        table = quality_report(dataset, test_set, rae, sampler, default_features(rae.name),
                               args.report)
        write_json(quality, table)
        print(report_text(table, arguments, step))
    except UserError as error:                                # the run is whole all the same
        print(f"no quality report: {error}")


if __name__ == "__main__":
    main()
