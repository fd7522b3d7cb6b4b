"""The plan of a config: the bytes of every shard, as measured, and TorchRec's estimate of a step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ranks.launch import SAID_BY_TORCHREC, torchrun
from tests.ranks.worlds import event_config, tables, user_config
from trec_twotower.config.base import validate
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.distributed.host_memory import host_bytes
from trec_twotower.errors import ConfigError
from trec_twotower.training.optimizer import fuse_table_updates
from trec_twotower.training.sharding import TablePlacement
from trec_twotower.training.sharding_plan import (
    OnlyTables,
    ShardBytes,
    describe_plan,
    mean_lengths,
    shard_bytes,
)

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
LARGE = Path(__file__).resolve().parents[2] / "configs/large.yaml"


def test_the_plan_has_the_bytes_of_every_shard():
    """Four bytes a weight; row-wise Adagrad keeps four more a row and shard. All by hand."""
    wanted = {
        "item": {"buckets": 1_000_000, "dim": 16, "sharding": "row_wise"},
        "click": {"buckets": 2_000_000, "dim": 8, "sharding": "column_wise"},
        "country": {"buckets": 500_000, "dim": 4, "sharding": "data_parallel"},
        "tag": {"buckets": 250_001, "dim": 8, "sharding": "row_wise"},
        "brand": {"buckets": 600_000, "dim": 12, "sharding": "table_wise"},
    }
    said = describe_plan(described("rowwise_adagrad", wanted), 2).partition("\n\n")[0].splitlines()
    rows = [line.split() for line in said[1:-2]]
    assert {row.pop(2) for row in rows if row[0] == "country"} == {"dense"}
    assert {row.pop(2) for row in rows if row[0] != "country"} == {"fused"}
    lines = {tuple(row[:3]): row[3:] for row in rows}
    assert said[0].split() == ["table", "sharding", "kernel", "rank", "rows", "columns", "weights", "MB", "state", "MB"]
    expected = {
        ("item", "row_wise", "0"): ["500,000", "16", "32.0", "2.0"],
        ("item", "row_wise", "1"): ["500,000", "16", "32.0", "2.0"],
        ("click", "column_wise", "0"): ["2,000,000", "4", "32.0", "8.0"],
        ("click", "column_wise", "1"): ["2,000,000", "4", "32.0", "8.0"],
        ("country", "data_parallel", "0"): ["500,000", "4", "8.0", "2.0"],
        ("country", "data_parallel", "1"): ["500,000", "4", "8.0", "2.0"],
        ("tag", "row_wise", "0"): ["125,001", "8", "4.0", "0.5"],
        ("tag", "row_wise", "1"): ["125,000", "8", "4.0", "0.5"],
    }
    holder = next(key[2] for key in lines if key[0] == "brand")
    expected["brand", "table_wise", holder] = ["600,000", "12", "28.8", "2.4"]
    assert lines == expected
    totals = {holder: "119.7", str(1 - int(holder)): "88.5"}  # 88.5 without the brands' 31.2
    assert said[-2:] == [f"rank {rank}: {totals[rank]} MB of tables and optimizer state" for rank in ("0", "1")]


def described(kind: str, wanted: dict[str, Any]) -> Any:
    return event_config(Path("world"), Path("run"), tables=wanted, train={"optimizer": {"sparse": kind}})


@pytest.mark.parametrize(("kind", "state"), [("sgd", "0.0"), ("adagrad", "48.0"), ("rowwise_adagrad", "4.0")])
def test_the_state_is_that_of_the_optimizer(kind, state):
    """A million rows of 12: Adagrad keeps as much as the table, row-wise Adagrad a number a row, SGD nothing."""
    wanted = tables("table_wise")
    wanted["item"]["buckets"] = 1_000_000
    line = next(line for line in describe_plan(described(kind, wanted), 1).splitlines() if line.startswith("item"))
    assert line.split()[-2:] == ["48.0", state]


def test_describing_a_plan_changes_nothing(monkeypatch):
    """Whoever asked for 4 ranks and then 2, or asks under torchrun, gets the plan of one machine each time."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    config = event_config(Path("world"), Path("run"), "table_row_wise")
    before = dict(os.environ)
    fresh = describe_plan(config, 2)
    describe_plan(config, 4)
    assert describe_plan(config, 2) == fresh
    assert dict(os.environ) == before
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert describe_plan(config, 2) == fresh


@pytest.mark.parametrize(
    ("kind", "state"),
    [("adam", "96.0"), ("partial_rowwise_adam", "52.0"), ("lamb", "96.0"), ("rowwise_adagrad", "4.0")],
)
def test_a_plan_for_gpus_needs_none(kind, state):
    """A million rows of 12: two numbers a weight, or one and another a row."""
    wanted = tables("table_wise")
    wanted["item"]["buckets"] = 1_000_000
    said = describe_plan(described(kind, wanted), 1, gpu_gb=80).splitlines()
    assert next(line for line in said if line.startswith("item")).split()[-2:] == ["48.0", state]
    with pytest.raises(ConfigError, match="each rank has 50 MB on its GPU and"):
        describe_plan(described(kind, wanted), 1, gpu_gb=0.05)


def test_a_cached_table_has_bytes_on_the_gpu_and_in_host_memory():
    """48 MB and 4 of state in host memory; on the GPU a quarter of the weights, and 8 bytes a row to find them."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 1_000_000, "kernel": "fused_uvm_caching", "cache_share": 0.25}
    said = describe_plan(described("rowwise_adagrad", wanted), 1, gpu_gb=80).splitlines()
    assert "rank 0: 20.0 MB of tables and optimizer state, and 52.0 MB in host memory" in said


def test_a_table_in_host_memory_has_no_bytes_on_the_gpu():
    """48 MB and 4 of state in host memory, and nothing by which to find them in a cache."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 1_000_000, "kernel": "fused_uvm"}
    config = described("rowwise_adagrad", wanted)
    model = OnlyTables(config.feature_schema)
    fuse_table_updates(model, config.train.optimizer)
    placed = TablePlacement("item", "table_wise", "fused_uvm", 0, 1_000_000, 12)
    assert shard_bytes(model, placed) == ShardBytes(48_000_000, 4_000_000, 0, 52_000_000)


def test_updates_that_are_missing_here_are_missing_in_the_plan():
    with pytest.raises(ConfigError, match="adam, which fbgemm has on GPU alone"):
        describe_plan(described("adam", tables("auto")), 2)


# Against what happens


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, tmp_path_factory) -> dict[str, Any]:
    """Bytes of tables on some ranks. Blocks go back to the system at once, so that only tables stay."""
    path = tmp_path_factory.mktemp("measured") / "out.json"
    malloc = "glibc.malloc.mmap_threshold=262144:glibc.malloc.arena_max=1"
    code, said = torchrun(request.param, "tests.ranks.measured", path, GLIBC_TUNABLES=malloc)
    assert code == 0, said
    return {"num_ranks": request.param, **json.loads(path.read_text())}


def test_tables_use_the_memory_of_the_plan(measured):
    """Weights and states of every rank, within 10 % of what the process grows by (seen: 0.4 %)."""
    assert len(measured["memory"]) == 3
    for name, found in measured["memory"].items():
        assert len(found) == measured["num_ranks"]
        for expected, grown in found:
            assert grown == pytest.approx(expected, rel=0.1), name
            assert expected > 50e6


# The planner's estimate of a step


def estimates(config: RunConfig, num_ranks: int) -> dict[str, list[float]]:
    """Return ids per row, lookup, update and exchange time (ms) and memory (MB) of each table."""
    lines = describe_plan(config, num_ranks).partition("\n\n")[2].splitlines()
    return {line.split()[0]: list(map(float, line.split()[1:])) for line in lines[2:-num_ranks]}


def history_of(length: int, sharding: str, **data: Any) -> RunConfig:
    wanted = {"item": {"buckets": 1_000_000, "dim": 64, "sharding": sharding}}
    bags = [{"name": "history", "kind": "bag", "table": "item", "max_length": length}]
    return user_config(Path("w"), Path("r"), "auto", user=bags, tables=wanted, data={"batch_size": 4096, **data})


def test_time_grows_with_the_ids_per_row_and_with_the_rows():
    """The item table looks up its own id and the history: 1 + 9 and 1 + 99 ids per row."""
    short, long = (estimates(history_of(length, "table_wise"), 2)["item"] for length in (9, 99))
    assert (short[0], long[0]) == (10, 100)
    assert long[1] / short[1] == pytest.approx(10, rel=0.25) and long[2] / short[2] == pytest.approx(10, rel=0.25)
    more = estimates(history_of(9, "table_wise", batch_size=40_960), 2)["item"]
    assert more[1] / short[1] == pytest.approx(10, rel=0.25) and more[3] > 5 * short[3]


def test_one_rank_exchanges_nothing():
    assert estimates(history_of(9, "row_wise"), 2)["item"][3] > 0
    assert estimates(history_of(9, "table_wise"), 1)["item"][3] == 0


def test_the_estimate_holds_the_weights_that_a_rank_has():
    """A million rows of 64 numbers, which SGD updates without state: 256 MB, on one rank or in halves."""
    whole, half = (estimates(history_of(9, kind), 2)["item"][4] for kind in ("table_wise", "row_wise"))
    assert 256 <= whole < 290 and 128 <= half < 160


# Mean lengths


@pytest.mark.parametrize("rows", ["event", "user"])
def test_lengths_are_those_of_batches(write_dataset, tmp_path, rows):
    """Against batches of two ranks, in a world so wide that hardly an item comes twice in a step; and of many files."""
    rng = np.random.default_rng(0)
    num_items, num_rows = 60_000, 400

    def lists(lengths):
        return [rng.integers(0, num_items, length).tolist() for length in rng.integers(*lengths, num_rows)]

    train = {"user_id": np.arange(num_rows), "history": lists((0, 9)), "shown": lists((0, 7))}
    train |= {"positives": lists((2, 9))} if rows == "user" else {"item_id": rng.integers(0, num_items, num_rows)}
    tags = [[f"t{number % 50}"] * (number % 4) for number in range(num_items)]
    items = {"item_id": np.arange(num_items), "shelf": rng.integers(0, 500, num_items), "tags": tags}
    mined = {"item_id": np.arange(num_items), "negatives": rng.integers(0, num_items, (num_items, 5)).tolist()}
    pq.write_table(pa.table(mined), tmp_path / "mined.parquet")
    train, items = pa.table(train), pa.table(items)
    folder = write_dataset(
        tmp_path / "d",
        train=[train.slice(first, 100) for first in range(0, num_rows, 100)],
        items=[items.slice(first, 20_000) for first in range(0, num_items, 20_000)],
    )
    config = validate(RunConfig, {
        "data": {"dataset": folder, "batch_size": 50, "rows": rows, "threads": 0},
        "user": [{"name": "history", "kind": "bag", "buckets": 99, "dim": 4}],
        "item": [{"name": "item_id", "kind": "id", "buckets": 99, "dim": 4},
                 {"name": "shelf", "kind": "category", "buckets": 99, "dim": 4},
                 {"name": "tags", "kind": "bag", "buckets": 99, "dim": 4}],
        "loss": {
            "impressions": {"column": "shown"},
            "negatives": {"sampled": 50, "popular": {"count": 20, "power": 0.0},
                          "same_category": {"feature": "shelf", "count": 30},
                          "mined": {"file": tmp_path / "mined.parquet", "count": 1}},
        },
    }, "here")  # fmt: skip
    lengths, _ = mean_lengths(config)
    sources = FeatureDataset(Dataset(folder), config.feature_schema, rows)
    counts = count_items(sources, config.loss)
    batches = [
        batch
        for rank in range(2)
        for batch in TrainBatches(sources, config.data, config.loss, counts, share=(rank, 2)).iter_from(0, 8)
    ]
    num_items = sum(sum(batch.item_sizes) for batch in batches[: len(batches) // 2])  # of all ranks
    for name in config.feature_schema.layout.pooled_keys:
        num_rows = 50 * 8 if name.startswith("user:") else num_items
        ids = sum(batch.sparse[name].values().numel() for batch in batches)
        # With a row per user a batch's histories are the half that is drawn.
        assert lengths[name] == pytest.approx(ids / num_rows, rel=0.05), name


def test_lengths_of_bags_come_from_the_footers(write_dataset, tmp_path):
    """Users with 2 and 4 items use half of them as input, whatever `history` has; every second item has one tag."""
    kind = pa.list_(pa.int64())
    folder = write_dataset(
        tmp_path / "d",
        train=pa.table({
            "user_id": pa.array(range(4)),
            "history": pa.array([[1], [], None, [1]], kind),
            "clicks": pa.array([[1, 2, 3], [], None, [1, 2, 3, 4, 5]], kind),
            "positives": pa.array([[1, 2], [1, 2, 3, 4], [1, 2], [1, 2, 3, 4]], kind),
        }),
        items=pa.table({"item_id": pa.array(range(100)), "tags": pa.array([["a"], []] * 50, pa.list_(pa.string()))}),
    )  # fmt: skip
    lengths, source = mean_lengths(user_config(tmp_path, tmp_path / "r", data={"dataset": folder}))
    assert source == "bag lengths from the data"
    assert lengths == {"user:history": 1.5, "item:item_id": 1, "item:tags": 0.5}
    shorter = user_config(tmp_path, tmp_path / "r", data={"dataset": folder}, user=[
        {"name": "history", "kind": "bag", "table": "item", "max_length": 1}])  # fmt: skip
    assert mean_lengths(shorter)[0]["user:history"] == 1
    clicks = user_config(tmp_path, tmp_path / "r", data={"dataset": folder}, user=[
        {"name": "clicks", "kind": "bag", "table": "item"}])  # fmt: skip
    assert mean_lengths(clicks)[0]["user:clicks"] == 2  # mean of 3, 0, null and 5
    few = user_config(tmp_path, tmp_path / "r", data={"dataset": folder, "input_share": 0.25})
    assert mean_lengths(few)[0]["user:history"] == 0.75


def test_without_data_the_lengths_are_reported_as_assumed(tmp_path):
    lengths, source = mean_lengths(event_config(tmp_path / "nowhere", tmp_path / "r"))
    assert source.startswith("no data at ") and "or 20" in source
    assert (lengths["user:history"], lengths["user:newest"], lengths["item:item_id"]) == (20, 2, 1)


# The memory there is


def test_memory_is_what_every_group_above_allows(tmp_path):
    """Version 2 and version 1 of control groups; "max" and what is larger than the machine set no limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def groups(membership: str, **limits: str) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for place, text in limits.items():
            path = root / place.replace("__", "/").replace("_max", ".max").replace("_limit", ".limit_in_bytes")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (root / "self").write_text(membership)
        return host_bytes(root, root / "self")

    assert groups("0::/a/b\n", a__memory_max="500000\n", a__b__memory_max="max\n") == 500_000
    assert groups("0::/a/b\n", a__memory_max="max\n", memory_max="400000\n") == 400_000
    assert groups("0::/\n", memory_max=f"{2 * machine}\n") == machine
    assert groups("3:cpu:/x\n4:memory:/x\n", memory__x__memory_limit="300000\n", x__memory_max="1\n") == 300_000
    assert groups("4:hugetlb,memory:/gone\n", memory__memory_limit="200000\n") == 200_000
    assert host_bytes(tmp_path, tmp_path / "no file") == machine


def test_the_large_config_is_planned_and_trains_on_small_data(cli, tmp_path):
    """Its columns are those of `prepare synthetic`; the plan has tables of its full size, cut by rows for 8 ranks."""
    dataset, run = tmp_path / "small", tmp_path / "run"
    said = cli("prepare", "synthetic", "--out", dataset, "users=300", "items=200", "clusters=8")
    assert said.code == 0, said.err
    planned = cli("plan", LARGE, "--ranks", 8, "--gpu-gb", 80, f"data.dataset={dataset}", "data.batch_size=256")
    assert planned.code == 0, planned.err
    user = [line.split() for line in planned.out.splitlines() if line.startswith("user ")]
    assert [int(words[3]) for words in user[:8]] == list(range(8))
    assert all(words[1] == "row_wise" and words[4] == f"{(1 << 24) // 8:,}" for words in user[:8])
    small = [f"tables.{table}.buckets=1024" for table in ("user", "item", "history", "tags")]
    small += [f"data.dataset={dataset}", f"run_dir={run}", "data.batch_size=256", "loss.negatives.sampled=100"]
    said = cli("train", LARGE, *small)
    assert said.code == 0, said.err
