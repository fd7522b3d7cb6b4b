"""How much is scanned: as little as reaches the target recall, for users like those that ask."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trec_twotower.config import IndexConfig
from trec_twotower.data.lists import Lists
from trec_twotower.errors import ConfigError
from trec_twotower.index.engine import BestSoFar
from trec_twotower.index.probing import Fit, features
from trec_twotower.index.recipe import GRAPH_LISTS
from trec_twotower.index.scan import Scanner

SAFE = 0.1  # of the misses allowed are not used up, as other users' are a little more than those tuned for
CELLS = 1 << 16  # users x lists that are weighed together
TRIES = 6  # margins that are scanned with before all lists are


class Judge:
    """The recall of answers for some users: of items with equal scores, any will do."""

    def __init__(self, best: BestSoFar, k: int, slack: float) -> None:
        self.user_BD, self.k = best.user_BD, k
        self.worst_B = best.score_BK[:, k - 1].copy()
        self.best_BK = best.item_row_BK[:, :k].copy()  # not to keep the rest
        tied_B = self.worst_B - slack * np.linalg.norm(self.user_BD, axis=1)
        good_BC = (best.score_BK >= tied_B[:, None]) & (best.item_row_BK >= 0)
        self._good = Lists(np.concatenate([[0], np.cumsum(good_BC.sum(axis=1))]), best.item_row_BK[good_BC])
        # More ties than exact search was asked for: then the score alone can tell
        self._tied_B = np.where(good_BC.all(axis=1) & (best.score_BK.shape[1] > k), tied_B, np.inf)

    def recall(self, found: tuple[np.ndarray, np.ndarray]) -> float:
        score_BK, item_row_BK = found
        is_good_BK = self._good.contain(item_row_BK) | ((score_BK >= self._tied_B[:, None]) & (item_row_BK >= 0))
        return float(np.minimum(is_good_BK.sum(axis=1), self.k).mean() / self.k)


def tune(
    wholes: Sequence[Any], tuned_for: Sequence[Judge], reported_on: Judge, config: IndexConfig
) -> tuple[Scanner, dict[str, Any]]:
    """The scanner that reaches the target for the users of `tuned_for`, and what the report says of it.

    `tuned_for` has judges of rising k, `reported_on` one of the first k and of other users.
    """
    scanner = Scanner(wholes, config.device)
    _choose_refinement(scanner, tuned_for[0], config)
    fits: list[Fit] = []
    for judge in tuned_for:
        fits.append(_fit(scanner, judge, fits[-1] if fits else None, config))
    recall, shares, lists, _ = _reached(scanner, reported_on, fits[0])
    tuned = {
        "k": reported_on.k,
        "fits": tuple(fits),
        "refine_factor": scanner.refine_factor,
        "reached_recall": recall,
        "scanned_share": float(shares.mean()),
        "scanned_most": float(np.percentile(shares, 99)),
        "mean_lists": lists,
        "curve": _curve(scanner, reported_on, fits[0]),
    }
    return scanner, tuned


def _scan(scanner: Scanner, judge: Judge, fit: Fit) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, float]:
    """The answers as a fit gives them, each user's scanned share, and the mean number of lists."""
    if scanner.coarse is None:
        found = scanner.scan_codes(judge.user_BD, judge.k, max(fit.most_lists, judge.k))
        return found, np.full(len(judge.user_BD), fit.scanned_share), 0.0
    answers, shares, lists = [], [], []
    for user_BD in _by_width(judge.user_BD, fit.most_lists):
        chosen = scanner.choose_lists(user_BD, judge.k, fit)
        answers.append(scanner.scan_lists(user_BD, judge.k, chosen))
        shares.append(scanner.scanned(chosen.list_BP))
        lists.append((chosen.list_BP >= 0).sum(axis=1))
    score_BK, item_row_BK = (np.concatenate(part) for part in zip(*answers, strict=True))
    return (score_BK, item_row_BK), np.concatenate(shares), float(np.concatenate(lists).mean())


def _by_width(user_BD: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """The users in blocks whose matrices of `width` lists stay small beside the index."""
    step = max(16, CELLS // max(width, 1))
    return (user_BD[start : start + step] for start in range(0, len(user_BD), step))


def _reached(scanner: Scanner, judge: Judge, fit: Fit) -> tuple[float, np.ndarray, float, float]:
    """Recall, each user's scanned share, mean lists and users/s."""
    started = time.perf_counter()
    found, shares, lists = _scan(scanner, judge, fit)
    took = time.perf_counter() - started
    return judge.recall(found), shares, lists, len(judge.user_BD) / max(took, 1e-9)


def _choose_refinement(scanner: Scanner, judge: Judge, config: IndexConfig) -> None:
    """How many times k are scored again: the fewest that leave half of the misses allowed to the choice of lists."""
    if scanner.parts[0].refine is None:
        return
    wanted = config.target_recall + (1 - config.target_recall) / 2
    everything = Fit(judge.k, 0.0, (), 0.0, scanner.num_lists)
    for factor in (2, 3, 4, 6, 8, 12, 16, 32):
        scanner.refine_factor = factor
        if scanner.coarse is None:
            found = scanner.scan_codes(judge.user_BD, judge.k, 16 * factor * judge.k)
        else:
            most = min(scanner.num_lists, max(64, scanner.num_lists // 4))
            chosen = scanner.choose_lists(judge.user_BD, judge.k, everything, most=most)
            found = scanner.scan_lists(judge.user_BD, judge.k, chosen)
        if judge.recall(found) >= wanted:
            return


def _fit(scanner: Scanner, judge: Judge, shorter: Fit | None, config: IndexConfig) -> Fit:
    """The least scanning that reaches the target recall for the judge's users and k."""
    if scanner.coarse is None:
        return _fit_codes(scanner, judge, shorter, config)
    vector_BD = scanner.parts[0].transformed(judge.user_BD)
    most = scanner.num_lists if scanner.num_lists < GRAPH_LISTS else 2048
    # What users need when nothing is capped says where the cap may be
    fit = _with_margin(scanner, judge, _refitted(scanner, vector_BD, judge, Fit(judge.k, 0.0, (), 0.0, most)), config)
    lists_B = np.concatenate(
        [
            (scanner.choose_lists(user_BD, judge.k, fit).list_BP >= 0).sum(axis=1)
            for user_BD in _by_width(judge.user_BD, fit.most_lists)
        ]
    )
    cap = max(int(np.ceil(1.5 * np.percentile(lists_B, 99))), shorter.most_lists if shorter else 8)
    while cap < most:
        capped = _refitted(scanner, vector_BD, judge, replace(fit, most_lists=cap))
        capped = _with_margin(scanner, judge, capped, config, must=False)
        if judge.recall(_scan(scanner, judge, capped)[0]) >= config.target_recall:
            fit = capped
            break
        cap *= 2
    return replace(fit, scanned_share=float(_scan(scanner, judge, fit)[1].mean()))


def _refitted(scanner: Scanner, vector_BD: np.ndarray, judge: Judge, fit: Fit) -> Fit:
    assert scanner.coarse is not None
    most = min(fit.most_lists, scanner.num_lists)
    feature_BF = []
    for user_BD in _by_width(vector_BD, most):
        score_BP, list_BP = scanner.coarse.nearest(user_BD, most)
        feature_BF.append(features(score_BP, scanner.coarse.size_L[list_BP], fit.k))
    return fit.fitted(np.concatenate(feature_BF), judge.worst_B)


def _with_margin(scanner: Scanner, judge: Judge, fit: Fit, config: IndexConfig, *, must: bool = True) -> Fit:
    """The least margin that reaches the target.

    The margin at which each of a user's best items is scanned is that of its list, so the share that any margin finds
    is counted without scanning. Scans say what it loses beyond that, to coarse codes, and the margin makes up for it.
    """
    need_N, most = _needed_margins(scanner, judge, fit)
    aim = config.target_recall + SAFE * (1 - config.target_recall)
    lost = 0.0
    margin, reached = most, 0.0
    for _ in range(TRIES):
        wanted = aim + lost
        margin = most
        if wanted <= 1:
            margin = min(most, float(need_N[max(math.ceil(wanted * len(need_N)) - 1, 0)]) + 1e-6 * abs(most))
        reached = judge.recall(_scan(scanner, judge, replace(fit, margin=margin))[0])
        if reached >= aim or margin >= most:
            break
        lost += 1.1 * (aim - reached)
    if reached < config.target_recall and margin < most:
        margin = most
        reached = judge.recall(_scan(scanner, judge, replace(fit, margin=most))[0])
    if reached < config.target_recall and must:
        raise _unreachable(reached, judge.k, scanner, config)
    return replace(fit, margin=margin)


def _needed_margins(scanner: Scanner, judge: Judge, fit: Fit) -> tuple[np.ndarray, float]:
    """In rising order, the margin from which on each of the users' best items is scanned; and that of all lists.

    Infinite for items in lists beyond the most that the fit allows.
    """
    assert scanner.coarse is not None
    vector_BD = scanner.parts[0].transformed(judge.user_BD)
    width = min(fit.most_lists, scanner.num_lists)
    told = []
    for user_BD in _by_width(vector_BD, width):
        score_BP, list_BP = scanner.coarse.nearest(user_BD, width)
        lowest = np.where(np.isfinite(score_BP), score_BP, np.inf).min(axis=1)
        told.append((fit.foretell(score_BP, scanner.coarse.size_L[list_BP], judge.k), lowest, score_BP[:, 0].copy()))
    foretold_B, lowest_B, highest_B = (np.concatenate(part) for part in zip(*told, strict=True))
    most = float((foretold_B - lowest_B).max())
    most += 1e-4 * abs(most) + 1e-6  # below 0 where a k near the whole catalogue has a worse k-th best than any list
    own_BK = scanner.coarse.scores(vector_BD, scanner.list_of_item()[judge.best_BK])
    need_BK = np.where(own_BK >= lowest_B[:, None] - 1e-6, foretold_B[:, None] - own_BK, np.inf)
    need_BK[own_BK >= highest_B[:, None] - 1e-6] = -np.inf  # a user's best list is always scanned
    return np.sort(need_BK, axis=None), most


def _fit_codes(scanner: Scanner, judge: Judge, shorter: Fit | None, config: IndexConfig) -> Fit:
    """Codes without lists are all scanned; of a graph, as much as reaches the target."""
    effort = max(judge.k, shorter.most_lists if shorter else 16)
    best = 0.0
    while True:
        fit = Fit(judge.k, 0.0, (), 0.0, effort)
        best = max(best, judge.recall(_scan(scanner, judge, fit)[0]))
        if best >= config.target_recall:
            return fit
        if not scanner.is_graph or effort >= scanner.num_items:
            raise _unreachable(best, judge.k, scanner, config)
        effort *= 2


def _unreachable(best: float, k: int, scanner: Scanner, config: IndexConfig) -> ConfigError:
    return ConfigError(
        f"index.target_recall {config.target_recall:g} cannot be reached by {type(scanner.parts[0].base).__name__} of "
        f"this recipe: scanning everything finds {best:.4f} of the best {k:,}, since its codes are too coarse. Lower "
        f"index.target_recall to {np.floor(best * 1000) / 1000:g}, or allow finer codes: more index.memory_gb, or an "
        f"index.factory such as IVF{scanner.num_lists or 1024},Flat."
    )


def _curve(scanner: Scanner, judge: Judge, fit: Fit) -> tuple[tuple[float, float, float], ...]:
    """Recall, scanned share and users/s around the chosen point, which is the fourth."""
    points = []
    for factor in (0.0, 0.5, 0.75, 1.0, 1.25, 1.5) if scanner.coarse is not None else (1.0,):
        wide = replace(fit, margin=fit.margin * factor) if fit.margin > 0 else fit
        recall, shares, _, users_per_s = _reached(scanner, judge, wide)
        points.append((recall, float(shares.mean()), max(users_per_s, _reached(scanner, judge, wide)[-1])))
    return tuple(points)
