"""How fast rows become batches, as shares of the raw decoding of the same Parquet columns.

    python benchmarks/loading.py [--rows 2000000] [--json FILE] [--keep DIR] [--only NAME ...]

Generates a log in DIR (default: a temporary folder): 64-bit ids, a history of 0 to 50 items, categories, lists of
string tags, numbers with nulls; zstd, row groups of 131,072 rows; and a catalogue of 200,000 items with category, tags
and price. All contenders run in turn in one process on one thread, several rounds; the medians count.

reader_share         hashing, shuffle, catalogue features, KeyedJaggedTensors, nothing dropped; against raw decode
reader_masked_share  the same, and the pairs of rows and candidates that their histories take out of the negatives
cache_share          the same from the cache of hashed columns, against raw decode
vs_notebook          the reader against a row-by-row Dataset under a DataLoader
threads_2_vs_1       two reader threads against one, nobody taking batches but this loop
waiting_share        share of a training step spent waiting for data (waiting_share_gowalla with --gowalla FOLDER)
peak_100m_vs_2m      peak memory of reading 100 M rows (the file, linked 50 times) against reading it once
resume_first_batch_s seconds from opening the 100 M rows in mid-epoch to the first batch
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent
USERS, ITEMS, CATEGORIES, TAGS, COUNTRIES = 1_000_000, 200_000, 1_000, 5_000, 64
GROUP = 131_072
COLUMNS = ["user_id", "item_id", "country", "age", "history", "history_categories", "interests"]


def ids(rows: np.ndarray, stream: int) -> np.ndarray:
    """Sparse, non-negative 64-bit ids of row numbers: a multiplication by an odd number keeps them distinct."""
    mixed = (rows.astype(np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(1)).astype(np.int64)


def skewed(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Row numbers below `size`, the small ones far more often (a power law by inversion)."""
    return np.minimum((size ** random.random(count)).astype(np.int64) - 1, size - 1)


def lists(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)


def generate(folder: Path, num_rows: int) -> None:
    """The log and its catalogue."""
    for part in ("train", "items"):
        (folder / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    words = {name: np.array([f"{name}/{number:05d}" for number in range(count)])
             for name, count in (("country", COUNTRIES), ("category", CATEGORIES), ("tag", TAGS))}  # fmt: skip
    settings: dict[str, Any] = {"compression": "zstd", "row_group_size": GROUP, "write_page_checksum": True}
    lengths = random.integers(0, 8, ITEMS)
    category = random.integers(0, CATEGORIES, ITEMS)
    price = random.lognormal(3, 1, ITEMS)
    items = {
        "item_id": ids(np.arange(ITEMS), 1),
        "category": words["category"][category],
        "tags": lists(lengths, pa.array(words["tag"][skewed(random, lengths.sum(), TAGS)])),
        "price": pa.array(price, mask=random.random(ITEMS) < 0.05),
    }
    pq.write_table(pa.table(items), folder / "items/part-00000.parquet", **settings)
    writer = None
    texts = ["country", "interests.list.element"]
    for start in range(0, num_rows, GROUP):
        count = min(GROUP, num_rows - start)
        history = np.clip(random.poisson(random.gamma(2.0, 10.0, count)), 0, 50)
        seen = random.poisson(5, count)
        interests = random.poisson(3, count)
        table = pa.table({
            "user_id": ids(random.integers(0, USERS, count), 2),
            "item_id": ids(skewed(random, count, ITEMS), 1),
            "country": words["country"][skewed(random, count, COUNTRIES)],
            "age": pa.array(random.normal(35, 10, count).astype(np.float32), mask=random.random(count) < 0.1),
            "history": lists(history, pa.array(ids(skewed(random, history.sum(), ITEMS), 1))),
            "history_categories": lists(seen, pa.array(random.integers(0, CATEGORIES, seen.sum()).astype(np.int32))),
            "interests": lists(interests, pa.array(words["tag"][skewed(random, interests.sum(), TAGS)])),
        })  # fmt: skip
        if writer is None:
            path = folder / "train/part-00000.parquet"
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=texts,
                                      write_page_checksum=True)  # fmt: skip
        writer.write_table(table, row_group_size=GROUP)
    assert writer is not None
    writer.close()


def config_of(folder: Path, *, masked: bool = False, **data: Any) -> Any:
    """The config that reads all of the log."""
    from trec_twotower.config.base import validate
    from trec_twotower.config.run_config import RunConfig

    values = {
        "data": {"dataset": str(folder), "batch_size": 4096, **data},
        "tables": {
            "user": {"buckets": USERS, "dim": 64},
            "item": {"buckets": ITEMS, "dim": 64},
            "category": {"buckets": 10_000, "dim": 64},
            "tag": {"buckets": 20_000, "dim": 64},
        },
        "user": [
            {"name": "user_id", "kind": "id", "table": "user"},
            {"name": "country", "kind": "category", "buckets": 1_000, "dim": 64},
            {"name": "age", "kind": "number"},
            {"name": "history", "kind": "bag", "table": "item"},
            {"name": "history_categories", "kind": "bag", "table": "category"},
            {"name": "interests", "kind": "bag", "table": "tag"},
        ],
        "item": [
            {"name": "item_id", "kind": "id", "table": "item"},
            {"name": "category", "kind": "category", "table": "category"},
            {"name": "tags", "kind": "bag", "table": "tag"},
            {"name": "price", "kind": "number", "normalize": "log1p"},
        ],
        "model": {"dim": 64, "user_tower": {"mlp": [128]}, "item_tower": {"mlp": [128]}},
        "loss": {"negatives": {"in_batch": True, "sampled": 0}, "mask_history": masked},
        "train": {"epochs": 1},
    }
    return validate(RunConfig, values, "benchmarks/loading.py")


def raw_decode(folder: Path) -> int:
    """pyarrow alone: the same columns, strings as dictionaries, memory-mapped, one thread."""
    rows = 0
    for path in sorted((folder / "train").glob("*.parquet")):
        file = pq.ParquetFile(path, memory_map=True, read_dictionary=["country", "interests.list.element"])
        for group in range(file.num_row_groups):
            rows += file.read_row_group(group, columns=COLUMNS, use_threads=False).num_rows
    return rows


def notebook(folder: Path, num_rows: int) -> int:
    """The usual first try: a Dataset that hashes a row a call, and a DataLoader that pads and stacks."""
    import torch
    import xxhash
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as TorchDataset

    class Rows(TorchDataset):
        def __init__(self) -> None:
            self.table = (
                pq.read_table(folder / "train/part-00000.parquet", columns=COLUMNS).slice(0, num_rows).to_pylist()
            )

        def __len__(self) -> int:
            return len(self.table)

        def __getitem__(self, number: int) -> dict[str, Any]:
            row = self.table[number]
            return {
                "user_id": hash(row["user_id"]) % USERS,
                "item_id": hash(row["item_id"]) % ITEMS,
                "country": xxhash.xxh3_64_intdigest(row["country"].encode()) % 1_000,
                "age": row["age"] or 0.0,
                "history": [hash(item) % ITEMS for item in row["history"]],
                "history_categories": [hash(item) % 10_000 for item in row["history_categories"]],
                "interests": [xxhash.xxh3_64_intdigest(word.encode()) % 20_000 for word in row["interests"]],
            }

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name, value in rows[0].items():
            column = [row[name] for row in rows]
            if isinstance(value, list):
                batch[name] = torch.tensor([item for row in column for item in row])
                batch[name + "_lengths"] = torch.tensor([len(row) for row in column])
            else:
                batch[name] = torch.tensor(column)
        return batch

    data = Rows()
    started = time.perf_counter()
    rows = sum(len(batch["user_id"]) for batch in DataLoader(data, 4096, shuffle=True, collate_fn=collate))
    notebook.seconds = time.perf_counter() - started  # type: ignore[attr-defined]
    return rows


def batches_of(folder: Path, *, masked: bool = False, config: Any = None, **data: Any) -> Any:
    """The batches of the log on one rank; `config` stands in for the usual one, but for `data`."""
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.feature_dataset import FeatureDataset
    from trec_twotower.data.loading.loader import TrainBatches

    config = config or config_of(folder, masked=masked)
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    sources = FeatureDataset(Dataset(config.data.dataset), config.feature_schema, config.data.rows)
    counts = np.ones(len(sources.catalogue), np.int64)
    return TrainBatches(sources, config.data, config.loss, counts, (0, 1))


def read_epoch(batches: Any, epoch: int = 0) -> int:
    first = epoch * batches.steps_per_epoch
    rows = 0
    for batch in batches.iter_from(first, first + batches.steps_per_epoch):
        rows += batch.num_rows_of_all_ranks
    return rows


def seconds(work: Callable[[], int], rows: int) -> float:
    started = time.perf_counter()
    done = work()
    assert done == rows, f"{done} rows instead of {rows}"
    return time.perf_counter() - started


def in_turn(contenders: dict[str, Callable[[], int]], rows: int, rounds: int) -> dict[str, float]:
    """Median seconds of each contender, all in turn in every round."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            took[name].append(seconds(work, rows))
    return {name: statistics.median(values) for name, values in took.items()}


def alone(folder: Path, what: str) -> dict[str, float]:
    """Run one part in a process of its own and return what it measured."""
    words = [sys.executable, "-W", "ignore", __file__, "--inside", what, "--keep", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def inside(folder: Path, what: str) -> dict[str, float]:
    """The parts that need a process of their own."""
    import resource

    import torch

    torch.set_num_threads(1)
    if what == "peak":
        read_epoch(batches_of(folder, threads=1))
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if what == "resume":
        batches = batches_of(folder, threads=1)
        step = batches.steps_per_epoch // 2 + 17
        next(batches.iter_from(0, 1))  # imports and first use of every function, not part of the claim
        started = time.perf_counter()
        again = batches_of(folder, threads=1)
        opened = time.perf_counter()
        next(again.iter_from(step, step + 1))
        return {"open_s": opened - started, "first_batch_s": time.perf_counter() - opened}
    raise SystemExit(f"no part {what!r}")


def linked(folder: Path, times: int) -> Path:
    """The same file so many times under other names, beside one catalogue."""
    place = folder.with_name(f"{folder.name}-{times}")
    if not place.exists():
        (place / "train").mkdir(parents=True)
        (place / "items").symlink_to(folder / "items")
        for number in range(times):
            os.link(folder / "train/part-00000.parquet", place / f"train/part-{number:05d}.parquet")
    return place


def waiting_share(config: Path, overrides: list[str], out: Path) -> float:
    """Share of the training loop spent waiting for batches, on one rank with its reader on the other core."""
    command = [ROOT / "launch/torchrun.sh", "--ranks", "1", "train", config, f"run_dir={out}", *overrides]
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    status = json.loads((out / "status.json").read_text())
    return status["waiting_s"] / status["train_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where the files go and stay (default: a temporary folder)")
    parser.add_argument("--gowalla", type=Path, help="a Gowalla dataset folder, for its waiting share")
    parser.add_argument("--only", nargs="+", choices=["speed", "notebook", "threads", "waiting", "large"])
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.keep, options.inside)))
        return
    print(headline(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        folder = (place / f"log-{options.rows}").resolve()
        if not folder.exists():
            generate(folder, options.rows)
        figures = measure(folder, options, options.only or ["speed", "notebook", "threads", "waiting", "large"])
    for name, value in figures.items():
        print(f"{name:<24}{value:>16,.4f}")
    write_figures(options.json, figures)


def measure(folder: Path, options: argparse.Namespace, parts: list[str]) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rows = options.rows
    figures: dict[str, float] = {}
    if "speed" in parts:
        cache = folder.with_name(folder.name + "-cache")
        plain, masked = batches_of(folder, threads=0), batches_of(folder, threads=0, masked=True)
        cached = batches_of(folder, threads=0, cache=cache)
        read_epoch(cached)
        took = in_turn(
            {
                "raw": lambda: raw_decode(folder),
                "reader": lambda: read_epoch(plain),
                "masked": lambda: read_epoch(masked),
                "cached": lambda: read_epoch(cached, 1),
            },
            rows,
            options.rounds,
        )
        figures |= {f"{name}_rows_per_s": rows / value for name, value in took.items()}
        figures["reader_share"] = took["raw"] / took["reader"]
        figures["reader_masked_share"] = took["raw"] / took["masked"]
        figures["cache_share"] = took["raw"] / took["cached"]
    if "notebook" in parts:
        plain = batches_of(folder, threads=0)
        some = 40_960
        took_s, reader_s = [], []
        for _ in range(3):
            notebook(folder, some)
            took_s.append(notebook.seconds / some)  # type: ignore[attr-defined]
            reader_s.append(seconds(lambda: read_epoch(plain), rows) / rows)
        figures["notebook_rows_per_s"] = 1 / statistics.median(took_s)
        figures["vs_notebook"] = statistics.median(took_s) / statistics.median(reader_s)
    if "threads" in parts:
        one, two = batches_of(folder, threads=1), batches_of(folder, threads=2)
        took = in_turn({"one": lambda: read_epoch(one), "two": lambda: read_epoch(two)}, rows, options.rounds)
        figures["threads_2_vs_1"] = took["one"] / took["two"]
    if "waiting" in parts:
        figures |= waiting(folder, options.gowalla)
    if "large" in parts:
        large = linked(folder, max(1, 100_000_000 // rows))
        figures["peak_100m_vs_2m"] = alone(large, "peak")["peak_bytes"] / alone(folder, "peak")["peak_bytes"]
        resumed = alone(large, "resume")
        figures["resume_open_s"] = resumed["open_s"]
        figures["resume_first_batch_s"] = resumed["first_batch_s"]
    return figures


def waiting(folder: Path, gowalla: Path | None) -> dict[str, float]:
    from trec_twotower.config.base import as_values
    from trec_twotower.config.loading import to_yaml

    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "loading.yaml"
        path.write_text(to_yaml(as_values(config_of(folder, masked=True))))
        figures["waiting_share"] = waiting_share(path, [], Path(temporary) / "generated")
        if gowalla is not None:
            overrides = [f"data.dataset={gowalla.resolve()}", "data.batch_size=4096", "train.epochs=6"]
            overrides.append("evaluate.users=500")
            shipped = ROOT / "configs/gowalla_bag.yaml"
            figures["waiting_share_gowalla"] = waiting_share(shipped, overrides, Path(temporary) / "gowalla")
    return figures


if __name__ == "__main__":
    main()
