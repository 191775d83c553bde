"""The command line as such: words and flags, exit codes, one message a mistake, what is said how loudly."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import unlearn
from unlearn.cli import main


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = logging.getLogger("unlearn").level
    yield
    logging.getLogger("unlearn").setLevel(before)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What runs were asked for; none is made."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(unlearn, "run", lambda recipe, **options: calls.append((recipe, options)))
    return calls


@pytest.mark.parametrize(
    "line",
    [
        ["run", "r.yaml", "seed=1", "a.b=x=y", "--out", "o"],
        ["run", "--out", "o", "--set", "seed=1", "r.yaml", "a.b=x=y"],
        ["--recipe", "r.yaml", "--set", "seed=1", "--set", "a.b=x=y", "--out", "o"],
        ["-q", "--recipe=r.yaml", "--out", "o", "--set", "seed=1", "--set", "a.b=x=y"],
        ["run", "--recipe", "r.yaml", "seed=1", "a.b=x=y", "--out", "o"],
    ],
)
def test_one_run_in_several_words(line: list[str], called: list[tuple[Any, dict[str, Any]]]) -> None:
    assert main(line) == 0
    options = {"set": ["seed=1", "a.b=x=y"], "out": Path("o"), "fresh": False, "pool": None, "prepare": False}
    assert called == [("r.yaml", options)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["run"], "which recipe?"),
        (["run", "r.yaml", "seed"], "'seed' is no KEY=VALUE"),
        (["plan", "pico_smoke", "seeds=1"], "--set seeds: unknown key; did you mean 'seed'?"),
        (["--recipe", "pico_smoke", "--memory"], "give --dry-run as well"),
        (["plan", "no_such"], "there is no recipe 'no_such'"),
        (["push", "run", "nobody"], "'nobody' is no OWNER/NAME"),
        (["push", "no/run", "some/name", "--dry-run"], "no/run"),
        (["leaderboard"], "give either the folders of runs"),
        (["vector", "info", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    line: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("error: "), "Traceback" in err) == ("", 1, False)
    assert said in err


@pytest.mark.parametrize("line", [["bogus"], ["run", "--no-such"], ["apply", "v", "--coefficient", "x"]])
def test_words_that_mean_nothing(line: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    assert "Error" in capfd.readouterr().err


def test_what_goes_wrong_is_a_number(called: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in ((KeyboardInterrupt(), 130), (BrokenPipeError(), 0), (OSError(28, "No space left"), 2)):

        def fail(*args: Any, error: BaseException = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(unlearn, "run", fail)
        assert main(["run", "r.yaml"]) == code
    monkeypatch.setattr(unlearn, "run", lambda *args, **options: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        main(["run", "r.yaml"])


def test_quiet_and_verbose(capfd: pytest.CaptureFixture[str]) -> None:
    from unlearn.console import say

    for flags, heard in (([], 3), (["-q"], 2), (["-v"], 3)):
        assert main([*flags, "schema"]) == 0
        capfd.readouterr()
        for style in (None, "yellow", "red"):
            say("told", style)
        assert capfd.readouterr().err.count("told") == heard


def test_help_is_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("", "run", "plan", "schema", "recipes", "tasks", "push", "apply", "leaderboard", "vector"):
        assert main([*command.split(), "--help"]) == 0
        assert "Usage: unlearn" in capsys.readouterr().out
    for line, said in (
        (["--version"], f"unlearn {unlearn.__version__}\n"),
        (["tasks"], "unlearn_mcq"),
        (["recipes"], "quickstart.yaml"),
    ):
        assert main(line) == 0
        assert said in capsys.readouterr().out
    assert main(["tasks", "--path"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "tofu" / "tofu_items.py").is_file()


def test_the_module_is_the_command_and_never_an_import(tmp_path: Path) -> None:
    done = [
        subprocess.run([sys.executable, *line, *rest], capture_output=True, text=True, cwd=tmp_path, check=False)
        for line, rest in (
            (["-m", "unlearn.run"], ["--recipe", "pico_smoke", "--dry-run"]),
            (["-m", "unlearn"], ["plan", "pico_smoke"]),
            (["-c", "import unlearn.run"], []),
        )
    ]
    assert [one.returncode for one in done] == [0, 0, 1]
    assert done[0].stdout == done[1].stdout != ""
    assert "from unlearn import run" in done[2].stderr


MISSING = {
    "gguf": (["plan", "quickstart"], "is a GGUF file, and reading one needs the package gguf: pip install gguf"),
    "submitit": (["submit", "pico_smoke", "--local"], "submitit: pip install submitit (the extra [cluster] has it)"),
}


@pytest.mark.parametrize("package", MISSING)
def test_a_package_that_is_not_installed_is_one_message_before_anything_is_made(
    package: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line, said = MISSING[package]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert main(line) == 2
    text = capfd.readouterr().err
    assert text.count("error:") == 1
    assert said in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []
