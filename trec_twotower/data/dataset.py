"""A dataset directory: its parts, files, row counts and columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from trec_twotower.config.data import DataConfig
from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.config.loading import read_yaml
from trec_twotower.data.arrow_types import holds_null_alone
from trec_twotower.data.parquet_files import (
    folder_of,
    parquet_files,
    size_of,
)
from trec_twotower.data.split import DESCRIPTION, Split
from trec_twotower.errors import DataError, nearest
from trec_twotower.ops.hashing import is_id
from trec_twotower.storage.manifest import own_sha256

USER_ID, ITEM_ID, POSITIVES = "user_id", "item_id", "positives"
SERVING = "serving"  # the part with the whole history of each user and no held-out items
TRAIN = "train"  # the part with training rows, per event or per user
TRAIN_USERS = "train_users"  # the part with training rows per user, in a dataset that also has them per event
PARTS_OF_ROWS = (TRAIN, TRAIN_USERS, "valid", "test")


class Dataset:
    """A dataset directory, written by `prepare` or by any other writer of Parquet.

    `files` are the files of some parts, as in Split; `like` is Split's for train/. By default a part has the files that
    dataset.yaml lists, except in a folder that `grows`.
    """

    def __init__(
        self,
        folder: Path | str,
        files: Mapping[str, Mapping[str, int]] | None = None,
        like: Mapping[str, pa.DataType] | None = None,
        *,
        grows: bool = False,
    ) -> None:
        self.files = files
        self._like = like
        self._grows = grows
        self._train = TRAIN
        self.folder = folder = folder_of(folder)
        if folder.is_file():
            raise DataError(f"{folder} is a file: a dataset is a folder with train/ and items/, written by `prepare`.")
        if not folder.is_dir():
            near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            where = "" if hasattr(folder, "fs") or folder.is_absolute() else f" in {Path.cwd()}"
            raise DataError(
                f"There is no dataset folder {folder}{where}{nearest(folder.name, near)}: create it with `prepare`."
            )
        for name in ("train", "items"):
            if not (folder / name).is_dir():
                raise DataError(f"{folder} is no dataset: it has no folder {name}/ (it needs train/ and items/).")

    @classmethod
    def of(cls, data: DataConfig) -> Dataset:
        """Return the dataset of a config, with all its files."""
        return cls(data.dataset, grows=data.follow is not None).by(data.rows)

    def by(self, rows: str) -> Dataset:
        """Return the dataset with training rows per event or per user (those of train_users/, if it exists).

        In a folder that grows, training rows are always those of train/.
        """
        is_apart = rows == "user" and self.files is None and not self._grows and self.has(TRAIN_USERS)
        place = TRAIN_USERS if is_apart else TRAIN
        if place == self._train:
            return self
        other = copy(self)
        other._train = place
        other.__dict__.pop("train", None)  # cached
        return other

    @cached_property
    def train(self) -> Split:
        split = self.split("train")
        self._check_ids(split, USER_ID)
        return split

    @cached_property
    def items(self) -> Split:
        split = self.split("items")
        self._check_ids(split, ITEM_ID)
        return split

    @cached_property
    def users(self) -> Split | None:
        if not self.has("users"):
            return None
        split = self.split("users")
        self._check_ids(split, USER_ID)
        return split

    def has(self, name: str) -> bool:
        return (self.folder / name).is_dir() and (self.files or {}).get(name) != {}

    def split(self, name: str) -> Split:
        if not self.has(name):
            parts = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
            raise DataError(f"{self.folder} has no part {name!r}{nearest(name, parts)}.")
        files = None if self.files is None else self.files.get(name)
        place = self._train if name == TRAIN else name
        described = {Path(path).name: facts for path, facts in self._described_files.items()
                     if Path(path).parent.name == place}  # fmt: skip
        if described and self.files is None and not self._grows:
            self._check_files(place, set(described))
        footers = {file: facts["footer"] for file, facts in described.items() if "footer" in facts}
        split = Split(self.folder / place, name, files, self._like if name == TRAIN else None, footers)
        if name not in (TRAIN, "items", "users") and any(map(holds_null_alone, split.columns.values())):
            ids = pa.list_(self.items.columns[ITEM_ID])
            split.adopt_types({POSITIVES: ids, HISTORY: ids, ITEM_ID: ids.value_type, **self.train.columns})
        return split

    def _check_files(self, name: str, described: set[str]) -> None:
        """Raise DataError if a part has other files than those in dataset.yaml."""
        found = {path.name for path in parquet_files(self.folder / name)}
        odd = [
            f"{'has no' if is_lacking else 'also has'} {_few(files)}, {'' if is_lacking else 'un'}listed there"
            for is_lacking, files in ((True, described - found), (False, found - described))
            if files
        ]
        if odd:
            raise DataError(
                f"{self.folder / name} differs from {self.folder / DESCRIPTION}: it {' and '.join(odd)}. Create the "
                f"dataset again; or, if the files are intended, remove {DESCRIPTION} (of a folder that "
                "grows, set data.follow)."
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        """Return the content of dataset.yaml; empty if there is none."""
        path = self.folder / DESCRIPTION
        described = read_yaml(path) or {} if path.is_file() else {}
        if not isinstance(described, dict):
            raise DataError(f"{path} does not describe a dataset: create it again, or remove it.")
        if "sha256" in described and described["sha256"] != own_sha256(described):
            raise DataError(f"{path} is damaged or was changed (its sha256 differs): create it again, or remove it.")
        return described

    @cached_property
    def _described_files(self) -> dict[str, dict[str, Any]]:
        files = self.description.get("files") or {}
        if not isinstance(files, dict) or not all(isinstance(facts, dict) for facts in files.values()):
            raise DataError(f"{self.folder / DESCRIPTION} does not list its files: create it again, or remove it.")
        return files

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of the file names and sizes of train/, valid/ and test/: twelve hex digits.

        If only some files are selected, the hash covers these, also of items/ and users/.
        """
        digest = hashlib.sha256()
        if self.files is not None:
            digest.update(json.dumps(self.files, sort_keys=True).encode())
            return digest.hexdigest()[:12]
        for part in PARTS_OF_ROWS:
            for path in self.paths(part):
                digest.update(f"{part}/{path.name} {size_of(path)}\n".encode())
        return digest.hexdigest()[:12]

    @cached_property
    def described_fingerprint(self) -> str | None:
        """Return twelve hex digits of the digests of those files in dataset.yaml; None if it has none."""
        facts = {name: each.get("sha256") for name, each in self._described_files.items()
                 if Path(name).parent.name in PARTS_OF_ROWS}  # fmt: skip
        if not facts or self.files is not None:
            return None
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def paths(self, part: str) -> list[Path]:
        """Return the Parquet files of a part of the dataset; an empty list if there is no such part."""
        folder = self.folder / part
        return parquet_files(folder) if folder.is_dir() else []

    @staticmethod
    def _check_ids(split: Split, column: str) -> None:
        if not split.has(column):
            raise DataError(
                f"{split.folder} has no column {column!r}{nearest(column, split.columns)}: every row needs its "
                f"{column.removesuffix('_id')}."
            )
        if not is_id(split.columns[column]):
            raise DataError(
                f"{split.folder}: column {column!r} is {split.columns[column]}, but ids are integers or text: cast it."
            )


def _few(names: set[str]) -> str:
    """Return a list of a few names, or the first one and the number of others."""
    first, *others = sorted(names)
    return ", ".join([first, *others]) if len(others) < 3 else f"{first} and {len(others):,} other files"
