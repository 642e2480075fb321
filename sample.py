"""From a checkpoint to pictures, in a few steps.

    python sample.py                                       # the newest run in out/: a grid
    python sample.py --steps 2 --cfg 1 --classes daisy poppy
    python sample.py --trajectory --steps 4                # what each step predicts, a row a step
    python sample.py --num 200 --out pictures/             # numbered files
    torchrun --nproc-per-node 8 sample.py --num-images 50000 --npz    # for FID: class-balanced

Picture i has the label i mod classes (or by --balance) and its own noise, a function of (seed, i):
one seed, one picture, everywhere, in batches of any size and in any number of processes.
"""
import argparse
import collections
import contextlib
import itertools
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import sphere
from baselines import METHODS, build_network, variant
from rae import check_rae, load_rae
from settings import SETTINGS
from utils.checkpoint import check_weights, completed, load_checkpoint
from utils.cli import ArgumentParser, UserError, class_numbers, number, one_line, printable
from utils.files import locked
from utils.images import GRIDS, check_room, to_uint8, write_pictures
from utils.processes import (autocast, compile_both, compiles, first_process_first, gather,
                             keyed_generator, noise_of_each, prefetch, set_precision, setup,
                             user_errors)

# ---- A checkpoint --------------------------------------------------------------------------------


def newest_checkpoint(root="out"):
    found = sorted(Path(root).glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run in {root}/ to sample from: train one (python train.py) "
                        "or name it by --ckpt")
    return found[-1]


def load_run(path):
    """The checkpoint of a run, all of it looked at. UserError: it cannot be used."""
    return load_checkpoint(path, check_run)


def check_run(checkpoint):
    checkpoint["args"] = completed(checkpoint["args"], SETTINGS)
    model, shape = network_of(checkpoint)
    check_weights(checkpoint, model)
    if (found := check_rae(checkpoint)) not in (None, shape):
        raise ValueError(f"its autoencoder has latents of {found}, the model {shape}")


def network_of(checkpoint):
    """Returns its network, with random weights, and the (C, h, w) of its latents."""
    args, state = checkpoint["args"], checkpoint["model"]
    prefix = "encoder." if "encoder.pos_embed" in state else ""           # Sphere Encoder's
    C, patch = state[f"{prefix}x_embedder.weight"].shape[1:3]
    side = round(state[f"{prefix}pos_embed"].shape[1] ** 0.5) * patch
    shape = (C, side, side)
    return build_network(args["method"], args["model"], shape, len(checkpoint["classes"])), shape


def load_denoiser(checkpoint, ema, device):
    """Returns G(v, y) with one EMA ("0.9995"), the "first" or the "raw" weights; and which."""
    available = list(checkpoint["ema"])
    if ema == "first":
        ema = available[0]
    if ema != "raw" and ema not in available:
        raise UserError(f"--ema {one_line(ema, 30)} is not in this checkpoint: it has "
                        f"{', '.join(available)} and raw")
    model, _ = network_of(checkpoint)
    model.load_state_dict(checkpoint["model"] if ema == "raw" else checkpoint["ema"][ema])
    return partial(predict, model.to(device), {}, checkpoint["args"]["dtype"]), ema


def predict(model, weights, dtype, v, y, *more):
    """G(v, y), in eval mode, under autocast. weights: in the place of the model's own."""
    training = model.training
    model.eval()
    with autocast(dtype, v.device):
        predicted = torch.func.functional_call(model, weights, (v, y, *more))
    model.train(training)
    return predicted


def sampling_settings(run):
    """Keywords of `draw` from a run's settings (a dict)."""
    known = {"cfg_scale": run["cfg"], "gamma": run["gamma"], "noise": run["sampling_noise"],
             "sigma": run["sigma"], "solver": "euler"}
    method = METHODS[run["method"]]
    flat = {"spherify": run["spherify"]} if "spherify" in method.flags else {}
    return {"method": run["method"], **flat, **{name: known[name] for name in method.sampling}}


# ---- Pictures ------------------------------------------------------------------------------------

def draw(denoiser, rae, indices, labels, seed, steps, null_class, batch_size=50, trajectory=False,
         **settings):
    """Pictures number `indices` (n,) of a seed, with labels (n,) -> uint8 (n, 3, S, S), on the CPU;
    with trajectory, what each step predicts: (steps, n, 3, S, S). settings: sampling_settings."""
    batches = list(zip(indices.split(batch_size), labels.split(batch_size)))
    frames = torch.cat(list(draw_batches(denoiser, rae, batches, seed, steps, null_class,
                                         trajectory, **settings)), dim=1)
    return frames if trajectory else frames[0]


def draw_batches(denoiser, rae, batches, seed, steps, null_class, trajectory=False,
                 method="sphere", spherify=True, noise=None, **settings):
    """As draw: yields (frames, n, 3, S, S) for each (indices, labels) of batches."""
    if "sigma" in settings and not callable(settings["sigma"]):
        settings["sigma"] = sphere.decay(settings["sigma"], settings.pop("gamma"))
    drawn_ahead = prefetch(lambda batch: keyed_noise(seed, batch[0], rae.latent_shape,
                                                     noise != "fresh", steps), batches)
    for (indices, labels), drawn in zip(batches, drawn_ahead):
        shape, predictions = (len(indices), *rae.latent_shape), []
        z = variant(method, spherify).sample(
            denoiser, shape, labels.to(rae.device), steps, null_class=null_class,
            noise=(eps.to(rae.device, non_blocking=rae.device.type == "cuda") for eps in drawn),
            trajectory=predictions, **settings)
        if not z.isfinite().all():
            raise UserError("the sampled latents are not finite: try less guidance, or the float32 "
                            "of --device cpu")
        yield torch.stack([to_uint8(rae.decode(latents)).cpu()
                           for latents in (predictions if trajectory else [z])])


def keyed_noise(seed, indices, shape, same, steps):
    """Noise (n, *shape) without end, of each picture its own; for `steps`, 8 at most, at once."""
    generators = [keyed_generator("sample", seed, int(i)) for i in indices]
    fresh = (noise_of_each(generators, shape) for _ in itertools.count())
    if same:
        return itertools.repeat(next(fresh))
    return itertools.chain(list(itertools.islice(fresh, min(steps, 8))), fresh)


def shares_of(counts, indices):
    """Labels (n,) of pictures number `indices`, as often as counts (classes,) say, however many
    there are: multiples of the golden ratio, modulo 1, fill the unit interval evenly."""
    place = (indices.double() * (5 ** 0.5 - 1) / 2 + 0.5) % 1
    return torch.searchsorted(torch.tensor(counts).cumsum(0), place * sum(counts), right=True)


# ---- The command ---------------------------------------------------------------------------------

def parse_args(argv):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", help="a checkpoint (default: the newest in out/)")
    add("--ema", default="first", help="which weights: an EMA's decay, first, or raw")
    add("--weights-dir", help="folder with the files of dinov2-b, put there by hand")
    add("--classes", nargs="+", help="names or numbers of classes (default: all, in turn)")
    add("--num", "--num-images", type=number(int, 1), help="how many pictures (default: 4 a class, "
        "40 at most); torchrun takes --num for its own, write --num-images there")
    add("--balance", choices=("equal", "data"), default="equal",
        help="every class as often, or as often as in the pictures of the training")
    add("--seed", type=number(int, 0, 2 ** 63), default=0,
        help="picture i is a function of (seed, i)")
    group = parser.add_argument_group("Algorithm 1 (what is not given is taken from the run)")
    add, sigma = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--steps", type=number(int, 1, 1000),
        help="denoising steps; with guidance each is two calls")
    add("--cfg", type=number(float, 0), help="guidance scale; 1 is none")
    add("--solver", choices=("euler", "heun"), help="of flow matching; heun: two calls a step")
    add("--gamma", type=number(float, 0), help="sigma decays as (1 - t / steps) ** gamma")
    add("--sampling-noise", choices=("fresh", "same"),
        help="new noise at each step, or the first again")
    sigma("--sigma", type=number(float, 0), help="sigma_max, where the decay starts")
    sigma("--sigmas", type=number(float, 0), nargs="+",
          help="no decay: the noise of each of the steps - 1 re-noisings")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="NAME.png or .jpg: a grid; NAME.npz: arr_0 (N, H, W, 3) uint8, labels and "
        "classes; FOLDER/: numbered files (default: sample.png beside the checkpoint)")
    add("--npz", action="store_true", help="short for --out samples.npz beside the checkpoint")
    add("--trajectory", action="store_true", help="a grid of what each step predicts")
    add("--batch-size", type=number(int, 1, 10 ** 6),
        help="pictures at once in a process (default: 50, on a GPU 128)")
    add("--rae-dtype", choices=("float32", "tf32", "bfloat16"),
        help="of the decoder (default: float32, but tf32 on CUDA where the denoiser is bfloat16)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="compile denoiser and decoder (default: for 1,000 pictures or more on a GPU where a "
        "compiler is there)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    ending = Path(args.out or "").suffix.lower()
    folder = (args.out or "").endswith("/") or Path(args.out or "").is_dir()
    if ending not in ("", ".npz", *GRIDS) and not folder:
        parser.error(f"--out {args.out}: a file ends in .npz, {', '.join(GRIDS)}, a folder in /")
    if args.sigmas and args.gamma is not None:
        parser.error("--sigmas are the noise as it is: no --gamma")
    if args.npz and args.out and ending != ".npz":
        parser.error("--npz is a file beside the checkpoint, --out another place: give one")
    if args.trajectory and (args.npz or ending == ".npz"):
        parser.error("--trajectory goes into a grid or a folder, not into an npz")
    return args


@user_errors
def main(argv=None):
    args = parse_args(argv)
    path = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    rank, world, device = setup(args.device)
    checkpoint = load_run(path)
    run, classes = checkpoint["args"], checkpoint["classes"]
    denoiser, ema = load_denoiser(checkpoint, args.ema, device)
    with first_process_first(rank):
        rae = load_rae(checkpoint["rae"], device, args.weights_dir)
    rae_dtype = set_precision(rae, args.rae_dtype, run["dtype"])

    # What is asked for: how many steps, which labels, and what the run was set up for.
    steps, settings = args.steps or run["sample_steps"], sampling_settings(run)
    given = {"cfg_scale": args.cfg, "gamma": args.gamma, "noise": args.sampling_noise,
             "sigma": args.sigmas or args.sigma, "solver": args.solver}
    given = {name: value for name, value in given.items() if value is not None}
    check_given(given, settings, steps)
    settings |= given
    if args.sigmas:
        del settings["gamma"]
    wanted = class_numbers(args.classes, classes) if args.classes else list(range(len(classes)))
    counts = checkpoint.get("counts") or []                   # older ones do not have them
    if args.balance == "data" and len(counts) != len(classes):
        raise UserError(f"--balance data: {path} does not say how many pictures of each class "
                        "there were: resume its training for a step")
    shares = args.balance == "data" and [counts[label] for label in wanted]
    recipe = {"checkpoint": str(path), "step": checkpoint["step"], "ema": ema, "steps": steps,
              **settings, "seed": args.seed,
              "classes": [classes[label] for label in wanted] if args.classes else "all",
              "balance": "as the data" if shares else "label = index mod classes",
              **({"decoder": rae_dtype} if rae_dtype != "float32" else {})}
    if args.sigmas:
        settings["sigma"] = lambda t, T: args.sigmas[t - 1]
    num = args.num or (min(len(wanted), 10) if args.trajectory else
                       40 if len(wanted) > 40 else len(wanted) * min(4, 40 // len(wanted)))
    cfg_scale = settings.get("cfg_scale", 1)
    nfe = (steps * (1 if cfg_scale == 1 else 2)
           * (2 if settings.get("solver") == "heun" else 1))

    # The processes take the batches in turn; the first one writes the pictures in their order.
    out = Path(args.out or path.parent / ("samples.npz" if args.npz else "sample.png"))
    shape = (steps if args.trajectory else 1, num, 3, rae.image_size, rae.image_size)
    names = check_room(out, shape, args.out)
    batch_size = min(num, args.batch_size or (128 if device.type == "cuda" else 50))
    if args.compile and METHODS[run["method"]].network:       # not a plain SiT
        raise UserError(f"--compile: not for a run of --method {run['method']}")
    compile = compiles(args.compile, device) and not METHODS[run["method"]].network and (
        args.compile or num >= 1000)
    if compile:
        recipe["compiled"] = True
        denoiser = compile_both(denoiser, rae, batch_size, guided=cfg_scale != 1)
    started = time.perf_counter()
    # A compiled network is of one shape: the last batch is filled up, and cut when it is written.
    indices = torch.arange(-(-num // batch_size) * batch_size if compile else num)
    labels = torch.tensor(wanted)[shares_of(shares, indices) if shares else indices % len(wanted)]
    batches = list(zip(indices.split(batch_size), labels.split(batch_size)))
    drawn = draw_batches(denoiser, rae, batches[rank::world], args.seed, steps, len(classes),
                         args.trajectory, **settings)
    rounds = tqdm(range(-(-len(batches) // world)), desc="sampling", unit="batch",
                  disable=rank != 0 or len(batches) < 2 or None)
    in_order = (frames for _ in rounds for frames in gather(next(drawn, None))
                if frames is not None)
    pictures = (frames[:, :num - begin].numpy()
                for begin, frames in zip(itertools.count(0, batch_size), in_order))
    if rank > 0:
        return collections.deque(pictures, maxlen=0)          # draws its share, gets no pictures
    with locked(out) if names else contextlib.nullcontext():
        write_pictures(out, pictures, shape, labels[:num], classes, len(wanted), recipe, names)
    seconds, names = time.perf_counter() - started, [printable(classes[c]) for c in wanted[:num]]
    print(f"{path} at step {checkpoint['step']}, EMA {ema}, seed {args.seed}\n"
          f"{num} pictures of {len(names)} classes {'by their shares' if shares else 'in turn'}: "
          f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}\n"
          f"{steps} steps of {run['method']}, guidance {cfg_scale:g}: "
          f"NFE {nfe} a picture ({steps} as the paper counts), {seconds:.2f} s, "
          f"{num / seconds:.1f} images/s on {world} x {device.type}\n{out}")


def check_given(given, settings, steps):
    """UserError: flags that mean nothing to the run's method, or that do not fit together."""
    if others := given.keys() - settings.keys():
        flags = {"noise": "--sampling-noise", "cfg_scale": "--cfg"}
        names = sorted(flags.get(k, f"--{k}") for k in others)
        raise UserError(f"{', '.join(names)}: means nothing to a run of --method "
                        f"{settings['method']}")
    if isinstance(given.get("sigma"), list):
        if len(given["sigma"]) != steps - 1:
            raise UserError(f"--sigmas has {len(given['sigma'])} values: give {steps - 1}, one for "
                            f"each re-noising of {steps} steps")
        if not settings.get("spherify", True):
            raise UserError("--sigmas: without the sphere sampling starts at sigma_max: give "
                            "--sigma")


if __name__ == "__main__":
    main()
