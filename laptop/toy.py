"""The embedded data set, which makes everything run without a download: not the paper's.

Ten species of flowers, drawn by formula; an autoencoder for them, linear and in closed form; and
two feature spaces in which fid.py and laptop/report.py compare them.
"""
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.images import to_float
from utils.processes import keyed_generator

# What differs from the paper's settings. A latent has about 1,000 numbers in place of 196,608: a
# smaller angle hides the picture. Minutes in place of days: the EMA is as much shorter as the run,
# and a high rate that falls at the end makes up for few steps. The noise of sampling was tuned.
SETTINGS = dict(
    rae="toy", model="SiT-T/1", image_size=64, batch_size=64, steps=1500, lr=2e-3, warmup_steps=50,
    decay_last=0.3, clip=1.0, ema_decay=[0.995, 0.98], alpha_max=75.0, cfg=1.2, gamma=1.5,
    sampling_noise="same", sigma_scale=5 / math.tan(math.radians(75)), dtype="float32",
    sample_every=500, save_every=500)
# 3 x 3 patches put the flower into the middle one.
SETTINGS_OF_FLOWERS = dict(image_size=60, rae_patch=20, steps=2000, report=1000)

# ---- The pictures --------------------------------------------------------------------------------

# A petal is a width curve along its axis u in [0, 1], width * u^a * (1 - u)^b (scaled to reach
# `width`); b small: blunt, b near 1: pointed. A notch draws the tip in along the axis. Lengths are
# in units of the flower's radius. Colours: a petal's base and tip, the disc inside and at its rim.
SPECIES = {
    # petals, layers, length, width, a, b, notch, disc, colours
    "daisy":      (14, 1, 0.90, 0.150, 0.45, 0.18, 0.00, 0.24, "e1e4dc ffffff fac81e e1960a"),
    "sunflower":  (15, 2, 0.92, 0.170, 0.60, 0.60, 0.00, 0.42, "f09600 ffd728 5f3714 3c230f"),
    "poppy":      ( 4, 1, 0.90, 0.640, 0.55, 0.16, 0.00, 0.16, "960a0a e6231e 282d23 0f0f0f"),
    "violet":     ( 5, 1, 0.88, 0.430, 0.80, 0.22, 0.06, 0.11, "3c0f78 7d3ccd fad232 fff5aa"),
    "cherry":     ( 5, 1, 0.86, 0.340, 0.70, 0.20, 0.16, 0.12, "eb6e96 ffbed2 cd3c5f fae182"),
    "lily":       ( 6, 1, 0.98, 0.210, 0.80, 0.90, 0.00, 0.09, "fabe3c f07819 964b14 783c14"),
    "cornflower": ( 9, 2, 0.92, 0.150, 1.30, 0.15, 0.22, 0.17, "282896 4664f0 371969 5a288c"),
    "trillium":   ( 3, 1, 0.96, 0.420, 0.70, 0.60, 0.00, 0.13, "cde1be fafcf5 f0d75a c8aa3c"),
    "marigold":   ( 9, 4, 0.88, 0.290, 0.80, 0.20, 0.08, 0.12, "be4605 fa8c14 aa3c05 782805"),
    "aster":      (20, 2, 0.92, 0.085, 0.40, 0.30, 0.00, 0.20, "aa3296 e16ecd fad73c dca51e"),
}


class ToyFlowers:
    """10,000 drawn flowers (split "train") or 2,000 others ("test"), the same on every machine."""

    def __init__(self, image_size=64, split="train"):
        self.name, self.image_size, self.classes = "toy", image_size, list(SPECIES)
        n = {"train": 10_000, "test": 2_000}[split]
        self.labels = torch.arange(n) % len(self.classes)
        self.variation = torch.rand(n, 15, generator=keyed_generator("toy", split))
        # A changed drawing is another data set.
        drawn = hashlib.sha256(self.load(range(20)).numpy().tobytes()).hexdigest()
        self.recipe = {"dataset": "toy", "split": split, "n": n, "image_size": image_size,
                       "drawn": drawn}

    def load(self, indices):
        parts = torch.as_tensor(indices).split(50)            # fits a CPU's cache: 4 times faster
        return torch.cat([draw_flowers(self.labels[i], self.variation[i], self.image_size)
                          for i in parts])


def draw_flowers(labels, variation, image_size):
    """labels (n,), variation (n, 15) in [0, 1) -> uint8 (n, 3, image_size, image_size)."""
    n = len(labels)
    # Sizes are (n, 1, 1), to be broadcast over pixels (n, S, S); colours (n, 3, 1, 1) over images.
    sizes = torch.tensor([row[:-1] for row in SPECIES.values()])[labels]                # (n, 8)
    petals, layers, length, width, a, b, notch, disc = sizes.T.reshape(8, n, 1, 1)
    rgb = torch.tensor([list(bytes.fromhex(row[-1])) for row in SPECIES.values()])[labels]
    base, tip, disc_inside, disc_rim = rgb.float().reshape(n, 4, 3, 1, 1).unbind(1)

    def vary(k, low, high):
        return (low + (high - low) * variation[:, k]).view(n, 1, 1)

    def cover(depth, pixel):                                 # depth inside an edge -> soft coverage
        return (depth / pixel + 0.5).clamp(0, 1)

    def paint(coverage, colour):
        image.add_(coverage.unsqueeze(1) * (colour - image))

    pixel = 2 / image_size
    axis = (torch.arange(image_size) + 0.5) * pixel - 1       # pixel centres, -1 .. 1
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)

    # Background: sky over grass.
    sky = torch.stack([vary(0, 150, 215), vary(1, 175, 225), vary(2, 205, 250)], dim=1)
    grass = torch.stack([vary(3, 60, 130), vary(4, 125, 180), vary(5, 45, 95)], dim=1)
    ground = torch.sigmoid(4 * (y - vary(6, -0.1, 0.5)) / vary(7, 0.15, 0.6)).unsqueeze(1)
    image = ((sky + (grass - sky) * ground) * (1 - 0.12 * y)).repeat(1, 1, 1, image_size)

    # Stem, bending away below the flower.
    centre_x, centre_y = vary(8, -0.10, 0.10), vary(9, -0.16, 0.02)
    radius = vary(10, 0.62, 0.78)
    stem_x = centre_x + vary(11, -0.25, 0.25) * (y - centre_y).clamp(min=0) ** 2
    green = torch.tensor([45.0, 105.0, 35.0]).view(1, 3, 1, 1) * vary(12, 0.8, 1.2).unsqueeze(1)
    paint(cover(0.045 - (x - stem_x).abs(), pixel) * (y > centre_y), green)

    # Petals: each pixel is folded into one petal, (u, v) along and across it. Outer layers first.
    x, y, pixel = (x - centre_x) / radius, (y - centre_y) / radius, pixel / radius
    distance, angle = (x * x + y * y).sqrt(), torch.atan2(x, -y)
    shade, tilt = vary(13, 0.86, 1.08).unsqueeze(1), vary(14, -0.22, 0.22)
    step = 2 * math.pi / petals
    peak = a / (a + b)
    for layer in range(int(layers.max())):
        reach = length * (1 - layer * torch.where(layers == 2, 0.16, 0.22))
        turn = angle / step + tilt + layer / 2
        turn = (turn - turn.round()) * step
        across = distance * turn.sin().abs()
        drawn_in = 1 - notch * (1 - across / (width * reach)).clamp(0, 1)
        u = distance * turn.cos() / (reach * drawn_in)
        inside = u.clamp(1e-4, 1 - 1e-4)
        half_width = width * reach * (inside / peak) ** a * ((1 - inside) / (1 - peak)) ** b
        crease = (across / half_width.clamp(min=1e-3)).clamp(0, 1) ** 2
        light = (1.03 - 0.20 * crease) * (0.86 + 0.14 * (layer + 1) / layers)
        petal = (base + (tip - base) * inside.unsqueeze(1)) * light.unsqueeze(1) * shade
        paint(cover(half_width - across, pixel) * (u < 1) * (layer < layers), petal)

    # Disc, lighter in the middle.
    dome = (1.05 - 0.25 * (distance / disc).clamp(0, 1) ** 2).unsqueeze(1)
    inner = cover(0.55 * disc - distance, pixel).unsqueeze(1)
    colour = (disc_rim + (disc_inside - disc_rim) * inner) * dome * shade
    paint(cover(disc - distance, pixel), colour)
    return image.clamp(0, 255).round().to(torch.uint8)


# ---- The autoencoder. build and fit return the arguments of rae.RAE ------------------------------

def build(channels, image_size, patch_size):
    D = 3 * patch_size ** 2                                   # numbers in a patch
    return {"encoder": nn.Sequential(Patches(patch_size), nn.Conv2d(D, channels, 1)),
            "decoder": nn.Sequential(nn.Conv2d(channels, D, 3, padding=1),
                                     nn.PixelShuffle(patch_size)),
            "latent_mean": torch.zeros(channels, 1, 1), "latent_var": torch.ones(channels, 1, 1),
            "image_size": image_size, "patch_size": patch_size, "name": "toy"}


class Patches(nn.PixelUnshuffle):
    def forward(self, images):
        p = self.downscale_factor
        if images.shape[2] % p or images.shape[3] % p:
            size = tuple(images.shape[2:])
            raise ValueError(f"{size} is not divisible by the patch of {p} pixels")
        return super().forward(images)


@torch.no_grad()
def fit(images, patch_size=16, channels=96, latent_noise=0.2, **of_the_run):
    """Fitted on training pictures (N, 3, S, S), uint8 or in [0, 1]: in closed form, float64 inside.

    Encoder: the first principal components of patches, half whitened. Decoder: the linear map from
    the 3 x 3 latents around a patch to its pixels with the least square error, given noise of
    standard deviation latent_noise on every latent. The noise makes it lean on the neighbours where
    they agree, so patches of a generated picture fit together.
    """
    N, _, S, _ = images.shape
    p = patch_size
    D = 3 * p * p
    channels = min(channels, D)
    parts = build(channels, S, p)
    encoder, decoder = parts["encoder"], parts["decoder"]

    # Encoder.
    patches = [F.pixel_unshuffle(to_float(some), p).double().transpose(0, 1).flatten(1)
               for some in images.split(500)]                 # (D, patches) each
    count = sum(x.shape[1] for x in patches)
    mean = sum(x.sum(1) for x in patches) / count
    covariance = sum((x - mean[:, None]) @ (x - mean[:, None]).T for x in patches) / count
    variances, components = torch.linalg.eigh(covariance)
    variances, components = variances.flip(0)[:channels], components.flip(1)[:, :channels].T
    variances = variances.clamp(min=1e-6 * variances[0].clamp(min=0))     # of too few pictures
    encoder[1].weight.copy_(components.view(channels, D, 1, 1))
    encoder[1].bias.copy_(-components @ mean)

    # Half whitening: divide by std ** 0.5, then one scale to RMS 1. No whitening drowns the fine
    # components, full whitening makes every one of them, mostly noise, as important to the loss as
    # the coarsest.
    std = variances.sqrt()
    latent_var = parts["latent_var"].copy_((std * std.mean()).view(-1, 1, 1))
    scale = (latent_var + 1e-5).sqrt()                        # as RAE.std; the mean is 0

    # Decoder: normal equations of pixels = weight @ [3 x 3 latents, 1]; noise adds its variance to
    # the diagonal.
    def around(z):
        return F.unfold(z, 3, padding=1).double().transpose(0, 1).flatten(1)  # (9 C, patches)

    gram, target = 0, 0
    for some, x in zip(images.split(500), patches):
        z = around(encoder(to_float(some)) / scale)
        z = torch.cat([z, torch.ones(1, z.shape[1])])         # (9 C + 1, patches)
        gram, target = gram + z @ z.T, target + z @ x.T
    inside = around(torch.ones(N, channels, S // p, S // p)).sum(1)       # padding has no noise
    gram.diagonal()[:-1].add_(latent_noise ** 2 * inside + 1e-9 * count)
    solution = torch.linalg.solve(gram, target).T             # (D, 9 C + 1)
    weight = solution[:, :-1].view(D, channels, 3, 3)
    decoder[0].weight.copy_(weight / scale)                   # RAE.decode multiplies by it
    decoder[0].bias.copy_(solution[:, -1])
    return parts


def pictures_to_fit(image_size, patch_size):
    return -(-20_000 // max(1, image_size // patch_size) ** 2)            # 20,000 patches


# As rae.Autoencoder and data.DataSet have it.
AUTOENCODER = dict(build=build, fit=fit, pictures_to_fit=pictures_to_fit, settings=SETTINGS,
                   flags=("rae_patch",), features="toy")
DATASET = dict(make=ToyFlowers, image_size=60,
               held_out=lambda image_size: ToyFlowers(image_size, "test"))

# ---- The feature spaces --------------------------------------------------------------------------

def networks(images=None, labels=None, steps=None, batch_size=64):
    """Two networks for report.Features, made on pictures uint8 (N, 3, S, S) with labels (N,); if
    none are given, on the drawn flowers.

    classifier: the last 64 features of a small classifier of the labels at 32 x 32, each brought to
                unit variance, so that none outweighs the others; it looks at shapes and textures
    pixels:     the picture at 16 x 16; colours and their places
    """
    if images is None:
        flowers = ToyFlowers(60)
        images, labels = flowers.load(range(len(flowers.labels))), flowers.labels
    steps = steps or min(450, 50 + len(images) // 10)         # 450 for the toy
    small = shrink(images, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.GELU(),
                            nn.Conv2d(16, 32, 3, padding=1), nn.GELU(),
                            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(64, int(labels.max()) + 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(steps):
            batch = torch.randint(len(images), (batch_size,))
            loss = F.cross_entropy(net(small[batch] * 2 - 1), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    last = net[:-1].requires_grad_(False)
    std = torch.cat([last(part * 2 - 1) for part in small.split(500)]).std(0)           # (64,)
    std = std.clamp(min=1e-9)                                 # of pictures that are all the same
    return {"classifier": lambda images: (last(shrink(images, 32) * 2 - 1) / std).double(),
            "pixels": lambda images: shrink(images, 16).flatten(1).double()}            # (N, 768)


def shrink(images, size):
    """uint8 (N, 3, H, W) -> float [0, 1] (N, 3, size, size), averaged over areas."""
    parts = images.split(500)
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, size) for part in parts])
