"""Dispatch rules as data: when a kernel wins, which layout wins, and which tile an arch takes untuned."""

from __future__ import annotations

from functools import lru_cache

from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS, DECODE_SCHEMES
from sglang_amd_quant.selection.rule_types import LayoutRule, Range, Rule, TileRule


def _m3_gate_up(n: int, rows: Range, e_min: int = 0) -> Rule:
    return Rule(
        "hip_mxfp8_moe", "gfx950", "moe_gate_up", "mxfp8", "aiter #3783", rows=rows, n=(n, n), k=(6144, 6144),
        a_div=4, weighted=False, e_min=e_min,
    )  # fmt: skip


def _gemv(arch: str) -> Rule:
    """Static: it loads each weight byte once, and few rows would leave a matrix instruction's 16 mostly padding."""
    return Rule("gemv_mxfp4", arch, "linear", "w4a16", "kernels/hip/gemv_mxfp4.hip, static", m=(1, 4))


def _m3_down(rows: Range) -> Rule:
    return Rule(
        "hip_mxfp8_moe", "gfx950", "moe_down", "mxfp8", "aiter #3783", rows=rows, n=(6144, 6144), k=(768, 768), a_div=1
    )  # fmt: skip


_AMD_DECODE = tuple((*key, scheme) for key in AMD_DECODE_LAYOUTS for scheme in DECODE_SCHEMES[key[1]])
"""Arch, weight format and scheme of every decode kernel there."""
_MOE_BOUNDS = "aiter #3783: bounds on M_routed of its own kernel; not measured with this one"


def _amd_moe(arch: str, weight: str, scheme: str) -> tuple[Rule, ...]:
    """gate_up up to 16 routed rows, or 64 spread over many experts; down, whose K is less, up to 8."""
    name = f"hip_moe_decode_{arch}_{weight}"
    return (
        Rule(name, arch, "moe_gate_up", scheme, _MOE_BOUNDS, rows=(1, 16)),
        Rule(name, arch, "moe_gate_up", scheme, _MOE_BOUNDS, rows=(17, 64), e_min=128),
        Rule(name, arch, "moe_down", scheme, _MOE_BOUNDS, rows=(1, 8)),
    )


_MEASURED = "docs/decode.md: measured on an H100"
_SM90_DECODE: tuple[tuple[int, Range, Range], ...] = (
    # largest M, N, K: what it wins against the prefill kernel, which shares no K between blocks, for few rows
    (64, (1, 16383), (2048, None)),
    (64, (16384, None), (4096, 8191)),
    (32, (1, 8191), (1, None)),
    (16, (1, 16383), (1, None)),
    (8, (1, None), (1, None)),
)


_ON_H200 = "docs/decode.md: measured on an H200"
_SM90_TILES: tuple[tuple[tuple[str, ...], Range, Range, Range], ...] = (
    # schemes, M, N, K: where tiles as high as M beat the decode kernel, which holds more of x in each block
    (("w4a8", "mxfp4"), (3, 4), (16384, None), (1, None)),
    (("w4a8", "mxfp4"), (5, 64), (16384, None), (1, 2048)),
    (("w4a8", "mxfp4"), (33, 64), (5121, 8448), (1537, 3072)),
    (("w4a8", "mxfp4"), (33, 64), (6145, 8448), (1, 1536)),
    (("w4a8", "mxfp4"), (17, 32), (8193, 16383), (1, 4096)),
    (("mxfp8",), (17, 32), (6144, None), (1537, 4096)),
    (("mxfp8",), (17, 32), (8193, None), (1, 1536)),
    (("mxfp8",), (33, 64), (4097, 16383), (1, 3072)),
    (("mxfp8",), (33, 64), (4096, 16383), (3073, 4096)),
    (("mxfp8",), (33, 64), (16384, None), (1, 4095)),
    (("mxfp8",), (33, 64), (16384, None), (6144, None)),
)


RULES: tuple[Rule, ...] = (
    # Dense: any M up to 16 in the GEMV's envelope. The matrix-unit crossover has no rule: untuned M > 16 lost.
    Rule("hip_mxfp8_gemv", "gfx950", "linear", "mxfp8", "aiter #3783 envelope", m=(1, 16)),
    # Grouped gate_up at TP4 and TP8 (deep K): wins up to 16 routed rows at any E, and up to 64 from 128 experts on.
    _m3_gate_up(1536, rows=(1, 16)),
    _m3_gate_up(1536, rows=(17, 64), e_min=128),
    _m3_gate_up(768, rows=(1, 16)),
    _m3_gate_up(768, rows=(17, 64), e_min=128),
    # Grouped down at TP4 (shallow K): wins up to 8 routed rows, weighted or not.
    _m3_down(rows=(1, 8)),
    # Prefill gate_up of top-8 models; M <= 5 is decode, which #1015 leaves to another kernel, as it does down.
    Rule("hip_moe_w4a16_wmma", "gfx11", "moe_gate_up", "int4_w4a16", "ROCm/vllm #1015", m=(6, None), a_div=8),
    # Kernels of this package.
    *(_gemv(arch) for arch in ("gfx950", "gfx942", "gfx11", "sm_90")),
    *(
        Rule("triton_hopper_e4m3", "sm_90", "linear", scheme, _ON_H200, m=m, n=n, k=k)
        for schemes, m, n, k in _SM90_TILES
        for scheme in schemes
    ),
    *(Rule("hip_decode_e4m3", "sm_90", "linear", s, _MEASURED, m=(1, 64)) for s in ("mxfp8", "w4a8", "mxfp4")),
    *(Rule("hip_decode", "sm_90", "linear", "w4a16", _MEASURED, m=(1, m), n=n, k=k) for m, n, k in _SM90_DECODE),
    # Triton's kernel took several times as long as peers at 16 to 64 rows, 6144 -> 2304.
    *(
        Rule("hip_decode_int4", "sm_90", "linear", "int4_w4a16", _MEASURED, m=(1, m), n=n, k=k)
        for m, n, k in ((64, (1, 4095), (4096, None)), (32, (1, None), (1, None)))
    ),
    *(
        Rule(
            f"hip_decode_{arch}_{weight}", arch, "linear", scheme, "docs/decode_amd.md: counted and modelled", m=(1, 32)
        )
        for arch, weight, scheme in _AMD_DECODE
    ),
    *(rule for kind in _AMD_DECODE for rule in _amd_moe(*kind)),
)

_DECODING = "kernels/hip/decode_gemm.hip reads it, and others that serve more rows"
_FRAGMENTS = "kernels/triton/hopper_moe.py: weights go from memory to wgmma without a way back through it"

_GROUPED = ("moe_gate_up", "moe_down")

# fmt: off
LAYOUT_RULES: tuple[LayoutRule, ...] = (
    LayoutRule("gfx950", "w4a8", _GROUPED, "cdna4_scale", "vllm#44804: swizzled scales win at TP1 and TP2", 2,
               "triton_moe_a8w4"),
    LayoutRule("gfx950", "w4a8", _GROUPED, "strided", "vllm#44804: strided scales win 23 of 28 cells at TP4 and TP8",
               kernel="triton_moe_a8w4"),
    LayoutRule("gfx11", "int4_w4a16", _GROUPED, "exllama", "ROCm/vllm #1015 reads ExLlama order",
               kernel="hip_moe_w4a16_wmma"),
    LayoutRule("gfx950", "mxfp8", _GROUPED, "strided", "aiter #3783: what it was measured on", kernel="hip_mxfp8_moe"),
    LayoutRule("sm_90", "w4a16", ("linear",), "hopper_bf16", _DECODING),
    *(LayoutRule("sm_90", s, ("linear",), "hopper_e4m3", _DECODING) for s in ("mxfp8", "w4a8", "mxfp4")),
    LayoutRule("sm_90", "int4_w4a16", ("linear",), "mma_int4+tile_group", _DECODING),
    *(
        LayoutRule(arch, s, ("linear",), AMD_MOE_DECODE_LAYOUTS[arch, weight], _DECODING, activated=True)
        for arch, weight, s in _AMD_DECODE
    ),
    *(LayoutRule(arch, s, ("linear",), AMD_DECODE_LAYOUTS[arch, weight], _DECODING) for arch, weight, s in _AMD_DECODE),
    *(
        LayoutRule(arch, s, _GROUPED, AMD_MOE_DECODE_LAYOUTS[arch, weight], _DECODING,
                   kernel=f"hip_moe_decode_{arch}_{weight}")
        for arch, weight, s in _AMD_DECODE
    ),
    LayoutRule("sm_90", "w4a16", _GROUPED, "hopper_bf16", _FRAGMENTS),
    *(LayoutRule("sm_90", s, _GROUPED, "hopper_e4m3", _FRAGMENTS) for s in ("mxfp8", "w4a8", "mxfp4")),
    LayoutRule("sm_90", "int4_w4a16", _GROUPED, "decode_mma_int4", _FRAGMENTS),
)
# fmt: on
"""Which layout, for weights that are about to be laid out; the first that holds. Without one: strided."""

_A8W4 = "aiter #3580 heuristic"
_ROCPROF = "aiter #3580 heuristic (rocprof)"
_DECODE = "vLLM#46117 decode selector"
_STOCK = "stock dot_scaled tile, the baseline of aiter #3783"
_SGL = "sglang 0.5.23 native gfx95 MXFP8 MoE"
_SWEEP = "static: compile sweep on gfx11, larger tiles spill registers"
_ONE_M = "ROCm/vllm #1015: one BLOCK_M 32 for both GEMMs"

_AOT = "static: compiles without spills (tests/selection/test_tile_rules.py), untuned"


_DENSE = "measured best on an H100 of ten tiles, 8192 -> 28672, 6144 -> 2304, 2048 -> 6144"


def _few(arch: str, block_n: int, block_k: int, num_stages: int | None = None) -> tuple[TileRule, ...]:
    """Tiles for at most 16 rows, dense and grouped."""
    return tuple(
        TileRule(
            kernel, arch, _AOT, 16, ((None, block_n),), block_k, num_stages=num_stages, rows=rows, routed=routed
        )
        for kernel, rows, routed in (("triton_mx_gemm", (0, 16), False), ("triton_mx_moe", None, True))
    )  # fmt: skip


def _many(
    arch: str, block_m: int, block_n: int, block_k: int, num_warps: int = 4, num_stages: int | None = None
) -> tuple[TileRule, ...]:
    """Tiles for all more rows than rules before them took."""
    return tuple(
        TileRule(kernel, arch, _AOT, block_m, ((None, block_n),), block_k, num_warps, num_stages)
        for kernel in ("triton_mx_gemm", "triton_mx_moe")
    )


def _moe(
    arch: str, gate_up: tuple[int, int], down: tuple[int, int], heights: tuple[int, ...], stages: int | None = None
) -> tuple[TileRule, ...]:
    """Tiles of `triton_moe`, (BLOCK_N, BLOCK_K) of either GEMM; the last height serves all larger ones too."""
    return tuple(
        TileRule(
            "triton_moe", arch, _MOE, height, ((None, block_n),), block_k, num_stages=stages, ops=(op,),
            routed=height != heights[-1],
        )
        for height in heights
        for op, (block_n, block_k) in (("moe_gate_up", gate_up), ("moe_down", down))
    )  # fmt: skip


def _groups(
    arch: str,
    *tiles: tuple[int | None, int, int, int, int],
    num_stages: int | None = None,
    of: tuple[str, ...] = ("int4", "fp16"),
    shrink: tuple[int, int] | None = None,
) -> tuple[TileRule, ...]:
    """Tiles of the group GEMM: most rows where it is dense, BLOCK_M (what routing gives where it is grouped),
    BLOCK_N, BLOCK_K, warps; the last takes all more rows."""
    return tuple(
        TileRule(
            kernel, arch, _AOT, block_m, ((None, block_n),), block_k, num_warps, num_stages,
            shrink=shrink, rows=None if grouped else (0, most), routed=grouped and most is not None,
        )
        for most, block_m, block_n, block_k, num_warps in tiles
        for weights in of
        for kernel, grouped in ((f"triton_{weights}_gemm", False), (f"triton_{weights}_moe", True))
    )  # fmt: skip


_CDNA_GROUPS = ((16, 16, 64, 128, 4), (32, 32, 64, 64, 4), (1023, 64, 128, 64, 8), (None, 128, 128, 64, 8))
_ANY = 1 << 31
_GFX950_INT4 = (
    (16, 16, 64, 128, 4), (32, 32, 64, 128, 4), (1023, 64, 128, 128, 4), (None, 128, 64, 64, 4),
    (None, 128, 128, 128, 4),
)  # fmt: skip
"""Four warps share columns: each dequantizes its own, once for all rows of a block. Of the two highest strided weights
take the first, `cdna_int4`, whose tiles are 128 of K, the second."""
_GFX942_INT4 = ((16, 16, 64, 128, 4), (32, 32, 64, 128, 4), (_ANY, 64, 128, 128, 4), (None, 128, 64, 128, 4))
_GFX11_INT4 = ((16, 16, 64, 64, 4), (32, 32, 64, 64, 4), (_ANY, 64, 64, 64, 4), (None, 128, 64, 64, 8))
"""128 x 128 spills. 64 rows are enough: matrix instructions take longer than the others; routing may give 128."""

_GFX11_MX = (*_GFX11_INT4[:2], (None, *_GFX11_INT4[2][1:]))
_CDNA_MX = ((16, 16, 64, 128, 4), (32, 32, 64, 128, 4), (1023, 64, 128, 128, 4), (None, 128, 128, 128, 4))
_GFX950_FP16 = (*_CDNA_MX[:2], (1023, 64, 64, 128, 4), _CDNA_MX[3])
_GFX942_FP16 = (*_GFX950_FP16[:3], (None, 128, 64, 128, 4))
"""64 x 128 has more instructions than 64 x 64 where sums are scaled; on gfx942 128 x 128 spills."""

_WIDE = ("triton_hopper_bf16", "triton_hopper_int4")
"""Those that multiply in 16 bits on sm_90."""
_WIDE_DENSE = "measured on an H100 with int4, best of six tiles for 8192 -> 28672, 6144 -> 2304, 2048 -> 6144"

_MOE = "static: compiles without spills, with biases and in fp16 too (tests/selection/test_tile_rules.py), untuned"

# fmt: off
TILE_RULES: tuple[TileRule, ...] = (
    TileRule("triton_moe_a8w4", "gfx950", _A8W4, 16, routed=True, shrink=(128, 0)),
    TileRule("triton_moe_a8w4", "gfx950", _A8W4, 32, routed=True, n_ladder=((1024, 128), (4096, 256), (None, 512))),
    TileRule("triton_moe_a8w4", "gfx950", _ROCPROF, 64, routed=True, num_stages=1),
    TileRule("triton_moe_a8w4", "gfx950", _A8W4, 128, routed=True, n_pow2_max=256),
    TileRule("triton_moe_a8w4", "gfx942", _A8W4, 16, routed=True, shrink=(64, 256)),
    TileRule("triton_moe_a8w4", "gfx942", _A8W4, 32, routed=True, n_ladder=((1024, 128),)),
    TileRule("triton_moe_a8w4", "gfx942", _A8W4, 32, routed=True, n_ladder=((None, 256),), num_warps=8),
    TileRule("triton_moe_a8w4", "gfx942", _A8W4, 64, routed=True, num_warps=8),
    TileRule("triton_moe_a8w4", "gfx942", _A8W4, 128, routed=True),
    TileRule("triton_moe_mxfp8", "gfx950", _SGL, 64, n_ladder=((None, 64),), block_k=128, rows=(0, 32), k_min=3072,
             ops=("moe_gate_up",)),
    TileRule("triton_moe_mxfp8", "gfx950", _SGL, 64, block_k=128, num_warps=8),
    TileRule("triton_gemm_mx", "gfx950", _DECODE, 16, n_ladder=((None, 16),), block_k=1024, num_warps=2, rows=(0, 16)),
    TileRule("triton_gemm_mx", "gfx950", _STOCK, 64, block_k=128, num_warps=8),
    TileRule("triton_gemm_mx", "gfx11", _SWEEP, 16, n_ladder=((None, 32),), block_k=64, num_stages=1, rows=(0, 16)),
    TileRule("triton_gemm_mx", "gfx11", _SWEEP, 64, n_ladder=((None, 64),), block_k=64, num_stages=1),
    TileRule("triton_moe_a8w4", "gfx11", _SWEEP, 16, n_ladder=((None, 32),), block_k=64, num_stages=1, rows=(0, 16)),
    TileRule("triton_moe_a8w4", "gfx11", _SWEEP, 64, n_ladder=((None, 64),), block_k=64, num_stages=1),
    TileRule("triton_moe_w4a16", "gfx11", _ONE_M, 32, n_ladder=((None, 64),), block_k=64),
    *_moe("gfx950", (64, 256), (128, 256), (16, 32, 64, 128)),
    *(
        TileRule(f"triton_gated_{weight}_gemm", "gfx950", _MOE, height, ((None, 64),), rows=rows)
        for weight in ("e2m1", "e4m3")
        for height, rows in ((16, (0, 16)), (32, (0, 32)), (64, (0, 64)), (128, None))
    ),
    *_moe("gfx942", (32, 64), (64, 64), (16, 32, 64), stages=1),
    # Two blocks of K a step spill on gfx11: with a bias, or a tail of K, static.
    *_moe("gfx11", (32, 32), (32, 32), (16, 32), stages=1),
    *_moe("sm_90", (64, 64), (64, 64), (16, 32, 64), stages=4),
    *_groups("gfx950", *_GFX950_INT4, of=("int4",), shrink=(128, 0)),
    *_groups("gfx942", *_GFX942_INT4, of=("int4",), shrink=(128, 0)),
    *_groups("gfx950", *_CDNA_MX, of=("e2m1_bf16",), shrink=(128, 0)),
    *_groups("gfx942", *_CDNA_MX, of=("e2m1", "e4m3"), shrink=(128, 0)),
    *_groups("gfx11", *_GFX11_MX, num_stages=1, of=("e2m1", "e4m3", "e2m1_fp16")),
    *_groups("gfx950", *_GFX950_FP16, of=("e2m1_fp16",), shrink=(128, 0)),
    *_groups("gfx942", *_GFX942_FP16, of=("e2m1_fp16",), shrink=(128, 0)),
    *_groups("gfx950", *_CDNA_GROUPS, of=("fp16",)),
    *_groups("gfx942", *_CDNA_GROUPS, of=("fp16",)),
    *_groups("gfx11", *_GFX11_INT4, num_stages=1, of=("int4",)),
    *_groups("gfx11", (16, 16, 64, 64, 4), (32, 32, 64, 64, 4), (None, 64, 64, 64, 8), num_stages=1, of=("fp16",)),
    *_groups("sm_90", (16, 16, 64, 128, 4), (32, 32, 64, 64, 8), (1023, 64, 64, 64, 8), (None, 128, 64, 64, 8),
           num_stages=3),
    *_few("gfx950", 64, 256),
    TileRule("triton_mx_moe", "gfx950", _AOT, 32, routed=True),
    TileRule("triton_mx_moe", "gfx950", _AOT, 128, block_k=128, routed=True),
    *_many("gfx950", 64, 128, 256),
    *_few("gfx942", 32, 64),
    TileRule("triton_mx_moe", "gfx942", _AOT, 32, ((None, 64),), 64, num_warps=8, routed=True),
    *_many("gfx942", 64, 64, 64, num_warps=8),
    *_few("gfx11", 32, 64, num_stages=1),
    *_many("gfx11", 32, 64, 64, num_stages=1),
    *(
        TileRule(
            kernel, "sm_90", _WIDE_DENSE, block_m, ((most_n, block_n),), block_k, warps, stages, rows=rows,
            ops=("linear",),
        )
        for kernel in _WIDE
        for block_m, most_n, block_n, block_k, warps, stages, rows in (
            *((m, n, block_n, 128, 4, 4, (0, m)) for m in (16, 32, 64) for n, block_n in ((8191, 64), (None, 128))),
            (128, 8191, 64, 64, 4, 6, (0, 256)), (128, None, 128, 64, 4, 4, (0, 128)),
            (128, 4095, 128, 128, 8, 4, (0, 512)), (256, None, 128, 64, 8, 4, None),
        )
    ),
    *(
        TileRule(
            "triton_hopper_e4m3", "sm_90", _DENSE, block_m, ((most_n, block_n),), 128, warps, stages, rows=rows,
            ops=("linear",),
        )
        for block_m, most_n, block_n, warps, stages, rows in (
            (64, 8191, 64, 4, 6, (0, 512)), (128, None, 128, 4, 4, (0, 512)), (256, None, 128, 8, 3, None),
        )
    ),
    *_few("sm_90", 64, 128, num_stages=3),
    TileRule("triton_mx_moe", "sm_90", _AOT, 32, ((None, 64),), 128, num_stages=3, routed=True),
    TileRule("triton_mx_moe", "sm_90", _AOT, 128, block_k=64, num_warps=8, num_stages=3, routed=True),
    *_many("sm_90", 64, 128, 128, num_warps=8, num_stages=3),
)
# fmt: on
"""Untuned tiles, tried in order for the kernels that cover a problem, until one is legal."""


@lru_cache(maxsize=256)
def rules_for(arch: str, op: str, scheme: str) -> tuple[Rule, ...]:
    """The rules that speak of this kind of problem, in order."""
    return tuple(r for r in RULES if (r.arch, r.op, r.scheme) == (arch, op, scheme))


@lru_cache(maxsize=256)
def e_thresholds(arch: str, op: str, scheme: str) -> tuple[int, ...]:
    """Every E_min of those rules: an entry may stand in for another E only where no threshold lies between them."""
    return tuple(sorted({r.e_min for r in rules_for(arch, op, scheme) if r.e_min}))
