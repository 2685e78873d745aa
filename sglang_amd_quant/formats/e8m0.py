"""e8m0: the shared scale of an MX block, one byte b for 2^(b - 127); 255 is NaN, there is no zero (OCP MX v1.0, 5.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_amd_quant.schemes import ScaleMode

BIAS = 127
NAN = 255


def block_exponents(amax: Tensor, mode: ScaleMode, emax: int, mantissa_bits: int, max_mantissa: int) -> Tensor:
    """The e8m0 bytes of blocks whose largest magnitudes are `amax`.

    Every mode is "add a constant to the fp32 bits of amax, keep the exponent field, subtract emax": the constant decides
    from which mantissa on the exponent steps up. FLOOR: never. CEIL: from any nonzero mantissa on. RCEIL: from beyond the
    mantissa of the element's largest value on, which is ceil(log2(amax / max)) without the division. EVEN: from where
    amax rounds up to the next power of two at the element's mantissa width.

    Args:
        amax: fp32, any shape, not negative.
        mode: the rounding.
        emax: exponent of the element's largest value (e2m1: 2, e4m3: 8).
        mantissa_bits: of the element (e2m1: 1, e4m3: 3).
        max_mantissa: of the element's largest value, as the 23 bits of an fp32 (6 = 1.5 * 2^2: 0x400000).

    Returns:
        int32 in 0..253, or 255 where amax is NaN. An infinite amax counts as 2^128.
    """
    full = (1 << 23) - 1
    step = {
        ScaleMode.FLOOR: 0,
        ScaleMode.CEIL: full,
        ScaleMode.RCEIL: full - max_mantissa,
        ScaleMode.EVEN: 1 << (22 - mantissa_bits),
    }[mode]
    bits = amax.view(torch.int32)
    biased = ((bits + step) >> 23).sub_(emax).clamp_(min=0)
    return torch.where(amax.isnan(), NAN, biased)


def decode(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^(b - 127) of each byte: uint8 of any shape -> fp32 or wider, 2^-127 exact (an fp32 subnormal), 255 -> NaN."""
    b = scales.to(torch.int32)
    bits = torch.where(b == 0, 1 << 22, b << 23)
    values = bits.view(torch.float32)
    return torch.where(b == NAN, torch.nan, values).to(dtype)
