"""Count the file operations of a run, and let something happen at one of them.

An operation is anything that changes files below one of the roots: opening for writing, renaming, removing, making
folders, and bringing to disk. Python's audit events come before an operation; what has no event (fsync, the writers
of safetensors, torch and tokenizers, which are not Python) or is worth two points (before and after a rename, an
opened file without content) is wrapped.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RANDOM = re.compile(r"\d+-[0-9a-f]{8}|[0-9a-f]{32}|(?<=part-)[a-z0-9_]{8}|\d{4}-\d\d-\d\dT[\d.-]+|(?<=@)[0-9a-f]{16}")
_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens, and at which operation.

    ``action`` is KILL, TERM or another signal; ``clock:S`` moves the wall clock by S seconds; ``gone:PATH`` removes a
    folder; anything else is a command for the shell.
    """

    roots: tuple[str, ...]  # folders whose operations count
    log: str  # file in which every operation is a line, as it comes
    at: int | None = None  # the number of the operation, from 1, of those whose line ``match`` finds; None: only count
    match: str = ""
    action: str = "KILL"
    torn: bool = False  # cut the file that was written last to half first, as a kill during the writing would
    clock: float = 0.0  # seconds by which the wall clock is wrong from the start


class Injector:
    """The operations of this process, from :meth:`install` on; there is no way to take it off again."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._roots = tuple(str(Path(root).resolve()) + os.sep for root in plan.roots)
        self._log = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        self._here = f"{Path.cwd()}{os.sep}"
        self._found, self._busy = 0, False
        self._last: str | None = None

    def install(self) -> None:
        """Begin to count."""
        _move_clock(self._plan.clock)
        sys.addaudithook(self._event)
        self._wrap_python()
        self._wrap_native()

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
            if writes and not isinstance(path, int):
                self.operation("open", path)
        elif event in _CHANGES:
            # a relative name counts from an open folder (shutil.rmtree works so)
            folder = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 else None
            self.operation(event.partition(".")[2], args[0], folder)

    def operation(self, kind: str, path: Any, folder: int | None = None) -> None:
        """One operation; what is planned for it happens here."""
        if self._busy:
            return
        place = self._inside(path, folder)
        if place is None or (kind == "mkdir" and Path(place).is_dir()):
            return
        line = f"{kind} {_RANDOM.sub('*', place.removeprefix(self._here))}"
        os.write(self._log, f"{line}\n".encode())
        plan = self._plan
        if plan.at is not None and (not plan.match or re.search(plan.match, line)):
            self._found += 1
            if self._found == plan.at:
                self._strike()
        if kind in ("open", "native"):
            self._last = place

    def _strike(self) -> None:
        self._busy = True  # what happens here is no operation of the program's
        action = self._plan.action
        if self._plan.torn and self._last is not None:
            with suppress(OSError):
                os.truncate(self._last, Path(self._last).stat().st_size // 2)
        os.write(self._log, f"=> {action}\n".encode())
        if hasattr(signal, f"SIG{action}"):
            self._busy = False
            os.kill(os.getpid(), getattr(signal, f"SIG{action}"))
            return
        if action.startswith("clock:"):
            _move_clock(float(action.removeprefix("clock:")))
        elif action.startswith("gone:"):
            shutil.rmtree(action.removeprefix("gone:"))
        else:
            subprocess.run(action, shell=True, check=True, capture_output=True)
        self._busy = False

    def _inside(self, path: Any, folder: int | None) -> str | None:
        try:
            text = os.fsdecode(path)
            base = Path.cwd() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
        except (TypeError, OSError):
            return None
        whole = os.path.normpath(os.path.join(base, text))  # noqa: PTH118 - a Path would look for links
        return whole if whole.startswith(self._roots) else None

    def _wrap_python(self) -> None:
        for name in ("rename", "replace"):
            setattr(os, name, self._after(getattr(os, name), f"{name}d", 1))
        sync = os.fsync

        def fsync(fd: Any) -> None:
            path = Path(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}").readlink()
            self.operation("fsync", path)
            sync(fd)
            self.operation("fsynced", path)

        os.fsync = fsync
        plain = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            found = plain(file, mode, *args, **options)
            if any(c in mode for c in "wax+") and not isinstance(file, int):
                try:
                    self.operation("opened", file)
                except BaseException:
                    found.close()
                    raise
            return found

        io.open = builtins.open = opened  # type: ignore[assignment]

    def _wrap_native(self) -> None:
        import safetensors.torch
        import torch
        from transformers import PreTrainedTokenizerFast

        # all three are given what they write, then where
        for owner, name, file in (
            (safetensors.torch, "serialize_file", ""),
            (torch, "save", ""),
            (PreTrainedTokenizerFast, "_save_pretrained", "/tokenizer.json"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), file))

    def _around(self, function: Callable[..., Any], file: str) -> Callable[..., Any]:
        def wrapped(written: Any, *args: Any, **options: Any) -> Any:
            place = args[0] if args else next(options[n] for n in ("filename", "f", "save_directory") if n in options)
            place = f"{place}{file}" if file else place
            self.operation("native", place)
            found = function(written, *args, **options)
            self.operation("written", place)
            return found

        return wrapped

    def _after(self, function: Callable[..., Any], kind: str, which: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            found = function(*args, **options)
            self.operation(kind, args[which])
            return found

        return wrapped


_clock, _shift = time.time, 0.0


def _move_clock(seconds: float) -> None:
    global _shift
    _shift += seconds
    if seconds:
        time.time = lambda: _clock() + _shift
        time.time_ns = lambda: int((_clock() + _shift) * 1e9)
