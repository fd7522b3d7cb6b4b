"""Hooks of the site: pages from the top level of the repository, and links that lead out of docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
# Pages of the top level and their names on the site.
TOP_LEVEL = {
    "README.md": "overview.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the top level."""
    for name, page in TOP_LEVEL.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to pages of the site; text remains of a link to another file of the repository."""
    is_top_level = page.file.src_uri in TOP_LEVEL.values()
    folder = ROOT if is_top_level else ROOT / "docs"

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = Path(os.path.normpath(folder / target))
        if not path.is_relative_to(ROOT) or not path.exists():
            return match[0]  # broken: the build reports it
        name = path.relative_to(ROOT).as_posix()
        if name in TOP_LEVEL:
            return f"[{text}]({TOP_LEVEL[name]}{anchor})"
        if path.parent == ROOT / "docs" and path.suffix == ".md":
            return f"[{text}]({path.name}{anchor})"
        return text

    return LINK.sub(replaced, markdown)
