"""What the plan says of comparisons and attacks, and what is left out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from unlearn.plan.words import _evidence
from unlearn.recipe.schema import Recipe
from unlearn.report.assemble import left_out
from unlearn.results import CONTRAST, LENS, AttackScore, Robustness, Who, probing, relearning


def attack(
    who: Who, value: float, kind: Any = "none", name: str = "none", steps: int | None = None, layer: int | None = None
) -> AttackScore:
    return AttackScore(name, kind, who, "prob", True, value, 0.0121, 40, steps, layer)


def steps(**more: Any) -> Sequence[str]:
    qa = [{"path": f"{name}.jsonl", "kind": "qa"} for name in "fr"]
    made_of = {"name": "r", "model": {"path": "pico:phi"}, "forget": qa[0], "retain": qa[1:], "teach": {}}
    return list(_evidence(Recipe.model_validate_json(json.dumps({**made_of, **more}))))


TOFU_SPEC = {"name": "tofu", "set": "forget05"}


def test_a_plan_without_comparisons_says_nothing() -> None:
    assert steps() == []


def test_the_plan_of_comparisons() -> None:
    assert steps(
        reference="train",
        benchmark={**TOFU_SPEC, "items": 30},
        holdout={"path": "h.jsonl", "kind": "qa"},
        robustness={},
    ) == [
        "reference: teach the base model the retain sets alone, in the same way; score it on the same test items",
        "benchmark: tofu forget05 on 3 models, the first 30 items of every set",
        "membership: can the forget set be told from h, which no model has seen?",
        "attack 3 models: copies in nf4 and int8, 20 steps of relearning on 8 forget items, "
        "other prompts (paraphrase, prefix, few-shot, template), a choice beside other prompts, the best of 8 "
        "samples and the logit lens",
    ]
    passages = {"path": "t.txt", "kind": "text"}
    assert steps(utility=[passages], robustness={"quantize": [], "contrast": False, "samples": 0, "lens": False}) == [
        "attack 2 models: 20 steps of relearning on 8 forget items and on unrelated texts and other prompts "
        "(paraphrase, prefix, few-shot, template)"
    ]


def test_attacks_that_do_not_apply_are_neither_planned_nor_left_out_in_silence() -> None:
    """Passages have no question to reword; solved examples need a retain set of questions."""
    passages = {"path": "t.txt", "kind": "text"}
    asked = {"quantize": [], "samples": 0, "relearn": None}
    only = ["attack 2 models: other prompts (prefix) and the logit lens"]
    assert steps(forget=passages, robustness=asked) == only
    asked |= {"contrast": False, "probes": ["prefix", "few_shot"]}
    assert steps(retain=[passages], robustness=asked) == only
    plain = {"name": "r", "model": {"path": "pico:phi"}, "forget": passages, "robustness": {"quantize": []}}
    recipe = Recipe.model_validate_json(json.dumps(plain))
    scores = (attack("edited", 0.1), attack("edited", 0.2, "probe", probing("prefix")))
    (said,) = left_out(recipe, Robustness("t", "prob", scores))
    assert said == (
        "left out, because these data or this model do not allow it: other wordings, solved examples in the prompt, "
        "templates in other languages, relearning on unrelated texts, a choice beside the same question about others, "
        "the logit lens"
    )
    made = [probing(p) for p in ("paraphrase", "prefix", "few_shot", "template")]
    whole = [attack("edited", 0.2, "probe", name) for name in made]
    whole += [attack("edited", 0.2, "relearn", relearning(4, True)), attack("edited", 0.2, "lens", LENS, layer=1)]
    whole.append(attack("edited", 0.2, "contrast", CONTRAST))
    assert left_out(recipe, Robustness("t", "prob", tuple(whole))) == left_out(recipe, None) == ()


def test_the_plan_of_other_references() -> None:
    assert steps(reference="runs/other", benchmark=TOFU_SPEC) == [
        "reference: runs/other, a model that never saw the forget set, scored on the same test items",
        "benchmark: tofu forget05 on 3 models, all items",
    ]
    assert steps(reference="log.json", benchmark=TOFU_SPEC) == [
        "benchmark: tofu forget05 on 2 models, all items, compared with log.json"
    ]
    assert steps(reference="published", benchmark={"name": "muse", "set": "news"}) == [
        "benchmark: muse news on 2 models, all items, compared with published"
    ]
    assert steps(benchmark=TOFU_SPEC) == ["benchmark: tofu forget05 on 2 models, all items"]


def test_the_plan_of_some_attacks() -> None:
    few: dict[str, Any] = {"quantize": [], "probes": ["few_shot"], "contrast": False, "samples": 1, "lens": False}
    assert steps(robustness={**few, "relearn": {"items": 1, "steps": [1], "unrelated": False}}) == [
        "attack 2 models: 1 step of relearning on 1 forget item, other prompts (few-shot) and the best of 1 sample"
    ]
    nothing = {**few, "probes": [], "samples": 0, "relearn": None}
    assert steps(robustness=nothing) == ["attack 2 models: no attack is switched on"]
