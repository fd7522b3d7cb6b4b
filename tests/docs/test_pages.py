"""The pages of docs/ are linked, their links and anchors exist, and what they quote is in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import trec_twotower

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:|mailto:)([^)\s]*)\)")


# ---------------------------------------------------------------- links


def without_code(text: str) -> str:
    """Return a page without fenced blocks and code in lines; indented blocks have no links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in LINK.findall(without_code(text)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        is_broken = not target.exists()
        if anchor and not is_broken:
            is_broken = target.suffix != ".md" or anchor not in anchors_of(target.read_text(encoding="utf-8"))
        broken += [link] if is_broken else []
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_exist(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found():
    page = DOCS / "index.md"
    text = (
        "[x](data.md) [x](nothing.md) [x](#glossary) [x](#guides) [x](data.md#splits) [x](data.md#spilts) `[x](y.md)`"
    )
    assert broken_links(page, text) == ["nothing.md", "#glossary", "data.md#spilts"]
    assert anchors_of("# A b.c\n```\n# no heading\n```\n### model.user_tower and x\n") == {
        "a-bc",
        "modeluser_tower-and-x",
    }


def lists_without_a_blank_line(text: str) -> list[str]:
    """Return the first lines of lists that follow a paragraph directly: the site shows these as one paragraph."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(?![#\s|]|- |\d+\. |<).+\n((?:- |1\. ).*)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_list_begins_after_a_blank_line_or_a_heading(page):
    assert lists_without_a_blank_line(page.read_text(encoding="utf-8")) == []


def test_a_list_within_a_paragraph_is_found():
    assert lists_without_a_blank_line("## Heading\n- a\n  more\n- b\n\ntext\n\n1. c\n") == []
    assert lists_without_a_blank_line("text:\n- a\n- b\n") == ["- a"]


# ---------------------------------------------------------------- contents


def test_the_contents_page_lists_every_page():
    linked = set(LINK.findall((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= {link.partition("#")[0] for link in linked}


def leaves(entries: object) -> Iterator[str]:
    """Yield the pages of a nested navigation."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, list):
        for entry in entries:
            yield from leaves(entry)
    elif isinstance(entries, dict):
        yield from leaves(list(entries.values()))


def test_the_navigation_of_the_site_has_every_page():
    config = YAML(typ="safe").load((DOCS / "site/mkdocs.yml").read_text(encoding="utf-8"))
    pages = list(leaves(config["nav"]))
    assert len(pages) == len(set(pages))
    top_level = {"overview.md", "security.md", "contributing.md", "changes.md"}
    assert set(pages) == {page.name for page in DOCS.glob("*.md")} | top_level


def test_the_site_loads_nothing_from_other_hosts():
    config = YAML(typ="safe").load((DOCS / "site/mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript"} & set(config)
    assert "analytics" not in config["extra"]
    assert not re.search(r"https?://", (DOCS / "site/mkdocs.yml").read_text(encoding="utf-8"))


def test_the_python_page_has_all_public_names():
    entries = re.findall(r"^::: trec_twotower\.([\w.]+)\.(\w+)$", (DOCS / "python-api.md").read_text(), re.MULTILINE)
    assert sorted(name for _, name in entries) == sorted(set(trec_twotower.__all__) - {"__version__"})
    for module, name in entries:
        path = ROOT / "trec_twotower" / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}, name


def test_glossary_terms_are_there_once():
    rows = re.findall(r"^\| (?!---|term)([^|]+) \| ([^|]+) \|$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for term, _ in rows]
    assert len(terms) == len(set(terms)) >= 80
    assert all(meaning.endswith(".") for _, meaning in rows)
    wanted = {"candidate set", "bag", "history", "bucket", "hash collision", "in-batch negatives", "IVF list", "nprobe"}
    assert wanted | {"logQ correction", "`row_wise`", "recall against exact search"} <= set(terms)


# ---------------------------------------------------------------- troubleshooting

GAP = "..."


def templates() -> list[str]:
    """Return the strings of the package, with a gap for each value in them."""

    def text_of(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(text_of(each) if isinstance(each, ast.Constant) else GAP for each in node.values)
        return GAP

    found = []
    for path in (ROOT / "trec_twotower").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                found.append(text_of(node))
    return found


def quoted_messages(text: str) -> list[str]:
    """Return the indented line after each heading of the third level."""
    return re.findall(r"^### .+\n\n {4}(.+)$", text, flags=re.MULTILINE)


def is_quoted_from(message: str, strings: list[str]) -> bool:
    """Return whether a string has all fixed parts of a message in their order."""
    parts = [re.escape(part.strip()) for part in message.split(GAP) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(each) for each in strings)


def test_quoted_messages_are_in_the_source():
    messages = quoted_messages((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    strings = templates()
    assert len(messages) >= 20
    assert [message for message in messages if not is_quoted_from(message, strings)] == []


def test_every_entry_of_the_troubleshooting_page_has_a_message_a_cause_and_a_fix():
    entries = re.split(r"^### ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(entries) == len(quoted_messages("".join(f"### {entry}" for entry in entries)))
    assert all(entry.count("**Cause.**") == entry.count("**Fix.**") == 1 for entry in entries)


def test_a_message_that_is_not_in_the_source_is_found():
    strings = templates()
    assert is_quoted_from("There is no dataset folder ...: create it with", strings)
    assert not is_quoted_from("There is no data folder ...: create it with", strings)
    assert not is_quoted_from("create it with ... There is no dataset folder", strings)
