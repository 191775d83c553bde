"""Membership inference by hand, areas against scikit-learn, token scores against plain forward passes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from attack_arena import Arena
from compared_arena import EVERYONE, read
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn import cli
from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import BrokenModelError, EvaluationError
from unlearn.evidence import membership
from unlearn.evidence.membership import (
    ATTACKS,
    SAMPLES,
    TokenScores,
    areas,
    auc,
    auc_interval,
    loss_score,
    members_of,
    min_k,
    min_k_pp,
    save,
    score_items,
    token_scores,
    zlib_score,
)
from unlearn.model.load import Loaded
from unlearn.results import Membership, Who

few = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


def told(
    logprobs: Sequence[float], means: Sequence[float] = (), stds: Sequence[float] = (), size: int = 10
) -> TokenScores:
    n = len(logprobs)
    return TokenScores(
        np.array(logprobs, dtype=float),
        np.array(means or [-2.0] * n, dtype=float),
        np.array(stds or [1.0] * n, dtype=float),
        size,
    )


# --- the area under the curve ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(few, few)
def test_auc_is_scikit_learns_ties_and_all(members: list[int], others: list[int]) -> None:
    wanted = roc_auc_score([1] * len(members) + [0] * len(others), members + others)
    assert auc(members, others) == pytest.approx(wanted, abs=1e-12)
    assert auc(others, members) == pytest.approx(1 - wanted, abs=1e-12)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="none of members"):
        auc([], [1.0])
    with pytest.raises(EvaluationError, match="none of others"):
        auc([1.0], [])
    with pytest.raises(EvaluationError, match="1 of 2 scores of others are no numbers"):
        auc([1.0], [1.0, math.nan])


def test_the_interval_is_a_stratified_bootstraps() -> None:
    draw = np.random.default_rng(1)
    members, others = np.round(draw.normal(0.5, 1, 40), 1), np.round(draw.normal(0, 1, 30), 1)  # with ties
    low, high = auc_interval(members, others, 400, seed=5)
    again = np.random.default_rng(5)
    found = []
    for _ in range(400):  # the same draws, scored by another library
        ours, theirs = members[again.integers(0, 40, 40)], others[again.integers(0, 30, 30)]
        found.append(roc_auc_score([1] * 40 + [0] * 30, np.concatenate([ours, theirs])))
    assert (low, high) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])), abs=1e-12)
    assert low < auc(members, others) < high
    assert auc_interval(members, others, 400, seed=5) == (low, high)
    assert auc_interval(members, others, 400, seed=6) != (low, high)


# --- the attacks -----------------------------------------------------------------------------------------------------


def test_the_attacks_by_hand() -> None:
    one = told([-1.0, -5.0, -2.0, -4.0, -3.0], means=[-2, -4, -2, -1, -3], stds=[1, 0.5, 2, 3, 1], size=20)
    assert loss_score(one) == -3.0
    assert min_k(one, 0.4) == -4.5  # the lowest 2 of 5
    assert min_k(one, 1.0) == -3.0
    assert min_k(one, 0.59) == -4.5  # 2.95 is rounded down
    assert min_k(one, 0.01) == -5.0  # but one token there is
    # z: 1, -2, 0, -1, 0
    assert min_k_pp(one, 0.4) == -1.5
    assert min_k_pp(one, 1.0) == pytest.approx(-0.4)
    assert zlib_score(one) == -3.0 / 20


FOLDERS = ("pico_phi", "pico_llama", "pico_gpt2")


def encoded() -> list[Encoded]:
    """Of many lengths: a whole text whose first token is labelled too, answers, one without any, holes between."""
    draw = np.random.default_rng(7)
    found = []
    for length, skip in ((9, 0), (4, 2), (30, 20), (1, 0), (12, 12), (17, 16), (2, 0)):
        ids = tuple(int(i) for i in draw.integers(3, 60, length))
        found.append(Encoded(ids, (*[IGNORE] * skip, *ids[skip:])))
    ids = found[0].input_ids
    return [*found, Encoded(ids, (IGNORE, ids[1], IGNORE, IGNORE, *ids[4:7], IGNORE, ids[8]))]


def naive(model: Any, row: Encoded) -> tuple[list[float], list[float], list[float]]:
    """The same numbers in float64 from all logits of a row by itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].double()
    logp = torch.log_softmax(logits, -1)
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for place in range(1, len(row.input_ids)):
        if row.labels[place] == IGNORE:
            continue
        said, token = logp[place - 1], row.input_ids[place]
        mean = float((said.exp() * said).sum())
        found[0].append(float(said[token]))
        found[1].append(mean)
        found[2].append(float((said.exp() * said**2).sum() - mean**2) ** 0.5)
    return found


def agrees(found: TokenScores, wanted: tuple[list[float], list[float], list[float]]) -> None:
    assert found.logprobs.tolist() == pytest.approx(wanted[0], abs=2e-5)
    assert found.means.tolist() == pytest.approx(wanted[1], abs=2e-5)
    assert found.stds.tolist() == pytest.approx(wanted[2], abs=2e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_number_is_a_plain_forwards(
    folder: str, loaded: Callable[..., Loaded], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loaded(request.getfixturevalue(folder))
    model = one.model
    with torch.no_grad():  # predictions that differ from place to place
        for parameter in model.parameters():
            parameter.mul_(3.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done: list[int] = []
    monkeypatch.setattr(membership, "_TOKENS", 40)
    monkeypatch.setattr(membership, "_AT_ONCE", 3 * model.get_output_embeddings().weight.shape[0])
    found = token_scores(model, one.tokenizer, encoded(), done.append)
    assert [len(f.logprobs) for f in found] == [8, 2, 10, 0, 0, 1, 1, 5]
    assert sum(done) == len(encoded())
    assert len(done) > 2
    for score, row in zip(found, encoded(), strict=True):
        agrees(score, naive(model, row))
    spread = np.concatenate([f.stds for f in found])
    assert spread.max() > 0.1  # else the deviations would prove nothing
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_pass_has_so_many_logits_at_most(phi: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    head = phi.model.get_output_embeddings()
    monkeypatch.setattr(membership, "_LOGITS", 30 * head.weight.shape[0])  # as many as the longest row has tokens
    seen: list[int] = []
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.numel() // out.shape[-1]))
    token_scores(phi.model, phi.tokenizer, encoded())
    hook.remove()
    assert sum(seen) == 27, "the head runs at answered tokens only"
    assert len(seen) > 2


def test_a_model_that_changes_its_logits_after_the_head(phi: Loaded) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(**size, **heads, final_logit_softcapping=0.5, initializer_range=1.0)  # type: ignore[arg-type]
    model = Gemma2ForCausalLM(config).eval()
    found = token_scores(model, phi.tokenizer, encoded())
    for score, row in zip(found, encoded(), strict=True):
        agrees(score, naive(model, row))
    assert (
        min(f.logprobs.min() for f in found if len(f.logprobs)) > -np.log(64) - 1.001
    )  # capped: all tokens are likely


def test_a_forbidden_token_adds_nothing(phi: Loaded) -> None:
    """Log p = -inf elsewhere leaves mean and deviation finite; on the answer itself the model counts as broken."""
    head = phi.model.get_output_embeddings()
    row = Encoded((5, 6, 7), (IGNORE, 6, 7))
    with torch.no_grad():
        head.bias[9] = -torch.inf
    (found,) = token_scores(phi.model, phi.tokenizer, [row])
    assert np.isfinite(found.means).all()
    assert (found.stds > 0).all()
    with torch.no_grad():
        head.bias[7] = -torch.inf
    with pytest.raises(BrokenModelError, match="no finite numbers"):
        token_scores(phi.model, phi.tokenizer, [row])


Row = dict[str, Any]


def lines(compared: Path, who: str) -> list[Row]:
    text = (compared / "run" / "membership" / who / SAMPLES).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def found(compared: Path) -> Mapping[tuple[str, str], Membership]:
    return {(m.who, m.attack): m for m in read(compared / "run").membership}


def test_areas_are_scikit_learns_on_the_samples(compared: Path, found: Mapping[tuple[str, str], Membership]) -> None:
    for who in EVERYONE:
        rows = lines(compared, who)
        assert [sum(r["member"] is side for r in rows) for side in (True, False)] == [12, 10]
        for attack in ATTACKS:
            one = found[who, attack]
            area = roc_auc_score([r["member"] for r in rows], [r[attack] for r in rows])
            assert one.auc == pytest.approx(area, abs=1e-12)
            assert one.low <= one.auc <= one.high
            assert (one.members, one.others) == (12, 10)
        if who != "reference":
            known = {r["id"]: r["loss"] for r in lines(compared, "reference")}
            area = roc_auc_score([r["member"] for r in rows], [r["loss"] - known[r["id"]] for r in rows])
            assert found[who, "reference"].auc == pytest.approx(area, abs=1e-12)
    assert len(found) == len(EVERYONE) * len(ATTACKS) + 2


def test_the_leaderboard_command_gives_the_same_areas(
    compared: Path, found: Mapping[tuple[str, str], Membership], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["leaderboard", str(compared / "run")]) == 0
    shown = capsys.readouterr().out
    assert "membership, AUC" in shown
    for one in found.values():
        assert f"{one.auc:.3f} ({one.low:.3f} to {one.high:.3f})" in shown


def test_items_that_do_not_fit_are_refused(phi: Loaded, tmp_path: Path) -> None:
    """Answers count whole beside as much of the prompt as the model reads; nothing is left out of the comparison."""
    forget = Arena(phi, tmp_path, "qa").forget
    items = [(i, forget.spec.kind) for i in forget.test]
    whole = score_items(phi, items)
    assert [r["id"] for r in whole] == [i.id for i in forget.test]
    assert all(r["tokens"] >= 2 for r in whole)  # a city and the end
    first = replace(forget.test[0], prompt="far away " * 600 + forget.test[0].prompt)
    (long,) = score_items(phi, [(first, "qa")])
    assert long["tokens"] == whole[0]["tokens"]
    for kind in ("qa", "text"):
        with pytest.raises(
            EvaluationError, match=r"reads 512 tokens at a time, and this item does not fit.*take it out"
        ):
            score_items(phi, [*items, (replace(first, target="far away " * 600), cast("Any", kind))])


def test_each_content_counts_once(phi: Loaded, tmp_path: Path) -> None:
    prompts = {"train": ["Q: {question}\nA:", "Say: {question}"], "validation": "V {question}", "test": "T {question}"}
    forget = Arena(phi, tmp_path, "qa", forget={"prompt": prompts}).forget
    once = members_of(forget.train)
    assert len(once) == len(forget.train) // 2
    assert len({i.id for i in once}) == len(once)
    assert all(i.prompt.startswith("Q: ") for i in once)  # the first wording


def test_passages_are_scored_whole(phi: Loaded, tmp_path: Path) -> None:
    forget = Arena(phi, tmp_path, "text").forget
    (row,) = score_items(phi, [(forget.test[0], "text")])
    ids = phi.tokenizer(forget.test[0].prompt + forget.test[0].target, return_tensors="pt")["input_ids"]
    assert row["tokens"] == ids.shape[1] - 1  # all but the first, which has nothing before it
    with torch.no_grad():
        assert row["loss"] == pytest.approx(-float(phi.model(ids, labels=ids).loss), abs=1e-4)


def rows(start: int, values: list[float]) -> list[Row]:
    return [{"id": f"i{start + n}", "tokens": 3, **dict.fromkeys(ATTACKS, v)} for n, v in enumerate(values)]


def test_a_reference_of_other_items(tmp_path: Path) -> None:
    target, reference = tmp_path / "t.jsonl", tmp_path / "r.jsonl"
    save(target, rows(0, [1.0, 2.0]), rows(10, [0.5]))
    save(reference, rows(0, [1.0, 2.0]), rows(10, [0.5]))
    files: dict[Who, Path] = {"target": target, "reference": reference}
    same = areas(files, 100, 0)
    assert [m.auc for m in same if m.attack == "reference"] == [0.5]
    save(reference, list(reversed(rows(0, [1.0, 2.0]))), rows(10, [0.5]))
    assert areas(files, 100, 0) == same  # joined by item, not by place
    save(reference, rows(1, [1.0, 2.0]), rows(10, [0.5]))
    with pytest.raises(EvaluationError, match="the retain reference was asked for other items"):
        areas(files, 100, 0)


@pytest.mark.parametrize(
    ("members", "others", "wanted"),
    [
        ([3.0, 2.0], [1.0, 0.0], 1.0),
        ([0.0], [1.0, 2.0], 0.0),
        ([5.0, 5.0], [5.0, 5.0, 5.0], 0.5),
        ([1.0], [1.0], 0.5),
        ([2.0], [1.0], 1.0),
        ([1.0, 3.0], [2.0], 0.5),
        ([2.0, 3.0], [2.0, 1.0], 0.875),
        ([math.inf], [0.0], 1.0),
    ],
)
def test_auc_by_hand(members: list[float], others: list[float], wanted: float) -> None:
    assert auc(members, others) == wanted
    if wanted in (0.0, 1.0):
        assert auc_interval(members, others, 100, 0) == (wanted, wanted)


def test_no_rows_and_nothing_predicted(phi: Loaded) -> None:
    assert token_scores(phi.model, phi.tokenizer, []) == ()
    silent = Encoded((5, 6), (IGNORE, IGNORE))
    single = Encoded((5,), (5,))
    for found in token_scores(phi.model, phi.tokenizer, [silent, single]):
        assert found.logprobs.shape == found.means.shape == found.stds.shape == (0,)


def test_a_broken_model_is_named(phi: Loaded) -> None:
    with torch.no_grad():
        phi.model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(BrokenModelError, match="it no longer works"):
        token_scores(phi.model, phi.tokenizer, encoded())
    assert not phi.model.get_output_embeddings()._forward_pre_hooks


def test_what_was_taught_is_told_and_what_was_not_is_not(found: Mapping[tuple[str, str], Membership]) -> None:
    assert found["target", "loss"].auc > 0.95
    assert found["reference", "loss"].auc < found["target", "loss"].auc - 0.1


@pytest.mark.parametrize("who", ["target", "reference"])
def test_values_are_those_of_plain_forward_passes(compared: Path, who: str) -> None:
    folder = compared / "run" / who
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = lines(compared, who)
    asked = [json.loads(line) for name in ("f", "h") for line in (compared / f"{name}.jsonl").read_text().splitlines()]
    values = []
    for row in asked:
        prompt = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        ids = [*tokenizer(f"{prompt} {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        own, normal = [], []
        for i in range(start, len(ids)):
            p, at = logp[i - 1].exp(), logp[i - 1]
            mean = float((p * at).sum())
            std = math.sqrt(float((p * at**2).sum()) - mean**2)
            own.append(float(at[ids[i]]))
            normal.append((own[-1] - mean) / std)
        k = max(1, int(0.4 * len(own)))
        size = len(zlib.compress(tokenizer.decode(ids[start:-1]).encode()))
        loss = sum(own) / len(own)
        values.append([loss, sum(sorted(own)[:k]) / k, sum(sorted(normal)[:k]) / k, loss / size])
    got = sorted([r[attack] for attack in ATTACKS] for r in rows)
    for ours, theirs in zip(got, sorted(values), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
