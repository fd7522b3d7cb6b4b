"""What a large catalogue costs: to hash, to open again, to hold on one host's ranks, to look up.

    python benchmarks/catalogue.py [--items 10000000] [--categories 3] [--bags 2] [--numbers 4] [--json FILE]

Generates items/ (in the folder --keep, else a temporary one): 64-bit ids, which are a feature, too; categories and bags
of 0 to 7 tags as text; numbers with nulls; zstd, row groups of 131,072 rows. And a log of events whose items are drawn
evenly, so that hardly a look-up finds what it needs near that of another. Every part runs in a process of its own.

build_s             the first start: from Parquet to the mapped catalogue on disk, flushed
build_peak_bytes    the most memory of that process, mapped pages among it
learn_s             what the first start also does: mean, deviation and range of the numbers
load_s, load_cold_s every later start, with the files in the page cache and without
bytes               of the mapped files
one_rank_bytes      the proportional set size (PSS) of one process that has read all of the catalogue
two_ranks_bytes     the sum of two such processes' at the same time
in_memory_bytes     PSS of a process that has the catalogue to itself, as small ones are held
lookup_ms, step_ms  of a batch of 4,096: ids to rows and the features of the distinct items; and the training step
lookup_share        the first of both, done before every step
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from loading import GROUP, ids, lists, skewed
from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent
CATEGORIES, TAGS, USERS, BATCH, STEPS, DIM = 5_000, 20_000, 1_000_000, 4096, 64, 64


def generate(folder: Path, options: argparse.Namespace) -> None:
    """The items, and as many events as the measured steps take."""
    for part in ("train", "items"):
        (folder / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    words = {what: np.array([f"{what}/{number:05d}" for number in range(count)])
             for what, count in (("category", CATEGORIES), ("tag", TAGS))}  # fmt: skip
    texts = [f"category_{number}" for number in range(options.categories)]
    texts += [f"bag_{number}.list.element" for number in range(options.bags)]
    writer = None
    for start in range(0, options.items, GROUP):
        count = min(GROUP, options.items - start)
        columns: dict[str, Any] = {"item_id": ids(np.arange(start, start + count), 1)}
        for number in range(options.categories):
            columns[f"category_{number}"] = words["category"][skewed(random, count, CATEGORIES)]
        for number in range(options.bags):
            lengths = random.integers(0, 8, count)
            columns[f"bag_{number}"] = lists(lengths, pa.array(words["tag"][skewed(random, lengths.sum(), TAGS)]))
        for number in range(options.numbers):
            columns[f"number_{number}"] = pa.array(random.lognormal(3, 1, count), mask=random.random(count) < 0.05)
        table = pa.table(columns)
        if writer is None:
            path = folder / "items/part-00000.parquet"
            writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=texts,
                                      write_page_checksum=True)  # fmt: skip
        writer.write_table(table, row_group_size=GROUP)
    assert writer is not None
    writer.close()
    rows = BATCH * STEPS
    taken, past = random.integers(0, options.items, rows), random.integers(0, 20, rows)
    events = {
        "user_id": ids(random.integers(0, USERS, rows), 2),
        "item_id": ids(taken, 1),
        "history": lists(past, pa.array(ids(random.integers(0, options.items, past.sum()), 1))),
    }
    pq.write_table(pa.table(events), folder / "train/part-00000.parquet", row_group_size=GROUP)


def config_of(folder: Path, options: argparse.Namespace) -> Any:
    from trec_twotower.config.base import validate
    from trec_twotower.config.run_config import RunConfig

    item: list[dict[str, Any]] = [{"name": "item_id", "kind": "id", "table": "item"}]
    for number in range(options.categories):
        item.append({"name": f"category_{number}", "kind": "category", "buckets": 10_000, "dim": DIM})
    for number in range(options.bags):
        item.append({"name": f"bag_{number}", "kind": "bag", "buckets": 40_000, "dim": DIM})
    item += [{"name": f"number_{number}", "kind": "number"} for number in range(options.numbers)]
    values = {
        "data": {"dataset": str(folder), "batch_size": BATCH, "cache": str(cache_of(folder))},
        "tables": {"user": {"buckets": USERS, "dim": DIM}, "item": {"buckets": 1_000_000, "dim": DIM}},
        "user": [
            {"name": "user_id", "kind": "id", "table": "user"},
            {"name": "history", "kind": "bag", "table": "item"},
        ],
        "item": item,
        "model": {"dim": DIM, "user_tower": {"mlp": [128]}, "item_tower": {"mlp": [128]}},
        "train": {"epochs": 1},
    }
    return validate(RunConfig, values, "benchmarks/catalogue.py")


def sources_of(folder: Path, options: argparse.Namespace, *, learned: bool = True, mapped: bool = True) -> Any:
    """The dataset through the config; with `learned`, by statistics that need no pass over the data."""
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.feature_dataset import FeatureDataset, open_cache
    from trec_twotower.data.features.statistics import Statistics

    config = config_of(folder, options)
    given = {f"item:number_{number}": Statistics(20.0, 20.0) for number in range(options.numbers)} if learned else None
    cache = open_cache(config.data) if mapped else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that there is no room
        return FeatureDataset(Dataset(config.data.dataset), config.feature_schema, config.data.rows, given, cache)


def files_of(folder: Path) -> list[Path]:
    """The mapped files, one catalogue's."""
    return sorted(cache_of(folder).glob("*/*.bin"))


def cache_of(folder: Path) -> Path:
    return folder.with_name(folder.name + "-cache")


def build(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from trec_twotower.data.feature_dataset import FeatureDataset

    started = time.perf_counter()
    sources: FeatureDataset = sources_of(folder, options)
    built = time.perf_counter()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learned_from = time.perf_counter()
    sources.learn()
    return {
        "build_s": built - started,
        "build_peak_bytes": peak_bytes,
        "learn_s": time.perf_counter() - learned_from,
        "bytes": sum(path.stat().st_size for path in files_of(folder)),
    }


def load(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    times = []
    sources_of(folder, options)  # imports are not part of it
    for is_cold in (False, False, False, True):
        if is_cold:
            for path in files_of(folder):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        sources_of(folder, options)
        times.append(time.perf_counter() - started)
    return {"load_s": statistics.median(times[:3]), "load_cold_s": times[3]}


def hold(folder: Path, options: argparse.Namespace, *, mapped: bool) -> None:
    """Read all of the catalogue, say so, and give the PSS when asked."""
    catalogue = sources_of(folder, options, mapped=mapped).catalogue
    for first in range(0, len(catalogue), BATCH):
        catalogue.columns.take(catalogue.rows_of_keys(catalogue.keys[first : first + BATCH]))
    print("ready", flush=True)
    sys.stdin.readline()
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    print(next(int(field[1]) * 1024 for field in fields if field[0] == "Pss:"), flush=True)
    sys.stdin.readline()


def lookups(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Look-ups and training steps in turn, so that each finds the caches as the other left them."""
    import torch

    from trec_twotower.data.loading.loader import TrainBatches
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.training.model_builder import build_model
    from trec_twotower.training.optimizer import RunOptimizer

    config = config_of(folder, options)
    sources = sources_of(folder, options)
    catalogue = sources.catalogue
    random = np.random.default_rng(2)
    asked = [catalogue.keys[random.integers(0, len(catalogue), BATCH)] for _ in range(STEPS)]
    data = config.data.model_copy(update={"cache": None})
    batches = TrainBatches(sources, data, config.loss, np.ones(len(catalogue), np.int64), (0, 1))
    lookup_s, step_s = [], []
    with start_ranks(threads=1) as ranks:
        model = build_model(config, ranks)
        optimizer = RunOptimizer(model, config.train.optimizer)
        model.train()
        for keys, batch in zip(asked, list(batches.iter_from(0, STEPS)), strict=True):
            started = time.perf_counter()
            catalogue.columns.take(np.unique(catalogue.rows_of_keys(keys)))
            looked_up = time.perf_counter()
            loss = model(batch)
            assert torch.isfinite(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lookup_s.append(looked_up - started)
            step_s.append(time.perf_counter() - looked_up)
    first = STEPS // 4  # before that, memory and threads are still being set up
    lookup, step = statistics.median(lookup_s[first:]), statistics.median(step_s[first:])
    return {"lookup_ms": lookup * 1e3, "step_ms": step * 1e3, "lookup_share": lookup / step}


def words_of(folder: Path, options: argparse.Namespace, what: str) -> list[str]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("items", "categories", "bags", "numbers")]
    return [sys.executable, "-W", "ignore", __file__, "--inside", what, "--keep", str(folder), *sizes]


def alone(folder: Path, options: argparse.Namespace, what: str) -> dict[str, float]:
    """Run one part in a process of its own and return what it measured."""
    done = subprocess.run(words_of(folder, options, what), stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{what} failed")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def holding(folder: Path, options: argparse.Namespace, what: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words_of(folder, options, what), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def pss_of(processes: list[subprocess.Popen[str]]) -> int:
    """The sum over processes that all hold the catalogue at this time."""
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a process that was to hold the catalogue failed")
    total = 0
    for process in processes:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        total += int(process.stdout.readline())
    return total


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    figures = alone(folder, options, "build") | alone(folder, options, "load")
    with holding(folder, options, "mapped") as one:
        figures["one_rank_bytes"] = pss_of([one])
    with holding(folder, options, "mapped") as one, holding(folder, options, "mapped") as two:
        figures["two_ranks_bytes"] = pss_of([one, two])
    with holding(folder, options, "in-memory") as one:
        figures["in_memory_bytes"] = pss_of([one])
    return figures | alone(folder, options, "lookups")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--categories", type=int, default=3)
    parser.add_argument("--bags", type=int, default=2)
    parser.add_argument("--numbers", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="where the files go and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside in ("mapped", "in-memory"):
        hold(options.keep, options, mapped=options.inside == "mapped")
        return
    if options.inside:
        part = {"build": build, "load": load, "lookups": lookups}[options.inside]
        print(json.dumps(part(options.keep, options)))
        return
    print(headline(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        shape = (options.items, options.categories, options.bags, options.numbers)
        folder = (place / f"catalogue-{'-'.join(map(str, shape))}").resolve()
        if not folder.exists():
            generate(folder, options)
        shutil.rmtree(cache_of(folder), ignore_errors=True)  # of an earlier call
        figures = measure(folder, options)
    for name, value in figures.items():
        print(f"{name:<24}{value:>20,.4f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
