"""Two 4-bit codes a byte: the even index in the low nibble, the odd one in the high nibble."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """uint8 [..., K], values 0..15 -> uint8 [..., K/2]."""
    pairs = codes.contiguous().view(torch.int16)  # low byte = even index: every machine torch runs on is little-endian
    return (pairs | pairs >> 4).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> uint8 [..., K]."""
    pairs = packed.contiguous().to(torch.int16)
    return ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8)
