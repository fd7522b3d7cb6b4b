"""The command line called as a person calls it, and a small shop with known tastes to call it on."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

LAUNCHER = Path(__file__).resolve().parent.parent / "launch/torchrun.sh"


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one message on stderr."""
        assert "Traceback" not in self.err, self.err
        messages = [line for line in self.err.splitlines() if line.startswith("trec-twotower")]
        assert len(messages) == 1 and self.err.startswith(messages[0]), self.err
        return self.err


Call = Callable[..., Said]


@pytest.fixture(scope="session")
def cli() -> Call:
    """Runs one command in this process."""

    def call(*arguments: object) -> Said:
        from trec_twotower.cli import main

        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Said(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def on_ranks() -> Call:
    """Runs one command under launch/torchrun.sh on two ranks, each with one thread."""

    def call(*arguments: object, timeout_s: int = 120) -> Said:
        job = subprocess.run(
            [LAUNCHER, "--ranks", "2", *map(str, arguments)],
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Said(job.returncode, job.stdout, job.stderr)

    return call


@pytest.fixture(scope="session")
def on_forked_ranks(starter) -> Call:
    """As `on_ranks`, without the launcher and its time."""

    def call(*arguments: object, timeout_s: int = 120, **environ: str) -> Said:
        ended = starter.job(2, "trec_twotower", *arguments, timeout_s=timeout_s, **environ)
        return Said(ended.code, ended.out, ended.err)

    return call


SHOP_CONFIG = """
data: {dataset: shop, batch_size: 64}
tables:
  item: {buckets: 512, dim: 8}
user:
  - {name: history, kind: bag, table: item, weights: history_weight, max_length: 10}
  - {name: country, kind: category, buckets: 16, dim: 4}
  - {name: age, kind: number}
item:
  - {name: item_id, kind: id, table: item}
  - {name: colour, kind: category, buckets: 16, dim: 4}
  - {name: tags, kind: bag, buckets: 64, dim: 4}
  - {name: price, kind: number, normalize: log1p}
model: {dim: 8}
loss: {negatives: {in_batch: true, sampled: all}}
train: {epochs: 2, optimizer: {lr: 0.1}}
evaluate: {k: [5, 10], best: recall@5}
"""
COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="session")
def shop_tables() -> dict[str, pa.Table]:
    """80 users, each of whom takes six of the ten items of one colour; every id is a word.

    The first four are train rows, with those before as history, the fifth is valid/ and the sixth test/. A third of
    the users have no country, some items no tags or price.
    """
    items = [f"{colour}-{number}" for colour in COLOURS for number in range(10)]
    users = [f"user-{number}" for number in range(80)]
    taken = {
        user: [f"{COLOURS[number % 4]}-{(number // 4 + 3 * step) % 10}" for step in range(6)]
        for number, user in enumerate(users)
    }

    def rows(steps: Sequence[int]) -> dict[str, list[Any]]:
        pairs = [(user, step) for user in users for step in steps]
        history = [taken[user][:step] for user, step in pairs]
        return {
            "user_id": [user for user, _ in pairs],
            "history": history,
            "history_weight": [[1.0 + place for place in range(len(items))] for items in history],
        }

    lists = {"history": pa.list_(pa.string()), "history_weight": pa.list_(pa.float32())}

    def table(columns: dict[str, list[Any]]) -> pa.Table:
        return pa.table({name: pa.array(values, lists.get(name)) for name, values in columns.items()})

    train = rows(range(4))
    return {
        "train": table({**train, "item_id": [taken[user][step] for user in users for step in range(4)]}),
        "valid": table({**rows([4]), "positives": [[taken[user][4]] for user in users]}),
        "test": table({**rows([5]), "positives": [[taken[user][5]] for user in users]}),
        "items": pa.table(
            {
                "item_id": items,
                "title": [f"A {item.replace('-', ' no. ')}" for item in items],
                "colour": [item.split("-")[0] for item in items],
                "tags": [None if number % 7 == 0 else [f"t{number % 5}", f"t{number % 3}"] for number in range(40)],
                "price": [None if number % 9 == 0 else 1.0 + number for number in range(40)],
            }
        ),
        "users": pa.table(
            {
                "user_id": users,
                "country": [None if number % 3 == 0 else ("NO", "US")[number % 2] for number in range(80)],
                "age": [None if number % 10 == 0 else 20.0 + number % 50 for number in range(80)],
            }
        ),
    }


@dataclass(frozen=True)
class Shop:
    """The shop on disk, and a run that was trained on it, exported and indexed; not to be changed by a test."""

    dataset: Path
    config: Path
    run: Path


@pytest.fixture(scope="session")
def shop(
    tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., Path], shop_tables: dict[str, pa.Table], cli
) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    shop = Shop(write_dataset(folder / "shop", **shop_tables), folder / "shop.yaml", folder / "run")
    shop.config.write_text(SHOP_CONFIG.replace("dataset: shop", f"dataset: {shop.dataset}"))
    for command in (("train", shop.config, f"run_dir={shop.run}"), ("export", shop.run), ("index", shop.run)):
        said = cli(*command)
        assert said.code == 0, said.err
    return shop


@pytest.fixture
def shop_copy(shop: Shop, tmp_path: Path) -> Shop:
    """The shop's run again, to be damaged."""
    return replace(shop, run=Path(shutil.copytree(shop.run, tmp_path / "run")))
