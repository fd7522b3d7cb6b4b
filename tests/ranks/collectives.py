"""The collectives of shared memory beside gloo's: `-m tests.ranks.collectives OUT`, a file of each rank's findings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trec_twotower.distributed.ranks import Ranks, start_ranks

SIZES = (0, 1, 7, 1_000, 50_000, 700_001)  # of rows; the last makes the memory grow, and sums be made in parts


def single(*names: str) -> Any:
    """The collective under the name that this torch calls it by."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def all_of(ranks: Ranks, size: int, group: dist.ProcessGroup | None) -> Iterator[tuple[str, Tensor]]:
    """What each collective makes of numbers that differ by rank."""
    number, rank = ranks.num_ranks, ranks.rank
    random = torch.Generator().manual_seed(rank)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(-99, 99, shape, generator=random).float()  # whole: sums are exact in any order

    total = drawn(size)
    dist.all_reduce(total, group=group)
    yield "all_reduce", total
    slanted = drawn(3, size).T
    dist.all_reduce(slanted, group=group)
    yield "all_reduce of columns", slanted
    same = drawn(1).expand(size)
    whole = torch.empty(number * size)
    single("all_gather_single", "all_gather_into_tensor")(whole, same, group=group)
    yield "all_gather_single of one number", whole
    everyone = [torch.empty(size, 2) for _ in range(number)]
    dist.all_gather(everyone, drawn(size, 2), group=group)
    yield "all_gather", torch.cat(everyone)
    whole = torch.empty(number * size, 2)
    single("all_gather_single", "all_gather_into_tensor")(whole, drawn(size, 2), group=group)
    yield "all_gather_single", whole
    mine, given = torch.empty(size, 2), drawn(number * size, 2)
    single("reduce_scatter_single", "reduce_scatter_tensor")(mine, given, group=group)
    yield "reduce_scatter_single", mine
    mine = torch.empty(size * (rank + 1))
    dist.reduce_scatter(mine, [drawn(size * (each + 1)) for each in range(number)], group=group)
    yield "reduce_scatter", mine
    whole = torch.empty(number * size, 2)
    dist.all_to_all_single(whole, drawn(number * size, 2), group=group)
    yield "all_to_all_single", whole
    sent = [(rank + each) % 3 * size // 3 for each in range(number)]  # as many as come from there
    ids = torch.empty(sum(sent), dtype=torch.int64)
    dist.all_to_all_single(ids, drawn(sum(sent)).long(), sent, sent, group=group)
    yield "all_to_all_single of parts", ids
    told = drawn(size)
    dist.broadcast(told, number - 1, group=group)
    yield "broadcast", told


def main() -> None:
    with start_ranks() as ranks:
        assert ranks.group is not None and dist.get_backend(ranks.group) == "shared_memory"
        different = []
        for size in SIZES:
            pairs = zip(all_of(ranks, size, ranks.group), all_of(ranks, size, None), strict=True)
            different += [f"{name} of {size}" for (name, ours), (_, gloos) in pairs if not torch.equal(ours, gloos)]
        found = ranks.collect(different)
        noise = torch.randn(700_001, generator=torch.Generator().manual_seed(ranks.rank))
        dist.all_reduce(noise, group=ranks.group)
        sums = ranks.collect(float(noise.double().sum()))
        if ranks.is_first:
            Path(sys.argv[1]).write_text(json.dumps({"different": found, "sums": sums}))


if __name__ == "__main__":
    main()
