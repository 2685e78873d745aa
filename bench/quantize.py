"""How fast numbers are quantized and dequantized: python -m bench.quantize [--json] [--peers] [--device cuda]

Every element and scale mode over one bf16 matrix of weights. MB/s counts the bytes of the bf16 matrix, whichever way it
goes; `per core` divides by the processor time instead of the wall time, which other processes on the machine stretch.
The aim is 100 MB/s a core for MXFP4. The last table holds the memory that is taken beside input and output, which must
not grow with the matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_amd_quant.cli.arguments import above_zero, whole
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, fake_quantize_mx, quantize_int4, quantize_mx
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, ScaleMode

AIM_MB_S = 100
TEMPORARIES_MIB = 64
"""At most this much beside input and output, on any device."""

Run = Callable[[], Any]


def cases(w: torch.Tensor, peers: bool) -> Iterator[tuple[str, str, str, Run]]:
    """(library, what, scale mode, run) over w bf16 [N, K]."""
    for element, default in DEFAULT_SCALE_MODE.items():
        data, scales = quantize_mx(w, element)
        for mode in ScaleMode:
            yield "this", f"quantize {element}", mode, lambda e=element, m=mode: quantize_mx(w, e, m)
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            run = lambda e=element, d=data, s=scales, t=dtype: dequantize_mx(d, s, e, t)  # noqa: E731
            yield "this", f"dequantize {element} to {name}", "", run
        yield "this", f"fake_quantize {element}", default, lambda e=element: fake_quantize_mx(w, e)
    for symmetric in (True, False):
        name = f"int4 group 128{'' if symmetric else ' asymmetric'}"
        packed = quantize_int4(w, 128, symmetric)
        yield "this", f"quantize {name}", "", lambda s=symmetric: quantize_int4(w, 128, s)
        yield "this", f"dequantize {name} to bfloat16", "", lambda p=packed: dequantize_int4(*p, dtype=w.dtype)
    if peers:
        from torchao.prototype.mx_formats import mx_tensor

        dtypes = {"e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn}
        for element, dtype in dtypes.items():
            for mode in mx_tensor.ScaleCalculationMode:
                run = lambda d=dtype, m=mode: mx_tensor.to_mx(w, d, 32, m)  # noqa: E731
                yield "torchao", f"quantize {element}", mode.value, run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run, device: str, repeats: int) -> tuple[float, float]:
    """Medians of wall and processor time of a run, after one that warms up. On a GPU it ends when its kernels have."""
    wall, processor = [], []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(wall[1:]), statistics.median(processor[1:])


def resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}


def temporaries(run: Run, device: str) -> float | None:
    """MiB at the peak of a run, beside what was there before and what it returns; None where it cannot be measured."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # else memory freed before is taken unseen
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        except (AttributeError, OSError):  # no glibc, no Linux
            return None
        before = resident()["VmRSS"]
        out = run()
        peak = resident()["VmHWM"]
    results = out if isinstance(out, tuple) else (out,)
    return max(0, peak - before - sum(t.nbytes for t in results)) / 2**20


def weights(mb: float, device: str) -> torch.Tensor:
    """bf16 [N, 4096] of about `mb` MB, normal with a deviation of 0.02."""
    generator = torch.Generator(device).manual_seed(0)
    w = torch.empty(max(1, round(mb * 1e6 / 8192)), 4096, dtype=torch.bfloat16, device=device)
    return w.normal_(0, 0.02, generator=generator)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mb", type=above_zero, default=64, help="size of the bf16 matrix (default 64)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=whole, default=1, help="CPU threads (default 1)")
    parser.add_argument("--repeats", type=whole, default=7)
    parser.add_argument("--peers", action="store_true", help="also torchao's to_mx, in eager mode")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.quantize: torch sees no CUDA device; leave --device out to measure the CPU", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)

    memory = []
    for mb in (args.mb, 4 * args.mb):
        w = weights(mb, args.device)
        for what, run in {
            "quantize e2m1": lambda: quantize_mx(w, "e2m1"),  # noqa: B023 - called within this turn
            "quantize e4m3": lambda: quantize_mx(w, "e4m3"),  # noqa: B023
            "quantize int4": lambda: quantize_int4(w, 128, symmetric=False),  # noqa: B023
        }.items():
            memory.append({"what": what, "mb": w.nbytes / 1e6, "temporaries_mib": temporaries(run, args.device)})

    w = weights(args.mb, args.device)
    rows = []
    for library, what, mode, run in tqdm(list(cases(w, args.peers)), disable=args.json, leave=False):
        wall, processor = seconds(run, args.device, args.repeats)
        rate = {"mb_s": w.nbytes / wall / 1e6, "mb_s_per_core": w.nbytes / processor / 1e6}
        rows.append({"library": library, "what": what, "mode": str(mode)} | rate)

    slowest = min(r["mb_s_per_core"] for r in rows if r["library"] == "this" and r["what"] == "quantize e2m1")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    if args.json:
        result = {"kind": "measured", "device": where, "threads": args.threads, "torch": torch.__version__}
        result |= {"mb": w.nbytes / 1e6, "mxfp4_mb_s_per_core": slowest, "aim_mb_s": AIM_MB_S}
        print(json.dumps(result | {"rows": rows, "memory": memory}, indent=1))
        return 0
    print(f"measured on {where}, torch {torch.__version__}, bf16 {list(w.shape)}; median of {args.repeats}")
    print(f"{'library':8} {'what':38} {'mode':6} {'MB/s':>9} {'per core':>9}")
    for r in rows:
        print(f"{r['library']:8} {r['what']:38} {r['mode']:6} {r['mb_s']:9.0f} {r['mb_s_per_core']:9.0f}")
    print(f"slowest MXFP4 quantization: {slowest:.0f} MB/s a core; the aim is {AIM_MB_S}\n")
    print(f"{'what':38} {'bf16 MB':>9} {'MiB beside input and output':>28}")
    for m in memory:
        mib = "not measured" if m["temporaries_mib"] is None else f"{m['temporaries_mib']:.1f}"
        print(f"{m['what']:38} {m['mb']:9.0f} {mib:>28}")
    print(f"the aim is {TEMPORARIES_MIB} MiB at most, whatever the size")
    return 0


if __name__ == "__main__":
    sys.exit(main())
