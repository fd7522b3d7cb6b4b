"""`make docs` fails on a broken link; runs where the packages of the site are installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the packages of the site are not installed (make docs installs them)")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the pages, next to the package."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for page in ROOT.glob("*.md"):
        shutil.copy(page, tmp_path)
    for name in ("trec_twotower", "configs", "benchmarks", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run the Makefile's command."""
    [options] = re.findall(r"-m mkdocs (build .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", *options.split()],
        cwd=checkout,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("link", ["nothing.md", "data.md#nothing", "../NOTHING.md"])
def test_a_broken_link_fails_the_build(checkout, link):
    with (checkout / "docs/glossary.md").open("a") as page:
        page.write(f"\n[a link]({link})\n")
    done = build(checkout)
    assert done.returncode == 1 and link in done.stderr, done.stderr


def test_the_site_has_all_pages_and_no_links_out_of_it(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    site = checkout / "site"
    named = {page.stem for page in (checkout / "docs").glob("*.md")} | {
        "overview",
        "security",
        "contributing",
        "changes",
    }
    assert named <= {page.stem for page in site.glob("*.html")}
    assert 'href="overview.html"' in (site / "index.html").read_text()  # ../README.md on GitHub
    assert 'href="data.html"' in (site / "overview.html").read_text()  # docs/data.md on GitHub
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*(?:src|href)="(?:https?:)?//')
    assert [page.name for page in site.glob("*.html") if loaded.search(page.read_text())] == []
