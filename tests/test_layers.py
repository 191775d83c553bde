"""Imports go down and never up, the task pack stands alone, and what must be quick imports nothing slow."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module may import what stands before it, in its own layer or in an earlier one.
LAYERS: dict[str, str] = {
    "ground": "errors layers quiet redact console stopping collective memory distributed silence wording",
    "values": "template recipe_data recipe_training recipe_vector recipe_bench recipe_cluster recipe_eval recipe "
    "attacks attacks.values report changes compress shards vector_file vector",
    "recipes": "yaml_core recipe_schema recipe_check overrides assets recipe_io",
    "words": "metrics collapse search formula report_figures report_text prediction evidence_text",
    "numbers": "benchmarks benchmarks.samples_in benchmarks.membership benchmarks.tofu benchmarks.muse",
    "folders": "atomic holder seen stage lock_file lock_watch lock ownership rundir provenance pool grids grids.grid "
    "grids.axes grids.job_state grids.submissions",
    "models": "cache hub wheel convert pico fetch model_place models",
    "data": "readers rows items batches encoding data item_files board_runs member_files references checks",
    "vectors": "vector_adapter adapter_writer architecture checkpoint_vector vector_table methods "
    "methods.contrast methods.checks methods.msa methods.project methods.ext_sub methods.ethos methods.perta "
    "methods.consensus methods.lines methods.random_vector methods.learned methods.rescale negate "
    "dealing checkpoints methods.baselines methods.retain_kl frozen precision importance learn_weights shaping "
    "objectives trainer_arguments trainer finetune correlation token_scores foresight",
    "scores": "tree attention forward decoding scoring sampled named_tasks tasks benchmark_tasks stderrs "
    "eval_files evaluate samples",
    "choices": "bisect_search joint",
    "exports": "card_results card rounding survival export push checkpoint_files stored_names streamed",
    "attacks": "attacks.judge attacks.quantised attacks.relearn attacks.probes attacks.sampling attacks.lens",
    "pages": "markup axes drawing charts html_parts foresight_page evidence_page html table grids.numbers "
    "grids.runs grids.compare grids.groups grids.words grids.csv grids.charts grids.page_tables "
    "grids.page",
    "commands": "plan_evidence plan plan_memory stages score_files scored fitted foreseen members "
    "compared attacked pipeline grids.report execute run grids.slurm_options grids.slurm_queue grids.devices job "
    "grids.slurm_jobs grids.local_jobs grids.states grids.status grids.plan grids.submit submit harness "
    "vectors apply boards leaderboard unlearn",
}
ORDER = [name if name == "unlearn" else f"unlearn.{name}" for layer in LAYERS.values() for name in layer.split()]
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


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(modules())
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_down(name: str) -> None:
    ours = modules()
    used = {target for target in imported(ours[name]) if target in ours and target != "unlearn"}
    assert used <= set(ORDER[: ORDER.index(name)])
    if name != "unlearn":
        # the package itself is the top: from below only its modules may be asked for, by name
        public = {t for t in imported(ours[name]) if t.startswith("unlearn.") and t.rpartition(".")[0] == "unlearn"}
        assert public <= set(ours)


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
        "errors",
        "recipe",
        "report",
        "console",
        "assets",
        "recipe_io",
        "plan",
        "run",
        "execute",
        "rundir",
        "html",
        "vectors",
        "apply",
        "leaderboard",
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
