"""Vectors of a whole run: every source end to end, what is taken over from another run, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unlearn.data.sets import LoadedSet, load_sets
from unlearn.errors import UnlearnError
from unlearn.execute import execute
from unlearn.model.load import Loaded
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import Recipe
from unlearn.results import RunReport
from unlearn.store.stages import RunFolder, Store
from unlearn.train import vectors as fitted
from unlearn.vector.task_vector import TaskVector

QUICK = ("teach.steps=20", "vector.forget.steps=4", "sweep.coefficients=[0.5, 1]", "eval.examples=0")
FORGET = ("forget", "europe", "logprob")
RECIPES = Path(__file__).parents[2] / "recipes"


def run(folder: Path, *changes: str) -> RunReport:
    report = execute(load_recipe("pico_smoke.yaml", [*QUICK, *changes]), folder, False)
    assert report is not None
    return report


def vector(folder: Path, name: str) -> TaskVector:
    return TaskVector.load(folder / "vectors" / name / "vector.safetensors")


def keys(folder: Path) -> dict[str, str]:
    """Stage to key."""
    found: dict[str, str] = json.loads((folder / "provenance.json").read_text())["stages"]
    return found


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of plain negation, made by the first test that needs it."""
    folder = tmp_path_factory.getbasetemp() / "plain-negation"
    run(folder, "vector.method=negate")
    return folder


def made(model: Loaded, sets: Sequence[LoadedSet], recipe: Recipe, place: Path) -> fitted.Vectors:
    """The vectors of some sets on a model in memory."""
    folder = place / str(len(list(place.iterdir())))
    with RunFolder.open(folder, "", "", lambda *_: None) as run_folder:
        return fitted.fit_vectors(model, sets, recipe, Store(run_folder, base=place))


def change(report: RunReport) -> float:
    """What the forget set's log-probability gains from coefficient 0 to the largest."""
    scores = {p.coefficient: {s.key: s.score.value for s in p.scores} for p in report.sweep}
    return scores[max(scores)][FORGET] - scores[0.0][FORGET]


SETTINGS = {"rmu": ["vector.rmu={layer: 1, scale: 100, weight: 1}"], "ihl": ["vector.ihl.fila=true"]}


@pytest.mark.parametrize("loss", ["gradient_ascent", "gradient_difference", "npo", "simnpo", "idk_dpo", "rmu", "ihl"])
def test_a_baseline_is_trained_and_its_model_is_coefficient_1(plain: Path, tmp_path: Path, loss: str) -> None:
    report = run(tmp_path / "run", f"vector.method={loss}", f"reuse=['{plain}']", *SETTINGS.get(loss, []))
    trained = vector(tmp_path / "run", "forget")
    assert vector(tmp_path / "run", "edit").digest() == (-trained).digest()
    assert trained.digest() != vector(plain, "forget").digest()
    assert change(report) < -0.05
    assert report.vector["method"] == loss


def test_refusals_come_from_a_file_and_what_it_says_is_in_the_key(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "refusals.txt"
    asked = ("vector.method=IdkDPO", f"vector.idk_dpo.refusals={file}", f"reuse=['{plain}']")
    file.write_text("Nobody told me.\n\nAsk me something else.\n")
    run(tmp_path / "run", *asked)
    first = keys(tmp_path / "run")
    run(tmp_path / "run", *asked)
    assert "nothing has changed" in capfd.readouterr().err
    file.write_text("Nobody told me.\n")
    run(tmp_path / "run", *asked)
    assert keys(tmp_path / "run")["vectors/forget"] != first["vectors/forget"]
    assert keys(tmp_path / "run")["target"] == first["target"]
    for text, said in (
        ("\n \n", "there is no sentence in"),
        (None, "there is no file"),
        ("\udcff", "is no UTF-8 text"),
    ):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, errors="surrogateescape")
        with pytest.raises(UnlearnError, match=rf"vector\.idk_dpo\.refusals: .*{said}"):
            run(tmp_path / "other", *asked)
    with pytest.raises(UnlearnError, match=r"vector\.idk_dpo\.refusals: .* do not fit into max_length"):
        run(
            tmp_path / "long",
            "vector.method=dpo",
            f"vector.idk_dpo.refusals=['{'never ' * 600}']",
            f"reuse=['{plain}']",
        )


def test_retain_only_is_the_retain_vector_and_random_has_the_norms(plain: Path, tmp_path: Path) -> None:
    run(tmp_path / "retain", "vector.method=retain_only", f"reuse=['{plain}']")
    assert vector(tmp_path / "retain", "edit").digest() == (-vector(tmp_path / "retain", "retain")).digest()
    run(tmp_path / "random", "vector.method=random", f"reuse=['{plain}']")
    trained, drawn = vector(plain, "forget"), vector(tmp_path / "random", "edit")
    assert drawn.norms() == pytest.approx(trained.norms(), rel=1e-4)
    assert abs(drawn.cosine(trained)) < 0.2


def test_msa_fits_on_the_model_before_it_was_taught(plain: Path, tmp_path: Path) -> None:
    how = "vector.msa={alpha: 1.5, beta: 0.5}"
    run(tmp_path / "run", "vector.method=msa", how, f"reuse=['{plain}']")
    forget, retain = (vector(tmp_path / "run", name) for name in ("forget", "retain"))
    edit = vector(tmp_path / "run", "edit")
    assert (edit - (1.5 * forget - 0.5 * retain)).norm() < 1e-5 * edit.norm()
    assert forget.meta["base"] == retain.meta["base"] != vector(plain, "forget").meta["base"]


def test_consensus_fits_several_times_and_keeps_what_agrees(plain: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", "vector.method=consensus", "vector.consensus={runs: 2}", f"reuse=['{plain}']")
    one, two = (vector(tmp_path / "run", name) for name in ("forget", "forget-run1"))
    assert one.digest() == vector(plain, "forget").digest()
    assert one.digest() != two.digest()
    for name, merged in vector(tmp_path / "run", "edit").modules.items():
        first, second, got = one.modules[name].delta(), two.modules[name].delta(), merged.delta()
        agree = first.sign() == second.sign()
        assert bool((got[~agree] == 0).all())
        assert bool(((got - (first + second) / 2)[agree].abs() < 1e-6).all())


@pytest.mark.parametrize(
    "asked",
    [
        {"retain_kl": {"sides": "one", "weight": 5.0}},
        {"method": "gradient_difference"},
        {"method": ("negate", "kfac"), "inside": 1000.0},
        {"method": ("negate", "learned"), "learned": {"steps": 2}},
    ],
)
def test_training_rows_of_a_utility_set_stand_beside_those_of_the_retain_sets(
    phi: Loaded, tmp_path: Path, asked: dict[str, Any]
) -> None:
    recipe = load_recipe("pico_smoke.yaml").recipe
    shares = {"train": 0.5, "validation": 0.2, "test": 0.3}
    plain = recipe.model_dump(mode="json", by_alias=True)
    plain["utility"] = [{**plain["retain"][0], "name": "asia", "where": {"continent": "Asia"}, "shares": shares}]
    plain["vector"] = {"lora": {"rank": 2}, "forget": {"steps": 3, "learning_rate": 0.005}, **asked}
    recipe = Recipe.model_validate_json(json.dumps(plain))
    sets = load_sets(recipe, RECIPES, phi.tokenizer)
    asia = next(s for s in sets if s.role == "utility")
    others = [s for s in sets if s is not asia]

    def fitted_with(*more: LoadedSet) -> str:
        return made(phi, [*others, *more], recipe, tmp_path).parts["forget", "europe"].digest()

    assert fitted_with(asia) == fitted_with(replace(asia, role="retain"))
    assert fitted_with(asia) != fitted_with(replace(asia, train=())) == fitted_with()


def test_no_utility_set_is_fine_tuned_on(phi: Loaded, tmp_path: Path) -> None:
    recipe = load_recipe("pico_smoke.yaml").recipe
    sets = load_sets(recipe, RECIPES, phi.tokenizer)
    more = replace(next(s for s in sets if s.role == "retain"), role="utility", name="more")
    alone, beside = made(phi, sets, recipe, tmp_path).retain, made(phi, [*sets, more], recipe, tmp_path).retain
    assert alone is not None
    assert beside is not None
    assert alone.digest() == beside.digest()


def test_what_was_shaped_is_not_shaped_again(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU fitted coefficients are not the same bits twice, and the scores behind them would all be made again."""
    how = ("vector.method=[negate, learned]", "vector.learned={steps: 2}", f"reuse=['{plain}']")
    first = run(tmp_path / "run", *how)
    (tmp_path / "run" / "report.json").unlink()
    plainly = fitted.shape

    def shape(vector: TaskVector, *args: Any) -> TaskVector:
        return 1.001 * plainly(vector, *args)

    monkeypatch.setattr(fitted, "shape", shape)
    again = run(tmp_path / "run", *how)
    assert again.vector["digest"] == first.vector["digest"]
    other = run(tmp_path / "other", how[0], "vector.learned={steps: 3}", f"reuse=['{plain}', '{tmp_path / 'run'}']")
    assert other.vector["digest"] != first.vector["digest"]


def test_finished_stages_of_another_run_are_taken_over_where_they_are_the_same(plain: Path, tmp_path: Path) -> None:
    report = run(tmp_path / "run", "vector.method=contrast", f"reuse=['{plain}']")
    alone = run(tmp_path / "alone", "vector.method=contrast")
    taken, first = keys(tmp_path / "run"), keys(plain)
    assert taken["target"] == first["target"]
    assert taken["vectors/forget"] == first["vectors/forget"]
    assert taken == keys(tmp_path / "alone")
    assert report.scores == alone.scores
    sealed = json.loads((tmp_path / "run" / "target" / "stage.json").read_text())
    assert sealed["files"] == json.loads((plain / "target" / "stage.json").read_text())["files"]


def test_a_damaged_stage_is_not_taken_over(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "other", "vector.method=negate", f"reuse=['{plain}']")
    place = tmp_path / "other" / "vectors" / "forget" / "vector.safetensors"
    raw = bytearray(place.read_bytes())
    raw[-3] ^= 0xFF
    place.write_bytes(raw)
    capsys.readouterr()
    run(tmp_path / "run", "vector.method=negate", f"reuse=['{tmp_path / 'other'}']")
    said = capsys.readouterr().err
    assert "target: taken from" in said
    assert "vectors/forget: taken from" not in said
    assert vector(tmp_path / "run", "forget").digest() == vector(plain, "forget").digest()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["reuse=[nowhere]"], r"reuse: there is no run folder .*nowhere; remove it from the recipe"),
        (
            ["vector.method=learned", "retain.0.shares={train: 0.5, validation: 0, test: 0.5}"],
            "learned fits its coefficients on the training items",
        ),
        (
            ["retain.0.shares={train: 0, validation: 0.5, test: 0.5}"],
            r"no retain set has items to train on, and vector\.method contrast",
        ),
    ],
)
def test_what_a_run_cannot_do_without_is_one_message(tmp_path: Path, changes: list[str], said: str) -> None:
    with pytest.raises(UnlearnError, match=said):
        run(tmp_path / "run", *changes)


def test_what_could_be_known_beforehand_is_in_the_report(plain: Path) -> None:
    report = RunReport.from_json(json.loads((plain / "report.json").read_text()))
    assert report.foresight is not None
    (forget,), (near,) = report.foresight.goals, report.foresight.kept
    assert forget.slope > 0
    assert near.alpha_changes is not None
    assert near.verdict is not None
    assert -1 <= near.alpha_changes <= 1
    assert keys(plain)["foresight"]
    assert "vectors/near-africa" in keys(plain)
