"""Train a Sphere Latent Encoder.

    python train.py                                   # the toy: drawn flowers, two to three minutes on two CPU cores
    python train.py --dataset path/to/photos --rae lite0          # a folder with one folder of pictures for each class
    torchrun --nproc-per-node gpu train.py --dataset flowers      # the paper's run; also animal-faces, imagenet

The same command again goes on where the run stopped. Everything random is a function of (seed, step, example), so
neither a stop nor (but for the order of sums) the number of processes changes the run. out/<run>/ receives args.json,
log.jsonl (a line a logged step), samples-*.png and ckpt.pt, from which sample.py draws.
"""
import contextlib
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sphere
from data import (ArgumentParser, ToyFlowers, UsageError, UserError, global_batch, keyed_generator,
                  number, user_errors, write_whole)
from fid import table_text, toy_report
from model import SiT_models
from rae import PRETRAINED, open_latents, open_pictures, open_rae, train_decoder
from sample import generate, picture_grid

# ---- Arguments ------------------------------------------------------------------------------------------------------

# The paper's settings (table A). Where its text gives no number the line says so: that default is ours.
PAPER = dict(
    rae="dinov2-b", image_size=256, model="SiT-B/1", epochs=500, batch_size=256, lr=1e-4,
    weight_decay=0.0, ema_decay=[0.9995, 0.9999],       # the second decay is ours, to compare
    betas=[0.9, 0.95], dtype="bfloat16",                # not given
    warmup_steps=0, decay_last=0.0, clip=0.0,           # constant rate; a clip is not mentioned
    noise_dist="lognorm", p_mean=0.0, p_std=1.0,        # mean and std not given
    alpha_max=85.0, alpha_mix=89.0, mix_prob=0.2,       # angles not given: Sphere Encoder's code
    reconstruct="low", latent_consistency=0.0, class_dropout_prob=0.1,      # low or both: not clear
    cfg=1.0, gamma=1.0, sampling_noise="fresh", sigma=None, sample_steps=4,     # gamma, fresh or same: not given
    log_every=50, sample_every=2000, save_every=1000)

# Small pictures, few numbers in a latent (about 1,000 in place of 196,608), minutes in place of days: a smaller angle
# hides the picture, the EMA is as much shorter as the run, and a high rate that falls at the end makes up for few steps.
SHORT = dict(
    PAPER, rae="toy", model="SiT-T/1", image_size=64, batch_size=64, steps=1500, lr=2e-3, warmup_steps=50,
    decay_last=0.3, clip=1.0, ema_decay=[0.995, 0.98], alpha_max=75.0, cfg=1.2, gamma=1.5, sampling_noise="same",
    sigma=5.0, dtype="float32", sample_every=500, save_every=500)

# Photographs through a small pretrained encoder (L = 4,096).
PHOTOS = dict(SHORT, model="SiT-XS/1", steps=1400, lr=4e-3, alpha_max=82.0, cfg=2.0, gamma=1.0, sigma=None)

PRESETS = {
    "toy": dict(SHORT, image_size=60, rae_patch=20, steps=2000),           # 3 x 3 patches, the flower in the middle one
    "PATH": SHORT,
    # The paper's FID at 2, 4, 6 steps: 12.22, 8.61, 7.85. Its guidance is not given: Sphere Encoder's.
    "flowers": dict(PAPER, epochs=2000, cfg=1.6),
    "animal-faces": dict(PAPER, epochs=500),                                                   # 10.63, 6.89, 6.18
    "imagenet": dict(PAPER, model="SiT-XL/1", epochs=600, batch_size=512, cfg=3.2,             # 6.85, 2.25, 2.11
                     sample_every=10_000, save_every=5000),
}


def parse_args(argv):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="toy", help="toy, flowers, animal-faces, imagenet, or the PATH of a folder of classes")
    add("--split", default="all", choices=("train", "val", "test", "all"), help="of flowers; the others have one")
    add("--skip-bad", action="store_true", help="leave out pictures that cannot be read, and count them")
    add("--image-size", type=number(int, 1), help="side of the pictures in pixels: 256 for dinov2-b")
    add("--rae", choices=("toy", *PRETRAINED, "dinov2-b"), help="the autoencoder; it decides about other defaults, too")
    add("--rae-patch", type=number(int, 1), default=16, help="side of the toy autoencoder's patches in pixels")
    add("--decoder-steps", type=number(int, 1), default=1200, help="steps in which the decoder of lite0 is trained first")
    add("--weights-dir", help="folder with the files of dinov2-b, put there by hand; without it: the Hugging Face Hub")
    add("--data-dir", default="datasets", help="where downloads and caches of latents go")
    add("--cache-latents", default="auto", choices=("auto", "yes", "no"), help="encode once; auto: if the disk has room")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=SiT_models, help="size and patch of the denoiser")
    add("--class-dropout-prob", type=number(float, 0, 1), help="share of labels replaced by the null class")
    add = parser.add_argument_group("method (sphere.py)").add_argument
    add("--noise-dist", choices=("lognorm", "uniform", "sphere-encoder"), help="how noise levels are drawn")
    add("--p-mean", type=number(float), help="mean of lognorm, before the sigmoid")
    add("--p-std", type=number(float, 0), help="standard deviation of lognorm, before the sigmoid")
    add("--alpha-max", type=number(float, 1, 89.9), help="largest noise angle, degrees")
    add("--alpha-mix", type=number(float, 1, 89.9), help="largest noise angle of the harder range mixed in, degrees")
    add("--mix-prob", type=number(float, 0, 1), help="share of examples from the harder range")
    add("--reconstruct", choices=("low", "both"), help="noise levels on which Eq. 2 is taken")
    add("--latent-consistency", type=number(float, 0), help="weight of Eq. 4, which the paper drops")
    group = parser.add_argument_group("optimisation")
    add, length = group.add_argument, group.add_mutually_exclusive_group().add_argument
    length("--steps", type=number(int, 1), help="optimisation steps in all; raise it to go on with a finished run")
    length("--epochs", type=number(int, 1), help="the same in passes over the data")
    add("--batch-size", type=number(int, 1), help="examples a step, over all processes")
    add("--accumulate", type=number(int, 1), default=1, help="micro-batches a step in each process, to save memory")
    add("--lr", type=number(float, 0), help="learning rate of AdamW")
    add("--betas", type=number(float, 0, 1), nargs=2, help="betas of AdamW")
    add("--weight-decay", type=number(float, 0), help="weight decay of AdamW")
    add("--warmup-steps", type=number(int, 0), help="steps over which the rate rises to --lr")
    add("--decay-last", type=number(float, 0, 1), help="last share of the run, in which the rate falls to 5%%")
    add("--clip", type=number(float, 0), help="largest gradient norm; 0: no limit")
    add("--ema-decay", type=number(float, 0, 1), nargs="+", help="decays of the averaged weights; samples use the first")
    add("--dtype", choices=("float32", "bfloat16"), help="of the network under autocast; weights stay float32")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--out-dir", help="default: out/<dataset>-<model>")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--log-every", type=number(int, 1), help="steps between lines of the log")
    add("--sample-every", type=number(int, 1), help="steps between grids of samples")
    add("--save-every", type=number(int, 1), help="steps between checkpoints")
    add = parser.add_argument_group("sampling (for the grids, and what sample.py starts from)").add_argument
    add("--sample-steps", type=number(int, 1), help="denoising steps")
    add("--cfg", type=number(float, 0), help="guidance scale; 1 is none")
    add("--gamma", type=number(float, 0), help="sigma decays as (1 - t / steps) ** gamma")
    add("--sampling-noise", choices=("fresh", "same"), help="new noise at each step, or the first again")
    add("--sigma", type=number(float, 0), help="noise at the start of the decay; without it tan(--alpha-max)")

    first = ArgumentParser(add_help=False)                                 # these two decide about the defaults
    first.add_argument("--dataset", default="toy")
    first.add_argument("--rae")
    known = first.parse_known_args(argv)[0]
    preset = PRESETS.get(known.dataset, PRESETS["PATH"])
    if known.rae and known.rae != preset["rae"]:
        preset = {"toy": SHORT, "dinov2-b": PAPER}.get(known.rae, {**PHOTOS, "rae": known.rae})
    parser.set_defaults(**{"steps": None, **preset, "epochs": None})
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (None if args.steps else preset["epochs"])
    if args.alpha_mix < args.alpha_max:
        parser.error(f"--alpha-mix {args.alpha_mix:g} is below --alpha-max {args.alpha_max:g}: the mix is harder")
    args.sigma = sphere.angle_to_sigma(args.alpha_max) if args.sigma is None else args.sigma
    args.out_dir = args.out_dir or f"out/{Path(args.dataset).resolve().name}-{args.model.replace('/', '-')}"
    return args


# ---- One process or many --------------------------------------------------------------------------------------------

def setup(device="auto"):
    """-> rank, world, torch.device; joins the process group when torchrun started several processes."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world == 1 and torch.cuda.device_count() > 1:
            print(f"one GPU of several is used; torchrun --nproc-per-node gpu {' '.join(sys.argv)} takes them all")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))  # downloads
    return rank, world, device


def autocast(dtype, device):
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource                                                        # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

def load_checkpoint(path):
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("model", "ema", "optimizer", "step", "args", "classes", "rae")}
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {path}") from None
    except Exception as error:                                             # no zip, no tensors, another program's keys
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path} is not a checkpoint of train.py ({why})") from error


def check_same_run(args, before):
    """A run goes on with the arguments and pictures it began with; its length and what happens beside it may change."""
    free = {"dataset", "pictures", "steps", "epochs", "accumulate", "device", "log_every", "sample_every", "save_every",
            "data_dir", "out_dir", "weights_dir", "cache_latents", "skip_bad", "decoder_steps", "sample_steps", "cfg",
            "gamma", "sampling_noise", "sigma"}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in vars(args).items()
               if name not in free and before.get(name) != value]
    if args.pictures != before["pictures"] and not changed:
        changed = [f"the pictures of {args.dataset} have changed"]
    if changed:
        raise UserError(f"{args.out_dir} holds another run ({'; '.join(changed)}): resume that, or give a new --out-dir")


# ---- Training -------------------------------------------------------------------------------------------------------

def learning_rate(step, args):
    rate = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
    falling = args.steps * args.decay_last                                 # steps; over them the rate falls to 5%
    return rate * min(1, 0.05 + 0.95 * (args.steps - step) / falling) if falling else rate


def by_angle(values, sigma):
    """(8,): sums of values (n,), then counts, in four bins of the noise angle: 0-22.5, 22.5-45, 45-67.5, 67.5-90 deg."""
    bins = (torch.rad2deg(torch.atan(sigma)) / 22.5).long().clamp(max=3)
    sums = torch.zeros(8, device=values.device).index_add(0, bins, values)
    return sums.index_add(0, bins + 4, torch.ones_like(values))


def log_line(line, names):
    angles = " ".join("-" if value is None else f"{value:.1f}" for value in line["loss_by_angle"])
    return (f"step {line['step']} " + " ".join(f"{name} {line[name]:.2f}" for name in names) +
            f" | by angle 0-22-45-68-90 deg: {angles} | gradient {line['grad_norm']:.1f}, "
            f"{line['images_per_s']:.0f} images/s, {line['memory_gb']:.1f} GB")


@user_errors
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup(args.device)
    try:
        train(args, rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(args, rank, world, device):
    say = print if rank == 0 else lambda *_: None
    if args.batch_size % (world * args.accumulate):
        raise UsageError(f"--batch-size {args.batch_size} does not divide into {world} processes x {args.accumulate} "
                         "micro-batches")
    micro = args.batch_size // (world * args.accumulate)
    out = Path(args.out_dir)

    # Pictures, autoencoder, latents.
    dataset = open_pictures(args, rank)
    args.pictures = dataset.recipe                                         # a run keeps to its pictures
    checkpoint = None
    if (out / "ckpt.pt").exists():
        checkpoint = load_checkpoint(out / "ckpt.pt")
        check_same_run(args, checkpoint["args"])
    rae = open_rae(args, dataset, rank, world, device, saved=checkpoint and checkpoint["rae"])
    latents = open_latents(args, dataset, rae, rank, world)
    if args.rae in PRETRAINED and not checkpoint:
        train_decoder(args, dataset, rae, latents, rank, world)
    N, num_classes = len(dataset.labels), len(dataset.classes)
    if args.epochs is not None:
        args.steps = -(-args.epochs * N // args.batch_size)

    # Model, optimizer, EMAs. `model` is always the raw one; `parallel` is what averages gradients.
    torch.manual_seed(args.seed)
    C, side, _ = rae.latent_shape
    model = SiT_models[args.model](input_size=side, in_channels=C, num_classes=num_classes,
                                   class_dropout_prob=args.class_dropout_prob).to(device)
    parallel = DistributedDataParallel(model) if world > 1 else model
    weights = [p for p in model.parameters() if p.requires_grad]           # all but the table of positions
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=args.betas, weight_decay=args.weight_decay, fused=True)
    emas = {str(decay): {k: v.clone() for k, v in model.state_dict().items()} for decay in args.ema_decay}
    start = 0
    if checkpoint:
        start = checkpoint["step"]
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        emas = {decay: {k: v.to(device) for k, v in ema.items()} for decay, ema in checkpoint["ema"].items()}
        checkpoint = None                                                  # its tensors are no longer needed

    say(f"{args.dataset}: {N:,} pictures, {num_classes} classes, latents {C} x {side} x {side}, L = {C * side ** 2:,}\n"
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} numbers, {args.dtype} on {world} x {device.type}\n"
        f"{args.steps} steps of {args.batch_size} = {world} processes x {args.accumulate} x {micro} pictures, "
        f"{args.steps * args.batch_size / N:.1f} epochs" + (f"; resuming {out} at step {start}" if start else ""))
    if start >= args.steps:
        return say(f"{out} is finished: raise --steps to go on, or draw from it: python sample.py --ckpt {out}/ckpt.pt")
    if rank == 0:
        with write_whole(out / "args.json") as part:
            part.write_text(json.dumps(vars(args), indent=1))
        log = out / "log.jsonl"                                            # what came after the checkpoint is done again
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        with write_whole(log) as part:
            part.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start))

    def save(step):
        state = {"model": model.state_dict(), "ema": emas, "optimizer": optimizer.state_dict(), "step": step,
                 "args": vars(args), "classes": dataset.classes, "rae": rae.saved()}
        with write_whole(out / "ckpt.pt") as part, open(part, "wb") as file:
            torch.save(state, file)

    def draw(indices, steps):
        """Pictures from the first EMA, label = index mod classes -> images, labels."""
        def denoiser(v, y):
            with autocast(args.dtype, device):
                return torch.func.functional_call(model, emas[str(args.ema_decay[0])], (v, y))
        model.eval()
        images = [generate(denoiser, rae, part, (part % num_classes).to(device), args.seed, steps, num_classes,
                           cfg_scale=args.cfg, gamma=args.gamma, noise=args.sampling_noise, sigma=args.sigma)
                  for part in indices.split(50)]
        model.train()
        return torch.cat(images), indices % num_classes

    def draw_grid(step):
        images, labels = draw(torch.arange(min(4 * num_classes, 40)), args.sample_steps)
        with write_whole(out / f"samples-{step:07d}.png") as part:
            picture_grid(images, min(num_classes, 10), [dataset.classes[label] for label in labels]).save(part)

    def accumulate_gradients(step, to_log):
        """Forward and backward of a step -> the losses' names and, where logged, their sums and those by noise angle."""
        # What is small is drawn for the global batch, then each process takes its part.
        g = keyed_generator("batch", args.seed, step)
        sigma_hi, sigma_lo = sphere.noise_pair(args.batch_size, args.noise_dist, args.p_mean, args.p_std, args.alpha_max,
                                               args.alpha_mix, args.mix_prob, generator=g)
        drop = torch.rand(args.batch_size, generator=g) < args.class_dropout_prob
        flips = torch.randint(2, (args.batch_size,), generator=g)
        indices = global_batch(N, args.batch_size, step, args.seed)

        sums = 0
        for m in range(args.accumulate):
            first = (rank * args.accumulate + m) * micro
            mine = slice(first, first + micro)
            z, y = (t.to(device) for t in latents.batch(indices[mine], flips[mine].numpy()))    # (b, C, h, w), (b,)
            z = z.float()
            hi, lo, dropped = (t[mine].to(device) for t in (sigma_hi, sigma_lo, drop))

            def noise(name):                                               # an example's own, whoever computes it
                generators = [keyed_generator(name, args.seed, step, first + i, device=device) for i in range(micro)]
                return torch.stack([torch.randn(z.shape[1:], generator=g, device=device) for g in generators])

            def denoiser(v, y):                                            # both levels of an example drop its label
                with autocast(args.dtype, device):
                    return parallel(v, y, drop=dropped.repeat(len(v) // micro))

            last = m == args.accumulate - 1
            with contextlib.nullcontext() if last or world == 1 else parallel.no_sync():
                losses, (z_hi, z_lo) = sphere.training_losses(
                    denoiser, z, y, hi, lo, noise("eps"), args.reconstruct,
                    noise("eps again") if args.latent_consistency else None)
                loss = losses["reconstruction"] + losses["consistency"]
                if args.latent_consistency:
                    loss = loss + args.latent_consistency * losses["latent_consistency"]
                (loss / args.accumulate).backward()
            if to_log:
                l1, cosine = sphere.l1_and_cosine(torch.cat([z_hi, z_lo]).detach(), torch.cat([z, z]))
                means = torch.stack([loss, *losses.values()]).detach() / (args.accumulate * world)
                sums = sums + torch.cat([means, by_angle(50 * l1 + cosine, torch.cat([hi, lo]))])
        return ["loss", *losses], sums

    model.train()
    clock, clock_step = time.perf_counter(), start
    with tqdm(total=args.steps, initial=start, desc=str(out), unit="step", disable=rank != 0) as bar:
        for step in range(start, args.steps):
            to_log = (step + 1) % args.log_every == 0 or step + 1 == args.steps
            names, sums = accumulate_gradients(step, to_log)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.clip or math.inf).item()
            if not math.isfinite(grad_norm):
                raise UserError(f"step {step}: the gradient norm is {grad_norm}; what {out} holds is from before that: "
                                "try a lower --lr, --clip 1 or --dtype float32")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for decay, ema in emas.items():
                warm = min(float(decay), (1 + step) / (10 + step))         # or the first weights would linger
                for name, value in model.state_dict().items():
                    ema[name].lerp_(value, 1 - warm)

            bar.update()
            step += 1
            if to_log:
                if world > 1:
                    dist.all_reduce(sums)
                sums, totals, counts = sums[:-8].tolist(), sums[-8:-4].tolist(), sums[-4:].tolist()
                now = time.perf_counter()
                line = {"step": step, "epoch": round(step * args.batch_size / N, 3), **dict(zip(names, sums)),
                        "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"],
                        "loss_by_angle": [total / n if n else None for total, n in zip(totals, counts)],
                        "images_per_s": (step - clock_step) * args.batch_size / (now - clock),
                        "memory_gb": peak_memory_gb(device)}
                clock, clock_step = now, step
                if rank == 0:
                    with open(out / "log.jsonl", "a") as file:
                        file.write(json.dumps(line) + "\n")
                    bar.write(log_line(line, names))
            if rank == 0 and (step % args.save_every == 0 or step == args.steps):
                save(step)
            if rank == 0 and (step % args.sample_every == 0 or step == args.steps):
                draw_grid(step)

    say(f"{out}/ckpt.pt is finished at step {args.steps}; draw from it: python sample.py --ckpt {out}/ckpt.pt")
    if args.dataset == "toy" and rank == 0:                                # its own quality number, at the end
        table = toy_report(dataset, ToyFlowers(args.image_size, "test"), rae.reconstruct, draw)
        with write_whole(out / "quality.json") as part:
            part.write_text(json.dumps(table, indent=1))
        print(f"\nguidance {args.cfg:g}, {args.sampling_noise} noise\n{table_text(table)}")


if __name__ == "__main__":
    main()
