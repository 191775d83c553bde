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


def package(folder: Path) -> Path:
    """A folder of code."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "ann"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_collect_holds_the_essentials_and_no_host_user_or_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setattr(provenance, "LIBRARIES", (*provenance.LIBRARIES, "no-such-library"))
    found = collect(home / "r.yaml", ["unlearn", f"--out={home}/runs"], {"data": {"forget": home / "x.jsonl"}})
    assert found == json.loads(json.dumps(found))
    assert found["recipe"] == "~/r.yaml"
    assert found["data"] == {"forget": "~/x.jsonl"}
    assert found["command"] == ["unlearn", "--out=~/runs"]
    assert found["python"] == platform.python_version()
    assert set(found["versions"]) == {"lm-unlearn", *provenance.LIBRARIES}
    wanted = {"torch": version("torch"), "lm_eval": version("lm_eval"), "no-such-library": None}
    assert wanted.items() <= found["versions"].items()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(found["date"])).total_seconds()) < 10
    assert 1 <= found["machine"]["cores"] <= (os.cpu_count() or 1)
    assert found["machine"]["cpu"]
    assert found["machine"]["memory_gb"] > 0
    assert not any(secret in json.dumps(found) for secret in ("secret-host", str(home)))


def test_torch_is_never_imported_for_it() -> None:
    code = "import sys; from unlearn.store.provenance import collect; collect('r', []); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--token abc x", "--token *** x"),
        ("--hub-token=abc", "--hub-token=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("--set x=hf_AbCdEf123456", "--set x=***"),
        ("https://ann:pw@host/f?x=1", "https://***@host/f?x=1"),
        ("https://host/f?token=abc&x=1", "https://host/f?token=***"),
        ("--password --verbose x", "--password --verbose x"),
        # and what only looks like it
        ("--set eval.batch_tokens=2048", "--set eval.batch_tokens=2048"),
        ("--set hub:locuslab/TOFU", "--set hub:locuslab/TOFU"),
        ("phi15_forget.yaml --author me", "phi15_forget.yaml --author me"),
        ("hf_files/x task-arithmetic", "hf_files/x task-arithmetic"),
    ],
)
def test_secrets_are_stripped(given: str, shown: str) -> None:
    assert command(given.split()) == shown.split()
    assert command(["--set", "model.api_key=abc def"]) == ["--set", "model.api_key=***"]
    assert command(["Authorization: Bearer abc"]) == ["Authorization: ***"]


def test_home_becomes_a_tilde_by_whole_components(home: Path) -> None:
    assert tidy(f"{home}/a {home} '{home}' file://{home}/b") == "~/a ~ '~' file://~/b"
    assert tidy(f"{home}a/x") == f"{home}a/x"
    assert tidy(f"/mnt{home}/x") == f"/mnt{home}/x"
    assert scrub({"a": [home, (1, None, f"{home}.")]}) == {"a": ["~", [1, None, "~."]]}


def test_commit_of_our_own_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = package(tmp_path / "unlearn")
    assert checkout(ours) is None  # no repository
    git(tmp_path, "init")
    (tmp_path / "other").write_text("x")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "one")
    assert checkout(ours) is None  # a repository that does not hold the code
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "two")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert checkout(ours) == clean
    (tmp_path / "other").write_text("y")
    assert checkout(ours) == clean  # not code
    (ours / "new.py").write_text("x = 1")
    assert checkout(ours) == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert checkout() is None


def test_somebody_elses_repository_around_the_code_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = package(tmp_path / "vendor" / "unlearn")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    monkeypatch.chdir(tmp_path)
    assert checkout(theirs) is None
    # nor one that a git hook's environment points to
    mine = package(tmp_path / "mine" / "unlearn")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "mine"))
    assert checkout(mine) is None
