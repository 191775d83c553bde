"""Killed at file operations of every stage, and run again: the same report."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from fault_arena import SAME, STAGES, Bench, Place, broken, of_stage

KILLED = {"KILL": -9, "TERM": 130}
SEED = 20261123
OPERATIONS, MOMENTS = 216, 24  # points of the slow suite


def of(stage: str, bench: Bench) -> list[str]:
    """The operations that belong to a stage, in order."""
    pattern = re.compile(of_stage(stage))
    return [line for line in bench.operations if pattern.search(line)]


def numbers(lines: list[str], *kinds: str) -> list[int]:
    """The numbers, from 1, of operations of some kinds."""
    return [n for n, line in enumerate(lines, start=1) if line.partition(" ")[0] in kinds]


def strike(bench: Bench, place: Place, point: str, kind: str, **plan: object) -> None:
    """One kill, what must hold after it, and the run that follows."""
    killed = bench.run(place, plan=place.plan(**plan))  # type: ignore[arg-type]
    struck = place.struck()
    assert killed.code == KILLED[str(plan["action"])], (struck, killed.err)
    assert broken(place) == [], struck
    assert bench.again(place, killed) == SAME, struck


def test_operations_are_those_of_the_stages(bench: Bench) -> None:
    assert all(len(of(stage, bench)) >= 15 for stage in STAGES)
    others = [o for o in bench.operations if not any(re.search(of_stage(stage), o) for stage in STAGES)]
    assert {o.partition(" ")[0] for o in others} == {"mkdir", "fsync", "fsynced"}, "of folders that stages share"
    assert len(others) < 0.05 * len(bench.operations)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage(stage: str, bench: Bench, tmp_path: Path) -> None:
    """Two in each: while something is written, which then is cut to half, and where the stage gets its name."""
    lines, number = of(stage, bench), list(STAGES).index(stage)
    writing, naming = (
        numbers(lines, "written", "fsync", "opened"),
        numbers(lines, "rename", "renamed", "replaced", "link"),
    )
    half = {"at": writing[len(writing) // 3], "action": "KILL", "torn": True}
    # before and after the renaming by turns
    name = {"at": naming[-1 if number % 2 else -2], "action": "TERM" if number % 3 == 1 else "KILL"}
    for point in (half, name):
        place = bench.copy(tmp_path / str(point["at"])).without(stage)
        kind = f"SIG{point['action']} at a file operation"
        strike(bench, place, stage, kind, match=of_stage(stage), **point)


def test_one_run_killed_in_every_stage(bench: Bench, tmp_path: Path) -> None:
    """From nothing to the report, over the remains of kill after kill."""
    place = bench.cold(tmp_path / "place")
    for number, stage in enumerate(STAGES):
        lines = of(stage, bench)
        action = "TERM" if number % 2 else "KILL"
        plan = place.plan(
            numbers(lines, "opened", "native")[number % 3], match=of_stage(stage), action=action, torn=True
        )
        killed = bench.run(place, plan=plan)
        assert killed.code == KILLED[action], (stage, killed.err)
        assert broken(place) == [], stage
    assert bench.verdict(place, bench.run(place)) == SAME


# --- the slow suite ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", range(OPERATIONS))
def test_killed_anywhere(number: int, bench: Bench, tmp_path: Path) -> None:
    """From nothing, at operations spread over the whole run; by turns without and with a signal that can be caught."""
    at = 1 + number * len(bench.operations) // OPERATIONS
    action = "TERM" if number % 2 else "KILL"
    place = bench.cold(tmp_path / "place")
    kind = f"SIG{action} at a file operation"
    torn = number % 4 == 2  # never with a signal: training holds it, finishes its step and would seal the cut file
    strike(bench, place, f"operation {at}", kind, at=at, action=action, torn=torn)
    shutil.rmtree(place.root)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_moment(number: int, bench: Bench, tmp_path: Path) -> None:
    """At moments of the clock, wherever the run is then."""
    moment = random.Random(f"{SEED} {number}").uniform(0.0, 1.2 * bench.seconds)
    action = "TERM" if number % 2 else "KILL"
    place = bench.cold(tmp_path / "place")
    killed = bench.run(place, after=moment, action=action)
    assert killed.code in (KILLED[action], 0), killed.err
    assert broken(place) == []
    assert bench.again(place, killed) == SAME
    shutil.rmtree(place.root)
