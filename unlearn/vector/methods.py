"""What the ways of shaping a vector refuse, each with one message that says what to do instead."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unlearn.errors import VectorError
from unlearn.model.load import layer_of
from unlearn.vector.change import Change, Dense, LowRank, listed, truncated
from unlearn.vector.task_vector import TaskVector


def check_pair(method: str, forget: TaskVector, retain: TaskVector) -> None:
    """Two vectors of one model that have something to do with each other.

    Raises:
        VectorError: one of them is zero, they share no module, or a module has different shapes.
    """
    check_moved(method, "the forget vector", forget)
    check_moved(method, "the retain vector", retain)
    both = [name for name in forget.modules if name in retain.modules]
    if not both:
        raise VectorError(
            f"{method}: the forget and the retain vector share no module ({next(iter(forget.modules))}, ... and "
            f"{next(iter(retain.modules))}, ...): make both from the same model with the same LoRA targets"
        )
    clash = [
        f"{name} {forget.modules[name].shape} and {retain.modules[name].shape}"
        for name in both
        if forget.modules[name].shape != retain.modules[name].shape
    ]
    if clash:
        raise VectorError(f"{method}: the forget and the retain vector are of different models: {listed(clash)}")


def check_moved(method: str, what: str, vector: TaskVector) -> None:
    """A vector that changes something.

    Raises:
        VectorError: every change is zero.
    """
    if vector.norm() == 0.0:
        raise VectorError(f"{method}: {what} is zero, there is nothing in it to shape")


def check_left(method: str, result: TaskVector, source: TaskVector, advice: str) -> TaskVector:
    """``result``, if more of ``source`` is left in it than rounding leaves.

    Raises:
        VectorError: nothing is left.
    """
    if result.norm() <= 1e-6 * source.norm():
        raise VectorError(f"{method}: nothing is left of the vector; {advice}")
    return result


def check_number(
    method: str, name: str, value: float, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> None:
    """A finite number from ``low``, or with ``above`` above it, to ``high``.

    Raises:
        VectorError: it is not.
    """
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    bounds = [f"above {low:g}" if above else f"at least {low:g}"] if math.isfinite(low) else []
    bounds += [f"at most {high:g}"] if math.isfinite(high) else []
    raise VectorError(f"{method}: {name} must be {' and '.join(bounds) or 'a finite number'}, not {value}")


def check_matrices(method: str, what: str, vector: TaskVector, matrices: Mapping[str, Tensor]) -> None:
    """One finite matrix per module of the vector, of the shape of its change.

    Args:
        what: What a matrix is, for the message.
        matrices: Module path -> (out, in). More than the vector's modules may be there.

    Raises:
        VectorError: modules without one, other shapes or values that are not finite; all of them are named.
    """
    missing = [name for name in vector.modules if name not in matrices]
    if missing:
        raise VectorError(f"{method}: there is no {what} for {listed(missing)}")
    wrong = [
        f"{name}: {tuple(matrices[name].shape)} where the vector changes {m.shape}"
        for name, m in vector.modules.items()
        if tuple(matrices[name].shape) != m.shape
    ]
    if wrong:
        raise VectorError(f"{method}: a {what} must be (out, in) like the change of its module: {listed(wrong)}")
    bad = [name for name in vector.modules if not bool(torch.isfinite(matrices[name]).all())]
    if bad:
        raise VectorError(f"{method}: a {what} holds values that are not finite: {listed(bad)}")


# -- negmerge (2410.05583)


def consensus(vectors: Sequence[TaskVector]) -> TaskVector:
    """The mean of vectors of the same task at the entries whose signs are the same in all of them; dense.

    Args:
        vectors: One or more, of the same modules. Of one alone nothing is masked.

    Raises:
        VectorError: no vector, a zero one, other modules or shapes, or no entry on which they agree.
    """
    if not vectors:
        raise VectorError("consensus needs at least one vector")
    first = vectors[0]
    for number, vector in enumerate(vectors):
        check_moved("consensus", f"vector {number + 1} of {len(vectors)}", vector)
        differing = [
            name
            for name in sorted({*first.modules, *vector.modules})
            if name not in vector.modules
            or name not in first.modules
            or vector.modules[name].shape != first.modules[name].shape
        ]
        if differing:
            raise VectorError(
                f"consensus: vectors 1 and {number + 1} are not of the same modules: {listed(differing)} are missing "
                "in one or have another shape"
            )
    merged = first.map(lambda name, _: _agreed([vector.modules[name] for vector in vectors]))
    if merged.norm() == 0.0:
        raise VectorError(f"consensus: the {len(vectors)} vectors agree in sign nowhere; use fewer of them")
    return merged


def _agreed(changes: Sequence[Change]) -> Dense:
    """One module, one dense matrix at a time."""
    total = torch.zeros(changes[0].shape, device=changes[0].device)
    signs = torch.zeros_like(total)
    for change in changes:
        delta = change.delta()
        total += delta
        signs += delta.sign()
    return Dense(torch.where(signs.abs() == len(changes), total / len(changes), 0.0))


# -- contrast


def contrast(forget: TaskVector, retain: TaskVector, mu: float) -> TaskVector:
    """tau_f - mu * tau_r, exact, of rank at most r_f + r_r.

    Args:
        forget: Vector of the forget set.
        retain: Vector of the retain sets, of the same model.
        mu: Weight of the retain vector; 0 is plain negation.
    """
    return forget - mu * retain if mu else forget


# -- ethos (2403.08994)


def ethos(vector: TaskVector, weights: Mapping[str, Tensor], threshold: float = 0.03) -> TaskVector:
    """The vector with its small components in the weights' singular bases removed; dense.

    Of a matrix that is not square the thin basis is used, and the part of the change outside of it, where the weight
    has no component to be filtered by, is kept.

    Args:
        vector: Vector of the forget set.
        weights: Module path -> (out, in), what the bases are taken from; for GPT-2's Conv1D the transposed weight.
        threshold: Share of a module's largest component below which one is dropped, 0 to 1; 0 drops none.

    Raises:
        VectorError: a zero vector, weights that are missing or of another shape, ``threshold`` out of range, or a
            weight without a singular value decomposition.
    """
    check_moved("ethos", "the vector", vector)
    check_matrices("ethos", "weight", vector, weights)
    check_number("ethos", "threshold", threshold, 0.0, 1.0)
    return vector.map(lambda name, change: _filtered(name, change, weights[name], threshold))


def _filtered(name: str, change: Change, weight: Tensor, threshold: float) -> Dense:
    delta = change.delta()  # (out, in)
    try:
        u, _, vh = torch.linalg.svd(weight.detach().to(delta.device, torch.float32), full_matrices=False)
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined] # torch's stubs do not re-export it
        raise VectorError(f"ethos: the singular value decomposition of {name} does not converge: {e}") from e
    components = u.T @ delta @ vh.T  # (k, k), k = min(out, in)
    small = components.abs() < threshold * components.abs().max()
    # subtracting what is dropped, rather than adding up what is kept, leaves the part outside the basis alone
    return Dense(delta - u @ (components * small) @ vh)


# -- ext-sub, extraction before subtraction (2308.08090)


_NONE = 1e-6  # a row shorter than this, against the longest, has no direction


def ext_sub(forget: TaskVector, retain: TaskVector) -> TaskVector:
    """The forget vector without its rows' parts along the two vectors' common directions.

    Low-rank vectors give one of rank at most r_f + r_r. Rows and modules that the retain vector leaves at zero have
    nothing in common with it and are kept whole.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, or nothing is left.
    """
    check_pair("ext-sub", forget, retain)

    def shape(name: str, change: Change) -> Change:
        return _extract(change, retain.modules[name]) if name in retain.modules else change

    advice = "every row of it points where the retain vector's does"
    return check_left("ext-sub", forget.map(shape), forget, advice)


def _extract(forget: Change, retain: Change) -> Change:
    """One module: rows of the forget change and of the retain change, each times a number of its own."""
    f, r = _lengths(forget), _lengths(retain)
    shared = r > _NONE * r.max()
    own = torch.where(shared, 0.5, 1.0).float()[:, None]  # (out, 1)
    others = torch.where(shared, -0.5 * f / r, 0.0).float()[:, None]
    if isinstance(forget, LowRank) and isinstance(retain, LowRank):
        return LowRank(torch.cat([forget.A, retain.A]), torch.cat([own * forget.B, others * retain.B], dim=1))
    return Dense(own * forget.delta() + others * retain.delta())


def _lengths(change: Change) -> Tensor:
    """Length of every row, (out,), float64; of factors through ``b (A A^T) b^T``."""
    if isinstance(change, Dense):
        return change.values.double().norm(dim=1)
    a, b = change.A.double(), change.B.double()
    return ((b @ (a @ a.T)) * b).sum(dim=1).clamp_min(0.0).sqrt()


# -- lines (2410.17146)


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


# -- msa, model state arithmetic


def msa(forget: TaskVector, retain: TaskVector, alpha: float = 1.0, beta: float = 1.0) -> TaskVector:
    """alpha * tau_f - beta * tau_r: what is subtracted, at coefficient 1 as in the paper, or at any other.

    Args:
        forget: Vector of the forget set from the clean checkpoint.
        retain: Vector of the retain sets from the same checkpoint.
        alpha: Weight of the forget vector, above 0.
        beta: Weight of the retain vector, 0 or more.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, weights out of range, or nothing is left.
    """
    check_pair("msa", forget, retain)
    check_number("msa", "alpha", alpha, 0.0, above=True)
    check_number("msa", "beta", beta, 0.0)
    advice = "at these weights the retain vector cancels the forget vector"
    return check_left("msa", alpha * forget - beta * retain, forget, advice)


# -- perta, per-parameter task arithmetic (2601.22030)


def perta(
    vector: TaskVector,
    forget_importance: Mapping[str, Tensor],
    retain_importance: Mapping[str, Tensor],
    alpha: float = 1.0,
    eps: float = 1e-20,
) -> TaskVector:
    """The vector with every entry scaled by its importance for forgetting against that for retaining; dense.

    Args:
        vector: Vector of the forget set.
        forget_importance: Module path -> (out, in), nowhere negative.
        retain_importance: The same on the retain sets.
        alpha: Weight of the retain importance, 0 or more.
        eps: Added to the denominator, above 0. It decides where neither set has a gradient (w = 0 there) and must be
            far below the importances: squares of the gradients of a language model are 1e-8 and less.

    Raises:
        VectorError: a zero vector, importances that are missing, negative or of another shape, ``alpha`` or ``eps``
            out of range, or nothing is left.
    """
    check_moved("perta", "the vector", vector)
    check_number("perta", "alpha", alpha, 0.0)
    check_number("perta", "eps", eps, 0.0, above=True)
    for what, found in (("forget importance", forget_importance), ("retain importance", retain_importance)):
        check_matrices("perta", what, vector, found)
        negative = [name for name in vector.modules if bool((found[name] < 0).any())]
        if negative:
            raise VectorError(f"perta: a {what} must not be negative, as it is in {listed(negative)}")

    def shape(name: str, change: Change) -> Dense:
        delta = change.delta()
        f, r = (found[name].to(delta.device).float() for found in (forget_importance, retain_importance))
        return Dense(delta * (f / (f + alpha * r + eps)))

    advice = "nothing that it changes matters for the forget set; are eps and the importances in one unit?"
    return check_left("perta", vector.map(shape), vector, advice)


# -- projection off the retain vector's row space


def project(forget: TaskVector, retain: TaskVector, energy: float = 0.9) -> TaskVector:
    """The part of the forget vector whose rows are orthogonal to the retain vector's leading row directions.

    Of a low-rank change only ``A`` is altered, and neither vector's matrices are built. Modules that the retain vector
    does not change stay as they are.

    Args:
        forget: Vector of the forget set.
        retain: Vector of the retain sets, of the same model.
        energy: Share of the retain vector's squared norm, per module, that the directions must have; above 0, at
            most 1. However small, it takes one direction per module.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, ``energy`` out of range, or nothing is left.
    """
    check_pair("project", forget, retain)
    check_number("project", "energy", energy, 0.0, 1.0, above=True)
    norms = retain.norms()

    def shape(name: str, change: Change) -> Change:
        if norms.get(name, 0.0) == 0.0:
            return change
        return _without(change, truncated(retain.modules[name], energy=energy).A)

    advice = "it lies in the retain vector's row space, so lower energy or use contrast"
    return check_left("project", forget.map(shape), forget, advice)


def _without(change: Change, directions: Tensor) -> Change:
    """The change with its rows' parts along some orthonormal directions, (k, in), removed."""
    rows = (change.A if isinstance(change, LowRank) else change.values).double()  # (r or out, in)
    v = directions.double()
    left = (rows - (rows @ v.T) @ v).float()
    return LowRank(left, change.B) if isinstance(change, LowRank) else Dense(left)


# -- a random vector of the same size


def random_like(vector: TaskVector, seed: int) -> TaskVector:
    """Independent normal entries, scaled to the vector's Frobenius norm in every module.

    Low-rank changes become low-rank ones of the same rank (both factors are normal), dense ones dense ones.

    Args:
        vector: Whose modules, ranks and norms are matched.
        seed: Decides the draw, on the CPU.

    Raises:
        VectorError: a zero vector, or a negative seed.
    """
    check_moved("random vector", "the vector", vector)
    if seed < 0:
        raise VectorError(f"random vector: seed must be 0 or more, not {seed}")
    # not the seed itself, with which the vector's own fit may have begun: its first draws would come again
    generator = torch.Generator().manual_seed(random.Random(f"random vector {seed}").getrandbits(63))
    norms = vector.norms()

    def shape(name: str, change: Change) -> Change:
        drawn = _normal(change, generator)
        return drawn.scaled(norms[name] / drawn.dot(drawn) ** 0.5)

    return vector.map(shape)


def _normal(change: Change, generator: torch.Generator) -> Change:
    out, width = change.shape
    if isinstance(change, LowRank):
        a, b = (torch.randn(shape, generator=generator) for shape in ((change.rank, width), (out, change.rank)))
        return LowRank(a, b).to(change.device)
    return Dense(torch.randn((out, width), generator=generator)).to(change.device)


# -- give a shaped vector back the size that it had when it was fitted


def rescale(vector: TaskVector, like: TaskVector) -> TaskVector:
    """The vector in its own direction, as long as another.

    Args:
        vector: What was shaped.
        like: The fitted vector whose norm it is given.

    Raises:
        VectorError: one of them is zero.
    """
    check_moved("rescale", "the vector", vector)
    check_moved("rescale", "the fitted vector", like)
    return vector * (like.norm() / vector.norm())
