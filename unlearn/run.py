"""``python -m unlearn.run --recipe R``: the command line, and :func:`run` for Python.

Nothing here imports torch before a run really starts, so that ``--help``, ``--list``, ``--schema`` and ``--dry-run``
answer at once.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unlearn import console
from unlearn.errors import RecipeError, UnlearnError
from unlearn.store.files import unwritable

if TYPE_CHECKING:
    from unlearn.recipe.schema import Recipe
    from unlearn.results import RunReport

EXIT_MISTAKE = 2  # the user can mend it
EXIT_INTERRUPTED = 130


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
    from unlearn.pipeline import execute
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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, and turn what went wrong into one message and an exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _dispatch(arguments)
    except UnlearnError as e:
        console.say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        console.say("\nstopped; what is finished is kept, and the same command goes on from there", style="yellow")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as e:
        said = unwritable(e)
        if said is None:
            raise
        console.say(f"error: {said.strerror} ({e}): make room, or choose a disk that can be written", style="red")
        return EXIT_MISTAKE


def _dispatch(arguments: argparse.Namespace) -> int:
    from unlearn.recipe import load as recipe_io

    if arguments.schema:
        print(json.dumps(recipe_io.json_schema(), indent=2))
        return 0
    if arguments.list:
        for name, description in recipe_io.list_recipes():
            print(f"{name:24}{description}")
        return 0
    if not arguments.recipe:
        raise UnlearnError("which recipe? Give --recipe FILE, or --list to see those that come with the program")
    if arguments.memory and not arguments.dry_run:
        raise UnlearnError("--memory is a part of the plan: give --dry-run as well")
    if arguments.dry_run:
        from unlearn.plan import plan

        loaded = recipe_io.load_recipe(arguments.recipe, arguments.set)
        print(plan(loaded))
        if arguments.memory:
            from unlearn.console import quiet_libraries

            quiet_libraries()  # before they are imported
            from unlearn.memory import memory

            print(memory(loaded))
        return 0
    options = {"out": arguments.out, "fresh": arguments.fresh, "pool": arguments.pool, "prepare": arguments.prepare}
    report = run(arguments.recipe, set=arguments.set, **options)
    return 0 if report is None or report.chosen.bound_met or not arguments.strict else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unlearn",
        description="Make a language model forget: LoRA on a forget set, task vector, theta - coefficient * vector, "
        "scored through lm-eval.",
        epilog="Example: unlearn --recipe quickstart.yaml --set seed=1. Exit codes: 0 done, 1 nothing passed the rule "
        "(with --strict), 2 a mistake to mend, 130 interrupted.",
    )
    parser.add_argument("--recipe", metavar="FILE", help="a recipe, or the name of one that comes with the program")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one key (sweep.coefficients=[1,2])"
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/<name>-<fingerprint>)")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument(
        "--pool", metavar="DIR", help="share taught models and fitted vectors with the runs that name it"
    )
    parser.add_argument("--prepare", action="store_true", help="make only what other runs can share from --pool")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when no coefficient passes the rule")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, run nothing")
    parser.add_argument("--memory", action="store_true", help="with --dry-run: bytes that every stage holds, at most")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes")
    parser.add_argument("--list", action="store_true", help="list the recipes that come with the program")
    return parser


def _stop(number: int, frame: Any) -> None:
    """SIGTERM is taken like Ctrl-C, once: locks and temporary folders are cleaned up.

    A batch system sends it to every process, and torchrun to all as soon as the first of them has ended.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


class _CallableModule(ModuleType):
    """``unlearn.run`` is this module and, by ``from unlearn import run``, the function; calling either works."""

    def __call__(self, *args: Any, **kwargs: Any) -> RunReport | None:
        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
