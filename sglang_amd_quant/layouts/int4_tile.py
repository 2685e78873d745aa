"""int4 weights as kernels load them: tiles of int32 words in ExLlama's order, and a word a group for scale and zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.layouts import nibbles
from sglang_amd_quant.layouts.base import Layout, Tiled, inverse, padded_matrix, permuted
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, VALUE_LAYOUTS, LayoutSpec


class Int4Tiled(Tiled):
    """Tiles of int32 words of four bytes, eight elements whose nibbles lie as in `exllama`: 0, 2, 4, 6, 1, 3, 5, 7.

    So `(word >> 4 * i) & 0x000F000F` is the elements of byte i, each where a half of a register begins.
    """

    storage_dtype = torch.int32

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        rows, columns = self.spec.padded(n, cols)
        return rows // 16, 16 * columns // 4

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        n, cols = matrix.shape[-2:]
        octets = padded_matrix(matrix, *self.spec.padded(n, cols), fill=self.spec.pad_byte)
        stored = nibbles.pair(nibbles.as_words(permuted(octets, self._parts(n, cols), self.order)))
        return stored.view(*matrix.shape[:-2], *self.storage_shape(n, cols))

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        lead = self.leading(storage, n, cols)
        parts = tuple(self._parts(n, cols)[axis] for axis in self.order)
        octets = permuted(nibbles.as_octets(nibbles.unpair(storage)), parts, inverse(self.order))
        return octets.view(*lead, *self.spec.padded(n, cols))[..., :n, :cols].contiguous()


@dataclass(frozen=True)
class CdnaInt4(Int4Tiled):
    """Tiles of 16 rows x 128 of K (1 KiB): lane 16 q + n % 16 has elements 8 q ... 8 q + 7 of each of four 32-blocks.

    With Kb = K / 2 bytes to a row, padded to a multiple of 64, byte (n, k) of the words lies at

        (n // 16) * 16 * Kb + (k // 64) * 1024 + (k % 16 // 4) * 256 + (n % 16) * 16 + (k % 64 // 16) * 4 + k % 4

    so 16 bytes a lane hold what 16 x 16 x 32 matrix instructions want of four blocks, whose products meet in one sum
    each: a group's scale can be applied to that. N is padded to 16; padding is 0.
    """

    split_n = (16,)
    split_cols = (4, 4, 4)
    order = (0, 2, 4, 1, 3, 5)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["cdna_int4"]


@dataclass(frozen=True)
class RdnaInt4(Int4Tiled):
    """Tiles of 16 rows x 32 of K (256 bytes), a 32-block of a row to a lane: WMMA's lanes have a whole row's 16 of K.

    With Kb = K / 2 padded to a multiple of 32, byte (n, k) of the words lies at

        (n // 16) * 16 * Kb + (k // 16) * 256 + (n % 16) * 16 + k % 16
    """

    split_n = (16,)
    split_cols = (16,)
    order = (0, 2, 1, 3)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["rdna_int4"]


@dataclass(frozen=True)
class MmaInt4(Int4Tiled):
    """Tiles of 16 rows x 64 of K (512 bytes) of what lanes hold of the left operand of Hopper's matrix instructions,
    16 of K at a time (PTX, m16n8k16 and wgmma).

    With Kb = K / 2 padded to a multiple of 32, byte (n, k) of the words lies at

        (n // 16) * 16 * Kb + (k // 32) * 512 + (n % 8) * 64 + (k % 4) * 16 + (k % 32 // 16) * 8
            + (n % 16 // 8) * 4 + k % 16 // 4

    so lane 4 * (n % 8) + q holds four words, of rows n and n + 8 by turns, first of one 32-block of the tile, then of
    the other; element pairs of a word are 2 q, 2 q + 8, 2 q + 16 and 2 q + 24 of the block, each with its neighbour.
    """

    split_n = (2, 8)
    split_cols = (2, 4, 4)
    order = (0, 3, 2, 6, 4, 1, 5)

    @property
    def spec(self) -> LayoutSpec:
        return VALUE_LAYOUTS["mma_int4"]


@dataclass(frozen=True)
class TileGroup(Layout):
    """Scales of int4 groups, one word each (`formats.group_words`), in the order of tiles of 16 rows.

    With Kg = K / group, word (n, k) lies at word (n // 16) * 16 * Kg + k * 16 + n % 16. N is padded to 16 with scales
    of 0; K is not padded.
    """

    @property
    def spec(self) -> LayoutSpec:
        return SCALE_LAYOUTS["tile_group"]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        rows, columns = self.spec.padded(n, cols)
        return rows // 16, 16 * columns

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        n, cols = matrix.shape[-2:]
        rows = padded_matrix(matrix, *self.spec.padded(n, cols), fill=self.spec.pad_byte)
        return rows.unflatten(-2, (-1, 16)).mT.contiguous().flatten(-2)

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        self.leading(storage, n, cols)
        return storage.unflatten(-1, (cols, 16)).mT.flatten(-3, -2)[..., :n, :].contiguous()
