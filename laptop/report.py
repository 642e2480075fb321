"""How a run is judged without FID: the quality report at the end of train.py. Not the paper's.

    python -m laptop.report out/RUN/ckpt.pt                    # the report again
    python -m laptop.report out/RUN/ckpt.pt HELDOUT            # against other pictures
    python -m laptop.report out/RUN/ckpt.pt --steps 2 4 --cfg 1

HELDOUT is a folder with the class folders of the run and none of its pictures. Distances are
Frechet distances on the last features of small networks; they are not FID.
"""
import contextlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines import METHODS
from data import DATASETS, load_dataset
from fid import NETWORKS, frechet_of_features, principal_components
from rae import AUTOENCODERS, load_rae, picture_sides
from sample import draw, load_denoiser, load_run, sampling_settings
from utils.cli import ArgumentParser, UserError, number, same_names, table_text
from utils.files import write_json
from utils.images import few, resize, to_float, to_uint8
from utils.processes import allow_tf32, note, setup, user_errors


class Features:
    """A small network's last features, brought to 64 principal components of a reference. Not FID.

    network(images): uint8 (b, 3, H, W) -> (b, D) float64, as fid.NETWORKS makes them.
    """

    def __init__(self, name, network):
        self.name, self.network = name, network

    def last(self, images):
        """uint8 (b, 3, H, W) -> (b, D)"""
        return torch.cat([self.network(part) for part in images.split(500)])

    def fit(self, last, labels=None):
        """The components of the reference's features (N, D); with labels a logistic regression."""
        self.mean, self.components = principal_components(last)
        if labels is not None:
            x = self.project(last)
            self.scale = x.std(0) + 1e-9
            self.weight = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=torch.float64)
            self.bias = torch.zeros_like(self.weight[0])
            weights = [self.weight.requires_grad_(), self.bias.requires_grad_()]
            optimizer = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

            def loss():
                optimizer.zero_grad()
                value = F.cross_entropy(self.logits(x), labels) + 1e-3 * self.weight.square().sum()
                value.backward()
                return value
            optimizer.step(loss)
        return self

    def project(self, last):
        return (last - self.mean) @ self.components           # (N, 64)

    def logits(self, projected):
        return projected / self.scale @ self.weight + self.bias

    def accuracy(self, projected, labels):
        """Share of pictures that the regression takes for their class."""
        return (self.logits(projected).argmax(1) == labels).double().mean().item()


def diversity(images, labels):
    """Root-mean-square distance, in grey levels of 255, between two pictures of one class; mean
    over classes. None where no class has two."""
    distances = [torch.pdist(images[labels == c].flatten(1).float()).mean()
                 for c in labels.unique() if (labels == c).sum() > 1]
    if not distances:
        return None
    return (torch.stack(distances).mean() / images[0].numel() ** 0.5).item()


def quality_report(train_set, test_set, rae, sampler, features="lite0", n=500, most=10_000,
                   steps_of_rows=(1, 2, 4, 8)):
    """Rows of pictures against the training pictures -> a list of dicts, one a row.

    At most n pictures a row, with the labels of as many of test_set, each class its share (of many
    classes some, and then of the training pictures, too): held-out ones (the floor), these
    reconstructed, the mean latent of each one's class, a Gaussian of the class's latents (to beat),
    and sampler(indices, labels, steps=steps) -> uint8. Where test_set is None the training pictures
    stand in for held-out ones. Of the training pictures `most` are taken. UserError: too few.
    """
    if features not in NETWORKS:
        raise UserError(f"there are no features called {features}: fid.NETWORKS has "
                        f"{', '.join(NETWORKS)}")
    kind, test_set = ("held-out", test_set) if test_set else ("training", train_set)
    if not same_names(test_set.classes, train_set.classes):
        raise UserError(f"{test_set.name} has other classes than {train_set.name}")
    for some in (test_set, train_set):
        counts = torch.bincount(some.labels, minlength=len(train_set.classes))
        if counts.min() < 2:
            raise UserError(f"{some.name} has {counts.min()} of {len(some.labels)} pictures in the "
                            f"class {train_set.classes[counts.argmin()]}: the quality report needs "
                            "two or more")
    g = torch.Generator().manual_seed(0)
    test_chosen, by_class = shares(test_set.labels, n), test_set.labels.argsort(stable=True)
    if len(test_chosen) > n:                                  # rounded up: some classes, evenly
        test_chosen = by_class[((torch.arange(n) + 0.5) * len(by_class) / n).long()].sort().values
    labels, S = test_set.labels[test_chosen], rae.image_size
    classes = labels.unique()
    if len(classes) < len(train_set.classes):
        note(f"{len(labels)} pictures a row are of {len(classes)} of the "
             f"{len(train_set.classes)} classes")
    order = torch.randperm(len(train_set.labels), generator=g)
    order = order[torch.isin(train_set.labels[order], classes)]
    chosen = order[shares(train_set.labels[order], most)].sort().values
    train_labels = train_set.labels[chosen]
    if (fewer := min(len(labels), len(chosen))) <= 64:
        note(few(fewer, 64))

    def compared(images):                                     # all are compared at S x S
        return images if images.shape[2] == S else to_uint8(resize(images, S) / 255)

    train = torch.zeros(len(chosen), 3, S, S, dtype=torch.uint8)
    rows = {name: torch.zeros(len(labels), 3, S, S, dtype=torch.uint8) for name in (
        f"{kind} ({'the' if kind == 'held-out' else 'no'} floor)", f"{kind}, reconstructed",
        "class-mean latent", "per-class Gaussian of latents")}
    g = torch.Generator().manual_seed(0)
    for c in tqdm(classes, desc="training pictures", unit="class", leave=False, disable=None):
        latents = []
        for part in (train_labels == c).nonzero().flatten().split(64):
            images = train_set.load(chosen[part])
            train[part] = compared(images)
            latents.append(rae.encode(to_float(images.to(rae.device))))
        latents = torch.cat(latents)                          # (n_c, C, h, w)
        mean = latents.mean(0, keepdim=True)
        for part in (labels == c).nonzero().flatten().split(64):
            images = test_set.load(test_chosen[part])
            z = rae.encode(to_float(images.to(rae.device)))
            # mean + sum_i w_i (z_i - mean) / sqrt(n_c - 1) has the covariance of the latents z_i.
            w = torch.randn(len(part), len(latents), generator=g).to(z) / (len(latents) - 1) ** 0.5
            gaussian = mean + torch.tensordot(w, latents - mean, 1)
            decoded = (to_uint8(rae.decode(latent)).cpu() for latent in (z, mean, gaussian))
            for row, pictures in zip(rows.values(), (compared(images), *decoded)):
                row[part] = pictures
    for steps in steps_of_rows:
        images = sampler(torch.arange(len(labels)), labels, steps=steps)
        rows[f"{steps} step{'s'[:steps > 1]}"] = images

    table = [{"pictures": name} for name in rows]
    networks = NETWORKS[features](train, train_labels, rae.device)
    for i, (name, network) in enumerate(networks.items()):
        space = Features(name, network)
        last = space.last(train)
        reference = space.fit(last, None if i else train_labels).project(last)
        for line, images in zip(table, rows.values()):
            x = space.project(space.last(images))
            line[f"frechet_{name}"] = frechet_of_features(reference, x)
            if i == 0:
                line["accuracy"] = space.accuracy(x, labels)
                line["diversity"] = diversity(images, labels)
    return table


def shares(labels, n):
    """Indices, in order, of n pictures or a few more, of each class its share, rounded up; two at
    least."""
    n = min(n, len(labels))
    of_classes = [(labels == c).nonzero().flatten() for c in labels.unique()]
    return torch.cat([i[:max(2, -(-n * len(i) // len(labels)))] for i in of_classes]).sort().values


def report_text(table, run, step):
    formats = {"accuracy": ".2f", "diversity": ".1f", "frechet_lite0": ".1f",
               "frechet_classifier": ".3f", "frechet_pixels": ".3f"}
    return (f"step {step}, {run['method']}, guidance {run['cfg']:g}; distances to the training "
            f"pictures, not FID\n{table_text(table, formats)}")


def report_of_run(path, held_out=None, features=None, data_dir="datasets", batch_size=50,
                  device="cpu", steps=None, cfg=None):
    """The report of a checkpoint -> table, its settings, its step, the held-out pictures."""
    checkpoint = load_run(path)
    run, classes = checkpoint["args"], checkpoint["classes"]
    if run["dataset"] not in DATASETS and not Path(run["dataset"]).exists():
        raise UserError(f"the pictures of the run, its --dataset {run['dataset']}, are not found "
                        f"from {Path.cwd()}: start from the folder in which it was trained")
    if cfg not in (None, 1) and "cfg" not in METHODS[run["method"]].flags:
        raise UserError(f"--cfg: means nothing to a run of --method {run['method']}")
    run["cfg"] = run["cfg"] if cfg is None else cfg
    rae = load_rae(checkpoint["rae"], device, run["weights_dir"])
    sides = picture_sides(rae.name, rae.image_size, run["rae_patch"])
    train_set = load_dataset(run["dataset"], *sides, data_dir, run["split"], run["skip_bad"])
    if train_set.recipe != run["pictures"]:
        raise UserError(f"the pictures of {run['dataset']} are not those of the run: they are the "
                        "report's reference")
    test_set = held_out_set(run["dataset"], sides[0])
    if held_out:
        test_set = load_dataset(held_out, *sides, data_dir, skip_bad=run["skip_bad"])
        check_held_out(held_out, test_set, train_set, classes)
    denoiser, _ = load_denoiser(checkpoint, "first", device)
    sampler = partial(draw, denoiser, rae, seed=run["seed"], null_class=len(classes),
                      batch_size=batch_size, **sampling_settings(run))
    table = quality_report(train_set, test_set, rae, sampler,
                           features or AUTOENCODERS[rae.name].features, run["report"] or 500,
                           steps_of_rows=steps or (1, 2, 4, 8))
    return table, run, checkpoint["step"], test_set


def end_of_run(out, run, dataset, rae, sampler, step):
    """Prints the report of a run that has ended, and keeps it; unless that was done before."""
    quality = out / "quality.json"
    if not run["report"]:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        if (json.loads(quality.read_text())["step"] == step
                and quality.stat().st_mtime >= (out / "ckpt.pt").stat().st_mtime):
            return
    allow_tf32(False)                                         # the training's
    side, _ = picture_sides(rae.name, rae.image_size, run["rae_patch"])
    try:
        test_set = held_out_set(dataset.recipe.get("dataset"), side)
        table = quality_report(dataset, test_set, rae, sampler, AUTOENCODERS[rae.name].features,
                               run["report"])
        print(report_text(table, run, step))
        keep(out, table, run, step, test_set)
    except UserError as error:                                # the run is whole all the same
        print(f"no quality report: {error}")


def keep(out, table, run, step, test_set):
    """quality.json: the rows, the step and the pictures that they are of."""
    against = test_set.recipe if test_set else "none: training pictures stand in for held-out ones"
    write_json(out / "quality.json", {"step": step, "training pictures": run["pictures"],
                                      "held-out pictures": against, "rows": table})


def held_out_set(dataset, image_size):
    """Pictures like those of a data set, but none of them, where there are such without asking."""
    return DATASETS[dataset].held_out(image_size) if dataset in DATASETS else None


def check_held_out(held_out, test_set, train_set, classes):
    if not same_names(test_set.classes, classes):
        raise UserError(f"{held_out} has the classes {', '.join(test_set.classes)[:100]}, not "
                        f"the run's, {', '.join(classes)[:100]}")
    n = np.isin(*(getattr(some, "sums", ()) for some in (test_set, train_set))).sum()
    if n == len(test_set.labels):
        raise UserError(f"{held_out} holds training pictures of the run, and no others: give "
                        "others, of the same classes")
    if n:
        print(f"report.py: warning: {n} of {len(test_set.labels)} pictures of {held_out} are "
              "training pictures of the run", file=sys.stderr)


@user_errors
def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("ckpt", help="the ckpt.pt of a run")
    add("held_out", nargs="?", help="a folder of the run's classes, of pictures that it never saw")
    add("--features", choices=NETWORKS,
        help="of which networks (default: those that go with the run's autoencoder)")
    add("--steps", type=number(int, 1), nargs="+", help="one row each (default: 1 2 4 8)")
    add("--cfg", type=number(float, 0), help="guidance, in place of the run's own")
    add("--json", action="store_true", help="print the rows as JSON")
    add("--batch-size", type=number(int, 1, 10 ** 6), default=50, help="pictures at once")
    add("--data-dir", default="datasets", help="where data sets are")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)
    table, run, step, test_set = report_of_run(
        args.ckpt, args.held_out, args.features, args.data_dir, args.batch_size,
        setup(args.device)[2], args.steps, args.cfg)
    print(json.dumps(table) if args.json else report_text(table, run, step))
    if args.steps is None and args.cfg is None:               # else it is not the run's own
        keep(Path(args.ckpt).parent, table, run, step, test_set)


if __name__ == "__main__":
    main()
