"""What the README tells people to type works, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder that has launch/ and configs/ beside it as a checkout does."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("launch", "configs"):
        (place / name).symlink_to(ROOT / name)
    return place


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)


@pytest.mark.timeout(400)
def test_the_commands_and_the_python_example_run_in_order(folder):
    """One shell session types the commands; then the example finds what they left."""
    [commands] = blocks("bash")
    [example] = blocks("python")
    # In the checkout of a test the command may not be installed: the module is the same.
    script = 'set -e\ntrec-twotower() { "$PYTHON" -m trec_twotower "$@"; }\n' + commands
    done = run(["bash", "-c", script], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"two towers, through the index +0\.\d+", done.stdout)
    assert "Everything fits." in done.stdout
    assert (folder / "runs/small/rankings.parquet").is_file()

    shown = run([sys.executable, "-c", example], folder)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    # The example prints what `recommend` printed: the same items, in the same order.
    recommended = re.findall(r"^ +\d+ +-?\d\.\d+ .*\[(\d+)\]$", done.stdout, flags=re.MULTILINE)
    assert [line.split()[1] for line in lines] == recommended[:3]


def test_every_command_of_the_table_exists_and_none_is_missing():
    told = set(re.findall(r"^\| `([a-z]+)[ `]", README, flags=re.MULTILINE))
    listed = run([sys.executable, "-m", "trec_twotower", "--help"], ROOT).stdout
    assert told == set(re.findall(r"^    ([a-z]+)\b", listed, flags=re.MULTILINE))


def test_the_config_shown_is_the_one_shipped():
    shown = README.split("`configs/demo.yaml`:\n\n")[1].split("\n\n`key=value`")[0]
    shipped = (ROOT / "configs/demo.yaml").read_text()
    assert [line[4:] for line in shown.splitlines()] == shipped.splitlines()


def test_every_file_the_readme_links_or_names_is_there():
    named = re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"(?:configs|launch|benchmarks)/[\w-]+\.\w+", README)
    assert len(named) > 5
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
