import itertools
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


@pytest.mark.parametrize("p_mean,p_std", [(0.0, 1.0), (-0.4, 1.0), (1.0, 0.5)])
def test_expected_levels_by_integration(p_mean, p_std):
    n = 200_000
    hi, lo = sphere.noise_pair(n, p_mean, p_std, alpha_max_deg=45.0, mix_prob=0.0, generator=generator())
    assert (hi >= lo).all() and hi.shape == lo.shape == (n,)               # tan 45 = 1: sigma is r

    def cdf(r):
        return scipy.stats.norm.cdf((scipy.special.logit(r) - p_mean) / p_std)

    # E[max] = integral of 1 - F^2, E[min] = integral of (1 - F)^2
    expected_hi = scipy.integrate.quad(lambda r: 1 - cdf(r) ** 2, 0, 1)[0]
    expected_lo = scipy.integrate.quad(lambda r: (1 - cdf(r)) ** 2, 0, 1)[0]
    for found, expected in ((hi, expected_hi), (lo, expected_lo)):
        assert abs(found.double().mean() - expected) < 4 * found.std() / math.sqrt(n)


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
    losses, predictions = sphere.training_losses(denoiser, z, y, hi, lo, eps)
    assert torch.equal(predictions[0], z_hi) and torch.equal(predictions[1], z_lo)
    assert torch.equal(calls[0], torch.cat([y, y]))
    assert losses.keys() == {"reconstruction", "consistency"}
    assert losses["reconstruction"] == sphere.reconstruction_loss(z_lo, z)
    assert losses["consistency"] == sphere.consistency_loss(z_hi, z_lo)
    losses, _ = sphere.training_losses(denoiser, z, y, hi, lo, eps, eps_again=eps)
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


def noise(shape, seed, kind="fresh"):
    draws = sphere.fresh_noise(shape, generator(seed))
    return itertools.repeat(next(draws)) if kind == "same" else draws


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("cfg_scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("kind,gamma", [("fresh", 1.0), ("same", 1.0), ("fresh", 2.0)])
def test_algorithm_1(steps, cfg_scale, kind, gamma):
    shape, y, recorder = (3, 4, 2, 2), torch.tensor([0, 3, 5]), Recorder()
    sigma_max = math.tan(math.radians(60))
    found = sphere.sample(recorder, shape, y, steps, cfg_scale, sphere.decay(sigma_max, gamma), noise(shape, 9, kind))
    sigmas = [sigma_max * (1 - t / steps) ** gamma for t in range(1, steps)]
    expected, given = algorithm_1(cfg_scale, sigmas, kind, 9, shape, y.numpy())
    assert np.allclose(found, expected, atol=1e-4)
    assert len(recorder.calls) == steps                       # with guidance on twice the batch
    calls = [half for v, label in recorder.calls for half in zip(v.split(3), label.split(3))]
    assert len(calls) == len(given) == steps * (1 if cfg_scale == 1 else 2)
    for (v, label), (v_expected, label_expected) in zip(calls, given):
        assert np.allclose(v, v_expected, atol=1e-4) and np.array_equal(label, label_expected)


def test_sigma_by_step_and_trajectory():
    shape, y, trajectory = (2, 4, 2, 2), torch.tensor([1, 2]), []
    found = sphere.sample(Recorder(), shape, y, 3, sigma=lambda t, T: [2.0, 0.3][t - 1], noise=noise(shape, 4),
                          trajectory=trajectory)
    expected, _ = algorithm_1(1, [2.0, 0.3], "fresh", 4, shape, y.numpy())
    assert np.allclose(found, expected, atol=1e-4)
    assert len(trajectory) == 3 and torch.equal(trajectory[-1], found)
    decayed = sphere.sample(Recorder(), shape, y, 3, sigma=sphere.decay(math.tan(math.radians(85))),
                            noise=noise(shape, 4))
    assert torch.equal(decayed, sphere.sample(Recorder(), shape, y, 3, noise=noise(shape, 4)))
    torch.manual_seed(4)                                      # noise is fresh where none is given
    assert torch.equal(decayed, sphere.sample(Recorder(), shape, y, 3))


@pytest.mark.parametrize("kind", ["fresh", "same"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_an_exact_denoiser_gives_the_exact_latent(kind, cfg_scale):
    z = torch.randn(3, 4, 2, 2, generator=generator(1)) * 2
    found = sphere.sample(lambda v, y: z.repeat(len(v) // 3, 1, 1, 1), z.shape, torch.zeros(3, dtype=torch.long), 4,
                          cfg_scale, noise=noise(z.shape, 0, kind), null_class=1)
    assert torch.allclose(found, z, atol=1e-6)


def test_the_null_class_is_the_denoisers_own_where_it_is_not_given():
    recorder, y = Recorder(), torch.tensor([1])
    sphere.sample(recorder, (1, 4, 2, 2), y, 1, 2.0)
    sphere.sample(recorder, (1, 4, 2, 2), y, 1, 2.0, null_class=4)
    assert [label.tolist() for _, label in recorder.calls] == [[1, 7], [1, 4]]


def test_sampling_refuses():
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sphere.sample(Recorder(), (1, 4, 2, 2), torch.zeros(1, dtype=torch.long), 0)
