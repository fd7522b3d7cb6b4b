"""Hash a column as training does, for offline jobs."""

from __future__ import annotations

import pyarrow as pa

from trec_twotower.config.feature_spec import FeatureSpec, TableFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.arrow_types import plain_table
from trec_twotower.data.features.transform import check_kind, transform
from trec_twotower.errors import ConfigError


def hash_column(feature: FeatureSpec, array: pa.Array, table: TableSpec | None = None) -> pa.Array:
    """Return the table rows that training looks up for a column: integers, or lists of them for a bag.

    For offline jobs (Spark, Ray, DuckDB), which need neither torch nor a run. `table` is the declared table that the
    feature names; a feature with a table of its own needs none. Null elements of a bag are dropped and long lists are
    cut, as in training. Raises DataError where the column does not fit the kind.
    """
    if not isinstance(feature, TableFeature) or len(feature.value_columns) > 1:
        raise ConfigError(
            f"feature {feature.name!r} is a {feature.kind}, whose column is not hashed: choose an id, "
            "category, bag, sequence or text."
        )
    spec = table or feature.own_table
    if spec is None or (table is not None and feature.table is None):
        wanted = f"names table {feature.table!r}: give its" if feature.table else "has a table of its own: give no"
        raise ConfigError(f"feature {feature.name!r} {wanted} TableSpec.")
    if spec.hashes == 2:
        raise ConfigError(f"feature {feature.name!r} has two rows per id, but this returns one: set hashes to 1.")
    where = f"the column given for feature {feature.name!r}"
    rows = plain_table(pa.table({feature.source_column: array}), [feature.source_column])
    check_kind(feature, rows.schema.types[0], where)
    ids_alone = {"weights": None, "times": None, "half_life_days": None, "actions": None, "attributes": ()}
    settings = {name: value for name, value in ids_alone.items() if name in type(feature).model_fields}
    columns = transform([feature.model_copy(update=settings)], {feature.table_name: spec}, {}, rows, where)
    found = columns.sparse[feature.name]
    if found.is_single:
        return pa.array(found.values)
    return pa.LargeListArray.from_arrays(pa.array(found.offsets), pa.array(found.values))
