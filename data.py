"""Which pictures, which labels.

    toy           ten species of flowers, drawn here by formula: nothing to download
    flowers       Oxford-Flowers-102: 8,189 photographs of 102 species; fetched
    animal-faces  the training pictures of AFHQ: 14,630 faces of cats, dogs, wild animals; fetched
    imagenet      the training pictures of ILSVRC2012: put them into DATA_DIR/imagenet yourself
    PATH          a folder with a folder of pictures for each class: PATH/daisy/1.jpg, ...

A data set has `name`, `classes` (names, the index is the label), `labels` (N,), `recipe` (what
makes its pixels; the cache of latents is named by it) and `load(indices)` -> uint8 (b, 3, S, S).
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

from common import (UserError, file_hash, free_bytes, hash_of, one_line, part_of, printable, say,
                    sweep, verify, write_whole)
from laptop.toy import ToyFlowers  # laptop

# The data sets that have a name, and the side in pixels that training and scoring bring them to.
IMAGE_SIZE = {"flowers": 256, "animal-faces": 256, "imagenet": 256}
IMAGE_SIZE["toy"] = 60  # laptop


def load_dataset(name, image_size, min_side=1, root="datasets", split="all", skip_bad=False):
    """A data set by name or by folder, at image_size pixels.

    root: the folder of what is downloaded, and of what is remembered of files; split: train, val,
    test or all, of flowers. Pictures that cannot be read or have a side under min_side are an
    error, or with skip_bad left out and counted.
    """
    name, root = str(name), Path(root)
    if split != "all" and name != "flowers":
        raise UserError(f"--split {split}: only flowers has splits, {name} has one")
    if name in IMAGE_SIZE and os.path.isdir(name):
        say(f"note: {name} is the data set of this name, not the folder beside: write ./{name}")
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
        found = class_folders(Path(name))
        name = printable(Path(os.path.realpath(name)).name)
    else:
        raise UserError(f"--dataset: no data set is called {name!r} and no folder of that name is "
                        "here; use toy, flowers, animal-faces, imagenet or a PATH")
    return Pictures(name, *found, image_size, crop, min_side, root, skip_bad)


def describe(dataset):
    """The classes with their counts, and what was left out: a wrong folder shows here."""
    counts = torch.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()
    all_of_them = [f"{printable(name)} {n:,}" for name, n in zip(dataset.classes, counts)]
    text = f"{len(counts)} class{'es' * (len(counts) != 1)}: {', '.join(all_of_them[:10])}"
    if len(counts) > 10:
        least, most = counts.index(min(counts)), counts.index(max(counts))
        text += f", ...; smallest {all_of_them[least]}, largest {all_of_them[most]}"
    left_out = getattr(dataset, "left_out", None)
    return text + (f"; left out: {count_of(left_out)}" if left_out else "")


def count_of(left_out):
    return ", ".join(f"{n:,} {printable(kind)}" for kind, n in sorted(left_out.items()))


# ---- Picture files -------------------------------------------------------------------------------

class Pictures:
    """files (N,) under folder, with labels (N,) into classes; crop(picture, S) makes a square.

    sums (N,): the sha256 of each file; left_out: {kind: how many} of the folder's other files.
    """

    def __init__(self, name, folder, files, labels, classes, left_out, image_size, crop, min_side=1,
                 root="datasets", skip_bad=False):
        self.name, self.folder, self.classes, self.left_out = name, Path(folder), classes, left_out
        self.image_size, self.crop, self.min_side, self.skip_bad = (
            image_size, crop, min_side, skip_bad)
        found, path = contents(self.folder, files, root, check=skip_bad)
        good, bad = [], {}
        for i, (file, (_, digest, side)) in enumerate(zip(files, found)):
            if digest is None or isinstance(side, str):
                bad[file] = side
            elif side is not None and side < min_side:
                bad[file] = f"{self.folder / file} has a side of {side} pixels, under {min_side}"
            else:
                good.append(i)
        if bad and not skip_bad:
            raise UserError(f"{next(iter(bad.values()))}; or use --skip-bad")
        if bad:
            say(f"--skip-bad: {len(bad)} of {len(files)} pictures of {printable(name)} are left "
                f"out, all in {path}: {one_line(next(iter(bad.values())), 300)}")
        self.files, self.sums = [files[i] for i in good], [found[i][1] for i in good]
        self.labels = torch.as_tensor(labels, dtype=torch.long)[good]
        digest = hashlib.sha256()
        for file, label, of_file in zip(self.files, self.labels.tolist(), self.sums):
            digest.update(f"{file!r} {classes[label]!r} {of_file}\n".encode())
        for label, count in enumerate(torch.bincount(self.labels, minlength=len(classes))):
            if not count:
                raise UserError(f"class {classes[label]} of {folder} has no pictures: put some in")
        # A folder may be renamed: its pictures are what they were.
        self.recipe = {"dataset": name if name in IMAGE_SIZE else "folder", "n": len(self.files),
                       "image_size": image_size, "crop": crop.__name__,
                       "contents": digest.hexdigest()}

    def load(self, indices):
        with ThreadPoolExecutor() as pool:                    # PIL lets go of the GIL
            pictures = list(pool.map(lambda i: self._read(self.files[i]), indices))
        return torch.stack([to_tensor(picture) for picture in pictures])

    def _read(self, file):
        advice = "" if self.skip_bad else "; or use --skip-bad"
        try:
            picture = read_picture(self.folder / file)
        except UserError as error:
            raise UserError(f"{error}{advice}") from error
        if min(picture.size) < self.min_side:
            raise UserError(f"{self.folder / file} is {picture.width} x {picture.height}, smaller "
                            f"than the {self.min_side} pixels of which the autoencoder makes one"
                            f"{advice}")
        return self.crop(picture, self.image_size)


def contents(folder, files, root, check=False):
    """-> [stamp, sha256, side] of each file, and the path at which they are remembered.

    As git's index does: a file is read again only if its stamp (size, times, inode) has changed.
    side: of a picture that was checked, in pixels, or what is wrong with it, a text (that is looked
    at again each time).
    """
    name = f"{folder.name[-40:]}-{hash_of(os.path.realpath(folder))[:12]}.json"
    path, known, found = Path(root) / "contents" / name, {}, {}
    if path.exists():
        with contextlib.suppress(OSError, ValueError):
            digest, text = path.read_text().split("\n")
            known = json.loads(text) if hashlib.sha256(text.encode()).hexdigest() == digest else {}
        if not known:
            say(f"{path} is damaged: the pictures are read anew")
    reader = f"Pillow {PIL.__version__}"
    for file in files:
        try:
            status = os.stat(os.path.join(folder, file))
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            former, digest, side, checked_by = known.get(file, [None] * 4)
            kept = stamp == former and checked_by == reader and isinstance(side, int)
            found[file] = [stamp, digest if stamp == former else None, side if kept else None,
                           reader]
        except OSError as error:
            link = os.path.islink(folder / file) and isinstance(error, FileNotFoundError)
            why = "is a link that leads nowhere" if link else f"cannot be read: {error.strerror}"
            found[file] = [None, None, f"{folder / file} {why}", reader]

    def look(file):
        entry = found[file]
        try:
            entry[1] = entry[1] or file_hash(folder / file)
            if check and entry[2] is None:
                entry[2] = min(read_picture(folder / file).size)
        except (OSError, UserError) as error:
            entry[2] = str(error)

    todo = [file for file, (stamp, digest, side, _) in found.items()
            if stamp and (digest is None or check and side is None)]
    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(look, todo), total=len(todo), desc=f"reading {printable(folder)}",
                  leave=False, delay=1))
    # What changed a moment ago may change again within the same tick of the clock: it is not
    # remembered, but listed if it is bad.
    settled, new = time.time_ns() - 2 * 10 ** 9, {}
    for file, (stamp, digest, side, _) in found.items():
        if stamp and stamp[2] < settled:
            new[file] = [stamp, digest, side, reader]
        elif isinstance(side, str):
            new[file] = [None, None, side, reader]
    if new != known:
        text = json.dumps(new)
        try:
            with write_whole(path) as part:
                part.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        except UserError as error:
            say(f"note: {error}; each start will read all pictures")
    return [entry[:3] for entry in found.values()], path


def to_tensor(picture):
    """PIL -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


warnings.filterwarnings("ignore", module="PIL")               # of EXIF in disorder, as ImageNet's
Image.init()
FORMATS = [name for name in "JPEG MPO PNG WEBP TIFF BMP GIF PPM AVIF JPEG2000 TGA".split()
           if name in Image.OPEN]                             # PIL knows others, some run programs
ENDINGS = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
SYSTEM = ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx",
          "__pycache__", "system volume information")


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def picture_files(folder):
    """-> the pictures below a folder, sorted, and {kind: how many} of what else is there.

    A picture is a file with the ending of one of FORMATS. Hidden and system files and folders are
    left out; links are followed, but nothing is taken twice. A folder that cannot be read is an
    OSError, a link to nothing a UserError, or a picture for whoever reads it.
    """
    pictures, left_out, seen, folders, links = [], Counter(), set(), [os.fspath(folder)], []

    def take(path, is_file):
        ending = os.path.splitext(path)[1].lower()
        if is_file and ending in ENDINGS:
            pictures.append(path)
        else:
            left_out[(ending or "without ending") if is_file else "that are no files"] += 1

    while folders or links:
        if folders:                                           # what is there itself goes first
            where = folders.pop()
            status = os.stat(where)
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(where) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if entry.is_symlink():
                        links.append(entry.path)
                    elif entry.is_dir():
                        folders.append(entry.path)
                    else:
                        seen.add((status.st_dev, entry.inode()))
                        take(entry.path, entry.is_file())
            links.sort(reverse=True)
            continue
        link = links.pop()
        try:
            status = os.stat(link)
        except OSError as error:                              # to nothing, or in a circle
            if os.path.splitext(link)[1].lower() not in ENDINGS:
                raise UserError(f"{link} is a link that leads nowhere ({error.strerror}): mend "
                                "it") from error
            take(link, True)
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["links to what is there already"] += 1
        elif stat.S_ISDIR(status.st_mode):
            folders.append(link)
        else:
            seen.add((status.st_dev, status.st_ino))
            take(link, stat.S_ISREG(status.st_mode))
    return sorted(pictures), left_out


@contextlib.contextmanager
def open_picture(file):
    """PIL's picture. Whatever goes wrong with it is a UserError that names the file."""
    try:
        if not os.path.isfile(file):                          # a pipe would wait for ever
            raise ValueError("there is no such file")
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except Exception as error:                                # PIL raises many kinds
        raise UserError(f"{file} cannot be read as a picture ({one_line(error)}): repair "
                        "it") from error


def read_picture(file):
    """A picture as it is meant: RGB, upright, what is transparent laid on white."""
    with open_picture(file) as picture:
        return upright_rgb(picture)


# The EXIF orientation -> what makes it upright.
UPRIGHT = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90), start=2))


def is_plain(picture):
    """Would convert("RGB") lose nothing: no orientation, no transparency, no more than 8 bits?"""
    picture.load()                                            # some formats tell it at the end only
    return not (picture.getexif().get(0x0112) in UPRIGHT or picture.mode[0] in "IF"
                or {"A", "a"} & set(picture.getbands()) or "transparency" in picture.info)


def upright_rgb(picture):
    layout = picture.tile[0][3] if picture.tile else None     # of a PNG: how its bits are packed
    if is_plain(picture):
        return picture.convert("RGB")
    turn, clear = UPRIGHT.get(picture.getexif().get(0x0112)), picture.info.get("transparency")
    if clear is not None and layout == "RGB;16B":
        raise ValueError("one of its 16-bit colours is clear: save it in 8 bits")
    if isinstance(clear, int) and layout in ("L;2", "L;4"):   # PIL scales pixels only
        picture.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[layout]
    if picture.mode[0] in "IF":
        grey = np.asarray(picture)
        if not has_16_bits(picture):
            raise ValueError(f"grey values from {grey.min():g} to {grey.max():g}, and nothing says "
                             "which is white: save it in 8 or 16 bits")
        eight = (grey / 257).round().astype(np.uint8)         # convert() would clip
        if clear is not None:
            eight[grey == clear] = 255
        picture = Image.fromarray(eight)
    elif {"A", "a"} & set(picture.getbands()) or clear is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def has_16_bits(picture):
    """Grey from 0, black, to 65535, white? In a TIFF there may be fewer bits, or more."""
    if picture.format == "TIFF":
        bits, black_is_zero = picture.tag_v2.get(258), picture.tag_v2.get(262) == 1
        return picture.mode.startswith("I;16") and bits == (16,) and black_is_zero
    return picture.mode.startswith("I")


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


# ---- Where the files are: (folder, files, labels, classes, left_out) of each data set ------------

# Names of folders that are parts of a data set, or other pictures of the same, and no classes.
SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|unlabell?ed)"
                   r"([ _-]?(set|data|images?|[\dab]+))*", re.I)
PART = re.compile(r"(jpeg|seg(mentation)?|gt|depth|edge)?[ _-]?(image|img|mask|label|annotation|"
                  r"segmentation|ground[ _-]?truth|gt|rgb|depth|edge|thumbnail)s?[\d _-]*", re.I)
SHARD = re.compile(r"\d{5}/(img)?\d{5,8}\.\w+")


def class_folders(folder):
    """folder/CLASS/**/picture, classes in alphabetical order; or the labels of dataset.json."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: --dataset needs a folder with one folder of pictures "
                        "for each class")
    paths, left_out = picture_files(folder)
    files = [os.path.relpath(path, folder) for path in paths]
    if (folder / "dataset.json").exists():
        return folder, files, *labels_of_json(folder / "dataset.json", files), left_out
    loose = [file for file in files if os.sep not in file]
    left_out += Counter({"pictures in no class folder": len(loose)} if loose else {})
    files = [file for file in files if os.sep in file]
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not is_hidden(d.name))
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[file.split(os.sep)[0]] for file in files]
    counts = Counter(labels)
    if not classes:
        raise UserError(f"{folder} has no class folders: put the pictures into {folder}/CLASS/ "
                        "(one class is enough)")
    refuse_what_are_no_classes(folder, classes, files)
    for label, name in enumerate(classes):
        if not counts[label]:
            there = count_of(picture_files(folder / name)[1]) or "nothing at all"
            raise UserError(f"{folder / name} has no pictures of a format that is read here "
                            f"({there}): convert them, put some in, or move it elsewhere")
    return folder, files, labels, classes, left_out


def refuse_what_are_no_classes(folder, classes, files):
    inside = sorted({file.split(os.sep)[1] for file in files if file.count(os.sep) > 1})
    nested = all(file.count(os.sep) > 1 for file in files)
    for kind in (SPLIT, PART):
        parts = [name for name in classes if kind.fullmatch(name)]
        if len(parts) > 1 or parts == classes and kind is SPLIT and inside:
            raise UserError(f"{folder} holds {', '.join(parts[:5])}, which are parts of a data set "
                            f"and no classes: give one of them, as {folder / parts[0]}")
    if len(classes) == 1 and nested and len(inside) > 1:
        say(f"note: {printable(folder)} holds one folder, and that holds "
            f"{printable(', '.join(inside[:5]))}: if those are the classes, give "
            f"{printable(folder / classes[0])}")
    if files and all(SHARD.fullmatch(file.replace(os.sep, "/")) for file in files):
        raise UserError(f"{folder} holds {', '.join(classes[:3])}, shards and no classes, and no "
                        "dataset.json with labels: put the pictures into one folder a class")


def labels_of_json(path, files):
    """EDM's and StyleGAN's {"labels": [[file, number], ...]} -> labels of the files, classes."""
    try:
        of_file = {os.path.normpath(file): number
                   for file, number in json.loads(path.read_bytes())["labels"]}
        if wrong := [number for number in of_file.values() if type(number) is not int]:
            raise ValueError(f"a label is {one_line(wrong[0], 20)}, no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path} does not hold {{"labels": [[file, number], ...]}} '
                        f"({one_line(error)}): mend it, or move it elsewhere if the folders are "
                        "the classes") from error
    if different := sorted(set(files) ^ set(of_file)):
        raise UserError(f"{path} has labels of {len(of_file)} pictures, {len(files)} are there; "
                        f"{len(different)} are only in one of both, {different[0]} first: mend it")
    numbers = sorted(set(of_file.values()))
    return [numbers.index(of_file[file]) for file in files], [str(number) for number in numbers]


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
    if missing := [file for file in files if not (folder / "jpg" / file).exists()]:
        raise UserError(f"{folder / 'jpg' / missing[0]} is missing: remove {folder / 'jpg'} to "
                        "unpack that again")
    return folder / "jpg", files, [int(labels[i - 1]) for i in numbers], FLOWERS_CLASSES, {}


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
    if not have or have != size:                              # else it only lacks its name
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
            if error.code == 416 and have:                    # no more: not a part of this file
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

    part = part_of(folder / name)
    sweep(folder)
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
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): remove it to fetch it "
                        "again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
