"""How much comes back: by hand, with its degenerate cases, in words and through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from unlearn.results import GREEDY, LENS, AttackScore, Robustness, Who, probing, quantisation, relearning, sampling

EIGHT = relearning(8)


def score(who: Who, value: float, attack: str = "none", kind: Any = "none", **more: Any) -> AttackScore:
    named = {"metric": "acc", "higher_is_better": True, "stderr": 0.01, "n": 50} | more
    return AttackScore(attack, kind, who, value=value, **named)


PLAIN = (score("target", 0.92), score("edited", 0.46))
NF4 = score("edited", 0.4738, quantisation("nf4"), "quantise")
RELEARNT = tuple(score("edited", v, EIGHT, "relearn", steps=n) for n, v in ((1, 0.50), (5, 0.874), (20, 0.851)))


def test_recovered_by_hand() -> None:
    found = Robustness("capitals", "acc", (*PLAIN, NF4, *RELEARNT))
    assert found.recovered(NF4) == pytest.approx(0.03)  # .0138 of .46
    assert found.recovered(RELEARNT[1]) == pytest.approx(0.9)  # .414 of .46
    assert found.recovered(PLAIN[1]) == 0.0
    assert found.recovered(PLAIN[0]) == 0.0  # its own plain score
    assert found.recovered(score("edited", 0.414, "x", "probe")) == pytest.approx(-0.1)
    assert found.worst() == RELEARNT[1]  # not the last step


def test_where_lower_is_better() -> None:
    low = {"metric": "perplexity", "higher_is_better": False}
    plain = (score("target", 10.0, **low), score("edited", 50.0, **low))
    back, away = score("edited", 20.0, "a", "quantise", **low), score("edited", 90.0, "b", "quantise", **low)
    found = Robustness("passages", "perplexity", (*plain, away, back))
    assert found.recovered(back) == pytest.approx(0.75)
    assert found.recovered(away) == pytest.approx(-1.0)
    assert found.worst() == back
    assert found.sentence() == (
        "Of what was forgotten (perplexity 10.00 to 50.00), 75 % comes back with a; with 1 other attack nothing that "
        "can be told from chance."
    )


@pytest.mark.parametrize(
    ("target", "edited", "stderr", "told"),
    [
        (0.5, 0.5, None, False),  # nothing was forgotten
        (0.5, 0.5 - 1e-10, None, False),  # rounding
        (0.5, 0.5 - 1e-8, None, True),
        (0.50, 0.48, 0.03, False),  # less than hypot(.03, .03) = .042
        (0.50, 0.46, 0.03, False),
        (0.50, 0.45, 0.03, True),
        (0.45, 0.50, 0.03, False),  # the edit made it better
        (0.5, math.nan, None, False),
    ],
)
def test_nothing_comes_back_of_nothing(target: float, edited: float, stderr: float | None, told: bool) -> None:
    attack = score("edited", 0.6, "x", "probe", stderr=stderr)
    found = Robustness(
        "s", "acc", (score("target", target, stderr=stderr), score("edited", edited, stderr=stderr), attack)
    )
    assert (found.recovered(attack) is not None) is told
    assert (found.worst() is not None) is told
    assert ("forgot nothing that can be told from chance" in found.sentence()) is not told


def test_missing_scores() -> None:
    assert Robustness("s", "acc", ()).sentence() == ""
    assert Robustness("s", "acc", PLAIN).worst() is None
    assert Robustness("s", "acc", PLAIN).sentence() == ""  # no attack, nothing to say
    for only in PLAIN:
        found = Robustness("s", "acc", (only, NF4))
        assert found.recovered(NF4) is None
        assert "is missing" in found.sentence()
    other = replace(NF4, metric="leak")  # a metric without plain scores of its own
    found = Robustness("s", "acc", (*PLAIN, other, RELEARNT[0]))
    assert found.recovered(other) is None
    assert "leak" not in found.sentence()


def test_the_sentence() -> None:
    rouge = {"metric": "rougeL"}
    samples = score("edited", 0.5, sampling(8), "sample", **rouge)
    layers = tuple(score("edited", v, LENS, "lens", layer=n) for n, v in ((1, 0.1), (2, 0.69), (3, 0.46)))
    greedy = (score("target", 0.8, GREEDY, **rouge), score("edited", 0.3, GREEDY, **rouge))
    found = Robustness("capitals", "acc", (*PLAIN, *greedy, NF4, *RELEARNT, samples, *layers))
    assert found.sentence() == (
        "Of what was forgotten (accuracy 0.92 to 0.46), 85 % comes back with 20 steps of relearning on 8 forgotten "
        "items, 50 % with layer 2 of the logit lens and 40 % (ROUGE-L) with the best of 8 samples; with 1 other attack "
        "nothing that can be told from chance."
    )
    knew_nothing = (
        score("reference", 0.40),
        replace(NF4, who="reference", value=0.41),
        *(replace(s, who="reference", value=s.value - 0.1) for s in RELEARNT),
    )
    told = Robustness("capitals", "acc", (*found.scores, *knew_nothing)).sentence()
    assert told.startswith(found.sentence())
    assert told.removeprefix(found.sentence()) == (
        " The retain reference, which never knew it, goes from 0.40 to 0.75 under 20 steps of relearning on 8 "
        "forgotten items. What it gains as well is learned anew, not brought back."
    )


def test_the_reference_is_not_named_where_nothing_comes_back() -> None:
    knew_nothing = (score("reference", 0.4), replace(NF4, who="reference", value=0.41))
    told = Robustness("capitals", "acc", (*PLAIN, NF4, *knew_nothing)).sentence()
    assert told.endswith("the one attack brings nothing back that can be told from chance.")


def test_recovered_of_the_reference_starts_at_its_own() -> None:
    mine, plain = score("reference", 0.75, EIGHT, "relearn", steps=20), score("reference", 0.4)
    found = Robustness("capitals", "acc", (*PLAIN, *RELEARNT, plain, mine))
    assert found.recovered(mine) == pytest.approx(0.35 / 0.46)
    assert found.same(RELEARNT[2], "reference") == mine
    assert found.same(RELEARNT[1], "reference") is None  # other steps
    assert found.worst() == RELEARNT[1]  # only the edited model's count


def test_json_and_back() -> None:
    found = Robustness(
        "capitals", "acc", (*PLAIN, NF4, *RELEARNT, score("edited", 0.5, LENS, "lens", layer=2, stderr=None))
    )
    assert Robustness.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_names() -> None:
    assert quantisation("int8") == "8-bit quantisation"
    assert relearning(1) == "relearning on 1 forgotten item"
    assert relearning(3, unrelated=True) == "relearning on 3 unrelated texts"
    assert probing("template") != probing("template", best=True)
    assert sampling(1) == "the best of 1 sample"
