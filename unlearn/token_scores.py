"""What a model says of each answered token: the input of membership inference and of memorisation measures."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unlearn.batches import IGNORE, Encoded, Pad, answers
from unlearn.benchmarks.membership import TokenScores
from unlearn.errors import BrokenModelError
from unlearn.frozen import answer_logits, frozen
from unlearn.methods.retain_kl import only_at

_HEAD_BYTES = 64 * 2**20  # of float32 logits held at a time; a few arrays of this size are alive at once


def token_scores(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[TokenScores, ...]:
    """Log-probability, mean and deviation of log p, and greediness of every labelled token, per row and in order.

    A row's first token has nothing before it and so no prediction, whatever its label; a row in which nothing is
    predicted gives empty arrays. Logits are held for some positions at a time, never for a whole batch, except for
    models that change them after their head (capped, scaled): there it is a batch's answered positions.

    Args:
        model: A causal LM on its device; it comes back as it was.
        tokenizer: Its tokenizer; fills up short rows, and gives the labelled tokens' text for its compressed size.
        rows: From :func:`unlearn.encoding.encode` or :func:`unlearn.encoding.scored_rows`.
        batch_tokens: Padded tokens of a pass, at most; a longer row goes alone.
        advance: Told how many rows are done.

    Raises:
        BrokenModelError: the model's log-probabilities are no finite numbers.
    """
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    found: list[TokenScores | None] = [None] * len(rows)
    with frozen(model), torch.no_grad():
        for numbers in _batches(rows, batch_tokens):
            batch = Pad(pad_id)([rows[n] for n in numbers])
            columns = _scored(model, batch) if _answered(batch["labels"]) else np.empty((0, 4))
            _, _, place = answers(batch["labels"])
            bounds = np.cumsum(place.bincount(minlength=len(numbers)).numpy())
            for n, part in zip(numbers, np.split(columns, bounds[:-1]), strict=True):
                found[n] = _of_row(part, rows[n], tokenizer)
            advance(len(numbers))
    return tuple(score for score in found if score is not None)


def _scored(model: nn.Module, batch: dict[str, Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, 4) of the answered positions of a batch, row by row: log p, mean, deviation, 1 where it is the argmax."""
    predicts, wanted, _ = answers(batch["labels"])
    head = model.get_output_embeddings()  # type: ignore[operator]
    kept: list[Tensor] = []
    device = next(model.parameters()).device
    places = predicts.to(device)
    one = torch.zeros_like(places)
    one[tuple(places.nonzero()[0])] = True
    # The states that the head would see are kept, and it runs at one place only: enough to know whether the model
    # makes something else of what the head says. `prepend`: before the hook that leaves that one place.
    hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0][places]), prepend=True)
    try:
        with only_at(model, one):
            said = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    finally:
        hook.remove()
    hidden = kept.pop()  # (N, d)
    step = max(1, _HEAD_BYTES // (4 * head.weight.shape[0]))
    if torch.equal(said.logits, head(hidden[:1])):
        parts: Iterator[Tensor] = (head(hidden[at : at + step]).float() for at in range(0, len(hidden), step))
    else:
        parts = iter(torch.split(answer_logits(model, batch)[0], step))
    targets = torch.split(wanted.to(hidden.device), step)
    columns = torch.cat([_columns(logits, ids) for logits, ids in zip(parts, targets, strict=True)]).double().cpu()
    if not bool(columns.isfinite().all()):
        raise BrokenModelError("the model's log-probabilities are no finite numbers: it no longer works")
    return columns.numpy()


def _columns(logits: Tensor, wanted: Tensor) -> Tensor:
    """(n, 4) of (n, V) float32 and (n,).

    The deviation is taken around the mean, not as a difference of two large squares; and a token that cannot be,
    with log p = -inf, adds nothing to either.
    """
    logp = functional.log_softmax(logits, dim=-1)
    p = logp.exp()
    picked = logp.gather(-1, wanted[:, None])[:, 0]
    logp.masked_fill_(p == 0, 0.0)
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]).square_()).sum(-1)
    greedy = logits.argmax(-1) == wanted
    return torch.stack([picked, mean, variance.sqrt(), greedy.float()], dim=-1)


def _of_row(columns: np.ndarray[Any, np.dtype[np.float64]], row: Encoded, tokenizer: Any) -> TokenScores:
    text = tokenizer.decode([label for label in row.labels if label != IGNORE], skip_special_tokens=True)
    size = len(zlib.compress(text.encode("utf-8")))
    logprobs, means, stds, greedy = columns.T
    return TokenScores(logprobs.copy(), means.copy(), stds.copy(), greedy > 0.5, size)


def _answered(labels: Tensor) -> bool:
    return bool((labels[:, 1:] != IGNORE).any())


def _batches(rows: Sequence[Encoded], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, together while they fit into so many padded tokens; the longest first."""
    batch: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids)):
        if batch and len(rows[batch[0]].input_ids) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch
