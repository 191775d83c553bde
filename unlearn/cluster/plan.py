"""Recipes times ``--grid key=value,value``: jobs, each read and checked before anything is submitted.

``grid.json`` freezes what is run: the recipes' texts, the folder that relative paths count from, every job's settings.
Changing a recipe after its jobs were submitted changes nothing about them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError

from unlearn.errors import GridError, RecipeError, UnlearnError
from unlearn.plan.words import plan
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.recipe.load import LoadedRecipe, load_recipe
from unlearn.recipe.yaml import YamlSyntaxError, parse_value
from unlearn.store.files import explained, fingerprint, some, write_json_atomic

GRID_FILE = "grid.json"
_MESSAGES = 20  # in one report of mistakes
# What the stages before the vectors (download, teaching, trained reference) do not depend on.
_NOT_SHARED = frozenset(
    {"name", "description", "vector", "sweep", "choose", "eval", "export", "robustness", "benchmark", "reuse", "edited"}
)
# What the checks before submission do not look at, but for what _problem adds.
_NOT_CHECKED = frozenset({"name", "description", "seed", "vector", "sweep", "export", "teach"})


def _plain_name(name: str) -> str:
    """A job's name is that of its folder and files: in a grid of somebody else's it must not lead elsewhere."""
    if not name or not name.isprintable() or Path(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a job")
    return name


@dataclass(frozen=True, slots=True)
class FrozenRecipe:
    """A recipe as it was when the grid was made: its name, its file (absolute) and that file's text."""

    name: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the grid, or a preparation: what several runs share, made once before them.

    ``settings`` has every axis' value as JSON; ``after`` is the name of the preparation that it waits for.
    """

    name: Annotated[str, AfterValidator(_plain_name)]
    recipe: int
    overrides: tuple[str, ...]
    settings: Mapping[str, str]
    after: str | None = None
    prepare: bool = False

    def folder(self, root: Path) -> Path:
        """Its run folder."""
        return root / ("prepare" if self.prepare else "jobs") / self.name

    def log(self, root: Path) -> Path:
        """What it printed, all attempts one after the other."""
        return root / "logs" / f"{self.name}.log"


@dataclass(frozen=True, slots=True)
class Grid:
    """All of it. ``cwd`` is where it was submitted; ``cluster`` what a batch system is asked for."""

    name: str
    cwd: str
    recipes: tuple[FrozenRecipe, ...]
    preparations: tuple[Job, ...]
    jobs: tuple[Job, ...]
    cluster: ClusterSpec
    schema: Literal[2] = 2

    def job(self, name: str) -> Job:
        """The job or preparation of this name."""
        return next(job for job in (*self.preparations, *self.jobs) if job.name == name)

    def identity(self) -> str:
        """What makes two grids the same: recipes' texts, jobs and settings; not the cluster's resources."""
        return fingerprint(self.cwd, list(self.recipes), list(self.jobs))

    def save(self, root: Path) -> None:
        """Write ``grid.json``."""
        root.mkdir(parents=True, exist_ok=True)
        write_json_atomic(root / GRID_FILE, self)

    @classmethod
    def load(cls, root: Path) -> Grid:
        """Read ``grid.json``; GridError where there is none, or it is damaged or of another version."""
        path = root / GRID_FILE
        if not path.is_file():
            raise GridError(f"{root} is not the folder of a grid: it has no {GRID_FILE}")
        try:
            with explained(path):
                return _GRID.validate_json(path.read_bytes())
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise GridError(f"{path}: damaged, or of another version: {where}: {first['msg']}") from e


_GRID = TypeAdapter(Grid)


def read_axes(flags: Sequence[str], sets: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The values of every ``--grid`` flag as JSON, by key; ``sets`` are the ``--set`` flags, whose keys are taken."""
    axes: dict[str, tuple[str, ...]] = {}
    fixed = [text.partition("=")[0].strip() for text in sets]
    for flag in flags:
        key, equals, text = (part.strip() for part in flag.partition("="))
        if not equals or not all(key.split(".")):
            raise GridError(f"--grid {flag}: write --grid key.path=value,value, for example --grid seed=0,1,2")
        if key.split(".")[0] == "cluster":
            raise GridError(f"--grid {key}: all jobs are submitted alike; write --set {key}=VALUE")
        for other in (*axes, *fixed):
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise GridError(f"--grid {key} and {other} set the same thing: leave one out")
        axes[key] = _values(key, text)
    return axes


def _values(key: str, text: str) -> tuple[str, ...]:
    """``1,2`` is the inside of a YAML list; so a value that holds commas stands in brackets or quotes."""
    try:
        found = parse_value(f"[{text}]")
        values = tuple(json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False) for value in found)
    except (YamlSyntaxError, ValueError, TypeError) as e:
        raise GridError(f"--grid {key}={text[:60]}: not values between commas: {e}") from None
    if not values or text.endswith(","):
        raise GridError(f"--grid {key}={text}: there is an empty value; write null or '' where that is meant")
    if double := next((value for n, value in enumerate(values) if value in values[:n]), None):
        raise GridError(f"--grid {key}: {double} is given twice")
    return values


def plan_grid(recipes: Sequence[str], flags: Sequence[str], sets: Sequence[str] = ()) -> Grid:
    """Every recipe (a file or a packaged name) times every setting, each checked; all mistakes in one message."""
    axes = read_axes(flags, sets)
    drafts = []
    for number, values in itertools.product(range(len(recipes)), itertools.product(*axes.values())):
        settings = dict(zip(axes, values, strict=True))
        drafts.append(Job("", number, (*sets, *(f"{k}={v}" for k, v in settings.items())), settings))
    loaded = _read(recipes, drafts)
    frozen: dict[int, FrozenRecipe] = {}
    for job, one in zip(drafts, loaded, strict=True):
        frozen.setdefault(job.recipe, FrozenRecipe(one.recipe.name, str(one.source), one.text))
    for a, b in itertools.combinations(frozen.values(), 2):
        if a.name == b.name:
            raise GridError(f"{a.source} and {b.source} are both called {a.name}: leave one out, or rename it")
    width = max(4, len(str(len(drafts) - 1)))
    seen: dict[str, str] = {}
    for n, (job, one) in enumerate(zip(drafts, loaded, strict=True)):
        named = [one.recipe.name] if len(recipes) > 1 or not axes else []
        name = f"{n:0{width}}-{file_name('_'.join([*named, *labels(job.settings)]))}".rstrip("-")
        overrides = tuple(text for text in job.overrides if not re.match(r"\s*cluster\b", text))
        drafts[n] = replace(job, name=name, overrides=overrides)
        key = fingerprint(one.recipe.model_dump(mode="json", exclude={"cluster"}), str(one.source.parent))
        if seen.setdefault(key, name) != name:
            raise GridError(f"two jobs are the same run, {seen[key]} and {name}: leave out what makes them two")
    blocks = [one.recipe.cluster for one in loaded if one.recipe.cluster is not None]
    if any(block != blocks[0] for block in blocks):
        raise GridError(
            "the recipes ask the cluster for different things, and all jobs are submitted alike: leave the cluster "
            "block in one of them, or set what differs for all with --set cluster.KEY=VALUE"
        )
    preparations, jobs = _grouped(drafts, loaded)
    name = frozen[0].name if len(frozen) == 1 else f"{frozen[0].name}+{len(frozen) - 1}"
    cluster = blocks[0] if blocks else ClusterSpec.model_validate({})
    return Grid(name, str(Path.cwd()), tuple(frozen.values()), preparations, jobs, cluster)


def recluster(grid: Grid, sets: Sequence[str]) -> Grid:
    """The grid with a changed cluster block (``cluster.key=value``): the only thing about it that may change."""
    block = grid.cluster.model_dump(mode="json")
    for text in sets:
        key, _, value = text.partition("=")
        part, _, name = key.strip().partition(".")
        if part != "cluster" or not name:
            raise GridError(f"--set {text}: a grid's jobs stay as they were submitted; only cluster.KEY can be changed")
        block[name] = parse_value(value)
    try:
        return replace(grid, cluster=ClusterSpec.model_validate_json(json.dumps(block)))
    except ValidationError as e:
        wrong = [f"cluster.{'.'.join(map(str, m['loc']))}: {m['msg']}, not {m['input']!r:.60}" for m in e.errors()]
        raise GridError("; ".join(wrong)) from e


def _read(names: Sequence[str], drafts: Sequence[Job]) -> list[LoadedRecipe]:
    """Every job's recipe, checked; each file is read once, and each data set and model is looked at once."""
    first: dict[int, LoadedRecipe] = {}
    loaded: list[LoadedRecipe] = []
    wrong: dict[str, list[str]] = {}
    checked: dict[str, str] = {}
    for job in drafts:
        try:
            if (known := first.get(job.recipe)) is None:
                one = first[job.recipe] = load_recipe(names[job.recipe], job.overrides)
            else:
                one = load_recipe(str(known.source), job.overrides, text=known.text)
            loaded.append(one)
            problem = _problem(one, checked)
        except RecipeError as e:
            problem = str(e)
            for key in job.settings:
                problem = problem.replace(f"--set {key}:", f"--grid {key}:")
        if problem:
            about = [f"{key}={value}" for key, value in job.settings.items()]
            about[:0] = [names[job.recipe]] if len(names) > 1 or not about else []
            wrong.setdefault(problem, []).append(", ".join(about))
    if wrong:
        lines = [f"nothing was submitted: {sum(map(len, wrong.values()))} of {len(drafts)} jobs cannot be run"]
        for problem, jobs in list(wrong.items())[:_MESSAGES]:
            which = "all jobs" if len(jobs) == len(drafts) > 1 else some(jobs, 3)
            lines.append(f"  {which}:\n    " + problem.replace("\n", "\n    "))
        raise GridError("\n".join(lines))
    return loaded


def _problem(one: LoadedRecipe, checked: dict[str, str]) -> str:
    """What is wrong with the recipe's data and model as they are here, or nothing."""
    clean = one.recipe.vector.clean()
    plain = one.recipe.model_dump(mode="json", exclude=set(_NOT_CHECKED))
    key = fingerprint(plain, clean, one.recipe.teach is None, str(one.source.parent))
    if key not in checked:
        try:
            plan(one)
            checked[key] = ""
        except UnlearnError as e:
            checked[key] = str(e)
    return checked[key]


def _grouped(jobs: Sequence[Job], loaded: Sequence[LoadedRecipe]) -> tuple[tuple[Job, ...], tuple[Job, ...]]:
    """Preparations, and the jobs that wait for them. What only one job would use it makes itself.

    The grouping only saves work: what a job takes from the pool it finds by the content of the stage.
    """
    groups: dict[str, list[int]] = {}
    for n, one in enumerate(loaded):
        recipe, base = one.recipe, str(one.source.parent)
        if recipe.teach is not None:  # a trained reference is taught too
            shared: Any = recipe.model_dump(mode="json", exclude={*_NOT_SHARED, "cluster"})
        elif (one.source.parent / Path(recipe.model.path).expanduser()).is_dir():
            continue
        else:
            shared = recipe.model.model_dump(mode="json")
        groups.setdefault(fingerprint(shared, base), []).append(n)
    preparations: list[Job] = []
    found = list(jobs)
    for members in groups.values():
        if len(members) > 1:
            first = jobs[members[0]]
            same = {k: v for k, v in first.settings.items() if all(jobs[n].settings[k] == v for n in members)}
            label = "_".join(labels(same, list(first.settings))) or loaded[members[0]].recipe.name
            name = f"p{len(preparations):03}-{file_name(label)}"
            preparations.append(Job(name, first.recipe, first.overrides, same, prepare=True))
            for n in members:
                found[n] = replace(jobs[n], after=name)
    return tuple(preparations), tuple(found)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of every dotted key, or as many parts as tell it from the others."""
    found = {}
    for key in keys:
        parts = key.split(".")
        others = [other.split(".") for other in keys if other != key]
        lengths = (n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        found[key] = ".".join(parts[-next(lengths, len(parts)) :])
    return found


def labels(settings: Mapping[str, str], keys: Sequence[str] = ()) -> list[str]:
    """``rank=8``; of a path its end."""
    short = short_keys(keys or list(settings))
    plain = {k: v if v[:1] in "[{" else v.strip('"').rstrip("/").rpartition("/")[2] for k, v in settings.items()}
    return [f"{short[key]}={value}" for key, value in plain.items()]


def file_name(text: str) -> str:
    """The text as a part of a file's name: without brackets and quotes; other characters of shells are dashes."""
    text = re.sub(r"[\[\](){}'\"\s]", "", text)
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9.,=+_-]", "-", text))[:72].strip("-_.,= ")
