"""Bytes that training and scoring hold on the device, as formulas of a model's shape.

Weights: one number per parameter. A LoRA's parameters are float32 whatever the model's format (peft), with a gradient
and AdamW's two moments: 16 bytes each. Activations are what autograd keeps for the way back, array by array
(:class:`unlearn.estimates.shapes.Kept`; Korthikanti et al. 2205.05198 count the same way, with all weights trained and
other attention); with gradient checkpointing one array per layer (Chen et al. 1604.06174) and one layer's arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from unlearn.estimates.passes import Pass
from unlearn.estimates.shapes import Linear, Shape, lora_parameters

LORA_BYTES = 16  # float32: weight 4, gradient 4, AdamW's moments 8 (1711.05101)
_HEAP = 0.5  # of a batch's arrays: what malloc keeps between arrays of changing size; measured over 40 steps
_MAPPED = 32 * 2**20  # bytes from which on malloc gives an array back to the system at once, at the latest
GIVEN_BACK = "large logits"
_LOGITS = 12  # bytes per logit at the peak: float32 log-softmax that is kept, and two gradients
_ANSWERS = 20  # where a divergence from another model's is taken: two log-softmaxes, their difference, two gradients
_HEAD = 64 * 2**20  # bytes of float32 logits at a time (unlearn.forward)
_HEADS_ALIVE = 3.5  # arrays of that size: as the head gives them, in float32, under the exponential, compared
_STORE = 2 * 2**30  # keys and values of texts that are written, without a GPU (unlearn.decoding)
_OUTPUTS = 1 << 25  # numbers of a model's outputs that a correlation holds at a time (unlearn.correlation)
_SLOPE = 256  # tokens of a pass that takes a slope (unlearn.correlation)
SCORED_AT_LEAST = 1024  # tokens of a scoring pass; GPUs take more where memory is free, and less when it runs out
QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes of a weight: 4 bits and a float32 per block of 64 (2305.14314)


def weights(shape: Shape, size: int) -> int:
    """Bytes of a model held in numbers of ``size`` bytes."""
    return shape.parameters * size


def quantised(shape: Shape, kind: Literal["nf4", "int8"], size: int) -> int:
    """Bytes of a copy whose layers' matrices are packed; the rest keeps its format."""
    return round(shape.matrices * QUANTISED[kind]) + (shape.parameters - shape.matrices) * size


def kept_per_token(
    shape: Shape, adapted: Sequence[Linear] | None, rank: int, size: int, width: int, cast: int = 4
) -> float:
    """Bytes that one layer keeps of one token for the way back.

    Args:
        adapted: One layer's matrices with an adapter; None: all weights are trained.
        rank: Of the adapters.
        size: Bytes of a number of the model's format.
        width: Tokens of a padded row: each token has a row of the attention's mask.
        cast: Bytes of the numbers an adapter reads. Where the model has 16 bits every adapter keeps a copy of its input
            of its own: in float32 (4), or under autocast, as on a GPU, in the model's format again (2).
    """
    kept, d, f, wide = shape.kept, shape.hidden, shape.inner, shape.attended
    found = 0.0
    if (
        kept.rms
    ):  # in float32: the input and its inverse deviation; the normed values where the norm's weight is trained
        found += kept.streams * d * 4 + kept.norms * 4 + (kept.norms * d * size if adapted is None else 0)
    else:
        found += kept.streams * d * size + kept.norms * 2 * size
    found += kept.attended * wide * size + shape.heads * 4 + width * size
    found += kept.middle * f * size
    if adapted is None or size == 4:
        read = {one.reads for one in adapted} if adapted is not None else {"attention", "output", "mlp", "down"}
        normed = min(len(read & {"attention", "mlp"}), kept.normed)
        found += normed * d * size + ("output" in read and kept.apart) * wide * size + ("down" in read) * f * size
    else:
        found += sum(one.inputs for one in adapted) * cast
    return found + (rank * len(adapted) * (4 if size == 4 else cast) if adapted is not None else 0)


def activations(
    shape: Shape, adapted: Sequence[Linear] | None, rank: int, size: int, one: Pass, checkpointing: bool, cast: int
) -> int:
    """Bytes of a batch's activations, of the whole way back.

    Args:
        adapted: All matrices with an adapter; None: all weights are trained.
        one: The batch.
        checkpointing: Only every layer's input is kept, and the layer run again on the way back.
    """
    layer, layers = per_layer(shape, adapted)
    each = kept_per_token(shape, layer, rank, size, one.width, cast)
    if checkpointing:
        return round(one.tokens * (shape.layers * shape.hidden * size + 2 * each))
    # on the way back the gradients of one layer's arrays are there as well
    return round(one.tokens * each * (layers + 1))


def per_layer(shape: Shape, adapted: Sequence[Linear] | None) -> tuple[Sequence[Linear] | None, int]:
    """Matrices with an adapter in the layer that has most, and how many layers there are from the first one on."""
    if adapted is None:
        return None, shape.layers
    by: dict[int, list[Linear]] = {}
    each = len(shape.linears) // shape.layers
    place = {one.path: n // each for n, one in enumerate(shape.linears)}
    for one in adapted:
        by.setdefault(place[one.path], []).append(one)
    return max(by.values(), key=len), shape.layers - min(by)


def logits(shape: Shape, heads: int, size: int, plain: bool) -> int:
    """Bytes of the logits of a training batch and of what the loss makes of them."""
    each = _LOGITS + (size if size < 4 else 0) if plain else _ANSWERS
    return heads * shape.vocabulary * each


def training(
    shape: Shape,
    adapted: Sequence[Linear] | None,
    rank: int,
    size: int,
    one: Pass,
    *,
    checkpointing: bool,
    plain: bool,
    cast: int,
    heap: bool = False,
) -> Mapping[str, int]:
    """What a fine-tuning holds besides the weights, by name.

    Args:
        heap: It is in main memory, where what was given back is not all of use for the next batch.
        plain: The loss is cross-entropy at every place of a batch, and not one of :mod:`unlearn.objectives`.
    """
    found = {"activations": activations(shape, adapted, rank, size, one, checkpointing, cast)}
    large = 4 * one.heads * shape.vocabulary > _MAPPED
    if heap:
        small = found["activations"] + (0 if large else logits(shape, one.heads, size, plain))
        found["between the arrays"] = round(_HEAP * small)
    found[GIVEN_BACK if large else "logits"] = logits(shape, one.heads, size, plain)
    if adapted is None:
        # AdamW's moments have the weights' format
        return {"gradients": weights(shape, size), "optimiser": 2 * weights(shape, size), **found}
    return {"LoRA, gradients, optimiser": LORA_BYTES * lora_parameters(adapted, rank), **found}


def edit(adapted: Sequence[Linear], rank: int | None, size: int) -> int:
    """Bytes of a vector on a model: in float32 a copy of the weights it changes, else its factors beside them.

    Args:
        rank: Of the edit; None: it is dense.
    """
    factors = 4 * (lora_parameters(adapted, rank) if rank is not None else sum(one.weight for one in adapted))
    return factors + (4 * sum(one.weight for one in adapted) if size == 4 else 0)


def scoring(shape: Shape, size: int, edited: bool, tokens: int = SCORED_AT_LEAST) -> int:
    """Bytes of a scoring pass of so many tokens and its chunk of logits."""
    return round(tokens * _passed(shape, size, edited) + _HEADS_ALIVE * _HEAD)


def scoring_rows(shape: Shape, size: int, edited: bool, tokens: int, more: bool) -> Mapping[str, int]:
    """What a pass of lm-eval's own model holds, by name.

    Args:
        tokens: Of the batch, padded.
        more: It is not the only batch: the one before is let go of when the next one has been computed.
    """
    array = tokens * shape.vocabulary * size  # logits, their log-softmax, and that of the batch before
    kept = GIVEN_BACK if array > _MAPPED else "logits"
    return {"a pass": tokens * _passed(shape, size, edited), kept: array * (3 if more else 2)}


def _passed(shape: Shape, size: int, edited: bool) -> int:
    """Bytes of a token within one layer."""
    each = (4 * shape.hidden + 8 * shape.attended + 4 * shape.inner) * size
    widest = max(one.inputs + 3 * one.out for one in shape.linears)
    # input, change, output and sum of one matrix in float32
    return each + (4 * widest if edited and size < 4 else 0)


def key_values(shape: Shape, size: int) -> int:
    """Bytes that one token leaves in a cache of keys and values."""
    return shape.key_values * size


def writing(shape: Shape, size: int, texts: int, longest: int, gpu: bool) -> int:
    """Bytes of keys and values of the texts that are written at a time (unlearn.decoding)."""
    each = key_values(shape, size) * longest
    slots = min(256 if gpu else 64, texts)
    return each * (slots if gpu else max(1, min(slots, _STORE // max(each, 1))))


def correlating(shape: Shape, answers: int) -> int:
    """Bytes of three models' outputs at the answered places, one of them still in pieces."""
    return 4 * 4 * min(_OUTPUTS, answers * shape.vocabulary)


def slope(shape: Shape, adapted: Sequence[Linear], rank: int, size: int, longest: int) -> int:
    """Bytes of a pass that is differentiated along the edit; no weight gets a gradient."""
    tokens = max(_SLOPE, longest)
    one = Pass(1, tokens, tokens)
    return activations(shape, adapted, rank, size, one, False, 4) + logits(shape, tokens, size, True)
