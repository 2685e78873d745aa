"""Bandwidth of the kernels that quantize activations on this machine's GPU, beside that of a copy.

    python -m bench.quant_mx [--k 2048,2880,4096,7168] [--rows 32768] [--json] [--out FOLDER]

Measured: microseconds and GB/s of the bytes that must move, a bf16 matrix read (two, before an activation), codes and
scales written; `of copy` is that over what torch's copy of the matrix moves a second, read and written, at that K.

Method: before anything is timed, a small matrix is compared with the twin in torch, bit for bit. Then CUDA graphs over
two matrices that together exceed the L2, median of 20 replays (`timing.py`).
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from sglang_amd_quant.kernels.triton.quant_mx import NO_FRONT, Front, quant_mx, quant_mx_torch
from tqdm import tqdm

from bench.arguments import command
from bench.timing import graph_us
from sglang_amd_quant.cli.arguments import whole, wholes
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.runtime.device import gpu

OUTS = (("e4m3", "mx"), ("e2m1", "mx"), (None, "row"), ("e2m1", "row"), ("e4m3", "bf16"))
"""Element and what comes out; `row`: e4m3 under one factor a row."""
AIM = 0.85
"""Of a copy's bandwidth, for MXFP8 and MXFP4."""


def fronts(k: int) -> dict[str, Front]:
    """What may be done before, by the name of its row."""
    weight = torch.rand(k, device="cuda", dtype=torch.bfloat16)
    return {
        "none": NO_FRONT,
        "silu": Front("silu"),
        "swigluoai, interleaved": Front("swigluoai", interleaved=True, limit=7.0),
        "rmsnorm": Front("rmsnorm", weight=weight),
    }


def width(k: int, front: Front) -> int:
    """Columns of what is read."""
    return 2 * k if front.kind in ("silu", "swigluoai") else k


def differing(k: int, front: Front, element: str | None, out: str) -> float:
    """Share of bytes that differ from the twin's, of what comes out and of scales or factors."""
    x = torch.randn(37, width(k, front), device="cuda").bfloat16()
    made, expected = quant_mx(x, element, out, front=front, arch="sm_90"), quant_mx_torch(x, element, out, front=front)
    both = [
        (m.view(torch.uint8) != e.to(m.dtype).view(torch.uint8)).flatten()
        for m, e in zip(made, expected, strict=True)
        if m is not None and e is not None
    ]
    return torch.cat(both).float().mean().item()


def allowed(front: Front) -> float:
    """Of those: none; behind a front one in a hundred, as exp and rsqrt are good to a few ulps of fp32 on either side,
    so that hardly a value is rounded to another bf16, and to the next code."""
    return 0 if front.kind == "none" else 0.01


def bytes_of(rows: int, k: int, front: Front, element: str | None, out: str) -> float:
    """Bytes that must move, the front's weight and a row's factor left out."""
    written = {"bf16": 2.0, "row": 1.0, "mx": (0.5 if element == "e2m1" else 1.0) + 1 / 32}[out]
    return rows * (2 * width(k, front) + written * k)


def measure(rows: int, k: int) -> list[dict[str, Any]]:
    """Every front and output at one K."""
    xs = [torch.randn(rows, 2 * k, device="cuda").bfloat16() for _ in range(2)]
    halves = [x.view(2 * rows, k)[:rows] for x in xs]
    copies = [torch.empty_like(x) for x in halves]
    us = graph_us([partial(c.copy_, x) for c, x in zip(copies, halves, strict=True)], at_least=8)
    copy = 4 * rows * k / us * 1e6
    made = [{"K": k, "front": "copy", "element": "bf16", "out": "bf16", "us": us, "GB/s": copy / 1e9, "of_copy": 1.0}]
    del copies
    for (name, front), (element, out) in ((f, o) for f in fronts(k).items() for o in OUTS):
        differ = differing(k, front, element, out)
        of = [x.view(-1, width(k, front))[:rows] for x in xs]
        us = graph_us([partial(quant_mx, x, element, out, front=front, arch="sm_90") for x in of], at_least=8)
        rate = bytes_of(rows, k, front, element, out) / us * 1e6
        row = {"K": k, "front": name, "element": element or "e4m3", "out": out, "us": us, "GB/s": rate / 1e9}
        made.append(row | {"of_copy": rate / copy, "differing": differ, "right": differ <= allowed(front)})
    return made


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=wholes, default="1536,2048,2880,4096,6144,7168", help="multiples of 32")
    parser.add_argument("--rows", type=whole, default=32768, help="tokens")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--date", default="", help="for the report")
    parser.add_argument("--out", type=Path, help="folder for quant_mx.json")
    args = parser.parse_args()
    if odd := [k for k in args.k if k % 32]:
        parser.error(f"--k {odd[0]}: write multiples of 32, the elements of a block")
    gpu(0)  # says so where there is none
    rows = [row for k in tqdm(args.k, disable=args.json, leave=False) for row in measure(args.rows, k)]
    result = {
        "kind": "measured", "command": command("bench.quant_mx", args, parser), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "date": args.date, "tokens": args.rows, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "quant_mx.json").write_text(json.dumps(result, indent=1))
    wrong = [r for r in rows if not r.get("right", True)]
    for r in wrong:
        what = f"{r['front']}, {r['element']} {r['out']}, K={r['K']}"
        print(f"WRONG {what}: {r['differing']:.1%} of bytes differ from the twin's", file=sys.stderr)
    if args.json:
        print(json.dumps(result, indent=1))
        return int(bool(wrong))
    print(
        f"measured on {result['device']}, torch {torch.__version__}, {args.rows} rows; aim {AIM:.0%} of a copy for mx"
    )
    print(f"{'K':>6} {'front':24} {'to':10} {'us':>9} {'GB/s':>7} {'of copy':>8}")
    for r in rows:
        to = f"{r['element']} {r['out']}"
        print(f"{r['K']:6} {r['front']:24} {to:10} {r['us']:9.1f} {r['GB/s']:7.0f} {r['of_copy']:8.0%}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(exit_code("bench.quant_mx", main))
