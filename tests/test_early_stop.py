"""The statistical stop: against a formula written another way, and against chance itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from unlearn.early_stop import DOUBT, FEW, Values, beyond_doubt, worth_a_look
from unlearn.metrics import Key
from unlearn.recipe import ChooseSpec
from unlearn.report import Role, Score, TaskScore
from unlearn.search import judge

Array = NDArray[np.float64]
ACC: Key = ("retain", "asia", "acc")
LOSS: Key = ("retain", "asia", "loss")
LOGPROB: Key = ("retain", "asia", "logprob")
PPL: Key = ("utility", "wiki", "perplexity")


def values(numbers: Array, tokens: Array | None = None) -> Values:
    weights = np.ones(len(numbers)) if tokens is None else tokens
    return {item: (float(v), float(w)) for item, (v, w) in enumerate(zip(numbers, weights, strict=True))}


def total(key: Key, found: Values) -> float:
    numbers, weights = np.array(list(found.values())).T
    mean = float(numbers.sum() / weights.sum())
    return math.exp(-mean) if key == PPL else mean


def scored(key: Key, found: Values) -> TaskScore:
    role: Role = key[0]  # type: ignore[assignment]
    value = Score(total(key, found), None, len(found))
    return TaskScore(role, key[1], "validation", key[2], key in (ACC, LOGPROB), value)


def part(found: Values, items: NDArray[np.int64]) -> Values:
    return {int(item): found[int(item)] for item in items}


def stops(key: Key, before: Values, now: Values, spec: ChooseSpec | None = None) -> tuple[str, ...]:
    return beyond_doubt({key: now}, {key: before}, [scored(key, before)], [key], spec or ChooseSpec())


def breaks(key: Key, before: Values, now: Values) -> bool:
    return not judge(1.0, [scored(key, now)], [scored(key, before)], [key], ChooseSpec()).within_bound


def pairs(key: Key, rng: np.random.Generator, count: int, harm: float) -> tuple[Values, Values]:
    """All items before, and after an edit that does more damage the larger ``harm`` is."""
    if key == ACC:
        before = (rng.random(count) < 0.85).astype(float)
        flips = rng.random(count)
        after = np.where(flips < harm, 0.0, np.where(flips > 0.97, 1.0, before))
        return values(before), values(after)
    if key == PPL:
        tokens = rng.integers(20, 200, count).astype(float)
        loss = rng.gamma(9, 0.3, count)
        worse = loss + harm * rng.gamma(2, 0.5, count) - 0.02
        return values(-loss * tokens, tokens), values(-worse * tokens, tokens)
    sign = -1.0 if key == LOGPROB else 1.0
    loss = rng.gamma(4, 0.5, count)
    return values(sign * loss), values(sign * (loss + harm * rng.gamma(2, 0.5, count)))


@pytest.mark.parametrize("key", [ACC, LOSS, LOGPROB, PPL])
def test_the_test_is_what_it_says(key: Key) -> None:
    """In numpy, and the other way round: the largest rate of standard errors at which the verdict holds."""
    rng = np.random.default_rng(1)
    verdicts = set()
    for harm in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0) * 4:
        before, after = pairs(key, rng, 120, harm)
        items = rng.permutation(120)[:30]
        was = np.array([before[int(i)] for i in items])
        now = np.array([after[int(i)] for i in items])
        if key == PPL:
            was_allowed = math.log(total(key, before) + 0.5) - math.log(total(key, before))
            d = was[:, 0] - now[:, 0] - was_allowed * now[:, 1]
        elif key == ACC:
            d = 0.95 * was[:, 0] - now[:, 0]
        else:
            d = (now[:, 0] - was[:, 0] / 0.95) * (1 if key == LOSS else -1)
        variance = d.var(ddof=1) / 30 * (120 - 30) / 120
        wanted = bool(d.mean() > 0 and d.mean() ** 2 > DOUBT**2 * variance)
        assert bool(stops(key, before, part(after, items))) is wanted
        verdicts.add(wanted)
    assert verdicts == {True, False}


@pytest.mark.parametrize("key", [ACC, LOSS, LOGPROB, PPL])
@pytest.mark.parametrize(("total_items", "seen"), [(107, 27), (80, 20), (400, 100), (60, 30)])
def test_what_is_within_its_bound_is_hardly_ever_stopped(key: Key, total_items: int, seen: int) -> None:
    """Populations as close to the bound as they come, each looked at by many random parts."""
    rng = np.random.default_rng(total_items)
    wrong = looks = 0
    for _ in range(12):
        before, after = _nearest(
            lambda harm, seed: pairs(key, np.random.default_rng(seed), total_items, harm), key, rng
        )
        assert not breaks(key, before, after)
        for _ in range(100):
            items = rng.permutation(total_items)[:seen]
            wrong += bool(stops(key, before, part(after, items)))
            looks += 1
    assert wrong / looks <= 0.005


def _nearest(
    make: Callable[[float, int], tuple[Values, Values]], key: Key, rng: np.random.Generator
) -> tuple[Values, Values]:
    """The most harm, on a fine scale, that leaves a population within its bound."""
    seed = int(rng.integers(2**31))
    fits = [pair for harm in np.linspace(0, 1, 101) if not breaks(key, *(pair := make(float(harm), seed)))]
    return fits[-1]


@pytest.mark.parametrize("key", [ACC, LOSS, LOGPROB, PPL])
def test_a_clear_break_is_seen(key: Key) -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        before, after = pairs(key, rng, 107, 0.8)
        assert breaks(key, before, after)
        seen += bool(stops(key, before, part(after, rng.permutation(107)[:27])))
    assert seen >= 48


def test_a_perplexity_is_linear_in_its_items() -> None:
    """On all items the verdict's numbers have the sign of limit - perplexity, whatever the passages' lengths."""
    rng = np.random.default_rng(3)
    for harm in np.linspace(0, 0.4, 41):
        before, after = pairs(PPL, rng, 60, float(harm))
        allowed = math.log(total(PPL, before) + 0.5) - math.log(total(PPL, before))
        left = sum(after[i][0] - before[i][0] + allowed * after[i][1] for i in before)
        assert (left < 0) is breaks(PPL, before, after)


def test_the_phrase_says_on_how_many_items() -> None:
    before = values(np.array([1.0] * 40 + [0.0] * 60))
    now = part(values(np.zeros(100)), np.arange(0, 100, 4))
    assert stops(ACC, before, now) == ("retain asia acc fell to 0 from 0.4 (on 25 of 100 items)",)
    tokens = np.full(100, 10.0)
    cheap, dear = values(np.full(100, -20.0), tokens), values(np.full(100, -30.0), tokens)
    (told,) = stops(PPL, cheap, part(dear, np.arange(25)))
    assert told == f"utility wiki perplexity rose to {math.exp(3):.4g} from {math.exp(2):.4g} (on 25 of 100 items)"


def test_no_verdict_without_ground() -> None:
    before, now = values(np.ones(200)), values(np.zeros(200))
    assert stops(ACC, before, part(now, np.arange(FEW)))
    assert not stops(ACC, before, part(now, np.arange(FEW - 1))), "too few items"
    assert not stops(ACC, before, part(now, np.arange(FEW)), ChooseSpec(keep=0.0)), "no bound"
    assert not stops(LOSS, before, part(values(np.full(200, 9.0)), np.arange(FEW)), ChooseSpec(keep=0.0))
    assert not stops(ACC, before, part(before, np.arange(FEW))), "nothing has changed"
    other = [TaskScore("retain", "asia", "validation", "acc", True, Score(0.5, None, 200))]  # a median, say
    few = part(now, np.arange(FEW))
    assert not beyond_doubt({ACC: few}, {ACC: before}, other, [ACC], ChooseSpec()), "not the mean of its items"
    assert not beyond_doubt({ACC: few}, {}, [scored(ACC, before)], [ACC], ChooseSpec()), "no values to compare with"
    assert not beyond_doubt({ACC: few}, {ACC: before}, [scored(ACC, before)], [LOSS], ChooseSpec()), "not asked for"


def test_when_a_look_is_worth_it() -> None:
    base = {ACC: values(np.ones(79)), PPL: values(np.full(30, -20.0), np.full(30, 10.0))}
    scores = [scored(ACC, base[ACC]), scored(PPL, base[PPL])]
    assert not worth_a_look(base, scores, [ACC, PPL], 0.25)
    assert worth_a_look(base, scores, [ACC, PPL], 0.5)
    assert not worth_a_look(base, scores, [PPL], 0.5)
    assert not worth_a_look(base, scores, [], 0.5)
