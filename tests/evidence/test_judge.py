"""The forget score of a model in memory; against lm-eval and the model itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from attack_arena import Arena

from unlearn.errors import EvaluationError
from unlearn.evidence.judge import Judge, Judged
from unlearn.model.load import Loaded
from unlearn.score.evaluate import evaluate
from unlearn.score.tasks import build_tasks


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize(("kind", "metric"), [("mcq", "acc"), ("qa", "prob"), ("text", "exact_memorisation")])
def test_it_is_the_score_of_the_report(kind: str, metric: str, engine: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind, eval={"engine": engine})
    judge = arena.judge()
    found = judge.scores(phi.model)
    built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "others", generate=True)
    whole = evaluate(judge.lm(phi.model), built, model_name="m", bootstrap=0)
    there = {s.metric: s for s in whole.scores}
    assert judge.metric == metric
    assert judge.chance == there[metric].chance
    assert (judge.chance is None) is (kind != "mcq")
    assert metric in found
    assert ("logprob" in found) is (kind == "mcq")
    for name, score in found.items():
        assert score.value == pytest.approx(there[name].score.value, abs=1e-9)
        assert score.stderr == pytest.approx(there[name].score.stderr, abs=1e-9)
        assert score.higher_is_better is there[name].higher_is_better
        assert len(score.values) == there[name].score.n == len(arena.forget.test)
    assert judge.score(phi.model) == found[metric]


def test_prompts_of_its_own(phi: Loaded, tmp_path: Path) -> None:
    """Probability of an answer after another prompt, by the model itself."""
    judge = Arena(phi, tmp_path, "qa").judge()
    items = [i.__class__(i.id, f"I ask: {i.prompt}", i.target) for i in judge.items]
    found = judge.asking(items).score(phi.model)
    assert judge.asking(items) is judge.asking(list(items))
    for item, value in zip(items, found.values, strict=True):
        ids = phi.tokenizer(f"{item.prompt} {item.target}", return_tensors="pt")["input_ids"]
        skip = len(phi.tokenizer(item.prompt)["input_ids"])
        with torch.inference_mode():
            said = phi.model(ids).logits[0].log_softmax(-1)
        each = [float(said[k - 1, ids[0, k]]) for k in range(skip, ids.shape[1])]
        assert value == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-4)
    assert found.values != judge.score(phi.model).values


def test_one_item_and_none(phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, "qa")
    one = Judge(arena.forget, arena.forget.test[:1], phi.tokenizer, tmp_path / "items", arena.recipe).score(phi.model)
    assert one.stderr is None
    assert one.value == one.values[0]
    assert one.value == pytest.approx(arena.judge().score(phi.model).values[0], rel=1e-5)
    with pytest.raises(EvaluationError, match="no items of forget set 'near' to attack"):
        Judge(arena.forget, (), phi.tokenizer, tmp_path / "items", arena.recipe)


def test_means() -> None:
    found = Judged.mean("acc", True, [1.0, 0.0, 1.0, 1.0])
    assert (found.value, found.stderr) == (0.75, 0.25)  # s = .5, of four
    assert Judged.mean("acc", True, [1.0, 1.0]).stderr == 0.0
    line = found.entry("edited", "x", "relearn", steps=5)
    assert (line.value, line.stderr, line.n, line.steps, line.layer, line.metric) == (0.75, 0.25, 4, 5, None, "acc")
    with pytest.raises(EvaluationError, match="no items"):
        Judged.mean("acc", True, [])
