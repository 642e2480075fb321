"""Processes that find each other, again after some of them died."""
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sample
import train
from conftest import ROOT, equal, make_photos, processes, train_args
from utils.cli import UserError
from utils.processes import compiled, meet, setup

# train.py, in which process 1 is killed in step 3 of the first attempt.
DIES = """
import os, pathlib, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import conftest, train
update, died = train.Learner.update, pathlib.Path({folder!r}) / "died"

def dies(self, step, lr):
    if step == 3 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os.kill(os.getpid(), 9)
    return update(self, step, lr)
train.Learner.update = dies
train.main()
"""


def test_attempts_do_not_meet_each_other():
    """In one store: three processes of which two died after they had asked, then three others."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def client():
        return dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)

    def attempt(ranks, patience=timedelta(seconds=20)):
        found, errors = {}, []

        def one(rank):
            try:
                found[rank] = meet(client(), rank, 3, patience)
            except RuntimeError as error:
                errors.append(str(error))
        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, errors
    found, errors = attempt([1, 2], timedelta(seconds=0.5))
    assert not found and len(errors) == 2
    for n in range(2):
        found, errors = attempt([0, 1, 2])
        assert not errors and sorted(found) == [0, 1, 2]
        assert found[1].add("count", 1) + found[2].add("count", 1) == 3       # 1 and 2: nothing is left of before
        found[0].set("word", str(n))
        assert found[2].get("word") == str(n).encode()
    found, errors = attempt([0, 1], timedelta(seconds=1))
    assert errors == ["1 of them did not come"]


def test_a_run_on_two_machines_goes_on_after_a_process_died(tmp_path):
    """By itself, and ends in the bits of a run in which nobody died. The machines are two agents of torchrun."""
    make_photos(tmp_path / "photos")
    (tmp_path / "dies.py").write_text(DIES.format(root=str(ROOT), folder=str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    argv = train_args(tmp_path, "--steps", "5", "--save-every", "2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--max-restarts", "2"]
    agents = [subprocess.Popen([*torchrun, tmp_path / "dies.py", *argv], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = "".join(agent.communicate(timeout=150)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "resuming" in said and "at step 2" in said and (tmp_path / "died").exists()
    statuses, _, errors = processes("train", [*argv, "--out-dir", tmp_path / "whole"], tmp_path)
    assert statuses == [0, 0], errors
    killed, whole = (torch.load(path / "ckpt.pt", weights_only=True) for path in (tmp_path / "out" / "run",
                                                                                  tmp_path / "whole"))
    assert equal(killed["model"], whole["model"]) and equal(killed["ema"], whole["ema"])


def later(path):
    """What process 1 finds on another machine, which has an out/ of its own."""
    checkpoint = sample.load_run(path)
    return {**checkpoint, "step": checkpoint["step"] + int(os.environ["RANK"])}


def test_processes_that_find_different_checkpoints_are_refused(photos, tmp_path):
    train.main(train_args(tmp_path, "--steps", "2"))
    before = (tmp_path / "out" / "run" / "ckpt.pt").read_bytes()
    status, _, errors = processes("train", train_args(tmp_path, "--steps", "4"), tmp_path,
                                  changes={"train": {"load_run": later}})
    assert status == [1, 1] and before == (tmp_path / "out" / "run" / "ckpt.pt").read_bytes()
    assert "process 1 finds step 3 in" in errors and "process 0 step 2: all must see the same --out-dir" in errors
    assert errors.count("\n") == 1 and "Traceback" not in errors


def test_trying_what_is_compiled_leaves_the_reducer_alone(monkeypatch):
    """A network in two parts, of which one is tried: the first step would find gradients missing."""
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x, both=False):
            return self.second(self.first(x)) if both else self.first(x)

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = compiled(DistributedDataParallel(Parts()), "float32", torch.ones(2, 3))
        for _ in range(2):
            network(torch.ones(2, 3), both=True).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    finally:
        dist.destroy_process_group()


def test_several_processes_on_a_mac_are_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device mps cannot be used here: it is for one process; several take"):
        setup("mps")


stat, scandir = os.stat, os.scandir


def stat_told(path, *args, **more):
    print(f"process {os.environ['RANK']} stats {path}", file=sys.stderr)
    return stat(path, *args, **more)


def scandir_told(path="."):
    print(f"process {os.environ['RANK']} lists {path}", file=sys.stderr)
    return scandir(path)


def test_one_process_looks_at_the_files(photos, tmp_path):
    """What another stats is the one picture that each process reads."""
    train.main(train_args(tmp_path, "--encode-only"))
    status, _, errors = processes("train", train_args(tmp_path, "--steps", "2"), tmp_path,
                                  changes={"os": {"stat": stat_told, "scandir": scandir_told}})
    assert status == [0, 0], errors
    for number, at_least, at_most in (("0", 36 + 4, 1000), ("1", 0, 1)):  # pictures and folders; that picture
        told = [line for line in errors.splitlines()
                if line.startswith(f"process {number} ") and f" {photos}" in line]
        assert at_least <= len(told) <= at_most, told
