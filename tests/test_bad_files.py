"""Files that are not what they should be, bad arguments, kills: one line, and nothing is lost."""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import flops
import rae
import sample
import train
from conftest import equal, forked, make_photos, start, train_args, processes
from utils.checkpoint import first_not_finite
from utils.cli import UserError
from utils.files import append_line, locked
from utils.processes import Stop, explain, user_errors


def ends(main, argv):
    """-> exit status, the lines of stderr that are no note."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(a) for a in argv])
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run in a folder of its own, samples of it, and the folder to start from."""
    folder = tmp_path_factory.mktemp("place")
    make_photos(folder / "photos", each=4)
    train.main(train_args(folder, "--steps", "2"))
    sample.main(["--ckpt", str(folder / "out" / "run" / "ckpt.pt"), "--npz", "--num", "6", "--device", "cpu"])
    x = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    np.savez(folder / "stats.npz", mu=x.mean(0), sigma=np.cov(x.T).astype(np.float32))
    return folder


# ---- Checkpoints ---------------------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


def change(*path, value=None, without=False):
    """The checkpoint with another value at path, or without it; value may be a function of it."""
    def changed(checkpoint):
        inner = checkpoint
        for key in path[:-1]:
            inner = inner[key]
        if without:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value(inner.get(path[-1])) if callable(value) else value
        return checkpoint
    return changed


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


BIAS = "final_layer.linear.bias"
WRONG = {
    "empty": lambda c: b"", "text": lambda c: b"PK no zip at all", "a list": lambda c: [1, 2],
    "a number": lambda c: 7, "code": lambda c: {**c, "step": Evil()},
    **{f"no {key}": change(key, without=True)
       for key in ("model", "ema", "optimizer", "step", "args", "classes", "rae")},
    **{f"{key} is text": change(key, value="text")
       for key in ("model", "ema", "optimizer", "step", "args", "classes", "rae")},
    "a weight less": change("model", BIAS, without=True),
    "a weight more": change("model", "more", value=torch.zeros(3)),
    "a weight of another shape": change("model", BIAS, value=torch.zeros(3)),
    "a weight of another type": change("model", BIAS, value=lambda t: t.double()),
    "a weight that is no tensor": change("model", BIAS, value=[1.0]),
    "NaN in a weight": change("model", BIAS, value=with_nan),
    "infinite average": change("ema", "0.995", BIAS, value=lambda t: t / 0),
    "an average less": change("ema", "0.995", BIAS, without=True),
    "no average": change("ema", value={}), "other averages": change("args", "ema_decay", value=[0.5]),
    "NaN in the autoencoder": change("rae", "state", "latent_var", value=with_nan),
    "another autoencoder": change("rae", "name", value="vae"),
    "an autoencoder without name": change("rae", "name", without=True),
    "an autoencoder of other shapes": change("rae", "state", "latent_mean", value=torch.zeros(3)),
    "an autoencoder of other latents": change("rae", "image_size", value=64),
    "an autoencoder without state": change("rae", "state", without=True),
    "no moments": change("optimizer", "state", value={}),
    "moments of other shapes": change("optimizer", "state", 3, "exp_avg", value=torch.zeros(2)),
    "moments without their step": change("optimizer", "state", 3, "step", without=True),
    "moments of float64": change("optimizer", "state", 3, "exp_avg", value=lambda t: t.double()),
    "NaN in moments": change("optimizer", "state", 3, "exp_avg_sq", value=with_nan),
    "a class less": change("classes", value=["a", "b"]), "no class": change("classes", value=[]),
    "classes are numbers": change("classes", value=[1, 2, 3]), "step -1": change("step", value=-1),
    "an unknown model": change("args", "model", value="SiT-Q/1"),
    "another model": change("args", "model", value="SiT-XS/1"),
    "no model's name": change("args", "model", without=True),
    "cfg NaN": change("args", "cfg", value=float("nan")), "cfg text": change("args", "cfg", value="2"),
    "sigma infinite": change("args", "sigma", value=float("inf")),
    "0 steps": change("args", "sample_steps", value=0), "float8": change("args", "dtype", value="float8"),
    "other noise": change("args", "sampling_noise", value="pink"),
    "escape codes": change("args", "model", value="\x1b[2J\n" * 500),
}


def commands(ckpt, place, out):
    return {"sample": (sample.main, ["--ckpt", ckpt, "--device", "cpu", "--out", out / "x.png", "--num", 2]),
            "train": (train.main, train_args(place, "--steps", "3", "--out-dir", str(ckpt.parent))),
            "rae": (rae.main, ["reconstruct", place / "photos" / "left" / "0.png", "--ckpt", ckpt,
                               "--out", out, "--device", "cpu"])}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_one_line_and_stays_as_it_is(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(place / "out" / "run", run)
    content = WRONG[name](torch.load(run / "ckpt.pt", weights_only=True))
    (run / "ckpt.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, run / "ckpt.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    every = commands(run / "ckpt.pt", place, tmp_path / "drawn")
    # rae.py needs the autoencoder alone; each of the others is asked as often as the other.
    others = ["train"] if set(name.split()) & {"weight", "average", "averages", "moments", "model", "cfg", "sigma",
                                               "steps", "float8", "noise", "codes", "less", "latents"} else ["train", "rae"]
    i = list(WRONG).index(name)
    for command in ("sample", others[i // 2 % len(others)])[:1 + i % 2]:
        main, argv = every[command]
        status, lines = ends(main, argv)
        assert status == 1 and len(lines) == 1, (command, lines)
        assert "ckpt.pt cannot be used: " in lines[0] and "\x1b" not in lines[0] and len(lines[0]) < 400
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}              # no "evil", nothing drawn


def test_a_flipped_bit_in_any_part_of_a_checkpoint_is_refused(place, tmp_path):
    """torch.load does not look at its zip's checksums."""
    good = (place / "out" / "run" / "ckpt.pt").read_bytes()
    with zipfile.ZipFile(place / "out" / "run" / "ckpt.pt") as file:
        records = [info for info in file.infolist() if info.file_size > 64]
    for info in records[::25]:
        bad = bytearray(good)
        bad[info.header_offset + 30 + len(info.filename) + info.file_size // 2 + 64] ^= 4
        (tmp_path / "ckpt.pt").write_bytes(bad)
        status, lines = ends(sample.main, ["--ckpt", tmp_path / "ckpt.pt", "--device", "cpu"])
        assert status == 1 and "cannot be used" in lines[0] and len(lines) == 1, info.filename


# ---- Arguments and places ------------------------------------------------------------------------

BAD_ARGUMENTS = [
    (train, 2, "--batch-size 1000000000000"), (train, 2, f"--seed {'9' * 30}"), (train, 2, "--image-size 100000"),
    (train, 2, f"--steps {'9' * 5000}"), (train, 2, "--lr 1e400"), (train, 2, "--ema-decay 1.5"),
    (train, 2, "--p-mean nan"), (train, 2, "--accumulate 0"), (train, 2, "--report -1"), (train, 2, "--device meta"),
    (train, 2, "--device cuda:99"), (train, 2, "--dataset photos --data-dir photos"), (train, 2, "--dataset \x1b[2J"),
    (train, 2, "--dataset photos --data-dir photos/cache"), (train, 2, "--dataset photos --out-dir photos/run"),
    (train, 2, "--dataset photos --rae pixels --image-size 40"), (train, 2, "--report 1"),
    (train, 2, "--encode-only --cache-latents no"), (train, 2, "--dataset photos --rae pixels --weights-dir photos"),
    (train, 2, "--dataset photos --rae lite0 --init-from CKPT --decoder-steps 5"), (sample, 2, "--npz --out pictures/"),
    (train, 2, "--dataset imagenet --split test"), (train, 1, "--dataset photos/left/0.png"),
    (train, 1, "--dataset circle/"), (train, 1, "--dataset photos --data-dir file/deep"), (train, 1, f"--dataset ./{'n' * 300}"),
    (train, 1, f"--dataset photos --out-dir {'n' * 300}"), (train, 1, "--dataset photos --out-dir circle"),
    (train, 2, "--dataset photos --rae dinov2-b --image-size 256 --weights-dir /nowhere --steps 5 --epochs 3"),
    (train, 1, "--dataset photos --rae dinov2-b --image-size 256 --weights-dir nowhere"),
    (sample, 2, "--num 1000000000000"), (sample, 1, "--num 900000000"), (sample, 2, "--steps 0"),
    (sample, 2, "--steps 99999"), (sample, 2, "--cfg inf"), (sample, 2, f"--seed {'1' * 30}"), (sample, 2, "--ema x\x1b[2J"),
    (sample, 2, "--classes \x1b]0;x"), (sample, 2, "--out x.gif"), (sample, 2, "--out ckpt.pt"), (sample, 1, "--out file/x.png"),
    (sample, 2, "--sigmas 1 2 3 4 5 6 7 8 9"), (sample, 2, "--npz --trajectory"), (sample, 2, "--device xla"),
    (sample, 1, "--ckpt nowhere.pt"), (sample, 1, "--ckpt photos"), (sample, 1, "--ckpt pipe"), (sample, 1, "--ckpt circle"),
    (sample, 1, f"--out {'n' * 300}.png"), (sample, 1, "--out pictures"),
    (fid, 1, "nowhere photos"), (fid, 1, "pipe photos"), (fid, 1, "circle photos"), (fid, 1, "file photos"),
    (fid, 2, "photos photos --features x"), (fid, 2, "photos photos --batch-size 1e9"), (fid, 2, "photos photos --metrics fid,x\x1b"),
    (fid, 2, "out/run/ckpt.pt photos"), (fid, 2, "photos"), (fid, 1, "photos photos --inception-weights pipe"),
    (fid, 1, "photos photos --inception-weights file"), (fid, 1, "huge.npz photos"), (fid, 1, "evil.npz stats.npz"),
    (fid, 2, "pipe.pt"), (rae, 2, "photos"), (rae, 1, "reconstruct pipe --ckpt CKPT"), (rae, 1, "reconstruct photos --ckpt CKPT"),
    (rae, 1, "reconstruct nowhere.png --ckpt CKPT"),
    (rae, 1, "reconstruct photos/left/0.png --ckpt CKPT --out file"), (flops, 2, "--model SiT-Q/1"), (flops, 2, "--steps -1"),
]


@pytest.fixture
def room(place, tmp_path, monkeypatch):
    """A working folder with things that are in the way."""
    monkeypatch.chdir(tmp_path)
    os.symlink(place / "photos", "photos")
    os.symlink("circle", "circle")
    os.mkfifo("pipe")
    os.mkfifo("pipe.pt")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9)).save("pictures/other.png")
    shutil.copy(place / "stats.npz", "stats.npz")
    with zipfile.ZipFile("huge.npz", "w", zipfile.ZIP_DEFLATED) as file:      # claims 10^15 pixels
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (10 ** 9, 600, 600, 3)})
        file.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    np.savez("evil.npz", mu=np.zeros(3), sigma=np.array([{}], dtype=object))
    return tmp_path


@pytest.mark.parametrize("number", range(len(BAD_ARGUMENTS)))
def test_bad_arguments_are_one_line(number, room, place):
    script, status, text = BAD_ARGUMENTS[number]
    ckpt = str(place / "out" / "run" / "ckpt.pt")
    argv = [ckpt if word == "CKPT" else word for word in text.split(" ")]
    if script is sample and "--ckpt" not in argv:
        argv += ["--ckpt", ckpt]
    if script in (train, sample, fid) and "--device" not in argv:
        argv += ["--device", "cpu"]
    photos = {path: path.read_bytes() for path in (place / "photos").rglob("*.png")}
    found, lines = ends(script.main, argv)
    assert found == status and len(lines) == 1, lines
    assert "\x1b" not in lines[0] and len(lines[0]) < 700
    assert photos == {path: path.read_bytes() for path in (place / "photos").rglob("*.png")}


# ---- Caches and logs -----------------------------------------------------------------------------

def test_a_damaged_cache_is_encoded_again(photos, tmp_path, capsys):
    train.main(train_args(tmp_path, "--encode-only"))
    path, = (tmp_path / "datasets" / "latents").glob("*/*.f16")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    capsys.readouterr()
    for content, words in ((flipped, "1 of 1 files of"), (bytes(len(good)), "1 of 1 files of"), (good[:-7], ""),
                           (good + b"x", ""), (b"", ""), (None, "")):
        path.unlink() if content is None else path.write_bytes(content)
        train.main(train_args(tmp_path, "--encode-only"))
        said = "".join(capsys.readouterr())
        assert words in said and "encoded 36 pictures" in said, said
        assert path.read_bytes() == good
    (path.parent / "manifest.json").write_text("[1]")         # it is for people; the folder's name has its hash
    path.rename(path.with_name("000000-00000000.f16"))
    train.main(train_args(tmp_path, "--encode-only"))
    assert "encoded 36 pictures" in capsys.readouterr().out and path.read_bytes() == good
    assert [file.name for file in path.parent.glob("*.f16")] == [path.name]
    train.main(train_args(tmp_path, "--encode-only"))
    assert "encoded" not in capsys.readouterr().out


def test_a_large_cache_is_checked_by_encode_only(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rae.LatentCache, "checked_below", 0)
    train.main(train_args(tmp_path, "--encode-only"))
    path, = (tmp_path / "datasets" / "latents").glob("*/*.f16")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    capsys.readouterr()
    train.main(train_args(tmp_path, "--steps", "1"))
    assert "damaged" not in capsys.readouterr().err
    train.main(train_args(tmp_path, "--encode-only", "--out-dir", str(tmp_path / "other")))
    assert "1 of 1 files of" in capsys.readouterr().err and path.read_bytes() == good


def test_a_log_never_stands_in_the_way(photos, tmp_path, capsys):
    train.main(train_args(tmp_path, "--steps", "2"))
    log = tmp_path / "out" / "run" / "log.jsonl"
    good = log.read_text()
    for content in (b'{"step": 2, "lo', b"\xff\xfe\n[1]\n7\nnull\n", b'{"step": "2"}\n', b'{"step": ' + b"9" * 5000 + b"}\n"):
        log.write_bytes(good.encode() + content)
        shutil.copytree(tmp_path / "out" / "run", tmp_path / "out" / "again")
        train.main(train_args(tmp_path, "--steps", "4", "--out-dir", str(tmp_path / "out" / "again")))
        lines = (tmp_path / "out" / "again" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]
        aside = next((tmp_path / "out" / "again").glob("log-with-broken-lines-*"))
        assert aside.read_bytes() == good.encode() + content and str(aside) in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out" / "again")


def test_a_state_is_judged_before_it_replaces_a_good_one(photos, tmp_path):
    argv = train_args(tmp_path, "--save-every", "1", "--warmup-steps", "0", "--clip", "0")
    train.main([*argv, "--steps", "1"])
    run = tmp_path / "out" / "run"
    good = torch.load(run / "ckpt.pt", weights_only=True)
    good["args"]["lr"] = 1e38
    torch.save(good, run / "ckpt.pt")
    before = (run / "ckpt.pt").read_bytes()
    status, lines = ends(train.main, [*argv, "--steps", "3", "--lr", "1e38"])
    assert status == 1 and "is not finite; what is on the disk is from before" in lines[-1], lines
    assert (run / "ckpt.pt").read_bytes() == before


def test_what_is_not_finite_is_named():
    inf = float("inf")
    for bad in ([1, float("nan")], [inf], [inf, -inf], [3e38] * 4 + [inf]):
        assert first_not_finite({"a": torch.ones(2), "b": {"c": torch.tensor(bad)}}) == "b c"
    fine = {"overflow": torch.tensor([3e38] * 4), "half": torch.tensor([6e4] * 9).half(), "step": torch.tensor(3),
            "flag": torch.tensor([True]), "empty": torch.zeros(0), "text": "nan"}
    assert first_not_finite(fine) is None


def test_temporary_files_of_the_dead_are_swept(tmp_path):
    """Of any machine: those that nobody has written to for an hour."""
    old = {".part-7-c0ffee0000-ckpt.pt": True, ".part-1-another.host-a": False, ".part-x": True, "ckpt.pt": True}
    for name, is_old in old.items():
        (tmp_path / name).mkdir() if name.endswith("x") else (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 4000 * is_old,) * 2)
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".part-1-another.host-a", "ckpt.pt"}


# ---- Kills ---------------------------------------------------------------------------------------

STEPS = ("--steps", "90", "--save-every", "5")


def with_stderr(path, argv):
    with open(path, "w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        try:
            train.main(argv)
        except SystemExit as stop:
            print(f"exit {stop.code}", file=sys.stderr)


def stopped(folder, photos, kinds):
    """A run that is sent each of these signals some steps after it began or went on."""
    folder.mkdir()
    (folder / "photos").symlink_to(photos)
    run, rng, step = folder / "out" / "run", random.Random(0), 0
    for kind in kinds:
        process = forked(with_stderr, folder / "err", train_args(folder, *STEPS))
        process.start()
        deadline, log = time.time() + 60, []
        while time.time() < deadline and process.is_alive():
            if log and log[-1].endswith("}") and json.loads(log[-1])["step"] > step + 7:
                break
            time.sleep(0.01)
            log = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, kind)
        process.join()
        lines = (folder / "err").read_text().splitlines()
        if kind != signal.SIGKILL:
            assert lines[-1] == f"exit {128 + kind}" and "and saved: the same command resumes it" in lines[-2]
        saved = torch.load(run / "ckpt.pt", weights_only=True)["step"]
        assert step < saved < 90
        step = saved
    return folder


def test_killed_and_stopped_runs_end_in_the_same_bits(photos, tmp_path):
    """kill -9 loses what came after the last save; SIGTERM saves, and ends with 143."""
    first = stopped(tmp_path / "first", photos, [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL])
    whole = stopped(tmp_path / "whole", photos, [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                  # as the processes that were killed
    try:
        for folder in (first, whole):
            train.main(train_args(folder, *STEPS))
    finally:
        torch.set_num_threads(threads)
    found, logs = {}, {}
    for folder in (first, whole):
        found[folder] = torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)
        lines = map(json.loads, (folder / "out" / "run" / "log.jsonl").read_text().splitlines())
        logs[folder] = [(line["step"], line["loss"], line["grad_norm"], line["loss_by_angle"]) for line in lines]
        assert not list(folder.rglob(".part-*"))
    for part in ("model", "ema", "optimizer", "step", "rae", "classes"):
        assert equal(found[first][part], found[whole][part]), part
    assert logs[first] == logs[whole]


def wait_for(log, lines):
    deadline = time.time() + 60
    while time.time() < deadline and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
def test_other_signals_save_too(photos, tmp_path):
    """SIGUSR1 saves, again and again, and the run goes on; the others end it."""
    for kind in (signal.SIGHUP, signal.SIGUSR2):
        stopped(tmp_path / kind.name, photos, [kind])
    process = forked(with_stderr, tmp_path / "err", train_args(tmp_path, "--steps", "100000", "--save-every", "100000"))
    process.start()
    run, saved = tmp_path / "out" / "run", [0]
    wait_for(run / "log.jsonl", 1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGUSR1)
        while process.is_alive():
            with contextlib.suppress(OSError):
                if (step := torch.load(run / "ckpt.pt")["step"]) > saved[-1]:
                    saved.append(step)
                    break
    assert len(saved) == 3 and process.is_alive()
    process.kill()
    process.join()


def test_two_processes_stop_together(photos, tmp_path):
    """One was asked, and nothing is ever logged: torchrun kills 30 s later."""
    argv = train_args(tmp_path, "--steps", "100000", "--log-every", "100000", "--save-every", "3")
    processes = start("train", argv, tmp_path)
    log, deadline = tmp_path / "out" / "run" / "ckpt.pt", time.time() + 60
    while time.time() < deadline and not log.exists():
        time.sleep(0.02)
    processes[1].terminate()
    asked = time.time()
    for process in processes:
        process.join(60)
        assert process.exitcode == 143
    assert time.time() - asked < 20
    said = (tmp_path / "stderr-0").read_text() + (tmp_path / "stderr-1").read_text()
    assert said.count("and saved: the same command resumes it") == 1 and "RuntimeError" not in said
    assert torch.load(log.parent / "ckpt.pt", weights_only=True)["step"] > 2


def test_one_process_speaks_for_all(tmp_path, monkeypatch):
    status, _, said = processes("train", ["--dataset", "/nowhere"], tmp_path)
    assert status == [1, 1] and "Traceback" not in said       # torch warns of a lost peer, at times
    assert said.count("error: ") == said.count("/nowhere does not exist") == 1
    monkeypatch.setenv("RANK", "1")
    assert ends(train.main, ["--stepps", "2"]) == (2, [])     # process 0 says it


def print_much(out, err):
    """A command that prints, into these files."""
    @user_errors
    def main(argv=None):
        for _ in range(1000):
            print("x" * 99)
    for path, number in ((err, 2), (out, 1)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    main()


def test_a_closed_pipe_and_a_full_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = forked(print_much, tmp_path / "pipe", tmp_path / "err")
    process.start()
    with open(tmp_path / "pipe") as reader:                   # | head -1
        assert reader.readline() == "x" * 99 + "\n"
    process.join(60)
    assert process.exitcode == 141 and (tmp_path / "err").read_bytes() == b""
    if os.path.exists("/dev/full"):
        process = forked(print_much, "/dev/full", tmp_path / "full")
        process.start()
        process.join(60)
        said = (tmp_path / "full").read_text()
        assert process.exitcode == 1 and said.count("\n") == 1 and "output" in said


def without_outputs(argv, numbers, end):
    for number, name in ((1, "stdout"), (2, "stderr")):
        if number in numbers:                                 # >&-, 2>&-
            os.close(number)
            setattr(sys, name, None)
    with contextlib.suppress(SystemExit):
        train.main(argv)
        end.touch()


@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
def test_closed_outputs(numbers, photos, tmp_path):
    process = forked(without_outputs, train_args(tmp_path, "--steps", "2"), numbers, tmp_path / "end")
    process.start()
    process.join(60)
    assert (tmp_path / "end").exists() and len((tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()) == 1


def into_a_closed_pipe(argv):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    train.main(argv)


def test_an_output_that_is_gone_ends_no_run(photos, tmp_path):
    """A terminal that was closed, a tee that Ctrl-C has killed first."""
    process = forked(into_a_closed_pipe, train_args(tmp_path, "--steps", "4"))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert torch.load(tmp_path / "out" / "run" / "ckpt.pt")["step"] == 4


def test_who_is_asked_twice():
    """torchrun hands on a SIGTERM that its workers may have had; a hurry is Ctrl-C twice."""
    stop = Stop(0)
    for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        stop.receive(signum, None)
    assert stop.after(1) == stop.after(2) == signal.SIGTERM and stop.received == [signal.SIGTERM] * 2
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)
    stop = Stop(0)
    stop.receive(signal.SIGUSR1, None)
    assert [stop.after(1), stop.after(2)] == [signal.SIGUSR1, 0]


def test_a_signal_in_the_last_picture_ends_the_run(photos, tmp_path, monkeypatch, capsys):
    """Before its report."""
    draw = train.picture_grid
    monkeypatch.setattr(train, "picture_grid", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), draw(*args))[1])
    status, lines = ends(train.main, train_args(tmp_path, "--steps", "2"))
    assert status == 143 and "stopped after the last step; it is saved" in lines[-1]
    assert torch.load(tmp_path / "out" / "run" / "ckpt.pt")["step"] == 2


def test_places_that_are_none(place, photos, tmp_path, monkeypatch):
    """Links to nothing, a disk that is none, a full one, no bars where there is no terminal."""
    monkeypatch.chdir(tmp_path)
    os.symlink("/scratch-that-is-gone", "gone")
    status, lines = ends(train.main, [*train_args(tmp_path), "--out-dir", "gone/run"])
    assert status == 1 and lines[0].endswith("gone is a link that leads nowhere"), lines
    if os.path.exists("/proc/self"):
        status, lines = ends(train.main, [*train_args(tmp_path), "--out-dir", "/proc/runs"])
        assert status == 1 and len(lines) == 1 and "the folder /proc/runs cannot be made" in lines[0]
    assert ends(train.main, train_args(tmp_path, "--steps", "2")) == (0, [])
    if os.path.exists("/dev/full"):
        log = tmp_path / "out" / "run" / "log.jsonl"
        log.unlink()
        log.symlink_to("/dev/full")
        with pytest.raises(UserError, match="cannot write .*log.jsonl: No space left"):
            append_line(log, 1, {})


def test_without_the_modules_of_unix(photos, tmp_path, monkeypatch, capsys):
    """As on Windows."""
    for name in ("resource", "fcntl"):
        monkeypatch.setitem(sys.modules, name, None)
    train.main(train_args(tmp_path, "--steps", "2"))
    found = capsys.readouterr()
    assert "images/s, waiting" in found.out and "run cannot be locked" in found.err
    assert json.loads((tmp_path / "out" / "run" / "log.jsonl").read_text())["memory_gb"] is None


def test_no_memory_is_one_line():
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
                  RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):
        text, status = explain(error)
        assert status == 1 and "--batch-size" in text and "--accumulate" in text
    assert explain(RuntimeError("a bug"))[0] is None


# ---- Fuzz ----------------------------------------------------------------------------------------

def damaged(content, rng):
    """One of the accidents that files have."""
    content, kind = bytearray(content), rng.randrange(6)
    at, n = rng.randrange(len(content)), rng.randrange(1, 64)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at + n] = bytes(n)
    elif kind == 3:
        content[at:at + n] = rng.randbytes(n)
    elif kind == 4:
        del content[at:at + n]
    else:
        content[at:at] = rng.randbytes(n)
    return bytes(content)


def test_damaged_files_end_in_a_line_or_are_made_again(place, tmp_path, monkeypatch):
    """100 mutations of the kinds of files; SLOW=1: 4,000."""
    monkeypatch.setitem(fid.NETWORKS, "means", lambda *args: {"means": lambda x: x.double().mean((2, 3))})
    work = tmp_path / "work"
    shutil.copytree(place, work)
    run, rng = work / "out" / "run", random.Random(0)
    endings = "png jpg webp tif bmp gif ppm jp2 tga".split()
    for i, path in enumerate(sorted((work / "photos").rglob("*.png"))):
        with Image.open(path) as picture:
            picture.convert("RGB").save(path.with_suffix(f".{endings[i % len(endings)]}"))
        if endings[i % len(endings)] != "png":
            path.unlink()
    encode = (train.main, train_args(work, "--encode-only", "--out-dir", str(work / "none")))
    ends(*encode)
    latents = [*(work / "datasets" / "latents").rglob("*.f16")]
    photos = sorted((work / "photos").rglob("*.*"))
    device = ["--device", "cpu"]
    kinds = [
        ([run / "ckpt.pt"], sample.main, ["--ckpt", run / "ckpt.pt", "--num", 1, "--steps", 1, "--out", work / "x.png", *device]),
        ([run / "samples.npz"], fid.main, [run / "samples.npz", run / "samples.npz", "--features", "means", *device]),
        ([work / "stats.npz"], fid.main, [work / "stats.npz", work / "stats.npz", *device]),
        (photos, *encode), (photos, encode[0], [*encode[1], "--skip-bad"]), (latents, *encode)]
    for i in range(4000 if os.environ.get("SLOW") else 100):
        files, main, argv = kinds[i % len(kinds)]
        if files is latents:                                  # whose names follow from what is in them
            files = [*(work / "datasets" / "latents").rglob("*.f16")]
        file = rng.choice(files)
        good = file.read_bytes()
        file.write_bytes(bad := damaged(good, rng))
        status, lines = ends(main, argv)                      # any other exception is one of ours
        assert status == 0 or status == 1 == len(lines), (i, file, lines)
        if file.suffix == ".f16":
            assert status == 0
        else:
            assert file.read_bytes() == bad
            file.write_bytes(good)
