"""Train a Sphere Latent Encoder.

    python train.py                               # the toy: drawn flowers, minutes on two CPU cores
    python train.py --dataset path/to/photos --rae lite0     # a folder of class folders of pictures
    torchrun --nproc-per-node gpu train.py --dataset flowers  # the paper's; animal-faces, imagenet

The same command again resumes the run; Ctrl-C and SIGTERM save before they end it. Everything
random is a function of (seed, step, example, kind of device): a run that is resumed, compiled or
in another number of processes differs in rounding, if at all. out/<run>/ receives args.json,
pictures.npz (files and their checksums), log.jsonl (a line a logged step), samples-*.png,
quality.json and ckpt.pt, from which sample.py draws. Every setting is explained in settings.py.
"""
import contextlib
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import settings
import sphere
from baselines import METHODS, NOISE, build_network, open_pairs, variant
from data import Unseen, describe, load_dataset
from laptop import report  # laptop
from model import SiT
from rae import AUTOENCODERS, open_latents, open_rae, picture_sides
from sample import draw, load_denoiser, load_run, predict, sampling_settings
from utils.checkpoint import (first_not_finite, hash_of, refuse_another_run,
                              refuse_another_start, save_tensors, start_weights)
from utils.cli import UserError, log_line, printable
from utils.files import append_line, cut_log, locked, write_json, write_whole
from utils.images import picture_grid, save_picture, what_changed, write_sums
from utils.processes import (STOPS, Stop, allow_tf32, autocast, barrier, compiled, compiles,
                             from_first, global_batch, keyed_generator, noise_of_each, note,
                             on_signals, peak_memory_gb, prefetch, say, setup, summed, user_errors)

WHAT_TO_DO = "what is on the disk is from before: try a lower --lr, --clip 1 or --dtype float32"

# ---- A step --------------------------------------------------------------------------------------


class Learner:
    """The denoiser with its optimizer and EMAs, and a step of its training.

    run: settings, at least those that define a run. raw_model is what is saved and sampled;
    ddp_model, which may also be compiled, averages gradients over `world` processes. A process
    takes its share of a batch in `accumulate` micro-batches.
    """

    def __init__(self, run, latent_shape, num_classes, device, rank=0, world=1, accumulate=1,
                 compile=False, checkpoint_activations=False):
        torch.manual_seed(run["seed"])
        self.run, self.device, self.world, self.accumulate = run, device, world, accumulate
        self.micro = run["batch_size"] // (world * accumulate)
        self.first = rank * accumulate * self.micro           # of the global batch
        self.pins = device.type == "cuda"                     # then copies are not waited for
        self.method = variant(run["method"], run["spherify"], run["reconstruct"])
        self.raw_model = build_network(run["method"], run["model"], latent_shape, num_classes)
        self.raw_model.to(device)
        for part in self.raw_model.modules():
            if isinstance(part, SiT):
                part.checkpoint_activations = checkpoint_activations
        self.ddp_model = DistributedDataParallel(self.raw_model) if world > 1 else self.raw_model
        if compile:
            n, num_times = self.method.levels * self.micro, self.method.network.get("num_times")
            more = [torch.zeros(n, num_times, device=device)] if num_times else []
            self.ddp_model = compiled(
                self.ddp_model, run["dtype"], torch.zeros(n, *latent_shape, device=device),
                torch.zeros(n, dtype=torch.long, device=device), *more,
                drop=torch.zeros(n, dtype=torch.bool, device=device))
        self.weights = [p for p in self.raw_model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=run["lr"], betas=run["betas"],
                                           weight_decay=run["weight_decay"], fused=True)
        self.emas = [{key: value.clone() for key, value in self.raw_model.state_dict().items()}
                     for _ in run["ema_decay"]]
        self.bad_step, self.waited = torch.tensor(-1, device=device), 0.0     # seconds, for data

    def state(self, step):
        """What a checkpoint has of it. UserError: something is not finite."""
        self.check()
        emas = {str(decay): ema for decay, ema in zip(self.run["ema_decay"], self.emas)}
        state = {"model": self.raw_model.state_dict(), "ema": emas,
                 "optimizer": self.optimizer.state_dict(), "step": step}
        if name := first_not_finite(state):
            raise UserError(f"step {step}: {name} is not finite; {WHAT_TO_DO}")
        return state

    def load(self, checkpoint, with_optimizer=True):
        self.raw_model.load_state_dict(checkpoint["model"])
        if with_optimizer:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(),
                                            "state": checkpoint["optimizer"]["state"]})
        self.emas = [{k: v.to(self.device, copy=True)
                      for k, v in checkpoint["ema"][str(decay)].items()}
                     for decay in self.run["ema_decay"]]

    def draw_inputs(self, latents, step, m):
        """Returns z (b, C, h, w) float16 (or baselines.Pairs) and y, sigma_hi, sigma_lo (or times
        t, r) and drop, (b,) each, of micro-batch m of a step. A function of (seed, step, m): a
        thread asks ahead."""
        run, n = self.run, self.run["batch_size"]
        # What is small is drawn for the global batch; then each process takes its part.
        g = keyed_generator("batch", run["seed"], step)
        if self.method.times:
            levels = self.method.times(n, run["p_mean"], run["p_std"], generator=g)
        else:
            noise = NOISE[run["noise_dist"]]
            levels = noise.pair(n, alpha_max_deg=run["alpha_max"], alpha_mix_deg=run["alpha_mix"],
                                mix_prob=run["mix_prob"], generator=g,
                                **{name: run[name] for name in noise.flags})
        drop = torch.rand(n, generator=g) < run["class_dropout_prob"]
        flips = torch.randint(2, (n,), generator=g) * run["flips"]
        first = self.first + m * self.micro
        mine = slice(first, first + self.micro)
        indices = global_batch(len(latents), n, step, run["seed"])[mine]
        inputs = *latents.batch(indices, flips[mine].numpy()), *(t[mine] for t in (*levels, drop))
        return [t.pin_memory() if self.pins and t.device.type == "cpu" else t for t in inputs]

    def draw_noise(self, name, step, m, z):
        """N(0, I) like z; that of an example is its own, whichever process computes it."""
        first = self.first + m * self.micro
        return noise_of_each([keyed_generator(name, self.run["seed"], step, first + i,
                                              device=z.device) for i in range(len(z))],
                             z.shape[1:], z.device)

    def denoise(self, drop, v, y, *more):
        """v (k b, C, h, w): the batch at k noise levels; an example drops the same label in all."""
        with autocast(self.run["dtype"], self.device):
            return self.ddp_model(v, y, *more, drop=drop.repeat(len(v) // len(drop)))

    def add_gradients(self, step, batches, to_log=False):
        """Forward and backward. Returns for the log this process's share of the mean losses, and
        sums and counts by angle.

        batches: an iterator of what draw_inputs returns.
        """
        # squared_error is only logged; what is not here has 1.
        weights = {"consistency": self.run["consistency"], "squared_error": 0,
                   "latent_consistency": self.run["latent_consistency"]}
        sums = {}
        for m in range(self.accumulate):
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            z, y, hi, lo, dropped = (t.to(self.device, non_blocking=self.pins) for t in batch)
            z = z.float()
            noise = [self.draw_noise("eps", step, m, z) if self.method.draws_noise else None]
            if self.run["latent_consistency"]:
                noise.append(self.draw_noise("eps again", step, m, z))
            last = m == self.accumulate - 1                   # only then gradients are averaged
            with contextlib.nullcontext() if last or self.world == 1 else self.ddp_model.no_sync():
                losses, predictions = self.method.training_losses(
                    partial(self.denoise, dropped), z, y, hi, lo, *noise)
                loss = sum(weights.get(name, 1) * value for name, value in losses.items())
                (loss / self.accumulate).backward()
            if to_log:
                parts = {name: value.detach() / (self.accumulate * self.world)
                         for name, value in {"loss": loss, **losses}.items()}
                if predictions:
                    both = sphere.distance(torch.cat(predictions).detach(), torch.cat([z, z]),
                                           *sphere.RECONSTRUCTION)
                    parts["loss_by_angle"] = by_angle(both, torch.cat([hi, lo]))
                sums = {name: sums.get(name, 0) + value for name, value in parts.items()}
        return sums

    def update(self, step, lr):
        """Returns the gradients' norm before they were clipped. It stays on the device: reading a
        number would make the CPU wait. See check."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.run["clip"] or math.inf)
        first_bad = ~norm.isfinite() & (self.bad_step < 0)
        self.bad_step = torch.where(first_bad, step, self.bad_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for decay, ema in zip(self.run["ema_decay"], self.emas):
            if not self.run["init_from"]:                     # the random start is soon forgotten
                decay = min(decay, (1 + step) / (10 + step))
            average = get_ema_multi_avg_fn(decay)
            average(list(ema.values()), list(self.raw_model.state_dict().values()), None)
        return norm

    def check(self):
        """UserError: a gradient was not finite. For a GPU a wait; before a log line and a save."""
        if (step := self.bad_step.item()) >= 0:
            raise UserError(f"step {step}: the gradient norm is not finite; {WHAT_TO_DO}")


def learning_rate(step, steps, lr, warmup_steps, decay_last):
    """It rises over warmup_steps, and falls to 5% over the last share of the steps."""
    rate, falling = lr * min(1, (step + 1) / max(1, warmup_steps)), steps * decay_last
    return rate * min(1, 0.05 + 0.95 * (steps - step) / falling) if falling else rate


def by_angle(values, sigma):
    """values (n,) -> sums and counts (2, 4) in four bins of the noise angle, each 22.5 degrees."""
    bins = (torch.rad2deg(torch.atan(sigma)) / 22.5).long().clamp(max=3)
    both = torch.stack([values, torch.ones_like(values)])
    return torch.zeros(2, 4, device=values.device).index_add(1, bins, both)


# ---- A run ---------------------------------------------------------------------------------------

def parse_args(argv=None):
    return settings.parse_args(argv, __doc__)


@user_errors
def main(argv=None):
    args = parse_args(argv)
    rank, _, _ = setup(args.device)
    run_on(args, from_first(open_dataset(args) if rank == 0 else None))


def open_dataset(args):
    """One process looks at the files; the others are told."""
    sides = picture_sides(args.rae, args.image_size, args.rae_patch)
    try:
        return load_dataset(args.dataset, *sides, args.data_dir, args.split, args.skip_bad)
    except UserError as error:                                # the teacher's may be gone
        teacher = load_run(args.init_from) if args.method == "distill" else None
        if not teacher or args.dataset != teacher["args"]["dataset"]:
            raise
        note(f"{error}; --method distill goes on without pictures")
        return Unseen(teacher)


def run_on(args, dataset):
    """A run on any data set (see data.py), with what parse_args returns."""
    rank, world, device = setup(args.device)                  # again: it may be called from Python
    say(f"{dataset.name}: {len(dataset.labels):,} pictures of {describe(dataset)}")
    side, _ = picture_sides(args.rae, args.image_size, args.rae_patch)
    H, W = (side, side) if isinstance(dataset, Unseen) else dataset.load([0]).shape[2:]
    if (H, W) != (side, side):
        raise UserError(f"--image-size {args.image_size}: pictures of {H} x {W} are not the {side} "
                        f"x {side} that --rae {args.rae} takes then")
    if len(dataset.classes) == 1 and args.cfg != 1:
        note(f"{dataset.name} has one class: there is nothing that guidance (--cfg) could tell "
             "apart")
    writes = rank == 0 and not args.encode_only               # one run at a time in a folder
    with locked(args.out_dir) if writes else contextlib.nullcontext():
        start_run(args, dataset, rank, world, device)


def start_run(args, dataset, rank, world, device):
    """Autoencoder, latents, model: new, or as the checkpoint has them; then the training."""
    out, num_classes = Path(args.out_dir), len(dataset.classes)
    run, distills = settings.defining(vars(args)), args.method == "distill"
    checkpoint = load_run(out / "ckpt.pt") if (out / "ckpt.pt").exists() else None
    start = checkpoint["step"] if checkpoint else 0
    if start != (first := from_first(start)):
        raise UserError(f"process {rank} finds step {start} in {out}, process 0 step {first}: all "
                        "must see the same --out-dir")
    init = load_run(args.init_from) if args.init_from and (distills or not checkpoint) else None
    if distills:
        run["teacher_sha256"] = args.teacher_sha256 = hash_of(next(iter(init["ema"].values())))
        args.sigma = init["args"]["sigma"] if args.sigma is None else args.sigma
    if checkpoint:
        refuse_another_run(out, run, dict(settings.idle(vars(args))), checkpoint["args"],
                           dataset.recipe, lambda: what_changed(out / "pictures.npz", dataset))
    if init:
        refuse_another_start(args.init_from, init, run, dataset.classes)
    rae = open_rae(args.rae, dataset, args.image_size, args.rae_patch, args.seed, device,
                   args.weights_dir, (checkpoint or init or {}).get("rae"))
    if distills:
        latents = open_pairs(args, init, load_denoiser(init, "first", device)[0],
                             rae.latent_shape, device, rank, world)
    else:
        latents = open_latents(dataset, rae, Path(args.data_dir) / "latents",
                               "yes" if args.encode_only else args.cache_latents, rank, world,
                               args.flips, check=args.encode_only)
    if args.encode_only:
        return
    train_decoder = AUTOENCODERS[args.rae].train_decoder
    if train_decoder and not (checkpoint or init):
        train_decoder(rae, dataset, latents, Path(args.data_dir) / "decoders", args.decoder_steps,
                      args.seed, rank, args.flips)

    # What is kept was made in full float32; from here on a bfloat16 run has TF32 for the rest.
    allow_tf32(args.dtype == "bfloat16")
    # Model, optimizer, EMAs.
    N = len(latents)
    if args.epochs is not None:
        args.steps = -(-args.epochs * N // args.batch_size)
    compile = start < args.steps and not METHODS[args.method].forward_mode
    learner = Learner(run, rae.latent_shape, num_classes, device, rank, world, args.accumulate,
                      compile and compiles(args.compile, device), args.checkpoint_activations)
    if checkpoint or init:
        learner.load(checkpoint or start_weights(init, run, dataset.classes),
                     with_optimizer=bool(checkpoint))
        checkpoint = init = None                              # their tensors are no longer needed
    C, side, _ = rae.latent_shape
    parameters = sum(p.numel() for p in learner.raw_model.parameters())
    say(f"latents {C} x {side} x {side}, L = {C * side ** 2:,}, "
        f"{'with' if args.flips else 'without'} mirror images\n"
        f"{args.model}: {parameters:,} parameters, {args.dtype} on {world} x {device.type}\n"
        f"{args.steps} steps of {args.batch_size} = {world} processes x {args.accumulate} x "
        f"{learner.micro} pictures, {args.steps * args.batch_size / N:.1f} epochs"
        + f"; resuming {out} at step {start}" * bool(start))
    train(args, learner, dataset, rae, latents, start, rank)


def train(args, learner, dataset, rae, latents, start, rank):
    """The loop, from step `start`."""
    out, N, classes = Path(args.out_dir), len(latents), dataset.classes
    arguments = {**vars(args), "pictures": dataset.recipe}
    counts = torch.bincount(dataset.labels, minlength=len(classes)).tolist()
    denoiser = partial(predict, learner.raw_model, learner.emas[0], args.dtype)
    sampler = partial(draw, denoiser, rae, seed=args.seed, null_class=len(classes),
                      **sampling_settings(arguments))

    def grid(step, again=True):
        """Up to four pictures of each class, 40 at most."""
        path, due = out / f"samples-{step:07d}.png", step % args.sample_every == 0
        if (due or step >= args.steps) and (again or not path.exists()):
            indices = torch.arange(min(4 * len(classes), 40))
            labels = indices % len(classes)
            images = sampler(indices, labels, steps=args.sample_steps)
            with write_whole(path) as part:
                save_picture(picture_grid(images, min(len(classes), 10),
                                          [classes[y] for y in labels]), part)

    if rank == 0 and start < args.steps:
        write_json(out / "args.json", arguments)
        write_sums(out / "pictures.npz", dataset)
        cut_log(out / "log.jsonl", start)
    if rank == 0 and start:
        grid(start, again=False)                              # if it was killed before it

    stop = Stop(start)
    jobs = ((step, m) for step in range(start, args.steps) for m in range(args.accumulate))
    batches = prefetch(lambda job: learner.draw_inputs(latents, *job), jobs)
    clock, clock_step = time.perf_counter(), start
    bar = tqdm(total=args.steps, initial=min(start, args.steps), desc=printable(out), unit="step",
               disable=rank > 0 or start >= args.steps or None)
    # Functions of a step and a dict; yours is one more, as lambda step, line: wandb.log(line, step)
    loggers = [partial(append_line, out / "log.jsonl"),
               lambda step, line: say(log_line(step, line), write=bar.write)]
    with on_signals(stop.receive):
        for step in range(start, args.steps):
            to_log = step + 1 == args.steps or (step + 1) % args.log_every == 0
            sums = learner.add_gradients(step, batches, to_log)
            lr = learning_rate(step, args.steps, args.lr, args.warmup_steps, args.decay_last)
            grad_norm = learner.update(step, lr)
            step += 1
            bar.update()
            if to_log:
                learner.check()
                now = time.perf_counter()
                losses = summed(sums)
                if "loss_by_angle" in losses:
                    losses["loss_by_angle"] = [total / n if n else None
                                               for total, n in zip(*losses["loss_by_angle"])]
                line = {"step": step, "epoch": round(step * args.batch_size / N, 3), **losses,
                        "grad_norm": grad_norm.item(), "lr": lr,
                        "images_per_s": (step - clock_step) * args.batch_size / (now - clock),
                        "waiting": learner.waited / (now - clock),
                        "memory_gb": peak_memory_gb(learner.device)}
                clock, clock_step, learner.waited = now, step, 0.0
                for log in loggers if rank == 0 else ():
                    log(step, line)
            signum = stop.after(step)
            if rank == 0 and (signum or step == args.steps or step % args.save_every == 0):
                save_tensors(out / "ckpt.pt", {**learner.state(step), "args": arguments,
                                               "classes": classes, "counts": counts,
                                               "rae": rae.saved()})
            if signum in STOPS:
                barrier()                                     # nobody leaves before it is saved
                raise UserError(f"stopped at step {step} and saved: the same command resumes it",
                                status=128 + signum)
            if rank == 0:
                grid(step)
    bar.close()
    if signums := [signum for signum in stop.received if signum in STOPS]:
        raise UserError("stopped after the last step; it is saved", status=128 + signums[0])
    if rank == 0:
        step = max(start, args.steps)
        path = printable(out / "ckpt.pt")
        say(f"{path} is finished at step {step}; draw from it: python sample.py --ckpt {path}; "
            "raise --steps to continue it")
        report.end_of_run(out, arguments, dataset, rae, sampler, step)  # laptop


if __name__ == "__main__":
    main()
