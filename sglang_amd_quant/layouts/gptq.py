"""int4 weights as GPTQ checkpoints store them, in both conventions for zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_amd_quant.errors import SchemeError
from sglang_amd_quant.layouts import nibbles
from sglang_amd_quant.layouts.base import SourceLayout
from sglang_amd_quant.layouts.names import SOURCE_LAYOUTS, LayoutSpec


@dataclass(frozen=True)
class Gptq(SourceLayout):
    """qweight int32 [K / 8, N], sequential along K; qzeros int32 [K / group, N / 8], sequential along N.

    Element (n, k) lies in word (k // 8, n) at bit 4 * (k % 8); the zero point of row n in word (group, n // 8) at bit
    4 * (n % 8). Version 1 (AutoGPTQ, `checkpoint_format: gptq`) stores zero points minus one, modulo 16; version 2
    (`gptq_v2`) stores them as they are. Weights in activation order (`desc_act`, a `g_idx` that is not k // group)
    have the same bytes but another meaning: who reads them must sort their rows of K first.

    Attributes:
        version: 1 or 2.
    """

    version: int = 1

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise SchemeError(f"gptq version {self.version}", "no such version", "use 1 or 2")

    @property
    def spec(self) -> LayoutSpec:
        return SOURCE_LAYOUTS["gptq" if self.version == 1 else "gptq_v2"]

    @property
    def _minus(self) -> int:
        return 1 if self.version == 1 else 0

    def storage_shape(self, n: int, cols: int) -> tuple[int, ...]:
        return cols // 4, n

    def pack(self, matrix: torch.Tensor) -> torch.Tensor:
        self.refuse_partial_tiles(matrix)
        # Four bytes of a row, low nibble first, are one little-endian word of eight consecutive k.
        return nibbles.as_words(matrix).mT.contiguous()

    def unpack(self, storage: torch.Tensor, n: int, cols: int) -> torch.Tensor:
        self.leading(storage, n, cols)
        return nibbles.as_octets(storage.mT)

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return nibbles.gather(zeros.mT - self._minus & 0x0F)

    def unpack_zeros(self, storage: torch.Tensor) -> torch.Tensor:
        return (nibbles.spread(storage) + self._minus & 0x0F).mT.contiguous()
