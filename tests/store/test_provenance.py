"""Provenance says what ran, and nothing about who ran it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from unlearn.store import provenance
from unlearn.store.provenance import checkout, collect, command, scrub, tidy


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")
    answer = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "ann"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_collect_holds_the_essentials(home: Path) -> None:
    found = collect(home / "r.yaml", ["unlearn", "--recipe", "r.yaml"], {"data": {"forget": home / "x.jsonl"}})
    assert found == json.loads(json.dumps(found))
    assert found["recipe"] == str(Path("~") / "r.yaml")
    assert found["data"] == {"forget": "~/x.jsonl"}
    assert found["command"] == ["unlearn", "--recipe", "r.yaml"]
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["lm_eval"] == version("lm_eval")
    assert set(found["versions"]) == {"lm-unlearn", *provenance.LIBRARIES}
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["date"])).total_seconds()) < 10
    machine = found["machine"]
    assert 1 <= machine["cores"] <= (os.cpu_count() or 1)
    assert machine["cpu"]
    assert machine["memory_gb"] > 0


def test_no_host_no_user_no_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    text = json.dumps(collect(home / "r.yaml", ["unlearn", f"--out={home}/runs"]))
    assert "secret-host" not in text
    assert str(home) not in text
    assert "--out=~/runs" in text


def test_a_missing_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LIBRARIES", ("no-such-library",))
    assert collect("r", [])["versions"]["no-such-library"] is None


def test_torch_is_never_imported_for_it() -> None:
    code = "import sys; from unlearn.store.provenance import collect; collect('r', []); print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--hub-token=abc"], ["--hub-token=***"]),
        (["--set", "model.api_key=abc def"], ["--set", "model.api_key=***"]),
        (["HF_TOKEN=abc"], ["HF_TOKEN=***"]),
        (["--set", "x=hf_AbCdEf123456"], ["--set", "x=***"]),
        (["https://ann:pw@host/f?x=1"], ["https://***@host/f?x=1"]),
        (["https://host/f?token=abc&x=1"], ["https://host/f?token=***"]),
        (["Authorization: Bearer abc"], ["Authorization: ***"]),
        (["--password", "--verbose", "x"], ["--password", "--verbose", "x"]),
        # and what only looks like it
        (["--set", "eval.batch_tokens=2048"], ["--set", "eval.batch_tokens=2048"]),
        (["--set", "hub:locuslab/TOFU"], ["--set", "hub:locuslab/TOFU"]),
        (["phi15_forget.yaml", "--author", "me"], ["phi15_forget.yaml", "--author", "me"]),
        (["hf_files/x", "task-arithmetic"], ["hf_files/x", "task-arithmetic"]),
    ],
)
def test_secrets_are_stripped(given: list[str], shown: list[str]) -> None:
    assert command(given) == shown


def test_home_becomes_a_tilde_by_whole_components(home: Path) -> None:
    assert tidy(f"{home}/a {home} '{home}' file://{home}/b") == "~/a ~ '~' file://~/b"
    assert tidy(f"{home}a/x") == f"{home}a/x"
    assert tidy(f"/mnt{home}/x") == f"/mnt{home}/x"
    assert scrub({"a": [home, (1, None, f"{home}.")]}) == {"a": ["~", [1, None, "~."]]}


def test_commit_of_our_own_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "unlearn"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert checkout(package) is None  # no repository
    git(tmp_path, "init")
    (tmp_path / "other").write_text("x")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "one")
    assert checkout(package) is None  # a repository that does not hold the code
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "two")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert checkout(package) == clean
    (tmp_path / "other").write_text("y")
    assert checkout(package) == clean  # not code
    (package / "new.py").write_text("x = 1")
    assert checkout(package) == {**clean, "dirty": True}


def test_somebody_elses_repository_around_the_code_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vendor" / "unlearn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    monkeypatch.chdir(tmp_path)
    assert checkout(package) is None
    # nor one that a git hook's environment points to
    mine = tmp_path / "mine"
    (mine / "unlearn").mkdir(parents=True)
    (mine / "unlearn" / "__init__.py").write_text("")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(mine))
    assert checkout(mine / "unlearn") is None


def test_no_git_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout() is None
