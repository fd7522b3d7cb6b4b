"""Tables that somebody else has written, odd or broken in one way each, with the rule docs/data.md gives it."""

from __future__ import annotations

import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.soak.jobs import Job, in_child
from tests.soak.scenarios import Soak, Tally
from tests.soak.world import config, write_config
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.parquet_files import footer_digest

FINE = ""  # it is read, and every loss is finite
CHUNK = 100  # cases in one process, so that one that crashes is told from the others
LARGEST, LEAST = 2**63 - 1, -(2**63)


@dataclass
class World:
    """The tables of one case, while they are made: a list of files for each part."""

    drawn: random.Random
    train: list[pa.Table]
    items: list[pa.Table]
    item_ids: list[int]
    options: dict[str, Any]  # of the writer
    is_described: bool  # by a dataset.yaml with digests of the footers
    nan: str = "error"  # the number feature's rule
    after: Callable[[Path], None] | None = None  # what befalls the folder once it is written

    def change(self, column: str, how: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> None:
        """One file's values of a column of train."""
        file = self.drawn.randrange(len(self.train))
        table = self.train[file]
        values = how(table[column].to_pylist())
        place = table.column_names.index(column)
        made = pa.array(values, kind or table.schema.field(column).type)
        self.train[file] = table.set_column(place, column, made)

    def plant(self, column: str, value: Any, kind: pa.DataType | None = None) -> None:
        """The value in some row of one file."""

        def how(values: list[Any]) -> list[Any]:
            values[self.drawn.randrange(len(values))] = value
            return values

        self.change(column, how, kind)

    def everywhere(self, part: str, how: Callable[[pa.Table], pa.Table]) -> None:
        setattr(self, part, [how(table) for table in getattr(self, part)])


def whole(drawn: random.Random) -> World:
    """A world in which all is as it should be, differently each time."""
    item_ids = drawn.sample(range(1, 120), drawn.randrange(8, 20))
    num_rows = drawn.randrange(26, 60)
    train = pa.table(
        {
            "user_id": pa.array([drawn.randrange(99) for _ in range(num_rows)], pa.int64()),
            "item_id": pa.array(drawn.choices(item_ids, k=num_rows), pa.int64()),
            "number": pa.array([drawn.gauss(3, 2) for _ in range(num_rows)], pa.float64()),
            "history": pa.array(
                [drawn.choices(item_ids, k=drawn.randrange(5)) for _ in range(num_rows)], pa.list_(pa.int64())
            ),
            "country": pa.array([drawn.choice([49, 33, 81]) for _ in range(num_rows)], pa.int64()),
        }
    )
    items = pa.table({"item_id": pa.array(item_ids, pa.int64()), "brand": [drawn.choice("abc") for _ in item_ids]})
    cut = drawn.randrange(5, num_rows - 5)
    options = {
        "row_group_size": drawn.choice([3, 7, 16, 1000]),
        "write_page_checksum": True,
        "compression": drawn.choice(["snappy", "zstd", "gzip", "none"]),
        "data_page_version": drawn.choice(["1.0", "2.0"]),
        "use_dictionary": drawn.random() < 0.7,
    }
    return World(drawn, [train[:cut], train[cut:]], [items], item_ids, options, drawn.random() < 0.5)


def _cast(table: pa.Table, column: str, kind: pa.DataType) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, table[column].cast(kind))


def _column(part: str, column: str, make: Callable[[pa.Table], Any]) -> Callable[[World], None]:
    """A part whose every file has the column otherwise."""

    def change(world: World) -> None:
        world.everywhere(part, lambda table: table.set_column(table.column_names.index(column), column, make(table)))

    return change


def _further(column: str, kind: pa.DataType) -> Callable[[World], None]:
    """One file more, which has the column in another type."""
    return lambda world: world.train.append(_cast(world.train[0], column, kind))


def _damage(part: str, how: Callable[[bytes, random.Random], bytes]) -> Callable[[World], None]:
    def change(world: World) -> None:
        def after(folder: Path) -> None:
            path = world.drawn.choice(sorted((folder / part).glob("*.parquet")))
            path.write_bytes(how(path.read_bytes(), world.drawn))

        world.after = after
        world.is_described |= how is _flip  # pyarrow may abort where a footer has a flipped bit

    return change


def _shuffled(world: World) -> None:
    def shuffle(table: pa.Table) -> pa.Table:
        return table.select(world.drawn.sample(table.column_names, len(table.column_names)))

    world.everywhere("train", shuffle)
    world.everywhere("items", shuffle)


def _drift(column: str, kind: pa.DataType, convert: Callable[[Any], Any]) -> Callable[[World], None]:
    return lambda world: world.change(column, lambda values: [convert(value) for value in values], kind)


def _without(part: str, column: str, *, everywhere: bool) -> Callable[[World], None]:
    def change(world: World) -> None:
        tables = getattr(world, part)
        for place in range(len(tables)) if everywhere else [world.drawn.randrange(len(tables))]:
            tables[place] = tables[place].drop_columns([column])

    return change


def _extra(world: World) -> None:
    world.train[0] = world.train[0].append_column("more", pa.array([[{"a": 1}]] * len(world.train[0])))


def _weights(*values: float) -> Callable[[World], None]:
    def change(world: World) -> None:
        def add(table: pa.Table) -> pa.Table:
            return table.append_column("weight", pa.array([1.0] * len(table)))

        world.everywhere("train", add)
        for value in values:
            world.plant("weight", value)

    return change


def _of_items(column: str, value: Any) -> Callable[[World], None]:
    """A value in some row of the catalogue."""

    def change(world: World) -> None:
        table = world.items[0]
        values = table[column].to_pylist()
        values[world.drawn.randrange(len(values))] = value
        made = pa.array(values, table.schema.field(column).type)
        world.items = [table.set_column(table.column_names.index(column), column, made)]

    return change


def _twice(world: World) -> None:
    table = world.items[0]
    world.items = [table, table.slice(world.drawn.randrange(len(table)), 1)]


def _extreme_items(world: World) -> None:
    extremes = pa.table({"item_id": pa.array([LARGEST, LEAST, 0, -1], pa.int64()), "brand": list("abca")})
    world.items.append(extremes)
    world.plant("item_id", world.drawn.choice([LARGEST, LEAST, 0, -1]))


def _not_utf8(world: World) -> None:
    table = world.items[0]
    brands = pa.array([b"\xff\xfe\x80", *[b"a"] * (len(table) - 1)], pa.binary())
    world.items = [table.set_column(1, "brand", brands.view(pa.string()))]


def _nothing(world: World) -> None:
    world.everywhere("train", lambda table: table[:0])


def _few_rows(world: World) -> None:
    world.train = [world.train[0][:5]]


def _no_files(part: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.after = lambda folder: [path.unlink() for path in (folder / part).glob("*")] and None

    return change


def _missing_is_nan(value: float) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.nan = "missing"
        world.plant("number", value)

    return change


def _flip(content: bytes, drawn: random.Random) -> bytes:
    changed = bytearray(content)
    changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def _stretched(world: World) -> None:
    world.plant("history", world.drawn.choices([*world.item_ids, 10**12], k=world.drawn.choice([51, 2000])))


def _float(value: Any) -> float:
    return float(value)


FILE = r"part-\d\.parquet"
ROW = rf"{FILE}, row group \d+.*"
NUMBER = ROW + "column 'number'"
DRIFTS = rf"{FILE}: column '%s' is .*, but .* in the first file"
# What is done to a world, and what must come of it: FINE, or what the error says; both where a place decides.
CASES: dict[str, tuple[Callable[[World], None], str]] = {
    "nothing": (lambda world: None, FINE),
    "other order of columns": (_shuffled, FINE),
    "a further column": (_extra, FINE),
    "an empty file": (lambda world: world.train.insert(world.drawn.randrange(3), world.train[0][:0]), FINE),
    "one row group": (lambda world: world.options.update(row_group_size=10**6), FINE),
    "no page checksums": (lambda world: world.options.update(write_page_checksum=False), FINE),
    "narrow integers": (_further("item_id", pa.int8()), FINE),
    "narrow lists": (_further("history", pa.list_(pa.int16())), FINE),
    "narrow floats": (_further("number", pa.float32()), FINE),
    "half floats": (_further("number", pa.float16()), FINE),
    "large lists": (_further("history", pa.large_list(pa.int64())), FINE),
    "text as dictionary": (_column("items", "brand", lambda table: table["brand"].dictionary_encode()), FINE),
    "large text": (_column("items", "brand", lambda table: table["brand"].cast(pa.large_string())), FINE),
    "an all-null column": (_drift("country", pa.null(), lambda value: None), FINE),
    "null country": (lambda world: world.plant("country", None), FINE),
    "null number": (lambda world: world.plant("number", None), FINE),
    "null list": (lambda world: world.plant("history", None), FINE),
    "empty list": (lambda world: world.plant("history", []), FINE),
    "null in a list": (lambda world: world.plant("history", [None, world.item_ids[0], None]), FINE),
    "over-long list": (_stretched, FINE),
    "stranger in a list": (lambda world: world.plant("history", [10**15, world.item_ids[0]]), FINE),
    "extremes in a list": (lambda world: world.plant("history", [LARGEST, LEAST, -1, 0]), FINE),
    "extreme country": (lambda world: world.plant("country", world.drawn.choice([LARGEST, LEAST])), FINE),
    "extreme items": (_extreme_items, FINE),
    "unsigned countries": (
        _column("train", "country", lambda table: pa.array([2**64 - 1] * len(table), pa.uint64())), FINE
    ),
    "text that is not UTF-8": (_not_utf8, FINE),
    "empty text": (_of_items("brand", ""), FINE),
    "long text": (_of_items("brand", "x" * 100_000), FINE),
    "no spread": (_column("train", "number", lambda table: pa.array([7.0] * len(table))), FINE),
    "all numbers null": (
        _column("train", "number", lambda table: pa.array([None] * len(table), pa.float64())), FINE
    ),
    "NaN as missing": (_missing_is_nan(float("nan")), FINE),
    "infinity as missing": (_missing_is_nan(float("inf")), FINE),
    "a small number": (lambda world: world.plant("number", 5e-324), FINE),
    "a large number": (lambda world: world.plant("number", world.drawn.choice([3e38, -3e38])), FINE),
    "beyond float32": (lambda world: world.plant("number", world.drawn.choice([1e300, -1e308])), NUMBER),
    "a weight of zero": (_weights(0.0, 0.0, 0.0), FINE),
    "NaN": (lambda world: world.plant("number", float("nan")), NUMBER),
    "infinity": (lambda world: world.plant("number", float(world.drawn.choice(["inf", "-inf"]))), NUMBER),
    "null item": (lambda world: world.plant("item_id", None), ROW + "column 'item_id'"),
    "unknown item": (lambda world: world.plant("item_id", 10**9), ROW + "column 'item_id'"),
    "null item in the catalogue": (_of_items("item_id", None), ROW + "column 'item_id'"),
    "null brand": (_of_items("brand", None), ROW + "column 'brand'"),
    "an item twice": (_twice, r"items: item_id \d+ is in rows"),
    "weight NaN": (_weights(float("nan")), ROW + "column 'weight'"),
    "weight infinite": (_weights(float("inf")), ROW + "column 'weight'"),
    "weight below zero": (_weights(-1.0), ROW + "column 'weight'"),
    "items as text": (_drift("item_id", pa.string(), str), DRIFTS % "item_id"),
    "items as doubles": (_drift("item_id", pa.float64(), _float), DRIFTS % "item_id"),
    "items unsigned": (_drift("item_id", pa.uint64(), int), DRIFTS % "item_id"),
    "lists as text": (_drift("history", pa.string(), str), DRIFTS % "history"),
    "lists flat": (_drift("history", pa.int64(), lambda value: 7), DRIFTS % "history"),
    "lists of lists": (_drift("history", pa.list_(pa.list_(pa.int64())), lambda value: [value]), DRIFTS % "history"),
    "numbers as text": (_drift("number", pa.string(), str), DRIFTS % "number"),
    "numbers as whole ones": (_drift("number", pa.int64(), int), DRIFTS % "number"),
    "numbers as truth": (_drift("number", pa.bool_(), bool), DRIFTS % "number"),
    "countries as text": (_drift("country", pa.string(), str), DRIFTS % "country"),
    "a column missing in a file": (_without("train", "history", everywhere=False), rf"{FILE} has no column 'history'"),
    "a column missing": (_without("train", "country", everywhere=True), "column 'country'"),
    "items missing": (_without("train", "item_id", everywhere=True), "column 'item_id'"),
    "users missing": (_without("train", "user_id", everywhere=True), "has no column 'user_id'"),
    "brands missing": (_without("items", "brand", everywhere=True), "has no column 'brand'"),
    "ids missing in the catalogue": (_without("items", "item_id", everywhere=True), "has no column 'item_id'"),
    "text throughout": (_column("train", "number", lambda table: pa.array(["x"] * len(table))), "column 'number'"),
    "no list throughout": (_column("train", "history", lambda table: pa.array([1] * len(table))), "column 'history'"),
    "no rows": (_nothing, "but no rows"),
    "few rows": (_few_rows, "batch_size"),
    "no files": (_no_files("train"), r"train contains no \*\.parquet|train differs from .* it has no part-0"),
    "no catalogue": (_no_files("items"), r"items contains no \*\.parquet|items differs from .* it has no part-0"),
    "cut": (_damage("train", lambda content, drawn: content[: drawn.randrange(len(content))]), FILE),
    "cut catalogue": (_damage("items", lambda content, drawn: content[: drawn.randrange(len(content))]), FILE),
    "no Parquet": (_damage("train", lambda content, drawn: b"user_id,item_id\n1,2\n"), FILE),
    "noise": (_damage("train", lambda content, drawn: drawn.randbytes(len(content))), FILE),
    "a flipped bit": (_damage("train", _flip), rf"{FILE}|^$"),
    "a flipped bit in the catalogue": (_damage("items", _flip), rf"{FILE}|^$"),
}  # fmt: skip


def write(world: World, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for part, tables in (("train", world.train), ("items", world.items)):
        (folder / part).mkdir(parents=True)
        for number, table in enumerate(tables):
            pq.write_table(table, folder / part / f"part-{number}.parquet", **world.options)
    if world.is_described:
        files = {f"{path.parent.name}/{path.name}": {"footer": footer_digest(path)} for path in folder.glob("*/*")}
        (folder / "dataset.yaml").write_text(to_yaml({"files": files}))
    if world.after is not None:
        world.after(folder)


def config_of(world: World, dataset: Path, run_dir: Path) -> RunConfig:
    values = as_values(config(dataset, run_dir))
    number = next(feature for feature in values["user"] if feature["name"] == "number")
    number |= {"normalize": "zscore", "nan": world.nan}
    return validate(RunConfig, values, "a case")


def _make(name: str, seed: int, dataset: Path, run_dir: Path) -> RunConfig:
    world = whole(random.Random(seed))
    CASES[name][0](world)
    write(world, dataset)
    return config_of(world, dataset, run_dir)


def _read_cases(folder: Path, cases: Sequence[tuple[str, int]]) -> list[str]:
    """What came of each case: nothing where every loss was finite, what the error said, or what else went wrong."""
    import torch

    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.errors import ConfigError, DataError
    from trec_twotower.training.loop import build_train_data
    from trec_twotower.training.model_builder import build_model
    from trec_twotower.training.run_dir import Run

    warnings.simplefilter("ignore")
    found = []
    with start_ranks() as ranks:
        model: Any = None
        for name, seed in cases:
            run_dir = folder / "run"
            shutil.rmtree(run_dir, ignore_errors=True)
            made = _make(name, seed, folder / "data", run_dir)
            if model is None:
                model = build_model(made, ranks)
            try:
                run = Run.create_or_open(made, ranks)
                passes = build_train_data(run, run.initialize(ranks), ranks)
                with torch.no_grad():
                    losses = [model(batch) for batch in passes.iter_from(0)]
                is_finite = bool(losses) and all(map(torch.isfinite, losses))
                found.append("" if is_finite else f"WRONG: losses {losses}")
            except (DataError, ConfigError) as error:
                found.append(str(error))
            except Exception as error:
                found.append(f"WRONG: {type(error).__name__}: {error}")
    return found


def drifting_tables(soak: Soak) -> Tally:
    """Each case in turn, read and hashed and scored as training does."""
    tally = Tally(f"drifting or broken tables, {len(CASES)} ways (exact: as docs/data.md says)", 1000)
    names = list(CASES)
    soak.random.shuffle(names)
    wanted = [(names[number % len(names)], soak.random.randrange(10**9)) for number in range(soak.tries(1000))]
    folder = soak.folder / "drifting"
    for first in range(0, len(wanted), CHUNK):
        cases = wanted[first : first + CHUNK]
        try:
            found = in_child(_read_cases, folder, cases)
        except RuntimeError:
            found = ["WRONG: the process died"] * len(cases)
        for (name, seed), said in zip(cases, found, strict=True):
            _judge(tally, name, seed, said)
    return tally


def _judge(tally: Tally, name: str, seed: int, said: str) -> None:
    tally.tried += 1
    expected = CASES[name][1]
    is_right = not said if expected == FINE else re.search(expected, said.partition("\n")[0]) is not None
    if is_right and not said.startswith("WRONG"):
        tally.exact += 1
    else:
        tally.silent += not said
        tally.note(f"{name} ({seed}): {said or 'read as if nothing were wrong'}")


def drifting_on_two_ranks(soak: Soak) -> Tally:
    """The same on two ranks: both end, alike, and soon."""
    tally = Tally("drifting or broken tables on two ranks: both end alike, none hangs", 40)
    names = list(CASES)
    soak.random.shuffle(names)
    for number in range(soak.tries(40)):
        name, seed = names[number % len(names)], soak.random.randrange(10**9)
        folder = soak.folder / f"drifting-{number}"
        made = in_child(lambda name=name, seed=seed, at=folder: as_values(_make(name, seed, at / "data", at / "run")))
        write_config(folder / "config.yaml", validate(RunConfig, made, "a case"))
        began = time.monotonic()
        ended = Job(2, ["train", str(folder / "config.yaml")], folder / "job", has_agent=True).end(grace_s=20)
        tally.longest_s = max(tally.longest_s, time.monotonic() - began)
        codes = [0] if CASES[name][1] == FINE else [0, 2, 3] if "^$" in CASES[name][1] else [2, 3]
        tally.tried += 1
        if len(set(ended.codes)) == 1 and ended.codes[0] in codes and "Traceback" not in ended.said:
            tally.exact += 1
            shutil.rmtree(folder)
        else:
            tally.note(f"{name} ({seed}): {ended.codes} {ended.said[-900:]}")
    return tally


DRIFTING = [drifting_tables, drifting_on_two_ranks]
