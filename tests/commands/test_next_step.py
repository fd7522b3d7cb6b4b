"""Each stage ends with the command of the next one, which works as it is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from trec_twotower.commands.next_step import CONFIG_OF_SOURCE, VARIABLE, after_index, after_prepare
from trec_twotower.data.sources import SOURCES
from trec_twotower.storage.package_files import shipped_configs


def next_commands(out: str) -> list[list[str]]:
    """Return the words of the commands at the end of what a stage printed."""
    lines = out.splitlines()
    first = max(number for number, line in enumerate(lines) if line.startswith("Next: "))
    found = [shlex.split(line.removeprefix("Next: ")) for line in lines[first:]]
    assert all(words[0] == "trec-twotower" for words in found)
    return [words[1:] for words in found]


def test_the_printed_commands_lead_from_raw_data_to_recommendations(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = cli("prepare", "synthetic", "--out", "data/a shop", "users=200", "items=600", "clusters=4")
    stages = []
    for _ in range(3):
        [words] = next_commands(said.out)
        stages.append(words[0])
        said = cli(*words, *(["train.epochs=1"] if words[0] == "train" else []))
        assert said.code == 0, said.err
    assert stages == ["train", "export", "index"] and Path("runs/a shop/index").is_dir()
    evaluate, recommend, serve = next_commands(said.out)
    for words in (evaluate, recommend):
        answer = cli(*words)
        assert answer.code == 0, answer.err
        assert "Next: " not in answer.out
    assert evaluate == ["evaluate", "runs/a shop", "--index"] and serve == ["serve", "runs/a shop"]
    assert recommend[:3] == ["recommend", "runs/a shop", "--user"]


def test_a_starter_config_is_followed_by_its_training(cli, shop, tmp_path):
    said = cli("init", shop.dataset, "--out", tmp_path / "mine.yaml")
    assert next_commands(said.out) == [["train", str(tmp_path / "mine.yaml")]]


@pytest.mark.parametrize(
    ("source", "out", "options", "words"),
    [
        ("movielens", "data/movielens", {}, ["train", "movielens"]),
        ("movielens", "data/ml", {}, ["train", "movielens", "data.dataset=data/ml", "run_dir=runs/ml"]),
        ("amazon-reviews", "data/amazon-books", {"category": "Books"}, ["train", "amazon_books"]),
        ("amazon-reviews", "data/toys", {"category": "Toys"}, ["init", "data/toys"]),
        ("events", "data/shop", {}, ["init", "data/shop"]),
    ],
)
def test_a_dataset_is_trained_by_the_shipped_config_of_its_source(capsys, source, out, options, words):
    after_prepare(source, Path(out), options)
    assert next_commands(capsys.readouterr().out) == [words]


def test_the_configs_of_sources_exist():
    assert CONFIG_OF_SOURCE.keys() <= SOURCES.keys() and set(CONFIG_OF_SOURCE.values()) <= shipped_configs().keys()


def test_a_run_without_held_out_rows_is_not_evaluated(capsys):
    after_index(Path("run"), "serving", "-u")
    assert next_commands(capsys.readouterr().out) == [["recommend", "run", "--user=-u"], ["serve", "run"]]
    after_index(Path("run"), "valid", 7)
    assert next_commands(capsys.readouterr().out)[0] == ["evaluate", "run", "--index", "--split", "valid"]


def test_the_stages_of_the_demo_have_no_such_line(cli, shop_copy, monkeypatch):
    assert "Next: " in cli("export", shop_copy.run).out
    monkeypatch.setenv(VARIABLE, "0")
    assert "Next: " not in cli("export", shop_copy.run).out


def test_the_demo_turns_the_lines_off(monkeypatch):
    from trec_twotower import demo

    seen = []

    class Done:
        returncode = 0

    monkeypatch.setattr(demo.subprocess, "run", lambda command, env: seen.append(env) or Done())
    assert demo._stage(["python", "-m", "trec_twotower", "index", "run"]) == 0
    assert [env[VARIABLE] for env in seen] == ["0"]
