"""The part of a recipe that says what is forgotten and what is kept: sources, splits, prompts, data sets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator

Scalar = bool | int | float | str
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
SetRole = Literal["forget", "learn", "term", "retain", "utility", "holdout"]
Kind = Literal["text", "qa", "mcq"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

DEFAULT_PROMPT: dict[str, str] = {
    "text": "{text}",
    "qa": "Question: {question}\nAnswer:",
    "mcq": "Question: {question}\nAnswer:",
}


class Frozen(BaseModel):
    """A value that is checked when it is made and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def key(default: Any, description: str, **more: Any) -> Any:
    """A field of a recipe that need not be given."""
    return Field(default, description=description, **more)


def later(default: Any, description: str, **more: Any) -> Any:
    """A field that came when runs were finished already: at its default it is not written, so that their keys stay."""
    return key(default, description, exclude_if=lambda value: value == default, **more)


ALSO: dict[str, str] = {}  # what other libraries call a key of a recipe -> what it is called here


def also(name: str, *others: str) -> dict[str, Any]:
    """Options of the field ``name``, which a recipe may also call what other libraries call it."""
    ALSO.update(dict.fromkeys(others, name))
    return {"validation_alias": AliasChoices(name, *others), "json_schema_extra": {"also": list(others)}}


class Between(Frozen):
    """A condition on a column of numbers: strictly above one bound, strictly below the other, or both."""

    above: float | int | None = key(None, "The column must be greater than this.")
    below: float | int | None = key(None, "The column must be less than this.")

    @model_validator(mode="after")
    def _bounded(self) -> Between:
        if self.above is None and self.below is None:
            raise ValueError("give above, below or both")
        return self


class Source(Frozen):
    """Where rows come from."""

    path: str = Field(
        min_length=1,
        description="A .json, .jsonl, .csv, .parquet or .txt file, relative to the recipe or, where nothing is there, "
        "to the current folder; or hub:OWNER/NAME.",
    )
    config: str | None = key(None, "Configuration (subset) of a hub data set.")
    split: str | None = key(None, "Split of a hub data set; train when not given.")
    revision: str | None = key(None, "Revision of a hub data set.")
    rows: tuple[Count, Positive] | None = key(
        None, "Only the rows from the first number up to, and without, the second; counted from 0."
    )
    where: dict[str, Scalar | tuple[Scalar, ...] | Between] = Field(
        default_factory=dict,
        description="Keep only rows whose columns equal (or are among) these values, or lie within {above:, below:}.",
    )
    limit: Positive | None = key(None, "At most this many rows, chosen by the seed.")

    @model_validator(mode="after")
    def _some_rows(self) -> Source:
        if self.rows is not None and self.rows[0] >= self.rows[1]:
            raise ValueError(f"rows [{self.rows[0]}, {self.rows[1]}] has no row in it")
        return self


class SplitShares(Frozen):
    """How one source is divided, by content and seed."""

    train: Share | Literal["all"] = key(
        0.5,
        "Share of the rows trained on. all: every row is trained on, and validation and test divide the same rows "
        "between them; right for memorised content, where what is forgotten is what was trained on.",
    )
    validation: Share = key(0.2, "Share of the rows on which the coefficient is chosen.")
    test: Share = key(0.3, "Share of the rows on which the result is reported.")

    @model_validator(mode="after")
    def _adds_up(self) -> SplitShares:
        total = self.validation + self.test + (0.0 if self.train == "all" else float(self.train))
        if total > 1 + 1e-9:
            raise ValueError(f"shares add up to {total:g}; they must not exceed 1")
        return self


def _well_formed(template: str) -> str:
    template_fields(template)
    return template


def _not_empty(templates: tuple[str, ...]) -> tuple[str, ...]:
    if not templates:
        raise ValueError("the list is empty; give at least one template")
    return templates


Template = Annotated[str, AfterValidator(_well_formed)]
Templates = Annotated[tuple[Template, ...], AfterValidator(_not_empty)]


class SplitPrompts(Frozen):
    """A different phrasing per split, to see whether knowledge went or only one wording of it."""

    train: Template | Templates = Field(description="Template, or several: every row is then trained in each of them.")
    validation: Template = Field(description="Template of the validation items.")
    test: Template = Field(description="Template of the test items.")


class DataSet(Source):
    """A forget, retain or utility set."""

    name: str | None = key(
        None, "Name in reports; the file's name when not given.", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
    )
    kind: Kind = Field(
        description="text (passages), qa (question, answer) or mcq (question, choices, answer). In place of question "
        "and answer rows may have messages, or prompt and completion."
    )
    columns: dict[str, str | tuple[str, ...]] = Field(
        default_factory=dict,
        description="Our field -> your column (text; question, answer, messages, prompt, completion; choices may be a "
        "list of columns).",
    )
    prompt: Template | Templates | SplitPrompts | None = key(
        None, "Template with {column} fields; what the model reads before the answer."
    )
    reverse: Template | None = later(
        None,
        "qa, mcq: a template of the question asked back, of which the answer is a part and the question is the answer "
        "(Which country has the capital {answer}?); test items are scored so too, as NAME@reverse.",
    )
    shares: SplitShares = Field(
        default_factory=SplitShares, description="How the rows are split when no files are given."
    )
    validation: Source | None = key(None, "A file of its own for validation items.")
    test: Source | None = key(None, "A file of its own for test items.")
    length: Positive = key(256, "text: tokens per passage.")
    prefix: Positive = key(32, "text: tokens the model is given before it must go on by itself.")
    prefixes: tuple[Positive, ...] = key(
        (), "text: further lengths of what the model is given; test items are scored at each of them too."
    )
    continuation: Positive = key(
        64, "qa, text: tokens generated for ROUGE-L, and as many of the right answer are compared."
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataSet:
        if self.kind == "text" and self.prefix >= self.length:
            raise ValueError(f"prefix ({self.prefix}) must be shorter than length ({self.length})")
        if self.prefixes and self.kind != "text":
            raise ValueError("prefixes is for passages (kind: text)")
        if self.reverse is not None and (self.kind == "text" or not template_fields(self.reverse)):
            why = "is for questions (kind: qa or mcq)" if self.kind == "text" else "names no column: {answer}, say"
            raise ValueError(f"reverse {why}")
        wrong = [p for p in self.prefixes if p >= self.length or p == self.prefix or self.prefixes.count(p) > 1]
        if wrong:
            raise ValueError(
                f"prefixes: {wrong[0]} must be shorter than length ({self.length}), given once, and not prefix itself"
            )
        return self

    def prompts(self, split: Split) -> tuple[str, ...]:
        """The templates of one split, the default of the kind when the recipe gives none."""
        given = getattr(self.prompt, split) if isinstance(self.prompt, SplitPrompts) else self.prompt
        if given is None:
            return (DEFAULT_PROMPT[self.kind],)
        templates = (given,) if isinstance(given, str) else tuple(given)
        return templates if split == "train" else templates[:1]

    def asked(self, split: Split) -> tuple[str, ...]:
        """The templates of what a user says in a chat template: those of the recipe, else the bare question."""
        return ("{question}",) if self.prompt is None and self.kind != "text" else self.prompts(split)

    def label(self) -> str:
        """Name used in reports, task names and files."""
        if self.name:
            return self.name
        stem = self.path.removeprefix("hub:").rsplit("/", 1)[-1]
        stem = re.sub(r"\.(jsonl?|csv|parquet|txt)$", "", stem)
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.config or stem).strip("-.") or "set"


class UtilitySet(DataSet):
    """A utility set: only scored, unless a share of its rows is to stand beside those of the retain sets."""

    shares: SplitShares = Field(
        default_factory=lambda: SplitShares(train=0.0, validation=0.4, test=0.6),
        description="How the rows are split. Training rows are read beside those of the retain sets (penalty, "
        "baselines, shapers), and never fine-tuned on.",
    )


class HoldoutSet(DataSet):
    """A hold-out set: never trained on and not scored, only compared with the forget set."""

    shares: SplitShares = Field(
        default_factory=lambda: SplitShares(train=0.0, validation=0.0, test=1.0), description="How the rows are split."
    )


# -- prompt templates


_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}]*)\}|[{}]|[^{}]+")


def template_fields(template: str) -> tuple[str, ...]:
    """Return the column names that ``template`` uses, each once, in order of first use."""
    return tuple(dict.fromkeys(text for is_field, text in _parts(template) if is_field))


def render(template: str, row: Mapping[str, object]) -> str:
    """Fill every ``{column}`` of ``template`` with ``str(row[column])``."""
    return "".join(_value(text, row) if is_field else text for is_field, text in _parts(template))


def stops(template: str) -> list[str]:
    """Where an answer may end, besides the end of text: at a line break, and where the next prompt would begin.

    That is the last line of what the template has before its first field; an answer that holds one of these itself
    goes on to the next.
    """
    head = "".join(text for _, text in itertools.takewhile(lambda part: not part[0], _parts(template)))
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    return ["\n", *(f"\n{line}" for line in lines[-1:])]


def _value(name: str, row: Mapping[str, object]) -> str:
    if row.get(name) is None:
        what = f"the column '{name}' is empty in this row" if name in row else f"there is no column '{name}'"
        raise ValueError(f"the prompt uses {{{name}}}, but {what}")
    return str(row[name])


def _parts(template: str) -> Iterator[tuple[bool, str]]:
    """Yield (is a field, its name or the literal text) from left to right."""
    for found in _TOKEN.finditer(template):
        name, text = found["name"], found[0]
        if name is not None:
            if name != name.strip() or not name or set(name) & set(".[!:"):
                raise ValueError(f"the field '{text}' is not the plain name of a column, as {{question}} is")
            yield True, name
        elif text in "{}":
            raise ValueError(f"there is a single '{text}' without its partner; write '{text}{text}' for a literal one")
        else:
            yield False, text[0] if text in ("{{", "}}") else text
