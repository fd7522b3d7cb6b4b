"""The index against stock FAISS of the same version and bytes: speed at equal recall, building, loading, filters.

    python benchmarks/index.py [--items 41000 1000000] [--run RUN ...] [--rounds 7] [--threads 1] [--json FILE]

Vectors are generated to resemble a trained model's (see `trained_like`); with --run also the export of a run. The
contender is stock `IVF,SQfp16` with several numbers of lists, its nprobe tuned on the same users to the same recall@100
and raised until the held-out users have it, too. Contenders take turns in every round, on one thread; figures are
medians over rounds of CPU time, as other programs may run. A gigabyte of disk and three of memory do for 1 M items;
10 M (--items 10000000) want ten times that. Figures, by name, each with the size or the run in front:

exact_b32_vs_stock     exact search of 32 users: queries/s over those of IndexFlatIP
index_b1_vs_stock      the default index: queries/s, one user at a time, over those of the best stock index; likewise
                       index_b32_vs_stock, index_b1024_vs_stock. index_recall, stock_recall: ours, the least of stock
build_cpu_s            CPU seconds of building and tuning; build_vs_stock: over those of the quickest stock
index_bytes_vs_stock   its file, over that of stock's
scan_vs_stock          share of the items it scans for held-out users, over the least of stock
filtered_worst_vs_best at 1, 5, 10, 30, 50, 90 and 99 % allowed: CPU seconds of a query over those of the faster
                       strategy; the worst. filtered_recall, filtered_short: least recall@100, most neighbours missing
build_peak_vs_index    memory of building from Parquet above that before it, over the finished index
build_rate_vs_at_once  rows/s of reading and adding, over those of reading all rows and adding them in one call
load_speedup           seconds of faiss.read_index over those of a mapped load
mapped_query_ratio     seconds of a query in the mapped index over those in the one read
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import headline, write_figures

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.distributed.host_memory import give_back
from trec_twotower.index import ExactItems, ItemIndex, build_index, exact_search
from trec_twotower.inference.export import VectorFiles, read_export

K, TARGET, STOCK_THRESHOLD = 100, 0.99, faiss.cvar.distance_compute_blas_threshold
BATCHES = (1, 32, 1024)
STOCK_LISTS = (1.25, 2.5, 5.0)  # x sqrt(items)


# ---------------------------------------------------------------- vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained_like(num_items: int, num_users: int, dim: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1 with what makes trained ones hard to search, and no more.

    Their spectrum falls; items lie around centres, themselves around fewer topics, of which some have many times the
    items of others; users lie elsewhere than items, between up to three centres and shifted by what all have in common.
    Stock FAISS scans about as much of them for 99 % recall as of trained Gowalla vectors: some 12 % of 41,000 items in
    256 lists, 2 to 3 % of a million in 1,024.
    """
    rng = np.random.default_rng(seed)
    scale = (1 + np.arange(dim, dtype=np.float32)) ** -0.5
    scale /= np.sqrt((scale**2).mean())

    def normal(count: int) -> np.ndarray:
        return rng.standard_normal((count, dim), dtype=np.float32) * scale

    topic = unit(normal(96))
    centre = unit(topic[rng.integers(0, 96, 4000)] + 0.7 * unit(normal(4000)))
    share = rng.permutation((1 + np.arange(4000)) ** -0.7)
    share /= share.sum()
    items = np.empty((num_items, dim), np.float32)
    for start in range(0, num_items, 1 << 17):
        count = min(num_items - start, 1 << 17)
        around = centre[rng.choice(4000, count, p=share)]
        items[start : start + count] = unit(around + 0.7 / np.sqrt(dim) * normal(count))
    weight = rng.dirichlet([0.6] * 3, num_users).astype(np.float32)
    between = np.einsum("um,umd->ud", weight, centre[rng.choice(4000, (num_users, 3), p=share)])
    return items, unit(between + 0.3 * unit(normal(1)) + 0.3 / np.sqrt(dim) * normal(num_users)).astype(np.float32)


# ---------------------------------------------------------------- measuring

Call = Callable[[], Any]


def in_turn(contenders: dict[str, Call], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each, all taking turns; a first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            started = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - started)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def one_by_one(search: Callable[[np.ndarray], Any], users: np.ndarray, batch: int) -> Call:
    """Return a call that asks for all users, a batch at a time."""

    def ask() -> None:
        for start in range(0, len(users), batch):
            search(users[start : start + batch])

    return ask


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a[a >= 0], b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def stock_search(index: Any) -> Callable[[np.ndarray], Any]:
    """FAISS as it comes: its own threshold between loop and BLAS."""

    def search(users: np.ndarray) -> Any:
        faiss.cvar.distance_compute_blas_threshold = STOCK_THRESHOLD
        return index.search(users, K)

    return search


# ---------------------------------------------------------------- the index against stock


class Stock:
    """A stock index with the least nprobe that reaches the target for the tuned and the held-out users."""

    def __init__(self, name: str, index: Any, cpu_s: float, num_bytes: int) -> None:
        self.name, self.index, self.cpu_s, self.num_bytes = name, index, cpu_s, num_bytes

    def raise_to_target(self, users: np.ndarray, exact: np.ndarray) -> None:
        while self.index.nprobe < self.index.nlist and recall(self.search(users)[1], exact) < TARGET:
            self.index.nprobe += 1

    def search(self, users: np.ndarray) -> Any:
        faiss.cvar.distance_compute_blas_threshold = STOCK_THRESHOLD  # as FAISS comes
        return self.index.search(users, K)

    def scanned_share(self, users: np.ndarray) -> float:
        faiss.cvar.indexIVF_stats.reset()
        self.search(users)
        return faiss.cvar.indexIVF_stats.ndis / len(users) / self.index.ntotal


def tuned_stock(items: np.ndarray, users: np.ndarray, exact: np.ndarray, factory: str) -> tuple[Any, float]:
    """Return a stock index with the least nprobe that reaches the target, and CPU seconds of building and tuning it."""
    started = time.process_time()
    index = faiss.index_factory(items.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64  # as many as ours has
    index.train(items)
    index.add(items)
    low, high = 0, 1

    def reaches(nprobe: int) -> bool:
        index.nprobe = nprobe
        return recall(index.search(users, K)[1], exact) >= TARGET

    while high < index.nlist and not reaches(high):
        low, high = high, min(2 * high, index.nlist)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    index.nprobe = high
    return index, time.process_time() - started


class Kept:
    """What takes long to make, made once and kept in a folder, so that a benchmark may be spread over several calls."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            np.save(path, make())
        return np.load(path)

    def stock(self, factory: str, make: Callable[[], tuple[Any, float]]) -> Stock:
        path, facts = self.folder / f"{factory}.faiss", self.folder / f"{factory}.json"
        if not facts.exists():
            index, cpu_s = make()
            faiss.write_index(index, str(path))
            facts.write_text(json.dumps({"nprobe": index.nprobe, "cpu_s": cpu_s}))
        index, known = faiss.read_index(str(path)), json.loads(facts.read_text())
        index.nprobe = known["nprobe"]
        return Stock(f"stock {factory}", index, known["cpu_s"], path.stat().st_size)

    def ours(self, make: Callable[[], ItemIndex]) -> tuple[ItemIndex, float]:
        """Return the index and the CPU seconds of building and tuning it."""
        facts = self.folder / "ours.json"
        if not facts.exists():
            started = time.process_time()
            index = make()
            facts.write_text(json.dumps(time.process_time() - started))
            ids = pa.array(np.arange(len(index)))
            index.save(self.folder / "ours", model_version="m", item_ids=ids, similarity="cosine")
        return ItemIndex.load(self.folder / "ours", device="cpu"), json.loads(facts.read_text())


def of_run(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the item and the user vectors of a run's export, users in random order."""
    exported = read_export(run / "export")
    users = np.asarray(exported.user_QD)
    users = users.reshape(-1, users.shape[-1])
    return np.ascontiguousarray(exported.item_ID), users[np.random.default_rng(1).permutation(len(users))]


def against_stock(
    name: str, vectors: tuple[np.ndarray, np.ndarray], rounds: int, kept: Kept, factory: str | None, make_only: bool
) -> dict[str, float]:
    """Print a table of the contenders and return the figures; the last 2,048 users are held out."""
    items, users = (
        kept.array(what, lambda each=each: each) for what, each in zip(("items", "users"), vectors, strict=True)
    )
    tune_users, held_out = users[:4096], np.ascontiguousarray(users[-2048:])
    exact = kept.array("exact", lambda: exact_search(items, held_out, K, device="cpu")[1])
    tune_exact = kept.array("tune_exact", lambda: exact_search(items, tune_users[1365:2730], K, device="cpu")[1])
    config = IndexConfig(k=K, target_recall=TARGET, device="cpu", factory=factory)
    index, cpu_s = kept.ours(lambda: build_index(items, tune_users, config))
    stocks = []
    for lists in sorted({max(1, int(factor * len(items) ** 0.5)) for factor in STOCK_LISTS}):
        codes = f"IVF{lists},SQfp16"
        stock = kept.stock(codes, lambda codes=codes: tuned_stock(items, tune_users[1365:2730], tune_exact, codes))
        stock.raise_to_target(held_out, exact)
        stocks.append(stock)
    if make_only:
        return {}
    flat = faiss.IndexFlatIP(items.shape[1])
    flat.add(items)
    exact_items = ExactItems(items)
    contenders = {
        "exact, stock": Stock("", flat, 0, 0).search,
        "exact, ours": lambda user: exact_search(exact_items, user, K),
        f"ours: {index.report.kind}": lambda user: index.search(user, K),
        **{f"{stock.name}, nprobe {stock.index.nprobe}": stock.search for stock in stocks},
    }
    sizes = [0, 0, index.report.bytes, *(stock.num_bytes for stock in stocks)]
    built = [0, 0, cpu_s, *(stock.cpu_s for stock in stocks)]
    shares = [1, 1, float(index.scanned(held_out, K).mean()), *(stock.scanned_share(held_out) for stock in stocks)]
    rate = rates(contenders, held_out, len(items), rounds)
    print(f"\n{name}: {len(items):,} x {items.shape[1]}, best {K} of {len(held_out):,} held-out users")
    print(f"{'':<34}{'recall':>8}{'scanned':>9}{'CPU s':>7}{'MB':>7}{'q/s b1':>8}{'b32':>8}{'b1024':>8}")
    recalls = []
    for number, (contender, search) in enumerate(contenders.items()):
        asked = held_out if number > 1 else held_out[:64]
        recalls.append(recall(search(asked)[1], exact[: len(asked)]))
        print(
            f"{contender:<34}{recalls[-1]:>8.4f}{shares[number]:>9.4f}{built[number]:>7.1f}{sizes[number] / 1e6:>7.1f}"
            + "".join(f"{rate[batch].get(contender, 0):>8,.0f}" for batch in BATCHES),
            flush=True,
        )
    ours, *others = list(contenders)[2:]
    return {
        "exact_b32_vs_stock": rate[32]["exact, ours"] / rate[32]["exact, stock"],
        **{
            f"index_b{batch}_vs_stock": rate[batch][ours] / max(rate[batch][each] for each in others)
            for batch in BATCHES
        },
        "index_bytes_vs_stock": sizes[2] / min(sizes[3:]),
        "index_recall": recalls[2],
        "stock_recall": min(recalls[3:]),
        "scan_vs_stock": shares[2] / min(shares[3:]),
        "build_cpu_s": cpu_s,
        "build_vs_stock": cpu_s / min(built[3:]),
        **filtered(items, held_out[:200], index, rounds),
    }


def rates(
    contenders: dict[str, Callable[[np.ndarray], Any]], users: np.ndarray, num_items: int, rounds: int
) -> dict[int, dict[str, float]]:
    """Return queries per CPU second by batch and contender; exact search is asked for fewer users of many items."""
    rate: dict[int, dict[str, float]] = {}
    for batch, wanted in zip(BATCHES, (256, 512, 1024), strict=True):
        asked = {
            name: 64 if name.startswith("exact") and num_items > 200_000 else wanted
            for name in contenders
            if batch < 1024 or not name.startswith("exact")
        }
        seconds = in_turn(
            {name: one_by_one(contenders[name], users[:count], batch) for name, count in asked.items()}, rounds
        )
        rate[batch] = {name: count / seconds[name] for name, count in asked.items()}
    return rate


def filtered(items: np.ndarray, users: np.ndarray, index: ItemIndex, rounds: int) -> dict[str, float]:
    """Search among some of the items, by each strategy and as the rule chooses."""
    rng = np.random.default_rng(1)
    worst, least, short = 0.0, 1.0, 0
    print(f"\n{'allowed':>8}{'chosen':>10}{'recall':>8}{'exact us':>10}{'selector':>10}")
    for share in (0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.99):
        mask = rng.random(len(items)) < share
        rows = np.flatnonzero(mask)
        truth = rows[exact_search(items[rows], users, min(K, len(rows)), device="cpu")[1]]
        chosen = index.allow(mask)
        filters = {strategy: index.allow(mask, strategy) for strategy in ("exact", "selector")}
        seconds = in_turn(
            {
                name: one_by_one(lambda user, allowed=allowed: index.search(user, K, allowed=allowed), users[:16], 1)
                for name, allowed in filters.items()
            },
            rounds,
        )
        strategy = index.strategy_of(chosen, K)
        found = index.search(users, K, allowed=chosen)[1]
        worst = max(worst, seconds[strategy] / min(seconds.values()))
        least = min(least, recall(found, truth))
        short = max(short, int((found[:, : truth.shape[1]] < 0).sum()))
        print(
            f"{share:>8.0%}{strategy:>10}{recall(found, truth):>8.4f}"
            + "".join(f"{seconds[name] / 16 * 1e6:>10,.0f}" for name in filters),
            flush=True,
        )
    return {"filtered_worst_vs_best": worst, "filtered_recall": least, "filtered_short": short}


# ---------------------------------------------------------------- building and loading


def write_export(items: np.ndarray, users: np.ndarray, folder: Path) -> None:
    """Parquet files as an export has them."""
    for what, vectors in (("items", items), ("users", users)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        table = pa.table({f"{what[:-1]}_id": np.arange(len(vectors)), "vector": column})
        pq.write_table(
            table, folder / f"{what}-00000-of-00001.parquet", row_group_size=65_536, compression="zstd",
            use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def build_alone(way: str, folder: Path) -> None:
    """In a process of its own: one way of building; prints what it took."""
    faiss.omp_set_num_threads(1)
    files = VectorFiles(folder, "items")
    users = np.concatenate(list(VectorFiles(folder, "users").pieces()))
    # What is loaded and compiled at the first use is no part of the building
    exact_search(users, users[:8], 1, device="cpu")
    build_index(users[:2000], users, IndexConfig(device="cpu", lists=20))
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    if way == "ours":
        index = build_index(files, users, IndexConfig(device="cpu"))
        add_s, num_bytes, kind = index.report.add_s, index.report.bytes, index.report.kind
        peak = peak_bytes()
        index.save(folder / "index", model_version="m", item_ids=pa.array(np.arange(len(files))), similarity="cosine")
    else:
        kind = json.loads((folder / "kind.json").read_text())
        index = faiss.index_factory(files.dim, kind, faiss.METRIC_INNER_PRODUCT)
        sample = np.concatenate([piece[::8] for piece in files.pieces()])
        index.cp.niter = 1  # its training is not what is timed
        index.train(sample)
        del sample
        started = time.perf_counter()
        index.add(np.concatenate(list(files.pieces())))
        add_s, num_bytes, peak = time.perf_counter() - started, 0, peak_bytes()
    print(json.dumps({"add_s": add_s, "bytes": num_bytes, "peak": peak - before, "kind": kind}))


def building(num_items: int, rounds: int, folder: Path) -> dict[str, float]:
    items, users = trained_like(num_items, 4096)
    write_export(items, users, folder)
    del items
    took: dict[str, list[dict[str, Any]]] = {"ours": [], "at_once": []}
    for _ in range(max(1, rounds // 3)):
        for way, results in took.items():
            command = [sys.executable, __file__, "--build-alone", way, str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
            results.append(json.loads(done.stdout.splitlines()[-1]))
            (folder / "kind.json").write_text(json.dumps(results[-1]["kind"]))
    ours, at_once = took["ours"], took["at_once"]
    for way, results in took.items():
        rows_per_s = [num_items / result["add_s"] for result in results]
        print(
            f"adding, {way:<8} {np.median(rows_per_s):>12,.0f} rows/s, peak {results[0]['peak'] / 1e6:,.0f} MB more "
            f"than before, of an index of {ours[0]['bytes'] / 1e6:,.0f} MB"
        )
    return {
        "build_peak_vs_index": max(result["peak"] for result in ours) / ours[0]["bytes"],
        "build_rate_vs_at_once": float(
            np.median([result["add_s"] for result in at_once]) / np.median([result["add_s"] for result in ours])
        ),
        "build_peak_bytes": max(result["peak"] for result in ours),
        **loading(folder / "index", users, rounds),
    }


def loading(folder: Path, users: np.ndarray, rounds: int) -> dict[str, float]:
    [file] = folder.glob("index-*.faiss")
    seconds = in_turn(
        {
            "plain": lambda: faiss.read_index(str(file)),
            "verified": lambda: ItemIndex.load(folder, device="cpu"),
            "mapped": lambda: ItemIndex.load(folder, device="cpu", mapped=True),
        },
        rounds,
    )
    read, mapped = ItemIndex.load(folder, device="cpu"), ItemIndex.load(folder, device="cpu", mapped=True)
    asked = users[:512]
    query = in_turn(
        {
            "read": one_by_one(lambda user: read.search(user, K), asked, 1),
            "mapped": one_by_one(lambda user: mapped.search(user, K), asked, 1),
        },
        rounds,
    )
    print(
        f"loading: {seconds['plain'] * 1e3:.1f} ms plain, {seconds['verified'] * 1e3:.1f} verified, "
        f"{seconds['mapped'] * 1e3:.2f} mapped; a query {query['read'] / 512 * 1e6:.0f} µs read, "
        f"{query['mapped'] / 512 * 1e6:.0f} mapped"
    )
    return {
        "load_speedup": seconds["plain"] / seconds["mapped"],
        "mapped_query_ratio": query["mapped"] / query["read"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="*", default=[41_000, 1_000_000])
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="run folders with an export")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--factory", help="of ours, in place of the default")
    parser.add_argument("--folder", type=Path, help="keep vectors and indexes here, and use those that are there")
    parser.add_argument("--make-only", action="store_true", help="make what is to be kept, and measure nothing")
    parser.add_argument("--without-building", action="store_true", help="neither the building nor the loading")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--build-alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build_alone:
        build_alone(options.build_alone[0], Path(options.build_alone[1]))
        return
    faiss.omp_set_num_threads(options.threads)
    print(headline(), f"\nFAISS compiled for {faiss.get_compile_options()}, {options.threads} thread(s)", flush=True)
    figures: dict[str, float] = {}
    worlds = {run.name: lambda run=run: of_run(run) for run in options.run}
    worlds |= {f"{count}": lambda count=count: trained_like(count, 4096 + 2048) for count in sorted(options.items)}
    for name, make in worlds.items():
        with tempfile.TemporaryDirectory() as temporary:
            kept = Kept(options.folder or Path(temporary), name)
            vectors = (np.empty(0), np.empty(0)) if (kept.folder / "users.npy").exists() else make()
            found = against_stock(name, vectors, options.rounds, kept, options.factory, options.make_only)
            if name.isdigit() and not (options.make_only or options.without_building):
                found |= building(int(name), options.rounds, Path(temporary))
            figures |= {f"{name} {figure}": value for figure, value in found.items()}
    print("\n" + "\n".join(f"{name:<40}{value:>10.4f}" for name, value in figures.items()))
    write_figures(options.json, figures)


if __name__ == "__main__":
    # numpy's and torch's threads follow the environment, which must be set before they are loaded
    wanted = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()) and "--threads" not in sys.argv:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    main()
