"""Items and scoring for the tasks in this folder.

Nothing here but lm-eval, datasets, numpy and rouge_score is needed, so the folder works by itself::

    lm_eval --model hf --model_args pretrained=DIR --include_path eval --tasks unlearn_qa \
        --metadata '{"items": "items.jsonl"}'

``items`` is a JSON-lines file, or an object that names one file for each kind (``mcq``, ``qa``, ``text``) when
tasks of several kinds run together. Without it the environment variable ``UNLEARN_ITEMS`` names the file.
Token counts belong to one tokenizer: whoever writes the items counts them as lm-eval encodes them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

Answer = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one

_REQUIRED: dict[str, dict[str, type]] = {
    "mcq": {"prompt": str, "target": str, "choices": list, "answer": int},
    "qa": {"prompt": str, "target": str, "target_tokens": int},
    "text": {"prompt": str, "target": str, "target_tokens": int},
}
_OPTIONAL: dict[str, dict[str, type]] = {
    "mcq": {"choice_tokens": list, "others": list, "joint": str, "ending": str},
    "qa": {"continuation": str, "others": list, "joint": str, "ending": str},
    "text": {"pieces": list, "continuation": str},
}
_NAMES = {str: "text", int: "a whole number", list: "a list"}
MEMORY_TOKENS = 32
SHORT = 8  # pieces of a text that tell how it goes on in this language, but not what this passage is


# --- items -----------------------------------------------------------------------------------------------------------


def load_items(
    kind: str, items: str | Mapping[str, str] | None = None, written: bool = False, **_: Any
) -> dict[str, datasets.Dataset]:
    """Read the items of one kind; lm-eval calls this with the task's metadata and ``dataset_kwargs``.

    Args:
        kind: ``mcq``, ``qa`` or ``text``.
        items: the file, or one file per kind; ``$UNLEARN_ITEMS`` when not given.
        written: whether a text is to be written and compared with the target by its words.

    Returns:
        A data set in memory under ``test``. Nothing is written to the datasets cache.
    """
    path = _path(kind, items)
    rows = list(_rows(path, kind))
    for number, row in enumerate(rows if written else (), 1):
        _with_words(reference(row), f"{path}, item {number}")
    if not rows:
        raise ValueError(f"{path} has no items: there is nothing to score")
    for field in _OPTIONAL[kind]:
        having = [field in row for row in rows]
        if any(having) and not all(having):
            raise ValueError(f"{path}, item {having.index(False) + 1}: no {field!r}, though other items have it")
    return {"test": datasets.Dataset.from_list(rows)}


def _path(kind: str, items: str | Mapping[str, str] | None) -> Path:
    given = items.get(kind) if isinstance(items, Mapping) else items
    given = given or os.environ.get("UNLEARN_ITEMS")
    if not given:
        raise ValueError(
            f'no file of {kind} items: give --metadata \'{{"items": "FILE.jsonl"}}\' '
            f'(or {{"items": {{"{kind}": "FILE.jsonl"}}}}), or set UNLEARN_ITEMS'
        )
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file of {kind} items")
    return path


def _rows(path: Path, kind: str) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: an item must be a JSON object")
            _check(row, kind, where)
            columns = (*_REQUIRED[kind], *_OPTIONAL[kind])
            yield {"id": str(row.get("id", number)), **{c: row[c] for c in columns if c in row}}


def _check(row: dict[str, Any], kind: str, where: str) -> None:
    for field, wanted in {**_REQUIRED[kind], **_OPTIONAL[kind]}.items():
        if field not in row:
            if field in _REQUIRED[kind]:
                raise ValueError(f"{where}: {kind} items need {field!r} ({_NAMES[wanted]})")
        elif not isinstance(row[field], wanted) or isinstance(row[field], bool):
            raise ValueError(f"{where}: {field!r} must be {_NAMES[wanted]}, not {row[field]!r}")
    if not row["target"]:
        raise ValueError(f"{where}: 'target' is empty")
    if kind == "mcq":
        _check_choices(row, where)
    elif row["target_tokens"] < 1:
        raise ValueError(f"{where}: 'target_tokens' must be at least 1")
    if "others" in row and not (row["others"] and all(isinstance(other, str) for other in row["others"])):
        raise ValueError(f"{where}: 'others' must be at least one prompt")
    if "pieces" in row:
        pieces = row["pieces"]
        if not pieces or not all(isinstance(p, str) and p for p in pieces):
            raise ValueError(f"{where}: 'pieces' must be texts, none of them empty")
        if not row["target"].startswith("".join(pieces)):
            raise ValueError(f"{where}: 'pieces' put together are not the beginning of 'target'")


def _check_choices(row: dict[str, Any], where: str) -> None:
    choices, answer = row["choices"], row["answer"]
    if len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: 'choices' must be at least two texts, none of them empty")
    if not 0 <= answer < len(choices):
        raise ValueError(f"{where}: 'answer' is {answer}, but there are {len(choices)} choices, counted from 0")
    counts = row.get("choice_tokens")
    if counts is not None and (len(counts) != len(choices) or not all(type(n) is int and n > 0 for n in counts)):
        raise ValueError(f"{where}: 'choice_tokens' must be one whole number above 0 for each choice")


# --- what is asked ---------------------------------------------------------------------------------------------------


def answer_text(doc: Mapping[str, Any]) -> str:
    """The answer as it follows its prompt: after one space, or in a chat template after what that has there."""
    return str(doc.get("joint", " ")) + str(doc["target"])


def memory_pieces(doc: Mapping[str, Any]) -> list[str]:
    """The passage's continuation in the order it is recited: token by token, or word by word without ``pieces``."""
    return list(doc["pieces"]) if doc.get("pieces") else re.findall(r"\s*\S+", doc["target"])


class Written(ConfigurableTask):
    """Answers written freely, each up to the first of the stops (``until``) that is no part of the right answer.

    So an answer of one line ends with its line, and one of several lines where the next question begins; in a chat
    template with what ends an answer there (``ending``).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Instance:
        """As lm-eval does it, with this item's own stops."""
        request: Instance = super().construct_requests(doc, ctx, **kwargs)
        how = request.args[1]
        until = [doc["ending"]] if doc.get("ending") else how.get("until") or []
        how["until"] = [stop for stop in ([until] if isinstance(until, str) else until) if stop not in doc["target"]]
        return request


class WithOthers(ConfigurableTask):
    """The same answers after the prompts of other items too (``others``), from which pointwise information is made.

    An empty one among them asks for the answer after nothing.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Instance]:
        """As lm-eval does it, then for each of the others, in the same place of the context."""
        made = super().construct_requests(doc, ctx, **kwargs)
        requests: list[Instance] = made if isinstance(made, list) else [made]
        if "choices" in doc and "joint" in doc:
            requests = _asked(doc, [(ctx, doc["joint"] + choice) for choice in doc["choices"]], 0, kwargs)
        others, prompt = doc.get("others") or (), doc["prompt"]
        if prompt not in ctx:
            prompt = prompt.strip()  # as some chat templates have it
        if others and not (prompt and prompt in ctx):
            raise ValueError(
                f"item {doc['id']}: its prompt is not in what is asked, so no other can be put in its place"
            )
        before, _, after = ctx.rpartition(prompt) if others else ("", "", "")
        answers = [request.args[1] for request in requests]
        pairs = [(before + other + after, answer) for other in others for answer in answers]
        return requests + _asked(doc, pairs, len(requests), kwargs)


class PieceByPiece(ConfigurableTask):
    """One request for each piece of the continuation, each after all the true text before it (teacher forcing).

    Then one for every ``SHORT`` pieces, after as many before them and nothing else; after one less than there is
    where that would be all, for lm-eval's model takes two requests of one text for the same.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Instance]:
        """Requests for the first ``memory_tokens`` pieces (task metadata; 32 by default)."""
        limit = int((self.config.metadata or {}).get("memory_tokens", MEMORY_TOKENS))
        pieces = memory_pieces(doc)[:limit]
        pairs = [(ctx + "".join(pieces[:k]), piece) for k, piece in enumerate(pieces)]
        line = [*re.findall(r"\s*\S+(?:\s+$)?", doc["prompt"]), *pieces]
        for k in range(0, len(pieces), SHORT):
            at = len(line) - len(pieces) + k
            pairs.append(("".join(line[max(1, at - SHORT) : at]), "".join(pieces[k : k + SHORT])))
        return _asked(doc, pairs, 0, kwargs)


def _asked(doc: dict[str, Any], pairs: Iterable[tuple[str, str]], first: int, how: Mapping[str, Any]) -> list[Instance]:
    """A request for each (context, continuation); ``first`` is the number of the first among the item's requests."""
    rest = {key: value for key, value in how.items() if key not in ("apply_chat_template", "chat_template")}
    return [
        Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=number, **rest)
        for number, pair in enumerate(pairs, start=first)
    ]


# --- scores of one item ----------------------------------------------------------------------------------------------


def score_choices(doc: Mapping[str, Any], results: Sequence[Answer]) -> dict[str, float]:
    """``acc`` and ``acc_norm`` as lm-eval has them (the second per character), and how likely the right answer is.

    ``logprob`` is its log-probability in nats. ``prob`` is P(answer)^(1/tokens), TOFU's probability
    (arXiv 2401.06121, section 2.2.1), where the item has ``choice_tokens``. Where it has ``others``, ``pmi`` is by how
    many nats the answer is likelier after its own prompt than after theirs, on average, and ``acc_pmi`` whether no
    other choice has more: a model that only says the answers less often, whatever it is asked, keeps both.
    """
    answers = np.array([logprob for logprob, _ in results]).reshape(-1, len(doc["choices"]))  # (1 + others, choices)
    logprobs = answers[0]
    lengths = np.array([float(len(choice)) for choice in doc["choices"]])
    right = doc["answer"]
    if np.isnan(logprobs).any():  # argmax would call NaN the best choice
        scores = {"acc": math.nan, "acc_norm": math.nan, "logprob": math.nan}
    else:
        scores = {
            "acc": float(np.argmax(logprobs) == right),
            "acc_norm": float(np.argmax(logprobs / lengths) == right),
            "logprob": float(logprobs[right]),
        }
    if doc.get("choice_tokens"):
        scores["prob"] = math.exp(logprobs[right] / doc["choice_tokens"][right])
    if len(answers) > 1:
        information = logprobs - answers[1:].mean(axis=0)
        broken = np.isnan(information).any()
        scores["pmi"] = float(information[right])
        scores["acc_pmi"] = math.nan if broken else float(np.argmax(information) == right)
    return scores


def score_answer(doc: Mapping[str, Any], results: Sequence[Answer]) -> dict[str, float]:
    """``prob`` (TOFU's P(answer)^(1/tokens)), ``loss`` (nats per token) and ``exact`` (greedy decoding says it).

    With ``others`` also ``pmi``, as :func:`score_choices` has it.
    """
    (logprob, greedy), *others = results
    mean = logprob / doc["target_tokens"]
    scores = {"prob": math.exp(mean), "loss": -mean, "exact": float(greedy)}
    if others:
        scores["pmi"] = logprob - sum(after for after, _ in others) / len(others)
    return scores


def score_passage(doc: Mapping[str, Any], results: Sequence[Answer]) -> dict[str, Any]:
    """``loss`` (nats per token) and the pair from which :func:`corpus_perplexity` is made."""
    ((logprob, _),) = results
    return {"loss": -logprob / doc["target_tokens"], "perplexity": (logprob, doc["target_tokens"])}


def score_memory(doc: Mapping[str, Any], results: Sequence[Answer]) -> dict[str, float]:
    """How much of the passage the model, given the true text before each piece, would itself have written.

    ``exact_memorisation`` is the share of such pieces. ``extraction_strength`` is 1 - k/N: of the N pieces, k is the
    length of the shortest beginning after which it would have written all the rest (0 where not even the last piece
    is its own). ``pmi``: by how many nats per piece all the text before makes it likelier than the last few pieces do,
    so that knowing the language does not count as knowing the passage.
    """
    if any(math.isnan(logprob) for logprob, _ in results):
        return dict.fromkeys(("exact_memorisation", "extraction_strength", "pmi"), math.nan)
    count = len(results) * SHORT // (SHORT + 1)  # the others are one for each SHORT of them
    own = [greedy for _, greedy in results[:count]]
    needed = max((index for index, right in enumerate(own, 1) if not right), default=0)
    whole, short = (sum(logprob for logprob, _ in part) for part in (results[:count], results[count:]))
    return {
        "exact_memorisation": sum(own) / count,
        "extraction_strength": 1 - needed / count,
        "pmi": (whole - short) / count,
    }


# what the names of letters begin with in scripts that put no spaces between words
_UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "HENTAIGANA ", "BOPOMOFO ", "YI ", "TANGUT ", "NUSHU "),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)


@functools.cache
def _sort(character: str) -> str:
    """``word``, ``alone`` (a word by itself), ``mark`` (goes with the letter before it), ``none`` or ``between``."""
    category = unicodedata.category(character)
    if category == "Cf" and character != "\u200b":  # joiners and the like; the zero-width space does part words
        return "none"
    if category[0] == "M":
        return "mark"
    if category[0] not in "LN":
        return "between"
    return "alone" if unicodedata.name(character, "").startswith(_UNSPACED) else "word"


class Words:
    """Words as ROUGE compares them, of any script, in rouge_score's interface for tokenizers.

    A word is a run of letters, digits and their marks, whatever its case and composition (NFKC). Where a script puts
    no spaces between words, each letter counts as one. English words are cut to their Porter stem, and of ASCII text
    these are the very words of rouge_score's own tokenizer, which knows a-z and 0-9 alone.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stemmed = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text: str) -> list[str]:
        """The words in their order."""
        words: list[str] = []
        last = "between"
        for character in unicodedata.normalize("NFKC", text).casefold():
            sort = _sort(character)
            if sort == "none" or (sort == "mark" and last == "between"):
                continue
            if sort == "mark" or (sort == "word" and last == "word"):
                words[-1] += character
            else:
                words += [character] if sort != "between" else []
                last = sort
        return [stem for word in words for stem in (self._stemmed(word) if word.isascii() else [word])]


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words())


def reference(doc: Mapping[str, Any]) -> str:
    """What a written text is compared with: as much of the target as can be written, where the item says how much."""
    return str(doc.get("continuation") or doc["target"])


def score_generation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L of what the model wrote: ``rougeL`` is the recall (TOFU), ``rougeL_f1`` the F-measure (MUSE)."""
    score = _rouge().score(_with_words(reference(doc), f"item {doc.get('id', '')}"), results[0])["rougeL"]
    return {"rougeL": score.recall, "rougeL_f1": score.fmeasure}


def _with_words(text: str, where: str) -> str:
    if not any(_sort(character) in ("word", "alone") for character in unicodedata.normalize("NFKC", text)):
        raise ValueError(
            f"{where}: there is no letter and no digit in {text!r}, so that no answer can be compared with it by its "
            "words: leave this item out"
        )
    return text


# --- scores of a set -------------------------------------------------------------------------------------------------


def corpus_perplexity(items: Sequence[tuple[float, int]]) -> float:
    """exp(total negative log-likelihood / total tokens), infinite where that overflows."""
    loss = -sum(logprob for logprob, _ in items) / sum(tokens for _, tokens in items)
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
