"""Every mistake a person can make is answered by one message and a customary exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.shop import LAUNCHER

USAGE, DATA = 2, 3  # exit codes


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replaced(table: pa.Table, column: str, values: object) -> pa.Table:
    """The table with another column in this one's place."""
    return table.set_column(table.schema.get_field_index(column), column, values)


def with_first(table: pa.Table, column: str, value: object) -> pa.Table:
    """The table with another value in a column's first row."""
    return replaced(table, column, pa.array([value, *table[column].to_pylist()[1:]], table.schema.field(column).type))


# ---------------------------------------------------------------- the call itself


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ([], ["COMMAND"]),
        (["trian", "shop.yaml"], ["no command 'trian' (nearest: 'train')", "--help"]),
        (["evalute", "--index"], ["no command 'evalute' (nearest: 'evaluate')"]),
        (["train", "shop.yaml", "--initfrom", "run"], ["unrecognized", "nearest: '--init-from'"]),
        (["recommend", "run", "--user", "-u"], ["--user", "--user=-VALUE"]),
        (["recommend", "run", "--user", "1", "--without", "--k", "3"], ["--without=-VALUE"]),
        (["launch"], ["train, export, evaluate, recommend"]),
        (["launch", "--ranks", "2"], ["train, export, evaluate, recommend"]),
        (["launch", "index", "run"], ["index runs in one process"]),
        (["launch", "trian", "shop.yaml"], ["trian is no command (nearest: 'train')"]),
        (["launch", "launch", "train"], ["launch runs in one process"]),
        (["train"], ["CONFIG"]),
        (["evaluate", "run", "--split"], ["--split"]),
        (["export", "run", "--ranks", "2"], ["--ranks"]),
        (["train", "shop.yaml", "epochs"], ["There is no config file shop.yaml"]),
        (["prepare", "synthetik", "--out", "world"], ["'synthetik'", "nearest: 'synthetic'"]),
        (["prepare", "synthetic", "--out", "world", "user=10"], ["'user'", "nearest: 'users'"]),
        (["prepare", "synthetic", "--out", "world", "users=many"], ["users", "many"]),
        (["prepare", "synthetic", "--out", "world", "users"], ["'users'", "key=value"]),
        (["recommend", "run", "--user", "1", "--k", "some"], ["--k", "'some'"]),
        (["recommend", "run", "--user", "1", "--k", "0"], ["--k is 0", "1 or more"]),
        (["recommend", "run"], ["--user"]),
        (
            ["recommend", "run", "--all", "--user", "1", "--out", "f.parquet"],
            ["--all", "--user", "give one of the two"],
        ),
        (["recommend", "run", "--all"], ["--all writes a Parquet file", "--out"]),
        (["recommend", "run", "--all", "--out", "."], [". is a folder", "--out"]),
        (["recommend", "run", "--user", "1", "--out", "f.parquet"], ["--out", "belong to --all"]),
        (["recommend", "run", "--user", "1", "--overwrite"], ["--overwrite", "belong to --all"]),
        (["recommend", "run", "--all", "--out", "f.parquet"], ["run is no run folder"]),
        (["compare", "run"], ["RUN_B"]),
        (["compare", "run", "other"], ["run is no run folder"]),
        (["compare", "run", "other", "--k", "0"], ["--k is 0", "1 or more"]),
        (["plan", "shop.yaml", "--ranks", "2"], ["There is no config file shop.yaml"]),
        (["export", "run"], ["run is no run folder", "config.yaml", "train"]),
        (["serve", "run"], ["run is no run folder"]),
        (["serve", "run", "--max-k", "0"], ["--max-k is 0"]),
        (["serve", "run", "--reload-s", "-1"], ["--reload-s is -1"]),
        (["serve", "run", "--reload-s", "nan"], ["--reload-s is nan"]),
        (["demo", "--ranks", "0"], ["--ranks is 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistaken_call_is_told_what_is_wrong(cli, tmp_path, monkeypatch, call, says):
    monkeypatch.chdir(tmp_path)
    said = cli(*call)
    assert said.code == USAGE
    assert not [word for word in says if word not in said.mistake], said.mistake
    assert said.out == "" and listing(tmp_path) == {}


@pytest.mark.parametrize("variable", ["2", "many"])
def test_a_stage_of_one_process_is_refused_on_ranks(cli, tmp_path, monkeypatch, variable):
    monkeypatch.setenv("WORLD_SIZE", variable)
    monkeypatch.setenv("RANK", "0")
    for call in (["index", tmp_path], ["prepare", "synthetic", "--out", tmp_path / "d"], ["serve", tmp_path]):
        said = cli(*call)
        assert said.code == USAGE and "WORLD_SIZE" in said.mistake and "launcher" in said.mistake
    assert listing(tmp_path) == {}


def test_the_version_is_printed(cli):
    import trec_twotower

    said = cli("--version")
    assert (said.code, said.out) == (0, f"trec-twotower {trec_twotower.__version__}\n")


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_a_shipped_config_is_opened_by_its_name(tmp_path, monkeypatch, name):
    from trec_twotower.config.loading import load_config

    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is no config
    config = load_config(name)
    assert config.data.dataset == "data/demo" and config.run_dir == Path("runs/demo")
    local = tmp_path / name
    if local.suffix:  # a file of one's own comes first
        local.parent.mkdir(exist_ok=True)
        text = (LAUNCHER.parent.parent / "configs/demo.yaml").read_text()
        local.write_text(text.replace("data/demo", "data/mine"))
        assert load_config(name).data.dataset == "data/mine"


def test_only_shipped_names_are_opened_by_name(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, says in (
        ("gowala", "nearest: 'gowalla'"),
        ("elsewhere/demo.yaml", "no config file elsewhere/demo.yaml (nearest: 'demo')"),
        ("demo.json", "no config file demo.json"),
        (".", "is a folder"),
    ):
        said = cli("plan", name, "--ranks", 2)
        assert said.code == USAGE and says in said.mistake


def test_a_missing_config_names_the_nearest(cli, shop):
    said = cli("train", shop.config.with_name("shopp.yaml"))
    assert said.code == USAGE and "shopp.yaml (nearest: 'shop.yaml')" in said.mistake


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize("command", [["plan", "--ranks", 2], ["features"]], ids=lambda words: words[0])
def test_every_command_that_takes_a_config_refuses_words_that_faiss_does_not_know(cli, shop, command):
    said = cli(*command, shop.config, "index.factory=IVF16,SQ7")
    assert said.code == USAGE and "'IVF16,SQ7' is no index of dim 8 to FAISS" in said.mistake


@pytest.mark.parametrize(
    ("command", "then"), [("train", "continues from the newest checkpoint"), ("features", "starts again")]
)
def test_who_interrupts_is_told_what_the_same_command_would_do(cli, shop, monkeypatch, command, then):
    """Only a training has saved anything."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trec_twotower.config.loading.load_config", interrupted)
    said = cli(command, shop.config)
    assert said.code == 130 and said.mistake.strip().endswith(f": interrupted; the same command {then}."), said.err


def test_an_interrupt_that_a_library_made_an_error_of_is_an_interrupt(cli, shop, monkeypatch):
    """Native code that calls Python reports Ctrl-C as an error of its own, in words or as the cause."""

    def wrapped(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy could not be imported") from error

    def describe(*_: object) -> None:
        raise SystemError("Error building `literal` serializer:\n  KeyboardInterrupt:")

    for interrupted in (wrapped, describe):
        monkeypatch.setattr("trec_twotower.config.loading.load_config", interrupted)
        said = cli("features", shop.config)
        assert said.code == 130 and "interrupted" in said.mistake


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("call", "begins"),
    [
        (["prepare", "synthetic", "--out", "OUT", "rows=50000000"], None),
        (["train", "CONFIG", "run_dir=OUT", "train.epochs=1000000"], "step"),
        (["train", "CONFIG", "run_dir=OUT"], None),
        (["launch", "--ranks", "2", "train", "CONFIG", "run_dir=OUT"], None),
        (["evaluate", "RUN"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_ctrl_c_ends_a_command_in_one_line(shop, tmp_path, call, begins):
    """Sent to the process group, as by a terminal, when the first step is printed or while libraries are imported."""
    places = {"OUT": str(tmp_path / "out"), "CONFIG": str(shop.config), "RUN": str(shop.run)}
    words = [re.sub("OUT|CONFIG|RUN", lambda found: places[found[0]], word) for word in call]
    ready = "import sys, threading; from trec_twotower.cli import main; print('ready', flush=True); main()"
    job = subprocess.Popen(
        [sys.executable, "-c", ready, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        if begins is not None:
            assert job.stdout.readline().startswith(begins)
        else:
            time.sleep(1)
        os.killpg(job.pid, signal.SIGINT)
        _, err = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    # A rank that has not run a line of ours is ended by the interpreter, which reports so itself.
    err = err.partition("Fatal Python error: init_import_site")[0]
    assert job.returncode == 130 and "Traceback" not in err, err
    messages = [line for line in err.splitlines() if line.startswith("trec-twotower")]
    assert len(messages) <= 1 and all(line.startswith(("trec-twotower", "torchrun: ")) for line in err.splitlines()), (
        err
    )
    assert messages or err.startswith("torchrun: stopped by SIGINT")


def test_help_loads_neither_faiss_nor_torch():
    look = (
        "import sys\nfrom trec_twotower.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print({'faiss', 'torch'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", look]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.epoch=3"], ["'train.epoch'", "nearest: 'epochs'"]),
        (["item=null"], ["'item'"]),
        (["train.epochs"], ["'train.epochs'", "key=value"]),
        (["train.epochs=many"], ["'train.epochs'", "'many'"]),
        (["train.epochs.more=1"], ["'epochs' is 2"]),
        (["user.histori.max_length=3"], ["'histori'", "nearest: 'history'"]),
        (["data.batch_size={"], ["data.batch_size", "not valid YAML"]),
        (["item.item_id.table=itms"], ["'itms'", "nearest: 'item'"]),
        (["item.colour.table=colours", "item.colour.buckets=null", "item.colour.dim=null"], ["'colours'", "`tables`"]),
        (["evaluate.k=[0]"], ["evaluate.k", "greater than 0"]),
        (["evaluate.best=recall@7"], ["'recall@7'", "nearest"]),
        (["model.item_tower.project=false"], ["project: false", "model.dim = 8"]),
        (
            ["index.factory=FooBar"],
            ["index.factory 'FooBar' is no index of dim 8 to FAISS (could not parse", "such as IVF1024,SQfp16"],
        ),
        (["item.price.dim=6", "item.price.bins=3", "item.price.normalize=zscore"], ["'price'", "dim 6", "4 or 8"]),
        # what only the data can tell
        (["user.history.column=histori"], ["'histori'", "nearest: 'history'"]),
        (["item.price.column=cost"], ["'cost'", "has no column"]),
        (["user.history.weights=wheights"], ["'wheights'"]),
        (["data.rows=user"], ["'history'", "without weights"]),
        (["data.rows=user", "user.history.weights=null"], ["'positives'", "data.rows"]),
        (["data.batch_size=321"], ["321", "320 rows"]),
        (["data.dataset=ss3://bucket/shop"], ["ss3://bucket/shop", "nearest: 's3'"]),
        (["data.cache={config}"], ["data.cache is", "not a folder", "remove the setting"]),
        (["evaluate.k=[41]", "evaluate.best=recall@41"], ["41", "40"]),
    ],
    ids=" ".join,
)
def test_a_config_that_cannot_be_is_refused_and_the_mended_one_runs_in_its_place(cli, shop, tmp_path, overrides, says):
    run = tmp_path / "run"
    overrides = [word.replace("{config}", str(shop.config)) for word in overrides]
    said = cli("train", shop.config, f"run_dir={run}", *overrides)
    assert said.code == USAGE
    assert not [word for word in says if word not in said.mistake], said.mistake
    assert not run.exists() or "evaluate.k=[41]" in overrides  # which is looked at when the model is there
    again = cli("train", shop.config, f"run_dir={run}", "train.epochs=1")
    assert again.code == 0, again.err


@pytest.mark.parametrize("nothing", [[], None])
def test_users_who_all_took_nothing_are_refused(cli, shop_tables, write_dataset, tmp_path, nothing):
    kind = pa.list_(pa.string())
    train = pa.table({"user_id": ["a", "b", "c"], "positives": pa.array([[], nothing, nothing], kind)})
    data, config = write_dataset(tmp_path / "d", train=train, items=shop_tables["items"]), tmp_path / "c.yaml"
    config.write_text(
        f"data: {{dataset: {data}, rows: user, batch_size: 2}}\n"
        "user: [{name: history, kind: bag, buckets: 16, dim: 4}]\n"
        "item: [{name: item_id, kind: id, buckets: 16, dim: 4}]\n"
    )
    said = cli("train", config, f"run_dir={tmp_path / 'run'}")
    assert said.code == 3 and "d/train has 3 rows, but all their 'positives' are empty or null" in said.mistake
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_config_is_refused_and_keeps_its_training(cli, shop):
    before = listing(shop.run)
    said = cli("train", shop.config, f"run_dir={shop.run}", "model.dim=16", "train.optimizer.lr=0.2")
    assert said.code == USAGE
    for words in ("model.dim was 8, now 16", "lr was 0.1, now 0.2", "run_dir="):
        assert words in said.mistake
    assert listing(shop.run) == before


def test_a_strangers_folder_is_not_touched(cli, shop, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    said = cli("train", shop.config, f"run_dir={tmp_path}")
    assert said.code == USAGE and "not empty" in said.mistake and "run_dir=" in said.mistake
    said = cli("train", shop.config, f"run_dir={tmp_path / 'thesis.txt'}")
    assert said.code == USAGE and "thesis.txt is not a folder" in said.mistake
    said = cli("prepare", "synthetic", "--out", tmp_path, "--overwrite", "users=10")
    assert said.code == USAGE and "thesis.txt" in said.mistake
    assert listing(tmp_path) == {"thesis.txt": b"three years of work"}


# ---------------------------------------------------------------- the data


BAD_DATA: dict[str, tuple[Callable[[dict[str, pa.Table]], dict[str, pa.Table]], list[str]]] = {
    "no rows": (lambda t: {"train": t["train"].slice(0, 0)}, ["train", "but no rows"]),
    "no items": (lambda t: {"items": t["items"].slice(0, 0)}, ["items", "but no rows"]),
    "no item_id": (lambda t: {"items": t["items"].drop_columns(["item_id"])}, ["items", "'item_id'"]),
    "ids that are fractions": (
        lambda t: {"items": replaced(t["items"], "item_id", pa.array([0.5] * 40))},
        ["'item_id' is double", "cast"],
    ),
    "text for a number": (
        lambda t: {"items": replaced(t["items"], "price", pa.array(["cheap"] * 40))},
        ["'price' is string", "numbers"],
    ),
    "a number for a list": (
        lambda t: {"items": replaced(t["items"], "tags", pa.array([1] * 40))},
        ["'tags' is int64", "lists"],
    ),
    "NaN": (
        lambda t: {"items": with_first(t["items"], "price", math.nan)},
        ["'price'", "nan", "row 0", "nan: missing"],
    ),
    "an infinite age": (
        lambda t: {"users": with_first(t["users"], "age", math.inf)},
        ["users", "'age'", "inf", "row 0"],
    ),
    "an item without id": (lambda t: {"items": with_first(t["items"], "item_id", None)}, ["items", "null", "row 0"]),
    "a row without item": (lambda t: {"train": with_first(t["train"], "item_id", None)}, ["train", "null", "row 0"]),
    "a row without user": (lambda t: {"train": with_first(t["train"], "user_id", None)}, ["train", "null", "row 0"]),
    "a user without id": (lambda t: {"users": with_first(t["users"], "user_id", None)}, ["users", "null", "row 0"]),
    "an item twice": (
        lambda t: {"items": pa.concat_tables([t["items"], t["items"].slice(3, 1)])},
        ["'red-3'", "rows 3 and 40"],
    ),
    "an unknown item": (
        lambda t: {"train": with_first(t["train"], "item_id", "pink-1")},
        ["train", "'pink-1'", "catalogue"],
    ),
    "an unknown item to find": (
        lambda t: {"valid": with_first(t["valid"], "positives", ["pink-1"])},
        ["valid", "'pink-1'", "catalogue"],
    ),
    "a user without features": (lambda t: {"users": t["users"].slice(1)}, ["'user-0'", "users", "write one row"]),
    "weights of another length": (
        lambda t: {"train": with_first(t["train"], "history_weight", [1.0])},
        ["history_weight", "0 ids but 1 weights"],
    ),
    "infinite weights": (
        lambda t: {"train": replaced(t["train"], "history_weight", infinite(t["train"]["history_weight"]))},
        ["history_weight", "finite"],
    ),
    "negative row weights": (
        lambda t: {"train": t["train"].append_column("weight", pa.array([-1.0] * 320))},
        ["'weight'", "-1", "at least 0"],
    ),
}


def infinite(lists: pa.ChunkedArray) -> pa.Array:
    return pa.array([[math.inf] * len(row) for row in lists.to_pylist()], lists.type)


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_are_named_and_the_mended_ones_train_in_the_same_folder(
    cli, shop, shop_tables, write_dataset, tmp_path, what
):
    damage, says = BAD_DATA[what]
    run, dataset = tmp_path / "run", tmp_path / "shop"
    write_dataset(dataset, **{**shop_tables, **damage(shop_tables)})
    call = ("train", shop.config, f"data.dataset={dataset}", f"run_dir={run}", "train.epochs=1")
    said = cli(*call)
    assert said.code == DATA
    assert not [word for word in says if word not in said.mistake], said.mistake
    assert not (run / "checkpoints").exists()
    shutil.rmtree(dataset)
    shutil.copytree(shop.dataset, dataset)
    again = cli(*call)
    assert again.code == 0, again.err


def test_a_missing_dataset_names_the_nearest(cli, shop, tmp_path):
    call = ("train", shop.config, f"run_dir={tmp_path / 'run'}")
    said = cli(*call, f"data.dataset={shop.dataset.with_name('shopp')}")
    assert said.code == DATA and "shopp (nearest: 'shop')" in said.mistake and "prepare" in said.mistake
    said = cli(*call, f"data.dataset={shop.run}")
    assert said.code == DATA and "no folder train/" in said.mistake
    assert listing(tmp_path) == {}


def test_other_data_than_the_run_began_with_are_refused(cli, shop_copy, shop_tables, write_dataset, tmp_path):
    dataset = tmp_path / "other"
    write_dataset(dataset, **{**shop_tables, "train": shop_tables["train"].slice(1)})
    before = listing(shop_copy.run)
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}", f"data.dataset={dataset}")
    assert said.code == DATA and "not the dataset this run began with" in said.mistake
    assert "another run_dir" in said.mistake
    del before["config.yaml"]
    assert before.items() <= listing(shop_copy.run).items()


@pytest.mark.parametrize("name", ["statistics.json", "item_counts.npy"])
@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: b"no longer what it was", lambda whole: whole[:-9] + b"1" + whole[-8:]],
    ids=["empty", "overwritten", "one byte"],
)
def test_what_a_run_learned_from_the_data_can_be_learned_again(cli, shop_copy, name, damage):
    before, path = listing(shop_copy.run), shop_copy.run / name
    path.write_bytes(damage(path.read_bytes()))
    said = cli("evaluate", shop_copy.run)
    assert said.code == DATA and name in said.mistake and "remove statistics.json" in said.mistake
    (shop_copy.run / "statistics.json").unlink()
    assert cli("evaluate", shop_copy.run).code == 0
    after = listing(shop_copy.run)
    assert {file: after[file] for file in before} == before


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda test: with_first(test, "positives", ["pink-1"]), ["test", "'pink-1'", "catalogue"]),
        (lambda test: with_first(test, "user_id", "nobody"), ["test", "'nobody'", "users"]),
        (lambda test: with_first(test, "user_id", None), ["test", "null", "row 0"]),
        (lambda test: test.drop_columns(["history"]), ["test", "'history'"]),
        (lambda test: replaced(test, "positives", pa.array([[]] * 80, pa.list_(pa.string()))), ["nothing to evaluate"]),
    ],
    ids=["unknown item", "unknown user", "no user", "no history", "nothing to find"],
)
def test_bad_test_rows_stop_what_reads_them(cli, shop_copy, shop_tables, write_dataset, tmp_path, damage, says):
    dataset = write_dataset(tmp_path / "shop", **{**shop_tables, "test": damage(shop_tables["test"])})
    run = tmp_path / "fresh"
    said = cli("train", shop_copy.config, f"data.dataset={dataset}", f"run_dir={run}", "train.epochs=1")
    assert said.code == 0, said.err
    before = listing(run)
    for command in ("evaluate", "export"):
        said = cli(command, run)
        assert said.code in (USAGE, DATA)
        assert not [word for word in says if word not in said.mistake], said.mistake
    assert listing(run) == before


# ---------------------------------------------------------------- one stage before another, and what they ask for


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        (["evaluate", "RUN", "--split", "tst"], USAGE, ["'tst'", "nearest: 'test'"]),
        (["evaluate", "RUN", "--split", "items"], USAGE, ["'items'", "'test'"]),
        (["evaluate", "RUN", "--checkpoint", "11"], USAGE, ["'11'", "best, newest", "[5, 10]"]),
        (["export", "RUN", "--checkpoint", "first"], USAGE, ["'first'", "best, newest", "[5, 10]"]),
        (["recommend", "RUN", "--user", "user-1", "--checkpoint", "x"], USAGE, ["'x'", "best, newest"]),
        (["recommend", "RUN", "--user", "user-80"], DATA, ["'user-80'", "no part"]),
        (["recommend", "RUN", "--user", "user-1", "--where", "colour"], USAGE, ["'colour'", "category=Mugs"]),
        (["recommend", "RUN", "--user", "user-1", "--where", "color=red"], USAGE, ["nearest: 'colour'"]),
        (["recommend", "RUN", "--user", "user-1", "--where", "colour=pink"], DATA, ["allows none of the 40 items"]),
        (["recommend", "RUN", "--user", "user-1", "--k", "41"], USAGE, ["41", "40 items"]),
        (["evaluate", "RUN", "--rankings", "RUN"], USAGE, ["is a folder"]),
        (["evaluate", "RUNS"], USAGE, ["no run folder", "nearest: 'run'"]),
        (["index", "RUNS"], USAGE, ["no run folder", "nearest: 'run'"]),
        (["recommend", "RUNS", "--user", "user-1"], USAGE, ["no run folder", "nearest: 'run'"]),
        (["export", "RUN/config.yaml"], USAGE, ["config.yaml is a file: name the run folder RUN."]),
        (["export", "CONFIG"], USAGE, ["shop.yaml is a file: name a run folder."]),
        (["report", "DATASET"], USAGE, ["is a dataset, and no run folder", "name the run that was trained on it"]),
        (["index", "RUN", "lists=3"], USAGE, ["lists is not an index setting (nearest: 'index.lists')"]),
        (["index", "RUN", "train.epochs=3"], USAGE, ["train.epochs is not an index setting, and"]),
        (["export", "RUN", "--columns", "item_id"], USAGE, ["which every export of items has"]),
        (["train", "CONFIG", "data.dataset=CONFIG", "run_dir=RUN-2"], DATA, ["is a file: a dataset is a folder"]),
        (["train", "CONFIG", "run_dir=RUN-2", "--init-from", "RUN-3"], USAGE, ["no run folder", "nearest: 'run'"]),
        (["prepare", "synthetic", "--out", "CONFIG/below", "users=9"], USAGE, ["shop.yaml, which is a file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_a_run_cannot_give_is_said(cli, shop, call, code, says):
    before = listing(shop.run.parent)

    def filled(text: str) -> str:
        places = {"RUN": shop.run, "CONFIG": shop.config, "DATASET": shop.dataset}
        return re.sub("RUN|CONFIG|DATASET", lambda found: str(places[found[0]]), text)

    said = cli(*map(filled, call))
    assert said.code == code
    assert not [word for word in says if filled(word) not in said.mistake], said.mistake
    assert said.out == "" and listing(shop.run.parent) == before


def test_an_unknown_user_is_named_and_the_others_are_answered(cli, shop):
    expected = cli("recommend", shop.run, "--user", "user-1", "--user", "user-2")
    assert expected.code == 0 and expected.err == ""
    said = cli("recommend", shop.run, "--user", "user-1", "--user", "user-80", "--user=-u", "--user", "user-2")
    assert said.code == 0 and said.out == expected.out
    first, second = said.err.splitlines()
    assert "'user-80' is in no part" in first and "'-u' is in no part" in second
    said = cli("recommend", shop.run, "--user", "user-80", "--user", "user-81")
    assert said.code == DATA and said.out == "" and len(said.err.splitlines()) == 2


def test_titles_cannot_control_the_terminal(cli, shop, shop_tables, write_dataset, tmp_path):
    titles = pa.array(["\x1b]0;owned\x07\x1b[2J" + title for title in shop_tables["items"]["title"].to_pylist()])
    items = replaced(shop_tables["items"], "title", titles)
    items = replaced(items, "colour", pa.array([f"\x1b[7m{colour}" for colour in items["colour"].to_pylist()]))
    dataset = write_dataset(tmp_path / "shop", **{**shop_tables, "items": items})
    run = tmp_path / "run"
    for call in (
        ("train", shop.config, f"data.dataset={dataset}", f"run_dir={run}", "train.epochs=1"),
        *(("export", run), ("index", run), ("evaluate", run, "--slice", "item.colour")),
        ("recommend", run, "--user", "user-1"),
    ):
        said = cli(*call)
        assert said.code == 0, said.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said.out)
        assert call[0] != "evaluate" or "[7mred" in said.out
    assert "]0;owned[2JA " in said.out


def test_stages_before_their_time_name_the_stage_to_run(cli, shop_copy):
    run = shop_copy.run
    shutil.rmtree(run / "index")
    for call in (["recommend", run, "--user", "user-1"], ["evaluate", run, "--index"]):
        said = cli(*call)
        assert said.code in (USAGE, DATA) and f"no index in {run / 'index'}" in said.mistake
        assert "trec-twotower index RUN" in said.mistake
    shutil.rmtree(run / "export")
    said = cli("serve", run)
    assert said.code == USAGE and "run trec-twotower export RUN, then trec-twotower index RUN" in said.mistake
    said = cli("index", run)
    assert said.code == USAGE and f"trec-twotower export {run}" in said.mistake
    shutil.rmtree(run / "checkpoints")
    for command in ("export", "evaluate"):
        said = cli(command, run)
        assert said.code == USAGE and "no complete checkpoint: train first" in said.mistake


def test_an_index_of_other_weights_is_refused_until_both_agree(cli, shop_copy):
    run = shop_copy.run
    first = min(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert cli("export", run, "--checkpoint", first).code == 0
    assert cli("index", run).code == 0
    for call in (["recommend", run, "--user", "user-1"], ["evaluate", run, "--index"]):
        said = cli(*call)
        assert said.code == USAGE
        assert "built from model" in said.mistake and "export and index again" in said.mistake
        assert cli(*call, "--checkpoint", first).code == 0
    assert cli("export", run).code == cli("index", run).code == cli("recommend", run, "--user", "user-1").code == 0


def test_an_index_is_built_with_other_settings_than_the_run_was_trained_with(cli, shop_copy):
    run = shop_copy.run
    before = (run / "config.yaml").read_bytes()
    said = cli("index", run, "index.lists=4", "index.target_recall=0.9", "index.tune_users=60")
    assert said.code == 0, said.err
    report = json.loads((run / "index/manifest.json").read_text())["report"]
    assert (report["lists"], report["target_recall"]) == (4, 0.9)
    settings = report["settings"]
    assert (settings["lists"], settings["target_recall"], settings["tune_users"]) == (4, 0.9, 60)
    assert (run / "config.yaml").read_bytes() == before
    for override, wrong in (
        ("train.epochs=3", "train.epochs is not an index setting"),
        ("index.target=0.9", "nearest: 'target_recall'"),
        ("index.target_recall=2", "less than or equal to 1"),
        ("index.shards=1000", "index.shards is 1,000 but the catalogue has 40 items"),
    ):
        said = cli("index", run, override)
        assert said.code == USAGE and wrong in said.mistake


# ---------------------------------------------------------------- on two ranks


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("overrides", "code", "says"),
    [
        (["--epochs=3"], USAGE, ["--epochs=3"]),
        (["train.epoch=3"], USAGE, ["nearest: 'epochs'"]),
    ],
    ids=["call", "config"],
)
def test_two_ranks_end_at_once_with_one_message(on_ranks, shop, tmp_path, overrides, code, says):
    run = tmp_path / "run"
    said = on_ranks("train", shop.config, f"run_dir={run}", *overrides, timeout_s=90)
    assert said.code == code
    assert not [word for word in says if word not in said.mistake], said.mistake
    assert [line for line in said.err.splitlines() if not line.startswith("trec-twotower")] == [
        f"torchrun: rank {rank} ended with exit code {code}; see its message above."
        for rank in (0, 1)
        if f"rank {rank} " in said.err
    ]
    assert not (run / "checkpoints").exists()


@pytest.mark.timeout(240)
def test_plain_torchrun_starts_ranks_as_our_launcher_does(on_ranks, shop, tmp_path):
    """The same losses, and of a mistake one message; the exit code is torchrun's own."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def started(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        call = ["-m", "trec_twotower", "train", str(shop.config), f"run_dir={tmp_path / name}", *overrides]
        return subprocess.run([*torchrun, *call], env=environ, capture_output=True, text=True, timeout=100)

    plain = started("plain", "train.epochs=1")
    assert plain.returncode == 0, plain.stderr
    said = on_ranks("train", shop.config, f"run_dir={tmp_path / 'ours'}", "train.epochs=1")
    assert said.code == 0, said.err
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if "loss" in line
        ]
        for name in ("plain", "ours")
    ]
    assert losses[0] == losses[1] != []
    assert json.loads((tmp_path / "plain/status.json").read_text())["num_ranks"] == 2
    refused = started("refused", "train.epoch=1")
    messages = [line for line in refused.stderr.splitlines() if line.startswith("trec-twotower")]
    assert refused.returncode == 1 and len(messages) == 1 and "nearest: 'epochs'" in messages[0]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("user.history.column=histori", USAGE, ["nearest: 'history'"]),  # found by the first rank for all
        ("data.dataset=LAME", DATA, ["'user-0'", "write one row"]),  # found by each rank's reader
    ],
    ids=["column", "data"],
)
def test_what_two_ranks_find_while_they_read_is_one_message(
    on_forked_ranks, shop, shop_tables, write_dataset, tmp_path, override, code, says
):
    """Under a launcher, which gives them a place to agree who speaks."""
    lame = write_dataset(tmp_path / "lame", **{**shop_tables, "users": shop_tables["users"].slice(1)})
    run = tmp_path / "run"
    (tmp_path / "said").mkdir()
    override = override.replace("LAME", str(lame))
    place = {"TREC_TT_SAID_DIR": str(tmp_path / "said")}
    said = on_forked_ranks("train", shop.config, f"run_dir={run}", override, timeout_s=90, **place)
    assert said.code == code
    assert len(said.err.splitlines()) == 1 and not [word for word in says if word not in said.mistake], said.err
    assert not (run / "checkpoints").exists()


@pytest.mark.timeout(150)
def test_two_ranks_recommend_as_one_does_and_print_once(on_forked_ranks, cli, shop):
    call = ("recommend", shop.run, "--user", "user-1", "--user", "user-80", "--user", "user-2")
    one, two = cli(*call), on_forked_ranks(*call)
    assert (two.code, two.out, two.err) == (0, one.out, one.err) and two.err.count("user-80") == 1


@pytest.mark.timeout(150)
def test_a_rank_that_is_left_alone_says_so_in_one_line(on_forked_ranks, shop_copy):
    """Also before the training has begun, and in the commands after it."""
    calls = {
        "train": ("train", shop_copy.config, f"run_dir={shop_copy.run}", "train.epochs=3"),
        "export": ("export", shop_copy.run),
    }
    said = {name: on_forked_ranks(*call, TREC_TT_FAULT="start:joined:rank1") for name, call in calls.items()}
    for name, answer in said.items():
        assert answer.code == 128 + 9 and answer.mistake.count("\n") == 1, (name, answer.err)
    assert "Rank 0 lost the others at its start" in said["train"].err
    assert "export: rank 0 lost the others (" in said["export"].err


@pytest.mark.timeout(240)
def test_ctrl_c_ends_training_and_the_same_command_goes_on(shop, tmp_path, on_forked_ranks):
    """As a terminal does it: the launcher and all ranks get the signal. Once more, while a checkpoint is loaded."""
    run = tmp_path / "run"
    call = ["train", str(shop.config), f"run_dir={run}", "train.epochs=100000"]
    call += ["train.evaluate_every=50", "checkpoint.every=50"]
    environ = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    job = subprocess.Popen(
        [LAUNCHER, "--ranks", "2", *call],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        lines: list[str] = []
        for line in job.stdout:
            lines.append(line)
            if "step    100  valid" in line:
                break
        os.killpg(job.pid, signal.SIGINT)
        began = time.monotonic()
        _, err = job.communicate(timeout=60)  # ends when no rank holds the pipe any more
        assert time.monotonic() - began < 30
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 130, err
    assert "Traceback" not in err, err
    assert re.search(r"stopped by SIGINT after step [\d,]+ of [\d,]+, which is saved; the same command resumes", err), (
        err
    )
    assert len(err.splitlines()) <= 2, err
    assert not lines[0].startswith("resumed")
    saved = max(path.name for path in (run / "checkpoints").glob("step-*"))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 130, int(saved[5:]))
    assert "SIGINT" in status["reason"] and "the same command resumes" in status["meaning"]

    said = on_forked_ranks(*call, TREC_TT_FAULT="load:filled:int")
    assert said.code == 130 and "Traceback" not in said.err, said.err
    resumed = [line for line in said.out.splitlines() if line.startswith("resumed at step")]
    assert len(resumed) == 1 and int(resumed[0].split()[3].replace(",", "")) == status["step"]
    assert f"stopped by SIGINT after step {status['step'] + 1:,} of" in said.err


@pytest.mark.timeout(120)
def test_ctrl_c_is_heard_while_a_rank_waits_for_the_others(shop, tmp_path):
    """The first rank, which this test plays, takes the call and never answers."""
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        first.settimeout(60)
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first.getsockname()[1])}
        place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        job = subprocess.Popen(
            [sys.executable, "-m", "trec_twotower", "train", str(shop.config), f"run_dir={tmp_path / 'run'}"],
            env={**os.environ, **where, **place, "OMP_NUM_THREADS": "1"},
            cwd=LAUNCHER.parent.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            caller, _ = first.accept()
            with caller:
                time.sleep(0.5)
                job.send_signal(signal.SIGINT)
                _, err = job.communicate(timeout=20)
        finally:
            job.kill()
    assert job.returncode in (-signal.SIGINT, 130) and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_mistake(tmp_path):
    """As behind `| head`: nothing is said, and the exit code is that of a program which SIGPIPE ends."""
    job = subprocess.Popen(
        [sys.executable, "-m", "trec_twotower", "doctor"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with job:
        assert job.stdout is not None and job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == ""
    assert job.returncode == 128 + signal.SIGPIPE


def test_a_pipe_that_breaks_elsewhere_is_told():
    """What is said here is read."""
    code = "from trec_twotower import cli\ndef run(_): raise BrokenPipeError(32, 'Broken pipe')\n"
    code += "cli.COMMANDS['doctor'] = run\ncli.main()"
    job = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=60)
    assert (job.returncode, job.stderr) == (1, "trec-twotower doctor: Broken pipe\n")


def test_a_process_ends_with_its_command(tmp_path):
    """Not by taking the interpreter down, in which threads of torch may still be at work and abort it."""
    code = """
import atexit, sys
from trec_twotower.cli import main
atexit.register(print, "taken down")
print("begun")
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "no.yaml")],
        cwd=LAUNCHER.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (USAGE, "begun\n")
    assert "There is no config file" in ended.stderr


def test_an_index_without_users_to_tune_for_says_what_is_missing(tmp_path, write_dataset, cli):
    """A dataset of train/ and items/ alone trains and exports; its items cannot be indexed yet."""
    items = pa.table({"item_id": range(20)})
    train = pa.table({"user_id": [row // 4 for row in range(40)], "item_id": [row * 7 % 20 for row in range(40)]})
    folder = write_dataset(tmp_path / "d", train=train, items=items)
    config = tmp_path / "alone.yaml"
    config.write_text(
        "user: [{name: user_id, kind: id, buckets: 16, dim: 4}]\n"
        "item: [{name: item_id, kind: id, buckets: 32, dim: 4}]\n"
        f"data: {{dataset: {folder}, batch_size: 20}}\nmodel: {{dim: 4}}\ntrain: {{epochs: 1}}\n"
    )
    run = tmp_path / "run"
    assert cli("train", config, f"run_dir={run}").code == 0
    assert cli("export", run).code == 0
    said = cli("index", run)
    assert said.code == 2 and "holds no users" in said.err and len(said.err.splitlines()) == 1
    assert "test/, valid/ or serving/" in said.err
    assert not (run / "index").exists()


def test_a_rate_that_no_model_survives_ends_with_an_error(cli, shop, tmp_path):
    """Cosines hide it: the loss stays a number."""
    said = cli("train", shop.config, f"run_dir={tmp_path / 'run'}", "train.optimizer.lr=1e30")
    assert said.code == 1 and "the training has diverged" in said.mistake and "no checkpoint yet" in said.mistake
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_warning_is_one_line_on_stderr(shop, tmp_path):
    """More sampled negatives than the 40 items of the catalogue are clipped; the warning shows no line of source."""
    call = ["train", str(shop.config), f"run_dir={tmp_path / 'run'}", "loss.negatives.sampled=1000", "train.epochs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "trec_twotower", *call], capture_output=True, text=True, timeout=120, check=True
    )
    (warning,) = [line for line in done.stderr.splitlines() if "sampled" in line]
    assert warning.startswith("trec-twotower: warning: ") and "1,000" in warning and "40" in warning
