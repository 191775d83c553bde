"""A few greedy completions, to show a person what a model says before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from unlearn.data import Item, LoadedSet
from unlearn.encoding import count_tokens
from unlearn.silence import quiet_harness
from unlearn.template import stops

_MCQ_TOKENS = 10  # or as many as the answer has


def complete(lm: HFLM, sets: Sequence[LoadedSet], count: int) -> list[dict[str, str]]:
    """Greedy continuations of the first ``count`` test items of every set, in report order.

    Each ends, as where ROUGE is taken, at the first stop that is no part of the right answer.

    Returns:
        ``set``, ``name``, ``prompt``, ``target`` and ``text`` of each.
    """
    chosen = [(s, item) for s in sets if s.role != "holdout" for item in s.test[:count]]
    requests = [Instance("generate_until", {}, (item.prompt, _how(lm, s, item)), 0) for s, item in chosen]
    if not requests:
        return []
    with quiet_harness():
        texts = lm.generate_until(requests)
    return [
        {"set": s.role, "name": s.name, "prompt": item.prompt, "target": item.target, "text": text.strip()}
        for (s, item), text in zip(chosen, texts, strict=True)
    ]


def _how(lm: HFLM, loaded: LoadedSet, item: Item) -> dict[str, Any]:
    kind, tokens = loaded.spec.kind, loaded.spec.continuation
    until = ["\n\n"] if kind == "text" else stops(loaded.spec.prompts("test")[0])
    if kind == "mcq":
        until.append(".")
        tokens = max(_MCQ_TOKENS, count_tokens(lm.tokenizer, item.prompt, f" {item.target}"))
    return {"until": [s for s in until if s not in item.target], "max_gen_toks": tokens, "do_sample": False}
