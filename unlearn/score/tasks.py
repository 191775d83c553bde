"""lm-eval tasks for a recipe: its own data through the pack in ``eval/``, and by name what the pack and lm-eval have.

Tasks are built once and scored at every coefficient: requests are made the first time, for each choice of items, and
then handed to the model again, the same objects with their answers wiped.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm  # type: ignore[import-untyped]

from unlearn.data.chat import Chat
from unlearn.data.items import Messages
from unlearn.data.sets import MEMORY_TOKENS, LoadedSet, asked_back, at_prefixes, items_path, write_items
from unlearn.errors import EvaluationError
from unlearn.model.locate import no_foreign_code
from unlearn.recipe import schema
from unlearn.recipe.data import Split, stops
from unlearn.recipe.evaluation import TaskSpec, families, no_such_task, shipped_tasks, task_files, task_names
from unlearn.recipe.load import pack_module, tasks_folder
from unlearn.recipe.schema import RECITED, Key, Recipe
from unlearn.results import Role
from unlearn.store.cache import hub_away

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SHIPPED = shipped_tasks()


# -- lm-eval without what it says, and without a touch to anyone's random numbers


@contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval without its logs, progress bars and prints, in one process, the global random state left as it was."""
    # its bootstrap forks a pool; after torch has started threads, or CUDA, a forked child may hang
    pools = environment("DISABLE_MULTIPROC", "1")
    with pools, _no_bars(), random_state_kept(), errors_only("lm_eval"), redirect_stdout(io.StringIO()):
        yield


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Some loggers pass on errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore Python's, numpy's and torch's (CPU and GPU) global generators at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _no_bars() -> Iterator[None]:
    # lm-eval makes bars that cannot be turned off by argument or environment once tqdm is imported.
    original = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for the time being."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# -- tasks by name


def task_manager(
    names: Iterable[str] = (), paths: Sequence[str | Path] = (), metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """lm-eval's index of what lies below ``paths`` and of those of its own families that other names need.

    Its index of all its tasks takes ten seconds to read. ``names`` are tasks, groups or tags, perhaps with wildcards,
    YAML files and folders of them; ``metadata`` is what every task is told.
    """

    def index(folders: Iterable[Path]) -> TaskManager:  # of two roots the later one counts, as the first of one does
        where: list[str | Path] = [*sorted(folders, reverse=True), *paths]
        with errors_only("lm_eval.tasks._index"):
            built = TaskManager(include_defaults=False, include_path=where, metadata=dict(metadata or {}))
        for name, entry in built.task_index.items():  # a tag of several roots has only the last one's tasks so far
            for tag in entry.tags if entry.cfg is not None and "group" not in entry.cfg else ():
                if built.task_index[tag].yaml_path is None:
                    built.task_index[tag].tags.add(name)
        return built

    found, folders = index(()), set[Path]()
    names = set(names)
    files = {path for name in names for path in (Path(name), *Path(name).glob("*.yaml")) if path.is_file()}
    wanted = {name for name in names if not name.endswith(".yaml")}
    wanted |= {child for path in files for child in _children(load_yaml(path, resolve_func=False))}
    looked_for: set[str] = set()
    while missing := {name for name in _with_children(found, wanted) if not found.match_tasks([name])} - looked_for:
        looked_for |= missing
        folders |= families(SHIPPED, missing)
        found = index(folders)
    return found


def _with_children(index: TaskManager, names: Iterable[str]) -> set[str]:
    """The names, and what the groups among them have in them."""
    found: set[str] = set()
    todo = [*names]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            entries = [index.task_index[match] for match in index.match_tasks([name])]
            todo += [child for entry in entries for child in _children(entry.cfg or {})]
    return found


def _children(config: Mapping[str, Any]) -> list[str]:
    listed = config["task"] if isinstance(config.get("task"), list) else []
    named = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in listed]
    return [child for child in named if isinstance(child, str)]


def pack_config(name: str) -> dict[str, Any]:
    """A task of the pack as lm-eval reads it, with its functions."""
    config: dict[str, Any] = load_yaml(tasks_folder() / f"{name}.yaml")
    return config


@functools.cache
def _pack() -> TaskManager:
    return task_manager(paths=[tasks_folder()])


@dataclass(frozen=True)
class Named:
    """What one name in ``eval.tasks`` stands for, and the metrics that are reported, the one that counts first."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    metrics: tuple[str, ...]


def load(spec: TaskSpec, seed: int, tokenizer: str, chat: Chat | None = None) -> Named:
    """The task or group of a name in ``eval.tasks``, with all its data; ``seed`` draws few-shot examples.

    The pack's tasks are told the folder or name of the scored model's ``tokenizer``, unless that is empty, and ask
    TOFU's and MUSE's questions in ``chat``.
    """
    given = spec.model_dump(mode="json")["metadata"]
    ours = spec.task in _pack().task_index
    if ours:
        index = task_manager(paths=[tasks_folder()], metadata={"tokenizer": tokenizer} | given if tokenizer else given)
    else:
        index = task_manager([spec.task], metadata=given)
        if spec.task not in index.task_index:
            raise no_such_task(spec.task, {*_pack().all_tasks, *task_names(task_files(SHIPPED))})
    away = hub_away()
    try:
        with no_foreign_code(f"eval.tasks: {spec.task}"):
            loaded = index.load(spec.task)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError) as error:
        if ours and isinstance(error, ValueError):  # the pack's own words
            raise EvaluationError(f"eval.tasks: {spec.task}: {error}") from error
        why = f"lm-eval cannot load {spec.task!r} ({type(error).__name__}: {error})"
        if away and isinstance(error, ConnectionError):
            why = f"the data of {spec.task!r} are not on this machine, and {away}"
        cure = "Fill the cache where there is network and set HF_HOME, or take the task out of the recipe"
        raise EvaluationError(f"eval.tasks: {why}. {cure}") from error
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
    if ours and chat is not None:
        in_template(tasks, chat)
    for task in tasks.values():
        if spec.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # 0 in a task's own config is binding
            task.set_config("num_fewshot", spec.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return Named(tasks, groups, _metrics(spec, tasks, groups, ours))


def in_template(tasks: Mapping[str, Any], chat: Chat) -> None:
    """Have TOFU's and MUSE's questions asked in a chat template, with the tokens that training has there.

    The user says the question alone, after solved examples as turns of their own; scored with an answer, right or
    wrong, is what ends the assistant's turn, and a written one ends there. Tasks of passages stay as they are.
    """
    for name, task in tasks.items():
        asks, known = task.config.dataset_kwargs or {}, task.config.metadata or {}
        if asks.get("kind") not in ("prob", "rouge", "knowmem"):
            continue
        if known.get("tag", "prompt") != "prompt":
            raise EvaluationError(
                f"{name}: tag: scored scores the words 'Answer:', which are not there in a chat template: leave tag "
                "out, or set model.chat_template to none"
            )
        docs, solved = list(task.eval_docs), []
        if asks["kind"] == "knowmem":
            rows = pack_module("muse/muse_items").read_rows(**asks, muse=known.get("muse"), items=known.get("items"))
            _, questions, solved = rows
            docs = [{**doc, "question": row["question"]} for doc, row in zip(docs, questions, strict=True)]
        turns = [(("user", row["question"]), ("assistant", row["answer"])) for row in solved]
        before: Messages = tuple(itertools.chain.from_iterable(turns))
        made = [_in_turn(doc, f"{name}, item {doc['id']}", chat, before) for doc in docs]
        task.dataset = {task.config.test_split: Dataset.from_list(made)}
        joint, ending = made[0]["joint"], made[0]["ending"]
        if asks["kind"] == "prob":  # not in the pack's own files: finished scores are found by them
            task._start = joint
            task._end = task._end and (ending or task._end)  # empty where metadata want no end scored
        elif ending:
            how = task.config.generation_kwargs
            task.set_config("generation_kwargs", {**how, "until": [*how["until"], ending.strip()]})


def _in_turn(doc: Mapping[str, Any], place: str, chat: Chat, before: Messages) -> dict[str, Any]:
    """One of TOFU's or MUSE's items as it stands in the template; its answers without white space around them."""
    item = chat.asked(place, doc["question"], doc["target"], before)
    assert item.turn is not None
    answers: dict[str, Any] = {
        key: doc[key].strip() for key in ("target", "answer", "paraphrased_answer") if key in doc
    }
    if "perturbed_answer" in doc:
        answers["perturbed_answer"] = [answer.strip() for answer in doc["perturbed_answer"]]
    return {**doc, **answers, "prompt": item.prompt, "joint": item.turn.joint, "ending": item.turn.ending}


def _metrics(spec: TaskSpec, tasks: Mapping[str, Task], groups: Mapping[str, Group], ours: bool) -> tuple[str, ...]:
    """The metrics to report: of a task of the pack all, of one of lm-eval's or a group the one that counts."""
    if spec.task in tasks:
        found = list(tasks[spec.task].aggregation())
    else:
        found = [] if ours else [config.metric for config in groups[spec.task].aggregate_metric_list or ()]
        if not found:
            raise EvaluationError(
                f"eval.tasks: {spec.task!r} is a group without a score of its own; name its tasks: {', '.join(tasks)}"
            )
    if spec.metric not in found:
        known = ", ".join(dict.fromkeys(found))
        raise EvaluationError(f"eval.tasks: {spec.task} has no metric {spec.metric!r}; it has {known}")
    return (spec.metric, *(metric for metric in found if metric != spec.metric and ours))


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


@dataclass(frozen=True)
class TaskInfo:
    """What a task's scores stand for. ``metrics`` None: all of them count."""

    set: Role
    name: str
    split: Split
    metrics: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TaskSet:
    """Tasks to be scored together: what is reported of which, and the items used of tasks that are not used whole.

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
    """Keys of the scores that must stay within the bound, of those that ``built``, the tasks of the search, gives."""
    return schema.kept_metrics(recipe, {(info.set, info.name) for info in built.info.values()})


def build_tasks(
    sets: Sequence[LoadedSet],
    split: Split,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    generate: bool = False,
    chat: Chat | None = None,
) -> TaskSet:
    """Everything that is scored on one split; the items are written into ``folder`` for lm-eval.

    ``generate`` adds tasks for which the model must write text, which is too slow for a search. ``chat`` is where the
    tasks of benchmarks in ``eval.tasks`` are asked; the sets stand in it already.
    """
    if split == "test":
        sets = at_prefixes(asked_back(sets), tokenizer) if generate else asked_back(sets)
    write_items(sets, tokenizer, folder, (split,), (split,) if generate else ())
    tasks: dict[str, Task] = {}
    info: dict[str, TaskInfo] = {}
    # Reciting takes a request for each token: one row for a packed passage, but one row each for lm-eval's own model.
    searched = {recipe.choose.metric, *(recipe.choose.kept or ())}
    recite = generate or recipe.eval.engine == "packed" or not searched.isdisjoint(RECITED)
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
            named = load(spec, recipe.seed, str(getattr(tokenizer, "name_or_path", "")), chat)
            if spec.whole and split != "test":
                continue
            if not generate and any(task.OUTPUT_TYPE == "generate_until" for task in named.tasks.values()):
                continue
            _claim(spec.task, info)
            chosen = share(spec, named.tasks, split, recipe.seed)
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
        config = pack_config(pack_name)
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
    (task,) = _pack().load(config)["tasks"].values()
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
