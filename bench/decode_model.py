"""Modelled time of the decode GEMM on an MI355X: plans and counts, turned into microseconds. Nothing here is measured.

`python -m bench.decode_model [--arch gfx950] [--json]`: for each shape and M the plan, the bytes, the floor (weights
and scales once at the device's bandwidth) and `runtime.decode_gemm_amd.modelled_us`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from sglang_amd_quant.runtime.decode_gemm_amd import FORMATS, bytes_in_flight, modelled_us, plans, scale_bytes

SHAPES = ((2304, 6144), (6144, 2048), (1536, 6144), (6144, 1536))
"""N, K of the layers of MiniMax-M3 that aiter #3783 measures."""
SIZES = (1, 2, 4, 8, 16, 32, 64)
DEVICES = {"gfx950": ("MI355X", 256, 8.0e6), "gfx942": ("MI300X", 304, 5.3e6), "gfx1100": ("7900 XTX", 96, 0.96e6)}
"""Name, compute units, bytes a microsecond: data sheets."""


def rows(arch: str, schemes: tuple[str, ...] = ("mxfp8", "mxfp4", "int4_w4a16_g128")) -> Iterator[dict[str, Any]]:
    """One row for each scheme, shape and M."""
    _, cus, bandwidth = DEVICES[arch]
    for scheme in schemes:
        bits = 8 if FORMATS[scheme][0] == "e4m3" else 4
        for n, k in SHAPES:
            moved = n * k * bits / 8 + n * scale_bytes(scheme, k)
            for m in SIZES:
                p = plans(arch, scheme, m, n, k, cus)[0]
                yield {
                    "scheme": scheme,
                    "K": k,
                    "N": n,
                    "M": m,
                    "plan": f"{p.split} x {p.waves_k} x {p.waves_n}, {p.groups}",
                    "in flight a CU": bytes_in_flight(scheme, p, -(-m // p.rows), cus),
                    "floor us": round(moved / bandwidth, 2),
                    "modelled us": round(modelled_us(arch, scheme, p, m, n, k, cus), 1),
                }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=DEVICES, default="gfx950")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = list(rows(options.arch))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{DEVICES[options.arch][0]}, modelled; plan: split x waves along K x waves along N, groups")
    cells = [list(found[0]), *([str(v) for v in row.values()] for row in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
