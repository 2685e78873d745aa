"""A quantized fused MoE: asks selection which kernels run its two GEMMs at this M, and runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_amd_quant.ops import reference
from sglang_amd_quant.ops.reference import MoeProblem
from sglang_amd_quant.selection import BoundChoices, GemmProblem

KERNELS: dict[tuple[str, str], Callable[..., torch.Tensor]] = {("reference", "reference"): reference.fused_moe}
"""Kernel names of gate_up and down -> what launches the pair. Selection chooses only among these."""


@dataclass(frozen=True)
class QuantizedMoe:
    """The experts of one layer on one rank.

    Attributes:
        gate_up, down: its GEMMs, at any M.
        problem: everything else that it computes.
        w13, w2: expert -> fp32 values [N, K].
        b13, b2: biases [E, N], or None.
    """

    gate_up: GemmProblem
    down: GemmProblem
    problem: MoeProblem
    w13: Callable[[int], torch.Tensor]
    w2: Callable[[int], torch.Tensor]
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, gemm, side in (("_gate_up", self.gate_up, 0), ("_down", self.down, 1)):
            object.__setattr__(self, name, BoundChoices(gemm, frozenset(pair[side] for pair in KERNELS)))

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x[M, H], local ids and weights [M, top_k] -> [M, H], or [M, top_k, H] where nothing is combined."""
        m = x.shape[0]
        pair = self._gate_up[m].kernel, self._down[m].kernel  # type: ignore[attr-defined]
        return KERNELS[pair](x, topk_ids, topk_weights, self.problem, self.w13, self.w2, self.b13, self.b2)
