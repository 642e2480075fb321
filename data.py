"""Which pictures, which labels, in which order.

    toy           ten species of flowers, drawn here by formula: nothing to download
    PATH          a folder with one folder of pictures for each class: PATH/daisy/1.jpg, PATH/rose/7.png, ...

A data set has `name`, `classes` (names, the index is the label), `labels` (N,), `recipe` (what makes its pixels; the
cache of latents is named by it) and `load(indices)` -> uint8 (b, 3, image_size, image_size).
The last section is what every script needs and no library has in this form: one-line errors, whole files, keyed noise.
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


def load_dataset(name, image_size, min_side=1):
    """A data set by name or by folder, at image_size pixels; pictures with a side under min_side are refused."""
    if name == "toy":
        return ToyFlowers(image_size)
    if not os.path.exists(name) and os.sep not in name:
        raise UsageError(f"no data set is called {name!r} and no folder of that name is here: use toy or a PATH")
    return PictureFolder(name, image_size, min_side)


def global_batch(n, batch_size, step, seed):
    """Indices (batch_size,) of the examples of a step: one endless row of permutations, cut into batches.

    A function of (seed, step) alone, so that a resumed run goes on exactly where it stopped.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n, position // n, seed)[position % n] for position in positions])


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=keyed_generator("order", seed, epoch)).numpy()


# ---- toy: drawn flowers ---------------------------------------------------------------------------------------------

# A petal is a width curve along its axis u in [0, 1], width * u^a * (1 - u)^b (scaled to reach `width`); b small: blunt,
# b near 1: pointed. A notch draws the tip in along the axis. Lengths are in units of the flower's radius.
SPECIES = {
    # petals, layers, length, width, a, b, notch, colours at base and tip, disc, its colours inside and at the rim
    "daisy":      (14, 1, .90, .150, 0.45, .18, .00, (225, 228, 220), (255, 255, 255), .24, (250, 200, 30), (225, 150, 10)),
    "sunflower":  (15, 2, .92, .170, 0.60, .60, .00, (240, 150, 0), (255, 215, 40), .42, (95, 55, 20), (60, 35, 15)),
    "poppy":      (4, 1, .90, .640, 0.55, .16, .00, (150, 10, 10), (230, 35, 30), .16, (40, 45, 35), (15, 15, 15)),
    "violet":     (5, 1, .88, .430, 0.80, .22, .06, (60, 15, 120), (125, 60, 205), .11, (250, 210, 50), (255, 245, 170)),
    "cherry":     (5, 1, .86, .340, 0.70, .20, .16, (235, 110, 150), (255, 190, 210), .12, (205, 60, 95), (250, 225, 130)),
    "lily":       (6, 1, .98, .210, 0.80, .90, .00, (250, 190, 60), (240, 120, 25), .09, (150, 75, 20), (120, 60, 20)),
    "cornflower": (9, 2, .92, .150, 1.30, .15, .22, (40, 40, 150), (70, 100, 240), .17, (55, 25, 105), (90, 40, 140)),
    "trillium":   (3, 1, .96, .420, 0.70, .60, .00, (205, 225, 190), (250, 252, 245), .13, (240, 215, 90), (200, 170, 60)),
    "marigold":   (9, 4, .88, .290, 0.80, .20, .08, (190, 70, 5), (250, 140, 20), .12, (170, 60, 5), (120, 40, 5)),
    "aster":      (20, 2, .92, .085, 0.40, .30, .00, (170, 50, 150), (225, 110, 205), .20, (250, 215, 60), (220, 165, 30)),
}


class ToyFlowers:
    """10,000 drawn flowers (split "train") or 2,000 others ("test"), the same on every machine."""

    def __init__(self, image_size=64, split="train"):
        self.name, self.image_size, self.classes = "toy", image_size, list(SPECIES)
        n = {"train": 10_000, "test": 2_000}[split]
        self.labels = torch.arange(n) % len(self.classes)
        self.variation = torch.rand(n, 15, generator=keyed_generator("toy", split))
        drawn = hashlib.sha256(self.load(range(20)).numpy().tobytes()).hexdigest()   # a changed drawing is another set
        self.recipe = {"dataset": "toy", "split": split, "n": n, "image_size": image_size, "drawn": drawn}

    def load(self, indices):
        indices = torch.as_tensor(indices)
        parts = indices.split(50)                                          # 50 fit a CPU's cache: 4 times faster
        return torch.cat([draw_flowers(self.labels[i], self.variation[i], self.image_size) for i in parts])


def draw_flowers(labels, variation, image_size):
    """labels (n,), variation (n, 15) in [0, 1) -> uint8 (n, 3, image_size, image_size)."""
    n = len(labels)
    columns = [torch.tensor(column, dtype=torch.float32)[labels] for column in zip(*SPECIES.values())]
    # numbers (n, 1, 1) and colours (n, 3, 1, 1), to be broadcast over pixels (n, S, S) and images (n, 3, S, S)
    (petals, layers, length, width, a, b, notch, base, tip, disc, disc_inside, disc_rim) = [
        column.view(n, *[-1] * (column.ndim - 1), 1, 1) for column in columns]

    def vary(k, low, high):
        return (low + (high - low) * variation[:, k]).view(n, 1, 1)

    def cover(depth, pixel):                                               # signed depth inside an edge -> soft coverage
        return (depth / pixel + 0.5).clamp(0, 1)

    def paint(coverage, colour):
        image.add_(coverage.unsqueeze(1) * (colour - image))

    pixel = 2 / image_size
    axis = (torch.arange(image_size) + 0.5) * pixel - 1                    # pixel centres, -1 .. 1
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)

    # Background: sky over grass.
    sky = torch.stack([vary(0, 150, 215), vary(1, 175, 225), vary(2, 205, 250)], dim=1)
    grass = torch.stack([vary(3, 60, 130), vary(4, 125, 180), vary(5, 45, 95)], dim=1)
    ground = torch.sigmoid(4 * (y - vary(6, -0.1, 0.5)) / vary(7, 0.15, 0.6)).unsqueeze(1)
    image = ((sky + (grass - sky) * ground) * (1 - 0.12 * y)).repeat(1, 1, 1, image_size)

    # Stem, bending away below the flower.
    centre_x, centre_y, radius = vary(8, -0.10, 0.10), vary(9, -0.16, 0.02), vary(10, 0.62, 0.78)
    stem_x = centre_x + vary(11, -0.25, 0.25) * (y - centre_y).clamp(min=0) ** 2
    green = torch.tensor([45.0, 105.0, 35.0]).view(1, 3, 1, 1) * vary(12, 0.8, 1.2).unsqueeze(1)
    paint(cover(0.045 - (x - stem_x).abs(), pixel) * (y > centre_y), green)

    # Petals: every pixel is folded into one petal, (u, v) along and across its axis. Outer layers come first.
    x, y, pixel = (x - centre_x) / radius, (y - centre_y) / radius, pixel / radius
    distance, angle = (x * x + y * y).sqrt(), torch.atan2(x, -y)
    shade, tilt = vary(13, 0.86, 1.08).unsqueeze(1), vary(14, -0.22, 0.22)
    step = 2 * math.pi / petals
    peak = a / (a + b)
    for layer in range(int(layers.max())):
        reach = length * (1 - layer * torch.where(layers == 2, 0.16, 0.22))
        turn = angle / step + tilt + layer / 2
        turn = (turn - turn.round()) * step
        across = distance * turn.sin().abs()
        u = distance * turn.cos() / (reach * (1 - notch * (1 - across / (width * reach)).clamp(0, 1)))
        inside = u.clamp(1e-4, 1 - 1e-4)
        half_width = width * reach * (inside / peak) ** a * ((1 - inside) / (1 - peak)) ** b
        crease = (across / half_width.clamp(min=1e-3)).clamp(0, 1) ** 2
        light = (1.03 - 0.20 * crease) * (0.86 + 0.14 * (layer + 1) / layers)
        petal = (base + (tip - base) * inside.unsqueeze(1)) * light.unsqueeze(1) * shade
        paint(cover(half_width - across, pixel) * (u < 1) * (layer < layers), petal)

    # Disc, lighter in the middle.
    dome = (1.05 - 0.25 * (distance / disc).clamp(0, 1) ** 2).unsqueeze(1)
    inner = cover(0.55 * disc - distance, pixel).unsqueeze(1)
    paint(cover(disc - distance, pixel), (disc_rim + (disc_inside - disc_rim) * inner) * dome * shade)
    return image.clamp(0, 255).round().to(torch.uint8)


# ---- PATH: a folder of class folders --------------------------------------------------------------------------------

class PictureFolder:
    """path/CLASS/**/picture. Classes in alphabetical order. Centre-cropped to a square, then resized (bicubic)."""

    def __init__(self, path, image_size, min_side=1):
        self.path, self.image_size, self.min_side = Path(path), image_size, min_side
        self.name = self.path.resolve().name
        if not self.path.is_dir():
            found = "is a file" if self.path.exists() else "does not exist"
            raise UserError(f"{path} {found}: --dataset needs a folder with one folder of pictures for each class")
        known = Image.registered_extensions()
        self.classes = sorted(d.name for d in self.path.iterdir() if d.is_dir() and not d.name.startswith("."))
        if not self.classes:
            raise UserError(f"{path} has no class folders: put the pictures into {path}/CLASS/ (one class is enough)")
        self.files, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(f for f in (self.path / name).rglob("*")
                           if f.suffix.lower() in known and not f.name.startswith("."))
            if not files:
                raise UserError(f"{self.path / name} has no pictures: remove the folder or put some in")
            self.files += files
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)
        listing = "\n".join(f"{f.relative_to(self.path)} {f.stat().st_size}" for f in self.files)
        self.recipe = {"dataset": self.name, "n": len(self.files), "image_size": image_size, "crop": "centre, bicubic",
                       "files": hashlib.sha256(listing.encode()).hexdigest()}

    def load(self, indices):
        with ThreadPoolExecutor() as pool:                                 # PIL lets go of the GIL while it decodes
            pictures = list(pool.map(lambda i: self._read(self.files[i]), indices))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()    # (b, S, S, 3) -> (b, 3, S, S)

    def _read(self, file):
        try:
            with Image.open(file) as picture:
                picture = ImageOps.exif_transpose(picture)
                if picture.mode.startswith("I"):                           # 16-bit grey, which convert() would clip
                    picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
                picture = picture.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:   # what PIL raises
            raise UserError(f"{file} cannot be read as a picture ({error}): repair or remove it") from error
        (W, H), side = picture.size, min(picture.size)
        if side < self.min_side:
            raise UserError(f"{file} is {W} x {H}, smaller than the autoencoder's patch of "
                            f"{self.min_side} pixels: remove it")
        left, top = (W - side) // 2, (H - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        return np.asarray(picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC))


# ---- What every script needs ----------------------------------------------------------------------------------------

class UserError(Exception):
    """Something the user can mend: shown as one line, exit status 1. Bugs keep their traceback."""
    exit_status = 1


class UsageError(UserError):
    """The same for a command-line argument: exit status 2, as argparse has it."""
    exit_status = 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, and no abbreviated flags."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=self.Help, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"from {low} to {high}" if high < math.inf else f"{low} or more" if low > -math.inf else "finite"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value
    parse.__name__ = kind.__name__                                         # argparse says "invalid int value"
    return parse


def user_errors(main):
    """Decorator of every main(argv=None): a UserError, a disk that refuses, or Ctrl-C end in one line and a status."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_status) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                raise
            print(f"{Path(sys.argv[0]).name}: error: {error.filename or 'the disk'}: {error.strerror}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted; what is on the disk is whole", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


@contextlib.contextmanager
def write_whole(path):
    """Yields a temporary path beside `path` and renames it at the end: readers never meet half a file."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")                            # what a kill left there is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except Exception as error:                                             # full disk, no permission, name too long
        cause = error
        while cause is not None and not isinstance(cause, OSError):        # torch.save wraps it in a RuntimeError
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def keyed_generator(*key, device="cpu"):
    """A generator that is a function of its key alone, e.g. ("eps", seed, step, example)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
