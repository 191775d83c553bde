"""The run folder of a recipe: where it is, and whether what lies there is a run of the same recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn.errors import RunFolderError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.load import resolved_yaml
from unlearn.recipe.schema import Recipe
from unlearn.store.files import fingerprint
from unlearn.store.stages import RunFolder


def open_run(root: Path | None, recipe: Recipe, text: str, fresh: bool = False, base: Path = Path("runs")) -> RunFolder:
    """Make or reopen the folder of a recipe and take its lock (:meth:`unlearn.store.stages.RunFolder.open`).

    Args:
        root: The folder itself (``--out``); None for ``base/<recipe name>-<first 8 hex of its fingerprint>``.
        recipe: With every default filled in; decides whether an existing folder is this run's.
        text: The recipe as the user wrote it.
        fresh: Remove what an earlier run left here, of whatever recipe.
        base: Where folders without a name of their own go.
    """
    what = recipe.model_dump(mode="json", exclude={"cluster"})  # what a batch system gives is no part of a run
    place = root if root is not None else base / f"{recipe.name}-{fingerprint(what)[:8]}"
    return RunFolder.open(place, resolved_yaml(recipe), text, require_same_recipe, fresh)


# The same run, another way of going about it: what is finished is used again.
_MAY_CHANGE = frozenset({"sweep.search"})
_NEVER_MATTERS = "cluster"  # where it runs


def require_same_recipe(place: Path, resolved: str) -> None:
    """Compare the folder's ``resolved.yaml`` with ``resolved``.

    A key that the older file does not have counts as today's default: it was written before there was such a key. A key
    that only the older file has was written by a newer version, and is a difference.

    Raises:
        RunFolderError: they differ (the first five keys are named), or the file cannot be read.
    """
    try:
        old = yaml_core.parse((place / "resolved.yaml").read_text(encoding="utf-8")).data
    except (yaml_core.YamlSyntaxError, UnicodeDecodeError) as e:
        raise RunFolderError(
            f"{place / 'resolved.yaml'} cannot be read any more, so it is unclear whose run this is: "
            "use another --out, or --fresh to start over"
        ) from e
    new = yaml_core.parse(resolved).data
    there, here, usual = _leaves(old), _leaves(new), _leaves(_by_default(new, old))
    absent = object()
    differs = [k for k in dict.fromkeys([*here, *there]) if here.get(k, absent) != there.get(k, usual.get(k, absent))]
    differs = [k for k in differs if k not in _MAY_CHANGE and re.split(r"[.\[]", k)[0] != _NEVER_MATTERS]
    if differs:
        lines = [f"  {k}: {_short(there, k)} there, {_short(here, k)} here" for k in differs[:5]]
        more = [f"  and {len(differs) - 5} more"] if len(differs) > 5 else []
        raise RunFolderError(
            f"{place} holds a run of another recipe:\n"
            + "\n".join([*lines, *more])
            + "\nUse another --out, or --fresh to remove that run and start over"
        )


def _by_default(new: Any, old: Any) -> Any:
    """The recipe ``new`` with today's defaults for the keys that ``old`` lacks; empty when one of them has none."""
    if not isinstance(old, dict):
        return {}
    try:
        return Recipe.model_validate_json(json.dumps(_shared(new, old))).model_dump(mode="json")
    except ValidationError:
        return {}


def _shared(new: Any, old: Any) -> Any:
    if isinstance(new, dict) and isinstance(old, dict):
        return {k: _shared(v, old[k]) for k, v in new.items() if k in old}
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [_shared(a, b) for a, b in zip(new, old, strict=True)]
    # of what the older file has in another form, no key was left out
    return old if isinstance(new, dict | list) else new


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """``{"a": [{"b": [1, 2]}]}`` as ``{"a[0].b": [1, 2]}``: what a person would call one setting each."""
    if isinstance(value, dict) and value:
        return {k: v for n, x in value.items() for k, v in _leaves(x, f"{key}.{n}" if key else str(n)).items()}
    if isinstance(value, list) and any(isinstance(x, dict) for x in value):
        return {k: v for i, x in enumerate(value) for k, v in _leaves(x, f"{key}[{i}]").items()}
    return {key: value}


def _short(leaves: dict[str, Any], key: str) -> str:
    text = repr(leaves[key]) if key in leaves else "not set"
    return text if len(text) <= 60 else text[:57] + "..."
