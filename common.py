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
import signal
import socket
import sys
import threading
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

# ---- Errors and arguments ------------------------------------------------------------------------


class UserError(Exception):
    """What the user can mend: shown as one line. Bugs keep their traceback."""

    def __init__(self, text, status=None):
        super().__init__(text)
        self.status = status or (2 if text.startswith("--") else 1)       # 2 as argparse has it


DISK_REFUSES = [getattr(errno, name, None) for name in (
    "ENOSPC EDQUOT EACCES EPERM EROFS ENOTDIR EISDIR EEXIST EFBIG ENAMETOOLONG ELOOP EIO".split())]
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
store = None                                                  # which all processes see


def user_errors(main):
    """Decorator of every main(argv=None): an expected error is one line and a non-zero exit.

    A UserError whose text begins with a flag is about the command line: 2. Other UserErrors, a disk
    that refuses, no memory: 1. Ctrl-C: 130, SIGTERM: 143. Of many processes the first one speaks,
    as the others' errors follow from it.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        received = []

        def stop(signum, frame):
            received.append(signum)
            raise KeyboardInterrupt

        for stream in (sys.stdout, sys.stderr):               # any terminal shows any name
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
        try:
            with on_signals(stop):
                result = main(argv)
                sys.stdout.flush()
                with contextlib.suppress(RuntimeError):       # another failed, and says so itself
                    barrier()   # or gloo's threads, not yet done with tensors, could deadlock below
                if received:                                  # somebody had caught it
                    raise KeyboardInterrupt
                return result
        except (Exception, KeyboardInterrupt) as error:
            text, status = explain(error, received)
            speaks = first_to_fail()
            if speaks and text is None:
                raise
            if isinstance(error, OSError) and not error.filename:     # maybe of the output
                with contextlib.suppress(OSError):            # or Python would try it again
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        if speaks and text:
            print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr)
        raise SystemExit(status)
    return wrapped


def explain(error, signals=()):
    """-> the line that an error is worth, None for a bug, and the exit status."""
    if isinstance(error, UserError):
        return "error: " * (error.status < 128) + str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what is on the disk is whole", 128 + (signals or [signal.SIGINT])[0]
    if isinstance(error, BrokenPipeError):                    # of `| head`: it has seen enough
        return "", 141
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        return f"error: {error.filename or 'the disk or the output'}: {error.strerror}", 1
    if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        return ("error: out of memory: lower --batch-size; of train.py raise --accumulate, or give "
                "--checkpoint-activations"), 1
    return None, 1


@contextlib.contextmanager
def on_signals(handler):
    """Ctrl-C and SIGTERM call handler(signum, frame)."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler)
              for signum in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


class Stop:
    """Ctrl-C or SIGTERM ends a run after this step; where there are several processes after the
    next that is logged, as there they wait for each other."""

    def __init__(self, log_every):
        self.log_every, self.received = log_every, []

    def receive(self, signum, frame):
        if signum in self.received:                           # asked twice: at once
            raise KeyboardInterrupt
        self.received.append(signum)

    def after(self, step):
        """-> the signal that ends the run now, or 0."""
        if store is None:
            return self.received[0] if self.received else 0
        if self.received:
            at = (step // self.log_every + 1) * self.log_every
            store.compare_set("stop", "", f"{at} {int(self.received[0])}")
        if not store.check(["stop"]):
            return 0
        at, signum = map(int, store.get("stop").split())
        return signum if step >= at else 0


def first_to_fail():
    if store is None:
        return True
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:                                      # the one that keeps it is gone
        return False


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in --help, and no abbreviated flags."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            nothing = action.default in (None, False)
            return action.help if nothing else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=self.Help, **kwargs)

    def error(self, message):
        if os.environ.get("RANK", "0") == "0":                # the others read the same
            print(f"{self.prog}: error: {one_line(message, 400)} (--help lists the flags)",
                  file=sys.stderr)
        raise SystemExit(2)


def number(kind, low=-math.inf, high=None):
    """An argparse type: an int or a float from low to high (by default 10^9, or 10^38)."""
    high = high or (10 ** 9 if kind is int else 1e38)

    def parse(text):
        value = kind(text)
        if not low <= value <= high:                          # nor is NaN
            bound = f"{high} or less" if value > high else f"{low} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {one_line(text, 30)}")
        return value
    parse.__name__ = kind.__name__                            # argparse says "invalid int value"
    return parse


# ---- One process or many -------------------------------------------------------------------------

def setup(device="auto"):
    """-> rank, world, torch.device; joins the process group if torchrun started others."""
    global store
    rank, world, local = torchrun_environment()
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("there are cpu, cuda (ROCm's, too) and mps")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = one_line(str(error).splitlines()[0])
        raise UserError(f"--device {device} cannot be used here: {why}") from error
    # float32 is float32, on every device: what may be coarser is under autocast.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world == 1 and torch.cuda.device_count() > 1:
            print("one GPU of several is used; this takes them all: "
                  f"torchrun --nproc-per-node gpu {' '.join(sys.argv)}", file=sys.stderr)
    if world > 1 and not dist.is_initialized():
        try:
            store = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the {world} processes of WORLD_SIZE do not come together "
                            f"({one_line(error)}): unset RANK, WORLD_SIZE and LOCAL_RANK, or start "
                            "with torchrun") from error
        patience = timedelta(hours=3)                         # while rank 0 downloads
        store.set_timeout(patience)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=patience)
    return rank, world, device


def torchrun_environment():
    """-> rank, world, local rank, as torchrun tells them; 0, 1, 0 of a process alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return 0, 1, 0
    try:
        rank, world, local = (int(given[name]) for name in names)
        if world > 1 and not (os.environ["MASTER_ADDR"]
                              and 0 < int(os.environ["MASTER_PORT"]) < 65536):
            raise ValueError
        if not 0 <= rank < world or local < 0:
            raise ValueError
        return rank, world, local
    except (KeyError, ValueError):
        raise UserError(f"the environment has {given}, which torchrun would not set without valid "
                        f"{', '.join(names)}, MASTER_ADDR and MASTER_PORT: unset "
                        f"{' '.join(given)}, or start with torchrun") from None


def say(*words):
    """print, in one process of all."""
    if not (dist.is_initialized() and dist.get_rank()):
        print(*words, flush=True)


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


def prefetch(load, jobs, ahead=2):
    """load(job) for each job; a thread keeps some of them ready."""
    with ThreadPoolExecutor(1) as pool:
        queue = deque()
        for job in jobs:
            queue.append(pool.submit(load, job))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


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


def physical_memory():
    """Bytes of the machine, as far as it tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


# ---- Files ---------------------------------------------------------------------------------------

def part_of(path):
    """A temporary path beside `path`, whose name says which process writes it."""
    path = Path(path)
    return path.with_name(f".part-{os.getpid()}-{socket.gethostname()}-{path.name[-40:]}")


def sweep(folder):
    """Removes the temporary files of this machine's processes that are no more."""
    for part in Path(folder).glob(".part-*"):
        mine = re.match(rf"\.part-(\d+)-{re.escape(socket.gethostname())}-", part.name)
        if mine and os.name == "posix":
            try:
                os.kill(int(mine[1]), 0)                      # no signal: is it there?
            except ProcessLookupError:
                shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
            except (PermissionError, OverflowError):
                pass


@contextlib.contextmanager
def write_whole(path):
    """Yields a temporary path beside `path`, renamed at the end: nobody meets half a file."""
    path, part = Path(path), part_of(path)
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
        file.flush()
        os.fsync(file.fileno())                               # before it takes the old one's place


def load_tensors(path, complaint):
    """What torch.save wrote, on the CPU; else UserError, e.g. `path` "is not a checkpoint"."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")
        if zipfile.is_zipfile(path):                          # torch.load never looks at the sums
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # no zip, no tensors, a pickle
        raise UserError(f"{path} {complaint} ({one_line(error)})") from error


def first_not_finite(tensors):
    """The name of a tensor of nested dicts that has a NaN or an infinity; None if there is none."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            if found := first_not_finite(value):
                return f"{name} {found}"
        elif isinstance(value, torch.Tensor) and not value.isfinite().all():
            return str(name)


def check_moments(optimizer, parameters):
    """ValueError: Adam's state is not of these parameters; the fused one would crash on it."""
    for i, parameter in enumerate(parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            if optimizer["state"][i][key].shape != parameter.shape:
                raise ValueError(f"the optimizer's {key} {i} has another shape than the weight")


@contextlib.contextmanager
def locked(folder):
    """Keeps other runs out of a folder, as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl                                      # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing there: wait for its end, or name "
                            "another folder") from None
        except (ImportError, OSError) as error:
            print(f"note: {folder} cannot be locked ({error}): start no second run there")
        yield


def reserve(path):
    """The disk's room for all of a sparse file: if it is full that is an error now, no crash."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def folder_by_hash(root, name, manifest):
    """root/NAME-HASH of what a manifest says; if there is one of another name, that."""
    digest = hash_of(manifest)[:12]
    return next(Path(root).glob(f"[!.]*-{digest}"), Path(root) / f"{name[-80:]}-{digest}")


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


def printable(text):
    """Names come from files: nothing in them may steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(error, most=150):
    return printable(" ".join(str(error).split())[:most])


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
