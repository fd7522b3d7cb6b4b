"""How much is scanned: as little as reaches the target recall, measured against exact search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError
from trec_twotower.index.backends.faiss_backend import Answer
from trec_twotower.index.exact import RunningBest
from trec_twotower.index.searcher import SearchEffort, Searcher
from trec_twotower.ops.ragged import Ragged

SAFE = 0.1  # share of the allowed misses that is left unused, since other users lose a little more
FACTORS = (1, 2, 4, 8, 16)  # of k: the neighbours that searches are tuned for
LATENCY_USERS = 256  # searched for one by one
REFINE_FACTORS = (2, 3, 4, 6, 8, 12, 16, 32)
AROUND = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # factors of the breadth on the curve of the report


class RecallJudge:
    """The recall of answers for some users; among items of equal score any counts."""

    def __init__(self, best: RunningBest, k: int, slack: float) -> None:
        self.user_BD, self.k = best.user_BD, k
        self.best_BK = best.item_row_BK[:, :k].copy()  # a view would keep the rest in memory
        worst_B = best.score_BK[:, k - 1]
        tied_B = worst_B - slack * np.linalg.norm(self.user_BD, axis=1)
        good_BC = (best.score_BK >= tied_B[:, None]) & (best.item_row_BK >= 0)
        self._good = Ragged(np.concatenate([[0], np.cumsum(good_BC.sum(axis=1))]), best.item_row_BK[good_BC])
        # Where more items tie than exact search was asked for, the score alone decides
        self._tied_B = np.where(good_BC.all(axis=1) & (best.score_BK.shape[1] > k), tied_B, np.inf)

    def recall(self, found: Answer) -> float:
        score_BK, item_row_BK = found
        is_good_BK = self._good.contain(item_row_BK) | ((score_BK >= self._tied_B[:, None]) & (item_row_BK >= 0))
        return float(np.minimum(is_good_BK.sum(axis=1), self.k).mean() / self.k)


def tune(
    searcher: Searcher, tuned_for: Sequence[RecallJudge], reported_on: RecallJudge, config: IndexConfig
) -> dict[str, Any]:
    """Return the part of the report about the searches that reach the target recall; sets the searcher's refinement.

    `tuned_for` has judges of rising k, `reported_on` judges the first k for other users. Raises ConfigError where
    scanning everything does not reach the target.
    """
    _choose_refinement(searcher, tuned_for[0], config)
    efforts: list[SearchEffort] = []
    for judge in tuned_for:
        efforts.append(_tune_for(searcher, judge, efforts[-1].breadth if efforts else 0, config))
    found = searcher.search(reported_on.user_BD, reported_on.k, efforts[0])
    share_B = searcher.scanned_shares(reported_on.user_BD, efforts[0])
    return {
        "k": reported_on.k,
        "efforts": tuple(efforts),
        "refine_factor": searcher.refine_factor,
        "reached_recall": reported_on.recall(found),
        "scanned_share": float(share_B.mean()),
        "scanned_most": float(np.percentile(share_B, 99)),
        "curve": _curve(searcher, reported_on, efforts[0]),
        "latency_ms": _latency_ms(searcher, reported_on, efforts[0]),
    }


def _latency_ms(searcher: Searcher, judge: RecallJudge, effort: SearchEffort) -> dict[str, float]:
    """Return percentiles of the wall time of searches for one user each, after one search that is not timed."""
    seconds = []
    for user_D in [judge.user_BD[0], *judge.user_BD[:LATENCY_USERS]]:
        started = time.perf_counter()
        searcher.search(user_D[None], judge.k, effort)
        seconds.append(time.perf_counter() - started)
    p50, p90, p99 = (1e3 * np.percentile(seconds[1:], [50, 90, 99])).tolist()
    return {"p50": p50, "p90": p90, "p99": p99}


def _choose_refinement(searcher: Searcher, judge: RecallJudge, config: IndexConfig) -> None:
    """Choose the fewest candidates to score again that leave half of the allowed misses to the choice of lists."""
    if searcher.shards[0].refine is None:
        return
    wanted = config.target_recall + (1 - config.target_recall) / 2
    most = searcher.most_breadth
    effort = SearchEffort(judge.k, min(most, max(64, most // 4)), 1.0)
    for factor in REFINE_FACTORS:
        searcher.refine_factor = factor
        if judge.recall(searcher.search(judge.user_BD, judge.k, effort)) >= wanted:
            return


def _tune_for(searcher: Searcher, judge: RecallJudge, least: int, config: IndexConfig) -> SearchEffort:
    """Return the least effort that reaches the target for the judge's users and k.

    The breadth is predicted from where each user's best items are; searches show what codes and rounding lose beyond
    that, and a greater breadth makes up for it.
    """
    aim = config.target_recall + SAFE * (1 - config.target_recall)
    most = searcher.most_breadth
    share, breadth, reached = aim, least, 0.0
    while True:
        breadth = min(most, max(breadth, searcher.breadth_for(judge.user_BD, judge.best_BK, share)))
        effort = SearchEffort(judge.k, breadth, 1.0)
        reached = judge.recall(searcher.search(judge.user_BD, judge.k, effort))
        if reached >= aim or breadth >= most:
            break
        share += 1.1 * (aim - reached)
        breadth = breadth + 1 if share <= 1 else math.ceil(breadth * searcher.growth)
    if reached < config.target_recall:
        raise _unreachable(reached, judge.k, searcher, config)
    return replace(effort, scanned_share=float(searcher.scanned_shares(judge.user_BD, effort).mean()))


def _unreachable(best: float, k: int, searcher: Searcher, config: IndexConfig) -> ConfigError:
    return ConfigError(
        f"index.target_recall {config.target_recall:g} cannot be reached by {type(searcher.shards[0].base).__name__} "
        f"of this recipe: scanning everything finds {best:.4f} of the best {k:,}, since its codes are too coarse. "
        f"Lower index.target_recall to {np.floor(best * 1000) / 1000:g}, or allow finer codes: more index.memory_gb or "
        f"an index.factory such as IVF{searcher.num_lists or 1024},Flat."
    )


def _curve(searcher: Searcher, judge: RecallJudge, effort: SearchEffort) -> tuple[tuple[float, float, float], ...]:
    """Return recall, scanned share and users/s of CPU time at several breadths."""
    points = []
    for breadth in sorted({max(1, round(effort.breadth * factor)) if effort.breadth else 0 for factor in AROUND}):
        wider = replace(effort, breadth=min(breadth, searcher.most_breadth))
        started = time.process_time()
        found = searcher.search(judge.user_BD, judge.k, wider)
        taken_s = max(time.process_time() - started, 1e-9)
        share = float(searcher.scanned_shares(judge.user_BD, wider).mean())
        points.append((judge.recall(found), share, len(judge.user_BD) / taken_s))
    return tuple(points)
