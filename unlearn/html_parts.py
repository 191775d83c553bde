"""The parts of the HTML report that show what was run on what: examples, data, training, times, provenance."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unlearn.charts import sparkline
from unlearn.markup import Child, Raw, el, join
from unlearn.report import Example, RunReport
from unlearn.report_text import CAVEAT
from unlearn.wording import MISSING, duration, file_size, number

_DIFF_WORDS = 1500  # beyond this a word-by-word comparison is slow and nobody reads it
_HASH = re.compile(r"(sha256:)?[0-9a-f]{24,}")
_LIST_SHOWN = 12
_PROMPT_SHOWN = 480  # characters


def section(title: str, split: str | None, intro: str | None, *children: Child) -> Raw:
    """One part of the page. ``split`` is shown beside the title: which items its numbers are from."""
    chip = el("span", f"{split} items", class_="chip") if split else None
    return el("section", el("h2", title, chip), el("p", intro, class_="intro") if intro else None, children)


def scroll(label: str, child: Raw) -> Raw:
    """A box that scrolls sideways by itself, so that the page never does."""
    return el("div", child, class_="scroll", tabindex="0", role="region", aria_label=label)


def warning_list(lines: Sequence[str]) -> Raw | None:
    """Warnings in a box that is hard to overlook; None without any."""
    if not lines:
        return None
    return el("ul", [el("li", line, dir="auto") for line in lines], class_="warnings", role="note")


def footer() -> Raw:
    """What the numbers do not promise."""
    where = "All numbers of this page are in report.json beside it; the recipe that made them is resolved.yaml."
    return el("footer", el("p", el("b", "What this does not show. "), CAVEAT), el("p", where))


def examples_section(report: RunReport) -> Raw | None:
    """Answers before and after, grouped by set, changed words marked."""
    if not report.examples:
        return None
    groups: dict[tuple[str, str], list[Example]] = {}
    for example in report.examples:
        groups.setdefault((example.set, example.name), []).append(example)
    parts = []
    for (role, name), found in groups.items():
        changed = sum(_squash(e.before) != _squash(e.after) for e in found)
        count = el("span", f"{role} · {changed} of {len(found)} changed", class_="count")
        head = el("tr", [el("th", h, scope="col") for h in ("Prompt", "Right answer", "Before", "After")])
        table = el("table", el("thead", head), el("tbody", [_example(e) for e in found]), class_="examples reflow")
        parts.append(el("div", el("h3", el("i", class_=f"pip {role}"), name, count, dir="auto"), table, class_="panel"))
    intro = "The same items asked before and after. ✓ marks a right answer; changed words are marked."
    return section("In the model's words", "test", intro, parts)


def _example(example: Example) -> Raw:
    before, after = changes(example.before, example.after)
    ticks = [_tick(answer, example.target) for answer in (example.before, example.after)]
    cells: list[tuple[str, Child, str]] = [
        ("Prompt", _folded(example.prompt), "prompt"),
        ("Right answer", example.target, "target"),
        ("Before", join(before, ticks[0]), "answer"),
        ("After", join(after, ticks[1]), "answer"),
    ]
    return el("tr", [el("td", el("div", child, class_="text", dir="auto"), class_=kind, data_label=head)
                     for head, child, kind in cells])  # fmt: skip


def _folded(prompt: str) -> Child:
    """A long prompt behind its end, which is what the answer follows."""
    if len(prompt) <= _PROMPT_SHOWN:
        return prompt
    end = prompt[-_PROMPT_SHOWN // 2 :]
    return el("details", el("summary", f"… {end[end.find(' ') + 1 :].lstrip()}"), prompt)


def changes(before: str, after: str) -> tuple[Raw, Raw]:
    """Both texts with the words that differ marked: ``<del>`` in the first, ``<ins>`` in the second."""
    if before == after:
        return join(before or MISSING), el("span", after or MISSING, class_="same")
    old, new = (re.findall(r"\S+\s*|\s+", value) for value in (before, after))
    if max(len(old), len(new)) > _DIFF_WORDS:
        return _mark("del", old), _mark("ins", new)
    left: list[Child] = []
    right: list[Child] = []
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in old], [w.strip() for w in new], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        left.append(old[i:j] if tag == "equal" else _mark("del", old[i:j]))
        right.append(new[k:m] if tag == "equal" else _mark("ins", new[k:m]))
    return join(left) or Raw(MISSING), join(right) or Raw(MISSING)


def _mark(tag: str, words: Sequence[str]) -> Raw:
    """Words in one marked span, the space behind them outside it."""
    whole = "".join(words)
    core = whole.rstrip()
    return join(el(tag, core) if core else None, whole[len(core) :])


def _tick(answer: str, target: str) -> Raw | None:
    right = _squash(target) and _squash(answer) == _squash(target)
    return el("span", " ✓", class_="tick-mark", title="the right answer") if right else None


def _squash(value: str) -> str:
    return " ".join(value.split()).casefold().rstrip(".")


def data_section(report: RunReport) -> Raw | None:
    """Which rows were used for what, one line per set."""
    if not report.data:
        return None
    return section("Data", None, "Rows per set and how they were divided.", mapping_table(report.data, "Data per set"))


def making_section(report: RunReport) -> Raw | None:
    """Training, the vector, what was exported, times and provenance."""
    times = {key: value for key, value in report.seconds.items() if key != "total"}
    parts: list[Child] = []
    if report.training:
        parts += [el("h3", "Training"), mapping_table(report.training, "Training runs")]
    boxes = []
    for title, mapping in (("Task vector", report.vector), ("Exports", report.exports)):
        if mapping:
            boxes.append(el("div", el("h3", title), tree(mapping), class_="panel"))
    if times:
        boxes.append(el("div", el("h3", "Time per stage"), _bars(times), class_="panel"))
    parts.append(el("div", boxes, class_="boxes") if boxes else None)
    if report.provenance:
        inner = el("details", el("summary", "Provenance"), tree(report.provenance), class_="panel")
        parts.append(inner)
    return section("How it was made", None, None, parts) if any(parts) else None


def _bars(times: Mapping[str, float]) -> Raw:
    longest = max((v for v in times.values() if math.isfinite(v)), default=0) or 1
    lines = []
    for name, value in times.items():
        width = 100 * max(value, 0) / longest if math.isfinite(value) else 0
        bar = el("span", el("span", style=f"width:{width:.1f}%"), class_="bar")
        lines.append(
            el("li", el("span", label_of(name), class_="stage"), bar, el("span", duration(value), class_="time"))
        )
    return el("ul", lines, class_="bars")


def mapping_table(rows: Sequence[Mapping[str, Any]], label: str) -> Raw:
    """Mappings as a table: a column per key in order of appearance, lists of numbers as a tiny line."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {k for k in keys if all(_is_number(row[k]) for row in rows if k in row)}
    head = el("tr", [el("th", label_of(k), scope="col", class_="num" if k in numeric else None) for k in keys])
    body = [
        el(
            "tr",
            [
                el("td", _cell(k, row.get(k)), class_="num" if k in numeric else None, data_label=label_of(k))
                for k in keys
            ],
        )
        for row in rows
    ]
    table = el("table", el("thead", head), el("tbody", body), class_="generic")
    return el("div", scroll(label, table), class_="panel")


def _cell(key: str, value: Any) -> Raw:
    series = _losses(value)
    if len(series) > 2:
        return sparkline(series)
    if isinstance(value, str) and _HASH.fullmatch(value):
        return el("code", f"{value.removeprefix('sha256:')[:10]}…", title=value)
    return _entry(key, value)


def _losses(value: Any) -> list[float]:
    """The numbers of ``[2.1, 1.9]``, of ``[[step, 2.1], …]`` and of ``[{"loss": 2.1}, …]``; empty for anything else."""
    if not isinstance(value, (list, tuple)):
        return []
    flat: list[Any] = [
        v.get("loss") if isinstance(v, Mapping) else v[-1] if isinstance(v, (list, tuple)) and v else v for v in value
    ]
    return [float(v) for v in flat] if all(_is_number(v) for v in flat) else []


def tree(value: Mapping[str, Any]) -> Raw:
    """A nested mapping as nested definition lists."""
    pairs = []
    for key, inner in value.items():
        nested = _entry(str(key), inner)
        pairs.append(el("div", el("dt", label_of(key)), el("dd", nested, dir="auto"),
                        class_="nested" if isinstance(inner, Mapping) and inner else None))  # fmt: skip
    return el("dl", pairs)


def _entry(key: str, value: Any) -> Raw:
    if isinstance(value, int) and not isinstance(value, bool) and (key == "bytes" or key.endswith("_bytes")):
        return join(file_size(value))
    if _is_number(value) and (key == "seconds" or key.endswith("_seconds")):
        return join(duration(float(value)))
    return plain(value)


def plain(value: Any) -> Raw:
    """Any JSON value for people: yes/no, – for nothing, long lists folded."""
    if value is None or value == "":
        return Raw(MISSING)
    if isinstance(value, bool):
        return Raw("yes" if value else "no")
    if isinstance(value, float):
        return join(f"{value:.6g}".replace("-", "−") if math.isfinite(value) else number(value))
    if isinstance(value, Mapping):
        return tree(value) if value else Raw(MISSING)
    if isinstance(value, Iterable) and not isinstance(value, str):
        items = [plain(item) for item in value]
        if not items:
            return Raw(MISSING)
        shown = join(items[0], [join(", ", item) for item in items[1:]])
        if len(items) <= _LIST_SHOWN:
            return shown
        return el("details", el("summary", f"{len(items)} items"), shown)
    if isinstance(value, str) and _HASH.fullmatch(value):
        return el("code", value)
    return join(str(value))


def label_of(key: object) -> str:
    """``loss_first`` as ``Loss first``."""
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
