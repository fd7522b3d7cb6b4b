"""Two runs compared on the same users: paired differences of metrics, and how much their lists overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trec_twotower.config.base import validate
from trec_twotower.config.evaluation import METRICS, EvaluateConfig
from trec_twotower.data.held_out import HeldOut
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.evaluation.comparison import confidence_interval, metric_names
from trec_twotower.evaluation.evaluator import Evaluator, exactly
from trec_twotower.evaluation.metrics import Hits, resampled_sums
from trec_twotower.evaluation.result_text import excluded_text
from trec_twotower.evaluation.slices import Slice, make_slices
from trec_twotower.inference.model_loader import load_model
from trec_twotower.ops.ragged import Ragged, offsets_of
from trec_twotower.training.run_dir import Run

SLICE_METRICS = ("recall", "ndcg")  # reported for each slice


def compare_runs(
    runs: tuple[Run, Run],
    ranks: Ranks,
    *,
    split: str = "test",
    k: int = 20,
    checkpoint: str = "best",
    slices: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the metrics of two runs, by exact search, for the same users of a split, with their differences.

    The result is what `compare_rankings` returns, and `split`, `k`, `users`, `exclude_seen`, and of each run its
    `folder`, `step` and `model_version`. `slices` are added to those of the first run's config. All ranks call
    together. Raises ConfigError where the runs do not rank the same items for the same users: other datasets,
    catalogues, held-out items or evaluate.exclude_seen.
    """
    ranks.once(lambda: _check_same_data(*runs))
    if k < 1:
        raise ConfigError(f"k is {k}: give 1 or more.")
    first, second = (_RankedRun.of(run, ranks, split, k, checkpoint) for run in runs)
    ranks.together(lambda: first.check_same_users(second))
    evaluator = first.evaluator
    names = dict.fromkeys([*runs[0].config.evaluate.slices, *slices])
    config = validate(EvaluateConfig, {**evaluator.config.model_dump(), "slices": (*names,)}, "evaluate")
    count_I = runs[0].item_counts(evaluator.sources.catalogue.keys)
    parts = make_slices(config.slices, evaluator.sources, evaluator.held_out, split, count_I)
    figures = compare_rankings(
        first.ranked_BK, second.ranked_BK, evaluator.held_out.positives, k, parts, ranks=ranks,
        first_user=evaluator.first_user, resamples=config.bootstrap,
    )  # fmt: skip
    return {
        "split": split,
        "k": k,
        "exclude_seen": config.exclude_seen,
        **{name: each.facts for name, each in (("a", first), ("b", second))},
        **figures,
    }


@dataclass(frozen=True)
class _RankedRun:
    """A run's rankings of this rank's users; its model is no longer in memory."""

    facts: dict[str, Any]
    evaluator: Evaluator
    ranked_BK: np.ndarray

    @classmethod
    def of(cls, run: Run, ranks: Ranks, split: str, k: int, checkpoint: str) -> _RankedRun:
        loaded = load_model(run, ranks, checkpoint)
        num_items = len(loaded.sources.catalogue)
        if k > num_items:
            raise ConfigError(f"k is {k:,}, but the catalogue has {num_items:,} items: give 1 to {num_items:,}.")
        settings = {**run.config.evaluate.model_dump(), "k": (k,), "best": f"recall@{k}"}
        evaluator = Evaluator.of(loaded.sources, split, validate(EvaluateConfig, settings, "evaluate"), ranks)
        search = exactly(evaluator.items(loaded.model), ranks)
        ranked_BK = evaluator.rankings(evaluator.users(loaded.model), search)
        facts = {"folder": str(run.folder), "step": loaded.step, "model_version": loaded.version}
        return cls(facts, evaluator, ranked_BK)

    def check_same_users(self, other: _RankedRun) -> None:
        """Raise ConfigError where the other run ranks other items, or for other users or held-out items."""
        own, its = self.evaluator.sources.catalogue, other.evaluator.sources.catalogue
        where = f"{self.facts['folder']} and {other.facts['folder']}"
        if not np.array_equal(own.keys, its.keys):
            raise ConfigError(
                f"{where} have different catalogues ({own.split.folder}: {len(own):,} items, {its.split.folder}: "
                f"{len(its):,} items): a comparison needs the same items in the same order. Train both on one dataset."
            )
        if not _is_same_part(self.evaluator.held_out, other.evaluator.held_out):
            raise ConfigError(
                f"{where} have different users, histories or held-out items in {self.evaluator.sources.dataset.folder} "
                f"and {other.evaluator.sources.dataset.folder}: a comparison needs the same rows. Train both on one "
                "dataset."
            )


def _is_same_part(first: HeldOut, second: HeldOut) -> bool:
    return first.user_ids.equals(second.user_ids) and all(
        np.array_equal(one.offsets, other.offsets) and np.array_equal(one.values, other.values)
        for one, other in ((first.positives, second.positives), (first.seen, second.seen))
    )


def _check_same_data(first: Run, second: Run) -> None:
    """Raise ConfigError for runs whose datasets or excluded items differ, before a model is loaded."""
    one, other = first.dataset(), second.dataset()
    pairs = [(one.fingerprint, other.fingerprint), (one.described_fingerprint, other.described_fingerprint)]
    if str(one.folder) != str(other.folder) and any(a != b and None not in (a, b) for a, b in pairs):
        raise ConfigError(
            f"{first.folder} was trained on {one.folder} (fingerprint {one.fingerprint}) and {second.folder} on "
            f"{other.folder} (fingerprint {other.fingerprint}): metrics on different datasets do not compare. Train "
            "both on one dataset."
        )
    wanted = [str(run.config.evaluate.exclude_seen).lower() for run in (first, second)]
    if wanted[0] != wanted[1]:
        raise ConfigError(
            f"evaluate.exclude_seen is {wanted[0]} in {first.folder} and {wanted[1]} in {second.folder}: they rank "
            "different items. Set one value in both: `train CONFIG evaluate.exclude_seen=...` changes it without new "
            "training."
        )


def compare_rankings(
    ranked_a_BK: np.ndarray,
    ranked_b_BK: np.ndarray,
    positives: Ragged,
    k: int,
    slices: Sequence[Slice] = (),
    *,
    ranks: Ranks,
    first_user: int = 0,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the metrics of two rankings (users, k) of item rows for the same users, -1 where an item is missing.

    users       their number
    metrics     {"recall@20": {"a", "b", "difference", "interval"}}, the difference is b - a
    lists       means over users: `jaccard@k`, |A and B| / |A or B| of the two lists (1 where both are empty), and
                `churn@k`, the share of the items of b's list that are not in a's (0 for an empty list)
    slices      {slice: {label: {"users", and the SLICE_METRICS as in `metrics`}}} for labels with users

    `interval` is the 95 % interval of the difference by a paired bootstrap: a resample draws users, each with both of
    its values. It depends on `seed` and on the numbers of the users alone, and is missing with `resamples=0`. All ranks
    call together; `first_user` is the number of this rank's first user.
    """
    hits = [Hits.of(ranked[:, :k], positives) for ranked in (ranked_a_BK, ranked_b_BK)]
    of_a, of_b = (each.metrics([k]) for each in hits)
    paired = _Paired(ranks, first_user, resamples, seed)
    names = metric_names(METRICS, [k])
    differences = paired.differences([(of_a[name], of_b[name]) for name in names])
    jaccard_B, churn_B = list_overlap(ranked_a_BK[:, :k], ranked_b_BK[:, :k])
    total = ranks.sum(np.array([len(positives), jaccard_B.sum(), churn_B.sum()]))
    result: dict[str, Any] = {
        "users": int(total[0]),
        "metrics": {name: figures for name, (_, figures) in zip(names, differences, strict=True)},
        "lists": dict(zip((f"jaccard@{k}", f"churn@{k}"), (total[1:] / max(total[0], 1)).tolist(), strict=True)),
        "slices": {},
    }
    wanted = metric_names(SLICE_METRICS, [k])
    for by in slices:
        columns = _slice_columns(by, hits, (ranked_a_BK[:, :k], ranked_b_BK[:, :k]), k, wanted)
        differences = paired.differences(columns)
        result["slices"][by.name] = {
            label: {"users": differences[first][0]}
            | {name: differences[first + place][1] for place, name in enumerate(wanted)}
            for first, label in zip(range(0, len(columns), len(wanted)), by.labels, strict=True)
            if differences[first][0]
        }
    return result


@dataclass(frozen=True)
class _Paired:
    """Means and bootstrap intervals of paired differences, over the users of all ranks."""

    ranks: Ranks
    first_user: int
    resamples: int
    seed: int

    def differences(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, dict[str, Any]]]:
        """Return for each pair of values (users,) the number of users and figures; NaN marks a user who has none."""
        value_BM = np.stack([value for pair in pairs for value in pair], axis=1)
        known_BM = ~np.isnan(value_BM)
        sums = self.ranks.sum(np.stack([np.where(known_BM, value_BM, 0).sum(axis=0), known_BM.sum(axis=0)]))
        resampled = np.empty((0, *sums.shape))
        if self.resamples:
            resampled = self.ranks.sum(resampled_sums(value_BM, self.first_user, self.resamples, self.seed))
        mean_M, resampled_RM = (_means(each) for each in (sums, resampled))
        found = []
        for a in range(0, len(mean_M), 2):
            figures: dict[str, Any] = {
                "a": float(mean_M[a]), "b": float(mean_M[a + 1]), "difference": float(mean_M[a + 1] - mean_M[a])
            }  # fmt: skip
            difference_R = resampled_RM[:, a + 1] - resampled_RM[:, a]
            if np.isfinite(difference_R).any():
                figures["interval"] = confidence_interval(difference_R)
            found.append((int(sums[1, a]), figures))
        return found


def _means(sums: np.ndarray) -> np.ndarray:
    """Return the means (..., M) of sums and numbers of users (..., 2, M), NaN where there is no user."""
    total, count = sums[..., 0, :], sums[..., 1, :]
    return np.divide(total, count, where=count > 0, out=np.full(total.shape, np.nan))


def _slice_columns(
    by: Slice, hits: list[Hits], rankings: tuple[np.ndarray, np.ndarray], k: int, wanted: list[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the values of a and b per label and wanted metric, float64 (users,) each, NaN for users outside it."""
    positives = hits[0].positives
    whole = [each.metrics([k]) for each in hits]
    columns = []
    for part in range(len(by.labels)):
        values = np.full((len(wanted), 2, len(positives)), np.nan)
        if by.side == "user":
            users = np.flatnonzero(by.part == part)
            found = [{name: each[name][users] for name in wanted} for each in whole]
        else:
            is_among_I = by.part == part
            users = np.unique(positives.rows[is_among_I[positives.values]])
            pairs = zip(hits, rankings, strict=True)
            found = [each.metrics_among(ranked, is_among_I, [k]) for each, ranked in pairs] if len(users) else []
        for side, metrics in enumerate(found):
            for place, name in enumerate(wanted):
                values[place, side, users] = metrics[name]
        columns += [(a, b) for a, b in values]
    return columns


def list_overlap(ranked_a_BK: np.ndarray, ranked_b_BK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Jaccard index and the churn of two lists per user, float64 (users,) each (see compare_rankings)."""
    is_a_BK, is_b_BK = ranked_a_BK >= 0, ranked_b_BK >= 0
    num_a_B, num_b_B = is_a_BK.sum(axis=1), is_b_BK.sum(axis=1)
    items_a = Ragged(offsets_of(num_a_B), ranked_a_BK[is_a_BK])
    both_B = items_a.contain(ranked_b_BK).sum(axis=1)
    any_B = num_a_B + num_b_B - both_B
    jaccard_B = np.divide(both_B, any_B, where=any_B > 0, out=np.ones(len(both_B)))
    churn_B = np.divide(num_b_B - both_B, num_b_B, where=num_b_B > 0, out=np.zeros(len(both_B)))
    return jaccard_B, churn_B


def format_comparison(result: dict[str, Any]) -> str:
    """Return the text of what `compare_runs` returns."""
    k = result["k"]
    lines = [f"{result['split']}, {result['users']:,} users, whole catalogue, exact search, {excluded_text(result)}"]
    for name in ("a", "b"):
        run = result[name]
        lines.append(f"{name.upper()}  {run['folder']} (model {run['model_version']}, step {run['step']:,})")
    lines += ["", *_table("", {name: (None, figures) for name, figures in result["metrics"].items()})]
    lists = result["lists"]
    lines += [
        "",
        f"overlap of the top {k} (mean Jaccard index) {lists[f'jaccard@{k}']:.4f}; churn (share of B's items that are "
        f"not in A's list) {lists[f'churn@{k}']:.4f}",
    ]
    for name, parts in result["slices"].items():
        for metric in metric_names(SLICE_METRICS, [k]):
            rows = {label: (part["users"], part[metric]) for label, part in parts.items()}
            lines += ["", *_table(f"{metric} by {name}", rows)]
    return "\n".join(lines)


def _table(title: str, rows: dict[str, tuple[int | None, dict[str, Any]]]) -> list[str]:
    """Return lines with A, B, their difference and its interval; a dash where there is no interval."""
    has_users = any(users is not None for users, _ in rows.values())
    width = max(map(len, [title, *rows]))
    heads = ["users"] * has_users + ["A", "B", "B - A", "95 % low", "high"]
    lines = [f"{title:<{width}}" + "".join(f"  {head:>10}" for head in heads)]
    for label, (users, figures) in rows.items():
        low, high = figures.get("interval", (None, None))
        cells = [] if users is None else [f"{users:,}"]
        cells += [f"{figures['a']:.4f}", f"{figures['b']:.4f}"]
        cells += ["-" if value is None else f"{value:+.4f}" for value in (figures["difference"], low, high)]
        lines.append(f"{label:<{width}}" + "".join(f"  {cell:>10}" for cell in cells))
    return lines
