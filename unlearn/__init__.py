"""Make a language model forget: task vectors, subtracted, scored and reported.

:func:`run` runs a recipe; ``fit``, ``shape``, ``subtracted``, ``sweep``, ``evaluate`` and ``save_adapter``
(:mod:`unlearn.api`) work on a model in memory. Names are loaded when they are used, so ``import unlearn`` is cheap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearn.api import Sweep, evaluate, fit, save_adapter, shape, sweep
    from unlearn.recipe.methods import register_method
    from unlearn.recipe.schema import Recipe
    from unlearn.results import RunReport
    from unlearn.vector.edit import subtracted
    from unlearn.vector.task_vector import TaskVector

__all__ = [
    "Recipe",
    "RunReport",
    "Sweep",
    "TaskVector",
    "evaluate",
    "fit",
    "register_method",
    "run",
    "save_adapter",
    "shape",
    "subtracted",
    "sweep",
]
_PLACES = {
    **dict.fromkeys(("Sweep", "evaluate", "fit", "save_adapter", "shape", "sweep"), "api"),
    "subtracted": "vector.edit",
    "Recipe": "recipe.schema",
    "RunReport": "results",
    "TaskVector": "vector.task_vector",
    "register_method": "recipe.methods",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lm-unlearn")
    if name in _PLACES:
        return getattr(import_module(f"unlearn.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'unlearn' has no attribute {name!r}")


def run(
    recipe: str | Path | Recipe,
    *,
    set: Sequence[str] | Mapping[str, Any] = (),  # noqa: A002 - the flag's name
    out: str | Path | None = None,
    fresh: bool = False,
    pool: str | Path | None = None,
    prepare: bool = False,
) -> RunReport | None:
    """Run a recipe, or go on where an earlier run of it was cut off; read the report if nothing is left to do.

    Args:
        recipe: A recipe's path or packaged name, or a :class:`Recipe` (relative data paths then start from the
            current folder).
        set: Overrides as on the command line (``["seed=1"]``) or as a mapping (``{"seed": 1}``).
        out: The run's folder; ``runs/<name>-<fingerprint>`` when not given.
        fresh: Start over, removing what earlier runs left in the folder.
        pool: A folder where runs share what is the same in them: taught models, references, fitted vectors.
        prepare: Make only what other runs can share, and return None.

    Returns:
        The report; None on every process but the main one of several.

    Raises:
        UnlearnError: a mistake in the recipe, its data or its surroundings.
    """
    from unlearn.errors import RecipeError
    from unlearn.execute import execute
    from unlearn.recipe.load import from_recipe, load_recipe

    overrides = [f"{k}={json.dumps(v)}" for k, v in set.items()] if isinstance(set, Mapping) else list(set)
    if isinstance(recipe, str | Path):
        loaded = load_recipe(str(recipe), overrides)
    elif overrides:
        raise RecipeError("set= changes a recipe file; change the Recipe itself with recipe.model_copy(update=...)")
    else:
        loaded = from_recipe(recipe)
    where, shared = (Path(p) if p is not None else None for p in (out, pool))
    return execute(loaded, where, fresh, pool=shared, prepare=prepare)
