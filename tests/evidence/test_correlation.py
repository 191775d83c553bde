"""Correlations and slopes on pico models, against edited copies in float64 and against lm-eval's own numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import IGNORE, Encoded, scored_rows
from unlearn.data.items import Item
from unlearn.errors import EvaluationError, VectorError
from unlearn.evidence import foresight as correlation
from unlearn.evidence.foresight import correlate, outputs, slope
from unlearn.model.load import Loaded
from unlearn.recipe.data import Kind
from unlearn.vector.change import Change, Dense, LowRank
from unlearn.vector.edit import applied
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
NAMES = {
    "phi": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.fc2"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
}
ITEMS: dict[Kind, list[Item]] = {
    "mcq": [
        Item("1", "The capital of France is", "Paris", ("Oslo", "Paris"), 1),
        Item("2", "The capital of Senegal is", "Dakar", ("Dakar", "Lima"), 0),
        Item("3", "Question: What is the capital of Nepal?\nAnswer:", "Kathmandu of Nepal", ("Kathmandu of Nepal",), 0),
    ],
    "qa": [
        Item("1", "What is the capital of Italy? ", "Rome"),
        Item("2", "Question: Which country has Havana?\nAnswer:", "Cuba it is"),
        Item("3", "Which animal barks?", "The dog barks at night."),
    ],
    "text": [
        Item("1", "Paris is the capital", " city of France. The sky is blue."),
        Item("2", "A dog barks at", " night.\nA cat purrs at night. Rome"),
    ],
}


def row(start: int, prompt: int, answer: int) -> Encoded:
    ids = tuple(range(start, start + prompt + answer))
    return Encoded(ids, (*[IGNORE] * prompt, *ids[prompt:]))


SETS = ([row(20 + 9 * i, 4, 2 + i % 3) for i in range(5)], [row(200 + 11 * i, 5, 1 + i % 4) for i in range(3)])


def vector(model: nn.Module, names: Sequence[str], seed: int, size: float = 0.1) -> TaskVector:
    """The first module's change is low-rank, the others' are dense."""
    draw = torch.Generator().manual_seed(seed)

    def one(name: str) -> Change:
        module = model.get_submodule(name)
        weight = module.get_parameter("weight")
        out, width = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        if name == names[0]:
            return LowRank(torch.randn(3, width, generator=draw), size * torch.randn(out, 3, generator=draw))
        return Dense(size * torch.randn(out, width, generator=draw))

    return TaskVector({name: one(name) for name in names})


def plainly(model: nn.Module, tau: TaskVector | None) -> nn.Module:
    """A float64 copy of the model with the vector added to its weights."""
    edited = copy.deepcopy(model).double().eval()
    for name, change in (tau.modules if tau else {}).items():
        module = edited.get_submodule(name)
        delta = change.delta().double()
        module.get_parameter("weight").data += delta.T if isinstance(module, Conv1D) else delta
    return edited


def said(model: nn.Module, one: Encoded) -> Tensor:
    """(answers, V) log-probabilities of one row, without a batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([one.input_ids])).logits[0]
    places = [i - 1 for i, label in enumerate(one.labels) if i and label != IGNORE]
    return logits[places].log_softmax(-1)


def cosine(one: Tensor, two: Tensor) -> float:
    a, b = one - one.mean(), two - two.mean()
    return float(a @ b / (a.norm() * b.norm()))


def test_outputs_are_the_model_s_own(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*SETS[0], *SETS[1]]
    whole = outputs(phi.model, rows, 0)
    wanted = torch.cat([said(phi.model, one) for one in rows])
    torch.testing.assert_close(whole, wanted, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(correlation, "_TOKENS", 8)
    torch.testing.assert_close(outputs(phi.model, rows, 0), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_the_correlation_by_hand(
    loaded: Load, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = loaded(request.getfixturevalue(f"pico_{family}")).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = (vector(model, NAMES[family], seed) for seed in (1, 2))
    copies = [plainly(model, tau) for tau in (None, one, two)]
    both: list[tuple[float, float]] = []
    variance = 0.0
    for rows in SETS:
        values: list[tuple[float, float]] = []
        of_item: list[list[float]] = []
        for encoded in rows:
            theta, a, b = (said(edited, encoded) for edited in copies)
            pairs = [(cosine(a[i], b[i]), cosine(a[i] - theta[i], b[i] - theta[i])) for i in range(len(theta))]
            values += pairs
            of_item.append([change for _, change in pairs])
        mean = sum(v for _, v in values) / len(values)
        both.append((sum(v for v, _ in values) / len(values), mean))
        spread = sum((sum(item) - len(item) * mean) ** 2 for item in of_item)
        variance += spread * len(rows) / (len(rows) - 1) / len(values) ** 2
    monkeypatch.setattr(correlation, "_NUMBERS", 512 * 6)  # a few rows at a time
    done: list[int] = []
    found = correlate(model, one, two, SETS, 0, done.append)
    assert found.outputs == pytest.approx((both[0][0] + both[1][0]) / 2, abs=1e-4)
    assert found.changes == pytest.approx((both[0][1] + both[1][1]) / 2, abs=1e-4)
    assert found.stderr == pytest.approx(math.sqrt(variance) / 2, rel=1e-3)
    assert found.positions == sum(2 + i % 3 for i in range(5)) + sum(1 + i % 4 for i in range(3))
    assert sum(done) == 8
    assert len(done) > 2
    assert abs(found.outputs - found.changes) > 0.05
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_fine_tuning_and_itself_and_its_opposite(phi: Loaded) -> None:
    tau = vector(phi.model, NAMES["phi"], 1)
    same = correlate(phi.model, tau, tau, SETS, 0)
    assert (same.outputs, same.changes) == pytest.approx((1.0, 1.0), abs=1e-5)
    small = 1e-3 * tau
    opposite = correlate(phi.model, small, -small, SETS, 0)
    assert opposite.changes == pytest.approx(-1.0, abs=5e-3)
    assert opposite.outputs == pytest.approx(1.0, abs=1e-3), "little of what a model says comes from a small change"
    nothing = correlate(phi.model, tau, 0.0 * tau, SETS, 0)
    assert nothing.changes == 0.0


def test_one_item_tells_nothing_of_its_own_error(phi: Loaded) -> None:
    tau = vector(phi.model, NAMES["phi"], 1)
    assert correlate(phi.model, tau, tau, (SETS[0], SETS[1][:1]), 0).stderr is None
    with pytest.raises(EvaluationError, match="at least one item"):
        correlate(phi.model, tau, tau, (SETS[0], []), 0)
    with pytest.raises(EvaluationError, match="at least one item"):
        slope(phi.model, tau, [], "qa", 0)
    with pytest.raises(VectorError, match="no such module"):
        slope(phi.model, TaskVector({"elsewhere": tau.modules[NAMES["phi"][0]]}), SETS[0], "qa", 0)


def measured(lm: HFLM, kind: Kind) -> float:
    """The loss that the sweep reports, from lm-eval's own log-likelihoods and token counts."""
    space = "" if kind == "text" else " "
    pairs = [(item.prompt, space + item.target) for item in ITEMS[kind]]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [answer[0] for answer in lm.loglikelihood(asked, disable_tqdm=True)]
    tokens = [1 if kind == "mcq" else len(lm._encode_pair(*pair)[1]) for pair in pairs]
    return -sum(nats / count for nats, count in zip(found, tokens, strict=True)) / len(pairs)


@pytest.mark.parametrize("kind", ["mcq", "qa", "text"])
@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_the_slope_is_that_of_the_sweep_s_metric(
    loaded: Load, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, family: str, kind: Kind
) -> None:
    folder: Path = request.getfixturevalue(f"pico_{family}")
    got = loaded(folder)
    tau = vector(got.model, NAMES[family], 3)
    before = {k: v.clone() for k, v in got.model.state_dict().items()}
    rows = scored_rows(ITEMS[kind], kind, got.tokenizer, 512)
    found = slope(got.model, tau, rows, kind, 0)
    assert all(torch.equal(before[k], v) for k, v in got.model.state_dict().items())
    assert all(p.grad is None for p in got.model.parameters())
    lm = HFLM(pretrained=got.model, tokenizer=got.tokenizer, batch_size=4, logits_cache=False)
    ends = []
    for coefficient in (4e-3, -4e-3):
        with applied(got.model, tau, -coefficient):
            ends.append(measured(lm, kind))
    assert found == pytest.approx((ends[0] - ends[1]) / 8e-3, rel=0.02, abs=2e-3)
    assert abs(found) > 0.02
    monkeypatch.setattr(correlation, "_TOKENS_BACKWARD", 8)
    assert slope(got.model, tau, rows, kind, 0) == pytest.approx(found, rel=1e-3)
    assert slope(got.model, -2.0 * tau, rows, kind, 0) == pytest.approx(-2 * found, rel=1e-3)


def test_a_slope_in_sixteen_bits(loaded: Load, pico_phi: Path) -> None:
    full, half = loaded(pico_phi), loaded(pico_phi, "bfloat16")
    tau = vector(full.model, NAMES["phi"], 3)
    rows = scored_rows(ITEMS["qa"], "qa", full.tokenizer, 512)
    wanted = slope(full.model, tau, rows, "qa", 0)
    assert slope(half.model, tau, rows, "qa", 0) == pytest.approx(wanted, rel=0.15, abs=0.05)


def test_long_items_are_cut_from_the_left(phi: Loaded) -> None:
    (whole,) = scored_rows(ITEMS["qa"][2:], "qa", phi.tokenizer, 512)
    assert phi.tokenizer.eos_token_id not in whole.input_ids, "the sweep does not score the end of text"
    answer = sum(label != IGNORE for label in whole.labels)
    (cut,) = scored_rows(ITEMS["qa"][2:], "qa", phi.tokenizer, answer + 1)
    assert cut.input_ids == whole.input_ids[-answer - 1 :]
    assert cut.labels == (IGNORE, *whole.labels[-answer:])
    for items, limit in ((ITEMS["qa"][2:], answer), ([Item("1", "The capital", "")], 512)):
        with pytest.raises(EvaluationError, match="cannot be scored by a model that reads"):
            scored_rows(items, "qa" if items[0].target else "text", phi.tokenizer, limit)
