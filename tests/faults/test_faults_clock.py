"""Clocks that are wrong, jump, or have dated files to another century: nothing depends on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fault_arena import SAME, Bench, of_stage, some

DECADE = 10 * 365.25 * 86400.0
JUMPS = {"back": -DECADE, "forward": DECADE}
TIMES = {"1970": 0, "2100": 4_102_444_800}
CHECKPOINT = r"run/\.unlearn-work/target@\*/checkpoint-"


def dated(root: Path, seconds: int) -> None:
    """Give every file and folder one time."""
    for path in [*root.rglob("*"), root]:
        os.utime(path, (seconds, seconds), follow_symlinks=False)


@pytest.mark.parametrize("jump", some("back", slow=["forward"]))
def test_a_clock_that_jumps_midway(jump: str, bench: Bench, tmp_path: Path) -> None:
    """In the middle of training, before everything else is done."""
    place = bench.copy(tmp_path / "place").without("teach", "test", "membership")
    plan = place.plan(1, match=f"{CHECKPOINT}2", action=f"clock:{JUMPS[jump]}")
    assert bench.verdict(place, bench.run(place, plan=plan)) == SAME
    ended = bench.run(place)
    assert "nothing has changed" in ended.err
    assert bench.verdict(place, ended) == SAME


@pytest.mark.parametrize("jump", some("back", slow=["forward"]))
def test_resumed_under_another_clock(jump: str, bench: Bench, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without("teach", "robustness")
    assert bench.run(place, plan=place.plan(1, match=f"{CHECKPOINT}3")).code == -9
    ended = bench.run(place, plan=place.plan(clock=JUMPS[jump]))
    assert "going on after process" in ended.err
    assert bench.verdict(place, ended) == SAME


@pytest.mark.parametrize("time", some("2100", slow=["1970"]))
def test_files_and_remains_of_another_time(time: str, bench: Bench, tmp_path: Path) -> None:
    """A finished run, and one that was killed while the cache was filled and in training."""
    place = bench.copy(tmp_path / "place")
    dated(place.root, TIMES[time])
    ended = bench.run(place)
    assert "nothing has changed" in ended.err
    assert bench.verdict(place, ended) == SAME
    place.without("load", "teach")
    for at, match in ((8, of_stage("load")), (1, f"{CHECKPOINT}3")):
        assert bench.run(place, plan=place.plan(at, match=match)).code == -9
    dated(place.root, TIMES[time])
    assert bench.verdict(place, bench.run(place)) == SAME


@pytest.mark.parametrize("jump", some("back", slow=["forward"]))
def test_two_machines_whose_clocks_differ_fill_one_cache(jump: str, bench: Bench, tmp_path: Path) -> None:
    """Neither takes what the other is writing for something that was left years ago."""
    places = [bench.copy(tmp_path / name).without("report") for name in ("one", "other")]
    cache = str(tmp_path / "cache")
    slowly = {"at": 9, "match": of_stage("load"), "action": "sleep 0.5", "cache": cache}
    plans = [place.plan(clock=clock, **slowly) for place, clock in zip(places, (0.0, JUMPS[jump]), strict=True)]
    jobs = [place.job(cache=cache, plan=plan) for place, plan in zip(places, plans, strict=True)]
    for place, ended in zip(places, bench.server.run(*jobs), strict=True):
        assert bench.verdict(place, ended) == SAME
