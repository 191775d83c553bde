"""A stand-in for microsoft/phi-1_5 where no model hub can be reached: its exact shape, random weights, bfloat16.

    python tests/bench/make_phi15.py DIR --texts FILE...

Everything but what the model says is then as with the real one: memory, time, module names, file sizes. The tokenizer
is a byte-level BPE like CodeGen's, trained on FILE... on the spot.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM

from unlearn.model import pico

VOCABULARY = 51200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="what the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = pico.tokenizer((p.read_text(encoding="utf-8") for p in arguments.texts), 50257)
    config = PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(arguments.seed)
    torch.set_default_dtype(torch.bfloat16)
    model = PhiForCausalLM(config)
    model.save_pretrained(arguments.folder, max_shard_size="1GB")
    tokenizer.save_pretrained(arguments.folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
