"""Recall of every loss and every kind of negative with its defaults, on the demo's synthetic dataset.

    python benchmarks/losses_quality.py [--config FILE] [--data FOLDER] [--seeds 0 ...] [--only NAME ...] [--set KEY=VALUE ...] [--json FILE]

The dataset is that of `prepare synthetic`, unless --data names a prepared one. Every contender trains the config
(configs/demo.yaml) with one setting changed, in one process with the threads of OMP_NUM_THREADS; --set adds settings to
all of them. Reported: Recall@10 on test of the best step, with popularity's; Recall@10 on valid of the last step, which
is lower where training declines; and on valid, at the last step, the mean cosine of two items and of a user and an
item, by which training recognises a collapse. `listwise` and `given` need lists: each train row gets its positive,
labelled 1, and up to 49 items drawn by popularity, labelled 0. `mined` has, for each item, the 50th to 100th nearest
items by who interacted with both.

NAME_recall, NAME_last_valid_recall, NAME_item_cosine, NAME_user_item_cosine, popularity_recall    means over seeds
"""  # noqa: E501

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent
LISTED = 50  # items of a row's list
MINED = (50, 100)  # which neighbours of an item
FIGURES = ("recall", "last_valid_recall", "item_cosine", "user_item_cosine")
EVALUATE = ("evaluate.best=recall@10", "evaluate.item_to_item=false", "evaluate.svd=0", "evaluate.bootstrap=0",
            "evaluate.slices=[]")  # fmt: skip
GIVEN = "loss.impressions={column: shown, labels: clicked}"


def kind(name: str, *more: str) -> tuple[str, ...]:
    """Settings of a loss with its own defaults."""
    return (f"loss.kind={name}", "loss.temperature=null", *more)


def negatives(**settings: Any) -> str:
    """All negatives, in place of the config's."""
    return f"loss.negatives={json.dumps({'in_batch': True, **settings})}"


# Settings of each contender; {mined} is the file, {refresh} a tenth of the run's steps.
CONTENDERS: dict[str, tuple[str, ...]] = {
    "softmax": kind("softmax"),
    "bce": kind("bce"),
    "softmax_bce": kind("softmax_bce"),
    "bsl": kind("bsl"),
    "ccl": kind("ccl"),
    "bpr": kind("bpr"),
    "margin": kind("margin"),
    "listwise": kind("listwise", GIVEN),
    "log_q 0": ("loss.log_q=0",),
    "log_q streaming": ("loss.log_q_estimate=streaming",),
    "in-batch alone": (negatives(),),
    "sampled 512 alone": (negatives(in_batch=False, sampled=512),),
    "sampled all": (negatives(in_batch=False, sampled="all"),),
    "sampled 512 by power .75": (negatives(sampled=512, power=0.75),),
    "popular 512": (negatives(sampled=512, popular={"count": 512}),),
    "same category 512": (negatives(sampled=512, same_category={"feature": "category", "count": 512}),),
    "given": (GIVEN,),
    "mined 2": ("loss.negatives.mined={file: {mined}, count: 2}",),
    "refresh 2": ("loss.negatives.refresh={every: {refresh}, count: 2}",),
    "queue 4096": ("loss.negatives.cross_batch_memory=4096",),
    "queue 16384": ("loss.negatives.cross_batch_memory=16384",),
    "hardest 32": ("loss.negatives.top_k=32",),
    "ccl, queue 16384": kind("ccl", "loss.negatives.cross_batch_memory=16384"),
    "ccl, hardest 32": kind("ccl", "loss.negatives.top_k=32"),
    "bpr, hardest 32": kind("bpr", "loss.negatives.top_k=32"),
    "margin, hardest 32": kind("margin", "loss.negatives.top_k=32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--data", type=Path, help="a prepared dataset; default: that of prepare synthetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parser.add_argument("--set", nargs="+", default=[], help="settings for all contenders, such as train.epochs=6")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    wanted = options.only or list(CONTENDERS)
    if unknown := set(wanted) - set(CONTENDERS):
        raise SystemExit(f"no contender {', '.join(sorted(unknown))}: there are {', '.join(CONTENDERS)}")
    print(headline(), flush=True)
    from trec_twotower.distributed.ranks import start_ranks

    with tempfile.TemporaryDirectory() as temporary, start_ranks() as ranks:
        place = Path(temporary)
        if options.data is None:
            command("prepare", "synthetic", "--out", place / "data")
        data = (options.data or place / "data").resolve()
        make_lists(data, place)
        bench = Bench(options.config, data, place, ranks, tuple(options.set))
        figures: dict[str, float] = {}
        print(f"\n{'':<26}{'test R@10':>11}{'last valid':>12}{'item cos':>10}{'user-item':>11}  warnings")
        for name in wanted:
            found = [bench.trained(name, seed) for seed in options.seeds]
            mean = {key: float(np.mean([each[key] for each in found])) for key in FIGURES}
            figures["popularity_recall"] = found[0]["popularity_recall"]
            figures |= {f"{_word(name)}_{key}": value for key, value in mean.items()}
            warned = ", ".join(sorted({cause for each in found for cause in each["warnings"]}))
            cells = f"{mean['recall']:>11.4f}{mean['last_valid_recall']:>12.4f}{mean['item_cosine']:>10.2f}"
            print(f"{name:<26}{cells}{mean['user_item_cosine']:>11.2f}  {warned}", flush=True)
        print(f"{'popularity':<26}{figures['popularity_recall']:>11.4f}")
    write_figures(options.json, dict(figures))


def command(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "trec_twotower", *map(str, words)], check=True, cwd=ROOT, stdout=sys.stderr)


class Bench:
    """Trains and evaluates contenders on one dataset."""

    def __init__(self, config: Path, data: Path, place: Path, ranks: Any, more: tuple[str, ...]) -> None:
        self.config, self.data, self.place, self.ranks, self.more = config, data, place, ranks, more

    def trained(self, name: str, seed: int) -> dict[str, Any]:
        """Figures of one run, which is removed."""
        from trec_twotower.config.loading import load_config
        from trec_twotower.evaluation.evaluator import Evaluator, evaluate_run
        from trec_twotower.index.item_neighbors import neighbours
        from trec_twotower.training.loop import train
        from trec_twotower.training.run_dir import Run

        run_dir = self.place / "run"
        usual = (f"data.dataset={self.data}", f"run_dir={run_dir}", f"data.seed={seed}", f"train.seed={seed}")
        whole = load_config(self.config, [*usual, *self.more])
        steps = pq.ParquetDataset(self.data / "train").read(columns=[]).num_rows // whole.data.batch_size
        filled = {"{mined}": str(self.place / "mined.parquet"), "{refresh}": str(steps * whole.train.epochs // 10)}
        changes = [_filled(each, filled) for each in CONTENDERS[name]]
        if any("loss.impressions" in each for each in changes):
            changes.append(f"data.dataset={self.place / 'lists'}")
        config = load_config(self.config, [*usual, *EVALUATE, *changes, *self.more])

        def evaluator(sources: Any) -> Any:
            return Evaluator.of(sources, "valid", config.evaluate, self.ranks, sample=config.evaluate.users)

        with contextlib.redirect_stdout(sys.stderr):
            train(config, self.ranks, evaluator, neighbours=neighbours)
            evaluate_run(Run.open(run_dir), self.ranks)
        judged = json.loads((run_dir / "evaluation.json").read_text())["metrics"]
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "valid"][-1]
        shutil.rmtree(run_dir)
        return {
            "recall": judged["two towers, exact search"]["recall@10"],
            "popularity_recall": judged["popularity"]["recall@10"],
            "last_valid_recall": last["recall@10"],
            "item_cosine": last["item_cosine"],
            "user_item_cosine": last["user_item_cosine"],
            "warnings": [line["cause"] for line in lines if line["kind"] == "warning"],
        }


def make_lists(data: Path, place: Path) -> None:
    """Write place/lists, the dataset with a list for each train row, and place/mined.parquet."""
    rng = np.random.default_rng(0)
    train = pq.ParquetDataset(data / "train").read()
    item_ids, item = np.unique(train["item_id"].to_numpy(), return_inverse=True)
    drawn = item[rng.integers(0, len(item), (len(item), LISTED - 1))]  # by popularity
    shown = [[int(own), *others[others != own]] for own, others in zip(item, drawn, strict=True)]
    labels = [[1.0] + [0.0] * (len(each) - 1) for each in shown]
    columns = {"shown": pa.array([item_ids[each] for each in shown]), "clicked": pa.array(labels)}
    for name, column in columns.items():
        train = train.append_column(name, column)
    shutil.copytree(data, place / "lists", ignore=shutil.ignore_patterns("train", "train_users", "dataset.yaml"))
    (place / "lists" / "train").mkdir()
    pq.write_table(train, place / "lists" / "train" / "part-0.parquet", write_page_checksum=True)
    near = _neighbours(train["user_id"].to_numpy(), item, len(item_ids))
    pq.write_table(
        pa.table({"item_id": item_ids, "negatives": pa.array([item_ids[row] for row in near])}), place / "mined.parquet"
    )


def _neighbours(user: np.ndarray, item: np.ndarray, num_items: int) -> np.ndarray:
    """(items, last - first) numbers of the items nearest by the cosine of who interacted with them."""
    taken = np.zeros((len(np.unique(user)), num_items), np.float32)
    taken[np.unique(user, return_inverse=True)[1], item] = 1
    taken /= np.linalg.norm(taken, axis=0)
    cosine = taken.T @ taken
    np.fill_diagonal(cosine, -1)
    return np.argsort(-cosine, axis=1, kind="stable")[:, MINED[0] : MINED[1]]


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _word(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    main()
