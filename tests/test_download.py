import contextlib
import hashlib
import io
import shutil
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data
from data import load_dataset
from utils import files
from utils.cli import UserError
from utils.files import download, file_hash, unpack

BYTES = np.random.default_rng(0).bytes(100_000)
PINS = {"size": len(BYTES), "sha256": hashlib.sha256(BYTES).hexdigest(),
        "md5": hashlib.md5(BYTES).hexdigest()}


@pytest.fixture
def url(server):
    (server.folder / "file.bin").write_bytes(BYTES)
    return server.url + "/file.bin"


def test_a_download_is_verified_and_not_repeated(url, server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    assert download(url, path, **PINS) == path and path.read_bytes() == BYTES
    assert download(url, path, **PINS) == path and len(server.ranges) == 1
    assert download(f"file://{path}", tmp_path / "copy", **PINS).read_bytes() == BYTES
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["copy", "deep", "web"]


@pytest.mark.parametrize("resumes", [True, False])
def test_a_broken_download_goes_on(url, server, tmp_path, resumes):
    path, server.break_after = tmp_path / "file.bin", 30_000
    with pytest.raises(UserError, match=r"broke off at 30.0 kB of 100.0 kB: the same command resumes it"):
        download(url, path, **PINS)
    assert not path.exists() and (tmp_path / "file.bin.part").stat().st_size == 30_000
    server.break_after, server.resumes = None, resumes
    assert download(url, path, **PINS).read_bytes() == BYTES
    assert server.ranges == [None, "bytes=30000-"]


def test_what_is_left_of_another_file_is_not_gone_on_with(url, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 200_000)
    assert download(url, tmp_path / "file.bin").read_bytes() == BYTES
    (tmp_path / "again.part").write_bytes(b"x" * 500)
    with pytest.raises(UserError, match="sha256"):
        download(url, tmp_path / "again", **PINS)
    assert download(url, tmp_path / "again", **PINS).read_bytes() == BYTES


def test_a_whole_part_is_only_renamed(url, server, tmp_path):
    """The process was killed between the last byte and the new name."""
    (tmp_path / "file.bin.part").write_bytes(BYTES)
    assert download(url, tmp_path / "file.bin", **PINS).read_bytes() == BYTES
    assert server.ranges == []


def test_two_runs_fetch_once(url, server, tmp_path):
    """They would write into one part."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: download(url, tmp_path / "file.bin", **PINS).read_bytes(), range(4)))
    assert found == [BYTES] * 4 and server.ranges == [None]


def test_who_waits_and_is_stopped_leaves_anothers_unpacking(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def waits(folder, wait):
        (folder / ".part-jpg").mkdir()                        # of the one that it waits for
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(files, "locked", waits)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a.zip", tmp_path, "jpg")
    assert (tmp_path / ".part-jpg").exists()


@pytest.mark.parametrize("pins,message", [
    ({"size": 5}, "has 100,000 bytes, expected were 5"),
    ({"sha256": "0" * 64}, f"has the sha256 {PINS['sha256']}, expected was 000"),
    ({"md5": "0" * 32}, "has the md5"),
])
def test_another_file_than_expected_is_refused(url, tmp_path, pins, message):
    with pytest.raises(UserError, match=message):
        download(url, tmp_path / "file.bin", **pins)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["web"]
    (tmp_path / "file.bin").write_bytes(BYTES)                   # by hand: refused, but not removed
    with pytest.raises(UserError, match=message):
        download(url, tmp_path / "file.bin", **pins)
    assert (tmp_path / "file.bin").read_bytes() == BYTES


def test_no_network_no_file_no_room(url, server, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    for bad in ("http://127.0.0.1:9/file.bin", f"file://{tmp_path}/missing"):
        with pytest.raises(UserError,
                           match=f"{bad} cannot be fetched .*put the file at {path} by hand"):
            download(bad, path)
    with pytest.raises(UserError, match="404"):
        download(server.url + "/nothing", path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="has 100.0 kB, but .* has 0.0 kB free"):
        download(url, path)
    assert not path.exists()


def archive(path, members):
    """name -> bytes, or a string: the target of a link."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as opened:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                if isinstance(content, str):
                    member.type, member.linkname = tarfile.SYMTYPE, content
                    opened.addfile(member)
                else:
                    member.size = len(content)
                    opened.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_unpack(tmp_path, kind):
    members = {"jpg/1.jpg": b"one", "jpg/deep/2.jpg": b"two", "other/3": b"three"}
    unpack(archive(tmp_path / f"a.{kind}", members), tmp_path, "jpg")
    assert (tmp_path / "jpg" / "1.jpg").read_bytes() == b"one"
    assert (tmp_path / "jpg" / "deep" / "2.jpg").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == [f"a.{kind}", "jpg"]


@pytest.mark.parametrize("kind,members", [
    ("tgz", {"jpg/1.jpg": b"one", "../evil": b"x"}),
    ("tgz", {"jpg/1.jpg": b"one", "jpg/link": "/etc/passwd"}),
    ("tgz", {"jpg/1.jpg": b"one", "jpg/link": "1.jpg"}),
    ("tgz", {"other/1.jpg": b"one"}),
    ("zip", {"other/1.jpg": b"one"}),
])
def test_archives_that_are_not_trusted(tmp_path, kind, members):
    folder = tmp_path / "inside"
    folder.mkdir()
    with pytest.raises(UserError, match=f"a.{kind} (cannot be unpacked|has no folder jpg)"):
        unpack(archive(folder / f"a.{kind}", members), folder, "jpg")
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == [f"a.{kind}"]
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["inside"]


def test_names_in_a_zip_stay_inside(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    unpack(archive(folder / "a.zip", {"jpg/1.jpg": b"one", "../../evil": b"x", "/abs": b"x"}),
           folder, "jpg")
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == ["a.zip", "jpg"]
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["inside"]


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_truncated_archive(tmp_path, kind):
    path = archive(tmp_path / f"a.{kind}", {"jpg/1.jpg": BYTES, "jpg/2.jpg": BYTES})
    path.write_bytes(path.read_bytes()[:150_000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(path, tmp_path, "jpg")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == [path.name]


def jpeg(value, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(file, "JPEG")
    return file.getvalue()


def flowers_stand_in(folder, n=24):
    """Files of Oxford-Flowers' names and layout, labels of 1 to 4 and three splits; returns
    their pins."""
    folder.mkdir(parents=True, exist_ok=True)
    archive(folder / "102flowers.tgz",
            {f"jpg/image_{i:05d}.jpg": jpeg(10 * i) for i in range(1, n + 1)})
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(n)[None] % 4 + 1})
    ids = np.arange(n, 0, -1)[None]
    rest = [*range(4), *range(16, n)]
    scipy.io.savemat(folder / "setid.mat",
                     {"trnid": ids[:, 8:16], "valid": ids[:, 4:8], "tstid": ids[:, rest]})
    return {p.name: {"md5": file_hash(p, "md5")} for p in folder.iterdir()}


@pytest.fixture
def flowers(server, monkeypatch):
    monkeypatch.setattr(data, "FLOWERS_URL", server.url + "/flowers/")
    monkeypatch.setattr(data, "FLOWERS_FILES", flowers_stand_in(server.folder / "flowers"))
    monkeypatch.setattr(data, "FLOWERS_CLASSES", data.FLOWERS_CLASSES[:4])
    return server


def test_flowers(flowers, tmp_path, monkeypatch):
    """Fetched once; labels from 0; the splits are parts of the whole; half an unpacking is not
    taken for one."""
    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    root = tmp_path / "datasets"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        patch.setattr(tarfile, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("flowers", 16, root=root)
    found = load_dataset("flowers", 16, root=root)
    assert len(flowers.ranges) == 3 and found.name == "flowers"
    assert found.classes[1] == "hard-leaved pocket orchid"
    assert found.labels.tolist() == [i % 4 for i in range(24)]
    colours = found.load(range(24))[:, 0].float().mean((1, 2))
    assert torch.allclose(colours, 10.0 * torch.arange(1, 25), atol=4)
    parts = {split: load_dataset("flowers", 16, root=root, split=split)
             for split in ("train", "val", "test")}
    assert [len(part.labels) for part in parts.values()] == [8, 4, 12]
    assert sorted(file for part in parts.values() for file in part.files) == found.files.tolist()
    for part in parts.values():
        assert part.labels.tolist() == [(int(file[6:11]) - 1) % 4 for file in part.files]
    (root / "flowers" / "jpg" / "image_00007.jpg").unlink()
    with pytest.raises(UserError, match="image_00007.jpg is missing: .* to unpack that again"):
        load_dataset("flowers", 16, root=root)


def test_animal_faces(server, tmp_path, monkeypatch):
    faces = {f"afhq/{split}/{kind}/{i}.jpg": jpeg(100) for split in ("train", "val")
             for kind in ("wild", "cat", "dog")
             for i in range(2)}
    path = archive(server.folder / "afhq.zip", faces)
    monkeypatch.setattr(data, "AFHQ_URL", server.url + "/afhq.zip")
    monkeypatch.setattr(data, "AFHQ_FILE", {"size": path.stat().st_size, "sha256": file_hash(path)})
    found = load_dataset("animal-faces", 16, root=tmp_path / "datasets")
    assert found.classes == ["cat", "dog", "wild"] and found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.name == "animal-faces" and found.recipe["crop"] == "centre_crop"
    assert len(found.load(range(6))) == 6
    path.write_bytes(BYTES)                                        # Dropbox may send something else
    with pytest.raises(UserError, match="afhq.zip.part has .* expected"):
        load_dataset("animal-faces", 16, root=tmp_path / "others")


def test_imagenet_is_a_folder_of_a_thousand(tmp_path):
    with pytest.raises(UserError, match="has 0 of the 1000 class folders .* can't be downloaded"):
        load_dataset("imagenet", 16, root=tmp_path)
    picture = jpeg(100)
    for i in range(1000):
        folder = tmp_path / "imagenet" / f"n{1440764 + 7 * i:08d}"
        folder.mkdir(parents=True)
        (folder / f"{folder.name}_1.JPEG").write_bytes(picture)
    (tmp_path / "imagenet" / "notes.txt").touch()
    found = load_dataset("imagenet", 16, root=tmp_path)
    assert found.classes == sorted(found.classes) and found.classes[0] == "n01440764"
    assert found.labels.tolist() == list(range(1000)) and found.recipe["crop"] == "adm_crop"
    (tmp_path / "imagenet" / "val").mkdir()
    (tmp_path / "imagenet" / "val" / "1.JPEG").write_bytes(picture)
    with pytest.raises(UserError, match="has 1001 folders with pictures, not 1000: take out val$"):
        load_dataset("imagenet", 16, root=tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / "val")
    (tmp_path / "imagenet" / "n01440764" / "n01440764_1.JPEG").unlink()
    with pytest.raises(UserError, match="n01440764 has no pictures"):
        load_dataset("imagenet", 16, root=tmp_path)
