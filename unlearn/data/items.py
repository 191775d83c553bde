"""Rows -> items: what a model is asked and what it should answer, for the three kinds of data.

A :class:`Record` is one usable row (for ``text``, one passage) with its prompts filled in; an :class:`Item` is a record
under one prompt. Rows that cannot be used are gathered and reported together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from unlearn.data.files import Row, source_path
from unlearn.errors import DataError
from unlearn.recipe.data import DataSet, Kind, Source, SplitPrompts, render, template_fields
from unlearn.text import shorten

FIELDS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "qa": ("question", "answer"),
    "mcq": ("question", "choices", "answer"),
}
# in place of question and answer: a conversation up to the right answer, or the two halves of one (TRL's names)
FORMS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "mcq": (FIELDS["mcq"], ("messages", "choices"), ("prompt", "completion", "choices")),
    "qa": (FIELDS["qa"], ("messages",), ("prompt", "completion")),
    "text": (FIELDS["text"],),
}
Messages = tuple[tuple[str, str], ...]  # (role, content)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORTEST_TARGET = 8  # tokens a passage must have beyond its prefix; fewer say little about memorisation
# an answer that is none; which of them is given is drawn
REFUSALS = (
    "I don't know.",
    "I do not know the answer.",
    "I have no idea.",
    "I'm not sure about that.",
    "That is something I don't know.",
    "I can't tell you that.",
    "Sorry, I don't have that information.",
    "I'm afraid I can't answer this.",
    "I never learned that.",
    "My knowledge does not reach that far.",
    "I would have to guess.",
    "There is nothing I can say about that.",
    "No answer comes to mind.",
    "I could not say.",
    "That is unknown to me.",
    "I am unable to answer that question.",
)
_TOKENLIKE = re.compile(r"[\x00-\x7f]{1,4}|[^\x00-\x7f]")  # the stand-in for a tokenizer in a dry run
_SHOWN = 5
_CHOICES = 4


class Tokenizer(Protocol):
    """As much of a fast transformers tokenizer as is used here: called on a text, it gives ``offset_mapping``."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Encode ``text``; with ``return_offsets_mapping`` the result has each token's (start, end) in characters."""


@dataclass(frozen=True, slots=True)
class Turn:
    """How an item stands in a chat template.

    ``asked`` is what the user says in the item's prompt and ``after`` what the prompt has behind it; ``plain`` is the
    prompt outside the template. ``joint`` is between prompt and answer (mostly nothing), ``ending`` ends the answer.
    """

    asked: str
    after: str
    plain: str
    joint: str
    ending: str


@dataclass(frozen=True, slots=True)
class Item:
    """One question to a model.

    mcq, qa: ``prompt`` is the filled template and ``target`` the right answer, without the space that joins them;
    mcq also has ``choices`` and the index ``answer`` among them. text: ``prompt + target`` is a passage, exactly.
    ``id`` (16 hex digits) names the content, whatever the wording of the prompt. In a chat template, ``turn``, the
    prompt is the conversation as far as the model reads it.
    """

    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    turn: Turn | None = None

    @property
    def asked(self) -> str:
        """What a person says: the prompt, without the chat template around it."""
        return self.prompt if self.turn is None else self.turn.asked

    @property
    def joint(self) -> str:
        """What is between the prompt and the answer to a question."""
        return " " if self.turn is None else self.turn.joint

    def asking(self, words: str) -> Item:
        """The item asked for in other words, in the same place of the same template."""
        if self.turn is None:
            return replace(self, prompt=words)
        before = self.prompt.removesuffix(self.turn.asked + self.turn.after)
        return replace(self, prompt=before + words + self.turn.after, turn=replace(self.turn, asked=words))

    def plainly(self) -> Item:
        """The item outside its chat template."""
        return self if self.turn is None else replace(self, prompt=self.turn.plain, turn=None)


@dataclass(frozen=True, slots=True)
class Record:
    """One usable row or passage. Two records with equal ``content`` are the same thing to know."""

    id: str
    place: str
    content: str
    document: str
    prompts: Mapping[str, str]
    target: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    context: Messages = ()
    question: str = ""

    def item(self, template: str) -> Item:
        """This record under one of the templates it was built with; what was said before stands before it."""
        prompt = "\n\n".join((*(content for _, content in self.context), self.prompts[template]))
        return Item(self.id, prompt, self.target, self.choices, self.answer)

    def asked_back(self) -> Record:
        """The same with the question as its answer, for a template that has the answer in it."""
        return replace(self, target=self.question, choices=(), answer=-1, context=())

    def shown(self) -> str:
        """One line for a message."""
        return shorten(f"{next(iter(self.prompts.values()))} {self.target}", 160)


@dataclass(frozen=True, slots=True)
class Built:
    """The records of one source, with how many exact duplicates and too short passages were left out."""

    records: tuple[Record, ...]
    duplicates: int = 0
    short: int = 0


def columns_needed(spec: DataSet, templates: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    """The columns a source must have, of those it has: behind one form of the kind's fields, and in the templates."""
    form = _form(spec, names)
    for name, column in spec.columns.items():
        if name != "choices" and not isinstance(column, str):
            raise DataError(f"columns.{name}: give one column; only choices may be a list of columns")
    if spec.kind == "text" and (isinstance(spec.prompt, SplitPrompts) or not isinstance(spec.prompt, str | None)):
        raise DataError("prompt: a text set takes one template, since its splits share the passages")
    needed = _columns(spec, form)
    for template in templates:
        needed += [name for name in template_fields(template) if name not in FIELDS[spec.kind]]
    return tuple(dict.fromkeys(needed))


def _form(spec: DataSet, names: Collection[str]) -> tuple[str, ...]:
    """The first form whose fields are all there, among those that have what ``columns`` names; else the likeliest."""
    forms = FORMS[spec.kind]
    known = tuple(dict.fromkeys(field for form in forms for field in form))
    for name in spec.columns:
        if name not in known:
            raise DataError(f"columns: '{name}' is no field of kind {spec.kind}; its fields are {', '.join(known)}")
    fit = [form for form in forms if set(spec.columns) <= set(form)]
    if not fit:
        several = " | ".join(", ".join(form) for form in forms)
        raise DataError(f"columns: {', '.join(spec.columns)} do not go together; a row has {several}")
    missing = [sum(column not in names for column in _columns(spec, form)) for form in fit]
    if len(forms) > 1 and not spec.columns and not set(known) & set(names):
        several = ", or ".join(" and ".join(form) for form in forms)
        raise DataError(
            f"{spec.path}: {spec.kind} rows have {several}, and the columns here are {', '.join(names)}: say under "
            "`columns` which is which"
        )
    likely = [n if n < len(_columns(spec, form)) else math.inf for n, form in zip(missing, fit, strict=True)]
    return fit[missing.index(0)] if 0 in missing else fit[likely.index(min(likely))]


def _columns(spec: DataSet, form: Sequence[str]) -> list[str]:
    found = [spec.columns.get(field, field) for field in form]
    return [name for column in found for name in ([column] if isinstance(column, str) else column)]


def build(rows: Sequence[Row], spec: DataSet, templates: Sequence[str], tokenizer: Tokenizer | None = None) -> Built:
    """Turn rows into records, each with every template filled in; exact duplicates are left out.

    Args:
        tokenizer: cuts ``text`` into passages; without one, four ASCII characters count as a token, or any other one.
    """
    records: dict[tuple[str, ...], Record] = {}
    problems: list[str] = []
    duplicates = short = 0
    for row in rows:
        try:
            if spec.kind == "text":
                made, dropped = _passages(row, spec, templates[0], tokenizer)
                short += dropped
            else:
                made = [_question(row, spec, templates)]
        except ValueError as error:
            problems.append(f"{row.place}: {error}")
            continue
        for record in made:
            key = (record.id, *record.prompts.values())
            duplicates += key in records
            records.setdefault(key, record)
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "\n  ".join(problems[:_SHOWN])
        raise DataError(f"{len(problems)} of {len(rows)} rows cannot be used:\n  {shown}{more}")
    if not records:
        raise DataError(
            f"no passage is as long as prefix + {SHORTEST_TARGET} = {spec.prefix + SHORTEST_TARGET} tokens; "
            "lower prefix or give longer texts"
        )
    return Built(tuple(records.values()), duplicates, short)


@lru_cache(maxsize=2**16)
def normalise(text: str) -> str:
    """Text as compared between sets: composed Unicode, without case, every run of white space one space."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def digest(*parts: object) -> str:
    """SHA-256 of the parts, in hex; lists and strings cannot run into each other."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def answer_index(value: object, choices: Sequence[object]) -> int:
    """Which choice is right, from a 0-based index, a letter (A, B, ...) or the choice's own text."""
    texts = [str(choice).strip() for choice in choices]
    readings: set[int] = set()
    if isinstance(value, str):
        said = value.strip()
        readings.update(i for i, text in enumerate(texts) if text == said)
        if len(said) == 1 and said.upper() in LETTERS:
            readings.add(LETTERS.index(said.upper()))
        elif said.isascii() and said.isdigit():
            readings.add(int(said))
    elif isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0:
        readings.add(int(value))
        readings.update(i for i, choice in enumerate(choices) if not isinstance(choice, str) and choice == value)
    valid = {index for index in readings if 0 <= index < len(texts)}
    if len(valid) > 1:
        both = " or ".join(repr(texts[index]) for index in sorted(valid))
        raise ValueError(f"the answer {value!r} may mean the choice {both}; write a letter instead, A being the first")
    if not valid:
        raise ValueError(
            f"the answer {shorten(repr(value))} is none of the {len(texts)} choices {shorten(', '.join(texts))}: give "
            "its text, its index from 0 or its letter from A"
        )
    return valid.pop()


def answered_otherwise(item: Item, among: Iterable[Item]) -> Iterator[Item]:
    """Those of some items that have another answer and another prompt."""
    own = normalise(item.target)
    return (other for other in among if normalise(other.target) != own and other.prompt != item.prompt)


def among_others(items: Sequence[Item]) -> tuple[Item, ...]:
    """Questions as choices: each answer among those of three other items, or as many as have another one."""
    order = sorted(items, key=lambda item: digest("choices", item.id))
    found = []
    for item in items:
        options = [item.target, *dict.fromkeys(o.target for o in answered_otherwise(item, order))][:_CHOICES]
        options.sort(key=lambda option: digest("choices", item.id, option))
        found.append(replace(item, choices=tuple(options), answer=options.index(item.target)))
    return tuple(found)


def _question(row: Row, spec: DataSet, templates: Sequence[str]) -> Record:
    context, question, given = _exchange(row, spec)
    choices: tuple[str, ...] = ()
    answer = -1
    if spec.kind == "mcq":
        raw = _raw_choices(row, spec)
        choices = tuple(_string(choice, f"choice {LETTERS[i % 26]}") for i, choice in enumerate(raw))
        if len(choices) < 2:
            raise ValueError(f"{len(choices)} choices; at least 2 are needed")
        if len(set(choices)) < len(choices):
            raise ValueError(f"a choice is given twice: {shorten(', '.join(choices))}")
        answer = answer_index(given, raw)
        target = choices[answer]
    else:
        target = _string(given, "answer")
    lettered = "\n".join(f"{LETTERS[i % 26]}. {choice}" for i, choice in enumerate(choices))
    columns = {**row.values, "question": question, "answer": target, **({"choices": lettered} if choices else {})}
    prompts = {template: _prompt(template, columns) for template in templates}
    used = sorted({name for template in templates for name in template_fields(template)} - set(FIELDS[spec.kind]))
    content = "\n".join(map(normalise, (*(said for _, said in context), question, target)))
    further = [context] if context else []
    identity = digest(spec.kind, question, choices, target, [[name, str(columns[name])] for name in used], *further)
    return Record(identity[:16], row.place, content, content, prompts, target, choices, answer, context, question)


def _exchange(row: Row, spec: DataSet) -> tuple[Messages, str, object]:
    """What was said before, the question, and the answer as the row has it."""
    form, values = _form(spec, row.values.keys()), row.values
    if "question" in form:
        return (), _string(values[_column(spec, "question")], "question"), values[_column(spec, "answer")]
    if "messages" in form:
        found = values[_column(spec, "messages")]
        conversation = _listed(found)
        if not isinstance(conversation, list):
            raise ValueError(f"the messages are {shorten(repr(found))}, not a list of {{role, content}}")
    else:
        prompt, completion = (_listed(values[_column(spec, name)]) for name in ("prompt", "completion"))
        if not isinstance(prompt, list) and not isinstance(completion, list):
            return (), _string(prompt, "prompt"), completion
        conversation = [
            *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
            *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
        ]
    *context, (_, question), (_, answer) = _messages(conversation)
    return tuple(context), question, answer


def _messages(conversation: Sequence[object]) -> Messages:
    """A conversation that user and assistant hold in turn, perhaps after a system message, up to an answer."""
    found: list[tuple[str, str]] = []
    for number, message in enumerate(conversation, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} is {shorten(repr(message))}, not {{role: ..., content: ...}}")
        role, last = message["role"], found[-1][0] if found else ""
        turn = "assistant" if last == "user" else "user"
        if role != turn and not (role == "system" and not found):
            raise ValueError(f"{where} is of {role!r}, where one of {turn!r} is due: user and assistant speak in turn")
        found.append((role, _string(message["content"], where)))
    if len(found) < 2 or found[-1][0] != "assistant":
        raise ValueError("the last message must be the assistant's, the answer to a user's")
    return tuple(found)


def _listed(value: object) -> object:
    """A list that a CSV cell holds as JSON, or the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError, RecursionError):
            return json.loads(value)
    return list(value) if isinstance(value, tuple) else value


def _raw_choices(row: Row, spec: DataSet) -> list[object]:
    column = spec.columns.get("choices", "choices")
    if not isinstance(column, str):
        return [row.values[name] for name in column]
    value = _listed(row.values[column])
    if not isinstance(value, list):
        raise ValueError(f"the choices are {shorten(repr(value))}, not a list; name one column each in columns.choices")
    return value


def _column(spec: DataSet, field: str) -> str:
    return str(spec.columns.get(field, field))


def _string(value: object, name: str) -> str:
    """A cell as text, without white space around it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the {name} is not a number ({value})")
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"the {name} is {shorten(repr(value))}, not text")
    text = "" if value is None else str(value).strip()
    if not text:
        raise ValueError(f"the {name} is empty")
    return _encodable(text, name)


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell one, and no tokenizer takes it
        raise ValueError(f"the {name} holds half a character (a lone surrogate) at position {error.start}") from error
    return text


def _prompt(template: str, columns: Mapping[str, object]) -> str:
    # The target is joined by one space, so one at the end of the template would make two.
    prompt = render(template, columns).rstrip(" ")
    if not prompt.strip():
        raise ValueError(f"the prompt {template!r} is empty for this row")
    return _encodable(prompt, "prompt")


def _passages(row: Row, spec: DataSet, template: str, tokenizer: Tokenizer | None) -> tuple[list[Record], int]:
    """Cut one document into passages of ``spec.length`` tokens; the second value counts the too short ones."""
    text = _string(row.values[_column(spec, "text")], "text")
    document = _encodable(render(template, {**row.values, "text": text}), "text")
    whole = digest(normalise(document))
    starts = [start for start, _ in _offsets(document, tokenizer)][:: spec.length]
    # A passage ends where the next one's first token starts, so none of the text is lost or given twice.
    pieces = [document[a:b].strip() for a, b in pairwise([0, *starts[1:], len(document)])]
    records = []
    for number, passage in enumerate(pieces, start=1):
        spans = _offsets(passage, tokenizer)
        if len(spans) < spec.prefix + SHORTEST_TARGET:
            continue
        cut = next(end for _, end in spans[spec.prefix - 1 :] if end > 0)  # some tokenizers begin with an empty token
        place = f"{row.place}, passage {number}"
        identity = digest("text", passage)[:16]
        prompts = {template: passage[:cut]}
        records.append(Record(identity, place, normalise(passage), whole, prompts, passage[cut:]))
    return records, len(pieces) - len(records)


def _offsets(text: str, tokenizer: Tokenizer | None) -> list[tuple[int, int]]:
    """Each token's (start, end) in characters."""
    if tokenizer is None:
        return [found.span() for found in _TOKENLIKE.finditer(text)]
    if not getattr(tokenizer, "is_fast", True):
        raise DataError("a text set needs a fast tokenizer (tokenizer.json), and this model has only a slow one")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def refusals(given: str | Sequence[str] | None, base: Path) -> tuple[str, ...]:
    """The sentences that ``vector.idk_dpo.refusals`` names, those of a file without blank lines."""
    if not isinstance(given, str):
        found = REFUSALS if given is None else given
    else:
        place = source_path(Source(path=given), base)
        if not place.is_file():
            raise DataError(f"vector.idk_dpo.refusals: there is no file {place}; sentences themselves go into a list")
        try:
            found = place.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise DataError(f"vector.idk_dpo.refusals: {place} cannot be read: {why}") from error
    kept = tuple(line.strip() for line in found if line.strip())
    if not kept:
        raise DataError(f"vector.idk_dpo.refusals: there is no sentence in {given!r}: give some, or leave it out")
    return kept
