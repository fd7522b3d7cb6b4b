"""A log of interactions becomes a dataset in which no row knows what came at the same time or later."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.config.loading import load_config, read_yaml
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.sources import events, prepare
from trec_twotower.data.sources.event_logs import splits as event_splits
from trec_twotower.data.sources.options import read_options
from trec_twotower.data.sources.tables import event_files
from trec_twotower.data.sources.writer import DatasetWriter
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.ops.hashing import mix
from trec_twotower.training.sharding_plan import mean_lengths

# User 1 takes 10, then 30 and 20 in one second, then 10 again and 40; user 2 takes two items, user 3 three.
LOG = [
    {"user_id": 1, "item_id": 40, "timestamp": 9, "device": "tv", "score": 0.5},
    {"user_id": 3, "item_id": 20, "timestamp": 1, "device": "web", "score": 1.0},
    {"user_id": 1, "item_id": 30, "timestamp": 5, "device": "tv", "score": 2.0},
    {"user_id": 1, "item_id": 10, "timestamp": 3, "device": "phone", "score": 1.0},
    {"user_id": 2, "item_id": 10, "timestamp": 4, "device": None, "score": 1.0},
    {"user_id": 1, "item_id": 20, "timestamp": 5, "device": "web", "score": 3.0},
    {"user_id": 3, "item_id": 50, "timestamp": 8, "device": "web", "score": 1.0},
    {"user_id": 1, "item_id": 10, "timestamp": 7, "device": "tv", "score": 4.0},
    {"user_id": 2, "item_id": 30, "timestamp": 2, "device": "phone", "score": 0.0},
    {"user_id": 3, "item_id": 40, "timestamp": 8, "device": "tv", "score": 1.0},
]


def write_log(path: Path, rows: list[dict], **types: pa.DataType) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(kind))
    pq.write_table(table, path)
    return path


def make(folder: Path, log: list[dict] | None = None, **options: object) -> tuple[Path, dict]:
    """The dataset of a log, and what its dataset.yaml says."""
    if log is not None:
        options["events"] = str(write_log(folder / "log.parquet", log))
    out = folder / "out"
    return out, prepare("events", out, options, overwrite=True)


def rows(dataset: Path, split: str) -> list[dict]:
    return pq.read_table(dataset / split).to_pylist() if (dataset / split).is_dir() else []


def digests(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*.parquet"))
    }


def refusal(kind: type[Exception], folder: Path, log: list[dict] | None = None, **options: object) -> str:
    """What the error says, nothing being left behind."""
    with pytest.raises(kind) as error:
        make(folder, log, **options)
    assert not [path for path in folder.iterdir() if "out" in path.name]
    return str(error.value)


def chance(user: int | str, item: int | str, seed: int = 0) -> int:
    """What orders events of one time: seed, user and item mixed one after the other, 53 bits of them."""
    state = 0
    for part in (seed, user, item):
        state = mix(state ^ (part % 2**64 if isinstance(part, int) else xxhash.xxh3_64_intdigest(part.encode())))
    return state >> 11


# By hand. Seed 3 draws 30 before 20 for user 1, and 40 before 50 for user 3.


def test_the_last_new_item_is_test_the_one_before_valid_and_ties_do_not_see_each_other(tmp_path):
    assert chance(1, 30, 3) < chance(1, 20, 3) and chance(3, 40, 3) < chance(3, 50, 3)
    out, manifest = make(tmp_path, LOG, seed=3)
    assert rows(out, "train") == [
        {"user_id": 1, "item_id": 10, "timestamp": 3, "history": []},
        {"user_id": 1, "item_id": 30, "timestamp": 5, "history": [10]},
        {"user_id": 1, "item_id": 10, "timestamp": 7, "history": [10, 30]},  # later than the valid item, without it
        {"user_id": 2, "item_id": 30, "timestamp": 2, "history": []},
        {"user_id": 2, "item_id": 10, "timestamp": 4, "history": [30]},
        {"user_id": 3, "item_id": 20, "timestamp": 1, "history": []},
    ]
    assert rows(out, "valid") == [
        {"user_id": 1, "positives": [20], "timestamp": 5, "history": [10]},
        {"user_id": 3, "positives": [40], "timestamp": 8, "history": [20]},
    ]
    assert rows(out, "test") == [
        {"user_id": 1, "positives": [40], "timestamp": 9, "history": [10, 30, 20, 10]},
        {"user_id": 3, "positives": [50], "timestamp": 8, "history": [20]},
    ]
    assert rows(out, "items") == [{"item_id": item} for item in (10, 20, 30, 40, 50)]
    assert sorted(path.name for path in out.iterdir()) == ["dataset.yaml", "items", "test", "train", "valid"]
    assert manifest["counts"] == {
        "events_read": 10,
        "users": 3,
        "interactions": 10,
        "repeats_dropped": 0,
        "rare_dropped": 0,
        "items": 5,
        "repeats_kept": 1,
        "repeats_left_out": 0,
        "users_in_train_only": 1,
        "train_empty_histories": 3,
        "train_empty_by_ties": 0,
        "valid_empty_histories": 0,
        "valid_empty_by_ties": 0,
        "valid_unfindable": 0,
        "test_empty_histories": 0,
        "test_empty_by_ties": 0,
        "test_unfindable": 0,
        "train_rows": 6,
        "valid_rows": 2,
        "test_rows": 2,
    }
    assert manifest == read_yaml(out / "dataset.yaml")


def test_any_event_may_be_held_out_by_request(tmp_path):
    out, manifest = make(tmp_path, LOG, hold_out="any", seed=3)
    assert rows(out, "train") == [
        {"user_id": 1, "item_id": 10, "timestamp": 3, "history": []},
        {"user_id": 1, "item_id": 30, "timestamp": 5, "history": [10]},
        {"user_id": 1, "item_id": 20, "timestamp": 5, "history": [10]},
        {"user_id": 2, "item_id": 30, "timestamp": 2, "history": []},
        {"user_id": 2, "item_id": 10, "timestamp": 4, "history": [30]},
        {"user_id": 3, "item_id": 20, "timestamp": 1, "history": []},
    ]
    assert rows(out, "valid") == [
        {"user_id": 1, "positives": [10], "timestamp": 7, "history": [10, 30, 20]},
        {"user_id": 3, "positives": [40], "timestamp": 8, "history": [20]},
    ]
    assert rows(out, "test")[0] == {"user_id": 1, "positives": [40], "timestamp": 9, "history": [10, 30, 20, 10]}
    counts = manifest["counts"]
    assert (counts["valid_unfindable"], counts["test_unfindable"], counts["repeats_left_out"]) == (1, 0, 0)


def test_the_reader_of_datasets_takes_the_folder(tmp_path):
    out, _ = make(tmp_path, LOG, context=["device"])
    dataset = Dataset(out)
    assert dataset.train.num_rows == 6 and dataset.items.num_rows == 5 and dataset.users is None
    assert dataset.split("test").table(["positives"]).num_rows == 2


def test_the_past_of_a_train_row_is_cut_and_that_of_a_held_out_row_is_not(tmp_path):
    log = [{"user_id": 1, "item_id": item, "timestamp": item} for item in range(1, 8)]
    out, _ = make(tmp_path, log, max_history=2, min_history=1)
    assert [(row["item_id"], row["history"]) for row in rows(out, "train")] == [
        (2, [1]),
        (3, [1, 2]),
        (4, [2, 3]),
        (5, [3, 4]),
    ]
    assert rows(out, "valid")[0]["history"] == [1, 2, 3, 4, 5]
    assert rows(out, "test")[0]["history"] == [1, 2, 3, 4, 5, 6]


def test_context_and_weight_come_along(tmp_path):
    out, manifest = make(tmp_path, LOG, context=["device"], weight="score", seed=3)
    train = rows(out, "train")
    assert [(row["device"], row["weight"]) for row in train] == [
        *(("phone", 1.0), ("tv", 2.0), ("tv", 4.0)),
        *(("phone", 0.0), (None, 1.0), ("web", 1.0)),
    ]
    assert [row["device"] for row in rows(out, "test")] == ["tv", "web"]
    assert [row["device"] for row in rows(out, "valid")] == ["web", "tv"]
    assert list(train[0]) == ["user_id", "item_id", "timestamp", "weight", "device", "history"]
    assert list(manifest["columns"]["test"]) == ["user_id", "positives", "timestamp", "device", "history"]


def test_dedupe_keeps_the_first_of_each_user_and_item(tmp_path):
    out, manifest = make(tmp_path, LOG, dedupe=True, seed=3)
    assert rows(out, "test")[0] == {"user_id": 1, "positives": [40], "timestamp": 9, "history": [10, 30, 20]}
    assert rows(out, "valid")[0] == {"user_id": 1, "positives": [20], "timestamp": 5, "history": [10]}
    assert manifest["counts"]["repeats_dropped"] == 1
    assert manifest["counts"]["repeats_kept"] == 0


def test_the_core_is_taken_until_nobody_is_rare(tmp_path):
    """Item c is rare, without it user 3 is, without whom item b is, and so user 2; d and e stand for themselves."""
    taken = {1: "adea", 2: "ab", 3: "bc", 4: "ade", 5: "de"}
    log = [
        {"user_id": user, "item_id": item, "timestamp": at}
        for user, items in taken.items()
        for at, item in enumerate(items)
    ]
    out, manifest = make(tmp_path, log, min_user_events=2, min_item_events=2)
    assert [row["item_id"] for row in rows(out, "items")] == ["a", "d", "e"]
    assert {row["user_id"] for row in rows(out, "train")} == {1, 4, 5}
    assert manifest["counts"]["rare_dropped"] == 4
    assert manifest["counts"]["users"] == 3


def test_a_time_split_asks_for_what_is_new_in_each_period(tmp_path):
    out, _ = make(tmp_path, LOG, split="time", valid_from=5, test_from=8, context=["device"], seed=3)
    assert [(row["user_id"], row["item_id"], row["history"]) for row in rows(out, "train")] == [
        (1, 10, []),
        (2, 30, []),
        (2, 10, [30]),
        (3, 20, []),
    ]
    assert rows(out, "valid") == [{"user_id": 1, "positives": [30, 20], "timestamp": 5, "history": [10]}]
    assert rows(out, "test") == [
        {"user_id": 1, "positives": [40], "timestamp": 8, "history": [10, 30, 20, 10]},
        {"user_id": 3, "positives": [40, 50], "timestamp": 8, "history": [20]},
    ]


def test_a_time_split_gives_users_without_a_past_and_each_item_once(tmp_path):
    log = [(1, 1, 0), (2, 7, 10), (2, 6, 11), (2, 7, 12), (1, 1, 13), (1, 2, 20), (2, 7, 21)]
    log = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in log]
    out, _ = make(tmp_path, log, split="time", valid_from=10, test_from=20)
    assert rows(out, "valid") == [{"user_id": 2, "positives": [7, 6], "timestamp": 10, "history": []}]
    assert rows(out, "test") == [{"user_id": 1, "positives": [2], "timestamp": 20, "history": [1, 1]}]


def test_ids_may_be_text_and_columns_have_any_name(tmp_path):
    log = [{"who is": f"u{row['user_id']}", "it's": f"i'{row['item_id']}", 'a "time"': row["timestamp"]} for row in LOG]
    names = {"user": "who is", "item": "it's", "timestamp": 'a "time"'}
    out, manifest = make(tmp_path, log, **names)
    assert rows(out, "test")[0] == {
        "user_id": "u1",
        "positives": ["i'40"],
        "timestamp": 9,
        "history": ["i'10", "i'20", "i'30", "i'10"],
    }
    assert manifest["columns"]["train"]["history"] == "list<element: string>"
    assert manifest["columns"]["train"]["timestamp"] == "int64"


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("ms", tz="America/New_York")),
        *(pa.int32(), pa.uint64(), pa.float64()),
    ],
    ids=str,
)
def test_times_of_any_type_become_whole_seconds_utc(tmp_path, kind):
    at = [1_700_000_000, 1_700_000_001, 1_700_000_002]
    path = tmp_path / "log.parquet"
    times = pa.array(at, pa.timestamp("s")) if pa.types.is_timestamp(kind) else pa.array(at)
    table = pa.table({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times.cast(kind)})
    pq.write_table(table, path)
    out, _ = make(tmp_path, events=str(path))
    assert [row["timestamp"] for split in ("train", "valid", "test") for row in rows(out, split)] == at


def test_times_with_a_zone_are_the_same_wherever_the_machine_stands(tmp_path):
    at = [1_700_000_000, 1_700_000_001, 1_700_000_002]
    times = pa.array(at, pa.timestamp("s")).cast(pa.timestamp("us", tz="Europe/Oslo"))
    pq.write_table(pa.table({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times}), tmp_path / "log.parquet")
    code = "import sys; from pathlib import Path; from trec_twotower.data.sources import prepare; "
    code += "prepare('events', Path(sys.argv[1]), {'events': sys.argv[2]})"
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "log.parquet")]
    subprocess.run(command, env={**os.environ, "TZ": "America/New_York"}, check=True)
    assert [row["timestamp"] for split in ("train", "valid", "test") for row in rows(tmp_path / "out", split)] == at


def test_users_whose_events_meet_in_one_second_are_apart(tmp_path):
    """The last second of each user is the first of the next."""
    log = [(1, 10, 5), (2, 20, 5), (2, 21, 8), (3, 30, 8), (3, 31, 8), (4, 40, 8)]
    out, _ = make(tmp_path, [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in log])
    assert [(row["user_id"], row["item_id"], row["history"]) for row in rows(out, "train")] == [
        (user, item, [20] if item == 21 else []) for user, item, _ in log
    ]


def test_events_within_one_second_are_in_order_and_written_in_whole_seconds(tmp_path):
    start = datetime.datetime(2024, 2, 29, 12, 0, 0)
    times = [start + datetime.timedelta(microseconds=part) for part in (0, 400_000, 400_001, 999_999, 1_000_000)]
    items = [9, 7, 8, 1, 3]
    for given_as in (times, [time.replace(tzinfo=datetime.UTC).timestamp() for time in times]):
        log = [{"user_id": 1, "item_id": item, "timestamp": time} for item, time in zip(items, given_as, strict=True)]
        out, _ = make(tmp_path, log[::-1])
        seconds = int(times[0].replace(tzinfo=datetime.UTC).timestamp())
        assert [(row["item_id"], row["timestamp"], row["history"]) for row in rows(out, "train")] == [
            (9, seconds, []),
            (7, seconds, [9]),
            (8, seconds, [9, 7]),
        ]
        assert rows(out, "valid") == [{"user_id": 1, "positives": [1], "timestamp": seconds, "history": [9, 7, 8]}]
        assert rows(out, "test")[0]["timestamp"] == seconds + 1


@pytest.mark.parametrize("moment", ["2024-05-31", datetime.date(2024, 5, 31), 1_717_113_600, "2024-05-31T02:00+02:00"])
def test_a_moment_is_seconds_or_a_date_in_utc(moment):
    options = {"events": "x", "split": "time", "valid_from": moment, "test_from": 1_800_000_000}
    assert read_options("events", events.Options, options).valid_from == 1_717_113_600


def test_catalogue_and_users_keep_their_columns_in_the_order_of_ids(tmp_path):
    order = (50, 40, 60, 10, 20, 30)
    catalogue = [{"title": f"title {item}", "asin": item, "tags": ["x"] * (item % 3)} for item in order]
    items = write_log(tmp_path / "items.parquet", catalogue)
    users = tmp_path / "users.csv"
    users.write_text("user_id,age\n3,30\n1,10\n2,\n")
    log = [{**row, "asin": row["item_id"]} for row in LOG]
    out, manifest = make(tmp_path, log, item="asin", items=str(items), users=str(users))
    assert rows(out, "items") == [
        {"item_id": item, "title": f"title {item}", "tags": ["x"] * (item % 3)} for item in (10, 20, 30, 40, 50, 60)
    ]
    assert rows(out, "users") == [{"user_id": 1, "age": 10}, {"user_id": 2, "age": None}, {"user_id": 3, "age": 30}]
    assert manifest["counts"]["items"] == 6


def test_decimals_become_numbers_that_models_read(tmp_path):
    log = write_log(tmp_path / "log.parquet", LOG, score=pa.decimal128(9, 2))
    _, manifest = make(tmp_path, events=str(log), context=["score"])
    assert manifest["columns"]["train"]["score"] == "double"


# The files


def test_formats_and_splittings_of_one_log_give_one_dataset(tmp_path):
    plain = [{name: row[name] for name in ("user_id", "item_id", "timestamp", "score")} for row in LOG]
    text = "\n".join(["user_id,item_id,timestamp,score", *(",".join(map(str, row.values())) for row in plain)])
    lines = "\n".join(map(json.dumps, reversed(plain)))
    (tmp_path / "log.csv").write_text(text)
    (tmp_path / "log.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "log.jsonl").write_text(lines)
    write_log(tmp_path / "log.parquet", plain)
    parts = tmp_path / "odd [1]* name"
    (parts / "deep").mkdir(parents=True)
    write_log(parts / "b.parquet", plain[:3])
    write_log(parts / "deep" / "a.parquet", [dict(reversed(row.items())) for row in plain[3:]])
    (parts / "_SUCCESS").touch()
    (parts / ".b.parquet.crc").write_text("x")
    (parts / "_temporary" / "0").mkdir(parents=True)
    write_log(parts / "_temporary" / "0" / "half.parquet", plain[:2])
    given_as = [tmp_path / f"log.{end}" for end in ("csv", "tsv", "csv.gz", "jsonl", "parquet")] + [parts]
    made = []
    for path in [*map(str, given_as), str(tmp_path / "lo*.parquet")]:
        out, manifest = make(tmp_path, events=path, weight="score")
        assert manifest["counts"]["events_read"] == len(LOG), path
        made.append(digests(out))
    assert len(made[0]) == 4 and all(one == made[0] for one in made)


def test_saved_options_make_the_same_dataset_again(tmp_path):
    log = str(write_log(tmp_path / "log.parquet", LOG))
    options = {"events": log, "split": "time", "valid_from": 5, "test_from": 8, "context": ["device"], "dedupe": True}
    first = prepare("events", tmp_path / "a", options)
    assert prepare("events", tmp_path / "b", first["options"]) == first


# Against a slower way


def slow_splits(
    log: list[tuple], max_history: int, min_history: int, dedupe: bool, hold_out: str
) -> dict[str, list[tuple]]:
    """(user, items, history) of every row of a leave-last-out split, by the words of docs/data.md."""
    of_user = defaultdict(list)
    for user, item, time in sorted(log, key=lambda event: (event[0], event[2], chance(*event[:2]))):
        if not (dedupe and any(item == earlier for earlier, _ in of_user[user])):
            of_user[user].append((item, time))
    made = defaultdict(list)
    for user, mine in of_user.items():
        may = [
            place
            for place, (item, _) in enumerate(mine)
            if hold_out == "any" or item not in [earlier for earlier, _ in mine[:place]]
        ]
        held = dict(zip(may[-2:], ("valid", "test"), strict=True)) if len(may) >= 3 else {}
        held_items = {mine[place][0] for place in held} if hold_out == "new" else set()
        for place, (item, time) in enumerate(mine):
            past = [earlier for earlier, then in mine if then < time]
            if place in held:
                made[held[place]].append((user, [item], past))
            elif item not in held_items:
                known = [earlier for earlier in past if earlier not in held_items]
                if len(known) >= min_history:
                    made["train"].append((user, [item], known[-max_history:]))
    return made


def slow_periods(
    log: list[tuple], max_history: int, valid_from: int, test_from: int, hold_out: str
) -> dict[str, list[tuple]]:
    """The same of a time split."""
    made = defaultdict(list)
    ordered = sorted(log, key=lambda event: (event[2], chance(*event[:2])))
    for user in sorted({user for user, _, _ in log}):
        mine = [(item, time) for owner, item, time in ordered if owner == user]
        for item, time in mine:
            if time < valid_from:
                made["train"].append((user, [item], [earlier for earlier, then in mine if then < time][-max_history:]))
        for split, start, stop in (("valid", valid_from, test_from), ("test", test_from, 10**9)):
            past = [item for item, time in mine if time < start]
            wanted = [item for item, time in mine if start <= time < stop and (hold_out == "any" or item not in past)]
            if wanted:
                made[split].append((user, list(dict.fromkeys(wanted)), past))
    return made


def num_unfindable(made: list[tuple]) -> int:
    return sum(set(items) <= set(history) for _, items, history in made)


def found(dataset: Path, split: str) -> list[tuple]:
    """What the slow way says of each row."""
    return [
        (row["user_id"], row["positives"] if "positives" in row else [row["item_id"]], row["history"])
        for row in rows(dataset, split)
    ]


HOLD_OUT = st.sampled_from(["new", "any"])
EVENTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 12)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(
    log=EVENTS,
    max_history=st.integers(1, 5),
    min_history=st.integers(0, 2),
    dedupe=st.booleans(),
    hold_out=HOLD_OUT,
    data=st.data(),
)
def test_histories_are_those_of_the_slow_way_whatever_the_order_of_the_files(
    log, max_history, min_history, dedupe, hold_out, data
):
    expected = slow_splits(log, max_history, min_history, dedupe, hold_out)
    shuffled = data.draw(st.permutations(log))
    cut = data.draw(st.integers(0, len(log)))
    limits = data.draw(st.sampled_from([(4, 3), (16, 50), (131_072, 4_000_000)]))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_files, "_ROWS_PER_BATCH", limits[0])
        patch.setattr(event_splits, "_VALUES_PER_PIECE", limits[1])
        parts = Path(name) / "parts"
        parts.mkdir()
        for number, part in enumerate((shuffled[:cut], shuffled[cut:])):
            columns = np.array(part, np.int64).reshape(-1, 3).T
            table = pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns, strict=True)))
            pq.write_table(table, parts / f"{number}.parquet")
        options = {"events": str(parts), "max_history": max_history, "min_history": min_history, "dedupe": dedupe}
        options |= {"hold_out": hold_out}
        if not expected["train"]:
            with pytest.raises(DataError, match="No train row is left"):
                make(Path(name), **options)
            return
        out, manifest = make(Path(name), **options)
        for split in ("train", "valid", "test"):
            assert found(out, split) == expected[split]
            empty = sum(not history for _, _, history in expected[split])
            assert manifest["counts"].get(f"{split}_empty_histories", 0) == empty
        for split in ("valid", "test"):
            assert manifest["counts"].get(f"{split}_unfindable", 0) == num_unfindable(expected[split])
            assert hold_out == "any" or not num_unfindable(expected[split])
        # The leak test, in words of its own: what is in a history was taken in an earlier second.
        times = defaultdict(list)
        for user, item, time in log:
            times[user, item].append(time)
        for split in ("train", "valid", "test"):
            for row in rows(out, split):
                assert all(min(times[row["user_id"], item]) < row["timestamp"] for item in row["history"])


@settings(max_examples=25, deadline=None)
@given(log=EVENTS, max_history=st.integers(1, 5), rows_per_batch=st.sampled_from([3, 131_072]), hold_out=HOLD_OUT)
def test_periods_are_those_of_the_slow_way(log, max_history, rows_per_batch, hold_out):
    log = [*log, (5, 0, 0), (5, 1, 4), (5, 2, 8)]  # no period is empty
    expected = slow_periods(log, max_history, 4, 8, hold_out)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_files, "_ROWS_PER_BATCH", rows_per_batch)
        listed = [dict(zip(("user_id", "item_id", "timestamp"), event, strict=True)) for event in log]
        options = {"split": "time", "valid_from": 4, "test_from": 8, "max_history": max_history, "hold_out": hold_out}
        out, manifest = make(Path(name), listed, **options)
        for split in ("train", "valid", "test"):
            assert found(out, split) == expected[split]
        for split in ("valid", "test"):
            assert manifest["counts"][f"{split}_unfindable"] == num_unfindable(expected[split])


@settings(max_examples=20, deadline=None)
@given(log=EVENTS, at_least=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_the_core_is_that_of_the_slow_way(log, at_least):
    kept, before = list(log), None
    while kept != before:
        before = kept
        for side in (0, 1):
            kept = [event for event in kept if sum(event[side] == other[side] for other in kept) >= at_least[side]]
    listed = [dict(zip(("user_id", "item_id", "timestamp"), event, strict=True)) for event in log]
    options = {"min_user_events": at_least[0], "min_item_events": at_least[1]}
    with tempfile.TemporaryDirectory() as name:
        if not kept:
            assert "No event is left" in refusal(DataError, Path(name), listed, **options)
        else:
            out, manifest = make(Path(name), listed, **options)
            assert manifest["counts"]["interactions"] == len(kept)
            assert [row["item_id"] for row in rows(out, "items")] == sorted({item for _, item, _ in kept})


def test_rows_that_differ_in_context_alone_are_ordered_by_it(tmp_path):
    log = [{"user_id": 1, "item_id": 1, "timestamp": 0, "device": device, "score": 1.0} for device in "cab"]
    log += [{"user_id": 1, "item_id": 2, "timestamp": 1, "device": "d", "score": float(part)} for part in range(3)]
    options = {"context": ["device"], "weight": "score"}
    for dedupe, expected in ((False, ["a", "b", "c", "d", "d", "d"]), (True, ["a", "d"])):
        made = []
        for order in (log, log[::-1]):
            out, _ = make(tmp_path, order, dedupe=dedupe, **options)
            made.append(digests(out))
            assert [row["device"] for row in rows(out, "train")] == expected
        assert made[0] == made[1]


# Memory


MEASURE = """
import resource, sys
from pathlib import Path
from trec_twotower.data.sources import events
from trec_twotower.data.sources.tables import event_files
from trec_twotower.data.sources.writer import DatasetWriter
event_files._ROWS_PER_BATCH = 16_384
options = events.Options(events=sys.argv[1], context=("page",), memory_gb=0.15, min_history=10)
with DatasetWriter(Path(sys.argv[2]), rows_per_group=16_384) as writer:
    made = events.write(options, writer)
print(made["counts"]["events_read"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_log(tmp_path):
    """1.5 million events more, of 100 bytes each, go through without taking up 150 MB more."""
    import duckdb

    peak_mib = []
    for count in (1_000_000, 2_500_000):
        path = tmp_path / f"{count}.parquet"
        select = (
            f"SELECT hash(range) % {count // 20} AS user_id, hash(range + 1) % 999 AS item_id, "
            f"hash(range + 2) % 100000000 AS timestamp, repeat(md5(range::VARCHAR), 2) AS page FROM range({count})"
        )
        duckdb.execute(f"COPY ({select}) TO '{path}'").fetchall()
        command = [sys.executable, "-W", "error", "-c", MEASURE, str(path), str(tmp_path / str(count))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        read, mib = map(int, done.stdout.split())
        assert read == count
        peak_mib.append(mib)
    assert peak_mib[1] - peak_mib[0] < 75, peak_mib


def test_too_little_memory_is_said_so(tmp_path, monkeypatch):
    def too_much(*_: object) -> None:
        import duckdb

        raise duckdb.OutOfMemoryException("Out of Memory Error: could not allocate")

    monkeypatch.setattr(events, "fetch_rows", too_much)
    said = refusal(ConfigError, tmp_path, LOG, memory_gb=0.5)
    assert "memory_gb = 0.5" in said and "raise it" in said


# Atomicity


def test_ctrl_c_does_not_wait_for_the_end_of_a_query(tmp_path):
    """150 million rows take some 15 s to read; the interruption comes after 1 s."""
    log = pa.table({name: np.arange(1_000_000) for name in ("user_id", "item_id", "timestamp")})
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "parts").mkdir()
    for number in range(150):  # made at once, long in the reading
        (tmp_path / "parts" / f"{number}.parquet").symlink_to(tmp_path / "log.parquet")
    code = """if True:
        import os, signal, sys, threading, time
        from pathlib import Path
        from trec_twotower.data.sources import events, prepare
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def interrupt():
            print(time.monotonic(), flush=True)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(1, interrupt).start()
        try:
            prepare("events", Path(sys.argv[1]), {"events": sys.argv[2]})
        except KeyboardInterrupt:
            print(time.monotonic())
    """
    command = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    asked_s, ended_s = map(float, done.stdout.split())
    assert ended_s - asked_s < 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "parts"]


def test_an_interrupted_run_leaves_the_earlier_dataset_and_nothing_else(tmp_path, monkeypatch):
    out, _ = make(tmp_path, LOG)
    before = digests(out)
    written = []

    def interrupted(self: DatasetWriter, split: str, table: pa.Table) -> None:
        written.append(split)
        assert (self.scratch_dir() / "events.duckdb").exists()
        if split == "test":
            raise KeyboardInterrupt

    monkeypatch.setattr(DatasetWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, LOG, max_history=1)
    assert "train" in written
    assert digests(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out"]


# What is refused


def changed(number: int, **values: object) -> list[dict]:
    """The log with other values in one row."""
    return [row | values if at == number else row for at, row in enumerate(LOG)]


@pytest.mark.parametrize(
    ("log", "options", "parts"),
    [
        (changed(2, user_id=None), {}, ["log.parquet, row 2", "'user_id' is null", "1 such row", "remove"]),
        (changed(4, item_id=None), {}, ["row 4", "'item_id' is null"]),
        (changed(0, timestamp=None), {}, ["row 0", "'timestamp' is null"]),
        (changed(3, timestamp=-5), {}, ["row 3", "'timestamp' is -5", "1970"]),
        (changed(1, timestamp=float("nan")), {}, ["row 1", "'timestamp' is nan", "give them a time"]),
        (changed(1, timestamp=1_700_000_000_000), {}, ["row 1", "1700000000000", "milliseconds"]),
        (changed(1, timestamp=1_700_000_000_000_000_000), {}, ["row 1", "1700000000000000000", "nanoseconds"]),
        (changed(1, timestamp=9e18), {}, ["row 1", "9e+18", "nanoseconds"]),
        (changed(1, timestamp=-0.5), {}, ["row 1", "-0.5", "1970"]),
        (changed(5, score=-1.0), {"weight": "score"}, ["row 5", "'score' is -1.0", "at least 0"]),
        (changed(5, score=float("nan")), {"weight": "score"}, ["row 5", "'score' is nan"]),
        (changed(6, score=None), {"weight": "score"}, ["row 6", "'score' is null"]),
        (LOG, {"user": "userid"}, ["no column 'userid'", "nearest: 'user_id'", "user = NAME"]),
        (LOG, {"context": ["devise"]}, ["no column 'devise'", "nearest: 'device'"]),
        (LOG, {"weight": "device"}, ["row 0", "'device' is tv", "9 such rows", "a weight is a number"]),
        (LOG, {"timestamp": "device"}, ["'device' holds text such as 'phone'", "ISO 8601", "time_format="]),
        (LOG, {"item": "score"}, ["'score' is DOUBLE", "whole numbers or text", "cast"]),
        (LOG, {"min_user_events": 9}, ["No event is left of 10", "min_user_events = 9", "lower"]),
        (LOG, {"min_history": 4}, ["No train row is left", "min_history = 4", "lower"]),
        (LOG, {"min_history": 3}, ["No train row is left"]),  # what came in the same second is not earlier
        (
            LOG,
            {"split": "time", "valid_from": 20, "test_from": 30},
            ["valid period", "1970-01-01 00:00:09 UTC", "00:00:20", "move them"],
        ),
        (LOG, {"split": "time", "valid_from": 0, "test_from": 5}, ["train period"]),
        (LOG, {"split": "time", "valid_from": 5, "test_from": 10}, ["test period"]),
        (
            [row | {"item_id": 1} for row in LOG],
            {"split": "time", "valid_from": 8, "test_from": 9},
            ["valid period no user has an event with a new item", "hold_out = any"],
        ),
    ],
)
def test_logs_that_cannot_be_are_told_where_and_how_to_mend(tmp_path, log, options, parts):
    said = refusal(DataError, tmp_path, log, **options)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["events is missing"]),
        ({"events": "x", "context": "device"}, ["a list is needed, such as context=[device]"]),
        ({"events": "x", "item": "user_id"}, ["'user_id' is named twice"]),
        ({"events": "x", "context": ["history"]}, ["'history'", "rename"]),
        ({"events": "x", "split": "time", "valid_from": 5}, ["both valid_from and test_from"]),
        ({"events": "x", "split": "time", "valid_from": 5, "test_from": 5}, ["00:00:05 UTC", "swap"]),
        ({"events": "x", "test_from": 5}, ["test_from is set", "split = time"]),
        ({"events": "x", "split": "time", "valid_from": "soon", "test_from": 5}, ["valid_from = 'soon'"]),
        ({"events": "x", "split": "chance"}, ["leave-last-out", "'random'"]),
        ({"events": "x", "memory": 3}, ["nearest: 'memory_gb'"]),
        ({"events": "x", "max_history": 0}, ["max_history = 0"]),
        ({"events": "x", "max_history": True}, ["max_history = True"]),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, options, parts):
    said = refusal(ConfigError, tmp_path, **options)
    assert all(part in said for part in parts), said


def test_null_ids_are_counted_over_all_files_and_the_first_is_shown(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "a.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
    (parts / "b.csv").write_text("user_id,item_id,timestamp\n1,2,3\n1,,3\n")
    (parts / "c.csv").write_text("user_id,item_id,timestamp\n1,,3\n")
    said = refusal(DataError, tmp_path, events=str(parts))
    assert "b.csv, line 3: " in said and "the first of 2 such rows" in said


def test_files_that_are_not_there_or_of_no_use_are_named(tmp_path):
    write_log(tmp_path / "events.parquet", LOG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.md").write_text("x")
    (tmp_path / "mixed").mkdir()
    write_log(tmp_path / "mixed" / "a.parquet", LOG)
    (tmp_path / "mixed" / "b.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
    (tmp_path / "bad.parquet").write_text("not Parquet")
    (tmp_path / "bad.csv").write_text("user_id,item_id,timestamp\n" + "1,2,3\n" * 30_000 + "1,2,x\n")
    pq.write_table(pa.Table.from_pylist(LOG).slice(0, 0), tmp_path / "none.parquet")
    for name, parts in {
        "event.parquet": ["no such file", "nearest: 'events.parquet'"],
        "*.orc": ["no such file"],
        "empty": ["holds no .parquet"],
        "notes": ["holds no .parquet", "there: read.md"],
        "notes/read.md": ["read.md has none", ".parquet", ".jsonl", "format.events=csv"],
        "mixed": ["a.parquet and b.csv", "one format"],
        "bad.parquet": ["bad.parquet is not a Parquet file"],
        "bad.csv": ["bad.csv, line 30,002", "'timestamp' is x", "ISO 8601"],
        "none.parquet": ["none.parquet", "have no rows"],
    }.items():
        said = refusal(DataError, tmp_path, events=str(tmp_path / name))
        assert all(part in said for part in parts), said
    for option in ("items", "users"):
        said = refusal(DataError, tmp_path, LOG, **{option: str(tmp_path / "gone.csv")})
        assert option in said and "no such file" in said


@pytest.mark.parametrize(
    ("items", "options", "parts"),
    [
        (
            [10, 20, 30],
            {"missing_rows": "error"},
            ["2 of the 5 items", "no row there, the first of them 40", "missing_rows = keep"],
        ),
        ([11, 21], {}, ["none of the 5 items of the events has a row there", "10 for one", "in the same way"]),
        ([10, 20, 30, 40, 50, 20, 30], {}, ["2 ids", "more than one row", "first of them 20"]),
        ([10, None, 20, 30, 40, 50], {}, ["items.parquet, row 1 ", "'item_id' is null"]),
        (["10", "20"], {}, ["'item_id' is VARCHAR", "the events hold BIGINT", "one type"]),
        ([1.5], {}, ["'item_id' is DOUBLE", "whole numbers or text"]),
    ],
)
def test_catalogues_that_do_not_fit_the_events_are_refused(tmp_path, items, options, parts):
    path = write_log(tmp_path / "items.parquet", [{"item_id": item} for item in items])
    said = refusal(DataError, tmp_path, LOG, items=str(path), **options)
    assert all(part in said for part in parts), said


def test_users_and_items_without_a_row_have_nulls_and_are_counted(tmp_path):
    users = write_log(tmp_path / "users.parquet", [{"user_id": user, "age": 10 * user} for user in (1, 3, 9)])
    items = write_log(tmp_path / "items.parquet", [{"item_id": item, "tags": ["x"]} for item in (10, 30, 70)])
    said = refusal(DataError, tmp_path, LOG, users=str(users), missing_rows="error")
    assert "1 of the 3 users of the events have no row there, the first of them 2" in said
    out, manifest = make(tmp_path, LOG, users=str(users), items=str(items))
    assert [(row["user_id"], row["age"]) for row in rows(out, "users")] == [(1, 10), (2, None), (3, 30), (9, 90)]
    assert [(row["item_id"], row["tags"]) for row in rows(out, "items")] == [
        (item, ["x"] if item in (10, 30, 70) else None) for item in (10, 20, 30, 40, 50, 70)
    ]
    counts = manifest["counts"]
    assert (counts["users_without_row"], counts["items_without_row"]) == (1, 3)
    assert (counts["users_without_events"], counts["items_without_events"]) == (1, 1)


def test_no_column_may_take_the_name_of_the_id(tmp_path):
    items = write_log(tmp_path / "items.parquet", [{"item_id": "x", "asin": 1}])
    log = [{**row, "asin": row["item_id"]} for row in LOG]
    said = refusal(DataError, tmp_path, log, item="asin", items=str(items))
    assert "'asin' is to become 'item_id'" in said


def test_what_the_core_drops_is_in_no_side_table(tmp_path):
    """50 and user 2 have too few events; 70 and user 9 have none, and are dropped with a limit above 1 alone."""
    items = write_log(
        tmp_path / "items.parquet", [{"item_id": item, "price": item} for item in (*range(10, 51, 10), 70)]
    )
    users = write_log(tmp_path / "users.parquet", [{"user_id": user, "age": user} for user in (1, 2, 3, 9)])
    for options, kept_items, kept_users, removed in (
        ({}, {10, 20, 30, 40, 50, 70}, {1, 2, 3, 9}, (0, 0)),
        ({"min_item_events": 2}, {10, 20, 30, 40}, {1, 2, 3, 9}, (2, 0)),
        ({"min_user_events": 4}, {10, 20, 30, 40, 70}, {1}, (1, 3)),
    ):
        out, manifest = make(tmp_path, LOG, items=str(items), users=str(users), **options)
        assert {row["item_id"] for row in rows(out, "items")} == kept_items
        assert {row["user_id"] for row in rows(out, "users")} == kept_users
        assert all(row["price"] == row["item_id"] for row in rows(out, "items"))
        counts = manifest["counts"]
        assert (counts["items_removed"], counts["users_removed"]) == removed
        assert counts["items"] == len(kept_items)


def test_a_catalogue_may_lack_what_the_core_drops(tmp_path):
    items = write_log(tmp_path / "items.parquet", [{"item_id": item} for item in (10, 20, 30, 40)])
    out, _ = make(tmp_path, LOG, items=str(items), min_item_events=2)
    assert 50 not in {item for row in rows(out, "test") for item in row["positives"] + row["history"]}


# A row per user beside those per event


def test_users_rows_hold_what_each_took_in_train_once_and_oldest_first(tmp_path):
    out, manifest = make(
        tmp_path, [*LOG, {"user_id": 1, "item_id": 10, "timestamp": 6}], rows="both", min_history=1, seed=3
    )
    assert rows(out, "train_users") == [
        {"user_id": 1, "positives": [10, 30]},  # at 3 and 5; the last two new ones are held out
        {"user_id": 2, "positives": [30, 10]},
        {"user_id": 3, "positives": [20]},
    ]
    assert manifest["counts"]["train_users_rows"] == 3 and "train_users" in manifest["columns"]
    assert {(row["user_id"], row["item_id"]) for row in rows(out, "train")} <= {
        (row["user_id"], item) for row in rows(out, "train_users") for item in row["positives"]
    }
    timed, _ = make(
        tmp_path, rows="both", split="time", valid_from=5, test_from=8, events=str(tmp_path / "log.parquet")
    )
    assert rows(timed, "train_users") == [
        {"user_id": 1, "positives": [10]},
        {"user_id": 2, "positives": [30, 10]},
        {"user_id": 3, "positives": [20]},
    ]


def test_one_folder_trains_by_event_and_by_user_and_is_evaluated_alike(tmp_path, cli):
    """Users take one colour of four; either way of reading finds the held-out item among 40 far above chance."""
    random = np.random.default_rng(0)
    log = [
        {"user_id": user, "item_id": 4 * int(item) + user % 4, "timestamp": 100 * user + place}
        for user in range(120)
        for place, item in enumerate(random.permutation(10)[:7])
    ]
    out, _ = make(tmp_path, log, rows="both")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{dataset: {out}, batch_size: 40}}\n"
        "tables: {item: {buckets: 64, dim: 8}}\n"
        "user: [{name: history, kind: bag, table: item}]\n"
        "item: [{name: item_id, kind: id, table: item}]\n"
        "model: {dim: 8}\n"
        "loss: {negatives: {sampled: all}}\n"
        "train: {optimizer: {lr: 0.1}}\n"
        "evaluate: {k: [10], best: recall@10}\n"
    )
    steps = {}
    for way, epochs in (("event", 4), ("user", 20)):
        run = tmp_path / f"by-{way}"
        said = cli("train", config, f"run_dir={run}", f"data.rows={way}", f"train.epochs={epochs}")
        assert said.code == 0, said.err
        for command in (("export", run), ("index", run), ("evaluate", run), ("recommend", run, "--user", "5")):
            said = cli(*command)
            assert said.code == 0, said.err
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(line["recall@10"] for line in lines if line["kind"] == "valid") > 0.7  # by chance .25
        steps[way] = max(line["step"] for line in lines)
    assert steps == {"event": 4 * 120 * 5 // 40, "user": 20 * 120 // 40}
    for way, length in (("event", (0 + 1 + 2 + 3 + 4) / 5), ("user", 5 * 0.5)):  # of what is input
        lengths, source = mean_lengths(load_config(config, [f"data.rows={way}"]))
        assert source == "bag lengths from the data" and lengths["user:history"] == length


def test_a_folder_of_events_alone_says_how_users_rows_are_had(tmp_path, cli):
    out, _ = make(tmp_path, LOG)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{dataset: {out}, batch_size: 2, rows: user}}\n"
        "user: [{name: history, kind: bag, buckets: 64, dim: 8}]\n"
        "item: [{name: item_id, kind: id, buckets: 64, dim: 8}]\n"
    )
    said = cli("train", config, f"run_dir={tmp_path / 'run'}")
    assert said.code == 2 and "rows=both" in said.mistake
