"""Every reader against mutations of what it reads: its own value or its own error, whatever the bytes.

What is tried is the same in every run. The slow test tries many times as much.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import GRID, REPORT, TARGETS, Target, zip_of

FEW, MANY = 60, 1500
SLOW_TO_READ = {"recipe": 12, "page": 10, "run_folder": 15}  # how often, where one reading takes milliseconds


def mutated(target: Target, draw: random.Random) -> bytes:
    """One of the seeds with one to eight changes: bytes, pieces moved, cut or doubled, words of the format."""
    raw = bytearray(draw.choice(target.seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        at, length = draw.randrange(len(raw) + 1), draw.choice((1, 1, 2, 4, 8, 64))
        kind = draw.randrange(8)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << draw.randrange(8)
        elif kind == 1 and raw:
            raw[at % len(raw)] = draw.choice(
                (0, 1, 0x7F, 0x80, 0xFF, ord('"'), ord("{"), ord("-"), draw.randrange(256))
            )
        elif kind == 2:
            del raw[at : at + length]
        elif kind == 3:
            raw[at:at] = raw[at : at + length] * draw.choice((1, 1, 2, 50))
        elif kind == 4:
            raw = raw[:at]
        elif kind == 5:
            other = draw.choice(target.seeds)
            start = draw.randrange(len(other) + 1)
            raw[at : at + length] = other[start : start + length]
        elif target.words:
            raw[at : at + (length if kind == 6 else 0)] = draw.choice(target.words)
    return bytes(raw)


def attempt(name: str, raw: bytes) -> None:
    """Read the bytes in a folder of their own; what may not be raised says which bytes it was."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            TARGETS[name].read(raw, Path(folder))
        except BaseException as error:
            raise AssertionError(f"{name}: {error!r} on {raw[:2000]!r}") from error


def search(name: str, times: int) -> None:
    """The seeds as they are, nothing at all, and mutations; what is found comes back as small as can be."""
    for raw in (*TARGETS[name].seeds, b""):
        attempt(name, raw)

    @settings(
        max_examples=times, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(draw=st.randoms(use_true_random=False))
    def mutations(draw: random.Random) -> None:
        attempt(name, mutated(TARGETS[name], draw))

    mutations()


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_of_everything(name: str) -> None:
    search(name, SLOW_TO_READ.get(name, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_of_everything(name: str) -> None:
    search(name, MANY // (10 if name in SLOW_TO_READ else 1))


def index_of(file: object) -> bytes:
    return json.dumps({"weight_map": {"a\nb": file}}).encode()


def zip_whose_places_cannot_be() -> bytes:
    raw = bytearray(zip_of())
    last, first = raw.rindex(b"PK\x01\x02"), raw.index(b"PK\x01\x02")
    raw[last + 42 : last + 46] = b"\xff\xff\xff\x7f"
    raw[first + 42 : first + 46] = b"\xff\xff\xff\xff"
    return bytes(raw)


def report_with(**keys: object) -> bytes:
    plain = {k: v for k, v in (json.loads(REPORT) | keys).items() if v is not None}
    return json.dumps(plain).encode()


def grid_with(key: str, name: object) -> bytes:
    plain = json.loads(GRID)
    plain[key][0]["name"] = name
    return json.dumps(plain).encode()


DEEP = b"[" * 100_000
FOUND: dict[str, tuple[bytes, ...]] = {  # inputs that were a crash once
    "index": (
        DEEP,
        *(index_of("x" * 5000 + ".safetensors"), index_of("a\x00.safetensors"), index_of("a\nb.safetensors")),
        *(index_of("."), index_of(".."), index_of(3), index_of(None), index_of([1]), index_of({})),
    ),
    "wheel": (zip_whose_places_cannot_be(),),
    "membership": (
        *(b"{", b"[]", b"1", b"null", DEEP, b"\xed\xa0\x80", b'{"member": true}'),
        *(b'{"member": [1], "id": 1}', b'{"member": true, "id": []}'),
    ),
    "report": (
        *(b"null", b"[]", b"{}", b'{"schema": 1}', b'{"schema": [1]}'),
        *(report_with(chosen=None), report_with(examples=None), report_with(chosen=[]), report_with(scores=[1])),
        *(report_with(sweep={"a": 1}), report_with(examples=[{"unknown": 1}]), report_with(robustness=[1])),
        report_with(foresight="x"),
    ),
    "run_folder": (b"name: x\nbenchmark: {name: tofu, set: forget01}\neval: [1]\n", b"[]", b"benchmark: 3", b"\x00"),
    "bookkeeping": (
        *(DEEP, b"[]", b"null", b'{"schema": 1}', b'{"schema": 1, "state": 3, "x": 1}'),
        *(grid_with("jobs", name) for name in ("../x", "/x", "..", ".x", "", "a\nb", "a\\b", 3, None)),
        *(grid_with("preparations", name) for name in ("../x", "/x", "..", ".x", "", "a\nb", 3, None)),
    ),
    "csv": (b'question,answer,choices,n\nq,A,"' + DEEP + b'",1\n',),
}


@pytest.mark.parametrize(("name", "raw"), [(n, raw) for n, every in FOUND.items() for raw in every])
def test_what_was_found(name: str, raw: bytes) -> None:
    attempt(name, raw)
