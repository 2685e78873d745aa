"""Weights in tiles of 16 rows x 16 bytes, for fp8 and packed fp4."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.layouts.base import Tiled
from sglang_amd_quant.layouts.names import VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class Preshuffle(Tiled):
    """aiter's shuffle_weight with layout (16, 16): each tile of 16 rows x 16 bytes is contiguous, two side by side.

    With Kb bytes to a row (e4m3: K, e2m1: K / 2) padded to a multiple of 32, byte (n, k) lies at

        (n // 16) * 16 * Kb + (k // 32) * 512 + (k % 32 // 16) * 256 + (n % 16) * 16 + k % 16

    so 16 lanes that each take 16 bytes of one row read 256 contiguous bytes. N is padded to 16; padding is 0.
    """

    split_n = (16,)
    split_cols = (2, 16)
    order = (0, 2, 3, 1, 4)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["preshuffle"]
