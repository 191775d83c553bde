"""Reading files and hub data sets: every format, and every mistake with its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.data.files import read_placed
from unlearn.errors import DataError
from unlearn.recipe.data import Between, Source

ROWS = [{"country": "Chad", "n": 1}, {"country": "Perú", "n": 2}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def read(folder: Path, name: str, *columns: str, **source: Any) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read_placed(Source(path=name, **source), folder, columns)]


def places(folder: Path, name: str, **source: Any) -> list[str]:
    return [row.place for row in read_placed(Source(path=name, **source), folder)]


def fails(folder: Path, name: str, *columns: str, **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, name, *columns, **source)
    assert name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("list.json", json.dumps(ROWS, indent=2), ROWS),
        ("data.json", json.dumps({"version": 3, "data": ROWS}), ROWS),
        ("tofu.json", lines(*ROWS), ROWS),
        ("one.json", '{"country": "Chad"}', [{"country": "Chad"}]),
        ("rows.jsonl", lines(ROWS[0]) + "\n\n" + lines(ROWS[1]) + "\n", ROWS),
        ("windows.jsonl", lines(*ROWS).replace("\n", "\r\n"), ROWS),
        ("bom.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).encode(), ROWS),
        ("UPPER.JSON", json.dumps(ROWS), ROWS),
        ("separator.jsonl", '{"t": "a\u2028b"}\n{"t": "c"}', [{"t": "a\u2028b"}, {"t": "c"}]),
        ("chapter.csv", "text\n" + "x" * 200_000, [{"text": "x" * 200_000}]),
        ("book.txt", "\ufeffChapter 1\r\n\r\n---\r\nNight.\n", [{"text": "Chapter 1\n\n---\nNight.\n"}]),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str | bytes, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path, name, content)
    assert read(tmp_path, name) == rows == read(tmp_path / "elsewhere", str(path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    cells = [["q", "a"], ['"one, two; three"', "x"], ['"says ""hi""\nthere"', "y"], [""], ["last", "z"]]
    write(tmp_path, "a.csv", "\r\n".join(delimiter.join(line) for line in cells))
    expected = [("one, two; three", "x"), ('says "hi"\nthere', "y"), ("last", "z")]
    assert read(tmp_path, "a.csv") == [{"q": q, "a": a} for q, a in expected]
    assert places(tmp_path, "a.csv") == ["line 2", "line 3", "line 6"]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"q": "a", "choices": ["x", "y"], "answer": 1}, {"q": "b", "choices": ["z", "w"], "answer": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path, "a.parquet") == rows
    assert places(tmp_path, "a.parquet") == ["row 1", "row 2"]
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert "no rows" in fails(tmp_path, "empty.parquet")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "capitals.jsonl", '{"a": 1}')
    assert "no such file; did you mean 'capitals.jsonl'?" in fails(tmp_path, "capitols.jsonl")
    for name in ("zzzz.csv", "nowhere/a.csv"):
        assert fails(tmp_path, name).endswith("no such file")
    (tmp_path / "sub").mkdir()
    assert "this is a folder" in fails(tmp_path, "sub")
    assert "'split' is for hub data sets" in fails(tmp_path, "capitals.jsonl", split="train")
    assert "hub:OWNER/NAME" in fails(tmp_path, "hub:../data/a.jsonl")
    if Path("/proc/self/mem").exists():  # a file that opens but cannot be read
        (tmp_path / "mem.txt").symlink_to("/proc/self/mem")
        assert "cannot be read: Input/output error" in fails(tmp_path, "mem.txt")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.xml", "<a/>", ".json, .jsonl, .csv, .parquet, .txt"),
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "line 3, column 7: broken JSON: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "line 2: expected an object like {...}, found [2]"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: broken JSON: Expecting ':' delimiter"),
        ("a.json", '{"a": 1}\n{"a": 2\n', "line 2, column 8: broken JSON"),
        ("a.json", '[{"a": 1}, "b"]', 'row 2: expected an object like {...}, found "b"'),
        ("a.json", "[" * 100_000, "line 1, column 1: broken JSON: nested too deeply"),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, "line 2, column 1: broken JSON: nested too deeply"),
        ("a.jsonl", '{"a": ' + "9" * 100_000 + "}", "line 1, column 1: broken JSON: a number has too many digits"),
        ("a.json", "\x00", "line 1, column 1: broken JSON"),
        ("a.json", "null", "row 1: expected an object like {...}, found null"),
        ("a.json", '{"data": []}', "no rows"),
        ("a.csv", "q,a\nx,y\nx\n", "line 3: 1 cells, but the header has 2 columns"),
        ("a.csv", 'q,a\nx,"y\n', "line 2: broken CSV"),
        ("a.csv", "q,q\nx,y\n", "line 1: the header needs names, each once: q, q"),
        ("a.csv", "q,,b\nx,y,z\n", "line 1: the header needs names, each once: q, , b"),
        ("a.csv", "q,a\n", "no rows"),
        ("a.csv", b"\x80\x81", "not UTF-8 at byte"),
        ("a.csv", "q\nx".encode("utf-16"), "not UTF-8 but UTF-16"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read: "),
        ("a.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.txt", b"ab\ncaf\xe9\n", "line 2: not UTF-8 at byte 6 (0xe9)"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9\n", "not UTF-8 at byte 6 (0xe9)"),
        ("a.txt", b" \n\t\n", "the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "the file is empty"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    write(tmp_path, name, content)
    message = fails(tmp_path, name)
    assert expected in message
    assert message.isprintable()


def test_missing_columns(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", lines({"country": "Chad", "capital": "N'Djamena"}, {"country": "Peru"}))
    message = fails(tmp_path, "a.jsonl", "country", "capitol", "zz")
    assert "no column 'capitol', 'zz'; the columns are country, capital; did you mean 'capital'?" in message
    assert "`columns`" in message
    assert "line 2: this row has no 'capital', but others do" in fails(tmp_path, "a.jsonl", "country", "capital")
    assert len(read(tmp_path, "a.jsonl", "country")) == 2


WHERE: list[tuple[list[Any], Any, list[Any]]] = [  # cells of a column, what is asked of it, and which remain
    (["a", "b", "c", "a"], "a", ["a", "a"]),
    (["a", "b", "c", "a"], ("a", "c", "d"), ["a", "c", "a"]),
    ([1, True, "1", None, "x"], True, [True]),
    ([1, True, "1", None, "x"], 1, [1, "1"]),
    (["1990", "1991.0", ""], 1991, ["1991.0"]),
    (["TRUE", "false"], False, ["false"]),
    ([0.1, 0.8, 0.81, 1, "0.9", "high", None, True], Between(above=0.8), [0.81, 1, "0.9"]),
    ([0.1, 0.8, 0.81, 1, "0.9", "high", None, True], Between(below=0.8), [0.1]),
    ([0.1, 0.8, 0.81, 1, "0.9", "high", None, True], Between(above=0.1, below=0.9), [0.8, 0.81]),
]


@pytest.mark.parametrize(("cells", "wanted", "found"), WHERE, ids=range(len(WHERE)))
def test_where_keeps_types_apart_but_reads_text_cells(
    tmp_path: Path, cells: list[Any], wanted: Any, found: list[Any]
) -> None:
    write(tmp_path, "a.jsonl", lines(*({"v": cell} for cell in cells)))
    kept = [row["v"] for row in read(tmp_path, "a.jsonl", where={"v": wanted})]
    assert list(map(repr, kept)) == list(map(repr, found))


def test_where_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", lines({"c": "Asia", "n": 1}, {"c": "Africa", "n": 2}, {"c": "Asia", "n": 3}))
    assert places(tmp_path, "a.jsonl", where={"c": "Asia", "n": Between(above=1)}) == ["line 3"]
    for where, message in (
        ({"c": "Asai"}, "no row where c is 'Asai'; the values there are 'Asia', 'Africa'"),
        ({"c": "Asia", "n": 2}, "no row where n is 2; the values there are 1, 3"),
        ({"n": Between(above=3, below=9)}, "no row where n is above 3 and below 9; the values there are 1, 2, 3"),
        ({"continent": "Asia"}, "'where' names the column 'continent'; the columns are c, n"),
    ):
        assert message in fails(tmp_path, "a.jsonl", where=where)
    write(tmp_path, "many.csv", "n\n" + "\n".join(str(n) for n in range(100)))
    assert "'18', '19' and 80 more" in fails(tmp_path, "many.csv", where={"n": 1000})
    with pytest.raises(ValueError, match="give above, below or both"):
        Between()


def test_rows_are_a_range_of_the_file_before_where(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", lines(*({"n": n, "c": "ab"[n % 2]} for n in range(6))))
    assert [row["n"] for row in read(tmp_path, "a.jsonl", rows=(1, 4))] == [1, 2, 3]
    assert places(tmp_path, "a.jsonl", rows=(1, 4), where={"c": "b"}) == ["line 2", "line 4"]
    assert "it has 6 rows, so rows [4, 7] goes beyond its end" in fails(tmp_path, "a.jsonl", rows=(4, 7))
    with pytest.raises(ValueError, match="has no row in it"):
        Source(path="a.jsonl", rows=(4, 4))


def test_without_the_hub(tmp_path: Path) -> None:
    """In a process of its own: the libraries read once, when they are imported, whether the hub is switched off."""
    # datasets takes a folder OWNER/NAME under the current one before it asks the hub: the same call, without a network.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name", "train.jsonl", lines({"q": "x", "n": 1}, {"q": "y", "n": 2}))
    write(tmp_path, "a.jsonl", lines(*ROWS))
    code = """
import sys
from pathlib import Path
from unlearn.data.files import read_placed
from unlearn.errors import DataError
from unlearn.recipe.data import Source
print(len(read_placed(Source(path="a.jsonl"), Path())))
print([name for name in ("torch", "transformers", "datasets", "pyarrow") if name in sys.modules])
print(read_placed(Source(path="hub:owner/name", where={"n": 2}), Path()))
try:
    read_placed(Source(path="hub:nobody/nothing", config="forget10"), Path())
except DataError as error:
    print(error)
"""
    place = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment = {**os.environ, **place}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    count, heavy, rows, message = done.stdout.splitlines()
    assert (count, heavy) == ("2", "[]")
    assert rows == "[Row(place='row 2', values={'q': 'y', 'n': 2})]"
    assert message.startswith(
        "hub:nobody/nothing (config forget10, split train, revision newest): it is not on this machine, and going "
        "online is forbidden"
    )
    assert "`path`" in message


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@given(st.lists(st.fixed_dictionaries({"a": cells, "b": cells, "c": st.integers()}), min_size=1, max_size=5))
def test_any_rows_survive_json_and_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    write(folder, "a.json", json.dumps(rows, ensure_ascii=False))
    write(folder, "b.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read(folder, "a.json") == rows == read(folder, "b.json")
