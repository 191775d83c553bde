"""What can be known to be wrong before anything is fetched, loaded or trained: names, files, folders. No torch here.

A plan and a run make the same checks, so that a recipe whose plan is printed does not fail hours later over a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from unlearn.data.chat import template_path
from unlearn.data.files import HUB, read_placed
from unlearn.data.items import columns_needed, refusals
from unlearn.errors import DataError, EvaluationError, ModelError, RunFolderError, absent
from unlearn.evidence import reference as references
from unlearn.model.locate import check_reach as check_reach_of
from unlearn.model.locate import model_place, said_of, vector_place
from unlearn.recipe.data import SPLITS, DataSet, SetRole, Source
from unlearn.recipe.evaluation import TaskSpec, no_such_task, shipped_tasks, task_files, task_names, unheard_of
from unlearn.recipe.load import tasks_folder
from unlearn.recipe.schema import Recipe, goal_metrics, kept_metrics
from unlearn.store.cache import check_data


def check(recipe: Recipe, base: Path, *, hub: bool = False) -> None:
    """Look for all that a recipe in the folder ``base`` names beside its data sets and its model.

    ``hub``: also ask the hub for a benchmark's data.
    """
    goal_metrics(recipe)  # these two refuse metrics that these data do not have
    kept_metrics(recipe)
    template_path(recipe.model, base)
    _check_reuse(recipe, base)
    _check_brought(recipe, base)
    if recipe.vector.uses("idk_dpo"):
        refusals(recipe.vector.settings("idk_dpo").refusals, base)
    _check_bitsandbytes(recipe)
    _check_trackers(recipe)
    _check_tasks(recipe.eval.tasks)
    references.check(recipe, base, hub=hub)


def check_reach(recipe: Recipe, base: Path) -> None:
    """Ask, if a recipe names anything on the hub that nobody here has, whether the hub can be reached at all."""
    check_reach_of(recipe.model, base)
    references.check_reach(recipe, base)
    sources = [s for _, data in recipe.sets() for s in (data, data.validation, data.test) if s is not None]
    check_data(s.path.removeprefix(HUB) for s in sources if s.path.startswith(HUB))


def read_local(sets: Iterable[tuple[SetRole, DataSet]], base: Path) -> None:
    """Read what of some sets is on this machine, as it will be read once the model is there to cut it into tokens."""
    for role, spec in sets:
        own: dict[str, Source] = {"train": spec, "validation": spec.validation or spec, "test": spec.test or spec}
        for source in {id(s): s for s in own.values()}.values():
            if source.path.startswith(HUB):
                continue
            templates = [t for split in SPLITS if own[split] is source for t in spec.prompts(split)]
            try:
                read_placed(source, base, partial(columns_needed, spec, tuple(dict.fromkeys(templates))))
            except DataError as error:
                raise DataError(f"{role} set '{spec.label()}': {error}") from error


def _check_reuse(recipe: Recipe, base: Path) -> None:
    for given in recipe.reuse:
        if not (base / given).is_dir():
            near = references.did_you_mean(given, base)
            raise RunFolderError(f"reuse: there is no run folder {base / given}{near or '; remove it from the recipe'}")


def _check_brought(recipe: Recipe, base: Path) -> None:
    """The models and the vector that the recipe's vector is made with, where it names them."""
    clean, given = recipe.vector.clean(), recipe.vector.given()
    named = [clean] if clean is not None else []
    if given is not None:
        named += [("vector.from.base", given.base), ("vector.from.finetuned", given.finetuned)]
    for key, path in named:
        if path is not None:
            with said_of(key):
                model_place(recipe.model.other(path), base)
    if given is not None and given.path is not None:
        with said_of("vector.from"):
            vector_place(recipe.model.other(given.path, given.revision), base, fetch=False)


def _check_bitsandbytes(recipe: Recipe) -> None:
    copies = recipe.robustness is not None and bool(recipe.robustness.quantize)
    if (copies or recipe.model.quantize != "none") and (cure := absent("bitsandbytes")):
        key, instead = ("robustness.quantize", "[]") if copies else ("model.quantize", "none")
        raise ModelError(f"{key}: quantised copies need the package bitsandbytes: {cure}, or set {key} to {instead}")


def _check_trackers(recipe: Recipe) -> None:
    for name in recipe.report_to:
        if cure := absent(name):
            raise EvaluationError(f"report_to: {name} is not installed: {cure}, or leave it out")


def _check_tasks(specs: Sequence[TaskSpec]) -> None:
    """Whether tasks by name are there, without lm-eval's index, which takes many seconds to build."""
    pack = set(task_names(task_files(tasks_folder()))) if specs else set()
    others = [spec.task for spec in specs if spec.task not in pack]
    shipped = task_files(shipped_tasks()) if others else []
    for name in unheard_of(shipped, others):
        raise no_such_task(name, {*pack, *task_names(shipped)})
    for spec in specs:
        if spec.task in pack:
            _check_files(spec)


def _check_files(spec: TaskSpec) -> None:
    """What a task of the pack reads: files of items, folders of benchmarks."""
    for key, exists in (("items", Path.is_file), ("tofu", Path.is_dir), ("muse", Path.is_dir)):
        given = spec.metadata.get(key)
        for path in given.values() if isinstance(given, dict) else (given,):
            if isinstance(path, str) and not exists(Path(path).expanduser()):
                near = references.did_you_mean(path, Path())
                kind = "file" if key == "items" else "folder"
                raise EvaluationError(f"eval.tasks: {spec.task}: metadata {key}: there is no {kind} {path}{near}")
