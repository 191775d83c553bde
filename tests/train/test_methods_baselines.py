"""Losses of the methods that train weights, against sums over tokens written out, and NPO against its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearn.data.encoding import IGNORE
from unlearn.errors import TrainingError
from unlearn.train.batches import answers
from unlearn.train.losses import answer_log_probability, gradient_ascent, gradient_difference, npo, retain_only

quick = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 10_000)
VOCABULARY = 11


def rows(seed: int, counts: tuple[int, ...] = (1, 3, 4)) -> tuple[Tensor, Tensor]:
    """Logits (B, 6, V) and labels (B, 6) whose rows have that many labelled tokens, the last ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), 6, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.full((len(counts), 6), IGNORE)
    for number, count in enumerate(counts):
        labels[number, 6 - count :] = torch.randint(VOCABULARY, (count,), generator=generator)
    return logits, labels


def packed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) that predict a labelled token, and these tokens (N,)."""
    positions, targets, _ = answers(labels)
    return logits[positions], targets


def npo_of(logits: Tensor, reference: Tensor, labels: Tensor, beta: float, count: float | None = None) -> Tensor:
    positions, targets, numbers = answers(labels)
    return npo(logits[positions], reference[positions], targets, numbers, beta, count)


def log_probability(logits: Tensor, labels: Tensor, row: int) -> float:
    """Sum over a row's labelled tokens of log softmax at the position before, one number at a time."""
    total = 0.0
    for t in range(1, labels.shape[1]):
        label = int(labels[row, t])
        if label != IGNORE:
            values = logits[row, t - 1].tolist()
            total += values[label] - math.log(sum(math.exp(v) for v in values))
    return total


@quick
@given(seed=SEEDS)
def test_each_loss_is_its_formula(seed: int) -> None:
    logits, labels = rows(seed)
    near, near_labels = rows(seed + 1, (2, 5))
    forget = [log_probability(logits, labels, i) for i in range(3)]
    retain = [log_probability(near, near_labels, i) for i in range(2)]
    away, kept = packed(logits, labels), packed(near, near_labels)
    assert answer_log_probability(*away, answers(labels)[2]).tolist() == pytest.approx(forget, rel=1e-5)
    assert float(retain_only(*kept)) == pytest.approx(-sum(retain) / 7, rel=1e-5)
    assert float(gradient_ascent(*away)) == pytest.approx(sum(forget) / 8, rel=1e-5)
    both = gradient_difference(*away, *kept, weight=2.5)
    assert float(both) == pytest.approx(sum(forget) / 8 - 2.5 * sum(retain) / 7, rel=1e-5)
    # one batch of a step that has 20 forget tokens
    assert float(gradient_ascent(*away, tokens=20)) == pytest.approx(sum(forget) / 20, rel=1e-5)
    both = gradient_difference(*away, *kept, weight=2.5, tokens=20)
    assert float(both) == pytest.approx(sum(forget) / 20 - 2.5 * sum(retain) / 7, rel=1e-5)


@quick
@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 1.0, 5.0]))
def test_npo_is_its_formula(seed: int, beta: float) -> None:
    logits, labels = rows(seed)
    reference, _ = rows(seed + 1)
    ratios = [
        math.exp(log_probability(logits, labels, i) - log_probability(reference, labels, i)) for i in range(len(labels))
    ]
    wanted = 2 / beta * sum(math.log(1 + ratio**beta) for ratio in ratios) / len(ratios)
    assert float(npo_of(logits, reference, labels, beta)) == pytest.approx(wanted, rel=1e-4)
    assert float(npo_of(logits, reference, labels, beta, 12)) == pytest.approx(wanted * len(ratios) / 12, rel=1e-4)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits)
    return found


@quick
@given(seed=SEEDS)
def test_npo_becomes_gradient_ascent_as_beta_goes_to_0(seed: int) -> None:
    logits, labels = rows(seed, (3, 3))  # as many tokens in every answer, so that both kinds of mean are one
    logits.requires_grad_()
    reference, _ = rows(seed + 1, (3, 3))
    ascent = 3 * gradient(gradient_ascent(*packed(logits, labels)), logits)  # per answer, not per token
    near = gradient(npo_of(logits, reference, labels, 1e-5), logits)
    torch.testing.assert_close(near, ascent, rtol=1e-3, atol=1e-6)
    far = gradient(npo_of(logits, reference, labels, 3.0), logits)
    assert not torch.allclose(far, ascent, rtol=1e-2)


def test_npo_slows_down_where_an_answer_is_unlikely_already() -> None:
    """Its gradient is the ascent's times 2 r^beta / (1 + r^beta), r the ratio of probabilities."""
    logits, labels = rows(3, (2,))
    logits.requires_grad_()
    beta = 0.5
    ascent = 2 * gradient(gradient_ascent(*packed(logits, labels)), logits)
    for seed in (4, 5):
        reference, _ = rows(seed, (2,))
        r = math.exp(log_probability(logits.detach(), labels, 0) - log_probability(reference, labels, 0)) ** beta
        got = gradient(npo_of(logits, reference, labels, beta), logits)
        torch.testing.assert_close(got, 2 * r / (1 + r) * ascent, rtol=1e-4, atol=1e-7)


def test_npo_has_a_floor_and_leaves_its_reference_alone() -> None:
    logits, labels = rows(6)
    reference = logits.clone().requires_grad_()
    at_start = npo_of(logits.requires_grad_(), reference, labels, 0.1)
    assert float(at_start.detach()) == pytest.approx(20 * math.log(2), rel=1e-5)
    assert torch.autograd.grad(at_start, reference, allow_unused=True) == (None,)
    gone = logits.detach().clone()
    gone[:, :-1].scatter_add_(2, labels[:, 1:].clamp_min(0).unsqueeze(2), torch.full((3, 5, 1), -1e4).double())
    assert 0.0 <= float(npo_of(gone, logits.detach(), labels, 0.1)) < 1e-6
    assert float(gradient_ascent(*packed(gone, labels))) < -1e3


def test_where_answers_are() -> None:
    positions, targets, numbers = answers(torch.tensor([[7, IGNORE, 4, 5], [IGNORE, 6, IGNORE, 8]]))
    assert positions.tolist() == [[False, True, True, False], [True, False, True, False]]
    assert targets.tolist() == [4, 5, 6, 8]  # the 7 has nothing before it
    assert numbers.tolist() == [0, 0, 1, 1]


def test_misuse() -> None:
    logits, labels = packed(*rows(7))
    numbers = answers(rows(7)[1])[2]
    with pytest.raises(TrainingError, match="a row has no token with a label"):
        answer_log_probability(logits, labels, numbers * 2)
    with pytest.raises(TrainingError, match="no token has a label"):
        gradient_ascent(logits[:0], labels[:0])
