"""Rows one after the other, as checkpoints hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts.base import Layout
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, VALUE_LAYOUTS, LayoutSpec, Role


@dataclass(frozen=True)
class Strided(Layout):
    """Storage is the matrix itself: (n, col) lies at n * cols + col. Nothing is padded or copied."""

    role: Role = Role.VALUE

    @property
    def spec(self) -> LayoutSpec:
        return (VALUE_LAYOUTS if self.role is Role.VALUE else SCALE_LAYOUTS)["strided"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        return n, cols

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.contiguous()

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        self.leading(storage, n, cols)
        return storage
