"""The official autoencoder, against values of the official code (bytetriper/RAE with transformers) on networks filled
with seeded numbers. tests/golden/rae_*.npz hold them; the fill rule is the one of fill() below."""
import json
import zlib

import numpy as np
import pytest
import torch

from conftest import ROOT
from rae import DINOv2Encoder, RAE, ViTDecoder, sincos_table

GOLDEN = ROOT / "tests" / "golden"


def fill(shapes, scale):
    """Official key -> shape; the tensors that the goldens' networks were filled with."""
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) * scale
        one = value.ndim == 1 and key.endswith("weight") or key.endswith("lambda1")
        state[key] = value + 1 if one else value
    return state


def decoder_state(channels, hidden, layers, mlp, patch, patches, scale):
    block = {"layernorm_before": (hidden,), "layernorm_after": (hidden,), "intermediate.dense": (mlp, hidden),
             "output.dense": (hidden, mlp), "attention.output.dense": (hidden, hidden),
             **{f"attention.attention.{name}": (hidden, hidden) for name in ("query", "key", "value")}}
    linear = {"decoder_embed": (hidden, channels), "decoder_norm": (hidden,), "decoder_pred": (3 * patch ** 2, hidden),
              **{f"decoder_layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}}
    shapes = {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
              for name, shape in linear.items() for kind in ("weight", "bias")}
    state = fill({**shapes, "trainable_cls_token": (1, 1, hidden)}, scale)
    return {**state, "decoder_pos_embed": sincos_table(round(patches ** 0.5), hidden).float()}


def encoder_state(hidden, layers, scale, table=37):
    linear = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in {
        "norm1": (hidden,), "norm2": (hidden,), "attention.output.dense": (hidden, hidden),
        "mlp.fc1": (4 * hidden, hidden), "mlp.fc2": (hidden, 4 * hidden),
        **{f"attention.attention.{name}": (hidden, hidden) for name in ("query", "key", "value")}}.items()}
    linear |= {"embeddings.patch_embeddings.projection": (hidden, 3, 14, 14), "layernorm": (hidden,)}
    shapes = {f"{name}.{kind}": shape if kind == "weight" else shape[:1]
              for name, shape in linear.items() for kind in ("weight", "bias")}
    shapes |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": (hidden,) for i in range(layers) for k in (1, 2)}
    return fill({**shapes, "embeddings.cls_token": (1, 1, hidden), "embeddings.mask_token": (1, hidden),
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
        rae.decoder.cls_token *= 1e-3                                      # only then does the norms' eps show
    assert relative(rae.decode(latent), torch.from_numpy(golden["image_tinycls_f64"])) < tolerance


def test_decoder_takes_every_key_or_says_which(decoder_golden):
    _, state, heads, _ = decoder_golden
    assert len(ViTDecoder.from_official(state, heads).state_dict()) == len(state) - 3 * 2 * 2      # q, k, v are one
    with pytest.raises(ValueError, match="missing: decoder_layers.1.attention.attention.key.bias"):
        ViTDecoder.from_official({k: v for k, v in state.items() if k != "decoder_layers.1.attention.attention.key.bias"})
    with pytest.raises(ValueError, match="missing decoder_pos_embed"):
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
        rae.decoder(latent.reshape(2, -1, 2, 8))                           # the right number, in another shape


@pytest.fixture(scope="module")
def encoder_golden():
    golden = np.load(GOLDEN / "rae_encoder.npz")
    hidden, layers, heads = golden["cfg"].tolist()
    return golden, encoder_state(hidden, layers, float(golden["scale"])), heads


def encoder_rae(golden, state, heads, dtype):
    _, decoder_layers, decoder_heads, mlp, patch = golden["dec_cfg"].tolist()
    encoder = DINOv2Encoder.from_hugging_face(state, num_heads=heads)
    hidden, seed = encoder.vit.embed_dim, int(golden["seed"])
    decoder = ViTDecoder.from_official(decoder_state(hidden, int(golden["dec_cfg"][0]), decoder_layers, mlp, patch, 256,
                                                     float(golden["scale"])), num_heads=decoder_heads)
    image = seeded("rand", (1, 3, 256, 256), seed)
    assert np.array_equal(image.flatten()[:8].numpy(), golden["image_in_first8"])
    rae = RAE(encoder, decoder, *statistics((hidden, 16, 16), seed + 1), 16 * patch, patch, "test").to(dtype)
    return rae, image.to(dtype)


def test_encoder_is_the_official_one(encoder_golden):
    """DINOv2 of timm with tensors made from the Hugging Face keys, 256 x 256 brought to 224 x 224."""
    golden, state, heads = encoder_golden
    rae, image = encoder_rae(golden, state, heads, torch.float64)
    latent = rae.encode(image)
    assert relative(latent, torch.from_numpy(golden["latent_f64"])) < 1e-4
    assert relative(rae.decode(latent), torch.from_numpy(golden["image_out_f64"])) < 1e-4
    rae, image = encoder_rae(golden, state, heads, torch.float32)
    assert relative(rae.encode(image), torch.from_numpy(golden["latent_f64"])) < 1e-2
    tiny = {key: value * (1e-3 if key.startswith("embeddings.") or key.endswith("lambda1") else 1)
            for key, value in state.items()}
    rae, image = encoder_rae(golden, tiny, heads, torch.float64)           # only then does the last norm's eps show
    assert relative(rae.encode(image), torch.from_numpy(golden["latent_tiny_f64"])) < 1e-4


def test_encoder_takes_every_key_or_says_which(encoder_golden):
    _, state, heads = encoder_golden
    with pytest.raises(ValueError, match="missing: encoder.layer.2.layer_scale1.lambda1"):
        DINOv2Encoder.from_hugging_face({k: v for k, v in state.items() if k != "encoder.layer.2.layer_scale1.lambda1"}, heads)
    with pytest.raises(ValueError, match="unexpected: surplus"):
        DINOv2Encoder.from_hugging_face({**state, "surplus": torch.zeros(1)}, heads)
    with pytest.raises(ValueError, match="missing embeddings.position_embeddings"):
        DINOv2Encoder.from_hugging_face({"embeddings.cls_token": torch.zeros(1, 1, 32)}, heads)
    with pytest.raises(ValueError, match="not square"):
        DINOv2Encoder.from_hugging_face(state, heads)(torch.rand(1, 3, 32, 64))
