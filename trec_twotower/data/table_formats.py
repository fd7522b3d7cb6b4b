"""Detection of table formats: some Parquet files in their folders are no longer part of the table."""

from __future__ import annotations

from pathlib import Path

from trec_twotower.errors import DataError

# How the current snapshot of each format is written as plain Parquet.
_EXPORTS = {
    "Delta Lake": "pq.write_table(deltalake.DeltaTable(FOLDER).to_pyarrow_table(), 'export.parquet')",
    "Apache Iceberg": "pq.write_table(pyiceberg.table.StaticTable.from_metadata(METADATA_JSON).scan().to_arrow(), "
    "'export.parquet')",
    "Apache Hudi": "spark.read.format('hudi').load(FOLDER).write.parquet('export')",
}


def table_format(folder: Path) -> str | None:
    """Return the name of the table format whose root folder this is, or None for a plain folder."""
    if (folder / "_delta_log").is_dir():
        return "Delta Lake"
    if (folder / ".hoodie").is_dir():
        return "Apache Hudi"
    metadata = folder / "metadata"
    if metadata.is_dir() and any(path.name.endswith(".metadata.json") for path in metadata.iterdir()):
        return "Apache Iceberg"
    return None


def refuse_table_format(folder: Path) -> None:
    """Raise DataError if `folder` is the root of a Delta Lake, Apache Iceberg or Apache Hudi table.

    Such a folder keeps files that updates, deletes and compactions have replaced: reading all of its Parquet files
    would count rows twice or restore deleted rows.
    """
    name = table_format(folder)
    if name is not None:
        raise DataError(
            f"{folder} is a table of {name}: its folder also holds files that are no longer part of the table, so its "
            f"Parquet files cannot be read one by one. Export the current snapshot as Parquet and give that, such as "
            f"{_EXPORTS[name]}."
        )
