"""Edits from disk to disk: interruptions, bases that look alike, and what they cannot do."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unlearn import pico
from unlearn.apply import apply, check
from unlearn.changes import Change, LowRank
from unlearn.errors import VectorError
from unlearn.streamed.folder import RECORD
from unlearn.streamed.io import Buffer, Flow, Sink
from unlearn.streamed.layout import SINGLE
from unlearn.vector import TaskVector

LAMBDA = 0.75


def a_vector(folder: Path, end: str = "self_attn.q_proj") -> TaskVector:
    """A change of the linear layers that are named so."""
    g = torch.Generator().manual_seed(3)
    modules: dict[str, Change] = {}
    for name, weight in load_file(folder / SINGLE).items():
        if name.endswith(f"{end}.weight"):
            rows, columns = weight.shape
            modules[name.removesuffix(".weight")] = LowRank(
                torch.randn(3, columns, generator=g), torch.randn(rows, 3, generator=g) * 0.02
            )
    return TaskVector(modules)


def dated(folder: Path) -> Path:
    """Give all files one date, as images of containers and reproducible archives do."""
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return folder


def age(out: Path) -> None:
    """Make a record one of before it said where the base's files lie."""
    data = json.loads((out / RECORD).read_text())
    for entry in data["files"].values():
        entry["base"].pop("place")
    (out / RECORD).write_text(json.dumps(data))


# interruptions


@pytest.mark.parametrize("times", [1, 3])
def test_an_interruption_waits_for_what_is_being_written(times: int, tmp_path: Path) -> None:
    """Else its file is closed under it, and the bytes go to whatever is opened next."""
    busy, go, buffer = threading.Event(), threading.Event(), Buffer(4096)
    sink = Sink(tmp_path / "out")

    def write(item: int) -> None:
        busy.set()
        go.wait(10)
        sink.write(buffer, 0, 4096)

    def disturb() -> None:
        busy.wait(10)
        for _ in range(times):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        go.set()

    threading.Thread(target=disturb, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), sink:
        Flow(write, finish=lambda item: None).run([1])
    with (tmp_path / "mine").open("wb"):  # takes the number of the file that was closed
        go.set()
        time.sleep(0.2)
    assert (tmp_path / "mine").read_bytes() == b""
    assert (tmp_path / "out").stat().st_size == 4096


def test_an_error_at_the_end_is_raised_and_nothing_hangs() -> None:
    def fail(item: int) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        Flow(lambda item: None, finish=fail).run([1, 2])


# bases that look alike


def test_another_base_of_the_same_size_and_date_is_not_taken_for_the_first(tmp_path: Path) -> None:
    one, two = (dated(pico.build("llama", tmp_path / f"base{seed}", seed)) for seed in (0, 1))
    vector, out = a_vector(one), tmp_path / "out"
    apply(vector, one, LAMBDA, out)
    assert apply(vector, two, LAMBDA, out).kept == 0
    assert not check(vector, two, LAMBDA, out).wrong


@pytest.mark.parametrize("record", ["as it is", "of old"])
def test_a_copy_of_the_base_is_as_good(record: str, tmp_path: Path) -> None:
    one, two = (dated(pico.build("llama", tmp_path / f"base{n}", 0)) for n in (0, 1))
    vector, out = a_vector(one), tmp_path / "out"
    apply(vector, one, LAMBDA, out)
    if record == "of old":
        age(out)
    assert apply(vector, two, LAMBDA, out).kept == 1
    # and from now on it is known
    place = json.loads((out / RECORD).read_text())["files"][SINGLE]["base"]["place"]
    assert place[1] == (two / SINGLE).stat().st_ino


def test_a_record_of_old_is_no_proof(tmp_path: Path) -> None:
    one, two = (dated(pico.build("llama", tmp_path / f"base{seed}", seed)) for seed in (0, 1))
    vector, out = a_vector(one), tmp_path / "out"
    apply(vector, one, LAMBDA, out)
    age(out)
    assert apply(vector, two, LAMBDA, out).kept == 0
    assert not check(vector, two, LAMBDA, out).wrong


# what it cannot do


def test_weights_in_float64_are_refused(tmp_path: Path) -> None:
    """Edits are computed in float32: 29 bits of them would be lost."""
    folder = pico.build("llama", tmp_path / "base", 0)
    vector = a_vector(folder)
    save_file({n: t.double() for n, t in load_file(folder / SINGLE).items()}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(VectorError, match=r"stored as F64, .* convert the model to float32") as caught:
        apply(vector, folder, LAMBDA, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 + len(vector.modules)
    assert not (tmp_path / "out").exists()
