"""What the paper compares itself with: other objectives for the same network on the same latents.

    python train.py --method flow                       # SiT: flow matching
    python train.py --method meanflow                   # MeanFlow: average velocities
    python train.py --method sphere-encoder --rae pixels        # Sphere Encoder, on pictures

Each method is two functions of tensors like sphere.py's: training_losses, from a denoiser and a
batch, and sample. METHODS, at the end, is what train.py and sample.py choose from.
"""
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sphere
from model import SiT_models
from sphere import add_noise, full_precision, l1_and_cosine, spherify

# ---- Time, for flow matching and MeanFlow: 0 is the latent z, 1 is noise -------------------------


def times(n, p_mean=0.0, p_std=1.0, r_equals_t=0.75, generator=None):
    """Two times for each of n examples -> t >= r, each (n,): logit-normal, the larger is t.

    With probability r_equals_t they are one. MeanFlow's (section 4.3); with r_equals_t = 1 those
    of flow matching as Esser et al. 2024 train it.
    """
    a, b = torch.sigmoid(p_mean + p_std * torch.randn(2, n, generator=generator))
    one = torch.rand(n, generator=generator) < r_equals_t
    return torch.where(one, a, torch.maximum(a, b)), torch.where(one, a, torch.minimum(a, b))


def over_latents(t, z):
    return t.view(-1, *[1] * (z.ndim - 1))                    # (B,) -> (B, 1, 1, 1)


def velocity(denoiser, x, y, at, cfg_scale, null_class):
    """The network at the times `at`, one or two numbers, with guidance in one call: float32."""
    at = torch.tensor(at, device=x.device).expand(len(x), -1)               # (B, num_times)
    if cfg_scale == 1:
        return full_precision(denoiser(x, y, at))
    both = denoiser(x.repeat(2, 1, 1, 1), torch.cat([y, torch.full_like(y, null_class)]),
                    at.repeat(2, 1))
    return sphere.guided(*full_precision(both).chunk(2), cfg_scale)


# ---- Flow matching: SiT, Ma et al. 2024, arXiv 2401.08740 ----------------------------------------

def flow_losses(denoiser, z, y, t, r, eps):
    """The mean of |v(x_t, t) - (eps - z)|^2: the velocity of the linear path.

    z and eps (B, C, H, W), y and t (B,); r is MeanFlow's, not used.
    """
    x = (1 - over_latents(t, z)) * z + over_latents(t, z) * eps             # Eq. 1, linear
    v = full_precision(denoiser(x, y, t.unsqueeze(1)))
    return {"velocity": (v - (eps - z)).square().mean()}, ()


@torch.no_grad()
def flow_sample(denoiser, shape, y, steps, cfg_scale=1.0, solver="euler", generator=None,
                null_class=None, trajectory=None, together=True):
    """dx = v dt from noise at t = 1 to t = 0 in equal steps -> z. Arguments as sphere.sample's.

    solver: "euler", or "heun", which calls the network twice a step.
    """
    if steps < 1 or solver not in ("euler", "heun"):
        raise ValueError(f"{steps} steps of {solver!r}: take 1 or more, of 'euler' or 'heun'")
    x = sphere.draw_noise(shape, generator, y.device)
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
def meanflow_sample(denoiser, shape, y, steps, cfg_scale=1.0, generator=None, null_class=None,
                    trajectory=None, together=True):
    """x_r = x_t - (t - r) u(x_t, t, t - r) (Eq. 12) in equal steps -> z. As sphere.sample.

    Guidance extrapolates average velocities; the paper's own trains it in.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    x = sphere.draw_noise(shape, generator, y.device)
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

    def __init__(self, SiT, in_channels):
        super().__init__()
        latent_channels = min(in_channels, self.latent_channels)
        self.encoder = SiT(in_channels=in_channels, out_channels=latent_channels)
        self.decoder = SiT(in_channels=latent_channels, out_channels=in_channels)

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
    return {"reconstruction": 50 * F.smooth_l1_loss(x_lo, x),
            "consistency": 25 * F.smooth_l1_loss(x_hi, x_lo.detach()),
            "latent_again": l1_and_cosine(again, z.detach())[1].mean()}, ()


def sphere_encoder_sample(denoiser, shape, y, steps, cfg_scale=1.0, generator=None, null_class=None,
                          trajectory=None, together=True, **settings):
    """Decode, encode, add less noise: Algorithm 1 with G = encode(decode(.)), which ends before
    the last encoding -> pictures in patches. settings: as sphere.sample's."""
    pictures = []

    def encode_decoded(v, y):
        decoded = full_precision(denoiser(v, y, "decoder"))
        x = decoded if cfg_scale == 1 else sphere.guided(*decoded.chunk(2), cfg_scale)
        pictures.append(x)
        return v if len(pictures) == steps else denoiser(decoded, y, "encoder")

    noise = (sphere.draw_noise(shape, generator, y.device)[:, :SphereEncoder.latent_channels]
             for _ in itertools.count())
    sphere.sample(encode_decoded, shape, y, steps, cfg_scale, generator=noise,
                  null_class=null_class, together=True, **settings)
    if trajectory is not None:
        trajectory.extend(pictures)
    return pictures[-1]


# ---- Which there are -----------------------------------------------------------------------------

class Method(NamedTuple):
    """flags: settings of a run that it knows, of those which not all do; sampling: those of its
    sampler; network: what its SiT has more than the paper's; times: in the place of
    sphere.noise_pair."""
    training_losses: Callable
    sample: Callable
    flags: tuple
    sampling: tuple
    network: dict = {}
    times: Callable = None


OF_SPHERE = ("noise_dist", "p_mean", "p_std", "alpha_max", "alpha_mix", "mix_prob", "consistency",
             "sigma", "sampling_noise")
METHODS = {
    "sphere": Method(sphere.training_losses, sphere.sample,
                     (*OF_SPHERE, "reconstruct", "latent_consistency", "pair_noise", "spherify"),
                     ("cfg_scale", "gamma", "noise", "sigma", "decay", "guidance", "f")),
    "flow": Method(flow_losses, flow_sample, ("p_mean", "p_std"), ("cfg_scale", "solver"),
                   {"num_times": 1}, partial(times, r_equals_t=1.0)),
    "meanflow": Method(meanflow_losses, meanflow_sample, ("p_mean", "p_std"), ("cfg_scale",),
                       {"num_times": 2}, times),
    "sphere-encoder": Method(sphere_encoder_losses, sphere_encoder_sample, OF_SPHERE,
                             ("cfg_scale", "gamma", "noise", "sigma", "decay")),
}


def build_network(method, model, latent_shape, num_classes):
    """The network of a method, new. latent_shape: (C, H, W)."""
    C, side, _ = latent_shape
    SiT = partial(SiT_models[model], input_size=side, num_classes=num_classes)
    if method == "sphere-encoder":
        return SphereEncoder(SiT, C)
    return SiT(in_channels=C, **METHODS[method].network)
