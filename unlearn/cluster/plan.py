"""From recipes and ``--grid`` flags to a grid: every job's recipe read and checked before anything is submitted.

Jobs whose recipes agree on all that fetching, teaching and a trained reference depend on share a preparation. The
grouping only saves work: what a job takes from the others it finds by the content of the stage, never by its group.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from unlearn.cluster.axes import file_name, read_axes, short_keys, short_value
from unlearn.cluster.grid import Axis, FrozenRecipe, Grid, Job, Preparation
from unlearn.errors import GridError, RecipeError, UnlearnError
from unlearn.plan import plan
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.recipe.load import LoadedRecipe, Overrides, load_recipe
from unlearn.store.files import fingerprint

_MOST = 20  # messages in one report
# What nothing that is shared depends on. All else counts, though some of it need not: too many groups cost a little
# time, too few would not be wrong either, but would make the jobs wait for one another.
_NOT_SHARED = frozenset(
    {"name", "description", "vector", "sweep", "choose", "eval", "export", "robustness", "benchmark", "reuse"}
)
# What the checks before submission do not look at, but for what _look adds.
_NOT_LOOKED_AT = frozenset({"name", "description", "seed", "vector", "sweep", "export", "teach"})


def plan_grid(recipes: Sequence[str], flags: Sequence[str], sets: Sequence[str] = ()) -> Grid:
    """Every recipe times every setting, each read and checked.

    Args:
        recipes: Files, or names of packaged recipes.
        flags: ``--grid`` flags.
        sets: ``--set`` flags, for all jobs.

    Raises:
        GridError: mistakes in the flags, or in the recipes that they make; all of these in one message.
    """
    axes = read_axes(flags, sets)
    drafts = _drafts(len(recipes), axes, sets)
    loaded, frozen = _read(recipes, drafts)
    _distinct(frozen)
    drafts = _named(drafts, frozen, axes)
    _refuse_same(drafts, loaded)
    jobs, preparations = _group(drafts, loaded)
    return Grid(
        name=frozen[0].name if len(frozen) == 1 else f"{frozen[0].name}+{len(frozen) - 1}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        cwd=str(Path.cwd()),
        recipes=tuple(frozen),
        axes=axes,
        preparations=preparations,
        jobs=tuple(jobs),
        cluster=_cluster(loaded).model_dump(mode="json"),
    )


def cluster_of(grid: Grid) -> ClusterSpec:
    """What the cluster is asked for.

    Raises:
        GridError: ``grid.json`` was changed by hand, and not well.
    """
    try:
        return ClusterSpec.model_validate_json(json.dumps(grid.cluster))
    except ValidationError as error:
        wrong = [f"cluster.{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r:.60}" for e in error.errors()]
        raise GridError("; ".join(wrong)) from error


def recluster(grid: Grid, sets: Sequence[str]) -> Grid:
    """The grid with another cluster block: the only thing about it that may change.

    Args:
        sets: ``cluster.key=value``.

    Raises:
        GridError: another key, or a value that is none for it.
    """
    for text in sets:
        if text.partition("=")[0].strip().split(".")[0] != "cluster":
            raise GridError(f"--set {text}: a grid's jobs stay as they were submitted; only cluster.KEY can be changed")
    changed = Overrides({"cluster": dict(grid.cluster)}, sets, Path.cwd())
    if changed.mistakes:
        raise GridError("; ".join(f"{flag}: {mistake.text}" for flag, mistake in changed.mistakes))
    changed_grid = replace(grid, cluster=changed.data["cluster"])
    return replace(grid, cluster=cluster_of(changed_grid).model_dump(mode="json"))


def identity(grid: Grid) -> str:
    """What makes two grids the same: the recipes' texts, the jobs and their settings; not the cluster's resources."""
    return fingerprint([grid.cwd, list(grid.recipes), [[j.name, j.recipe, j.overrides] for j in grid.jobs]])


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job before its recipe is read."""

    index: int
    name: str
    recipe: int
    overrides: tuple[str, ...]
    settings: Mapping[str, str]


def _drafts(count: int, axes: Sequence[Axis], sets: Sequence[str]) -> list[_Draft]:
    """All jobs, the last axis turning fastest. They are named when their recipes are known."""
    drafts: list[_Draft] = []
    for recipe, values in itertools.product(range(count), itertools.product(*(axis.values for axis in axes))):
        settings = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        overrides = (*sets, *(f"{key}={value}" for key, value in settings.items()))
        drafts.append(_Draft(len(drafts), "", recipe, overrides, settings))
    return drafts


def _read(names: Sequence[str], drafts: Sequence[_Draft]) -> tuple[list[LoadedRecipe], list[FrozenRecipe]]:
    """Every job's recipe, and the files' texts. The message about mistakes names the jobs by their settings.

    Raises:
        GridError: one or more recipes have mistakes, or data or a model that is not there.
    """
    texts: dict[int, LoadedRecipe] = {}
    found: list[LoadedRecipe] = []
    wrong: dict[str, list[str]] = {}
    looked_at: dict[str, str] = {}
    for draft in drafts:
        known = texts.get(draft.recipe)
        try:
            if known is None:
                one = texts[draft.recipe] = load_recipe(names[draft.recipe], draft.overrides)
            else:
                one = load_recipe(str(known.source), draft.overrides, text=known.text)
            found.append(one)
            problem = _look(one, looked_at)
        except RecipeError as error:
            problem = str(error)
            for key in draft.settings:
                problem = problem.replace(f"--set {key}:", f"--grid {key}:")
        if problem:
            wrong.setdefault(problem, []).append(_told(draft, names))
    if wrong:
        raise GridError(_all_wrong(wrong, len(drafts)))
    frozen = [FrozenRecipe(texts[i].recipe.name, str(texts[i].source), texts[i].text) for i in range(len(names))]
    return found, frozen


def _look(one: LoadedRecipe, looked_at: dict[str, str]) -> str:
    """What is wrong with the recipe's data and model as they are on this machine, or nothing; looked at once each."""
    plain = one.recipe.model_dump(mode="json", exclude=set(_NOT_LOOKED_AT))
    vector = one.recipe.vector
    clean = vector.msa.clean if vector.msa is not None and vector.uses("msa") else None
    key = fingerprint(plain, clean, one.recipe.teach is None, str(one.source.parent))
    if key not in looked_at:
        try:
            plan(one)
            looked_at[key] = ""
        except UnlearnError as error:
            looked_at[key] = str(error)
    return looked_at[key]


def _told(draft: _Draft, names: Sequence[str]) -> str:
    settings = [f"{key}={value}" for key, value in draft.settings.items()]
    return ", ".join([*([names[draft.recipe]] if len(names) > 1 or not settings else []), *settings])


def _all_wrong(wrong: Mapping[str, Sequence[str]], count: int) -> str:
    jobs = sum(map(len, wrong.values()))
    lines = [f"nothing was submitted: {jobs} of {count} jobs cannot be run"]
    for problem, who in itertools.islice(wrong.items(), _MOST):
        told = "all jobs" if len(who) == count > 1 else "; ".join(who[:3])
        more = f" and {len(who) - 3} more" if len(who) > 3 and len(who) < count else ""
        lines.append(f"  {told}{more}:\n    " + problem.replace("\n", "\n    "))
    if len(wrong) > _MOST:
        lines.append(f"  and {len(wrong) - _MOST} other mistakes")
    return "\n".join(lines)


def _distinct(frozen: Sequence[FrozenRecipe]) -> None:
    for a, b in itertools.combinations(frozen, 2):
        if a.source == b.source:
            raise GridError(f"--recipe {a.source} is given twice: leave one out")
        if a.name == b.name:
            raise GridError(f"{a.source} and {b.source} are both called {a.name}: give them names of their own")


def _refuse_same(drafts: Sequence[_Draft], loaded: Sequence[LoadedRecipe]) -> None:
    seen: dict[str, str] = {}
    for draft, one in zip(drafts, loaded, strict=True):
        what = fingerprint(one.recipe.model_dump(mode="json", exclude={"cluster"}), str(one.source.parent))
        if what in seen:
            raise GridError(f"two jobs are the same run, {seen[what]} and {draft.name}: leave out what makes them two")
        seen[what] = draft.name


def _named(drafts: Sequence[_Draft], frozen: Sequence[FrozenRecipe], axes: Sequence[Axis]) -> list[_Draft]:
    """Give the jobs names that people can read and every file system takes: ``0003-seed=1_rank=8``."""
    width = max(4, len(str(len(drafts) - 1)))
    keys = short_keys([axis.key for axis in axes])
    found = []
    for draft in drafts:
        parts = [frozen[draft.recipe].name] if len(frozen) > 1 or not axes else []
        parts += [f"{keys[key]}={short_value(value)}" for key, value in draft.settings.items()]
        whole = file_name("_".join(parts))
        found.append(replace(draft, name=f"{draft.index:0{width}}-{whole}".rstrip("-")))
    return found


def _group(drafts: Sequence[_Draft], loaded: Sequence[LoadedRecipe]) -> tuple[list[Job], tuple[Preparation, ...]]:
    """Jobs with the preparation they wait for. What only one job would use it makes itself."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(loaded):
        if key := _shared(one):
            groups.setdefault(key, []).append(i)
    preparations: list[Preparation] = []
    whose: dict[int, int] = {}
    for members in groups.values():
        if len(members) < 2:
            continue
        number, first = len(preparations), drafts[members[0]]
        same = {k: v for k, v in first.settings.items() if all(drafts[i].settings[k] == v for i in members)}
        keys = short_keys(list(first.settings))
        told = "_".join(f"{keys[k]}={short_value(v)}" for k, v in same.items()) or loaded[members[0]].recipe.name
        name = f"p{number:03}-{file_name(told)}"
        overrides, what = _without_cluster(first.overrides), _what(loaded[members[0]])
        preparations.append(Preparation(number, name, first.recipe, overrides, what))
        whose |= dict.fromkeys(members, number)
    jobs = [
        Job(d.index, d.name, d.recipe, _without_cluster(d.overrides), dict(d.settings), whose.get(d.index))
        for d in drafts
    ]
    return jobs, tuple(preparations)


def _shared(one: LoadedRecipe) -> str:
    """The same for two recipes only if they share all that comes before their vectors; empty where nothing does."""
    recipe, base = one.recipe, one.source.parent
    if recipe.teach is not None:  # a trained reference is taught too
        kept = recipe.model_dump(mode="json", exclude={*_NOT_SHARED, "cluster"})
        return fingerprint(kept, str(base))
    model = recipe.model
    return "" if _is_folder(model.path, base) else fingerprint(model.model_dump(mode="json"), str(base))


def _is_folder(path: str, base: Path) -> bool:
    given = Path(path).expanduser()
    try:
        return given.is_dir() or (base / given).is_dir()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _what(one: LoadedRecipe) -> tuple[str, ...]:
    made = {
        "model": not _is_folder(one.recipe.model.path, one.source.parent),
        "target": one.recipe.teach is not None,
        "reference": one.recipe.reference == "train",
    }
    return tuple(name for name, needed in made.items() if needed)


def _without_cluster(overrides: Sequence[str]) -> tuple[str, ...]:
    """What the cluster is asked for is kept once, with the grid: it is no part of what is run and may change."""
    return tuple(text for text in overrides if text.partition("=")[0].strip().split(".")[0] != "cluster")


def _cluster(loaded: Sequence[LoadedRecipe]) -> ClusterSpec:
    blocks = [one.recipe.cluster for one in loaded if one.recipe.cluster is not None]
    if any(block != blocks[0] for block in blocks):
        raise GridError(
            "the recipes ask the cluster for different things, and all jobs are submitted alike: leave the cluster "
            "block in one of them, or set what differs for all with --set cluster.KEY=VALUE"
        )
    return blocks[0] if blocks else ClusterSpec.model_validate({})
