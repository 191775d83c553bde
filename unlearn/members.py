"""Membership inference on a model: what it gives away of forget and of held-out items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unlearn.batches import Encoded
from unlearn.benchmarks import membership
from unlearn.benchmarks.membership import TokenScores
from unlearn.collective import count, together
from unlearn.console import progress
from unlearn.data import LoadedSet
from unlearn.errors import EvaluationError
from unlearn.finetune import encode_one
from unlearn.items import Item
from unlearn.member_files import Row
from unlearn.models import Loaded
from unlearn.recipe import Kind
from unlearn.token_scores import token_scores

MIN_K = 0.4  # share of the tokens, as MUSE has it


def members_of(items: Sequence[Item]) -> list[Item]:
    """Each content once, in its first wording: several prompts of one row would count as several members."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    return list(first.values())


def require_tokens(sets: Sequence[LoadedSet], tokenizer: Any, length: int) -> None:
    """Refuse forget or hold-out sets of which :func:`tell` could say nothing.

    Raises:
        EvaluationError: no item has a token within ``length``.
    """
    for s in sets:
        if s.role in ("forget", "holdout"):
            items = s.train if s.role == "forget" else s.test
            if all(encode_one(item, s.spec.kind, tokenizer, length) is None for item in items):
                raise _no_tokens(len(items), length)


def _no_tokens(count: int, length: int) -> EvaluationError:
    return EvaluationError(f"membership: none of {count} items has a token within {length}: raise max_length")


def tell(loaded: Loaded, items: Sequence[tuple[Item, Kind]], length: int, label: str = "scoring") -> list[Row]:
    """What a model gives away of each item: ``id``, ``tokens`` scored, and a number for every attack.

    Args:
        loaded: The model, as it is now.
        items: With the kind of data they are of; for qa and mcq the answer's tokens are told apart, for text all.
        length: Tokens of an item, at most; what is behind is cut off.
        label: What the progress bar says.

    Raises:
        EvaluationError: no item has a token within ``length``.
    """
    encoded = [(item, encode_one(item, kind, loaded.tokenizer, length)) for item, kind in items]
    rows: list[tuple[Item, Encoded]] = [(item, row) for item, row in encoded if row is not None]
    if not rows:
        raise _no_tokens(len(items), length)
    with progress(label, len(rows) // count()) as advance:

        def told(some: Sequence[Encoded]) -> Sequence[TokenScores]:
            return token_scores(loaded.model, loaded.tokenizer, some, advance=advance)

        scores = together([row for _, row in rows], told)
    return [
        {
            "id": item.id,
            "tokens": len(score.logprobs),
            "loss": membership.loss(score),
            "min_k": membership.min_k(score, MIN_K),
            "min_k_pp": membership.min_k_pp(score, MIN_K),
            "zlib": membership.zlib(score),
        }
        for (item, _), score in zip(rows, scores, strict=True)
    ]
