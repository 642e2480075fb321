"""The paper: "Efficient Image Synthesis with Sphere Latent Encoder", arXiv 2605.15592.

Latents live on the sphere of radius sqrt(L), L = C * H * W. A noise level is an angle: adding
Gaussian noise of standard deviation sigma and projecting back turns a latent by arctan(sigma). The
denoiser learns to undo any angle up to alpha_max, without being told which; sampling starts from
pure noise and repeats: denoise, project, add less noise.

Everything here is a function of tensors. Latents are (B, C, H, W); geometry and losses are float32
whatever autocast says. Sections: the sphere, noise levels (section 4.3), losses (Eq. 2-4),
Algorithm 1.
"""
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F


# ---- The sphere ----------------------------------------------------------------------------------

def full_precision(x):
    """float32 from anything less; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spherify(z, eps=1e-6):
    """f(z): RMS norm over the whole latent of a sample (C, H, W together, not token by token)."""
    z = full_precision(z)
    return z * torch.rsqrt(z.square().mean(dim=tuple(range(1, z.ndim)), keepdim=True) + eps)


def angle_to_sigma(angle_deg):
    return math.tan(math.radians(angle_deg))


def sigma_to_angle(sigma):
    return math.degrees(math.atan(sigma))


def add_noise(v, sigma, eps, f=spherify):
    """Eq. 1: f(v + sigma * eps). v and eps (B, C, H, W), sigma (B,).

    eps is nearly orthogonal to v and as long as v, so the result lies arctan(sigma) away from v.
    """
    return f(v + sigma.view(-1, *[1] * (v.ndim - 1)) * eps)


# ---- Noise levels (section 4.3) ------------------------------------------------------------------

def noise_pair(n, dist="lognorm", p_mean=0.0, p_std=1.0, alpha_max_deg=85.0, alpha_mix_deg=89.0,
               mix_prob=0.2, generator=None):
    """Two noise levels for each of n examples -> sigma_hi >= sigma_lo, each (n,).

    sigma = r * tan(alpha_max), and r is drawn, on the generator's device, by `dist`:
      "lognorm"         r_a, r_b = sigmoid(p_mean + p_std * N(0, 1)), the larger is r_hi (the paper)
      "uniform"         r_a, r_b ~ U[0, 1], the larger is r_hi
      "sphere-encoder"  r_hi ~ U[0, 1], one from each n-th of the range; r_lo = r_hi * U[0, 0.5]
    With probability mix_prob the high level comes from a harder range instead: uniform in sigma
    between tan(alpha_max) and tan(alpha_mix). The paper names a mix range and 0.2; that only the
    high level changes is our reading.
    """
    device = generator.device if generator is not None else "cpu"

    def rand():
        return torch.rand(n, generator=generator, device=device)

    def lognorm():
        return torch.sigmoid(p_mean + p_std * torch.randn(n, generator=generator, device=device))

    if dist == "sphere-encoder":
        strata = torch.randperm(n, generator=generator, device=device)
        r_hi = (strata + rand()) / n
        r_lo = r_hi * 0.5 * rand()
    elif dist in ("lognorm", "uniform"):
        draw = lognorm if dist == "lognorm" else rand
        r_a, r_b = draw(), draw()
        r_hi, r_lo = torch.maximum(r_a, r_b), torch.minimum(r_a, r_b)
    else:
        raise ValueError(f"dist must be 'lognorm', 'uniform' or 'sphere-encoder', not {dist!r}")

    sigma_max, sigma_mix = angle_to_sigma(alpha_max_deg), angle_to_sigma(alpha_mix_deg)
    sigma_hi, sigma_lo = r_hi * sigma_max, r_lo * sigma_max
    harder = rand() < mix_prob
    return torch.where(harder, sigma_max + rand() * (sigma_mix - sigma_max), sigma_hi), sigma_lo


# ---- Losses (section 4.2, appendix B; weights of table A) ----------------------------------------

def l1_and_cosine(pred, target):
    """Mean |pred - target| and 1 - cos of the flattened latents, an example each: two of (B,)."""
    pred = full_precision(pred).flatten(1)                    # (B, C, H, W) -> (B, L)
    target = full_precision(target).flatten(1)
    return (pred - target).abs().mean(dim=1), 1 - F.cosine_similarity(pred, target, dim=1)


def reconstruction_loss(pred, target):
    """Eq. 2, 50 * L1 + (1 - cos) against the clean Euclidean latent z (not its projection f(z))."""
    l1, cosine = l1_and_cosine(pred, target)
    return (50 * l1 + cosine).mean()


def consistency_loss(pred_hi, pred_lo):
    """Eq. 3, 25 * L1 + (1 - cos): the prediction from more noise follows the other, held fixed."""
    l1, cosine = l1_and_cosine(pred_hi, pred_lo.detach())
    return (25 * l1 + cosine).mean()


def latent_consistency_loss(denoiser, pred_hi, sigma_hi, eps, y, f=spherify):
    """Eq. 4, 1 - cos between a prediction and what the denoiser makes of it, noised again as much.

    The paper drops this term (it slows training and ends worse); no stop-gradient is our reading.
    """
    again = denoiser(add_noise(f(pred_hi), sigma_hi, eps, f), y)
    return l1_and_cosine(again, pred_hi)[1].mean()


def training_losses(denoiser, z, y, sigma_hi, sigma_lo, eps, reconstruct="low", eps_again=None,
                    eps_lo=None, f=spherify):
    """One training step of the paper: the losses by name, and the two predictions.

    z (B, C, H, W) clean latents, y (B,), sigma_hi and sigma_lo (B,), eps as z, for both levels.
    reconstruct: Eq. 2 on the "low" noise level, as Sphere Encoder has it, or "both" (their mean).
    eps_again: noise for Eq. 4, which is left out without it.
    eps_lo, f: the paper's alternatives: the low level's own noise; full_precision for no sphere.
    """
    v = f(z)
    noisy = torch.cat([add_noise(v, sigma_hi, eps, f),                                  # Eq. 1
                       add_noise(v, sigma_lo, eps if eps_lo is None else eps_lo, f)])
    z_hi, z_lo = denoiser(noisy, torch.cat([y, y])).chunk(2)  # one call for both levels
    losses = {"reconstruction": reconstruction_loss(z_lo, z),
              "consistency": consistency_loss(z_hi, z_lo)}
    if reconstruct == "both":
        losses["reconstruction"] = (losses["reconstruction"] + reconstruction_loss(z_hi, z)) / 2
    if eps_again is not None:
        losses["latent_consistency"] = latent_consistency_loss(denoiser, z_hi, sigma_hi,
                                                               eps_again, y, f)
    return losses, (z_hi, z_lo)


# ---- Sampling (Algorithm 1) ----------------------------------------------------------------------

@torch.no_grad()
def sample(denoiser, shape, y, steps, cfg_scale=1.0, gamma=1.0, alpha_max_deg=85.0, noise="fresh",
           generator=None, sigma=None, null_class=None, trajectory=None, together=False,
           decay="power", guidance="linear", f=spherify):
    """Algorithm 1 -> z_hat of the last step as predicted (not projected), ready for the decoder.

    denoiser(v, y): v (B, C, H, W) = shape, y (B,) on the device to work on. Called `steps` times,
                twice that with guidance; or, if `together`, as often on twice the batch.
    cfg_scale:  w of line 6; 1 is no guidance. null_class: by default denoiser.num_classes.
    gamma:      sigma_t = sigma_max * (1 - t / steps) ** gamma, or, if decay is "geometric",
                sigma_max * gamma ** t. The paper speaks of a "decay factor"; the form is our guess.
    noise:      "fresh" noise at every step, or the "same": the first draw, z of line 2, again.
    sigma:      sigma_max in place of tan(alpha_max_deg), or a list, one sigma_t for each of the
                steps - 1 re-noisings, in place of the decay.
    generator:  one for the batch, or a list, one a picture: then it does not depend on the batch;
                or an iterator of noise that was drawn so.
    trajectory: a list, to which every step's z_hat is appended.
    guidance:   "linear" or "rotation": see guided.
    f:          full_precision for a denoiser trained without the sphere. It sees lengths, so line 2
                then draws noise of the length that it knows, sigma_max (our reading).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if noise not in ("fresh", "same"):
        raise ValueError(f"noise must be 'fresh' or 'same', not {noise!r}")
    if decay not in ("power", "geometric"):
        raise ValueError(f"decay must be 'power' or 'geometric', not {decay!r}")
    sigma_max = sigma if isinstance(sigma, (int, float)) else angle_to_sigma(alpha_max_deg)
    if not isinstance(sigma, (list, tuple)):
        sigma = [sigma_max * (gamma ** t if decay == "geometric" else (1 - t / steps) ** gamma)
                 for t in range(1, steps)]
    if len(sigma) != steps - 1:
        raise ValueError(f"{steps} steps re-noise {steps - 1} times; sigma has {len(sigma)} values")
    if cfg_scale != 1:
        y_null = torch.full_like(y, denoiser.num_classes if null_class is None else null_class)

    z = eps = draw_noise(shape, generator, y.device)          # line 2
    if f is not spherify:
        z = sigma_max * eps
    for t in range(1, steps + 1):
        v = f(z)                                              # line 5
        if cfg_scale == 1:                                    # line 6
            z_hat = full_precision(denoiser(v, y))
        else:
            both = (denoiser(torch.cat([v, v]), torch.cat([y, y_null])).chunk(2) if together
                    else (denoiser(v, y), denoiser(v, y_null)))
            z_hat = guided(*map(full_precision, both), cfg_scale, guidance)
        if trajectory is not None:
            trajectory.append(z_hat)
        if t < steps:
            if noise == "fresh":
                eps = draw_noise(shape, generator, y.device)
            z = f(z_hat) + sigma[t - 1] * eps                 # lines 7, 9, 10
    return z_hat


def guided(z_hat, z_null, cfg_scale, how="linear"):
    """Line 6, from the predictions with and without the class, (B, C, H, W) each.

    "linear":   z_null + w * (z_hat - z_null), the paper's.
    "rotation": z_hat turned in their plane to w times its angle from z_null, its norm kept; as
                Sphere Encoder 2 is said to do, the angle's scale is ours.
    """
    if how == "linear":
        return z_null + cfg_scale * (z_hat - z_null)
    if how != "rotation":
        raise ValueError(f"guidance must be 'linear' or 'rotation', not {how!r}")
    a, b = (F.normalize(z.flatten(1)) for z in (z_null, z_hat))             # (B, L)
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)).unsqueeze(1)
    across = F.normalize(b - (a * b).sum(1, keepdim=True) * a)
    turned = torch.cos(cfg_scale * angle) * a + torch.sin(cfg_scale * angle) * across
    return z_hat.flatten(1).norm(dim=1).view(-1, *[1] * (z_hat.ndim - 1)) * turned.view_as(z_hat)


def draw_noise(shape, generator, device):
    """N(0, I) of this shape from one generator, or from a list of one for each example."""
    if isinstance(generator, Iterator):
        return next(generator).to(device)
    if isinstance(generator, (list, tuple)):
        return torch.stack([draw_noise(shape[1:], g, g.device) for g in generator]).to(device)
    draw_on = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=draw_on).to(device)
