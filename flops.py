"""What it costs: the paper's GFLOPs, recomputed from the modules, and what this machine reaches.

    python flops.py                                       # the paper's tables, beside what it says
    python flops.py --model SiT-XL/1 --steps 4 --cfg      # any choice
    python flops.py --bench                               # measure this machine
    python flops.py --bench --against usual               # and how the plainest loop compares
    python flops.py --bench --model SiT-XL/1 --batch-size 64 --repeat 50

A multiply-accumulate (MAC) is two FLOPs. There are two conventions: the paper's counts linear
layers and convolutions; `whole` has attention's two products, too. All is for pictures of 256 x 256
and the official autoencoder's latents of 768 x 16 x 16.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import sphere
from baselines import METHODS, SphereEncoder
from model import SiT_models
from rae import DINOv2Encoder, ViTDecoder
from sample import keyed_noise, predict
from settings import PAPER, defaults
from train import Learner
from utils.cli import ArgumentParser, UserError, number, table_text
from utils.processes import (allow_tf32, autocast, compiles, peak_memory_gb, prefetch, setup,
                             user_errors)

# ---- The counter ---------------------------------------------------------------------------------

# torch's counter passes over what it does not know. These it lacks; they get the shapes of factors.
OF_VECTORS = {torch.ops.aten.mv: lambda a, *_, **__: 2 * math.prod(a),
              torch.ops.aten.dot: lambda a, *_, **__: 2 * math.prod(a),
              torch.ops.aten.addmv: lambda bias, a, *_, **__: 2 * math.prod(a)}
# Any other operation with such a name may hide products, and so may one that is not torch's own.
SUSPICIOUS = re.compile("mm_?$|mv_?$|dot$|addr|conv|attention|linear|linalg|solve|cholesky|qr$|svd|"
                        "eig|dist|fft|rnn|lstm|gru")
HARMLESS = re.compile("upsample")                             # bilinear interpolation


class Operations(TorchDispatchMode):
    """Which operations run inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(op._overloadpacket)
        return op(*args, **(kwargs or {}))


def count_macs(module, *inputs, attention=True):
    """MACs of module(*inputs): linear layers, convolutions and all other products of matrices.

    A copy of the module runs once on the meta device: no memory, no time, and attention comes apart
    into its products. attention=False leaves out batched products of matrices, as attention's two
    are. NotImplementedError names an operation that could hide products.
    """
    layers, products = counted(module, *inputs)
    return layers + products * attention


def counted(module, *inputs):
    """Returns MACs of layers, MACs of attention."""
    def to_meta(tree):
        return tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)

    own = [t for m in module.modules() for t in tree_leaves(dict(vars(m)))
           if isinstance(t, torch.Tensor)]
    with torch.inference_mode(False), torch.no_grad():        # inference mode hides linear's parts
        module, inputs = copy.deepcopy(module, {id(t): to_meta(t) for t in own}), to_meta(inputs)
        with torch.device("meta"), Operations() as operations, FlopCounterMode(
                display=False, custom_mapping=OF_VECTORS) as counter:
            module(*inputs)
    for op in operations.seen - set(counter.flop_registry):
        namespace, name = str(op).split(".")
        if namespace != "aten" or SUSPICIOUS.search(name) and not HARMLESS.search(name):
            raise NotImplementedError(f"count_macs does not know whether {op} multiplies matrices: "
                                      "tell it in flops.py")
    flops = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(n for name, n in flops.items() if "bmm" in name or "attention" in name)
    return (sum(flops.values()) - attention) // 2, attention // 2


# ---- On paper ------------------------------------------------------------------------------------

PICTURE, LATENT = (3, 256, 256), (768, 16, 16)
PEAKS = {"H100, H200": 989, "MI210": 181}                     # TFLOP/s in bfloat16, their makers'
SET_SIZES = {"animal-faces": 14_630, "flowers": 8_189, "imagenet": 1_281_167}             # pictures

# What the paper says. Millions of parameters and GFLOPs; of the autoencoder GMACs, cut to a whole
# number:
PARTS = {"SiT-B/1": (130, None), "SiT-XL/1": (674, 230), "decoder": (415, 213),
         "autoencoder": (502, 128)}
# GFLOPs of a picture in 2, 4 and 6 steps, its own and Sphere Encoder's:
SAMPLING = {"animal-faces": ((302, 390, 478), (1965, 4554, 7144)),
            "flowers": ((390, 567, 743), (3932, 9118, 14300)),
            "imagenet": ([None] * 3, [None] * 3)}
# GFLOPs of Sphere Encoder's encoder and decoder, counted with its own code (patch 8, 1,024 tokens,
# mixer depth 4), not here. A picture takes n decoders and n - 1 encoders, guided twice that.
SPHERE_ENCODER = {"animal-faces": (623.9, 670.6), "flowers": (624.2, 670.9),
                  "imagenet": (918.2, 977.1)}


def build(part, num_classes=1000, **more):
    return (DINOv2Encoder() if part == "encoder" else ViTDecoder() if part == "decoder"
            else SiT_models[part](num_classes=num_classes, **more)).eval()


@functools.cache
def cost(part, num_classes=1000, **more):
    """"encoder", "decoder" or a denoiser -> parameters; GFLOPs of a pass, float64 (2,): the paper's
    way and whole. more: as of model.SiT."""
    with torch.device("cpu" if part == "encoder" else "meta"):          # timm 1.0.9 looks at values
        module = build(part, num_classes, **more)
    C = more.get("in_channels", LATENT[0])
    x = torch.empty(1, *(PICTURE if part == "encoder" else (C, *LATENT[1:])))
    y = [torch.zeros(1, dtype=torch.long)] * (part in SiT_models)
    if "num_times" in more:
        y.append(torch.zeros(1, more["num_times"]))
    layers, attention = counted(module, x, *y)
    gflops = 2 * torch.tensor([layers, layers + attention], dtype=torch.float64) / 1e9
    return sum(p.numel() for p in module.parameters()), gflops


def sphere_encoder_cost(model):
    """GFLOPs of its encoder and its decoder, here two SiTs on pictures in patches of 16."""
    channels = SphereEncoder.latent_channels
    return cost(model, out_channels=channels)[1], cost(
        model, in_channels=channels, out_channels=LATENT[0])[1]


def sampling_cost(model, steps, guided, method="sphere"):
    """GFLOPs of a picture, both ways: the denoiser each step (guided twice), the decoder once."""
    if method == "sphere-encoder":
        encode, decode = sphere_encoder_cost(model)
        return (1 + guided) * (steps * decode + (steps - 1) * encode)
    once = cost(model, **METHODS[method].network)[1]
    return steps * (1 + guided) * once + cost("decoder")[1]


def training_cost(model, eq4=False, encoding=False, method="sphere"):
    """GFLOPs of an example, both ways, forward and twice as much backward.

    sphere: two views (with Eq. 4 three); flow: one; meanflow: one, and another forward for the
    derivative, in which both factors of attention's products have one (torch's counter sees
    a third forward, products of the weights' derivatives, which are zeros);
    sphere-encoder: two passes of each of its networks.
    """
    if method == "sphere-encoder":
        return 6 * sum(sphere_encoder_cost(model))
    once = cost(model, **METHODS[method].network)[1]
    if method == "meanflow":
        return 4 * once + torch.tensor([0, 1]) * (once[1] - once[0])
    views = 2 + eq4 if method == "sphere" else 1
    return 3 * views * once + encoding * cost("encoder")[1]


def off(value, said):
    return 100 * (value / said - 1) if said else None


def parts_table():
    rows = [(f"{model}, {classes} classes", model, *cost(model, classes))
            for model, classes in (("SiT-S/1", 1000), ("SiT-B/1", 102), ("SiT-L/1", 1000),
                                   ("SiT-XL/1", 1000))]
    encoder, decoder = cost("encoder"), cost("decoder")
    rows += [("encoder (DINOv2-B)", "encoder", *encoder), ("decoder (ViT-XL)", "decoder", *decoder),
             ("both, in GMACs", "autoencoder", encoder[0] + decoder[0],
              (encoder[1] + decoder[1]) / 2)]
    return [{"part": name, "million": parameters / 1e6, "M paper": million,
             "M %": off(parameters / 1e6, million), "GFLOPs": flops[0].item(), "paper": said,
             "%": off(flops[0].item(), said), "whole": flops[1].item()}
            for name, key, parameters, flops in rows
            for million, said in [PARTS.get(key, (None, None))]]


def sampling_table():
    rows = []
    for name in SET_SIZES:
        model, guided = defaults(name)["model"], defaults(name)["cfg"] != 1
        encoder, decoder = SPHERE_ENCODER[name]
        for steps, said, said_of_theirs in zip((2, 4, 6), *SAMPLING[name]):
            ours, whole = sampling_cost(model, steps, guided).tolist()
            theirs = (1 + guided) * (steps * decoder + (steps - 1) * encoder)
            rows.append({"set": name, "steps": steps, "NFE": steps * (1 + guided), "GFLOPs": ours,
                         "paper": said, "%": off(ours, said), "whole": whole, "SE": theirs,
                         "SE paper": said_of_theirs, "SE %": off(theirs, said_of_theirs),
                         "ratio": theirs / ours})
    return rows


def training_table():
    rows = []
    for name, pictures in SET_SIZES.items():
        model, batch, epochs = (defaults(name)[key] for key in ("model", "batch_size", "epochs"))
        steps = -(-epochs * pictures // batch)                             # as train.py has it
        for extra, options in (("", {}), (", Eq. 4", {"eq4": True}),
                               (", encoding", {"encoding": True})):
            flops, whole = training_cost(model, **options).tolist()
            rows.append({"training": name + extra, "steps": steps, "step": batch * flops / 1e3,
                         "whole step": batch * whole / 1e3,
                         "whole epoch": pictures * whole / 1e6,
                         "run": steps * batch * flops / 1e9,
                         "whole run": steps * batch * whole / 1e9})
    return rows


def hours_table():
    return [{"hours, computed": row["training"], **{
        f"{n} x {card}": row["whole run"] * 1e18 / (0.5 * peak * 1e12) / 3600 / n
        for card, peak in PEAKS.items() for n in (1, 8)}}
            for row in training_table() if row["training"] in SET_SIZES]


# ---- On this machine -----------------------------------------------------------------------------

def timed(run, device, repeat, warm_up):
    """Seconds of each of `repeat` runs after `warm_up` others; a GPU's by its own clock."""
    wait = getattr(torch, device.type).synchronize            # torch.cpu has one, too

    def mark():
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        wait()
        return time.perf_counter()

    for _ in range(warm_up):
        run()
    marks = [mark()]
    for _ in range(repeat):
        run()
        marks.append(mark())
    wait()
    return [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a
            for a, b in itertools.pairwise(marks)]


class RandomLatents:
    """In the place of rae.LatentCache, in memory."""

    def __init__(self, n):
        self.latents = torch.randn(n, 2, *LATENT).half().numpy()
        self.labels = torch.arange(n) % 1000

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, flips):
        return torch.from_numpy(self.latents[indices, flips]), self.labels[indices]


class UsualLoop:
    """The plainest loop over the same network: eager, float32, two forwards, an EMA tensor by
    tensor, data in line, a number read at every step."""

    def __init__(self, name, batch, latents, device):
        self.model = SiT_models[name]().to(device)
        self.ema = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PAPER["lr"], foreach=False)
        self.batch, self.latents, self.device = batch, latents, device

    def step(self):
        chosen = torch.randint(len(self.latents), (self.batch,)).numpy()
        z, y = self.latents.batch(chosen, chosen % 2)
        z, y = z.to(self.device).float(), y.to(self.device)
        hi, lo = (t.to(self.device) for t in sphere.noise_pair(
            self.batch, PAPER["p_mean"], PAPER["p_std"], PAPER["alpha_max"], PAPER["alpha_mix"],
            PAPER["mix_prob"]))
        eps, v = torch.randn_like(z), sphere.spherify(z)
        z_hi, z_lo = (self.model(sphere.add_noise(v, sigma, eps), y) for sigma in (hi, lo))
        loss = sphere.reconstruction_loss(z_lo, z) + sphere.consistency_loss(z_hi, z_lo)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, weight in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(PAPER["ema_decay"][0]).add_(weight, alpha=1 - PAPER["ema_decay"][0])
        return loss.item()


def bench(name, steps, guided, batch, dtype, device, repeat, compile=False, against=None):
    """Returns what was run, and a row for each measured thing. Weights and latents are random."""
    gpu, rows, rates = device.type != "cpu", [], {}

    def measure(what, n, kind, gflops, run):
        """A row for `run`: n examples (None: no pictures) of gflops each (None: not counted) in the
        dtype `kind`."""
        allow_tf32(kind == "tf32")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(run, device, repeat, warm_up=3 if gpu else 1)
        median = statistics.median(seconds)
        rate = gflops and (n or 1) * gflops / median / 1e3
        rates.setdefault(kind, rate)                          # the product comes first
        rows.append({"what": what, "dtype": kind, "ms": 1e3 * median, "from": 1e3 * min(seconds),
                     "to": 1e3 * max(seconds), "images/s": n and n / median, "TFLOP/s": rate,
                     "used": rate and rate / rates[kind], "GB": peak_memory_gb(device)})
        print(f"{what}, {kind}: {1e3 * median:.1f} ms", file=sys.stderr)  # if it does not end

    side = 8192 if gpu else 2048
    kinds = ["float32"] + ["tf32", "bfloat16"] * (device.type == "cuda")   # of the autoencoder
    for kind in dict.fromkeys((dtype, *kinds)):
        factors = torch.randn(2, side, side, device=device)
        factors = factors.bfloat16() if kind == "bfloat16" else factors
        measure(f"product, {side} x {side}", None, kind, 2 * side ** 3 / 1e9,
                functools.partial(torch.matmul, *factors))
    factors = None                                            # room for the next

    # A step as train.py does it, but for the latents, which are the same each time.
    learner = Learner({**PAPER, "model": name, "batch_size": batch, "dtype": dtype, "seed": 0},
                      LATENT, 1000, device, compile=compile)
    z, y = torch.randn(batch, *LATENT, device=device), torch.arange(batch, device=device) % 1000
    steps_done, latents = itertools.count(), RandomLatents(4 * batch)
    batches = prefetch(lambda step: learner.draw_inputs(latents, step, 0), itertools.count())

    def train(to_log=False):
        step = next(steps_done)
        sums = learner.add_gradients(step, batches, to_log)
        norm = learner.update(step, PAPER["lr"])
        return to_log and (sums["loss"].item(), norm.item())

    first, learner.waited, started = train(to_log=True), 0.0, time.perf_counter()
    measure("training step", batch, dtype, training_cost(name)[1].item(), train)
    last = train(to_log=True)
    learner.check()
    waiting = learner.waited / (time.perf_counter() - started)
    if against == "usual":
        usual = UsualLoop(name, batch, latents, device)
        measure("the usual loop's step", batch, "float32", training_cost(name)[1].item(),
                usual.step)
        usual = None

    def denoiser(v, y):
        return predict(learner.ddp_model, {}, dtype, v.contiguous(), y)

    measure("noise of a training step", batch, "float32", None,
            lambda: learner.draw_noise("eps", 0, 0, z))
    measure("noise of sampling", batch, "float32", None, lambda: [
        eps.to(device) for eps in itertools.islice(
            keyed_noise(0, range(batch), LATENT, False, steps), steps)])
    measure(f"sampling, {steps} steps" + ", guided" * guided, batch, dtype,
            steps * (1 + guided) * cost(name)[1][1].item(),
            lambda: sphere.sample(denoiser, z.shape, y, steps, 2.0 if guided else 1.0,
                                  null_class=1000))
    compiled = "not compiled" if learner.ddp_model is learner.raw_model else "compiled"
    learner = None
    pictures = torch.rand(batch, *PICTURE, device=device)
    for what, part, x in (("decoding", "decoder", z), ("encoding", "encoder", pictures)):
        model = build(part).to(device)
        for kind in kinds:
            with torch.no_grad(), autocast(kind, device):
                measure(what, batch, kind, cost(part)[1][1].item(), lambda: model(x))
    return {"model": name, "batch": batch, "dtype": dtype, "compiled": compiled,
            "torch": torch.__version__, "device": device_name(device), "repeat": repeat,
            "rows": rows, "training": {"steps": next(steps_done), "first loss": first[0],
                                       "last loss": last[0], "last gradient norm": last[1],
                                       "waiting for data": waiting}}


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")                         # platform.processor() is empty on Linux
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{device.type}: {name}, {torch.get_num_threads()} threads"


# ---- The command ---------------------------------------------------------------------------------

EXPLAINED = {
    "parts": """\
One pass. GFLOPs: 2 x MACs of linear layers and convolutions, the paper's convention; whole: with
attention's two products, too. paper: what it says, and % how far from that we are. Of encoder and
decoder together it gives GMACs, cut to a whole number.""",
    "sampling": """\
GFLOPs of a picture: the denoiser (SiT-B/1, for imagenet SiT-XL/1) at every step, the decoder once.
NFE: calls of the denoiser, two a step with guidance (flowers, imagenet). SE: Sphere Encoder,
n decoders + n - 1 encoders, twice that with guidance; what those cost is given, not computed here.
ratio: SE / GFLOPs.""",
    "training": """\
Training: two views of an example, forward and backward (2 x forward); 256 examples a step, 512 for
imagenet. Eq. 4: a third view, for latent consistency. encoding: of the pictures in every step.
A step in TFLOPs (10^12), an epoch in PFLOPs (10^15), a run in EFLOPs (10^18).""",
    "hours": "Hours of a whole run at half of the card's highest rate: computed, not run.",
    "steps": "{} training steps, all finite: loss {:.2f}, at last {:.2f}, gradient norm {:.2f};\n"
             "{:.1%} of their time was waiting for data",
    "bench": """\
{model}, batch {batch}, {dtype}, {compiled}, torch {torch}
{device}
Medians of {repeat} runs, from the fastest to the slowest. Rates are of `whole` FLOPs; used: the
share of the rate of the large product in the same dtype. GB: peak memory; on CUDA the device's in
this row, else the process's so far. Sampling is without decoding.""",
}


@user_errors
def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SiT_models, help="one denoiser; if not given SiT-B/1")
    parser.add_argument("--steps", type=number(int, 1), help="denoising steps; if not given 4")
    parser.add_argument("--cfg", action="store_true", help="with guidance: two calls a step")
    parser.add_argument("--method", choices=METHODS, help="of train.py; if not given sphere")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("measuring").add_argument
    add("--bench", action="store_true",
        help="measure this machine; without a GPU --model is SiT-S/1 if not given")
    add("--batch-size", type=number(int, 1),
        help="examples at a time; if not given 64, without a GPU 1")
    add("--repeat", type=number(int, 1),
        help="runs that are timed; if not given 20, without a GPU 5")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the denoiser; if not given bfloat16, without a GPU float32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="as of train.py; if not given, on a GPU where a compiler is there")
    add("--against", choices=("usual",), help="measure the plainest training loop, too: eager, "
        "float32, two forwards, data in line")
    add("--device", help="auto, cpu, cuda or mps; if not given auto")
    args = parser.parse_args(argv)
    steps, guided = args.steps or 4, args.cfg

    if args.bench and args.method:
        raise UserError("--bench measures the sphere: leave out --method")
    if args.bench:
        device = setup(args.device or "auto")[2]
        model, batch, dtype, repeat = "SiT-B/1", 64, "bfloat16", 20
        if device.type == "cpu":
            model, batch, dtype, repeat = "SiT-S/1", 1, "float32", 5
        found = bench(args.model or model, steps, guided, args.batch_size or batch,
                      args.dtype or dtype, device, args.repeat or repeat,
                      compiles(args.compile, device), args.against)
        text = (f"{EXPLAINED['bench'].format(**found)}\n\n{table_text(found['rows'])}\n\n" +
                EXPLAINED["steps"].format(*found["training"].values()))
        if args.against:
            ms = {row["what"]: row["ms"] for row in found["rows"]}
            ratio = ms["the usual loop's step"] / ms["training step"]
            text += f"\nthe usual loop takes {ratio:.2f} times as long"
    elif (args.batch_size or args.repeat or args.dtype or args.device or args.against
          or args.compile is not None):
        raise UserError("--batch-size, --repeat, --dtype, --compile, --against and --device are "
                        "for measuring: add --bench")
    elif args.model or args.steps or guided or args.method:
        model, method = args.model or "SiT-B/1", args.method or "sphere"
        network = {**METHODS[method].network, "in_channels": LATENT[0]}
        parts = {"the denoiser, once": cost(model, **network)[1],
                 "the decoder, once": cost("decoder")[1]}
        if method == "sphere-encoder":
            parts = dict(zip(("encoder, once", "decoder, once"), sphere_encoder_cost(model)))
        parts |= {"a picture": sampling_cost(model, steps, guided, method),
                 "an example in training": training_cost(model, method=method)}
        found = {"model": model, "parameters": cost(model, **network)[0], "steps": steps,
                 "guided": guided, "NFE": steps * (1 + guided),
                 "rows": [{"what": what, "GFLOPs": flops[0].item(), "whole": flops[1].item()}
                          for what, flops in parts.items()]}
        text = (f"{model}, {found['parameters']:,} parameters with 1000 classes; --steps {steps}, "
                f"{'with' if guided else 'no'} guidance: NFE {found['NFE']}\n\n"
                f"{table_text(found['rows'])}")
    else:
        found = {"parts": parts_table(), "sampling": sampling_table(),
                 "training": training_table(), "hours": hours_table()}
        signed = {key: "+.2f" for key in ("%", "M %", "SE %")}
        text = "\n\n".join(f"{EXPLAINED[name]}\n\n{table_text(rows, signed)}"
                           for name, rows in found.items())
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
