"""Model cards: the README.md of an export, with the metadata the model hub reads.

Names, descriptions and paths come from the user: whatever they hold, the header stays valid YAML and the table a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from unlearn.card_results import model_index
from unlearn.formula import GREEK, formula, phrases
from unlearn.metrics import KEPT
from unlearn.provenance import tidy
from unlearn.recipe import Recipe
from unlearn.report import Chosen, ScoreRow
from unlearn.report_figures import rows_of_goals, verdict_of, with_margin
from unlearn.report_text import CAVEAT, chance_of, outcome
from unlearn.wording import coefficient, listing, percent

Export = Literal["adapter", "merged"]
_TAGS = ["unlearning", "machine-unlearning", "task-arithmetic", "lm-unlearn"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LINE_START = re.compile(r"^([#+>=-]|\d+(?=[.)]))")
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beside what the export itself knows.

    ``license`` is the hub's identifier (``mit``, ``apache-2.0``); None leaves the field to the user.
    """

    recipe: Recipe
    chosen: Chosen
    scores: tuple[ScoreRow, ...]
    license: str | None = None


def card(facts: CardFacts, export: Export, base_name: str, survived: Mapping[str, Any] | None = None) -> str:
    """The README.md of an export.

    Args:
        facts: What was run and what came of it.
        export: A PEFT adapter, or whole weights.
        base_name: What the model was made from: a hub id, or a path.
        survived: For merged weights, what ``export_merged`` says under this name.
    """
    recipe = facts.recipe
    parts = [
        _header(facts, export, base_name),
        f"# {escape(recipe.name)}",
        escape(tidy(recipe.description)),
        _summary(facts, export, base_name),
        "## Scores",
        _table(facts),
        "## How to load it",
        _loading(export, base_name),
        *(["## What the number format kept of the edit", _survived(survived)] if survived else []),
        "## What this does not promise",
        CAVEAT,
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def escape(text: str) -> str:
    """Any text as one line of Markdown that shows just that text, in a table cell too."""
    line = _BREAKS.sub(" ", text.encode("utf-8", "replace").decode("utf-8")).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    # addresses become links without any markup, and some characters count at the start of a line only
    line = re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", line)
    return _LINE_START.sub(lambda m: f"&#8203;{m[1]}", line)


def _header(facts: CardFacts, export: Export, base_name: str) -> str:
    """The YAML the hub reads. A base that is no hub id is left out: the hub refuses a card with a wrong one."""
    on_hub = _HUB_ID.fullmatch(base_name) is not None and not Path(base_name).exists()
    index = model_index(facts.recipe, facts.scores)
    fields: dict[str, Any] = {
        **({"base_model": base_name} if on_hub else {}),
        **({"base_model_relation": "adapter" if export == "adapter" else "finetune"} if on_hub else {}),
        "library_name": "peft" if export == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS if facts.recipe.forget is not None else _TAGS[2:],
        **({"license": facts.license} if facts.license else {}),
        **({"model-index": index} if index else {}),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---"


def _summary(facts: CardFacts, export: Export, base_name: str) -> str:
    recipe, chosen = facts.recipe, facts.chosen
    kept = [f"{escape(d.label())} ({role})" for role, d in recipe.sets() if role in KEPT]
    kept += [f"{escape(t.task)} ({t.set})" for t in recipe.eval.tasks if t.set in KEPT]
    change = formula(recipe, GREEK).replace("_", chr(92) + "_")
    what = "A LoRA adapter" if export == "adapter" else "Whole weights"
    goals = {
        word: [escape(d.label()) for r, d in recipe.goals() if r == role]
        for word, role in (("Asked to forget", "forget"), ("Asked to learn", "learn"))
    }
    more = phrases(recipe.vector)
    came = outcome(rows_of_goals(chosen, facts.scores))
    met = "met on validation items" if chosen.bound_met else "not met by any λ > 0"
    if chosen.bound_met and (out := [r for r in facts.scores if verdict_of(chosen, chosen.kept, r) is False]):
        met += f"; on test items not by {listing(f'{r.set} {r.name} {r.metric}' for r in out)}"
    if len(recipe.goals()) > 1:
        more = (*more, "the weights w were found together, on validation items")
    return "\n".join(
        [
            f"{what} meant to make {escape(tidy(base_name))} {_how(recipe)}",
            "",
            *(f"- {word}: {', '.join(names)}" for word, names in goals.items() if names),
            *([f"- What came of it, on the items of the table below: {escape(came)}."] if came else []),
            f"- Measured as kept: {', '.join(kept) or 'nothing was measured'}",
            f"- Edit: {change} with λ = {coefficient(chosen.coefficient)}",
            *(f"- How the vector was made: {escape(phrase)}" for phrase in more),
            f"- How λ was chosen: {escape(chosen.rule)} ({escape(met)})",
        ]
    )


def _how(recipe: Recipe) -> str:
    """What the edit does to the model, and by which operation."""
    cited = "by task arithmetic ([Ilharco et al., 2022](https://arxiv.org/abs/2212.04089))"
    if recipe.analogy is not None:
        names = [escape(d.label()) for d in (recipe.analogy.a, recipe.analogy.b, recipe.analogy.c)]
        return (
            f"do what it was not trained to do {cited}: {names[0]} is to {names[1]} as {names[2]} is to "
            f"{escape(recipe.learn[0].label())}, and only the first three were learned."
        )
    many = len(recipe.goals()) > 1
    some = "several sets of data" if many else "a set of data"
    towards = f"a vector towards {'each' if many else 'the data'} is learned"
    if not recipe.learn:
        return f"forget {some} {cited}: {towards}, then subtracted."
    if recipe.forget is None:
        return f"know {some} {cited}: {towards}, then added."
    return f"forget and learn {some} {cited}: {towards}, then subtracted or added."


def _table(facts: CardFacts) -> str:
    if not facts.scores:
        return "No scores were recorded."
    lines = ["| set | data | split | metric | before | after |", "|---|---|---|---|---|---|"]
    for r in facts.scores:
        metric = f"{escape(r.metric)} {'↑' if r.higher_is_better else '↓'}"
        metric += chance_of(r.chance, " ({})")
        cells = (r.set, escape(r.name), escape(r.split), metric, _score(r, "before"), _score(r, "after"))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "± is half a 95 % confidence interval, n the number of items; ↑ higher is better, ↓ lower is better."]
    lines[-1] += " Chance is what guessing scores." if any(r.chance is not None for r in facts.scores) else ""
    return "\n".join(lines)


def _score(row: ScoreRow, when: Literal["before", "after"]) -> str:
    score = row.before if when == "before" else row.after
    return f"{with_margin(score)} (n={score.n})"


def _loading(export: Export, base_name: str) -> str:
    # repr: a name with quotes stays one Python string, and no line of it can close the fence
    if export == "merged":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```'
        )
    base = repr(_BREAKS.sub(" ", tidy(base_name)))
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({base})\n```\n\n"
        "λ and the minus sign are folded into the factors, which are float32. Used beside the weights like this, the "
        "edit is exact; `merge_and_unload()` into 16-bit weights rounds away part of it."
    )


def _survived(survived: Mapping[str, Any]) -> str:
    cosine, ratio = survived.get("cosine"), survived.get("norm_ratio")
    if cosine is None or ratio is None:
        return "The edit is zero."
    return (
        f"Rounding to the stored number format left an edit with cosine {cosine:.4f} to the intended one and "
        f"{ratio:.4f} times its norm; {percent(survived['changed'])} of the elements it touches differ from those of "
        "the unedited model in the same format."
    )
