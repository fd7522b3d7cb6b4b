"""Memory and time of the losses in blocks, against the same losses by autograd over the whole matrix.

    python benchmarks/losses.py [--sizes 4096 8192 16384] [--json FILE] [--only memory large time]

As many candidates as rows, dim 64, one positive a row, unit vectors, one thread. Memory is the growth of the peak
resident set over one forward and backward pass, each in a process of its own after a small pass to warm up, with malloc
told to give freed blocks back (else it keeps some by chance, up to 12 MiB here). For time, the contenders take turns in
one process, and medians count; once with glibc's malloc as it is, and once (`_tuned`) told to keep large blocks,
without
which the whole matrix pays for fresh pages at every step.

loss_memory_N           softmax against the whole matrix at N rows; KIND_memory_N for the other losses
loss_65536_peak_bytes   peak resident set of a process that computes softmax at 65,536 rows and dim 128
loss_time_N             time of softmax against the whole matrix; loss_time_N_bf16 with products in bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import headline, write_figures
from torch import Tensor

from trec_twotower.model.losses import LOSSES, Pairs, Relations

TEMPERATURE = 0.05
RETURN_BLOCKS = "glibc.malloc.mmap_threshold=65536"
KEEP_BLOCKS = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
ROUNDS = 7


def contender(kind: str, precision: str = "fp32") -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss of rows whose positives stand on the diagonal, in blocks."""
    parameters: dict[str, float | str] = {} if kind in ("ccl", "margin") else {"temperature": TEMPERATURE}
    if precision != "fp32":
        parameters["precision"] = precision

    def mean(user_BD: Tensor, item_CD: Tensor) -> Tensor:
        row = torch.arange(len(user_BD))
        diagonal = Pairs(row, row)
        return LOSSES[kind](user_BD, item_CD, Relations(diagonal, diagonal), **parameters) / len(user_BD)

    return mean


def whole_matrix(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same number as one would write it down."""

    def mean(user_BD: Tensor, item_CD: Tensor) -> Tensor:
        row, count = torch.arange(len(user_BD)), len(user_BD)
        score = user_BD @ item_CD.T
        own = score.diagonal()[:, None]
        is_own = torch.eye(count, dtype=torch.bool)
        if kind == "softmax":
            return F.cross_entropy(score / TEMPERATURE, row)
        if kind == "bce":
            weight = torch.where(is_own, 1.0, 1 / (count - 1))
            cost = F.binary_cross_entropy_with_logits(score / TEMPERATURE, is_own.float(), weight, reduction="sum")
            return cost / count
        if kind == "bsl":
            logit = score / TEMPERATURE
            return (logit.masked_fill(is_own, float("-inf")).logsumexp(1) - logit.diagonal()).mean()
        if kind == "ccl":
            negative = (score - 0.8).relu().masked_fill(is_own, 0.0).sum(1) / (count - 1)
            return (1 - own[:, 0] + 150.0 * negative).mean()
        gap = score - own
        cost = F.softplus(gap / TEMPERATURE) if kind == "bpr" else (gap + 0.2).relu()
        return cost.masked_fill(is_own, 0.0).sum() / (count * (count - 1))

    return mean


KINDS = ("softmax", "bce", "bsl", "ccl", "bpr", "margin")


def vectors(count: int, dim: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    user_BD, item_CD = (F.normalize(torch.randn(count, dim), dim=1).requires_grad_() for _ in range(2))
    return user_BD, item_CD


def one_pass(loss: Callable[[Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor]) -> None:
    for each in given:
        each.grad = None
    loss(*given).backward()


def from_status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def growth(loss: Callable[[Tensor, Tensor], Tensor], count: int) -> int:
    """Bytes by which the peak resident set rises in one pass."""
    one_pass(loss, vectors(512, 64))
    given = vectors(count, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before = from_status("VmRSS")
    one_pass(loss, given)
    return from_status("VmHWM") - before


def times(count: int) -> dict[str, float]:
    """Median seconds of each contender."""
    given = vectors(count, 64)
    contenders = {
        "whole": whole_matrix("softmax"),
        "fp32": contender("softmax"),
        "bf16": contender("softmax", "bf16"),
    }
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, loss in contenders.items():
            started = time.perf_counter()
            one_pass(loss, given)
            if number:  # the first round warms up
                took[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in took.items()}


def alone(what: str, **environment: str) -> dict[str, float]:
    """What one part measures in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, "--inside", what]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=settings)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def inside(what: str) -> dict[str, float]:
    torch.set_num_threads(1)
    part, *words = what.split()
    if part == "memory":
        how, kind, count = words
        return {"bytes": growth((contender if how == "blocks" else whole_matrix)(kind), int(count))}
    if part == "large":
        one_pass(contender("softmax"), vectors(65_536, 128))
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return times(int(words[0]))


def measure(parts: list[str], sizes: list[int], kinds: list[str]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for count in sizes if "memory" in parts else []:
        for kind in kinds:
            found = {
                how: alone(f"memory {how} {kind} {count}", GLIBC_TUNABLES=RETURN_BLOCKS)["bytes"]
                for how in ("blocks", "whole")
            }
            name = f"{'loss' if kind == 'softmax' else kind}_memory_{count}"
            figures[name] = found["blocks"] / found["whole"]
            print(f"{name:<24}{figures[name]:>10.4f}   {found['blocks'] / 2**20:,.0f} MiB of", end=" ")
            print(f"{found['whole'] / 2**20:,.0f}", flush=True)
    if "large" in parts:
        figures["loss_65536_peak_bytes"] = alone("large")["bytes"]
        print(f"{'loss_65536_peak_bytes':<24}{figures['loss_65536_peak_bytes']:>14,.0f}", flush=True)
    for count in sizes if "time" in parts else []:
        for suffix, environment in (("", {}), ("_tuned", {"GLIBC_TUNABLES": KEEP_BLOCKS})):
            took = alone(f"time {count}", **environment)
            for precision, word in (("fp32", ""), ("bf16", "_bf16")):
                name = f"loss_time_{count}{word}{suffix}"
                figures[name] = took[precision] / took["whole"]
                print(f"{name:<24}{figures[name]:>10.4f}   {took[precision] * 1e3:,.0f} ms of", end=" ")
                print(f"{took['whole'] * 1e3:,.0f}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", nargs="+", choices=["memory", "large", "time"], default=["memory", "large", "time"])
    parser.add_argument("--json", type=Path, help="write the figures by name to this file")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.inside)))
        return
    print(headline(), flush=True)
    write_figures(options.json, measure(options.only, options.sizes, options.kinds))


if __name__ == "__main__":
    main()
