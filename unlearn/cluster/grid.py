"""A grid: one recipe (or several) times settings, as jobs that anybody can read in ``grid.json``.

The file freezes what is run: the recipes' texts as they were, the folder that relative paths count from, and per job
the settings. Changing a recipe after its jobs were submitted changes nothing about them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn.errors import GridError
from unlearn.store.files import explained, write_json_atomic

GRID_FILE, POOL = "grid.json", "pool"
GRID_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FrozenRecipe:
    """A recipe as it was when the grid was made: its name, its file (absolute) and that file's text."""

    name: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """One ``--grid key=value,value``; values are YAML as written."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What several jobs share (the model, a teaching, a reference), made once before them."""

    index: int
    name: str
    recipe: int
    overrides: tuple[str, ...]
    what: tuple[str, ...]  # of: model, target, reference


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the grid. ``settings`` has the value of every axis; ``preparation`` is an index, or None."""

    index: int
    name: str
    recipe: int
    overrides: tuple[str, ...]
    settings: Mapping[str, str]
    preparation: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    """All of it. ``cluster`` is the recipe's block of that name, as plain values; ``cwd`` where it was submitted."""

    name: str
    created: str
    cwd: str
    recipes: tuple[FrozenRecipe, ...]
    axes: tuple[Axis, ...]
    preparations: tuple[Preparation, ...]
    jobs: tuple[Job, ...]
    cluster: Mapping[str, Any] = field(default_factory=dict)

    def save(self, root: Path) -> None:
        """Write ``grid.json``.

        Raises:
            RunFolderError: the place cannot be written, or is full.
        """
        root.mkdir(parents=True, exist_ok=True)
        write_json_atomic(root / GRID_FILE, {"schema": GRID_SCHEMA, **{k: getattr(self, k) for k in self.__slots__}})

    @classmethod
    def load(cls, root: Path) -> Grid:
        """Read ``grid.json``.

        Raises:
            GridError: there is none, or it is damaged or of a later version.
        """
        path = root / GRID_FILE
        try:
            with explained(path):
                data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if data is None:
                raise GridError(f"{root} is not the folder of a grid: it has no {GRID_FILE}")
            if data["schema"] != GRID_SCHEMA:
                raise GridError(f"{path}: written by a later version of this program (schema {data['schema']!r})")
            for name in (data["name"], *(one["name"] for one in (*data["preparations"], *data["jobs"]))):
                _require_plain(name)
            return cls(
                **{k: str(data[k]) for k in ("name", "created", "cwd")},
                recipes=tuple(FrozenRecipe(**r) for r in data["recipes"]),
                axes=tuple(Axis(a["key"], tuple(a["values"])) for a in data["axes"]),
                preparations=tuple(
                    Preparation(**{**p, "overrides": tuple(p["overrides"]), "what": tuple(p["what"])})
                    for p in data["preparations"]
                ),
                jobs=tuple(Job(**{**j, "overrides": tuple(j["overrides"])}) for j in data["jobs"]),
                cluster=data["cluster"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise GridError(f"{path}: damaged: {e}") from e


def _require_plain(name: Any) -> None:
    """A job's name is the name of its folder and files: in a grid of somebody else's it must not lead elsewhere.

    Raises:
        ValueError: it is no plain name.
    """
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name and "\\" not in name
    if not plain or name.startswith(".") or not name:
        raise ValueError(f"{name!r} is no name of a job")


def job_folder(root: Path, name: str) -> Path:
    """The run folder of a job."""
    return root / "jobs" / name


def preparation_folder(root: Path, name: str) -> Path:
    """The run folder of a preparation."""
    return root / "prepare" / name


def log_file(root: Path, name: str) -> Path:
    """What a job or a preparation printed, all attempts one after the other."""
    return root / "logs" / f"{name}.log"
