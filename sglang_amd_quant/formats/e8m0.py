"""e8m0: the scale of an MX block. Byte b is 2^(b - 127), 255 is NaN, there is no zero (OCP MX v1.0, section 5.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = 255


def decode(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^(b - 127): bytes as any integer dtype -> fp32 or fp64, 2^-127 exact (an fp32 subnormal), 255 -> NaN."""
    b = scales.to(torch.int32)
    bits = (b << 23).clamp_(min=1 << 22).masked_fill_(b == NAN, 0x7FC00000)
    return bits.view(torch.float32).to(dtype)


def reciprocal(scales: Tensor) -> Tensor:
    """2^(127 - b) as fp32, exact, 255 -> NaN: reciprocals of scales are scales, mirrored at byte 127."""
    return decode(254 - scales.to(torch.int32) & 0xFF)


def encode(values: Tensor) -> Tensor:
    """The byte of each power of two: fp32 -> uint8. What is no power of two from 2^-127 to 2^127 becomes 255 (NaN)."""
    b = values.contiguous().view(torch.int32) >> 23 & 0xFF
    return torch.where(decode(b) == values, b, NAN).to(torch.uint8)
