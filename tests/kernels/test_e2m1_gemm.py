"""MXFP4 weights in registers all the way on AMD (`amd_gemm.py`), bf16 activations: executed on every arch."""

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
from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.layouts.registry import scale_layout, value_layout
from sglang_amd_quant.ops.triton_mx import launch_options
from sglang_amd_quant.selection import GemmProblem, Selector
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS, AMD_MOE_DECODE_LAYOUTS

FAMILY = {"gfx950": "gfx950", "gfx942": "gfx942", "gfx1100": "gfx11", "gfx1151": "gfx11"}
PLACES = [(arch, lies) for arch in FAMILY for lies in ("strided", "decode")]
MOST = {
    # vector instructions a matrix instruction at most, for 16, 32, 64 and 4096 rows
    "gfx950": (7.3, 3.7, 1.9, 1.0), "gfx942": (16.3, 7.9, 4.1, 2.1), "gfx1100": (45.7, 25.0, 14.4, 14.4),
}  # fmt: skip
"""5 % above what is counted. Dequantized before LDS it is 6.2 and more for linears (`mx_gemm`), 6.7 and more for
experts (`moe_gemm`): docs/decode_amd.md."""


def multiplied(
    arch: str, lies: str, config: GroupGemmConfig, x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor,
    y: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor, Launch]:  # fmt: skip
    layout = TensorLayout.parse("strided" if lies == "strided" else AMD_DECODE_LAYOUTS[FAMILY[arch], "e2m1"])
    y = torch.full((x.shape[0], w.shape[0]), torch.nan) if y is None else y
    with emulated_triton(arch) as made:
        group_gemm(
            x, value_layout(layout.value).pack(w), scale_layout(layout.scale).pack(scales), y, config, arch, group=32,
            layout=(layout.value, layout.scale), **options,
        )  # fmt: skip
    return y, made[0]


def tile(arch: str, m: int) -> GroupGemmConfig:
    """As selection gives it."""
    family = FAMILY[arch]
    problem = GemmProblem("linear", "w4a16", family, m, 8192, 8192, layout=AMD_DECODE_LAYOUTS[family, "e2m1"])
    config = Selector(available={"triton_e2m1_gemm", "triton_e2m1_bf16_gemm"}).decide(problem).config
    return GroupGemmConfig(*config.tile, **launch_options(config))


@pytest.mark.parametrize("arch", ["gfx950", "gfx942", "gfx1100"])
@pytest.mark.parametrize(("block_m", "m"), [(16, 16), (32, 32), (64, 1023), (128, 4096)])
def test_experts_have_the_tiles_of_linears(arch: str, block_m: int, m: int) -> None:
    """By the height that routing gives; so what is counted of those holds for these."""
    family = FAMILY[arch]
    layout, names = AMD_MOE_DECODE_LAYOUTS[family, "e2m1"], {"triton_e2m1_moe", "triton_e2m1_bf16_moe"}
    shape = {"n": 8192, "k": 8192, "e_local": 32, "e_total": 32, "top_k": 4, "layout": layout, "block_m": block_m}
    choice = Selector(available=names).decide(GemmProblem("moe_gate_up", "w4a16", family, 4096, **shape))
    if choice.source == "heuristic":
        assert GroupGemmConfig(*choice.config.tile, **launch_options(choice.config)) == tile(arch, m)
    else:
        assert (family, block_m) == ("gfx11", 128)


@pytest.mark.parametrize(("arch", "lies"), PLACES)
@pytest.mark.parametrize(("m", "n", "k"), [(20, 40, 160), (70, 130, 256), (1, 1, 32)])
def test_any_shape(arch: str, lies: str, m: int, n: int, k: int) -> None:
    """Every code and sign, scales of 40 octaves; against fp64. Values are exact, so that sums lose a bit of fp32 for
    each of K terms at most."""
    g = torch.Generator().manual_seed(m + n + k)
    w = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g)
    scales = torch.randint(107, 147, (n, k // 32), dtype=torch.uint8, generator=g)
    x = torch.randn(m, k, generator=g).bfloat16()
    y, made = multiplied(arch, lies, tile(arch, m), x, w, scales)
    values = dequantize_mx(w, scales, "e2m1", torch.float64)
    assert made.compiled.report.problems == []
    assert ((y - x.double() @ values.T).abs() <= k * 2.0**-24 * (x.double().abs() @ values.abs().T)).all()


@pytest.mark.parametrize(("arch", "lies"), PLACES)
@pytest.mark.parametrize(("n", "pairs"), [(40, None), (48, "halves"), (48, "interleaved")])
def test_experts(arch: str, lies: str, n: int, pairs: str | None) -> None:
    """By routed rows of which some are another rank's, with a factor of x, biases and routing weights; against fp64.
    Rows of gates and ups alternate as decode kernels have them; each of the three is a rounding of fp32."""
    experts, top_k, k = 3, 2, 160
    g = torch.Generator().manual_seed(n)
    w = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, generator=g)
    scales = torch.randint(117, 137, (experts, n, k // 32), dtype=torch.uint8, generator=g)
    x, factor = torch.randn(11, k, generator=g).bfloat16(), torch.tensor(0.3)
    ids = torch.randint(-1, experts, (11, top_k), generator=g)
    bias, weights = torch.randn(experts, n, generator=g), torch.rand(11 * top_k, generator=g)
    order, config = row_order(n, pairs), tile(arch, 16)
    routing = route_torch(ids, experts, config.block_m)
    y, made = multiplied(
        arch, lies, config, x, w[:, order], scales[:, order], torch.full((11 * top_k, n), torch.nan), x_scale=factor,
        bias=bias, row_ids=routing.row_ids, block_experts=routing.block_experts, row_weights=weights, top_k=top_k,
        pairs=pairs,
    )  # fmt: skip
    assert made.compiled.report.problems == []
    values, left = dequantize_mx(w, scales, "e2m1", torch.float64), x.double() * factor
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert < 0:
            assert y[row].isnan().all()
            continue
        want = (values[expert] @ left[row // top_k] + bias[expert]) * weights[row]
        most = (values[expert].abs() @ left[row // top_k].abs() + bias[expert].abs()) * weights[row]
        assert ((y[row] - want).abs() <= (k + 3) * 2.0**-24 * most).all()


@pytest.mark.parametrize("arch", FAMILY)
def test_scales_at_the_ends_and_nan(arch: str) -> None:
    """Of 2^-120 and 2^118, as far as products stay normal; a NaN's row is NaN, and no other."""
    w = torch.full((20, 32), 0x77, dtype=torch.uint8)  # 6
    w[4] = 0x80  # zeros, of either sign
    scales = torch.full((20, 2), 127, dtype=torch.uint8)
    scales[3], scales[5], scales[4], scales[7, 1] = 7, 245, 245, 255
    y, _ = multiplied(arch, "decode", tile(arch, 16), torch.ones(3, 64).bfloat16(), w, scales)
    assert y.isnan().nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]
    assert y[0, :7].tolist() == [384.0, 384.0, 384.0, 384 * 2.0**-120, 0.0, 384 * 2.0**118, 384.0]


@pytest.mark.parametrize("arch", MOST)
@pytest.mark.parametrize(("at", "m"), enumerate((16, 32, 64, 4096)))
def test_a_step_has_few_instructions(arch: str, at: int, m: int) -> None:
    """Of four steps less those of two. Experts have the same tiles, by the height that routing gives."""
    config = tile(arch, m)
    few, many = (
        multiplied(
            arch, "decode", config, torch.zeros(config.block_m, k).bfloat16(),
            torch.zeros(config.block_n, k // 2, dtype=torch.uint8),
            torch.full((config.block_n, k // 32), 127, dtype=torch.uint8),
        )[1]
        for k in (256, 512)
    )  # fmt: skip
    assert vector_a_matrix(few, many) <= MOST[arch][at]


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
@pytest.mark.parametrize("m", [16, 32, 64, 4096])
def test_assembly_leaves_the_matrix_unit_its_wait_states(arch: str, m: int) -> None:
    config = tile(arch, m)
    w, s = torch.zeros(config.block_n, 64, dtype=torch.uint8), torch.zeros(config.block_n, 4, dtype=torch.uint8)
    x = torch.zeros(config.block_m, 128).bfloat16()
    check_wait_states(multiplied(arch, "decode", config, x, w, s)[1].compiled, arch)


def test_what_no_kernel_reads_is_refused() -> None:
    x, w, s = torch.ones(3, 64).bfloat16(), torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 2).byte()
    with pytest.raises(
        ValueError, match="e2m1 weights in groups of 32 with x of torch.bfloat16 on sm_90: .*use mx_gemm"
    ):
        group_gemm(x, w, s, torch.empty(3, 16), GroupGemmConfig(16, 64, 64), "sm_90", group=32)
