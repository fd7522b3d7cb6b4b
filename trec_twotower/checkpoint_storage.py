"""What torch.distributed.checkpoint lacks: digests taken while writing, whole or no publication, no trust in pickles.

Its folder holds one file a rank and `.metadata`, a pickle that says which part of which tensor lies where. The format
stays its own; here the files get a manifest, and `.metadata` is read by an unpickler that knows a dozen names.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from trec_twotower.errors import DataError
from trec_twotower.faults import fault_point
from trec_twotower.files import Digest, publish_folder, seal

METADATA = ".metadata"
MAX_METADATA_BYTES = 256 << 20
# All that the metadata of a folder of tensors consists of. None of these does anything but hold values.
_CHECKPOINT, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_ALLOWED = {
    *((_CHECKPOINT, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_CHECKPOINT, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (_FILESYSTEM, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}


class Snapshot(DefaultSavePlanner):
    """This rank's part of a state, copied aside, so that it can be written while the state changes.

    There is one copy: its memory is used again by the next `take`, which must wait until this one is written.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self._copies: dict[MetadataIndex, Tensor] = {}

    def take(self, state: dict[str, Any]) -> None:
        self.set_up_planner(state)
        copies = {}
        for item in self.create_local_plan().items:
            assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is no tensor"
            live = super().lookup_object(item.index).detach()
            copy = self._copies.get(item.index)
            if copy is None or copy.shape != live.shape or copy.dtype != live.dtype:
                copy = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
            copies[item.index] = copy.copy_(live, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._copies = copies

    @property
    def num_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index]


class PublishingWriter(FileSystemWriter):
    """Writes to a temporary folder, which gets a manifest and its name when every rank's files are on the disk."""

    def __init__(self, path: Path, facts: dict[str, Any], step: int, sweep: Callable[[], None]) -> None:
        self.final = path
        self.temporary = temporary_of(path)
        super().__init__(self.temporary, overwrite=False)
        self.facts, self.step, self.sweep = facts, step, sweep
        self.fs = _DigestingFileSystem(step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is made below, by one rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for leftover in self.final.parent.glob(".step-*"):
            shutil.rmtree(leftover)
        self.temporary.mkdir(parents=True)
        fault_point("save:opened", self.step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        fault_point("save:between_files", self.step)
        written: Future[list[WriteResult]] = Future()
        written.set_result(_Written(results, self.fs.digests))
        return written

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # no paths of this machine

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: describe, seal, publish, and take older ones away."""
        super().finish(metadata, results)
        fault_point("save:described", self.step)
        digests: dict[str, Digest] = {}
        for written in results:
            assert isinstance(written, _Written)
            digests |= written.digests
        seal(self.temporary, self.facts, digests)
        fault_point("save:sealed", self.step)
        publish_folder(self.temporary, self.final)
        fault_point("save:published", self.step)
        self.sweep()
        fault_point("save:swept", self.step)


def temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


class _Written(list[WriteResult]):
    """A rank's results as the framework takes them to the first rank, with the digests of its files."""

    def __init__(self, results: list[WriteResult], digests: dict[str, Digest]) -> None:
        super().__init__(results)
        self.digests = digests

    def __reduce__(self) -> tuple[Any, ...]:
        return _Written, (list(self), self.digests)


class _DigestingFileSystem(FileSystem):
    """Opens files that are digested as they are written: what is read later is compared with what was meant."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        with _DigestedFile(Path(path), self.step) as file:
            try:
                yield file
            except RuntimeError as error:  # torch ends its archive behind a write that failed, and hides why it did
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        self.digests[Path(path).name] = {"bytes": file.num_bytes, "sha256": file.sha256.hexdigest()}


class _DigestedFile(io.BufferedWriter):
    def __init__(self, path: Path, step: int) -> None:
        super().__init__(io.FileIO(path, "wb"), buffer_size=1 << 20)
        self.path, self.step = path, step
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.sha256.update(data)
        is_first = self.num_bytes == 0
        self.num_bytes += written
        if is_first:
            fault_point("save:within_file", self.step, str(self.path))
        return written

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("a digested file is written from its beginning to its end")


class SafeReader(FileSystemReader):
    """Reads a folder whose `.metadata` names tensors alone, in files that the manifest lists; else DataError."""

    def __init__(self, folder: Path, manifest: dict[str, Any], mend: str) -> None:
        super().__init__(folder)
        self.metadata = self._read(folder, manifest, mend)

    @property
    def sizes(self) -> dict[str, torch.Size]:
        """The whole size of every tensor in the folder."""
        return {name: entry.size for name, entry in self.metadata.state_dict_metadata.items()}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def _read(self, folder: Path, manifest: dict[str, Any], mend: str) -> Metadata:
        path = folder / METADATA
        if METADATA not in manifest["files"] or manifest["files"][METADATA]["bytes"] > MAX_METADATA_BYTES:
            raise DataError(f"{path} is not listed, or larger than {MAX_METADATA_BYTES:,} bytes: {mend}")
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except OSError:
            raise
        except Exception as error:  # an altered pickle can raise anything
            raise DataError(f"{path} does not describe a checkpoint ({error}): do not trust it; {mend}") from None
        if problem := _problem(metadata, manifest["files"]):
            raise DataError(f"{path} {problem}: do not trust it; {mend}")
        metadata.storage_meta = StorageMeta()  # the framework's reader expects one
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _problem(metadata: Any, files: dict[str, Digest]) -> str | None:
    """What is wrong with metadata that consist of allowed objects, if anything is."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        return "does not hold metadata"
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.size, torch.Size):
            return f"has an entry {name!r} that is no tensor"
    if not isinstance(metadata.storage_data, dict):
        return "does not say where its tensors lie"
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or index.fqn not in metadata.state_dict_metadata:
            return "places a tensor that it does not describe"
        name = info.relative_path
        if name not in files:
            return f"places {index.fqn!r} in {name!r}, which the manifest does not list"
        if info.transform_descriptors or not 0 <= info.offset <= info.offset + info.length <= files[name]["bytes"]:
            return f"places {index.fqn!r} outside {name!r}"
    return None
