"""What the paper compares with, against closed forms: of a data set of one point all is known."""
import json
import math

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import baselines
import data
import sample
import sphere
import train
from conftest import apart, equal, fit_rae, make_photos, processes, train_args
from utils.cli import UserError
from utils.processes import keyed_generator

Y, SHAPE = torch.tensor([0, 1, 2]), (3, 4, 2, 2)
POINT = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(7)).expand(SHAPE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(seed=0):
    return sphere.fresh_noise(SHAPE, generator(seed))


def batch(n=6, dtype=torch.float64):
    """eps like n times the point, labels, times t >= r."""
    eps = torch.randn(n, 4, 2, 2, generator=generator(1), dtype=dtype)
    t, r = baselines.times(n, r_equals_t=0.3, generator=generator(2))
    return POINT[:1].to(dtype).expand(n, -1, -1, -1), torch.arange(n) % 3, t.to(dtype), r.to(dtype), eps


# Of one point z the velocity at x_t is (x_t - z) / t, and as paths are straight the average too.

def exact_velocity(x, y, at):
    return (x - POINT[:1].to(x.dtype)) / at[:, 0].view(-1, 1, 1, 1)


def test_losses_vanish_where_the_answer_is_exact():
    z, y, t, r, eps = batch()
    assert baselines.flow_losses(exact_velocity, z, y, t, r, eps)[0]["velocity"] < 1e-20
    losses = baselines.meanflow_losses(exact_velocity, z, y, t, r, eps)[0]
    assert losses["average_velocity"] < 1e-10 and losses["squared_error"] < 1e-20
    wrong = baselines.meanflow_losses(lambda x, y, at: exact_velocity(x, y, at) + at[:, 1].view(-1, 1, 1, 1),
                                      z, y, t, r, eps)[0]
    # u = v + (t - r), so du/dt = 1 and the target is v - (t - r): off by 2 (t - r)
    assert wrong["squared_error"].item() == pytest.approx((2 * (t - r)).square().mean().item())


@pytest.mark.parametrize("sampler,steps,more", [
    (baselines.flow_sample, 1, {}), (baselines.flow_sample, 5, {}),
    (baselines.meanflow_sample, 1, {}), (baselines.meanflow_sample, 4, {}),
    (baselines.meanflow_sample, 4, {"cfg_scale": 2.0, "null_class": 3})])
def test_samplers_return_the_point(sampler, steps, more):
    found = sampler(exact_velocity, SHAPE, Y, steps, noise=noise(), **more)
    assert torch.allclose(found, POINT, atol=1e-5)


def test_the_sphere_returns_the_point_in_one_step():
    assert torch.equal(sphere.sample(lambda v, y: POINT, SHAPE, Y, 1, noise=noise()), POINT)


def test_heun_is_of_second_order():
    """dx/dt = -x has the solution e^t x(1) at time 1 - t: errors by halves and by quarters."""
    def errors(solver):
        trajectories = (baselines.flow_sample(lambda x, y, at: -x.double(), SHAPE, Y, steps, solver=solver,
                                              noise=noise()) for steps in (20, 40))
        exact = torch.randn(SHAPE, generator=generator()).double() * math.e
        return [(found - exact).abs().max().item() for found in trajectories]
    for solver, ratio in (("euler", 2), ("heun", 4)):
        coarse, fine = errors(solver)
        assert coarse / fine == pytest.approx(ratio, rel=0.05)
    calls = []
    baselines.flow_sample(lambda x, y, at: calls.append(at[0].item()) or x, SHAPE, Y, 2, solver="heun",
                          noise=noise())
    assert calls == [1.0, 0.5, 0.5, 0.0]


def test_guidance_and_the_times_that_are_told():
    def denoiser(x, y, at):
        told.append((y.tolist(), at.tolist()))
        return y.view(-1, 1, 1, 1) * torch.ones_like(x)
    told = []
    start = torch.randn(SHAPE, generator=generator())
    found = baselines.flow_sample(denoiser, SHAPE, Y, 2, 2.0, noise=noise(), null_class=9)
    assert torch.allclose(found, start - (9 + 2 * (Y.view(-1, 1, 1, 1) - 9)), atol=1e-5)
    assert told[1] == ([0, 1, 2, 9, 9, 9], [[0.5]] * 6)
    told.clear()
    baselines.meanflow_sample(denoiser, SHAPE, Y, 2, noise=noise())
    assert [at[0] for _, at in told] == [[1.0, 0.5], [0.5, 0.5]]


def network(num_times, hidden_size=32):
    torch.manual_seed(0)
    times = {"kind": baselines.TimedSiT, "num_times": num_times} if num_times else {}
    net = baselines.SiT_models["SiT-T/1"](input_size=2, in_channels=4, hidden_size=hidden_size, depth=2,
                                          num_heads=2, num_classes=3, **times).double().eval()
    for p in net.parameters():                                # nothing at its zero start
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator(3), dtype=p.dtype))
    return net


def test_forward_derivative_against_finite_differences():
    net, (z, y, t, r, eps), seen = network(2), batch(), []

    def denoiser(x, y, at):
        out = net(x, y, at)
        seen.append((forward_ad.unpack_dual(out).tangent, forward_ad.unpack_dual(x).primal))
        return out
    baselines.meanflow_losses(denoiser, z, y, t, r, eps)
    (found, x), h, v = seen[0], 1e-5, eps - z
    assert torch.equal(x, (1 - t.view(-1, 1, 1, 1)) * z + t.view(-1, 1, 1, 1) * eps)
    ahead, behind = (net(x + s * v, y, torch.stack([t + s, t + s - r], 1)) for s in (h, -h))
    numeric = (ahead - behind) / (2 * h)
    assert numeric.norm() > 0.1 and (found - numeric).norm() / numeric.norm() < 1e-8


def test_meanflow_with_r_equal_to_t_is_flow_matching():
    net, (z, y, t, _, eps) = network(2), batch()
    losses = baselines.meanflow_losses(net, z, y, t, t, eps)[0]
    of_flow = baselines.flow_losses(lambda x, y, at: net(x, y, torch.cat([at, 0 * at], 1)), z, y, t, t, eps)[0]
    assert losses["squared_error"].item() == pytest.approx(of_flow["velocity"].item(), rel=1e-12)
    # With p = 0 the losses themselves are one, but for the sum over a latent in place of the mean.
    plain = baselines.meanflow_losses(net, z, y, t, t, eps, p=0)[0]["average_velocity"] / z[0].numel()
    gradients = [torch.autograd.grad(loss, net.final_layer.linear.weight, retain_graph=True)[0]
                 for loss in (plain, of_flow["velocity"])]
    assert torch.allclose(*gradients, rtol=1e-10)


def test_the_weight_and_the_target_are_held_fixed():
    z, y, t, r, eps = batch()
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    losses = baselines.meanflow_losses(lambda x, y, at: a * x, z, y, t, r, eps, p=1.0, c=1e-3)[0]
    x = (1 - t.view(-1, 1, 1, 1)) * z + t.view(-1, 1, 1, 1) * eps
    v = eps - z
    error = 0.5 * x - (v - (t - r).view(-1, 1, 1, 1) * 0.5 * v)             # du/dt = a dx/dt
    square = error.square().flatten(1).sum(1)
    by_hand = ((2 * error * x).flatten(1).sum(1) / (square + 1e-3)).mean()  # d/da of a x alone
    assert torch.autograd.grad(losses["average_velocity"], a)[0].item() == pytest.approx(by_hand.item())


def test_times():
    t, r = baselines.times(50_000, -0.4, 1.0, generator=generator())
    assert (t >= r).all() and (t < 1).all() and (r > 0).all()
    assert abs((t == r).double().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 50_000)
    # Of the larger of two normal numbers the mean is 1 / sqrt(pi), with r = t and without.
    for some in (t[t == r], t[t > r]):
        assert abs(torch.logit(some.double()).mean() + 0.4 - 1 / math.sqrt(math.pi)) < 0.03
    t, r = baselines.times(50_000, 0.3, 1.2, r_equals_t=1.0, generator=generator())
    logit = torch.logit(t.double())
    assert torch.equal(t, r) and abs(logit.mean() - 0.3) < 0.03 and abs(logit.std() - 1.2) < 0.03


# ---- Sphere Encoder ------------------------------------------------------------------------------

class Exact:
    """An encoder that is one to one on the sphere, and the decoder that is its inverse for a class."""

    def __init__(self, pictures):
        self.pictures, self.calls = pictures, []

    def __call__(self, x, y, part):
        self.calls.append(part)
        return x.flip(1) if part == "encoder" else self.pictures[y]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.7])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sphere_encoder_returns_the_picture(cfg_scale, steps):
    pictures, trajectory = torch.randn(3, 4, 2, 2, generator=generator(5)), []
    exact = Exact(torch.cat([pictures, pictures[:1]]))
    y = torch.tensor([1, 2, 0])
    found = baselines.sphere_encoder_sample(exact, SHAPE, y, steps, cfg_scale, sphere.decay(2.0), noise(), null_class=3,
                                            trajectory=trajectory)
    expected = pictures[:1] + cfg_scale * (pictures[y] - pictures[:1])
    assert torch.allclose(found, expected, atol=1e-6) and len(trajectory) == steps
    assert exact.calls == (["decoder", "encoder"] * steps)[:-1]             # n decoders, n - 1 encoders


def test_sphere_encoder_losses_by_hand():
    x, eps = (torch.randn(5, 4, 2, 2, generator=generator(s), dtype=torch.float64) for s in (0, 1))
    hi, lo, y = torch.full((5,), 2.0).double(), torch.full((5,), 0.5).double(), torch.arange(5) % 3

    def denoiser(x, y, part):
        return 2 * x[:, :3] if part == "encoder" else torch.cat([x, x[:, :1]], 1).tanh()
    losses = baselines.sphere_encoder_losses(denoiser, x, y, hi, lo, eps)[0]
    v = sphere.spherify(2 * x[:, :3])
    x_hi, x_lo = (denoiser(sphere.add_noise(v, s, eps[:, :3]), y, "decoder") for s in (hi, lo))
    huber = [torch.where(d.abs() < 1, d ** 2 / 2, d.abs() - 0.5).mean() for d in (x_lo - x, x_hi - x_lo)]
    cosine = torch.cosine_similarity((2 * x_hi[:, :3]).flatten(1), (2 * x[:, :3]).flatten(1)).mean()
    assert [value.item() for value in losses.values()] == pytest.approx(
        [50 * huber[0].item(), 25 * huber[1].item(), 1 - cosine.item()])


def test_pixels_are_the_picture(photos):
    images = torch.rand(2, 3, 12, 12, generator=generator())
    rae = fit_rae("pixels", images, patch_size=4)
    z = rae.encode(images)
    assert z.shape == (2, 48, 3, 3) and torch.allclose(rae.decode(z), images, atol=1e-6)
    assert abs(z).max() <= 1


def of_method(folder, method, *more):
    """train_args without what means nothing to the method."""
    argv = train_args(folder, "--method", method, *more)
    without = {"sphere-encoder": (), "distill": ("--alpha-max", "--sampling-noise", "--cfg")}
    for flag in without.get(method, ("--alpha-max", "--sampling-noise")):
        del argv[argv.index(flag):argv.index(flag) + 2]
    return argv


# ---- One step: distillation ----------------------------------------------------------------------

def pairs_of(root, denoiser, steps, n=64, num_classes=3, shape=SHAPE[1:], **sampling):
    return baselines.Pairs(denoiser, steps, n, num_classes, 0, shape, torch.device("cpu"), {}, root, **sampling)


def quarter_turn(x):
    """Orthogonal, and orthogonal to x: two channels are one complex number, times i."""
    a, b = x.chunk(2, dim=1)
    return torch.cat([-b, a], dim=1)


def test_a_pair_is_what_the_sampler_makes_of_its_noise(tmp_path):
    """Of one point it is the point; of G(v) = R v, R a quarter turn, two steps are known: with s the
    noise after the first and r the noise's length, G(f(R v + s r v)) = (s r R v - v) / sqrt(1 + (s r)^2)."""
    six, twenty = np.zeros(6, int), np.zeros(20, int)          # no flips
    pair, y = pairs_of(tmp_path, lambda v, y: POINT[:1].expand(len(v), -1, -1, -1), 3).batch(torch.arange(6), six)
    assert torch.equal(pair[:, 1], POINT[:1].half().float().expand(6, -1, -1, -1)) and y.tolist() == [0, 1, 2] * 2
    losses, _ = baselines.distill_losses(lambda v, y: pair[:, 1], pair, y, None, None, None)
    assert abs(losses["reconstruction"]) < 1e-6

    pairs = pairs_of(tmp_path, lambda v, y: quarter_turn(v), 2, sigma=sphere.decay(4.0), n=20)
    pair, _ = pairs.batch(torch.arange(20), twenty)
    eps, found = pair.unbind(1)
    r = eps.square().mean((1, 2, 3), keepdim=True).sqrt()
    v = eps / r
    expected = (2 * r * quarter_turn(v) - v) / (1 + (2 * r) ** 2).sqrt()
    assert torch.allclose(found, expected, atol=1e-3)         # float16


def test_the_student_of_a_linear_teacher_becomes_it(tmp_path):
    """One step of G(v, y) = A v + b_y: the loss has one minimum, the teacher, guidance and all."""
    A, b = torch.randn(4, 4, generator=generator(1)), torch.randn(4, 4, generator=generator(2))

    def linear(A, b):
        return lambda v, y: torch.einsum("ij,bjhw->bihw", A, v) + b[y].view(-1, 4, 1, 1)
    pairs = pairs_of(tmp_path, linear(A, b), 1, n=512, cfg_scale=1.5, null_class=3)
    student = [0.1 * torch.randn(n, 4, generator=generator(3)) for n in (4, 3)]
    student = [p.requires_grad_() for p in student]
    optimizer = torch.optim.Adam(student, lr=0.05)
    for step in range(300):
        pair, y = pairs.batch(torch.randint(512, (64,), generator=generator(step)), np.zeros(64, int))
        loss = baselines.distill_losses(linear(*student), pair, y, None, None, None)[0]["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
        optimizer.step()
    assert torch.allclose(student[0], A, atol=2e-3)
    assert torch.allclose(student[1], b[3] + 1.5 * (b[:3] - b[3]), atol=2e-3)


def test_a_run_is_distilled(trained, tmp_path, capsys):
    """It starts from the teacher's first average, resumes in the same bits, whatever the number of processes
    that made the pairs, and where the pictures are gone; its pairs are the teacher's own pictures."""
    def run(name, steps, teacher=trained / "ckpt.pt", dataset=trained.parent.parent / "photos", more=()):
        for n in steps.split():
            train.main([*of_method(tmp_path / name, "distill", "--steps", n, "--pairs", "300",
                                   "--init-from", str(teacher), *more), "--dataset", str(dataset)])
        return torch.load(tmp_path / name / "out" / "run" / "ckpt.pt", weights_only=True)
    teacher = torch.load(trained / "ckpt.pt", weights_only=True)
    still = run("still", "1", more=["--lr", "0"])
    assert equal(still["model"], teacher["ema"]["0.995"]) and equal(still["rae"], teacher["rae"])
    assert all(equal(ema, still["model"]) for ema in still["ema"].values()) and len(still["ema"]) == 2
    torch.save({**teacher, "args": {**teacher["args"], "sigma": 2.5}}, tmp_path / "less.pt")
    assert run("less", "1", teacher=tmp_path / "less.pt")["args"]["sigma"] == 2.5

    whole, resumed = run("whole", "4"), run("resumed", "2 4")
    assert "encoded 300 pairs" in capsys.readouterr().out
    assert equal(whole["model"], resumed["model"]) and equal(whole["ema"], resumed["ema"])
    assert not equal(whole["ema"]["0.995"], whole["ema"]["0.98"])
    moved, nowhere = tmp_path / "moved.pt", str(tmp_path / "nowhere")
    torch.save({**teacher, "args": {**teacher["args"], "dataset": nowhere}}, moved)
    gone = run("gone", "4", teacher=moved, dataset=nowhere)
    said = capsys.readouterr()
    assert "; --method distill goes on without pictures" in " ".join(said.err.split())
    with pytest.raises(UserError, match="the pictures of nowhere are not here"):
        data.Unseen(sample.load_run(moved)).load([0])
    assert equal(whole["model"], gone["model"]) and gone["counts"] == [12, 12, 12]
    assert gone["args"]["pictures"] == teacher["args"]["pictures"]

    latents, folder = [], tmp_path / "two"
    folder.mkdir()
    statuses, _, said = processes("train", [
        *of_method(folder, "distill", "--steps", "4", "--pairs", "300", "--init-from", trained / "ckpt.pt"),
        "--dataset", trained.parent.parent / "photos"], folder)
    assert statuses == [0, 0], said
    two = torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)
    assert apart(two["model"], whole["model"], still["model"]) < 1e-2
    for name in ("whole", "two"):
        files = sorted((tmp_path / name / "datasets" / "pairs").glob("*/*.f16"))
        latents.append(torch.cat([torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.float16) for f in files]))
    assert torch.equal(*latents)
    noise = torch.stack([torch.randn(768, 2, 2, generator=keyed_generator("pair", 0, i)) for i in range(5)])
    denoiser, _ = sample.load_denoiser(sample.load_run(trained / "ckpt.pt"), "first", "cpu")
    decay = sphere.decay(teacher["args"]["sigma"], teacher["args"]["gamma"])
    drawn = sphere.sample(denoiser, noise.shape, torch.arange(5) % 3, 4, 1.2, decay, iter([noise] * 4), null_class=3)
    assert torch.allclose(latents[0].view(300, 768, 2, 2)[:5].float(), drawn, atol=2e-3)

    sample.main(["--ckpt", str(tmp_path / "whole" / "out" / "run" / "ckpt.pt"), "--num", "6"])
    assert "1 steps of distill, guidance 1: NFE 1 a picture" in capsys.readouterr().out

    def refused(message, *argv, **more):
        with pytest.raises(SystemExit):
            run(*argv, **more)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    refused("has method distill, not sphere", "x", "1", tmp_path / "whole" / "out" / "run" / "ckpt.pt")
    refused("no checkpoint at", "x", "1", tmp_path / "nothing.pt")
    refused("does not exist", "x", "1", dataset=tmp_path / "mistyped")
    refused("--pairs 2 leaves out some of 3 classes", "x", "1", more=["--pairs", "2"])
    changed = tmp_path / "changed.pt"
    changed.write_bytes((trained / "ckpt.pt").read_bytes())
    run("again", "1", teacher=changed)
    teacher["ema"]["0.995"] = teacher["model"]
    torch.save(teacher, changed)
    refused("holds another run (teacher_sha256 ", "again", "2", changed)


# ---- The network and the run ---------------------------------------------------------------------

def test_the_network_of_the_paper_is_told_no_time():
    net, x = network(0), torch.randn(2, 4, 2, 2, generator=generator()).double()
    assert not any("t_embed" in name for name in net.state_dict())
    told, at = network(2), torch.tensor([[0.2, 0.1], [0.9, 0.0]]).double()
    one, other = told(x, Y[:2], at), told(x, Y[:2], at.flip(1))
    assert not torch.allclose(one, other)
    for net, more in ((net, [at]), (told, [at[:, :1]]), (told, [])):
        with pytest.raises((ValueError, TypeError), match="zip|argument"):
            net(x, Y[:2], *more)


@pytest.mark.parametrize("method", ["flow", "meanflow", "sphere-encoder"])
def test_a_run_resumed_equals_one_uninterrupted(method, photos, tmp_path):
    def run(name, *steps):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "photos").symlink_to(photos)
        for n in steps:
            train.main(of_method(folder, method, "--steps", n))
        return torch.load(folder / "out" / "run" / "ckpt.pt", weights_only=True)
    whole, resumed = run("whole", "4"), run("resumed", "2", "4")
    assert equal(whole["model"], resumed["model"]) and equal(whole["ema"], resumed["ema"])
    ckpt = tmp_path / "whole" / "out" / "run" / "ckpt.pt"
    sample.main(["--ckpt", str(ckpt), "--num", "6", "--steps", "2", "--npz", "--device", "cpu"])
    file = np.load(ckpt.with_name("samples.npz"))
    assert file["arr_0"].shape == (6, 32, 32, 3) and json.loads(str(file["recipe"]))["method"] == method
    sample.main(["--ckpt", str(ckpt), "--trajectory", "--steps", "2", "--device", "cpu"])


@pytest.mark.parametrize("message,argv", [
    ("--alpha-max means nothing to --method flow", ["--method", "flow", "--alpha-max", "60"]),
    ("--no-spherify means nothing to --method meanflow", ["--method", "meanflow", "--no-spherify"]),
    ("--reconstruct means nothing to --method sphere-encoder", ["--method", "sphere-encoder", "--reconstruct", "both"]),
    ("--sigma means nothing to --method flow", ["--method", "flow", "--sigma", "3"]),
    ("works on pictures: not --rae dinov2-b", ["--method", "sphere-encoder", "--rae", "dinov2-b"]),
    ("differentiates forward", ["--method", "meanflow", "--compile"]),
    ("--pairs means nothing to --method sphere", ["--pairs", "100"]),
    ("--teacher-cfg means nothing to --method sphere", ["--teacher-cfg", "2"]),
    ("--alpha-max means nothing to --method distill", ["--method", "distill", "--alpha-max", "60"]),
    ("wants a run to learn from, --init-from CKPT", ["--method", "distill"]),
    ("--cfg means nothing to --method distill", ["--method", "distill", "--init-from", "x", "--cfg", "2"]),
    ("no --cache-latents", ["--method", "distill", "--init-from", "x", "--cache-latents", "no"]),
    ("invalid choice: 'diffusion'", ["--method", "diffusion"])])
def test_flags_that_a_method_does_not_know(message, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_sampling_flags_that_a_method_does_not_know(tmp_path, capsys):
    make_photos(tmp_path / "photos", each=2)
    train.main(of_method(tmp_path, "flow", "--steps", "1"))
    ckpt = str(tmp_path / "out" / "run" / "ckpt.pt")
    for flags, name in ((["--gamma", "2"], "gamma"), (["--sigmas", "2"], "sigma"), (["--sampling-noise", "same"], "sampling-noise")):
        with pytest.raises(SystemExit) as stop:
            sample.main(["--ckpt", ckpt, "--steps", "2", *flags])
        assert stop.value.code == 2 and f"--{name}: means nothing to a run of --method flow" in capsys.readouterr().err


# ---- The paper's own alternatives (table 3) ------------------------------------------------------

def test_expected_uniform_levels():
    n = 200_000
    hi, lo = baselines.uniform_pair(n, 45.0, 89.0, 0.0, generator())         # tan 45 = 1: sigma is r
    assert (hi >= lo).all() and hi.shape == lo.shape == (n,)
    for found, expected in ((hi, 2 / 3), (lo, 1 / 3)):
        assert abs(found.double().mean() - expected) < 4 * found.std() / math.sqrt(n)


def test_sphere_encoder_levels_are_stratified():
    n = 10_000
    hi, lo = baselines.stratified_pair(n, 45.0, 89.0, 0.0, generator())
    middles = torch.arange(n) + 0.5
    # one in each n-th, but for rounding
    assert ((hi * n).sort().values - middles).abs().max() < 0.5 + 2e-3
    assert abs(hi.double().mean() - 0.5) < 1e-4 and abs(lo.double().mean() - 0.125) < 0.004
    assert (lo <= hi / 2).all()
    assert abs(torch.corrcoef(torch.stack([hi, torch.arange(n)]))[0, 1]) < 0.05                  # in no order


@pytest.mark.parametrize("name", baselines.NOISE)
def test_every_distribution_has_the_mix(name):
    hi, lo = baselines.NOISE[name].pair(50_000, alpha_max_deg=75.0, alpha_mix_deg=85.0, mix_prob=0.3,
                                        generator=generator())
    low, high = math.tan(math.radians(75)), math.tan(math.radians(85))
    assert abs((hi > low).double().mean() - 0.3) < 4 * math.sqrt(0.21 / 50_000)
    assert hi.max() <= high and (lo <= low).all() and (lo <= hi).all()


def test_eq_2_on_both_levels():
    z, eps = (torch.randn(4, 6, 4, 4, generator=generator(s)) for s in (0, 1))
    hi, lo, y = torch.full((4,), 2.0), torch.full((4,), 0.5), torch.arange(4)
    plain, (z_hi, z_lo) = sphere.training_losses(lambda v, y: 0.5 * v, z, y, hi, lo, eps)
    losses, _ = baselines.variant("sphere", reconstruct="both").training_losses(lambda v, y: 0.5 * v, z, y, hi, lo, eps)
    assert losses["reconstruction"] == (sphere.reconstruction_loss(z_hi, z) + sphere.reconstruction_loss(z_lo, z)) / 2
    assert losses["consistency"] == plain["consistency"] and losses.keys() == plain.keys()


def test_without_the_sphere_noise_is_added_and_no_more():
    z, eps = (torch.randn(2, 4, 2, 2, generator=generator(s)) for s in (0, 1))
    hi, lo, y, seen = torch.tensor([3.0, 5.0]), torch.tensor([0.5, 1.0]), torch.arange(2), []

    def denoiser(v, y):
        seen.append(v)
        return 0.5 * v
    flat = baselines.variant("sphere", spherify=False)
    losses, _ = flat.training_losses(denoiser, z, y, hi, lo, eps, eps)
    z_hi, z_lo = z + hi.view(2, 1, 1, 1) * eps, z + lo.view(2, 1, 1, 1) * eps
    assert torch.equal(seen[0], torch.cat([z_hi, z_lo]))
    assert torch.equal(seen[1], 0.5 * z_hi + hi.view(2, 1, 1, 1) * eps)
    assert losses["reconstruction"] == sphere.reconstruction_loss(0.5 * z_lo, z)
    assert losses["consistency"] == sphere.consistency_loss(0.5 * z_hi, 0.5 * z_lo)
    assert losses["latent_consistency"].item() == pytest.approx(
        (1 - torch.cosine_similarity(0.5 * seen[1].flatten(1), 0.5 * z_hi.flatten(1))).mean().item(), abs=1e-6)
    seen.clear()
    start = torch.randn(z.shape, generator=generator(3))
    found = flat.sample(denoiser, z.shape, y, 2, sigma=sphere.decay(7.0), noise=iter([start, start]))
    assert torch.equal(seen[0], 7 * start) and torch.equal(seen[1], 3.5 * start + 3.5 * start)
    assert torch.equal(found, 0.5 * seen[1])


def test_forms_of_the_decay():
    """The noise that a denoiser of zeros sees, before it is projected, is sigma_t itself."""
    def sigmas(gamma):
        seen, start = [], torch.ones(1, 4, 2, 2)
        baselines.flat_sample(lambda v, y: seen.append(v) or torch.zeros_like(v), start.shape, torch.zeros(1).long(),
                              4, sigma=sphere.decay(2.0, gamma), noise=iter([start] * 4))
        return [(v / seen[0]).mean().item() for v in seen[1:]]
    assert sigmas(1.0) == pytest.approx([0.75, 0.5, 0.25])
    assert sigmas(2.0) == pytest.approx([0.75 ** 2, 0.5 ** 2, 0.25 ** 2])
