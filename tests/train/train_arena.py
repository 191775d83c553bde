"""Rows, an adapter that is not zero, and what a model says of answers: for the tests of losses and of coefficients."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from unlearn.data.encoding import IGNORE, Encoded


def row(start: int, length: int, answer: int) -> Encoded:
    """Ascending tokens, of which the last ones are the answer."""
    ids = tuple(range(start, start + length))
    return Encoded(ids, (*[IGNORE] * (length - answer), *ids[length - answer :]))


def tokens(rows: list[Encoded]) -> int:
    """Labelled tokens of some rows."""
    return sum(label != IGNORE for r in rows for label in r.labels)


def said(model: nn.Module, r: Encoded) -> Tensor:
    """Log-probabilities (L, V) before the labelled tokens of a row, which is read alone and without padding."""
    places = [t - 1 for t, label in enumerate(r.labels) if label != IGNORE]
    return functional.log_softmax(model(torch.tensor([r.input_ids])).logits[0, places].double(), dim=-1)


def nlls(model: nn.Module, rows: list[Encoded]) -> list[Tensor]:
    """Sum over each answer's tokens, in nats."""
    labels = [torch.tensor([label for label in r.labels if label != IGNORE]) for r in rows]
    return [-said(model, r).gather(1, y[:, None]).sum() for r, y in zip(rows, labels, strict=True)]


def per_token(model: nn.Module, rows: list[Encoded]) -> float:
    """Their mean over all labelled tokens."""
    with torch.no_grad():
        return float(torch.stack(nlls(model, rows)).sum()) / tokens(rows)


def divergence(p: list[Tensor], q: list[Tensor]) -> Tensor:
    """Mean KL(p || q) over the places of some rows, of their log-probabilities."""
    one, other = torch.cat(p), torch.cat(q)
    return (one.exp() * (one - other)).sum(-1).mean()


def adapted(model: Any) -> PeftModel:
    """A LoRA that is not zero, so that the model with it is another than the model without it."""
    torch.manual_seed(0)
    gpt2 = hasattr(model, "transformer")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    targets = ["c_attn", "c_fc", "c_proj"] if gpt2 else linear
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets, fan_in_fan_out=gpt2))
    assert isinstance(peft_model, PeftModel)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model
