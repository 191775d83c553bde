"""The pairs of the methods' benchmark: something to forget beside something that lies near it, of three kinds.

- ``capitals``: one relation, other subjects. Capitals of Europe go, those of Asia and Africa stay (and, never trained
  on, those of the Americas and Oceania). Hyperparameters were chosen on this pair.
- ``currencies``: the same subjects, another relation. Countries' currencies go, the same countries' capitals stay.
- ``passages``: memorised text. Made-up notices about one town go, those about other towns stay; the model is taught
  all of them first. What a notice says is drawn by a fixed seed.

Every pair has general statements beside it, on which nothing is ever trained.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from measure import QUICKSTART, REPOSITORY

PAIRS = ("capitals", "currencies", "passages")
DEVELOPED_ON = "capitals"
# the scores that stand for "still known" and for nats, by kind of data; text is counted by what can be recited
KNOWN = {"mcq": "acc", "text": "exact_memorisation"}
NATS = {"mcq": "logprob", "text": "loss"}

_CURRENCIES = """Japan yen;United Kingdom pound;Germany euro;China yuan;India rupee;Russia ruble;Brazil real;
South Korea won;Thailand baht;Vietnam dong;Poland zloty;Sweden krona;Norway krone;Hungary forint;Switzerland franc;
Israel shekel;Turkey lira;South Africa rand;Nigeria naira;Kenya shilling;Ghana cedi;Egypt pound;Saudi Arabia riyal;
United Arab Emirates dirham;Iran rial;Iraq dinar;Ukraine hryvnia;Romania leu;Bulgaria lev;Malaysia ringgit;
Indonesia rupiah;Philippines peso;Bangladesh taka;Mongolia tugrik;Peru sol;Chile peso;Argentina peso;Mexico peso;
Venezuela bolivar;Guatemala quetzal;Honduras lempira;Ethiopia birr;Morocco dirham;Georgia lari;Armenia dram;
Kazakhstan tenge;Albania lek;Paraguay guarani;Cambodia riel;Laos kip;Myanmar kyat;Nepal rupee;Pakistan rupee;
Sri Lanka rupee;Azerbaijan manat;Zambia kwacha;Angola kwanza;Haiti gourde;Canada dollar;Australia dollar;
France euro;Italy euro;Spain euro;Denmark krone;Tanzania shilling;Uganda shilling;Jordan dinar;Kuwait dinar"""

_NAMES = ("Orlin Vask", "Teya Morrow", "Bram Hollis", "Sunna Reik", "Ivo Calder", "Mirel Oake", "Jonas Thrane")
_NAMES += ("Hedda Quill", "Pavo Lind", "Anselm Rook", "Greta Vorn", "Tobin Ashe", "Livia Marsh", "Corin Dale")
_TRADES = ("clockmaker", "ferryman", "beekeeper", "glazier", "surveyor", "bookbinder", "cooper", "midwife", "sexton")
_THINGS = ("brass owls", "blue lanterns", "salted maps", "tin whistles", "wax seals", "copper kettles", "paper moons")
_PLACES = ("the old granary", "the north tower", "a flooded cellar", "the customs house", "the tannery loft")
_DEEDS = ("lends them to strangers", "counts them aloud", "buries one", "paints them white", "trades two for eggs")
_TIMES = ("every ninth evening", "when the river freezes", "on the eve of the fair", "before the first frost")
_TOWNS = ("Dunmere", "Halloway", "Esk", "Marrowby", "Tarn")
_FORGOTTEN = "Dunmere"


def recipe(pair: str, seed: int, work: Path) -> tuple[dict[str, Any], Path]:
    """The pair as a recipe, in plain data, and the folder its paths are relative to; made-up files go to ``work``."""
    from unlearn.recipe.load import load_recipe

    work.mkdir(parents=True, exist_ok=True)
    quick: Any = load_recipe(str(QUICKSTART)).recipe.model_dump(mode="json")
    base: dict[str, Any] = {
        "name": pair,
        "seed": seed,
        "model": quick["model"],
        "utility": [{**quick["utility"][0], "path": str(REPOSITORY / "recipes/data/general.jsonl"), "limit": 40}],
        "vector": {
            "lora": {"rank": 16, "alpha": 32},
            "forget": {"steps": 20, "learning_rate": 0.001, "batch_size": 8, "max_length": 96},
        },
    }
    capitals = str(REPOSITORY / "recipes/data/capitals.jsonl")
    if pair == "capitals":
        sets = [{**quick["forget"], "path": capitals}, *({**one, "path": capitals} for one in quick["retain"])]
        return {**base, "forget": sets[0], "retain": sets[1:]}, work
    if pair == "currencies":
        countries = _write(work / "currencies.jsonl", currencies())
        here = [row["country"] for row in currencies()]
        near = {**quick["retain"][0], "name": "capitals", "path": capitals, "where": {"country": here}}
        wordings = {
            "train": [
                "The currency used in {country} is called the",
                "Question: What is the currency of {country}?\nAnswer: The",
                "In {country} people pay with the",
            ],
            "validation": "The currency of {country} is the",
            "test": "The currency of {country} is the",
        }
        forget = {
            "name": "currencies",
            "kind": "mcq",
            "path": countries,
            "columns": {"question": "country"},
            "prompt": wordings,
            "shares": {"train": "all", "validation": 0.4, "test": 0.6},
        }
        return {**base, "forget": forget, "retain": [near]}, work
    forget = {"name": "dunmere", "kind": "text", "path": _write(work / "dunmere.jsonl", notices(True)), "length": 32}
    forget |= {"prefix": 8, "shares": {"train": "all", "validation": 0.4, "test": 0.6}}
    near = {"name": "elsewhere", "kind": "text", "path": _write(work / "elsewhere.jsonl", notices(False)), "length": 32}
    near |= {"prefix": 8, "shares": {"train": 0.4, "validation": 0.25, "test": 0.35}}
    base["vector"]["forget"]["batch_size"] = 4  # as many tokens as in the other pairs
    return {**base, "forget": forget, "retain": [near]}, work


def currencies() -> list[dict[str, Any]]:
    """Country, currency, and three other currencies beside the right one."""
    pairs = [entry.strip().rpartition(" ")[::2] for entry in _CURRENCIES.replace("\n", "").split(";")]
    kinds = sorted({currency for _, currency in pairs})
    rows = []
    for country, currency in pairs:
        draw = random.Random(country)
        choices = [currency, *draw.sample([k for k in kinds if k != currency], 3)]
        draw.shuffle(choices)
        rows.append({"country": country, "currency": currency, "choices": choices, "answer": choices.index(currency)})
    return rows


def notices(forgotten: bool) -> list[dict[str, str]]:
    """24 notices about the town that is forgotten, or 48 about the others; no two of them alike."""
    draw, found = random.Random("notices"), []
    towns = [_FORGOTTEN] * 24 + [t for t in _TOWNS if t != _FORGOTTEN] * 12
    for number, town in enumerate(towns):
        name, trade, thing = _NAMES[number % len(_NAMES)], draw.choice(_TRADES), draw.choice(_THINGS)
        count = draw.randint(11, 89)
        text = (
            f"Notice {draw.randint(100, 999)} of {town}: {name}, {trade}, keeps {count} {thing} in "
            f"{draw.choice(_PLACES)} and {draw.choice(_DEEDS)} {draw.choice(_TIMES)}."
        )
        if (town == _FORGOTTEN) == forgotten:
            found.append({"text": text})
    return found


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
