"""MXFP8 weights and scales in the order of Hopper's mma fragments, for `kernels/hip/include/decode_sm90.h`."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.layouts.base import Tiled
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class MmaTile(Tiled):
    """Tiles of 16 rows x 64 bytes (1 KiB), in which each of 32 lanes finds 16 bytes of two rows.

    With K padded to a multiple of 64, element (n, k) lies at byte

        (n // 16) * 16 * K + (k // 64) * 1024 + (n % 16 // 8) * 512 + (n % 8) * 64
            + (k % 32 // 8) * 16 + (k % 64 // 32) * 8 + k % 8

    so lane 4 * (n % 8) + q holds, of rows n and n + 8, k = 8 q ... 8 q + 7 of both MX blocks of the tile, and a row
    tile's whole K is one run of memory for a bulk copy. N is padded to 16; padding is 0.
    """

    split_n = (2, 8)
    split_cols = (2, 4, 8)
    order = (0, 3, 1, 2, 5, 4, 6)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["mma_tile"]


@dataclass(frozen=True)
class MmaScale(Tiled):
    """The scales of `MmaTile`'s tiles, 32 bytes each: a word for each four lanes that share rows n and n + 8.

    With Ks = K / 32 padded to a multiple of 2, scale (n, k) lies at byte

        (n // 16) * 16 * Ks + (k // 2) * 32 + (n % 8) * 4 + (n % 16 // 8) * 2 + k % 2
    """

    split_n = (2, 8)
    split_cols = (2,)
    order = (0, 3, 2, 1, 4)

    @property
    def spec(self) -> LayoutSpec:
        return SCALE_LAYOUTS["mma_scale"]
