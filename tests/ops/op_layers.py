"""Layers without SGLang, and what they compute in fp64. Imported by the tests here and in tests/device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.linear import QuantizedLinear
from sglang_amd_quant.ops.moe import QuantizedMoe
from sglang_amd_quant.ops.reference import ActQuant, MoeProblem
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import Epilogue, GemmProblem
from sglang_amd_quant.tensor import MxTensor

MX = ("mxfp8", "w4a8", "mxfp4", "w4a16")
STATIC = 0.02
SILU = Activation()


def quantized(weights: torch.Tensor, scheme: str, group: int = 0, symmetric: bool = True) -> MxTensor:
    """As ops take them: int4 with words of scale and zero point; `group` and `symmetric` are of int4."""
    kind = SCHEMES[scheme]
    tensor = MxTensor.quantize(weights, replace(kind, block=group or kind.block), symmetric=symmetric)
    return tensor.with_words() if kind.weight == "int4" else tensor


def make_linear(
    scheme: str, n: int, k: int, arch: str = "cpu", static: bool = False, symmetric: bool = True, **problem: Any
) -> QuantizedLinear:
    """A layer with random weights, on the CPU."""
    weight = quantized(torch.randn(n, k) / 4, scheme, problem.get("group", 0), symmetric)
    act = ActQuant(SCHEMES[scheme], scale=torch.tensor(STATIC) if static else None)
    gemm = GemmProblem("linear", scheme, arch, 0, n, k, act="fp8_static" if static else "", **problem)
    return QuantizedLinear(gemm, weight, act)


def exact_linear(
    layer: QuantizedLinear, x: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(product, sum of magnitudes) of the same quantized operands, in fp64."""
    assert isinstance(layer.weight, MxTensor)
    values = layer.weight.dequantize(torch.float64)
    xq = layer.act(x).double()
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    return xq @ values.T + added, xq.abs() @ values.abs().T + added.abs()


def assert_close(got: torch.Tensor, exact: tuple[torch.Tensor, torch.Tensor], k: int, roundings: int = 1) -> None:
    """fp32 accumulation of K products errs by at most K * 2^-23 of the sum of magnitudes, whatever the order; each
    rounding to bf16 adds 2^-8 of the value, to fp16 2^-11 (2^-25 below its least normal), to fp32 2^-24."""
    want, magnitude = exact
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[got.dtype]
    tiny = 2.0**-25 if got.dtype == torch.float16 else 0.0
    bound = k * 2.0**-23 * magnitude + roundings * (step * want.abs() + tiny)
    error = (got.double() - want).abs()
    assert torch.isfinite(got).all()
    assert (error <= bound).all(), (error - bound).max()


def with_values(layer: QuantizedLinear) -> QuantizedLinear:
    """The same layer as a CPU serves it."""
    return replace(layer, values=layer.weight.dequantize)


def opchecks(scheme: str) -> tuple[str, ...]:
    """Checks of `torch.library.opcheck`; the one of the schema computes on its inputs, which torch cannot in fp8."""
    rest = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return rest if scheme == "mxfp8" else ("test_schema", *rest)


def epilogue_of(f: Activation, biases: bool) -> Epilogue:
    """What a gate_up GEMM ends in."""
    return Epilogue(biases, f.kind, f.gated, f.interleaved, f.limit, f.alpha, f.clamp, f.beta)


def make_moe(
    scheme: str,
    experts: int,
    hidden: int,
    inter: int,
    top_k: int,
    arch: str = "cpu",
    activation: Activation = SILU,
    static: bool = False,
    biases: bool = False,
    group: int = 0,
    symmetric: bool = True,
    **problem: Any,
) -> QuantizedMoe:
    """Experts with random weights, on the CPU; `problem` are fields of `MoeProblem`."""
    n = inter * (2 if activation.gated else 1)
    shapes = {"moe_gate_up": (n, hidden), "moe_down": (hidden, inter)}
    weights = [quantized(torch.randn(experts, *s) / 8, scheme, group, symmetric) for s in shapes.values()]
    acts = [ActQuant(SCHEMES[scheme], scale=torch.tensor(STATIC) if static else None) for _ in shapes]
    gemms = [
        GemmProblem(
            op, scheme, arch, 0, *shape, e_local=experts, e_total=experts, top_k=top_k,
            act="fp8_static" if static else "", weighted=op == "moe_down", group=group,
            epilogue=epilogue_of(activation, biases) if op == "moe_gate_up" else Epilogue(biases),
        )
        for op, shape in shapes.items()
    ]  # fmt: skip
    b13, b2 = (torch.randn(experts, n), torch.randn(experts, hidden)) if biases else (None, None)
    return QuantizedMoe(*gemms, MoeProblem(experts, activation, *acts, **problem), *weights, b13, b2)


def as_served_on_a_cpu(layer: QuantizedMoe) -> QuantizedMoe:
    """The same layer with kept values: the reference, without the op."""
    return replace(layer, values=tuple(lambda e, w=w: w.expert(e).dequantize() for w in (layer.w13, layer.w2)))  # type: ignore[arg-type]


def tokens(
    m: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype = torch.bfloat16, dropped: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weights; a share of the ids is -1 (another rank's)."""
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(m)]).int() if m else torch.zeros(0, top_k).int()
    ids[torch.rand(ids.shape) < dropped] = -1
    return torch.randn(m, hidden, dtype=dtype), ids, torch.rand(m, top_k)
