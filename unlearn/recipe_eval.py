"""The part of a recipe that says which coefficients are tried, how one is chosen, what is scored and handed back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unlearn.recipe_bench import PushSpec
from unlearn.recipe_data import Frozen, Positive, Scalar, Share


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
    """A task that lm-eval ships, or one of the pack in ``eval/``, scored beside the recipe's own data."""

    task: str = Field(
        min_length=1,
        description="Its name in lm-eval (hellaswag, wmdp_bio, ...) or in the pack (unlearn_toxicity, ...).",
    )
    set: Literal["forget", "learn", "retain", "utility"] = Field("utility", description="What it measures here.")
    metric: str = Field("acc", description="Which of its metrics counts; others of a pack's task are reported as well.")
    limit: Positive | None = Field(None, description="Use at most this many items, chosen by the seed.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Examples in the prompt.")
    metadata: dict[str, Scalar | tuple[Scalar, ...] | dict[str, Scalar | tuple[Scalar, ...]]] = Field(
        default_factory=dict,
        description="Settings of the task, as lm-eval's --metadata takes them; files relative to the current folder.",
    )
    whole: bool = Field(
        False,
        description="All of its items are test items, and the search does without it; else the seed halves them into "
        "validation and test.",
    )


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
    tasks: tuple[TaskSpec, ...] = Field((), description="lm-eval's own tasks, and those of the pack.")


class ExportSpec(Frozen):
    """What is handed back."""

    adapter: bool = Field(True, description="The edit as a PEFT adapter with the coefficient folded in.")
    merged: bool = Field(False, description="Whole edited weights, in safetensors shards, with the tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="dtype of merged weights.")
    stochastic_rounding: bool = Field(
        False, description="merged in 16 bits: round up or down by chance, so that small edits survive on average."
    )
    accept_rounding: bool = Field(
        False,
        description="merged in 16 bits: write it also where rounding has made another model of it than was scored.",
    )
    shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?[KMGT]B$", description="Largest shard of the merged weights.")
    push_to_hub: PushSpec | None = Field(None, description="Where an export is pushed to; null: nowhere.")

    @model_validator(mode="after")
    def _pushable(self) -> ExportSpec:
        if self.push_to_hub is not None and not getattr(self, self.push_to_hub.what):
            raise ValueError(
                f"push_to_hub wants the {self.push_to_hub.what} export: set {self.push_to_hub.what} to true"
            )
        return self
