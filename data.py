"""Which pictures, which labels.

    toy           ten species of flowers, drawn here by formula: nothing to download
    flowers       Oxford-Flowers-102: 8,189 photographs of 102 species; fetched
    animal-faces  the training pictures of AFHQ: 14,630 faces of cats, dogs, wild animals; fetched
    imagenet      the training pictures of ILSVRC2012: put them into DATA_DIR/imagenet yourself
    PATH          a folder with a folder of pictures for each class: PATH/daisy/1.jpg, ...

A data set has `name`, `classes` (names, the index is the label), `labels` (N,), `recipe` (what
makes its pixels; the cache of latents is named by it) and `load(indices)` -> uint8 (b, 3, S, S).
"""
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
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

from common import UserError, free_bytes, verify, write_json
from laptop.toy import ToyFlowers  # laptop

# The data sets that have a name, and the side in pixels that training and scoring bring them to.
IMAGE_SIZE = {"flowers": 256, "animal-faces": 256, "imagenet": 256}
IMAGE_SIZE["toy"] = 60  # laptop


def load_dataset(name, image_size, min_side=1, root="datasets", split="all", skip_bad=False):
    """A data set by name or by folder, at image_size pixels.

    root: the folder of what is downloaded; split: train, val, test or all, of flowers. Pictures
    that cannot be read or have a side under min_side are an error, or with skip_bad left out and
    counted.
    """
    name, root = str(name), Path(root)
    if split != "all" and name != "flowers":
        raise UserError(f"--split {split}: only flowers has splits, {name} has one")
    if name == "toy":  # laptop
        return ToyFlowers(image_size)  # laptop
    crop = adm_crop if name == "imagenet" else centre_crop
    if name == "flowers":
        found = oxford_flowers(root / name, split)
    elif name == "animal-faces":
        found = animal_faces(root / name)
    elif name == "imagenet":
        found = imagenet(root / name)
    elif os.path.exists(name) or os.sep in name:
        name, found = Path(name).resolve().name, class_folders(Path(name))
    else:
        raise UserError(f"--dataset: no data set is called {name!r} and no folder of that name is "
                        "here; use toy, flowers, animal-faces, imagenet or a PATH")
    return Pictures(name, *found, image_size, crop, min_side, root / "bad" if skip_bad else None)


# ---- Picture files -------------------------------------------------------------------------------

class Pictures:
    """files (N,) under folder, with labels (N,) into classes; crop(picture, S) makes a square."""

    def __init__(self, name, folder, files, labels, classes, image_size, crop, min_side=1,
                 bad_folder=None):
        self.name, self.folder, self.files, self.classes = name, Path(folder), files, classes
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.image_size, self.crop, self.min_side = image_size, crop, min_side
        listing = self._listing()
        if bad_folder:
            bad = self._bad(bad_folder / f"{name}-{min_side}-{listing[:12]}.json")
            good = [i for i, file in enumerate(files) if file not in bad]
            self.files, self.labels = [files[i] for i in good], self.labels[good]
            if bad and not (dist.is_initialized() and dist.get_rank()):
                print(f"--skip-bad: {len(bad)} of {len(files)} pictures of {name} are left out, "
                      f"{min(bad)} first")
            listing = self._listing()
        for label, count in enumerate(torch.bincount(self.labels, minlength=len(classes))):
            if not count:
                raise UserError(f"class {classes[label]} of {folder} has no pictures: put some in")
        self.recipe = {"dataset": name, "n": len(self.files), "image_size": image_size,
                       "crop": crop.__name__, "files": listing}

    def _listing(self):
        """A hash of all names and sizes."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                digest.update(f"{file} {os.stat(self.folder / file).st_size}\n".encode())
            except FileNotFoundError:
                raise UserError(f"{self.folder / file} is missing: if it came out of an archive, "
                                f"remove {self.folder} to unpack that again") from None
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
                errors = list(tqdm(pool.map(error_of, self.files), total=len(self.files),
                                   desc="checking", leave=False))
            write_json(path, {f: error for f, error in zip(self.files, errors) if error})
        return set(json.loads(path.read_text()))

    def load(self, indices):
        with ThreadPoolExecutor() as pool:                    # PIL lets go of the GIL
            pictures = list(pool.map(lambda i: self._read(self.files[i]), indices))
        return torch.stack([to_tensor(picture) for picture in pictures])

    def _read(self, file):
        try:
            picture = read_picture(self.folder / file)
        except UserError as error:
            raise UserError(f"{error}; or use --skip-bad") from error
        if min(picture.size) < self.min_side:
            raise UserError(f"{self.folder / file} is {picture.width} x {picture.height}, smaller "
                            f"than the {self.min_side} pixels of which the autoencoder makes one: "
                            "remove it, or use --skip-bad")
        return self.crop(picture, self.image_size)


def to_tensor(picture):
    """PIL -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def picture_files(folder):
    """-> the pictures below a folder, sorted, and how many other files are there.

    A picture has the ending of a format that PIL reads. Hidden files and folders are left out;
    links are followed, each folder once; a folder that cannot be read is an OSError.
    """
    def refuse(error):
        raise error

    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures, others, seen = [], 0, set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [name for name in names if not name.startswith(".")]
        found = [name for name in files if os.path.splitext(name)[1].lower() in endings]
        pictures += [os.path.join(where, name) for name in found]
        others += len(files) - len(found)
    return sorted(pictures), others


def read_picture(file, as_pytorch_fid=False):
    """A picture in RGB, upright, what is transparent laid on white. UserError names a bad file.

    as_pytorch_fid: converted to RGB and nothing else, as published FIDs were made: the orientation
    flag, transparency and what 8 bits cannot hold are lost.
    """
    try:
        with Image.open(file) as picture:
            if as_pytorch_fid:
                return picture.convert("RGB")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):                  # 16-bit grey, which convert() clips
                grey = np.asarray(picture)
                if grey.min() < 0 or grey.max() > 65535:
                    raise ValueError(f"grey values from {grey.min()} to {grey.max()}, "
                                     "more than 16 bits")
                picture = Image.fromarray((grey / 257).round().astype(np.uint8))
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:   # PIL's
        raise UserError(f"{file} cannot be read as a picture ({error}): "
                        "repair or remove it") from error


def centre_crop(picture, image_size):
    """The largest square in the middle, resized (bicubic; PIL filters when it shrinks)."""
    (W, H), side = picture.size, min(picture.size)
    left, top = (W - side) // 2, (H - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((image_size, image_size), Image.Resampling.BICUBIC)


def adm_crop(picture, image_size):
    """ADM's, on which ImageNet's published FIDs rest: halve while twice too large, resize, crop."""
    while min(picture.size) >= 2 * image_size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.Resampling.BOX)
    scale = image_size / min(picture.size)
    W, H = (round(side * scale) for side in picture.size)
    left, top = (W - image_size) // 2, (H - image_size) // 2
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + image_size, top + image_size))


# ---- Where the files are: (folder, files, labels, classes) of each data set ----------------------

def class_folders(folder):
    """folder/CLASS/**/picture; classes in alphabetical order."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: --dataset needs a folder with one folder of pictures "
                        "for each class")
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and d.name[0] != ".")
    if not classes:
        raise UserError(f"{folder} has no class folders: put the pictures into {folder}/CLASS/ "
                        "(one class is enough)")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = picture_files(folder / name)[0]
        if not found:
            raise UserError(f"{folder / name} has no pictures: put some in")
        files += [os.path.relpath(file, folder) for file in found]
        labels += [label] * len(found)
    return folder, files, labels, classes


# Sizes in bytes. The MD5 sums are those that torchvision checks.
FLOWERS_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
FLOWERS_FILES = {
    "102flowers.tgz": dict(size=344_862_509, md5="52808999861908f626f3c1f4e79d11fa"),
    "imagelabels.mat": dict(md5="e0620be6f572b9609742df49c70aed4d"),
    "setid.mat": dict(md5="a5357ecc9cb78c4bef273ce3793fc85c"),
}
FLOWERS_CLASSES = """\
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily,
moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear
thistle, yellow iris, globe-flower, purple coneflower, peruvian lily, balloon flower, giant white
arum lily, fire lily, pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince
of wales feathers, stemless gentian, artichoke, sweet william, carnation, garden phlox, love in the
mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam
tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower,
marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower,
pelargonium, bishop of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia?, cautleya
spicata, japanese anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring
crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple,
morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee
balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket
flower, trumpet creeper, blackberry lily
""".strip().replace("\n", " ").split(", ")


def oxford_flowers(folder, split):
    from scipy.io import loadmat

    def fetch(name):
        return download(FLOWERS_URL + name, folder / name, **FLOWERS_FILES[name])

    if not (folder / "jpg").exists():
        unpack(fetch("102flowers.tgz"), folder, "jpg")
    labels = loadmat(fetch("imagelabels.mat"))["labels"][0] - 1        # (8189,), of image 1, 2, ...
    splits = loadmat(fetch("setid.mat"))
    keys = {"train": ["trnid"], "val": ["valid"], "test": ["tstid"]}
    numbers = sorted(int(i) for key in keys.get(split, ["trnid", "valid", "tstid"])
                     for i in splits[key][0])
    files = [f"image_{i:05d}.jpg" for i in numbers]
    return folder / "jpg", files, [int(labels[i - 1]) for i in numbers], FLOWERS_CLASSES


# AFHQ (version 1) of StarGAN v2, whose authors publish no checksum; size and sum are those found in
# other people's download scripts.
AFHQ_URL = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"
AFHQ_FILE = dict(size=729_484_677,
                 sha256="7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f")


def animal_faces(folder):
    if not (folder / "afhq").exists():
        unpack(download(AFHQ_URL, folder / "afhq.zip", **AFHQ_FILE), folder, "afhq")
    return class_folders(folder / "afhq" / "train")


def imagenet(folder):
    found = list(folder.iterdir()) if folder.is_dir() else []
    classes = [d.name for d in found if re.fullmatch(r"n\d{8}", d.name)]
    if len(classes) != 1000:
        raise UserError(f"{folder} has {len(classes)} of the 1000 class folders n01440764 ... "
                        "n15075141. ImageNet can't be downloaded without an account: get "
                        "ILSVRC2012's training pictures from image-net.org and put the folders "
                        f"there, or a link: ln -s /where/they/are/train {folder}")
    return class_folders(folder)


# ---- Downloads -----------------------------------------------------------------------------------

def download(url, path, size=None, sha256=None, md5=None):
    """-> path, a whole and verified file: fetched unless it is there, resumed where it broke off.

    size in bytes; http, https and file URLs. UserError: no network, no room, or not the file that
    was expected.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return verify(path, f"remove it to fetch it again from {url}", size, sha256, md5)
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    by_hand = f"or put the file at {path} by hand"
    if not have or have != size:
        headers = {"User-Agent": "sphere-latent-encoder"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            request = urllib.request.Request(url, headers=headers)
            with urllib.request.urlopen(request, timeout=20) as response:
                if response.status != 206:                    # the server sends it from the start
                    have = 0
                total = have + int(response.headers["Content-Length"] or 0)
                free = free_bytes(part.parent)
                if total - have > free:
                    raise UserError(f"{url} has {total / 1e9:.2f} GB, but {part.parent} has "
                                    f"{free / 1e9:.2f} GB free")
                with open(part, "ab" if have else "wb") as file, tqdm(
                        desc=path.name, total=total or None, initial=have, unit="B",
                        unit_scale=True) as bar:
                    while block := response.read(1 << 20):
                        have += file.write(block)
                        bar.update(len(block))
        except urllib.error.HTTPError as error:
            if error.code == 416:                             # no more: not a part of this file
                part.unlink()
                return download(url, path, size, sha256, md5)
            raise UserError(f"{url} cannot be fetched ({error}): try later, {by_hand}") from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError,
                ssl.SSLError) as error:
            so_far = f" after {have / 1e6:.1f} MB, which the same command resumes" * bool(have)
            raise UserError(f"{url} cannot be fetched ({getattr(error, 'reason', error)}){so_far}: "
                            f"is there a network? Try again, {by_hand}") from error
        if have < total:
            raise UserError(f"{url} broke off at {have / 1e6:.1f} of {total / 1e6:.1f} MB: the "
                            f"same command resumes it, {by_hand}")
    try:
        verify(part, f"it was removed; fetch {url} again, {by_hand}", size, sha256, md5)
    except UserError:
        part.unlink()
        raise
    part.replace(path)
    return path


def unpack(archive, folder, name):
    """The folder `name` of a .zip or .tgz -> folder/name, whole or not at all, without links."""
    def plain(member, path):                                  # names that lead out are refused
        if not (member.isfile() or member.isdir()):
            raise tarfile.FilterError(f"{member.name} is a link or a device")
        return tarfile.data_filter(member, path)

    part = folder / f".part-{os.getpid()}-{name}"
    print(f"unpacking {archive}", flush=True)
    try:
        if archive.suffix == ".zip":                          # makes no links, keeps names inside
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(part)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(part, filter=plain)
        if not (part / name).is_dir():
            raise UserError(f"{archive} has no folder {name}: it is another archive than expected")
        (part / name).rename(folder / name)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): remove it to fetch it "
                        "again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
