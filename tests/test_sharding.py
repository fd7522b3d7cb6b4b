"""The plan obeys the config, is the same wherever it is made, and is told in right numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks.worlds import MIXED, PLANS, TABLES, event_config, tables
from trec_twotower.distributed import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.sharding import TablePlacement, describe_plan, make_plan, placements

SIZES = {name: (spec["buckets"], spec["dim"]) for name, spec in tables("auto").items()}


def planned(plan: Any, num_ranks: int, **parts: Any) -> list[TablePlacement]:
    """Made in a process that has no group: whatever asked the other ranks would fail."""
    assert not dist.is_initialized()
    config = event_config(Path("world"), Path("run"), plan, **parts)
    schema = config.feature_schema
    model = TwoTower(schema, config.model, config.loss, Ranks(0, 1, torch.device("cpu")))
    return placements(make_plan(model, schema, num_ranks, torch.device("cpu"), 8))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("plan", [*PLANS, "mixed"])
def test_every_table_is_sharded_as_it_asks(plan, num_ranks):
    """Its kind is the one named; its shards cover it once, data-parallel ones stand on every rank."""
    wanted = MIXED if plan == "mixed" else dict.fromkeys(TABLES, plan)
    found = planned(wanted, num_ranks)
    for table, (rows, columns) in SIZES.items():
        shards = [shard for shard in found if shard.table == table]
        assert {shard.sharding for shard in shards} == {wanted[table]}
        assert {shard.rank for shard in shards} <= set(range(num_ranks))
        match wanted[table]:
            case "data_parallel":
                assert [shard.rank for shard in shards] == list(range(num_ranks))
            case "table_wise":
                assert [(shard.rows, shard.columns) for shard in shards] == [(rows, columns)]
            case "column_wise":
                assert [(shard.rows, shard.columns) for shard in shards] == [(rows, 4)] * (columns // 4)
            case _:
                assert [shard.rank for shard in shards] == list(range(num_ranks))
                assert sum(shard.rows for shard in shards) == rows
                assert {shard.columns for shard in shards} == {columns}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_auto_keeps_to_kinds_between_which_a_run_may_change(num_ranks):
    """On another number of ranks the planner may choose otherwise: neither losses nor checkpoints may notice.

    Column-wise row-wise Adagrad has other numbers, a data-parallel table's states have other names.
    """
    assert {shard.sharding for shard in planned("auto", num_ranks)} <= {"table_wise", "row_wise"}


def test_table_wise_tables_are_spread_over_the_ranks():
    assert {shard.rank for shard in planned("table_wise", 2)} == {0, 1}


@pytest.mark.parametrize(("rows", "num_ranks"), [(3, 4), (1, 2), (9, 4), (6, 5)])
@pytest.mark.parametrize("kind", ["row_wise", "table_row_wise", "auto"])
def test_no_rank_gets_a_shard_without_rows(kind, rows, num_ranks):
    """Nine rows over four ranks are 3, 3, 3 and none. Asked for, that is refused; auto takes another kind.

    (fbgemm on CPU reads beyond its memory there, and fails only now and then.)
    """
    wanted = tables(kind)
    wanted["country"]["buckets"] = rows
    if kind == "auto":
        found = planned(kind, num_ranks, tables=wanted)
        assert all(shard.rows for shard in found)
        assert [shard.sharding for shard in found if shard.table == "country"] == ["table_wise"]
        return
    said = rf"'country' has {rows} rows, too few to spread {kind} over {num_ranks} ranks .*: use table_wise"
    with pytest.raises(ConfigError, match=said):
        planned(kind, num_ranks, tables=wanted)


@pytest.mark.parametrize("dim", [2, 6, 10])
def test_columns_that_do_not_split_are_refused(dim):
    wanted = tables("column_wise")
    wanted["country"]["dim"] = dim
    with pytest.raises(ConfigError, match=rf"'country' has dim {dim}, but column_wise sharding needs a multiple of 4"):
        planned("column_wise", 2, tables=wanted)


@pytest.mark.parametrize("plan", ["auto", "table_wise", "row_wise"])
def test_tables_that_fit_nowhere_are_a_mistake_in_the_config(plan):
    """2^33 rows of 256 columns are 8,796 GB; the planner's own error would be a page, and no ConfigError."""
    wanted = tables(plan)
    wanted["item"] |= {"buckets": 2**33, "dim": 256}
    with pytest.raises(ConfigError, match=r"do not fit on 2 ranks: .* 8,796\.1 GB, of which 'item' has 8,796\.1: use"):
        planned(plan, 2, tables=wanted)


# In words


def test_the_plan_in_words_has_the_bytes_of_every_shard():
    """Four bytes a weight; row-wise Adagrad keeps four more a row and shard. All by hand."""
    wanted = {
        "item": {"buckets": 1_000_000, "dim": 16, "sharding": "row_wise"},
        "click": {"buckets": 2_000_000, "dim": 8, "sharding": "column_wise"},
        "country": {"buckets": 500_000, "dim": 4, "sharding": "data_parallel"},
        "tag": {"buckets": 250_001, "dim": 8, "sharding": "row_wise"},
        "brand": {"buckets": 600_000, "dim": 10, "sharding": "table_wise"},
    }
    said = describe_plan(described("rowwise_adagrad", wanted), 2).splitlines()
    lines = {tuple(line.split()[:3]): line.split()[3:] for line in said[1:-2]}
    assert said[0].split() == ["table", "sharding", "rank", "rows", "columns", "weights", "MB", "state", "MB"]
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
    expected["brand", "table_wise", holder] = ["600,000", "10", "24.0", "2.4"]
    assert lines == expected
    totals = {holder: "114.9", str(1 - int(holder)): "88.5"}  # 88.5 without the brands' 26.4
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
