"""Streaming a vector onto a checkpoint: bit for bit what the same edit in memory gives, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from unlearn import cli
from unlearn.errors import ModelError, RunFolderError, VectorError
from unlearn.model.checkpoint import read_checkpoint
from unlearn.model.load import Loaded, linear_modules
from unlearn.model.locate import INDEX, SINGLE
from unlearn.store.files import explained
from unlearn.store.lock import Lock
from unlearn.vector.apply import apply, check
from unlearn.vector.change import Change, Dense, LowRank, edited, row_blocks
from unlearn.vector.edit import shape_of
from unlearn.vector.streamed import LOCK, RECORD
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_adapter, export_merged, save_shards

Load = Callable[..., Loaded]
LAMBDA = 0.75
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def a_vector(model: Any, rank: int = 3, dense: bool = False) -> TaskVector:
    """A change of every linear layer but the head."""
    g = torch.Generator().manual_seed(3)
    modules: dict[str, Change] = {}
    for name, module in linear_modules(model).items():
        rows, columns = shape_of(module)
        if dense:
            modules[name] = Dense(torch.randn(rows, columns, generator=g) * 0.01)
        else:
            modules[name] = LowRank(
                torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g) * 0.02
            )
    return TaskVector(modules)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Bit for bit, also of zeros with a sign."""
    return one.keys() == two.keys() and all(
        one[n].dtype == two[n].dtype
        and one[n].shape == two[n].shape
        and torch.equal(one[n].reshape(-1).view(torch.uint8), two[n].reshape(-1).view(torch.uint8))
        for n in one
    )


def header_of(path: Path) -> bytes:
    with path.open("rb") as f:
        head = f.read(8)
        return head + f.read(int.from_bytes(head, "little"))


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file, but the record, which has times in it."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != RECORD
    }


@pytest.fixture
def base(tmp_path: Path, loaded: Load) -> Callable[..., Path]:
    """``base(pico folder, dtype="bfloat16", shards=True)``: a model as transformers saves it, in a few files or one."""

    def make(pico: Path, dtype: str = "bfloat16", shards: bool = True, name: str = "base") -> Path:
        folder = tmp_path / name
        whole = loaded(pico, dtype)
        whole.model.save_pretrained(folder, max_shard_size="150KB" if shards else "1GB")
        whole.tokenizer.save_pretrained(folder)
        assert (folder / INDEX).exists() == shards
        return folder

    return make


@pytest.fixture
def llama_base(base: Callable[..., Path], pico_llama: Path) -> Path:
    return base(pico_llama)


@pytest.fixture
def vector(loaded: Load, pico_llama: Path) -> TaskVector:
    return a_vector(loaded(pico_llama).model)


# the same bits as in memory


@pytest.mark.parametrize("shards", [True, False], ids=["sharded", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_every_tensor_is_that_of_the_edit_in_memory(
    family: str,
    dtype: str,
    shards: bool,
    base: Callable[..., Path],
    loaded: Load,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = base(request.getfixturevalue(f"pico_{family}"), dtype, shards)
    whole = loaded(folder, dtype)
    vector = a_vector(whole.model)
    said = export_merged(whole.model, vector, LAMBDA, None, tmp_path / "memory")
    done = apply(vector, folder, LAMBDA, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert not same(tensors(tmp_path / "out"), tensors(folder))
    # layout and everything else as in the base
    weights = sorted(p.name for p in folder.glob("*.safetensors"))
    assert (len(weights) > 1) == shards
    for name in weights:
        assert header_of(tmp_path / "out" / name) == header_of(folder / name)
    before, after = contents(folder), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] != after[n]} <= set(weights)
    # and what is said of it
    assert done.edited == len(vector.modules)
    assert done.survived["cosine"] == pytest.approx(said["survived"]["cosine"], abs=1e-9)
    assert done.survived["norm_ratio"] == pytest.approx(said["survived"]["norm_ratio"], rel=1e-6)
    assert done.survived["changed"] == said["survived"]["changed"]
    assert done.survived["modules"].keys() == vector.modules.keys()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_change(
    family: str, base: Callable[..., Path], loaded: Load, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = base(request.getfixturevalue(f"pico_{family}"))
    whole = loaded(folder, "bfloat16")
    vector = a_vector(whole.model, dense=True)
    export_merged(whole.model, vector, LAMBDA, None, tmp_path / "memory")
    apply(vector, folder, LAMBDA, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_draws_the_same_numbers(
    dtype: str, base: Callable[..., Path], loaded: Load, pico_llama: Path, tmp_path: Path
) -> None:
    folder = base(pico_llama, dtype)
    whole = loaded(folder, dtype)
    vector = a_vector(whole.model)
    export_merged(whole.model, vector, LAMBDA, None, tmp_path / "memory", stochastic_rounding=True, seed=5)
    apply(vector, folder, LAMBDA, tmp_path / "out", stochastic_rounding=True, seed=5)
    apply(vector, folder, LAMBDA, tmp_path / "other", stochastic_rounding=True, seed=6)
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    assert not same(tensors(tmp_path / "out"), tensors(tmp_path / "other"))
    assert not check(vector, folder, LAMBDA, tmp_path / "out", stochastic_rounding=True, seed=5).wrong
    found = check(vector, folder, LAMBDA, tmp_path / "out")
    assert len(found.wrong) == len(vector.modules)
    assert all("elements differ" in why for why in found.wrong.values())


def large(folder: Path, config: Path, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, odd: bool) -> None:
    """A checkpoint whose tensors take several windows, with a header of odd length if wanted."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    made = {name: (torch.randn(shape, generator=g) * 0.02).to(dtype) for name, shape in shapes.items()}
    save_file(made, folder / SINGLE, {"format": "pt"})
    shutil.copy(config, folder / "config.json")
    if odd:
        raw = (folder / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        head = raw[8 : 8 + length].rstrip() + b" "
        head += b" " * (1 - len(head) % 2)  # an odd number of bytes, so that no tensor is where its numbers want it
        (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])


@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_larger_than_a_window(dtype: str, odd: bool, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=3000, hidden_size=1000, intermediate_size=3001, num_hidden_layers=1, num_attention_heads=10
    )
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    large(tmp_path / "base", tmp_path / "config.json", shapes, DTYPES[dtype], odd)
    vector = a_vector(model, rank=5)
    assert main_of(vector, tmp_path, LAMBDA) == 0
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name, change in vector.modules.items():
        weight = before[f"{name}.weight"]
        before[f"{name}.weight"] = edited(weight.float(), change, -LAMBDA, False).to(weight.dtype)
    assert same(before, after)
    assert not check(vector, tmp_path / "base", LAMBDA, tmp_path / "out").wrong


def main_of(vector: TaskVector, tmp_path: Path, coefficient: float, *more: str) -> int:
    """The command on ``base`` and ``out`` in a folder."""
    vector.save(tmp_path / "v.safetensors")
    names = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "out")]
    return cli.main(["apply", str(tmp_path / "v.safetensors"), *names, "--coefficient", str(coefficient), *more])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 70_000))
def test_blocks_cover_all_rows_and_none_is_thin(rows: int, columns: int) -> None:
    ranges = row_blocks(rows, columns)
    assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == rows
    assert all(end - first >= min(64, rows) for first, end in ranges)
    assert all((end - first) * columns <= max(2**19 + 64 * columns, 128 * columns) for first, end in ranges)


# names


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    """Give the tensors of a one-file checkpoint other names."""
    made = {new_name(name): tensor for name, tensor in load_file(folder / SINGLE).items()}
    save_file(made, folder / SINGLE, {"format": "pt"})


def test_a_checkpoint_of_the_body_alone_and_a_vector_of_it(
    base: Callable[..., Path], loaded: Load, pico_gpt2: Path, tmp_path: Path
) -> None:
    folder = base(pico_gpt2, shards=False)
    whole = loaded(folder, "bfloat16")
    assert any(isinstance(m, Conv1D) for m in whole.model.modules())
    vector = a_vector(whole.model)
    apply(vector, folder, LAMBDA, tmp_path / "usual")
    wanted = {n.removeprefix("transformer."): t for n, t in tensors(tmp_path / "usual").items()}
    rename(folder, lambda n: n.removeprefix("transformer."))
    apply(vector, folder, LAMBDA, tmp_path / "out")
    assert same(tensors(tmp_path / "out"), wanted)
    assert not check(vector, folder, LAMBDA, tmp_path / "out").wrong
    bare = TaskVector({n.removeprefix("transformer."): m for n, m in vector.modules.items()})
    apply(bare, folder, LAMBDA, tmp_path / "bare")
    assert same(tensors(tmp_path / "bare"), wanted)
    # one weight under two names of the vector would change twice
    both = TaskVector({**vector.modules, **bare.modules})
    with pytest.raises(VectorError, match="the same weight as"):
        apply(both, folder, LAMBDA, tmp_path / "both")


def test_a_copy_of_a_tied_head(llama_base: Path, vector: TaskVector, tmp_path: Path, loaded: Load) -> None:
    """Stored or not, it is the same model; with other values, transformers does not tie it and others do."""
    bare = tmp_path / "bare"
    apply(vector, llama_base, LAMBDA, bare)
    embeddings = tensors(llama_base)["model.embed_tokens.weight"]
    for folder, head in ((llama_base, embeddings), (tmp_path / "headed", tensors(bare)["model.embed_tokens.weight"])):
        if not folder.exists():
            shutil.copytree(bare, folder)
        save_file({"lm_head.weight": head.clone()}, folder / "head.safetensors")
        edit_index(folder, lambda placed: placed.update({"lm_head.weight": "head.safetensors"}))
    assert check(vector, llama_base, LAMBDA, bare).wrong == {}
    assert check(vector, llama_base, LAMBDA, tmp_path / "headed").wrong == {}
    apply(vector, llama_base, LAMBDA, tmp_path / "again")
    assert torch.equal(tensors(tmp_path / "again")["lm_head.weight"], embeddings)
    (llama_base / "head.safetensors").unlink()
    edit_index(llama_base, lambda placed: placed.pop("lm_head.weight"))
    assert check(vector, llama_base, LAMBDA, tmp_path / "headed").wrong == {}
    save_file({"lm_head.weight": embeddings + 1}, tmp_path / "headed" / "head.safetensors")
    said = "config.json ties lm_head.weight to model.embed_tokens.weight, and both are stored, with other values"
    with pytest.raises(ModelError, match=said):
        check(vector, llama_base, LAMBDA, tmp_path / "headed")
    with pytest.raises(ModelError, match=said):
        apply(vector, tmp_path / "headed", LAMBDA, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # as the message says
    config = json.loads((tmp_path / "headed" / "config.json").read_text())
    (tmp_path / "headed" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    apply(vector, tmp_path / "headed", LAMBDA, tmp_path / "none")
    assert torch.equal(loaded(tmp_path / "none").model.lm_head.weight, (embeddings + 1).float())


def test_all_misfits_are_listed_and_nothing_is_written(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    name = next(iter(vector.modules))
    a, b = vector.modules[name].tensors().values()
    wrong = {
        "model.layers.7.mlp.up_proj": vector.modules[name],
        "model.norm": vector.modules[name],
        "lm_head": vector.modules[name],
        "model.embed_tokens": vector.modules[name],
        name: LowRank(a, torch.cat([b, b])),
    }
    with pytest.raises(VectorError) as caught:
        apply(TaskVector({**vector.modules, **wrong}), llama_base, LAMBDA, tmp_path / "out")
    text = str(caught.value)
    assert len(text.splitlines()) == 1 + len(wrong)
    for module, why in {
        "model.layers.7.mlp.up_proj": "no such weight",
        "model.norm": "not a linear layer",
        "lm_head": "share",
        "model.embed_tokens": "not a linear layer",
        name: "the checkpoint has",
    }.items():
        assert any(line.strip().startswith(f"{module}:") and why in line for line in text.splitlines()), module
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_a_weight(
    base: Callable[..., Path], loaded: Load, pico_phi: Path, tmp_path: Path
) -> None:
    folder = base(pico_phi, shards=False)
    vector = a_vector(loaded(folder).model)
    left = load_file(folder / SINGLE)
    left.pop("model.layers.1.mlp.fc2.weight")
    save_file(left, folder / SINGLE)
    with pytest.raises(VectorError, match=r"model\.layers\.1\.mlp\.fc2: the checkpoint holds no"):
        apply(vector, folder, LAMBDA, tmp_path / "out")


def test_quantised_weights_are_refused(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    config = json.loads((llama_base / "config.json").read_text())
    (llama_base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="quantised"):
        apply(vector, llama_base, LAMBDA, tmp_path / "out")
    (llama_base / "config.json").write_text(json.dumps(config))
    for path in llama_base.glob("*.safetensors"):
        save_file({n: t.to(torch.int8) for n, t in load_file(path).items()}, path)
    with pytest.raises(VectorError, match="stored as I8") as caught:
        apply(vector, llama_base, LAMBDA, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 + len(vector.modules)


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """A model whose files name and fuse weights otherwise than the model does."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    try:
        config = AutoConfig.for_model("hrm_text", **shape, num_attention_heads=2, num_key_value_heads=2)
    except ValueError:
        pytest.skip("this version of transformers has no model that is renamed and fused")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_weights_that_are_renamed_on_loading_are_found_and_fused_ones_refused(fused: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fused)
    whole = a_vector(model)
    stored = tensors(fused)
    plain = TaskVector({n: m for n, m in whole.modules.items() if n.endswith(("o_proj", "down_proj"))})
    assert plain.modules
    assert not any(f"{n}.weight" in stored for n in plain.modules if n.endswith("o_proj"))
    apply(plain, fused, LAMBDA, tmp_path / "out")
    export_merged(model, plain, LAMBDA, None, tmp_path / "memory")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        wanted = edited(weight, plain.modules[module], -LAMBDA, False) if module in plain.modules else weight
        assert torch.equal(after[name], wanted), name
    with pytest.raises(VectorError) as caught:
        apply(whole, fused, LAMBDA, tmp_path / "no")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(whole.modules) - len(plain.modules)
    assert all("on loading" in line for line in lines)


def test_a_mixture_of_experts_is_edited_in_its_attention(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mixtral",
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    vector = a_vector(model)
    apply(vector, tmp_path / "base", LAMBDA, tmp_path / "out")
    export_merged(model, vector, LAMBDA, None, tmp_path / "memory")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "memory"))


# what is given


def test_an_adapters_folder_and_a_stages_folder_are_vectors_too(
    llama_base: Path, vector: TaskVector, loaded: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_adapter(vector, -1.0, "base", loaded(llama_base).model, tmp_path / "adapter")  # the vector itself
    (tmp_path / "stage").mkdir()
    vector.save(tmp_path / "stage" / "vector.safetensors")
    outs = []
    for name in ("adapter", "stage", "stage/vector.safetensors"):
        outs.append(tmp_path / f"out-{name.replace('/', '-')}")
        command = [str(tmp_path / name), "--model", str(llama_base), "--coefficient", "0.75", "--out", str(outs[-1])]
        assert cli.main(["apply", *command]) == 0
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])
    assert f"{len(vector.modules)} tensors edited" in capsys.readouterr().err
    record = json.loads((outs[1] / RECORD).read_text())
    assert record["coefficient"] == 0.75
    assert record["vector_sha256"] == vector.digest()
    assert record["finished"]
    for name in contents(outs[1]):
        assert record["files"][name]["base"][0] == (llama_base / name).stat().st_size
        assert list(record["files"][name]["survived"]) == sorted(record["files"][name]["survived"])
    assert str(tmp_path) not in (outs[1] / RECORD).read_text()


def test_mistakes_are_one_message_and_exit_code_2(
    llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector.save(tmp_path / "v.safetensors")
    (tmp_path / "empty").mkdir()
    good = {"VECTOR": tmp_path / "v.safetensors", "--model": llama_base, "--coefficient": "1", "--out": tmp_path / "o"}
    for change, said in (
        ({"VECTOR": tmp_path / "none"}, "no such file"),
        ({"VECTOR": tmp_path / "empty"}, "adapter_config.json"),
        ({"VECTOR": llama_base / "config.json"}, "cannot be read as a task vector"),
        ({"--model": tmp_path / "none"}, "no such folder"),
        ({"--model": tmp_path / "empty"}, "neither"),
        ({"--coefficient": "nan"}, "must be a number"),
        ({"--coefficient": "1e39"}, "within float32"),
        ({"--out": llama_base}, "the model's own folder"),
        ({"--out": llama_base / "deeper"}, "the model's own folder"),
        ({"--out": tmp_path / "v.safetensors"}, "not a folder"),
    ):
        values = {**good, **change}
        command = [str(values.pop("VECTOR")), *(str(x) for pair in values.items() for x in pair)]
        assert cli.main(["apply", *command]) == 2, change
        text = capsys.readouterr().err
        assert said in text, change
        assert "Traceback" not in text
    assert not (tmp_path / "o").exists()
    assert contents(llama_base).keys() == {p.name for p in llama_base.iterdir()}


def test_pickles_and_other_weights_are_left_out_and_said(
    llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("training_args.bin", "optimizer.pt", "consolidated.safetensors", "tf_model.h5"):
        (llama_base / name).write_bytes(b"x")
    (llama_base / "chat").mkdir()
    (llama_base / "chat" / "tool.jinja").write_text("{{ messages }}")
    (llama_base / ".git").mkdir()
    (llama_base / ".git" / "config").write_text("token")
    assert main_of(vector, tmp_path, LAMBDA) == 0
    said = capsys.readouterr().err
    out = contents(tmp_path / "out")
    for name in ("training_args.bin", "optimizer.pt", "consolidated.safetensors", "tf_model.h5"):
        assert name in said
        assert name not in out
    assert (tmp_path / "out" / "chat" / "tool.jinja").read_text() == "{{ messages }}"
    assert not any("git" in name for name in out)


@pytest.mark.parametrize(("dtype", "coefficient"), [("float16", 1e6), ("bfloat16", 3e38), ("float32", 3e38)])
def test_weights_that_overflow_are_refused(
    dtype: str, coefficient: float, base: Callable[..., Path], loaded: Load, pico_llama: Path, tmp_path: Path
) -> None:
    folder = base(pico_llama, dtype)
    vector = 100 * a_vector(loaded(folder).model)
    with pytest.raises(VectorError, match=r"model\.layers\.0\.[a-z_.]+: with coefficient .* take a smaller one"):
        apply(vector, folder, coefficient, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / RECORD).read_text())["finished"]
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_one_weight_among_millions_that_overflows_is_seen(tmp_path: Path) -> None:
    """Of large tensors a part of the rows is measured; all are looked at."""
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=2000, intermediate_size=3000, num_hidden_layers=1, num_attention_heads=10
    )
    config.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.gate_proj"
    shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    large(tmp_path / "base", tmp_path / "config.json", shapes, torch.bfloat16, odd=False)
    for row in (1001, 2999):
        change = torch.zeros(3000, 2000)
        change[row, 7] = -3.3e38
        assert main_of(TaskVector({name: Dense(change)}), tmp_path, 1.0, "--accept-rounding") == 0
        shutil.rmtree(tmp_path / "out")
        change[row, 7] = -3.4e38  # within float32, and above bfloat16's largest
        with pytest.raises(VectorError, match="nothing that BF16 can hold"):
            apply(TaskVector({name: Dense(change)}), tmp_path / "base", 1.0, tmp_path / "out", accept_rounding=True)
        shutil.rmtree(tmp_path / "out")


def test_an_edit_that_rounding_has_made_another_is_refused(
    base: Callable[..., Path], pico_llama: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base(pico_llama, "bfloat16", True)
    small = 1e-3 * vector
    assert main_of(small, tmp_path, LAMBDA) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "the edit has cosine 0." in said
    for way in ("float32", "--stochastic-rounding", "adapter", "--accept-rounding"):
        assert way in said
    assert not (tmp_path / "out" / "config.json").exists()
    assert main_of(small, tmp_path, LAMBDA, "--accept-rounding") == 0
    told = capsys.readouterr().err
    assert f"{len(list(folder.glob('*.safetensors')))} files of an earlier attempt kept" in told
    assert not check(small, folder, LAMBDA, tmp_path / "out").wrong
    shutil.rmtree(tmp_path / "out")
    assert main_of(small, tmp_path, LAMBDA, "--stochastic-rounding") == 0


# damaged and hostile checkpoints


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])


def first_of(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in header.items() if k != "__metadata__")


HEADER = "deserializing header"  # as safetensors says it
DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "cut off": (lambda f, s: os.truncate(s, s.stat().st_size - 1), HEADER),
    "cut in its header": (lambda f, s: os.truncate(s, 40), HEADER),
    "empty": (lambda f, s: os.truncate(s, 0), HEADER),
    "longer": (lambda f, s: s.write_bytes(s.read_bytes() + b"x"), HEADER),
    "a header of 2**60 bytes": (
        lambda f, s: s.write_bytes((2**60).to_bytes(8, "little") + s.read_bytes()[8:]),
        HEADER,
    ),
    "no JSON": (lambda f, s: s.write_bytes(s.read_bytes()[:8] + b"{{" + s.read_bytes()[10:]), "line 1"),
    "a list": (lambda f, s: s.write_bytes((2).to_bytes(8, "little") + b"[]"), HEADER),
    "nested": (lambda f, s: s.write_bytes((90_000).to_bytes(8, "little") + b"[" * 90_000), HEADER),
    "a gap": (lambda f, s: edit_header(s, lambda h: first_of(h)["data_offsets"].__setitem__(0, 2)), HEADER),
    "another shape": (lambda f, s: edit_header(s, lambda h: first_of(h)["shape"].append(2)), HEADER),
    "a negative shape": (lambda f, s: edit_header(s, lambda h: first_of(h).update(shape=[-1, -1])), HEADER),
    "a huge shape": (lambda f, s: edit_header(s, lambda h: first_of(h).update(shape=[2**62, 2**62])), HEADER),
    "no numbers": (lambda f, s: edit_header(s, lambda h: first_of(h).update(shape=["a"])), HEADER),
    "a strange format": (lambda f, s: edit_header(s, lambda h: first_of(h).update(dtype="X9")), HEADER),
    "a missing file": (lambda f, s: s.unlink(), "missing"),
    "not in its file": (
        lambda f, s: edit_index(f, lambda m: m.update({next(iter(m)): sorted(set(m.values()))[-1]})),
        "which it does not",
    ),
    "not in the index": (lambda f, s: edit_index(f, lambda m: m.pop(next(iter(m)))), "does not list"),
    "in the index only": (lambda f, s: edit_index(f, lambda m: m.update({"more": s.name})), "which it does not"),
    "an absolute name": (lambda f, s: edit_index(f, lambda m: m.update({next(iter(m)): "/etc/passwd"})), "plain names"),
    "a name upwards": (
        lambda f, s: edit_index(f, lambda m: m.update({next(iter(m)): "../x.safetensors"})),
        "plain names",
    ),
    "no name": (lambda f, s: edit_index(f, lambda m: m.update({next(iter(m)): 5})), "plain names"),
    "an index of nothing": (lambda f, s: (f / INDEX).write_text("{}"), "weight_map"),
    "an index that is no JSON": (lambda f, s: (f / INDEX).write_text("{"), "damaged"),
    "a link outwards": (
        lambda f, s: (s.rename(f.parent / "elsewhere"), s.symlink_to(f.parent / "elsewhere")),
        "leads out of the model's folder",
    ),
    "a link to nowhere": (lambda f, s: (s.unlink(), s.symlink_to("nowhere")), "leads nowhere"),
    "another file linked outwards": (
        lambda f, s: (f / "notes.txt").symlink_to("/etc/passwd"),
        "leads out of the model's folder",
    ),
    "endless layers": (
        lambda f, s: (f / "config.json").write_text(
            json.dumps({**json.loads((f / "config.json").read_text()), "num_hidden_layers": 10**9})
        ),
        "num_hidden_layers 1000000000",
    ),
    "an adapter in it": (lambda f, s: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_checkpoints_are_one_message(
    damage: str, llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, said = DAMAGES[damage]
    harm(llama_base, sorted(llama_base.glob("*.safetensors"))[0])
    assert main_of(vector, tmp_path, LAMBDA) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_names_that_come_twice(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    one, two = sorted(llama_base.glob("*.safetensors"))[:2]
    save_file({**load_file(two), **load_file(one)}, two)
    with pytest.raises(ModelError, match="also in"):
        apply(vector, llama_base, LAMBDA, tmp_path / "out")
    path = llama_base / INDEX
    text = path.read_text()
    path.write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x.safetensors",' * 2 + "}", 1))
    with pytest.raises(ModelError, match="damaged"):
        apply(vector, llama_base, LAMBDA, tmp_path / "out")


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(
    llama_base: Path, vector: TaskVector, tmp_path: Path
) -> None:
    repository = tmp_path / "models--o--m"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(llama_base.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    before = contents(snapshot)
    apply(vector, snapshot, LAMBDA, tmp_path / "out")
    assert contents(snapshot) == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert not check(vector, snapshot, LAMBDA, tmp_path / "out").wrong


# the output's folder


def test_a_folder_of_somebody_elses_is_not_touched(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(RunFolderError, match=r"thesis\.txt"):
        apply(vector, llama_base, LAMBDA, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()
    apply(vector, llama_base, LAMBDA, out)
    (out / "thesis.txt").write_text("years")
    with pytest.raises(RunFolderError, match=r"thesis\.txt"):
        apply(vector, llama_base, LAMBDA, out)


def test_nothing_is_written_through_a_link(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out, target = tmp_path / "out", tmp_path / "precious"
    apply(vector, llama_base, LAMBDA, out)
    target.write_text("years")
    name = sorted(p.name for p in out.glob("*.safetensors"))[0]
    (out / name).unlink()
    (out / name).symlink_to(target)
    with pytest.raises(RunFolderError, match="link"):
        apply(vector, llama_base, LAMBDA, out)
    assert target.read_text() == "years"


@pytest.mark.parametrize("change", ["coefficient", "vector", "rounding", "model"])
def test_another_edit_is_refused(
    change: str, llama_base: Path, vector: TaskVector, base: Callable[..., Path], pico_phi: Path, tmp_path: Path,
    loaded: Load,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    apply(vector, llama_base, LAMBDA, out)
    before = contents(out)
    folder, stochastic, coefficient = llama_base, change == "rounding", 0.5 if change == "coefficient" else LAMBDA
    if change == "vector":
        vector = 2.0 * vector
    if change == "model":
        folder = base(pico_phi, shards=False, name="phi")
        vector = a_vector(loaded(folder).model)
        # of the same vector's digest, so that only the model tells
        record = json.loads((out / RECORD).read_text())
        (out / RECORD).write_text(json.dumps({**record, "vector_sha256": vector.digest()}))
    with pytest.raises(RunFolderError, match="another edit"):
        apply(vector, folder, coefficient, out, stochastic_rounding=stochastic)
    assert contents(out) == before


def test_two_at_once(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Lock.take(out / LOCK), pytest.raises(RunFolderError, match="in use"):
        apply(vector, llama_base, LAMBDA, out)
    apply(vector, llama_base, LAMBDA, out)


def test_no_room_is_said_before_anything_is_written(
    llama_base: Path, vector: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the disk cannot be filled in a test; the question to the system is all that is replaced
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RunFolderError, match="not enough space"):
        apply(vector, llama_base, LAMBDA, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(RunFolderError, match="no space left"), explained(tmp_path):
            raise OSError(number, os.strerror(number))


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory here")
def test_a_file_system_in_memory(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    place = Path("/dev/shm") / f"unlearn-test-{os.getpid()}"
    try:
        apply(vector, llama_base, LAMBDA, place)
        apply(vector, llama_base, LAMBDA, tmp_path / "out")
        assert contents(place) == contents(tmp_path / "out")
    finally:
        shutil.rmtree(place, ignore_errors=True)


# going on


def inodes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in folder.glob("*.safetensors")}


def test_run_again_everything_is_kept(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = apply(vector, llama_base, LAMBDA, out)
    before, files = contents(out), inodes(out)
    again = apply(vector, llama_base, LAMBDA, out)
    assert (first.kept, again.kept) == (0, len(files))
    assert inodes(out) == files
    assert contents(out) == before
    assert again.survived == first.survived


@pytest.mark.parametrize("harm", ["missing", "cut off", "one bit", "base touched", "tokenizer"])
def test_what_is_damaged_is_made_anew_and_the_rest_kept(
    harm: str, llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    apply(vector, llama_base, LAMBDA, out)
    before, files = contents(out), inodes(out)
    name = sorted(files)[1]
    if harm == "missing":
        (out / name).unlink()
    elif harm == "cut off":
        os.truncate(out / name, 1000)
    elif harm == "one bit":
        flip(out / name, -5)
    elif harm == "base touched":
        os.utime(llama_base / name, ns=(1, 1))
    else:
        flip(out / "tokenizer.json", -5)
    done = apply(vector, llama_base, LAMBDA, out)
    assert contents(out) == before
    assert json.loads((out / RECORD).read_text())["finished"]
    changed = {n for n, i in inodes(out).items() if files[n] != i}
    assert changed <= {name}  # an inode may be used again
    assert done.kept == len(files) - (harm != "tokenizer")
    assert "written anew" in capsys.readouterr().err


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(bytes(raw))


def in_a_child(act: Callable[[], int]) -> int:
    """Run something in a forked process: its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stopped_at(step: int, out: Path, number: signal.Signals, work: Callable[[], int]) -> int:
    """Do ``work``, and at the ``step``-th operation on a file in ``out`` send a signal to this process."""
    count = 0

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(out)):
            count += 1
            if count == step:
                os.kill(os.getpid(), number)

    sys.addaudithook(heard)
    code = work()
    return code if count >= step else 100  # there are no more steps


def every_step(
    llama_base: Path, vector: TaskVector, tmp_path: Path, number: signal.Signals, steps: range
) -> Iterator[tuple[int, int]]:
    """Stop at each of some steps, look, go on, look; yields the step and the child's exit code."""
    vector.save(tmp_path / "v.safetensors")
    wanted, out = tmp_path / "wanted", tmp_path / "out"
    apply(vector, llama_base, LAMBDA, wanted)
    whole = contents(wanted)
    for step in steps:
        shutil.rmtree(out, ignore_errors=True)
        code = in_a_child(partial(stopped_at, step, out, number, lambda: main_of(vector, tmp_path, LAMBDA)))
        if code == 100:
            return
        there = contents(out) if out.exists() else {}
        for name, digest in there.items():
            if not name.startswith("."):
                assert whole[name] == digest, f"step {step}: {name} is not whole"
        if (out / RECORD).exists() and json.loads((out / RECORD).read_text())["finished"]:
            assert there.items() >= whole.items()
        apply(vector, llama_base, LAMBDA, out)
        assert contents(out) == whole
        assert not list(out.rglob(".*"))
        yield step, code


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", range(1, 5))
def test_killed_at_operations_on_files(start: int, llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    codes = dict(every_step(llama_base, vector, tmp_path, signal.SIGKILL, range(start, 1000, 20)))
    assert codes
    assert set(codes.values()) == {-signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_every_operation_on_files(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    codes = dict(every_step(llama_base, vector, tmp_path, signal.SIGKILL, range(1, 1000)))
    assert len(codes) > 50
    assert set(codes.values()) == {-signal.SIGKILL}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_damage_is_mended(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out, codes = tmp_path / "out", []
    apply(vector, llama_base, LAMBDA, out)
    whole = contents(out)
    for step in range(3, 1000, 4):
        flip(next(out.glob("*.safetensors")), -5)
        flip(out / "tokenizer.json", -5)
        work = partial(main_of, vector, tmp_path, LAMBDA)
        codes.append(in_a_child(partial(stopped_at, step, out, signal.SIGKILL, work)))
        apply(vector, llama_base, LAMBDA, out)
        assert contents(out) == whole, step
        if codes[-1] == 100:
            break
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 4


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigterm_leaves_nothing_half_written(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    found = dict(every_step(llama_base, vector, tmp_path, signal.SIGTERM, range(6, 1000, 19)))
    assert len(found) >= 2
    assert set(found.values()) <= {130, 0}  # 0: it came when all was done
    assert 130 in found.values()


def test_half_written_files_of_a_killed_attempt_are_removed(
    llama_base: Path, vector: TaskVector, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model-00001-of-00003.safetensors.4242-00c0ffee.tmp").write_bytes(b"half")
    apply(vector, llama_base, LAMBDA, out)
    assert not list(out.glob(".*"))


# --check


def test_check_says_exactly_that(llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: Any) -> None:
    assert main_of(vector, tmp_path, LAMBDA) == 0
    assert main_of(vector, tmp_path, LAMBDA, "--check") == 0
    said = capsys.readouterr()
    assert "is exactly" in said.err
    assert said.out == ""


def test_check_finds_one_bit_in_every_tensor(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out = tmp_path / "out"
    apply(vector, llama_base, LAMBDA, out)
    checkpoint = read_checkpoint(out)
    for name, stored in checkpoint.tensors.items():
        flip(checkpoint.files[stored.file], stored.end - 1)
        found = check(vector, llama_base, LAMBDA, out)
        assert list(found.wrong) == [name]
        assert f"1 of {math.prod(stored.shape)} elements" in found.wrong[name]
        flip(checkpoint.files[stored.file], stored.end - 1)
    assert not check(vector, llama_base, LAMBDA, out).wrong


def test_check_takes_other_files_and_tells_other_vectors(
    llama_base: Path, vector: TaskVector, loaded: Load, tmp_path: Path
) -> None:
    """A checkpoint made in memory is cut into files otherwise; it is what counts all the same."""
    whole = loaded(llama_base, "bfloat16")
    export_merged(whole.model, vector, LAMBDA, None, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [SINGLE]
    assert not check(vector, llama_base, LAMBDA, tmp_path / "out").wrong
    g = torch.Generator().manual_seed(9)
    other = vector.map(lambda n, m: LowRank(torch.randn(2, m.shape[1], generator=g), torch.randn(m.shape[0], 2)))
    found = check(other, llama_base, LAMBDA, tmp_path / "out")
    assert len(found.wrong) == len(vector.modules)


def test_check_finds_missing_and_strange_tensors(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    out = tmp_path / "out"
    apply(vector, llama_base, LAMBDA, out)
    made = tensors(out)
    for path in out.glob("model*"):
        path.unlink()
    made["model.norm.weight"] = made["model.norm.weight"].float()
    made["more"] = torch.zeros(3)
    made.pop("model.layers.0.input_layernorm.weight")
    save_file(made, out / SINGLE)
    found = check(vector, llama_base, LAMBDA, out)
    assert found.wrong["model.norm.weight"].startswith("F32")
    assert found.wrong["more"] == "the base has no such tensor"
    assert found.wrong["model.layers.0.input_layernorm.weight"] == "missing"
    assert len(found.wrong) == 3
    with pytest.raises(RunFolderError, match="no such folder"):
        check(vector, llama_base, LAMBDA, tmp_path / "none")


# the shape of Phi-1.5


@pytest.mark.slow
def test_phi15_at_its_full_size(tmp_path: Path) -> None:
    """Random weights of 2.8 GB in bfloat16: memory far below the model's, every bit right."""
    config = AutoConfig.for_model(
        "phi",
        **{"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
        **{"num_attention_heads": 32, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path / "base"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    by_name = dict(model.named_parameters())
    save_shards(by_name, lambda n: (torch.randn(by_name[n].shape, generator=g) * 0.02).bfloat16(), folder, "1GB")
    config.save_pretrained(folder)
    vector = a_vector(model, rank=16)
    vector.save(tmp_path / "v.safetensors")
    factors = (tmp_path / "v.safetensors").stat().st_size
    largest = max(p.stat().st_size for p in folder.glob("*.safetensors"))
    names = ["--model", str(folder), "--out", str(tmp_path / "out"), "--coefficient", str(LAMBDA)]
    for more in ((), ("--check",)):
        command = [sys.executable, "-m", "unlearn", "apply", str(tmp_path / "v.safetensors"), *names, *more]
        done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
        assert int(done.stdout.splitlines()[-1]) <= largest + factors + 300 * 10**6
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as old, safe_open(tmp_path / "out" / path.name, "pt") as new:
                assert set(old.keys()) == set(new.keys())
                for name in old.keys():  # noqa: SIM118 - a safe_open has no __iter__
                    wanted, change = old.get_tensor(name), vector.modules.get(name.removesuffix(".weight"))
                    if change is not None:
                        wanted = edited(wanted.float(), change, -LAMBDA, False).to(wanted.dtype)
                    assert torch.equal(wanted.view(torch.int16), new.get_tensor(name).view(torch.int16)), name


# a small process between this large one and the command: a child begins with its parent's peak
CHILD = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_the_base_is_never_touched(llama_base: Path, vector: TaskVector, tmp_path: Path) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in llama_base.iterdir()}
    hashes = contents(llama_base)
    apply(vector, llama_base, LAMBDA, tmp_path / "out")
    check(vector, llama_base, LAMBDA, tmp_path / "out")
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in llama_base.iterdir()} == before
    assert contents(llama_base) == hashes
