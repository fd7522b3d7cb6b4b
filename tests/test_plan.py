"""A plan is told in right numbers: bytes that tables really take and ranks really send."""

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
from trec_twotower.data.feature_dataset import Sources
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.distributed.host_memory import host_bytes
from trec_twotower.errors import ConfigError
from trec_twotower.training.optimizer import fuse_table_updates
from trec_twotower.training.sharding import TablePlacement
from trec_twotower.training.sharding_plan import (
    OnlyTables,
    ShardBytes,
    StepSize,
    bytes_of,
    describe_plan,
    exchange_of_towers,
    num_dense_weights,
    step_size,
)

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
LARGE = Path(__file__).resolve().parent.parent / "configs/large.yaml"


def test_the_plan_in_words_has_the_bytes_of_every_shard():
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
    assert said[-2:] == [f"rank {rank}: {totals[rank]} MB of tables and their optimizer's state" for rank in ("0", "1")]


def described(kind: str, wanted: dict[str, Any]) -> Any:
    return event_config(Path("world"), Path("run"), tables=wanted, train={"optimizer": {"sparse": kind}})


@pytest.mark.parametrize(("kind", "state"), [("sgd", "0.0"), ("adagrad", "48.0"), ("rowwise_adagrad", "4.0")])
def test_the_state_in_words_is_the_optimizers(kind, state):
    """A million rows of 12: Adagrad keeps as much as the table, row-wise Adagrad a number a row, SGD nothing."""
    wanted = tables("table_wise")
    wanted["item"]["buckets"] = 1_000_000
    line = next(line for line in describe_plan(described(kind, wanted), 1).splitlines() if line.startswith("item"))
    assert line.split()[-2:] == ["48.0", state]


def test_telling_a_plan_leaves_no_trace(monkeypatch):
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


def test_a_cached_table_is_told_on_the_gpu_and_beside_it():
    """48 MB and 4 of state in host memory; on the GPU a quarter of the weights, and 8 bytes a row to find them."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 1_000_000, "kernel": "fused_uvm_caching", "cache_share": 0.25}
    said = describe_plan(described("rowwise_adagrad", wanted), 1, gpu_gb=80).splitlines()
    assert "rank 0: 20.0 MB of tables and their optimizer's state, and 52.0 in host memory beside the GPU" in said


def test_a_table_beside_the_gpu_takes_none_of_it():
    """48 MB and 4 of state in host memory, and nothing by which to find them in a cache."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 1_000_000, "kernel": "fused_uvm"}
    config = described("rowwise_adagrad", wanted)
    model = OnlyTables(config.feature_schema)
    fuse_table_updates(model, config.train.optimizer)
    placed = TablePlacement("item", "table_wise", "fused_uvm", 0, 1_000_000, 12)
    assert bytes_of(model, placed) == ShardBytes(48_000_000, 4_000_000, 0, 52_000_000)


def test_updates_that_are_missing_here_are_missing_in_the_plan():
    with pytest.raises(ConfigError, match="adam, which fbgemm has on GPU alone"):
        describe_plan(described("adam", tables("auto")), 2)


# Against what happens


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, tmp_path_factory) -> dict[str, Any]:
    """What tables took and sent on some ranks. Blocks go back to the system at once, so that only tables stay."""
    path = tmp_path_factory.mktemp("measured") / "out.json"
    malloc = "glibc.malloc.mmap_threshold=262144:glibc.malloc.arena_max=1"
    code, said = torchrun(request.param, "tests.ranks.measured", path, GLIBC_TUNABLES=malloc)
    assert code == 0, said
    return {"num_ranks": request.param, **json.loads(path.read_text())}


def test_tables_take_the_memory_that_the_plan_tells(measured):
    """Weights and states of every rank, within 10 % of what the process grows by (seen: 0.4 %)."""
    assert len(measured["memory"]) == 3
    for name, found in measured["memory"].items():
        assert len(found) == measured["num_ranks"]
        for expected, grown in found:
            assert grown == pytest.approx(expected, rel=0.1), name
            assert expected > 50e6


def test_ranks_send_what_the_plan_tells(measured):
    """Counted in the collectives. How many ids a table cut by rows sends is up to the ids: half, within a few."""
    assert len(measured["sent"]) == 5
    for name, found in measured["sent"].items():
        for what, (expected, counted) in found.items():
            assert (expected > 0) == (measured["num_ranks"] > 1)
            is_cut_by_rows = name not in ("table_wise", "column_wise")
            tolerance = 0.05 if what == "ids" and is_cut_by_rows else 1e-6
            assert counted == pytest.approx(expected, rel=tolerance), f"{name}: {what}"


def test_ranks_send_the_vectors_that_the_plan_tells(measured):
    for what, (expected, counted) in measured["candidates"].items():
        assert (expected > 0) == (measured["num_ranks"] > 1 and what != "ids")
        assert counted == pytest.approx(expected, rel=1e-6), what


def test_the_towers_gradients_are_those_of_all_their_weights(tmp_path):
    """user: 8 wide to 10 to 6; item: 8 and 8 wide to 9 to 6; a temperature. With biases; by hand."""
    config = user_config(tmp_path, tmp_path / "r", loss={"temperature": {"learned": True, "start": 0.2}})
    schema = config.feature_schema
    sizes = [(*schema.layout.part_widths("user"), 10), (*schema.layout.part_widths("item"), 9)]
    weights = sum((sum(widths) + 1) * hidden + (hidden + 1) * 6 for *widths, hidden in sizes) + 1
    found = exchange_of_towers(config, StepSize(0, {}, False, 0.0), 4)["(towers)"]
    assert num_dense_weights(config) == weights
    assert found.gradients == 2 * 3 / 4 * 4 * weights and not found.ids and not found.vectors


# What a step looks up


@pytest.mark.parametrize("rows", ["event", "user"])
def test_a_step_is_as_large_as_the_plan_says(write_dataset, tmp_path, rows):
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
    step, _ = step_size(config, 2)
    sources = Sources(Dataset(folder), config.feature_schema, rows)
    counts = count_items(sources, config.loss)
    batches = [
        batch
        for rank in range(2)
        for batch in TrainBatches(sources, config.data, config.loss, counts, share=(rank, 2)).since(0, 8)
    ]
    candidates = np.mean([sum(batch.item_sizes) for batch in batches])
    assert step.candidates == pytest.approx(candidates, rel=0.02)
    for name in config.feature_schema.layout.pooled_keys:
        ids = np.mean([batch.sparse[name].values().numel() for batch in batches])
        # With a row per user a batch's histories are the half that chance draws.
        assert step.ids[name] == pytest.approx(ids, rel=0.05), name


def test_lengths_of_bags_come_from_the_footers(write_dataset, tmp_path):
    """Users of 2 and 4 items put half of them in, whatever stands in `history`; tags are one in every second row.

    A step of 8 users of 3 items, half of them targets, has 12 candidates and 7 samples, but never more than the
    catalogue.
    """
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
    config = user_config(tmp_path, tmp_path / "r", data={"dataset": folder})
    step, source = step_size(config, 2)
    assert source == "bags as long as in the data"
    assert step.rows == round((12 + 7) / 2)
    assert step.ids == {"user:history": 4 * 1.5, "item:item_id": 9.5, "item:tags": 9.5 * 0.5}
    shorter = user_config(tmp_path, tmp_path / "r", data={"dataset": folder, "batch_size": 1000}, loss={"negatives": {
        "sampled": "all"}}, user=[{"name": "history", "kind": "bag", "table": "item", "max_length": 1}])  # fmt: skip
    step, _ = step_size(shorter, 2)
    assert (step.rows, step.ids["user:history"], step.ids["item:item_id"]) == (500, 500.0, 50.0)
    clicks = user_config(tmp_path, tmp_path / "r", data={"dataset": folder}, user=[
        {"name": "clicks", "kind": "bag", "table": "item"}])  # fmt: skip
    assert step_size(clicks, 2)[0].ids["user:clicks"] == 4 * 2.0  # of 3, 0, null and 5


def test_what_users_put_in_is_no_target_and_candidates_are_in_the_catalogue(write_dataset, tmp_path):
    """Of 4 items a user a quarter goes in: 8 users have 24 targets. 1000 have 3000, of a catalogue of 50."""
    folder = write_dataset(
        tmp_path / "d",
        train=pa.table({"user_id": range(4), "history": [[1]] * 4, "positives": [[1, 2, 3, 4]] * 4}),
        items=pa.table({"item_id": range(50), "tags": [["a"]] * 50}),
    )
    config = user_config(tmp_path, tmp_path / "r", data={"dataset": folder, "input_share": 0.25})
    step, _ = step_size(config, 1)
    assert (step.candidates, step.ids["user:history"]) == (24 + 7, 8 * 1)
    many = user_config(tmp_path, tmp_path / "r", data={"dataset": folder, "batch_size": 1000})
    assert step_size(many, 1)[0].candidates == 50


def test_without_data_the_lengths_are_told_to_be_assumed(tmp_path):
    step, source = step_size(event_config(tmp_path / "nowhere", tmp_path / "r"), 1)
    assert source.startswith("no data at ") and "or 20" in source
    assert step.ids["user:history"] == 16 * 20 and step.ids["user:newest"] == 16 * 2
    assert step.ids["item:item_id"] == 16 + 7


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
