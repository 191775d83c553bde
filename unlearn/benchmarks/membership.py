"""Membership inference: can one tell, from a model's token probabilities, which texts it was trained on?

Every attack gives a text one number, and higher always means "more likely a member". How well it tells members from
others is the area under the ROC curve: .5 is a coin, 1 tells all of them apart, and below .5 members look *less* known
than others, which gives a forget set away as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlearn.errors import EvaluationError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """What a model says of the answered tokens of one text, each after the true tokens before it; (N,) arrays.

    ``means`` and ``stds`` are the mean and standard deviation of log p over the vocabulary under the model's own
    distribution p at each place, ``greedy`` whether the token is the argmax; log-probabilities are in nats.
    ``zlib_bytes`` is the size of the text, compressed.
    """

    logprobs: Floats
    means: Floats
    stds: Floats
    greedy: NDArray[np.bool_]
    zlib_bytes: int


@dataclass(frozen=True, slots=True)
class Membership:
    """One attack's area under the ROC curve, members against others, with a 95 % bootstrap interval."""

    attack: str
    auc: float
    low: float
    high: float
    n_members: int
    n_others: int


def loss(tokens: TokenScores) -> float:
    """Mean log-probability of the tokens: the loss attack (Yeom et al. 1709.01604)."""
    return float(_tokens(tokens).logprobs.mean())


def min_k(tokens: TokenScores, k: float) -> float:
    """Mean of the share ``k`` of lowest log-probabilities (Min-K% Prob, 2310.16789).

    Their number is rounded down, as the authors do, but is at least one.
    """
    return _lowest(_tokens(tokens).logprobs, k)


def min_k_pp(tokens: TokenScores, k: float) -> float:
    """:func:`min_k` of (log p - mean) / std, how each token stands among all that could be there (2404.02936).

    Where all tokens are equally likely, the deviation is 0 and so is this.
    """
    off = _tokens(tokens).logprobs - tokens.means
    return _lowest(np.divide(off, tokens.stds, out=np.zeros_like(off), where=tokens.stds > 0), k)


def zlib(tokens: TokenScores) -> float:
    """Mean log-probability per byte of the compressed text (Carlini et al. 2012.07805), as in Min-K%'s and MUSE's code.

    Dull texts are likely whether they were trained on or not; they also compress well.
    """
    if tokens.zlib_bytes < 1:
        raise EvaluationError("the zlib attack needs the compressed size of every text")
    return loss(tokens) / tokens.zlib_bytes


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Probability that a member scores higher than an other, ties counted half (Mann-Whitney U), in O(n log n).

    Args:
        members: (M,) scores.
        others: (N,) scores.

    Raises:
        EvaluationError: nothing on one side, or scores that are no numbers.
    """
    high, low = _scores(members, "members"), np.sort(_scores(others, "others"))
    twice = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(twice) / (2 * len(high) * len(low))


def auc_interval(members: ArrayLike, others: ArrayLike, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of :func:`auc`: percentiles of a bootstrap that draws members and others apart.

    The draws depend on ``seed`` and the numbers of scores alone, so that attacks on the same texts share them. Where
    the two sides do not overlap, no resample can either, and the interval is that one value: read it with the counts.

    Raises:
        EvaluationError: as :func:`auc`, or less than one resample.
    """
    if resamples < 1:
        raise EvaluationError(f"a bootstrap of {resamples} resamples has no interval; use some hundreds")
    high, low = _scores(members, "members"), _scores(others, "others")
    _, code = np.unique(np.concatenate([high, low]), return_inverse=True)  # only the order counts
    ours, theirs, size = code[: len(high)], code[len(high) :], int(code.max()) + 1
    draw, found = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        m = np.bincount(ours[draw.integers(0, len(ours), len(ours))], minlength=size)
        n = np.bincount(theirs[draw.integers(0, len(theirs), len(theirs))], minlength=size)
        found[i] = (m * (2 * np.cumsum(n) - n)).sum() / (2 * len(ours) * len(theirs))
    lower, upper = np.percentile(found, (2.5, 97.5))
    return float(lower), float(upper)


def compare(attack: str, members: ArrayLike, others: ArrayLike, resamples: int = 1000, seed: int = 0) -> Membership:
    """:func:`auc` and :func:`auc_interval` of one attack's scores.

    Raises:
        EvaluationError: as :func:`auc_interval`.
    """
    low, high = auc_interval(members, others, resamples, seed)
    return Membership(attack, auc(members, others), low, high, np.size(members), np.size(others))


def _lowest(values: Floats, k: float) -> float:
    if not 0 < k <= 1:
        raise EvaluationError(f"the share of tokens for Min-k is {k}; it must be above 0 and at most 1")
    count = max(int(len(values) * k), 1)
    return float(np.partition(values, count - 1)[:count].mean())


def _tokens(tokens: TokenScores) -> TokenScores:
    if not len(tokens.logprobs):
        raise EvaluationError("membership cannot be told of a text without a token that was predicted; leave it out")
    return tokens


def _scores(values: ArrayLike, which: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise EvaluationError(f"membership needs scores of both sides, and there are none of {which}")
    if np.isnan(found).any():
        raise EvaluationError(f"{int(np.isnan(found).sum())} of {found.size} scores of {which} are no numbers")
    return found
