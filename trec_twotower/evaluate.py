"""How well held-out items are found: over the whole catalogue, exactly or through the index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trec_twotower.config import EvaluateConfig
from trec_twotower.data.features import Sources
from trec_twotower.data.held_out import HeldOut
from trec_twotower.data.lists import Lists, offsets_of
from trec_twotower.distributed import Ranks
from trec_twotower.encode import encode, encode_everywhere
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.export import load_model
from trec_twotower.files import write_json
from trec_twotower.index import ItemIndex, exact_search
from trec_twotower.metrics import MetricSums, popularity_ranking, ranking_metrics
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.run import Run

Search = Callable[[np.ndarray, int, Lists], np.ndarray]  # user vectors, k, seen -> item rows


@dataclass(frozen=True)
class Evaluator:
    """Held-out users of this rank, ready to be ranked for."""

    sources: Sources
    held_out: HeldOut  # this rank's share
    config: EvaluateConfig
    ranks: Ranks

    @classmethod
    def of(
        cls, sources: Sources, split: str, config: EvaluateConfig, ranks: Ranks, *, sample: int | None = None
    ) -> Evaluator:
        parts = sorted(path.name for path in sources.dataset.folder.iterdir() if path.is_dir())
        if split not in parts or split in ("items", "users"):
            known = [name for name in parts if name not in ("items", "users")]
            raise ConfigError(f"{sources.dataset.folder} has no part {split!r} to evaluate on{nearest(split, known)}.")
        largest = max(config.k)
        if largest > len(sources.catalogue):
            raise ConfigError(
                f"evaluate.k asks for {largest:,} items, but the catalogue has {len(sources.catalogue):,}: lower it."
            )
        held_out = HeldOut.read(sources, split, sample)
        return cls(sources, held_out.part(ranks.share(len(held_out))), config, ranks)

    def __call__(self, model: TwoTower) -> dict[str, float]:
        """Mean metrics over the users of all ranks, by exact search."""
        return self.by_search(model, self.exact(model))

    def exact(self, model: TwoTower) -> Search:
        """Search that scores every item of the catalogue."""
        item_ID = encode_everywhere(model, "item", self.sources.catalogue.columns, self.ranks).cpu().numpy()
        return lambda user_BD, k, seen: exact_search(item_ID, user_BD, k, seen)[1]

    def through(self, index: ItemIndex) -> Search:
        return lambda user_BD, k, seen: index.search_unseen(user_BD, k, seen)[1]

    def by_search(self, model: TwoTower, search: Search) -> dict[str, float]:
        """Mean metrics over the users of all ranks, of the items that `search` finds."""
        return self.mean(self.rankings(model, search))

    def rankings(self, model: TwoTower, search: Search) -> np.ndarray:
        """(users of this rank, largest k): catalogue rows, best first, seen items left out."""
        user_BD = encode(model, "user", self.held_out.user, self.ranks).cpu().numpy()
        k = max(self.config.k)
        ranked = np.full((len(user_BD), k), -1, np.int64)
        for start in range(0, len(user_BD), self.config.block):
            rows = np.arange(start, min(start + self.config.block, len(user_BD)))
            ranked[rows] = search(user_BD[rows], k, self.held_out.seen.take(rows))
        return ranked

    def popularity(self, count_I: np.ndarray) -> dict[str, float]:
        """The baseline: for everybody the most taken items, less those seen."""
        return self.mean(popularity_ranking(count_I, self.held_out.seen, max(self.config.k)))

    def mean(self, ranked_BK: np.ndarray) -> dict[str, float]:
        """Mean metrics over the users of all ranks, given this rank's rankings."""
        sums = MetricSums()
        sums.add(ranking_metrics(ranked_BK, self.held_out.positives, self.config.k))
        names = [f"{name}@{k}" for k in self.config.k for name in ("recall", "ndcg", "hit", "mrr", "precision")]
        total = self.ranks.sum(np.array([sums.num_users, *(sums.sums.get(name, 0.0) for name in names)]))
        return dict(zip(names, (total[1:] / max(total[0], 1)).tolist(), strict=True))


def _write_rankings(path: Path, user_ids: pa.Array, item_ids: pa.Array, ranked_BK: np.ndarray) -> None:
    """Parquet of user_id and item_ids (outside ids, best first)."""
    found = ranked_BK >= 0
    items = item_ids.take(pa.array(ranked_BK[found]))
    lists = pa.ListArray.from_arrays(offsets_of(found.sum(1)).astype(np.int32), items)
    path.parent.mkdir(parents=True, exist_ok=True)
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
) -> str:
    """Evaluate a run's checkpoint on a split, write RUN/evaluation.json, and return the table beside the baselines."""
    if rankings is not None and rankings.is_dir():
        raise ConfigError(f"{rankings} is a folder: name the file that the rankings are to become.")
    loaded = load_model(run, ranks, checkpoint)
    index = ItemIndex.load(run.folder / "index", model_version=loaded.version) if through_index else None
    evaluator = Evaluator.of(loaded.sources, split, run.config.evaluate, ranks)
    exact = evaluator.rankings(loaded.model, evaluator.exact(loaded.model))
    rows = {"two towers, exact search": evaluator.mean(exact)}
    if index is not None:
        rows["two towers, through the index"] = evaluator.by_search(loaded.model, evaluator.through(index))
    rows["popularity"] = evaluator.popularity(run.item_counts())
    best = loaded.sources.dataset.description.get("best_reachable")
    if best is not None and best.get("split", "test") == split:
        rows["best reachable"] = {name: value for name, value in best.items() if "@" in name}
    if rankings is not None:
        mine = rankings.with_name(f".{rankings.name}.{ranks.rank}")
        _write_rankings(mine, evaluator.held_out.user_ids, loaded.sources.catalogue.ids, exact)
        ranks.barrier()
        ranks.once(lambda: _join_rankings(rankings, ranks.num_ranks))
    result = {
        "split": split,
        "step": loaded.step,
        "model_version": loaded.version,
        "users": int(ranks.sum(np.array([len(evaluator.held_out)]))[0]),
        "metrics": rows,
    }
    ranks.once(lambda: write_json(run.folder / "evaluation.json", result))
    smallest = [name for k in run.config.evaluate.k[:2] for name in (f"recall@{k}", f"ndcg@{k}")]
    columns = [*smallest, f"hit@{run.config.evaluate.k[0]}", f"mrr@{run.config.evaluate.k[0]}"]
    return f"{split}, {result['users']:,} users, whole catalogue, items already taken left out\n" + comparison(
        rows, columns
    )
