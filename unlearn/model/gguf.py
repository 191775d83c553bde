"""GGUF -> an ordinary transformers folder, once: fp32 safetensors, configuration and tokenizer."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

from unlearn.console import quietly
from unlearn.errors import ModelError
from unlearn.store.cache import require_space


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse the file once instead of four times, and build its name table once instead of 400 times.

    This changes speed only (20 s to 8 s for a 135 M model): both are pure functions of their arguments. Should a
    later transformers call something else, nothing is memoised and nothing breaks.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """Without np.memmap's cost per slice: the vocabulary alone takes a million slices."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    memoised: dict[str, Callable[..., Any]] = {
        "GGUFReader": lru_cache(maxsize=2)(Reader),
        "get_tensor_name_map": lru_cache(maxsize=8)(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in memoised}
    try:
        for name, function in memoised.items():
            setattr(gguf, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)


def convert(source: Path, folder: Path) -> None:
    """Read ``source`` (a GGUF file) and write it to ``folder`` as transformers saves a model.

    Raises:
        ModelError: the ``gguf`` package is missing, or the file cannot be read, is of an architecture that
            transformers cannot convert, or lacks weights.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{source}: reading GGUF needs the gguf package: pip install gguf") from error
    # A configuration or tokenizer lying beside the file must not leak into a result keyed by the file alone.
    with tempfile.TemporaryDirectory() as alone:
        link = Path(alone) / "model.gguf"
        try:
            link.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, link)
        try:
            # one of the progress bars ignores every switch
            with quietly(), _parsed_once(), redirect_stderr(io.StringIO()):
                _convert(link, folder)
        # Readers of a binary format fail in many ways on a file that is cut short or is something else.
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            NotImplementedError,
            RuntimeError,
            ArithmeticError,
            AssertionError,
            MemoryError,
        ) as error:
            if "os error" in str(error):
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(
                f"{source}: transformers cannot convert this GGUF file ({reason}). Is it whole? Otherwise set "
                "model.path to a folder with the model in safetensors"
            ) from error


def _convert(source: Path, folder: Path) -> None:
    import gguf
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # for some architectures weights would stay packed otherwise
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, name = str(source.parent), source.name
    weights = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(source)).tensors)
    require_space(folder, 4 * weights)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(where, gguf_file=name, dtype=torch.float32, output_loading_info=True, **more)
    if info["missing_keys"]:
        raise ValueError(f"weights missing in it: {', '.join(sorted(info['missing_keys'])[:8])}")
    # transformers refuses to save a model that remembers being quantised: hand its tensors to one that does not.
    config = model.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
