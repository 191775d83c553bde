"""What comes from elsewhere: the cache of downloads and conversions, and whether the model hub can be asked.

The cache is ``$UNLEARN_CACHE``, else ``~/.cache/unlearn``; on a cluster a folder that all machines see. An entry is
whole or absent, and its name says what it was made from. The first process that needs one makes it, in a temporary
folder that is renamed when whole; the others wait. Nothing in its place is written to again: jobs have it mapped.

``complete.json`` in an entry has size, times and SHA-256 of every file. A file with that size and those times is
trusted, any other is read, and with ``UNLEARN_VERIFY=full`` all are. What is damaged is moved aside, made again, and
removed after a day. A cache that cannot be written serves what is whole in it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from unlearn.console import say
from unlearn.errors import DataError, ModelError, RunFolderError, UnlearnError
from unlearn.processes import switched_on
from unlearn.store.files import FULL, unique, unwritable, write_json_atomic
from unlearn.store.lock import Lock
from unlearn.text import shorten

MANIFEST = "complete.json"
_TEMPORARY, _ASIDE, _LOCKS = ".part-", ".damaged-", ".locks"
_ASIDE_SECONDS = 24 * 3600
# Whose exceptions mean that the network or the hub failed, where they are not OSErrors already.
NETWORK_LIBRARIES = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"})
_PATIENCE = 2.0  # seconds until the hub must have given a sign of life


def cache_folder() -> Path:
    """Where downloads and conversions are kept: ``$UNLEARN_CACHE`` or ``~/.cache/unlearn``."""
    return Path(os.environ.get("UNLEARN_CACHE") or "~/.cache/unlearn").expanduser()


def offline() -> bool:
    """True when the environment forbids the network (``UNLEARN_OFFLINE`` or ``HF_HUB_OFFLINE``)."""
    return switched_on("UNLEARN_OFFLINE") or switched_on("HF_HUB_OFFLINE")


def verify_always() -> bool:
    """Whether ``UNLEARN_VERIFY`` asks for every byte to be read at every use."""
    given = os.environ.get("UNLEARN_VERIFY") or "once"
    if given not in ("once", "full"):
        raise UnlearnError(f"UNLEARN_VERIFY is once (the default) or full, not {given!r}")
    return given == "full"


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(what: str, wanted: str, found: str) -> None:
    """Raise when two checksums in hex differ."""
    if wanted != found:
        raise ModelError(
            f"model.path: {what} is not the file that is meant\n  SHA-256 wanted {wanted}\n  SHA-256 found  {found}"
        )


def require_space(folder: Path, needed: int) -> None:
    """Refuse before writing ``needed`` bytes to the file system of ``folder`` when they would not fit."""
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


def whole(folder: Path) -> bool:
    """True when every file that ``complete.json`` names is there with its size: for plans, which read no gigabytes."""
    return _damage(folder, read=False) is None


def entry(cache: Path, key: str, fill: Callable[[Path], object]) -> Path:
    """The folder of one cache entry, made by ``fill`` (in a temporary folder) unless it is there, whole and undamaged.

    Of several processes that want the same entry at once, one makes it and the others wait for it. ``key`` names the
    entry and says everything its content depends on.
    """
    folder = cache / key
    while (damage := _damage(folder)) is not None:
        with _locked(cache, key, damage) as lock:
            damage = _damage(folder)
            if damage is None:
                break  # another process has made it meanwhile
            if folder.exists():
                say(f"{folder}: {damage}; it is made again", style="yellow")
            if _fill(cache, key, fill, lock):
                break
        say(f"{folder}: this process was stopped for long, and another one makes it by now")
    return folder


def _damage(folder: Path, read: bool = True) -> str | None:
    """What is wrong with an entry, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        wanted = {str(n): (int(f["size"]), f.get("times"), str(f["sha256"])) for n, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is missing or unreadable"
    always = read and verify_always()
    touched = False
    for name, (size, times, digest) in wanted.items():
        try:
            found = (folder / name).stat()
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes instead of {size}"
            now = [found.st_mtime_ns, found.st_ctime_ns]
            if read and (always or now != times) and sha256(folder / name) != digest:
                return f"the content of {name} has changed (SHA-256 differs)"
            files[name]["times"], touched = now, touched or now != times
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"
    if read and touched:  # it was copied, or another host sees other times
        with suppress(OSError, RunFolderError):  # and is read each time where that cannot be noted
            write_json_atomic(folder / MANIFEST, {"files": files})
    return None


@contextmanager
def _locked(cache: Path, key: str, damage: str) -> Iterator[Lock]:
    try:
        (cache / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = Lock.take(cache / _LOCKS / key, wait=None, what=str(cache / key))
    except OSError as error:
        if error.errno in FULL:
            raise _full(cache) from error
        lacks = f"is damaged: {damage}" if (cache / key).exists() else "is not in it"
        raise ModelError(
            f"the cache folder {cache} cannot be written ({error.strerror}), and {key} {lacks}. "
            "Set UNLEARN_CACHE to another folder"
        ) from error
    with lock:
        yield lock


def _fill(cache: Path, key: str, fill: Callable[[Path], object], lock: Lock) -> bool:
    """Make an entry; False when the lock was lost on the way, and nothing of this process's is in its place."""
    temporary = cache / f"{_TEMPORARY}{key}.{unique()}"
    try:
        _sweep(cache, key)
        temporary.mkdir()
        fill(temporary)
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            found = path.stat()
            about = {"size": found.st_size, "times": [found.st_mtime_ns, found.st_ctime_ns], "sha256": sha256(path)}
            files[path.relative_to(temporary).as_posix()] = about
        (temporary / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", "utf-8")
        if lock.lost():
            return False
        if (folder := cache / key).exists() or folder.is_symlink():  # others may still be reading it
            folder.rename(Path(tempfile.mkdtemp(prefix=_ASIDE, dir=cache)) / key)
        temporary.rename(folder)
        return True
    except Exception as error:
        said = unwritable(error, temporary)
        if said is None:
            raise
        if said.errno in FULL:
            raise _full(cache) from error
        if (cache / _LOCKS).is_dir() and lock.lost():
            return False  # whoever took over has removed what was half filled
        raise ModelError(f"{key} could not be put into the cache ({error}): {_unreachable(cache)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(cache: Path, key: str) -> None:
    """Remove what makers that are no more have left half filled, and what was moved aside a day ago."""
    for part in cache.glob(f"{_TEMPORARY}*.*"):
        maker = part.name.removeprefix(_TEMPORARY).rpartition(".")[0]
        if maker == key:  # whose lock is this process's
            shutil.rmtree(part, ignore_errors=True)
        elif lock := Lock.attempt(cache / _LOCKS / maker):
            with lock:
                shutil.rmtree(part, ignore_errors=True)
    for aside in cache.glob(f"{_ASIDE}*"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - aside.stat().st_mtime > _ASIDE_SECONDS:
                shutil.rmtree(aside, ignore_errors=True)


def _unreachable(cache: Path) -> str:
    return (
        f"the cache folder {cache} was removed, or its disk is out of reach or broken. Make it available again, or set "
        "UNLEARN_CACHE to another folder, and run the same command again"
    )


def _full(cache: Path) -> ModelError:
    return ModelError(
        f"no space left in the cache folder {cache}: free some, or set UNLEARN_CACHE to a folder on another disk"
    )


# -- the model hub: whether it can be asked now, what of it is on this machine, what to say where it is neither


def condensed(error: Exception) -> str:
    """Another library's message on one line, cut where it gets long."""
    return shorten(" ".join(str(error).split()).rstrip(".") or type(error).__name__, 303)


def hub_away() -> str:
    """Why nothing can be had from the hub now, in words; empty where it can.

    Its client is switched off then: it would try for half a minute at each file, and transformers does not hand
    ``local_files_only`` on to every look-up.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if offline():
        why = "going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE)"
    elif silence := _silence(endpoint):
        why = f"the hub ({endpoint}) cannot be reached: {silence}"
    else:
        return ""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # it reads the environment at import only, and so does datasets
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return why


@functools.cache
def _silence(endpoint: str) -> str:
    """Why nobody answers there; empty where anybody does. Asked once, as the hub's client asks: by its proxies."""
    from huggingface_hub import get_session

    said = [f"no answer within {_PATIENCE:g} s"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_PATIENCE)
            said[0] = ""
        except Exception as e:  # of whatever library the client stands on: all mean that it cannot ask
            said[0] = condensed(e)

    thread = Thread(target=ask, daemon=True)  # since looking up a name knows no time limit
    thread.start()
    thread.join(_PATIENCE)
    return said[0]


def hub_cache() -> Path:
    """The folder of the hub client's own cache, by its documented rule; importing it takes longer than the look-up."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def model_in_cache(name: str) -> bool:
    """Whether a model, adapter or tokenizer of the hub, in whatever revision, was downloaded before."""
    return any((hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*config.json"))


def check_data(names: Iterable[str]) -> None:
    """Raise a DataError for data sets that only the hub has, where it cannot be reached for certain."""
    read = Path(os.environ.get("HF_DATASETS_CACHE") or _hub_home() / "datasets").expanduser()
    for name in names:
        owner = name.partition("/")[0]
        there = [*hub_cache().glob(f"datasets--{owner}*"), *read.glob(f"{owner}*")]
        if not there and (away := hub_away()):
            raise DataError(no_data(f"hub:{name}", away))


def no_data(source: str, away: str) -> str:
    """The message for a data set that is neither on this machine nor to be had."""
    return (
        f"{source}: it is not on this machine, and {away}. Download the file elsewhere and give it in this set's "
        "`path` (.json, .jsonl, .csv or .parquet; remove config, split and revision)"
    )
