"""The ways of shaping a vector, each a pure function of the vector, what else there is, and the recipe's settings.

What they are called, need and are explained by is in :data:`unlearn.recipe.methods.METHODS`, under the same names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unlearn.console import say
from unlearn.errors import VectorError
from unlearn.model.load import layer_of
from unlearn.processes import told
from unlearn.recipe.methods import (
    METHODS,
    SHAPERS,
    EthosSpec,
    KfacSpec,
    LearnedSpec,
    LinesSpec,
    LowRankSpec,
    PertaSpec,
    ProjectSpec,
    PruneSpec,
    ShrinkSpec,
    SlopesSpec,
    VectorSpec,
)
from unlearn.store.files import some
from unlearn.vector.change import Change, Dense, LowRank, row_lengths, svd, truncated
from unlearn.vector.task_vector import TaskVector

Matrices = Mapping[str, Tensor]  # module path -> (out, in)


@dataclass(frozen=True)
class Have:
    """What a shaper may work on beside the vector; :attr:`unlearn.recipe.methods.Method.needs` says what it asks for.

    Attributes:
        fitted: The vector before any shaping.
        retain: A vector fitted on the retain sets.
        layers: How many the model has.
        weights: Of module paths: the target model's weights.
        importances: Of module paths, a kind and a number of items: how much each weight matters for the forget and for
            the retain items.
        coefficients: Of a vector and settings: module path -> weights of its components that forget and keep best.
        moments: Of module paths, and "retain" (when not given) or "forget": second moments of what modules read on such
            items, in groups that read the same; of "gradients": those of their outputs' gradients on retain items.
        slopes: Of components and a number of items: how each retain item's loss moves with each component, (N, K), and
            how the forget items' does on average, (K,).
    """

    fitted: TaskVector
    retain: TaskVector | None = None
    layers: int | None = None
    weights: Callable[[Iterable[str]], Matrices] | None = None
    importances: Callable[[Sequence[str], str, int], tuple[Matrices, Matrices]] | None = None
    coefficients: Callable[[TaskVector, LearnedSpec], Matrices] | None = None
    moments: Callable[..., Iterable[tuple[Sequence[str], Tensor]]] | None = None
    slopes: Callable[[TaskVector, int], tuple[Tensor, Tensor]] | None = None

    @property
    def retain_vector(self) -> TaskVector:
        """The retain vector, of the same model as the fitted one."""
        if self.retain is None:
            raise VectorError("this method needs a vector fitted on the retain sets")
        bases = [v.meta.get("base") for v in (self.fitted, self.retain)]
        if None not in bases and bases[0] != bases[1]:
            raise VectorError("the forget and the retain vector were fitted on different models; fit both on the same")
        return self.retain


def shape(vector: TaskVector, spec: VectorSpec, have: Have) -> TaskVector:
    """Work off the recipe's shapers, in order."""
    for step in spec.steps()[1:]:
        before = vector.norm()
        with told(f"vector.method {step}", METHODS[step].less or f"leave {step} out of vector.method"):
            vector = SHAPERS[step](vector, have, spec.settings(step))
        if not isinstance(vector, TaskVector):
            raise VectorError(f"vector.method {step}: its function gave no TaskVector, but {type(vector).__name__}")
        say(f"    {step}: norm {before:.3g} to {vector.norm():.3g}")
    return vector


# -- what makes no sense


def check_moved(method: str, what: str, vector: TaskVector) -> None:
    """Refuse a vector that changes nothing."""
    if vector.norm() == 0.0:
        raise VectorError(f"{method}: {what} is zero, there is nothing in it to shape")


def check_left(method: str, result: TaskVector, source: TaskVector, advice: str) -> TaskVector:
    """``result``, if more of ``source`` is left in it than rounding leaves."""
    if result.norm() <= 1e-6 * source.norm():
        raise VectorError(f"{method}: nothing is left of the vector; {advice}")
    return result


def _check_pair(method: str, forget: TaskVector, retain: TaskVector) -> None:
    """Refuse two vectors that have nothing to do with each other."""
    check_moved(method, "the forget vector", forget)
    check_moved(method, "the retain vector", retain)
    both = {n: (m.shape, retain.modules[n].shape) for n, m in forget.modules.items() if n in retain.modules}
    clash = [f"{name} {one} and {two}" for name, (one, two) in both.items() if one != two]
    if clash or not both:
        why = f"are of different models: {some(clash)}" if clash else "share no module: fit both with the same LoRA"
        raise VectorError(f"{method}: the forget and the retain vector {why}")


def _check_matrices(method: str, what: str, vector: TaskVector, matrices: Matrices) -> None:
    """Refuse anything but one finite matrix per module of the vector, of the shape of its change."""
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    wrong = [
        f"{name}: {shapes.get(name)} where the vector changes {m.shape}"
        for name, m in vector.modules.items()
        if shapes.get(name) != m.shape
    ]
    if wrong:
        raise VectorError(f"{method}: every module needs a {what} of the shape of its change: {some(wrong)}")
    if bad := [name for name in vector.modules if not bool(torch.isfinite(matrices[name]).all())]:
        raise VectorError(f"{method}: a {what} holds values that are not finite: {some(bad)}")


# -- vectors made of fitted ones


def consensus(vectors: Sequence[TaskVector]) -> TaskVector:
    """NegMerge (2410.05583): the mean of vectors of one task where the signs of all agree, else zero; dense."""
    first = vectors[0]
    for number, vector in enumerate(vectors, 1):
        check_moved("consensus", f"vector {number} of {len(vectors)}", vector)
        one, two = ({n: m.shape for n, m in v.modules.items()} for v in (first, vector))
        if differing := sorted(n for n in one.keys() | two.keys() if one.get(n) != two.get(n)):
            raise VectorError(f"consensus: vectors 1 and {number} are not of the same modules: {some(differing)}")

    def agreed(name: str, change: Change) -> Dense:
        total, signs = torch.zeros(2, *change.shape, device=change.device)
        for delta in (vector.modules[name].delta() for vector in vectors):
            total += delta
            signs += delta.sign()
        return Dense(torch.where(signs.abs() == len(vectors), total / len(vectors), 0.0))

    merged = first.map(agreed)
    if merged.norm() == 0.0:
        raise VectorError(f"consensus: the {len(vectors)} vectors agree in sign nowhere; use fewer of them")
    return merged


def msa(forget: TaskVector, retain: TaskVector, alpha: float = 1.0, beta: float = 1.0) -> TaskVector:
    """MSA (2506.20941): alpha * tau_f - beta * tau_r, both fitted on a checkpoint before the forget set."""
    _check_pair("msa", forget, retain)
    advice = "at these weights the retain vector cancels the forget vector"
    return check_left("msa", alpha * forget - beta * retain, forget, advice)


def random_like(vector: TaskVector, seed: int) -> TaskVector:
    """Independent normal entries, scaled to the vector's Frobenius norm in every module; low-rank where it is."""
    check_moved("random vector", "the vector", vector)
    # not the seed itself, with which the vector's own fit may have begun: its first draws would come again
    generator = torch.Generator().manual_seed(random.Random(f"random vector {seed}").getrandbits(63))
    norms = vector.norms()

    def drawn(name: str, change: Change) -> Change:
        out, width = change.shape
        new: Change
        if isinstance(change, LowRank):
            a, b = (torch.randn(shape, generator=generator) for shape in ((change.rank, width), (out, change.rank)))
            new = LowRank(a, b).to(change.device)
        else:
            new = Dense(torch.randn((out, width), generator=generator)).to(change.device)
        return new.scaled(norms[name] / new.dot(new) ** 0.5)

    return vector.map(drawn)


# -- shapers

_Function = TypeVar("_Function", bound=Callable[..., TaskVector])


def shaper(function: _Function) -> _Function:
    """Register a function under its own name, for which :data:`METHODS` has the entry."""
    SHAPERS[function.__name__] = function
    return function


@shaper
def contrast(vector: TaskVector, have: Have, mu: float) -> TaskVector:
    """tau_f - mu * tau_r, exact, of rank at most r_f + r_r."""
    return vector - mu * have.retain_vector if mu else vector


@shaper
def ext_sub(vector: TaskVector, have: Have, how: None = None) -> TaskVector:
    """Extraction before subtraction (2308.08090): without the rows' parts along both vectors' common directions.

    Rows that the retain vector leaves at zero are kept whole. Low-rank vectors give one of rank at most r_f + r_r.
    """
    retain = have.retain_vector
    _check_pair("ext-sub", vector, retain)

    def extracted(name: str, ours: Change) -> Change:
        if name not in retain.modules:
            return ours
        theirs = retain.modules[name]
        f, r = row_lengths(ours), row_lengths(theirs)
        shared = r > 1e-6 * r.max()  # a shorter row has no direction
        own = torch.where(shared, 0.5, 1.0).float()[:, None]  # (out, 1)
        others = torch.where(shared, -0.5 * f / r, 0.0).float()[:, None]
        if isinstance(ours, LowRank) and isinstance(theirs, LowRank):
            return LowRank(torch.cat([ours.A, theirs.A]), torch.cat([own * ours.B, others * theirs.B], dim=1))
        return Dense(own * ours.delta() + others * theirs.delta())

    advice = "every row of it points where the retain vector's does"
    return check_left("ext-sub", vector.map(extracted), vector, advice)


@shaper
def project(vector: TaskVector, have: Have, how: ProjectSpec) -> TaskVector:
    """The part of the vector whose rows are orthogonal to the retain vector's leading row directions, at least one.

    Of a low-rank change only ``A`` is altered, and no matrix is built.
    """
    retain = have.retain_vector
    _check_pair("project", vector, retain)
    norms = retain.norms()

    def without(name: str, change: Change) -> Change:
        if norms.get(name, 0.0) == 0.0:
            return change
        rows = (change.A if isinstance(change, LowRank) else change.values).double()  # (r or out, in)
        v = truncated(retain.modules[name], energy=how.energy).A.double()  # (k, in), orthonormal
        left = (rows - (rows @ v.T) @ v).float()
        return LowRank(left, change.B) if isinstance(change, LowRank) else Dense(left)

    advice = "it lies in the retain vector's row space, so lower energy or use contrast"
    return check_left("project", vector.map(without), vector, advice)


@shaper
def shrink(vector: TaskVector, have: Have, how: ShrinkSpec) -> TaskVector:
    """A -> A (I + F) (I + F + R)^-1, R = mu C_r / d_r, F = forget * C_f / d_f; or A (I - U U^T), U ``rank`` of C_r's.

    The change D nearest to the vector's, tr[(D - T)(I + F)(D - T)^T] + tr(D R D^T) being least (SAGE 2606.18309 where F
    is 0), and its hard form, without the leading eigenvectors U (AlphaEdit 2410.02355).
    """
    check_moved("shrink", "the vector", vector)
    if have.moments is None:
        raise VectorError("shrink needs the activations of retain items")
    names = list(vector.modules)
    beside = iter(have.moments(names, "forget")) if how.forget else None

    def shrunk() -> Iterator[tuple[Sequence[str], Callable[[Tensor], Tensor]]]:
        for group, retain in have.moments(names):  # type: ignore[misc]
            if how.rank is not None:
                yield group, partial(without_leading, retain, how.rank)
            elif beside is None:
                yield group, partial(solved, [(retain, how.mu)])
            else:
                forget = next(beside)[1]
                yield group, partial(_kept, forget, how.forget, retain, how.mu)

    return check_left("shrink", _on_side(vector, shrunk()), vector, "lower mu, or rank")


@shaper
def kfac(vector: TaskVector, have: Have, how: KfacSpec) -> TaskVector:
    """A -> A (I + m C / d)^-1 and B -> (I + m G / d)^-1 B, m the root of mu (after TAK 2602.17385).

    With C and G the second moments of inputs and output gradients, tr(D^T G D C) is the second order of what a change D
    does to the losses of retain items. Of rank r like the vector; the exact minimum with that penalty is not.
    """
    check_moved("kfac", "the vector", vector)
    if have.moments is None:
        raise VectorError("kfac needs the activations of retain items")
    result = vector
    for what in ("retain", "gradients"):
        found = have.moments(list(vector.modules), what)
        sides = ((group, partial(solved, [(moment, how.mu**0.5)])) for group, moment in found)
        result = _on_side(result, sides, output=what == "gradients")
    return check_left("kfac", result, vector, "lower mu")


def _on_side(
    vector: TaskVector, found: Iterable[tuple[Sequence[str], Callable[[Tensor], Tensor]]], output: bool = False
) -> TaskVector:
    """The vector with something done to the rows of A (or of B^T, on the output side), group by group at once."""
    made: dict[str, Change] = {}
    for group, do in found:
        changes = [vector.modules[name] for name in group]
        rows = [_rows(change, output).to(changes[0].device) for change in changes]
        done = torch.split(do(torch.cat(rows)), [len(r) for r in rows])
        for name, change, new in zip(group, changes, done, strict=True):
            side = (new.T if output else new).contiguous().to(change.device)
            if isinstance(change, LowRank):
                made[name] = LowRank(change.A, side) if output else LowRank(side, change.B)
            else:
                made[name] = Dense(side)
    return vector.map(lambda name, _: made[name])


def _rows(change: Change, output: bool) -> Tensor:
    if isinstance(change, LowRank):
        return change.B.T if output else change.A
    return change.values.T if output else change.values


# -- second moments C, (d, d), the mean of x x^T over N vectors in d dimensions. Where N < d the vectors over the root
#    of N stand for it, (N, d), and nothing of (d, d) is built. Equations are solved in float64 on the CPU.


def moments_of(x: Tensor) -> Tensor:
    """The second moments of the rows of (N, d)."""
    return x / len(x) ** 0.5 if len(x) < x.shape[1] else x.T @ x / len(x)


def whole(moment: Tensor) -> Tensor:
    """Second moments as (d, d)."""
    return moment.T @ moment if len(moment) < moment.shape[1] else moment


def times(moment: Tensor, rows: Tensor) -> Tensor:
    """``rows @ C``, (r, d)."""
    return rows @ moment.T @ moment if len(moment) < moment.shape[1] else rows @ moment


def _share(moment: Tensor, weight: float) -> float:
    """``weight / d``, d the mean of C's diagonal; 0 where C is."""
    width = moment.shape[1]
    size = float(moment.square().sum() / width if len(moment) < width else moment.diagonal().mean())
    return weight / size if size else 0.0


def solved(weighted: Sequence[tuple[Tensor, float]], rows: Tensor) -> Tensor:
    """``rows @ (I + sum w C / d)^-1`` over second moments C and weights w, d the mean of C's diagonal; (r, d)."""
    r, d = rows.double().cpu(), rows.shape[1]
    if sum(len(moment) for moment, _ in weighted) < d:  # (I + X^T X)^-1 = I - X^T (I + X X^T)^-1 X
        x = torch.cat([moment.double().cpu() * _share(moment, w) ** 0.5 for moment, w in weighted])
        inner = torch.linalg.cholesky(x @ x.T + torch.eye(len(x), dtype=x.dtype))
        r = r - torch.cholesky_solve(x @ r.T, inner).T @ x
    else:
        total = torch.eye(d, dtype=r.dtype)
        for moment, w in weighted:
            total.add_(whole(moment).cpu(), alpha=_share(moment, w))
        r = torch.cholesky_solve(r.T, torch.linalg.cholesky(total, out=total)).T
    return r.float().to(rows.device)


def _kept(forget: Tensor, weight: float, retain: Tensor, mu: float, rows: Tensor) -> Tensor:
    """``rows @ (I + F) (I + F + R)^-1``."""
    unshrunk = rows + _share(forget, weight) * times(forget.to(rows.device), rows)
    return solved([(forget, weight), (retain, mu)], unshrunk)


def shrinker(moment: Tensor, mu: float) -> Tensor:
    """P = (I + mu C / d)^-1, (in, in), d the mean of C's diagonal (SAGE 2606.18309).

    A P minimises |D - BA|^2 + mu / d * tr(D C D^T) over all changes D.
    """
    return solved([(moment, mu)], torch.eye(moment.shape[1], device=moment.device))


def without_leading(moment: Tensor, rank: int, rows: Tensor) -> Tensor:
    """``rows @ (I - U U^T)``, (r, d), U the eigenvectors of the ``rank`` largest eigenvalues."""
    if rank >= moment.shape[1]:
        raise VectorError(f"shrink: rank {rank} is all of a layer that reads {moment.shape[1]} values; lower it")
    m, r = moment.double().cpu(), rows.double().cpu()
    u = svd(m)[2][:rank] if len(m) < m.shape[1] else torch.linalg.eigh(m)[1][:, -rank:].T  # (rank, d)
    return (r - (r @ u.T) @ u).float().to(rows.device)


@shaper
def ethos(vector: TaskVector, have: Have, how: EthosSpec) -> TaskVector:
    """Ethos (2403.08994): without small components in the singular bases of the weights; dense.

    The part of a change outside the thin basis of a matrix that is not square is kept.
    """
    check_moved("ethos", "the vector", vector)
    assert have.weights is not None
    weights = have.weights(vector.modules)
    _check_matrices("ethos", "weight", vector, weights)

    def filtered(name: str, change: Change) -> Dense:
        delta = change.delta()  # (out, in)
        u, _, vh = svd(weights[name].to(delta.device, torch.float32))
        components = u.T @ delta @ vh.T  # (k, k), k = min(out, in)
        small = components.abs() < how.threshold * components.abs().max()
        # subtracting what is dropped, rather than adding up what is kept, leaves the part outside the basis alone
        return Dense(delta - u @ (components * small) @ vh)

    return vector.map(filtered)


@shaper
def perta(vector: TaskVector, have: Have, how: PertaSpec) -> TaskVector:
    """PerTA (2601.22030): every entry times i_f / (i_f + alpha * i_r), its importance on either side; dense."""
    check_moved("perta", "the vector", vector)
    assert have.importances is not None
    forget, retain = have.importances(tuple(vector.modules), how.importance, how.samples)
    for what, found in (("forget importance", forget), ("retain importance", retain)):
        _check_matrices("perta", what, vector, found)

    def scaled(name: str, change: Change) -> Dense:
        delta = change.delta()
        f, r = (found[name].to(delta.device).float() for found in (forget, retain))
        # the last term decides where neither has a gradient; squares of gradients are 1e-8 and less
        return Dense(delta * (f / (f + how.alpha * r + 1e-20)))

    return check_left("perta", vector.map(scaled), vector, "nothing that it changes matters for the forget set")


@shaper
def lines(vector: TaskVector, have: Have, how: LinesSpec) -> TaskVector:
    """LiNeS (2410.17146): the change of layer l of L scaled by a + b * l / (L - 1)."""
    check_moved("lines", "the vector", vector)
    numbers = {name: layer for name in vector.modules if (layer := layer_of(name)) is not None}
    if outside := [name for name in vector.modules if name not in numbers]:
        raise VectorError(f"lines: no layer number in {some(outside)}: leave these out of vector.lora.targets")
    layers = have.layers or max(numbers.values()) + 1

    scales = {name: how.a + how.b * layer / max(layers - 1, 1) for name, layer in numbers.items()}
    return check_left("lines", vector.map(lambda name, m: m.scaled(scales[name])), vector, "raise a or b")


@shaper
def slopes(vector: TaskVector, have: Have, how: SlopesSpec) -> TaskVector:
    """Weights w = (I + mu S^T S / (N d))^-1 (1 - rho f) of the components (after GU 2511.17100).

    S (N, K) are the slopes of N retain items' losses along K components, d the mean of the diagonal of S^T S / N, f the
    forget items' mean slopes, their mean square 1. They are the weights nearest to 1 - rho f with S w held down by mu.
    """
    assert have.slopes is not None
    parts = components(vector, "slopes")
    retain, forget = have.slopes(parts, how.samples)
    goal = 1.0 - how.forget * forget / forget.square().mean().sqrt().clamp_min(1e-30)  # (K,)
    w = solved([(moments_of(retain), how.mu)], goal[None])[0]
    counts = {name: m.rank if isinstance(m, LowRank) else 1 for name, m in parts.modules.items()}
    return weigh(parts, dict(zip(counts, torch.split(w, list(counts.values())), strict=True)), "slopes", "lower mu")


@shaper
def learned(vector: TaskVector, have: Have, how: LearnedSpec) -> TaskVector:
    """The vector with a coefficient per component or module, fitted on training items (after aTLAS, 2407.02880)."""
    assert have.coefficients is not None
    parts = components(vector) if how.by == "component" else vector
    return weigh(parts, have.coefficients(parts, how))


def components(vector: TaskVector, method: str = "learned") -> TaskVector:
    """The same vector, with every low-rank change written as orthogonal rank-one terms in falling order.

    Row k of ``A`` is v_k, of length 1; column k of ``B`` is s_k u_k; terms lost in rounding are left out. A dense
    change stays whole, as one component.
    """
    check_moved(method, "the vector", vector)
    return vector.map(lambda _, change: truncated(change, energy=1.0) if isinstance(change, LowRank) else change)


def weigh(
    vector: TaskVector, weights: Matrices, method: str = "learned", advice: str = "every weight is 0: lower beta"
) -> TaskVector:
    """The vector with its components scaled: module path -> (r,), or (1,) for the whole module."""

    def scaled(name: str, change: Change) -> Change:
        w = weights[name].to(change.device).float()
        return LowRank(change.A, change.B * w) if isinstance(change, LowRank) else Dense(change.values * w)

    return check_left(method, vector.map(scaled), vector, advice)


@shaper
def low_rank(vector: TaskVector, have: Have, how: LowRankSpec) -> TaskVector:
    """Every module truncated to its leading singular components."""
    return vector.to_low_rank(rank=how.rank, energy=how.energy)


@shaper
def prune(vector: TaskVector, have: Have, how: PruneSpec) -> TaskVector:
    """The largest part of every module, the rest zero."""
    return vector.prune(how.keep, how.by)


@shaper
def rescale(vector: TaskVector, have: Have, how: None = None) -> TaskVector:
    """The vector in its own direction, as long as it was when it was fitted."""
    check_moved("rescale", "the vector", vector)
    check_moved("rescale", "the fitted vector", have.fitted)
    return vector * (have.fitted.norm() / vector.norm())
