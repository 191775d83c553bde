"""One YAML file to one :class:`~unlearn.recipe.schema.Recipe` and back, with every mistake reported at once.

A message reads ``file.yaml:LINE: key.path: what is wrong``; what came from the command line reads
``--set key.path: ...`` instead. Importing this costs no torch.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from unlearn.errors import RecipeError, UnlearnError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.methods import METHODS
from unlearn.recipe.schema import Recipe
from unlearn.recipe.yaml import Document, KeyPath, YamlSyntaxError, parse_value, scalar_of
from unlearn.text import is_secret

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1_000_000
_PACKAGE = Path(__file__).resolve().parents[1]


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
            them are as seen from the current folder: ``model.path`` and the ``path`` of a data set become absolute
            when such a file exists there. Otherwise they count from the recipe's folder like those in the file.
        text: what the file said at another time, read in its place; ``name_or_path`` is then its absolute path.

    Raises:
        RecipeError: there is no such file, or it holds mistakes; the message lists all of them.
    """
    source = Path(name_or_path) if text is not None else _find(name_or_path)
    text = _read(source) if text is None else text
    place = _as_typed(source)
    try:
        document = _parsed(text)
    except YamlSyntaxError as error:
        raise RecipeError(f"{place}:{error.line}: {error}") from None
    if not isinstance(document.data, dict):
        raise RecipeError(f"{place}:1: {_not_a_mapping(document.data)}")
    return LoadedRecipe(_check(document, overrides, place), source, text)


def from_recipe(recipe: Recipe) -> LoadedRecipe:
    """A recipe made in Python; its relative paths start from the current folder."""
    return LoadedRecipe(recipe, Path.cwd() / f"{recipe.name}.yaml", resolved_yaml(recipe))


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in; reads back to an equal recipe."""
    return yaml_core.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **_schema(), "title": "lm-unlearn recipe"}


def recipes_folder() -> Path:
    """Folder of the packaged recipes (``*.yaml``, and their data in ``data/``)."""
    return _folder("recipes")


def tasks_folder() -> Path:
    """Folder of the lm-eval task pack, to be given to lm-eval as its include path."""
    return _folder("eval")


def _folder(name: str) -> Path:
    """A folder that lies in the package when it is installed, and beside it in a checkout."""
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise UnlearnError(f"this installation is incomplete: no folder '{name}' (looked at {looked}); install it again")


def list_recipes() -> tuple[tuple[str, str], ...]:
    """``(file name, first line of its description)`` of every packaged recipe; a broken one says so in its line."""
    return tuple((path.name, _description(path)) for path in _packaged())


def _description(path: Path) -> str:
    try:
        data = yaml_core.parse(_read(path)).data
    except (RecipeError, YamlSyntaxError) as error:
        return f"(cannot be read: {str(error).splitlines()[0]})"
    text = data.get("description") if isinstance(data, dict) else None
    return text.strip().splitlines()[0] if isinstance(text, str) and text.strip() else ""


def _packaged() -> list[Path]:
    try:
        folder = recipes_folder()
    except UnlearnError:  # a recipe given by path needs no packaged ones
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    if word in known:
        return word
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


# -- finding and reading the file


def _find(name: str) -> Path:
    """The file that ``name`` means, absolute."""
    here = Path.cwd()
    bare = name not in ("", "..") and Path(name).name == name
    names = (name,) if name.endswith(_SUFFIXES) else (name, *(name + suffix for suffix in _SUFFIXES))
    places = [here / n for n in names if n]
    if bare:
        places += [packaged for n in names for packaged in _packaged() if packaged.name == n]
    for place in places:
        if os.path.isfile(place):  # noqa: PTH113 - unlike Path.is_file it takes names that no file system would
            return place
    if name and os.path.isdir(here / name):  # noqa: PTH112
        inside = sorted(path.name for path in Path(name).iterdir() if path.name.endswith(_SUFFIXES))
        there = f" (in it: {', '.join(inside[:10])})" if inside else ""
        raise RecipeError(f"{name} is a folder; --recipe takes one YAML file{there}")
    packaged = [path.name for path in _packaged()]
    guess = nearest(name, packaged) or nearest(name + ".yaml", packaged)
    meant = f"; did you mean '{guess}'?" if guess else ""
    known = f" (packaged recipes: {', '.join(packaged)})" if packaged else ""
    raise RecipeError(f"there is no recipe {name!r}{' in ' + str(here) if bare else ''}{meant}{known}")


def _read(source: Path) -> str:
    place = _as_typed(source)
    try:
        size = source.stat().st_size
        if size > _MAX_BYTES:
            raise RecipeError(f"{place}: {size:,} bytes is too large for a recipe; is it a data file?")
        raw = source.read_bytes()
    except OSError as error:
        raise RecipeError(f"{place}: cannot be read: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{place}:{line}: this is not UTF-8 text; save the file as UTF-8") from None


@lru_cache(maxsize=16)
def _parsed(text: str) -> Document:
    """A grid reads one text a thousand times. Overrides go on a copy of it."""
    return yaml_core.parse(text)


def _as_typed(source: Path) -> str:
    """The path as a person would type it."""
    relative = os.path.relpath(source)
    return str(source) if relative.startswith("..") else relative


def _not_a_mapping(data: Any) -> str:
    if data is None:
        return "the file is empty; a recipe needs at least name, model and forget"
    kind = "a list" if isinstance(data, list) else "a single value"
    return f"expected 'key: value' lines (name, model, forget, ...) at the top, found {kind}"


# -- overrides: --set a.b=value

_FORM = "write --set key.path=value, for example --set vector.forget.steps=50"
_DATA = ("forget", "also_forget", "learn", "analogy", "retain", "utility", "holdout")
_MAX_DIGITS = 9  # of an index; Python refuses to read numbers of thousands of them
_ELSEWHERE = re.compile(r"(hub|wheel|pico):")


class Mistake(NamedTuple):
    """What is wrong at one key, as a sentence without place. ``whole``: several keys below it disagree."""

    path: KeyPath
    text: str
    whole: bool = False


class Overrides:
    """A copy of recipe data with overrides applied in order.

    Attributes:
        data: plain data.
        origin: place in ``data`` -> the flag that put the value there (``--set a.b``).
        mistakes: overrides that could not be applied, each with its flag.
    """

    def __init__(self, data: Any, overrides: Sequence[str], folder: Path) -> None:
        """Apply ``overrides``; relative paths in them that exist under ``folder`` become absolute."""
        self.data = copy.copy(data) if not overrides else json.loads(json.dumps(data))  # parts what an alias had joined
        self.origin: dict[KeyPath, str] = {}
        self.mistakes: list[tuple[str, Mistake]] = []
        for override in overrides:
            name, equals, text = override.partition("=")
            keys = tuple(name.strip().split("."))
            flag = f"--set {name.strip() if equals else override}"
            if not equals or not all(keys):
                self.mistakes.append((flag, Mistake((), f"not an override; {_FORM}")))
                continue
            try:
                self._anchor(self._set(keys, parse_value(text), flag), folder)
            except YamlSyntaxError as error:
                why = str(error) if str(error).startswith("not ") else f"refused: {error}"
                self.mistakes.append((flag, Mistake(keys, f"the value {text[:60]!r} is {why}")))
            except _UnreachableError as error:
                self.mistakes.append((flag, Mistake(keys, str(error))))

    def _set(self, keys: Sequence[str], value: Any, flag: str) -> KeyPath:
        """Put ``value`` at ``keys``, making mappings on the way, and return the place."""
        path: KeyPath = ()
        node = self.data
        for i, key in enumerate(keys):
            step = _step(node, key, path)
            path = (*path, step)
            last = i == len(keys) - 1
            if last or value_at(node, (step,)) is None:
                if not last and keys[i + 1].isdigit():
                    list_at = ".".join(keys[: i + 1])
                    raise _UnreachableError(f"there is no list at {list_at} to change; set it as a whole")
                # what lay below a replaced value has no origin any more
                self.origin = {at: by for at, by in self.origin.items() if at[: len(path)] != path}
                node[step] = value if last else {}
                self.origin[path] = flag
            node = node[step]
        return path

    def _anchor(self, changed: KeyPath, folder: Path) -> None:
        """Make paths of files that lie under ``folder`` absolute, of what was set at ``changed``."""
        for place, value in list(_leaves(value_at(self.data, changed), changed)):
            names_a_file = place == ("model", "path") or (place[0] in _DATA and place[-1] == "path")
            if not names_a_file or {"where", "columns"} & set(place) or not isinstance(value, str):
                continue
            file, mark, digest = value.partition("#")
            if file and not _ELSEWHERE.match(value) and os.path.exists(folder / file):  # noqa: PTH110
                value_at(self.data, place[:-1])[place[-1]] = f"{folder / file}{mark}{digest}"


class _UnreachableError(Exception):
    """An override that points at a place the recipe cannot have."""


def _step(node: Any, key: str, path: KeyPath) -> str | int:
    """``key`` as it is used on ``node``: an index on a list, the key itself on a mapping."""
    if isinstance(node, dict):
        return key
    at = _dotted(path)
    if isinstance(node, list):
        if key.isdecimal() and len(key) < _MAX_DIGITS and int(key) < len(node):
            return int(key)
        items = f"items 0 to {len(node) - 1}" if node else "no items"
        raise _UnreachableError(f"{at} is a list with {items}, so it has no '{key}'")
    raise _UnreachableError(
        f"{at or 'the recipe'} is a single value, not a mapping, so it has no '{key}'; set it as a whole"
    )


def value_at(data: Any, path: Sequence[str | int]) -> Any:
    """The value at ``path`` in plain data, None where there is none."""
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return None
        data = data[key]
    return data


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
    for key, item in pairs or ():
        yield from _leaves(item, (*path, key))


# -- checking, and a place for every mistake

_SECRET = (
    "this is, or holds, a secret (a token, or an address with a password); a recipe is written into the run's folder "
    "and its report, so take it out: tokens belong in the environment"
)


def _check(document: Document, overrides: Sequence[str], file: str) -> Recipe:
    changed = Overrides(document.data, overrides, Path.cwd())
    recipe, found = _validate(changed.data)
    lines: list[tuple[float, str]] = [(math.inf, f"{flag}: {mistake.text}") for flag, mistake in changed.mistakes]
    lines += [_placed(mistake, document, changed, file) for mistake in found]
    messages = [text for _, text in sorted(lines, key=lambda pair: pair[0])]
    if messages or recipe is None:
        head = [f"{len(messages)} mistakes in the recipe:"] if len(messages) > 1 else []
        raise RecipeError("\n  ".join([*head, *messages]))
    return recipe


def _validate(data: dict[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    texts = [(place, value) for place, value in _leaves(data, ()) if isinstance(value, str)]
    more = [Mistake(place, _SECRET) for place, value in texts if is_secret(value)]
    empty = "the list is empty; name at least one module, or write all-linear"
    targets: tuple[KeyPath, ...] = (("vector", "lora", "targets"), ("teach", "lora", "targets"))
    more += [Mistake(path, empty) for path in targets if value_at(data, path) == []]
    try:
        return Recipe.model_validate_json(json.dumps(data)), more
    except ValidationError as error:
        typed = mistakes(error, data)
        return None, [*typed, *(m for m in more if m.path not in {t.path for t in typed})]


def _placed(mistake: Mistake, document: Document, changed: Overrides, file: str) -> tuple[float, str]:
    """(sort key, message) of a mistake, at the line or the flag nearest to it."""
    flag = _origin(mistake.path, changed)
    if flag:
        key = "" if flag == f"--set {_dotted(mistake.path)}" else _prefix(mistake.path)
        return math.inf, f"{flag}: {key}{mistake.text}"
    line = _line(mistake, document)
    below = sorted({flag for place, flag in changed.origin.items() if place[: len(mistake.path)] == mistake.path})
    also = f" (with {', '.join(below)})" if below and mistake.path else ""
    return line, f"{file}:{line}: {_prefix(mistake.path)}{mistake.text}{also}"


def _origin(path: KeyPath, changed: Overrides) -> str | None:
    """The override that a place came from: its own, or that of the nearest mapping around it."""
    ends = range(len(path), 0, -1)
    return next((changed.origin[path[:end]] for end in ends if path[:end] in changed.origin), None)


def _line(mistake: Mistake, document: Document) -> int:
    """Line of the key. A mistake about a whole mapping goes to the first of its keys that the message names."""
    words = mistake.text.split() if mistake.whole else []
    named = [(*mistake.path, *word.strip("(.,:;)").split(".")) for word in words]
    around = [mistake.path[:end] for end in range(len(mistake.path), -1, -1)]
    return next((document.lines[place] for place in (*named, *around) if place in document.lines), 1)


def _dotted(path: KeyPath) -> str:
    return ".".join(str(key) for key in path)


def _prefix(path: KeyPath) -> str:
    return f"{_dotted(path)}: " if path else ""


# -- pydantic's errors in plain words, with what the JSON schema says of the place

Node = dict[str, Any]  # of the JSON schema
PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "text of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    r"^(auto|cpu|mps|cuda(:\d+)?)$": "one of auto, cpu, mps, cuda, or cuda:NUMBER",
    r"^\d+(\.\d+)?[KMGT]B$": "a size such as 500MB or 5GB",
    r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$": "a time such as 4:00:00 (hours) or 1-12:00:00 (days and hours)",
    r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$": "a name on the hub, OWNER/NAME",
}
_PLAIN = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "of at most", "exclusiveMaximum": "below"}


class _Found(NamedTuple):
    """A pydantic error at a place freed of the names of union alternatives."""

    path: KeyPath
    kinds: list[Node]
    error: Mapping[str, Any]
    unfit: bool  # it speaks of an alternative that the given value does not resemble


def mistakes(error: ValidationError, data: Any) -> list[Mistake]:
    """Every mistake that ``error`` reports about ``data``, one message per key."""
    groups: dict[KeyPath, list[_Found]] = {}
    for one in error.errors():
        item = _place(one, data)
        groups.setdefault(item.path, []).append(item)
    # "required key" says nothing new where an unknown key beside it is that key misspelt
    unknown = [i for group in groups.values() for i in group if i.error["type"] == "extra_forbidden"]
    meant = {(*i.path[:-1], nearest(str(i.path[-1]), tuple(fields(i.kinds)))) for i in unknown}
    result = []
    for path, group in groups.items():
        fit = [item for item in group if not item.unfit]
        first = (fit or group)[0]
        kind = first.error["type"]
        deeper = any(p[: len(path)] == path for p in groups if len(p) > len(path))
        if (deeper and (not fit or kind == "too_short")) or (kind == "missing" and path in meant):
            continue
        result.append(Mistake(path, _sentence(first, data), whole=kind == "value_error"))
    return result


def _place(error: Mapping[str, Any], data: Any) -> _Found:
    kinds, loc = alternatives(_schema()), error["loc"]
    path: KeyPath = ()
    for i, key in enumerate(loc):
        if i == len(loc) - 1 and error["type"] == "extra_forbidden":
            return _Found((*path, key), kinds, error, False)
        inner = _below(kinds, key)
        if inner:
            path, kinds, data = (*path, key), inner, value_at(data, (key,))
        elif not _resembles(str(key), data, kinds):
            return _Found(path, kinds, error, True)
    return _Found(path, kinds, error, False)


def _resembles(alternative: str, value: Any, kinds: Sequence[Node]) -> bool:
    """Whether the union alternative that pydantic names is of the shape (mapping, list, scalar) of the value."""
    if any(kind.get("title") == alternative and "properties" in kind for kind in kinds):
        return isinstance(value, dict)
    return not isinstance(value, dict) and isinstance(value, list) == ("tuple[" in alternative)


def _sentence(item: _Found, data: Any) -> str:
    kind = item.error["type"]
    if kind == "extra_forbidden":
        return _unknown_key(str(item.path[-1]), item.kinds)
    if kind == "value_error":
        return str(item.error["ctx"]["error"])
    if kind == "missing":
        node: Node = {}
        for key in item.path:
            node = fields(alternatives(node or _schema())).get(str(key), {}) if isinstance(key, str) else _item(node)
        return "this key is required: " + (node.get("description") or words(item.kinds))
    value = value_at(data, item.path)
    return f"expected {words(item.kinds)}, got {show(value)}{_hint(value, item.kinds)}"


def _unknown_key(key: str, kinds: Sequence[Node]) -> str:
    known = tuple(fields(kinds))
    allowed = f"allowed here: {', '.join(known)}"
    if guess := nearest(key, known):
        return f"unknown key; did you mean '{guess}'? ({allowed})"
    if places := [".".join(path) for path in _places_of(key, _schema(), ())]:
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


def _hint(value: Any, kinds: Sequence[Node]) -> str:
    free = [kind for kind in kinds if not {"enum", "const", "pattern"} & kind.keys()]
    types = {kind.get("type") for kind in free}
    inner = [node for kind in kinds if kind.get("type") == "array" for node in alternatives(_item(kind))]
    as_list = "; write it as a list: [{}]" if inner else ""
    if isinstance(value, str):
        return _hint_for_text(value, kinds, types) or as_list.format(value)
    if isinstance(value, bool | int | float) and "string" in types and not types & {"boolean", "integer", "number"}:
        return f"; put it in quotes: '{json.dumps(value)}'"
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return f"; write {int(value)}"
    if isinstance(value, dict) and any("properties" in node for node in inner):
        return "; put '- ' before its first key, so that it is an item of a list"
    return as_list.format(json.dumps(value)) if isinstance(value, bool | int | float) else ""


def _hint_for_text(value: str, kinds: Sequence[Node], types: set[Any]) -> str:
    if types & {"integer", "number"}:
        if _is_number(value.strip()):
            return "; this is text: remove the quotes to make it a number"
        bare = value.replace("_", "").replace(",", "")
        return f"; write {bare}" if _is_number(bare) else ""
    if "boolean" in types:
        if isinstance(scalar_of(value), bool):
            return "; this is text: remove the quotes"
        lowered = value.lower()
        return (
            "; write true"
            if lowered in ("on", "yes", "y")
            else "; write false"
            if lowered in ("off", "no", "n")
            else ""
        )
    guess = nearest(value, [str(option) for kind in kinds for option in _options(kind)])
    return f"; did you mean '{guess}'?" if guess else ""


def _is_number(text: str) -> bool:
    try:
        return isinstance(scalar_of(text), int | float) and not isinstance(scalar_of(text), bool)
    except ValueError:
        return False


# -- the JSON schema


def _schema() -> Node:
    """The schema of recipes, with the settings of methods from outside the package."""
    return _schema_with(tuple(METHODS))


@lru_cache(maxsize=2)
def _schema_with(methods: tuple[str, ...]) -> Node:
    schema = Recipe.model_json_schema()
    for name in methods:
        if (settings := METHODS[name].settings) is not None:
            schema["$defs"]["VectorSpec"]["properties"].setdefault(name, settings.model_json_schema())
    return schema


def alternatives(node: Node) -> list[Node]:
    """What a place may hold: references followed, unions taken apart."""
    if "$ref" in node:
        return [_schema()["$defs"][node["$ref"].rpartition("/")[2]]]
    return [kind for member in node.get("anyOf", ()) for kind in alternatives(member)] or [node]


def fields(kinds: Sequence[Node]) -> dict[str, Node]:
    """The keys that a mapping of one of these alternatives may have."""
    return {name: node for kind in kinds for name, node in kind.get("properties", {}).items()}


def _item(kind: Node) -> Node:
    """What a list holds."""
    found: Node = kind["items"] if isinstance(kind.get("items"), dict) else kind["prefixItems"][0]
    return found


def _options(kind: Node) -> list[Any]:
    return kind.get("enum") or ([kind["const"]] if "const" in kind else [])


def _below(kinds: Sequence[Node], key: str | int) -> list[Node]:
    """The alternatives of what lies at ``key``; none where no alternative has such a key."""
    if key in (known := fields(kinds)):
        return alternatives(known[str(key)])
    for kind in kinds:
        if isinstance(key, str) and isinstance(kind.get("additionalProperties"), dict):
            return alternatives(kind["additionalProperties"])
        if isinstance(key, int) and kind.get("type") == "array":
            return alternatives(_item(kind))
    return []


def _places_of(key: str, node: Node, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every place in the schema where ``key`` is a field."""
    for name, inner in node.get("properties", {}).items():
        if name == key:
            yield (*path, name)
        for kind in alternatives(inner):
            many = kind.get("type") == "array"
            for one in alternatives(_item(kind)) if many else [kind]:
                yield from _places_of(key, one, (*path, name, "0") if many else (*path, name))


def words(kinds: Sequence[Node]) -> str:
    """What a place takes, as the object of "expected"."""
    parts = dict.fromkeys(_described(kind) for kind in kinds if kind.get("type") != "null")
    if any(kind.get("type") == "null" for kind in kinds):
        parts["null"] = None
    *others, last = parts
    return f"{', '.join(others)} or {last}" if others else last


def _described(kind: Node) -> str:
    if options := _options(kind):
        return f"'{options[0]}'" if len(options) == 1 else f"one of {', '.join(map(str, options))}"
    if kind["type"] == "array":
        least = kind.get("minItems") if "items" in kind else None
        inner = alternatives(_item(kind))
        item = "a mapping" if "properties" in inner[0] else words(inner)
        return f"a list{f' with at least {least} item' if least else ''} (each: {item})"
    if kind["type"] == "object":
        return (
            f"a mapping (keys: {', '.join(kind['properties'])})" if "properties" in kind else "a mapping (key: value)"
        )
    if "pattern" in kind:
        return PATTERNS.get(kind["pattern"], f"text that matches {kind['pattern']}")
    if "minLength" in kind:
        return "text that is not empty"
    limits = {name: kind[name] for name in _BOUNDS if name in kind}
    if {"minimum", "maximum"} <= limits.keys():
        return f"{_PLAIN[kind['type']]} from {limits['minimum']} to {limits['maximum']}"
    return " ".join([_PLAIN[kind["type"]], " and ".join(f"{_BOUNDS[k]} {v}" for k, v in limits.items())]).rstrip()
