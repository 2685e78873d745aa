"""int4 weights as ExLlama orders them, for dequantization two elements at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts.base import Layout, padded_matrix
from sglang_amd_quant.layouts.names import VALUE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class ExLlama(Layout):
    """int32 words [N, K / 8]; the nibble slots 0..7 of a word hold its elements 0, 2, 4, 6, 1, 3, 5, 7.

    Element (n, k) lies in word k // 8 of row n, at bit 4 * (k % 8 // 2) + 16 * (k % 2): elements 2i and 2i + 1 are 16
    bits apart, so `(word >> 4 * i) & 0x000F000F | 0x43004300` is both of them as bf16 128 + nibble. Nibbles are stored
    as they come; a kernel for symmetric weights subtracts the zero point 8. K is padded to 8 with nibbles of 0.
    """

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["exllama"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        return n, self.spec.padded(n, cols)[1] // 4

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        n, cols = matrix.shape[-2:]
        octets = padded_matrix(matrix, *self.spec.padded(n, cols), fill=self.spec.pad_byte)
        low = octets & 0x0F
        # In a word's four bytes [1 0][3 2][5 4][7 6] the low nibbles, two by two, are the first two stored bytes.
        even = low[..., 0::2] | low[..., 1::2] << 4
        high = octets >> 4
        odd = high[..., 0::2] | high[..., 1::2] << 4
        words = torch.cat((even.unflatten(-1, (-1, 2)), odd.unflatten(-1, (-1, 2))), dim=-1)
        return words.view(torch.int32).squeeze(-1)

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        lead = self.leading(storage, n, cols)
        octets = storage.contiguous().unsqueeze(-1).view(torch.uint8)
        even, odd = octets[..., :2], octets[..., 2:]
        pairs = torch.stack((even & 0x0F | odd << 4, even >> 4 | odd & 0xF0), dim=-1)
        return pairs.reshape(*lead, n, -1)[..., :cols].contiguous()
