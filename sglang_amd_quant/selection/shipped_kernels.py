"""The kernels that this package brings, with the envelopes that they really have.

What launches each stands under the same name in `KERNELS` of `ops/linear.py` and `ops/moe.py`; which of them a device
can launch is `runtime/detect.py`'s to find out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sglang_amd_quant.kernels.hip.manifest import AMD_MOE_DECODE_M, QUANTIZED_SCHEMES
from sglang_amd_quant.schemes import INT4_GROUPS, scheme
from sglang_amd_quant.selection import families  # noqa: F401  registers first, whoever imports this: plans depend on order
from sglang_amd_quant.selection.amd_decode import (
    AMD_DECODE_LAYOUTS,
    AMD_MOE_DECODE_LAYOUTS,
    DECODE_SCHEMES,
    why_none_fits,
)
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.buckets import next_pow2, routed_block_m
from sglang_amd_quant.selection.hopper_decode import least_lds
from sglang_amd_quant.selection.lds import lds_bytes
from sglang_amd_quant.selection.legality import operand_bits
from sglang_amd_quant.selection.problem import Config, GemmProblem
from sglang_amd_quant.selection.specs import SHIPPED, KernelSpec, kernel, register

_MX, _FNUZ = ("e2m1", "e4m3"), ("gfx942", "e4m3")
_EXPERTS = ("moe_gate_up", "moe_down")
GPUS = ("gfx950", "gfx942", "gfx11", "sm_90")


def _dequantized(layouts: dict[tuple[str, str], str]) -> tuple[str, ...]:
    """Those that kernels read which dequantize MX weights ahead of LDS: OCP codes, so not gfx942's e4m3."""
    return tuple(
        dict.fromkeys(name for (arch, weight), name in layouts.items() if weight in _MX and (arch, weight) != _FNUZ)
    )


HOPPER_INT4 = ("mma_int4+tile_group", "decode_mma_int4")
"""For Hopper's, and its experts."""

_TILE = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (64, 128, 256, 512),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "nonkdim": (16, 32),
    "group_m": (1, 2, 4, 8, 16),
}


def _nonkdim(arch: str, block_m: int) -> int | None:
    """The 16 x 16 matrix instruction where a tile is one of them high; elsewhere Triton chooses."""
    return 16 if arch.startswith("gfx9") and block_m == 16 else None


def _dense_tile(problem: GemmProblem) -> Config:
    block_m = 16 if problem.m <= 16 else 64
    return Config(block_m, 64, 128, num_warps=4, num_stages=2, nonkdim=_nonkdim(problem.arch, block_m))


def _grouped_tile(problem: GemmProblem) -> Config:
    block_m = routed_block_m(problem)
    return Config(block_m, 64, 128, num_warps=4, num_stages=2, nonkdim=_nonkdim(problem.arch, block_m))


def _decode_lds(problem: GemmProblem, config: Config) -> int:
    name = f"{problem.scheme}_g{problem.group}" if problem.scheme == "int4_w4a16" else problem.scheme
    return least_lds(name, problem.m, problem.k)


def _mx_gemm(name: str, ops: tuple[str, ...], layouts: tuple[str, ...] = ("strided",)) -> KernelSpec:
    return KernelSpec(
        name,
        SHIPPED,
        "kernels/triton/mx_gemm.py",
        archs=GPUS,
        schemes=("mxfp8", "w4a8", "mxfp4", "w4a16"),
        ops=ops,
        layouts=layouts,
        space=_TILE,
        configure=_dense_tile if ops == ("linear",) else _grouped_tile,
        triton=True,
        gathers=("values", "scales"),
        acts=("e4m3", "e2m1", "bf16", "fp8_static"),
        out_dtypes=("bf16", "fp16", "fp32"),
        fuses=("bias",),
        x_dtypes=("bf16",),
        dequantizes=True,
        k_multiple=32,
    )


def _group_tile(problem: GemmProblem) -> Config:
    """On CDNA with 16 x 16 matrix instructions at every height: those of 32 x 32 want more registers here (static)."""
    dense = next((rows for rows in (16, 32) if problem.m <= rows), 64)
    block_m = routed_block_m(problem) if problem.moe else dense
    cdna = problem.arch.startswith("gfx9")
    return Config(block_m, 64, 128 if cdna else 64, num_warps=4, num_stages=2, nonkdim=16 if cdna else None)


def _group_lds(problem: GemmProblem, config: Config) -> int:
    """On AMD x of a whole step in every stage but one, which is in registers, or of one product in a single stage; and
    the weights of one product, dequantized. On NVIDIA x, codes and scales of a whole step in every stage, and its
    weights."""
    block_m, block_n, block_k = config.tile
    step, depth, stages = max(block_k, problem.group), min(block_k, problem.group), config.num_stages or 1
    scale = 4 if problem.scheme == "int4_w4a16" else 1
    x, w = block_m * step * 2, block_n * (step * problem.weight_bits // 8 + scale * step // problem.group)
    if problem.arch == "sm_90":
        return stages * (x + w) + block_n * step * 2
    return max((stages - 1) * x, block_m * depth * 2) + block_n * depth * 2


def _registers_lds(problem: GemmProblem, config: Config) -> int:
    """x of one step, where weights are in registers all the way: on AMD."""
    if problem.arch == "sm_90":
        return _group_lds(problem, config)
    block_m, _, block_k = config.tile
    return block_m * max(block_k, problem.group) * 2


def _group_gemm(name: str, ops: tuple[str, ...]) -> KernelSpec:
    return KernelSpec(
        name,
        SHIPPED,
        "kernels/triton/group_gemm.py",
        archs=GPUS,
        ops=ops,
        space=_TILE | {"block_k": (32, 64, 128)},
        configure=_group_tile,
        triton=True,
        acts=("bf16",),
        out_dtypes=("bf16", "fp16", "fp32"),
        fuses=("bias",),
        lds=_group_lds,
        k_multiple=32,
    )


_GATED: dict[str, Any] = {
    "fuses": ("bias", "activation"), "activations": ("silu", "swigluoai"), "betas": (None, 1.0),
    "activates_in": tuple(dict.fromkeys(AMD_MOE_DECODE_LAYOUTS.values())),
}  # fmt: skip
"""Of dense kernels on AMD: an activation is theirs where weights lie as experts' do."""


def _archs_of(weight: str, *tables: dict[tuple[str, str], str]) -> dict[str, tuple[str, ...]]:
    """What decode kernels read of a weight format, with the archs of each."""
    read: dict[str, tuple[str, ...]] = {}
    for (arch, of), layout in (item for table in tables for item in table.items()):
        if of == weight:
            read[layout] = (*read.get(layout, ()), arch)
    return read


def _int4_gemm(name: str, ops: tuple[str, ...], *tables: dict[tuple[str, str], str]) -> KernelSpec:
    """`tables`: what decode kernels of an arch read, and this on that arch too."""
    read = _archs_of("int4", *tables)
    return replace(
        _group_gemm(name, ops),
        schemes=("int4_w4a16",),
        layouts=("strided", *read),
        layout_archs=read,
        groups=INT4_GROUPS,
        lds=_registers_lds,
        x_dtypes=("bf16", "fp16"),
        **(_GATED if ops == ("linear",) else {}),
    )


def _mx_registers(weight: str, op: str, archs: tuple[str, ...], x: str = "") -> KernelSpec:
    """MX weights where no matrix unit multiplies them. `x`: the dtype of activations that are not quantized, if it is
    for these alone; else any, as bf16 has them."""
    dense, schemes = op == "gemm", ("w4a16",) if x else DECODE_SCHEMES[weight]
    tables = (AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS) if dense else (AMD_MOE_DECODE_LAYOUTS,)
    of_archs = _archs_of(weight, *tables).items()
    read = {layout: on for layout, of in of_archs if (on := tuple(a for a in of if a in archs))}
    return replace(
        _group_gemm("_".join(part for part in ("triton", weight, x, op) if part), ("linear",) if dense else _EXPERTS),
        **(_GATED if dense else {}),
        archs=archs,
        schemes=schemes,
        acts=(*dict.fromkeys(scheme(s).act for s in schemes), *(() if x else ("fp8_static",))),
        layouts=("strided", *read),
        layout_archs=read,
        gathers=("scales",),
        lds=_registers_lds,
        x_dtypes=(x or "bf16",),
    )


def _fp16_gemm(name: str, ops: tuple[str, ...]) -> KernelSpec:
    """MX weights in a model of fp16 whose activations are not quantized; on AMD only e4m3's are left to it."""
    return replace(_group_gemm(name, ops), schemes=("w4a16", "mxfp8"), layouts=("strided",), x_dtypes=("fp16",))


def _moe_tile(problem: GemmProblem) -> Config:
    block_m, block_k = routed_block_m(problem), 32 if problem.arch == "gfx11" else 128
    nonkdim = 16 if problem.arch.startswith("gfx9") else None
    return Config(block_m, 32, block_k, num_warps=4, num_stages=1, nonkdim=nonkdim)


def _moe_lds(problem: GemmProblem, config: Config) -> int:
    """The estimate, with the weights of gate and of up for each of BLOCK_N columns."""
    block_m, block_n, block_k = config.tile
    paired = problem.op != "moe_down" and problem.epilogue.activation is not None
    bits = operand_bits(problem, kernel("triton_moe"))
    asynchronous = problem.arch in ARCHES and ARCHES[problem.arch].async_copy
    return lds_bytes(block_m, block_n * (2 if paired else 1), block_k, *bits, config.num_stages or 1, asynchronous)


_MOE = KernelSpec(
    "triton_moe",
    SHIPPED,
    "kernels/triton/moe_gemm.py",
    archs=GPUS,
    schemes=("mxfp8", "w4a8", "mxfp4", "w4a16"),
    ops=_EXPERTS,
    layouts=("strided", *_dequantized(AMD_MOE_DECODE_LAYOUTS)),
    space=_TILE | {"block_k": (32, 64, 128, 256, 512)},
    configure=_moe_tile,
    triton=True,
    acts=("e4m3", "e2m1", "bf16", "fp8_static"),
    out_dtypes=("bf16", "fp16"),
    fuses=("bias", "activation"),
    activations=("silu", "swigluoai"),
    x_dtypes=("bf16",),
    gathers=("values", "scales"),
    dequantizes=True,
    lds=_moe_lds,
    k_multiple=32,
    n_multiple=32,
)


def _gated_gemm(weight: str) -> KernelSpec:
    """Linears that end in an activation, where `mx_gemm.py` has none."""
    return replace(
        _MOE,
        name=f"triton_gated_{weight}_gemm",
        archs=("gfx950",),
        schemes=tuple(s for s in DECODE_SCHEMES[weight] if s != "w4a16"),
        ops=("linear",),
        layouts=(AMD_MOE_DECODE_LAYOUTS["gfx950", weight],),
        configure=_dense_tile,
        acts=("e4m3", "e2m1", "fp8_static"),
    )


_HOPPER_FEW = 4
"""Routed rows an expert, on average, up to which blocks of 8 rows beat those of 16 (measured on an H200)."""

_HOPPER_TILES = {
    ("e4m3", 8): ((64, 128, 6), (128, 64, 6)),
    ("bf16", 8): ((128, 64, 6), (128, 64, 6)),
    ("e4m3", 16): ((128, 64, 6), (128, 64, 6)),
    ("e4m3", 32): ((128, 64, 6), (128, 64, 6)),
    ("e4m3", 64): ((128, 64, 6), (128, 64, 6)),
    ("bf16", 16): ((128, 64, 6), (128, 64, 6)),
    ("bf16", 32): ((128, 64, 6), (128, 64, 6)),
    ("bf16", 64): ((128, 64, 6), (128, 64, 6)),
}
"""Format of x and BLOCK_M -> BLOCK_N, BLOCK_K and stages of gate_up and of down: what searches on an H100 took most
often, of e4m3 up to 32 rows searches on an H200 (`configs/packs/sm_90`). Elsewhere four stages: at the largest tile
half of the shared memory."""


def _hopper_tile(x_format: str) -> Callable[[GemmProblem], Config]:
    """The tiles of experts that nobody tuned, and of dense layers; with few rows, best on an H200 (docs/decode.md)."""

    def tile(problem: GemmProblem) -> Config:
        if not problem.moe and problem.m <= 64 and x_format == "e4m3":
            few, alone = problem.m <= 32, problem.n <= 64 * problem.cu_count  # a block to a multiprocessor
            e4m3 = scheme(problem.scheme).weight == "e4m3"
            if alone and (e4m3 or not few):
                block_n, stages = 64, (8 if e4m3 else 10)
            else:
                block_n, stages = (64, 6) if few or problem.n < 16384 else (128, 4)
            return Config(max(8, next_pow2(problem.m)), block_n, 128, num_warps=4, num_stages=stages)
        block_m = routed_block_m(problem)
        if problem.moe and not problem.block_m and problem.rows <= _HOPPER_FEW * problem.e_total:
            block_m = 8
        both = _HOPPER_TILES.get((x_format, block_m)) if problem.moe else None
        block_n, block_k, stages = both[problem.op == "moe_down"] if both else (128, 64, 4)
        return Config(block_m, block_n, block_k, num_warps=4, num_stages=stages)

    return tile


def _hopper_lds(x_bytes: int) -> Callable[[GemmProblem, Config], int]:
    """Every stage holds a tile of x, and one of weights with, for e2m1, a scale byte a block, half of one where x is
    e4m3 (`HopperConfig`), for int4 a word a group."""

    def need(problem: GemmProblem, config: Config) -> int:
        block_m, block_n, block_k = config.tile
        e2m1 = block_k // (32 if x_bytes == 2 else 64)
        scales = {"e2m1": e2m1, "e4m3": 0, "int4": 4 * max(1, block_k // (problem.group or block_k))}
        w = block_k * problem.weight_bits // 8 + scales[scheme(problem.scheme).weight]
        return (config.num_stages or 1) * (block_m * block_k * x_bytes + block_n * w)

    return need


def _hopper(x_format: str, schemes: tuple[str, ...], acts: tuple[str, ...]) -> KernelSpec:
    return KernelSpec(
        f"triton_hopper_{x_format}",
        SHIPPED,
        "kernels/triton/hopper_moe.py",
        archs=("sm_90",),
        schemes=schemes,
        ops=("linear", "moe_gate_up", "moe_down"),
        layouts=(f"hopper_{x_format}",),
        space={
            "block_m": (8, 16, 32, 64, 128, 256),
            "block_n": (64, 128, 256),
            "block_k": (64, 128),
            "num_warps": (4, 8),
            "num_stages": (3, 4, 5, 6, 8, 10, 12, 16),
            "group_m": (1, 2, 4, 8, 16),
            "max_registers": (0, 64, 72, 80, 96, 128),
        },
        configure=_hopper_tile(x_format),
        triton=True,
        acts=acts,
        fuses=("bias", "activation"),
        activations=("silu", "swigluoai"),
        lds=_hopper_lds(2 if x_format == "bf16" else 1),
        x_dtypes=("bf16",),
        k_multiple=32,
        n_multiple=16,
    )


_UNNAMED = {"e4m3": "mxfp8_static", "e2m1": "w4a8_static", "int4": "int4_w4a16_fp16"}
"""Weight format -> code objects that no scheme names: of static fp8, of fp16."""


def _amd_decode(arch: str, weight: str) -> KernelSpec:
    schemes, int4 = DECODE_SCHEMES[weight], weight == "int4"
    return KernelSpec(
        f"hip_decode_{arch}_{weight}",
        SHIPPED,
        "kernels/hip/decode_gemm.hip",
        archs=(arch,),
        schemes=schemes,
        ops=("linear",),
        layouts=(AMD_DECODE_LAYOUTS[arch, weight], AMD_MOE_DECODE_LAYOUTS[arch, weight]),
        acts=("bf16",) if int4 else ("e4m3", "e2m1", "bf16", "fp8_static"),
        groups=INT4_GROUPS if int4 else (),
        out_dtypes=("bf16", "fp16", "fp32"),
        **(_GATED | {"fuses": ("quantize_input", "bias", "activation")}),
        x_dtypes=("bf16", "fp16") if int4 else ("bf16",),
        refuses=why_none_fits,
        code_objects=tuple(f"decode_{s}" for s in (*schemes, _UNNAMED[weight])),
        m_max=64,
        k_multiple=32,
    )


def _moe_decode_block(problem: GemmProblem) -> Config:
    """Blocks of four rows where hardly an expert has more, and down is a decode kernel's too (`RULES`)."""
    return Config(block_m=problem.block_m or (4 if problem.rows <= 8 else 16))


def _amd_moe_decode(arch: str, weight: str) -> KernelSpec:
    return replace(
        _amd_decode(arch, weight),
        name=f"hip_moe_decode_{arch}_{weight}",
        ops=_EXPERTS,
        layouts=(AMD_MOE_DECODE_LAYOUTS[arch, weight],),
        space={"block_m": AMD_MOE_DECODE_M},
        configure=_moe_decode_block,
        out_dtypes=("bf16", "fp16") if weight == "int4" else ("bf16",),
        m_max=0,
        n_multiple=16,
    )


_SM90_DECODE = KernelSpec(
    "hip_decode",
    SHIPPED,
    "kernels/hip/decode_gemm.hip",
    archs=("sm_90",),
    schemes=("w4a16",),
    ops=("linear",),
    layouts=("hopper_bf16",),
    acts=("bf16",),
    out_dtypes=("bf16", "fp16", "fp32"),
    fuses=("quantize_input", "bias", "activation"),
    activations=("silu", "swigluoai"),
    clamps=False,
    betas=(None, 1.0),
    x_dtypes=("bf16",),
    lds=_decode_lds,
    code_objects=("decode_w4a16",),
    m_max=64,
    k_multiple=32,
)

SHIPPED_KERNELS = (
    KernelSpec(
        "gemv_mxfp4",
        SHIPPED,
        "kernels/hip/gemv_mxfp4.hip",
        archs=GPUS,
        schemes=("w4a16",),
        ops=("linear",),
        out_dtypes=("bf16", "fp32"),
        fuses=("bias",),
        x_dtypes=("bf16",),
        code_objects=("gemv_mxfp4",),
        m_max=4,
        k_multiple=32,
    ),
    _SM90_DECODE,
    replace(
        _SM90_DECODE,
        name="hip_decode_e4m3",
        schemes=("mxfp8", "w4a8", "mxfp4"),
        layouts=("hopper_e4m3",),
        acts=("e4m3", "e2m1", "fp8_static"),
        code_objects=tuple(f"decode_{scheme}" for scheme in QUANTIZED_SCHEMES),
    ),
    replace(
        _SM90_DECODE,
        name="hip_decode_int4",
        fuses=("quantize_input", "bias"),
        activations=(),
        schemes=("int4_w4a16",),
        layouts=("mma_int4+tile_group",),
        groups=INT4_GROUPS,
        x_dtypes=("bf16", "fp16"),
        code_objects=("decode_int4_w4a16", "decode_int4_w4a16_fp16"),
    ),
    *(_amd_decode(arch, weight) for arch, weight in AMD_DECODE_LAYOUTS),
    *(_amd_moe_decode(arch, weight) for arch, weight in AMD_MOE_DECODE_LAYOUTS),
    *(_mx_registers(weight, op, ("gfx942", "gfx11")) for weight in _MX for op in ("gemm", "moe")),
    *(_mx_registers("e2m1", op, ("gfx950",), "bf16") for op in ("gemm", "moe")),
    *(_mx_registers("e2m1", op, ("gfx950", "gfx942", "gfx11"), "fp16") for op in ("gemm", "moe")),
    _mx_gemm(
        "triton_mx_gemm",
        ("linear",),
        ("strided", "mma_tile+mma_scale", *_dequantized(AMD_DECODE_LAYOUTS)),
    ),
    _MOE,
    *map(_gated_gemm, _MX),
    _mx_gemm("triton_mx_moe", _EXPERTS),
    _int4_gemm("triton_int4_gemm", ("linear",), AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS),
    _int4_gemm("triton_int4_moe", _EXPERTS, AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS),
    _fp16_gemm("triton_fp16_gemm", ("linear",)),
    _fp16_gemm("triton_fp16_moe", _EXPERTS),
    _hopper("bf16", ("w4a16", "w4a8", "mxfp4"), ("bf16", "e4m3", "e2m1")),
    _hopper("e4m3", ("mxfp8", "w4a8", "mxfp4"), ("e4m3", "e2m1", "fp8_static")),
    replace(
        _hopper("bf16", ("int4_w4a16",), ("bf16",)),
        name="triton_hopper_int4",
        activates_in=HOPPER_INT4[1:],
        layouts=HOPPER_INT4,
        groups=INT4_GROUPS,
        out_dtypes=("bf16", "fp16"),
        x_dtypes=("bf16", "fp16"),
    ),
)

for _spec in SHIPPED_KERNELS:
    register(_spec)
