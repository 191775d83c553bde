"""The stage of attacks: plain scores are the report's, every attack is the attack by itself, and each is a stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compared_arena import copied, made, read, run, write_data, write_recipe

from unlearn.data.sets import LoadedSet, load_sets
from unlearn.evidence.attacks import Judge
from unlearn.evidence.attacks_ask import ask, sample, wordings
from unlearn.evidence.attacks_weights import edited_copy, forgotten_rows, parted, quantised, relearn, unrelated_rows
from unlearn.evidence.lens import logit_lens
from unlearn.model.load import Loaded, load
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.results import AttackScore, Robustness, RunReport, Who
from unlearn.vector.edit import applied
from unlearn.vector.task_vector import TaskVector

EVERYONE: tuple[Who, ...] = ("target", "edited", "reference")


@pytest.fixture(scope="module")
def report(compared: Path) -> RunReport:
    return read(compared / "run")


@pytest.fixture(scope="module")
def found(report: RunReport) -> Robustness:
    assert report.robustness is not None
    return report.robustness


@pytest.fixture(scope="module")
def recipe(compared: Path) -> Recipe:
    return load_recipe(str(compared / "recipe.yaml")).recipe


class Models:
    """The run's models, loaded from its folders; the edited one has the vector put on it here."""

    def __init__(self, run_folder: Path, coefficient: float) -> None:
        spec = ModelSpec(path=str(run_folder), device="cpu", dtype="float32")
        self.target = load(spec, str(run_folder / "target"))
        self.reference = load(spec, str(run_folder / "reference"))
        self.vector = TaskVector.load(run_folder / "vectors" / "edit" / "vector.safetensors")
        self.coefficient = coefficient

    def copy(self, who: Who) -> Any:
        one: Loaded = self.reference if who == "reference" else self.target
        return edited_copy(one.model, self.vector if who == "edited" else None, self.coefficient)


@pytest.fixture(scope="module")
def models(compared: Path, report: RunReport) -> Models:
    return Models(compared / "run", report.chosen.coefficient)


@pytest.fixture(scope="module")
def sets(compared: Path, recipe: Recipe, models: Models) -> tuple[LoadedSet, ...]:
    return load_sets(recipe, compared, models.target.tokenizer)


@pytest.fixture
def judge(recipe: Recipe, models: Models, sets: tuple[LoadedSet, ...], tmp_path: Path) -> Judge:
    return Judge(sets[0], sets[0].test, models.target.tokenizer, tmp_path / "items", recipe)


def of(found: Robustness, who: Who, kind: str, **more: Any) -> list[AttackScore]:
    wanted = {"who": who, "kind": kind, **more}
    return [s for s in found.scores if all(getattr(s, key) == value for key, value in wanted.items())]


# --- figures ---------------------------------------------------------------------------------------------------------


def test_without_an_attack_the_scores_are_the_report_s(report: RunReport, found: Robustness) -> None:
    """On the same items: there are others enough to relearn, so that all test items are scored."""
    (row,) = [r for r in report.scores if (r.set, r.metric) == ("forget", "prob")]
    assert (found.set, found.metric) == ("f", "prob")
    for who, score in zip(EVERYONE, (row.before, row.after, row.reference), strict=True):
        plain = found.plain(who)
        assert plain is not None
        assert score is not None
        assert plain.value == pytest.approx(score.value, abs=1e-5)
        assert plain.stderr == pytest.approx(score.stderr, abs=1e-5)
        assert plain.n == score.n == 6
        assert plain.higher_is_better
    (rouge,) = [r for r in report.scores if (r.set, r.metric) == ("forget", "rougeL")]
    for who, score in zip(EVERYONE, (rouge.before, rouge.after, rouge.reference), strict=True):
        greedy = found.plain(who, "rougeL")
        assert greedy is not None
        assert score is not None
        assert greedy.value == pytest.approx(score.value, abs=1e-9)


@pytest.mark.parametrize("who", EVERYONE)
def test_each_attack_is_that_attack_on_that_model(
    who: Who, found: Robustness, recipe: Recipe, models: Models, judge: Judge, sets: tuple[LoadedSet, ...]
) -> None:
    spec = recipe.robustness
    assert spec is not None
    assert spec.relearn is not None
    model = models.copy(who)

    for probe in spec.probes:
        asked = ask(model, judge, wordings(probe, "qa", judge.items, sets, recipe.seed))
        for entry in asked.entries(probe, who):
            (one,) = of(found, who, "probe", attack=entry.attack)
            assert one.value == pytest.approx(entry.value, abs=1e-4)

    drawn = sample(model, judge, spec.samples, spec.temperature, recipe.seed)
    (best,) = of(found, who, "sample")
    assert best.value == pytest.approx(drawn.best.value, abs=1e-6)

    layers = logit_lens(model, judge)
    assert layers is not None
    assert [(s.layer, pytest.approx(s.value, abs=1e-4)) for s in of(found, who, "lens")] == [
        (layer, score.value) for layer, score in layers
    ]

    again, scored = parted(sets[0], sets[0].test, spec.relearn.items, recipe.seed)
    assert scored == sets[0].test
    tokenizer = models.target.tokenizer
    length = recipe.vector.forget.max_length
    rows = forgotten_rows(sets[0], again, tokenizer, length)
    curve = relearn(models.copy(who), tokenizer, rows, spec.relearn, recipe.seed, judge)
    name = "relearning on 2 forgotten items"
    assert [(s.steps, pytest.approx(s.value, abs=1e-4)) for s in of(found, who, "relearn", attack=name)] == [
        (steps, score.value) for steps, score in curve
    ]
    others = unrelated_rows(sets, spec.relearn.items, recipe.seed, tokenizer, length)
    curve = relearn(models.copy(who), tokenizer, others, spec.relearn, recipe.seed, judge)
    name = "relearning on 2 unrelated texts"
    assert [(s.steps, pytest.approx(s.value, abs=1e-4)) for s in of(found, who, "relearn", attack=name)] == [
        (steps, score.value) for steps, score in curve
    ]

    with quantised(models.copy(who), "int8") as small:
        (eight,) = of(found, who, "quantise")
        assert eight.value == pytest.approx(judge.score(small).value, abs=1e-3)


def test_the_edited_model_is_the_target_under_the_edit(found: Robustness, models: Models, judge: Judge) -> None:
    with applied(models.target.model, models.vector, -models.coefficient):
        under = judge.score(models.target.model)
    plain = found.plain("edited")
    assert plain is not None
    assert plain.value == pytest.approx(under.value, abs=1e-5)
    assert judge.score(models.target.model).value > under.value + 0.05  # and it is taken off again


def test_the_table_has_every_attack_of_every_model_in_one_order(found: Robustness) -> None:
    per_model = [
        [(s.kind, s.attack, s.metric, s.steps, s.layer) for s in found.scores if s.who == who] for who in EVERYONE
    ]
    assert per_model[0] == per_model[1] == per_model[2]
    kinds = [kind for kind, *_ in per_model[0]]
    assert list(dict.fromkeys(kinds)) == ["none", "probe", "sample", "lens", "quantise", "relearn"]
    positions = [(s.kind, s.attack) for s in found.scores]
    assert [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p] == list(dict.fromkeys(positions))


def test_values_of_each_item_are_kept(compared: Path, found: Robustness) -> None:
    for who in EVERYONE:
        folder = compared / "run" / "robustness" / who
        texts = json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))
        assert len(texts) == 6
        assert all(len(t["samples"]) == 2 for t in texts)
        stored = [s for p in sorted(folder.iterdir()) for s in json.loads((p / "scores.json").read_text())]
        assert sorted(map(str, stored)) == sorted(str(s) for s in found.to_json()["scores"] if s["who"] == who)


# --- stages ----------------------------------------------------------------------------------------------------------


def test_an_attack_that_was_cut_off_is_made_again_alone(
    compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(compared, tmp_path / "run")
    for name in ("edited/lens", "reference/prefix"):
        shutil.rmtree(folder / "robustness" / name)
    assert run(compared / "recipe.yaml", folder) == 0
    again = {"robustness/edited/lens", "robustness/reference/prefix", "export/adapter"}  # it lies elsewhere
    assert made(folder, capfd.readouterr().err) == again
    assert read(folder).robustness == read(compared / "run").robustness


@pytest.fixture
def small(compared: Path, tmp_path: Path) -> Iterator[Any]:
    """Run the recipe with other attacks, beside what was made before; the result's attacks."""
    write_data(tmp_path)

    def go(robustness: dict[str, Any], **more: Any) -> Robustness | None:
        changed = {"reference": None, "benchmark": None, "holdout": None, **more}
        path = write_recipe(tmp_path, reuse=[str(compared / "run")], robustness=robustness, **changed)
        assert run(path, tmp_path / "run") == 0
        return read(tmp_path / "run").robustness

    return go


NOTHING: dict[str, Any] = {"quantize": [], "relearn": None, "probes": [], "samples": 0, "lens": False}


def test_no_attack_at_all(small: Any, found: Robustness) -> None:
    got = small(NOTHING)
    assert [(s.who, s.kind) for s in got.scores] == [("target", "none"), ("edited", "none")]
    assert [s.value for s in got.scores] == [found.plain(who).value for who in ("target", "edited")]  # type: ignore[union-attr]
    assert got.sentence() == ""


def test_items_are_limited_and_one_item_has_no_error(small: Any) -> None:
    got = small({**NOTHING, "items": 1, "lens": True})
    assert {(s.n, s.stderr) for s in got.scores} == {(1, None)}
    assert {s.kind for s in got.scores} == {"none", "lens"}


def test_few_shots_need_a_retain_set_and_unrelated_texts_a_utility_set(small: Any) -> None:
    """What does not apply is left out."""
    alone = {**NOTHING, "probes": ["few_shot"], "relearn": {"items": 2, "steps": [1]}}
    got = small(alone, retain=None, utility=None, teach=None, vector={"forget": {"steps": 2}, "lora": {"rank": 2}})
    assert {s.attack for s in got.scores if s.kind != "none"} == {"relearning on 2 forgotten items"}
