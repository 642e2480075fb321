import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import rae as rae_script
from conftest import ROOT
from common import UserError, to_float, to_uint8
from data import load_dataset
from laptop.toy import ToyFlowers
from rae import (LatentCache, LatentsOnTheFly, cache_of, fit_rae, load_rae, open_latents,
                 picture_sides)


@pytest.fixture(scope="module")
def flowers():
    return ToyFlowers(32).load(range(400))


def test_components_are_those_of_numpy(flowers):
    """What k components lose is what the singular values say, and no other k-dimensional linear
    code loses less."""
    rae = fit_rae("toy", flowers, patch_size=8, channels=20)
    code = rae.encoder[1].weight.double().flatten(1)                       # (20, 192)
    assert torch.allclose(code @ code.T, torch.eye(20).double(), atol=1e-5)
    patches = to_float(flowers).double().reshape(400, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3,
                                                                             5).reshape(-1, 192)
    centred = patches - patches.mean(0)
    lost = (centred - centred @ code.T @ code).square().sum()
    singular = np.linalg.svd(centred.numpy(), compute_uv=False)
    assert lost.item() == pytest.approx((singular[20:] ** 2).sum(), rel=1e-6)
    z = rae.encode(to_float(flowers)).flatten(2).transpose(1, 2).reshape(-1, 20)
    assert torch.allclose(z * rae.std.view(20), (centred @ code.T).float(), atol=1e-4)


def mean_error(rae, images, latent_noise=0.0):
    z = rae.encode(to_float(images))
    z = z + latent_noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return (rae.decode(z) - to_float(images)).square().mean().item()


def test_decoder_is_the_best_linear_one(flowers):
    plain = fit_rae("toy", flowers, patch_size=8, channels=20, latent_noise=0.0)
    robust = fit_rae("toy", flowers, patch_size=8, channels=20, latent_noise=0.5)
    z = plain.encode(to_float(flowers)).double()
    rows = torch.nn.functional.unfold(z, 3, padding=1).transpose(1, 2).reshape(-1, 180)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    pixels = torch.nn.functional.pixel_unshuffle(to_float(flowers), 8)
    pixels = pixels.flatten(2).transpose(1, 2).reshape(-1, 192)
    residual = pixels.double() - rows @ torch.linalg.lstsq(rows, pixels.double(),
                                                           driver="gelsd").solution
    assert mean_error(plain, flowers) == pytest.approx(residual.square().mean().item(), rel=1e-4)
    assert mean_error(robust, flowers, 0.5) < 0.8 * mean_error(plain, flowers, 0.5)
    assert mean_error(plain, flowers) < mean_error(robust, flowers) < 3 * mean_error(plain, flowers)


def test_half_whitened_to_rms_1(flowers):
    rae = fit_rae("toy", flowers, patch_size=8, channels=20)
    z = rae.encode(to_float(flowers))
    assert z.shape == (400, 20, 4, 4) and rae.latent_shape == (20, 4, 4)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    # (20,), std ** 0.5
    unit = (rae.encoder(to_float(flowers)) / z).flatten(2).median(2).values.median(0).values
    ratio = z.std((0, 2, 3)) / unit
    assert (ratio / ratio.mean() - 1).abs().max() < 0.02


def test_round_trip_and_sizes(flowers):
    # all components: nothing is lost
    rae = fit_rae("toy", flowers, patch_size=4, channels=48, latent_noise=0.0)
    assert torch.equal(to_uint8(rae.decode(rae.encode(to_float(flowers)))), flowers)
    wide = torch.rand(2, 3, 8, 20)
    assert rae.encode(wide).shape == (2, 48, 2, 5)
    assert rae.decode(rae.encode(wide)).shape == wide.shape
    with pytest.raises(ValueError, match="not divisible"):
        rae.encode(torch.rand(1, 3, 8, 10))
    with pytest.raises(UserError, match="--image-size 32 is not a multiple"):
        picture_sides("toy", 32, 5)


def test_saved_and_loaded(flowers):
    rae = fit_rae("toy", flowers)
    again = load_rae(rae.saved())
    x = to_float(flowers[:5])
    assert torch.equal(rae.encode(x), again.encode(x)) and rae.fingerprint() == again.fingerprint()
    assert fit_rae("toy", flowers[:200]).fingerprint() != rae.fingerprint()


def test_another_format_is_another_cache(flowers, monkeypatch):
    """Latents made by older code are not taken for the new code's."""
    rae = fit_rae("toy", flowers)
    before = rae.fingerprint()
    monkeypatch.setattr(rae_script, "LATENTS_FORMAT", rae_script.LATENTS_FORMAT + 1)
    assert rae.fingerprint() != before


def test_few_and_plain_pictures():
    rae = fit_rae("toy", torch.full((3, 3, 16, 16), 100, dtype=torch.uint8))
    z = rae.encode(to_float(torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)))
    assert z.isfinite().all() and rae.decode(z).isfinite().all()


@pytest.fixture
def setting(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(LatentCache, "chunk", 5)                           # 36 pictures: 8 chunks
    dataset = load_dataset(str(photos), 32)
    return dataset, fit_rae("toy", dataset.load(range(36)), channels=8), tmp_path / "latents"


def test_cache_is_what_encode_gives(setting):
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    indices, flips = np.array([0, 7, 35, 7]), np.array([0, 1, 1, 0])
    z, y = cache.batch(indices, flips)
    images = to_float(dataset.load(indices))
    images[[1, 2]] = images[[1, 2]].flip(3)
    assert z.dtype == torch.float16 and torch.allclose(z.float(), rae.encode(images), atol=2e-3)
    assert torch.equal(y, dataset.labels[indices])


def test_cache_continues_and_is_shared(setting):
    dataset, rae, root = setting
    whole = LatentCache(dataset, rae, root)
    expected = np.array(whole.latents)
    # Two processes, the second of which was killed with two of its chunks to do.
    shutil.rmtree(whole.folder)
    LatentCache(dataset, rae, root, rank=0, world=2)
    LatentCache(dataset, rae, root, rank=1, world=2)
    done = np.load(whole.folder / "done.npy", mmap_mode="r+")
    assert done.all()
    done[[3, 5]] = False
    np.load(whole.folder / "latents.npy", mmap_mode="r+")[[15, 19, 25, 29]] = 0
    assert np.array_equal(np.array(LatentCache(dataset, rae, root).latents), expected)
    # A finished cache reads no picture at all.
    dataset.load = None
    assert np.array_equal(np.array(LatentCache(dataset, rae, root).latents), expected)


def test_two_runs_may_start_a_cache_at_once(setting, monkeypatch):
    """The slower one does not empty what the faster one has filled."""
    dataset, rae, root = setting
    create = LatentCache._create

    def slow(self):
        monkeypatch.setattr(LatentCache, "_create", create)
        LatentCache(dataset, rae, root)                      # another run comes first, and finishes
        dataset.load = None
        create(self)

    monkeypatch.setattr(LatentCache, "_create", slow)
    cache = LatentCache(dataset, rae, root)
    assert np.abs(cache.latents).sum() > 0
    assert [p.name for p in root.iterdir()] == [cache.folder.name]


def test_cache_refuses(setting, monkeypatch):
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    other = fit_rae("toy", dataset.load(range(10)), channels=8)
    assert LatentCache(dataset, other, root).folder != cache.folder
    shutil.rmtree(cache.folder)
    rae.latent_mean += 1e6
    with pytest.raises(UserError, match="not finite"):
        LatentCache(dataset, rae, root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="GB free"):
        LatentCache(dataset, other, root.with_name("new"))


FILL = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import rae
from data import load_dataset
photos, root, rank = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
dataset = load_dataset(photos, 32)
rae.LatentCache.chunk = 5
load = dataset.load
fitted = rae.fit_rae("toy", load(range(36)), channels=8)
dataset.load = lambda indices: (time.sleep(0.3), load(indices))[1]
while rank and not rae.cache_of(dataset, fitted, root)[0].exists():
    time.sleep(0.02)
rae.LatentCache(dataset, fitted, root, rank, 2)
"""


def test_two_processes_killed_in_the_middle_fill_the_same_cache(setting, photos):
    dataset, rae, root = setting
    expected = np.array(LatentCache(dataset, rae, root.with_name("whole")).latents)
    folder, _ = cache_of(dataset, rae, root)

    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(ROOT), str(photos), str(root),
                                   str(rank)])
                 for rank in (0, 1)]
    deadline, done = time.time() + 60, None
    while time.time() < deadline and (done is None or (done > 0).sum() < 3):
        time.sleep(0.02)
        if folder.exists():
            done = np.array(np.load(folder / "done.npy"))
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 3 <= (done > 0).sum() < 8
    assert np.array_equal(np.array(LatentCache(dataset, rae, root).latents), expected)
    assert np.load(folder / "done.npy").all()


def test_latents_are_cached_where_the_disk_has_room(setting, monkeypatch, capsys):
    dataset, rae, root = setting
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert isinstance(open_latents(dataset, rae, root), LatentsOnTheFly)
    assert "the latents would take" in capsys.readouterr().out
    with pytest.raises(UserError, match="make room, or encode in every step"):
        open_latents(dataset, rae, root, "yes")
    monkeypatch.undo()
    monkeypatch.setattr(LatentCache, "chunk", 5)
    cache = open_latents(dataset, rae, root, "yes")
    assert isinstance(cache, LatentCache) and "encoded 36 pictures" in capsys.readouterr().out
    on_the_fly = open_latents(dataset, rae, root, "no")
    indices, flips = np.array([0, 7, 35, 7]), np.array([0, 1, 1, 0])
    for a, b in zip(cache.batch(indices, flips), on_the_fly.batch(indices, flips)):
        assert torch.allclose(a, b, atol=2e-3) and a.dtype == b.dtype
    rae.latent_mean += 1e6
    with pytest.raises(UserError, match="not finite"):
        on_the_fly.batch(indices, flips)


def test_reconstruct(trained, tmp_path, capsys):
    """The picture that is written and the PSNR are those of the run's own autoencoder."""
    rng = np.random.default_rng(1)
    for name in "ab":
        picture = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
        picture.resize((35, 25)).save(tmp_path / f"{name}.png")
    arguments = ["--ckpt", str(trained / "ckpt.pt"), "--out", str(tmp_path / "out"), "--device",
                 "cpu"]
    rae_script.main(["reconstruct", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *arguments])
    both = np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(float)
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


def test_reconstruct_never_writes_over_a_picture(trained, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(SystemExit) as stop:
        rae_script.main(["reconstruct", str(tmp_path / "a.png"), "--out", str(tmp_path),
                         "--ckpt", str(trained / "ckpt.pt"), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "would be overwritten" in error and error.count("\n") == 1
    assert (tmp_path / "a.png").read_bytes() == before


def test_encode_fills_the_cache_that_training_reads(photos, tmp_path, capsys):
    import train
    from conftest import train_args
    train.main(train_args(tmp_path, "--steps", "1", "--encode-only"))
    assert "encoded 36 pictures" in capsys.readouterr().out and not (tmp_path / "out").exists()
    train.main(train_args(tmp_path, "--steps", "1"))
    assert "encoded" not in capsys.readouterr().out
    assert len(list((tmp_path / "datasets" / "latents").iterdir())) == 1


def test_unknown_autoencoder():
    for source in ("nosuch", {"name": "nosuch", "state": {"latent_var": [0]}, "image_size": 64}):
        with pytest.raises(ValueError, match="unknown autoencoder .*nosuch"):
            load_rae(source)
