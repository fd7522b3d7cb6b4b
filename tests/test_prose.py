"""Documents, modules and help texts use the standard terms of the field, not the project's earlier private phrases."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from trec_twotower.cli import COMMANDS
from trec_twotower.commands.parser import SUBCOMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
MODULES = sorted((ROOT / "trec_twotower").rglob("*.py"))
PHRASES = (
    r"\btook\b",
    r"\btaken\b",
    r"\btakes\b(?! (?:\d|some \d|an argument))",
    r"\btold\b",
    r"\btells?\b",
    r"\bsaid\b",
    r"\bsays\b",
    r"\bspeaks\b",
    r"\bstands\b",
    r"\blies\b",
    r"\bin words\b",
    r"\ba word of\b",
    r"\bone word\b",
    r"\bmends?\b",
    r"\banew\b",
    r"\bbeside\b",
    r"\bbehind\b(?! a load balancer)",
    r"\balike\b",
    r"\bso many\b",
    r"\bas many\b(?! \w+ as\b)",
    r"\bgoes on\b",
    r"\bgoing on\b",
    r"\bcomes to\b",
    r"\bbrings\b",
    r"\bwhat becomes of\b",
    r"\ba row a user\b",
    r"\bbytes a rank\b",
    r"\bworlds?\b(?![ _]size)",
    r"\bforet(?:ell|old)\b",
    r"\bquicken",
    r"\blikewise\b",
)
PATTERN = re.compile("|".join(PHRASES), re.IGNORECASE)


def hits(text: str) -> list[str]:
    """Return the lines of a text with a phrase of the list."""
    return [line.strip() for line in text.splitlines() if PATTERN.search(line)]


def prose(source: str) -> str:
    """Return the comments of a module, and its strings of more than one word: docstrings, messages, logs."""
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    return "\n".join(comments + strings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_none_of_the_phrases(page):
    assert hits(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT / "trec_twotower")))
def test_a_module_has_none_of_the_phrases(module):
    assert hits(prose(module.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("command", [[], *([name] for name in SUBCOMMANDS)], ids=" ".join)
def test_a_help_text_has_none_of_the_phrases(command, capsys):
    with pytest.raises(SystemExit):
        build_parser(COMMANDS).parse_args([*command, "--help"])
    assert hits(capsys.readouterr().out) == []


def test_prose_is_comments_docstrings_and_messages_but_no_names():
    source = 'def f():\n    """Tell it."""\n    taken = "took"  # says so\n    raise ValueError(f"no {taken} anew")\n'
    assert prose(source).splitlines() == ["# says so", "Tell it.", "no ", " anew"]


def test_the_list_finds_a_phrase_and_leaves_ordinary_sentences_alone():
    assert hits("The item that the user took last.\nIt stands beside the index.") != []
    assert hits("It takes 5 s. There are as many rows as ids, behind a load balancer.") == []
