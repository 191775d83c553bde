"""Write safetensors files tensor by tensor, so that saving a model never needs room for a second one.

The format: 8 bytes (little-endian) with the header's length, the header (JSON: name -> dtype, shape, byte range), and
the tensors' bytes one after the other. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unlearn.errors import VectorError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FORMAT: Mapping[str, str] = {"format": "pt"}
_CHUNK = 2**24  # elements converted to bytes at a time


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to come: what must be known before its values are."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """``5GB`` in bytes (decimal units, as the hub's tools have it).

    Raises:
        ValueError: no number with KB, MB, GB or TB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B)", text)
    if match is None:
        raise ValueError(f"not a size: {text!r}; write 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2]])


def write_shards(slots: Sequence[Slot], value: Callable[[str], Tensor], folder: Path, shard_size: int) -> list[str]:
    """Write ``model.safetensors``, or numbered shards with their index, as transformers names them.

    Args:
        slots: Every tensor, in order.
        value: Called once per name; gives a tensor of the slot's shape and dtype, on any device.
        folder: Where to; must exist.
        shard_size: Bytes after which a new file begins. A larger single tensor gets a file of its own.

    Returns:
        The names of the files written.

    Raises:
        VectorError: a tensor is not finite.
    """
    groups = list(_groups(slots, shard_size))
    if len(groups) <= 1:
        write_file(folder / "model.safetensors", slots, value)
        return ["model.safetensors"]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, value)
    index = {
        "metadata": {"total_size": sum(s.size for s in slots)},
        "weight_map": {s.name: name for name, group in zip(names, groups, strict=True) for s in group},
    }
    index_name = "model.safetensors.index.json"
    (folder / index_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*names, index_name]


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that its number format cannot hold.

    Raises:
        VectorError: it has values that are no finite numbers.
    """
    parts = torch.split(tensor.detach().reshape(-1), _CHUNK)
    if tensor.is_floating_point() and not all(bool(part.isfinite().all()) for part in parts):
        raise VectorError(
            f"{name}: as {str(tensor.dtype).removeprefix('torch.')} it has values that are no finite numbers (or has "
            "them before): take float32, or bfloat16, which reaches as far, or change less"
        )


def _groups(slots: Sequence[Slot], shard_size: int) -> Iterator[list[Slot]]:
    group: list[Slot] = []
    for slot in slots:
        if group and sum(s.size for s in group) + slot.size > shard_size:
            yield group
            group = []
        group.append(slot)
    if group:
        yield group


def write_file(
    path: Path, slots: Sequence[Slot], value: Callable[[str], Tensor], metadata: Mapping[str, str] = _FORMAT
) -> None:
    """Write one file: the same bytes each time, whereas the reference writer puts metadata in an order of chance.

    Args:
        path: Where to.
        slots, value: As in :func:`write_shards`.
        metadata: Strings for the header, in this order.
    """
    # widest dtype first, as the reference writer has it: every tensor then starts at a multiple of its width
    ordered = sorted(slots, key=lambda s: (-s.dtype.itemsize, s.name))
    header: dict[str, Mapping[str, object]] = {"__metadata__": metadata}
    offset = 0
    for s in ordered:
        header[s.name] = {
            "dtype": _CODES[s.dtype],
            "shape": list(s.shape),
            "data_offsets": [offset, offset + s.size],
        }
        offset += s.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little"))
        f.write(head)
        for s in ordered:
            tensor = value(s.name)
            if tuple(tensor.shape) != s.shape or tensor.dtype != s.dtype:
                raise ValueError(f"{s.name}: {tuple(tensor.shape)} {tensor.dtype} came instead of {s}")
            require_finite(s.name, tensor)
            flat = tensor.detach().contiguous().reshape(-1)
            for start in range(0, len(flat), _CHUNK):
                f.write(flat[start : start + _CHUNK].cpu().view(torch.uint8).numpy().data)
