"""Ranking methods compared on the same users: metrics, list metrics, confidence intervals and slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trec_twotower.config.evaluation import METRICS
from trec_twotower.evaluation.metrics import Hits, list_metrics, resampled_sums
from trec_twotower.evaluation.slices import Slice

if TYPE_CHECKING:
    from trec_twotower.evaluation.evaluator import Evaluator

EXACT, THROUGH_INDEX = "two towers, exact search", "two towers, through the index"
POPULARITY, ITEM_TO_ITEM, SVD, REACHABLE = "popularity", "item to item", "SVD two towers", "best reachable"
CONFIDENCE_PERCENTILES = (2.5, 97.5)  # of the bootstrap means: a 95 % confidence interval


def metric_names(metrics: Sequence[str], ks: Sequence[int]) -> list[str]:
    """Return "recall@10" and so on, by k and then by metric."""
    return [f"{name}@{k}" for k in ks for name in metrics]


class MethodComparison:
    """Rankings of the same users by several methods; all ranks call together and get the same result."""

    def __init__(self, evaluator: Evaluator, item_ID: np.ndarray, count_I: np.ndarray, slices: Sequence[Slice]) -> None:
        self.evaluator, self.ranks = evaluator, evaluator.ranks
        self.ks = evaluator.config.k
        self.item_ID, self.count_I = item_ID, np.asarray(count_I, np.float64)
        self.slices = slices
        self.columns: list[tuple[str, str]] = []  # (method, metric) of each entry of `values`
        self.values: list[np.ndarray] = []
        self.coverage: dict[str, dict[str, float]] = {}
        self.by_slice: dict[str, list[np.ndarray]] = {}  # per slice (labels, 1 + metrics), summed over all ranks
        positives = evaluator.held_out.positives.distinct()
        # Mean popularity of the users' positives, to which that of the ranked lists is compared.
        self.positive_popularity_B = np.bincount(
            positives.rows, self.count_I[positives.values], minlength=len(positives)
        ) / np.maximum(positives.lengths, 1)

    def add(self, name: str, ranked_BK: np.ndarray) -> None:
        """Add one method's rankings of this rank's users."""
        hits = Hits.of(ranked_BK, self.evaluator.held_out.positives)
        hit_metrics = hits.metrics(self.ks)
        per_user = {**hit_metrics, **list_metrics(ranked_BK, self.ks, self.count_I, self.item_ID)}
        self.columns += [(name, metric.replace("popularity@", "popularity_bias@")) for metric in per_user]
        self.values += per_user.values()
        self.coverage[name] = {}
        for k in self.ks:
            top_BK = ranked_BK[:, :k]
            shown_I = self.ranks.sum(np.bincount(top_BK[top_BK >= 0], minlength=len(self.count_I)))
            self.coverage[name][f"coverage@{k}"] = float((shown_I > 0).mean())
        self.by_slice[name] = [
            self.ranks.sum(
                self._by_users(hit_metrics, each) if each.side == "user" else self._by_items(hits, ranked_BK, each)
            )
            for each in self.slices
        ]

    def _by_users(self, hit_metrics: dict[str, np.ndarray], by: Slice) -> np.ndarray:
        columns = [np.ones(len(by.part)), *hit_metrics.values()]
        return np.stack([np.bincount(by.part, value, minlength=len(by.labels)) for value in columns], axis=1)

    def _by_items(self, hits: Hits, ranked_BK: np.ndarray, by: Slice) -> np.ndarray:
        total = np.zeros((len(by.labels), 1 + len(METRICS) * len(self.ks)))
        for part in np.unique(by.part[hits.positives.values]):
            among = hits.metrics_among(ranked_BK, by.part == part, self.ks)
            total[part] = [len(among[f"hit@{self.ks[0]}"]), *(value.sum() for value in among.values())]
        return total

    def result(self) -> dict[str, Any]:
        """Return `metrics`, `lists`, `intervals`, `index_loss` and `slices` of evaluation.json (docs/evaluation.md)."""
        value_BM = np.stack([*self.values, self.positive_popularity_B], axis=1)
        known_BM = ~np.isnan(value_BM)
        sums = self.ranks.sum(np.stack([np.where(known_BM, value_BM, 0).sum(axis=0), known_BM.sum(axis=0)]))
        mean_M = self._means(sums)
        resampled_RM = np.empty((0, len(mean_M)))
        if self.evaluator.config.bootstrap:
            resampled = resampled_sums(value_BM, self.evaluator.first_user, self.evaluator.config.bootstrap)
            resampled_RM = self._means(self.ranks.sum(resampled))
        accuracy = metric_names(METRICS, self.ks)
        metrics: dict[str, dict[str, float]] = {name: {} for name in self.coverage}
        lists = {name: dict(coverage) for name, coverage in self.coverage.items()}
        intervals: dict[str, dict[str, list[float]]] = {name: {} for name in self.coverage}
        for column, (name, metric) in enumerate(self.columns):
            if not np.isfinite(mean_M[column]):
                continue  # no ranked list was long enough
            (metrics if metric in accuracy else lists)[name][metric] = float(mean_M[column])
            if len(resampled_RM):
                intervals[name][metric] = confidence_interval(resampled_RM[:, column])
        result: dict[str, Any] = {"metrics": metrics, "lists": lists, "intervals": intervals, "slices": self._slices()}
        if THROUGH_INDEX in metrics:
            result["index_loss"] = {
                metric: self._loss(metric, mean_M, resampled_RM) for metric in accuracy if EXACT in metrics
            }
        return result

    def _means(self, sums: np.ndarray) -> np.ndarray:
        """Return means (..., M) of sums and user counts (..., 2, M + 1), NaN where no user has the metric.

        The popularity of ranked lists becomes a bias: it is divided by that of the users' positives.
        """
        mean = np.divide(
            sums[..., 0, :], sums[..., 1, :], where=sums[..., 1, :] > 0, out=np.full(sums[..., 0, :].shape, np.nan)
        )
        list_mean_M, positive_popularity = mean[..., :-1], mean[..., -1:]
        is_bias_M = np.array([metric.startswith("popularity_bias@") for _, metric in self.columns])
        reference = np.where(positive_popularity > 0, positive_popularity, np.nan)
        return list_mean_M / np.where(is_bias_M, reference, 1.0)

    def _loss(self, metric: str, mean_M: np.ndarray, resampled_RM: np.ndarray) -> dict[str, Any]:
        """Return how much of a metric the index loses against exact search; the interval is that of the difference."""
        exact, index = self.columns.index((EXACT, metric)), self.columns.index((THROUGH_INDEX, metric))
        loss: dict[str, Any] = {"value": float(mean_M[exact] - mean_M[index])}
        if len(resampled_RM):
            loss["interval"] = confidence_interval(resampled_RM[:, exact] - resampled_RM[:, index])
        return loss

    def _slices(self) -> dict[str, Any]:
        """Return {slice: {label: {"users": n, "metrics": {method: {metric: mean}}}}} for labels with users."""
        names = metric_names(METRICS, self.ks)
        result: dict[str, Any] = {}
        for number, by in enumerate(self.slices):
            result[by.name] = {}
            for part, label in enumerate(by.labels):
                rows = {name: totals[number][part] for name, totals in self.by_slice.items()}
                num_users = int(next(iter(rows.values()))[0])
                if num_users:
                    result[by.name][label] = {
                        "users": num_users,
                        "metrics": {
                            name: dict(zip(names, (row[1:] / num_users).tolist(), strict=True))
                            for name, row in rows.items()
                        },
                    }
        return result


def confidence_interval(resampled_R: np.ndarray) -> list[float]:
    """Return the 95 % interval of resampled means; resamples without a user (NaN) do not count."""
    return np.percentile(resampled_R[np.isfinite(resampled_R)], CONFIDENCE_PERCENTILES).tolist()
