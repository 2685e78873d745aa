"""MXFP8 weights in the lane order of gfx950's 16x16x128 scaled MFMA."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.layouts.base import Tiled
from sglang_amd_quant.layouts.names import VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class Mxfp8Lane(Tiled):
    """SGLang's native gfx950 MXFP8 order: tiles of 16 rows x 128 bytes (2048 bytes), 32 contiguous bytes a lane.

    With K padded to a multiple of 128, element (n, k) lies at byte

        (n // 16) * 16 * K + (k // 128) * 2048 + (k // 32 % 2) * 1024 + (k // 16 % 2) * 512
            + (n % 16) * 32 + (k // 64 % 2) * 16 + k % 16

    Lane 16 * (2 * (k // 32 % 2) + k // 16 % 2) + n % 16 thus reads its 32 bytes of row n in two 128-bit loads: 16 of
    K, and the 16 that lie 64 further on. N is padded to 16; padding is 0.
    """

    split_n = (16,)
    split_cols = (2, 2, 2, 16)
    order = (0, 2, 4, 5, 1, 3, 6)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["mxfp8_lane"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        rows, columns = self.spec.padded(n, cols)
        return rows // 16, columns // 128, 2048
