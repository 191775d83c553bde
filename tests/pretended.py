"""Devices that are not there, ``lazy:0`` and ``pretend:0``: torch knows the names, and nobody is behind them.

A tensor on one is computed on the CPU, and refuses to meet a tensor of any other device, as tensors on two GPUs do. So
whoever forgets to move something is told; the numbers are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

ONE, OTHER = "lazy:0", "pretend:0"
_LIBRARY = torch.library.Library("aten", "IMPL")
_MOVES = ("_to_copy", "copy_", "to")


class Far(Tensor):
    """A tensor that says it is elsewhere; ``here`` is where it is."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: Any) -> Far:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, device=device, **layout)

    def __init__(self, here: Tensor, device: Any) -> None:
        self.here = here

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)  # a checkpoint has the numbers

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {t.device for t in given if t.dim()}  # a single number may be anywhere
        if len(places) > 1 and name not in _MOVES:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {places}")
        if name == "_fused_sdp_choice":
            return 0  # the plain one
        asked = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.device)]
        device = (*asked, args[0].device if name == "copy_" else next(iter(places), given[0].device))[0]
        inside, options = tree_map_only(Tensor, _here, (args, kwargs))
        inside, options = tree_map_only(torch.device, lambda _: torch.device("cpu"), (inside, options))
        out = func(*inside, **options)
        if any(t.shape != _here(t).shape for t in given):
            raise NotImplementedError(f"{func} changes the size of what it is given")
        known = {id(_here(t)): t for t in given}
        far = f"{device.type}:0" in (ONE, OTHER)

        def placed(t: Tensor) -> Tensor:
            same = known.get(id(t))
            if same is not None and same.device == device:
                return same
            t = t if same is None else t.clone()  # moved, though it stays where it is
            return Far(t, device) if far else t

        return tree_map_only(Tensor, placed, out)


def _here(tensor: Tensor) -> Tensor:
    return tensor.here if isinstance(tensor, Far) else tensor


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def there(*args: Any, device: Any = None, pin_memory: Any = None, layout: Any = None, **more: Any) -> Tensor:
        return Far(make(*args, **more), device)

    return there


def _copied(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _here(to).copy_(_here(source))
    return to


def pretend() -> None:
    """From now on tensors can be made on, and moved to, the two devices. There is no way back in this process."""
    backend_registration._setup_privateuseone_for_python_backend(OTHER.partition(":")[0])
    aten = torch.ops.aten
    makes = {"empty.memory_format": aten.empty.memory_format, "empty_strided": aten.empty_strided.default}
    makes |= {"arange": aten.arange.default, "arange.start": aten.arange.start}
    makes |= {"arange.start_step": aten.arange.start_step, "eye": aten.eye.default, "eye.m": aten.eye.m}
    for key in ("Lazy", "PrivateUse1"):
        for name, make in makes.items():
            _LIBRARY.impl(name, _made(make), key)
        _LIBRARY.impl("_copy_from", _copied, key)
