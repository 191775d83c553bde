"""Membership inference on a model: what it gives away of forget and of held-out items."""

from __future__ import annotations

from collections.abc import Sequence

from unlearn.batches import Encoded
from unlearn.benchmarks import membership
from unlearn.benchmarks.membership import TokenScores
from unlearn.collective import count, together
from unlearn.console import progress
from unlearn.data import LoadedSet
from unlearn.encoding import encode, reach
from unlearn.errors import EvaluationError, TrainingError
from unlearn.items import Item
from unlearn.member_files import Row
from unlearn.models import Loaded
from unlearn.readers import shorten
from unlearn.recipe import Kind
from unlearn.token_scores import token_scores

MIN_K = 0.4  # share of the tokens, as MUSE has it


def members_of(items: Sequence[Item]) -> list[Item]:
    """Each content once, in its first wording: several prompts of one row would count as several members."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    return list(first.values())


def require_rows(sets: Sequence[LoadedSet], loaded: Loaded) -> None:
    """Refuse forget or hold-out sets with an item that :func:`tell` cannot score.

    Raises:
        EvaluationError: as :func:`tell`.
    """
    for s in sets:
        if s.role in ("forget", "holdout"):
            for item in s.train if s.role == "forget" else s.test:
                _row(loaded, item, s.spec.kind)


def tell(loaded: Loaded, items: Sequence[tuple[Item, Kind]], label: str = "scoring") -> list[Row]:
    """What a model gives away of each item: ``id``, ``tokens`` scored, and a number for every attack.

    Args:
        loaded: The model, as it is now.
        items: With the kind of data they are of; for qa and mcq the answer's tokens are told apart, for text all.
        label: What the progress bar says.

    Raises:
        EvaluationError: an item that cannot be scored whole, an answer as one beside as much of its prompt as fits.
    """
    rows = [_row(loaded, item, kind) for item, kind in items]
    with progress(label, len(rows) // count()) as advance:

        def told(some: Sequence[Encoded]) -> Sequence[TokenScores]:
            return token_scores(loaded.model, loaded.tokenizer, some, advance=advance)

        scores = together(rows, told)
    return [
        {
            "id": item.id,
            "tokens": len(score.logprobs),
            "loss": membership.loss(score),
            "min_k": membership.min_k(score, MIN_K),
            "min_k_pp": membership.min_k_pp(score, MIN_K),
            "zlib": membership.zlib(score),
        }
        for (item, _), score in zip(items, scores, strict=True)
    ]


def _row(loaded: Loaded, item: Item, kind: Kind) -> Encoded:
    length = reach(loaded.model, loaded.tokenizer)
    try:
        rows = encode([item], kind, loaded.tokenizer, length)
    except TrainingError:
        rows = []
    if len(rows) != 1:
        raise EvaluationError(
            f"membership: the model reads {length} tokens at a time, and this item does not fit, or has no token to "
            f"score: {shorten(f'{item.prompt} {item.target}', 160)!r}: take it out"
        )
    return rows[0]
