"""Hub ids: downloaded before, out of reach, refused. In their own processes: the client reads its settings once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unlearn.hub import condensed

CODE = """
import sys
from pathlib import Path
from unlearn.errors import ModelError
from unlearn.fetch import locate
from unlearn.recipe import ModelSpec
spec = ModelSpec.model_validate({"path": "owner/name", "device": "cpu"})
try:
    where = locate(spec, Path())
    print("found", where)
    if "load" in sys.argv:
        from unlearn.models import load
        print(type(load(spec, where).model).__name__)
except ModelError as error:
    print("error", error)
"""


def _run(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, env=env, check=True)


class _Refusing(BaseHTTPRequestHandler):
    """A hub that knows nobody."""

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815 (the base class calls it by this name)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloaded_before_and_offline_now(pico_phi: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(pico_phi, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = _run(tmp_path, "load", UNLEARN_OFFLINE="1")
    assert done.stdout.splitlines() == ["found owner/name", "PhiForCausalLM"]
    assert done.stderr == ""


def test_the_hub_refuses(tmp_path: Path, refusing: str) -> None:
    done = _run(tmp_path, HF_ENDPOINT=refusing)
    start = "error model.path: owner/name is neither a local folder nor to be had from the model hub: 401"
    assert done.stdout.startswith(start)
    assert done.stdout.endswith("model.path also takes a local folder with the model in safetensors\n")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.slow
def test_the_hub_is_out_of_reach(tmp_path: Path) -> None:
    done = _run(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # the discard port: nobody listens
    assert done.stdout.startswith("error model.path: owner/name is neither a local folder")
    assert done.stderr == ""


def test_long_messages_are_cut() -> None:
    assert condensed(ValueError("a\n  b.")) == "a b"
    assert condensed(ValueError()) == "ValueError"
    assert len(condensed(ValueError("x" * 1000))) == 303
