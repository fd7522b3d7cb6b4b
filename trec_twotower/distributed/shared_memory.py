"""Collectives of ranks that share one machine and its memory, between CPUs.

gloo sends TCP even then: the kernel copies every byte twice, and a collective changes threads six times, all on the
core that the rank computes with. Here a rank writes what the others want into memory that they have mapped, tells them
so by a few bytes through a Unix socket, and they read it there. A rank that dies closes its sockets, which the others
see at once; nothing of it stays behind in a file system.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work

BACKEND = "shared_memory"  # its name among torch's
LOOK_S = 50e-6  # for an answer, before the core is given away: waking up takes as long
LEAST_BYTES = 1 << 20
LINE_BYTES = 64
DIRECT_BYTES = 1 << 16  # sums of more are made in parts, one by each rank, where there are more than two
# What a rank says of a collective: its number, where the part for the other begins, its bytes; then how much memory
# there is, if it comes with it (as a file descriptor), or 0.
MESSAGE = struct.Struct("<4q")
PEER = struct.Struct("3i")  # process, user and group at the other end of a socket


def check() -> None:
    """Raises OSError where this machine does not let processes share memory so."""
    os.close(os.memfd_create("trec_twotower"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as tried:
        tried.bind(f"\0trec_twotower-{os.urandom(16).hex()}")


class Exchange:
    """What one rank writes and the others read, one exchange after the other, in the same order on all ranks."""

    def __init__(self, rank: int, num_ranks: int, store: dist.Store, timeout_s: float) -> None:
        """All ranks call together, which find each other in `store`."""
        self.rank, self.num_ranks = rank, num_ranks
        self._number = 0
        self._half_bytes = 0
        self._mine: Tensor | None = None
        self._theirs: dict[int, Tensor] = {}
        self._sockets = _connect(rank, num_ranks, store)
        self.set_timeout(timeout_s)

    def set_timeout(self, seconds: float) -> None:
        """How long another rank may take to come to the same exchange."""
        self._timeout_s = seconds
        whole, rest = divmod(seconds, 1)
        for each in self._sockets.values():
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(whole), int(rest * 1e6)))

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()

    def swap(self, source: Tensor, parts: Sequence[slice]) -> list[Tensor | None]:
        """Give each rank its part of `source`, flat bytes; returns what each has for this one, None for itself.

        What is returned can be read until the next swap.
        """
        memory, has_grown = self._room(len(source))
        start = self._half_bytes * (self._number % 2)  # the others may still be reading the half before
        room = memory[start : start + len(source)]
        others = [part for rank, part in enumerate(parts) if rank != self.rank]
        for number, part in enumerate(others):
            if part not in others[:number]:
                room[part].copy_(source[part])
        for rank, each in self._sockets.items():
            part = parts[rank]
            size = len(memory) if has_grown else 0
            words = MESSAGE.pack(self._number, start + part.start, part.stop - part.start, size)
            try:
                if has_grown:
                    socket.send_fds(each, [words], [self._file])
                else:
                    each.send(words)
            except OSError as error:
                raise _closed_by(rank) from error
        if has_grown:
            os.close(self._file)
        found = [None if rank == self.rank else self._from(rank) for rank in range(self.num_ranks)]
        self._number += 1
        return found

    def _room(self, num_bytes: int) -> tuple[Tensor, bool]:
        """This rank's memory, and whether the others have yet to be given it."""
        if self._mine is not None and num_bytes <= self._half_bytes:
            return self._mine, False
        self._half_bytes = -(-max(LEAST_BYTES, num_bytes * 5 // 4) // LINE_BYTES) * LINE_BYTES
        self._file = os.memfd_create("trec_twotower")
        os.ftruncate(self._file, 2 * self._half_bytes)
        self._mine = _mapped(self._file, 2 * self._half_bytes)
        return self._mine, True

    def _from(self, rank: int) -> Tensor:
        """What another rank has for this one in this exchange."""
        words, files = self._message(rank)
        number, start, num_bytes, size = MESSAGE.unpack(words)
        assert number == self._number, f"rank {rank} is at exchange {number:,}, rank {self.rank} at {self._number:,}"
        if size:
            self._theirs[rank] = _mapped(files[0], size)
            os.close(files[0])
        return self._theirs[rank][start : start + num_bytes]

    def _message(self, rank: int) -> tuple[bytes, Sequence[int]]:
        until = time.perf_counter() + LOOK_S
        flags = int(socket.MSG_DONTWAIT)
        while True:
            try:
                words, files, _, _ = socket.recv_fds(self._sockets[rank], MESSAGE.size, 1, flags)
            except BlockingIOError:
                if not flags:
                    raise dist.DistNetworkError(
                        f"Connection to rank {rank}: it did not answer within {self._timeout_s:g} s"
                    ) from None
                if time.perf_counter() >= until:
                    flags = 0
                continue
            except ConnectionError as error:
                raise _closed_by(rank) from error
            if not words:
                raise _closed_by(rank)
            return words, files


def _closed_by(rank: int) -> Exception:
    return dist.DistNetworkError(f"Connection closed by rank {rank}")


def _mapped(file: int, num_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)


def _connect(rank: int, num_ranks: int, store: dist.Store) -> dict[int, socket.socket]:
    """A socket to each other rank; its messages have edges (SOCK_SEQPACKET), and can carry file descriptors."""
    if rank == 0:
        store.set("name", os.urandom(16).hex())
    name = store.get("name").decode()
    sockets: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"\0trec_twotower-{name}-{rank}")  # an abstract name, which is gone with the process
        listening.listen(num_ranks)
        store.set(f"listens_{rank}", "")
        store.wait([f"listens_{other}" for other in range(num_ranks)])
        for other in range(rank):
            to = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            to.connect(f"\0trec_twotower-{name}-{other}")
            to.send(struct.pack("<q", rank))
            sockets[other] = to
        while len(sockets) < num_ranks - 1:
            to, _ = listening.accept()
            if _is_ours(to):
                sockets[struct.unpack("<q", to.recv(8))[0]] = to
            else:
                to.close()
    if not all(map(_is_ours, sockets.values())):
        raise OSError("a rank of another user")
    return dict(sorted(sockets.items()))


def _is_ours(to: socket.socket) -> bool:
    _, user, _ = PEER.unpack(to.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    return user == os.getuid()


class _Done(Work):
    """A collective that is over when it is begun."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._result)
        return future


class SharedMemoryGroup(dist.ProcessGroup):
    """The collectives that torchrec, DistributedDataParallel and Ranks ask of a group, by an Exchange.

    Each is over when it returns. Sums are added up in the order of the ranks, so all ranks hold the same bits.
    """

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.rank, exchange.num_ranks)
        self.exchange = exchange
        self._rank, self._num_ranks = exchange.rank, exchange.num_ranks

    def getBackendName(self) -> str:
        return BACKEND

    def _get_backend_name(self) -> str:
        return "gloo"  # a ShardedTensor takes any other for one of GPUs, on ranks that hold nothing of it

    @property
    def _device_types(self) -> list[torch.device]:
        """torchrec before 1.7 asks for it, and torch knows none of a group that is written in Python."""
        return [torch.device("cpu")]

    def set_timeout(self, timeout: Any) -> None:
        self.exchange.set_timeout(timeout.total_seconds())

    def shutdown(self) -> None:
        self.exchange.close()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        for into, mine in zip(outputs, inputs, strict=True):
            self._gather(mine, into)
        return _Done(outputs)

    def all_gather_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Work:
        self._gather(mine, _in_order(output).chunk(self._num_ranks))
        return _Done([output])

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Work:
        for each in tensors:
            source = _flat(each) if self._rank == opts.rootRank else each.new_empty(0)
            found = self._swap(source, self._whole(source))
            each.copy_(found[opts.rootRank].view(each.shape))
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> Work:
        nothing = torch.empty(0)
        self._swap(nothing, self._whole(nothing))
        return _Done([])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        _check_sum(opts)
        for each in tensors:
            source = _flat(each)
            if self._num_ranks > 2 and source.nbytes > DIRECT_BYTES:
                mine = self._sum(source, self._equal(source, -(-len(source) // self._num_ranks)))
                total = torch.cat(self._swap(mine, self._whole(mine)))
            else:
                total = self._sum(source, self._whole(source))
            each.copy_(total.view(each.shape))
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return self.allreduce(tensors, opts)

    def reduce_scatter_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Work:
        _check_sum(opts)
        source = _flat(mine)
        self._sum(source, self._equal(source, output.numel()), _in_order(output))
        return _Done([output])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        _check_sum(opts)
        for output, mine in zip(outputs, inputs, strict=True):
            source = torch.cat([_flat(each) for each in mine])
            self._sum(source, _runs([each.numel() for each in mine]), _in_order(output))
        return _Done(outputs)

    def all_to_all_single(
        self, output: Tensor, mine: Tensor, output_sizes: list[int], sizes: list[int], opts: Any = None
    ) -> Work:
        found = self._swap(_flat(mine), self._rows(mine, sizes))
        into = _in_order(output)
        for part, taken in zip(found, self._rows(output, output_sizes), strict=True):
            into[taken].copy_(part)
        return _Done([output])

    # Under the names that torch before 2.13 calls them by.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _swap(self, source: Tensor, parts: Sequence[slice]) -> list[Tensor]:
        """Every rank's part for this one, its own among them; to be read before the next collective."""
        size = source.itemsize
        in_bytes = [slice(part.start * size, part.stop * size) for part in parts]
        found = self.exchange.swap(source.view(torch.uint8), in_bytes)
        return [source[parts[self._rank]] if part is None else part.view(source.dtype) for part in found]

    def _gather(self, mine: Tensor, outputs: Sequence[Tensor]) -> None:
        source = _flat(mine)
        for output, part in zip(outputs, self._swap(source, self._whole(source)), strict=True):
            output.copy_(part.view(output.shape))

    def _sum(self, source: Tensor, parts: Sequence[slice], out: Tensor | None = None) -> Tensor:
        """The sum of what all ranks have for this one."""
        first, *others = self._swap(source, parts)
        total = torch.add(first, others[0], out=out) if others else torch.mul(first, 1, out=out)
        for each in others[1:]:
            total += each
        return total

    def _whole(self, source: Tensor) -> list[slice]:
        return [slice(0, len(source))] * self._num_ranks

    def _equal(self, source: Tensor, size: int) -> list[slice]:
        """Parts of this size; those at the end may be shorter."""
        edges = [min(rank * size, len(source)) for rank in range(self._num_ranks + 1)]
        return [slice(first, end) for first, end in pairwise(edges)]

    def _rows(self, tensor: Tensor, sizes: list[int]) -> list[slice]:
        """The numbers that belong to each rank: equal parts, or so many rows."""
        if not sizes:
            return self._equal(tensor.view(-1), tensor.numel() // self._num_ranks)
        width = tensor.numel() // len(tensor) if len(tensor) else 0
        return _runs([size * width for size in sizes])


def new_group(timeout_s: float) -> SharedMemoryGroup:
    """Of all ranks, which call together."""
    if BACKEND not in dist.Backend.backend_list:  # torchrec asks for groups of some ranks by this name
        dist.Backend.register_backend(BACKEND, _made, devices=["cpu"])
    group = dist.new_group(backend=BACKEND, timeout=timedelta(seconds=timeout_s))
    assert isinstance(group, SharedMemoryGroup)
    return group


def _made(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> SharedMemoryGroup:
    return SharedMemoryGroup(Exchange(rank, num_ranks, store, timeout.total_seconds()))


def _flat(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.as_strided((tensor.numel(),), (1,))  # one number may have any stride


def _in_order(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous(), "a collective's output must be contiguous"
    return tensor.detach().view(-1)


def _runs(sizes: Sequence[int]) -> list[slice]:
    """Parts of these sizes, one behind the other."""
    parts, first = [], 0
    for size in sizes:
        parts.append(slice(first, first + size))
        first += size
    return parts


def _check_sum(opts: Any) -> None:
    if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
        raise NotImplementedError(f"{BACKEND} makes sums only, not {opts.reduceOp}")
