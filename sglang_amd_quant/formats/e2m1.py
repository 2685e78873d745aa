"""e2m1 (fp4): sign, two exponent bits, one mantissa bit. Magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; neither Inf nor NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_amd_quant.formats import nibbles

MAX = 6.0
MANTISSA_BITS = 1

_ONE = 127 << 23  # exponent field of 1.0, as fp32 bits
_SIX = 129 << 23 | 1 << 22


def encode(y: Tensor) -> Tensor:
    """Round to e2m1: to nearest, ties to even, saturating at +-6, signs kept (also of zero). NaN becomes +-6.

    With e the exponent of |y|, taken as 0 below 1, the codes are 2^(e-1) apart. The sum |y| + 2^(22+e) has an ulp of
    just that, so the processor's own rounding leaves the code, counted from 2^(22+e), in the low bits; codes of the
    binades below add 2e.

    Args:
        y: fp32 [..., K], any strides, K even; overwritten.

    Returns:
        uint8 [..., K/2], low nibble = even index.
    """
    bits = y.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).clamp_(max=_SIX)
    shift = (magnitude & 0x7F800000).clamp_(min=_ONE).add_(22 << 23)
    code = magnitude.view(torch.float32).add_(shift.view(torch.float32)).view(torch.int32).sub_(shift)
    code += shift.sub_(_ONE + (22 << 23)).bitwise_right_shift_(22)
    code |= bits.bitwise_right_shift_(28).bitwise_and_(8)
    return nibbles.pack(code.to(torch.uint8))


def decode(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> fp32 [..., K], exact.

    The three magnitude bits are put where fp16 keeps the last two of its exponent and the first of its mantissa: an
    fp16 (subnormal for 0.5) of 2^-14 times the value.
    """
    pairs = packed.contiguous().to(torch.int32)
    pairs |= pairs << 12
    halves = (pairs & 0x00070007) << 9 | (pairs & 0x00080008) << 12
    return halves.view(torch.float16).to(torch.float32).mul_(2.0**14)
