"""The pairs of the methods' benchmark: something to forget beside something that lies near it, of four kinds.

- ``capitals``: one relation, other subjects. Capitals of Europe go, those of Asia and Africa stay (and, never trained
  on, those of the Americas and Oceania). Hyperparameters were chosen on this pair.
- ``currencies``: the same subjects, another relation. Countries' currencies go, the same countries' capitals stay.
- ``authors``: names of people. Who wrote Britain's and Ireland's famous works goes, who wrote the continent's stays
  (and, never trained on, who wrote America's).
- ``passages``: memorised text. Made-up notices about one town go, those about other towns stay; the model is taught
  all of them first. What a notice says is drawn by a fixed seed.

Every pair has general statements beside it, on which nothing is ever trained.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import QUICKSTART, REPOSITORY

PAIRS = ("capitals", "currencies", "authors", "passages")
DEVELOPED_ON = "capitals"
# the scores that stand for "still known" and for nats, by kind of data; text is counted by what can be recited
KNOWN = {"mcq": "acc", "text": "exact_memorisation"}
NATS = {"mcq": "logprob", "text": "loss"}
PMI = {"mcq": "pmi", "text": "pmi"}

_CURRENCIES = """Japan yen;United Kingdom pound;Germany euro;China yuan;India rupee;Russia ruble;Brazil real;
South Korea won;Thailand baht;Vietnam dong;Poland zloty;Sweden krona;Norway krone;Hungary forint;Switzerland franc;
Israel shekel;Turkey lira;South Africa rand;Nigeria naira;Kenya shilling;Ghana cedi;Egypt pound;Saudi Arabia riyal;
United Arab Emirates dirham;Iran rial;Iraq dinar;Ukraine hryvnia;Romania leu;Bulgaria lev;Malaysia ringgit;
Indonesia rupiah;Philippines peso;Bangladesh taka;Mongolia tugrik;Peru sol;Chile peso;Argentina peso;Mexico peso;
Venezuela bolivar;Guatemala quetzal;Honduras lempira;Ethiopia birr;Morocco dirham;Georgia lari;Armenia dram;
Kazakhstan tenge;Albania lek;Paraguay guarani;Cambodia riel;Laos kip;Myanmar kyat;Nepal rupee;Pakistan rupee;
Sri Lanka rupee;Azerbaijan manat;Zambia kwacha;Angola kwanza;Haiti gourde;Canada dollar;Australia dollar;
France euro;Italy euro;Spain euro;Denmark krone;Tanzania shilling;Uganda shilling;Jordan dinar;Kuwait dinar"""

# works by author, the most famous ones, of which a small model knows most
_BRITISH = """William Shakespeare: Hamlet, Macbeth, Romeo and Juliet, Othello, King Lear, The Tempest, A Midsummer
Night's Dream, Twelfth Night; Jane Austen: Pride and Prejudice, Sense and Sensibility, Emma, Mansfield Park,
Persuasion, Northanger Abbey; Charles Dickens: Great Expectations, Oliver Twist, David Copperfield, A Tale of Two
Cities, A Christmas Carol, Bleak House, Hard Times, Little Dorrit; Charlotte Brontë: Jane Eyre, Villette; Emily
Brontë: Wuthering Heights; Mary Shelley: Frankenstein; Bram Stoker: Dracula; Oscar Wilde: The Picture of Dorian Gray,
The Importance of Being Earnest; Jonathan Swift: Gulliver's Travels; Daniel Defoe: Robinson Crusoe, Moll Flanders;
John Milton: Paradise Lost; Geoffrey Chaucer: The Canterbury Tales; John Bunyan: The Pilgrim's Progress; George Eliot:
Middlemarch, Silas Marner, The Mill on the Floss; Thomas Hardy: Tess of the d'Urbervilles, Jude the Obscure, Far from
the Madding Crowd; Robert Louis Stevenson: Treasure Island, Kidnapped, Strange Case of Dr Jekyll and Mr Hyde; Lewis
Carroll: Alice's Adventures in Wonderland, Through the Looking-Glass; Rudyard Kipling: The Jungle Book, Kim, Just So
Stories; H. G. Wells: The Time Machine, The War of the Worlds, The Invisible Man; Joseph Conrad: Heart of Darkness,
Lord Jim; J. M. Barrie: Peter Pan; William Makepeace Thackeray: Vanity Fair; Walter Scott: Ivanhoe, Waverley; Arthur
Conan Doyle: The Hound of the Baskervilles, A Study in Scarlet; George Bernard Shaw: Pygmalion; James Joyce:
Dubliners, Ulysses; Virginia Woolf: Mrs Dalloway, To the Lighthouse; E. M. Forster: A Passage to India; George Orwell:
Nineteen Eighty-Four, Animal Farm; Aldous Huxley: Brave New World; J. R. R. Tolkien: The Hobbit; Agatha Christie:
Murder on the Orient Express; Kenneth Grahame: The Wind in the Willows; A. A. Milne: Winnie-the-Pooh; Charles Darwin:
On the Origin of Species; Adam Smith: The Wealth of Nations; Thomas Hobbes: Leviathan"""
_CONTINENTAL = """Leo Tolstoy: War and Peace, Anna Karenina; Fyodor Dostoevsky: Crime and Punishment, The Brothers
Karamazov, The Idiot; Nikolai Gogol: Dead Souls; Ivan Turgenev: Fathers and Sons; Alexander Pushkin: Eugene Onegin;
Anton Chekhov: The Cherry Orchard, Uncle Vanya; Victor Hugo: Les Misérables, The Hunchback of Notre-Dame; Gustave
Flaubert: Madame Bovary; Alexandre Dumas: The Three Musketeers, The Count of Monte Cristo; Jules Verne: Twenty
Thousand Leagues Under the Sea, Around the World in Eighty Days, Journey to the Center of the Earth; Voltaire:
Candide; Jean-Jacques Rousseau: The Social Contract; Marcel Proust: In Search of Lost Time; Albert Camus: The
Stranger, The Plague; Émile Zola: Germinal; Molière: Tartuffe; Johann Wolfgang von Goethe: Faust, The Sorrows of Young
Werther; Franz Kafka: The Metamorphosis, The Trial, The Castle; Friedrich Nietzsche: Thus Spoke Zarathustra; Immanuel
Kant: Critique of Pure Reason; Karl Marx: Das Kapital; Sigmund Freud: The Interpretation of Dreams; Hermann Hesse:
Siddhartha; Homer: The Odyssey, The Iliad; Virgil: The Aeneid; Plato: The Republic; Sophocles: Oedipus Rex, Antigone;
Dante Alighieri: The Divine Comedy; Giovanni Boccaccio: The Decameron; Niccolò Machiavelli: The Prince; Miguel de
Cervantes: Don Quixote; Henrik Ibsen: A Doll's House; Hans Christian Andersen: The Little Mermaid, The Ugly Duckling;
Gabriel García Márquez: One Hundred Years of Solitude; Umberto Eco: The Name of the Rose; Ovid: Metamorphoses;
Aristotle: Poetics"""
_AMERICAN = """Mark Twain: The Adventures of Tom Sawyer, Adventures of Huckleberry Finn, The Prince and the Pauper;
Herman Melville: Moby-Dick; Nathaniel Hawthorne: The Scarlet Letter; Edgar Allan Poe: The Raven, The Fall of the House
of Usher; Henry David Thoreau: Walden; Walt Whitman: Leaves of Grass; Louisa May Alcott: Little Women; Jack London:
The Call of the Wild, White Fang; Harriet Beecher Stowe: Uncle Tom's Cabin; James Fenimore Cooper: The Last of the
Mohicans; Henry James: The Portrait of a Lady; L. Frank Baum: The Wonderful Wizard of Oz; Edith Wharton: The Age of
Innocence; F. Scott Fitzgerald: The Great Gatsby; Ernest Hemingway: The Old Man and the Sea, A Farewell to Arms, The
Sun Also Rises; John Steinbeck: The Grapes of Wrath, Of Mice and Men; Harper Lee: To Kill a Mockingbird; J. D.
Salinger: The Catcher in the Rye; William Faulkner: The Sound and the Fury; Arthur Miller: Death of a Salesman, The
Crucible; Tennessee Williams: A Streetcar Named Desire; Kurt Vonnegut: Slaughterhouse-Five; Joseph Heller: Catch-22;
Ray Bradbury: Fahrenheit 451; Jack Kerouac: On the Road; Toni Morrison: Beloved; Washington Irving: Rip Van Winkle,
The Legend of Sleepy Hollow; Stephen Crane: The Red Badge of Courage"""

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
    if pair == "authors":
        asked = {
            "train": ["{work} was written by", "Question: Who wrote {work}?\nAnswer:", "{work} is a work by"],
            "validation": "The author of {work} is",
            "test": "The author of {work} is",
        }
        shares = {"forget": ("all", 0.3, 0.6), "nearby": (0.4, 0.25, 0.35), "elsewhere": (0.0, 0.4, 0.6)}
        sets = [
            {
                "name": "british" if name == "forget" else name,
                "kind": "mcq",
                "path": _write(work / f"{name}.jsonl", works(listed)),
                "columns": {"question": "work"},
                "prompt": asked,
                "shares": dict(zip(("train", "validation", "test"), shares[name], strict=True)),
            }
            for name, listed in (("forget", _BRITISH), ("nearby", _CONTINENTAL), ("elsewhere", _AMERICAN))
        ]
        return {**base, "forget": sets[0], "retain": sets[1:]}, work
    forget = {"name": "dunmere", "kind": "text", "path": _write(work / "dunmere.jsonl", notices(True)), "length": 32}
    forget |= {"prefix": 8, "shares": {"train": "all", "validation": 0.4, "test": 0.6}}
    near = {"name": "elsewhere", "kind": "text", "path": _write(work / "elsewhere.jsonl", notices(False)), "length": 32}
    near |= {"prefix": 8, "shares": {"train": 0.4, "validation": 0.25, "test": 0.35}}
    base["vector"]["forget"]["batch_size"] = 4  # as many tokens as in the other pairs
    return {**base, "forget": forget, "retain": [near]}, work


def currencies() -> list[dict[str, Any]]:
    """Country, currency, and three other currencies beside the right one."""
    return _choices("country", [entry.strip().rpartition(" ")[::2] for entry in _entries(_CURRENCIES)])


def works(listed: str) -> list[dict[str, Any]]:
    """Work, its author, and three others of the same list."""
    by = [entry.strip().split(": ") for entry in _entries(listed)]
    return _choices("work", [(work, author) for author, all_of_them in by for work in all_of_them.split(", ")])


def _entries(listed: str) -> list[str]:
    return listed.replace("\n", " ").split(";")


def _choices(column: str, pairs: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Each answer among three others that stand in the list, drawn by what is asked about."""
    kinds = sorted({answer for _, answer in pairs})
    rows = []
    for asked, answer in pairs:
        draw = random.Random(asked)
        choices = [answer, *draw.sample([k for k in kinds if k != answer], 3)]
        draw.shuffle(choices)
        rows.append({column: asked, "choices": choices, "answer": choices.index(answer)})
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
