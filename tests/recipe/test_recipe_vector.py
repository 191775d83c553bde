"""Which methods compose, and what a recipe is told when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from unlearn.errors import UnlearnError
from unlearn.recipe.load import load_recipe
from unlearn.recipe.methods import GradientDifferenceSpec, NpoSpec, VectorSpec
from unlearn.recipe.schema import Recipe

START = "name: mine\nmodel: {path: 'pico:phi'}\nforget: {kind: mcq, path: a.jsonl}\n"
RETAIN = "retain:\n  - {kind: mcq, path: b.jsonl}\n"


def read(tmp_path: Path, text: str) -> Recipe:
    place = tmp_path / "mine.yaml"
    place.write_text(text, encoding="utf-8")
    return load_recipe(str(place)).recipe


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("negate", ("negate",)),
        ("project", ("negate", "project")),
        ("[ext_sub, project, rescale]", ("negate", "ext_sub", "project", "rescale")),
        ("[consensus, contrast, low_rank]", ("consensus", "contrast", "low_rank")),
        ("npo", ("npo",)),
        *((name, ("gradient_ascent",)) for name in ("GradAscent", "gradascent", "Gradient_Ascent")),
        ("GradDiff", ("gradient_difference",)),
        *((name, (name.lower(),)) for name in ("NPO", "SimNPO", "RMU", "IHL")),
        *((name, ("idk_dpo",)) for name in ("DPO", "IdkDPO", "idk_dpo")),
        ("[Negate, Contrast]", ("negate", "contrast")),
    ],
)
def test_a_list_begins_with_its_source(tmp_path: Path, method: str, steps: tuple[str, ...]) -> None:
    more = "\n  low_rank: {rank: 2}" if "low_rank" in method else ""
    recipe = read(tmp_path, f"{START}{RETAIN}vector:\n  method: {method}{more}\n")
    assert recipe.vector.steps() == steps


@pytest.mark.parametrize(
    ("vector", "parts"),
    [
        ("{method: [project, project]}", ["vector.method names project twice"]),
        ("{method: [project, consensus]}", ["consensus makes a vector of its own", "only stand first"]),
        ("{method: [consensus, msa]}", ["consensus and msa each make a vector"]),
        ("{method: [npo, project]}", ["the baseline npo is compared as published"]),
        ("{method: [contrast, ext_sub]}", ["contrast and ext_sub both take the retain vector off"]),
        ("{method: []}", ["empty list", "negate"]),
        ("{mu: 2}", ["vector.mu", "which vector.method does not name"]),
        ("{method: contrast, project: {energy: .5}}", ["vector.project holds settings", "does not name"]),
        ("{method: low_rank}", ["vector.low_rank: {rank: ...}"]),
        ("{method: low_rank, low_rank: {rank: 2, energy: .5}}", ["give either rank or energy"]),
        ("{method: gradient_ascent, retain_kl: two_sided}", ["the baseline gradient_ascent has none"]),
        ("{method: msa}", ["vector.msa.clean", "teach"]),
        ("{method: ignorance, ignorance: {teacher: clean}}", ["give it as vector.ignorance.clean", "another teacher"]),
        (
            "{method: ignorance, ignorance: {teacher: short}}",
            ["short does not fit the forget set"],
        ),
        ("{method: ignorance, ignorance: {clean: a/b}}", ["clean names a model that teacher: other does not ask"]),
        ("{method: [rmu, project]}", ["the baseline rmu is compared as published"]),
        ("{method: simnpo, simnpo: {beta: 0}}", ["vector.simnpo.beta", "greater than 0"]),
        ("{method: rmu, rmu: {layer: -1}}", ["vector.rmu.layer", "greater than or equal to 0"]),
        ("{method: rmu, rmu: {scale: 0}}", ["vector.rmu.scale", "greater than 0"]),
        ("{method: idk_dpo, idk_dpo: {refusals: []}}", ["vector.idk_dpo.refusals", "empty"]),
        ("{method: DPO, idk_dpo: {retain_loss: mse}}", ["vector.idk_dpo.retain_loss", "'nll' or 'kl'"]),
        ("{method: npo, ihl: {fila: true}}", ["vector.ihl holds settings of a method"]),
        ("{method: npo, inside: 10}", ["vector.inside belongs to the forget vector's fitting"]),
        ("{inside: 0}", ["vector.inside", "greater than 0"]),
        ("{method: shrink, shrink: {rank: 3, forget: 1}}", ["vector.shrink", "give either rank or forget"]),
        ("{retain_kl: {estimate: kfac, temperature: 2}}", ["vector.retain_kl", "at temperature 1: leave one out"]),
        ("{method: kfac, kfac: {mu: 0}}", ["vector.kfac.mu", "greater than 0"]),
        ("{method: projekt}", ["projekt", "project"]),
        ("{retain_kl: both}", ["must be 'none', 'one_sided' or 'two_sided' or be a mapping"]),
        ("{lora: {depth: [.9, .1]}}", ["depth must go from a lower share"]),
    ],
)
def test_what_cannot_be_composed_is_one_message_with_its_line(tmp_path: Path, vector: str, parts: list[str]) -> None:
    with pytest.raises(UnlearnError) as caught:
        read(tmp_path, f"{START}{RETAIN}vector: {vector}\n")
    said = str(caught.value)
    assert "mine.yaml:" in said
    for part in parts:
        assert part in said, said
    assert "Traceback" not in said


NEEDY = ["contrast", "ext_sub", "project", "shrink", "kfac", "perta", "slopes", "learned"]
HELD = ["gradient_difference", "simnpo", "idk_dpo", "rmu", "ihl"]


@pytest.mark.parametrize("method", [*NEEDY, *HELD])
def test_what_spares_needs_something_to_spare(tmp_path: Path, method: str) -> None:
    with pytest.raises(UnlearnError, match=rf"vector\.method {method} needs a retain set"):
        read(tmp_path, f"{START}vector: {{method: {method}}}\n")
    for given in ("retain_kl: one_sided", "inside: 1000"):
        with pytest.raises(UnlearnError, match=rf"vector\.{given.partition(':')[0]} needs a retain set"):
            read(tmp_path, f"{START}vector: {{{given}}}\n")


def test_npo_needs_it_only_for_a_retain_loss_and_a_refusal_needs_a_question(tmp_path: Path) -> None:
    assert not read(tmp_path, f"{START}vector: {{method: npo, npo: {{beta: .2}}}}\n").vector.holds()
    with pytest.raises(UnlearnError, match=r"vector\.npo\.weight needs a retain set: add one, or leave it out"):
        read(tmp_path, f"{START}vector: {{method: npo, npo: {{weight: 1}}}}\n")
    with pytest.raises(UnlearnError, match="idk_dpo refuses an answer, and the forget set a has passages"):
        read(tmp_path, f"{START.replace('mcq', 'text')}{RETAIN}vector: {{method: idk_dpo}}\n")


def test_fila_needs_whole_weights(tmp_path: Path) -> None:
    packed = START.replace("'pico:phi'", "'pico:phi', quantize: nf4")
    with pytest.raises(UnlearnError, match=r"vector\.ihl\.fila needs gradients of the weights"):
        read(tmp_path, f"{packed}{RETAIN}vector: {{method: ihl, ihl: {{fila: true}}}}\n")
    with pytest.raises(UnlearnError, match=r"vector\.ihl\.fila begins every module at one rank"):
        read(
            tmp_path,
            f"{START}{RETAIN}vector: {{method: ihl, ihl: {{fila: true}}, lora: {{rank_pattern: {{fc1: 2}}}}}}\n",
        )


def test_an_orthogonal_start_takes_even_ranks(tmp_path: Path) -> None:
    for ranks in ("rank: 3", "rank_pattern: {fc1: 3}"):
        with pytest.raises(UnlearnError, match="init_lora_weights orthogonal needs even ranks, and one is 3"):
            read(tmp_path, f"{START}vector: {{lora: {{init_lora_weights: orthogonal, {ranks}}}}}\n")


def test_what_older_recipes_say_has_the_keys_it_had() -> None:
    """Stages are found again: nothing that came later is in what their keys are made of."""
    spec = VectorSpec.model_validate(
        {"method": "npo", "npo": {"beta": 0.2}, "gradient_difference": None, "forget": {"steps": 3}}
    )
    plain = spec.model_dump(mode="json")
    assert plain["npo"] == {"beta": 0.2}
    assert not {"simnpo", "idk_dpo", "rmu", "ihl"} & plain.keys()
    assert GradientDifferenceSpec(weight=2).model_dump() == {"weight": 2.0}
    later = NpoSpec.model_validate({"weight": 1.0, "retain_loss": "kl"})
    assert later.model_dump() == {"beta": 0.1, "weight": 1.0, "retain_loss": "kl"}


def test_the_clean_checkpoint_is_given_once(tmp_path: Path) -> None:
    teach = "teach: {steps: 3}\n"
    assert read(tmp_path, f"{START}{RETAIN}{teach}vector: {{method: msa}}\n").vector.uses("msa")
    with pytest.raises(UnlearnError, match="the clean checkpoint is the model before the teaching"):
        read(tmp_path, f"{START}{RETAIN}{teach}vector: {{method: msa, msa: {{clean: elsewhere}}}}\n")


def test_the_penalty_covers_the_sweep_unless_it_says_otherwise(tmp_path: Path) -> None:
    sweep = "sweep: {coefficients: [2, .5, 1]}\n"
    short = read(tmp_path, f"{START}{RETAIN}{sweep}vector: {{retain_kl: two_sided}}\n").penalty()
    assert short is not None
    assert (short.sides, short.coefficients) == ("two", (0.5, 2.0))
    own = read(
        tmp_path, f"{START}{RETAIN}{sweep}vector: {{retain_kl: {{sides: two, coefficients: [1, 1]}}}}\n"
    ).penalty()
    assert own is not None
    assert own.coefficients == (1.0, 1.0)
    one = read(tmp_path, f"{START}{RETAIN}{sweep}vector: {{retain_kl: one_sided}}\n").penalty()
    assert one is not None
    assert one.sides == "one"
    assert read(tmp_path, f"{START}{RETAIN}{sweep}vector: {{retain_kl: none}}\n").penalty() is None


@pytest.mark.parametrize("method", ["contrast", "npo", "[negate, perta]"])
def test_what_is_added_is_not_fitted_against_anything(tmp_path: Path, method: str) -> None:
    text = START.replace("forget:", "learn:\n  -").replace("learn:\n  - {", "learn:\n  - {name: new, ")
    with pytest.raises(UnlearnError, match=r"sets of learn take negate, lines, low_rank, prune, rescale"):
        read(tmp_path, f"{text}{RETAIN}vector: {{method: {method}}}\n")


def test_keys_that_came_later_are_written_only_where_they_are_given(tmp_path: Path) -> None:
    """So that the keys of stages that do not use them, and the names of run folders, are what they were."""
    shrink = "vector: {method: shrink, shrink: {mu: 5}, retain_kl: {sides: one}}\n"
    plain = read(tmp_path, START + RETAIN + shrink).model_dump(mode="json")["vector"]
    assert plain["shrink"] == {"mu": 5.0, "rank": None}
    assert plain["retain_kl"].keys() == {"sides", "weight", "coefficients", "batch_size", "temperature"}
    assert not {"kfac", "slopes"} & plain.keys()
    given = "vector: {method: [shrink, kfac], shrink: {forget: 2}, kfac: {mu: 9}, retain_kl: {estimate: kfac}}\n"
    recipe = read(tmp_path, START + RETAIN + given)
    dumped = recipe.model_dump(mode="json")["vector"]
    assert (dumped["shrink"]["forget"], dumped["kfac"], dumped["retain_kl"]["estimate"]) == (2.0, {"mu": 9.0}, "kfac")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
