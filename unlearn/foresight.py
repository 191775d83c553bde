"""Before the edit: how each kept set's task correlates with the forgotten one, and what the edit will cost it at first.

After the sweep :func:`compare` says how good that was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from unlearn.batches import Encoded
from unlearn.console import progress
from unlearn.correlation import correlate, slope
from unlearn.data import LoadedSet
from unlearn.encoding import reach, scored_rows
from unlearn.errors import EvaluationError
from unlearn.metrics import KEPT
from unlearn.prediction import compare as compare
from unlearn.prediction import verdict
from unlearn.recipe import Kind
from unlearn.report import Foresight, Role, SetForesight
from unlearn.vector import TaskVector

LIMIT = 64
# The metric of each kind that is a log-likelihood in nats; perplexity is none.
NATS: Mapping[Kind, str] = {"mcq": "logprob", "qa": "loss", "text": "loss"}


def foresee(
    model: nn.Module,
    edit: TaskVector,
    forget_vector: TaskVector,
    near: Mapping[tuple[Role, str], TaskVector],
    sets: Sequence[LoadedSet],
    tokenizer: Any,
    limit: int = LIMIT,
) -> Foresight:
    """Slopes along the edit for every set, and correlations for those that have a fine-tuning of their own.

    Both are taken on validation items, those that the sweep scores (training items where a set has no others); test
    items are not looked at.

    Args:
        model: theta, on its device; it comes back as it was.
        edit: What will be subtracted, as shaped.
        forget_vector: The fine-tuning on the forget set, before it was shaped; of several sets, the sum.
        near: (role, name) of a kept set -> the fine-tuning on it. One on several sets may stand for each of them.
        sets: The recipe's data, a forget set among them. Sets without any such item, and those that are only terms of
            an analogy, are left out.
        tokenizer: The model's.
        limit: Items per set at most; they come in random order.

    Raises:
        EvaluationError: no forget set, or one without items.
        VectorError: a vector does not fit the model.
    """
    longest = reach(model, tokenizer)
    rows: dict[tuple[Role, str], list[Encoded]] = {}
    kinds: dict[tuple[Role, str], Kind] = {}
    for loaded in sets:
        if loaded.role == "term" or loaded.role == "holdout":
            continue
        items = (loaded.validation or loaded.train)[:limit]
        if found := scored_rows(items, loaded.spec.kind, tokenizer, longest):
            rows[loaded.role, loaded.name], kinds[loaded.role, loaded.name] = found, loaded.spec.kind
    goals = [key for key in rows if key[0] not in KEPT]
    forgotten = [row for key in rows if key[0] == "forget" for row in rows[key]]
    if not forgotten:
        raise EvaluationError("nothing can be foreseen without a forget set that has validation or training items")
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    compared = [key for key in rows if key[0] in KEPT and key in near]
    work = sum(map(len, rows.values())) + sum(len(forgotten) + len(rows[key]) for key in compared)
    with progress("foresight", work) as advance:

        def one(key: tuple[Role, str]) -> SetForesight:
            cost = _finite(slope(model, edit, rows[key], kinds[key], pad_id, advance))
            plain = SetForesight(*key, metric=NATS[kinds[key]], slope=cost, items=len(rows[key]))
            if key not in compared:
                return plain
            return _correlated(plain, model, forget_vector, near[key], (forgotten, rows[key]), pad_id, advance)

        return Foresight(tuple(map(one, goals)), tuple(one(key) for key in rows if key not in goals))


def _correlated(
    plain: SetForesight,
    model: nn.Module,
    forget_vector: TaskVector,
    vector: TaskVector,
    rows: Sequence[Sequence[Encoded]],
    pad_id: int,
    advance: Callable[[int], None],
) -> SetForesight:
    found = correlate(model, forget_vector, vector, rows, pad_id, advance)
    return replace(
        plain,
        alpha_outputs=_finite(found.outputs),
        alpha_changes=_finite(found.changes),
        alpha_stderr=_finite(found.stderr),
        alpha_vectors=_finite(forget_vector.cosine(vector)),
        modules={name: value for name, value in forget_vector.cosines(vector).items() if math.isfinite(value)},
        verdict=verdict(found.changes, found.stderr),
    )


def _finite(value: float | None) -> float | None:
    """The number, or None: in 16 bits a gradient may overflow where the loss does not, and JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None
