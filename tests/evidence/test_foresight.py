"""Correlations and slopes against edited copies and lm-eval's own numbers; a run's foresight against its sweep."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import IGNORE, Encoded, scored_rows
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.errors import EvaluationError, VectorError
from unlearn.evidence import foresight
from unlearn.evidence.foresight import correlate, foresee, outputs, slope
from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.recipe.data import Kind
from unlearn.recipe.schema import Recipe
from unlearn.report.words import loss_changes, reading
from unlearn.results import Foresight, Score, SweepPoint, TaskScore, read, verdict
from unlearn.score.evaluate import evaluate
from unlearn.score.tasks import build_tasks
from unlearn.vector.change import Change, Dense, LowRank
from unlearn.vector.edit import Edit, subtracted
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


def two_changes(model: nn.Module, names: Sequence[str], seed: int, size: float = 0.1) -> TaskVector:
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


@pytest.mark.parametrize("family", ["phi", "gpt2"])
def test_the_correlation_by_hand(
    loaded: Load, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = loaded(request.getfixturevalue(f"pico_{family}")).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one, two = (two_changes(model, NAMES[family], seed) for seed in (1, 2))
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
    monkeypatch.setattr(foresight, "_NUMBERS", 512 * 6)  # a few rows at a time
    done: list[int] = []
    found = correlate(model, one, two, SETS, 0, done.append)
    assert found.outputs == pytest.approx((both[0][0] + both[1][0]) / 2, abs=1e-4)
    assert found.changes == pytest.approx((both[0][1] + both[1][1]) / 2, abs=1e-4)
    assert found.stderr == pytest.approx(math.sqrt(variance) / 2, rel=1e-3)
    assert sum(done) == 8
    assert len(done) > 2
    assert abs(found.outputs - found.changes) > 0.05
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_fine_tuning_and_itself_and_its_opposite(phi: Loaded) -> None:
    tau = two_changes(phi.model, NAMES["phi"], 1)
    same = correlate(phi.model, tau, tau, SETS, 0)
    assert (same.outputs, same.changes) == pytest.approx((1.0, 1.0), abs=1e-5)
    small = 1e-3 * tau
    opposite = correlate(phi.model, small, -small, SETS, 0)
    assert opposite.changes == pytest.approx(-1.0, abs=5e-3)
    assert opposite.outputs == pytest.approx(1.0, abs=1e-3), "little of what a model says comes from a small change"
    nothing = correlate(phi.model, tau, 0.0 * tau, SETS, 0)
    assert nothing.changes == 0.0


def test_one_item_tells_nothing_of_its_own_error(phi: Loaded) -> None:
    tau = two_changes(phi.model, NAMES["phi"], 1)
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
    tau = two_changes(got.model, NAMES[family], 3)
    before = {k: v.clone() for k, v in got.model.state_dict().items()}
    rows = scored_rows(ITEMS[kind], kind, got.tokenizer, 512)
    found = slope(got.model, tau, rows, kind, 0)
    assert all(torch.equal(before[k], v) for k, v in got.model.state_dict().items())
    assert all(p.grad is None for p in got.model.parameters())
    lm = HFLM(pretrained=got.model, tokenizer=got.tokenizer, batch_size=4, logits_cache=False)
    ends = []
    for coefficient in (4e-3, -4e-3):
        with subtracted(got.model, tau, coefficient):
            ends.append(measured(lm, kind))
    assert found == pytest.approx((ends[0] - ends[1]) / 8e-3, rel=0.02, abs=2e-3)
    assert abs(found) > 0.02
    monkeypatch.setattr(foresight, "_TOKENS_BACKWARD", 8)
    assert slope(got.model, tau, rows, kind, 0) == pytest.approx(found, rel=1e-3)
    assert slope(got.model, -2.0 * tau, rows, kind, 0) == pytest.approx(-2 * found, rel=1e-3)


@pytest.fixture
def recipe(capitals: Callable[..., Path], tmp_path: Path) -> Recipe:
    lines = corpus()
    passages = [{"text": " ".join(lines[i : i + 4])} for i in range(0, 48, 4)]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), encoding="utf-8")
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"path": "pico:phi"},
            "forget": {"path": str(capitals("near.jsonl", 0, 10)), "kind": "qa"},
            "retain": [{"path": str(capitals("far.jsonl", 10, 20)), "kind": "mcq", "columns": {"answer": "correct"}}],
            "utility": [{"path": "passages.jsonl", "kind": "text", "length": 32, "prefix": 8}],
        },
        strict=False,
    )


def low_rank(model: nn.Module, seed: int) -> TaskVector:
    return two_changes(model, ("model.layers.0.mlp.fc1", "model.layers.1.self_attn.v_proj"), seed)


@pytest.fixture
def sets(recipe: Recipe, phi: Loaded, tmp_path: Path) -> tuple[LoadedSet, ...]:
    return load_sets(recipe, tmp_path, phi.tokenizer)


def test_a_run_is_foreseen(recipe: Recipe, phi: Loaded, sets: tuple[LoadedSet, ...], tmp_path: Path) -> None:
    one, two = low_rank(phi.model, 1), low_rank(phi.model, 2)
    edit = one - 0.5 * two
    found = foresee(phi.model, edit, one, {("retain", "far"): two}, sets, phi.tokenizer, 64)
    assert [(e.set, e.name, e.metric) for e in (*found.goals, *found.kept)] == [
        ("forget", "near", "loss"),
        ("retain", "far", "logprob"),
        ("utility", "passages", "loss"),
    ]
    (near,), (far, passages) = found.goals, found.kept
    assert (near.items, far.items) == (len(sets[0].validation), len(sets[1].validation))
    assert (near.verdict, passages.verdict, near.alpha_changes, passages.alpha_outputs) == (None,) * 4
    assert far.alpha_vectors == pytest.approx(one.cosine(two))
    assert far.modules == one.cosines(two)
    assert far.verdict == verdict(far.alpha_changes, far.alpha_stderr) is not None
    assert -1 <= far.alpha_outputs <= 1

    # a step so small that the sweep's own numbers follow the slope
    lm = HFLM(pretrained=phi.model, tokenizer=phi.tokenizer, batch_size=8, logits_cache=False)
    tasks = build_tasks(sets, "validation", recipe, phi.tokenizer, tmp_path / "items")
    points = []
    with Edit(phi.model, edit) as on:
        for coefficient in (0.0, 0.005):
            on.subtract(coefficient)
            points.append(SweepPoint(coefficient, evaluate(lm, tasks, model_name="pico").scores, True))
    for said in (*found.goals, *found.kept):
        last = loss_changes(said, points)[-1]
        assert last.measured == pytest.approx(last.predicted, rel=0.1, abs=1e-4)
        assert abs(last.predicted) > 5e-4


@pytest.mark.parametrize(
    ("alpha", "stderr", "wanted"),
    [
        (0.5, 0.1, "aligned"),
        (-0.5, 0.1, "contradictory"),
        (0.09, 0.001, "irrelevant"),
        (-0.09, None, "irrelevant"),
        (0.5, 0.26, "irrelevant"),
        (-0.5, 0.24, "contradictory"),
        (0.11, None, "aligned"),
        (math.nan, 0.1, None),
        (None, None, None),
    ],
)
def test_verdicts(alpha: float | None, stderr: float | None, wanted: str | None) -> None:
    assert verdict(alpha, stderr) == wanted


def test_what_is_no_number_is_left_out_with_the_reason(
    recipe: Recipe, phi: Loaded, sets: tuple[LoadedSet, ...], tmp_path: Path
) -> None:
    """A token that only the passages have breaks the model there: JSON has no such numbers, and the run goes on."""
    model, one, two = copy.deepcopy(phi.model), low_rank(phi.model, 1), low_rank(phi.model, 2)

    def tokens(*roles: str) -> set[int]:
        texts = [f"{i.prompt} {i.target}" for s in sets if s.role in roles for i in (*s.train, *s.validation)]
        return {token for text in texts for token in phi.tokenizer(text)["input_ids"]}

    only = min(tokens("utility") - tokens("forget", "retain"))
    with torch.no_grad():
        model.get_input_embeddings().weight[only] = math.inf
    found = foresee(model, one, one, {("retain", "far"): two, ("utility", "passages"): two}, sets, phi.tokenizer, 64)
    (near,), (far, passages) = found.goals, found.kept
    assert near.slope is not None
    assert far.slope is not None
    assert far.alpha_changes is not None
    assert (passages.slope, passages.alpha_changes, passages.verdict) == (None, None, None)
    assert "no finite number" in reading(passages)
    again = read(Foresight, json.loads(json.dumps(asdict(found), allow_nan=False)))
    assert again == found
    scored = [
        [TaskScore(e.set, e.name, "validation", e.metric, False, Score(c, None, 9)) for e in found.kept] for c in (0, 1)
    ]
    points = [SweepPoint(float(c), tuple(scores), True) for c, scores in enumerate(scored)]
    assert [len(loss_changes(entry, points)) for entry in found.kept] == [2, 0]


def test_outputs_are_the_model_s_own(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*SETS[0], *SETS[1]]
    whole = outputs(phi.model, rows, 0)
    wanted = torch.cat([said(phi.model, one) for one in rows])
    torch.testing.assert_close(whole, wanted, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(foresight, "_TOKENS", 8)
    torch.testing.assert_close(outputs(phi.model, rows, 0), wanted, atol=1e-4, rtol=1e-4)


def test_a_slope_in_sixteen_bits(loaded: Load, pico_phi: Path) -> None:
    full, half = loaded(pico_phi), loaded(pico_phi, "bfloat16")
    tau = two_changes(full.model, NAMES["phi"], 3)
    rows = scored_rows(ITEMS["qa"], "qa", full.tokenizer, 512)
    wanted = slope(full.model, tau, rows, "qa", 0)
    assert slope(half.model, tau, rows, "qa", 0) == pytest.approx(wanted, rel=0.15, abs=0.05)
