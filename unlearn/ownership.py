"""Whose a folder is: a run's, another run's, or somebody else's, of which nothing is ever removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn import yaml_core
from unlearn.atomic import some, unique
from unlearn.errors import RunFolderError
from unlearn.lock_file import is_lock_file
from unlearn.recipe import Recipe
from unlearn.stage import STAGE_FILE, strangers_in

LOCK, TEMPORARY, WORK = ".unlearn-lock", ".unlearn-tmp", ".unlearn-work"
_FILES = frozenset({"recipe.yaml", "resolved.yaml", "provenance.json", "report.json", "report.html"})
_HALF_WRITTEN = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def remove_leftovers(root: Path) -> None:
    """Remove what a killed run left half written. Only for the holder of the lock."""
    shutil.rmtree(root / TEMPORARY, ignore_errors=True)
    for child in root.iterdir():
        if _HALF_WRITTEN.fullmatch(child.name):
            child.unlink()


def refuse_strangers(place: Path) -> None:
    """A place may be used if it is new, empty, a run's folder, or what a kill left before it became one.

    Raises:
        RunFolderError: it is anything else.
    """
    if not place.exists() and not place.is_symlink():
        return
    if not place.is_dir():
        raise RunFolderError(f"{place} is not a folder: choose another --out")
    names = {p.name for p in place.iterdir()}  # looked at once: a run may be starting in it right now
    others = [name for name in names if name not in (TEMPORARY, WORK) and not _passing(name)]
    if others and "resolved.yaml" not in names:
        raise RunFolderError(
            f"{place} is not empty and not the folder of a run (it holds {some(sorted(others))}): choose another --out"
        )


def refuse_links(root: Path) -> None:
    """A run makes no links: one that somebody put into its folder would have it write, or remove, elsewhere.

    Raises:
        RunFolderError: there is a link in the folder.
    """
    links = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        links += [str((here / n).relative_to(root)) for n in (*subfolders, *names) if (here / n).is_symlink()]
    if links:
        raise RunFolderError(
            f"{root} holds links, and a run makes none: {some(sorted(links))}. Remove them, or use another --out"
        )


def _passing(name: str) -> bool:
    """Files beside a run's own that come and go: of its lock, and half written."""
    return is_lock_file(name, LOCK) or _HALF_WRITTEN.fullmatch(name) is not None


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


def clear(root: Path) -> None:
    """Remove what runs wrote here. Only for the holder of the lock, which stays.

    Raises:
        RunFolderError: something else lies here too; nothing is removed then.
    """
    stages = [Path(d) for d, _, names in os.walk(root) if STAGE_FILE in names]
    ours = {root / n for n in _FILES}
    strangers = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        if here == root:
            subfolders[:] = [s for s in subfolders if s not in (TEMPORARY, WORK)]
        if here in stages:
            strangers += strangers_in(here, root)
            subfolders[:] = []
            continue
        links = [s for s in subfolders if (here / s).is_symlink()]
        files = [here / n for n in (*names, *links)]
        files = [p for p in files if p not in ours and not (here == root and _passing(p.name))]
        strangers += [str(p.relative_to(root)) for p in files]
    if strangers:
        raise RunFolderError(
            f"{root}: --fresh removes only what a run wrote, and these are not of a run: {some(sorted(strangers))}. "
            "Move them elsewhere, or use another --out"
        )
    # out of the way by renaming, which is atomic, and the file that makes this a run's folder last: after a kill in
    # the middle the folder is still one that may be used
    heap = root / TEMPORARY
    heap.mkdir(exist_ok=True)
    for child in sorted(root.iterdir(), key=lambda p: p.name == "resolved.yaml"):
        if child.name != TEMPORARY and not is_lock_file(child.name, LOCK):
            child.rename(heap / f"{child.name}.{unique()}")
    shutil.rmtree(heap, ignore_errors=True)


def _short(leaves: dict[str, Any], key: str) -> str:
    text = repr(leaves[key]) if key in leaves else "not set"
    return text if len(text) <= 60 else text[:57] + "..."
