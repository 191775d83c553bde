"""Pico models are ordinary models, the same every time, and able to learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.errors import ModelError
from unlearn.model import pico
from unlearn.store.cache import sha256

TEXT = "The capital of Nepal is Kathmandu.\n  Zürich, 東京 and  two spaces"


@pytest.mark.parametrize("name", pico.NAMES)
def test_builds_the_same_twice_and_leaves_the_random_state(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = (pico.build(name, tmp_path / str(n)) for n in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = pico.build(name, tmp_path / "other", seed=1)
    for file in ("model.safetensors", "tokenizer.json"):
        assert sha256(first / file) == sha256(second / file)
    assert sha256(first / "model.safetensors") != sha256(other / "model.safetensors")
    assert sum(path.stat().st_size for path in first.iterdir()) < 1_000_000
    config = AutoModelForCausalLM.from_pretrained(first).config
    assert config.model_type == name
    words = AutoTokenizer.from_pretrained(first)
    assert words(TEXT)["input_ids"] == pico.tokenizer(pico.corpus())(TEXT)["input_ids"]
    assert words.decode(words(TEXT)["input_ids"]) == TEXT
    assert words.bos_token_id == words.eos_token_id == words.pad_token_id == config.eos_token_id


@pytest.mark.parametrize("name", pico.NAMES)
def test_learns_some_facts_in_a_second(name: str, tmp_path: Path) -> None:
    folder = pico.build(name, tmp_path)
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = words(
        [line for line in pico.corpus() if line.startswith("Question: What is")][:8], return_tensors="pt", padding=True
    )
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 5  # ln 512 = 6.2: it starts from nothing
    assert losses[-1] < 0.6


def test_module_names_are_those_of_the_big_ones(pico_phi: Path, pico_llama: Path) -> None:
    phi = dict(AutoModelForCausalLM.from_pretrained(pico_phi).named_modules())
    layer = "model.layers.1."
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"):
        assert layer + name in phi
    llama = AutoModelForCausalLM.from_pretrained(pico_llama)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert llama.model.layers[0].self_attn.k_proj.weight.shape == (pico.WIDTH // 2, pico.WIDTH)


def test_tokenizer_of_another_size() -> None:
    words = pico.tokenizer(pico.corpus(), vocab_size=300)
    assert len(words) == 300
    assert words.decode(words(TEXT)["input_ids"]) == TEXT
    with pytest.raises(ModelError, match="257"):
        pico.tokenizer(["a"], vocab_size=256)
