"""What the tests of the task pack share: its modules, a model that has half learnt its corpus, and lm-eval alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.model.pico import corpus
from unlearn.recipe.load import tasks_folder

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def half_learnt(pico: Path, folder: Path, texts: Sequence[str] | None = None, steps: int = 60) -> Path:
    """A pico model that is right on some items and wrong on others, with a chat template."""
    torch.manual_seed(0)
    shutil.copytree(pico, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batch = tokenizer(texts or [line + "\n" for line in corpus()], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored(lm: Any, task: str, chat: bool = False, **metadata: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result and the samples of one of the pack's tasks, told the metadata."""
    manager = TaskManager(include_defaults=False, include_path=str(tasks_folder()), metadata=metadata)
    found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=10, apply_chat_template=chat)
    assert found is not None
    return found["results"][task], found["samples"][task]


def written(lm: Any, prompt: str, tokens: int) -> str:
    """What the model writes by transformers' own greedy decoding."""
    ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
    own = lm.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text: str = lm.tokenizer.decode(own, skip_special_tokens=True)
    return text
