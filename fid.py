"""How good are the pictures? Frechet distances between features of pictures.

The distance itself (frechet_distance) is exact. The features here are the toy data set's own, which need no download:
a small classifier fitted on the spot, and coarse pixels. A number made with them is never called FID.
"""
import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), float64.

    sigma1 = P' L L' P by pivoted Cholesky, which stops at the rank of sigma1. Then (sigma1 sigma2) has the eigenvalues
    of the symmetric L' P sigma2 P' L: real, never negative beyond rounding, and exact for singular covariances.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or sigma1.shape != 2 * mu1.shape or sigma2.shape != 2 * mu1.shape:
        raise ValueError(f"shapes do not fit: {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    for name, a in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(a).all():
            raise ValueError(f"{name} has values that are not finite")
        if a.ndim == 2 and not np.allclose(a, a.T, rtol=1e-8, atol=1e-8 * np.abs(a).max(initial=0)):
            raise ValueError(f"{name} is not symmetric")
    L, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    L, order = np.tril(L)[:, :rank], pivots - 1
    eigenvalues = np.linalg.eigvalsh(L.T @ sigma2[np.ix_(order, order)] @ L)
    trace_sqrt = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_sqrt)


# ---- The toy's own quality number -----------------------------------------------------------------------------------

class ToyFeatures:
    """Two feature spaces fitted on the toy's training pictures, uint8 (N, 3, S, S) with labels (N,):

    classifier(images)  (N, 64), the last features of a small convolutional classifier of the ten species, at 32 x 32,
                        each brought to unit variance on the training pictures, so that none outweighs the others
    pixels(images)      (N, 64), principal components of the picture at 16 x 16
    The first looks at shapes and textures, the second at colours and their places.
    """

    def __init__(self, images, labels, steps=450, batch_size=64):
        small = shrink(images, 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.GELU(),
                                     nn.Conv2d(16, 32, 3, padding=1), nn.GELU(),
                                     nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
                                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, int(labels.max()) + 1))
            optimizer = torch.optim.Adam(self.net.parameters(), lr=2e-3)
            for _ in range(steps):
                batch = torch.randint(len(images), (batch_size,))
                loss = F.cross_entropy(self.net(small[batch] * 2 - 1), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.std = self._last_features(images).std(0)                                      # (64,)
        coarse = shrink(images, 16).flatten(1).double()                                    # (N, 768)
        self.mean = coarse.mean(0)
        self.components = torch.linalg.eigh(torch.cov(coarse.T))[1].flip(1)[:, :64]        # (768, 64)

    @torch.no_grad()
    def _last_features(self, images):
        return torch.cat([self.net[:-1](shrink(part, 32) * 2 - 1) for part in images.split(500)])

    def classifier(self, images):
        return (self._last_features(images) / self.std).double()

    def pixels(self, images):
        return (shrink(images, 16).flatten(1).double() - self.mean) @ self.components

    @torch.no_grad()
    def accuracy(self, images, labels):
        """Share of pictures that the classifier takes for their class. Colour alone gives most of it away."""
        return (self.net[-1](self._last_features(images)).argmax(1) == labels).double().mean().item()


def shrink(images, size):
    """uint8 (N, 3, S, S) -> float [0, 1] (N, 3, size, size), averaged over areas."""
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, size) for part in images.split(500)])


def frechet_of_features(features1, features2):
    """frechet_distance of two sets of features, (N, D) and (M, D)."""
    return frechet_distance(*(statistic for f in (features1.numpy(), features2.numpy())
                              for statistic in (f.mean(0), np.cov(f, rowvar=False))))


def diversity(images, labels):
    """Root-mean-square distance, in grey levels of 255, between two pictures of one class; mean over classes."""
    distances = [torch.pdist(images[labels == c].flatten(1).float()).mean() for c in labels.unique()]
    return (torch.stack(distances).mean() / images[0].numel() ** 0.5).item()


def toy_table(train_images, train_labels, rows):
    """Rows (name, images, labels) against the training pictures -> a list of dicts; use as many pictures in each."""
    features = ToyFeatures(train_images, train_labels)
    reference = features.classifier(train_images), features.pixels(train_images)
    return [{"pictures": name,
             "frechet_classifier": frechet_of_features(reference[0], features.classifier(images)),
             "frechet_pixels": frechet_of_features(reference[1], features.pixels(images)),
             "accuracy": features.accuracy(images, labels),
             "diversity": diversity(images, labels)} for name, images, labels in rows]


def table_text(table):
    """The rows of toy_table in columns; they paste into Markdown."""
    rows = [["", "Frechet distance, classifier", "Frechet distance, pixels", "accuracy", "diversity"]]
    rows += [[row["pictures"], f"{row['frechet_classifier']:.3f}", f"{row['frechet_pixels']:.3f}",
              f"{row['accuracy']:.2f}", f"{row['diversity']:.1f}"] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]) + " |" for row in rows)


def class_means(images, labels):
    """The mean picture of each picture's class, uint8, shape of images: what a model without any variety would draw."""
    means = torch.stack([images[labels == c].float().mean(0) for c in range(int(labels.max()) + 1)])
    return means[labels].round().to(torch.uint8)
