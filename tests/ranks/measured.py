"""What tables really take and send: `-m tests.ranks.measured OUT`, beside what the plan says of both.

The first rank writes OUT: under "memory" for each case [expected, measured] of each rank, under "sent" of each part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trec_twotower.cli import _quiet

_quiet()

from tests.ranks.worlds import user_config  # noqa: E402
from trec_twotower.config.run_config import RunConfig  # noqa: E402
from trec_twotower.data.features.transform import Columns  # noqa: E402
from trec_twotower.data.loading.batch import make_batch  # noqa: E402
from trec_twotower.distributed.host_memory import resident_bytes  # noqa: E402
from trec_twotower.distributed.ranks import Ranks, start_ranks  # noqa: E402
from trec_twotower.ops.ragged import Lists  # noqa: E402
from trec_twotower.training.model_builder import build_model, inner_model  # noqa: E402
from trec_twotower.training.optimizer import RunOptimizer, fuse_table_updates  # noqa: E402
from trec_twotower.training.sharding import placements  # noqa: E402
from trec_twotower.training.sharding_plan import OnlyTables, StepSize, bytes_of, exchange, exchange_of_towers  # noqa: E402

Kinds = dict[str, tuple[str, str]]  # table: sharding and dtype

MEMORY: dict[str, tuple[str, Kinds]] = {
    "row-wise Adagrad": ("rowwise_adagrad", {"item": ("row_wise", "fp32"), "tag": ("table_wise", "fp16")}),
    "Adagrad": ("adagrad", {"item": ("column_wise", "fp32"), "tag": ("row_wise", "fp32")}),
    "copies": ("rowwise_adagrad", {"item": ("data_parallel", "fp32"), "tag": ("row_wise", "fp16")}),
}
SENT: dict[str, Kinds] = {
    **{sharding: {"item": (sharding, "fp32"), "tag": (sharding, "fp32")} for sharding in
       ("table_wise", "row_wise", "column_wise", "table_row_wise")},
    "mixed": {"item": ("row_wise", "fp32"), "tag": ("table_wise", "fp16")},
}  # fmt: skip


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
    mine = [bytes_of(only, shard) for shard in placements(model.plan) if shard.rank == ranks.rank]
    return sum(size.weights + size.state for size in mine), after - before


class Sent:
    """Counts what this rank's collectives send to other ranks: whole numbers, and numbers forward and backward."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.phase = ranks, "vectors"
        self.bytes = dict.fromkeys(("ids", "vectors", "gradients"), 0.0)

    def __enter__(self) -> Sent:
        self._real = {name: getattr(dist, name) for name in
                      ("all_to_all_single", "reduce_scatter", "reduce_scatter_tensor", "all_gather",
                       "all_gather_into_tensor", "all_reduce")}  # fmt: skip
        for name in self._real:
            setattr(dist, name, getattr(self, name))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)

    def _note(self, tensor: torch.Tensor, num_bytes: float) -> None:
        if tensor.dtype == torch.int64:
            return  # how long the following messages are
        self.bytes["ids" if tensor.dtype == torch.int32 else self.phase] += num_bytes

    def all_to_all_single(self, output: Any, input: Any, output_split_sizes: Any = None,
                          input_split_sizes: Any = None, **rest: Any) -> Any:  # fmt: skip
        away = 1 - (input_split_sizes[self.ranks.rank] / max(sum(input_split_sizes), 1) if input_split_sizes else 0.5)
        self._note(input, input.nbytes * away)
        return self._real["all_to_all_single"](output, input, output_split_sizes, input_split_sizes, **rest)

    def reduce_scatter(self, output: Any, input_list: Any, *args: Any, **rest: Any) -> Any:
        self._note(output, sum(part.nbytes for part in input_list) - output.nbytes)
        return self._real["reduce_scatter"](output, input_list, *args, **rest)

    def reduce_scatter_tensor(self, output: Any, input: Any, *args: Any, **rest: Any) -> Any:
        self._note(output, input.nbytes - output.nbytes)
        return self._real["reduce_scatter_tensor"](output, input, *args, **rest)

    def all_gather(self, outputs: Any, tensor: Any, *args: Any, **rest: Any) -> Any:
        self._note(tensor, tensor.nbytes * (self.ranks.num_ranks - 1))
        return self._real["all_gather"](outputs, tensor, *args, **rest)

    def all_reduce(self, tensor: Any, *args: Any, **rest: Any) -> Any:
        """As in a ring: what is scattered as sums and then gathered."""
        self._note(tensor, 2 * tensor.nbytes * (self.ranks.num_ranks - 1) / self.ranks.num_ranks)
        return self._real["all_reduce"](tensor, *args, **rest)

    def all_gather_into_tensor(self, output: Any, input: Any, *args: Any, **rest: Any) -> Any:
        self._note(input, input.nbytes * (self.ranks.num_ranks - 1))
        return self._real["all_gather_into_tensor"](output, input, *args, **rest)


def sent_by(config: RunConfig, ranks: Ranks) -> dict[str, tuple[float, float]]:
    """What a step of 40 users and 25 items should send to others, and what it sends; means over the ranks."""
    model = inner_model(sharded := build_model(config, ranks))
    random = np.random.default_rng(ranks.rank)

    def bags(rows: int, length: int) -> Lists:
        return Lists(np.arange(rows + 1) * length, random.integers(0, 500, rows * length, np.int32))

    user, item = (
        Columns(40, {"history": bags(40, 3)}, {}),
        Columns(25, {"item_id": bags(25, 1), "tags": bags(25, 2)}, {}),
    )
    batch = make_batch(config.feature_schema, user, item)
    with Sent(ranks) as sent:
        pooled = model.tables(batch.sparse).values()
        sent.phase = "gradients"
        pooled.sum().backward()
    step = StepSize(
        40, dict(zip(config.feature_schema.layout.pooled_keys, (120.0, 25.0, 50.0), strict=True)), False, 50.0
    )
    expected = exchange(config.feature_schema, placements(sharded.plan), step, ranks.num_ranks)
    measured = ranks.sum(np.array(list(sent.bytes.values()))) / ranks.num_ranks
    return {
        name: (sum(getattr(each, name) for each in expected.values()), float(value))
        for name, value in zip(sent.bytes, measured, strict=True)
    }


def candidates_sent(config: RunConfig, ranks: Ranks) -> dict[str, tuple[float, float]]:
    """The same of 50 candidates' vectors, which each rank has the half of (all, where it is alone)."""
    share = 50 // ranks.num_ranks
    vectors = torch.ones(share, config.model.vector_dim, requires_grad=True)
    with Sent(ranks) as sent:
        everyone = ranks.gather(vectors, [share] * ranks.num_ranks)
        sent.phase = "gradients"
        everyone.sum().backward()
    expected = exchange_of_towers(config, StepSize(0, {}, False, 50.0), ranks.num_ranks)["(candidates)"]
    return {name: (getattr(expected, name), value) for name, value in sent.bytes.items()}


def main() -> None:
    with start_ranks(timeout_s=60) as ranks:
        first = MEMORY["copies"]  # a first model costs more than its tables
        memory_of(config_of(first[1], first[0], 400_000), ranks)
        memory = {}
        for name, (sparse, kinds) in MEMORY.items():
            memory[name] = ranks.collect(memory_of(config_of(kinds, sparse, 400_000), ranks))
        sent = {name: sent_by(config_of(kinds, "sgd", 500), ranks) for name, kinds in SENT.items()}
        candidates = candidates_sent(config_of(SENT["mixed"], "sgd", 500), ranks)
        if ranks.is_first:
            Path(sys.argv[1]).write_text(json.dumps({"memory": memory, "sent": sent, "candidates": candidates}))


if __name__ == "__main__":
    main()
