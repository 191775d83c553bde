"""Make a language model forget: task vectors, subtracted, scored and reported.

``from unlearn import Recipe, TaskVector, run``. Names are loaded when they are used, so ``import unlearn`` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.recipe.schema import Recipe
    from unlearn.results import RunReport
    from unlearn.run import run
    from unlearn.vector.task_vector import TaskVector

__all__ = ["Recipe", "RunReport", "TaskVector", "run"]
_HOMES = {"Recipe": "recipe.schema", "RunReport": "results", "TaskVector": "vector.task_vector"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "run":
        # also the module behind `python -m unlearn.run`, which importing it binds to this name; that one is callable
        return import_module("unlearn.run").run
    if name in _HOMES:
        return getattr(import_module(f"unlearn.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unlearn' has no attribute {name!r}")
