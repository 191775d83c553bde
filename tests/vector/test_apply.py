"""Streaming a vector onto a checkpoint: bit for bit what the same edit in memory gives, whatever happens on the way."""

from __future__ import annotations

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
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vector_arena import DTYPES, LAMBDA, Load, factors, files_up_to, model_vector, same, tensors

from unlearn import cli
from unlearn.errors import ModelError, RunFolderError, UnlearnError, VectorError
from unlearn.model import pico
from unlearn.model.checkpoint import INDEX, SINGLE, read_checkpoint
from unlearn.store.lock import Lock
from unlearn.vector.change import Dense, LowRank, edited
from unlearn.vector.streamed import LOCK, RECORD, apply, asked, check, plain, targets_of
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_adapter, export_merged, save_shards

Base = Callable[..., Path]


def a_vector(model: Any, ranks: tuple[int, ...] = (3,), dense: bool = False) -> TaskVector:
    return model_vector(model, 0.02, ranks, seed=3, dense=dense)


def contents(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file, but the record, which has times in it."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != RECORD
    }


def config_with(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def base(tmp_path: Path, loaded: Load) -> Base:
    """``base(pico folder, dtype="bfloat16", shards=True)``: a model as transformers saves it, in a few files or one."""

    def make(pico: Path, dtype: str = "bfloat16", shards: bool = True, name: str = "base") -> Path:
        whole = loaded(pico, dtype)
        whole.model.save_pretrained(tmp_path / name, max_shard_size="150KB" if shards else "1GB")
        whole.tokenizer.save_pretrained(tmp_path / name)
        assert (tmp_path / name / INDEX).exists() == shards
        return tmp_path / name

    return make


@pytest.fixture
def llama_base(base: Base, pico_llama: Path) -> Path:
    return base(pico_llama)


@pytest.fixture
def vector(loaded: Load, pico_llama: Path) -> TaskVector:
    return a_vector(loaded(pico_llama).model)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def command(vector: TaskVector, out: Path, coefficient: float, *more: str) -> int:
    """The command on the folder ``base`` beside ``out``."""
    vector.save(out.with_name("v.safetensors"))
    names = ["--model", str(out.with_name("base")), "--out", str(out)]
    return cli.main(["apply", str(out.with_name("v.safetensors")), *names, "--coefficient", str(coefficient), *more])


# the same bits as in memory


@pytest.mark.parametrize("shards", [True, False], ids=["sharded", "single"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folder", ["llama", "phi", "gpt2"], indirect=True)
def test_every_tensor_is_that_of_the_edit_in_memory(
    folder: Path, dtype: str, shards: bool, base: Base, loaded: Load, tmp_path: Path, out: Path
) -> None:
    folder = base(folder, dtype, shards)
    whole = loaded(folder, dtype)
    vector = a_vector(whole.model, dense=not shards)
    said = export_merged(whole.model, vector, LAMBDA, None, tmp_path / "memory")
    done = apply(vector, folder, LAMBDA, out)
    assert same(tensors(out), tensors(tmp_path / "memory"))
    assert not same(tensors(out), tensors(folder))
    # layout and everything else as in the base
    one, two = read_checkpoint(folder), read_checkpoint(out)
    assert (len(one.files) > 1) == shards
    assert one.tensors == two.tensors
    before, after = contents(folder), contents(out)
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] != after[n]} <= one.files.keys()
    # and what is said of it
    assert done.edited == len(vector.modules)
    for key, value in said["survived"].items():
        if key != "modules":
            assert done.survived[key] == pytest.approx(value, rel=1e-6)
    assert done.survived["modules"].keys() == vector.modules.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_draws_the_same_numbers(
    dtype: str, base: Base, loaded: Load, pico_llama: Path, tmp_path: Path, out: Path
) -> None:
    folder = base(pico_llama, dtype)
    whole = loaded(folder, dtype)
    vector = a_vector(whole.model)
    export_merged(whole.model, vector, LAMBDA, None, tmp_path / "memory", stochastic_rounding=True, seed=5)
    apply(vector, folder, LAMBDA, out, stochastic_rounding=True, seed=5)
    apply(vector, folder, LAMBDA, tmp_path / "other", stochastic_rounding=True, seed=6)
    assert same(tensors(out), tensors(tmp_path / "memory"))
    assert not same(tensors(out), tensors(tmp_path / "other"))
    assert not check(vector, folder, LAMBDA, out, stochastic_rounding=True, seed=5).wrong
    found = check(vector, folder, LAMBDA, out)
    assert len(found.wrong) == len(vector.modules)
    assert all("elements differ" in why for why in found.wrong.values())


def large(folder: Path, dtype: torch.dtype, odd: bool = False, **shape: int) -> Any:
    """A Llama of one layer whose tensors take several blocks, with a header of odd length if wanted; its model."""
    config = AutoConfig.for_model("llama", num_hidden_layers=1, num_attention_heads=10, **shape)
    model = AutoModelForCausalLM.from_config(config)
    g = torch.Generator().manual_seed(0)
    made = {n: (torch.randn(p.shape, generator=g) * 0.02).to(dtype) for n, p in model.named_parameters()}
    config.save_pretrained(folder)
    save_file(made, folder / SINGLE, {"format": "pt"})
    if odd:
        raw = (folder / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        head = raw[8 : 8 + length].rstrip() + b" "
        head += b" " * (1 - len(head) % 2)  # an odd number of bytes, so that no tensor is where its numbers want it
        (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])
    return model


@pytest.mark.parametrize(("dtype", "odd"), [("float32", False), ("bfloat16", True)])
def test_tensors_of_several_blocks(dtype: str, odd: bool, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "base"
    model = large(folder, DTYPES[dtype], odd, vocab_size=3000, hidden_size=1000, intermediate_size=3001)
    vector = a_vector(model, (5,))
    assert command(vector, out, LAMBDA) == 0
    before, after = tensors(folder), tensors(out)
    for name, change in vector.modules.items():
        weight = before[f"{name}.weight"]
        before[f"{name}.weight"] = edited(weight.float(), change, -LAMBDA, False).to(weight.dtype)
    assert same(before, after)
    assert not check(vector, folder, LAMBDA, out).wrong
    with files_up_to(5_000_123), pytest.raises(RunFolderError, match="File too large"):  # in the middle of a piece
        apply(vector, folder, LAMBDA, tmp_path / "cut off")
    assert {p.name for p in (tmp_path / "cut off").iterdir()} == {RECORD}
    # one wrong element in the last block, of a vector that begins after the first, is damage
    name = "model.layers.0.mlp.up_proj"
    late = torch.zeros(3001, 1)
    late[1100:] = 0.1
    change = TaskVector({name: LowRank(torch.ones(1, 1000), late)})
    apply(change, folder, LAMBDA, tmp_path / "late", accept_rounding=True)
    wrong = tensors(tmp_path / "late")
    wrong[f"{name}.weight"][3000, 0] += 1.0
    save_file(wrong, tmp_path / "late" / SINGLE)
    found = check(change, folder, LAMBDA, tmp_path / "late")
    assert found.wrong == {f"{name}.weight": f"1 of {3001 * 1000} elements differ"}


# names


def test_a_checkpoint_of_the_body_alone_and_a_vector_of_it(
    base: Base, loaded: Load, pico_gpt2: Path, tmp_path: Path, out: Path
) -> None:
    folder = base(pico_gpt2, shards=False)
    vector = a_vector(loaded(folder, "bfloat16").model)
    apply(vector, folder, LAMBDA, tmp_path / "usual")
    wanted = {n.removeprefix("transformer."): t for n, t in tensors(tmp_path / "usual").items()}
    made = {n.removeprefix("transformer."): t for n, t in load_file(folder / SINGLE).items()}
    save_file(made, folder / SINGLE, {"format": "pt"})
    bare = TaskVector({n.removeprefix("transformer."): m for n, m in vector.modules.items()})
    for name, one in (("out", vector), ("bare", bare)):
        apply(one, folder, LAMBDA, tmp_path / name)
        assert same(tensors(tmp_path / name), wanted)
    assert not check(vector, folder, LAMBDA, out).wrong
    # one weight under two names of the vector would change twice
    with pytest.raises(VectorError, match="the same weight as"):
        apply(TaskVector({**vector.modules, **bare.modules}), folder, LAMBDA, tmp_path / "both")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_copy_of_a_tied_head(llama_base: Path, vector: TaskVector, tmp_path: Path, loaded: Load) -> None:
    """Stored or not, it is the same model; with other values, transformers does not tie it and others do."""
    bare, headed = tmp_path / "bare", tmp_path / "headed"
    apply(vector, llama_base, LAMBDA, bare)
    shutil.copytree(bare, headed)
    embeddings = tensors(llama_base)["model.embed_tokens.weight"]
    for folder, head in ((llama_base, embeddings), (headed, tensors(bare)["model.embed_tokens.weight"])):
        save_file({"lm_head.weight": head.clone()}, folder / "head.safetensors")
        edit_index(folder, lambda placed: placed.update({"lm_head.weight": "head.safetensors"}))
    assert check(vector, llama_base, LAMBDA, bare).wrong == check(vector, llama_base, LAMBDA, headed).wrong == {}
    apply(vector, llama_base, LAMBDA, tmp_path / "again")
    assert torch.equal(tensors(tmp_path / "again")["lm_head.weight"], embeddings)
    (llama_base / "head.safetensors").unlink()
    edit_index(llama_base, lambda placed: placed.pop("lm_head.weight"))
    assert check(vector, llama_base, LAMBDA, headed).wrong == {}
    save_file({"lm_head.weight": embeddings + 1}, headed / "head.safetensors")
    said = "config.json ties lm_head.weight to model.embed_tokens.weight, and both are stored, with other values"
    with pytest.raises(ModelError, match=said):
        check(vector, llama_base, LAMBDA, headed)
    with pytest.raises(ModelError, match=said):
        apply(vector, headed, LAMBDA, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    # as the message says
    config_with(headed, tie_word_embeddings=False)
    apply(vector, headed, LAMBDA, tmp_path / "none")
    assert torch.equal(loaded(tmp_path / "none").model.lm_head.weight, (embeddings + 1).float())


def test_all_misfits_are_listed_and_nothing_is_written(llama_base: Path, vector: TaskVector, out: Path) -> None:
    name = next(iter(vector.modules))
    change = vector.modules[name]
    a, b = change.tensors().values()
    wrong = {
        "model.layers.7.mlp.up_proj": (change, "no such weight"),
        "model.norm": (change, "not a linear layer"),
        "lm_head": (change, "share"),
        "model.embed_tokens": (change, "not a linear layer"),
        name: (LowRank(a, torch.cat([b, b])), "the checkpoint has"),
    }
    with pytest.raises(VectorError) as caught:
        apply(TaskVector({**vector.modules, **{n: c for n, (c, _) in wrong.items()}}), llama_base, LAMBDA, out)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(wrong)
    for module, (_, why) in wrong.items():
        assert any(line.strip().startswith(f"{module}:") and why in line for line in lines), module
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: w for n, w in t.items() if "fc2" not in n}, r"mlp\.fc2: the checkpoint holds no"),
        (lambda t: {n: w.to(torch.int8) for n, w in t.items()}, "stored as I8"),
        # edits are computed in float32: 29 bits would be lost
        (lambda t: {n: w.double() for n, w in t.items()}, "stored as F64.* convert the model"),
    ],
)
def test_weights_that_cannot_be_edited(
    change: Callable[[Any], Any], said: str, base: Base, loaded: Load, pico_phi: Path, out: Path
) -> None:
    folder = base(pico_phi, shards=False)
    vector = a_vector(loaded(folder).model)
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)
    with pytest.raises(VectorError, match=said):
        apply(vector, folder, LAMBDA, out)
    assert not out.exists()


FUSED = {"hrm_text": {"head_dim": 16}, "mixtral": {"num_local_experts": 2}}


@pytest.mark.parametrize("family", FUSED)
def test_weights_that_are_renamed_on_loading_are_found_and_fused_ones_refused(
    family: str, tmp_path: Path, out: Path
) -> None:
    """Models whose files name and fuse weights otherwise than the model does."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, **FUSED[family]}
    try:
        config = AutoConfig.for_model(family, **shape)
    except ValueError:
        pytest.skip("this version of transformers does not know it")
    torch.manual_seed(0)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = a_vector(model)
    ends = ("o_proj", "down_proj") if family == "hrm_text" else ""
    named = TaskVector({n: m for n, m in whole.modules.items() if n.endswith(ends)})
    apply(named, folder, LAMBDA, out)
    export_merged(model, named, LAMBDA, None, tmp_path / "memory")
    assert same(tensors(out), tensors(tmp_path / "memory"))
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in model.state_dict().items():
        change = named.modules.get(name.removesuffix(".weight"))
        assert torch.equal(after[name], weight if change is None else edited(weight, change, -LAMBDA, False)), name
    if ends:
        assert not any(f"{n}.weight" in tensors(folder) for n in named.modules if n.endswith("o_proj"))
        with pytest.raises(VectorError) as caught:
            apply(whole, folder, LAMBDA, tmp_path / "no")
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == len(whole.modules) - len(named.modules)
        assert all("on loading" in line for line in lines)


# names that are known without asking the model's class

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "phi": {"qk_layernorm": True},
}


@pytest.mark.parametrize("more", [False, True], ids=["usual", "more"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_known_of_a_family_is_what_its_class_says(family: str, more: bool, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    assert AutoConfig.for_model(family).tie_word_embeddings is False
    config = AutoConfig.for_model(family, **shape, tie_word_embeddings=more, **(FAMILIES[family] if more else {}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint, stored = read_checkpoint(tmp_path), load_file(tmp_path / SINGLE)
    known = json.loads((tmp_path / "config.json").read_text())
    vector = TaskVector({n: m for n, m in a_vector(model).modules.items() if n != "lm_head"})
    assert len(vector.modules) == 12 * (6 if family == "phi" else 7)
    assert plain(known, stored, vector.modules)
    found, wanted = targets_of(checkpoint, vector), asked(checkpoint, vector)
    assert [(t.module, t.stored, t.transposed) for t in found] == [(t.module, t.stored, t.transposed) for t in wanted]
    # all that is not so plain is left to the class
    assert not any(plain(known, stored, [name]) for name, _ in model.named_modules() if name not in vector.modules)
    for change in ({"num_hidden_layers": 11}, {"quantization_config": {"quant_method": "fp8"}}, {"model_type": "gpt2"}):
        assert not plain({**known, **change}, stored, vector.modules)
    assert not plain(known, [*stored, "layers.0.self_attn.q_proj.weight"], vector.modules)
    assert not plain(known, [n for n in stored if "layers.3." not in n], vector.modules)


def test_a_plain_checkpoint_is_edited_without_transformers(tmp_path: Path, out: Path) -> None:
    name = "model.layers.0.mlp.fc1"
    weights = {f"{name}.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(6, 4)}
    (tmp_path / "base").mkdir()
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(6, 4)}, tmp_path / "base" / SINGLE)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "phi", "num_hidden_layers": 1}')
    TaskVector({name: LowRank(torch.ones(1, 4), torch.ones(8, 1))}).save(tmp_path / "v")
    names = [str(tmp_path / "v"), "--model", str(tmp_path / "base"), "--out", str(out), "--coefficient", "0.5"]
    code = f"""
import sys
from unlearn.cli import main
for more in ([], ["--check"]):
    assert main(["apply", *{names!r}, *more]) == 0
print(sorted({{"transformers", "peft", "scipy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert torch.equal(tensors(out)[f"{name}.weight"], torch.full((8, 4), 0.5))


# what is given


def test_an_adapters_folder_and_a_stages_folder_are_vectors_too(
    llama_base: Path, vector: TaskVector, loaded: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_adapter(vector, -1.0, "base", loaded(llama_base).model, tmp_path / "adapter")  # the vector itself
    (tmp_path / "stage").mkdir()
    vector.save(tmp_path / "stage" / "vector.safetensors")
    found = []
    for number, name in enumerate(("adapter", "stage", "stage/vector.safetensors")):
        names = [str(tmp_path / name), "--model", str(llama_base), "--out", str(tmp_path / str(number))]
        assert cli.main(["apply", *names, "--coefficient", "0.75"]) == 0
        found.append(contents(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]
    assert f"{len(vector.modules)} tensors edited" in capsys.readouterr().err
    text = (tmp_path / "1" / RECORD).read_text()
    record = json.loads(text)
    assert (record["coefficient"], record["vector_sha256"], record["finished"]) == (0.75, vector.digest(), True)
    for name in found[1]:
        assert record["files"][name]["base"][0] == (llama_base / name).stat().st_size
        assert list(record["files"][name]["survived"]) == sorted(record["files"][name]["survived"])
    assert str(tmp_path) not in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_the_head_keeps_a_weight_beside_its_factors(
    dtype: str, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter = pico.build("phi", tmp_path / "base", 0), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(adapter, save_embedding_layers=True)
    stored = tensors(adapter)
    assert any(".base_layer." in name for name in stored)
    assert apply(adapter, folder, -1.0, out).edited == 3
    assert "they are not this model's" not in capsys.readouterr().err
    if dtype == "float32":
        merged, made = tuned.merge_and_unload().state_dict(), tensors(out)
        assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in merged.items())
    # on another model that is said
    apply(adapter, pico.build("phi", tmp_path / "other", 1), -1.0, tmp_path / "out2")
    assert "they are not this model's: lm_head.weight" in " ".join(capsys.readouterr().err.split())
    # and it belongs to factors
    stored["base_model.model.model.norm.base_layer.weight"] = torch.zeros(64)
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(VectorError, match="no factor of a linear layer"):
        apply(adapter, folder, -1.0, tmp_path / "out3")


def test_mistakes_are_one_message_and_exit_code_2(
    llama_base: Path, vector: TaskVector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector.save(tmp_path / "v.safetensors")
    (tmp_path / "empty").mkdir()
    good = {"VECTOR": tmp_path / "v.safetensors", "--model": llama_base, "--coefficient": "1", "--out": tmp_path / "o"}
    for option, value, said in (
        ("VECTOR", tmp_path / "none", "No such file"),
        ("VECTOR", tmp_path / "empty", "adapter_config.json"),
        ("VECTOR", llama_base / "config.json", "cannot be read as a task vector"),
        ("--model", tmp_path / "none", "no such folder"),
        ("--model", tmp_path / "empty", "neither"),
        ("--coefficient", "nan", "must be a number"),
        ("--coefficient", "1e39", "within float32"),
        ("--out", llama_base, "the model's own folder"),
        ("--out", llama_base / "deeper", "the model's own folder"),
        ("--out", tmp_path / "v.safetensors", "not a folder"),
    ):
        values = {**good, option: value}
        names = [str(values.pop("VECTOR")), *(str(x) for pair in values.items() for x in pair)]
        assert cli.main(["apply", *names]) == 2, (option, value)
        text = capsys.readouterr().err
        assert said in text, (option, value)
        assert "Traceback" not in text
    assert not (tmp_path / "o").exists()
    assert contents(llama_base).keys() == {p.name for p in llama_base.iterdir()}
    with pytest.raises(RunFolderError, match="no such folder"):
        check(vector, llama_base, LAMBDA, tmp_path / "none")


def test_pickles_and_other_weights_are_left_out_and_said(
    llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = ("training_args.bin", "optimizer.pt", "consolidated.safetensors", "tf_model.h5", "tf.index.json")
    for name in left_out:
        (llama_base / name).write_bytes(b"x")
    (llama_base / "linked").symlink_to(llama_base)
    for place in ("chat/tool.jinja", ".git/config"):
        (llama_base / place).parent.mkdir()
        (llama_base / place).write_text("{{ messages }}")
    assert command(vector, out, LAMBDA) == 0
    said = capsys.readouterr().err
    assert all(name not in contents(out) for name in left_out)
    assert "linked (a link to a folder)" in said
    assert "consolidated.safetensors (unedited weights)" in said
    assert (out / "chat" / "tool.jinja").read_text() == "{{ messages }}"
    assert not any("git" in name for name in contents(out))


# what cannot be stored


def test_one_weight_among_millions_that_overflows_is_seen(tmp_path: Path) -> None:
    """Of large tensors a part of the rows is measured; all are looked at."""
    large(tmp_path / "base", torch.bfloat16, vocab_size=300, hidden_size=2000, intermediate_size=3000)
    for row in (1001, 2999):
        for value in (-3.3e38, -3.4e38):  # the second within float32, and above bfloat16's largest
            change = torch.zeros(3000, 2000)
            change[row, 7] = value
            vector = TaskVector({"model.layers.0.mlp.gate_proj": Dense(change)})
            edit = partial(apply, vector, tmp_path / "base", 1.0, tmp_path / f"{row}{value}", accept_rounding=True)
            if value == -3.3e38:
                assert edit().edited == 1
                continue
            with pytest.raises(VectorError, match="nothing that BF16 can hold"):
                edit()


def test_an_edit_that_rounding_has_made_another_is_refused(
    llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = 1e-3 * vector
    assert command(small, out, LAMBDA) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    for words in ("the edit has cosine 0.", "float32", "--stochastic-rounding", "adapter", "--accept-rounding"):
        assert words in said
    assert not (out / "config.json").exists()
    assert command(small, out, LAMBDA, "--accept-rounding") == 0
    kept = f"{len(list(llama_base.glob('*.safetensors')))} files of an earlier attempt kept"
    assert kept in capsys.readouterr().err
    assert not check(small, llama_base, LAMBDA, out).wrong
    shutil.rmtree(out)
    assert command(small, out, LAMBDA, "--stochastic-rounding") == 0


# damaged and hostile checkpoints; ``f`` is the folder, ``s`` its first file of weights


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(next(v for k, v in header.items() if k != "__metadata__"))
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])


def replace_first(folder: Path, value: Any) -> None:
    edit_index(folder, lambda placed: placed.update({next(iter(placed)): value}))


def twice_in_the_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    double = '"weight_map": {' + '"lm_head.weight": "x.safetensors",' * 2
    (folder / INDEX).write_text(text.replace('"weight_map": {', double, 1))


HEADER = "deserializing header"  # as safetensors says it
DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "cut off": (lambda f, s: os.truncate(s, s.stat().st_size - 1), HEADER),
    "longer": (lambda f, s: s.write_bytes(s.read_bytes() + b"x"), HEADER),
    "2**60 bytes": (lambda f, s: s.write_bytes((2**60).to_bytes(8, "little") + s.read_bytes()[8:]), HEADER),
    "nested": (lambda f, s: s.write_bytes((90_000).to_bytes(8, "little") + b"[" * 90_000), HEADER),
    "a gap": (lambda f, s: edit_header(s, lambda h: h["data_offsets"].__setitem__(0, 2)), HEADER),
    "a huge shape": (lambda f, s: edit_header(s, lambda h: h.update(shape=[2**62, 2**62])), HEADER),
    "a missing file": (lambda f, s: s.unlink(), "missing"),
    "not in its file": (lambda f, s: replace_first(f, sorted(f.glob("*.safetensors"))[-1].name), "which it does not"),
    "not in the index": (lambda f, s: edit_index(f, lambda m: m.pop(next(iter(m)))), "does not list"),
    "in the index only": (lambda f, s: edit_index(f, lambda m: m.update({"more": s.name})), "which it does not"),
    "twice in the index": (lambda f, s: twice_in_the_index(f), "plain names|says it holds|missing"),
    "in two files": (lambda f, s: save_file(tensors(f), s), "also in"),
    "an absolute name": (lambda f, s: replace_first(f, "/etc/passwd"), "plain names"),
    "a name upwards": (lambda f, s: replace_first(f, "../x.safetensors"), "plain names"),
    "an index of nothing": (lambda f, s: (f / INDEX).write_text("{}"), "weight_map"),
    "an index that is no JSON": (lambda f, s: (f / INDEX).write_text("{"), "damaged"),
    "a link outwards": (
        lambda f, s: (s.rename(f.parent / "elsewhere"), s.symlink_to(f.parent / "elsewhere")),
        "leads out of the model's folder",
    ),
    "a link to nowhere": (lambda f, s: (s.unlink(), s.symlink_to("nowhere")), "leads nowhere"),
    "another link": (lambda f, s: (f / "notes.txt").symlink_to("/etc/passwd"), "leads out of the model's folder"),
    "endless layers": (lambda f, s: config_with(f, num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "quantised": (lambda f, s: config_with(f, quantization_config={"quant_method": "fp8"}), "quantised"),
    "an adapter in it": (lambda f, s: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_checkpoints_are_one_message(
    damage: str, llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, said = DAMAGES[damage]
    harm(llama_base, sorted(llama_base.glob("*.safetensors"))[0])
    assert command(vector, out, LAMBDA) == 2
    text = capsys.readouterr().err
    assert any(words in text for words in said.split("|"))
    assert "Traceback" not in text
    assert not out.exists()


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(
    llama_base: Path, vector: TaskVector, tmp_path: Path, out: Path
) -> None:
    repository = tmp_path / "models--o--m"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(llama_base.iterdir())):
        path.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    before = contents(snapshot)
    apply(vector, snapshot, LAMBDA, out)
    assert contents(snapshot) == before
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert not check(vector, snapshot, LAMBDA, out).wrong


# the output's folder


def test_a_folder_of_somebody_elses_is_not_touched(llama_base: Path, vector: TaskVector, out: Path) -> None:
    for made in (False, True):  # before there was anything, and beside what was made
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years")
        with pytest.raises(RunFolderError, match=r"thesis\.txt"):
            apply(vector, llama_base, LAMBDA, out)
        assert (out / "thesis.txt").read_text() == "years"
        assert ([p.name for p in out.iterdir()] == ["thesis.txt"]) is not made
        (out / "thesis.txt").unlink()
        apply(vector, llama_base, LAMBDA, out)


def test_nothing_is_written_through_a_link(llama_base: Path, vector: TaskVector, out: Path, tmp_path: Path) -> None:
    apply(vector, llama_base, LAMBDA, out)
    (tmp_path / "precious").write_text("years")
    for name in (sorted(p.name for p in out.glob("*.safetensors"))[0], RECORD):
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "precious")
        with pytest.raises(RunFolderError, match="link"):
            apply(vector, llama_base, LAMBDA, out)
    assert (tmp_path / "precious").read_text() == "years"


@pytest.mark.parametrize("change", ["coefficient", "vector", "rounding", "model"])
def test_another_edit_is_refused(
    change: str, llama_base: Path, vector: TaskVector, base: Base, pico_phi: Path, out: Path, loaded: Load
) -> None:
    apply(vector, llama_base, LAMBDA, out)
    before = contents(out)
    folder = llama_base
    if change == "vector":
        vector = 2.0 * vector
    if change == "model":
        folder = base(pico_phi, shards=False, name="phi")
        vector = a_vector(loaded(folder).model)
        # of the same vector's digest, so that only the model tells
        record = json.loads((out / RECORD).read_text())
        (out / RECORD).write_text(json.dumps({**record, "vector_sha256": vector.digest()}))
    coefficient = 0.5 if change == "coefficient" else LAMBDA
    with pytest.raises(RunFolderError, match="another edit"):
        apply(vector, folder, coefficient, out, stochastic_rounding=change == "rounding")
    assert contents(out) == before


def test_no_room_is_said_before_anything_is_written(
    llama_base: Path, vector: TaskVector, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the disk cannot be filled in a test; the question to the system is all that is replaced
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RunFolderError, match="not enough space"):
        apply(vector, llama_base, LAMBDA, out)
    assert not out.exists()


# going on


def inodes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in folder.glob("*.safetensors")}


def flip(path: Path, at: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(bytes(raw))


HARMS: dict[str, Callable[[Path, Path, str], Any]] = {
    "none": lambda out, base, name: None,
    "missing": lambda out, base, name: (out / name).unlink(),
    "cut off": lambda out, base, name: os.truncate(out / name, 1000),
    "one bit": lambda out, base, name: flip(out / name),
    "base touched": lambda out, base, name: os.utime(base / name, ns=(1, 1)),
    "tokenizer": lambda out, base, name: flip(out / "tokenizer.json"),
    "half written": lambda out, base, name: (out / f".{name}.4242-00c0ffee.tmp").write_bytes(b"half"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_is_made_anew_and_the_rest_kept(
    harm: str, llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = apply(vector, llama_base, LAMBDA, out)
    before, files = contents(out), inodes(out)
    name = sorted(files)[1]
    HARMS[harm](out, llama_base, name)
    done = apply(vector, llama_base, LAMBDA, out)
    assert contents(out) == before
    assert json.loads((out / RECORD).read_text())["finished"]
    changed = {n for n, i in inodes(out).items() if files[n] != i}
    assert changed <= {name}  # an inode may be used again
    whole = harm in ("none", "tokenizer", "half written")
    assert (first.kept, done.kept) == (0, len(files) - (not whole))
    assert done.survived == first.survived
    assert ("written anew" in capsys.readouterr().err) is (harm not in ("none", "half written"))


def test_another_base_of_the_same_size_and_date_is_not_taken_for_the_first(tmp_path: Path, out: Path) -> None:
    """Images of containers and reproducible archives give all files one date."""
    one, two = (pico.build("llama", tmp_path / f"base{seed}", seed) for seed in (0, 1))
    for path in (*one.iterdir(), *two.iterdir()):
        os.utime(path, ns=(10**18, 10**18))
    vector = a_vector(AutoModelForCausalLM.from_pretrained(one))
    apply(vector, one, LAMBDA, out)
    assert apply(vector, two, LAMBDA, out).kept == 0
    assert not check(vector, two, LAMBDA, out).wrong


def stopped_at(step: int, out: Path, number: signal.Signals, work: Callable[[], int]) -> int:
    """Do ``work`` in a fork, and at the ``step``-th operation on a file in ``out`` send it a signal.

    Its exit code, or minus the signal that ended it; 100 where there are no more steps.
    """

    def act() -> int:
        count = 0

        def heard(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(out)):
                count += 1
                if count == step:
                    os.kill(os.getpid(), number)

        sys.addaudithook(heard)
        code = work()
        return code if count >= step else 100

    pid = os.fork()
    if pid == 0:
        try:
            os._exit(act())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def every_step(
    llama_base: Path, vector: TaskVector, out: Path, number: signal.Signals, steps: range
) -> Iterator[tuple[int, int]]:
    """Stop at each of some steps, look, go on, look; yields the step and the child's exit code."""
    apply(vector, llama_base, LAMBDA, out.with_name("wanted"))
    whole = contents(out.with_name("wanted"))
    for step in steps:
        shutil.rmtree(out, ignore_errors=True)
        code = stopped_at(step, out, number, lambda: command(vector, out, LAMBDA))
        if code == 100:
            return
        there = contents(out) if out.exists() else {}
        for name, digest in there.items():
            assert name.startswith(".") or whole[name] == digest, f"step {step}: {name} is not whole"
        if (out / RECORD).exists() and json.loads((out / RECORD).read_text())["finished"]:
            assert there.items() >= whole.items()
        apply(vector, llama_base, LAMBDA, out)
        assert contents(out) == whole
        assert not list(out.rglob(".*"))
        yield step, code


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
EVERY = pytest.param(signal.SIGKILL, range(1, 1000), marks=pytest.mark.slow)


@forks
@pytest.mark.parametrize(
    ("number", "steps"),
    [(signal.SIGKILL, range(1, 1000, 4)), (signal.SIGTERM, range(6, 1000, 14)), EVERY],
)
def test_stopped_at_operations_on_files(
    number: signal.Signals, steps: range, llama_base: Path, vector: TaskVector, out: Path
) -> None:
    codes = dict(every_step(llama_base, vector, out, number, steps))
    assert len(codes) >= (50 if steps.step == 1 else 2)
    ends = {-signal.SIGKILL} if number == signal.SIGKILL else {130, 0}  # 0: it came when all was done
    assert min(ends) in codes.values() or 130 in codes.values()
    assert set(codes.values()) <= ends


# --check


def test_check_finds_one_bit_in_every_tensor(
    llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in llama_base.iterdir()}
    assert command(vector, out, LAMBDA) == 0
    checkpoint = read_checkpoint(out)
    for name, stored in checkpoint.tensors.items():
        flip(checkpoint.files[stored.file], stored.end - 1)
        found = check(vector, llama_base, LAMBDA, out)
        assert found.wrong == {name: f"1 of {math.prod(stored.shape)} elements differ"}
        flip(checkpoint.files[stored.file], stored.end - 1)
    capsys.readouterr()
    assert command(vector, out, LAMBDA, "--check") == 0
    said = capsys.readouterr()
    assert "is exactly" in said.err
    assert said.out == ""
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in llama_base.iterdir()} == before


def test_check_takes_other_files_and_finds_other_vectors_and_tensors(
    llama_base: Path, vector: TaskVector, loaded: Load, out: Path
) -> None:
    """A checkpoint made in memory is cut into files otherwise; it is what counts all the same."""
    export_merged(loaded(llama_base, "bfloat16").model, vector, LAMBDA, None, out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == [SINGLE]
    assert not check(vector, llama_base, LAMBDA, out).wrong
    g = torch.Generator().manual_seed(9)
    other = vector.map(lambda _, m: factors(*m.shape, 2, g))
    assert len(check(other, llama_base, LAMBDA, out).wrong) == len(vector.modules)
    made = tensors(out)
    made["model.norm.weight"] = made["model.norm.weight"].float()
    made["more"] = torch.zeros(3)
    made.pop("model.layers.0.input_layernorm.weight")
    save_file(made, out / SINGLE)
    wrong = dict(check(vector, llama_base, LAMBDA, out).wrong)
    assert wrong.pop("model.norm.weight").startswith("F32")
    assert wrong == {"more": "the base has no such tensor", "model.layers.0.input_layernorm.weight": "missing"}


def test_another_configuration_is_a_difference_and_an_adapter_beside_an_error(
    llama_base: Path, vector: TaskVector, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(vector, out, LAMBDA) == 0
    config = (out / "config.json").read_text()
    for change, code, said in (
        ({"num_attention_heads": 2, "rms_norm_eps": 5.0}, 1, "the base's in num_attention_heads, rms_norm_eps"),
        ({"transformers_version": "0.1", "_name_or_path": "elsewhere"}, 0, ""),
        ({"attention_dropout": 0.0}, 0, ""),  # as it is without being said
        ({"dtype": "float16"}, 1, "dtype"),
        ({"model_type": "no such"}, 1, "not the base's"),
    ):
        (out / "config.json").write_text(config)
        config_with(out, **change)
        assert command(vector, out, LAMBDA, "--check") == code, change
        output = capsys.readouterr()
        assert said in output.out, change
        assert ("is not exactly" in output.err) == bool(code), change
    (out / "config.json").unlink()
    assert command(vector, out, LAMBDA, "--check") == 1
    assert "config.json: missing" in capsys.readouterr().out
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(UnlearnError, match=r"out: it holds an adapter"):
        check(vector, llama_base, LAMBDA, out)


@pytest.mark.parametrize(("dtype", "coefficient"), [("float16", 1e6), ("bfloat16", 3e38), ("float32", 3e38)])
def test_weights_that_overflow_are_refused(
    dtype: str, coefficient: float, base: Base, loaded: Load, pico_llama: Path, out: Path
) -> None:
    folder = base(pico_llama, dtype)
    vector = 100 * a_vector(loaded(folder).model)
    with pytest.raises(VectorError, match=r"model\.layers\.0\.[a-z_.]+: with coefficient .* take a smaller one"):
        apply(vector, folder, coefficient, out)
    assert not json.loads((out / RECORD).read_text())["finished"]
    assert not list(out.glob(".*.tmp"))


def test_two_at_once(llama_base: Path, vector: TaskVector, out: Path) -> None:
    out.mkdir()
    with Lock.take(out / LOCK), pytest.raises(RunFolderError, match="in use"):
        apply(vector, llama_base, LAMBDA, out)
    apply(vector, llama_base, LAMBDA, out)


@forks
def test_killed_while_damage_is_mended(llama_base: Path, vector: TaskVector, out: Path) -> None:
    codes = []
    apply(vector, llama_base, LAMBDA, out)
    whole = contents(out)
    for step in range(3, 1000, 4):
        flip(next(out.glob("*.safetensors")))
        flip(out / "tokenizer.json")
        codes.append(stopped_at(step, out, signal.SIGKILL, lambda: command(vector, out, LAMBDA)))
        apply(vector, llama_base, LAMBDA, out)
        assert contents(out) == whole, step
        if codes[-1] == 100:
            break
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 4


CHILD = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_phi15_at_its_full_size(tmp_path: Path, out: Path) -> None:
    """Random weights of 2.8 GB in bfloat16: memory far below the model's, every bit right."""
    config = AutoConfig.for_model(
        "phi",
        **{"vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
        **{"num_attention_heads": 32, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path / "base"
    config.save_pretrained(folder)
    g = torch.Generator().manual_seed(0)
    by_name = dict(model.named_parameters())
    save_shards(by_name, lambda n: (torch.randn(by_name[n].shape, generator=g) * 0.02).bfloat16(), folder, "1GB")
    vector = a_vector(model, (16,))
    vector.save(tmp_path / "v.safetensors")
    most = (tmp_path / "v.safetensors").stat().st_size + max(p.stat().st_size for p in folder.glob("*.safetensors"))
    names = ["--model", str(folder), "--out", str(out), "--coefficient", str(LAMBDA)]
    for more in ((), ("--check",)):
        words = [sys.executable, "-m", "unlearn", "apply", str(tmp_path / "v.safetensors"), *names, *more]
        done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
        assert int(done.stdout.splitlines()[-1]) <= most + 300 * 10**6
    with torch.no_grad():
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as old, safe_open(out / path.name, "pt") as new:
                assert set(old.keys()) == set(new.keys())
                for name in old.keys():  # noqa: SIM118 - a safe_open has no __iter__
                    wanted, change = old.get_tensor(name), vector.modules.get(name.removesuffix(".weight"))
                    if change is not None:
                        wanted = edited(wanted.float(), change, -LAMBDA, False).to(wanted.dtype)
                    assert torch.equal(wanted.view(torch.int16), new.get_tensor(name).view(torch.int16)), name
