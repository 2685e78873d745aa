"""How fast weights are laid out: python -m bench.layouts [--device cuda] [--json]

Times pack and unpack of every layout over real weight matrices (bytes in, as they come from a checkpoint; odd ones need
padding). GB/s counts the bytes of the unpacked matrix once. Loading a model runs through this once, at start; the aim
is 0.1 GB/s on one CPU core (`--threads 1`, the default) and 1 GB/s on an H200.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_amd_quant.cli.arguments import whole
from sglang_amd_quant.layouts.base import Layout, SourceLayout
from sglang_amd_quant.layouts.registry import SCALES, SOURCES, VALUES

SHAPES: dict[str, tuple[int, int]] = {
    "gpt-oss gate_up TP1": (5760, 2880),
    "gpt-oss down TP4": (2880, 736),
    "DeepSeek-V3 o_proj TP8": (7168, 2048),
    "Qwen3-235B gate_up TP2": (1536, 4096),
}
"""Where a matrix comes from -> (N, K), in elements."""

AIM_GB_S = {"cpu": 0.1, "cuda": 1.0}


def matrices(layout: Layout, experts: int, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """For each shape that `layout` can hold, its bytes: those of e4m3 or of two nibbles, or its e8m0 scales."""
    for name, (n, k) in SHAPES.items():
        cols = k // 32 if layout.name in SCALES and layout.name != "strided" else k // 2
        if not layout.spec.pads and (n % layout.spec.tile_n or cols % layout.spec.tile_cols):
            continue
        generator = torch.Generator(device).manual_seed(0)
        yield name, torch.randint(0, 256, (experts, n, cols), dtype=torch.uint8, device=device, generator=generator)


def seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time of one run, after one that warms up. On a GPU a run ends when its kernels have."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(layout: Layout, experts: int, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each matrix; raises AssertionError if what was packed does not unpack to the same bits."""
    for name, matrix in matrices(layout, experts, device):
        n, cols = matrix.shape[-2:]
        storage = layout.pack(matrix)
        assert torch.equal(layout.unpack(storage, n, cols), matrix), f"{layout.name} loses bits of {name}"
        pack = seconds(lambda: layout.pack(matrix), device, repeats)  # noqa: B023 - called within this turn
        unpack = seconds(lambda: layout.unpack(storage, n, cols), device, repeats)  # noqa: B023
        yield {
            "layout": layout.name,
            "matrix": name,
            "shape": list(matrix.shape),
            "mb": matrix.nbytes / 1e6,
            "pack_us": pack * 1e6,
            "pack_gb_s": matrix.nbytes / pack / 1e9,
            "unpack_gb_s": matrix.nbytes / unpack / 1e9,
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layouts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--experts", type=whole, help="matrices in one tensor (default: 4 on cpu, 32 on cuda)")
    parser.add_argument("--repeats", type=whole, default=7)
    parser.add_argument("--threads", type=whole, default=1, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.layouts: torch sees no CUDA device; leave --device out to measure the CPU", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    experts = args.experts or (32 if args.device == "cuda" else 4)
    layouts: list[Layout | SourceLayout] = [
        *(layout for layout in (*VALUES.values(), *SCALES.values()) if layout.name != "strided"),  # which moves nothing
        *SOURCES.values(),
    ]
    rows = [row for layout in layouts for row in measure(layout, experts, args.device, args.repeats)]
    slowest = min(min(row["pack_gb_s"], row["unpack_gb_s"]) for row in rows)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    if args.json:
        result = {"kind": "measured", "device": where, "torch": torch.__version__, "slowest_gb_s": slowest}
        print(json.dumps(result | {"aim_gb_s": AIM_GB_S[args.device], "rows": rows}, indent=1))
        return 0
    print(f"measured on {where}, torch {torch.__version__}; median of {args.repeats}")
    print(f"{'layout':16} {'matrix':24} {'MB':>8} {'pack us':>10} {'pack GB/s':>10} {'unpack GB/s':>12}")
    for row in rows:
        print(
            f"{row['layout']:16} {row['matrix']:24} {row['mb']:8.2f} {row['pack_us']:10.1f} "
            f"{row['pack_gb_s']:10.2f} {row['unpack_gb_s']:12.2f}"
        )
    print(f"slowest: {slowest:.2f} GB/s; the aim is {AIM_GB_S[args.device]} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
