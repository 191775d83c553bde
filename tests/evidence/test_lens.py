"""The logit lens against the model itself and against a layer caught with a hook."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from torch import Tensor, nn

from unlearn.data.items import Item
from unlearn.evidence import lens
from unlearn.evidence.attacks_weights import edited_copy, forgotten_rows, relearn
from unlearn.evidence.lens import logit_lens, unavailable
from unlearn.model.load import Loaded
from unlearn.recipe.evaluation import RelearnSpec

Load = Callable[..., Loaded]
QUESTION = Item("a" * 16, "Question: What is {x}?\nAnswer:", "Paris")
STATEMENT = Item("b" * 16, "The capital of France is", "Paris")
PASSAGE = Item("c" * 16, "Once upon", " a time")


def taught(arena: Arena, items: Any, steps: int = 25) -> Any:
    """A model that knows some items well."""
    rows = forgotten_rows(arena.forget, items, arena.tokenizer)
    spec = RelearnSpec(steps=(steps,), learning_rate=1e-2)
    model = edited_copy(arena.model, None, 0.0)
    relearn(model, arena.tokenizer, rows, spec, 0, arena.judge())
    return model


NORM = {"pico_phi": "model.final_layernorm", "pico_llama": "model.norm", "pico_gpt2": "transformer.ln_f"}
LAYER = {"pico_phi": "model.layers.0", "pico_llama": "model.layers.0", "pico_gpt2": "transformer.h.0"}
FAMILIES = (*NORM, "pico_qwen2", "pico_gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_is_the_model(
    kind: str, family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path
) -> None:
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, kind)
    model, judge = taught(arena, arena.forget.test[::2], 8), arena.judge()
    metric = "logprob" if kind == "mcq" else None
    found = logit_lens(model, judge, metric)
    assert unavailable(model, judge) is None
    assert found is not None
    assert [layer for layer, _ in found] == [1, 2]
    wanted = judge.scores(model)[metric or judge.metric]
    assert found[-1][1].values == pytest.approx(wanted.values, rel=1e-4)
    assert found[-1][1].stderr == pytest.approx(wanted.stderr, rel=1e-4)
    assert found[0][1].values != pytest.approx(wanted.values, rel=1e-4)
    main = logit_lens(model, judge)
    assert main is not None
    assert main[-1][1].metric == judge.metric
    assert main[-1][1].values == pytest.approx(judge.score(model).values, rel=1e-4)


@pytest.mark.parametrize("family", NORM)
@pytest.mark.parametrize("kind", ["mcq", "qa"])
def test_an_inner_layer_by_hand(
    kind: str, family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path
) -> None:
    """The first layer's output, caught with a hook, through norm and head."""
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, kind)
    model, judge = taught(arena, arena.forget.test, 8), arena.judge()
    norm, head = model.get_submodule(NORM[family]), model.get_output_embeddings()
    seen: list[Tensor] = []
    totals: list[list[float]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    def likelihood(prompt: str, answer: str) -> tuple[float, int]:
        ids = arena.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        skip = len(arena.tokenizer(prompt)["input_ids"])
        seen.clear()
        with torch.inference_mode():
            model(ids, use_cache=False)
            said = head(norm(seen[0])).float().log_softmax(-1)[0]
        return sum(float(said[k - 1, ids[0, k]]) for k in range(skip, ids.shape[1])), ids.shape[1] - skip

    found = logit_lens(model, judge, "logprob" if kind == "mcq" else None)
    assert found is not None
    hook = model.get_submodule(LAYER[family]).register_forward_hook(keep)
    for item, value in zip(judge.items, found[0][1].values, strict=True):
        if kind == "mcq":
            assert value == pytest.approx(likelihood(item.prompt, item.target)[0], rel=1e-3)
            totals.append([likelihood(item.prompt, choice)[0] for choice in item.choices])
        else:
            total, tokens = likelihood(item.prompt, item.target)
            assert value == pytest.approx(math.exp(total / tokens), rel=1e-3)
    hook.remove()
    if kind == "mcq":
        main = logit_lens(model, judge)
        assert main is not None
        best = [max(range(len(t)), key=t.__getitem__) for t in totals]
        assert main[0][1].values == tuple(float(b == i.answer) for b, i in zip(best, judge.items, strict=True))


def test_small_passes_give_the_same_layers(phi: Loaded, tmp_path: Path) -> None:
    arenas = [Arena(phi, tmp_path, "qa", **more) for more in ({}, {"eval": {"batch_tokens": 16}})]
    whole, parts = (logit_lens(phi.model, arena.judge()) for arena in arenas)
    assert whole is not None
    assert parts is not None
    for (_, one), (_, other) in zip(whole, parts, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-4)


def test_the_lens_writes_no_other_items(phi: Loaded, tmp_path: Path) -> None:
    """The items on disk are those of the report's own tasks, in the same form."""
    arena = Arena(phi, tmp_path, "text")
    logit_lens(phi.model, arena.judge())
    (file,) = (tmp_path / "items").rglob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [i.id for i in arena.forget.test]
    assert all(row["pieces"] and row["continuation"] for row in rows)


def test_where_the_lens_cannot_be_had(phi: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Arena(phi, tmp_path, "qa").judge()
    monkeypatch.setattr(lens, "_NORMS", ("embed_dropout",))  # a module of that name is there, but it is not the norm
    assert unavailable(phi.model, judge) == "something other than its final norm stands before its head"
    assert logit_lens(phi.model, judge) is None
    monkeypatch.setattr(lens, "_NORMS", ("nothing",))
    assert unavailable(phi.model, judge) == "it has no final norm that is known by name"
    assert logit_lens(phi.model, judge) is None
