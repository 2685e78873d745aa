"""e4m3 (fp8) in its two kinds, which share no scale and not every byte.

OCP's `fn`: bias 7, max 448, NaN 0x7F and 0xFF. gfx942's `fnuz`: bias 8, max 240, one NaN, 0x80, where `fn` has -0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats.pieces import pieces
from sglang_amd_quant.schemes import MX_BLOCK

MAX = 448.0
MANTISSA_BITS = 3
FNUZ_NAN = 0x80


def encode(y: Tensor) -> Tensor:
    """Round to e4m3fn: to nearest, ties to even, saturating at +-448, NaN kept. fp32 (overwritten) -> float8_e4m3fn."""
    return y.clamp_(-MAX, MAX).to(torch.float8_e4m3fn)


def decode(data: Tensor) -> Tensor:
    """float8_e4m3fn -> fp32 of the same shape, exact.

    On CPUs torch casts from fp8 one element at a time. Moved to where fp16 keeps sign, exponent and mantissa, the same
    bits are an fp16 of 2^-8 times the value, subnormals included, and that cast is an instruction. The carry out of
    0x7F + 1 marks NaN.
    """
    if data.device.type != "cpu":
        return data.contiguous().to(torch.float32)
    halves = data.contiguous().view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    halves |= (halves + 0x80).bitwise_and_(0x4000)
    return halves.view(torch.float16).to(torch.float32).mul_(2.0**8)


def find_nan(data: Tensor) -> tuple[int, ...] | None:
    """Where float8_e4m3fn data of any shape holds a NaN, or None. Two reductions over its bytes and a host read each:
    no copy is made, which `isnan` would be 50 times as slow for on a CPU."""
    if not data.numel():
        return None
    for bits, nan in ((data.view(torch.int8), 0x7F), (data.view(torch.uint8), 0xFF)):
        if int(bits.max()) == nan:
            return tuple(int(i) for i in torch.unravel_index(bits.argmax(), bits.shape))
    return None


def quantize_fp8_static(x: Tensor, scale: Tensor | float, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Per-tensor fp8 with a known scale: x * (1 / scale) in fp32, to nearest, ties to even, saturating, NaN kept.

    Multiplied by the reciprocal, as SGLang's and vLLM's fp8 kernels do, which is not always the bits of a division.

    Args:
        x: any shape, float dtype and strides.
        scale: one positive number; a tensor on x's device is read there, never by the host.
        dtype: `float8_e4m3fn`, or `float8_e4m3fnuz` with a scale already doubled for it.

    Returns:
        `dtype`, shape of x, contiguous.

    Raises:
        ShapeError: scale holds more than one number.
        SchemeError: dtype is neither.
    """
    if dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        raise SchemeError(f"dtype {dtype}", "no static fp8 format", "use float8_e4m3fn or float8_e4m3fnuz")
    scale = torch.as_tensor(scale, dtype=torch.float32).detach()
    if scale.numel() != 1:
        raise ShapeError(f"scale {list(scale.shape)}", "static fp8 has one scale per tensor", "pass a scalar")
    inverse = scale.reshape(()).reciprocal()
    limit = torch.finfo(dtype).max
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for source, target in pieces(x.detach().unsqueeze(-1), out.unsqueeze(-1)):
        target.copy_((source.to(torch.float32) * inverse).clamp_(-limit, limit))
    return out


def fn_to_fnuz(data: Tensor) -> Tensor:
    """The same bytes for gfx942: float8_e4m3fn -> float8_e4m3fnuz of *half* the values, exactly, so scales must double.

    -0 (0x80) becomes 0, since that byte is fnuz's NaN, and NaN (0x7F, 0xFF) becomes 0x80.
    """
    bits = data.contiguous().view(torch.uint8)
    bits = bits.masked_fill(bits == FNUZ_NAN, 0).masked_fill_(bits & 0x7F == 0x7F, FNUZ_NAN)
    return bits.view(torch.float8_e4m3fnuz)


def mx_fn_to_fnuz(data: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8 for gfx942: fnuz bytes of half the value under e8m0 scales of twice the value, so that products stay.

    The scale of 2^127 (254) has no double; its blocks keep it and are re-encoded, which fnuz does exactly up to 240 (it
    has every fn value below 256) and saturates beyond, where the product is no fp32 number anyway. 255 stays NaN.

    Args:
        data: float8_e4m3fn [..., K].
        scales: uint8 e8m0 [..., K/32].

    Returns:
        float8_e4m3fnuz [..., K] and uint8 [..., K/32], both contiguous.

    Raises:
        ShapeError: data and scales are not of one tensor.
    """
    n = scales.shape[-1]
    if data.shape != (*scales.shape[:-1], n * MX_BLOCK):
        raise ShapeError(
            f"e4m3 data {list(data.shape)} with scales {list(scales.shape)}",
            f"there must be one scale per {MX_BLOCK} elements",
            "take both from the same tensor",
        )
    out = torch.empty(*scales.shape, MX_BLOCK, dtype=torch.float8_e4m3fnuz, device=data.device)
    limit = torch.finfo(torch.float8_e4m3fnuz).max
    for source, b, target in pieces(data.unflatten(-1, (n, MX_BLOCK)), scales.unsqueeze(-1), out):
        kept = decode(source).clamp_(-limit, limit).to(torch.float8_e4m3fnuz)
        bits = torch.where(b == 254, kept.view(torch.uint8), fn_to_fnuz(source).view(torch.uint8))
        target.copy_(bits.view(torch.float8_e4m3fnuz))
    return out.flatten(-2), torch.where(scales < 254, scales + 1, scales)
