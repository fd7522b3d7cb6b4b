"""The nightly script publishes a run in one step, keeps the old one if the new is worse, and rolls back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
data: {dataset: data, batch_size: 256}
tables: {item: {buckets: 512, dim: 8}}
user: [{name: history, kind: bag, table: item}]
item: [{name: item_id, kind: id, table: item}]
model: {dim: 8}
train: {epochs: 2, log_every: 100}
evaluate: {k: [20], best: recall@20, item_to_item: false, svd: 0}
"""
SOURCE = ("synthetic", "users=300", "items=200", "clusters=4")


def nightly(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "launch/nightly.sh"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.timeout(400)
def test_nights_are_published_refused_and_rolled_back(tmp_path):
    config, nights = tmp_path / "config.yaml", tmp_path / "nights"
    config.write_text(CONFIG)
    call = ("--dir", nights, "--config", config)

    first = nightly(*call, "--night", "one", "--", *SOURCE)
    assert first.returncode == 0, first.stderr
    assert os.readlink(nights / "current") == "runs/one"
    assert (nights / "current/index/manifest.json").is_file()

    second = nightly(*call, "--night", "two", "--share", "0.1", "--", *SOURCE, "seed=1")
    assert second.returncode == 0, second.stderr
    assert "began with the weights of" in second.stdout
    assert os.readlink(nights / "current") == "runs/two" and os.readlink(nights / "previous") == "runs/one"

    refused = nightly(*call, "--night", "three", "--share", "100", "--set", "train.epochs=1", "--", *SOURCE, "seed=2")
    assert refused.returncode == 4, refused.stdout
    metric = {
        night: json.loads((nights / f"runs/{night}/evaluation.json").read_text())["metrics"][
            "two towers, through the index"
        ]["recall@20"]
        for night in ("two", "three")
    }
    assert f"recall@20 is {metric['three']}, below 100 times {metric['two']} of runs/two" in refused.stderr
    assert os.readlink(nights / "current") == "runs/two"
    assert "epochs: 1" in (nights / "runs/three/config.yaml").read_text()

    # The same night again: its finished stages are kept, and now it is good enough.
    again = nightly(*call, "--night", "three", "--share", "0", "--set", "train.epochs=1", "--", *SOURCE, "seed=2")
    assert again.returncode == 0, again.stderr
    assert os.readlink(nights / "current") == "runs/three"
    twice = nightly(*call, "--night", "three", "--", *SOURCE)
    assert twice.returncode == 2 and "night three is already published" in twice.stderr

    for expected in ("runs/two", "runs/three"):  # back, and back again
        back = nightly("--dir", nights, "--rollback")
        assert back.returncode == 0, back.stderr
        assert os.readlink(nights / "current") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--dir is missing"),
        (("--dir",), "--dir needs a value"),
        (("--dirs", "x"), "'--dirs' is not an option"),
        (("--dir", "DIR"), "--config is missing"),
        (("--dir", "DIR", "--config", "c.yaml"), "the source of prepare is missing"),
        (("--dir", "DIR", "--config", "c.yaml", "--night", "a/b"), "--night is 'a/b'"),
        (("--dir", "DIR", "--config", "c.yaml", "--share", "most"), "--share is 'most'"),
        (("--dir", "DIR", "--rollback"), "no earlier published run"),
    ],
)
def test_mistakes_are_named(tmp_path, words, message):
    done = nightly(*(str(tmp_path / "nights") if word == "DIR" else word for word in words))
    assert done.returncode == 2 and message in done.stderr


def test_help_is_the_head_of_the_script():
    done = nightly("--help")
    assert done.returncode == 0 and "--rollback" in done.stdout and "set -euo" not in done.stdout


def test_the_image_copies_files_that_exist_and_installs_by_the_documented_command():
    dockerfile = (ROOT / "launch/Dockerfile").read_text()
    assert "make setup" in dockerfile and "TREC_TT_DEVICE" in (ROOT / "launch/setup_env.py").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "launch", "configs", "trec_twotower"):
        assert (ROOT / needed).exists() and needed not in ignored
