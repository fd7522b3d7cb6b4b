"""The ranks of a job: process group, device, and the few collectives that the rest needs."""

from __future__ import annotations

import glob
import logging
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trec_twotower.distributed.compat import cpu_supports, set_collective_timeout
from trec_twotower.distributed.signals import end_with_launcher
from trec_twotower.errors import ConfigError
from trec_twotower.storage.fault_point import fault_point

T = TypeVar("T")
Wanted = Literal["auto", "cpu", "cuda"]  # train.device


class Ranks:
    """This process among the `num_ranks` of its job; a job of one needs no torchrun."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        device: torch.device,
        timeout_s: float = 300,
        store: dist.Store | None = None,
    ) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.timeout_s = timeout_s  # for a collective, once the first step is done
        self.store = store  # where the ranks found each other
        self._has_ended = False  # the process group of `start_ranks` is gone

    def end(self) -> None:
        """Mark these ranks as gone: `check_active` raises from now on."""
        self._has_ended = True

    def check_active(self) -> None:
        """Raise ConfigError after the end of the `start_ranks` block that made these ranks."""
        if self._has_ended:
            raise ConfigError(
                "The block `with start_ranks() as ranks` that this was opened in has ended, and its process group with "
                "it: use it inside the block, or, in one process, open the run with Retriever.alone(RUN)."
            )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def precision(self, wanted: Literal["auto", "fp32", "bf16"]) -> Literal["fp32", "bf16"]:
        """Return the precision of matrix multiplications: for `auto` bf16 if it is faster on this device, else fp32.

        TREC_TWOTOWER_PRECISION in the environment overrides `auto`.
        """
        word = os.environ.get("TREC_TWOTOWER_PRECISION", "auto") if wanted == "auto" else wanted
        match word:
            case "fp32" | "bf16":
                return word
            case "auto":
                return "bf16" if _multiplies_bf16(self.device) else "fp32"
        raise ConfigError(f"TREC_TWOTOWER_PRECISION is {word!r}: set it to fp32, bf16 or auto, or unset it.")

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank and return its result on every rank; if it raises, every rank raises."""
        if self.num_ranks == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as error:  # carried to all ranks, so that none waits for the others
                outcome[1] = _able_to_travel(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's result; if any raises, all raise the first error."""
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = work()
        except Exception as error:  # carried to all ranks, so that none waits for the others
            outcome[1] = error
        errors = self.collect(None if outcome[1] is None else _able_to_travel(outcome[1]))
        for failure in errors:
            if failure is not None:
                raise failure
        return outcome[0]

    def collect(self, value: T) -> list[T]:
        """Return the `value` of every rank on every rank; it must be picklable."""
        if self.num_ranks == 1:
            return [value]
        everyone: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(everyone, value)
        return everyone

    def is_under_way(self) -> None:
        """Set the timeout of collectives to `timeout_s`, after the first step."""
        set_collective_timeout(timedelta(seconds=self.timeout_s))

    def new_group(self) -> dist.ProcessGroup:
        """Return a group of all ranks for messages between CPUs, independent of the default group."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        assert isinstance(group, dist.ProcessGroup)
        return group

    def share(self, count: int) -> slice:
        """Return this rank's range of `count` items in order; the sizes of the ranges differ by at most one."""
        return slice(count * self.rank // self.num_ranks, count * (self.rank + 1) // self.num_ranks)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the element-wise sum over ranks, in float64."""
        total = torch.from_numpy(np.asarray(values, dtype=np.float64).copy())
        if self.num_ranks > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.cpu().numpy()

    def mean(self, value: Tensor) -> float:
        """Return the mean of a scalar over ranks."""
        total = value.detach().clone()
        if self.num_ranks > 1:
            dist.all_reduce(total)
        return float(total) / self.num_ranks

    def sizes(self, count: int) -> list[int]:
        """Return the `count` of every rank."""
        if self.num_ranks == 1:
            return [count]
        mine = torch.tensor([count], device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, mine)
        return [int(size) for size in everyone]

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """Return the rows of all ranks, concatenated. Backward sums the gradients of all ranks for this rank's rows.

        `sizes` are the ranks' numbers of rows, as `Ranks.sizes` gives them.
        """
        if self.num_ranks == 1:
            return rows
        longest = max(sizes)
        padded = torch.nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, longest - rows.shape[0]])
        everyone = _AllGather.apply(padded, self.num_ranks)
        if all(size == longest for size in sizes):
            return everyone
        return torch.cat([everyone[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)])

    def barrier(self) -> None:
        if self.num_ranks > 1:
            dist.barrier()


def _multiplies_bf16(device: torch.device) -> bool:
    """Return whether bf16 is faster than float32 on the device: GPUs from A100 on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_supports("avx512_bf16") or cpu_supports("amx_tile")


def _able_to_travel(error: Exception) -> Exception:
    """Return the error, or one with the same message if it cannot be pickled (other ranks would wait for it)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error


class _AllGather(torch.autograd.Function):
    """all_gather whose backward adds up the gradients that all ranks have for a rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_ranks: int) -> Tensor:
        ctx.num_ranks = num_ranks
        everyone = rows.new_empty(num_ranks * rows.shape[0], *rows.shape[1:])
        dist.all_gather(list(everyone.chunk(num_ranks)), rows.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient] = gradients
        mine = gradient.new_empty(gradient.shape[0] // ctx.num_ranks, *gradient.shape[1:])
        dist.reduce_scatter(mine, list(gradient.contiguous().chunk(ctx.num_ranks)))
        return mine, None


# Messages of torchrec through the root logger about tables that are not sharded, and starts without torchrun.
_NO_NEWS = ("Sharding spec not found", "Could not determine LOCAL_WORLD_SIZE")


def quiet_libraries() -> None:
    """Silence messages of torchrec, fbgemm and torch at import and start that no user can act on."""
    logging.getLogger().addFilter(_is_news)
    for name in ("torchrec", "fbgemm_gpu", "torch.distributed", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torchrec", "fbgemm_gpu", "torch", "tensordict"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    warnings.filterwarnings("ignore", message=r"(?s).*Failed to import: fbgemm_gpu")


def check_process(pid: int, what: str) -> None:
    """Raise ConfigError in a process that was forked from `pid`, which opened the object `what`.

    The threads of torch and FAISS are not forked: the first call that waits for one would wait forever.
    """
    if os.getpid() != pid:
        raise ConfigError(
            f"This {what} was opened in process {pid} and is used in process {os.getpid()}, which was forked from it: "
            f"start processes by spawn (multiprocessing.get_context('spawn')), and open a {what} in each."
        )


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NO_NEWS)


DRIVER = Path("/proc/driver/nvidia/version")
MIN_DRIVER = {"13": "R580", "12": "R525"}  # NVIDIA drivers that CUDA's major versions need


def usable_device(wanted: Wanted = "auto", local_rank: int = 0, local_ranks: int = 1) -> torch.device:
    """Return the device of a rank: its GPU, or the CPU if there is none or `wanted` is cpu.

    Raises ConfigError where there is a GPU that torch cannot use, rather than compute on the CPU unasked; where
    `wanted` is cuda and there is no GPU; and where more ranks are on this machine than GPUs.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted == "cuda" or not _hides_gpus():
            _check_no_gpu(is_wanted=wanted == "cuda")
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    needed = max(local_ranks, local_rank + 1)
    if needed > num_gpus:
        raise ConfigError(
            f"{needed} ranks are on this machine, but torch sees {num_gpus} GPU{'s' * (num_gpus > 1)} here, and each "
            f"rank needs one: start {num_gpus}, or set CUDA_VISIBLE_DEVICES= to nothing, for ranks that compute on "
            "CPUs."
        )
    return torch.device("cuda", local_rank)


def _hides_gpus() -> bool:
    """Return whether the environment selects the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible in ("", "-1") or os.environ.get("TREC_TT_DEVICE") == "cpu"


def _check_no_gpu(*, is_wanted: bool) -> None:
    """Raise ConfigError where torch sees no GPU although there is one, or it was built for one, or one `is_wanted`."""
    gpus, cuda = gpu_files(), torch.version.cuda
    if not gpus and cuda is None and not is_wanted:
        return
    found = f"an NVIDIA GPU is here ({gpus[0]})" if gpus else "no NVIDIA GPU is visible"
    if cuda is None:
        build = f"torch {torch.__version__} is a build for CPUs"
        fix = "install the GPU packages (launch/requirements-gpu.txt)"
    else:
        need = MIN_DRIVER.get(cuda.partition(".")[0], "a newer one")
        build = f"torch {torch.__version__} is built for CUDA {cuda}, which needs an NVIDIA driver {need} or newer"
        build += f"; the driver here is {driver_version() or 'not loaded'}"
        if cause := cuda_error():
            build += f". torch reports: {cause}"
        fix = "update the driver" if gpus else "make a GPU visible"
    raise ConfigError(
        f"torch cannot compute on a GPU: {found}, and {build}. `trec-twotower doctor` checks the installation. Either "
        f"{fix}, or compute on the CPU: train.device=cpu for train, CUDA_VISIBLE_DEVICES= (empty) for any command."
    )


def gpu_files() -> list[str]:
    """Return the device files of NVIDIA GPUs that this process can see, whether or not torch can use them."""
    return sorted(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/proc/driver/nvidia/gpus/*"))


def driver_version() -> str | None:
    """Return the version of the loaded NVIDIA driver, such as 550.54.14."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def cuda_error() -> str | None:
    """Return torch's error message if it cannot start CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return None


@contextmanager
def start_ranks(
    timeout_s: int = 300, threads: int = 0, first_timeout_s: int | None = None, device: Wanted = "auto"
) -> Iterator[Ranks]:
    """Join the process group of torchrun's environment (NCCL and gloo on GPU, gloo on CPU), and leave it at the end.

    A collective may take `first_timeout_s` until `Ranks.is_under_way` is called, and `timeout_s` from then on. `device`
    is that of `usable_device`.
    """
    quiet_libraries()
    if dist.is_initialized():
        raise ConfigError(
            "start_ranks() was called in a process that has a process group already, such as inside another "
            "`with start_ranks()` block: use the ranks of that block."
        )
    end_with_launcher()
    rank = int(os.environ.get("RANK", 0))
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place = usable_device(device, local_rank, local_ranks)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or max(1, cores // local_ranks))
    first_timeout_s = max(timeout_s, first_timeout_s or timeout_s)
    with _ended_by_ctrl_c() if num_ranks > 1 else nullcontext():
        store = _store(rank, num_ranks, first_timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=first_timeout_s),
        )
    has_failed = True
    ranks: Ranks | None = None
    try:
        fault_point("start:joined")
        ranks = Ranks(rank, num_ranks, place, timeout_s, store)
        yield ranks
        has_failed = False
    finally:
        if ranks is not None:
            ranks.end()
        # NCCL destroys its communicators on all ranks together: if other ranks still wait for this one in a collective,
        # this call would wait for them, and the error would not be shown. The end of the process destroys them too.
        if not (has_failed and num_ranks > 1 and place.type == "cuda"):
            dist.destroy_process_group()


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once: torch runs no Python signal handler while it waits for other ranks."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _store(rank: int, num_ranks: int, timeout_s: int) -> dist.Store:
    """Return the store through which the ranks connect.

    torchrun's agent keeps one store over all restarts: without a prefix of its own, a restarted rank would read the
    addresses of the dead.
    """
    if num_ranks == 1:
        return dist.HashStore()
    timeout = timedelta(seconds=timeout_s)
    from_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        num_ranks,
        is_master=rank == 0 and not from_agent,
        timeout=timeout,
    )
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
