"""The embedded data set, its autoencoder, and what the first command of the README does."""
import numpy as np
import pytest
import torch

import rae as rae_script
import sample
import settings
import train
from conftest import ROOT, equal, fit_rae
from data import load_dataset
from laptop import toy
from laptop.toy import ToyFlowers
from rae import load_rae
from utils.images import to_float, to_uint8


def test_toy_is_deterministic_and_balanced():
    a, b = ToyFlowers(32), ToyFlowers(32)
    assert torch.equal(a.load([5, 77, 3000]), b.load([5, 77, 3000])) and a.recipe == b.recipe
    assert torch.equal(a.load(range(60))[7], a.load([7])[0])
    assert torch.bincount(a.labels).tolist() == [1000] * 10 and len(a.classes) == 10
    test = ToyFlowers(32, "test")
    assert len(test.labels) == 2000 and not torch.equal(test.load([0]), a.load([0]))
    pictures = a.load(range(200)).float()
    assert pictures.dtype == torch.float32 and pictures.std() > 40


def test_toy_species_differ_and_scale():
    """The same flower at two sizes is the same picture; two species are not."""
    small, large = ToyFlowers(32).load(range(10)).float(), ToyFlowers(64).load(range(10)).float()
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    same = (small - shrunk).abs().flatten(1).mean(1)
    other = (small - shrunk.roll(1, 0)).abs().flatten(1).mean(1)
    assert (same < 8).all() and (other > 2 * same).all()



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


def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy" / "rose").mkdir(parents=True)
    to_save = ToyFlowers(16).load([0])[0].permute(1, 2, 0).numpy()
    __import__("PIL.Image").Image.fromarray(to_save).save(tmp_path / "toy" / "rose" / "0.png")
    assert load_dataset("toy", 60).name == "toy" and "write ./toy" in capsys.readouterr().err
    assert load_dataset("./toy", 16).classes == ["rose"] and capsys.readouterr().out == ""


def test_what_the_toy_differs_in():
    """The README's run; another autoencoder has its own settings; a method's come last."""
    args = train.parse_args([])
    assert (args.dataset, args.rae, args.model, args.steps, args.image_size, args.rae_patch, args.report) == (
        "toy", "toy", "SiT-T/1", 2000, 60, 20, 1000)
    assert (args.lr, args.clip, args.ema_decay, args.cfg, args.gamma, args.out_dir) == (
        2e-3, 1.0, [0.995, 0.98], 1.2, 1.5, "out/toy-SiT-T-1")
    assert args.sigma == pytest.approx(5)
    assert train.parse_args(["--out-dir", ""]).out_dir == args.out_dir       # of an unset shell variable
    photos = train.parse_args(["--dataset", "photos"])
    assert (photos.rae, photos.image_size, photos.steps, photos.out_dir) == ("toy", 64, 1500, "out/photos-SiT-T-1")
    lite0 = train.parse_args(["--dataset", "photos", "--rae", "lite0"])
    assert (lite0.model, lite0.steps, lite0.cfg, lite0.out_dir) == ("SiT-XS/1", 4400, 2, "out/photos-SiT-XS-1-lite0")
    assert train.parse_args(["--dataset", "flowers", "--rae", "toy"]).image_size == 64
    pixels = train.parse_args(["--method", "sphere-encoder"])
    assert (pixels.rae, pixels.image_size, pixels.rae_patch, pixels.noise_dist, pixels.out_dir) == (
        "pixels", 60, 20, "sphere-encoder", "out/toy-SiT-T-1-sphere-encoder")


def test_the_toy_resumes_in_the_same_bits(tmp_path, monkeypatch):
    def run(folder, *steps):
        for n in steps:
            train.main(["--steps", n, "--batch-size", "8", "--report", "0", "--device", "cpu", "--data-dir",
                        str(tmp_path / "datasets"), "--out-dir", str(tmp_path / folder), "--log-every", "2"])
        return torch.load(tmp_path / folder / "ckpt.pt", weights_only=True)
    monkeypatch.setattr(toy.ToyFlowers, "__init__", few(toy.ToyFlowers.__init__))
    monkeypatch.setitem(settings.BY_DATASET, "toy", {**settings.BY_DATASET["toy"], "decay_last": 0.0})
    whole, resumed = run("whole", "4"), run("resumed", "2", "4")
    for part in ("model", "ema", "optimizer", "rae"):
        assert equal(whole[part], resumed[part])


def test_a_decoder_in_bfloat16_is_another_and_a_near_one(flowers):
    rae = fit_rae("toy", flowers, patch_size=8)
    z = rae.encode(to_float(flowers[:20]))
    exact = rae.decode(z)
    rae.dtype = "bfloat16"
    assert 0 < (rae.decode(z) - exact).abs().max() < 0.05 and rae.decode(z).dtype == torch.float32


@pytest.mark.parametrize("message,argv", [
    ("--decoder-steps means nothing to --rae toy", ["--decoder-steps", "7"]),
    ("--rae-patch means nothing to --rae lite0", ["--dataset", "photos", "--rae", "lite0", "--rae-patch", "8"])])
def test_what_means_nothing_to_an_autoencoder_is_refused(message, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_readmes_snippet_draws(tmp_path):
    """From a checkpoint to pictures, as it stands; those of sample.py."""
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    old = ROOT / "tests" / "laptop" / "checkpoint-of-november-2026.pt"
    found, code = {}, code.replace("out/toy-SiT-T-1/ckpt.pt", str(old)).replace("[0, 4, 5]", "[0, 1, 0]")
    exec(code, found)
    assert found["images"].shape == (3, 3, 32, 32) and found["images"].dtype == torch.uint8
    sample.main(["--ckpt", str(old), "--num", "3", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])
    drawn = torch.from_numpy(np.load(tmp_path / "s.npz")["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(found["images"], drawn)


def few(init):
    def of_few(self, *args):
        init(self, *args)
        self.labels, self.variation = self.labels[:200], self.variation[:200]
    return of_few
