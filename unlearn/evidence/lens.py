"""Logit lens: what would the model answer if it stopped at an earlier layer?

The state after every layer goes through the model's final norm and its head, as if that layer were the last one. An
edit may leave the answer in the middle of the model and only hide it at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.console import progress, say
from unlearn.evidence.attacks import Judge, Judged, Scene, attack
from unlearn.results import LENS, AttackScore
from unlearn.score.forward import Forward, Layout, NotPackableError, Part, attending, run
from unlearn.score.packed import PackedLM, Request
from unlearn.score.tasks import quiet_harness
from unlearn.score.tree import pack

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
_TOKENS = 8192  # per pass at most: the states of all layers are alive at once


def _asked_for(scene: Scene) -> list[Any] | None:
    if scene.spec.lens and (why := unavailable(scene.model, scene.judge)):
        say(f"    no logit lens: {why}", style="yellow")
        return None
    return [] if scene.spec.lens else None


@attack("lens", _asked_for, less="lower eval.batch_tokens, or set robustness.lens to false")
def lens(scene: Scene) -> list[AttackScore]:
    """What every layer would answer."""
    layers = logit_lens(scene.model, scene.judge, f"{scene.who}: hidden layers")
    return [score.entry(scene.who, LENS, "lens", layer=layer) for layer, score in enumerate(layers, start=1)]


def unavailable(model: PreTrainedModel, judge: Judge) -> str | None:
    """Why the lens cannot be had for this model, as a clause; None where it can."""
    with quiet_harness():
        packs = PackedLM(model, judge.tokenizer).packs
    if not packs:
        return "the model cannot be run in packed rows"
    try:
        _Layers(model)
    except NotPackableError as error:
        return str(error)
    return None


def logit_lens(model: PreTrainedModel, judge: Judge, label: str = "hidden layers") -> list[Judged]:
    """The forget score at every layer, from the first; the last one is the model's own.

    All layers come from one pass over the judge's requests and are scored by its tasks: accuracy by the sum of each
    choice's log-probabilities (mcq), exp of the answer's mean log-probability (qa), exact memorisation (text).
    """
    with quiet_harness():
        lm = _LensLM(model, judge.tokenizer, judge.recipe.eval.batch_tokens)
    lm.label = label
    found = []
    for layer in range(1, lm.layers.count + 1):
        lm.layer = layer
        found.append(judge.read(lm)[judge.metric])
    return found


class _Layers(Forward):
    """A causal LM that scores every request at every layer while it runs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.count: int = self.config.num_hidden_layers
        states = self.config.hidden_size * self.dtype.itemsize * (self.count + 1)
        self.sizes = replace(self.sizes, token=self.sizes.token + states)
        self.norm = self._final_norm()
        self.start(0)

    def start(self, requests: int) -> None:
        """Make room for so many requests: (layers, requests) log-likelihoods, and whether they are greedy."""
        self.values: NDArray[np.float64] = np.zeros((self.count, requests))
        self.greedy: NDArray[np.bool_] = np.ones((self.count, requests), dtype=bool)

    def score(self, layout: Layout) -> list[Part]:
        """One pass; its scores are added up in ``values`` and ``greedy``, and the parts returned hold the tokens."""
        with attending(self.model, layout):
            states = self._states(layout.tokens, layout.positions)
        nodes = np.concatenate([p.nodes + start for p, start in zip(layout.pieces, layout.starts, strict=True)])
        if not len(nodes):
            return []
        targets = np.concatenate([p.targets for p in layout.pieces])
        requests = np.concatenate([p.requests for p in layout.pieces])
        places = torch.from_numpy(np.unique(nodes))
        inside = np.searchsorted(np.unique(nodes), nodes)  # each node's row among the places
        # all layers before any is added: a pass that runs out of memory is tried again in halves
        norms = [*[self.norm] * (self.count - 1), nn.Identity()]  # the last state has been through it
        found = [
            self._at(norm(state[places.to(state.device)]), inside, targets)
            for norm, state in zip(norms, states, strict=True)
        ]
        for layer, (values, greedy) in enumerate(found):
            np.add.at(self.values[layer], requests, values)
            np.logical_and.at(self.greedy[layer], requests, greedy)
        ids, counts = np.unique(requests, return_counts=True)
        return [(int(i), 0.0, True, int(n)) for i, n in zip(ids, counts, strict=True)]

    def _states(self, tokens: Tensor, positions: Tensor | None = None) -> list[Tensor]:
        """(N, d) after every layer; of the last one after the norm."""
        options: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        out = self.body(input_ids=tokens, use_cache=False, output_hidden_states=True, **options)
        inner = out.hidden_states
        if inner is None or len(inner) != self.count + 1:
            raise NotPackableError("its hidden layers cannot be looked at")
        return [state[0] for state in (*inner[1:-1], out.last_hidden_state)]

    def _final_norm(self) -> nn.Module:
        """The norm between the last layer and the head, checked to be what the model's last state comes from."""
        bodies = [self.body, getattr(self.body, "decoder", None)]
        norms = [getattr(body, name, None) for body in bodies for name in _NORMS]
        norm = next((n for n in norms if isinstance(n, nn.Module)), None)
        if norm is None:
            raise NotPackableError("it has no final norm that is known by name")
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            with torch.inference_mode():
                last = self._states(torch.zeros(1, 3, dtype=torch.int64, device=self.device))[-1]
        finally:
            hook.remove()
        if len(seen) != 1 or not torch.equal(seen[0][0], last):
            raise NotPackableError("something other than its final norm stands before its head")
        return norm


class _LensLM(PackedLM):
    """lm-eval's interface to one layer of a model: all layers answer at once, the wanted one is handed out."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_tokens: int | None) -> None:
        super().__init__(model, tokenizer, batch_tokens)
        self.layers = _Layers(model)
        self.layer = self.layers.count
        self._place: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        keys = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        if any(key not in self._place for key in keys):
            self._check(requests)
            self._place = {key: n for n, key in enumerate(dict.fromkeys(keys))}
            self._run([(list(context), list(continuation)) for context, continuation in self._place])
        values, greedy = self.layers.values[self.layer - 1], self.layers.greedy[self.layer - 1]
        return [(float(values[self._place[key]]), bool(greedy[self._place[key]])) for key in keys]

    def _run(self, pairs: list[tuple[list[int], list[int]]]) -> None:
        self.layers.start(len(pairs))
        budget = self.layers.budget(min(self.batch_tokens or self.layers.tokens(), _TOKENS))
        total = sum(len(continuation) for _, continuation in pairs)
        with progress(self.label, total) as advance, torch.inference_mode():
            for parts in run(self.layers, pack(pairs, self.max_length, budget.costs, longest=budget.tokens), budget):
                advance(sum(tokens for *_, tokens in parts))
