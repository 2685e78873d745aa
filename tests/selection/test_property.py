"""No choice is ever illegal: 10,000 random problems per arch, judged by facts written down here a second time.

The judge (`violations`) shares no code with `legality.py`: it restates, kernel by kernel, what the sources say.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sglang_amd_quant.selection import SOURCES, Epilogue, GemmProblem, KernelChoice, Selector, kernels, shipped
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.pack_csv import load_file
from sglang_amd_quant.selection.packs import Packs

PROBLEMS = 10_000
LDS = {"gfx950": 163_840, "gfx942": 65_536, "gfx1250": 327_680, "gfx11": 65_536, "sm_90": 232_448}
BITS = {"e2m1": 4, "e4m3": 8, "fp8_static": 8, "bf16": 16}
WEIGHT_BITS = {"mxfp4": 4, "w4a8": 4, "w4a16": 4, "int4_w4a16": 4, "mxfp8": 8}
ON = {
    "hip_mxfp8_gemv": ("gfx950",),
    "hip_mxfp8_mfma": ("gfx950",),
    "hip_mxfp8_moe": ("gfx950",),
    "hip_moe_w4a16_wmma": ("gfx11",),
    "triton_moe_mxfp8": ("gfx950",),
    "triton_moe_a8w4": ("gfx950", "gfx942", "gfx11", "sm_90"),
    "triton_gemm_mx": ("gfx950", "gfx942", "gfx11", "sm_90"),
    "triton_moe_w4a16": ("gfx950", "gfx942", "gfx11"),
    "gemv_mxfp4": ("gfx950", "gfx942", "gfx11", "sm_90"),
    "triton_mx_gemm": ("gfx950", "gfx942", "gfx11", "sm_90"),
    "triton_mx_moe": ("gfx950", "gfx942", "gfx11", "sm_90"),
}
ON |= dict.fromkeys(("triton_hopper_bf16", "triton_hopper_e4m3", "triton_hopper_int4"), ("sm_90",))
ON |= {"hip_decode": ("sm_90",), "hip_decode_e4m3": ("sm_90",)}
DECODE_LAYOUT = {
    "hip_decode_gfx950_e2m1": "preshuffle+tile_scale",
    "hip_decode_gfx950_e4m3": "mxfp8_lane+tile_scale",
    "hip_decode_gfx942_e2m1": "cdna3_e2m1+tile_scale",
    "hip_decode_gfx942_e4m3": "cdna3_e4m3+tile_scale",
    "hip_decode_gfx11_e2m1": "preshuffle+tile_scale",
    "hip_decode_gfx11_e4m3": "preshuffle+tile_scale",
}
DECODE_LAYOUT |= {f"hip_decode_{arch}_int4": "cdna_int4+tile_group" for arch in ("gfx950", "gfx942")}
DECODE_LAYOUT["hip_decode_gfx11_int4"] = "rdna_int4+tile_group"
ON |= {name: (name.split("_")[2],) for name in DECODE_LAYOUT}
ON["hip_decode_int4"] = ("sm_90",)
ON["triton_moe"] = ("gfx950", "gfx942", "gfx11", "sm_90")
MOE_DECODE_LAYOUT = {f"hip_moe_{name[4:]}": f"decode_{layout.split('+')[0]}" for name, layout in DECODE_LAYOUT.items()}
ON |= {name: (name.split("_")[3],) for name in MOE_DECODE_LAYOUT}
INT4 = ("triton_int4_gemm", "triton_int4_moe")
INT4_LAYOUTS = ("cdna_int4+tile_group", "rdna_int4+tile_group")
HOPPER_INT4 = ("mma_int4+tile_group", "decode_mma_int4")
ON |= dict.fromkeys(INT4, ("gfx950", "gfx942", "gfx11", "sm_90"))
REGISTERS = {f"triton_{w}_{op}": ("gfx942", "gfx11") for w in ("e2m1", "e4m3") for op in ("gemm", "moe")}
REGISTERS |= {f"triton_e2m1_bf16_{op}": ("gfx950",) for op in ("gemm", "moe")}
REGISTERS |= {f"triton_e2m1_fp16_{op}": ("gfx950", "gfx942", "gfx11") for op in ("gemm", "moe")}
ON |= REGISTERS
FP16 = ("triton_fp16_gemm", "triton_fp16_moe")
ON |= dict.fromkeys(FP16, ("gfx950", "gfx942", "gfx11", "sm_90"))
HOPPER = ("triton_hopper_bf16", "triton_hopper_e4m3")
OWN = ("gemv_mxfp4", "triton_mx_gemm", "triton_mx_moe")


def ocp(layouts):
    """Those of MX weights that hold OCP codes, which is not gfx942's of e4m3."""
    return [name for name in layouts.values() if "int4" not in name and "cdna3_e4m3" not in name]


def lds(arch, c, bits_a, bits_b):
    a, b = c.block_m * c.block_k, c.block_n * c.block_k
    if arch not in ("gfx950", "gfx1250"):
        a, b = a * bits_a // 8, b * bits_b // 8
        return (a + b) * (c.num_stages - 1) or max(a, b)
    padded = []
    for n in (a, b):
        by_32 = n + n // 32 * 4 - (4 if n % 32 == 0 else 0)
        by_row = n + n // c.block_k * 8 - (8 if n % c.block_k == 0 else 0)
        padded.append(max(by_32, by_row))
    return c.num_stages * (padded[0] * bits_a + padded[1] * bits_b) // 8


def hopper_bytes(kernel, p, c):
    """What its pipeline holds: each stage a tile of x, and one of weights with a scale byte a block of e2m1, or a word
    for every group that it has a part of."""
    x = c.block_k * c.block_m * (1 if kernel.endswith("e4m3") else 2)
    w = c.block_k * c.block_n // (1 if p.scheme == "mxfp8" else 2)
    scales = {"mxfp8": 0, "int4_w4a16": 4 * -(-c.block_k // p.group)}.get(p.scheme, c.block_k // 32)
    return c.num_stages * (x + w + c.block_n * scales)


def group_bytes(p, c, registers):
    """x of every stage, on AMD of all but one, with codes and scales of weights on NVIDIA; and dequantized weights, on
    AMD of one product; where weights stay in registers there x of one step alone."""
    step, depth = max(c.block_k, p.group), min(c.block_k, p.group)
    if p.arch == "sm_90":
        scale = 4 if p.scheme == "int4_w4a16" else 1
        x = 2 * c.block_m * step + c.block_n * step * WEIGHT_BITS[p.scheme] // 8 + scale * c.block_n * step // p.group
        return c.num_stages * x + 2 * c.block_n * step
    if registers:
        return 2 * c.block_m * step
    return max((c.num_stages - 1) * 2 * c.block_m * step, 2 * c.block_m * depth) + 2 * c.block_n * depth


def violations(p: GemmProblem, choice: KernelChoice) -> list[str]:
    c, out = choice.config, []
    if choice.kernel == "reference":
        return [] if choice.source == "reference" and choice.reasons else ["the reference says why"]
    if p.arch not in ON[choice.kernel]:
        out.append("arch")
    if choice.source not in SOURCES:
        out.append("source")
    if p.layout is not None and choice.layout != p.layout:
        out.append("layout is not the weights'")
    if p.block_m and c.block_m not in (None, p.block_m):
        out.append("block_m is not routing's")
    if choice.kernel in OWN:
        out += ["int4"] * (p.scheme == "int4_w4a16")
        unpacked = ("mma_tile+mma_scale", *ocp(DECODE_LAYOUT))
        read = ("strided", *(unpacked if choice.kernel == "triton_mx_gemm" else ()))
        out += ["layout read"] * (choice.layout not in read)
        out += ["x is bf16 where nothing quantizes it"] * (p.act == "bf16" and p.out_dtype in ("fp16", "fp32"))
        out += ["op"] * ((p.op == "linear") != (choice.kernel != "triton_mx_moe"))
    if choice.kernel in INT4:
        out += ["scheme"] * (p.scheme != "int4_w4a16" or p.act != "bf16" or p.group not in (32, 64, 128))
        out += ["op"] * ((p.op == "linear") != (choice.kernel == "triton_int4_gemm"))
        paired = ("decode_cdna_int4", "decode_rdna_int4")
        own = {"gfx950": "cdna_int4", "gfx942": "cdna_int4", "gfx11": "rdna_int4"}.get(p.arch, "none")
        moe = choice.kernel == "triton_int4_moe"
        read = ("strided", f"{own}+tile_group", *((f"decode_{own}",) if moe else ()))
        out += ["layout read"] * (choice.layout not in read)
        out += ["whole tiles of gates and ups"] * (choice.layout in paired and bool(p.n % 16))
        out += ["x is bf16 or fp16"] * (p.out_dtype == "fp32")
        out += ["tiles of the layout"] * (c.block_k < {"cdna": 128}.get(choice.layout.removeprefix("decode_")[:4], 32))
    if choice.kernel in REGISTERS:
        weights = choice.kernel.split("_")[1]
        values = f"cdna3_{weights}" if p.arch == "gfx942" else "preshuffle"
        own = f"{values}+tile_scale" if p.op == "linear" else f"decode_{values}"
        out += ["op"] * ((p.op == "linear") != choice.kernel.endswith("gemm"))
        schemes = {"e2m1": ("w4a16", "w4a8", "mxfp4"), "e4m3": ("mxfp8",)}[weights]
        out += ["operands"] * (p.scheme not in schemes or (weights == "e4m3" and p.act == "bf16"))
        out += ["MX has a matrix unit"] * (p.arch == "gfx950" and p.act != "bf16")
        out += ["quantized"] * ("_fp16_" in choice.kernel and p.act != "bf16")
        out += ["layout read"] * (choice.layout not in ("strided", own))
        out += ["whole tiles of gates and ups"] * (choice.layout.startswith("decode_") and bool(p.n % 16))
        tile = {"cdna3_e2m1": 128, "cdna3_e4m3": 64, "preshuffle": 64 if weights == "e2m1" else 32}
        out += ["tiles of the layout"] * (choice.layout == own and c.block_k < tile[values])
        other = "bf16" if "_fp16_" in choice.kernel else "fp16"
        out += ["x where nothing quantizes it"] * (p.act == "bf16" and p.out_dtype in (other, "fp32"))
    if choice.kernel in FP16:
        out += ["op"] * ((p.op == "linear") != (choice.kernel == "triton_fp16_gemm"))
        out += ["operands"] * (p.scheme not in ("w4a16", "mxfp8") or p.act != "bf16")
        out += ["x is fp16"] * (p.out_dtype in ("bf16", "fp32"))
        out += ["layout read"] * (choice.layout != "strided")
    if choice.kernel in (*OWN, *INT4, *FP16, *REGISTERS):
        out += ["activation and quantization are the op's"] * (
            bool(p.epilogue.activation) != ("activation" in choice.unfused)
            or ("quantize" in choice.unfused) != (p.out_dtype in ("mxfp8", "mxfp4"))
        )
    weights = {"mxfp8": "e4m3", "int4_w4a16": "int4"}.get(p.scheme, "e2m1")
    if choice.kernel == "hip_decode_int4":
        out += ["op"] * (p.op != "linear" or p.scheme != "int4_w4a16" or not 1 <= p.m <= 64)
        out += ["layout"] * (choice.layout != "mma_int4+tile_group")
        out += ["x is bf16 or fp16"] * (p.out_dtype == "fp32")
        out += ["activations of an eighth of K, as halves, of 8 rows; more stream"] * (
            p.m <= 8 and 2 * p.m * p.k / 8 > LDS["sm_90"]
        )
    elif choice.kernel == "hip_decode_e4m3":
        out += ["op"] * (p.op != "linear" or p.scheme not in ("mxfp8", "w4a8", "mxfp4") or not 1 <= p.m <= 64)
        out += ["layout"] * (choice.layout != "hopper_e4m3")
        out += ["x is quantized from bf16"] * (p.act == "bf16" or p.out_dtype in ("fp16", "fp32"))
        out += ["activations of an eighth of K, as bytes, of 8 rows; more stream"] * (p.m <= 8 and p.k > LDS["sm_90"])
    elif choice.kernel.startswith("hip_decode_"):
        out += ["op"] * (p.op != "linear" or not 1 <= p.m <= 64)
        out += ["layout"] * (choice.layout != DECODE_LAYOUT[choice.kernel])
        out += ["weights"] * (not choice.kernel.endswith(weights))
        out += ["x is bf16, or fp16 with int4"] * (p.out_dtype in ("fp32", "" if weights == "int4" else "fp16"))
    if choice.kernel.startswith("hip_moe_decode_"):
        e = p.epilogue
        out += ["op"] * (p.op == "linear" or p.m < 1)
        out += ["layout"] * (choice.layout != MOE_DECODE_LAYOUT[choice.kernel])
        out += ["weights"] * (not choice.kernel.endswith(weights))
        out += ["whole tiles of gates and ups"] * bool(p.n % 16)
        out += ["blocks"] * (c.block_m not in (4, 16))
        out += ["dtype"] * (p.out_dtype in ("fp32", "" if weights == "int4" else "fp16"))
        bare = e.activation in ("silu", "swigluoai") and e.gated and e.beta in (None, 1)
        out += ["activation"] * (e.activation is not None and not bare)
        out += ["activation and bias are its own"] * bool({"activation", "bias"} & set(choice.unfused))
    if choice.kernel == "hip_decode":
        out += ["op"] * (p.op != "linear" or p.scheme != "w4a16" or not 1 <= p.m <= 64)
        out += ["layout"] * (choice.layout != "hopper_bf16")
        out += ["x is bf16"] * (p.out_dtype in ("fp16", "fp32"))
        rows = next(r for r in (2, 4, 8, 16, 32, 64) if p.m <= r)
        out += ["activations of an eighth of K, in bf16"] * (min(rows, 32) * 2 * p.k / 8 > LDS["sm_90"])
    if choice.kernel == "triton_moe":
        e = p.epilogue
        out += ["layout"] * (choice.layout not in ("strided", *ocp(MOE_DECODE_LAYOUT)))
        out += ["format"] * (
            ("mxfp8" in choice.layout and p.scheme != "mxfp8") or ("e2m1" in choice.layout and p.scheme == "mxfp8")
        )
        out += ["op or scheme"] * (p.op == "linear" or p.scheme == "int4_w4a16")
        out += ["dtype"] * (p.out_dtype in ("fp32", "fp16" if p.act == "bf16" else ""))
        out += ["activation"] * (e.activation not in (None, "silu", "swigluoai") or not e.gated)
        out += ["whole blocks of output"] * bool(p.n % 32)
        out += ["activation and bias are its own"] * bool({"activation", "bias"} & set(choice.unfused))
    if choice.kernel in HOPPER:
        e = p.epilogue
        out += ["packed"] * (choice.layout != choice.kernel.removeprefix("triton_"))
        out += ["operands"] * ((p.scheme, p.act) in (("mxfp8", "bf16"), ("w4a16", "e4m3")) or p.scheme == "int4_w4a16")
        out += ["e4m3 weights"] * (choice.kernel == "triton_hopper_bf16" and p.scheme == "mxfp8")
        out += ["unquantized x in e4m3"] * (choice.kernel == "triton_hopper_e4m3" and p.act == "bf16")
        out += ["one scale for x in bf16"] * (choice.kernel == "triton_hopper_bf16" and p.act == "fp8_static")
        out += ["rows"] * bool(p.n % 16)
        out += ["dtype"] * (p.out_dtype in ("fp16", "fp32"))
        out += ["activation"] * (e.activation not in (None, "silu", "swigluoai") or not e.gated)
    if choice.kernel == "triton_hopper_int4":
        e = p.epilogue
        out += ["layout"] * (choice.layout not in HOPPER_INT4)
        out += ["operands"] * (p.scheme != "int4_w4a16" or p.act != "bf16" or p.group not in (32, 64, 128))
        out += ["rows"] * bool(p.n % 16)
        out += ["dtype"] * (p.out_dtype == "fp32")
        out += ["activation"] * (e.activation not in (None, "silu", "swigluoai") or not e.gated)
    if choice.kernel == "gemv_mxfp4":
        out += ["gemv"] * (p.scheme != "w4a16" or not 1 <= p.m <= 4)
    if p.out_dtype in ("fp16", "fp32") and choice.kernel.startswith(("hip_mxfp8", "hip_moe_w4a16")):
        out.append("out dtype")
    if choice.kernel.startswith("hip_mxfp8"):
        rows = p.m * p.top_k if p.op == "moe_down" else p.m
        out += ["2 GiB"] * (p.e_local * p.n * p.k > 2**31 - 1 or rows * p.k > 2**31 - 1)
        out += ["strided"] * (choice.layout != "strided")
    if choice.kernel == "hip_mxfp8_gemv":
        out += ["gemv"] * (p.m > 16 or bool(p.k % 32) or bool(p.n % c.block_n) or p.op != "linear")
    if choice.kernel == "hip_mxfp8_mfma":
        bad = p.m not in (8, 16, 32, 64) or p.k % 128 or (p.k // 128) % c.split_k
        out += ["mfma"] * bool(bad)
    if choice.kernel == "hip_mxfp8_moe":
        a_div = p.top_k if p.op == "moe_gate_up" else 1
        bad = (p.k % 1024 and p.k != 768) or c.block_m % 4 or a_div not in (1, 4, 8) or p.n % c.block_n
        out += ["grouped"] * bool(bad)
    if choice.kernel == "hip_moe_w4a16_wmma":
        tile = {8: 256, 1: 512}.get(p.top_k if p.op == "moe_gate_up" else 1)
        out += ["wmma"] * bool(p.group != 128 or p.k % 128 or not tile or p.n % tile or c.block_n != tile)
    if choice.kernel.startswith("triton"):
        sizes = (c.block_m, c.block_n, c.block_k)
        out += ["power of two"] * any(not v or v & (v - 1) for v in sizes)
        out += ["stages"] * (not 1 <= c.num_stages <= (16 if choice.kernel.startswith("triton_hopper") else 8))
        out += ["lanes"] * (not 1 <= c.num_warps * ARCHES[p.arch].wave <= 1024)
        if "cdna4" in choice.layout:
            out += ["swizzle"] * (c.block_k < 256 or c.block_n < 32)
        if p.arch == "gfx950" and p.act != "bf16":
            least = 64 if c.nonkdim == 32 else 128
            out += ["scaled MFMA"] * (c.num_warps < 2 or c.block_k < least)
        if p.out_dtype in ("mxfp8", "mxfp4") and "quantize" not in choice.unfused:
            columns = c.block_n // 2 if p.epilogue.activation and p.epilogue.gated else c.block_n
            out += ["32 columns"] * (columns < 32)
        if choice.source not in ("exact", "padded_m", "nearest_e"):  # those ran as they are
            bits = (BITS[p.act], WEIGHT_BITS[p.scheme])
            if choice.kernel in (*OWN, "triton_moe") and p.arch != "gfx950":
                bits = (16, 16)  # dequantized before they are multiplied
            hopper = choice.kernel.startswith("triton_hopper")
            pairs = choice.kernel == "triton_moe" and p.op == "moe_gate_up" and p.epilogue.activation
            tile = c._replace(block_n=2 * c.block_n) if pairs else c  # gate and up of every column
            need = hopper_bytes(choice.kernel, p, c) if hopper else lds(p.arch, tile, *bits)
            if choice.kernel in (*INT4, *FP16, *REGISTERS):
                need = group_bytes(p, c, choice.kernel not in FP16)
            out += ["LDS"] * (need > LDS[p.arch])
    return out


SIZES = (32, 64, 96, 128, 192, 256, 360, 384, 512, 736, 768, 1024, 1472, 1536, 2048, 2304, 2880, 3072, 4096, 5760, 6144,
         7168, 9216, 12288, 16384, 28672)  # fmt: skip
SHAPES = ((1024, 7168), (3072, 3072), (1536, 6144), (6144, 768), (2304, 6144), (2048, 4096))
"""Shapes that the random packs are about; most of the problems are of these."""

MS = (1, 2, 3, 4, 8, 16, 17, 24, 32, 64, 100, 256, 1000, 1024, 4096, 8192, 40_000)


SCHEMES = ("mxfp8", "w4a8", "mxfp4", "w4a16", "int4_w4a16")
OPS = ("linear", "moe_gate_up", "moe_down")
KERNELS = [spec for spec in kernels().values() if spec.schemes]


def random_problem(rng: random.Random, arch: str) -> GemmProblem:
    """Mostly what some kernel is for, else anything."""
    spec = rng.choice([spec for spec in KERNELS if arch in spec.archs] or KERNELS)
    usual = rng.random() < 0.85
    op, scheme = (rng.choice(spec.ops), rng.choice(spec.schemes)) if usual else (rng.choice(OPS), rng.choice(SCHEMES))
    int4 = scheme == "int4_w4a16"
    group = rng.choice((32, 64, 128, 128)) if int4 else 32
    n, k = rng.choice(SHAPES) if rng.random() < 0.6 else (rng.choice(SIZES) + rng.randrange(2), rng.choice(SIZES))
    linear = op == "linear"
    e_total = 1 if linear else rng.choice((8, 32, 64, 128, 129, 192, 256, 512))
    ep = 1 if linear else rng.choice((1, 1, 2, 4, 8))
    packed = ("hopper_bf16", "hopper_e4m3", "mma_tile+mma_scale", *DECODE_LAYOUT.values(), *MOE_DECODE_LAYOUT.values())
    others = (
        ("exllama", *INT4_LAYOUTS, *HOPPER_INT4, "decode_cdna_int4", "decode_rdna_int4")
        if int4
        else ("cdna4_scale", "cdna4_scale_256", "preshuffle")
    )
    activations = (None,) if n % 2 else (None, "silu", "swigluoai")
    return GemmProblem(
        op, scheme, arch, rng.choice(MS), n, max(group, k // group * group), rng.choice((0, 0, 128)),
        -(-e_total // ep), e_total, 1 if linear else rng.choice((1, 4, 5, 8)), ep, ep,
        Epilogue(rng.random() < 0.3, rng.choice(activations), beta=rng.choice((None, None, 1.0, 0.5))),
        rng.choice(("bf16",) * 7 + ("fp16", "fp32", "mxfp8", "mxfp4")),
        rng.choice((None, None, "strided", rng.choice(others), "hopper_bf16" if int4 else rng.choice(packed))),
        group, {"w4a8": "fp8_static", "mxfp8": "bf16"}.get(scheme, "") if rng.random() < 0.2 else "",
        rng.choice((0,) * 6 + (16, 32, 64, 128)), rng.random() < 0.5,
    )  # fmt: skip


NONSENSE = (0, 1, 7, 24, 96, 2048)


def random_row(rng: random.Random, arch: str) -> dict[str, object]:
    """An entry: for half of its fields as its kernel has them, else wrong, or nonsense."""
    spec = rng.choice(KERNELS)
    right = rng.random() < 0.9
    op, scheme = (rng.choice(spec.ops), rng.choice(spec.schemes)) if right else (rng.choice(OPS), rng.choice(SCHEMES))
    n, k = rng.choice(SHAPES)
    row: dict[str, object] = {"arch": arch, "op": op, "N": n, "K": k, "scheme": scheme}
    row["kernel"] = spec.name if rng.random() < 0.95 else "gone_kernel"
    for name in ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages", "nonkdim"):
        if name in spec.space:
            row[name] = rng.choice(spec.space[name])
        if rng.random() < 0.04:
            row[name] = rng.choice(NONSENSE)
    row["layout"] = rng.choice(("", "", "", "strided", "cdna4_scale", "exllama", "preshuffle"))
    row["cu_num"] = rng.choice(("", 256, 128))
    if op == "linear":
        row["M"] = rng.choice(MS)
    else:
        row["E"] = rng.choice(("", 16, 32, 64, 128, 129, 256))
        row["top_k"] = rng.choice(("", 1, 4, 8))
        keyed_by = rng.choice(("M", "M_routed", "block_m"))
        row[keyed_by] = row.get("block_m", 32) if keyed_by == "block_m" else rng.choice(MS)
    return row


@pytest.mark.parametrize("arch", list(ARCHES))
def test_no_choice_is_illegal(arch, write_pack):
    rng = random.Random(f"selection {arch}")
    packs = Packs(load_file(write_pack(f"{arch}.csv", *(random_row(rng, arch) for _ in range(800)))))
    plan, here = Selector(packs), Selector(packs, available=shipped())
    sources = dict.fromkeys(SOURCES, 0)
    for _ in range(PROBLEMS if any(arch in spec.archs for spec in KERNELS) else 1000):  # no kernel, no choice
        problem = random_problem(rng, arch)
        choice = plan(problem)
        assert not violations(problem, choice), (problem, choice)
        sources[choice.source] += 1
    for problem in list(plan._chosen)[:2000]:
        assert here(problem).kernel in shipped()
        assert not violations(problem, here(problem)), problem
    if arch == "gfx950":  # the sample exercises every step of the lookup
        assert min(sources.values()) > 20, sources


def test_choices_do_not_depend_on_the_order_of_equal_work():
    """The same problem gets the same choice whatever was asked before, and from another selector."""
    rng = random.Random(3)
    problems = [random_problem(rng, "gfx950") for _ in range(300)]
    one, two = Selector(), Selector()
    assert [one(p) for p in problems] == [two(p) for p in reversed(problems)][::-1]


def test_the_judge_sees_what_is_wrong():
    """The judge itself: each field of a legal choice spoilt in turn is found."""
    problem = GemmProblem("moe_gate_up", "w4a8", "gfx950", 64, 3072, 3072, 0, 128, 128, 4, layout="cdna4_scale")
    choice = Selector(Packs([]))(problem)
    assert not violations(problem, choice)
    for spoilt in ({"block_k": 128}, {"block_n": 16}, {"num_warps": 1}, {"num_stages": 4, "block_n": 512}):
        assert violations(problem, replace(choice, config=choice.config._replace(**spoilt))), spoilt
    assert violations(problem, replace(choice, layout="strided"))
    assert violations(replace(problem, block_m=128), choice)
