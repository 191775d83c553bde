"""Killed at file operations of every stage, and run again: the same report."""

from __future__ import annotations

import random
import re
from pathlib import Path

import chats
import pytest
from fault_arena import SAME, STAGES, Bench, Place, broken, of_stage, some

KILLED = {"KILL": -9, "TERM": 130}
SEED = 20261123
OPERATIONS, MOMENTS = 216, 24  # points of the slow suite


def numbers(stage: str, bench: Bench, *kinds: str) -> list[int]:
    """The numbers, from 1, of a stage's operations of some kinds among all of that stage."""
    lines = [line for line in bench.operations if re.search(of_stage(stage), line)]
    return [n for n, line in enumerate(lines, start=1) if not kinds or line.partition(" ")[0] in kinds]


def killed(bench: Bench, place: Place, **plan: object) -> None:
    """One kill, what must hold after it, and the run that follows."""
    ended = bench.run(place, plan=place.plan(**plan))  # type: ignore[arg-type]
    struck = place.struck()
    assert ended.code == KILLED[str(plan["action"])], (struck, ended.err)
    assert broken(place) == [], struck
    assert bench.again(place, ended) == SAME, struck


def test_operations_are_those_of_the_stages(bench: Bench) -> None:
    assert all(len(numbers(stage, bench)) >= 15 for stage in STAGES)
    others = [o for o in bench.operations if not any(re.search(of_stage(stage), o) for stage in STAGES)]
    assert {o.partition(" ")[0] for o in others} == {"mkdir", "fsync", "fsynced"}, "of folders that stages share"
    assert len(others) < 0.05 * len(bench.operations)


# one run that is killed in every stage is below
_FIRST = ("load", "teach", "report")


@pytest.mark.parametrize("stage", some(*_FIRST, slow=[stage for stage in STAGES if stage not in _FIRST]))
def test_killed_in_a_stage(stage: str, bench: Bench, tmp_path: Path) -> None:
    """Two in each: while something is written, which then is cut to half, and where the stage gets its name."""
    number = list(STAGES).index(stage)
    writing = numbers(stage, bench, "written", "fsync", "opened")
    naming = numbers(stage, bench, "rename", "renamed", "replaced", "link")
    # the name: before and after the renaming by turns
    half = {"at": writing[len(writing) // 3], "action": "KILL", "torn": True}
    name = {"at": naming[-1 if number % 2 else -2], "action": "TERM" if number % 3 == 1 else "KILL"}
    for point in (half, name):
        place = bench.copy(tmp_path / str(point["at"])).without(stage)
        killed(bench, place, match=of_stage(stage), **point)


def test_one_run_killed_in_every_stage(bench: Bench, tmp_path: Path) -> None:
    """From nothing to the report, over the remains of kill after kill."""
    place = bench.cold(tmp_path / "place")
    for number, stage in enumerate(STAGES):
        at, action = numbers(stage, bench, "opened", "native")[number % 3], "TERM" if number % 2 else "KILL"
        ended = bench.run(place, plan=place.plan(at, match=of_stage(stage), action=action, torn=True))
        assert ended.code == KILLED[action], (stage, ended.err)
        assert broken(place) == [], stage
    assert bench.verdict(place, bench.run(place)) == SAME


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "from_"), [("checkpoint-6/", 3), ("checkpoint-9/", 6)])
def test_a_fit_toward_refusals_in_a_chat_template_goes_on_to_the_same_bits(
    cut: str, from_: int, pico_llama: Path, tmp_path: Path
) -> None:
    """Killed while it writes a checkpoint, it goes on from the one before to the vector of a run without a stop."""
    chats.build(pico_llama, tmp_path / "model", "llama")
    model = {"path": str(tmp_path / "model"), "chat_template": "auto", "system": "Be brief."}
    how = {"steps": 12, "learning_rate": 0.01, "batch_size": 6, "save_every": 3}
    vector = {"method": "idk_dpo", "forget": how, "lora": {"rank": 4}}
    alone = dict.fromkeys(("teach", "reference", "holdout", "benchmark", "robustness"))
    bench = Bench(tmp_path / "data", model=model, vector=vector, **alone)
    place = bench.cold(tmp_path / "place")
    half = sum(cut in line for line in bench.operations) // 2
    ended = bench.run(place, plan=place.plan(half, match=cut, action="KILL", torn=True))
    assert ended.code == -9, ended.err
    assert "vectors" not in {folder.name for folder in place.run.iterdir()}
    again = bench.run(place, plan=place.plan())
    assert bench.verdict(place, again) == SAME
    written = re.findall(
        r"^(?:opened|native|written) .*checkpoint-(\d+)/", (place.root / "operations").read_text(), re.M
    )
    assert {int(step) for step in written} == {step for step in (3, 6, 9, 12) if step > from_}
    bench.server.close()


# --- the slow suite ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", range(OPERATIONS))
def test_killed_anywhere(number: int, bench: Bench, tmp_path: Path) -> None:
    """From nothing, at operations spread over the whole run; by turns without and with a signal that can be caught."""
    # never torn with a signal: training holds it, finishes its step and would seal the cut file
    action, torn = "TERM" if number % 2 else "KILL", number % 4 == 2
    at = 1 + number * len(bench.operations) // OPERATIONS
    killed(bench, bench.cold(tmp_path / "place"), at=at, action=action, torn=torn)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_moment(number: int, bench: Bench, tmp_path: Path) -> None:
    """At moments of the clock, wherever the run is then."""
    moment = random.Random(f"{SEED} {number}").uniform(0.0, 1.2 * bench.seconds)
    action = "TERM" if number % 2 else "KILL"
    place = bench.cold(tmp_path / "place")
    ended = bench.run(place, after=moment, action=action)
    assert ended.code in (KILLED[action], 0), ended.err
    assert broken(place) == []
    assert bench.again(place, ended) == SAME
