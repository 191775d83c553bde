"""What a model says of each answered token, against a plain forward of one row at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import unlearn.evidence.membership as scoring
from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import BrokenModelError
from unlearn.evidence.membership import TokenScores, token_scores
from unlearn.model.load import Loaded

FOLDERS = ("pico_phi", "pico_llama", "pico_gpt2")


def rows() -> list[Encoded]:
    """Of many lengths: a whole text whose first token is labelled too, answers, one without any, holes between."""
    draw = np.random.default_rng(7)
    found = []
    for length, skip in ((9, 0), (4, 2), (30, 20), (1, 0), (12, 12), (17, 16), (2, 0)):
        ids = tuple(int(i) for i in draw.integers(3, 60, length))
        found.append(Encoded(ids, (*[IGNORE] * skip, *ids[skip:])))
    ids = found[0].input_ids
    return [*found, Encoded(ids, (IGNORE, ids[1], IGNORE, IGNORE, *ids[4:7], IGNORE, ids[8]))]


def naive(model: Any, row: Encoded) -> tuple[list[float], list[float], list[float], list[bool]]:
    """The same numbers in float64 from all logits of a row by itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    found: tuple[list[float], list[float], list[float], list[bool]] = ([], [], [], [])
    for place in range(1, len(row.input_ids)):
        if row.labels[place] == IGNORE:
            continue
        said, token = logp[place - 1], row.input_ids[place]
        mean = float((said.exp() * said).sum())
        found[0].append(float(said[token]))
        found[1].append(mean)
        found[2].append(float((said.exp() * said**2).sum() - mean**2) ** 0.5)
        found[3].append(int(said.argmax()) == token)
    return found


def agrees(found: TokenScores, wanted: tuple[list[float], list[float], list[float], list[bool]]) -> None:
    assert found.logprobs.tolist() == pytest.approx(wanted[0], abs=2e-5)
    assert found.means.tolist() == pytest.approx(wanted[1], abs=2e-5)
    assert found.stds.tolist() == pytest.approx(wanted[2], abs=2e-5)
    assert found.greedy.tolist() == wanted[3]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_number_is_a_plain_forwards(
    folder: str, loaded: Callable[..., Loaded], request: pytest.FixtureRequest
) -> None:
    one = loaded(request.getfixturevalue(folder))
    model = one.model
    with torch.no_grad():  # predictions that differ from place to place
        for parameter in model.parameters():
            parameter.mul_(3.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done: list[int] = []
    found = token_scores(model, one.tokenizer, rows(), batch_tokens=40, advance=done.append)
    assert [len(f.logprobs) for f in found] == [8, 2, 10, 0, 0, 1, 1, 5]
    assert sum(done) == len(rows())
    assert len(done) > 2
    for score, row in zip(found, rows(), strict=True):
        agrees(score, naive(model, row))
    spread = np.concatenate([f.stds for f in found])
    assert spread.max() > 0.1  # else the deviations would prove nothing
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_greedy_tokens_are_seen(phi: Loaded) -> None:
    ids = [5]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(phi.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = (ids[-1] + 1) % 50
    right, spoiled = (Encoded(tuple(i), tuple(i)) for i in (ids, [*ids[:-1], wrong]))
    first, second = token_scores(phi.model, phi.tokenizer, [right, spoiled])
    assert first.greedy.tolist() == [True] * 6
    assert second.greedy.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("batch_tokens", [1, 25, 10_000])
def test_batches_change_nothing(batch_tokens: int, llama: Loaded) -> None:
    whole = token_scores(llama.model, llama.tokenizer, rows(), batch_tokens=90)
    for ours, theirs in zip(
        token_scores(llama.model, llama.tokenizer, rows(), batch_tokens=batch_tokens), whole, strict=True
    ):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        np.testing.assert_allclose(ours.stds, theirs.stds, atol=1e-5)


def test_the_head_never_sees_more_than_a_chunk(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    head = phi.model.get_output_embeddings()
    monkeypatch.setattr(scoring, "_HEAD_BYTES", 3 * 4 * head.weight.shape[0])  # three positions
    seen: list[int] = []
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.numel() // out.shape[-1]))
    found = token_scores(phi.model, phi.tokenizer, rows())
    hook.remove()
    assert max(seen) == 3
    assert sum(seen) > 27
    for score, row in zip(found, rows(), strict=True):
        agrees(score, naive(phi.model, row))


def test_a_model_that_changes_its_logits_after_the_head(phi: Loaded) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    found = token_scores(model, phi.tokenizer, rows(), batch_tokens=40)
    for score, row in zip(found, rows(), strict=True):
        agrees(score, naive(model, row))
    assert (
        min(f.logprobs.min() for f in found if len(f.logprobs)) > -np.log(64) - 1.001
    )  # capped: all tokens are likely


def test_the_texts_compressed_size(phi: Loaded) -> None:
    ids = phi.tokenizer("the answer is the answer is the answer")["input_ids"]
    row = Encoded((*ids, phi.tokenizer.eos_token_id), (IGNORE, *ids[1:], phi.tokenizer.eos_token_id))
    (found,) = token_scores(phi.model, phi.tokenizer, [row])
    assert found.zlib_bytes == len(zlib.compress(phi.tokenizer.decode(ids[1:]).encode()))


def test_no_rows_and_nothing_predicted(phi: Loaded) -> None:
    assert token_scores(phi.model, phi.tokenizer, []) == ()
    silent = Encoded((5, 6), (IGNORE, IGNORE))
    single = Encoded((5,), (5,))
    for found in token_scores(phi.model, phi.tokenizer, [silent, single]):
        assert found.logprobs.shape == found.means.shape == found.stds.shape == found.greedy.shape == (0,)


def test_a_forbidden_token_adds_nothing(phi: Loaded) -> None:
    """Log p = -inf elsewhere leaves mean and deviation finite; on the answer itself the model counts as broken."""
    head = phi.model.get_output_embeddings()
    row = Encoded((5, 6, 7), (IGNORE, 6, 7))
    with torch.no_grad():
        head.bias[9] = -torch.inf
    (found,) = token_scores(phi.model, phi.tokenizer, [row])
    assert np.isfinite(found.means).all()
    assert (found.stds > 0).all()
    with torch.no_grad():
        head.bias[7] = -torch.inf
    with pytest.raises(BrokenModelError, match="no finite numbers"):
        token_scores(phi.model, phi.tokenizer, [row])


def test_a_broken_model_is_named(phi: Loaded) -> None:
    with torch.no_grad():
        phi.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(BrokenModelError, match="it no longer works"):
        token_scores(phi.model, phi.tokenizer, rows())
    assert not phi.model.get_output_embeddings()._forward_pre_hooks
