"""Untuned tiles of our own Triton kernels: each compiles on its arch, in every scheme, without spills, as claimed."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns if it is not said

from sglang_amd_quant.kernels.triton.int4_gemm import Int4GemmConfig
from sglang_amd_quant.kernels.triton.manifest import SCHEMES, Int4Variant, Variant

from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.ops.triton_mx import launch_options, tile_of
from sglang_amd_quant.selection import GemmProblem, Selector
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS
from sglang_amd_quant.selection.legality import lds_need
from sglang_amd_quant.selection.rules import LAYOUT_RULES
from sglang_amd_quant.selection.shipped_kernels import GPUS
from sglang_amd_quant.selection.specs import kernel
from sglang_amd_quant.toolchain.triton_aot import compile_variant

MEMBER = {"gfx11": "gfx1100"}


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
        if rule.ops != ("linear",) or rule.layout.startswith("hopper") or rule.scheme not in SCHEMES:
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


def int4_tiles():
    """(problem, tile): what int4 experts get, by the height that routing gives, on strided weights; dense tiles are
    among them. And what linears get, on weights that lie as decode kernels read them, in models of fp16."""
    for arch in GPUS:
        for group in (32, 128):  # 64 is between
            shared = {"scheme": "int4_w4a16", "arch": arch, "n": 1536, "k": 2048, "group": group}
            experts = {"e_local": 64, "e_total": 64, "top_k": 8, "layout": "strided"}
            problems = [GemmProblem("moe_gate_up", m=64, block_m=b, **shared, **experts) for b in (16, 32, 64, 128)]
            dense = {"layout": AMD_DECODE_LAYOUTS.get((arch, "int4"), "mma_int4+tile_group"), "out_dtype": "fp16"}
            problems += [GemmProblem("linear", m=m, **shared, **dense) for m in (32, 64, 4096)]
            for problem in problems:
                name = "triton_int4_moe" if problem.moe else "triton_int4_gemm"
                choice = Selector(available={name}).decide(problem)
                if choice.source == "heuristic":  # no rule of gfx11's is as high as 128
                    tile = "x".join(map(str, choice.config.tile))
                    yield pytest.param(problem, choice, id=f"{arch}-{problem.op}-{group}-{tile}")


@pytest.mark.parametrize(("problem", "choice"), int4_tiles())
def test_int4_tiles_compile_without_spills_in_the_lds_that_is_estimated(problem, choice):
    config, lies = choice.config, TensorLayout.parse(problem.layout)
    made = compile_variant(
        Int4Variant(
            f"{config}", MEMBER.get(problem.arch, problem.arch), "bf16" if problem.moe else "fp16", problem.group,
            Int4GemmConfig(*config.tile, **launch_options(config)), problem.moe, problem.group >= (config.block_k or 0),
            claimed(problem.arch, "bf16"), (lies.value, lies.scale),
        )
    )  # fmt: skip
    assert made.report.problems == []
    assert made.lds <= lds_need(problem, kernel(choice.kernel), config)
