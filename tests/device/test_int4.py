"""int4 groups on the accelerator, laid out as after loading: kernels that selection picks, and graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_layers import as_served_on_a_cpu, assert_close, exact_linear, tokens

from sglang_amd_quant.ops import linear, moe
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out, lay_out_experts

MS = (1, 5, 16, 17, 32, 33, 64, 300, 1500)
DTYPES = (torch.bfloat16, torch.float16)
GPT_OSS = Activation("swigluoai", interleaved=True, limit=7.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("n", "k"), [(1, 128), (200, 640), (2304, 6144)])
def test_linear(device_linear, needs, captured, n, k, group, dtype):
    needs("triton_int4_gemm")
    plain = device_linear("int4_w4a16", n, k, group=group, symmetric=False)
    layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
    layer.prepare()
    bias = torch.randn(n, device="cuda")
    for m in MS:
        assert linear.bound(layer.text).plan(m, dtype).choice.kernel != "reference"
        x = torch.randn(m, k, device="cuda").to(dtype)
        assert_close(layer(x, bias), exact_linear(layer, x, bias), k)
        assert_close(plain(x, bias), exact_linear(plain, x, bias), k)
    x = torch.randn(3, k, device="cuda").to(dtype)
    graph, out = captured(lambda: layer(x, bias))
    x.copy_(torch.randn(3, k))
    graph.replay()
    assert torch.equal(out, layer(x, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, Activation("relu2", gated=False)], ids=lambda a: a.kind)
@pytest.mark.parametrize("group", [32, 128])
def test_moe(device_moe, needs, captured, group, activation, dtype):
    needs("triton_int4_moe")
    experts, hidden, inter, top_k = 16, 512, 384, 4
    plain = device_moe(
        "int4_w4a16", experts, hidden, inter, top_k, activation=activation, biases=activation is GPT_OSS, group=group,
        symmetric=False, scale=1.5,
    )  # fmt: skip
    w13, w2 = lay_out_experts(plain.w13, plain.w2, plain.gate_up, plain.down)
    layer = replace(plain, w13=w13, w2=w2)
    layer.prepare()
    for m in (1, 7, 64, 300):
        given = tuple(t.cuda() for t in tokens(m, hidden, experts, top_k, dtype, dropped=0.2))
        assert "reference" not in moe.bound(layer.text).pair(m, dtype).kernels
        out, want = layer(*given), as_served_on_a_cpu(plain)(*given)
        assert (out.shape, out.dtype) == (want.shape, dtype)
        # as in tests/ops/test_int4.py: roundings of the result, and of hidden values, to 8 bits or more
        assert (out.double() - want.double()).abs().max() <= want.double().abs().max() * 3 * 2**-8
        graph, replayed = captured(lambda given=given: layer(*given))
        for target, new in zip(given, tokens(m, hidden, experts, top_k, dtype, dropped=0.5), strict=True):
            target.copy_(new)
        graph.replay()
        assert torch.equal(replayed, layer(*given))
