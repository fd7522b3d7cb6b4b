"""Source `gowalla`: interactions without order in train.txt and test.txt.

A line is `user item item ...`; any two files of that layout will do. A share of each user's train items is
held out for validation, so that nothing need be chosen on the test part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from trec_twotower.data.sources.id_lines import IdLines, Published, check_published, read_id_lines
from trec_twotower.data.sources.public_options import GowallaOptions as Options
from trec_twotower.data.sources.writer import DatasetWriter, list_column
from trec_twotower.errors import DataError
from trec_twotower.ops.ragged import offsets_of

# Counts of the LightGCN split, keyed by the sha256 of train.txt and test.txt.
PUBLISHED: Published = {
    (
        "0f086326b28a56c2e6dcb81d86ee72d4ccb7eed3a8d26788392356d8f51111cc",
        "099a2a73924e4b754dc6efd730d764f492321b53c38eb93298850c83acf57be3",
    ): {"users": 29_858, "items": 40_981, "train_interactions": 810_128, "test_interactions": 217_242}
}
_USERS_PER_PIECE = 16_384


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write train, valid, test and items; returns the content of dataset.yaml."""
    data_dir = options.folder("gowalla")
    train_lines, test_lines = (read_id_lines(data_dir / f"{part}.txt") for part in ("train", "test"))
    # From here on users and items are positions in these sorted lists.
    user_ids = np.union1d(_users_with_items(train_lines), _users_with_items(test_lines))
    item_ids = np.union1d(train_lines.items, test_lines.items)
    if not len(train_lines.items):
        raise DataError(f"{train_lines.path} has users but not one item: a line is `user item item ...`.")

    train, train_repeats = _distinct(train_lines, user_ids, item_ids)
    test, test_repeats = _distinct(test_lines, user_ids, item_ids)
    is_overlap = np.isin(test, train)
    test = test[~is_overlap]
    is_valid = _hold_out(*np.divmod(train, len(item_ids)), options)

    def grouped(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the offsets per user and the items. `pairs` are user * items + item, users ascending."""
        lengths = np.bincount(pairs // len(item_ids), minlength=len(user_ids))
        return offsets_of(lengths), item_ids[pairs % len(item_ids)]

    everything = grouped(train)
    kept, held_out = grouped(train[~is_valid]), grouped(train[is_valid])
    columns = {
        "train": {"positives": kept},
        "valid": {"positives": held_out, "history": kept},
        "test": {"positives": grouped(test), "history": everything},
    }
    for split, lists in columns.items():
        has_positives = np.flatnonzero(np.diff(lists["positives"][0]))
        for start in range(0, len(has_positives), _USERS_PER_PIECE):
            user = has_positives[start : start + _USERS_PER_PIECE]
            columns = {
                name: list_column(values, offsets[user], offsets[user + 1]) for name, (offsets, values) in lists.items()
            }
            writer.write(split, pa.table({"user_id": user_ids[user], **columns}))
    writer.write("items", pa.table({"item_id": item_ids}))

    is_tested = np.bincount(test // len(item_ids), minlength=len(user_ids)) > 0
    has_history = np.diff(everything[0]) > 0
    counts = {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(train) + len(test),
        "train_interactions": len(train),
        "valid_interactions": int(is_valid.sum()),
        "test_interactions": len(test),
        "repeats_dropped": train_repeats + test_repeats,
        "test_in_train_dropped": int(is_overlap.sum()),
        "test_users_without_history": int((is_tested & ~has_history).sum()),
    }
    checked = check_published(PUBLISHED, (train_lines.sha256, test_lines.sha256), counts)
    resolved = options.model_dump(mode="json") | {"data_dir": str(data_dir)}
    return writer.finish("gowalla", resolved, counts, counts_checked=checked)


def _users_with_items(lines: IdLines) -> np.ndarray:
    return lines.users[np.diff(lines.offsets) > 0]


def _distinct(lines: IdLines, user_ids: np.ndarray, item_ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the distinct user * items + item, by user, then in file order, and the number of repeats."""
    user = np.searchsorted(user_ids, lines.users)[lines.owners()]
    pair = user * len(item_ids) + np.searchsorted(item_ids, lines.items)
    _, first = np.unique(pair, return_index=True)
    first = first[np.lexsort((first, user[first]))]
    return pair[first], len(pair) - len(first)


def _hold_out(user: np.ndarray, item: np.ndarray, options: Options) -> np.ndarray:
    """Return a mask of each user's items held out for valid: at least one of two or more, never all.

    Samples without replacement by the smallest exponential keys (Efraimidis and Spirakis 2006).
    """
    owned = np.bincount(user)
    quota = np.clip(np.rint(owned * options.valid_share).astype(np.int64), 1, np.maximum(owned - 1, 0))
    if options.valid_share == 0:
        quota[:] = 0
    rate = np.bincount(item)[item].astype(np.float64) ** options.valid_power
    wait = -np.log1p(-np.random.default_rng(options.seed).random(len(user))) / rate
    order = np.lexsort((wait, user))
    place = np.arange(len(user)) - offsets_of(owned)[user]  # `user` ascends, so order[j] belongs to user[j]
    is_valid = np.zeros(len(user), bool)
    is_valid[order[place < quota[user]]] = True
    return is_valid
