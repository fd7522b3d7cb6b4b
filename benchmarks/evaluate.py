"""Evaluation over the whole catalogue by exact search, beside the plain numpy way, on one core.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py [--gowalla FOLDER] [--users 8192] [--json FILE]

Both rank every item for the same users, leave out what they have seen, and give mean Recall, NDCG, Hit, MRR, MAP and
precision at 20; they take turns, and the best of three rounds counts. FOLDER holds train.txt and test.txt of LightGCN's
split, whose lists of seen and wanted items are taken; without it lists of the same mean lengths are drawn. The vectors
are drawn, d = 64: what they hold changes nothing of the work.

evaluate_users_per_s        ours
evaluate_numpy_users_per_s  blocks of users x items by numpy: product, seen items to -inf, argpartition, sort
evaluate_vs_numpy           ours as a multiple of it
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import headline, write_figures

from trec_twotower.evaluation.metrics import mean_metrics, ranking_metrics
from trec_twotower.index import ExactItems, exact_search
from trec_twotower.ops.ragged import Ragged

K, DIM, BLOCK, ROUNDS = 20, 64, 1024, 3
GOWALLA_ITEMS = 40_981


def ours(user_QD: np.ndarray, item_ID: np.ndarray, seen: Ragged, positives: Ragged) -> dict[str, float]:
    """As `evaluate` does it."""
    items = ExactItems(item_ID)
    ranked = np.empty((len(user_QD), K), np.int64)
    for start in range(0, len(user_QD), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(user_QD)))
        ranked[rows] = exact_search(items, user_QD[rows], K, seen.take(rows))[1]
    return mean_metrics(ranking_metrics(ranked, positives, [K]))


def by_numpy(user_QD: np.ndarray, item_ID: np.ndarray, seen: Ragged, positives: Ragged) -> dict[str, float]:
    """As one writes it down first."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    totals = dict.fromkeys(("recall", "ndcg", "hit", "mrr", "map", "precision"), 0.0)
    for start in range(0, len(user_QD), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(user_QD)))
        score = user_QD[rows] @ item_ID.T
        mine = seen.take(rows)
        score[mine.rows, mine.values] = -np.inf
        best = np.argpartition(-score, K, axis=1)[:, :K]
        order = np.argsort(-np.take_along_axis(score, best, axis=1), axis=1)
        ranked = np.take_along_axis(best, order, axis=1)
        wanted = positives.take(rows)
        is_wanted = np.zeros(score.shape, bool)
        is_wanted[wanted.rows, wanted.values] = True
        hit = np.take_along_axis(is_wanted, ranked, axis=1)
        num_wanted = is_wanted.sum(axis=1)
        num_hits = hit.sum(axis=1)
        ideal = np.cumsum(discount)[np.minimum(num_wanted, K) - 1]
        totals["recall"] += (num_hits / num_wanted).sum()
        totals["ndcg"] += (hit @ discount / ideal).sum()
        totals["hit"] += (num_hits > 0).sum()
        totals["mrr"] += np.where(num_hits > 0, 1 / (hit.argmax(axis=1) + 1), 0).sum()
        precision = np.cumsum(hit, axis=1) / np.arange(1, K + 1) * hit
        totals["map"] += (precision.sum(axis=1) / np.minimum(num_wanted, K)).sum()
        totals["precision"] += (num_hits / K).sum()
    return {f"{name}@{K}": total / len(user_QD) for name, total in totals.items()}


def drawn_lists(num_users: int, rng: np.random.Generator) -> tuple[Ragged, Ragged]:
    """Seen and wanted items as many as Gowalla's, 27 and 7 a user, no item both."""
    seen, wanted = [], []
    for _ in range(num_users):
        sizes = 1 + rng.geometric(1 / 26), rng.geometric(1 / 7)
        items = rng.permutation(np.unique(rng.integers(0, GOWALLA_ITEMS, sum(sizes))))
        seen.append(items[sizes[1] :])
        wanted.append(items[: sizes[1]])
    return Ragged.from_lists(seen), Ragged.from_lists(wanted)


def gowalla_lists(folder: Path, num_users: int) -> tuple[Ragged, Ragged]:
    """Those of the first users of train.txt and test.txt: a line is the user, then the items."""

    def read(name: str) -> dict[int, list[int]]:
        rows = (list(map(int, line.split())) for line in (folder / name).read_text().splitlines())
        return {row[0]: row[1:] for row in rows if len(row) > 1}

    train, test = read("train.txt"), read("test.txt")
    users = sorted(train.keys() & test.keys())[:num_users]
    return Ragged.from_lists(train[user] for user in users), Ragged.from_lists(test[user] for user in users)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gowalla", type=Path, help="the folder with train.txt and test.txt")
    parser.add_argument("--users", type=int, default=8192)
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("both are to run on one core: set OMP_NUM_THREADS=1")
    print(headline(), flush=True)
    rng = np.random.default_rng(0)
    lists = gowalla_lists(options.gowalla, options.users) if options.gowalla else drawn_lists(options.users, rng)
    seen, positives = lists
    item_ID = rng.normal(size=(GOWALLA_ITEMS, DIM)).astype(np.float32)
    user_QD = rng.normal(size=(len(seen), DIM)).astype(np.float32)
    contenders: dict[str, Callable[..., dict[str, float]]] = {"ours": ours, "numpy": by_numpy}
    best_s = dict.fromkeys(contenders, np.inf)
    for _ in range(ROUNDS):
        found = {}
        for name, contender in contenders.items():
            started = time.perf_counter()
            found[name] = contender(user_QD, item_ID, seen, positives)
            best_s[name] = min(best_s[name], time.perf_counter() - started)
        for metric, value in found["ours"].items():
            assert abs(value - found["numpy"][metric]) < 2 / len(seen), f"{metric}: {found}"  # equal scores may swap
    rate = {name: len(seen) / taken_s for name, taken_s in best_s.items()}
    figures = {
        "evaluate_users_per_s": rate["ours"],
        "evaluate_numpy_users_per_s": rate["numpy"],
        "evaluate_vs_numpy": rate["ours"] / rate["numpy"],
    }
    print("\n".join(f"{name:<28}{value:>12,.2f}" for name, value in figures.items()))
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
