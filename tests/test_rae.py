import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import rae as rae_script
import sample
from conftest import ROOT, fit_rae
from data import load_dataset
from rae import LatentCache, LatentsOnTheFly, cache_of, load_rae, open_latents, picture_sides
from utils.cli import UserError
from utils.files import locked
from utils.images import to_float


@pytest.fixture
def setting(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "part", 5)                           # 36 pictures: 8 chunks
    dataset = load_dataset(str(photos), 32)
    return dataset, fit_rae("pixels", dataset.load(range(36))), tmp_path / "latents"


def test_cache_is_what_encode_gives(setting):
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    indices, flips = np.array([0, 7, 35, 7]), np.array([0, 1, 1, 0])
    z, y = cache.batch(indices, flips)
    images = to_float(dataset.load(indices))
    images[[1, 2]] = images[[1, 2]].flip(3)
    assert z.dtype == torch.float16 and torch.allclose(z.float(), rae.encode(images), atol=2e-3)
    assert torch.equal(y, dataset.labels[indices])


def everything(cache):
    """All latents of a cache (N, flips, C, h, w), as training reads them."""
    N = np.arange(len(cache))
    return torch.stack([cache.batch(N, np.full_like(N, flip))[0] for flip in range(cache.shape[0])], dim=1)


def test_cache_continues_and_is_shared(setting):
    dataset, rae, root = setting
    whole = LatentCache(dataset, rae, root)
    expected, files = everything(whole), sorted(whole.folder.glob("*.f16"))
    assert len(files) == 8 and not list(whole.folder.glob(".part-*"))
    kept = {file: file.stat().st_mtime_ns for file in files}
    for file in (files[3], files[5]):                         # killed with two of its files to do
        file.unlink()
    assert torch.equal(everything(LatentCache(dataset, rae, root)), expected)
    assert {file for file in files if file.stat().st_mtime_ns != kept[file]} == {files[3], files[5]}
    # A finished cache reads no picture at all.
    dataset.load = None
    assert torch.equal(everything(LatentCache(dataset, rae, root)), expected)


def test_a_second_run_waits_for_the_first(setting, capsys):
    """And finds what that has made."""
    dataset, rae, root = setting
    folder, _ = cache_of(dataset, rae, root)
    with locked(folder):
        thread = threading.Thread(target=LatentCache, args=(dataset, rae, root))
        thread.start()
        deadline = time.time() + 20
        while time.time() < deadline and "waiting for its end" not in capsys.readouterr().err:
            time.sleep(0.02)
        assert thread.is_alive() and not list(folder.glob("*.f16"))
    thread.join()
    dataset.load = None
    assert len(LatentCache(dataset, rae, root).files) == 8


def test_cache_refuses(setting, monkeypatch):
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    other = fit_rae("pixels", dataset.load(range(10)), patch_size=8)
    assert LatentCache(dataset, other, root).folder != cache.folder
    shutil.rmtree(cache.folder)
    rae.latent_mean += 1e6
    with pytest.raises(UserError, match="not finite"):
        LatentCache(dataset, rae, root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="kB free"):
        LatentCache(dataset, other, root.with_name("new"))


def test_a_file_that_became_shorter_is_no_latent(setting):
    """Somebody copies over a cache that a run is reading."""
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    cache.files[7].write_bytes(cache.files[7].read_bytes()[:-2])
    cache.batch(np.array([34]), np.array([1]))
    with pytest.raises(UserError, match="has become shorter: start again"):
        cache.batch(np.array([35]), np.array([1]))


FILL = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import rae
from data import load_dataset
photos, root, rank = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
dataset = load_dataset(photos, 32)
rae.LatentCache.part = 5
load = dataset.load
pixels = rae.RAE(**rae.AUTOENCODERS["pixels"].build(None, 32, 16))
dataset.load = lambda indices: (time.sleep(0.3), load(indices))[1]
rae.LatentCache(dataset, pixels, root, rank, 2)
"""


def test_two_processes_killed_in_the_middle_fill_the_same_cache(setting, photos):
    dataset, rae, root = setting
    expected = everything(LatentCache(dataset, rae, root.with_name("whole")))
    folder, _ = cache_of(dataset, rae, root)

    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(ROOT), str(photos), str(root),
                                   str(rank)])
                 for rank in (0, 1)]
    deadline = time.time() + 60
    while time.time() < deadline and len(list(folder.glob("*.f16"))) < 3:
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 3 <= len(list(folder.glob("*.f16"))) < 8
    assert torch.equal(everything(LatentCache(dataset, rae, root)), expected)


def test_latents_are_cached_where_the_disk_has_room(setting, monkeypatch, capsys):
    dataset, rae, root = setting
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert isinstance(open_latents(dataset, rae, root), LatentsOnTheFly)
    assert "the latents would take" in capsys.readouterr().err
    with pytest.raises(UserError, match="make room, or encode in every step"):
        open_latents(dataset, rae, root, "yes")
    monkeypatch.undo()
    monkeypatch.setattr(LatentCache, "part", 5)
    cache = open_latents(dataset, rae, root, "yes")
    assert isinstance(cache, LatentCache) and "encoded 36 pictures" in capsys.readouterr().out
    on_the_fly = open_latents(dataset, rae, root, "no")
    indices, flips = np.array([0, 7, 35, 7]), np.array([0, 1, 1, 0])
    for a, b in zip(cache.batch(indices, flips), on_the_fly.batch(indices, flips)):
        assert torch.allclose(a, b, atol=2e-3) and a.dtype == b.dtype
    rae.latent_mean += 1e6
    with pytest.raises(UserError, match="not finite"):
        on_the_fly.batch(indices, flips)


def test_reconstruct(trained, tmp_path, capsys, monkeypatch):
    """The picture that is written and the PSNR are those of the run's own autoencoder."""
    decode = rae_script.RAE.decode                            # pixels lose nothing
    monkeypatch.setattr(rae_script.RAE, "decode", lambda self, z: 0.9 * decode(self, z))
    rng = np.random.default_rng(1)
    for name in "ab":
        picture = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
        picture.resize((35, 25)).save(tmp_path / f"{name}.png")
    arguments = ["--ckpt", str(trained / "ckpt.pt"), "--out", str(tmp_path / "out"), "--device",
                 "cpu"]
    rae_script.main(["reconstruct", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *arguments])
    both = np.asarray(Image.open(tmp_path / "out" / "a.reconstructed.png")).astype(float)
    assert both.shape == (32, 64, 3)
    with Image.open(tmp_path / "a.png") as picture:
        expected = picture.crop((5, 0, 30, 25)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(both[:, :32], np.asarray(expected))
    psnr = 10 * np.log10(255 ** 2 / ((both[:, :32] - both[:, 32:]) ** 2).mean())
    out = capsys.readouterr().out
    assert f"a.png: {psnr:.2f} dB" in out and "mean of 2:" in out and psnr > 10
    for status, message, argv in [(2, "the same name", [str(tmp_path / "a.png")] * 2),
                                  (1, "cannot be read", [__file__]),
                                  (1, "no.png cannot be read", ["no.png"]),
                                  (2, "unrecognized", ["no.png", "--size", "3"])]:
        with pytest.raises(SystemExit) as stop:
            rae_script.main(["reconstruct", *argv, *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == status and message in error and error.count("\n") == 1


def test_no_command_writes_over_a_file_of_others(trained, tmp_path, capsys):
    """Over its own it does, again and again."""
    ckpt = ["--ckpt", str(trained / "ckpt.pt"), "--device", "cpu"]
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    commands = {
        "a.reconstructed.png": (rae_script, ["reconstruct", str(tmp_path / "a.jpg"), "--out", str(tmp_path)]),
        "grid.png": (sample, ["--out", str(tmp_path / "grid.png")]),
        "grid.jpg": (sample, ["--out", str(tmp_path / "grid.jpg")]),
        "drawn.npz": (sample, ["--out", str(tmp_path / "drawn.npz")]),
        "drawn/000001.png": (sample, ["--num", "2", "--out", str(tmp_path / "drawn")])}
    for name, (script, argv) in commands.items():
        script.main([*argv, *ckpt])
        script.main([*argv, *ckpt])
        path = tmp_path / name
        if path.suffix == ".npz":
            np.savez(path, arr_0=np.zeros((1, 2, 2, 3), np.uint8))
        else:
            Image.new("RGB", (40, 40)).save(path)
        before = path.read_bytes()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main([*argv, *ckpt])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{name} is there, and not known to be made here" in error, error
        assert error.count("\n") == 1 and path.read_bytes() == before


def test_encode_fills_the_cache_that_training_reads(photos, tmp_path, capsys):
    import train
    from conftest import train_args
    train.main(train_args(tmp_path, "--steps", "1", "--encode-only"))
    assert "encoded 36 pictures" in capsys.readouterr().out and not (tmp_path / "out").exists()
    train.main(train_args(tmp_path, "--steps", "1"))
    assert "encoded" not in capsys.readouterr().out
    assert len(list((tmp_path / "datasets" / "latents").iterdir())) == 1


def test_sizes_that_do_not_fit_the_patch():
    with pytest.raises(UserError, match="--image-size 32 is not a multiple"):
        picture_sides("pixels", 32, 5)


def test_unknown_autoencoder():
    for source in ("nosuch", "pixels", {"name": "nosuch", "state": {"latent_var": [0]}, "image_size": 64}):
        with pytest.raises(ValueError, match="unknown autoencoder .*(nosuch|pixels)"):
            load_rae(source)
