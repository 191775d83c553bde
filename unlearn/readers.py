"""Data files -> rows: JSON, JSON lines, CSV, Parquet and plain text, each row with its place in the file.

Every error names the file and, where there is one, the line. pyarrow is imported when a Parquet file is read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import DataError

_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
_LARGEST_CELL = 2**31 - 1  # characters; Python's own limit of 131072 refuses a chapter in one cell


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and where it stands (``line 12`` or ``row 12``, counted from 1)."""

    place: str
    values: Mapping[str, Any]


def read_file(path: Path) -> list[Row]:
    """Every row of one file; the format is told by the name's ending. A .txt file is one row, ``{"text": ...}``.

    Raises:
        DataError: an unknown ending, unreadable, not UTF-8, empty or malformed. A table without rows gives ``[]``.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell the format from the name; use one of {', '.join(ENDINGS)}")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise DataError(f"{path}: not a regular file")
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def numbered(entries: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of a source that has no lines, counted from 1."""
    return [Row(f"row {number}", entry) for number, entry in enumerate(entries, start=1)]


def shorten(text: str, width: int = 80) -> str:
    """One line of at most ``width`` characters, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted in one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _text(path: Path) -> str:
    """The whole file as text, without its byte-order mark."""
    data = path.read_bytes()
    if data.startswith(_WIDE_BOMS):
        raise DataError(f"{path}: not UTF-8 but UTF-16 (byte 0); save it as UTF-8")
    skipped = len(_BOM) if data.startswith(_BOM) else 0
    try:
        text = data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + skipped
        line = data.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 at byte {offset} (0x{data[offset]:02x}); save the file as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _read_text(path: Path) -> list[Row]:
    return [Row("line 1", {"text": _text(path).replace("\r\n", "\n")})]


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    try:
        whole = _loads(text)
    except json.JSONDecodeError as error:
        # TOFU's files are called .json and hold one object per line: then the first value ends before the text does.
        if error.msg == "Extra data":
            return _json_lines(path, text)
        raise _broken(path, error, error.lineno) from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    entries = whole if isinstance(whole, list) else [whole]
    return [_object(entry, path, f"row {number}") for number, entry in enumerate(entries, start=1)]


def _read_jsonl(path: Path) -> list[Row]:
    return _json_lines(path, _text(path))


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    # Not str.splitlines: that would also cut at U+2028 and its like, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = _loads(line)
        except json.JSONDecodeError as error:
            raise _broken(path, error, number) from error
        rows.append(_object(entry, path, f"line {number}"))
    return rows


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, 0) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python reads no whole numbers of thousands of digits
        raise json.JSONDecodeError("a number has too many digits", text, 0) from error


def _broken(path: Path, error: json.JSONDecodeError, line: int) -> DataError:
    return DataError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}")


def _object(entry: Any, path: Path, place: str) -> Row:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, {place}: expected an object like {{...}}, found {_json_name(entry)}")
    return Row(place, entry)


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _read_csv(path: Path) -> list[Row]:
    text = _text(path)
    first = next(line for line in text.splitlines() if line.strip())
    unquoted = re.sub(r'"[^"]*"', "", first)
    delimiter = max((",", ";", "\t"), key=unquoted.count)
    previous = csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return _csv_rows(reader, path)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(previous)


def _csv_rows(reader: Any, path: Path) -> list[Row]:
    header: list[str] | None = None
    rows, start = [], 1
    for cells in reader:
        place, start = start, reader.line_num + 1  # a quoted cell may span lines: name the one it starts on
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, path, place)
            continue
        if len(cells) != len(header):
            raise DataError(f"{path}, line {place}: {len(cells)} cells, but the header has {len(header)} columns")
        rows.append(Row(f"line {place}", dict(zip(header, cells, strict=True))))
    return rows


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    doubled = sorted({name for name in names if names.count(name) > 1 and name})
    if doubled:
        raise DataError(f"{path}, line {line}: the header names {', '.join(doubled)} more than once")
    if "" in names:
        raise DataError(f"{path}, line {line}: column {names.index('') + 1} of the header has no name")
    return names


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        # A file object: given a name, pyarrow would read a path like "year=2024/a.parquet" as one more column.
        with path.open("rb") as file:
            entries = pyarrow.parquet.read_table(file).to_pylist()
    # a damaged file may claim more than memory holds, or hold times that Python has no value for
    except (pyarrow.ArrowException, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error
    return numbered(entries)


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
ENDINGS = tuple(_READERS)
