"""Files that are whole or absent, and what the file system says turned into words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import RunFolderError
from unlearn.text import one_line

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# nothing more can be written, or not so much in one file, or the disk is gone
_UNWRITABLE = FULL | {errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})  # some network file systems, for folders
_LONGEST_NAME = 200  # characters of a name in a message


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``parts``: keys sorted; dataclasses and pydantic models as objects."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    """The JSON form of what :func:`json.dumps` does not know."""
    if hasattr(value, "model_dump"):  # pydantic's, which is not imported where there is none of it
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which holds the old content or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{unique()}.tmp")
    with explained(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 by :func:`written_whole`."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json_atomic(path: Path, data: Any) -> None:
    """:func:`write_text_atomic` of indented JSON. Numbers that are not finite are a ValueError: JSON has none."""
    write_text_atomic(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def sync(place: Path) -> None:
    """Bring a file's content, or a folder's names, to disk."""
    if os.name == "nt":
        return
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(fd)


def unique() -> str:
    """A name part no other process or call makes: ``<pid>-<8 hex>``."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn what the file system says into a message for the user."""
    try:
        yield
    except OSError as e:
        raise refused(e, place) from e


def refused(error: OSError, place: Path) -> RunFolderError:
    """The message for what the file system said about a place of the run."""
    if error.errno in FULL:
        return RunFolderError(
            f"no space left on the disk (or in the quota) while writing {place}. "
            "Make room, or choose a folder on another disk with --out; finished stages are kept"
        )
    where = error.filename if isinstance(error.filename, str) and error.filename else place
    return RunFolderError(
        f"{where}: {error.strerror or error}. The run's folder must be writable: choose another one with --out"
    )


def unwritable(error: BaseException | None, folder: Path | None = None) -> OSError | None:
    """What the file system said, where that is behind an error that some library raised in words of its own.

    Args:
        error: As it was caught; its causes count, too.
        folder: Where a file is tried in the end: of a full disk torch says no more than ``unexpected pos 64 vs 0``.
    """
    while error is not None:
        number = _number(error)
        if number is not None and number in _UNWRITABLE:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    try:
        if folder is not None:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(2**16))
    except OSError as e:
        return e
    return None


def _number(error: BaseException) -> int | None:
    """The operating system's number for what went wrong, from an error's attribute or its text."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    found = re.search(r"\bos error (\d+)\b", text)  # as Rust writes it
    return int(found[1]) if found else next((n for n in sorted(_UNWRITABLE) if os.strerror(n) in text), None)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of a long list, each on one line and cut where it is endless, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name[:_LONGEST_NAME]) for name in names[:most]) + more
