"""``model.device_map``: a model split over devices is loaded, trained, edited and scored as it is on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from unlearn.errors import ModelError
from unlearn.model.load import load
from unlearn.recipe.schema import ModelSpec

HERE = Path(__file__).parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets nobody pretend to have a device",
)
@pytest.mark.parametrize("family", ["llama", pytest.param("phi", marks=pytest.mark.slow)])
def test_on_two_devices_everything_is_as_on_one(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Tensors of the pretended devices refuse to meet, so that whatever is not moved is an error; numbers are equal."""
    folder = request.getfixturevalue(f"pico_{family}")
    command = [sys.executable, str(HERE / "split_arena.py"), str(folder), str(tmp_path)]
    path = {"PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **path}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == ["lazy:0", "pretend:0"]
    assert found["same"]
    assert found["cpu"].keys() == found["two"].keys()
    for name, values in found["cpu"].items():
        if name in ("weights", "written"):
            assert found["two"][name] == values, name
        else:
            assert found["two"][name] == pytest.approx(values, rel=2e-4, abs=1e-5), name


def test_a_part_without_a_place_is_refused(pico_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits on disk until it is needed cannot be edited."""
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {"model.final_layernorm": "cpu", "model.layers.1": "disk"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"device_map: \d+ weights have no place on a device \(model.layers.1."):
        load(ModelSpec(path=str(pico_phi), device_map=parts), str(pico_phi))


def test_several_processes_cannot_each_split_a_model(pico_phi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="device_map: several processes were started here"):
        load(ModelSpec(path=str(pico_phi), device_map="auto"), str(pico_phi))


def test_auto_without_gpus_and_the_attention_asked_for(pico_phi: Path) -> None:
    found = load(ModelSpec(path=str(pico_phi), device_map="auto", attn_implementation="eager"), str(pico_phi))
    plain = load(ModelSpec(path=str(pico_phi)), str(pico_phi))
    assert found.model.config._attn_implementation == "eager"
    assert found.fingerprint != plain.fingerprint  # it computes otherwise
    if not torch.cuda.is_available():
        assert {p.device.type for p in found.model.parameters()} == {"cpu"}
