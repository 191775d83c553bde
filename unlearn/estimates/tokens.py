"""How many tokens a recipe trains on, scores and writes: counted in its data, or as declared where they are elsewhere.

Rows are counted as :mod:`unlearn.finetune` and lm-eval encode them. Without the model's tokenizer four characters count
as a token, as in a dry run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.data import LoadedSet, load_sets
from unlearn.errors import DataError
from unlearn.estimates.options import Declared
from unlearn.items import CHARACTERS_PER_TOKEN, Item
from unlearn.plan import local_part, on_hub
from unlearn.recipe import SPLITS, DataSet, Kind, Recipe, SetRole, Source, Split

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One training row: its tokens, and how many of them are predicted."""

    tokens: int
    labels: int


@dataclass(frozen=True, slots=True)
class ScoredItem:
    """One scored item: tokens of its tree, places where the head runs, prompt tokens, tokens with a row per answer.

    ``answers`` says how many such rows there are, ``longest`` how many tokens the longest has.
    """

    tokens: int
    heads: int
    prompt: int
    rows: int
    longest: int
    answers: int = 1


@dataclass(frozen=True, slots=True)
class SetTokens:
    """One data set's rows. ``told`` says where its numbers come from, if they were not counted."""

    role: SetRole
    name: str
    kind: Kind
    train: tuple[TrainRow, ...]
    scored: Mapping[Split, tuple[ScoredItem, ...]]
    continuation: int
    told: str = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a set that is not on this machine: rows, mean tokens of prompt and answer, tokens of the longest row."""

    rows: int
    prompt: float
    answer: float
    longest: int


# TOFU (2401.06121), rows by configuration; tokens counted with SmolLM2's tokenizer.
_AUTHORS = (21.7, 34.5, 130)
_TOFU = {"forget01": 40, "forget05": 200, "forget10": 400, "retain90": 3600, "retain95": 3800, "retain99": 3960}
_SCORED = {"real_authors_perturbed": (100, 18.9, 3.8, 40), "world_facts_perturbed": (117, 16.9, 2.4, 40)}
HUB_SIZES: Mapping[tuple[str, str | None], Sizes] = {
    **{("hub:locuslab/TOFU", name): Sizes(rows, *_AUTHORS) for name, rows in _TOFU.items()},
    **{("hub:locuslab/TOFU", f"{name}_perturbed"): Sizes(_TOFU[name], *_AUTHORS) for name in list(_TOFU)[:3]},
    **{("hub:locuslab/TOFU", name): Sizes(*numbers) for name, numbers in _SCORED.items()},
}
_MOST = 10**7  # rows that are laid out
_PLENTY = 10**9  # rows of a set of which nothing is known but that the recipe takes some of it
_UNKNOWN = (24.0, 24.0, 96)  # tokens of a question and an answer that nothing is known of


class Words:
    """The model's tokenizer, by its ``tokenizer.json``, as much of it as counting and cutting passages needs."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self._inner: Any = Tokenizer.from_file(str(file))

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        """As a fast transformers tokenizer: ``offset_mapping`` and ``input_ids``."""
        found = self._inner.encode(text, add_special_tokens=bool(options.get("add_special_tokens", True)))
        return {"offset_mapping": found.offsets, "input_ids": found.ids}

    def count(self, text: str) -> int:
        """Tokens of a text, with what the tokenizer puts around it."""
        return len(self._inner.encode(text).ids)


def about(text: str) -> int:
    """Tokens of a text where there is no tokenizer."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def count_sets(
    recipe: Recipe, base: Path, tokenizer: Path | None, declared: Mapping[str, Declared], window: int
) -> tuple[SetTokens, ...]:
    """Every set of a recipe, in report order.

    Args:
        base: Folder of the recipe.
        tokenizer: The model's ``tokenizer.json``.
        declared: Sizes given by name of a set; they count more than what is known or found.
        window: Tokens that the model reads at a time.

    Raises:
        DataError: local data that cannot be used, or a set elsewhere of which nothing is known.
    """
    words = Words(tokenizer) if tokenizer is not None else None
    count = words.count if words is not None else about
    stands = {spec.label() for _, spec in recipe.sets()}
    if unknown := sorted(set(declared) - stands):
        raise DataError(f"--rows: this recipe has no set called {unknown[0]}; it has {', '.join(sorted(stands))}")
    counted = recipe if not declared else _without(recipe, declared)
    here = {(s.role, s.name): s for s in load_sets(local_part(counted), base, words)}
    found = []
    for role, spec in recipe.sets():
        one = here.get((role, spec.label()))
        if one is not None and spec.label() not in declared:
            found.append(_counted(one, count, window))
        else:
            found.append(_declared(role, spec, declared.get(spec.label())))
    return tuple(found)


def _without(recipe: Recipe, declared: Mapping[str, Declared]) -> Recipe:
    """The recipe, the sets that sizes are declared of taken for sets on the hub, which are not read."""

    def away(data: Any) -> Any:
        elsewhere = data is not None and data.label() in declared and not on_hub(data)
        return data.model_copy(update={"path": f"hub:{data.path}"}) if elsewhere else data

    single = {name: away(getattr(recipe, name)) for name in ("forget", "holdout")}
    many = {n: tuple(map(away, getattr(recipe, n))) for n in ("also_forget", "learn", "retain", "utility")}
    return recipe.model_copy(update={**single, **many})


def _counted(one: LoadedSet, count: Count, window: int) -> SetTokens:
    kind = one.spec.kind
    rows = [row for item in one.train if (row := train_row(item, kind, count)) is not None]
    scored = {split: tuple(scored_item(i, kind, count, window) for i in one.items(split)) for split in SPLITS[1:]}
    return SetTokens(one.role, one.name, kind, tuple(rows), scored, one.spec.continuation)


def train_row(item: Item, kind: Kind, count: Count) -> TrainRow | None:
    """What :func:`unlearn.finetune.encode_one` makes of an item, counted; None where there is nothing to learn."""
    if kind == "text":
        tokens, skip = count(item.prompt + item.target), 1
    else:
        prompt = item.prompt.rstrip()
        tokens, skip = count(f"{item.prompt} {item.target}"), max(count(prompt) if prompt else 0, 1)
        tokens += kind == "qa"  # the end-of-text token, so that the model learns to stop
    return TrainRow(tokens, tokens - skip) if tokens > skip else None


def cut_rows(rows: Sequence[TrainRow], max_length: int) -> tuple[TrainRow, ...]:
    """Rows cut at the end, without those that have no token left to learn."""
    over = [(row, max(row.tokens - max_length, 0)) for row in rows]
    return tuple(TrainRow(row.tokens - n, row.labels - n) for row, n in over if row.labels > n)


def scored_item(item: Item, kind: Kind, count: Count, window: int) -> ScoredItem:
    """One item as it is scored. The last token of an answer is predicted and not read."""
    prompt = min(count(item.prompt.rstrip()), window)
    if kind == "text":
        whole = min(count(item.prompt + item.target), window)
        return ScoredItem(whole - 1, max(whole - prompt, 1), prompt, whole - 1, whole - 1)
    answers = item.choices or (item.target,)
    return _branching(prompt, [max(count(f"{item.prompt} {answer}") - prompt, 1) for answer in answers])


def _branching(prompt: int, each: Sequence[int]) -> ScoredItem:
    """A prompt with answers of so many tokens."""
    tokens, rows = sum(each) - len(each), [prompt + n - 1 for n in each]
    return ScoredItem(prompt + tokens, 1 + tokens, prompt, sum(rows), max(rows), len(rows))


def _declared(role: SetRole, spec: DataSet, given: Declared | None) -> SetTokens:
    sources: dict[Split, Source] = {"train": spec}
    for split in SPLITS[1:]:
        own = getattr(spec, split)
        if own is not None:
            sources[split] = own
    sizes = {split: _sizes(spec, source, given) for split, source in sources.items()}
    rows = {split: _used(source, sizes[split].rows) for split, source in sources.items()}
    shares = {split: getattr(spec.shares, split) for split in SPLITS}
    whole = shares["train"] == "all"
    part = {s: rows.get(s, round(rows["train"] * float(shares[s]))) for s in SPLITS[1:]}
    train = rows["train"] if whole else round(rows["train"] * float(shares["train"]))
    if len(sources) == len(SPLITS):
        train = rows["train"] if shares["train"] else 0
    train = 0 if role in ("utility", "holdout") and not shares["train"] else train * len(spec.prompts("train"))
    of = sizes["train"]
    scored = {s: tuple([_declared_item(spec, sizes.get(s, of))] * part[s]) for s in SPLITS[1:]}
    told = f"{of.rows:,} rows declared" if given else f"{of.rows:,} rows, as published"
    if of.rows == _PLENTY:
        told = f"{rows['train']:,} rows, as many as the recipe takes; their tokens are guessed"
    return SetTokens(role, spec.label(), spec.kind, _declared_rows(spec, of, train), scored, spec.continuation, told)


def _sizes(spec: DataSet, source: Source, given: Declared | None) -> Sizes:
    if given is not None:
        prompt, answer, longest = _UNKNOWN
        if given.tokens is not None:
            prompt, answer, longest = given.tokens / 2, given.tokens / 2, 2 * given.tokens
        return Sizes(given.rows, prompt, answer, longest)
    known = HUB_SIZES.get((source.path, source.config or spec.config))
    if known is not None:
        return known
    if source.limit is not None or source.rows is not None:
        return Sizes(_PLENTY, *_UNKNOWN)
    raise DataError(
        f"{spec.label()}: {source.path} is not on this machine, and nothing is known of its size: give it with "
        f"--rows {spec.label()}=ROWS, or ROWSxTOKENS with the mean tokens of a row"
    )


def _used(source: Source, rows: int) -> int:
    count = min(rows, source.rows[1]) - source.rows[0] if source.rows is not None else rows
    return min(count, _MOST, source.limit or _MOST)


def _declared_rows(spec: DataSet, of: Sizes, count: int) -> tuple[TrainRow, ...]:
    """Rows of mean length, and one in twenty as long as the longest: memory goes by these."""
    if spec.kind == "text":
        return (TrainRow(spec.length, spec.length - 1),) * count
    mean, prompt = round(of.prompt + of.answer) + 1, round(of.prompt)
    usual, long = TrainRow(mean, mean - prompt), TrainRow(of.longest, of.longest - prompt)
    return tuple(long if n % 20 == 0 else usual for n in range(count))


def _declared_item(spec: DataSet, of: Sizes) -> ScoredItem:
    if spec.kind == "text":
        return ScoredItem(spec.length - 1, spec.length - spec.prefix, spec.prefix, spec.length - 1, spec.length - 1)
    return _branching(round(of.prompt), [max(round(of.answer), 1)] * (4 if spec.kind == "mcq" else 1))
