"""What AMD's decode kernels (`runtime/decode_gemm_amd.py`) read, run and need: specs, rules and ops take it
from here.

The sizes of tiles and of LDS repeat those of `kernels/hip/include/decode_amd.h`; tests/kernels/test_decode_gemm.py
holds the two together by running plans of many shapes.
"""

from __future__ import annotations

from functools import cache

from sglang_amd_quant.kernels.hip.manifest import AMD_DECODE_M, INT4_GROUPS
from sglang_amd_quant.schemes import MX_BLOCK
from sglang_amd_quant.selection.arch import ARCHES, canonical
from sglang_amd_quant.selection.buckets import block_bound
from sglang_amd_quant.selection.problem import Config, GemmProblem

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

TILE_ROWS, TILE_K = 16, 128
MAX_THREADS = 512
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Blocks that may share K."""
WAVES_N = (1, 2, 4, 8)
"""Waves of a block along N."""
WORKSPACE_COUNTERS = 4096
"""int32 at the start of the workspace: zero when it is made, and again after every launch."""
WORKSPACE_BYTES = (64 << 20) + 4 * WORKSPACE_COUNTERS
"""What launches of a stream are given for partial sums of blocks that share K."""

FORMATS = {
    "mxfp8": ("e4m3", "e4m3"),
    "w4a8": ("e2m1", "e4m3"),
    "w4a16": ("e2m1", "bf16"),
    "mxfp4": ("e2m1", "e2m1"),
    "w4a8_static": ("e2m1", "fp8_static"),
    "mxfp8_static": ("e4m3", "fp8_static"),
    "w8a16": ("e4m3", "bf16"),
    **{f"int4_w4a16_g{group}": ("int4", "bf16") for group in INT4_GROUPS},
    **{f"int4_w4a16_fp16_g{group}": ("int4", "fp16") for group in INT4_GROUPS},
}
"""Formats of weights and activations of the manifest's `DECODE_SCHEMES`, and of its `INT4_SCHEMES` by group."""


def group_of(scheme: str) -> int:
    """Elements along K that share a scale."""
    return int(scheme.rpartition("_g")[2]) if FORMATS[scheme][0] == "int4" else MX_BLOCK


def takes_codes(arch: str, scheme: str) -> bool:
    """Whether the matrix unit multiplies activations as codes (Activations::CODES), not as 16-bit floats."""
    weight, act = FORMATS[scheme]
    if arch == "gfx950":
        return act not in ("bf16", "fp16")
    return arch == "gfx942" and weight == "e4m3" and act in ("e4m3", "fp8_static")


def factors_of_tile(arch: str, scheme: str) -> int:
    """Factors of a row of activations and 128 of K, where they were made halves: a factor for each MX block, with int4
    weights one (Activations::TILE_FACTORS). 0: they are multiplied as they are, or their scales are no floats."""
    weight, act = FORMATS[scheme]
    if weight == "int4":
        return 1 if act == "bf16" else 0
    return 0 if arch == "gfx950" or act == "fp8_static" else TILE_K // MX_BLOCK


def lds_bytes(arch: str, scheme: str, rows: int, tiles: int, split: int, waves_k: int, waves_n: int) -> int:
    """LDS of a block: what blocks meet by, activations with their scales or factors, partial sums."""
    act = FORMATS[scheme][1]
    fp8, most = act in ("e4m3", "fp8_static"), -(-tiles // split)
    lane_groups = ARCHES[canonical(arch)].wave // 16
    codes = takes_codes(arch, scheme)
    bits = 16 if not codes else 8 if fp8 else 4
    values = rows * (most * TILE_K * bits // 8 + 16) + (rows // 8 * 32 if arch == "gfx942" else 0)
    extra = 0
    if arch == "gfx950" and codes and act != "fp8_static":
        extra = -(-rows * (most | 1) * 4 // 16) * 16
    elif factors := factors_of_tile(arch, scheme):
        sums = -(-min(rows, 16) // lane_groups)
        extra = -(-rows // 16) * lane_groups * (-(-most * factors * sums // 32) * 32 + sums) * 4
    return 128 + values + extra + waves_k * rows * TILE_ROWS * (waves_n | 1) * 4


def workspace_bytes(rows: int, row_blocks: int, n: int, split: int, waves_n: int) -> int:
    """Bytes in which blocks that share K meet: counters, and partial sums in fp32; 0 where none share it."""
    if split == 1:
        return 0
    places = row_blocks * -(-n // (TILE_ROWS * waves_n))
    return 4 * (WORKSPACE_COUNTERS + places * split * rows * waves_n * TILE_ROWS)


def decode_scheme(problem: GemmProblem) -> str:
    """The name that a problem's formats have among the decode kernels, of all archs; those of int4 know the model's
    dtype and the group."""
    if problem.scheme == "int4_w4a16":
        return f"int4_w4a16{'_fp16' if problem.out_dtype == 'fp16' else ''}_g{problem.group}"
    return problem.scheme + ("_static" if problem.act == "fp8_static" else "")


def why_none_fits(problem: GemmProblem, config: Config) -> str:
    """Why no launch for a problem has place on its arch; empty if one has. `config` has the BLOCK_M of routed rows."""
    name = decode_scheme(problem)
    if name not in FORMATS:
        return ""  # refused for what it is
    rows = config.block_m or next((r for r in AMD_DECODE_M if problem.m <= r), AMD_DECODE_M[-1])
    row_blocks = block_bound(problem.rows, problem.e_local, rows) if problem.moe else -(-problem.m // rows)
    return _why_none_fits(problem.arch, name, rows, row_blocks, problem.n, problem.k)


@cache
def _why_none_fits(arch: str, scheme: str, rows: int, row_blocks: int, n: int, k: int) -> str:
    facts, tiles = ARCHES[canonical(arch)], -(-k // TILE_K)
    needs = []
    for split in (split for split in SPLITS if split <= tiles):
        for waves_n in (w for w in WAVES_N if w * facts.wave <= MAX_THREADS):
            counted = split == 1 or row_blocks * -(-n // (TILE_ROWS * waves_n)) <= WORKSPACE_COUNTERS
            if counted and lds_bytes(arch, scheme, rows, tiles, split, 1, waves_n) <= facts.lds_bytes:
                needs.append(workspace_bytes(rows, row_blocks, n, split, waves_n))
    if not needs:
        return f"{row_blocks} blocks of {rows} rows: however K is shared, LDS does not hold their activations"
    if min(needs) > WORKSPACE_BYTES:
        return f"blocks that share K need {min(needs):,} B for their sums, and are given {WORKSPACE_BYTES:,}"
    return ""
