"""How good are the pictures? FID and what is reported beside it, and the quality report of a run.

    python fid.py out/flowers-SiT-B-1/samples.npz flowers      # FID and inception score
    python fid.py A B --metrics fid,sfid,is,pr,cmmd            # folders, npz files, data sets
    python fid.py A --save-stats ref.npz                       # to be B, here or in pytorch-fid
    python fid.py A B --features lite0                         # a small network's: not FID
    python fid.py out/RUN/ckpt.pt                              # the report that ends train.py
    python fid.py out/RUN/ckpt.pt HELDOUT                      # the same, against other pictures
    torchrun --nproc-per-node 8 fid.py A B                     # the same number

A is what is judged, B the reference. Each is a folder (searched to its leaves, pictures of any
size), an npz of pictures (arr_0, as sample.py writes it), an npz of statistics (with ADM's or
pytorch-fid's keys) or a data set's name: its training pictures, cropped as in training (imagenet:
ADM's reference). HELDOUT is a folder with the class folders of the run and none of its pictures.
The file reads as the data goes: pictures, networks, statistics and distances, one pass over a set,
the report of a run, the command.
"""
import contextlib
import json
import math
import os
import sys
import textwrap
import warnings
import zipfile
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
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d, Inception3
from tqdm import tqdm

from common import (ArgumentParser, UserError, file_hash, first_process_first, from_first,
                    from_hub, hash_of, load_tensors, number, one_line, physical_memory, prefetch,
                    printable, resize, say, setup, table_text, to_float, to_uint8, user_errors,
                    write_json, write_whole)
from data import (IMAGE_SIZE, count_of, download, is_plain, load_dataset, open_picture,
                  picture_files, to_tensor, upright_rgb)
from laptop import lite0, toy  # laptop
from rae import load_checkpoint, load_rae, picture_sides
from sample import draw, load_denoiser, sampling_settings

WEIGHTS = dict(url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth", size=95_628_359,
               sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
# ADM's ImageNet-256 reference. Size and sum are those that public repositories pin; OpenAI gives
# none.
ADM = dict(url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
               "256/VIRTUAL_imagenet256_labeled.npz", size=2_037_122_530,
           sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758")
CLIP_MODEL = "vit_large_patch14_clip_quickgelu_336.openai"    # without quickgelu: the wrong one

# Feature spaces: their dimensions, and how the keys mu and sigma end in an npz of statistics.
DIM = {"pool": 2048, "spatial": 2023, "logits": 1008, "clip": 768}
DIM |= {"classifier": 64, "pixels": 768, "lite0": 1280}  # laptop
ENDING = {"pool": "", "spatial": "_s"}                        # ADM's mu_s, sigma_s

# ---- Pictures: a folder or an npz ----------------------------------------------------------------


@dataclass
class PictureSet:
    """One of two sets to be compared: pictures, or statistics already made of them, or both."""
    path: str
    recipe: dict                                        # what it is, for the record
    n: int = 0                                          # how many pictures
    load: Callable = None                               # indices -> uint8 (b, 3, H, W), or a list
    statistics: dict = field(default_factory=dict)      # space -> (mu, sigma)
    is_dataset: bool = False
    unlike: set = field(default_factory=set)            # what pytorch-fid reads otherwise: numbers
    notes: list = field(default_factory=list)

    @property
    def made_with(self):
        """What the features of statistics made here are, as far as their file says so."""
        features = self.recipe.get("made_by", {}).get("features")
        known = features if isinstance(features, dict) else {}
        return {key: known[key] for key in ("pipeline", "weights_sha256")
                if isinstance(known.get(key), str)}

    @property
    def presumed_pipeline(self):
        """ADM's statistics do not say how they were made, but their keys give them away."""
        return "tensorflow" if "spatial" in self.statistics and not self.made_with else None


def find_set(name, data_dir, rank, as_pytorch_fid=False):
    """A data set's name, a folder or an npz -> PictureSet. UserError: nothing to score."""
    path = Path(name)
    if name in IMAGE_SIZE:
        with first_process_first(rank):
            if name != "imagenet":
                dataset = load_dataset(name, IMAGE_SIZE[name], root=data_dir)
                return PictureSet(name, dict(dataset.recipe), len(dataset.labels), dataset.load,
                                  is_dataset=True)
            path = download(path=Path(data_dir) / Path(ADM["url"]).name, **ADM)   # as everybody
    if path.is_dir():
        return open_folder(path, as_pytorch_fid)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder, an npz or a data set's name")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder nor an npz (nor the name of a data set)")
    return open_npz(path)


def open_folder(path, as_pytorch_fid=False):
    """Pictures are read as training reads them (data.upright_rgb), or by PIL's convert alone."""
    files, left_out = picture_files(path)
    if not files:
        raise UserError(f"{path} has no pictures in it or below it ({count_of(left_out)})")
    try:
        listing = [f"{os.path.relpath(file, path)} {os.stat(file).st_size}" for file in files]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: does the link lead nowhere?") from error
    recipe = {"folder": str(path), "n": len(files), "names_and_sizes_sha256": hash_of(listing),
              "read": "as pytorch-fid does" if as_pytorch_fid else "as in training"}
    if left_out:
        recipe["left_out"] = count_of(left_out)
    found = PictureSet(str(path), recipe, len(files))

    def read(i):
        with open_picture(files[i]) as picture:
            image = to_tensor(picture.convert("RGB") if as_pytorch_fid else upright_rgb(picture))
            if not is_plain(picture):
                found.unlike.add(i)
            return image

    def load(indices):
        with ThreadPoolExecutor() as pool:                    # PIL lets go of the GIL
            images = list(pool.map(read, indices))
        return torch.stack(images) if len({image.shape for image in images}) == 1 else images

    found.load = load
    return found


def open_npz(path):
    try:
        return read_npz(path)
    except UserError:
        raise
    except Exception as error:                                # a file may hold anything
        raise UserError(f"{path} cannot be read as an npz ({one_line(error)})") from error


def read_npz(path):
    found = PictureSet(str(path), {"npz": str(path)})
    with zipfile.ZipFile(path) as file:
        size, memory = sum(info.file_size for info in file.infolist()), physical_memory()
        if size > memory:
            raise UserError(f"{path} takes {size / 1e9:,.1f} GB of memory, and here are "
                            f"{memory / 1e9:,.1f}")
    with np.load(path) as file:
        keys = set(file.files)
        if not keys & {"arr_0", "mu"}:
            raise UserError(f"{path} has neither arr_0 (pictures) nor mu and sigma (statistics), "
                            f"but {sorted(keys)}")
        wanted = keys & {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "labels", "recipe"}
        read = {key: np.asarray(file[key]) for key in wanted}    # whole: the zip's sums are checked
    if "recipe" in read:                                      # sample.py's, or ours of statistics
        text = str(read["recipe"])
        with contextlib.suppress(ValueError, RecursionError):
            made_by = json.loads(text) if text.count("{") + text.count("[") < 100 else None
            if isinstance(made_by, dict):
                found.recipe["made_by"] = made_by
        if "made_by" not in found.recipe:
            found.notes.append(f"{path}: its recipe is not one of sample.py or of --save-stats")
    for space, end in ENDING.items():
        if f"mu{end}" in keys:
            mu, sigma = (read.get(f"{name}{end}", np.zeros(0)) for name in ("mu", "sigma"))
            floats = mu.dtype.kind == sigma.dtype.kind == "f"
            if not floats or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
                raise UserError(f"{path}: mu{end} and sigma{end} must be floats of shapes (d,) and "
                                f"(d, d), not {mu.dtype} {mu.shape} and {sigma.dtype} "
                                f"{sigma.shape}")
            mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
            off, largest = (np.abs(a).max(initial=0) for a in (sigma - sigma.T, sigma))
            if not np.isfinite(mu).all() or not off <= 1e-4 * largest:        # nor is NaN
                raise UserError(f"{path}: mu{end} or sigma{end} is not finite, or sigma{end} not "
                                "symmetric")
            if off > 1e-8 * largest:
                found.notes.append(f"{path}: sigma{end} is symmetric to {off / largest:.0e} only, "
                                   "as in float32: the mean of both halves is taken")
            found.statistics[space] = mu, (sigma + sigma.T) / 2
    if "arr_0" in keys:
        array = read["arr_0"]
        picture = array.ndim == 4 and array.shape[3] == 3
        if array.dtype != np.uint8 or not picture or 0 in array.shape:
            raise UserError(f"{path}: arr_0 must be pictures, uint8 (N, H, W, 3), not "
                            f"{array.dtype} {array.shape}")
        found.n, height, width, _ = array.shape
        found.load = lambda indices: torch.from_numpy(        # (b, H, W, 3) -> (b, 3, H, W)
            array[list(indices)]).permute(0, 3, 1, 2)
        found.recipe |= {"n": found.n, "size": [height, width]}
    if "labels" in read and len(read["labels"]):
        counts = np.unique(read["labels"], return_counts=True)[1]
        found.recipe |= {"classes": len(counts),
                         "pictures_a_class": f"{counts.min()} to {counts.max()}"}
    return found


# ---- Networks ------------------------------------------------------------------------------------

# Pooling as FID's network has it and torchvision's does not: averages leave out the padding, and
# the last block takes the maximum (surely a slip, but everybody's FID is made with it).
AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class InceptionV3(Inception3):
    """FID's network (Inception of 2015-12-05): torchvision's, with other pooling and 1008 classes.

    pipeline "pytorch" resizes and scales as pytorch-fid does, "tensorflow" as ADM's evaluator and
    torch-fidelity do.
    """
    PIPELINES = {"pytorch": "bilinear to 299 (half pixels, no antialias), then 2 x - 1",
                 "tensorflow": "TensorFlow-1 bilinear to 299 (no half pixels), (x - 128) / 128"}

    def __init__(self, pipeline="pytorch"):
        if pipeline not in self.PIPELINES:
            raise ValueError(f"pipeline {pipeline!r} is not one of {', '.join(self.PIPELINES)}")
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.pipeline = pipeline
        blocks = [block for name, block in self.named_children() if hasattr(block, "branch_pool")]
        for block, pool in zip(blocks, [AVERAGE] * (len(blocks) - 1) + [MAXIMUM]):
            block.register_forward_pre_hook(keep_input)
            block.branch_pool.register_forward_pre_hook(partial(pool_kept_input, pool=pool))
        self.eval().requires_grad_(False)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Strict, but for batch norm's counters, which some files lack and nothing here reads."""
        counters = {key: value for key, value in self.state_dict().items()
                    if key.endswith("num_batches_tracked")}
        return super().load_state_dict({**counters, **state_dict}, *args, **kwargs)

    def fold(self):
        """Batch norm into the convolutions, in place: the same features to 1e-6, faster."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self

    def prepare(self, images):
        """As extract -> (B, 3, 299, 299), about -1 .. 1."""
        if isinstance(images, list):
            return torch.cat([self.prepare(image[None]) for image in images])
        full = 255 if images.dtype == torch.uint8 else 1
        inside = full == 255 or images.is_meta or (images.min() >= 0 and images.max() <= 1)
        if not inside:                                        # nor is NaN
            raise ValueError("images must be uint8, or floats in [0, 1]: clamp them first")
        x = images.to(self.fc.weight.device).to(self.fc.weight.dtype)
        if self.pipeline == "pytorch":
            return 2 * F.interpolate(x / full, (299, 299), mode="bilinear") - 1
        return (resize_tensorflow(x * (255 / full), 299) - 128) / 128

    def extract(self, images):
        """uint8 or float [0, 1] (B, 3, H, W), or a list of (3, H, W) of any sizes -> a dict:

        pool (B, 2048); spatial (B, 2023), ADM's for sFID; logits (B, 1008), without bias, for the
        inception score.
        """
        x = self.prepare(images)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))     # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))                    # (B, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]                           # (B, 7, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))                                   # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                    # (B, 2048, 8, 8)
        pool = x.mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
                "logits": pool @ self.fc.weight.T}

    def forward(self, images):
        """As extract -> (B, 2048)."""
        return self.extract(images)["pool"]


def keep_input(block, inputs):
    block.branch_pool.kept = inputs[0]


def pool_kept_input(branch, inputs, pool):
    """torchvision has pooled already, in its own way: pool what the block was given."""
    return pool(branch.__dict__.pop("kept"))


def resize_tensorflow(x, size):
    """(B, C, H, W) -> (B, C, size, size), bilinear as in TensorFlow 1: pixel i at i * H / size."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.long()
        share = (position - low).to(x.dtype).view((size, 1) if dim == 2 else (size,))
        after = x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = torch.lerp(x.index_select(dim, low), after, share)
    return x


def load_inception(path, pipeline="pytorch", device="cpu"):
    """The weights at `path`, folded and channels_last on the device. UserError: others."""
    net, complaint = InceptionV3(pipeline), "does not hold InceptionV3's weights"
    try:
        net.load_state_dict(load_tensors(path, complaint))
    except (RuntimeError, TypeError, AttributeError) as error:            # other keys or shapes
        raise UserError(f"{path} {complaint} ({one_line(error)})") from error
    return net.fold().to(device, memory_format=torch.channels_last)


class CLIP:
    """CLIP ViT-L/14 at 336, by timm: extract(images) -> {"clip": (B, 768)}, of length 1. CMMD's."""

    def __init__(self, device):
        import timm
        repo = "timm/vit_large_patch14_clip_336.openai"
        for file in ("model.safetensors", "pytorch_model.bin"):
            path, why = from_hub(repo, file)
            if path:
                break
        else:
            raise UserError(f"cmmd needs the weights of timm's {CLIP_MODEL}, which cannot be had "
                            f"from the Hugging Face Hub ({why}): is there a network? Copy its "
                            "cache from a machine that has them, or leave cmmd out of --metrics")
        net = timm.create_model(CLIP_MODEL, pretrained=True, num_classes=768)
        self.net, self.device = net.eval().to(device), device

    @staticmethod
    def prepare(image):
        """uint8 (3, H, W) -> float (3, 336, 336): the middle square, bicubic by PIL, normalised."""
        side = min(image.shape[1:])
        top, left = ((length - side) // 2 for length in image.shape[1:])
        square = image[:, top:top + side, left:left + side].permute(1, 2, 0)  # (side, side, 3)
        picture = Image.fromarray(square.contiguous().numpy())
        pixels = to_tensor(picture.resize((336, 336), Image.Resampling.BICUBIC)) / 255
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        return (pixels - mean) / std

    def extract(self, images):
        with ThreadPoolExecutor() as pool:
            x = torch.stack(list(pool.map(self.prepare, images)))
        return {"clip": F.normalize(self.net(x.to(self.device)))}


class Features:
    """A small network's last features, brought to 64 principal components of a reference. Not FID.

    network(images): uint8 (b, 3, H, W) -> (b, D) float64. laptop/ makes such networks.
    """

    def __init__(self, name, network):
        self.name, self.network = name, network

    def last(self, images):
        """uint8 (b, 3, H, W), or a list of (3, H, W) of any sizes -> (b, D)."""
        if isinstance(images, list):
            return torch.cat([self.network(image[None]) for image in images])
        return torch.cat([self.network(part) for part in images.split(500)])

    def extract(self, images):
        return {self.name: self.last(images)}

    def fit(self, last, labels=None):
        """The components of the reference's features (N, D); with labels a logistic regression."""
        self.mean = last.mean(0)
        variances, components = torch.linalg.eigh(torch.cov(last.T))      # rising
        components = components * (variances > 1e-9 * variances[-1])      # 0 beyond the rank
        self.components = components.flip(1)[:, :64]
        if labels is not None:
            x = self.project(last)
            self.scale = x.std(0) + 1e-9
            self.weight = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=torch.float64)
            self.bias = torch.zeros_like(self.weight[0])
            weights = [self.weight.requires_grad_(), self.bias.requires_grad_()]
            optimizer = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

            def loss():
                optimizer.zero_grad()
                value = F.cross_entropy(self.logits(x), labels) + 1e-3 * self.weight.square().sum()
                value.backward()
                return value
            optimizer.step(loss)
        return self

    def project(self, last):
        return (last - self.mean) @ self.components           # (N, 64)

    def logits(self, projected):
        return projected / self.scale @ self.weight + self.bias

    def accuracy(self, projected, labels):
        """Share of pictures that the regression takes for their class."""
        return (self.logits(projected).argmax(1) == labels).double().mean().item()


# ---- Statistics and distances --------------------------------------------------------------------

def float64_device(device):
    return "cpu" if torch.device(device).type == "mps" else device        # MPS has no float64


class Statistics:
    """Mean (dim,), covariance (dim, dim) of features seen once, in float64; no feature is kept."""

    def __init__(self, dim, device="cpu"):
        self.n, self.dim, self.device = 0, dim, float64_device(device)
        self._mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)

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
            raise ValueError(f"statistics of {self.dim} and {other.dim} features do not add up")
        if other.n:
            self._add(other.n, other._mean.to(self.device), other._scatter.to(self.device))

    def _add(self, n, mean, scatter):
        """Chan, Golub and LeVeque: nothing large is subtracted from something large."""
        delta, total = mean - self._mean, self.n + n
        self._scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self._mean += delta * (n / total)
        self.n = total

    def all_reduce(self):
        """Merges the statistics of all processes, in each of them."""
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.n, self._mean.cpu(), self._scatter.cpu()))
        self.__init__(self.dim, self.device)
        for n, mean, scatter in found:
            if n:
                self._add(n, mean.to(self.device), scatter.to(self.device))

    @property
    def mean(self):
        return self._mean.cpu().numpy()

    @property
    def cov(self):
        """Unbiased, as np.cov. ValueError for fewer than two features, a warning for few."""
        if self.n < 2:
            raise ValueError(f"{self.n} picture{'s' * (self.n != 1)}: a covariance needs two")
        if self.n < self.dim:
            warnings.warn(f"{self.n:,} pictures for {self.dim:,} features: the covariance is "
                          "singular and the distance too large; compare it only with others of as "
                          "many pictures", stacklevel=2)
        return (self._scatter / (self.n - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)); mu (d,), sigma (d, d).

    sigma1 = P' L L' P by pivoted Cholesky, which stops at the rank of sigma1. Then (sigma1 sigma2)
    has the eigenvalues of the symmetric L' P sigma2 P' L: real, never negative beyond rounding, and
    exact for singular covariances.
    """
    named = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in named.values())
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if mu1.ndim != 1 or shapes != [mu1.shape, 2 * mu1.shape] * 2:
        raise ValueError(f"shapes do not fit: {shapes}")
    for name, a in zip(named, (mu1, sigma1, mu2, sigma2)):
        if not np.isfinite(a).all():
            raise ValueError(f"{name} has values that are not finite")
        if a.ndim == 2 and np.abs(a - a.T).max(initial=0) > 1e-8 * np.abs(a).max(initial=0):
            raise ValueError(f"{name} is not symmetric")
    L, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    L, order = np.tril(L)[:, :rank], pivots - 1
    eigenvalues = np.linalg.eigvalsh(L.T @ sigma2[np.ix_(order, order)] @ L)
    trace1, trace2 = np.trace(sigma1), np.trace(sigma2)
    if abs(np.square(L).sum() - trace1) > 1e-3 * abs(trace1):  # it stopped at a negative pivot
        raise ValueError("sigma1 is not a covariance: it has negative eigenvalues")
    if eigenvalues.min(initial=0) < -1e-3 * eigenvalues.max(initial=0):
        raise ValueError("sigma2 is not a covariance: it has negative eigenvalues")
    root = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float((mu1 - mu2) @ (mu1 - mu2) + trace1 + trace2 - 2 * root)


def frechet_of_features(features1, features2):
    """frechet_distance of two sets of features, (N, D) and (M, D), float64."""
    if min(len(features1), len(features2)) < 2:
        raise ValueError("1 picture: a covariance needs two")
    moments = [(f.mean(0), np.cov(f, rowvar=False)) for f in (features1.numpy(), features2.numpy())]
    return frechet_distance(*moments[0], *moments[1])


def inception_score(logits, parts=None):
    """logits (N, classes) -> mean and deviation over parts of exp(mean KL(p(y|x) || p(y))).

    parts None: of 5,000 pictures, in order (ADM). A number: so many, shuffled with seed 2020
    (torch-fidelity, 10).
    """
    logits = torch.as_tensor(logits).double()
    N = len(logits)
    if N < (parts or 1):
        raise ValueError(f"{N} pictures do not make {parts or 1} parts, as the inception score has")
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

    A manifold is the union of the balls about its points that reach to their k-th neighbours
    (Kynkaanniemi et al.).
    """
    def inside(x, manifold):
        if len(manifold) <= k:
            raise ValueError(f"{len(manifold)} pictures have no {k} neighbours each, as precision "
                             "and recall need")
        radii = torch.cat([squared_distances(part, manifold).kthvalue(k + 1).values
                           for part in manifold.split(1000)])  # k + 1: the first is itself
        hits = [(squared_distances(part, manifold) <= radii).any(1) for part in x.split(1000)]
        return torch.cat(hits).double().mean().item()

    generated, reference = (torch.as_tensor(x).double() for x in (generated, reference))
    return inside(generated, reference), inside(reference, generated)


def cmmd(a, b):
    """1000 x the biased squared MMD of unit vectors (n, d), (m, d); Gaussian kernel of width 10
    (Jayasumana et al.)."""
    def mean_kernel(x, y):
        sums = [(squared_distances(part, y) / -200).exp().sum() for part in x.split(1000)]
        return sum(sums).item() / (len(x) * len(y))
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


def diversity(images, labels):
    """Root-mean-square distance, in grey levels of 255, between two pictures of one class; mean
    over classes. None where no class has two."""
    distances = [torch.pdist(images[labels == c].flatten(1).float()).mean()
                 for c in labels.unique() if (labels == c).sum() > 1]
    if not distances:
        return None
    return (torch.stack(distances).mean() / images[0].numel() ** 0.5).item()


# ---- One pass over the pictures of a set ---------------------------------------------------------

@torch.inference_mode()
def measure(pictures, extractors, statistics, rows, batch_size=50, rank=0, world=1, device="cpu"):
    """-> {space: Statistics} for `statistics` and {space: (n, dim), in order} for `rows`, the same
    in all processes.

    extractors: objects with extract(images) -> {space: (b, dim)}. Process r takes the batches r,
    r + world, ...
    """
    starts = range(rank * batch_size, pictures.n, world * batch_size)
    batches = [range(start, min(start + batch_size, pictures.n)) for start in starts]
    sums = {space: Statistics(DIM[space], device) for space in statistics}
    kept = {space: torch.zeros(pictures.n, DIM[space], dtype=torch.float64,
                               device=float64_device(device)) for space in rows}
    with tqdm(total=pictures.n, desc=pictures.path, unit="picture", disable=rank > 0,
              leave=False) as bar:
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
            dist.all_reduce(features)                         # a row is zero in all but one
        found = [None] * world
        dist.all_gather_object(found, pictures.unlike)
        pictures.unlike.update(*found)
    return sums, kept


# ---- The quality report of a run -----------------------------------------------------------------

def quality_report(train_set, test_set, rae, sampler, features="lite0", n=500, most=10_000,
                   steps_of_rows=(1, 2, 4, 8)):
    """Rows of pictures against the training pictures -> a list of dicts, one a row.

    n pictures a row, with the labels of as many of test_set: held-out ones (the floor), these
    reconstructed, the mean latent of each one's class, a Gaussian of the class's latents (to beat),
    and sampler(indices, labels, steps=steps) -> uint8. Where test_set is None the training pictures
    stand in for held-out ones. Of the training pictures `most` are taken. UserError: too few.
    """
    if features not in NETWORKS:                              # in a fork without laptop/
        raise UserError(f"there are no features called {features} here")
    kind, test_set = ("held-out", test_set) if test_set else ("training", train_set)
    for some in (test_set, train_set):
        counts = torch.bincount(some.labels, minlength=len(train_set.classes))
        if counts.min() < 2:
            raise UserError(f"{some.name} has {counts.min()} of {len(some.labels)} pictures in the "
                            f"class {train_set.classes[counts.argmin()]}: the quality report needs "
                            "two or more")
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(train_set.labels), generator=g)
    chosen = order[shares(train_set.labels[order], most)].sort().values
    test_chosen = shares(test_set.labels, n)
    train_labels, labels = train_set.labels[chosen], test_set.labels[test_chosen]
    counts, S = torch.bincount(train_labels), rae.image_size

    def compared(images):                                     # all are compared at S x S
        return images if images.shape[2] == S else to_uint8(resize(images, S) / 255)

    train = torch.zeros(len(chosen), 3, S, S, dtype=torch.uint8)
    rows = {name: torch.zeros(len(labels), 3, S, S, dtype=torch.uint8) for name in (
        f"{kind} (the floor)", f"{kind}, reconstructed", "class-mean latent",
        "per-class Gaussian of latents")}
    g = torch.Generator().manual_seed(0)
    for c in tqdm(range(len(counts)), desc="training pictures", unit="class", leave=False):
        latents = []
        for part in (train_labels == c).nonzero().flatten().split(64):
            images = train_set.load(chosen[part])
            train[part] = compared(images)
            latents.append(rae.encode(to_float(images.to(rae.device))))
        latents = torch.cat(latents)                          # (n_c, C, h, w)
        mean = latents.mean(0, keepdim=True)
        for part in (labels == c).nonzero().flatten().split(64):
            images = test_set.load(test_chosen[part])
            z = rae.encode(to_float(images.to(rae.device)))
            # mean + sum_i w_i (z_i - mean) / sqrt(n_c - 1) has the covariance of the latents z_i.
            w = torch.randn(len(part), len(latents), generator=g).to(z) / (len(latents) - 1) ** 0.5
            gaussian = mean + torch.tensordot(w, latents - mean, 1)
            decoded = (to_uint8(rae.decode(latent)).cpu() for latent in (z, mean, gaussian))
            for row, pictures in zip(rows.values(), (compared(images), *decoded)):
                row[part] = pictures
    for steps in steps_of_rows:
        images = sampler(torch.arange(len(labels)), labels, steps=steps)
        rows[f"{steps} step{'s'[:steps > 1]}"] = images

    table = [{"pictures": name} for name in rows]
    networks = NETWORKS[features](train, train_labels, rae.device)
    for i, (name, network) in enumerate(networks.items()):
        space = Features(name, network)
        last = space.last(train)
        reference = space.fit(last, None if i else train_labels).project(last)
        for line, images in zip(table, rows.values()):
            x = space.project(space.last(images))
            line[f"frechet_{name}"] = frechet_of_features(reference, x)
            if i == 0:
                line["accuracy"] = space.accuracy(x, labels)
                line["diversity"] = diversity(images, labels)
    return table


def shares(labels, n):
    """Indices, in order, of n pictures or a few more, of each class its share, rounded up."""
    n = min(n, len(labels))
    of_classes = [(labels == c).nonzero().flatten() for c in labels.unique()]
    return torch.cat([i[:-(-n * len(i) // len(labels))] for i in of_classes]).sort().values


# Features that make no FID: name -> their spaces; (training pictures, labels, device) -> networks.
SPACES, NETWORKS = {}, {}
SPACES |= {"toy": ["classifier", "pixels"], "lite0": ["lite0"]}  # laptop
NETWORKS["toy"] = lambda images, labels, device: toy.networks(images, labels)  # laptop
NETWORKS["lite0"] = lambda images, labels, device: lite0.networks(device)  # laptop


def report_text(table, run, step):
    formats = {"accuracy": ".2f", "diversity": ".1f", "frechet_lite0": ".1f",
               "frechet_classifier": ".3f", "frechet_pixels": ".3f"}
    return (f"step {step}, {run['method']}, guidance {run['cfg']:g}; distances to the training "
            f"pictures, not FID\n{table_text(table, formats)}")


def report_of_run(path, held_out, features, data_dir, batch_size, device, steps=None, cfg=None):
    """The report of a checkpoint -> table, run, step. With the run's own settings it is kept in
    quality.json beside it."""
    checkpoint = load_checkpoint(path)
    run, classes = checkpoint["args"], checkpoint["classes"]
    run["cfg"] = run["cfg"] if cfg is None else cfg
    rae = load_rae(checkpoint["rae"], device, run["weights_dir"])
    sides = picture_sides(rae.name, rae.image_size, run["rae_patch"])
    train_set = load_dataset(run["dataset"], *sides, data_dir, run["split"], run["skip_bad"])
    if train_set.recipe != run["pictures"]:
        raise UserError(f"the pictures of {run['dataset']} are not those of the run: they are the "
                        "report's reference")
    test_set = held_out_set(run["dataset"], rae.image_size)
    if held_out:
        test_set = load_dataset(held_out, *sides, data_dir, skip_bad=run["skip_bad"])
        if test_set.classes != classes:
            raise UserError(f"{held_out} has the classes {', '.join(test_set.classes)[:100]}, not "
                            f"the run's, {', '.join(classes)[:100]}")
        known = set(getattr(train_set, "sums", ()))
        n = sum(of_file in known for of_file in getattr(test_set, "sums", ()))
        if n == len(test_set.labels):
            raise UserError(f"{held_out} holds training pictures of the run, and no others: give "
                            "others, of the same classes")
        if n:
            print(f"fid.py: warning: {n} of {len(test_set.labels)} pictures of {held_out} are "
                  "training pictures of the run", file=sys.stderr)
    denoiser, _ = load_denoiser(checkpoint, "first", device)
    sampler = partial(draw, denoiser, rae, seed=run["seed"], null_class=len(classes),
                      batch_size=batch_size, **sampling_settings(run))
    features = features or default_features(rae.name)
    table = quality_report(train_set, test_set, rae, sampler, features, run.get("report") or 500,
                           steps_of_rows=steps or (1, 2, 4, 8))
    if steps is None and cfg is None:
        write_json(Path(path).with_name("quality.json"), table)
    return table, run, checkpoint["step"]


def held_out_set(dataset, image_size):
    """Pictures like those of a data set, but none of them, where there are such without asking."""
    if dataset == "toy":  # laptop
        return toy.ToyFlowers(image_size, "test")  # laptop


def default_features(rae_name):
    return "toy" if rae_name in ("toy", "pixels") else "lite0"


# ---- The command ---------------------------------------------------------------------------------

FRECHET = {"fid": "pool", "sfid": "spatial"}                  # metric -> space
ROWS = {"is": "logits", "pr": "pool", "cmmd": "clip"}
METRICS = ("fid", "sfid", "is", "pr", "cmmd")


def parse_args(argv):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("A", help="what is judged: a folder, an npz of pictures or of statistics, the name of a "
        "data set, or the ckpt.pt of a run")
    add("B", nargs="?", help="the reference: one of the same; for a run a folder of held-out "
        "pictures, if there is one")
    add("--metrics", help="some of fid,sfid,is,pr,cmmd (default: fid, and is if A has pictures); "
        "is alone needs no B")
    add("--features", choices=("inception", *NETWORKS), help="toy: fitted on the toy's pictures, "
        "nothing is fetched; lite0: of EfficientNet-Lite0; what comes out is not called FID "
        "(default: inception; for a run toy if it has the toy's autoencoder, else lite0)")
    add("--pipeline", choices=tuple(InceptionV3.PIPELINES), help="resize and scale as pytorch-fid, "
        "or as ADM and torch-fidelity do (default: as the statistics of B were made, else pytorch)")
    add("--as-pytorch-fid", action="store_true", help="read pictures of a folder as pytorch-fid "
        "does: without their orientation and transparency, 16 bits clipped to 8")
    add("--save-stats", metavar="FILE", help="write the statistics of A into a new npz, and end")
    add("--inception-weights", metavar="FILE", help="by hand, where they cannot be fetched")
    add("--steps", type=number(int, 1), nargs="+", help="rows of a run's report: steps of each")
    add("--cfg", type=number(float, 0), help="guidance of a run's report, in place of its own")
    add("--json", action="store_true", help="print one JSON object: the numbers and their recipe")
    add("--batch-size", type=number(int, 1, 10 ** 6), default=50,
        help="pictures at once in a process")
    add("--data-dir", default="datasets", help="where data sets and their statistics go")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    special = (args.metrics or args.save_stats or args.pipeline or args.inception_weights
               or args.as_pytorch_fid)
    if special and (args.features in NETWORKS or args.A.endswith(".pt")):
        parser.error("--metrics, --save-stats, --pipeline, --as-pytorch-fid and "
                     "--inception-weights are for FID: a run's report and --features have numbers "
                     "of their own")
    if (args.steps or args.cfg is not None) and not args.A.endswith(".pt"):
        parser.error("--steps and --cfg are of a run's report: give its ckpt.pt")
    if args.save_stats and (args.B or args.metrics):
        parser.error("--save-stats keeps what fid and sfid need of A: leave out B and --metrics")
    if not (args.B or args.save_stats or args.metrics == "is" or args.A.endswith(".pt")):
        parser.error("give B, the reference to compare with (or --save-stats, or --metrics is)")
    args.metrics = args.metrics.split(",") if args.metrics else None
    for name in args.metrics or ():
        if name not in METRICS:
            parser.error(f"--metrics {one_line(name, 30)}: there are {','.join(METRICS)}")
    if args.A.endswith(".pt") and args.features == "inception":
        parser.error(f"--features inception: a run's report has {' or '.join(NETWORKS)}")
    return args


@user_errors
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup(args.device)
    if args.A.endswith(".pt"):
        if rank == 0:                                         # one process does it
            table, run, step = report_of_run(args.A, args.B, args.features, args.data_dir,
                                             args.batch_size, device, args.steps, args.cfg)
            print(json.dumps(table) if args.json else report_text(table, run, step))
        return
    if args.save_stats and Path(args.save_stats).exists():
        raise UserError(f"{args.save_stats} is there already: remove it or give another name")
    sets = [find_set(name, args.data_dir, rank, args.as_pytorch_fid)
            for name in (args.A, args.B) if name]
    metrics = args.metrics or SPACES.get(args.features) or (
        ["fid", "sfid"] if args.save_stats else ["fid", "is"] if sets[0].load else ["fid"])
    setting = {"rank": rank, "world": world, "device": device, "batch_size": args.batch_size}
    features, made_with, notes = measure_sets(sets, metrics, args.features, args.pipeline,
                                              args.inception_weights, args.data_dir, setting)
    if rank > 0:
        return
    for note in notes:
        print(f"fid.py: warning: {printable(note)}", file=sys.stderr)
    if args.save_stats:
        save_statistics(args.save_stats, sets[0], made_with)
        return print(f"{args.save_stats}: mu, sigma, mu_s, sigma_s of {sets[0].n:,} pictures of "
                     f"{args.A}; {words(made_with)}")
    numbers = {}
    with naming(*sets):
        for metric in metrics:
            numbers |= score(metric, args.features, sets, features, made_with)
        if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
            raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}")
    report(sets, numbers, made_with, notes, f"{world} x {device.type}", vars(args))


@contextlib.contextmanager
def naming(*sets):
    """What a distance cannot be made of is an error that names the sets."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{' and '.join(s.path for s in sets)}: {error}") from error


def measure_sets(sets, metrics, kind, pipeline, weights, data_dir, setting):
    """Gives both sets the statistics that the metrics need -> rows of features of each set, what
    the features were made with, notes. kind: of small networks, or None."""
    A, B, rank = sets[0], sets[-1], setting["rank"]
    needs = []                                                # of each set: statistics, rows
    for s in sets:
        statistics = [FRECHET[m] for m in metrics if m in FRECHET]
        statistics = [space for space in statistics if space not in s.statistics]
        rows = [ROWS.get(m, m) for m in metrics if m not in FRECHET and (m != "is" or s is A)]
        if (statistics or rows) and not s.load:
            raise UserError(f"{s.path} has no pictures, only statistics of "
                            f"{' and '.join(s.statistics)} features: {','.join(metrics)} cannot be "
                            "had from it")
        needs.append((statistics, rows))
    asked, notes = pipeline, [note for s in sets for note in s.notes]
    pipeline = next(filter(None, [
        pipeline, *(s.made_with.get("pipeline") for s in (B, A)),
        *(s.presumed_pipeline for s in (B, A)), "pytorch"]))
    if kind not in NETWORKS and pipeline not in InceptionV3.PIPELINES:
        raise UserError(f"statistics of the pipeline {one_line(pipeline, 30)}: there are "
                        f"{' and '.join(InceptionV3.PIPELINES)}")
    spaces = {space for pair in needs for some in pair for space in some}
    extractors, made_with = load_extractors(spaces, kind, pipeline, weights, rank,
                                            setting["device"])
    for key in ("pipeline", "weights_sha256"):
        values = {made[key] for made in (made_with, A.made_with, B.made_with) if key in made}
        if len(values) > 1:
            raise UserError(f"{A.path} and {B.path}: the features have different {key}, "
                            f"{' and '.join(sorted(values))}: make the statistics anew")
    for s in sets if "pipeline" in made_with else ():
        if s.presumed_pipeline not in (None, pipeline):
            notes.append(f"{s.path} has ADM's keys: its features are likely of the pipeline "
                         f"{s.presumed_pipeline}, not {pipeline}")
        elif s.statistics and not s.made_with and not s.presumed_pipeline and not asked:
            notes.append(f"{s.path} does not say how its features were made: the pipeline "
                         f"{pipeline} is supposed; if they are ADM's: --pipeline tensorflow")

    features = []
    for s, (statistics, rows) in zip(sets, needs):
        cache = None
        if s.is_dataset and statistics:                       # kept for the next time
            key = hash_of([s.recipe, made_with["pipeline"], made_with["weights_sha256"]])[:16]
            cache = Path(data_dir) / "statistics" / f"{s.path}-{key}.npz"
            statistics = ["pool", "spatial"]
            try:
                kept = open_npz(cache).statistics if cache.exists() else None
            except UserError as error:
                kept = say(f"{error}: the statistics are made anew")
            if kept := from_first(kept):
                s.statistics, s.recipe["statistics_from"] = kept, str(cache)
                cache, statistics = None, []
        sums, kept = measure(s, extractors, statistics, rows, **setting) if statistics or rows \
            else ({}, {})
        features.append(kept)
        if "pipeline" in made_with and (unlike := len(s.unlike)):
            notes.append(f"{s.path}: pytorch-fid would read {unlike:,} of {s.n:,} pictures "
                         "otherwise than training does (they are transparent, to be turned, or of "
                         f"16 bits); they were read {s.recipe['read']}")
        with warnings.catch_warnings(record=True) as caught, naming(s):
            warnings.simplefilter("always")
            s.statistics |= {space: (found.mean, found.cov) for space, found in sums.items()}
        notes += [f"{s.path}: {warning.message}" for warning in caught]
        if cache and rank == 0:
            save_statistics(cache, s, made_with)
    return features, made_with, notes


def load_extractors(spaces, kind, pipeline, weights, rank, device):
    """The networks that give these feature spaces, and what makes their features."""
    if kind in NETWORKS:
        with first_process_first(rank):
            networks = NETWORKS[kind](None, None, device)
        made_with = {"network": f"{kind}'s, principal components of B"}
        return [Features(name, network) for name, network in networks.items()], made_with
    extractors, made_with = [], {}
    if spaces - {"clip"}:
        path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS["url"]).name
        with first_process_first(rank):
            if not weights:                                   # where pytorch-fid keeps it, too
                download(path=path, **WEIGHTS)
        extractors.append(load_inception(path, pipeline, device))
        made_with = {"network": "InceptionV3", "pipeline": pipeline,
                     "resize": InceptionV3.PIPELINES[pipeline], "weights_sha256": file_hash(path)}
    if "clip" in spaces:
        with first_process_first(rank):
            extractors.append(CLIP(device))
        made_with["clip"] = CLIP_MODEL
    return extractors, made_with


def save_statistics(path, pictures, made_with):
    arrays = {f"{name}{ENDING[space]}": array for space, pair in pictures.statistics.items()
              for name, array in zip(("mu", "sigma"), pair)}
    recipe = json.dumps({"pictures": pictures.recipe, "features": made_with})
    with write_whole(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays, recipe=recipe)


def score(metric, kind, sets, features, made_with):
    """-> {name: number}. Only Inception's features by the official weights make an FID."""
    if kind in NETWORKS:
        a, b = (rows[metric].cpu() for rows in features)
        space = Features(metric, None).fit(b)
        name = f"{kind} Frechet distance" + f", {metric}" * (metric != kind)
        return {name: frechet_of_features(space.project(b), space.project(a))}
    made = (made_with, *(s.made_with for s in sets))          # as far as it is known
    official = {m.get("weights_sha256", WEIGHTS["sha256"]) for m in made} == {WEIGHTS["sha256"]}
    ending = "" if official else ", unofficial weights"
    if metric in FRECHET:
        space = FRECHET[metric]
        (mu1, sigma1), (mu2, sigma2) = (s.statistics[space] for s in (sets[0], sets[-1]))
        if mu1.shape != mu2.shape:
            raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be "
                             "compared")
        name = {"fid": "FID", "sfid": "sFID"}[metric]
        if not official or len(mu1) != DIM[space]:
            name = f"Frechet distance, {len(mu1)} {space} features{ending}"
        return {name: frechet_distance(mu1, sigma1, mu2, sigma2)}
    if metric == "is":
        logits = features[0]["logits"]
        values = inception_score(logits)[0], *inception_score(logits, 10)
        names = "ADM's (parts of 5,000)", "10 parts", "10 parts, deviation"
        return {f"inception score, {name}{ending}": value for name, value in zip(names, values)}
    if metric == "pr":
        values = precision_recall(features[0]["pool"], features[-1]["pool"])
        return {f"{name} (k = 3){ending}": value
                for name, value in zip(("precision", "recall"), values)}
    return {"CMMD": cmmd(features[0]["clip"], features[-1]["clip"])}


def report(sets, numbers, made_with, notes, where, arguments):
    """The numbers and all that is needed to have them again: printed, and, where A says of which
    checkpoint it is, a line in fid.jsonl beside A."""
    for s in sets:
        if Path(s.path).is_file():
            s.recipe["sha256"] = file_hash(s.path)
    recipe = {name: s.recipe for name, s in zip("AB", sets)}
    recipe |= {"features": made_with, "torch": torch.__version__, "pillow": PIL.__version__,
               "where": where, "arguments": arguments}
    result = {"numbers": numbers, "recipe": recipe, "warnings": notes}
    if arguments["json"]:
        print(json.dumps(result))
    else:
        network = words(made_with) or "none, statistics alone"
        texts = [(name, words(s.recipe)) for name, s in zip("AB", sets)]
        texts.append(("features", f"{network}; torch {torch.__version__}, {where}"))
        for name, text in texts:
            print(textwrap.fill(text, 100, initial_indent=f"{name:<10}", break_on_hyphens=False,
                                subsequent_indent=" " * 10, break_long_words=False))
        print()
        for name, value in numbers.items():                   # + 0.0: no -0.00000
            print(f"{name:<{max(map(len, numbers))}}  {round(value, 5) + 0.0:.5f}")
    if "checkpoint" in sets[0].recipe.get("made_by", {}):
        log = Path(sets[0].path).parent / "fid.jsonl"
        with open(log, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"appended to {log}", file=sys.stderr)


def words(recipe):
    """A recipe in a line, with the first digits of its sums."""
    def word(value):
        if isinstance(value, dict):
            return f"({words(value)})"
        return one_line(value, 16 if len(str(value)) == 64 else 200)
    return ", ".join(f"{one_line(key, 50).replace('_', ' ')} {word(value)}"
                     for key, value in recipe.items())


if __name__ == "__main__":
    main()
