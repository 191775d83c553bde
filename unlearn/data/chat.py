"""Questions in a model's chat template: what the user says, up to where the assistant answers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unlearn.data.items import Item, Messages, Record, Turn
from unlearn.errors import DataError
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.text import shorten

_ASKED, _ANSWER = "QUESTION", "ANSWER"  # stand where a question and an answer will


def template_path(spec: ModelSpec, base: Path) -> Path | None:
    """The file of a recipe's own chat template, if it has one that is there to be read."""
    if spec.chat_template in (None, "auto"):
        return None
    path = base / Path(str(spec.chat_template)).expanduser()
    if not path.is_file():
        raise DataError(f"model.chat_template: there is no file {path}; give one, or auto (the model's own), or none")
    return path


def chat_of(spec: ModelSpec, base: Path, tokenizer: Any) -> Chat | None:
    """The conversations that a recipe asks for, or None where prompts are plain."""
    if spec.chat_template is None:
        return None
    path = template_path(spec, base)
    if path is None and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"model.chat_template: auto: the tokenizer of {spec.path} has no chat template; give a file with one, or "
            "none for plain prompts"
        )
    try:
        text = path.read_text(encoding="utf-8") if path else tokenizer.get_chat_template()
    except (OSError, ValueError) as error:  # of several templates none is the default
        raise DataError(f"model.chat_template: {path or 'auto'} cannot be read: {error}") from error
    return Chat(tokenizer, _dated(text, datetime.date.fromisoformat(spec.date)), spec)


def _dated(template: str, day: datetime.date) -> str:
    """A template whose ``strftime_now`` says a fixed day: transformers' own is the clock, and it takes no other."""
    if "strftime_now" not in template:
        return template
    said = {f"%{form}": day.strftime(f"%{form}") for form in "aAbBdmyYjHIMSp"}
    said |= {f"%-{form}": said[f"%{form}"].lstrip("0") or "0" for form in "dmjHIMS"}
    filters = "".join(f" | replace({form!r}, {text!r})" for form, text in said.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{filters} }}}}{{% endmacro %}}\n{template}"


def unused_template(recipe: Recipe) -> str:
    """What to say of a model with a chat template, if the recipe asks it questions and says nothing of the template."""
    if "chat_template" in recipe.model.model_fields_set or all(spec.kind == "text" for _, spec in recipe.sets()):
        return ""
    return (
        "the model has a chat template and is asked outside it: model.chat_template: auto asks in it, as a chat model "
        "is used; none says that plain prompts are meant"
    )


@dataclass(frozen=True)
class Chat:
    """A tokenizer, a chat template for it, and what every conversation has."""

    tokenizer: Any
    template: str
    spec: ModelSpec

    def item(self, record: Record, plain: str, asked: str) -> Item:
        """A record in the template, the user saying the second of its prompts; the first is its plain wording."""
        outside, (after, joint, ending), target = record.item(plain), self._around, record.target
        words = record.prompts[asked].strip()
        before = (*self._begun(record.context), ("user", words))
        whole = self._render((*before, ("assistant", target))).rstrip()
        prompt = whole.removesuffix(joint + target + ending)
        as_asked = prompt.startswith(self._render(before, answering=True)) and prompt.endswith(words + after)
        if prompt + joint + target + ending != whole or not as_asked:
            raise DataError(
                f"{record.place}: model.chat_template: the template does not write question and answer as they are: "
                f"{shorten(repr(whole), 300)} does not end in {shorten(repr(words + after + joint + target + ending))}"
            )
        return replace(outside, prompt=prompt, turn=Turn(words, after, outside.prompt, joint, ending))

    def asked(self, place: str, question: str, answer: str, context: Messages = ()) -> Item:
        """A question that is no row of a set; messages call it ``place``."""
        return self.item(Record(place, place, "", place, {"": question}, answer.strip(), context=context), "", "")

    @cached_property
    def _around(self) -> tuple[str, str, str]:
        """What stands between question and answer, white space before the answer apart, and what ends it.

        A model that is asked reads the first, which must be how the template has it answered.
        """
        before = (*self._begun(()), ("user", _ASKED))
        prompt, whole = self._render(before, answering=True), self._render((*before, ("assistant", _ANSWER)))
        _, asked, after = prompt.rpartition(_ASKED)
        between, answered, ending = whole.removeprefix(prompt).partition(_ANSWER)
        if not (asked and answered and whole.startswith(prompt)):
            raise DataError(
                "model.chat_template: what the template writes to have a question answered (add_generation_prompt) is "
                f"not how it begins with the answer: {shorten(repr(prompt), 300)}, but {shorten(repr(whole), 300)}"
            )
        thoughts = bool(between.strip())  # an empty thought, which is not what is learned
        return (after + between, "", ending.rstrip()) if thoughts else (after, between, ending.rstrip())

    def _begun(self, context: Messages) -> Messages:
        """A conversation so far, with the recipe's system message where it has none of its own."""
        own = self.spec.system is None or (context and context[0][0] == "system")
        return context if own else (("system", str(self.spec.system)), *context)

    def _render(self, messages: Messages, *, answering: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self.template,
                add_generation_prompt=answering,
                tokenize=False,
                date_string=datetime.date.fromisoformat(self.spec.date).strftime("%d %b %Y"),  # Llama's name and form
            )
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(role for role, _ in messages)
            advice = "; leave model.system out where the template knows no system message" if self.spec.system else ""
            raise DataError(
                f"model.chat_template: the template fails ({roles}): {type(error).__name__}: {error}{advice}"
            ) from error
        return text
