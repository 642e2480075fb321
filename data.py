"""Which pictures, which labels, in which order.

    toy           ten species of flowers, drawn here by formula: nothing to download
    flowers       Oxford-Flowers-102: 8,189 photographs of 102 species; fetched
    animal-faces  the training pictures of AFHQ: 14,630 faces of cats, dogs and wild animals; fetched
    imagenet      the training pictures of ILSVRC2012, which you have to put into DATA_DIR/imagenet yourself
    PATH          a folder with one folder of pictures for each class: PATH/daisy/1.jpg, PATH/rose/7.png, ...

A data set has `name`, `classes` (names, the index is the label), `labels` (N,), `recipe` (what makes its pixels; the
cache of latents is named by it) and `load(indices)` -> uint8 (b, 3, image_size, image_size).
The last two sections are what every script needs: downloads that are resumed and verified, one-line errors, whole
files, keyed noise.
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import ssl
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm


def load_dataset(name, image_size, min_side=1, root="datasets", split="all", skip_bad=False):
    """A data set by name or by folder, at image_size pixels.

    root: the folder of what is downloaded; split: train, val, test or all, of flowers. Pictures that cannot be read or
    have a side under min_side are an error, or with skip_bad left out and counted.
    """
    name = str(name)
    if split != "all" and name != "flowers":
        raise UsageError(f"--split {split}: only flowers has splits; {name} is its training pictures")
    if name == "toy":
        return ToyFlowers(image_size)
    crop = adm_crop if name == "imagenet" else centre_crop
    if name == "flowers":
        found = oxford_flowers(Path(root) / "flowers", split)
    elif name == "animal-faces":
        found = animal_faces(Path(root) / "animal-faces")
    elif name == "imagenet":
        found = imagenet(Path(root) / "imagenet")
    elif os.path.exists(name) or os.sep in name:
        name, found = Path(name).resolve().name, class_folders(Path(name))
    else:
        raise UsageError(f"no data set is called {name!r} and no folder of that name is here: "
                         "use toy, flowers, animal-faces, imagenet or a PATH")
    return Pictures(name, *found, image_size, crop, min_side, Path(root) / "bad" if skip_bad else None)


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


# ---- Picture files --------------------------------------------------------------------------------------------------

class Pictures:
    """files (N,) under folder, with labels (N,) into classes; cropped to a square by crop(picture, image_size)."""

    def __init__(self, name, folder, files, labels, classes, image_size, crop, min_side=1, bad_folder=None):
        self.name, self.folder, self.files, self.classes = name, Path(folder), files, classes
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.image_size, self.crop, self.min_side = image_size, crop, min_side
        listing = self._listing()
        if bad_folder:
            bad = set(self._bad(bad_folder / f"{name}-{min_side}-{listing[:12]}.json"))
            good = [i for i, file in enumerate(files) if file not in bad]
            self.files, self.labels = [files[i] for i in good], self.labels[good]
            if bad:
                listing = self._listing()
                if not dist.is_initialized() or dist.get_rank() == 0:
                    print(f"--skip-bad: {len(bad)} of {len(files)} pictures of {name} are left out, {min(bad)} first")
        for label, count in enumerate(torch.bincount(self.labels, minlength=len(classes))):
            if not count:
                raise UserError(f"class {classes[label]} of {folder} has no pictures: remove it or put some in")
        self.recipe = {"dataset": name, "n": len(self.files), "image_size": image_size, "crop": crop.__name__,
                       "files": listing}

    def _listing(self):
        """A hash of all names and sizes."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                digest.update(f"{file} {os.stat(self.folder / file).st_size}\n".encode())
            except FileNotFoundError:
                raise UserError(f"{self.folder / file} is missing: if it came out of an archive, remove {self.folder} "
                                "to unpack that again") from None
        return digest.hexdigest()

    def _bad(self, path):
        """The files that cannot be read. All are read once; what was found is kept at path."""
        if not path.exists():
            def error_of(file):
                try:
                    self._read(file)
                except UserError as error:
                    return str(error)
            with ThreadPoolExecutor() as pool:
                errors = list(tqdm(pool.map(error_of, self.files), total=len(self.files), desc="checking", leave=False))
            with write_whole(path) as part:
                part.write_text(json.dumps({f: error for f, error in zip(self.files, errors) if error}, indent=1))
        return json.loads(path.read_text())

    def load(self, indices):
        with ThreadPoolExecutor() as pool:                                 # PIL lets go of the GIL while it decodes
            pictures = list(pool.map(lambda i: self._read(self.files[i]), indices))
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()    # (b, S, S, 3) -> (b, 3, S, S)

    def _read(self, file):
        try:
            picture = read_picture(self.folder / file)
        except UserError as error:
            raise UserError(f"{error}: repair or remove it, or use --skip-bad") from error
        if min(picture.size) < self.min_side:
            raise UserError(f"{self.folder / file} is {picture.width} x {picture.height}, smaller than the "
                            f"autoencoder's patch of {self.min_side} pixels: remove it, or use --skip-bad")
        return np.asarray(self.crop(picture, self.image_size))


def read_picture(file):
    """Any picture that PIL reads, upright, in RGB; what is transparent becomes white. UserError names a bad file."""
    try:
        with Image.open(file) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):                               # 16-bit grey, which convert() would clip
                grey = np.asarray(picture)
                if grey.min() < 0 or grey.max() > 65535:
                    raise ValueError(f"grey values from {grey.min()} to {grey.max()}, more than 16 bits")
                picture = Image.fromarray((grey / 257).round().astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:       # what PIL raises
        raise UserError(f"{file} cannot be read as a picture ({error})") from error


def centre_crop(picture, image_size):
    """The largest square in the middle, then resized (bicubic; PIL filters when it shrinks). Nothing is squashed."""
    (W, H), side = picture.size, min(picture.size)
    left, top = (W - side) // 2, (H - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((image_size, image_size), Image.Resampling.BICUBIC)


def adm_crop(picture, image_size):
    """ADM's two steps, on which ImageNet's published FIDs rest: halve while twice too large, bicubic, then crop."""
    while min(picture.size) >= 2 * image_size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = image_size / min(picture.size)
    W, H = (round(side * scale) for side in picture.size)
    left, top = (W - image_size) // 2, (H - image_size) // 2
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + image_size, top + image_size))


# ---- Where the files are: (folder, files, labels, classes) of each data set ------------------------------------------

def class_folders(folder):
    """folder/CLASS/**/picture; classes in alphabetical order."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: --dataset needs a folder with one folder of pictures for each class")
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders: put the pictures into {folder}/CLASS/ (one class is enough)")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = [os.path.relpath(file, folder) for file in picture_files(folder / name)]
        if not found:
            raise UserError(f"{folder / name} has no pictures: remove the folder or put some in")
        files += found
        labels += [label] * len(found)
    return folder, files, labels, classes


def picture_files(folder):
    """All files under folder whose name ends as that of a format that PIL reads, sorted."""
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names
                  if os.path.splitext(name)[1].lower() in known and not name.startswith("."))


# Sizes in bytes. The MD5 sums are those that torchvision checks.
FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
FLOWERS_FILES = {
    "102flowers.tgz": dict(size=344_862_509, md5="52808999861908f626f3c1f4e79d11fa"),
    "imagelabels.mat": dict(md5="e0620be6f572b9609742df49c70aed4d"),
    "setid.mat": dict(md5="a5357ecc9cb78c4bef273ce3793fc85c"),
}
FLOWERS_CLASSES = """\
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily,
rose, thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
""".strip().replace("\n", " ").split(", ")


def oxford_flowers(folder, split):
    from scipy.io import loadmat

    def fetch(name):
        return download(FLOWERS_URL + name, folder / name, **FLOWERS_FILES[name])

    if not (folder / "jpg").exists():
        unpack(fetch("102flowers.tgz"), folder, "jpg")
    labels = loadmat(fetch("imagelabels.mat"))["labels"][0] - 1            # (8189,), of image 1, 2, ...
    splits = loadmat(fetch("setid.mat"))
    keys = {"train": ["trnid"], "val": ["valid"], "test": ["tstid"], "all": ["trnid", "valid", "tstid"]}[split]
    numbers = sorted(int(i) for key in keys for i in splits[key][0])
    files = [f"image_{i:05d}.jpg" for i in numbers]
    return folder / "jpg", files, [int(labels[i - 1]) for i in numbers], FLOWERS_CLASSES


# AFHQ (version 1) of StarGAN v2, whose authors publish no checksum; size and sum are those found in other people's
# download scripts.
AFHQ_URL = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"
AFHQ_FILE = dict(size=729_484_677, sha256="7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f")


def animal_faces(folder):
    if not (folder / "afhq").exists():
        unpack(download(AFHQ_URL, folder / "afhq.zip", **AFHQ_FILE), folder, "afhq")
    return class_folders(folder / "afhq" / "train")


def imagenet(folder):
    classes = [d.name for d in folder.iterdir() if re.fullmatch(r"n\d{8}", d.name)] if folder.is_dir() else []
    if len(classes) != 1000:
        raise UserError(f"{folder} has {len(classes)} of the 1000 class folders n01440764 ... n15075141. ImageNet "
                        "can't be downloaded without an account: get ILSVRC2012's training pictures from image-net.org "
                        f"and put the folders there, or a link: ln -s /where/they/are/train {folder}")
    return class_folders(folder)


# ---- Downloads ------------------------------------------------------------------------------------------------------

def download(url, path, size=None, sha256=None, md5=None):
    """-> path, a whole and verified file: fetched unless it is there, going on where an earlier download broke off.

    size in bytes; http, https and file URLs. UserError: no network, no room, or not the file that was expected.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return verify(path, f"remove it to fetch it again from {url}", size, sha256, md5)
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    by_hand = f"or put the file at {path} by hand"
    if not have or have != size:
        headers = {"User-Agent": "sphere-latent-encoder", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
                if response.status != 206:                                 # the server sends it from the beginning
                    have = 0
                total = have + int(response.headers["Content-Length"] or 0)
                free = shutil.disk_usage(part.parent).free
                if total - have > free:
                    raise UserError(f"{url} has {total / 1e9:.2f} GB, but {part.parent} has {free / 1e9:.2f} GB free")
                with open(part, "ab" if have else "wb") as file, tqdm(
                        desc=path.name, total=total or None, initial=have, unit="B", unit_scale=True) as bar:
                    while block := response.read(1 << 20):
                        have += file.write(block)
                        bar.update(len(block))
        except urllib.error.HTTPError as error:
            if error.code == 416:                                          # there is no more: not a part of this file
                part.unlink()
                return download(url, path, size, sha256, md5)
            raise UserError(f"{url} cannot be fetched ({error}): try later, {by_hand}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            so_far = f" after {have / 1e6:.1f} MB, from where the same command goes on" if have else ""
            reason = getattr(error, "reason", error)
            raise UserError(f"{url} cannot be fetched ({reason}){so_far}: is there a network? Try again, {by_hand}") \
                from error
        if have < total:
            raise UserError(f"{url} broke off at {have / 1e6:.1f} of {total / 1e6:.1f} MB: the same command goes on "
                            f"from there, {by_hand}")
    try:
        verify(part, f"it was removed; fetch {url} again, {by_hand}", size, sha256, md5)
    except UserError:
        part.unlink()
        raise
    part.replace(path)
    return path


def verify(path, what_to_do, size=None, sha256=None, md5=None):
    """-> path, if the file has this size in bytes and these sums; else UserError, ending in what_to_do."""
    found = Path(path).stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path} has {found:,} bytes, expected were {size:,}: {what_to_do}")
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_hash(path, kind)) != expected:
            raise UserError(f"{path} has the {kind} {found}, expected was {expected}: {what_to_do}")
    return path


def file_hash(path, kind="sha256"):
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, folder, name):
    """The folder `name` of a .zip or .tgz -> folder/name, whole or not at all, without links or names that lead out."""
    def plain(member, path):
        if not (member.isfile() or member.isdir()):
            raise tarfile.FilterError(f"{member.name} is a link or a device")
        return tarfile.data_filter(member, path)

    part = folder / f".part-{os.getpid()}-{name}"
    print(f"unpacking {archive}", flush=True)
    try:
        if archive.suffix == ".zip":                                       # makes no links, keeps names inside
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(part)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(part, filter=plain)
        if not (part / name).is_dir():
            raise UserError(f"{archive} has no folder {name}: it is another archive than expected")
        (part / name).rename(folder / name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): remove it to fetch it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


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
            if error.errno not in DISK_REFUSES:
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


@contextlib.contextmanager
def first_process_first(rank):
    """What is inside is done by process 0 before the others begin: it downloads, they find it on the disk."""
    if rank > 0:
        barrier()
    yield
    if rank == 0:
        barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def keyed_generator(*key, device="cpu"):
    """A generator that is a function of its key alone, e.g. ("eps", seed, step, example)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
