"""Parts of apply.py that need torch, each run as a process of its own: ``make``, ``vector``, ``peft``, ``compare``."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unlearn.model.checkpoint import read_checkpoint
from unlearn.model.load import architecture_of
from unlearn.vector.change import LowRank
from unlearn.vector.interop import to_adapter
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import save_shards

RANK = 16
ROWS = 256  # of every edited weight that are compared
SHARD = "5GB"
POOL = 2**24  # random numbers that a synthetic checkpoint is made of


def make(size: float, base: Path, vector: Path) -> None:
    """A checkpoint of about ``size`` GB in the shape of a Llama, and its vector."""
    large = size >= 8
    width, inner, heads = (5120, 13824, 40) if large else (2048, 5632, 16)
    layer = 2 * (4 * width * width + 3 * width * inner)
    outer = 2 * 2 * 32000 * width
    layers = max(1, round((size * 1e9 - outer) / layer))
    config = AutoConfig.for_model(
        "llama",
        **{"vocab_size": 32000, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": False},
        dtype="bfloat16",
    )
    base.mkdir()
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    later = dict(model.named_parameters())
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def value(name: str) -> Tensor:
        count = later[name].numel()
        return pool.roll(zlib.crc32(name.encode()) % POOL).repeat(-(-count // POOL))[:count].view(later[name].shape)

    save_shards(later, value, base, SHARD)
    _vector(base).save(vector)


def _vector(base: Path) -> TaskVector:
    """Random factors on all linear layers but the head, large enough for bfloat16 to keep most of it."""
    layout, stored = architecture_of(base), read_checkpoint(base).tensors
    g = torch.Generator().manual_seed(1)
    modules = {}
    for name, transposed in layout.linear.items():
        if name in stored and not name.startswith("lm_head"):
            rows, columns = stored[name].shape[:: -1 if transposed else 1]
            a, b = torch.randn(RANK, columns, generator=g), torch.randn(rows, RANK, generator=g)
            modules[name.removesuffix(".weight")] = LowRank(a, b * 1e-3)
    return TaskVector(modules)


def vector(base: Path, place: Path, adapter: Path, negated: Path, coefficient: float) -> None:
    """A vector, the same as PEFT's adapter, and the adapter of minus ``coefficient`` times it."""
    made = _vector(base)
    made.save(place)
    to_adapter(made, adapter, str(base))
    to_adapter(-coefficient * made, negated, str(base))


def peft(base: Path, adapter: Path, out: Path) -> None:
    """PEFT's way."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


@torch.no_grad()
def compare(base: Path, place: Path, coefficient: float, out: Path) -> None:
    """Print how far edited weights are from the exact ones rounded once, and whether the others are as they were."""
    made, old, new = TaskVector.load(place), read_checkpoint(base), read_checkpoint(out)
    differ = total = 0
    largest = 0.0
    untouched = True
    for name, stored in old.tensors.items():
        before, after = (_read(c.files[c.tensors[name].file], name) for c in (old, new))
        change = made.modules.get(name.removesuffix(".weight"))
        if change is None:
            untouched &= torch.equal(before.view(torch.int16), after.view(torch.int16))
            continue
        assert isinstance(change, LowRank)
        assert stored.shape == change.shape
        exact = before[:ROWS].double() - coefficient * (change.B[:ROWS].double() @ change.A.double())
        wanted = rounded_once(exact)
        largest = max(largest, float((after[:ROWS].double() - wanted.double()).abs().max()))
        differ += int((after[:ROWS] != wanted).sum())
        total += wanted.numel()
    rest = "the rest untouched" if untouched else "other weights changed"
    print(f"{differ / total:.3%} of elements differ, by {largest:.2g} at most; {rest}")


def rounded_once(exact: Tensor) -> Tensor:
    """float64 to the nearest bfloat16. A cast goes through float32, which rounds twice."""
    near = exact.to(torch.bfloat16)
    best, gap = near, (near.double() - exact).abs()
    for step in (-1, 1):
        other = (near.view(torch.int16) + step).view(torch.bfloat16)
        closer = (other.double() - exact).abs() < gap
        best = torch.where(closer, other, best)
        gap = torch.where(closer, (other.double() - exact).abs(), gap)
    return best


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "make":
        make(float(rest[0]), Path(rest[1]), Path(rest[2]))
    elif what == "vector":
        vector(Path(rest[0]), Path(rest[1]), Path(rest[2]), Path(rest[3]), float(rest[4]))
    elif what == "peft":
        peft(Path(rest[0]), Path(rest[1]), Path(rest[2]))
    else:
        compare(Path(rest[0]), Path(rest[1]), float(rest[2]), Path(rest[3]))
