"""int4 weights as ExLlama orders them, for dequantization two elements at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts import nibbles
from sglang_amd_quant.layouts.base import Layout, padded_matrix
from sglang_amd_quant.layouts.names import VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class ExLlama(Layout):
    """int32 words [N, K / 8]; the nibble slots 0..7 of a word hold its elements 0, 2, 4, 6, 1, 3, 5, 7.

    Element (n, k) lies in word k // 8 of row n, at bit 4 * (k % 8 // 2) + 16 * (k % 2): elements 2i and 2i + 1 are 16
    bits apart, so `(word >> 4 * i) & 0x000F000F | 0x43004300` is both of them as bf16 128 + nibble. Nibbles are stored
    as they come; a kernel for symmetric weights subtracts the zero point 8. K is padded to 8 with nibbles of 0.
    """

    storage_dtype = torch.int32

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["exllama"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        return n, self.spec.padded(n, cols)[1] // 4

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        octets = padded_matrix(matrix, *self.spec.padded(*matrix.shape[-2:]), fill=self.spec.pad_byte)
        return nibbles.pair(nibbles.as_words(octets))

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        self.leading(storage, n, cols)
        return nibbles.as_octets(nibbles.unpair(storage))[..., :cols].contiguous()
