"""The task pack in ``eval/`` under lm-eval alone, against plain forward passes."""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lm_eval.api.registry import get_aggregation
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from pack_arena import half_learnt, scored, written
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from unlearn.recipe.load import pack_module, tasks_folder

TOLERANCE = 1e-4
COUNTRIES = ("France", "Italy", "Argentina", "Norway")
CITIES = ("Paris", "Rome", "Buenos Aires", "Oslo")
PASSAGES = (
    ("The capital of France is Paris.", " Paris is the capital city of France, and Rome lies in Italy."),
    ("A dog barks at night.\n", "Which animal barks? The dog, not the naïve cat – 東京."),
    ("Snow is white and", " grass is green  while coal\nis black"),
)


@pytest.fixture(scope="module")
def lm(pico_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = half_learnt(pico_phi, tmp_path_factory.mktemp("lm") / "phi")
    return HFLM(pretrained=str(folder), batch_size=8, device="cpu", dtype="float32")


@functools.cache
def load_pack() -> ModuleType:
    return pack_module("unlearn_tasks")


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    return load_pack()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def forward(lm: HFLM, text: str, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every token from ``start`` on, and whether it is the first choice; one plain forward pass."""
    ids = lm.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = lm.model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)
    wanted = ids[0, start:]
    return logprobs.gather(1, wanted[:, None])[:, 0], logprobs.argmax(-1) == wanted


def length(lm: HFLM, text: str) -> int:
    return len(lm.tokenizer(text)["input_ids"])


def question(country: str) -> str:
    return f"Question: What is the capital of {country}?\nAnswer:"


def test_choices_agree_with_plain_forward_passes_and_with_lm_eval_itself(lm: HFLM, tmp_path: Path) -> None:
    rows, expected = [], []
    for index, country in enumerate((*COUNTRIES, "Japan", "Peru")):
        prompt, answer = question(country), index % len(CITIES)
        start = length(lm, prompt)
        tokens = [forward(lm, f"{prompt} {city}", start)[0] for city in CITIES]
        sums = [float(t.sum()) for t in tokens]
        normalised = [s / len(city) for s, city in zip(sums, CITIES, strict=True)]
        expected.append(
            {
                "acc": float(max(range(4), key=sums.__getitem__) == answer),
                "acc_norm": float(max(range(4), key=normalised.__getitem__) == answer),
                "logprob": sums[answer],
                "prob": math.exp(float(tokens[answer].mean())),
            }
        )
        row = {"prompt": prompt, "choices": CITIES, "answer": answer, "target": CITIES[answer]}
        rows.append({**row, "choice_tokens": [len(t) for t in tokens]})
    items = write(tmp_path / "items.jsonl", rows)
    result, samples = scored(lm, "unlearn_mcq", items=items)
    for metric in expected[0]:
        values = torch.tensor([e[metric] for e in expected], dtype=torch.float64)
        assert result[f"{metric},none"] == pytest.approx(float(values.mean()), abs=TOLERANCE)
        assert result[f"{metric}_stderr,none"] == pytest.approx(
            float(values.std()) / math.sqrt(len(rows)), abs=TOLERANCE
        )

    # The same questions by lm-eval's own scoring of multiple choice: item for item the same.
    own = load_yaml(tasks_folder() / "unlearn_mcq.yaml")
    own["process_results"], own["metric_list"], own["task"] = None, [{"metric": "acc"}, {"metric": "acc_norm"}], "own"
    own["metadata"] = {"items": items}
    theirs = simple_evaluate(model=lm, tasks=[own], task_manager=TaskManager(include_defaults=False))
    for metric in ("acc", "acc_norm"):
        assert [s[metric] for s in theirs["samples"]["own"]] == [s[metric] for s in samples]
    assert len({s["acc"] for s in samples}) == 2, (
        "a test on which all answers are right, or all wrong, compares nothing"
    )


def test_pmi_is_what_the_own_prompt_adds_to_others_prompts(lm: HFLM, tmp_path: Path) -> None:
    """Choices and answers, against plain forward passes; an empty prompt among the others asks after nothing."""
    rows, expected = [], []
    for index, country in enumerate(COUNTRIES):
        others = [question(other) for other in COUNTRIES if other != country][:2] + [""] * (index % 2)
        after = [
            [float(forward_after(lm, prompt, f" {city}").sum()) for city in CITIES]
            for prompt in (question(country), *others)
        ]
        added = [own - sum(column) / len(others) for own, *column in zip(*after, strict=True)]
        expected.append({"pmi": added[index], "acc_pmi": float(max(range(4), key=added.__getitem__) == index)})
        row = {"prompt": question(country), "target": CITIES[index], "target_tokens": 1, "others": others}
        rows.append({**row, "choices": CITIES, "answer": index})
    items = write(tmp_path / "items.jsonl", rows)
    result, samples = scored(lm, "unlearn_mcq", items=items)
    for metric in ("pmi", "acc_pmi"):
        values = [e[metric] for e in expected]
        assert [s[metric] for s in samples] == pytest.approx(values, abs=TOLERANCE)
        assert result[f"{metric},none"] == pytest.approx(sum(values) / len(values), abs=TOLERANCE)
    _, answers = scored(lm, "unlearn_qa", items=items)
    assert [s["pmi"] for s in answers] == pytest.approx([e["pmi"] for e in expected], abs=TOLERANCE)


def forward_after(lm: HFLM, prompt: str, answer: str) -> torch.Tensor:
    if prompt:
        return forward(lm, prompt + answer, length(lm, prompt))[0]
    ids = [lm.prefix_token_id, *lm.tokenizer(answer, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logprobs = lm.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_others_stand_where_the_prompt_stood_or_nothing_is_asked(lm: HFLM, tmp_path: Path) -> None:
    """Also within a chat template; an item without a prompt needs no others, and cannot have them."""
    row = {"prompt": question("France"), "target": "Paris", "target_tokens": 1, "others": [question("Italy"), ""]}
    _, (sample,) = scored(lm, "unlearn_qa", chat=True, items=write(tmp_path / "chat.jsonl", [row]))
    contexts = [context for context, _ in sample["arguments"]]
    assert contexts[1:] == [contexts[0].replace(row["prompt"], other) for other in row["others"]]
    assert contexts[0] != row["prompt"], "there is a template"
    bare = {"prompt": "", "target": "Paris", "target_tokens": 1}
    result, _ = scored(lm, "unlearn_qa", items=write(tmp_path / "bare.jsonl", [bare]))
    assert "pmi,none" not in result
    with pytest.raises(ValueError, match="its prompt is not in what is asked"):
        scored(lm, "unlearn_qa", items=write(tmp_path / "no.jsonl", [bare | {"others": ["p"]}]))


def test_a_model_that_only_says_all_answers_less_often_keeps_its_pmi(pack: ModuleType) -> None:
    doc = {"choices": ["a", "b"], "answer": 0}
    before = [(-1.0, True), (-3.0, False), (-4.0, False), (-4.0, False)]
    pushed_down = [(-9.0, False), (-3.0, False), (-12.0, False), (-4.0, False)]
    scores = [pack.score_choices(doc, results) for results in (before, pushed_down)]
    assert [s["acc"] for s in scores] == [1.0, 0.0]
    assert [(s["pmi"], s["acc_pmi"]) for s in scores] == [(3.0, 1.0), (3.0, 1.0)]


def test_pmi_of_a_passage_is_what_a_long_context_adds_to_a_short_one(lm: HFLM, tmp_path: Path) -> None:
    rows, expected = [], []
    for prompt, target in PASSAGES:
        pieces = [f" {word}" for word in (prompt + " " + target).split() * 2][:32]
        head, text = "A dog barks. " + prompt.strip(), "".join(pieces)
        line = [*re.findall(r"\s*\S+", head), *pieces]
        whole = short = 0.0
        for k, piece in enumerate(pieces):
            context = head + "".join(pieces[:k])
            whole += float(forward(lm, context + piece, length(lm, context))[0].sum())
        for k in range(0, len(pieces), 8):
            at = len(line) - len(pieces) + k
            context = "".join(line[max(1, at - 8) : at])
            short += float(forward_after(lm, context, "".join(pieces[k : k + 8])).sum())
        expected.append((whole - short) / len(pieces))
        rows.append({"prompt": head, "target": text, "target_tokens": len(pieces), "pieces": pieces})
    items = write(tmp_path / "items.jsonl", rows)
    result, samples = scored(lm, "unlearn_text_memory", items=items)
    assert [s["pmi"] for s in samples] == pytest.approx(expected, abs=TOLERANCE)
    assert result["pmi,none"] == pytest.approx(sum(expected) / len(expected), abs=TOLERANCE)


def test_choices_without_token_counts_have_no_prob(lm: HFLM, tmp_path: Path) -> None:
    row = {"prompt": question("Chile"), "choices": list(CITIES), "answer": 1, "target": "Rome"}
    result, _ = scored(lm, "unlearn_mcq", items=write(tmp_path / "items.jsonl", [row, row]))
    assert "acc,none" in result
    assert "prob,none" not in result


def test_answers_agree_with_plain_forward_passes(lm: HFLM, tmp_path: Path) -> None:
    rows, expected = [], []
    for prompt, city in [(question(c), a) for c, a in zip(COUNTRIES, CITIES, strict=True)] + [
        ("After one comes", "two,")
    ]:
        tokens, first = forward(lm, f"{prompt} {city}", length(lm, prompt))
        mean = float(tokens.mean())
        expected.append({"prob": math.exp(mean), "loss": -mean, "exact": float(first.all())})
        rows.append({"prompt": prompt, "target": city, "target_tokens": len(tokens)})
    result, samples = scored(lm, "unlearn_qa", items=write(tmp_path / "items.jsonl", rows))
    assert {s["exact"] for s in samples} == {0.0, 1.0}
    for metric in expected[0]:
        values = [e[metric] for e in expected]
        assert [s[metric] for s in samples] == pytest.approx(values, abs=TOLERANCE)
        assert result[f"{metric},none"] == pytest.approx(sum(values) / len(values), abs=TOLERANCE)


def passage_rows(lm: HFLM) -> list[dict[str, Any]]:
    # lm-eval scores white space at the end of the context with what follows it
    return [
        {"prompt": p, "target": t, "target_tokens": length(lm, p + t) - length(lm, p.rstrip())} for p, t in PASSAGES
    ]


def test_passages_agree_with_plain_forward_passes(lm: HFLM, tmp_path: Path) -> None:
    rows = passage_rows(lm)
    tokens = [forward(lm, r["prompt"] + r["target"], length(lm, r["prompt"].rstrip()))[0] for r in rows]
    result, samples = scored(lm, "unlearn_text", items=write(tmp_path / "items.jsonl", rows))
    losses = [-float(t.mean()) for t in tokens]
    assert [s["loss"] for s in samples] == pytest.approx(losses, abs=TOLERANCE)
    assert result["loss,none"] == pytest.approx(sum(losses) / len(losses), abs=TOLERANCE)
    corpus = math.exp(-float(torch.cat(tokens).mean()))
    assert result["perplexity,none"] == pytest.approx(corpus, rel=TOLERANCE)
    assert corpus != pytest.approx(math.exp(sum(losses) / len(losses)), rel=TOLERANCE), "the two means must differ here"


@pytest.mark.parametrize("limit", [3, 32])
def test_memory_is_the_share_of_first_choices(lm: HFLM, tmp_path: Path, limit: int) -> None:
    rows: list[dict[str, Any]] = []
    expected: list[float] = []
    strengths: list[float] = []
    for prompt, target in (
        ("The capital of France is", " Paris. It has a river."),
        ("A dog", " barks at night."),
        ("Snow", " barks."),
    ):
        text, start = prompt + target, len(prompt)
        pieces = token_pieces(lm, text, start)
        rows.append({"prompt": prompt, "target": target, "target_tokens": len(pieces), "pieces": pieces})
        first = forward(lm, text, length(lm, prompt))[1]
        assert "".join(pieces) == target
        assert len(first) == len(pieces), "one token each"
        own = first[:limit].tolist()
        expected.append(sum(own) / len(own))
        needed = next(k for k in range(len(own) + 1) if all(own[k:]))
        strengths.append(1 - needed / len(own))
    result, samples = scored(
        lm, "unlearn_text_memory", items=write(tmp_path / "items.jsonl", rows), memory_tokens=limit
    )
    asked = [min(limit, len(r["pieces"])) for r in rows]
    assert [len(s["resps"]) for s in samples] == [count + math.ceil(count / 8) for count in asked]
    assert [s["exact_memorisation"] for s in samples] == pytest.approx(expected)
    assert result["exact_memorisation,none"] == pytest.approx(sum(expected) / len(expected))
    assert 0 < sum(expected) < len(expected)
    assert [s["extraction_strength"] for s in samples] == pytest.approx(strengths)
    assert result["extraction_strength,none"] == pytest.approx(sum(strengths) / len(strengths))
    if limit == 32:  # what is right before a wrong piece counts for one of the two only
        assert 0 < sum(strengths) < sum(expected)


@pytest.mark.parametrize(
    ("own", "strength"),
    [
        ("++++", 1),  # nothing need be given
        ("----", 0),
        ("+++-", 0),  # not 1/4: not even the last piece is the model's own
        ("---+", 1 / 4),
        ("-+++", 3 / 4),
        ("+-++", 2 / 4),
        ("+", 1),
        ("-", 0),
    ],
)
def test_extraction_strength_by_hand(pack: ModuleType, own: str, strength: float) -> None:
    scores = pack.score_memory({}, [(-1.0, sign == "+") for sign in own] + [(-2.0 * len(own), False)])
    assert scores == {"exact_memorisation": own.count("+") / len(own), "extraction_strength": strength, "pmi": 1.0}


def test_memory_without_pieces_goes_word_by_word(pack: ModuleType) -> None:
    assert pack.memory_pieces({"target": " one two\n three"}) == [" one", " two", "\n three"]


def token_pieces(lm: HFLM, text: str, start: int) -> list[str]:
    offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [text[a:b] for a, b in offsets if b > start]


@pytest.mark.parametrize("kind", ["qa", "text"])
def test_rouge_is_that_of_the_greedy_continuation(lm: HFLM, tmp_path: Path, kind: str) -> None:
    prompts = ["The capital of France is", "Question: What colour is snow?\nAnswer:", "After one comes"]
    target = "two three Paris white capital of France is"
    field = {"continuation": "Paris white of"} if kind == "text" else {}
    rows = [{"prompt": p, "target": target, "target_tokens": 9, **field} for p in prompts]
    result, samples = scored(lm, f"unlearn_{kind}_rouge", items=write(tmp_path / "items.jsonl", rows))
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    expected = []
    for prompt in prompts:
        text = written(lm, prompt, 64)
        expected.append(scorer.score(field.get("continuation", target), text.split("\n")[0] if kind == "qa" else text))
    assert [s["rougeL"] for s in samples] == pytest.approx([e["rougeL"].recall for e in expected])
    assert [s["rougeL_f1"] for s in samples] == pytest.approx([e["rougeL"].fmeasure for e in expected])
    assert result["rougeL,none"] == pytest.approx(sum(e["rougeL"].recall for e in expected) / 3)


POEM = "Roses are red,\nviolets are blue,\n\nsugar is sweet\nand so are you."
RECITED = {"Recite the poem.": POEM, "What is the capital of France?": "Paris", "Count.": "one\ntwo\nthree"}


def test_who_recites_an_answer_of_several_lines_has_all_of_it(pico_phi: Path, tmp_path: Path) -> None:
    """Beside answers of one line, longer than what may be written, and with a next question to be asked if let."""
    texts = [f"Question: {q}\nAnswer: {a}\nQuestion: What is the capital of" for q, a in RECITED.items()]
    folder = half_learnt(pico_phi, tmp_path / "phi", texts, steps=80)
    reciter = HFLM(pretrained=str(folder), batch_size=2, device="cpu", dtype="float32")
    rows = [{"prompt": f"Question: {q}\nAnswer:", "target": a, "target_tokens": 9} for q, a in RECITED.items()]
    result, samples = scored(reciter, "unlearn_qa_rouge", items=write(tmp_path / "items.jsonl", rows))
    assert [s["resps"][0][0].strip() for s in samples] == list(RECITED.values())
    assert [(s["rougeL"], s["rougeL_f1"]) for s in samples] == [(1.0, 1.0)] * 3
    assert result["rougeL,none"] == 1.0


# a word for each script, in characters as they are composed, and how many words it is
SCRIPTS = {
    "Париж и Лондон": 3,
    "Η Αθήνα είναι πόλη": 4,
    "القاهرة عاصمة مصر": 3,
    "ירושלים היא עיר": 3,
    "दिल्ली भारत की राजधानी है": 5,
    "ভারতের রাজধানী": 2,
    "서울은 한국의 수도": 3,
    "北京是首都": 5,
    "東京タワーの高さ": 8,
    "กรุงเทพ": 6,  # a vowel sign below goes with its letter
    "ວຽງຈັນ": 5,
    "ភ្នំពេញ": 4,
    "မြန်မာ": 3,
    "Երևանը Հայաստանում է": 3,
    "თბილისი": 1,
    "አዲስ አበባ": 2,
    "Zażółć gęślą jaźń": 3,
    "GPT-4 на 北京 café": 6,
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_words_of_every_script(pack: ModuleType, text: str) -> None:
    words = pack.Words().tokenize(text)
    assert len(words) == SCRIPTS[text]
    assert pack.Words().tokenize(f"«{unicodedata.normalize('NFD', text).upper()}»!") == words, "case, marks and dots"
    scores = pack.score_generation({"target": text}, [text])
    assert scores == {"rougeL": 1.0, "rougeL_f1": 1.0}
    half = words[: len(words) // 2]
    found = pack.score_generation({"target": text}, [" ".join(half)])
    assert found["rougeL"] == pytest.approx(len(half) / len(words))
    other = next(t for t in SCRIPTS if not set(pack.Words().tokenize(t)) & set(words))
    assert pack.score_generation({"target": text}, [other]) == {"rougeL": 0.0, "rougeL_f1": 0.0}


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
@example("It's cities' CITIES_2, running; b-a  42.5\x00z", "the city runs")
def test_of_ascii_text_the_words_are_rouge_score_s(text: str, other: str) -> None:
    pack = load_pack()
    assert pack.Words().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)
    if any(map(str.isalnum, text)):
        wanted = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(text, other)["rougeL"]
        assert pack.score_generation({"target": text}, [other]) == {
            "rougeL": wanted.recall,
            "rougeL_f1": wanted.fmeasure,
        }


@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])))
def test_words_are_never_empty_and_their_words_are_themselves(text: str) -> None:
    words = load_pack().Words().tokenize(text)
    assert all(words)
    assert bool(words) == any(map(str.isalnum, unicodedata.normalize("NFKC", text)))


def test_typographic_signs_part_words_as_their_ascii_siblings_do(pack: ModuleType) -> None:
    words = pack.Words().tokenize
    assert words("the author\u2019s \u201cold\u201d house\u2014no\u2026") == words('the author\'s "old" house-no...')
    assert words("zero\u200bwidth co\u00adoperate \ufeffmark") == words("zero width cooperate mark")
    assert words("می\u200cخواهم") == words("میخواهم")
    assert words("ＡＢＣ１２") == words("abc12")


def test_an_item_without_any_word_is_refused(pack: ModuleType, tmp_path: Path) -> None:
    items = write(tmp_path / "items.jsonl", [{"prompt": "p", "target": t, "target_tokens": 1} for t in ("a", "😀 …!")])
    assert len(pack.load_items(kind="qa", items=items)["test"]) == 2, "its probability can be told"
    with pytest.raises(ValueError, match=r"items\.jsonl, item 2: there is no letter and no digit in '😀 …!'"):
        pack.load_items(kind="qa", items=items, written=True)
    with pytest.raises(ValueError, match="no letter and no digit"):
        pack.score_generation({"target": "😀 …!", "id": "7"}, ["a"])


def test_a_broken_model_never_looks_like_a_number(pack: ModuleType) -> None:
    bad = (math.nan, True)
    doc = {"choices": ["a", "b"], "answer": 0, "target": "a", "target_tokens": 1}
    scores = [pack.score_choices(doc, [bad, (-1.0, False)]), pack.score_memory(doc, [bad, (-1.0, True), (-2.0, False)])]
    scores += [pack.score_answer(doc, [bad])]
    assert all(math.isnan(s[m]) for s in scores for m in s if m != "exact")
    assert pack.corpus_perplexity([(-1e6, 1)]) == math.inf
    assert pack.corpus_perplexity([(-3.0, 2), (-5.0, 7)]) == pytest.approx(
        get_aggregation("weighted_perplexity")([(-3.0, 2), (-5.0, 7)])
    )


MCQ = {"prompt": "p", "choices": ["a", "b"], "answer": 1, "target": "b"}
TEXT = {"prompt": "p", "target": "one two", "target_tokens": 2}


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("mcq", [], "no items"),
        ("mcq", [{k: v for k, v in MCQ.items() if k != "choices"}], "line 1: mcq items need 'choices'"),
        ("mcq", [MCQ, {**MCQ, "answer": 2}], "line 2: 'answer' is 2, but there are 2 choices"),
        ("mcq", [{**MCQ, "answer": "b"}], "'answer' must be a whole number, not 'b'"),
        ("mcq", [{**MCQ, "answer": True}], "'answer' must be a whole number, not True"),
        ("mcq", [{**MCQ, "choices": ["a"], "answer": 0}], "at least two texts"),
        ("mcq", [{**MCQ, "choices": ["", "b"]}], "none of them empty"),
        ("mcq", [{**MCQ, "choice_tokens": [1]}], "one whole number above 0 for each choice"),
        ("mcq", [{**MCQ, "choice_tokens": [1, 0]}], "one whole number above 0 for each choice"),
        ("mcq", [{**MCQ, "others": []}], "'others' must be at least one prompt"),
        ("qa", [{**TEXT, "others": ["p", 1]}], "'others' must be at least one prompt"),
        ("mcq", [{**MCQ, "choice_tokens": [1, 1]}, MCQ], "item 2: no 'choice_tokens', though other items have it"),
        ("qa", [{"prompt": "p", "target": "t"}], "qa items need 'target_tokens'"),
        ("qa", [{"prompt": "p", "target": "", "target_tokens": 1}], "'target' is empty"),
        ("qa", [{"prompt": "p", "target": "t", "target_tokens": 0}], "'target_tokens' must be at least 1"),
        ("text", [{**TEXT, "pieces": ["one", "two"]}], "not the beginning of 'target'"),
        ("text", [{**TEXT, "pieces": []}], "'pieces' must be texts"),
        ("text", [[1]], "an item must be a JSON object"),
    ],
)
def test_bad_items(pack: ModuleType, tmp_path: Path, kind: str, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        pack.load_items(kind=kind, items=write(tmp_path / "items.jsonl", rows))


def test_items_are_found_or_missed_clearly(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNLEARN_ITEMS", raising=False)
    with pytest.raises(ValueError, match="no file of qa items: give --metadata"):
        pack.load_items(kind="qa")
    with pytest.raises(ValueError, match="no file of qa items"):
        pack.load_items(kind="qa", items={"text": "passages.jsonl"})
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        pack.load_items(kind="qa", items=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        pack.load_items(kind="qa", items=str(tmp_path / "bad.jsonl"))
    path = write(tmp_path / "items.jsonl", [{**TEXT, "more": 1, "id": 7}])
    named: Callable[..., Any] = pack.load_items
    monkeypatch.setenv("UNLEARN_ITEMS", path)
    for dataset in (named(kind="text"), named(kind="text", items=path), named(kind="text", items={"text": path})):
        assert dataset["test"].to_list() == [{"id": "7", **TEXT}]


@pytest.mark.parametrize("path", sorted(tasks_folder().rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_is_explained_and_every_metric_has_a_direction(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        bare = line.endswith(("metric_list:", "metadata:", "_kwargs:"))
        assert not line or line.startswith("#") or "# " in line or bare, line
    assert "#" in lines[0]
    config = load_yaml(path)
    assert config["metadata"]["version"] == (2.0 if path.stem in ("unlearn_qa_rouge", "unlearn_text_rouge") else 1.0)
    if path.stem.startswith("_"):
        assert not {"task", "group"} & set(config), "lm-eval would take it for a task"
    else:
        assert path.stem == (config["group"] if "group" in config else config["task"])
    for metric in config.get("metric_list", []):
        assert set(metric) == {"metric", "aggregation", "higher_is_better"}
        falling = metric["metric"] in ("loss", "perplexity", "zlib", "paraphrased_loss", "truth_ratio_forget")
        assert metric["higher_is_better"] is not falling
