"""Weights as the decode kernels of gfx942 load them, and scales as those of all AMD targets do."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.layouts.base import Tiled
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class Cdna3E2m1(Tiled):
    """Packed e2m1 in tiles of 16 rows x 64 bytes (1 KiB, 128 of K): four bytes of each of four MX blocks a lane.

    With Kb = K / 2 bytes to a row, padded to a multiple of 64, byte (n, k) lies at

        (n // 16) * 16 * Kb + (k // 64) * 1024 + (k % 16 // 4) * 256 + (n % 16) * 16 + (k % 64 // 16) * 4 + k % 4

    so lane 16 * q + n % 16 loads 16 bytes that hold, of row n, elements 8 q ... 8 q + 7 of every MX block: a block's
    products meet in one sum, to which its scale can be applied. N is padded to 16; padding is 0.
    """

    split_n = (16,)
    split_cols = (4, 4, 4)
    order = (0, 2, 4, 1, 3, 5)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["cdna3_e2m1"]


@dataclass(frozen=True)
class Cdna3E4m3(Tiled):
    """e4m3 likewise: tiles of 16 rows x 64 of K, eight bytes of each of two MX blocks a lane.

    With K padded to a multiple of 64, element (n, k) lies at byte

        (n // 16) * 16 * K + (k // 64) * 1024 + (k % 32 // 8) * 256 + (n % 16) * 16 + (k % 64 // 32) * 8 + k % 8
    """

    split_n = (16,)
    split_cols = (2, 4, 8)
    order = (0, 2, 4, 1, 3, 5)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["cdna3_e4m3"]


@dataclass(frozen=True)
class TileScale(Tiled):
    """Scales in tiles of 16 rows x 4 (128 of K), 64 bytes: a word for each row.

    With Ks = K / 32 padded to a multiple of 4, scale (n, k) lies at byte

        (n // 16) * 16 * Ks + (k // 4) * 64 + (n % 16) * 4 + k % 4

    so the 64 lanes of a wave load, a word each, the scales of four tiles that follow each other along K.
    """

    split_n = (16,)
    split_cols = (4,)
    order = (0, 2, 1, 3)

    @property
    def spec(self) -> LayoutSpec:
        return SCALE_LAYOUTS["tile_scale"]
