"""What `import trec_twotower` offers, and what an installed distribution holds."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import trec_twotower

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trec_twotower"

# In a fresh process: the kind of each public name before any submodule was imported, and after all were.
KINDS = """
import importlib, inspect, json, pkgutil, warnings
warnings.simplefilter("ignore")
import trec_twotower

def kinds():
    found = {}
    for name in trec_twotower.__all__:
        scope = {}
        exec(f"from trec_twotower import {name}", scope)
        value = scope[name]
        found[name] = "class" if inspect.isclass(value) else "function" if inspect.isfunction(value) else "other"
        assert getattr(trec_twotower, name) is value, name
    return found

first = kinds()
for module in pkgutil.walk_packages(trec_twotower.__path__, "trec_twotower."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps([first, kinds()]))
"""


def test_public_names_are_the_classes_and_functions_that_their_spelling_promises():
    run = subprocess.run([sys.executable, "-c", KINDS], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    before, after = json.loads(run.stdout.splitlines()[-1])
    expected = {name: "class" if name[0].isupper() else "function" for name in trec_twotower.__all__}
    expected["__version__"] = "other"
    assert before == after == expected


def test_no_public_name_is_that_of_a_submodule():
    submodules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not submodules & set(trec_twotower.__all__)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    [checking] = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    typed = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"trec_twotower.{module}.{name}" for name, module in trec_twotower._MODULE_OF.items()}
    assert typed == lazy
    assert set(lazy) <= set(dir(trec_twotower))


# ---------------------------------------------------------------- distributions

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{0}(sys.argv[1])"
SHIPPED = ("trec_twotower", "configs", "launch", "tests", "docs", "benchmarks")


def files_below(root: Path) -> set[str]:
    """The files of the folders that belong to the project, by their paths from `root`."""
    paths = (path for name in SHIPPED for path in (root / name).rglob("*") if path.is_file())
    return {str(path.relative_to(root)) for path in paths if "__pycache__" not in path.parts}


def run(*command: object, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_says_its_version_from_an_installed_package(installed, tmp_path):
    command = [sys.executable, installed / "bin/trec-twotower", "--version"]
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    said = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, f"trec-twotower {trec_twotower.__version__}\n"), said.stderr


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution of a copy of the checkout, unpacked."""
    place = tmp_path_factory.mktemp("distribution")
    copy = place / "checkout"
    for name in SHIPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    run("-c", BUILD.format("sdist"), place, cwd=copy)
    [archive] = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(place / "unpacked", filter="data")
    [folder] = (place / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def installed(unpacked, tmp_path_factory) -> Path:
    """A folder into which pip installed the wheel that the source distribution gives."""
    place = tmp_path_factory.mktemp("installed")
    run("-c", BUILD.format("wheel"), place, cwd=unpacked)
    [wheel] = place.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place / "lib", wheel, cwd=place)
    return place / "lib"


def test_a_source_distribution_has_every_file_of_the_checkout(unpacked):
    assert files_below(ROOT) <= files_below(unpacked)
    named = ("pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
    assert all((unpacked / name).is_file() for name in named)


def test_a_wheel_has_the_package_its_types_and_what_it_ships(installed):
    package = installed / "trec_twotower"
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    found = {name for name in found if "__pycache__" not in name}
    expected = {name.removeprefix("trec_twotower/") for name in files_below(ROOT) if not name.startswith("tests/")}
    expected = {name for name in expected if not name.startswith(("docs/", "benchmarks/"))}
    assert found == expected and "py.typed" in found
    assert os.access(package / "launch/torchrun.sh", os.X_OK)


def test_an_installed_package_launches_ranks_on_a_shipped_config(installed, tmp_path):
    """In a folder that has neither launch/ nor configs/; the ranks get as far as the dataset that the config names."""
    environ = {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    where = run("-c", "import trec_twotower; print(trec_twotower.__file__)", cwd=tmp_path, **environ)
    assert where.strip() == str(installed / "trec_twotower/__init__.py")
    launch = ["-m", "trec_twotower", "launch", "--ranks", "2", "train", "demo"]
    said = subprocess.run(
        [sys.executable, *launch],
        cwd=tmp_path,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    message, end = said.stderr.splitlines()
    assert said.returncode == 3 and message.startswith("trec-twotower train: There is no dataset folder data/demo")
    assert end.startswith("torchrun: rank ") and "exit code 3" in end
