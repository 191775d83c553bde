"""The stages of a run, in order. Each is reused if it was finished under the same fingerprint, else made.

Recipe -> sets -> target model -> task vectors -> a score per coefficient -> the choice -> scores on test items ->
exports. What a stage depends on is in its key; what it found is in its folder; nothing passes between stages but that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unlearn import benchmark_tasks, card, export, fetch, finetune, models, references
from unlearn.attacked import Attacked
from unlearn.batches import Encoded
from unlearn.compared import refuse_another
from unlearn.console import say
from unlearn.data import LoadedSet, load_sets
from unlearn.encoding import reach, scored_rows
from unlearn.fitted import clean_checkpoint
from unlearn.item_files import at_prefixes, write_items
from unlearn.members import require_rows
from unlearn.models import Loaded
from unlearn.push import able, push
from unlearn.recipe import PushSpec
from unlearn.rundir import write_json_atomic
from unlearn.stages import digests
from unlearn.vector import TaskVector

_FEW = 4  # items of a set that an export is compared on


class Pipeline(Attacked):
    """One run in one folder. Methods are stages; call them in the order of :data:`unlearn.stages.STAGES`."""

    # -- model and data ------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Fetch (and convert) the model, and bring it into memory."""
        # float32 is no TF32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or our caller has set
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with self.announced("load", f"the model {self.recipe.model.path.partition('#')[0]}"):
            models.place(self.recipe.model.device)  # before anything is downloaded
            self.where = self.where_base = fetch.locate(self.recipe.model, self.base)
            loaded = models.load(self.recipe.model, self.where)
            size = sum(p.numel() for p in loaded.model.parameters())
            say(f"    {size / 1e6:,.0f} M parameters, {loaded.dtype}, on {loaded.device}".replace("torch.", ""))
        return loaded

    def data(self, base: Loaded) -> tuple[LoadedSet, ...]:
        """Read and split every set, and write the scored items where lm-eval (and anyone) can read them."""
        tokenizer = base.tokenizer
        with self.announced("data", "the forget, retain and utility sets"):
            sets = load_sets(self.recipe, self.base, tokenizer)
            if self.recipe.reference == "train":
                references.to_teach(sets)  # said before anything is trained
            for s in sets:
                counts = f"{len(s.train)} train, {len(s.validation)} validation, {len(s.test)} test"
                say(f"    {s.role:8}{s.name}: {', '.join([counts, *s.left_out()])}")
            self.make(
                "items",
                [base.words, [[s.role, s.name, s.digest, s.spec.continuation] for s in sets]],
                lambda tmp: write_items(at_prefixes(sets, tokenizer), tokenizer, tmp, ("validation", "test")),
            )
        return sets

    def look(self, base: Loaded, sets: Sequence[LoadedSet]) -> None:
        """Get hold of all that later stages ask for: what is missing is said before anything is trained.

        Raises:
            UnlearnError: no such task, benchmark, reference, layer or token; no items where some are needed.
        """
        recipe = self.recipe
        for lora in (recipe.vector.lora, recipe.teach.lora if recipe.teach is not None else None):
            if lora is not None:
                finetune.lora_modules(base.model, lora)
        self.require(sets)
        for one in sets:
            for spec in self.trained(one):
                self.encode([one], base.tokenizer, spec)  # an answer that no row can hold
        self.built("validation", sets, base.tokenizer, recipe.eval.generate == "sweep")
        self.built("test", sets, base.tokenizer, recipe.eval.generate != "none")
        if recipe.robustness is not None and recipe.robustness.samples:
            self.built("test", sets, base.tokenizer, generate=True)  # what is sampled is compared by its words as well
        if recipe.benchmark is not None and recipe.benchmark.name == "tofu":
            place = base.tokenizer.name_or_path  # MUSE's take long to cut into tokens, and its rows were read
            benchmark_tasks.build(recipe.benchmark, self.base, place, recipe.seed)
        if references.is_model(recipe) and recipe.reference != "train":
            where = references.locate(recipe, self.base)
            refuse_another(base.tokenizer, references.tokenizer(recipe, where))
        clean_checkpoint(recipe, self.base)
        if recipe.holdout is not None:
            require_rows(sets, base)
        if recipe.export.push_to_hub is not None:
            able(recipe.export.push_to_hub)

    def teach(self, base: Loaded, sets: Sequence[LoadedSet]) -> Loaded:
        """The target model: the base taught forget and retain sets together, or the base as it is."""
        spec = self.recipe.teach
        if spec is None:
            return base
        learned = [s for s in sets if s.role in ("forget", "retain") and s.train]
        with self.announced("teach", "the base model the forget and retain sets"):
            self.where = self.taught("target", base, learned, spec, "teaching")
            return models.load(self.recipe.model, self.where)

    # -- exports -------------------------------------------------------------------------------------------------

    def export(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, about: card.CardFacts
    ) -> dict[str, Any]:
        """Write what the recipe asks for; nothing when no coefficient was chosen."""
        spec, c = self.recipe.export, about.chosen.coefficient
        wanted = [n for n, on in (("adapter", spec.adapter), ("merged", spec.merged)) if on and c > 0]
        found: dict[str, Any] = {}
        if not wanted:
            return found
        with self.announced("export", " and ".join(wanted)):

            def adapter(tmp: Path) -> None:
                facts = export.export_adapter(vector, c, self.where, target.model, tmp, about)
                write_json_atomic(tmp / "export.json", facts)

            def merged(tmp: Path) -> None:
                dtype = None if spec.dtype == "auto" else getattr(torch, spec.dtype)
                facts = export.export_merged(
                    target.model,
                    vector,
                    c,
                    target.tokenizer,
                    tmp,
                    dtype=dtype,
                    shard_size=spec.shard_size,
                    stochastic_rounding=spec.stochastic_rounding,
                    seed=self.recipe.seed,
                    accept_rounding=spec.accept_rounding,
                    base_name=self.where,
                    about=about,
                )
                rows = _a_few(sets, target)
                again = export.rescored(tmp, target.model, vector, c, target.tokenizer, rows, spec.accept_rounding)
                say(f"    read again, it is {again['difference']:.2g} nats per token off the edited model")
                write_json_atomic(tmp / "export.json", {**facts, "rescored": again})

            edited = [target.fingerprint, vector.digest(), c]
            settings = {"dtype", "stochastic_rounding", "shard_size", "accept_rounding"}
            how = spec.model_dump(mode="json", include=settings)
            parts = {
                "adapter": [*edited, self.where, card.card(about, "adapter", self.where)],
                "merged": [*edited, how, self.recipe.seed, digests(sets), card.card(about, "merged", self.where)],
            }
            for name in wanted:
                self.make(f"export/{name}", parts[name], adapter if name == "adapter" else merged)
                facts = json.loads((self.folder.path(f"export/{name}") / "export.json").read_text("utf-8"))
                found[name] = {"path": f"export/{name}", **facts}
            if spec.push_to_hub is not None:
                found["hub"] = self._push(spec.push_to_hub, parts[spec.push_to_hub.what])
        return found

    def _push(self, spec: PushSpec, parts: Sequence[Any]) -> dict[str, Any]:
        """Put an export on the hub, once: the same export is not pushed again to the same place."""
        folder = self.folder.path(f"export/{spec.what}")
        if spec.dry_run:
            push(folder, spec)
            return {"repo": spec.repo, "dry_run": True}

        def make(tmp: Path) -> None:
            write_json_atomic(tmp / "pushed.json", {"repo": spec.repo, "url": push(folder, spec).url})

        self.make("export/hub", [*parts, spec.model_dump(mode="json")], make)
        facts: dict[str, Any] = json.loads((self.folder.path("export/hub") / "pushed.json").read_text("utf-8"))
        return facts


def _a_few(sets: Sequence[LoadedSet], target: Loaded) -> list[Encoded]:
    """Some scored items of every set, to compare two models on."""
    most = reach(target.model, target.tokenizer)
    return [
        row for s in sets for row in scored_rows((*s.test, *s.validation)[:_FEW], s.spec.kind, target.tokenizer, most)
    ]
