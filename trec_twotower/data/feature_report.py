"""Report of the features: null, unknown and new values of each column, and collisions in its table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import HISTORY, FeatureSpec
from trec_twotower.config.model import TableSpec
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.hashed import bucket, hashings
from trec_twotower.data.features.lists import key_lists
from trec_twotower.data.features.reader import FeatureRows
from trec_twotower.data.features.transform import reader_of
from trec_twotower.data.split import Split
from trec_twotower.ops.hashing import id_keys


@dataclass(frozen=True)
class Coverage:
    """The figures of one feature; shares are None where they do not apply."""

    side: Side
    name: str
    kind: str
    null: float  # share of rows that are null
    distinct: int | None = None  # number of distinct ids or tokens
    buckets: int | None = None
    used: float | None = None  # share of buckets that have an id
    collided: float | None = None  # share of distinct ids that share all their table rows with another id
    unknown: float | None = None  # share of values that are not in the vocabulary
    # Share of the values of valid/, test/ and items without interactions that training does not see.
    new: float | None = None


def coverage(sources: FeatureDataset) -> list[Coverage]:
    """Compute the figures of all features, one pass per feature. Memory grows with the distinct ids of one feature."""
    dataset = sources.dataset
    elsewhere: list[Part] = [(dataset.split(name), None) for name in ("valid", "test") if dataset.has(name)]
    interactions_I = sources.item_counts() > 0
    found = []
    for feature in sources.context:
        found.append(_of(sources, "user", feature, [(dataset.train, None)], elsewhere))
    for feature in sources.static:
        assert dataset.users is not None
        found.append(_of(sources, "user", feature, [(dataset.users, None)], []))
    for feature in sources.schema.item:
        found.append(
            _of(sources, "item", feature, [(dataset.items, interactions_I)], [(dataset.items, ~interactions_I)])
        )
    return found


@dataclass(frozen=True)
class OwnItems:
    """How often the lists of training rows contain the target item of the row."""

    rows: int  # rows with such a list
    elements: int  # elements that are the target
    columns: list[str]  # columns of the lists

    @property
    def describe(self) -> str:
        """Return a message about the effect of `data.target_in_history: drop`."""
        return (
            f"data.target_in_history: drop removes {self.elements:,} elements from {', '.join(self.columns)}, in "
            f"{self.rows:,} rows of train/ with the same target item"
        )


def own_items(sources: FeatureDataset) -> OwnItems | None:
    """Return the counts from a pass over train/; None if rows have no target item or no lists."""
    if sources.rows == "user":
        return None
    columns = [each[0] for each in sources.lists_of_items()]
    if not columns:
        return None
    rows = elements = 0
    for group, table in sources.dataset.train.tables([*columns, ITEM_ID]):
        own = id_keys(one_chunk(table[ITEM_ID]), str(group))
        has_own = np.zeros(len(table), bool)
        for column in columns:
            lists = key_lists(one_chunk(table[column]), str(group))
            is_own = lists.values == own[lists.rows]
            has_own[lists.rows[is_own]] = True
            elements += int(is_own.sum())
        rows += int(has_own.sum())
    return OwnItems(rows, elements, columns)


Part = tuple[Split, np.ndarray | None]  # a split, and a mask of its rows or None for all


def _of(
    sources: FeatureDataset,
    side: Side,
    feature: FeatureSpec,
    trained: Iterable[Part],
    elsewhere: Iterable[Part],
) -> Coverage:
    reader = reader_of(feature)
    num_rows = nulls = values = unknown = strangers = others = 0
    has_unknown = False
    known = np.empty(0, np.int64)
    for rows in _rows(sources, side, feature, trained):
        num_rows += len(rows.table)
        nulls += 0 if reader.null_is_value else rows.array.null_count
        if reader.has_keys:
            keys = reader.keys(rows)
            known = np.union1d(known, keys)
            values += len(keys)
            if (count := reader.num_unknown(rows)) is not None:
                has_unknown, unknown = True, unknown + count
    null = nulls / max(num_rows, 1)
    if not reader.has_keys:
        return Coverage(side, feature.name, feature.kind, null)
    for rows in _rows(sources, side, feature, elsewhere):
        keys = reader.keys(rows)
        others, strangers = others + len(keys), strangers + int((~np.isin(keys, known)).sum())
    settings = sources.schema.table_of(feature)
    used, collided = _collisions(feature, reader.key_settings(settings), known)
    return Coverage(
        side,
        feature.name,
        feature.kind,
        null,
        len(known),
        settings.buckets,
        used,
        collided,
        unknown / max(values, 1) if has_unknown else None,
        strangers / others if others else None,
    )


def _rows(sources: FeatureDataset, side: Side, feature: FeatureSpec, parts: Iterable[Part]) -> Iterator[FeatureRows]:
    """Yield the columns that the feature reads first, per row group."""
    statistics = sources.statistics.get(f"{side}:{feature.name}")
    for split, mask in parts:
        columns = list(feature.value_columns)
        if sources.rows == "user" and columns == [HISTORY] and split.name == "train":
            columns = [POSITIVES]  # a part of which is sampled as history
        if not all(split.has(column) for column in columns):
            continue
        for group, table in split.tables(columns):
            if mask is not None:
                table = table.filter(pa.array(mask[group.first_row : group.first_row + group.num_rows]))
            table = table.select(columns).rename_columns(list(feature.value_columns))
            yield FeatureRows(feature, table, str(group), statistics=statistics)


def _collisions(
    feature: FeatureSpec, settings: TableSpec | None, keys: np.ndarray
) -> tuple[float | None, float | None]:
    """Return the share of buckets with a key, and the share of keys that share their bucket."""
    if settings is None:
        return None, None
    rows = np.stack([bucket(each, keys) for _, each in hashings(feature, settings)], axis=1)
    _, place, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    collided = float((counts[place.reshape(-1)] > 1).mean()) if len(keys) else 0.0
    return len(np.unique(rows)) / settings.buckets, collided


def describe_coverage(sources: FeatureDataset) -> str:
    """Return the figures of all features as a table with a legend."""
    lines = [
        f"{'feature':<28} {'kind':<9} {'null':>7} {'distinct':>11} {'rows':>11} {'used':>7} {'collided':>9} "
        f"{'unknown':>8} {'new':>7}"
    ]
    for each in coverage(sources):
        counts = [f"{value:,}" if value is not None else "-" for value in (each.distinct, each.buckets)]
        shares = [f"{v:.2%}" if v is not None else "-" for v in (each.null, each.used, each.collided, each.unknown)]
        new = f"{each.new:.2%}" if each.new is not None else "-"
        lines.append(
            f"{each.side + ' ' + each.name:<28} {each.kind:<9} {shares[0]:>7} {counts[0]:>11} {counts[1]:>11} "
            f"{shares[1]:>7} {shares[2]:>9} {shares[3]:>8} {new:>7}"
        )
    lines += [
        "null: share of rows. distinct: ids in training. used: share of table rows that have an id. collided: ids",
        "that share all their table rows with another id. unknown: values not in the vocabulary. new: values of",
        "valid/, test/ and items without interactions in train/ that training never sees.",
    ]
    if (own := own_items(sources)) is not None:
        advice = (
            ""
            if not own.rows
            else ": unless users interact with the same items repeatedly, set data.target_in_history: drop"
        )
        share, where = own.rows / max(sources.dataset.train.num_rows, 1), " or ".join(own.columns)
        lines.append(f"{share:.2%} of the rows of train/ have their target item in their {where}{advice}.")
    return "\n".join(lines)
