"""The part of a recipe that says how the result is compared and attacked: benchmark, retain reference, robustness."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from unlearn.recipe_data import Frozen, Positive

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


class BenchmarkSpec(Frozen):
    """A published benchmark, scored through its tasks in ``eval/``: target, edited model and retain reference."""

    name: Literal["tofu", "muse"] = Field(description="tofu (2401.06121) or muse (2407.06460).")
    set: str = Field(description="tofu: forget01, forget05 or forget10; muse: news or books.")
    path: str | None = Field(
        None, description="A local folder with its files, relative to the recipe; from the hub when not given."
    )
    items: Positive | None = Field(
        None, description="Only the first so many items of every set (the authors' TOFU logs have 300)."
    )
    tag: Literal["prompt", "scored"] = Field(
        "prompt",
        description="tofu: whether the words 'Answer:' are part of the prompt or, as in the authors' logs of Phi-1.5, "
        "of what is scored.",
    )
    max_tokens: Positive | None = Field(None, description="Tokens generated for ROUGE-L; the benchmark's own if none.")

    @model_validator(mode="after")
    def _known(self) -> BenchmarkSpec:
        if self.set not in _SETS[self.name]:
            near = get_close_matches(self.set, _SETS[self.name], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{self.name} has no set {self.set!r}; it has {', '.join(_SETS[self.name])}{meant}")
        return self


class RelearnSpec(Frozen):
    """Fine-tuning the edited model for a few steps: how fast does it come back? (2406.13356)"""

    items: Positive = Field(8, description="Forget items trained on; they are not among those scored, where possible.")
    steps: tuple[Positive, ...] = Field((1, 2, 5, 10, 20), min_length=1, description="Steps after which it is scored.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="Of the relearning (AdamW, constant).")
    batch_size: Positive = Field(4, description="Rows per step.")
    unrelated: bool = Field(True, description="Relearn on utility texts as well, which have nothing of it in them.")


class RobustnessSpec(Frozen):
    """Attacks on the result: how much of what was forgotten comes back."""

    items: Positive = Field(48, description="Forget items of the test split that the attacks are scored on, at most.")
    quantize: tuple[Quantised, ...] = Field(
        ("nf4", "int8"), description="Quantised copies that are scored (2410.16454); needs bitsandbytes."
    )
    relearn: RelearnSpec | None = Field(default_factory=RelearnSpec, description="Relearning curves; null: none.")
    probes: tuple[Probe, ...] = Field(
        ("paraphrase", "prefix", "few_shot", "template"),
        description="Other ways to ask: reworded, after a text that sets the scene, after solved examples from the "
        "retain sets, and under templates in other languages.",
    )
    samples: Annotated[int, Field(ge=0)] = Field(
        8, description="Continuations sampled per item; the best one counts. 0: none are sampled."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Of the sampling.")
    lens: bool = Field(True, description="Read the answer off every hidden layer (logit lens).")


class PushSpec(Frozen):
    """What goes to the model hub. The token comes from the environment (HF_TOKEN) and from nowhere else."""

    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", description="OWNER/NAME on the hub.")
    what: Literal["adapter", "merged"] = Field("adapter", description="Which export is pushed.")
    private: bool = Field(True, description="Whether a new repository is private.")
    dry_run: bool = Field(False, description="Say what would be pushed, and push nothing.")

    @field_validator("repo")
    @classmethod
    def _nameable(cls, repo: str) -> str:
        """The hub's own rules: what it refuses is better known before the training."""
        if len(repo.rpartition("/")[2]) > 96 or "--" in repo or ".." in repo or repo.endswith((".git", "-", ".")):
            raise ValueError(
                f"the hub takes no name like {repo!r}: at most 96 characters after OWNER/, no -- and no .. in it, and "
                "no -, . or .git at its end"
            )
        return repo
