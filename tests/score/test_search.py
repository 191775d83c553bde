"""The rule that picks the coefficient, on cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.errors import EvaluationError
from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.metrics import Key, is_perplexity
from unlearn.results import Role, Score, SweepPoint, TaskScore
from unlearn.score.search import blind, choose, holds, judge, left, may_be_chosen, require_grounds, rule, share_left

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
    ("was", "now", "keep", "ok"),
    [
        (0.8, 0.76, 0.95, True),  # exactly 95 %
        (0.8, 0.7599, 0.95, False),
        (0.8, 0.9, 0.95, True),
        (0.8, 0.8, 1.0, True),
        (0.8, 0.7999, 1.0, False),
        (0.8, 0.0, 0.0, True),
        (0.0, 0.0, 0.95, True),
        (0.3, 0.3 * 0.95, 0.95, True),  # 0.285 and 0.3 * 0.95 differ in the last bit
        (0.3, 0.285, 0.95, True),
    ],
)
def test_a_score_keeps_its_share(was: float, now: float, keep: float, ok: bool) -> None:
    assert within(ASIA, was, now, keep=keep) is ok


@pytest.mark.parametrize(
    ("now", "allowed", "ok"),
    [
        (12.5, 0.5, True),
        (12.51, 0.5, False),
        (11.0, 0.5, True),
        (12.0, 0.0, True),
        (12.01, 0.0, False),
        (14.0, 2.0, True),
    ],
)
def test_a_perplexity_may_rise_by_so_much(now: float, allowed: float, ok: bool) -> None:
    """From 12. The share (keep) has no say: 12.5 is more than 12 / 0.99."""
    assert within(PPL, 12.0, now, higher=False, perplexity=allowed, keep=0.99) is ok


def test_which_metrics_are_perplexities() -> None:
    assert is_perplexity("word_perplexity")
    assert is_perplexity("perplexity")
    assert not is_perplexity("loss")
    assert not is_perplexity("acc_norm")


@pytest.mark.parametrize(("now", "ok"), [(2.0, True), (2.1052, True), (2.1053, False), (3.0, False), (1.0, True)])
def test_a_loss_may_grow_by_the_share(now: float, ok: bool) -> None:
    """From 2.0 at keep 0.95: up to 2 / 0.95 = 2.10526."""
    assert within(LOSS, 2.0, now, higher=False) is ok


@pytest.mark.parametrize(("now", "ok"), [(-3.0, True), (-3.1578, True), (-3.158, False), (-4.0, False), (-0.1, True)])
def test_a_log_probability_may_grow_more_negative_by_the_share(now: float, ok: bool) -> None:
    """From -3.0 at keep 0.95: down to -3 / 0.95 = -3.15789. Multiplying would ask for -2.85, a gain."""
    assert within(LOGPROB, -3.0, now) is ok


def test_keep_nothing_bounds_nothing() -> None:
    assert within(LOGPROB, -3.0, -300.0, keep=0.0)
    assert within(LOSS, 2.0, 200.0, higher=False, keep=0.0)


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


def test_a_kept_metric_without_a_score() -> None:
    base, now = [score(FORGET, 0.9), score(ASIA, 0.8)], [score(FORGET, 0.5)]
    with pytest.raises(EvaluationError, match=r"retain asia acc_norm has no validation score at coefficient 0\.5"):
        judge(0.5, now, base, [ASIA], spec())
    with pytest.raises(EvaluationError, match="utility facts acc"):
        judge(0.5, [*base, score(FACTS, 0.5)], base, [FACTS], spec())


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


def test_most_forgetting_within_the_bound() -> None:
    points = sweep((0.25, 0.8, 0.8), (0.5, 0.6, 0.77), (0.75, 0.4, 0.75), (1.0, 0.2, 0.5))
    assert [p.within_bound for p in points] == [True, True, True, False, False]  # the bound is 0.76
    assert chosen(points) == (0.5, True)
    assert chosen(points[::-1]) == (0.5, True)  # whatever the order


def test_the_curve_need_not_fall_all_the_way() -> None:
    """Forgetting may turn round, and a larger coefficient may pass where a smaller one fails."""
    assert chosen(sweep((0.25, 0.5, 0.8), (0.5, 0.7, 0.8))) == (0.25, True)
    assert chosen(sweep((0.25, 0.5, 0.7), (0.5, 0.45, 0.8))) == (0.5, True)


def test_the_smaller_coefficient_on_a_tie() -> None:
    points = sweep((0.25, 0.5, 0.8), (0.5, 0.3, 0.8), (0.75, 0.3, 0.8), (1.0, 0.3, 0.79))
    assert chosen(points) == (0.5, True)
    assert chosen(points[::-1]) == (0.5, True)


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_lower_is_better_is_driven_up(metric: str) -> None:
    """A forget loss of 2 at the start: more of it is more forgetting."""
    goal: Key = ("forget", "europe", metric)

    def picked(*values: float) -> float:
        points = [SweepPoint(float(c), (score(goal, v, higher=False),), c < 3) for c, v in enumerate(values)]
        return choose(points, [goal], [], spec()).coefficient

    assert picked(2.0, 3.0, 4.0, 9.0) == 2.0
    assert picked(2.0, 1.5) == 0.0


def test_log_probabilities_of_the_forget_set() -> None:
    goal: Key = ("forget", "europe", "logprob")
    points = [SweepPoint(float(c), (score(goal, v),), True) for c, v in enumerate((-3.1, -5.0, -6.8))]
    assert choose(points, [goal], [], spec()).coefficient == 2.0


def test_nothing_passes() -> None:
    got = choose(sweep((0.5, 0.1, 0.7), (1.0, 0.0, 0.1)), [FORGET], [ASIA], spec())
    assert (got.coefficient, got.bound_met) == (0.0, False)
    assert got.forget_metric == "acc_norm"
    assert got.rule == rule(spec(), [FORGET], [ASIA])


@pytest.mark.parametrize("forget", [0.9, 0.95])
def test_a_coefficient_that_forgets_nothing_is_none(forget: float) -> None:
    assert chosen(sweep((0.5, forget, 0.8), (1.0, 0.2, 0.1))) == (0.0, False)


def test_a_forget_score_that_is_no_number_is_no_forgetting() -> None:
    assert chosen(sweep((0.5, math.nan, 0.8), (1.0, 0.6, 0.8))) == (1.0, True)
    assert chosen(sweep((0.5, math.nan, 0.8))) == (0.0, False)


def test_what_is_left_of_a_forget_score() -> None:
    base, point = sweep((0.5, 0.6, 0.8))
    assert left(base, [FORGET], base) == 1
    assert left(point, [FORGET], base) == pytest.approx(2 / 3)
    with pytest.raises(EvaluationError, match=r"no validation score at coefficient 0\.5"):
        left(point, [FACTS], replace(base, scores=(*base.scores, score(FACTS, 0.5))))


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


def test_the_rule_in_words() -> None:
    assert rule(spec(), [FORGET], []) == (
        "most forgetting of europe (acc_norm) on validation items; nothing was asked to be kept"
    )
    both = rule(spec(keep=0.9, perplexity=1.5), [FORGET], [ASIA, PPL])
    assert "at least 90 % of the target model's score or at most +1.5 perplexity" in both
    assert "at least 97.5 % of" in rule(spec(keep=0.975), [FORGET], [ASIA]), "rounded, it would be another bound"
    assert "perplexity" not in rule(spec(), [FORGET], [ASIA])
    assert "share" not in rule(spec(), [FORGET], [PPL])
    assert "95 %" not in rule(spec(), [FORGET], [PPL])


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
    assert left(point, [FORGET, AMERICAS], base) == pytest.approx((0.75 + 0.2) / 2)
    assert left(point, goals, base) == pytest.approx((0.75 + 0.2 + 0.25 + 0.5 / 0.75) / 4)
    assert left(base, goals, base) == 1
    with pytest.raises(EvaluationError, match="the learn metric learn facts acc has no validation score"):
        left(point, [("learn", "facts", "acc")], base)


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


def test_a_perplexity_does_not_outweigh_a_probability() -> None:
    """One point of perplexity is more than all there is of a probability, and yet it is nearly nothing."""
    prob, text = ("forget", "answers", "prob"), ("forget", "book", "perplexity")
    table = {0.0: (0.90, 30.0), 1.0: (0.10, 30.0), 2.0: (0.95, 31.0)}
    points = [SweepPoint(c, (score(prob, a), score(text, b, higher=False)), True) for c, (a, b) in table.items()]
    assert choose(points, [prob, text], [], spec()).coefficient == 1.0


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


def test_a_forget_set_that_was_only_guessed_is_said() -> None:
    base = SweepPoint(0.0, (guessing(FORGET, 0.25, 0.25),), True)
    assert "no more than guessing (0.250)" in require_grounds(base, [FORGET], [], spec())[FORGET]


def test_the_verdict_is_of_whole_items() -> None:
    """19 of 26 are just 95 % of 20 of 26, whatever floats make of the quotient."""
    assert holds("acc", True, 20 / 26, 19 / 26, 0.95, 0.5)
    assert not holds("acc", True, 20 / 26, 18 / 26, 0.95, 0.5)
    assert (19 / 26) / (20 / 26) < 0.95, "which is why a quotient is no measure"


def test_most_learning_is_chosen_and_only_if_something_is_learned() -> None:
    def points(*values: float) -> list[SweepPoint]:
        return [SweepPoint(float(c), (score(AFRICA, v), score(FACTS, 0.5)), c < 3) for c, v in enumerate(values)]

    got = choose(points(0.6, 0.7, 0.9, 1.0), [AFRICA], [FACTS], spec())
    assert (got.coefficient, got.bound_met, got.forget_metric) == (2.0, True, "acc")
    assert got.rule.startswith("most learning of africa (acc) on validation items, while every kept metric")
    assert not choose(points(0.6, 0.6, 0.5), [AFRICA], [FACTS], spec()).bound_met


def test_the_rule_for_both() -> None:
    assert rule(spec(), [FORGET, AFRICA], []).startswith(
        "most forgetting of europe (acc_norm) and learning of africa (acc) on validation items, on average"
    )


def test_a_collapsed_point_is_never_chosen() -> None:
    points = sweep((0.5, 0.5, 0.8), (1.0, 0.1, 0.8))
    assert choose(points, [FORGET], [ASIA], spec()).coefficient == 1.0
    points = [*points[:-1], replace(points[-1], collapsed="it says one token over and over")]
    assert not may_be_chosen(points[-1])
    assert choose(points, [FORGET], [ASIA], spec()).coefficient == 0.5
