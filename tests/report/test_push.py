"""Exports on their way to the hub: what goes, what must not, and what the user is told. The hub is a local server."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from unlearn.recipe.evaluation import PushSpec
from unlearn.report.publish import Pushed, PushError, push
from unlearn.store.stages import seal

TOKEN = "not-a-real-one-and-of-no-known-form"
FILES = {
    "README.md": b"---\ntags: []\n---\n# x\n",
    "adapter_config.json": b"{}\n",
    "adapter_model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}" + b"0" * 1190,
}
SPEC = PushSpec(repo="owner/name")


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


# -- what goes ---------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_exactly_what_would_go(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = push(export, SPEC, dry_run=True)
    sizes = tuple((name, len(content)) for name, content in FILES.items())
    assert done == Pushed("owner/name", True, sizes, None)
    assert capsys.readouterr().err.splitlines() == [
        "would push to owner/name (a private model repository, made if there is none): 3 files, 1.2 kB",
        "  README.md                  21 bytes",
        "  adapter_config.json        3 bytes",
        "  adapter_model.safetensors  1.2 kB",
    ]


def test_the_recipe_may_ask_for_a_dry_run_and_for_a_public_repository(export: Path) -> None:
    done = push(export, PushSpec(repo="owner/name", private=False, dry_run=True))
    assert done.url is None
    assert "a public model repository" in done.lines()[0]


def test_whole_weights_go_with_their_code(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"x", "modeling_own.py": b"pass\n"}
    folder = write(tmp_path / "merged", files)
    spec = PushSpec(repo="owner/name", what="merged", dry_run=True)
    assert [name for name, _ in push(folder, spec).files] == sorted(files)
    with pytest.raises(PushError, match=r"no adapter export: adapter_config\.json, adapter_model\.safetensors is not"):
        push(folder, SPEC, dry_run=True)
    with pytest.raises(PushError, match=r"no merged export: \*\.safetensors is not there"):
        push(write(tmp_path / "none", {"config.json": b"{}"}), spec)


# -- what must not go --------------------------------------------------------------------------------------------


def test_an_export_that_is_not_finished(tmp_path: Path, export: Path) -> None:
    with pytest.raises(PushError, match=r"not a finished export .* export\.adapter: true"):
        push(tmp_path / "nothing", SPEC, dry_run=True)
    (export / "stage.json").unlink()
    with pytest.raises(PushError, match="not a finished export"):
        push(export, SPEC, dry_run=True)


def test_an_export_that_was_changed(export: Path) -> None:
    (export / "adapter_config.json").write_bytes(b"[]\n")  # as long as before
    with pytest.raises(PushError, match=r"the content of adapter_config\.json has changed .*; run the recipe again"):
        push(export, SPEC, dry_run=True)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("pytorch_model.bin", b"x", "pickles"),
        ("old/weights.PT", b"x", "pickles"),
        ("harmless.txt", pickle.dumps({"a": 1}), "pickles"),
        ("harmless", b"PK\x03\x04 and so on", "pickles"),
        ("trainer_state.json", b"{}", "the state of a training"),
        ("checkpoint-12/adapter_config.json", b"{}", "the state of a training"),
        (".env", b"A=b", "hidden files or secrets"),
        ("token", b"hf_x", "hidden files or secrets"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_files_that_must_not_go(
    tmp_path: Path, export: Path, name: str, content: bytes, why: str, sealed: bool
) -> None:
    if sealed:  # even where the run itself wrote it
        export = write(tmp_path / "again", {**FILES, name: content})
    else:
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_bytes(content)
    with pytest.raises(PushError) as caught:
        push(export, SPEC, dry_run=True)
    assert f"holds {why}" in str(caught.value)
    assert f": {name}. They are not pushed" in str(caught.value)


def test_a_file_of_someone_else(export: Path) -> None:
    (export / "notes.txt").write_text("mine")
    with pytest.raises(PushError, match=r"files that the run did not write: notes\.txt"):
        push(export, SPEC, dry_run=True)


def test_links(export: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_bytes((export / "adapter_config.json").read_bytes())
    (export / "adapter_config.json").unlink()
    (export / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PushError, match=r"links are not pushed.*: adapter_config\.json"):
        push(export, SPEC, dry_run=True)


def test_safetensors_that_begin_like_a_pickle(tmp_path: Path) -> None:
    header = (0x0280).to_bytes(8, "little")  # the length of the header: 640 bytes
    folder = write(tmp_path / "a", {**FILES, "adapter_model.safetensors": header + b"{}"})
    assert len(push(folder, SPEC, dry_run=True).files) == 3


# -- the hub -----------------------------------------------------------------------------------------------------


def test_no_token(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PushError, match="no token: set HF_TOKEN"):
        push(export, SPEC)
    monkeypatch.setenv("HF_TOKEN", "  ")
    with pytest.raises(PushError, match="no token: set HF_TOKEN"):
        push(export, SPEC)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_offline(export: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, TOKEN)  # found: the next question is asked
    with pytest.raises(PushError, match=r"going online is forbidden .* owner/name") as caught:
        push(export, SPEC)
    assert TOKEN not in str(caught.value)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks: making a repository, how to upload, the commit."""

    refusal: ClassVar[int] = 0
    seen: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.path.partition("?")[0], self.headers.get("Authorization", ""), body))
        where = f"http://127.0.0.1:{self.server.server_address[1]}/owner/name"
        if self.refusal:
            self.answer({"error": f"no, {TOKEN}"}, self.refusal)  # a hub that tells on its users
        elif self.path.endswith("/repos/create"):
            self.answer({"url": where, "name": "owner/name", "id": "0"})
        elif "/preupload/" in self.path:
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{where}/commit/0123", "commitOid": "0123", "success": True})
        elif self.path.endswith("/validate-yaml"):
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": "no such page"}, 404)

    def do_GET(self) -> None:
        self.seen.append((self.path.partition("?")[0], self.headers.get("Authorization", ""), b""))
        if self.path.startswith("/api/models/owner/name"):
            self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []}, self.refusal or 200)
        else:
            self.answer({"error": "no such page"}, 404)

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


@pytest.fixture
def hub() -> Iterator[str]:
    _Hub.refusal, _Hub.seen = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


CODE = """
import sys
from pathlib import Path
from unlearn.report.publish import PushError, push
from unlearn.recipe.evaluation import PushSpec
try:
    print("pushed", push(Path(sys.argv[1]), PushSpec(repo="owner/name"), endpoint=sys.argv[2]).url)
except PushError as error:
    print("error", error)
"""


def pushed(export: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads whether it may go online once, when it is imported."""
    home = export.parent / "home"
    env = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HOME": str(home)}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(export), hub], capture_output=True, text=True, env=env, check=True
    )
    assert TOKEN not in done.stdout + done.stderr
    kept = [p for p in home.rglob("*") if p.is_file()] if home.exists() else []
    assert not [p for p in kept if TOKEN.encode() in p.read_bytes()]
    shutil.rmtree(home, ignore_errors=True)
    return done


def test_what_the_hub_gets(export: Path, hub: str) -> None:
    done = pushed(export, hub)
    assert done.stdout == f"pushed {hub}/owner/name/commit/0123\n"
    assert f"pushed 3 files to owner/name: {hub}/owner/name/commit/0123" in done.stderr
    assert {login for _, login, _ in _Hub.seen} == {f"Bearer {TOKEN}"}
    made = [json.loads(body) for path, _, body in _Hub.seen if path == "/api/repos/create"]
    assert [(m["name"], m.get("organization")) for m in made] == [("name", "owner")]
    assert made[0].get("private") is True or made[0].get("visibility") == "private"  # as the client's version has it
    got: dict[str, bytes] = {}
    for path, _, body in _Hub.seen:
        if path == "/api/models/owner/name/commit/main":
            entries = [json.loads(line) for line in body.splitlines()]
            got |= {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
    assert got == FILES


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the hub does not accept the token for owner/name (401)"),
        (403, "the token may not write to owner/name (403)"),
        (400, "the hub refused owner/name (400)"),
    ],
)
def test_the_hub_refuses(export: Path, hub: str, status: int, words: str) -> None:
    _Hub.refusal = status
    done = pushed(export, hub)
    assert done.stdout.startswith(f"error export.push_to_hub: {words}: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_the_hub_is_out_of_reach(export: Path) -> None:
    done = pushed(export, "http://127.0.0.1:9")  # the discard port: nobody listens
    assert done.stdout.startswith("error export.push_to_hub: the hub cannot be reached for owner/name: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
