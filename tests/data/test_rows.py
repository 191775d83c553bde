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

from unlearn.data.files import read_placed, read_rows
from unlearn.errors import DataError
from unlearn.recipe.data import Between, Source

ROWS = [{"country": "Chad", "n": 1}, {"country": "Perú", "n": 2}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, name: str, *columns: str, **source: Any) -> list[dict[str, Any]]:
    return read_rows(Source(path=name, **source), folder, columns)


def fails(folder: Path, name: str, *columns: str, **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, name, *columns, **source)
    message = str(caught.value)
    assert name in message
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(ROWS, indent=2)),
        ("data.json", json.dumps({"version": 3, "data": ROWS})),
        ("tofu.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("rows.jsonl", "\n\n".join(json.dumps(row) for row in ROWS) + "\n"),
        ("windows.jsonl", "\r\n".join(json.dumps(row) for row in ROWS)),
        ("bom.jsonl", b"\xef\xbb\xbf" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()),
        ("UPPER.JSON", json.dumps(ROWS)),
    ],
)
def test_json_in_every_shape(tmp_path: Path, name: str, content: str | bytes) -> None:
    write(tmp_path, name, content)
    assert read(tmp_path, name) == ROWS


def test_one_json_object_is_one_row(tmp_path: Path) -> None:
    write(tmp_path, "one.json", '{"country": "Chad"}')
    assert read(tmp_path, "one.json") == [{"country": "Chad"}]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"t": "a\u2028b"}\n{"t": "c"}')
    assert read(tmp_path, "a.jsonl") == [{"t": "a\u2028b"}, {"t": "c"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    lines = [["q", "a"], ['"one, two; three"', "x"], ['"says ""hi""\nthere"', "y"], [""], ["last", "z"]]
    write(tmp_path, "a.csv", "\r\n".join(delimiter.join(line) for line in lines))
    rows = read_placed(Source(path="a.csv"), tmp_path)
    assert [dict(row.values) for row in rows] == [
        {"q": "one, two; three", "a": "x"},
        {"q": 'says "hi"\nthere', "a": "y"},
        {"q": "last", "a": "z"},
    ]
    assert [row.place for row in rows] == ["line 2", "line 3", "line 6"]


def test_csv_takes_a_cell_as_long_as_a_chapter(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "text\n" + "x" * 200_000)
    assert len(read(tmp_path, "a.csv")[0]["text"]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    rows = [{"q": "a", "choices": ["x", "y"], "answer": 1}, {"q": "b", "choices": ["z", "w"], "answer": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path, "a.parquet") == rows
    assert [row.place for row in read_placed(Source(path="a.parquet"), tmp_path)] == ["row 1", "row 2"]


def test_text_is_one_document(tmp_path: Path) -> None:
    write(tmp_path, "book.txt", "\ufeffChapter 1\r\n\r\n---\r\nIt was night.\n")
    assert read(tmp_path, "book.txt") == [{"text": "Chapter 1\n\n---\nIt was night.\n"}]


def test_an_absolute_path_ignores_the_base(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}')
    assert read(tmp_path / "elsewhere", str(path)) == [{"a": 1}]


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "capitals.jsonl", "{}")
    message = fails(tmp_path, "capitols.jsonl")
    assert "no such file" in message
    assert "did you mean capitals.jsonl?" in message
    assert "did you mean" not in fails(tmp_path, "zzzz.csv")
    assert "folder does not exist" in fails(tmp_path, "nowhere/a.csv")


def test_folder_and_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert "this is a folder" in fails(tmp_path, "sub")
    write(tmp_path, "a.xml", "<a/>")
    assert ".json, .jsonl, .csv, .parquet, .txt" in fails(tmp_path, "a.xml")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', "line 3, column 7: broken JSON: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "line 2: expected an object like {...}, found a list"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: broken JSON: Expecting ':' delimiter"),
        ("a.json", '{"a": 1}\n{"a": 2\n', "line 2, column 8: broken JSON"),
        ("a.json", '[{"a": 1}, "b"]', "row 2: expected an object like {...}, found a string"),
        ("a.json", "[" * 100_000, "line 1, column 1: broken JSON: nested too deeply"),
        ("a.jsonl", '{"a": 1}\n' + '{"a":' * 100_000, "line 2, column 1: broken JSON: nested too deeply"),
        ("a.jsonl", '{"a": ' + "9" * 100_000 + "}", "line 1, column 1: broken JSON: a number has too many digits"),
        ("a.json", "\x00", "line 1, column 1: broken JSON"),
        ("a.json", "null", "row 1: expected an object like {...}, found null"),
        ("a.json", "[]", "no rows"),
        ("a.json", '{"data": []}', "no rows"),
        ("a.csv", "q,a\nx,y\nx\n", "line 3: 1 cells, but the header has 2 columns"),
        ("a.csv", 'q,a\nx,"y\n', "line 2: broken CSV"),
        ("a.csv", "q,q\nx,y\n", "line 1: the header names q more than once"),
        ("a.csv", "q,,b\nx,y,z\n", "line 1: column 2 of the header has no name"),
        ("a.csv", "q,a\n", "no rows"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.json", '{"a": ' + "9" * 100_000 + "}", "broken JSON: a number has too many digits"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read: "),
        ("a.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "not a readable Parquet file"),
        ("a.csv", b"\x80\x81", "not UTF-8 at byte"),
        ("a.parquet", b"", "the file is empty"),
        ("a.txt", b"ab\ncaf\xe9\n", "line 2: not UTF-8 at byte 6 (0xe9)"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9\n", "not UTF-8 at byte 6 (0xe9)"),
        ("a.csv", "q\nx".encode("utf-16"), "not UTF-8 but UTF-16"),
        ("a.txt", b"", "the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", "the file is empty"),
        ("a.txt", b" \n\t\n", "the file is empty"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    write(tmp_path, name, content)
    message = fails(tmp_path, name)
    assert expected in message
    assert message.isprintable()


def test_empty_parquet_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "no rows" in fails(tmp_path, "a.parquet")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens but cannot be read")
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mem.txt").symlink_to("/proc/self/mem")
    assert "cannot be read: Input/output error" in fails(tmp_path, "mem.txt")


def test_missing_columns_list_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"country": "Chad", "capital": "N\'Djamena"}')
    message = fails(tmp_path, "a.jsonl", "country", "capitol", "zz")
    assert "no column 'capitol', 'zz'; the columns are country, capital (did you mean capital?)" in message
    assert "`columns`" in message
    assert read(tmp_path, "a.jsonl", "country", "capital")


def test_a_column_missing_in_one_row_names_the_row(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"a": 1, "b": 2}\n{"a": 1}')
    assert "line 2: this row has no 'b', but others do" in fails(tmp_path, "a.jsonl", "a", "b")
    assert len(read(tmp_path, "a.jsonl", "a")) == 2


def test_where(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "\n".join(json.dumps({"c": c, "n": n}) for n, c in enumerate("abcab")))
    assert [row["n"] for row in read(tmp_path, "a.jsonl", where={"c": "a"})] == [0, 3]
    assert [row["n"] for row in read(tmp_path, "a.jsonl", where={"c": ("a", "b"), "n": (3, 4, 9)})] == [3, 4]
    rows = read_placed(Source(path="a.jsonl", where={"c": "b"}), tmp_path)
    assert [row.place for row in rows] == ["line 2", "line 5"]


def test_where_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"c": "Asia"}\n{"c": "Africa"}\n{"c": "Asia"}')
    assert "no row where c is 'Asai'; the values there are 'Asia', 'Africa'" in fails(
        tmp_path, "a.jsonl", where={"c": "Asai"}
    )
    message = fails(tmp_path, "a.jsonl", where={"continent": "Asia"})
    assert "'where' names the column 'continent'; the columns are c" in message


def test_where_lists_only_some_of_many_values(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "n\n" + "\n".join(str(n) for n in range(100)))
    message = fails(tmp_path, "a.csv", where={"n": 1000})
    assert "'19' and 80 more" in message
    assert "'20'" not in message


def test_where_keeps_types_apart_but_reads_text_cells(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"v": 1}\n{"v": true}\n{"v": "1"}\n{"v": null}\n{"v": "x"}')
    assert read(tmp_path, "a.jsonl", where={"v": True}) == [{"v": True}]
    assert read(tmp_path, "a.jsonl", where={"v": 1}) == [{"v": 1}, {"v": "1"}]
    write(tmp_path, "a.csv", "y,t\n1990,TRUE\n1991.0,false\n,\n")
    assert read(tmp_path, "a.csv", where={"y": 1990}) == [{"y": "1990", "t": "TRUE"}]
    assert read(tmp_path, "a.csv", where={"y": 1991, "t": False}) == [{"y": "1991.0", "t": "false"}]


def test_hub_keys_on_a_file(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"a": 1}')
    assert "'split' is for hub data sets" in fails(tmp_path, "a.jsonl", split="train")


def test_a_malformed_hub_name(tmp_path: Path) -> None:
    assert "hub:OWNER/NAME" in fails(tmp_path, "hub:../data/a.jsonl")


def run_offline(folder: Path, code: str) -> str:
    """Run Python with the hub switched off, which the libraries read once when they are imported."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_hub_out_of_reach_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        ""
        "from unlearn.errors import DataError\n"
        "from unlearn.recipe.data import Source\nfrom unlearn.data.files import read_rows\n"
        "try: read_rows(Source(path='hub:nobody/nothing', config='forget10'), Path('.'))\n"
        "except DataError as error: print(error)"
    )
    message = run_offline(tmp_path, code)
    assert message.startswith(
        "hub:nobody/nothing (config forget10, split train, revision newest): it is not on this machine, and going "
        "online is forbidden"
    )
    assert "`path`" in message


def test_hub_rows_come_through_datasets(tmp_path: Path) -> None:
    # datasets takes a folder OWNER/NAME under the current one before it asks the hub: the same call, without a network.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name", "train.jsonl", '{"q": "x", "n": 1}\n{"q": "y", "n": 2}\n')
    code = (
        "from pathlib import Path\n"
        "from unlearn.recipe.data import Source\nfrom unlearn.data.files import read_placed\n"
        "print(read_placed(Source(path='hub:owner/name', where={'n': 2}), Path('.')))"
    )
    assert "[Row(place='row 2', values={'q': 'y', 'n': 2})]" in run_offline(tmp_path, code)
    code = code.replace("where={'n': 2}", "where={'n': Between(above=1), 'q': 'y'}")
    code = "from unlearn.recipe.data import Between\n" + code
    assert "[Row(place='row 2', values={'q': 'y', 'n': 2})]" in run_offline(tmp_path, code)
    none = code.replace("above=1", "above=5").replace("print(", "try: print(") + "\nexcept Exception as e: print(e)"
    assert "no row where n is above 5; the values there are 1, 2" in run_offline(tmp_path, none)


def test_reading_files_imports_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"a": 1}')
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from unlearn.recipe.data import Source\nfrom unlearn.data.files import read_rows\n"
        "print(read_rows(Source(path='a.jsonl'), Path('.')))\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert run_offline(tmp_path, code) == "[{'a': 1}]\n[]\n"


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@given(st.lists(st.fixed_dictionaries({"a": cells, "b": cells, "c": st.integers()}), min_size=1, max_size=5))
def test_any_rows_survive_json_and_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    write(folder, "a.json", json.dumps(rows, ensure_ascii=False))
    write(folder, "b.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read(folder, "a.json") == rows == read(folder, "b.json")


def test_rows_are_a_range_of_the_file_before_where(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "\n".join(json.dumps({"n": n, "c": "ab"[n % 2]}) for n in range(6)))
    assert [row["n"] for row in read(tmp_path, "a.jsonl", rows=(1, 4))] == [1, 2, 3]
    assert [row["n"] for row in read(tmp_path, "a.jsonl", rows=(1, 4), where={"c": "b"})] == [1, 3]
    assert [row.place for row in read_placed(Source(path="a.jsonl", rows=(4, 6)), tmp_path)] == ["line 5", "line 6"]
    assert "it has 6 rows, so rows [4, 7] goes beyond its end" in fails(tmp_path, "a.jsonl", rows=(4, 7))
    with pytest.raises(ValueError, match="has no row in it"):
        Source(path="a.jsonl", rows=(4, 4))


def test_where_compares_numbers(tmp_path: Path) -> None:
    values = [0.1, 0.8, 0.81, 1, "0.9", "high", None, True]
    write(tmp_path, "a.jsonl", "\n".join(json.dumps({"t": value}) for value in values))
    assert [row["t"] for row in read(tmp_path, "a.jsonl", where={"t": Between(above=0.8)})] == [0.81, 1, "0.9"]
    assert [row["t"] for row in read(tmp_path, "a.jsonl", where={"t": Between(below=0.8)})] == [0.1]
    assert [row["t"] for row in read(tmp_path, "a.jsonl", where={"t": Between(above=0.1, below=0.9)})] == [0.8, 0.81]
    assert "no row where t is above 2 and below 3" in fails(tmp_path, "a.jsonl", where={"t": Between(above=2, below=3)})
    with pytest.raises(ValueError, match="give above, below or both"):
        Between()
