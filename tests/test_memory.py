"""Memory that is exhausted: known for what it is, and one message that says where and what to do, in every stage."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_arena import copied, run, write_data, write_recipe
from live import Live
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from unlearn import cli
from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import UnlearnError
from unlearn.evidence import attacks_ask as sampling
from unlearn.model.load import linear_modules
from unlearn.processes import is_out_of_memory, told
from unlearn.recipe.methods import EthosSpec
from unlearn.score.packed import PackedLM
from unlearn.train.learned import gradients
from unlearn.train.trainer import _Trainer
from unlearn.vector.change import LowRank, Survival
from unlearn.vector.edit import Edit, weights_of
from unlearn.vector.methods import Have, ethos
from unlearn.vector.task_vector import TaskVector

EXHAUSTED = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"),
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 2.00 GiB"),
    torch.OutOfMemoryError(""),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB, max allowed: 18 GB)"),
    RuntimeError("Invalid buffer size: 20.00 GiB"),
    RuntimeError("Error: command buffer exited with error status: Insufficient Memory (00000008)"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::1024 (1KB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1048576 bytes"),
    RuntimeError("unable to mmap 1024 bytes from file </x>: Cannot allocate memory (12)"),
    RuntimeError("No executable batch size found, reached zero."),
    RuntimeError("OutOfMemoryError in another process: CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
]
OTHERS = [
    RuntimeError("expected all tensors to be on the same device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("row 3: 'The machine is out of memory.' has no answer"),
    UnlearnError("sweep: out of memory (CUDA out of memory). To need less, lower eval.batch_tokens"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=str)
def test_an_exhausted_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    said = r"^here: out of memory.*\. To need less, ask less; or choose a smaller"
    with pytest.raises(UnlearnError, match=said), told("here", "ask less"):
        raise error


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, told("here", "ask less"):
        raise error
    assert caught.value is error


def test_what_the_system_really_says() -> None:
    """An allocation that no machine grants."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_handle(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def inside(owner: Any, name: str, error: Callable[..., Any] = fail) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, error)


# Stage, folders of the finished run that are made again, settings, where memory runs out, the message's beginning, and
# the keys that it names
PLACES: list[tuple[str, tuple[str, ...], list[str], Callable[[pytest.MonkeyPatch], None], str, list[str]]] = [
    ("load", (), [], inside(PreTrainedModel, "to"), "model.path: ", ["choose a smaller model"]),
    ("teach", ("target",), [], inside(_Trainer, "training_step"), "target: ", ["teach.batch_size", "teach.lora"]),
    ("finetune", ("vectors",), [], inside(_Trainer, "training_step"), "vectors/forget: ", ["vector.forget.batch_size"]),
    ("ethos", (), ["vector.method=ethos"], inside(torch.linalg, "svd", no_handle), "vector.method ethos: ", ["ethos"]),
    ("perta", (), ["vector.method=perta"], inside(functional, "cross_entropy"), "vector.method perta: ", ["perta"]),
    (
        "learned",
        (),
        ["vector.method=learned"],
        inside(functional, "cross_entropy"),
        "vector.method learned: ",
        ["vector.learned.batch_size", "vector.learned.retain_batch_size"],
    ),
    ("foresee", ("foresight",), [], inside(functional, "cross_entropy"), "foresee: ", ["vector.correlation to null"]),
    ("edit", ("eval",), [], inside(Edit, "__enter__"), "sweep: ", ["eval.batch_tokens"]),
    ("sweep", ("eval",), [], inside(PackedLM, "_loglikelihood_tokens"), "sweep: ", ["eval.batch_size"]),
    ("test", ("eval",), [], inside(PackedLM, "generate_until"), "test: ", ["eval.batch_tokens"]),
    ("reference", ("reference",), [], inside(_Trainer, "training_step"), "reference: ", ["teach.batch_size"]),
    ("membership", ("membership",), [], inside(functional, "log_softmax", no_handle), "membership: ", ["holdout"]),
    (
        "benchmark",
        ("benchmark",),
        [],
        inside(PackedLM, "_loglikelihood_tokens"),
        "benchmark: ",
        ["leave benchmark out"],
    ),
    (
        "samples",
        ("robustness",),
        [],
        inside(sampling, "_written"),
        "robustness/target/samples: ",
        ["robustness.samples"],
    ),
    ("export", ("export",), ["export.merged=true"], inside(Survival, "of"), "export: ", ["export.merged"]),
]


@pytest.mark.parametrize(("stage", "gone", "settings", "place", "begins", "keys"), PLACES, ids=[p[0] for p in PLACES])
def test_every_stage_says_so_once(
    compared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stage: str,
    gone: tuple[str, ...],
    settings: list[str],
    place: Callable[[pytest.MonkeyPatch], None],
    begins: str,
    keys: list[str],
) -> None:
    write_data(tmp_path)
    done = copied(compared, tmp_path / "run", *gone)
    recipe = write_recipe(tmp_path, reuse=[str(done)] if settings else None)
    flags = [part for one in settings for part in ("--set", one)]
    place(monkeypatch)
    assert run(recipe, tmp_path / "new" if settings else done, *flags) == 2
    said = capfd.readouterr().err
    message = said[said.index("error: ") :].strip()
    assert message.startswith(f"error: {begins}")
    assert "\n" not in message
    assert "out of memory (CUDA " in message
    for key in keys:
        assert key in message
    assert "Traceback" not in said


def vector(folder: Path) -> str:
    path = folder / "vector.safetensors"
    TaskVector({"a": LowRank(torch.ones(1, 4), torch.ones(4, 1))}, {}).save(path)
    return str(path)


def test_commands_say_so_too(
    tmp_path: Path, pico_phi: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one = vector(tmp_path)
    monkeypatch.setattr(TaskVector, "sum", fail)
    assert cli.main(["vector", "sum", one, one, "-o", str(tmp_path / "sum")]) == 2
    assert "error: vectors: out of memory (CUDA out of memory. Tried" in capfd.readouterr().err
    monkeypatch.setattr(nn.Linear, "forward", fail)
    line = ["--model", "unlearn", "--model_args", f"pretrained={pico_phi},dtype=float32", "--tasks", "unlearn_mcq"]
    items = tmp_path / "items.jsonl"
    items.write_text('{"id": "1", "prompt": "One", "choices": ["a", "b"], "answer": 0, "target": "a"}\n')
    more = [
        "--include_path",
        str(Path(__file__).parent.parent / "eval"),
        "--metadata",
        f'{{"items": "{items}"}}',
        "--device",
        "cpu",
    ]
    assert cli.main(["harness", *line, *more]) == 2
    said = capfd.readouterr().err
    assert "error: unlearn: out of memory (CUDA" in said
    assert "lower batch_tokens" in said


# --- what is held at once --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> PreTrainedModel:
    """Many small layers in bfloat16: one matrix is little of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 10}
    config = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=4, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def thin(model: PreTrainedModel) -> TaskVector:
    draw = torch.Generator().manual_seed(0)
    shapes = {name: weight.shape for name, weight in weights_of(model, linear_modules(model)).items()}
    factors = {
        n: [torch.randn(s, generator=draw) for s in ((2, width), (out, 2))] for n, (out, width) in shapes.items()
    }
    return TaskVector({name: LowRank(a, b) for name, (a, b) in factors.items()})


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


ROWS = [Encoded(tuple(range(n, n + 6)), (IGNORE, *range(n + 1, n + 6))) for n in (1, 20)]
MATRIX = 64 * 128 * 4  # bytes of the largest one in float32; the model has 70 of them or half of that


def test_ethos_holds_few_matrices_beside_its_result(deep: PreTrainedModel) -> None:
    fitted = thin(deep)
    with Live() as live:
        found = ethos(fitted, Have(fitted, weights=partial(weights_of, deep)), EthosSpec())
    result = size(t for change in found.modules.values() for t in change.tensors().values())
    assert result > 40 * MATRIX  # it is dense
    assert live.peak < result + 16 * MATRIX


def test_importance_holds_one_gradient_at_a_time(deep: PreTrainedModel) -> None:
    names = tuple(linear_modules(deep))
    with Live() as live:
        found = gradients(deep, ROWS, names)
    assert live.peak < size(found.values()) + 16 * MATRIX
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in deep.parameters())
