"""Slices of users and items by which metrics are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.config.base import Side
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.held_out import HeldOut
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.storage.arrow_values import python_values

HEAD_SHARE = 0.2  # share of the items with interactions in train that are the head
MOST_VALUES = 12  # values of a column with a label of their own; the rest are "others"
OTHERS, NONE = "others", "none"


@dataclass(frozen=True)
class Slice:
    """A partition of this rank's users, or of all items, into labeled parts."""

    name: str
    side: Side
    labels: tuple[str, ...]
    part: np.ndarray  # int64: (users of this rank,) or (I,)


def make_slices(
    names: Sequence[str], sources: FeatureDataset, held_out: HeldOut, split: str, count_I: np.ndarray
) -> list[Slice]:
    """Return the slices of these names; labels are the same on all ranks.

    Raises ConfigError for an unknown column and for one of lists.
    """
    made = []
    for name in names:
        side, _, column = name.partition(".")
        if name == "tail":
            made.append(_tail(count_I))
        elif name == "popularity":
            made.append(Slice(name, "item", _OCTAVES, _octave(count_I)))
        elif name == "activity":
            made.append(Slice(name, "user", _OCTAVES, _octave(held_out.seen.lengths)))
        elif side == "item":
            labels, part_I = parts_of(column_of(sources.dataset.items, column, name))
            made.append(Slice(name, "item", labels, part_I))
        else:
            made.append(_of_users(name, column, sources, held_out, split))
    return made


def _tail(count_I: np.ndarray) -> Slice:
    """Return items without interactions in train, the fifth of the others with most, and the rest; ties by row."""
    order = np.argsort(-count_I, kind="stable")
    num_known = int((count_I > 0).sum())
    part_I = np.zeros(len(count_I), np.int64)
    part_I[order[:num_known]] = 1
    part_I[order[: int(np.ceil(HEAD_SHARE * num_known))]] = 2
    return Slice(
        "tail", "item", ("cold (no interactions in train)", "tail", "head (top fifth by interactions)"), part_I
    )


def _octave(count: np.ndarray) -> np.ndarray:
    """Return 0 for count 0, 1 for 1, 2 for 2-3, 3 for 4-7 and so on."""
    return np.frexp(np.asarray(count, np.float64))[1].astype(np.int64)


_OCTAVES = ("0", "1", *(f"{1 << power:,} - {(2 << power) - 1:,}" for power in range(1, 40)))


def _of_users(name: str, column: str, sources: FeatureDataset, held_out: HeldOut, split_name: str) -> Slice:
    """Return the slice by a column of the evaluated rows, else of users/."""
    split, users = sources.dataset.split(split_name), sources.dataset.users
    place = split if split.has(column) or users is None else users
    values = column_of(place, column, name)
    labels, part = parts_of(values)
    ids = one_chunk(place.table([USER_ID])[USER_ID])
    row_B = pc.index_in(held_out.user_ids.cast(ids.type), value_set=ids)
    part_B = pa.array(part).take(row_B).fill_null(len(labels)).to_numpy(zero_copy_only=False)
    return Slice(name, "user", (*labels, "not in users/"), part_B)


def column_of(split: Split, column: str, name: str) -> pa.Array:
    """Return the whole column. Raises ConfigError, with the option `name`, for an unknown column and for lists."""
    if not split.has(column):
        known = [each for each in split.columns if each not in (USER_ID, ITEM_ID)]
        raise ConfigError(
            f"The slice {name!r} needs column {column!r}, which is not in {split.folder}{nearest(column, known)}."
        )
    values = one_chunk(split.table([column])[column])
    if pa.types.is_nested(values.type):
        raise ConfigError(
            f"The slice {name!r} needs column {column!r} of {split.folder}, which has the type {values.type}. Give a "
            "column with one value per row."
        )
    return values


def parts_of(values: pa.Array) -> tuple[tuple[str, ...], np.ndarray]:
    """Return labels and the label number of each row: one label per value, or quartiles of many numbers."""
    is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    distinct = pc.value_counts(values.drop_null())
    if is_number and len(distinct) > MOST_VALUES:
        number = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        known = np.isfinite(number)
        inner = np.unique(np.quantile(number[known], [0.25, 0.5, 0.75]))
        ends = [f"{end:g}" for end in (number[known].min(), *inner, number[known].max())]
        labels = [f"{low} to {high}" for low, high in pairwise(ends)]
        part = np.where(known, np.searchsorted(inner, number, side="right"), len(labels))
        return (*labels, NONE), part.astype(np.int64)
    # Most frequent first; of equals in their order as text.
    names, counts = map(python_values, distinct.flatten())
    order = sorted(range(len(names)), key=lambda place: (-counts[place], str(names[place])))[:MOST_VALUES]
    chosen = distinct.field(0).take(pa.array(order, pa.int64()))
    part_of = pc.index_in(values, value_set=chosen).fill_null(len(chosen)).to_numpy(zero_copy_only=False)
    part_of = np.where(values.is_null().to_numpy(zero_copy_only=False), len(chosen) + 1, part_of)
    return (*(str(names[place]) for place in order), OTHERS, NONE), part_of.astype(np.int64)
