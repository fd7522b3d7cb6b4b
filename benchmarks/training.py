"""How fast a step is: against other ways to write it, against the machine's floor, and from Parquet to weights.

    python benchmarks/training.py [--rows 2000000] [--batches 62] [--rounds 3] [--json FILE] [--tfrs-python PATH]
                                  [--only step e2e threads ranks large_ranks]

The log of benchmarks/loading.py: tables of 1 M users and 200,000 items at dim 64, towers 128-64, batch 4096, three
lists in the user tower, the item's category, tags and price in the other. Every contender runs in a process of its own
on one core, in turn, with its batches made beforehand; medians of the rounds count. `_tuned` is with the malloc
settings of launch/torchrun.sh, the others with glibc's own.

ours                    this package as it comes: distinct candidates, softmax in blocks, logQ, duplicates masked; bf16
                        products where the processor has them (`precision: auto`), logits and weights float32
ours_fp32               the same with float32 products
torchrec_naive          the same tables, fused in TorchRec, and towers; an item a row, softmax over the whole matrix
plain_torch             nn.EmbeddingBag(sparse=True) under torch.optim.Adagrad, the same softmax
tfrs                    TensorFlow Recommenders, where --tfrs-python names an interpreter that has it (training_tfrs.py)
notebook                from Parquet by a Dataset row by row; Adam, dense gradients; BCE, four sampled items a row

step_vs_torchrec_naive  its step's time over ours; step_vs_torchrec_naive_tuned with tuned malloc for both
step_fp32_vs_...        the same of ours_fp32
step_vs_plain_torch     likewise; step_vs_tfrs against TensorFlow Recommenders, default malloc
e2e_vs_notebook         rows per second from Parquet, ours over the notebook's
e2e_vs_step             rows per second from Parquet over those with batches made beforehand, both tuned
step_over_floor         our float32 step over the machine's floor: its products at the measured rate of large ones, and
                        every table row gathered, pooled and updated once at the measured rates
threads_2_vs_1          rows per second of `train` on one rank with two threads and two cores, over one thread, one core
ranks_2_vs_1            rows per second of `train` on two ranks and two cores, over one rank on one core; with --only
                        large_ranks ranks_2_vs_1_16384, at a batch of 16,384
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loading import COLUMNS, ROOT, batches_of, config_of, generate
from machine import headline, write_figures

BATCH, DIM, HIDDEN, COUNTRY_ROWS = 4096, 64, 128, 1_000  # as config_of says
TUNED = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
LARGE = 16_384  # a batch that the same two ranks share
PARTS = ("step", "e2e", "threads", "ranks", "large_ranks")  # by default all but the last
WARM = 6
NOTEBOOK_STEPS, NOTEBOOK_NEGATIVES = 4, 4
Step = Callable[[int], None]


def ours(folder: Path, num_batches: int, precision: str = "auto") -> Step:
    """Steps of the training loop on batches made beforehand."""
    from trec_twotower.config.base import validate
    from trec_twotower.data.loading.batch import Batch
    from trec_twotower.training.model_builder import build_model
    from trec_twotower.training.optimizer import RunOptimizer
    from trec_twotower.training.pipeline import PlainPipeline

    config, ranks = config_of(folder), lone_rank()
    values = config.model_dump(exclude_unset=True)
    values["loss"]["precision"] = values["train"]["precision"] = precision
    config = validate(type(config), values, "benchmarks/training.py")
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    optimizer.set_rates(0, num_batches)
    steps = PlainPipeline(optimizer, ranks)
    made = list(batches_of(folder, threads=0).iter_from(0, num_batches))

    def forward(batch: Batch) -> Any:
        return model(batch)

    def step(number: int) -> None:
        next(steps.run(iter([made[number]]), forward))

    model.train()
    return step


def torchrec_naive(folder: Path, num_batches: int) -> Step:
    """The usual TorchRec two-tower: pooled tables into two MLPs, each row's item, softmax over all of the batch."""
    import torch
    import torch.nn.functional as F

    from trec_twotower.model.embeddings import build_embedding_bag_collection
    from trec_twotower.training.optimizer import RunOptimizer, fuse_table_updates
    from trec_twotower.training.sharding import shard

    config, ranks = config_of(folder), lone_rank()
    schema = config.feature_schema

    class Naive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables, self.lists = build_embedding_bag_collection(schema), None
            self.user, self.item = mlp(schema.layout.input_width("user")), mlp(schema.layout.input_width("item"))

        def forward(self, sparse: Any, user_number: Any, item_number: Any) -> Any:
            pooled = self.tables(sparse).to_dict()
            sides = {side: [value for name, value in pooled.items() if name.startswith(side)]
                     for side in ("user", "item")}  # fmt: skip
            user = F.normalize(self.user(torch.cat([*sides["user"], user_number], 1)), dim=1)
            item = F.normalize(self.item(torch.cat([*sides["item"], item_number], 1)), dim=1)
            return F.cross_entropy(user @ item.T / 0.1, torch.arange(len(user)))

    model = Naive()
    fuse_table_updates(model, config.train.optimizer)
    sharded = shard(model, schema, ranks, BATCH)
    optimizer = RunOptimizer(sharded, config.train.optimizer)
    made = [an_item_a_row(batch) for batch in batches_of(folder, threads=0).iter_from(0, num_batches)]

    def step(number: int) -> None:
        loss = sharded(*made[number])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain_torch(folder: Path, num_batches: int) -> Step:
    """The same without TorchRec."""
    import torch
    import torch.nn.functional as F

    schema = config_of(folder).feature_schema
    tables = torch.nn.ModuleDict({
        name: torch.nn.EmbeddingBag(spec.buckets, spec.dim, mode="sum", sparse=True, include_last_offset=True)
        for name, spec in schema.tables.items()
    })  # fmt: skip
    table_of = {f"{side}:{feature.name}": feature.table_name for side, feature in schema.layout.table_pairs}
    user_tower, item_tower = mlp(schema.layout.input_width("user")), mlp(schema.layout.input_width("item"))
    sparse = torch.optim.Adagrad(tables.parameters(), lr=0.05)
    dense = torch.optim.Adam([*user_tower.parameters(), *item_tower.parameters()], lr=1e-3)
    made = [an_item_a_row(batch) for batch in batches_of(folder, threads=0).iter_from(0, num_batches)]

    def step(number: int) -> None:
        ids, user_number, item_number = made[number]
        sides: dict[str, list[Any]] = {"user": [], "item": []}
        for name, jagged in ids.to_dict().items():
            sides[name[:4]].append(tables[table_of[name]](jagged.values(), jagged.offsets()))
        user = F.normalize(user_tower(torch.cat([*sides["user"], user_number], 1)), dim=1)
        item = F.normalize(item_tower(torch.cat([*sides["item"], item_number], 1)), dim=1)
        loss = F.cross_entropy(user @ item.T / 0.1, torch.arange(len(user)))
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()

    return step


def ours_fp32(folder: Path, num_batches: int) -> Step:
    """Whatever the processor has."""
    return ours(folder, num_batches, "fp32")


STEPS: dict[str, Callable[[Path, int], Step]] = {
    "ours": ours,
    "ours_fp32": ours_fp32,
    "torchrec_naive": torchrec_naive,
    "plain_torch": plain_torch,
}


def lone_rank() -> Any:
    """One rank; its process group lives as long as the process."""
    from trec_twotower.distributed.ranks import start_ranks

    lone_rank.context = start_ranks(threads=1)  # type: ignore[attr-defined]
    return lone_rank.context.__enter__()  # type: ignore[attr-defined]


def mlp(width: int) -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))


def an_item_a_row(batch: Any) -> tuple[Any, Any, Any]:
    """A batch as others make it: the item of row b stands in row b, however often it comes."""
    import torch
    from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

    column = batch.targets.positive.column_P
    assert torch.equal(batch.targets.positive.row_P, torch.arange(len(column)).to(batch.targets.positive.row_P.dtype))
    parts = {}
    for name, jagged in batch.sparse.to_dict().items():
        lengths, values = jagged.lengths()[: len(column)], jagged.values()
        if name.startswith("item:"):
            ends = jagged.lengths().cumsum(0)
            bags = [values[ends[row] - jagged.lengths()[row] : ends[row]] for row in column.tolist()]
            lengths, values = jagged.lengths()[column], torch.cat(bags)
        parts[name] = JaggedTensor(values=values, lengths=lengths)
    return KeyedJaggedTensor.from_jt_dict(parts), batch.user_number_BN, batch.item_number_SN[column]


def tfrs_step(interpreter: Path, folder: Path, place: Path, num_batches: int) -> float:
    """Seconds of TensorFlow Recommenders' step, on the batches as files."""
    import numpy as np

    files = place / "tfrs"
    if not files.exists():
        schema = config_of(folder).feature_schema
        files.mkdir()
        facts = {
            "tables": [(name, spec.buckets, spec.dim) for name, spec in schema.tables.items()],
            "keys": [(f"{side}:{feature.name}", feature.table_name) for side, feature in schema.layout.table_pairs],
            "hidden": HIDDEN,
            "dim": DIM,
        }
        (files / "facts.json").write_text(json.dumps(facts))
        for number, batch in enumerate(batches_of(folder, threads=0).iter_from(0, num_batches)):
            ids, user, item = an_item_a_row(batch)
            arrays = {"user": user.numpy(), "item": item.numpy()}
            for name, jagged in ids.to_dict().items():
                arrays |= {f"{name}/values": jagged.values().long().numpy(),
                           f"{name}/offsets": jagged.offsets().long().numpy()}  # fmt: skip
            np.savez(files / f"{number:04d}.npz", **arrays)
    words = [str(interpreter), "-W", "ignore", str(ROOT / "benchmarks/training_tfrs.py"), str(files), str(WARM)]
    return on_one_core(words, tuned=False)["step_s"]


def end_to_end(folder: Path, num_batches: int) -> float:
    """Rows per second from Parquet, the reader's thread on the same core."""
    from trec_twotower.training.model_builder import build_model
    from trec_twotower.training.optimizer import RunOptimizer
    from trec_twotower.training.pipeline import PlainPipeline

    config, ranks = config_of(folder), lone_rank()
    model = build_model(config, ranks)
    optimizer = RunOptimizer(model, config.train.optimizer)
    optimizer.set_rates(0, num_batches)
    model.train()
    took = PlainPipeline(optimizer, ranks).run(batches_of(folder, threads=1).iter_from(0, num_batches + WARM), model)
    for _ in range(WARM):
        next(took)
    started = time.perf_counter()
    rows = sum(batch.num_rows_of_all_ranks for batch in took)
    return rows / (time.perf_counter() - started)


def notebook(folder: Path) -> float:
    """Rows per second of the usual first try, equal tables and batch."""
    import pyarrow.parquet as pq
    import torch
    import torch.nn.functional as F
    import xxhash
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as TorchDataset

    schema = config_of(folder).feature_schema
    sizes = {name: spec.buckets for name, spec in schema.tables.items()}

    class Rows(TorchDataset):
        def __init__(self, num_rows: int) -> None:
            table = pq.read_table(folder / "train/part-00000.parquet", columns=COLUMNS)
            self.rows = table.slice(0, num_rows).to_pylist()

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> dict[str, Any]:
            row = self.rows[number]
            return {
                "user": hash(row["user_id"]) % sizes["user"],
                "item": hash(row["item_id"]) % sizes["item"],
                "country": xxhash.xxh3_64_intdigest(row["country"].encode()) % COUNTRY_ROWS,
                "age": row["age"] or 0.0,
                "history": [hash(item) % sizes["item"] for item in row["history"]],
                "category": [hash(item) % sizes["category"] for item in row["history_categories"]],
                "tag": [xxhash.xxh3_64_intdigest(word.encode()) % sizes["tag"] for word in row["interests"]],
            }

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name, value in rows[0].items():
            column = [row[name] for row in rows]
            if isinstance(value, list):
                batch[name] = torch.tensor([each for row in column for each in row], dtype=torch.int64)
                batch[name + "_offsets"] = torch.tensor([0, *(len(row) for row in column)]).cumsum(0)
            else:
                batch[name] = torch.tensor(column)
        return batch

    users, country = torch.nn.Embedding(sizes["user"], DIM), torch.nn.Embedding(COUNTRY_ROWS, DIM)
    items, categories, tags = (
        torch.nn.EmbeddingBag(sizes[name], DIM, mode="sum", include_last_offset=True)
        for name in ("item", "category", "tag")
    )
    bags = {"category": categories, "tag": tags}
    user_tower, item_tower = mlp(5 * DIM + 1), mlp(DIM)
    modules = torch.nn.ModuleList([users, items, country, *bags.values(), user_tower, item_tower])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-3)
    loader = DataLoader(Rows(BATCH * NOTEBOOK_STEPS), BATCH, shuffle=True, collate_fn=collate)
    seconds = []
    batches = iter(loader)
    for _ in range(NOTEBOOK_STEPS):
        started = time.perf_counter()
        batch = next(batches)
        lists = [items(batch["history"], batch["history_offsets"])]
        lists += [bags[name](batch[name], batch[name + "_offsets"]) for name in bags]
        user = [users(batch["user"]), country(batch["country"]), *lists, batch["age"][:, None].float()]
        user_BD = user_tower(torch.cat(user, 1))
        drawn = torch.randint(sizes["item"], (len(user_BD), NOTEBOOK_NEGATIVES))
        candidate = torch.cat([batch["item"][:, None], drawn], 1)
        item_BCD = item_tower(F.embedding(candidate, items.weight))
        score = (user_BD[:, None] * item_BCD).sum(2)
        label = torch.zeros_like(score)
        label[:, 0] = 1
        loss = F.binary_cross_entropy_with_logits(score, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return BATCH / statistics.median(seconds[1:])  # the first step makes Adam's state


def floor(folder: Path) -> dict[str, float]:
    """Seconds that a step cannot do without on this core, by part."""
    import torch

    def best(work: Callable[[], Any]) -> float:
        work()
        took = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            took.append(time.perf_counter() - started)
        return min(took)

    size = 1536
    one, two, out = (torch.randn(size, size) for _ in range(3))
    per_flop = best(lambda: torch.mm(one, two, out=out)) / (2 * size**3)
    block = torch.full((256, 4096), 0.1)
    per_exp = best(lambda: torch.exp(block, out=torch.empty_like(block))) / block.numel()

    config = config_of(folder)
    schema = config.feature_schema
    batch = next(batches_of(folder, threads=0).iter_from(0, 1))
    rows, candidates = len(batch.user_number_BN), len(batch.item_number_SN)
    width = {side: schema.layout.input_width(side) for side in ("user", "item")}
    tower = 6 * (rows * (width["user"] * HIDDEN + HIDDEN * DIM) + candidates * (width["item"] * HIDDEN + HIDDEN * DIM))
    products = tower + 6 * rows * candidates * DIM
    tables = 0.0
    used: dict[str, list[Any]] = {}
    for (_, feature), jagged in zip(schema.layout.table_pairs, batch.sparse.to_dict().values(), strict=True):
        used.setdefault(feature.table_name, []).append((jagged.values().long(), jagged.offsets().long()))
    for name, lookups in used.items():
        weight = torch.randn(schema.tables[name].buckets, DIM)
        for ids, offsets in lookups:
            pool = best(
                lambda w=weight, i=ids, o=offsets: torch.nn.functional.embedding_bag(
                    i, w, o, mode="sum", include_last_offset=True
                )
            )
            tables += 2 * pool  # forward, and the gradient spread over the same ids
        distinct = torch.cat([ids for ids, _ in lookups]).unique()
        distinct = distinct[torch.randperm(len(distinct))]
        change = torch.randn(len(distinct), DIM)
        tables += best(lambda w=weight, d=distinct, c=change: w.index_add_(0, d, c))
    parts = {"products_s": products * per_flop, "exp_s": rows * candidates * per_exp, "tables_s": tables}
    return {"floor_s": sum(parts.values()), **parts}


def inside(what: str, folder: Path, num_batches: int) -> dict[str, float]:
    """What one process measures, on its core."""
    import torch

    torch.set_num_threads(1)
    if what == "notebook":
        return {"rows_per_s": notebook(folder)}
    if what == "end_to_end":
        return {"rows_per_s": end_to_end(folder, num_batches)}
    if what == "floor":
        return floor(folder)
    step = STEPS[what](folder, num_batches)
    for number in range(WARM):
        step(number)
    started = time.perf_counter()
    for number in range(num_batches):
        step(number)
    return {"step_s": (time.perf_counter() - started) / num_batches}


def alone(what: str, folder: Path, num_batches: int, *, tuned: bool) -> dict[str, float]:
    """`inside` in a process of its own, on one core."""
    words = [sys.executable, "-W", "ignore", __file__, "--inside", what, "--keep", str(folder)]
    return on_one_core([*words, "--batches", str(num_batches)], tuned=tuned)


def on_one_core(words: list[str], *, tuned: bool) -> dict[str, float]:
    """The figures that a process prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": TUNED if tuned else ""}
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def train_rate(folder: Path, num_ranks: int, num_threads: int, place: Path, batch: int) -> float:
    """Return rows per second of `train` in its steady state, one core per thread; a log line covers 81,920 rows."""
    from trec_twotower.config.base import as_values
    from trec_twotower.config.loading import to_yaml

    path, out = place / "training.yaml", place / f"ranks-{num_ranks}-{num_threads}-{time.monotonic_ns()}"
    path.write_text(to_yaml(as_values(config_of(folder, batch_size=batch))))
    words = [ROOT / "launch/torchrun.sh", "--ranks", num_ranks, "train", path, f"run_dir={out}"]
    words.append(f"train.log_every={20 * BATCH // batch}")
    cores = sorted(os.sched_getaffinity(0))[: num_ranks * num_threads]
    subprocess.run(
        [str(word) for word in words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(num_threads)}, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["rows_per_s"] for line in logged if "rows_per_s" in line][1:])


def rounds(work: Callable[[], Iterator[tuple[str, float]]], count: int) -> dict[str, float]:
    """The median of each figure over so many rounds, in which all contenders take their turn."""
    found: dict[str, list[float]] = {}
    for _ in range(count):
        for name, value in work():
            found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(folder: Path, place: Path, options: argparse.Namespace, parts: Sequence[str]) -> dict[str, float]:
    def step_times() -> Iterator[tuple[str, float]]:
        for tuned in (False, True):
            for name in STEPS:
                taken = alone(name, folder, options.batches, tuned=tuned)
                yield name + "_step_s" + ("_tuned" if tuned else ""), taken["step_s"]
        if options.tfrs_python is not None:
            yield "tfrs_step_s", tfrs_step(options.tfrs_python, folder, place, options.batches)
        for name, value in alone("floor", folder, options.batches, tuned=True).items():
            yield name, value

    def from_parquet() -> Iterator[tuple[str, float]]:
        yield "e2e_rows_per_s", alone("end_to_end", folder, options.batches, tuned=True)["rows_per_s"]
        step_s = alone("ours", folder, options.batches, tuned=True)["step_s"]
        yield "step_rows_per_s", BATCH / step_s
        yield "notebook_rows_per_s", alone("notebook", folder, options.batches, tuned=False)["rows_per_s"]

    def over_ranks(batch: int) -> Iterator[tuple[str, float]]:
        for count in (1, 2):
            yield f"ranks_{count}_rows_per_s", train_rate(folder, count, 1, place, batch)

    def over_threads() -> Iterator[tuple[str, float]]:
        for count in (1, 2):
            yield f"threads_{count}_rows_per_s", train_rate(folder, 1, count, place, BATCH)

    figures: dict[str, float] = {}
    if "step" in parts:
        figures |= rounds(step_times, options.rounds)
        for word, name in (("", "ours"), ("_fp32", "ours_fp32")):
            for suffix in ("", "_tuned"):
                naive_s = figures[f"torchrec_naive_step_s{suffix}"]
                figures[f"step{word}_vs_torchrec_naive{suffix}"] = naive_s / figures[f"{name}_step_s{suffix}"]
        figures["step_vs_plain_torch"] = figures["plain_torch_step_s"] / figures["ours_step_s"]
        if "tfrs_step_s" in figures:
            figures["step_vs_tfrs"] = figures["tfrs_step_s"] / figures["ours_step_s"]
        figures["step_over_floor"] = figures["ours_fp32_step_s_tuned"] / figures["floor_s"]
    if "e2e" in parts:
        figures |= rounds(from_parquet, options.rounds)
        figures["e2e_vs_notebook"] = figures["e2e_rows_per_s"] / figures["notebook_rows_per_s"]
        figures["e2e_vs_step"] = figures["e2e_rows_per_s"] / figures["step_rows_per_s"]
    if "threads" in parts:
        figures |= rounds(over_threads, options.rounds)
        figures["threads_2_vs_1"] = figures["threads_2_rows_per_s"] / figures["threads_1_rows_per_s"]
    for part, batch, word in (("ranks", BATCH, ""), ("large_ranks", LARGE, f"_{LARGE}")):
        if part in parts:
            found = rounds(partial(over_ranks, batch), options.rounds)
            figures |= {name + word: value for name, value in found.items()}
            figures["ranks_2_vs_1" + word] = found["ranks_2_rows_per_s"] / found["ranks_1_rows_per_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batches", type=int, default=62)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where the files go and stay (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--tfrs-python", type=Path, help="an interpreter that has tensorflow-recommenders")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.inside, options.keep, options.batches)))
        return
    print(headline(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = ((options.keep or Path(temporary)) / f"log-{options.rows}").resolve()
        if not folder.exists():
            generate(folder, options.rows)
        figures = measure(folder, Path(temporary), options, options.only or PARTS[:4])
    for name, value in figures.items():
        print(f"{name:<34}{value:>16,.5f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
