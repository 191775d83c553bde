"""lm-eval tasks for a recipe: its own data through the pack in ``eval/``, and by name what the pack and lm-eval have.

Tasks are built once and scored at every coefficient: requests are made the first time, for each choice of items, and
then handed to the model again, the same objects with their answers wiped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks._yaml_loader import load_yaml

from unlearn import metrics, named_tasks
from unlearn.assets import tasks_folder
from unlearn.data import LoadedSet
from unlearn.errors import EvaluationError
from unlearn.item_files import MEMORY_TOKENS, at_prefixes, items_path, write_items
from unlearn.metrics import RECITED, Key
from unlearn.recipe import Recipe, Split
from unlearn.report import Role
from unlearn.silence import quiet_harness
from unlearn.template import stops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TaskInfo:
    """What a task's scores stand for. ``metrics`` None: all of them count."""

    set: Role
    name: str
    split: Split
    metrics: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskSet:
    """Tasks to be scored together.

    ``info`` names every task or group that is reported; ``samples`` the items used of tasks that are not used whole;
    ``seed`` decides the texts of tasks that sample.
    """

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    info: Mapping[str, TaskInfo]
    samples: Mapping[str, list[int]]
    seed: int = 0

    def digest(self) -> str:
        """SHA-256 of what is asked and how it is scored: names, settings, items. Where files lie is no part of it."""
        whole = hashlib.sha256(_json([{n: asdict(i) for n, i in self.info.items()}, self.samples, self.seed]))
        for name, task in sorted(self.tasks.items()):
            settings = {key: value for key, value in task.dump_config().items() if key != "metadata"}  # paths
            shown = task.fewshot_docs() if settings.get("num_fewshot") else ()
            whole.update(_json([name, settings]))
            for doc in (*task.eval_docs, *shown):
                whole.update(_json(doc))
        for name, group in sorted(self.groups.items()):
            whole.update(_json([name, group.child_names, [asdict(m) for m in group.aggregate_metric_list or ()]]))
        return whole.hexdigest()


def kept_metrics(recipe: Recipe, built: TaskSet) -> tuple[Key, ...]:
    """Keys of the scores that must stay within the bound, of what ``built``, the tasks of the search, does score.

    That leaves out sets without validation items, tasks that are test items as a whole, and tasks that need generation:
    reported, but not searched on.
    """
    scored = {(info.set, info.name) for info in built.info.values()}
    return tuple(key for key in metrics.kept_metrics(recipe) if key[:2] in scored)


def build_tasks(
    sets: Sequence[LoadedSet],
    split: Split,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    generate: bool = False,
) -> TaskSet:
    """Everything that is scored on one split.

    Args:
        sets: The recipe's data.
        split: ``validation`` or ``test``.
        recipe: For tasks by name, the engine and the seed.
        tokenizer: The scored model's, for token counts.
        folder: Where the items are written (see :func:`unlearn.item_files.write_items`).
        generate: Also tasks for which the model must write text; too slow for a search.

    Raises:
        EvaluationError: no items in a set that needs some, two tasks of one name, a task that cannot be had.
    """
    if generate and split == "test":
        sets = at_prefixes(sets, tokenizer)
    write_items(sets, tokenizer, folder, (split,), (split,) if generate else ())
    tasks: dict[str, Task] = {}
    info: dict[str, TaskInfo] = {}
    # Reciting takes a request for each token: one row for a packed passage, but one row each for lm-eval's own model.
    recite = generate or recipe.eval.engine == "packed" or recipe.choose.metric in RECITED
    with quiet_harness():
        for loaded in sets:
            if loaded.role == "term" or loaded.role == "holdout" or not _has_items(loaded, split):
                continue
            for name, config in _configs(loaded, split, items_path(folder, loaded, split), generate, recite):
                _claim(name, info)
                tasks[name] = _build(config, recipe.seed)
                info[name] = TaskInfo(loaded.role, loaded.name, split)
        groups: dict[str, Group] = {}
        samples: dict[str, list[int]] = {}
        for spec in recipe.eval.tasks:  # built even where they are not scored: what is missing shows before the search
            named = named_tasks.load(spec, recipe.seed, str(getattr(tokenizer, "name_or_path", "")))
            if spec.whole and split != "test":
                continue
            if not generate and any(task.OUTPUT_TYPE == "generate_until" for task in named.tasks.values()):
                continue
            _claim(spec.task, info)
            chosen = named_tasks.share(spec, named.tasks, split, recipe.seed)
            for name in named.tasks:
                if name in tasks:
                    raise EvaluationError(f"eval.tasks: {spec.task} has the task {name}, which is there already")
                if name in chosen:
                    tasks[name] = _reusing(named.tasks[name])
                else:
                    for group in named.groups.values():
                        group.pop(name)
            samples |= chosen
            groups |= named.groups
            info[spec.task] = TaskInfo(spec.set, spec.task, split, named.metrics)
    if not info:
        raise EvaluationError(f"there is nothing to score on the {split} items")
    return TaskSet(tasks, groups, info, samples, recipe.seed)


def _has_items(loaded: LoadedSet, split: Split) -> bool:
    if getattr(loaded, split):
        return True
    wanted = loaded.role in ("forget", "learn")
    if not wanted and getattr(loaded.spec, split) is None and getattr(loaded.spec.shares, split) == 0:
        return False  # the recipe says so: a set that is only trained on, or only reported
    raise EvaluationError(
        f"{loaded.role} set {loaded.name!r} has no {split} items: raise shares.{split}, add rows, "
        f"or give a file under {split}"
    )


def _json(value: Any) -> bytes:
    """Canonical JSON; what has no JSON form by its text, without addresses in memory."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return re.sub(r" at 0x[0-9a-f]+", "", text).encode()


def _claim(name: str, taken: Mapping[str, TaskInfo]) -> None:
    if name in taken:
        raise EvaluationError(f"two tasks are called {name!r}: rename a set, or name an lm-eval task once")


def _configs(
    loaded: LoadedSet, split: Split, items: Path, generate: bool, recite: bool
) -> list[tuple[str, dict[str, Any]]]:
    """``(task name, lm-eval config)`` of every pack task that applies to a set."""
    kind, base = loaded.spec.kind, f"{loaded.role}.{loaded.name}"
    wanted = [(base, f"unlearn_{kind}")]
    if kind == "text" and recite:
        wanted.append((f"{base}.memory", "unlearn_text_memory"))
    if kind != "mcq" and generate:
        wanted.append((f"{base}.rouge", f"unlearn_{kind}_rouge"))
    configs = []
    for name, pack_name in wanted:
        config = load_yaml(tasks_folder() / f"{pack_name}.yaml")
        config["task"] = name
        config["metadata"] = {**config["metadata"], "pack_task": pack_name, "items": str(items)}
        if "memory_tokens" in config["metadata"]:
            config["metadata"]["memory_tokens"] = MEMORY_TOKENS
        if "generation_kwargs" in config:
            until = stops(loaded.spec.prompts(split)[0]) if kind == "qa" else []
            how = {"max_gen_toks": loaded.spec.continuation, "until": until}
            config["generation_kwargs"] = {**config["generation_kwargs"], **how}
        configs.append((name, config))
    return configs


def _build(config: dict[str, Any], seed: int) -> Task:
    (task,) = named_tasks.manager(shipped=False).load(config)["tasks"].values()
    task.set_fewshot_seed(seed)
    return _reusing(task)


def _reusing(task: Task) -> Task:
    """Make the requests of each choice of items once; lm-eval would build them again at every coefficient."""
    build: Callable[..., None] = task.build_all_requests
    made: list[tuple[dict[str, Any], list[Instance]]] = []

    def build_once(**how: Any) -> None:
        known = next((instances for made_for, instances in made if made_for == how), None)
        if known is None:
            build(**how)
            made.append((how, task.instances))
        else:
            task._instances = known
        for instance in task.instances:  # new lists: the last result's samples still hold the old ones
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = build_once
    return task
