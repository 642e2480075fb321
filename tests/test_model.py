import math

import pytest
import torch
import torch.nn.functional as F

import sphere
from model import SiT, SiT_models, SiTBlock, sincos_2d


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_the_paper():
    with torch.device("meta"):
        B, XL = SiT_models["SiT-B/1"](num_classes=102), SiT_models["SiT-XL/1"](num_classes=1000)
    assert numbers(B) == 130_178_304
    assert numbers(XL) == 675_220_224
    assert numbers(XL) - XL.pos_embed.numel() == 674_925_312
    assert sum(v.numel() for v in XL.state_dict().values()) == 675_220_224
    assert len(XL.state_dict()) == 288


def test_block_agrees_with_timm():
    from timm.layers import Mlp
    from timm.models.vision_transformer import Attention
    torch.manual_seed(0)
    block = SiTBlock(64, 4, 4.0)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    attention = Attention(64, num_heads=4, qkv_bias=True)
    mlp = Mlp(64, 256, act_layer=lambda: torch.nn.GELU(approximate="tanh"))
    attention.load_state_dict(block.attn.state_dict())
    mlp.load_state_dict(block.mlp.state_dict())
    x, c = torch.randn(3, 10, 64), torch.randn(3, 64)

    def norm(x):
        return F.layer_norm(x, (64,), eps=1e-6)

    shift1, scale1, gate1, shift2, scale2, gate2 = [
        part[:, None] for part in F.linear(F.silu(c), block.adaLN_modulation[1].weight,
                                           block.adaLN_modulation[1].bias).split(64, dim=1)]
    expected = x + gate1 * attention(norm(x) * (1 + scale1) + shift1)
    expected = expected + gate2 * mlp(norm(expected) * (1 + scale2) + shift2)
    assert (block(x, c) - expected).norm() / expected.norm() < 1e-6


def test_positions_closed_form():
    table = sincos_2d(16, 3)[0]
    assert table.shape == (9, 16)
    for token in range(9):
        row, col = divmod(token, 3)
        omega = [10000 ** (-k / 4) for k in range(4)]
        expected = ([math.sin(col * w) for w in omega] + [math.cos(col * w) for w in omega]
                    + [math.sin(row * w) for w in omega] + [math.cos(row * w) for w in omega])
        assert torch.allclose(table[token], torch.tensor(expected), atol=1e-6)


def test_unpatchify_undoes_patchify():
    model = SiT(input_size=6, in_channels=2, patch_size=2, hidden_size=8, depth=0, num_heads=2)
    with torch.no_grad():
        # a token is (p, p, C), as the output
        model.x_embedder.weight.copy_(torch.eye(8).view(8, 2, 2, 2).permute(0, 3, 1, 2))
        model.pos_embed.zero_()
    model.final_layer = type("Identity", (torch.nn.Module,), {"forward": lambda self, x, c: x})()
    x = torch.randn(3, 2, 6, 6)
    assert torch.allclose(model.eval()(x, torch.zeros(3, dtype=torch.long)), x, atol=1e-6)


def tiny():
    torch.manual_seed(0)
    model = SiT(input_size=4, in_channels=8, hidden_size=32, depth=2, num_heads=2, num_classes=5,
                class_dropout_prob=0.5)
    for p in model.parameters():                         # off adaLN-Zero, so that the class matters
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_dropped_labels_are_the_null_class():
    model, x, y = tiny(), torch.randn(6, 8, 4, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    drop = torch.tensor([True, False, True, False, False, True])
    given = model.train()(x, y, drop=drop)
    assert torch.equal(given, model.eval()(x, torch.where(drop, 5, y)))
    assert not torch.allclose(given, model(x, y))
    assert torch.equal(model.eval()(x, y), model(x, y, drop=torch.zeros(6, dtype=torch.bool)))


def test_dropping_is_reproducible_and_as_frequent_as_said():
    model, x = tiny().train(), torch.randn(400, 8, 4, 4)
    y = torch.zeros(400, dtype=torch.long)
    first, again = (model(x, y, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    dropped = (first == model.eval()(x, y + 5)).flatten(1).all(1).double().mean()
    assert abs(dropped - 0.5) < 0.1                                        # 4 standard deviations


@pytest.mark.parametrize("name", ["SiT-T/1", "SiT-S/1"])
def test_first_step_is_sane(name):
    """TOY.md's trap: 1 - cos at an output of exactly zero has a gradient norm of 1e9."""
    torch.manual_seed(0)
    model = SiT_models[name](input_size=4, in_channels=48, num_classes=10).train()
    z, y = torch.randn(16, 48, 4, 4), torch.arange(16) % 10
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = sphere.reconstruction_loss(model(z, y), z)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert 0.1 < torch.nn.utils.get_total_norm([p.grad for p in weights
                                                    if p.grad is not None]) < 100
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_sizes_that_do_not_fit():
    for sizes in ({"patch_size": 3}, {"num_heads": 5}, {"hidden_size": 42, "num_heads": 1}):
        with pytest.raises(ValueError, match="must divide"):
            SiT(**{"input_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2,
                   **sizes})


@pytest.mark.gpu("bfloat16 attention against float32")
def test_bfloat16_on_a_gpu_is_close_to_float32():
    model = tiny().eval()
    x, y = torch.randn(8, 8, 4, 4), torch.arange(8) % 5
    expected = model(x, y)
    with torch.autocast("cuda", torch.bfloat16):
        found = model.cuda()(x.cuda(), y.cuda()).float().cpu()
    assert (found - expected).norm() / expected.norm() < 2e-2
