"""Chat templates of the four kinds that there are, and pico models that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

# writes a system message of its own, no beginning token, and white space after the end of a turn
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# writes the beginning token, which its tokenizer adds too, and the day
LLAMA = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start|>system<|stop|>\n\nToday Date: {{ date_string }}\n\n{{ system }}<|eot|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# writes the beginning token, and knows no system
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# a space before the answer, and the end token straight after it
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# the day by strftime_now alone, and thoughts before every answer, which are not what is learned
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ strftime_now('%Y-%m-%d') if loop.first else '' }}"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "thinking": THINKING}
WRITES_BOS = ("llama", "gemma", "mistral")
_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<turn>", "<end>"]


def tokenizer(folder: Path, name: str, adds_bos: bool) -> PreTrainedTokenizerFast:
    """The pico tokenizer with a template and its special tokens; it adds the beginning token to a text, or does not."""
    words: Any = AutoTokenizer.from_pretrained(folder)
    words.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": _TOKENS[2:]})
    words.chat_template = TEMPLATES[name]
    if adds_bos:
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.bos_token_id)])
        words.backend_tokenizer.post_processor = begin
    found: PreTrainedTokenizerFast = words
    return found


def build(pico: Path, folder: Path, name: str, adds_bos: bool | None = None) -> Path:
    """A pico model that has a chat template."""
    words = tokenizer(pico, name, name in WRITES_BOS if adds_bos is None else adds_bos)
    model = AutoModelForCausalLM.from_pretrained(pico)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
