"""The Triton MX GEMM on weights that lie as the decode kernels of a target read them: machine code against the twin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
from emulated_triton import emulated_triton
from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig, mx_gemm, mx_gemm_torch
from sglang_amd_quant.kernels.triton.tiles import PADS

from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, VALUE_LAYOUTS
from sglang_amd_quant.layouts.registry import scale_layout, value_layout

CASES = [
    # arch, layout of values, of scales, weights, activations, BLOCK_K
    ("gfx950", "preshuffle", "tile_scale", "e2m1", "e4m3", 128),
    ("gfx950", "mxfp8_lane", "tile_scale", "e4m3", "e4m3", 128),
    ("gfx942", "cdna3_e2m1", "tile_scale", "e2m1", "bf16", 64),
    ("gfx1100", "preshuffle", "tile_scale", "e2m1", "bf16", 64),
    ("gfx1100", "preshuffle", "tile_scale", "e4m3", "bf16", 64),
    ("sm_90", "mma_tile", "mma_scale", "e4m3", "e4m3", 64),
]


def codes(generator: torch.Generator, element: str, rows: int, k: int) -> torch.Tensor:
    """Random data of a format, no NaN."""
    if element == "bf16":
        return torch.randn(rows, k, generator=generator).bfloat16()
    columns = k if element == "e4m3" else k // 2
    raw = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    return (
        raw
        if element == "e2m1"
        else torch.where(raw & 0x7F == 0x7F, 0x3A, raw).to(torch.uint8).view(torch.float8_e4m3fn)
    )


@pytest.mark.parametrize(("arch", "values", "scales", "w_format", "x_format", "block_k"), CASES)
@pytest.mark.parametrize("k", [256, 352], ids=["even K", "tail"])
def test_layouts_are_read_where_they_lie(
    arch: str, values: str, scales: str, w_format: str, x_format: str, block_k: int, k: int
) -> None:
    m, n, generator = 20, 40, torch.Generator().manual_seed(k)
    x, w = codes(generator, x_format, m, k), codes(generator, w_format, n, k)
    w_scales = torch.randint(120, 134, (n, k // 32), dtype=torch.uint8, generator=generator)
    x_scales = None
    if x_format != "bf16":
        x_scales = torch.randint(120, 134, (m, k // 32), dtype=torch.uint8, generator=generator)
    y = torch.full((m, n), torch.nan)
    config = MxGemmConfig(16, 32, block_k, nonkdim=16, num_stages=1)
    with emulated_triton(arch) as made:
        mx_gemm(
            x, x_scales, value_layout(values).pack(w), scale_layout(scales).pack(w_scales), y, config, arch,
            layout=(values, scales),
        )  # fmt: skip
    assert made[0].compiled.report.problems == []
    if arch == "sm_90":  # compiled only
        return
    want = mx_gemm_torch(x, x_scales, w, w_scales, dtype=torch.float64)
    # Both sides are exact in bf16 or as MX blocks; fp32 sums of K products round K times at most.
    bound = k * 2.0**-23 * mx_gemm_torch(_magnitude(x), x_scales, _magnitude(w), w_scales, dtype=torch.float64)
    assert ((y.double() - want).abs() <= bound).all()


def _magnitude(codes: torch.Tensor) -> torch.Tensor:
    """Without signs."""
    if codes.dtype == torch.bfloat16:
        return codes.abs()
    mask = 0x77 if codes.dtype == torch.uint8 else 0x7F
    return (codes.view(torch.uint8) & mask).view(codes.dtype)


def test_pads_are_those_of_the_layouts() -> None:
    known = VALUE_LAYOUTS | {name: spec for name, spec in SCALE_LAYOUTS.items() if name != "strided"}
    word = {name: 4 if name.endswith("_int4") else 1 for name in PADS}  # int4's columns are words of four bytes
    assert {name: known[name].tile_cols // word[name] for name in PADS} == PADS
