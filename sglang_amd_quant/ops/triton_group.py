"""Launchers of the Triton GEMM of scaled groups (`kernels/triton/group_gemm.py`): int4 in models of bf16 and fp16, MX
weights in those of fp16, with activations as they are; on AMD MX weights by activations as bf16 has them, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.ops.packed import Weight, pairs_of
from sglang_amd_quant.ops.quantize import Quantized, activated, activated_values, bf16_values, front
from sglang_amd_quant.ops.routing import Routing, combined, route, row_weights, weighted_input
from sglang_amd_quant.ops.triton_mx import first_gemm, launch_options, second_gemm
from sglang_amd_quant.selection import Config, GemmProblem

if TYPE_CHECKING:
    from sglang_amd_quant.kernels.triton.quant_mx import Front
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.ops.moe import MoeCall


def run_group_gemm(call: LinearCall) -> None:
    """Dense."""
    _gemm(call.x.contiguous(), call.weight, call.y, call.config, call.problem, bias=call.bias, **_activation(call))


def run_registers_gemm(call: LinearCall) -> None:
    """Dense, MX weights in registers by x as it is, or what its codes stand for in bf16."""
    x = bf16_values(call.x, call.act)
    _gemm(
        x.data, call.weight, call.y, call.config, call.problem, x_scale=x.factor, bias=call.bias, **_activation(call)
    )  # fmt: skip


def _activation(call: LinearCall) -> dict[str, Front]:
    return {} if call.activation is None else {"activation": front(call.activation)}


def run_group_moe(call: MoeCall) -> torch.Tensor:
    """Grouped, twice."""
    assert call.config13.block_m is not None
    routing = route(call.topk_ids, call.problem.num_experts, call.config13.block_m)
    return down(call, routing, gate_up(call, routing))


def gate_up(call: MoeCall, routing: Routing) -> torch.Tensor:
    """Gate_up with its activation: [rows, I] in x's dtype."""
    return _first(call, routing, activate=True) if _activates(call) else first_gemm(call, routing, _grouped)


def down(call: MoeCall, routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    """Down with the routing weights, and the sum over each token's slots."""
    return second_gemm(call, routing, hidden, _grouped)


def run_registers_moe(call: MoeCall) -> torch.Tensor:
    """MX experts likewise. Where gate_up does not activate, one kernel does and takes the result through codes."""
    p = call.problem
    assert call.config13.block_m is not None
    routing = route(call.topk_ids, p.num_experts, call.config13.block_m)
    first = _first(call, routing, _activates(call))
    if _activates(call):
        return registers_down(call, routing, first)
    return _registers_second(call, routing, activated_values(first, p.activation, p.act2, call.x.dtype))


def registers_gate_up(call: MoeCall, routing: Routing) -> torch.Tensor:
    """Gate_up with its activation: [rows, I] in x's dtype."""
    first = _first(call, routing, _activates(call))
    return first if _activates(call) else activated(first, call.problem.activation, call.x.dtype)


def registers_down(call: MoeCall, routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    """Down with the routing weights, and the sum over each token's slots."""
    return _registers_second(call, routing, bf16_values(hidden, call.problem.act2))


def _activates(call: MoeCall) -> bool:
    """Whether gate_up activates its own sums: where gates and ups alternate in its weights, by eights."""
    return call.w13.layout.packed and call.problem.activation.fused


def _first(call: MoeCall, routing: Routing, activate: bool) -> torch.Tensor:
    """Gate_up, activated in x's dtype; or its sums in fp32, as the activation in the reference has them."""
    x, top_k = bf16_values(weighted_input(call), call.problem.act13), call.topk_ids.shape[1]
    dtype, before = (call.x.dtype, front(call.problem.activation)) if activate else (torch.float32, None)
    return _grouped(
        x, call.w13, call.b13, call.config13, call.gate_up, routing, top_k, dtype=dtype, activation=before
    )  # fmt: skip


def _registers_second(call: MoeCall, routing: Routing, x: Quantized) -> torch.Tensor:
    # An expert may be beyond fp16 where the sum is not.
    dtype = torch.bfloat16 if call.x.dtype == torch.bfloat16 else torch.float32
    routed = _grouped(x, call.w2, call.b2, call.config2, call.down, routing, 1, row_weights(call), dtype)
    return combined(call, routed)


def _grouped(
    x: Quantized,
    w: Weight,
    bias: torch.Tensor | None,
    config: Config,
    problem: GemmProblem,
    routing: Routing,
    top_k: int,
    row_weights: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    activation: Front | None = None,
) -> torch.Tensor:
    """x times the weights of each row's expert, activated or not: [rows, N or N / 2]; undefined in rows that no expert
    here takes."""
    options = {} if activation is None else {"activation": activation}
    y = torch.empty(routing.rows, w.n // 2 if options else w.n, dtype=dtype, device=x.data.device)
    _gemm(x.data, w, y, config, problem, x_scale=x.factor, bias=bias, row_ids=routing.row_ids,
          block_experts=routing.block_experts, row_weights=row_weights, top_k=top_k, **options)  # fmt: skip
    return y


def _gemm(x: torch.Tensor, w: Weight, y: torch.Tensor, config: Config, problem: GemmProblem, **options: object) -> None:
    from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig, group_gemm

    data, scales = w.tensors
    values, packed = w.layout.value.removeprefix("decode_"), w.layout.packed
    own = "tile_group" if w.scheme.weight == "int4" else "tile_scale"
    group_gemm(
        x, data, scales, y, GroupGemmConfig(*config.tile, **launch_options(config)), problem.arch, group=w.scheme.block,
        layout=(values, own if packed else w.layout.scale), pairs=pairs_of(problem) if packed else None,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
