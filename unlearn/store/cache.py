"""The cache: folders that are either whole or not there, however the processes that made them ended.

``$UNLEARN_CACHE``, else ``~/.cache/unlearn``; on a cluster a folder that all machines see. Each entry is keyed by what
it was made from. Whoever needs one first makes it, in a temporary folder beside its place that is renamed when whole;
the others wait for that one, on whatever machine it is (:mod:`unlearn.store.lock`) and take over from it should it die.
Nothing that has its place is ever written to again: jobs at work have it mapped into their memory.

``complete.json`` in an entry, written last, has the size and SHA-256 of every file. They are compared as
:mod:`unlearn.store.cache` says: by content once per host and boot, then by size and stat, and by content always with
``UNLEARN_VERIFY=full``. What is damaged is moved aside and made again; what was moved aside goes after a day. A cache
that cannot be written serves what is whole in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unlearn.console import say
from unlearn.errors import ModelError, RunFolderError, UnlearnError
from unlearn.store.files import unique, write_json_atomic
from unlearn.store.lock import Lock, this_boot

Files = Mapping[str, tuple[int, str]]  # relative name -> bytes, SHA-256 in hex
_MODES = ("once", "full")
_HOSTS = 64  # notes kept per folder


def verify_always() -> bool:
    """Whether ``UNLEARN_VERIFY`` asks for every byte to be read at every use.

    Raises:
        UnlearnError: it has a value that means nothing.
    """
    given = os.environ.get("UNLEARN_VERIFY") or "once"
    if given not in _MODES:
        raise UnlearnError(f"UNLEARN_VERIFY is once (the default) or full, not {given!r}")
    return given == "full"


def damage(folder: Path, files: Files, notes: Path, name: str) -> str | None:
    """What is wrong with the files of a folder, or None.

    Args:
        files: What should be there; other files do not matter.
        notes: Folder in which it is noted what was read; made when missing, done without where it cannot be written.
        name: Of the note, in which the folder's own name is of no account; one file per host.

    Raises:
        UnlearnError: ``UNLEARN_VERIFY`` has a value that means nothing.
    """
    known = {} if verify_always() else _noted(notes, name)
    found: dict[str, list[int]] = {}
    for file, (size, digest) in files.items():
        path = folder / file
        try:
            stat = _stat(path)
            if stat[2] != size:
                return f"{file} has {stat[2]} bytes instead of {size}"
            if known.get(file) != [digest, *stat] and sha256_of(path) != digest:
                return f"the content of {file} has changed (SHA-256 differs)"
            if _stat(path) != stat:
                return f"{file} is being written"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as e:
            return f"{file} cannot be read ({e.strerror})"
        found[file] = stat
    fresh = {file: [files[file][1], *stat] for file, stat in found.items()}
    if fresh != known:
        _note(notes, name, fresh)
    return None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(folder: Path, files: Files, notes: Path, name: str) -> None:
    """Note that this process has just written and read these files, so that they need not be read again here."""
    with suppress(OSError):  # then they will be read once more
        _note(notes, name, {file: [digest, *_stat(folder / file)] for file, (_, digest) in files.items()})


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _place(notes: Path, name: str) -> Path:
    return notes / f"{name}.{hashlib.sha256(this_boot().encode()).hexdigest()[:16]}.json"


def _noted(notes: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(_place(notes, name).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _note(notes: Path, name: str, files: Mapping[str, Sequence[object]]) -> None:
    # where nothing can be written, or no more, the files are read again next time
    with suppress(OSError, RunFolderError):
        notes.mkdir(exist_ok=True)
        write_json_atomic(_place(notes, name), {"files": files})
        others = [p for p in notes.iterdir() if p.name.startswith(f"{name}.") and p.suffix == ".json"]
        for old in sorted(others, key=lambda p: p.stat().st_mtime)[:-_HOSTS]:
            old.unlink(missing_ok=True)  # of hosts and boots that are no more; at worst one reads again


# -- the cache


MANIFEST = "complete.json"
_TEMPORARY, _ASIDE, _LOCKS, _NOTES = ".part-", ".damaged-", ".locks", ".verified"
_HALF_FILLED = re.compile(rf"{re.escape(_TEMPORARY)}(.+)\.\d+-[0-9a-f]{{8}}")
_ASIDE_SECONDS = 24 * 3600
_ROUNDS = 3  # of filling an entry, should this process be stopped so long that another one takes over
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def cache_folder() -> Path:
    """Where downloads and conversions are kept: ``$UNLEARN_CACHE`` or ``~/.cache/unlearn``."""
    return Path(os.environ.get("UNLEARN_CACHE") or "~/.cache/unlearn").expanduser()


def offline() -> bool:
    """True when the environment forbids the network (``UNLEARN_OFFLINE`` or ``HF_HUB_OFFLINE``)."""
    names = ("UNLEARN_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in names)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    return sha256_of(path)


def check_sha256(what: str, wanted: str, found: str) -> None:
    """Compare two checksums in hex.

    Raises:
        ModelError: they differ; the message has both.
    """
    if wanted != found:
        raise ModelError(
            f"model.path: {what} is not the file that is meant\n  SHA-256 wanted {wanted}\n  SHA-256 found  {found}"
        )


def whole(folder: Path) -> bool:
    """True when every file that ``complete.json`` names is there with its size: for plans, which read no gigabytes."""
    files = _manifest(folder)
    try:
        return files is not None and all((folder / name).stat().st_size == size for name, (size, _) in files.items())
    except OSError:
        return False


def require_space(folder: Path, needed: int) -> None:
    """Refuse before writing ``needed`` bytes to the file system of ``folder`` when they would not fit.

    Raises:
        ModelError: naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"not enough space in {folder.parent}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free. "
            "Free some, or set UNLEARN_CACHE to a folder on another disk"
        )


def vanished(place: str | Path) -> str | None:
    """What to tell the user of something in the cache that is not there any more though it was a moment ago."""
    cache = cache_folder()
    if not Path(place).is_relative_to(cache) or Path(place).is_dir():
        return None
    return f"{place} has gone while it was in use: {_unreachable(cache)}"


def entry(cache: Path, key: str, fill: Callable[[Path], None]) -> Path:
    """The folder of one cache entry, made by ``fill`` unless it is there, whole and undamaged.

    Of several processes that want the same entry at once, one makes it and the others wait for it.

    Args:
        cache: the cache folder; created when missing.
        key: name of the entry; says everything its content depends on.
        fill: writes the content into the (temporary) folder it is given.

    Raises:
        ModelError: no space left, the cache cannot be written, or it has gone meanwhile.
        RunFolderError: ``UNLEARN_LOCK_TIMEOUT`` is no number of seconds.
    """
    folder = cache / key
    damage = _damage(cache, key)
    if damage is None:
        return folder
    for _ in range(_ROUNDS):
        with _locked(cache, key, damage) as lock:
            damage = _damage(cache, key)
            if damage is None:
                return folder  # another process has made it meanwhile
            if folder.exists():
                say(f"{folder}: {damage}; it is made again", style="yellow")
            if _fill(cache, key, fill, lock):
                return folder
            say(f"{folder}: this process was stopped for long, and another one makes it by now")
    raise ModelError(f"the cache entry {folder} could not be made, because this process is stopped again and again")


def _manifest(folder: Path) -> Files | None:
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(cache: Path, key: str) -> str | None:
    files = _manifest(cache / key)
    if files is None:
        return f"its {MANIFEST} is missing or unreadable"
    return damage(cache / key, files, cache / _NOTES, key)


@contextmanager
def _locked(cache: Path, key: str, damage: str) -> Iterator[Lock]:
    try:
        (cache / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = Lock.take(cache / _LOCKS / key, wait=None, what=str(cache / key))
    except OSError as error:
        if error.errno in _FULL:
            raise _full(cache) from error
        lacks = f"is damaged: {damage}" if (cache / key).exists() else "is not in it"
        raise ModelError(
            f"the cache folder {cache} cannot be written ({error.strerror}), and {key} {lacks}. "
            "Set UNLEARN_CACHE to another folder"
        ) from error
    with lock:
        yield lock


def _fill(cache: Path, key: str, fill: Callable[[Path], None], lock: Lock) -> bool:
    """Make an entry; False when the lock was lost on the way, and nothing of this process's is in its place."""
    folder, temporary = cache / key, cache / f"{_TEMPORARY}{key}.{unique()}"
    try:
        _sweep(cache, key)
        temporary.mkdir()
        fill(temporary)
        files = _write_manifest(temporary)
        if lock.lost():
            return False
        _publish(temporary, folder)
        remember(folder, files, cache / _NOTES, key)
        return True
    except Exception as error:
        if _is_full(error):
            raise _full(cache) from error
        trouble = _trouble(temporary)
        if trouble is None:
            raise
        if trouble.errno in _FULL:
            raise _full(cache) from error
        if _trouble(cache / _LOCKS) is None and lock.lost():
            return False  # whoever took over has removed what was half filled
        raise ModelError(f"{key} could not be put into the cache ({error}): {_unreachable(cache)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unreachable(cache: Path) -> str:
    return (
        f"the cache folder {cache} was removed, or its disk is out of reach or broken. Make it available again, or set "
        "UNLEARN_CACHE to another folder, and run the same command again"
    )


def _full(cache: Path) -> ModelError:
    return ModelError(
        f"no space left in the cache folder {cache}: free some, or set UNLEARN_CACHE to a folder on another disk"
    )


def _write_manifest(folder: Path) -> Files:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {p.relative_to(folder).as_posix(): (p.stat().st_size, sha256(p)) for p in found}
    written = {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": written}, indent=1) + "\n", "utf-8")
    return files


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place. What is there is moved aside, where those who use it still have it."""
    if folder.exists() or folder.is_symlink():
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder.parent))
        folder.rename(aside / folder.name)
    temporary.rename(folder)


def _sweep(cache: Path, key: str) -> None:
    """Remove what is nobody's any more.

    A half filled folder belongs to whoever holds the lock of its key; under that lock, which is this process's for
    ``key``, there is no such process but this one. No clock is asked. What was moved aside is damaged, and its age is
    that by the clock of the disk's own machine.
    """
    for left in cache.glob(f"{_TEMPORARY}*"):
        match = _HALF_FILLED.fullmatch(left.name)
        if match is None:
            continue
        if match[1] == key:
            shutil.rmtree(left, ignore_errors=True)
        elif (lock := Lock.attempt(cache / _LOCKS / match[1])) is not None:
            with lock:
                shutil.rmtree(left, ignore_errors=True)
    aside = list(cache.glob(f"{_ASIDE}*"))
    if aside:
        with tempfile.TemporaryFile(dir=cache) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        for left in aside:
            with suppress(FileNotFoundError):  # another process sweeps, too
                if now - left.stat().st_mtime > _ASIDE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


def _trouble(folder: Path) -> OSError | None:
    """What keeps a file from being written to a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        return error
    return None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # safetensors reports the operating system's error in words only
    return "os error 28)" in str(error) or "StorageFull" in str(error)
