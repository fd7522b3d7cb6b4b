"""Evaluation on held-out users: ranking metrics over the whole catalogue, with baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config.base import validate
from trec_twotower.config.evaluation import METRICS, EvaluateConfig
from trec_twotower.data.dataset import SERVING
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.held_out import HeldOut
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.evaluation.baselines import ItemToItem, SpectralTowers, popularity_vectors
from trec_twotower.evaluation.comparison import (
    EXACT,
    ITEM_TO_ITEM,
    POPULARITY,
    REACHABLE,
    SVD,
    THROUGH_INDEX,
    MethodComparison,
    metric_names,
)
from trec_twotower.evaluation.metrics import (
    MetricSums,
    popularity_ranking,
    ranking_metrics,
)
from trec_twotower.evaluation.result_text import format_result
from trec_twotower.evaluation.sampled_metrics import Negatives, sampled_metrics
from trec_twotower.evaluation.slices import column_of, make_slices
from trec_twotower.index import ExactItems, ItemIndex, exact_search
from trec_twotower.index.aligned_index import CatalogueIndex, aligned
from trec_twotower.inference.model_loader import load_model
from trec_twotower.model.encode import encode, encode_everywhere
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.ragged import Ragged, offsets_of
from trec_twotower.storage.atomic import naming, write_json
from trec_twotower.training.collapse_guard import cosines, unit
from trec_twotower.training.run_dir import Run
from trec_twotower.training.spectral_initialization import Interactions

Search = Callable[[np.ndarray, int, Ragged], np.ndarray]  # user vectors, k, seen -> item rows


@dataclass(frozen=True)
class Evaluator:
    """The held-out users of this rank, and the metrics of rankings for them."""

    sources: FeatureDataset
    held_out: HeldOut  # this rank's share
    first_user: int  # position of that share among the users of all ranks
    config: EvaluateConfig
    ranks: Ranks

    @classmethod
    def of(
        cls, sources: FeatureDataset, split: str, config: EvaluateConfig, ranks: Ranks, *, sample: int | None = None
    ) -> Evaluator:
        parts = sorted(path.name for path in sources.dataset.folder.iterdir() if path.is_dir())
        known = [name for name in parts if name not in ("items", "users", SERVING)]
        if split not in known:
            raise _unknown_split(sources, split, known)
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
        unit_ND = unit(user_BD).reshape(-1, item_ID.shape[1])  # N counts every vector of a user
        total = self.ranks.sum(np.array([len(unit_ND), *unit_ND.sum(axis=0)]))
        return {**metrics, **cosines(item_ID, total[1:], int(total[0]))}

    def popularity(self, count_I: np.ndarray) -> dict[str, float]:
        """Return the mean metrics, over the users of all ranks, of ranking items by their interactions in train."""
        return self.mean(popularity_ranking(count_I, self.excluded, max(self.config.k)))

    def items(self, model: TwoTower) -> np.ndarray:
        """Return the vectors of the whole catalogue, float32 (I, D)."""
        return encode_everywhere(model, "item", self.sources.catalogue.columns, self.ranks).cpu().numpy()

    def users(self, model: TwoTower) -> np.ndarray:
        """Return the vectors of this rank's users, float32 (B, D) or (B, M, D)."""
        return encode(model, "user", self.held_out.user, self.ranks).cpu().numpy()

    @cached_property
    def excluded(self) -> Ragged:
        """Return the items excluded from each user's ranking."""
        return self.held_out.excluded(self.config.exclude_seen)

    def ceiling(self) -> dict[str, Any]:
        """Return the bounds that excluded items set: users without a findable positive, and the highest recall@k."""
        positives = self.held_out.positives.distinct()
        lost_B = np.bincount(positives.rows, self.excluded.hold(positives), minlength=len(positives))
        findable_B = positives.lengths - lost_B
        shares = [np.minimum(findable_B, k) / positives.lengths for k in self.config.k]
        total = self.ranks.sum(np.array([len(positives), (findable_B == 0).sum(), *(each.sum() for each in shares)]))
        recall = dict(
            zip(metric_names(["recall"], self.config.k), (total[2:] / max(total[0], 1)).tolist(), strict=True)
        )
        return {"unfindable_users": int(total[1]), "highest_recall": recall}

    def rankings(self, user_BD: np.ndarray, search: Search) -> np.ndarray:
        """Return item rows (users of this rank, largest k), best first, without excluded items."""
        k = max(self.config.k)
        ranked = np.full((len(user_BD), k), -1, np.int64)
        for start in range(0, len(user_BD), self.config.block):
            rows = np.arange(start, min(start + self.config.block, len(user_BD)))
            ranked[rows] = search(user_BD[rows], k, self.excluded.take(rows))
        return ranked

    def mean(self, ranked_BK: np.ndarray) -> dict[str, float]:
        """Return the mean metrics over the users of all ranks, given this rank's rankings."""
        sums = MetricSums()
        sums.add(ranking_metrics(ranked_BK, self.held_out.positives, self.config.k))
        names = metric_names(METRICS, self.config.k)
        total = self.ranks.sum(np.array([sums.num_users, *(sums.sums.get(name, 0.0) for name in names)]))
        return dict(zip(names, (total[1:] / max(total[0], 1)).tolist(), strict=True))


def _unknown_split(sources: FeatureDataset, split: str, known: list[str]) -> ConfigError:
    folder, options = sources.dataset.folder, sources.dataset.description.get("options") or {}
    if options.get("split") == "none":
        return ConfigError(
            f"{folder} has no split {split!r} to evaluate on: it was prepared with split=none, so that all events are "
            "in train. Evaluate a run of the same config on a dataset with held-out items."
        )
    return ConfigError(f"{folder} has no split {split!r} to evaluate on{nearest(split, known)}.")


def exactly(item_ID: np.ndarray, ranks: Ranks) -> Search:
    """Return a search that scores every item of the catalogue."""
    items = ExactItems(item_ID, ranks.device)
    return lambda user_BD, k, seen: exact_search(items, user_BD, k, seen)[1]


def through(index: ItemIndex | CatalogueIndex) -> Search:
    """Return a search by the index."""
    return lambda user_BD, k, seen: index.search_unseen(user_BD, k, seen)[1]


def _write_rankings(path: Path, user_ids: pa.Array, item_ids: pa.Array, ranked_BK: np.ndarray) -> None:
    """Write Parquet with the columns user_id and item_ids (best first)."""
    found = ranked_BK >= 0
    items = item_ids.take(pa.array(ranked_BK[found]))
    lists = pa.ListArray.from_arrays(offsets_of(found.sum(1)).astype(np.int32), items)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        pq.write_table(pa.table({"user_id": user_ids, "item_ids": lists}), path)


def _join_rankings(path: Path, num_ranks: int) -> None:
    """Merge the files of all ranks into one."""
    parts = [path.with_name(f".{path.name}.{rank}") for rank in range(num_ranks)]
    whole = path.with_name(f".{path.name}.whole")
    pq.write_table(pa.concat_tables(pq.read_table(part) for part in parts), whole)
    whole.replace(path)
    for part in parts:
        part.unlink()


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
    """Evaluate a checkpoint and the baselines on a split, write RUN/evaluation.json, and return the tables as text.

    `slices` are added to those of the config; `sampled` and `sampled_same` override the config's.
    """
    if rankings is not None and rankings.is_dir():
        raise ConfigError(f"{rankings} is a folder: give the path of a file to write the rankings to.")
    given = {"sampled": sampled, "sampled_same": sampled_same}
    wanted: dict[str, Any] = {"slices": (*dict.fromkeys([*run.config.evaluate.slices, *slices]),)}
    wanted |= {name: value for name, value in given.items() if value is not None}
    config = validate(EvaluateConfig, {**run.config.evaluate.model_dump(), **wanted}, "evaluate")
    loaded = load_model(run, ranks, checkpoint)
    index: ItemIndex | CatalogueIndex | None = None
    if through_index:
        of_export = ItemIndex.load(run.folder / "index", model_version=loaded.version)
        index = aligned(of_export, loaded.sources.catalogue, warns=ranks.is_first)
    evaluator = Evaluator.of(loaded.sources, split, config, ranks)
    held_out, count_I = evaluator.held_out, run.item_counts(loaded.sources.catalogue.keys)
    item_ID, user_BD = evaluator.items(loaded.model), evaluator.users(loaded.model)
    parts = make_slices(config.slices, loaded.sources, held_out, split, count_I)
    methods = MethodComparison(evaluator, item_ID, count_I, parts)
    exact = evaluator.rankings(user_BD, exactly(item_ID, ranks))
    methods.add(EXACT, exact)
    if index is not None:
        methods.add(THROUGH_INDEX, evaluator.rankings(user_BD, through(index)))
    k = max(config.k)
    methods.add(POPULARITY, popularity_ranking(count_I, evaluator.excluded, k))
    vectors_by_method = {EXACT: (item_ID, user_BD), POPULARITY: popularity_vectors(count_I, len(held_out))}
    if config.item_to_item or config.svd:
        interactions = ranks.together(lambda: Interactions.read(loaded.sources, ranks))
    if config.item_to_item:
        item_to_item = ItemToItem.of(interactions, count_I, ranks)
        methods.add(ITEM_TO_ITEM, item_to_item.rankings(held_out.seen, k, evaluator.excluded))
    if config.svd:
        svd = SpectralTowers.of(interactions, config.svd, count_I, ranks)
        methods.add(SVD, svd.rankings(held_out.seen, k, evaluator.excluded))
        vectors_by_method[SVD] = svd.item_ID, svd.users(held_out.seen)
    figures = methods.result()
    if config.sampled:
        figures["sampled"] = _sampled(evaluator, vectors_by_method)
    best = loaded.sources.dataset.description.get("best_reachable")
    if best is not None and best.get("split", "test") == split:
        _add_reachable(figures, best)
    result = {
        "split": split,
        "step": loaded.step,
        "model_version": loaded.version,
        "users": int(ranks.sum(np.array([len(held_out)]))[0]),
        "exclude_seen": config.exclude_seen,
        **evaluator.ceiling(),
        **figures,
    }
    table = format_result(result, config.k)
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


def _add_reachable(figures: dict[str, Any], best: dict[str, Any]) -> None:
    """Add the metrics of the best possible ranking to those of the methods, and to the slice by interactions."""
    figures["metrics"][REACHABLE] = {name: value for name, value in best.items() if "@" in name and " " not in name}
    for label, part in figures["slices"].get("tail", {}).items():  # "recall@10 of cold" and so on
        suffix = f" of {label.split(' ')[0]}"
        of_part = {name.removesuffix(suffix): value for name, value in best.items() if name.endswith(suffix)}
        part["metrics"][REACHABLE] = of_part


def _sampled(evaluator: Evaluator, vectors_by_method: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Return {"100 uniform negatives": {method: {metric: mean}}} for methods whose scores are inner products."""
    config, held_out, ranks = evaluator.config, evaluator.held_out, evaluator.ranks
    kinds = [Negatives.uniform(len(evaluator.sources.catalogue), config.sampled)]
    if config.sampled_same is not None:
        values = column_of(evaluator.sources.dataset.items, config.sampled_same, f"--same {config.sampled_same}")
        part_I = values.dictionary_encode(null_encoding="encode").indices.to_numpy(zero_copy_only=False)
        kinds.append(Negatives.same(f"same {config.sampled_same}", part_I.astype(np.int64), config.sampled))
    positives, result = held_out.positives.distinct(), {}
    for kind in kinds:
        by_method: dict[str, dict[str, float]] = {}
        for name, (item_ID, user_BD) in vectors_by_method.items():
            place_P = kind.ranks(item_ID, user_BD, positives, evaluator.excluded, evaluator.first_user)
            per_user = sampled_metrics(place_P, positives, config.k)
            total = ranks.sum(np.array([len(positives), *(value_B.sum() for value_B in per_user.values())]))
            by_method[name] = dict(zip(per_user, (total[1:] / total[0]).tolist(), strict=True))
        result[f"{config.sampled:,} {kind.name} negatives"] = by_method
    return result
