"""One process or many: torchrun, signals, how a command ends, random numbers by keys.

Look here to see how ranks find each other, who speaks, and where random numbers come from.
"""
import contextlib
import ctypes
import errno
import functools
import hashlib
import math
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from utils.cli import UserError, one_line, printable

# ---- How a command ends --------------------------------------------------------------------------

DISK_REFUSES = [getattr(errno, name, None) for name in (
    "ENOSPC EDQUOT EACCES EPERM EROFS ENOTDIR EISDIR EEXIST EFBIG ENAMETOOLONG ELOOP EIO".split())]
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
store = None                                                  # which all processes see
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")
         if hasattr(signal, name)]
SAVES = getattr(signal, "SIGUSR1", None)                      # a run saves and goes on


def user_errors(main):
    """Decorator of every main(argv=None): an expected error is one line and a non-zero exit.

    A UserError whose text begins with a flag is about the command line: 2. Other UserErrors, a disk
    that refuses, no memory: 1. Ctrl-C: 130, SIGTERM: 143, other signals alike. Of many processes
    the first one speaks, as the others' errors follow from it.
    """
    @functools.wraps(main)
    def wrapped(argv=None):
        received = []

        def stop(signum, frame):
            if signum != SAVES:                               # there is nothing to save
                received.append(signum)
                raise KeyboardInterrupt

        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:                    # closed by who started it: >&-
                setattr(sys, name, open(os.devnull, "w"))
            with contextlib.suppress(AttributeError):         # any terminal shows any name
                getattr(sys, name).reconfigure(errors="backslashreplace")
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
            for bar in list(getattr(tqdm, "_instances", ())):  # the line is the last, and alone
                bar.close()
            with contextlib.suppress(OSError):                # a terminal that is gone
                print(f"{Path(sys.argv[0]).name}: {printable(text)}", file=sys.stderr, flush=True)
        raise SystemExit(status)
    return wrapped


def explain(error, signals=()):
    """Returns the line that an error is worth, None for a bug, and the exit status."""
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
    """Ctrl-C and other signals that ask to stop or to save call handler(signum, frame)."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in {*STOPS, SAVES} - {None}
              if main_thread and (signum == signal.SIGINT or                # nohup ignores one
                                  signal.getsignal(signum) != signal.SIG_IGN)}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


class Stop:
    """A signal ends a run, or has it saved, after this step. Several processes ask each other every
    five seconds, or after each step that takes longer: torchrun kills 30 s after it has asked."""

    def __init__(self, step, alone=False):
        self.among_others = dist.is_initialized() and not alone
        self.received, self.asked, self.next, self.clock = [], step, step + 1, time.perf_counter()

    def receive(self, signum, frame):
        if signum == signal.SIGINT and signum in self.received and not self.among_others:
            raise KeyboardInterrupt                           # Ctrl-C twice: at once
        self.received.append(signum)

    def after(self, step):
        """Returns the signal that ends the run now, SAVES, or 0; the same in all processes."""
        mine = signals = list(self.received)
        if self.among_others:
            if step < self.next:
                return 0
            now, found = time.perf_counter(), [None] * dist.get_world_size()
            dist.all_gather_object(found, (mine, (now - self.clock) / (step - self.asked)))
            ahead = int(5 / max(seconds for _, seconds in found))         # steps
            self.asked, self.next, self.clock = step, step + max(1, ahead), now
            signals = [signum for of_one, _ in found for signum in of_one]
        for _ in range(mine.count(SAVES)):
            self.received.remove(SAVES)
        return next((signum for signum in signals if signum != SAVES), SAVES if signals else 0)


def first_to_fail():
    if store is None:
        return True
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:                                      # the one that keeps it is gone
        return False


# ---- One process or many -------------------------------------------------------------------------

def setup(device="auto"):
    """Returns rank, world, torch.device; joins the process group if torchrun started others."""
    global store
    rank, world, local = torchrun_environment()
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("there are cpu, cuda (ROCm's, too) and mps")
        if device.type == "mps" and world > 1:
            raise RuntimeError("it is for one process; several take --device cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = one_line(str(error).splitlines()[0])
        raise UserError(f"--device {device} cannot be used here: {why}") from error
    allow_tf32(False)                                         # float32 is float32, unless asked
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world == 1 and torch.cuda.device_count() > 1:
            print("one GPU of several is used; this takes them all: "
                  f"torchrun --nproc-per-node gpu {' '.join(sys.argv)}", file=sys.stderr)
    if world > 1 and not dist.is_initialized():
        try:
            store = meet(next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0],
                         rank, world)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the {world} processes of WORLD_SIZE do not come together "
                            f"({one_line(error)}): unset RANK, WORLD_SIZE and LOCAL_RANK, or start "
                            "with torchrun") from error
        patience = timedelta(hours=3)                         # while rank 0 downloads
        store.set_timeout(patience)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=patience)
    return rank, world, device


def keep_memory():
    """glibc gives what is freed back to the system, which clears it anew for the next step: that
    took a twentieth of a step. Up to 1 GB is kept; blocks of 32 MB and more go back as ever."""
    with contextlib.suppress(AttributeError, OSError, TypeError):         # there is another malloc
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((-3, 32 << 20), (-1, 1 << 30)):   # M_MMAP_ and M_TRIM_THRESHOLD
            mallopt(name, value)


def meet(common, rank, world, patience=timedelta(minutes=5)):
    """A store of this attempt alone, when all processes are there. RuntimeError: they are not.

    After torchrun --max-restarts the common one still has the addresses of processes that are dead.
    Nothing in the environment tells attempts apart: the agents of several machines count them
    differently. So the first process makes up a name, and tells it to all who ask under a name of
    their own: who is dead asks no more, and what it asked does no harm.
    """
    if rank > 0:
        mine = uuid4().hex
        common.set(f"from {rank}", mine)
        common.wait([f"to {mine}"], patience)
        name = common.get(f"to {mine}").decode()
        common.set(f"{name} {rank}", "is here")
        return dist.PrefixStore(name, common)
    name, missing = uuid4().hex, set(range(1, world))
    last = time.monotonic() + patience.total_seconds()
    while missing:
        for other in missing:
            if common.check([f"from {other}"]):
                common.set("to " + common.get(f"from {other}").decode(), name)
        missing = {other for other in missing if not common.check([f"{name} {other}"])}
        if missing and time.monotonic() > last:
            raise RuntimeError(f"{len(missing)} of them did not come")
        time.sleep(0.05)
    return dist.PrefixStore(name, common)


def torchrun_environment():
    """Returns rank, world, local rank, as torchrun tells them; 0, 1, 0 of a process alone."""
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


def say(*words, write=print, **more):
    """print, in one process of all. A terminal or a pipe that is gone ends no work."""
    if not (dist.is_initialized() and dist.get_rank()):
        try:
            write(*words, **more)
            more.get("file", sys.stdout).flush()
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            number = 2 if more.get("file") is sys.stderr else 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def note(text):
    """What is no result: to stderr, as stdout may be read by a program."""
    say(f"note: {text}", file=sys.stderr)


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


def summed(sums):
    """Tensors by name, of this process -> of all processes, as plain numbers and lists."""
    if dist.is_initialized():
        for value in sums.values():
            dist.all_reduce(value)
    return {name: value.tolist() for name, value in sums.items()}


def gather(value):
    """In process 0 the values of all, in order; in the others nothing."""
    if not dist.is_initialized():
        return [value]
    found = None if dist.get_rank() else [None] * dist.get_world_size()
    dist.gather_object(value, found)
    return found or []


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


def allow_tf32(on):
    """For the whole process: on tensor cores of CUDA, factors in float32 are cut to 10 bits of
    mantissa. What is compiled depends on it: it is not switched for a part of the work."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def compiled(network, dtype, *inputs, **more):
    """The network compiled, and tried on inputs; as it is, with a word, where that fails."""
    started, found = time.perf_counter(), torch.compile(network, dynamic=False)
    # Of several processes each tries alone: it may fail in one, and not all parts have gradients.
    alone = getattr(network, "no_sync", contextlib.nullcontext)
    try:
        with alone():
            with autocast(dtype, inputs[0].device):
                predicted = found(*inputs, **more)
            if torch.is_grad_enabled():
                predicted.float().mean().backward()
        say(f"compiled in {time.perf_counter() - started:.0f} s")
    except Exception as error:                                # compilers fail in many ways
        note(f"not compiled, and slower for it ({one_line(error)}); --no-compile does without "
             "trying")
        found = network
    network.zero_grad(set_to_none=True)
    return found


def set_precision(rae, asked, dtype):
    """Of a RAE's decoder: as asked, or the default beside a denoiser of this dtype; returns which.
    UserError: it would change the denoiser, too."""
    on_cuda = rae.device.type == "cuda"
    found = asked or ("tf32" if on_cuda and dtype == "bfloat16" else "float32")
    if found == "tf32" and (not on_cuda or dtype == "float32"):
        raise UserError("--rae-dtype tf32: on CUDA alone, for a run whose --dtype is bfloat16 (it "
                        "would change the float32 of the denoiser, too)")
    allow_tf32(found == "tf32")
    rae.dtype = "bfloat16" if found == "bfloat16" else "float32"
    return found


@torch.no_grad()
def compile_both(denoiser, rae, batch_size, guided):
    """Compiles for batches of this size: returns the denoiser, changes rae.decoder.

    denoiser: sample.predict with its first arguments, as sample.load_denoiser returns it.
    """
    predict, (model, weights, dtype) = denoiser.func, denoiser.args
    z = torch.zeros(batch_size * (1 + guided), *rae.latent_shape, device=rae.device)
    y = torch.zeros(len(z), dtype=torch.long, device=rae.device)
    model = compiled(model.eval(), dtype, z, y)
    predicted = predict(model, weights, dtype, z, y)[:batch_size]
    rae.decoder = compiled(rae.decoder, rae.dtype, predicted.float())
    # What it predicts lies otherwise in memory than noise does, and would be another shape to it.
    return lambda v, y: predict(model, weights, dtype, v.contiguous(), y)


def compiles(asked, device):
    """--compile, --no-compile, or by default on a GPU for which there is a compiler."""
    return device.type == "cuda" and bool(find_spec("triton")) if asked is None else asked


def peak_memory_gb(device):
    """Of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not find_spec("resource"):                             # Windows
        return None
    import resource
    unit = 1 if sys.platform == "darwin" else 1024            # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def physical_memory():
    """Bytes of the machine, as far as it tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


# ---- Random numbers, by keys ---------------------------------------------------------------------

def keyed_generator(*key, device="cpu"):
    """A function of its key, e.g. ("eps", seed, step, example), and of the kind of device alone.

    A CPU's looks at 32 bits: that two of 50,000 pictures share their noise has a chance of 1 in 4.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise_of_each(generators, shape, device="cpu"):
    """N(0, I), (n, *shape), of each of n generators its own, as torch.randn draws it; on the CPU by
    several threads, straight to where a GPU can fetch it."""
    on_cpu = torch.device(device).type == "cpu"
    eps = torch.empty(len(generators), *shape, device=device,
                      pin_memory=on_cpu and torch.cuda.is_available())
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not on_cpu or eps.numel() < 1e5:                       # a thread costs more than this
        threads = 1

    def draw(first):
        for i in range(first, len(generators), threads):
            torch.randn(shape, generator=generators[i], out=eps[i])
    if threads == 1:
        draw(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(threads)))
    return eps


def global_batch(n, batch_size, step, seed):
    """Indices (batch_size,) of the examples of a step: one endless row of permutations, cut up.

    A function of (seed, step) alone, so that a resumed run continues exactly where it stopped.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n, position // n, seed)[position % n] for position in positions])


@functools.lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    return torch.randperm(n, generator=keyed_generator("order", seed, epoch)).numpy()
