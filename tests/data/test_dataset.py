"""A dataset folder that is not what it should be is told from one that is; its items are found by their ids."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.item_table import Catalogue, find_id
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError

TRAIN = pa.table({"user_id": [1, 2, 3], "item_id": [10, 20, 10]})
ITEMS = pa.table({"item_id": [20, 10, 30], "title": ["b", "a", "c"]})


@pytest.fixture
def dataset_dir(tmp_path, write_dataset):
    return write_dataset(tmp_path / "world", train=TRAIN, items=ITEMS, test=TRAIN)


def refused(folder, message, read=lambda dataset: (dataset.train, dataset.items, dataset.users)):
    with pytest.raises(DataError, match=message):
        read(Dataset(folder))


def rewrite(path, table):
    pq.write_table(table, path, write_page_checksum=True)


# The folder


def test_a_missing_folder_names_the_nearest(dataset_dir):
    refused(dataset_dir.parent / "wordl", r"no dataset folder .*wordl \(nearest: 'world'\): create it with `prepare`")


def test_a_folder_without_train_or_items_is_no_dataset(dataset_dir):
    (dataset_dir / "items").rename(dataset_dir / "things")
    refused(dataset_dir, r"world is no dataset: it has no folder items/")


def test_a_missing_part_names_the_nearest(dataset_dir):
    refused(dataset_dir, r"has no part 'tset' \(nearest: 'test'\)", lambda dataset: dataset.split("tset"))
    assert Dataset(dataset_dir).has("test") and not Dataset(dataset_dir).has("valid")
    assert Dataset(dataset_dir).users is None


def test_a_part_without_files_or_without_rows_is_refused(dataset_dir):
    rewrite(dataset_dir / "train" / "part-0.parquet", TRAIN.slice(0, 0))
    refused(dataset_dir, r"train has 1 files but no rows")
    (dataset_dir / "train" / "part-0.parquet").unlink()
    refused(dataset_dir, r"train contains no \*\.parquet files: run `trec-twotower prepare`")


def test_files_in_folders_below_are_refused_and_not_left_out(dataset_dir):
    """But for those that a writer has under way."""
    below = dataset_dir / "train" / "day=1"
    for folder in (below, dataset_dir / "train" / "_temporary"):
        folder.mkdir()
        shutil.copy(dataset_dir / "train" / "part-0.parquet", folder / "part-1.parquet")
    refused(dataset_dir, r"train has day=1/part-1\.parquet in a subfolder, but a part must not have subfolders")
    shutil.rmtree(below)
    assert Dataset(dataset_dir).train.num_rows == TRAIN.num_rows


@pytest.mark.parametrize(
    ("part", "renamed", "message"),
    [
        ("train", "user", r"train has no column 'user_id' \(nearest: 'user'\): every row needs its user"),
        ("items", "id_item", r"items has no column 'item_id' \(nearest: 'id_item'\): every row needs its item"),
    ],
)
def test_rows_must_name_what_they_are_about(dataset_dir, part, renamed, message):
    path = dataset_dir / part / "part-0.parquet"
    table = pq.read_table(path)
    rewrite(path, table.rename_columns([renamed, *table.column_names[1:]]))
    refused(dataset_dir, message)


def test_ids_that_are_no_ids_are_refused(dataset_dir):
    path = dataset_dir / "items" / "part-0.parquet"
    rewrite(path, ITEMS.set_column(0, "item_id", pa.array([1.0, 2.0, 3.0])))
    refused(dataset_dir, r"items: column 'item_id' is double, but ids are integers or text: cast it")


def test_an_unknown_column_names_the_nearest(dataset_dir):
    with pytest.raises(ConfigError, match=r"no column 'titel', which feature 'x' reads \(nearest: 'title'\)"):
        Dataset(dataset_dir).items.require("titel", "feature 'x' reads")
    assert Dataset(dataset_dir).items.require("title", "") == pa.string()


def test_files_must_agree_in_their_types(dataset_dir):
    path = dataset_dir / "train" / "part-1.parquet"
    rewrite(path, TRAIN.set_column(1, "item_id", pa.array(["10", "20", "30"])))
    refused(dataset_dir, r"part-1\.parquet: column 'item_id' is string, but int64 in the first file")


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_column_that_only_some_files_have_is_free_until_someone_asks_for_it(dataset_dir, lacking):
    """Whichever file comes first; a weight that half of the files have is not left out without a word."""
    tables = [TRAIN, TRAIN.append_column("weight", pa.array([1.0, 2.0, 3.0]))]
    for number, table in enumerate(tables if lacking == 0 else tables[::-1]):
        rewrite(dataset_dir / "train" / f"part-{number}.parquet", table)
    split = Dataset(dataset_dir).train
    assert split.table(["item_id"])["item_id"].to_pylist() == [10, 20, 10] * 2
    with pytest.raises(DataError, match=rf"part-{lacking}\.parquet has no column 'weight', which other files of"):
        split.has("weight")


def test_order_of_columns_and_further_columns_are_free(dataset_dir):
    more = pa.table({"extra": [1.0], "item_id": [30], "user_id": [4]})
    rewrite(dataset_dir / "train" / "part-1.parquet", more)
    split = Dataset(dataset_dir).train
    assert split.table(["item_id", "user_id"]).to_pydict() == {"item_id": [10, 20, 10, 30], "user_id": [1, 2, 3, 4]}


def test_rows_are_counted_through_files_and_groups(tmp_path, write_dataset):
    """Empty files and empty groups take no place."""
    parts = [TRAIN, TRAIN.slice(0, 0), pa.concat_tables([TRAIN] * 2)]
    split = Split(write_dataset(tmp_path / "d", row_group_size=2, train=parts) / "train", "train")
    assert split.num_rows == 9
    assert [(g.path.name, g.number, g.first_row, g.num_rows) for g in split.row_groups] == [
        ("part-0.parquet", 0, 0, 2),
        ("part-0.parquet", 1, 2, 1),
        ("part-2.parquet", 0, 3, 2),
        ("part-2.parquet", 1, 5, 2),
        ("part-2.parquet", 2, 7, 2),
    ]
    whole = pa.concat_tables(parts)
    for group, table in split.tables(["item_id"]):
        expected = whole["item_id"].slice(group.first_row, group.num_rows).to_pylist()
        assert table["item_id"].to_pylist() == expected and table["item_id"].num_chunks == 1


# Damage


def test_every_cut_of_a_file_is_noticed_and_named(dataset_dir):
    path = dataset_dir / "train" / "part-0.parquet"
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        refused(dataset_dir, r"train/part-0\.parquet cannot be read as Parquet")
    path.write_bytes(b"user_id,item_id\n1,10\n")
    refused(dataset_dir, r"train/part-0\.parquet cannot be read as Parquet")


@pytest.mark.parametrize("name", ["item_id", "words"])
@pytest.mark.parametrize("block_rows", [4, 10])
def test_a_damaged_page_is_named_with_row_group_and_column(tmp_path, name, block_rows):
    table = pa.table({"user_id": range(20), "item_id": range(20), "words": [[str(row)] * 3 for row in range(20)]})
    (tmp_path / "train").mkdir()
    path = tmp_path / "train/part-0.parquet"
    pq.write_table(table, path, row_group_size=10, use_dictionary=False, write_page_checksum=True)
    chunks = pq.ParquetFile(path).metadata.row_group(1)
    [chunk] = [chunk for number in range(3) if (chunk := chunks.column(number)).path_in_schema.startswith(name)]
    damaged = bytearray(path.read_bytes())
    damaged[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 1
    path.write_bytes(damaged)
    split = Split(tmp_path / "train", "train")
    first, second = split.row_groups
    assert sum(map(len, split.blocks(first, table.column_names, block_rows))) == 10
    with pytest.raises(DataError, match=rf"part-0\.parquet, row group 1, column '{name}': cannot be read: "):
        list(split.blocks(second, table.column_names, block_rows))


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path, write_dataset, rng):
    """The checksums of pages tell what a changed value alone would not."""
    table = pa.table(
        {"user_id": np.arange(300), "item_id": [f"i{n}" for n in range(300)], "h": [[n] for n in range(300)]}
    )
    split_dir = write_dataset(tmp_path / "d", train=table) / "train"
    path = split_dir / "part-0.parquet"
    whole = path.read_bytes()
    noticed = 0
    for place in rng.integers(0, len(whole), 300):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert Split(split_dir, "train").table(table.column_names).equals(table)
        except DataError as error:
            assert "part-0.parquet" in str(error)
            noticed += 1
    assert noticed > 200


def test_the_fingerprint_changes_with_the_rows(dataset_dir):
    def both():
        return Dataset(dataset_dir).fingerprint, Dataset(dataset_dir).described_fingerprint

    first = both()
    assert both() == first and first[1] is None
    assert re.fullmatch("[0-9a-f]{12}", first[0])
    found = {first}
    (dataset_dir / "dataset.yaml").write_text("files: {train/part-0.parquet: {sha256: aa}}")
    found.add(both())
    (dataset_dir / "dataset.yaml").write_text("files: {train/part-0.parquet: {sha256: bb}}")
    found.add(both())
    rewrite(dataset_dir / "train" / "part-1.parquet", TRAIN)
    found.add(both())
    rewrite(dataset_dir / "train" / "part-1.parquet", pa.concat_tables([TRAIN] * 50))
    found.add(both())
    (dataset_dir / "train" / "part-1.parquet").rename(dataset_dir / "train" / "part-2.parquet")
    found.add(both())
    rewrite(dataset_dir / "test" / "part-1.parquet", TRAIN)
    found.add(both())
    assert len(found) == 7


def test_files_of_items_and_users_are_no_part_of_the_fingerprint(dataset_dir):
    first = Dataset(dataset_dir).fingerprint
    rewrite(dataset_dir / "items" / "part-1.parquet", pa.table({"item_id": [40], "title": ["d"]}))
    (dataset_dir / "users").mkdir()
    rewrite(dataset_dir / "users" / "part-0.parquet", pa.table({"user_id": [1]}))
    assert Dataset(dataset_dir).fingerprint == first


def test_a_part_behind_a_link_is_read_and_fingerprinted_like_a_folder(dataset_dir):
    first = Dataset(dataset_dir).fingerprint
    elsewhere = dataset_dir.parent / "elsewhere"
    (dataset_dir / "train").rename(elsewhere)
    (dataset_dir / "train").symlink_to(elsewhere)
    linked = dataset_dir.parent / "link"
    linked.symlink_to(dataset_dir)
    for place in (dataset_dir, linked):
        assert Dataset(place).fingerprint == first and Dataset(place).train.num_rows == TRAIN.num_rows
    rewrite(elsewhere / "part-1.parquet", TRAIN)
    assert Dataset(linked).fingerprint != first and Dataset(linked).train.num_rows == 2 * TRAIN.num_rows


def test_links_to_files_are_read_and_links_to_nothing_are_named(dataset_dir):
    part = dataset_dir / "train" / "part-0.parquet"
    store = part.rename(dataset_dir.parent / "blob")
    part.symlink_to(store)
    assert Dataset(dataset_dir).train.num_rows == TRAIN.num_rows
    store.rename(dataset_dir.parent / "moved")
    refused(dataset_dir, r"train/part-0\.parquet cannot be read as Parquet: .*No such file")
    with pytest.raises(DataError, match=r"train/part-0\.parquet is a link to .*blob, which is not there"):
        _ = Dataset(dataset_dir).fingerprint


def test_files_behind_a_link_to_a_folder_below_are_refused(dataset_dir):
    elsewhere = dataset_dir.parent / "more"
    elsewhere.mkdir()
    rewrite(elsewhere / "part-9.parquet", TRAIN)
    (dataset_dir / "train" / "more").symlink_to(elsewhere)
    refused(dataset_dir, r"train has more/part-9\.parquet in a subfolder")


@pytest.mark.parametrize("name", ["._part-0.parquet", "_part-1.parquet", ".part-2.parquet"])
def test_a_writers_own_files_are_left_alone(dataset_dir, name):
    first = Dataset(dataset_dir).fingerprint
    (dataset_dir / "train" / name).write_bytes(b"\0\5\26\7")
    assert Dataset(dataset_dir).train.num_rows == TRAIN.num_rows and Dataset(dataset_dir).fingerprint == first


@pytest.mark.parametrize("name", ["part-1.PARQUET", "part-1.pq", "more.parq"])
def test_parquet_files_of_other_endings_are_refused_and_not_left_out(dataset_dir, name):
    rewrite(dataset_dir / "train" / name, TRAIN)
    refused(dataset_dir, re.escape(f"train/{name} is ignored, because its name does not end with .parquet: rename it"))


def test_a_file_whose_name_is_no_text_is_refused(dataset_dir):
    part = os.fsencode(dataset_dir / "train")
    os.rename(part + b"/part-0.parquet", part + b"/\xff.parquet")
    refused(dataset_dir, r"train has a file whose name is not UTF-8: b'\\xff\.parquet'. Rename it")


@pytest.mark.parametrize("part", ["train", "items", "test"])
def test_a_part_that_is_a_table_of_another_format_is_refused(dataset_dir, part):
    log = dataset_dir / part / "_delta_log"
    log.mkdir()
    (log / "00000000000000000000.json").write_text("{}")
    refused(dataset_dir, f"{part} is a table of Delta Lake", lambda dataset: dataset.split(part))
    shutil.rmtree(log)
    table = dataset_dir.parent / "iceberg"
    (table / "metadata").mkdir(parents=True)
    (table / "metadata" / "v1.metadata.json").write_text("{}")
    (dataset_dir / part).rename(table / "data")
    (dataset_dir / part).symlink_to(table / "data")
    refused(dataset_dir, "iceberg is a table of Apache Iceberg", lambda dataset: dataset.split(part))


def test_a_described_dataset_is_what_its_description_says(tmp_path):
    """Every flipped bit of a footer, of which pyarrow may make other values or abort; every cut and changed digit."""
    with DatasetWriter(tmp_path / "d") as writer:
        writer.write("train", TRAIN)
        writer.write("items", ITEMS)
        writer.finish("here", {}, {"users": 3})
    path, description = tmp_path / "d/train/part-00000.parquet", tmp_path / "d/dataset.yaml"
    whole, said = path.read_bytes(), description.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    for place in range(len(whole) - 8 - footer, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(tmp_path / "d", r"part-00000\.parquet differs from .*dataset\.yaml")
    path.write_bytes(whole)
    for changed in (*(said[:size] for size in range(1, len(said) - 1, 29)), said.replace(b"users: 3", b"users: 4")):
        description.write_bytes(changed)
        with pytest.raises((ConfigError, DataError), match=r"dataset\.yaml"):
            Dataset(tmp_path / "d").train  # noqa: B018
    description.write_bytes(said)
    assert Dataset(tmp_path / "d").train.num_rows == 3


def test_files_that_a_description_lacks_or_that_lack_are_named_but_where_a_folder_grows(tmp_path):
    with DatasetWriter(tmp_path / "d", rows_per_group=1, rows_per_part=1) as writer:
        writer.write("train", TRAIN)
        writer.write("items", ITEMS)
        writer.finish("here", {}, {})
    train, items = tmp_path / "d/train", tmp_path / "d/items"
    assert len(list(train.glob("*"))) == len(TRAIN) == 3
    (train / "part-00001.parquet").rename(train / "part-1.parquet")
    refused(
        tmp_path / "d",
        r"d/train differs from .*dataset\.yaml: it has no part-00001\.parquet, listed there and also has "
        r"part-1\.parquet, unlisted there\. Create the dataset again; or, .* remove dataset\.yaml",
    )
    assert Dataset(tmp_path / "d", grows=True).train.num_rows == 3
    assert Dataset(tmp_path / "d", {"train": {"part-1.parquet": (train / "part-1.parquet").stat().st_size}}).train
    for number in range(4):
        (items / f"more-{number}.parquet").write_bytes((items / "part-00000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"items .* also has more-0\.parquet and 3 other files, unlisted there"):
        Dataset(tmp_path / "d").items  # noqa: B018
    (tmp_path / "d/dataset.yaml").unlink()
    assert Dataset(tmp_path / "d").train.num_rows == 3


def test_urls_of_unknown_schemes_and_those_whose_library_is_missing_are_mistakes_in_the_config(monkeypatch):
    with pytest.raises(ConfigError, match=r"ss3://b/d, but fsspec knows no ss3:// \(nearest: 's3'\)"):
        Dataset("ss3://b/d")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://b/d, but the library for s3:// is not installed .*: pip install s3fs"):
        Dataset("s3://b/d")


def test_a_folder_may_describe_itself_or_not(dataset_dir):
    assert Dataset(dataset_dir).description == {}
    (dataset_dir / "dataset.yaml").touch()
    assert Dataset(dataset_dir).description == {}
    (dataset_dir / "dataset.yaml").write_text("source: elsewhere")
    assert Dataset(dataset_dir).description == {"source": "elsewhere"}


# The catalogue

TABLES = {"item": TableSpec(buckets=1000, dim=2, hashing="modulo")}
ITEM_ID = build_feature(name="item_id", kind="id", table="item")


def catalogue(folder, *features, **statistics) -> Catalogue:
    return Catalogue(Split(folder / "items", "items"), "item_id", list(features), TABLES, statistics)


@pytest.mark.parametrize("kind", [pa.int64(), pa.int16(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_items_are_found_by_their_ids(tmp_path, write_dataset, rng, kind):
    """Rows follow the files, whatever the ids are and however many files there are."""
    numbers = rng.permutation(500)[:60].tolist()
    ids = numbers if pa.types.is_integer(kind) else [f"item {n}" for n in numbers]
    whole = pa.table({"item_id": pa.array(ids, kind), "title": [f"t{n}" for n in numbers]})
    folder = write_dataset(tmp_path / "d", row_group_size=7, items=[whole[:25], whole[25:25], whole[25:]])
    items = catalogue(folder)
    assert len(items) == 60
    assert items.ids.to_pylist() == ids
    asked = rng.integers(0, 500, 200).tolist()
    ids_asked = asked if pa.types.is_integer(kind) else [f"item {n}" for n in asked]
    expected = [numbers.index(n) if n in numbers else -1 for n in asked]
    assert items.rows_of(pa.array(ids_asked, kind), "here").tolist() == expected
    pairs = [ids_asked[i : i + 2] for i in range(0, 200, 2)]
    lists = items.rows_of_lists(pa.array(pairs, pa.list_(kind)), "here")
    assert lists.values.tolist() == expected and lists.lengths.tolist() == [2] * 100
    shown = [44, 3, 3, 0, 59]
    assert items.words(np.array(shown)) == [{"item_id": ids[r], "title": f"t{numbers[r]}"} for r in shown]


def test_extreme_ids_are_found(tmp_path, write_dataset):
    ids = [2**63 - 1, -(2**63), 0, -1]
    items = catalogue(write_dataset(tmp_path / "d", items=pa.table({"item_id": ids})))
    assert items.rows_of(pa.array([-1, -(2**63), 2**63 - 1, 5, 0]), "here").tolist() == [3, 1, 0, -1, 2]


def test_features_stand_beside_their_ids(tmp_path, write_dataset):
    table = pa.table({"item_id": [7, 5, 6], "price": [1.0, None, 3.0]})
    price = build_feature(name="price", kind="number", normalize="none")
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=table)
    items = catalogue(folder, ITEM_ID, price, price=Statistics())
    assert items.columns.sparse["item_id"].values.tolist() == [7, 5, 6]
    assert items.columns.numbers["price"].tolist() == [[1, 0], [0, 1], [3, 0]]


@pytest.mark.parametrize("ids", [[5, 6, 7, 5, 7, 8], ["e", "f", "g", "e", "g", "h"]])
def test_an_id_that_stands_twice_is_named_with_its_rows(tmp_path, write_dataset, ids):
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=pa.table({"item_id": ids}))
    with pytest.raises(
        DataError, match=r"items: item_id (5|7|'e'|'g') is in rows (0 and 3|2 and 4) \(2 such pairs\)"
    ):
        catalogue(folder)


def test_a_null_id_is_named_with_its_row(tmp_path, write_dataset):
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=pa.table({"item_id": [5, 6, 7, None]}))
    with pytest.raises(DataError, match=r"part-0\.parquet, row group 1, column 'item_id': 1 of 2 ids .* in row 1"):
        catalogue(folder)


def test_a_bad_feature_names_file_group_and_row(tmp_path, write_dataset):
    table = pa.table({"item_id": [5, 6, 7, 8], "price": [1.0, 2.0, 3.0, float("nan")]})
    folder = write_dataset(tmp_path / "d", row_group_size=2, items=[table[:1], table[1:]])
    price = build_feature(name="price", kind="number")
    with pytest.raises(DataError, match=r"part-1\.parquet, row group 1, column 'price': 1 of 1 .* in row 0"):
        catalogue(folder, price, price=Statistics())


@pytest.mark.parametrize(
    ("ids", "text", "row"),
    [
        (pa.array([5, 60, 7]), "60", 1),
        (pa.array([5, 60, 7]), "6", None),
        (pa.array([5, 60, 7]), "sixty", None),
        (pa.array([5, 60, 7], pa.int8()), "1000", None),
        (pa.array(["5", "sixty"]), "sixty", 1),
        (pa.array(["5", "sixty"], pa.large_string()), "5", 0),
        (pa.array(["5", "sixty"]), "05", None),
    ],
)
def test_a_typed_id_finds_its_row(ids, text, row):
    assert find_id(ids, text) == row


def test_a_file_that_is_replaced_by_one_of_the_same_layout_is_named(write_dataset, tmp_path):
    """Its rows would be those of the new file, read by the footer and in the order of the old one."""

    def table(first: int) -> pa.Table:
        return pa.table({"user_id": list(range(100)), "item_id": list(range(first, first + 100))})

    def write(path: Path, first: int) -> None:
        pq.write_table(table(first), path, compression="none", use_dictionary=False, write_statistics=False)

    folder = write_dataset(tmp_path / "d", train=table(0), items=pa.table({"item_id": list(range(200))}))
    path = folder / "train/part-0.parquet"
    write(path, 0)
    dataset = Dataset(folder)
    [group] = dataset.train.row_groups
    assert dataset.train.read(group, ["item_id"])["item_id"].to_pylist() == list(range(100))
    before = path.stat()
    write(tmp_path / "new.parquet", 100)
    (tmp_path / "new.parquet").replace(path)
    assert path.stat().st_size == before.st_size
    with pytest.raises(DataError, match=r"part-0\.parquet was replaced or changed after this command opened it"):
        dataset.train.read(group, ["item_id"])
    assert Dataset(folder).train.read(group, ["item_id"])["item_id"].to_pylist() == list(range(100, 200))
