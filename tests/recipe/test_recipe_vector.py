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


NEEDY = ["contrast", "ext_sub", "project", "shrink", "kfac", "perta", "slopes", "learned"]
HELD = ["gradient_difference", "simnpo", "idk_dpo", "rmu", "ihl"]
KEPT, PASSAGES = START + RETAIN, START.replace("mcq", "text") + RETAIN
PACKED = START.replace("'pico:phi'", "'pico:phi', quantize: nf4") + RETAIN
TAUGHT = KEPT + "teach: {steps: 3}\n"
LEARNT = START.replace("forget: {", "learn:\n  - {name: new, ") + RETAIN
ODD = "init_lora_weights orthogonal needs even ranks, and one is 3"
FILA = "method: ihl, ihl: {fila: true}"
# a recipe up to its vector, the vector, and what is said of the two
REFUSED: list[tuple[str, ...]] = [
    (KEPT, "{method: [project, project]}", "vector.method names project twice"),
    (KEPT, "{method: [project, consensus]}", "consensus makes a vector of its own", "only stand first"),
    (KEPT, "{method: [consensus, msa]}", "consensus and msa each make a vector"),
    (KEPT, "{method: [npo, project]}", "the baseline npo is compared as published"),
    (KEPT, "{method: [contrast, ext_sub]}", "contrast and ext_sub both take the retain vector off"),
    (KEPT, "{method: []}", "empty list", "negate"),
    (KEPT, "{mu: 2}", "vector.mu", "which vector.method does not name"),
    (KEPT, "{method: contrast, project: {energy: .5}}", "vector.project holds settings", "does not name"),
    (KEPT, "{method: low_rank}", "vector.low_rank: {rank: ...}"),
    (KEPT, "{method: low_rank, low_rank: {rank: 2, energy: .5}}", "give either rank or energy"),
    (KEPT, "{method: gradient_ascent, retain_kl: two_sided}", "the baseline gradient_ascent has none"),
    (KEPT, "{method: msa}", "vector.msa.clean", "teach"),
    (KEPT, "{method: ignorance, ignorance: {teacher: clean}}", "give it as vector.ignorance.clean", "another teacher"),
    (KEPT, "{method: ignorance, ignorance: {teacher: short}}", "short does not fit the forget set"),
    (KEPT, "{method: ignorance, ignorance: {clean: a/b}}", "clean names a model that teacher: other does not ask"),
    (KEPT, "{method: [rmu, project]}", "the baseline rmu is compared as published"),
    (KEPT, "{method: simnpo, simnpo: {beta: 0}}", "vector.simnpo.beta", "greater than 0"),
    (KEPT, "{method: rmu, rmu: {layer: -1}}", "vector.rmu.layer", "greater than or equal to 0"),
    (KEPT, "{method: rmu, rmu: {scale: 0}}", "vector.rmu.scale", "greater than 0"),
    (KEPT, "{method: idk_dpo, idk_dpo: {refusals: []}}", "vector.idk_dpo.refusals", "empty"),
    (KEPT, "{method: DPO, idk_dpo: {retain_loss: mse}}", "vector.idk_dpo.retain_loss", "'nll' or 'kl'"),
    (KEPT, "{method: npo, ihl: {fila: true}}", "vector.ihl holds settings of a method"),
    (KEPT, "{method: npo, inside: 10}", "vector.inside belongs to the forget vector's fitting"),
    (KEPT, "{inside: 0}", "vector.inside", "greater than 0"),
    (KEPT, "{method: shrink, shrink: {rank: 3, forget: 1}}", "vector.shrink", "give either rank or forget"),
    (KEPT, "{retain_kl: {estimate: kfac, temperature: 2}}", "vector.retain_kl", "at temperature 1: leave one out"),
    (KEPT, "{method: kfac, kfac: {mu: 0}}", "vector.kfac.mu", "greater than 0"),
    (KEPT, "{method: projekt}", "projekt", "project"),
    (KEPT, "{retain_kl: both}", "must be 'none', 'one_sided' or 'two_sided' or be a mapping"),
    (KEPT, "{lora: {depth: [.9, .1]}}", "depth must go from a lower share"),
    *((START, f"{{method: {name}}}", f"vector.method {name} needs a retain set") for name in (*NEEDY, *HELD)),
    (START, "{retain_kl: one_sided}", "vector.retain_kl needs a retain set"),
    (START, "{inside: 1000}", "vector.inside needs a retain set"),
    (START, "{method: npo, npo: {weight: 1}}", "vector.npo.weight needs a retain set: add one, or leave it out"),
    (PASSAGES, "{method: idk_dpo}", "idk_dpo refuses an answer, and the forget set a has passages"),
    (PACKED, f"{{{FILA}}}", "vector.ihl.fila needs gradients of the weights"),
    (KEPT, f"{{{FILA}, lora: {{rank_pattern: {{fc1: 2}}}}}}", "vector.ihl.fila begins every module at one rank"),
    (START, "{lora: {init_lora_weights: orthogonal, rank: 3}}", ODD),
    (START, "{lora: {init_lora_weights: orthogonal, rank_pattern: {fc1: 3}}}", ODD),
    (TAUGHT, "{method: msa, msa: {clean: elsewhere}}", "the clean checkpoint is the model before the teaching"),
    *(
        (LEARNT, f"{{method: {name}}}", "sets of learn take negate, lines, low_rank, prune, rescale")
        for name in ("contrast", "npo", "[negate, perta]")
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[1])
def test_what_cannot_be_composed_is_one_message_with_its_line(tmp_path: Path, refused: tuple[str, ...]) -> None:
    head, vector, *parts = refused
    with pytest.raises(UnlearnError) as caught:
        read(tmp_path, f"{head}vector: {vector}\n")
    said = str(caught.value)
    assert "mine.yaml:" in said
    for part in parts:
        assert part in said, said


def test_what_needs_nothing_more(tmp_path: Path) -> None:
    assert not read(tmp_path, f"{START}vector: {{method: npo, npo: {{beta: .2}}}}\n").vector.holds()
    assert read(tmp_path, f"{TAUGHT}vector: {{method: msa}}\n").vector.uses("msa")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("two_sided", ("two", (0.5, 2.0))),
        ("{sides: two, coefficients: [1, 1]}", ("two", (1.0, 1.0))),
        ("one_sided", ("one", (0.5, 2.0))),
        ("none", None),
    ],
)
def test_the_penalty_covers_the_sweep_unless_it_says_otherwise(tmp_path: Path, given: str, found: object) -> None:
    text = f"{KEPT}sweep: {{coefficients: [2, .5, 1]}}\nvector: {{retain_kl: {given}}}\n"
    penalty = read(tmp_path, text).penalty()
    assert (penalty and (penalty.sides, penalty.coefficients)) == found


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
    old = VectorSpec.model_validate({"method": "npo", "npo": {"beta": 0.2}, "forget": {"steps": 3}})
    assert old.model_dump(mode="json")["npo"] == {"beta": 0.2}
    assert not {"simnpo", "idk_dpo", "rmu", "ihl"} & old.model_dump(mode="json").keys()
    assert GradientDifferenceSpec(weight=2).model_dump() == {"weight": 2.0}
    later = NpoSpec.model_validate({"weight": 1.0, "retain_loss": "kl"})
    assert later.model_dump() == {"beta": 0.1, "weight": 1.0, "retain_loss": "kl"}
