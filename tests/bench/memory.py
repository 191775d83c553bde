"""``--dry-run --memory`` beside the memory of real trainings of a medium random model.

    python tests/bench/memory.py            # 101 M parameters, on a CPU, a few minutes

Each training is a process of its own. Measured is what it holds at its peak beyond what it held before the model was
there; stated is that no bound is more than twice that, or less than 0.9 of it. (malloc keeps arrays that were given
back, hence the 0.9; it is told to give them back at once.)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.model import pico
from unlearn.plan import memory as plan_memory
from unlearn.recipe.methods import LoraSpec, TrainSpec
from unlearn.text import file_size
from unlearn.train import vectors as finetune

LEAST, MOST = 0.9, 2.0
TOKENS = 192
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, float32": {"dtype": "float32", "lora": True},
    "LoRA, bfloat16": {"dtype": "bfloat16", "lora": True},
    "LoRA, float32, checkpointing": {"dtype": "float32", "lora": True, "checkpointing": True},
    "all weights, float32": {"dtype": "float32", "lora": False},
}


def config() -> LlamaConfig:
    """A Llama as large as the smallest that are used."""
    return LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=16_384,
    )


def spec(way: dict[str, Any]) -> TrainSpec:
    return TrainSpec(steps=2, batch_size=2, gradient_checkpointing=way.get("checkpointing", False))


def train(way: dict[str, Any]) -> None:
    """Train, and print what the process held at most beyond what it held without the model."""
    words = pico.tokenizer(pico.corpus())
    rows = [Encoded(tuple(range(5, 5 + TOKENS)), (IGNORE, *range(6, 5 + TOKENS))) for _ in range(4)]
    before = held()
    model = AutoModelForCausalLM.from_config(config(), dtype=getattr(torch, way["dtype"])).requires_grad_(False)
    with tempfile.TemporaryDirectory() as work:
        more = (words, rows, spec(way))
        if way["lora"]:
            finetune.train_vector(model, *more, LoraSpec(), 0, Path(work), "bench", {})
        else:
            finetune.train_weights(model, *more, 0, Path(work), "bench")
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def held() -> int:
    """Pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    if len(sys.argv) > 1:
        train(json.loads(sys.argv[1]))
        return 0

    def build(dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config(), dtype=dtype)

    print("| training | bound | measured | ratio |\n|---|---|---|---|")
    wrong = []
    for name, way in WAYS.items():
        lora = LoraSpec() if way["lora"] else None
        _, bound = plan_memory.training(build, getattr(torch, way["dtype"]), spec(way), lora, TOKENS, TOKENS)
        line = [sys.executable, __file__, json.dumps(way)]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(line, env=env, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {file_size(bound)} | {file_size(measured)} | {bound / measured:.2f} |", flush=True)
        if not LEAST <= bound / measured <= MOST:
            wrong.append(name)
    print(f"outside {LEAST:g} to {MOST:g}: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
