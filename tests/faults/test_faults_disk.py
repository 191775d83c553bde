"""Disks that fill up, are read-only or vanish: one clear message, and the same report once there is a disk again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_arena import MESSAGE, SAME, THEN_SAME, WRONG, Bench, Place, facts, of_stage, some

_PAGE = 4096


class Disk:
    """A file system in memory, of so many bytes."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def mount(self, size: int) -> None:
        """Make it."""
        self.place.mkdir(parents=True, exist_ok=True)
        _do("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.place))

    def again(self, option: str) -> None:
        """Change it while it is in use: ``ro``, ``rw``, ``size=...``."""
        _do("mount", "-o", f"remount,{option}", str(self.place))

    def read_only(self) -> str:
        """The command that makes it read-only for whoever opens a file from now on; ``gone(lazy=False)`` takes it back.

        By a mount on top of it: a disk with a file that is open for writing, as a lock's is, cannot be mounted anew.
        """
        return f"mount --bind {self.place} {self.place} && mount -o remount,bind,ro {self.place}"

    def leave(self, kilobytes: int) -> None:
        """Make it so small that only this much is free."""
        used = sum(-(-p.stat().st_size // _PAGE) * _PAGE for p in self.place.rglob("*") if p.is_file())
        self.again(f"size={used + kilobytes * 1024}")

    def gone(self, lazy: bool = True) -> None:
        """Take it away; lazily: whoever uses it."""
        _do("umount", *(["-l"] if lazy else []), str(self.place))


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    """``disk(folder, 2**20)``: one of a megabyte in a folder's place, until the test ends."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    made: list[Disk] = []

    def make(place: Path, size: int = 2**26) -> Disk:
        made.append(Disk(place))
        try:
            made[-1].mount(size)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"no disk can be mounted here: {getattr(e, 'stderr', e)}")
        return made[-1]

    yield make
    for one in made:
        while one.place.is_mount():
            one.gone()


Disks = Callable[..., Disk]


def on_disk(bench: Bench, root: Path, disk: Disks, *without: str, kept: str = "run") -> tuple[Place, Disk]:
    """The finished run, of which ``run`` or ``cache`` is on a disk of its own; without the report and some stages."""
    place = bench.cold(root)
    there = disk(place.root / kept)
    bench.fill(place)
    return place.without(*without) if without else place, there


# --- full --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", some("data", "report", slow=("teach", "sweep", "reference", "robustness", "export")))
def test_the_disk_fills_up_in_a_stage(stage: str, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, stage)
    there.leave(8)
    full = bench.run(place)
    assert "no space left" in full.err.lower(), full.err
    there.again("size=64m")
    assert bench.again(place, full) == THEN_SAME


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [4, 16, 64, 160, 320, 480, 640, 960, 1280, 1600, 1920, 2240, 2560, 2880])
def test_a_disk_of_a_size(kilobytes: int, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place = bench.cold(tmp_path / "place")
    there = disk(place.run, kilobytes * 1024)
    full = bench.run(place)
    assert full.code == 0 or "no space left" in full.err.lower(), full.err
    there.again("size=64m")
    assert bench.again(place, full) in (SAME, THEN_SAME)


@pytest.mark.parametrize("kilobytes", [8, 200])
def test_the_cache_s_disk_is_full(kilobytes: int, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without("load")
    there = disk(place.cache, kilobytes * 1024)
    full = bench.run(place)
    assert "UNLEARN_CACHE" in full.err, full.err
    there.again("size=64m")
    assert bench.again(place, full) == THEN_SAME


def test_the_disk_for_temporary_files_is_full(bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without("robustness")
    there = disk(place.root / "tmp", _PAGE)
    (there.place / "filling").write_bytes(b"x")
    full = bench.run(place)
    (there.place / "filling").unlink()
    there.again("size=64m")
    assert bench.again(place, full) in (SAME, THEN_SAME)


@pytest.mark.parametrize(("kilobytes", "stage"), [(2, "data"), (60, "teach")])
def test_files_may_not_grow(kilobytes: int, stage: str, bench: Bench, tmp_path: Path) -> None:
    """A limit on the size of files (ulimit -f), which needs no root."""
    place = bench.copy(tmp_path / "place").without(stage)
    limited = bench.run(place, largest=kilobytes * 1024)
    assert bench.again(place, limited) == THEN_SAME


# --- read-only ---------------------------------------------------------------------------------------------------


def test_a_finished_run_on_a_read_only_disk(bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk)
    there.again("ro")
    ended = bench.run(place)
    assert bench.verdict(place, ended) != WRONG
    assert facts(place.run) == bench.expected


def test_an_unfinished_run_on_a_read_only_disk(bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, "teach")
    there.again("ro")
    fault = bench.run(place)
    assert "Read-only" in fault.err
    there.again("rw")
    assert bench.again(place, fault) == THEN_SAME


@pytest.mark.parametrize("stage", some("test", slow=("data", "teach", "finetune", "robustness", "export", "report")))
def test_read_only_midway(stage: str, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, stage)
    plan = place.plan(1, match=of_stage(stage), action=there.read_only())
    fault = bench.run(place, plan=plan)
    assert fault.code == 2, fault.err
    there.gone(lazy=False)
    assert bench.again(place, fault) == THEN_SAME


# Writers that are not Python, or of other libraries, and have words of their own for what the file system says.
_WRITERS = {
    "weights of a checkpoint": ("teach", r"native .*checkpoint-2/model\.safetensors"),
    "optimiser of a checkpoint": ("teach", r"native .*checkpoint-2/optimizer\.pt"),
    "adapter of a checkpoint": ("finetune", r"native .*checkpoint-1/adapter_model\.safetensors"),
    "random state of a checkpoint": ("finetune", r"native .*checkpoint-1/rng_state\.pth"),
    "weights of the target": ("teach", r"native run/\.unlearn-tmp/target\.\*/model\.safetensors"),
    "tokenizer of the target": ("teach", r"native run/\.unlearn-tmp/target\.\*/tokenizer\.json"),
    "vector": ("finetune", r"opened .*/vectors\+forget.*/vector\.safetensors"),
    "samples of lm-eval": ("sweep", r"opened .*/samples_"),
    "adapter": ("export", r"native run/\.unlearn-tmp/export\+adapter\.\*/adapter_model"),
    "merged shard": ("export", r"native .*model-00002-of"),
}


_CASES = [(how, writer) for writer in _WRITERS for how in ("full", "read-only")]


# each kind of writer once, on a full disk or on one that is read-only by then; the slow suite has all
_FEW = (
    *(("full", writer) for writer in ("weights of a checkpoint", "vector", "adapter")),
    *(("read-only", writer) for writer in ("random state of a checkpoint", "samples of lm-eval", "merged shard")),
)


@pytest.mark.parametrize(("how", "writer"), some(*_FEW, slow=[case for case in _CASES if case not in _FEW]))
def test_what_a_writer_says(how: str, writer: str, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    stage, match = _WRITERS[writer]
    place, there = on_disk(bench, tmp_path / "place", disk, stage)
    there.again("size=16m")
    filling = place.run / ".filling"
    # a file that is open for writing stays so
    action = f"cat /dev/zero > {filling} || true" if how == "full" else there.read_only()
    at = match.replace("opened ", "open ") if how == "read-only" else match
    fault = bench.run(place, plan=place.plan(1, match=at, action=action))
    if how == "read-only":
        there.gone(lazy=False)
    filling.unlink(missing_ok=True)
    assert bench.again(place, fault) == THEN_SAME


def test_a_read_only_cache_is_enough_if_it_is_whole(bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, "teach", kept="cache")
    there.again("ro")
    assert bench.verdict(place, bench.run(place)) == SAME
    there.again("rw")
    place.without("teach")
    shutil.rmtree(next(place.cache.glob("pico-*")))
    there.again("ro")
    fault = bench.run(place)
    assert "UNLEARN_CACHE" in fault.err
    there.again("rw")
    assert bench.again(place, fault) == THEN_SAME


# --- vanished ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", some("load", slow=("data", "reference", "teach", "robustness", "export")))
def test_the_cache_s_disk_vanishes(stage: str, bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, "report" if stage == "load" else stage, kept="cache")
    if stage == "load":
        shutil.rmtree(next(place.cache.glob("pico-*")))
    at = 10 if stage == "load" else 1
    fault = bench.run(place, plan=place.plan(at, match=of_stage(stage), action=f"umount -l {there.place}"))
    assert bench.verdict(place, fault) in (SAME, MESSAGE), fault.err
    assert not there.place.is_mount(), "it did not come to that"
    there.mount(2**26)
    assert bench.again(place, fault) in (SAME, THEN_SAME)


@pytest.mark.parametrize("stage", some("teach", slow=("data", "reference")))
def test_the_cache_is_removed(stage: str, bench: Bench, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place").without(stage)
    fault = bench.run(place, plan=place.plan(1, match=of_stage(stage), action=f"gone:{place.cache}"))
    assert bench.again(place, fault) in (SAME, THEN_SAME)


def test_the_run_s_disk_vanishes(bench: Bench, disk: Disks, tmp_path: Path) -> None:
    place, there = on_disk(bench, tmp_path / "place", disk, "sweep")
    fault = bench.run(place, plan=place.plan(1, match=of_stage("sweep"), action=f"umount -l {there.place}"))
    assert bench.again(place, fault) in (SAME, THEN_SAME)
