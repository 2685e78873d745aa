"""Whether a kernel may be chosen for a problem, by facts written down here a second time.

`violations` shares no code with `legality.py`: it restates, kernel by kernel, what the sources say. A rule is its name
and whether a choice breaks it. A kernel has the rules of every function below that is `of` it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from sglang_amd_quant.selection import SOURCES, GemmProblem, KernelChoice
from sglang_amd_quant.selection.arch import ARCHES

LDS = {"gfx950": 163_840, "gfx942": 65_536, "gfx1250": 327_680, "gfx11": 65_536, "sm_90": 232_448}
BITS = {"e2m1": 4, "e4m3": 8, "fp8_static": 8, "bf16": 16}
WEIGHT_BITS = {"mxfp4": 4, "w4a8": 4, "w4a16": 4, "int4_w4a16": 4, "mxfp8": 8}
WEIGHTS = {"mxfp4": "e2m1", "w4a8": "e2m1", "w4a16": "e2m1", "int4_w4a16": "int4", "mxfp8": "e4m3"}
NOT_BF16 = ("fp16", "fp32")
"""Output dtypes of models whose activations are not bf16; `mxfp8` and `mxfp4` are handed on by models in bf16."""

DECODE_LAYOUT = {
    "hip_decode_gfx950_e2m1": "preshuffle+tile_scale",
    "hip_decode_gfx950_e4m3": "mxfp8_lane+tile_scale",
    "hip_decode_gfx950_int4": "cdna_int4+tile_group",
    "hip_decode_gfx942_e2m1": "cdna3_e2m1+tile_scale",
    "hip_decode_gfx942_e4m3": "cdna3_e4m3+tile_scale",
    "hip_decode_gfx942_int4": "cdna_int4+tile_group",
    "hip_decode_gfx11_e2m1": "preshuffle+tile_scale",
    "hip_decode_gfx11_e4m3": "preshuffle+tile_scale",
    "hip_decode_gfx11_int4": "rdna_int4+tile_group",
}
MOE_DECODE_LAYOUT = {f"hip_moe_{name[4:]}": f"decode_{layout.split('+')[0]}" for name, layout in DECODE_LAYOUT.items()}
OCP_DECODE_LAYOUTS, OCP_MOE_DECODE_LAYOUTS = (
    tuple(layout for layout in layouts.values() if "int4" not in layout and "cdna3_e4m3" not in layout)
    for layouts in (DECODE_LAYOUT, MOE_DECODE_LAYOUT)
)
"""Those of MX weights that hold OCP codes, which is not gfx942's of e4m3."""
INT4_LAYOUTS = ("cdna_int4+tile_group", "rdna_int4+tile_group")
HOPPER_INT4_LAYOUTS = ("mma_int4+tile_group", "decode_mma_int4")

MX = ("gemv_mxfp4", "triton_mx_gemm", "triton_mx_moe")
INT4 = ("triton_int4_gemm", "triton_int4_moe")
REGISTERS = {f"triton_{w}_{op}": ("gfx942", "gfx11") for w in ("e2m1", "e4m3") for op in ("gemm", "moe")}
REGISTERS |= {f"triton_e2m1_bf16_{op}": ("gfx950",) for op in ("gemm", "moe")}
REGISTERS |= {f"triton_e2m1_fp16_{op}": ("gfx950", "gfx942", "gfx11") for op in ("gemm", "moe")}
FP16 = ("triton_fp16_gemm", "triton_fp16_moe")
GATED = ("triton_gated_e2m1_gemm", "triton_gated_e4m3_gemm")
HOPPER_MX = ("triton_hopper_bf16", "triton_hopper_e4m3")
HOPPER = (*HOPPER_MX, "triton_hopper_int4")
HOPPER_DECODE = ("hip_decode", "hip_decode_e4m3", "hip_decode_int4")

_FOUR = ("gfx950", "gfx942", "gfx11", "sm_90")
ON = {
    "hip_mxfp8_gemv": ("gfx950",),
    "hip_mxfp8_mfma": ("gfx950",),
    "hip_mxfp8_moe": ("gfx950",),
    "hip_moe_w4a16_wmma": ("gfx11",),
    "triton_moe_mxfp8": ("gfx950",),
    "triton_moe_w4a16": ("gfx950", "gfx942", "gfx11"),
    **dict.fromkeys(("triton_moe_a8w4", "triton_gemm_mx", "triton_moe", *MX, *INT4, *FP16), _FOUR),
    **dict.fromkeys((*HOPPER, *HOPPER_DECODE), ("sm_90",)),
    **dict.fromkeys(GATED, ("gfx950",)),
    **{name: (name.split("_")[2],) for name in DECODE_LAYOUT},
    **{name: (name.split("_")[3],) for name in MOE_DECODE_LAYOUT},
    **REGISTERS,
}
"""Kernel -> archs that it is of."""


class Case(NamedTuple):
    """A choice and what it is for."""

    p: GemmProblem
    choice: KernelChoice

    @property
    def kernel(self) -> str:
        return self.choice.kernel

    @property
    def layout(self) -> str:
        return self.choice.layout

    @property
    def linear(self) -> bool:
        return self.p.op == "linear"

    @property
    def unquantized(self) -> bool:
        """Whether activations are multiplied as they come."""
        return self.p.act == "bf16"

    @property
    def gated_by_kernel(self) -> bool:
        """Whether a fused activation is one that MoE kernels have."""
        return self.p.epilogue.activation in (None, "silu", "swigluoai") and self.p.epilogue.gated

    @property
    def leaves_epilogue(self) -> bool:
        """Whether activation or bias is left to the op."""
        return bool({"activation", "bias"} & set(self.choice.unfused))


Rules = Iterator[tuple[str, object]]
Judge = Callable[[Case], Rules]
JUDGES: list[tuple[tuple[str, ...], Judge]] = []
"""Kernels, and what is said of them."""


def of(*kernels: str) -> Callable[[Judge], Judge]:
    """Registers the rules of these kernels."""

    def register(judge: Judge) -> Judge:
        JUDGES.append((kernels, judge))
        return judge

    return register


def violations(p: GemmProblem, choice: KernelChoice) -> list[str]:
    """The rules that a choice breaks."""
    if choice.kernel == "reference":
        return [] if choice.source == "reference" and choice.reasons else ["the reference says why"]
    case = Case(p, choice)
    rules = (rule for kernels, judge in JUDGES if choice.kernel in kernels for rule in judge(case))
    return [name for name, broken in rules if broken]


@of(*ON)
def any_kernel(case: Case) -> Rules:
    p, c = case.p, case.choice.config
    yield "arch", p.arch not in ON[case.kernel]
    yield "source", case.choice.source not in SOURCES
    yield "layout is not the weights'", p.layout is not None and case.layout != p.layout
    yield "block_m is not routing's", p.block_m and c.block_m not in (None, p.block_m)


# ---- kernels of this package, of which the op does what they do not fuse ----


def activation_of_a_linear(case: Case, alternate: bool) -> Rules:
    """`alternate`: the weights' rows are 8 gates and 8 ups by turns, which kernels take together, and the op cannot."""
    e = case.p.epilogue
    yield "activation is whose it is", bool(e.activation) and alternate == ("activation" in case.choice.unfused)
    yield "no activation", not e.activation and "activation" in case.choice.unfused
    if e.activation and alternate:
        yield "an activation that kernels have", not case.gated_by_kernel
        yield "rows by turns", case.p.n % 16


@of(*MX, *INT4, *FP16, *REGISTERS)
def bare_gemm(case: Case) -> Rules:
    p, unfused = case.p, case.choice.unfused
    yield from activation_of_a_linear(case, case.linear and case.layout.startswith("decode_"))
    yield "quantization is the op's", (p.out_dtype in ("mxfp8", "mxfp4")) != ("quantize" in unfused)


@of(*MX)
def mx(case: Case) -> Rules:
    p = case.p
    packed = ("mma_tile+mma_scale", *OCP_DECODE_LAYOUTS) if case.kernel == "triton_mx_gemm" else ()
    yield "int4", p.scheme == "int4_w4a16"
    yield "layout read", case.layout not in ("strided", *packed)
    yield "x is bf16 where nothing quantizes it", case.unquantized and p.out_dtype in NOT_BF16
    yield "op", case.linear != (case.kernel != "triton_mx_moe")


@of("gemv_mxfp4")
def gemv_mxfp4(case: Case) -> Rules:
    yield "gemv", case.p.scheme != "w4a16" or not 1 <= case.p.m <= 4


@of(*INT4)
def int4(case: Case) -> Rules:
    p = case.p
    own = {"gfx950": "cdna_int4", "gfx942": "cdna_int4", "gfx11": "rdna_int4"}.get(p.arch, "none")
    moe = case.kernel == "triton_int4_moe"
    least_k = 128 if "cdna" in case.layout else 32
    yield "scheme", p.scheme != "int4_w4a16" or not case.unquantized or p.group not in (32, 64, 128)
    yield "op", case.linear == moe
    yield "layout read", case.layout not in ("strided", f"{own}+tile_group", f"decode_{own}")
    yield "whole tiles of gates and ups", case.layout in ("decode_cdna_int4", "decode_rdna_int4") and p.n % 16
    yield "x is bf16 or fp16", p.out_dtype == "fp32"
    yield "tiles of the layout", case.choice.config.block_k < least_k


@of(*REGISTERS)
def registers(case: Case) -> Rules:
    p = case.p
    weights = case.kernel.split("_")[1]
    values = f"cdna3_{weights}" if p.arch == "gfx942" else "preshuffle"
    own = (*((f"{values}+tile_scale",) if case.linear else ()), f"decode_{values}")
    schemes = {"e2m1": ("w4a16", "w4a8", "mxfp4"), "e4m3": ("mxfp8",)}[weights]
    tile = {"cdna3_e2m1": 128, "cdna3_e4m3": 64, "preshuffle": 64 if weights == "e2m1" else 32}
    yield "op", case.linear != case.kernel.endswith("gemm")
    yield "operands", p.scheme not in schemes or (weights == "e4m3" and case.unquantized)
    yield "MX has a matrix unit", p.arch == "gfx950" and not case.unquantized
    yield "layout read", case.layout not in ("strided", *own)
    yield "whole tiles of gates and ups", case.layout.startswith("decode_") and p.n % 16
    yield "tiles of the layout", case.layout in own and case.choice.config.block_k < tile[values]
    fp16 = "_fp16_" in case.kernel
    yield "quantized", fp16 and not case.unquantized
    yield "x where nothing quantizes it", case.unquantized and p.out_dtype in ("bf16" if fp16 else "fp16", "fp32")


@of(*FP16)
def fp16(case: Case) -> Rules:
    p = case.p
    yield "op", case.linear != (case.kernel == "triton_fp16_gemm")
    yield "operands", p.scheme not in ("w4a16", "mxfp8") or not case.unquantized
    yield "x is fp16", p.out_dtype in ("bf16", "fp32")
    yield "layout read", case.layout != "strided"


@of(*GATED)
def gated(case: Case) -> Rules:
    p = case.p
    values = "mxfp8_lane" if "e4m3" in case.kernel else "preshuffle"
    yield from activation_of_a_linear(case, True)
    yield "op", not case.linear
    yield "operands", p.scheme not in (("mxfp8",) if "e4m3" in case.kernel else ("w4a8", "mxfp4")) or case.unquantized
    yield "layout read", case.layout != f"decode_{values}"
    yield "whole blocks of output", p.n % 32
    yield "dtype", p.out_dtype == "fp32"


# ---- decode, linears: 1 to 64 rows ----


@of(*HOPPER_DECODE, *DECODE_LAYOUT)
def decode(case: Case) -> Rules:
    yield "op", not case.linear or not 1 <= case.p.m <= 64
    yield from activation_of_a_linear(case, case.layout.startswith(("decode_", "hopper_")))


@of("hip_decode")
def decode_hopper_bf16(case: Case) -> Rules:
    p = case.p
    rows = next((r for r in (2, 4, 8, 16, 32) if p.m <= r), 32)
    yield "scheme", p.scheme != "w4a16"
    yield "layout", case.layout != "hopper_bf16"
    yield "x is bf16", p.out_dtype in NOT_BF16
    yield "activations of an eighth of K, in bf16", rows * 2 * p.k / 8 > LDS["sm_90"]


@of("hip_decode_e4m3")
def decode_hopper_e4m3(case: Case) -> Rules:
    p = case.p
    yield "scheme", p.scheme not in ("mxfp8", "w4a8", "mxfp4")
    yield "layout", case.layout != "hopper_e4m3"
    yield "x is quantized from bf16", case.unquantized or p.out_dtype in NOT_BF16
    yield "activations of an eighth of K, as bytes, of 8 rows; more stream", p.m <= 8 and p.k > LDS["sm_90"]


@of("hip_decode_int4")
def decode_hopper_int4(case: Case) -> Rules:
    p = case.p
    yield "scheme", p.scheme != "int4_w4a16"
    yield "layout", case.layout != "mma_int4+tile_group"
    yield "x is bf16 or fp16", p.out_dtype == "fp32"
    halves = 2 * p.m * p.k / 8
    yield "activations of an eighth of K, as halves, of 8 rows; more stream", p.m <= 8 and halves > LDS["sm_90"]


@of(*DECODE_LAYOUT)
def decode_amd(case: Case) -> Rules:
    p = case.p
    own = DECODE_LAYOUT[case.kernel]
    yield "layout", case.layout not in (own, f"decode_{own.split('+')[0]}")
    yield "weights", not case.kernel.endswith(WEIGHTS[p.scheme])
    yield "x is bf16, or fp16 with int4", p.out_dtype in (("fp32",) if p.scheme == "int4_w4a16" else NOT_BF16)


# ---- fused MoE ----


@of(*MOE_DECODE_LAYOUT)
def moe_decode(case: Case) -> Rules:
    p, e = case.p, case.p.epilogue
    bare = e.activation in ("silu", "swigluoai") and e.gated and e.beta in (None, 1)
    yield "op", case.linear or p.m < 1
    yield "layout", case.layout != MOE_DECODE_LAYOUT[case.kernel]
    yield "weights", not case.kernel.endswith(WEIGHTS[p.scheme])
    yield "whole tiles of gates and ups", p.n % 16
    yield "blocks", case.choice.config.block_m not in (4, 16)
    yield "dtype", p.out_dtype in (("fp32",) if p.scheme == "int4_w4a16" else NOT_BF16)
    yield "activation", e.activation is not None and not bare
    yield "activation and bias are its own", case.leaves_epilogue


@of("triton_moe")
def moe(case: Case) -> Rules:
    p = case.p
    yield "layout", case.layout not in ("strided", *OCP_MOE_DECODE_LAYOUTS)
    yield "format", "mxfp8" in case.layout and p.scheme != "mxfp8"
    yield "format", "e2m1" in case.layout and p.scheme == "mxfp8"
    yield "op or scheme", case.linear or p.scheme == "int4_w4a16"
    yield "dtype", p.out_dtype in (NOT_BF16 if case.unquantized else ("fp32",))
    yield "activation", not case.gated_by_kernel
    yield "whole blocks of output", p.n % 32
    yield "activation and bias are its own", case.leaves_epilogue


@of(*HOPPER_MX)
def hopper_mx(case: Case) -> Rules:
    p, bf16 = case.p, case.kernel == "triton_hopper_bf16"
    yield "packed", case.layout != case.kernel.removeprefix("triton_")
    yield "operands", (p.scheme, p.act) in (("mxfp8", "bf16"), ("w4a16", "e4m3")) or p.scheme == "int4_w4a16"
    yield "e4m3 weights", bf16 and p.scheme == "mxfp8"
    yield "one scale for x in bf16", bf16 and p.act == "fp8_static"
    yield "unquantized x in e4m3", not bf16 and case.unquantized
    yield "dtype", p.out_dtype in NOT_BF16


@of("triton_hopper_int4")
def hopper_int4(case: Case) -> Rules:
    p = case.p
    yield "layout", case.layout not in HOPPER_INT4_LAYOUTS
    yield "operands", p.scheme != "int4_w4a16" or not case.unquantized or p.group not in (32, 64, 128)
    yield "dtype", p.out_dtype == "fp32"


@of(*HOPPER)
def hopper(case: Case) -> Rules:
    yield "rows", case.p.n % 16
    yield "activation", not case.gated_by_kernel


# ---- published mechanisms ----


@of("hip_mxfp8_gemv", "hip_mxfp8_mfma", "hip_mxfp8_moe")
def hip_mxfp8(case: Case) -> Rules:
    p = case.p
    rows = p.m * p.top_k if p.op == "moe_down" else p.m
    yield "2 GiB", p.e_local * p.n * p.k > 2**31 - 1 or rows * p.k > 2**31 - 1
    yield "strided", case.layout != "strided"


@of("hip_mxfp8_gemv", "hip_mxfp8_mfma", "hip_mxfp8_moe", "hip_moe_w4a16_wmma")
def published_hip(case: Case) -> Rules:
    yield "out dtype", case.p.out_dtype in NOT_BF16


@of("hip_mxfp8_gemv")
def hip_mxfp8_gemv(case: Case) -> Rules:
    p = case.p
    yield "gemv", p.m > 16 or p.k % 32 or p.n % case.choice.config.block_n or not case.linear


@of("hip_mxfp8_mfma")
def hip_mxfp8_mfma(case: Case) -> Rules:
    p = case.p
    yield "mfma", p.m not in (8, 16, 32, 64) or p.k % 128 or (p.k // 128) % case.choice.config.split_k


@of("hip_mxfp8_moe")
def hip_mxfp8_moe(case: Case) -> Rules:
    p, c = case.p, case.choice.config
    a_div = p.top_k if p.op == "moe_gate_up" else 1
    yield "grouped", (p.k % 1024 and p.k != 768) or c.block_m % 4 or a_div not in (1, 4, 8) or p.n % c.block_n


@of("hip_moe_w4a16_wmma")
def hip_moe_w4a16_wmma(case: Case) -> Rules:
    p = case.p
    tile = {8: 256, 1: 512}.get(p.top_k if p.op == "moe_gate_up" else 1)
    yield "groups", p.group != 128 or p.k % 128
    yield "tiles", not tile or p.n % tile or case.choice.config.block_n != tile


# ---- tiles of Triton kernels ----

TRITON = tuple(name for name in ON if name.startswith("triton"))


@of(*TRITON)
def triton(case: Case) -> Rules:
    p, c = case.p, case.choice.config
    sizes = (c.block_m, c.block_n, c.block_k)
    yield "power of two", any(not size or size & (size - 1) for size in sizes)
    yield "stages", not 1 <= c.num_stages <= (16 if case.kernel in HOPPER else 8)
    yield "lanes", not 1 <= c.num_warps * ARCHES[p.arch].wave <= 1024
    yield "swizzle", "cdna4" in case.layout and (c.block_k < 256 or c.block_n < 32)
    if p.arch == "gfx950" and not case.unquantized:
        yield "scaled MFMA", c.num_warps < 2 or c.block_k < (64 if c.nonkdim == 32 else 128)
    if p.out_dtype in ("mxfp8", "mxfp4") and "quantize" not in case.choice.unfused:
        columns = c.block_n // 2 if p.epilogue.activation and p.epilogue.gated else c.block_n
        yield "32 columns", columns < 32
    if case.choice.source not in ("exact", "padded_m", "nearest_e"):  # those ran as they are
        yield "LDS", lds_bytes(case) > LDS[p.arch]


def lds_bytes(case: Case) -> int:
    """What a Triton kernel holds in LDS."""
    p, c = case.p, case.choice.config
    if case.kernel in HOPPER:
        return hopper_bytes(case)
    if case.kernel in (*INT4, *FP16, *REGISTERS):
        return group_bytes(case)
    dequantized = case.kernel in (*MX, "triton_moe") and p.arch != "gfx950"  # before they are multiplied
    bits_a, bits_b = (16, 16) if dequantized else (BITS[p.act], WEIGHT_BITS[p.scheme])
    pairs = case.kernel == "triton_moe" and p.op == "moe_gate_up" and p.epilogue.activation  # gate and up of a column
    a, b = c.block_m * c.block_k, c.block_n * c.block_k * (2 if pairs else 1)
    if p.arch not in ("gfx950", "gfx1250"):
        a, b = a * bits_a // 8, b * bits_b // 8
        return (a + b) * (c.num_stages - 1) or max(a, b)
    return c.num_stages * (padded(a, c.block_k) * bits_a + padded(b, c.block_k) * bits_b) // 8


def padded(n: int, block_k: int) -> int:
    """Elements that a tile of n takes, padded every 32 or every row, whichever is more."""
    by_32 = n + n // 32 * 4 - (4 if n % 32 == 0 else 0)
    by_row = n + n // block_k * 8 - (8 if n % block_k == 0 else 0)
    return max(by_32, by_row)


def hopper_bytes(case: Case) -> int:
    """What its pipeline holds: each stage a tile of x, and one of weights with a scale byte a block of e2m1, four bits
    where x is e4m3, or a word for every group that it has a part of."""
    p, c = case.p, case.choice.config
    narrow = case.kernel == "triton_hopper_e4m3"
    x = c.block_k * c.block_m * (1 if narrow else 2)
    w = c.block_k * c.block_n // (1 if p.scheme == "mxfp8" else 2)
    blocks = c.block_k // 32
    scales = {"mxfp8": 0, "int4_w4a16": 4 * -(-c.block_k // p.group)}.get(p.scheme, blocks / 2 if narrow else blocks)
    return int(c.num_stages * (x + w + c.block_n * scales))


def group_bytes(case: Case) -> int:
    """x of every stage, on AMD of all but one, with codes and scales of weights on NVIDIA; and dequantized weights, on
    AMD of one product; where weights stay in registers there x of one step alone."""
    p, c = case.p, case.choice.config
    step, depth = max(c.block_k, p.group), min(c.block_k, p.group)
    if p.arch == "sm_90":
        scale = 4 if p.scheme == "int4_w4a16" else 1
        x = 2 * c.block_m * step + c.block_n * step * WEIGHT_BITS[p.scheme] // 8 + scale * c.block_n * step // p.group
        return int(c.num_stages * x + 2 * c.block_n * step)
    if case.kernel not in FP16:
        return int(2 * c.block_m * step)
    return int(max((c.num_stages - 1) * 2 * c.block_m * step, 2 * c.block_m * depth) + 2 * c.block_n * depth)
