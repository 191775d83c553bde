"""Model cards that nothing breaks, and exports on their way to the hub, which is a local server here."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from unlearn.recipe.evaluation import PushSpec
from unlearn.recipe.schema import Recipe
from unlearn.report.publish import CardFacts, PushError, card, escape, eval_results, push
from unlearn.results import Chosen, Score, ScoreRow
from unlearn.store.stages import seal


def one(name: str) -> dict[str, Any]:
    return {"path": f"{name}.jsonl", "kind": "mcq", "name": name}


def facts(**more: Any) -> CardFacts:
    sets = {"forget": one("europe"), "retain": (one("asia"),)}
    recipe = Recipe.model_validate({"name": "capitals", "model": {"path": "m"}, **sets, **more})
    rows = (
        ScoreRow("forget", "europe", "test", "acc", True, Score(0.9, 0.05, 40), Score(0.5, 0.08, 40)),
        ScoreRow("retain", "asia", "test", "perplexity", False, Score(8.0, None, 12), Score(8.2, None, 12)),
    )
    return CardFacts(recipe, Chosen(0.75, True, "acc of europe as low as possible, kept >= 95 %", "acc"), rows)


def split(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_a_run_s_exports_have_their_card(compared: Path) -> None:
    folder = compared / "run" / "export" / "adapter"
    header, body = split((folder / "README.md").read_text("utf-8"))
    assert header["library_name"] == "peft"
    assert "# compared" in body
    written = json.loads((folder / "export.json").read_text("utf-8"))
    assert "README.md" in written["files"]
    assert written["bytes"] == sum((folder / name).stat().st_size for name in written["files"])


def test_each_export_has_the_card_of_its_kind(tmp_path: Path) -> None:
    header, body = split(card(facts(), "adapter", "owner/base"))
    assert (header["base_model"], header["library_name"]) == ("owner/base", "peft")
    assert {"unlearning", "task-arithmetic"} <= set(header["tags"])
    assert "PeftModel.from_pretrained(base" in body
    survived = {"cosine": 0.98765, "norm_ratio": 1.0, "changed": 0.5}
    header, body = split(card(facts(), "merged", str(tmp_path), survived))
    assert "base_model" not in header  # a folder is no name on the hub
    assert header["library_name"] == "transformers"
    assert "AutoModelForCausalLM" in body
    assert re.search(r"cosine [01]\.\d{4} ", body)


def test_card_says_what_is_left_and_whether_the_bounds_hold_on_test_items() -> None:
    about = facts()
    kept = (("retain", "asia", "perplexity"),)
    chosen = replace(about.chosen, keep=0.95, perplexity=0.1, kept=kept, goals=(("forget", "europe", "acc"),))
    told = ScoreRow("forget", "europe", "test", "pmi", True, Score(8.0, 0.1, 40), Score(6.6, 0.1, 40))
    about = replace(about, chosen=chosen, scores=(replace(about.scores[0], chance=0.25), about.scores[1], told))
    body = split(card(about, "adapter", "owner/base"))[1]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert rows[2].startswith(
        "| forget | europe | test | acc ↑ (chance 0.25) | 0.900 ± 0.098 (n=40) | 0.500 ± 0.157 (n=40) |"
    )
    assert "perplexity ↓ | 8.000 (n=12)" in rows[3]
    for words in (
        "- What came of it, on the items of the table below: The model still answers 50 % of what it was asked to "
        "forget, where guessing would give 25 %: europe accuracy fell from 0.90 to 0.50.",
        "- Whether it is forgotten: europe is suppressed: 82 % of what ties its answers to their own prompts is left "
        "(8.00 to 6.60 nats; forgotten is 20 % or less).",
        "(met on validation items; on test items not by retain asia perplexity)",
        "Chance is what guessing scores.",
        "Unlearning is not deletion",
    ):
        assert words in body
    assert "asia (retain)" in body
    named = replace(facts(choose={"kept": ("acc", "pmi")}), chosen=replace(chosen, kept=(("retain", "asia", "pmi"),)))
    assert "asia (retain by pmi)" in split(card(named, "adapter", "owner/base"))[1]
    roomy = replace(chosen, perplexity=0.5)
    body = card(replace(about, chosen=roomy, scores=about.scores[:2]), "adapter", "owner/base")
    assert "(met on validation items)" in body
    assert "Whether it is forgotten" not in body


def test_card_gives_the_scores_to_the_hub(tmp_path: Path) -> None:
    """Read back by the hub's own library, as the hub does when a card is pushed."""
    about = facts()
    path = tmp_path / "README.md"
    path.write_text(card(about, "adapter", "owner/base"), encoding="utf-8")
    data = ModelCard.load(path).data
    assert isinstance(data, ModelCardData)
    assert (data.model_name, data.base_model, data.library_name) == ("capitals", "owner/base", "peft")
    assert data.eval_results == eval_results(about.recipe, about.scores)
    forget, retain = data.eval_results
    assert (forget.task_type, forget.dataset_type, forget.dataset_split) == ("text-generation", "europe", "test")
    assert (forget.dataset_name, forget.metric_type, forget.metric_value) == ("europe (forget set)", "accuracy", 0.5)
    assert forget.metric_name == "acc (lower is more forgotten)"
    assert (retain.metric_type, retain.metric_value) == ("perplexity", 8.2)
    assert retain.metric_name == "perplexity (lower is better)"
    # and what the library writes from it is the header again
    header, _ = split(path.read_text("utf-8"))
    assert data.to_dict()["model-index"] == header["model-index"]
    assert "model-index" not in split(card(replace(about, scores=()), "adapter", "owner/base"))[0]


def test_no_two_sets_are_one_to_the_hub() -> None:
    """The library puts scores of equal type, configuration and split under one name."""
    half = {"path": "hub:owner/data", "config": "x", "kind": "mcq"}
    about = facts(
        forget={**half, "name": "one"},
        retain=({**half, "name": "two"}, {**half, "name": "one"}, {"path": "a.jsonl", "kind": "mcq", "name": "a_b"}),
        eval={"tasks": ({"task": "a b", "set": "utility"}, {"task": "a?b", "set": "utility"})},
    )
    keys = [("forget", "one"), ("retain", "two"), ("retain", "one"), ("retain", "a_b"), ("utility", "a b")]
    keys += [("utility", "a?b"), ("forget", "one")]
    rows = [
        ScoreRow(role, name, "test", f"m{i}", True, Score(0, None, 1), Score(i / 8, None, 1))  # type: ignore[arg-type]
        for i, (role, name) in enumerate(keys)
    ]
    results = eval_results(about.recipe, rows)
    assert [r.metric_value for r in results] == [i / 8 for i in range(7)]
    assert [(r.dataset_type, r.dataset_config) for r in results] == [
        ("owner/data", "x"),
        ("owner/data", "x-retain-two"),
        ("owner/data", "x-retain-one"),
        ("a_b", None),
        ("a-b", None),
        ("a-b", "utility-a-b"),
        ("owner/data", "x"),
    ]
    again = ModelCard(card(replace(about, scores=tuple(rows)), "adapter", "owner/base")).data.eval_results
    assert sorted(again, key=lambda r: r.metric_value) == results


def test_what_the_hub_would_refuse_is_not_in_the_card() -> None:
    """Its server asks more than its client: data sets' types of certain characters, numbers that are finite."""
    about = facts()
    one = Score(0.5, None, 1)
    rows = [
        ScoreRow("utility", name, "test", "acc", True, one, one) for name in (NASTY, "", "ünï/côde/x", "a/b", "...")
    ]
    results = eval_results(about.recipe, [*rows, *(replace(rows[0], after=Score(v, None, 1)) for v in (NAN, -INF))])
    assert len(results) == len(rows)
    for r in results:
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", r.dataset_type, re.ASCII)
        assert r.dataset_name.isprintable()
        assert r.dataset_name.strip()


def said_of(**more: Any) -> list[str]:
    """The facts of a card, without the mark-up of underscores."""
    body = split(card(facts(**more), "adapter", "owner/base"))[1]
    return [line.removeprefix("- ").replace("\\_", "_") for line in body.splitlines() if line.startswith("- ")]


@pytest.mark.parametrize(
    ("vector", "edit", "words"),
    [
        ({}, "θ − λτ", []),
        ({"method": "contrast", "mu": 0.5}, "θ − λ(τ_f − 0.5 τ_r)", ["contrast: "]),
        ({"method": ("project", "rescale")}, "θ − λ rescale(project(τ_f))", ["project: ", "rescale: "]),
        ({"method": "npo"}, "θ − λ(θ − θ_npo)", ["npo: a baseline"]),
    ],
)
def test_card_says_how_the_vector_was_made(vector: dict[str, Any], edit: str, words: list[str]) -> None:
    told = said_of(vector=vector)
    assert f"Edit: {edit} with λ = 0.75" in told
    made = [line for line in told if line.startswith("How the vector was made: ")]
    assert len(made) == len(words)
    assert all(word in line for word, line in zip(words, made, strict=True))


def test_card_of_several_requests() -> None:
    told = said_of(also_forget=(one("americas"),))
    assert "Asked to forget: europe, americas" in told
    assert "Edit: θ − λ(w_europe τ_europe + w_americas τ_americas) with λ = 0.75" in told
    assert any("found together" in line for line in told)
    assert "several sets of data" in card(facts(also_forget=(one("americas"),)), "adapter", "b")


def test_card_of_addition_and_analogy() -> None:
    about = facts(forget=None, learn=(one("africa"), one("asia-2")))
    header, body = split(card(about, "adapter", "owner/base"))
    assert "unlearning" not in header["tags"]
    assert "task-arithmetic" in header["tags"]
    assert "- Asked to learn: africa, asia-2" in body
    assert "Asked to forget" not in body
    assert "then added" in body
    assert "θ + λ(w\\_africa τ\\_africa + w\\_asia-2 τ\\_asia-2)" in body
    both = said_of(learn=(one("africa"),))
    assert "Edit: θ − λ(w_europe τ_europe − w_africa τ_africa) with λ = 0.75" in both
    terms = {name: one(f"t{name}") for name in "abc"}
    body = card(facts(forget=None, learn=(one("d"),), analogy=terms), "adapter", "owner/base").replace("\\_", "_")
    assert "θ + λ(τ_tc + τ_tb − τ_ta)" in body
    assert "ta is to tb as tc is to d, and only the first three were learned" in body
    assert "(term)" not in body


NAN, INF = float("nan"), float("inf")
NASTY = "x | y\n---\n# <script>alert(1)</script> `code` [a](http://e.vil) *b* \\ \x07 $x$ \u2028 ```\nlicense: mit"


@pytest.mark.parametrize("line", ["# a", "- a", "+ a", "> a", "1. a", "2) a", "=== a", "| a"])
def test_line_starts_are_plain_text(line: str) -> None:
    assert not re.match(r"\s*([#+>=|-]|\d+[.)])", escape(line))
    assert escape("phi-1.5 by a/b: 95 %") == "phi-1.5 by a/b: 95 %"


# -- to the hub

TOKEN = "not-a-real-one-and-of-no-known-form"
FILES = {
    "README.md": b"---\ntags: []\n---\n# x\n",
    "adapter_config.json": b"{}\n",
    "adapter_model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}" + b"0" * 1190,
}
SPEC = PushSpec(repo="owner/name")
DRY = PushSpec(repo="owner/name", dry_run=True)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A finished adapter export, as a run leaves it."""
    return write(tmp_path / "run" / "export" / "adapter", FILES)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in {**files, "export.json": b"{}"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    seal(folder, "key", 0.1)
    return folder


def test_a_dry_run_lists_exactly_what_would_go(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(export, DRY) is None
    assert capsys.readouterr().err.splitlines() == [
        "would push to owner/name (a private model repository, made if there is none): 3 files, 1.2 kB",
        "  README.md                  21 bytes",
        "  adapter_config.json        3 bytes",
        "  adapter_model.safetensors  1.2 kB",
    ]
    push(export, PushSpec(repo="owner/name", private=False, dry_run=True))
    assert "a public model repository" in capsys.readouterr().err


def test_whole_weights_go_with_their_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"x", "modeling_own.py": b"pass\n"}
    folder = write(tmp_path / "merged", files)
    spec = PushSpec(repo="owner/name", what="merged", dry_run=True)
    push(folder, spec)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()[1:]] == sorted(files)
    with pytest.raises(PushError, match=r"no adapter export: adapter_config\.json, adapter_model\.safetensors is not"):
        push(folder, DRY)
    with pytest.raises(PushError, match=r"no merged export: \*\.safetensors is not there"):
        push(write(tmp_path / "none", {"config.json": b"{}"}), spec)


def link(export: Path) -> None:
    (export / "adapter_config.json").rename(export.parent / "elsewhere.json")
    (export / "adapter_config.json").symlink_to(export.parent / "elsewhere.json")


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda e: (e / "stage.json").unlink(), r"not a finished export .* export\.adapter: true"),
        (lambda e: e.rename(e.with_name("x")), "not a finished export"),
        # as long as before
        (
            lambda e: (e / "adapter_config.json").write_bytes(b"[]\n"),
            r"content of adapter_config\.json has changed",
        ),
        (lambda e: (e / "notes.txt").write_text("mine"), r"files that the run did not write: notes\.txt"),
        (link, r"links are not pushed.*: adapter_config\.json"),
    ],
)
def test_an_export_that_is_not_as_the_run_left_it(export: Path, harm: Callable[[Path], object], why: str) -> None:
    harm(export)
    with pytest.raises(PushError, match=why):
        push(export, DRY)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_model.bin", "pickles"),
        ("old/weights.PT", "pickles"),
        ("trainer_state.json", "the state of a training"),
        ("checkpoint-12/adapter_config.json", "the state of a training"),
        (".env", "hidden files or secrets"),
        ("token", "hidden files or secrets"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_files_that_must_not_go(tmp_path: Path, export: Path, name: str, why: str, sealed: bool) -> None:
    if sealed:  # even where the run itself wrote it
        export = write(tmp_path / "again", {**FILES, name: b"x"})
    else:
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_bytes(b"x")
    with pytest.raises(PushError, match=f"holds {why}.*: {re.escape(name)}. They are not pushed"):
        push(export, DRY)


def test_without_a_token_and_offline(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, "  "):
        if given:
            monkeypatch.setenv("HF_TOKEN", given)
        with pytest.raises(PushError, match="no token: set HF_TOKEN"):
            push(export, SPEC)
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # found: the next question is asked
    with pytest.raises(PushError, match=r"going online is forbidden .* owner/name") as caught:
        push(export, SPEC)
    assert TOKEN not in str(caught.value)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks: making a repository, how to upload, the commit; refusals by status."""

    seen: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path.partition("?")[0], self.headers.get("Authorization", ""), body))
        where = f"http://127.0.0.1:{self.server.server_address[1]}/owner/name"
        if self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            if name == "gone":
                self.close_connection = True
            elif name.isdigit():
                self.answer({"error": f"no, {TOKEN}"}, int(name))  # a hub that tells on its users
            else:
                self.answer({"url": where, "name": "owner/name", "id": "0"})
        elif "/preupload/" in self.path:
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{where}/commit/0123", "commitOid": "0123", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.seen.append((self.path.partition("?")[0], self.headers.get("Authorization", ""), b""))
        status = next((int(part) for part in self.path.split("/") if part in REFUSALS), 200)
        self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []}, status)

    do_HEAD = do_GET  # noqa: N815 (the base class calls it by this name)

    def answer(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


REFUSALS = {
    "401": "the hub does not accept the token for owner/401 (401)",
    "403": "the token may not write to owner/403 (403)",
    "400": "the hub refused owner/400 (400)",
    "gone": "the hub cannot be reached for owner/gone",
}
CODE = """
import sys
from pathlib import Path
from unlearn.report.publish import PushError, push
from unlearn.recipe.evaluation import PushSpec
for name in sys.argv[2:]:
    try:
        print("pushed", push(Path(sys.argv[1]), PushSpec(repo=f"owner/{name}")))
    except PushError as error:
        print("error", error)
"""


def test_what_the_hub_gets_and_what_is_said_where_it_refuses(export: Path) -> None:
    """In a process of its own: the client reads whether it may go online once, when it is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub, home = f"http://127.0.0.1:{server.server_port}", export.parent / "home"
    env = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HOME": str(home)}
    env |= {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-c", CODE, str(export), "name", *REFUSALS]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    server.shutdown()
    thread.join()
    server.server_close()
    assert done.returncode == 0, done.stderr
    first, *refused = done.stdout.splitlines()
    assert first == f"pushed {hub}/owner/name/commit/0123"
    assert done.stderr == f"pushed 3 files to owner/name: {hub}/owner/name/commit/0123\n"
    for line, words in zip(refused, REFUSALS.values(), strict=True):
        assert line.startswith(f"error export.push_to_hub: {words}: ")
    assert TOKEN not in done.stdout + done.stderr
    assert not [p for p in home.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert {login for _, login, _ in _Hub.seen} == {f"Bearer {TOKEN}"}
    made = next(json.loads(body) for path, _, body in _Hub.seen if path == "/api/repos/create")
    assert (made["name"], made.get("organization")) == ("name", "owner")
    assert made.get("private") is True or made.get("visibility") == "private"  # as the client's version has it
    got: dict[str, bytes] = {}
    for path, _, body in _Hub.seen:
        if path == "/api/models/owner/name/commit/main":
            entries = [json.loads(line) for line in body.splitlines()]
            got |= {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
    assert got == FILES
