"""e4m3 (fp8): OCP's `fn` (no Inf, NaN 0x7F and 0xFF, max 448)."""

from __future__ import annotations

import torch
from torch import Tensor

EMAX = 8
MANTISSA_BITS = 3
MAX = 448.0
MAX_MANTISSA = 3 << 21  # of 448 = 1.75 * 2^8, as fp32 bits


def encode(y: Tensor) -> Tensor:
    """Round to e4m3fn, ties to even, saturating at +-448, NaN kept: fp32 -> float8_e4m3fn of the same shape."""
    return y.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def decode(data: Tensor) -> Tensor:
    """float8_e4m3fn -> fp32, exact."""
    return data.to(torch.float32)
