"""From a checkpoint to pictures, in a few steps.

    python sample.py                                       # the newest run in out/: a grid
    python sample.py --steps 2 --cfg 1 --classes daisy poppy
    python sample.py --trajectory --steps 4                # what each step predicts, a row a step
    python sample.py --num 200 --out pictures/             # numbered files
    torchrun --nproc-per-node 8 sample.py --num-images 50000 --npz    # for FID: class-balanced

Picture i has the label i mod classes and its own noise, a function of (seed, i): one seed, one
picture, everywhere, in batches of any size and in any number of processes.
"""
import contextlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sphere
from baselines import METHODS
from common import (ArgumentParser, UserError, autocast, barrier, first_process_first, free_bytes,
                    from_first, keyed_generator, locked, number, one_line, part_of, prefetch,
                    printable, reserve, setup, sweep, to_uint8, user_errors, write_whole)
from data import ENDINGS
from rae import load_checkpoint, load_rae, network_of

# ---- A checkpoint --------------------------------------------------------------------------------


def newest_checkpoint(root="out"):
    found = sorted(Path(root).glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run in {root}/ to sample from: train one (python train.py) "
                        "or name it by --ckpt")
    return found[-1]


def load_denoiser(checkpoint, ema, device):
    """-> G(v, y) of a checkpoint with one EMA ("0.9995"), the "first" or the "raw" weights; which.
    """
    available = list(checkpoint["ema"])
    if ema == "first":
        ema = available[0]
    if ema != "raw" and ema not in available:
        raise UserError(f"--ema {one_line(ema, 30)} is not in this checkpoint: it has "
                        f"{', '.join(available)} and raw")
    model, _ = network_of(checkpoint)
    model.load_state_dict(checkpoint["model"] if ema == "raw" else checkpoint["ema"][ema])
    return partial(predict, model.to(device).eval(), {}, checkpoint["args"]["dtype"]), ema


def predict(model, weights, dtype, v, y, *more):
    """G(v, y), or what more a method asks: no label dropped, under autocast. weights: in the place
    of the model's own."""
    keep = torch.zeros_like(y, dtype=torch.bool)
    with autocast(dtype, v.device):
        return torch.func.functional_call(model, weights, (v, y, *more), {"drop": keep})


def sampling_settings(run):
    """The sampler as a run (a dict of its arguments) was set up for it: keywords of draw."""
    known = {"cfg_scale": run["cfg"], "gamma": run["gamma"], "noise": run["sampling_noise"],
             "sigma": run["sigma"], "decay": run["decay"], "guidance": run["guidance"],
             "f": sphere.spherify if run["spherify"] else sphere.full_precision, "solver": "euler"}
    return {"method": run["method"], **{k: known[k] for k in METHODS[run["method"]].sampling}}


# ---- Pictures ------------------------------------------------------------------------------------

def draw(denoiser, rae, indices, labels, seed, steps, null_class, batch_size=50, trajectory=False,
         **settings):
    """Pictures number `indices` (n,) of a seed, with labels (n,) -> uint8 (n, 3, S, S), on the CPU;
    with trajectory, what each step predicts: (steps, n, 3, S, S). settings: sampling_settings."""
    batches = draw_batches(denoiser, rae, indices.split(batch_size), labels.split(batch_size), seed,
                           steps, null_class, trajectory, **settings)
    frames = torch.cat(list(batches), dim=1)
    return frames if trajectory else frames[0]


def draw_batches(denoiser, rae, indices, labels, seed, steps, null_class, trajectory,
                 method="sphere", **settings):
    """As draw, for lists of batches: yields (frames, n, 3, S, S) for each."""
    def noise_of(part):                                       # drawn ahead, by a thread
        generators = [keyed_generator("sample", seed, int(i)) for i in part]
        draws = steps if settings.get("noise") == "fresh" else 1
        return iter([sphere.draw_noise((len(part), *rae.latent_shape), generators, "cpu")
                     for _ in range(draws)])

    for part, y, noise in zip(indices, labels, prefetch(noise_of, indices)):
        predictions = []
        z = METHODS[method].sample(
            denoiser, (len(part), *rae.latent_shape), y.to(rae.device), steps, generator=noise,
            null_class=null_class, trajectory=predictions if trajectory else None, together=True,
            **settings)
        if not z.isfinite().all():
            raise UserError("the sampled latents are not finite: try less guidance, or the float32 "
                            "of --device cpu")
        shown = predictions if trajectory else [z]
        yield torch.stack([to_uint8(rae.decode(latents)).cpu() for latents in shown])


def picture_grid(images, columns, captions):
    """uint8 (n, 3, S, S) and n captions -> a PIL image. A row has them where they change."""
    n, _, S, _ = images.shape
    zoom, strip = -(-56 // S), 16                             # a cell has 56 pixels or more
    cell = S * zoom
    font = ImageFont.load_default(size=11)
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    captioned = [r == 0 or any(captions[i] != captions[i - columns] for i in row)
                 for r, row in enumerate(rows)]
    size = (columns * cell, len(rows) * cell + sum(captioned) * strip)
    grid = Image.new("RGB", size, "white")
    canvas, top = ImageDraw.Draw(grid), 0
    for row, with_caption in zip(rows, captioned):
        for column, i in enumerate(row):
            if with_caption:
                text = printable(captions[i])
                while canvas.textlength(text, font) > cell - 2:
                    text = text[:-1]
                left = column * cell + (cell - canvas.textlength(text, font)) / 2
                canvas.text((left, top + 1), text, "black", font)
            picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())     # (S, S, 3)
            picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(picture, (column * cell, top + with_caption * strip))
        top += cell + with_caption * strip
    return grid


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
    add("--seed", type=number(int, 0, 2 ** 63), default=0,
        help="picture i is a function of (seed, i)")
    group = parser.add_argument_group("Algorithm 1 (what is not given is taken from the run)")
    add, sigma = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--steps", type=number(int, 1, 1000),
        help="denoising steps; with guidance each is two calls")
    add("--cfg", type=number(float, 0), help="guidance scale; 1 is none")
    add("--solver", choices=("euler", "heun"), help="of flow matching; heun: two calls a step")
    add("--guidance", choices=("linear", "rotation"),
        help="extrapolate, or turn the prediction, its norm kept")
    add("--gamma", type=number(float, 0), help="sigma decays as (1 - t / steps) ** gamma")
    add("--decay", choices=("power", "geometric"), help="geometric: it decays as gamma ** t")
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
    add("--batch-size", type=number(int, 1, 10 ** 6), default=50,
        help="pictures at once in a process")
    add("--rae-dtype", choices=("float32", "bfloat16"), default="float32", help="of the decoder")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    ending = Path(args.out or "").suffix.lower()
    folder = (args.out or "").endswith("/") or Path(args.out or "").is_dir()
    if ending not in ("", ".npz", *GRIDS) and not folder:
        parser.error(f"--out {args.out}: a file ends in .npz, {', '.join(GRIDS)}, a folder in /")
    if args.sigmas and (args.gamma is not None or args.decay):
        parser.error("--sigmas are the noise as it is: no --gamma and no --decay")
    if args.trajectory and (args.npz or ending == ".npz"):
        parser.error("--trajectory goes into a grid or a folder, not into an npz")
    return args


@user_errors
def main(argv=None):
    args = parse_args(argv)
    path = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    rank, world, device = setup(args.device)
    checkpoint = load_checkpoint(path)
    run, classes = checkpoint["args"], checkpoint["classes"]
    denoiser, ema = load_denoiser(checkpoint, args.ema, device)
    with first_process_first(rank):
        rae = load_rae(checkpoint["rae"], device, args.weights_dir)
    rae.dtype = args.rae_dtype

    # The question: how many steps, which labels, and what the run was set up for.
    steps = args.steps or run["sample_steps"]
    if args.sigmas and len(args.sigmas) != steps - 1:
        raise UserError(f"--sigmas has {len(args.sigmas)} values: give {steps - 1}, one for each "
                        f"re-noising of {steps} steps")
    given = {"cfg_scale": args.cfg, "gamma": args.gamma, "noise": args.sampling_noise,
             "sigma": args.sigmas or args.sigma, "decay": args.decay, "guidance": args.guidance,
             "solver": args.solver}
    given, settings = {k: v for k, v in given.items() if v is not None}, sampling_settings(run)
    if others := given.keys() - settings.keys():
        names = sorted("--sampling-noise" if k == "noise" else f"--{k}" for k in others)
        raise UserError(f"{', '.join(names)}: means nothing to a run of --method {run['method']}")
    if args.sigmas and not run["spherify"]:
        raise UserError("--sigmas: without the sphere sampling starts at sigma_max: give --sigma")
    settings |= given
    if settings.get("decay") == "geometric" and settings["gamma"] > 1:
        raise UserError(f"--decay geometric: with gamma {settings['gamma']:g} the noise would grow "
                        "from step to step: give --gamma, 1 or less")
    wanted = class_numbers(args.classes, classes) if args.classes else list(range(len(classes)))
    recipe = {"checkpoint": str(path), "step": checkpoint["step"], "ema": ema, "steps": steps,
              **{k: v for k, v in settings.items() if k != "f"}, "seed": args.seed,
              "classes": [classes[label] for label in wanted] if args.classes else "all",
              "balance": "label = index mod classes"}
    num = args.num or (min(len(wanted), 10) if args.trajectory else
                       40 if len(wanted) > 40 else len(wanted) * min(4, 40 // len(wanted)))
    nfe = (steps * (1 if settings["cfg_scale"] == 1 else 2)
           * (2 if settings.get("solver") == "heun" else 1))

    # Every process draws its share into one file on the disk that all see.
    out = Path(args.out or path.parent / ("samples.npz" if args.npz else "sample.png"))
    shape = (steps if args.trajectory else 1, num, 3, rae.image_size, rae.image_size)
    names = check_room(out, shape, args.out)
    labels = torch.tensor(wanted)[torch.arange(num) % len(wanted)]
    alone = locked(out) if names and rank == 0 else contextlib.nullcontext()
    with alone, shared_array(out, shape, rank) as pictures:
        started = time.perf_counter()
        starts = range(rank * args.batch_size, num, world * args.batch_size)
        parts = [torch.arange(start, min(start + args.batch_size, num)) for start in starts]
        batches = draw_batches(denoiser, rae, parts, [labels[part] for part in parts], args.seed,
                               steps, len(classes), args.trajectory, **settings)
        for part, frames in zip(tqdm(parts, desc="sampling", unit="batch",
                                     disable=rank != 0 or len(parts) < 2), batches):
            pictures[:, part] = frames.numpy()
        pictures.flush()
        barrier()
        seconds = time.perf_counter() - started
        if rank == 0:
            write_pictures(out, pictures, labels, classes, len(wanted), recipe, names)
    if rank == 0:
        drawn = [printable(classes[label]) for label in wanted[:num]]
        print(f"{path} at step {checkpoint['step']}, EMA {ema}, seed {args.seed}\n"
              f"{num} pictures of {len(drawn)} classes in turn: "
              f"{', '.join(drawn[:10])}{', ...' * (len(drawn) > 10)}\n"
              f"{steps} steps of {run['method']}, guidance {settings['cfg_scale']:g}: "
              f"NFE {nfe} a picture, {seconds:.2f} s, {num / seconds:.1f} images/s on "
              f"{world} x {device.type}\n{out}")


def class_numbers(wanted, classes):
    """Names or numbers of classes -> their labels. A name wins; what could be both is an error."""
    labels = []
    for name in wanted:
        alike = [c for c in classes if name.isdecimal() and c.isdecimal() and int(c) == int(name)]
        if name in classes:
            labels.append(classes.index(name))
        elif alike:
            raise UserError(f"--classes {name}: is it the name {alike[0]}, or the number of "
                            f"{classes[int(name) % len(classes)]}? Write the name")
        elif name.isdecimal() and len(name) < 10 and int(name) < len(classes):
            labels.append(int(name))
        else:
            shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            raise UserError(f"--classes {one_line(name, 30)}: there is no such class; there are "
                            f"{len(classes)}: {shown}")
    return labels


GRIDS = (".png", ".jpg", ".jpeg")


def check_room(out, shape, name):
    """-> the files' names, if `out` is a folder. UserError: no room, or pictures of another run."""
    size = math.prod(shape)
    if free_bytes(out.parent) < 2.1 * size:                   # the temporary file and what it makes
        raise UserError(f"{out} needs {2.1 * size / 1e9:,.1f} GB, but "
                        f"{free_bytes(out.parent) / 1e9:.1f} GB are free there")
    if out.suffix.lower() in (".npz", *GRIDS) and not (name or "").endswith("/"):
        return None
    names = [[f"{i:06d}{f'-step{frame + 1}' * (shape[0] > 1)}.png" for i in range(shape[1])]
             for frame in range(shape[0])]
    others = {file.name for file in out.glob("*") if file.suffix.lower() in ENDINGS}
    if others := others.difference(*names):
        raise UserError(f"{out} holds {len(others)} other pictures, {min(others)} first, which "
                        "would be scored with the new ones: give a new folder")
    return names


@contextlib.contextmanager
def shared_array(out, shape, rank):
    """A uint8 array in a temporary file beside `out`, the same one in every process."""
    part = Path(from_first(str(part_of(f"{out}.npy"))))
    try:
        if rank == 0:
            part.parent.mkdir(parents=True, exist_ok=True)
            sweep(part.parent)
            np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            reserve(part)
        barrier()
        yield np.load(part, mmap_mode="r+")
    finally:
        if rank == 0:
            part.unlink(missing_ok=True)


def write_pictures(out, pictures, labels, classes, columns, recipe, names):
    """pictures (frames, n, 3, S, S) -> an npz, a grid, or a folder of files with these names."""
    frames, n = pictures.shape[:2]
    if names:
        def write(job):
            with write_whole(out / job[0]) as part:
                Image.fromarray(job[1].transpose(1, 2, 0)).save(part, "png")

        with ThreadPoolExecutor() as pool:
            for frame in range(frames):
                list(pool.map(write, zip(names[frame], pictures[frame])))
    elif out.suffix.lower() == ".npz":
        with write_whole(out) as part, open(part, "wb") as file:
            np.savez(file, arr_0=pictures[0].transpose(0, 2, 3, 1), labels=labels.numpy(),
                     classes=np.array(classes), recipe=json.dumps(recipe))
    else:
        columns = n if frames > 1 else min(columns, 10)
        captions = [classes[label] for label in labels] * frames
        images = torch.from_numpy(np.array(pictures)).flatten(0, 1)
        with write_whole(out) as part:
            kind = "png" if out.suffix.lower() == ".png" else "jpeg"
            picture_grid(images, columns, captions).save(part, kind, quality=95)


if __name__ == "__main__":
    main()
