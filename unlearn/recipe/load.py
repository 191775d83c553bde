"""One YAML file to one :class:`~unlearn.recipe.schema.Recipe` and back, with every mistake reported at once.

A message reads ``file.yaml:LINE: key.path: what is wrong``; what came from the command line reads
``--set key.path: ...`` instead. Importing this costs no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from unlearn.errors import RecipeError, UnlearnError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.data import template_fields
from unlearn.recipe.schema import Recipe
from unlearn.recipe.yaml import Document, KeyPath, YamlSyntaxError, parse_value, scalar_of
from unlearn.text import is_secret

PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "text of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    r"^(auto|cpu|mps|cuda(:\d+)?)$": "one of auto, cpu, mps, cuda, or cuda:NUMBER",
    r"^\d+(\.\d+)?[KMGT]B$": "a size such as 500MB or 5GB",
    r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$": "a time such as 4:00:00 (hours) or 1-12:00:00 (days and hours)",
    r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$": "a name on the hub, OWNER/NAME",
}


class Alternative(NamedTuple):
    """One alternative of a field: its type and its constraints."""

    type: Any
    limits: tuple[Any, ...] = ()


def alternatives(annotation: Any, limits: tuple[Any, ...] = ()) -> tuple[Alternative, ...]:
    """Take unions and ``Annotated`` apart."""
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            limits += tuple(item.metadata) if isinstance(item, FieldInfo) else (item,)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in alternatives(member, limits))
    return (Alternative(annotation, limits),)


def is_model(kind: Any) -> bool:
    """Whether a type is one of the recipe's sections."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def fields(kinds: Sequence[Alternative]) -> dict[str, FieldInfo]:
    """The keys that a mapping of one of these alternatives may have."""
    return {name: info for kind in kinds if is_model(kind.type) for name, info in kind.type.model_fields.items()}


def below(kinds: Sequence[Alternative], key: str | int) -> tuple[Alternative, ...] | None:
    """The alternatives of what lies at ``key``; None where no alternative has such a key."""
    known = fields(kinds)
    if key in known:
        info = known[str(key)]
        return alternatives(info.annotation, tuple(info.metadata))
    for kind in kinds:
        origin = get_origin(kind.type)
        if origin is dict and isinstance(key, str):
            return alternatives(get_args(kind.type)[1])
        if origin is tuple and isinstance(key, int):
            return alternatives(get_args(kind.type)[0])
    return None


def alternatives_at(path: KeyPath) -> tuple[Alternative, ...]:
    """What a recipe may hold at ``path``; empty where it may hold nothing."""
    kinds: tuple[Alternative, ...] = (Alternative(Recipe),)
    for key in path:
        kinds = below(kinds, key) or ()
    return kinds


def homes(key: str, model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place in the schema where ``key`` is a field."""
    for name, info in model.model_fields.items():
        if name == key:
            yield (*path, name)
        for kind in alternatives(info.annotation):
            many = get_origin(kind.type) is tuple
            inner = get_args(kind.type)[0] if many else kind.type
            if is_model(inner):
                yield from homes(key, inner, (*path, name, "0") if many else (*path, name))


def words(kinds: Sequence[Alternative]) -> str:
    """What a field takes, as the object of "expected"."""
    parts = list(dict.fromkeys(_describe(kind) for kind in kinds if kind.type is not type(None)))
    if len(kinds) > len(parts) and any(kind.type is type(None) for kind in kinds):
        parts.append("null")
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _describe(kind: Alternative) -> str:
    origin = get_origin(kind.type)
    if origin is Literal:
        values = [str(value) for value in get_args(kind.type)]
        return f"'{values[0]}'" if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is tuple:
        least = next((m.min_length for m in kind.limits if getattr(m, "min_length", None)), 0)
        inner = get_args(kind.type)[0]
        item = "a mapping" if is_model(inner) else words(alternatives(inner))
        return f"a list{f' with at least {least} item' if least else ''} (each: {item})"
    if origin is dict:
        return "a mapping (key: value)"
    if is_model(kind.type):
        return f"a mapping (keys: {', '.join(kind.type.model_fields)})"
    pattern = next((m.pattern for m in kind.limits if getattr(m, "pattern", None)), None)
    if pattern:
        return PATTERNS.get(pattern, f"text that matches {pattern}")
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind.type]
    if kind.type is str and any(getattr(m, "min_length", None) for m in kind.limits):
        return "text that is not empty"
    return plain + _bounds(kind.limits)


def _bounds(limits: Sequence[Any]) -> str:
    found = {name: getattr(m, name) for m in limits for name in ("ge", "gt", "le", "lt") if hasattr(m, name)}
    if {"ge", "le"} <= set(found):
        return f" from {found['ge']} to {found['le']}"
    said = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return "".join(f" {'and ' if i else ''}{said[name]} {value}" for i, (name, value) in enumerate(found.items()))


# -- pydantic's errors about a recipe, in plain words


_SECRET = (
    "this is, or holds, a secret (a token, or an address with a password); a recipe is written into the run's folder "
    "and its report, so take it out: tokens belong in the environment"
)
_TRUE, _FALSE = ("on", "yes", "y"), ("off", "no", "n")
_PLACES: tuple[KeyPath, ...] = (
    *(("forget",), ("also_forget",), ("learn",)),
    *(("analogy", "a"), ("analogy", "b"), ("analogy", "c")),
    *(("retain",), ("utility",)),
)


class Mistake(NamedTuple):
    """What is wrong at one key, as a sentence without place. ``whole``: several keys below it disagree."""

    path: KeyPath
    text: str
    whole: bool = False


class _Found(NamedTuple):
    """A pydantic error at a place freed of the names of union alternatives."""

    path: KeyPath
    kinds: tuple[Alternative, ...]
    error: Mapping[str, Any]
    unfit: bool  # it speaks of an alternative that the given value does not resemble


def mistakes(error: ValidationError, data: Any) -> list[Mistake]:
    """Every mistake that ``error`` reports about ``data``, one message per key."""
    found = [_place(e, data) for e in error.errors()]
    groups: dict[KeyPath, list[_Found]] = {}
    for item in found:
        groups.setdefault(item.path, []).append(item)
    result = []
    for path, group in groups.items():
        fit = [item for item in group if not item.unfit]
        deeper = any(p[: len(path)] == path for p in groups if len(p) > len(path))
        if deeper and (not fit or fit[0].error["type"] == "too_short"):
            continue
        item = fit[0] if fit else group[0]
        result.append(Mistake(path, _sentence(item, data), whole=item.error["type"] == "value_error"))
    return _without_echoes(result, found)


def semantic_mistakes(data: Any) -> list[Mistake]:
    """Mistakes that no type shows: malformed prompt templates, empty lists where one item is needed, secrets."""
    result: list[Mistake] = []
    for path, entry in data_sets(data):
        for place, template in _leaves(entry.get("prompt"), (*path, "prompt")):
            if template == []:
                result.append(Mistake(place, "the list is empty; give at least one template"))
            elif isinstance(template, str):
                try:
                    template_fields(template)
                except ValueError as problem:
                    result.append(Mistake(place, str(problem)))
    texts = [(place, value) for place, value in _leaves(data, ()) if isinstance(value, str)]
    result += [Mistake(place, _SECRET) for place, value in texts if is_secret(value)]
    targets: tuple[KeyPath, ...] = (("vector", "lora", "targets"), ("teach", "lora", "targets"))
    empty = "the list is empty; name at least one module, or write all-linear"
    return [*result, *(Mistake(path, empty) for path in targets if value_at(data, path) == [])]


def data_sets(data: Any) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Place and entry of every data set in unchecked recipe data that has the form of a mapping."""
    for place in _PLACES:
        entry = value_at(data, place)
        many = isinstance(entry, list) and len(place) == 1
        for path, one in [((*place, i), e) for i, e in enumerate(entry)] if many else [(place, entry)]:
            if isinstance(one, dict):
                yield path, one


def value_at(data: Any, path: Sequence[str | int]) -> Any:
    """The value at ``path`` in plain data, None where there is none."""
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return None
        data = data[key]
    return data


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    if word in known:
        return word
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    pairs: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and value:
        pairs = list(enumerate(value))
    else:
        yield path, value
    for key, item in pairs:
        yield from _leaves(item, (*path, key))


def _place(error: Mapping[str, Any], data: Any) -> _Found:
    kinds: tuple[Alternative, ...] = (Alternative(Recipe),)
    path: KeyPath = ()
    loc = error["loc"]
    for i, key in enumerate(loc):
        if i == len(loc) - 1 and error["type"] == "extra_forbidden":
            return _Found((*path, key), kinds, error, False)
        inner = below(kinds, key)
        if inner is not None:
            path, kinds, data = (*path, key), inner, value_at(data, (key,))
        elif not _resembles(str(key), data, kinds):
            return _Found(path, kinds, error, True)
    return _Found(path, kinds, error, False)


def _resembles(alternative: str, value: Any, kinds: Sequence[Alternative]) -> bool:
    """Whether the union alternative that pydantic names is of the shape (mapping, list, scalar) of the value."""
    if any(is_model(kind.type) and kind.type.__name__ == alternative for kind in kinds):
        return isinstance(value, dict)
    return not isinstance(value, dict) and isinstance(value, list) == alternative.startswith("tuple[")


def _without_echoes(result: list[Mistake], found: Sequence[_Found]) -> list[Mistake]:
    """Drop "required key" where an unknown key beside it is that key misspelt."""
    meant = set()
    for item in found:
        if item.error["type"] == "extra_forbidden":
            guess = nearest(str(item.path[-1]), tuple(fields(item.kinds)))
            meant.add((*item.path[:-1], guess))
    missing = {item.path for item in found if item.error["type"] == "missing"}
    return [mistake for mistake in result if not (mistake.path in missing and mistake.path in meant)]


def _sentence(item: _Found, data: Any) -> str:
    kind = item.error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(item.path[-1]), item.kinds)
    if kind == "value_error":
        return str(item.error["ctx"]["error"])
    if kind == "missing":
        info = fields(alternatives_at(item.path[:-1])).get(str(item.path[-1]))
        return "this key is required: " + (info.description if info and info.description else words(item.kinds))
    value = value_at(data, item.path)
    return f"expected {words(item.kinds)}, got {show(value)}{_hint(value, item.kinds)}"


def _unknown_key(key: str, kinds: Sequence[Alternative]) -> str:
    known = tuple(fields(kinds))
    guess = nearest(key, known)
    allowed = f"allowed here: {', '.join(known)}"
    if guess:
        return f"unknown key; did you mean '{guess}'? ({allowed})"
    places = [".".join(path) for path in homes(key, Recipe)]
    if places:
        return f"unknown key here; it belongs at {' or '.join(places[:3])} ({allowed})"
    return f"unknown key; {allowed}"


def show(value: Any) -> str:
    """A value as it is quoted in a message."""
    if value is None:
        return "nothing (the key has no value)"
    if isinstance(value, dict | list):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "an infinite number"
    return json.dumps(value)


def _hint(value: Any, kinds: Sequence[Alternative]) -> str:
    types = {kind.type for kind in kinds}
    lists = any(get_origin(t) is tuple for t in types)
    if isinstance(value, str):
        return _hint_for_text(value, kinds, types) or (f"; write it as a list: [{value}]" if lists else "")
    free_text = any(kind.type is str and not any(getattr(m, "pattern", None) for m in kind.limits) for kind in kinds)
    if isinstance(value, bool | int | float) and free_text and not types & {bool, int, float}:
        return f"; put it in quotes: '{json.dumps(value)}'"
    if isinstance(value, float) and value.is_integer() and int in types:
        return f"; write {int(value)}"
    if isinstance(value, dict) and any(is_model(get_args(t)[0]) for t in types if get_origin(t) is tuple):
        return "; put '- ' before its first key, so that it is an item of a list"
    return f"; write it as a list: [{json.dumps(value)}]" if lists and isinstance(value, bool | int | float) else ""


def _hint_for_text(value: str, kinds: Sequence[Alternative], types: set[Any]) -> str:
    if types & {int, float}:
        if _is_number(value.strip()):
            return "; this is text: remove the quotes to make it a number"
        bare = value.replace("_", "").replace(",", "")
        return f"; write {bare}" if _is_number(bare) else ""
    if bool in types:
        if isinstance(scalar_of(value), bool):
            return "; this is text: remove the quotes"
        return "; write true" if value.lower() in _TRUE else "; write false" if value.lower() in _FALSE else ""
    options = [str(option) for kind in kinds if get_origin(kind.type) is Literal for option in get_args(kind.type)]
    guess = nearest(value, options)
    return f"; did you mean '{guess}'?" if guess else ""


def _is_number(text: str) -> bool:
    try:
        return isinstance(scalar_of(text), int | float) and not isinstance(scalar_of(text), bool)
    except ValueError:
        return False


# -- ``--set a.b=value``


FORM = "write --set key.path=value, for example --set vector.forget.steps=50"
_MAX_DIGITS = 9  # of an index; Python refuses to read numbers of thousands of them
_ELSEWHERE = re.compile(r"(hub|wheel|pico):")


class Overrides:
    """Recipe data with overrides applied to a copy of it, and which override set what.

    Attributes:
        data: plain data, the overrides applied in order.
        origin: place in ``data`` -> the flag that put the value there (``--set a.b``).
        mistakes: overrides that could not be applied, each with its flag.
    """

    def __init__(self, data: Any, overrides: Sequence[str], folder: Path) -> None:
        """Apply ``overrides``. Relative paths in them that exist under ``folder`` become absolute: a person who types
        a path means it as seen from where they stand, while paths in a file are as seen from that file."""
        self.data = _copy(data)
        self.origin: dict[KeyPath, str] = {}
        self.mistakes: list[tuple[str, Mistake]] = []
        for override in overrides:
            name, equals, text = override.partition("=")
            keys = tuple(name.strip().split("."))
            flag = f"--set {name.strip() if equals else override}"
            if not equals or not all(keys):
                self.mistakes.append((flag, Mistake((), f"not an override; {FORM}")))
                continue
            try:
                path = self._set(keys, parse_value(text), flag)
            except YamlSyntaxError as error:
                self.mistakes.append((flag, Mistake(keys, f"the value {text[:60]!r} is {_lowered(str(error))}")))
            except _UnreachableError as error:
                self.mistakes.append((flag, Mistake(keys, str(error))))
            else:
                self._anchor(path, folder)

    def _set(self, keys: Sequence[str], value: Any, flag: str) -> KeyPath:
        """Put ``value`` at ``keys``, making mappings on the way, and return the place."""
        path: KeyPath = ()
        node = self.data
        for i, key in enumerate(keys):
            last = i == len(keys) - 1
            step = _step(node, key, path)
            path = (*path, step)
            if last:
                self._forget_origins(path)
                node[step] = value
            elif value_at(node, (step,)) is None:
                if keys[i + 1].isdigit():
                    raise _UnreachableError(
                        f"there is no list at {'.'.join(keys[: i + 1])} to change; set it as a whole"
                    )
                self._forget_origins(path)
                node[step] = {}
                self.origin[path] = flag
            node = node[step]
        self.origin[path] = flag
        return path

    def _forget_origins(self, path: KeyPath) -> None:
        """What lay below a replaced value has no origin any more."""
        self.origin = {place: flag for place, flag in self.origin.items() if place[: len(path)] != path}

    def _anchor(self, changed: KeyPath, folder: Path) -> None:
        for place in _file_places(self.data):
            if place[: len(changed)] != changed:
                continue
            value = value_at(self.data, place)
            file, mark, digest = str(value).partition("#")
            if isinstance(value, str) and file and not _ELSEWHERE.match(value) and _exists(folder / file):
                value_at(self.data, place[:-1])[place[-1]] = f"{folder / file}{mark}{digest}"


class _UnreachableError(Exception):
    """An override that points at a place the recipe cannot have."""


def _step(node: Any, key: str, path: KeyPath) -> str | int:
    """``key`` as it is used on ``node``: an index on a list, the key itself on a mapping."""
    if isinstance(node, dict):
        return key
    at = ".".join(str(k) for k in path)
    if isinstance(node, list):
        if key.isdecimal() and len(key) < _MAX_DIGITS and int(key) < len(node):
            return int(key)
        has = f"items 0 to {len(node) - 1}" if node else "no items"
        raise _UnreachableError(f"{at} is a list with {has}, so it has no '{key}'")
    raise _UnreachableError(
        f"{at or 'the recipe'} is a single value, not a mapping, so it has no '{key}'; set it as a whole"
    )


def _file_places(data: Any) -> Iterator[KeyPath]:
    """Places of everything that may name a local file or folder."""
    yield "model", "path"
    for path, entry in data_sets(data):
        yield (*path, "path")
        for split in ("validation", "test"):
            if isinstance(entry.get(split), dict):
                yield (*path, split, "path")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL: no such file
        return False


def _copy(value: Any) -> Any:
    """Copy mappings and lists all the way down, which also parts values that an alias had made one."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _lowered(text: str) -> str:
    return text if text.startswith("not ") else f"refused: {text}"


# -- where the files that come with the package lie


_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Folder of the packaged recipes (``*.yaml``, and their data in ``data/``).

    Raises:
        UnlearnError: the installation lacks it.
    """
    return _folder("recipes")


def tasks_folder() -> Path:
    """Folder of the lm-eval task pack, to be given to lm-eval as its include path.

    Raises:
        UnlearnError: the installation lacks it.
    """
    return _folder("eval")


def _folder(name: str) -> Path:
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise UnlearnError(f"this installation is incomplete: no folder '{name}' (looked at {looked}); install it again")


# -- one yaml file to one :class:`~unlearn.recipe.schema.recipe` and back, with every mistake reported at


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
