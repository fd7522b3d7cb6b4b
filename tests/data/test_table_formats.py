"""Folders of table formats, whose files are not all part of the table, are recognised."""

from __future__ import annotations

import pytest

from trec_twotower.data.table_formats import refuse_table_format
from trec_twotower.errors import DataError


@pytest.mark.parametrize(
    ("made", "parts"),
    [
        ("_delta_log/00000000000000000000.json", ["Delta Lake", "deltalake.DeltaTable"]),
        ("metadata/00000-abc.metadata.json", ["Apache Iceberg", "pyiceberg"]),
        ("metadata/v3.metadata.json", ["Apache Iceberg", "current snapshot"]),
        (".hoodie/hoodie.properties", ["Apache Hudi", "spark.read"]),
    ],
)
def test_a_folder_of_a_table_format_is_refused_with_the_way_to_export_it(tmp_path, made, parts):
    path = tmp_path / made
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(DataError) as error:
        refuse_table_format(tmp_path)
    assert all(part in str(error.value) for part in [str(tmp_path), *parts]), error.value


def test_plain_folders_are_not_refused(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "columns.json").write_text("{}")
    (tmp_path / "_delta_log").write_text("a file of this name is no log of commits")
    refuse_table_format(tmp_path)
    refuse_table_format(tmp_path / "missing")
