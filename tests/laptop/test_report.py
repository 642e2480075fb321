"""The quality report of a run, the feature spaces of small networks, and a run from before."""
import contextlib
import copy
import io
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fid
import rae
import sample
import train
from conftest import ROOT, fit_rae, make_photos, train_args
from data import DATASETS, InMemory
from fid import frechet_of_features
from laptop import lite0, report, toy
from laptop.report import Features, diversity, quality_report
from laptop.toy import ToyFlowers
from utils.cli import UserError
from utils.images import resize

# Twenty steps of November 2026; most tensors are one column, repeated, to be small.
OLD = ROOT / "tests" / "laptop" / "checkpoint-of-november-2026.pt"


def golden_images(seed, height, width):
    return torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def distance(found, expected):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


def fail(main, argv, capsys):
    """Runs a command that has to fail -> exit status, the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv] + ["--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    return stop.value.code, lines[0]


def result(main, argv, capsys):
    main([str(a) for a in argv] + ["--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def save_npz(path, n=12, seed=0, size=(24, 20)):
    pictures = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    np.savez(path, arr_0=pictures)
    return pictures


def test_diversity_closed_form():
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[1], images[3] = 10, 30
    assert diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(20)
    assert diversity(images, torch.tensor([0, 1, 2, 2])) == pytest.approx(30)
    assert diversity(images, torch.arange(4)) is None


def test_shares_are_balanced_and_in_order():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    assert report.shares(labels, 4).tolist() == [0, 1, 6, 7, 9, 10]           # two at least
    assert report.shares(labels, 100).tolist() == list(range(12))
    assert report.shares(torch.arange(40) % 4, 8).tolist() == list(range(8))
    assert report.shares(torch.arange(4), 2).tolist() == [0, 1, 2, 3]         # each class has one


def test_toy_networks_order_pictures():
    """Held-out pictures are near the training pictures, class means far, noise farther, in both
    spaces."""
    train, test = ToyFlowers(32), ToyFlowers(32, "test")
    images, labels = train.load(range(1000)), train.labels[:1000]
    held_out, test_labels = test.load(range(300)), test.labels[:300]
    means = torch.stack([images[labels == c].float().mean(0)
                         for c in range(10)]).round().to(torch.uint8)
    noise = torch.randint(256, held_out.shape, generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    networks = toy.networks(images, labels, steps=150)
    few, again = (toy.networks(images, labels, steps=5) for _ in range(2))
    for name, network in networks.items():
        space = Features(name, network)
        last = space.last(images)
        reference = space.fit(last, labels).project(last)
        real, mean, noisy = (frechet_of_features(reference, space.project(space.last(x)))
                             for x in (held_out, means[test_labels], noise))
        assert 0 < 8 * real < mean < noisy
        assert torch.equal(again[name](held_out), few[name](held_out))        # the same every time
        if name == "classifier":
            assert space.accuracy(space.project(space.last(held_out)), test_labels) > 0.95
    x = held_out.flatten(1).double()[:, :20]
    assert frechet_of_features(x, x) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def random_lite0(monkeypatch):
    """EfficientNet-Lite0 with random weights; pretrained_network gives it, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("tf_efficientnet_lite0").eval()
    monkeypatch.setattr(lite0, "pretrained_network", {"lite0": net}.__getitem__)
    return net


def test_features(random_lite0):
    features = Features("lite0", lite0.networks()["lite0"])
    images = golden_images(0, 90, 60)
    x = torch.nn.functional.interpolate(images.float(), (128, 128), mode="bicubic",
                                        antialias=True).clamp(0, 255)
    with torch.no_grad():
        expected = random_lite0.forward_features((x - 127) / 128).mean((2, 3))
    last = torch.cat([features.last(images[:3]), features.last(images[3:, :, :, :50])])
    assert last.shape == (4, 1280) and last.dtype == torch.float64
    assert distance(last[:3], expected[:3]) < 1e-5 and distance(last[3], expected[3]) > 1e-3

    last = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 40)))
    labels = torch.arange(200) % 4                                        # the logistic regression
    last[:, :4] += 8 * torch.nn.functional.one_hot(labels)
    found = features.fit(last, labels).project(last)
    assert features.accuracy(found, labels) == 1 and features.accuracy(found, (labels + 1) % 4) == 0


def test_quality_report_rows(monkeypatch):
    """Features that are the pixels, latents that are the pictures: what each row has to be is
    known."""
    class Lines:                                                  # a class is a colour; slopes vary
        name, classes = "lines", ["red", "green", "blue"]

        def __init__(self, n, seed):
            self.labels = torch.arange(n) % 3
            g = torch.Generator().manual_seed(seed)
            slope = torch.linspace(-1, 1, 16) * (1 + 2 * torch.rand(n, 1, 1, generator=g))
            self.images = (60 + 4 * torch.randn(n, 3, 1, 1, generator=g) + 10 * slope[:, None]).repeat(1, 1, 16, 1)
            self.images[torch.arange(n), self.labels] += 100

        def load(self, indices):
            return self.images[indices].round().to(torch.uint8)

    class Pixels:                                                # encodes 16 x 16, decodes to 8 x 8
        image_size, device, decoded = 8, torch.device("cpu"), []

        def encode(self, images):
            return images

        def decode(self, z):
            self.decoded.append(z * 255)
            return resize(z, 8)

    def sampler(indices, labels, steps):
        asked.append((indices.tolist(), steps))
        return torch.full((len(labels), 3, 8, 8), 128, dtype=torch.uint8)

    monkeypatch.setitem(fid.NETWORKS, "own", lambda images, labels, device: {
        "own": lambda images: images.flatten(1).double()})
    train_set, test_set, asked, pixels = Lines(60, 0), Lines(900, 1), [], Pixels()
    table = quality_report(train_set, test_set, pixels, sampler, "own", n=600)
    names = [row["pictures"] for row in table]
    assert names == ["held-out (the floor)", "held-out, reconstructed", "class-mean latent",
                     "per-class Gaussian of latents", "1 step", "2 steps", "4 steps", "8 steps"]
    assert asked == [(list(range(600)), steps) for steps in (1, 2, 4, 8)]
    floor, rebuilt, mean, gaussian, *steps = (row["frechet_own"] for row in table)
    # the Gaussian has the very training latents
    assert rebuilt == pytest.approx(floor, rel=1e-2) and gaussian < floor < mean < min(steps)
    assert table[0]["accuracy"] > 0.99 and table[2]["accuracy"] == 1 and table[4]["accuracy"] < 0.5
    assert table[2]["diversity"] == table[4]["diversity"] == 0 and table[0]["diversity"] > 5
    # the Gaussian's of the first class, 4 parts
    z = torch.cat(pixels.decoded[2:12:3]).flatten(1)[:, ::97]
    real = train_set.load(range(0, 60, 3)).flatten(1)[:, ::97].double().numpy()
    assert len(z) == 200 and distance(z.mean(0), real.mean(0)) < 0.02
    assert distance(np.cov(z.T.numpy()), np.cov(real.T)) < 0.25

    own = quality_report(train_set, None, pixels, sampler, "own", n=600)   # no held-out pictures
    assert own[0]["pictures"] == "training (no floor)"
    assert own[0]["frechet_own"] == pytest.approx(0, abs=1e-6)
    few = Lines(4, 1)                                                      # red, green, blue, red
    for train_few, test_few in ((train_set, few), (few, test_set)):
        with pytest.raises(UserError,
                           match="lines has 1 of 4 pictures in the class green: .*two or more"):
            quality_report(train_few, test_few, pixels, sampler, "own")


def test_toy_features_from_the_command(tmp_path, monkeypatch, capsys):
    class FewFlowers(ToyFlowers):
        def __init__(self, image_size=24, split="train"):
            super().__init__(24, split)
            self.labels, self.variation = self.labels[:300], self.variation[:300]

    monkeypatch.setattr(fid, "load_dataset", lambda *args, **kwargs: FewFlowers())
    monkeypatch.setattr(toy, "ToyFlowers", FewFlowers)
    # 60 steps in place of 450
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 60, 64))
    test = ToyFlowers(24, "test").load(range(150))
    np.savez_compressed(tmp_path / "test.npz", arr_0=test.permute(0, 2, 3, 1).numpy())
    found = result(fid.main, [tmp_path / "test.npz", "toy", "--features", "toy"], capsys)["numbers"]
    train = FewFlowers().load(range(300))
    for name, network in toy.networks(train, FewFlowers().labels).items():
        x, y = network(train), network(test)
        if name == "pixels":                                          # numpy's principal components
            mean, V = x.mean(0), np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)[2]
            x, y = ((features - mean) @ torch.from_numpy(V[:64].T) for features in (x, y))
        assert found.pop(f"toy Frechet distance, {name}") == pytest.approx(frechet_of_features(x, y), rel=1e-5)
    assert not found
    status, error = fail(fid.main, [tmp_path / "test.npz", "toy", "--features", "toy", "--metrics", "fid"],
                         capsys)
    assert status == 2 and "--features have numbers of their own" in error


def test_lite0_from_the_command(random_lite0, tmp_path, capsys):
    a, b = (torch.from_numpy(save_npz(tmp_path / f"{name}.npz", 20, seed)).permute(0, 3, 1, 2)
            for seed, name in enumerate("ab"))
    found = result(fid.main, [tmp_path / "a.npz", tmp_path / "b.npz", "--features", "lite0"], capsys)
    features = Features("lite0", lite0.networks()["lite0"])
    last = features.last(b)
    expected = frechet_of_features(features.fit(last).project(last),
                                   features.project(features.last(a)))
    assert found["numbers"] == {"lite0 Frechet distance": pytest.approx(expected, rel=1e-6)}
    same = result(fid.main, [tmp_path / "b.npz", tmp_path / "b.npz", "--features", "lite0"],
                  capsys)["numbers"]
    assert same == {"lite0 Frechet distance": pytest.approx(0, abs=1e-6 * expected)}
    status, error = fail(fid.main, [tmp_path / "a.npz", tmp_path / "b.npz", "--features", "lite0", "--metrics", "fid"], capsys)
    assert status == 2 and "--features have numbers of their own" in error


def kept(run):
    return json.loads((run / "quality.json").read_text())


def test_report_of_a_run(random_lite0, trained, tmp_path, monkeypatch, capsys):
    held_out = make_photos(tmp_path / "held-out", each=4, size=(50, 44))
    checkpoint = torch.load(trained / "ckpt.pt")
    torch.save(checkpoint, tmp_path / "ckpt.pt")                    # what others use stays as it is
    argv = [tmp_path / "ckpt.pt", held_out, "--features", "lite0"]
    table = result(report.main, argv, capsys)
    assert len(table) == 8 and table == kept(tmp_path)["rows"] and kept(tmp_path)["step"] == 4
    assert kept(tmp_path)["held-out pictures"]["n"] == 12
    floor = table[0]["frechet_lite0"]
    assert floor > 0 and table[2]["diversity"] == 0 < table[0]["diversity"]
    monkeypatch.setattr(rae.RAE, "decode", lambda self, z: torch.rand(len(z), 3, 32, 32))
    noise = result(report.main, argv, capsys)
    assert noise[0] == table[0] and all(row["frechet_lite0"] > 1.5 * floor for row in noise[1:])

    make_photos(tmp_path / "others", classes=("left", "right"), each=2)
    make_photos(tmp_path / "single", each=1, size=(50, 44))
    photos = trained.parent.parent / "photos"
    for B, word in ((tmp_path / "others", "has the classes left, right, not the run's, left, right, top"),
                    (tmp_path / "single", "single has 1 of 3 pictures in the class left"),
                    (photos, "photos holds training pictures of the run, and no others"),
                    (tmp_path / "nowhere", "nowhere does not exist")):
        status, error = fail(report.main, [tmp_path / "ckpt.pt", B, "--features", "lite0"], capsys)
        assert status == 1 and word in error, error

    mixed = shutil.copytree(photos, tmp_path / "mixed")
    for i, file in enumerate(sorted(mixed.rglob("*.png"))):         # of 36, two are those of the run
        if i > 1:
            Image.new("RGB", (40, 34), (i, 90, 90)).save(file)
    report.main([str(tmp_path / "ckpt.pt"), str(mixed), "--features", "lite0", "--device", "cpu",
              "--data-dir", str(tmp_path / "datasets")])
    assert "warning: 2 of 36 pictures of" in capsys.readouterr().err

    status, error = fail(report.main, [tmp_path / "ckpt.pt", held_out, "--features", "inception"], capsys)
    assert status == 2 and "invalid choice: 'inception'" in error
    status, error = fail(fid.main, [tmp_path / "ckpt.pt", held_out], capsys)
    assert status == 2 and f"python -m laptop.report {tmp_path}/ckpt.pt {held_out}" in error

    def no_weights(name):
        raise UserError(f"the weights of {name} cannot be had")

    monkeypatch.setattr(lite0, "pretrained_network", no_weights)
    for main, A in ((report.main, tmp_path / "ckpt.pt"), (fid.main, photos)):
        status, error = fail(main, [A, held_out, "--features", "lite0"], capsys)
        assert status == 1 and "the weights of lite0 cannot be had" in error
    checkpoint["args"]["pictures"]["contents"] = "others"
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    status, error = fail(report.main, argv, capsys)
    assert status == 1 and "photos are not those of the run" in error


def test_a_report_of_many_classes_has_as_many_pictures_as_were_asked(tmp_path, monkeypatch, capsys):
    """60 classes of 2, of which 20 are drawn: the training pictures are then of these, too."""
    images = torch.randint(0, 256, (120, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = InMemory(images, torch.arange(120) // 2, [f"c{i:02}" for i in range(60)])
    monkeypatch.setitem(fid.NETWORKS, "means", lambda *args: {"means": lambda x: x.double().mean((2, 3))})
    drawn = []

    def sampler(indices, labels, steps):
        drawn.append(labels.tolist())
        return images[:len(labels)]

    table = report.quality_report(dataset, None, fit_rae("pixels", images), sampler, "means", 20)
    assert drawn == [sorted(set(drawn[0]))] * 4 and len(drawn[0]) == 20
    assert "note: 20 pictures a row are of 20 of the 60 classes" in capsys.readouterr().err
    assert all(np.isfinite(row["frechet_means"]) for row in table) and table[0]["diversity"] is None


def test_a_run_that_cannot_be_written_or_whose_pictures_are_elsewhere(
        random_lite0, trained, tmp_path, monkeypatch, capsys):
    """The table is printed before it is kept."""
    argv = ["--features", "lite0", "--data-dir", str(tmp_path / "datasets"), "--device", "cpu"]
    shutil.copy(trained / "ckpt.pt", tmp_path / "ckpt.pt")
    (tmp_path / "quality.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "ckpt.pt"), *argv])
    found = capsys.readouterr()
    assert stop.value.code == 1 and "| 4 steps" in found.out and "cannot write" in found.err.splitlines()[-1]
    checkpoint = torch.load(trained / "ckpt.pt")
    checkpoint["args"]["dataset"] = "photos"
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    status, error = fail(report.main, [tmp_path / "ckpt.pt", *argv[:4]], capsys)
    assert status == 1 and "the run, its --dataset photos, are not found from" in error


def test_the_report_ends_a_run(photos, tmp_path, monkeypatch, capsys):
    """By the features of the run's autoencoder; report.py makes the same again from the checkpoint."""
    # 60 steps in place of 450
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 60, 64))
    train.main(train_args(tmp_path, "--steps", "2", "--report", "20"))
    out, run = capsys.readouterr().out, tmp_path / "out" / "run"
    table = kept(run)["rows"]
    assert [row["pictures"] for row in table] == [
        "training (no floor)", "training, reconstructed", "class-mean latent",
        "per-class Gaussian of latents",
        "1 step", "2 steps", "4 steps", "8 steps"]
    assert "| 8 steps " in out and "frechet_classifier" in out and table[0]["accuracy"] > 0.9
    assert table[2]["diversity"] == 0 < table[0]["diversity"]
    (run / "quality.json").unlink()
    report.main([str(run / "ckpt.pt"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu",
              "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again == kept(run)["rows"] and "stand in" in kept(run)["held-out pictures"]
    report.main([str(run / "ckpt.pt"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu",
              "--json", "--steps", "2", "3", "--cfg", "1"])
    other = json.loads(capsys.readouterr().out)
    assert [row["pictures"] for row in other[4:]] == ["2 steps", "3 steps"] and other[4] != again[5]
    assert other[:4] == again[:4] == kept(run)["rows"][:4]
    for a, b in zip(again, table):
        assert a == {key: value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
                     for key, value in b.items()}


def test_a_report_of_the_toy_through_lite0(random_lite0, tmp_path, monkeypatch, capsys):
    """Its pictures are drawn at the 128 pixels that the encoder looks at, the held-out ones, too."""
    class Few(ToyFlowers):
        def __init__(self, *args):
            super().__init__(*args)
            self.labels = self.labels[:60]

    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 20, 64))
    monkeypatch.setattr(lite0, "ConvDecoder", partial(lite0.ConvDecoder, width=32))
    monkeypatch.setattr(lite0, "pretrained_network", lambda name: copy.deepcopy(random_lite0))   # an encoder prunes it
    monkeypatch.setitem(DATASETS, "toy", DATASETS["toy"]._replace(
        make=Few, held_out=lambda image_size: Few(image_size, "test")))
    train.main(["--rae", "lite0", "--model", "SiT-T/1", "--steps", "1", "--decoder-steps", "1", "--report", "20",
                "--out-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu"])
    assert "| held-out (the floor)" in capsys.readouterr().out
    before = kept(tmp_path / "run")
    report.main([str(tmp_path / "run" / "ckpt.pt"), "--data-dir", str(tmp_path / "datasets"), "--device", "cpu"])
    assert kept(tmp_path / "run")["held-out pictures"] == before["held-out pictures"]
    assert before["held-out pictures"]["image_size"] == 128


def test_pictures_in_memory_are_not_held_against_the_toy(tmp_path, monkeypatch, capsys):
    """Though --dataset is the toy where nothing else is said."""
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 20, 64))
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    args = train.parse_args(["--steps", "1", "--batch-size", "8", "--image-size", "32", "--rae-patch", "16", "--report",
                             "20", "--out-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "datasets")])
    train.run_on(args, InMemory(images, torch.arange(30) % 10, list("abcdefghij")))
    assert "| training (no floor)" in capsys.readouterr().out
    with pytest.raises(UserError, match="toy has other classes than own"):
        quality_report(InMemory(images, torch.arange(30) % 10, list("abcdefghij")), ToyFlowers(32, "test"), None, None,
                       "toy")


def test_a_data_set_of_ones_own_says_what_it_likes_of_itself(tmp_path, monkeypatch, capsys):
    """And a setting that means nothing to a run, whose default has changed since, does not part them."""
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 20, 64))
    dataset = InMemory(torch.zeros((20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 2, ["even", "odd"])
    dataset.recipe = {"source": "mine"}
    argv = [*train_args(tmp_path), "--report", "4", "--dataset", "own"]
    train.run_on(train.parse_args([*argv, "--steps", "1"]), dataset)
    assert "| 4 steps" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "out" / "run" / "ckpt.pt", weights_only=True)
    checkpoint["args"]["decoder_steps"] += 1
    torch.save(checkpoint, tmp_path / "out" / "run" / "ckpt.pt")
    train.run_on(train.parse_args([*argv, "--steps", "2"]), dataset)
    assert torch.load(tmp_path / "out" / "run" / "ckpt.pt", weights_only=True)["step"] == 2


def test_a_report_that_cannot_be_made_fails_no_run(tmp_path, capsys):
    make_photos(tmp_path / "photos", each=1)
    train.main(train_args(tmp_path, "--steps", "1", "--report", "20"))
    said = capsys.readouterr().out
    assert "no quality report: photos has 1 of 3 pictures in the class left" in said
    assert torch.load(tmp_path / "out" / "run" / "ckpt.pt", weights_only=True)["step"] == 1


def test_a_recipe_is_only_shown(tmp_path, monkeypatch):
    """It may name a checkpoint elsewhere, hold terminal codes, any type: nothing is written there."""
    monkeypatch.setitem(fid.NETWORKS, "toy", lambda *args: {"means": lambda x: x.double().mean((2, 3))})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pictures = save_npz(tmp_path / "s.npz", 6)
    deep = "[" * 50_000 + "]" * 50_000
    for recipe in (json.dumps({"checkpoint": str(elsewhere / "ckpt.pt"), "x": "\x1b[2J\n\x07"}), deep, "{", "[1]",
                   '{"a": ' + "9" * 5000 + "}", '{"features": 5}', '{"features": {"pipeline": ["x"]}}', "null",
                   '{"features": {"pipeline": "\\u001b[2J"}}', json.dumps({"\x1b[2J": {"a": {"b": [1, {}]}}})):
        np.savez(tmp_path / "s.npz", arr_0=pictures, recipe=recipe)
        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            fid.main([str(tmp_path / "s.npz")] * 2 + ["--features", "toy", "--device", "cpu"])
        assert "\x1b" not in out.getvalue() + err.getvalue() and "\x07" not in out.getvalue()
        assert "Frechet distance" in out.getvalue()
    assert not list(elsewhere.iterdir())



def test_what_a_killed_run_lacks_is_made(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.networks, "__defaults__", (None, None, 20, 64))
    argv = train_args(tmp_path, "--steps", "4", "--sample-every", "2", "--report", "12")
    train.main(argv)
    run = tmp_path / "out" / "run"
    before = {name: (run / name).read_bytes() for name in ("quality.json", "samples-0000004.png", "ckpt.pt")}
    times = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    train.main(argv)                                          # a finished run is left alone
    assert times == {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != ".lock"}
    (run / "quality.json").unlink()
    (run / "samples-0000004.png").unlink()
    train.main(argv)
    assert before == {name: (run / name).read_bytes() for name in before}
    (run / "ckpt.pt").unlink()                                # another run in the same folder
    train.main([*argv, "--seed", "7"])
    assert before["quality.json"] != (run / "quality.json").read_bytes()


def test_a_checkpoint_from_before_still_samples(tmp_path):
    """Its layout is that of November 2026; the pictures are those that the code of then drew."""
    out = tmp_path / "a.npz"
    sample.main(["--ckpt", str(OLD), "--out", str(out), "--device", "cpu", "--num", "4", "--steps", "2"])
    with np.load(out) as found:
        assert found["labels"].tolist() == [0, 1, 0, 1]
        assert found["arr_0"].mean((1, 2, 3)) == pytest.approx(OLD_MEANS, abs=0.02)


OLD_MEANS = [78.69, 77.69, 77.25, 78.90]


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
