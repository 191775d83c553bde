"""Scores through lm-eval: run its evaluator on tasks that are already built, and read and write what it reports.

What ``simple_evaluate`` adds to its result is added here in the same form, but the description of the machine (seconds
each time) is made once in a process, and no global random seed is set, because training goes on in this process.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import acc_all, mean
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_env_info, add_tokenizer_info
from lm_eval.models.utils import normalize_gen_kwargs

from unlearn.errors import BrokenModelError, EvaluationError, RunFolderError
from unlearn.recipe.schema import Key
from unlearn.results import Score, TaskScore
from unlearn.score.tasks import TaskInfo, TaskSet, environment, quiet_harness, random_state_kept
from unlearn.store.provenance import checkout
from unlearn.text import hide


def write_files(
    folder: Path,
    model_name: str,
    results: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
    seconds: float,
) -> Path:
    """Write ``<model name>/results_<time>.json`` and ``samples_<task>_<time>.jsonl``; returns the first.

    lm-eval's own tracker reports no failure, so the files are looked at.
    """
    tracker = EvaluationTracker(output_path=str(folder))
    general = tracker.general_config_tracker
    general.log_experiment_args("CUSTOM", {"pretrained": model_name}, None, None, False)
    general.start_time = time.perf_counter() - seconds
    own = {task: [dict(row) for row in rows] for task, rows in samples.items()}  # the tracker changes them
    with _complaints() as complaints:
        tracker.save_results_aggregated(results=dict(results), samples=own)
        if hasattr(tracker, "date_id"):
            for task, rows in own.items():
                tracker.save_results_samples(task_name=task, samples=cast("dict[str, Any]", rows))
    where = folder / str(general.model_name_sanitized)
    date = getattr(tracker, "date_id", "")
    path = where / f"results_{date}.json"
    counts = {where / f"samples_{task}_{date}.jsonl": len(rows) for task, rows in samples.items()}
    broken = [p.name for p, count in counts.items() if not p.is_file() or p.read_bytes().count(b"\n") != count]
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        broken.insert(0, path.name)
    if broken:
        why = f" ({'; '.join(complaints)})" if complaints else ""
        raise RunFolderError(
            f"lm-eval could not write {', '.join(broken)} in {where}{why}: check space and permissions"
        )
    return path


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect what lm-eval logs instead of raising."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.getMessage().startswith("Saving"):
                messages.append(record.getMessage())

    logger = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    handler, level, propagate = Collector(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


# -- standard errors beside lm-eval's

_FORMULAS: tuple[Callable[..., Any], ...] = (mean, acc_all)  # aggregations whose standard error lm-eval computes


def perplexity_stderr(items: Sequence[tuple[float, int]]) -> float:
    """Standard error of exp(total nll / total tokens) by the delta method, of ``(log-likelihood, tokens)`` pairs.

    The mean loss R = sum(nll)/sum(tokens), a ratio of two sums over passages, has the variance
    sum((nll - R tokens)^2) / (n - 1) / n / mean(tokens)^2 (Cochran, Sampling Techniques, section 6.3).
    """
    n = len(items)
    tokens = sum(t for _, t in items)
    loss = -sum(ll for ll, _ in items) / tokens
    spread = sum((-ll - loss * t) ** 2 for ll, t in items) / (n - 1)
    return math.exp(loss) * math.sqrt(spread / n) / (tokens / n)


@contextmanager
def formulas_only(tasks: Iterable[Task]) -> Iterator[None]:
    """Inside the ``with`` lm-eval resamples nothing for these tasks, and says no standard error where it would have.

    Its own switch (``bootstrap_iters=0``) leaves out those with a formula as well. It tells metrics to resample by
    their aggregating function, so here another function that computes the same stands for it.
    """
    changed = list(tasks)
    for task in changed:
        functions: Mapping[str, Callable[..., Any]] = task.aggregation()
        disguised = {name: f if f in _FORMULAS else partial(f) for name, f in functions.items()}
        task.aggregation = lambda disguised=disguised: disguised
    try:
        yield
    finally:
        for task in changed:
            del task.aggregation


# -- sampled texts that a seed decides


def seeded(lm: LM, tasks: Iterable[Task], seed: int) -> LM:
    """The same model to lm-eval's evaluator; where a task samples, its texts depend on seed and batch size alone.

    The global random state is left as it was. Without a task that samples this is ``lm`` itself.
    """
    settings = [t.get_config("generation_kwargs") for t in tasks if t.OUTPUT_TYPE == "generate_until"]
    return cast("LM", _Seeded(lm, seed)) if any(how is not None and _random(how) for how in settings) else lm


def _random(how: dict[str, Any]) -> bool:
    return bool(normalize_gen_kwargs(how)["do_sample"])


class _Seeded:
    """A model behind a seed. Everything but sampling is the model's own."""

    def __init__(self, lm: LM, seed: int) -> None:
        self._lm = lm
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        drawn = [request for request in requests if _random(request.args[1])]
        rest = [request for request in requests if not _random(request.args[1])]
        others = iter(self._lm.generate_until(rest) if rest else [])
        # Of several processes each draws all texts, past the dealing out of requests that hides the class's own method:
        # the share of one process would begin with the same random numbers as that of another.
        with random_state_kept():
            torch.manual_seed(self._seed)
            texts = iter(type(self._lm).generate_until(self._lm, drawn) if drawn else [])
        return [next(texts if _random(request.args[1]) else others) for request in requests]


# -- scores through lm-eval

_OF_A_CHOICE = ("acc", "acc_norm", "acc_pmi")
_NOT_METRICS = frozenset({"name", "alias", "sample_len", "sample_count"})


@dataclass(frozen=True)
class EvalResult:
    """Scores of one model, with lm-eval's results object and, apart, its records of every item by task."""

    scores: tuple[TaskScore, ...]
    samples: Mapping[str, list[dict[str, Any]]]
    results: Mapping[str, Any]
    info: Mapping[str, TaskInfo]
    model_name: str
    seconds: float

    def values(self) -> dict[Key, dict[int, tuple[float, float]]]:
        """Per metric and item number the item's share in the score: (value, 1), or (log-likelihood, tokens).

        Metrics of groups of tasks, and those that are not numbers per item, are left out.
        """
        found: dict[Key, dict[int, tuple[float, float]]] = {}
        for task, info in self.info.items():
            rows = self.samples.get(task, [])
            rows = [row for row in rows if row["filter"] == rows[0]["filter"]]  # of several filters the first counts
            for score in self.scores:
                if (score.set, score.name) == (info.set, info.name):
                    pairs = {int(row["doc_id"]): _pair(row.get(score.metric)) for row in rows}
                    whole = {item: pair for item, pair in pairs.items() if pair is not None}
                    if whole and len(whole) == len(pairs):
                        found[score.key] = whole
        return found

    def save(self, folder: Path) -> Path:
        """Write lm-eval's files (:func:`write_files`)."""
        return write_files(folder, self.model_name, self.results, self.samples, self.seconds)


def evaluate(lm: LM, tasks: TaskSet, *, model_name: str, bootstrap: int = 1000) -> EvalResult:
    """Score a model on tasks, as it is now; lm-eval's files (and their folder) name it ``model_name``.

    ``bootstrap`` is the number of resamples for standard errors without a formula; 0: do without those.
    """
    started, clock = time.time(), time.perf_counter()
    task_dict: Any = {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)}
    asked = seeded(lm, tasks.tasks.values(), tasks.seed)
    with quiet_harness(), nullcontext() if bootstrap else formulas_only(tasks.tasks.values()):
        raw = evaluator.evaluate(
            lm=asked, task_dict=task_dict, samples=dict(tasks.samples) or None, bootstrap_iters=bootstrap or 1
        )
        if raw is None:
            raise EvaluationError(
                "lm-eval has dealt out the items to several processes and given the scores to the main one: with "
                "unlearn.processes.share_requests(lm) all of them have the scores"
            )
        results = cast("dict[str, Any]", raw)
        samples: dict[str, list[dict[str, Any]]] = results.pop("samples")
        _require_finite(samples)
        scores = tuple(
            score for name, info in tasks.info.items() for score in _scores(name, info, results, samples, tasks)
        )
        for score in scores:
            if sum(score.key == other.key for other in scores) > 1:
                what = f"{score.metric} of {score.set} {score.name!r}"
                raise EvaluationError(f"{what} is scored twice: rename the set, or drop the task")
        results |= _header(lm, model_name, bootstrap, started)
    return EvalResult(scores, samples, results, tasks.info, model_name, time.perf_counter() - clock)


def _scores(
    name: str, info: TaskInfo, results: dict[str, Any], samples: Mapping[str, list[dict[str, Any]]], tasks: TaskSet
) -> Iterator[TaskScore]:
    row = results["results"][name]
    counted = results["n-samples"].get(name)
    n = int(counted["effective"] if counted else row.get("sample_len", 0))
    if n < 1:
        raise EvaluationError(f"{name}: no items were scored")
    keys = [key for key in row if key not in _NOT_METRICS and "_stderr," not in key]
    by_metric = {key.split(",")[0]: key for key in reversed(keys)}  # of several filters the first counts
    for metric in info.metrics or tuple(reversed(by_metric)):
        if metric not in by_metric:
            raise EvaluationError(f"{name} has no metric {metric!r}; it has {', '.join(reversed(by_metric)) or 'none'}")
        key = by_metric[metric]
        value = float(row[key])
        if not math.isfinite(value):
            raise BrokenModelError(f"{name}: {metric} is {value}, not a finite number: {_BROKEN}")
        stderr_key = f"{metric}_stderr,{key.split(',', 1)[1]}"
        if metric == "perplexity" and row.get(stderr_key) == "N/A" and name in samples:
            pairs = [sample[metric] for sample in samples[name]]
            row[stderr_key] = perplexity_stderr(pairs) if len(pairs) > 1 and isinstance(pairs[0], tuple) else "N/A"
        stderr = row.get(stderr_key)
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        higher = results["higher_is_better"].get(name, {}).get(metric)
        yield TaskScore(
            *(info.set, info.name, info.split, metric, True if higher is None else bool(higher)),
            Score(value, float(stderr) if known else None, n),
            _chance(name, samples, tasks) if metric in _OF_A_CHOICE else None,
        )


def _chance(name: str, samples: Mapping[str, list[dict[str, Any]]], tasks: TaskSet) -> float | None:
    """The accuracy of guessing, the mean of 1/choices over the items; None for what is no choice among answers."""
    members = [tasks.tasks[name]] if name in tasks.tasks else tasks.groups[name].get_all_tasks()
    under = [one for one, task in tasks.tasks.items() if any(task is member for member in members)]
    if any(tasks.tasks[one].OUTPUT_TYPE != "multiple_choice" for one in under):
        return None
    # more than once for each choice where a metric sets it against the answer without its question, or after others'
    asked = {one: 2 if "acc_mutual_info" in tasks.tasks[one].aggregation() else 1 for one in under}
    rows = [(row, asked[one]) for one in under for row in samples[one] if row["filter"] == samples[one][0]["filter"]]
    times = [count + len(row["doc"].get("others") or ()) for row, count in rows]
    return math.fsum(n / len(row["filtered_resps"]) for n, (row, _) in zip(times, rows, strict=True)) / len(rows)


_BROKEN = "the model is broken at this point; use smaller coefficients, or model.dtype float32"


def _require_finite(samples: Mapping[str, list[dict[str, Any]]]) -> None:
    """An argmax over NaN still is a number, so accuracies cannot be trusted to show a broken model."""
    for task, rows in samples.items():
        if not rows:
            raise EvaluationError(f"{task}: no items were scored")
        for row in rows:
            for response in row["filtered_resps"]:
                value = response[0] if isinstance(response, tuple | list) else response
                if isinstance(value, float) and not math.isfinite(value):
                    raise BrokenModelError(f"{task}, item {row['doc_id']}: log-likelihood {value}: {_BROKEN}")


def _pair(value: Any) -> tuple[float, float] | None:
    if isinstance(value, tuple | list) and len(value) == 2:
        return float(value[0]), float(value[1])
    return (float(value), 1.0) if isinstance(value, int | float) else None


def _header(lm: LM, model_name: str, bootstrap: int, started: float) -> dict[str, Any]:
    """What lm-eval's ``simple_evaluate`` adds to the scores."""
    info = lm.get_model_info() if hasattr(lm, "get_model_info") else {}
    unset = ("use_cache", "limit", "gen_kwargs", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
    header: dict[str, Any] = {
        "config": {
            "model": type(lm).__name__,
            "model_args": {"pretrained": model_name},
            **info,
            "batch_size": getattr(lm, "batch_size", None),
            "batch_sizes": list(getattr(lm, "batch_sizes", {}).values()),
            "device": str(getattr(lm, "device", "")) or None,
            "bootstrap_iters": bootstrap,
            **dict.fromkeys(unset),
        },
        "git_hash": (checkout() or {}).get("commit"),  # of this code; lm-eval takes that of the current folder
        "date": started,
        **_environment(),
    }
    add_tokenizer_info(header, lm)
    return header


@functools.cache
def _environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    # it asks pip by `python -m pip`, which would run a pip.py in the current folder
    with environment("PYTHONSAFEPATH", "1"):
        add_env_info(found)
    return {name: hide(value) if isinstance(value, str) else value for name, value in found.items()}
