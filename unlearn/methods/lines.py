"""LiNeS (2410.17146): scale the change of layer l by a + b * l / (L - 1), l = 0 ... L - 1.

Shallow layers hold what is general, deep ones what is particular to the task: with a < 1 and b > 0 the edit spares the
former. The paper writes alpha and beta, and counts layers from 1.
"""

from __future__ import annotations

from unlearn.changes import Change, listed
from unlearn.errors import VectorError
from unlearn.layers import layer_of
from unlearn.methods.checks import check_left, check_moved, check_number
from unlearn.vector import TaskVector


def lines(
    vector: TaskVector, a: float, b: float, layers: int | None = None, elsewhere: float | None = None
) -> TaskVector:
    """The vector with every layer's change scaled by a line in its depth.

    Args:
        vector: Any vector.
        a: Scale of the first layer.
        b: What the last layer's scale has more; a + b is the last layer's.
        layers: L, the model's number of layers. By default one more than the highest number in the module names,
            which is right when the last layer is among them.
        elsewhere: Scale of modules outside the layers (embeddings, the head).

    Raises:
        VectorError: a zero vector, numbers out of range, modules whose names have no layer number while ``elsewhere``
            is not given (all of them are named), no layers at all, or nothing is left.
    """
    check_moved("lines", "the vector", vector)
    for name, value in (("a", a), ("b", b), ("elsewhere", elsewhere or 0.0)):
        check_number("lines", name, value)
    depth = {name: layer_of(name) for name in vector.modules}
    outside = [name for name, layer in depth.items() if layer is None]
    if outside and elsewhere is None:
        raise VectorError(f"lines: no layer number in {listed(outside)}: say how these are scaled (elsewhere)")
    numbers = [layer for layer in depth.values() if layer is not None]
    if not numbers:
        raise VectorError("lines: none of the vector's modules is in a numbered layer")
    count = max(numbers) + 1 if layers is None else layers
    if count <= max(numbers):
        raise VectorError(
            f"lines: layers is {layers}, but the vector changes layer number {max(numbers)}, counted from 0"
        )

    def shape(name: str, change: Change) -> Change:
        layer = depth[name]
        if layer is None:
            assert elsewhere is not None
            return change.scaled(elsewhere)
        return change.scaled(a + b * layer / max(count - 1, 1))

    return check_left("lines", vector.map(shape), vector, "raise a or b")
