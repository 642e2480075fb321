"""Which pictures, which labels.

    toy           ten species of flowers, drawn here by formula: nothing to download
    flowers       Oxford-Flowers-102: 8,189 photographs of 102 species; fetched
    animal-faces  the training pictures of AFHQ: 14,630 faces of cats, dogs, wild animals; fetched
    imagenet      the training pictures of ILSVRC2012: put them into DATA_DIR/imagenet yourself
    PATH          a folder with a folder of pictures for each class: PATH/daisy/1.jpg, ...

A data set has `name`, `classes` (names, the index is the label), `labels` (N,), `recipe` (what
makes its pixels; the cache of latents is named by it) and `load(indices)` -> uint8 (b, 3, S, S).
One's own: class folders, InMemory, any object with these, or another entry of DATASETS.
"""
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from laptop import toy  # laptop
from utils.cli import UserError, one_line, printable
from utils.files import download, unpack, write_whole
from utils.images import (contents, count_of, is_hidden, labels_of_json, picture_files,
                          read_picture, refuse_what_are_no_classes, to_tensor)
from utils.processes import note


def load_dataset(name, image_size, min_side=1, root="datasets", split="all", skip_bad=False):
    """A data set by name or by folder, at image_size pixels.

    root: the folder of what is downloaded, and of what is remembered of files; split: train, val,
    test or all, of flowers. Pictures that cannot be read or have a side under min_side are an
    error, or with skip_bad left out and counted.
    """
    kind = name = str(name)
    root, known = Path(root), DATASETS.get(name, DataSet())
    if split != "all" and not known.has_splits:
        raise UserError(f"--split {split}: only flowers has splits, {name} has one")
    if name in DATASETS and os.path.isdir(name):
        note(f"{name} is the data set of this name, not the folder beside: write ./{name}")
    if known.make:
        return known.make(image_size)
    if known.find:
        found = known.find(root / name, split)
    elif os.path.exists(name) or os.sep in name:
        found = class_folders(Path(name))
        kind, name = "folder", printable(Path(os.path.realpath(name)).name)
    else:
        raise UserError(f"--dataset: no data set is called {name!r} and no folder of that name is "
                        f"here; use {', '.join(DATASETS)} or a PATH")
    return Pictures(name, *found, image_size, known.crop, min_side, root, skip_bad, kind)


def describe(dataset):
    """The classes with their counts, and what is odd: a wrong folder shows here."""
    counts = torch.bincount(dataset.labels, minlength=len(dataset.classes)).tolist()
    all_of_them = [f"{printable(name)} {n:,}" for name, n in zip(dataset.classes, counts)]
    text = f"{len(counts)} class{'es' * (len(counts) != 1)}: {', '.join(all_of_them[:10])}"
    if len(counts) > 10:
        least, most = counts.index(min(counts)), counts.index(max(counts))
        text += f", ...; smallest {all_of_them[least]}, largest {all_of_them[most]}"
    sums, number, times = np.unique(getattr(dataset, "sums", ()), return_inverse=True,
                                    return_counts=True)
    sides = getattr(dataset, "enlarged", ())
    if twice := len(number) - len(sums):
        again = times[number] > 1
        of_both = Counter(sum_ for sum_, _ in set(zip(number[again].tolist(),
                                                     dataset.labels[again].tolist())))
        several = sum(n > 1 for n in of_both.values())
        text += f"; {twice:,} pictures are copies of others" + (
            f", {several:,} stand in several classes" * (several > 0))
    if sides:
        text += (f"; {len(sides):,} are enlarged, from sides of {min(sides)} to {max(sides)} to "
                 f"{dataset.image_size} pixels")
    left_out = getattr(dataset, "left_out", None)
    return text + (f"; left out: {count_of(left_out)}" if left_out else "")


class InMemory:
    """Pictures in memory, uint8 (N, 3, S, S), with labels (N,) into the names of classes.

    ValueError: of another type or shape, or labels that are no classes (num_classes is the null
    class of guidance: it would be trained without a word).
    """

    def __init__(self, images, labels, classes, name="own"):
        self.images, self.name, self.classes = images, name, list(classes)
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        N, channels, H, W = images.shape
        if (images.dtype, channels, H, self.labels.shape) != (torch.uint8, 3, W, (N,)):
            raise ValueError("give images uint8 (N, 3, S, S) and labels (N,), not "
                             f"{images.dtype} {tuple(images.shape)}, {tuple(self.labels.shape)}")
        if set(self.labels.tolist()) != set(range(len(self.classes))):
            raise ValueError(f"labels must be 0 .. {len(self.classes) - 1}, each at least once")
        digest = hashlib.sha256(images.numpy().tobytes() + self.labels.numpy().tobytes())
        self.recipe = {"dataset": name, "n": len(images), "image_size": images.shape[2],
                       "classes": self.classes, "contents": digest.hexdigest()}

    def load(self, indices):
        return self.images[torch.as_tensor(indices)]


class Unseen:
    """The data set of a checkpoint, with its classes and their counts, but without pictures."""

    def __init__(self, checkpoint):
        run, counts = checkpoint["args"], checkpoint.get("counts")
        if not counts:
            raise UserError("the checkpoint does not say how many pictures of each class there "
                            "were: resume its training for a step")
        self.name, self.recipe = Path(run["dataset"]).name, run["pictures"]
        self.classes, self.image_size = checkpoint["classes"], run["image_size"]
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def load(self, indices):
        raise UserError(f"the pictures of {self.name} are not here")


# ---- Picture files -------------------------------------------------------------------------------

def list_of_bad(path, bad):
    """Writes what is wrong with files beside their index, and says where; or that it could not."""
    path = path.with_suffix(".left-out.txt")
    text = "".join(f"{one_line(bad[i], 10_000)}\n" for i in sorted(bad))
    try:
        with write_whole(path) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
        return f", all in {path}"
    except UserError as error:
        return f" ({error})"


class Pictures:
    """files (N,) under folder, with labels (N,) into classes; crop(picture, S) makes a square.

    Files and sums, the sha256 of each, are arrays of bytes: a million take little memory. enlarged:
    the sides of those that are smaller than image_size; left_out: {kind: how many} of other files.
    """

    def __init__(self, name, folder, files, labels, classes, left_out, image_size, crop, min_side=1,
                 root="datasets", skip_bad=False, kind="folder"):
        self.name, self.folder, self.classes, self.left_out = name, Path(folder), classes, left_out
        self.image_size, self.crop, self.skip_bad = image_size, crop, skip_bad
        found, bad, path = contents(self.folder, files, root, check=skip_bad)
        for i in ((found.sides >= 0) & (found.sides < min_side)).nonzero()[0].tolist():
            bad[i] = (f"{self.folder / files[i]} has a side of {found.sides[i]} pixels, smaller "
                      f"than the {min_side} of which the autoencoder makes one")
        if bad and not skip_bad:
            raise UserError(f"{bad[min(bad)]}; or use --skip-bad")
        if bad:
            note(f"--skip-bad: {len(bad)} of {len(files)} pictures of {printable(name)} are left "
                 f"out{list_of_bad(path, bad)}: {one_line(bad[min(bad)], 300)}")
        good = np.delete(np.arange(len(files)), list(bad))
        self.files, self.sums = found.files[good], found.sums[good].view("S32")[:, 0]
        sides = found.sides[good]
        self.enlarged = sides[(sides >= 0) & (sides < image_size)].tolist()
        self.labels = torch.as_tensor(labels, dtype=torch.long)[good]
        digest = hashlib.sha256()
        for i, label in zip(good.tolist(), self.labels.tolist()):
            of_file = found.sums[i].tobytes().hex()
            digest.update(f"{files[i]!r} {classes[label]!r} {of_file}\n".encode())
        for label, count in enumerate(torch.bincount(self.labels, minlength=len(classes))):
            if not count:
                raise UserError(f"class {classes[label]} of {folder} has no pictures: put some in")
        # Not by its name: a folder may be renamed, its pictures are what they were.
        self.recipe = {"dataset": kind, "n": len(self.files), "image_size": image_size,
                       "crop": crop.__name__, "contents": digest.hexdigest()}

    def load(self, indices):
        with ThreadPoolExecutor() as pool:                    # PIL lets go of the GIL
            pictures = list(pool.map(lambda i: self._read(os.fsdecode(self.files[i])), indices))
        return torch.stack([to_tensor(picture) for picture in pictures])

    def _read(self, file):
        try:
            return self.crop(read_picture(self.folder / file), self.image_size)
        except UserError as error:
            raise UserError(f"{error}{'' if self.skip_bad else '; or use --skip-bad'}") from error


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

def class_folders(folder):
    """folder/CLASS/**/picture, classes in alphabetical order; or the labels of dataset.json."""
    if not folder.is_dir():
        found = "is a file (an archive? unpack it)" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {found}: --dataset needs a folder with one folder of pictures "
                        "for each class")
    paths, left_out = picture_files(folder)
    begin = len(os.path.join(folder, ""))
    files = [path[begin:] for path in paths]                  # relpath takes eight times as long
    del paths
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


def animal_faces(folder, split):
    if not (folder / "afhq").exists():
        unpack(download(AFHQ_URL, folder / "afhq.zip", **AFHQ_FILE), folder, "afhq")
    return class_folders(folder / "afhq" / "train")


def imagenet(folder, split):
    found = list(folder.iterdir()) if folder.is_dir() else []
    classes = [d.name for d in found if re.fullmatch(r"n\d{8}", d.name)]
    if len(classes) != 1000:
        raise UserError(f"{folder} has {len(classes)} of the 1000 class folders n01440764 ... "
                        "n15075141. ImageNet can't be downloaded without an account: get "
                        "ILSVRC2012's training pictures from image-net.org and put the folders "
                        f"there, or a link: ln -s /where/they/are/train {folder}")
    *found, names, left_out = class_folders(folder)
    if len(names) != 1000:
        raise UserError(f"{folder} has {len(names)} folders with pictures, not 1000: take out "
                        f"{', '.join(sorted(set(names) - set(classes)))}")
    return *found, names, left_out


# ---- Those that have a name ----------------------------------------------------------------------

class DataSet(NamedTuple):
    """find(folder, split) -> what Pictures takes; or make(image_size) -> a data set."""
    find: Callable = None
    make: Callable = None
    image_size: int = 256                                     # at which it is scored
    crop: Callable = centre_crop
    has_splits: bool = False
    reference: dict = None                                    # statistics for FID, to be downloaded
    held_out: Callable = lambda image_size: None              # pictures like it, but none of it


# ADM's ImageNet-256 reference. Size and sum are those that public repositories pin; OpenAI gives
# none.
ADM = dict(url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
               "256/VIRTUAL_imagenet256_labeled.npz", size=2_037_122_530,
           sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758")
DATASETS = {"flowers": DataSet(oxford_flowers, has_splits=True),
            "animal-faces": DataSet(animal_faces),
            "imagenet": DataSet(imagenet, crop=adm_crop, reference=ADM)}
DATASETS["toy"] = DataSet(**toy.DATASET)  # laptop
