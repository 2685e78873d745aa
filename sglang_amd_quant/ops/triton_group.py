"""Launchers of the Triton GEMM of scaled groups (`kernels/triton/group_gemm.py`): int4 in models of bf16 and fp16, MX
weights in those of fp16. Activations are not quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.ops.packed import Weight, pairs_of
from sglang_amd_quant.ops.quantize import Quantized, bf16_values
from sglang_amd_quant.ops.routing import Routing
from sglang_amd_quant.ops.triton_mx import first_gemm, launch_options, second_gemm, two_gemms
from sglang_amd_quant.selection import Config, GemmProblem

if TYPE_CHECKING:
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.ops.moe import MoeCall


def run_group_gemm(call: LinearCall) -> None:
    """Dense."""
    _gemm(call.x.contiguous(), call.weight, call.y, call.config, call.problem, bias=call.bias)


def run_e2m1_gemm(call: LinearCall) -> None:
    """Dense, MXFP4 weights by x as bf16 has it: as it is, or what its MX codes stand for."""
    _gemm(bf16_values(call.x, call.act), call.weight, call.y, call.config, call.problem, bias=call.bias)


def run_group_moe(call: MoeCall) -> torch.Tensor:
    """Grouped, twice."""
    return two_gemms(call, _grouped)


def gate_up(call: MoeCall, routing: Routing) -> torch.Tensor:
    """Gate_up with its activation: [rows, I] in x's dtype."""
    return first_gemm(call, routing, _grouped)


def down(call: MoeCall, routing: Routing, hidden: torch.Tensor) -> torch.Tensor:
    """Down with the routing weights, and the sum over each token's slots."""
    return second_gemm(call, routing, hidden, _grouped)


def _grouped(
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
    y = torch.empty(routing.rows, w.n, dtype=torch.float32, device=x.data.device)
    _gemm(x.data, w, y, config, problem, bias=bias, row_ids=routing.row_ids, block_experts=routing.block_experts,
          row_weights=row_weights, top_k=top_k)  # fmt: skip
    return y


def _gemm(x: torch.Tensor, w: Weight, y: torch.Tensor, config: Config, problem: GemmProblem, **options: object) -> None:
    from sglang_amd_quant.kernels.triton.group_gemm import GroupGemmConfig, group_gemm

    data, scales = w.tensors
    values, packed = w.layout.value.removeprefix("decode_"), w.layout.packed
    group_gemm(
        x, data, scales, y, GroupGemmConfig(*config.tile, **launch_options(config)), problem.arch, group=w.scheme.block,
        layout=(values, "tile_group" if packed else w.layout.scale), pairs=pairs_of(problem) if packed else None,
        **options,  # type: ignore[arg-type]
    )  # fmt: skip
