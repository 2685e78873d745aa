"""Linear layers on the accelerator: kernels that selection picks, against fp64 of the same operands; graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_layers import MX, assert_close, exact_linear

from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import fuses_activation, lay_out
from sglang_amd_quant.ops.linear import bound
from sglang_amd_quant.selection import Epilogue

SHAPES = ((1, 32), (37, 2080), (130, 96), (2304, 6144))
MS = (1, 2, 3, 4, 5, 16, 17, 64, 100, 300)


def kernel_of(layer, m: int, dtype: torch.dtype = torch.bfloat16) -> str:
    return bound(layer.text).plan(m, dtype).choice.kernel


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_every_m(device_linear, needs, scheme, n, k, biased):
    needs("triton_mx_gemm")
    layer = device_linear(scheme, n, k)
    layer.prepare()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    for m in MS:
        x = torch.randn(m, k, device="cuda").bfloat16()
        assert kernel_of(layer, m) != "reference"
        assert_close(layer(x, bias), exact_linear(layer, x, bias), k)
    assert layer(torch.empty(0, k, device="cuda").bfloat16(), bias).shape == (0, n)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_gemv_serves_few_rows(device_linear, needs, m):
    needs("gemv_mxfp4")
    layer = device_linear("w4a16", 1536, 6144)
    assert kernel_of(layer, m) == "gemv_mxfp4"
    for bias in (None, torch.randn(1536, device="cuda"), torch.randn(1536, device="cuda").half()):
        for x in (torch.randn(m, 6144, device="cuda"), torch.randn(m, 6150, device="cuda")[:, 3:6147]):
            assert_close(layer(x.bfloat16(), bias), exact_linear(layer, x.bfloat16(), bias), 6144)


def as_loaded(plain):
    """The layer as after loading: its weight laid out for the kernels that this device has."""
    layer = replace(plain, weight=lay_out(plain.weight, plain.problem))
    layer.prepare()
    return layer


def close(layer, got, exact, k):
    """As `assert_close`, but for rows of e4m3, whose products the matrix unit adds with 13 bits (`bound` in
    bench/decode_problem.py): there the whole result may be off by 2.5e-3, as measured for K 8192 where sums are never
    added as floats, and by the rounding to bf16, at most 2^-9 of each element, which is half an ulp."""
    if layer.weight.layout.name == "hopper_e4m3":
        assert got.isfinite().all()
        assert (got.double() - exact[0]).norm() <= (2.5e-3 + 2.0**-9) * exact[0].norm()
    else:
        assert_close(got, exact, k)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize(("n", "k"), [(32, 32), (48, 2080), (3072, 2048), (24576, 4096)])
@pytest.mark.parametrize("biased", [False, True])
def test_gate_and_up_are_activated(device_linear, needs, captured, scheme, n, k, biased):
    """By decode kernels and tiles, at every M, as the same layer without activation and silu behind it in fp64: a sum's
    error is stretched by 1.1 at most, and what is rounded is the result alone."""
    needs("hip_decode_e4m3")
    plain = device_linear(scheme, n, k)
    silu = replace(plain, problem=replace(plain.problem, epilogue=Epilogue(biased, "silu")))
    assert fuses_activation(silu.problem)
    layer, bias = as_loaded(silu), torch.randn(n, device="cuda").bfloat16() if biased else None
    for m in (1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 65, 300):
        x = torch.randn(m, k, device="cuda").bfloat16()
        got, want = layer(x, bias), Activation()(exact_linear(plain, x, bias)[0])
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= (2 * 2.5e-3 + 2.0**-9) * want.norm()
    graph, y = captured(lambda: layer(x, bias))
    graph.replay()
    assert torch.equal(y, layer(x, bias))


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 2080), (1536, 6144), (6144, 2048)])
@pytest.mark.parametrize("biased", [False, True])
def test_as_loaded(device_linear, needs, scheme, n, k, biased):
    """Decode and prefill kernels on the one layout that both read, at every M."""
    needs("hip_decode_e4m3")
    plain = device_linear(scheme, n, k)
    layer, bias = as_loaded(plain), torch.randn(n, device="cuda").bfloat16() if biased else None
    packed_for = "bf16" if scheme == "w4a16" else "e4m3"
    assert layer.weight.layout.name == f"hopper_{packed_for}"
    decode, tiles = "hip_decode" if scheme == "w4a16" else "hip_decode_e4m3", f"triton_hopper_{packed_for}"
    rows = (1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64, 300)
    assert {kernel_of(layer, m) for m in rows} == {decode, tiles}
    for m in rows:
        for x in (
            torch.randn(m, k, device="cuda").bfloat16(),
            torch.randn(m, k + 9, device="cuda").bfloat16()[:, 3:-6],
        ):
            close(layer, layer(x, bias), exact_linear(plain, x, bias), k)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 8, 32, 100])
def test_as_loaded_in_a_graph(device_linear, captured, needs, scheme, m):
    """Several launches in a row, each fed by the one before, as in a model: they may overlap, and must not race."""
    needs("hip_decode_e4m3")
    plain = device_linear(scheme, 512, 512)
    layer, x = as_loaded(plain), torch.randn(m, 512, device="cuda").bfloat16()

    def run():
        y = x
        for _ in range(4):
            y = layer(y) * 0.05
        return y

    graph, out = captured(run)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, run())
    y = x
    for _ in range(4):
        close(layer, layer(y), exact_linear(plain, y), 512)
        y = layer(y) * 0.05


def test_static_fp8_decode(device_linear, needs):
    needs("hip_decode_e4m3")
    plain = device_linear("mxfp8", 256, 512, static=True)
    layer = as_loaded(plain)
    for m in (1, 20, 100):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        close(layer, layer(x), exact_linear(plain, x), 512 + 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_models_in_other_dtypes(device_linear, needs, dtype):
    needs("triton_mx_gemm")
    for scheme in MX:
        layer = device_linear(scheme, 130, 384)
        x, bias = torch.randn(2, 3, 384, dtype=dtype, device="cuda"), torch.randn(130, dtype=dtype, device="cuda")
        assert_close(layer(x, bias), exact_linear(layer, x, bias), 384)
        wanted = {torch.float16: "triton_fp16_gemm", torch.float32: "reference"}[dtype] if scheme == "w4a16" else None
        assert kernel_of(layer, 6, dtype) == (wanted or "triton_mx_gemm")


@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8"])
def test_static_fp8(device_linear, needs, scheme):
    needs("triton_mx_gemm")
    layer, bias = device_linear(scheme, 130, 384, static=True), torch.randn(130, device="cuda").bfloat16()
    for m in (1, 40):
        x = torch.randn(m, 384, device="cuda").bfloat16()
        assert_close(layer(x, bias), exact_linear(layer, x, bias), 384 + 2)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 4, 16, 100])
def test_a_graph_replays_on_new_values(device_linear, captured, needs, scheme, m):
    needs("triton_mx_gemm")
    layer = device_linear(scheme, 520, 768)
    layer.prepare()
    x, bias = torch.randn(m, 768, device="cuda").bfloat16(), torch.randn(520, device="cuda").bfloat16()
    graph, out = captured(lambda: layer(x, bias))
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, layer(x, bias))
        assert_close(out, exact_linear(layer, x, bias), 768)


def test_prepared_kernels_are_loaded_before_a_capture(device_linear, needs):
    """No warm-up: whatever the driver must load for the GEMV, `prepare` has loaded."""
    needs("gemv_mxfp4")
    layer = device_linear("w4a16", 256, 512)
    layer.prepare()
    x = torch.randn(2, 512, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    graph.replay()
    assert_close(out, exact_linear(layer, x), 512)


def test_compiled_is_eager(device_linear, needs):
    needs("triton_mx_gemm")
    layer = device_linear("w4a8", 256, 512)
    run = torch.compile(layer.__call__, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (2, 33):
        x = torch.randn(m, 512, device="cuda").bfloat16()
        assert torch.equal(run(x), layer(x))


@pytest.mark.parametrize(("scheme", "m"), [("w4a16", 1), ("w4a16", 8), ("mxfp8", 8)])
def test_weights_beyond_two_gibibytes(device_linear, needs, scheme, m):
    """The last rows, whose byte offsets are no int32, against fp64; all rows finite."""
    needs("triton_mx_gemm")
    k = 8192
    small = device_linear(scheme, 64, k)
    copies = (2**31 // small.weight.data.nbytes) + 2
    weight = small.weight
    n = 64 * copies
    big = replace(
        weight, data=weight.data.repeat(copies, 1), scales=weight.scales.repeat(copies, 1), shape=(n, k),
        pad=replace(weight.pad, n=n),
    )  # fmt: skip
    layer = replace(small, weight=big, problem=replace(small.problem, n=n))
    assert big.data.nbytes > 2**31
    x = torch.randn(m, k, device="cuda").bfloat16()
    out, want = layer(x), small(x)
    assert torch.equal(out.view(m, copies, 64)[:, -1], out.view(m, copies, 64)[:, 0])
    assert_close(out[:, -64:], exact_linear(small, x), k)
    assert_close(want, exact_linear(small, x), k)
    assert torch.isfinite(out).all()
