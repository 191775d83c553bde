"""One YAML file to one :class:`~unlearn.recipe.Recipe` and back, with every mistake reported at once.

A message reads ``file.yaml:LINE: key.path: what is wrong``; what came from the command line reads
``--set key.path: ...`` instead. Importing this costs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn import yaml_core
from unlearn.assets import recipes_folder
from unlearn.errors import RecipeError, UnlearnError
from unlearn.overrides import Overrides
from unlearn.recipe import Recipe
from unlearn.recipe_check import Mistake, mistakes, nearest, semantic_mistakes
from unlearn.yaml_core import Document, KeyPath, YamlSyntaxError

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A checked recipe, the file it came from (absolute), and that file's text as written.

    Relative paths in the recipe are relative to ``source.parent``.
    """

    recipe: Recipe
    source: Path
    text: str


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), text: str | None = None) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: a file; or a bare name, with or without ``.yaml``, meaning the file in the current folder, else
            the packaged recipe.
        overrides: ``key.path=value``, the value in YAML; list items by index (``retain.0.path=x.json``). Paths in
            them are as seen from the current folder: ``model.path`` and the ``path`` of a data set (or of its
            ``validation`` and ``test``) become absolute when such a file exists there. Otherwise they are left as
            they are, and so count from the recipe's folder like those written in the file.
        text: what the file said at another time, read in its place; ``name_or_path`` is then its absolute path.

    Raises:
        RecipeError: there is no such file, or it holds mistakes; the message lists all of them.
    """
    source = Path(name_or_path) if text is not None else _find(name_or_path)
    text = _read(source) if text is None else text
    shown = _shown(source)
    try:
        document = _parsed(text)
    except YamlSyntaxError as error:
        raise RecipeError(f"{shown}:{error.line}: {error}") from None
    if not isinstance(document.data, dict) and not document.problems:
        raise RecipeError(f"{shown}:1: {_not_a_mapping(document.data)}")
    return LoadedRecipe(_check(document, overrides, shown), source, text)


def from_recipe(recipe: Recipe) -> LoadedRecipe:
    """A recipe made in Python; its relative paths start from the current folder."""
    return LoadedRecipe(recipe, Path.cwd() / f"{recipe.name}.yaml", resolved_yaml(recipe))


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in; reads back to an equal recipe."""
    return yaml_core.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lm-unlearn recipe",
    }


def list_recipes() -> tuple[tuple[str, str], ...]:
    """``(file name, first line of its description)`` of every packaged recipe; a broken one says so in its line."""
    return tuple((path.name, _description(path)) for path in _packaged())


@lru_cache(maxsize=16)
def _parsed(text: str) -> Document:
    """A grid reads one text a thousand times. Overrides go on a copy of it."""
    return yaml_core.parse(text)


def _find(name: str) -> Path:
    """The file that ``name`` means, absolute."""
    here = Path.cwd()
    bare = name not in ("", "..") and Path(name).name == name
    names = (name,) if name.endswith(_SUFFIXES) else (name, *(name + suffix for suffix in _SUFFIXES))
    places = [here / n for n in names if n]
    if bare:
        places += [packaged for n in names for packaged in _packaged() if packaged.name == n]
    for place in places:
        if _is(place.is_file):
            return place
    if name and _is((here / name).is_dir):
        raise RecipeError(f"{name} is a folder; --recipe takes one YAML file{_inside(Path(name))}")
    packaged = [path.name for path in _packaged()]
    guess = nearest(name, packaged) or nearest(name + ".yaml", packaged)
    meant = f"; did you mean '{guess}'?" if guess else ""
    known = f" (packaged recipes: {', '.join(packaged)})" if packaged else ""
    raise RecipeError(f"there is no recipe {name!r}{' in ' + str(here) if bare else ''}{meant}{known}")


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a name too long for the file system, a folder that may not be looked into
        return False


def _inside(folder: Path) -> str:
    try:
        found = sorted(path.name for path in folder.iterdir() if path.name.endswith(_SUFFIXES))
    except OSError:
        return ""
    return f" (in it: {', '.join(found[:10])})" if found else ""


def _packaged() -> list[Path]:
    try:
        folder = recipes_folder()
    except UnlearnError:  # a recipe given by path needs no packaged ones
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def _read(source: Path) -> str:
    shown = _shown(source)
    try:
        size = source.stat().st_size
        if size > _MAX_BYTES:
            raise RecipeError(f"{shown}: {size:,} bytes is too large for a recipe; is it a data file?")
        raw = source.read_bytes()
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{shown}:{line}: this is not UTF-8 text; save the file as UTF-8") from None


def _shown(source: Path) -> str:
    """The path as a person would type it."""
    relative = os.path.relpath(source)
    return str(source) if relative.startswith("..") else relative


def _not_a_mapping(data: Any) -> str:
    if data is None:
        return "the file is empty; a recipe needs at least name, model and forget"
    kind = "a list" if isinstance(data, list) else "a single value"
    return f"expected 'key: value' lines (name, model, forget, ...) at the top, found {kind}"


def _check(document: Document, overrides: Sequence[str], shown: str) -> Recipe:
    changed = Overrides(document.data if isinstance(document.data, dict) else {}, overrides, Path.cwd())
    unread = {problem.path for problem in document.problems}
    recipe, found = _validate(changed.data)
    found = [m for m in found if not any(m.path[: len(p)] == p for p in unread) or _origin(m.path, changed)]
    lines: list[tuple[float, str]] = [
        (problem.line, f"{shown}:{problem.line}: {_join(problem.path)}{problem.text}") for problem in document.problems
    ]
    lines += [(float("inf"), f"{flag}: {mistake.text}") for flag, mistake in changed.mistakes]
    lines += [_placed(mistake, document, changed, shown) for mistake in found]
    if lines:
        messages = [text for _, text in sorted(lines, key=lambda pair: pair[0])]
        if len(messages) == 1:
            raise RecipeError(messages[0])
        raise RecipeError("\n  ".join([f"{len(messages)} mistakes in the recipe:", *messages]))
    assert recipe is not None  # no mistakes: it validated
    return recipe


def _validate(data: dict[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    extra = semantic_mistakes(data)
    try:
        return Recipe.model_validate_json(json.dumps(data)), extra
    except ValidationError as error:
        typed = mistakes(error, data)
        seen = {mistake.path for mistake in typed}
        return None, [*typed, *(mistake for mistake in extra if mistake.path not in seen)]


def _placed(mistake: Mistake, document: Document, changed: Overrides, shown: str) -> tuple[float, str]:
    """(sort key, message) of a mistake, at the line or the flag nearest to it."""
    flag = _origin(mistake.path, changed)
    if flag:
        key = "" if flag == f"--set {_join(mistake.path)}".removesuffix(": ") else _join(mistake.path)
        return float("inf"), f"{flag}: {key}{mistake.text}"
    line = _line(mistake, document)
    below = sorted({flag for place, flag in changed.origin.items() if place[: len(mistake.path)] == mistake.path})
    also = f" (with {', '.join(below)})" if below and mistake.path else ""
    return line, f"{shown}:{line}: {_join(mistake.path)}{mistake.text}{also}"


def _origin(path: KeyPath, changed: Overrides) -> str | None:
    """The override that a place came from: its own, or that of the nearest mapping around it."""
    for end in range(len(path), 0, -1):
        if path[:end] in changed.origin:
            return changed.origin[path[:end]]
    return None


def _line(mistake: Mistake, document: Document) -> int:
    """Line of the key. A mistake about a whole mapping goes to the first of its keys that the message names."""
    for word in mistake.text.split() if mistake.whole else ():
        named = (*mistake.path, *word.strip("(.,:;)").split("."))
        if named in document.lines:
            return document.lines[named]
    for end in range(len(mistake.path), -1, -1):
        if mistake.path[:end] in document.lines:
            return document.lines[mistake.path[:end]]
    return 1


def _join(path: KeyPath) -> str:
    return ".".join(str(key) for key in path) + ": " if path else ""


def _description(path: Path) -> str:
    try:
        data = yaml_core.parse(_read(path)).data
    except (RecipeError, YamlSyntaxError) as error:
        return f"(cannot be read: {str(error).splitlines()[0]})"
    text = data.get("description") if isinstance(data, dict) else None
    return text.strip().splitlines()[0] if isinstance(text, str) and text.strip() else ""
