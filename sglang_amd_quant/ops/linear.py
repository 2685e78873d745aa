"""A quantized linear layer: asks selection which kernel runs at this M, and runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_amd_quant.ops import reference
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.selection import BoundChoices, GemmProblem

LinearKernel = Callable[[torch.Tensor, torch.Tensor, ActQuant, torch.Tensor | None], torch.Tensor]

KERNELS: dict[str, LinearKernel] = {"reference": reference.linear}
"""Kernel name in selection -> what launches it. Selection chooses only among these."""


@dataclass(frozen=True)
class QuantizedLinear:
    """One layer on one rank.

    Attributes:
        problem: its GEMM, at any M.
        weight: gives the fp32 values [N, K].
        act: how its input is quantized.
    """

    problem: GemmProblem
    weight: Callable[[], torch.Tensor]
    act: ActQuant

    def __post_init__(self) -> None:
        object.__setattr__(self, "_choices", BoundChoices(self.problem, frozenset(KERNELS)))

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x[..., K] -> [..., N] in x's dtype."""
        choice = self._choices[x.shape[:-1].numel()]  # type: ignore[attr-defined]
        return KERNELS[choice.kernel](x, self.weight(), self.act, bias)
