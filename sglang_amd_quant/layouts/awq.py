"""int4 weights as AutoAWQ's GEMM checkpoints store them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts import nibbles
from sglang_amd_quant.layouts.base import SourceLayout
from sglang_amd_quant.layouts.names import SOURCE_LAYOUTS, LayoutSpec

PIECE_BYTES = 1 << 20
"""What a CPU thread unpacks at a time: some twenty passes over a piece of a matrix, which the caches then hold."""


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
        words = nibbles.as_words(matrix).unflatten(-2, (-1, 4, 2))  # [..., N/8, 4, 2, K/8]: eight k of one n
        slots = words.movedim((-2, -3), (0, 1)).flatten(0, 1)  # [8 slots, ..., N/8, K/8]
        columns = nibbles.transpose(slots).movedim(0, -1)  # [..., N/8, K/8, 8 of k]
        return columns.movedim(-3, -1).flatten(-3, -2)

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        lead = self.leading(storage, n, cols)
        k, words = storage.shape[-2:]
        matrix = storage.new_empty(*lead, words, 4, 2, k // 8)  # rows of N as slots hold them: 2 p + h in slot 4 h + p
        step = max(16, PIECE_BYTES * torch.get_num_threads() // (4 * k)) if storage.device.type == "cpu" else words
        for source, target in zip(storage.reshape(-1, k, words), matrix.view(-1, *matrix.shape[-4:]), strict=True):
            for first in range(0, words, step):
                piece = slice(first, first + step)
                rows = source[:, piece].unflatten(0, (-1, 8)).movedim(1, 0)  # [8 of k, K/8, words]
                slots = nibbles.transpose(rows).unflatten(0, (2, 4))
                target[piece] = slots.permute(3, 1, 0, 2)
        return nibbles.as_octets(matrix.flatten(-4, -2))

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return nibbles.pair(nibbles.gather(zeros.mT))

    def unpack_zeros(self, storage: torch.Tensor) -> torch.Tensor:
        return nibbles.spread(nibbles.unpair(storage)).mT.contiguous()
