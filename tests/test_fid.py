import functools
import json
import tracemalloc
import warnings
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fid
from conftest import make_photos, processes
from fid import (InceptionV3, Statistics, cmmd, frechet_distance, frechet_of_features,
                 inception_score, precision_recall, principal_components)
from utils.files import file_hash
from utils.images import open_npz, read_picture, to_tensor

GOLDEN = Path(__file__).parent / "golden"


# ---- InceptionV3, against features that pytorch-fid 0.3.0 and torch-fidelity 0.4.0 gave ----------

@pytest.fixture(scope="session")
def random_weights():
    """All 566 entries, each a function of its name, as the golden features were made with."""
    state = {}
    for key, value in InceptionV3().state_dict().items():
        g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if not value.is_floating_point():
            state[key] = torch.zeros_like(value)
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * torch.rand(value.shape, generator=g)
        elif key.endswith(("running_mean", ".bias")):
            state[key] = 0.1 * torch.randn(value.shape, generator=g)
        elif key.endswith("bn.weight"):
            state[key] = 1 + 0.1 * torch.randn(value.shape, generator=g)
        else:
            state[key] = torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5
    assert len(state) == 566
    return state


@pytest.fixture(scope="session")
def weights_file(random_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(random_weights, path)
    return path


@pytest.fixture(scope="session")
def nets(random_weights):
    found = {pipeline: InceptionV3(pipeline) for pipeline in InceptionV3.PIPELINES}
    for net in found.values():
        net.load_state_dict(random_weights)
    return found


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    monkeypatch.setattr(fid, "load_inception", load_once)


@functools.cache
def load_once(path, pipeline="pytorch", device="cpu", load=fid.load_inception):
    """A command's second network is its first; what cannot be loaded is tried each time."""
    return load(path, pipeline, device)


def golden_images(seed, height, width):
    """Two pictures of noise and two of coarse blocks, uint8 (4, 3, height, width)."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8, generator=g)
    blocks = torch.randint(0, 256, (4, 3, -(-height // 8), -(-width // 8)), dtype=torch.uint8,
                           generator=g)
    images[2:] = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)[2:, :, :height, :width]
    return images


def distance(found, expected):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("height,width", [(200, 320), (512, 512)])
def test_inception_agrees_with_both_evaluators(nets, height, width):
    golden = np.load(GOLDEN / f"inception_{height}x{width}.npz")
    images = golden_images(int(golden["seed"]), height, width)
    assert zlib.crc32(images.numpy().tobytes()) == golden["img_crc32"]
    images = images[golden["pick"]]
    assert distance(nets["pytorch"](images), golden["pytorch_pool"]) < 1e-5
    assert distance(nets["pytorch"](images / 255), golden["pytorch_pool"]) < 1e-5
    found = nets["tensorflow"].extract(images)
    for space in ("pool", "spatial", "logits"):
        assert distance(found[space], golden[f"tensorflow_{space}"]) < 1e-5


def test_folded_network_and_mixed_sizes(nets, weights_file):
    images = golden_images(0, 80, 60)
    net = fid.load_inception(weights_file)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())
    assert distance(net(images), nets["pytorch"](images)) < 1e-6
    one_by_one = torch.cat([net(images[:1]), net(images[1:2, :, :50])])
    assert distance(net([images[0], images[1, :, :50]]), one_by_one) < 1e-6


def test_inception_refuses(nets, random_weights, tmp_path):
    without = {key: value for key, value in random_weights.items()
               if not key.endswith("num_batches_tracked")}
    net = InceptionV3()
    net.load_state_dict(without)
    assert torch.equal(net.fc.weight, random_weights["fc.weight"])
    for wrong in ({**without, "extra": torch.zeros(1)},
                  {**without, "fc.weight": torch.zeros(1000, 2048)},
                  {key: value for key, value in without.items() if key != "fc.bias"}):
        with pytest.raises(RuntimeError):
            net.load_state_dict(wrong)
    for wrong in (torch.full((1, 3, 9, 9), 255.0), torch.full((1, 3, 9, 9), np.nan),
                  torch.full((1, 3, 9, 9), 200)):
        with pytest.raises(ValueError, match="uint8, or floats"):
            net(wrong)
    with pytest.raises(ValueError, match="pipeline"):
        InceptionV3("jax")


# ---- Statistics and distances --------------------------------------------------------------------

def test_statistics_equal_numpy_in_one_pass_and_merged():
    # a mean far from zero
    x = np.random.default_rng(0).standard_normal((500, 40)) * np.logspace(0, -3, 40) + 100
    one, parts = Statistics(40), [Statistics(40) for _ in range(3)]
    for i, batch in enumerate(np.array_split(x, 17)):
        one.update(torch.from_numpy(batch))
        parts[i % 3].update(batch)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    parts[0].merge(Statistics(40))
    for found in (one, parts[0]):
        assert found.n == 500
        assert np.abs(found.mean / x.mean(0) - 1).max() < 1e-12
        scale = np.sqrt(np.outer(x.var(0), x.var(0)))
        # 100 eats 5 digits
        assert np.abs((found.cov - np.cov(x, rowvar=False)) / scale).max() < 1e-9
    y = np.maximum(np.random.default_rng(1).standard_normal((500, 40)), 0)         # as features are
    one = Statistics(40)
    for batch in np.array_split(y, 17):
        one.update(batch)
    assert np.abs(one.mean - y.mean(0)).max() < 1e-12
    assert np.abs(one.cov - np.cov(y, rowvar=False)).max() < 1e-12


def test_statistics_of_few_pictures():
    found = Statistics(40)
    found.update(np.random.default_rng(0).standard_normal((39, 40)))
    with pytest.warns(UserWarning, match="39 pictures for 40 features"):
        found.cov
    found.update(np.zeros((1, 40)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.cov
    with pytest.raises(ValueError, match=r"\(b, 40\)"):
        found.update(np.zeros((2, 41)))
    with pytest.raises(ValueError, match="do not add up"):
        found.merge(Statistics(41))
    with pytest.raises(ValueError, match="0 pictures"):
        Statistics(3).cov


# Two sets of features a case: (seed, n, kind) each, dimension d, and the distance that
# pytorch-fid 0.3.0's statistics
# have by the nuclear norm of the features (right to 1e-13; pytorch-fid itself is off by up to
# 5e-6 where n < d).
CASES = [
    (8, (11, 200, "mix"), (12, 300, "mix"), 3.2220057196659404),
    (8, (13, 5, "mix"), (14, 6, "mix"), 4.580593516777593),
    (8, (11, 200, "mix"), (11, 200, "mix"), 0.0),
    (64, (21, 1000, "mix"), (22, 1500, "mix"), 30.14400782577695),
    (64, (23, 30, "mix"), (24, 40, "mix"), 31.707011260476484),
    (64, (25, 1000, "near"), (26, 1000, "near"), 39.00417022106829),
    (64, (27, 1000, "relu"), (28, 1000, "relu"), 13.194647019146345),
    (64, (29, 5000, "diag"), (30, 5000, "diag"), 25.222367963788596),
    (64, (23, 30, "mix"), (22, 1500, "mix"), 36.8542846641861),
]


def features(d, seed, n, kind):
    r = np.random.default_rng(seed)
    z, s, m = r.standard_normal((n, d)), (1 + np.arange(d)) ** -0.5, None
    m = 0.5 * r.standard_normal(d)
    if kind == "diag":
        return z * s + m
    if kind == "near":
        return z * np.logspace(0, -8, d) + m
    a = r.standard_normal((d, d)) / np.sqrt(d)
    if kind == "mix":
        return (z * s) @ a + m
    x = np.maximum((z * 4 * s) @ a + 0.1 * m, 0)
    x[:, ::50] = 0
    return x


@pytest.mark.parametrize("d,set1,set2,truth", CASES)
def test_frechet_distance(d, set1, set2, truth):
    statistics = [s for x in (features(d, *set1), features(d, *set2))
                  for s in (x.mean(0), np.cov(x, rowvar=False))]
    found = frechet_distance(*statistics)
    assert abs(found - truth) <= 1e-9 * (np.trace(statistics[1]) + np.trace(statistics[3]) + truth)
    assert frechet_distance(*statistics[2:], *statistics[:2]) == pytest.approx(found, rel=1e-8,
                                                                               abs=1e-8)


def test_frechet_distance_refuses():
    m, s = np.zeros(3), np.eye(3)
    for wrong, word in (((m, s, np.zeros(4), np.eye(4)), "shapes"),
                        ((m, s, m, np.eye(4)), "shapes"),
                        ((m * np.nan, s, m, s), "mu1 has values that are not finite"),
                        ((m, s, m, np.triu(s + 1)), "sigma2 is not symmetric"),
                        ((m, s - 2 * np.diag([1, 0, 0]), m, s), "sigma1 is not a covariance"),
                        ((m, s, m, np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1]])),
                         "sigma2 is not a covariance")):
        with pytest.raises(ValueError, match=word):
            frechet_distance(*wrong)
    assert frechet_distance(m, 0 * s, m + 1, s) == pytest.approx(6)


def test_principal_components_are_numpys():
    r = np.random.default_rng(0)
    x = torch.from_numpy(r.standard_normal((200, 300)) * np.linspace(2, 0.1, 300) + r.standard_normal(300))
    mean, components = principal_components(x)
    found = (x - mean) @ components
    _, singular, V = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    assert np.abs(np.abs(found.numpy()) - np.abs((x.numpy() - x.numpy().mean(0)) @ V[:64].T)).max() < 1e-9
    assert found.std(0).numpy() == pytest.approx(singular[:64] / 199 ** 0.5)
    few = (x[:10] - x[:10].mean(0)) @ principal_components(x[:10])[1]       # 9 directions, no noise beyond them
    assert (few[:, :9].abs().sum(0) > 0).all() and (few[:, 9:] == 0).all()


def test_inception_score_precision_recall_cmmd():
    """Values of ADM's evaluator and torch-fidelity 0.4.0 (with its shuffle), and of the CMMD
    formula in float64."""
    logits = np.random.default_rng(71).standard_normal((1200, 1008)) * 2
    assert inception_score(logits)[0] == pytest.approx(6.550907453597962, rel=1e-12)
    assert inception_score(logits, 10) == pytest.approx((6.04460323872027, 0.09453935348618719),
                                                        rel=1e-9)
    r = np.random.default_rng(72)
    reference, generated = r.standard_normal((600, 64)), 0.9 * r.standard_normal((500, 64)) + 0.05
    assert precision_recall(generated, reference) == pytest.approx((0.916, 0.29333333333333333),
                                                                   rel=1e-12)
    assert precision_recall(reference, reference) == (1, 1)
    r = np.random.default_rng(73)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True)
            for x in (r.standard_normal((400, 768)), r.standard_normal((300, 768)) + 0.1))
    assert cmmd(a, b) == pytest.approx(0.1425987953278529, rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-10)


# ---- The command ---------------------------------------------------------------------------------

def fail(argv, capsys):
    """Runs a command that has to fail -> exit status, the one line that it says."""
    with pytest.raises(SystemExit) as stop:
        fid.main([str(a) for a in argv] + ["--device", "cpu"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "fid.py: warning: " not in line]
    assert len(lines) == 1, lines
    return stop.value.code, lines[0]


def result(argv, capsys):
    fid.main([str(a) for a in argv] + ["--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def save_npz(path, n=12, seed=0, size=(24, 20), **more):
    pictures = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    np.savez(path, arr_0=pictures, **more)
    return pictures


def test_folders_npz_and_statistics_give_one_number(nets, weights_file, tmp_path, capsys):
    """A folder in a folder, mixed sizes, grey, other files; an npz of the same pictures; saved
    statistics."""
    weights = ["--inception-weights", weights_file]
    pictures = save_npz(tmp_path / "b.npz", 5)
    for i, picture in enumerate(pictures):
        path = tmp_path / "b" / f"folder{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    make_photos(tmp_path / "a", each=1)
    Image.new("L", (50, 30), 77).save(tmp_path / "a" / "grey.jpg")
    (tmp_path / "a" / "notes.txt").write_text("not a picture, and not named like one")

    first = result([tmp_path / "a", tmp_path / "b", "--metrics", "fid,sfid,pr", *weights], capsys)
    # the weights are not the official ones
    assert "FID" not in first["numbers"] and len(first["numbers"]) == 4
    name = "Frechet distance, 2048 pool features, unofficial weights"
    a = [to_tensor(read_picture(f)) for f in sorted((tmp_path / "a").rglob("*"))
         if f.suffix in (".png", ".jpg")]
    b = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    x, y = nets["pytorch"].extract(a), nets["pytorch"].extract(b)
    expected = frechet_of_features(x["pool"].double(), y["pool"].double())
    assert first["numbers"][name] == pytest.approx(expected, rel=1e-4)
    assert first["recipe"]["A"]["n"] == 4 and first["recipe"]["A"]["left_out"] == "1 .txt"
    assert first["recipe"]["features"]["pipeline"] == "pytorch"
    assert "4 pictures for 2,048 features" in first["warnings"][0]

    fid.main([str(tmp_path / "b.npz"), "--save-stats", str(tmp_path / "ref.npz"),
              *map(str, weights), "--device=cpu"])
    assert distance(np.load(tmp_path / "ref.npz")["mu"], y["pool"].double().mean(0)) < 1e-6
    capsys.readouterr()
    second = result([tmp_path / "a", tmp_path / "ref.npz", "--metrics", "sfid", *weights], capsys)
    for key, value in second["numbers"].items():
        assert value == pytest.approx(first["numbers"][key], rel=1e-4)   # of other batches, float32
    same = result([tmp_path / "ref.npz", tmp_path / "ref.npz"], capsys)    # no network is needed
    assert same["numbers"] == {name: pytest.approx(0, abs=1e-9)}

    status, error = fail([tmp_path / "b", tmp_path / "ref.npz", "--pipeline", "tensorflow", *weights], capsys)
    assert status == 1 and "b and " in error and "picture/s" not in error          # before any picture is read
    assert "ref.npz: the features have different pipeline, pytorch and tensorflow" in error
    status, error = fail([tmp_path / "b", "--save-stats", tmp_path / "ref.npz", *weights], capsys)
    assert status == 1 and "ref.npz is there already" in error


def test_official_weights_recipe_of_samples_and_a_references_pipeline(weights_file, tmp_path,
                                                                      monkeypatch, capsys):
    """Where the weights have the expected sum the number is FID; samples.npz tells how it was
    made; ADM's keys."""
    monkeypatch.setitem(fid.WEIGHTS, "sha256", file_hash(weights_file))
    monkeypatch.setitem(fid.WEIGHTS, "size", weights_file.stat().st_size)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").symlink_to(weights_file)
    run = tmp_path / "out" / "run"
    run.mkdir(parents=True)
    recipe = {"checkpoint": str(run / "ckpt.pt"), "step": 7, "ema": "0.9995", "steps": 4,
              "cfg_scale": 1.6, "seed": 3}
    save_npz(run / "samples.npz", 10, labels=np.arange(10) % 3, recipe=json.dumps(recipe))
    r = np.random.default_rng(0)
    adm = {"mu": r.random(2048), "sigma": np.eye(2048), "mu_s": r.random(2023),
           "sigma_s": np.eye(2023)}
    save_npz(tmp_path / "adm.npz", 4, seed=1, **adm)

    fid.main([str(run / "samples.npz"), str(tmp_path / "adm.npz"), "--device", "cpu"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("FID ", "step 7", "ema 0.9995", "cfg scale 1.6", "pipeline tensorflow",
                  "classes 3", "3 to 4",
                  "weights sha256 " + fid.WEIGHTS["sha256"][:16], "inception score, ADM's"):
        assert words in said
    line, = map(json.loads, (run / "fid.jsonl").read_text().splitlines())
    assert line["numbers"]["FID"] > 0 and line["recipe"]["A"]["made_by"] == recipe
    assert line["recipe"]["A"]["sha256"] == file_hash(run / "samples.npz")
    result([run / "samples.npz", tmp_path / "adm.npz", "--metrics=fid", "--pipeline=pytorch"],
           capsys)
    first, second = map(json.loads, (run / "fid.jsonl").read_text().splitlines())
    assert any("likely of the pipeline tensorflow, not pytorch" in warning for warning in second["warnings"])
    assert second["recipe"]["features"]["pipeline"] == "pytorch"
    assert first["numbers"]["FID"] != second["numbers"]["FID"]


def test_statistics_of_a_data_set_are_kept(weights_file, tmp_path, monkeypatch, capsys):
    loads = []

    class Flowers:
        name, labels, classes = "flowers", torch.zeros(5, dtype=torch.long), ["rose"]
        recipe = {"dataset": "flowers", "n": 5, "image_size": 256}

        def load(self, indices):
            loads.append(len(indices))
            return golden_images(1, 20, 20)[[i % 4 for i in indices]]

    def load_dataset(name, image_size, root):
        assert (name, image_size, root) == ("flowers", 256, str(tmp_path))
        return Flowers()

    monkeypatch.setattr(fid, "load_dataset", load_dataset)
    save_npz(tmp_path / "a.npz", 3)
    argv = [tmp_path / "a.npz", "flowers", "--inception-weights", weights_file, "--data-dir",
            tmp_path]
    argv += ["--batch-size", 3]
    first = result([*argv, "--metrics", "fid"], capsys)
    assert loads == [3, 2]
    second = result([*argv, "--metrics", "fid,sfid"], capsys)
    assert loads == [3, 2] and second["numbers"].items() >= first["numbers"].items()
    assert str(tmp_path / "statistics") in second["recipe"]["B"]["statistics_from"]
    fid.main([*map(str, [*argv[1:4], *argv[4:]]), "--pipeline=tensorflow",
              f"--save-stats={tmp_path}/ref.npz"])
    assert loads == [3, 2, 3, 2]                                           # other features
    first_file = second["recipe"]["B"]["statistics_from"]
    kept, = (file for file in (tmp_path / "statistics").iterdir() if str(file) != first_file)
    assert np.array_equal(np.load(kept)["mu_s"], np.load(tmp_path / "ref.npz")["mu_s"])
    whole = Path(first_file).read_bytes()
    Path(first_file).write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    fid.main([*map(str, argv), "--metrics", "fid", "--device", "cpu"])
    assert "the statistics are made again" in capsys.readouterr().err and loads == [3, 2] * 3
    assert Path(first_file).read_bytes()[:5001] == whole[:5001]


def test_two_processes_give_the_same_number(weights_file, tmp_path, capsys):
    save_npz(tmp_path / "a.npz", 5)
    save_npz(tmp_path / "b.npz", 4, seed=1)
    argv = [tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "fid,pr", "--batch-size", 2,
            "--inception-weights", weights_file]
    status, two, _ = processes("fid", [*argv, "--json", "--device", "cpu"], tmp_path)
    assert status == [0, 0]
    one = result(argv, capsys)
    two = json.loads(two)
    assert two["recipe"]["where"] == "2 x cpu"
    assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-5)


def test_cmmd_from_pictures(tmp_path, monkeypatch, capsys):
    create = timm.create_model
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "in the cache")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: create(
        "vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, img_size=336, depth=1))
    save_npz(tmp_path / "a.npz")
    save_npz(tmp_path / "b.npz", seed=1)
    # and Inception not needed
    found = result([tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "cmmd"], capsys)
    assert found["numbers"]["CMMD"] > 0 and found["recipe"]["features"] == {"clip": fid.CLIP_MODEL}
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, :, 10:50] = 255                                     # the square in the middle is white
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    white = (1 - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(fid.CLIP.prepare(image), white.view(3, 1, 1).expand(3, 336, 336))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)

    def refused(url, timeout):
        raise OSError(f"nobody is at {url}")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refused)
    status, error = fail([tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "cmmd"], capsys)
    assert status == 1 and fid.CLIP_MODEL in error and "nobody is at" in error


def test_weights_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    save_npz(tmp_path / "a.npz")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(fid.WEIGHTS, "url",
                        "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    status, error = fail([tmp_path / "a.npz", tmp_path / "a.npz"], capsys)
    assert status == 1 and "127.0.0.1:9" in error and str(tmp_path / "hub" / "checkpoints") in error
    (tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    status, error = fail([tmp_path / "a.npz", tmp_path / "a.npz"], capsys)
    assert status == 1 and "4 bytes, expected were 95,628,359" in error
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("weights")
    for name, word in (("other.pth", "does not hold InceptionV3's weights"),
                       ("none.pth", "no such file"),
                       ("text.pth", "does not hold InceptionV3's weights")):
        status, error = fail([tmp_path / "a.npz", tmp_path / "a.npz", "--inception-weights", tmp_path / name], capsys)
        assert status == 1 and name in error and word in error


def test_pictures_of_an_npz_stay_on_the_disk(tmp_path):
    """48 MB of them are scored in pieces, and never in memory; packed ones are."""
    pictures = np.random.default_rng(0).integers(0, 256, (1000, 128, 128, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=pictures, labels=np.arange(1000) % 10)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pictures[:50])
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(pictures[:50]))
    tracemalloc.start()
    found = open_npz(tmp_path / "a.npz")
    loaded = found.load(range(990, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e7 < pictures.nbytes and found.n == 1000
    assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), pictures[990:])
    for name in ("packed", "columns"):
        loaded = open_npz(tmp_path / f"{name}.npz").load([3, 1])
        assert np.array_equal(loaded.permute(0, 2, 3, 1).numpy(), pictures[[3, 1]])


def test_a_damaged_npz_is_found(weights_file, tmp_path, capsys):
    """One bit of one pixel: the zip's checksum knows."""
    save_npz(tmp_path / "a.npz", 12)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    weights = ["--inception-weights", weights_file]
    status, error = fail([tmp_path / "a.npz", tmp_path / "a.npz", *weights], capsys)
    assert status == 1 and "a.npz cannot be read as an npz (Bad CRC-32" in error


def test_bad_input(weights_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures = save_npz("good.npz", 4)
    save_npz("one.npz", 1)
    for folder in ("empty", "texts", "broken", "dangling"):
        Path(folder).mkdir()
    Path("dangling/a.png").symlink_to("nowhere.png")
    Path("texts/notes.txt").write_text("no picture")
    Path("broken/a.png").write_text("no picture either")
    Path("text.npz").write_text("no npz")
    Path("photo.jpg").write_text("a file")
    np.savez("keys.npz", images=pictures)
    np.savez("float.npz", arr_0=pictures / 255)
    np.savez("planes.npz", arr_0=pictures.transpose(0, 3, 1, 2))
    np.savez("none.npz", arr_0=pictures[:0])
    np.savez("objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez("half.npz", mu=np.zeros(2048))
    np.savez("odd.npz", mu=np.zeros(2048), sigma=np.eye(64))
    np.savez("small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez("large.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("nan.npz", mu=np.zeros(2048), sigma=np.eye(2048) * np.nan)
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-200])
    for A, B, status, word in [
            ("empty", "good.npz", 1, "empty has no pictures in it"),
            ("texts", "good.npz", 1, "texts has no pictures"),
            ("good.npz", "broken", 1, "broken/a.png cannot be read as a picture"),
            ("nowhere", "good.npz", 1, "nowhere does not exist"),
            ("dangling", "good.npz", 1, "dangling/a.png is missing"),
            ("photo.jpg", "good.npz", 1, "photo.jpg is neither"),
            ("text.npz", "good.npz", 1, "text.npz is neither"),
            ("cut.npz", "good.npz", 1, "cut.npz is neither"),
            ("keys.npz", "good.npz", 1, "keys.npz cannot be read as an npz (it has neither arr_0"),
            ("none.npz", "good.npz", 1, "none.npz cannot be read as an npz (arr_0"),
            ("float.npz", "good.npz", 1, "float.npz cannot be read as an npz (arr_0 must be pictures, uint8 (N, H, W, 3), not float64"),
            ("good.npz", "planes.npz", 1, "planes.npz cannot be read as an npz (arr_0"),
            ("objects.npz", "good.npz", 1, "objects.npz cannot be read as an npz (Object arrays"),
            ("good.npz", "half.npz", 1, "half.npz cannot be read as an npz (mu and sigma"),
            ("good.npz", "odd.npz", 1, "odd.npz cannot be read as an npz (mu and sigma"),
            ("large.npz", "small.npz", 1, "large.npz and small.npz: statistics of 2048 and of 64 features"),
            ("large.npz", "nan.npz", 1, "nan.npz cannot be read as an npz (mu or sigma is not finite"),
            ("one.npz", "large.npz", 1, "one.npz: 1 picture: a covariance needs two"),
            ("good.npz", None, 2, "give B"), ("good.npz", "--metrics=kid", 2, "give B"),
            ("large.npz", "--metrics=is", 1, "large.npz has no pictures"),
            ("one.npz", "--metrics=is", 1, "one.npz: 1 pictures do not make 10 parts")]:
        weights = ["--inception-weights", weights_file] if "one.npz" in A or "broken" == B else []
        found, error = fail([a for a in (A, B, *weights) if a], capsys)
        assert found == status and word in error, error
    status, error = fail(["good.npz", "large.npz", "--as-pytorch-fid"], capsys)
    assert status == 2 and "--as-pytorch-fid: how a folder is read, and none is given" in error
    with pytest.raises(ValueError, match="1 picture: a covariance needs two"):
        fid.principal_components(torch.ones(1, 64, dtype=torch.float64))
    same = result(["large.npz", "large.npz"], capsys)["numbers"]
    assert same == {"FID": pytest.approx(0, abs=1e-9)}
