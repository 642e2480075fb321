"""How good are the pictures? FID, and what is reported beside it.

    python fid.py out/flowers-SiT-B-1/samples.npz flowers      # FID and inception score
    python fid.py A B --metrics fid,sfid,is,pr,cmmd            # folders, npz files, data sets
    python fid.py A --save-stats ref.npz                       # to be B, here or in pytorch-fid
    python fid.py A B --features lite0                         # a small network's: not FID
    torchrun --nproc-per-node 8 fid.py A B                     # the same number

A is what is judged, B the reference. Each is a folder (searched to its leaves, pictures of any
size), an npz of pictures (arr_0, as sample.py writes it), an npz of statistics (with ADM's or
pytorch-fid's keys) or a data set's name: its training pictures, cropped as in training (imagenet:
ADM's reference). The file reads as the data goes: networks, statistics and distances, pictures, one
pass over a set, the command. It needs nothing else of this project but utils/ and data.py.
"""
import json
import math
import sys
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

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

from data import DATASETS, load_dataset
from laptop import lite0, toy  # laptop
from utils.checkpoint import load_tensors
from utils.cli import ArgumentParser, UserError, number, one_line, printable, recipe_text, words
from utils.files import append_line, download, file_hash, from_hub, hash_of
from utils.images import (PictureSet, compare, few, kept_statistics, naming, open_folder, open_npz,
                          save_statistics, to_tensor)
from utils.processes import first_process_first, prefetch, setup, user_errors

WEIGHTS = dict(url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth", size=95_628_359,
               sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
CLIP_MODEL = "vit_large_patch14_clip_quickgelu_336.openai"    # without quickgelu: the wrong one
DIM = {"pool": 2048, "spatial": 2023}                         # spaces of statistics
# Small networks, whose distances are not FID: name -> the networks, made by (pictures, labels,
# device); without pictures on those of the data set of that name.
NETWORKS = {}
NETWORKS["toy"] = lambda images, labels, device: toy.networks(images, labels)  # laptop
NETWORKS["lite0"] = lite0.networks  # laptop

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


class Small:
    """Small networks: extract(images) -> {name: (b, D) float64}, of any sizes."""

    def __init__(self, networks):
        self.networks = networks

    def extract(self, images):
        if isinstance(images, list):
            return {name: torch.cat([network(image[None]) for image in images])
                    for name, network in self.networks.items()}
        return {name: torch.cat([network(part) for part in images.split(500)])
                for name, network in self.networks.items()}


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
            warnings.warn(few(self.n, self.dim), stacklevel=2)
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


def principal_components(features, n=64):
    """features (N, D), float64 -> their mean (D,) and n first components (D, n), 0 beyond the rank.
    """
    if len(features) < 2:
        raise ValueError("1 picture: a covariance needs two")
    variances, components = torch.linalg.eigh(torch.cov(features.T))      # rising
    components = components * (variances > 1e-9 * variances[-1])
    return features.mean(0), components.flip(1)[:, :n]


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


# ---- One pass over the pictures of a set ---------------------------------------------------------

@torch.inference_mode()
def measure(pictures, extractors, statistics, rows, batch_size=50, rank=0, world=1, device="cpu"):
    """Returns {space: Statistics} for `statistics` and {space: (n, dim), in order} for `rows`, the
    same in all processes.

    extractors: objects with extract(images) -> {space: (b, dim)}. Process r takes the batches r,
    r + world, ...
    """
    starts = range(rank * batch_size, pictures.n, world * batch_size)
    batches = [range(start, min(start + batch_size, pictures.n)) for start in starts]
    sums, kept = {space: Statistics(DIM[space], device) for space in statistics}, {}
    sizes = Counter()
    with tqdm(total=pictures.n, desc=pictures.path, unit="picture", disable=rank > 0 or None,
              leave=False) as bar:
        for batch, images in zip(batches, prefetch(pictures.load, batches)):
            features = {}
            for extractor in extractors:
                features |= extractor.extract(images)
            for space in sums:
                sums[space].update(features[space])
            for space in rows:
                kept.setdefault(space, {})[batch.start] = features[space].cpu().double()
            sizes.update(tuple(image.shape[1:]) for image in images)
            bar.update(min(world * len(batch), pictures.n - bar.n))
    if world > 1:
        for space in sums:
            sums[space].all_reduce()
        found = [None] * world
        dist.all_gather_object(found, (kept, pictures.unlike, sizes))
        kept = {space: {start: part for of_one, _, _ in found
                        for start, part in of_one.get(space, {}).items()} for space in rows}
        pictures.unlike.update(*(unlike for _, unlike, _ in found))
        sizes = sum((of_one for _, _, of_one in found), Counter())
    pictures.sizes = sizes
    return sums, {space: torch.cat([parts[start] for start in sorted(parts)])
                  for space, parts in kept.items()}


# ---- The command ---------------------------------------------------------------------------------

FRECHET = {"fid": "pool", "sfid": "spatial"}                  # metric -> its space; the others keep
ROWS = {"is": "logits", "pr": "pool", "cmmd": "clip"}         # the features of each picture
IS_PARTS = 10                                                 # torch-fidelity's


def parse_args(argv):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("A", help="what is judged: a folder, an npz of pictures or of statistics, or the name of a "
        "data set")
    add("B", nargs="?", help="the reference: one of the same")
    add("--metrics", help="some of fid,sfid,is,pr,cmmd (default: fid, and is if A has pictures); "
        "is alone needs no B")
    add("--features", choices=("inception", *NETWORKS), default="inception", help="toy: fitted on "
        "the toy's pictures, nothing is fetched; lite0: of EfficientNet-Lite0; what comes out is "
        "not called FID")
    add("--pipeline", choices=tuple(InceptionV3.PIPELINES), help="resize and scale as pytorch-fid, "
        "or as ADM and torch-fidelity do (default: as the statistics of B were made, else pytorch)")
    add("--as-pytorch-fid", action="store_true", help="read pictures of a folder as pytorch-fid "
        "does: without their orientation and transparency, 16 bits clipped to 8")
    add("--save-stats", metavar="FILE", help="write the statistics of A into a new npz, and end")
    add("--inception-weights", metavar="FILE", help="by hand, where they cannot be fetched")
    add("--json", action="store_true", help="print one JSON object: the numbers and their recipe")
    add("--batch-size", type=number(int, 1, 10 ** 6), default=50,
        help="pictures at once in a process")
    add("--data-dir", default="datasets", help="where data sets and their statistics go")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    of_fid = (args.metrics or args.save_stats or args.pipeline or args.inception_weights
              or args.as_pytorch_fid)
    if args.A.endswith(".pt"):
        parser.error(f"the report of a run is made by: python -m laptop.report {args.A} "
                     f"{args.B or ''}")
    if args.features in NETWORKS and of_fid:
        parser.error("--metrics, --save-stats, --pipeline, --as-pytorch-fid and "
                     "--inception-weights are for FID: --features have numbers of their own")
    if args.as_pytorch_fid and not any(Path(name).is_dir() for name in (args.A, args.B) if name):
        parser.error("--as-pytorch-fid: how a folder is read, and none is given")
    if args.save_stats and (args.B or args.metrics):
        parser.error("--save-stats keeps what fid and sfid need of A: leave out B and --metrics")
    if not (args.B or args.save_stats or args.metrics == "is"):
        parser.error("give B, the reference to compare with (or --save-stats, or --metrics is)")
    args.metrics = args.metrics.split(",") if args.metrics else None
    for name in args.metrics or ():
        if name not in (*FRECHET, *ROWS):
            parser.error(f"--metrics {one_line(name, 30)}: there are {','.join((*FRECHET, *ROWS))}")
    return args


def find_set(name, data_dir, rank, as_pytorch_fid=False):
    """A data set's name, a folder or an npz -> PictureSet. UserError: nothing to score."""
    path, known = Path(name), DATASETS.get(name)
    if known:
        with first_process_first(rank):
            if not known.reference:
                dataset = load_dataset(name, known.image_size, root=data_dir)
                classes = Counter(dataset.classes[label] for label in dataset.labels.tolist())
                sizes = Counter({2 * (known.image_size,): len(dataset.labels)})
                return PictureSet(name, dict(dataset.recipe), len(dataset.labels), dataset.load,
                                  is_dataset=True, sizes=sizes, classes=classes)
            path = Path(data_dir) / Path(known.reference["url"]).name
            download(path=path, **known.reference)                        # as everybody
    if path.is_dir():
        return open_folder(path, as_pytorch_fid)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder, an npz or a data set's name")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder nor an npz (nor the name of a data set)")
    return open_npz(path)


@user_errors
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup(args.device)
    if args.save_stats and Path(args.save_stats).exists():
        raise UserError(f"{args.save_stats} is there already: remove it or give another name")
    sets = [find_set(name, args.data_dir, rank, args.as_pytorch_fid)
            for name in (args.A, args.B) if name]
    A, B, small = sets[0], sets[-1], args.features in NETWORKS
    metrics = args.metrics or ([] if small else ["fid", "sfid"] if args.save_stats else
                               ["fid", "is"] if A.load and A.n >= IS_PARTS else ["fid"])
    needs = []                                                # of each set: statistics, rows
    for s in sets:
        spaces = [FRECHET[m] for m in metrics if m in FRECHET and FRECHET[m] not in s.statistics]
        keep = [ROWS[m] for m in metrics if m in ROWS and (m != "is" or s is A)]
        if (spaces or keep or small) and not s.load:
            raise UserError(f"{s.path} has no pictures, only statistics of "
                            f"{' and '.join(s.statistics)} features: "
                            f"{','.join(metrics) or args.features} cannot be had from it")
        needs.append((spaces, keep))
    pipeline = pipeline_of(sets, args.pipeline)
    with first_process_first(rank):
        extractors, made_with = load_extractors(
            {space for of_set in needs for some in of_set for space in some}, args.features,
            pipeline, args.inception_weights, device)
    agree(sets, made_with)

    # Each set gets the statistics, and the features of each picture, that the metrics need.
    rows = []
    for s, (spaces, keep) in zip(sets, needs):
        keep, cache = [*extractors[0].networks] if small else keep, None
        if s.is_dataset and spaces:                           # kept for the next time
            key = hash_of([s.recipe, made_with["pipeline"], made_with["weights_sha256"]])[:16]
            cache = Path(args.data_dir) / "statistics" / f"{s.path}-{key}.npz"
            spaces = [] if kept_statistics(s, cache) else [*DIM]
        sums, found = {}, {}
        if spaces or keep:
            sums, found = measure(s, extractors, spaces, keep, args.batch_size, rank, world, device)
        rows.append(found)
        if small and s.n <= 64:                               # components
            s.notes.append(f"{s.path}: {few(s.n, 64)}")
        with warnings.catch_warnings(record=True) as caught, naming(s):
            warnings.simplefilter("always")
            s.statistics |= {space: (of.mean, of.cov) for space, of in sums.items()}
        s.notes += [f"{s.path}: {warning.message}" for warning in caught]
        if s.unlike and not small:
            s.notes.append(f"{s.path}: pytorch-fid would read {len(s.unlike):,} of {s.n:,} "
                           "pictures otherwise than training does (they are transparent or to be "
                           f"turned); they were read {s.recipe['read']}")
        if cache and sums and rank == 0:
            save_statistics(cache, s, made_with)
    if rank > 0:
        return

    compare(A, B)
    notes = [note for s in sets for note in s.notes]
    for note in notes:
        print(f"fid.py: warning: {printable(note)}", file=sys.stderr)
    if args.save_stats:
        save_statistics(args.save_stats, A, made_with)
        return print(f"{args.save_stats}: mu, sigma, mu_s, sigma_s of {A.n:,} pictures of "
                     f"{args.A}; {words(made_with)}")
    with naming(*sets):
        numbers = (score_small(args.features, *rows) if small else
                   {name: value for metric in metrics
                    for name, value in score(metric, A, B, rows, made_with).items()})
        if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
            raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}")
    report(sets, numbers, made_with, notes, f"{world} x {device.type}", vars(args))


def pipeline_of(sets, asked):
    """How pictures are resized and scaled: asked for, as the statistics say, or pytorch's."""
    known = next((s.made_with["pipeline"] for s in sets[::-1] if "pipeline" in s.made_with), None)
    if not known and not asked:
        known = next((s.presumed for s in sets[::-1] if s.presumed), None)
    for s in sets:
        if s.presumed not in (None, asked or known):
            s.notes.append(f"{s.path} has ADM's keys: its features are likely of the pipeline "
                           f"{s.presumed}, not {asked or known}")
        elif (s.statistics and not s.made_with and not s.presumed and not asked
                and any(other.load for other in sets)):
            s.notes.append(f"{s.path} does not say how its features were made: the pipeline "
                           f"{known or 'pytorch'} is supposed; if they are ADM's: --pipeline "
                           "tensorflow")
    if known not in (None, *InceptionV3.PIPELINES):
        raise UserError(f"statistics of the pipeline {one_line(known, 30)}: there are "
                        f"{' and '.join(InceptionV3.PIPELINES)}")
    return asked or known or "pytorch"


def agree(sets, made_with):
    """UserError: statistics were made otherwise than what they are compared with."""
    for s in sets:
        for key, value in s.made_with.items():
            if made_with.setdefault(key, value) != value:
                raise UserError(f"{' and '.join(s.path for s in sets)}: the features have "
                                f"different {key}, {' and '.join(sorted((made_with[key], value)))}"
                                ": make the statistics again")


def load_extractors(spaces, features, pipeline, weights, device):
    """The networks that are needed, and what makes their features."""
    if features in NETWORKS:
        return [Small(NETWORKS[features](None, None, device))], {
            "network": f"{features}'s, principal components of B"}
    extractors, made_with = [], {}
    if spaces - {"clip"}:
        path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS["url"]).name
        if not weights:                                       # where pytorch-fid keeps it, too
            download(path=path, **WEIGHTS)
        extractors.append(load_inception(path, pipeline, device))
        made_with = {"network": "InceptionV3", "pipeline": pipeline,
                     "resize": InceptionV3.PIPELINES[pipeline], "weights_sha256": file_hash(path)}
    if "clip" in spaces:
        extractors.append(CLIP(device))
        made_with["clip"] = CLIP_MODEL
    return extractors, made_with


def score_small(features, a, b):
    """Frechet distances of small networks' features, on 64 principal components of B."""
    numbers = {}
    for name in a:
        mean, components = principal_components(b[name])
        label = f"{features} Frechet distance" + f", {name}" * (name != features)
        numbers[label] = frechet_of_features((b[name] - mean) @ components,
                                             (a[name] - mean) @ components)
    return numbers


def score(metric, A, B, rows, made_with):
    """Returns {name: number}. Only Inception's features by the official weights make an FID."""
    official = made_with.get("weights_sha256", WEIGHTS["sha256"]) == WEIGHTS["sha256"]
    ending = "" if official else ", unofficial weights"
    if metric in FRECHET:
        space = FRECHET[metric]
        (mu1, sigma1), (mu2, sigma2) = A.statistics[space], B.statistics[space]
        if mu1.shape != mu2.shape:
            raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be "
                             "compared")
        name = {"fid": "FID", "sfid": "sFID"}[metric]
        if not official or len(mu1) != DIM[space]:
            name = f"Frechet distance, {len(mu1)} {space} features{ending}"
        return {name: frechet_distance(mu1, sigma1, mu2, sigma2)}
    a, b = rows[0][ROWS[metric]], rows[-1].get(ROWS[metric])
    if metric == "is":
        values = inception_score(a)[0], *inception_score(a, IS_PARTS)
        names = "ADM's (parts of 5,000)", "10 parts", "10 parts, deviation"
        return {f"inception score, {name}{ending}": value for name, value in zip(names, values)}
    if metric == "pr":
        return {f"{name} (k = 3){ending}": value
                for name, value in zip(("precision", "recall"), precision_recall(a, b))}
    return {"CMMD": cmmd(a, b)}


def report(sets, numbers, made_with, notes, where, arguments):
    """The numbers and all that is needed to have them again: printed, and, where A says of which
    checkpoint it is, a line in fid.jsonl beside A."""
    for s in sets:
        if Path(s.path).is_file():
            s.recipe["sha256"] = file_hash(s.path)
    recipe = {name: s.recipe for name, s in zip("AB", sets)}
    result = {"numbers": numbers, "warnings": notes, "recipe": {
        **recipe, "features": made_with, "torch": torch.__version__, "pillow": PIL.__version__,
        "where": where, "arguments": arguments}}
    if arguments["json"]:
        print(json.dumps(result))
    else:
        network = words(made_with) or "none, statistics alone"
        print(recipe_text({**{name: words(of) for name, of in recipe.items()},
                           "features": f"{network}; torch {torch.__version__}, {where}"}))
        for name, value in numbers.items():                   # + 0.0: no -0.00000
            print(f"{name:<{max(map(len, numbers))}}  {round(value, 5) + 0.0:.5f}")
    if "checkpoint" in sets[0].recipe.get("made_by", {}):
        log = Path(sets[0].path).parent / "fid.jsonl"
        append_line(log, None, result)
        print(f"appended to {log}", file=sys.stderr)


if __name__ == "__main__":
    main()
