"""MX weights in registers all the way on AMD (`amd_gemm.py`), bf16 activations: executed on every arch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")

from emulated_triton import Launch, emulated_triton
from loop_counts import vector_a_matrix
from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig, group_gemm
from sglang_amd_quant.kernels.triton.hopper_pack import row_order
from sglang_amd_quant.kernels.triton.routing import route_torch
from wait_states import check_wait_states

from sglang_amd_quant.formats import dequantize_mx
from sglang_amd_quant.ops.decode_weights import decode_weights
from sglang_amd_quant.ops.triton_mx import launch_options
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import GemmProblem, Selector, kernels
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS
from sglang_amd_quant.tensor import MxTensor

FAMILY = {"gfx950": "gfx950", "gfx942": "gfx942", "gfx1100": "gfx11", "gfx1151": "gfx11"}
SCHEME = {"e2m1": "w4a16", "e4m3": "mxfp8"}
KINDS = [*((arch, "e2m1") for arch in FAMILY), *((arch, "e4m3") for arch in FAMILY if arch != "gfx950")]
"""Arch and format of weights."""
PLACES = [(*kind, lies) for kind in KINDS for lies in ("strided", "decode")]
CDNA = [kind for kind in KINDS if kind[0].startswith("gfx9")]
MOST = {
    # vector instructions a matrix instruction at most, for 16, 32, 64 and 4096 rows
    ("gfx950", "e2m1"): (7.3, 3.7, 1.9, 1.0),
    ("gfx942", "e2m1"): (16.3, 7.9, 4.1, 2.1),
    ("gfx1100", "e2m1"): (45.7, 25.0, 14.4, 14.4),
    ("gfx942", "e4m3"): (10.0, 5.0, 2.6, 1.3),
    ("gfx1100", "e4m3"): (59.6, 32.5, 17.5, 17.5),
}
MOST_FP16 = {
    "gfx950": (12.6, 7.7, 5.2, 5.1), "gfx942": (14.9, 8.1, 4.7, 3.7), "gfx1100": (58.8, 31.4, 18.0, 18.0),
}  # fmt: skip
"""5 % above what is counted, in models of bf16 and (of e2m1) of fp16. What it was dequantized before LDS:
docs/decode_amd.md."""


def codes(element: str, *shape: int, g: torch.Generator) -> torch.Tensor:
    """Weights [..., K] of every code and sign but NaN."""
    if element == "e2m1":
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=g)
    bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
    return bits.masked_fill_(bits & 0x7F == 0x7F, 0x80).view(torch.float8_e4m3fn)


def zeros(element: str, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and scales."""
    w = torch.zeros(n, k // (2 if element == "e2m1" else 1), dtype=torch.uint8)
    scales = torch.full((n, k // 32), 127, dtype=torch.uint8)
    return w if element == "e2m1" else w.view(torch.float8_e4m3fn), scales


def multiplied(
    arch: str, lies: str, config: GroupGemmConfig, x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor,
    y: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor, Launch]:  # fmt: skip
    """By weights as a checkpoint has them, or laid out for the arch's decode kernels."""
    element = "e2m1" if w.dtype == torch.uint8 else "e4m3"
    weights = MxTensor.canonical(w, scales, SCHEMES[SCHEME[element]])
    weights = weights if lies == "strided" else decode_weights(weights, arch)
    y = torch.full((x.shape[0], w.shape[-2]), torch.nan) if y is None else y
    with emulated_triton(arch) as made:
        group_gemm(
            x, weights.data, weights.scales, y, config, arch, group=32,
            layout=(weights.layout.value, weights.layout.scale), **options,
        )  # fmt: skip
    return y, made[0]


def own(element: str, op: str) -> set[str]:
    return {f"triton_{element}_{x}{op}" for x in ("", "bf16_", "fp16_")} & set(kernels())


def tile(arch: str, element: str, m: int, dtype: str = "bf16") -> GroupGemmConfig:
    """As selection gives it."""
    family = FAMILY[arch]
    layout = AMD_DECODE_LAYOUTS[family, element]
    problem = GemmProblem("linear", SCHEME[element], family, m, 8192, 8192, layout=layout, out_dtype=dtype)
    config = Selector(available=own(element, "gemm")).decide(problem).config
    return GroupGemmConfig(*config.tile, **launch_options(config))


@pytest.mark.parametrize(("arch", "element"), MOST)
@pytest.mark.parametrize(("block_m", "m"), [(16, 16), (32, 32), (64, 1023), (128, 4096)])
def test_experts_have_the_tiles_of_linears(arch: str, element: str, block_m: int, m: int) -> None:
    """By the height that routing gives; so what is counted of those holds for these."""
    family = FAMILY[arch]
    layout = AMD_MOE_DECODE_LAYOUTS[family, element]
    shape = {"n": 8192, "k": 8192, "e_local": 32, "e_total": 32, "top_k": 4, "layout": layout, "block_m": block_m}
    problem = GemmProblem("moe_gate_up", SCHEME[element], family, 4096, **shape)
    choice = Selector(available=own(element, "moe")).decide(problem)
    if choice.source == "heuristic":
        assert GroupGemmConfig(*choice.config.tile, **launch_options(choice.config)) == tile(arch, element, m)
    else:
        assert (family, block_m) == ("gfx11", 128)


@pytest.mark.parametrize(("arch", "element", "lies"), PLACES)
@pytest.mark.parametrize(("m", "n", "k"), [(20, 40, 160), (70, 130, 256), (1, 1, 32)])
def test_any_shape(arch: str, element: str, lies: str, m: int, n: int, k: int) -> None:
    """Scales of 40 octaves; against fp64. Values are exact, so that sums lose a bit of fp32 for each of K terms at
    most."""
    g = torch.Generator().manual_seed(m + n + k)
    w = codes(element, n, k, g=g)
    scales = torch.randint(107, 147, (n, k // 32), dtype=torch.uint8, generator=g)
    x = torch.randn(m, k, generator=g).bfloat16()
    y, made = multiplied(arch, lies, tile(arch, element, m), x, w, scales)
    values = dequantize_mx(w, scales, element, torch.float64)
    assert made.compiled.report.problems == []
    assert ((y - x.double() @ values.T).abs() <= k * 2.0**-24 * (x.double().abs() @ values.abs().T)).all()


@pytest.mark.parametrize(("arch", "element", "lies"), PLACES)
@pytest.mark.parametrize(("n", "pairs"), [(40, None), (48, "halves"), (48, "interleaved")])
def test_experts(arch: str, element: str, lies: str, n: int, pairs: str | None) -> None:
    """By routed rows of which some are another rank's, with a factor of x, biases and routing weights; against fp64.
    Rows of gates and ups alternate as decode kernels have them; each of the three is a rounding of fp32."""
    experts, top_k, k = 3, 2, 160
    g = torch.Generator().manual_seed(n)
    w = codes(element, experts, n, k, g=g)
    scales = torch.randint(117, 137, (experts, n, k // 32), dtype=torch.uint8, generator=g)
    x, factor = torch.randn(11, k, generator=g).bfloat16(), torch.tensor(0.3)
    ids = torch.randint(-1, experts, (11, top_k), generator=g)
    bias, weights = torch.randn(experts, n, generator=g), torch.rand(11 * top_k, generator=g)
    order, config = row_order(n, pairs), tile(arch, element, 16)
    routing = route_torch(ids, experts, config.block_m)
    y, made = multiplied(
        arch, lies, config, x, w.view(torch.uint8)[:, order].view(w.dtype), scales[:, order],
        torch.full((11 * top_k, n), torch.nan), x_scale=factor, bias=bias, row_ids=routing.row_ids,
        block_experts=routing.block_experts, row_weights=weights, top_k=top_k, pairs=pairs,
    )  # fmt: skip
    assert made.compiled.report.problems == []
    values, left = dequantize_mx(w, scales, element, torch.float64), x.double() * factor
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert < 0:
            assert y[row].isnan().all()
            continue
        want = (values[expert] @ left[row // top_k] + bias[expert]) * weights[row]
        most = (values[expert].abs() @ left[row // top_k].abs() + bias[expert].abs()) * weights[row]
        assert ((y[row] - want).abs() <= (k + 3) * 2.0**-24 * most).all()


@pytest.mark.parametrize(("arch", "element", "lies"), PLACES)
def test_scales_at_the_ends_and_nan(arch: str, element: str, lies: str) -> None:
    """Of 2^-120 and 2^118, as far as products stay normal; a NaN's row is NaN, and no other."""
    w, scales = zeros(element, 20, 64)
    w.view(torch.uint8).fill_(0x77 if element == "e2m1" else 0x4C)  # 6
    w.view(torch.uint8)[4] = 0x80  # zeros, of either sign
    scales[3], scales[5], scales[4], scales[7, 1] = 7, 245, 245, 255
    rows = [7]
    if element == "e4m3":
        w.view(torch.uint8)[9, 3], w.view(torch.uint8)[12, 60] = 0x7F, 0xFF
        rows = [7, 9, 12]
    y, _ = multiplied(arch, lies, tile(arch, element, 16), torch.ones(3, 64).bfloat16(), w, scales)
    assert y.isnan().nonzero().tolist() == [[m, n] for m in range(3) for n in rows]
    assert y[0, :7].tolist() == [384.0, 384.0, 384.0, 384 * 2.0**-120, 0.0, 384 * 2.0**118, 384.0]


@pytest.mark.parametrize(("arch", "element"), MOST)
@pytest.mark.parametrize(("at", "m"), enumerate((16, 32, 64, 4096)))
@pytest.mark.parametrize("rest", [0, 64])
def test_a_step_has_few_instructions(arch: str, element: str, at: int, m: int, rest: int) -> None:
    """Of four steps less those of two; with half a step behind them a move more at most, for eight matrix instructions
    or more: only that last step's loads are masked."""
    config = tile(arch, element, m)
    few, many = (
        multiplied(
            arch, "decode", config, torch.zeros(config.block_m, k).bfloat16(), *zeros(element, config.block_n, k)
        )[1]
        for k in (256 + rest, 512 + rest)
    )  # fmt: skip
    assert vector_a_matrix(few, many) <= MOST[arch, element][at] + (1 / 8 if rest else 0)


@pytest.mark.parametrize("arch", MOST_FP16)
@pytest.mark.parametrize(("at", "m"), enumerate((16, 32, 64, 4096)))
def test_a_step_in_fp16(arch: str, at: int, m: int) -> None:
    """Likewise; and assembly leaves CDNA's matrix unit its wait states."""
    config = tile(arch, "e2m1", m, "fp16")
    few, many = (
        multiplied(arch, "decode", config, torch.zeros(config.block_m, k).half(), *zeros("e2m1", config.block_n, k))[1]
        for k in (256, 512)
    )
    assert vector_a_matrix(few, many) <= MOST_FP16[arch][at]
    if arch != "gfx1100":
        check_wait_states(many.compiled, arch)


@pytest.mark.parametrize(("arch", "element"), CDNA)
@pytest.mark.parametrize("lies", ["strided", "decode"])
@pytest.mark.parametrize("m", [16, 32, 64, 4096])
def test_assembly_leaves_the_matrix_unit_its_wait_states(arch: str, element: str, lies: str, m: int) -> None:
    config = tile(arch, element, m)
    x, weights = torch.zeros(config.block_m, 128).bfloat16(), zeros(element, config.block_n, 128)
    check_wait_states(multiplied(arch, lies, config, x, *weights)[1].compiled, arch)


def test_what_no_kernel_reads_is_refused() -> None:
    x, config = torch.ones(3, 64).bfloat16(), GroupGemmConfig(16, 64, 64)
    for element, arch in (("e2m1", "sm_90"), ("e4m3", "gfx950")):
        said = f"{element} weights in groups of 32 with x of torch.bfloat16 on {arch}: .*use mx_gemm"
        with pytest.raises(ValueError, match=said):
            group_gemm(x, *zeros(element, 16, 64), torch.empty(3, 16), config, arch, group=32)
