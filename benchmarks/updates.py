"""Updates of tables on a CPU: as fbgemm is called by torchrec, and by trec_twotower/model/cpu/embedding_update.py.

    OMP_NUM_THREADS=1 python benchmarks/updates.py [--rounds 30] [--json FILE]

The tables of a step of benchmarks/training.py: 1 M rows by 64 that one feature looks up once a row, 200,000 that an
id and a list of 0 to 50 share; 4,096 rows, row-wise Adagrad. And rows of the second one by one, as sequences want
them. Both ways update tables of their own from the same gradients, in turn; medians of the rounds, backward passes
alone.

bags_fbgemm_s, bags_ours_s, bags_ratio    one update of all features in bags
rows_fbgemm_s, rows_ours_s, rows_ratio    one of as many rows, one by one
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen as Tables
from machine import headline, write_figures

from trec_twotower.model.cpu.embedding_update import accelerate_updates

ROWS, DIM, USERS, ITEMS, LONGEST = 4096, 64, 1_000_000, 200_000, 50


def tables(sizes: list[int], features: list[int], pooling: PoolingMode, *, is_ours: bool) -> Tables:
    made = Tables(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in sizes],
        feature_table_map=features,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.05,
        pooling_mode=pooling,
    )
    made.init_embedding_weights_uniform(-0.1, 0.1)
    if is_ours:
        model = torch.nn.Module()
        model._lookups = [made]  # type: ignore[assignment]
        accelerate_updates(model)
    return made


def skewed(count: int, below: int) -> torch.Tensor:
    return (below * torch.rand(count) ** 3).long()


def in_turn(contenders: dict[str, Tables], ids: torch.Tensor, offsets: torch.Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a backward pass of each."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    gradient: Any = None
    for _ in range(rounds):
        for name, each in contenders.items():
            found = each(ids, offsets)
            gradient = torch.randn_like(found) * 1e-3 if gradient is None else gradient
            started = time.perf_counter()
            found.backward(gradient)
            took[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(headline(), flush=True)
    longs = torch.randint(0, LONGEST + 1, (ROWS,))
    lengths = torch.cat([torch.ones(ROWS, dtype=torch.int64), longs, torch.ones(ROWS, dtype=torch.int64)])
    of_items = skewed(int(longs.sum()) + ROWS, ITEMS)
    ids = torch.cat([torch.randint(0, USERS, (ROWS,)), of_items])
    figures: dict[str, float] = {}
    for word, sizes, features, pooling, given, ends in (
        ("bags", [USERS, ITEMS], [0, 1, 1], PoolingMode.SUM, ids, lengths.cumsum(0)),
        ("rows", [ITEMS], [0], PoolingMode.NONE, of_items, torch.tensor([len(of_items)])),
    ):
        ways = {
            f"{word}_{name}_s": tables(sizes, features, pooling, is_ours=name == "ours") for name in ("fbgemm", "ours")
        }
        figures |= in_turn(ways, given, torch.cat([torch.zeros(1, dtype=torch.int64), ends]), options.rounds)
        figures[f"{word}_ratio"] = figures[f"{word}_fbgemm_s"] / figures[f"{word}_ours_s"]
    for name, value in figures.items():
        print(f"{name:<20}{value:>12.5f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
