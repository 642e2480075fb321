"""The official autoencoder, against values of the official code (bytetriper/RAE with
transformers) on networks filled
with seeded numbers. tests/golden/rae_*.npz hold them; the fill rule is the one of fill() below."""
import json
import os
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import rae as rae_script
import sample
import train
from conftest import ROOT, processes
from utils.cli import UserError
from utils.files import file_hash
from model import sincos_2d
from rae import OFFICIAL_FILES, RAE, DINOv2Encoder, ViTDecoder, load_rae
from test_download import flowers_stand_in

GOLDEN = ROOT / "tests" / "golden"


def fill(shapes, scale):
    """Official key -> shape; the tensors that the goldens' networks were filled with."""
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape,
                            generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) * scale
        one = value.ndim == 1 and key.endswith("weight") or key.endswith("lambda1")
        state[key] = value + 1 if one else value
    return state


def decoder_state(channels, hidden, layers, mlp, patch, patches, scale):
    block = {"layernorm_before": (hidden,), "layernorm_after": (hidden,),
             "intermediate.dense": (mlp, hidden),
             "output.dense": (hidden, mlp), "attention.output.dense": (hidden, hidden),
             **{f"attention.attention.{name}": (hidden, hidden)
                for name in ("query", "key", "value")}}
    linear = {"decoder_embed": (hidden, channels), "decoder_norm": (hidden,),
              "decoder_pred": (3 * patch ** 2, hidden),
              **{f"decoder_layers.{i}.{name}": shape for i in range(layers) for name,
                 shape in block.items()}}
    shapes = {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
              for name, shape in linear.items() for kind in ("weight", "bias")}
    state = fill({**shapes, "trainable_cls_token": (1, 1, hidden)}, scale)
    positions = torch.nn.functional.pad(sincos_2d(hidden, round(patches ** 0.5)), (0, 0, 1, 0))
    return {**state, "decoder_pos_embed": positions}


def encoder_state(hidden, layers, scale, table=37):
    linear = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in {
        "norm1": (hidden,), "norm2": (hidden,), "attention.output.dense": (hidden, hidden),
        "mlp.fc1": (4 * hidden, hidden), "mlp.fc2": (hidden, 4 * hidden),
        **{f"attention.attention.{name}": (hidden, hidden)
           for name in ("query", "key", "value")}}.items()}
    linear |= {"embeddings.patch_embeddings.projection": (hidden, 3, 14, 14),
               "layernorm": (hidden,)}
    shapes = {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
              for name, shape in linear.items() for kind in ("weight", "bias")}
    shapes |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": (hidden,) for i in range(layers)
               for k in (1, 2)}
    return fill({**shapes, "embeddings.cls_token": (1, 1, hidden),
                 "embeddings.mask_token": (1, hidden),
                 "embeddings.register_tokens": (1, 4, hidden),
                 "embeddings.position_embeddings": (1, 1 + table ** 2, hidden)}, scale)


def seeded(kind, shape, seed):
    return getattr(torch, kind)(shape, generator=torch.Generator().manual_seed(seed))


def statistics(shape, seed):
    return seeded("randn", shape, seed) * 0.5, 1e-3 + seeded("rand", shape, seed + 1) ** 4 * 2


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def decoder_golden():
    golden = np.load(GOLDEN / "rae_decoder.npz")
    channels, hidden, layers, heads, mlp, patch, patches = golden["cfg"].tolist()
    state = decoder_state(channels, hidden, layers, mlp, patch, patches, float(golden["scale"]))
    return golden, state, heads, patch


def decoder_rae(golden, state, heads, patch, dtype):
    decoder, side = ViTDecoder.from_official(state, num_heads=heads), 4
    shape, seed = (decoder.embed.in_features, side, side), int(golden["seed"])
    latent = seeded("randn", (2, *shape), seed)
    rae = RAE(None, decoder, *statistics(shape, seed + 1), side * patch, patch, "test").to(dtype)
    return rae, latent.to(dtype)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_decoder_is_the_official_one(decoder_golden, dtype, tolerance):
    rae, latent = decoder_rae(*decoder_golden, dtype)
    golden = decoder_golden[0]
    assert relative(rae.decode(latent), torch.from_numpy(golden["image_f64"])) < tolerance
    with torch.no_grad():
        rae.decoder.cls_token *= 1e-3                           # only then does the norms' eps show
    assert relative(rae.decode(latent), torch.from_numpy(golden["image_tinycls_f64"])) < tolerance


def test_decoder_takes_every_key_or_says_which(decoder_golden):
    _, state, heads, _ = decoder_golden
    # q, k, v are one
    assert len(ViTDecoder.from_official(state, heads).state_dict()) == len(state) - 3 * 2 * 2
    with pytest.raises(ValueError, match="missing: decoder_layers.1.attention.attention.key.bias"):
        ViTDecoder.from_official({k: v for k, v in state.items()
                                  if k != "decoder_layers.1.attention.attention.key.bias"})
    with pytest.raises(ValueError, match="missing: decoder_pos_embed"):
        ViTDecoder.from_official({k: v for k, v in state.items() if k != "decoder_pos_embed"})
    with pytest.raises(ValueError, match="unexpected: surplus"):
        ViTDecoder.from_official({**state, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"another shape: decoder_norm.bias \(7,\), not \(48,\)"):
        ViTDecoder.from_official({**state, "decoder_norm.bias": torch.zeros(7)})


def test_token_counts_that_do_not_fit_raise(decoder_golden):
    rae, latent = decoder_rae(*decoder_golden, torch.float32)
    for z in (latent[:, :, :3], latent[:, :, :2, :2], latent[:, :5], latent.repeat(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            rae.decode(z)
    with pytest.raises(ValueError, match="table of positions"):
        rae.decoder(latent[:, :, :2])
    with pytest.raises(ValueError, match="table of positions"):
        rae.decoder(latent.reshape(2, -1, 2, 8))                # the right number, in another shape


@pytest.fixture(scope="module")
def encoder_golden():
    golden = np.load(GOLDEN / "rae_encoder.npz")
    hidden, layers, heads = golden["cfg"].tolist()
    return golden, encoder_state(hidden, layers, float(golden["scale"])), heads


def encoder_rae(golden, state, heads, dtype):
    _, decoder_layers, decoder_heads, mlp, patch = golden["dec_cfg"].tolist()
    encoder = DINOv2Encoder.from_hugging_face(state, num_heads=heads)
    hidden, seed = encoder.vit.embed_dim, int(golden["seed"])
    decoder = ViTDecoder.from_official(decoder_state(hidden, int(golden["dec_cfg"][0]),
                                                     decoder_layers, mlp, patch, 256,
                                                     float(golden["scale"])),
                                       num_heads=decoder_heads)
    image = seeded("rand", (1, 3, 256, 256), seed)
    assert np.array_equal(image.flatten()[:8].numpy(), golden["image_in_first8"])
    rae = RAE(encoder, decoder, *statistics((hidden, 16, 16), seed + 1), 16 * patch, patch,
              "test").to(dtype)
    return rae, image.to(dtype)


def test_encoder_is_the_official_one(encoder_golden):
    """DINOv2 of timm with tensors made from the Hugging Face keys, 256 x 256 brought to 224 x
    224."""
    golden, state, heads = encoder_golden
    rae, image = encoder_rae(golden, state, heads, torch.float64)
    latent = rae.encode(image)
    assert relative(latent, torch.from_numpy(golden["latent_f64"])) < 1e-4
    assert relative(rae.decode(latent), torch.from_numpy(golden["image_out_f64"])) < 1e-4
    rae, image = encoder_rae(golden, state, heads, torch.float32)
    assert relative(rae.encode(image), torch.from_numpy(golden["latent_f64"])) < 1e-2
    tiny = {key: value * (1e-3 if key.startswith("embeddings.") or key.endswith("lambda1") else 1)
            for key, value in state.items()}
    # only then does the last norm's eps show
    rae, image = encoder_rae(golden, tiny, heads, torch.float64)
    assert relative(rae.encode(image), torch.from_numpy(golden["latent_tiny_f64"])) < 1e-4


def test_encoder_takes_every_key_or_says_which(encoder_golden):
    _, state, heads = encoder_golden
    with pytest.raises(ValueError, match="missing: encoder.layer.2.layer_scale1.lambda1"):
        less = {key: value for key, value in state.items()
                if key != "encoder.layer.2.layer_scale1.lambda1"}
        DINOv2Encoder.from_hugging_face(less, heads)
    with pytest.raises(ValueError,
                       match=r"of another shape: encoder.layer.0.norm1.bias \(7,\), not"):
        DINOv2Encoder.from_hugging_face({**state, "encoder.layer.0.norm1.bias": torch.zeros(7)},
                                        heads)
    with pytest.raises(ValueError, match="unexpected: surplus"):
        DINOv2Encoder.from_hugging_face({**state, "surplus": torch.zeros(1)}, heads)
    with pytest.raises(ValueError, match="missing: embeddings.position_embeddings"):
        DINOv2Encoder.from_hugging_face({"embeddings.cls_token": torch.zeros(1, 1, 32)}, heads)
    with pytest.raises(ValueError, match="not square"):
        DINOv2Encoder.from_hugging_face(state, heads)(torch.rand(1, 3, 32, 64))


@pytest.mark.skipif("SLOW" not in os.environ,
                    reason="ViT-XL takes 4 GB and half a minute: SLOW=1 python -m pytest")
def test_the_decoder_at_its_real_size():
    decoder = ViTDecoder.from_official(decoder_state(768, 1152, 28, 4096, 16, 256, 0.05))
    assert sum(p.numel() for p in decoder.parameters()) == 415_352_704
    with torch.no_grad():
        image = decoder(seeded("randn", (1, 768, 16, 16), 7))
    golden = torch.from_numpy(np.load(GOLDEN / "rae_vitxl.npz")["image_f64_patch00"])
    assert relative(image[0, :, :16, :16], golden) < 2e-5


# ---- Files, and the paper's run from end to end, with small random weights in files of the official layout 

@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with the three files for 32 x 32 pictures; the table of the official ones points
    to them."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(encoder_state(48, 2, 0.25), folder / "model.safetensors")
    torch.save(decoder_state(48, 64, 2, 96, 2, 256, 0.25), folder / "model.pt")
    mean, var = statistics((48, 16, 16), 0)
    torch.save({"mean": mean, "var": var}, folder / "stat.pt")
    pin(monkeypatch, folder)
    return folder


def pin(monkeypatch, folder):
    monkeypatch.setattr(rae_script, "OFFICIAL_FILES", {
        part: (repo, revision, file, file_hash(folder / file.rpartition("/")[2]))
        for part, (repo, revision, file, _) in OFFICIAL_FILES.items()})


def test_weights_by_hand(weights, monkeypatch, capsys):
    rae = load_rae("dinov2-b", weights_dir=weights)
    assert rae.image_size == 32 and rae.latent_shape == (48, 16, 16)
    assert "differs" not in capsys.readouterr().out
    images = seeded("rand", (2, 3, 32, 32), 0)
    again = load_rae(rae.saved(), weights_dir=weights)
    assert torch.equal(again.encode(images), rae.encode(images))
    assert again.fingerprint() == rae.fingerprint()
    assert len(json.dumps(rae.saved())) < 1000           # no checkpoint carries two gigabytes of it
    # Other weights than the checkpoint's; a table of positions that is not the formula's.
    state = torch.load(weights / "model.pt", weights_only=True)
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.25
    torch.save(state, weights / "model.pt")
    pin(monkeypatch, weights)
    load_rae("dinov2-b", weights_dir=weights)
    assert "positions differ from the sin-cos formula by 0.25" in capsys.readouterr().err
    with pytest.raises(UserError, match="other weights of dinov2-b"):
        load_rae(rae.saved(), weights_dir=weights)


def test_files_that_are_not_the_official_ones(weights, monkeypatch):
    def refused(message):
        with pytest.raises(UserError, match=message):
            load_rae("dinov2-b", weights_dir=weights)

    mean, var = statistics((48, 8, 8), 0)
    whole = (weights / "stat.pt").read_bytes()
    torch.save({"mean": mean, "var": var}, weights / "stat.pt")
    refused("stat.pt has the sha256 .* expected was .*: remove it and fetch https://huggingface.co/nyu-visionx")
    pin(monkeypatch, weights)
    refused(r"stat.pt is not the statistics .*do not fit together: .*\(48, 8, 8\)")
    (weights / "stat.pt").write_bytes(whole)
    torch.save(decoder_state(32, 64, 2, 96, 2, 256, 0.25), weights / "model.pt")
    pin(monkeypatch, weights)
    refused(r"do not fit together: .*'decoder': \(32, 16, 16\)")
    torch.save({"model": 1}, weights / "model.pt")
    pin(monkeypatch, weights)
    refused("model.pt is not the decoder that this code knows: missing: decoder_embed.weight")
    (weights / "model.pt").unlink()
    (weights / "stat.pt").unlink()
    refused(r"lacks 2 of 3 files \(not in .*\): .*put https://.*/model.pt and https://.*/stat.pt ")


def test_no_network(tmp_path):
    """One line, and soon: not after all the retries of the Hub's client."""
    started = time.perf_counter()
    found = subprocess.run([sys.executable, str(ROOT / "rae.py"), "reconstruct", "x.png"],
                           capture_output=True, text=True,
                           env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}, timeout=60)
    lines = found.stderr.splitlines()
    assert time.perf_counter() - started < 25 and found.returncode == 1 and len(lines) == 1
    assert "lacks 3 of 3 files" in lines[0] and "refused" in lines[0]
    assert "--weights-dir" in lines[0]
    assert lines[0].count("http://127.0.0.1:9/") == 3


def test_the_papers_run_from_end_to_end(weights, server, tmp_path, capsys):
    """Two processes fetch, verify, encode and train; one goes on, without a network; one
    samples, with weights by hand.
    The server stands in for Oxford and the Hub."""
    changes = {"data": {"FLOWERS_URL": server.url + "/flowers/",
                        "FLOWERS_FILES": flowers_stand_in(server.folder / "flowers"),
                        "FLOWERS_CLASSES": data.FLOWERS_CLASSES[:4]},
               "rae": {"OFFICIAL_FILES": rae_script.OFFICIAL_FILES}}
    for repo, revision, file, _ in OFFICIAL_FILES.values():
        path = server.folder / repo / "resolve" / revision / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((weights / path.name).read_bytes())
    run = tmp_path / "out" / "run"
    arguments = ["--dataset", "flowers", "--image-size", "32", "--model", "SiT-T/1", "--batch-size", "4",
                 "--device", "cpu", "--data-dir", tmp_path / "datasets", "--out-dir", run, "--sample-every", "1000"]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub")}
    status, said, error = processes("train", [*arguments, "--steps", "2", "--report", "0"], tmp_path, 2,
                                    environment=environment, changes=changes)
    assert status == [0, 0], error
    assert "encoded 24 pictures" in said and "in each of 2 processes" in said
    assert "24 pictures of 4 classes: pink primrose 6, " in said
    assert "latents 48 x 16 x 16" in said
    before, requests = torch.load(run / "ckpt.pt", weights_only=True), len(server.ranges)
    assert before["step"] == 2 and before["rae"]["name"] == "dinov2-b"
    assert before["args"]["epochs"] is None
    assert before["args"]["lr"] == 1e-4 and before["args"]["alpha_max"] == 85
    assert before["args"]["dtype"] == "bfloat16"

    status, said, error = processes("train", [*arguments, "--steps", "3", "--report", "0"], tmp_path, 1,
                                    environment={**environment, "HF_HUB_OFFLINE": "1"}, changes=changes)
    assert status == [0], error
    assert "resuming" in said and "encoded" not in said
    assert len(server.ranges) == requests
    assert torch.load(run / "ckpt.pt", weights_only=True)["step"] == 3
    sample.main(["--ckpt", str(run / "ckpt.pt"), "--steps", "2", "--weights-dir", str(weights),
                 "--device", "cpu"])
    assert "4 classes in turn" in capsys.readouterr().out
    with Image.open(run / "sample.png") as grid:
        assert grid.size == (4 * 64, 4 * 64 + 16)
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(run / "ckpt.pt"), "--weights-dir", str(tmp_path), "--device",
                     "cpu"])
    assert "lacks 3 of 3 files" in capsys.readouterr().err


def test_the_papers_presets():
    """Table A; what the text does not give is not tested."""
    table = {"flowers": ("SiT-B/1", 2000, 256), "animal-faces": ("SiT-B/1", 500, 256),
             "imagenet": ("SiT-XL/1", 600, 512)}
    for name, (model, epochs, batch_size) in table.items():
        args = train.parse_args(["--dataset", name])
        assert (args.model, args.epochs, args.batch_size) == (model, epochs, batch_size)
        assert args.steps is None
        assert (args.rae, args.image_size, args.lr, args.weight_decay,
                args.ema_decay[0]) == ("dinov2-b", 256, 1e-4, 0, 0.9995)
        assert (args.mix_prob, args.class_dropout_prob) == (0.2, 0.1)
        assert (args.warmup_steps, args.decay_last) == (0, 0)
    assert train.parse_args(["--dataset", "animal-faces"]).cfg == 1
    assert train.parse_args(["--dataset", "imagenet"]).cfg == 3.2
    assert train.parse_args(["--dataset", "flowers", "--steps", "7"]).epochs is None
    # one's own pictures, the paper's settings
    args = train.parse_args(["--dataset", "photos", "--rae", "dinov2-b"])
    assert (args.model, args.image_size, args.alpha_max) == ("SiT-B/1", 256, 85)
