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

from unlearn.finetune import read_adapter
from unlearn.methods.retain_kl import kl, penalty, scaled
from unlearn.models import Loaded
from unlearn.negate import applied

Load = Callable[..., Loaded]


def adapted(model: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "fc1", "fc2"])
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model.eval()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answers(model: nn.Module) -> Tensor:
    """Logits in float64 at positions 4..10 of the first row and 4..7 of the second: those before a label."""
    given = batch()
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits.double()
    return torch.cat([logits[0, 4:11], logits[1, 4:8]])


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean over positions of sum p (log p - log q)."""
    p, log_q = functional.softmax(p, -1), functional.log_softmax(q, -1)
    return float((p * (p.log() - log_q)).sum(-1).mean())


def test_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    assert float(kl(p, q)) == pytest.approx(divergence(p.double(), q.double()), rel=1e-5)
    assert float(kl(p, q)) != pytest.approx(float(kl(q, p)), rel=1e-2)
    assert float(kl(p, p + 3.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("c", [None, 0.5, 2.0])
def test_it_is_taken_where_the_formula_says(loaded: Load, pico_phi: Path, c: float | None) -> None:
    peft_model = adapted(loaded(pico_phi).model)
    vector = read_adapter(peft_model, {})
    model = loaded(pico_phi).model
    with torch.no_grad():
        before = answers(model)
        with applied(model, vector, 1.0):
            wanted = divergence(before, answers(model))
        if c is not None:
            with applied(model, vector, -c):
                wanted += divergence(before, answers(model))
        assert float(penalty(peft_model, batch(), c)) == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0.01


def test_only_the_adapter_learns_from_it(loaded: Load, pico_phi: Path) -> None:
    peft_model = adapted(loaded(pico_phi).model)
    penalty(peft_model, batch(), 1.0).backward()
    moved = {name for name, p in peft_model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved
    assert all("lora_" in name for name in moved)


def test_the_adapter_s_scale_comes_back(loaded: Load, pico_phi: Path) -> None:
    peft_model = adapted(loaded(pico_phi).model)
    before = read_adapter(peft_model, {})
    with scaled(peft_model, -2.0):
        assert read_adapter(peft_model, {}).digest() == (-2.0 * before).digest()
    assert read_adapter(peft_model, {}).digest() == before.digest()

    def fail_inside() -> None:
        with scaled(peft_model, -2.0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert read_adapter(peft_model, {}).digest() == before.digest()
