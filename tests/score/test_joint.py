"""Coefficients found together, against exhaustive search on made-up problems."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.results import Score, SweepPoint, TaskScore
from unlearn.score.search import ROUNDS, balance, direction
from unlearn.vector.change import LowRank
from unlearn.vector.task_vector import TaskVector

GRID = (0.5, 1.0, 1.5, 2.0)


def left(point: SweepPoint) -> float:
    return point.scores[0].score.value


def better(one: SweepPoint, other: SweepPoint) -> bool:
    return left(one) < left(other)


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
        weights, trail = balance(names or self.names, self.grid, self.score, better)
        assert [t.coefficients for t in trail] == self.asked
        assert len(set(self.asked)) == len(self.asked), "asked twice"
        assert max(weights.values()) == 1
        assert min(weights.values()) > 0
        return weights

    def best(self) -> dict[str, float]:
        """The weights of the best combination of all there are."""
        all_of_them = list(itertools.product(self.grid, repeat=len(self.names)))
        best = min((c for c in all_of_them if self.point(c).within_bound), key=lambda c: left(self.point(c)))
        return {n: c / max(best) for n, c in zip(sorted(self.names), best, strict=True)}


@given(
    caps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    steepness=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
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
@settings(max_examples=60, deadline=None)
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


def test_it_ends_within_the_bounds_and_never_worse_than_the_diagonal() -> None:
    problem = Problem(["a", "b"], {"a": 5.0, "b": 0.2}, lambda at: at["a"] + at["b"] <= 2.5)
    weights = problem.solve()
    assert weights == {"a": 1.0, "b": pytest.approx(2 / 3)}, "the first step that is an improvement is taken"
    end = problem.point((1.5, 1.0))
    assert end.within_bound
    assert left(end) < min(left(p) for c in GRID if (p := problem.point((c, c))).within_bound)


def test_a_step_down_is_taken_where_less_is_better() -> None:
    """A learned set that is best well below the other one's coefficient."""

    def score(c: tuple[float, ...]) -> SweepPoint:
        value = (c[0] - 1.0) ** 2 + (c[1] - 2.0) ** 2
        return SweepPoint(max(c), (TaskScore("learn", "x", "validation", "prob", True, Score(value, None, 9)),), True)

    weights, trail = balance(["low", "tall"][::-1], GRID, score, better)
    assert weights == {"low": 0.5, "tall": 1.0}
    assert trail[0].coefficients == (0.5, 0.5), "the diagonal comes first"


def test_where_nothing_passes_all_parts_weigh_the_same() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 2.0}, lambda at: False)
    assert problem.solve() == {"a": 1.0, "b": 1.0}
    assert (0.5, 0.5) in problem.asked
    assert all(min(c) > 0 for c in problem.asked), "no request is dropped"


def test_a_start_outside_the_bounds_is_left_for_any_point_within() -> None:
    """Nothing on the diagonal passes, but a step beside its first point does, though it forgets less there."""
    problem = Problem(["a", "b"], {"a": 1.0, "b": -0.1}, lambda at: at == {"a": 0.5, "b": 1.0})
    assert problem.solve() == {"a": 0.5, "b": 1.0}


def test_only_the_named_part_of_the_diagonal_is_tried() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: max(at.values()) <= 1.5)
    balance(problem.names, GRID, problem.score, better, diagonal=[1.5])
    assert (1.0, 1.0) not in problem.asked
    assert (2.0, 2.0) not in problem.asked
    assert (1.5, 1.5) in problem.asked


def test_points_that_were_ruled_out_or_collapsed_are_no_improvement() -> None:
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: True)

    def score(c: tuple[float, ...]) -> SweepPoint:
        point = problem.point(c)
        return SweepPoint(point.coefficient, point.scores, True, collapsed="nats" if max(c) > 1 else "")

    _, trail = balance(problem.names, GRID, score, better)
    weights, _ = balance(problem.names, GRID, score, better)
    assert weights == {"a": 1.0, "b": 1.0}
    assert max(t.point.coefficient for t in trail) == 2


def test_the_number_of_rounds_is_bounded() -> None:
    grid = tuple(float(i) for i in range(1, 30))
    problem = Problem(["a", "b"], {"a": 1.0, "b": 1.0}, lambda at: at["a"] <= 1, grid)
    weights = problem.solve()
    assert weights == {"a": 1 / (1 + ROUNDS), "b": 1.0}


def vector(seed: int) -> TaskVector:
    made = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 4, generator=made), torch.randn(3, 2, generator=made)
    return TaskVector({"layer": LowRank(A, B)})


def test_the_direction_is_the_weighted_sum_in_any_order() -> None:
    parts = {("forget", "b"): vector(1), ("learn", "a"): vector(2), ("forget", "a"): vector(3)}
    weights = {("forget", "b"): 0.5, ("learn", "a"): 1.0, ("forget", "a"): 0.25}
    one = direction(parts, weights)
    other = direction(dict(reversed(parts.items())), weights)
    assert one.digest() == other.digest()
    dense = sum(weights[n] * v.modules["layer"].B @ v.modules["layer"].A for n, v in parts.items())  # type: ignore[union-attr]
    found = one.modules["layer"]
    torch.testing.assert_close(found.B @ found.A, dense)  # type: ignore[union-attr]
