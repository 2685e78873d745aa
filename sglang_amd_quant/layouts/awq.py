"""int4 weights as AutoAWQ's GEMM checkpoints store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts import nibbles
from sglang_amd_quant.layouts.base import SourceLayout
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
        words = nibbles.as_words(matrix)  # [..., N, K/8]: eight k of one n
        columns = words.unflatten(-2, (-1, 8)).movedim(-1, -3).mT  # [..., K/8, 8 of n, N/8]
        return nibbles.pair(nibbles.transpose(columns)).flatten(-3, -2)

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        self.leading(storage, n, cols)
        rows = nibbles.unpair(storage).unflatten(-2, (-1, 8))  # [..., K/8, 8 of k, N/8]
        words = nibbles.transpose(rows).mT.movedim(-3, -1)  # [..., N/8, 8 of n, K/8]
        return nibbles.as_octets(words.flatten(-3, -2))

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return nibbles.pair(nibbles.gather(zeros.mT))

    def unpack_zeros(self, storage: torch.Tensor) -> torch.Tensor:
        return nibbles.spread(nibbles.unpair(storage)).mT.contiguous()
