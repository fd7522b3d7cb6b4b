"""Progress: plain lines in a file or a pipe, one line that is rewritten on a terminal, never colours."""

from __future__ import annotations

import io

import pytest

from trec_twotower.commands.progress import ProgressReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reported(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **settings: bool) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressReport("users", **settings) as progress:
        for done in range(7, 1001, 7):
            progress(done, 1001)
        progress(1001, 1001)
    return stream.getvalue()


def test_a_pipe_gets_one_plain_line_per_tenth(monkeypatch):
    lines = reported(io.StringIO(), monkeypatch).splitlines()
    assert len(lines) == 10 and lines[0] == "105 of 1,001 users" and lines[-1] == "1,001 of 1,001 users"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_one_line_without_colours(monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    text = reported(Terminal(), monkeypatch)
    assert "\r" in text and "\x1b[3" not in text and "\x1b[0m" not in text
    assert "1.00k/1.00k" in text.split("\r")[-1] and text.count("\n") == 1
    assert text.isascii()


def test_other_ranks_report_nothing(monkeypatch):
    assert reported(io.StringIO(), monkeypatch, is_shown=False) == ""
