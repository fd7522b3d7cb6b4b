"""Reader of text files whose lines are `user item item ...`: integers separated by blanks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from trec_twotower.errors import DataError, nearest

# Known counts of published files, keyed by their sha256.
Published = dict[tuple[str, ...], dict[str, int]]

_MAX_ID = 2**63 - 1
_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class IdLines:
    """A whole file: line r belongs to `users[r]` and holds `items[offsets[r] : offsets[r + 1]]`."""

    path: Path
    users: np.ndarray  # int64, each once, in the order of the file
    offsets: np.ndarray  # int64, one longer than users
    items: np.ndarray  # int64, in the order of the file
    sha256: str

    def owners(self) -> np.ndarray:
        """Return, for every item, the position of its user in `users`."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))


def read_id_lines(path: Path) -> IdLines:
    """Read a file of id lines; blank lines are passed over, a user alone on its line has no items.

    DataError, with the line's number, for what is not an id and for a user on two lines.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
        raise DataError(f"There is no file {path.name} in {path.parent}{nearest(path.name, sorted(siblings))}.")
    digest = hashlib.sha256()
    pieces = []
    with path.open("rb") as file:
        first_line = 1
        for text in _whole_lines(file):
            digest.update(text)
            pieces.append(_parse(path, text, first_line))
            first_line += text.count(b"\n")
    lines = np.concatenate([piece[0] for piece in pieces]) if pieces else np.zeros(0, np.int64)
    if not len(lines):
        raise DataError(f"{path} holds no line of ids: a line is `user item item ...`.")
    users, lengths, items = (np.concatenate([piece[part] for piece in pieces]) for part in (1, 2, 3))
    _refuse_users_on_two_lines(path, users, lines)
    return IdLines(path, users, np.append(0, np.cumsum(lengths)), items, digest.hexdigest())


def check_published(published: Published, digests: tuple[str, ...], counts: dict[str, int]) -> bool:
    """Return whether files with these SHA-256 are known; if so, `counts` must equal the published ones."""
    expected = published.get(digests)
    for name, number in (expected or {}).items():
        if counts[name] != number:
            raise DataError(
                f"The files are the published ones, with {number:,} {name}, but {counts[name]:,} were read: "
                "this is a fault of ours, please report it."
            )
    return expected is not None


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the file in pieces of about `_READ_BYTES` that end at a line end."""
    rest = b""
    while block := file.read(_READ_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield rest + block[:cut]
            rest = block[cut:]
        else:
            rest += block
    if rest:
        yield rest


def _parse(path: Path, text: bytes, first_line: int) -> tuple[np.ndarray, ...]:
    """Return line numbers, users and item counts of the non-blank lines, and all items."""
    byte = np.frombuffer(text, np.uint8)
    if first_line == 1 and text.startswith(b"\xef\xbb\xbf"):
        byte = byte[3:]
    is_blank = (byte == 32) | ((byte >= 9) & (byte <= 13))
    line_end = np.flatnonzero(byte == 10)
    is_odd = ~is_blank & ((byte < 48) | (byte > 57))
    if is_odd.any():
        position = int(is_odd.argmax())
        _refuse_token(path, byte, position, first_line + int(np.searchsorted(line_end, position)))

    edge = np.flatnonzero(np.diff(np.concatenate(([True], is_blank, [True])).astype(np.int8)))
    start, length = edge[::2], edge[1::2] - edge[::2]
    line = first_line + np.searchsorted(line_end, start)
    is_too_long = length > 19
    value = np.zeros(len(start), np.uint64)
    for digit in range(min(int(length.max(initial=0)), 19)):
        longer = np.flatnonzero(length > digit)
        value[longer] = value[longer] * np.uint64(10) + (byte[start[longer] + digit] - 48)
    is_too_long |= value > _MAX_ID
    if is_too_long.any():
        token = int(is_too_long.argmax())
        _refuse_token(path, byte, int(start[token]), int(line[token]))

    ids = value.astype(np.int64)
    is_user = np.diff(line, prepend=first_line - 1) != 0
    user_at = np.flatnonzero(is_user)
    lengths = np.diff(np.append(user_at, len(ids))) - 1
    return line[user_at], ids[user_at], lengths, ids[~is_user]


def _refuse_token(path: Path, byte: np.ndarray, position: int, line: int) -> NoReturn:
    """Raise DataError naming the invalid id and its line. `position` is any byte of the token."""
    text = byte[max(0, position - 40) : position + 40].tobytes()
    at = min(position, 40)
    before, after = text[:at].split(), text[at:].split()
    token = (before[-1] if before and not text[at - 1 : at].isspace() else b"") + after[0]
    shown = token.decode("utf-8", "replace")
    why = "is negative" if shown.startswith("-") and shown[1:].isdigit() else "is not an id"
    raise DataError(
        f"{path}, line {line}: {shown!r} {why}. A line is `user item item ...`: whole numbers from 0 to "
        f"{_MAX_ID:,} with blanks between them."
    )


def _refuse_users_on_two_lines(path: Path, users: np.ndarray, lines: np.ndarray) -> None:
    order = np.argsort(users, kind="stable")
    again = np.flatnonzero(np.diff(users[order]) == 0)
    if not len(again):
        return
    first = again[np.argmin(lines[order[again + 1]])]
    raise DataError(
        f"{path}: user {users[order[first]]} is on line {lines[order[first]]} and again on line "
        f"{lines[order[first + 1]]} ({len(again):,} such lines in all): put each user's items on one line."
    )
