"""What every stage shares: a key of all it depends on, a folder that is whole or absent, its announcement, its time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from unlearn import references
from unlearn.atomic import some
from unlearn.console import is_main_process, say
from unlearn.data import LoadedSet
from unlearn.distributed import wait
from unlearn.errors import RunFolderError
from unlearn.memory import told
from unlearn.models import numbers, place
from unlearn.pool import Pool, link_tree
from unlearn.provenance import surroundings, tidy
from unlearn.recipe import Recipe
from unlearn.rundir import RunFolder, fingerprint
from unlearn.stage import STAGE_FILE, damage_of, read_record

STAGES = (
    *("load", "data", "teach", "finetune", "balance", "foresee", "sweep", "test"),
    *("reference", "benchmark", "membership", "robustness", "export"),
)

_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"
# What makes a stage need less memory: the recipe's keys.
LESS = {
    "load": "choose a smaller model",
    "finetune": "shape the vector by fewer of vector.method's steps",
    "balance": _SCORING,
    "foresee": "set vector.correlation to null, which leaves the foresight out",
    "sweep": _SCORING,
    "test": _SCORING,
    "reference": f"{_SCORING}, or leave reference out",
    "benchmark": f"{_SCORING}, or leave benchmark out",
    "membership": "leave holdout out, and with it membership inference",
    "robustness": "set robustness to null",
    "export": "set export.merged to false: the adapter alone needs no whole weights",
}


def less_training(key: str) -> str:
    """The same for a training, by the recipe's key."""
    return (
        f"lower {key}.batch_size (and raise {key}.accumulation by as much) or {key}.max_length, or set "
        f"{key}.gradient_checkpointing to true"
    )


def digests(sets: Iterable[LoadedSet]) -> list[list[str]]:
    """What scores depend on: all sets but the held-out one, which is never scored."""
    return [[s.role, s.name, s.digest] for s in sets if s.role != "holdout"]


def written(sets: Iterable[LoadedSet]) -> list[list[Any]]:
    """What texts that a model writes for the sets depend on: how long they get, and by the prompt where they end."""
    return [[s.role, s.name, s.spec.continuation, s.spec.prompts("test")[0]] for s in sets if s.role != "holdout"]


class Stages:
    """The stages of one run, made or reused.

    ``stages`` collects the key of every stage, ``seconds`` what each took (also when it took it in an earlier run).
    """

    def __init__(self, recipe: Recipe, base: Path, folder: RunFolder, pool: Pool | None = None) -> None:
        self.recipe = recipe
        self.base = base
        self.folder = folder
        self.pool = pool
        self.stages: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._surroundings = [surroundings(), numbers(place(recipe.model.device))]

    def key(self, name: str, parts: Sequence[Any]) -> str:
        """The key of a stage that depends on ``parts``."""
        return fingerprint(self._surroundings, name, *parts)

    def make(
        self,
        name: str,
        parts: Sequence[Any],
        make: Callable[[Path], object],
        kind: str = "",
        *,
        share: bool = False,
    ) -> None:
        """Make a stage unless it is there already under the same key.

        ``kind`` stands for the name in the key, where stages of several names may hold one thing. ``share`` puts it
        into the pool, for other runs that would make the same.
        """
        key = self.key(kind or name, parts)
        self.stages[name] = key
        done = self.folder.finished(name, key)
        wait()  # nobody may look for a stage that another process is writing
        if done is not None:
            say(f"    {name}: as before", style="dim")
            return
        pool = self.pool if share else None
        with pool.making(key) if pool is not None else nullcontext() as lock:
            wait()  # the main process has its turn: from here on the pool does not change under this key
            pooled = pool.find(key) if pool is not None else None
            found = pooled or self._elsewhere(key)
            with self.folder.writing(name, key) as tmp:
                if found is None:
                    make(tmp)
                elif is_main_process() and found == pooled:
                    link_tree(found, tmp, frozenset({STAGE_FILE}))
                elif is_main_process():  # another run's folder is its owner's: nothing is shared with it
                    _copy_stage(found, tmp)
            wait()
            if pool is not None and pooled is None and lock is not None:
                pool.put(key, self.folder.path(name), lock)
        if found is not None:
            say(f"    {name}: taken from {tidy(str(found))}", style="dim")

    def _elsewhere(self, key: str) -> Path | None:
        """A whole and undamaged stage of this key in one of the run folders that the recipe lets us take from.

        Raises:
            RunFolderError: one of them is not there.
        """
        for given in self.recipe.reuse:
            root = self.base / given
            if not root.is_dir():
                raise RunFolderError(f"reuse: there is no run folder {root}; remove it from the recipe")
            for seal in sorted(root.rglob(STAGE_FILE)):
                record = read_record(seal.parent)
                if record is not None and record.key == key and not damage_of(seal.parent, record, "sha256"):
                    return seal.parent
        return None

    @contextmanager
    def announced(self, stage: str, what: str) -> Iterator[None]:
        """Say which stage begins, and what it took, in this run or in the one that made it."""
        absent = {
            "teach": self.recipe.teach is None,
            "balance": len(self.recipe.goals()) < 2,
            "foresee": self.recipe.vector.correlation is None or self.recipe.forget is None,
            "reference": not references.is_model(self.recipe),
            "benchmark": self.recipe.benchmark is None,
            "membership": self.recipe.holdout is None,
            "robustness": self.recipe.robustness is None,
        }
        stages = [s for s in STAGES if not absent.get(s)]
        say(f"[{stages.index(stage) + 1}/{len(stages)}] {stage}: {what}", style="bold")
        before = set(self.stages)
        started = time.monotonic()
        with told(stage, LESS.get(stage, "lower limit of the largest sets")):
            yield
        took = time.monotonic() - started
        say(f"    {took:.1f} s", style="dim")
        made = [r.seconds for n in set(self.stages) - before if (r := self.folder.record(n)) is not None]
        self.seconds[stage] = round(max(took, sum(made)), 2)


def _copy_stage(found: Path, to: Path) -> None:
    """Copy what a stage's seal lists. Whatever else lies there, links above all, is not of the stage.

    Raises:
        RunFolderError: a file of the stage is a link, or its name leads out of the stage's folder.
    """
    record = read_record(found)
    for name in record.files if record is not None else ():
        source = found / name
        if not source.resolve().is_relative_to(found.resolve()) or source.is_symlink() or ".." in Path(name).parts:
            raise RunFolderError(f"reuse: {found} is no stage that a run made: {some([name])} leads out of it")
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, to / name)
