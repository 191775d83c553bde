"""Greedy texts against transformers' own ``generate``, and lm-eval's through its own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_scoring import small
from transformers import MistralConfig

from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.score import decoding, forward
from unlearn.score.decoding import greedy
from unlearn.score.forward import Budget, Forward
from unlearn.score.packed import PackedLM

Load = Callable[..., Loaded]


@pytest.fixture(params=["phi", "llama", "gpt2", "qwen2", "gpt_neox"])
def got(request: pytest.FixtureRequest, loaded: Load) -> Loaded:
    return loaded(request.getfixturevalue(f"pico_{request.param}"))


def prompts(model: Loaded, shared: str = "") -> list[list[int]]:
    texts = [shared + text for text in (corpus()[0], "The capital of France is", "a", "Question: What", corpus()[3])]
    return [model.tokenizer(text)["input_ids"] for text in texts]


def expected(model: Loaded, prompt: list[int], limit: int) -> list[int]:
    """transformers' own, one prompt at a time, so that nothing is padded."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def decoded(model: Loaded, texts: list[list[int]], limit: int = 12, **more: Any) -> dict[int, list[int]]:
    forward = Forward(model.model)
    options = {"done": lambda text: False, "slots": 64, "budget": Budget(forward.costs(), 1024), **more}
    with torch.inference_mode():
        found = list(greedy(forward, texts, limit, **options))
    assert len(dict(found)) == len(found)
    return dict(found)


def asked(texts: list[str], **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_the_texts_are_transformers_own(got: Loaded, slots: int) -> None:
    texts = prompts(got)
    wanted = {i: expected(got, text, 12) for i, text in enumerate(texts)}
    assert decoded(got, texts, slots=slots) == wanted
    assert len({tuple(text) for text in wanted.values()}) > 2  # they do differ


def test_a_common_beginning_is_read_once(got: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(got, " ".join(corpus()[:6]) + "\n")
    read: list[int] = []
    plain = Forward.hidden

    def hidden(self: Forward, layout: Any) -> Any:
        read.append(layout.tokens.shape[1])
        return plain(self, layout)

    monkeypatch.setattr(Forward, "hidden", hidden)
    found = decoded(got, texts, slots=3)
    assert found == {i: expected(got, text, 12) for i, text in enumerate(texts)}
    assert sum(read) < 0.7 * sum(len(text) for text in texts)


@pytest.mark.parametrize("window", [4, 20])
def test_a_sliding_window(phi: Loaded, window: int) -> None:
    mistral = small(MistralConfig, phi, sliding_window=window)
    texts = prompts(mistral, "The capital of a country is a city. ")
    assert decoded(mistral, texts, 30) == {i: expected(mistral, text, 30) for i, text in enumerate(texts)}


def test_running_out_of_memory_loses_nothing(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(phi)
    wanted = {i: expected(phi, text, 12) for i, text in enumerate(texts)}
    made: list[int] = []
    plain = decoding.Slots.__init__

    def init(self: decoding.Slots, count: int, longest: int, device: torch.device) -> None:
        made.append(count)
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(self, count, longest, device)

    monkeypatch.setattr(decoding.Slots, "__init__", init)
    assert decoded(phi, texts, slots=8) == wanted
    assert made[0] > 2 >= made[-1]
    monkeypatch.setattr(decoding.Slots, "__init__", lambda *a: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        decoded(phi, texts, slots=8)


def test_the_store_is_kept_within_memory(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(phi)
    longest = max(len(text) for text in texts) + 12
    config = phi.model.config
    each = 2 * config.num_hidden_layers * config.hidden_size * longest * 4
    monkeypatch.setattr(decoding, "_STORE_BYTES", 3 * each)
    seen: list[int] = []
    plain = decoding.Slots.fill

    def fill(self: decoding.Slots, slot: int, layer: Any, states: Any) -> None:
        plain(self, slot, layer, states)
        seen.append(sum(k.nbytes + v.nbytes for k, v in self.store.values()))

    monkeypatch.setattr(decoding.Slots, "fill", fill)
    assert decoded(phi, texts) == {i: expected(phi, text, 12) for i, text in enumerate(texts)}
    assert max(seen) == 3 * each


# --- through lm-eval -------------------------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {"until": ["\n", " x"], "max_gen_toks": 12, "do_sample": False},
    {"until": "e", "max_gen_toks": 30},
    {"until": [], "max_gen_toks": 5, "temperature": 0.0},
    {"until": ["The", "ing "], "max_new_tokens": 40, "do_sample": False, "temperature": 0},
]


@pytest.mark.parametrize(
    ("got", "options"),
    [*(("phi", o) for o in OPTIONS), ("gpt2", OPTIONS[0]), ("gpt_neox", OPTIONS[1])],
    indirect=["got"],
)
def test_lm_eval_s_texts(got: Loaded, options: dict[str, Any]) -> None:
    texts = [*corpus()[:3], "The capital of France is", "a", "東京 is 😀 far", " ".join(corpus()) * 3]
    mine = PackedLM(got.model, got.tokenizer)
    requests = asked(texts, **options)
    # one by one: in a batch lm-eval's own model goes on after the end until the last text is done
    wanted = HFLM(pretrained=got.model, tokenizer=got.tokenizer, batch_size=1).generate_until(
        asked(texts, **options), disable_tqdm=True
    )
    assert mine.generate_until(requests, disable_tqdm=True) == wanted
    assert mine.packs


def test_the_end_of_text_ends_a_text(phi: Loaded) -> None:
    prompt = phi.tokenizer("The capital of France is")["input_ids"]
    own = expected(phi, prompt, 6)
    phi.model.generation_config.eos_token_id = [own[3], 1]
    mine = PackedLM(phi.model, phi.tokenizer)
    context = torch.tensor([prompt])
    mine.batch_size_per_gpu = 1 << 30
    out = mine._model_generate(context, len(prompt) + 6, [], attention_mask=torch.ones_like(context))
    end = own.index(own[3]) + 1
    assert out[0, len(prompt) :].tolist() == own[:end] + [phi.tokenizer.pad_token_id] * (6 - end)


@pytest.mark.parametrize("setting", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 2}])
def test_what_is_not_greedy_is_transformers_work(
    phi: Loaded, setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = phi.model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[0])
        return plain(*args, **kwargs)

    monkeypatch.setattr(phi.model, "generate", generate)
    lm = PackedLM(phi.model, phi.tokenizer, batch_size=2)
    texts = lm.generate_until(asked(corpus()[:3], until=["\n"], max_gen_toks=4, **setting), disable_tqdm=True)
    assert len(texts) == 3
    assert sorted(calls) == [1, 2]  # in batches of the size that was asked for
    calls.clear()
    lm.generate_until(asked(corpus()[:3], until=["\n"], max_gen_toks=4), disable_tqdm=True)
    assert not calls


def test_a_model_that_forbids_repetition_is_heard(phi: Loaded) -> None:
    phi.model.generation_config.repetition_penalty = 5.0
    options = {"until": [], "max_gen_toks": 20, "do_sample": False}
    requests = asked(corpus()[:2], **options)
    wanted = HFLM(pretrained=phi.model, tokenizer=phi.tokenizer).generate_until(
        asked(corpus()[:2], **options), disable_tqdm=True
    )
    assert PackedLM(phi.model, phi.tokenizer).generate_until(requests, disable_tqdm=True) == wanted


def test_prompts_are_read_within_the_room_there_is(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys and values in all layers are there twice, until they are in their slots."""
    lines = " ".join(corpus()).split()
    texts = [" ".join(lines[n : n + 40]) for n in range(60)]
    config = llama.model.config
    lm = PackedLM(llama.model, llama.tokenizer, batch_tokens=8192)
    wanted = lm.generate_until(asked(texts, until=["."], max_gen_toks=8))
    room = 1_500_000
    monkeypatch.setattr(forward, "_ROOM", room, raising=False)
    longest = max(len(llama.tokenizer(text)["input_ids"]) for text in texts) + 8
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    with Live() as live:
        assert lm.generate_until(asked(texts, until=["."], max_gen_toks=8)) == wanted
    store = len(texts) * longest * each
    assert live.peak < store + room


def test_half_precision(loaded: Load, pico_phi: Path) -> None:
    half = loaded(pico_phi, "bfloat16")
    texts = prompts(half)
    found = decoded(half, texts)
    agree = [found[i][0] == expected(half, text, 1)[0] for i, text in enumerate(texts)]
    assert sum(agree) >= len(texts) - 1  # a near tie may fall the other way
