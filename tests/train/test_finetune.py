"""Fine-tuning: what carries loss, the vector against PEFT's own files, and the same result after any interruption."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from train_arena import per_token
from transformers.pytorch_utils import Conv1D

from unlearn import processes as stopping
from unlearn.data.encoding import IGNORE, Encoded, encode
from unlearn.data.items import Item
from unlearn.errors import ModelError, TrainingError, VectorError
from unlearn.model.load import Loaded, linear_modules
from unlearn.model.pico import corpus
from unlearn.recipe.methods import GradientDifferenceSpec, LoraSpec, RetainKLSpec, TrainSpec
from unlearn.store.stages import STAGE_FILE
from unlearn.train import trainer
from unlearn.train import vectors as finetune
from unlearn.train.batches import ByLength
from unlearn.train.losses import Against, Keep
from unlearn.train.trainer import TrainingLog, last_checkpoint, seal
from unlearn.train.vectors import merge, train_vector, train_weights
from unlearn.vector.change import LowRank
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
Go = Callable[..., tuple[TaskVector, TrainingLog]]
FACTS = [
    ("Bhutan", "Thimphu"),
    ("Iceland", "Reykjavik"),
    ("Mongolia", "Ulaanbaatar"),
    ("Fiji", "Suva"),
    ("Malta", "Valletta"),
    ("Latvia", "Riga"),
]


def item(prompt: str, target: str) -> Item:
    return Item("0" * 16, prompt, target)


def facts() -> list[Item]:
    return [item(f"Question: What is the capital of {country}?\nAnswer:", city) for country, city in FACTS]


def rows_of(model: Loaded) -> list[Encoded]:
    return encode(facts(), "qa", model.tokenizer, 64)


def train_spec(**values: Any) -> TrainSpec:
    defaults = {"steps": 6, "learning_rate": 1e-2, "batch_size": 2}
    return TrainSpec.model_validate(defaults | values)


def train(
    model: Loaded,
    work: Path,
    spec: TrainSpec | None = None,
    lora: LoraSpec | None = None,
    seed: int = 0,
    rows: list[Encoded] | None = None,
    **more: Any,
) -> tuple[TaskVector, TrainingLog]:
    return train_vector(
        model.model,
        model.tokenizer,
        rows or rows_of(model),
        spec or train_spec(),
        lora or LoraSpec(rank=4, alpha=8),
        seed,
        work,
        "forget",
        {"set": "forget"},
        **more,
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


# --- the vector ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where PEFT itself saves the adapter that is trained, before a vector is read off it."""
    plain = finetune.read_adapter

    def save_first(peft_model: Any, meta: dict[str, str]) -> TaskVector:
        peft_model.save_pretrained(tmp_path / "adapter")
        return plain(peft_model, meta)

    monkeypatch.setattr(finetune, "read_adapter", save_first)
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", ["phi", "llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_vector_is_what_peft_saved(
    loaded: Load, request: pytest.FixtureRequest, tmp_path: Path, saved: Path, family: str, rslora: bool
) -> None:
    folder = request.getfixturevalue(f"pico_{family}")
    model = loaded(folder)
    before = state(model.model)
    vector, log = train(model, tmp_path / "work", train_spec(steps=4), LoraSpec(rank=4, alpha=10, rslora=rslora))
    assert log.steps == 4
    assert_same_state(model.model, before)
    assert not any("lora" in name for name, _ in model.model.named_modules())

    tensors = load_file(saved / "adapter_model.safetensors")
    settings = json.loads((saved / "adapter_config.json").read_text())
    scale = 10 / math.sqrt(4) if rslora else 10 / 4
    assert settings["use_rslora"] is rslora
    assert settings["fan_in_fan_out"] is (family == "gpt2")
    assert set(vector.modules) == set(linear_modules(model.model))
    for name, m in vector.modules.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        assert m.A.dtype == torch.float32
        torch.testing.assert_close(m.delta().double(), scale * b @ a, atol=1e-7, rtol=1e-5)
    assert dict(vector.meta) == {"set": "forget", "rank": "4", "alpha": "10.0"}

    # and with nothing of ours: plain PEFT on a fresh model gives the logits of theta + tau
    peft_model = PeftModel.from_pretrained(loaded(folder).model, str(saved)).eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad(), subtracted(model.model, vector, -1.0):
        edited = model.model(ids).logits
        torch.testing.assert_close(edited, peft_model(ids).logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (edited - model.model(ids).logits).abs().max() > 0.1


def test_the_facts_are_learned(phi: Loaded, tmp_path: Path) -> None:
    rows = rows_of(phi)
    vector, log = train(
        phi, tmp_path, train_spec(steps=30, batch_size=6, learning_rate=3e-2, schedule="constant_with_warmup")
    )
    assert len(log.losses) == log.steps == 30
    assert log.examples == 6
    assert log.losses[0] > 5.0
    assert log.losses[-1] < 1.5
    # the Trainer's first loss is the plain mean over the answers' tokens, before any step
    start = per_token(phi.model, rows)
    assert log.losses[0] == pytest.approx(start, rel=1e-3)
    with subtracted(phi.model, vector, -1.0):
        assert per_token(phi.model, rows) < 1.5
    with subtracted(phi.model, vector, 1.0):
        assert per_token(phi.model, rows) > start + 1.0
    assert per_token(phi.model, rows) == pytest.approx(start)


def test_padding_has_no_part_in_it(phi: Loaded, tmp_path: Path) -> None:
    """Rows of very different lengths in one batch: the loss is the mean over all their labelled tokens."""
    rows = encode([item("A", "dog"), item(" ".join(corpus()[:3]), "Paris is far away")], "qa", phi.tokenizer, 512)
    _, log = train(phi, tmp_path, train_spec(steps=1, warmup=0.0), rows=rows)
    assert log.losses[0] == pytest.approx(per_token(phi.model, rows), rel=1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 1.0), (2, 1.0)])
def test_the_warmup_leaves_a_step_that_moves(phi: Loaded, tmp_path: Path, steps: int, warmup: float) -> None:
    rows = encode([item("A", "dog")], "qa", phi.tokenizer, 64)
    vector, _ = train(phi, tmp_path, train_spec(steps=steps, warmup=warmup), rows=rows)
    assert vector.norm() > 0


def test_accumulated_batches_are_one_batch(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    one, log_one = train(loaded(pico_phi), tmp_path / "1", train_spec(steps=3, batch_size=6))
    two, log_two = train(loaded(pico_phi), tmp_path / "2", train_spec(steps=3, batch_size=2, accumulation=3))
    assert log_two.losses == pytest.approx(log_one.losses, rel=1e-3)
    assert one.cosine(two) > 0.999
    assert log_two.steps == 3


@pytest.mark.parametrize(
    ("spec", "steps"), [({"epochs": 3}, 6), ({"epochs": 0.5, "warmup": 0.0}, 1), ({"steps": 5}, 5)]
)
def test_epochs_and_steps(phi: Loaded, tmp_path: Path, spec: dict[str, Any], steps: int) -> None:
    """6 rows, batches of 4: two steps an epoch."""
    _, log = train(phi, tmp_path, TrainSpec(**spec, batch_size=4, learning_rate=1e-3))
    assert log.steps == steps
    shown = log.to_json("forget")
    assert (shown["stage"], shown["examples"], shown["steps"]) == ("forget", 6, steps)
    assert (shown["loss_first"], shown["loss_last"]) == (log.losses[0], log.losses[-1])
    assert len(shown["losses"]) == steps


@pytest.mark.parametrize("penalised", [False, True])
def test_the_model_s_settings_stay_as_they_are(phi: Loaded, tmp_path: Path, penalised: bool) -> None:
    """Also those that the Trainer likes to bring in line with a tokenizer's: they are exported with the model."""
    phi.model.config.pad_token_id = None
    phi.model.generation_config.pad_token_id = None
    config, generation = phi.model.config.to_dict(), phi.model.generation_config.to_dict()
    keep = Keep(rows_of(phi)[:2], RetainKLSpec(batch_size=1, coefficients=(0.5, 3.0))) if penalised else None
    train(phi, tmp_path, train_spec(steps=2), keep=keep)
    assert phi.model.config.to_dict() == config
    assert phi.model.generation_config.to_dict() == generation


def test_the_seed_decides_everything(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    lora = LoraSpec(rank=4, alpha=8, dropout=0.1)
    made = []
    for number, (seed, checkpointing) in enumerate([(0, False), (0, False), (1, False), (0, True), (0, True)]):
        torch.manual_seed(number)  # what ran before does not matter
        spec = train_spec(gradient_checkpointing=checkpointing)
        made.append(train(loaded(pico_phi), tmp_path / str(number), spec, lora, seed))
    digests = [(vector.digest(), log.losses) for vector, log in made]
    assert digests[0] == digests[1] != digests[2]
    assert digests[3] == digests[4]
    assert made[3][0].cosine(made[0][0]) > 0.9999, "gradient checkpointing changes nothing"


def test_a_16_bit_model_is_trained_in_float32_factors(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    model = loaded(pico_phi, "bfloat16")
    before = state(model.model)
    vector, log = train(model, tmp_path, train_spec(steps=8, batch_size=6))
    assert_same_state(model.model, before)
    assert log.losses[-1] < log.losses[0] - 1
    low_bits = [m.A.view(torch.int32) & 0xFFFF for m in vector.modules.values()]
    assert any(bool(bits.any()) for bits in low_bits)  # not merely widened from 16 bits


def test_on_four_bit_weights(pico_phi: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from unlearn.model.load import load
    from unlearn.recipe.schema import ModelSpec

    spec = ModelSpec.model_validate({"path": str(pico_phi), "device": "cpu", "dtype": "float32", "quantize": "nf4"})
    model = load(spec, str(pico_phi), for_training=True)
    vector, log = train(model, tmp_path, train_spec(steps=8, batch_size=6))
    assert log.losses[-1] < log.losses[0] - 1
    full = load(spec, str(pico_phi))
    assert set(vector.modules) == set(linear_modules(full.model))
    before = per_token(full.model, rows_of(full)[:1])
    with subtracted(full.model, vector, -1.0):  # the edit goes on full precision
        assert per_token(full.model, rows_of(full)[:1]) < before - 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "error", "said"),
    [
        ({"targets": ("q_proj", "query_proj")}, ModelError, r"no linear layer .* is called query_proj"),
        ({"alpha_pattern": {"c1": 3}}, ModelError, r"vector.lora.alpha_pattern: none of the modules with an adapter"),
        ({"rank_pattern": {"fc1": 999}}, VectorError, "rank 999 is above"),
        ({"rank": 65}, VectorError, "rank 65 is above what these matrices can have"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_before_training(
    phi: Loaded, tmp_path: Path, lora: dict[str, Any], error: type[Exception], said: str
) -> None:
    before = state(phi.model)
    with pytest.raises(error, match=said):
        train(phi, tmp_path, lora=LoraSpec(**{"rank": 4, **lora}))
    assert_same_state(phi.model, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number(phi: Loaded, tmp_path: Path, value: float) -> None:
    weight = phi.model.get_submodule("model.layers.0.mlp.fc1").weight
    assert isinstance(weight, Tensor)
    weight.data[0, 0] = value
    with pytest.raises(TrainingError, match="the loss became nan at step 1: lower learning_rate"):
        train(phi, tmp_path)
    assert not any("lora" in name for name, _ in phi.model.named_modules())  # the adapter is off all the same
    assert last_checkpoint(tmp_path) is None


def test_a_rate_that_moves_nothing(phi: Loaded, tmp_path: Path) -> None:
    """So small that every update of B, which starts at zero, underflows."""
    with pytest.raises(TrainingError, match="forget: the adapter did not move from zero; raise learning_rate"):
        train(phi, tmp_path, train_spec(learning_rate=1e-60, steps=2))


# --- interruptions ---------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """Ctrl-C after so many steps."""
    plain = trainer._Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Watch, "on_step_end", on_step_end)
        with pytest.raises(KeyboardInterrupt):
            yield


SHORT = [item(f"The capital of {country} is", city) for country, city in FACTS]
MANY = [*facts(), *SHORT, item("A dog", "barks")]  # 13 rows: seven batches of two, the last one not full


@pytest.fixture
def go(loaded: Load, pico_phi: Path, tmp_path: Path) -> Go:
    """``go("work", spec, …)``: a training on these rows, by a model of its own and with dropout."""

    def start(work: str, spec: TrainSpec, **more: Any) -> tuple[TaskVector, TrainingLog]:
        model = loaded(pico_phi)
        rows, lora = encode(MANY, "qa", model.tokenizer, 64), LoraSpec(rank=4, alpha=8, dropout=0.2)
        return train(model, tmp_path / work, spec, lora, rows=rows, **more)

    return start


@pytest.mark.parametrize(("every", "stopped"), [(3, [5]), (3, [11, 14]), (3, [16]), (7, [9]), (4, [13])])
def test_an_interrupted_training_ends_the_same(go: Go, tmp_path: Path, every: int, stopped: list[int]) -> None:
    """In the middle of an epoch of seven steps, at its end, in the second and third one, and twice."""
    spec = train_spec(steps=17, save_every=every)
    whole, log = go("whole", spec)
    for step in stopped:
        with interrupted(step):
            go("stopped", spec)
    left = last_checkpoint(tmp_path / "stopped")
    assert left is not None
    assert Path(left).name == f"checkpoint-{(stopped[-1] - 1) // every * every}"
    again, log_again = go("stopped", spec)
    assert log_again.losses == log.losses
    assert again.digest() == whole.digest()
    assert dict(again.meta) == dict(whole.meta)


@pytest.mark.parametrize("every", [None, 2, 3, 100])
def test_a_finished_training_ends_the_same_again(
    loaded: Load, pico_phi: Path, tmp_path: Path, every: int | None
) -> None:
    """As when the run is killed after the last step and before the vector is on the disk."""
    spec = train_spec(steps=6, save_every=every)
    first, log = train(loaded(pico_phi), tmp_path, spec)
    second, log_second = train(loaded(pico_phi), tmp_path, spec)
    assert log_second.losses == log.losses
    assert len(log.losses) == log_second.steps == 6
    assert second.digest() == first.digest()


@pytest.mark.parametrize("kind", ["penalty", "gradient_difference"])
def test_what_draws_retain_rows_is_resumed_too(go: Go, phi: Loaded, kind: str) -> None:
    """The draws are per step: seven batches by threes, so that the last step of an epoch has one batch only."""
    spec = train_spec(steps=8, save_every=2, accumulation=3)
    near = encode([item(f"A {animal}", "is an animal") for animal in ("cat", "cow", "bee")], "mcq", phi.tokenizer, 64)
    drawn: dict[str, Any] = {"keep": Keep(near, RetainKLSpec(batch_size=2, coefficients=(0.5, 3.0)))}
    without: dict[str, Any] = {}
    if kind == "gradient_difference":
        drawn = {"against": Against(kind, GradientDifferenceSpec(), near, batch_size=2)}
        without = {"against": Against("gradient_ascent", None)}
    whole, _ = go("whole", spec, **drawn)
    with interrupted(7):
        go("stopped", spec, **drawn)
    assert go("stopped", spec, **drawn)[0].digest() == whole.digest()
    assert go("without", spec, **without)[0].digest() != whole.digest()


def test_half_a_checkpoint_is_passed_over(go: Go, tmp_path: Path) -> None:
    spec, work = train_spec(steps=8, save_every=3), tmp_path / "work"
    whole, _ = go("whole", spec)
    with interrupted(7):
        go("work", spec)
    marks = sorted(p.parent.name for p in work.glob(f"checkpoint-*/{STAGE_FILE}"))
    assert marks == ["checkpoint-3", "checkpoint-6"]
    # as a kill leaves it: the folder is there, some files are short, the seal is not
    half = work / "checkpoint-6"
    (half / STAGE_FILE).unlink()
    (half / "adapter_model.safetensors").write_bytes(b"\0" * 10)
    (half / "trainer_state.json").write_text('{"global_')
    assert last_checkpoint(work) == str(work / "checkpoint-3")
    assert not half.exists()
    again, _ = go("work", spec)
    assert again.digest() == whole.digest()
    assert last_checkpoint(work) == str(work / "checkpoint-8")

    for left in work.glob("checkpoint-*"):
        (left / STAGE_FILE).unlink()
    assert last_checkpoint(work) is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_passed_over(
    go: Go, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One bit of one file, as a failing disk leaves it: the training goes on from an older one, and says so."""
    spec = train_spec(steps=8, save_every=3)
    whole, _ = go("whole", spec)
    with interrupted(7):
        go("work", spec)
    damaged = tmp_path / "work" / "checkpoint-6" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capfd.readouterr()
    again, log = go("work", spec)
    said = capfd.readouterr().err
    assert said.count("checkpoint-6: ") == 1
    assert name in said
    assert "SHA-256" in said
    assert again.digest() == whole.digest()
    assert log.steps == 8


def test_the_newest_whole_checkpoint_of_as_many_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By number; where more processes wrote it, their random states and their epochs are others."""
    assert last_checkpoint(tmp_path / "nothing") is None
    for step in (9, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 100:
            seal(tmp_path / f"checkpoint-{step}", "2", 0.0)
    assert last_checkpoint(tmp_path, processes=2) == str(tmp_path / "checkpoint-12")
    assert last_checkpoint(tmp_path) is None
    assert "checkpoint-12: 2 processes wrote it, and now it is 1" in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


# --- signals ---------------------------------------------------------------------------------------------------------


@contextmanager
def signalled(step: int, number: int) -> Iterator[list[int]]:
    """A signal in the middle of a step, which is to stop the training; yields the steps that were made."""
    made: list[int] = []
    plain = trainer._Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.state.global_step not in made:
            made.append(self.state.global_step)
        if self.state.global_step == step:
            signal.raise_signal(number)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Trainer, "training_step", training_step)
        yield made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 6, 7, 11, 15])
def test_a_signal_costs_no_step(go: Go, step: int, number: int) -> None:
    """In the first step, the last of an epoch of seven, the first of the next, in the middle, and in the very last."""
    spec = train_spec(steps=16, save_every=100, accumulation=2, batch_size=1)
    before = signal.getsignal(number)
    whole, log = go("whole", spec)
    with signalled(step, number) as made, pytest.raises(KeyboardInterrupt):
        go("stopped", spec)
    assert made == list(range(step + 1))  # the step at hand is finished, and no other is begun
    assert signal.getsignal(number) is before
    with signalled(-1, number) as made:
        again, log_again = go("stopped", spec)
    assert made == list(range(step + 1, 16))  # none is made twice
    assert again.digest() == whole.digest()
    assert log_again.losses == log.losses


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its echo: a batch system signals every process, and launchers pass on what they hear."""
    monkeypatch.setattr(stopping, "_ECHO", 0.2)
    held = []

    def work() -> None:
        with stopping.held() as hold:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            held.append(hold.requested)
            time.sleep(0.3)
            signal.raise_signal(signal.SIGINT)
            held.append(False)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert held == [True]
    with stopping.held() as hold:
        assert not hold.requested


# --- batches ---------------------------------------------------------------------------------------------------------


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    rows = [Encoded((1,) * length, (1,) * length) for length in (3, 30, 5, 31, 4, 29, 6, 28)]

    def order(seed: int, epoch: int, noise: int) -> list[int]:
        torch.manual_seed(noise)
        sampler = ByLength(rows, 2, seed)
        sampler.epoch = epoch
        return list(sampler)

    assert sorted(order(0, 0, 0)) == list(range(8))
    assert order(0, 3, 1) == order(0, 3, 2)
    seen = {tuple(order(seed, epoch, 0)) for seed in range(4) for epoch in range(4)}
    assert len(seen) > 8
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(ByLength(rows, 2, 0))
    assert torch.equal(torch.rand(3), expected)  # nobody else's draws are touched


def test_rows_of_like_length_come_together() -> None:
    lengths = [5 + 50 * (i % 2) for i in range(64)]
    rows = [Encoded((1,) * length, (1,) * length) for length in lengths]
    order = list(ByLength(rows, 4, 0))
    mixed = sum(len({lengths[i] for i in order[at : at + 4]}) > 1 for at in range(0, 64, 4))
    assert mixed <= 8  # by chance nearly all 16 would be
    assert lengths[order[0]] == 55  # the longest first: what needs most memory fails at once


# --- all weights, merging --------------------------------------------------------------------------------------------


def test_training_all_weights_stopped_and_resumed(loaded: Load, pico_llama: Path, tmp_path: Path) -> None:
    """Llama's head is tied to its embedding, and must come back from a checkpoint as the one tensor it is."""

    def go(work: Path) -> tuple[Loaded, TrainingLog]:
        model = loaded(pico_llama)
        spec = train_spec(steps=7, batch_size=6, learning_rate=3e-3, save_every=2)
        return model, train_weights(model.model, model.tokenizer, rows_of(model), spec, 0, work, "teach")

    whole, log = go(tmp_path / "whole")
    assert log.losses[-1] < log.losses[0] - 1
    assert not whole.model.training
    assert not any(p.requires_grad for p in whole.model.parameters())
    before = loaded(pico_llama).model
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, whole.model.get_parameter(n))}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= moved
    with interrupted(5):
        go(tmp_path / "stopped")
    for work in ("stopped", "whole"):  # the second from its last checkpoint before the end
        again, _ = go(tmp_path / work)
        assert_same_state(again.model, state(whole.model))
        assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_a_vector_merged_for_good(loaded: Load, request: pytest.FixtureRequest, family: str) -> None:
    """Added in float32 and rounded once to the weights' own format."""
    model = loaded(request.getfixturevalue(f"pico_{family}"), "bfloat16").model
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, module in linear_modules(model).items():
        weight = module.get_parameter("weight")
        out, fan_in = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
        modules[name] = LowRank(torch.randn(2, fan_in, generator=generator), torch.randn(out, 2, generator=generator))
    vector = 1e-3 * TaskVector(modules)
    wanted = state(model)
    for name, m in vector.modules.items():
        delta = m.delta().T if isinstance(model.get_submodule(name), Conv1D) else m.delta()
        wanted[f"{name}.weight"] = (wanted[f"{name}.weight"].float() + delta).bfloat16()
    before = state(model)
    merge(model, vector)
    assert_same_state(model, wanted)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in wanted.items())
    with pytest.raises(VectorError, match="no such module"):
        merge(model, TaskVector({"no.such": LowRank(torch.ones(1, 1), torch.ones(1, 1))}))


# --- what is passed on to the Trainer and to PEFT --------------------------------------------------------------------


def test_a_step_is_made_by_the_optimiser_and_the_clipping_asked_for(phi: Loaded, tmp_path: Path) -> None:
    """One step of SGD from B = 0, clipped: B = -rate * s * G A^T * most / norm, G the gradient of the whole weight."""
    rows, rate, most = rows_of(phi), 0.5, 1e-3
    labels = nn.utils.rnn.pad_sequence([torch.tensor(row.labels) for row in rows], True, IGNORE)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row.input_ids) for row in rows], True, 0)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row.labels)) for row in rows], True, 0)
    phi.model.requires_grad_(True)
    torch.autograd.backward(phi.model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    gradients = {name: module.weight.grad.clone() for name, module in linear_modules(phi.model).items()}
    phi.model.requires_grad_(False)
    phi.model.zero_grad()
    spec = train_spec(
        steps=1, batch_size=6, warmup=0.0, learning_rate=rate, trainer={"optim": "sgd", "max_grad_norm": most}
    )
    vector, _ = train(phi, tmp_path, spec, LoraSpec(rank=4, alpha=8))
    raw = {name: 2 * g @ vector.modules[name].A.T for name, g in gradients.items()}
    norm = math.sqrt(sum(float(b.double().square().sum()) for b in raw.values()))
    assert norm > 100 * most
    for name, b in raw.items():
        torch.testing.assert_close(vector.modules[name].B, 2 * -rate * b * most / norm, atol=1e-9, rtol=1e-3)


def test_ranks_alphas_and_the_beginning_of_a_are_peft_s(
    loaded: Load, pico_phi: Path, tmp_path: Path, saved: Path
) -> None:
    """The vector is what PEFT adds to the weights when it merges the adapter that was trained."""
    lora = LoraSpec(rank=4, alpha=8, rank_pattern={"mlp.fc1": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 32})
    vector, _ = train(loaded(pico_phi), tmp_path / "work", train_spec(steps=2), lora)
    assert {m.rank for name, m in vector.modules.items() if name.endswith("fc1")} == {2}
    assert {m.rank for name, m in vector.modules.items() if not name.endswith("fc1")} == {4}
    merged = PeftModel.from_pretrained(loaded(pico_phi).model, saved).merge_and_unload()
    before = dict(loaded(pico_phi).model.named_parameters())
    for name, m in vector.modules.items():
        added = merged.get_parameter(f"{name}.weight") - before[f"{name}.weight"]
        torch.testing.assert_close(m.delta(), added, atol=1e-6, rtol=1e-4)
    drawn, _ = train(loaded(pico_phi), tmp_path / "gauss", train_spec(steps=1), LoraSpec(init_lora_weights="gaussian"))
    usual, _ = train(loaded(pico_phi), tmp_path / "usual", train_spec(steps=1), LoraSpec())
    spread = [torch.cat([m.A.flatten() for m in v.modules.values()]).abs().max() for v in (drawn, usual)]
    assert spread[0] > 2 / 16  # normal, of deviation 1/r
    assert spread[1] < 2 / 16 + 1e-2  # uniform, within 1/sqrt(in)


REFUSED = [
    ({"optim": "adamw"}, "trainer: transformers refuses it: adamw is not a valid OptimizerNames"),
    ({"optim": "galore_adamw"}, "trainer: transformers refuses it: You need to install"),
    ({"max_grad_norm": "1"}, r"trainer.max_grad_norm: Input should be a valid number, got '1'"),
    ({"optim_args": "momentum"}, "trainer: transformers refuses it"),
    ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "unexpected keyword argument 'num_cycles'"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_transformers_would_refuse_is_refused_before(phi: Loaded, given: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=rf"vector\.forget\.{said}|vector\.forget.*{said}"):
        trainer.check_passed_on(train_spec(trainer=given), phi.model, "vector.forget")
    trainer.check_passed_on(train_spec(trainer={"optim": "adafactor", "adam_beta2": 0.99}), phi.model, "vector.forget")


# --- drift -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_one_pinned_run(phi: Loaded, tmp_path: Path) -> None:
    """Not right or wrong, but ours: whoever changes them should know that results change."""
    vector, log = train(phi, tmp_path, train_spec(steps=10, batch_size=3), LoraSpec(rank=4, alpha=8), seed=17)
    assert log.losses[0] == pytest.approx(6.7982, rel=1e-3)
    assert log.losses[-1] == pytest.approx(4.8958, rel=1e-3)
    assert vector.norm() == pytest.approx(2.8227, rel=1e-3)
