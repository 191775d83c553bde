"""One rule for how prompts and answers become tokens, held to lm-eval's own, and what becomes of what is too long."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from unlearn.data.encoding import (
    IGNORE,
    Encoded,
    cuts,
    encode,
    encode_pair,
    encode_text,
    reach,
    scored_rows,
)
from unlearn.data.items import Item
from unlearn.errors import EvaluationError, TrainingError
from unlearn.model import pico
from unlearn.recipe.data import Kind

CORPUS = (*pico.corpus(), "naïve cafés, 東京 is far – über alles")
KINDS: tuple[Kind, ...] = ("qa", "mcq", "text")


def _special(tokenizer: Tokenizer, template: str, **named: str) -> PreTrainedTokenizerFast:
    """``template`` says what is put about a text: its beginning token, its end token, both or none."""
    if "$A" in template and template != "$A":
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **named)


def _metaspace(template: str, prepend: str, **named: str) -> PreTrainedTokenizerFast:
    """Like sentencepiece's: white space is part of the next word, and a text may begin with some."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=cast("Any", prepend))
    bpe.decoder = decoders.Metaspace(prepend_scheme=cast("Any", prepend))
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return _special(bpe, template, **named)


def _words(template: str, **named: str) -> PreTrainedTokenizerFast:
    level = Tokenizer(models.WordLevel(unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    level.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    return _special(level, template, **named)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS = {
    "bytes": lambda: pico.tokenizer(CORPUS),
    "metaspace": lambda: _metaspace("<s> $A", "always", **BOTH),
    "metaspace, first": lambda: _metaspace("<s> $A", "first", **BOTH),
    "metaspace, bare": lambda: _metaspace("$A", "never", **BOTH),
    "metaspace, both ends": lambda: _metaspace("<s> $A </s>", "always", **BOTH),
    "words": lambda: _words("<s> $A", **BOTH),
    "words, no beginning": lambda: _words("$A", eos_token="</s>"),
}


@functools.cache
def harness(name: str) -> HFLM:
    """lm-eval's own model as far as it encodes: everything but the weights."""
    lm = HFLM.__new__(HFLM)
    lm.tokenizer, lm.backend, lm.add_bos_token = TOKENIZERS[name](), "causal", None
    lm.custom_prefix_token_id, lm.enable_thinking = None, None
    return lm


def lm_eval_pair(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What its ``loglikelihood`` makes of a request, an empty context included."""
    found: list[Any] = []
    lm._loglikelihood_tokens = lambda requests, **_: found.extend(requests)
    lm.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True)
    return found[0][1], found[0][2]


pieces = st.sampled_from(
    [
        "<s>",
        "</s>",
        "<|endoftext|>",
        " ",
        "\n",
        "\t",
        "  \n",
        "Question:",
        " What",
        " capital",
        "Paris",
        "東京",
        "é",
        ".",
    ]
)
texts = st.lists(pieces | st.text(max_size=4), max_size=8).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(context=texts, continuation=texts.filter(str.strip))
@example(context="<s>Question: What is it?\nAnswer:", continuation=" Paris")
@example(context="<|endoftext|>What? \n", continuation="Paris")
@example(context=" ", continuation="Paris")
@example(context="", continuation="<s>Paris")
def test_pairs_are_lm_eval_s(name: str, context: str, continuation: str) -> None:
    lm = harness(name)
    wanted = lm_eval_pair(lm, context, continuation)
    assert encode_pair(lm.tokenizer, context, continuation) == wanted
    assert encode_text(lm.tokenizer, context) == lm.tok_encode(context)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=texts.filter(str.strip), target=texts.map(str.strip).filter(bool), kind=st.sampled_from(KINDS))
@example(prompt="<s>Question: What is it?\nAnswer:", target="Paris", kind="qa")
def test_what_is_trained_on_is_what_is_scored(name: str, prompt: str, target: str, kind: Kind) -> None:
    """Rows to train on, rows that foresight measures, and lm-eval's request: the same tokens with the same labels."""
    lm = harness(name)
    end = lm.tokenizer.eos_token_id
    context, continuation = lm_eval_pair(lm, prompt, target if kind == "text" else f" {target}")
    items = [Item("1", prompt, target)]
    if not context or not continuation:
        with pytest.raises(EvaluationError, match="cannot be scored"):
            scored_rows(items, kind, lm.tokenizer, 512)
        return
    whole = (*context, *continuation)
    assert scored_rows(items, kind, lm.tokenizer, 512) == [Encoded(whole, (*[IGNORE] * len(context), *continuation))]
    (row,) = encode(items, kind, lm.tokenizer, 512)
    if kind == "text":
        assert row == Encoded(whole, (IGNORE, *whole[1:]))
    else:
        more = [end] if kind == "qa" and continuation[-1] != end else []
        assert row == Encoded((*whole, *more), (*[IGNORE] * len(context), *continuation, *more))


def test_a_prompt_that_begins_with_the_beginning_token_has_one() -> None:
    for name in ("metaspace", "words", "metaspace, first"):
        tokenizer = harness(name).tokenizer
        item = Item("1", "<s>Question: What is it?\nAnswer:", "Paris")
        for kind in KINDS:
            rows = [*encode([item], kind, tokenizer, 64), *scored_rows([item], kind, tokenizer, 64)]
            assert all(row.input_ids.count(tokenizer.bos_token_id) == 1 for row in rows)


# --- what is too long ------------------------------------------------------------------------------------------------


def learned(rows: Sequence[Encoded]) -> list[int]:
    return [label for row in rows for label in row.labels if label != IGNORE]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["qa", "mcq"])
@given(words=st.integers(1, 60), said=st.integers(1, 12), room=st.integers(1, 40))
def test_prompts_are_cut_and_answers_are_not(name: str, kind: Kind, words: int, said: int, room: int) -> None:
    tokenizer = harness(name).tokenizer
    item = Item("1", f"Question: {'What is the capital of ' * words}France?\nAnswer:", " ".join(["Paris"] * said))
    (whole,) = encode([item], kind, tokenizer, 100_000)
    assert (whole.cut, whole.piece) == (0, 0)
    answer = learned([whole])
    if len(answer) >= room and len(whole.input_ids) > room:
        with pytest.raises(TrainingError, match=rf"1 of 1 answers .* raise max_length to {len(answer) + 1},"):
            encode([item], kind, tokenizer, room)
        return
    (row,) = encode([item], kind, tokenizer, room)
    assert len(row.input_ids) == min(len(whole.input_ids), room)
    assert learned([row]) == answer
    assert row.labels[0] == IGNORE
    assert row.cut == len(whole.input_ids) - len(row.input_ids)
    begins = whole.input_ids[0] == tokenizer.bos_token_id
    assert row.input_ids[: int(begins)] == whole.input_ids[: int(begins)]
    rest = row.input_ids[int(begins) :]
    assert rest == whole.input_ids[len(whole.input_ids) - len(rest) :]
    assert cuts([row, row, whole]) == ({"prompts_cut": 2} if row.cut else {})


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=st.integers(2, 200), room=st.integers(3, 40))
def test_every_token_of_a_long_passage_is_learned_once(name: str, words: int, room: int) -> None:
    tokenizer = harness(name).tokenizer
    item = Item("1", "The capital of", " France is Paris and far" * words)
    (whole,) = encode([item], "text", tokenizer, 100_000)
    rows = encode([item], "text", tokenizer, room)
    assert learned(rows) == list(whole.input_ids[1:])
    assert [row.piece for row in rows] == list(range(len(rows)))
    assert all(1 < len(row.input_ids) <= room for row in rows)
    assert max(map(len, map(learned, ([r] for r in rows)))) - min(map(len, map(learned, ([r] for r in rows)))) <= 1
    done = 0
    for row in rows:  # each begins with what stands before what it learns, and with the beginning token if there is one
        now = learned([row])
        assert row.input_ids[-len(now) - 1] == whole.input_ids[done]
        assert row.input_ids[0] == whole.input_ids[0] or whole.input_ids[0] != tokenizer.bos_token_id
        done += len(now)
    assert cuts(rows) == ({"passages_split": 1} if len(rows) > 1 else {})


def test_all_that_do_not_fit_are_told_together() -> None:
    tokenizer = harness("bytes").tokenizer
    short, long = Item("1", "Who?", "Paris"), Item("2", "Where is that?", "far away " * 9)
    longer = Item("3", "And that?", "far away " * 30)
    needed = len(encode_pair(tokenizer, longer.prompt, f" {longer.target}")[1]) + 2
    with pytest.raises(TrainingError, match=rf"2 of 3 answers .*\(16 tokens\).* max_length to {needed}, .*'And that\?"):
        encode([short, long, longer], "qa", tokenizer, 16)
    assert len(encode([short, long, longer], "qa", tokenizer, needed)) == 3


def test_items_without_a_token_to_learn_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")), unk_token="<unk>"
    )
    tokenizer.eos_token = "a"
    glued = Item("1", "Who", "Paris")  # one word to this tokenizer, which does not split at all
    for kind in ("qa", "mcq"):
        with pytest.raises(TrainingError, match="1 of 2 items have no token to learn, such as 'Who Paris'"):
            encode([glued, Item("2", "", "Paris")], cast("Kind", kind), tokenizer, 16)
    with pytest.raises(EvaluationError, match="cannot be scored"):
        scored_rows([glued], "qa", tokenizer, 16)


def test_what_a_model_reads_is_lm_eval_s() -> None:
    tokenizer = harness("bytes").tokenizer
    for config in ({"max_position_embeddings": 77}, {"n_positions": 55}, {}):
        model = SimpleNamespace(config=SimpleNamespace(**config))
        lm = harness("bytes")
        lm._max_length, lm._model = None, model
        assert reach(model, tokenizer) == lm.max_length
