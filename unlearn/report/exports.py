"""The edited model as files: an adapter, merged weights, and what is pushed to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unlearn.console import say
from unlearn.data.encoding import Encoded, reach, scored_rows
from unlearn.data.sets import LoadedSet
from unlearn.evidence.membership import token_scores
from unlearn.model.load import Loaded
from unlearn.recipe.evaluation import PushSpec
from unlearn.recipe.schema import Recipe
from unlearn.report.publish import CardFacts, card, push
from unlearn.score.scorer import digests
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.vector import write
from unlearn.vector.task_vector import TaskVector

_FEW = 4  # items of a set that an export is compared on


def exported(recipe: Recipe, coefficient: float) -> list[str]:
    """What a recipe has exported: nothing when no coefficient was chosen."""
    spec = recipe.export
    return [n for n, on in (("adapter", spec.adapter), ("merged", spec.merged)) if on and coefficient > 0]


def export(
    target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, about: CardFacts, store: Store
) -> dict[str, Any]:
    """Write what the recipe asks for."""
    recipe, coefficient = about.recipe, about.chosen.coefficient
    spec = recipe.export

    def adapter(tmp: Path) -> None:
        facts = write.export_adapter(vector, coefficient, target.path, target.model, tmp)
        (tmp / "README.md").write_text(card(about, "adapter", target.path), encoding="utf-8")
        write_json_atomic(tmp / "export.json", {**facts, **write.contents(tmp)})

    def merged(tmp: Path) -> None:
        dtype = None if spec.dtype == "auto" else getattr(torch, spec.dtype)
        facts = write.export_merged(
            target.model,
            vector,
            coefficient,
            target.tokenizer,
            tmp,
            dtype=dtype,
            shard_size=spec.shard_size,
            stochastic_rounding=spec.stochastic_rounding,
            seed=recipe.seed,
            accept_rounding=spec.accept_rounding,
        )
        text = card(about, "merged", target.path, facts["survived"])
        (tmp / "README.md").write_text(text, encoding="utf-8")
        facts = {**facts, **write.contents(tmp)}
        rows = _a_few(sets, target)

        def log_probs(model: PreTrainedModel) -> list[Any]:
            return [score.logprobs for score in token_scores(model, target.tokenizer, rows)]

        again = write.rescored(tmp, target.model, vector, coefficient, log_probs, spec.accept_rounding)
        say(f"    read again, it is {again['difference']:.2g} nats per token off the edited model")
        write_json_atomic(tmp / "export.json", {**facts, "rescored": again})

    edited = [target.fingerprint, vector.digest(), coefficient]
    how = spec.model_dump(mode="json", include={"dtype", "stochastic_rounding", "shard_size", "accept_rounding"})
    inputs = {
        "adapter": [*edited, target.path, card(about, "adapter", target.path)],
        "merged": [*edited, how, recipe.seed, digests(sets), card(about, "merged", target.path)],
    }
    found: dict[str, Any] = {}
    for name in exported(recipe, coefficient):
        stage = f"export/{name}"
        store.stage(stage, inputs[name], adapter if name == "adapter" else merged)
        found[name] = {"path": stage, **store.read(stage, "export.json")}
    if spec.push_to_hub is not None:
        found["hub"] = _push(spec.push_to_hub, inputs[spec.push_to_hub.what], store)
    return found


def _push(spec: PushSpec, inputs: Sequence[Any], store: Store) -> dict[str, Any]:
    """Put an export on the hub, once: the same export is not pushed again to the same place."""
    folder = store.path(f"export/{spec.what}")
    if spec.dry_run:
        push(folder, spec)
        return {"repo": spec.repo, "dry_run": True}

    def make(tmp: Path) -> None:
        write_json_atomic(tmp / "pushed.json", {"repo": spec.repo, "url": push(folder, spec)})

    store.stage("export/hub", [*inputs, spec.model_dump(mode="json")], make)
    facts: dict[str, Any] = store.read("export/hub", "pushed.json")
    return facts


def _a_few(sets: Sequence[LoadedSet], target: Loaded) -> list[Encoded]:
    """Some scored items of every set, to compare two models on."""
    most = reach(target.model, target.tokenizer)
    return [
        row for s in sets for row in scored_rows((*s.test, *s.validation)[:_FEW], s.spec.kind, target.tokenizer, most)
    ]
