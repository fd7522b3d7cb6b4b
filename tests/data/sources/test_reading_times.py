"""`prepare events` reads the same instant from every form of a time, and refuses forms that allow two readings."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources.test_reading_values import read, refusal, write, write_json
from trec_twotower.errors import ConfigError, DataError

INSTANT = 1_333_476_009  # 2012-04-03 18:00:09 UTC
NEXT = INSTANT + 86_400


def log_of(folder: Path, *times: str) -> Path:
    return write(folder / "log.csv", *(f'{user},5,"{time}"' for user, time in enumerate(times)))


def seconds(folder: Path, *times: str, **options: Any) -> list[int]:
    return read(folder, events=log_of(folder, *times), **options)["timestamp"].to_pylist()


@pytest.mark.parametrize(
    ("spelled", "options"),
    [
        (["1333476009", "1333562409"], {}),
        (["1333476009.0", "1333562409.75"], {}),
        (["1333476009000", "1333562409999"], {}),
        (["1333476009000", "1333562409999"], {"time_unit": "ms"}),
        (["1333476009000000", "1333562409999999"], {}),
        (["1333476009000000000", "1333562409999999999"], {}),
        (["2012-04-03 18:00:09", "2012-04-04T18:00:09.999"], {}),
        (["2012-04-03T20:00:09+02:00", "2012-04-04T18:00:09Z"], {}),
        (["2012/4/3 18:00:09", "2012-04-04 10:30:09-0730"], {}),
        (["03.04.2012 18:00:09", "04.04.2012 18:00:09"], {"time_format": "%d.%m.%Y %H:%M:%S"}),
        (["4/3/12 6:00:09 PM", "4/4/12 6:00:09 PM"], {"time_format": "%m/%d/%y %I:%M:%S %p"}),
        (["20120403180009", "20120404180009"], {"time_format": "%Y%m%d%H%M%S"}),
        (
            ["Tue Apr 03 18:00:09 +0000 2012", "Wed Apr 04 20:00:09 +0200 2012"],
            {"time_format": "%a %b %d %H:%M:%S %z %Y"},
        ),
        (["03.04.2012 18:00:09", "04.04.2012 18:00:09"], {"types": {"timestamp": "%d.%m.%Y %H:%M:%S"}}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_form_of_a_time_is_the_same_second(tmp_path, spelled, options, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    assert seconds(tmp_path, *spelled, **options) == [INSTANT, NEXT]


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_parquet_are_the_same_second(tmp_path, unit, zone):
    times = pa.array([datetime.datetime.fromtimestamp(INSTANT, datetime.UTC)]).cast(pa.timestamp(unit, zone))
    pq.write_table(pa.table({"user_id": [1], "item_id": [5], "timestamp": times}), tmp_path / "log.parquet")
    assert read(tmp_path, events=tmp_path / "log.parquet")["timestamp"].to_pylist() == [INSTANT]


def test_text_and_milliseconds_of_json_and_parquet(tmp_path, capsys):
    for time in ("2012-04-03T18:00:09Z", INSTANT * 1000, f"{INSTANT}", float(INSTANT)):
        log = write_json(tmp_path / "log.jsonl", [{"user_id": 1, "item_id": 5, "timestamp": time}])
        assert read(tmp_path, events=log)["timestamp"].to_pylist() == [INSTANT]
        pq.write_table(pa.table({"user_id": [1], "item_id": [5], "timestamp": [time]}), tmp_path / "log.parquet")
        assert read(tmp_path, events=tmp_path / "log.parquet")["timestamp"].to_pylist() == [INSTANT]
    assert "counts milliseconds since 1970, such as 1,333,476,009,000 (time_unit=ms)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spelled", "formats"),
    [
        (["03/04/2024 10:00:00", "04/12/2024 11:00:00"], ("%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S")),
        (["03.04.2024"], ("%d.%m.%Y", "%m.%d.%Y")),
        (["3-4-2024 9:05 PM"], ("%d-%m-%Y %I:%M %p", "%m-%d-%Y %I:%M %p")),
    ],
)
def test_a_day_is_not_guessed_from_a_month(tmp_path, spelled, formats):
    message = refusal(DataError, tmp_path, events=log_of(tmp_path, *spelled))
    assert all(f"time_format={format!r}" in message for format in formats)
    first, second = (seconds(tmp_path, *spelled, time_format=format)[0] for format in formats)
    day = datetime.datetime.fromtimestamp
    assert day(first, datetime.UTC).month == 4 and day(second, datetime.UTC).month == 3


@pytest.mark.parametrize(("order", "month"), [("{0:02d}/04/2024 10:00", 4), ("04/{0:02d}/2024 10:00", 4)])
def test_a_day_above_12_anywhere_in_the_files_decides(tmp_path, capsys, order, month):
    """The 13th comes after more rows than DuckDB would look at."""
    times = [order.format(1 + number % 12) for number in range(20_600)] + [order.format(13)]
    found = {datetime.datetime.fromtimestamp(time, datetime.UTC).month for time in seconds(tmp_path, *times)}
    assert found == {month} and "the only order that fits them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spelled", "parts"),
    [
        (["31/12/2024", "12/31/2024"], ["begin with a day in some rows and with a month in others"]),
        (
            ["0", "1700000000000"],
            ["line 3", "'timestamp' is 1700000000000", "time_unit=s, ms, us or ns", "milliseconds"],
        ),
        (["20240131", "20240201"], ["looks like a date", "time_format=%Y%m%d"]),
        (["202401312359"], ["time_format=%Y%m%d%H%M"]),
        (["20240131235900"], ["time_format=%Y%m%d%H%M%S"]),
        (["01/02/24"], ["holds text such as '01/02/24'", "time_format="]),
        (["Sep 01, 2016"], ["holds text such as 'Sep 01, 2016'", "time_format="]),
        (["2024-01-31", "2024-02-30"], ["line 3", "'timestamp' is 2024-02-30"]),
        (["2024-01-31", "soon"], ["line 3", "'timestamp' is soon"]),
        (["1700000000", "soon"], ["line 3", "'timestamp' is soon", "other times are numbers"]),
        (["-10"], ["line 2", "'timestamp' is -10", "before 1970"]),
        (["1969-12-31 23:59:59.5"], ["line 2", "before 1970"]),
    ],
)
def test_times_that_allow_no_or_two_readings_are_refused(tmp_path, spelled, parts):
    message = refusal(DataError, tmp_path, events=log_of(tmp_path, *spelled))
    assert all(part in message for part in parts), message


def test_options_of_times_are_checked(tmp_path):
    log = log_of(tmp_path, "2024-01-31")
    for options, part in (
        ({"time_format": "%Q"}, "not a time format"),
        ({"time_format": "ISO"}, "a time format has parts such as"),
        ({"time_unit": "m"}, "'s', 'ms', 'us' or 'ns'"),
        ({"time_unit": "s", "time_format": "%Y"}, "give one of them"),
        ({"types": {"timestamp": "number"}}, "this column holds times"),
    ):
        assert part in refusal(ConfigError, tmp_path, events=log, **options)
    message = refusal(DataError, tmp_path, events=log, time_format="%d/%m/%Y")
    assert "line 2: 'timestamp' is 2024-01-31" in message and "time_format does not fit it" in message
    assert "time_unit is for numbers" in refusal(DataError, tmp_path, events=log, time_unit="s")


def test_times_without_a_zone_among_others_are_utc_and_reported(tmp_path, capsys):
    assert seconds(tmp_path, "2012-04-03 18:00:09", "2012-04-04T20:00:09+02:00") == [INSTANT, NEXT]
    assert "1 of 2 times of 'timestamp' name no zone: read as UTC" in capsys.readouterr().err
