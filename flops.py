"""What it costs: the GFLOPs of the paper, recomputed from the modules, and what this machine reaches.

    python flops.py                                       # the paper's cost tables, beside what it says
    python flops.py --model SiT-XL/1 --steps 4 --cfg      # any choice
    python flops.py --bench                               # measure this machine: training, sampling, the autoencoder
    python flops.py --bench --model SiT-XL/1 --batch-size 64 --repeat 50

A multiply-accumulate (MAC) is two FLOPs. There are two conventions: the paper's counts linear layers and convolutions;
`whole` has attention's two products, too. All numbers are for pictures of 256 x 256 and the official autoencoder's
latents of 768 x 16 x 16.
"""
import contextlib
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

import sphere
from data import ArgumentParser, UsageError, UserError, number, user_errors
from model import SiT_models
from rae import DINOv2Encoder, ViTDecoder
from train import PAPER, PRESETS, autocast, peak_memory_gb, setup

# ---- The counter ----------------------------------------------------------------------------------------------------

# Below autograd few kinds of products are left: linear, einsum and the like arrive as these. The number is the first
# factor's place among the arguments; what is summed over is its last axis.
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
# No product of matrices hides in these, nor in views, nor in what PyTorch tags so. Everything else raises.
HARMLESS = set("""
    _unsafe_view clone copy _to_copy cat stack repeat flip roll constant_pad_nd pixel_shuffle pixel_unshuffle
    embedding index index_select gather scatter index_put masked_select tril triu
    empty empty_like new_empty zeros zeros_like new_zeros ones ones_like new_ones full full_like fill zero arange
    scalar_tensor linspace eye rand rand_like randn randn_like randint randperm bernoulli native_dropout
    sum mean prod max min amax amin argmax argmin any all var var_mean std cumsum sort topk linalg_vector_norm
    _softmax _safe_softmax _log_softmax native_layer_norm _fused_rms_norm native_group_norm native_batch_norm glu
    avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d _prelu_kernel hardswish upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa unsafe_split""".split())
ELEMENTWISE = {torch.Tag.pointwise, torch.Tag.inplace_view}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class MacCounter(TorchDispatchMode):
    """Adds up the MACs of what runs inside: `attention`, products of two tensors computed from `inputs`; `layers`."""

    def __init__(self, inputs):
        super().__init__()
        self.layers, self.attention, self.from_inputs = 0, 0, {}
        self.mark(inputs)

    def mark(self, tree):
        """By storage, which views share; the tensor is kept, so that no other storage takes the place."""
        self.from_inputs.update((t.untyped_storage()._cdata, t) for t in tensors(tree))

    def is_marked(self, tensor):
        return tensor.untyped_storage()._cdata in self.from_inputs

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::").partition(".")[0]          # "aten::add.Tensor" -> "add"
        product, sdpa = PRODUCTS.get(name), re.fullmatch("_scaled_dot_product_(?!.*backward).*attention.*", name)
        if not (product is not None or sdpa or name == "convolution" or name.removesuffix("_") in HARMLESS
                or op.namespace == "aten" and (op.is_view or ELEMENTWISE.intersection(op.tags))):
            raise NotImplementedError(f"count_macs does not know whether {op} multiplies matrices: tell it in flops.py")
        out = op(*args, **(kwargs or {}))
        if product is not None:
            a, b = args[product:product + 2]
            macs = out.numel() * a.shape[-1]
            if self.is_marked(a) and self.is_marked(b):
                self.attention += macs
            else:
                self.layers += macs
        elif sdpa:
            q, k, v = args[:3]                                             # (B, heads, T, D) each
            self.attention += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif name == "convolution":
            x, weight, transposed = args[0], args[1], args[6]
            self.layers += (x if transposed else out).numel() * weight[0].numel()
        if any(map(self.is_marked, tensors((args, kwargs)))):
            self.mark(out)
        return out


def count_macs(module, *inputs, attention=True):
    """MACs of module(*inputs): linear layers, convolutions and all other products of matrices -> int.

    A copy of the module runs once on the meta device: no memory, no time. attention=False leaves out products of two
    activations, as attention's two are; where a factor is not computed from the inputs it is a layer.
    NotImplementedError names an operation that could hide products.
    """
    layers, products = counted(module, *inputs)
    return layers + products * attention


def counted(module, *inputs):
    """-> MACs of layers, MACs of attention."""
    def to_meta(tree):
        return tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)

    with torch.inference_mode(False), torch.no_grad():                     # inference mode hides what linear is made of
        own = [t for m in module.modules() for t in tensors(dict(vars(m)))]
        module, inputs = copy.deepcopy(module, {id(t): to_meta(t) for t in own}), to_meta(inputs)
        with torch.device("meta"), MacCounter(inputs) as counter:
            module(*inputs)
    return counter.layers, counter.attention


# ---- On paper -------------------------------------------------------------------------------------------------------

PICTURE, LATENT = (3, 256, 256), (768, 16, 16)
SET_SIZES = {"animal-faces": 14_630, "flowers": 8_189, "imagenet": 1_281_167}              # pictures

# What the paper says. Millions of parameters and GFLOPs; for the autoencoder GMACs, cut to a whole number:
PARTS = {"SiT-B/1": (130, None), "SiT-XL/1": (674, 230), "decoder": (415, 213), "autoencoder": (502, 128)}
# GFLOPs of a picture in 2, 4 and 6 steps, its own and Sphere Encoder's:
SAMPLING = {"animal-faces": ((302, 390, 478), (1965, 4554, 7144)),
            "flowers": ((390, 567, 743), (3932, 9118, 14300)), "imagenet": ([None] * 3, [None] * 3)}
# GFLOPs of Sphere Encoder's encoder and decoder, counted with its own code (patch 8, 1,024 tokens, mixer depth 4), not
# here. A picture takes n decoders and n - 1 encoders, twice that with guidance.
SPHERE_ENCODER = {"animal-faces": (623.9, 670.6), "flowers": (624.2, 670.9), "imagenet": (918.2, 977.1)}


def build(part, num_classes=1000):
    return (DINOv2Encoder() if part == "encoder" else ViTDecoder() if part == "decoder"
            else SiT_models[part](num_classes=num_classes)).eval()


@functools.cache
def cost(part, num_classes=1000):
    """"encoder", "decoder" or a denoiser -> parameters; GFLOPs of one pass, float64 (2,): the paper's way and whole."""
    with torch.device("cpu" if part == "encoder" else "meta"):             # timm 1.0.9 looks at numbers as it builds
        module = build(part, num_classes)
    x, y = torch.empty(1, *(PICTURE if part == "encoder" else LATENT)), torch.zeros(1, dtype=torch.long)
    layers, attention = counted(module, x, *[y] * (part in SiT_models))
    gflops = 2 * torch.tensor([layers, layers + attention], dtype=torch.float64) / 1e9
    return sum(p.numel() for p in module.parameters()), gflops


def sampling_cost(model, steps, guided):
    """GFLOPs of a picture, both ways: the denoiser at every step, twice with guidance, and the decoder once."""
    return steps * (1 + guided) * cost(model)[1] + cost("decoder")[1]


def training_cost(model, eq4=False, encoding=False):
    """GFLOPs of an example, both ways: two views (with Eq. 4 three), forward and backward (twice a forward)."""
    return 3 * (2 + eq4) * cost(model)[1] + encoding * cost("encoder")[1]


def off(value, said):
    return 100 * (value / said - 1) if said else None


def parts_table():
    rows = [(f"{model}, {classes} classes", model, *cost(model, classes))
            for model, classes in (("SiT-S/1", 1000), ("SiT-B/1", 102), ("SiT-L/1", 1000), ("SiT-XL/1", 1000))]
    encoder, decoder = cost("encoder"), cost("decoder")
    rows += [("encoder (DINOv2-B)", "encoder", *encoder), ("decoder (ViT-XL)", "decoder", *decoder),
             ("both, in GMACs", "autoencoder", encoder[0] + decoder[0], (encoder[1] + decoder[1]) / 2)]
    return [{"part": name, "million": numbers / 1e6, "M paper": million, "M %": off(numbers / 1e6, million),
             "GFLOPs": flops[0].item(), "paper": said, "%": off(flops[0].item(), said), "whole": flops[1].item()}
            for name, key, numbers, flops in rows for million, said in [PARTS.get(key, (None, None))]]


def sampling_table():
    rows = []
    for name in SET_SIZES:
        model, guided, (encoder, decoder) = PRESETS[name]["model"], PRESETS[name]["cfg"] != 1, SPHERE_ENCODER[name]
        for steps, said, said_of_theirs in zip((2, 4, 6), *SAMPLING[name]):
            ours, whole = sampling_cost(model, steps, guided).tolist()
            theirs = (1 + guided) * (steps * decoder + (steps - 1) * encoder)
            rows.append({"set": name, "steps": steps, "NFE": steps * (1 + guided), "GFLOPs": ours, "paper": said,
                         "%": off(ours, said), "whole": whole, "SE": theirs, "SE paper": said_of_theirs,
                         "SE %": off(theirs, said_of_theirs), "ratio": theirs / ours})
    return rows


def training_table():
    rows = []
    for name, pictures in SET_SIZES.items():
        model, batch, epochs = (PRESETS[name][key] for key in ("model", "batch_size", "epochs"))
        steps = -(-epochs * pictures // batch)                             # as train.py has it
        for extra, options in (("", {}), (", Eq. 4", {"eq4": True}), (", encoding", {"encoding": True})):
            flops, whole = training_cost(model, **options).tolist()
            rows.append({"training": name + extra, "steps": steps, "step": batch * flops / 1e3,
                         "whole step": batch * whole / 1e3, "whole epoch": pictures * whole / 1e6,
                         "run": steps * batch * flops / 1e9, "whole run": steps * batch * whole / 1e9})
    return rows


# ---- On this machine ------------------------------------------------------------------------------------------------

def timed(run, device, repeat, warm_up):
    """Seconds of each of `repeat` runs after `warm_up` others, by the device's own clock on CUDA and ROCm."""
    wait = getattr(torch, device.type).synchronize                         # torch.cpu has one, too

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
    return [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in itertools.pairwise(marks)]


def trainer(model, z, y, dtype, seen):
    """-> a function that does a step as train.py does, on the same latents each time, with noise from the device.

    It appends the loss and the gradient norm to `seen`; UserError where they are not finite.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, PAPER["lr"], PAPER["betas"], weight_decay=PAPER["weight_decay"], fused=True)
    emas = {decay: {k: v.clone() for k, v in model.state_dict().items()} for decay in PAPER["ema_decay"]}

    def step():
        sigma_hi, sigma_lo = (sigma.to(z.device) for sigma in sphere.noise_pair(len(z)))
        drop = (torch.rand(len(z)) < PAPER["class_dropout_prob"]).to(z.device).repeat(2)

        def denoiser(v, y):
            with autocast(dtype, z.device):
                return model(v, y, drop=drop)

        losses, _ = sphere.training_losses(denoiser, z, y, sigma_hi, sigma_lo, torch.randn_like(z))
        loss = sum(losses.values())
        loss.backward()
        seen.append((loss.item(), torch.nn.utils.clip_grad_norm_(weights, math.inf).item()))
        if not all(map(math.isfinite, seen[-1])):
            raise UserError(f"training step {len(seen)} in {dtype}: loss {seen[-1][0]}, gradient norm {seen[-1][1]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for decay, ema in emas.items():
            for name, value in model.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
    return step


def bench(name, steps, cfg, batch, dtype, device, repeat):
    """-> what was run, and a row for each thing that was measured. Weights and latents are random."""
    gpu, guided, rows, rates = device.type != "cpu", cfg != 1, [], {}

    def measure(what, n, kind, gflops, run):
        """A row for `run`, which does n examples (None: no pictures) of gflops each in the dtype `kind`."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed(run, device, repeat, warm_up=3 if gpu else 1)
        median = statistics.median(seconds)
        rate = (n or 1) * gflops / median / 1e3
        rates.setdefault(kind, rate)                                       # the product comes first
        rows.append({"what": what, "dtype": kind, "ms": 1e3 * median, "from": 1e3 * min(seconds),
                     "to": 1e3 * max(seconds), "images/s": n and n / median, "TFLOP/s": rate,
                     "used": rate / rates[kind], "GB": peak_memory_gb(device)})

    side = 8192 if gpu else 2048

    def product(kind):                                                     # its factors go when it goes
        a, b = torch.randn(2, side, side, device=device).to(getattr(torch, kind))
        return lambda: a @ b

    for kind in dict.fromkeys((dtype, "float32")):                         # the autoencoder is float32, as in rae.py
        measure(f"product, {side} x {side}", None, kind, 2 * side ** 3 / 1e9, product(kind))

    model, seen = build(name).to(device), []
    z, y = torch.randn(batch, *LATENT, device=device), torch.arange(batch, device=device) % model.num_classes
    measure("training step", batch, dtype, training_cost(name)[1].item(), trainer(model.train(), z, y, dtype, seen))
    model.eval()

    def denoiser(v, y):
        with autocast(dtype, device):
            return model(v, y)

    measure(f"sampling, {steps} steps" + ", guided" * guided, batch, dtype,
            steps * (1 + guided) * cost(name)[1][1].item(),
            lambda: sphere.sample(denoiser, z.shape, y, steps, cfg, null_class=model.num_classes))
    pictures = torch.rand(batch, *PICTURE, device=device)
    for what, part, x in (("decoding", "decoder", z), ("encoding", "encoder", pictures)):
        model = build(part).to(device)
        with torch.no_grad():
            measure(what, batch, "float32", cost(part)[1][1].item(), lambda: model(x))
    losses, norms = zip(*seen)
    return {"model": name, "batch": batch, "dtype": dtype, "compiled": False, "torch": torch.__version__,
            "device": device_name(device), "repeat": repeat, "rows": rows,
            "training": {"steps": len(seen), "first loss": losses[0], "last loss": losses[-1],
                         "largest gradient norm": max(norms)}}


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")                                        # platform.processor() is empty on Linux
    names = re.findall("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{device.type}: {name}, {torch.get_num_threads()} threads"


# ---- The command ----------------------------------------------------------------------------------------------------

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
    "steps": "{} training steps, all finite: loss {:.2f}, at last {:.2f}; gradient norm up to {:.2f}",
    "bench": """\
{model}, batch {batch}, {dtype}, not compiled, torch {torch}
{device}
Medians of {repeat} runs, from the fastest to the slowest. Rates are of `whole` FLOPs; used: the share of
the rate of the large product in the same dtype. GB: peak memory; on CUDA the device's in this row,
else the process's so far. Sampling is without decoding.""",
}


def table_text(rows):
    """Rows with the same keys -> a Markdown table, aligned. None is an empty cell."""
    columns = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        largest = max((abs(v) for v in values if isinstance(v, float)), default=0)
        digits = "+.2f" if "%" in key else f".{(largest < 1e4) + (largest < 100) + (largest < 1)}f"
        cells = ["" if v is None else v if isinstance(v, str) else format(v, digits if isinstance(v, float) else ",")
                 for v in values]
        width, left = max(map(len, [key, *cells])), isinstance(values[0], str)
        cells = [key, "-" * width if left else "-" * (width - 1) + ":", *cells]
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))


@user_errors
def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SiT_models, help="one denoiser; if not given SiT-B/1")
    parser.add_argument("--steps", type=number(int, 1), help="denoising steps; if not given 4")
    parser.add_argument("--cfg", type=number(float, 0), nargs="?", const=2.0, default=1.0, metavar="W",
                        help="guidance: two calls a step, whatever its scale; 1 is none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("measuring").add_argument
    add("--bench", action="store_true", help="measure this machine; without a GPU --model is SiT-S/1 if not given")
    add("--batch-size", type=number(int, 1), help="examples at a time; if not given 64, without a GPU 1")
    add("--repeat", type=number(int, 1), help="runs that are timed; if not given 20, without a GPU 5")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of the denoiser; if not given bfloat16, without a GPU float32")
    add("--device", help="auto, cpu, cuda or mps; if not given auto")
    args = parser.parse_args(argv)
    steps, guided = args.steps or 4, args.cfg != 1

    if args.bench:
        with contextlib.redirect_stdout(sys.stderr):                       # which may say something of other GPUs
            device = setup(args.device or "auto")[2]
        model, batch, dtype, repeat = "SiT-B/1", 64, "bfloat16", 20
        if device.type == "cpu":
            model, batch, dtype, repeat = "SiT-S/1", 1, "float32", 5
        try:
            found = bench(args.model or model, steps, args.cfg, args.batch_size or batch, args.dtype or dtype, device,
                          args.repeat or repeat)
        except RuntimeError as error:                                      # of a CPU or MPS it has no class of its own
            if "memory" not in str(error):
                raise
            raise UserError("out of memory: try a smaller --batch-size or --model") from error
        text = (f"{EXPLAINED['bench'].format(**found)}\n\n{table_text(found['rows'])}\n\n" +
                EXPLAINED["steps"].format(*found["training"].values()))
    elif args.batch_size or args.repeat or args.dtype or args.device:
        raise UsageError("--batch-size, --repeat, --dtype and --device say how to measure: add --bench")
    elif args.model or args.steps or guided:
        model = args.model or "SiT-B/1"
        parts = {"the denoiser, once": cost(model)[1], "the decoder, once": cost("decoder")[1],
                 "a picture": sampling_cost(model, steps, guided), "an example in training": training_cost(model)}
        found = {"model": model, "parameters": cost(model)[0], "steps": steps, "guided": guided,
                 "NFE": steps * (1 + guided),
                 "rows": [{"what": k, "GFLOPs": v[0].item(), "whole": v[1].item()} for k, v in parts.items()]}
        text = (f"{model}, {found['parameters']:,} parameters with 1000 classes; --steps {steps}, "
                f"{'with' if guided else 'no'} guidance: NFE {found['NFE']}\n\n{table_text(found['rows'])}")
    else:
        found = {"parts": parts_table(), "sampling": sampling_table(), "training": training_table()}
        text = "\n\n".join(f"{EXPLAINED[name]}\n\n{table_text(rows)}" for name, rows in found.items())
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
