"""What formats with int4 weights share: groups that kernels know, and int32 words of eight."""

from __future__ import annotations

from typing import Any

import torch

from sglang_amd_quant.checkpoints.reader import unsupported
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.schemes import INT4_GROUPS, SCHEMES

SCHEME = "int4_w4a16"
BITS = SCHEMES[SCHEME].weight_bits


def group_size(where: str, group: Any) -> int:
    """The group that a config asks for. Raises CheckpointError where no kernel knows it."""
    if group not in INT4_GROUPS:
        whole = " (one scale a row)" if group == -1 else ""
        raise unsupported(
            f"{where} {group}{whole}", f"int4 kernels know groups of {', '.join(map(str, INT4_GROUPS))} along K"
        )
    return int(group)


def words(name: str, tensor: torch.Tensor, shape: str, rows: int = 1) -> torch.Tensor:
    """A tensor that holds eight int4 numbers a word, its rows a multiple of `rows`. Raises CheckpointError if not."""
    if tensor.dtype != torch.int32 or tensor.dim() != 2 or not tensor.numel() or len(tensor) % rows:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"stored int4 is int32 {shape}",
            "check the quant_method in config.json, or fetch the checkpoint again",
        )
    return tensor


def transposed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scales [K/group, N] as [N, K/group]."""
    if tensor.dim() != 2:
        raise CheckpointError(f"{name} {list(tensor.shape)}", "stored scales are [K/group, N]", "fetch the file again")
    return tensor.mT.contiguous()
