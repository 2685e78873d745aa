"""Weights packed for Hopper say what they said before; on an sm_90 GPU, the grouped GEMM and the fused MoE on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from sglang_amd_quant.kernels.triton.hopper import (
    FEW,
    HopperConfig,
    activations,
    alone,
    fused_moe_hopper,
    hopper_gemm,
    linear_hopper,
)
from sglang_amd_quant.kernels.triton.hopper_moe import rounds_of, unrolled
from sglang_amd_quant.kernels.triton.hopper_pack import (
    OCTAVES,
    HopperWeights,
    in_x_order,
    pack_hopper,
    row_order,
    x_order,
)
from sglang_amd_quant.kernels.triton.mx_gemm import mx_gemm_torch
from sglang_amd_quant.kernels.triton.routing import route_torch
from sm90 import GPU

from sglang_amd_quant.formats import dequantize_mx, group_words
from sglang_amd_quant.layouts.registry import SCALES, VALUES
from sglang_amd_quant.ops.activation import Activation


def weights(g: torch.Generator, element: str, e: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales 10 octaves apart at most."""
    scales = torch.randint(116, 127, (e, n, k // 32), dtype=torch.uint8, generator=g)
    if element == "e2m1":
        return torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, generator=g), scales
    return torch.randn(e, n, k, generator=g).to(torch.float8_e4m3fn), scales


def unpacked(p: HopperWeights) -> torch.Tensor:
    """fp64 [E, N, K] in packed row order, by the steps that the kernel takes on each word."""
    e, groups, tiles = p.factors.shape[0], p.factors.shape[1] // 16, -(-p.k // 64)
    if p.scales is None:
        parts = p.data.view(e, groups, tiles, 2, 8, 4, 2, 2, 4).view(torch.float8_e4m3fn).double()
        values = parts.permute(0, 1, 7, 4, 2, 3, 6, 5, 8).reshape(e, groups * 16, tiles * 64)
        return (values * p.factors.double()[..., None])[:, : p.n, : p.k]
    if p.orders_x:
        return at_places(p)[:, : p.n, x_order(p.k).argsort()[: p.k]]
    q = p.data.view(torch.int32).view(e, groups, tiles, 8, 4, 2, 2).numpy().view(np.uint32)
    words = (
        q & 0x81C081C0,
        (q << 3) & 0x01C001C0 | (q << 2) & 0x80008000,
        (q << 6) & 0x81C081C0,
        (q >> 4) & 0x01C001C0 | (q << 1) & 0x80008000,
    )
    halves = [np.stack([w & 0xFFFF, w >> 16], -1).astype(np.uint16).view(np.int16) for w in words]
    codes = torch.stack([torch.from_numpy(h).view(torch.bfloat16).double() for h in halves])
    values = codes.permute(1, 2, 7, 4, 3, 0, 6, 5, 8).reshape(e, groups * 16, tiles * 64)
    octaves = p.scales.view(torch.uint8).view(e, groups, tiles, 8, 2, 2).permute(0, 1, 4, 3, 2, 5)
    scale = torch.exp2(octaves.reshape(e, groups * 16, tiles * 2).double() - 127)
    return (values * scale.repeat_interleave(32, -1) * p.factors.double()[..., None])[:, : p.n, : p.k]


def at_places(p: HopperWeights) -> torch.Tensor:
    """fp64 [E, N rounded up to 16, K rounded up to 64]: what wgmma multiplies at each place, 32 at once, in which lane
    4 g + t has places 16 h + 4 t + e of rows g and g + 8; of e2m1 x e4m3."""
    e, groups, tiles = p.factors.shape[0], p.factors.shape[1] // 16, -(-p.k // 64)
    q = p.data.view(torch.int32).view(e, groups, tiles, 8, 4, 2, 2, 1).numpy().view(np.uint32)
    table = np.array([0, 0x08, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24], np.uint8)  # under the smallest scale
    at = np.arange(4, dtype=np.uint32)
    low = table[(q >> 4 * at) & 7] | ((q >> (8 * at + 7) & 1) << 7).astype(np.uint8)
    high = table[(q >> (16 + 4 * at)) & 7] | ((q >> (8 * at + 3) & 1) << 7).astype(np.uint8)
    codes = torch.from_numpy(np.stack([low, high])).view(torch.float8_e4m3fn).double()  # s, e, group, tile, g, t, h, r
    lanes = p.scales.view(torch.uint8).view(e, groups, tiles, 16)[..., torch.arange(32) // 2].view(codes.shape[1:6])
    steps = torch.stack([lanes & 15, lanes >> 4], -1)[..., None, :, None]
    values = (codes * torch.exp2(steps.double())).permute(1, 2, 7, 4, 3, 0, 6, 5, 8)
    return values.reshape(e, groups * 16, tiles * 64) * p.factors.double()[..., None]


@pytest.mark.parametrize("k", [32, 64, 96, 160, 320])
def test_x_has_at_each_place_what_weights_have_there(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    w, scales = weights(g, "e2m1", 1, 48, k)
    x = torch.randn(3, k, generator=g).to(torch.float8_e4m3fn)
    left = in_x_order(x)
    assert torch.equal(left.double(), torch.nn.functional.pad(x.double(), (0, -k % 64))[:, x_order(k)])
    assert torch.equal(in_x_order(left)[:, :k].double(), x.double())
    products = left.double() @ at_places(pack_hopper(w, scales, "e4m3"))[0].T
    assert torch.equal(products, x.double() @ dequantize_mx(w, scales, "e2m1", torch.float64)[0].T)


@pytest.mark.parametrize(
    ("n", "k", "pairs"), [(48, 2880, "halves"), (40, 32, None), (16, 96, "interleaved"), (48, 160, None)]
)
@pytest.mark.parametrize("x_format", ["bf16", "e4m3"])
def test_packed_e2m1_weights_are_the_same_numbers(n: int, k: int, pairs: str | None, x_format: str) -> None:
    w, scales = weights(torch.Generator().manual_seed(n), "e2m1", 2, n, k)
    packed = pack_hopper(w, scales, x_format, pairs)
    expected = dequantize_mx(w, scales, "e2m1", torch.float64)[:, row_order(n, pairs)]
    assert packed.rounded == 0
    assert torch.equal(unpacked(packed), expected)


def test_packed_e4m3_weights_move_by_half_a_step_at_most() -> None:
    w, scales = weights(torch.Generator().manual_seed(1), "e4m3", 2, 32, 192)
    packed = pack_hopper(w, scales, "e4m3", "halves")
    expected = dequantize_mx(w, scales, "e4m3", torch.float64)[:, row_order(32, "halves")]
    got = unpacked(packed)
    largest = packed.factors[:, :32].double()[..., None]
    assert ((got - expected).abs() <= 2.0**-10 * largest).all()
    assert torch.equal(got[expected.abs() >= 2.0**-6 * largest], expected[expected.abs() >= 2.0**-6 * largest])
    assert packed.rounded == (got != expected).sum()


def test_scales_too_far_apart_are_counted_and_move_little() -> None:
    w, scales = weights(torch.Generator().manual_seed(2), "e2m1", 1, 16, 128)
    scales[0, :, 0], scales[0, 3, 0] = 127, 127 - OCTAVES - 20
    scales[0, 5, 1] = scales[0, 5].max() - OCTAVES - 1
    w[0, 7] = 0  # a row of zeros, whatever its scales are
    scales[0, 7] = torch.tensor([0, 254, 3, 100], dtype=torch.uint8)
    packed = pack_hopper(w, scales, "e4m3")
    expected = dequantize_mx(w, scales, "e2m1", torch.float64)
    largest = torch.exp2(scales[0].double().amax(-1) - 127)
    largest[7] = 0
    assert packed.rounded > 0
    assert ((unpacked(packed) - expected).abs()[0] <= 2.0**-13 * largest[:, None]).all()
    assert torch.equal(unpacked(pack_hopper(w, scales, "bf16")), expected)


def test_a_nan_scale_makes_its_row_nan_and_no_other() -> None:
    w, scales = weights(torch.Generator().manual_seed(3), "e2m1", 1, 16, 64)
    scales[0, 9, 1] = 255
    for x_format in ("bf16", "e4m3"):
        assert pack_hopper(w, scales, x_format).factors.isnan().flatten().nonzero().tolist() == [[9]]


def test_what_no_kernel_takes_is_refused() -> None:
    w, scales = weights(torch.Generator().manual_seed(4), "e4m3", 1, 24, 64)
    with pytest.raises(ValueError, match="use x_format='e4m3'"):
        pack_hopper(w, scales, "bf16")
    with pytest.raises(ValueError, match="pad the intermediate size"):
        pack_hopper(w, scales, "e4m3", "halves")
    packed = pack_hopper(w, scales, "e4m3")
    routing = route_torch(torch.zeros(1, 1, dtype=torch.int32), 1, 32)
    with pytest.raises(ValueError, match="route and pack again"):
        hopper_gemm(w, None, packed, torch.empty(1, 24), routing, HopperConfig(16))
    ordered = pack_hopper(*weights(torch.Generator().manual_seed(4), "e2m1", 1, 24, 96), "e4m3")
    x = torch.zeros(2, 96).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="takes 128 columns in x_order"):
        hopper_gemm(x, torch.ones(2), ordered, torch.empty(2, 24), None, HopperConfig(16))
    with pytest.raises(ValueError, match="takes 64 columns;"):
        hopper_gemm(x, torch.ones(2), packed, torch.empty(2, 24), None, HopperConfig(16))


@given(
    st.integers(1, 300).map(lambda n: 32 * n), st.sampled_from([64, 128]), st.integers(3, 16), st.booleans(),
    st.sampled_from([64, 128, 256]), st.sampled_from([4, 8]),
)  # fmt: skip
def test_every_step_was_asked_for(k: int, block_k: int, stages: int, known: bool, block_n: int, warps: int) -> None:
    """What the loop multiplies, as the kernel fills its stages: ahead, in rounds, and in what is left of K."""
    deep, steps = stages - 2, -(-k // block_k)
    unroll = unrolled(stages, block_n, block_k, warps) if known else 2
    first = rounds_of(k, block_k, deep, unroll, known) * unroll
    holds = {step % stages: step for step in range(min(deep, max(steps, first)))}
    for step in range(max(steps, first)):
        assert holds[step % stages] == step
        ahead = step + deep
        if step < first or ahead < steps:
            assert ahead < k // block_k or step >= first or not known  # rounds that are known mask nothing
            holds[ahead % stages] = ahead
    assert first <= steps or not known


@pytest.mark.parametrize(("element", "x_format"), [(None, "bf16"), ("e4m3", "e4m3")])
def test_tiles_of_dense_layers_compile(element: str | None, x_format: str) -> None:
    """Those of selection's rules, and one that is as narrow as N, with a tail of K."""
    from emulated_triton import emulated_triton

    from sglang_amd_quant.selection.rules import TILE_RULES

    g = torch.Generator().manual_seed(8)
    packed = pack_hopper(*weights(g, "e2m1", 1, 512, 128), x_format)
    x = torch.randn(40, 128, generator=g).bfloat16()
    rules = [rule for rule in TILE_RULES if rule.kernel == f"triton_hopper_{x_format}"]
    tiles = {HopperConfig(r.block_m, n, r.block_k, r.num_warps, r.num_stages) for r in rules for _, n in r.n_ladder}
    with emulated_triton("sm_90") as launches:
        for tile in tiles:
            linear_hopper(x, packed, tile, element=element)
        narrow = pack_hopper(*weights(g, "e2m1", 1, 80, 96), x_format)
        linear_hopper(x[:, :96].contiguous(), narrow, HopperConfig(8, max_registers=96), element=element)
    gemms = [made.compiled.report for made in launches if made.compiled.variant.function == "hopper_moe_kernel"]
    assert [report.problems for report in gemms] == [[]] * (len(tiles) + 1)


def int4_weights(
    g: torch.Generator, e: int, n: int, k: int, group: int, dtype: torch.dtype, pairs: str | None = None
) -> tuple[HopperWeights, torch.Tensor]:
    """Random weights with zero points as the kernel takes them, and their values in it, fp64 [E, N, K]."""
    codes = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, generator=g)
    scales = (torch.rand(e, n, k // group, generator=g) / 64 + 0.001).to(dtype)
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=g)
    words = group_words(scales, zeros)
    order = row_order(n, pairs)
    kept = VALUES["mma_int4"].pack(codes[:, order]), SCALES["tile_group"].pack(words[:, order])
    x_format = "fp16" if dtype == torch.float16 else "bf16"
    packed = HopperWeights(kept[0].view(torch.uint16), kept[1], None, "int4", x_format, n, k, pairs, e, group)
    q = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).unflatten(-1, (-1, group)).double()
    return packed, ((q - zeros[..., None].double()) * scales[..., None].double()).to(dtype).double().flatten(-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiles_of_int4_compile(group: int, dtype: torch.dtype) -> None:
    """Those of selection's rules, with a tail of K, and of experts with an activation behind them."""
    from emulated_triton import emulated_triton

    from sglang_amd_quant.selection.rules import TILE_RULES

    g = torch.Generator().manual_seed(10)
    dense, _ = int4_weights(g, 1, 512, 5 * group, group, dtype)
    experts, _ = int4_weights(g, 2, 512, 5 * group, group, dtype, "halves")
    x = torch.randn(40, 5 * group, generator=g).to(dtype)
    rules = [rule for rule in TILE_RULES if rule.kernel == "triton_hopper_int4"]
    tiles = {HopperConfig(r.block_m, n, r.block_k, r.num_warps, r.num_stages) for r in rules for _, n in r.n_ladder}
    routing = route_torch(torch.zeros(40, 1, dtype=torch.int32), 2, 16)
    with emulated_triton("sm_90") as launches:
        for tile in tiles if group == 128 else sorted(tiles, key=str)[:1]:
            linear_hopper(x, dense, tile, element=None)
        hopper_gemm(
            x, None, experts, torch.empty(40, 256, dtype=dtype), routing, HopperConfig(16, num_stages=6),
            activation="silu",
        )  # fmt: skip
    assert [made.compiled.report.problems for made in launches] == [[]] * len(launches)


@pytest.mark.parametrize(("element", "x_format"), [(None, "bf16"), ("e4m3", "e4m3")])
def test_one_token_takes_no_routing_launch(element: str | None, x_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the kernels compile as they are launched where launches overlap."""
    from emulated_triton import emulated_triton
    from sglang_amd_quant.kernels.triton import hopper

    monkeypatch.setattr(hopper, "overlap", lambda x: {"OVERLAP": True})
    g = torch.Generator().manual_seed(9)
    w13 = pack_hopper(*weights(g, "e2m1", 4, 192, 128), x_format, "halves")
    w2 = pack_hopper(*weights(g, "e2m1", 4, 128, 96), x_format)
    x, ids = torch.randn(1, 128, generator=g).bfloat16(), torch.tensor([[3, -1]])
    with emulated_triton("sm_90") as launches:
        config = HopperConfig(16)
        fused_moe_hopper(x, ids, torch.rand(1, 2), w13, w2, config, config, element=element)
    names = [made.compiled.variant.function for made in launches]
    assert names == ["hopper_moe_kernel", "hopper_moe_kernel", "combine_kernel"]  # which quantize x themselves
    gemms = [made.compiled for made in launches if made.compiled.variant.function == "hopper_moe_kernel"]
    assert [made.report.problems for made in gemms] == [[], []]
    constants = [made.variant.constants for made in gemms]
    assert [(c["AHEAD"], c["LATE"]) for c in constants] == [(False, element is None), (True, False)]


def test_rows_that_shared_memory_does_not_hold_are_quantized_by_a_launch() -> None:
    from emulated_triton import emulated_triton

    high = HopperConfig(64, 128, 64)
    assert high.fits("e4m3", "e2m1", 1024)
    assert not high.fits("e4m3", "e2m1", 4096)
    g = torch.Generator().manual_seed(12)
    w13 = pack_hopper(*weights(g, "e2m1", 4, 64, 4096), "e4m3", "halves")
    w2 = pack_hopper(*weights(g, "e2m1", 4, 4096, 32), "e4m3")
    x, ids = torch.randn(1, 4096, generator=g).bfloat16(), torch.tensor([[3, -1]])
    with emulated_triton("sm_90") as launches:
        fused_moe_hopper(x, ids, torch.rand(1, 2), w13, w2, high, high, element="e4m3")
    names = [made.compiled.variant.function for made in launches]
    assert names == ["quant_mx_kernel", "hopper_moe_kernel", "hopper_moe_kernel", "combine_kernel"]
    assert [made.compiled.report.problems for made in launches] == [[]] * 4


def test_rows_alone_are_few_against_experts() -> None:
    ids = torch.zeros(4, 4, dtype=torch.int32)
    assert alone(ids[:1], 2, 16) is not None
    assert alone(ids, 16 * FEW, 16) is not None
    assert alone(ids, 16 * FEW - 1, 16) is None
    strided = torch.arange(16, dtype=torch.int32).view(4, 4)[:, :2]
    few = alone(strided, 128, 16)
    assert few is not None
    assert few.block_experts.tolist() == strided.flatten().tolist()


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    "config",
    [HopperConfig(16, 64, 128), HopperConfig(64, 128, 64, 4, 6), HopperConfig(128), HopperConfig(256, 128, 64, 8, 4),
     HopperConfig(8, 256, 64, 4, 4, max_registers=128)],
    ids=str,
)  # fmt: skip
def test_int4_on_the_gpu(config: HopperConfig, group: int, dtype: torch.dtype) -> None:
    """Dense and grouped, with tails, against fp64 of weights in x's dtype: sums are fp32, so that an error of a bit of
    the sum of magnitudes is more than they lose."""
    g = torch.Generator().manual_seed(11)
    e, n, k, m = 3, 208, 5 * group, 150
    dense, values = int4_weights(g, 1, n, k, group, dtype)
    x = torch.randn(m, k, generator=g).to(dtype)
    y = torch.full((m, n), torch.nan, device="cuda")
    hopper_gemm(x.cuda(), None, _to_cuda(dense), y, None, config)
    bound = x.double().abs() @ values[0].abs().T * 2.0**-20
    assert ((y.cpu().double() - x.double() @ values[0].T).abs() <= bound).all()
    experts, values = int4_weights(g, e, n, k, group, dtype)
    ids = torch.randint(-1, e, (m, 1), generator=g).int()
    y.fill_(torch.nan)
    hopper_gemm(x.cuda(), None, _to_cuda(experts), y, route_torch(ids.cuda(), e, config.block_m), config)
    for expert in range(e):
        mine = (ids == expert).flatten()
        wanted, bound = x[mine].double() @ values[expert].T, x[mine].double().abs() @ values[expert].abs().T * 2.0**-20
        assert ((y.cpu()[mine].double() - wanted).abs() <= bound).all()
    assert y.cpu()[(ids < 0).flatten()].isnan().all()


def _to_cuda(w: HopperWeights) -> HopperWeights:
    assert w.scales is not None
    return replace(w, data=w.data.cuda(), scales=w.scales.cuda())


@GPU
@pytest.mark.parametrize("kind", ["silu", "swigluoai"])
@pytest.mark.parametrize(("element", "x_format"), [("e2m1", "bf16"), ("e2m1", "e4m3"), ("e4m3", "e4m3")])
def test_every_config_of_the_search_on_the_gpu(element: str, x_format: str, kind: str) -> None:
    """Gate_up and down against fp64 of the same operands, tails along every dimension; bounds as in bench.moe."""
    from bench.moe_tune import everything

    g = torch.Generator().manual_seed(5)
    e, n, k, top_k, tokens = 3, 352, 416, 2, 150
    w, scales = weights(g, element, e, n, k)
    ids = torch.randint(-1, e, (tokens, top_k), generator=g).int()
    x = torch.randn(tokens, k, generator=g).bfloat16()
    bias, row_weights = torch.randn(e, n, generator=g).bfloat16(), torch.rand(tokens * top_k, generator=g)
    act_element, ordered = None if x_format == "bf16" else "e4m3", (element, x_format) == ("e2m1", "e4m3")
    left, factors = activations(x.cuda(), act_element, None, x_format)
    values = left.cpu().double() * (1 if factors is None else factors.cpu().double()[:, None])
    left, factors = activations(x.cuda(), act_element, None, x_format, ordered)
    here = ids.flatten() >= 0
    act = Activation(kind, interleaved=kind == "swigluoai", limit=3.0)
    pairs = "interleaved" if act.interleaved else "halves"
    options = {"activation": kind, "limit": 3.0}
    for config in everything(x_format, element):
        routing = route_torch(ids, e, config.block_m)
        exact = mx_gemm_torch(
            values.bfloat16() if x_format == "bf16" else values, None, w, scales, bias=bias, row_ids=routing.row_ids,
            block_experts=routing.block_experts, top_k=top_k, dtype=torch.float64,
        )  # fmt: skip
        on_gpu = route_torch(ids.cuda(), e, config.block_m)
        for paired in (False, True):
            packed = pack_hopper(w.cuda(), scales.cuda(), x_format, pairs if paired else None)
            y = torch.full((tokens * top_k, n // (2 if paired else 1)), torch.nan, dtype=torch.bfloat16, device="cuda")
            more = options if paired else {"row_weights": row_weights.cuda()}
            hopper_gemm(left, factors, packed, y, on_gpu, config, top_k=top_k, bias=bias.cuda(), **more)
            expected = act(exact) if paired else exact * row_weights.double()[:, None]
            error = (y.cpu().double() - expected)[here].norm() / expected[here].norm()
            assert error <= 2.0**-9 * (1.02 if x_format == "bf16" else 2) * (2 if paired else 1), (config, paired)
            assert y.cpu()[~here].isnan().all()


@GPU
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("element", [None, "e4m3"])
def test_a_captured_moe_follows_a_new_routing(element: str | None, m: int) -> None:
    """With one token each row has a block of its own, which reads its expert before the launch in front has ended."""
    g = torch.Generator().manual_seed(6)
    x_format = "bf16" if element is None else "e4m3"
    e, hidden, inter = 8, 128, 64
    w13 = pack_hopper(*(t.cuda() for t in weights(g, "e2m1", e, 2 * inter, hidden)), x_format, "halves")
    w2 = pack_hopper(*(t.cuda() for t in weights(g, "e2m1", e, hidden, inter)), x_format)
    x, topk_weights = torch.randn(m, hidden).bfloat16().cuda(), torch.rand(m, 2).cuda()
    ids = torch.zeros(m, 2, dtype=torch.int32, device="cuda")
    config = HopperConfig(16)

    def run() -> torch.Tensor:
        return fused_moe_hopper(x, ids, topk_weights, w13, w2, config, config, element=element)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for routing in (torch.randint(-1, e, (m, 2)), torch.full((m, 2), -1), torch.randint(0, e, (m, 2))):
        ids.copy_(routing)
        graph.replay()
        assert torch.equal(y, run())
        assert torch.equal(y.isfinite(), torch.ones_like(y, dtype=torch.bool))


@GPU
@pytest.mark.parametrize(("m", "block_m", "block_k"), [(1, 8, 64), (4, 8, 128), (29, 8, 64), (29, 16, 128)])
@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_rows_quantized_by_the_kernel_are_those_of_a_launch(element: str, m: int, block_m: int, block_k: int) -> None:
    """To the bit, rows alone (m up to 4) or not, with rows of zeros, of subnormal numbers, of infinity and with NaN."""
    g = torch.Generator().manual_seed(7)
    e, n, k = 64, 96, 416
    packed = pack_hopper(*(t.cuda() for t in weights(g, element, e, n, k)), "e4m3")
    x = torch.randn(m, k, generator=g).bfloat16()
    x *= torch.tensor([1.0, 0.0, 1e-38, 1e38, torch.inf])[torch.arange(m) % 5, None]
    x[5:6, 7] = torch.nan
    x, ids = x.cuda(), torch.randint(-1, e, (m, 2), generator=g).int().cuda()
    routing = alone(ids, e, block_m) or route_torch(ids, e, block_m)
    results = []
    for left, factors in (activations(x, "e4m3", None, "e4m3", packed.orders_x), (x, None)):
        y = torch.full((2 * m, n), torch.nan, device="cuda")
        hopper_gemm(left, factors, packed, y, routing, HopperConfig(block_m, 128, block_k), top_k=2)
        results.append(y)
    assert torch.equal(*(y.nan_to_num(12345.0) for y in results))
    assert results[1].isfinite().any()


@GPU
@pytest.mark.parametrize("k", [32, 160, 288])
@pytest.mark.parametrize("config", [
    HopperConfig(16, 64, 128, 4, 6), HopperConfig(64, 64, 128), HopperConfig(64, 128, 64, 4, 8), HopperConfig(128),
    HopperConfig(128, 128, 64, 4, 6), HopperConfig(256, 128, 64, 8, 4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("element", "x_format"), [(None, "bf16"), ("e4m3", "e4m3")])
def test_fewer_steps_than_stages(k: int, config: HopperConfig, element: str | None, x_format: str) -> None:
    """Nothing is multiplied that an earlier launch has left in shared memory: NaN in the stage behind the last one that
    is filled, as that launch ends with zeros in all but the two before its own next."""
    if not config.fits(x_format, "e2m1"):
        pytest.skip(f"{config} does not fit")
    g = torch.Generator().manual_seed(k)
    long = (2 * config.num_stages + -(-k // config.block_k) + 1) * config.block_k
    before = pack_hopper(*(t.cuda() for t in weights(g, "e2m1", 1, 264 * config.block_n, long)), x_format)
    nothing = torch.full((config.block_m, long), torch.nan, device="cuda").bfloat16()
    linear_hopper(nothing, before, config, element=element)
    w, scales = weights(g, "e2m1", 1, 272, k)
    x = torch.randn(config.block_m - 3, k, generator=g).bfloat16().cuda()
    y = linear_hopper(x, pack_hopper(w.cuda(), scales.cuda(), x_format), config, element=element)
    left, factors = activations(x, element, None, x_format)
    values = left.double() * (1 if factors is None else factors.double()[:, None])
    exact = values @ dequantize_mx(w, scales, "e2m1", torch.float64)[0].cuda().T
    assert (y.double() - exact).norm() / exact.norm() <= 2.0**-9 * (1.02 if x_format == "bf16" else 2)


@GPU
@pytest.mark.parametrize("m", [1, 40, 300, 1100])
@pytest.mark.parametrize(("element", "x_format"), [(None, "bf16"), ("e4m3", "e4m3")])
def test_a_dense_layer_on_the_gpu(m: int, element: str | None, x_format: str) -> None:
    g = torch.Generator().manual_seed(m)
    w, scales = weights(g, "e2m1", 1, 272, 416)
    x, bias = torch.randn(m, 416, generator=g).bfloat16().cuda(), torch.randn(272, generator=g).bfloat16().cuda()
    packed = pack_hopper(w.cuda(), scales.cuda(), x_format)
    config = HopperConfig(16 if m < 16 else 64 if m < 200 else 128, 64 if m < 64 else 128)
    y = linear_hopper(x, packed, config, element=element, bias=bias)
    left, factors = activations(x, element, None, x_format)
    values = left.double() * (1 if factors is None else factors.double()[:, None])
    exact = values @ dequantize_mx(w, scales, "e2m1", torch.float64)[0].cuda().T + bias.double()
    assert (y.double() - exact).norm() / exact.norm() <= 2.0**-9 * (1.02 if x_format == "bf16" else 2)
