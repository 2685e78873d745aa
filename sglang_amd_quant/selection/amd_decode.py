"""What AMD's decode kernels (`runtime/decode_gemm_amd.py`) read and run: specs, rules and ops all take it from here."""

from __future__ import annotations

DECODE_SCHEMES = {"e2m1": ("w4a8", "mxfp4", "w4a16"), "e4m3": ("mxfp8",), "int4": ("int4_w4a16",)}
"""Weight format -> schemes."""

AMD_DECODE_LAYOUTS = {
    ("gfx950", "e2m1"): "preshuffle+tile_scale",
    ("gfx950", "e4m3"): "mxfp8_lane+tile_scale",
    ("gfx942", "e2m1"): "cdna3_e2m1+tile_scale",
    ("gfx942", "e4m3"): "cdna3_e4m3+tile_scale",
    ("gfx11", "e2m1"): "preshuffle+tile_scale",
    ("gfx11", "e4m3"): "preshuffle+tile_scale",
    ("gfx950", "int4"): "cdna_int4+tile_group",
    ("gfx942", "int4"): "cdna_int4+tile_group",
    ("gfx11", "int4"): "rdna_int4+tile_group",
}
"""Arch, weight format -> what the dense kernels read, and those for more rows beside them; gfx942's e4m3 are FNUZ."""

AMD_MOE_DECODE_LAYOUTS = {key: f"decode_{name.partition('+')[0]}" for key, name in AMD_DECODE_LAYOUTS.items()}
"""Likewise the grouped ones; the rows of a gated gate_up have an order of their own (`ops/packed.py`)."""
