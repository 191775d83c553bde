"""A run's folder that was moved, copied, renamed, or is reached through a link is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fault_arena import SAME, Bench, Place, broken, facts, of_stage, some


def test_copied_by_another_tool_and_renamed(bench: Bench, tmp_path: Path) -> None:
    """Without times and permissions."""
    place = bench.cold(tmp_path / "place")
    shutil.copytree(bench.whole.run, place.run, copy_function=shutil.copyfile)
    shutil.copytree(bench.whole.cache, place.cache, copy_function=shutil.copyfile)
    ended = bench.run(place)
    assert "nothing has changed" in ended.err
    assert bench.verdict(place, ended) == SAME
    place.run.rename(place.root / "another name")
    ended = bench.run(place, out="another name")
    assert "nothing has changed" in ended.err
    assert facts(place.root / "another name") == bench.expected


@pytest.mark.parametrize("linked", some("run", slow=["parent"]))
def test_through_a_link(linked: str, bench: Bench, tmp_path: Path) -> None:
    """With a stage to be made again, so that something is written through it."""
    place = seen = bench.copy(tmp_path / "place").without("sweep")
    if linked == "run":
        place.run.rename(tmp_path / "elsewhere")
        place.run.symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "link").symlink_to(place.root)
        seen = Place(tmp_path / "link", place.recipe)
    assert bench.verdict(seen, bench.run(seen)) == SAME
    assert broken(place) == []


@pytest.mark.parametrize("stage", some("finetune", slow=["export"]))
def test_moved_after_a_kill(stage: str, bench: Bench, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without(stage)
    assert bench.run(place, plan=place.plan(20, match=of_stage(stage))).code == -9
    place.root.rename(tmp_path / "moved")
    moved = Place(tmp_path / "moved", place.recipe)
    assert bench.verdict(moved, bench.run(moved)) == SAME


def test_copied_while_it_runs(bench: Bench, tmp_path: Path) -> None:
    """What a backup of a run at work holds is a run to go on with, though its lock names a live process."""
    place = bench.copy(tmp_path / "place").without("teach")
    copy = bench.cold(tmp_path / "copy")
    shutil.copytree(place.cache, copy.cache)
    plan = place.plan(12, match=of_stage("teach"), action=f"cp -r {place.run} {copy.root}")
    assert bench.verdict(place, bench.run(place, plan=plan)) == SAME
    assert (copy.run / ".unlearn-lock").exists()
    assert bench.verdict(copy, bench.run(copy)) == SAME
