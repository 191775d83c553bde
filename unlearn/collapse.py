"""Whether a model still is one: at large coefficients it falls off a cliff (MUSE, 2407.06460), and a score
that happens to look good there must not be chosen.

Accuracies hide it: four choices can be told apart by a model that can no longer write. So the kept sets' losses are
looked at, in nats per token. The log-probability of a choice is that of a whole answer, and counts as some tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unlearn.metrics import Key, is_perplexity
from unlearn.report import TaskScore

BROKEN = "its log-likelihoods are no numbers"
TOKENS = 3.0  # that the answer of a choice counts as


def collapsed(scores: Mapping[Key, TaskScore], base: Mapping[Key, TaskScore], kept: Sequence[Key], limit: float) -> str:
    """Why the model counts as broken here, or nothing.

    Args:
        scores: All scores at a coefficient.
        base: The target model's.
        kept: Keys of the kept sets' metrics; of these sets the losses are compared.
        limit: Nats by which a kept set's loss may rise.
    """
    sets = {key[:2] for key in kept}
    worst, where = 0.0, ""
    for key, before in base.items():
        if key[:2] in sets and key in scores and (rise := _rise(before, scores[key])) is not None and rise > worst:
            worst, where = rise, f"{key[0]} {key[1]}"
    if worst <= limit:
        return ""
    return f"the loss on {where} rose by {worst:.1f} nats per token, more than {limit:g}: the model has collapsed"


def _rise(before: TaskScore, after: TaskScore) -> float | None:
    """Of a loss, in nats; None for metrics that are none."""
    was, now = before.score.value, after.score.value
    if not math.isfinite(was):
        return None
    if before.metric == "loss":
        return now - was
    if before.metric == "logprob":
        return (was - now) / TOKENS
    if is_perplexity(before.metric) and was > 0 and 0 < now < math.inf:
        return math.log(now / was)
    return None
