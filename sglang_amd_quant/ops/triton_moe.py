"""Launchers of the Triton MoE GEMM with its epilogues (`kernels/triton/moe_gemm.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.ops.packed import Weight
from sglang_amd_quant.ops.quantize import Quantized, quantize_activation
from sglang_amd_quant.ops.routing import Routing, combined, route, row_weights, weighted_input
from sglang_amd_quant.ops.triton_mx import grouped, tile_of
from sglang_amd_quant.selection import Config

if TYPE_CHECKING:
    from sglang_amd_quant.kernels.triton.moe_gemm import Epilogue
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.ops.moe import MoeCall


def run_moe(call: MoeCall) -> torch.Tensor:
    """Gate_up with activation and quantization in its epilogue, then down; products are rounded to x's dtype."""
    p = call.problem
    routing = route(call.topk_ids, p.num_experts, tile_of(call.config13).block_m)
    element = None if p.act2.scale is not None or p.act2.scheme.act == "bf16" else p.act2.scheme.act
    hidden, scales = _gate_up(call, routing, element)
    if scales is None:
        return down(call, routing, hidden)
    return _down(call, routing, Quantized(hidden.view(torch.float8_e4m3fn) if element == "e4m3" else hidden, scales))


def gate_up(call: MoeCall, routing: Routing) -> torch.Tensor:
    """Gate_up with its activation: [rows, I] in x's dtype."""
    return _gate_up(call, routing, None)[0]


def down(call: MoeCall, routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    """Down with the routing weights, and the sum over each token's slots."""
    return _down(call, routing, quantize_activation(hidden, call.problem.act2))


def _gate_up(call: MoeCall, routing: Routing, element: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[rows, I] in x's dtype, or codes and scales of `element` for the next GEMM."""
    from sglang_amd_quant.kernels.triton.moe_gemm import Epilogue

    p, f, x = call.problem, call.problem.activation, weighted_input(call)
    mode = None if p.act2.mode is None else p.act2.mode.value
    epilogue = Epilogue(f.kind, f.interleaved, f.limit, f.alpha, f.beta, element, mode, x.dtype == torch.float16)
    hidden, scales = _hidden(routing.rows, f.columns(call.w13.n), element, x)
    _gemm(quantize_activation(x, p.act13), call.w13, hidden, scales, routing, call.config13, call.gate_up.arch,
          top_k=call.topk_ids.shape[1], bias=call.b13, epilogue=epilogue)  # fmt: skip
    return hidden, scales


def run_gated_gemm(call: LinearCall) -> None:
    """Dense: one expert, all rows in order, of weights that alternate gates and ups if there is an activation."""
    from sglang_amd_quant.kernels.triton.moe_gemm import Epilogue

    f = call.activation
    epilogue = None if f is None else Epilogue(f.kind, f.interleaved, f.limit, f.alpha, f.beta)
    x = quantize_activation(call.x, call.act)
    _gemm(x, call.weight, call.y, None, None, call.config, call.problem.arch, bias=call.bias, epilogue=epilogue)


def run_mx_then_moe(call: MoeCall) -> torch.Tensor:
    """Gate_up by `mx_gemm` with its activation in torch, for activations that the epilogue has not; then down."""
    p, top_k = call.problem, call.topk_ids.shape[1]
    x = weighted_input(call)
    routing = route(call.topk_ids, p.num_experts, tile_of(call.config13).block_m)
    first = grouped(
        quantize_activation(x, p.act13), call.w13, call.b13, call.config13, call.gate_up, routing, top_k
    )  # fmt: skip
    return down(call, routing, p.activation(first).to(x.dtype))


def _down(call: MoeCall, routing: Routing, hidden: Quantized) -> torch.Tensor:
    # An expert may be beyond fp16 where the sum is not.
    dtype = torch.bfloat16 if call.x.dtype == torch.bfloat16 else torch.float32
    routed = torch.empty(routing.rows, call.w2.n, dtype=dtype, device=call.x.device)
    _gemm(hidden, call.w2, routed, None, routing, call.config2, call.down.arch, bias=call.b2,
          row_weights=row_weights(call))  # fmt: skip
    return combined(call, routed)


def _hidden(rows: int, columns: int, element: str | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Room for what gate_up hands on: codes and scales, or x's dtype."""
    if element is None:
        return torch.empty(rows, columns, dtype=x.dtype, device=x.device), None
    codes = torch.empty(rows, columns // (2 if element == "e2m1" else 1), dtype=torch.uint8, device=x.device)
    return codes, torch.empty(rows, columns // 32, dtype=torch.uint8, device=x.device)


def _gemm(
    x: Quantized,
    weight: Weight,
    y: torch.Tensor,
    y_scales: torch.Tensor | None,
    routing: Routing | None,
    config: Config,
    arch: str,
    *,
    top_k: int = 1,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
) -> None:
    from sglang_amd_quant.kernels.triton.moe_gemm import PLAIN, moe_gemm

    data, w_scales = weight.tensors
    values = weight.layout.value.removeprefix("decode_")
    scales = x.scales if x.factor is None else None
    moe_gemm(
        x.data, scales, data, w_scales, y, y_scales, routing, tile_of(config), arch,
        top_k=top_k, x_scale=x.factor, bias=bias, row_weights=row_weights, epilogue=epilogue or PLAIN,
        layout=(values, "strided" if values == "strided" else "tile_scale"),
    )  # fmt: skip
