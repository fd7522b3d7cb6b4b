"""Read CSV files of any separator and encoding as a DuckDB relation of text columns.

DuckDB guesses nothing here: the names come from each file's first line, the separator from the ending or that line, and
every value stays as it is written. Values get their types later, from a scan of all rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import duckdb

from trec_twotower.data.sources.tables.event_files import FILE_OF_ROW, duckdb_paths, original_names, row_place, sql_text
from trec_twotower.data.sources.tables.raw_text import (
    copy_as_utf_8,
    copy_path,
    has_mixed_line_ends,
    open_unzipped,
    wrong_encoding,
)
from trec_twotower.errors import DataError

_NATIVE_ENCODINGS = ("utf-8", "latin-1")  # DuckDB reads them; files in others are copied as UTF-8
_CANDIDATES = ("\t", "::", ";", "|", ",", " ")  # separators to try on a first line
_MIXED_LINE_ENDS = "state machine reached an invalid state"  # how DuckDB reports LF and CRLF in one file


@dataclass(frozen=True)
class CsvLayout:
    """Format of the files of one table. `header` is whether the first line holds the column names."""

    separator: str = ","
    quote: str = '"'
    header: bool = True
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"
    null: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Head:
    """Column names of a file, and the number of lines before its first row."""

    names: tuple[str, ...]
    skipped_lines: int


@dataclass(frozen=True)
class CsvFiles:
    """CSV files of a table. Those in `copied` are read from a UTF-8 copy with LF line ends."""

    paths: tuple[Path, ...]
    layout: CsvLayout
    scratch_dir: Path
    copied: frozenset[Path] = frozenset()

    @cached_property
    def heads(self) -> dict[Path, _Head]:
        """Return the head of each non-empty file. Raise DataError for duplicate names."""
        return {path: head for path in self.paths if (head := _head(path, self.layout)) is not None}

    def relation(self) -> str:
        """Return an SQL relation of all non-empty files: text columns by name, and the file of each row."""
        # groupby keeps the order of the files, which may be the order of the events.
        arms = [
            self._arm([path for path, _ in group], head, is_copied)
            for (head, is_copied), group in itertools.groupby(
                self.heads.items(), key=lambda item: (item[1], item[0] in self.copied)
            )
        ]
        return f"({' UNION ALL BY NAME '.join(arms)})"

    def _arm(self, paths: list[Path], head: _Head, is_copied: bool) -> str:
        layout = self.layout
        typed = ", ".join(f"{sql_text(name)}: 'VARCHAR'" for name in head.names)
        nulls = ", ".join(sql_text(word) for word in ("", *layout.null))
        selected, how = "*", f"encoding = {sql_text(layout.encoding)}"
        if is_copied:
            selected = original_names(paths[0], self.scratch_dir)
            paths = [copy_path(path, self.scratch_dir) for path in paths]
            how = "compression = 'none'"
        return (
            f"SELECT {selected} FROM read_csv([{duckdb_paths(paths)}], columns = {{{typed}}}, auto_detect = false, "
            f"header = false, skip = {head.skipped_lines}, delim = {sql_text(layout.separator)}, "
            f"quote = {sql_text(layout.quote)}, escape = {sql_text(layout.quote)}, nullstr = [{nulls}], {how}, "
            f"strict_mode = true, hive_partitioning = false, filename = {sql_text(FILE_OF_ROW)})"
        )

    def in_utf_8(self) -> CsvFiles:
        """Return the same files, copied as UTF-8 if DuckDB cannot read their encoding."""
        if self.layout.encoding in _NATIVE_ENCODINGS:
            return self
        for path in self.paths:
            copy_as_utf_8(path, self.layout.encoding, self.scratch_dir)
        return replace(self, copied=frozenset(self.paths))

    def after(self, error: duckdb.Error) -> CsvFiles:
        """Return the same files with uniform line ends if mixed ones caused `error`; otherwise raise `error`.

        DuckDB does not name the file of a byte that is not Latin-1, so a DataError does.
        """
        if "not latin-1 encoded" in str(error):
            for path in self.paths:
                with open_unzipped(path) as source:
                    if any(re.search(rb"[\x80-\x9f]", line) for line in source):
                        raise wrong_encoding(path, "latin-1") from None
        made = self.with_one_line_end() if _MIXED_LINE_ENDS in str(error) else self
        if made is self:
            raise error
        return made

    def with_one_line_end(self) -> CsvFiles:
        """Return the same files, with copies of those that mix LF and CRLF."""
        mixed = {path for path in self.paths if path not in self.copied and has_mixed_line_ends(path)}
        for path in mixed:
            copy_as_utf_8(path, self.layout.encoding, self.scratch_dir)
        return replace(self, copied=self.copied | mixed) if mixed else self

    def place(self, path: str, row: int) -> str:
        """Return the line on which row number `row` (from 0) begins."""
        for number, (_, line) in enumerate(_records(Path(path), self.layout)):
            if number == row + self.layout.header:
                return f"line {line:,}"
        return row_place(path, row)


def detect_separator(path: Path, layout: CsvLayout, wanted: Collection[str]) -> str:
    """Return the separator of a first line: the one that yields most `wanted` names, or the number of `layout.columns`.

    A comma where no separator finds a name; DataError where the number of columns does not decide.
    """
    if path.name.lower().endswith((".tsv", ".tsv.gz", ".tsv.zst")):
        return "\t"
    fields = {each: _first_record(path, replace(layout, separator=each))[0] for each in _CANDIDATES}
    if layout.columns:
        fitting = [separator for separator in _CANDIDATES if len(fields[separator]) == len(layout.columns)]
        if len(fitting) == 1:
            return fitting[0]
        counts = ", ".join(f"{len(fields[separator])} by {separator!r}" for separator in _CANDIDATES)
        raise DataError(
            f"{path}: `columns` names {len(layout.columns)} columns, but the first line has {counts}: name each of "
            "them, or set separator=."
        )
    found = {separator: len(set(wanted) & set(names)) for separator, names in fields.items()}
    return max(found, key=lambda separator: (found[separator], separator == ","))


def _first_record(path: Path, layout: CsvLayout) -> tuple[list[str], int]:
    """Return the fields of the first non-blank record, and its line number."""
    try:
        fields, line = next(_records(path, layout), ([""], 0))
        return [fields[0].removeprefix("\ufeff"), *fields[1:]] if line else [], line
    except UnicodeError:
        raise wrong_encoding(path, layout.encoding) from None
    except csv.Error as error:
        raise DataError(f"{path}: the first line is not CSV ({error}): set separator= and quote=.") from None


def _records(path: Path, layout: CsvLayout) -> Iterator[tuple[list[str], int]]:
    """Yield the fields of each non-blank record, and the number of its first line."""
    encoding = "utf-8-sig" if layout.encoding == "utf-8" else layout.encoding
    with open_unzipped(path) as source:
        lines = io.TextIOWrapper(source, encoding=encoding, newline="")
        if len(layout.separator) > 1:  # the csv module supports only single characters
            for number, line in enumerate(lines, 1):
                if line := line.strip("\r\n"):
                    yield [_unquoted(part, layout.quote) for part in line.split(layout.separator)], number
            return
        csv.field_size_limit(2**31 - 1)
        if layout.quote:
            reader = csv.reader(lines, delimiter=layout.separator, quotechar=layout.quote)
        else:
            reader = csv.reader(lines, delimiter=layout.separator, quoting=csv.QUOTE_NONE)
        line_number = 1
        for fields in reader:
            if fields:
                yield fields, line_number
            line_number = reader.line_num + 1


def _unquoted(text: str, quote: str) -> str:
    is_quoted = quote and len(text) > 1 and text.startswith(quote) and text.endswith(quote)
    return text[1:-1].replace(quote * 2, quote) if is_quoted else text


def _head(path: Path, layout: CsvLayout) -> _Head | None:
    """Return the columns from the first line or the option `columns`; None for an empty file."""
    fields, line = _first_record(path, layout)
    if not fields:
        return None
    skipped = line - 1 + layout.header
    if layout.columns:
        if len(fields) != len(layout.columns):
            raise DataError(
                f"{path}: `columns` names {len(layout.columns)} columns ({', '.join(layout.columns)}), but the first "
                f"line has {len(fields)}, separated by {layout.separator!r}: name each of them, or set separator=."
            )
        known = {name.casefold() for name in layout.columns}
        if not layout.header and all(name.strip().casefold() in known for name in fields):
            raise DataError(
                f"{path}: the first line ({', '.join(fields)}) holds names: set header=true, which leaves it out."
            )
        return _Head(layout.columns, skipped)
    names = tuple(name or f"column{number}" for number, name in enumerate(fields, 1))
    refuse_twins(f"{path}", names, "name the columns by columns=[...], with header=true if the first line holds names")
    return _Head(names, skipped)


def refuse_twins(where: str, names: Collection[str], fix: str) -> None:
    """Raise DataError if two names are equal apart from case: DuckDB reads them as one column."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        if key in seen:
            twin = seen[key]
            if twin == name:
                raise DataError(f"{where}: column {name!r} is there twice: {fix}.")
            raise DataError(f"{where}: columns {twin!r} and {name!r} differ in upper and lower case alone: {fix}.")
        seen[key] = name
