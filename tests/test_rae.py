import json
import shutil

import numpy as np
import pytest
import torch

from data import ToyFlowers, UsageError, UserError, load_dataset
from rae import LatentCache, fit_rae, load_rae, to_float, to_uint8


@pytest.fixture(scope="module")
def flowers():
    return ToyFlowers(32).load(range(400))


def test_components_are_those_of_numpy(flowers):
    """What k components lose is what the singular values say, and no other k-dimensional linear code loses less."""
    rae = fit_rae("toy", flowers, patch_size=8, channels=20)
    code = rae.encoder[1].weight.double().flatten(1)                       # (20, 192)
    assert torch.allclose(code @ code.T, torch.eye(20).double(), atol=1e-5)
    patches = to_float(flowers).double().reshape(400, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192)
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
    pixels = torch.nn.functional.pixel_unshuffle(to_float(flowers), 8).flatten(2).transpose(1, 2).reshape(-1, 192)
    residual = pixels.double() - rows @ torch.linalg.lstsq(rows, pixels.double(), driver="gelsd").solution
    assert mean_error(plain, flowers) == pytest.approx(residual.square().mean().item(), rel=1e-4)
    assert mean_error(robust, flowers, 0.5) < 0.8 * mean_error(plain, flowers, 0.5)
    assert mean_error(plain, flowers) < mean_error(robust, flowers) < 3 * mean_error(plain, flowers)


def test_half_whitened_to_rms_1(flowers):
    rae = fit_rae("toy", flowers, patch_size=8, channels=20)
    z = rae.encode(to_float(flowers))
    assert z.shape == (400, 20, 4, 4) and rae.latent_shape == (20, 4, 4)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    unit = (rae.encoder(to_float(flowers)) / z).flatten(2).median(2).values.median(0).values     # (20,), std ** 0.5
    ratio = z.std((0, 2, 3)) / unit
    assert (ratio / ratio.mean() - 1).abs().max() < 0.02


def test_round_trip_and_sizes(flowers):
    rae = fit_rae("toy", flowers, patch_size=4, channels=48, latent_noise=0.0)   # all components: nothing is lost
    assert torch.equal(to_uint8(rae.decode(rae.encode(to_float(flowers)))), flowers)
    wide = torch.rand(2, 3, 8, 20)
    assert rae.encode(wide).shape == (2, 48, 2, 5) and rae.decode(rae.encode(wide)).shape == wide.shape
    with pytest.raises(ValueError, match="not divisible"):
        rae.encode(torch.rand(1, 3, 8, 10))
    with pytest.raises(UsageError, match="not a multiple"):
        fit_rae("toy", flowers, patch_size=5)


def test_saved_and_loaded(flowers):
    rae = fit_rae("toy", flowers)
    again = load_rae(rae.saved())
    x = to_float(flowers[:5])
    assert torch.equal(rae.encode(x), again.encode(x)) and rae.fingerprint() == again.fingerprint()
    assert fit_rae("toy", flowers[:200]).fingerprint() != rae.fingerprint()


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

    def slow(self, manifest):
        monkeypatch.setattr(LatentCache, "_create", create)
        LatentCache(dataset, rae, root)                                    # another run comes first, and finishes
        dataset.load = None
        create(self, manifest)

    monkeypatch.setattr(LatentCache, "_create", slow)
    cache = LatentCache(dataset, rae, root)
    assert np.abs(cache.latents).sum() > 0 and [p.name for p in root.iterdir()] == [cache.folder.name]


def test_cache_refuses(setting, monkeypatch):
    dataset, rae, root = setting
    cache = LatentCache(dataset, rae, root)
    other = fit_rae("toy", dataset.load(range(10)), channels=8)
    assert LatentCache(dataset, other, root).folder != cache.folder
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    (cache.folder / "manifest.json").write_text(json.dumps({**manifest, "dtype": "float32"}))
    with pytest.raises(UserError, match="other settings"):
        LatentCache(dataset, rae, root)
    shutil.rmtree(cache.folder)
    rae.latent_mean += 1e6
    with pytest.raises(UserError, match="not finite"):
        LatentCache(dataset, rae, root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match="GB free"):
        LatentCache(dataset, other, root.with_name("new"))
