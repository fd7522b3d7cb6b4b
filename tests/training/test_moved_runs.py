"""A run finds its dataset from any folder, or says where it was looked for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.shop import SHOP_CONFIG, Call
from trec_twotower.config.loading import load_config
from trec_twotower.data.loading.streaming import STREAM
from trec_twotower.storage.atomic import read_json


@pytest.fixture
def begun(shop, tmp_path, monkeypatch, cli) -> Path:
    """The folder where a run began whose config names its dataset relative to it; it is the current one."""
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copytree(shop.dataset, folder / "shop")
    (folder / "shop.yaml").write_text(SHOP_CONFIG)
    monkeypatch.chdir(folder)
    for call in (("train", "shop.yaml", "run_dir=run"), ("export", "run"), ("index", "run")):
        said = cli(*call)
        assert said.code == 0, said.err
    return folder


def recommended(cli: Call, run: object) -> str:
    said = cli("recommend", run, "--user", "user-1")
    assert said.code == 0, said.err
    return said.out


def test_a_run_finds_its_dataset_from_every_folder(begun, tmp_path, monkeypatch, cli):
    """In the current folder, else where the run began; its config stays as it was written."""
    first = recommended(cli, "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert recommended(cli, begun / "run") == first
    for call in (("evaluate", begun / "run"), ("report", begun / "run"), ("export", begun / "run")):
        assert cli(*call).code == 0
    (begun / "run").rename(elsewhere / "moved")
    assert recommended(cli, "moved") == first
    said = cli("train", begun / "shop.yaml", "run_dir=moved", "train.epochs=3")
    assert said.code == 0, said.err
    assert "dataset: shop" in (elsewhere / "moved/config.yaml").read_text()
    for call in (("export", "moved"), ("index", "moved")):
        assert cli(*call).code == 0
    (begun / "shop").rename(elsewhere / "shop")
    recommended(cli, "moved")


def test_a_dataset_that_is_nowhere_is_looked_for_in_two_places_that_are_named(begun, tmp_path, monkeypatch, cli):
    (begun / "shop").rename(begun / "other")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = begun / "run"
    stages = [("recommend", run, "--user", "user-1"), ("evaluate", run), ("report", run), ("export", run)]
    for stage in [*stages, ("export", run, "--encoder")]:
        said = cli(*stage)
        assert said.code == 3
        for part in ("no dataset folder shop", str(elsewhere), str(begun), f"data.dataset in {begun}/run/config.yaml"):
            assert part in said.mistake
    config = begun / "run/config.yaml"
    config.write_text(config.read_text().replace("dataset: shop", f"dataset: {begun}/gone"))
    said = cli("evaluate", begun / "run")
    assert said.code == 3 and f"no dataset folder {begun}/gone: bring it back, or set data.dataset" in said.mistake
    config.write_text(config.read_text().replace(f"{begun}/gone", f"{begun}/other"))
    assert cli("evaluate", begun / "run").code == 0
    said = cli("train", begun / "shop.yaml", "run_dir=new")
    assert said.code == 3 and re.search(f"no dataset folder shop in {elsewhere}", said.mistake)


def test_another_dataset_in_the_current_folder_is_refused(
    begun, tmp_path, monkeypatch, cli, shop_tables, write_dataset
):
    elsewhere = tmp_path / "elsewhere"
    write_dataset(elsewhere / "shop", **{**shop_tables, "train": shop_tables["train"].slice(5)})
    monkeypatch.chdir(elsewhere)
    said = cli("evaluate", begun / "run")
    assert said.code == 3 and "shop is not the dataset this run began with" in said.mistake


def test_a_stream_that_goes_on_from_another_folder_keeps_its_generations(begun, tmp_path, monkeypatch, cli):
    follow = ("data.follow={poll_s: 1, idle_s: 0}", "data.drop_last=false")
    assert cli("train", "shop.yaml", "run_dir=stream", *follow).code == 0
    generations = read_json(begun / "stream" / STREAM)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli("train", begun / "shop.yaml", f"run_dir={begun}/stream", *follow).code == 0
    assert read_json(begun / "stream" / STREAM) == generations
    (begun / "shop").rename(begun / "away")
    said = cli("train", begun / "shop.yaml", f"run_dir={begun}/stream", *follow)
    assert said.code == 3 and "no dataset folder shop" in said.mistake
    assert read_json(begun / "stream" / STREAM) == generations
    assert load_config(begun / "stream/config.yaml", []).data.dataset == "shop"
