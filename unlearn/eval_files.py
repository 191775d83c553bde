"""lm-eval's own files of one evaluation, written with lm-eval's own tracker."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lm_eval.loggers import EvaluationTracker

from unlearn.errors import RunFolderError


def write_files(
    folder: Path,
    model_name: str,
    results: Mapping[str, Any],
    samples: Mapping[str, list[dict[str, Any]]],
    seconds: float,
) -> Path:
    """Write ``<model name>/results_<time>.json`` and ``samples_<task>_<time>.jsonl``.

    Args:
        folder: Where.
        model_name: How the files name the model (and their folder).
        results: lm-eval's results object without samples.
        samples: Its per-item records by task.
        seconds: What the evaluation took.

    Returns:
        The results file.

    Raises:
        RunFolderError: a file is missing or short. The tracker itself reports no failure.
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
    broken = [p.name for p in (path,) if not _is_json(p)]
    broken += [p.name for p, count in counts.items() if _lines(p) != count]
    if broken:
        why = f" ({'; '.join(complaints)})" if complaints else ""
        raise RunFolderError(
            f"lm-eval could not write {', '.join(broken)} in {where}{why}: check space and permissions"
        )
    return path


@contextlib.contextmanager
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


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return -1
