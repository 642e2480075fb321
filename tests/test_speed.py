"""Nothing waits: data come ahead, no number is read on a step that is not logged, one compiled call."""
import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flops
import sample
import train
from conftest import ROOT, fit_rae, train_args
from data import load_dataset
from model import SiT_models
from rae import LatentCache
from settings import PAPER
from utils.cli import UserError
from utils.processes import compiles, keyed_generator, noise_of_each, prefetch

RUN = {**PAPER, "model": "SiT-T/1", "batch_size": 8, "dtype": "float32", "seed": 0, "clip": 1.0}
CPU = torch.device("cpu")


class Latents:
    """In the place of rae.LatentCache."""
    z = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0)).half()

    def __len__(self):
        return 32

    def batch(self, indices, flips):
        return self.z[indices], torch.as_tensor(indices) % 10


def learner(**more):
    return train.Learner(RUN, (16, 3, 3), 10, CPU, **more)


def batches(of, steps=100):
    return prefetch(lambda step: of.draw_inputs(Latents(), step, 0), range(steps))


def test_prefetch_keeps_the_order_and_the_errors():
    threads = set()

    def load(job):
        threads.add(threading.current_thread())
        if job == 5:
            raise UserError("5 is bad")
        return job * 10
    found = prefetch(load, itertools.count())
    assert [next(found) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(UserError, match="5 is bad"):
        next(found)
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_inputs_are_a_function_of_seed_and_step(photos, tmp_path):
    """Asked for ahead, out of turn and from another thread; two halves make the whole."""
    dataset = load_dataset(str(photos), 32, root=tmp_path)
    latents = LatentCache(dataset, fit_rae("pixels", dataset.load(range(36))), tmp_path)
    whole, halves = learner(), learner(accumulate=2)
    for step in (7, 0, 7):
        full = whole.draw_inputs(latents, step, 0)
        parts = [halves.draw_inputs(latents, step, m) for m in (0, 1)]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(full, zip(*parts)))
    assert not torch.equal(full[0], whole.draw_inputs(latents, 8, 0)[0])


class Reads(TorchDispatchMode):
    """Counts what reads a number of a tensor, or copies it to another device."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += op._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero,
                                         torch.ops.aten.nonzero, torch.ops.aten._to_copy)
        return op(*args, **(kwargs or {}))


def test_no_number_is_read_on_a_step_that_is_not_logged():
    """Each would stop the CPU until the GPU has done all that came before."""
    of = learner()
    ready = iter([of.draw_inputs(Latents(), step, 0) for step in range(3)])
    with Reads() as reads:
        for step in range(3):
            of.add_gradients(step, ready)
            of.update(step, 1e-3)
    assert reads.n == 3                                       # latents, from half to float32
    with reads:
        of.check()
    assert reads.n == 4                                       # it would have been seen


@pytest.mark.gpu("no step waits for it")
def test_no_step_waits_for_the_gpu():
    of = train.Learner({**RUN, "dtype": "bfloat16"}, (16, 3, 3), 10, torch.device("cuda"))
    ready = batches(of)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 5 else "default")
        of.add_gradients(step, ready)
        of.update(step, 1e-3)
    of.check()


@pytest.mark.gpu("50 steps of the paper's sizes; bfloat16 against float32")
@pytest.mark.parametrize("name", ["SiT-B/1", "SiT-XL/1"])
def test_the_papers_sizes(name, device="cuda", steps=50, shape=(768, 16, 16)):
    """Gradients of Eq. 2 alone: Eq. 3 has the signs of differences that are smaller than bfloat16's rounding at
    first (0.99 on a CPU)."""
    latents, z = flops.RandomLatents(16), torch.randn(16, *shape).half()
    latents.batch = lambda indices, flips: (z[indices], torch.as_tensor(indices))

    def start(**more):
        of = train.Learner({**RUN, "model": name, "batch_size": 16, **more}, shape, 1000, torch.device(device))
        return of, prefetch(lambda step: of.draw_inputs(latents, step, 0), range(steps))
    found = []
    for dtype in ("float32", "bfloat16"):
        of, ready = start(dtype=dtype, consistency=0)
        loss = of.add_gradients(0, ready, to_log=True)["loss"].item()
        found.append((loss, torch.cat([p.grad.flatten() for p in of.weights])))
    (a, exact), (b, half) = found
    assert abs(b / a - 1) < 0.01 and torch.cosine_similarity(exact, half, dim=0) > 0.999
    of, ready = start(dtype="bfloat16")
    losses = []
    for step in range(steps):
        losses.append(of.add_gradients(step, ready, to_log=True)["loss"].item())
        of.update(step, 1e-4)
    of.check()
    assert all(map(math.isfinite, losses))


def test_the_first_bad_step_is_remembered():
    of = learner()
    ready = batches(of)
    for step in range(5):
        of.add_gradients(step, ready)
        if step in (2, 4):
            of.weights[3].grad[0] = float("nan")
        of.update(step, 1e-3)
        if step == 1:
            of.check()
    with pytest.raises(UserError, match="step 2: the gradient norm is not finite"):
        of.check()


def test_averages_are_those_of_a_loop():
    of = learner()
    before, ready = [{k: v.clone() for k, v in ema.items()} for ema in of.emas], batches(of)
    for step in range(3):
        of.add_gradients(step, ready)
        of.update(step, 1e-2)
        for decay, ema in zip(RUN["ema_decay"], before):
            for name, value in of.raw_model.state_dict().items():
                ema[name].lerp_(value, 1 - min(decay, (1 + step) / (10 + step)))
    for ema, expected in zip(of.emas, before):
        assert all(torch.equal(ema[name], expected[name]) for name in expected)


def gradients(of):
    of.add_gradients(0, batches(of))
    return [p.grad for p in of.weights]


def test_checkpointed_activations_give_the_same_gradients():
    plain, checkpointed = gradients(learner()), gradients(learner(checkpoint_activations=True))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, checkpointed))


@pytest.mark.parametrize("backend", [
    "aot_eager", pytest.param("inductor", marks=[
        pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1: compiles the network, 20 s"),
        pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")])])
def test_a_compiled_network_is_the_same(backend, monkeypatch, capsys):
    """And its state dict is the model's."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **more: compile(network, backend=backend, **more))
    plain, compiled = learner(), learner(compile=True)
    assert "compiled in" in capsys.readouterr().out and compiled.ddp_model is not compiled.raw_model
    a, b = gradients(plain), gradients(compiled)
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b))
    assert compiled.state(1)["model"].keys() == plain.state(1)["model"].keys()
    predicted = [of.denoise(torch.zeros(8, dtype=bool), torch.ones(16, 16, 3, 3), torch.arange(16) % 10)
                 for of in (plain, compiled)]
    assert torch.allclose(*predicted, atol=1e-5)


def test_what_does_not_compile_runs_on(photos, tmp_path, monkeypatch, capsys):
    def no_compiler(network, **more):
        def forward(*args, **kwargs):
            raise RuntimeError("no\ncompiler here")
        return forward
    monkeypatch.setattr(torch, "compile", no_compiler)
    train.main(train_args(tmp_path, "--steps", "1", "--compile"))
    said = capsys.readouterr().err
    assert "note: not compiled, and slower for it (no compiler here); --no-compile" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compiles(None, CPU) is False and compiles(True, CPU) is True
    assert compiles(None, torch.device("cuda")) in (True, False)
    assert compiles(False, torch.device("cuda")) is False


def test_the_log_says_how_long_it_waited(photos, tmp_path, capsys):
    train.main(train_args(tmp_path, "--steps", "2", "--no-compile", "--checkpoint-activations"))
    line = json.loads((tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= line["waiting"] < 1


def test_noise_of_sampling_never_ends_and_is_each_pictures_own():
    """However often a sampler asks; what is drawn ahead is what would be drawn later."""
    for same in (False, True):
        long, short = (sample.keyed_noise(0, [3, 8], (4, 2, 2), same, steps) for steps in (6, 1))
        draws = [next(long) for _ in range(9)]
        assert all(torch.equal(a, next(short)) for a in draws)
        alone = sample.keyed_noise(0, [8], (4, 2, 2), same, 2)
        assert all(torch.equal(a[1:], next(alone)) for a in draws)
        assert torch.equal(draws[0], draws[1]) == same


@pytest.mark.parametrize("shape", [(96, 3, 3), (64, 32, 32)])               # by one thread, by three
def test_threads_draw_what_one_thread_draws(shape, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    by_threads, one_by_one = ([keyed_generator("test", i) for i in range(7)] for _ in range(2))
    for _ in range(2):                                        # and goes on where it was
        expected = torch.stack([torch.randn(shape, generator=g) for g in one_by_one])
        assert torch.equal(noise_of_each(by_threads, shape), expected)


def test_the_bench_against_the_usual_loop(monkeypatch, capsys):
    monkeypatch.setattr(flops, "LATENT", (8, 2, 2))
    monkeypatch.setattr(flops, "SiT_models", {"SiT-T/1": lambda: SiT_models["SiT-T/1"](input_size=2, in_channels=8)})
    torch.manual_seed(0)
    loop = flops.UsualLoop("SiT-T/1", 4, flops.RandomLatents(16), CPU)
    losses = [loop.step() for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
    for average, weight in zip(loop.ema.parameters(), loop.model.parameters()):
        assert not average.requires_grad or not torch.equal(average, weight) or weight.std() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its page faults")
def test_freed_memory_stays_with_the_process():
    """Else the system clears it anew, a page at a time, for each step on a CPU."""
    found = subprocess.run([sys.executable, "-c", """
import resource, torch
from utils.processes import setup
setup("cpu")
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 20) for _ in range(50)]         # 4 MB each
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del blocks
"""], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second = map(int, found.split())
    assert second < first / 4
