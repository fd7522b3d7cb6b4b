"""How well held-out items are found: over the whole catalogue, exactly or through the index, beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.run_config import METRICS, EvaluateConfig, validate
from trec_twotower.data.dataset import SERVING
from trec_twotower.data.feature_dataset import Sources
from trec_twotower.data.held_out import HeldOut
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.evaluation.baselines import ItemToItem, SpectralTowers, popularity_vectors
from trec_twotower.evaluation.metrics import (
    Hits,
    MetricSums,
    list_metrics,
    popularity_ranking,
    ranking_metrics,
    resampled_sums,
)
from trec_twotower.evaluation.sampled_metrics import Negatives, sampled_metrics
from trec_twotower.evaluation.slices import Slice, column_of, make_slices
from trec_twotower.index import ExactItems, ItemIndex, exact_search
from trec_twotower.index.aligned_index import CatalogueIndex, aligned
from trec_twotower.inference.model_loader import load_model
from trec_twotower.model.encode import encode, encode_everywhere
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.ragged import Lists, offsets_of
from trec_twotower.storage.atomic import naming, write_json
from trec_twotower.training.collapse_guard import cosines, unit
from trec_twotower.training.run_dir import Run
from trec_twotower.training.spectral_initialization import Taken

Search = Callable[[np.ndarray, int, Lists], np.ndarray]  # user vectors, k, seen -> item rows

EXACT, THROUGH_INDEX = "two towers, exact search", "two towers, through the index"
POPULARITY, ITEM_TO_ITEM, SVD, REACHABLE = "popularity", "item to item", "SVD two towers", "best reachable"
NOT_SAMPLED = (
    f"({ITEM_TO_ITEM!r} is not told there, as its scores are no inner products; nor the index, which finds no items "
    "where they are given.)"
)
OUTSIDE = (2.5, 97.5)  # percentiles of the resampled means that an interval lies between


@dataclass(frozen=True)
class Evaluator:
    """Held-out users of this rank, ready to be ranked for."""

    sources: Sources
    held_out: HeldOut  # this rank's share
    first_user: int  # of that share, among all ranks' users
    config: EvaluateConfig
    ranks: Ranks

    @classmethod
    def of(
        cls, sources: Sources, split: str, config: EvaluateConfig, ranks: Ranks, *, sample: int | None = None
    ) -> Evaluator:
        parts = sorted(path.name for path in sources.dataset.folder.iterdir() if path.is_dir())
        known = [name for name in parts if name not in ("items", "users", SERVING)]
        if split not in known:
            raise _no_part(sources, split, known)
        largest = max(config.k)
        if largest > len(sources.catalogue):
            raise ConfigError(
                f"evaluate.k asks for {largest:,} items, but the catalogue has {len(sources.catalogue):,}: lower it."
            )
        held_out = HeldOut.read(sources, split, sample)
        mine = ranks.share(len(held_out))
        return cls(sources, held_out.part(mine), mine.start, config, ranks)

    def __call__(self, model: TwoTower) -> dict[str, float]:
        """Return mean metrics over the users of all ranks, by exact search, and the mean cosines of vectors."""
        item_ID, user_BD = self.items(model), self.users(model)
        metrics = self.mean(self.rankings(user_BD, exactly(item_ID, self.ranks)))
        one_each_ND = unit(user_BD).reshape(-1, item_ID.shape[1])  # of users with several vectors, all of them
        total = self.ranks.sum(np.array([len(one_each_ND), *one_each_ND.sum(axis=0)]))
        return {**metrics, **cosines(item_ID, total[1:], int(total[0]))}

    def popularity(self, count_I: np.ndarray) -> dict[str, float]:
        """Return the mean metrics, over the users of all ranks, of ranking all items by how often they were taken."""
        return self.mean(popularity_ranking(count_I, self.excluded, max(self.config.k)))

    def items(self, model: TwoTower) -> np.ndarray:
        """(I, D): the vectors of the whole catalogue."""
        return encode_everywhere(model, "item", self.sources.catalogue.columns, self.ranks).cpu().numpy()

    def users(self, model: TwoTower) -> np.ndarray:
        """(users of this rank, D)."""
        return encode(model, "user", self.held_out.user, self.ranks).cpu().numpy()

    @cached_property
    def excluded(self) -> Lists:
        """The items left out of each user's ranking."""
        return self.held_out.excluded(self.config.exclude_seen)

    def ceiling(self) -> dict[str, Any]:
        """Return what the excluded items cost any model: users with nothing to find, and the highest recall@k."""
        positives = self.held_out.positives.distinct()
        lost_B = np.bincount(positives.rows, self.excluded.hold(positives), minlength=len(positives))
        findable_B = positives.lengths - lost_B
        shares = [np.minimum(findable_B, k) / positives.lengths for k in self.config.k]
        total = self.ranks.sum(np.array([len(positives), (findable_B == 0).sum(), *(each.sum() for each in shares)]))
        recall = dict(zip(names_of(["recall"], self.config.k), (total[2:] / max(total[0], 1)).tolist(), strict=True))
        return {"unfindable_users": int(total[1]), "highest_recall": recall}

    def rankings(self, user_BD: np.ndarray, search: Search) -> np.ndarray:
        """Return (users of this rank, largest k) catalogue rows, best first, without excluded items."""
        k = max(self.config.k)
        ranked = np.full((len(user_BD), k), -1, np.int64)
        for start in range(0, len(user_BD), self.config.block):
            rows = np.arange(start, min(start + self.config.block, len(user_BD)))
            ranked[rows] = search(user_BD[rows], k, self.excluded.take(rows))
        return ranked

    def mean(self, ranked_BK: np.ndarray) -> dict[str, float]:
        """Mean metrics over the users of all ranks, given this rank's rankings."""
        sums = MetricSums()
        sums.add(ranking_metrics(ranked_BK, self.held_out.positives, self.config.k))
        names = names_of(METRICS, self.config.k)
        total = self.ranks.sum(np.array([sums.num_users, *(sums.sums.get(name, 0.0) for name in names)]))
        return dict(zip(names, (total[1:] / max(total[0], 1)).tolist(), strict=True))


def _no_part(sources: Sources, split: str, known: list[str]) -> ConfigError:
    folder, options = sources.dataset.folder, sources.dataset.description.get("options") or {}
    if options.get("split") == "none":
        return ConfigError(
            f"{folder} has no part {split!r} to evaluate on: it was prepared with split=none, so that all events are "
            "trained on. Evaluate a run of the same config on a dataset with held-out items."
        )
    return ConfigError(f"{folder} has no part {split!r} to evaluate on{nearest(split, known)}.")


def names_of(metrics: Sequence[str], ks: Sequence[int]) -> list[str]:
    return [f"{name}@{k}" for k in ks for name in metrics]


def exactly(item_ID: np.ndarray, ranks: Ranks) -> Search:
    """Search that scores every item of the catalogue."""
    items = ExactItems(item_ID, ranks.device)
    return lambda user_BD, k, seen: exact_search(items, user_BD, k, seen)[1]


def through(index: ItemIndex | CatalogueIndex) -> Search:
    return lambda user_BD, k, seen: index.search_unseen(user_BD, k, seen)[1]


class Contenders:
    """Several rankings of the same users, judged side by side; all ranks call together and get the same."""

    def __init__(self, evaluator: Evaluator, item_ID: np.ndarray, count_I: np.ndarray, slices: Sequence[Slice]) -> None:
        self.evaluator, self.ranks = evaluator, evaluator.ranks
        self.ks = evaluator.config.k
        self.item_ID, self.count_I = item_ID, np.asarray(count_I, np.float64)
        self.slices = slices
        self.columns: list[tuple[str, str]] = []  # of `values`: contender, metric
        self.values: list[np.ndarray] = []
        self.coverage: dict[str, dict[str, float]] = {}
        self.by_slice: dict[str, list[np.ndarray]] = {}  # a slice: (labels, 1 + metrics), over all ranks
        positives = evaluator.held_out.positives.distinct()
        # The popularity of what the users take, to hold that of the lists against.
        self.taken_B = np.bincount(
            positives.rows, self.count_I[positives.values], minlength=len(positives)
        ) / np.maximum(positives.lengths, 1)

    def add(self, name: str, ranked_BK: np.ndarray) -> None:
        """This rank's rankings by one contender."""
        hits = Hits.of(ranked_BK, self.evaluator.held_out.positives)
        of_hits = hits.metrics(self.ks)
        per_user = {**of_hits, **list_metrics(ranked_BK, self.ks, self.count_I, self.item_ID)}
        self.columns += [(name, metric.replace("popularity@", "popularity_bias@")) for metric in per_user]
        self.values += per_user.values()
        self.coverage[name] = {}
        for k in self.ks:
            listed = ranked_BK[:, :k]
            shown_I = self.ranks.sum(np.bincount(listed[listed >= 0], minlength=len(self.count_I)))
            self.coverage[name][f"coverage@{k}"] = float((shown_I > 0).mean())
        self.by_slice[name] = [
            self.ranks.sum(
                self._by_users(of_hits, each) if each.side == "user" else self._by_items(hits, ranked_BK, each)
            )
            for each in self.slices
        ]

    def _by_users(self, of_hits: dict[str, np.ndarray], by: Slice) -> np.ndarray:
        columns = [np.ones(len(by.part)), *of_hits.values()]
        return np.stack([np.bincount(by.part, value, minlength=len(by.labels)) for value in columns], axis=1)

    def _by_items(self, hits: Hits, ranked_BK: np.ndarray, by: Slice) -> np.ndarray:
        total = np.zeros((len(by.labels), 1 + len(METRICS) * len(self.ks)))
        for part in np.unique(by.part[hits.positives.values]):
            among = hits.metrics_among(ranked_BK, by.part == part, self.ks)
            total[part] = [len(among[f"hit@{self.ks[0]}"]), *(value.sum() for value in among.values())]
        return total

    def result(self) -> dict[str, Any]:
        """What evaluation.json says of them: metrics, lists, intervals, index_loss, slices; see docs/evaluation.md."""
        value_BM = np.stack([*self.values, self.taken_B], axis=1)
        known_BM = ~np.isnan(value_BM)
        sums = self.ranks.sum(np.stack([np.where(known_BM, value_BM, 0).sum(axis=0), known_BM.sum(axis=0)]))
        figure_M = self._figures(sums)
        drawn_RM = np.empty((0, len(figure_M)))
        if self.evaluator.config.bootstrap:
            drawn = resampled_sums(value_BM, self.evaluator.first_user, self.evaluator.config.bootstrap)
            drawn_RM = self._figures(self.ranks.sum(drawn))
        accuracy = names_of(METRICS, self.ks)
        metrics: dict[str, dict[str, float]] = {name: {} for name in self.coverage}
        lists = {name: dict(covered) for name, covered in self.coverage.items()}
        intervals: dict[str, dict[str, list[float]]] = {name: {} for name in self.coverage}
        for column, (name, metric) in enumerate(self.columns):
            if not np.isfinite(figure_M[column]):
                continue  # no list was long enough
            (metrics if metric in accuracy else lists)[name][metric] = float(figure_M[column])
            if len(drawn_RM):
                intervals[name][metric] = _interval(drawn_RM[:, column])
        result: dict[str, Any] = {"metrics": metrics, "lists": lists, "intervals": intervals, "slices": self._slices()}
        if THROUGH_INDEX in metrics:
            result["index_loss"] = {
                metric: self._loss(metric, figure_M, drawn_RM) for metric in accuracy if EXACT in metrics
            }
        return result

    def _figures(self, sums: np.ndarray) -> np.ndarray:
        """(..., 2, M + 1) sums and numbers of users to (..., M) figures, NaN for none.

        A list's popularity becomes a bias: it is divided by that of what the users take.
        """
        mean = np.divide(
            sums[..., 0, :], sums[..., 1, :], where=sums[..., 1, :] > 0, out=np.full(sums[..., 0, :].shape, np.nan)
        )
        of_lists, of_taken = mean[..., :-1], mean[..., -1:]
        is_bias_M = np.array([metric.startswith("popularity_bias@") for _, metric in self.columns])
        return of_lists / np.where(is_bias_M, np.where(of_taken > 0, of_taken, np.nan), 1.0)

    def _loss(self, metric: str, figure_M: np.ndarray, drawn_RM: np.ndarray) -> dict[str, Any]:
        """Of the exact search's figure, lost through the index; its interval is of the difference, user by user."""
        exact, index = self.columns.index((EXACT, metric)), self.columns.index((THROUGH_INDEX, metric))
        loss: dict[str, Any] = {"value": float(figure_M[exact] - figure_M[index])}
        if len(drawn_RM):
            loss["interval"] = _interval(drawn_RM[:, exact] - drawn_RM[:, index])
        return loss

    def _slices(self) -> dict[str, Any]:
        """{slice: {label: {"users": n, "metrics": {contender: {metric: mean}}}}}, of labels with users."""
        names = names_of(METRICS, self.ks)
        told: dict[str, Any] = {}
        for number, by in enumerate(self.slices):
            told[by.name] = {}
            for part, label in enumerate(by.labels):
                rows = {name: totals[number][part] for name, totals in self.by_slice.items()}
                num_users = int(next(iter(rows.values()))[0])
                if num_users:
                    told[by.name][label] = {
                        "users": num_users,
                        "metrics": {
                            name: dict(zip(names, (row[1:] / num_users).tolist(), strict=True))
                            for name, row in rows.items()
                        },
                    }
        return told


def _interval(drawn_R: np.ndarray) -> list[float]:
    return np.percentile(drawn_R[np.isfinite(drawn_R)], OUTSIDE).tolist()


def _write_rankings(path: Path, user_ids: pa.Array, item_ids: pa.Array, ranked_BK: np.ndarray) -> None:
    """Parquet of user_id and item_ids (outside ids, best first)."""
    found = ranked_BK >= 0
    items = item_ids.take(pa.array(ranked_BK[found]))
    lists = pa.ListArray.from_arrays(offsets_of(found.sum(1)).astype(np.int32), items)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        pq.write_table(pa.table({"user_id": user_ids, "item_ids": lists}), path)


def _join_rankings(path: Path, num_ranks: int) -> None:
    """One file out of the ranks' parts."""
    parts = [path.with_name(f".{path.name}.{rank}") for rank in range(num_ranks)]
    whole = path.with_name(f".{path.name}.whole")
    pq.write_table(pa.concat_tables(pq.read_table(part) for part in parts), whole)
    whole.replace(path)
    for part in parts:
        part.unlink()


def comparison(rows: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """A table of metrics, one contender a row; a dash where a figure is not known."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "  " + "  ".join(f"{column:>10}" for column in columns)]
    for name, metrics in rows.items():
        cells = (f"{metrics[column]:>10.4f}" if column in metrics else f"{'-':>10}" for column in columns)
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def evaluate_run(
    run: Run,
    ranks: Ranks,
    *,
    split: str = "test",
    checkpoint: str = "best",
    through_index: bool = False,
    rankings: Path | None = None,
    slices: Sequence[str] = (),
    sampled: int | None = None,
    sampled_same: str | None = None,
) -> str:
    """Evaluate a run's checkpoint on a split, write RUN/evaluation.json, and return the tables beside the baselines.

    `slices` are told apart beside those of the config; `sampled` and `sampled_same` take the place of the config's.
    """
    if rankings is not None and rankings.is_dir():
        raise ConfigError(f"{rankings} is a folder: name the file that the rankings are to become.")
    given = {"sampled": sampled, "sampled_same": sampled_same}
    wanted: dict[str, Any] = {"slices": (*dict.fromkeys([*run.config.evaluate.slices, *slices]),)}
    wanted |= {name: value for name, value in given.items() if value is not None}
    config = validate(EvaluateConfig, {**run.config.evaluate.model_dump(), **wanted}, "evaluate")
    loaded = load_model(run, ranks, checkpoint)
    index: ItemIndex | CatalogueIndex | None = None
    if through_index:
        of_export = ItemIndex.load(run.folder / "index", model_version=loaded.version)
        index = aligned(of_export, loaded.sources.catalogue, is_told=ranks.is_first)
    evaluator = Evaluator.of(loaded.sources, split, config, ranks)
    held_out, count_I = evaluator.held_out, run.item_counts(loaded.sources.catalogue.keys)
    item_ID, user_BD = evaluator.items(loaded.model), evaluator.users(loaded.model)
    parts = make_slices(config.slices, loaded.sources, held_out, split, count_I)
    contenders = Contenders(evaluator, item_ID, count_I, parts)
    exact = evaluator.rankings(user_BD, exactly(item_ID, ranks))
    contenders.add(EXACT, exact)
    if index is not None:
        contenders.add(THROUGH_INDEX, evaluator.rankings(user_BD, through(index)))
    k = max(config.k)
    contenders.add(POPULARITY, popularity_ranking(count_I, evaluator.excluded, k))
    by_product = {EXACT: (item_ID, user_BD), POPULARITY: popularity_vectors(count_I, len(held_out))}
    if config.item_to_item or config.svd:
        taken = ranks.together(lambda: Taken.read(loaded.sources, ranks))
    if config.item_to_item:
        item_to_item = ItemToItem.of(taken, count_I, ranks)
        contenders.add(ITEM_TO_ITEM, item_to_item.rankings(held_out.seen, k, evaluator.excluded))
    if config.svd:
        svd = SpectralTowers.of(taken, config.svd, count_I, ranks)
        contenders.add(SVD, svd.rankings(held_out.seen, k, evaluator.excluded))
        by_product[SVD] = svd.item_ID, svd.users(held_out.seen)
    judged = contenders.result()
    if config.sampled:
        judged["sampled"] = _sampled(evaluator, by_product)
    best = loaded.sources.dataset.description.get("best_reachable")
    if best is not None and best.get("split", "test") == split:
        judged["metrics"][REACHABLE] = {name: value for name, value in best.items() if "@" in name}
    result = {
        "split": split,
        "step": loaded.step,
        "model_version": loaded.version,
        "users": int(ranks.sum(np.array([len(held_out)]))[0]),
        "exclude_seen": config.exclude_seen,
        **evaluator.ceiling(),
        **judged,
    }
    table = told(result, config.k)
    try:
        ranks.once(lambda: write_json(run.folder / "evaluation.json", result))
        if rankings is not None:
            mine = rankings.with_name(f".{rankings.name}.{ranks.rank}")
            ids = loaded.sources.catalogue.ids
            ranks.together(lambda: _write_rankings(mine, held_out.user_ids, ids, exact))
            ranks.once(lambda: _join_rankings(rankings, ranks.num_ranks))
    except OSError as error:  # a read-only run, or a full disk: the figures are there all the same
        if ranks.is_first:
            print(table, flush=True)
        what = f"{error.strerror or error} (the evaluation above is complete, but this file is not written)"
        raise OSError(error.errno, what, error.filename) from error
    return table


def _sampled(evaluator: Evaluator, by_product: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """{"100 uniform negatives": {contender: {metric: mean}}} of contenders whose scores are inner products."""
    config, held_out, ranks = evaluator.config, evaluator.held_out, evaluator.ranks
    kinds = [Negatives.uniform(len(evaluator.sources.catalogue), config.sampled)]
    if config.sampled_same is not None:
        values = column_of(evaluator.sources.dataset.items, config.sampled_same, f"--same {config.sampled_same}")
        part_I = values.dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        kinds.append(Negatives.same(f"same {config.sampled_same}", part_I.astype(np.int64), config.sampled))
    positives, result = held_out.positives.distinct(), {}
    for kind in kinds:
        told: dict[str, dict[str, float]] = {}
        for name, (item_ID, user_BD) in by_product.items():
            place_P = kind.ranks(item_ID, user_BD, positives, evaluator.excluded, evaluator.first_user)
            per_user = sampled_metrics(place_P, positives, config.k)
            total = ranks.sum(np.array([len(positives), *(value_B.sum() for value_B in per_user.values())]))
            told[name] = dict(zip(per_user, (total[1:] / total[0]).tolist(), strict=True))
        result[f"{config.sampled:,} {kind.name} negatives"] = told
    return result


def excluded_text(result: dict[str, Any]) -> str:
    """Return which items an evaluation left out of its rankings."""
    texts = {True: "seen items excluded", False: "seen items included", "except_target": "seen items excluded, but not "
             "those to find"}  # fmt: skip
    return texts[result.get("exclude_seen", True)]


def _ceiling_text(result: dict[str, Any], ks: Sequence[int]) -> list[str]:
    """Return a line on what no model can reach; nothing of an evaluation from before it was counted."""
    if "highest_recall" not in result:
        return []
    recall = ", ".join(f"@{k} {result['highest_recall'][f'recall@{k}']:.4f}" for k in ks)
    lost = result["unfindable_users"]
    why = " (all they ask for is in their history; see evaluate.exclude_seen)" if lost else ""
    return [f"users that no model can hit: {lost:,}{why}; highest possible recall {recall}"]


def told(result: dict[str, Any], ks: Sequence[int]) -> str:
    """The tables of an evaluation, as read from evaluation.json."""
    k = ks[0]
    smallest = [name for each in ks[:2] for name in (f"recall@{each}", f"ndcg@{each}")]
    lines = [
        f"{result['split']}, {result['users']:,} users, whole catalogue, {excluded_text(result)}",
        *_ceiling_text(result, ks),
        comparison(result["metrics"], [*smallest, f"hit@{k}", f"mrr@{k}", f"map@{k}"]),
        "",
        f"what the lists of {k} are like, and between what recall@{k} lies, 95 times of 100",
    ]
    columns = {"coverage": "covered", "novelty": "bits", "diversity": "diversity", "popularity_bias": "pop. bias"}
    rows = {}
    for name, lists in result["lists"].items():
        low, high = result["intervals"].get(name, {}).get(f"recall@{k}", (None, None))
        rows[name] = {short: lists[f"{metric}@{k}"] for metric, short in columns.items() if f"{metric}@{k}" in lists}
        rows[name] |= {"from": low, "to": high} if low is not None else {}
    lines.append(comparison(rows, [*columns.values(), "from", "to"]))
    for name, parts in result["slices"].items():
        figures = (
            f"{label} {part['metrics'][EXACT][f'recall@{k}']:.4f} ({part['users']:,})" for label, part in parts.items()
        )
        lines += ["", f"recall@{k} by {name} (users): " + ", ".join(figures)]
    for name, rows in result.get("sampled", {}).items():
        lines += ["", f"NOT over the catalogue: each item to find among {name}", comparison(rows, list(rows[EXACT]))]
    if result.get("sampled"):
        lines.append(NOT_SAMPLED)
    if "index_loss" in result:
        loss = result["index_loss"][f"recall@{k}"]
        low, high = loss.get("interval", (None, None))
        between = f" ({low:+.5f} to {high:+.5f})" if low is not None else ""
        lines += ["", f"lost through the index, of recall@{k}: {loss['value']:+.5f}{between}"]
    return "\n".join(lines)
