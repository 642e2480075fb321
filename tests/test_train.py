import json
import math

import pytest
import torch

import fid
import sphere
import train
from baselines import METHODS
from conftest import equal, make_photos, relative_l2, train_args, two_processes
from laptop import toy


def load(folder):
    return torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)


def log_of(folder):
    lines = (folder / "out" / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_one_process_two_processes_and_accumulation_agree(photos, tmp_path):
    runs = {}
    for name in ("one", "two", "accumulated"):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        (runs[name] / "photos").symlink_to(photos)
    more = ("--steps", "20", "--latent-consistency", "0.5", "--log-every", "20", "--p-mean", "-0.4",
            "--p-std", "0.9")
    assert two_processes("train", train_args(runs["two"], *more), tmp_path)[0] == [0, 0]
    train.main(train_args(runs["one"], *more))
    train.main(train_args(runs["accumulated"], *more, "--accumulate", "2"))
    one = load(runs["one"])
    for name in ("two", "accumulated"):
        other = load(runs[name])
        assert relative_l2(other["model"], one["model"]) < 1e-5
        assert relative_l2(other["ema"]["0.995"], one["ema"]["0.995"]) < 1e-5
        log, log_one = (json.loads((runs[n] / "out" / "run" / "log.jsonl").read_text())
                        for n in (name, "one"))
        for key in ("loss", "reconstruction", "consistency", "latent_consistency", "grad_norm"):
            assert log[key] == pytest.approx(log_one[key], rel=1e-3), key
        for a, b in zip(log["loss_by_angle"], log_one["loss_by_angle"]):
            assert a == (b and pytest.approx(b, rel=1e-3))
    torch.manual_seed(0)
    fresh = train.SiT_models["SiT-T/1"](input_size=2, in_channels=96, num_classes=3)
    assert relative_l2(one["model"], fresh.state_dict()) > 1e-2            # they did go somewhere


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
    assert checkpoint.keys() == {"model", "ema", "optimizer", "step", "args", "classes", "rae"}
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
    train.main(train_args(tmp_path, "--steps", "80", "--dtype", "bfloat16", "--noise-dist",
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


@pytest.mark.parametrize("more,scale", [
    (["--dataset", "toy"], 5 / math.tan(math.radians(75))),
    (["--dataset", "photos"], 5 / math.tan(math.radians(75))),
    (["--dataset", "photos", "--rae", "lite0"], 1), (["--dataset", "flowers"], 1)])
def test_sampling_follows_the_angle(more, scale):
    """Unless --sigma says otherwise; a preset may scale it."""
    for angle in (60, 75, 85):
        args = train.parse_args([*more, "--alpha-max", str(angle)])
        assert args.sigma == pytest.approx(scale * math.tan(math.radians(angle)))
    assert train.parse_args([*more, "--alpha-max", "60", "--sigma", "7"]).sigma == 7


def test_the_report_ends_a_run(photos, tmp_path, monkeypatch, capsys):
    """By the features of the run's autoencoder; fid.py makes the same again from the checkpoint."""
    # 60 steps in place of 450
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 60, 64))
    train.main(train_args(tmp_path, "--steps", "2", "--report", "20"))
    out, run = capsys.readouterr().out, tmp_path / "out" / "run"
    table = json.loads((run / "quality.json").read_text())
    assert [row["pictures"] for row in table] == [
        "training (the floor)", "training, reconstructed", "class-mean latent",
        "per-class Gaussian of latents",
        "1 step", "2 steps", "4 steps", "8 steps"]
    assert "| 8 steps " in out and "frechet_classifier" in out and table[0]["accuracy"] > 0.9
    assert table[2]["diversity"] == 0 < table[0]["diversity"]
    (run / "quality.json").unlink()
    fid.main([str(run / "ckpt.pt"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu",
              "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again == json.loads((run / "quality.json").read_text())
    fid.main([str(run / "ckpt.pt"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu",
              "--json", "--steps", "2", "3", "--cfg", "1"])
    other = json.loads(capsys.readouterr().out)
    assert [row["pictures"] for row in other[4:]] == ["2 steps", "3 steps"] and other[4] != again[5]
    assert other[:4] == again[:4] == json.loads((run / "quality.json").read_text())[:4]
    for a, b in zip(again, table):
        assert a == {key: value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
                     for key, value in b.items()}


def test_a_report_that_cannot_be_made_fails_no_run(tmp_path, capsys):
    make_photos(tmp_path / "photos", each=1)
    train.main(train_args(tmp_path, "--steps", "1", "--report", "20"))
    said = capsys.readouterr().out
    assert "no quality report: photos has 1 of 3 pictures in the class left" in said
    assert load(tmp_path)["step"] == 1


@pytest.mark.parametrize("message,argv", [
    ("--steps: must be 1 or more", ["--steps", "0"]),
    ("--cfg: must be 0 or more", ["--cfg", "-1"]),
    ("--model: invalid choice: 'SiT-Q/1'", ["--model", "SiT-Q/1"]),
    ("unrecognized arguments: --modle", ["--modle", "SiT-B/1"]),
    ("no data set is called 'flowres'", ["--dataset", "flowres"]),
    ("--batch-size 7 does not divide into", ["--batch-size", "7", "--accumulate", "2"]),
    ("--image-size 50 is not a multiple of", ["--image-size", "50"]),
    ("--alpha-mix 70 is below --alpha-max 75", ["--alpha-mix", "70"]),
    ("--p-mean means nothing to --noise-dist uniform", ["--noise-dist", "uniform", "--p-mean", "1"]),
    ("--alpha-mix means nothing to --mix-prob 0", ["--mix-prob", "0", "--alpha-mix", "80"]),
    ("--lr: must be 0 or more, not nan", ["--lr", "nan"]),
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
    fails(capsys, 1, "file: File exists", train_args(tmp_path, "--out-dir", str(tmp_path / "file")))

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train, "log_line", full)                      # as the log's own write would
    fails(capsys, 1, "the disk or the output: No space left on device", train_args(tmp_path, "--steps", "2"))


@pytest.mark.skipif(not torch.cuda.is_available(),
                    reason="needs a GPU: training and resuming on one")
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
    """What a run's second step hands to sphere.training_losses; its losses by name, with the loss."""
    seen, method = [], METHODS["sphere"]

    def spy(denoiser, *batch, **more):
        seen.append((batch, more))
        return method.training_losses(denoiser, *batch, **more)
    monkeypatch.setitem(METHODS, "sphere", method._replace(training_losses=spy))
    learner = train.Learner(vars(train.parse_args(["--batch-size", "8", *flags])), (8, 2, 2), 3, torch.device("cpu"))
    sums = learner.add_gradients(1, iter([learner.micro_batch(FewLatents(), 1, 0)]), to_log=True)
    monkeypatch.setitem(METHODS, "sphere", method)
    return *seen[0], {name: value.item() for name, value in sums.items() if name != "loss_by_angle"}


def test_a_flag_changes_what_it_says_and_nothing_else(monkeypatch):
    def asked(*flags):
        return asked_of_the_losses(monkeypatch, *flags)
    base, more, found = asked()
    assert more == {"reconstruct": "low", "f": sphere.spherify}
    rec, con = found["reconstruction"], found["consistency"]
    assert found["loss"] == pytest.approx(rec + con) and con > 0.1
    z, y, hi, lo, eps = base

    weighted = asked("--consistency", "0.3")
    assert equal(weighted[0], base) and weighted[1] == more
    assert weighted[2] == {**found, "loss": pytest.approx(rec + 0.3 * con)}
    alone = asked("--consistency", "0", "--reconstruct", "both")
    assert equal(alone[0], base) and alone[1] == {**more, "reconstruct": "both"}
    assert alone[2]["loss"] == pytest.approx(alone[2]["reconstruction"])
    again = asked("--latent-consistency", "0.5")
    assert equal(again[0], base) and again[1].keys() == {*more, "eps_again"}
    assert again[2]["loss"] == pytest.approx(rec + con + 0.5 * again[2]["latent_consistency"])
    flat = asked("--no-spherify")
    assert equal(flat[0], base) and flat[1] == {**more, "f": sphere.full_precision}
    two = asked("--pair-noise", "two")
    assert equal(two[0], base) and two[1].keys() == {*more, "eps_lo"}
    assert not torch.equal(two[1]["eps_lo"], eps) and abs(two[1]["eps_lo"].std() - 1) < 0.2
    for flags in (["--noise-dist", "uniform"], ["--p-mean", "1"], ["--p-std", "2"], ["--alpha-max", "60"],
                  ["--alpha-mix", "89.5", "--mix-prob", "1"], ["--mix-prob", "1"]):
        other = asked(*flags)
        same_flips = "--noise-dist" not in flags              # which draws as many numbers of another kind
        assert torch.equal(other[0][0], z) or not same_flips
        assert torch.equal(other[0][1], y) and torch.equal(other[0][4], eps) and other[1] == more
        assert not torch.equal(other[0][2], hi)
        assert torch.equal(other[0][3], lo) == ("--mix-prob" in flags)      # it moves the high level alone


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
    for flags, message in ((["--model", "SiT-S/1"], "has model SiT-T/1, not SiT-S/1"),
                           (["--rae-patch", "8"], "has rae_patch 16, not 8"),
                           (["--method", "flow"], "has method sphere, not flow"),
                           (["--init-from", "nowhere.pt"], "no checkpoint at nowhere.pt")):
        fails(capsys, 1 if "nowhere" in message else 2, message,
              [*train_args(folder, "--ema-decay", "0.995", "0.1", "--init-from", str(trained / "ckpt.pt"), *flags),
               "--out-dir", str(tmp_path / "no")])
