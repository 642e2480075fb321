"""The frozen autoencoder between images and latents, and the cache of latents that training reads.

An RAE is an encoder, a decoder and statistics that bring the latents to mean 0 and a chosen variance. Images are
(B, 3, H, W) in [0, 1], latents (B, C, h, w). The one here:

    toy    linear, in closed form: principal components of the training pictures' patches. It is fitted in seconds and
           travels inside the checkpoint. It knows colours and edges, nothing of what is in a picture.
"""
import hashlib
import json
import os
import shutil

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from data import UsageError, UserError, barrier


class RAE(nn.Module):
    """encoder: (B, 3, H, W) in [0, 1] -> (B, C, h, w); decoder: the way back; latent_mean and latent_var: broadcast
    to (C, h, w). image_size: what the denoiser's latents decode to; patch_size: pixels to a side of a latent's pixel."""

    def __init__(self, encoder, decoder, latent_mean, latent_var, image_size, patch_size, name):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("latent_mean", latent_mean)
        self.register_buffer("latent_var", latent_var)
        self.image_size, self.patch_size, self.name = image_size, patch_size, name
        self.eval().requires_grad_(False)

    @property
    def latent_shape(self):
        side = self.image_size // self.patch_size
        return (len(self.latent_mean), side, side)

    @property
    def std(self):
        return (self.latent_var + 1e-5).sqrt()                             # the official RAE's eps, in both directions

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w). ValueError where H or W is no multiple of the patch."""
        if images.shape[2] % self.patch_size or images.shape[3] % self.patch_size:
            raise ValueError(f"{tuple(images.shape[2:])} is not divisible by the patch of {self.patch_size} pixels")
        return (self.encoder(images) - self.latent_mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """(B, C, h, w) -> (B, 3, H, W), not clamped: whoever makes a picture of it clamps."""
        return self.decoder(latents * self.std + self.latent_mean)

    def saved(self):
        """What a checkpoint keeps of it; load_rae is the way back."""
        config = {"name": self.name, "image_size": self.image_size, "patch_size": self.patch_size}
        return {**config, "state": {key: value.cpu() for key, value in self.state_dict().items()}}

    def fingerprint(self):
        """A hash of every number that decides about its latents."""
        digest = hashlib.sha256(f"{self.name} {self.image_size}".encode())
        for key, value in self.state_dict().items():
            digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()


def to_float(images):
    """uint8 pictures -> float in [0, 1]; float images stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Decoded images, about [0, 1] -> uint8 pictures."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


# ---- toy: linear, in closed form ------------------------------------------------------------------------------------

def fit_rae(name, images, patch_size=16, channels=96, latent_noise=0.2):
    """An autoencoder fitted on training pictures (N, 3, S, S), uint8 or in [0, 1]: no gradient descent, float64 inside.

    Encoder: the first principal components of patches, half whitened. Decoder: the linear map from the 3 x 3 latents
    around a patch to its pixels with the least square error, given noise of standard deviation latent_noise on every
    latent. The noise makes it lean on the neighbours where they agree, so patches of a generated picture fit together.
    """
    if name != "toy":
        raise ValueError(f"unknown autoencoder {name!r}: 'toy' is the one that is fitted")
    N, _, S, _ = images.shape
    p = patch_size
    D = 3 * p * p                                                         # numbers in a patch
    channels = min(channels, D)
    if S % p:
        raise UsageError(f"--image-size {S} is not a multiple of --rae-patch {p}: the picture is cut into patches")
    rae = toy_rae(channels, p, S)

    # Encoder.
    def as_patches(images):
        return nn.functional.pixel_unshuffle(to_float(images), p).double()                 # (n, D, S / p, S / p)

    parts = [as_patches(part).transpose(0, 1).flatten(1) for part in images.split(500)]    # (D, patches) each
    count = sum(x.shape[1] for x in parts)
    mean = sum(x.sum(1) for x in parts) / count
    covariance = sum((x - mean[:, None]) @ (x - mean[:, None]).T for x in parts) / count
    variances, components = torch.linalg.eigh(covariance)
    variances, components = variances.flip(0)[:channels].clamp(min=0), components.flip(1)[:, :channels].T
    rae.encoder[1].weight.copy_(components.view(channels, D, 1, 1))
    rae.encoder[1].bias.copy_(-components @ mean)

    # Half whitening: divide by std ** 0.5, then one scale to RMS 1. No whitening drowns the fine components, full
    # whitening makes every one of them, mostly noise, as important to the loss as the coarsest.
    std = variances.sqrt()
    rae.latent_var.copy_((std * std.mean()).view(-1, 1, 1))               # mean of variances / latent_var is 1

    # Decoder: normal equations of pixels = weight @ [3 x 3 latents, 1]; noise adds its variance to the diagonal.
    def around(z):
        return nn.functional.unfold(z, 3, padding=1).double().transpose(0, 1).flatten(1)   # (9 C, patches)

    gram, target = 0, 0
    for part, x in zip(images.split(500), parts):
        z = around(rae.encode(to_float(part)))
        z = torch.cat([z, torch.ones(1, z.shape[1])])                     # (9 C + 1, patches)
        gram, target = gram + z @ z.T, target + z @ x.T
    inside = around(torch.ones(N, channels, S // p, S // p)).sum(1)       # there is no noise in the padding
    gram.diagonal()[:-1].add_(latent_noise ** 2 * inside + 1e-9 * count)
    solution = torch.linalg.solve(gram, target).T                         # (D, 9 C + 1)
    rae.decoder[0].weight.copy_(solution[:, :-1].view(D, channels, 3, 3) / rae.std)        # decode() multiplies by std
    rae.decoder[0].bias.copy_(solution[:, -1])
    return rae


def toy_rae(channels, patch_size, image_size):
    D = 3 * patch_size ** 2
    encoder = nn.Sequential(nn.PixelUnshuffle(patch_size), nn.Conv2d(D, channels, 1))
    decoder = nn.Sequential(nn.Conv2d(channels, D, 3, padding=1), nn.PixelShuffle(patch_size))
    statistics = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    return RAE(encoder, decoder, *statistics, image_size, patch_size, "toy")


def load_rae(saved, device="cpu"):
    """The autoencoder of a checkpoint, from what RAE.saved() kept."""
    rae = toy_rae(len(saved["state"]["latent_var"]), saved["patch_size"], saved["image_size"])
    rae.load_state_dict(saved["state"])
    return rae.to(device)


# ---- The cache of latents -------------------------------------------------------------------------------------------

class LatentCache:
    """Latents of a data set, both flips, float16, memory-mapped: folder/latents.npy (N, 2, C, h, w).

    The folder's name holds a hash of what made them (data set, autoencoder). Chunks of pictures are encoded by the
    processes in turn and ticked off in done.npy, so an interrupted encoding goes on where it stopped, and several runs
    may fill one cache at the same time: they write the same numbers.
    """
    chunk = 256                                                           # pictures; always the same ones together

    def __init__(self, dataset, rae, root, rank=0, world=1):
        self.labels = dataset.labels
        manifest = {"data": dataset.recipe, "autoencoder": rae.fingerprint(), "dtype": "float16", "chunk": self.chunk,
                    "shape": [len(dataset.labels), 2, *rae.latent_shape]}
        key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = root / f"{dataset.name}-{rae.name}-{key}"
        if rank == 0 and not self.folder.exists():
            self._create(manifest)
        barrier()
        found = json.loads((self.folder / "manifest.json").read_text())
        if found != manifest:
            raise UserError(f"{self.folder} was made with other settings than its name says: remove the folder")
        self.latents = np.load(self.folder / "latents.npy", mmap_mode="r+")
        done = np.load(self.folder / "done.npy", mmap_mode="r+")
        todo = [c for c in range(rank, len(done), world) if not done[c]]
        for c in tqdm(todo, desc="encoding", unit="chunk", disable=rank != 0 or not todo, leave=False):
            self._encode(dataset, rae, slice(c * self.chunk, min((c + 1) * self.chunk, len(self.labels))))
            done[c] = True
        barrier()

    def _create(self, manifest):
        """An empty cache, made elsewhere and renamed: nobody meets half of one, or empties one that is being filled."""
        size, chunks = 2 * int(np.prod(manifest["shape"])), -(-manifest["shape"][0] // self.chunk)    # bytes, chunks
        part = self.folder.with_name(f".part-{os.getpid()}-{self.folder.name}")
        part.mkdir(parents=True)
        try:
            free = shutil.disk_usage(part).free
            if free < size * 1.05:
                raise UserError(f"the latents need {size / 1e9:.1f} GB but {part.parent} has {free / 1e9:.1f} GB free")
            np.lib.format.open_memmap(part / "latents.npy", "w+", np.float16, tuple(manifest["shape"]))
            np.lib.format.open_memmap(part / "done.npy", "w+", bool, (chunks,))
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
            part.rename(self.folder)
        except OSError:
            if not self.folder.exists():                                  # else another run was faster: its cache will do
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _encode(self, dataset, rae, where):
        images = to_float(dataset.load(range(where.start, where.stop))).to(rae.latent_var.device)
        for flip in (0, 1):
            z = rae.encode(images.flip(3) if flip else images).half()
            if not z.isfinite().all():
                raise UserError(f"the latents of pictures {where.start} to {where.stop - 1} are not finite in float16")
            self.latents[where, flip] = z.cpu().numpy()
        self.latents.flush()

    def batch(self, indices, flips):
        """indices (b,), flips (b,) 0 or 1 -> latents (b, C, h, w) float16, labels (b,)."""
        return torch.from_numpy(self.latents[indices, flips]), self.labels[indices]
