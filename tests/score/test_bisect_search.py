"""The bisection against the full grid, on curves made up: the same choice within a step, for half of the cost."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.recipe.evaluation import ChooseSpec
from unlearn.recipe.metrics import METRICS, Key
from unlearn.results import Score, SweepPoint, TaskScore
from unlearn.score.search import bisect, choose, left, may_tie

FORGET: Key = ("forget", "europe", "acc")


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
        points = bisect(self.grid, self.point(0), self.score, lambda p: left(p, [FORGET], self.point(0)), ties=ties)
        assert [p.coefficient for p in points] == sorted(p.coefficient for p in points)
        return self.chosen(points), points

    def best(self) -> int:
        """The index that is chosen from the full grid."""
        return self.chosen([self.point(index) for index in range(len(self.knows))])

    @staticmethod
    def chosen(points: Sequence[SweepPoint]) -> int:
        found = choose(points, [FORGET], [], ChooseSpec())
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


@pytest.mark.parametrize("size", [4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17])
def test_every_curve_that_falls_until_it_saturates(size: int) -> None:
    for last in range(size + 1):
        for floor in range(size + 1):
            agrees(saturating(size, last, floor))


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 40), st.data())
def test_any_such_curve_on_any_grid(size: int, data: st.DataObject) -> None:
    last, floor = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    agrees(saturating(size, last, floor))


@settings(max_examples=300, deadline=None)
@given(st.integers(12, 40), st.data())
def test_level_stretches_before_the_end(size: int, data: st.DataObject) -> None:
    """Accuracy on few items: it stands still for a while and falls again."""
    falls = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    last = data.draw(st.integers(0, size))
    knows = [1 - sum(falls[:index]) / (size + 1) for index in range(size + 1)]
    agrees(Model(knows, [index <= last for index in range(size + 1)]))


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 40), st.data())
def test_without_ties_it_is_the_grids_own_choice(size: int, data: st.DataObject) -> None:
    model = saturating(size, data.draw(st.integers(0, size)), size)
    assert model.searched(ties=False)[0] == model.best()
    assert len(model.asked) <= math.ceil(math.log2(size + 1))


@settings(max_examples=300, deadline=None)
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


def test_where_nothing_passes_all_that_is_smaller_was_tried() -> None:
    model = saturating(8, last=0, floor=8)
    chosen, points = model.searched()
    assert chosen == model.best() == 0
    assert [round(4 * p.coefficient) for p in points] == [0, 1, 2, 4]
    assert not any(p.within_bound for p in points[1:])


def test_what_is_asked_for() -> None:
    model = saturating(8, last=5, floor=8)
    _, points = model.searched(ties=False)
    assert model.asked == [4, 6, 5]
    assert [(p.coefficient, p.within_bound) for p in points] == [(0, True), (1, True), (1.25, True), (1.5, False)]


def test_one_coefficient() -> None:
    for last in (0, 1):
        model = saturating(1, last, 1)
        assert model.searched()[0] == model.best() == last
        assert model.asked == [1]


def test_which_scores_tie() -> None:
    tying = {metric for metrics in METRICS.values() for metric in metrics if may_tie(metric)}
    assert tying == {"acc", "acc_norm", "exact", "exact_memorisation", "extraction_strength"}
    assert not may_tie("word_perplexity")
