"""int4 weights as AutoAWQ's GEMM checkpoints store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts.base import SourceLayout, nibbles, words
from sglang_amd_quant.layouts.names import SOURCE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class AutoAwq(SourceLayout):
    """qweight int32 [K, N / 8] and qzeros int32 [K / group, N / 8]: 8 rows of N share a word.

    Nibble slots 0..7 of a word hold its rows 0, 2, 4, 6, 1, 3, 5, 7: element (n, k) lies in word (k, n // 8) at bit
    4 * (n % 8 // 2) + 16 * (n % 2). Zero points lie in the same order and are stored as they are.
    """

    @property
    def spec(self) -> LayoutSpec:
        return SOURCE_LAYOUTS["awq"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        return 2 * cols, n // 8

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        self.refuse_partial_tiles(matrix)
        # Rows n = (word, pair, parity), pair = (pair high, pair low); a stored byte holds pairs 2i, 2i + 1 of a parity.
        rows = matrix.mT.unflatten(-1, (-1, 2, 2, 2))
        first, second = rows[..., 0, :], rows[..., 1, :]  # [..., K/2, word, pair high, parity]
        even_k = first & 0x0F | second << 4
        odd_k = first >> 4 | second & 0xF0
        octets = torch.stack((even_k, odd_k), dim=-4).mT.flatten(-2)  # [..., K/2, 2, word, (parity, pair high)]
        return octets.contiguous().view(torch.int32).squeeze(-1).flatten(-3, -2)

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        lead = self.leading(storage, n, cols)
        octets = storage.contiguous().unsqueeze(-1).view(torch.uint8)
        octets = octets.view(*lead, cols, 2, n // 8, 2, 2)  # [..., K/2, K % 2, word, parity, pair high]
        even_k, odd_k = octets.unbind(-4)
        first = even_k & 0x0F | odd_k << 4
        second = even_k >> 4 | odd_k & 0xF0
        rows = torch.stack((first, second), dim=-1)  # [..., K/2, word, parity, pair high, pair low]
        return rows.movedim(-3, -1).reshape(*lead, cols, n).mT.contiguous()

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return words(zeros.mT.unflatten(-1, (-1, 4, 2)).mT.flatten(-2))

    def unpack_zeros(self, storage: torch.Tensor) -> torch.Tensor:
        return nibbles(storage).unflatten(-1, (2, 4)).mT.flatten(-3).mT.contiguous()
