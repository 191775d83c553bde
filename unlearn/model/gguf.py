"""GGUF -> an ordinary transformers folder, once: fp32 safetensors, configuration and tokenizer."""

from __future__ import annotations

import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from unlearn.console import quietly
from unlearn.errors import ModelError
from unlearn.store.cache import require_space


def convert(source: Path, folder: Path) -> None:
    """Read ``source`` (a GGUF file) and write it to ``folder`` as transformers saves a model."""
    # A configuration or tokenizer lying beside the file must not leak into a result keyed by the file alone.
    with tempfile.TemporaryDirectory() as alone:
        link = Path(alone) / "model.gguf"
        try:
            link.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, link)
        try:
            # one of the progress bars ignores every switch
            with quietly(), redirect_stderr(io.StringIO()):
                _convert(link, folder)
        # Readers of a binary format fail in many ways on a file that is cut short or is something else.
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
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
    if hasattr(transformers, "GgufConfig"):  # since 5.1; for some architectures weights would stay packed otherwise
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
