"""A model that is differentiated but not trained: its gradients on answers are wanted, its weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional

from unlearn.batches import IGNORE, Encoded
from unlearn.methods.retain_kl import only_at


@contextmanager
def frozen(model: nn.Module, but: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside the ``with``, nothing is dropped out and gradients reach only ``but``; afterwards all is as found."""
    learns = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for parameter, _ in learns:
            parameter.requires_grad_(False)
        for parameter in but:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in learns:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode


def with_answers(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows that have a token to be predicted; the first one has nothing before it."""
    return [row for row in rows if any(label != IGNORE for label in row.labels[1:])]


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model says of the labelled tokens of a batch; its head runs nowhere else.

    Args:
        batch: input_ids, attention_mask, labels, each (B, T).

    Returns:
        Logits (N, V) in float32, the tokens they should predict (N,), and the row of the batch they are in (N,).
    """
    device = next(model.parameters()).device
    wanted = batch["labels"][:, 1:].to(device)
    predicts = wanted != IGNORE  # (B, T - 1)
    ids, mask = (batch[k].to(device) for k in ("input_ids", "attention_mask"))
    with only_at(model, functional.pad(predicts, (0, 1))):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits.float(), wanted[predicts], predicts.nonzero()[:, 0]
