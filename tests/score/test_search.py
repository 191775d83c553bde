"""The rule that picks the coefficient by hand; bisection and joint coefficients against exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.errors import EvaluationError
from unlearn.execute import execute
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import METRICS, Key
from unlearn.results import Role, Score, SweepPoint, TaskScore
from unlearn.score.search import (
    BROKEN,
    ROUNDS,
    balance,
    bisect,
    blind,
    choose,
    collapsed,
    holds,
    judge,
    may_be_chosen,
    may_tie,
    remaining,
    require_grounds,
    rule,
    share_left,
)

FORGET: Key = ("forget", "europe", "acc_norm")
ASIA: Key = ("retain", "asia", "acc_norm")
FACTS: Key = ("utility", "facts", "acc")
PPL: Key = ("utility", "wiki", "word_perplexity")
LOGPROB: Key = ("retain", "asia", "answer_logprob")
LOSS: Key = ("retain", "asia", "loss")


def spec(**values: Any) -> ChooseSpec:
    return ChooseSpec.model_validate(values)


def score(key: Key, value: float, higher: bool = True, split: str = "validation") -> TaskScore:
    role: Role = key[0]  # type: ignore[assignment]
    return TaskScore(role, key[1], split, key[2], higher, Score(value, 0.01, 50))


def within(key: Key, was: float, now: float, higher: bool = True, **values: Any) -> bool:
    """Whether ``judge`` finds the kept metric within its bound when it goes from ``was`` to ``now``."""
    point = judge(0.5, [score(key, now, higher)], [score(key, was, higher)], [key], spec(**values))
    assert point.within_bound == (not point.broken)
    return point.within_bound


@pytest.mark.parametrize(
    ("key", "higher", "was", "rule", "passes", "fails"),
    [
        (ASIA, True, 0.8, {}, (0.76, 0.9), (0.7599,)),  # 95 % of a score
        (ASIA, True, 0.8, {"keep": 1.0}, (0.8,), (0.7999,)),
        (ASIA, True, 0.8, {"keep": 0.0}, (0.0,), ()),
        (ASIA, True, 0.0, {}, (0.0,), ()),
        (ASIA, True, 0.3, {}, (0.285, 0.3 * 0.95), ()),  # which differ in the last bit
        (ASIA, True, 20 / 26, {}, (19 / 26,), (18 / 26,)),  # just 95 %, whatever floats make of the quotient
        # the share (keep) has no say: 12.5 is more than 12 / 0.99
        (PPL, False, 12.0, {"keep": 0.99}, (12.5, 11.0), (12.51,)),
        (PPL, False, 12.0, {"perplexity": 0.0}, (12.0,), (12.01,)),
        (PPL, False, 12.0, {"perplexity": 2.0}, (14.0,), ()),
        (LOSS, False, 2.0, {}, (2.0, 2.1052, 1.0), (2.1053, 3.0)),  # up to 2 / 0.95 = 2.10526
        (LOSS, False, 2.0, {"keep": 0.0}, (200.0,), ()),
        # down to -3 / 0.95 = -3.15789: multiplying would ask for -2.85, a gain
        (LOGPROB, True, -3.0, {}, (-3.0, -3.1578, -0.1), (-3.158, -4.0)),
        (LOGPROB, True, -3.0, {"keep": 0.0}, (-300.0,), ()),
    ],
)
def test_bounds(key: Key, higher: bool, was: float, rule: Any, passes: Any, fails: Any) -> None:
    assert all(within(key, was, now, higher, **rule) for now in passes)
    assert not any(within(key, was, now, higher, **rule) for now in fails)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [ASIA, PPL, LOSS])
def test_a_score_that_is_no_number_is_never_within(key: Key, value: float) -> None:
    """A NaN compares false with every bound, which must not read as success."""
    for was, now in ((0.8, value), (value, 0.8)):
        assert not within(key, was, now, higher=key == ASIA)


def test_every_broken_bound_is_told() -> None:
    base = [score(FORGET, 0.9), score(ASIA, 0.8), score(FACTS, 0.5), score(PPL, 12.0, higher=False)]
    now = [score(FORGET, 0.1), score(ASIA, 0.6), score(FACTS, 0.5), score(PPL, 12.75, higher=False)]
    point = judge(0.75, now, base, [ASIA, FACTS, PPL], spec())
    assert point.coefficient == 0.75
    assert point.scores == tuple(now)
    assert not point.within_bound
    assert point.broken == (
        "retain asia acc_norm fell to 0.6 from 0.8",
        "utility wiki word_perplexity rose to 12.75 from 12",
    )
    # what is not among the kept metrics does not matter
    assert judge(0.75, now, base, [FACTS], spec()).within_bound
    assert judge(0.75, now, base, [], spec()).within_bound


def test_test_items_are_no_ground_for_choosing() -> None:
    base = [score(FORGET, 0.9), score(ASIA, 0.8)]
    peeking = [score(FORGET, 0.5), score(ASIA, 0.8, split="test")]
    with pytest.raises(EvaluationError, match="retain asia acc_norm is on test"):
        judge(0.5, peeking, base, [ASIA], spec())
    with pytest.raises(EvaluationError, match="is on test"):
        judge(0.5, base, peeking, [ASIA], spec())
    points = [SweepPoint(0.0, tuple(base), True), SweepPoint(0.5, tuple(peeking), True)]
    with pytest.raises(EvaluationError, match="is on test"):
        choose(points, [FORGET], [ASIA], spec())


# --- choosing --------------------------------------------------------------------------------------------------------


def sweep(
    *values: tuple[float, float, float], higher: bool = True, was: tuple[float, float] = (0.9, 0.8)
) -> list[SweepPoint]:
    """Points from (coefficient, forget score, score of ASIA), judged against ``was``, which is the point at 0."""
    base = [score(FORGET, was[0], higher), score(ASIA, was[1])]
    table = [(0.0, *was), *values]
    return [judge(c, [score(FORGET, f, higher), score(ASIA, r)], base, [ASIA], spec()) for c, f, r in table]


def chosen(points: list[SweepPoint]) -> tuple[float, bool]:
    got = choose(points, [FORGET], [ASIA], spec())
    return got.coefficient, got.bound_met


@pytest.mark.parametrize(
    ("table", "coefficient"),
    [
        ([(0.25, 0.8, 0.8), (0.5, 0.6, 0.77), (0.75, 0.4, 0.75), (1.0, 0.2, 0.5)], 0.5),  # the bound is 0.76
        ([(0.25, 0.5, 0.8), (0.5, 0.7, 0.8)], 0.25),  # forgetting may turn round
        ([(0.25, 0.5, 0.7), (0.5, 0.45, 0.8)], 0.5),  # a larger coefficient may pass where a smaller one fails
        ([(0.25, 0.5, 0.8), (0.5, 0.3, 0.8), (0.75, 0.3, 0.8), (1.0, 0.3, 0.79)], 0.5),  # the smaller one on a tie
        ([(0.5, 0.1, 0.7), (1.0, 0.0, 0.1)], 0.0),  # nothing passes
        ([(0.5, 0.9, 0.8), (1.0, 0.2, 0.1)], 0.0),  # what passes forgets nothing
        ([(0.5, 0.95, 0.8), (1.0, 0.2, 0.1)], 0.0),
        ([(0.5, math.nan, 0.8), (1.0, 0.6, 0.8)], 1.0),  # no number is no forgetting
        ([(0.5, math.nan, 0.8)], 0.0),
    ],
)
def test_the_choice(table: list[tuple[float, float, float]], coefficient: float) -> None:
    points = sweep(*table)
    assert chosen(points) == chosen(points[::-1]) == (coefficient, coefficient > 0)


@pytest.mark.parametrize(
    ("role", "metric", "before", "now", "expected"),
    [
        ("forget", "acc", 0.8, 0.2, 0.25),
        ("forget", "prob", 0.9, 0.95, 0.95 / 0.9),
        ("forget", "perplexity", 30.0, 31.0, math.exp(-math.log(31 / 30))),
        ("forget", "perplexity", 30.0, 3000.0, 0.01),
        ("forget", "loss", 1.0, 3.0, math.exp(-2)),
        ("forget", "logprob", -2.6, -11.8, math.exp(-9.2)),
        ("forget", "logprob", -900.0, -1.0, math.inf),
        ("forget", "exact", 0.0, 0.0, None),
        ("learn", "acc", 0.6, 0.9, 0.25),
        ("learn", "acc", 0.6, 0.5, 1.25),
        ("learn", "exact", 0.0, 0.5, 0.5),
        ("learn", "acc", 1.0, 1.0, None),
        ("learn", "perplexity", 4.0, 2.0, (1 - 1 / 2) / (1 - 1 / 4)),
        ("learn", "loss", math.log(4), math.log(2), (1 - 1 / 2) / (1 - 1 / 4)),
        ("learn", "logprob", 0.0, 0.0, None),
    ],
)
def test_the_share_left_of_a_goal(role: str, metric: str, before: float, now: float, expected: float | None) -> None:
    found = share_left((role, "x", metric), before, now)
    assert found == (None if expected is None else pytest.approx(expected))


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.sampled_from(["forget", "learn"]))
def test_one_likelihood_in_four_units_is_one_share(before: float, now: float, role: str) -> None:
    """A probability, its logarithm, the loss and the perplexity are the same knowledge, so the same is left of it."""
    units = {
        "prob": (before, now),
        "logprob": (math.log(before), math.log(now)),
        "loss": (-math.log(before), -math.log(now)),
        "perplexity": (1 / before, 1 / now),
    }
    shares = [share_left((role, "x", metric), *pair) for metric, pair in units.items()]
    assert shares == [pytest.approx(shares[0])] * 4


def test_no_score_to_start_from() -> None:
    points = sweep((0.5, 0.5, 0.8))
    with pytest.raises(EvaluationError, match="forget europe acc_norm has no validation score at coefficient 0"):
        choose(points[1:], [FORGET], [ASIA], spec())
    with pytest.raises(EvaluationError, match="forget europe other has no"):
        choose(points, [("forget", "europe", "other")], [ASIA], spec())
    lacking = [points[0], SweepPoint(0.5, points[1].scores[1:], True)]
    with pytest.raises(EvaluationError, match=r"forget europe acc_norm has no validation score at coefficient 0\.5"):
        choose(lacking, [FORGET], [ASIA], spec())


UNIT = st.floats(0, 1).map(lambda x: round(x, 2))


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([0.25, 0.5, 0.75, 1.0, 2.0]), st.tuples(UNIT, UNIT)), st.tuples(UNIT, UNIT), UNIT
)
def test_no_better_point_was_passed_over(
    table: dict[float, tuple[float, float]], was: tuple[float, float], keep: float
) -> None:
    base = [score(FORGET, was[0]), score(ASIA, was[1])]
    points = [
        judge(c, [score(FORGET, f), score(ASIA, r)], base, [ASIA], spec(keep=keep))
        for c, (f, r) in {0.0: was, **table}.items()
    ]
    if was[0] == 0:
        with pytest.raises(EvaluationError, match="there is nothing to forget"):
            choose(points, [FORGET], [ASIA], spec(keep=keep))
        return
    got = choose(points, [FORGET], [ASIA], spec(keep=keep))
    # an independent reading of the rule: sort everything by (forget score, coefficient), take the first allowed
    allowed = [(f, c) for c, (f, r) in table.items() if f < was[0] and r - keep * was[1] > -1e-6]
    assert (got.coefficient, got.bound_met) == ((min(allowed)[1], True) if allowed else (0.0, False))


@pytest.mark.parametrize(
    ("goals", "kept", "values", "said", "unsaid"),
    [
        ("f", "", {}, "forgetting of europe (acc_norm) on validation items; nothing was asked to be kept", "on av"),
        ("fl", "", {}, "forgetting of europe (acc_norm) and learning of africa (acc) on validation items, on av", "95"),
        (
            "f",
            "ap",
            {"keep": 0.9, "perplexity": 1.5},
            "at least 90 % of the target model's score or at most +1.5",
            "95 %",
        ),
        ("f", "a", {"keep": 0.975}, "at least 97.5 % of", "perplexity"),  # rounded, it would be another bound
        ("f", "p", {}, "at most +0.5 perplexity", "95 %"),
    ],
)
def test_the_rule_in_words(goals: str, kept: str, values: Any, said: str, unsaid: str) -> None:
    keys = {"f": FORGET, "l": AFRICA, "a": ASIA, "p": PPL}
    text = rule(spec(**values), [keys[k] for k in goals], [keys[k] for k in kept])
    assert said in text
    assert unsaid not in text


AMERICAS: Key = ("forget", "americas", "acc_norm")
AFRICA: Key = ("learn", "africa", "acc")
PASSAGES: Key = ("learn", "passages", "perplexity")


def test_what_is_left_of_several_goals_is_the_mean_of_their_shares() -> None:
    goals = (FORGET, AMERICAS, AFRICA, PASSAGES)
    values = {FORGET: (0.8, 0.6), AMERICAS: (0.5, 0.1), AFRICA: (0.6, 0.9), PASSAGES: (4.0, 2.0)}
    base, point = (
        SweepPoint(float(i), tuple(score(k, v[i], higher=k != PASSAGES) for k, v in values.items()), True)
        for i in (0, 1)
    )
    assert remaining(point, [FORGET, AMERICAS], base) == pytest.approx((0.75 + 0.2) / 2)
    assert remaining(point, goals, base) == pytest.approx((0.75 + 0.2 + 0.25 + 0.5 / 0.75) / 4)
    assert remaining(base, goals, base) == 1
    with pytest.raises(EvaluationError, match="the learn metric learn facts acc has no validation score"):
        remaining(point, [("learn", "facts", "acc")], base)


def test_the_choice_weighs_all_goals_alike() -> None:
    """Each request on its own would have another coefficient chosen."""
    table = {0.0: (0.9, 0.9), 1.0: (0.5, 0.6), 2.0: (0.4, 0.8), 3.0: (0.7, 0.5)}
    points = [SweepPoint(c, (score(FORGET, a), score(AMERICAS, b)), True) for c, (a, b) in table.items()]
    picked = {goals: choose(points, goals, [], spec()) for goals in ((FORGET,), (AMERICAS,), (FORGET, AMERICAS))}
    assert [got.coefficient for got in picked.values()] == [2.0, 3.0, 1.0]
    assert picked[FORGET, AMERICAS].goals == (FORGET, AMERICAS)
    assert picked[FORGET, AMERICAS].rule == (
        "most forgetting of europe (acc_norm) and americas (acc_norm) on validation items, on average over what is "
        "left of each beside λ = 0; nothing was asked to be kept"
    )


def test_a_goal_without_anything_to_do_does_not_count_and_all_of_them_are_an_error() -> None:
    table = {0.0: (0.0, 0.9), 1.0: (0.1, 0.5), 2.0: (0.0, 0.8)}
    points = [SweepPoint(c, (score(FORGET, a), score(AMERICAS, b)), True) for c, (a, b) in table.items()]
    assert choose(points, [FORGET, AMERICAS], [], spec()).coefficient == 1.0
    assert require_grounds(points[0], [FORGET, AMERICAS], [], spec()) == {
        FORGET: "is 0.000 before the edit: there is nothing to forget, and the choice does without it"
    }
    for way in (lambda: choose(points, [FORGET], [], spec()), lambda: require_grounds(points[0], [FORGET], [], spec())):
        with pytest.raises(EvaluationError, match=r"nothing to forget .* forget europe acc_norm is 0\.000"):
            way()
    known = SweepPoint(0.0, (score(AFRICA, 1.0),), True)
    with pytest.raises(EvaluationError, match=r"nothing to learn .* learn africa acc is 1\.000"):
        require_grounds(known, [AFRICA], [], spec())


def guessing(key: Key, value: float, chance: float | None) -> TaskScore:
    return replace(score(key, value), chance=chance)


@pytest.mark.parametrize(
    ("value", "chance", "said"),
    [
        (0.0, None, "is 0 before the edit, so that nothing can break its bound"),
        (0.25, 0.25, r"no more than guessing gives \(0\.250\)"),
        (0.2, 0.25, r"is 0\.200 before the edit, no more than guessing"),
    ],
)
def test_what_is_kept_and_cannot_show_harm_is_said_and_if_it_is_all_an_error(
    value: float, chance: float | None, said: str
) -> None:
    """0 >= .95 * 0 whatever becomes of the model."""
    only_guessed = SweepPoint(0.0, (guessing(FORGET, 0.25, 0.25),), True)
    assert "no more than guessing (0.250)" in require_grounds(only_guessed, [FORGET], [], spec())[FORGET]
    base = SweepPoint(0.0, (score(FORGET, 0.9), guessing(ASIA, value, chance), guessing(FACTS, 0.5, 0.25)), True)
    with pytest.raises(EvaluationError, match=f"nothing that is to be kept could show harm.*retain asia.*{said}"):
        require_grounds(base, [FORGET], [ASIA], spec())
    found = require_grounds(base, [FORGET], [ASIA, FACTS], spec())
    assert list(found) == [ASIA]
    assert "cannot show harm" in found[ASIA]
    assert not require_grounds(base, [FORGET], [FACTS], spec())
    assert not require_grounds(base, [FORGET], [ASIA], spec(keep=0)), "nothing was to be kept"


def test_what_can_show_harm_is_not_doubted() -> None:
    assert not blind("acc", True, 0.251, 0.25, 0.95)
    assert not blind("perplexity", False, 30.0, None, 0.95)
    assert not blind("loss", False, 0.0, None, 0.95), "any rise breaks that bound"
    assert not blind("logprob", True, -3.0, None, 0.95)
    assert not blind("pmi", True, 0.1, None, 0.95)
    assert "nothing ties the answers" in blind("pmi", True, -0.1, None, 0.95)
    assert holds("pmi", True, -0.1, -3.0, 0.95, None), "where nothing is tied, nothing can be lost"


def test_most_learning_is_chosen_and_only_if_something_is_learned() -> None:
    def points(*values: float) -> list[SweepPoint]:
        return [SweepPoint(float(c), (score(AFRICA, v), score(FACTS, 0.5)), c < 3) for c, v in enumerate(values)]

    got = choose(points(0.6, 0.7, 0.9, 1.0), [AFRICA], [FACTS], spec())
    assert (got.coefficient, got.bound_met, got.forget_metric) == (2.0, True, "acc")
    assert got.rule.startswith("most learning of africa (acc) on validation items, while every kept metric")
    assert not choose(points(0.6, 0.6, 0.5), [AFRICA], [FACTS], spec()).bound_met


def with_nats(forget: float, kept: float, metric: str, nats: float) -> list[TaskScore]:
    """Accuracies, and beside that of what is kept a metric in nats."""
    return [score(FORGET, forget), score(ASIA, kept), score((*ASIA[:2], metric), nats, metric == "logprob")]


@pytest.mark.parametrize(
    ("metric", "before", "after", "rise"),
    [("loss", 2.0, 5.5, 3.5), ("logprob", -2.0, -12.5, 3.5), ("perplexity", 10.0, 10.0 * math.exp(3.5), 3.5)],
)
def test_the_loss_is_compared_in_nats(metric: str, before: float, after: float, rise: float) -> None:
    base, here = ({s.key: s for s in with_nats(1, 1, metric, value)} for value in (before, after))
    assert collapsed(here, base, [ASIA], rise + 0.01) == ""
    assert f"retain asia rose by {rise:.1f} nats per token" in collapsed(here, base, [ASIA], rise - 0.01)
    assert collapsed(here, base, [], 0.1) == ""  # nothing was asked to be kept
    assert collapsed(here, base, [FORGET], 0.1) == ""  # and the forget set may lose as much as it likes


def test_a_collapsed_point_is_not_chosen_though_its_accuracies_look_best() -> None:
    rule, base = spec(collapse=4.0), with_nats(0.9, 0.8, "logprob", -2.0)
    later = [(1.0, 0.5, -3.0), (2.0, 0.1, -19.0)]
    points = [judge(0.0, base, base, [ASIA], rule)]
    points += [judge(c, with_nats(f, 0.8, "logprob", nats), base, [ASIA], rule) for c, f, nats in later]
    points.append(SweepPoint(3.0, (), False, collapsed=BROKEN))
    assert [p.within_bound for p in points] == [True, True, True, False]
    assert [may_be_chosen(p) for p in points] == [True, True, False, False]
    assert remaining(points[3], [FORGET], points[0]) == math.inf
    assert choose(points, [FORGET], [ASIA], rule).coefficient == 1.0


def test_a_sweep_goes_past_a_model_without_numbers(tmp_path: Path) -> None:
    """Coefficients up to 1e30 would overflow: 100 is the most a recipe takes, so the vector itself is made huge."""
    quick = ["teach.steps=20", "vector.forget.steps=6", "vector.forget.learning_rate=0.5", "eval.examples=0"]
    report = execute(
        load_recipe("pico_smoke.yaml", [*quick, "sweep.coefficients=[0.01, 100]", "vector.method=negate"]),
        tmp_path / "run",
        False,
    )
    assert report.sweep[-1].collapsed
    assert report.chosen.coefficient != 100
    assert (tmp_path / "run" / "report.html").read_text().count("collapsed") >= 1


EUROPE: Key = ("forget", "europe", "acc")


class Model:
    """A made-up model: what it knows at each grid index (0 first), and whether it is within the bounds there."""

    def __init__(self, knows: Sequence[float], within: Sequence[bool]) -> None:
        self.grid = [0.25 * index for index in range(1, len(knows))]
        self.knows = knows
        self.within = within
        self.asked: list[int] = []

    def point(self, index: int) -> SweepPoint:
        score = TaskScore("forget", "europe", "validation", "acc", True, Score(self.knows[index], None, 107))
        ok = self.within[index]
        return SweepPoint(0.25 * index, (score,), ok, () if ok else ("broken",))

    def score(self, coefficient: float) -> SweepPoint:
        index = round(4 * coefficient)
        assert index not in self.asked, "asked for what it has said already"
        self.asked.append(index)
        return self.point(index)

    def searched(self, ties: bool = True) -> tuple[int, tuple[SweepPoint, ...]]:
        """The index that is chosen after a bisection, and the points it saw."""
        points = bisect(
            self.grid, self.point(0), self.score, lambda p: remaining(p, [EUROPE], self.point(0)), ties=ties
        )
        assert [p.coefficient for p in points] == sorted(p.coefficient for p in points)
        return self.chosen(points), points

    def best(self) -> int:
        """The index that is chosen from the full grid."""
        return self.chosen([self.point(index) for index in range(len(self.knows))])

    @staticmethod
    def chosen(points: Sequence[SweepPoint]) -> int:
        found = choose(points, [EUROPE], [], ChooseSpec())
        assert found.bound_met == (found.coefficient > 0)
        return round(4 * found.coefficient)

    @property
    def cost(self) -> float:
        """Share of the full grid's cost; the scoring at 0 counted on neither side."""
        return len(self.asked) / len(self.grid)


def saturating(size: int, last: int, floor: int) -> Model:
    """Within the bounds up to ``last``; the forget score falls with every step up to ``floor`` and then stays."""
    knows = [1 - min(index, floor) / (size + 1) for index in range(size + 1)]
    return Model(knows, [index <= last for index in range(size + 1)])


def agrees(model: Model) -> None:
    chosen, points = model.searched()
    assert abs(chosen - model.best()) <= 1
    assert (chosen > 0) == (model.best() > 0), "nothing chosen is no neighbour of the smallest coefficient"
    if len(model.grid) >= 8:
        assert model.cost <= 0.5
    assert {round(4 * p.coefficient) for p in points} == {0, *model.asked}


@pytest.mark.parametrize("size", [4, 5, 8, 11, 16])
def test_every_curve_that_falls_until_it_saturates(size: int) -> None:
    for last, floor in itertools.product(range(size + 1), repeat=2):
        agrees(saturating(size, last, floor))


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.data())
def test_without_ties_it_is_the_grids_own_choice(size: int, data: st.DataObject) -> None:
    model = saturating(size, data.draw(st.integers(0, size)), size)
    assert model.searched(ties=False)[0] == model.best()
    assert len(model.asked) <= math.ceil(math.log2(size + 1))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_noise_can_change_the_choice_but_not_what_is_asked_of_it(size: int, seed: int) -> None:
    rng = random.Random(seed)
    knows = [rng.choice((0.2, 0.4, 0.6, 0.8)) for _ in range(size + 1)]
    within = [True, *(rng.random() < 0.5 for _ in range(size))]
    model = Model(knows, within)
    chosen, points = model.searched()
    by_index = {round(4 * p.coefficient): p for p in points}
    if chosen:
        assert within[chosen]
        assert chosen in model.asked
        assert knows[chosen] < knows[0]
    else:
        assert not [i for i, p in by_index.items() if i and p.within_bound and knows[i] < knows[0]]
    assert len(model.asked) <= max(size / 2, math.ceil(math.log2(size + 1)))


def test_which_scores_tie() -> None:
    tying = {metric for metrics in METRICS.values() for metric in metrics if may_tie(metric)}
    assert tying == {"acc", "acc_norm", "acc_pmi", "exact", "exact_memorisation", "extraction_strength"}
    assert not may_tie("word_perplexity")


GRID = (0.5, 1.0, 1.5, 2.0)


def value_at(point: SweepPoint) -> float:
    return point.scores[0].score.value


def better(one: SweepPoint, other: SweepPoint) -> bool:
    return value_at(one) < value_at(other)


class Problem:
    """A mean of one falling function per part, within bounds of any kind; remembers what it was asked."""

    def __init__(
        self,
        names: Sequence[str],
        steepness: Mapping[str, float],
        within: Callable[[Mapping[str, float]], bool],
        grid: Sequence[float] = GRID,
    ) -> None:
        self.names, self.steepness, self.within, self.grid = names, steepness, within, grid
        self.asked: list[tuple[float, ...]] = []

    def point(self, coefficients: tuple[float, ...]) -> SweepPoint:
        at = dict(zip(sorted(self.names), coefficients, strict=True))
        value = sum(1 / (1 + self.steepness[n] * c) for n, c in at.items()) / len(at)
        score = TaskScore("forget", "all", "validation", "prob", True, Score(value, None, 10))
        return SweepPoint(max(coefficients), (score,), self.within(at))

    def score(self, coefficients: tuple[float, ...]) -> SweepPoint:
        self.asked.append(coefficients)
        return self.point(coefficients)

    def solve(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """The coefficients found, undone from the weights by the largest that was tried with that direction."""
        weights, tried = balance(names or self.names, self.grid, self.score, better)
        assert list(tried) == self.asked
        assert len(set(self.asked)) == len(self.asked), "asked twice"
        assert max(weights.values()) == 1
        assert min(weights.values()) > 0
        return weights

    def best(self) -> dict[str, float]:
        """The weights of the best combination of all there are."""
        all_of_them = list(itertools.product(self.grid, repeat=len(self.names)))
        best = min((c for c in all_of_them if self.point(c).within_bound), key=lambda c: value_at(self.point(c)))
        return {n: c / max(best) for n, c in zip(sorted(self.names), best, strict=True)}


@given(
    caps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    steepness=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_separable_problem_is_solved_as_by_exhaustive_search(
    caps: list[int], steepness: list[float], data: st.DataObject
) -> None:
    names = ["b", "a", "c"][: len(caps)]
    cap = dict(zip(names, (GRID[i] for i in caps), strict=True))
    problem = Problem(names, dict(zip(names, steepness, strict=False)), lambda at: all(at[n] <= cap[n] for n in names))
    found = problem.solve(data.draw(st.permutations(names)))
    assert found == problem.best() == {n: cap[n] / max(cap.values()) for n in names}


@given(
    budget=st.floats(0.5, 9),
    price=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    steepness=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_names_makes_no_difference(
    budget: float, price: list[float], steepness: list[float], data: st.DataObject
) -> None:
    names = ["x", "y", "z"]
    cost, steep = dict(zip(names, price, strict=True)), dict(zip(names, steepness, strict=True))

    def within(at: Mapping[str, float]) -> bool:
        return sum(cost[n] * at[n] for n in names) <= budget

    one, other = Problem(names, steep, within), Problem(names, steep, within)
    assert one.solve() == other.solve(data.draw(st.permutations(names)))
    assert one.asked == other.asked


def test_a_start_outside_the_bounds_is_left_for_any_point_within() -> None:
    """Nothing on the diagonal passes, but a step beside its first point does, though it forgets less there."""
    problem = Problem(["a", "b"], {"a": 1.0, "b": -0.1}, lambda at: at == {"a": 0.5, "b": 1.0})
    assert problem.solve() == {"a": 0.5, "b": 1.0}


def test_where_nothing_passes_all_parts_weigh_the_same() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 2.0}, lambda at: False)
    assert problem.solve() == {"a": 1.0, "b": 1.0}
    assert (0.5, 0.5) in problem.asked
    assert all(min(c) > 0 for c in problem.asked), "no request is dropped"


def test_points_that_were_ruled_out_or_collapsed_are_no_improvement() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: True)

    def score(c: tuple[float, ...]) -> SweepPoint:
        point = problem.point(c)
        return SweepPoint(point.coefficient, point.scores, True, collapsed="nats" if max(c) > 1 else "")

    weights, tried = balance(problem.names, GRID, score, better)
    assert weights == {"a": 1.0, "b": 1.0}
    assert max(map(max, tried)) == 2


def test_only_the_named_part_of_the_diagonal_is_tried() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: max(at.values()) <= 1.5)
    _, tried = balance(problem.names, GRID, problem.score, better, diagonal=[1.5])
    assert {c for c in tried if c[0] == c[1]} - {(0.5, 0.5)} == {(1.5, 1.5)}


def test_the_number_of_rounds_is_bounded() -> None:
    grid = tuple(float(i) for i in range(1, 30))
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: at["a"] <= 1, grid)
    weights = problem.solve()
    assert weights == {"a": 1 / (1 + ROUNDS), "b": 1.0}


def test_a_kept_metric_without_a_score() -> None:
    base, now = [score(FORGET, 0.9), score(ASIA, 0.8)], [score(FORGET, 0.5)]
    with pytest.raises(EvaluationError, match=r"retain asia acc_norm has no validation score at coefficient 0\.5"):
        judge(0.5, now, base, [ASIA], spec())
    with pytest.raises(EvaluationError, match="utility facts acc"):
        judge(0.5, [*base, score(FACTS, 0.5)], base, [FACTS], spec())


def test_it_ends_within_the_bounds_and_never_worse_than_the_diagonal() -> None:
    problem = Problem(["a", "b"], {"a": 5.0, "b": 0.2}, lambda at: at["a"] + at["b"] <= 2.5)
    weights = problem.solve()
    assert weights == {"a": 1.0, "b": pytest.approx(2 / 3)}, "the first step that is an improvement is taken"
    end = problem.point((1.5, 1.0))
    assert end.within_bound
    assert value_at(end) < min(value_at(p) for c in GRID if (p := problem.point((c, c))).within_bound)
