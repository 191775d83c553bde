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
    ("run", "cluster", "cli", "api", "__main__", "unlearn"),
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
def test_the_task_pack_stands_alone(path: Path) -> None:
    """lm-eval and what it brings is all that is there when someone uses the pack without this package."""
    allowed = {*sys.stdlib_module_names, "lm_eval", "datasets", "numpy", "rouge_score", "transformers"}
    assert {name.split(".")[0] for name in imported(path)} <= allowed
    assert path.name != "__init__.py"


# Nothing of ours is imported before a process has parted from this one: each begins as a new interpreter would.
EACH = """
import json, os, sys
for statement in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        exec(statement)
        print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, statement
"""
QUICK = (
    *("errors", "results", "console", "plan.words", "cli", "execute", "recipe.schema", "recipe.load", "store.stages"),
    *("report.page", "vector.command", "evidence.boards", "cluster.plan", "cluster.job", "cluster.compare"),
)


def test_only_what_needs_it_imports_what_is_slow() -> None:
    statements = [f"import unlearn.{name}" for name in QUICK]
    statements += ["from unlearn import Recipe, run", "from unlearn import TaskVector"]
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(statements), capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = {name: set(json.loads(line)) for name, line in zip(statements, done.stdout.splitlines(), strict=True)}
    assert "torch" in loaded.pop("from unlearn import TaskVector")
    assert all("unlearn" in names for names in loaded.values())
    assert not {name: names & HEAVY for name, names in loaded.items() if names & HEAVY}
