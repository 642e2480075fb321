import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import model
import sample
import train
from conftest import ROOT, make_photos, train_args
from utils.images import picture_grid


def pictures(trained, out, *more):
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--device", "cpu", "--out", str(out), *more])
    return np.load(out) if out.suffix == ".npz" else None


def test_npz_is_balanced_and_says_how_it_was_made(trained, tmp_path, capsys):
    found = pictures(trained, tmp_path / "s.npz", "--num", "7", "--steps", "3", "--cfg", "2",
                     "--seed", "5")
    assert found["arr_0"].shape == (7, 32, 32, 3) and found["arr_0"].dtype == np.uint8
    assert found["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    recipe = json.loads(str(found["recipe"]))
    assert (recipe["steps"], recipe["cfg_scale"], recipe["seed"], recipe["ema"],
            recipe["step"]) == (3, 2.0, 5, "0.995", 4)
    said = capsys.readouterr().out
    assert "NFE 6 a picture" in said and "images/s" in said
    assert "NFE 3 a picture" in (pictures(trained, tmp_path / "s.npz", "--num", "1", "--steps", "3", "--cfg", "1"),
                                 capsys.readouterr().out)[1]


def test_a_picture_does_not_depend_on_batch_or_processes(trained, tmp_path):
    one = pictures(trained, tmp_path / "a.npz", "--num", "7", "--batch-size",
                   "7")["arr_0"].astype(int)
    three = pictures(trained, tmp_path / "b.npz", "--num", "7", "--batch-size",
                     "3")["arr_0"].astype(int)
    (tmp_path / "driver.py").write_text("import conftest, sample; sample.main()")     # which knows TINY
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2", str(tmp_path / "driver.py")]
    subprocess.run([*torchrun, "--ckpt", str(trained / "ckpt.pt"), "--device", "cpu",
                    "--num-images", "7",
                    "--batch-size", "2", "--out", str(tmp_path / "c.npz")], check=True,
                   capture_output=True, timeout=120,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")})
    two = np.load(tmp_path / "c.npz")["arr_0"].astype(int)
    assert abs(one - three).max() <= 1 and abs(one - two).max() <= 1      # rounding of the last bit
    assert abs(one - pictures(trained, tmp_path / "d.npz", "--num", "7", "--seed",
                              "1")["arr_0"]).mean() > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "c.npz", "d.npz", "driver.py"]


def test_compiled_sampling_draws_the_same(trained, tmp_path, monkeypatch, capsys):
    """Batches of one size, of which the last is filled up; with and without guidance."""
    compile, shapes = torch.compile, set()

    def compiles(network, **more):
        found = compile(network, backend="aot_eager", **more)
        found.register_forward_pre_hook(lambda _, inputs: shapes.add((type(network), inputs[0].shape)))
        return found
    monkeypatch.setattr(torch, "compile", compiles)
    for cfg in ("1", "2"):
        settings = ["--num", "7", "--batch-size", "3", "--cfg", cfg]
        plain = pictures(trained, tmp_path / "a.npz", *settings)
        found = pictures(trained, tmp_path / "b.npz", *settings, "--compile")
        assert abs(plain["arr_0"].astype(int) - found["arr_0"]).max() <= 1
        assert np.array_equal(plain["labels"], found["labels"])
        assert capsys.readouterr().out.count("compiled in") == 2
    assert {shape[0] for kind, shape in shapes if kind is model.SiT} == {3, 6} and len(shapes) == 3
    with pytest.raises(SystemExit):
        pictures(trained, tmp_path / "c.npz", "--rae-dtype", "tf32")
    assert "--rae-dtype tf32: on CUDA alone" in capsys.readouterr().err


def test_numbered_files_grid_and_trajectory(trained, tmp_path):
    pictures(trained, tmp_path / "files", "--num", "3", "--classes", "right", "2")
    assert sorted(p.name for p in (tmp_path / "files").glob("*.png")) == ["000000.png", "000001.png",
                                                                          "000002.png"]
    array = pictures(trained, tmp_path / "s.npz", "--num", "3", "--classes", "right", "2")
    assert array["labels"].tolist() == [1, 2, 1]
    with Image.open(tmp_path / "files" / "000002.png") as picture:
        assert np.array_equal(np.asarray(picture), array["arr_0"][2])
    pictures(trained, tmp_path / "grid.png")        # 4 rows of 3 classes, 64-pixel cells, a caption
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (3 * 64, 4 * 64 + 16)
        top = np.asarray(grid)[:16]
        assert (top == 255).mean() > 0.5 and (top < 100).any()             # black names on white
    pictures(trained, tmp_path / "steps.png", "--trajectory", "--steps", "5", "--num", "2")
    with Image.open(tmp_path / "steps.png") as grid:
        assert grid.size == (2 * 64, 5 * 64 + 16)
        last = grid.crop((0, 4 * 64 + 16, 64, 5 * 64 + 16))
        last = np.asarray(last.resize((32, 32), Image.Resampling.NEAREST))
    found = pictures(trained, tmp_path / "s.npz", "--steps", "5", "--num", "2")
    assert np.array_equal(last, found["arr_0"][0])


def test_every_setting_changes_the_picture(trained, tmp_path):
    def draw(*more):
        return pictures(trained, tmp_path / "s.npz", "--num", "3", "--steps", "3", *more)["arr_0"]
    plain = draw()
    for more in (["--cfg", "4"], ["--gamma", "3"], ["--sampling-noise", "fresh"],
                 ["--sigma", "0.5"],
                 ["--sigmas", "5", "4"], ["--ema", "raw"], ["--ema", "0.1"], ["--seed", "2"]):
        assert not np.array_equal(plain, draw(*more)), more
    assert np.array_equal(plain, draw("--ema", "0.995"))


def test_sigma_is_the_start_of_the_decay_and_sigmas_are_what_is_added(trained, tmp_path):
    def draw(*more):
        return pictures(trained, tmp_path / "s.npz", "--num", "3", *more)["arr_0"]
    assert np.array_equal(draw("--steps", "2", "--gamma", "1", "--sigma", "3"),
                          draw("--steps", "2", "--sigmas", "1.5"))
    assert np.array_equal(draw("--steps", "4", "--gamma", "1", "--sigma", "2"),
                          draw("--steps", "4", "--sigmas", "1.5", "1", "0.5"))
    assert not np.array_equal(draw("--steps", "2", "--gamma", "1", "--sigma", "3"),
                              draw("--steps", "2", "--sigmas", "3"))


def test_latents_that_are_not_finite_are_said(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    checkpoint["ema"]["0.995"]["final_layer.linear.bias"] *= float("nan")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit):
        pictures(tmp_path, tmp_path / "s.png")
    assert "not finite" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_captions_follow_the_classes():
    images = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    assert picture_grid(images, 3, ["a", "b", "c"] * 2).size == (192, 128 + 16)
    assert picture_grid(images, 3, list("abcdef")).size == (192, 128 + 32)
    assert picture_grid(images[:4], 3, ["a very long name indeed"] * 4).size == (192,
                                                                                        128 + 16)


@pytest.mark.parametrize("status,message,argv", [
    (2, "--steps: must be 1 or more", ["--steps", "0"]),
    (2, "--cfg: must be 0 or more", ["--cfg", "-0.5"]),
    (2, "--classes tulip: there is no such class; there are 3: left, right, top", ["--classes", "tulip"]),
    (2, "--classes 3: there is no such class", ["--classes", "3"]),
    (2, "--ema 0.5 is not in this checkpoint: it has 0.995, 0.1 and raw", ["--ema", "0.5"]),
    (2, "--sigmas has 2 values: give 4, one for each re-noising of 5 steps", ["--steps", "5", "--sigmas", "1", "2"]),
    (2, "are the noise as it is: no --gamma", ["--steps", "2", "--sigmas", "2", "--gamma", "1"]),
    (2, "not allowed with argument --sigma", ["--steps", "2", "--sigma", "1", "--sigmas", "2"]),
    (2, "unrecognized arguments: --step", ["--step", "4"]),
    (2, "--trajectory goes into a grid or a folder", ["--trajectory", "--out", "steps.npz"]),
    (1, "there is no checkpoint at nowhere.pt", ["--ckpt", "nowhere.pt"]),
])
def test_bad_arguments(trained, tmp_path, status, message, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--ckpt", str(trained / "ckpt.pt"), "--out", str(tmp_path / "s.png"),
                     "--device", "cpu", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == status and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_newest_run_or_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main([])
    assert stop.value.code == 1 and "there is no run in out/" in capsys.readouterr().err
    for i, name in enumerate(("old", "new")):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "ckpt.pt").touch()
        os.utime(tmp_path / "out" / name / "ckpt.pt", (i, i))
    assert sample.newest_checkpoint().parent.name == "new"


def test_one_class_trains_and_samples(tmp_path):
    import train
    make_photos(tmp_path / "photos", classes=("only",), each=9)
    train.main(train_args(tmp_path, "--steps", "2"))
    found = pictures(tmp_path / "out" / "run", tmp_path / "s.npz", "--num", "2", "--cfg", "2")
    assert found["labels"].tolist() == [0, 0]


def test_a_size_with_larger_patches_samples_too(photos, monkeypatch, tmp_path, capsys):
    """What train.py saves sample.py loads: the side of the latent is not that of the map of tokens."""
    monkeypatch.setitem(model.SiT_models, "SiT-2/2", model.preset(patch_size=2, hidden_size=32, depth=2, num_heads=2))
    train.main([*train_args(tmp_path, "--steps", "1"), "--model", "SiT-2/2"])
    sample.main(["--ckpt", str(tmp_path / "out" / "run" / "ckpt.pt"), "--num", "3", "--device", "cpu"])
    assert "3 pictures of 3 classes" in capsys.readouterr().out
