"""What ``--dry-run --memory`` counts, against models that are there and what torch's profiler sees of them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from unlearn import cli
from unlearn.model.load import linear_modules
from unlearn.plan import memory as plan_memory
from unlearn.recipe.load import load_recipe
from unlearn.recipe.methods import LoraSpec, TrainSpec
from unlearn.text import file_size
from unlearn.train.losses import only_at, penalty
from unlearn.vector.edit import shape_of

FAMILIES = ("phi", "llama", "gpt2", "qwen2", "gpt_neox")
ROWS, TOKENS, LABELS, RANK = 4, 48, 5, 4


def builder(config: Any) -> plan_memory.Build:
    def build(dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    return build


def held(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def most(step: Callable[[], None]) -> int:
    """Bytes of arrays that are there at once, beyond what was there before, as torch's profiler sees them."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_model(family: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    pico: Path = request.getfixturevalue(f"pico_{family}")
    there = held(AutoModelForCausalLM.from_pretrained(pico, dtype=dtype))
    assert plan_memory.weights(builder(AutoConfig.from_pretrained(pico)), dtype) == there


@pytest.mark.parametrize("way", ["lora", "checkpointing", "penalty", "all", "bfloat16", "accumulation"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_training_holds_what_torch_s_profiler_sees(family: str, way: str, request: pytest.FixtureRequest) -> None:
    config = AutoConfig.from_pretrained(request.getfixturevalue(f"pico_{family}"))
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 6)
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    spec = TrainSpec(
        batch_size=ROWS, gradient_checkpointing=way == "checkpointing", accumulation=2 if way == "accumulation" else 1
    )
    lora, sets = None if way == "all" else LoraSpec(rank=RANK), 2 if way == "penalty" else 0
    between, peak = plan_memory.training(builder(config), dtype, spec, lora, TOKENS, LABELS, sets)

    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = held(model)
    if lora is not None:
        names = list(linear_modules(model))
        turned = isinstance(model.get_submodule(names[0]), Conv1D)
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names, fan_in_fan_out=turned))
    if spec.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in learned)
    copies = (lora is not None) + 2 + (way == "accumulation")  # itself, the moments, a gradient
    assert between == weights + 4 * copies * sum(p.numel() for p in learned)

    ids, mask = torch.randint(0, 100, (ROWS, TOKENS)), torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0  # without padding there need not be a mask of all pairs

    def step() -> None:
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if sets:
            with only_at(model, torch.arange(TOKENS).expand(ROWS, TOKENS) < LABELS):
                *sides, untouched = model(**given).logits.chunk(sets)
                penalty(untouched, sides).backward()
        else:
            model(**given, labels=ids).loss.backward()

    step()  # after which there are gradients, and what is made once
    if spec.accumulation == 1:
        model.zero_grad()
    assert peak - between == pytest.approx(most(step), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_holds_its_factors_and_in_float32_the_weights_as_they_were(dtype: torch.dtype, pico_gpt2: Path) -> None:
    config = AutoConfig.from_pretrained(pico_gpt2)
    sizes = [shape_of(m) for m in linear_modules(AutoModelForCausalLM.from_config(config)).values()]
    before = 4 * sum(out * into for out, into in sizes) if dtype == torch.float32 else 0

    def change(*overrides: str) -> int:
        return plan_memory.scoring(builder(config), dtype, load_recipe("pico_smoke.yaml", overrides).recipe)[0]

    thin = 4 * RANK * sum(out + into for out, into in sizes)
    assert change("vector.method=negate") == before + thin
    assert change() == before + 2 * thin, "contrast subtracts the retain vector"
    assert change("vector.method=perta") == before + 4 * sum(out * into for out, into in sizes)


def test_the_plan_says_it_by_stages(capsys: pytest.CaptureFixture[str], pico_phi: Path) -> None:
    line = ["--recipe", "pico_smoke.yaml", "--set", "model.dtype=float32", "--dry-run"]
    assert cli.main([*line, "--memory"]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said[said.index("\nmemory") :].splitlines()]
    weights = file_size(held(AutoModelForCausalLM.from_pretrained(pico_phi, dtype=torch.float32)))
    assert ["load", *weights.split(), "weights", *weights.split()] in rows
    assert [row[0] for row in rows if "weights" in row] == ["load", "teach", "finetune", "finetune,", "sweep,"]
    assert "12 rows of 23 tokens" in said
    assert cli.main(line) == 0
    assert "\nmemory" not in capsys.readouterr().out
    inside = ("--set", "vector.method=ignorance", "--set", "vector.inside=1000")
    assert cli.main([*line, *inside, "--memory"]) == 0
    read = 2 * (5 * 64**2 + 128**2)  # of each layer q, k, v, dense and fc1, and fc2
    assert f"the shrinking {file_size(4 * read)}" in capsys.readouterr().out
    fila = ("--set", "vector.method=ihl", "--set", "vector.ihl.fila=true")
    assert cli.main([*line, *fila, "--memory"]) == 0
    said = capsys.readouterr().out
    assert f"FILA's importances {file_size(2 * 4 * 2 * (4 * 64**2 + 2 * 64 * 128))}" in said
    assert "24 rows of 23 tokens" in said, "as many retain rows beside"
    # refusals are longer than answers; both are asked of the model as it was, too
    assert cli.main([*line, "--set", "vector.method=DPO", "--memory"]) == 0
    assert "60 rows of 44 tokens" in capsys.readouterr().out
    assert cli.main([*line, "--set", "vector.retain_kl={estimate: kfac}", "--memory"]) == 0
    written = 2 * (5 * 64**2 + 128**2)  # all but fc1, and fc1
    said = capsys.readouterr().out
    assert f"the curvature {file_size(4 * (read + written))}" in said
    assert "12 rows of" in said, "no retain rows beside the batch"
    assert "\n             shape " not in said
    assert cli.main([*line, "--set", "vector.method=kfac", "--memory"]) == 0
    parts = f"second moments {file_size(4 * read)}, what is solved {file_size(4 * 4 * 128**2)}"
    assert parts in capsys.readouterr().out


def test_of_a_model_on_the_hub_configuration_and_tokenizer_suffice(pico_llama: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--some--llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd")
    (repo / "snapshots" / "0123abcd").mkdir(parents=True)
    for file in pico_llama.glob("*.json"):
        shutil.copy(file, repo / "snapshots" / "0123abcd")
    changes = ("--set", "model.path=some/llama", "--set", "model.dtype=bfloat16")
    done = subprocess.run(
        [sys.executable, "-m", "unlearn.run", "--recipe", "pico_smoke.yaml", "--dry-run", "--memory", *changes],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    weights = file_size(held(AutoModelForCausalLM.from_pretrained(pico_llama, dtype=torch.bfloat16)))
    assert f"weights {weights}" in done.stdout


def test_what_is_not_at_hand_is_said_in_one_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path))
    for name in ("HF_HUB_OFFLINE", "UNLEARN_OFFLINE"):  # nothing is fetched in any case
        monkeypatch.delenv(name, raising=False)
    for model, message in (
        ("no-such/model", "nothing: hf download no-such/model --include '*.json' brings both"),
        (f"wheel:x==1.0/x.gguf#sha256={'0' * 64}", "was not fetched and converted yet"),
    ):
        assert cli.main(["--recipe", "pico_smoke.yaml", "--set", f"model.path={model}", "--dry-run", "--memory"]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert cli.main(["--recipe", "pico_smoke.yaml", "--memory"]) == 2
    assert "give --dry-run as well" in capsys.readouterr().err
