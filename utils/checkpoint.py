"""Tensors on the disk, looked at before they are believed: checkpoints, other people's weights.

Look here to see what a checkpoint is checked for, and how tensors with other names are loaded.
"""
import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.cli import UserError, fits, one_line, same_letters, same_names
from utils.files import write_whole


def save_tensors(path, state):
    """Into a folder that is locked: what a killed save left there is written over."""
    path = Path(path)
    with write_whole(path, path.with_name(f".part-{path.name}")) as part, open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())                               # before it takes the old one's place


def load_tensors(path, complaint):
    """What torch.save wrote, on the CPU; else UserError, e.g. `path` "is not a checkpoint"."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such file")
        if zipfile.is_zipfile(path):                          # torch.load never looks at the sums
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                # no zip, no tensors, a pickle
        raise UserError(f"{path} {complaint} ({one_line(error)})") from error


# A run's checkpoint, as train.py writes it.
CHECKPOINT = {"model": dict, "ema": dict, "optimizer": dict, "step": int, "args": dict,
              "classes": list, "rae": dict}


def load_checkpoint(path, check=lambda checkpoint: None):
    """What train.py saved, on the CPU: a dict of tensors and plain values.

    check: a function of it, whose errors say why it cannot be used.
    """
    if not Path(path).is_file():
        inside = Path(path) / "ckpt.pt"
        raise UserError(f"{path} is a folder: give {inside}" if inside.exists() else
                        f"there is no checkpoint at {path}")
    checkpoint = load_tensors(path, "cannot be used: it is not a checkpoint of train.py")
    try:
        for key, kind in CHECKPOINT.items():
            if not isinstance(checkpoint.get(key), kind):
                raise ValueError(f"{key!r} is missing, or of another type")
        if not checkpoint["classes"] or not all(isinstance(c, str) for c in checkpoint["classes"]):
            raise ValueError("classes are no names")
        if checkpoint["step"] < 0:
            raise ValueError(f"step {checkpoint['step']}")
        if name := first_not_finite(checkpoint):
            raise ValueError(f"{name} is not finite")
        check(checkpoint)
    except Exception as error:                                # a file may hold anything
        what_now = "; if older code wrote it, use that, or train anew"    # load_state_dict's
        raise UserError(f"{path} cannot be used: {one_line(error)}"
                        + what_now * isinstance(error, RuntimeError)) from error
    return checkpoint


# Of checkpoints: what the oldest have, and what older code could also do, with what is done now.
ALWAYS = ("dataset", "split", "skip_bad", "rae_patch", "model", "dtype", "seed", "ema_decay", "cfg",
          "gamma", "sigma", "sampling_noise", "sample_steps")
GONE = {"pair_noise": "one", "decay": "power", "guidance": "linear"}


def completed(args, settings):
    """A checkpoint's settings, with those that came later. settings: as settings.SETTINGS.
    ValueError: nobody could have given them, or this code cannot do what they ask for."""
    if not isinstance(args.get("pictures"), dict):
        raise ValueError("'pictures' is missing, or of another type")
    for name, now in GONE.items():
        if args.get(name, now) != now:
            raise ValueError(f"{name} {args[name]!r}: this code knows only {now!r}")
    if missing := [name for name in ALWAYS if name not in args]:
        raise ValueError(f"{missing[0]!r} is missing")
    args = {**{name: setting.value for name, setting in settings.items()}, **args}
    for name, setting in settings.items():
        optional = name == "epochs" or setting.value is None and name != "sigma"
        if not (args[name] is None and optional or fits(args[name], setting.given)):
            raise ValueError(f"{name} {args[name]!r} is nothing that anybody could have given")
    return args


def check_weights(checkpoint, model):
    """ValueError: weights, averages or Adam's state are not of this model."""
    expected = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    for name, state in (("model", checkpoint["model"]), *checkpoint["ema"].items()):
        if {key: (value.shape, value.dtype) for key, value in state.items()} != expected:
            raise ValueError(f"the weights {name} are not those of {checkpoint['args']['model']} "
                             f"for {len(checkpoint['classes'])} classes")
    averages = checkpoint["args"]["ema_decay"]
    if not checkpoint["ema"] or list(checkpoint["ema"]) != list(map(str, averages)):
        raise ValueError(f"averages of {list(checkpoint['ema'])}, not of {averages}")
    check_moments(checkpoint["optimizer"], (p for p in model.parameters() if p.requires_grad))


def refuse_another_run(out, run, idle, before, recipe, what_changed):
    """UserError: the checkpoint in `out` is of other settings or pictures.

    run: the settings that define a run, but for those that are idle, whose defaults may have
    changed; before: those of the checkpoint; recipe: of the pictures.
    """
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in run.items()
               if before.get(name) != value and name not in idle]
    if before["pictures"] != recipe and not changed:
        changed = [what_changed()]
    if changed:
        raise UserError(f"{out} holds another run ({'; '.join(changed)}): resume that, or give a "
                        "new --out-dir")


def refuse_another_start(path, init, run, classes):
    """UserError: the checkpoint `init` is of another kind than the run that starts from it."""
    names = ("method", "model", "rae", "rae_patch", "image_size", "spherify", "ema_decay")
    distills = run["method"] == "distill"
    if distills:                                # all its averages begin as the first of the teacher
        run = {**run, "method": "sphere", "ema_decay": init["args"]["ema_decay"]}
    other = [f"{name} {init['args'][name]}, not {run[name]}" for name in names
             if init["args"][name] != run[name]]
    if distills and not same_names(init["classes"], classes):
        other.append("other classes")
    if other:
        raise UserError(f"--init-from {path} has {'; '.join(other)}")


def start_weights(checkpoint, run, classes):
    """What a run begins with that starts from a checkpoint: weights and averages.

    Of other classes one of the same name keeps its embedding, any other begins at the mean of all,
    and the last is still that of no class. A student begins as the first average, its teacher.
    """
    names = [same_letters(name) for name in checkpoint["classes"]]
    model, averages = checkpoint["model"], checkpoint["ema"]
    if run["method"] == "distill":
        model = next(iter(averages.values()))
        averages = {str(decay): model for decay in run["ema_decay"]}

    def changed(state):
        def table(old):                                       # (classes + 1, D)
            known, new = dict(zip(names, old)), old[:-1].mean(0)
            rows = [known.get(same_letters(name), new) for name in classes]
            return torch.stack([*rows, old[-1]])
        return {key: table(value) if key.endswith("y_embedder.weight") else value
                for key, value in state.items()}
    return {"model": changed(model), "ema": {key: changed(ema) for key, ema in averages.items()}}


def hash_of(tensors, start=b""):
    """A hash of a dict of tensors, with their names."""
    digest = hashlib.sha256(start)
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(tensors):
    """The name of a tensor of nested dicts that has a NaN or an infinity; None if there is none."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            if found := first_not_finite(value):
                return f"{name} {found}"
        elif isinstance(value, torch.Tensor) and not value.isfinite().all():
            return str(name)


def check_moments(optimizer, parameters):
    """ValueError: Adam's state is not of these parameters; the fused one would crash on it."""
    for i, parameter in enumerate(parameters):
        state, shape = optimizer["state"][i], parameter.shape
        for key, expected in (("exp_avg", shape), ("exp_avg_sq", shape), ("step", ())):
            if (state[key].shape, state[key].dtype) != (expected, torch.float32):
                raise ValueError(f"the optimizer's {key} {i} has another shape or type")


def load_renamed(module, state, renamings):
    """Strictly loads tensors that have other names. ValueError names what is wrong.

    renamings: (pattern, replacement) in order, from the module's names to the file's. A name with
    "qkv" is three of the file, query, key and value, one below the other.
    """
    loaded, unexpected = {}, set(state)
    for name, tensor in module.state_dict().items():
        theirs, shape = name, tuple(tensor.shape)
        for pattern, replacement in renamings:
            theirs = re.sub(pattern, replacement, theirs)
        keys = [theirs]
        if "qkv" in theirs:
            keys = [theirs.replace("qkv", part) for part in ("query", "key", "value")]
            shape = (shape[0] // 3, *shape[1:])
        for key in keys:
            if key not in state:
                raise ValueError(f"missing: {key}")
            if tuple(state[key].shape) != shape:
                raise ValueError(f"of another shape: {key} {tuple(state[key].shape)}, not {shape}")
        unexpected -= set(keys)
        loaded[name] = torch.cat([state[key] for key in keys]) if len(keys) > 1 else state[theirs]
    if unexpected:
        raise ValueError(f"unexpected: {', '.join(sorted(unexpected)[:5])}")
    module.load_state_dict(loaded, assign=True)
