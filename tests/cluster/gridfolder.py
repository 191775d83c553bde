"""Folders of grids as their jobs leave them, written by hand."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from unlearn.cluster.job import JobState, Submission, now
from unlearn.cluster.plan import FrozenRecipe, Grid, Job
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.lock import started


def make(root: Path, count: int, prepared: bool = True, count_prepared: int = 1) -> Grid:
    """A grid folder whose jobs were never run; its recipe is none."""
    first = [Job(f"p{n:03}-g", 0, (), {}, prepare=True) for n in range(count_prepared if prepared else 0)]
    jobs = [
        Job(f"{n:04}-seed={n}", 0, (), {"seed": str(n)}, first[n % len(first)].name if first else None)
        for n in range(count)
    ]
    recipe = FrozenRecipe("g", str(root / "g.yaml"), "name: g\n")
    grid = Grid("g", str(root), (recipe,), tuple(first), tuple(jobs), ClusterSpec.model_validate({}))
    grid.save(root)
    return grid


def dead() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        pass
    return child.pid


def say(root: Path, name: str, state: Any, pid: int | None = None, attempt: int = 1, **more: Any) -> JobState:
    """Write a job's state, as the job would."""
    mine = os.getpid() if pid is None else pid
    facts = {"host": platform.node(), "started": started(mine), "since": now(), **more}
    said = JobState(state, attempt, mine, **facts)
    said.save(root, name)
    return said


def finish(root: Path, job: Job, report: Mapping[str, Any] | None = None) -> None:
    """A sealed report."""
    folder = job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report or {"schema": 1})
    (folder / "report.json").write_text(text)
    (folder / "provenance.json").write_text(json.dumps({"report_sha256": hashlib.sha256(text.encode()).hexdigest()}))


def submitted(
    root: Path,
    jobs: Sequence[str],
    kind: Literal["slurm", "local"] = "slurm",
    name: str = "g-0a1b",
    one: Submission | None = None,
    **more: Any,
) -> Submission:
    """Note a submission to Slurm that is over, or one that this process runs itself; or another one."""
    since = started(os.getpid()) if kind == "local" else ""
    mine = Submission(kind, name, tuple(jobs), now(), os.getpid(), platform.node(), since)
    found = one or replace(mine, **more)
    path = root / "submissions.json"
    old = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*(o for o in old if o["name"] != found.name), asdict(found)]))
    return found
