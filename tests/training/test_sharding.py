"""The plan obeys the config, is the same wherever it is made, and is told in right numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import MIXED, PLANS, TABLES, event_config, tables
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.optimizer import fuse_table_updates
from trec_twotower.training.sharding import RankMemory, TablePlacement, make_plan, placements, shard_columns

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
SIZES = {name: (spec["buckets"], spec["dim"]) for name, spec in tables("auto").items()}


def planned(
    plan: Any, num_ranks: int, *, memory: RankMemory | None = None, device: str = "cpu", **parts: Any
) -> list[TablePlacement]:
    """Made in a process that has no group: whatever asked the other ranks would fail."""
    assert not dist.is_initialized()
    config = event_config(Path("world"), Path("run"), plan, **parts)
    schema = config.feature_schema
    model = TwoTower(schema, config.model, config.loss, Ranks(0, 1, torch.device("cpu")))
    fuse_table_updates(model, config.train.optimizer)
    return placements(make_plan(model, schema, num_ranks, torch.device(device), 8, memory=memory))


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


@pytest.mark.parametrize(
    ("dim", "num_ranks", "columns"),
    [
        (128, 1, 128),
        (128, 2, 64),
        (128, 3, 64),
        (128, 4, 32),
        (128, 64, 4),
        (12, 2, 12),
        (20, 2, 20),
        (24, 2, 12),
        (4, 8, 4),
    ],
)
def test_tables_are_cut_no_narrower_than_the_ranks_need(dim, num_ranks, columns):
    """A divisor of dim and a multiple of 4: 12 columns over two ranks would be 6 and 6, so they stay together."""
    assert shard_columns(dim, num_ranks) == columns
    wanted = tables("column_wise")
    wanted["country"] |= {"dim": dim, "shard_columns": None}
    found = [shard for shard in planned("column_wise", num_ranks, tables=wanted) if shard.table == "country"]
    assert [shard.columns for shard in found] == [columns] * (dim // columns)


def test_a_width_that_is_asked_for_holds_for_any_number_of_ranks():
    """Row-wise Adagrad keeps a state for each shard: with one width a run may change its ranks."""
    wanted = tables("column_wise")
    wanted["country"] |= {"dim": 32, "shard_columns": 8}
    for num_ranks in (1, 2, 8):
        found = [shard for shard in planned("column_wise", num_ranks, tables=wanted) if shard.table == "country"]
        assert [shard.columns for shard in found] == [8] * 4


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"sharding": "column_wise", "shard_columns": 6}, "shard_columns 6 with sharding column_wise and dim 24"),
        ({"sharding": "column_wise", "shard_columns": 16}, "multiple of 4 that divides dim"),
        ({"sharding": "row_wise", "shard_columns": 8}, "it belongs to column_wise"),
        ({"cache_share": 0.5}, "cache_share 0.5, but kernel fused has no cache"),
        ({"kernel": "fused_uvm", "cache_share": 0.5}, "kernel fused_uvm has no cache"),
        ({"sharding": "data_parallel", "dtype": "fp16"}, "dtype fp16: choose another sharding"),
        ({"sharding": "data_parallel", "kernel": "fused_uvm"}, "kernel fused_uvm and dtype fp32: choose another"),
    ],
)
def test_settings_of_a_table_that_clash_are_refused(spec, said):
    wanted = tables("auto")
    wanted["country"] = {"buckets": 100, "dim": 24, **spec}
    with pytest.raises(ConfigError, match=said):
        planned("auto", 2, tables=wanted)


# Memory


@pytest.mark.parametrize("plan", ["auto", "table_wise", "row_wise"])
def test_tables_that_fit_nowhere_are_a_mistake_in_the_config(plan):
    """2^32 rows of 512 columns are 8,796,093 MB, a number a row 17,180 more.

    The planner's own error would be a page, and no ConfigError.
    """
    wanted = tables(plan)
    wanted["item"] |= {"buckets": 2**32, "dim": 512}
    said = "on 2 ranks: .* need 8,813,273 MB, of which 'item' 8,813,273 MB, and each rank has 100,000 MB of memory, of"
    optimizer = {"optimizer": {"sparse": "rowwise_adagrad"}}
    with pytest.raises(ConfigError, match=said):
        planned(plan, 2, tables=wanted, train=optimizer, memory=RankMemory(100 * 10**9))


def test_the_memory_of_a_rank_decides_what_fits():
    """A table of 64 MB and Adagrad's 64 fits whole into 160 MB, less 5 %, in halves into 80, and not into 60."""
    wanted = tables("auto")
    wanted["item"] |= {"buckets": 1_000_000, "dim": 16}
    adagrad = {"optimizer": {"sparse": "adagrad"}}

    def shards(megabytes: int) -> int:
        memory = RankMemory(megabytes * 10**6)
        return sum(shard.table == "item" for shard in planned("auto", 2, tables=wanted, train=adagrad, memory=memory))

    assert shards(100) == 2
    wanted["item"]["sharding"] = "table_wise"
    assert shards(160) == 1
    for kind, megabytes in (("table_wise", 120), ("row_wise", 60)):
        wanted["item"]["sharding"] = kind
        with pytest.raises(ConfigError, match="need 128 MB, of which 'item' 128 MB"):
            shards(megabytes)


def test_sixteen_bits_take_half():
    """A table of 128 MB fits into 100 MB a rank as fp16 alone."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 2_000_000, "dim": 16}
    with pytest.raises(ConfigError, match="do not fit"):
        planned("auto", 1, tables=wanted, memory=RankMemory(100 * 10**6))
    wanted["item"]["dtype"] = "fp16"
    assert planned("auto", 1, tables=wanted, memory=RankMemory(100 * 10**6))


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_kernels_beside_a_gpu_are_refused_by_name_without_one(kernel):
    wanted = tables("auto")
    wanted["item"]["kernel"] = kernel
    with pytest.raises(ConfigError, match=rf"'item' has kernel {kernel}, .* set kernel: fused\."):
        planned("auto", 1, tables=wanted)


@pytest.mark.parametrize(
    ("kernel", "share", "gpu_megabytes", "fits"),
    [
        ("fused", None, 100, False),
        ("fused_uvm", None, 10, True),
        ("fused_uvm_caching", 0.5, 100, True),
        ("fused_uvm_caching", 0.5, 60, False),
        ("fused_uvm_caching", 0.25, 60, True),
        ("fused_uvm_caching", None, 50, True),
    ],
)
def test_a_kernel_says_how_much_of_a_table_lies_on_the_gpu(kernel, share, gpu_megabytes, fits):
    """A table of 128 MB: all of it, none, or the cache's share (by default a fifth) and what finds rows in it."""
    wanted = tables("table_wise")
    wanted["item"] |= {"buckets": 2_000_000, "dim": 16, "kernel": kernel, "cache_share": share}
    memory = RankMemory(10**9, gpu_megabytes * 10**6)
    if not fits:
        with pytest.raises(ConfigError, match=f"has {gpu_megabytes} MB on its GPU and 1,000 MB host memory"):
            planned("auto", 1, tables=wanted, memory=memory, device="cuda")
        return
    (item,) = (
        shard for shard in planned("auto", 1, tables=wanted, memory=memory, device="cuda") if shard.table == "item"
    )
    assert item.kernel == kernel
