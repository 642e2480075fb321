"""Inputs of the field that once gave a wrong result without a word: right, or refused in a line."""
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
import train
import utils.images
from conftest import ROOT, fit_rae, train_args
from data import describe, load_dataset
from rae import LatentCache
from utils.checkpoint import refuse_another_start, start_weights
from utils.cli import UserError, class_numbers, same_names
from utils.files import file_hash, locked
from utils.images import open_folder, picture_files, read_picture


def fails(main, argv, capsys, status=1):
    """-> the one line with which it ends."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert stop.value.code == status and len(lines) == 1, lines
    return lines[0]


def save(folder, colours, ending="bmp", size=(40, 34)):
    """folder/CLASS/N.ending for each {class: colours}: plain pictures."""
    for name, values in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            Image.new("RGB", size, (value, 90, 30)).save(folder / name / f"{i}.{ending}")
    return folder


def reds(dataset):
    return dataset.load(range(len(dataset.labels)))[:, 0].float().mean((1, 2)).round().tolist()


# ---- Other pictures under the same names ---------------------------------------------------------

def test_contents_decide_and_names_of_folders_do_not(tmp_path):
    a = save(tmp_path / "a" / "scans", {"rose": [10, 20], "tulip": [30, 40]})
    b = save(tmp_path / "b" / "scans", {"rose": [50, 60], "tulip": [70, 80]})
    root = tmp_path / "datasets"
    first, second = (load_dataset(str(folder), 16, root=root) for folder in (a, b))
    assert first.name == second.name and first.recipe != second.recipe     # equal names and sizes
    rae = fit_rae("pixels", first.load(range(4)), patch_size=8)
    caches = [LatentCache(dataset, rae, root / "latents") for dataset in (first, second)]
    assert not torch.equal(*(cache.batch(range(4), [0] * 4)[0] for cache in caches))
    # Nor does that of a data set of ours.
    for name in ("flowers", "toy"):
        moved = load_dataset(str((a := a.rename(tmp_path / name))), 16, root=root)
        assert moved.recipe == first.recipe and first.recipe["dataset"] == "folder"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="sees 0 of 1 files of"):
        patch.setattr("rae.from_first", lambda value: True)   # the first process has them, on another disk
        LatentCache(moved, rae, tmp_path / "elsewhere")
    moved.load = None                                         # its latents are there already
    assert LatentCache(moved, rae, root / "latents").folder == caches[0].folder


def test_pictures_that_changed_places_are_seen(tmp_path):
    """Swapped by renaming, with sizes and times kept: labels mended by hand."""
    photos = save(tmp_path / "photos", {"rose": [10, 20], "tulip": [30, 40]})
    for file in photos.rglob("*.bmp"):
        os.utime(file, (1e9, 1e9))
    before = load_dataset(str(photos), 16, root=tmp_path)
    os.rename(photos / "rose" / "0.bmp", tmp_path / "aside")
    os.rename(photos / "tulip" / "1.bmp", photos / "rose" / "0.bmp")
    os.rename(tmp_path / "aside", photos / "tulip" / "1.bmp")
    after = load_dataset(str(photos), 16, root=tmp_path)
    assert after.recipe != before.recipe and reds(after) == [40, 20, 30, 10]


def test_only_what_changed_is_read_again(tmp_path, monkeypatch, capsys):
    photos, read = save(tmp_path / "photos", {"rose": [10, 20], "tulip": [30, 40]}), []
    images = utils.images
    monkeypatch.setattr(images, "file_hash", lambda path: (read.append(path.name), file_hash(path))[1])
    monkeypatch.setattr(images.time, "time_ns", lambda clock=images.time.time_ns: clock() + 3 * 10 ** 9)
    first = load_dataset(str(photos), 16, root=tmp_path)
    assert sorted(read) == ["0.bmp", "0.bmp", "1.bmp", "1.bmp"]
    read.clear()
    assert (load_dataset(str(photos), 16, root=tmp_path).sums == first.sums).all() and read == []
    save(photos, {"tulip": [90]})                             # the same size, one file
    assert load_dataset(str(photos), 16, root=tmp_path).sums[2] != first.sums[2]
    assert read == ["0.bmp"]
    index = next((tmp_path / "contents").iterdir())
    index.write_bytes(index.read_bytes().replace(first.sums[0], first.sums[1], 1))
    for text in (None, b"", b"no zip"):                       # changed by a byte; cut; another file
        read.clear()
        if text is not None:
            index.write_bytes(text)
        load_dataset(str(photos), 16, root=tmp_path)
        assert len(read) == 4 and "is damaged: the pictures are read again" in capsys.readouterr().err
    with np.load(index) as file:
        others = {**file, "stamps": file["stamps"][:, :3]}
    np.savez(index, **others)
    os.utime(photos / "rose" / "0.bmp", (10_413_792_000, 10_413_792_000))            # 2300
    assert (load_dataset(str(photos), 16, root=tmp_path).sums[:2] == first.sums[:2]).all()
    assert "is damaged" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "contents")
    (tmp_path / "contents").write_text("in the way")
    load_dataset(str(photos), 16, root=tmp_path)
    assert "each start will read all pictures" in capsys.readouterr().err


def test_a_refused_resume_says_what_changed(photos, tmp_path, capsys):
    train.main(train_args(tmp_path, "--steps", "1"))
    shutil.copy(photos / "left" / "3.png", photos / "left" / "0.png")
    (photos / "top" / "2.png").unlink()
    (photos / "top" / "11.png").unlink()
    shutil.copy(photos / "left" / "4.png", photos / "right" / "new.png")
    line = fails(train.main, train_args(tmp_path, "--steps", "2"), capsys)
    for words in ("1 added, right/new.png first", "2 removed, top/11.png first",
                  "1 changed, left/0.png first"):
        assert words in line


def test_skip_bad_follows_the_files(photos, tmp_path, capsys):
    def load():
        dataset = load_dataset(str(photos), 32, 8, tmp_path / "datasets", skip_bad=True)
        return len(dataset.labels), capsys.readouterr().err

    assert load() == (36, "")
    whole = (photos / "left" / "3.png").read_bytes()
    (photos / "left" / "3.png").write_bytes(b"x" * len(whole))
    n, said = load()
    assert n == 35 and "1 of 36 pictures of photos are left out" in said and "left/3.png" in said
    path = next((tmp_path / "datasets" / "contents").glob("*.txt"))
    assert f"all in {path}" in said and "left/3.png" in path.read_text()
    (photos / "left" / "3.png").write_bytes(whole)
    os.symlink("nowhere.png", photos / "top" / "zz.png")
    n, said = load()
    assert n == 36 and "zz.png is a link that leads nowhere" in said
    dataset = load_dataset(str(photos), 32, 8, tmp_path / "datasets", skip_bad=True)
    (photos / "left" / "3.png").write_bytes(b"damaged since")
    with pytest.raises(UserError) as error:
        dataset.load(range(36))
    assert "left/3.png" in str(error.value) and "--skip-bad" not in str(error.value)


# ---- Which folder is a data set ------------------------------------------------------------------

def test_labels_of_dataset_json(tmp_path):
    photos = save(tmp_path / "edm", {"00000": [10, 20, 30], "00001": [40, 50]})
    labels = {"00000/0.bmp": 7, "00000/1.bmp": 2, "00000/2.bmp": 7, "00001/0.bmp": 2, "00001/1.bmp": 9}
    (photos / "dataset.json").write_text(json.dumps({"labels": list(labels.items())}))
    found = load_dataset(str(photos), 16, root=tmp_path)
    assert found.classes == ["2", "7", "9"] and found.labels.tolist() == [1, 0, 1, 0, 2]
    assert "3 classes: 2 2, 7 2, 9 1" in describe(found)
    for wrong in ({"labels": None}, {"labels": [["00000/0.bmp", [1, 0]]]}, [1], {"labels": [[1, 2, 3]]}):
        (photos / "dataset.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="dataset.json does not hold"):
            load_dataset(str(photos), 16, root=tmp_path)
    (photos / "dataset.json").write_text(json.dumps({"labels": list(labels.items())[1:]}))
    with pytest.raises(UserError, match="labels of 4 pictures, 5 are there; .* 00000/0.bmp first"):
        load_dataset(str(photos), 16, root=tmp_path)
    (photos / "dataset.json").unlink()
    for folder in ("00000", "00001"):
        for file in (photos / folder).iterdir():
            file.rename(photos / folder / f"img{int(file.stem):08d}.bmp")
    with pytest.raises(UserError, match="shards and no classes"):
        load_dataset(str(photos), 16, root=tmp_path)


@pytest.mark.parametrize("folders", [
    ("train/rose", "train/tulip", "val/rose", "test/rose"), ("train/rose", "train/tulip"),
    ("trainA", "trainB", "testA"), ("Training/a", "Validation/a"), ("train2017", "val2017"),
    ("train_images", "test images"), ("training_set", "test_set"), ("images", "masks"), ("rgb", "depth"),
    ("JPEGImages", "SegmentationMasks", "Annotations"), ("img", "label", "x"), ("images", "ground_truth")])
def test_parts_of_a_data_set_are_no_classes(folders, tmp_path):
    save(tmp_path / "set", {name: [10, 20] for name in folders})
    with pytest.raises(UserError, match="which are parts of a data set .*: give one of them, as"):
        load_dataset(str(tmp_path / "set"), 16, root=tmp_path)


@pytest.mark.parametrize("folders", [("train", "bus"), ("images",), ("test",), ("mask", "nomask"),
                                     ("valley", "mountain"), ("0", "1", "2"), ("12345", "rose"),
                                     ("trainer", "tester", "devil"), ("depth", "peak")])
def test_what_may_be_classes_is_taken(folders, tmp_path):
    save(tmp_path / "set", {name: [10, 20] for name in folders})
    assert load_dataset(str(tmp_path / "set"), 16, root=tmp_path).classes == sorted(folders)


def test_system_folders_are_left_out_and_the_rest_is_counted(tmp_path, capsys):
    photos = save(tmp_path / "photos", {name: [10, 20] for name in (
        "rose", "tulip", "@eaDir", "lost+found", "__MACOSX", "rose/.thumbs", "rose/@eaDir")})
    for name in ("rose/a.HEIC", "rose/b.heic", "tulip/c.eps", "tulip/README", "overview.bmp"):
        (photos / name).write_bytes(b"x")
    os.mkfifo(photos / "rose" / "pipe.png")
    found = load_dataset(str(photos), 16, root=tmp_path)
    assert found.classes == ["rose", "tulip"] and len(found.labels) == 4
    text = describe(found)
    for words in ("2 .heic", "1 .eps", "1 without ending", "1 pictures in no class folder",
                  "1 that are no files"):
        assert words in text
    (photos / "lily").mkdir()
    (photos / "lily" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"lily has no pictures .*\(1 .heic\): convert them") as error:
        load_dataset(str(photos), 16, root=tmp_path)
    assert "remove" not in str(error.value)


def test_many_classes_are_described_by_their_ends(tmp_path):
    save(tmp_path / "set", {f"c{i:02}": range(1 + i % 7) for i in range(1, 13)})
    text = describe(load_dataset(str(tmp_path / "set"), 16, root=tmp_path))
    assert text == ("12 classes: c01 2, c02 3, c03 4, c04 5, c05 6, c06 7, c07 1, c08 2, c09 3, c10 4, "
                    "...; smallest c07 1, largest c06 7; 41 pictures are copies of others, 6 stand in several classes")


def test_a_data_set_that_holds_itself_is_refused(tmp_path):
    cells = save(tmp_path / "cells", {"a": [1, 2], "b": [3]})
    shutil.copytree(cells, tmp_path / "copy")
    (tmp_path / "copy").rename(cells / "cells")
    with pytest.raises(UserError, match="cells/cells is the folder of a class and holds a folder a, "):
        load_dataset(str(cells), 16, root=tmp_path)
    (cells / "cells").rename(tmp_path / "elsewhere")
    (cells / "a" / "a").mkdir()                               # its own name
    shutil.move(cells / "a" / "0.bmp", cells / "a" / "a" / "0.bmp")
    assert load_dataset(str(cells), 16, root=tmp_path).labels.tolist() == [0, 0, 1]
    days = save(tmp_path / "days", {"01/02": [1], "01/03": [2], "02/01": [3]})
    assert load_dataset(str(days), 16, root=tmp_path).classes == ["01", "02"]
    save(days, {"01/02/01": [3]})                             # 02/01/0.bmp again
    shutil.move(days / "01" / "02", days / "01" / "x")
    shutil.copytree(days / "02", days / "01" / "02")
    with pytest.raises(UserError, match="days/01 is the folder of a class and holds a folder 02"):
        load_dataset(str(days), 16, root=tmp_path)


def test_other_rules_of_reading_check_again(tmp_path, monkeypatch):
    """An index that remembers a picture as good, which is refused by now."""
    photos = save(tmp_path / "set", {"a": [1, 2]})
    monkeypatch.setattr(utils.images.time, "time_ns", lambda clock=utils.images.time.time_ns: clock() + 3 * 10 ** 9)
    monkeypatch.setattr(utils.images.PIL, "__version__", "older")
    load = lambda: load_dataset(str(photos), 16, root=tmp_path, skip_bad=True)
    pages = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    pages[0].save(photos / "a" / "film.gif", save_all=True, append_images=pages[1:])
    with monkeypatch.context() as lenient:
        lenient.setattr(utils.images, "upright_rgb", lambda picture: picture.convert("RGB"))
        assert len(load().labels) == 3
    monkeypatch.setattr(utils.images.PIL, "__version__", "newer")
    assert len(load().labels) == 2


def test_what_is_there_twice_and_what_is_enlarged_is_counted(tmp_path):
    photos = save(tmp_path / "set", {"a": [1, 2, 3], "b": [4, 5]}, size=(28, 30))
    shutil.copy(photos / "a" / "0.bmp", photos / "a" / "again.bmp")
    shutil.copy(photos / "a" / "1.bmp", photos / "b" / "other.bmp")
    Image.new("RGB", (99, 90)).save(photos / "b" / "large.bmp")
    assert describe(load_dataset(str(photos), 64, root=tmp_path)) == (
        "2 classes: a 4, b 4; 2 pictures are copies of others, 1 stand in several classes; 7 are enlarged, from "
        "sides of 28 to 28 to 64 pixels")
    assert "enlarged" not in describe(load_dataset(str(photos), 28, root=tmp_path))


def test_pages_placeholders_and_giants(photos, tmp_path):
    pages = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "white")]
    for ending in ("tif", "gif", "webp", "png"):
        pages[0].save(photos / "left" / f"0.{ending}", save_all=True, append_images=pages[1:])
        with pytest.raises(UserError, match=f"0.{ending} cannot be .*it has 3 pages: save those"):
            read_picture(photos / "left" / f"0.{ending}")
        (photos / "left" / f"0.{ending}").unlink()
    pages[0].save(photos / "left" / "0.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert read_picture(photos / "left" / "0.jpg").getpixel((9, 9))[0] > 250      # a phone's
    (photos / "left" / ".1.jpg.icloud").touch()
    (photos / ".x.icloud").mkdir()
    (photos / ".x.icloud" / "a.jpg").touch()
    assert describe(load_dataset(str(photos), 16, root=tmp_path)).endswith("; left out: 1 .icloud")
    header = b"P6 20000 18000 255\n"                           # 360 megapixels, and none of them
    (photos / "left" / "1.ppm").write_bytes(header)
    with pytest.raises(UserError, match="1.ppm cannot be read as a picture .*: shrink it"):
        read_picture(photos / "left" / "1.ppm")


RUN = {"method": "distill", **dict.fromkeys(("model", "rae", "rae_patch", "image_size", "spherify", "ema_decay"))}


def test_letters_of_a_mac(tmp_path):
    composed, decomposed = "G\u00e4nsebl\u00fcmchen", "Ga\u0308nseblu\u0308mchen"
    save(tmp_path / "mac", {decomposed: [1], "Rose": [2]})
    save(tmp_path / "held", {composed: [1], "Rose": [2]})
    mac, held = (load_dataset(str(tmp_path / name), 16, root=tmp_path) for name in ("mac", "held"))
    assert mac.classes == [decomposed, "Rose"] and same_names(mac.classes, held.classes)
    assert not same_names(mac.classes, ["Rose", composed])
    teacher = {"args": {**RUN, "method": "sphere"}, "classes": mac.classes}
    refuse_another_start("x", teacher, RUN, held.classes)
    with pytest.raises(UserError, match="other classes"):
        refuse_another_start("x", teacher, RUN, ["Rose", composed])
    table = torch.arange(6.0).view(3, 2)                      # and that of no class
    weights = {"y_embedder.weight": table, "other": table}
    found = start_weights({**teacher, "model": weights, "ema": {"0.9": weights}}, {"method": "sphere"},
                          ["lily", composed, "Rose", "iris"])
    by_hand = torch.tensor([[1.0, 2], [0, 1], [2, 3], [1, 2], [4, 5]])
    for state in (found["model"], found["ema"]["0.9"]):
        assert torch.equal(state["y_embedder.weight"], by_hand) and state["other"] is table


def test_links_are_followed_once_and_what_is_there_goes_first(tmp_path):
    photos = save(tmp_path / "photos", {"rose": [10], "tulip": [20, 30]})
    elsewhere = save(tmp_path / "elsewhere", {"lily": [40, 50, 60]})
    os.symlink("..", photos / "rose" / "up")                  # would make all of them roses
    os.symlink("../tulip", photos / "rose" / "friends")
    os.symlink(elsewhere / "lily", photos / "lily")
    os.symlink("0.bmp", photos / "tulip" / "again.bmp")
    found = load_dataset(str(photos), 16, root=tmp_path)
    assert found.classes == ["lily", "rose", "tulip"]
    assert reds(found) == [40, 50, 60, 10, 20, 30] and found.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.left_out == {"links to what is there already": 3}
    assert len(picture_files(photos)[0]) == 6
    os.symlink("not-mounted", photos / "peony")
    with pytest.raises(UserError, match="peony is a link that leads nowhere"):
        picture_files(photos)
    os.remove(photos / "peony")
    os.symlink("peony", photos / "peony")
    with pytest.raises(UserError, match="peony is a link that leads nowhere .*symbolic links"):
        load_dataset(str(photos), 16, root=tmp_path)


# ---- One picture ---------------------------------------------------------------------------------

def png(depth, colours, row, clear):
    """A PNG of one row of two pixels, with a clear colour."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    header = struct.pack(">IIBBBBB", 2, 1, depth, colours, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", clear)
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth,row,clear,expected", [
    (1, b"\x40", 1, [0, 255]), (1, b"\x40", 0, [255, 255]), (8, b"\x64\x03", 3, [100, 255])])
def test_a_clear_grey_is_white(depth, row, clear, expected, tmp_path):
    (tmp_path / "a.png").write_bytes(png(depth, 0, row, struct.pack(">H", clear)))
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("depth,colours,row,clear", [
    (2, 0, b"\x90", struct.pack(">H", 1)), (4, 0, b"\x73", struct.pack(">H", 3)),
    (16, 0, struct.pack(">HH", 40000, 1000), struct.pack(">H", 1000)),
    (16, 2, struct.pack(">6H", 40000, 1000, 5000, 300, 600, 900), struct.pack(">3H", 300, 600, 900))])
def test_a_clear_colour_that_is_not_of_8_bits_is_refused(depth, colours, row, clear, tmp_path):
    (tmp_path / "a.png").write_bytes(png(depth, colours, row, clear))
    with pytest.raises(UserError, match="a.png .*its values are not of 8 bits: save it in 8 bits as it should look"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("pixels", [np.float32([[0, 1]]), np.int32([[0, 200]]), np.uint16([[7, 4095]]),
                                    np.uint16([[0, 65535]])])
def test_grey_of_more_than_8_bits_is_refused(pixels, ending, tmp_path):
    """Nobody can say which value is white."""
    if ending == "png" and pixels.dtype != np.uint16:
        pytest.skip("a PNG holds no such values")
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
    with pytest.raises(UserError, match=f"a.{ending} .*its values are not of 8 bits: save it in 8 bits"):
        read_picture(tmp_path / f"a.{ending}")


def test_a_text_where_exif_has_a_number_stops_no_turning(tmp_path):
    entries = [(0x112, 3, 1, struct.pack("<H", 6)), (0x11A, 2, 3, b"72\0")]
    fields = b"".join(struct.pack("<HHI", tag, kind, n) + value.ljust(4, b"\0")
                      for tag, kind, n, value in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + fields + b"\0\0\0\0"
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10] = 200                                         # bright above, once turned: right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = np.asarray(read_picture(tmp_path / "a.jpg"))
    assert turned.shape == (30, 20, 3)
    assert (turned[:, 12:] > 180).all() and (turned[:, :8] < 20).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_every_orientation_is_pils(orientation, ending, tmp_path):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(np.asarray(read_picture(tmp_path / f"a.{ending}")), expected)


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, struct.error, KeyError, MemoryError])
def test_whatever_a_reader_raises_names_the_picture(kind, photos, monkeypatch):
    def bad(*args, **kwargs):
        raise kind("of PIL")
    monkeypatch.setattr(Image, "open", bad)
    with pytest.raises(UserError, match="left/0.png cannot be read as a picture"):
        load_dataset(str(photos), 32, root=photos.parent).load([0])


def test_only_pictures_formats_are_opened(tmp_path):
    """PIL would start Ghostscript for this, whatever its name."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UserError, match="a.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(UserError, match="b.png cannot be read .*no such file"):
        read_picture(tmp_path / "b.png")


def test_no_flips(photos, tmp_path, capsys):
    """Latents of no mirror image are made or seen; the same run with them is another one."""
    train.main(train_args(tmp_path, "--steps", "2", "--no-flips"))
    assert "without mirror images" in capsys.readouterr().out
    file, = (tmp_path / "datasets" / "latents").glob("*/*.f16")
    assert file.stat().st_size == 36 * 768 * 2 * 2 * 2        # of 36 pictures, float16
    assert "flips False -> True" in fails(train.main, train_args(tmp_path, "--steps", "3"), capsys)
    train.main(train_args(tmp_path, "--steps", "2", "--out-dir", str(tmp_path / "out" / "other")))
    assert "with mirror images" in capsys.readouterr().out
    logs = [json.loads((tmp_path / "out" / run / "log.jsonl").read_text().splitlines()[-1])
            for run in ("run", "other")]
    assert logs[0]["loss"] != logs[1]["loss"]


# ---- Names ---------------------------------------------------------------------------------------

def test_names_of_any_bytes(tmp_path, capsys):
    """Not UTF-8, a line break, terminal codes, 200 letters: trained, sampled, never shown raw."""
    photos = os.fsencode(tmp_path / ("p" * 200)) + b"\n\xff\x1b[2J"
    for name in (b"caf\xe9", b"line\nbreak", b"\x1b[31mred", b"r" * 240):
        os.makedirs(os.path.join(photos, name))
        for i in range(3):
            with open(os.path.join(photos, name, b"\xff%d.png" % i), "wb") as file:
                Image.new("RGB", (40, 34), (60 * i, 90, 30)).save(file, "png")
    train.main([*train_args(tmp_path, "--steps", "1", "--report", "2"), "--dataset",
                os.fsdecode(photos)])
    said = capsys.readouterr().out
    assert "4 classes" in said and "caf\\udce9 3" in said
    assert "\x1b" not in said and "line\nbreak" not in said
    run = tmp_path / "out" / "run"
    sample.main(["--ckpt", str(run / "ckpt.pt"), "--steps", "1", "--device", "cpu"])
    sample.main(["--ckpt", str(run / "ckpt.pt"), "--steps", "1", "--device", "cpu", "--npz"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "line\\nbreak" in said
    with np.load(run / "samples.npz") as found:
        assert os.fsencode(str(found["classes"][1])) == b"caf\xe9"


# ---- Runs and files ------------------------------------------------------------------------------

def test_two_samplers_with_one_name_do_not_mix(trained, tmp_path, monkeypatch):
    """The second starts and ends while the first is drawing."""
    draw, seen = sample.draw_batches, []

    def slow(*args, **kwargs):
        if not seen:
            seen.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 10 ** 7 + 1)             # another process
                sample.main([*argv, "--cfg", "9"])
        yield from draw(*args, **kwargs)
    argv = ["--ckpt", str(trained / "ckpt.pt"), "--device", "cpu", "--num", "6", "--out",
            str(tmp_path / "s.npz")]
    sample.main([*argv, "--cfg", "1"])
    alone = np.load(tmp_path / "s.npz")["arr_0"]
    monkeypatch.setattr(sample, "draw_batches", slow)
    sample.main([*argv, "--cfg", "1"])
    with np.load(tmp_path / "s.npz") as found:
        assert np.array_equal(found["arr_0"], alone) and seen
        assert json.loads(str(found["recipe"]))["cfg_scale"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_one_run_at_a_time_in_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "out" / "run"
    with locked(out):
        line = fails(train.main, train_args(tmp_path, "--steps", "1", "--seed", "1"), capsys)
    assert "another run is writing there" in line and not (out / "ckpt.pt").exists()
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from utils.files import locked; from pathlib import Path\n"
            "with locked(Path(sys.argv[2])): print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(out)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    assert "another run" in fails(train.main, train_args(tmp_path, "--steps", "1"), capsys)
    other.kill()
    other.wait()
    train.main(train_args(tmp_path, "--steps", "1"))          # a dead process holds nothing


def test_a_folder_of_other_pictures_is_not_added_to(trained, tmp_path, capsys):
    argv = ["--ckpt", trained / "ckpt.pt", "--device", "cpu", "--steps", "1", "--out", tmp_path / "pictures"]
    sample.main([str(a) for a in argv] + ["--num", "5"])
    assert "2 other pictures, 000003.png first" in fails(sample.main, [*argv, "--num", "3"], capsys)
    sample.main([str(a) for a in argv] + ["--num", "6"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6
    with locked(tmp_path / "pictures"):
        assert "another run is writing" in fails(sample.main, [*argv, "--num", "6"], capsys)


def test_numbers_of_classes():
    assert class_numbers(["2", "rose"], ["daisy", "rose", "tulip"]) == [2, 1]
    assert class_numbers(["3", "1"], ["1", "2", "3"]) == [2, 0]      # names win
    for wanted, classes in (("1", ["001", "002", "003"]), ("001", ["1", "2"]), ("02", ["2", "3", "4"])):
        with pytest.raises(UserError, match=f"--classes {wanted}: is it the name"):
            class_numbers([wanted], classes)
    with pytest.raises(UserError, match="--classes 0: there is no such class; there are 12: 1, 2"):
        class_numbers(["0"], [str(i) for i in range(1, 13)])  # a number is a name there
    decomposed = "Ga\u0308nseblu\u0308mchen"                   # as a Mac writes it
    assert class_numbers(["G\u00e4nsebl\u00fcmchen", decomposed], ["Rose", decomposed]) == [1, 1]
    for wanted in ("3", "9" * 5000, "-1", "\x1b[2J"):
        with pytest.raises(UserError, match="there is no such class; there are 3"):
            class_numbers([wanted], ["daisy", "rose", "tulip"])


def test_the_classes_that_were_drawn_are_kept(trained, tmp_path, capsys):
    argv = ["--ckpt", str(trained / "ckpt.pt"), "--device", "cpu", "--steps", "1", "--num", "4"]
    sample.main([*argv, "--classes", "top", "0", "--out", str(tmp_path / "s.npz")])
    assert "2 classes in turn: top, left" in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as found:
        assert found["classes"][found["labels"]].tolist() == ["top", "left", "top", "left"]
        assert json.loads(str(found["recipe"]))["classes"] == ["top", "left"]


def test_endings_of_a_grid(trained, tmp_path, capsys):
    argv = ["--ckpt", str(trained / "ckpt.pt"), "--device", "cpu", "--steps", "1", "--num", "3", "--out"]
    for name, kind in (("a.jpg", "JPEG"), ("b.JPEG", "JPEG"), ("c.PNG", "PNG")):
        sample.main([*argv, str(tmp_path / name)])
        assert Image.open(tmp_path / name).format == kind
    sample.main([*argv, str(tmp_path / "d.NPZ")])
    assert np.load(tmp_path / "d.NPZ")["arr_0"].shape == (3, 32, 32, 3)
    sample.main([*argv, str(tmp_path / "v1.5") + "/"])
    assert len(list((tmp_path / "v1.5").glob("*.png"))) == 3
    for name in ("e.webp", "ckpt.pt", "grid.pngg"):
        assert "a file ends in" in fails(sample.main, [*argv, tmp_path / name], capsys, 2)


def test_statistics_that_do_not_say_how_they_were_made(tmp_path, monkeypatch, capsys):
    """mu and sigma alone, as some ship ADM's: a warning; rounding of float32 is mended, and said."""
    x = np.random.default_rng(0).normal(size=(3000, 2048))
    mu, sigma = x.mean(0), np.cov(x.T)
    rough = sigma.astype(np.float32)
    rough[0, 1] += 3e-7
    np.savez(tmp_path / "plain.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "rough.npz", mu=mu.astype(np.float32), sigma=rough)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "b.png")
    monkeypatch.setattr(fid, "load_extractors", lambda *args: (
        [fid.Small({"pool": lambda images: torch.rand(len(images), 2048)})], {"pipeline": args[2], "weights_sha256": "x"}))
    pair = [str(tmp_path), str(tmp_path / "plain.npz"), "--device", "cpu", "--json", "--metrics", "fid"]
    fid.main(pair)
    assert "the pipeline pytorch is supposed; if they are ADM's: --pipeline tensorflow" in capsys.readouterr().err
    fid.main([*pair, "--pipeline", "tensorflow"])
    assert "supposed" not in capsys.readouterr().err
    fid.main([str(tmp_path / "rough.npz"), str(tmp_path / "plain.npz"), "--device", "cpu", "--json"])
    found = capsys.readouterr()
    assert "rough.npz: sigma is symmetric to" in found.err
    assert list(json.loads(found.out)["numbers"].values()) == [pytest.approx(0, abs=1e-5)]
    sigma[0, 1] += 1
    np.savez(tmp_path / "wrong.npz", mu=mu, sigma=sigma)
    line = fails(fid.main, [tmp_path / "wrong.npz", tmp_path / "plain.npz", "--device", "cpu"], capsys)
    assert "wrong.npz cannot be read as an npz (sigma is not symmetric)" in line


def test_a_folder_is_scored_as_training_reads_it(tmp_path, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x112] = 6
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (30, 40, 4), np.uint8)
        (tmp_path / "A").mkdir(exist_ok=True)
        (tmp_path / "B").mkdir(exist_ok=True)
        kind = Image.fromarray(pixels) if i < 2 else Image.fromarray(pixels[..., :3])
        kind.save(tmp_path / "A" / f"{i}.png", **({"exif": exif} if i == 2 else {}))
        read_picture(tmp_path / "A" / f"{i}.png").save(tmp_path / "B" / f"{i}.png")
    A, B = (open_folder(tmp_path / name) for name in "AB")
    for a, b in zip(A.load(range(4)), B.load(range(4))):
        assert torch.equal(a, b)
    assert A.unlike == {0, 1, 2} and B.unlike == set()
    plain = open_folder(tmp_path / "A", as_pytorch_fid=True).load(range(4))
    for i in range(4):
        expected = np.asarray(Image.open(tmp_path / "A" / f"{i}.png").convert("RGB"))
        assert np.array_equal(plain[i].permute(1, 2, 0).numpy(), expected)
    monkeypatch.setattr(fid, "load_extractors", lambda *args: (
        [fid.Small({"pool": lambda images: images.double().mean((2, 3)).repeat(1, 683)[:, :2048]})],
        {"pipeline": args[2], "weights_sha256": "x"}))
    for more, words in (([], "they were read as in training"), (["--as-pytorch-fid"], "read as pytorch-fid does")):
        fid.main([str(tmp_path / "A"), str(tmp_path / "B"), "--metrics", "fid", "--device", "cpu",
                  "--json", *more])
        found = capsys.readouterr()
        assert "would read 3 of 4 pictures otherwise" in found.err and words in found.err
        distance = list(json.loads(found.out)["numbers"].values())[0]
        assert (distance < 1e-6) == (not more)


@pytest.fixture
def means(monkeypatch):
    """Features that need no weights: of colours."""
    network = lambda images: torch.cat([images.double().mean((2, 3)), images.double().std((2, 3))], 1)
    monkeypatch.setitem(fid.NETWORKS, "means", lambda *args: {"means": network})


def scored(A, B, capsys, *more):
    """-> numbers, what was said, recipe; stdout is one JSON object."""
    fid.main([str(A), str(B), "--features", "means", "--device", "cpu", "--json", *more])
    found = capsys.readouterr()
    result = json.loads(found.out)
    return list(result["numbers"].values()), found.err, result["recipe"]


def noise(folder, n, size=(24, 24), seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8) // (1 + i % 3)).save(folder / f"{i:03}.png")
    return folder


def test_sizes_few_pictures_and_shares_are_said(means, tmp_path, capsys):
    square, other = noise(tmp_path / "square", 70), noise(tmp_path / "other", 70, (24, 30), 1)
    numbers, said, recipe = scored(square, square, capsys)
    assert numbers == [pytest.approx(0, abs=1e-6)] and said == ""
    assert recipe["A"]["sizes"] == "70 of 24 x 24" and recipe["A"]["read"] == "as in training, but whole"
    _, said, recipe = scored(square, other, capsys)
    assert "square has pictures of other sizes than" in said
    assert "not square (70 of 24 x 24; 70 of 30 x 24): the distance" in said
    assert recipe["B"]["sizes"] == "70 of 30 x 24"
    assert "not square (70 of 30 x 24; 70 of 30 x 24)" in scored(other, other, capsys)[1]
    few = noise(tmp_path / "few", 9)
    _, said, _ = scored(square, few, capsys)
    assert "few: 9 pictures for 64 features: the covariance is singular" in said and "square: 70" not in said

    data = save(tmp_path / "data", {"common": range(95), "rare": range(5)}, size=(24, 24))
    arrays = dict(arr_0=np.zeros((100, 24, 24, 3), np.uint8), classes=np.array(["common", "rare"]))
    np.savez(tmp_path / "equal.npz", **arrays, labels=np.arange(100) % 2)
    np.savez(tmp_path / "objects.npz", arr_0=arrays["arr_0"], labels=np.arange(100) % 2,
             classes=np.array(["common", "rare"], dtype=object))
    assert "shares" not in scored(tmp_path / "objects.npz", data, capsys)[1]
    np.savez(tmp_path / "alike.npz", **arrays, labels=(np.arange(100) > 94).astype(int))
    _, said, _ = scored(tmp_path / "equal.npz", data, capsys)
    assert "classes in other shares (" in said and "50% and" in said and "--balance data" in said
    assert "shares" not in scored(tmp_path / "alike.npz", data, capsys)[1]


def test_statistics_of_six_pictures_and_a_score_of_eight(trained, means, tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).normal(size=(3000, 64))
    recipe = json.dumps({"pictures": {"n": 6}, "features": {}})
    np.savez(tmp_path / "six.npz", mu=x.mean(0), sigma=np.cov(x.T), recipe=recipe)
    fid.main([str(tmp_path / "six.npz"), str(tmp_path / "six.npz"), "--device", "cpu"])
    assert "six.npz: 6 pictures for 64 features: the covariance is singular" in capsys.readouterr().err
    np.savez(tmp_path / "huge.npz", mu=np.full(64, np.inf), sigma=np.cov(x.T))
    line = fails(fid.main, [tmp_path / "huge.npz", tmp_path / "six.npz", "--device", "cpu"], capsys)
    assert "huge.npz cannot be read as an npz (mu or sigma is not finite)" in line

    seen, eight = [], noise(tmp_path / "eight", 8)
    monkeypatch.setattr(fid, "load_extractors", lambda spaces, *args: (seen.append(spaces), [
        fid.Small({name: lambda images: torch.rand(len(images), 2048) for name in ("pool", "logits")})],
        {"pipeline": "pytorch", "weights_sha256": "x"})[1:])
    fid.main([str(eight), str(eight), "--device", "cpu"])
    assert seen == [{"pool"}] and "inception score" not in capsys.readouterr().out


def test_what_is_given_in_place_of_pictures(trained, means, tmp_path, capsys):
    """A run, the folder of a checkpoint, an archive."""
    for A in (trained, trained.parent):
        line = fails(fid.main, [A, A, "--features", "means", "--device", "cpu"], capsys)
        assert f"{trained} is a run" in line and f"--ckpt {trained}/ckpt.pt --num 10000 --npz" in line
    line = fails(sample.main, ["--ckpt", trained, "--device", "cpu"], capsys)
    assert line.endswith(f"{trained} is a folder: give {trained / 'ckpt.pt'}")
    save(tmp_path / "set", {"a": range(200)}, size=(2, 2))
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    for main, argv in ((fid.main, [archive, archive, "--features", "means"]), (train.main, ["--dataset", archive])):
        line = fails(main, [*argv, "--device", "cpu"], capsys)
        assert "unpack it" in line and len(line) < 400


def test_shares_of_the_data(tmp_path, capsys):
    """As the numbers of pictures in the classes, however many are drawn; each picture as before."""
    counts = torch.bincount(sample.shares_of([950, 50], torch.arange(1000)))
    assert abs(counts[1] - 50) < 3
    assert torch.bincount(sample.shares_of([1, 2, 3], torch.arange(60))).tolist() == pytest.approx([10, 20, 30], abs=1)
    save(tmp_path / "photos", {"common": range(30), "rare": range(6)})
    train.main(train_args(tmp_path, "--steps", "1"))
    argv = ["--ckpt", str(tmp_path / "out" / "run" / "ckpt.pt"), "--device", "cpu", "--steps", "1"]
    for name, more in (("a", ["--num", "40"]), ("b", ["--num", "20", "--batch-size", "7"])):
        sample.main([*argv, *more, "--balance", "data", "--out", str(tmp_path / f"{name}.npz")])
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert "20 pictures of 2 classes by their shares: common, rare" in capsys.readouterr().out
    assert 5 <= a["labels"].sum() <= 8 and np.array_equal(a["labels"][:20], b["labels"])
    assert abs(a["arr_0"][:20].astype(int) - b["arr_0"]).max() <= 1
    assert json.loads(str(a["recipe"]))["balance"] == "as the data"
    old = torch.load(tmp_path / "out" / "run" / "ckpt.pt")
    del old["counts"]
    torch.save(old, tmp_path / "old.pt")
    argv[1] = str(tmp_path / "old.pt")
    assert "--balance data" in fails(sample.main, [*argv, "--balance", "data"], capsys, 2)
    sample.main([*argv, "--num", "2", "--out", str(tmp_path / "c.npz")])


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path):
    code = ("import sys, resource; sys.path.insert(0, sys.argv[1] + '/tests'); import conftest, sample\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))\n"
            "sample.main(['--ckpt', sys.argv[2], '--num', '5000', '--device', 'cpu', '--steps', '1', '--out', sys.argv[3]])")
    found = subprocess.run([sys.executable, "-c", code, str(ROOT), str(trained / "ckpt.pt"), str(tmp_path / "s.npz")],
                           capture_output=True, text=True)
    lines = [line for line in found.stderr.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line
             and "batch/s" not in line]
    assert found.returncode == 1 and len(lines) == 1 and "s.npz: File too large" in lines[0], found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, {"RANK": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": ""},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "-5"}])
def test_half_of_torchruns_environment(variables, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = fails(train.main, ["--steps", "1"], capsys)
    assert f"unset {' '.join(n for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') if n in variables)}" in line
