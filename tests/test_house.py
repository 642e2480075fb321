"""The layout: imports run downward, and laptop/ can be deleted."""
import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FLOORS = [{"utils", "utils.cli"}, {"utils.processes"}, {"utils.files"}, {"utils.images", "utils.checkpoint"},
          {"sphere", "model"}, {"laptop.toy"}, {"data", "laptop.lite0"}, {"rae"}, {"baselines"}, {"settings"},
          {"sample", "fid"}, {"laptop.report"}, {"train"}, {"flops", "explore"}]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("laptop/*.py")]}
LAPTOP = {"laptop.toy", "laptop.lite0", "laptop.report"}


def own_imports(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in FILES)


def test_every_file_has_its_floor():
    assert FLOOR.keys() - FILES.keys() in (set(), LAPTOP) and FILES.keys() <= FLOOR.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downward_and_stand_at_the_top(name):
    tree = ast.parse(FILES[name].read_text())
    assert all(FLOOR[other] < FLOOR[name] for other in own_imports(tree) if other != "utils")
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            assert not list(own_imports(function)), function.name
            if isinstance(function, ast.FunctionDef):
                assert function.end_lineno - function.lineno < 80, function.name
    assert max(map(len, FILES[name].read_text().splitlines()), default=0) <= 100


def test_what_stands_alone():
    """sphere.py is tensors alone, model.py, too; of ours fid.py needs utils and data."""
    for name, may in (("sphere", ()), ("model", ()), ("fid", ("utils", "data"))):
        lines = [line for line in FILES[name].read_text().splitlines() if not line.endswith("# laptop")]
        assert all(other.split(".")[0] in may for other in own_imports(ast.parse("\n".join(lines)))), name


@pytest.mark.skipif(not (ROOT / "laptop").exists(), reason="laptop/ is not there")
def test_laptop_can_be_deleted(tmp_path):
    """As the README says: both folders, and the lines that end in `# laptop`. What is left passes its tests
    (here two files of them; SLOW=1: all)."""
    for path in ROOT.glob("*.py"):
        kept = [line for line in path.read_text().splitlines() if not line.endswith("# laptop")]
        (tmp_path / path.name).write_text("\n".join(kept) + "\n")
        assert not re.search(r"\b(toy|lite0|report)\.\w|import.* laptop|laptop\.", re.sub(
            "python -m laptop.report|laptop/report.py|report.json", "", "\n".join(kept))), path
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("laptop", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_stripped.py").write_text(
        "import train\n\n\ndef test_stripped():\n    args = train.parse_args([])\n"
        "    assert (args.dataset, args.rae, args.alpha_max) == ('flowers', 'dinov2-b', 85.0)\n"
        "    assert args.out_dir == 'out/flowers-SiT-B-1'\n")
    some = ["test_stripped.py", "test_sphere.py", "test_house.py", "test_sample.py::test_one_class_trains_and_samples"]
    some = [""] if os.environ.get("SLOW") else some
    found = subprocess.run([sys.executable, "-m", "pytest", "-x", *(f"tests/{name}" for name in some)],
                           cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "SLOW": ""})
    assert found.returncode == 0, found.stdout[-3000:]
