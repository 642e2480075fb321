import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fid
import flops
import sphere
from baselines import METHODS, build_network
from conftest import equal
from flops import count_macs
from model import SiT_models
from rae import DINOv2Encoder, ViTDecoder


def torchs_count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Run(nn.Module):
    """A function of (x, weight), weight a parameter."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(shape))

    def forward(self, *inputs):
        return self.function(*inputs, self.weight)


# ---- count_macs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SiT-S/1", "decoder", "encoder", "inception"])
def test_agrees_with_torch(name):
    z, y = torch.zeros(2, 768, 16, 16), torch.zeros(2, dtype=torch.long)
    images = torch.zeros(2, 3, 256, 256)
    module, inputs = {"SiT-S/1": lambda: (SiT_models[name](), [z, y]),
                      "decoder": lambda: (ViTDecoder(depth=3), [z]),
                      "encoder": lambda: (DINOv2Encoder(depth=2), [images]),
                      "inception": lambda: (fid.InceptionV3(), [images])}[name]()
    meta, meta_inputs = module.eval().to("meta"), [x.to("meta") for x in inputs]
    with torch.no_grad():
        assert 2 * count_macs(module, *inputs) == torchs_count(lambda: meta(*meta_inputs)) > 0


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(7, 5), (3, 4, 7)), (nn.Linear(7, 5, bias=False), (7,)),
    (nn.Conv2d(6, 4, 3, 2, 1, groups=2), (3, 6, 9, 8)),
    (nn.Conv1d(6, 4, 5, dilation=2, padding="same"), (2, 6, 11)),
    (nn.ConvTranspose2d(6, 4, 3, 2, 1), (3, 6, 9, 8)),
    (nn.MultiheadAttention(8, 2, batch_first=True), (3, 5, 8)),
    (nn.TransformerEncoderLayer(8, 2, 16), (3, 5, 8)),
    (nn.LSTM(8, 16), (3, 5, 8))])
def test_layers(layer, shape):
    x = torch.randn(shape)
    x = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
    run = layer.to("meta")
    with torch.no_grad():
        assert 2 * count_macs(layer, *x) == torchs_count(lambda: run(*[t.to("meta") for t in x])) > 0


def test_products_in_closed_form():
    x = torch.ones(3, 4, 7)
    assert count_macs(Run(lambda x, w: torch.einsum("bij,jk->bik", x, w), 7, 5), x) == 3 * 4 * 7 * 5
    assert count_macs(Run(lambda x, w: x @ w, 7), x) == 3 * 4 * 7                          # mv
    assert count_macs(Run(lambda x, w: x[0, 0] @ w, 7), x) == 7                            # dot
    assert count_macs(Run(lambda x, w: torch.addmv(x[0, :, 0], x[0], w), 7), x) == 4 * 7
    module = Run(lambda x, w: F.conv_transpose2d(x[:, :, None], w, groups=2), 4, 5, 1, 2)
    assert count_macs(module, x) == 3 * 4 * 7 * 5 * 2
    assert count_macs(Run(lambda x, w: torch.baddbmm(x, x, w.expand(3, 7, 7)), 7, 7),
                      x) == 3 * 4 * 7 * 7


def test_without_attention_two_products_are_left_out_and_nothing_else():
    z, y = torch.zeros(2, 768, 16, 16), torch.zeros(2, dtype=torch.long)
    model = SiT_models["SiT-S/1"]()
    assert count_macs(model, z, y) - count_macs(model, z, y,
                                                attention=False) == 2 * 12 * 2 * 256 ** 2 * 384

    def by_hand(x, w):
        x = F.linear(x, w)
        return (x @ x.transpose(1, 2)).softmax(-1) @ x

    def fused(x, w):
        x = F.linear(x, w)[:, None]
        return F.scaled_dot_product_attention(x, x, x)

    def two_bmm_sdpa_and_groups(x, w):
        x = F.conv1d(F.linear(x, w).transpose(1, 2), torch.ones(8, 2, 3), padding=1, groups=4)
        x = torch.bmm(torch.bmm(x.transpose(1, 2), x), x.transpose(1, 2))[:, None]   # (3, 1, 10, 8)
        return F.scaled_dot_product_attention(x, x, x)

    x, linear = torch.ones(3, 10, 6), 3 * 10 * 6 * 8
    for function, layers, products in (
            (by_hand, linear, 2 * 3 * 10 * 10 * 8), (fused, linear, 2 * 3 * 10 * 10 * 8),
            (two_bmm_sdpa_and_groups, linear + 3 * 10 * 8 * 2 * 3,
             3 * (10 * 10 * 8 + 10 * 8 * 10) + 2 * 3 * 10 * 10 * 8)):
        module = Run(function, 8, 6)
        assert count_macs(module, x, attention=False) == layers, function
        assert count_macs(module, x) == layers + products, function


@pytest.mark.parametrize("function", [
    lambda x, w: F.bilinear(x, x, w), lambda x, w: torch.cdist(x, x),
    lambda x, w: torch.linalg.solve(w[0], x),
    lambda x, w: torch.addbmm(x, w, w), lambda x, w: torch.linalg.matrix_exp(x),
    lambda x, w: torch.fft.fft(x),
    lambda x, w: x.clone().addmm_(x, x), lambda x, w: torch._int_mm(x.char(), x.char()),
    lambda x, w: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[w[None]] * 3)])
def test_an_unknown_operation_raises(function):
    with pytest.raises(NotImplementedError, match="does not know whether aten"):
        count_macs(Run(function, 32, 32, 32), torch.ones(32, 32))


def test_the_module_and_its_inputs_stay_as_they_were():
    conv = nn.Conv2d(3, 4, 3)
    module = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(),
                           nn.Linear(144, 2)).train()
    conv.table = torch.ones(4, 1, 1)                                    # a tensor that is no buffer
    conv.register_forward_hook(lambda conv, args, out: setattr(conv, "last", out)
                               or out * conv.table)
    x, state = torch.randn(5, 3, 8, 8), torch.get_rng_state()
    copy, before = x.clone(), {k: v.clone() for k, v in module.state_dict().items()}
    macs = count_macs(module, x)
    assert macs == 5 * (36 * 4 * 27 + 144 * 2)
    assert equal(dict(module.state_dict()), before) and torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() and module.training
    assert not hasattr(conv, "last") and conv.table.device.type == "cpu"
    with torch.inference_mode():
        assert count_macs(module, x) == macs
    # what is there already is none the worse
    assert count_macs(module.to("meta"), x.to("meta")) == macs


# ---- The paper's numbers -------------------------------------------------------------------------

def close(value, said, tolerance=0.005):
    return abs(value / said - 1) < tolerance


def test_parts():
    rows = {row["part"].split(",")[0].split(" ")[0]: row for row in flops.parts_table()}
    for name, million in (("SiT-B/1", 130), ("SiT-XL/1", 674), ("decoder", 415), ("both", 502)):
        assert close(rows[name]["million"], million) and rows[name]["M paper"] == million
    for name, gflops in (("SiT-XL/1", 230), ("decoder", 213)):
        assert close(rows[name]["GFLOPs"], gflops) and rows[name]["paper"] == gflops
    assert int(rows["both"]["GFLOPs"]) == rows["both"]["paper"] == 128    # cut, not rounded: 128.85
    # Counted by torch's counter and by thop on the official code:
    for name, gflops, whole in (("SiT-B/1", 44.178, 46.594), ("SiT-XL/1", 229.6, 238.117),
                                ("encoder", 44.568, 47.078),
                                ("decoder", 213.126, 221.648)):
        assert close(rows[name]["GFLOPs"], gflops, 5e-4)
        assert close(rows[name]["whole"], whole, 2e-5), name


def test_sampling():
    rows = {(row["set"], row["steps"]): row for row in flops.sampling_table()}
    for name, ours, theirs, whole in (
            ("animal-faces", (302, 390, 478), (1965, 4554, 7144), (314.8, 408.0, 501.2)),
            ("flowers", (390, 567, 743), (3932, 9118, 14300), (408.0, 594.4, 780.8))):
        for steps, *expected in zip((2, 4, 6), ours, theirs, whole):
            row = rows[name, steps]
            assert all(map(close, (row["GFLOPs"], row["SE"], row["whole"]), expected))
            assert row["NFE"] == steps * (1 + (name == "flowers")) and abs(row["%"]) < 0.5
            assert abs(row["SE %"]) < 0.5
    assert round(rows["animal-faces", 2]["ratio"], 1) == 6.5
    assert [rows["imagenet", steps]["NFE"] for steps in (2, 4, 6)] == [4, 8, 12]
    assert close(rows["imagenet", 4]["GFLOPs"], 8 * 230 + 213)


@pytest.mark.parametrize("eq4", [False, True])
def test_training_costs_three_times_the_forward(eq4):
    with torch.device("meta"):
        model = SiT_models["SiT-S/1"]().to("meta")
        z, y, sigma = torch.empty(2, 768, 16, 16), torch.zeros(2, dtype=torch.long), torch.ones(2)

    def step():
        losses, _ = sphere.training_losses(lambda v, y: model(v, y, drop=y > 0), z, y, sigma, sigma,
                                           z,
                                           eps_again=z if eq4 else None)
        sum(losses.values()).backward()

    assert close(2 * flops.training_cost("SiT-S/1", eq4)[1].item() * 1e9, torchs_count(step), 0.01)


@pytest.mark.parametrize("method", ["flow", "meanflow", "sphere-encoder"])
def test_what_the_baselines_cost_is_what_torch_counts(method):
    """Of a step as it runs; MeanFlow's with its derivative. Attention's products count, too."""
    with torch.device("meta"):
        net = build_network(method, "SiT-T/1", (768, 16, 16), 1000).to("meta")
        z, y, level = torch.empty(1, 768, 16, 16), torch.zeros(1, dtype=torch.long), torch.ones(1)

    def step():
        with sdpa_kernel(SDPBackend.MATH), torch.device("meta"):
            losses, _ = METHODS[method].training_losses(
                lambda x, y, *more: net(x, y, *more, drop=y > 0), z, y, level, level, z)
        sum(losses.values()).backward()
    expected = flops.training_cost("SiT-T/1", method=method)
    counted = torchs_count(step)
    if method == "meanflow":                                  # of zeros: weights have no derivative
        counted -= flops.cost("SiT-T/1", **METHODS["meanflow"].network)[1][0].item() * 1e9
    assert close(expected[1].item() * 1e9, counted, 0.01 if method == "sphere-encoder" else 0.05) and expected[0] < expected[1]


def test_training_of_the_papers_runs():
    rows = {row["training"]: row for row in flops.training_table()}
    assert len(rows) == 9
    faces, imagenet = rows["animal-faces"], rows["imagenet"]
    assert faces["steps"] == 28_575 and rows["flowers"]["steps"] == 63_977
    assert imagenet["steps"] == 1_501_368
    assert close(faces["whole step"], 256 * 6 * 46.594 / 1e3)
    assert close(imagenet["step"], 512 * 6 * 0.2296)
    assert close(imagenet["whole run"], 600 * 1_281_167 * 6 * 238.117 / 1e9)
    assert close(faces["whole epoch"], 14_630 * 6 * 46.594 / 1e6)
    assert close(rows["flowers, Eq. 4"]["run"], 1.5 * rows["flowers"]["run"], 1e-9)
    hours = {row["hours, computed"]: row for row in flops.hours_table()}
    assert close(hours["imagenet"]["1 x H100, H200"], 1098.2e18 / (989e12 / 2) / 3600, 1e-3)
    assert close(hours["flowers"]["8 x MI210"], rows["flowers"]["whole run"] * 1e18 / (8 * 90.5e12 * 3600))
    assert close(rows["imagenet, encoding"]["whole run"] / imagenet["whole run"],
                 1 + 47.078 / 1428.7, 1e-4)


# ---- The command ---------------------------------------------------------------------------------

def test_tables(capsys):
    flops.main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 9 + 11 + 11 + 5 and all(line.endswith(" |") for line in tables)
    flops.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert [len(found[name]) for name in ("parts", "sampling", "training")] == [7, 9, 9]


def test_any_choice(capsys):
    flops.main("--model SiT-XL/1 --steps 4 --cfg --json".split())
    found = json.loads(capsys.readouterr().out)
    gflops = {row["what"]: (row["GFLOPs"], row["whole"]) for row in found["rows"]}
    assert found["NFE"] == 8 and found["parameters"] == 675_220_224
    assert close(gflops["a picture"][0], 8 * 230 + 213)
    assert close(gflops["a picture"][1], 8 * 238.117 + 221.648, 1e-4)
    flops.main(["--steps", "3"])
    out = capsys.readouterr().out
    assert "SiT-B/1" in out and "NFE 3" in out and max(map(len, out.splitlines())) <= 100
    flops.main(["--cfg", "--model", "SiT-S/1"])
    assert "NFE 8" in capsys.readouterr().out
    flops.main("--method sphere-encoder --model SiT-S/1 --json".split())
    found = json.loads(capsys.readouterr().out)
    with torch.device("meta"):
        net = build_network("sphere-encoder", "SiT-S/1", (768, 16, 16), 1000)
    assert found["parameters"] == sum(p.numel() for p in net.parameters())
    once = {row["what"]: row["whole"] for row in found["rows"]}
    assert once["a picture"] == 4 * once["decoder, once"] + 3 * once["encoder, once"]


@pytest.mark.parametrize("argv, message", [
    ("--model SiT-H/1", "SiT-XL/1"), ("--steps 0", "1 or more"), ("--steps -3", "1 or more"),
    ("--steps 1.5", "int"),
    ("--batch-size 4", "add --bench"), ("--bench --repeat 0", "1 or more"),
    ("--cfg 3", "arguments: 3"),
    ("--bench --device tpu", "--device tpu")])
def test_bad_arguments_end_in_one_line_and_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        flops.main(argv.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.fixture
def small(monkeypatch):
    """--bench with autoencoders of one block."""
    parts = {"encoder": lambda: DINOv2Encoder(depth=1), "decoder": lambda: ViTDecoder(depth=1)}
    build = flops.build
    monkeypatch.setattr(flops, "build",
                        lambda part, *args: parts.get(part, lambda: build(part, *args))().eval())
    flops.cost.cache_clear()
    yield "--bench --device cpu --model SiT-T/1 --batch-size 2 --repeat 2".split()
    flops.cost.cache_clear()


def test_bench(small, capsys):
    flops.main([*small, "--steps", "2", "--cfg", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == ["product, 2048 x 2048", "training step", "noise of a training step", "noise of sampling",
                          "sampling, 2 steps, guided", "decoding", "encoding"]
    for what, row in rows.items():
        assert 0 < row["from"] <= row["ms"] <= row["to"]
        assert row["used"] is None if what.startswith("noise") else row["used"] > 0
        assert what.startswith("product") or close(row["images/s"], 2 / row["ms"] * 1e3)
    for what, gflops in (("product, 2048 x 2048", 2 * 2.048 ** 3),
                         ("encoding", 2 * flops.cost("encoder")[1][1].item()),
                         ("training step", 2 * 6 * flops.cost("SiT-T/1")[1][1].item()),
                         ("sampling, 2 steps, guided", 2 * 4 * flops.cost("SiT-T/1")[1][1].item())):
        assert close(rows[what]["TFLOP/s"] * rows[what]["ms"], gflops)
    assert found["training"]["steps"] == 5 and all(map(math.isfinite, found["training"].values()))
    assert found["torch"] == torch.__version__ and found["dtype"] == "float32"
    assert found["device"].startswith("cpu")

    flops.main([*small, "--dtype", "bfloat16", "--repeat", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and sum("bfloat16" in line for line in lines
                                               if line.startswith("|")) == 3


def test_bench_says_what_went_wrong(small, monkeypatch, capsys):
    def no_number(denoiser, z, y, *_, **__):
        return {"loss": denoiser(torch.cat([z, z]), torch.cat([y, y])).mean() / 0}, (z, z)

    monkeypatch.setitem(METHODS, "sphere", METHODS["sphere"]._replace(training_losses=no_number))
    for message in ("step 0: the gradient norm is", "out of memory: lower --batch-size"):
        with pytest.raises(SystemExit) as exit:
            flops.main(small)
        out, err = capsys.readouterr()
        assert exit.value.code == 1 and out == "" and message in err.splitlines()[-1], err
        monkeypatch.setattr(flops, "bench", lambda *_: torch.empty(1 << 60))
