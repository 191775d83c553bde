"""The recipe decides how a model is trained: number formats, the device, and nothing of what surrounds the program."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from attack_arena import Arena
from safetensors import safe_open
from test_finetune import interrupted, rows_of, train, train_spec
from test_fitted import QUICK
from test_foresight import NAMES, two_changes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from unlearn import processes as collective
from unlearn.errors import UnlearnError
from unlearn.evidence.attacks_weights import edited_copy, relearn
from unlearn.evidence.foresight import slope
from unlearn.execute import execute
from unlearn.model import load as models
from unlearn.model.load import Loaded
from unlearn.recipe.evaluation import RelearnSpec
from unlearn.recipe.load import load_recipe
from unlearn.recipe.methods import LearnedSpec
from unlearn.train import vectors as finetune
from unlearn.train.learned import gradients, learn
from unlearn.train.trainer import float32_weights, mixed_precision, settings
from unlearn.train.vectors import train_weights

Load = Callable[..., Loaded]
HALVES = ("bfloat16", "float16")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> float:
    """The share of a model's weights that are others than before."""
    others = [p != before[name] for name, p in model.named_parameters()]
    return float(torch.cat([o.flatten() for o in others]).float().mean())


def widened(load: Load, folder: Path, dtype: str) -> Loaded:
    """The very weights of 16 bits, in float32."""
    model = load(folder, dtype)
    model.model.float()
    return replace(model, dtype=torch.float32)


# --- what learns is float32 ------------------------------------------------------------------------------------------


def taught(model: Loaded, work: Path, **spec: Any) -> Any:
    how = train_spec(**{"steps": 30, "learning_rate": 1e-5, "batch_size": 6, **spec})
    return train_weights(model.model, model.tokenizer, rows_of(model), how, 0, work, "teach")


@pytest.mark.parametrize("dtype", HALVES)
def test_all_weights_are_trained_in_float32_and_rounded_once(
    loaded: Load, pico_phi: Path, tmp_path: Path, dtype: str
) -> None:
    full, half = widened(loaded, pico_phi, dtype), loaded(pico_phi, dtype)
    before = weights(half.model)
    wanted = taught(full, tmp_path / "full")
    assert taught(half, tmp_path / "half").losses == wanted.losses
    for name, weight in half.model.named_parameters():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, full.model.get_parameter(name).to(weight.dtype)), name
    assert moved(half.model, before) > 0.25  # 3 % where the steps are made in bfloat16
    assert half.model.config.dtype == getattr(torch, dtype)


def test_under_an_autocast_too(loaded: Load, pico_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: products in bfloat16, weights and steps in float32; resumed from checkpoints in float32."""
    monkeypatch.setattr(finetune, "mixed_precision", lambda model: "bf16")
    whole, before = loaded(pico_phi, "bfloat16"), weights(loaded(pico_phi, "bfloat16").model)
    formats = set()

    def note(module: Any, args: Any, output: Tensor) -> None:
        formats.add((module.weight.dtype, output.dtype))

    hook = whole.model.get_submodule(NAMES["phi"][0]).register_forward_hook(note)
    taught(whole, tmp_path / "whole", save_every=7)
    hook.remove()
    assert formats == {(torch.float32, torch.bfloat16)}
    assert moved(whole.model, before) > 0.25
    with interrupted(18):
        taught(loaded(pico_phi, "bfloat16"), tmp_path / "stopped", save_every=7)
    (saved,) = (tmp_path / "stopped").glob("checkpoint-14/*.safetensors")
    with safe_open(saved, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118
    again = loaded(pico_phi, "bfloat16")
    taught(again, tmp_path / "stopped", save_every=7)
    assert moved(again.model, weights(whole.model)) == 0
    # the autocast, whose outputs are float32, ends with the training
    assert whole.model(torch.tensor([rows_of(whole)[0].input_ids])).logits.dtype == torch.bfloat16


def test_weights_in_float32_for_a_while(loaded: Load, pico_llama: Path) -> None:
    model = loaded(pico_llama, "bfloat16").model
    before = weights(model)
    with float32_weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_float16_adapters_and_gradients_have_float32_s_range(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """Without a scaled loss, gradients below 6e-8 would be zero: where there is none, the weights are float32."""
    full, half = widened(loaded, pico_phi, "float16"), loaded(pico_phi, "float16")
    before = weights(half.model)
    tau, rows = two_changes(full.model, NAMES["phi"], 3), rows_of(full)

    def found(model: Loaded) -> list[Any]:
        where = model.model
        scales, log = learn(where, tau, rows[:4], rows[4:], LearnedSpec(steps=3), 0, 0)
        return [
            *(gradients(where, rows, NAMES["phi"], kind) for kind in ("grad", "fisher")),  # type: ignore[arg-type]
            {"slope": torch.tensor(slope(where, tau, rows, "qa", 0))},
            {**scales, "losses": torch.tensor(log)},
            {"lora": torch.tensor(list(train(model, tmp_path / str(where.dtype))[1].losses))},
        ]

    for ours, wanted in zip(found(half), found(full), strict=True):
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert all(p.dtype == torch.float16 and torch.equal(p, before[n]) for n, p in half.model.named_parameters())


def on(device: str, dtype: torch.dtype) -> nn.Module:
    """A module with weights on a device that is not here; nothing can be computed with it."""
    module = nn.Module()
    with FakeTensorMode():
        module.weight = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
    return module


def test_the_autocast_is_of_the_weights_format_and_device() -> None:
    found = {
        (device, dtype): mixed_precision(on(device, getattr(torch, dtype)))
        for device in ("cuda:1", "cpu")
        for dtype in ("float32", *HALVES)
    }
    assert {key: mixed for key, mixed in found.items() if mixed != "no"} == {
        ("cuda:1", "bfloat16"): "bf16",
        ("cuda:1", "float16"): "fp16",
    }
    packed = on("cuda:0", torch.bfloat16)
    packed.is_quantized = True  # type: ignore[assignment]
    assert mixed_precision(packed) == "no"


def test_steps_that_float16_skips_are_said(
    phi: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train(phi, tmp_path / "none")
    assert "changed nothing" not in capfd.readouterr().err
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    train(phi, tmp_path / "all", train_spec(warmup=0.0))
    assert "forget: 6 of 6 steps changed nothing" in capfd.readouterr().err


# --- one device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Two GPUs are visible, as far as anybody is told; returns which of them are made the current one."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(torch.device(device)))
    return made


def of_a_training(device: str) -> TrainingArguments:
    return settings(torch.device(device), "bf16", Path("work"), 0, per_device_train_batch_size=6)


def test_one_process_trains_on_its_model_s_device_alone(two_gpus: list[Any]) -> None:
    """Not, as transformers would, on twice the rows, dealt out by DataParallel, with the model moved to cuda:0."""
    found = of_a_training("cuda:1")
    assert (found.n_gpu, found.train_batch_size, found.world_size) == (1, 6, 1)
    assert found.device == torch.device("cuda:1")
    assert found.distributed_state.device == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]  # nothing was even begun on the other
    found = of_a_training("cpu")
    assert (found.n_gpu, found.train_batch_size, found.device) == (0, 6, torch.device("cpu"))


# --- nothing of its surroundings -------------------------------------------------------------------------------------

LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "LOCAL_RANK": "0",
    "PMI_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_no_variable_that_accelerate_reads_changes_a_training(
    loaded: Load, pico_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted, _ = train(loaded(pico_phi), tmp_path / "plain", train_spec(steps=3))
    monkeypatch.setenv(name, LAUNCHED[name])
    model = loaded(pico_phi)
    found, _ = train(model, tmp_path / "launched", train_spec(steps=3))
    assert found.digest() == wanted.digest()
    assert model.model.device == torch.device("cpu")
    assert os.environ[name] == LAUNCHED[name]


def test_nor_relearning(phi: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(phi, tmp_path, "qa")
    rows = arena.rows(arena.forget.train)
    spec = RelearnSpec(steps=(2,), learning_rate=5e-3)

    def curve() -> Any:
        return relearn(edited_copy(phi.model, None, 0.0), phi.tokenizer, rows, spec, 0, arena.judge())

    wanted = curve()
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.setenv(name, LAUNCHED[name])
    assert curve() == wanted


def test_what_a_launcher_was_asked_for_in_vain_is_said_or_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as it always says
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    collective.join()
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    collective.join()
    said = capfd.readouterr().err
    assert "--mixed_precision bf16 changes nothing" in said
    assert "--dynamo_backend inductor changes nothing" in said
    for name in ("fsdp", "deepspeed", "megatron_lm", "parallelism_config"):
        monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
        with pytest.raises(UnlearnError, match=f"start without --use_{name}"):
            collective.join()
        monkeypatch.delenv(f"ACCELERATE_USE_{name.upper()}")


def test_accelerate_launch_cpu_leaves_gpus_alone(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert models.place("auto").type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert models.place("auto") == torch.device("cpu")


def test_the_format_of_products_is_in_the_keys_of_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And TF32 is off: float32 is float32, whoever has said otherwise. What cannot be overruled is in test_keys."""
    quick = (*QUICK, "vector.method=negate", "vector.forget.steps=2")

    def stages(folder: str) -> dict[str, str]:
        execute(load_recipe("pico_smoke.yaml", quick), tmp_path / folder)
        found: dict[str, str] = json.loads((tmp_path / folder / "provenance.json").read_text())["stages"]
        return found

    torch.set_float32_matmul_precision("high")
    plain = stages("run")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    capfd.readouterr()
    assert stages("run") == plain
    assert "nothing has changed" in capfd.readouterr().err
    # the format of products is not in the weights' fingerprint, since it is of their device as well
    monkeypatch.setattr(finetune, "mixed_precision", lambda model: "bf16")
    cast = stages("cast")
    assert {n for n in plain if cast[n] != plain[n]} >= {"target", "vectors/forget"}
