"""From a checkpoint to pictures, in a few steps.

    python sample.py                                       # the newest run in out/: a grid, a class a column
    python sample.py --steps 2 --cfg 1 --classes daisy poppy
    python sample.py --trajectory --steps 4                # what each step predicts, from top to bottom
    python sample.py --num 200 --out pictures/             # numbered files
    torchrun --nproc-per-node 8 sample.py --num-images 50000 --npz    # for FID: class-balanced, any number of processes

Picture i has the label i mod classes and its own noise, a function of (seed, i): one seed, one picture, everywhere.
"""
import contextlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import sphere
from data import (ArgumentParser, UsageError, UserError, first_process_first, keyed_generator, number, user_errors,
                  write_whole)
from model import SiT_models
from rae import load_rae, to_uint8


# ---- Pictures -------------------------------------------------------------------------------------------------------

def generate(denoiser, rae, indices, labels, seed, steps, null_class, trajectory=None, **settings):
    """Pictures number `indices` of a seed, with the labels (n,) -> uint8 (n, 3, S, S). settings as sphere.sample."""
    generators = [keyed_generator("sample", seed, int(i)) for i in indices]
    z = sphere.sample(denoiser, (len(indices), *rae.latent_shape), labels, steps, null_class=null_class,
                      generator=generators, trajectory=trajectory, **settings)
    if not z.isfinite().all():
        raise UserError("the sampled latents are not finite: try less guidance, or the float32 of --device cpu")
    return to_uint8(rae.decode(z)).cpu()


def picture_grid(images, columns, captions):
    """uint8 (n, 3, S, S) and n captions -> a PIL image. A row is captioned where it differs from the one above."""
    n, _, S, _ = images.shape
    zoom, strip = -(-56 // S), 16                                        # a cell has 56 pixels at least, to be read
    cell = S * zoom
    font = ImageFont.load_default(size=11)
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    captioned = [r == 0 or any(captions[i] != captions[i - columns] for i in row) for r, row in enumerate(rows)]
    grid = Image.new("RGB", (columns * cell, len(rows) * cell + sum(captioned) * strip), "white")
    draw, top = ImageDraw.Draw(grid), 0
    for row, with_caption in zip(rows, captioned):
        for column, i in enumerate(row):
            if with_caption:
                text = captions[i]
                while draw.textlength(text, font) > cell - 2:
                    text = text[:-1]
                left = column * cell + (cell - draw.textlength(text, font)) / 2
                draw.text((left, top + 1), text, "black", font)
            picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())                  # (3, S, S) -> (S, S, 3)
            picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            grid.paste(picture, (column * cell, top + with_caption * strip))
        top += cell + with_caption * strip
    return grid


# ---- A checkpoint ---------------------------------------------------------------------------------------------------

def newest_checkpoint(root="out"):
    found = sorted(Path(root).glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run in {root}/ to sample from: train one (python train.py) or name it by --ckpt")
    return found[-1]


def load_denoiser(checkpoint, ema, device):
    """The SiT of a checkpoint with the weights of one EMA ("0.9995"), the "first" of them, or the "raw" weights."""
    available = list(checkpoint["ema"])
    if ema == "first":
        ema = available[0]
    if ema != "raw" and ema not in available:
        raise UsageError(f"--ema {ema} is not in this checkpoint: it has {', '.join(available)} and raw")
    weights = checkpoint["model"] if ema == "raw" else checkpoint["ema"][ema]
    args = checkpoint["args"]
    C, side = weights["x_embedder.weight"].shape[1], round(weights["pos_embed"].shape[1] ** 0.5)
    model = SiT_models[args["model"]](input_size=side, in_channels=C, num_classes=len(checkpoint["classes"]),
                                      class_dropout_prob=args["class_dropout_prob"])
    model.load_state_dict(weights)
    return model.to(device).eval(), ema


def class_numbers(wanted, classes):
    """Names or numbers of classes -> their labels."""
    labels = []
    for name in wanted:
        if name in classes:
            labels.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            labels.append(int(name))
        else:
            shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            raise UsageError(f"--classes {name}: there is no such class; there are {len(classes)}: {shown}")
    return labels


# ---- The command ----------------------------------------------------------------------------------------------------

def parse_args(argv):
    parser = ArgumentParser(description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--ckpt", help="a checkpoint (default: the newest in out/)")
    group.add_argument("--ema", default="first", help="which weights: an EMA's decay, first, or raw")
    group.add_argument("--weights-dir", help="folder with the files of dinov2-b, put there by hand")
    group.add_argument("--classes", nargs="+", help="names or numbers of classes (default: all, in turn)")
    group.add_argument("--num", "--num-images", type=number(int, 1), help="how many pictures (default: 4 a class, "
                       "40 at most); torchrun takes --num for its own, write --num-images there")
    group.add_argument("--seed", type=number(int, 0), default=0, help="picture i is a function of (seed, i)")
    group = parser.add_argument_group("Algorithm 1 (what is not given is taken from the run)")
    group.add_argument("--steps", type=number(int, 1), help="denoising steps; with guidance each costs two calls")
    group.add_argument("--cfg", type=number(float, 0), help="guidance scale; 1 is none")
    group.add_argument("--gamma", type=number(float, 0), help="sigma decays as (1 - t / steps) ** gamma")
    group.add_argument("--sampling-noise", choices=("fresh", "same"), help="new noise at each step, or the first again")
    group.add_argument("--sigma", type=number(float, 0), nargs="+",
                       help="noise at the start of the decay, or one value for each of the steps - 1 re-noisings")
    group = parser.add_argument_group("output")
    group.add_argument("--out", help="NAME.png: a grid; NAME.npz: arr_0 (N, H, W, 3) uint8 and labels; "
                                     "else a folder of numbered files (default: sample.png beside the checkpoint)")
    group.add_argument("--npz", action="store_true", help="short for --out samples.npz beside the checkpoint")
    group.add_argument("--trajectory", action="store_true", help="a grid of what each step predicts, a row a step")
    group.add_argument("--batch-size", type=number(int, 1), default=50, help="pictures at once in a process")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


@user_errors
def main(argv=None):
    from train import autocast, load_checkpoint, setup
    args = parse_args(argv)
    path = Path(args.ckpt) if args.ckpt else newest_checkpoint()
    rank, world, device = setup(args.device)
    checkpoint = load_checkpoint(path)
    run, classes = checkpoint["args"], checkpoint["classes"]
    model, ema = load_denoiser(checkpoint, args.ema, device)
    with first_process_first(rank):
        rae = load_rae(checkpoint["rae"], device, args.weights_dir)

    def denoiser(v, y):
        with autocast(run["dtype"], device):                               # the network alone; the decoder is float32
            return model(v, y)

    # The question: how many steps, which labels, what the run was set up for.
    steps = args.steps or run["sample_steps"]
    sigma = args.sigma or [run["sigma"]]
    if len(sigma) not in (1, steps - 1):
        raise UsageError(f"--sigma has {len(sigma)} values: give 1, or {steps - 1} for the re-noisings of {steps} steps")
    settings = {"cfg_scale": run["cfg"] if args.cfg is None else args.cfg,
                "gamma": run["gamma"] if args.gamma is None else args.gamma,
                "noise": args.sampling_noise or run["sampling_noise"],
                "sigma": sigma[0] if len(sigma) == 1 else sigma}
    recipe = {"checkpoint": str(path), "step": checkpoint["step"], "ema": ema, "steps": steps, **settings,
              "seed": args.seed, "classes": args.classes or "all", "balance": "label = index mod classes"}
    wanted = class_numbers(args.classes, classes) if args.classes else list(range(len(classes)))
    if args.trajectory:
        num = args.num or min(len(wanted), 10)
    else:
        num = args.num or (40 if len(wanted) > 40 else len(wanted) * min(4, 40 // len(wanted)))
    labels = torch.tensor([wanted[i % len(wanted)] for i in range(num)])
    nfe = steps * (1 if settings["cfg_scale"] == 1 else 2)

    # Every process draws its share into one file on the disk that all see.
    out = Path(args.out) if args.out else path.parent / ("samples.npz" if args.npz else "sample.png")
    if args.trajectory and out.suffix == ".npz":
        raise UsageError(f"--trajectory goes into a grid or a folder, not into {out}")
    frames, S = steps if args.trajectory else 1, rae.image_size
    with shared_array(out, (frames, num, 3, S, S), rank) as pictures:
        started = time.perf_counter()
        starts = range(rank * args.batch_size, num, world * args.batch_size)
        for start in tqdm(starts, desc="sampling", unit="batch", disable=rank != 0 or len(starts) < 2):
            indices = torch.arange(start, min(start + args.batch_size, num))
            trajectory = [] if args.trajectory else None
            images = generate(denoiser, rae, indices, labels[indices].to(device), args.seed, steps, len(classes),
                              trajectory, **settings)
            if args.trajectory:
                images = torch.stack([to_uint8(rae.decode(z)).cpu() for z in trajectory])
            pictures[:, indices] = images.numpy()
        pictures.flush()
        if world > 1:
            dist.barrier()
        seconds = time.perf_counter() - started
        if rank == 0:
            write_pictures(out, pictures, labels, classes, len(wanted), recipe)
            print(f"{path} at step {checkpoint['step']}, EMA {ema}, seed {args.seed}\n"
                  f"{num} pictures of {len(set(labels.tolist()))} classes in turn\n"
                  f"{steps} steps, guidance {settings['cfg_scale']:g}, {settings['noise']} noise: NFE {nfe} a picture, "
                  f"{seconds:.2f} s, {num / seconds:.1f} images/s on {world} x {device.type}\n{out}")
    if world > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def shared_array(out, shape, rank):
    """A uint8 array in a temporary file beside `out`, the same one in every process."""
    part, size = out.parent / f".part-{out.name}.npy", int(np.prod(shape))
    try:
        if rank == 0:
            part.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(part.parent).free
            if free < 2.1 * size:                                          # this file and the one made of it
                raise UserError(f"{out} needs {2.1 * size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there")
            np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        if dist.is_initialized():
            dist.barrier()
        yield np.load(part, mmap_mode="r+")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if rank == 0:
            part.unlink(missing_ok=True)


def write_pictures(out, pictures, labels, classes, columns, recipe):
    """pictures (frames, n, 3, S, S) -> a grid, an npz or a folder, by the ending of `out`."""
    frames, n = pictures.shape[:2]
    if out.suffix == ".npz":
        with write_whole(out) as part, open(part, "wb") as file:
            np.savez(file, arr_0=pictures[-1].transpose(0, 2, 3, 1), labels=labels.numpy(), recipe=json.dumps(recipe))
    elif out.suffix == ".png":
        columns = n if frames > 1 else min(columns, 10)
        captions = [classes[label] for label in labels] * frames
        grid = picture_grid(torch.from_numpy(np.array(pictures)).flatten(0, 1), columns, captions)
        with write_whole(out) as part:
            grid.save(part)
    else:
        for frame in range(frames):
            for i in range(n):
                name = f"{i:06d}.png" if frames == 1 else f"{i:06d}-step{frame + 1}.png"
                with write_whole(out / name) as part:
                    Image.fromarray(pictures[frame, i].transpose(1, 2, 0)).save(part)


if __name__ == "__main__":
    main()
