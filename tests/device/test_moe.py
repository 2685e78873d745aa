"""Fused MoE and routing on the accelerator, against the torch reference; graphs that replay on other routings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from op_layers import MX, as_served_on_a_cpu, tokens

from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out_experts
from sglang_amd_quant.ops.moe import bound
from sglang_amd_quant.ops.routing import route

E, H, INTER, TOP_K = 16, 512, 352, 4
GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)
STEP = {"w4a16": 0.0, "w4a8": 2**-3, "mxfp8": 2**-3, "mxfp4": 2**-1}


def cuda(given):
    return tuple(tensor.cuda() for tensor in given)


def close(got, want, scheme):
    """As in tests/ops/test_moe.py: three roundings to bf16, and one step of the format in one of I terms."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.isfinite(got).all()
    slack = 3 * 2**-8 + STEP[scheme] / math.sqrt(INTER)
    assert (got.double() - want.double()).abs().max() <= want.double().abs().max() * slack


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 7, 64, 300])
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS], ids=lambda a: a.kind)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_scheme(device_moe, needs, scheme, m, activation, dtype):
    needs("triton_moe")
    layer = device_moe(scheme, E, H, INTER, TOP_K, activation=activation, biases=activation is GPT_OSS)
    layer.prepare()
    given = cuda(tokens(m, H, E, TOP_K, dtype, dropped=0.2))
    assert "reference" not in bound(layer.text).pair(m, dtype).kernels
    close(layer(*given), as_served_on_a_cpu(layer)(*given), scheme)


def served(layer):
    """The layer as after loading: weights laid out for the kernels that this device has."""
    w13, w2 = lay_out_experts(layer.w13, layer.w2, layer.gate_up, layer.down)
    return replace(layer, w13=w13, w2=w2)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS], ids=lambda a: a.kind)
def test_as_loaded(device_moe, captured, needs, scheme, activation):
    """In the layout that this device's kernels want, on sm_90 wgmma fragments: eager, then a graph on other ids."""
    needs("triton_hopper_bf16")
    plain = device_moe(scheme, E, H, INTER, TOP_K, activation=activation, biases=activation is GPT_OSS, scale=1.5)
    layer = served(plain)
    assert layer.w13.layout.packed
    layer.prepare()
    for m in (1, 7, 64, 300):
        given = cuda(tokens(m, H, E, TOP_K, dropped=0.2))
        assert "reference" not in bound(layer.text).pair(m, torch.bfloat16).kernels
        close(layer(*given), as_served_on_a_cpu(plain)(*given), scheme)
        graph, out = captured(lambda given=given: layer(*given))
        for target, new in zip(given, tokens(m, H, E, TOP_K, dropped=0.5), strict=True):
            target.copy_(new)
        graph.replay()
        assert torch.equal(out, layer(*given))


@pytest.mark.parametrize("options", [{"static": True}, {"combine": False}, {"weight_on_input": True}], ids="-".join)
def test_as_loaded_does_what_sglang_asks(device_moe, needs, options):
    needs("triton_hopper_e4m3")
    top_k = 1 if "weight_on_input" in options else TOP_K
    plain = device_moe("w4a8", E, H, INTER, top_k, **options)
    layer = served(plain)
    for m in (3, 90):
        given = cuda(tokens(m, H, E, top_k, dropped=0.2))
        close(layer(*given), as_served_on_a_cpu(plain)(*given), "w4a8")


def test_skewed_routing(device_moe, needs):
    """All tokens on one expert, all dropped, none at all."""
    needs("triton_moe")
    layer = device_moe("w4a8", E, H, INTER, TOP_K)
    x, ids, weights = cuda(tokens(150, H, E, TOP_K))
    one = torch.full_like(ids, -1)
    one[:, 0] = 5
    close(layer(x, one, weights), as_served_on_a_cpu(layer)(x, one, weights), "w4a8")
    assert not layer(x, torch.full_like(ids, -1), weights).any()
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, H)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_graph_replays_on_another_routing(device_moe, captured, needs, scheme, m):
    needs("triton_moe")
    layer = device_moe(scheme, E, H, INTER, TOP_K)
    x, ids, weights = cuda(tokens(m, H, E, TOP_K))
    graph, out = captured(lambda: layer(x, ids, weights))
    for dropped in (0.0, 0.5, 1.0):
        for target, new in zip((x, ids, weights), tokens(m, H, E, TOP_K, dropped=dropped), strict=True):
            target.copy_(new)
        graph.replay()
        assert torch.equal(out, layer(x, ids, weights))


def test_compiled_is_eager(device_moe, needs):
    needs("triton_moe")
    layer = device_moe("w4a16", E, H, INTER, TOP_K)
    run = torch.compile(layer.__call__, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 33):
        given = cuda(tokens(m, H, E, TOP_K))
        assert torch.equal(run(*given), layer(*given))


@pytest.mark.parametrize(("m", "top_k", "experts", "block_m"), [(1, 4, 128, 16), (700, 8, 256, 64), (33, 16, 1024, 16)])
def test_routing_is_the_cpus(m, top_k, experts, block_m):
    """Blocks and the rows of each expert; their order within an expert is a device kernel's own."""
    ids = torch.randint(-1, experts, (m, top_k), dtype=torch.int32)
    got, want = route(ids.cuda(), experts, block_m), route(ids, experts, block_m)
    assert torch.equal(got.block_experts.cpu(), want.block_experts)
    rows = [r.row_ids.cpu().view(r.blocks, block_m) for r in (got, want)]
    for expert in range(-1, experts):
        mine = [r[want.block_experts == expert].flatten().sort().values for r in rows]
        assert torch.equal(*mine)
