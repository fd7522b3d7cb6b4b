"""What `import trec_twotower` offers, and what an installed distribution holds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

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
