import hashlib
import importlib
import multiprocessing
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model

def pytest_runtest_setup(item):
    if (needs := item.get_closest_marker("gpu")) and not torch.cuda.is_available():
        pytest.skip(f"needs a GPU: {needs.args[0]}")


# A size for tests, as a forker would add one.
TINY = "SiT-2/1"
model.SiT_models[TINY] = model.preset(patch_size=1, hidden_size=32, depth=2, num_heads=2)


def make_photos(folder, classes=("left", "right", "top"), each=12, size=(40, 34)):
    """Class folders of small pictures: a bright patch at a place that the class decides, on a
    gradient of colours."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            y, x = np.mgrid[:size[1], :size[0]][..., None] / 40
            pixels = (rng.random(3) * 80 + x * rng.random(3) * 60 + y * rng.random(3) * 60).astype(np.uint8)
            pixels[5 + 7 * label:15 + 7 * label, 5 + 5 * label:20 + 5 * label, label % 3] = 250
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a short finished run on three classes of photographs."""
    import train
    folder = tmp_path_factory.mktemp("trained")
    make_photos(folder / "photos")
    train.main(train_args(folder, "--steps", "4", "--ema-decay", "0.995", "0.1"))
    return folder / "out" / "run"


def train_args(folder, *more):
    """Arguments of the smallest honest run: pictures in 2 x 2 patches, float32, the CPU."""
    return ["--dataset", str(folder / "photos"), "--image-size", "32", "--rae", "pixels", "--rae-patch", "16",
            "--model", TINY, "--batch-size", "8", "--lr", "2e-3", "--clip", "1", "--dtype", "float32",
            "--ema-decay", "0.995", "0.98", "--alpha-max", "75", "--cfg", "1.2", "--sampling-noise", "same",
            "--device", "cpu",
            "--out-dir", str(folder / "out" / "run"), "--data-dir", str(folder / "datasets"),
            "--log-every", "2",
            "--sample-every", "1000", "--save-every", "1000", "--report", "0", *more]


def fit_rae(name, images, patch_size=16, **settings):
    """One of rae.AUTOENCODERS, fitted on uint8 pictures (N, 3, S, S)."""
    import rae
    settings = {"image_size": images.shape[2], "seed": 0, "device": "cpu", "recipe": None, **settings}
    return rae.RAE(**rae.AUTOENCODERS[name].fit(images, patch_size=patch_size, **settings))


def forked(target, *args):
    """-> a process on one thread, not started yet. What forks it has imported torch once for all."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["conftest", "train"])
    return server.Process(target=on_one_thread, args=(target, *args), daemon=True)


def on_one_thread(target, *args):
    torch.set_num_threads(1)
    target(*args)


def main_of_rank(script, argv, folder, environment, changes):
    os.environ.update(environment)
    for module, values in changes.items():
        for name, value in values.items():
            setattr(importlib.import_module(module), name, value)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{name}-{environment['RANK']}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    importlib.import_module(script).main(argv)


def start(script, argv, folder, n=2, environment={}, changes={}):
    """`torchrun --nproc-per-node n SCRIPT.py ARGV`, without the seconds of its imports of torch.
    changes: {module: {name: value}}. -> the processes, which write into folder/stdout-0, -1, stderr-0, -1."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [forked(main_of_rank, script, list(map(str, argv)), folder, {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}, changes) for rank in range(n)]
    for process in processes:
        process.start()
    return processes


def processes(script, argv, folder, n=2, **more):
    """-> exit status of each, what process 0 printed, what all wrote to stderr."""
    started = start(script, argv, folder, n, **more)
    for process in started:
        process.join(120)
    return ([process.exitcode for process in started], (folder / "stdout-0").read_text(),
            "".join((folder / f"stderr-{rank}").read_text() for rank in range(n)))


@pytest.fixture
def server(tmp_path):
    """A web server on this machine for the files in server.folder. server.ranges collects the
    Range headers that came;
    server.break_after: bytes after which it hangs up; server.resumes: whether it knows Range at all."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file, wanted = web.folder / self.path.lstrip("/"), self.headers["Range"]
            web.ranges.append(wanted)
            if not file.is_file():
                return self.send_error(404)
            data, start = file.read_bytes(), int(wanted[6:-1]) if wanted and web.resumes else 0
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            # these two as the Hub does
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", self.path.partition("/resolve/")[2].partition("/")[0])
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:start + (web.break_after or len(data))])

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.folder, web.ranges, web.break_after, web.resumes = tmp_path / "web", [], None, True
    web.folder.mkdir()
    web.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield web
    web.shutdown()
    web.server_close()


def relative_l2(a, b):
    """Between two dicts of tensors, over all their numbers."""
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((difference / sum(b[k].double().square().sum() for k in b)).sqrt())


def apart(a, b, start):
    """How far one training ended from another, as a share of their way from start. Of sums in another
    order we saw 8e-4: Adam makes whole steps of gradients that are little but rounding errors. Gradients
    that are wrong by 1e-4 at random give 2e-2."""
    return relative_l2(a, b) / relative_l2(start, b)


def equal(a, b):
    """Bit equality of nested dicts, lists, tensors and values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
