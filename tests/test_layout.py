"""The folders of the package, in the order in which they may import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trec_twotower

PACKAGE = Path(trec_twotower.__file__).parent
FOLDERS = (
    "ops",
    "storage",
    "config",
    "distributed",
    "data",
    "model",
    "training",
    "inference",
    "index",
    "ranking",
    "evaluation",
    "serving",
    "commands",
)
TOP_LEVEL = ("__init__", "__main__", "cli", "demo", "doctor", "errors")
MAX_FILES = 12  # in one folder, `__init__.py` not counted
MAX_LINES = 450  # in one file
MAX_FUNCTION_LINES = 80
# Lines of each folder. A ceiling rises only together with a new documented capability.
CEILINGS = {
    "commands": 960,
    "config": 2680,
    "data": 12600,
    "distributed": 880,
    "evaluation": 2010,
    "index": 2640,
    "inference": 860,
    "model": 3050,
    "ops": 940,
    "serving": 1320,
    "storage": 1280,
    "training": 4600,
}
HEAVY = {"torch", "torchrec", "fbgemm_gpu", "tensordict"}
# Offline jobs on Spark or Ray hash and read features where torch is not installed.
WITHOUT_TORCH = ("ops", "storage", "config", "data/features", "data/dataset.py", "data/item_table.py", "errors.py")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """Return the folder of a module, or the name of a module at the top level."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def rank_of(room: str) -> int:
    """Return the place of a folder in the order; `errors` comes first, other top-level modules last."""
    if room == "errors":
        return -1
    return FOLDERS.index(room) if room in FOLDERS else len(FOLDERS)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below `node`, those inside functions too, but not those under TYPE_CHECKING."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from run_time_nodes(child)


def run_time_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names imported in `tree`, inside functions too, but not under TYPE_CHECKING."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


def imports_of(path: Path) -> set[str]:
    return set(run_time_imports(ast.parse(path.read_text(encoding="utf-8"))))


def all_imports_of(path: Path) -> set[str]:
    """Return the imported rooms of the package, those for type checking included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trec_twotower."):
            found.add((node.module or "").split(".")[1])
    return found


def test_the_top_level_holds_folders_and_the_listed_modules_only():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*FOLDERS, "launch", "configs"}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= set(TOP_LEVEL)


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_a_module_imports_only_folders_that_come_before_its_own(path):
    room = room_of(path)
    if room in ("cli", "__main__", "demo", "__init__"):
        return  # these start the stages and import them when needed
    later = {other for other in all_imports_of(path) if rank_of(other) > rank_of(room)}
    assert not later, f"{name_of(path)} imports {sorted(later)}, which come after {room}"


def test_the_order_is_not_vacuous():
    """The check above sees a wrong import when there is one."""
    assert rank_of("errors") < rank_of("ops") < rank_of("data") < rank_of("serving") < rank_of("cli")
    assert {"config", "errors"} <= all_imports_of(PACKAGE / "training" / "loop.py")


def test_a_folder_holds_at_most_twelve_files():
    counts = {
        name_of(folder): len([path for path in folder.glob("*.py") if path.stem != "__init__"])
        for folder in {path.parent for path in files()} - {PACKAGE}
    }
    assert {name: count for name, count in counts.items() if count > MAX_FILES} == {}


def test_a_folder_grows_only_with_its_ceiling():
    lines: dict[str, int] = {}
    for path in files():
        if path.parent != PACKAGE:
            lines[room_of(path)] = lines.get(room_of(path), 0) + len(path.read_text().splitlines())
    assert lines.keys() == CEILINGS.keys()
    assert {folder: n for folder, n in lines.items() if n > CEILINGS[folder]} == {}


def module_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports, in functions and for type checking too."""
    modules = {}
    for path in files():
        parts = ("trec_twotower", *path.relative_to(PACKAGE).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set()
        for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= inner & set(modules) or {node.module or ""}
        graph[name] = (imported & set(modules)) - {name, "trec_twotower"}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the names of one cycle, first and last the same, or nothing."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other():
    """The package itself is left out: it imports its public names when they are first used."""
    assert find_cycle(module_graph()) == []


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert len(set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}))) == 3


def test_files_and_functions_stay_small():
    long_files = {name_of(path): n for path in files() if (n := len(path.read_text().splitlines())) > MAX_LINES}
    long_functions = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert (long_files, long_functions) == ({}, {})


def test_faiss_is_imported_in_one_module():
    users = {name_of(path) for path in files() if "faiss" in {name.split(".")[0] for name in imports_of(path)}}
    assert users == {"index/backends/faiss_backend.py"}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_features_are_read_and_hashed_without_torch(room):
    place = PACKAGE / room
    for path in [place] if place.is_file() else place.rglob("*.py"):
        assert not {name.split(".")[0] for name in imports_of(path)} & HEAVY, name_of(path)


@pytest.mark.parametrize("name", sorted(set(trec_twotower.__all__) - {"__version__"}))
def test_public_names_are_defined_in_the_module_that_the_package_names(name):
    path = PACKAGE / trec_twotower._MODULE_OF[name].replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in defined
