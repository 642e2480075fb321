import numpy as np
import pytest
import torch

from data import ToyFlowers
from fid import class_means, diversity, frechet_distance, frechet_of_features, toy_table

# Two sets of features a case: (seed, n, kind) each, dimension d, and the distance that pytorch-fid 0.3.0's statistics
# have by the nuclear norm of the features (right to 1e-13; pytorch-fid itself is off by up to 5e-6 where n < d).
CASES = [
    (8, (11, 200, "mix"), (12, 300, "mix"), 3.2220057196659404),
    (8, (13, 5, "mix"), (14, 6, "mix"), 4.580593516777593),
    (8, (11, 200, "mix"), (11, 200, "mix"), 0.0),
    (64, (21, 1000, "mix"), (22, 1500, "mix"), 30.14400782577695),
    (64, (23, 30, "mix"), (24, 40, "mix"), 31.707011260476484),
    (64, (25, 1000, "near"), (26, 1000, "near"), 39.00417022106829),
    (64, (27, 1000, "relu"), (28, 1000, "relu"), 13.194647019146345),
    (64, (29, 5000, "diag"), (30, 5000, "diag"), 25.222367963788596),
    (64, (23, 30, "mix"), (22, 1500, "mix"), 36.8542846641861),
]


def features(d, seed, n, kind):
    r = np.random.default_rng(seed)
    z, s, m = r.standard_normal((n, d)), (1 + np.arange(d)) ** -0.5, None
    m = 0.5 * r.standard_normal(d)
    if kind == "diag":
        return z * s + m
    if kind == "near":
        return z * np.logspace(0, -8, d) + m
    a = r.standard_normal((d, d)) / np.sqrt(d)
    if kind == "mix":
        return (z * s) @ a + m
    x = np.maximum((z * 4 * s) @ a + 0.1 * m, 0)
    x[:, ::50] = 0
    return x


@pytest.mark.parametrize("d,set1,set2,truth", CASES)
def test_frechet_distance(d, set1, set2, truth):
    statistics = [s for x in (features(d, *set1), features(d, *set2)) for s in (x.mean(0), np.cov(x, rowvar=False))]
    found = frechet_distance(*statistics)
    assert abs(found - truth) <= 1e-9 * (np.trace(statistics[1]) + np.trace(statistics[3]) + truth)
    assert frechet_distance(*statistics[2:], *statistics[:2]) == pytest.approx(found, rel=1e-8, abs=1e-8)


def test_frechet_distance_refuses():
    m, s = np.zeros(3), np.eye(3)
    for wrong in ((m, s, np.zeros(4), np.eye(4)), (m, s, m, np.eye(4)), (m * np.nan, s, m, s), (m, s, m, np.triu(s + 1))):
        with pytest.raises(ValueError):
            frechet_distance(*wrong)


def test_diversity_closed_form():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[1], images[3] = 10, 30
    assert diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(20)
    assert diversity(class_means(images, torch.tensor([0, 0, 1, 1])), torch.tensor([0, 0, 1, 1])) == 0


def test_toy_table_orders_pictures():
    """Held-out pictures are near the training pictures, class means far, noise farther, in both feature spaces."""
    train, test = ToyFlowers(32), ToyFlowers(32, "test")
    images, labels = train.load(range(1500)), train.labels[:1500]
    held_out, test_labels = test.load(range(300)), test.labels[:300]
    noise = torch.randint(256, held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = [("held-out", held_out, test_labels), ("class means", class_means(images, labels)[:300], labels[:300]),
            ("noise", noise, test_labels)]
    table = toy_table(images, labels, rows)
    for key in ("frechet_classifier", "frechet_pixels"):
        real, means, noisy = (row[key] for row in table)
        assert 0 < 8 * real < means < noisy
    assert table[0]["accuracy"] > 0.95 and table[1]["diversity"] == 0
    assert toy_table(images, labels, rows[:1]) == table[:1]                # the same features every time
    x = held_out.flatten(1).double()[:, :20]
    assert frechet_of_features(x, x) == pytest.approx(0, abs=1e-6)
