"""What an attacker would send, and a way to see whether it did anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m"  # clears the screen, sets the window's title, colours
SCRIPT = "</script></style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
QUOTES = "\"'><svg onload=document.title='owned'>"
JINJA = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in [1] %}{{ cycler.__init__.__globals__ }}{% endfor %}"
SECONDS = 300


class Touch:
    """Unpickled, it makes a file: what a pickle with code in it can do, harmless."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.place), "w")


def pickled(place: Path) -> bytes:
    """A pickle that makes the file ``place`` when it is opened without care."""
    return pickle.dumps(Touch(place), protocol=2)  # the one that torch reads without a warning


def torch_file(place: Path) -> bytes:
    """The same as ``torch.save`` would write it: a zip with a ``data.pkl``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(place), protocol=2))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def module(place: Path) -> str:
    """Python text that makes the file ``place`` when it is imported, or when any class of it is asked for."""
    return f"""
import pathlib
pathlib.Path({str(place)!r}).write_text("ran")
from transformers import LlamaConfig as C, LlamaForCausalLM as M
"""


def safetensors(header: Mapping[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, true or not."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


@dataclass(frozen=True)
class Watched:
    """What a run under watch did: exit code, what it printed, and the events of ``watch.py``."""

    code: int
    out: str
    err: str
    events: tuple[tuple[Any, ...], ...]

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """The events of one kind, without its name."""
        return [event[1:] for event in self.events if event[0] == kind]


def watched(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str | None]) -> Watched:
    """Run ``unlearn ARGUMENTS`` in ``cwd`` under ``watch.py``; None takes a variable out of the environment."""
    log = cwd.parent / f"{cwd.name}.watch.jsonl"
    mine = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, str(HERE / "watch.py"), str(log), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=SECONDS,
        env={name: value for name, value in mine.items() if value is not None},
    )
    events = tuple(tuple(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines())
    return Watched(done.returncode, done.stdout, done.stderr, events)


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file of a folder with its content, and every link with where it leads."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()  # noqa: PTH115
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }
