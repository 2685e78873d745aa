"""What every layout offers, and the one mechanism that all tiled layouts share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.layouts.names import LayoutSpec
from sglang_amd_quant.schemes import Scheme


class Layout(ABC):
    """A bijection between a matrix [..., N, cols] and its storage, up to padding.

    `cols` counts stored columns: bytes of values, or scales. Leading dimensions (experts) are kept in front.
    """

    @property
    @abstractmethod
    def spec(self) -> LayoutSpec:
        """Name, constraints and padding, known without torch."""

    @property
    def name(self) -> str:
        """The name that packs and `TensorLayout` use."""
        return self.spec.name

    def constraints(self, n: int, k: int, scheme: Scheme) -> list[str]:
        """Why weights [n, k] (elements) of `scheme` cannot have this layout; empty if they can."""
        return self.spec.reasons(n, k, scheme)

    storage_dtype: ClassVar[torch.dtype | None] = None
    """What storage is made of, where that is not the dtype of the matrix."""

    @abstractmethod
    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        """Shape that a matrix [n, cols] takes in storage, padding included."""

    @abstractmethod
    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        """Matrix [..., n, cols] -> storage [..., *storage_shape(n, cols)], padded with `spec.pad_byte`."""

    @abstractmethod
    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        """Storage -> matrix [..., n, cols], padding dropped.

        Raises:
            ShapeError: `storage` is not what `storage_shape(n, cols)` says.
        """

    def leading(self, storage: torch.Tensor, n: int, cols: int) -> torch.Size:
        """The dimensions before the matrix; raises ShapeError where the rest is not as the layout says."""
        shape = self.storage_shape(n, cols)
        lead = storage.ndim - len(shape)
        if lead < 0 or tuple(storage.shape[lead:]) != shape:
            raise ShapeError(
                f"storage {list(storage.shape)}",
                f"layout {self.name} keeps a matrix of {n} x {cols} as {list(shape)}",
                "give the shape it was packed from",
            )
        return storage.shape[:lead]


def padded_matrix(matrix: torch.Tensor, n: int, cols: int, fill: int) -> torch.Tensor:
    """`matrix` grown to [..., n, cols], new rows and columns holding `fill`; itself where nothing is to add."""
    if matrix.shape[-2:] == (n, cols):
        return matrix
    grown = matrix.new_full((*matrix.shape[:-2], n, cols), fill)
    grown[..., : matrix.shape[-2], : matrix.shape[-1]] = matrix
    return grown


class Tiled(Layout):
    """Storage is a permutation of bytes within tiles: split rows and columns, reorder the parts, lay them down.

    Attributes:
        split_n, split_cols: how a tile's rows and columns divide, slowest first; their products are the tile. Storage
            has a row for each row of tiles.
        order: the stored order, slowest first, of the parts (row tile, *split_n, column tile, *split_cols).
    """

    split_n: ClassVar[tuple[int, ...]]
    split_cols: ClassVar[tuple[int, ...]]
    order: ClassVar[tuple[int, ...]]

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        rows, columns = self.spec.padded(n, cols)
        tile_rows = math.prod(self.split_n)
        return rows // tile_rows, tile_rows * columns

    def _parts(self, n: int, cols: int) -> tuple[int, ...]:
        rows, columns = self.spec.padded(n, cols)
        return (
            rows // math.prod(self.split_n),
            *self.split_n,
            columns // math.prod(self.split_cols),
            *self.split_cols,
        )

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        n, cols = matrix.shape[-2:]
        octets = padded_matrix(matrix.view(torch.uint8), *self.spec.padded(n, cols), fill=self.spec.pad_byte)
        stored = permuted(octets, self._parts(n, cols), self.order)
        return stored.view(matrix.dtype).view(*matrix.shape[:-2], *self.storage_shape(n, cols))

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        lead = self.leading(storage, n, cols)
        parts = tuple(self._parts(n, cols)[axis] for axis in self.order)
        matrix = permuted(storage.contiguous().view(torch.uint8), parts, inverse(self.order))
        return matrix.view(*lead, *self.spec.padded(n, cols))[..., :n, :cols].contiguous().view(storage.dtype)


def permuted(octets: torch.Tensor, parts: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """Bytes seen as [..., *parts], copied so that axis i of `parts` is what axis order[i] was; flat.

    `order[0]` must be 0: the first part, the row tiles, stays outermost.
    """
    if order[-1] == len(parts) - 1:  # runs of bytes stay together
        return octets.reshape(-1, *parts).permute(0, *(1 + axis for axis in order)).flatten()
    # Bytes travel singly. A permuting copy would loop over the innermost part, two or four bytes at a time; gathering
    # by one tile row's permutation is 3 to 9 times as fast on a CPU.
    tile_row = torch.arange(math.prod(parts[1:]), device=octets.device).view(parts[1:])
    index = tile_row.permute(*(axis - 1 for axis in order[1:])).flatten()
    rows = octets.reshape(-1, len(index))
    return rows.gather(1, index.expand_as(rows)).flatten()


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


class SourceLayout(Layout):
    """How a checkpoint stores int4 weights and their zero points. Storage is int32; the matrix is plain packed nibbles.

    The matrix is uint8 [..., N, K/2], low nibble = even k; zero points are uint8 [..., N, K/group], one to a byte.
    """

    storage_dtype = torch.int32

    def refuse_partial_tiles(self, matrix: torch.Tensor) -> None:
        """Raise ShapeError where a matrix [..., n, cols] is not whole words: a checkpoint has no padding."""
        n, cols = matrix.shape[-2:]
        if n % self.spec.tile_n or cols % self.spec.tile_cols:
            raise ShapeError(
                f"int4 weights [{n}, {2 * cols}]",
                f"layout {self.name} needs N % {self.spec.tile_n} == 0 and K % {2 * self.spec.tile_cols} == 0",
                "keep them strided",
            )

    @abstractmethod
    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Zero points uint8 [..., N, groups] -> int32 [..., groups, N / 8]."""

    @abstractmethod
    def unpack_zeros(self, storage: torch.Tensor) -> torch.Tensor:
        """The inverse of `pack_zeros`."""
