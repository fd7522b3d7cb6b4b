"""What the README tells people to type works, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
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
def test_the_quickstart_and_the_python_example_run_in_order(folder):
    """One shell session types the commands on the tutorial's shop; then the example finds what they left."""
    [commands] = blocks("bash")
    [example] = blocks("python")
    tutorial = (ROOT / "docs/tutorial.md").read_text()
    (folder / "make-shop.py").write_text(re.findall(r"^```python\n(.*?)^```", tutorial, flags=re.M | re.S)[0])
    made = run([sys.executable, "make-shop.py", "2026-03-01", "20"], folder)
    assert made.returncode == 0, made.stderr
    (folder / "orders/2026-03-01.csv").rename(folder / "orders.csv")
    for name in ("orders.csv", "items.csv"):
        head, first = (folder / name).read_text().splitlines()[:2]
        assert re.search(rf"{name} +{re.escape(head)} +{re.escape(first)}\n", README)
    # In the checkout of a test the command may not be installed: the module is the same.
    script = 'set -e\ntrec-twotower() { "$PYTHON" -m trec_twotower "$@"; }\n' + commands
    done = run(["bash", "-c", script], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"two towers, through the index +0\.\d+", done.stdout)
    assert (folder / "runs/shop/report.html").is_file()

    shown = run([sys.executable, "-c", example], folder)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    # The example prints what `recommend` printed: the same items, in the same order; so does the file of all users.
    recommended = re.findall(r"^ +\d+ +-?\d\.\d+ .*\[(SKU-\d+)\]$", done.stdout, flags=re.MULTILINE)
    assert [line.split()[1] for line in lines] == recommended[:3]
    rows = {row["user_id"]: row for row in pq.read_table(folder / "recommendations.parquet").to_pylist()}
    assert len(rows) == 300 and rows["cust-017"]["item_ids"][:3] == recommended[:3]


def test_every_command_of_the_table_exists_and_none_is_missing():
    told = set(re.findall(r"^\| `([a-z]+)[ `]", README, flags=re.MULTILINE))
    listed = run([sys.executable, "-m", "trec_twotower", "--help"], ROOT).stdout
    assert told == set(re.findall(r"^  ([a-z]+) +\w", listed, flags=re.MULTILINE))


PAGES = sorted(
    path
    for pattern in ("*.md", "Makefile", "docs/*.md", "launch/*", "configs/*.yaml")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
FOLDERS = "configs|launch|benchmarks|docs|tests|trec_twotower"


def named_files(text: str) -> set[str]:
    """The paths of project files in a text: below one of the project's folders, or a module of the package."""
    return {
        *re.findall(rf"(?<![\w./-])(?:\.\./)?((?:{FOLDERS})/[\w./-]*\.\w+)", text),
        *re.findall(r"(?<![\w./$-])((?:[a-z_]+/)*[a-z_]+\.py)\b", text),
    }


def exists(name: str) -> bool:
    is_bare = "/" not in name  # a module named without its folder
    below = (ROOT / "trec_twotower").rglob(name) if is_bare else iter(())
    return (ROOT / name).exists() or (ROOT / "trec_twotower" / name).exists() or any(below)


def test_pages_and_launchers_name_files_that_exist():
    missing = {(page.name, name) for page in PAGES for name in named_files(page.read_text()) if not exists(name)}
    assert missing == set()
    found = {name for page in PAGES for name in named_files(page.read_text())}
    assert {"configs/large.yaml", "configs/gowalla.yaml", "launch/torchrun.sh", "benchmarks/training.py"} <= found
    assert not exists("configs/larger.yaml") and not exists("nothing.py")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links {link}"
