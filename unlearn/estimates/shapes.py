"""Every matrix of a causal language model, told from its ``config.json`` alone: no torch, no weights.

An estimate needs exact counts and nothing else, so each family's layers are written out here; a test sets them beside
the models that transformers builds from the same configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unlearn.errors import ModelError
from unlearn.layers import layer_of

_LARGEST = 10**7  # of any number in a configuration; real ones are far below
_DEEPEST = 2000  # layers
Reads = Literal[
    "attention", "output", "mlp", "down"
]  # what a matrix reads: a norm's output, heads, a norm's, the middle


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer: full path, shape, and which of a layer's activations it reads."""

    path: str
    out: int
    inputs: int
    bias: bool
    reads: Reads

    @property
    def weight(self) -> int:
        """Elements of its matrix."""
        return self.out * self.inputs

    @property
    def size(self) -> int:
        """Parameters."""
        return self.weight + self.out * self.bias


@dataclass(frozen=True, slots=True)
class Kept:
    """How many arrays a layer keeps for the way back, beyond what its adapters read. Counted on transformers 5.

    Attributes:
        rms: The norms are RMSNorm, computed in float32; else LayerNorm.
        norms: Norms of a layer.
        streams: Different inputs that they have.
        normed: Different outputs that they have and matrices read.
        attended: Arrays of heads x head size: queries, keys and values (repeated to as many), the output.
        apart: The output matrix reads a copy of the attention's output.
        middle: Arrays of the MLP's width, without the one that the last matrix reads.
    """

    rms: bool
    norms: int
    streams: int
    normed: int
    attended: int
    apart: bool
    middle: int


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. ``others`` counts the parameters of embeddings, norms and head."""

    kind: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    vocabulary: int
    window: int
    tied: bool
    linears: tuple[Linear, ...]
    others: int
    kept: Kept

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return sum(one.size for one in self.linears) + self.others

    @property
    def matrices(self) -> int:
        """Elements of the layers' matrices: the multiplications that one token costs, without attention and head."""
        return sum(one.weight for one in self.linears)

    @property
    def attended(self) -> int:
        """Width of the attention: heads x head size."""
        return self.heads * self.head_size

    @property
    def key_values(self) -> int:
        """Numbers that one token leaves in a cache of keys and values."""
        return 2 * self.layers * self.key_heads * self.head_size

    def adapted(
        self, targets: Literal["all-linear"] | Sequence[str], depth: tuple[float, float] = (0.0, 1.0)
    ) -> tuple[Linear, ...]:
        """The matrices that an adapter goes on, as :func:`unlearn.models.resolve_targets` finds them in the model.

        Raises:
            ModelError: a name that no matrix has, or a depth with no layer.
        """
        low, high = depth
        found = []
        unmatched = set() if targets == "all-linear" else set(targets)
        for one in self.linears:
            by = (
                [t for t in unmatched if one.path == t or one.path.endswith(f".{t}")] if targets != "all-linear" else []
            )
            named = targets == "all-linear" or any(one.path == t or one.path.endswith(f".{t}") for t in targets)
            unmatched -= set(by)
            layer = layer_of(one.path)
            within = depth == (0.0, 1.0) or (layer is not None and low <= (layer + 0.5) / self.layers <= high)
            if named and within:
                found.append(one)
        if unmatched or not found:
            kinds = ", ".join(dict.fromkeys(one.path.rpartition(".")[2] for one in self.linears))
            wrong = ", ".join(sorted(unmatched)) or "anything at this depth"
            raise ModelError(
                f"vector.lora: no linear layer of this {self.kind} model is called {wrong}. It has {kinds}"
            )
        return tuple(found)


def lora_parameters(adapted: Sequence[Linear], rank: int) -> int:
    """Of A (r, in) and B (out, r) together, over all adapted matrices (Hu et al. 2106.09685)."""
    return sum(rank * (one.inputs + one.out) for one in adapted)


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """A model's shape.

    Args:
        config: What stands in its ``config.json``.
        where: Where it stands, for messages.

    Raises:
        ModelError: a family that is not written out here, or a size that is missing or no number.
    """
    kind = str(config.get("model_type"))
    if kind not in _FAMILIES:
        raise ModelError(
            f"{where}: the estimate does not know models of type {kind!r} (it knows {', '.join(_FAMILIES)}); "
            "give the config.json of one of these of like sizes with --config"
        )
    try:
        return _FAMILIES[kind](config)
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise ModelError(f"{where}: {e} is missing, or no number, in this config.json of a {kind} model") from e


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise KeyError(name)
    return value


def _every(layers: int, head: str, make: Callable[[str], Iterator[Linear]]) -> tuple[Linear, ...]:
    if layers > _DEEPEST:
        raise KeyError("the number of layers")
    return tuple(one for n in range(layers) for one in make(f"{head}.{n}"))


def _llama(config: Mapping[str, Any]) -> Shape:
    """Llama, Mistral, Qwen2 and Qwen3: RMSNorm, grouped keys and values, a gated MLP of three matrices."""
    kind = str(config["model_type"])
    d, f, v = (_size(config, n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = (_size(config, n) for n in ("num_hidden_layers", "num_attention_heads"))
    groups = _size(config, "num_key_value_heads", heads)
    size = _size(config, "head_dim", 128 if kind == "qwen3" else d // heads)
    asked = bool(config.get("attention_bias", False))
    bias, out_bias = (True, False) if kind == "qwen2" else (asked, asked)
    mlp_bias = kind == "llama" and bool(config.get("mlp_bias", False))
    wide, narrow = heads * size, groups * size

    def layer(at: str) -> Iterator[Linear]:
        for name, out in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
            yield Linear(f"{at}.self_attn.{name}", out, d, bias, "attention")
        yield Linear(f"{at}.self_attn.o_proj", d, wide, out_bias, "output")
        yield Linear(f"{at}.mlp.gate_proj", f, d, mlp_bias, "mlp")
        yield Linear(f"{at}.mlp.up_proj", f, d, mlp_bias, "mlp")
        yield Linear(f"{at}.mlp.down_proj", d, f, mlp_bias, "down")

    tied = bool(config.get("tie_word_embeddings", False))
    others = v * d * (1 if tied else 2) + layers * 2 * d + d + (layers * 2 * size if kind == "qwen3" else 0)
    kept = Kept(rms=True, norms=2, streams=2, normed=2, attended=4, apart=False, middle=3)
    linears = _every(layers, "model.layers", layer)
    window = _size(config, "max_position_embeddings", 2048)
    return Shape(kind, layers, d, heads, groups, size, f, v, window, tied, linears, others, kept)


def _phi(config: Mapping[str, Any]) -> Shape:
    """Phi-1, 1.5 and 2: LayerNorm, attention and MLP side by side, biases everywhere, in the head too."""
    d, f, v = (_size(config, n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = (_size(config, n) for n in ("num_hidden_layers", "num_attention_heads"))
    groups, size = _size(config, "num_key_value_heads", heads), d // heads

    def layer(at: str) -> Iterator[Linear]:
        for name, out in (("q_proj", d), ("k_proj", groups * size), ("v_proj", groups * size)):
            yield Linear(f"{at}.self_attn.{name}", out, d, True, "attention")
        yield Linear(f"{at}.self_attn.dense", d, d, True, "output")
        yield Linear(f"{at}.mlp.fc1", f, d, True, "attention")  # it reads the same norm's output
        yield Linear(f"{at}.mlp.fc2", d, f, True, "down")

    tied = bool(config.get("tie_word_embeddings", False))
    heads_norms = layers * 4 * size if config.get("qk_layernorm") else 0
    others = v * d * (1 if tied else 2) + v + layers * 2 * d + 2 * d + heads_norms
    middle = _middle(str(config.get("hidden_act", "gelu_new")))
    kept = Kept(rms=False, norms=1, streams=1, normed=1, attended=4, apart=True, middle=middle)
    linears = _every(layers, "model.layers", layer)
    window = _size(config, "max_position_embeddings", 2048)
    return Shape("phi", layers, d, heads, groups, size, f, v, window, tied, linears, others, kept)


def _gpt2(config: Mapping[str, Any]) -> Shape:
    """GPT-2: LayerNorm, one fused matrix for queries, keys and values, learned positions, always tied."""
    d, layers, heads, v = (_size(config, n) for n in ("n_embd", "n_layer", "n_head", "vocab_size"))
    f, places = _size(config, "n_inner", 4 * d), _size(config, "n_positions", 1024)

    def layer(at: str) -> Iterator[Linear]:
        yield Linear(f"{at}.attn.c_attn", 3 * d, d, True, "attention")
        yield Linear(f"{at}.attn.c_proj", d, d, True, "output")
        yield Linear(f"{at}.mlp.c_fc", f, d, True, "mlp")
        yield Linear(f"{at}.mlp.c_proj", d, f, True, "down")

    others = v * d + places * d + layers * 4 * d + 2 * d
    middle = _middle(str(config.get("activation_function", "gelu_new")))
    kept = Kept(rms=False, norms=2, streams=2, normed=2, attended=4, apart=False, middle=middle)
    linears = _every(layers, "transformer.h", layer)
    return Shape("gpt2", layers, d, heads, heads, d // heads, f, v, places, True, linears, others, kept)


def _gpt_neox(config: Mapping[str, Any]) -> Shape:
    """GPT-NeoX and Pythia: two LayerNorms of the same input, fused queries, keys and values."""
    d, f, v = (_size(config, n) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = (_size(config, n) for n in ("num_hidden_layers", "num_attention_heads"))
    bias, parallel = bool(config.get("attention_bias", True)), bool(config.get("use_parallel_residual", True))

    def layer(at: str) -> Iterator[Linear]:
        yield Linear(f"{at}.attention.query_key_value", 3 * d, d, bias, "attention")
        yield Linear(f"{at}.attention.dense", d, d, bias, "output")
        yield Linear(f"{at}.mlp.dense_h_to_4h", f, d, True, "mlp")
        yield Linear(f"{at}.mlp.dense_4h_to_h", d, f, True, "down")

    tied = bool(config.get("tie_word_embeddings", False))
    others = v * d * (1 if tied else 2) + layers * 4 * d + 2 * d
    middle = _middle(str(config.get("hidden_act", "gelu")))
    streams = 1 if parallel else 2
    kept = Kept(rms=False, norms=2, streams=streams, normed=2, attended=6, apart=True, middle=middle)
    linears = _every(layers, "gpt_neox.layers", layer)
    window = _size(config, "max_position_embeddings", 2048)
    return Shape("gpt_neox", layers, d, heads, heads, d // heads, f, v, window, tied, linears, others, kept)


def _middle(activation: str) -> int:
    """Arrays that an activation function keeps; gelu_new is written out in plain operations and keeps four."""
    return 4 if activation in ("gelu_new", "gelu_fast") else 1


_FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
    "phi": _phi,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
