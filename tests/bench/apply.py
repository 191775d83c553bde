"""Putting a vector on a checkpoint from disk to disk: time and memory beside a plain copy, mergekit and PEFT.

    python tests/bench/apply.py scale [--size 20] [--work DIR] [--json FILE]
    python tests/bench/apply.py peers --model phi15 [--mergekit PYTHON] [--work DIR] [--json FILE]

``scale`` writes a checkpoint of random bfloat16 weights in the shape of a Llama, in files of 5 GB, with a rank-16
vector on all linear layers; then copies it (``cp`` and ``sync``; and ``dd`` past the page cache, which is what the disk
gives), applies the vector and checks the result. It needs room for two checkpoints: the copies are removed first.

``peers`` does the same edit of one model (see make_phi15.py) four ways: this program, PEFT's ``merge_and_unload`` with
``save_pretrained``, mergekit's task arithmetic on base and adapter, and a plain copy. Beside time and memory it
compares the weights with a reference in float64 that is rounded once, on 256 rows of every edited weight.

Every way is a process of its own. Before each, the files it reads are taken out of the page cache as far as the system
lets one (``--warm``: they are read once instead). Peak memory is the process's own (``ru_maxrss``), which leaves out
the page cache: what ``cp`` and the others read and write passes through that and pushes other files out of it, what
this program writes does not. Processor seconds tell how much of the time was work, should others be at work
too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from unlearn.vector.task_vector import TaskVector

# No torch at import: Linux counts a parent's memory into its child's peak.

COEFFICIENT = "0.75"
RANK = 16
ROWS = 256  # of every edited weight that are compared
SHARD = "5GB"
POOL = 2**24  # random numbers that a synthetic checkpoint is made of
console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


@dataclass(frozen=True, slots=True)
class Ran:
    """A finished way of doing it: seconds, processor seconds, bytes of memory at most, and bytes of weights."""

    name: str
    seconds: float
    processor: float
    peak: int
    size: int
    remarks: str = ""


def main() -> None:
    """Parse and run one of the two, or one of the parts that need torch."""
    if len(sys.argv) > 1 and sys.argv[1] in PARTS:
        PARTS[sys.argv[1]](*sys.argv[2:])
        return
    options = _options()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.work, prefix="bench-apply-"))
    try:
        ran = _scale(options, work) if options.what == "scale" else _peers(options, work)
    except subprocess.CalledProcessError as e:
        print(f"{' '.join(map(str, e.cmd[:4]))} ended with code {e.returncode}:\n{e.stderr}", file=sys.stderr)
        sys.exit(2)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _show(ran)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"what": options.what, "load": os.getloadavg(), "cores": os.cpu_count(), "ran": list(map(asdict, ran))}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _scale(options: argparse.Namespace, work: Path) -> list[Ran]:
    base, vector, out = work / "base", work / "vector.safetensors", work / "out"
    console.print(f"writing {options.size:g} GB of weights")
    _part("make", str(options.size), str(base), str(vector))
    size = _bytes(base)
    copies = _copies(base, out, size, options)
    command = [sys.executable, "-m", "unlearn", "apply", str(vector), "--model", str(base), "--out", str(out)]
    command += ["--coefficient", COEFFICIENT]
    applied = _timed("apply", command, [base, vector], size, options)
    checked = _timed("apply --check", [*command, "--check"], [base, out, vector], size, options)
    return [*copies, applied, checked]


def _peers(options: argparse.Namespace, work: Path) -> list[Ran]:
    base = options.model.resolve()
    vector, adapter, negated = work / "vector.safetensors", work / "adapter", work / "negated"
    _part("vector", str(base), str(vector), str(adapter), str(negated), COEFFICIENT)
    size, out = _bytes(base), work / "out"
    ran = _copies(base, out, size, options)

    def one(name: str, command: Sequence[str], reads: Sequence[Path]) -> None:
        found = _timed(name, command, reads, size, options)
        wrong = _part("compare", str(base), str(vector), COEFFICIENT, str(out))
        ran.append(Ran(found.name, found.seconds, found.processor, found.peak, size, wrong))
        shutil.rmtree(out)

    ours = [sys.executable, "-m", "unlearn", "apply", str(vector), "--model", str(base), "--out", str(out)]
    one("apply", [*ours, "--coefficient", COEFFICIENT], [base, vector])
    one("PEFT", [sys.executable, __file__, "peft", str(base), str(negated), str(out)], [base, negated])
    if options.mergekit:
        config = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": -float(COEFFICIENT)}}],
            "parameters": {"normalize": False},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        (work / "mergekit.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        command = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(work / "mergekit.yaml"), str(out)]
        command += ["--quiet", "--lora-merge-cache", str(work / "loras")]
        one("mergekit", command, [base, adapter])
    return ran


def _copies(base: Path, out: Path, size: int, options: argparse.Namespace) -> list[Ran]:
    """A plain copy brought to disk, and one past the page cache where there is such a thing."""
    out.mkdir()
    files = [str(p) for p in sorted(base.glob("*.safetensors"))]
    ran = [_timed("cp, sync", ["sh", "-c", 'out=$1; shift; cp "$@" "$out" && sync "$out"/*', "", str(out), *files],
                  [base], size, options)]  # fmt: skip
    shutil.rmtree(out)
    out.mkdir()
    options_of_dd = "bs=8M iflag=direct oflag=direct conv=fsync"
    direct = f'out=$1; shift; for f; do dd if="$f" of="$out/${{f##*/}}" {options_of_dd} || exit; done'
    try:
        ran.append(_timed("dd, direct", ["sh", "-c", direct, "", str(out), *files], [base], size, options))
    except subprocess.CalledProcessError:
        console.print("no direct copy on this system")
    shutil.rmtree(out)
    return ran


def _timed(name: str, command: Sequence[str], reads: Sequence[Path], size: int, options: argparse.Namespace) -> Ran:
    """Run a command on cold files, or on warm ones."""
    os.sync()
    for path in (p for place in reads for p in ([place] if place.is_file() else sorted(place.rglob("*")))):
        if path.is_file():
            _cool(path, options.warm)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=settings, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(command), stderr=said.read()[-2000:])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(f"{name}: {seconds:.1f} s")
    return Ran(name, seconds, usage.ru_utime + usage.ru_stime, peak, size)


def _cool(path: Path, warm: bool) -> None:
    """Take a file out of the page cache, or into it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while warm and os.read(fd, 2**23):
            pass
    finally:
        os.close(fd)


def _part(*arguments: str) -> str:
    """What a part in a process of its own prints last."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def _show(ran: Sequence[Ran]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for heading in ("", "seconds", "MB/s", "of cp", "processor s", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_column("beside float64, rounded once")
    for r in ran:
        ratio = f"{r.seconds / ran[0].seconds:.2f}x"
        speed, peak = f"{r.size / 1e6 / r.seconds:,.0f}", f"{r.peak / 1e6:,.0f}"
        table.add_row(r.name, f"{r.seconds:.1f}", speed, ratio, f"{r.processor:.1f}", peak, r.remarks)
    console.print(table)
    console.print(
        f"{ran[0].size / 1e9:.1f} GB of weights, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways: Any = parser.add_subparsers(dest="what", required=True)
    scale = ways.add_parser("scale", help="a large synthetic checkpoint beside a plain copy")
    scale.add_argument("--size", type=float, default=20.0, metavar="GB", help="of the weights (default: 20)")
    peers = ways.add_parser("peers", help="one model beside mergekit and PEFT")
    peers.add_argument("--model", type=Path, required=True, help="a model's folder, in bfloat16")
    peers.add_argument("--mergekit", metavar="PYTHON", help="a python that has mergekit; without it, no mergekit")
    for way in (scale, peers):
        way.add_argument("--work", type=Path, help="where files may be written (default: the temporary folder)")
        way.add_argument("--warm", action="store_true", help="with the files that are read in the page cache")
        way.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


# -- parts that need torch, each a process of its own ------------------------------------------------------------------


def _make(gigabytes: str, folder: str, vector: str) -> None:
    """A checkpoint of about so many GB in the shape of a Llama, and its vector."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from unlearn.vector.write import save_shards

    size, base = float(gigabytes), Path(folder)
    width, inner, heads = (5120, 13824, 40) if size >= 8 else (2048, 5632, 16)
    layer = 2 * (4 * width * width + 3 * width * inner)
    outer = 2 * 2 * 32000 * width
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=max(1, round((size * 1e9 - outer) / layer)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    base.mkdir()
    config.save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    later = dict(model.named_parameters())
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def value(name: str) -> torch.Tensor:
        count = later[name].numel()
        return pool.roll(zlib.crc32(name.encode()) % POOL).repeat(-(-count // POOL))[:count].view(later[name].shape)

    save_shards(later, value, base, SHARD)
    _random_vector(base).save(Path(vector))


def _random_vector(base: Path) -> TaskVector:
    """Random factors on all linear layers but the head, large enough for bfloat16 to keep most of it."""
    import torch

    from unlearn.model.checkpoint import read_checkpoint
    from unlearn.model.load import architecture_of
    from unlearn.vector.change import LowRank
    from unlearn.vector.task_vector import TaskVector

    layout, stored = architecture_of(base), read_checkpoint(base).tensors
    g = torch.Generator().manual_seed(1)
    modules = {}
    for name, transposed in layout.linear.items():
        if name in stored and not name.startswith("lm_head"):
            rows, columns = stored[name].shape[:: -1 if transposed else 1]
            a, b = torch.randn(RANK, columns, generator=g), torch.randn(rows, RANK, generator=g)
            modules[name.removesuffix(".weight")] = LowRank(a, b * 1e-3)
    return TaskVector(modules)


def _vector(base: str, place: str, adapter: str, negated: str, coefficient: str) -> None:
    """A vector, the same as PEFT's adapter, and the adapter of minus ``coefficient`` times it."""
    from unlearn.vector.interop import to_adapter

    made = _random_vector(Path(base))
    made.save(Path(place))
    to_adapter(made, Path(adapter), base)
    to_adapter(-float(coefficient) * made, Path(negated), base)


def _peft(base: str, adapter: str, out: str) -> None:
    """PEFT's way."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _compare(base: str, place: str, coefficient: str, out: str) -> None:
    """Print how far edited weights are from the exact ones rounded once, and whether the others are as they were."""
    import torch
    from safetensors import safe_open

    from unlearn.model.checkpoint import read_checkpoint
    from unlearn.vector.task_vector import TaskVector

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    made, old, new = TaskVector.load(Path(place)), read_checkpoint(Path(base)), read_checkpoint(Path(out))
    differ = total = 0
    largest = 0.0
    untouched = True
    for name in old.tensors:
        before, after = (read(c.files[c.tensors[name].file], name) for c in (old, new))
        change: Any = made.modules.get(name.removesuffix(".weight"))
        if change is None:
            untouched &= torch.equal(before.view(torch.int16), after.view(torch.int16))
            continue
        exact = before[:ROWS].double() - float(coefficient) * (change.B[:ROWS].double() @ change.A.double())
        wanted = _rounded_once(exact)
        largest = max(largest, float((after[:ROWS].double() - wanted.double()).abs().max()))
        differ += int((after[:ROWS] != wanted).sum())
        total += wanted.numel()
    rest = "the rest untouched" if untouched else "other weights changed"
    print(f"{differ / total:.3%} of elements differ, by {largest:.2g} at most; {rest}")


def _rounded_once(exact: torch.Tensor) -> torch.Tensor:
    """float64 to the nearest bfloat16. A cast goes through float32, which rounds twice."""
    import torch

    best = near = exact.to(torch.bfloat16)
    gap = (near.double() - exact).abs()
    for step in (-1, 1):
        other = (near.view(torch.int16) + step).view(torch.bfloat16)
        closer = (other.double() - exact).abs() < gap
        best = torch.where(closer, other, best)
        gap = torch.where(closer, (other.double() - exact).abs(), gap)
    return best


PARTS: dict[str, Callable[..., None]] = {"make": _make, "vector": _vector, "peft": _peft, "compare": _compare}

if __name__ == "__main__":
    main()
