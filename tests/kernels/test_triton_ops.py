"""Triton kernels around the GEMMs, called as the ops call them, their machine code run in the emulator: bit for bit
what the twins in torch give. And every Triton kernel of the project is compiled for what it is meant for."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
from emulated_triton import emulated_triton
from sglang_amd_quant.kernels.triton import combine as combine_module
from sglang_amd_quant.kernels.triton import hopper, hopper_pack, quant_mx, routing
from sglang_amd_quant.kernels.triton.manifest import TRITON_ARCHS, variants
from triton.runtime.jit import JITFunction
from wait_states import check_parts_of_registers

from sglang_amd_quant.formats import quantize_mx
from sglang_amd_quant.toolchain.triton_aot import call, compile_variant

ARCHS = ("gfx950", "gfx942", "gfx1100")
FOLDER = Path(combine_module.__file__).parent
EXPECTED = {"combine_kernel", "quant_mx_kernel", "count_kernel", "place_kernel", "hopper_moe_kernel"}
LAUNCHED: set[str] = set()  # by the tests of this process so far


@pytest.fixture(params=TRITON_ARCHS)
def arch(request: pytest.FixtureRequest):
    """Each architecture in turn; every launch's machine code must be free of spills and keep its claims."""
    with emulated_triton(request.param) as launches:
        yield request.param
    assert launches
    for made in launches:
        assert made.compiled.report.problems == []
        LAUNCHED.add(made.compiled.variant.function)


def runs(arch: str) -> bool:
    """Whether there are results to compare: sm_90 is compiled only."""
    return arch in ARCHS


@pytest.mark.parametrize(("tokens", "n", "top_k"), [(5, 96, 2), (2, 1500, 8)])
def test_combine(arch: str, tokens: int, n: int, top_k: int) -> None:
    g = torch.Generator().manual_seed(n)
    routed = torch.randn(tokens * top_k, n, generator=g).bfloat16()
    ids = torch.randint(-1, 5, (tokens, top_k), generator=g)
    routed[(ids < 0).flatten() | (ids >= 4).flatten()] = torch.nan  # dropped rows are not read
    y = torch.full((tokens, n), torch.nan)
    combine_module.combine(routed, ids, 4, y, 2.5)
    if runs(arch):
        assert torch.equal(y, combine_module.combine_torch(routed, ids, 4, 2.5))


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block_m"), [(1, 4, 128, 16), (37, 2, 5, 32), (150, 4, 20, 64)])
def test_routing(arch: str, tokens: int, top_k: int, experts: int, block_m: int) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    made = routing.route(ids.int(), experts, block_m)
    if not runs(arch):
        return
    twin = routing.route_torch(ids, experts, block_m)
    assert torch.equal(made.counts, twin.counts)
    assert torch.equal(made.block_experts, twin.block_experts)
    assert torch.equal(made.row_ids, twin.row_ids)


def rows_of(m: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Blocks far apart in size (of fp16 some are subnormal), zeros, and one block each with infinity and NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k // 32, 32, generator=g) * torch.exp2(torch.randint(-20, 20, (m, k // 32, 1), generator=g))
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    x[0, 1], x[1, 0, 3], x[2, 2, 5] = 0, torch.inf, torch.nan
    return x.flatten(1).to(dtype)


def assert_same_codes(data: torch.Tensor, scales: torch.Tensor, expected: tuple) -> None:
    """Equal scales and, but for blocks (or rows) whose scale is NaN and which have no value, equal codes."""
    torch.testing.assert_close(scales, expected[1], rtol=0, atol=0, equal_nan=True)
    nothing = scales.isnan() if scales.is_floating_point() else scales == 255
    groups = data.view(torch.uint8).reshape(*scales.shape, -1)
    assert torch.equal(groups[~nothing], expected[0].view(torch.uint8).reshape(*scales.shape, -1)[~nothing])
    assert nothing.any()
    assert not nothing.all()


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
@pytest.mark.parametrize("out", ["mx", "bf16", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_quantization(arch: str, element: str, out: str, dtype: torch.dtype) -> None:
    x = rows_of(7, 160, 3, dtype)
    data, scales = quant_mx.quant_mx(x, element, out, arch=arch)
    if not runs(arch):
        return
    expected = quant_mx.quant_mx_torch(x, element, out)
    if scales is None:
        torch.testing.assert_close(data, expected[0], rtol=0, atol=0, equal_nan=True)
    else:
        assert_same_codes(data, scales, expected)


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_fp16_is_not_rounded_to_bf16_first(arch: str, element: str) -> None:
    """1 + 2^-k + 2^-10 is nearer to the code above the middle 1 + 2^-k, where the nearest bf16 is, and even the one
    below. What the formats give, which are the reference's."""
    x = torch.full((1, 32), 1 + 2.0 ** {"e2m1": -2, "e4m3": -4}[element] + 2.0**-10)
    x[0, 0] = {"e2m1": 4.0, "e4m3": 256.0}[element]  # whose scale is 1
    data, scales = quant_mx.quant_mx(x.half(), element, arch=arch)
    if runs(arch):
        want, want_scales = quantize_mx(x.half(), element)
        assert torch.equal(scales, want_scales)
        assert torch.equal(data.view(torch.uint8), want.view(torch.uint8))
        assert not torch.equal(quantize_mx(x.bfloat16(), element)[0].view(torch.uint8), want.view(torch.uint8))


def test_what_would_lose_bits_is_refused() -> None:
    silu = quant_mx.Front("silu")
    for x, element, out, front, dtype in (
        (torch.ones(1, 32).half(), None, "bf16", quant_mx.NO_FRONT, None),
        (torch.ones(1, 32), "e4m3", "mx", quant_mx.NO_FRONT, None),
        (torch.ones(1, 64), "e4m3", "mx", silu, None),
        (torch.ones(1, 64), None, "bf16", silu, torch.float16),
    ):
        with pytest.raises(ValueError, match="takes bf16 and fp16 .* use formats.quantize_mx"):
            quant_mx.quant_mx(x, element, out, front=front, dtype=dtype)
    with pytest.raises(ValueError, match="order for row"):
        quant_mx.quant_mx(torch.ones(1, 32).bfloat16(), "e4m3", ordered=True)


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_conversions_of_gfx950_leave_each_other_time(element: str) -> None:
    x = torch.ones(2, 64).bfloat16()
    with emulated_triton("gfx950") as launches:
        quant_mx.quant_mx(x, element, arch="gfx950")
    check_parts_of_registers(launches[0].compiled, "gfx950")


@pytest.mark.parametrize(("m", "k"), [(3, 2080), (600, 288)])
@pytest.mark.parametrize(("element", "out"), [(None, "row"), ("e2m1", "row"), ("e4m3", "mx"), ("e2m1", "mx")])
@pytest.mark.parametrize("kind", ["none", "rmsnorm"])
def test_rows_in_chunks(arch: str, kind: str, element: str | None, out: str, m: int, k: int) -> None:
    """A row that is several chunks, the last of them in part: of few rows, which many threads share, and of many."""
    x = rows_of(m, k, 4)
    weight = torch.ones(k, dtype=torch.bfloat16) if kind == "rmsnorm" else None
    if weight is not None:
        x = torch.ones(m, k).bfloat16()  # 1 / sqrt(1) in any arithmetic: what is compared is which elements go where
        x[:, ::7], x[1, 40] = -1, torch.nan
    front = quant_mx.Front(kind, weight=weight, epsilon=0.0)
    data, scales = quant_mx.quant_mx(x, element, out, front=front, arch=arch)
    if runs(arch):
        assert scales is not None
        assert_same_codes(data, scales, quant_mx.quant_mx_torch(x, element, out, front=front))


@pytest.mark.parametrize(("m", "k"), [(3, 96), (3, 2080), (600, 320)])
@pytest.mark.parametrize("element", [None, "e2m1"])
def test_rows_in_the_order_of_weights(arch: str, element: str | None, m: int, k: int) -> None:
    """Of those that are as wide as the weights' tiles, and of those that zeros make so."""
    x = rows_of(m, k, 6)
    data, factors = quant_mx.quant_mx(x, element, "row", arch=arch, ordered=True)
    assert data.shape == (m, -(-k // 64) * 64)
    if runs(arch):
        assert factors is not None
        assert_same_codes(data, factors, quant_mx.quant_mx_torch(x, element, "row", ordered=True))


def test_a_row_of_half_a_tile_is_filled_up(arch: str) -> None:
    data, _ = quant_mx.quant_mx(torch.ones(2, 32).bfloat16(), None, "row", arch=arch, ordered=True)
    if runs(arch):
        assert torch.equal(data.float().ne(0), hopper_pack.x_order(32).expand(2, -1) < 32)


@pytest.mark.parametrize("mode", ["floor", "rceil", "ceil", "even"])
def test_scale_modes(arch: str, mode: str) -> None:
    x = rows_of(4, 96, 5)
    data, scales = quant_mx.quant_mx(x, "e2m1", "mx", mode)
    if runs(arch):
        assert_same_codes(data, scales, quant_mx.quant_mx_torch(x, "e2m1", "mx", mode))


@pytest.mark.parametrize("kind", ["silu", "swigluoai", "rmsnorm"])
def test_fronts(arch: str, kind: str) -> None:
    """In fp32, but for one rounding to bf16: exp and rsqrt are good to a few ulps of fp32, so the rounding decides."""
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(96, generator=g).bfloat16() if kind == "rmsnorm" else None
    front = quant_mx.Front(
        kind, interleaved=kind == "swigluoai", limit=2.0 if kind == "swigluoai" else None, weight=weight
    )
    x = torch.randn(5, 96 if kind == "rmsnorm" else 192, generator=g).mul(2).bfloat16()
    data, _ = quant_mx.quant_mx(x, None, "bf16", front=front)
    if runs(arch):
        torch.testing.assert_close(data.double(), front(x.double()), rtol=2.0**-8 + 2.0**-18, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_sums_are_activated_and_rounded_before_they_are_quantized(arch: str, element: str, dtype: torch.dtype) -> None:
    """From fp32 through a model's dtype to the values of codes; exp is good to a few ulps of fp32, so hardly one
    falls the other way."""
    x, front = torch.randn(5, 192, generator=torch.Generator().manual_seed(7)) * 2, quant_mx.Front("silu")
    data, _ = quant_mx.quant_mx(x, element, "bf16", None, front, arch, dtype)
    if runs(arch):
        want, _ = quant_mx.quant_mx_torch(x, element, "bf16", None, front, dtype)
        assert (data == want).float().mean() > 0.99


def test_an_activation_in_fp16_is_rounded_to_it(arch: str) -> None:
    """Below silu's result are 11 bits; exp is good to a few ulps of fp32, so hardly a code falls the other way."""
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(7)).mul(2).half()
    data, scales = quant_mx.quant_mx(x, "e4m3", front=quant_mx.Front("silu"), arch=arch)
    if runs(arch):
        want, want_scales = quant_mx.quant_mx_torch(x, "e4m3", front=quant_mx.Front("silu"))
        assert torch.equal(scales, want_scales)
        assert (data.view(torch.uint8) == want.view(torch.uint8)).float().mean() > 0.99


@pytest.mark.parametrize(("element", "w_format", "x_format"), [(None, "e2m1", "bf16"), ("e4m3", "e2m1", "e4m3")])
def test_hopper_kernels_compile(element: str | None, w_format: str, x_format: str) -> None:
    g = torch.Generator().manual_seed(1)
    experts, hidden, inner = 4, 128, 128

    def packed(n: int, k: int, pairs: str | None) -> hopper_pack.HopperWeights:
        w = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, generator=g)
        return hopper_pack.pack_hopper(w, torch.full((experts, n, k // 32), 127, dtype=torch.uint8), x_format, pairs)

    with emulated_triton("sm_90") as launches:
        config = hopper.HopperConfig(16)
        hopper.fused_moe_hopper(
            torch.randn(8, hidden, generator=g).bfloat16(), torch.randint(0, experts, (8, 2), generator=g),
            torch.rand(8, 2, generator=g), packed(2 * inner, hidden, "halves"), packed(hidden, inner, None),
            config, config, element=element,
        )  # fmt: skip
    assert all(made.compiled.report.problems == [] for made in launches)
    gemms = [made.compiled.variant for made in launches if made.compiled.variant.function == "hopper_moe_kernel"]
    assert len(gemms) == 2
    for variant in gemms[:1]:
        assert compile_variant(replace(variant, claims=("matrix",))).report.problems == []
    LAUNCHED.update(made.compiled.variant.function for made in launches)


def test_no_kernel_is_left_out() -> None:
    """What is launched, by its name, is in the manifest, or a test beside this runs it in the emulator: names it, or
    calls the function that is named after it."""
    everything = {
        name
        for file in FOLDER.glob("*.py")
        for name, value in vars(importlib.import_module(f"sglang_amd_quant.kernels.triton.{file.stem}")).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    texts = [f.read_text() for f in Path(__file__).parent.glob("test_*.py")]
    emulated = "".join(text for text in texts if "emulated_triton(" in text)
    listed = {v.kernel.fn.__name__ for v in variants()}
    named = {n for n in everything if f'"{n}"' in emulated or f" {n.removesuffix('_kernel')}(" in emulated}
    assert everything - listed - named == set()
    assert LAUNCHED <= EXPECTED  # all of them, if this process has run all tests


def test_a_call_is_specialized_as_triton_does() -> None:
    kernel = combine_module.combine_kernel
    routed, ids, y = torch.zeros(6, 48), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 48).bfloat16()
    variant, passed = call(kernel, "gfx950", routed, ids, y, 48, 1, 0.5, 2, 64, False, num_warps=2)
    assert variant.signature == {"routed": "*fp32", "topk_ids": "*i32", "y": "*bf16", "N": "i32", "scale": "fp32"}
    assert variant.constants == {"E": 1, "TOP_K": 2, "BLOCK_N": 64, "EVEN_N": False, "OVERLAP": False}
    assert variant.divisible == ("routed", "topk_ids", "y", "N")
    assert variant.short == ("routed", "topk_ids", "y")
    assert variant.options == {"num_warps": 2}
    assert [p.data_ptr() for p in passed[:3]] == [routed.data_ptr(), ids.data_ptr(), y.data_ptr()]
    assert passed[3:] == [48, 0.5]
    variant, _ = call(kernel, "gfx950", routed.flatten()[3:], ids, y, 50, 4, 0.5, 2, 64, False)
    assert variant.divisible == ("topk_ids", "y")
    assert (variant.signature["E"], variant.options) == ("i32", {"num_warps": 4})
