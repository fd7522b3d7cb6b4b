"""Raw text files: decompression, encodings, line ends, and errors that name the invalid line."""

from __future__ import annotations

import ast
import codecs
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from trec_twotower.errors import DataError

COPIES = "as-utf-8"  # scratch subfolder for copies of files that DuckDB cannot read directly
_BLOCK_BYTES = 1 << 24
_TO_JSON = (
    "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]"  # one dict per line
)


@contextmanager
def open_unzipped(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unzipped by its ending. Raise DataError if the zipped file is damaged."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as file:
            yield file
    except OSError as error:
        if error.errno is not None:  # an error of the file system; Arrow codecs set no errno
            raise
        raise damaged_zip(path, str(error)) from None


def damaged_zip(path: Path | str, why: str) -> DataError:
    return DataError(f"{path} cannot be unzipped to its end ({why.strip()}): copy or download it again.")


def check_zipped(path: Path) -> None:
    """Raise DataError if a file is named .gz and is no gzip file: DuckDB's message does not name it."""
    if path.suffix == ".gz":
        with path.open("rb") as file:
            begin = file.read(2)
        if begin != b"\x1f\x8b":
            found = f"begins with {begin!r}" if begin else "is empty"
            raise DataError(
                f"{path} is called .gz, but {found}, as no gzip file does: download it again, or take .gz off its name "
                "if it is plain text."
            )


def copy_path(path: Path, scratch_dir: Path) -> Path:
    """Return the path of a file's copy: its absolute path below `scratch_dir`/COPIES."""
    return scratch_dir / COPIES / path.absolute().relative_to("/")


def copy_as_utf_8(path: Path, encoding: str, scratch_dir: Path) -> None:
    """Write the text of a file to `copy_path`: in UTF-8, unzipped, and with LF in place of CRLF."""
    target = copy_path(path, scratch_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)()
    pending_cr = ""  # a CR at the end of a block, whose LF may be in the next one
    is_last = False
    with open_unzipped(path) as source, target.open("wb") as file:
        while not is_last:
            block = source.read(_BLOCK_BYTES)
            is_last = not block
            try:
                text = pending_cr + decoder.decode(block, final=is_last)
            except UnicodeError:
                raise wrong_encoding(path, encoding) from None
            text = text if file.tell() else text.removeprefix("\ufeff")
            pending_cr = "\r" if text.endswith("\r") and not is_last else ""
            file.write(text[: len(text) - len(pending_cr)].replace("\r\n", "\n").encode())


def has_mixed_line_ends(path: Path) -> bool:
    """Return whether some lines end in LF alone and others in CRLF."""
    num_lf = num_crlf = 0
    last = b""
    with open_unzipped(path) as source:
        while block := source.read(_BLOCK_BYTES):
            num_lf += block.count(b"\n")
            num_crlf += block.count(b"\r\n") + (last == b"\r" and block[:1] == b"\n")
            last = block[-1:]
    return 0 < num_crlf < num_lf


def wrong_encoding(path: Path, encoding: str, *, has_option: bool = True) -> DataError:
    """Name the first line of a file that is not text in `encoding`, and the encodings to try."""
    option = "set encoding=" if has_option else "convert it to UTF-8, as by iconv -f "
    with open_unzipped(path) as source:
        begin = source.read(4)
    for magic, kind in ((b"PAR1", "Parquet (format=parquet)"), (b"\x1f\x8b", "gzip (give its name the ending .gz)")):
        if begin.startswith(magic):
            return DataError(f"{path} is not text but {kind}.")
    if encoding == "utf-8" and begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return DataError(f"{path} is not UTF-8 but UTF-16: {option}utf-16.")
    where = f"{path}"
    with open_unzipped(path) as source:
        for number, line in enumerate(source if encoding in ("utf-8", "cp1252") else (), 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                where = f"{path}, line {number:,}: {line[:60].strip()!r}"
                break
    other = "latin-1 (Western Europe), or cp1252 (Windows)" if encoding == "utf-8" else "cp1252 (Windows), or utf-8"
    return DataError(f"{where} is not {encoding}: {option}{other}, or the encoding that it was written in.")


class _KeyTwiceError(Exception):
    """Raised for a JSON object with a duplicate key; the message is the quoted key."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the JSON object of these pairs."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return made


def broken_json_line(path: Path, why: str) -> DataError:
    """Name the first line of a file of JSON lines that is not a JSON object: DuckDB counts lines roughly."""
    with open_unzipped(path) as source:
        for number, line in enumerate(source, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                is_object = not line.strip() or isinstance(json.loads(line, object_pairs_hook=_unique_keys), dict)
            except UnicodeDecodeError:
                return wrong_encoding(path, "utf-8")
            except _KeyTwiceError as error:
                return DataError(f"{path}, line {number:,}: key {error} is there twice: give each key once.")
            except ValueError:
                is_object = False
            if is_object:
                continue
            if number == 1 and line.lstrip()[:1] in b"[{" and not _ends_here(line):
                break  # an array, or objects over several lines: no line of it is an object
            shown = line[:60].decode("utf-8", "replace").strip()
            fix = "fix the line or take it out"
            if _is_python_dict(line):
                fix = f"it is a Python dict. Convert such lines by `python -c {_TO_JSON!r} < FILE > FILE.jsonl`"
            return DataError(f"{path}, line {number:,}: {shown!r} is not one JSON object: {fix}.")
    return DataError(f"{path}: DuckDB cannot read it: {why}")


def _ends_here(line: bytes) -> bool:
    return line.rstrip()[-1:] in b"}]" and len(line.strip()) > 1


def _is_python_dict(line: bytes) -> bool:
    try:
        return isinstance(ast.literal_eval(line.decode("utf-8", "replace").strip()), dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
