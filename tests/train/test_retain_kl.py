"""The retain penalty against the same divergences computed on edited copies of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.model.load import Loaded
from unlearn.recipe.methods import LoraSpec, RetainKLSpec, TrainSpec
from unlearn.train.batches import Pad, beside
from unlearn.train.losses import Keep, kl, multiples, only_at, penalty, scaled_rows
from unlearn.train.vectors import read_adapter, train_vector
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
FORGET = [Encoded(tuple(range(20, 29)), (*[IGNORE] * 5, 25, 26, 27, 28)), Encoded((40, 41, 42), (IGNORE, 41, 42))]
RETAIN = [
    Encoded(tuple(range(60, 72)), (*[IGNORE] * 5, *range(65, 72))),
    Encoded(tuple(range(90, 98)), (*[IGNORE] * 4, 94, 95, 96, 97)),
]


def adapted(model: Any) -> PeftModel:
    torch.manual_seed(0)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    gpt2 = hasattr(model, "transformer")
    targets = ["c_attn", "c_fc", "c_proj"] if gpt2 else linear
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets, fan_in_fan_out=gpt2))
    assert isinstance(peft_model, PeftModel)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model.eval()


def answers(model: nn.Module, rows: list[Encoded]) -> Tensor:
    """Logits before each labelled token, one row at a time and without padding, in float64."""
    found = []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
        found += [logits[i - 1] for i, label in enumerate(row.labels) if label != IGNORE]
    return torch.stack(found)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean over positions of sum p (log p - log q)."""
    p, log_q = functional.softmax(p, -1), functional.log_softmax(q, -1)
    return float((p * (p.log() - log_q)).sum(-1).mean())


def wanted_penalty(model: nn.Module, vector: TaskVector, c: float | None) -> float:
    with torch.no_grad():
        before = answers(model, RETAIN)
        with subtracted(model, vector, -1.0):
            total = divergence(before, answers(model, RETAIN))
        if c is not None:
            with subtracted(model, vector, c):
                total += divergence(before, answers(model, RETAIN))
    return total


def one_batch(c: float | None) -> tuple[dict[str, Tensor], list[float]]:
    """Forget rows and the retain rows' copies as the trainer puts them together."""
    factors = multiples(len(FORGET), len(RETAIN), c)
    copies = (len(factors) - len(FORGET)) // len(RETAIN)
    return beside(Pad(0)(FORGET), Pad(0)(RETAIN), copies, 0), factors


def labelled(batch: dict[str, Tensor], copies: int) -> Tensor:
    """Positions that predict a label, of the forget rows and of the retain rows' copies."""
    labels = torch.cat([batch["labels"], *[batch["retain_labels"]] * copies])
    return functional.pad(labels[:, 1:] != IGNORE, (0, 1))


def test_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    assert float(kl(p, q)) == pytest.approx(divergence(p.double(), q.double()), rel=1e-5)
    assert float(kl(p, q)) != pytest.approx(float(kl(q, p)), rel=1e-2)
    assert float(kl(p, p + 3.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_batch() -> None:
    batch, factors = one_batch(2.0)
    assert factors == [1.0, 1.0, 1.0, 1.0, -2.0, -2.0, 0.0, 0.0]
    assert multiples(1, 2, None) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, 12)
    assert batch["labels"].shape == batch["retain_labels"].shape == (2, 12)
    for number, row in enumerate([*FORGET, *RETAIN * 3]):
        length = len(row.input_ids)
        assert batch["input_ids"][number, :length].tolist() == list(row.input_ids)
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (12 - length)
        if number < 2:
            assert batch["labels"][number].tolist() == [*row.labels, *[IGNORE] * (12 - length)]
    assert batch["retain_labels"].tolist() == Pad(0)(RETAIN)["labels"].tolist()


@pytest.mark.parametrize("family", ["phi", "llama", "gpt2"])
@pytest.mark.parametrize("c", [None, 0.5, 2.0])
def test_it_is_taken_where_the_formula_says(
    loaded: Load, request: pytest.FixtureRequest, family: str, c: float | None
) -> None:
    """One pass with a multiple per row gives what separate passes under separate vectors give."""
    folder: Path = request.getfixturevalue(f"pico_{family}")
    peft_model = adapted(loaded(folder).model)
    vector = read_adapter(peft_model, {})
    model = loaded(folder).model
    batch, factors = one_batch(c)
    copies = factors.count(0.0) // len(RETAIN) * (2 if c is None else 3)
    with torch.no_grad(), scaled_rows(peft_model, factors):
        logits = peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with only_at(peft_model, labelled(batch, copies)):
            few = peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(few, logits[labelled(batch, copies)])
    forgotten = int((batch["labels"][:, 1:] != IGNORE).sum())
    got = float(penalty(few[forgotten:], copies))
    wanted = wanted_penalty(model, vector, c)
    assert got == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0.01
    # the forget rows are those of theta + tau, whatever stands beside them
    with torch.no_grad(), subtracted(model, vector, -1.0):
        torch.testing.assert_close(
            logits[0, :9], model(torch.tensor([FORGET[0].input_ids])).logits[0], atol=1e-4, rtol=1e-4
        )


def test_only_the_adapter_learns_from_it(loaded: Load, pico_phi: Path) -> None:
    peft_model = adapted(loaded(pico_phi).model)
    batch, factors = one_batch(1.0)
    with scaled_rows(peft_model, factors):
        logits = peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[labelled(batch, 3)]
        penalty(logits[int((batch["labels"][:, 1:] != IGNORE).sum()) :], 3).backward()
    moved = {name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trained_loss_is_the_formula_s(
    loaded: Load, pico_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: str, checkpointing: bool
) -> None:
    """CE on the forget answers plus weight times the penalty, from an adapter that is not zero to begin with."""
    reference = adapted(loaded(pico_phi).model)
    vector = read_adapter(reference, {})
    state = {k: v.clone() for k, v in reference.state_dict().items() if "lora_" in k}

    def start_there(model: Any, config: Any) -> Any:
        peft_model = get_peft_model(model, config)
        peft_model.load_state_dict(state, strict=False)
        return peft_model

    monkeypatch.setattr("unlearn.train.vectors.get_peft_model", start_there)
    got = loaded(pico_phi)
    spec = TrainSpec(steps=1, batch_size=2, learning_rate=1e-3, warmup=0.0, gradient_checkpointing=checkpointing)
    keep = Keep(RETAIN, RetainKLSpec.model_validate({"sides": sides, "weight": 3.0, "coefficients": (1.5, 1.5)}))
    lora = LoraSpec(rank=4, alpha=10)
    _, log = train_vector(got.model, got.tokenizer, FORGET, spec, lora, 0, tmp_path, "forget", {}, keep)

    model = loaded(pico_phi).model
    labels = torch.tensor([label for row in FORGET for label in row.labels if label != IGNORE])
    with torch.no_grad(), subtracted(model, vector, -1.0):
        forget = float(functional.cross_entropy(answers(model, FORGET), labels))
    extra = 3.0 * wanted_penalty(model, vector, 1.5 if sides == "two" else None)
    assert extra > 0.05
    assert log.losses[0] == pytest.approx(forget + extra, rel=1e-3)


def test_the_adapter_s_scale_comes_back(loaded: Load, pico_phi: Path) -> None:
    peft_model = adapted(loaded(pico_phi).model)
    before = read_adapter(peft_model, {})

    def fail_inside() -> None:
        with scaled_rows(peft_model, [-2.0]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert read_adapter(peft_model, {}).digest() == before.digest()
