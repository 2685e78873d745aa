"""int4 groups: unsigned nibbles with a bf16 scale, and a zero point if asymmetric, per 32, 64 or 128 elements along K.

w = (q - zero) * scale, zero = 8 if symmetric: the values of GPTQ, AWQ and compressed-tensors `pack-quantized`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import nibbles
from sglang_amd_quant.formats.pieces import pieces
from sglang_amd_quant.schemes import INT4_GROUPS

ZERO = 8
"""The zero point of symmetric groups."""


def quantize_int4(x: Tensor, group: int, symmetric: bool = True) -> tuple[Tensor, ...]:
    """Quantize along the last dimension, to nearest, ties to even.

    Symmetric: scale = amax / 7.5, codes from -8 to 7 about zero. Asymmetric: scale = (max - min) / 15 of the range that
    also holds zero. Both as compressed-tensors' `calculate_qparams` has them, then rounded to bf16 before they are
    used. A group of zeros has the scale 0; a group with NaN or Inf dequantizes to NaN.

    Args:
        x: [..., K], any float dtype, any strides.
        group: 32, 64 or 128.
        symmetric: without zero points.

    Returns:
        data: uint8 [..., K/2], low nibble = even index.
        scales: bf16 [..., K/group].
        zeros: uint8 [..., K/group], 0..15; only if not symmetric.

    Raises:
        ShapeError: K is not a multiple of the group.
        SchemeError: another group, or x is no float tensor.
    """
    if group not in INT4_GROUPS:
        raise SchemeError(f"int4 group {group}", "not supported", f"use one of {', '.join(map(str, INT4_GROUPS))}")
    if not x.is_floating_point():
        raise SchemeError(f"tensor of {x.dtype}", "only floats can be quantized", "dequantize or cast it first")
    if x.dim() == 0 or x.shape[-1] % group:
        raise ShapeError(f"tensor {list(x.shape)}", f"K is not a multiple of the group {group}", "take a smaller group")
    lead, n = x.shape[:-1], x.shape[-1] // group
    data = torch.empty(*lead, n, group // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*lead, n, 1, dtype=torch.bfloat16, device=x.device)
    zeros = torch.empty(*lead, n, 1, dtype=torch.uint8, device=x.device)
    for source, d, s, z in pieces(x.detach().unflatten(-1, (n, group)), data, scales, zeros):
        groups = source.to(torch.float32)
        if symmetric:
            s.copy_(groups.abs().amax(-1, keepdim=True) / 7.5)
        else:
            low = groups.amin(-1, keepdim=True).clamp_(max=0)
            high = groups.amax(-1, keepdim=True).clamp_(min=0)
            s.copy_((high - low) / 15)
        scale = s.to(torch.float32)
        divisor = scale.masked_fill(scale == 0, 1)
        offset = torch.zeros_like(scale) if symmetric else _code(-8 - low / divisor)
        z.copy_(offset + ZERO)
        d.copy_(nibbles.pack(_code(groups / divisor + offset).add_(ZERO).to(torch.uint8)))
        s.masked_fill_(~scale.isfinite(), torch.nan)
    out = data.flatten(-2), scales.flatten(-2)
    return out if symmetric else (*out, zeros.flatten(-2))


def dequantize_int4(
    data: Tensor, scales: Tensor, zeros: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(q - zero) * scale, in fp32, then rounded to `dtype`.

    Args:
        data: uint8 [..., K/2], low nibble = even index, any strides.
        scales: float [..., K/group]; the group follows from the shapes.
        zeros: uint8 [..., K/group]; None: 8 everywhere.
        dtype: float dtype of the result.

    Returns:
        [..., K].

    Raises:
        ShapeError: shapes that do not go together, or a group other than 32, 64, 128.
    """
    k, n = data.shape[-1] * 2, scales.shape[-1]
    group = k // n if n else INT4_GROUPS[0]
    if data.shape[:-1] != scales.shape[:-1] or group not in INT4_GROUPS or n * group != k:
        raise ShapeError(
            f"int4 data {list(data.shape)} with scales {list(scales.shape)}",
            f"no group of {', '.join(map(str, INT4_GROUPS))} fits",
            "take both from the same tensor",
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ShapeError(
            f"zeros {list(zeros.shape)}", f"scales are {list(scales.shape)}", "unpack them to one per group"
        )
    out = torch.empty(*scales.shape, group, dtype=dtype, device=data.device)
    zeros = torch.full_like(scales, ZERO, dtype=torch.uint8) if zeros is None else zeros
    for d, s, z, target in pieces(data.unflatten(-1, (n, group // 2)), scales.unsqueeze(-1), zeros.unsqueeze(-1), out):
        target.copy_((nibbles.unpack(d).to(torch.float32) - z) * s.to(torch.float32))
    return out.flatten(-2)


def group_words(scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Scale and zero point of each group in one word: what kernels load.

    The scale is an fp32 whose last four bits are the zero point's. It is exact for bf16 and fp16 scales, which leave at
    least 13 bits of an fp32 unused; others are rounded to 19 bits after the leading one.

    Args:
        scales: float [..., K/group].
        zeros: uint8 [..., K/group], 0..15; None: 8 everywhere.

    Returns:
        int32 [..., K/group].
    """
    bits = scales.to(torch.float32).view(torch.int32)
    finite = scales.isfinite()
    rounded = torch.where(finite, bits + 7 + (bits >> 4 & 1), bits) & ~15  # to nearest, ties to even
    rounded = torch.where(scales.isnan(), 0x7FC00000, rounded)
    return rounded | (ZERO if zeros is None else zeros.to(torch.int32))


def split_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `group_words`: fp32 scales, and zero points as uint8."""
    return (words & ~15).view(torch.float32), (words & 15).to(torch.uint8)


def _code(values: Tensor) -> Tensor:
    """The nearest signed code, -8..7; 0 for NaN. fp32, overwritten."""
    return values.round_().clamp_(-8, 7).nan_to_num_(nan=0)
