"""The part of a recipe that says how something is fine-tuned: the adapter, the Trainer's options, the teaching."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from unlearn.recipe.data import Frozen, Positive, Share


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


# -- the part of a recipe that says which vector is subtracted


Source = Literal["negate", "msa", "consensus", "random", "gradient_ascent", "gradient_difference", "npo", "retain_only"]
Shaper = Literal["contrast", "ext_sub", "project", "ethos", "perta", "lines", "learned", "low_rank", "prune", "rescale"]
Method = Literal[Source, Shaper]

SOURCES: tuple[Source, ...] = get_args(Source)
BASELINES: tuple[Method, ...] = ("random", "gradient_ascent", "gradient_difference", "npo", "retain_only")
# what cannot be worked out without training items of a retain set
NEED_RETAIN: tuple[Method, ...] = (
    *("msa", "contrast", "ext_sub", "project", "perta", "learned", "gradient_difference", "retain_only"),
)
# those of them that need a vector fitted on the retain sets
NEED_RETAIN_VECTOR: tuple[Method, ...] = ("msa", "contrast", "ext_sub", "project", "retain_only")
_ONE_OF = ("msa", "contrast", "ext_sub")  # each takes the retain vector off: twice would take it off twice
# what makes sense where a vector is added: nothing that is fitted against what must be forgotten
ADDABLE: tuple[Method, ...] = ("negate", "lines", "low_rank", "prune", "rescale")

Above = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


class RetainKLSpec(Frozen):
    """Keep the model's predictions on retain data while the forget vector is fitted."""

    sides: Literal["one", "two"] = Field(
        "two", description="one: KL(theta || theta + tau). two: also KL(theta || theta - c*tau), the side deployed."
    )
    weight: Above = Field(1.0, description="Weight of the penalty against the forget loss.")
    coefficients: tuple[AtLeast0, Above] | None = Field(
        None,
        description="two: c is drawn from this range at every step; equal ends fix it. The sweep's range when not "
        "given.",
    )
    batch_size: Positive = Field(8, description="Retain examples per step.")

    @field_validator("coefficients")
    @classmethod
    def _ascending(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] > ends[1]:
            raise ValueError("the range must go from low to high")
        return ends


class MsaSpec(Frozen):
    """MSA (2506.20941): theta - c * (alpha*tau_f - beta*tau_r), both fitted on a checkpoint before the forget set."""

    alpha: Above = Field(1.0, description="Weight of the forget vector.")
    beta: AtLeast0 = Field(1.0, description="Weight of the retain vector.")
    clean: str | None = Field(
        None,
        description="Checkpoint of the same architecture that never saw the forget set; with teach it is the model "
        "before the teaching, and nothing is to be given.",
    )


class ConsensusSpec(Frozen):
    """NegMerge (2410.05583): the mean of several fine-tunings where their signs agree."""

    runs: Annotated[int, Field(ge=2, le=32)] = Field(3, description="Fine-tunings, of seeds one after another.")


class GradientDifferenceSpec(Frozen):
    """Gradient difference (2203.12817), a baseline."""

    weight: AtLeast0 = Field(1.0, description="Weight of the retain loss.")


class NpoSpec(Frozen):
    """Negative preference optimisation (2404.05868), a baseline."""

    beta: Above = Field(0.1, description="Inverse temperature.")


class ProjectSpec(Frozen):
    """Projection off the retain vector's row space."""

    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of the retain vector's squared norm, per module, whose directions are removed."
    )


class EthosSpec(Frozen):
    """Ethos (2403.08994): filter in the singular basis of the weights."""

    threshold: Share = Field(0.03, description="Share of the largest component below which one is dropped.")


class PertaSpec(Frozen):
    """PerTA (2601.22030): scale each entry by its importance for forgetting against that for retaining."""

    importance: Literal["grad", "fisher"] = Field("grad", description="Mean |gradient|, or its square.")
    alpha: Above = Field(1.0, description="Weight of the importance for retaining.")
    samples: Positive = Field(64, description="Training items of either side that it is estimated from.")


class LinesSpec(Frozen):
    """LiNeS (2410.17146): scale layer l of L by a + b*l/(L-1)."""

    a: float = Field(0.2, description="Scale of the first layer.")
    b: float = Field(0.8, description="What the last layer's scale has more.")


class LearnedSpec(Frozen):
    """Coefficients per component fitted by gradient (after aTLAS, 2407.02880), vector and model frozen."""

    by: Literal["component", "module"] = Field("component", description="One per singular component, or per module.")
    steps: Positive = Field(15, description="Adam steps; on few items more of them gave worse vectors.")
    learning_rate: Above = Field(0.1, description="Adam's learning rate; coefficients begin at 1.")
    batch_size: Positive = Field(8, description="Forget examples per step.")
    retain_batch_size: Positive = Field(8, description="Retain examples per step.")
    beta: AtLeast0 = Field(5.0, description="Weight of the divergence on retain items.")
    ceiling: Above = Field(10.0, description="Nats per token above which an answer counts as forgotten.")
    scale: Above = Field(1.0, description="Coefficient that the weights are fitted at.")


class LowRankSpec(Frozen):
    """Truncation to the leading singular components, per module."""

    rank: Positive | None = Field(None, description="So many components.")
    energy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="As many as carry this share of the squared norm."
    )

    @model_validator(mode="after")
    def _one(self) -> LowRankSpec:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy")
        return self


class PruneSpec(Frozen):
    """Keep the largest part of the vector, per module (Li et al. 2504.10957, Corollary 2, for rows)."""

    keep: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Share that is kept.")
    by: Literal["magnitude", "rows"] = Field("rows", description="Entries, or whole rows.")


class CorrelationSpec(Frozen):
    """What is measured before the edit (Li et al. 2504.10957): see the report's "What could be known beforehand"."""

    steps: Positive | None = Field(
        20, description="Steps of the short fine-tuning on each retain set; null: as many as the forget set's."
    )
    items: Positive = Field(64, description="At most this many items of each set.")


class VectorSpec(Frozen):
    """How the task vector is made and shaped."""

    method: Method | tuple[Method, ...] = Field(
        "negate",
        description="What is subtracted. A source (negate: the forget vector itself, which a list need not say; msa; "
        "consensus; or a baseline: random, gradient_ascent, gradient_difference, npo, retain_only), then shapers, in "
        "this order: contrast, ext_sub, project, ethos, perta, lines, learned, low_rank, prune, rescale.",
    )
    mu: AtLeast0 | None = Field(
        None, description="contrast: weight of the retain vector, theta - c*(tau_f - mu*tau_r); 1 when not given."
    )
    msa: MsaSpec | None = Field(None, description="Settings of msa.")
    consensus: ConsensusSpec | None = Field(None, description="Settings of consensus.")
    gradient_difference: GradientDifferenceSpec | None = Field(None, description="Settings of gradient_difference.")
    npo: NpoSpec | None = Field(None, description="Settings of npo.")
    project: ProjectSpec | None = Field(None, description="Settings of project.")
    ethos: EthosSpec | None = Field(None, description="Settings of ethos.")
    perta: PertaSpec | None = Field(None, description="Settings of perta.")
    lines: LinesSpec | None = Field(None, description="Settings of lines.")
    learned: LearnedSpec | None = Field(None, description="Settings of learned.")
    low_rank: LowRankSpec | None = Field(None, description="Settings of low_rank; it needs them.")
    prune: PruneSpec | None = Field(None, description="Settings of prune.")
    retain_kl: Literal["none", "one_sided", "two_sided"] | RetainKLSpec | None = Field(
        "none",
        description="Penalty at the fitting of the forget vector that makes it, or its negation too, harmless on "
        "retain items; a mapping sets its weight and range.",
    )
    correlation: CorrelationSpec | None = Field(
        default_factory=CorrelationSpec,
        description="Measure before the edit how the forget vector and each kept set are correlated; null: do not.",
    )
    lora: LoraSpec = Field(default_factory=LoraSpec, description="Shape of the adapters.")
    forget: TrainSpec = Field(default_factory=TrainSpec, description="Fine-tuning on the forget set.")
    retain: TrainSpec | None = Field(
        None, description="Fine-tuning on the retain sets, where a method needs it; like forget when not given."
    )

    def steps(self) -> tuple[Method, ...]:
        """The methods in order, the source first."""
        given: tuple[Method, ...] = (self.method,) if isinstance(self.method, str) else self.method
        return given if given and given[0] in SOURCES else ("negate", *given)

    def uses(self, *methods: Method) -> bool:
        """Whether any of these methods is in the list."""
        return any(m in methods for m in self.steps())

    def penalty(self) -> RetainKLSpec | None:
        """The retain penalty as written, its range not yet filled in."""
        if isinstance(self.retain_kl, RetainKLSpec):
            return self.retain_kl
        if self.retain_kl in (None, "none"):
            return None
        return RetainKLSpec(sides="two" if self.retain_kl == "two_sided" else "one")

    @model_validator(mode="after")
    def _composes(self) -> VectorSpec:
        if isinstance(self.method, tuple) and not self.method:
            raise ValueError("vector.method is an empty list: name at least one method, negate for instance")
        steps = self.steps()
        problem = _order(steps) or self._settings(steps) or self._penalised(steps)
        if problem:
            raise ValueError(problem)
        return self

    def _settings(self, steps: tuple[Method, ...]) -> str:
        if self.mu is not None and "contrast" not in steps:
            return (
                "vector.mu weighs the retain vector of contrast, which vector.method does not name: add it, or drop mu"
            )
        for name in get_args(Method):
            if name != "retain_only" and getattr(self, name, None) is not None and name not in steps:
                return (
                    f"vector.{name} holds settings of a method that vector.method does not name: add it, or drop them"
                )
        if "low_rank" in steps and self.low_rank is None:
            return "vector.method low_rank needs vector.low_rank: {rank: ...} or {energy: ...}"
        return ""

    def _penalised(self, steps: tuple[Method, ...]) -> str:
        baseline = steps[0] in BASELINES and steps[0] != "random"
        if baseline and self.penalty() is not None:
            return f"vector.retain_kl belongs to the forget vector's fitting, and the baseline {steps[0]} has none"
        return ""


def _order(steps: tuple[Method, ...]) -> str:
    """Why the methods cannot be composed in this order, or nothing."""
    twice = next((m for m in steps if steps.count(m) > 1), None)
    if twice:
        return f"vector.method names {twice} twice"
    late = next((m for m in steps[1:] if m in SOURCES), None)
    if late and steps[0] == "negate":
        return f"vector.method: {late} makes a vector of its own and does not shape one: it can only stand first"
    if late:
        return f"vector.method: {steps[0]} and {late} each make a vector; name one of them"
    if steps[0] in BASELINES and len(steps) > 1:
        return f"vector.method: the baseline {steps[0]} is compared as published; nothing can be composed with it"
    rivals = [m for m in steps if m in _ONE_OF]
    if len(rivals) > 1:
        return f"vector.method: {rivals[0]} and {rivals[1]} both take the retain vector off; name one of them"
    return ""
