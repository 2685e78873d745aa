"""Launchers of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.ops.packed import Weight, as_mx
from sglang_amd_quant.ops.quantize import Quantized, quantize_activation
from sglang_amd_quant.ops.routing import Routing, combined, route, row_weights, weighted_input
from sglang_amd_quant.selection import Config, GemmProblem

if TYPE_CHECKING:
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.ops.moe import MoeCall


Grouped = Callable[..., torch.Tensor]
"""A grouped GEMM, called as `grouped` below."""


def tile_of(config: Config) -> MxGemmConfig:
    """A choice's parameters as the kernel takes them."""
    from sglang_amd_quant.kernels.triton.mx_gemm import MxGemmConfig

    return MxGemmConfig(*config.tile, **launch_options(config))


def launch_options(config: Config) -> dict[str, int]:
    """What a choice says besides its tile, by the names of `TileConfig`."""
    optional = {"nonkdim": config.nonkdim, "group_m": dict(config.params).get("group_m")}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"num_warps": config.num_warps or 4, "num_stages": config.num_stages or 2, **given}


def run_mx_gemm(call: LinearCall) -> None:
    """`kernels/triton/mx_gemm.py`, dense: quantize x, multiply by weights that lie as decode kernels read them."""
    from sglang_amd_quant.kernels.triton.mx_gemm import mx_gemm

    x, w, tile = quantize_activation(call.x, call.act), as_mx(call.weight), tile_of(call.config)
    layout = w.layout.value, w.layout.scale
    if x.factor is None:
        mx_gemm(x.data, x.scales, w.data, w.scales, call.y, tile, call.problem.arch, bias=call.bias, layout=layout)
        return
    y = torch.empty(call.y.shape, dtype=torch.float32, device=call.y.device)
    mx_gemm(x.data, x.scales, w.data, w.scales, y, tile, call.problem.arch, layout=layout)
    y *= x.factor
    call.y.copy_(y if call.bias is None else y.add_(call.bias))


def run_mx_moe(call: MoeCall) -> torch.Tensor:
    """`kernels/triton/mx_gemm.py`, grouped, twice."""
    return two_gemms(call, grouped)


def two_gemms(call: MoeCall, grouped: Grouped) -> torch.Tensor:
    """An MoE by a grouped GEMM; activation, quantization and sum over top_k in torch between."""
    routing = route(call.topk_ids, call.problem.num_experts, tile_of(call.config13).block_m)
    return second_gemm(call, routing, first_gemm(call, routing, grouped), grouped)


def first_gemm(call: MoeCall, routing: Routing, grouped: Grouped) -> torch.Tensor:
    """Gate_up and its activation: [rows, I] in x's dtype. The product stays fp32 until then, as in the reference."""
    problem, x = call.problem, weighted_input(call)
    quantized, top_k = quantize_activation(x, problem.act13), call.topk_ids.shape[1]
    first = grouped(quantized, call.w13, call.b13, call.config13, call.gate_up, routing, top_k)
    return problem.activation(first).to(x.dtype)


def second_gemm(call: MoeCall, routing: Routing, hidden: torch.Tensor, grouped: Grouped) -> torch.Tensor:
    """Down with the routing weights, and the sum over each token's slots."""
    quantized = quantize_activation(hidden, call.problem.act2)
    return combined(call, grouped(quantized, call.w2, call.b2, call.config2, call.down, routing, 1, row_weights(call)))


def grouped(
    x: Quantized,
    w: Weight,
    bias: torch.Tensor | None,
    config: Config,
    problem: GemmProblem,
    routing: Routing,
    top_k: int,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times the weights of each row's expert: fp32 [rows, N]; undefined in rows that no expert here takes."""
    from sglang_amd_quant.kernels.triton.mx_gemm import mx_gemm

    w = as_mx(w)
    y = torch.empty(routing.rows, w.n, dtype=torch.float32, device=x.data.device)
    # The kernel adds the bias and weights rows after the product, so a factor of the product goes before both.
    fused = x.factor is None
    mx_gemm(
        x.data, x.scales, w.data, w.scales, y, tile_of(config), problem.arch, bias=bias if fused else None,
        row_ids=routing.row_ids, block_experts=routing.block_experts, row_weights=row_weights if fused else None,
        top_k=top_k,
    )  # fmt: skip
    if x.factor is not None:
        y *= x.factor
        if bias is not None:
            y += _bias_rows(bias, routing)
        if row_weights is not None:
            y *= row_weights[:, None]
    return y


def _bias_rows(bias: torch.Tensor, routing: Routing) -> torch.Tensor:
    """bias [E, N] -> [rows, N]: each routed row's expert's; 0 for dropped rows."""
    expert = routing.block_experts.repeat_interleave(
        routing.block_m, output_size=routing.row_ids.numel()
    ).long()  # of each place
    of_row = torch.full((routing.rows + 1,), -1, dtype=torch.int64, device=bias.device)
    of_row.scatter_(0, routing.row_ids.long(), expert)
    of_row = of_row[: routing.rows, None]
    return torch.where(of_row >= 0, bias.float()[of_row[:, 0].clamp(min=0)], 0.0)
