"""The torch reference: dequantize the same bits, quantize activations as a kernel would, accumulate in fp32.

It serves on a CPU, is the answer on any device where no kernel covers a problem, and is what every kernel is tested
against. Weights come as a callable so that the caller decides whether dequantized copies are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from sglang_amd_quant import formats
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.schemes import ScaleMode, Scheme


@dataclass(frozen=True)
class ActQuant:
    """How a GEMM's input is quantized before it.

    Attributes:
        scheme: its `act` names the format.
        mode: e8m0 rounding of dynamic MX activations; None is the format's default.
        scale: the static per-tensor scale of `fp8_static` activations, fp32 scalar.
    """

    scheme: Scheme
    mode: ScaleMode | None = None
    scale: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize x[..., K]: the values that the matmul sees.

        In bf16 for x of bf16, which holds an MX value exactly; else in fp32. fp16 has no 65536, to which its largest
        numbers may be rounded, and a product with the scale of static fp8 needs it.
        """
        if self.scale is not None:
            return formats.quantize_fp8_static(x, self.scale).float() * self.scale
        if self.scheme.act == "bf16":
            return x
        wide = x.float() if x.dtype == torch.float16 else x
        return formats.fake_quantize_mx(wide, self.scheme.act, self.mode)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    act: ActQuant,
    bias: torch.Tensor | None = None,
    activation: Activation | None = None,
) -> torch.Tensor:
    """x[..., K] times weight[N, K]^T (fp32, dequantized) plus bias[N], activated; fp32 accumulation, rounded once to
    x's dtype."""
    out = functional.linear(act(x).float(), weight, None if bias is None else bias.float())
    return (out if activation is None else activation(out)).to(x.dtype)


@dataclass(frozen=True)
class MoeProblem:
    """What a fused MoE computes besides its weights.

    Attributes:
        num_experts: E, experts held here; ids outside [0, E) are dropped.
        activation: between the GEMMs.
        act13, act2: how the input of gate_up and of down is quantized.
        weight_on_input: multiply the input by the routing weight instead of the output (Llama-4; top_k must be 1).
        combine: sum over top_k; otherwise the result is [M, top_k, H].
        weight_output: multiply outputs by the routing weight (off for `weight_on_input`).
        scale: `routed_scaling_factor`, applied to the combined sum.
    """

    num_experts: int
    activation: Activation
    act13: ActQuant
    act2: ActQuant
    weight_on_input: bool = False
    combine: bool = True
    weight_output: bool = True
    scale: float = 1.0


def fused_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    problem: MoeProblem,
    w13: Callable[[int], torch.Tensor],
    w2: Callable[[int], torch.Tensor],
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate_up, activation, down and combine over the experts of each token.

    Args:
        x: [M, H].
        topk_ids: [M, top_k] local expert ids; -1 (any id outside [0, E)) contributes nothing.
        topk_weights: [M, top_k].
        w13, w2: expert -> fp32 weight [N, H] and [H, I].
        b13, b2: biases [E, N] and [E, H].

    Returns:
        [M, H], or [M, top_k, H] where `problem.combine` is off; in x's dtype. The sum over top_k runs in slot order in
        fp32, so the result does not depend on how rows were grouped.
    """
    m, top_k = topk_ids.shape
    weights = topk_weights.float()
    if problem.weight_on_input:
        x = (x.float() * weights[:, :1]).to(x.dtype)
    xq = problem.act13(x)
    routed = torch.zeros(m * top_k, x.shape[-1], dtype=torch.float32, device=x.device)
    ids = topk_ids.reshape(-1)
    for expert, rows in _rows_by_expert(ids, problem.num_experts):
        tokens = torch.div(rows, top_k, rounding_mode="floor")
        gate_up = functional.linear(xq[tokens].float(), w13(expert), None if b13 is None else b13[expert].float())
        hidden = problem.act2(problem.activation(gate_up).to(x.dtype))
        down = functional.linear(hidden.float(), w2(expert), None if b2 is None else b2[expert].float())
        mine = (ids[rows] == expert).unsqueeze(1)
        routed[rows] = torch.where(mine, down, routed[rows])
    routed = routed.view(m, top_k, x.shape[-1])
    if problem.weight_output and not problem.weight_on_input:
        here = (topk_ids >= 0) & (topk_ids < problem.num_experts)
        routed = routed * torch.where(here, weights, 0.0).unsqueeze(-1)  # 0 times a dropped slot's NaN would be NaN
    if not problem.combine:
        return routed.to(x.dtype)
    return (routed.sum(dim=1) * problem.scale).to(x.dtype)


def _rows_by_expert(ids: torch.Tensor, num_experts: int) -> list[tuple[int, torch.Tensor]]:
    """(expert, routed rows) pairs. A CUDA graph cannot read ids on the host, so there every expert sees every row."""
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        rows = torch.arange(ids.numel(), device=ids.device)
        return [(expert, rows) for expert in range(num_experts)]
    order = torch.argsort(ids, stable=True)
    experts, counts = torch.unique_consecutive(ids[order], return_counts=True)
    groups = zip(experts.tolist(), order.split(counts.tolist()), strict=True)
    return [(expert, rows) for expert, rows in groups if 0 <= expert < num_experts]
