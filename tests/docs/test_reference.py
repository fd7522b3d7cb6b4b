"""The generated pages are those of the current code, and every key and argument has a meaning."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from pydantic import Field

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "docs/site/generate_reference.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_pages_are_those_of_the_generator():
    """In a process of its own: tests of other files may have added kinds to the families."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_page_out_of_date_is_reported_with_the_command(generator, monkeypatch, capsys):
    monkeypatch.setattr(generator, "PAGES", {"cli.md": lambda: "another page\n"})
    monkeypatch.setattr(sys, "argv", ["generate_reference.py", "--check"])
    assert generator.main() == 1
    assert "cli.md out of date: run `python docs/site/generate_reference.py`" in capsys.readouterr().err


def test_every_key_and_every_option_of_a_source_has_a_meaning(generator):
    assert generator.keys_without_meaning() == [], "write a comment at each of these fields"


def test_every_argument_of_a_command_has_a_help_text(generator):
    parsers = generator.subparsers(generator.build_parser(generator.COMMANDS))
    missing = [(name, action.dest) for name, parser in parsers.items() for action in parser._actions if not action.help]
    assert missing == []
    assert len(parsers) == len(generator.SUBCOMMANDS)


SOURCE = """
class Settings:
    first: int = 1  # on its line
    # Above it,
    # on two lines.
    second: tuple[
        int, ...
    ] = ()  # and at its end
    third: int = 3

    fourth = 4  # no field
"""


def test_a_comment_on_the_line_or_directly_above_is_the_meaning(generator, tmp_path):
    (tmp_path / "settings.py").write_text(SOURCE)
    assert generator.comments_of(tmp_path / "settings.py") == {
        "Settings": {"first": "on its line", "second": "Above it, on two lines. and at its end"}
    }


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "integer"),
        (Annotated[int, Field(gt=0)], "integer from 1"),
        (Annotated[int, Field(ge=1, le=1 << 32)], "integer from 1 to 2^32"),
        (Annotated[float, Field(gt=0, lt=1)], "number above 0, below 1"),
        (Annotated[float, Field(ge=0)] | None, "number from 0"),
        (bool | Literal["auto"], "true or false or `auto`"),
        (tuple[str, ...], "list of text"),
        (tuple[int, int], "list of 2: integer"),
        (dict[Literal["a", "b"], bool], "mapping of `a`, `b` to true or false"),
        (Path | None, "path"),
    ],
)
def test_types_are_named_for_readers_of_a_config(generator, annotation, text):
    assert generator.type_text(annotation) == text


def test_all_kinds_and_sections_are_on_the_page():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    headings = {line.lstrip("# ") for line in page.splitlines() if line.startswith("#")}
    assert {f"loss {kind}" for kind in ("softmax", "bce", "bsl", "ccl", "bpr", "margin", "listwise")} <= headings
    assert {f"feature {kind}" for kind in ("id", "bag", "sequence", "number", "vector", "cross", "time")} <= headings
    assert {"encoder heads", "encoder routing", "train.optimizer", "train.spectral", "data.follow", "index"} <= headings
    assert "| `rowwise_adagrad`" in page or "`rowwise_adagrad`, `adagrad`" in page
