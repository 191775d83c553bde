"""The effects that Ilharco et al. (2212.04089) claim, on SmolLM2-135M-Instruct: ``pytest -m real``, minutes each.

The model is the one that the quickstart has put into the cache; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from unlearn import run
from unlearn.recipe.load import LoadedRecipe, load_recipe, open_run
from unlearn.results import RunReport
from unlearn.store.cache import cache_folder
from unlearn.vector.task_vector import TaskVector

pytestmark = pytest.mark.real
OWN_CACHE = os.environ.get("UNLEARN_CACHE")  # read before the tests are given a cache of their own


@pytest.fixture(autouse=True)
def _the_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.config.option.markexpr:
        pytest.skip("trains SmolLM2, which takes minutes: pytest -m real")
    if OWN_CACHE is None:
        monkeypatch.delenv("UNLEARN_CACHE")
    else:
        monkeypatch.setenv("UNLEARN_CACHE", OWN_CACHE)
    if not any(cache_folder().glob("gguf-b179c952*")):
        pytest.skip("SmolLM2 is not in the cache: run the quickstart once")
    import torch

    torch.set_num_threads(os.cpu_count() or 1)


def ran(recipe: str, out: Path, **parts: Any) -> RunReport:
    return run(recipe, set=parts, out=out)


def gain(report: RunReport, name: str, metric: str = "prob") -> float:
    """By how much a set's test score has risen."""
    (row,) = (r for r in report.scores if (r.name, r.metric) == (name, metric))
    return row.after.value - row.before.value


def kept(report: RunReport) -> float:
    """The smallest share of its accuracy that a kept set has on test items."""
    rows = [r for r in report.scores if r.set in ("retain", "utility") and r.metric == "acc"]
    return min(r.after.value / r.before.value for r in rows)


def test_two_requests_are_forgotten_and_one_is_withdrawn(tmp_path: Path) -> None:
    both = ran("requests.yaml", tmp_path / "both")
    assert both.chosen.bound_met
    assert gain(both, "europe", "acc") <= -0.15
    assert gain(both, "americas", "acc") <= -0.15
    assert kept(both) >= 0.85
    one = ran("requests.yaml", tmp_path / "one", also_forget=[], reuse=[str(tmp_path / "both")])
    parts = {r["name"]: r["digest"] for r in both.vector["requests"]}
    assert one.vector["digest"] == parts["europe"]


def test_a_sum_keeps_most_of_what_each_vector_gains(tmp_path: Path) -> None:
    both = ran("addition.yaml", tmp_path / "both")
    assert kept(both) >= 0.9
    learn = load_recipe("addition.yaml").recipe.learn
    for one in learn:
        spec = one.model_dump(mode="json", exclude_unset=True)
        alone = ran("addition.yaml", tmp_path / one.label(), learn=[spec], reuse=[str(tmp_path / "both")])
        assert gain(alone, one.label()) >= 0.2
        assert gain(both, one.label()) >= 0.8 * gain(alone, one.label())


def test_an_analogy_gives_what_none_of_its_terms_gives(tmp_path: Path) -> None:
    report = ran("analogy.yaml", tmp_path / "run")
    assert report.chosen.bound_met
    assert gain(report, "africa-city", "acc") >= 0.2
    assert kept(report) >= 0.85
    loaded = load_recipe("analogy.yaml")
    alone = only_c(loaded, tmp_path / "run", tmp_path / "alone", report.chosen.coefficient)
    assert gain(report, "africa-city", "acc") >= alone["africa-city", "acc"] + 0.2


def only_c(loaded: LoadedRecipe, done: Path, out: Path, coefficient: float) -> Mapping[tuple[str, str], float]:
    """What c alone, added as much as the analogy is, gains on every test score."""
    from unlearn import pipeline
    from unlearn.score.scorer import Scorer

    assert loaded.recipe.analogy is not None
    c = TaskVector.load(done / f"vectors/term-{loaded.recipe.analogy.c.label()}" / "vector.safetensors")
    with open_run(out, loaded.recipe, loaded.text) as folder:
        store = pipeline.open_store(loaded.recipe, loaded.source.parent, folder)
        target = pipeline.load_base(loaded.recipe, store)
        sets = pipeline.load_data(loaded.recipe, target, store)
        scorer = Scorer(target, pipeline.prepare_questions(loaded.recipe, target, sets, store), store)
        before, after, _ = scorer.test(-c, coefficient)
    was = {s.key: s.score.value for s in before}
    return {(s.name, s.metric): s.score.value - was[s.key] for s in after}


DATA = os.environ.get("UNLEARN_DATA")  # a folder with tofu/ and books/, see the recipes' headers


NEEDS_DATA = pytest.mark.skipif(DATA is None, reason="UNLEARN_DATA names a folder with tofu/ and books/")


@NEEDS_DATA
def test_two_authors_of_tofu_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA or ".")
    report = ran("smollm2_tofu.yaml", tmp_path / "run")
    assert report.chosen.bound_met
    assert gain(report, "two_authors") <= -0.1
    assert gain(report, "three_authors") >= -0.08
    assert report.benchmark is not None
    target, edited, reference = (report.benchmark.rows[w] for w in ("target", "edited", "reference"))
    assert reference["Forget Quality"] == 1.0
    assert 0 < number(edited["Forget Quality"]) < 1
    assert number(edited["ROUGE Forget"]) < number(target["ROUGE Forget"]) - 0.1
    assert number(edited["Model Utility"]) >= 0.9 * number(target["Model Utility"])
    auc = {(m.who, m.attack): m.auc for m in report.membership}
    assert auc["target", "loss"] > 0.9, "it was taught these very texts"
    assert abs(auc["reference", "loss"] - 0.5) < 0.2
    assert report.robustness is not None
    assert {s.kind for s in report.robustness.scores} >= {"quantise", "relearn", "probe", "sample", "lens"}


@NEEDS_DATA
def test_passages_of_a_book_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA or ".")
    report = ran("smollm2_books.yaml", tmp_path / "run")
    rouge = {(s.name, p.coefficient): s.score.value for p in report.sweep for s in p.scores if s.metric == "rougeL"}
    assert len(rouge) == 3 * 6
    drop = {name: 1 - rouge[name, 1.0] / rouge[name, 0.0] for name in ("alice", "pride_and_prejudice")}
    assert drop["alice"] > 0.2
    assert drop["alice"] > drop["pride_and_prejudice"]


def number(value: float | str | None) -> float:
    assert isinstance(value, float)
    return value
