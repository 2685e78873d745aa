"""e8m0 scales in the order that CDNA4's scaled MFMA consumes them."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.errors import SchemeError
from sglang_amd_quant.layouts.base import Tiled
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class Cdna4Scale(Tiled):
    """Tiles of 32 rows x 8 scales (256 bytes), one dword for each of 64 lanes.

    With Ks = K / 32 padded to a multiple of 8, scale (n, k) lies at byte

        (n // 32) * 32 * Ks + (k // 8) * 256 + (k % 4) * 64 + (n % 16) * 4 + (k % 8 // 4) * 2 + n % 32 // 16

    so lane (k % 4) * 16 + n % 16 finds its four scales, {row half} x {K half}, in one dword, and the MFMA picks one
    by its OPSEL byte select. The same as triton_kernels' CDNA4_SCALE (rows padded to 32) and aiter's e8m0_shuffle
    (rows padded to 256); padding is 0x7F. A kernel reads whole tiles: BLOCK_N >= 32 and BLOCK_K >= 256.

    Attributes:
        rows: N is padded to a multiple of this: 32 or 256.
    """

    rows: int = 32

    split_n = (2, 16)
    split_cols = (2, 4)
    order = (0, 3, 5, 2, 4, 1)

    def __post_init__(self) -> None:
        if self.rows not in (32, 256):
            raise SchemeError(f"cdna4_scale with rows padded to {self.rows}", "no such variant", "use 32 or 256")

    @property
    def spec(self) -> LayoutSpec:
        return SCALE_LAYOUTS["cdna4_scale" if self.rows == 32 else "cdna4_scale_256"]
