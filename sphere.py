"""The paper: "Efficient Image Synthesis with Sphere Latent Encoder", arXiv 2605.15592.

Latents live on the sphere of radius sqrt(L), L = C * H * W. A noise level is an angle: adding
Gaussian noise of standard deviation sigma and projecting back turns a latent by arctan(sigma). The
denoiser learns to undo angles up to alpha_max, for some examples alpha_mix, without being told
which. Sampling starts from pure noise, which is at about 90 degrees from any latent, and repeats:
denoise, project, add less noise.

Everything here is a function of tensors. Latents are (B, C, H, W); geometry and losses are float32
whatever autocast says. The other choices of the paper's Table 3 are in baselines.py.
"""
import math

import torch
import torch.nn.functional as F


# ---- The sphere ----------------------------------------------------------------------------------

def full_precision(x):
    """At least float32: half precision is raised, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spherify(z, floor=1e-6):
    """f(z): RMS norm over the whole latent of a sample (C, H, W together, not token by token)."""
    z = full_precision(z)
    return z * torch.rsqrt(z.square().mean(dim=tuple(range(1, z.ndim)), keepdim=True) + floor)


def angle_to_sigma(angle_deg):
    return math.tan(math.radians(angle_deg))


def sigma_to_angle(sigma):
    return math.degrees(math.atan(sigma))


def over_latents(x, z):
    return x.view(-1, *[1] * (z.ndim - 1))                    # (B,) -> (B, 1, 1, 1)


def add_noise(v, sigma, eps):
    """Eq. 1: f(v + sigma * eps). v and eps (B, C, H, W), sigma (B,).

    eps is nearly orthogonal to v and as long as v, so the result lies arctan(sigma) away from v.
    """
    return spherify(v + over_latents(sigma, v) * eps)


# ---- Noise levels (section 4.3) ------------------------------------------------------------------

def noise_pair(n, p_mean=0.0, p_std=1.0, alpha_max_deg=85.0, alpha_mix_deg=89.0, mix_prob=0.2,
               generator=None):
    """Two noise levels for each of n examples: sigma = r * tan(alpha_max), r logit-normal; then the
    mix, see with_mix.

    Returns sigma_hi >= sigma_lo, each (n,), on the generator's device.
    """
    device = generator.device if generator is not None else "cpu"
    r_a, r_b = (torch.sigmoid(p_mean + p_std * torch.randn(n, generator=generator, device=device))
                for _ in range(2))
    return with_mix(torch.maximum(r_a, r_b), torch.minimum(r_a, r_b), alpha_max_deg, alpha_mix_deg,
                    mix_prob, generator)


def with_mix(r_hi, r_lo, alpha_max_deg, alpha_mix_deg, mix_prob, generator=None):
    """Table A's mix: r_hi, r_lo in [0, 1], (n,) each -> sigma_hi, sigma_lo.

    With probability mix_prob the high level comes from a harder range instead, uniform in sigma
    between tan(alpha_max) and tan(alpha_mix). The paper names a mix range and 0.2; that only the
    high level changes is our reading.
    """
    def uniform():
        return torch.rand(r_hi.shape, generator=generator, device=r_hi.device)

    sigma_max, sigma_mix = angle_to_sigma(alpha_max_deg), angle_to_sigma(alpha_mix_deg)
    harder = uniform() < mix_prob
    sigma_harder = sigma_max + uniform() * (sigma_mix - sigma_max)
    return torch.where(harder, sigma_harder, r_hi * sigma_max), r_lo * sigma_max


# ---- Losses (section 4.2, appendix B) ------------------------------------------------------------

# Table A: the weights of L1 and of 1 - cos.
RECONSTRUCTION = (50.0, 1.0)                                  # Eq. 2
CONSISTENCY = (25.0, 1.0)                                     # Eq. 3
LATENT_CONSISTENCY = (0.0, 1.0)                               # Eq. 4 has the cosine alone


def distance(pred, target, l1_weight, cos_weight):
    """Weighted sum of mean |pred - target| and 1 - cos of the flattened latents.

    pred and target (B, C, H, W) -> (B,), one number an example.
    """
    pred = full_precision(pred).flatten(1)                    # (B, C, H, W) -> (B, L)
    target = full_precision(target).flatten(1)
    return (l1_weight * (pred - target).abs().mean(dim=1)
            + cos_weight * (1 - F.cosine_similarity(pred, target, dim=1)))


def reconstruction_loss(pred, target):
    """Eq. 2, 50 * L1 + (1 - cos) against the clean Euclidean latent z (not its projection f(z))."""
    return distance(pred, target, *RECONSTRUCTION).mean()


def consistency_loss(pred_hi, pred_lo):
    """Eq. 3, 25 * L1 + (1 - cos): the prediction from more noise follows the other, held fixed."""
    return distance(pred_hi, pred_lo.detach(), *CONSISTENCY).mean()


def latent_consistency_loss(denoiser, pred_hi, sigma_hi, eps, y):
    """Eq. 4: project the prediction, add noise of the same level, denoise again; 1 - cos between
    the two predictions.

    The paper drops this term (it slows training and ends worse); no stop-gradient is our reading.
    """
    again = denoiser(add_noise(spherify(pred_hi), sigma_hi, eps), y)
    return distance(again, pred_hi, *LATENT_CONSISTENCY).mean()


def training_losses(denoiser, z, y, sigma_hi, sigma_lo, eps, eps_again=None):
    """One training step of the paper. Returns the losses by name, whose sum is to be minimised, and
    the two predictions.

    z (B, C, H, W) clean latents, y, sigma_hi, sigma_lo (B,); eps as z: one noise for both levels.
    eps_again: the noise of Eq. 4, a loss only if this is given. That Eq. 2 is taken on the less
    noisy prediction is our reading, and what Sphere Encoder does.
    """
    v = spherify(z)
    noisy = torch.cat([add_noise(v, sigma_hi, eps), add_noise(v, sigma_lo, eps)])       # Eq. 1
    z_hi, z_lo = denoiser(noisy, torch.cat([y, y])).chunk(2)  # one call for both levels
    losses = {"reconstruction": reconstruction_loss(z_lo, z),
              "consistency": consistency_loss(z_hi, z_lo)}
    if eps_again is not None:
        losses["latent_consistency"] = latent_consistency_loss(denoiser, z_hi, sigma_hi,
                                                               eps_again, y)
    return losses, (z_hi, z_lo)


# ---- Sampling (Algorithm 1) ----------------------------------------------------------------------

def decay(sigma_max=angle_to_sigma(85.0), gamma=1.0):
    """sigma_t = sigma_max * (1 - t / T) ** gamma. The paper has a "decay factor"; its place here is
    our guess."""
    return lambda t, T: sigma_max * (1 - t / T) ** gamma


def fresh_noise(shape, generator=None, device="cpu"):
    """N(0, I) without end. For one noise at every step pass itertools.repeat(eps) in its place."""
    while True:
        yield torch.randn(shape, generator=generator, device=device)


@torch.no_grad()
def sample(denoiser, shape, y, steps, cfg_scale=1.0, sigma=decay(), noise=None, null_class=None,
           trajectory=None):
    """Algorithm 1. Returns z_hat of the last step as predicted (not projected), for the decoder.
    The line numbers are the paper's; README.md has them all.

    denoiser(v, y): v (B, C, H, W) = shape, y (B,) on the device to work on.
    sigma(t, T): the noise added after step t of T. noise: an iterator of noise like v, without end.
    null_class: by default denoiser.num_classes. trajectory: a list, gets every step's z_hat.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    noise = fresh_noise(shape, device=y.device) if noise is None else noise
    z = next(noise)                                           # line 2
    for t in range(1, steps + 1):
        v = spherify(z)                                       # line 5
        z_hat = guided(denoiser, v, y, cfg_scale, null_class)                           # line 6
        if trajectory is not None:
            trajectory.append(z_hat)
        if t == steps:
            return z_hat
        z = spherify(z_hat) + sigma(t, steps) * next(noise)   # lines 7, 9, 10


def guided(denoiser, v, y, cfg_scale, null_class=None):
    """Line 6, classifier-free guidance: both predictions in one call of twice the batch."""
    if cfg_scale == 1:
        return full_precision(denoiser(v, y))
    y_null = torch.full_like(y, denoiser.num_classes if null_class is None else null_class)
    z_hat, z_null = full_precision(denoiser(torch.cat([v, v]), torch.cat([y, y_null]))).chunk(2)
    return z_null + cfg_scale * (z_hat - z_null)
