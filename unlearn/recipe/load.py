"""One YAML file to one :class:`~unlearn.recipe.schema.Recipe` and back, with every mistake reported at once.

A message reads ``file.yaml:LINE: key.path: what is wrong``; what came from the command line reads
``--set key.path: ...`` instead. Importing this costs no torch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from unlearn.errors import RecipeError, RunFolderError, UnlearnError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.data import ALSO
from unlearn.recipe.methods import METHODS, REFUSED, registered, trainer_settings
from unlearn.recipe.schema import Recipe
from unlearn.recipe.yaml import Document, KeyPath, YamlSyntaxError
from unlearn.store.files import fingerprint
from unlearn.store.stages import RunFolder
from unlearn.text import did_you_mean, is_secret

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1_000_000
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A checked recipe, the file it came from (absolute), and that file's text as written.

    Relative paths in the recipe are relative to ``source.parent``. ``places`` are its keys' lines, and the flags that
    changed one.
    """

    recipe: Recipe
    source: Path
    text: str
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    @contextmanager
    def telling_where(self) -> Iterator[None]:
        """What is found wrong behind a key is told with the key's place, as what is wrong with the key itself is."""
        try:
            yield
        except UnlearnError as error:
            key = self._key_of(str(error))
            where = next((self.places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.places), None)
            if where is None or type(error) is UnlearnError:  # of no kind: a want of memory, say, and no mistake
                raise
            said = str(error).removeprefix(f"{where.removeprefix('--set ')}: ")
            raise type(error)(f"{where}: {said}") from error

    def _key_of(self, message: str) -> KeyPath:
        """The key that a message is about: it begins with the key, or with a data set and has its file's name."""
        head = message.partition(": ")[0]
        spec = next((spec for role, spec in self.recipe.sets() if head == f"{role} set '{spec.label()}'"), None)
        if spec is None:
            return tuple(int(part) if part.isdecimal() else part for part in head.split("."))
        key = next(path for path, value in _values(self.recipe) if value is spec)
        others = {name: source.path for name in ("validation", "test") if (source := getattr(spec, name)) is not None}
        own = [name for name, path in others.items() if re.search(rf"(?:^|[ /]){re.escape(path)}[:,]", message)]
        return (*key, *own[:1], "path")


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), text: str | None = None) -> LoadedRecipe:
    """Read, override and check a recipe, or raise a RecipeError that lists all mistakes.

    Args:
        name_or_path: a file; or a bare name, with or without ``.yaml``, meaning the file in the current folder, else
            the packaged recipe.
        overrides: ``key.path=value``, the value in YAML; list items by index (``retain.0.path=x.json``). Paths in
            them are as seen from the current folder: ``model.path`` and the ``path`` of a data set become absolute
            when such a file exists there. Otherwise they count from the recipe's folder like those in the file.
        text: what the file said at another time, read in its place; ``name_or_path`` is then its absolute path.
    """
    source = Path(name_or_path) if text is not None else _find(name_or_path)
    text = _read(source) if text is None else text
    file = _as_typed(source)
    try:
        document = _parsed(text)
    except YamlSyntaxError as error:
        raise RecipeError(f"{file}:{error.line}: {error}") from None
    if not isinstance(document.data, dict):
        what = "the file is empty" if document.data is None else f"found {_shown(document.data)}"
        raise RecipeError(f"{file}:1: expected 'key: value' lines (name, model, forget, ...) at the top; {what}")
    places = {path: _Place(line, f"{file}:{line}") for path, line in document.lines.items()}
    recipe = _check(document.data, overrides, places)
    return LoadedRecipe(recipe, source, text, {path: place.text for path, place in places.items()})


def from_recipe(recipe: Recipe) -> LoadedRecipe:
    """A recipe made in Python; its relative paths start from the current folder."""
    return LoadedRecipe(recipe, Path.cwd() / f"{recipe.name}.yaml", resolved_yaml(recipe))


def from_mapping(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, with every mistake reported at once."""
    return _check(json.loads(json.dumps(data, default=str)), (), {(): _Place(1, "settings")})


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in; reads back to an equal recipe."""
    return yaml_core.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **_schema(tuple(METHODS)), "title": "lm-unlearn recipe"}


def recipes_folder() -> Path:
    """Folder of the packaged recipes (``*.yaml``, and their data in ``data/``)."""
    return _folder("recipes")


def tasks_folder() -> Path:
    """Folder of the lm-eval task pack, to be given to lm-eval as its include path."""
    return _folder("eval")


def pack_module(name: str) -> ModuleType:
    """A module of the task pack by its path in it, without ``.py``; the pack stands alone, and is no package."""
    path = tasks_folder() / f"{name}.py"
    found = importlib.util.spec_from_file_location(f"unlearn_eval_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _folder(name: str) -> Path:
    """A folder that lies in the package when it is installed, and beside it in a checkout."""
    return _PACKAGE / name if (_PACKAGE / name).is_dir() else _PACKAGE.parent / name


def list_recipes() -> tuple[tuple[str, str], ...]:
    """``(file name, first line of its description)`` of every packaged recipe."""
    texts = {path.name: yaml_core.parse(_read(path)).data.get("description", "") for path in _packaged()}
    return tuple((name, text.strip().partition("\n")[0]) for name, text in texts.items())


def _packaged() -> list[Path]:
    return sorted(recipes_folder().glob("*.yaml"))


# -- finding and reading the file


def _find(name: str) -> Path:
    """The file that ``name`` means, absolute."""
    here = Path.cwd()
    names = (name,) if name.endswith(_SUFFIXES) else (name, *(name + suffix for suffix in _SUFFIXES))
    bare = Path(name).name == name
    for folder in (here, recipes_folder()) if bare else (here,):
        for place in (folder / one for one in names):
            if os.path.isfile(place):  # noqa: PTH113 - unlike Path.is_file it takes names that no file system would
                return place
    if name and os.path.isdir(here / name):  # noqa: PTH112
        raise RecipeError(f"{name} is a folder; --recipe takes one YAML file")
    packaged = [path.name for path in _packaged()]
    guess = did_you_mean(name, packaged) or did_you_mean(name + ".yaml", packaged)
    where = f" in {here}" if bare else ""
    raise RecipeError(f"there is no recipe {name!r}{where}{guess} (packaged recipes: {', '.join(packaged)})")


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


# -- overrides: --set a.b=value


class _Place(NamedTuple):
    """Where something was said: a line of the file, or a flag, which comes after all lines."""

    line: float
    text: str


_Places = dict[KeyPath, _Place]
_FILES = {"path", "chat_template", "refusals"}  # keys that name one
_NO_FILES = {"where", "columns", "benchmark", "eval"}  # a ``path`` in these is no data file


def _override(data: dict[str, Any], override: str, places: _Places) -> str:
    """Change ``data`` and ``places`` by one ``key.path=value``; returns what is wrong with it, or nothing."""
    name, equals, text = override.partition("=")
    flag = f"--set {name.strip() if equals else override}"
    keys: list[str | int] = [*name.strip().split(".")]
    if not equals or not all(keys):
        return f"{flag}: not an override; write --set key.path=value, for example --set vector.forget.steps=50"
    try:
        value = yaml_core.parse_value(text)
    except YamlSyntaxError as error:
        return f"{flag}: {error}"
    node: Any = data
    made = len(keys)
    for i, key in enumerate(keys):
        at = _dotted(keys[:i])
        if isinstance(node, list):
            index = int(key) if str(key).isdecimal() and len(str(key)) < 9 else len(node)
            if index >= len(node):
                return f"{flag}: {at} is a list of {len(node)}, counted from 0, so it has no '{key}'"
            keys[i] = key = index
        elif not isinstance(node, dict):
            return f"{flag}: {at} is a single value, not a mapping, so it has no '{key}'; set it as a whole"
        if i == len(keys) - 1:
            for name in (*_other_names(node, keys), *_unnamed(node, keys, value, places)):
                del node[name]
                places.pop((*keys[:-1], name), None)
            node[key] = _anchored(value, tuple(keys))
        elif value_at(node, (key,)) is None:
            node[key], made = {}, min(made, i + 1)
        node = node[key]
    new = tuple(keys[:made])
    for place in [place for place in places if place[:made] == new]:
        del places[place]
    places[new] = _Place(math.inf, flag)
    return ""


def _other_names(data: Any, path: Sequence[str | int]) -> list[str]:
    """The keys of a mapping that are other libraries' names, or ours, of the one at ``path``."""
    ours = ALSO.get(str(path[-1]), path[-1])
    if not isinstance(data, dict):
        return []
    others = [name for name in data if name != path[-1] and ALSO.get(name, name) == ours]
    return others if others and ours in _keys_beside(path) else []


def _unnamed(data: Any, path: KeyPath | list[str | int], value: Any, places: _Places) -> list[str]:
    """The file's settings of methods that ``--set vector.method`` names no more; those from flags stay, as mistakes."""
    if tuple(path) != ("vector", "method"):
        return []
    named = {registered(str(m)) for m in (value if isinstance(value, list) else [value])}
    of = {name: name for name, method in METHODS.items() if method.settings is not None} | {"mu": "contrast"}
    flags = {path[:2] for path, place in places.items() if place.line == math.inf}
    file = [name for name in data if not flags & {("vector",), ("vector", name)}]
    return [name for name in file if name in of and of[name] not in named]


def _anchored(value: Any, place: KeyPath) -> Any:
    """A value from the command line; paths of files that lie in the current folder are made absolute."""
    if isinstance(value, dict):
        return {key: _anchored(item, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_anchored(item, (*place, i)) for i, item in enumerate(value)]
    named = ALSO.get(str(place[-1]), place[-1]) in _FILES or place[:2] == ("vector", "from")
    if isinstance(value, str) and (named or place[0] in ("edited", "reuse")) and not _NO_FILES & set(place):
        file, mark, digest = value.partition("#")
        if file not in ("", "auto", "none") and os.path.exists(file):  # noqa: PTH110 (chat_template's words)
            return f"{Path.cwd() / file}{mark}{digest}"
    return value


def value_at(data: Any, path: Sequence[str | int]) -> Any:
    """The value at ``path`` in plain data, None where there is none."""
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return None
        data = data[key]
    return data


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """What a person would call one setting each; a list of plain values is one."""
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner = list(enumerate(value))
    for key, item in inner:
        yield from leaves(item, (*path, key))
    if not inner:
        yield path, value


def _values(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Everything in a recipe, by its key."""
    yield path, value
    fields = type(value).model_fields if isinstance(value, BaseModel) else ()
    inner = [(name, getattr(value, name)) for name in fields] or enumerate(value if isinstance(value, tuple) else ())
    for key, one in inner:
        yield from _values(one, (*path, key))


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


# -- checking, and a place for every mistake

_SECRET = (
    "this is, or holds, a secret (a token, or an address with a password); a recipe is written into the run's folder "
    "and its report, so take it out: tokens belong in the environment"
)


class _Mistake(NamedTuple):
    """What is wrong at one key, as a sentence without place. ``whole``: several keys below it disagree."""

    path: KeyPath
    text: str
    whole: bool = False


def _check(data: dict[str, Any], overrides: Sequence[str], places: _Places) -> Recipe:
    data = json.loads(json.dumps(data)) if overrides else data  # parts what an alias had joined
    wrong = [text for text in (_override(data, override, places) for override in overrides) if text]
    found = [_Mistake(path, _SECRET) for path, value in leaves(data) if is_secret(str(value))]
    try:
        recipe = Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        typed = _mistakes(error, data)
        found = [*typed, *(one for one in found if one.path not in {other.path for other in typed})]
    placed = [*((math.inf, text) for text in wrong), *(_placed(one, places) for one in found)]
    placed.sort(key=lambda pair: pair[0])
    if placed:
        head = [f"{len(placed)} mistakes in the recipe:"] if len(placed) > 1 else []
        raise RecipeError("\n  ".join([*head, *(text for _, text in placed)]))
    return recipe


def _placed(mistake: _Mistake, places: _Places) -> tuple[float, str]:
    """A mistake's line and message. One of a whole mapping goes to the first of its keys that the message names."""
    words = mistake.text.split() if mistake.whole else []
    named: list[KeyPath] = [(*mistake.path, *word.strip("(.,:;)").split(".")) for word in words]
    named = [path for path in named if path in places and places[path].line < math.inf]
    around = [mistake.path[:end] for end in range(len(mistake.path), -1, -1) if mistake.path[:end] in places]
    line, where = places[[*named, *around][0]]
    key = _dotted(mistake.path)
    prefix = f"{key}: " if key and where != f"--set {key}" else ""
    below = {p.text for path, p in places.items() if p.line == math.inf and path[: len(mistake.path)] == mistake.path}
    also = f" (with {', '.join(sorted(below))})" if below and key and line < math.inf else ""
    return line, f"{where}: {prefix}{mistake.text}{also}"


# -- pydantic's errors in plain words, with what the JSON schema says of the place

_Node = dict[str, Any]  # of the JSON schema
_EXPECTED = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "be a number"),
    **dict.fromkeys(("tuple_type", "list_type"), "be a list"),
    **dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "be a mapping"),
    "string_type": "be text",
}


def _mistakes(error: ValidationError, data: Any) -> list[_Mistake]:
    """One mistake per key, of all that pydantic says about the alternatives that it may be."""
    groups: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for one in error.errors(include_url=False):
        groups.setdefault(_path(one, data), []).append(one)
    found = []
    unknown = [path for path, errors in groups.items() if errors[0]["type"] == "extra_forbidden"]
    for path, errors in groups.items():
        if errors[0]["type"] == "missing" and any(
            path[:-1] == other[:-1] and f"'{path[-1]}'" in did_you_mean(str(other[-1]), _keys_beside(other))
            for other in unknown
        ):
            continue  # an unknown key beside it is that key misspelt
        if any(len(other) > len(path) and other[: len(path)] == path for other in groups):
            continue  # of the alternatives, it is the one that something below is said of
        whole = any(one["type"] == "value_error" for one in errors)
        found.append(_Mistake(path, _sentence(path, errors, value_at(data, path), value_at(data, path[:-1])), whole))
    return found


def _path(error: Mapping[str, Any], data: Any) -> KeyPath:
    """Where an error is, freed of the names of union alternatives."""
    path: KeyPath = ()
    for key in error["loc"][:-1] if error["type"] == "missing" else error["loc"]:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and isinstance(key, int)
        if inside:
            path, data = (*path, key), data[key]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


def _sentence(path: KeyPath, errors: Sequence[Mapping[str, Any]], value: Any, data: Any) -> str:
    kinds = {one["type"]: one for one in errors}
    if "extra_forbidden" in kinds:
        twice = _other_names(data, path)
        return f"the same as {twice[0]}, which is given too: keep one" if twice else _unknown_key(path)
    if "missing" in kinds:
        return f"this key is required: {_described(path)}"
    if "value_error" in kinds:
        return str(kinds["value_error"]["ctx"]["error"])
    wanted = dict.fromkeys(_EXPECTED.get(one["type"]) or one["msg"].partition(" should ")[2] for one in errors)
    options = [option for one in errors for option in str(one.get("ctx", {}).get("expected", "")).split("'")[1::2]]
    guess = did_you_mean(value, options) if isinstance(value, str) else ""
    form = f" ({_described(path)})" if "string_pattern_mismatch" in kinds else ""
    return f"must {' or '.join(wanted)}, got {_shown(value)}{guess}{form}"


def _unknown_key(path: KeyPath) -> str:
    key, beside = str(path[-1]), _keys_beside(path)
    if key in REFUSED:
        return f"not for a recipe to set: {REFUSED[key]}"
    if "trainer" in beside and key in trainer_settings():
        place = _dotted((*path[:-1], "trainer", key))
        return f"unknown key here; as one of transformers' TrainingArguments it belongs at {place}"
    familiar = [name for name, ours in ALSO.items() if ours in beside]
    guess, allowed = did_you_mean(key, [*beside, *familiar]), f"allowed here: {', '.join(beside)}"
    elsewhere = [".".join(other) for other in _keys(tuple(METHODS)) if other[-1] == key]
    if elsewhere and not guess:
        return f"unknown key here; it belongs at {' or '.join(elsewhere[:3])} ({allowed})"
    return f"unknown key{guess} ({allowed})"


def _shown(value: Any) -> str:
    """A value as it is quoted in a message."""
    if isinstance(value, dict | list):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    return "nothing (the key has no value)" if value is None else json.dumps(value)


# -- the JSON schema


@lru_cache(maxsize=2)
def _schema(methods: tuple[str, ...]) -> _Node:
    """The schema of recipes, with the settings of methods from outside the package."""
    schema = Recipe.model_json_schema()
    for name in methods:
        if (settings := METHODS[name].settings) is not None:
            schema["$defs"]["VectorSpec"]["properties"].setdefault(name, settings.model_json_schema())
    return schema


@lru_cache(maxsize=2)
def _keys(methods: tuple[str, ...]) -> dict[tuple[str, ...], _Node]:
    """Every key of a recipe with its schema: an item of a list is 0, a key of any name is *."""
    schema = _schema(methods)

    def walk(node: _Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Node]]:
        for kind in node.get("anyOf", [node]):
            kind = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
            for name, inner in kind.get("properties", {}).items():
                yield (*path, name), inner
                yield from walk(inner, (*path, name))
            for step, inner in (("0", kind.get("items")), ("*", kind.get("additionalProperties"))):
                if isinstance(inner, dict):
                    yield from walk(inner, (*path, step))

    return dict(walk(schema, ()))


def _keys_beside(path: Sequence[str | int]) -> list[str]:
    """The keys that the mapping around ``path`` may have."""
    return [key[-1] for key in _keys(tuple(METHODS)) if len(key) == len(path) and _same(path[:-1], key)]


def _described(path: KeyPath) -> str:
    nodes = (node for key, node in _keys(tuple(METHODS)).items() if len(key) == len(path) and _same(path, key))
    return str(next(nodes, {}).get("description", ""))


def _same(path: Sequence[str | int], key: tuple[str, ...]) -> bool:
    return all(k in (str(p), "*") or (k == "0" and isinstance(p, int)) for p, k in zip(path, key, strict=False))


# -- the run folder of a recipe


_BESIDE = ("cluster", "report_to")  # what a batch system gives, and who is told of it, is no part of a run


def open_run(root: Path | None, recipe: Recipe, text: str, fresh: bool = False, base: Path = Path("runs")) -> RunFolder:
    """Make or reopen the folder of a recipe and take its lock (:meth:`unlearn.store.stages.RunFolder.open`).

    Args:
        root: The folder itself (``--out``); None for ``base/<recipe name>-<first 8 hex of its fingerprint>``.
        recipe: With every default filled in; decides whether an existing folder is this run's.
        text: The recipe as the user wrote it.
        fresh: Remove what an earlier run left here, of whatever recipe.
        base: Where folders without a name of their own go.
    """
    what = recipe.model_dump(mode="json", exclude=set(_BESIDE))
    place = root if root is not None else base / f"{recipe.name}-{fingerprint(what)[:8]}"
    return RunFolder.open(place, resolved_yaml(recipe), text, _require_same_recipe, fresh)


def _require_same_recipe(place: Path, resolved: str) -> None:
    """Compare the folder's ``resolved.yaml`` with ``resolved``: keys that came later count as today's defaults."""
    try:
        old = yaml_core.parse((place / "resolved.yaml").read_text(encoding="utf-8")).data
        there = {key: value for key, value in old.items() if key not in _BESIDE}
    except (YamlSyntaxError, UnicodeDecodeError, AttributeError) as e:
        raise RunFolderError(
            f"{place / 'resolved.yaml'} cannot be read any more, so it is unclear whose run this is: "
            "use another --out, or --fresh to start over"
        ) from e
    with suppress(ValidationError):  # of another version, which had other keys
        there = Recipe.model_validate_json(json.dumps(there)).model_dump(mode="json")
    here = yaml_core.parse(resolved).data
    one, other = ({_dotted(path): value for path, value in leaves(data)} for data in (there, here))
    absent = object()
    differs = [k for k in dict.fromkeys([*other, *one]) if one.get(k, absent) != other.get(k, absent)]
    # another search is another way of going about the same run: what is finished is used again
    differs = [k for k in differs if k != "sweep.search" and k.partition(".")[0] not in _BESIDE]
    if differs:
        lines = [f"  {key}: {_short(one, key)} there, {_short(other, key)} here" for key in differs[:5]]
        more = [f"  and {len(differs) - 5} more"] if len(differs) > 5 else []
        raise RunFolderError(
            f"{place} holds a run of another recipe:\n"
            + "\n".join([*lines, *more])
            + "\nUse another --out, or --fresh to remove that run and start over"
        )


def _short(leaves: Mapping[str, Any], key: str) -> str:
    text = repr(leaves[key]) if key in leaves else "not set"
    return text if len(text) <= 60 else text[:57] + "..."
