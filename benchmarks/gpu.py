"""What a GPU makes of a training step, of the loss and of the index: one script for a machine without internet.

    python benchmarks/gpu.py [--quick] [--only NAME ...] [--json FILE]

Parts, each under a minute and guarded (one that fails is reported, the others go on). Times are medians of steps with
the device synchronised around them. Without a GPU, or with --quick, sizes are small, and the figures only show that it
runs.

ceilings    copy_bytes_per_s (read and written), bf16_flops, fp32_flops: what the device gives to the plainest code
step        step_s and rows_per_s over batch (4k to 64k), dim (64 to 256), rows of the user table (1 M to 200 M),
            kernel (fused, fused_uvm_caching) and precision: step_s[batch=65536] and so on, one change at a time
tables      table_forward_share and table_backward_share: bytes that look-up and update must move, per second, as a
            share of copy_bytes_per_s
towers      towers_share: products of forward and backward of both towers in bf16, as a share of bf16_flops
overlap     not_overlapped_share: of the steps' time with batches from Parquet, that in which the device runs nothing
            (by torch's profiler); waiting_share: that the host waits for its reader
loss        loss_time_N and loss_memory_N: softmax in blocks against the whole matrix, time and peak memory, per N rows;
            loss_s[cells=2^K]: seconds by the size of a block, to choose BLOCK_CELLS by
faiss       faiss_build_s, faiss_queries_per_s, faiss_recall at nprobe 32, over a generated million vectors
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading import batches_of, config_of, generate
from losses import contender, vectors, whole_matrix
from machine import headline, write_figures

from trec_twotower.model.losses import chunked as blocks

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; what happens without a GPU in any case")
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--keep", type=Path, help="where the log goes and stays (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    options = parser.parse_args()
    print(headline(), flush=True)
    print(torch.cuda.get_device_name() if HAS_GPU else "no GPU: small sizes", flush=True)
    quick = options.quick or not HAS_GPU
    figures: dict[str, float | int | None] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve() / ("log-quick" if quick else "log-gpu")
        if not folder.exists():
            generate(folder, 40_000 if quick else 1_000_000)
        for name in options.only or PARTS:
            figures |= guarded(name, folder, quick)
            write_figures(options.json, figures)


def guarded(name: str, folder: Path, quick: bool) -> Figures:
    started = time.perf_counter()
    try:
        found = PARTS[name](folder, quick)
    except Exception:
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        return {f"{name}_failed": 1.0}
    for key, value in found.items():
        print(f"{key:<44}{value:>20,.6g}", flush=True)
    print(f"  ({name}: {time.perf_counter() - started:.0f} s)", flush=True)
    return found


def synchronised() -> float:
    if HAS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_s(work: Callable[[], Any], rounds: int = 9) -> float:
    for _ in range(3):
        work()
    took = []
    for _ in range(rounds):
        started = synchronised()
        work()
        took.append(synchronised() - started)
    return statistics.median(took)


def ceilings(folder: Path, quick: bool) -> Figures:
    size = 1024 if quick else 8192
    source = torch.ones((16 << 20) if quick else (1 << 30), dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    found = {"copy_bytes_per_s": 2 * source.nbytes / median_s(lambda one=source, other=target: other.copy_(one))}
    del source, target
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in (("bf16_flops", torch.bfloat16), ("fp32_flops", torch.float32)):
        one, two = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
        found[name] = 2 * size**3 / median_s(lambda a=one, b=two: a @ b)
    return found


def job(folder: Path, *, batch: int = 4096, dim: int = 64, users: int = 1_000_000, kernel: str = "fused",
        precision: str = "fp32") -> tuple[Any, Any, list[Any]]:  # fmt: skip
    """A model, its optimizer, and some batches on the device."""
    from trec_twotower.config.base import validate
    from trec_twotower.training.model_builder import build_model
    from trec_twotower.training.optimizer import RunOptimizer

    values = config_of(folder).model_dump(exclude_unset=True)
    values["data"]["batch_size"] = batch
    values["train"]["precision"] = values["loss"]["precision"] = precision
    values["model"]["dim"] = dim
    for table in values["tables"].values():
        table["dim"] = dim
    values["tables"]["user"]["buckets"] = users
    if kernel != "fused":
        values["tables"]["user"] |= {"kernel": kernel, "cache_share": 0.1}
    config = validate(type(config_of(folder)), values, "benchmarks/gpu.py")
    model = build_model(config, RANKS[0])
    optimizer = RunOptimizer(model, config.train.optimizer)
    optimizer.set_rates(0, 100)
    model.train()
    made = batches_of(folder, threads=0, config=config).iter_from(0, 4)
    return model, optimizer, [each.to(DEVICE) for each in made]


def step_s(model: Any, optimizer: Any, made: list[Any]) -> float:
    number = 0

    def step() -> None:
        nonlocal number
        loss = model(made[number % len(made)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        number += 1

    return median_s(step)


def steps(folder: Path, quick: bool) -> Figures:
    grid: list[dict[str, Any]] = [{}]
    if quick:
        grid += [{"batch": 8192}, {"precision": "bf16"}]
    else:
        grid += [{"batch": size} for size in (8_192, 16_384, 32_768, 65_536)]
        grid += [{"dim": dim} for dim in (128, 256)]
        grid += [{"users": users} for users in (20_000_000, 200_000_000)]
        grid += [{"kernel": "fused_uvm_caching"}, {"precision": "bf16"}, {"precision": "bf16", "batch": 65_536}]
    found = {}
    for change in grid:
        name = ",".join(f"{key}={value}" for key, value in change.items()) or "usual"
        try:
            model, optimizer, made = job(folder, **change)
            took = step_s(model, optimizer, made)
            found[f"step_s[{name}]"] = took
            found[f"rows_per_s[{name}]"] = made[0].num_rows_of_all_ranks / took
        except Exception as error:
            print(f"step[{name}] failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        finally:
            model = optimizer = made = None
            free()
    return found


def free() -> None:
    """Give back what no one holds: sharded models are rings of references, and the next may need all of the memory."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()


def tables(folder: Path, quick: bool) -> Figures:
    """Look-up reads a row an id and writes a row a bag; its gradient reads the bags, and reads and writes each row."""
    size = {} if quick else {"batch": 65_536}
    model, _, made = job(folder, **size)
    batch, collection = made[0], model.module.tables
    schema = model.module.schema
    distinct: dict[str, list[Any]] = {}
    ids = bags = 0
    for (_, feature), jagged in zip(schema.layout.table_pairs, batch.sparse.to_dict().values(), strict=True):
        ids += jagged.values().numel()
        bags += jagged.lengths().numel()
        distinct.setdefault(feature.table_name, []).append(jagged.values())
    rows = sum(torch.cat(values).unique().numel() for values in distinct.values())
    row_bytes = 4 * 64
    copied = ceilings(folder, quick)["copy_bytes_per_s"]
    with torch.no_grad():
        forward_s = median_s(lambda: collection(batch.sparse).values())

    def both() -> None:
        pooled = collection(batch.sparse).values()
        pooled.backward(torch.ones_like(pooled))

    backward_s = max(median_s(both) - forward_s, 1e-9)
    return {
        "table_forward_s": forward_s,
        "table_backward_s": backward_s,
        "table_forward_share": (ids + bags) * row_bytes / forward_s / copied,
        "table_backward_share": (ids + 2 * rows) * row_bytes / backward_s / copied,
    }


def towers(folder: Path, quick: bool) -> Figures:
    rows = 4096 if quick else 65_536
    model, *_ = job(folder, precision="bf16")
    pair = model.module.user_tower, model.module.item_tower
    width = [tower.layers[0].in_features for tower in pair]
    given = [torch.randn(rows, each, device=DEVICE, requires_grad=True) for each in width]
    flops = sum(6 * rows * weight.numel() for tower in pair for weight in tower.parameters() if weight.dim() == 2)

    def both() -> None:
        sum(tower(value).sum() for tower, value in zip(pair, given, strict=True)).backward()

    took = median_s(both)
    return {"towers_s": took, "towers_share": flops / took / ceilings(folder, quick)["bf16_flops"]}


def overlap(folder: Path, quick: bool) -> Figures:
    """The training loop itself, with its reader, in a process of its own."""
    from trec_twotower.config.base import as_values
    from trec_twotower.config.loading import to_yaml

    with tempfile.TemporaryDirectory() as temporary:
        path, out = Path(temporary) / "gpu.yaml", Path(temporary) / "run"
        path.write_text(to_yaml(as_values(config_of(folder))))
        words = [sys.executable, "-W", "ignore", "-m", "trec_twotower", "train", str(path), f"run_dir={out}"]
        words += [
            "train.profile_steps=20",
            "train.pipeline=sparse_dist",
            "data.batch_size=" + ("1024" if quick else "16384"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=150)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        status = json.loads((out / "status.json").read_text())
        found = {"waiting_share": status["waiting_s"] / max(status["train_s"], 1e-9)}
        events = json.loads((out / "profile/rank-0.json").read_text())["traceEvents"]
    if not HAS_GPU:
        return found
    busy = sorted((each["ts"], each["ts"] + each["dur"]) for each in events
                  if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))  # fmt: skip
    covered, end = 0.0, busy[0][0]
    for start, stop in busy:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {**found, "not_overlapped_share": 1 - covered / (end - busy[0][0])}


def loss(folder: Path, quick: bool) -> Figures:
    found = {}
    for count in (1024,) if quick else (4096, 8192, 16_384, 32_768):
        pair = [each.detach().to(DEVICE).requires_grad_() for each in vectors(count, 64)]
        took, peak = {}, {}
        for name, make in (("blocks", contender("softmax")), ("whole", whole_matrix("softmax"))):

            def one_pass(make: Callable[..., Any] = make, pair: list[Any] = pair) -> None:
                make(*pair).backward()

            if HAS_GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            with torch.device(DEVICE):
                took[name] = median_s(one_pass, 5)
            peak[name] = torch.cuda.max_memory_allocated() - before if HAS_GPU else 1
        found[f"loss_time_{count}"] = took["blocks"] / took["whole"]
        if HAS_GPU:
            found[f"loss_memory_{count}"] = peak["blocks"] / peak["whole"]
        free()
    usual = blocks.BLOCK_CELLS[DEVICE.type]
    for power in (18, 20) if quick else (22, 23, 24, 25, 26, 27):  # the last loop's largest size
        blocks.BLOCK_CELLS[DEVICE.type] = 1 << power
        with torch.device(DEVICE):
            found[f"loss_s[cells=2^{power}]"] = median_s(lambda given=pair: contender("softmax")(*given).backward(), 5)
    blocks.BLOCK_CELLS[DEVICE.type] = usual
    return found


def index(folder: Path, quick: bool) -> Figures:
    import faiss
    import numpy as np

    count, dim, lists = (20_000, 32, 64) if quick else (1_000_000, 64, 4096)
    random = np.random.default_rng(0)
    centre = random.normal(size=(lists, dim)).astype(np.float32)
    item = centre[random.integers(0, lists, count)] + 0.5 * random.normal(size=(count, dim)).astype(np.float32)
    user = item[random.integers(0, count, 10_000)] + 0.3 * random.normal(size=(10_000, dim)).astype(np.float32)
    found, exact, ivf = (
        {},
        faiss.IndexFlatIP(dim),
        faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT),
    )
    if HAS_GPU:
        if not hasattr(faiss, "StandardGpuResources"):
            raise RuntimeError("this faiss has no GPU")
        resources = faiss.StandardGpuResources()
        exact, ivf = (faiss.index_cpu_to_gpu(resources, 0, each) for each in (exact, ivf))
    exact.add(item)
    started = time.perf_counter()
    ivf.train(item)
    ivf.add(item)
    found["faiss_build_s"] = time.perf_counter() - started
    ivf.nprobe = 32
    found["faiss_queries_per_s"] = len(user) / median_s(lambda: ivf.search(user, 100), 5)
    best, near = exact.search(user, 100)[1], ivf.search(user, 100)[1]
    found["faiss_recall"] = float(np.mean([len(np.intersect1d(*pair)) / 100 for pair in zip(best, near, strict=True)]))
    return found


PARTS: dict[str, Callable[[Path, bool], Figures]] = {
    "ceilings": ceilings,
    "step": steps,
    "tables": tables,
    "towers": towers,
    "overlap": overlap,
    "loss": loss,
    "faiss": index,
}
RANKS: list[Any] = []


if __name__ == "__main__":
    from trec_twotower.distributed.ranks import start_ranks

    with start_ranks(threads=1) as ranks:
        RANKS.append(ranks)
        main()
