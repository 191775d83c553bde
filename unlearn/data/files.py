"""Rows of data from files and hub data sets, each with its place in the file so that a mistake can be found."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import DataError
from unlearn.recipe.data import Between, Scalar, Source
from unlearn.store.cache import hub_away, no_data
from unlearn.text import did_you_mean, first_line, shorten

HUB = "hub:"
_LARGEST_CELL = 2**31 - 1  # characters; Python's own limit of 131072 refuses a chapter in one cell
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and where it stands (``line 12`` or ``row 12``, counted from 1)."""

    place: str
    values: Mapping[str, Any]


Columns = Sequence[str] | Callable[[Sequence[str]], Sequence[str]]


def read_placed(source: Source, base: Path, columns: Columns = ()) -> list[Row]:
    """Read every row of ``source`` that passes its ``where``. ``limit`` needs the seed and is left to the caller.

    Args:
        source: a .json, .jsonl, .csv, .parquet or .txt file, or ``hub:OWNER/NAME``.
        base: the folder relative paths start from.
        columns: columns that every row must have; or what says it of the columns that there are.
    """
    label = source_label(source, base)
    rows = _read_hub(source) if source.path.startswith(HUB) else _read_local(source, base)
    if not rows:
        raise DataError(f"{label}: there are no rows in it")
    if source.rows is not None:
        first, last = source.rows
        if last > len(rows):
            raise DataError(f"{label}: it has {len(rows)} rows, so rows [{first}, {last}] goes beyond its end")
        rows = rows[first:last]
    rows = _where(rows, source.where, label)
    require_columns(rows, columns, label)
    return rows


def source_label(source: Source, base: Path) -> str:
    """How messages name a source: the file's full path, or the hub name."""
    return source.path if source.path.startswith(HUB) else str(source_path(source, base))


def source_path(source: Source, base: Path) -> Path:
    """Where a local source is: beside the recipe or, where nothing is there, in the current folder."""
    given = Path(source.path).expanduser()
    return base / given if (base / given).exists() or not given.exists() else given.absolute()


# -- files, one reader for each ending


def read_file(path: Path) -> list[Row]:
    """Every row of one file; the format is told by the name's ending. A .txt file is one row, ``{"text": ...}``."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot tell the format from the name; use one of {', '.join(_READERS)}")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe may never end
            raise DataError(f"{path}: not a regular file")
        return reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from error


def _read_local(source: Source, base: Path) -> list[Row]:
    path = source_path(source, base)
    if path.is_dir():
        raise DataError(f"{path}: this is a folder; give one data file ({', '.join(_READERS)})")
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{did_you_mean(path.name, beside, 3)}")
    for key in ("config", "split", "revision"):
        if getattr(source, key) is not None:
            raise DataError(f"{path}: '{key}' is for hub data sets (path: hub:OWNER/NAME); remove it for a file")
    return read_file(path)


def _numbered(entries: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [Row(f"row {number}", entry) for number, entry in enumerate(entries, start=1)]


def _text(path: Path) -> str:
    """The whole file as text, without its byte-order mark."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: not UTF-8 but UTF-16; save the file as UTF-8")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = error.start
        line = data.count(b"\n", 0, at) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 at byte {at} (0x{data[at]:02x}); save the file as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def _read_text(path: Path) -> list[Row]:
    return [Row("line 1", {"text": _text(path).replace("\r\n", "\n")})]


def _read_json(path: Path) -> list[Row]:
    text = _text(path)
    try:
        whole = _loads(text, path)
    except json.JSONDecodeError as error:
        # TOFU's files are called .json and hold one object per line: then the first value ends before the text does.
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise _broken(path, error.lineno, error.colno, error.msg) from error
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    entries = whole if isinstance(whole, list) else [whole]
    return [_object(entry, path, f"row {number}") for number, entry in enumerate(entries, start=1)]


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not str.splitlines: that would also cut at U+2028 and its like, which JSON strings may hold as they are.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_object(_loads(line, path, number), path, f"line {number}"))
            except json.JSONDecodeError as error:
                raise _broken(path, number, error.colno, error.msg) from error
    return rows


def _loads(text: str, path: Path, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # Python reads no whole numbers of thousands of digits
        why = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise _broken(path, line, 1, why) from error


def _broken(path: Path, line: int, column: int, why: str) -> DataError:
    return DataError(f"{path}, line {line}, column {column}: broken JSON: {why}")


def _object(entry: Any, path: Path, place: str) -> Row:
    if not isinstance(entry, dict):
        raise DataError(f"{path}, {place}: expected an object like {{...}}, found {shorten(json.dumps(entry), 40)}")
    return Row(place, entry)


def _read_csv(path: Path) -> list[Row]:
    text = _text(path)
    first = next(line for line in text.splitlines() if line.strip())
    delimiter = max((",", ";", "\t"), key=re.sub(r'"[^"]*"', "", first).count)
    previous = csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows, start = [], 1
    try:
        for cells in reader:
            place, start = f"line {start}", reader.line_num + 1  # of a cell that spans lines, where it starts
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise DataError(f"{path}, {place}: the header needs names, each once: {', '.join(header)}")
            elif len(cells) == len(header):
                rows.append(Row(place, dict(zip(header, cells, strict=True))))
            else:
                raise DataError(f"{path}, {place}: {len(cells)} cells, but the header has {len(header)} columns")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(previous)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A file object: given a name, pyarrow would read a path like "year=2024/a.parquet" as one more column.
        with path.open("rb") as file:
            return _numbered(pyarrow.parquet.read_table(file).to_pylist())
    # a damaged file may claim more than memory holds, or hold times that Python has no value for
    except (pyarrow.ArrowException, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {first_line(error)}") from error


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


# -- the hub


def _read_hub(source: Source) -> list[Row]:
    name = source.path.removeprefix(HUB)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise DataError(f"{source.path}: a hub data set is written hub:OWNER/NAME; for a file leave out 'hub:'")
    import datasets

    away = hub_away()
    split = source.split or "train"
    try:
        return _numbered(datasets.load_dataset(name, source.config, split=split, revision=source.revision).to_list())
    except Exception as error:  # any library under it may raise here: HTTP client, hub client, Arrow, file system
        asked = f"config {source.config or 'default'}, split {split}, revision {source.revision or 'newest'}"
        if away and isinstance(error, ConnectionError):
            raise DataError(no_data(f"{source.path} ({asked})", away)) from error
        raise DataError(
            f"{source.path} ({asked}): cannot be loaded: {type(error).__name__}: {first_line(error)}. "
            "If the hub is out of reach, download the file elsewhere and give it in this set's `path` "
            "(.json, .jsonl, .csv or .parquet; remove config, split and revision)"
        ) from error


# -- which rows, and what they must have


def _where(rows: list[Row], where: Mapping[str, Scalar | tuple[Scalar, ...] | Between], label: str) -> list[Row]:
    """Filter column by column, so that an empty result can be blamed on the column that emptied it."""
    for column, wanted in where.items():
        if not any(column in row.values for row in rows):
            raise DataError(f"{label}: 'where' names the column '{column}'; {_columns(rows, column)}")
        if isinstance(wanted, Between):
            kept = [row for row in rows if _within(row.values.get(column), wanted)]
            asked = " and ".join(f"{name} {bound}" for name, bound in wanted.model_dump(exclude_none=True).items())
        else:
            options = wanted if isinstance(wanted, tuple) else (wanted,)
            kept = [row for row in rows if any(_equal(row.values.get(column), option) for option in options)]
            asked = " or ".join(repr(option) for option in options)
        if not kept:
            there = list(dict.fromkeys(shorten(repr(row.values.get(column))) for row in rows))
            more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
            raise DataError(
                f"{label}: no row where {column} is {asked}; the values there are {', '.join(there[:_SHOWN])}{more}"
            )
        rows = kept
    return rows


def _within(cell: Any, wanted: Between) -> bool:
    """Whether a cell is a number between the bounds; what is no number is not."""
    value = math.nan if isinstance(cell, bool) else _number(cell)
    above = value > (-math.inf if wanted.above is None else wanted.above)
    return above and value < (math.inf if wanted.below is None else wanted.below)


def _equal(cell: Any, wanted: Scalar) -> bool:
    """Equality that keeps True and 1 apart and reads numbers and truth values out of text cells, as CSV has them."""
    if isinstance(cell, str) == isinstance(wanted, str):
        return isinstance(cell, bool) == isinstance(wanted, bool) and bool(cell == wanted)
    if isinstance(wanted, str):
        return str(cell) == wanted
    if isinstance(wanted, bool):
        return str(cell).strip().casefold() == str(wanted).casefold()
    return math.isclose(_number(cell), wanted, rel_tol=1e-12)


def _number(cell: Any) -> float:
    """What a cell has for a number; NaN, which is neither equal nor beyond anything, where it has none."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def require_columns(rows: Sequence[Row], columns: Columns, label: str) -> None:
    """Refuse rows, called ``label`` in the message, of which not every one has these columns."""
    columns = columns(_names(rows)) if callable(columns) else columns
    absent = [column for column in columns if not any(column in row.values for row in rows)]
    if absent:
        names = ", ".join(f"'{column}'" for column in absent)
        raise DataError(
            f"{label}: no column {names}; {_columns(rows, absent[0])}. "
            "Say which column to use under `columns` (or, for a prompt's {field}, mend the prompt)"
        )
    for row in rows:
        for column in columns:
            if column not in row.values:
                raise DataError(f"{label}, {row.place}: this row has no '{column}', but others do")


def _columns(rows: Sequence[Row], wanted: str) -> str:
    names = _names(rows)
    return f"the columns are {', '.join(names) or 'none'}{did_you_mean(wanted, names)}"


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row.values))
