"""A recipe's data sets: divided into train, validation and test items, and written to files for lm-eval."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.data.chat import Chat, chat_of
from unlearn.data.encoding import encode_item
from unlearn.data.files import Row, read_placed, require_columns, source_label
from unlearn.data.items import (
    Built,
    Item,
    Record,
    Tokenizer,
    among_others,
    answered_otherwise,
    build,
    columns_needed,
    digest,
)
from unlearn.errors import DataError, EvaluationError, RunFolderError, prefixed
from unlearn.recipe.data import SPLITS, DataSet, SetRole, Source, Split, render, stops, template_fields
from unlearn.recipe.schema import Recipe
from unlearn.text import listing, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class LoadedSet:
    """One data set, ready to be trained on and scored.

    ``digest`` is the SHA-256 of every item of every split. ``counts`` has ``rows`` read, ``duplicates`` dropped,
    ``short`` passages dropped, the items of ``train`` (one per row and prompt), ``validation`` and ``test``, and
    ``unused`` rows that shares, limit or the role left out: the terms of an analogy are only trained on, and the set
    that it should teach never is.
    """

    role: SetRole
    name: str
    spec: DataSet
    train: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    digest: str
    counts: Mapping[str, int]
    reverse: tuple[Item, ...] = ()  # the test items asked back

    def items(self, split: Split) -> tuple[Item, ...]:
        """The items of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def stops(self, item: Item, split: Split = "test") -> list[str]:
        """Where a written answer to a question ends: at what is no part of the right one."""
        ends = stops(self.spec.prompts(split)[0]) if item.turn is None else [item.turn.ending.strip()]
        return [end for end in ends if end and end not in item.target]

    def left_out(self) -> list[str]:
        """How many of its rows and passages are in no split, and why."""
        why = {"duplicates": "doubled", "short": "too short", "unused": "unused"}
        return [f"{self.counts[key]} {word}" for key, word in why.items() if self.counts.get(key)]


@dataclass(frozen=True, slots=True)
class _Pool:
    """The records of one source."""

    label: str
    rows: int
    built: Built
    limited: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a record came from, for messages."""

    pool: _Pool
    record: Record
    owner: str = ""

    def __str__(self) -> str:
        return f"{self.pool.label}, {self.record.place}"


def load_sets(recipe: Recipe, base: Path, tokenizer: Tokenizer | None = None) -> tuple[LoadedSet, ...]:
    """Read, check and divide every data set of ``recipe``, in report order.

    ``limit`` counts rows, and passages for ``text``. With a test or validation file of its own a set's shares divide
    the main file among the other splits; with both, all of the main file is trained on (unless ``shares.train`` is 0).

    Args:
        base: the folder relative paths start from.
        tokenizer: cuts texts into passages, and has the chat template; without one (a dry run) tokens are
            estimated from characters, and prompts are plain.
    """
    asks = any(spec.kind != "text" for _, spec in recipe.sets())
    chat = chat_of(recipe.model, base, tokenizer) if tokenizer is not None and asks else None
    loaded: list[LoadedSet] = []
    forgotten: dict[str, _Origin] = {}
    reached: dict[str, _Origin] = {}
    seen: dict[str, _Origin] = {}
    for role, spec in recipe.sets():
        name = f"{role} set '{spec.label()}'"
        with prefixed(name, DataError):
            pools = _read(spec, base, recipe.seed, tokenizer)
            if role == "forget":
                forgotten = {**_known(pools.values(), name), **forgotten}
            else:
                _refuse_overlap(forgotten, pools.values(), name, "to be forgotten and " + _FATE[role])
            if role == "learn" and recipe.analogy is not None:
                reached = _known(pools.values(), name)
            elif role == "term":
                _refuse_overlap(reached, pools.values(), name, "to be reached by analogy and trained on")
            if role == "holdout":
                _refuse_overlap(seen, pools.values(), name, "held out and in a set that a model has seen")
            elif role in ("retain", "learn") and recipe.holdout is not None:
                seen = {**_known(pools.values(), name), **seen}
            loaded.append(_divide(role, spec, pools, recipe, chat))
    return tuple(loaded)


def training_sets(recipe: Recipe, rows: Mapping[SetRole, Sequence[Row]], tokenizer: Tokenizer) -> tuple[LoadedSet, ...]:
    """The sets of a recipe for which rows are given, every one of which is trained on."""
    chat = chat_of(recipe.model, Path(), tokenizer)
    loaded: list[LoadedSet] = []
    forgotten: dict[str, _Origin] = {}
    for role, spec in recipe.sets():
        if role not in rows:
            continue
        templates = (*spec.prompts("train"), *spec.asked("train"))
        with prefixed(role, DataError):
            require_columns(rows[role], partial(columns_needed, spec, templates), f"the {role} rows")
            built = build(rows[role], spec, templates, tokenizer)
            pool = _Pool(f"the {role} rows", len(rows[role]), built, built.records)
            if role == "forget":
                forgotten = _known([pool], role)
            else:
                _refuse_overlap(forgotten, [pool], role, "to be forgotten and " + _FATE[role])
            items = _items(_ordered(built.records, recipe.seed), spec, "train", chat)
        content = [[i.id, i.prompt, i.target, i.choices, i.answer] for i in items]
        loaded.append(LoadedSet(role, role, spec, items, (), (), digest(content, *_turns(items)), {}))
    return tuple(loaded)


_FATE = {"learn": "learned", "term": "trained on", "retain": "kept", "utility": "kept", "holdout": "held out"}


def _uses(role: SetRole, recipe: Recipe) -> tuple[tuple[Split, ...], tuple[Split, ...], str]:
    """The splits that a set's role makes use of, those that it cannot do without, and why."""
    if role == "term":
        return ("train",), ("train",), "a term of an analogy needs train items"
    if role == "holdout":
        return ("test",), ("test",), "a hold-out set needs test items"
    if role == "learn" and recipe.analogy is not None:
        scored: tuple[Split, ...] = ("validation", "test")
        return scored, scored, "the set that an analogy should teach needs validation and test items"
    if role not in ("forget", "learn"):
        return SPLITS, (), ""
    others = role == "forget" and (recipe.teach is not None or recipe.holdout is not None)
    trained = others or (recipe.vector.reads_forget_rows() and recipe.edited is None)
    needs = tuple(split for split in SPLITS if split != "train" or trained)
    return SPLITS, needs, f"a {role} set needs {listing(needs)} items"


def _read(spec: DataSet, base: Path, seed: int, tokenizer: Tokenizer | None) -> dict[Split, _Pool]:
    """One pool per source: the main one under "train", and those of validation and test where they have a file."""
    own: dict[Split, Source] = {"train": spec}
    if spec.validation is not None:
        own["validation"] = spec.validation
    if spec.test is not None:
        own["test"] = spec.test
    pools: dict[Split, _Pool] = {}
    for key, source in own.items():
        served = [split for split in SPLITS if split == key or (key == "train" and split not in own)]
        worded = [template for split in served for template in (*spec.prompts(split), *spec.asked(split))]
        worded += [spec.reverse] if spec.reverse and "test" in served else []
        templates = tuple(dict.fromkeys(worded))
        rows = read_placed(source, base, partial(columns_needed, spec, templates))
        label = source_label(source, base)
        with prefixed(label, DataError):
            built = build(rows, spec, templates, tokenizer)
        ordered = _ordered(built.records, seed)
        pools[key] = _Pool(label, len(rows), built, ordered[: source.limit])
    return pools


def _ordered(records: Iterable[Record], seed: int) -> tuple[Record, ...]:
    """Shuffled by seed and content; records of equal content stand together."""
    return tuple(sorted(records, key=lambda r: (digest(seed, r.content), r.id, *r.prompts.values())))


def _divide(role: SetRole, spec: DataSet, pools: Mapping[Split, _Pool], recipe: Recipe, chat: Chat | None) -> LoadedSet:
    used_splits, needed, why = _uses(role, recipe)
    records = _split_main(spec, pools) | {split: pool.limited for split, pool in pools.items() if split != "train"}
    records = {split: records[split] if split in used_splits else () for split in SPLITS}
    _refuse_empty(spec, pools, {split: records[split] for split in used_splits}, needed, why)
    _refuse_mixing(spec, pools, records)
    items: dict[Split, tuple[Item, ...]] = {split: _items(records[split], spec, split, chat) for split in SPLITS}
    used = {record.id for split in SPLITS for record in records[split]}
    counts: dict[str, int] = {
        "rows": sum(pool.rows for pool in pools.values()),
        "duplicates": sum(pool.built.duplicates for pool in pools.values()),
        "short": sum(pool.built.short for pool in pools.values()),
        **{split: len(items[split]) for split in SPLITS},
        "unused": sum(record.id not in used for pool in pools.values() for record in pool.built.records),
    }
    content = [[split, i.id, i.prompt, i.target, i.choices, i.answer] for split in SPLITS for i in items[split]]
    reverse: tuple[Item, ...] = ()
    if spec.reverse:
        back = spec.model_copy(update={"prompt": spec.reverse})
        reverse = _items([record.asked_back() for record in records["test"]], back, "test", chat)
    turns = _turns(i for i in (*(i for split in SPLITS for i in items[split]), *reverse))
    further = [*([spec.prefixes] if spec.prefixes else []), *turns, *([i.prompt, i.target] for i in reverse)]
    three = items["train"], items["validation"], items["test"]
    return LoadedSet(role, spec.label(), spec, *three, digest(content, *further), counts, reverse)


def _items(records: Iterable[Record], spec: DataSet, split: Split, chat: Chat | None) -> tuple[Item, ...]:
    """Every record under every prompt of a split, questions in the chat template where there is one."""
    prompts = tuple(zip(spec.prompts(split), spec.asked(split), strict=True))
    return tuple(
        record.item(plain) if chat is None or spec.kind == "text" else chat.item(record, plain, asked)
        for record in records
        for plain, asked in prompts
    )


def _turns(items: Iterable[Item]) -> list[Any]:
    """What a digest holds of items in a chat template, beside the prompts."""
    turns = [astuple(item.turn) for item in items if item.turn is not None]
    return [turns] if turns else []


def _split_main(spec: DataSet, pools: Mapping[Split, _Pool]) -> dict[Split, tuple[Record, ...]]:
    """Divide the main source among the splits that have no file of their own, never parting equal content."""
    shares = _shares(spec, pools)
    groups: dict[str, list[Record]] = {}
    for record in pools["train"].limited:
        groups.setdefault(record.content, []).append(record)
    contents = list(groups)
    sizes = _allocate(len(contents), [shares[split] for split in SPLITS])
    parts: dict[Split, tuple[Record, ...]] = {}
    start = 0
    for split, size in zip(SPLITS, sizes, strict=True):
        parts[split] = tuple(record for content in contents[start : start + size] for record in groups[content])
        start += size
    if spec.shares.train == "all":
        parts["train"] = pools["train"].limited
    return parts


def _shares(spec: DataSet, pools: Mapping[Split, _Pool]) -> dict[Split, float]:
    """The shares of the main source. "all" takes none away: its rows are also those of validation and test."""
    train = 0.0 if spec.shares.train == "all" else spec.shares.train
    if "validation" in pools and "test" in pools and train > 0:
        train = 1.0  # nothing is left to divide
    return {
        "train": train,
        "validation": 0.0 if "validation" in pools else spec.shares.validation,
        "test": 0.0 if "test" in pools else spec.shares.test,
    }


def _allocate(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``shares`` of ``total``, by largest remainders, that add up to no more than it.

    A share above 0 gets at least 1 where there are enough.
    """
    exact = [total * share for share in shares]
    sizes = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - exact[i])
    for index in by_remainder[: max(0, round(sum(exact)) - sum(sizes))]:
        sizes[index] += 1
    for index, share in enumerate(shares):
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if share > 0 and sizes[index] == 0 and (sum(sizes) < total or sizes[largest] > 1):
            sizes[largest] -= sum(sizes) == total
            sizes[index] = 1
    return sizes


def _refuse_empty(
    spec: DataSet,
    pools: Mapping[Split, _Pool],
    records: Mapping[Split, Sequence[Record]],
    needed: Collection[Split],
    why: str,
) -> None:
    main = pools["train"]
    different = len({record.content for record in main.limited})
    for split, found in records.items():
        if found:
            continue
        share = getattr(spec.shares, split)
        if share != 0:
            raise DataError(
                f"{main.label}: {different} different rows are too few for the {split} share of {share}; add rows, "
                f"change `shares`, or give `validation` and `test` files"
            )
        if split in needed:
            raise DataError(f"shares.{split} is 0, but {why}")


def _refuse_mixing(spec: DataSet, pools: Mapping[Split, _Pool], records: Mapping[Split, Sequence[Record]]) -> None:
    """The same content must not stand in two splits; with ``train: all`` it may be trained on and scored."""
    for one, other in combinations(SPLITS, 2):
        if one == "train" and spec.shares.train == "all":
            continue
        first, second = (pools.get(split, pools["train"]) for split in (one, other))
        known = {record.content: record for record in records[one]}
        both = [record for record in records[other] if record.content in known]
        if both:
            raise DataError(
                f"the same item is in {one} and in {other}:\n  {both[0].shown()}\n"
                f"  {one}: {_Origin(first, known[both[0].content])}\n  {other}: {_Origin(second, both[0])}\n"
                f"  {_others(len(both))}remove it from one of them"
                + (", or set shares.train to all if what is trained on is meant to be scored" if one == "train" else "")
            )


def _known(pools: Iterable[_Pool], owner: str) -> dict[str, _Origin]:
    """Content, and for texts the whole document, to where it was first found."""
    known: dict[str, _Origin] = {}
    for pool in pools:
        for record in pool.built.records:
            for key in (record.content, record.document):
                known.setdefault(key, _Origin(pool, record, owner))
    return known


def _refuse_overlap(known: Mapping[str, _Origin], pools: Iterable[_Pool], name: str, fates: str) -> None:
    """All rows are compared, used or not: whether a recipe is sound must not depend on its seed."""
    both = [
        (_Origin(pool, record), known.get(record.content) or known[record.document])
        for pool in pools
        for record in pool.built.records
        if record.content in known or record.document in known
    ]
    if both:
        here, there = both[0]
        raise DataError(
            f"the same item is {fates}:\n  {here.record.shown()}\n"
            f"  {there.owner}: {there}\n  {name}: {here}\n  {_others(len(both))}remove it from one of them"
        )


def _others(count: int) -> str:
    return f"and {count - 1} more like it; " if count > 1 else ""


# -- a recipe's items as files for lm-eval, with token counts as lm-eval itself will count them


MEMORY_TOKENS = 32  # pieces per passage; the pack's own default as well
COUNTERPARTS = 4
EVALUATED: tuple[Split, ...] = ("validation", "test")


def items_path(folder: Path, loaded: LoadedSet, split: Split) -> Path:
    """``<role>.<name>.<split>.jsonl`` in ``folder``."""
    return folder / f"{loaded.role}.{loaded.name}.{split}.jsonl"


def write_items(
    sets: Sequence[LoadedSet],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    splits: Sequence[Split] = EVALUATED,
    written: Collection[Split] = (),
) -> tuple[Path, ...]:
    """Write one JSON-lines file for each set and split that has items; one that is there already is not touched.

    Args:
        tokenizer: The one of the model that will be scored; counts and pieces are in its tokens.
        written: Those of the splits for which texts are to be written and compared word by word.
    """
    paths = []
    for loaded in sets:
        for split in splits:
            items = loaded.items(split)
            if not items:
                continue
            path = items_path(folder, loaded, split)
            rows = list(_rows(loaded, split, tokenizer))
            if split in written and loaded.spec.kind != "mcq" and loaded.role != "holdout":
                _check_words(loaded, rows)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            try:
                if not path.is_file() or path.read_text(encoding="utf-8") != text:  # a finished file is left alone
                    folder.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise RunFolderError(f"cannot write the items {path}: {error}") from error
            paths.append(path)
    return tuple(paths)


def at_prefixes(sets: Sequence[LoadedSet], tokenizer: PreTrainedTokenizerFast) -> tuple[LoadedSet, ...]:
    """The sets, and each set of passages once more for each of its ``prefixes``, as ``name@prefix``, test items only.

    The passages are the same; only the place moves where the given part ends.
    """
    found = list(sets)
    for loaded in sets:
        for prefix in loaded.spec.prefixes:
            items = tuple(_moved(tokenizer, item, prefix) for item in loaded.test)
            found.append(_once_more(loaded, prefix, items, prefix=prefix, prefixes=()))
    return tuple(found)


PLAIN = "plain"


def plainly(sets: Sequence[LoadedSet]) -> tuple[LoadedSet, ...]:
    """The sets, and each forget set in a chat template once more outside it, as ``name@plain``, test items only.

    A model that has forgotten in one of the two wordings alone has not forgotten.
    """
    found = []
    for loaded in sets:
        found.append(loaded)
        if loaded.role == "forget" and any(item.turn is not None for item in loaded.test):
            found.append(_once_more(loaded, PLAIN, tuple(item.plainly() for item in loaded.test)))
    return tuple(found)


def asked_back(sets: Sequence[LoadedSet]) -> tuple[LoadedSet, ...]:
    """The sets, and the test items of each that has a ``reverse`` prompt once more under it, as ``name@reverse``."""
    found = list(sets)
    for loaded in sets:
        items = among_others(loaded.reverse) if loaded.spec.kind == "mcq" else loaded.reverse
        if any(len(item.choices) == 1 for item in items):
            raise EvaluationError(
                f"reverse: {loaded.role} set {loaded.name!r} has no two test items with another question, so that "
                "there is nothing to choose between: add rows, or raise shares.test"
            )
        if items:
            found.append(_once_more(loaded, "reverse", items, prompt=loaded.spec.reverse, reverse=None))
    return tuple(found)


def _once_more(loaded: LoadedSet, mark: object, items: tuple[Item, ...], **changed: Any) -> LoadedSet:
    """A set's test items in another form, as ``name@mark``."""
    name, spec = f"{loaded.name}@{mark}", loaded.spec.model_copy(update=changed)
    return replace(loaded, name=name, spec=spec, train=(), validation=(), test=items, reverse=())


def _moved(tokenizer: PreTrainedTokenizerFast, item: Item, prefix: int) -> Item:
    text = item.prompt + item.target
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    if len(ends) <= prefix:
        raise EvaluationError(f"prefixes: a passage has {len(ends)} tokens, so none is left after {prefix}")
    return replace(item, prompt=text[: ends[prefix - 1]], target=text[ends[prefix - 1] :])


def counterparts(items: Sequence[Item], template: str) -> dict[str, list[str]]:
    """For each item's id the prompts of four others with another answer, in the same wording: what a model says there
    it says of anything. The order they are taken in is one for all items, so that they are nearly the same four.

    Where the template is no wording of its own, or nobody has another answer: the empty prompt.
    """
    worded = any(map(str.isalnum, render(template, dict.fromkeys(template_fields(template), ""))))
    worded = worded or any(item.turn is not None for item in items)  # a chat template is a wording of its own
    order = sorted(items, key=lambda item: item.id) if worded else []
    random.Random("counterparts").shuffle(order)
    return {
        item.id: [o.prompt for o in itertools.islice(answered_otherwise(item, order), COUNTERPARTS)] or [""]
        for item in items
    }


def _rows(loaded: LoadedSet, split: Split, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Any]]:
    kind, items = loaded.spec.kind, loaded.items(split)
    others = counterparts(items, loaded.spec.prompts(split)[0]) if kind != "text" else {}
    for item in items:
        row: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "target": item.target}
        answers = item.choices if kind == "mcq" else (item.target,)
        counts = [len(encode_item(tokenizer, replace(item, target=answer), kind)[1]) for answer in answers]
        if kind == "mcq":
            row |= {"choices": list(item.choices), "answer": item.answer, "choice_tokens": counts}
        else:
            row["target_tokens"] = counts[0]
            row |= _pieces(tokenizer, item) if kind == "text" else {}
            row |= _beginning(tokenizer, item, "" if kind == "text" else item.joint, loaded.spec.continuation)
        if kind != "text":
            row["others"] = others[item.id]
        if item.turn is not None:
            row |= {"joint": item.turn.joint, "ending": item.turn.ending.strip()}
        if min(counts) < 1:
            raise EvaluationError(
                f"{loaded.role} set {loaded.name!r}, item {item.id}: this tokenizer merges the answer into the prompt, "
                f"so that no token is left to score; end the prompt at a word boundary"
            )
        yield row


def _check_words(loaded: LoadedSet, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what no written text could be compared with: its ROUGE would be 0 whatever the model knows."""
    texts = [row["continuation"] for row in rows]
    wordless = [text for text in texts if not any(map(str.isalnum, unicodedata.normalize("NFKC", text)))]
    if wordless:
        raise EvaluationError(
            f"{loaded.role} set {loaded.name!r}: {len(wordless)} of {len(rows)} answers have no letter and no digit, "
            f"such as {shorten(wordless[0])!r}, so that ROUGE has no words to compare: take these rows out, or set "
            "eval.generate to none (and robustness.samples to 0)"
        )


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str, start: int) -> tuple[list[int], list[int], int]:
    """Ids of a text's tokens, where each ends, and which is the first to end behind ``start``."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), ends, next((k for k, end in enumerate(ends) if end > start), len(ends))


def _beginning(tokenizer: PreTrainedTokenizerFast, item: Item, space: str, generated: int) -> dict[str, str]:
    """``continuation``: what ROUGE-L compares with a text of so many tokens, which is no more of the target."""
    text = item.prompt + space + item.target
    _, ends, first = _tokens(tokenizer, text, len(item.prompt))
    last = first + generated - 1
    return {"continuation": text[len(item.prompt) + len(space) : ends[last]] if last < len(ends) else item.target}


def _pieces(tokenizer: PreTrainedTokenizerFast, item: Item) -> dict[str, list[str]]:
    """``pieces``, to be recited one by one: the target cut where a text cut there encodes to the same tokens.

    Only then is one piece one token of the whole. Not every token boundary is such a place: one character may be
    several tokens, a prefix may encode otherwise when nothing follows it, and lm-eval moves white space before a cut to
    behind it.
    """
    text, start = item.prompt + item.target, len(item.prompt)
    ids, ends, first = _tokens(tokenizer, text, start)
    end_of_window = first + 2 * MEMORY_TOKENS
    window = range(first, min(len(ids), end_of_window))
    places = [k for k in window if start < ends[k] < len(text) and not text[ends[k] - 1].isspace()]
    heads = [text[: ends[k]] for k in places]
    encodings = tokenizer(heads, add_special_tokens=False)["input_ids"] if heads else []
    cuts = [start]
    for k, encoding in zip(places, encodings, strict=True):
        if ends[k] > cuts[-1] and list(encoding) == ids[: k + 1]:
            cuts.append(ends[k])
    if end_of_window >= len(ids) or len(cuts) == 1:
        cuts.append(len(text))  # what is left of a short target, or all of one that can be cut nowhere
    return {"pieces": [text[a:b] for a, b in itertools.pairwise(cuts)][:MEMORY_TOKENS]}
