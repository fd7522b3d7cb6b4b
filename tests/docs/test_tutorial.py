"""The tutorial works as it is written, and shows what its commands print."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.docs.tutorial import PAGE, blocks_of, run_page

TEXT = PAGE.read_text(encoding="utf-8")
GAP = "..."  # lines that the page leaves out


def normalized(line: str) -> str:
    """Return a line without what differs between machines: numbers, digests and the width of columns."""
    line = re.sub(r"\b[0-9a-f]{12}\b", "#", line)
    line = re.sub(r"[+-]?\d[\d,.]*", "#", line)
    return re.sub(r"(?: #)+\b", " #", re.sub(r"\s+", " ", line)).strip()


def missing_lines(shown: str, printed: str) -> list[str]:
    """Return the lines that are shown but were not printed, in this order."""
    rest = [normalized(line) for line in printed.splitlines()]
    missing = []
    for line in shown.splitlines():
        if line == GAP:
            continue
        if normalized(line) in rest:
            rest = rest[rest.index(normalized(line)) + 1 :]
        else:
            missing.append(line)
    return missing


@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("curl") is None, reason="the tutorial calls curl, which is not installed")
def test_every_command_runs_and_prints_what_the_page_shows(tmp_path):
    printed = iter(run_page(TEXT, tmp_path, timeout_s=240))
    shown = [content for language, content in blocks_of(TEXT) if language == "text"]
    missing = {number: lines for number, each in enumerate(shown) if (lines := missing_lines(each, next(printed)))}
    assert missing == {}
    assert next(printed, None) is None
    assert (tmp_path / "runs/night2/evaluation.json").is_file()


def test_each_block_of_commands_is_followed_by_its_output():
    languages = [language for language, _ in blocks_of(TEXT) if language != "python"]
    assert languages == ["bash", "text"] * (len(languages) // 2)
    assert len(languages) > 20


def test_a_line_that_was_not_printed_is_found():
    printed = "step 20/355  loss 4.2502  6,539 rows/s\nmodel 9c2efe6bfd4c  recall@10 +0.31\ndone\n"
    assert missing_lines("step 20/355 loss 3.9 16,000 rows/s\n...\nmodel 000000000000 recall@10 -0.2\n", printed) == []
    assert missing_lines("step 20/355 loss 3.9 rows/s\ndone\n", printed) == ["step 20/355 loss 3.9 rows/s"]
    assert missing_lines("done\nmodel 9c2efe6bfd4c  recall@10 +0.31\n", printed) != []  # the order counts
