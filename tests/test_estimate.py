"""An estimate's counts beside the real thing: transformers' models, peft's adapters, autograd's arrays, tokenizers."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes_arena import fit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unlearn import checkpoints, trainer
from unlearn.assets import recipes_folder
from unlearn.batches import ByLength, Encoded, Pad
from unlearn.errors import DataError, ModelError, RecipeError, UnlearnError
from unlearn.estimates import memory
from unlearn.estimates.config import KNOWN
from unlearn.estimates.estimate import Estimate, estimate
from unlearn.estimates.machine import MACHINES
from unlearn.estimates.options import add_options, options_of
from unlearn.estimates.passes import Beside, Pass, Training, training
from unlearn.estimates.run import _checkpoints as saved
from unlearn.estimates.shapes import Shape, lora_parameters, shape_of
from unlearn.estimates.text import render, size, span
from unlearn.estimates.tokens import TrainRow, Words, scored_item, train_row
from unlearn.estimates.work import Bench
from unlearn.finetune import encode_one
from unlearn.items import Item
from unlearn.models import Loaded, linear_modules, resolve_targets
from unlearn.recipe import EvalSpec, TrainSpec
from unlearn.recipe_io import load_recipe
from unlearn.scoring import interface
from unlearn.tree import Costs, pack

_COMMON = {"hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
_COMMON |= {"vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0}
_GPT2 = {"n_embd": 96, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 256}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_COMMON, "num_key_value_heads": 2, "head_dim": 40, "tie_word_embeddings": True},
    "llama, biased": {"model_type": "llama", **_COMMON, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **_COMMON, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **_COMMON, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", **_COMMON, "num_key_value_heads": 2, "head_dim": 32},
    "phi": {"model_type": "phi", **_COMMON},
    "phi, normed": {"model_type": "phi", **_COMMON, "qk_layernorm": True, "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2", **_GPT2, "n_inner": 320},
    "gpt2, plain": {"model_type": "gpt2", **_GPT2},
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON},
}
FOUR = ("llama", "phi", "gpt2", "gpt_neox")


def build(config: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that transformers makes of a configuration, random."""
    rest = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest), dtype=dtype)


def shape(name: str, **more: Any) -> Shape:
    """A shape by the name of its configuration."""
    return shape_of({**CONFIGS[name], **more}, name)


def adapt(model: PreTrainedModel, rank: int, targets: Any = "all-linear", depth: Any = (0.0, 1.0)) -> nn.Module:
    """peft's LoRA on the modules that the program would choose."""
    from peft import LoraConfig, get_peft_model

    names = list(resolve_targets(model, targets, depth))
    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=transposed)
    return get_peft_model(model, config)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_matrices_are_those_of_the_real_model(name: str) -> None:
    model, found = build(CONFIGS[name], "meta"), shape(name)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    real = {}
    for path, module in linear_modules(model).items():
        out, inputs = module.weight.shape if isinstance(module, nn.Linear) else tuple(module.weight.shape)[::-1]
        real[path] = (out, inputs, module.bias is not None)
    assert {one.path: (one.out, one.inputs, one.bias) for one in found.linears} == real
    assert found.window == 256
    assert found.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("microsoft/phi-1_5", 1_418_270_720),
        ("openai-community/gpt2-large", 774_030_080),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_known_models_have_the_parameters_that_are_published(name: str, count: int) -> None:
    assert shape_of(KNOWN[name], name).parameters == count
    assert sum(p.numel() for p in build(dict(KNOWN[name]), "meta").parameters()) == count


@pytest.mark.parametrize(
    ("file", "billions"), [("llama-2-7b", 6.738), ("llama-3-70b", 70.554), ("llama-3.1-405b", 405.853)]
)
def test_the_shapes_of_the_plan_have_the_sizes_they_are_known_by(file: str, billions: float) -> None:
    text = (Path(__file__).parent / "bench" / "shapes" / f"{file}.json").read_text()
    assert shape_of(json.loads(text), file).parameters / 1e9 == pytest.approx(billions, abs=5e-4)


def test_an_unknown_family_and_a_missing_size_are_said() -> None:
    with pytest.raises(ModelError, match=r"does not know models of type 'mamba' \(it knows llama, .*--config"):
        shape_of({"model_type": "mamba"}, "x/config.json")
    with pytest.raises(ModelError, match=r"x: 'vocab_size' is missing, or no number, in this config\.json of a llama"):
        shape_of({**CONFIGS["llama"], "vocab_size": "many"}, "x")
    for name, value in (("num_hidden_layers", 10**7), ("hidden_size", 10**12), ("num_attention_heads", True)):
        with pytest.raises(ModelError, match="is missing, or no number"):
            shape_of({**CONFIGS["llama"], name: value}, "x")


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("depth", [(0.0, 1.0), (0.6, 1.0)])
def test_lora_parameters_are_peft_s(name: str, depth: tuple[float, float]) -> None:
    model, found = build(CONFIGS[name]), shape(name)
    last = found.linears[-1].path.rpartition(".")[2]
    for targets in ("all-linear", (last,)):
        adapted = found.adapted(targets, depth)
        assert tuple(one.path for one in adapted) == resolve_targets(model, targets, depth)
    real = sum(p.numel() for p in adapt(model, 5, (last,), depth).parameters() if p.requires_grad)
    assert lora_parameters(adapted, 5) == real > 0


def test_a_target_that_no_matrix_has_is_said() -> None:
    with pytest.raises(ModelError, match=r"of this phi model is called q_prj\. It has q_proj, k_proj"):
        shape("phi").adapted(("q_prj", "fc1"))
    with pytest.raises(ModelError, match="anything at this depth"):
        shape("phi").adapted("all-linear", (0.4, 0.45))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_s_optimiser_holds_sixteen_bytes_a_parameter(dtype: torch.dtype) -> None:
    model = adapt(build(CONFIGS["llama"], dtype=dtype), 4)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimiser.step()
    moments = [t for state in optimiser.state.values() for t in state.values() if t.dim()]  # but the step's number
    held = sum(t.nbytes for p in learned for t in (p, p.grad)) + sum(t.nbytes for t in moments)
    found = shape("llama")
    one = Pass(1, 8, 8)
    parts = memory.training(found, found.adapted("all-linear"), 4, 4, one, checkpointing=False, plain=True, cast=4)
    assert parts["LoRA, gradients, optimiser"] == held


def kept_bytes(model: nn.Module, rows: int, width: int) -> int:
    """Bytes of all arrays that autograd keeps of a pass through the body, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = torch.randint(0, 512, (rows, width)), torch.ones(rows, width, dtype=torch.long)
    mask[1, width // 2 :] = 0
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        getattr(base, base.base_model_prefix)(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(seen.values())


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["lora", "some", "all"])
def test_what_a_layer_keeps_for_the_way_back(name: str, dtype: torch.dtype, way: str) -> None:
    """Array by array: a model of three layers keeps one layer's arrays more than one of two."""
    rows, width, rank = 2, 48, 8
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    found = shape(name)
    some = ("q_proj", "gate_proj") if name == "llama" else (found.linears[0].path.rpartition(".")[2],)
    targets: Any = "all-linear" if way == "lora" else some
    counts = []
    for count in (2, 3):
        model: nn.Module = build({**CONFIGS[name], layers: count}, dtype=dtype)
        if way != "all":
            model = adapt(model, rank, targets)
        counts.append(kept_bytes(model, rows, width))
    adapted = None if way == "all" else memory.per_layer(found, found.adapted(targets))[0]
    each = memory.kept_per_token(found, adapted, rank, dtype.itemsize, width)
    # positions' sines and masks are shared by all layers; a row or two of scalars may differ
    assert each * rows * width == pytest.approx(counts[1] - counts[0], rel=0.005 if way != "some" else 0.06)


def test_checkpointing_keeps_a_layer_s_input_only() -> None:
    found, one = shape("llama"), Pass(4, 64, 256)
    adapted = found.adapted("all-linear")
    whole, less = (memory.activations(found, adapted, 8, 2, one, way, 2) for way in (False, True))
    each = memory.kept_per_token(found, adapted[:7], 8, 2, 64, 2)
    assert whole == round(256 * each * 4)  # three layers, and one layer's gradients
    assert less == round(256 * (3 * 96 * 2 + 2 * each))


def test_only_the_layers_from_the_first_adapter_on_keep_anything() -> None:
    found, one = shape("llama"), Pass(4, 64, 256)
    last = memory.activations(found, found.adapted("all-linear", (0.6, 1.0)), 8, 4, one, False, 4)
    assert last == round(256 * memory.kept_per_token(found, found.linears[:7], 8, 4, 64) * 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_and_values_of_a_token(name: str) -> None:
    model = build(CONFIGS[name])
    cache = model(input_ids=torch.arange(11)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.key_values(shape(name), 4) * 11 == held


def test_keys_and_values_by_hand() -> None:
    # two arrays x 80 layers x 8 heads x 128 numbers x 2 bytes: the 320 KiB a token of Llama 3 70B
    text = (Path(__file__).parent / "bench" / "shapes" / "llama-3-70b.json").read_text()
    assert memory.key_values(shape_of(json.loads(text), "70b"), 2) == 2 * 80 * 8 * 128 * 2 == 320 * 1024


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 8), (torch.float32, 30), (torch.bfloat16, 30)])
def test_what_lm_eval_s_own_model_holds(dtype: torch.dtype, count: int, pico_llama: Path) -> None:
    """All arrays that are there at once, as torch's profiler sees them come and go."""
    tokenizer = AutoTokenizer.from_pretrained(pico_llama)
    model = build({**CONFIGS["llama"], "vocab_size": 32768}, dtype=dtype).eval()
    engine = interface(model, tokenizer, EvalSpec(engine="hf", batch_size=8))
    pairs = [(tokenizer.encode(f"number {n} of these"), [5, 6, 7]) for n in range(count)]
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        engine._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    here = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    longest = max(len(a) + len(b) - 1 for a, b in pairs)
    found = memory.scoring_rows(shape("llama", vocab_size=32768), dtype.itemsize, False, 8 * longest, count > 8)
    assert sum(found.values()) == pytest.approx(max(here), rel=0.1)


# -- operations -------------------------------------------------------------------------------------------------------


def counted(model: nn.Module, rows: int, width: int, back: bool) -> int:
    """Operations as torch counts them, attention written out in matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.randint(0, 512, (rows, width))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        if back:
            loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("way", ["forward", "lora", "all"])
def test_operations_are_those_that_torch_counts(name: str, way: str) -> None:
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = {**CONFIGS[name], layers: 12}
    found, rows, width, rank = shape(name, **{layers: 12}), 3, 32, 4
    model = build(config)
    model.config._attn_implementation = "eager"
    trained: nn.Module = adapt(model, rank) if way == "lora" else model
    real = counted(trained, rows, width, back=way != "forward")
    bench, tokens = Bench(found, MACHINES["cpu1"], 4), rows * width
    if way == "forward":
        assert bench.body(tokens, width) + bench.head(tokens) == real
        return
    one = Training(1, (Pass(rows, width, tokens),), 1.0)
    adapted = found.adapted("all-linear") if way == "lora" else None
    # nothing before the first layer needs a gradient, which is up to a twelfth of it less than is estimated
    assert bench.train(one, adapted, rank, False).operations == pytest.approx(real, rel=0.04)
    more = bench.train(one, adapted, rank, True).operations - bench.train(one, adapted, rank, False).operations
    assert more == bench.body(tokens, width) + (2 * lora_parameters(adapted, rank) * tokens if adapted else 0)


def test_a_pass_takes_no_less_than_its_weights_take_to_read() -> None:
    bench = Bench(shape_of(KNOWN["microsoft/phi-1_5"], "phi"), MACHINES["h100-80"], 2)
    few, many = bench.forward(1, 1, 1), bench.forward(1 << 20, 1, 1)
    machine = MACHINES["h100-80"]
    assert few.seconds >= 1_418_270_720 * 2 / machine.bandwidth > few.operations / machine.rate(2, "score")
    assert many.seconds == pytest.approx(many.operations / machine.rate(2, "score"))


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qa", "mcq", "text"])
def test_rows_are_counted_as_they_are_encoded(kind: Any, pico_phi: Path) -> None:
    tokenizer, words = AutoTokenizer.from_pretrained(pico_phi), Words(pico_phi / "tokenizer.json")
    choices = ("Paris", "Rome is far", "Oslo")
    items = [
        Item(str(n), f"Question: what is {n * 37} times {n}?\nAnswer:", answer, choices if kind == "mcq" else (), 0)
        for n, answer in enumerate(choices)
    ]
    for item in items:
        real = encode_one(item, kind, tokenizer, 10_000)
        mine = train_row(item, kind, words.count)
        assert real is not None
        assert mine == TrainRow(len(real.input_ids), sum(label != -100 for label in real.labels))
        prompt = tokenizer(item.prompt)["input_ids"]
        answers = choices if kind == "mcq" else (item.target,)
        space = "" if kind == "text" else " "
        pairs = [(prompt, tokenizer(item.prompt + space + a)["input_ids"][len(prompt) :]) for a in answers]
        scored = scored_item(item, kind, words.count, 10_000)
        (tree,) = pack(pairs, 10_000, Costs(1e-9, 1e9))  # a row is cheapest
        assert (scored.tokens, scored.heads) == (len(tree.tokens), len(set(tree.nodes.tolist())))
        assert scored.prompt == len(prompt)
        assert scored.rows == sum(len(a) + len(b) - 1 for a, b in pairs)


def _lengths(count: int) -> list[int]:
    return [10 + (n * n * 7) % 53 for n in range(count)]


@pytest.mark.parametrize(("accumulation", "steps", "epochs"), [(1, None, 2.0), (3, None, 1.5), (2, 7, None)])
def test_batches_are_as_many_and_as_wide_as_the_trainer_s(
    accumulation: int, steps: int | None, epochs: float | None
) -> None:
    spec = TrainSpec(batch_size=4, accumulation=accumulation, steps=steps, epochs=epochs)
    lengths = _lengths(101)
    found = training([TrainRow(n, n - 5) for n in lengths], spec)
    per_epoch = math.ceil(math.ceil(101 / 4) / accumulation)
    assert found.steps == (steps or math.ceil(per_epoch * (epochs or 0)))
    rows = [Encoded(tuple(range(n)), tuple(range(n))) for n in lengths]
    order = list(ByLength(rows, 4 * accumulation, 0))
    real = [Pad(0)([rows[n] for n in order[at : at + 4]])["input_ids"].shape for at in range(0, 101, 4)]
    whole = training([TrainRow(n, n - 5) for n in lengths], spec.model_copy(update={"steps": None, "epochs": 1.0}))
    wide = sum(b * t for b, t in real)
    assert sum(p.tokens for p in whole.passes) == pytest.approx(wide, rel=0.12)  # other random numbers
    assert whole.largest.width == max(lengths)
    assert found.heads == found.tokens


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("plain", {}),
        ("plain", {"accumulation": 5, "save_every": 1}),
        ("npo", {"save_every": 3}),
        ("weights", {"steps": 5, "epochs": None, "learning_rate": 1e-3, "save_every": 1}),
    ],
)
def test_steps_rows_and_checkpoints_are_those_that_the_trainer_makes(
    kind: str,
    more: dict[str, Any],
    loaded: Callable[..., Loaded],
    pico_phi: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seven rows in threes, two batches to a step: the last step of an epoch has one batch, of one row."""
    rows: list[int] = []
    sealed: list[Path] = []
    plain, seal = trainer._Trainer.compute_loss, checkpoints.seal

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return plain(self, model, inputs, *args, **kwargs)

    def seal_counted(folder: Path, processes: int) -> None:
        sealed.append(folder)
        seal(folder, processes)

    monkeypatch.setattr(trainer._Trainer, "compute_loss", compute_loss)
    monkeypatch.setattr(checkpoints, "seal", seal_counted)
    asked_for = {"steps": None, "epochs": 2.0, "accumulation": 2, **more}
    _, log = fit(loaded(pico_phi), tmp_path, kind=kind, **asked_for)
    spec = TrainSpec(batch_size=3, **{k: v for k, v in asked_for.items() if k != "learning_rate"})
    found = training([TrainRow(10, 5)] * 7, spec, copies=2 if kind == "npo" else 1)
    assert (found.steps, found.batches) == (log.steps, len(rows))
    assert sum(p.rows for p in found.passes) == sum(rows)
    assert saved(found.steps, spec, kind != "weights") == len(sealed)


def test_a_long_training_is_laid_out_in_part() -> None:
    rows = [TrainRow(n, 1) for n in _lengths(50)]
    short, long = (training(rows, TrainSpec(batch_size=4, steps=n)) for n in (400, 4000))
    assert long.batches == 10 * short.batches == 4000
    assert long.tokens == pytest.approx(10 * short.tokens)


def test_retain_rows_stand_beside_the_forget_rows_in_every_batch() -> None:
    rows, near = [TrainRow(10, 2)] * 8, [TrainRow(20, 3)] * 9
    found = training(rows, TrainSpec(batch_size=4, steps=5), Beside(near, 6, 3), everywhere=False)
    assert found.passes == (Pass(4 + 18, 20, 4 * 2 + 18 * 3),) * 5
    cut = training(rows, TrainSpec(batch_size=4, steps=5, max_length=9), Beside(near, 6, 3), everywhere=False)
    assert cut.passes == (Pass(4, 9, 4 * 1),) * 5  # of the retain rows no answer is left


# -- whole estimates --------------------------------------------------------------------------------------------------


def asked(recipe: str | Path, *words: str, overrides: Sequence[str] = ()) -> Estimate:
    """The estimate of a recipe as the command line would make it."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return estimate(load_recipe(str(recipe), overrides), options_of(parser.parse_args(list(words))))


_NEEDS = {
    "phi15_books": "harry_potter_1.txt: no such file",
    "smollm2_books": "alice_in_wonderland.txt: no such file",
    "smollm2_tofu": "forget01.json: no such file",
}


@pytest.mark.parametrize("machine", ["cpu2", "h100-80"])
@pytest.mark.parametrize("path", sorted(recipes_folder().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_can_be_estimated(path: Path, machine: str) -> None:
    rows = ("--rows", "wikitext_103=200") if path.stem == "gpt2_detox" else ()
    if path.stem in _NEEDS:
        with pytest.raises(UnlearnError, match=_NEEDS[path.stem]):
            asked(path, "--machine", machine)
        return
    found = asked(path, "--machine", machine, *rows)
    text = render(found)
    assert all(f"\n             {stage.name:11}" in text for stage in found.stages)
    assert all(stage.peak > found.run.weights > 0 and stage.work.seconds >= 0 for stage in found.stages)
    if machine == "h100-80":
        assert found.devices(found.largest.peak) == 1
        assert "fits         yes" in text


@pytest.fixture
def recipe(capitals: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe with local data, whose model's configuration stands in a folder beside it."""
    capitals("forget.jsonl", 0, 8)
    capitals("retain.jsonl", 8, 20)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**CONFIGS["llama"], "dtype": "float32"}))
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: r\nmodel: {path: model}\n"
        "forget: {kind: qa, path: forget.jsonl, shares: {train: all, validation: 0.5, test: 0.5}}\n"
        "retain: [{kind: qa, path: retain.jsonl}]\n"
        "vector: {forget: {steps: 10, batch_size: 4}}\nsweep: {coefficients: [1, 2, 3]}\n"
    )
    return file


def test_an_estimate_imports_no_torch_and_makes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    code = (
        "import json, sys\nfrom unlearn.run import main\n"
        f"code = main(['--recipe', {str(recipe)!r}, '--estimate'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=recipe.parent, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False False"
    assert "at the peak" in done.stdout
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_sweep_costs_what_its_coefficients_cost(recipe: Path) -> None:
    def work(values: str, *more: str) -> float:
        found = asked(recipe, "--machine", "cpu1", overrides=[f"sweep.coefficients={values}", *more])
        return next(s for s in found.stages if s.name == "sweep").work.operations

    assert work("[1,2,3,4,5,6,7]") == pytest.approx(2 * work("[1,2,3]"))
    assert work("[1,2,3,4,5,6,7]", "sweep.search=bisect") == pytest.approx(work("[1,2,3]"))
    assert work("[1,2,3]", "eval.generate=sweep") > 2 * work("[1,2,3]")


def test_what_a_recipe_asks_for_shows_in_its_memory(recipe: Path) -> None:
    def peak(stage: str, *overrides: str) -> dict[str, int]:
        found = asked(recipe, "--machine", "h100-80", overrides=["model.dtype=bfloat16", *overrides])
        return dict(next(s for s in found.stages if s.name == stage).held)

    plain = peak("finetune")
    weights = plain["weights"]
    assert weights == shape("llama").parameters * 2
    less = peak("finetune", "vector.forget.gradient_checkpointing=true")
    assert less["activations"] < plain["activations"]
    assert peak("finetune", "model.dtype=float32")["weights"] == 2 * weights
    packed = peak("finetune", "model.quantize=nf4")["the copy in nf4"]
    assert weights / 4 < packed < weights
    assert peak("finetune", "teach={}").keys() == plain.keys()  # the model before the teaching is let go
    teaching = peak("teach", "teach={}")
    assert (teaching["gradients"], teaching["optimiser"]) == (weights, 2 * weights)
    assert "the reference" in peak(
        "benchmark", "teach={}", "reference=train", 'benchmark={"name":"tofu","set":"forget01"}'
    )
    double = peak("sweep", "vector.method=contrast")["the edit"]
    assert double == 2 * peak("sweep")["the edit"]


def test_how_a_recipe_scores_shows_in_its_memory(recipe: Path) -> None:
    def held(*overrides: str) -> dict[str, int]:
        return dict(next(s for s in asked(recipe, overrides=overrides).stages if s.name == "test").held)

    items = asked(recipe).run.items("test")
    tokens, longest = sum(item.tokens for item in items), max(item.longest for item in items)
    assert held("eval.batch_tokens=65536")["a pass"] == memory.scoring(shape("llama"), 4, True, tokens)
    assert held("eval.batch_tokens=1")["a pass"] == memory.scoring(shape("llama"), 4, True, longest)
    few, many = (held("eval.engine=hf", f"eval.batch_size={n}") for n in (2, 1000))
    assert few["logits"] == 3 * 2 * longest * 512 * 4  # of each, the batch before as well
    assert many["logits"] == 2 * len(items) * longest * 512 * 4


def test_npo_reads_every_row_twice_in_as_many_steps(recipe: Path) -> None:
    def fitted(method: str) -> Training:
        method, duration = f"vector.method={method}", "vector.forget={epochs: 3, batch_size: 4}"
        run = asked(recipe, overrides=[method, duration, "vector.correlation=null"]).run
        return run.fit(run.rows("forget"), run.recipe.vector.forget, run.recipe.vector.steps()[0])

    away, twice = fitted("gradient_ascent"), fitted("npo")
    assert twice.steps == away.steps
    assert (twice.tokens, twice.heads) == (2 * away.tokens, 2 * away.heads)


def test_checkpoints_cost_what_is_written_and_sealed(recipe: Path) -> None:
    def seconds(*overrides: str) -> tuple[float, int]:
        one = next(s for s in asked(recipe, overrides=overrides).stages if s.name == "finetune")
        return one.work.seconds, one.passing

    (often, three), (once, one) = (seconds(f"vector.forget.save_every={n}") for n in (1, 10))
    machine = MACHINES["cpu2"]
    assert three == 3 * one > 0
    assert often - once == pytest.approx(9 * one * (1 / machine.disk + 1 / machine.hashed))


def test_a_process_keeps_what_a_stage_took_and_a_gpu_does_not() -> None:
    found = {m: {s.name: s for s in asked("quickstart.yaml", "--machine", m).stages} for m in ("cpu1", "h100-80")}
    trained, swept = found["cpu1"]["finetune"], found["cpu1"]["sweep"]
    # half of a batch's small arrays again stays between them, and all of it in the process
    assert trained.held["between the arrays"] == round(0.5 * (trained.held["activations"] + trained.held["logits"]))
    assert swept.peak == trained.peak
    assert 0 < swept.held["kept from before"] < trained.peak - found["cpu1"]["load"].peak
    assert found["h100-80"]["sweep"].peak < found["h100-80"]["finetune"].peak
    assert "kept from before" not in found["h100-80"]["sweep"].held
    model = shape_of(json.loads((Path(__file__).parent / "bench" / "shapes" / "llama-2-7b.json").read_text()), "7b")
    big = memory.training(model, None, 0, 4, Pass(8, 512, 4096), checkpointing=False, plain=True, cast=4, heap=True)
    assert big[memory.GIVEN_BACK] == 4096 * 32000 * 12  # arrays of half a gigabyte, which malloc hands back
    assert big["between the arrays"] == round(0.5 * big["activations"])


def test_what_the_balance_has_scored_is_not_scored_again(recipe: Path) -> None:
    also = 'also_forget=[{"kind":"qa","path":"retain.jsonl","name":"more","shares":{"train":"all"}}]'
    found = {s.name: s for s in asked(recipe, "--machine", "cpu1", overrides=["retain=[]", also]).stages}
    assert found["balance"].work.operations > 0 == found["sweep"].work.operations
    assert "the balance did not come by" in found["sweep"].unknown[0]


def test_a_model_that_does_not_fit_is_said_to_need_more(recipe: Path) -> None:
    shapes = Path(__file__).parent / "bench" / "shapes"
    found = asked(recipe, "--machine", "h100-80", "--config", str(shapes / "llama-3-70b.json"))
    said = " ".join(render(found).split())
    count = found.devices(found.largest.peak)
    assert 2 <= count <= 4
    assert f"needs {count} GPUs of 80.0 GB that share the weights (FSDP, or layers dealt out by a device_map)" in said
    assert "keeps the weights in full beside it" in said
    small = asked(recipe, "--machine", "h100-80", "--config", str(shapes / "llama-2-7b.json"))
    assert small.devices(small.largest.peak) == 1
    tight = asked(
        recipe, "--machine", "h100-80", "--device-memory", "12GB", "--config", str(shapes / "llama-2-7b.json")
    )
    assert tight.devices(tight.largest.peak) == 2
    assert "do not fit the 10.8 GB that may be planned for of 12.0 GB" in " ".join(render(tight).split())


def test_data_elsewhere_is_known_or_declared(recipe: Path) -> None:
    elsewhere = ["forget.path=hub:someone/news"]
    with pytest.raises(DataError, match=r"news: hub:someone/news is not on this machine.*--rows news=ROWS"):
        asked(recipe, overrides=elsewhere)
    found = asked(recipe, "--rows", "news=200x60", overrides=elsewhere)
    forget = found.run.sets[0]
    assert (len(forget.train), len(forget.scored["validation"]), len(forget.scored["test"])) == (200, 100, 100)
    assert 50 < sum(row.tokens for row in forget.train) / 200 < 70
    assert "forget news: 200 rows declared" in render(found)
    tofu = asked(recipe, overrides=["forget.path=hub:locuslab/TOFU", "forget.config=forget05"])
    assert len(tofu.run.sets[0].train) == 200
    declared = asked(recipe, "--rows", "forget=50")  # of a set that is here, too
    assert len(declared.run.sets[0].train) == 50
    with pytest.raises(DataError, match="no set called foget; it has forget, retain"):
        asked(recipe, "--rows", "foget=50")


def test_mistakes_on_the_command_line_are_said(recipe: Path) -> None:
    for words, message in (
        (("--rows", "news"), "write the name of a set"),
        (("--device-memory", "much"), "write a number and its unit"),
    ):
        with pytest.raises(RecipeError, match=message):
            asked(recipe, *words)
    with pytest.raises(ModelError, match=r"nobody/nothing is not on this machine.*--config FILE"):
        asked(recipe, overrides=["model.path=nobody/nothing"])
    (recipe.parent / "bad.json").write_text("[1]")
    with pytest.raises(ModelError, match="should be a JSON object"):
        asked(recipe, "--config", str(recipe.parent / "bad.json"))
    with pytest.raises(ModelError, match=r"none\.json: cannot be read"):
        asked(recipe, "--config", str(recipe.parent / "none.json"))


def test_applying_moves_the_checkpoint_twice(recipe: Path) -> None:
    shapes = Path(__file__).parent / "bench" / "shapes"
    found = asked(recipe, "--machine", "h100-80", "--config", str(shapes / "llama-3.1-405b.json")).applying
    assert found.moved == pytest.approx(2 * 2 * 405.853e9, rel=1e-4)
    assert found.seconds == pytest.approx(found.moved / 2e9)
    assert found.held < 8e9


def test_pico_s_sizes_are_those_that_are_built(pico_phi: Path, pico_llama: Path, pico_gpt2: Path) -> None:
    from unlearn.estimates.config import find_config
    from unlearn.recipe import ModelSpec

    for name, folder in (("phi", pico_phi), ("llama", pico_llama), ("gpt2", pico_gpt2)):
        found = find_config(ModelSpec(path=f"pico:{name}"), Path())
        built = json.loads((folder / "config.json").read_text())
        assert replace(shape_of(found.config, "")) == shape_of(built, "")


def test_a_folder_of_the_user_s_takes_no_more_disk(recipe: Path, pico_phi: Path) -> None:
    made, own = asked(recipe, overrides=["model.path=pico:phi"]), asked(recipe, overrides=[f"model.path={pico_phi}"])
    assert [one.name for one in own.stages] == [one.name for one in made.stages]
    assert made.stages[0].kept == made.run.shape.parameters * made.run.stored
    assert own.stages[0].kept == 0
    assert made.disk - own.disk == made.stages[0].kept
    assert made.stages[0].unknown
    assert not own.stages[0].unknown


def test_words_for_sizes_and_times() -> None:
    assert [size(n) for n in (0, 7e6, 1.25e9, 810e9, 1.62e12)] == ["0 MB", "7 MB", "1.2 GB", "810 GB", "1.6 TB"]
    assert [span(n) for n in (0.04, 12, 600, 7200)] == ["0.0 s", "12 s", "10 min", "2.0 h"]
