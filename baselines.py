"""What the paper compares itself with, and its own alternatives (Table 3).

    python train.py --method flow                       # SiT: flow matching
    python train.py --method meanflow                   # MeanFlow: average velocities
    python train.py --method sphere-encoder --rae pixels        # Sphere Encoder, on pictures
    python train.py --noise-dist uniform                # Table 3; also --reconstruct both
    python train.py --no-spherify                       # Table 3
    python train.py --method distill --init-from CKPT   # ours: a run's sampler in one step; with
                                                        # that run's --dataset, --rae and --model

Each method is two functions of tensors like sphere.py's: training_losses, from a denoiser and a
batch, and sample. METHODS and NOISE, at the end, are what train.py and sample.py choose from.
"""
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sphere
from model import SiT, SiT_models
from rae import LatentCache
from sphere import (add_noise, distance, fresh_noise, full_precision, guided, over_latents,
                    spherify)
from utils.checkpoint import hash_of
from utils.cli import UserError
from utils.processes import keyed_generator, noise_of_each, say

# ---- Table 3: other noise levels -----------------------------------------------------------------


def uniform_pair(n, alpha_max_deg, alpha_mix_deg, mix_prob, generator=None):
    """As sphere.noise_pair, with r_a, r_b ~ U[0, 1]."""
    r_a, r_b = (torch.rand(n, generator=generator) for _ in range(2))
    return sphere.with_mix(torch.maximum(r_a, r_b), torch.minimum(r_a, r_b), alpha_max_deg,
                           alpha_mix_deg, mix_prob, generator)


def stratified_pair(n, alpha_max_deg, alpha_mix_deg, mix_prob, generator=None):
    """Sphere Encoder's: r_hi ~ U[0, 1], one from each n-th of it; r_lo = r_hi * U[0, 0.5]."""
    r_hi = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    r_lo = r_hi * 0.5 * torch.rand(n, generator=generator)
    return sphere.with_mix(r_hi, r_lo, alpha_max_deg, alpha_mix_deg, mix_prob, generator)


# ---- Table 3: Eq. 2 on both levels; no sphere ----------------------------------------------------

def on_both_levels(training_losses, denoiser, z, *batch):
    """training_losses with Eq. 2 as the mean over both predictions."""
    losses, (z_hi, z_lo) = training_losses(denoiser, z, *batch)
    losses["reconstruction"] = (losses["reconstruction"] + sphere.reconstruction_loss(z_hi, z)) / 2
    return losses, (z_hi, z_lo)


def flat_losses(denoiser, z, y, sigma_hi, sigma_lo, eps, eps_again=None):
    """As sphere.training_losses, with the identity in the place of f."""
    noisy = torch.cat([z + over_latents(sigma, z) * eps for sigma in (sigma_hi, sigma_lo)])
    z_hi, z_lo = denoiser(noisy, torch.cat([y, y])).chunk(2)
    losses = {"reconstruction": sphere.reconstruction_loss(z_lo, z),
              "consistency": sphere.consistency_loss(z_hi, z_lo)}
    if eps_again is not None:
        again = denoiser(full_precision(z_hi) + over_latents(sigma_hi, z) * eps_again, y)
        losses["latent_consistency"] = distance(again, z_hi, *sphere.LATENT_CONSISTENCY).mean()
    return losses, (z_hi, z_lo)


@torch.no_grad()
def flat_sample(denoiser, shape, y, steps, cfg_scale=1.0, sigma=sphere.decay(), noise=None,
                null_class=None, trajectory=None):
    """As sphere.sample, with the identity in the place of f. Without it the network sees lengths,
    so line 2 draws noise of the length that it knows, sigma(0, T) (our reading)."""
    noise = fresh_noise(shape, device=y.device) if noise is None else noise
    z = sigma(0, steps) * next(noise)
    for t in range(1, steps + 1):
        z_hat = guided(denoiser, z, y, cfg_scale, null_class)
        if trajectory is not None:
            trajectory.append(z_hat)
        if t < steps:
            z = z_hat + sigma(t, steps) * next(noise)
    return z_hat


# ---- Time, for flow matching and MeanFlow: 0 is the latent z, 1 is noise -------------------------

class TimedSiT(SiT):
    """SiT that is told num_times times: forward(x, y, times), times (B, num_times) in [0, 1]."""

    def __init__(self, num_times, **sizes):
        self.num_times = num_times
        super().__init__(**sizes)

    def initialize_weights(self):
        hidden_size = self.y_embedder.embedding_dim
        self.t_embedders = nn.ModuleList(TimestepEmbedder(hidden_size)
                                         for _ in range(self.num_times))
        super().initialize_weights()

    def embeddings(self):
        return [self.y_embedder.weight,
                *(embed.mlp[i].weight for embed in self.t_embedders for i in (0, 2))]

    def condition(self, y, times):
        c = self.y_embedder(y)                                           # (B, D)
        for embed, t in zip(self.t_embedders, times.unbind(1), strict=True):
            c = c + embed(t)
        return c


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D). As in SiT t is not multiplied by 1,000, as it is in DiT: MeanFlow
    differentiates by it."""

    def __init__(self, hidden_size, frequencies=128):
        super().__init__()
        self.register_buffer("omega", 10000.0 ** (-torch.arange(frequencies) / frequencies),
                             persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, hidden_size), nn.SiLU(),
                                 nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        angle = t.unsqueeze(1) * self.omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def times(n, p_mean=0.0, p_std=1.0, r_equals_t=0.75, generator=None):
    """Two times for each of n examples -> t >= r, each (n,): logit-normal, the larger is t.

    With probability r_equals_t r then becomes t: MeanFlow's (section 4.3), in the order of its
    official code. With r_equals_t = 1 one is drawn, as Esser et al. 2024 train flow matching.
    """
    a, b = torch.sigmoid(p_mean + p_std * torch.randn(2, n, generator=generator))
    one = torch.rand(n, generator=generator) < r_equals_t
    t = a if r_equals_t == 1 else torch.maximum(a, b)
    return t, torch.where(one, t, torch.minimum(a, b))


def velocity(denoiser, x, y, at, cfg_scale, null_class):
    """The network at the times `at`, one or two numbers, with guidance in one call: float32."""
    at = torch.tensor(at, device=x.device)

    def told(x, y):
        return denoiser(x, y, at.expand(len(x), -1))          # (B, num_times)
    return guided(told, x, y, cfg_scale, null_class)


# ---- Flow matching: SiT, Ma et al. 2024, arXiv 2401.08740 ----------------------------------------

def flow_losses(denoiser, z, y, t, r, eps):
    """The mean of |v(x_t, t) - (eps - z)|^2: the velocity of the linear path.

    z and eps (B, C, H, W), y and t (B,); r is MeanFlow's, not used.
    """
    x = (1 - over_latents(t, z)) * z + over_latents(t, z) * eps             # Eq. 1, linear
    v = full_precision(denoiser(x, y, t.unsqueeze(1)))
    return {"velocity": (v - (eps - z)).square().mean()}, ()


@torch.no_grad()
def flow_sample(denoiser, shape, y, steps, cfg_scale=1.0, noise=None, null_class=None,
                trajectory=None, solver="euler"):
    """dx = v dt from noise at t = 1 to t = 0 in equal steps -> z. Arguments as sphere.sample's.

    solver: "euler", or "heun", which calls the network twice a step.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise ValueError(f"{steps} steps of {solver!r}: take 1 or more, of 'euler' or 'heun'")
    x = next(noise or fresh_noise(shape, device=y.device))
    for i in range(steps):
        t, r = 1 - i / steps, 1 - (i + 1) / steps
        v = velocity(denoiser, x, y, [t], cfg_scale, null_class)
        if trajectory is not None:
            trajectory.append(x - t * v)                      # where the line from here ends
        if solver == "heun":
            v = (v + velocity(denoiser, x - (t - r) * v, y, [r], cfg_scale, null_class)) / 2
        x = x - (t - r) * v
    return x


# ---- MeanFlow: Geng et al. 2025, arXiv 2505.13447 ------------------------------------------------

def meanflow_losses(denoiser, z, y, t, r, eps, p=1.0, c=1e-3):
    """The network u(x_t, t, t - r) learns the average velocity between r and t by MeanFlow's Eq. 6,
    u = v - (t - r) du/dt, its right side held fixed; weighted by 1 / (|error|^2 + c)^p (Eq. 22).

    z and eps (B, C, H, W), y, t >= r (B,). "squared_error" is for the log: with p = 1 the loss
    itself stays near 1.
    """
    x = (1 - over_latents(t, z)) * z + over_latents(t, z) * eps
    v = eps - z

    # Eq. 8: du/dt = v d_x u + d_t u. Attention's fused kernels have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        x, t_and_dt = forward_ad.make_dual(x, v), forward_ad.make_dual(t, torch.ones_like(t))
        u = denoiser(x, y, torch.stack([t_and_dt, t_and_dt - r], dim=1))
        found, du_dt = forward_ad.unpack_dual(full_precision(u))
    target = v - over_latents(t - r, z) * du_dt               # Eq. 10
    error = (found - target.detach()).square().flatten(1)     # (B, L)
    weight = 1 / (error.detach().sum(1) + c) ** p
    return {"average_velocity": (weight * error.sum(1)).mean(),
            "squared_error": error.detach().mean()}, ()


@torch.no_grad()
def meanflow_sample(denoiser, shape, y, steps, cfg_scale=1.0, noise=None, null_class=None,
                    trajectory=None):
    """x_r = x_t - (t - r) u(x_t, t, t - r) (Eq. 12) in equal steps -> z. As sphere.sample.

    Guidance extrapolates average velocities; the paper's own trains it in.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    x = next(noise or fresh_noise(shape, device=y.device))
    for i in range(steps):
        t, r = 1 - i / steps, 1 - (i + 1) / steps
        x = x - (t - r) * velocity(denoiser, x, y, [t, t - r], cfg_scale, null_class)
        if trajectory is not None:
            trajectory.append(x)
    return x


# ---- Sphere Encoder: Yue et al. 2026, arXiv 2602.15030 -------------------------------------------

class SphereEncoder(nn.Module):
    """Two SiTs, pictures in patches (B, C, H, W) to latents (B, latent_channels, H, W) and back."""

    latent_channels = 96                                      # or C, if that is less

    def __init__(self, in_channels, **sizes):
        super().__init__()
        latent_channels = min(in_channels, self.latent_channels)
        self.encoder = SiT(in_channels=in_channels, out_channels=latent_channels, **sizes)
        self.decoder = SiT(in_channels=latent_channels, out_channels=in_channels, **sizes)

    def forward(self, x, y, part="encoder", drop=None):
        return getattr(self, part)(x, y, drop=drop)


def sphere_encoder_losses(denoiser, x, y, sigma_hi, sigma_lo, eps):
    """x (B, C, H, W) pictures in patches, y and both noise levels (B,), eps as x: of its channels
    the latent takes the first.

    Pixel reconstruction and consistency by smooth L1, latent consistency by the cosine, weighted as
    sphere.py's, which is ours. The paper's LPIPS is left out: it needs a network of its own.
    """
    z = full_precision(denoiser(x, y, "encoder"))
    v, eps = spherify(z), eps[:, :z.shape[1]]
    noisy = torch.cat([add_noise(v, sigma_hi, eps), add_noise(v, sigma_lo, eps)])
    x_hi, x_lo = full_precision(denoiser(noisy, torch.cat([y, y]), "decoder")).chunk(2)
    again = denoiser(x_hi, y, "encoder")
    return {"reconstruction": sphere.RECONSTRUCTION[0] * F.smooth_l1_loss(x_lo, x),
            "consistency": sphere.CONSISTENCY[0] * F.smooth_l1_loss(x_hi, x_lo.detach()),
            "latent_again": distance(again, z.detach(), *sphere.LATENT_CONSISTENCY).mean()}, ()


def sphere_encoder_sample(denoiser, shape, y, steps, cfg_scale=1.0, sigma=sphere.decay(),
                          noise=None, null_class=None, trajectory=None):
    """Decode, encode, add less noise: Algorithm 1 with G = encode(decode(.)), which ends before
    the last encoding -> pictures in patches. Arguments as sphere.sample's."""
    pictures = []

    def encode_decoded(v, y):
        decoded = full_precision(denoiser(v, y, "decoder"))
        picture = decoded
        if cfg_scale != 1:
            x, x_null = decoded.chunk(2)
            picture = x_null + cfg_scale * (x - x_null)
        pictures.append(picture)
        return v if len(pictures) == steps else denoiser(decoded, y, "encoder")

    noise = fresh_noise(shape, device=y.device) if noise is None else noise
    sphere.sample(encode_decoded, shape, y, steps, cfg_scale, sigma,
                  (eps[:, :SphereEncoder.latent_channels] for eps in noise), null_class)
    if trajectory is not None:
        trajectory.extend(pictures)
    return pictures[-1]


# ---- One step: a run's sampler, distilled. Ours; not tried at the paper's scale -----------------

def distill_losses(denoiser, pair, y, sigma_hi, sigma_lo, eps):
    """Eq. 2 from pure noise: the network's one step against what a teacher made of the same noise.

    pair (B, 2, C, H, W): the noise and the teacher's latent; y (B,). The others are not used.
    """
    noise, target = pair.unbind(1)
    predicted = denoiser(spherify(noise), y)
    return {"reconstruction": sphere.reconstruction_loss(predicted, target)}, ()


class Pairs:
    """Noise number i and what Algorithm 1 makes of it, in the place of a data set's latents.

    With one noise for all steps sampling is a deterministic map from noise to latent. The label of
    number i is i mod num_classes. Two roles for rae.LatentCache, which keeps the latents: a data
    set whose pictures are the numbers 0 .. n - 1, and an autoencoder that makes latents of those.
    denoiser, steps, sampling: as of sphere.sample; recipe: what else makes the latents.
    """

    def __init__(self, denoiser, steps, n, num_classes, seed, latent_shape, device, recipe, root,
                 rank=0, world=1, **sampling):
        self.denoiser, self.steps, self.sampling = denoiser, steps, sampling
        self.seed, self.latent_shape, self.device = seed, latent_shape, device
        self.name, self.labels = "pairs", torch.arange(n) % num_classes
        self.recipe = {**recipe, "steps": steps, "seed": seed, "classes": num_classes,
                       "first noise": hash_of({"0": self.noise([0])})}
        self.latents = LatentCache(self, self, root, rank, world, flips=False, what="pairs")
        self.denoiser = None                                  # its memory is no longer needed

    def noise(self, indices):
        """-> (b, C, h, w), on the CPU. Drawn again when it is needed: half as much on the disk."""
        return noise_of_each([keyed_generator("pair", self.seed, int(i)) for i in indices],
                             self.latent_shape)

    def load(self, indices):
        return torch.as_tensor(indices)

    def encode(self, indices):
        indices = indices.cpu()
        noise, y = self.noise(indices).to(self.device), self.labels[indices].to(self.device)
        return sphere.sample(self.denoiser, noise.shape, y, self.steps,
                             noise=itertools.repeat(noise), **self.sampling)

    def fingerprint(self):
        return "a teacher"                                    # which one, the recipe says

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, flips):
        """indices (b,), flips all 0 -> noise and latents (b, 2, C, h, w) float32, labels (b,)."""
        latents, y = self.latents.batch(indices, flips)
        return torch.stack([self.noise(indices), latents.float()], dim=1), y


def open_pairs(args, teacher, denoiser, latent_shape, device, rank, world):
    """args: the student's settings; teacher: the checkpoint; denoiser: its first average."""
    run, num_classes = teacher["args"], len(teacher["classes"])
    cfg = run["cfg"] if args.teacher_cfg is None else args.teacher_cfg
    if args.pairs < num_classes:
        raise UserError(f"--pairs {args.pairs} leaves out some of {num_classes} classes: give more")
    say(f"the teacher: {args.teacher_steps} steps with one noise for all, guidance {cfg:g}")
    recipe = {"weights": args.teacher_sha256, "dtype": run["dtype"], "cfg": cfg,
              "sigma": run["sigma"], "gamma": run["gamma"]}
    return Pairs(denoiser, args.teacher_steps, args.pairs, num_classes, args.seed, latent_shape,
                 device, recipe, Path(args.data_dir) / "pairs", rank, world, cfg_scale=cfg,
                 sigma=sphere.decay(run["sigma"], run["gamma"]), null_class=num_classes)


# ---- Which there are -----------------------------------------------------------------------------

class Method(NamedTuple):
    """A way to train and to sample. flags: settings that it knows, of those which not all do."""
    training_losses: Callable
    sample: Callable
    flags: tuple
    sampling: tuple                                           # what its sampler is told
    network: dict = {}                                        # in what it differs from SiT
    times: Callable = None                                    # in the place of noise levels
    levels: int = 2                                           # copies of a batch in one call
    draws_noise: bool = True                                  # each step, for training_losses
    forward_mode: bool = False                                # does it need forward derivatives?


OF_SPHERE = ("noise_dist", "p_mean", "p_std", "alpha_max", "alpha_mix", "mix_prob", "consistency",
             "sigma", "sampling_noise", "cfg")
METHODS = {
    "sphere": Method(sphere.training_losses, sphere.sample,
                     (*OF_SPHERE, "reconstruct", "latent_consistency", "spherify"),
                     ("cfg_scale", "gamma", "noise", "sigma")),
    "flow": Method(flow_losses, flow_sample, ("p_mean", "p_std", "cfg"), ("cfg_scale", "solver"),
                   {"kind": TimedSiT, "num_times": 1}, partial(times, r_equals_t=1.0),
                   levels=1),
    "meanflow": Method(meanflow_losses, meanflow_sample, ("p_mean", "p_std", "cfg"), ("cfg_scale",),
                       {"kind": TimedSiT, "num_times": 2}, times, forward_mode=True),
    "sphere-encoder": Method(sphere_encoder_losses, sphere_encoder_sample, OF_SPHERE,
                             ("cfg_scale", "gamma", "noise", "sigma"), {"kind": SphereEncoder}),
    "distill": Method(distill_losses, sphere.sample,
                      ("sigma", "sampling_noise", "pairs", "teacher_steps", "teacher_cfg"),
                      ("gamma", "noise", "sigma"), levels=1, draws_noise=False),
}


class Noise(NamedTuple):
    """How the two levels of sphere.training_losses are drawn. flags: as of Method."""
    pair: Callable
    flags: tuple = ()


NOISE = {"lognorm": Noise(sphere.noise_pair, ("p_mean", "p_std")),
         "uniform": Noise(uniform_pair), "sphere-encoder": Noise(stratified_pair)}


def variant(method, spherify=True, reconstruct="low"):
    """The method of this name, or what Table 3 makes of the sphere's."""
    found = METHODS[method]
    if not spherify:
        found = found._replace(training_losses=flat_losses, sample=flat_sample)
    if reconstruct == "both":
        found = found._replace(training_losses=partial(on_both_levels, found.training_losses))
    return found


def build_network(method, model, latent_shape, num_classes):
    """The network of a method, new. latent_shape: (C, H, W)."""
    C, side, _ = latent_shape
    return SiT_models[model](input_size=side, in_channels=C, num_classes=num_classes,
                             **METHODS[method].network)
