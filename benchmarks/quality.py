"""How good recommendations are on a public split, beside what has been published on exactly that split.

    python benchmarks/quality.py gowalla --data FOLDER [--only NAME ...] [--seeds 0 1 2] [--rankings FILE] [--json FILE]
    python benchmarks/quality.py amazon-beauty --data FOLDER

FOLDER holds the split's files as `prepare` takes them. Every contender is fitted on train (settings were chosen on a
part held out of it, never on test), ranks the whole catalogue for every test user, items already taken left out, and is
scored once for each seed; figures are means over seeds. One process, the threads of OMP_NUM_THREADS; CPU seconds are
those of fitting, its checkpoints among them, with imports, the reading of the dataset's catalogue and evaluation left
out: two cores have as many in half the time. `index` is the least share of Recall that the tuned index keeps.

NAME_recall, NAME_ndcg, NAME_cpu_s         of each contender
NAME_recall_spread, NAME_ndcg_spread       of a config: between the best and the worst seed
NAME_index_share                           of a config
seconds_to_LINE                            the fewest CPU seconds of a contender that passes a published line in both
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent
LISTED = 50  # items a user, in rankings files


@dataclass(frozen=True)
class Split:
    """A public split: how it is prepared and judged, who is measured on it, and what others have reported."""

    prepare: tuple[str, ...]
    k: int
    contenders: dict[str, Callable[[Any], Any]]
    published: dict[str, tuple[float, float]]  # Recall@k, NDCG@k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=list(SPLITS))
    parser.add_argument("--data", type=Path, required=True, help="the folder of the split's files")
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each of our configs")
    parser.add_argument("--rankings", type=Path, help="write the rankings of the last contender to this file")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    print(headline(), flush=True)
    split = SPLITS[options.split]
    wanted = options.only or list(split.contenders)
    if unknown := set(wanted) - set(split.contenders):
        raise SystemExit(f"no contender {', '.join(unknown)}: there are {', '.join(split.contenders)}")
    from trec_twotower.distributed.ranks import start_ranks

    with tempfile.TemporaryDirectory() as temporary, start_ranks() as ranks:
        place = Path(temporary)
        command("prepare", options.split, "--out", place / "data", f"data_dir={options.data.resolve()}", *split.prepare)
        bench = Bench(place, split, ranks, options.rankings, options.seeds)
        figures = {}
        print(f"\n{'':<28}{f'Recall@{split.k}':>12}{f'NDCG@{split.k}':>12}{'CPU s':>10}{'index':>10}  spread")
        for name in wanted:
            found = split.contenders[name](bench)
            index = f"{found['index_share']:>10.4f}" if "index_share" in found else f"{'':>10}"
            cells = f"{found['recall']:>12.5f}{found['ndcg']:>12.5f}{found['cpu_s']:>10.1f}"
            spread = "  {recall_spread:.5f}, {ndcg_spread:.5f}".format(**found) if "recall_spread" in found else ""
            print(f"{name:<28}{cells}{index}{spread}", flush=True)
            figures |= {f"{_word(name)}_{key}": value for key, value in found.items()}
    print("\npublished")
    for line, (recall, ndcg) in split.published.items():
        passing = [
            figures[f"{_word(name)}_cpu_s"]
            for name in wanted
            if figures[f"{_word(name)}_recall"] > recall and figures[f"{_word(name)}_ndcg"] > ndcg
        ]
        seconds = f"passed in {min(passing):.1f} CPU s" if passing else "not passed"
        if passing:
            figures[f"seconds_to_{_word(line)}"] = min(passing)
        print(f"{line:<28}{recall:>12.4f}{ndcg:>12.4f}   {seconds}")
    write_figures(options.json, figures)


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "trec_twotower", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)


class Bench:
    """What a contender needs: the prepared split and a judge."""

    def __init__(self, place: Path, split: Split, ranks: Any, rankings: Path | None, seeds: list[int]) -> None:
        from trec_twotower.config.evaluation import EvaluateConfig
        from trec_twotower.config.features import build_feature
        from trec_twotower.config.schema import Schema
        from trec_twotower.data.dataset import Dataset
        from trec_twotower.data.feature_dataset import FeatureDataset
        from trec_twotower.data.held_out import HeldOut

        self.place, self.split, self.ranks, self.rankings, self.seeds = place, split, ranks, rankings, seeds
        item = build_feature(name="item_id", kind="id", buckets=1 << 17, dim=4)
        dataset = Dataset(place / "data")
        rows = "user" if dataset.train.has("positives") else "event"
        self.sources = FeatureDataset(dataset, Schema({"item_id": _table(item)}, (), (item,)), rows)
        self.held_out = HeldOut.read(self.sources, "test")
        self.evaluate = EvaluateConfig(k=(split.k,), best=f"recall@{split.k}")

    def judged(self, ranked_BK: np.ndarray, cpu_s: float) -> dict[str, float]:
        """Mean metrics of the rankings of all test users."""
        from trec_twotower.evaluation.metrics import ranking_metrics

        metrics = ranking_metrics(ranked_BK, self.held_out.positives, (self.split.k,))
        if self.rankings is not None:
            from trec_twotower.evaluation.evaluator import _write_rankings

            _write_rankings(self.rankings, self.held_out.user_ids, self.sources.catalogue.ids, ranked_BK)
        recall, ndcg = (float(metrics[f"{name}@{self.split.k}"].mean()) for name in ("recall", "ndcg"))
        return {"recall": recall, "ndcg": ndcg, "cpu_s": cpu_s}

    def by_scores(self, scores_of: Callable[[slice], torch.Tensor], cpu_s: float, block: int = 512) -> dict[str, float]:
        """Judge users by their scores of all items, so many users at a time."""
        ranked = []
        for start in range(0, len(self.held_out), block):
            rows = slice(start, min(start + block, len(self.held_out)))
            score = scores_of(rows)
            seen = self.held_out.seen.take(np.arange(rows.start, rows.stop))
            score[torch.from_numpy(seen.rows), torch.from_numpy(seen.values.astype(np.int64))] = -torch.inf
            ranked.append(score.topk(LISTED, 1).indices.numpy())
        return self.judged(np.concatenate(ranked), cpu_s)


def _table(feature: Any) -> Any:
    from trec_twotower.config.model import TableSpec

    return TableSpec(buckets=feature.buckets, dim=feature.dim)


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


# ---------------------------------------------------------------- contenders


def popularity(bench: Bench) -> dict[str, float]:
    from trec_twotower.evaluation.metrics import popularity_ranking

    count_I = bench.sources.item_counts()
    return bench.judged(popularity_ranking(count_I, bench.held_out.seen, LISTED), 0.0)


def pure_svd(dim: int) -> Callable[[Bench], dict[str, float]]:
    """The usual singular vectors of the normalised matrix, users folded in by what they took."""

    def fitted(bench: Bench) -> dict[str, float]:
        from trec_twotower.config.training import SpectralConfig
        from trec_twotower.training.spectral_initialization import Interactions, spectral_tables

        usual = SpectralConfig(
            history="history", user_power=0.5, item_power=0.5, history_power=0.5, length_power=0.5, spectrum_power=0
        )
        began = time.process_time()
        history_ID, item_ID = spectral_tables(Interactions.read(bench.sources, bench.ranks), dim, usual, 0, bench.ranks)
        took = time.process_time() - began
        return bench.by_scores(lambda rows: _taken(bench, rows) @ history_ID @ item_ID.T, took)

    return fitted


def gf_cf(bench: Bench) -> dict[str, float]:
    """GF-CF (Shen et al. 2021): the item-item filter of the normalised matrix beside its 256 strongest directions."""
    from trec_twotower.config.training import SpectralConfig
    from trec_twotower.training.spectral_initialization import Interactions, _sparse, spectral_tables

    began = time.process_time()
    taken = Interactions.read(bench.sources, bench.ranks)
    usual = SpectralConfig(
        history="history", user_power=0.5, item_power=0.5, history_power=0.5, length_power=0.5, spectrum_power=0
    )
    history_ID, item_ID = spectral_tables(taken, 256, usual, 0, bench.ranks)
    n_U, d_I = (
        np.bincount(taken.user_P, minlength=taken.num_users),
        np.bincount(taken.item_P, minlength=taken.num_items),
    )
    value = ((n_U[taken.user_P] * d_I[taken.item_P]) ** -0.5).astype(np.float32)
    order = np.argsort(taken.item_P, kind="stable")
    of_users = _sparse(taken.user_P, taken.item_P, value, (taken.num_users, taken.num_items))
    of_items = _sparse(taken.item_P[order], taken.user_P[order], value[order], (taken.num_items, taken.num_users))
    took = time.process_time() - began

    def scores(rows: slice) -> torch.Tensor:
        taken_BI = _taken(bench, rows)
        return (of_items @ (of_users @ taken_BI.T)).T + 0.3 * (taken_BI @ history_ID @ item_ID.T)

    return bench.by_scores(scores, took)


def _taken(bench: Bench, rows: slice) -> torch.Tensor:
    """(rows, I): 1 where a test user has taken an item."""
    seen = bench.held_out.seen.take(np.arange(rows.start, rows.stop))
    taken_BI = torch.zeros(len(seen), len(bench.sources.catalogue))
    taken_BI[torch.from_numpy(seen.rows), torch.from_numpy(seen.values.astype(np.int64))] = 1
    return taken_BI


def of_config(name: str, *overrides: str) -> Callable[[Bench], dict[str, float]]:
    """The towers of a shipped config over some seeds, exactly and through the index."""

    def fitted(bench: Bench) -> dict[str, float]:
        found = [once(bench, seed) for seed in bench.seeds]
        means = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
        means["index_share"] = min(each["index_share"] for each in found)
        spreads = {f"{name}_spread": float(np.ptp([each[name] for each in found])) for name in ("recall", "ndcg")}
        return {**means, **spreads}

    def once(bench: Bench, seed: int) -> dict[str, float]:
        from trec_twotower.config.loading import load_config
        from trec_twotower.evaluation.evaluator import Evaluator, exactly, through
        from trec_twotower.index import ItemIndex
        from trec_twotower.inference.export import export
        from trec_twotower.inference.model_loader import load_model
        from trec_twotower.training.loop import train
        from trec_twotower.training.run_dir import Run

        folder = bench.place / f"run-{_word(name)}-{time.monotonic_ns()}"
        place = [f"data.dataset={bench.place / 'data'}", f"run_dir={folder}", f"evaluate.k=[{bench.split.k},{LISTED}]"]
        place += [f"evaluate.best=recall@{bench.split.k}", f"train.seed={seed}", f"data.seed={seed}"]
        config = load_config(ROOT / f"configs/{name}.yaml", [*place, *overrides])
        began = time.process_time()
        train(config, bench.ranks)
        took = time.process_time() - began
        loaded = load_model(Run.open(folder), bench.ranks, "newest")
        evaluator = Evaluator.of(loaded.sources, "test", config.evaluate, bench.ranks)
        user_BD, item_ID = evaluator.users(loaded.model), evaluator.items(loaded.model)
        found = bench.judged(evaluator.rankings(user_BD, exactly(item_ID, bench.ranks)), took)
        export(loaded, bench.ranks)
        command("index", folder)
        index = ItemIndex.load(folder / "index", model_version=loaded.version)
        by_index = evaluator.mean(evaluator.rankings(user_BD, through(index)))
        return {**found, "index_share": by_index[f"recall@{bench.split.k}"] / found["recall"]}

    return fitted


def _lines(text: str) -> Iterator[tuple[str, tuple[float, float]]]:
    for line in text.strip().splitlines():
        name, recall, ndcg = line.rsplit(None, 2)
        yield name.strip(), (float(recall), float(ndcg))


# Sources: the BARS leaderboard of github.com/reczoo/BARS, and the papers' own repositories.
SPLITS = {
    "gowalla": Split(
        prepare=("valid_share=0",),
        k=20,
        contenders={
            "popularity": popularity,
            "SVD two-tower": pure_svd(256),
            "GF-CF": gf_cf,
            "closed form, dim 256": of_config(
                "gowalla_spectral", "tables.history.dim=256", "tables.item.dim=256", "model.dim=256",
                "train.spectral.history_power=0.4", "train.spectral.length_power=0.4",
                "train.spectral.spectrum_power=0",
            ),
            "fast: gowalla_spectral.yaml": of_config("gowalla_spectral"),
            "closed form, dim 1024": of_config(
                "gowalla_spectral", "tables.history.dim=1024", "tables.item.dim=1024", "model.dim=1024"
            ),
            "best: gowalla.yaml": of_config("gowalla"),
        },
        published=dict(_lines("""
            MF-BPR             .1627  .1378
            YoutubeDNN         .1754  .1473
            EASE               .1765  .1467
            LightGCN           .1830  .1554
            MF-CCL             .1837  .1493
            GF-CF              .1849  .1518
            UltraGCN           .1862  .1580
            SimpleX            .1872  .1557
            MF + BSL           .1882  .1584
            LightGCN + BSL     .1892  .1590
            NESCL              .1917  .1617
            BSPM-EM            .1920  .1597
            ChebyCF            .1941  .1616
        """)),
    ),
    "amazon-beauty": Split(
        prepare=(),
        k=10,
        contenders={
            "popularity": popularity,
            "SVD two-tower": pure_svd(256),
            "fast: 1 epoch": of_config("amazon_beauty", "train.epochs=1"),
            "fast: 2 epochs": of_config("amazon_beauty", "train.epochs=2"),
            "fast: 3 epochs": of_config("amazon_beauty", "train.epochs=3"),
            "best: amazon_beauty.yaml": of_config("amazon_beauty"),
        },
        published=dict(_lines("""
            SASRec                     .0605  .0318
            S3-Rec                     .0647  .0327
            TIGER                      .0648  .0384
            ActionPiece                .0775  .0424
            HSTU                       .0788  .0439
            DuoRec                     .0845  .0443
            SASRec, sampled softmax    .0921  .0531
            eSASRec                    .0928  .0523
        """)),
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
