"""Activations of retain rows, and the shrinking, against dense algebra; a fit inside it; the ignorant teacher."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

import unlearn
from unlearn.data.encoding import IGNORE, Encoded, encode
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.errors import DataError, VectorError
from unlearn.model.load import Loaded, linear_modules
from unlearn.recipe.data import DataSet
from unlearn.recipe.methods import IgnoranceSpec, KfacSpec, LoraSpec, RetainKLSpec, ShrinkSpec, TrainSpec, VectorSpec
from unlearn.train import moments
from unlearn.train.batches import Pad, Part
from unlearn.train.learned import materials
from unlearn.train.losses import Against, Keep, Objective, Teacher, kl
from unlearn.train.moments import SecondOrder, curvature, gradient_moments, second_moments, shrinkers
from unlearn.train.teacher import ignorant
from unlearn.train.vectors import train_vector
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import subtracted
from unlearn.vector.methods import Have, kfac, moments_of, shape, shrink, shrinker, times, whole, without_leading
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
ROWS = [Encoded(tuple(range(a, a + n)), tuple(range(a, a + n))) for a, n in ((20, 9), (60, 4), (90, 13), (7, 2))]
Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.fc2"


def read_one_by_one(model: nn.Module, name: str) -> Tensor:
    """Every row alone and without padding: the mean of x x^T over its tokens but the first."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0][0, 1:].double()))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row.input_ids]))
    hook.remove()
    x = torch.cat(seen)
    return (x.T @ x / len(x)).float()


@pytest.mark.parametrize("at_once", [2**30, 1])
def test_moments_are_those_of_rows_read_alone(
    loaded: Load, pico_phi: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "AT_ONCE", at_once)
    phi = loaded(pico_phi)
    found = list(second_moments(phi.model, ROWS, [DOWN, Q, K], phi.tokenizer.pad_token_id))
    assert sorted(sorted(names) for names, _ in found) == [[K, Q], [DOWN]]
    for names, moment in found:
        torch.testing.assert_close(moment, read_one_by_one(phi.model, names[0]), rtol=1e-4, atol=1e-6)
    with pytest.raises(VectorError, match="no retain row has more than one token"):
        list(second_moments(phi.model, [Encoded((1,), (1,))], [Q], 0))
    with torch.no_grad():
        phi.model.get_submodule(DOWN.replace("fc2", "fc1")).get_parameter("bias")[0] = torch.nan
    with pytest.raises(VectorError, match=rf"the activations that {DOWN} reads are not finite"):
        list(second_moments(phi.model, ROWS, [DOWN], phi.tokenizer.pad_token_id))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from([1e-2, 1.0, 1e3]))
def test_shrinking_is_the_solution_of_its_problem(seed: int, tokens: int, mu: float) -> None:
    """With fewer tokens than dimensions, too: the gradient of |D - T|^2 + mu/d tr(D C D^T) is zero at T P."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=draw)
    moment, tau = x.T @ x / tokens, torch.randn(5, 8, generator=draw).double()
    p = shrinker(moment, mu).double()
    delta = (tau @ p).requires_grad_()
    scale = mu / moment.diagonal().mean().double()
    objective = (delta - tau).square().sum() + scale * (delta @ moment.double() @ delta.T).trace()
    (gradient,) = torch.autograd.grad(objective, delta)
    assert float(gradient.abs().max()) < 1e-3 * (1 + mu)
    identity = torch.eye(8).double()
    torch.testing.assert_close(
        p, torch.linalg.solve(identity + scale * moment.double(), identity), rtol=1e-4, atol=1e-5
    )


def test_shrink_as_a_method() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, generator=draw)
    low, dense = LowRank(torch.randn(2, 6, generator=draw), torch.randn(4, 2, generator=draw)), torch.randn(4, 6)
    vector = TaskVector({"a": low, "b": Dense(dense)})
    have = Have(vector, moments=lambda names: [(("a", "b"), x.T @ x / 3)])
    soft, hard = (shrink(vector, have, how) for how in (ShrinkSpec(mu=50.0), ShrinkSpec(rank=3)))
    p = shrinker(x.T @ x / 3, 50.0)
    torch.testing.assert_close(soft.modules["a"].delta(), low.delta() @ p)
    torch.testing.assert_close(soft.modules["b"].delta(), dense @ p)
    # three directions span what the three tokens brought: nothing is answered to them any more
    for change in hard.modules.values():
        assert float(change.act(x).abs().max()) < 1e-5 < float(vector.modules["a"].act(x).abs().max())
    inside = TaskVector({name: LowRank(x[:2], torch.randn(4, 2)) for name in "ab"})
    with pytest.raises(VectorError, match="shrink: nothing is left of the vector; lower mu, or rank"):
        shrink(inside, have, ShrinkSpec(rank=3))
    with pytest.raises(VectorError, match="rank 6 is all of a layer that reads 6 values"):
        without_leading(x.T @ x, 6, x)
    with pytest.raises(VectorError, match="shrink needs the activations"):
        shrink(vector, Have(vector), ShrinkSpec())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([2, 20]), st.sampled_from([2, 20]), st.sampled_from([0.0, 0.7, 40.0]))
def test_shrinking_is_an_explicit_solve(seed: int, forget: int, retain: int, weight: float) -> None:
    """Few tokens or many on either side, in float64: A (I + F)(I + F + R)^-1, which is A (I + R)^-1 without F."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(retain, 8, generator=draw), torch.randn(forget, 8, generator=draw)
    low, dense = LowRank(torch.randn(2, 8, generator=draw), torch.randn(5, 2, generator=draw)), torch.randn(4, 8)
    vector = TaskVector({"a": low, "b": Dense(dense)})
    sides = {"retain": x, "forget": y}
    have = Have(vector, moments=lambda names, of="retain": [(("a", "b"), moments_of(sides[of]))])
    got = shrink(vector, have, ShrinkSpec(mu=30.0, forget=weight))
    r, f = (w * m.double().T @ m.double() / m.double().square().sum() * 8 for w, m in ((30.0, x), (weight, y)))
    eye = torch.eye(8, dtype=torch.float64)
    for name, change in vector.modules.items():
        wanted = torch.linalg.solve((eye + f + r).T, ((change.delta().double()) @ (eye + f)).T).T
        torch.testing.assert_close(got.modules[name].delta().double(), wanted, rtol=1e-3, atol=1e-4)
    # the stationary point of the two quadratic forms, by autograd
    delta = got.modules["b"].delta().double().requires_grad_()
    gap = delta - dense.double()
    objective = (gap @ (eye + f) @ gap.T).trace() + (delta @ r @ delta.T).trace()
    (gradient,) = torch.autograd.grad(objective, delta)
    assert float(gradient.abs().max()) < 1e-3 * float((eye + f + r).abs().max())


@pytest.mark.parametrize("tokens", [3, 40])
def test_kfac_shrinks_both_sides(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    x, g = torch.randn(tokens, 6, generator=draw), torch.randn(tokens, 4, generator=draw)
    low, dense = LowRank(torch.randn(2, 6, generator=draw), torch.randn(4, 2, generator=draw)), torch.randn(4, 6)
    vector = TaskVector({"a": low, "b": Dense(dense)})
    found = {"retain": [(("a", "b"), moments_of(x))], "gradients": [((n,), moments_of(g)) for n in "ab"]}
    got = kfac(vector, Have(vector, moments=lambda names, of: found[of]), KfacSpec(mu=25.0))
    assert [type(m) for m in got.modules.values()] == [LowRank, Dense]
    c, o = ((m.T @ m / m.square().sum() * m.shape[1]).double() for m in (x, g))
    left, right = (torch.linalg.inv(torch.eye(len(m)) + 5.0 * m) for m in (o, c))
    for name, change in vector.modules.items():
        wanted = left @ change.delta().double() @ right
        torch.testing.assert_close(got.modules[name].delta().double(), wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(VectorError, match="kfac needs the activations"):
        kfac(vector, Have(vector), KfacSpec())
    with pytest.raises(VectorError, match="kfac: the vector is zero"):
        kfac(0.0 * vector, Have(vector), KfacSpec())


@pytest.mark.parametrize("family", ["phi", "gpt2", "llama"])
def test_output_gradients_are_those_of_rows_one_by_one(
    loaded: Load, request: pytest.FixtureRequest, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels drawn alike; every row alone, backward to the layer's own output; the rows read anew for each layer."""
    one = loaded(request.getfixturevalue(f"pico_{family}"))
    model, pad = one.model, one.tokenizer.pad_token_id
    names = [n for n in linear_modules(model) if n.endswith(("q_proj", "c_attn", "fc2", "c_proj", "down_proj"))][:3]
    rows = [Encoded(r.input_ids, (*[IGNORE] * 2, *r.labels[2:])) for r in ROWS[:3]]
    monkeypatch.setattr(moments, "AT_ONCE", 1)
    found = {n: m for (n,), m in gradient_moments(model, rows, names, pad, seed=5)}
    with torch.no_grad():
        said = torch.cat([model(torch.tensor([r.input_ids])).logits[0, 1:-1] for r in rows]).softmax(-1)
    drawn = torch.multinomial(said, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    for name in names:
        seen: list[Tensor] = []
        kept: list[Tensor] = []
        module = model.get_submodule(name)
        hook = module.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out.requires_grad_()) or out)
        at = 0
        for row in rows:
            logits = model(torch.tensor([row.input_ids])).logits[0, 1:-1]
            loss = functional.cross_entropy(logits, drawn[at : at + len(logits)], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, kept.pop())
            seen.append(gradient[0, 1:].double())
            at += len(logits)
        hook.remove()
        g = torch.cat(seen)
        moment = found[name].double()
        assert (len(moment) < moment.shape[1]) == (len(g) < g.shape[1])  # held thin where it is smaller
        torch.testing.assert_close(whole(moment), g.T @ g / len(g), rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(VectorError, match="no retain row has a token to be predicted"):
        list(gradient_moments(model, [Encoded((1, 2), (IGNORE, IGNORE))], names, pad, 0))


@pytest.mark.parametrize("method", ["shrink", "kfac", "slopes"])
def test_one_retain_row_suffices_and_what_is_not_finite_is_said(loaded: Load, pico_phi: Path, method: str) -> None:
    """Far fewer tokens than dimensions: the vector is shorter where that row is, and finite."""
    phi, draw = loaded(pico_phi), torch.Generator().manual_seed(2)
    change = LowRank(torch.randn(2, 128, generator=draw), torch.randn(64, 2, generator=draw))
    vector = TaskVector({DOWN: change})
    pad = phi.tokenizer.pad_token_id
    have = materials(phi.model, pad, 0, vector, None, ROWS[:2], ROWS[2:3])
    spec = VectorSpec.model_validate({"method": method})
    got = shape(vector, spec, have).modules[DOWN].delta()
    assert bool(torch.isfinite(got).all())
    if method != "slopes":
        (x,) = (m for _, m in second_moments(phi.model, ROWS[2:3], [DOWN], pad, thin=True))
        assert x.shape == (len(ROWS[2].input_ids) - 1, 128)
        assert float((got @ x.T).norm()) < 0.1 * float(change.act(x).norm())
    with torch.no_grad():
        phi.model.get_submodule("lm_head").get_parameter("weight").fill_(torch.inf)
    if method != "shrink":  # which asks the model nothing
        with pytest.raises(VectorError, match="not finite: use dtype float32"):
            shape(vector, spec, have)


def test_the_curvature_is_the_quadratic_form_written_out(loaded: Load, pico_phi: Path) -> None:
    """s^2 tr[(B^T G B)(A C A^T)] against vec(D)^T (C kron G) vec(D) with D = sBA, and its gradients by autograd."""
    phi = loaded(pico_phi)
    factors = curvature(phi.model, ROWS, [Q, DOWN], phi.tokenizer.pad_token_id, 3)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=[Q, DOWN])
    peft_model = get_peft_model(phi.model, lora)
    draw = torch.Generator().manual_seed(0)
    learned = [p for p in peft_model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in learned:
            p.copy_(torch.randn(p.shape, generator=draw))
    estimate = SecondOrder(peft_model, factors)
    value = estimate()
    amount = float(value.detach())
    wanted = torch.zeros((), dtype=torch.float64)
    for name, (c, g) in factors.items():
        layer: Any = peft_model.get_submodule(f"base_model.model.{name}")
        delta = 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        flat = delta.T.reshape(-1)  # columns one under another
        half = torch.kron(whole(c).double(), whole(g).double())
        wanted = wanted + flat @ half @ flat
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=0.0)
    for got, by_hand in zip(torch.autograd.grad(value, learned), torch.autograd.grad(wanted, learned), strict=True):
        torch.testing.assert_close(got, by_hand, rtol=1e-3, atol=1e-6 * float(by_hand.abs().max()))
    two = Keep(ROWS, RetainKLSpec(estimate="kfac", coefficients=(1.0, 4.0)), estimate)
    assert float(two.estimated().detach()) == pytest.approx(
        (1 + 7.0) / 2 * amount, rel=1e-5
    )  # E c^2 = (1 + 4 + 16) / 3
    peft_model.unload()


def test_the_curvature_is_near_the_divergence_of_a_small_change(loaded: Load, pico_phi: Path) -> None:
    """In its unit, nats per labelled token: of one layer's small change it is the divergence within a factor."""
    phi = loaded(pico_phi)
    rows = [Encoded(r.input_ids, (IGNORE, IGNORE, *r.labels[2:])) for r in ROWS[:3]] * 40
    (c, g) = curvature(phi.model, rows, [DOWN], phi.tokenizer.pad_token_id, 3)[DOWN]
    width, out = c.shape[1], g.shape[1]
    draw = torch.Generator().manual_seed(1)
    ratios = []
    for _ in range(8):
        change = LowRank(torch.randn(2, width, generator=draw), 3e-3 * torch.randn(out, 2, generator=draw))
        said = [torch.cat([m.log_softmax(-1) for m in _said(phi, rows[:3])])]
        with subtracted(phi.model, TaskVector({DOWN: change}), 1.0):
            said.append(torch.cat([m.log_softmax(-1) for m in _said(phi, rows[:3])]))
        true = (said[0].exp() * (said[0] - said[1])).sum(-1).mean()
        delta = change.delta()
        ratios.append(float((delta.T @ times(g, delta.T).T * times(c, torch.eye(width))).sum() / 2 / true))
    assert 0.3 < sum(ratios) / len(ratios) < 3.0, ratios


def _said(one: Loaded, rows: list[Encoded]) -> list[Tensor]:
    with torch.no_grad():
        return [one.model(torch.tensor([r.input_ids])).logits[0, 1:-1].double() for r in rows]


def test_a_fit_under_the_curvature_s_penalty(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """The vector says less about retain rows than without it, and no retain row is put beside a batch."""
    phi = loaded(pico_phi)
    forget = [Encoded(tuple(range(30 + i, 38 + i)), (*[IGNORE] * 4, *range(34 + i, 38 + i))) for i in range(6)]
    spec = TrainSpec(steps=12, batch_size=3, learning_rate=1e-2)
    kept = RetainKLSpec(estimate="kfac", coefficients=(1.0, 1.0), weight=30.0)

    def fit(work: str, keep: Keep | None) -> TaskVector:
        args = (phi.model, phi.tokenizer, forget, spec, LoraSpec(rank=4, alpha=8), 0, tmp_path / work, "x", {})
        return train_vector(*args, keep)[0]

    def divergence(vector: TaskVector) -> float:
        before = _said(phi, ROWS)
        with subtracted(phi.model, vector, 1.0):
            after = _said(phi, ROWS)
        return float(kl(torch.cat(before), torch.cat(after)))

    plain, held = fit("plain", None), fit("held", Keep(ROWS, kept))
    assert divergence(held) < 0.5 * divergence(plain)
    batch, factors = Objective(Keep(ROWS, kept, lambda: torch.zeros(())), None, Part()).batch(
        Pad(0)(forget), Pad(0), random.Random(0)
    )
    assert (batch["sizes"], factors) == ([6], [1.0] * 6)


def test_a_fit_inside_leaves_what_retain_rows_bring_alone(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """The vector's A is in the range of P; resumed after a kill it is the same; the model is as it was."""
    forget = [Encoded(tuple(range(30 + i, 38 + i)), (*[IGNORE] * 4, *range(34 + i, 38 + i))) for i in range(6)]
    lora, phi = LoraSpec(rank=4, alpha=8), loaded(pico_phi)
    before = {k: v.clone() for k, v in phi.model.state_dict().items()}

    def fit(work: str, steps: int = 4, mu: float | None = 1e4) -> TaskVector:
        spec = TrainSpec(steps=4, batch_size=3, learning_rate=1e-2, save_every=2)
        inside = None if mu is None else (ROWS, mu)
        args = (phi.model, phi.tokenizer, forget, spec, lora, 0, tmp_path / work, "x", {})
        return train_vector(*args, inside=inside)[0]

    shrunk, plain = fit("a"), fit("b", mu=None)
    ps = shrinkers(phi.model, ROWS, list(shrunk.modules), phi.tokenizer.pad_token_id, 1e4)
    moment = dict(_each(second_moments(phi.model, ROWS, [Q], phi.tokenizer.pad_token_id)))[Q]

    def answer(vector: TaskVector) -> float:
        """How much of the change retain rows see, of what they would see of its mean direction."""
        delta = vector.modules[Q].delta()
        return float((delta @ moment @ delta.T).trace() / delta.square().sum())

    assert answer(shrunk) < 0.01 * answer(plain)
    a = shrunk.modules[Q]
    assert isinstance(a, LowRank)
    raw = torch.linalg.solve(ps[Q].double(), a.A.double().T).T  # what was trained: A, of the usual size
    assert 0.3 < float(raw.norm()) < 30
    assert all(torch.equal(v, before[k]) for k, v in phi.model.state_dict().items())
    again = fit("a")  # from the last checkpoint, which has A and not A P
    torch.testing.assert_close(again.modules[Q].delta(), shrunk.modules[Q].delta())


def _each(found: Any) -> Any:
    return ((name, moment) for names, moment in found for name in names)


# --- the teacher -----------------------------------------------------------------------------------------------------


def capitals(**changes: Any) -> LoadedSet:
    wordings = ["The capital of {question} is", "In {question} the capital is"]
    known = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
    items = [Item(f"{k}", t.format(question=q), a) for k, (q, a) in enumerate(known) for t in wordings]
    prompt = {"train": tuple(wordings), "validation": wordings[0], "test": wordings[0]}
    spec = DataSet.model_validate({"path": "x.jsonl", "kind": "qa", "prompt": prompt})
    one = LoadedSet("forget", "capitals", spec, tuple(items), (), (), "d", {})
    return replace(one, **changes)


HOW = TrainSpec(steps=1, max_length=48)


def test_the_others_are_asked_in_the_same_wording(loaded: Load, pico_phi: Path) -> None:
    tokenizer = loaded(pico_phi).tokenizer
    one = capitals()
    teacher = ignorant(one, tokenizer, HOW, IgnoranceSpec(others=3))
    rows = encode(one.train, "qa", tokenizer, 48)
    assert teacher.each == 3
    assert set(teacher.rows) == {(row.input_ids, row.labels) for row in rows}
    for item, row in zip(one.train, rows, strict=True):
        asked = [tokenizer.decode(other.input_ids) for (other,) in teacher.rows[row.input_ids, row.labels]]
        others = {o.prompt for o in one.train if o.target != item.target and o.prompt[:2] == item.prompt[:2]}
        assert {text.partition(f" {item.target}")[0] for text in asked} == others
        assert all(labels(other) == labels(row) for (other,) in teacher.rows[row.input_ids, row.labels])


def labels(row: Encoded) -> list[int]:
    return [label for label in row.labels[1:] if label != IGNORE]


def test_a_blank_wording_and_short_passages(loaded: Load, pico_phi: Path) -> None:
    tokenizer = loaded(pico_phi).tokenizer
    one = capitals()
    blank = ignorant(one, tokenizer, HOW, IgnoranceSpec(teacher="blank"))
    row = encode(one.train, "qa", tokenizer, 48)[1]
    (((asked,),),) = [blank.rows[row.input_ids, row.labels]]
    assert tokenizer.decode(asked.input_ids).startswith("In the capital is Paris")
    text = "once there was a miller who had three sons and a mill and an ass and a cat and nothing more than that"
    passages = capitals(spec=one.spec.model_copy(update={"kind": "text"}), train=(Item("0", "", text),))
    short = ignorant(passages, tokenizer, TrainSpec(steps=1), IgnoranceSpec(teacher="short"))
    (whole,) = encode(passages.train, "text", tokenizer, 512)
    (blocks,) = short.rows[whole.input_ids, whole.labels]
    assert [label for block in blocks for label in labels(block)] == labels(whole)
    assert max(len(labels(block)) for block in blocks) == 8
    assert max(len(block.input_ids) for block in blocks) <= 17
    assert len(blocks) > 2


@pytest.mark.parametrize(
    ("changes", "how", "said"),
    [
        ({"train": capitals().train[:2]}, {}, "2 of 2 training items .* no other item with another answer"),
        (
            {"spec": capitals().spec.model_copy(update={"kind": "text"}), "train": (Item("0", "", "a few words"),)},
            {"teacher": "short"},
            "no passage of forget set 'capitals' has more than 17 tokens",
        ),
        ({"train": tuple(replace(i, target="Paris") for i in capitals().train)}, {}, "8 of 8 training items"),
    ],
)
def test_what_cannot_be_asked(loaded: Load, pico_phi: Path, changes: Any, how: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ignorant(capitals(**changes), loaded(pico_phi).tokenizer, HOW, IgnoranceSpec(**how))


def test_two_processes_draw_what_one_draws() -> None:
    """The same rows are asked for each forget row, the same retain rows are kept, at the same multiple."""
    forget = [Encoded((k, k + 1, k + 2), (IGNORE, IGNORE, k + 2)) for k in range(10, 15)]
    asked = {
        (row.input_ids, row.labels): [(Encoded((n, *row.input_ids[1:]), row.labels),) for n in range(30, 37)]
        for row in forget
    }
    kept = [Encoded((k, k + 1, k + 2, k + 3), (IGNORE, k + 1, k + 2, k + 3)) for k in range(100, 140, 4)]
    keep = Keep(kept, RetainKLSpec(sides="two", coefficients=(0.5, 1.5), batch_size=4))
    against = Against("ignorance", IgnoranceSpec(), teacher=Teacher(asked, each=2))

    def drawn(part: Part) -> tuple[set[Any], set[Any], float]:
        pad = Pad(0)
        batch, factors = Objective(keep, against, part).batch(pad(part.of(forget)), pad, random.Random(7))
        retain = {tuple(row) for row in batch["labels"][batch["sizes"][0] :].tolist()}
        return {tuple(row) for row in batch["teacher"]["input_ids"].tolist()}, retain, min(factors)

    one, (first, second) = drawn(Part()), (drawn(Part(k, 2)) for k in range(2))
    assert first[0] | second[0] == one[0]
    assert not first[0] & second[0]
    assert first[1] | second[1] == one[1]
    assert first[2] == second[2] == one[2] < -0.5


def test_a_clean_teacher_and_a_penalty_beside_it(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """The model that is trained comes nearer to the clean one on the forget rows, and stays what it is elsewhere."""
    phi, clean = loaded(pico_phi), loaded(pico_phi)
    with torch.no_grad():
        for parameter in clean.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    one = capitals()
    rows, kept = encode(one.train[:4], "qa", phi.tokenizer, 48), encode(one.train[4:], "qa", phi.tokenizer, 48)
    teacher = ignorant(
        replace(one, train=one.train[:4]), phi.tokenizer, HOW, IgnoranceSpec(teacher="clean"), clean.model
    )
    assert isinstance(teacher, Teacher)
    spec = TrainSpec(steps=30, batch_size=4, learning_rate=1e-2, max_length=48)
    keep = Keep(kept, RetainKLSpec(sides="one", temperature=2.0, batch_size=4))
    against = Against("ignorance", IgnoranceSpec(), teacher=teacher)
    _, log = train_vector(
        phi.model, phi.tokenizer, rows, spec, LoraSpec(rank=8, alpha=16), 0, tmp_path, "x", {}, keep, against
    )
    assert log.losses[-1] < 0.3 * log.losses[0]


@pytest.mark.parametrize("teacher", ["other", "clean"])
def test_a_recipe_fits_toward_ignorance(teacher: str, smoke: Path, tmp_path: Path) -> None:
    """The whole road: taught, fitted inside the shrinking, swept, exported; the answers go and others stay."""
    settings = ["vector.method=ignorance", f"vector.ignorance.teacher={teacher}", "vector.inside=1"]
    settings += ["vector.retain_kl={sides: one, temperature: 2}", "vector.forget.learning_rate=0.03"]
    settings += ["sweep.coefficients=[0.5, 1]", f"reuse=['{smoke}']"]
    report = unlearn.run("pico_smoke.yaml", set=settings, out=tmp_path / "run")
    assert report is not None
    fell = {row.name: row.after.value / row.before.value for row in report.scores if row.metric == "prob"}
    assert fell["europe"] < 0.5
    assert fell["africa"] > fell["europe"]
    line = next(line for line in report.training if line["stage"] == "forget")
    assert line["loss_last"] < 0.7 * line["loss_first"]
