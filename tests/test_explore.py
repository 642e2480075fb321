"""explore.py: each picture shows something that is true."""
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import explore
import sample
import sphere
import train
from conftest import make_photos, train_args
from data import centre_crop
from utils.images import to_float, to_tensor, to_uint8


def looked(command, *argv):
    """-> arguments of a command's function, as main would have them."""
    seen = []
    original = getattr(explore, command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explore, command, lambda *args: (seen.append(args), original(*args))[1])
        explore.main([command, *map(str, argv)])
    return seen[0], original(*seen[0])


def test_vary_turns_by_its_angle_and_90_is_a_new_picture(trained, tmp_path):
    photo = trained.parent.parent / "photos" / "left" / "0.png"
    argv = [photo, "--ckpt", trained / "ckpt.pt", "--out", tmp_path / "v.png", "--steps"]
    angles = ["--angle", "0", "40", "90"]
    (_, run, rae, denoiser, labels, names), (images, captions, columns) = looked("vary", *argv, "1", *angles)
    assert columns == 4 and captions[:5] == ["0 deg", "left", "right", "top", "40 deg"]
    z = rae.encode(to_float(to_tensor(centre_crop(Image.open(photo), 32))[None]))
    v = sphere.spherify(z)
    for i, angle_deg in enumerate((0, 40, 90)):
        turned = sphere.spherify(rae.encode(images[4 * i:4 * i + 1]))     # pixels lose nothing
        cosine = (turned * v).mean().item()
        assert math.degrees(math.acos(min(1, cosine))) == pytest.approx(angle_deg, abs=2)
    # In one step from 0 degrees: what the denoiser makes of the picture itself.
    expected = sphere.guided(denoiser, v.expand(3, -1, -1, -1), torch.arange(3), run["cfg"], 3)
    assert torch.allclose(images[1:4], rae.decode(expected), atol=1e-5)
    with Image.open(tmp_path / "v.png") as grid:
        assert grid.size == (4 * 64, 3 * (64 + 16))

    # From 90 degrees there is nothing of the picture: sample.py's picture 0 of seed 0.
    _, (images, _, _) = looked("vary", *argv, "2", "--angle", "90")
    sample.main(["--ckpt", str(trained / "ckpt.pt"), "--num", "1", "--steps", "2", "--device", "cpu",
                 "--out", str(tmp_path / "s.npz")])
    plain = np.load(tmp_path / "s.npz")["arr_0"][0].astype(int)
    assert abs(to_uint8(images[1]).permute(1, 2, 0).numpy() - plain).max() <= 1


@pytest.mark.parametrize("fresh", [False, True])
def test_the_ends_of_between_are_plain_samples(fresh, trained, tmp_path):
    """To the bit, also where each step has noise of its own."""
    ckpt = trained / "ckpt.pt"
    if fresh:
        checkpoint = torch.load(ckpt)
        checkpoint["args"]["sampling_noise"] = "fresh"
        torch.save(checkpoint, ckpt := tmp_path / "ckpt.pt")
    _, (images, captions, frames) = looked("between", 3, 5, "--classes", "right", "top", "--ckpt", ckpt,
                                           "--steps", 3, "--out", tmp_path / "b.png")
    assert len(images) == frames == len(captions) == 10
    for seed, name, image in ((3, "right", images[0]), (5, "top", images[-1])):
        sample.main(["--ckpt", str(ckpt), "--num", "1", "--seed", str(seed), "--classes", name, "--steps", "3",
                     "--device", "cpu", "--out", str(tmp_path / f"{seed}.npz")])
        plain = np.load(tmp_path / f"{seed}.npz")["arr_0"][0]
        assert np.array_equal(to_uint8(image).permute(1, 2, 0).numpy(), plain)
    assert not torch.equal(images[4], images[5])
    explore.main(["between", "3", "5", "--ckpt", str(ckpt), "--steps", "1", "--out", str(tmp_path / "b.gif")])
    with Image.open(tmp_path / "b.gif") as film:
        assert film.n_frames == 10 and film.size == (64, 80)


def test_the_way_is_a_great_circle():
    a, b = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.acos((sphere.spherify(a) * sphere.spherify(b)).mean())
    for share in (0.25, 0.5):
        point = sphere.spherify(explore.circle(a, b, share))
        for end, angle in ((a, share * whole), (b, (1 - share) * whole)):
            assert torch.acos((point * sphere.spherify(end)).mean()) == pytest.approx(angle.item(), abs=1e-3)


def test_geometry_in_closed_form():
    """Two classes on two axes of one hundred, the second twice as long."""
    z = torch.zeros(4, 100, 1, 1)
    z[0, 0], z[1, 0], z[2, 1], z[3, 1] = 10, 20, 10, 20
    found = explore.geometry(z, torch.tensor([0, 0, 1, 1]))
    assert found["RMS before spherify"].tolist() == pytest.approx([1, 2, 1, 2])
    assert found["angle in one class, deg"].tolist() == pytest.approx([0, 0], abs=0.1)
    assert found["angle of two classes, deg"].tolist() == pytest.approx([90] * 4, abs=0.01)
    assert found["variance of channels"][:2].tolist() == pytest.approx([np.var([10, 20, 0, 0], ddof=1)] * 2)
    again = explore.geometry(100 * z, torch.tensor([0, 0, 1, 1]))         # the sphere knows no length
    assert torch.equal(again["angle of two classes, deg"], found["angle of two classes, deg"])


def test_curves_are_those_of_the_log(trained):
    panels = explore.curves([str(trained)])
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert panels["loss"][f"consistency {trained}"] == ([2, 4], [line["consistency"] for line in lines])
    assert panels["gradient norm"][str(trained)] == ([2, 4], [line["grad_norm"] for line in lines])
    assert panels["loss by angle"][f"68-90 deg {trained}"][1] == [line["loss_by_angle"][3] for line in lines]


def test_plots_and_what_they_need(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = make_photos(tmp_path / "photos")
    commands = (["curves", str(trained)], ["latents", *train_args(tmp_path)])
    for argv in commands:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit) as stop:
            explore.main(argv)
        found = capsys.readouterr()
        assert stop.value.code == 1 and found.err.endswith("this needs matplotlib: pip install matplotlib\n")
    assert "36 pictures, L = 3,072" in found.out and "angle of two classes, deg" in found.out
    assert not list(tmp_path.glob("*.png")) and photos.is_dir()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("matplotlib"):
        for argv in commands:
            explore.main(argv)
            with Image.open(f"{argv[0]}.png") as picture:
                assert picture.info["Software"] == "sphere-latent-encoder"


@pytest.mark.parametrize("status, words, argv", [
    (1, "no.png cannot be read", ["vary", "no.png"]), (2, "vary takes one picture", ["vary", "a", "b"]),
    (2, "between two seeds", ["between", "1"]), (1, "nowhere has no log.jsonl of a run", ["curves", "nowhere"]),
    (2, "must be 90 or less", ["vary", "x.png", "--angle", "91"]),
    (2, "--out a.jpg: NAME.png", ["vary", "x.png", "--out", "a.jpg"]), (2, "--out b: NAME.png", ["curves", ".", "--out", "b"]), (2, "--classes 7: there is no such", ["between", "0", "1", "--classes", "7"]),
    (2, "unrecognized arguments: --datset", ["latents", "--datset", "toy"]), (2, "between two seeds", ["between", "0", "x"])])
def test_bad_arguments(status, words, argv, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--ckpt", str(trained / "ckpt.pt")] * (argv[0] in ("vary", "between"))
    with pytest.raises(SystemExit) as stop:
        explore.main([*argv, *more])
    error = capsys.readouterr().err
    assert stop.value.code == status and words in error and error.count("\n") == 1, error


def test_a_run_without_the_sphere_has_no_angles(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    train.main(train_args(tmp_path, "--steps", "1", "--no-spherify"))
    with pytest.raises(SystemExit) as stop:
        explore.main(["between", "0", "1", "--ckpt", str(tmp_path / "out" / "run" / "ckpt.pt")])
    assert stop.value.code == 1 and "no angles" in capsys.readouterr().err
