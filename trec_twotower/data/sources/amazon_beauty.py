"""Source `amazon-beauty`: one *.txt file of item sequences in time order, and a JSON file of item attributes.

A line is `user item item ...`, oldest first; `*_item2attributes.json`, if there, maps items to attribute ids.
Leave one out: the last item of a user is the test, the one before it the validation, the rest is train.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.data.sources.id_lines import IdLines, Published, check_published, read_id_lines
from trec_twotower.data.sources.public_options import BeautyOptions as Options
from trec_twotower.data.sources.writer import DatasetWriter, list_column
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import offsets_of

# Counts of the S3-Rec 5-core, keyed by the sha256 of the sequence file and the attribute file.
PUBLISHED: Published = {
    (
        "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4",
    ): {"users": 22_363, "items": 12_101, "interactions": 198_502, "attributes": 637}
}
ATTRIBUTES_ENDING = "_item2attributes.json"
MIN_ITEMS = 3  # users with fewer items are in train only
_ROWS_PER_PIECE = 65_536
_USERS_PER_PIECE = 16_384


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test and items; returns the content of dataset.yaml."""
    data_dir = options.folder("amazon-beauty")
    sequences_path, attributes_path = _find(data_dir)
    lines = read_id_lines(sequences_path)
    if not len(lines.items):
        raise DataError(f"{lines.path} has users but not one item: a line is `user item item ...`.")
    item_ids = np.unique(lines.items)
    starts, ends, owner = lines.offsets[:-1], lines.offsets[1:], lines.owners()
    is_tested = ends - starts >= MIN_ITEMS

    event = np.arange(len(lines.items))
    train = event[event < (ends - 2 * is_tested)[owner]]
    train = train[train - starts[owner[train]] >= options.min_history]
    for at in range(0, len(train), _ROWS_PER_PIECE):
        row = train[at : at + _ROWS_PER_PIECE]
        oldest = np.maximum(starts[owner[row]], row - options.max_history)
        history = list_column(lines.items, oldest, row)
        columns = {"user_id": lines.users[owner[row]], "item_id": lines.items[row], "history": history}
        writer.write("train", pa.table(columns))
    for split, back in (("valid", 2), ("test", 1)):
        tested = np.flatnonzero(is_tested)
        for at in range(0, len(tested), _USERS_PER_PIECE):
            user = tested[at : at + _USERS_PER_PIECE]
            row = ends[user] - back
            columns = {
                "user_id": lines.users[user],
                "positives": list_column(lines.items, row, row + 1),
                "history": list_column(lines.items, starts[user], row),
            }
            writer.write(split, pa.table(columns))

    counts = {
        "users": int((ends > starts).sum()),
        "items": len(item_ids),
        "interactions": len(lines.items),
        "repeats_kept": _repeats(lines, item_ids),
    }
    catalogue = {"item_id": pa.array(item_ids)}
    digests = [lines.sha256]
    if attributes_path is not None:
        attributes, unused, digest = _read_attributes(attributes_path, item_ids)
        catalogue["attributes"] = attributes
        counts["attributes"] = len(np.unique(attributes.values.to_numpy()))
        counts["items_without_attributes"] = int((np.diff(attributes.offsets.to_numpy()) == 0).sum())
        counts["attributes_of_unknown_items"] = unused
        digests.append(digest)
    writer.write("items", pa.table(catalogue))
    checked = check_published(PUBLISHED, tuple(digests), counts)
    resolved = options.model_dump(mode="json") | {"data_dir": str(data_dir)}
    return writer.finish("amazon-beauty", resolved, counts, counts_checked=checked)


def _find(data_dir: Path) -> tuple[Path, Path | None]:
    """Return the files of sequences and attributes in `data_dir`; DataError lists the files if that is ambiguous."""
    names = sorted(entry.name for entry in data_dir.iterdir() if entry.is_file())
    attributes = [name for name in names if name.endswith(ATTRIBUTES_ENDING)]
    sequences = [name for name in names if name.endswith(".txt")]
    if len(attributes) == 1:
        namesake = attributes[0].removesuffix(ATTRIBUTES_ENDING) + ".txt"
        sequences = [namesake] if namesake in sequences else sequences
    for found, what, fits in (
        (sequences, "one *.txt of sequences", len(sequences) == 1),
        (attributes, f"at most one *{ATTRIBUTES_ENDING}", len(attributes) <= 1),
    ):
        if not fits:
            shown = ", ".join(found or names) or "nothing"
            raise DataError(f"{data_dir} should hold {what}, but found {len(found)} (there: {shown}).")
    return data_dir / sequences[0], data_dir / attributes[0] if attributes else None


def _read_attributes(path: Path, item_ids: np.ndarray) -> tuple[pa.ListArray, int, str]:
    """Return the attribute ids of each item, the number of unknown items in the file, and its sha256."""
    content = path.read_bytes()
    try:
        loaded = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a {type(loaded).__name__}, not a mapping of items to attribute ids.")
    by_item = {}
    for item, attributes in loaded.items():
        is_list = isinstance(attributes, list) and all(type(number) is int for number in attributes)
        if not (is_list and item.isdecimal()):
            raise DataError(f"{path}: item {item!r} has {attributes!r}: a list of integers is expected for each item.")
        by_item[int(item)] = attributes
    lists = [by_item.pop(int(item), []) for item in item_ids]
    values = np.fromiter((number for attributes in lists for number in attributes), np.int64)
    offsets = offsets_of([len(attributes) for attributes in lists])
    return list_column(values, offsets[:-1], offsets[1:]), len(by_item), hashlib.sha256(content).hexdigest()


def _repeats(lines: IdLines, item_ids: np.ndarray) -> int:
    """Return the number of events that repeat an earlier (user, item) pair."""
    pair = lines.owners() * len(item_ids) + np.searchsorted(item_ids, lines.items)
    return len(pair) - len(np.unique(pair))
