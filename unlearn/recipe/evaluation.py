"""The part of a recipe that says which coefficients are tried, how one is chosen, what is scored and handed back."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from unlearn.errors import EvaluationError
from unlearn.recipe.data import Above, AtLeast0, Count, Frozen, Positive, Scalar, Share, key, later
from unlearn.text import did_you_mean

Quantised = Literal["nf4", "int8"]
Probe = Literal["paraphrase", "prefix", "few_shot", "template"]


class ForgetSet(NamedTuple):
    """One of TOFU's: how many questions it has, and on what its authors trained the reference for it."""

    questions: int
    reference: str


FORGET_SETS = {
    "forget01": ForgetSet(40, "retain99"),
    "forget05": ForgetSet(200, "retain95"),
    "forget10": ForgetSet(400, "retain90"),
}
_SETS = {"tofu": tuple(FORGET_SETS), "muse": ("news", "books")}


class EditedSpec(Frozen):
    """A model that was edited elsewhere, by whatever method: nothing is fitted, swept, chosen or exported."""

    model: str | None = key(
        None, "Folder, hub id or .gguf file; the recipe's (taught) model when not given.", min_length=1
    )
    revision: str | None = key(None, "Hub revision of the model.")
    adapter: str | None = key(
        None, "An adapter of PEFT's to merge into it, of any kind that changes weights.", min_length=1
    )

    @model_validator(mode="after")
    def _something(self) -> EditedSpec:
        if self.model is None and self.adapter is None:
            raise ValueError("give a model, an adapter, or both")
        return self

    def words(self) -> str:
        """Which model it is."""
        return " with ".join(part for part in (self.model or "the recipe's model", self.adapter) if part)


class BenchmarkSpec(Frozen):
    """A published benchmark, scored through its tasks in ``eval/``: target, edited model and retain reference."""

    name: Literal["tofu", "muse"] = Field(description="tofu (2401.06121) or muse (2407.06460).")
    set: str = Field(description="tofu: forget01, forget05 or forget10; muse: news or books.")
    path: str | None = key(None, "A local folder with its files, relative to the recipe; from the hub when not given.")
    items: Positive | None = key(None, "Only the first so many items of every set (the authors' TOFU logs have 300).")
    tag: Literal["prompt", "scored"] = key(
        "prompt",
        "tofu: whether the words 'Answer:' are part of the prompt or, as in the authors' logs of Phi-1.5, of what is "
        "scored.",
    )
    max_tokens: Positive | None = key(None, "Tokens generated for ROUGE-L; the benchmark's own if none.")

    @model_validator(mode="after")
    def _known(self) -> BenchmarkSpec:
        if self.set not in _SETS[self.name]:
            known = _SETS[self.name]
            guess = did_you_mean(self.set, known)
            raise ValueError(f"{self.name} has no set {self.set!r}; it has {', '.join(known)}{guess}")
        return self


class RelearnSpec(Frozen):
    """Fine-tuning the edited model for a few steps: how fast does it come back? (2406.13356)"""

    items: Positive = key(8, "Forget items trained on; they are not among those scored, where possible.")
    steps: tuple[Positive, ...] = key((1, 2, 5, 10, 20), "Steps after which it is scored.", min_length=1)
    learning_rate: Above = key(2e-4, "Of the relearning (AdamW, constant).")
    batch_size: Positive = key(4, "Rows per step.")
    unrelated: bool = key(True, "Relearn on utility texts as well, which have nothing of it in them.")


class RobustnessSpec(Frozen):
    """Attacks on the result: how much of what was forgotten comes back."""

    items: Positive = key(48, "Forget items of the test split that the attacks are scored on, at most.")
    quantize: tuple[Quantised, ...] = key(
        ("nf4", "int8"), "Quantised copies that are scored (2410.16454); needs bitsandbytes."
    )
    relearn: RelearnSpec | None = Field(default_factory=RelearnSpec, description="Relearning curves; null: none.")
    probes: tuple[Probe, ...] = key(
        ("paraphrase", "prefix", "few_shot", "template"),
        "Other ways to ask: reworded, after a text that sets the scene, after solved examples from the retain sets, "
        "and under templates in other languages.",
    )
    contrast: bool = key(
        True, "Ask the same about others and subtract: the choice that gains most by its own prompt is taken."
    )
    samples: Count = key(8, "Continuations sampled per item; the best one counts. 0: none are sampled.")
    temperature: Above = key(1.0, "Of the sampling.")
    lens: bool = key(True, "Read the answer off every hidden layer (logit lens).")


class PushSpec(Frozen):
    """What goes to the model hub. The token comes from the environment (HF_TOKEN) and from nowhere else."""

    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", description="OWNER/NAME on the hub.")
    what: Literal["adapter", "merged"] = key("adapter", "Which export is pushed.")
    private: bool = key(True, "Whether a new repository is private.")
    dry_run: bool = key(False, "Say what would be pushed, and push nothing.")

    @field_validator("repo")
    @classmethod
    def _nameable(cls, repo: str) -> str:
        """The hub's own rules: what it refuses is better known before the training."""
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        validate_repo_id(repo)
        return repo


class SweepSpec(Frozen):
    """Which coefficients are tried."""

    coefficients: tuple[Annotated[float, Field(ge=0, le=100)], ...] = key(
        (0.25, 0.5, 0.75, 1.0), "Grid of coefficients; 0, the model as it is, is always scored as well.", min_length=1
    )
    search: Literal["grid", "bisect"] = key(
        "grid",
        "grid: every coefficient is scored, which shows the whole frontier. bisect: only as many as the choice needs, "
        "half of the grid at most; takes kept scores to fall as the coefficient grows.",
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

    metric: str | None = key(
        None,
        "Metric to drive down on what is forgotten, or up on what is learned; by kind when not given. Where sets are "
        "of several kinds, that of the first one's kind.",
    )
    kept: tuple[str, ...] | None = later(
        None,
        "Metrics that every retain and utility set must keep, those of them that its kind has ([acc, pmi]); by kind "
        "when not given, and for a set that has none of them.",
        min_length=1,
    )
    keep: Share = key(0.95, "Share of the target model's score that every kept metric must retain.")
    perplexity: AtLeast0 = key(0.5, "For kept metrics that are perplexities: the most they may rise.")
    collapse: Above = key(
        4.0,
        "Nats per token by which a kept set's loss may rise (mcq: an answer counts as three tokens) before the model "
        "counts as collapsed and the coefficient is not chosen, whatever the bounds say.",
    )

    @field_validator("kept")
    @classmethod
    def _in_any_order(cls, kept: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The same metrics are the same recipe."""
        return None if kept is None else tuple(sorted(set(kept)))


class TaskSpec(Frozen):
    """A task that lm-eval ships, or one of the pack in ``eval/``, scored beside the recipe's own data."""

    task: str = Field(
        min_length=1,
        description="Its name in lm-eval (hellaswag, wmdp_bio, ...) or in the pack (unlearn_toxicity, ...).",
    )
    set: Literal["forget", "learn", "retain", "utility"] = key("utility", "What it measures here.")
    metric: str = key("acc", "Which of its metrics counts; others of a pack's task are reported as well.")
    limit: Positive | None = key(None, "Use at most this many items, chosen by the seed.")
    num_fewshot: Count | None = key(None, "Examples in the prompt.")
    metadata: dict[str, Scalar | tuple[Scalar, ...] | dict[str, Scalar | tuple[Scalar, ...]]] = Field(
        default_factory=dict,
        description="Settings of the task, as lm-eval's --metadata takes them; files relative to the current folder.",
    )
    whole: bool = key(
        False,
        "All of its items are test items, and the search does without it; else the seed halves them into validation "
        "and test.",
    )


class EvalSpec(Frozen):
    """How scores are computed."""

    engine: Literal["packed", "hf"] = key(
        "packed", "packed: one row per context with all its answers; hf: lm-eval's own model."
    )
    batch_tokens: Positive | None = key(None, "packed: tokens per forward pass; found when not given.")
    batch_size: Positive = key(16, "hf, and generation: rows per forward pass.")
    bootstrap: Annotated[int, Field(ge=100)] = key(1000, "Resamples for stderr where no formula exists.")
    generate: Literal["none", "test", "sweep"] = key(
        "test", "ROUGE-L of greedy answers (qa, text): test, before and after; sweep, at every coefficient too."
    )
    examples: Count = key(6, "Items per set shown before and after in the report.")
    tasks: tuple[TaskSpec, ...] = key((), "lm-eval's own tasks, and those of the pack.")


class ExportSpec(Frozen):
    """What is handed back."""

    adapter: bool = key(True, "The edit as a PEFT adapter with the coefficient folded in.")
    merged: bool = key(False, "Whole edited weights, in safetensors shards, with the tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "dtype of merged weights.")
    stochastic_rounding: bool = key(
        False, "merged in 16 bits: round up or down by chance, so that small edits survive on average."
    )
    accept_rounding: bool = key(
        False, "merged in 16 bits: write it also where rounding has made another model of it than was scored."
    )
    shard_size: str = key("5GB", "Largest shard of merged weights: 500MB, 5GB.", pattern=r"^\d+(\.\d+)?[KMGT]B$")
    push_to_hub: PushSpec | None = key(None, "Where an export is pushed to; null: nowhere.")

    @model_validator(mode="after")
    def _pushable(self) -> ExportSpec:
        if self.push_to_hub is not None and not getattr(self, self.push_to_hub.what):
            raise ValueError(
                f"push_to_hub wants the {self.push_to_hub.what} export: set {self.push_to_hub.what} to true"
            )
        return self


class ClusterSpec(Frozen):
    """What ``unlearn submit`` asks Slurm for, per job.

    Without Slurm ``gpus``, ``processes`` and ``parallelism`` count.
    """

    partition: str | None = key(None, "Slurm partition; the cluster's own when not given.", min_length=1)
    account: str | None = key(None, "Slurm account.", min_length=1)
    qos: str | None = key(None, "Slurm quality of service.", min_length=1)
    nodes: Positive = key(1, "Machines per job.")
    gpus: Count = key(0, "GPUs per machine.")
    cpus: Positive = key(4, "CPU cores per machine.")
    memory: str | None = key(
        None, "Main memory per machine, 32GB; the cluster's own if none.", pattern=r"^\d+(\.\d+)?[KMGT]B$"
    )
    time: str | None = key(
        None,
        "Longest run before it is stopped and put back in the queue, 4:00:00 or 1-12:00:00.",
        pattern=r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$",
    )
    processes: Positive | None = key(
        None, "Processes per machine that train and score together; one per GPU when not given."
    )
    parallelism: Positive | None = key(
        None,
        "Most jobs at a time; as many as there is room for when not given. --local: as many as there are GPUs for; "
        "without GPUs 1 when not given, and no more than there are cores.",
    )
    requeues: Count = key(100, "How often a job that met its time limit goes back in the queue and goes on from there.")
    grace: Annotated[int, Field(ge=10)] = key(
        120, "Seconds before the time limit at which a run saves where it is and stops."
    )
    setup: tuple[str, ...] = key((), "Shell lines run before a job: modules, environments, variables.")
    extra: dict[str, Scalar] = Field(
        default_factory=dict, description="Further sbatch options by their long names, {constraint: a100}."
    )


# -- names of tasks in lm-eval's files, without importing it: its own index of 14,000 tasks takes ten seconds

# A line of lm-eval's YAML that gives a task, group or tag its name, alone or as an item of a list.
_NAMED = re.compile(
    rb"""^[ \t]*(?:-[ \t]*)?["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s#"'\[\]{}|>]+)""", re.MULTILINE
)
_INCLUDED = re.compile(rb"""^include:[ \t]*["']?(\.\.[^\s"'#]+)""", re.MULTILINE)


def shipped_tasks() -> Path:
    """The folder of the tasks that come with lm-eval."""
    found = importlib.util.find_spec("lm_eval")
    return Path((found.submodule_search_locations or [""])[0] if found is not None else "/nowhere") / "tasks"


def task_files(folder: Path) -> list[str]:
    """The YAML files below a folder, and what they include, which has no ending there."""
    walked = ((at, name) for at, _, names in os.walk(folder) for name in names)
    return [f"{at}/{name}" for at, name in walked if name.endswith(".yaml") or "." not in name]


def task_names(files: Iterable[str]) -> Iterator[str]:
    """What the files call their tasks, groups and tags."""
    for path in files:
        yield from (name.decode(errors="replace") for name in _NAMED.findall(Path(path).read_bytes()))


def unheard_of(files: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the names that no file mentions or is called by."""
    missing = {name: _mention([name]) for name in names}
    for path in map(Path, files):
        if not missing:
            break
        content = path.read_bytes()
        missing = {name: word for name, word in missing.items() if name != path.stem and not word.search(content)}
    return list(missing)


def families(folder: Path, names: Iterable[str]) -> set[Path]:
    """The folders right below ``folder`` that mention one of the names, which may have wildcards (``mmlu_*``).

    And those with files that include one of theirs: they may have a tag from there.
    """
    mention = _mention(names)
    found: set[Path] = set()
    including: set[tuple[Path, Path]] = set()
    for path in map(Path, task_files(folder)):
        family, content = folder / path.relative_to(folder).parts[0], path.read_bytes()
        if family not in found and mention.search(content):
            found.add(family)
        for included in _INCLUDED.findall(content):
            parts = Path(os.path.relpath(path.parent / included.decode(errors="replace"), folder)).parts
            including.add((family, folder / parts[0]))
    while more := {family for family, source in including if source in found} - found:
        found |= more
    return found


def _mention(names: Iterable[str]) -> re.Pattern[bytes]:
    words = "|".join(re.escape(name).replace(r"\*", r"[\w.-]*").replace(r"\?", r"[\w.-]") for name in names)
    return re.compile(rf"(?<![\w.-])(?:{words})(?![\w.-])".encode())


def no_such_task(name: str, known: Iterable[str]) -> EvaluationError:
    """The message about a name in ``eval.tasks`` that is none of those known."""
    names = sorted(known)
    guess = did_you_mean(name, names, 3) or f"; there are {', '.join(names[:8])}, ..."
    return EvaluationError(f"eval.tasks: lm-eval has no task {name!r}{guess}")
