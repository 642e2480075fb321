"""Odd pictures and odd folders: what is a picture, how it is meant, which files changed.

Look here to see why a picture, a folder or an npz was refused, left out, or turned; and how
pictures that were drawn are written.
"""
import contextlib
import json
import math
import os
import re
import stat
import struct
import time
import warnings
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from utils.cli import UserError, one_line, printable, same_letters, size_text
from utils.files import file_hash, free_bytes, hash_of, make_folder, write_whole
from utils.processes import from_first, note, physical_memory

# ---- Pictures as tensors -------------------------------------------------------------------------

def to_float(images):
    """uint8 pictures -> float in [0, 1]; float images stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Decoded images, about [0, 1] -> uint8 pictures."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def resize(images, size):
    """(B, 3, H, W) -> float (B, 3, size, size), bicubic with antialias; it overshoots: clamp."""
    x = images.float()
    on = x.cpu() if x.device.type == "mps" else x             # torch 2.6 and 2.7 have none there
    return F.interpolate(on, size=(size, size), mode="bicubic", antialias=True).to(x.device)


def to_tensor(picture):
    """PIL -> uint8 (3, H, W)"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# ---- A picture -----------------------------------------------------------------------------------

warnings.filterwarnings("ignore", module="PIL")               # of EXIF in disorder, as ImageNet's
Image.init()
FORMATS = [name for name in "JPEG MPO PNG WEBP TIFF BMP GIF PPM AVIF JPEG2000 TGA".split()
           if name in Image.OPEN]                             # PIL knows others, some run programs
ENDINGS = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
@contextlib.contextmanager
def open_picture(file):
    """PIL's picture. Whatever goes wrong with it is a UserError that names the file."""
    try:
        if not os.path.isfile(file):                          # a pipe would wait for ever
            raise ValueError("there is no such file")
        with Image.open(file, formats=FORMATS) as picture:
            yield picture
    except Exception as error:                                # PIL raises many kinds
        what = "shrink" if isinstance(error, Image.DecompressionBombError) else "repair"
        raise UserError(f"{file} cannot be read as a picture ({one_line(error)}): {what} "
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
    """ValueError: values of more than 8 bits, of which nobody can say which is white; a clear
    colour that PIL would not find again among pixels that it has scaled to 8 bits; pages."""
    layout = picture.tile[0][3] if picture.tile else None     # of a PNG: how its bits are packed
    if (pages := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":    # a phone's
        raise ValueError(f"it has {pages} pages: save those that count as pictures of their own")
    if is_plain(picture):
        return picture.convert("RGB")
    turn, clear = UPRIGHT.get(picture.getexif().get(0x0112)), picture.info.get("transparency")
    packed = clear is not None and layout in ("RGB;16B", "L;2", "L;4")
    if picture.mode[0] in "IF" or packed:
        raise ValueError("its values are not of 8 bits: save it in 8 bits as it should look")
    if {"A", "a"} & set(picture.getbands()) or clear is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


# ---- A folder of pictures ------------------------------------------------------------------------

SYSTEM = ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found", "__macosx",
          "__pycache__", "system volume information")


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def picture_files(folder):
    """Returns the pictures below a folder, sorted, and {kind: how many} of what else is there.

    A picture is a file with the ending of one of FORMATS. Hidden and system files and folders are
    left out, without being counted but for pictures that a cloud has elsewhere (.NAME.jpg.icloud);
    links are followed, but nothing is taken twice. A folder that cannot be read is an OSError, a
    link to nothing a UserError, or a picture for whoever reads it.
    """
    pictures, left_out, seen, folders, links = [], Counter(), set(), [os.fspath(folder)], []
    of_files = array("Q"), array("Q")                         # device, inode: less than a set

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
                    if is_hidden(entry.name) and not (entry.name.endswith(".icloud")
                                                      and entry.is_file()):
                        continue
                    if entry.is_symlink():
                        links.append(entry.path)
                    elif entry.is_dir():
                        folders.append(entry.path)
                    else:
                        of_files[0].append(status.st_dev)
                        of_files[1].append(entry.inode())
                        take(entry.path, entry.is_file())
            links.sort(reverse=True)
            continue
        seen.update(zip(*of_files))
        of_files = array("Q"), array("Q")
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


class Contents(NamedTuple):
    """What is known of n files, arrays of n. An index of them is kept, as git keeps one."""
    files: np.ndarray                                         # names, as bytes
    stamps: np.ndarray                                        # (n, 4): size, times, inode
    sums: np.ndarray                                          # (n, 32), sha256; zeros: not known
    sides: np.ndarray                                         # the shorter, pixels; -1: not known
    checked: np.ndarray                                       # they were decoded, without an error


def contents(folder, files, root, check=False):
    """Returns the Contents, {number of a file: what is wrong with it}, and where the index is.

    A file is read again only if its stamp has changed, or something is wrong with it. With check
    all are decoded once. A side is what the file says; not all say it.
    """
    name = f"{folder.name[-40:]}-{hash_of(os.path.realpath(folder))[:12]}.npz"
    path, n, where, bad = Path(root) / "contents" / name, len(files), os.path.join(folder, ""), {}
    found = Contents(np.array([os.fsencode(file) for file in files]), np.zeros((n, 4), np.int64),
                     np.zeros((n, 32), np.uint8), np.full(n, -1, np.int32), np.zeros(n, bool))
    for i, file in enumerate(files):
        try:
            status = os.stat(where + file)
            found.stamps[i] = [value % 2 ** 63 for value in (  # of the year 2300, too
                status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)]
        except OSError as error:
            link = os.path.islink(where + file) and isinstance(error, FileNotFoundError)
            why = "is a link that leads nowhere" if link else f"cannot be read: {error.strerror}"
            bad[i] = f"{where}{file} {why}"
    known = read_index(path)
    if len(known.files):
        at = np.searchsorted(known.files, found.files).clip(max=len(known.files) - 1)
        same = (known.files[at] == found.files) & (known.stamps[at] == found.stamps).all(1)
        for array, before in zip(found[2:], known[2:]):
            array[same] = before[at[same]]

    def look(i):
        file = folder / files[i]
        try:
            if not found.sums[i].any():
                found.sums[i] = np.frombuffer(bytes.fromhex(file_hash(file)), np.uint8)
            if check:
                found.sides[i], found.checked[i] = min(read_picture(file).size), True
            else:
                with contextlib.suppress(UserError), open_picture(file) as picture:
                    found.sides[i] = min(picture.size)
        except (OSError, UserError) as error:
            bad[i] = str(error)

    todo = np.delete(np.arange(n), list(bad))
    wanted = (found.sides < 0) | ~found.sums.any(1) | (check & ~found.checked)
    todo, started = todo[wanted[todo]], time.perf_counter()
    with ThreadPoolExecutor() as pool, tqdm(desc=f"reading {printable(folder)}", total=len(todo),
                                            leave=False, delay=1, disable=None) as bar:
        for some in np.array_split(todo, len(todo) // 10_000 + 1):        # a million jobs are 1 GB
            for _ in pool.map(look, some.tolist()):
                bar.update()
    if (seconds := time.perf_counter() - started) > 10:
        note(f"{len(todo):,} pictures of {printable(folder)} were read in {seconds:.0f} s; they "
             "are not read again until they change")
    # What changed a moment ago may change again within the same tick of the clock: it is not kept.
    keep = found.sums.any(1) & (found.stamps[:, 2] < time.time_ns() - 2 * 10 ** 9)
    if len(todo) or keep.sum() != len(known.files):
        order = keep.nonzero()[0]
        order = order[np.argsort(found.files[order], kind="stable")]
        try:
            with write_whole(path) as part, open(part, "wb") as file:
                np.savez(file, reader=reader(), **{name: array[order]
                                                 for name, array in found._asdict().items()})
        except UserError as error:
            note(f"{error}; each start will read all pictures")
    return found, bad, path


def reader():
    return f"Pillow {PIL.__version__}, 3"                     # raise it when upright_rgb changes


def read_index(path):
    """The Contents kept there, sorted by name. What another Pillow decoded is not checked."""
    nothing = Contents(*(np.zeros((0, *shape)) for shape in ((), (4,), (32,), (), ())))
    try:
        with np.load(path) as file:                           # a zip, which checks its sums
            kept = Contents(*(file[name] for name in Contents._fields))
            kinds = [(array.dtype.kind, *array.shape[1:]) for array in kept]
            if (kinds != [("S",), ("i", 4), ("u", 32), ("i",), ("b",)]
                    or len(set(map(len, kept))) > 1):
                raise ValueError("other arrays")
            return kept._replace(checked=kept.checked & (file["reader"] == reader()))
    except FileNotFoundError:
        pass
    except Exception:                                         # a damaged file may hold anything
        note(f"{path} is damaged: the pictures are read again")
    return nothing


def write_sums(path, dataset):
    """The files of a data set and the first 8 bytes of their sums, to see later what changed."""
    with write_whole(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **sums_of(dataset))


def sums_of(dataset):
    files, sums = ([os.fsencode(value) for value in getattr(dataset, name, ())]
                   for name in ("files", "sums"))
    return {"files": np.array(files, "S"), "sums": np.array(sums, "S8")}


def what_changed(path, dataset):
    """In words: how a data set differs from the one of which write_sums wrote."""
    try:
        with np.load(path) as file:
            old, new = ({os.fsdecode(name): value for name, value in
                         zip(some["files"].tolist(), some["sums"].tolist())}
                        for some in (file, sums_of(dataset)))
        kinds = {"added": new.keys() - old.keys(), "removed": old.keys() - new.keys(),
                 "changed": {file for file in new.keys() & old.keys() if new[file] != old[file]}}
    except Exception:                                         # of older code, or damaged
        return f"its pictures have changed; which, is not known without a whole {path}"
    words = [f"{len(files)} {kind}, {min(files)} first" for kind, files in kinds.items() if files]
    return "its pictures have changed: " + ("; ".join(words) or "their number, crop or labels")


def count_of(left_out):
    return ", ".join(f"{n:,} {printable(kind)}" for kind, n in sorted(left_out.items()))


# Names of folders that are parts of a data set, or other pictures of the same, and no classes.
SPLIT = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval|unlabell?ed)"
                   r"([ _-]?(set|data|images?|[\dab]+))*", re.I)
PART = re.compile(r"(jpeg|seg(mentation)?|gt|depth|edge)?[ _-]?(image|img|mask|label|annotation|"
                  r"segmentation|ground[ _-]?truth|gt|rgb|depth|edge|thumbnail)s?[\d _-]*", re.I)
SHARD = re.compile(r"\d{5}/(img)?\d{5,8}\.\w+")


def refuse_what_are_no_classes(folder, classes, files):
    deep = [file for file in files if file.count(os.sep) > 1]
    inside, nested = sorted({file.split(os.sep)[1] for file in deep}), len(deep) == len(files)
    for kind in (SPLIT, PART):
        parts = [name for name in classes if kind.fullmatch(name)]
        if len(parts) > 1 or parts == classes and kind is SPLIT and inside:
            raise UserError(f"{folder} holds {', '.join(parts[:5])}, which are parts of a data set "
                            f"and no classes: give one of them, as {folder / parts[0]}")
    known, there = set(classes), set(files if deep else ())
    again = {(parts[0], parts[i]) for parts in (file.split(os.sep) for file in deep)
             for i in range(1, len(parts) - 1) if parts[i] in known and parts[i] != parts[0]
             # Numbers name days and sessions, too.
             and (not parts[i].isdecimal() or os.sep.join(parts[i:]) in there)}
    if again:
        outer, name = min(again)
        raise UserError(f"{folder / outer} is the folder of a class and holds a folder {name}, "
                        "which is another class: is it a copy of the data set? Move it elsewhere")
    if len(classes) == 1 and nested and len(inside) > 1:
        note(f"{printable(folder)} holds one folder, and that holds "
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


# ---- A set of pictures to be scored: a folder or an npz ------------------------------------------

# Feature spaces of statistics, and how their keys mu and sigma end in an npz: ADM's mu_s, sigma_s.
STATISTICS = {"pool": "", "spatial": "_s"}


@dataclass
class PictureSet:
    """One of two sets to be compared: pictures, or statistics already made of them, or both."""
    path: str
    recipe: dict                                        # what it is, for the record
    n: int = 0                                          # how many pictures
    load: Callable = None                               # indices -> uint8 (b, 3, H, W), or a list
    statistics: dict = field(default_factory=dict)      # space -> (mu, sigma)
    made_with: dict = field(default_factory=dict)       # its statistics, as far as that is known
    presumed: str = None                                # their pipeline, where it is not known
    is_dataset: bool = False
    unlike: set = field(default_factory=set)            # what pytorch-fid reads otherwise: numbers
    sizes: Counter = field(default_factory=Counter)     # (H, W) -> how many, once they are known
    classes: Counter = field(default_factory=Counter)   # name -> how many, where that is known
    notes: list = field(default_factory=list)


def open_folder(path, as_pytorch_fid=False):
    """Pictures are read as training reads them (upright_rgb), or by PIL's convert alone."""
    files, left_out = picture_files(path)
    if not files:
        raise UserError(f"{path} has no pictures in it or below it ({count_of(left_out)})")
    for run in sorted({os.path.dirname(file) for file in files}):
        if os.path.exists(os.path.join(run, "ckpt.pt")):
            raise UserError(f"{run} is a run, whose pictures are grids: draw single ones (python "
                            f"sample.py --ckpt {run}/ckpt.pt --num 10000 --npz) and give "
                            f"{run}/samples.npz")
    try:
        listing = [f"{os.path.relpath(file, path)} {os.stat(file).st_size}" for file in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: does the link lead nowhere?") from error
    recipe = {"folder": str(path), "n": len(files), "names_and_sizes_sha256": hash_of(listing),
              "read": f"as {'pytorch-fid does' if as_pytorch_fid else 'in training'}, but whole"}
    if left_out:
        recipe["left_out"] = count_of(left_out)
    found = PictureSet(str(path), recipe, len(files))
    folders = [os.path.relpath(file, path).split(os.sep)[:-1] for file in files]
    if all(folders):
        found.classes.update(same_letters(names[0]) for names in folders)

    def read(i):
        with open_picture(files[i]) as picture:
            image = to_tensor(picture.convert("RGB") if as_pytorch_fid else upright_rgb(picture))
            if not is_plain(picture):
                found.unlike.add(i)
            return image

    def load(indices):
        with ThreadPoolExecutor() as pool:                    # PIL lets go of the GIL
            images = list(pool.map(read, indices))
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    found.load = load
    return found


@np.errstate(all="ignore")                                    # what overflows is refused
def mapped(path, name):
    """An array of an npz as np.savez writes it, left on the disk; None: it is packed, or not there.

    What is damaged is found here: the first process reads it once, a piece at a time.
    """
    with zipfile.ZipFile(path) as file:
        if name not in file.namelist() or file.getinfo(name).compress_type != zipfile.ZIP_STORED:
            return None
        info = file.getinfo(name)
        with file.open(info) as array:
            version = np.lib.format.read_magic(array)
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read_header(array)
            begin = array.tell()
        if dtype.hasobject or 0 in shape:
            return None
        if not dist.is_initialized() or dist.get_rank() == 0:
            with file.open(info) as array:
                while array.read(1 << 24):                    # at its end the zip's sum is checked
                    pass
    with open(path, "rb") as raw:                             # a zip's header of one file
        raw.seek(info.header_offset + 26)
        begin += info.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
    return np.memmap(path, dtype, "r", begin, shape, "F" if fortran else "C")


def open_npz(path):
    """An npz of pictures or statistics. UserError: of neither, or damaged."""
    try:
        pictures = mapped(path, "arr_0.npy")
        with zipfile.ZipFile(path) as file:
            size, memory = sum(info.file_size for info in file.infolist()), physical_memory()
        size -= 0 if pictures is None else pictures.nbytes
        if size > memory:
            raise ValueError(f"it takes {size_text(size)} of memory, and here are "
                             f"{size_text(memory)}")
        with np.load(path) as file:
            wanted = {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "labels", "recipe"}
            arrays = {key: np.asarray(file[key])              # whole: the zip's sums are checked
                      for key in wanted.intersection(file.files)
                      if key != "arr_0" or pictures is None}
            if pictures is not None:
                arrays["arr_0"] = pictures
            with contextlib.suppress(LookupError, ValueError):            # of others: objects
                arrays["classes"] = file["classes"]
            if not arrays.keys() & {"arr_0", "mu"}:
                raise ValueError("it has neither arr_0 (pictures) nor mu and sigma (statistics): "
                                 "unpack it, if it is an archive, and give the folder")
        found = PictureSet(str(path), {"npz": str(path)})
        if "recipe" in arrays:
            found.recipe |= read_recipe(str(arrays["recipe"]))
            with contextlib.suppress(LookupError, TypeError):  # of statistics
                found.n = found.recipe["made_by"]["pictures"]["n"]
        for space, end in STATISTICS.items():
            if f"mu{end}" in arrays:
                found.statistics[space] = mu, _ = read_statistics(arrays, end, found)
                if 0 < found.n < len(mu):
                    found.notes.append(f"{path}: {few(found.n, len(mu))}")
        features = found.recipe.get("made_by", {}).get("features")
        if found.statistics and isinstance(features, dict):
            found.made_with = {key: str(features[key]) for key in ("pipeline", "weights_sha256")
                               if key in features}
        elif "spatial" in found.statistics:                   # ADM's keys: its evaluator's, likely
            found.presumed = "tensorflow"
        if "arr_0" in arrays:
            pictures = arrays["arr_0"]
            if (pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3
                    or 0 in pictures.shape):
                raise ValueError("arr_0 must be pictures, uint8 (N, H, W, 3), not "
                                 f"{pictures.dtype} {pictures.shape}")
            found.n, height, width, _ = pictures.shape
            found.load = lambda indices: torch.from_numpy(    # (b, H, W, 3) -> (b, 3, H, W)
                pictures[list(indices)]).permute(0, 3, 1, 2)
            found.recipe["n"], found.sizes[height, width] = found.n, found.n
        if len(arrays.get("labels", ())):
            counts = np.unique(arrays["labels"], return_counts=True)[1]
            found.recipe |= {"classes": len(counts),
                             "pictures_a_class": f"{counts.min()} to {counts.max()}"}
            with contextlib.suppress(LookupError, TypeError):  # sample.py's
                names = arrays["classes"][arrays["labels"]]
                found.classes.update(map(same_letters, names.tolist()))
        return found
    except Exception as error:                                # a file may hold anything
        raise UserError(f"{path} cannot be read as an npz ({one_line(error)})") from error


def compare(A, B):
    """Sizes for the recipes, and notes of what a distance measures beside the pictures' looks."""
    for s in (A, B):
        s.recipe["sizes"] = ", ".join(f"{n:,} of {W} x {H}"
                                      for (H, W), n in s.sizes.most_common(3)) or "unknown"
    sizes = A.sizes.keys() | B.sizes.keys()
    if len(sizes) > 1 and A.sizes and B.sizes or any(H != W for H, W in sizes):
        A.notes.append(f"{A.path} has pictures of other sizes than {B.path}, or some that are not "
                       f"square ({A.recipe['sizes']}; {B.recipe['sizes']}): the distance measures "
                       "that, too, as they are read whole, where training crops the middle")
    if A.classes and A.classes.keys() == B.classes.keys():
        a, b = (np.array([s.classes[name] for name in A.classes]) / s.classes.total()
                for s in (A, B))
        if abs(a - b).max() > 0.05:
            i = abs(a - b).argmax()
            A.notes.append(f"{A.path} and {B.path} have classes in other shares "
                           f"({list(A.classes)[i]} {a[i]:.0%} and {b[i]:.0%}): the distance "
                           "measures that, too; sample.py --balance data draws the data's")


def few(n, dim):
    return (f"{n:,} pictures for {dim:,} features: the covariance is singular and the distance too "
            "large; compare it only with others of as many pictures")


def read_recipe(text):
    """sample.py's, or ours of statistics; of anything else nothing is believed."""
    with contextlib.suppress(ValueError, RecursionError):
        made_by = json.loads(text) if text.count("{") + text.count("[") < 100 else None
        if isinstance(made_by, dict):
            return {"made_by": made_by}
    return {"made_by": {"unknown": one_line(text, 30)}}


def read_statistics(arrays, end, found):
    """mu (d,), sigma (d, d), float64. ValueError: they are none."""
    mu, sigma = (arrays.get(f"{name}{end}", np.zeros(0)) for name in ("mu", "sigma"))
    if mu.dtype.kind + sigma.dtype.kind != "ff" or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise ValueError(f"mu{end} and sigma{end} must be floats of shapes (d,) and (d, d), not "
                         f"{mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f"mu{end} or sigma{end} is not finite")
    off, largest = (np.abs(a).max(initial=0) for a in (sigma - sigma.T, sigma))
    if off > 1e-4 * largest:
        raise ValueError(f"sigma{end} is not symmetric")
    if off > 1e-8 * largest:
        found.notes.append(f"{found.path}: sigma{end} is symmetric to {off / largest:.0e} only, as "
                           "in float32: the mean of both halves is taken")
    return mu, (sigma + sigma.T) / 2


def kept_statistics(s, cache):
    """Gives the set those that are kept in the npz `cache`, if they are there and whole."""
    kept = None
    try:
        kept = open_npz(cache).statistics if cache.exists() else None
    except UserError as error:
        note(f"{error}: the statistics are made again")
    if kept := from_first(kept):
        s.statistics, s.recipe["statistics_from"] = kept, str(cache)
    return kept


def save_statistics(path, pictures, made_with):
    """An npz with ADM's keys, and what made it."""
    arrays = {f"{name}{STATISTICS[space]}": array for space, pair in pictures.statistics.items()
              for name, array in zip(("mu", "sigma"), pair)}
    recipe = json.dumps({"pictures": pictures.recipe, "features": made_with})
    with write_whole(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays, recipe=recipe)


@contextlib.contextmanager
def naming(*sets):
    """What a distance cannot be made of is an error that names the sets; numpy says nothing."""
    try:
        with np.errstate(all="ignore"):
            yield
    except ValueError as error:
        raise UserError(f"{' and '.join(s.path for s in sets)}: {error}") from error


# ---- Pictures that were drawn: a grid, a folder, an npz ------------------------------------------

GRIDS = (".png", ".jpg", ".jpeg")
MARK = "sphere-latent-encoder"                                # in a picture: it was made here


def save_picture(picture, file, kind="png", **more):
    mark = PngInfo()
    mark.add_text("Software", MARK)
    picture.save(file, kind, pnginfo=mark, comment=MARK, quality=95, **more)


def refuse_files_of_others(paths):
    """UserError: one is there, and was not made here."""
    for path in paths:
        made_here = not path.exists()
        with contextlib.suppress(Exception):                  # it may be anything
            if path.suffix.lower() == ".npz":
                with np.load(path) as file:
                    made_here = '"checkpoint":' in str(file["recipe"])
            else:
                with open_picture(path) as picture:
                    made_here = MARK in str(picture.info)
        if not made_here:
            raise UserError(f"--out: {path} is there, and not known to be made here (older code "
                            "left no mark): remove it, or name another")


def check_room(out, shape, name):
    """Returns the files' names, if `out` is a folder. UserError: no room, another run's files."""
    size, free = math.prod(shape), free_bytes(out.parent)
    if free < size:
        raise UserError(f"{out} needs {size_text(size)}, but {size_text(free)} are free there")
    make_folder(out.parent)
    if out.suffix.lower() in (".npz", *GRIDS) and not (name or "").endswith("/"):
        return refuse_files_of_others([out] if name else [])
    names = [[f"{i:06d}{f'-step{frame + 1}' * (shape[0] > 1)}.png" for i in range(shape[1])]
             for frame in range(shape[0])]
    others = {file.name for file in out.glob("[!.]*") if file.suffix.lower() in ENDINGS}
    if others := others.difference(*names):
        raise UserError(f"{out} holds {len(others)} other pictures, {min(others)} first, which "
                        "would be scored with the new ones: give a new folder")
    refuse_files_of_others(out / file for frame in names for file in frame)
    return names


def write_pictures(out, pictures, shape, labels, classes, columns, recipe, names):
    """pictures: arrays (frames, n, 3, S, S) in order, in all of this shape -> an npz, a grid, or a
    folder of files with these names."""
    frames, num, *_ = shape
    if names:
        start = 0
        for some in pictures:
            for frame, row in zip(names, some):
                for name, picture in zip(frame[start:], row):
                    with write_whole(out / name) as part:
                        save_picture(Image.fromarray(picture.transpose(1, 2, 0)), part)
            start += some.shape[1]
    elif out.suffix.lower() == ".npz":
        with write_whole(out) as part, zipfile.ZipFile(part, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:  # as np.savez has it
                header = {"descr": "|u1", "fortran_order": False,
                          "shape": (num, *shape[3:], 3)}
                np.lib.format.write_array_header_1_0(array, header)
                for some in pictures:
                    array.write(some[0].transpose(0, 2, 3, 1).tobytes())  # (n, H, W, 3)
            for name, value in (("labels", labels.numpy()), ("classes", np.array(classes)),
                                ("recipe", np.array(json.dumps(recipe)))):
                with file.open(f"{name}.npy", "w") as array:
                    np.lib.format.write_array(array, value)
    else:
        columns = num if frames > 1 else min(columns, 10)
        captions = [classes[label] for label in labels] * frames
        images = torch.from_numpy(np.concatenate(list(pictures), axis=1)).flatten(0, 1)
        with write_whole(out) as part:
            save_picture(picture_grid(images, columns, captions), part,
                         "png" if out.suffix.lower() == ".png" else "jpeg")


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
