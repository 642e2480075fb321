"""Look into a model, or into the space it works in.

    python explore.py vary photo.png --angle 0 30 60 85     # turn a picture's latent, denoise it
    python explore.py between 0 1 --classes daisy poppy     # the great circle between two noises
    python explore.py curves out/RUN out/OTHER              # their logs, over one another
    python explore.py latents --dataset photos --rae lite0  # is this space fit for the sphere?

vary and between draw as the newest run in out/ does, or --ckpt. curves and latents need matplotlib
(pip install matplotlib); latents takes the flags of train.py, and no others.
"""
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import settings
import sphere
from data import centre_crop, load_dataset
from rae import load_rae, open_rae, picture_sides
from sample import keyed_noise, load_denoiser, load_run, newest_checkpoint, predict
from utils.cli import ArgumentParser, UserError, class_numbers, number
from utils.files import write_whole
from utils.images import (MARK, picture_grid, read_picture, refuse_files_of_others, save_picture,
                          to_float, to_tensor, to_uint8)
from utils.processes import setup, user_errors

# ---- Pictures by a run: pictures, their captions, and how many are in a row ----------------------

def vary(args, run, rae, denoiser, labels, names):
    """Each row is an angle: the turned latent itself, decoded, then what the classes make of it.

    The decay starts at the angle. 0 in one step is the autoencoder's round trip through the
    denoiser; at 90 nothing is left of the picture.
    """
    side = picture_sides(rae.name, rae.image_size, rae.patch_size)[0]
    picture = to_tensor(centre_crop(read_picture(args.what[0]), side))[None]
    v, images = sphere.spherify(rae.encode(to_float(picture.to(rae.device)))), []
    for angle_deg in args.angle:
        noise, sigma = noise_of(0, run, rae), sphere.angle_to_sigma(angle_deg)
        turned = sphere.add_noise(v, torch.tensor([sigma]).to(v), next(noise))          # Eq. 1
        start = turned.expand(len(labels), -1, -1, -1)
        z = sample(run, denoiser, labels, chain([start], noise), min(sigma, run["sigma"]), v.device)
        images.append(rae.decode(torch.cat([turned, z])))
    captions = [name for angle_deg in args.angle for name in (f"{angle_deg:g} deg", *names)]
    return torch.cat(images), captions, 1 + len(labels)


def between(args, run, rae, denoiser, labels, names, frames=10):
    """From the first picture of one seed to that of another: noise on their great circle, the class
    embedding, which knows no circle, mixed linearly. Both ends are sample.py's, to the bit."""
    (model, _, dtype), images = denoiser.args, []
    table = model.y_embedder.weight                           # (classes + 1, D)
    for share in torch.linspace(0, 1, frames).tolist():
        mixed = torch.lerp(table[labels[0]], table[labels[-1]], share)[None]
        mixing = partial(predict, model, {"y_embedder.weight": torch.cat([table, mixed])}, dtype)
        a, b = (noise_of(int(seed), run, rae) for seed in args.what)
        noise = (circle(*pair, share) for pair in zip(a, b))
        z = sample(run, mixing, [len(table)], noise, run["sigma"], rae.device)
        images.append(rae.decode(z))
    return torch.cat(images), [names[0]] * (frames - 1) + [names[-1]], frames


def noise_of(seed, run, rae):
    """(1, C, h, w) without end, as sample.py's picture 0 has it."""
    drawn = keyed_noise(seed, [0], rae.latent_shape, run["sampling_noise"] == "same", run["steps"])
    return (eps.to(rae.device) for eps in drawn)


def sample(run, denoiser, labels, noise, sigma, device):
    """Algorithm 1, as the run has it, from the first noise; the decay starts at sigma."""
    return sphere.sample(denoiser, None, torch.tensor(labels, device=device), run["steps"],
                         run["cfg"], sphere.decay(sigma, run["gamma"]), noise, run["null_class"])


def circle(a, b, share):
    """The point at this share of the way from a to b; at the ends they themselves."""
    if share in (0, 1):
        return b if share else a
    a, b = sphere.spherify(a), sphere.spherify(b)
    angle = torch.acos((a * b).mean())
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


# ---- Logs and latents: {title: {label: (x, y)}} --------------------------------------------------

def curves(folders):
    """Losses, by the angle of the noise, too, and the gradient's norm; over the steps."""
    panels = {"loss": {}, "loss by angle": {}, "gradient norm": {}}
    for folder in folders:
        try:
            lines = [json.loads(line) for line in open(Path(folder, "log.jsonl"))]
            steps = [line["step"] for line in lines]
            for name in ("loss", "reconstruction", "consistency"):
                panels["loss"][f"{name} {folder}"] = steps, [line.get(name) for line in lines]
            for i, place in enumerate(("0-22", "22-45", "45-68", "68-90 deg")):
                values = [line.get("loss_by_angle", [None] * 4)[i] for line in lines]
                panels["loss by angle"][f"{place} {folder}"] = steps, values
            panels["gradient norm"][folder] = steps, [line["grad_norm"] for line in lines]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder} has no log.jsonl of a run: give a run's folder") from error
    return panels


def geometry(z, labels):
    """Latents (N, C, h, w), labels (N,) -> norms (N,), here RMS; angles between pictures of one
    class, and of two; the variance of each channel."""
    v = sphere.spherify(z).flatten(1)
    angle_deg = torch.rad2deg(torch.acos((v @ v.T / v.shape[1]).clamp(-1, 1)))
    same, pairs = labels[:, None] == labels, torch.ones_like(angle_deg).triu(1) > 0
    return {"RMS before spherify": z.square().mean((1, 2, 3)).sqrt(),
            "angle in one class, deg": angle_deg[same & pairs],
            "angle of two classes, deg": angle_deg[~same & pairs],
            "variance of channels": z.var((0, 2, 3))}


def latents(args):
    """Prints the geometry of 500 pictures' latents."""
    sides = picture_sides(args.rae, args.image_size, args.rae_patch)
    dataset = load_dataset(args.dataset, *sides, args.data_dir, args.split, args.skip_bad)
    rae = open_rae(args.rae, dataset, args.image_size, args.rae_patch, args.seed,
                   setup(args.device)[2], args.weights_dir)
    g = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(dataset.labels), generator=g)[:500]
    z = torch.cat([rae.encode(to_float(dataset.load(part).to(rae.device))).cpu()
                   for part in chosen.split(50)])
    found = geometry(z, dataset.labels[chosen]).items()
    found = {name: values for name, values in found if len(values)}       # one class has no other
    print(f"{dataset.name}, {rae.name}: {len(z)} pictures, L = {z[0].numel():,}")
    for name, values in found.items():
        print(f"{name:<26}{values.mean():7.2f} ± {values.std():.2f}")
    print(f"share of the mean latent  {z.mean(0).square().mean() / z.square().mean():7.2f}")
    return {name: {"in order": (range(len(values)), values.sort().values)}
            for name, values in found.items()}


def plot(panels):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("this needs matplotlib: pip install matplotlib") from error
    figure = Figure((4 * len(panels), 3), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, (x, y) in lines.items():
            axes.plot(x, [float("nan") if value is None else value for value in y], label=label)
        axes.set_title(title)
        axes.legend(fontsize="x-small")
    return figure


# ---- The command ---------------------------------------------------------------------------------

@user_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=("vary", "between", "curves", "latents"))
    add("what", nargs="*", help="a picture; two seeds; the folders of runs")
    add("--angle", type=number(float, 0, 90), nargs="+", default=[0, 30, 60, 85],
        help="of vary, in degrees, a row each")
    add("--classes", nargs="+", help="names or numbers; between takes the first and the last")
    add("--steps", type=number(int, 1, 1000), help="if not given those of the run")
    add("--ckpt", help="a checkpoint (default: the newest in out/)")
    add("--out", help="NAME.png, or of between NAME.gif (default: COMMAND.png)")
    args = parser.parse_args(argv[:1] if argv[:1] == ["latents"] else argv)
    out = Path(args.out or f"{args.command}.png")
    if out.suffix not in (".png", ".gif")[:1 + (args.command == "between")]:
        parser.error(f"--out {out}: NAME.png, or of between NAME.gif")
    refuse_files_of_others([out])
    if args.command in ("curves", "latents"):
        figure = plot(curves(args.what) if args.what else
                      latents(settings.parse_args(argv[1:], __doc__)))
        with write_whole(out) as part:
            figure.savefig(part, format="png", metadata={"Software": MARK})
        return print(out)
    is_between = args.command == "between"
    if len(args.what) != 1 + is_between or is_between and not all(map(str.isdecimal, args.what)):
        parser.error("vary takes one picture, between two seeds")
    checkpoint, device = load_run(args.ckpt or newest_checkpoint()), setup()[2]
    run, classes = checkpoint["args"], checkpoint["classes"]
    if run["method"] != "sphere" or not run["spherify"]:
        raise UserError("a run without the sphere has no angles to turn by: give another --ckpt")
    run |= {"steps": args.steps or run["sample_steps"], "null_class": len(classes)}
    labels = class_numbers(args.classes or classes[:9], classes)
    images, captions, columns = (between if is_between else vary)(
        args, run, load_rae(checkpoint["rae"], device, run["weights_dir"]),
        load_denoiser(checkpoint, "first", device)[0], labels, [classes[c] for c in labels])
    images, more = to_uint8(images).cpu(), {}
    grid = picture_grid(images, columns, captions)
    if out.suffix == ".gif":
        grid, *others = [picture_grid(image[None], 1, [""]) for image in images]
        more = {"save_all": True, "append_images": others, "loop": 0}
    with write_whole(out) as part:
        save_picture(grid, part, out.suffix[1:], **more)
    print(out)


if __name__ == "__main__":
    main()
