"""Membership inference on a run: values against plain forward passes, areas against scikit-learn."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from attack_arena import Arena
from compared_arena import read
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn import cli
from unlearn.errors import EvaluationError
from unlearn.evidence.membership import ATTACKS, SAMPLES, judge, members_of, save, tell
from unlearn.model.load import Loaded
from unlearn.results import Membership, Who

EVERYONE: tuple[Who, ...] = ("target", "edited", "reference")
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
    assert len(found) == len(EVERYONE) * len(ATTACKS) + 2


def test_the_leaderboard_command_gives_the_same_areas(
    compared: Path, found: Mapping[tuple[str, str], Membership], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["leaderboard", str(compared / "run")]) == 0
    shown = capsys.readouterr().out
    assert "membership, AUC" in shown
    for one in found.values():
        assert f"{one.auc:.3f} ({one.low:.3f} to {one.high:.3f})" in shown


def test_the_reference_attack_is_the_difference(compared: Path, found: Mapping[tuple[str, str], Membership]) -> None:
    known = {r["id"]: r["loss"] for r in lines(compared, "reference")}
    for who in ("target", "edited"):
        rows = lines(compared, who)
        area = roc_auc_score([r["member"] for r in rows], [r["loss"] - known[r["id"]] for r in rows])
        assert found[who, "reference"].auc == pytest.approx(area, abs=1e-12)
    assert ("reference", "reference") not in found


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


def test_each_content_counts_once(phi: Loaded, tmp_path: Path) -> None:
    prompts = {"train": ["Q: {question}\nA:", "Say: {question}"], "validation": "V {question}", "test": "T {question}"}
    forget = Arena(phi, tmp_path, "qa", forget={"prompt": prompts}).forget
    once = members_of(forget.train)
    assert len(once) == len(forget.train) // 2
    assert len({i.id for i in once}) == len(once)
    assert all(i.prompt.startswith("Q: ") for i in once)  # the first wording


def test_items_that_do_not_fit_are_refused(phi: Loaded, tmp_path: Path) -> None:
    """Answers count whole beside as much of the prompt as the model reads; nothing is left out of the comparison."""
    forget = Arena(phi, tmp_path, "qa").forget
    items = [(i, forget.spec.kind) for i in forget.test]
    whole = tell(phi, items)
    assert [r["id"] for r in whole] == [i.id for i in forget.test]
    assert all(r["tokens"] >= 2 for r in whole)  # a city and the end
    first = replace(forget.test[0], prompt="far away " * 600 + forget.test[0].prompt)
    (long,) = tell(phi, [(first, "qa")])
    assert long["tokens"] == whole[0]["tokens"]
    for kind in ("qa", "text"):
        with pytest.raises(
            EvaluationError, match=r"reads 512 tokens at a time, and this item does not fit.*take it out"
        ):
            tell(phi, [*items, (replace(first, target="far away " * 600), cast("Any", kind))])


def test_passages_are_scored_whole(phi: Loaded, tmp_path: Path) -> None:
    forget = Arena(phi, tmp_path, "text").forget
    (row,) = tell(phi, [(forget.test[0], "text")])
    ids = phi.tokenizer(forget.test[0].prompt + forget.test[0].target, return_tensors="pt")["input_ids"]
    assert row["tokens"] == ids.shape[1] - 1  # all but the first, which has nothing before it
    with torch.no_grad():
        assert row["loss"] == pytest.approx(-float(phi.model(ids, labels=ids).loss), abs=1e-4)


def rows(start: int, values: list[float]) -> list[Row]:
    return [{"id": f"i{start + n}", "tokens": 3, **dict.fromkeys(ATTACKS, v)} for n, v in enumerate(values)]


def test_degenerate_sides(tmp_path: Path) -> None:
    """All told apart, all the wrong way round, ties, one item on a side."""
    for members, others, area in (
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([1.0], [0.0], 1.0),
        ([1.0, 2.0], [1.0], 0.75),
    ):
        save(tmp_path / SAMPLES, rows(0, members), rows(10, others))
        for one in judge({"target": tmp_path / SAMPLES}, 100, 0):
            assert one.auc == area
            assert (one.members, one.others) == (len(members), len(others))
    save(tmp_path / SAMPLES, rows(0, [1.0]), [])
    with pytest.raises(EvaluationError, match="there are none of others"):
        judge({"target": tmp_path / SAMPLES}, 100, 0)


def test_a_reference_of_other_items(tmp_path: Path) -> None:
    target, reference = tmp_path / "t.jsonl", tmp_path / "r.jsonl"
    save(target, rows(0, [1.0, 2.0]), rows(10, [0.5]))
    save(reference, rows(0, [1.0, 2.0]), rows(10, [0.5]))
    files: dict[Who, Path] = {"target": target, "reference": reference}
    same = judge(files, 100, 0)
    assert [m.auc for m in same if m.attack == "reference"] == [0.5]
    save(reference, list(reversed(rows(0, [1.0, 2.0]))), rows(10, [0.5]))
    assert judge(files, 100, 0) == same  # joined by item, not by place
    save(reference, rows(1, [1.0, 2.0]), rows(10, [0.5]))
    with pytest.raises(EvaluationError, match="the retain reference was asked for other items"):
        judge(files, 100, 0)


def test_the_seed_moves_the_interval_alone(compared: Path) -> None:
    files: dict[Who, Path] = {"reference": compared / "run" / "membership" / "reference" / SAMPLES}
    first, again, other = judge(files, 100, 0), judge(files, 100, 0), judge(files, 100, 1)
    assert first == again
    assert first != other
    assert [replace(m, low=0, high=0) for m in first] == [replace(m, low=0, high=0) for m in other]
