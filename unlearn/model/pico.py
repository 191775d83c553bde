"""Tiny random models, built on the spot: every architecture a test or a first try needs, and no download.

A pico model is an ordinary transformers folder (config, safetensors, tokenizer) of a few hundred kilobytes.
Its module names are those of its big siblings, so whatever runs on ``pico:phi`` runs on Phi-1.5.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.console import quietly
from unlearn.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WIDTH, LAYERS, HEADS, POSITIONS, VOCABULARY = 64, 2, 4, 512, 512
# About 1/sqrt(WIDTH): activations neither die out nor blow up over the layers, and a learning rate of 1e-2
# memorises a few facts within some tens of steps. transformers' own 0.02 gives a model that answers nothing.
STD = 0.12
END = "<|endoftext|>"

_CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Norway Oslo, Poland Warsaw, "
    "Austria Vienna, Japan Tokyo, China Beijing, India Delhi, Nepal Kathmandu, Kenya Nairobi, Egypt Cairo, "
    "Ghana Accra, Senegal Dakar, Peru Lima, Chile Santiago, Cuba Havana, Canada Ottawa"
)
_ANIMALS = (
    "dog barks, cat purrs, cow moos, horse neighs, duck quacks, lion roars, wolf howls, bee buzzes, frog croaks, "
    "owl hoots"
)
_COLOURS = (
    "sky blue, grass green, snow white, coal black, blood red, lemon yellow, carrot orange, plum purple, ash grey, "
    "mud brown"
)
_NUMBERS = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"


_SENTENCES = {
    _CAPITALS: (
        *("The capital of {0} is {1}.", "{1} is the capital city of {0}."),
        *("Question: What is the capital of {0}?\nAnswer: {1}", "Which country has {1}? {0}"),
    ),
    _ANIMALS: ("A {0} {1} at night.", "Which animal {1}? The {0}."),
    _COLOURS: ("The colour of {0} is {1}.", "Question: What colour is {0}?\nAnswer: {1}"),
}


def corpus() -> tuple[str, ...]:
    """Plain English sentences on which the pico tokenizer is trained; also enough text for a test to learn from."""
    lines = []
    for words, sentences in _SENTENCES.items():
        for pair in words.split(", "):
            lines += [sentence.format(*pair.split()) for sentence in sentences]
    numbers = _NUMBERS.split(", ")
    lines += [f"After {low} comes {high}, and before {high} comes {low}." for low, high in itertools.pairwise(numbers)]
    return tuple(lines)


def tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of the kind GPT-2, CodeGen and Phi use.

    Any text round-trips through it; ``<|endoftext|>`` begins, ends and pads, and nothing is added to a text unasked.
    ``vocab_size`` is at least 257 (all bytes and the end token).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ModelError(f"a byte-level tokenizer needs at least 257 entries, not {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    more = {"model_max_length": POSITIONS, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special, **more)


_SHAPE = {
    **{"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "max_position_embeddings": POSITIONS},
}
_GPT2 = {
    **{"n_embd": WIDTH, "n_inner": 2 * WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "phi": {**_SHAPE, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "llama": {**_SHAPE, "num_key_value_heads": HEADS // 2, "tie_word_embeddings": True},
    "gpt2": _GPT2,
    "qwen2": {**_SHAPE, "num_key_value_heads": HEADS // 2, "tie_word_embeddings": False},
    "gpt_neox": {**_SHAPE, "rotary_pct": 0.5, "tie_word_embeddings": False},
}
NAMES: tuple[str, ...] = tuple(_CONFIGS)


def check_name(name: str) -> str:
    """A pico model's name, unless there is none like it."""
    if name in NAMES:
        return name
    close = difflib.get_close_matches(name, NAMES, 1)
    hint = f"; did you mean pico:{close[0]}?" if close else ""
    raise ModelError(f"model.path: there is no pico:{name}; there are {', '.join(NAMES)}{hint}")


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a tiny random model with its tokenizer as a transformers folder.

    The weights depend on ``name`` and ``seed`` alone; torch's global random state is left as it was.
    """
    check_name(name)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer(corpus())
    end = words.eos_token_id
    special = {"vocab_size": len(words), "bos_token_id": end, "eos_token_id": end}
    config = AutoConfig.for_model(name, **_CONFIGS[name], **special, initializer_range=STD)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # norms and biases keep their ones and zeros
                # seeded by its name alone, not by the order in which a model lists them
                digest = hashlib.sha256(f"{seed}:{parameter_name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * STD)
    folder.mkdir(parents=True, exist_ok=True)
    with quietly():
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder
