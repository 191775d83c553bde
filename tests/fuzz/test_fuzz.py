"""Every reader against mutations of what it reads: its own value or its own error, whatever the bytes.

What is tried is the same in every run. The slow test tries many times as much; atheris, in test_atheris.py, looks for
inputs by the code that they reach.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS, Target

FEW, MANY = 60, 1500
SLOW_TO_READ = {"recipe": 12, "page": 25, "run_folder": 30}  # how often, where one reading takes milliseconds


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
