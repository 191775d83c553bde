"""Standard errors beside lm-eval's: one that it lacks, and leave to skip those that cost a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.metrics import acc_all, mean
from lm_eval.api.task import Task

_FORMULAS: tuple[Callable[..., Any], ...] = (mean, acc_all)  # aggregations whose standard error lm-eval computes


def perplexity_stderr(items: Sequence[tuple[float, int]]) -> float:
    """Standard error of exp(total nll / total tokens) by the delta method; lm-eval has none for it.

    Args:
        items: ``(log-likelihood, tokens)`` of each passage, at least two.

    The mean loss R = sum(nll)/sum(tokens) is a ratio of two sums over passages, whose variance is
    sum((nll - R tokens)^2) / (n - 1) / n / mean(tokens)^2 (Cochran, Sampling Techniques, section 6.3); then
    stderr(exp R) = exp(R) stderr(R).
    """
    n = len(items)
    tokens = sum(t for _, t in items)
    loss = -sum(ll for ll, _ in items) / tokens
    spread = sum((-ll - loss * t) ** 2 for ll, t in items) / (n - 1)
    return math.exp(loss) * math.sqrt(spread / n) / (tokens / n)


@contextmanager
def formulas_only(tasks: Iterable[Task]) -> Iterator[None]:
    """Inside the ``with`` lm-eval resamples nothing for these tasks, and says no standard error where it would have.

    Its own switch (``bootstrap_iters=0``) leaves out those with a formula as well. It tells metrics to resample by
    their aggregating function, so here another function that computes the same stands for it.
    """
    changed = list(tasks)
    for task in changed:
        functions: Mapping[str, Callable[..., Any]] = task.aggregation()
        disguised = {name: f if f in _FORMULAS else _same_as(f) for name, f in functions.items()}
        task.aggregation = lambda disguised=disguised: disguised
    try:
        yield
    finally:
        for task in changed:
            del task.aggregation


def _same_as(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda items: function(items)
