"""The whole chain, timed and scored: the demo, and Gowalla from its text files to rankings.

    python benchmarks/chain.py --gowalla FOLDER [--ranks 2] [--out DIR] [--json FILE]

FOLDER holds train.txt and test.txt of LightGCN's split. Without --gowalla only the demo runs. Gowalla is trained on
all of train.txt, by configs/gowalla_bag.yaml, whose settings were chosen on a fifth of it held out.

demo_s               the demo without set-up, seconds
gowalla_recall@20    over the whole catalogue, exact search; likewise gowalla_ndcg@20
gowalla_index_share  Recall@20 through the tuned index, as a share of the exact
gowalla_train_s      seconds in the training loop, evaluation left out
peak_rank_bytes      the most memory any rank of the Gowalla training held
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import headline, write_figures

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str | Path) -> None:
    print("$", *(Path(word).name if Path(word).is_absolute() else word for word in words), flush=True)
    subprocess.run([str(word) for word in words], check=True, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gowalla", type=Path, help="the folder with train.txt and test.txt")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where datasets and runs go and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    print(headline(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        figures = demo(out, options.ranks)
        if options.gowalla is not None:
            figures |= gowalla(options.gowalla.resolve(), out, options.ranks)
    print("\n" + "\n".join(f"{name:<22}{value:>16,.4f}" for name, value in figures.items()))
    write_figures(options.json, figures)


def demo(out: Path, ranks: int) -> dict[str, float]:
    started = time.perf_counter()
    run(sys.executable, "-m", "trec_twotower", "demo", "--dir", out, "--ranks", str(ranks))
    return {"demo_s": time.perf_counter() - started}


def gowalla(raw: Path, out: Path, ranks: int) -> dict[str, float]:
    dataset, folder = out / "data/gowalla-all", out / "runs/gowalla-all"
    alone = (sys.executable, "-m", "trec_twotower")
    torchrun = (ROOT / "launch/torchrun.sh", "--ranks", str(ranks))
    run(*alone, "prepare", "gowalla", "--out", dataset, "--overwrite", f"data_dir={raw}", "valid_share=0")
    run(*torchrun, "train", "configs/gowalla_bag.yaml", f"data.dataset={dataset}", f"run_dir={folder}")
    run(*torchrun, "export", folder)
    run(*alone, "index", folder)
    run(*torchrun, "evaluate", folder, "--index", "--rankings", folder / "rankings.parquet")
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    status = json.loads((folder / "status.json").read_text())
    exact, through = metrics["two towers, exact search"], metrics["two towers, through the index"]
    return {
        "gowalla_recall@20": exact["recall@20"],
        "gowalla_ndcg@20": exact["ndcg@20"],
        "gowalla_index_share": through["recall@20"] / exact["recall@20"],
        "gowalla_train_s": status["train_s"],
        "peak_rank_bytes": status["peak_rank_bytes"],
    }


if __name__ == "__main__":
    main()
