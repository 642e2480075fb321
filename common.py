"""What every script needs: one-line errors, processes, whole files, keyed randomness, a table."""
import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

# ---- Errors and arguments ------------------------------------------------------------------------


class UserError(Exception):
    """What the user can mend: shown as one line. Bugs keep their traceback."""


DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def user_errors(main):
    """Decorator of every main(argv=None): an expected error is one line and a non-zero exit.

    A UserError whose text begins with a flag is about the command line: 2, as argparse has it.
    Other UserErrors and a disk that refuses: 1. Ctrl-C: 130.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            result = main(argv)
            with contextlib.suppress(RuntimeError):           # another failed, and says so itself
                barrier()   # or gloo's threads, not yet done with tensors, could deadlock below
            return result
        except UserError as error:
            text, status = f"error: {error}", 2 if str(error).startswith("--") else 1
        except OSError as error:
            if error.errno not in DISK_REFUSES:
                raise
            text, status = f"error: {error.filename or 'the disk'}: {error.strerror}", 1
        except KeyboardInterrupt:
            text, status = "interrupted; what is on the disk is whole", 130
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        raise SystemExit(status)
    return wrapped


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, and no abbreviated flags."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            nothing = action.default in (None, False)
            return action.help if nothing else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=self.Help, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            bounds = (f"from {low} to {high}" if high < math.inf else
                      f"{low} or more" if low > -math.inf else "finite")
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value
    parse.__name__ = kind.__name__                            # argparse says "invalid int value"
    return parse


# ---- One process or many -------------------------------------------------------------------------

def setup(device="auto"):
    """-> rank, world, torch.device; joins the process group if torchrun started others."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {why}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world == 1 and torch.cuda.device_count() > 1:
            print("one GPU of several is used; this takes them all: "
                  f"torchrun --nproc-per-node gpu {' '.join(sys.argv)}", file=sys.stderr)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))        # while rank 0 downloads
    return rank, world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_process_first(rank):
    """What is inside, process 0 does before the others: it downloads, they find it on the disk."""
    if rank > 0:
        barrier()
    yield
    if rank == 0:
        barrier()


def from_first(value):
    """Process 0's value, in all processes."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def autocast(dtype, device):
    """dtype "bfloat16" or "float32", of the network alone: geometry and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def peak_memory_gb(device):
    """Of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource                                           # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024            # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- Files ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def write_whole(path):
    """Yields a temporary path beside `path`, renamed at the end: nobody meets half a file."""
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except Exception as error:                                # a full disk, no permission, ...
        cause = error
        while cause is not None and not isinstance(cause, OSError):   # torch.save wraps it
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}; "
                        "what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path, value):
    with write_whole(path) as part:
        part.write_text(json.dumps(value, indent=1))


def save_tensors(path, state):
    with write_whole(path) as part, open(part, "wb") as file:
        torch.save(state, file)


def load_tensors(path, complaint):
    """What torch.save wrote, on the CPU; else UserError, e.g. `path` "is not a checkpoint"."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:                                # no zip, no tensors, a pickle
        raise UserError(f"{path} {complaint} ({one_line(error)})") from error


def load_checkpoint(path):
    """What train.py saved, on the CPU: a dict of tensors and plain values."""
    if not Path(path).exists():
        raise UserError(f"there is no checkpoint at {path}")
    complaint = "is not a checkpoint of train.py"
    checkpoint = load_tensors(path, complaint)
    for key in ("model", "ema", "optimizer", "step", "args", "classes", "rae"):
        if not isinstance(checkpoint, dict) or key not in checkpoint:
            raise UserError(f"{path} {complaint} (there is no {key!r})")
    return checkpoint


def load_renamed(module, state, renamings):
    """Strictly loads tensors that have other names. ValueError names what is wrong.

    renamings: (pattern, replacement) in order, from the module's names to the file's. A name with
    "qkv" is three of the file, query, key and value, one below the other.
    """
    loaded, unexpected = {}, set(state)
    for name, tensor in module.state_dict().items():
        theirs, shape = name, tuple(tensor.shape)
        for pattern, replacement in renamings:
            theirs = re.sub(pattern, replacement, theirs)
        keys = [theirs]
        if "qkv" in theirs:
            keys = [theirs.replace("qkv", part) for part in ("query", "key", "value")]
            shape = (shape[0] // 3, *shape[1:])
        for key in keys:
            if key not in state:
                raise ValueError(f"missing: {key}")
            if tuple(state[key].shape) != shape:
                raise ValueError(f"of another shape: {key} {tuple(state[key].shape)}, not {shape}")
        unexpected -= set(keys)
        loaded[name] = torch.cat([state[key] for key in keys]) if len(keys) > 1 else state[theirs]
    if unexpected:
        raise ValueError(f"unexpected: {', '.join(sorted(unexpected)[:5])}")
    module.load_state_dict(loaded, assign=True)


def from_hub(repo, file, revision=None, fetch=True):
    """-> path, None or None, why not: a file of the Hugging Face Hub, from its cache or fetched."""
    from huggingface_hub import (get_hf_file_metadata, hf_hub_download, hf_hub_url,
                                 try_to_load_from_cache)
    path, reason = try_to_load_from_cache(repo, file, revision=revision), "no network"
    if isinstance(path, str):
        return path, None
    if fetch:
        try:                                                  # a probe first, without long retries
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=10)
            return hf_hub_download(repo, file, revision=revision), None
        except Exception as error:                            # the Hub's client has many kinds
            if isinstance(error, OSError) and error.errno in DISK_REFUSES:
                raise
            reason = one_line(error, 500)
    return None, reason


def verify(path, what_to_do, size=None, sha256=None, md5=None):
    """-> path, if the file has this size in bytes and these sums; else UserError: what_to_do."""
    found = Path(path).stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path} has {found:,} bytes, expected were {size:,}: {what_to_do}")
    for kind, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := file_hash(path, kind)) != expected:
            raise UserError(f"{path} has the {kind} {found}, expected was {expected}: {what_to_do}")
    return path


def file_hash(path, kind="sha256"):
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(value):
    """sha256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def free_bytes(folder):
    """On the disk of a folder that need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- Randomness, pictures as tensors, words ------------------------------------------------------

def keyed_generator(*key, device="cpu"):
    """A generator that is a function of its key alone, e.g. ("eps", seed, step, example)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def global_batch(n, batch_size, step, seed):
    """Indices (batch_size,) of the examples of a step: one endless row of permutations, cut up.

    A function of (seed, step) alone, so that a resumed run continues exactly where it stopped.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n, position // n, seed)[position % n] for position in positions])


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=keyed_generator("order", seed, epoch)).numpy()


def to_float(images):
    """uint8 pictures -> float in [0, 1]; float images stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def to_uint8(images):
    """Decoded images, about [0, 1] -> uint8 pictures."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def resize(images, size):
    """(B, 3, H, W) -> float (B, 3, size, size), bicubic with antialias; it overshoots: clamp."""
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)


def one_line(error, most=150):
    return " ".join(str(error).split())[:most]


def table_text(rows, formats=None):
    """Rows (dicts with the same keys) -> an aligned Markdown table. None is an empty cell.

    formats: key -> format of its numbers; by default up to three decimals, fewer for large ones.
    """
    columns = []
    for key in rows[0]:
        values = [row[key] for row in rows]
        largest = max((abs(v) for v in values if isinstance(v, float)), default=0)
        decimals = f".{(largest < 1e4) + (largest < 100) + (largest < 1)}f"
        float_format = (formats or {}).get(key, decimals)
        cells = ["" if v is None else v if isinstance(v, str) else
                 format(v, float_format if isinstance(v, float) else ",") for v in values]
        width, left = max(map(len, [key, *cells])), isinstance(values[0], str)
        cells = [key, "-" * width if left else "-" * (width - 1) + ":", *cells]
        columns.append([cell.ljust(width) if left else cell.rjust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*columns))
