"""Where a tensor lies, and so which helpers of a kernel (routing, quantization) can run on it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def has_triton(x: torch.Tensor) -> bool:
    """Whether Triton kernels can run on x. Their torch twins give the same on any device."""
    return x.is_cuda and _installed()
