"""Launcher of the grouped GEMM for Hopper (`kernels/triton/hopper_moe.py`)."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_amd_quant import formats
from sglang_amd_quant.ops.packed import Weight, pairs_of
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.ops.routing import as_read, combined, route, row_weights, weighted_input
from sglang_amd_quant.selection import Config, GemmProblem

if TYPE_CHECKING:
    from sglang_amd_quant.kernels.triton.hopper import HopperConfig
    from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights
    from sglang_amd_quant.ops.activation import Activation
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.ops.moe import MoeCall


def run_hopper_moe(call: MoeCall) -> torch.Tensor:
    """Routing, gate_up with its activation, down with the routing weights, combine; products are rounded to bf16, in
    models of fp16 not."""
    from sglang_amd_quant.kernels.triton.hopper import alone, routed_hopper

    p = call.problem
    w13, w2 = _weights(call.w13, call.gate_up, call.x), _weights(call.w2, call.down, call.x)
    tile13, tile2 = tile_of(call.config13), tile_of(call.config2)
    # All that takes launches of its own comes first: x is quantized while rows are sorted.
    ids, x, weights = as_read(call.topk_ids), weighted_input(call), row_weights(call)
    block_m = tile13.block_m
    routing = alone(ids, p.num_experts, block_m) or route(ids, p.num_experts, block_m)
    routed = routed_hopper(
        x, routing, ids.shape[1], w13, w2, tile13, tile2,
        partial(_input, act=p.act13), partial(_input, act=p.act2), beside=True,
        b13=call.b13, b2=call.b2, row_weights=weights, **_activation(p.activation),
    )  # fmt: skip
    return combined(call, routed)


def run_hopper_gemm(call: LinearCall) -> None:
    """Dense: one expert, all rows in order, and no routing."""
    from sglang_amd_quant.kernels.triton.hopper import Overlap, hopper_gemm

    w = _weights(call.weight, call.problem, call.x)
    left, factors = _input(call.x, call.act, w.x_format, w.orders_x)
    bias = None if call.bias is None else call.bias.unsqueeze(0)
    ahead = None if left is call.x else Overlap(ahead=True)
    hopper_gemm(
        left, factors, w, call.y, None, tile_of(call.config),
        overlapping=ahead, bias=bias, **_activation(call.activation),
    )  # fmt: skip


def _activation(f: Activation | None) -> dict[str, Any]:
    """An activation as the kernel's arguments."""
    return {} if f is None else {"activation": f.kind, "limit": f.limit, "alpha": f.alpha, "beta": f.beta}


def _weights(weight: Weight, problem: GemmProblem, x: torch.Tensor) -> HopperWeights:
    """A weight as the kernel's own class."""
    from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights

    shape = {"n": weight.n, "k": weight.k, "pairs": pairs_of(problem), "experts": math.prod(weight.shape[:-2])}
    if weight.scheme.weight == "int4":
        data, words = weight.tensors
        x_format = "fp16" if x.dtype == torch.float16 else "bf16"
        return HopperWeights(data.view(torch.uint16), words, None, "int4", x_format, group=weight.scheme.block, **shape)
    data, factors, *scales = weight.tensors
    x_format = weight.layout.name.removeprefix("hopper_")
    return HopperWeights(data, scales[0] if scales else None, factors, weight.scheme.weight, x_format, **shape)


def tile_of(config: Config) -> HopperConfig:
    """A choice's parameters as the kernel takes them."""
    from sglang_amd_quant.kernels.triton.hopper import HopperConfig

    named = {name: value for name, value in config.items() if name != "nonkdim"}
    return HopperConfig(**named)


def _input(
    x: torch.Tensor, act: ActQuant, x_format: str, ordered: bool, beside: bool = False, inside: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x[M, K] as the kernel multiplies it: bf16, or e4m3 under one factor a row. `ordered`, `beside`, `inside`: as in
    `activations`."""
    from sglang_amd_quant.kernels.triton.hopper import activations
    from sglang_amd_quant.kernels.triton.hopper_pack import in_x_order

    if act.scale is not None:
        codes = formats.quantize_fp8_static(x, act.scale)
        factors = act.scale.float().expand(x.shape[0]).contiguous()
        return in_x_order(codes) if ordered else codes, factors
    element = None if act.scheme.act == "bf16" else act.scheme.act
    mode = None if act.mode is None else act.mode.value
    return activations(x.contiguous(), element, mode, x_format, ordered, beside, inside)
