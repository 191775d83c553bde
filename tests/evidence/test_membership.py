"""Membership attacks, by hand and against scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from unlearn.errors import EvaluationError
from unlearn.evidence import membership as m

few = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def tokens(
    logprobs: Sequence[float], means: Sequence[float] = (), stds: Sequence[float] = (), size: int = 10
) -> m.TokenScores:
    n = len(logprobs)
    return m.TokenScores(
        np.array(logprobs, dtype=float),
        np.array(means or [-2.0] * n, dtype=float),
        np.array(stds or [1.0] * n, dtype=float),
        np.zeros(n, dtype=bool),
        size,
    )


# --- the area under the curve ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(few, few)
def test_auc_is_scikit_learns_ties_and_all(members: list[int], others: list[int]) -> None:
    wanted = roc_auc_score([1] * len(members) + [0] * len(others), members + others)
    assert m.auc(members, others) == pytest.approx(wanted, abs=1e-12)
    assert m.auc(others, members) == pytest.approx(1 - wanted, abs=1e-12)


def test_auc_of_many_distinct_scores_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.normal(0.4, 1, 700), draw.normal(0, 1, 500)
    wanted = roc_auc_score([1] * 700 + [0] * 500, np.concatenate([members, others]))
    assert m.auc(members, others) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("members", "others", "wanted"),
    [
        ([3.0, 2.0], [1.0, 0.0], 1.0),
        ([0.0], [1.0, 2.0], 0.0),
        ([5.0, 5.0], [5.0, 5.0, 5.0], 0.5),
        ([1.0], [1.0], 0.5),
        ([2.0], [1.0], 1.0),
        ([1.0, 3.0], [2.0], 0.5),
        ([2.0, 3.0], [2.0, 1.0], 0.875),
        ([math.inf], [0.0], 1.0),
    ],
)
def test_auc_by_hand(members: list[float], others: list[float], wanted: float) -> None:
    assert m.auc(members, others) == wanted


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="none of members"):
        m.auc([], [1.0])
    with pytest.raises(EvaluationError, match="none of others"):
        m.auc([1.0], [])
    with pytest.raises(EvaluationError, match="1 of 2 scores of others are no numbers"):
        m.auc([1.0], [1.0, math.nan])
    with pytest.raises(EvaluationError, match="none of members"):
        m.auc_interval([], [1.0])
    with pytest.raises(EvaluationError, match="bootstrap of 0 resamples"):
        m.auc_interval([1.0], [1.0], 0)


def test_the_interval_is_a_stratified_bootstraps() -> None:
    draw = np.random.default_rng(1)
    members, others = np.round(draw.normal(0.5, 1, 40), 1), np.round(draw.normal(0, 1, 30), 1)  # with ties
    low, high = m.auc_interval(members, others, 400, seed=5)
    again = np.random.default_rng(5)
    found = []
    for _ in range(400):  # the same draws, scored by another library
        ours, theirs = members[again.integers(0, 40, 40)], others[again.integers(0, 30, 30)]
        found.append(roc_auc_score([1] * 40 + [0] * 30, np.concatenate([ours, theirs])))
    assert (low, high) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])), abs=1e-12)
    assert low < m.auc(members, others) < high
    assert m.auc_interval(members, others, 400, seed=5) == (low, high)
    assert m.auc_interval(members, others, 400, seed=6) != (low, high)


def test_an_interval_can_be_a_point() -> None:
    assert m.auc_interval([1.0], [2.0]) == (0.0, 0.0)
    assert m.auc_interval([4.0, 3.0], [1.0, 2.0]) == (1.0, 1.0)
    assert m.auc_interval([1.0, 1.0], [1.0]) == (0.5, 0.5)


# --- the attacks -----------------------------------------------------------------------------------------------------


def test_the_attacks_by_hand() -> None:
    one = tokens([-1.0, -5.0, -2.0, -4.0, -3.0], means=[-2, -4, -2, -1, -3], stds=[1, 0.5, 2, 3, 1], size=20)
    assert m.loss_score(one) == -3.0
    assert m.min_k(one, 0.4) == -4.5  # the lowest 2 of 5
    assert m.min_k(one, 1.0) == -3.0
    assert m.min_k(one, 0.59) == -4.5  # 2.95 is rounded down
    assert m.min_k(one, 0.01) == -5.0  # but one token there is
    # z: 1, -2, 0, -1, 0
    assert m.min_k_pp(one, 0.4) == -1.5
    assert m.min_k_pp(one, 1.0) == pytest.approx(-0.4)
    assert m.zlib_score(one) == -3.0 / 20


def test_one_token_and_no_deviation() -> None:
    one = tokens([-1.0], means=[-1.0], stds=[0.0])
    assert (m.loss_score(one), m.min_k(one, 0.4), m.min_k_pp(one, 0.4)) == (-1.0, -1.0, 0.0)


def test_more_likely_text_scores_higher_in_every_attack() -> None:
    likely, unlikely = tokens([-0.1, -0.2]), tokens([-3.0, -4.0])
    for attack in (m.loss_score, m.zlib_score, lambda t: m.min_k(t, 0.5), lambda t: m.min_k_pp(t, 0.5)):
        assert attack(likely) > attack(unlikely)


def test_what_cannot_be_attacked_is_named() -> None:
    with pytest.raises(EvaluationError, match="text without a token"):
        m.loss_score(tokens([]))
    with pytest.raises(EvaluationError, match="none of members"):
        m.compare("loss", [], [1.0])
    with pytest.raises(EvaluationError, match="none of others"):
        m.compare("loss", [1.0], [])
    for share in (0, 40):
        with pytest.raises(EvaluationError, match=f"share of tokens for Min-k is {share}"):
            m.min_k(tokens([-1.0]), share)
    with pytest.raises(EvaluationError, match="compressed size"):
        m.zlib_score(tokens([-1.0], size=0))
