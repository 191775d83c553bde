"""The logit lens against the model itself and against a layer caught with a hook."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from torch import Tensor, nn

from unlearn.evidence import lens
from unlearn.evidence.attacks import ATTACKS
from unlearn.evidence.lens import logit_lens, unavailable
from unlearn.model.load import Loaded

Load = Callable[..., Loaded]
PLACES = {  # family: the first layer, the final norm
    "pico_phi": ("model.layers.0", "model.final_layernorm"),
    "pico_llama": ("model.layers.0", "model.norm"),
    "pico_gpt2": ("transformer.h.0", "transformer.ln_f"),
}


@pytest.mark.parametrize("family", [*PLACES, "pico_qwen2", "pico_gpt_neox"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_is_the_model(
    kind: str, family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path
) -> None:
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, kind)
    model, judge = arena.taught(arena.forget.test[::2], 8), arena.judge()
    assert unavailable(model, judge) is None
    first, last = logit_lens(model, judge)
    wanted = judge.score(model)
    assert last.metric == judge.metric
    assert last.values == pytest.approx(wanted.values, rel=1e-4)
    assert last.stderr == pytest.approx(wanted.stderr, rel=1e-4)
    if kind == "qa":
        assert first.values != pytest.approx(wanted.values, rel=1e-4)


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("kind", ["mcq", "qa"])
def test_an_inner_layer_by_hand(
    kind: str, family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path
) -> None:
    """The first layer's output, caught with a hook, through norm and head."""
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, kind)
    model, judge = arena.taught(arena.forget.test, 8), arena.judge()
    layer, norm = map(model.get_submodule, PLACES[family])
    found = logit_lens(model, judge)[0]
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    def likelihood(prompt: str, answer: str) -> tuple[float, int]:
        ids = arena.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        skip = len(arena.tokenizer(prompt)["input_ids"])
        seen.clear()
        with torch.inference_mode():
            model(ids, use_cache=False)
            logp = model.get_output_embeddings()(norm(seen[0])).float().log_softmax(-1)[0]
        return sum(float(logp[k - 1, ids[0, k]]) for k in range(skip, ids.shape[1])), ids.shape[1] - skip

    layer.register_forward_hook(keep)
    for item, value in zip(judge.items, found.values, strict=True):
        if kind == "mcq":
            totals = [likelihood(item.prompt, choice)[0] for choice in item.choices]
            assert value == float(totals.index(max(totals)) == item.answer)
        else:
            total, tokens = likelihood(item.prompt, item.target)
            assert value == pytest.approx(math.exp(total / tokens), rel=1e-3)


def test_small_passes_give_the_same_layers(phi: Loaded, tmp_path: Path) -> None:
    arenas = [Arena(phi, tmp_path, "qa", **more) for more in ({}, {"eval": {"batch_tokens": 16}})]
    whole, parts = (logit_lens(phi.model, arena.judge()) for arena in arenas)
    for one, other in zip(whole, parts, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-4)


def test_where_the_lens_cannot_be_had(
    phi: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arena = Arena(phi, tmp_path, "qa")
    for name, why in (
        ("embed_dropout", "something other than its final norm stands before its head"),  # there, but not the norm
        ("nothing", "it has no final norm that is known by name"),
    ):
        monkeypatch.setattr(lens, "_NORMS", (name,))
        assert unavailable(phi.model, arena.judge()) == why
        assert ATTACKS["lens"].settings(arena.scene(lens=True)) is None
        assert f"no logit lens: {why}" in " ".join(capsys.readouterr().err.split())
