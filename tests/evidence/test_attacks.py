"""Attacks on a run: scores are those of the report, each attack is a stage; how much comes back, by hand."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from attack_arena import Arena
from compared_arena import EVERYONE, copied, made, read, run, same, stages

from unlearn.data.sets import LoadedSet, load_sets
from unlearn.evidence import attacks_ask, lens  # noqa: F401  they register their attacks
from unlearn.evidence.attacks import ATTACKS, Judge, Scene, attack
from unlearn.evidence.attacks_weights import edited_copy, parted
from unlearn.model.load import Loaded, load
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.report.assemble import left_out
from unlearn.report.words import attacks_line
from unlearn.results import (
    CONTRAST,
    GREEDY,
    LENS,
    AttackScore,
    Robustness,
    RunReport,
    Who,
    probing,
    quantisation,
    relearning,
    sampling,
)
from unlearn.score.evaluate import evaluate
from unlearn.score.tasks import build_tasks
from unlearn.vector.task_vector import TaskVector

# --- the judge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize(("kind", "metric"), [("mcq", "acc"), ("qa", "prob"), ("text", "exact_memorisation")])
def test_it_is_the_score_of_the_report(kind: str, metric: str, engine: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind, eval={"engine": engine})
    judge = arena.judge()
    found = judge.read(judge.lm(phi.model))
    built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "others", generate=True)
    whole = evaluate(judge.lm(phi.model), built, model_name="m", bootstrap=0)
    there = {s.metric: s for s in whole.scores}
    assert judge.metric == metric
    assert judge.chance == there[metric].chance
    assert (judge.chance is None) is (kind != "mcq")
    assert metric in found
    for name, score in found.items():
        assert score.value == pytest.approx(there[name].score.value, abs=1e-9)
        assert score.stderr == pytest.approx(there[name].score.stderr, abs=1e-9)
        assert score.higher_is_better is there[name].higher_is_better
        assert len(score.values) == there[name].score.n == len(arena.forget.test)
    assert judge.score(phi.model) == found[metric]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(compared: Path) -> RunReport:
    return read(compared / "run")


@pytest.fixture(scope="module")
def found(report: RunReport) -> Robustness:
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


def test_without_an_attack_the_scores_are_the_report_s(report: RunReport, found: Robustness) -> None:
    """On the same items: there are others enough to relearn, so that all test items are scored."""
    assert (found.set, found.metric) == ("f", "prob")
    for metric, tolerance in (("prob", 1e-5), ("rougeL", 1e-9)):
        (row,) = [r for r in report.scores if (r.set, r.metric) == ("forget", metric)]
        for who, score in zip(EVERYONE, (row.before, row.after, row.reference), strict=True):
            plain = found.plain(who, metric)
            assert plain.value == pytest.approx(score.value, abs=tolerance)
            assert plain.stderr == pytest.approx(score.stderr, abs=tolerance)
            assert plain.n == score.n == 6
            assert plain.higher_is_better


@pytest.mark.parametrize("who", EVERYONE)
def test_each_attack_is_that_attack_on_that_model(
    who: Who,
    compared: Path,
    found: Robustness,
    recipe: Recipe,
    models: Models,
    judge: Judge,
    sets: tuple[LoadedSet, ...],
    tmp_path: Path,
) -> None:
    spec = recipe.robustness
    again, scored = parted(sets[0], sets[0].test, spec.relearn.items, recipe.seed)
    assert scored == sets[0].test
    made: dict[tuple[Any, ...], float] = {}
    for one in ATTACKS.values():
        scene = Scene(who, models.copy(who), judge, spec, sets, again, tmp_path)
        if one.settings(scene) is not None:
            made |= {s.under: s.value for s in one.run(scene)}
    there = {s.under: s.value for s in found.scores if s.who == who}
    assert made.keys() == there.keys()
    for key, value in there.items():  # in 8 bits a score depends a little on what stands beside it in a batch
        assert value == pytest.approx(made[key], abs=1e-3 if key[0] == "quantise" else 1e-4)
    folder = compared / "run" / "robustness" / who
    texts = json.loads((folder / "samples" / "samples.json").read_text(encoding="utf-8"))
    assert [len(t["samples"]) for t in texts] == [2] * 6
    stored = [s for p in sorted(folder.iterdir()) for s in json.loads((p / "scores.json").read_text())]
    assert sorted(map(str, stored)) == sorted(str(asdict(s)) for s in found.scores if s.who == who)


def test_an_attack_from_outside(
    judge: Judge, models: Models, recipe: Recipe, sets: tuple[LoadedSet, ...], tmp_path: Path
) -> None:
    @attack("shouted", lambda scene: [])
    def shouted(scene: Scene) -> list[AttackScore]:
        items = [replace(item, prompt=item.prompt.upper()) for item in scene.judge.items]
        return [scene.judge.asking(items).score(scene.model).entry(scene.who, "shouting", "probe")]

    try:
        scene = Scene("target", models.target.model, judge, recipe.robustness, sets, (), tmp_path)
        (score,) = ATTACKS["shouted"].run(scene)
    finally:
        del ATTACKS["shouted"]
    assert (score.attack, score.who, score.n) == ("shouting", "target", 6)
    assert score.value < judge.score(models.target.model).value


def test_the_table_has_every_attack_of_every_model_in_one_order(found: Robustness) -> None:
    per_model = [[s.under for s in found.scores if s.who == who] for who in EVERYONE]
    assert per_model[0] == per_model[1] == per_model[2]
    kinds = [kind for kind, *_ in per_model[0]]
    assert list(dict.fromkeys(kinds)) == ["none", "probe", "contrast", "sample", "lens", "quantise", "relearn"]
    positions = [(s.kind, s.attack) for s in found.scores]
    assert [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p] == list(dict.fromkeys(positions))


def test_an_attack_that_was_cut_off_is_made_again_alone(
    compared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(compared, tmp_path / "run")
    for name in ("edited/lens", "reference/prefix"):
        shutil.rmtree(folder / "robustness" / name)
    assert run(compared / "recipe.yaml", folder) == 0
    again = {"robustness/edited/lens", "robustness/reference/prefix", "export/adapter"}  # it lies elsewhere
    assert made(folder, capfd.readouterr().err) == again
    assert same(folder) == same(compared / "run")
    assert stages(folder) >= {"reference", "eval/reference", "benchmark/edited", "membership/target"}


def test_what_is_switched_off_is_not_made(phi: Loaded, tmp_path: Path) -> None:
    off = {"quantize": [], "relearn": None, "probes": [], "contrast": False, "samples": 0, "lens": False}
    scene = Arena(phi, tmp_path, "qa").scene(**off)
    assert [name for name, one in ATTACKS.items() if one.settings(scene) is not None] == ["plain"]


EIGHT = relearning(8)


def score(who: Who, value: float, attack: str = "none", kind: Any = "none", **more: Any) -> AttackScore:
    named = {"metric": "acc", "higher_is_better": True, "stderr": 0.01, "n": 50} | more
    return AttackScore(attack, kind, who, value=value, **named)


PLAIN = (score("target", 0.92), score("edited", 0.46))
NF4 = score("edited", 0.4738, quantisation("nf4"), "quantise")
RELEARNT = tuple(score("edited", v, EIGHT, "relearn", steps=n) for n, v in ((1, 0.50), (5, 0.874), (20, 0.851)))


def test_recovered_by_hand() -> None:
    found = Robustness("capitals", "acc", (*PLAIN, NF4, *RELEARNT))
    assert found.recovered(NF4) == pytest.approx(0.03)  # .0138 of .46
    assert found.recovered(RELEARNT[1]) == pytest.approx(0.9)  # .414 of .46
    assert found.recovered(PLAIN[1]) == 0.0
    assert found.recovered(PLAIN[0]) == 0.0  # its own plain score
    assert found.recovered(score("edited", 0.414, "x", "probe")) == pytest.approx(-0.1)


def test_where_lower_is_better() -> None:
    low = {"metric": "perplexity", "higher_is_better": False}
    plain = (score("target", 10.0, **low), score("edited", 50.0, **low))
    back, away = score("edited", 20.0, "a", "quantise", **low), score("edited", 90.0, "b", "quantise", **low)
    found = Robustness("passages", "perplexity", (*plain, away, back))
    assert found.recovered(back) == pytest.approx(0.75)
    assert found.recovered(away) == pytest.approx(-1.0)
    assert attacks_line(found) == (
        "Of what was forgotten (perplexity 10.00 to 50.00), 75 % comes back with a; with 1 other attack nothing that "
        "can be told from chance."
    )


@pytest.mark.parametrize(
    ("target", "edited", "stderr", "told"),
    [
        (0.5, 0.5, None, False),  # nothing was forgotten
        (0.5, 0.5 - 1e-10, None, False),  # rounding
        (0.5, 0.5 - 1e-8, None, True),
        (0.50, 0.48, 0.03, False),  # less than hypot(.03, .03) = .042
        (0.50, 0.46, 0.03, False),
        (0.50, 0.45, 0.03, True),
        (0.45, 0.50, 0.03, False),  # the edit made it better
        (0.5, math.nan, None, False),
    ],
)
def test_nothing_comes_back_of_nothing(target: float, edited: float, stderr: float | None, told: bool) -> None:
    attack = score("edited", 0.6, "x", "probe", stderr=stderr)
    found = Robustness(
        "s", "acc", (score("target", target, stderr=stderr), score("edited", edited, stderr=stderr), attack)
    )
    assert (found.recovered(attack) is not None) is told
    assert ("forgot nothing that can be told from chance" in attacks_line(found)) is not told


def test_missing_scores() -> None:
    assert attacks_line(Robustness("s", "acc", ())) == ""
    assert attacks_line(Robustness("s", "acc", PLAIN)) == ""  # no attack, nothing to say
    for only in PLAIN:
        found = Robustness("s", "acc", (only, NF4))
        assert found.recovered(NF4) is None
        assert "is missing" in attacks_line(found)
    other = replace(NF4, metric="leak")  # a metric without plain scores of its own
    found = Robustness("s", "acc", (*PLAIN, other, RELEARNT[0]))
    assert found.recovered(other) is None
    assert "leak" not in attacks_line(found)


def test_what_was_asked_for_and_not_made_is_said() -> None:
    plain = {"name": "r", "model": {"path": "pico:phi"}, "forget": {"path": "t.txt", "kind": "text"}}
    recipe = Recipe.model_validate_json(json.dumps({**plain, "robustness": {"quantize": []}}))
    prefix = score("edited", 0.2, probing("prefix"), "probe")
    assert left_out(recipe, Robustness("t", "acc", (*PLAIN, prefix))) == (
        "left out, because these data or this model do not allow it: other wordings, solved examples in the prompt, "
        "templates in other languages, relearning on unrelated texts, a choice beside the same question about others, "
        "the logit lens",
    )
    made: list[tuple[str, str]] = [(probing(name), "probe") for name in ("paraphrase", "few_shot", "template")]
    made += [(relearning(4, True), "relearn"), (LENS, "lens"), (CONTRAST, "contrast")]
    whole = (prefix, *(score("edited", 0.2, *one) for one in made))
    assert left_out(recipe, Robustness("t", "acc", whole)) == left_out(recipe, None) == ()


def test_the_sentence() -> None:
    rouge = {"metric": "rougeL"}
    samples = score("edited", 0.5, sampling(8), "sample", **rouge)
    layers = tuple(score("edited", v, LENS, "lens", layer=n) for n, v in ((1, 0.1), (2, 0.69), (3, 0.46)))
    greedy = (score("target", 0.8, GREEDY, **rouge), score("edited", 0.3, GREEDY, **rouge))
    found = Robustness("capitals", "acc", (*PLAIN, *greedy, NF4, *RELEARNT, samples, *layers))
    assert attacks_line(found) == (
        "Of what was forgotten (accuracy 0.92 to 0.46), 85 % comes back with 20 steps of relearning on 8 forgotten "
        "items, 50 % with layer 2 of the logit lens and 40 % (ROUGE-L) with the best of 8 samples; with 1 other attack "
        "nothing that can be told from chance."
    )
    knew_nothing = (
        score("reference", 0.40),
        replace(NF4, who="reference", value=0.41),
        *(replace(s, who="reference", value=s.value - 0.1) for s in RELEARNT),
    )
    told = attacks_line(Robustness("capitals", "acc", (*found.scores, *knew_nothing)))
    assert told.startswith(attacks_line(found))
    assert told.removeprefix(attacks_line(found)) == (
        " The retain reference, which never knew it, goes from 0.40 to 0.75 under 20 steps of relearning on 8 "
        "forgotten items. What it gains as well is learned anew, not brought back."
    )
    nothing = attacks_line(Robustness("capitals", "acc", (*PLAIN, NF4, *knew_nothing[:2])))
    assert nothing.endswith("the one attack brings nothing back that can be told from chance."), "nor is it named"
