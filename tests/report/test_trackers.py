"""Trackers are told of a finished run what its report says, and cost it nothing when they fail."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from reports import make

from unlearn.errors import EvaluationError
from unlearn.pipeline import finish
from unlearn.plan import checks
from unlearn.recipe.load import open_run
from unlearn.recipe.schema import Recipe, Tracker
from unlearn.report.trackers import figures, settings, track
from unlearn.results import RunReport
from unlearn.store.stages import RunFolder, Store

LOSSES = {"forget": [3.0, 2.0, 1.5], "retain": [2.5, 2.0]}


def report() -> RunReport:
    return make(training=tuple({"stage": name, "losses": losses} for name, losses in LOSSES.items()))


def recipe(*trackers: str) -> Recipe:
    data = {"name": "mine", "model": {"path": "pico:phi"}, "forget": {"path": "f.jsonl", "kind": "qa"}}
    return Recipe.model_validate_json(json.dumps({**data, "report_to": trackers}))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with open_run(tmp_path / "run", recipe(), "text") as made:
        for name in ("report.json", "report.html"):
            made.path(name).write_text("{}")
        yield made


def series(found: RunReport, prefix: str) -> dict[str, list[float]]:
    """By metric, in order."""
    made: dict[str, list[float]] = {}
    for _, values in sorted(figures(found).items()):
        for name, value in values.items():
            if name.startswith(prefix):
                made.setdefault(name, []).append(value)
    return made


def test_what_is_told_is_what_the_report_has() -> None:
    found = report()
    assert series(found, "loss/") == {f"loss/{name}": losses for name, losses in LOSSES.items()}
    swept = series(found, "sweep/")
    assert swept["sweep/coefficient"] == [point.coefficient for point in found.sweep]
    for score in found.sweep[0].scores:
        values = [s.score.value for point in found.sweep for s in point.scores if s.key == score.key]
        assert swept[f"sweep/{score.set}/{score.name}/{score.metric}"] == values
    last = max(figures(found))
    for row in found.scores:
        name = f"test/{row.set}/{row.name}/{row.metric}"
        assert figures(found)[last][f"{name}/before"] == row.before.value
        assert figures(found)[last][f"{name}/after"] == row.after.value
    assert figures(found)[last]["chosen/coefficient"] == found.chosen.coefficient


def test_the_names_are_accelerate_s() -> None:
    assert set(Tracker.__args__) == set(LOGGER_TYPE_TO_CLASS)


def test_tensorboard(folder: RunFolder) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # again over it: there is one run, not two
        track(recipe("tensorboard"), report(), folder)
    events = EventAccumulator(str(folder.root / "trackers" / "mine"))
    events.Reload()
    for name, losses in LOSSES.items():
        assert [(e.step, e.value) for e in events.Scalars(f"loss/{name}")] == list(enumerate(losses, 1))
    coefficients = [point.coefficient for point in report().sweep]
    assert [e.value for e in events.Scalars("sweep/coefficient")] == coefficients


def test_mlflow(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    track(recipe("mlflow"), report(), folder)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["vector.lora.rank"] == "16"
    assert run.data.params.keys() == settings(recipe()).keys()
    for name, losses in LOSSES.items():
        told = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"loss/{name}"))
        assert told == list(enumerate(losses, 1))
    assert run.data.metrics["chosen/coefficient"] == report().chosen.coefficient
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"report.json", "report.html"}


def test_trackio(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    track(recipe("trackio"), report(), folder)
    with sqlite3.connect(tmp_path / "mine.db") as base:
        rows = [(step, json.loads(values)) for step, values in base.execute("SELECT step, metrics FROM metrics")]
        ((told,),) = base.execute("SELECT config FROM configs").fetchall()
    assert sorted(rows) == sorted((step, dict(values)) for step, values in figures(report()).items())
    assert json.loads(told).items() >= settings(recipe()).items()


def test_wandb(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline it writes a file to be sent later, in a format of its own: names and files stand in it."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    track(recipe("wandb"), report(), folder)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    there = file.read_bytes()
    for text in ("loss/forget", "chosen/coefficient", "sweep/coefficient", "vector.lora.rank", "report.html"):
        assert text.encode() in there, text


class Told(GeneralTracker):
    """Remembers, or fails where it is told to."""

    name, requires_logging_directory, main_process_only = "aim", False, False
    fails, calls = "", list[str]()

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        self.note("start")

    def store_init_configuration(self, values: Any) -> None:
        self.note("settings")

    def log(self, values: Any, step: int | None = None, **options: Any) -> None:
        self.note("log")

    def finish(self) -> None:
        self.note("finish")

    def note(self, call: str) -> None:
        get_logger(__name__).debug(call)  # as accelerate's own do, which have it refuse to speak without its state
        self.calls.append(call)
        if call == self.fails:
            raise RuntimeError("no answer\nfor an hour")


@pytest.mark.parametrize("fails", ["", "start", "settings", "log", "finish"])
def test_a_run_tells_before_it_is_sealed_and_a_failure_costs_one_warning(
    fails: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Told)
    monkeypatch.setattr(Told, "fails", fails)
    monkeypatch.setattr(Told, "calls", [])
    monkeypatch.setattr(PartialState, "_shared_state", {})
    finish(report(), recipe("aim"), "key", Path("mine.yaml"), folder, Store(folder))
    assert json.loads(folder.path("report.json").read_text())["name"] == "quickstart"
    assert json.loads(folder.path("provenance.json").read_text())["key"] == "key"
    warned = "report_to: aim failed (RuntimeError: no answer); the report is whole without it"
    assert capfd.readouterr().err.count(warned) == bool(fails)
    assert Told.calls[-1] == ("start" if fails == "start" else "finish")


def test_a_missing_library_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="report_to: mlflow is not installed: pip install mlflow, or"):
        checks.check(recipe("mlflow"), tmp_path)


def test_who_is_told_is_no_part_of_a_run(tmp_path: Path) -> None:
    """Neither its folder's name, nor whose folder it is."""
    folders = []
    for one in (recipe(), recipe("mlflow")):
        with open_run(None, one, "text", base=tmp_path) as found:
            folders.append(found.root)
    assert folders[0] == folders[1]


def test_starting_over_removes_what_trackers_wrote(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", recipe(), "text") as made:
        (made.root / "trackers" / "mine").mkdir(parents=True)
        (made.root / "trackers" / "mine" / "events").write_text("x")
    with open_run(tmp_path / "run", recipe(), "text", fresh=True) as made:
        assert not (made.root / "trackers").exists()
