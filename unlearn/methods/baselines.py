"""Losses of the methods that train weights where this project shapes vectors: what they are compared with.

    gradient ascent       L = - NLL(forget)                                               (Jang et al. 2210.01504)
    gradient difference   L = - NLL(forget) + w * NLL(retain)                             (Liu et al. 2203.12817)
    NPO                   L = 2/beta * E[ log(1 + (p_theta(y|x) / p_ref(y|x))^beta) ]     (Zhang et al. 2404.05868)
    retain only           L = NLL(retain)

The first, the second and the last are means over labelled tokens, so that their terms are in one unit, nats per token.
NPO compares whole answers: its ratio is of the product of an answer's token probabilities, its mean is over answers.
As beta goes to 0 its gradient becomes that of the mean log-probability of an answer, which is gradient ascent.

Everywhere logits are (N, V), those that predict a labelled token, and targets (N,) these tokens; where answers are told
apart, rows (N,) says which one a token belongs to. :func:`unlearn.batches.answers` gives positions, targets and rows
of a batch's labels. Where a batch is one of several of an optimiser step, a mean is taken over the whole step by giving
the step's own count.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from unlearn.errors import TrainingError


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
