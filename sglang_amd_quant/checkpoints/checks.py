"""Checks of single tensors of a quantized module: dtype, rank, whole blocks, NaN. Each raises CheckpointError."""

from __future__ import annotations

import torch

from sglang_amd_quant.checkpoints.naming import STORED, Role
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.formats import find_nan, split_words
from sglang_amd_quant.formats.int4 import ZERO
from sglang_amd_quant.schemes import MX_BLOCK

E8M0_NAN = 255
NIBBLES = 8
"""int4 numbers to a word."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def data(name: str, tensor: torch.Tensor, element: str, block: int, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/block] of a canonical weight."""
    dtype, pack = STORED[element][0], 1 if element == "e4m3" else 2
    if tensor.dtype != dtype:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"the config says {element} weights, which are {dtype}",
            "mend the scheme in config.json's quantization_config",
        )
    stored = block // pack
    if tensor.dim() != rank or tensor.numel() == 0 or tensor.shape[-1] % stored:
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"a stored {element} weight is [{'E, ' * (rank - 2)}N, K/{pack}] with K a multiple of {block}",
            "fetch the checkpoint again, or mend the scheme in config.json",
        )
    return (*tensor.shape[:-1], tensor.shape[-1] // stored)


def codes(name: str, tensor: torch.Tensor) -> None:
    """No stored e4m3 weight may be NaN; e2m1 and int4 have no such code."""
    place = find_nan(tensor) if tensor.dtype == torch.float8_e4m3fn else None
    if place is not None:
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"holds NaN (e4m3 0x7f or 0xff), as at {list(place)}",
            "quantize the source again: its weights held NaN, or the file was damaged",
        )


def scales(name: str, tensor: torch.Tensor, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/32] of canonical scales."""
    if tensor.dtype != torch.uint8 or tensor.dim() != rank:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"block scales are e8m0 bytes (uint8) [{'E, ' * (rank - 2)}N, K/{MX_BLOCK}]",
            "the checkpoint is of another format: check config.json's quant_method",
        )
    if not tensor.is_meta and tensor.numel() and int(tensor.max()) == E8M0_NAN:
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"{int((tensor == E8M0_NAN).sum())} scale bytes are 255, e8m0's NaN",
            "quantize the source again: its weights held NaN or Inf, or padding was written",
        )
    return tuple(tensor.shape)


def groups(name: str, tensor: torch.Tensor, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/group] of int4 scales: floats, or words that are canonical already."""
    if tensor.dtype not in (*_FLOATS, torch.int32) or tensor.dim() != rank:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"int4 scales are floats, or int32 words of scale and zero point, [{'E, ' * (rank - 2)}N, K/group]",
            "the checkpoint is of another format: check config.json's quant_method",
        )
    if not tensor.is_meta:
        values = split_words(tensor)[0] if tensor.dtype == torch.int32 else tensor
        bad = int(torch.count_nonzero(~values.isfinite()))
        if bad:
            raise CheckpointError(
                f"{name} {list(tensor.shape)}",
                f"{bad} scales are NaN or Inf",
                "quantize the source again: its weights held NaN or Inf, or a scale left fp16's range",
            )
    return tuple(tensor.shape)


def zeros(name: str, tensor: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """int4 zero points [N, K/group]. Where the config says symmetric they must be 8, or bytes and config contradict
    one another (GPTQ's two versions differ by one)."""
    if symmetric and not tensor.is_meta and bool((tensor != ZERO).any()):
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"zero points other than {ZERO} (as {int(tensor[tensor != ZERO][0])}), though the config says symmetric",
            "mend config.json's quantization_config (gptq: sym and checkpoint_format; awq: zero_point)",
        )
    return tensor


def paired_zeros(name: str, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The zero points of these scales [N, K/group]: up to seven rows may be there to fill words."""
    rows, groups = scales.shape[-2:]
    if zeros.shape[-1] != groups or not 0 <= zeros.shape[-2] - rows < NIBBLES:
        raise CheckpointError(
            f"{name} {list(zeros.shape)}",
            f"there are {[rows, groups]} scales",
            "the file was cut or mixed up: fetch it again",
        )
    return zeros[..., :rows, :]


def order(name: str, tensor: torch.Tensor, group: int) -> None:
    """The group of each element of K must be that of its place."""
    if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}", "groups of K are int32 [K]", "fetch the checkpoint again"
        )
    places = torch.arange(len(tensor), dtype=tensor.dtype, device=tensor.device)
    if not tensor.is_meta and not torch.equal(tensor, places // group):
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"in activation order (desc_act), where kernels read groups of {group} neighbours",
            "take a checkpoint made with desc_act false, or quantize the bf16 original with `amd-mx quantize`",
        )


def shape(name: str, tensor: torch.Tensor, group: int) -> dict[Role, tuple[int, ...]]:
    """Blocks [N, K/group] that a stored shape says; nothing without values."""
    if tensor.shape != (2,) or tensor.is_floating_point():
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}", "a shape is two integers, N and K", "fetch the file again"
        )
    if tensor.is_meta:
        return {}
    n, k = tensor.tolist()
    return {Role.SHAPE: (n, -(-k // group))}


def input_scale(name: str, tensor: torch.Tensor, fused: bool) -> torch.Tensor:
    """Static activation scales as float32: a scalar, or [E] where experts are fused."""
    if not tensor.is_floating_point() or (tensor.dim() != 1 if fused else tensor.numel() != 1):
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}", "an input scale is one float", "calibrate the source again"
        )
    scale = tensor.to(torch.float32) if fused else tensor.reshape(()).to(torch.float32)
    if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{name} = {scale.tolist()}", "no positive finite scale", "calibrate the source again")
    return scale
