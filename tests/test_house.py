"""The layout: imports run downward, and laptop/ can be deleted."""
import ast
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FLOORS = [{"common"}, {"sphere", "model", "laptop.toy"},
          {"laptop.lite0", "data", "baselines"}, {"rae"}, {"sample"},
          {"fid"}, {"train"}, {"flops"}]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("laptop/*.py")]}


def own_imports(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in FILES)


def test_every_file_has_its_floor():
    assert FILES.keys() == FLOOR.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_imports_run_downward_and_stand_at_the_top(name):
    tree = ast.parse(FILES[name].read_text())
    assert all(FLOOR[other] < FLOOR[name] for other in own_imports(tree))
    assert not any(name.startswith("laptop") and other in ("data", "rae")
                   for other in own_imports(tree))
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            assert not list(own_imports(function)), function.name
            if isinstance(function, ast.FunctionDef):
                assert function.end_lineno - function.lineno < 80, function.name
    assert max(map(len, FILES[name].read_text().splitlines())) <= 100


def test_laptop_can_be_deleted(tmp_path):
    """As the README says: the folder, and the lines that end in `# laptop`."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
        kept = [line for line in path.read_text().splitlines() if not line.endswith("# laptop")]
        (tmp_path / path.name).write_text("\n".join(kept) + "\n")
        assert not re.search(r"\b(toy|lite0)\.\w|import.* laptop|laptop\.", "\n".join(kept)), path
    code = ("import data, fid, flops, rae, sample, train; args = train.parse_args([]); "
            "print(args.dataset, args.rae, args.alpha_max, rae.picture_sides(args.rae, 256))\n"
            "try: fid.quality_report(None, None, None, None)\n"
            "except fid.UserError as error: print(error)")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                           text=True)
    assert found.stdout == ("flowers dinov2-b 85.0 (256, 1)\n"
                            "there are no features called lite0 here\n"), found.stderr
