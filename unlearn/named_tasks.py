"""Tasks that a recipe names: those of the pack in ``eval/``, and those that lm-eval ships."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from unlearn.assets import tasks_folder
from unlearn.checks import no_such_task
from unlearn.errors import EvaluationError
from unlearn.hub import hub_away, no_foreign_code
from unlearn.recipe import Split, TaskSpec


@functools.cache
def manager(shipped: bool) -> TaskManager:
    """lm-eval's index of its own tasks (``shipped``), or of the pack; read once."""
    return TaskManager(include_defaults=shipped, include_path=None if shipped else str(tasks_folder()))


@dataclass(frozen=True)
class Named:
    """What one name in ``eval.tasks`` stands for, and the metrics that are reported."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    metrics: tuple[str, ...]


def load(spec: TaskSpec, seed: int, tokenizer: str) -> Named:
    """The task or group of a name, with all its data.

    Args:
        spec: From ``eval.tasks``.
        seed: For few-shot examples.
        tokenizer: Folder or name of the scored model's tokenizer, which the pack's tasks are told; empty if not known.

    Raises:
        EvaluationError: there is no such task, its data cannot be had, it has no such metric, or it runs what a model
            writes.
        ModelError: it was to run code that comes with a tokenizer.
    """
    # the pack first: lm-eval's own index has 14,000 tasks, and reading it takes seconds
    index, ours = manager(shipped=False), True
    if spec.task not in index.task_index:
        pack, index, ours = index, manager(shipped=True), False
        if spec.task not in index.task_index:
            raise no_such_task(spec.task, {*index.all_tasks, *pack.all_tasks})
    given = spec.model_dump(mode="json")["metadata"]
    if ours and tokenizer:
        given = {"tokenizer": tokenizer, **given}  # some count tokens
    away = hub_away()
    try:
        with no_foreign_code(f"eval.tasks: {spec.task}"):
            loaded = _telling(index, given).load(spec.task)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError) as error:
        if ours and isinstance(error, ValueError):  # the pack's own words
            raise EvaluationError(f"eval.tasks: {spec.task}: {error}") from error
        if away and isinstance(error, ConnectionError):
            raise EvaluationError(
                f"eval.tasks: the data of {spec.task!r} are not on this machine, and {away}. Fill the cache where "
                "there is network and set HF_HOME, or take the task out of the recipe"
            ) from error
        raise EvaluationError(
            f"eval.tasks: lm-eval cannot load {spec.task!r} ({type(error).__name__}: {error}). Its data come from the "
            f"hub: fill the cache where there is network and set HF_HOME, or take the task out of the recipe"
        ) from error
    tasks, groups = dict(loaded["tasks"]), dict(loaded.get("groups") or {})
    if spec.task not in tasks and spec.task not in groups:
        raise EvaluationError(
            f"eval.tasks: {spec.task!r} is a tag for {len(tasks)} tasks; name them: {', '.join(tasks)}"
        )
    if any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
        raise EvaluationError(
            f"eval.tasks: {spec.task} runs the program text that a model writes, which is not done here: take it out "
            "of the recipe, and run it apart with lm-eval's --confirm_run_unsafe_code"
        )
    for task in tasks.values():
        if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 in a task's own config is binding
            task.set_config("num_fewshot", spec.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return Named(tasks, groups, _pack_metrics(spec, tasks) if ours else (_shipped_metric(spec, tasks, groups),))


def _telling(index: TaskManager, metadata: Mapping[str, Any]) -> TaskManager:
    """The same index, its tasks told the metadata. Anew, the index would be read again."""
    if not metadata:
        return index
    other = copy.copy(index)
    other.metadata = dict(metadata)
    other._factory = TaskFactory(meta=dict(metadata))
    return other


def _pack_metrics(spec: TaskSpec, tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """All metrics of a task of the pack, the one that counts first."""
    if spec.task not in tasks:
        raise EvaluationError(
            f"eval.tasks: {spec.task!r} is a group without a score of its own; name its tasks: {', '.join(tasks)}"
        )
    found = list(tasks[spec.task].aggregation())
    if spec.metric not in found:
        raise EvaluationError(f"eval.tasks: {spec.task} has no metric {spec.metric!r}; it has {', '.join(found)}")
    return (spec.metric, *(metric for metric in found if metric != spec.metric))


def _shipped_metric(spec: TaskSpec, tasks: Mapping[str, Task], groups: Mapping[str, Group]) -> str:
    """The metric that counts of one of lm-eval's own tasks, or of a group of them.

    Raises:
        EvaluationError: it has none of that name, which lm-eval would find out when all is scored.
    """
    if spec.task in groups:
        aggregated = groups[spec.task].aggregate_metric_list or ()
        found = list(dict.fromkeys(config.metric for config in aggregated))
        if not found:
            raise EvaluationError(
                f"eval.tasks: {spec.task!r} is a group without a score of its own; name its tasks: {', '.join(tasks)}"
            )
    else:
        found = list(tasks[spec.task].aggregation())
    if spec.metric not in found:
        raise EvaluationError(f"eval.tasks: {spec.task} has no metric {spec.metric!r}; it has {', '.join(found)}")
    return spec.metric


def share(spec: TaskSpec, tasks: Mapping[str, Task], split: Split, seed: int) -> dict[str, list[int]]:
    """Item numbers of one half, validation or test, ascending; the seed deals them out, over all tasks of a group."""
    pool = [(name, index) for name, task in tasks.items() for index in range(len(task.eval_docs))]
    random.Random(f"{seed} {spec.task}").shuffle(pool)
    middle = 0 if spec.whole else len(pool) // 2
    half = pool[:middle] if split == "validation" else pool[middle:]
    chosen: dict[str, list[int]] = {}
    for name, index in half[: spec.limit]:
        chosen.setdefault(name, []).append(index)
    if not chosen:
        raise EvaluationError(
            f"eval.tasks: {spec.task} has {len(pool)} items: too few for validation and test; whole: true makes them "
            "test items"
        )
    return {name: sorted(indices) for name, indices in chosen.items()}
