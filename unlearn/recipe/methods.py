"""How something is fine-tuned, and which vector is subtracted: the settings of every method, and :data:`METHODS`.

Nothing here needs torch. The functions of the methods are in :mod:`unlearn.vector.methods`, under the same names.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticKnownError

from unlearn.recipe.data import ALSO, Above, AtLeast0, Count, DataSet, Frozen, Positive, Share, also, key, later
from unlearn.text import coefficient as number
from unlearn.text import counted, did_you_mean, percent

if TYPE_CHECKING:
    from unlearn.recipe.schema import Recipe


_Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]  # a module's path, or its end


class LoraSpec(Frozen):
    """Shape of the adapter that becomes the task vector (Hu et al. 2106.09685)."""

    rank: Positive = key(16, "Rank r of the update.", **also("rank", "r"))
    alpha: Above = key(32, "Scale: the update is (alpha/rank) * B @ A.", **also("alpha", "lora_alpha"))
    dropout: Annotated[float, Field(ge=0, lt=1)] = key(
        0.0, "Dropout on the adapter's input.", **also("dropout", "lora_dropout")
    )
    targets: Literal["all-linear"] | tuple[str, ...] = key(
        "all-linear",
        "Module names (q_proj, fc1, ...), or all-linear: every linear layer but the head.",
        **also("targets", "target_modules"),
    )
    depth: tuple[Share, Share] = key(
        (0.0, 1.0), "Layers with an adapter, as shares of the depth: [0.75, 1] is the last quarter, and trains faster."
    )
    rslora: bool = key(False, "Scale by alpha/sqrt(rank) instead (2312.03732).", **also("rslora", "use_rslora"))
    init_lora_weights: Literal[True, "gaussian", "orthogonal"] = later(
        True, "How A begins, as in LoraConfig (true: Kaiming's uniform); B A begins at zero in any case."
    )
    rank_pattern: dict[_Module, Positive] = later({}, "Other ranks for some modules, by their names as in targets.")
    alpha_pattern: dict[_Module, Above] = later({}, "Other alphas for some modules, in the same way.")

    @field_validator("depth")
    @classmethod
    def _rising(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] >= ends[1]:
            raise ValueError("the depth must go from a lower share to a higher one")
        return ends

    @model_validator(mode="after")
    def _in_pairs(self) -> LoraSpec:
        odd = next((rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2), None)
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights orthogonal needs even ranks, and one is {odd}")
        return self


# Settings of the Trainer on which rests what this program says of a run: the keys of a recipe that stand for them.
_GOVERNED = {
    "output_dir|.*checkpoint(_states.*)?|save_(?!steps).*|load_best.*|metric_for.*|greater_is.*|ignore_data_skip": (
        "a run's folder and its checkpoints are the program's; save_every says how often one is written"
    ),
    "(data_)?seed|full_determinism": "seed at the top of the recipe decides",
    "report_to|run_name|project|trackio_.*|log.*|disable_tqdm|debug|.*num_input_tokens_seen|skip_memory_metrics": (
        "report_to at the top of the recipe says where figures go"
    ),
    "(bf|fp)16.*|tf32": "model.dtype decides",
    "use_cpu|(accelerator|parallelism)_config|fsdp.*|deepspeed|ddp_.*|local_rank|average_tokens.*": (
        "model.device, model.device_map and torchrun decide"
    ),
    ".*eval.*|do_.*|prediction_loss_only|include_for_metrics": "eval says how, and when, a model is scored",
    "(push_to_)?hub.*": "export.push_to_hub decides",
    "auto_find.*|dataloader_.*|train_sampling.*|(group_by_)?length.*|remove_unused.*|label_names": (
        "batch_size and the seed decide which rows are in a batch; all rows are in memory"
    ),
    "warmup_steps": "warmup beside trainer, a share of the steps, decides",
    "label_smoothing.*|neftune.*": "it would be another loss than the one that vector.method and retain_kl say",
    "torch_compile.*|(use_)?liger.*|use_cache": "the model must stay what is scored and exported",
}
# Keys of LoraConfig and from_pretrained that a recipe does not take, and why.
_NOT_A_VECTOR = "a task vector is the low-rank change of linear weights alone, which this is not: leave it out"
REFUSED = {
    **dict.fromkeys(("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "bias", "lora_bias"), _NOT_A_VECTOR),
    **dict.fromkeys(("trainable_token_indices", "target_parameters", "layer_replication"), _NOT_A_VECTOR),
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), "depth says which layers get an adapter"),
    "exclude_modules": "targets says which modules get an adapter",
    "warmup_steps": "warmup takes a share of the steps",
    **dict.fromkeys(("token", "use_auth_token"), "no secret stands in a recipe: hf auth login keeps the hub's token"),
    **dict.fromkeys(("quantization_config", "bnb_4bit_quant_type"), "quantize decides: nf4 or int8"),
    **dict.fromkeys(("use_safetensors", "weights_only"), "only safetensors are read, as nothing pickled is opened"),
}


@lru_cache
def trainer_settings() -> frozenset[str]:
    """What the installed TrainingArguments take, from its source: importing it takes seconds, and torch."""
    found = importlib.util.find_spec("transformers")
    source = Path(found.origin or "").with_name("training_args.py") if found is not None else Path()
    body = ast.parse(source.read_text("utf-8")).body if source.is_file() else []
    made = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments"), [])
    return frozenset(n.target.id for n in made if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


def _passed_on(name: str) -> str:
    """A key of ``trainer``: a setting that is the Trainer's alone."""
    if (why := next((why for names, why in _GOVERNED.items() if re.fullmatch(names, name)), None)) is not None:
        raise ValueError(f"not for a recipe to set: {why}")
    if (ours := ALSO.get(name, name)) in TrainSpec.model_fields:
        raise ValueError(f"this is the key {ours} beside trainer: write it there")
    known = trainer_settings()
    if known and name not in known:
        raise ValueError(f"transformers' TrainingArguments have no such setting{did_you_mean(name, known)}")
    return name


class TrainSpec(Frozen):
    """One fine-tuning, run by transformers' Trainer."""

    epochs: Above | None = key(None, "Passes over the data.", **also("epochs", "num_train_epochs"))
    steps: Positive | None = key(None, "Optimiser steps; instead of epochs.", **also("steps", "max_steps"))
    learning_rate: Above = key(2e-4, "Peak learning rate (AdamW).")
    batch_size: Positive = key(
        8, "Examples of a batch, of all processes together.", **also("batch_size", "per_device_train_batch_size")
    )
    accumulation: Positive = key(
        1, "Batches added up before each step.", **also("accumulation", "gradient_accumulation_steps")
    )
    warmup: Share = key(0.1, "Share of the steps over which the rate rises.", **also("warmup", "warmup_ratio"))
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = key(
        "linear", "Rate over time.", **also("schedule", "lr_scheduler_type")
    )
    weight_decay: AtLeast0 = key(0.0, "AdamW weight decay.")
    max_length: Positive = key(
        512,
        "Longest row in tokens. A longer prompt loses its beginning (the report says so), an answer that does not fit "
        "is an error, and a longer passage becomes several rows.",
        **also("max_length", "max_seq_length"),
    )
    gradient_checkpointing: bool = key(
        False, "Less memory for about a third more time.", **also("gradient_checkpointing", "activation_checkpointing")
    )
    save_every: Positive | None = key(
        None, "Checkpoint every so many steps; default: 4 in all.", **also("save_every", "save_steps")
    )
    report_to: tuple[str, ...] = key((), "Empty: report_to at the top of the recipe is for all.")
    trainer: dict[Annotated[str, AfterValidator(_passed_on)], Any] = later(
        {},
        "Further settings of transformers' TrainingArguments, by their names: optim, max_grad_norm, adam_beta2, "
        "lr_scheduler_kwargs, ...",
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if self.report_to:
            raise ValueError("report_to serves all trainings: give it at the top of the recipe")
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

    lora: LoraSpec | None = key(None, "Teach through a LoRA that is then merged; null: all weights.")


# -- which vector is subtracted


class RetainKLSpec(Frozen):
    """Keep the model's predictions on retain data while the forget vector is fitted."""

    sides: Literal["one", "two"] = key(
        "two",
        "one: KL(theta || theta + tau). two: also KL(theta || theta - c*tau), the side deployed. With ignorance, "
        "which is fitted on the side deployed, plus and minus are exchanged.",
    )
    weight: Above = key(1.0, "Weight of the penalty against the forget loss.")
    coefficients: tuple[AtLeast0, Above] | None = key(
        None, "two: c is drawn from this range at every step; equal ends fix it. The sweep's range when not given."
    )
    batch_size: Positive = key(8, "Retain examples per step.")
    temperature: Above = key(1.0, "Divides the logits of both, as in distillation: above 1 unlikely tokens count too.")
    estimate: Literal["passes", "kfac"] = later(
        "passes",
        "passes: the divergence itself, of batch_size retain items in every step. kfac: its second order by layer, (1 "
        "+ c^2)/2 * tr[(B^T G B)(A C A^T)] with the range's mean c^2, read once: steps cost no more than without.",
    )

    @field_validator("coefficients")
    @classmethod
    def _ascending(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and ends[0] > ends[1]:
            raise ValueError("the range must go from low to high")
        return ends

    @model_validator(mode="after")
    def _estimated(self) -> RetainKLSpec:
        if self.estimate == "kfac" and self.temperature != 1:
            raise ValueError("estimate: kfac is the second order of the divergence at temperature 1: leave one out")
        return self


class MsaSpec(Frozen):
    """MSA (2506.20941): theta - c * (alpha*tau_f - beta*tau_r), both fitted on a checkpoint before the forget set."""

    alpha: Above = key(1.0, "Weight of the forget vector.")
    beta: AtLeast0 = key(1.0, "Weight of the retain vector.")
    clean: str | None = key(
        None,
        "Checkpoint of the same architecture that never saw the forget set; with teach it is the model before that.",
    )


class ConsensusSpec(Frozen):
    """NegMerge (2410.05583): the mean of several fine-tunings where their signs agree."""

    runs: Annotated[int, Field(ge=2, le=32)] = key(3, "Fine-tunings, of seeds one after another.")


class IgnoranceSpec(Frozen):
    """Fit toward ignorance: KL(q || theta - tau) on the forget rows, q what a model says that never knew."""

    teacher: Literal["other", "blank", "short", "clean"] = key(
        "other",
        "q. other: the mean over prompts of other forget items in the same wording. blank: the wording with nothing "
        "filled in. short (text): 8 tokens at a time after no more than as many. clean: a model that never saw the "
        "forget set.",
    )
    others: Positive = key(2, "other: prompts that the mean is over, drawn anew for every row and step.")
    clean: str | None = key(
        None, "teacher clean: that model, of the same tokenizer; with teach it is the model before that."
    )
    grow: AtLeast0 = key(0.0, "Weight of the forget rows' cross-entropy under theta + tau, on the side not deployed.")

    @model_validator(mode="after")
    def _of_a_clean_one(self) -> IgnoranceSpec:
        if self.clean is not None and self.teacher != "clean":
            raise ValueError(f"clean names a model that teacher: {self.teacher} does not ask: set teacher to clean")
        return self


_WEIGHT = "Weight of the retain loss against the forget loss (open-unlearning's alpha / gamma)."


class RetainLossSpec(Frozen):
    """What holds the retain items beside a baseline's loss on the forget items."""

    weight: AtLeast0 = Field(1.0, description=_WEIGHT)
    retain_loss: Literal["nll", "kl"] = later(
        "nll", "nll: cross-entropy on retain answers. kl: the divergence from the model as it was, on the same tokens."
    )

    @property
    def kept(self) -> str:
        """The retain loss in words, which follow others."""
        what = "descent" if self.retain_loss == "nll" else "KL(theta || theta + tau)"
        return f", {what} on the retain sets with weight {number(self.weight)}" if self.weight else ""


class GradientDifferenceSpec(RetainLossSpec):
    """Gradient difference (2203.12817; open-unlearning's GradDiff), a baseline."""


class NpoSpec(RetainLossSpec):
    """Negative preference optimisation (2404.05868), a baseline."""

    weight: AtLeast0 = later(0.0, f"{_WEIGHT} 0 is the loss alone; open-unlearning has 1.")
    beta: Above = key(0.1, "Inverse temperature.")


class SimNpoSpec(RetainLossSpec):
    """SimNPO (2410.07163), a baseline: NPO without a reference, by an answer's mean log-probability."""

    weight: AtLeast0 = Field(8.0, description=f"{_WEIGHT} 8 is the authors' 1 to .125.")
    beta: Above = key(4.5, "Inverse temperature.")
    margin: AtLeast0 = key(0.0, "The paper's gamma (open-unlearning's delta times beta).")


class IdkDpoSpec(RetainLossSpec):
    """DPO with a refusal as the answer that is preferred (TOFU 2401.06121; open-unlearning's IdkDPO), a baseline."""

    beta: Above = key(0.1, "Inverse temperature.")
    refusals: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = key(
        None,
        "Sentences to refuse with, one drawn for every item and step: a list, or a text file with one a line; sixteen "
        "such as 'I don't know.' when not given.",
    )


class RmuSpec(Frozen):
    """RMU (2403.03218), a baseline: forget activations are driven to one random direction, retain ones are held."""

    layer: Count = key(7, "The layer whose output is driven, counted from 0.")
    layers: Positive = key(3, "Layers that get an adapter: that one, and so many less one before it.")
    scale: Above = key(6.5, "Length of the vector that forget activations are driven to (the paper's c).")
    weight: AtLeast0 = key(1200.0, "Weight of the distance on retain items (the paper's alpha).")


class IhlSpec(RetainLossSpec):
    """The inverted hinge loss of LoKU (2408.06621), a baseline."""

    fila: bool = key(
        False,
        "Begin the LoRA at the part of the weights that matters for forget items and not for retain items (FILA); the "
        "vector has twice the rank.",
    )
    samples: Positive = key(64, "fila: training items of either side that this is estimated from.")

    @property
    def start(self) -> str:
        """Where the LoRA begins, in words that follow others."""
        return f", from FILA's start by {counted(self.samples, 'item')} of either side" if self.fila else ""


class ProjectSpec(Frozen):
    """Projection off the retain vector's row space."""

    energy: Annotated[float, Field(gt=0, le=1)] = key(
        0.9, "Share of the retain vector's squared norm, per module, whose directions are removed."
    )


class EthosSpec(Frozen):
    """Ethos (2403.08994): filter in the singular basis of the weights."""

    threshold: Share = key(0.03, "Share of the largest component below which one is dropped.")


class PertaSpec(Frozen):
    """PerTA (2601.22030): scale each entry by its importance for forgetting against that for retaining."""

    importance: Literal["grad", "fisher"] = key("grad", "Mean |gradient|, or its square.")
    alpha: Above = key(1.0, "Weight of the importance for retaining.")
    samples: Positive = key(64, "Training items of either side that it is estimated from.")

    @property
    def kind(self) -> str:
        """What the importance is, in words."""
        return "mean |gradient|" if self.importance == "grad" else "mean squared gradient"


class ShrinkSpec(Frozen):
    """Shrinking on the input side (SAGE 2606.18309; by rank AlphaEdit 2410.02355)."""

    mu: Above = key(1000.0, "Weight of the retain items' activations, against their mean square.")
    rank: Positive | None = key(
        None, "Remove so many leading directions of these activations instead, and nothing else."
    )
    forget: AtLeast0 = later(
        0.0,
        "Weight of the forget items' activations, against their mean square: what the change does to these is kept.",
    )

    @model_validator(mode="after")
    def _one_form(self) -> ShrinkSpec:
        if self.rank is not None and self.forget:
            raise ValueError("give either rank or forget: by rank, whole directions go, whatever forget items bring")
        return self

    @property
    def how(self) -> str:
        """What is done to a module's input side, in words."""
        if self.rank is not None:
            return f"take off the {counted(self.rank, 'leading direction')} of what it reads on retain items"
        kept = f", and not along what it reads on forget items, weight {number(self.forget)}" if self.forget else ""
        return f"shrink it along what it reads on retain items, mu {number(self.mu)}{kept}"


class KfacSpec(Frozen):
    """Shrinking on both sides (after TAK 2602.17385)."""

    mu: Above = key(1e6, "Weight of the retain items' curvature, its root on either side, against their mean squares.")


class SlopesSpec(Frozen):
    """Coefficients per component along which the retain items' losses do not move at first (after GU 2511.17100)."""

    mu: Above = key(100.0, "Weight of the retain items' slopes, against their mean square.")
    forget: AtLeast0 = key(
        1.0, "How far components are raised along which the forget items' loss rises, in its mean slope."
    )
    samples: Positive = key(64, "Training items of either side whose slopes are taken, one by one.")


class LinesSpec(Frozen):
    """LiNeS (2410.17146): scale layer l of L by a + b*l/(L-1)."""

    a: float = key(0.2, "Scale of the first layer.")
    b: float = key(0.8, "What the last layer's scale has more.")


class LearnedSpec(Frozen):
    """Coefficients per component fitted by gradient (after aTLAS, 2407.02880), vector and model frozen."""

    by: Literal["component", "module"] = key("component", "One per singular component, or per module.")
    steps: Positive = key(15, "Adam steps; on few items more of them gave worse vectors.")
    learning_rate: Above = key(0.1, "Adam's learning rate; coefficients begin at 1.")
    batch_size: Positive = key(8, "Forget examples per step.")
    retain_batch_size: Positive = key(8, "Retain examples per step.")
    beta: AtLeast0 = key(5.0, "Weight of the divergence on retain items.")
    ceiling: Above = key(10.0, "Nats per token above which an answer counts as forgotten.")
    scale: Above = key(1.0, "Coefficient that the weights are fitted at.")


class LowRankSpec(Frozen):
    """Truncation to the leading singular components, per module."""

    rank: Positive | None = key(None, "So many components.")
    energy: Annotated[float, Field(gt=0, le=1)] | None = key(None, "As many as carry this share of the squared norm.")

    @model_validator(mode="after")
    def _one(self) -> LowRankSpec:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("give either rank or energy")
        return self

    @property
    def kept(self) -> str:
        """What is left of a module, in words."""
        if self.rank is not None:
            return f"the {counted(self.rank, 'leading singular component')} of every module"
        assert self.energy is not None
        return f"as many singular components as carry {percent(self.energy)} of a module's squared norm"


class PruneSpec(Frozen):
    """Keep the largest part of the vector, per module (Li et al. 2504.10957, Corollary 2, for rows)."""

    keep: Annotated[float, Field(gt=0, le=1)] = key(0.2, "Share that is kept.")
    by: Literal["magnitude", "rows"] = key("rows", "Entries, or whole rows.")

    @property
    def kind(self) -> str:
        """Of what the largest are kept, in words."""
        return "rows" if self.by == "rows" else "entries"


# What a method can ask for beside the fitted vector: training rows of the forget and the retain sets, what the model
# computes on those of the retain sets, items to train on in a retain set, or a vector fitted on them.
Need = Literal["rows", "activations", "retain", "retain_vector"]
_VECTOR: tuple[Need, ...] = ("retain", "retain_vector")
_ROWS: tuple[Need, ...] = ("retain", "rows")


@dataclass(frozen=True, slots=True)
class Method:
    """What a recipe may name in ``vector.method``; a shaper's function is in :data:`SHAPERS` under the same name.

    ``words`` say in the plan and on the card what it does, with its settings: ``{0.energy:%}`` is a share,
    ``{0.steps:step}`` a count.
    """

    role: Literal["source", "baseline", "shaper"]
    words: str = ""
    paper: str = ""  # arXiv number
    settings: type[Frozen] | None = None  # what the recipe's ``vector.NAME`` holds
    needs: tuple[Need, ...] = ()
    takes_retain_off: bool = False  # so that no other such method can stand beside it
    addable: bool = False  # not fitted against what must be forgotten, so that it has a meaning where one is added
    dense: bool = False  # and so is its vector
    less: str = ""  # what to lower when memory runs out, if not to leave it out
    source: str = ""  # of a function from outside the package: what it makes depends on how it is written


METHODS: dict[str, Method] = {
    "negate": Method("source", paper="2212.04089", addable=True),
    "msa": Method(
        "source", "both vectors are fitted on a checkpoint that never saw the forget set", "2506.20941", MsaSpec,
        _VECTOR, takes_retain_off=True,
    ),
    "consensus": Method(
        "source", "the mean of {0.runs:fine-tuning} of different seeds where the signs of all agree", "2410.05583",
        ConsensusSpec, dense=True,
    ),
    "ignorance": Method(
        "source", "fit toward what a model says that never knew (teacher {0.teacher})", settings=IgnoranceSpec
    ),
    "random": Method("baseline", "a random vector with tau_f's norm in every module, a control"),
    "gradient_ascent": Method(
        "baseline", "a baseline: train to make the forget set less likely, and go as far as c says", "2210.01504"
    ),
    "gradient_difference": Method(
        "baseline", "a baseline: gradient ascent on the forget set{0.kept}", "2203.12817", GradientDifferenceSpec,
        ("retain",),
    ),
    "npo": Method(
        "baseline", "a baseline: negative preference optimisation, beta {0.beta}{0.kept}", "2404.05868", NpoSpec
    ),
    "simnpo": Method(
        "baseline", "a baseline: SimNPO, beta {0.beta}{0.kept}", "2410.07163", SimNpoSpec, ("retain",)
    ),
    "idk_dpo": Method(
        "baseline", "a baseline: DPO that prefers a refusal to the answer, beta {0.beta}{0.kept}", "2401.06121",
        IdkDpoSpec, ("retain",),
    ),
    "rmu": Method(
        "baseline", "a baseline: layer {0.layer} is driven to a random vector of length {0.scale} on the forget set, "
        "and held on the retain sets with weight {0.weight}; {0.layers:layer} of adapters", "2403.03218", RmuSpec,
        ("retain",),
    ),
    "ihl": Method(
        "baseline", "a baseline: the inverted hinge loss{0.kept}{0.start}", "2408.06621", IhlSpec, ("retain",)
    ),
    "retain_only": Method("baseline", "a baseline: fine-tuning on the retain sets only", needs=_VECTOR),
    "contrast": Method(
        "shaper", "take off what forget and retain vectors have in common", needs=_VECTOR, takes_retain_off=True
    ),
    "ext_sub": Method(
        "shaper", "take off, row by row, what lies along the common direction of forget and retain vector",
        "2308.08090", needs=_VECTOR, takes_retain_off=True, dense=True,
    ),
    "project": Method(
        "shaper", "take off what lies in the retain vector's row space ({0.energy:%} of its squared norm)",
        settings=ProjectSpec, needs=_VECTOR,
    ),
    "shrink": Method("shaper", "{0.how}", "2606.18309", ShrinkSpec, ("retain", "activations")),
    "kfac": Method(
        "shaper", "shrink it along what retain items bring to either side of a module, mu {0.mu}", "2602.17385",
        KfacSpec, ("retain", "activations"),
    ),
    "ethos": Method(
        "shaper", "in the singular basis of the weights drop components below {0.threshold:%} of the largest",
        "2403.08994", EthosSpec, dense=True,
    ),
    "perta": Method(
        "shaper", "scale every entry by its importance for forgetting against that for retaining ({0.kind} of "
        "{0.samples:item} of either side)", "2601.22030", PertaSpec, _ROWS, dense=True,
    ),
    "lines": Method(
        "shaper", "scale layer l of L by {0.a} + {0.b} * l / (L - 1)", "2410.17146", LinesSpec, addable=True
    ),
    "slopes": Method(
        "shaper", "one coefficient per component, so that the losses of {0.samples:retain item} do not move at first, "
        "mu {0.mu}; more where those of the forget items rise, weight {0.forget}", "2511.17100", SlopesSpec, _ROWS,
    ),
    "learned": Method(
        "shaper", "fit one coefficient per {0.by} by gradient on train items, vector and model frozen: {0.steps:step} "
        "of {0.batch_size} forget and {0.retain_batch_size} retain examples", "2407.02880", LearnedSpec, _ROWS,
        less="lower vector.learned.batch_size and vector.learned.retain_batch_size",
    ),
    "low_rank": Method("shaper", "keep {0.kept}", settings=LowRankSpec, addable=True),
    "prune": Method(
        "shaper", "keep the largest {0.keep:%} of every module's {0.kind}", "2504.10957", PruneSpec, addable=True,
        dense=True,
    ),
    "rescale": Method("shaper", "make it as long again as it was when it was fitted", addable=True),
}  # fmt: skip


_PACKAGED = frozenset(METHODS)
# The function of a shaper, ``(vector, have, settings) -> vector``: :mod:`unlearn.vector.methods` puts its own here.
SHAPERS: dict[str, Callable[..., Any]] = {}


def register_method(name: str, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a shaper of a function ``(vector, have, settings) -> vector``, so that a recipe can name it.

    Registered again, as when a notebook's cell is run again, the new function takes the place of the one before.

    Args:
        name: What ``vector.method`` calls it; its settings, if it has any, are under ``vector.NAME``.
        facts: See :class:`Method`: ``words``, ``settings`` (a subclass of ``unlearn.recipe.data.Frozen``),
            ``needs``, ``paper``, ``addable``.
    """
    if name in _PACKAGED or name in VectorSpec.model_fields or not name.isidentifier():
        raise ValueError(f"{name!r} cannot be a method's name: it is taken, or no identifier")
    if isinstance(facts.get("needs"), str):
        facts["needs"] = (facts["needs"],)
    method = Method("shaper", **facts)
    if problem := _unspeakable(method):
        raise ValueError(f"words of method {name!r}: {problem}")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            source = repr(function)  # has its address: what cannot be read is never taken for what it was
        METHODS[name], SHAPERS[name] = replace(method, source=source), function
        return function

    return register


def _unspeakable(method: Method) -> str:
    """Which field of a method's words none of its settings fills, or nothing."""
    there = method.settings.model_fields if method.settings is not None else {}
    for _, field, _, _ in Formatter().parse(method.words):
        first, _, setting = (field or "").partition(".")
        setting = re.split(r"[.\[]", setting)[0]
        if field is not None and not (first == "0" and (setting in there or hasattr(method.settings, setting))):
            has = f"there are {', '.join(f'{{0.{one}}}' for one in there)}" if there else "it has no settings"
            return f"{{{field}}} is none of its settings; {has}"
    return ""


def _known(name: str) -> str:
    """A key of ``vector`` that has no field: settings of a method from outside, or a mistake."""
    if name not in METHODS or METHODS[name].settings is None:
        raise PydanticKnownError("extra_forbidden")
    return name


_ELSEWHERE = {"gradascent": "gradient_ascent", "graddiff": "gradient_difference", "dpo": "idk_dpo", "idkdpo": "idk_dpo"}


def registered(name: str) -> str | None:
    """The method that is meant by a name, in whatever case, or by that of an open-unlearning trainer."""
    return next((known for known in (name, name.lower(), _ELSEWHERE.get(name.lower())) if known in METHODS), None)


def _registered(value: Any, handler: Callable[[Any], Any]) -> Any:
    return (registered(value) if isinstance(value, str) else None) or handler(value)


# The package's own, as they stand in the schema of recipes and in messages; what others registered is taken as well.
Loss = Literal["gradient_ascent", "gradient_difference", "npo", "simnpo", "idk_dpo", "rmu", "ihl"]
_Baseline = Literal["random", Loss, "retain_only"]
_Source = Literal["negate", "msa", "consensus", "ignorance", _Baseline]
_Form = Literal[
    "contrast", "ext_sub", "project", "shrink", "kfac", "ethos", "perta", "lines", "slopes", "learned", "low_rank",
    "prune", "rescale",
]  # fmt: skip
Name = Annotated[Literal[_Source, _Form], WrapValidator(_registered)]


class CorrelationSpec(Frozen):
    """What is measured before the edit (Li et al. 2504.10957): see the report's "What could be known beforehand"."""

    steps: Positive | None = key(
        20, "Steps of the short fine-tuning on each retain set; null: as many as the forget set's."
    )
    items: Positive = key(64, "At most this many items of each set.")


class FromSpec(Frozen):
    """A vector that is there already: a file, an adapter, or what a checkpoint has more than the one before it."""

    path: str | None = key(
        None, "A vector's file or its stage's folder, or a LoRA adapter of PEFT's (folder or hub id).", min_length=1
    )
    finetuned: str | None = key(
        None, "In place of path: a checkpoint (folder or hub id), of which base is taken off.", min_length=1
    )
    base: str | None = key(None, "The checkpoint before finetuned; the recipe's model when not given.", min_length=1)
    revision: str | None = key(None, "Hub revision of path or finetuned.")
    skip_unequal: bool = key(
        False,
        "Leave out what finetuned changed and no vector can hold (norms, embeddings, biases); else that is an error.",
    )
    negate: bool = key(False, "It was trained to forget, not on the forget set: minus it is what is subtracted.")

    @model_validator(mode="after")
    def _one(self) -> FromSpec:
        if (self.path is None) == (self.finetuned is None):
            raise ValueError("give either path (a vector or an adapter) or finetuned (a checkpoint)")
        if self.finetuned is None and (self.base is not None or self.skip_unequal):
            raise ValueError("base and skip_unequal belong to checkpoints: give finetuned as well")
        return self

    def words(self) -> str:
        """Where the vector is from."""
        less = "the recipe's model" if self.base is None else self.base
        where = f"{self.path}" if self.finetuned is None else f"{self.finetuned} less {less}"
        return f"{where}{f' at revision {self.revision}' if self.revision else ''}{', negated' if self.negate else ''}"


class VectorSpec(Frozen):
    """How the task vector is made and shaped."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True, json_schema_extra={"additionalProperties": False})

    method: Annotated[Name | tuple[Name, ...], PlainSerializer(lambda given: given)] = key(
        "negate",
        "What is subtracted. A source (negate: the forget vector itself, which a list need not say; msa; consensus; "
        "ignorance; or a baseline: random, gradient_ascent, gradient_difference, npo, simnpo, idk_dpo, rmu, ihl, "
        "retain_only; open-unlearning's names of trainers are taken too), then shapers, in the order given: contrast, "
        "ext_sub, project, shrink, kfac, ethos, perta, lines, slopes, learned, low_rank, prune, rescale.",
    )
    from_: str | FromSpec | None = later(
        None,
        "Bring the forget vector (or that of the one set to learn), so that nothing is trained for it: the path of a "
        "vector or of a LoRA adapter, or a mapping.",
        alias="from",
    )
    mu: AtLeast0 | None = key(
        None, "contrast: weight of the retain vector, theta - c*(tau_f - mu*tau_r); 1 when not given."
    )
    msa: MsaSpec | None = key(None, "Settings of msa.")
    consensus: ConsensusSpec | None = key(None, "Settings of consensus.")
    ignorance: IgnoranceSpec | None = key(None, "Settings of ignorance.")
    gradient_difference: GradientDifferenceSpec | None = key(None, "Settings of gradient_difference.")
    npo: NpoSpec | None = key(None, "Settings of npo.")
    simnpo: SimNpoSpec | None = later(None, "Settings of simnpo.")
    idk_dpo: IdkDpoSpec | None = later(None, "Settings of idk_dpo.")
    rmu: RmuSpec | None = later(None, "Settings of rmu.")
    ihl: IhlSpec | None = later(None, "Settings of ihl.")
    project: ProjectSpec | None = key(None, "Settings of project.")
    shrink: ShrinkSpec | None = key(None, "Settings of shrink.")
    kfac: KfacSpec | None = later(None, "Settings of kfac.")
    ethos: EthosSpec | None = key(None, "Settings of ethos.")
    perta: PertaSpec | None = key(None, "Settings of perta.")
    lines: LinesSpec | None = key(None, "Settings of lines.")
    slopes: SlopesSpec | None = later(None, "Settings of slopes.")
    learned: LearnedSpec | None = key(None, "Settings of learned.")
    low_rank: LowRankSpec | None = key(None, "Settings of low_rank; it needs them.")
    prune: PruneSpec | None = key(None, "Settings of prune.")
    retain_kl: Literal["none", "one_sided", "two_sided"] | RetainKLSpec | None = key(
        "none",
        "Penalty at the fitting that makes the forget vector, or its negation too, harmless on retain items; a "
        "mapping sets its weight and range.",
    )
    inside: Above | None = key(
        None,
        "Fit the LoRA of the forget vector inside the shrinking: A is kept as A(I + inside * C/d)^-1, C the second "
        "moments of what the layer reads on retain items, d the mean of C's diagonal; 1000 is a good start.",
    )
    correlation: CorrelationSpec | None = Field(
        default_factory=CorrelationSpec,
        description="Measure before the edit how the forget vector and each kept set are correlated; null: do not.",
    )
    lora: LoraSpec = Field(default_factory=LoraSpec, description="Shape of the adapters.")
    forget: TrainSpec = Field(default_factory=TrainSpec, description="Fine-tuning on the forget set.")
    retain: TrainSpec | None = key(
        None, "Fine-tuning on the retain sets, where a method needs it; like forget when not given."
    )

    __pydantic_extra__: dict[Annotated[str, AfterValidator(_known)], Any]  # settings of methods that others registered

    def given(self) -> FromSpec | None:
        """The vector that the recipe brings."""
        return FromSpec(path=self.from_) if isinstance(self.from_, str) else self.from_

    def reads_forget_rows(self) -> bool:
        """Whether training rows of the set to forget or to learn are used: at its fitting, or by a shaper."""
        spared = self.shrink is not None and self.shrink.forget > 0
        return self.from_ is None or self.needs("rows") or spared

    def steps(self) -> tuple[str, ...]:
        """The methods in order, the source first."""
        given: tuple[str, ...] = (self.method,) if isinstance(self.method, str) else self.method
        return given if given and METHODS[given[0]].role != "shaper" else ("negate", *given)

    def source(self) -> str:
        """The method that makes the vector that the others shape."""
        return self.steps()[0]

    def uses(self, *methods: str) -> bool:
        """Whether any of these methods is in the list."""
        return any(m in methods for m in self.steps())

    def needs(self, *needs: Need) -> bool:
        """Whether any of the methods asks for any of these."""
        return any(need in METHODS[m].needs for m in self.steps() for need in needs)

    def sources(self) -> list[str]:
        """How the functions from outside the package are written."""
        return [source for m in self.steps() if (source := METHODS[m].source)]

    def settings(self, method: str) -> Any:
        """A method's settings, its defaults where the recipe gives none; of contrast the weight mu."""
        if method == "contrast":
            return 1.0 if self.mu is None else self.mu
        kind, given = METHODS[method].settings, getattr(self, method, None)
        return kind() if given is None and kind is not None else given

    def beside(self) -> tuple[str, ...]:
        """The keys that put retain rows beside the forget rows of a fitting."""
        given = {"retain_kl": self.penalty(), "inside": self.inside}
        return tuple(key for key, value in given.items() if value is not None)

    def loss(self) -> str:
        """The source where it is a baseline that trains with a loss of its own, else nothing."""
        return self.source() if self.source() in get_args(Loss) else ""

    def holds(self) -> bool:
        """Whether that loss has a term on retain rows, which stand beside the forget rows of every batch."""
        loss = self.loss()
        return bool(loss) and ("retain" in METHODS[loss].needs or (loss == "npo" and self.settings(loss).weight > 0))

    def reads_kept(self) -> bool:
        """Whether training items of retain and utility sets are read beside the forget set's."""
        return bool(self.beside()) or self.holds() or self.needs("rows", "activations")

    def needy(self) -> str:
        """What asks for a retain set with items to train on, or nothing."""
        found = [f"method {m}" for m in self.steps() if "retain" in METHODS[m].needs]
        found += [f"{self.loss()}.weight"] if self.holds() else []
        return next((f"vector.{one}" for one in (*found, *self.beside())), "")

    def clean(self) -> tuple[str, str | None] | None:
        """The key and the path of the model that never saw the forget set, where the source asks for one."""
        source = self.source()
        if source == "msa" or (source == "ignorance" and self.settings("ignorance").teacher == "clean"):
            return f"vector.{source}.clean", self.settings(source).clean
        return None

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
        if problem := _order(steps):
            raise ValueError(problem)
        if self.mu is not None and "contrast" not in steps:
            raise ValueError(
                "vector.mu weighs the retain vector of contrast, which vector.method does not name: add it, or drop mu"
            )
        for name, method in METHODS.items():
            if method.settings is not None and getattr(self, name, None) is not None and name not in steps:
                raise ValueError(
                    f"vector.{name} holds settings of a method that vector.method does not name: add it, or drop them"
                )
        if "low_rank" in steps and self.low_rank is None:
            raise ValueError("vector.method low_rank needs vector.low_rank: {rank: ...} or {energy: ...}")
        if self.from_ is not None and (problem := self._beside_given()):
            raise ValueError(problem)
        if METHODS[steps[0]].role == "baseline" and steps[0] != "random" and self.beside():
            raise ValueError(
                f"vector.{self.beside()[0]} belongs to the forget vector's fitting, and the baseline {steps[0]} has "
                "none"
            )
        return self

    def _beside_given(self) -> str:
        """Why what is said of a fitting makes no sense beside a vector that is there, or nothing."""
        if (source := self.source()) not in ("negate", "random"):
            return (
                f"vector.method {source} makes a vector of its own, and vector.from brings one: leave one of them out"
            )
        if beside := self.beside():
            return f"vector.{beside[0]} belongs to a fitting, and vector.from brings what was fitted: leave it out"
        if self.forget.model_copy(update={"max_length": 512}) != TrainSpec():
            return (
                "vector.forget says how the forget vector is fitted, and vector.from brings one: leave it out but for "
                "max_length (vector.retain is for retain vectors)"
            )
        if self.lora != LoraSpec() and not self.needs("retain_vector"):
            return "vector.lora is the shape of a vector that is fitted, and vector.from brings one: leave it out"
        return ""

    @model_validator(mode="after")
    def _outside(self) -> VectorSpec:
        """Check the settings of methods from outside the package, which have no field here."""
        extra = self.model_extra or {}
        for name, given in extra.items():
            kind = METHODS[name].settings
            assert kind is not None
            if not isinstance(given, kind):
                try:
                    extra[name] = kind.model_validate_json(json.dumps(given))
                except ValidationError as error:
                    details = error.errors(include_url=False)
                    raise ValidationError.from_exception_data(
                        "VectorSpec",
                        [
                            InitErrorDetails(
                                type=e["type"], loc=(name, *e["loc"]), input=e["input"], ctx=e.get("ctx", {})
                            )
                            for e in details
                        ],
                    ) from error
        return self


def _order(steps: tuple[str, ...]) -> str:
    """Why the methods cannot be composed in this order, or nothing."""
    twice = next((m for m in steps if steps.count(m) > 1), None)
    if twice:
        return f"vector.method names {twice} twice"
    late = next((m for m in steps[1:] if METHODS[m].role != "shaper"), None)
    if late and steps[0] == "negate":
        return f"vector.method: {late} makes a vector of its own and does not shape one: it can only stand first"
    if late:
        return f"vector.method: {steps[0]} and {late} each make a vector; name one of them"
    if METHODS[steps[0]].role == "baseline" and len(steps) > 1:
        return f"vector.method: the baseline {steps[0]} is compared as published; nothing can be composed with it"
    rivals = [m for m in steps if METHODS[m].takes_retain_off]
    if len(rivals) > 1:
        return f"vector.method: {rivals[0]} and {rivals[1]} both take the retain vector off; name one of them"
    return ""


# -- the edit in words, for the plan and the model card


class Style(NamedTuple):
    """How a formula is written."""

    theta: str
    c: str
    tau: str
    minus: str
    times: str


ASCII = Style("theta", "c * ", "tau", "-", " * ")
GREEK = Style("θ", "λ", "τ", "−", " ")


def formula(recipe: Recipe, style: Style = ASCII) -> str:
    """The edited model, ``theta - c * (tau_f - 1 * tau_r)`` for instance.

    A method that is more than a sum is written as a function of what it shapes, innermost first.
    """
    v, s = recipe.vector, style

    def named(data: DataSet) -> str:
        return f"{s.tau}_{data.label()}"

    if recipe.analogy is not None:
        a, b, c = (_shaped(v, s, named(d)) for d in (recipe.analogy.a, recipe.analogy.b, recipe.analogy.c))
        return f"{s.theta} + {s.c}({c} + {b} {s.minus} {a})"
    (first, data), *others = recipe.goals()
    sign = s.minus if first == "forget" else "+"
    if others:
        terms = [f"w_{d.label()}{s.times}{_shaped(v, s, named(d))}" for _, d in recipe.goals()]
        signs = ["+" if role == first else s.minus for role, _ in others]
        rest = "".join(f" {a} {b}" for a, b in zip(signs, terms[1:], strict=True))
        return f"{s.theta} {sign} {s.c}({terms[0]}{rest})"
    bare = s is GREEK and v.steps() == ("negate",)
    part = _shaped(v, s, s.tau if bare else f"{s.tau}_f" if first == "forget" else named(data))
    space = " " if s is GREEK and part[0].isascii() and part[0].isalpha() else ""
    return f"{s.theta} {sign} {s.c}{space}{part}"


def _shaped(v: VectorSpec, s: Style, tau: str) -> str:
    """One vector as the methods leave it, a sum in parentheses."""
    source, is_sum = v.source(), v.source() == "msa"
    if source == "msa":
        how = v.settings("msa")
        text = f"{number(how.alpha)}{s.times}{tau} {s.minus} {number(how.beta)}{s.times}{s.tau}_r"
    elif source in ("random", "consensus"):
        text = f"{source}({tau})"
    else:
        text = f"({s.theta} {s.minus} {s.theta}_{source})" if METHODS[source].role == "baseline" else tau
    for step in v.steps()[1:]:
        is_sum = step == "contrast"
        text = f"{text} {s.minus} {number(v.settings(step))}{s.times}{s.tau}_r" if is_sum else f"{step}({text})"
    return f"({text})" if is_sum else text


class _Words(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec:
            return percent(value) if format_spec == "%" else counted(value, format_spec)
        return number(value) if isinstance(value, float) else str(value)


def phrases(vector: VectorSpec) -> tuple[str, ...]:
    """What every method does, in order; nothing of plain negation, whose formula says it all."""
    told = ((step, _Words().format(METHODS[step].words, vector.settings(step))) for step in vector.steps())
    return tuple(f"{step}: {words}" for step, words in told if words)


def penalty(spec: RetainKLSpec, source: str = "negate") -> str:
    """The retain penalty of the fitting in a clause. ``spec`` is :meth:`unlearn.recipe.schema.Recipe.penalty`'s."""
    weight = "" if spec.weight == 1 else f", weight {number(spec.weight)}"
    weight += "" if spec.temperature == 1 else f", temperature {number(spec.temperature)}"
    curved = spec.estimate == "kfac"
    weight += ", by its second order (K-FAC)" if curved else ""
    one, other = ("+", "-") if source != "ignorance" else ("-", "+")
    if spec.sides == "one" or spec.coefficients is None:
        return f"KL(theta || theta {one} tau) on retain items held down{weight}"
    low, high = (number(c) for c in spec.coefficients)
    c = f"c = {low}" if low == high else f"c {'' if curved else 'drawn '}from {low} to {high}"
    return f"KL(theta || theta {one} tau) and KL(theta || theta {other} c * tau) on retain items held down, {c}{weight}"
