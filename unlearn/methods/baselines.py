"""Losses of the methods that train weights where this project shapes vectors: what they are compared with.

    gradient ascent       L = - NLL(forget)                                               (Jang et al. 2210.01504)
    gradient difference   L = - NLL(forget) + w * NLL(retain)                             (Liu et al. 2203.12817)
    NPO                   L = 2/beta * E[ log(1 + (p_theta(y|x) / p_ref(y|x))^beta) ]     (Zhang et al. 2404.05868)
    retain only           L = NLL(retain)

The first, the second and the last are means over labelled tokens, so that their terms are in one unit, nats per token.
NPO compares whole answers: its ratio is of the product of an answer's token probabilities, its mean is over answers.
As beta goes to 0 its gradient becomes that of the mean log-probability of an answer, which is gradient ascent.

Everywhere logits are (B, T, V) as the model returns them, and labels (B, T) as it is given them: the logits at t
predict the label at t + 1, and labels of :data:`unlearn.batches.IGNORE` carry no loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from unlearn.batches import IGNORE
from unlearn.errors import TrainingError


def answer_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(y|x) of every row: the sum over its labelled tokens, (B,), float32.

    Raises:
        TrainingError: the shapes do not belong together, or a row has no labelled token.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise TrainingError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together")
    wanted = labels[:, 1:]  # (B, T - 1)
    if not bool((wanted != IGNORE).any(dim=1).all()):
        raise TrainingError("a row has no token with a label: there is nothing to forget or to keep in it")
    flat = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -flat.view(wanted.shape).sum(dim=1)


def retain_only(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of a labelled token, in nats: fine-tuning as ever, on the retain set."""
    count = (labels[:, 1:] != IGNORE).sum()
    return -answer_log_probability(logits, labels).sum() / count


def gradient_ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the mean negative log-likelihood of the forget set's tokens. It has no lower bound: stop early."""
    return -retain_only(logits, labels)


def gradient_difference(
    logits: Tensor, labels: Tensor, retain_logits: Tensor, retain_labels: Tensor, weight: float = 1.0
) -> Tensor:
    """Ascent on the forget set and descent on the retain set.

    Args:
        logits: Of the forget rows.
        labels: Of the forget rows.
        retain_logits: Of the retain rows, from the same model.
        retain_labels: Of the retain rows.
        weight: w, of the retain term.

    Raises:
        TrainingError: ``weight`` is negative or not finite.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise TrainingError(f"gradient difference: the retain term's weight must be 0 or more, not {weight}")
    return gradient_ascent(logits, labels) + weight * retain_only(retain_logits, retain_labels)


def npo(logits: Tensor, reference: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation: bounded below by 0, and ascent that slows where an answer is already unlikely.

    Args:
        logits: Of the forget rows, from the model that is trained.
        reference: Of the same rows, from the model as it was. No gradient flows into it.
        labels: Of the forget rows.
        beta: Inverse temperature; the paper uses 0.1.

    Raises:
        TrainingError: ``beta`` is not above 0, or the two models' logits differ in shape.
    """
    if not (math.isfinite(beta) and beta > 0):
        raise TrainingError(f"NPO: beta must be above 0, not {beta}; its limit at 0 is gradient ascent")
    if logits.shape != reference.shape:
        raise TrainingError(f"NPO: logits {tuple(logits.shape)} and reference {tuple(reference.shape)} differ in shape")
    with torch.no_grad():
        before = answer_log_probability(reference, labels)  # (B,)
    ratio = answer_log_probability(logits, labels) - before  # (B,), log of p_theta / p_ref
    return 2 / beta * functional.softplus(beta * ratio).mean()
