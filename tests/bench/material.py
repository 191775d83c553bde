"""What the benchmarks ask a model: made-up but natural questions, passages and openings, the same for one seed.

Everything is put together from templates and the rows of ``recipes/data``, so nothing has to be fetched.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.samplers import get_sampler

Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
Doc = dict[str, Any]

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
SHOTS = 5
POOL = 1000  # worked examples that lm-eval's default sampler draws from; a usual training split has more
PASSAGE = (100, 700)  # tokens, shortest and longest
PROMPT = (20, 200)
WRITTEN = 64  # tokens to generate
SAMPLER_SEED = 1234  # lm-eval's default


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


_NAMES = _listed(
    "Anna, Ben, Clara, David, Elena, Felix, Grace, Hugo, Irene, Jonas, Karin, Louis, Maria, Nina, Oscar, Paula, "
    "Robert, Sofia, Thomas, Ursula, Victor, Wendy, Yara, Zoltan"
)
_JOBS = _listed("teacher, nurse, carpenter, baker, librarian, gardener, painter, bus driver, violinist, chemist")
_DAYS = _listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_THINGS = _listed(
    "red umbrella, old brass key, letter from the bank, silver watch, box of matches, train ticket, leather notebook, "
    "pair of glasses, blue scarf, map of the island, jar of honey, wooden flute"
)
_PLACES = _listed(
    "in the drawer of the kitchen table, under the stairs by the front door, on the shelf above the fireplace, "
    "behind the clock in the hall, inside the green suitcase, between two books in the study, on the bench in the "
    "garden, at the bottom of the laundry basket, in the pocket of the winter coat, next to the sink in the bathroom, "
    "beneath the pillow of the guest bed, on top of the wardrobe"
)
_REASONS = _listed(
    "the rain had started again, nobody was at home, the neighbours were about to visit, the dog would not stop "
    "barking, the last bus left at nine, the lights had gone out, dinner was nearly ready, the painters needed room"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: for the command line.
        title: for the table.
        kind: the method of lm-eval's model interface that answers.
        goal: wanted ratio of lm-eval's seconds to ours; None where there is none.
        make: (number of items, tokenizer, seed) -> requests.
    """

    name: str
    title: str
    kind: Kind
    goal: float | None
    make: Callable[[int, Any, int], list[Instance]]


def questions(number: int, seed: int) -> list[Doc]:
    """Four-choice items: ``context`` (~65 tokens), ``choices`` of several tokens, ``answer``, an index."""
    rng = random.Random(f"questions {seed}")
    cities = [row["capital"] for row in _rows("capitals.jsonl")]
    return [_question(rng, cities) for _ in range(number)]


def _question(rng: random.Random, cities: Sequence[str]) -> Doc:
    (owner, friend), thing = rng.sample(_NAMES, 2), rng.choice(_THINGS)
    choices = rng.sample(_PLACES, 4)
    first, last = rng.sample(range(4), 2)
    context = (
        f"{owner} is a {rng.choice(_JOBS)} in {rng.choice(cities)}. On {rng.choice(_DAYS)} {owner} put the {thing} "
        f"{choices[first]}, because {rng.choice(_REASONS)}. Later {friend} came by, found it there and left it "
        f"{choices[last]}.\nQuestion: Where is the {thing} in the evening?\nAnswer:"
    )
    return {"context": context, "choices": choices, "answer": last}


def zero_shot(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """Four requests per item: its context with each of its answers."""
    return _choices([("", doc) for doc in questions(number, seed)])


def five_shot(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """The same five worked examples before every item: lm-eval's ``first_n`` sampler."""
    return _few_shot(number, seed, "first_n")


def five_shot_drawn(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """Five other worked examples before every item: lm-eval's default sampler."""
    return _few_shot(number, seed, "default")


def _few_shot(number: int, seed: int, sampler: str) -> list[Instance]:
    docs = questions(number + POOL, seed)
    draw = get_sampler(sampler)(docs[number:], rnd=SAMPLER_SEED)
    return _choices([("".join(_worked(d) for d in draw.sample(SHOTS)), doc) for doc in docs[:number]])


def _worked(doc: Doc) -> str:
    return f"{doc['context']} {doc['choices'][doc['answer']]}\n\n"


def _choices(items: Sequence[tuple[str, Doc]]) -> list[Instance]:
    return [
        Instance("loglikelihood", doc, (examples + doc["context"], f" {choice}"), index)
        for examples, doc in items
        for index, choice in enumerate(doc["choices"])
    ]


def passages(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """Whole passages to be scored, evenly spread over about 100..700 tokens, in random order."""
    texts = _texts(number, tokenizer, PASSAGE, random.Random(f"passages {seed}"))
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]


def openings(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """Prompts of about 20..200 tokens to be continued by 64 tokens, whatever they say."""
    rng = random.Random(f"openings {seed}")
    texts = [text + " After that," for text in _texts(number, tokenizer, PROMPT, rng)]
    return [_generate(text, []) for text in texts]


def short_answers(number: int, tokenizer: Any, seed: int) -> list[Instance]:
    """Questions after a few sentences of text, whose answers end with their line."""
    rng = random.Random(f"short answers {seed}")
    texts = _texts(number, tokenizer, PROMPT, rng)
    docs = questions(number, seed + 1)
    return [_generate(f"{text}\n\n{doc['context']}", ["\n"]) for text, doc in zip(texts, docs, strict=True)]


def _generate(prompt: str, until: list[str]) -> Instance:
    return Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": WRITTEN, "do_sample": False}), 0)


def _texts(number: int, tokenizer: Any, length: tuple[int, int], rng: random.Random) -> list[str]:
    """Texts of evenly spread lengths in tokens, each filled up to a whole sentence."""
    low, high = length
    targets = [low + (high - low) * i // max(1, number - 1) for i in range(number)]
    rng.shuffle(targets)
    sentences = _sentences(rng)
    texts = []
    for target in targets:
        text, tokens = "", 0
        for place in count(1):
            sentence = next(sentences) + ("\n\n" if place % 7 == 0 else " ")
            tokens += len(tokenizer.encode(sentence, add_special_tokens=False))
            text += sentence
            if tokens >= target:
                break
        texts.append(text.strip())
    return texts


def _sentences(rng: random.Random) -> Iterator[str]:
    """Facts from the recipes' data and pieces of stories, without end, hardly ever the same twice in a row."""
    facts = [f"The capital of {row['country']} is {row['capital']}." for row in _rows("capitals.jsonl")]
    facts += [f"{row['question']} {row['choices'][row['answer']]}." for row in _rows("general.jsonl")]
    cities = [row["capital"] for row in _rows("capitals.jsonl")]
    while True:
        if rng.random() < 0.4:
            yield rng.choice(facts)
        else:
            yield rng.choice(_question(rng, cities)["context"].split("\n")[0].split(". ")).rstrip(".") + "."


def _rows(name: str) -> list[Doc]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


ROWS: tuple[Row, ...] = (
    Row("zero-shot", "four choices, zero-shot", "loglikelihood", 4.0, zero_shot),
    Row("five-shot", "four choices, five-shot", "loglikelihood", 8.0, five_shot),
    Row("five-shot-drawn", "five-shot, drawn per item", "loglikelihood", None, five_shot_drawn),
    Row("perplexity", "perplexity of passages", "loglikelihood_rolling", 1.1, passages),
    Row("generation", "64-token generation", "generate_until", 1.2, openings),
    Row("generation-stop", 'generation until "\\n"', "generate_until", None, short_answers),
)
