"""How good are the pictures? FID and what is reported beside it, in one file.

    python fid.py out/flowers-SiT-B-1/samples.npz flowers      # FID and inception score; the first weights are fetched
    python fid.py A B --metrics fid,sfid,is,pr,cmmd            # two folders, npz files or names of data sets
    python fid.py A --save-stats ref.npz                       # statistics (mu, sigma) to use as B, or in pytorch-fid
    python fid.py out/toy-SiT-T-1/samples.npz toy --features toy    # the toy's own feature space, which is not FID
    python fid.py A B --features lite0                         # a small network's, for small sets: no FID either
    python fid.py out/RUN/ckpt.pt HELDOUT --features lite0     # the table of a run on photographs: floor, samples, ...
    torchrun --nproc-per-node 8 fid.py A B                     # the pictures are split, the number is the same

A is what is judged, B the reference. Each is a folder (searched to its leaves, pictures of any size), an npz of
pictures (arr_0, as sample.py writes it), an npz of statistics (with ADM's or pytorch-fid's keys) or a data set's name:
its training pictures, cropped as in training (imagenet: ADM's reference). HELDOUT is a folder with the class folders of
the run and none of its pictures. The file reads as the data goes: pictures, networks, statistics and distances, then
the command. Only the command needs other files of this project.
"""
import hashlib
import json
import math
import os
import struct
import sys
import textwrap
import warnings
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import PIL
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

WEIGHTS = dict(url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth", size=95_628_359,
               sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
# ADM's ImageNet-256 reference. Size and sum are those that several public repositories pin; OpenAI gives none.
ADM = dict(url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
               "VIRTUAL_imagenet256_labeled.npz", size=2_037_122_530,
           sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758")
CLIP_MODEL = "vit_large_patch14_clip_quickgelu_336.openai"     # the name without quickgelu has the wrong activation

# Feature spaces: their dimensions, and how the keys mu and sigma end in an npz of statistics (ADM's mu_s, sigma_s).
DIM = {"pool": 2048, "spatial": 2023, "logits": 1008, "clip": 768, "classifier": 64, "pixels": 64, "lite0": 64}
ENDING = {"pool": "", "spatial": "_s"}


class BadInput(ValueError):
    """Pictures, statistics or weights that cannot be used. The message is one line and names the file."""


def one_line(error):
    return " ".join(str(error).split())[:150]


# ---- Pictures: a folder or an npz -----------------------------------------------------------------------------------

@dataclass
class PictureSet:
    """One of the two sets to be compared: pictures, or statistics already made of them, or both (ADM's references)."""
    path: str
    recipe: dict                                        # what it is, for the record
    n: int = 0                                          # how many pictures
    load: Callable = None                               # indices -> uint8 (b, 3, H, W), or a list of (3, H, W)
    statistics: dict = field(default_factory=dict)      # space -> (mu, sigma)
    is_dataset: bool = False

    @property
    def made_with(self):
        """What the features of statistics made here are, as far as their file says so."""
        return self.recipe.get("made_by", {}).get("features", {})

    @property
    def presumed_pipeline(self):
        """ADM's statistics do not say how they were made, but their keys give them away."""
        return "tensorflow" if "spatial" in self.statistics and not self.made_with else None


def open_set(path):
    """A folder or an npz -> PictureSet. BadInput where it holds nothing to score."""
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist: give a folder, an npz or the name of a data set")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is neither a folder nor an npz (nor the name of a data set)")
    try:
        return open_npz(path)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:       # what numpy and zip raise
        raise BadInput(f"{path} cannot be read as an npz ({one_line(error)})") from error


def open_folder(path):
    extensions = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(Path(where, name) for where, _, names in os.walk(path, followlinks=True) for name in names
                   if not name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in extensions]
    if not pictures:
        raise BadInput(f"{path} has no pictures in it or below it")
    listing = "\n".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in pictures)
    recipe = {"folder": str(path), "n": len(pictures),
              "names_and_sizes_sha256": hashlib.sha256(listing.encode()).hexdigest()}
    if len(files) > len(pictures):
        recipe["other_files_left_out"] = len(files) - len(pictures)

    def load(indices):
        with ThreadPoolExecutor() as pool:                                 # PIL lets go of the GIL while it decodes
            images = list(pool.map(lambda i: read_picture(pictures[i]), indices))
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    return PictureSet(str(path), recipe, len(pictures), load)


def read_picture(file):
    """uint8 (3, H, W), as pytorch-fid reads it: the first frame, converted to RGB, EXIF orientation left alone."""
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)     # (H, W, 3) -> (3, H, W)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:      # what PIL raises
        raise BadInput(f"{file} cannot be read as a picture ({error}): repair or remove it") from error


def open_npz(path):
    found = PictureSet(str(path), {"npz": str(path)})
    with np.load(path) as file:
        keys = set(file.files)
        if not keys & {"arr_0", "mu"}:
            raise BadInput(f"{path} has neither arr_0 (pictures) nor mu and sigma (statistics), but {sorted(keys)}")
        read = {key: np.asarray(file[key]) for key in keys & {"mu", "sigma", "mu_s", "sigma_s", "labels", "recipe"}}
    if "recipe" in read:                                                   # sample.py's, or ours of statistics
        made_by = json.loads(str(read["recipe"]))
        found.recipe["made_by"] = made_by if isinstance(made_by, dict) else {"recipe": made_by}
    for space, end in ENDING.items():
        if f"mu{end}" in keys:
            mu, sigma = (read.get(f"{name}{end}", np.zeros(0)) for name in ("mu", "sigma"))
            if mu.ndim != 1 or sigma.shape != 2 * mu.shape or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
                raise BadInput(f"{path}: mu{end} and sigma{end} must be floats of shapes (d,) and (d, d), not "
                               f"{mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}")
            found.statistics[space] = mu, sigma
    if "arr_0" in keys:
        array = map_array(path, "arr_0")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
            raise BadInput(f"{path}: arr_0 must be pictures, uint8 (N, H, W, 3), not {array.dtype} {array.shape}")
        found.n, height, width, _ = array.shape
        found.load = lambda indices: torch.from_numpy(np.asarray(array[list(indices)])).permute(0, 3, 1, 2)
        found.recipe |= {"n": found.n, "size": [height, width]}            # (b, H, W, 3) -> (b, 3, H, W) above
    if "labels" in read and len(read["labels"]):
        counts = np.unique(read["labels"], return_counts=True)[1]
        found.recipe |= {"classes": len(counts), "pictures_a_class": f"{counts.min()} to {counts.max()}"}
    return found


def map_array(path, key):
    """npz[key], mapped in place of read where it is not compressed: 50,000 pictures are 10 GB, in each process."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if member.compress_type != zipfile.ZIP_STORED or version != (1, 0):
                return np.load(path)[key]
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
    if dtype.hasobject or 0 in shape:                                      # cannot be mapped, and will be refused
        return np.empty(shape, dtype)
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))                   # two lengths in the zip's local header
    start = member.header_offset + 30 + name + extra + header
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


# ---- InceptionV3 ----------------------------------------------------------------------------------------------------

class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size, stride 2 takes no padding, unless `padding` says so."""

    def __init__(self, C_in, C_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(C_in, C_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(C_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        conv, bn = self.conv, self.bn
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()             # (C_out,)
        dtype = conv.weight.dtype
        conv.weight.copy_((conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
        conv.bias = nn.Parameter((bn.bias.double() - bn.running_mean.double() * scale).to(dtype), requires_grad=False)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Chains side by side, concatenated. A link of a chain is a pooling function, a convolution (name, channels,
    kernel, stride) or, to fork a chain, a list of convolutions that read the same input."""

    def __init__(self, C_in, *chains):
        super().__init__()
        self.chains = chains
        for chain in chains:
            C = C_in
            for link in chain:
                if not callable(link):
                    for name, width, kernel, *stride in link if isinstance(link, list) else [link]:
                        self.add_module(name, Conv(C, width, kernel, *stride))
                    C = width

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            y = x
            for link in chain:
                if callable(link):
                    y = link(y)
                elif isinstance(link, list):
                    y = torch.cat([getattr(self, name)(y) for name, *_ in link], dim=1)
                else:
                    y = getattr(self, link[0])(y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


# Pooling as TensorFlow has it and torchvision's network does not: averages leave out the padding, and the last block
# takes the maximum (surely a slip, but everybody's FID is made with it).
average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


def block_a(C, pooled):                                                     # 35 x 35
    return Mixed(C, [("branch1x1", 64, 1)],
                 [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
                 [average, ("branch_pool", pooled, 1)])


def block_c(C, c):                                                          # 17 x 17
    return Mixed(C, [("branch1x1", 192, 1)],
                 [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                 [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                  ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))],
                 [average, ("branch_pool", 192, 1)])


def block_e(C, pool):                                                       # 8 x 8
    return Mixed(C, [("branch1x1", 320, 1)],
                 [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                 [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]],
                 [pool, ("branch_pool", 192, 1)])


class InceptionV3(nn.Module):
    """FID's network (Inception of 2015-12-05), with torchvision's names of tensors.

    pipeline "pytorch" resizes and scales as pytorch-fid does, "tensorflow" as ADM's evaluator and torch-fidelity do.
    """
    PIPELINES = {"pytorch": "bilinear to 299 (half pixels, no antialias), then 2 x - 1",
                 "tensorflow": "TensorFlow-1 bilinear to 299 (no half pixels), then (x - 128) / 128"}

    def __init__(self, pipeline="pytorch"):
        super().__init__()
        if pipeline not in self.PIPELINES:
            raise ValueError(f"pipeline {pipeline!r} is not one of {', '.join(self.PIPELINES)}")
        self.pipeline = pipeline
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, [("branch3x3", 384, 3, 2)],                             # 35 -> 17
                              [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
                              [halve])
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = Mixed(768, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],  # 17 -> 8
                              [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                               ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
                              [halve])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Strict, but for batch norm's counters of batches, which some files lack and nothing here reads."""
        counters = {key: value for key, value in self.state_dict().items() if key.endswith("num_batches_tracked")}
        return super().load_state_dict({**counters, **state_dict}, *args, **kwargs)

    def fold(self):
        """Batch norm into the convolutions, in place: the same features to 1e-6, faster. After loading, on the CPU."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        return self

    def prepare(self, images):
        """As extract -> (B, 3, 299, 299), about -1 .. 1."""
        if isinstance(images, list):
            return torch.cat([self.prepare(image[None]) for image in images])
        full = 255 if images.dtype == torch.uint8 else 1
        if full == 1 and not images.is_meta and not (images.min() >= 0 and images.max() <= 1):     # NaN is neither
            raise ValueError("images must be uint8, or floats in [0, 1]: clamp them first")
        x = images.to(self.fc.weight.device).to(self.fc.weight.dtype)
        if self.pipeline == "pytorch":
            return 2 * F.interpolate(x / full, size=(299, 299), mode="bilinear", align_corners=False) - 1
        return (resize_tensorflow(x * (255 / full), 299) - 128) / 128

    def extract(self, images):
        """uint8 or float [0, 1] (B, 3, H, W), or a list of (3, H, W) of any sizes -> a dict:

        pool (B, 2048); spatial (B, 2023), ADM's for sFID; logits (B, 1008), without bias, for the inception score.
        """
        x = self.prepare(images)
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))           # (B, 64, 73, 73)
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                               # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))                                 # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                                 # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)         # (B, 17 * 17 * 7)
        x = self.Mixed_6e(self.Mixed_6d(x))                                                # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                                 # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}

    def forward(self, images):
        """As extract -> (B, 2048)."""
        return self.extract(images)["pool"]


def resize_tensorflow(x, size):
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: pixel i is read at i * H / size, in float32."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.long()
        share = (position - low).to(x.dtype).view((size, 1) if dim == 2 else (size,))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), share)
    return x


def load_inception(path, pipeline="pytorch", device="cpu"):
    """The weights at `path`, folded and channels_last on the device. BadInput where they are not InceptionV3's."""
    net = InceptionV3(pipeline)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except Exception as error:                                             # no zip, no tensors, other keys or shapes
        raise BadInput(f"{path} does not hold InceptionV3's weights ({one_line(error)})") from error
    return net.fold().to(device, memory_format=torch.channels_last)


class CLIP:
    """CLIP ViT-L/14 at 336, by timm: extract(images) -> {"clip": (B, 768)}, each of length 1. For CMMD."""

    def __init__(self, device):
        import timm
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        repo, files = "timm/vit_large_patch14_clip_336.openai", ("model.safetensors", "pytorch_model.bin")
        try:
            if not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
                get_hf_file_metadata(hf_hub_url(repo, files[0]), timeout=10)     # or the next line would retry a minute
            self.net = timm.create_model(CLIP_MODEL, pretrained=True, num_classes=768).eval().to(device)
        except Exception as error:                                         # every library on the way has its own
            raise BadInput(f"cmmd needs the weights of timm's {CLIP_MODEL}, which cannot be had from the Hugging Face "
                           f"Hub ({one_line(error)}): is there a network? Copy its cache from a machine that has "
                           "them, or leave cmmd out of --metrics") from error
        self.device = device

    @staticmethod
    def prepare(image):
        """uint8 (3, H, W) -> float (3, 336, 336): the middle square, bicubic by PIL, CLIP's mean and deviation."""
        side = min(image.shape[1:])
        top, left = ((length - side) // 2 for length in image.shape[1:])
        square = image[:, top:top + side, left:left + side].permute(1, 2, 0).contiguous().numpy()
        picture = Image.fromarray(square).resize((336, 336), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)) / 255                                 # (336, 336, 3)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)

    def extract(self, images):
        with ThreadPoolExecutor() as pool:
            x = torch.stack(list(pool.map(self.prepare, images)))
        return {"clip": F.normalize(self.net(x.to(self.device)))}


# ---- Statistics and distances ---------------------------------------------------------------------------------------

def float64_device(device):
    return "cpu" if torch.device(device).type == "mps" else device         # MPS has no float64


class Statistics:
    """Mean (dim,) and covariance (dim, dim) of features seen once, batch by batch, in float64; no feature is kept."""

    def __init__(self, dim, device="cpu"):
        self.n, self.dim, self.device = 0, dim, float64_device(device)
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)     # of (x - mean)(x - mean)'

    def update(self, features):
        """features (b, dim), a tensor or an array."""
        x = torch.as_tensor(features).to(self.device).double()
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"features must be (b, {self.dim}), not {tuple(x.shape)}")
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other):
        """Adds what another Statistics has seen."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {self.dim} and of {other.dim} features do not add up")
        if other.n:
            self._add(other.n, other._mean.to(self.device), other._scatter.to(self.device))

    def _add(self, n, mean, scatter):
        """Chan, Golub and LeVeque's update: nothing large is subtracted from something large."""
        delta, total = mean - self._mean, self.n + n
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    def all_reduce(self):
        """Merges the statistics of all processes, in each of them."""
        n = torch.tensor(float(self.n), dtype=torch.float64, device=self.device)
        mean = self._mean * n
        dist.all_reduce(n)
        dist.all_reduce(mean)
        mean /= n
        delta = self._mean - mean
        self._scatter += torch.outer(delta, delta) * self.n
        dist.all_reduce(self._scatter)
        self.n, self._mean = int(n), mean

    @property
    def mean(self):
        return self._mean.cpu().numpy()

    @property
    def cov(self):
        """Unbiased, as np.cov. ValueError for fewer than two features, a warning for fewer than dim."""
        if self.n < 2:
            raise ValueError(f"{self.n} picture{'s' * (self.n != 1)}: a covariance needs two or more")
        if self.n < self.dim:
            warnings.warn(f"{self.n:,} pictures for {self.dim:,} features: the covariance is singular and the distance "
                          "too large; compare it only with others of as many pictures", stacklevel=2)
        return (self._scatter / (self.n - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), float64; mu (d,), sigma (d, d).

    sigma1 = P' L L' P by pivoted Cholesky, which stops at the rank of sigma1. Then (sigma1 sigma2) has the eigenvalues
    of the symmetric L' P sigma2 P' L: real, never negative beyond rounding, and exact for singular covariances.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or sigma1.shape != 2 * mu1.shape or sigma2.shape != 2 * mu1.shape:
        raise ValueError(f"shapes do not fit: {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    for name, a in (("mu1", mu1), ("sigma1", sigma1), ("mu2", mu2), ("sigma2", sigma2)):
        if not np.isfinite(a).all():
            raise ValueError(f"{name} has values that are not finite")
        if a.ndim == 2 and np.abs(a - a.T).max(initial=0) > 1e-8 * np.abs(a).max(initial=0):
            raise ValueError(f"{name} is not symmetric")
    L, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    L, order = np.tril(L)[:, :rank], pivots - 1
    eigenvalues = np.linalg.eigvalsh(L.T @ sigma2[np.ix_(order, order)] @ L)
    trace1, trace2 = np.trace(sigma1), np.trace(sigma2)
    if abs(np.square(L).sum() - trace1) > 1e-3 * abs(trace1):              # Cholesky stopped at a negative pivot
        raise ValueError("sigma1 is not a covariance: it has negative eigenvalues")
    if eigenvalues.min(initial=0) < -1e-3 * eigenvalues.max(initial=0):
        raise ValueError("sigma2 is not a covariance: it has negative eigenvalues")
    return float((mu1 - mu2) @ (mu1 - mu2) + trace1 + trace2 - 2 * np.sqrt(eigenvalues.clip(min=0)).sum())


def frechet_of_features(features1, features2):
    """frechet_distance of two sets of features, (N, D) and (M, D)."""
    return frechet_distance(*(statistic for f in (features1.numpy(), features2.numpy())
                              for statistic in (f.mean(0), np.cov(f, rowvar=False))))


def inception_score(logits, parts=None):
    """logits (N, classes) -> mean and standard deviation over parts of exp(mean KL(p(y|x) || p(y))).

    parts None: of 5,000 pictures, in order (ADM). A number: so many, shuffled with seed 2020 (torch-fidelity, 10).
    """
    logits = torch.as_tensor(logits).double()
    N = len(logits)
    if N < (parts or 1):
        raise ValueError(f"{N} pictures do not make {parts or 1} parts, as the inception score has them")
    if parts is None:
        chunks = logits.split(5000)
    else:
        logits = logits[np.random.RandomState(2020).permutation(N)]
        chunks = [logits[i * N // parts:(i + 1) * N // parts] for i in range(parts)]
    scores = []
    for chunk in chunks:
        p, log_p = chunk.softmax(1), chunk.log_softmax(1)
        q = p.mean(0)
        scores.append(((p * log_p).sum(1).mean() - torch.xlogy(q, q).sum()).exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(a, b):
    """(n, d), (m, d) -> (n, m), float64."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def precision_recall(generated, reference, k=3):
    """Shares of generated (N, d) within the reference's (M, d) manifold, and the other way round.

    A manifold is the union of the balls about its points that reach to their k-th neighbours (Kynkaanniemi et al.).
    """
    def inside(x, manifold):
        if len(manifold) <= k:
            raise ValueError(f"{len(manifold)} pictures have no {k} neighbours each, as precision and recall need")
        radii = torch.cat([squared_distances(part, manifold).kthvalue(k + 1).values    # k + 1: the first is itself
                           for part in manifold.split(1000)])
        hits = [(squared_distances(part, manifold) <= radii).any(1) for part in x.split(1000)]
        return torch.cat(hits).double().mean().item()

    generated, reference = (torch.as_tensor(x).double() for x in (generated, reference))
    return inside(generated, reference), inside(reference, generated)


def cmmd(a, b):
    """1000 x the biased squared MMD of unit vectors (n, d), (m, d); Gaussian kernel of width 10 (Jayasumana et al.)."""
    def mean_kernel(x, y):
        return sum((squared_distances(part, y) / -200).exp().sum() for part in x.split(1000)).item() / (len(x) * len(y))
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


# ---- The toy's own features -----------------------------------------------------------------------------------------

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
        return torch.cat([self.net[:-1](part * 2 - 1) for part in shrink(images, 32).split(500)])

    def classifier(self, images):
        return (self._last_features(images) / self.std).double()

    def pixels(self, images):
        return (shrink(images, 16).flatten(1).double() - self.mean) @ self.components

    def extract(self, images):
        return {"classifier": self.classifier(images), "pixels": self.pixels(images)}

    @torch.no_grad()
    def accuracy(self, images, labels):
        """Share of pictures that the classifier takes for their class. Colour alone gives most of it away."""
        return (self.net[-1](self._last_features(images)).argmax(1) == labels).double().mean().item()


def shrink(images, size):
    """uint8 (N, 3, H, W), or a list of (3, H, W) -> float [0, 1] (N, 3, size, size), averaged over areas."""
    parts = [image[None] for image in images] if isinstance(images, list) else images.split(500)
    return torch.cat([F.adaptive_avg_pool2d(part.float() / 255, size) for part in parts])


def diversity(images, labels):
    """Root-mean-square distance, in grey levels of 255, between two pictures of one class; mean over classes."""
    distances = [torch.pdist(images[labels == c].flatten(1).float()).mean() for c in labels.unique()]
    return (torch.stack(distances).mean() / images[0].numel() ** 0.5).item()


def toy_report(train_set, test_set, reconstruct, draw, n=1000):
    """toy_table of a run: n held-out pictures, their reconstructions, class means, and draw(indices, steps)."""
    train, (test, labels) = train_set.load(range(len(train_set.labels))), (test_set.load(range(n)), test_set.labels[:n])
    rows = [("held-out (the floor)", test, labels), ("held-out, reconstructed", reconstruct(test), labels),
            ("class means (to beat)", class_means(train, train_set.labels)[:n], train_set.labels[:n])]
    rows += [(f"{steps} step{'s'[:steps > 1]}", *draw(torch.arange(n), steps)) for steps in (1, 2, 4, 8)]
    return toy_table(train, train_set.labels, rows)


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
    """The rows of toy_table or lite0_report in columns; they paste into Markdown."""
    columns = {"frechet_classifier": ("Frechet distance, classifier", ".3f"), "accuracy": ("accuracy", ".2f"),
               "frechet_pixels": ("Frechet distance, pixels", ".3f"), "diversity": ("diversity", ".1f"),
               "frechet_lite0": ("Frechet distance (lite0)", ".1f"), "pictures": ("", "")}
    rows = [[columns[key][0] for key in table[0]]]
    rows += [[format(value, columns[key][1]) for key, value in row.items()] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    return "\n".join("| " + " | ".join([row[0].ljust(widths[0])] + [
        cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]) + " |" for row in rows)


def class_means(images, labels):
    """The mean picture of each picture's class, uint8, shape of images: what a model without any variety would draw."""
    means = torch.stack([images[labels == c].float().mean(0) for c in range(int(labels.max()) + 1)])
    return means[labels].round().to(torch.uint8)


# ---- Features of a small pretrained network -------------------------------------------------------------------------

class Lite0Features:
    """The space lite0: 64 principal components of the last features of EfficientNet-Lite0, for sets of a few hundred.

    net: timm's tf_efficientnet_lite0 with its ImageNet weights; fit() before extract(). The distance is no FID, and it
    may favour an autoencoder that is made of the same network.
    """

    def __init__(self, net, device="cpu"):
        self.net, self.device = net.eval().to(device, memory_format=torch.channels_last), device

    @torch.no_grad()
    def last(self, images):
        """uint8 (N, 3, H, W), or a list of (3, H, W) of any sizes -> (N, 1280) float64, before the classifier."""
        parts = [image[None] for image in images] if isinstance(images, list) else [images]
        x = (torch.cat([resize(part, 128) for part in parts]) - 127) / 128
        return torch.cat([self.net.forward_head(self.net.forward_features(part.to(self.device)), pre_logits=True).cpu()
                          for part in x.split(64)]).double()

    def fit(self, last, labels=None):
        """The components of the reference's last features (N, 1280); of its labels, a logistic regression on them."""
        self.mean = last.mean(0)
        variances, components = torch.linalg.eigh(torch.cov(last.T))       # rising
        self.components = (components * (variances > 1e-9 * variances[-1])).flip(1)[:, :64]     # 0 beyond the rank
        if labels is not None:
            x = self.project(last)
            self.scale = x.std(0) + 1e-9
            classes = int(labels.max()) + 1
            self.weight, self.bias = (torch.zeros(*shape, dtype=torch.float64, requires_grad=True)
                                      for shape in ((x.shape[1], classes), (classes,)))
            optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

            def loss():
                optimizer.zero_grad()
                value = F.cross_entropy(self.logits(x), labels) + 1e-3 * self.weight.square().sum()
                value.backward()
                return value
            optimizer.step(loss)
        return self

    def project(self, last):
        return (last - self.mean) @ self.components                        # (N, 64)

    def logits(self, features):
        return features / self.scale @ self.weight + self.bias

    def extract(self, images):
        return {"lite0": self.project(self.last(images))}


def resize(images, size):
    """uint8 (N, 3, H, W) -> float 0 .. 255 (N, 3, size, size), bicubic with antialias."""
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)


def lite0_report(features, train_set, test_set, encode, decode, draw, size, n=500):
    """The quality table of a run: n pictures a row, of the labels of n held-out ones, against the training pictures.

    features: Lite0Features, to be fitted here. The sets' pictures are as large as the autoencoder takes them; encode
    takes them to latents, decode to uint8 at size x size, where all are compared; draw(labels, steps) -> uint8.
    "Per-class Gaussian" has the mean and covariance of the n_c training latents z_i of a class, without a matrix: mean
    + sum_i w_i (z_i - mean) / sqrt(n_c - 1), w_i ~ N(0, 1). The denoiser is worth its training where it beats that.
    """
    chosen = test_set.labels.argsort(stable=True)                          # by class, then evenly: each has its share
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), n)).long()]
    train_labels, labels = train_set.labels, test_set.labels[chosen]
    for name, some in ((train_set.name, train_labels), (test_set.name, labels)):
        counts = torch.bincount(some, minlength=len(train_set.classes))
        if counts.min() < 2:
            raise BadInput(f"{name} has {counts.min()} of {len(some)} pictures in the class "
                           f"{train_set.classes[counts.argmin()]}: two or more are needed")
    last, g = torch.zeros(len(train_labels), 1280, dtype=torch.float64), torch.Generator().manual_seed(0)
    names = ("held-out (the floor)", "held-out, reconstructed", "class-mean latent", "per-class Gaussian of latents")
    rows = {name: torch.zeros(len(labels), 3, size, size, dtype=torch.uint8) for name in names}
    for c in tqdm(range(len(counts)), desc="training pictures", unit="class", leave=False):
        z = []
        for part in (train_labels == c).nonzero().flatten().split(64):
            images = train_set.load(part)
            last[part] = features.last(resize(images, size).round().to(torch.uint8))
            z.append(encode(images))
        z = torch.cat(z)                                                   # (n_c, C, h, w)
        mean = z.mean(0, keepdim=True)
        for part in (labels == c).nonzero().flatten().split(64):
            images = test_set.load(chosen[part])
            w = torch.randn(len(part), len(z), generator=g).to(z.device) / (len(z) - 1) ** 0.5
            made = (resize(images, size).round().to(torch.uint8), decode(encode(images)), decode(mean),
                    decode(mean + torch.tensordot(w, z - mean, 1)))
            for name, pictures in zip(names, made):
                rows[name][part] = pictures
    rows |= {f"{steps} step{'s'[:steps > 1]}": draw(labels, steps) for steps in (1, 2, 4, 8)}
    reference, table = features.fit(last, train_labels).project(last), []
    for name, images in rows.items():
        x = features.extract(images)["lite0"]
        accuracy = (features.logits(x).argmax(1) == labels).double().mean().item()
        table.append({"pictures": name, "frechet_lite0": frechet_of_features(reference, x), "accuracy": accuracy,
                      "diversity": diversity(images, labels)})
    return table


# ---- One pass over the pictures of a set ----------------------------------------------------------------------------

def prefetch(load, batches, ahead=2):
    """load(batch) for each batch; a thread keeps some of them ready while the network works."""
    with ThreadPoolExecutor(1) as pool:
        queue = deque()
        for batch in batches:
            queue.append(pool.submit(load, batch))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


@torch.inference_mode()
def measure(pictures, extractors, statistics, rows, batch_size=50, rank=0, world=1, device="cpu"):
    """-> {space: Statistics} for `statistics` and {space: (n, dim), in order} for `rows`, the same in all processes.

    extractors: objects with extract(images) -> {space: (b, dim)}. Process r takes the batches r, r + world, ...
    """
    starts = range(rank * batch_size, pictures.n, world * batch_size)
    batches = [range(start, min(start + batch_size, pictures.n)) for start in starts]
    sums = {space: Statistics(DIM[space], device) for space in statistics}
    kept = {space: torch.zeros(pictures.n, DIM[space], device=float64_device(device)) for space in rows}
    with tqdm(total=pictures.n, desc=pictures.path, unit="picture", disable=rank > 0, leave=False) as bar:
        for batch, images in zip(batches, prefetch(pictures.load, batches)):
            features = {}
            for extractor in extractors:
                features |= extractor.extract(images)
            for space in sums:
                sums[space].update(features[space])
            for space in kept:
                kept[space][batch.start:batch.stop] = features[space]
            bar.update(min(world * len(batch), pictures.n - bar.n))
    if world > 1:
        for space in sums:
            sums[space].all_reduce()
        for features in kept.values():
            dist.all_reduce(features)                                      # a row is zero in all processes but one
    return sums, kept


# ---- The command ----------------------------------------------------------------------------------------------------

FRECHET = {"fid": "pool", "sfid": "spatial", "toy-classifier": "classifier", "toy-pixels": "pixels",   # metric -> space
           "lite0": "lite0"}
ROWS = {"is": "logits", "pr": "pool", "cmmd": "clip"}
INCEPTION = ("fid", "sfid", "is", "pr")


def parse_args(argv):
    from data import ArgumentParser, number
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("A", help="what is judged: a folder, an npz of pictures or of statistics, or the name of a data set")
    add("B", nargs="?", help="the reference: one of the same")
    add("--metrics", help="some of fid,sfid,is,pr,cmmd (default: fid, and is if A has pictures); is alone needs no B")
    add("--features", choices=("inception", "toy", "lite0"), default="inception",
        help="toy: fitted on the toy's pictures, nothing is fetched; lite0: of EfficientNet-Lite0, fitted on B; what "
             "comes out is not called FID")
    add("--pipeline", choices=tuple(InceptionV3.PIPELINES), help="resize and scale as pytorch-fid, or as ADM and "
        "torch-fidelity do (default: as the statistics were made that B holds, else pytorch)")
    add("--save-stats", metavar="FILE", help="write the statistics of A into a new npz, and end")
    add("--inception-weights", metavar="FILE", help="by hand, where they cannot be fetched")
    add("--json", action="store_true", help="print one JSON object: the numbers and the whole recipe")
    add("--batch-size", type=number(int, 1), default=50, help="pictures at once in a process")
    add("--data-dir", default="datasets", help="where data sets, references and their statistics go")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    if args.features != "inception" and (args.metrics or args.save_stats or args.pipeline or args.inception_weights):
        parser.error(f"--features {args.features} has numbers of its own and is fitted anew each time: leave out "
                     "--metrics, --save-stats, --pipeline and --inception-weights")
    if args.save_stats and (args.B or args.metrics):
        parser.error("--save-stats keeps what fid and sfid need of A: give neither B nor --metrics")
    if not args.B and not args.save_stats and args.metrics != "is":
        parser.error("give B, the reference to compare with (or --save-stats FILE, or --metrics is)")
    args.metrics = args.metrics.split(",") if args.metrics else None
    for name in args.metrics or ():
        if name not in (*INCEPTION, "cmmd"):
            parser.error(f"--metrics {name}: there are fid,sfid,is,pr,cmmd")
    return args


def main(argv=None):
    from data import user_errors
    user_errors(command)(argv)


def command(argv):
    from data import UserError
    from train import setup
    args = parse_args(argv)
    rank, world, device = setup(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        if args.features == "lite0" and args.A.endswith(".pt"):
            score_run(args, rank, device)
        else:
            score(args, rank, world, device)
    except BadInput as error:
        raise UserError(error) from error
    finally:
        if world > 1:
            dist.destroy_process_group()


def score(args, rank, world, device):
    from data import UserError
    if args.save_stats and Path(args.save_stats).exists():
        raise UserError(f"{args.save_stats} is there already: remove it or give another name")
    sets = [find_set(name, args.data_dir, rank) for name in (args.A, args.B) if name]
    A, B = sets[0], sets[-1]
    metrics = args.metrics or (["toy-classifier", "toy-pixels"] if args.features == "toy" else
                               ["lite0"] if args.features == "lite0" else
                               ["fid", "sfid"] if args.save_stats else ["fid", "is"] if A.load else ["fid"])

    # What has to be computed from pictures, and by what.
    needs = []                                                             # of each set: statistics, features in rows
    for s in sets:
        statistics = [FRECHET[m] for m in metrics if m in FRECHET and FRECHET[m] not in s.statistics]
        rows = [ROWS[m] for m in metrics if m in ROWS and (m != "is" or s is A)]
        if (statistics or rows) and not s.load:
            raise BadInput(f"{s.path} has no pictures, only statistics of {' and '.join(s.statistics)} features: "
                           f"{','.join(metrics)} cannot be had from it")
        needs.append((statistics, rows))
    pipelines = [args.pipeline, *(s.made_with.get("pipeline") for s in (B, A)), *(s.presumed_pipeline for s in (B, A))]
    pipeline = next(filter(None, pipelines), "pytorch")
    spaces = {space for pair in needs for some in pair for space in some}
    extractors, made_with = load_extractors(args, spaces, pipeline, B, rank, world, device)
    for key in ("pipeline", "weights_sha256"):
        values = {made[key] for made in (made_with, A.made_with, B.made_with) if key in made}
        if len(values) > 1:
            raise BadInput(f"{A.path} and {B.path}: the features have different {key}, {' and '.join(sorted(values))}: "
                           "make the statistics anew")
    notes = [f"{s.path} has ADM's keys: its features are likely of the pipeline {s.presumed_pipeline}, not {pipeline}"
             for s in sets if extractors and s.presumed_pipeline not in (None, pipeline)]

    # One pass over each set. Statistics of a data set are kept for the next time.
    features = []
    for s, (statistics, rows) in zip(sets, needs):
        cache = None
        if s.is_dataset and statistics and args.features == "inception":
            key = json.dumps([s.recipe, made_with["pipeline"], made_with["weights_sha256"]], sort_keys=True)
            name = f"{s.path}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
            cache, statistics = Path(args.data_dir) / "statistics" / name, ["pool", "spatial"]
            if from_first(cache.exists(), world):
                s.statistics, s.recipe["statistics_from"] = open_set(cache).statistics, str(cache)
                cache, statistics = None, []
        sums, kept = {}, {}
        if statistics or rows:
            sums, kept = measure(s, extractors, statistics, rows, args.batch_size, rank, world, device)
        features.append(kept)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                s.statistics |= {space: (found.mean, found.cov) for space, found in sums.items()}
            except ValueError as error:
                raise BadInput(f"{s.path}: {error}") from error
        notes += [f"{s.path}: {warning.message}" for warning in caught]
        for file in filter(None, (cache, args.save_stats)):
            if rank == 0:
                save_statistics(file, s, made_with)
    if rank > 0:
        return
    for note in notes:
        print(f"fid.py: warning: {note}", file=sys.stderr)
    if args.save_stats:
        return print(f"{args.save_stats}: mu, sigma, mu_s, sigma_s of {A.n:,} pictures of {A.path}; {words(made_with)}")
    try:
        numbers = {}
        for metric in metrics:
            numbers |= compute(metric, sets, features, made_with)
        if wrong := [name for name, number in numbers.items() if not math.isfinite(number)]:
            raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}")
    except ValueError as error:
        raise BadInput(f"{' and '.join(s.path for s in sets)}: {error}") from error
    report(args, sets, numbers, made_with, notes, f"{world} x {device.type}")


def score_run(args, rank, device):
    """The table of a checkpoint of train.py and of pictures held out of it: printed, and quality.json beside it."""
    from data import load_dataset, write_whole
    from rae import load_rae, picture_size, pretrained_network, to_float, to_uint8
    from sample import generate, load_denoiser
    from train import autocast, load_checkpoint
    if rank > 0:
        return                                                             # one process does it
    checkpoint = load_checkpoint(args.A)
    run, classes = checkpoint["args"], checkpoint["classes"]
    rae = load_rae(checkpoint["rae"], device, run["weights_dir"])
    settings = (picture_size(run["rae"], rae.image_size), run["rae_patch"] if run["rae"] == "toy" else 1, args.data_dir)
    train = load_dataset(run["dataset"], *settings, run["split"], run["skip_bad"])
    if train.recipe.get("files") != run["pictures"].get("files"):
        raise BadInput(f"the pictures of {run['dataset']} are not those of the run: they are the table's reference")
    test = load_dataset(args.B, *settings, skip_bad=run["skip_bad"])
    if test.recipe.get("files") == train.recipe.get("files"):
        raise BadInput(f"{args.B} holds the training pictures of the run: give others, of the same classes")
    if test.classes != classes:
        raise BadInput(f"{args.B} has the classes {', '.join(test.classes)[:100]}, not the run's, "
                       f"{', '.join(classes)[:100]}")
    model, _ = load_denoiser(checkpoint, "first", device)

    def denoiser(v, y):
        with autocast(run["dtype"], device):
            return model(v, y)

    def draw(labels, steps):
        return torch.cat([generate(denoiser, rae, part, labels[part].to(device), run["seed"], steps, len(classes),
                                   cfg_scale=run["cfg"], gamma=run["gamma"], noise=run["sampling_noise"],
                                   sigma=run["sigma"]) for part in torch.arange(len(labels)).split(args.batch_size)])

    table = lite0_report(Lite0Features(pretrained_network("lite0"), device), train, test,
                         lambda images: rae.encode(to_float(images.to(device))),
                         lambda z: to_uint8(rae.decode(z)).cpu(), draw, rae.image_size)
    with write_whole(Path(args.A).with_name("quality.json")) as part:
        part.write_text(json.dumps(table, indent=1))
    print(json.dumps(table) if args.json else
          f"{args.A} at step {checkpoint['step']}: {run['cfg']:g} guidance, {run['sampling_noise']} noise, pictures of "
          f"{rae.image_size} x {rae.image_size}\n{table_text(table)}")


def find_set(name, data_dir, rank):
    """A data set's name, a folder or an npz -> PictureSet."""
    from data import download, first_process_first, load_dataset
    from train import PRESETS
    if name not in PRESETS or name == "PATH":
        return open_set(name)
    with first_process_first(rank):
        if name == "imagenet":                                             # as everybody: ADM's statistics
            return open_set(download(path=Path(data_dir) / Path(ADM["url"]).name, **ADM))
        dataset = load_dataset(name, PRESETS[name]["image_size"], root=data_dir)
    return PictureSet(name, dataset.recipe, len(dataset.labels), dataset.load, is_dataset=True)


def from_first(value, world):
    """Process 0's value, in all processes."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def load_extractors(args, spaces, pipeline, B, rank, world, device):
    """The networks that give these feature spaces, and what makes their features."""
    from data import download, file_hash, first_process_first, load_dataset
    if args.features == "toy":
        from train import PRESETS
        toy = load_dataset("toy", PRESETS["toy"]["image_size"])
        features = from_first(rank == 0 and ToyFeatures(toy.load(range(len(toy.labels))), toy.labels), world)
        return [features], {"network": "the toy's: a small classifier, and pixels, fitted on its training pictures"}
    if args.features == "lite0":
        from rae import pretrained_network
        with first_process_first(rank):
            features = Lite0Features(pretrained_network("lite0"), device)
        batches = [range(start, min(start + args.batch_size, B.n)) for start in range(0, B.n, args.batch_size)]
        features.fit(torch.cat([features.last(images) for images in prefetch(B.load, batches)]))
        return [features], {"network": "EfficientNet-Lite0's last features at 128 x 128, 64 principal components of B"}
    extractors, made_with = [], {}
    if spaces - {"clip"}:
        path = args.inception_weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS["url"]).name
        with first_process_first(rank):
            if not args.inception_weights:                                 # where pytorch-fid keeps it, too
                download(path=path, **WEIGHTS)
        extractors.append(load_inception(path, pipeline, device))
        made_with = {"network": "InceptionV3", "pipeline": pipeline, "resize": InceptionV3.PIPELINES[pipeline],
                     "weights_sha256": file_hash(path)}
    if "clip" in spaces:
        with first_process_first(rank):
            extractors.append(CLIP(device))
        made_with["clip"] = CLIP_MODEL
    return extractors, made_with


def save_statistics(path, pictures, made_with):
    from data import write_whole
    arrays = {f"{name}{ENDING[space]}": array for space, pair in pictures.statistics.items()
              for name, array in zip(("mu", "sigma"), pair)}
    with write_whole(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays, recipe=json.dumps({"pictures": pictures.recipe, "features": made_with}))


def compute(metric, sets, features, made_with):
    """-> {name: number}. Only Inception's features by the official weights make an FID."""
    weights = {made.get("weights_sha256", WEIGHTS["sha256"]) for made in (made_with, *(s.made_with for s in sets))}
    official = weights == {WEIGHTS["sha256"]}                              # as far as they are known
    ending = "" if official else ", unofficial weights"
    if metric in FRECHET:
        (mu1, sigma1), (mu2, sigma2) = (s.statistics[FRECHET[metric]] for s in (sets[0], sets[-1]))
        if mu1.shape != mu2.shape:
            raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
        if metric not in INCEPTION:
            name = "lite0 Frechet distance" if metric == "lite0" else f"toy Frechet distance, {FRECHET[metric]}"
        elif official and len(mu1) == DIM[FRECHET[metric]]:
            name = {"fid": "FID", "sfid": "sFID"}[metric]
        else:
            name = f"Frechet distance, {len(mu1)} {FRECHET[metric]} features{ending}"
        return {name: frechet_distance(mu1, sigma1, mu2, sigma2)}
    if metric == "is":
        logits = features[0]["logits"]
        names = ("ADM's (parts of 5,000)", "10 parts", "10 parts, deviation")
        return {f"inception score, {name}{ending}": value
                for name, value in zip(names, (inception_score(logits)[0], *inception_score(logits, 10)))}
    if metric == "pr":
        values = precision_recall(features[0]["pool"], features[-1]["pool"])
        return {f"{name} (k = 3){ending}": value for name, value in zip(("precision", "recall"), values)}
    return {"CMMD": cmmd(features[0]["clip"], features[-1]["clip"])}


def report(args, sets, numbers, made_with, notes, where):
    """The numbers with everything that is needed to have them again: printed, and a line in the run's fid.jsonl."""
    from data import file_hash
    for s in sets:
        if Path(s.path).is_file():
            s.recipe["sha256"] = file_hash(s.path)
    recipe = {name: s.recipe for name, s in zip("AB", sets)}
    recipe |= {"features": made_with, "torch": torch.__version__, "pillow": PIL.__version__, "where": where,
               "arguments": vars(args)}
    result = {"numbers": numbers, "recipe": recipe, "warnings": notes}
    if args.json:
        print(json.dumps(result))
    else:
        network = f"{words(made_with) or 'none, statistics alone'}; torch {torch.__version__}, {where}"
        for name, text in [*((name, words(s.recipe)) for name, s in zip("AB", sets)), ("features", network)]:
            print(textwrap.fill(text, 110, initial_indent=f"{name:<10}", subsequent_indent=" " * 10,
                                break_long_words=False, break_on_hyphens=False))
        print()
        for name, number in numbers.items():
            print(f"{name:<{max(map(len, numbers))}}  {round(number, 5) + 0.0:.5f}")       # + 0.0: no -0.00000
    checkpoint = sets[0].recipe.get("made_by", {}).get("checkpoint")
    if checkpoint:
        run = Path(checkpoint).parent
        log = (run if run.is_dir() else Path(args.A).parent) / "fid.jsonl"
        with open(log, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"appended to {log}", file=sys.stderr)


def words(recipe):
    """A recipe in a line, with the first digits of its sums."""
    def word(value):
        return f"({words(value)})" if isinstance(value, dict) else str(value)[:16 if len(str(value)) == 64 else None]
    return ", ".join(f"{key.replace('_', ' ')} {word(value)}" for key, value in recipe.items())


if __name__ == "__main__":
    main()
