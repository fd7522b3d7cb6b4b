"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from tests.ranks.forked import Starter
from tests.ranks.launch import FATAL_BOUNDS
from tests.ranks.worlds import write_world
from tests.shop import cli, on_forked_ranks, on_ranks, shop, shop_copy, shop_tables  # noqa: F401 - fixtures

os.environ.update(FATAL_BOUNDS)
os.environ["TREC_TWOTOWER_PRECISION"] = "fp32"  # losses that are compared, on whatever processor
# A shell that starts this in the background has it ignored, which all processes started from here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("steady", deadline=None)  # compiling takes a first call longer, and no test asserts on time
settings.load_profile("steady")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """Writes a dataset folder: a part is one table, or a list of tables for several files."""

    def write(folder: Path, *, row_group_size: int | None = None, **parts: pa.Table | Sequence[pa.Table]) -> Path:
        for name, tables in parts.items():
            (folder / name).mkdir(parents=True)
            for number, table in enumerate([tables] if isinstance(tables, pa.Table) else tables):
                pq.write_table(
                    table,
                    folder / name / f"part-{number}.parquet",
                    row_group_size=row_group_size,
                    write_page_checksum=True,
                )
        return folder

    return write


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """The folder of the datasets that tests/ranks/worlds.py spells out."""
    return write_world(tmp_path_factory.mktemp("small") / "world")


@pytest.fixture(scope="session")
def starter(tmp_path_factory) -> Iterator[Starter]:
    """Starts ranks that need not import anything."""
    starter = Starter(tmp_path_factory.mktemp("said"), **FATAL_BOUNDS)
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def forked(starter) -> Callable[..., tuple[int, str]]:
    """`forked(2, "tests.ranks.cases", ...)` runs a module on two ranks; gives exit code and words."""
    return starter.run


@pytest.fixture(scope="session")
def on_one_rank(small_world, tmp_path_factory, forked) -> tuple[dict[str, Any], Path]:
    """What one rank made of all cases, and the folder of its runs."""
    return _run_cases(forked, 1, tmp_path_factory.mktemp("one"), small_world)


@pytest.fixture(scope="session")
def on_two_ranks(small_world, tmp_path_factory, on_one_rank, forked) -> tuple[dict[str, Any], Path]:
    """What two ranks made of the same cases, and of the one rank's checkpoints."""
    return _run_cases(forked, 2, tmp_path_factory.mktemp("two"), small_world, on_one_rank[1])


def _run_cases(
    forked: Callable[..., tuple[int, str]], num_ranks: int, out: Path, small_world: Path, *earlier: Path
) -> tuple[dict[str, Any], Path]:
    import torch

    code, said = forked(num_ranks, "tests.ranks.cases", small_world, out, *earlier)
    assert code == 0, said
    return torch.load(out / "results.pt", weights_only=True), out / "runs"


@pytest.fixture(scope="module")
def lone_rank() -> Iterator[Any]:
    """A job of one rank inside this process, for the tests of a module."""
    from trec_twotower.cli import _quiet
    from trec_twotower.distributed.ranks import start_ranks

    _quiet()
    with start_ranks() as ranks:
        yield ranks
