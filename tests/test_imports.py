"""Imports go down and never up, the task pack stands alone, and what must be quick imports nothing slow."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up: a module imports from its own package, and from those that stand before it.
ORDER = (
    ("errors", "text", "console", "processes", "results"),
    ("store",),
    ("recipe",),
    ("data", "model"),
    ("vector",),
    ("train",),
    ("score",),
    ("evidence",),
    ("report",),
    ("plan", "pipeline", "execute"),
    ("run", "cluster", "cli", "__main__", "unlearn"),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# On the way to --help, --dry-run, --schema and --list, which answer in half a second.
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "peft",
    "lm_eval",
    "accelerate",
    "pandas",
    "pyarrow",
    "numpy",
    "safetensors",
    "matplotlib",
    "jinja2",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name. A data folder of the wheel is none."""
    found = {}
    for path in (ROOT / "unlearn").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in ("eval", "recipes"):
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it; of ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: imports are absolute here"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(name: str) -> str:
    """The package, or the module that stands beside the packages."""
    return name.split(".")[1] if "." in name else name


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in modules()} == set(LEVEL)


def test_imports_go_down() -> None:
    ours = modules()
    arrows = {
        (room(name), room(used)) for name, path in ours.items() for used in imported(path) & ours.keys() - {"unlearn"}
    }
    assert not {(a, b) for a, b in arrows if LEVEL[a] < LEVEL[b]}


@pytest.mark.parametrize("path", sorted((ROOT / "eval").rglob("*.py")), ids=lambda path: path.name)
def test_the_task_pack_imports_nothing_of_ours(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] in ("unlearn", "tests", "eval")]
    # lm-eval and what it brings is all that is there when someone uses the pack without this package
    allowed = {*sys.stdlib_module_names, "lm_eval", "datasets", "numpy", "rouge_score", "transformers"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_the_task_pack_is_no_package() -> None:
    assert not list((ROOT / "eval").rglob("__init__.py"))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "name",
    [
        *("errors", "results", "console", "plan.words", "cli", "execute"),
        *("recipe.schema", "recipe.load", "store.stages", "report.page"),
        *("vector.command", "evidence.boards", "cluster.command"),
    ],
)
def test_quick_commands_import_nothing_slow(name: str) -> None:
    got = loaded_by(f"import unlearn.{name}")
    assert "unlearn" in got
    assert not got & HEAVY


def test_the_package_imports_nothing_slow_until_it_is_asked() -> None:
    got = loaded_by("import unlearn\nfrom unlearn import Recipe, run")
    assert "pydantic" in got
    assert not got & HEAVY
    assert "torch" in loaded_by("from unlearn import TaskVector")
