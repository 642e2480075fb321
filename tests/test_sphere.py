import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

import sphere


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rms", [0.5, 1.0, 7.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spherify_norm(rms, dtype):
    z = (torch.randn(4, 12, 8, 8, generator=generator()) * rms).to(dtype)
    v = sphere.spherify(z)
    assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    norm = v.double().flatten(1).norm(dim=1)
    assert torch.allclose(norm / math.sqrt(768), torch.ones(4).double(), rtol=1e-5)
    cosine = torch.cosine_similarity(v.flatten(1).double(), z.flatten(1).double())
    assert torch.allclose(cosine, torch.ones(4).double(), atol=1e-6)


def test_noise_turns_by_arctan_sigma():
    z = torch.randn(16, 768, 16, 16, generator=generator())                # L = 196,608
    v, eps = sphere.spherify(z), torch.randn(z.shape, generator=generator(1))
    for sigma in (0.1, 1.0, 3.0, 11.43, 57.29):
        noisy = sphere.add_noise(v, torch.full((16,), sigma), eps)
        cosine = (noisy * v).flatten(1).double().mean(1)                   # both have norm sqrt(L)
        assert abs(torch.rad2deg(cosine.arccos()).mean().item() - sphere.sigma_to_angle(sigma)) < 0.1
    assert abs(sphere.angle_to_sigma(85) - 11.430052) < 1e-5
    assert abs(sphere.sigma_to_angle(sphere.angle_to_sigma(33)) - 33) < 1e-9


@pytest.mark.parametrize("dist,p_mean,p_std", [
    ("lognorm", 0.0, 1.0), ("lognorm", -0.4, 1.0), ("lognorm", 1.0, 0.5), ("uniform", None, None)])
def test_expected_levels_by_integration(dist, p_mean, p_std):
    n = 200_000
    kwargs = {} if dist == "uniform" else {"p_mean": p_mean, "p_std": p_std}
    hi, lo = sphere.noise_pair(n, dist, alpha_max_deg=45.0, mix_prob=0.0, generator=generator(),
                               **kwargs)
    assert (hi >= lo).all() and hi.shape == lo.shape == (n,)               # tan 45 = 1: sigma is r

    def cdf(r):
        return r if dist == "uniform" else scipy.stats.norm.cdf((scipy.special.logit(r) - p_mean) / p_std)

    # E[max] = integral of 1 - F^2, E[min] = integral of (1 - F)^2
    expected_hi = scipy.integrate.quad(lambda r: 1 - cdf(r) ** 2, 0, 1)[0]
    expected_lo = scipy.integrate.quad(lambda r: (1 - cdf(r)) ** 2, 0, 1)[0]
    for found, expected in ((hi, expected_hi), (lo, expected_lo)):
        assert abs(found.double().mean() - expected) < 4 * found.std() / math.sqrt(n)


def test_sphere_encoder_levels_are_stratified():
    n = 10_000
    hi, lo = sphere.noise_pair(n, "sphere-encoder", alpha_max_deg=45.0, mix_prob=0.0,
                               generator=generator())
    middles = torch.arange(n) + 0.5
    # one in each n-th, but for rounding
    assert ((hi * n).sort().values - middles).abs().max() < 0.5 + 2e-3
    assert abs(hi.double().mean() - 0.5) < 1e-4 and abs(lo.double().mean() - 0.125) < 0.004
    assert (lo <= hi / 2).all()
    assert abs(np.corrcoef(hi, np.arange(n))[0, 1]) < 0.05                  # in no order


def test_mix_share_and_range():
    n = 50_000
    hi, lo = sphere.noise_pair(n, alpha_max_deg=85.0, alpha_mix_deg=89.0, mix_prob=0.2,
                               generator=generator())
    low, high = math.tan(math.radians(85)), math.tan(math.radians(89))
    mixed = hi > low
    assert abs(mixed.double().mean() - 0.2) < 4 * math.sqrt(0.16 / n)
    assert hi.max() <= high and (lo <= low).all() and (lo <= hi).all()
    assert scipy.stats.kstest((hi[mixed] - low) / (high - low), "uniform").pvalue > 1e-3


def test_levels_come_from_the_generator():
    one, same = (sphere.noise_pair(9, generator=generator(5)) for _ in range(2))
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])
    with pytest.raises(ValueError, match="lognormal"):
        sphere.noise_pair(4, "lognormal")


def by_hand(pred, target, l1_weight):
    pred, target = pred.double().numpy().reshape(len(pred),
                                                 -1), target.double().numpy().reshape(len(pred), -1)
    cosine = (pred * target).sum(1) / np.linalg.norm(pred, axis=1) / np.linalg.norm(target, axis=1)
    return (l1_weight * np.abs(pred - target).mean(1) + 1 - cosine).mean()


def test_losses_by_hand():
    pred, target = (torch.randn(5, 6, 4, 4, generator=generator(seed)) for seed in (0, 1))
    assert sphere.reconstruction_loss(pred,
                                      target).item() == pytest.approx(by_hand(pred, target, 50),
                                                                      rel=1e-5)
    assert sphere.consistency_loss(pred, target).item() == pytest.approx(by_hand(pred, target, 25),
                                                                         rel=1e-5)
    assert sphere.reconstruction_loss(target, target).item() == pytest.approx(0, abs=1e-5)
    assert sphere.reconstruction_loss(pred.bfloat16(), target).dtype == torch.float32


def test_stop_gradient_stops():
    hi, lo = (torch.randn(5, 6, 4, 4, generator=generator(s), requires_grad=True) for s in (0, 1))
    sphere.consistency_loss(hi, lo).backward()
    assert lo.grad is None and hi.grad.abs().sum() > 0


def test_latent_consistency_by_hand():
    pred, eps = torch.randn(3, 6, 4, 4, generator=generator()), torch.randn(3, 6, 4, 4,
                                                                            generator=generator(1))
    sigma, y, seen = torch.tensor([0.5, 1.0, 2.0]), torch.arange(3), []

    def denoiser(v, y):
        seen.append((v, y))
        return v.flip(1)

    found = sphere.latent_consistency_loss(denoiser, pred, sigma, eps, y)
    v = pred / pred.flatten(1).square().mean(1).sqrt().view(3, 1, 1, 1)
    v = v + sigma.view(3, 1, 1, 1) * eps
    v = v / v.flatten(1).square().mean(1).sqrt().view(3, 1, 1, 1)
    assert len(seen) == 1 and torch.allclose(seen[0][0], v, atol=1e-5)
    assert found.item() == pytest.approx(by_hand(v.flip(1), pred, 0), rel=1e-4)


def test_training_losses_put_the_parts_together():
    z, eps = torch.randn(4, 6, 4, 4, generator=generator()), torch.randn(4, 6, 4, 4,
                                                                         generator=generator(1))
    hi, lo, y, calls = torch.full((4,), 2.0), torch.full((4,), 0.5), torch.arange(4), []

    def denoiser(v, y):
        calls.append(y)
        return v * 0.5

    v = sphere.spherify(z)
    z_hi, z_lo = 0.5 * sphere.add_noise(v, hi, eps), 0.5 * sphere.add_noise(v, lo, eps)
    losses, predictions = sphere.training_losses(denoiser, z, y, hi, lo, eps, "low")
    assert torch.equal(predictions[0], z_hi) and torch.equal(predictions[1], z_lo)
    assert torch.equal(calls[0], torch.cat([y, y]))
    assert losses.keys() == {"reconstruction", "consistency"}
    assert losses["reconstruction"] == sphere.reconstruction_loss(z_lo, z)
    assert losses["consistency"] == sphere.consistency_loss(z_hi, z_lo)
    losses, _ = sphere.training_losses(denoiser, z, y, hi, lo, eps, "both", eps_again=eps)
    both = (sphere.reconstruction_loss(z_hi, z) + sphere.reconstruction_loss(z_lo, z)) / 2
    assert losses["reconstruction"] == both
    assert losses["latent_consistency"] == sphere.latent_consistency_loss(denoiser, z_hi, hi, eps,
                                                                          y)


# ---- Algorithm 1 ---------------------------------------------------------------------------------

class Recorder:
    """A denoiser that is not linear, depends on the class, and keeps what it was given."""
    num_classes = 7

    def __init__(self):
        self.calls = []

    def __call__(self, v, y):
        self.calls.append((v.clone(), y.clone()))
        return torch.tanh(1.3 * v.flip(1)) + 0.1 * y.view(-1, 1, 1, 1)


def algorithm_1(w, sigmas, noise, seed, shape, y):
    """Written again, plainly, in numpy float64."""
    g = generator(seed)

    def draw():
        return torch.randn(shape, generator=g).double().numpy()

    def f(z):
        return z / np.sqrt((z ** 2).mean(axis=(1, 2, 3), keepdims=True) + 1e-6)

    def G(v, y):
        return np.tanh(1.3 * v[:, ::-1]) + 0.1 * y.reshape(-1, 1, 1, 1)

    given = []
    z = e = draw()
    for t in range(len(sigmas) + 1):
        v = f(z)
        z_hat = G(v, y)
        given.append((v, y))
        if w != 1:
            null = np.full_like(y, 7)
            given.append((v, null))
            z_hat = G(v, null) + w * (z_hat - G(v, null))
        if t < len(sigmas):
            if noise == "fresh":
                e = draw()
            z = f(z_hat) + sigmas[t] * e
    return z_hat, given


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("cfg_scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("noise,gamma", [("fresh", 1.0), ("same", 1.0), ("fresh", 2.0)])
def test_algorithm_1(steps, cfg_scale, noise, gamma):
    shape, y, recorder = (3, 4, 2, 2), torch.tensor([0, 3, 5]), Recorder()
    found = sphere.sample(recorder, shape, y, steps, cfg_scale, gamma, 60.0, noise, generator(9))
    sigmas = [math.tan(math.radians(60)) * (1 - t / steps) ** gamma for t in range(1, steps)]
    expected, given = algorithm_1(cfg_scale, sigmas, noise, 9, shape, y.numpy())
    assert np.allclose(found, expected, atol=1e-4)
    assert len(recorder.calls) == len(given) == steps * (1 if cfg_scale == 1 else 2)
    for (v, label), (v_expected, label_expected) in zip(recorder.calls, given):
        assert np.allclose(v, v_expected, atol=1e-4) and np.array_equal(label, label_expected)


def test_sigma_by_step_and_trajectory():
    shape, y, trajectory = (2, 4, 2, 2), torch.tensor([1, 2]), []
    found = sphere.sample(Recorder(), shape, y, 3, sigma=[2.0, 0.3], generator=generator(4),
                          trajectory=trajectory)
    expected, _ = algorithm_1(1, [2.0, 0.3], "fresh", 4, shape, y.numpy())
    assert np.allclose(found, expected, atol=1e-4)
    assert len(trajectory) == 3 and torch.equal(trajectory[-1], found)
    decayed = sphere.sample(Recorder(), shape, y, 3, sigma=math.tan(math.radians(85)),
                            generator=generator(4))
    assert torch.equal(decayed, sphere.sample(Recorder(), shape, y, 3, generator=generator(4)))


@pytest.mark.parametrize("noise", ["fresh", "same"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_an_exact_denoiser_gives_the_exact_latent(noise, cfg_scale):
    z = torch.randn(3, 4, 2, 2, generator=generator(1)) * 2
    found = sphere.sample(lambda v, y: z, z.shape, torch.zeros(3, dtype=torch.long), 4, cfg_scale,
                          noise=noise,
                          null_class=1)
    assert torch.allclose(found, z, atol=1e-6)


def test_a_generator_for_each_picture():
    y = torch.arange(5) % 3
    together = sphere.sample(Recorder(), (5, 4, 2, 2), y, 3,
                             generator=[generator(i) for i in range(5)])
    alone = torch.cat([sphere.sample(Recorder(), (1, 4, 2, 2), y[i:i + 1], 3, generator=[generator(i)]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_sampling_refuses():
    y = torch.zeros(1, dtype=torch.long)
    for wrong in ({"steps": 0}, {"steps": 2, "noise": "none"}, {"steps": 3, "sigma": [1.0]}):
        with pytest.raises(ValueError):
            sphere.sample(Recorder(), (1, 4, 2, 2), y, **wrong)


# ---- The paper's alternatives (table 3) ----------------------------------------------------------

def test_without_the_sphere_noise_is_added_and_no_more():
    z, eps = torch.randn(2, 4, 2, 2, generator=generator()), torch.randn(2, 4, 2, 2, generator=generator(1))
    hi, lo, y, seen = torch.tensor([3.0, 5.0]), torch.tensor([0.5, 1.0]), torch.arange(2), []

    def denoiser(v, y):
        seen.append(v)
        return 0.5 * v
    eps_lo = eps.flip(0)
    sphere.training_losses(denoiser, z, y, hi, lo, eps, eps_again=eps, eps_lo=eps_lo, f=sphere.full_precision)
    z_hi, z_lo = z + hi.view(2, 1, 1, 1) * eps, z + lo.view(2, 1, 1, 1) * eps_lo
    assert torch.equal(seen[0], torch.cat([z_hi, z_lo]))
    assert torch.equal(seen[1], 0.5 * z_hi + hi.view(2, 1, 1, 1) * eps)
    seen.clear()
    found = sphere.sample(denoiser, z.shape, y, 2, generator=generator(3), sigma=7.0, noise="same",
                          f=sphere.full_precision)
    start = torch.randn(z.shape, generator=generator(3))
    assert torch.equal(seen[0], 7 * start) and torch.equal(seen[1], 3.5 * start + 3.5 * start)
    assert torch.equal(found, 0.5 * seen[1])


def test_forms_of_the_decay():
    """The noise that a denoiser of zeros sees, before it is projected, is sigma_t itself."""
    def sigmas(**settings):
        seen = []
        sphere.sample(lambda v, y: seen.append(v) or torch.zeros_like(v), (1, 4, 2, 2), torch.zeros(1).long(), 4,
                      generator=generator(), sigma=2.0, noise="same", f=sphere.full_precision, **settings)
        return [(v / seen[0]).mean().item() for v in seen[1:]]
    assert sigmas() == pytest.approx([0.75, 0.5, 0.25])
    assert sigmas(gamma=2.0) == pytest.approx([0.75 ** 2, 0.5 ** 2, 0.25 ** 2])
    assert sigmas(gamma=0.7, decay="geometric") == pytest.approx([0.7, 0.7 ** 2, 0.7 ** 3])
    with pytest.raises(ValueError, match="decay"):
        sigmas(decay="linear")


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 2.5])
def test_guidance_by_rotation(w):
    a, b = (torch.randn(5, 4, 2, 2, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    found = sphere.guided(b, a, w, "rotation")

    def angle(x, y):
        return torch.cosine_similarity(x.flatten(1), y.flatten(1)).clamp(-1, 1).acos()
    assert torch.allclose(found.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1))
    turned = w * angle(a, b)                                  # from a on, through b; past pi it comes back
    assert torch.allclose(angle(a, found), torch.minimum(turned, 2 * math.pi - turned), atol=1e-6)
    in_plane = torch.linalg.matrix_rank(torch.stack([x.flatten(1) for x in (a, b, found)], 1), rtol=1e-9)
    assert (in_plane == 2).all()
    if w == 1:
        assert torch.allclose(found, b)
    near = a + 1e-4 * b                                       # small angles: the linear form, but for the norm
    linear, rotated = (sphere.guided(near, a, w, how) for how in ("linear", "rotation"))
    assert angle(linear, rotated).max() < 1e-6
    assert torch.allclose(sphere.guided(b, b, w, "rotation"), b)           # nothing to turn away from
    with pytest.raises(ValueError, match="guidance"):
        sphere.guided(a, b, w, "slerp")
