"""The frozen autoencoder between images and latents, and the latents that training reads.

    python rae.py reconstruct photo.png       # is it right? original beside reconstruction, PSNR

An RAE is an encoder, a decoder and statistics that bring the latents to mean 0 and a chosen
variance. Images are (B, 3, H, W) in [0, 1], latents (B, C, h, w). The paper's is dinov2-b: DINOv2-B
with registers, a ViT-XL decoder, pictures of 256 x 256, latents of 768 x 16 x 16; its 2 GB of
weights are fetched once from the Hugging Face Hub. laptop/ makes smaller ones: toy and lite0.
AUTOENCODERS has each of them; one's own is another entry there.
"""
import contextlib
import hashlib
import json
import math
import re
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import centre_crop
from laptop import lite0, toy  # laptop
from model import sincos_2d
from sphere import full_precision
from utils.checkpoint import hash_of, load_checkpoint, load_renamed, load_tensors
from utils.cli import ArgumentParser, UserError, printable, size_text
from utils.files import (folder_by_hash, free_bytes, from_hub, locked, verify, write_json,
                         write_whole)
from utils.images import (read_picture, refuse_files_of_others, save_picture, to_float, to_tensor,
                          to_uint8)
from utils.processes import (autocast, barrier, first_process_first, from_first, keyed_generator,
                             note, prefetch, say, setup, user_errors)

# Raise it when code changes what an encoder makes of a picture: latents and decoders that were kept
# are then made again.
LATENTS_FORMAT = 2


class RAE(nn.Module):
    """encoder: (B, 3, H, W) in [0, 1] -> (B, C, h, w); decoder: the way back; latent_mean and
    latent_var: (C, h, w), or (C, 1, 1) for any h and w. image_size: what the denoiser's latents
    decode to; patch_size: pixels to a side of a latent's pixel; files: part -> sha256 of weights
    that a checkpoint need not keep; made_by: what a fitted encoder was made by, where its last bits
    depend on the machine."""

    def __init__(self, encoder, decoder, latent_mean, latent_var, image_size, patch_size,
                 name="own", files=None, made_by=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("latent_mean", latent_mean)
        self.register_buffer("latent_var", latent_var)
        self.image_size, self.patch_size = image_size, patch_size
        self.name, self.files, self.made_by = name, files, made_by
        self.dtype = "float32"                                # or "bfloat16": measure it first
        self.eval().requires_grad_(False)

    @property
    def device(self):
        return self.latent_var.device

    @property
    def latent_shape(self):
        side = self.image_size // self.patch_size
        return (len(self.latent_mean), side, side)

    @property
    def std(self):
        return (self.latent_var + 1e-5).sqrt()                # the official eps, in both directions

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w). ValueError where the size does not fit."""
        with autocast(self.dtype, self.device):
            z = full_precision(self.encoder(images))
        return (self._fitting(z) - self.latent_mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """(B, C, h, w) -> (B, 3, H, W), not clamped: whoever makes a picture of it clamps."""
        with autocast(self.dtype, self.device):
            images = self.decoder(self._fitting(latents) * self.std + self.latent_mean)
        return full_precision(images)

    def _fitting(self, z):
        C, h, w = self.latent_mean.shape
        if z.shape[1] != C or (h, w) not in ((1, 1), tuple(z.shape[2:])):
            raise ValueError(f"latents {tuple(z.shape[1:])} do not fit this autoencoder's "
                             f"statistics, {(C, h, w)}")
        return z

    def saved(self):
        """What a checkpoint keeps of it; load_rae is the way back."""
        config = {"name": self.name, "image_size": self.image_size, "patch_size": self.patch_size}
        if self.files:
            return {**config, "files": self.files}
        if self.made_by:
            config["made_by"] = self.made_by
        return {**config, "state": {key: value.cpu() for key, value in self.state_dict().items()}}

    def fingerprint(self):
        """A hash of what decides about its latents."""
        what = f"{self.name} {self.image_size} {LATENTS_FORMAT}".encode()
        digest = hashlib.sha256(what)
        if self.files:
            of_latents = [sha256 for part, sha256 in self.files.items() if part != "decoder"]
            digest.update(json.dumps(of_latents).encode())
        elif self.made_by:
            digest.update(json.dumps(self.made_by, sort_keys=True).encode())
        else:
            return hash_of({key: value for key, value in self.state_dict().items()
                            if not key.startswith("decoder.")}, what)
        return digest.hexdigest()


# ---- dinov2-b: the official representation autoencoder -------------------------------------------

# Part -> repository on the Hub, revision, file, sha256. By hand they go into one --weights-dir.
OFFICIAL_FILES = {
    "encoder": ("facebook/dinov2-with-registers-base", "a1d738ccfa7ae170945f210395d99dde8adb1805",
                "model.safetensors",
                "7a6f7b3b9fa4b8732e707476a03cd6cdce210048582f21aafb7991c17d98e362"),
    "decoder": ("nyu-visionx/RAE-collections", "1be4f03273523431f099a934da4cf1940dc6039f",
                "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                "5fedf7c9660476a709e122cef18385c917532914a23f034388e1c1a52bde2be6"),
    "statistics": ("nyu-visionx/RAE-collections", "1be4f03273523431f099a934da4cf1940dc6039f",
                   "stats/dinov2/wReg_base/imagenet1k/stat.pt",
                   "84ede66def5e6e3f25679334dc89cf63b12aacb99cbf0f5ae7ed4ad3187f7e59"),
}
# timm's names, and the decoder's here, -> those of the files, in order; see load_renamed.
ATTENTION_NAMES = [("attn.qkv", "attention.attention.qkv"), ("attn.proj", "attention.output.dense")]
ENCODER_NAMES = [
    *ATTENTION_NAMES, ("^blocks", "encoder.layer"), (r"ls(\d).gamma", r"layer_scale\1.lambda1"),
    ("^(cls_token|reg_token|pos_embed|patch_embed)", r"embeddings.\1"),
    ("reg_token", "register_tokens"), ("pos_embed", "position_embeddings"),
    ("patch_embed.proj", "patch_embeddings.projection")]
DECODER_NAMES = [
    *ATTENTION_NAMES, ("^blocks", "decoder_layers"), ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ("^cls_token", "trainable_cls_token"), (r"^(embed|pos_embed|norm|pred)\b", r"decoder_\1")]
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class DINOv2Encoder(nn.Module):
    """(B, 3, S, S) in [0, 1] -> (B, D, 16, 16): timm's DINOv2 with registers at 224 x 224."""

    def __init__(self, hidden_size=768, depth=12, num_heads=12):
        super().__init__()
        import timm                                           # seconds
        self.vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", img_size=224,
                                     num_classes=0, embed_dim=hidden_size, depth=depth,
                                     num_heads=num_heads)
        self.vit.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.side = self.vit.patch_embed.grid_size[0]

    @classmethod
    def from_hugging_face(cls, state, num_heads=12):
        """From transformers' Dinov2WithRegistersModel, whose sizes it takes. ValueError names keys
        that are missing, unexpected or of another shape."""
        from timm.layers import resample_abs_pos_embed
        unused = ("embeddings.mask_token", "layernorm.weight", "layernorm.bias")
        state = {key: value for key, value in state.items() if key not in unused}
        cls_token, position = "embeddings.cls_token", "embeddings.position_embeddings"
        if missing := [key for key in (cls_token, position) if key not in state]:
            raise ValueError(f"missing: {missing[0]}")
        depth = len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")})
        encoder = cls(state[cls_token].shape[-1], depth, num_heads)
        # timm adds the class token's position to the token; its table has the size that is needed.
        table = state[position]                               # (1, 1 + 37 * 37, D)
        state[cls_token] = state[cls_token] + table[:, :1]
        state[position] = resample_abs_pos_embed(table[:, 1:], [encoder.side] * 2,
                                                 num_prefix_tokens=0)
        load_renamed(encoder.vit, state, ENCODER_NAMES)
        return encoder

    def forward(self, images):
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"images {tuple(images.shape[2:])} are not square: squashed otherwise")
        if images.shape[2] != 224:                            # as official: no antialias, no clamp
            images = F.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False)
        images = (images - IMAGENET_MEAN.to(images)) / IMAGENET_STD.to(images)
        tokens = self.vit.forward_features(images)
        tokens = tokens[:, self.vit.num_prefix_tokens:]       # (B, 256, D): no class, no registers
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))    # (B, D, 16, 16)


class ViTDecoder(nn.Module):
    """(B, C, h, h) -> (B, 3, h p, h p), about [0, 1]: the official RAE's decoder."""

    def __init__(self, in_channels=768, hidden_size=1152, depth=28, num_heads=16, mlp_size=4096,
                 patch_size=16, side=16):
        super().__init__()
        from timm.models.vision_transformer import Block      # seconds
        self.patch_size, self.side = patch_size, side
        norm = partial(nn.LayerNorm, eps=1e-12)
        self.embed = nn.Linear(in_channels, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = F.pad(sincos_2d(hidden_size, side), (0, 0, 1, 0))     # 0 for the class token
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_size / hidden_size, qkv_bias=True, norm_layer=norm)
            for _ in range(depth))                            # GELU by erf
        self.norm = norm(hidden_size)
        self.pred = nn.Linear(hidden_size, patch_size ** 2 * 3)

    @classmethod
    def from_official(cls, state_dict, num_heads=16):
        """From the official state dict, whose sizes it takes (but num_heads). ValueError names keys
        that are missing, unexpected or of another shape."""
        try:
            hidden_size, in_channels = state_dict["decoder_embed.weight"].shape
            mlp_size = len(state_dict["decoder_layers.0.intermediate.dense.weight"])
            patch_size = math.isqrt(len(state_dict["decoder_pred.weight"]) // 3)
            side = math.isqrt(state_dict["decoder_pos_embed"].shape[1] - 1)
        except KeyError as error:
            raise ValueError(f"missing: {error.args[0]}") from error
        layers = {key.split(".")[1] for key in state_dict if key.startswith("decoder_layers.")}
        with torch.device("meta"):                            # the parameters come from the file
            decoder = cls(in_channels, hidden_size, len(layers), num_heads, mlp_size, patch_size,
                          side)
        load_renamed(decoder, state_dict, DECODER_NAMES)
        return decoder

    def forward(self, z):
        B, C, h, w = z.shape
        if (h, w) != (self.side, self.side):
            raise ValueError(f"{h} x {w} latents, but the table of positions is for "
                             f"{self.side} x {self.side}")
        x = self.embed(z.flatten(2).transpose(1, 2))          # (B, C, h, w) -> (B, h w, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))[:, 1:]                    # (B, h w, p p 3), no class token
        p = self.patch_size
        x = x.view(B, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4)            # (B, 3, h, p, w, p)
        return x.reshape(B, 3, h * p, w * p) * IMAGENET_STD.to(x) + IMAGENET_MEAN.to(x)


def official_rae(weights_dir=None):
    """DINOv2-B with registers and the ViT-XL decoder, from verified files."""
    from safetensors.torch import load
    paths = official_files(weights_dir)
    part = "encoder"
    try:
        encoder = DINOv2Encoder.from_hugging_face(load(Path(paths[part]).read_bytes()))
        part = "decoder"
        decoder = ViTDecoder.from_official(load_tensors(paths[part], "is not the decoder"))
        part = "statistics"
        statistics = load_tensors(paths[part], "is not the statistics")
        mean, var = statistics["mean"].float(), statistics["var"].float()     # (768, 16, 16) each
        side = encoder.side
        shapes = {"mean": tuple(mean.shape), "var": tuple(var.shape),
                  "encoder": (encoder.vit.embed_dim, side, side),
                  "decoder": (decoder.embed.in_features, decoder.side, decoder.side)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the parts do not fit together: {shapes}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths[part]} is not the {part} that this code knows: {error}") from error
    formula = F.pad(sincos_2d(decoder.pos_embed.shape[2], side), (0, 0, 1, 0))
    difference = (decoder.pos_embed - formula).abs().max().item()
    if difference > 1e-5:
        note(f"the decoder's positions differ from the sin-cos formula by {difference:.2g}; the "
             "file's are used")
    files = {part: sha256 for part, (_, _, _, sha256) in OFFICIAL_FILES.items()}
    return RAE(encoder, decoder, mean, var, side * decoder.patch_size, decoder.patch_size,
               "dinov2-b", files)


def official_files(weights_dir=None):
    """Returns {part: its verified file}, from weights_dir, the Hub's cache, or fetched."""
    from huggingface_hub import hf_hub_url
    paths, missing, why = {}, [], f"not in {weights_dir}"
    for part, (repo, revision, file, sha256) in OFFICIAL_FILES.items():
        url = hf_hub_url(repo, file, revision=revision)
        if weights_dir:
            path = Path(weights_dir) / Path(file).name
        else:
            # One failure is enough.
            path, reason = from_hub(repo, file, revision, fetch=not missing)
            why = why if missing else reason
        if path and Path(path).exists():
            paths[part] = verify(path, f"remove it and fetch {url} again", sha256=sha256)
        else:
            missing.append(url)
    if missing:
        raise UserError(f"the official autoencoder lacks {len(missing)} of {len(OFFICIAL_FILES)} "
                        f"files ({why}): try again with a network, or put {' and '.join(missing)} "
                        "into a folder by hand and name it by --weights-dir")
    return paths


# ---- The autoencoders that there are -------------------------------------------------------------

class Autoencoder(NamedTuple):
    """How one is had, and what goes with it. build and fit return the arguments of RAE.

    build(channels, image_size, patch_size): with random weights, for those of a checkpoint
    fit(images, image_size=, patch_size=, seed=, device=, recipe=): on uint8 (N, 3, S, S), pictures
        of the run; or fetch(weights_dir) -> an RAE
    train_decoder(rae, dataset, latents, folder, steps, seed, rank, flips): after fit, on latents
    """
    build: Callable = None
    fit: Callable = None
    fetch: Callable = None
    train_decoder: Callable = None
    pictures_to_fit: Callable = lambda image_size, patch_size: 1000       # are enough
    # -> the side that pictures are brought to, and the least that they may have
    sides: Callable = lambda image_size: (image_size, 1)
    settings: dict = None           # what differs from the paper's; None: as the data set's own
    flags: tuple = ()               # settings that mean nothing to all others
    features: str = "lite0"         # the features of laptop/report.py that judge it


def pixels(channels, image_size, patch_size):
    """No autoencoder: a latent is the picture in patches, -1 to 1. For what works on pictures."""
    half = torch.full((3 * patch_size ** 2, 1, 1), 0.5)
    return {"encoder": nn.PixelUnshuffle(patch_size), "decoder": nn.PixelShuffle(patch_size),
            "latent_mean": half, "latent_var": half ** 2, "image_size": image_size,
            "patch_size": patch_size, "name": "pixels"}


AUTOENCODERS = {
    "dinov2-b": Autoencoder(fetch=official_rae, settings={}),
    "pixels": Autoencoder(pixels, lambda images, image_size, patch_size, **_: pixels(
        None, image_size, patch_size), flags=("rae_patch",), features="toy"),
}
AUTOENCODERS["toy"] = Autoencoder(**toy.AUTOENCODER)  # laptop
AUTOENCODERS |= {name: Autoencoder(**of) for name, of in lite0.AUTOENCODERS.items()}  # laptop


def load_rae(source, device="cpu", weights_dir=None):
    """The autoencoder called `source`, or a checkpoint's, from what RAE.saved() kept.

    weights_dir: where the official files are; without it they come from the Hub.
    """
    saved = {"name": source} if isinstance(source, str) else source
    of = AUTOENCODERS.get(saved["name"])
    if of is None or not of.fetch and "state" not in saved:
        raise ValueError(f"unknown autoencoder {saved['name']!r}: those that are fetched can be "
                         "loaded by name, others from a checkpoint; your own: see AUTOENCODERS")
    if of.fetch:
        rae = of.fetch(weights_dir)
        if saved.get("files", rae.files) != rae.files:
            raise UserError("the checkpoint was made with other weights of "
                            f"{rae.name} than these: their sha256 differ")
    else:
        channels = len(saved["state"]["latent_var"])
        parts = of.build(channels, saved["image_size"], saved["patch_size"])
        rae = RAE(**{**parts, "name": saved["name"]})
        rae.made_by = saved.get("made_by")
        rae.load_state_dict(saved["state"])
    return rae.to(device)


def open_rae(name, dataset, image_size, patch_size=16, seed=0, device="cpu", weights_dir=None,
             saved=None):
    """The autoencoder of a run: a checkpoint's (saved), or fetched, or fitted on the pictures.

    What is fetched or fitted, the first process does, and the others find or receive it.
    """
    of = AUTOENCODERS[name]
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if not of.fetch and not saved:
        if rank == 0:
            order = torch.randperm(len(dataset.labels), generator=keyed_generator("fit", seed))
            images = dataset.load(order[:of.pictures_to_fit(image_size, patch_size)])
            parts = of.fit(images, image_size=image_size, patch_size=patch_size, seed=seed,
                           device=device, recipe=dataset.recipe)
            saved = RAE(**{**parts, "name": name}).saved()
        saved = from_first(saved)
    with first_process_first(rank):
        rae = load_rae(saved or name, device, weights_dir)
    if rae.image_size != image_size:
        raise UserError(f"--image-size {image_size}: {name} takes pictures of {rae.image_size}")
    return rae


def picture_sides(name, image_size, patch_size=16):
    """Returns the side that its pictures are brought to, and the least that they may have."""
    of = AUTOENCODERS[name]
    if "rae_patch" not in of.flags:
        return of.sides(image_size)
    if image_size % patch_size:
        raise UserError(f"--image-size {image_size} is not a multiple of the {name} autoencoder's "
                        f"patch of {patch_size}")
    return image_size, patch_size


# ---- Latents of a data set -----------------------------------------------------------------------

def open_latents(dataset, rae, root, cache="auto", rank=0, world=1, flips=True, check=False):
    """The latents of a run: from a cache in root, encoded in every step, or as the disk allows.

    flips: of mirror images, too; check: the checksums of a large cache, too.
    """
    fits = cache == "yes"
    if cache == "auto":
        folder, manifest = cache_of(dataset, rae, root, flips)
        size, free = cache_bytes(manifest), free_bytes(root)
        fits = from_first(folder.exists() or size < 0.9 * free)
        if not fits:
            note(f"the latents would take {size_text(size)}, {root} has {size_text(free)} free: "
                 "pictures are encoded in every step (--cache-latents decides otherwise)")
    if not fits:
        return LatentsOnTheFly(dataset, rae)
    return LatentCache(dataset, rae, root, rank, world, flips, check)


def cache_of(dataset, rae, root, flips=True):
    """Returns folder, manifest. The manifest says what makes latents; its hash is in the name."""
    shape = [len(dataset.labels), 1 + flips, *rae.latent_shape]
    manifest = {"data": dataset.recipe, "autoencoder": rae.fingerprint(), "dtype": "float16",
                "pictures_a_file": LatentCache.part, "shape": shape}
    return folder_by_hash(root, f"{dataset.name}-{rae.name}", manifest), manifest


def cache_bytes(manifest):
    return 2 * math.prod(manifest["shape"])                   # float16


def encode_to_half(rae, images, indices):
    """Pictures (b, 3, S, S) with these numbers -> float16 (b, C, h, w), on the RAE's device."""
    z = rae.encode(to_float(images.to(rae.device))).half()
    for i, finite in zip(indices, z.isfinite().flatten(1).all(1).tolist()):
        if not finite:
            raise UserError(f"the latent of picture {i} is not finite in float16")
    return z


class LatentsOnTheFly:
    """Pictures, read and encoded when they are asked for: as the cache, but for its rounding."""

    def __init__(self, dataset, rae):
        self.dataset, self.rae = dataset, rae

    def __len__(self):
        return len(self.dataset.labels)

    def batch(self, indices, flips):
        """indices (b,), flips (b,) 0 or 1 -> latents (b, C, h, w) float16, labels (b,)."""
        images, flips = self.dataset.load(indices), torch.as_tensor(flips).view(-1, 1, 1, 1)
        images = torch.where(flips == 1, images.flip(3), images)
        return encode_to_half(self.rae, images, indices), self.dataset.labels[indices]


class LatentCache:
    """Latents, both flips or one, in files of 256 pictures: folder/NUMBER-CRC32.f16, each an array
    (n, flips, C, h, w) of float16.

    A file is there whole or not at all and has its checksum in its name, so the same command
    resumes an interrupted encoding, in which the processes take the files in turn. What is found
    damaged is encoded again; beyond 8 GB only `check` looks. A folder is filled by one run at a
    time; others wait.
    """
    part = 256                                                # pictures; always the same together
    checked_below = 8e9                                       # bytes: at each start

    def __init__(self, dataset, rae, root, rank=0, world=1, flips=True, check=False,
                 what="pictures"):
        self.labels, self.what = dataset.labels, what
        self.folder, self.manifest = cache_of(dataset, rae, root, flips)
        self.shape = tuple(self.manifest["shape"][1:])        # of a picture: (flips, C, h, w)
        N, check = len(self.labels), check or cache_bytes(self.manifest) < self.checked_below
        self.parts = [range(i, min(i + self.part, N)) for i in range(0, N, self.part)]
        files, mine = self._files(), range(rank, len(self.parts), world)
        damaged = [c for c in mine if check and c in files and not self._is_whole(files[c])]
        for c in damaged:
            files[c].unlink()
        if damaged:
            note(f"{len(damaged)} of {len(self.parts)} files of {self.folder} were damaged: they "
                 "are encoded again")
        barrier()
        if not from_first(len(self._files()) == len(self.parts)):         # else it is only read
            with locked(self.folder, wait=True) if rank == 0 else contextlib.nullcontext():
                if rank == 0:
                    self._prepare()
                barrier()
                files = self._files()
                self._encode(dataset, rae, [self.parts[c] for c in mine if c not in files],
                             rank, world)
                barrier()
        self.files = self._files()
        if len(self.files) < len(self.parts):
            raise UserError(f"process {rank} sees {len(self.files)} of {len(self.parts)} files of "
                            f"{self.folder}: all must see the same folder")

    def _files(self):
        """{number: path} of those that are there and have the right size."""
        found = {}
        for path in sorted(self.folder.glob("*.f16")):
            name = re.fullmatch(r"(\d{6})-[0-9a-f]{8}", path.stem)
            c = int(name[1]) if name else len(self.parts)
            if c < len(self.parts) and path.stat().st_size == self._bytes(self.parts[c]):
                found.setdefault(c, path)
        return found

    def _bytes(self, pictures):
        return 2 * len(pictures) * math.prod(self.shape)

    def _is_whole(self, path):
        return path.stem.endswith(f"-{zlib.crc32(path.read_bytes()):08x}")

    def _prepare(self):
        have = sum(path.stat().st_size for path in self._files().values())
        need, free = cache_bytes(self.manifest) - have, free_bytes(self.folder)
        if free < 1.05 * need:
            otherwise = ", or encode in every step with --cache-latents no"
            raise UserError(f"the latents need {size_text(need)} but {self.folder} has "
                            f"{size_text(free)} free: make room"
                            + otherwise * (self.what == "pictures"))
        write_json(self.folder / "manifest.json", self.manifest)          # for people to read

    def _encode(self, dataset, rae, todo, rank, world):
        started, n, flips = time.perf_counter(), sum(map(len, todo)), self.shape[0]
        with tqdm(total=n, desc="encoding", unit=f" {self.what}",
                  disable=rank != 0 or not todo or None, leave=False) as bar:
            for pictures, images in zip(todo, prefetch(dataset.load, todo, ahead=1)):
                z = torch.stack([encode_to_half(rae, images.flip(3) if flip else images, pictures)
                                 for flip in range(flips)], dim=1)        # (n, flips, C, h, w)
                data = z.cpu().numpy().tobytes()
                name = f"{pictures.start // self.part:06d}-{zlib.crc32(data):08x}.f16"
                with write_whole(self.folder / name) as part:
                    part.write_bytes(data)
                bar.update(len(pictures))
        if todo:
            seconds = time.perf_counter() - started
            say(f"encoded {n:,} {self.what}{' and their mirror images' * (flips > 1)} in "
                f"{seconds:.1f} s, {n / seconds:.0f} {self.what}/s" +
                f" in each of {world} processes" * (world > 1) + f": {self.folder}")

    def __len__(self):
        return len(self.labels)

    def batch(self, indices, flips):
        """indices (b,), flips (b,) 0 or 1 -> latents (b, C, h, w) float16, labels (b,)."""
        flips_of_each, *shape = self.shape
        found, size = np.empty((len(indices), *shape), np.float16), 2 * math.prod(shape)  # bytes
        for latent, i, flip in zip(found, np.asarray(indices), np.asarray(flips)):
            part, at = divmod(int(i), self.part)
            try:
                with open(self.files[part], "rb", buffering=0) as file:
                    file.seek((at * flips_of_each + int(flip)) * size)
                    if file.readinto(memoryview(latent).cast("B")) != size:
                        raise FileNotFoundError
            except FileNotFoundError:
                raise UserError(f"{self.files[part]} is gone, or has become shorter: start again, "
                                "and it is encoded again") from None
        return torch.from_numpy(found), self.labels[indices]


# ---- The command ---------------------------------------------------------------------------------

def write_reconstruction(rae, file, path):
    """Original beside reconstruction, both in 8 bits -> path; returns the PSNR between them, dB."""
    side = picture_sides(rae.name, rae.image_size, rae.patch_size)[0]
    picture = centre_crop(read_picture(file), side)
    decoded = to_uint8(rae.decode(rae.encode(to_float(to_tensor(picture)[None].to(rae.device)))))
    decoded = decoded[0].cpu()                                # (3, S, S)
    original = to_tensor(picture.resize(decoded.shape[1:], Image.Resampling.BICUBIC))
    both = torch.cat([original, decoded], dim=2).permute(1, 2, 0)         # (S, 2 S, 3)
    with write_whole(path) as part:
        save_picture(Image.fromarray(both.numpy()), part)
    error = (original.double() - decoded.double()).square().mean().item()
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


def rae_of(path):
    """What the checkpoint at `path` keeps of its autoencoder."""
    return load_checkpoint(path, check_rae)["rae"]


def check_rae(checkpoint):
    """Returns the latents' shape; None for an autoencoder that is fetched: it is looked at then."""
    saved = checkpoint["rae"]
    if saved["name"] not in AUTOENCODERS or not AUTOENCODERS[saved["name"]].fetch:
        return load_rae(saved).latent_shape


@user_errors
def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("command", choices=("reconstruct",), help="original beside reconstruction, with PSNR")
    add("images", nargs="+", metavar="IMAGE", help="files; the square in the middle is taken")
    add("--ckpt", help="take the autoencoder of this checkpoint, not the official one")
    add("--weights-dir", help="folder with the official files, put there by hand")
    add("--out", default="out/reconstructions", help="folder of the pictures, by their names")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    paths = [Path(args.out) / f"{Path(file).stem}.reconstructed.png" for file in args.images]
    if len(set(paths)) < len(paths):
        raise UserError("--out: two pictures have the same name, and so would their "
                        "reconstructions: do them one by one")
    refuse_files_of_others(paths)
    device = setup(args.device)[2]
    rae = load_rae(rae_of(args.ckpt) if args.ckpt else "dinov2-b", device, args.weights_dir)
    values = []
    for file, path in zip(args.images, paths):
        values.append(write_reconstruction(rae, file, path))
        print(f"{printable(file)}: {values[-1]:.2f} dB -> {printable(path)}")
    if len(values) > 1:
        print(f"mean of {len(values)}: {sum(values) / len(values):.2f} dB")


if __name__ == "__main__":
    main()
