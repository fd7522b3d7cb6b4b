"""The sources write the dataset folders they promise: from files, and from a world whose law is known."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.config.loading import read_yaml
from trec_twotower.data.sources import SOURCES, gowalla, id_lines, prepare
from trec_twotower.data.sources.id_lines import check_published, read_id_lines
from trec_twotower.data.sources.options import read_options
from trec_twotower.data.sources.writer import DatasetWriter, list_column
from trec_twotower.errors import ConfigError, DataError

SMALL = {"users": 3_000, "items": 400, "clusters": 10, "events_per_user": 12}


def rows(dataset: Path, split: str) -> list[dict]:
    return pq.read_table(dataset / split).to_pylist()


def digests(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*.parquet"))
    }


def folder(parent: Path, **files: str | bytes) -> Path:
    """A folder of raw files; `train_txt` becomes train.txt."""
    parent.mkdir(exist_ok=True)
    for name, content in files.items():
        path = parent / ".".join(name.rsplit("_", 1))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parent


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "world"
    prepare("synthetic", out, SMALL)
    return out


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("default") / "world"
    return out, prepare("synthetic", out, {})


# The folder


def test_dataset_yaml_says_what_lies_in_the_folder(small):
    manifest = read_yaml(small / "dataset.yaml")
    assert list(manifest)[:5] == ["sha256", "format", "source", "options", "counts"]
    assert manifest["format"] == 1
    assert manifest["options"]["seed"] == 0
    assert sorted(manifest["files"]) == sorted(digests(small))
    for name, told in manifest["files"].items():
        content = (small / name).read_bytes()
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
        footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
        assert told["footer"] == f"xxh3-{xxhash.xxh3_64_hexdigest(footer)}"
        assert told["bytes"] == len(content)
        assert told["rows"] == pq.read_metadata(small / name).num_rows
    for split in ("train", "valid", "test"):
        assert manifest["counts"][f"{split}_rows"] == pq.read_table(small / split).num_rows
    for split, columns in manifest["columns"].items():
        schema = pq.read_table(small / split).schema
        assert columns == {field.name: str(field.type) for field in schema}


def test_prepare_returns_what_it_wrote(default):
    out, manifest = default
    assert manifest == read_yaml(out / "dataset.yaml")


def test_parts_and_row_groups_are_cut_at_their_limits(tmp_path):
    table = pa.table({"user_id": np.arange(1_000)})
    with DatasetWriter(tmp_path / "cut", rows_per_group=100, rows_per_part=300) as writer:
        for start in range(0, 1_000, 130):
            writer.write("train", table.slice(start, 130))
        writer.finish("test", {}, {})
    parts = sorted((tmp_path / "cut" / "train").iterdir())
    assert [pq.read_metadata(part).num_rows for part in parts] == [300, 300, 300, 100]
    assert [pq.read_metadata(parts[0]).row_group(group).num_rows for group in range(3)] == [100] * 3
    assert pq.read_table(tmp_path / "cut" / "train").equals(table)


def test_files_are_zstd_with_checksums_that_notice_a_flipped_bit(tmp_path):
    with DatasetWriter(tmp_path / "one") as writer:
        writer.write("train", pa.table({"user_id": np.random.default_rng(0).permutation(50_000)}))
        writer.finish("test", {}, {})
    path = tmp_path / "one" / "train" / "part-00000.parquet"
    column = pq.read_metadata(path).row_group(0).column(0)
    assert column.compression == "ZSTD"
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_broken_write_leaves_the_earlier_dataset_and_no_trace(tmp_path, stop):
    out = tmp_path / "world"
    prepare("synthetic", out, {"users": 50, "items": 100, "clusters": 4})
    before = digests(out)
    with pytest.raises(stop), DatasetWriter(out, overwrite=True, rows_per_group=10) as writer:
        writer.write("train", pa.table({"user_id": np.arange(25)}))
        assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2
        raise stop
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
    assert digests(out) == before


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_failed_swap_puts_the_earlier_dataset_back(tmp_path, monkeypatch, stop):
    out = tmp_path / "world"
    prepare("synthetic", out, {"users": 50, "items": 100, "clusters": 4})
    before = digests(out)
    replace = os.replace

    def fail_on_temporary(source, target):
        if ".tmp-" in Path(source).name:
            raise stop("no")
        replace(source, target)

    monkeypatch.setattr("trec_twotower.storage.artifacts._exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", fail_on_temporary)
    with pytest.raises(stop, match="no"):
        prepare("synthetic", out, {"users": 60, "items": 100, "clusters": 4}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
    assert digests(out) == before


def test_a_dataset_is_overwritten_only_on_request(tmp_path):
    out = tmp_path / "world"
    options = {"users": 50, "items": 100, "clusters": 4}
    prepare("synthetic", out, options)
    before = digests(out)
    with pytest.raises(ConfigError, match=r"exists already.*overwrite"):
        prepare("synthetic", out, options | {"seed": 1})
    assert digests(out) == before
    prepare("synthetic", out, options | {"seed": 1}, overwrite=True)
    assert digests(out) != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]


def test_a_strangers_folder_is_never_replaced(tmp_path):
    stranger = folder(tmp_path / "photos", a_jpg="dear")
    with pytest.raises(ConfigError, match=r"a\.jpg.*not a dataset"):
        prepare("synthetic", stranger, {}, overwrite=True)
    assert (stranger / "a.jpg").read_text() == "dear"
    with pytest.raises(ConfigError, match="is a file"):
        prepare("synthetic", stranger / "a.jpg", {}, overwrite=True)


@pytest.mark.parametrize(("theirs", "said"), [("dataset_yaml", "exists already"), ("a_jpg", "not a dataset")])
def test_what_came_while_we_wrote_is_left_alone(tmp_path, theirs, said):
    out = tmp_path / "world"
    with pytest.raises(ConfigError, match=said), DatasetWriter(out) as writer:
        writer.write("train", pa.table({"user_id": [1]}))
        folder(out, **{theirs: "theirs"})
        writer.finish("test", {}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
    assert [entry.read_text() for entry in out.iterdir()] == ["theirs"]


def test_an_empty_folder_may_be_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    prepare("synthetic", tmp_path / "empty", {"users": 50, "items": 100, "clusters": 4}, overwrite=True)
    assert (tmp_path / "empty" / "dataset.yaml").is_file()


def test_leftovers_of_killed_processes_are_removed_and_a_half_swapped_dataset_is_restored(tmp_path):
    """One process is killed between the two renames of a swap, another while it writes."""
    out = tmp_path / "world"
    prepare("synthetic", out, {"users": 50, "items": 100, "clusters": 4})
    before = digests(out)
    out.rename(tmp_path / ".world.old-77-1")
    folder(tmp_path / ".world.tmp-77-1", a_txt="half")
    other = folder(tmp_path / ".world2.tmp-77-1", a_txt="of another dataset")
    with pytest.raises(ConfigError, match="exists already"):
        prepare("synthetic", out, {})
    assert digests(out) == before
    assert sorted(tmp_path.iterdir()) == sorted([out, other])
    folder(tmp_path / ".world.old-77-2", a_txt="killed after the swap, before the older dataset was removed")
    with pytest.raises(ConfigError, match="exists already"):
        prepare("synthetic", out, {})
    assert digests(out) == before and sorted(tmp_path.iterdir()) == sorted([out, other])


def test_a_dataset_that_another_process_writes_is_refused(tmp_path):
    out = tmp_path / "world"
    script = (
        "import sys; from pathlib import Path; from trec_twotower.data.sources.writer import DatasetWriter\n"
        "with DatasetWriter(Path(sys.argv[1])):\n    print('writing', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        with pytest.raises(ConfigError, match=rf"{out} is being written by process {writer.pid} .*wait for it"):
            prepare("synthetic", out, {"users": 50, "items": 100, "clusters": 4})
        assert list(tmp_path.glob(".world.tmp-*"))  # the other process still has its files
        writer.communicate("")
    assert not list(tmp_path.iterdir())


def test_lists_are_ranges_of_the_values_even_where_they_overlap():
    lists = list_column(np.array([7, 8, 9]), np.array([0, 1, 3]), np.array([2, 3, 3]))
    assert lists.to_pylist() == [[7, 8], [8, 9], []]


# Options


@pytest.mark.parametrize(
    ("source", "options", "parts"),
    [
        ("sinthetic", {}, ["'sinthetic'", "nearest: 'synthetic'"]),
        ("synthetic", {"user": 5}, ["'user' is not an option", "nearest: 'users'"]),
        ("synthetic", {"users": "many"}, ["users = 'many'", "integer"]),
        ("synthetic", {"users": True}, ["users = True"]),
        ("synthetic", {"users": 0}, ["users = 0", "greater than 0"]),
        ("synthetic", {"users": 9, "rows": 1_000}, ["rows = 1,000 means 100 users", "users is 9"]),
        ("synthetic", {"items": 30, "clusters": 40, "events_per_user": 5}, ["40 clusters", "there are 30"]),
        ("synthetic", {"items": 40, "clusters": 4}, ["events_per_user is 12", "items = 49"]),
        ("synthetic", {"countries": 1_000}, ["countries = 1000", "less than or equal"]),
        ("gowalla", {"valid_share": 1.5}, ["valid_share = 1.5"]),
        ("gowalla", {"data_dirs": "x"}, ["nearest: 'data_dir'"]),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, source, options, parts):
    with pytest.raises(ConfigError) as error:
        prepare(source, tmp_path / "out", options)
    for part in parts:
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_options_may_come_as_words_of_a_command_line():
    options = read_options("synthetic", SOURCES["synthetic"].options, {"users": "100", "events_per_user": "5"})
    assert (options.users, options.events_per_user) == (100, 5.0)


def test_saved_options_make_the_same_dataset_again(tmp_path):
    first = prepare("synthetic", tmp_path / "a", {"rows": 500, "items": 100, "clusters": 4})
    again = prepare("synthetic", tmp_path / "b", first["options"])
    assert first == again


def test_naming_the_sources_loads_neither_numpy_nor_pyarrow_nor_torch():
    script = (
        "import sys; from trec_twotower.data.sources import SOURCES; "
        "assert all(source.help for source in SOURCES.values()); "
        "print([name for name in ('numpy', 'pyarrow', 'pydantic', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sources_do_not_need_torch():
    script = (
        "import sys; from trec_twotower.data.sources import SOURCES; "
        "[source.options for source in SOURCES.values()]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Lines of ids


def test_id_lines_are_read_as_they_stand(tmp_path):
    text = b"\xef\xbb\xbf5 1 2\r\n\n 7\t3\n9\n  \n9223372036854775807 0 00012"
    path = folder(tmp_path, a_txt=text) / "a.txt"
    lines = read_id_lines(path)
    assert lines.users.tolist() == [5, 7, 9, 2**63 - 1]
    assert lines.offsets.tolist() == [0, 2, 3, 3, 5]
    assert lines.items.tolist() == [1, 2, 3, 0, 12]
    assert lines.owners().tolist() == [0, 0, 1, 3, 3]
    assert lines.sha256 == hashlib.sha256(text).hexdigest()


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(st.lists(st.integers(0, 2**63 - 1), max_size=5), min_size=1, max_size=8),
    block=st.integers(1, 40),
    ends=st.booleans(),
)
def test_id_lines_read_in_blocks_agree_with_split(content, block, ends):
    """Against Python's own split and int, with blocks far smaller than a line."""
    text = "\n".join(" ".join(map(str, [user, *items])) for user, items in enumerate(content))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_lines, "_READ_BYTES", block)
        lines = read_id_lines(folder(Path(place), a_txt=text + "\n" * ends) / "a.txt")
    assert lines.users.tolist() == list(range(len(content)))
    assert np.split(lines.items, lines.offsets[1:-1])[-1].tolist() == content[-1]
    assert lines.items.tolist() == [item for items in content for item in items]
    assert np.diff(lines.offsets).tolist() == list(map(len, content))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0 1\n1 2 x7 3\n", ["line 2", "'x7' is not an id"]),
        ("0 1\n\n1 2,3\n", ["line 3", "'2,3' is not an id", "blanks between"]),
        ("0 1 -5\n", ["line 1", "'-5' is negative"]),
        ("0 1\n1 2.0\n", ["line 2", "'2.0'"]),
        ("0 9223372036854775808\n", ["line 1", "'9223372036854775808'"]),
        ("0 1\n1 99999999999999999999999\n", ["line 2", "'99999999999999999999999'"]),
        ("0 10000000000000000000\n", ["line 1", "'10000000000000000000'"]),
        ("4 1\n5 2\n\n4 3\n", ["user 4", "line 1", "line 4"]),
        ("", ["no line of ids"]),
        ("\n  \n", ["no line of ids"]),
    ],
)
def test_lines_that_are_not_ids_are_shown_with_their_number(tmp_path, text, parts):
    data_dir = folder(tmp_path / "raw", train_txt=text, test_txt="0 9\n")
    with pytest.raises(DataError) as error:
        prepare("gowalla", tmp_path / "out", {"data_dir": str(data_dir)})
    for part in [*parts, "train.txt"]:
        assert part in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


def test_line_numbers_hold_in_later_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(id_lines, "_READ_BYTES", 7)
    with pytest.raises(DataError, match="line 4: 'oops'"):
        read_id_lines(folder(tmp_path, a_txt="0 1 2\n1 5\n\n2 3 oops 4\n") / "a.txt")


def test_a_missing_file_or_folder_names_its_nearest(tmp_path):
    data_dir = folder(tmp_path / "gowalla", train_txt="0 1\n", tset_txt="0 2\n")
    with pytest.raises(DataError, match=r"no file test\.txt in .*nearest: 'tset\.txt'"):
        prepare("gowalla", tmp_path / "out", {"data_dir": data_dir})
    with pytest.raises(DataError, match=r"no folder .*nearest: 'gowalla'"):
        prepare("gowalla", tmp_path / "out", {"data_dir": tmp_path / "gowala"})


def test_the_folder_comes_from_the_environment_if_not_given(tmp_path, monkeypatch):
    monkeypatch.delenv("TREC_TT_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"data_dir=FOLDER.*TREC_TT_DATA"):
        prepare("gowalla", tmp_path / "out", {})
    folder(tmp_path / "gowalla", train_txt="0 1 2\n", test_txt="0 3\n")
    monkeypatch.setenv("TREC_TT_DATA", str(tmp_path))
    assert prepare("gowalla", tmp_path / "out", {})["options"]["data_dir"] == str(tmp_path / "gowalla")


# Gowalla


def test_gowalla_by_hand(tmp_path):
    """User 3 repeats item 20 and is tested on 10, a train item; 5 has one item; 8 only a test; 9 nothing."""
    data_dir = folder(
        tmp_path / "raw",
        train_txt="3 20 10 20 30 40\n5 10\n\n9\n7 50 60\n",
        test_txt="8 20\n3 70 10\n5 10\n9\n",
    )
    manifest = prepare("gowalla", tmp_path / "out", {"data_dir": str(data_dir), "valid_share": 0})
    assert rows(tmp_path / "out", "train") == [
        {"user_id": 3, "positives": [20, 10, 30, 40]},
        {"user_id": 5, "positives": [10]},
        {"user_id": 7, "positives": [50, 60]},
    ]
    assert rows(tmp_path / "out", "test") == [
        {"user_id": 3, "positives": [70], "history": [20, 10, 30, 40]},
        {"user_id": 8, "positives": [20], "history": []},
    ]
    assert pq.read_table(tmp_path / "out" / "items")["item_id"].to_pylist() == [10, 20, 30, 40, 50, 60, 70]
    assert not (tmp_path / "out" / "valid").exists()
    assert manifest["counts"] == {
        "users": 4,
        "items": 7,
        "interactions": 9,
        "train_interactions": 7,
        "valid_interactions": 0,
        "test_interactions": 2,
        "repeats_dropped": 1,
        "test_in_train_dropped": 2,
        "test_users_without_history": 1,
        "train_rows": 3,
        "valid_rows": 0,
        "test_rows": 2,
    }
    assert manifest["counts_checked"] is False
    assert manifest["columns"]["train"] == {"user_id": "int64", "positives": "list<element: int64>"}


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> tuple[Path, dict[int, list[int]]]:
    """Raw files of 200 users with 1 to 60 items each, and the train part."""
    rng = np.random.default_rng(5)
    train = {user: rng.choice(500, rng.integers(1, 61), replace=False).tolist() for user in range(200)}
    test = {user: [item + 1_000 for item in items[:2]] for user, items in train.items()}
    train_txt, test_txt = (
        "".join(" ".join(map(str, [user, *items])) + "\n" for user, items in part.items()) for part in (train, test)
    )
    data_dir = folder(tmp_path_factory.mktemp("bags") / "raw", train_txt=train_txt, test_txt=test_txt)
    return data_dir, train


def test_gowalla_holds_out_the_share_of_every_user(tmp_path, bags):
    data_dir, items_of = bags
    prepare("gowalla", tmp_path / "out", {"data_dir": str(data_dir), "valid_share": 0.3})
    train = {row["user_id"]: row["positives"] for row in rows(tmp_path / "out", "train")}
    valid = {row["user_id"]: row for row in rows(tmp_path / "out", "valid")}
    test = {row["user_id"]: row for row in rows(tmp_path / "out", "test")}
    for user, items in items_of.items():
        held_out = valid[user]["positives"] if user in valid else []
        assert len(held_out) == (min(max(1, round(0.3 * len(items))), len(items) - 1) if len(items) > 1 else 0)
        assert train[user] == [item for item in items if item not in held_out]
        assert held_out == [item for item in items if item in held_out]
        assert user not in valid or valid[user]["history"] == train[user]
        assert test[user]["history"] == items
        assert not set(test[user]["positives"]) & set(items)


def test_gowalla_holds_out_items_by_their_popularity_to_a_power(tmp_path):
    """Everybody has item 0 and one that nobody else has, of which one goes: at odds of (users / 1) ** power."""
    num_users = 3000
    lines = "".join(f"{user} 0 {user + 1}\n" for user in range(num_users))
    data_dir = folder(tmp_path / "gowalla", train_txt=lines, test_txt="0 5000\n")
    for name, odds in (("even", 1), ("popular", 4)):
        power = np.log(odds) / np.log(num_users)
        prepare("gowalla", tmp_path / name, {"data_dir": str(data_dir), "valid_share": 0.5, "valid_power": power})
        held_out = pq.read_table(tmp_path / name / "valid")["positives"].to_pylist()
        assert len(held_out) == num_users and all(len(items) == 1 for items in held_out)
        share = np.mean([items == [0] for items in held_out])
        expected = odds / (1 + odds)
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / num_users)


def test_gowalla_holds_out_at_random_by_the_seed(tmp_path, bags):
    data_dir, items_of = bags
    made = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        prepare("gowalla", tmp_path / name, {"data_dir": str(data_dir), "seed": seed})
        made[name] = digests(tmp_path / name)
    assert made["a"] == made["b"]
    assert made["a"]["valid/part-00000.parquet"] != made["c"]["valid/part-00000.parquet"]
    assert made["a"]["test/part-00000.parquet"] == made["c"]["test/part-00000.parquet"]
    # The place of a held-out item in its user's list is uniform: the mean of many is near a half.
    places = [
        (items_of[row["user_id"]].index(item) + 0.5) / len(items_of[row["user_id"]])
        for row in rows(tmp_path / "a", "valid")
        for item in row["positives"]
    ]
    assert abs(np.mean(places) - 0.5) < 4 * np.sqrt(1 / 12 / len(places))


def test_gowalla_is_the_same_in_pieces(tmp_path, bags, monkeypatch):
    prepare("gowalla", tmp_path / "whole", {"data_dir": str(bags[0])})
    monkeypatch.setattr(gowalla, "_USERS_PER_PIECE", 7)
    prepare("gowalla", tmp_path / "pieces", {"data_dir": str(bags[0])})
    assert digests(tmp_path / "whole") == digests(tmp_path / "pieces")


def test_gowalla_without_one_item_is_refused(tmp_path):
    data_dir = folder(tmp_path / "raw", train_txt="0\n1\n", test_txt="0 1\n")
    with pytest.raises(DataError, match=r"train\.txt has users but not one item"):
        prepare("gowalla", tmp_path / "out", {"data_dir": str(data_dir)})


def test_published_files_must_have_the_published_counts():
    published = {("a", "b"): {"users": 3}}
    assert check_published(published, ("a", "b"), {"users": 3, "items": 1}) is True
    assert check_published(published, ("a", "c"), {"users": 4}) is False
    with pytest.raises(DataError, match="3 users, but 4 were read"):
        check_published(published, ("a", "b"), {"users": 4})


# Amazon Beauty


def test_beauty_by_hand(tmp_path):
    """User 2 has five items, 4 has two and is only trained on, 6 has one, 1 takes item 7 twice."""
    data_dir = folder(
        tmp_path / "raw",
        Toys_txt="2 11 12 13 14 15\n4 12 11\n6 15\n1 7 8 9 7\n",
        Toys_item2attributes_json=json.dumps({"11": [3, 1], "12": [2, 2], "99": [5]}),
        README_txt="words",
    )
    manifest = prepare("amazon-beauty", tmp_path / "out", {"data_dir": str(data_dir), "max_history": 1})
    assert rows(tmp_path / "out", "train") == [
        {"user_id": 2, "item_id": 12, "history": [11]},
        {"user_id": 2, "item_id": 13, "history": [12]},
        {"user_id": 4, "item_id": 11, "history": [12]},
        {"user_id": 1, "item_id": 8, "history": [7]},
    ]
    assert rows(tmp_path / "out", "valid") == [
        {"user_id": 2, "positives": [14], "history": [11, 12, 13]},
        {"user_id": 1, "positives": [9], "history": [7, 8]},
    ]
    assert rows(tmp_path / "out", "test") == [
        {"user_id": 2, "positives": [15], "history": [11, 12, 13, 14]},
        {"user_id": 1, "positives": [7], "history": [7, 8, 9]},
    ]
    catalogue = {row["item_id"]: row["attributes"] for row in rows(tmp_path / "out", "items")}
    assert catalogue == {7: [], 8: [], 9: [], 11: [3, 1], 12: [2, 2], 13: [], 14: [], 15: []}
    assert manifest["counts"] == {
        "users": 4,
        "items": 8,
        "interactions": 12,
        "repeats_kept": 1,
        "attributes": 3,
        "items_without_attributes": 6,
        "attributes_of_unknown_items": 1,
        "train_rows": 4,
        "valid_rows": 2,
        "test_rows": 2,
    }
    assert manifest["counts_checked"] is False


def test_a_history_of_beauty_holds_the_newest_of_its_user_alone(tmp_path):
    """Of every user but the first, there are lines before the own one to reach into."""
    taken = {user: [100 * user + place for place in range(user)] for user in (4, 9, 2, 6)}
    lines = "".join(" ".join(map(str, [user, *items])) + "\n" for user, items in taken.items())
    prepare(
        "amazon-beauty", tmp_path / "out", {"data_dir": str(folder(tmp_path / "raw", a_txt=lines)), "max_history": 5}
    )
    assert [(row["user_id"], row["item_id"], row["history"]) for row in rows(tmp_path / "out", "train")] == [
        (user, items[place], items[max(0, place - 5) : place])
        for user, items in taken.items()
        for place in range(1, len(items) - (2 if len(items) >= 3 else 0))
    ]


def test_beauty_without_attributes_has_a_catalogue_of_ids(tmp_path):
    data_dir = folder(tmp_path / "raw", any_txt="1 2 3 4\n")
    manifest = prepare("amazon-beauty", tmp_path / "out", {"data_dir": str(data_dir), "min_history": 0})
    assert manifest["columns"]["items"] == {"item_id": "int64"}
    assert rows(tmp_path / "out", "train") == [{"user_id": 1, "item_id": 2, "history": []}]


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({}, ["one *.txt of sequences", "nothing"]),
        ({"notes_md": "x"}, ["one *.txt of sequences", "found 0", "notes.md"]),
        ({"a_txt": "1 2\n", "b_txt": "1 2\n"}, ["found 2", "a.txt, b.txt"]),
        (
            {"a_txt": "1 2\n", "a_item2attributes_json": "{}", "b_item2attributes_json": "{}"},
            ["at most one *_item2attributes.json", "found 2"],
        ),
        ({"a_txt": "1 2\n", "a_item2attributes_json": "{"}, ["a_item2attributes.json is not JSON", "line 1"]),
        ({"a_txt": "1 2\n", "a_item2attributes_json": "[]"}, ["holds a list"]),
        ({"a_txt": "1 2\n", "a_item2attributes_json": '{"2": 5}'}, ["item '2' has 5"]),
        ({"a_txt": "1 2\n", "a_item2attributes_json": '{"lamp": [5]}'}, ["item 'lamp'"]),
        ({"a_txt": "1 2\n", "a_item2attributes_json": '{"2": [true]}'}, ["item '2' has [True]"]),
        ({"a_txt": "1\n"}, ["a.txt has users but not one item"]),
        ({"a_txt": "1 2\n3 b\n"}, ["a.txt, line 2", "'b'"]),
    ],
)
def test_beauty_says_what_is_wrong_with_its_files(tmp_path, files, parts):
    data_dir = folder(tmp_path / "raw", **files)
    with pytest.raises(DataError) as error:
        prepare("amazon-beauty", tmp_path / "out", {"data_dir": str(data_dir)})
    for part in parts:
        assert part in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["raw"]


# The real data


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = os.environ.get("TREC_TT_DATA")
    if not root or not all((Path(root) / name).is_dir() for name in ("gowalla", "amazon-beauty")):
        pytest.skip("set TREC_TT_DATA to a folder that holds gowalla/ and amazon-beauty/")
    return Path(root)


@pytest.mark.data
def test_real_gowalla_has_the_published_counts(tmp_path, real_data):
    manifest = prepare("gowalla", tmp_path / "out", {})
    counts = manifest["counts"]
    assert (counts["users"], counts["items"]) == (29_858, 40_981)
    assert (counts["train_interactions"], counts["test_interactions"]) == (810_128, 217_242)
    assert manifest["counts_checked"] is True
    raw = [line.split() for line in (real_data / "gowalla" / "train.txt").read_text().splitlines()]
    history = {row["user_id"]: row["history"] for row in rows(tmp_path / "out", "test")}
    assert history == {int(user): list(map(int, items)) for user, *items in raw}
    held_out = sum(len(row["positives"]) for row in rows(tmp_path / "out", "valid"))
    assert held_out == counts["valid_interactions"]
    assert abs(held_out / 810_128 - 0.2) < 0.005


@pytest.mark.data
def test_real_beauty_has_the_published_counts(tmp_path, real_data):
    manifest = prepare("amazon-beauty", tmp_path / "out", {})
    counts = manifest["counts"]
    assert (counts["users"], counts["items"]) == (22_363, 12_101)
    assert (counts["interactions"], counts["attributes"]) == (198_502, 637)
    assert counts["train_rows"] == 198_502 - 3 * 22_363
    assert manifest["counts_checked"] is True
    raw = [line.split() for line in (real_data / "amazon-beauty" / "Beauty.txt").read_text().splitlines()]
    test = {row["user_id"]: row["history"] + row["positives"] for row in rows(tmp_path / "out", "test")}
    assert test == {int(user): list(map(int, items)) for user, *items in raw}
