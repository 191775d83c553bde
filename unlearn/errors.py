"""Mistakes a user can mend. Anything else that is raised is a bug of ours and keeps its traceback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {"bitsandbytes": "quant", "gguf": "gguf", "submitit": "cluster", "detoxify": "toxicity", "wandb": "wandb"}


def absent(package: str) -> str:
    """How to get an optional package that is not installed; empty where it is."""
    if importlib.util.find_spec(package) is not None:
        return ""
    extra = f" (the extra [{_EXTRAS[package]}] has it)" if package in _EXTRAS else ""
    return f"pip install {package}{extra}"


class UnlearnError(Exception):
    """A problem with a plain cause: the command line prints the message and exits with code 2.

    The message says what is wrong, where (file, line, key), and what to do about it.
    """


@contextmanager
def prefixed(place: str, kind: type[UnlearnError]) -> Iterator[None]:
    """Mistakes of a kind that are met inside the ``with`` begin with their place: a key, a set, a file."""
    try:
        yield
    except kind as error:
        raise type(error)(f"{place}: {error}") from error


class RecipeError(UnlearnError):
    """One or more mistakes in a recipe, reported together."""


class DataError(UnlearnError):
    """Rows that cannot become examples: unreadable, empty, missing columns, overlapping sets."""


class ModelError(UnlearnError):
    """A model or tokenizer that cannot be fetched, opened or used."""


class VectorError(UnlearnError):
    """A task vector that is malformed or does not fit the model it is put on."""


class TrainingError(UnlearnError):
    """Fine-tuning that went wrong: non-finite loss, nothing to learn from."""


class EvaluationError(UnlearnError):
    """A score that cannot be computed, or would be computed on nothing."""


class BrokenModelError(EvaluationError):
    """Scores that are no numbers: the model no longer works where they were taken."""


class RunFolderError(UnlearnError):
    """A run folder that belongs to another recipe, is damaged, or cannot be written."""


class GridError(UnlearnError):
    """A grid of jobs that cannot be made, read, or submitted."""
