import json
import math
import os
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import baselines
import data
import fid
import rae
import sample
import settings
import train
from conftest import ROOT, TINY, apart, equal, make_photos, processes, relative_l2, train_args
from data import InMemory
from utils.checkpoint import ALWAYS, completed
from utils.cli import UserError


def load(folder):
    return torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)


def log_of(folder):
    lines = (folder / "out" / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def opened_by_the_first(*args):
    assert os.environ["RANK"] == "0", "another process looks at the files, too"
    return data.load_dataset(*args)


def test_one_process_two_processes_and_accumulation_agree(photos, tmp_path):
    runs = {}
    for name in ("one", "two", "accumulated"):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        (runs[name] / "photos").symlink_to(photos)
    more = ("--steps", "8", "--latent-consistency", "0.5", "--log-every", "8", "--p-mean", "-0.4",
            "--p-std", "0.9")
    changes = {"train": {"load_dataset": opened_by_the_first}}
    statuses, _, errors = processes("train", train_args(runs["two"], *more), tmp_path, changes=changes)
    assert statuses == [0, 0], errors
    train.main(train_args(runs["one"], *more))
    train.main(train_args(runs["accumulated"], *more, "--accumulate", "2"))
    one = load(runs["one"])
    torch.manual_seed(0)
    fresh = baselines.SiT_models[TINY](input_size=2, in_channels=768, num_classes=3).state_dict()
    assert relative_l2(fresh, one["model"]) > 1e-2                         # they did go somewhere
    for name in ("two", "accumulated"):
        other = load(runs[name])
        assert apart(other["model"], one["model"], fresh) < 1e-2
        assert apart(other["ema"]["0.995"], one["ema"]["0.995"], fresh) < 1e-2
        log, log_one = (json.loads((runs[n] / "out" / "run" / "log.jsonl").read_text())
                        for n in (name, "one"))
        for key in ("loss", "reconstruction", "consistency", "latent_consistency", "grad_norm"):
            assert log[key] == pytest.approx(log_one[key], rel=1e-3), key
        for a, b in zip(log["loss_by_angle"], log_one["loss_by_angle"]):
            assert a == (b and pytest.approx(b, rel=1e-3))


def test_ema_is_what_it_says(photos, tmp_path):
    weights = []
    for steps in ("1", "2", "3"):
        train.main(train_args(tmp_path, "--steps", steps, "--ema-decay", "0.15", "0"))
        weights.append(load(tmp_path))
    for before, after, warm in ((0, 1, 2 / 11), (1, 2, 3 / 12)):
        for decay in ("0.15", "0.0"):
            d = min(float(decay), warm)
            for name, value in weights[after]["ema"][decay].items():
                expected = (d * weights[before]["ema"][decay][name]
                            + (1 - d) * weights[after]["model"][name])
                assert torch.allclose(value, expected, atol=1e-7)


def test_checkpoint_log_and_pictures(trained):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    assert checkpoint.keys() == {"model", "ema", "optimizer", "step", "args", "classes", "counts", "rae"}
    assert checkpoint["counts"] == [12, 12, 12]
    assert checkpoint["step"] == 4 and checkpoint["classes"] == ["left", "right", "top"]
    assert list(checkpoint["ema"]) == ["0.995", "0.1"]
    assert not any("module." in key or "_orig_mod" in key for key in checkpoint["model"])
    assert json.loads((trained / "args.json").read_text()) == checkpoint["args"]
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["consistency"], rel=1e-5)
        assert len(line["loss_by_angle"]) == 4 and line["images_per_s"] > 0
        assert line["memory_gb"] > 0.05
    assert (trained / "samples-0000004.png").stat().st_size > 1000


def test_bfloat16_trains_and_the_loss_falls(photos, tmp_path):
    train.main(train_args(tmp_path, "--steps", "60", "--dtype", "bfloat16", "--noise-dist",
                          "uniform",
                          "--reconstruct", "both", "--warmup-steps", "5"))
    log = [json.loads(line)
           for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log]
    assert sum(losses[-10:]) < 0.92 * sum(losses[:10])
    assert all(value.dtype == torch.float32 for value in load(tmp_path)["model"].values())


def test_epochs_count_in_pictures(photos, tmp_path):
    train.main(train_args(tmp_path, "--epochs", "2"))                      # 36 pictures, 8 a step
    assert load(tmp_path)["step"] == 9


def test_learning_rate():
    rates = [train.learning_rate(step, 100, 1.0, 10, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[99] == pytest.approx(0.05 + 0.95 / 20)
    assert {train.learning_rate(step, 100, 1.0, 0, 0.0) for step in range(100)} == {1.0}


def test_by_angle():
    # 0, 16.7, 26.6, 47.7, 71.6, 89.4 degrees
    sigma = torch.tensor([0.0, 0.3, 0.5, 1.1, 3.0, 100.0])
    found = train.by_angle(torch.tensor([1.0, 2, 4, 8, 16, 32]), sigma)
    assert found.tolist() == [[3, 4, 8, 48], [2, 1, 1, 2]]


def fails(capsys, status, message, argv):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == status and message in error, error


def test_a_finished_run_is_left_alone_and_a_different_one_refused(trained, capsys):
    folder, before = trained.parent.parent, (trained / "ckpt.pt").stat().st_mtime_ns
    train.main(train_args(folder, "--steps", "4", "--ema-decay", "0.995", "0.1"))
    assert "ckpt.pt is finished at step 4" in capsys.readouterr().out
    fails(capsys, 1, "lr 0.002 -> 0.5",
          train_args(folder, "--steps", "8", "--ema-decay", "0.995", "0.1", "--lr", "0.5"))
    assert (trained / "ckpt.pt").stat().st_mtime_ns == before


def test_changed_pictures_are_refused(photos, tmp_path, capsys):
    train.main(train_args(tmp_path, "--steps", "1"))
    (photos / "left" / "0.png").unlink()
    fails(capsys, 1, "have changed", train_args(tmp_path, "--steps", "2"))


def test_a_torn_log_is_mended(photos, tmp_path):
    train.main(train_args(tmp_path, "--steps", "2"))
    with open(tmp_path / "out" / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 3}\n{"step": 4, "lo')
    train.main(train_args(tmp_path, "--steps", "4"))
    lines = (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(photos, tmp_path, capsys):
    args = train_args(tmp_path, "--save-every", "1", "--steps", "50", "--lr", "1e30", "--clip", "0",
                      "--warmup-steps", "0")
    fails(capsys, 1, "the gradient norm is", args)
    checkpoint = load(tmp_path)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_broken_checkpoint_is_said(photos, tmp_path, capsys):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "ckpt.pt").write_bytes(b"PK no zip at all")
    fails(capsys, 1, "cannot be used: it is not a checkpoint of train.py", train_args(tmp_path))
    torch.save({"model": {}}, tmp_path / "out" / "run" / "ckpt.pt")
    fails(capsys, 1, "ckpt.pt cannot be used: 'ema' is missing", train_args(tmp_path))


@pytest.mark.parametrize("message,argv", [
    ("--steps: must be 1 or more", ["--steps", "0"]),
    ("--cfg: must be 0 or more", ["--cfg", "-1"]),
    ("--model: invalid choice: 'SiT-Q/1'", ["--model", "SiT-Q/1"]),
    ("unrecognized arguments: --modle", ["--modle", "SiT-B/1"]),
    ("no data set is called 'flowres'", ["--dataset", "flowres"]),
    ("--batch-size 7 does not divide into", ["--batch-size", "7", "--accumulate", "2"]),
    ("--image-size 50 is not a multiple of", ["--rae", "pixels", "--image-size", "50"]),
    ("--alpha-mix 70 is below --alpha-max 75", ["--alpha-max", "75", "--alpha-mix", "70"]),
    ("--p-mean means nothing to --noise-dist uniform", ["--noise-dist", "uniform", "--p-mean", "1"]),
    ("--alpha-mix means nothing to --mix-prob 0", ["--mix-prob", "0", "--alpha-mix", "80"]),
    ("--lr: must be 0 or more, not nan", ["--lr", "nan"]),
    ("--rae-patch means nothing to --rae dinov2-b", ["--rae", "dinov2-b", "--rae-patch", "8"]),
    ("not allowed with argument --steps", ["--steps", "2", "--epochs", "3"]),
    ("--ema-decay [0.5, 0.5]: one of them is there twice", ["--ema-decay", "0.5", "0.50"]),
    ("--device teapot cannot be used here", ["--device", "teapot"]),
])
def test_bad_arguments(message, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(capsys, 2, message, argv)
    assert not (tmp_path / "out").exists()


def test_bad_folders(photos, tmp_path, capsys):
    (photos / "empty").mkdir()
    fails(capsys, 1, "empty has no pictures", train_args(tmp_path))
    fails(capsys, 1, "does not exist", ["--dataset", str(tmp_path / "missing")])


def test_files_where_folders_should_be_and_a_full_disk(photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    fails(capsys, 1, "file/latents", train_args(tmp_path, "--data-dir", str(tmp_path / "file")))
    fails(capsys, 1, "file cannot be made: File exists", train_args(tmp_path, "--out-dir", str(tmp_path / "file")))

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "log_line", full)                      # as the log's own write would
    fails(capsys, 1, "the disk or the output: No space left on device", train_args(tmp_path, "--steps", "2"))


@pytest.mark.gpu("training and resuming on one")
def test_training_on_a_gpu(photos, tmp_path):
    for steps in ("10", "20"):
        train.main(train_args(tmp_path, "--steps", steps, "--device", "cuda", "--dtype",
                              "bfloat16"))
    log = [json.loads(line)
           for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]


# ---- Table 3's rows ------------------------------------------------------------------------------

class FewLatents:
    """In the place of a cache of latents: (N, flips, C, h, w)."""
    latents, labels = torch.randn(20, 2, 8, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3

    def __len__(self):
        return 20

    def batch(self, indices, flips):
        return self.latents[indices, flips], self.labels[indices]


def asked_of_the_losses(monkeypatch, *flags):
    """What a run's second step hands to its losses; these by name, with the loss."""
    seen, variant = [], train.variant

    def spied(*which):
        method = variant(*which)

        def spy(denoiser, *batch):
            seen.append(batch)
            return method.training_losses(denoiser, *batch)
        return method._replace(training_losses=spy)
    monkeypatch.setattr(train, "variant", spied)
    run = vars(train.parse_args(["--rae", "pixels", "--model", "SiT-T/1", "--alpha-max", "75", "--dtype", "float32",
                                 "--batch-size", "8", *flags]))
    learner = train.Learner(run, (8, 2, 2), 3, torch.device("cpu"))
    sums = learner.add_gradients(1, iter([learner.draw_inputs(FewLatents(), 1, 0)]), to_log=True)
    monkeypatch.setattr(train, "variant", variant)
    return seen[0], {name: value.item() for name, value in sums.items() if name != "loss_by_angle"}


def test_a_flag_changes_what_it_says_and_nothing_else(monkeypatch):
    def asked(*flags):
        return asked_of_the_losses(monkeypatch, *flags)
    base, found = asked()
    rec, con = found["reconstruction"], found["consistency"]
    assert found["loss"] == pytest.approx(rec + con) and con > 0.1 and len(base) == 5
    z, y, hi, lo, eps = base

    weighted = asked("--consistency", "0.3")
    assert equal(weighted[0], base) and weighted[1] == {**found, "loss": pytest.approx(rec + 0.3 * con)}
    alone = asked("--consistency", "0", "--reconstruct", "both")
    assert equal(alone[0], base) and alone[1]["loss"] == pytest.approx(alone[1]["reconstruction"])
    assert alone[1]["reconstruction"] != pytest.approx(rec)
    again = asked("--latent-consistency", "0.5")
    assert equal(again[0][:5], base) and not torch.equal(again[0][5], eps) and abs(again[0][5].std() - 1) < 0.2
    assert again[1]["loss"] == pytest.approx(rec + con + 0.5 * again[1]["latent_consistency"])
    flat = asked("--no-spherify")
    assert equal(flat[0], base) and flat[1]["consistency"] != pytest.approx(con)
    for flags in (["--noise-dist", "uniform"], ["--p-mean", "1"], ["--p-std", "2"], ["--alpha-max", "60"],
                  ["--alpha-mix", "89.5", "--mix-prob", "1"], ["--mix-prob", "1"]):
        other, _ = asked(*flags)
        same_flips = "--noise-dist" not in flags              # which draws as many numbers of another kind
        assert torch.equal(other[0], z) or not same_flips
        assert torch.equal(other[1], y) and torch.equal(other[4], eps) and len(other) == 5
        assert not torch.equal(other[2], hi)
        assert torch.equal(other[3], lo) == ("--mix-prob" in flags)         # it moves the high level alone


def test_reconstruction_alone_needs_both_levels(capsys):
    fails(capsys, 2, "leaves the noisier level without a loss: add --reconstruct both", ["--consistency", "0"])


def test_a_run_starts_from_another(trained, tmp_path, capsys):
    folder = trained.parent.parent
    first = torch.load(trained / "ckpt.pt", weights_only=True)

    def start(*more):
        train.main([*train_args(folder, "--ema-decay", "0.995", "0.1", "--init-from", str(trained / "ckpt.pt"),
                                *more), "--out-dir", str(tmp_path / "on")])
        return torch.load(tmp_path / "on" / "ckpt.pt", weights_only=True)
    still = start("--steps", "1", "--lr", "0")
    assert equal(still["model"], first["model"]) and equal(still["rae"], first["rae"]) and still["step"] == 1
    d = 0.995                                                 # without the ramp of random weights
    for name, value in still["ema"]["0.995"].items():
        assert torch.allclose(value, d * first["ema"]["0.995"][name] + (1 - d) * first["model"][name], atol=1e-7)
    assert all(state["step"] == 1 for state in still["optimizer"]["state"].values())
    assert start("--steps", "2", "--lr", "0")["step"] == 2    # resumed, not begun again
    fails(capsys, 1, "init_from", [*train_args(folder, "--steps", "3", "--lr", "0", "--ema-decay", "0.995", "0.1"),
                                   "--out-dir", str(tmp_path / "on")])
    make_photos(tmp_path / "others", classes=("bottom", "right"))          # two other classes, one of them known
    train.main([*train_args(folder, "--ema-decay", "0.995", "0.1", "--init-from", str(trained / "ckpt.pt"), "--lr", "0",
                            "--steps", "1"), "--out-dir", str(tmp_path / "tuned"), "--dataset", str(tmp_path / "others")])
    tuned = torch.load(tmp_path / "tuned" / "ckpt.pt", weights_only=True)
    before, after = first["model"].pop("y_embedder.weight"), tuned["model"].pop("y_embedder.weight")
    assert tuned["classes"] == ["bottom", "right"] and equal(tuned["model"], first["model"])
    assert torch.equal(after, torch.stack([before[:3].mean(0), before[1], before[3]]))
    assert equal(tuned["rae"], first["rae"])

    for flags, message in ((["--model", "SiT-S/1"], "has model SiT-2/1, not SiT-S/1"),
                           (["--rae-patch", "8"], "has rae_patch 16, not 8"),
                           (["--method", "sphere-encoder"], "has method sphere, not sphere-encoder"),
                           (["--init-from", "nowhere.pt"], "no checkpoint at nowhere.pt")):
        fails(capsys, 1 if "nowhere" in message else 2, message,
              [*train_args(folder, "--ema-decay", "0.995", "0.1", "--init-from", str(trained / "ckpt.pt"), *flags),
               "--out-dir", str(tmp_path / "no")])


# ---- Forks ---------------------------------------------------------------------------------------

def test_one_settings_table_makes_parser_and_checks(capsys):
    """Every setting has a help or no flag; --help says no default of a flag without a value."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: True)" not in said and "(default: False)" not in said
    for name, setting in settings.SETTINGS.items():
        flag = f"--no-{name}" if setting.value is True else f"--{name.replace('_', '-')}"
        flagless = name in ("sigma_scale", "gamma", "sample_steps", "class_dropout_prob", "betas", "weight_decay",
                            "decay_last")
        assert any(f" {flag}{end}" in said for end in " ],") != flagless, name
        assert setting.what or flagless
    args = {**settings.PAPER, "sigma": 3.0, "pictures": {}}
    assert completed(dict(args), settings.SETTINGS) == args
    oldest = {name: args[name] for name in (*ALWAYS, "pictures")}
    assert completed(dict(oldest), settings.SETTINGS) == args
    for name in ALWAYS:
        with pytest.raises(ValueError, match=name):
            completed({k: v for k, v in oldest.items() if k != name}, settings.SETTINGS)
    for wrong in ({"pair_noise": "two"}, {"decay": "geometric"}, {"lr": -1.0}, {"lr": "1e-4"}, {"flips": 1}, {"betas": 0.9},
                  {"ema_decay": [2.0]}, {"gamma": math.nan}, {"batch_size": 2.5}, {"model": None}, {"pictures": []},
                  {"sigma": None}):
        with pytest.raises(ValueError):
            completed({**args, **wrong}, settings.SETTINGS)
    assert completed({**args, "pair_noise": "one"}, settings.SETTINGS)


def test_sampling_in_training_is_that_of_sample_py(photos, tmp_path, monkeypatch):
    """With a dropout in the network the grid of train.py is that of sample.py: both in eval mode."""
    import model
    forward = model.Mlp.forward
    monkeypatch.setattr(model.Mlp, "forward",
                        lambda self, x: torch.nn.functional.dropout(forward(self, x), 0.5, self.training))
    train.main(train_args(tmp_path, "--steps", "2", "--lr", "0.1"))
    run = tmp_path / "out" / "run"
    sample.main(["--ckpt", str(run / "ckpt.pt"), "--device", "cpu"])
    ours, theirs = (np.asarray(Image.open(run / name)).astype(int) for name in ("samples-0000002.png", "sample.png"))
    assert np.abs(ours - theirs).max() <= 1


def test_pictures_in_memory_train_and_sample(tmp_path, capsys):
    """As the README's "how to fork" has it: no file of ours is touched."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = InMemory(images, torch.arange(20) % 2, ["even", "odd"])
    argv = train_args(tmp_path, "--steps", "2")
    argv[argv.index("--dataset") + 1] = "own"
    train.run_on(train.parse_args(argv), dataset)
    assert "own: 20 pictures of 2 classes: even 10, odd 10" in capsys.readouterr().out
    with pytest.raises(UserError, match="pictures of 32 x 32 are not the 64 x 64"):
        train.run_on(train.parse_args([*argv, "--image-size", "64"]), dataset)
    train.run_on(train.parse_args([*argv, "--steps", "3"]), dataset)
    assert "resuming" in capsys.readouterr().out and load(tmp_path)["step"] == 3
    with pytest.raises(UserError, match="its pictures have changed"):
        train.run_on(train.parse_args([*argv, "--steps", "4"]), InMemory(images, (torch.arange(20) + 1) % 2, ["even", "odd"]))
    sample.main(["--ckpt", str(tmp_path / "out" / "run" / "ckpt.pt"), "--device", "cpu", "--classes", "odd"])
    assert "1 classes in turn: odd" in capsys.readouterr().out


def test_a_logger_is_one_line(photos, tmp_path, monkeypatch):
    """A function of a step and a dict, whatever the losses are called."""
    assert "my_loss 1.25 |" in train.log_line(4, {"step": 4, "epoch": 0.1, "my_loss": 1.25, "grad_norm": 1.0, "lr": 1.0,
                                                  "images_per_s": 3.0, "waiting": 0.0, "memory_gb": 1.0})
    seen = []
    monkeypatch.setattr(train, "append_line", lambda path, step, line: seen.append((path.name, step, line)))
    train.main(train_args(tmp_path, "--steps", "4"))
    assert [(name, step) for name, step, _ in seen] == [("log.jsonl", 2), ("log.jsonl", 4)]
    assert {"step", "loss", "reconstruction", "consistency", "lr"} <= seen[0][2].keys()


FORK = """
import torch, torch.nn as nn
import fid, rae, train
from utils.images import to_float

def build(channels, image_size, patch_size):
    return {"encoder": nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Tanh(), nn.Conv2d(16, channels, 2, 2)),
            "decoder": nn.Sequential(nn.Conv2d(channels, 48, 3, padding=1), nn.PixelShuffle(4), nn.Upsample(scale_factor=2)),
            "latent_mean": torch.zeros(channels, 1, 1), "latent_var": torch.ones(channels, 1, 1),
            "image_size": image_size, "patch_size": 8, "name": "conv"}

def fit(images, image_size, seed, **of_the_run):
    torch.manual_seed(seed)
    parts, x = build(8, image_size, 8), to_float(images)
    optimizer = torch.optim.Adam([*parts["encoder"].parameters(), *parts["decoder"].parameters()], 1e-2)
    for _ in range(20):
        loss = (parts["decoder"](parts["encoder"](x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parts

rae.AUTOENCODERS["conv"] = rae.Autoencoder(build, fit, settings={"model": "SiT-T/1", "dtype": "float32"}, features="means")
fid.NETWORKS["means"] = lambda images, labels, device: {"means": lambda x: x.double().mean((2, 3))}
if __name__ == "__main__":
    train.main()
"""


def test_ones_own_autoencoder_is_a_file_of_its_own(photos, tmp_path, monkeypatch, capsys):
    """Registered, trained, sampled, resumed, reported, with no edit of ours."""
    (tmp_path / "fork.py").write_text(FORK)
    monkeypatch.setitem(rae.AUTOENCODERS, "conv", None)       # both are put back afterwards
    monkeypatch.setitem(fid.NETWORKS, "means", None)
    argv = ["--dataset", str(photos), "--rae", "conv", "--image-size", "32", "--batch-size", "8", "--device", "cpu",
            "--data-dir", str(tmp_path / "datasets"), "--report", "12"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fork.py", *argv, "--steps", "20"])
    runpy.run_path("fork.py", run_name="__main__")            # as python fork.py --dataset ...
    out, said = tmp_path / "out" / "photos-SiT-T-1-conv", capsys.readouterr().out
    assert "latents 8 x 4 x 4, L = 128" in said
    if (ROOT / "laptop").exists():
        assert "| 4 steps " in said and "frechet_means" in said and (out / "quality.json").exists()
    train.main([*argv, "--steps", "21", "--report", "0"])
    assert "resuming" in capsys.readouterr().out
    sample.main(["--num", "6", "--out", "s.npz", "--device", "cpu"])
    assert np.load("s.npz")["arr_0"].shape == (6, 32, 32, 3)
    monkeypatch.delitem(rae.AUTOENCODERS, "conv")
    fails(capsys, 1, "is nothing that anybody could have given", ["--dataset", str(photos), "--out-dir", str(out)])
