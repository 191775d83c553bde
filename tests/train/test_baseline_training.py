"""The baselines against their formulas written out: as they are trained, and on made-up logits."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from train_arena import adapted, divergence, nlls, per_token, row, said, tokens

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import ModelError, TrainingError
from unlearn.model.load import Loaded
from unlearn.recipe.methods import METHODS, IgnoranceSpec, LoraSpec, Loss, RetainKLSpec, RmuSpec, TrainSpec
from unlearn.train.batches import Pad, Part, answers
from unlearn.train.learned import fila
from unlearn.train.losses import (
    Against,
    Keep,
    Objective,
    Teacher,
    answer_log_probability,
    direction,
    dpo,
    gradient_ascent,
    ihl,
    kl,
    npo,
    retain_only,
    scaled_rows,
    simnpo,
)
from unlearn.train.vectors import lora_modules, read_adapter, train_vector
from unlearn.vector.change import LowRank
from unlearn.vector.edit import shape_of, subtracted
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
Gradients = dict[str, Tensor]
LOSSES = get_args(Loss)
HELD = ("gradient_difference, kl", "npo, nll", "npo, kl", "simnpo, kl", "idk_dpo, kl", "ihl, kl")
PENALTIES = ("penalty, one", "penalty, two", "ignorance, two")
TAUGHT = (*LOSSES, *HELD, "ignorance", "ignorance that grows", *PENALTIES)
WEIGHT, BETA, MARGIN, SCALE, C = 2.5, 0.4, 0.3, 3.0, 1.5
FORGET = [row(20, 9, 4), row(40, 3, 1), row(50, 7, 5)]
RETAIN = [row(60, 12, 7), row(90, 8, 2)]


def instead(r: Encoded, start: int) -> Encoded:
    """The same answer after another prompt."""
    answer = [label for label in r.labels if label != IGNORE]
    return Encoded((*range(start, start + 4), *answer), (*[IGNORE] * 4, *answer))


ASKED = {(r.input_ids, r.labels): [(instead(r, 3),), (instead(r, 70),)] for r in FORGET}
PROMPTS = {r: tuple(i for i, label in zip(r.input_ids, r.labels, strict=True) if label == IGNORE) for r in FORGET}
REFUSED = {r: Encoded((*PROMPTS[r], 5, 6, 7), (*[IGNORE] * len(PROMPTS[r]), 5, 6, 7)) for r in FORGET}


SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"beta": BETA} for name in ("npo", "idk_dpo")},
    "simnpo": {"beta": BETA, "margin": MARGIN},
    "rmu": {"scale": SCALE, "layer": 1, "layers": 2},
}


def against(loss: str, retain: list[Encoded] = RETAIN, batch_size: int = 8, **values: Any) -> Against:
    """``loss, kl`` holds retain rows by the divergence; a name alone as it is by default."""
    if loss.startswith("ignorance"):
        grow = IgnoranceSpec(grow=WEIGHT * loss.endswith("grows"))
        return Against("ignorance", grow, teacher=Teacher(ASKED, each=2))
    name: Any
    name, _, held = loss.partition(", ")
    kind, teacher = METHODS[name].settings, None
    more = {} if name == "rmu" else {"retain_loss": held or "nll"}
    how = kind(**{"weight": WEIGHT, **SETTINGS.get(name, {}), **more, **values}) if kind is not None else None
    if name == "idk_dpo":
        teacher = Teacher({(r.input_ids, r.labels): [(REFUSED[r],)] for r in FORGET})
    return Against(name, how, retain if name not in ("gradient_ascent", "npo") or held else (), teacher, batch_size)


def objective(loss: str) -> dict[str, Any]:
    """What :func:`train_vector` takes: a penalty on top of cross-entropy, another loss, or both."""
    name, _, sides = loss.partition(", ")
    if loss not in PENALTIES:
        return {"against": against(loss)}
    keep = Keep(RETAIN, RetainKLSpec.model_validate({"sides": sides, "weight": WEIGHT, "coefficients": (C, C)}))
    return {"keep": keep, **({"against": against(name)} if name != "penalty" else {})}


@contextmanager
def times(model: PeftModel, factor: float) -> Iterator[None]:
    """The adapter's change so many times."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.scaling["default"] *= factor
    yield
    for layer in layers:
        layer.scaling["default"] /= factor


def ignorance_of(model: PeftModel, grows: bool) -> Tensor:
    total = torch.zeros(())
    for r in FORGET:
        with torch.no_grad(), model.disable_adapter():
            q = torch.stack([said(model, other).exp() for (other,) in ASKED[r.input_ids, r.labels]]).mean(0)
        total = total + (q * (q.log() - said(model, r))).sum()
    if grows:
        with times(model, -1):
            total = total + WEIGHT * torch.stack(nlls(model, FORGET)).sum()
    return total / tokens(FORGET)


def penalty_of(model: PeftModel, sides: str) -> Tensor:
    before = [untouched(model, said, r) for r in RETAIN]
    total = divergence(before, [said(model, r) for r in RETAIN])
    if sides == "two":
        with times(model, -C):
            total = total + divergence(before, [said(model, r) for r in RETAIN])
    return WEIGHT * total


def untouched(model: PeftModel, what: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), model.disable_adapter():
        return what(model, *args)


def hidden(model: nn.Module, rows: list[Encoded]) -> list[Tensor]:
    """What the last layer puts out where each row's answer is predicted, (L, d)."""
    found: list[Tensor] = []
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.1"))
    for r in rows:
        out: list[Any] = []
        handle = layer.register_forward_hook(lambda module, args, output, out=out: out.append(output))
        model(torch.tensor([r.input_ids]))
        handle.remove()
        whole = out[0][0] if isinstance(out[0], tuple) else out[0]
        found.append(whole[0, [t - 1 for t, label in enumerate(r.labels) if label != IGNORE]])
    return found


def forgetting(model: PeftModel, loss: str) -> Tensor:
    """The term on the forget rows."""
    now = nlls(model, FORGET)
    if loss == "npo":
        before = untouched(model, nlls, FORGET)
        terms = [torch.log(1 + torch.exp(b - n) ** BETA) for n, b in zip(now, before, strict=True)]
        return 2 / BETA * torch.stack(terms).mean()
    if loss == "simnpo":
        means = [n / tokens([r]) for n, r in zip(now, FORGET, strict=True)]
        return -2 / BETA * torch.stack([torch.log(1 / (1 + torch.exp(MARGIN - BETA * m))) for m in means]).mean()
    if loss == "idk_dpo":
        refused = [REFUSED[r] for r in FORGET]
        chosen, before = nlls(model, refused), untouched(model, nlls, refused)
        known = untouched(model, nlls, FORGET)
        gains = [(b - c) - (k - n) for b, c, k, n in zip(before, chosen, known, now, strict=True)]
        return 2 / BETA * torch.stack([torch.log(1 + torch.exp(-BETA * gain)) for gain in gains]).mean()
    if loss == "rmu":
        drawn = torch.rand(64, generator=torch.Generator().manual_seed(0))
        far = [(h - SCALE * drawn / drawn.norm()) ** 2 for h in hidden(model, FORGET)]
        return torch.stack([square.mean() for square in far]).mean()
    if loss == "ihl":
        total = torch.zeros(())
        for r in FORGET:
            for p, label in zip(said(model, r).exp(), [x for x in r.labels if x != IGNORE], strict=True):
                total = total + 1 + p[label] - max(p[v] for v in range(len(p)) if v != label)
        return total / tokens(FORGET)
    return -torch.stack(now).sum() / tokens(FORGET)


def wanted(model: PeftModel, loss: str) -> Tensor:
    """The formulas written out, from separate passes with the adapter and without it, a row at a time."""
    name, _, held = loss.partition(", ")
    if loss in PENALTIES:
        plain = torch.stack(nlls(model, FORGET)).sum() / tokens(FORGET)
        return (plain if name == "penalty" else ignorance_of(model, False)) + penalty_of(model, held)
    if name.startswith("ignorance"):
        return ignorance_of(model, name.endswith("grows"))
    forgotten = forgetting(model, name)
    if name in ("gradient_ascent", "npo") and not held:
        return forgotten
    if name == "rmu":
        pairs = zip(hidden(model, RETAIN), untouched(model, hidden, RETAIN), strict=True)
        return forgotten + WEIGHT * torch.stack([((h - b) ** 2).mean() for h, b in pairs]).mean()
    if held == "kl":
        before = [untouched(model, said, r) for r in RETAIN]
        return forgotten + WEIGHT * divergence(before, [said(model, r) for r in RETAIN])
    return forgotten + WEIGHT * torch.stack(nlls(model, RETAIN)).sum() / tokens(RETAIN)


@pytest.fixture
def first_step(loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, Gradients]]:
    """One step of the trainer from the adapter of :func:`adapted`: its loss, and its gradient before it is clipped."""

    def go(folder: Path, what: dict[str, Any], rows: list[Encoded] = FORGET, **spec: Any) -> tuple[float, Gradients]:
        state = {k: v.clone() for k, v in adapted(loaded(folder).model).state_dict().items() if "lora_" in k}
        seen: Gradients = {}

        def start_there(model: Any, config: Any) -> Any:
            peft_model = get_peft_model(model, config)
            peft_model.load_state_dict(state, strict=False)
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:

                    def add(g: Tensor, name: str = name) -> None:
                        seen[name] = seen.get(name, torch.zeros_like(g)) + g

                    parameter.register_hook(add)
            return peft_model

        monkeypatch.setattr("unlearn.train.vectors.get_peft_model", start_there)
        got = loaded(folder)
        how = TrainSpec(**({"steps": 1, "batch_size": 3, "learning_rate": 1e-3, "warmup": 0.0} | spec))
        work = tmp_path / str(len(list(tmp_path.iterdir())))
        lora = LoraSpec(rank=4, alpha=10)
        _, log = train_vector(got.model, got.tokenizer, rows, how, lora, 0, work, "x", {}, **what)
        return log.losses[0], seen

    return go


@pytest.mark.parametrize(
    ("family", "loss"), [*itertools.product(("phi", "llama"), TAUGHT), *itertools.product(["gpt2"], PENALTIES)]
)
@pytest.mark.parametrize(
    "spec",
    [{}, {"batch_size": 2, "accumulation": 2}, {"batch_size": 1, "accumulation": 3, "gradient_checkpointing": True}],
    ids=["one batch", "two and one", "one by one"],
)
def test_the_first_step_is_the_formula_s(
    loaded: Load,
    request: pytest.FixtureRequest,
    first_step: Callable[..., tuple[float, Gradients]],
    loss: str,
    family: str,
    spec: dict[str, Any],
) -> None:
    """However its three rows come in batches, of which the last may not be full: one mean over the whole step."""
    folder: Path = request.getfixturevalue(f"pico_{family}")
    value, gradients = first_step(folder, objective(loss), **spec)
    reference = adapted(loaded(folder).model).train()
    expected = wanted(reference, loss)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    found = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert sorted(gradients) == sorted(found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-2  # against which 1e-5 is little


def fit(model: Loaded, objective: Against, work: Path, **spec: Any) -> TaskVector:
    how = TrainSpec(**({"steps": 12, "batch_size": 3, "learning_rate": 1e-2} | spec))
    lora = LoraSpec(rank=4, alpha=8)
    vector, _ = train_vector(model.model, model.tokenizer, FORGET, how, lora, 0, work, "x", {}, against=objective)
    return vector


def test_they_forget_and_the_difference_keeps(phi: Loaded, tmp_path: Path) -> None:
    """theta + tau is the model that has forgotten; at the end the model is as it was."""
    before = per_token(phi.model, FORGET), per_token(phi.model, RETAIN)
    rise: dict[str, tuple[float, float]] = {}
    for loss in ("gradient_ascent", "gradient_difference", "npo"):
        with subtracted(phi.model, fit(phi, against(loss), tmp_path / loss), -1.0):
            rise[loss] = per_token(phi.model, FORGET) - before[0], per_token(phi.model, RETAIN) - before[1]
        assert rise[loss][0] > 1.0
    assert rise["gradient_difference"][1] < rise["gradient_ascent"][1] - 0.5
    assert (per_token(phi.model, FORGET), per_token(phi.model, RETAIN)) == before


@pytest.mark.parametrize(("loss", "least"), [("npo", 1), ("simnpo", 1), ("idk_dpo", 1), ("ihl", 0.3), ("rmu", 0.05)])
def test_held_by_the_divergence_the_rest_stays(phi: Loaded, tmp_path: Path, loss: str, least: float) -> None:
    """Of RMU by its own term; what its layer puts out comes to lie along the one direction, of the length asked."""
    objective = against(f"{loss}, kl", **({"scale": 6.0} if loss == "rmu" else {}))
    before = per_token(phi.model, FORGET), per_token(phi.model, RETAIN)
    u = direction(64, 0)
    with torch.no_grad():
        near = torch.cat(hidden(phi.model, FORGET)) @ u
    with subtracted(phi.model, fit(phi, objective, tmp_path, steps=30), -1.0):
        assert per_token(phi.model, FORGET) - before[0] > least
        assert abs(per_token(phi.model, RETAIN) - before[1]) < 0.15
        if loss == "rmu":
            with torch.no_grad():
                along = torch.cat(hidden(phi.model, FORGET)) @ u
            assert float((along - near).min()) > 2.0
            assert float(along.mean()) < 6.5


def test_retain_rows_are_drawn_by_the_seed_so_many_at_a_time(
    pico_phi: Path, first_step: Callable[..., tuple[float, Gradients]]
) -> None:
    """One of two rows per step: the loss is with the one or with the other."""

    def loss(**values: Any) -> float:
        return first_step(pico_phi, {"against": against("gradient_difference", **values)})[0]

    one = [loss(retain=[r]) for r in RETAIN]
    drawn = loss(batch_size=1)
    assert abs(one[0] - one[1]) > 1e-2
    assert min(abs(drawn - value) for value in one) < 1e-4
    # rows without an answer have no part in it, however often they might be drawn
    empty = [Encoded((5, 6, 7), (5, IGNORE, IGNORE))] * 30
    assert loss(retain=[*empty, RETAIN[0]], batch_size=1) == pytest.approx(one[0], rel=1e-6)


def test_the_blocks_of_a_batch(loaded: Load, pico_phi: Path) -> None:
    """Forget rows, then the retain rows at every multiple; afterwards, whatever happens, the adapter has its scale."""
    keep = Keep(RETAIN, RetainKLSpec(coefficients=(C, C)))
    batch, factors = Objective(keep, None, Part()).batch(Pad(0)(FORGET), Pad(0), random.Random(0))
    assert factors == [1.0] * 3 + [1.0] * 2 + [-C] * 2 + [0.0] * 2
    assert batch["sizes"] == [3, 2, 2, 2]
    retain = RETAIN if batch["input_ids"][3, 0] == RETAIN[0].input_ids[0] else RETAIN[::-1]
    for number, r in enumerate([*FORGET, *retain * 3]):
        more = 12 - len(r.input_ids)
        assert batch["input_ids"][number].tolist() == [*r.input_ids, *[0] * more]
        assert batch["attention_mask"][number].tolist() == [1] * len(r.input_ids) + [0] * more
        assert batch["labels"][number].tolist() == [*r.labels, *[IGNORE] * more]
    model = adapted(loaded(pico_phi).model)
    before = read_adapter(model, {}).digest()
    with pytest.raises(KeyboardInterrupt), scaled_rows(model, factors):
        raise KeyboardInterrupt
    assert read_adapter(model, {}).digest() == before


# --- FILA's start -----------------------------------------------------------------------------------------------------


def fisher(model: nn.Module, rows: list[Encoded]) -> dict[str, Tensor]:
    """Mean square of the gradient of each row's mean negative log-likelihood, of every linear weight."""
    found: dict[str, Tensor] = {}
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for r in rows:
        slopes = torch.autograd.grad(nlls(model, [r])[0] / tokens([r]), list(weights.values()))
        for name, slope in zip(weights, slopes, strict=True):
            found[name] = found.get(name, torch.zeros_like(slope)) + slope**2 / len(rows)
    return found


def test_the_start_is_the_weighted_svd_s(phi: Loaded) -> None:
    """The closest of its rank in the norm that weighs rows by their importance (Eckart and Young)."""
    model = phi.model.requires_grad_(True)
    of_forget, of_retain = fisher(model, FORGET), fisher(model, RETAIN)
    model.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    starts = fila(model, FORGET, RETAIN, list(of_forget), 4, 64, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert starts.keys() == of_forget.keys()
    for name, start in starts.items():
        weight = model.get_parameter(f"{name}.weight").detach().double()
        f = (of_forget[name] / (of_retain[name] + 1e-5)).double().sum(1).sqrt()
        u, s, v = torch.linalg.svd(f[:, None] * weight, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ v[:4] / (f[:, None] + 1e-5)
        got = start.delta().double()
        assert start.rank == 4
        lost, least = ((f[:, None] * (weight - d)).norm() for d in (got, best))
        assert float(lost) == pytest.approx(float(least), rel=1e-3)
        assert float((got - best).norm() / best.norm()) < 0.05


def test_the_vector_is_what_came_less_the_start(
    loaded: Load, pico_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twice the rank; and resumed, from the start that is in its checkpoint, it ends as the same bits."""
    seen: dict[str, Tensor] = {}

    def kept(model: nn.Module, meta: Any) -> TaskVector:
        assert isinstance(model, PeftModel)
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                (a, b), s = (layer.lora_A["default"], layer.lora_B["default"]), layer.scaling["default"]
                seen[name.removeprefix("base_model.model.")] = s * (b.weight @ a.weight - b.start @ a.start).detach()
                assert not torch.equal(a.weight, a.start)
        seen["logits"] = model(torch.tensor([FORGET[0].input_ids])).logits.detach()
        return read_adapter(model, meta)

    plain = fit(loaded(pico_phi), against("ihl"), tmp_path / "plain")
    monkeypatch.setattr("unlearn.train.vectors.read_adapter", kept)
    phi = loaded(pico_phi)
    vector = fit(phi, against("ihl", fila=True, samples=8), tmp_path / "whole")
    assert vector.rank() == 8
    logits = seen.pop("logits")
    assert vector.modules.keys() == seen.keys()
    for name, change in vector.modules.items():
        torch.testing.assert_close(change.delta(), seen[name], atol=1e-5, rtol=1e-4)
    with subtracted(phi.model, vector, -1.0), torch.no_grad():
        torch.testing.assert_close(phi.model(torch.tensor([FORGET[0].input_ids])).logits, logits, atol=1e-4, rtol=1e-3)
    assert vector.cosine(plain) < 0.9
    # as if it had been killed before the vector was written: what it began at comes from the checkpoint

    def other(model: Any, forget: Any, retain: Any, names: Any, rank: int, samples: int, seed: int) -> Any:
        return {
            n: LowRank(
                torch.ones(rank, shape_of(model.get_submodule(n))[1]),
                torch.ones(shape_of(model.get_submodule(n))[0], rank),
            )
            for n in names
        }

    monkeypatch.setattr("unlearn.train.vectors.fila", other)
    assert fit(loaded(pico_phi), against("ihl", fila=True, samples=8), tmp_path / "whole").digest() == vector.digest()


def test_it_begins_as_the_model_itself(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """The first loss is that of an ordinary start, with no divergence from the model as it was."""
    losses = []
    for number, objective in enumerate((against("ihl, kl"), against("ihl, kl", fila=True, samples=8))):
        got, how = loaded(pico_phi), TrainSpec(steps=1, batch_size=3)
        lora = LoraSpec(rank=4, alpha=8)
        work = tmp_path / str(number)
        _, log = train_vector(got.model, got.tokenizer, FORGET, how, lora, 0, work, "x", {}, against=objective)
        losses.append(log.losses[0])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["gradient_ascent", "gradient_difference"])
def test_a_loss_without_a_floor_that_falls_for_ever(phi: Loaded, tmp_path: Path, loss: Any) -> None:
    said = rf"the loss became (nan|-?inf) at step \d+: lower learning_rate or steps, since {loss} has no lower bound"
    with pytest.raises(TrainingError, match=said):
        fit(phi, against(loss), tmp_path, learning_rate=1e30, warmup=0.0)
    assert not any("lora" in name for name, _ in phi.model.named_modules())


def test_bad_rows_and_two_objectives(phi: Loaded, tmp_path: Path) -> None:
    def go(rows: list[Encoded], keep: Keep | None) -> None:
        spec, lora = TrainSpec(steps=1), LoraSpec(rank=4, alpha=8)
        train_vector(phi.model, phi.tokenizer, rows, spec, lora, 0, tmp_path, "x", {}, keep, against("npo"))

    with pytest.raises(TrainingError, match="x: npo needs rows with a token to be predicted"):
        go([*FORGET, Encoded((1, 2), (1, IGNORE))], None)
    with pytest.raises(ValueError, match="keep adds to the cross-entropy that a baseline replaces"):
        go(FORGET, Keep(RETAIN, RetainKLSpec(sides="one")))
    for retain in ([], [Encoded((1, 2), (1, IGNORE))]):
        for loss in ("gradient_difference", "rmu"):
            with pytest.raises(TrainingError, match=f"{loss} needs retain rows with an answer"):
                against(loss, retain=retain)
    for layer, targets, message in (
        (2, "all-linear", "vector.rmu.layer: this PhiForCausalLM has no layer 2: there are 2, counted from 0"),
        (1, ("layers.0.mlp.fc1",), "vector.lora has no module in the layers 1 to 1 that learn"),
    ):
        with pytest.raises(ModelError, match=message):
            lora_modules(phi.model, LoraSpec(rank=4, targets=targets), RmuSpec(layer=layer, layers=1))
    with pytest.raises(ValueError, match="needs a range of coefficients"):
        Keep(RETAIN, RetainKLSpec(coefficients=None))
    assert not list(tmp_path.iterdir())
    assert not any("lora" in name for name, _ in phi.model.named_modules())


# --- the formulas on made-up logits -----------------------------------------------------------------------------------

quick = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 10_000)
VOCABULARY = 11


def drawn(seed: int, counts: tuple[int, ...] = (1, 3, 4)) -> tuple[Tensor, Tensor]:
    """Logits (B, 6, V) and labels (B, 6) whose rows have that many labelled tokens, the last ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(counts), 6, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.full((len(counts), 6), IGNORE)
    for number, count in enumerate(counts):
        labels[number, 6 - count :] = torch.randint(VOCABULARY, (count,), generator=generator)
    return logits, labels


def packed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, V) that predict a labelled token, and these tokens (N,)."""
    positions, targets, _ = answers(labels)
    return logits[positions], targets


def npo_of(logits: Tensor, reference: Tensor, labels: Tensor, beta: float) -> Tensor:
    positions, targets, numbers = answers(labels)
    return npo(logits[positions], reference[positions], targets, numbers, beta)


def log_probability(logits: Tensor, labels: Tensor, number: int) -> float:
    """Sum over a row's labelled tokens of log softmax at the position before, one number at a time."""
    total = 0.0
    for t in range(1, labels.shape[1]):
        label = int(labels[number, t])
        if label != IGNORE:
            values = logits[number, t - 1].tolist()
            total += values[label] - math.log(sum(math.exp(v) for v in values))
    return total


@quick
@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 1.0, 5.0]), margin=st.sampled_from([0.0, 0.7]))
def test_each_loss_is_its_formula(seed: int, beta: float, margin: float) -> None:
    """Its own mean, over 8 tokens or 3 answers, and that of a batch of a step with more of them."""
    (logits, labels), (reference, _) = drawn(seed), drawn(seed + 1)
    positions, targets, numbers = answers(labels)
    few, before = logits[positions], reference[positions]
    now, was = ([log_probability(one, labels, i) for i in range(3)] for one in (logits, reference))
    assert answer_log_probability(few, targets, numbers).tolist() == pytest.approx(now, rel=1e-5)
    ratios = [math.exp(a - b) for a, b in zip(now, was, strict=True)]
    means = [a / length for a, length in zip(now, (1, 3, 4), strict=True)]
    preferred, rejected = torch.tensor(now), torch.tensor(was)
    cases: list[tuple[Callable[..., Tensor], tuple[Any, ...], float, int, int]] = [
        (retain_only, (few, targets), -sum(now), 8, 20),
        (gradient_ascent, (few, targets), sum(now), 8, 20),
        (npo, (few, before, targets, numbers, beta), 2 / beta * sum(math.log(1 + r**beta) for r in ratios), 3, 12),
        (
            *(simnpo, (few, targets, numbers, beta, margin)),
            *(-2 / beta * sum(math.log(1 / (1 + math.exp(beta * m + margin))) for m in means), 3, 12),
        ),
        (
            *(dpo, (preferred, rejected, beta)),
            *(-2 / beta * sum(math.log(1 / (1 + r**-beta)) for r in ratios), 3, 12),
        ),
    ]
    for loss, given_, total, own, more in cases:
        assert float(loss(*given_)) == pytest.approx(total / own, rel=1e-4), loss
        assert float(loss(*given_, more)) == pytest.approx(total / more, rel=1e-4), loss


@quick
@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_the_divergence_is_its_formula_and_for_a_large_temperature_half_a_variance(
    seed: int, temperature: float
) -> None:
    p, q = (torch.randn(3, 50, generator=torch.Generator().manual_seed(seed + n)).double() * 5 for n in (0, 1))
    total = 0.0
    for one, other in zip((p / temperature).tolist(), (q / temperature).tolist(), strict=True):
        z, y = (sum(math.exp(v) for v in values) for values in (one, other))
        total += sum(math.exp(a) / z * (a - math.log(z) - b + math.log(y)) for a, b in zip(one, other, strict=True))
    assert float(kl(p, q, temperature)) == pytest.approx(temperature**2 * total / 3, rel=1e-4)
    assert float(kl(p, p + 3.0)) == pytest.approx(0.0, abs=1e-5)
    half = ((q - p).var(dim=-1, correction=0) / 2).mean()
    torch.testing.assert_close(kl(p, q, 300.0).double(), half, rtol=5e-2, atol=0.0)


@quick
@given(seed=SEEDS)
def test_the_inverted_hinge_loss_is_its_formula_and_so_is_its_gradient(seed: int) -> None:
    """d/dz_v of it is p_v ((1 if v is the token) - (1 if v is the next best) - p_token + p_next), Cha et al., 3.2."""
    logits, labels = drawn(seed)
    positions, targets, _ = answers(labels)
    few = logits[positions].float().requires_grad_()
    total, slopes = 0.0, []
    for values, label in zip(few.detach().double().tolist(), targets.tolist(), strict=True):
        z = sum(math.exp(v) for v in values)
        p = [math.exp(v) / z for v in values]
        other = max((v for v in range(VOCABULARY) if v != label), key=p.__getitem__)
        total += 1 + p[label] - p[other]
        slopes.append([p[v] * ((v == label) - (v == other) - p[label] + p[other]) for v in range(VOCABULARY)])
    loss = ihl(few, targets)
    assert float(loss.detach()) == pytest.approx(total / 8, rel=1e-5)
    assert float(ihl(few.detach(), targets, 20)) == pytest.approx(total / 20, rel=1e-5)
    (found,) = torch.autograd.grad(loss, few)
    torch.testing.assert_close(found, torch.tensor(slopes) / 8, atol=1e-6, rtol=1e-4)


def test_the_direction_is_the_seed_s_and_of_length_1() -> None:
    u = direction(64, 3)
    assert float(u.norm()) == pytest.approx(1.0)
    assert bool((u >= 0).all())
    assert torch.equal(u, direction(64, 3))
    assert not torch.equal(u, direction(64, 4))


def test_npo_and_dpo_have_a_floor_and_npo_leaves_its_reference_alone() -> None:
    logits, labels = drawn(6)
    reference = logits.clone().requires_grad_()
    at_start = npo_of(logits.requires_grad_(), reference, labels, 0.1)
    assert float(at_start.detach()) == pytest.approx(20 * math.log(2), rel=1e-5)
    assert torch.autograd.grad(at_start, reference, allow_unused=True) == (None,)
    gone = logits.detach().clone()
    gone[:, :-1].scatter_add_(2, labels[:, 1:].clamp_min(0).unsqueeze(2), torch.full((3, 5, 1), -1e4).double())
    assert 0.0 <= float(npo_of(gone, logits.detach(), labels, 0.1)) < 1e-6
    assert float(gradient_ascent(*packed(gone, labels))) < -1e3
    assert 0.0 <= float(dpo(torch.tensor([1e4, 1e4]), torch.tensor([0.1, 3.0]), 0.4)) < 1e-6


def test_misuse() -> None:
    logits, labels = packed(*drawn(7))
    numbers = answers(drawn(7)[1])[2]
    with pytest.raises(TrainingError, match="a row has no token with a label"):
        answer_log_probability(logits, labels, numbers * 2)
    with pytest.raises(TrainingError, match="no token has a label"):
        gradient_ascent(logits[:0], labels[:0])
