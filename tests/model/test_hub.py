"""Hub ids: downloaded before, out of reach, refused. In their own processes: the client reads its settings once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CODE = """
import os, sys
from pathlib import Path
from unlearn.errors import UnlearnError
from unlearn.model.locate import locate
from unlearn.recipe.schema import ModelSpec
spec = ModelSpec.model_validate({"path": "owner/name", "device": "cpu"})
try:
    where = locate(spec, Path())
    print("found", where)
    if "load" in sys.argv:
        from unlearn.model.load import load
        print(type(load(spec, where).model).__name__)
        os.environ["UNLEARN_OFFLINE"] = "1"
        print(type(load(spec, where).model).__name__)
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from unlearn.score.packed import PackedLM
        # transformers puts an adapter that comes with a model on it unasked, and drops what does not fit
        lora = LoraConfig(r=2, target_modules=["fc1"], task_type="CAUSAL_LM")
        print("the library's own words", file=sys.stderr)
        get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[2]), lora).save_pretrained(sys.argv[2])
        PackedLM("owner/name")
except UnlearnError as error:
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


NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens


def test_the_hub_refuses_or_is_out_of_reach(tmp_path: Path, refusing: str) -> None:
    done = _run(tmp_path, HF_ENDPOINT=refusing)
    start = "error model.path: owner/name is neither a local folder nor to be had from the model hub: 401"
    assert done.stdout.startswith(start)
    assert done.stdout.endswith("A local folder with safetensors is taken as well\n")
    away = _run(tmp_path, HF_ENDPOINT=NOBODY)
    assert away.stdout.startswith("error model.path: there is no folder owner/name here, no such model in the hub's")
    assert f"and the hub ({NOBODY}) cannot be reached: " in away.stdout
    assert [(one.stdout.count("\n"), one.stderr) for one in (done, away)] == [(1, "")] * 2


def test_downloaded_before_and_offline_or_out_of_reach_now(pico_phi: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    shutil.copytree(pico_phi, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = _run(tmp_path, "load", str(repository / "snapshots" / commit), HF_ENDPOINT=NOBODY)
    *found, error = done.stdout.splitlines()
    assert found == ["found owner/name", *["PhiForCausalLM"] * 2]
    assert error.startswith("error pretrained=owner/name is an adapter, or holds one")
    assert done.stderr.startswith("the library's own words\n")


def _away(home: Path, endpoint: str) -> dict[str, str]:
    """An environment in which the hub is there, and nothing of it was ever downloaded."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
    told = {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "UNLEARN_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    return kept | told | {"NO_PROXY": "127.0.0.1"}


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


GIVEN = {
    "model.path=microsoft/phi-1_5": "error: model.path: there is no folder microsoft/phi-1_5 here",
    "forget.path=hub:owner/data": "error: hub:owner/data: it is not on this machine",
    "retain.0.path=hub:owner/data": "error: hub:owner/data: it is not on this machine",
    "reference=owner/model": "error: reference: there is no folder owner/model here",
}


@pytest.mark.parametrize("nobody", [True, False])
def test_a_run_says_so_before_it_begins(tmp_path: Path, nobody: bool, silent: str) -> None:
    """Without the imports of a run, which take longer, and without the hub client's half a minute of retries."""
    rows = [{"question": f"Who is {n}?", "answer": f"{n}."} for n in range(30)]
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = {
        "name": "x",
        "model": {"path": "pico:phi", "device": "cpu"},
        "forget": {"kind": "qa", "path": "forget.jsonl"},
        "retain": [{"kind": "qa", "path": "retain.jsonl"}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = "import sys; from unlearn.cli import main\n"
    code += (
        "answers = [main(['run', sys.argv[1], given, '--out', f'out{n}']) for n, given in enumerate(sys.argv[2:])]\n"
    )
    code += "print(*answers, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")]
    endpoint = NOBODY if nobody else silent
    done = subprocess.run(
        [*command, *GIVEN],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "env": _away(tmp_path, endpoint), "timeout": 60},
        check=False,
    )
    assert done.stdout == "2 2 2 2 False\n"
    messages = done.stderr.splitlines()[1::2]  # the other lines name the run
    for message, said in zip(messages, GIVEN.values(), strict=True):
        assert message.removeprefix("error: ").removeprefix("--set ").startswith(said.removeprefix("error: "))
        assert f"the hub ({endpoint}) cannot be reached: " in message


def test_data_of_lm_evals_tasks_out_of_reach(pico_phi: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shipped" / "far"
    folder.mkdir(parents=True)
    (folder / "far.yaml").write_text(
        "task: far\ndataset_path: owner/data\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    code = (
        "import sys; from pathlib import Path; from unlearn.errors import EvaluationError\n"
        "from unlearn import cli; from unlearn.score import tasks\n"
        "from unlearn.recipe.evaluation import TaskSpec\n"
        "folder = sys.argv[1]\n"
        "tasks.SHIPPED = Path(folder).parent\n"
        "try: tasks.load(TaskSpec.model_validate({'task': 'far', 'set': 'utility', 'metric': 'acc'}), 0, '')\n"
        "except EvaluationError as e: print(e)\n"
        "for pretrained in sys.argv[2:]:\n"
        "    line = ['--model', 'unlearn', '--model_args', 'pretrained=' + pretrained, '--tasks', 'far']\n"
        "    assert cli.main(['harness', *line, '--include_path', folder]) == 2\n"
    )
    command = [sys.executable, "-c", code, str(folder), "owner/name", str(pico_phi)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=_away(tmp_path, NOBODY), timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"eval.tasks: the data of 'far' are not on this machine, and the hub ({NOBODY}) can")
    for said in (
        "error: pretrained=owner/name: there is no such folder, nothing of it in the hub's cache, and",
        "error: the data of the tasks are not all on this machine, and the hub (",
    ):
        assert done.stderr.count(said) == 1
    assert done.stderr.count("error:") == 2
    assert "Retrying" not in done.stderr
    assert "Traceback" not in done.stderr
