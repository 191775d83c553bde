"""One whole run under audit hooks: a recipe full of traps, in a folder full of traps, with secrets in its environment.

What it may not do: open a socket, unpickle anything, write outside its folder, its cache and the temporary folder, run
a program out of the current folder, or put a secret into any file or onto the terminal.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile import ESCAPES, HERE, JINJA, QUOTES, SCRIPT, Watched, module, snapshot, watched

from unlearn.model.pico import build
from unlearn.recipe import yaml as yaml_core

TOKEN, SECOND, LOGIN = "hf_PlantedTokenOfTheHub1", "planted-without-any-form/42", "planted-password"
SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedTokenOfTheHub2",
    "AWS_SECRET_ACCESS_KEY": SECOND,
    "AWS_SESSION_TOKEN": "plantedsessiontoken",
    "WANDB_API_KEY": "plantedwandbkey00",
    "GH_TOKEN": "ghp_plantedplantedplanted",
    "PIP_INDEX_URL": f"https://someone:{LOGIN}@index.invalid/simple",
    "PIP_EXTRA_INDEX_URL": f"https://someone:{LOGIN}@index.invalid/more",
    "MY_DATABASE_PASSWORD": "planted hunter two",
}
PLANTED = [*(v for k, v in SECRETS.items() if not k.startswith("PIP_")), LOGIN]
SHADOWS = ("pip", "yaml", "torch", "json", "transformers", "lm_eval", "rich", "sitecustomize", "usercustomize", "gguf")
TRAPS = (JINJA, SCRIPT, QUOTES, ESCAPES, "=1+1", "{question}")
SET = {"kind": "qa", "shares": {"train": "all", "validation": 0.5, "test": 0.5}, "continuation": 2}
PROMPT = JINJA.replace("{", "{{").replace("}", "}}")[:40] + "{question}"


@dataclass(frozen=True)
class Ran:
    """Where it ran, what it did, and what it left."""

    home: Path
    folder: Path
    cache: Path
    canary: Path
    saw: Watched
    before: dict[str, bytes | str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    base = tmp_path_factory.mktemp("watched")
    home, folder, cache, canary = base / "here", base / "run", base / "cache", base / "canary"
    home.mkdir()
    build("phi", home / "model")
    (home / "model" / "modeling_evil.py").write_text(module(canary))
    for name in SHADOWS:  # beside the recipe, where a careless `python -m` would take them for the real ones
        (home / f"{name}.py").write_text(module(canary))
    rows = [
        {"question": f"{trap} {n}", "answer": f"{word} {trap[:9]}", "other": n}
        for n, (trap, word) in enumerate((trap, word) for trap in TRAPS for word in ("ja", "nein"))
    ]
    for name in ("forget", "retain"):
        text = "".join(json.dumps({**row, "question": f"{name} {row['question']}"}) + "\n" for row in rows)
        (home / f"{name}.jsonl").write_text(text)
    train = {"steps": 4, "batch_size": 4, "learning_rate": 0.005}
    recipe = {
        "name": "trap",
        "description": f"{JINJA}{SCRIPT}{ESCAPES}",
        "model": {"path": "model"},
        "forget": {"name": "f", "path": "forget.jsonl", "prompt": PROMPT, **SET},
        "retain": [{"name": "r", "path": "retain.jsonl", **SET}],
        "teach": train,
        "vector": {"method": "contrast", "lora": {"rank": 2, "alpha": 4}, "forget": train},
        "sweep": {"coefficients": [0.5, 1]},
        "choose": {"keep": 0.0, "perplexity": 100, "collapse": 100},
        "export": {"adapter": True, "merged": True, "push_to_hub": {"repo": "a/b", "what": "adapter", "dry_run": True}},
    }
    (home / "recipe.yaml").write_text(yaml_core.dump(recipe))
    before = snapshot(home)
    environment = {**SECRETS, "UNLEARN_CACHE": str(cache), "HF_HUB_OFFLINE": None, "HF_HOME": str(base / "hf")}
    environment["MPLCONFIGDIR"] = str(cache / "matplotlib")  # where it keeps its list of fonts
    arguments = ["--recipe", "recipe.yaml", "--out", str(folder), "--set", "seed=1"]
    return Ran(home, folder, cache, canary, watched(arguments, home, environment), before)


def test_the_watch_sees_what_it_is_to_see(tmp_path: Path) -> None:
    """Or else nothing below would mean anything."""
    code = (
        "import pathlib, pickle, socket, subprocess, sys, watch\n"
        "watch.install(open(sys.argv[1], 'w'))\n"
        "open(sys.argv[2], 'w').close(); pathlib.Path(sys.argv[2]).rename(sys.argv[2] + '2')\n"
        "pickle.loads(pickle.dumps(pathlib.Path)); subprocess.run(['true'])\n"
        "s = socket.socket(); s.settimeout(0.1); s.connect_ex(('127.0.0.1', 9))\n"
    )
    log, place = tmp_path / "log", str(tmp_path / "file")
    command = [sys.executable, "-c", code, str(log), place]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
    assert {event[0] for event in events} == {"write", "unpickle", "process", "network"}
    assert ("write", place) in events
    assert ("write", place + "2") in events


def test_it_ran_to_its_end(ran: Ran) -> None:
    assert ran.saw.code == 0, ran.saw.err
    report = json.loads((ran.folder / "report.json").read_text())
    assert report["chosen"]["coefficient"] > 0
    assert (ran.folder / "export" / "merged" / "model.safetensors").is_file()
    assert JINJA in json.dumps(report["examples"]).encode().decode("unicode_escape") or JINJA in str(report["examples"])


def test_it_opened_no_socket_unpickled_nothing_and_ran_nothing_of_the_current_folder(ran: Ran) -> None:
    assert ran.saw.of("network") == []
    assert ran.saw.of("unpickle") == []
    assert not ran.canary.exists()
    assert [e for e in ran.saw.of("process") if str(ran.home) in str(e)] == []


def test_it_wrote_where_it_may_and_nowhere_else(ran: Ran) -> None:
    assert snapshot(ran.home) == ran.before
    allowed = (ran.folder, ran.cache, Path(tempfile.gettempdir()).resolve() / "torchinductor", Path("/dev/null"))
    written = {path for (path,) in ran.saw.of("write")}
    assert written
    passing = {p for p in written if Path(p).parent == Path(tempfile.gettempdir()) and not Path(p).exists()}
    devices = {p for p in written if Path(p).parent in (Path("/dev"), Path("/dev/shm"))}
    outside = {p for p in written - passing - devices if not p.startswith(tuple(map(str, allowed)))}
    assert outside == set()


def test_no_secret_is_in_any_file_or_on_the_terminal(ran: Ran) -> None:
    assert not any(secret in text for secret in PLANTED for text in (ran.saw.out, ran.saw.err))
    files = [p for root in (ran.folder, ran.cache) if root.exists() for p in root.rglob("*") if p.is_file()]
    assert len(files) > 30
    for path in files:
        content = path.read_bytes()
        assert [secret for secret in PLANTED if secret.encode() in content] == [], path


def test_what_looked_like_a_program_was_data_and_nothing_moved_the_cursor(ran: Ran) -> None:
    for text in (ran.saw.out, ran.saw.err):
        assert {c for c in text if not c.isprintable()} <= {"\n", "\r", "\t"}
    text = "".join(p.read_text() for p in sorted(ran.folder.rglob("samples_*.jsonl")))
    assert json.dumps(JINJA)[1:-1] in text
    assert "_frozen_importlib" not in text
    assert "<class" not in text


def test_a_run_that_somebody_else_finished_is_shown_and_runs_nothing(ran: Ran, tmp_path: Path) -> None:
    """The finished folder, moved, beside its recipe: the same run, nothing left to do, nothing written but its own."""
    home = Path(shutil.copytree(ran.home, tmp_path / "here"))
    folder = Path(shutil.copytree(ran.folder, tmp_path / "run"))
    environment = {**SECRETS, "UNLEARN_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": None}
    saw = watched(["--recipe", "recipe.yaml", "--out", str(folder), "--set", "seed=1", "--dry-run"], home, environment)
    assert saw.code == 0, saw.err
    assert saw.of("network") == []
    assert not [p for (p,) in saw.of("write") if p != "/dev/null"]
    assert {c for c in saw.out if not c.isprintable()} <= {"\n"}
    assert not ran.canary.exists()
