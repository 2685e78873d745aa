"""Launchers of AMD's grouped decode GEMM (`kernels/hip/decode_gemm.hip`), for both GEMMs of an MoE or for one.

Weights lie as `ops/packed.py` made them, which the Triton kernel reads as well: what has more rows, or whichever GEMM
selection gives to Triton, runs on the same copy. The kernels quantize their input themselves, and gate_up applies the
activation; its result is rounded to the model's dtype between, as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.ops import hip
from sglang_amd_quant.ops.packed import Weight
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.ops.routing import Routing, combined, route, row_weights, weighted_input
from sglang_amd_quant.runtime.decode_gemm import Epilogue
from sglang_amd_quant.selection import GemmProblem

if TYPE_CHECKING:
    from sglang_amd_quant.ops.moe import MoeCall, MoeKernel

GateUp = Callable[["MoeCall", Routing], torch.Tensor]
"""Gate_up with its activation: [rows, I] in x's dtype."""

Down = Callable[["MoeCall", Routing, torch.Tensor], torch.Tensor]
"""Down of that, with the routing weights, and the sum over each token's slots."""


def run_decode(call: MoeCall) -> torch.Tensor:
    """Both GEMMs by the decode kernel."""
    routing = _route(call)
    return _down(call, routing, _gate_up(call, routing))


def then(down: Down) -> MoeKernel:
    """Gate_up by the decode kernel, down by a kernel for more rows."""

    def run(call: MoeCall) -> torch.Tensor:
        routing = _route(call)
        return down(call, routing, _gate_up(call, routing))

    return run


def after(gate_up: GateUp) -> MoeKernel:
    """The other way round."""

    def run(call: MoeCall) -> torch.Tensor:
        routing = _route(call)
        return _down(call, routing, gate_up(call, routing))

    return run


def _route(call: MoeCall) -> Routing:
    assert call.config13.block_m is not None
    return route(call.topk_ids, call.problem.num_experts, call.config13.block_m)


def _gate_up(call: MoeCall, routing: Routing) -> torch.Tensor:
    p, f, x = call.problem, call.problem.activation, weighted_input(call)
    hidden = torch.empty(routing.rows, f.columns(call.w13.n), dtype=x.dtype, device=x.device)
    epilogue = hip.epilogue(call.b13, f)
    _gemm(x, call.w13, call.gate_up, p.act13, hidden, routing, epilogue, top_k=call.topk_ids.shape[1])
    return hidden


def _down(call: MoeCall, routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    # An expert may be beyond fp16 where the sum is not.
    dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
    routed = torch.empty(routing.rows, call.w2.n, dtype=dtype, device=hidden.device)
    epilogue = Epilogue(bias=call.b2, row_weights=row_weights(call))
    _gemm(hidden, call.w2, call.down, call.problem.act2, routed, routing, epilogue)
    return combined(call, routed)


def _gemm(
    x: torch.Tensor,
    weight: Weight,
    problem: GemmProblem,
    act: ActQuant,
    y: torch.Tensor,
    routing: Routing,
    epilogue: Epilogue,
    top_k: int = 1,
) -> None:
    """y[r] = x[r // top_k] w[expert of r]^T through the epilogue, for each routed row r that has a place."""
    from sglang_amd_quant.runtime.decode_gemm_amd import decode_gemm_amd

    device = hip.device_of(x)
    data, scales = weight.tensors
    device.start(
        decode_gemm_amd(
            hip.aligned(x), data, scales, y, arch=device.arch_name, scheme=hip.decode_scheme(problem), n=weight.n,
            cu_count=device.cu_count, carry=hip.carry(act), x_scale=act.scale, epilogue=epilogue,
            row_ids=routing.row_ids, block_experts=routing.block_experts, block_m=routing.block_m, top_k=top_k,
            workspace=hip.workspace(x),
        )
    )  # fmt: skip
