"""What is minimised where it is more than cross-entropy: a retain penalty on top of it, or a baseline's loss.

Every objective is computed from one pass over one batch, in which each row has its own multiple of the adapter
(:mod:`unlearn.train.losses`): 1 for the model that is trained, 0 for the model as it was. So a reference needs
neither a second model nor a second pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import TrainingError
from unlearn.recipe.methods import RetainKLSpec
from unlearn.train.batches import Pad, Part, beside, labelled


def check_weight(weight: float) -> None:
    """Raise a TrainingError where gradient difference's w is negative or not finite."""
    if not (math.isfinite(weight) and weight >= 0):
        raise TrainingError(f"gradient difference: the retain term's weight must be 0 or more, not {weight}")


def check_beta(beta: float) -> None:
    """Raise a TrainingError where NPO's beta is not above 0 or not finite."""
    if not (math.isfinite(beta) and beta > 0):
        raise TrainingError(f"NPO: beta must be above 0, not {beta}; its limit at 0 is gradient ascent")


def answer_log_probability(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """log p(y|x) of every answer: the sum over its tokens, (B,), float32; B is one more than the highest row number.

    Raises:
        TrainingError: the shapes do not belong together, or a row has no labelled token.
    """
    nll = _nll(logits, targets)  # (N,)
    if rows.shape != targets.shape:
        raise TrainingError(f"targets {tuple(targets.shape)} and rows {tuple(rows.shape)} do not belong together")
    # not index_add, whose order of summation a GPU does not fix: a resumed training must equal an uninterrupted one
    belongs = rows == torch.arange(int(rows.max()) + 1, device=rows.device)[:, None]  # (B, N)
    if not bool(belongs.any(dim=1).all()):
        raise TrainingError("a row has no token with a label: there is nothing to forget or to keep in it")
    return -torch.where(belongs, nll, 0.0).sum(dim=1)


def retain_only(logits: Tensor, targets: Tensor, tokens: float | None = None) -> Tensor:
    """Mean negative log-likelihood of a labelled token, in nats: fine-tuning as ever, on the retain set.

    Args:
        logits: (N, V).
        targets: (N,).
        tokens: Labelled tokens that the mean is over; N when not given.
    """
    return _nll(logits, targets).sum() / (len(targets) if tokens is None else tokens)


def gradient_ascent(logits: Tensor, targets: Tensor, tokens: float | None = None) -> Tensor:
    """Minus the mean negative log-likelihood of the forget set's tokens. It has no lower bound: stop early."""
    return -retain_only(logits, targets, tokens)


def gradient_difference(
    logits: Tensor,
    targets: Tensor,
    retain_logits: Tensor,
    retain_targets: Tensor,
    weight: float = 1.0,
    tokens: float | None = None,
) -> Tensor:
    """Ascent on the forget set and descent on the retain set.

    Args:
        logits: Of the forget rows, (N, V).
        targets: Of the forget rows, (N,).
        retain_logits: Of the retain rows, from the same model, (M, V).
        retain_targets: Of the retain rows, (M,).
        weight: w, of the retain term.
        tokens: Labelled forget tokens that the first mean is over; N when not given.

    Raises:
        TrainingError: ``weight`` is negative or not finite.
    """
    check_weight(weight)
    return gradient_ascent(logits, targets, tokens) + weight * retain_only(retain_logits, retain_targets)


def npo(
    logits: Tensor, reference: Tensor, targets: Tensor, rows: Tensor, beta: float, answers: float | None = None
) -> Tensor:
    """Negative preference optimisation: bounded below by 0, and ascent that slows where an answer is already unlikely.

    Args:
        logits: Of the forget rows, from the model that is trained, (N, V).
        reference: The same from the model as it was, (N, V). No gradient flows into it.
        targets: Of the forget rows, (N,).
        rows: The answer each target belongs to, (N,).
        beta: Inverse temperature; the paper uses 0.1.
        answers: Answers that the mean is over; as many as there are rows when not given.

    Raises:
        TrainingError: ``beta`` is not above 0, or the two models' logits differ in shape.
    """
    check_beta(beta)
    if logits.shape != reference.shape:
        raise TrainingError(f"NPO: logits {tuple(logits.shape)} and reference {tuple(reference.shape)} differ in shape")
    with torch.no_grad():
        before = answer_log_probability(reference, targets, rows)  # (B,)
    ratio = answer_log_probability(logits, targets, rows) - before  # (B,), log of p_theta / p_ref
    return 2 / beta * functional.softplus(beta * ratio).sum() / (len(ratio) if answers is None else answers)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Every target's negative log-likelihood, (N,), float32."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise TrainingError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not belong together")
    if not len(targets):
        raise TrainingError("no token has a label: there is nothing to forget or to keep")
    return functional.cross_entropy(logits.float(), targets, reduction="none")


# -- a penalty for the fitting of the forget vector that makes its negation harmless where the model must


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) in nats over positions.

    Args:
        reference: (N, V) logits of p, the untouched model.
        logits: (N, V) logits of q, the model under the vector.
    """
    p, q = (functional.log_softmax(x.float(), dim=-1) for x in (reference, logits))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def multiples(forget: int, retain: int, coefficient: float | None) -> list[float]:
    """The adapter's multiple in every row: forget rows, then the retain rows once per term, the untouched model last.

    Args:
        forget: Number of forget rows.
        retain: Number of retain rows.
        coefficient: c of the negative side; None leaves it out.
    """
    sides = [1.0] if coefficient is None else [1.0, -coefficient]
    return [1.0] * forget + [side for side in (*sides, 0.0) for _ in range(retain)]


def penalty(logits: Tensor, copies: int) -> Tensor:
    """The divergences of every side from the untouched model, added up.

    Args:
        logits: (S * N, V) at the labelled positions of S copies of the retain rows, in the order of :func:`multiples`.
        copies: S; the last copy is the untouched model's.
    """
    *sides, untouched = logits.chunk(copies)
    reference = untouched.detach()
    return torch.stack([kl(reference, side) for side in sides]).sum()


@contextmanager
def only_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the ``with``, the model's head runs at some positions only, and its logits are (N, V).

    Answers are a few tokens at the end of a prompt; the vocabulary times all the others is a fifth of a small model's
    work for nothing.

    Args:
        positions: (B, T) booleans.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def scaled_rows(model: nn.Module, factors: Sequence[float]) -> Iterator[None]:
    """Inside the ``with``, row b of a batch sees ``factors[b]`` times the adapter's change.

    The backward pass belongs inside too: with gradient checkpointing it runs the model again.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.scaling]
    before = [layer.scaling["default"] for layer in layers]
    device = next(model.parameters()).device
    rows = torch.tensor(factors, device=device)[:, None, None]  # (B, 1, 1), against outputs (B, T, out)
    for layer, scale in zip(layers, before, strict=True):
        layer.scaling["default"] = scale * rows
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling["default"] = scale


# -- a model that is differentiated but not trained


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


# -- what is minimised where it is more than cross-entropy


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
    """A baseline's loss in place of the forget set's cross-entropy (:mod:`unlearn.train.losses`).

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
