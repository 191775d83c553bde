"""Names and texts from a stranger, wherever a run shows them: page, card, table, terminal, spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import ESCAPES, JINJA, QUOTES, SCRIPT
from reports import Page
from rich.console import Console

from unlearn import console
from unlearn.evidence import boards
from unlearn.recipe.schema import Recipe
from unlearn.report.page import render_html, save_figures
from unlearn.report.publish import CardFacts, card
from unlearn.report.terminal import render_table
from unlearn.results import Chosen, RunReport
from unlearn.text import one_line, visible

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NASTY = f"{SCRIPT}{QUOTES}{ESCAPES}{JINJA}]]>--><!--\u202e&lt;\n---\nowned: true\n"
# What the program itself writes into these places; every other text comes from somebody.
OURS = {"set", "split", "who", "kind", "search", "verdict", "date"}
TRIPLES = {"kept", "goals"}  # of set, name and metric


@pytest.fixture(scope="module")
def plain(compared: Path) -> dict[str, Any]:
    """A report with every part there is."""
    data: dict[str, Any] = json.loads((compared / "run" / "report.json").read_text("utf-8"))
    assert all(data[part] for part in ("foresight", "benchmark", "membership", "robustness", "examples", "exports"))
    data["description"], data["warnings"] = "text", ["text"]
    data["sweep"][-1] |= {"within_bound": False, "broken": ["text"], "collapsed": "text"}
    data["benchmark"]["missing"] = "text"
    for part in (data["vector"], data["exports"], data["provenance"], data["data"][0], data["training"][0]):
        part["text"] = {"text": ["text", 1.5]}
    for part in (data["seconds"], data["foresight"]["kept"][0]["modules"], data["benchmark"]["rows"]["edited"]):
        part["text"] = 0.5
    return data


def spoilt(value: Any, text: str, key: str = "") -> Any:
    """Every text of others, and every key that is one, replaced; equal ones stay equal."""
    if isinstance(value, dict):
        return {(text + k if k == "text" else k): spoilt(v, text, k) for k, v in value.items()}
    if isinstance(value, list) and key in TRIPLES and all(isinstance(v, list) for v in value):
        return [[role, text + name, text + metric] for role, name, metric in value]
    if isinstance(value, list):
        return [spoilt(v, text, key) for v in value]
    return text + value if isinstance(value, str) and key not in OURS else value


def report(plain: dict[str, Any], text: str) -> RunReport:
    data = spoilt(plain, text)
    data["benchmark"]["name"] = plain["benchmark"]["name"]  # one of two
    return RunReport.from_json(data)


def test_nothing_of_others_becomes_markup(plain: dict[str, Any], tmp_path: Path) -> None:
    source = render_html(report(plain, NASTY))
    source.encode("utf-8")  # lone surrogates would fail here
    clean, dirty = Page(render_html(report(plain, ""))), Page(source)
    assert set(dirty.tags) <= {*clean.tags, "ins", "del", "details", "summary"}
    assert not set(dirty.tags) & {"script", "img", "iframe", "object", "embed", "form", "base", "a"}
    assert not [name for _, name, _ in dirty.attributes if name.startswith("on")]
    links = [link for name in ("href", "src", "action", "data", "xlink:href") for link in dirty.values(name)]
    assert all(link.startswith("#") for link in links), "marks of a chart refer to their shape, and nothing else"
    assert dirty.text.count("document.title='owned'") > 100  # it is there, as text
    assert any("<script" in label for label in dirty.values("data-label"))
    assert not {"\x00", "\x1b", "\x9b"} & set(source)
    ids = dirty.values("id")
    assert len(ids) == len(set(ids))
    save_figures(report(plain, NASTY), tmp_path / "figures")
    assert all(path.parent == tmp_path / "figures" for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here to look at the page with")
@pytest.mark.parametrize("policy", [True, False], ids=["as written", "without its policy"])
def test_no_script_runs_in_a_browser(plain: dict[str, Any], tmp_path: Path, policy: bool) -> None:
    text = render_html(report(plain, NASTY))
    if not policy:
        text, count = re.subn(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", text)
        assert count == 1
    page = tmp_path / "report.html"

    def title(content: str) -> str:
        page.write_text(content, encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
        return found[1]

    assert title(text) != "owned"
    if not policy:  # the same text where it is not escaped does run: this check can fail
        assert title(text.replace("</main>", f"{SCRIPT}</main>")) == "owned"


def test_nothing_of_others_moves_the_cursor(plain: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    render_table(report(plain, NASTY), Console(file=out, width=200, force_terminal=False))
    console.say(NASTY)
    with console.progress(NASTY, 3) as advance:
        advance(1)
    for said in (out.getvalue(), capsys.readouterr().err):
        assert said
        assert all(c.isprintable() or c == "\n" for c in said), {c for c in said if not c.isprintable()}


@pytest.mark.parametrize(
    "name", ["a\x1b[2Jb", "a\x9b31mb", "\u202egnp.exe", "a\rb", "a\x00b", "\u2066a", "a\x7fb", "a\ud800b", "a\u2028b"]
)
def test_invisible_characters_are_shown(name: str) -> None:
    assert visible(name).isprintable()
    assert visible(name) != name
    assert visible("é λ 中 \U0001f600 a\u200db\tc\n") == "é λ 中 \U0001f600 a\u200db\tc\n"
    assert one_line("a\n\tb") == "a\\n\\tb"


FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", '=HYPERLINK("http://h")', " =1+1", "\t=1+1", "\r=1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_cell_is_a_formula(name: str) -> None:
    for row in ({"name": name, "privleak": -0.5}, {"Model Utility": -0.5, "Method": name, "Submitted By": name}):
        text = boards.csv_text([row])  # type: ignore[list-item]
        for cell in (cell for line in csv.reader(io.StringIO(text)) for cell in line):
            assert re.fullmatch(r"-?[\d.]+", cell) or not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
        assert name.strip() in text.replace('""', '"')


MARKDOWN = ("---\nlicense: mit\n---", "a: b", "- x", "# x", "![x](http://h/p.png)", "[x](javascript:alert(1))", "`x`")
MARKDOWN += ("```\nx\n```", "| a | b |", "<!-- x", "<details open>", "&#60;script>", "see www.h.com", "a\u2028# b")


@pytest.mark.parametrize("text", [NASTY, SCRIPT, QUOTES, ESCAPES, JINJA, *MARKDOWN], ids=lambda value: repr(value)[:30])
def test_cards_keep_their_form(plain: dict[str, Any], text: str) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "description": text,
            "model": {"path": "m"},
            "forget": {"path": text or "x", "kind": "qa", "name": "f"},
            "eval": {"tasks": ({"task": text, "set": "retain"},)},
        }
    )
    rows = report(plain, text).scores
    for export in ("adapter", "merged"):
        page = card(CardFacts(recipe, Chosen(1.0, True, text, "acc"), rows), export, text)  # type: ignore[arg-type]
        _, header, body = page.split("---\n", 2)
        fields = yaml.safe_load(header)
        assert set(fields) <= {"library_name", "pipeline_tag", "tags", "model-index"}
        assert json.dumps(fields).isprintable()
        table = [line for line in body.splitlines() if line.startswith("|")]
        assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [7] * (2 + len(rows))
        assert [line for line in body.splitlines() if line.startswith("#")].count("# x") == 1
        assert body.count("\n```") == 2
        assert compile(body.split("```python\n")[1].split("\n```")[0], "card", "exec")
        prose = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)
        assert "http://h" not in prose
        assert not re.search(r"<(?!/?(?:br)\b)[a-zA-Z!/]", prose)
        assert not re.search(r"(?<!\\)!?\[[^\]]*[^\\]\]\((?!https://arxiv\.org/)", prose)
        assert not re.search(r"^(---|===|owned:|license:)", body, re.MULTILINE)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", page)
