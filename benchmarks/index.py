"""The index against stock FAISS of the same version: speed at equal recall, bytes, building, loading, filters.

    python benchmarks/index.py [--items 41000 1000000] [--run RUN] [--rounds 7] [--threads 1] [--json FILE]

Vectors are generated to be like a trained model's (see `trained_like`); with --run also the export of a run. Contenders
take turns in every round, on one thread; figures are medians over rounds. A gigabyte of disk and three of memory do for
1 M items; 10 M (--items 10000000) want ten times that. The figures of the largest size, by name:

exact_b32_vs_stock     exact search of 32 users: queries/s over those of IndexFlatIP
index_b1_vs_stock      the default index: queries/s, one user at a time, over those of the best of three stock IVF,Flat
                       whose nprobe was tuned on the same users to the same recall@100, and raised until the held-out
                       users have it, too; likewise index_b1024_vs_stock. index_recall, stock_recall: ours, the least
build_cpu_s            CPU seconds of building and tuning the default; build_vs_stock: over those of the quickest stock
index_bytes_vs_stock   its file, over that of stock's
scan_vs_stock          of --run: the share of the items it scans for held-out users, over what stock scans of as many
                       lists at the same target; both tuned on other users
build_peak_vs_index    memory of building from Parquet above that before it, over the finished index
build_rate_vs_at_once  rows/s of reading and adding, over those of reading all rows and adding them in one call
load_speedup           seconds of faiss.read_index over those of a mapped load
mapped_query_ratio     seconds of a query in the mapped index over those in the one read
filtered_worst_vs_best at 1, 10, 50 and 99 % allowed: seconds of a query over those of the fastest of the three ways;
                       the worst. filtered_recall, filtered_short: the least recall@100, the most neighbours missing
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

from trec_twotower.config import IndexConfig
from trec_twotower.export import VectorFiles, read_export
from trec_twotower.index import ItemIndex, build_index, exact_search
from trec_twotower.memory import give_back

K, TARGET, STOCK_THRESHOLD = 100, 0.99, faiss.cvar.distance_compute_blas_threshold
STOCK_LISTS = {41_000: (128, 256, 512), 1_000_000: (1024, 2048, 4096)}


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
    """Median seconds of each, all taking turns; a first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def one_by_one(search: Callable[[np.ndarray], Any], users: np.ndarray, batch: int) -> Call:
    """A call that asks for all users, a batch at a time."""

    def ask() -> None:
        for start in range(0, len(users), batch):
            search(users[start : start + batch])

    return ask


def latencies_us(search: Callable[[np.ndarray], Any], users: np.ndarray) -> tuple[float, float]:
    """Median and 99th percentile of single users."""
    taken = []
    for user in range(len(users)):
        started = time.perf_counter()
        search(users[user : user + 1])
        taken.append(time.perf_counter() - started)
    return float(np.percentile(taken, 50) * 1e6), float(np.percentile(taken, 99) * 1e6)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a[a >= 0], b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def stock_search(index: Any) -> Callable[[np.ndarray], Any]:
    """FAISS as it comes: its own threshold between loop and BLAS."""

    def search(users: np.ndarray) -> Any:
        faiss.cvar.distance_compute_blas_threshold = STOCK_THRESHOLD
        return index.search(users, K)

    return search


# ---------------------------------------------------------------- the index against stock


def tuned_stock(items: np.ndarray, users: np.ndarray, exact: np.ndarray, factory: str) -> tuple[Any, float]:
    """A stock index with the least nprobe that reaches the target for the users; CPU seconds of that."""
    started = time.process_time()
    index = faiss.index_factory(items.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    if factory.startswith("IVF"):
        index.cp.max_points_per_centroid = 64  # as many as ours takes
    index.train(items)
    index.add(items)
    if factory.startswith("IVF"):
        low, high = 0, 1
        while high < index.nlist and _reached(index, high, users, exact) < TARGET:
            low, high = high, min(2 * high, index.nlist)
        while high - low > 1:
            middle = (low + high) // 2
            if _reached(index, middle, users, exact) < TARGET:
                low = middle
            else:
                high = middle
        index.nprobe = high
    return index, time.process_time() - started


def raise_to_target(index: Any, users: np.ndarray, exact: np.ndarray) -> None:
    """Raise nprobe until these users have the target, too: what is compared is compared at equal recall."""
    while index.nprobe < index.nlist and _reached(index, index.nprobe, users, exact) < TARGET:
        index.nprobe += 1


def _reached(index: Any, nprobe: int, users: np.ndarray, exact: np.ndarray) -> float:
    index.nprobe = nprobe
    return recall(index.search(users, K)[1], exact)


class Kept:
    """What takes long to make, made once and kept in a folder, so that a benchmark may be spread over several calls."""

    def __init__(self, folder: Path, num_items: int) -> None:
        self.folder = folder / f"{num_items}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            np.save(path, make())
        return np.load(path)

    def stock(self, factory: str, make: Callable[[], tuple[Any, float]]) -> tuple[Any, float, int]:
        """The index with its nprobe, CPU seconds of building and tuning it, bytes."""
        path, facts = self.folder / f"{factory}.faiss", self.folder / f"{factory}.json"
        if not facts.exists():
            index, built = make()
            faiss.write_index(index, str(path))
            facts.write_text(json.dumps({"nprobe": index.nprobe, "built": built}))
        index, known = faiss.read_index(str(path)), json.loads(facts.read_text())
        index.nprobe = known["nprobe"]
        return index, known["built"], path.stat().st_size

    def ours(self, name: str, make: Callable[[], ItemIndex]) -> tuple[ItemIndex, float]:
        """The index and the CPU seconds of building and tuning it."""
        facts = self.folder / f"{name}.json"
        if not facts.exists():
            started = time.process_time()
            index = make()
            facts.write_text(json.dumps(time.process_time() - started))
            ids = pa.array(np.arange(len(index)))
            index.save(self.folder / name, model_version="m", item_ids=ids, similarity="cosine")
        return ItemIndex.load(self.folder / name, device="cpu"), json.loads(facts.read_text())


def against_stock(
    num_items: int, rounds: int, folder: Path, latencies: list[str], codes_of_stock: list[str], make_only: bool
) -> dict[str, float]:
    kept = Kept(folder, num_items)
    items = kept.array("items", lambda: trained_like(num_items, 4096 + 2048)[0])
    users = kept.array("users", lambda: trained_like(num_items, 4096 + 2048)[1])
    config = IndexConfig(k=K, target_recall=TARGET, device="cpu")
    tune_users, users = users[:4096], users[4096:]
    exact = kept.array("exact", lambda: exact_search(items, users, K, device="cpu")[1])
    tune_exact = kept.array("tune_exact", lambda: exact_search(items, tune_users[1365:2730], K, device="cpu")[1])

    flat = faiss.IndexFlatIP(items.shape[1])
    flat.add(items)
    contenders = {
        "exact, stock": (stock_search(flat), 0.0, items.nbytes),
        "exact, ours": (lambda user: exact_search(items, user, K, device="cpu"), 0.0, items.nbytes),
    }
    ours = {}
    for latency in latencies:
        asked = config.model_copy(update={"latency": latency})
        index, built = kept.ours(latency, lambda asked=asked: build_index(items, tune_users, asked))
        ours[latency] = index
        report = index.report
        contenders[f"ours, {latency}: {report.kind}"] = (
            lambda user, index=index: index.search(user, K), built, report.bytes
        )  # fmt: skip
    stock_names = []
    for lists in STOCK_LISTS.get(num_items, (int(np.sqrt(num_items)), int(2 * np.sqrt(num_items)))):
        for codes in codes_of_stock:
            factory = f"IVF{lists},{codes}"
            stock, built, num_bytes = kept.stock(
                factory,
                lambda factory=factory: tuned_stock(items, tune_users[1365:2730], tune_exact, factory),
            )
            raise_to_target(stock, users, exact)
            name = f"stock {factory}, nprobe {stock.nprobe}"
            contenders[name] = (stock_search(stock), built, num_bytes)
            stock_names += [name] if codes == "Flat" else []
    if make_only:
        return {}
    print(f"\n{num_items:,} x {items.shape[1]}, recall of the best {K} on {len(users):,} held-out users")
    print(
        f"{'':<44}{'recall@10':>10}{'@100':>8}{'CPU s':>9}{'MB':>7}"
        f"{'q/s b1':>9}{'b32':>8}{'b1024':>8}{'p50 µs':>8}{'p99 µs':>8}"
    )
    rate: dict[int, dict[str, float]] = {}
    for batch, asked in ((1, 256), (32, 512), (1024, 1024)):
        some = {name: call for name, call in contenders.items() if not (name.startswith("exact") and batch == 1024)}
        few = min(asked, 64) if num_items > 200_000 else asked
        calls = {
            name: one_by_one(search, users[: few if name.startswith("exact") else asked], batch)
            for name, (search, _, _) in some.items()
        }
        seconds = in_turn(calls, rounds)
        rate[batch] = {name: (few if name.startswith("exact") else asked) / second for name, second in seconds.items()}
    for name, (search, built, num_bytes) in contenders.items():
        asked = users if not name.startswith("exact") else users[:64]
        found = search(asked)[1]
        p50, p99 = latencies_us(search, asked[:512])
        at_10 = recall(found[:, :10], exact[: len(asked), :10])
        print(
            f"{name:<44}{at_10:>10.4f}{recall(found, exact[: len(asked)]):>8.4f}{built:>9.1f}{num_bytes / 1e6:>7.1f}"
            f"{rate[1][name]:>9,.0f}{rate[32][name]:>8,.0f}{rate[1024].get(name, 0):>8,.0f}{p50:>8,.0f}{p99:>8,.0f}",
            flush=True,
        )
    default = next(name for name in contenders if name.startswith("ours, online"))
    best = {batch: max(rate[batch][name] for name in stock_names) for batch in (1, 1024)}
    return {
        "exact_b32_vs_stock": rate[32]["exact, ours"] / rate[32]["exact, stock"],
        "index_b1_vs_stock": rate[1][default] / best[1],
        "index_b1024_vs_stock": rate[1024][default] / best[1024],
        "index_bytes_vs_stock": contenders[default][2] / min(contenders[name][2] for name in stock_names),
        "index_recall": recall(ours["online"].search(users, K)[1], exact),
        "stock_recall": min(recall(contenders[name][0](users)[1], exact) for name in stock_names),
        "build_cpu_s": contenders[default][1],
        "build_vs_stock": contenders[default][1] / min(contenders[name][1] for name in stock_names),
        **filtered(items, users[:200], ours["online"], rounds),
    }


def filtered(items: np.ndarray, users: np.ndarray, index: ItemIndex, rounds: int) -> dict[str, float]:
    """Searches among some of the items, by each way and as the index chooses."""
    rng = np.random.default_rng(1)
    worst, least, short = 0.0, 1.0, 0
    print(f"\n{'allowed':>8}{'chosen':>10}{'recall':>8}{'exact µs':>10}{'selector':>10}{'overfetch':>10}{'chosen':>10}")
    for share in (0.01, 0.1, 0.5, 0.99):
        mask = rng.random(len(items)) < share
        rows = np.flatnonzero(mask)
        truth = rows[exact_search(items[rows], users, K, device="cpu")[1]]
        ways = {way: index.allow(mask, way) for way in ("exact", "selector", "overfetch")}
        ways["chosen"] = index.allow(mask)
        calls = {}
        for way, allowed in ways.items():
            asked = users[: 8 if way == "exact" and share > 0.2 else 32]
            calls[way] = one_by_one(lambda user, allowed=allowed: index.search(user, K, allowed=allowed), asked, 1)
        seconds = in_turn(calls, rounds)
        each = {way: second / (8 if way == "exact" and share > 0.2 else 32) for way, second in seconds.items()}
        found = index.search(users, K, allowed=ways["chosen"])[1]
        best = min(each[way] for way in ("exact", "selector", "overfetch"))
        worst = max(worst, each["chosen"] / best)
        least = min(least, recall(found, truth))
        short = max(short, int((found < 0).sum()))
        print(
            f"{share:>8.0%}{index.way_of(ways['chosen'], K):>10}{recall(found, truth):>8.4f}"
            + "".join(f"{each[way] * 1e6:>10,.0f}" for way in ("exact", "selector", "overfetch", "chosen")),
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


# ---------------------------------------------------------------- a run's own vectors


def of_run(run: Path) -> dict[str, float]:
    """Shares scanned for held-out users of a run's export."""
    exported = read_export(run / "export")
    items = np.ascontiguousarray(exported.item_ID)
    users = exported.user_QD[np.random.default_rng(1).permutation(len(exported.user_QD))]
    known, held_out = users[: len(users) - 2048], users[len(users) - 2048 :]
    index = build_index(items, known, IndexConfig(k=K, target_recall=TARGET, device="cpu"))
    report = index.report
    tune = known[:1365]
    stock, _ = tuned_stock(items, tune, exact_search(items, tune, K)[1], f"IVF{report.lists},Flat")
    exact = exact_search(items, held_out, K)[1]
    answers = {"ours": index.search(held_out, K)[1]}
    faiss.cvar.indexIVF_stats.reset()
    answers["stock"] = stock_search(stock)(held_out)[1]
    stock_share = faiss.cvar.indexIVF_stats.ndis / len(held_out) / len(items)
    shares = {"ours": float(index.scanned(held_out, K).mean()), "stock": stock_share}
    for name, found in answers.items():
        print(f"{run.name}, {name}: recall@{K} {recall(found, exact):.4f} scanning {shares[name]:.4f} of the items")
    return {"scan_vs_stock": shares["ours"] / shares["stock"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="*", default=[41_000, 1_000_000])
    parser.add_argument("--run", type=Path, help="a run folder with an export")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--latencies", nargs="+", default=["online", "batch"], help="which of ours; online is the default"
    )
    parser.add_argument("--codes", nargs="+", default=["Flat", "SQfp16"], help="which of stock")
    parser.add_argument("--folder", type=Path, help="keep vectors and indexes here, and take those that are there")
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
    if options.run is not None:
        figures |= of_run(options.run)
    for num_items in sorted(options.items):
        with tempfile.TemporaryDirectory() as temporary:
            kept = options.folder or Path(temporary)
            figures |= against_stock(
                num_items, options.rounds, kept, options.latencies, options.codes, options.make_only
            )
            if not (options.make_only or options.without_building):
                figures |= building(num_items, options.rounds, Path(temporary))
    print("\n" + "\n".join(f"{name:<24}{value:>10.4f}" for name, value in figures.items()))
    write_figures(options.json, figures)


if __name__ == "__main__":
    # numpy's and torch's threads follow the environment, which must be set before they are loaded
    wanted = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()) and "--threads" not in sys.argv:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    main()
