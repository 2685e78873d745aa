"""Peak memory and speed of `amd-mx quantize` on checkpoints of gigabytes, measured in a process of its own.

    python -m bench.quantize_checkpoint --json
    python -m bench.quantize_checkpoint --layout fused --gigabytes 4 --scheme mxfp8

The bound to keep is 3 x the largest tensor + 1 GiB. Peak memory is `ru_maxrss` of the process, which includes Python
and torch themselves; `idle` is the same of `amd-mx inspect`, which reads no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from sglang_amd_quant.checkpoints.plan import Output
from sglang_amd_quant.checkpoints.shards import Shard, ShardWriter, plan_shards, write_index
from sglang_amd_quant.cli.arguments import above_zero
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.schemes import SCHEMES

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
EXPERTS, EXPERT_INTERMEDIATE, EXPERT_HIDDEN = 32, 2880, 2880
SHARD_BYTES = 2 * 10**9


def dense(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama-3-8B layer."""
    stem = f"model.layers.{layer}"
    for name, shape in {"q": (HIDDEN, HIDDEN), "k": (1024, HIDDEN), "v": (1024, HIDDEN), "o": (HIDDEN, HIDDEN)}.items():
        yield f"{stem}.self_attn.{name}_proj.weight", shape
    yield f"{stem}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
    yield f"{stem}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
    yield f"{stem}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)


def fused(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the experts of a gpt-oss-20b layer, as transformers saves them in bf16: [E, K, N]."""
    stem = f"model.layers.{layer}.mlp.experts"
    yield f"{stem}.gate_up_proj", (EXPERTS, EXPERT_HIDDEN, 2 * EXPERT_INTERMEDIATE)
    yield f"{stem}.down_proj", (EXPERTS, EXPERT_INTERMEDIATE, EXPERT_HIDDEN)


LAYOUTS = {"dense": (dense, "llama"), "fused": (fused, "gpt_oss")}


def make_source(folder: Path, layout: str, nbytes: int) -> list[Output]:
    """Write a bf16 checkpoint of at least `nbytes` (random numbers, repeated every 32 MB)."""
    layer_of, model_type = LAYOUTS[layout]
    outputs = [Output("model.embed_tokens.weight", torch.bfloat16, (VOCABULARY, HIDDEN))] if layout == "dense" else []
    layer = 0
    while sum(output.nbytes for output in outputs) < nbytes:
        outputs += [Output(name, torch.bfloat16, shape) for name, shape in layer_of(layer)]
        layer += 1
    noise = (torch.randn(16 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards = plan_shards(((output,) for output in outputs), SHARD_BYTES)
    for shard in tqdm(shards, desc="source", unit="shard"):
        _write(folder, shard, {o.name: o.nbytes for o in outputs}, noise)
    write_index(folder, shards)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return outputs


def _write(folder: Path, shard: Shard, sizes: dict[str, int], noise: torch.Tensor) -> None:
    with ShardWriter(folder, shard) as writer:
        for name in shard.starts:
            for first in range(0, sizes[name], noise.nbytes):
                writer.write(name, noise[: (sizes[name] - first) // noise.itemsize], first)


def child(*args: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of `amd-mx ...` in a process of its own.

    Raises:
        UnsupportedError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "sglang_amd_quant.cli.main", *args], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UnsupportedError(f"amd-mx {' '.join(args)}", f"exit code {process.returncode}", "see what it said above")
    return seconds, usage.ru_maxrss * 1024


def measure(folder: Path, layout: str, gigabytes: float, scheme: str) -> dict[str, object]:
    source, target = folder / "source", folder / "target"
    source.mkdir()
    outputs = make_source(source, layout, int(gigabytes * 1e9))
    largest, total = max(o.nbytes for o in outputs), sum(o.nbytes for o in outputs)
    _, idle = child("inspect", str(source))
    seconds, peak = child("quantize", str(source), str(target), "--scheme", scheme)
    bound = 3 * largest + (1 << 30)
    return {
        "layout": layout,
        "scheme": scheme,
        "source_bytes": total,
        "largest_tensor_bytes": largest,
        "seconds": round(seconds, 2),
        "mb_per_s": round(total / 1e6 / seconds, 1),
        "threads": torch.get_num_threads(),
        "idle_bytes": idle,
        "peak_bytes": peak,
        "bound_bytes": bound,
        "within_bound": peak <= bound,
        "measured": f"torch {torch.__version__}, {os.cpu_count()} cores",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--gigabytes", type=above_zero, default=4.0, help="size of the bf16 source (default: 4)")
    parser.add_argument("--scheme", default="mxfp4", choices=list(SCHEMES))
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for layout in args.layout:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(Path(folder), layout, args.gigabytes, args.scheme))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"{'layout':8} {'scheme':8} {'GB':>6} {'s':>7} {'MB/s':>7} {'idle MB':>8} {'peak MB':>8} {'bound MB':>9}")
        for r in results:
            sizes = [r[key] / 1e6 for key in ("idle_bytes", "peak_bytes", "bound_bytes")]  # type: ignore[operator]
            gb = r["source_bytes"] / 1e9  # type: ignore[operator]
            print(
                f"{r['layout']:8} {r['scheme']:8} {gb:6.2f} {r['seconds']:7} {r['mb_per_s']:7}"
                f" {sizes[0]:8.0f} {sizes[1]:8.0f} {sizes[2]:9.0f}"
            )
    return 0 if all(r["within_bound"] for r in results) else 1


if __name__ == "__main__":
    sys.exit(exit_code("bench.quantize_checkpoint", main))
