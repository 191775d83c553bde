"""lm-eval's own command line with the packed model in it: ``unlearn harness --model unlearn ...``.

From Python, importing this module is enough: ``lm_eval.simple_evaluate(model="unlearn", ...)`` then knows the name.
lm-eval looks for no plugins, so it has to be imported by somebody.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lm_eval.models
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import model_registry
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from unlearn import processes as distributed
from unlearn.console import is_main_process
from unlearn.errors import EvaluationError
from unlearn.processes import told
from unlearn.store.cache import hub_away

MODEL = "unlearn"
_PROGRAM = "unlearn harness"
_NOTE = f"""
--model {MODEL} scores causal language models as --model hf does, in less time. It takes hf's --model_args, and
batch_tokens=N for the number of tokens in a forward pass.
"""


def register() -> None:
    """Make the model known to lm-eval as ``unlearn``; again does nothing. It is imported when it is first used."""
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="unlearn.score.packed:PackedLM")


register()


def main(argv: Sequence[str]) -> None:
    """Run lm-eval's command line, by all processes together where there are several."""
    setup_logging(logging.INFO if is_main_process() else logging.ERROR)
    before = sys.argv
    sys.argv = [before[0], *argv]  # where lm-eval reads, and writes to
    try:
        with told(MODEL, "lower batch_tokens or max_length in --model_args, or --batch_size"):
            _run(HarnessCLI())
    except ConnectionError as e:
        if not (away := hub_away()):
            raise
        raise EvaluationError(f"the data of the tasks are not all on this machine, and {away}") from e
    finally:
        sys.argv = before
    distributed.leave()


def _run(cli: HarnessCLI) -> None:
    with _under_our_name():
        arguments = cli.parse_args()
        if arguments.command is None:
            cli.execute(arguments)  # prints the help
            return
    if arguments.command != "run":
        cli.execute(arguments)
        return
    given = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
    given |= {key: value for key, value in vars(arguments).items() if value}
    _check_caches(given)
    hub_away()  # looked into before the tasks are: their data are then looked for on this machine alone
    distributed.join()
    with _small_index(given.get("tasks") or ()):
        if is_main_process():
            cli.execute(arguments)
            return
        # all processes have the results; lm-eval would have them written once on each machine
        arguments.hf_hub_log_args = arguments.wandb_args = arguments.trackio_args = None
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments.output_path = folder
            cli.execute(arguments)


@contextlib.contextmanager
def _small_index(given: Any) -> Iterator[None]:
    """lm-eval's command line reads the index of all its tasks; here it gets that of the tasks that are named."""
    import lm_eval.evaluator
    import lm_eval.tasks

    from unlearn.score.tasks import task_manager

    listed = [given] if isinstance(given, str) else given
    names = [name for text in listed if isinstance(text, str) for name in text.split(",")]
    names += ["*"] if not all(isinstance(text, str) for text in listed) else []  # a task written out may name any
    original = lm_eval.tasks.TaskManager

    def index(include_path: Any = None, metadata: Any = None) -> lm_eval.tasks.TaskManager:
        paths = include_path if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        return task_manager(names, paths, metadata)

    lm_eval.tasks.TaskManager = index
    try:
        yield
    finally:
        lm_eval.tasks.TaskManager = original


def _check_caches(given: Mapping[str, Any]) -> None:
    """Refuse lm-eval's caches where what they keep would be taken for something else's."""
    if given.get("use_cache") and given.get("model") != MODEL:
        raise EvaluationError(
            f"--use_cache: lm-eval keeps answers by their texts alone and would give one model's for another's; "
            f"--model {MODEL} keeps them by model"
        )
    if given.get("cache_requests") and given.get("metadata"):
        raise EvaluationError(
            "--cache_requests: lm-eval keeps requests by the task's name alone, so those of other --metadata would be "
            "taken for these: leave one of the two out"
        )


@contextlib.contextmanager
def _under_our_name() -> Iterator[None]:
    """Help and usage call the program by the name it has here: as ``lm-eval`` it would not know the model."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        for text, stream in ((out.getvalue(), sys.stdout), (err.getvalue(), sys.stderr)):
            stream.write(re.sub(r"\blm-eval\b", _PROGRAM, text))
        if "--model" in out.getvalue():
            sys.stdout.write(_NOTE)
