"""The linear op: fakes, launchers, a launch that ends in the emulator; against fp64 of the same quantized operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_layers import MX, assert_close, exact_linear, make_linear, opchecks, with_values
from sglang_amd_quant.kernels.hip.manifest import AMD_DECODE_M, AMD_MOE_DECODE_M, find

from sglang_amd_quant.errors import SchemeError, ShapeError, UnsupportedError
from sglang_amd_quant.ops import hip, layout, linear, operand
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.layout import lay_out
from sglang_amd_quant.ops.linear import KERNELS, LinearCall, LinearKernel, QuantizedLinear, bound
from sglang_amd_quant.ops.operand import Operand
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import Config, Epilogue, GemmProblem, kernels, shipped
from sglang_amd_quant.tensor import MxTensor, PadPlan

N, K = 48, 96


def test_every_shipped_linear_kernel_has_a_launcher():
    mine = {name for name in shipped() if "linear" in kernels()[name].ops}
    assert mine == set(KERNELS)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_op_by_the_reference(scheme, dtype):
    layer = make_linear(scheme, N, K)
    x, bias = torch.randn(2, 3, K, dtype=dtype), torch.randn(N, dtype=dtype)
    out = layer(x, bias)
    assert (out.shape, out.dtype) == ((2, 3, N), dtype)
    assert_close(out, exact_linear(layer, x, bias), K)
    assert torch.equal(out, with_values(layer)(x, bias))
    assert layer(x[:0]).shape == (0, 3, N)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("options", ["plain", "bias", "static"])
def test_opcheck(scheme, options):
    """Schema, fake against real, and the traced op with dynamic shapes."""
    layer = make_linear(scheme, N, K, static=options == "static")
    x, bias = torch.randn(3, K).bfloat16(), torch.randn(N).bfloat16() if options == "bias" else None
    args = (x, layer.weight.tensors, bias, layer.act.scale, layer.text)
    torch.library.opcheck(torch.ops.amd_mx.linear.default, args, test_utils=opchecks(scheme))


def gated(scheme, arch="cpu", n=N, k=K):
    return make_linear(scheme, n, k, arch=arch, epilogue=Epilogue(activation="silu"))


def close_after_silu(out, layer, x, bias=None):
    """silu stretches an error by 1.1 at most, and its product with up by what either is: against the largest result,
    2^-8 of rounding to bf16 and a few 2^-13 of the sums' are under 2^-6."""
    want = Activation()(exact_linear(layer, x, bias)[0])
    assert out.shape == want.shape
    assert (out.double() - want).abs().max() <= 2.0**-6 * want.abs().max()


@pytest.mark.parametrize("scheme", MX)
def test_an_activation_is_part_of_the_op(scheme):
    layer = gated(scheme)
    x, bias = torch.randn(2, 3, K).bfloat16(), torch.randn(N).bfloat16()
    out = layer(x, bias)
    close_after_silu(out, layer, x, bias)
    assert torch.equal(out, with_values(layer)(x, bias))
    assert layer(x[:0]).shape == (0, 3, N // 2)
    args = (x, layer.weight.tensors, None, None, layer.text)
    torch.library.opcheck(torch.ops.amd_mx.linear.default, args, test_utils=opchecks(scheme))


@pytest.mark.parametrize("scheme", MX)
def test_what_a_kernel_does_not_activate_the_op_does(triton_twins, scheme):
    layer, x = gated(scheme, "sm_90"), torch.randn(3, K).bfloat16()
    for bias in (None, torch.randn(N).bfloat16()):
        close_after_silu(layer(x, bias), layer, x, bias)
    assert [call["y"].shape for call in triton_twins] == [(3, N)] * 2


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 70])
def test_hopper_activates_its_sums(hopper_twins, scheme, m):
    plain, x = gated(scheme, "sm_90"), torch.randn(m, K).bfloat16()
    layer = laid_out(plain)
    close_after_silu(layer(x, torch.ones(N).bfloat16()), plain, x, torch.ones(N).bfloat16())
    assert len(hopper_twins) == 1
    if scheme != "w4a16":  # rows alternate gates and ups: what a kernel does not do cannot be done behind it
        bound(layer.text)._plans.clear()
        narrow = bound(layer.text).plan(m, torch.bfloat16)._replace(fused_biases=())
        bound(layer.text)._plans[m, torch.bfloat16] = narrow
        with pytest.raises(UnsupportedError, match="have the bias in bf16"):
            layer(x, torch.ones(N))


def test_compiles_to_one_graph_for_all_m():
    layer, graphs = make_linear("w4a16", N, K), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(layer.__call__, backend=backend, fullgraph=True, dynamic=True)
    for m in (2, 5, 64):
        x = torch.randn(m, K).bfloat16()
        assert torch.equal(run(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
def test_gemv_in_the_emulator_gives_the_references_numbers(emulated, m, bias_dtype):
    layer = make_linear("w4a16", 37, 288, arch=emulated.arch_name)
    x = torch.randn(m, 288).bfloat16()
    bias = None if bias_dtype is None else torch.randn(37, dtype=bias_dtype)
    layer.prepare()
    out = layer(x, bias)
    out_type = "f32" if bias_dtype is torch.float32 else "bf16"  # a bias that it cannot read is added to fp32
    assert emulated.launched == [f"gemv_mxfp4_{out_type}_m{m if m < 3 else 4}"]
    assert out.dtype == torch.bfloat16
    exact = exact_linear(layer, x, bias)
    assert_close(out, exact, 288)
    assert_close(with_values(layer)(x, bias), exact, 288)


@pytest.mark.parametrize("case", ["columns of a wider tensor", "misaligned start", "unaligned rows", "transposed"])
def test_gemv_takes_any_strides(emulated, case):
    layer = make_linear("w4a16", 20, 64, arch=emulated.arch_name)
    x = {
        "columns of a wider tensor": torch.randn(2, 128).bfloat16()[:, 64:],
        "misaligned start": torch.randn(2, 80).bfloat16()[:, 3:67],
        "unaligned rows": torch.randn(2, 65).bfloat16()[:, :64],
        "transposed": torch.randn(64, 2).bfloat16().T,
    }[case]
    assert_close(layer(x), exact_linear(layer, x), 64)
    assert len(emulated.launched) == 1


def test_what_no_kernel_covers_is_the_references(emulated):
    """M = 5, or a model in fp16 or fp32: nothing is launched, and the result is right."""
    layer = make_linear("w4a16", 20, 64, arch=emulated.arch_name)
    for m, dtype, rule in ((5, torch.bfloat16, "M=5 is outside of 1...4"), (1, torch.float16, "the model's are fp16")):
        x = torch.randn(m, 64, dtype=dtype)
        assert_close(layer(x), exact_linear(layer, x), 64)
        choice = bound(layer.text).plan(m, dtype).choice
        assert choice.kernel == "reference"
        assert any(rule in reason for reason in choice.reasons), choice.reasons
    assert emulated.launched == []


def test_a_nan_scale_reaches_the_result(emulated):
    layer = make_linear("w4a16", 20, 64, arch=emulated.arch_name)
    layer.weight.scales[7, 1] = 255
    out = layer(torch.randn(1, 64).bfloat16())
    assert torch.isnan(out).nonzero().tolist() == [[0, 7]]


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("m", [1, 70])
def test_triton_launcher(triton_twins, scheme, static, m):
    """Static fp8: the kernel multiplies the sum by the scale, the reference each term: one rounding in fp32 each."""
    layer = make_linear(scheme, N, K, arch="sm_90", static=static)
    for dtype in (torch.bfloat16, torch.float16) if scheme != "w4a16" or static else (torch.bfloat16,):
        x = torch.randn(m, 2 * K, dtype=dtype)[:, ::2]
        for bias in (None, torch.randn(N, dtype=dtype)):
            assert_close(layer(x, bias), exact_linear(layer, x, bias), K + 2)
    (call, *_) = triton_twins
    assert call["config"].block_m == (16 if m == 1 else 64)
    assert call["y"].dtype == (torch.float32 if static else torch.bfloat16)


def laid_out(layer):
    return replace(layer, weight=lay_out(layer.weight, layer.problem))


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("m", [1, 70])
def test_hopper_launcher(hopper_twins, scheme, m):
    plain = make_linear(scheme, N, K, arch="sm_90")
    layer = laid_out(plain)
    x_format = "bf16" if scheme == "w4a16" else "e4m3"
    assert layer.weight.layout.name == f"hopper_{x_format}"
    for bias in (None, torch.randn(N).bfloat16()):
        x = torch.randn(m, 2 * K).bfloat16()[:, ::2]
        assert_close(layer(x, bias), exact_linear(plain, x, bias), K)
    assert hopper_twins == [x_format, x_format]
    assert layer(torch.empty(0, K).bfloat16()).shape == (0, N)


def test_rows_that_hopper_cannot_group_stay_strided(hopper_twins):
    assert laid_out(make_linear("w4a16", 40, K, arch="sm_90")).weight.layout.name == "strided"


@pytest.mark.parametrize("silu", [False, True], ids=["", "silu"])
@pytest.mark.parametrize(("scheme", "static"), [*((s, False) for s in MX), ("mxfp8", True), ("w4a8", True)])
def test_decode_is_launched_on_what_it_reads(monkeypatch, scheme, static, silu):
    """The description, on weights that are really packed; what it computes is seen on a device (tests/device)."""
    pytest.importorskip("triton")
    started = []
    device = type("Device", (), {"arch_name": "sm_90", "cu_count": 132, "start": lambda self, d: started.append(d)})()
    monkeypatch.setattr(hip, "device_of", lambda x: device)
    hopper = {"triton_hopper_bf16", "triton_hopper_e4m3"}
    launchable = frozenset({"hip_decode", "hip_decode_e4m3", "triton_mx_gemm", *hopper})
    for module in (layout, linear):
        monkeypatch.setattr(module, "launchable", lambda arch: launchable)
    for module in (layout, operand):
        monkeypatch.setattr(module, "current_arch", lambda: "sm_90")
    layer = make_linear(scheme, 64, 128, "sm_90", static, epilogue=Epilogue(activation="silu" if silu else None))
    assert layout.fuses_activation(layer.problem) == silu
    layer = laid_out(layer)
    assert layer.weight.layout.name == ("hopper_bf16" if scheme == "w4a16" else "hopper_e4m3")
    x, bias = torch.randn(5, 128).bfloat16(), torch.randn(64).bfloat16()
    assert layer(x, bias).shape == (5, 32 if silu else 64)
    *before, d = started
    early = "" if scheme == "w4a16" else "_early"  # few rows of small weights
    assert d.kernel == f"decode{early}_{scheme}{'_static' if static else ''}_m8"
    assert all(launch.kernel.startswith("prepare_") for launch in before)
    named = dict(zip([p.partition(":")[0] for p in find(d.kernel, "sm_90")[1].params], d.args, strict=True))
    assert (named["m"], named["n"], named["k"]) == (5, 64, 128)
    data, factors, *scales = layer.weight.tensors
    assert (named["w"], named["factors"], named["scales"]) == (data, factors, scales[0] if scales else None)
    assert named["bias"] is bias
    assert named["activation"] == int(silu)
    assert (named["carry"] == 0) == (static or scheme == "w4a16")


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "mxfp4", "mxfp8"])
def test_amd_decode_in_the_emulator_gives_the_references_numbers(emulated, monkeypatch, scheme):
    """Weights in the layout of the arch, x quantized by the kernel, bias fused."""
    from sglang_amd_quant.ops.decode_weights import decode_weights

    monkeypatch.setattr(hip, "WORKSPACE_BYTES", 1 << 18)
    monkeypatch.setattr(hip, "_workspaces", {})
    monkeypatch.setattr(hip, "_spares", {})
    plain = make_linear(scheme, 40, 320, arch=emulated.arch_name)
    layer = replace(plain, weight=decode_weights(plain.weight, emulated.arch_name))
    x, bias = torch.randn(5, 320).bfloat16(), torch.randn(40).bfloat16()
    element = layer.weight.scheme.weight
    assert layer.weight.layout.name in kernels()[f"hip_decode_{layer.problem.arch}_{element}"].layouts
    out, problem = torch.empty(5, 40).bfloat16(), bound(layer.text).operand.problem_of("bf16", 5)
    hip.run_decode_amd(LinearCall(x, layer.weight, bias, out, layer.act, Config(), problem))
    assert [name.rpartition("_m")[0] for name in emulated.launched] == [f"decode_{scheme}"]
    assert_close(out, exact_linear(plain, x, bias), 320)


def test_streams_have_workspaces_of_their_own(monkeypatch):
    """Blocks that share K count each other there. Of streams first seen in a capture one has the spare, others zero
    theirs each time."""
    monkeypatch.setattr(hip, "WORKSPACE_BYTES", 1 << 15)
    for name in ("_workspaces", "_spares"):
        monkeypatch.setattr(hip, name, {})
    stream, capturing, x = 7, False, torch.empty(1)
    monkeypatch.setattr(hip, "current_stream", lambda ordinal: stream)
    monkeypatch.setattr(hip, "capturing", lambda x: capturing)
    hip.prepare_workspaces(x)
    first = hip.workspace(x)
    assert first is hip.workspace(x)
    stream, capturing = 8, True
    second = hip.workspace(x)
    assert second is hip.workspace(x) is not first
    assert not second.any()
    stream = 9
    graphs = hip.workspace(x)
    assert all(graphs is not other for other in (first, second, hip.workspace(x)))
    assert not graphs[: 4 * 4096].any()
    capturing = False
    own = hip.workspace(x)
    assert own is hip.workspace(x)
    assert all(own is not other for other in (first, second, graphs))


def test_operand_text_reads_back():
    for scheme, static in (("mxfp8", False), ("w4a8", True)):
        layer = make_linear(scheme, N, K, arch="gfx1151", static=static, tp=4)
        operand = bound(layer.text).operand
        assert operand == Operand.of(layer.problem, layer.weight, layer.act)
        assert operand.problem == replace(layer.problem, layout="strided")
        assert operand.form == layer.weight.form


def test_layout_and_padding_reach_the_op():
    layer = make_linear("mxfp4", N, K)
    packed = layer.weight.to_layout("cdna4_scale", PadPlan(64, 128))
    same = replace(layer, weight=packed)
    assert bound(same.text).operand.problem.layout == "cdna4_scale"
    x = torch.randn(3, K)
    assert torch.equal(same(x), layer(x))


def test_kernels_are_given_what_they_index(monkeypatch):
    """Rows by N and K alone, biases one by one: a padded or strided weight is refused where there are kernels."""
    layer = make_linear("mxfp8", N, K, arch="gfx950")
    data = torch.zeros(N, 2 * K, dtype=torch.float8_e4m3fn)[:, :K]
    weights = layer.weight.to_layout("strided", PadPlan(64, 128)), replace(layer.weight, data=data)
    for weight in weights:
        replace(layer, weight=weight)
    monkeypatch.setattr(operand, "current_arch", lambda: "gfx950")
    for weight in weights:
        with pytest.raises(ShapeError, match="kernels find rows by N and K alone"):
            replace(layer, weight=weight)
    seen = []
    monkeypatch.setitem(KERNELS, "triton_mx_gemm", LinearKernel(seen.append, linear.ANY_FLOAT))
    monkeypatch.setattr(linear, "launchable", lambda arch: frozenset({"triton_mx_gemm"}))
    bias = torch.randn(N, 2)[:, 0]
    make_linear("mxfp8", N, K, arch="gfx942")(torch.randn(3, K).bfloat16(), bias)
    assert torch.equal(seen[0].bias, bias)
    assert seen[0].bias.is_contiguous()


class TestMistakes:
    @pytest.mark.parametrize("shape", [(3, K - 32), (3, K + 1), ()])
    def test_wrong_k(self, shape):
        layer = make_linear("w4a16", N, K)
        for run in (layer, with_values(layer)):
            with pytest.raises(ShapeError, match=f"the layer's K is {K}"):
                run(torch.randn(shape))

    def test_dtype_that_no_model_has(self):
        with pytest.raises(SchemeError, match=r"activations of torch\.float64: no op takes them"):
            make_linear("w4a16", N, K)(torch.randn(1, K).double())

    def test_weights_of_another_layer(self):
        layer = make_linear("w4a16", N, K)
        with pytest.raises(ShapeError, match=r"weights \[48, 96\].*N=64"):
            replace(layer, problem=replace(layer.problem, n=64))
        with pytest.raises(SchemeError, match="w4a16 weights with bf16 activations.*mxfp4 with e2m1"):
            replace(layer, problem=replace(layer.problem, scheme="mxfp4", act=""))

    def test_static_scale_without_static_problem(self):
        layer = make_linear("w4a8", N, K)
        with pytest.raises(SchemeError, match="fp8_static activations"):
            replace(layer, act=replace(layer.act, scale=torch.tensor(1.0)))

    def test_int4_without_words_or_in_other_groups(self):
        scheme = replace(SCHEMES["int4_w4a16"], block=64)
        weight = MxTensor.quantize(torch.randn(N, 128), scheme, symmetric=False)
        problem = GemmProblem("linear", "int4_w4a16", "cpu", 0, N, 128, group=64)
        with pytest.raises(SchemeError, match="scales of torch.bfloat16: ops take words.*with_words"):
            QuantizedLinear(problem, weight, ActQuant(scheme))
        with pytest.raises(SchemeError, match="in groups of 64: the layer's are of 32"):
            QuantizedLinear(replace(problem, group=32), weight.with_words(), ActQuant(scheme))


def test_preload_asks_for_every_entry_point(monkeypatch):
    asked = []
    device = type("Device", (), {"arch_name": "gfx950", "load": lambda self, *names: asked.extend(names)})()
    monkeypatch.setattr(hip, "device_of", lambda x: device)
    hip.preload({"gemv_mxfp4", "triton_mx_gemm", "reference"}, torch.zeros(1))
    assert sorted(asked) == [f"gemv_mxfp4_{out}_m{m}" for out in ("bf16", "f32") for m in (1, 2, 4)]
    asked.clear()
    hip.preload({"hip_moe_decode_gfx950_e4m3"}, torch.zeros(1))  # sm_90's code objects of this name hold more
    assert sorted(asked) == sorted(
        f"{kind}_{scheme}_m{m}"
        for scheme in ("mxfp8", "mxfp8_static")
        for kind, sizes in (("decode", AMD_DECODE_M), ("moe_decode", AMD_MOE_DECODE_M))
        for m in sizes
    )
    asked.clear()
    hip.preload({"reference"}, torch.zeros(1))
    assert asked == []


def test_importing_ops_launches_nothing_and_needs_no_triton():
    import subprocess
    import sys

    code = "import sys, sglang_amd_quant.ops.linear, sglang_amd_quant.ops.moe; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
