"""The part of a recipe that says how something is fine-tuned: the adapter, the Trainer's options, the teaching."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unlearn.recipe_data import Frozen, Positive, Share


class LoraSpec(Frozen):
    """Shape of the adapter that becomes the task vector (Hu et al. 2106.09685)."""

    rank: Positive = Field(16, description="Rank r of the update.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="Scale: the update is (alpha/rank) * B @ A.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Module names (q_proj, fc1, ...), or all-linear: every linear layer but the head."
    )
    depth: tuple[Share, Share] = Field(
        (0.0, 1.0),
        description="The layers that get an adapter, as shares of the depth: [0.75, 1] is the last quarter. Training "
        "then needs no gradient in the layers before.",
    )
    rslora: bool = Field(False, description="Scale by alpha/sqrt(rank) instead (2312.03732).")

    @field_validator("depth")
    @classmethod
    def _rising(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] >= ends[1]:
            raise ValueError("the depth must go from a lower share to a higher one")
        return ends


class TrainSpec(Frozen):
    """One fine-tuning, run by transformers' Trainer."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="Passes over the data.")
    steps: Positive | None = Field(None, description="Optimiser steps; instead of epochs.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate (AdamW).")
    batch_size: Positive = Field(8, description="Examples of a batch, of all processes together.")
    accumulation: Positive = Field(1, description="Batches added up before each step.")
    warmup: Share = Field(0.1, description="Share of the steps over which the rate rises.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="Rate over time.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    max_length: Positive = Field(
        512,
        description="Longest row in tokens. A longer prompt loses its beginning, which is counted in the report; an "
        "answer is never cut: one that does not fit is an error. A longer passage becomes several rows.",
    )
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
