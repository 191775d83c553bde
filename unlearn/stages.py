"""What every stage shares: a key of all it depends on, a folder that is whole or absent, its announcement, its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlearn.console import say
from unlearn.distributed import wait
from unlearn.provenance import LIBRARIES, versions
from unlearn.recipe import Recipe
from unlearn.rundir import RunFolder, fingerprint

STAGES = ("load", "data", "teach", "finetune", "sweep", "test", "export")


class Stages:
    """The stages of one run, made or reused.

    ``stages`` collects the key of every stage, ``seconds`` what each took (also when it took it in an earlier run).
    """

    def __init__(self, recipe: Recipe, base: Path, folder: RunFolder) -> None:
        self.recipe = recipe
        self.base = base
        self.folder = folder
        self.stages: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._libraries = versions(LIBRARIES)

    def key(self, name: str, parts: Sequence[Any]) -> str:
        """The key of a stage that depends on ``parts``."""
        return fingerprint(self._libraries, name, *parts)

    def make(self, name: str, parts: Sequence[Any], make: Callable[[Path], object]) -> None:
        """Make a stage unless it is there already under the same key."""
        key = self.key(name, parts)
        self.stages[name] = key
        done = self.folder.finished(name, key)
        wait()  # nobody may look for a stage that another process is writing
        if done is None:
            with self.folder.writing(name, key) as tmp:
                make(tmp)
            wait()
        else:
            say(f"    {name}: as before", style="dim")

    @contextmanager
    def announced(self, stage: str, what: str) -> Iterator[None]:
        """Say which stage begins, and what it took, in this run or in the one that made it."""
        stages = [s for s in STAGES if s != "teach" or self.recipe.teach is not None]
        say(f"[{stages.index(stage) + 1}/{len(stages)}] {stage}: {what}", style="bold")
        before = set(self.stages)
        started = time.monotonic()
        yield
        took = time.monotonic() - started
        say(f"    {took:.1f} s", style="dim")
        made = [r.seconds for n in set(self.stages) - before if (r := self.folder.record(n)) is not None]
        self.seconds[stage] = round(max(took, sum(made)), 2)
