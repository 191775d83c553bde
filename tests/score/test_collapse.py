"""A model that has fallen off the cliff is named, and is never the choice, however well it forgets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unlearn.execute import execute
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.load import load_recipe
from unlearn.results import Role, Score, SweepPoint, TaskScore
from unlearn.score.search import BROKEN, choose, collapsed, judge, left, may_be_chosen

KEEP = ("retain", "near", "acc")
GOAL = ("forget", "far", "acc")


def score(role: Role, name: str, metric: str, value: float) -> TaskScore:
    higher = metric not in ("loss", "perplexity")
    return TaskScore(role, name, "validation", metric, higher, Score(value, None, 10))


def point(c: float, forget: float, near: float, metric: str, nats: float) -> tuple[TaskScore, ...]:
    return (
        score("forget", "far", "acc", forget),
        score("retain", "near", "acc", near),
        score("retain", "near", metric, nats),
    )


@pytest.mark.parametrize(
    ("metric", "before", "after", "rise"),
    [
        ("loss", 2.0, 5.5, 3.5),
        ("logprob", -2.0, -12.5, 3.5),
        ("perplexity", 10.0, 10.0 * math.exp(3.5), 3.5),
    ],
)
def test_the_loss_is_compared_in_nats(metric: str, before: float, after: float, rise: float) -> None:
    base = {s.key: s for s in point(0, 1, 1, metric, before)}
    here = {s.key: s for s in point(1, 1, 1, metric, after)}
    assert collapsed(here, base, [KEEP], rise + 0.01) == ""
    assert f"retain near rose by {rise:.1f} nats per token" in collapsed(here, base, [KEEP], rise - 0.01)
    assert collapsed(here, base, [], 0.1) == ""  # nothing was asked to be kept


def test_the_forget_set_may_lose_as_much_as_it_likes() -> None:
    base = {s.key: s for s in (score("forget", "far", "loss", 1.0), score("retain", "near", "loss", 1.0))}
    here = {s.key: s for s in (score("forget", "far", "loss", 99.0), score("retain", "near", "loss", 1.0))}
    assert collapsed(here, base, [("retain", "near", "loss")], 1.0) == ""


def test_a_collapsed_point_is_not_chosen_though_its_accuracies_look_best() -> None:
    rule = ChooseSpec(collapse=4.0)
    base = point(0, 0.9, 0.8, "logprob", -2.0)
    points = [
        judge(0.0, base, base, [KEEP], rule),
        judge(1.0, point(1, 0.5, 0.8, "logprob", -3.0), base, [KEEP], rule),
        judge(2.0, point(2, 0.1, 0.8, "logprob", -19.0), base, [KEEP], rule),
        SweepPoint(3.0, (), False, collapsed=BROKEN),
    ]
    assert [p.within_bound for p in points] == [True, True, True, False]
    assert [may_be_chosen(p) for p in points] == [True, True, False, False]
    assert left(points[3], [GOAL], points[0]) == math.inf
    assert choose(points, [GOAL], [KEEP], rule).coefficient == 1.0


def test_a_sweep_goes_past_a_model_without_numbers(tmp_path: Path) -> None:
    """Coefficients up to 1e30 would overflow: 100 is the most a recipe takes, so the vector itself is made huge."""
    quick = ["teach.steps=20", "vector.forget.steps=6", "vector.forget.learning_rate=0.5", "eval.examples=0"]
    report = execute(
        load_recipe("pico_smoke.yaml", [*quick, "sweep.coefficients=[0.01, 100]", "vector.method=negate"]),
        tmp_path / "run",
        False,
    )
    assert report is not None
    assert report.sweep[-1].collapsed
    assert report.chosen.coefficient != 100
    assert (tmp_path / "run" / "report.html").read_text().count("collapsed") >= 1
