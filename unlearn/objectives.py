"""What is minimised where it is more than cross-entropy: a retain penalty on top of it, or a baseline's loss.

Every objective is computed from one pass over one batch, in which each row has its own multiple of the adapter
(:mod:`unlearn.methods.retain_kl`): 1 for the model that is trained, 0 for the model as it was. So a reference needs
neither a second model nor a second pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from unlearn.batches import Encoded, Pad, beside
from unlearn.dealing import Part, labelled
from unlearn.errors import TrainingError
from unlearn.frozen import with_answers
from unlearn.methods.baselines import check_beta, check_weight, gradient_ascent, gradient_difference, npo, retain_only
from unlearn.methods.retain_kl import multiples, penalty
from unlearn.recipe import RetainKLSpec

BaselineLoss = Literal["gradient_ascent", "gradient_difference", "npo"]
BESIDE = "beside"  # where a batch has its Share.beside


@dataclass(frozen=True)
class Keep:
    """Retain rows and the penalty that holds the model's predictions on them.

    Raises:
        ValueError: the two-sided penalty without a range for c, which a recipe may leave to its sweep.
    """

    rows: Sequence[Encoded]
    spec: RetainKLSpec

    def __post_init__(self) -> None:
        if self.spec.sides == "two" and self.spec.coefficients is None:
            raise ValueError("the two-sided penalty needs a range of coefficients: fill in the sweep's")


@dataclass(frozen=True)
class Against:
    """A baseline's loss in place of the forget set's cross-entropy (:mod:`unlearn.methods.baselines`).

    Args:
        loss: Which one.
        retain: Retain rows; gradient_difference alone uses them.
        weight: Of the retain term.
        beta: NPO's inverse temperature.
        batch_size: Retain rows beside each batch of forget rows.

    Raises:
        TrainingError: an unknown loss, a value out of range, or gradient_difference without a retain row to learn.
    """

    loss: BaselineLoss
    retain: Sequence[Encoded] = ()
    weight: float = 1.0
    beta: float = 0.1
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.loss not in get_args(BaselineLoss):
            raise TrainingError(f"a baseline's loss is one of {', '.join(get_args(BaselineLoss))}, not {self.loss!r}")
        if self.loss == "npo":
            check_beta(self.beta)
        if self.loss == "gradient_difference":
            check_weight(self.weight)
            if self.batch_size < 1:
                raise TrainingError(f"gradient_difference: batch_size must be 1 or more, not {self.batch_size}")
            if not with_answers(self.retain):
                raise TrainingError(
                    "gradient_difference needs retain rows with an answer to learn, and there is none: "
                    "give it a retain set with items to train on"
                )


@dataclass(frozen=True)
class Share:
    """What the means of a batch are over, where the batch is one of several of an optimiser step.

    Args:
        tokens: Labelled forget tokens of the step; None: those of the batch.
        answers: Forget rows of the step; None: those of the batch.
        batches: Batches of the step, by which terms that are drawn for each batch are divided.
        beside: By what a mean over the rows drawn beside a batch is multiplied, where several processes share them:
            this one's share of their labelled tokens, times the number of processes, over which gradients are averaged.
    """

    tokens: float | None = None
    answers: float | None = None
    batches: int = 1
    beside: float = 1.0


@dataclass(frozen=True)
class Answers:
    """What the model says of a batch's labelled tokens: logits (N, V), the tokens (N,), and their rows (N,)."""

    logits: Tensor
    targets: Tensor
    rows: Tensor

    def split(self, forget: int) -> tuple[Answers, Answers]:
        """Those of the first ``forget`` rows, and the rest."""
        at = int((self.rows < forget).sum())
        return (
            Answers(self.logits[:at], self.targets[:at], self.rows[:at]),
            Answers(self.logits[at:], self.targets[at:], self.rows[at:]),
        )


class Objective(Protocol):
    """What the trainer minimises."""

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        """One batch, the forget rows first in it, and the adapter's multiple in every row.

        Args:
            forget: input_ids, attention_mask, labels, each (F, T).
            draw: Of this batch of this step alone; nothing else may decide what is drawn.
        """
        ...

    def loss(self, answers: Answers, forget: int, share: Share) -> Tensor:
        """The loss of a batch whose first ``forget`` rows are the forget set's."""
        ...


def objective(keep: Keep | None, against: Against | None, part: Part | None = None) -> Objective | None:
    """What is to be minimised; None: plain cross-entropy.

    Args:
        part: Which of several processes this is. What is drawn beside a batch is drawn alike by all, and shared out.

    Raises:
        ValueError: both are given.
    """
    if keep is not None and against is not None:
        raise ValueError("keep adds to the cross-entropy that against replaces: give one of them")
    part = part or Part()
    if keep is not None:
        return _Penalised(keep, part)
    if against is None:
        return None
    if against.loss == "gradient_ascent":
        return _Ascent()
    return _Preference(against.beta) if against.loss == "npo" else _Difference(against, part)


def mend(against: Against | None) -> str:
    """What to do about a loss that is no number."""
    if against is None or against.loss == "npo":
        return "lower learning_rate, or use dtype: float32"
    return f"lower learning_rate or steps, since {against.loss} has no lower bound"


def all_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The labels of every row of an objective's batch, copies included, (B, W)."""
    labels, beside_it = batch["labels"], batch.get("retain_labels")
    if beside_it is None:
        return labels
    copies = (len(batch["input_ids"]) - len(labels)) // len(beside_it)
    return torch.cat([labels, beside_it.repeat(copies, 1)])


def _drawn(
    rows: Sequence[Encoded], count: int, pad: Pad, draw: random.Random, part: Part
) -> tuple[dict[str, Tensor], float]:
    """Rows that are drawn beside a batch, this process's part of them, and :attr:`Share.beside`."""
    drawn = draw.sample(rows, min(count, len(rows)))
    ours = part.of(drawn)
    if part.count == 1 or not ours:
        return pad(drawn[:1] if not ours else drawn), float(bool(ours))
    return pad(ours), part.count * labelled(ours) / max(1, labelled(drawn))


def _of_forget_rows(answers: Answers, loss: Callable[[], Tensor]) -> Tensor:
    """A loss on the forget rows; 0, of the same graph, for a process that has none of them."""
    return loss() if len(answers.targets) else answers.logits.sum()


class _Penalised:
    """Cross-entropy on the forget rows plus the divergences on the retain rows."""

    def __init__(self, keep: Keep, part: Part) -> None:
        self._rows, self._spec, self._part = keep.rows, keep.spec, part
        self._range = keep.spec.coefficients if keep.spec.sides == "two" else None
        self._copies = 2 if self._range is None else 3

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        retain, weight = _drawn(self._rows, self._spec.batch_size, pad, draw, self._part)
        c = draw.uniform(*self._range) if self._range is not None else None
        factors = multiples(len(forget["input_ids"]), len(retain["input_ids"]), c)
        return {**beside(forget, retain, self._copies, pad.pad_id), BESIDE: weight}, factors

    def loss(self, answers: Answers, forget: int, share: Share) -> Tensor:
        ours, retain = answers.split(forget)
        extra = self._spec.weight * share.beside * penalty(retain.logits, self._copies)
        learned = _of_forget_rows(ours, lambda: retain_only(ours.logits, ours.targets, share.tokens))
        return learned + extra / share.batches


class _Ascent:
    """Away from the forget rows."""

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        return dict(forget), [1.0] * len(forget["input_ids"])

    def loss(self, answers: Answers, forget: int, share: Share) -> Tensor:
        return _of_forget_rows(answers, lambda: gradient_ascent(answers.logits, answers.targets, share.tokens))


class _Difference:
    """Away from the forget rows and towards the retain rows."""

    def __init__(self, against: Against, part: Part) -> None:
        self._retain, self._weight, self._size = with_answers(against.retain), against.weight, against.batch_size
        self._part = part

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        retain, weight = _drawn(self._retain, self._size, pad, draw, self._part)
        batch = beside(forget, retain, 1, pad.pad_id)
        return {**batch, BESIDE: weight}, [1.0] * len(batch["input_ids"])

    def loss(self, answers: Answers, forget: int, share: Share) -> Tensor:
        ours, retain = answers.split(forget)
        weight = self._weight * share.beside / share.batches
        if not len(ours.targets):
            return ours.logits.sum() + weight * retain_only(retain.logits, retain.targets)
        return gradient_difference(ours.logits, ours.targets, retain.logits, retain.targets, weight, share.tokens)


class _Preference:
    """NPO: the forget rows twice, under the adapter and without it."""

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def batch(self, forget: Mapping[str, Tensor], pad: Pad, draw: random.Random) -> tuple[dict[str, Any], list[float]]:
        rows = len(forget["input_ids"])
        return beside(forget, forget, 1, pad.pad_id), [1.0] * rows + [0.0] * rows

    def loss(self, answers: Answers, forget: int, share: Share) -> Tensor:
        ours, before = answers.split(forget)
        return _of_forget_rows(
            ours, lambda: npo(ours.logits, before.logits, ours.targets, ours.rows, self._beta, share.answers)
        )
