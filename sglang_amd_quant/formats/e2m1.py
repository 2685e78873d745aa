"""e2m1 (fp4): sign, two exponent bits, one mantissa bit; magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; no Inf, no NaN."""

from __future__ import annotations

import torch
from torch import Tensor

EMAX = 2
MANTISSA_BITS = 1
MAX = 6.0
MAX_MANTISSA = 1 << 22  # of 6 = 1.5 * 2^2, as fp32 bits


def encode(y: Tensor) -> Tensor:
    """Round to e2m1, ties to even, saturating at +-6: fp32 [..., K] -> packed uint8 [..., K/2], low nibble = even index.

    Adding M = 2^(22 + e), with e the exponent of |y| held at 0 or above, leaves |y| rounded to its last e2m1 bit in the
    low bits of the sum, so the processor's own rounding does the work; 2e then completes the code.
    """
    bits = y.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    magic = (magnitude & 0x7F800000).clamp_(min=127 << 23, max=129 << 23).add_(22 << 23)
    rounded = magnitude.clamp_(max=0x40C00000).view(torch.float32) + magic.view(torch.float32)
    code = rounded.view(torch.int32).sub_(magic).add_(magic.sub_(149 << 23) >> 22)
    code |= (bits >> 28) & 8
    return (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)


def decode(packed: Tensor) -> Tensor:
    """The values of packed codes: uint8 [..., K/2] -> fp32 [..., K]."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=packed.device)
    values = torch.cat([values, -values])
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return values[codes.to(torch.int32)]
