"""Untuned tiles of our own Triton kernels: each compiles on its arch, in every scheme, without spills, as claimed."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig
from sglang_amd_quant.kernels.triton.manifest import SCHEMES, Variant
from sglang_amd_quant.kernels.triton.moe_gemm import PLAIN, Epilogue, moe_gemm, moe_gemm_kernel
from sglang_amd_quant.kernels.triton.routing import route_torch

from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.ops.triton_mx import launch_options, tile_of
from sglang_amd_quant.selection import Epilogue as GemmEpilogue
from sglang_amd_quant.selection import GemmProblem, Selector
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS
from sglang_amd_quant.selection.legality import lds_need
from sglang_amd_quant.selection.rules import LAYOUT_RULES
from sglang_amd_quant.selection.shipped_kernels import GPUS
from sglang_amd_quant.selection.specs import kernel, kernels
from sglang_amd_quant.toolchain.triton_aot import call, compile_variant

MEMBER = {"gfx11": "gfx1100"}
SILU = GemmEpilogue(activation="silu")
WEIGHTS = {"int4_w4a16": "int4", "w4a16": "e2m1", "mxfp8": "e4m3"}


def tiles():
    """(arch, scheme, tile): what every scheme's experts get, by the height that routing gives; dense tiles are among
    them, and the grouped kernel needs more registers."""
    here = Selector(available={"triton_mx_moe"})
    for arch in ("gfx950", "gfx942", "gfx11", "sm_90"):
        for scheme in SCHEMES:
            problem = lambda bm, arch=arch, scheme=scheme: GemmProblem(
                "moe_gate_up", scheme, arch, 64, 1536, 2048, 0, 64, 64, 8, layout="strided", block_m=bm
            )
            heights = (16, 32, 64, 128) if arch == "gfx950" else (16, 128)  # elsewhere all are made of the same pieces
            choices = [here.decide(problem(block_m)) for block_m in heights]
            for config in dict.fromkeys(c.config for c in choices if c.source == "heuristic"):
                yield pytest.param(arch, scheme, config, id=f"{arch}-{scheme}-{'x'.join(map(str, config.tile))}")


def claimed(arch, x_format):
    if arch == "sm_90":  # nothing: its disassembler takes longer than the compiler
        return ()
    return ("matrix",) if x_format == "bf16" else ("matrix", "scaled_mfma")


@pytest.mark.parametrize(("arch", "scheme", "config"), tiles())
def test_compiles_without_spills(arch, scheme, config):
    x_format, w_format = SCHEMES[scheme]
    claims = claimed(arch, x_format)
    name = f"{scheme}_{config}"
    variant = Variant(name, MEMBER.get(arch, arch), x_format, w_format, tile_of(config), True, True, claims)
    report = compile_variant(variant).report
    assert report.problems == []


def dense_tiles():
    """(arch, scheme, layout, tile): what linears get whose weights lie as the decode kernels of an arch read them."""
    here = Selector(available={"triton_mx_gemm"})
    for rule in LAYOUT_RULES:
        if rule.ops != ("linear",) or rule.layout not in kernel("triton_mx_gemm").layouts or rule.scheme not in SCHEMES:
            continue
        for m in (48, 1024):
            problem = GemmProblem("linear", rule.scheme, rule.arch, m, 2304, 6144, layout=rule.layout)
            config = here.decide(problem).config
            name = f"{rule.arch}-{rule.scheme}-{'x'.join(map(str, config.tile))}"
            yield pytest.param(rule.arch, rule.scheme, rule.layout, config, id=name)


@pytest.mark.parametrize(("arch", "scheme", "layout", "config"), dict.fromkeys(dense_tiles()))
def test_layouts_of_decode_kernels_compile_without_spills(arch, scheme, layout, config):
    x_format, w_format = SCHEMES[scheme]
    claims = claimed(arch, x_format)
    lies = TensorLayout.parse(layout)
    variant = Variant(
        f"{scheme}_{config}", MEMBER.get(arch, arch), x_format, w_format, tile_of(config), False, True, claims,
        (lies.value, lies.scale),
    )  # fmt: skip
    assert compile_variant(variant).report.problems == []


def group_problems(arch):
    """int4 experts, by the height that routing gives, on strided weights: dense tiles are among theirs. int4 linears,
    and the highest tile's experts, on weights that lie as decode kernels read them, in models of fp16. MX linears and
    experts in these, whose activations are not quantized. And MX linears and experts on AMD in those of bf16. Linears
    that end in silu, on weights that lie as experts' do."""
    shape, experts = {"n": 1536, "k": 2048}, {"e_local": 64, "e_total": 64, "top_k": 8, "layout": "strided"}
    for group in (32, 64, 128):
        shared = shape | {"scheme": "int4_w4a16", "arch": arch, "group": group}
        dense = {"layout": AMD_DECODE_LAYOUTS.get((arch, "int4"), "mma_int4+tile_group"), "out_dtype": "fp16"}
        yield from (GemmProblem("moe_gate_up", m=64, block_m=b, **shared, **experts) for b in (16, 32, 64, 128))
        yield from (GemmProblem("linear", m=m, **shared, **dense) for m in (32, 64, 4096))
        if (arch, "int4") in AMD_MOE_DECODE_LAYOUTS:
            packed = experts | {"layout": AMD_MOE_DECODE_LAYOUTS[arch, "int4"], "out_dtype": "fp16"}
            yield GemmProblem("moe_gate_up", m=64, block_m=128, **shared, **packed)
            gated = {"epilogue": SILU, "layout": packed["layout"], "out_dtype": "fp16"}
            yield from (GemmProblem("linear", m=m, **shared, **gated) for m in (64, 4096))
    for scheme in ("w4a16", "mxfp8") if arch == "sm_90" else ("mxfp8",):
        shared = shape | {"scheme": scheme, "arch": arch, "act": "bf16", "out_dtype": "fp16"}
        yield from (GemmProblem("moe_gate_up", m=64, block_m=b, **shared, **experts) for b in (16, 32, 64, 128))
        yield from (GemmProblem("linear", m=m, **shared, layout="strided") for m in (16, 32, 64, 4096))
    for weights, scheme, dtype in (("e2m1", "w4a16", "bf16"), ("e2m1", "w4a16", "fp16"), ("e4m3", "mxfp8", "bf16")):
        shared = shape | {"scheme": scheme, "arch": arch, "out_dtype": dtype}
        if not any(spec.covers(GemmProblem("linear", m=1, **shared)) for spec in registers(weights)):
            continue
        for m, layout in product((16, 32, 64, 4096), ("strided", AMD_DECODE_LAYOUTS[arch, weights])):
            yield GemmProblem("linear", m=m, **shared, layout=layout)
        for m in (16, 32, 64, 4096):
            gated = {"epilogue": SILU, "layout": AMD_MOE_DECODE_LAYOUTS[arch, weights]}
            yield GemmProblem("linear", m=m, **shared, **gated)
        for b, layout in product((16, 32, 64, 128), ("strided", AMD_MOE_DECODE_LAYOUTS[arch, weights])):
            yield GemmProblem("moe_gate_up", m=64, **shared | experts | {"layout": layout, "block_m": b})


def registers(weights):
    """Specs of kernels that have MX weights in registers all the way."""
    return [spec for name, spec in kernels().items() if name.startswith(f"triton_{weights}_")]


def group_tiles():
    """(problem, choice) of each tile that they get."""
    for problem in (problem for arch in GPUS for problem in group_problems(arch)):
        own, op = (f"{WEIGHTS[problem.scheme]}_", ""), "moe" if problem.moe else "gemm"
        names = {f"triton_{weights}{x}{op}" for weights in own for x in ("", "bf16_", "fp16_")} & set(kernels())
        choice = Selector(available=names).decide(problem)
        if choice.source == "heuristic":  # of MX weights none of gfx11's is as high as 128
            tile = "x".join(map(str, choice.config.tile))
            yield pytest.param(
                problem, choice, id=f"{problem.arch}-{problem.scheme}-{problem.op}-{problem.group}-{tile}"
            )


@pytest.mark.parametrize(("problem", "choice"), group_tiles())
def test_group_tiles_compile_without_spills_in_the_lds_that_is_estimated(problem, choice):
    layout = problem.layout
    if layout.startswith("decode_"):  # experts
        scales = "tile_group" if problem.scheme == "int4_w4a16" else "tile_scale"
        layout = f"{layout.removeprefix('decode_')}+{scales}"
    lies = TensorLayout.parse(layout)
    config = choice.config
    even = problem.group >= (config.block_k or 0)
    weights = WEIGHTS[problem.scheme]
    made = compile_variant(
        Variant(
            f"{config}", MEMBER.get(problem.arch, problem.arch), problem.out_dtype, weights,
            GroupGemmConfig(*config.tile, **launch_options(config)), problem.moe, even,
            claimed(problem.arch, "bf16"), (lies.value, lies.scale), problem.group,
            activated=problem.layout.startswith("decode_"),
        )
    )  # fmt: skip
    assert made.report.problems == []
    assert made.lds <= lds_need(problem, kernel(choice.kernel), config)


def moe_tiles():
    """(arch, scheme, op, layout, what K has beyond whole BLOCK_Ks, tile) of experts in the MoE GEMM, by the height that
    routing gives."""
    here = Selector(available={"triton_moe"})
    for arch, scheme, op, tail in product(GPUS, SCHEMES, ("moe_gate_up", "moe_down"), (0, 32, 64, 128)):
        decode = AMD_MOE_DECODE_LAYOUTS.get((arch, SCHEMES[scheme][1]))
        for layout in ("strided", decode) if tail >= 64 and decode in kernel("triton_moe").layouts else ("strided",):
            problem = GemmProblem(op, scheme, arch, 64, 1536, 2048 + tail, 0, 64, 64, 8, layout=layout)
            choices = [here.decide(replace(problem, block_m=block_m)) for block_m in (16, 32, 64, 128)]
            for config in dict.fromkeys(c.config for c in choices if c.source == "heuristic"):
                if not tail or tail % config.block_k:
                    name = f"{arch}-{scheme}-{op}-{layout}-{tail}-{'x'.join(map(str, config.tile))}"
                    yield pytest.param(arch, scheme, op, layout, tail, config, id=name)


@pytest.mark.parametrize(("arch", "scheme", "op", "layout", "tail", "config"), moe_tiles())
def test_moe_tiles_compile_without_spills_with_all_that_gpt_oss_has(arch, scheme, op, layout, tail, config):
    """Biases, gates and ups that alternate and are clamped, and MX blocks as output, in a model of fp16."""
    x_format, w_format = SCHEMES[scheme]
    paired, quantized, arch = op == "moe_gate_up", x_format != "bf16", MEMBER.get(arch, arch)
    epilogue = PLAIN
    if paired:
        epilogue = Epilogue("swigluoai", True, 7.0, out=x_format if quantized else None, half=quantized)
    experts, k, columns = 2, 2 * config.block_k + tail, 64
    values = layout.removeprefix("decode_")
    n, pack = columns * (2 if paired else 1), {"e2m1": 2, "e4m3": 1, "bf16": 1}
    dtypes = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}

    def operand(element, *shape):
        codes = torch.zeros(*shape, k // pack[element], dtype=torch.uint8 if element != "bf16" else torch.bfloat16)
        scales = torch.zeros(*shape, k // 32, dtype=torch.uint8)
        return codes.view(dtypes[element]), None if element == "bf16" else scales

    y = torch.zeros(8, columns // (pack[epilogue.out or "bf16"]), dtype=torch.uint8 if epilogue.out else torch.float16)
    y_scales = torch.zeros(8, columns // 32, dtype=torch.uint8) if epilogue.out else None
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(moe_gemm_kernel), "run",
            lambda kernel, *args, grid, warmup=False, **named: made.append(call(kernel, arch, *args, **named)[0]),
        )  # fmt: skip
        moe_gemm(
            *operand(x_format, 4 if paired else 8), *operand(w_format, experts, n), y, y_scales,
            route_torch(torch.zeros(4, 2, dtype=torch.int32), experts, config.block_m), tile_of(config), arch,
            top_k=2 if paired else 1, bias=torch.zeros(experts, n), epilogue=epilogue,
            row_weights=None if paired else torch.zeros(8),
            layout=(values, "strided" if values == "strided" else "tile_scale"),
        )  # fmt: skip
    assert compile_variant(made[0]).report.problems == []
