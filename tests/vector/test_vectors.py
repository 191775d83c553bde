"""The command line of the algebra: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from vector_arena import Load, factors, files_up_to

from unlearn import cli
from unlearn.model.load import linear_modules
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.command import show_info
from unlearn.vector.interop import from_adapter, to_adapter
from unlearn.vector.task_vector import TaskVector, analogy

NAMES = tuple(f"model.layers.{layer}.{module}" for layer in range(6) for module in ("self_attn.q_proj", "mlp.fc1"))


def a_vector(seed: int, names: tuple[str, ...] = NAMES) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    modules = {name: factors(16, 12, 2, generator, 1.0 + i) for i, name in enumerate(names)}
    return TaskVector(modules, {"seed": str(seed)})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three vectors: a file, a file, an adapter's folder."""
    for seed, name in enumerate("ab"):
        a_vector(seed).save(tmp_path / f"{name}.safetensors")
    to_adapter(a_vector(2), tmp_path / "c", "owner/base")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c"


def run(*arguments: object) -> int:
    return cli.main(["vector", *map(str, arguments)])


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# --- what is written -------------------------------------------------------------------------------------------------


def test_arithmetic(files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a, b, c), out = files, tmp_path / "out"
    x, y, z = a_vector(0), a_vector(1), a_vector(2)
    commands: dict[tuple[object, ...], TaskVector] = {
        ("sum", a, b, c): x + y + z,
        ("sum", a): x,
        ("scale", -1, c): -z,
        ("scale", "-1e-3", a): -1e-3 * x,
        ("scale", 0.5, a): 0.5 * x,
        ("analogy", a, b, c): analogy(x, y, z),
        ("low-rank", a, "--rank", 1): x.to_low_rank(rank=1),
        ("low-rank", a, "--energy", 0.7): x.to_low_rank(energy=0.7),
        ("prune", a, "--keep", 0.25): x.prune(0.25),
        ("prune", a, "--keep", 0.25, "--by", "rows"): x.prune(0.25, by="rows"),
        ("from-adapter", c): z,
    }
    for command, wanted in commands.items():
        assert run(*command, "-o", out) == 0, capsys.readouterr().err
        read = TaskVector.load(out)
        assert read.digest() == wanted.digest(), command
        assert a.name in read.meta["made"] or c.name in read.meta["made"]
        assert str(tmp_path) not in "".join(read.meta.values())  # where it was made is nobody's business
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{out}: {len(NAMES)} modules, largest rank {read.rank()}" in printed.err
        out.unlink()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_result_may_take_the_place_of_what_it_was_made_from(files: tuple[Path, Path, Path]) -> None:
    """Read whole, then replaced: nothing is half written over."""
    a, b, _ = files
    assert run("sum", a, b, "-o", a) == 0
    assert TaskVector.load(a).digest() == (a_vector(0) + a_vector(1)).digest()


def test_to_adapter_and_back(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("adapter", "empty"):
        assert run("to-adapter", files[0], tmp_path / place, "--base", "owner/base") == 0
        assert from_adapter(tmp_path / place).digest() == a_vector(0).digest()
        assert from_adapter(tmp_path / place).meta["base"] == "owner/base"
        names = {p.name for p in (tmp_path / place).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_from_checkpoints(loaded: Load, pico_phi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(pico_phi, "bfloat16").model
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for module in linear_modules(model).values():
            module.get_parameter("weight").add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out"
    folders = ("from-checkpoints", tmp_path / "base", tmp_path / "tuned", "-o", out)
    assert run(*folders) == 0
    assert set(TaskVector.load(out).modules) == set(linear_modules(model))
    said = capsys.readouterr().err
    assert "left out as unchanged" in said
    assert "stored in 16 bits" in said
    assert run(*folders, "--rank", 1) == 0
    assert TaskVector.load(out).rank() == 1
    with torch.no_grad():
        model.model.final_layernorm.weight.mul_(2)
    model.save_pretrained(tmp_path / "tuned")
    capsys.readouterr()
    assert run(*folders, "--energy", 0.5) == 2
    assert "model.final_layernorm.weight" in capsys.readouterr().err
    assert run(*folders, "--skip-unequal", "--energy", 0.5) == 0
    said = capsys.readouterr().err
    assert "skipped (LayerNorm's weight, not a linear layer's weight): model.final_layernorm.weight" in said
    assert "norm of the skipped changes: 8" in said  # 64 ones became twos


# --- what is printed -------------------------------------------------------------------------------------------------


def test_info(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    x = a_vector(0)
    assert run("info", files[0]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    rows = lines(printed)
    assert ["modules", "12", "(12", "low-rank)"] in rows
    assert ["norm", f"{x.norm():.4g}"] in rows
    assert ["SHA-256", x.digest()] in rows
    assert ["meta", "seed", "0"] in rows
    norms = x.norms()
    largest = sorted(norms, key=lambda n: -norms[n])
    for name in largest[:10]:
        share = norms[name] ** 2 / x.norm() ** 2
        assert [name, "16", "x", "12", "2", f"{norms[name]:.4g}", f"{share:.1%}"] in rows
    assert largest[10] not in printed
    assert "and 2 modules of smaller norm (--all shows them)" in printed
    assert [row[0] for row in rows if row and row[0].startswith("model.")] == largest[:10]
    assert run("info", files[0], "--all") == 0
    assert largest[11] in capsys.readouterr().out


def test_info_of_a_dense_vector_and_of_an_adapter(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TaskVector({"a": Dense(torch.zeros(3, 4)), "b": LowRank(torch.zeros(1, 4), torch.zeros(3, 1))}).save(
        tmp_path / "zero"
    )
    assert run("info", tmp_path / "zero") == 0
    rows = lines(capsys.readouterr().out)
    assert ["modules", "2", "(1", "low-rank,", "1", "dense)"] in rows
    assert ["a", "3", "x", "4", "dense", "0", "0.0%"] in rows
    assert ["numbers", "stored", "19"] in rows
    assert run("info", files[2]) == 0
    assert ["meta", "base", "owner/base"] in lines(capsys.readouterr().out)


def test_cosine(files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = a_vector(0), a_vector(5, names=(*NAMES[3:], "another"))
    y = y + 0.5 * TaskVector({n: x.modules[n] for n in NAMES[3:]})
    y.save(tmp_path / "y")
    assert run("cosine", files[0], tmp_path / "y") == 0
    printed = capsys.readouterr().out
    rows = lines(printed)
    assert ["cosine", f"{x.cosine(y):+.4f}"] in rows
    assert "9 in both, 3 in the first only, 1 in the second only" in printed
    for name, value in x.cosines(y).items():
        assert [name, f"{value:+.4f}", f"{x.norms()[name]:.4g}", f"{y.norms()[name]:.4g}"] in rows
    assert run("cosine", files[0], files[0]) == 0
    assert ["cosine", "+1.0000"] in lines(capsys.readouterr().out)


def test_nothing_slow_before_it_is_needed_and_a_closed_pipe_is_no_mistake(files: tuple[Path, Path, Path]) -> None:
    program = [sys.executable, "-m", "unlearn", "vector"]
    helped = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    for command in ("info", "cosine", "sum", "scale", "analogy", "low-rank", "prune", "from-adapter", "to-adapter"):
        assert command in helped.stdout
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*program, "info", files[0]], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writer)
    assert done.stderr == ""  # no traceback; the exit code is rich's


# --- mistakes --------------------------------------------------------------------------------------------------------


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """One message on stderr, nothing on stdout, exit code 2."""
    capsys.readouterr()
    code = run(*arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert len(re.findall(r"^(?:error: |╭─ Error)", printed.err, re.MULTILINE)) == 1
    assert "Traceback" not in printed.err
    return printed.err


def test_mistakes_have_one_message(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (a, b, c), out = files, tmp_path / "out"
    TaskVector({NAMES[0]: Dense(torch.ones(12, 16))}).save(tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    for said, command in {
        "cannot be read as a task vector": ("info", tmp_path / "none"),
        "text: cannot be read": ("info", tmp_path / "text"),
        "no adapter of PEFT's": ("info", tmp_path),
        "vectors of different models cannot be compared": ("cosine", a, tmp_path / "other"),
        f"cannot be added: {NAMES[0]} (16, 12) and (12, 16)": ("sum", a, tmp_path / "other", "-o", out),
        "not finite in 12 modules": ("scale", "nan", a, "-o", out),
        "not finite": ("scale", "-inf", a, "-o", out),
        "rank 13 is above": ("low-rank", a, "--rank", 13, "-o", out),
        "rank must be at least 1": ("low-rank", a, "--rank", 0, "-o", out),
        "energy must be above 0": ("low-rank", a, "--energy", 0, "-o", out),
        "keep must be above 0 and at most 1, not -0.5": ("prune", a, "--keep", -0.5, "-o", out),
        "dense in 1 modules": ("to-adapter", tmp_path / "other", out, "--base", "x"),
        "exists and is not an empty folder": ("to-adapter", a, c, "--base", "x"),
        "is a folder: give -o the name of a file": ("sum", a, b, "-o", tmp_path),
        "out: cannot be written: there is no folder": ("sum", a, b, "-o", tmp_path / "no" / "out"),
        "no folder of a model": ("from-checkpoints", tmp_path, tmp_path, "-o", out),
        "Missing option '--out'": ("sum", a, b),
        "give either rank or energy": ("low-rank", a, "-o", out),
        "Invalid value for 'C'": ("scale", "two", a, "-o", out),
        "'columns'": ("prune", a, "--keep", 0.5, "--by", "columns", "-o", out),
    }.items():
        assert said in mistake(capsys, *command), command
        assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "c", "other", "text"]


def test_what_cannot_be_written_whole_leaves_no_trace(
    files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _ = files
    before = a.read_bytes()
    there = sorted(a.parent.iterdir())
    with files_up_to(2000):
        for command in (("sum", a, b, "-o", a), ("to-adapter", a, a.parent / "new", "--base", "x")):
            assert "File too large" in mistake(capsys, *command)
    assert a.read_bytes() == before
    assert sorted(a.parent.iterdir()) == there


def test_vectors_of_two_models_are_not_added_unless_that_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
    change = {"layer": Dense(torch.ones(2, 2))}
    for place, base in zip(places, ("a" * 64, "b" * 64, ""), strict=True):
        TaskVector(change, {"base": base} if base else {}).save(place)
    one, two, three = places
    said = mistake(capsys, "sum", one, two, "-o", tmp_path / "out")
    assert "fingerprint aaaaaaaaaaaa" in said
    assert "fingerprint bbbbbbbbbbbb" in said
    assert "--any-base" in said
    assert "of different models" in mistake(capsys, "analogy", three, one, two, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run("sum", one, two, "--any-base", "-o", tmp_path / "forced") == 0
    assert run("sum", one, three, "-o", tmp_path / "unsaid") == 0
    assert torch.equal(TaskVector.load(tmp_path / "forced").modules["layer"].delta(), torch.full((2, 2), 2.0))


def test_names_in_a_file_are_no_commands_to_the_terminal() -> None:
    evil = TaskVector({"\x1b[2Jm\n[red]x[/red]τ": Dense(torch.ones(1, 1))}, {"base": "\x1b]0;title\x07"})
    buffer = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_info(evil, Console(file=buffer, highlight=False, width=200), None)
    buffer.seek(0)
    text = buffer.read()
    assert "?[2Jm?[red]x[/red]?" in text
    assert "?]0;title?" in text
    assert "\x1b" not in text
