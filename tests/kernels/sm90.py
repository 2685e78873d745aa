"""Whether a Hopper GPU is here, and the mark of tests that run on one."""

from __future__ import annotations

import pytest


def is_here() -> bool:
    """Whether torch, if it is installed at all, has one."""
    try:
        import torch

        return bool(torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0))
    except ImportError:
        return False


GPU = pytest.mark.skipif(not is_here(), reason="no sm_90 GPU")
