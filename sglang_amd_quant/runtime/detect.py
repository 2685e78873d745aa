"""Which architecture serves here, read from torch, once."""

from __future__ import annotations

from functools import lru_cache

CPU = "cpu"


@lru_cache(maxsize=1)
def current_arch() -> str:
    """`gfx950`, `gfx942`, `gfx1100`, ... on ROCm; `sm_90`, ... on CUDA; `cpu` where torch sees no accelerator."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=1)
def cu_count() -> int:
    """Compute units (SMs) of the current device; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)
