"""Who may import whom: every module only what stands above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trec_twotower

PACKAGE = Path(trec_twotower.__file__).parent

# A package stands where its __init__ does: behind its parts, which it may import.
LAYERS = """
    errors storage storage.package_files yaml_files schema config same_run files memory faults lock preemption
    shared_memory distributed heartbeat
    data data.kernels data.words data.hashing data.lists data.probing data.numbers data.times
    data.arrow_types data.table_formats data.vocabulary data.vectors data.text data.transforms data.value_digests
    data.parquet_files data.dataset
    data.cache_folder data.arrays data.catalogue data.features data.coverage data.held_out
    data.known_items
    data.batch data.examples data.item_lists data.negatives data.order data.packed data.cache data.reader data.step_rows
    data.candidates
    data.interactions
    data.table_formats
    data.stream
    data.sources.options data.sources.writer data.sources.id_lines data.sources.synthetic_words
    data.sources.synthetic_reach data.sources.synthetic data.sources.gowalla data.sources.amazon_beauty
    data.sources.raw_text data.sources.event_files data.sources.event_splits data.sources.event_log
    data.sources.table_options data.sources.csv_files data.sources.json_files data.sources.table_files
    data.sources.column_sql data.sources.table_columns data.sources.id_columns data.sources.time_columns
    data.sources.typed_tables data.sources.event_options data.sources.events data.sources.summary data.sources.ratings
    data.sources.amazon_reviews data.sources.movielens data.sources.goodbooks data.sources
    model model.narrow model.parts model.embedding model.list_sums model.inputs model.sequence model.tower
    model.temperature model.frequency
    model.losses.cells model.losses.relations
    model.losses.blocks model.losses.contrastive model.losses.pointwise model.losses.pairwise
    model.losses.graded model.losses.mixture model.losses model.losses.regularisers model.queue model.gate model.watch
    model.interests model.two_tower
    cpu_updates optimizer sharding spectral plan checkpoint_storage checkpoint encode run failures refresh pipeline
    training.loop training export program encoder
    metrics exhaustive index.engine index.list_scan index.probing index.recipe index.scan index.filters index.search
    index.tuning index.build index.neighbours index
    catalogue_index baselines slices sampled evaluate rerank serving.user_state serving serve server report
    torchrun doctor demo cli_output cli_parser cli __main__
    train export program encoder
    metrics index.faiss_backend index.matrix index.exact index.recipe index.filters index.shard index.gpu index.searcher
    index.kinds index.search index.training index.tuning index.build index.neighbours index
    baselines slices sampled evaluate rerank serve server report
    torchrun doctor demo cli __main__
"""
ORDER = LAYERS.split()
LAZY = {"schema", "cli", "demo"}  # their imports inside functions may name anything
OFFLINE = ["errors", "storage", "storage.package_files", "yaml_files", "schema", "config", "same_run", "files"]
WITHOUT_TORCH = set(OFFLINE) | {
    f"data.{part}"
    for part in (
        "kernels",
        "words",
        "hashing",
        "lists",
        "probing",
        "arrow_types",
        "table_formats",
        "parquet_files",
        "numbers",
        "times",
        "vocabulary",
        "vectors",
        "text",
        "transforms",
        "value_digests",
        "dataset",
        "cache_folder",
        "arrays",
        "catalogue",
    )
}
HEAVY = {"torch", "torchrec", "fbgemm_gpu", "tensordict"}


def path_of(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> set[str]:
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    return names - {"__init__"}


def imports(module: str, *, lazy: bool = True) -> Iterator[str]:
    """The dotted names a module imports at run time; without `lazy`, only those at its top."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield node.module or ""
            if node.module and node.module.split(".")[0] == "trec_twotower":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path_of(module).read_text(encoding="utf-8")))


def own_imports(module: str) -> set[str]:
    found = {name.removeprefix("trec_twotower.") for name in imports(module, lazy=module not in LAZY)}
    return found & set(ORDER)


def test_every_module_has_its_place_in_the_order():
    assert len(ORDER) == len(set(ORDER))
    missing = modules() - set(ORDER)
    assert not missing, f"give {sorted(missing)} a place in ORDER: below what they import, above what imports them"
    assert not set(ORDER) - modules(), "ORDER names modules that are gone"


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_above_it(module):
    below = [name for name in own_imports(module) if ORDER.index(name) >= ORDER.index(module)]
    assert not below, f"{module} imports {below}, which stand below it"


def test_one_module_imports_faiss():
    users = {module for module in modules() if "faiss" in {name.split(".")[0] for name in imports(module)}}
    assert users == {"index.faiss_backend"}


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_words_settings_and_readers_need_no_torch(module):
    """Offline jobs on Spark or Ray use them where no torch is installed."""
    assert not {name.split(".")[0] for name in imports(module)} & HEAVY
    assert own_imports(module) <= WITHOUT_TORCH


@pytest.mark.parametrize("name", sorted(set(trec_twotower.__all__) - {"__version__"}))
def test_the_table_of_contents_names_what_is_there(name):
    module = trec_twotower._MODULE_OF[name]
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in defined
