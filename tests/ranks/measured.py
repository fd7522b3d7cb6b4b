"""Measures the memory of tables: `-m tests.ranks.measured OUT`.

The first rank writes OUT: under "memory" for each case [planned, measured] bytes of each rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trec_twotower.cli import _quiet
from trec_twotower.commands.output import leave

_quiet()

from tests.ranks.worlds import user_config  # noqa: E402
from trec_twotower.config.run_config import RunConfig  # noqa: E402
from trec_twotower.distributed.host_memory import resident_bytes  # noqa: E402
from trec_twotower.distributed.ranks import Ranks, start_ranks  # noqa: E402
from trec_twotower.training.model_builder import build_model  # noqa: E402
from trec_twotower.training.optimizer import RunOptimizer, fuse_table_updates  # noqa: E402
from trec_twotower.training.sharding import placements  # noqa: E402
from trec_twotower.training.sharding_plan import OnlyTables, shard_bytes  # noqa: E402

Kinds = dict[str, tuple[str, str]]  # table: sharding and dtype

MEMORY: dict[str, tuple[str, Kinds]] = {
    "row-wise Adagrad": ("rowwise_adagrad", {"item": ("row_wise", "fp32"), "tag": ("table_wise", "fp16")}),
    "Adagrad": ("adagrad", {"item": ("column_wise", "fp32"), "tag": ("row_wise", "fp32")}),
    "copies": ("rowwise_adagrad", {"item": ("data_parallel", "fp32"), "tag": ("row_wise", "fp16")}),
}


def config_of(kinds: Kinds, sparse: str, rows: int) -> RunConfig:
    tables = {
        name: {"buckets": rows, "dim": 64, "sharding": sharding, "dtype": dtype, "shard_columns": None}
        for name, (sharding, dtype) in kinds.items()
    }
    return user_config(Path("w"), Path("r"), "auto", tables=tables, train={"optimizer": {"sparse": sparse}})


kept: list[Any] = []  # what is freed while the next is measured would be taken for a saving


def memory_of(config: RunConfig, ranks: Ranks) -> tuple[int, int]:
    """Bytes that this rank's tables and their state should take, and by which its resident set grows."""
    before = resident_bytes()
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    for parts in optimizer.state().values():
        for value in parts.values():
            for tensor in (
                [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
            ):
                tensor.add_(0)  # zeros have no pages before they are written to
    kept.append((model, optimizer))
    after = resident_bytes()
    only = OnlyTables(config.feature_schema)
    fuse_table_updates(only, config.train.optimizer)
    mine = [shard_bytes(only, shard) for shard in placements(model.plan) if shard.rank == ranks.rank]
    return sum(size.weights + size.state for size in mine), after - before


def main() -> None:
    with start_ranks(timeout_s=60) as ranks:
        first = MEMORY["copies"]  # a first model costs more than its tables
        memory_of(config_of(first[1], first[0], 400_000), ranks)
        memory = {}
        for name, (sparse, kinds) in MEMORY.items():
            memory[name] = ranks.collect(memory_of(config_of(kinds, sparse, 400_000), ranks))
        if ranks.is_first:
            Path(sys.argv[1]).write_text(json.dumps({"memory": memory}))


if __name__ == "__main__":
    main()
    leave(0)  # the kept models outlive the process group
