"""Quantize bf16 or fp16 along K to MXFP8 or MXFP4 in one pass, with an activation or RMSNorm in front.

Bit for bit what `sglang_amd_quant.formats.quantize_mx` gives. Besides codes and scales it can emit what kernels without
MX hardware multiply: the quantized values as bf16, or as e4m3 under one power of two a row (`hopper_moe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .overlap import begin_after_previous, overlap

# What is added to the bits of a block's largest magnitude for its exponent to step up where the scale mode wants it;
# by element and mode. `formats.mx.Element.carry` derives them.
CARRY = {
    "e2m1": {"floor": 0, "ceil": 0x7FFFFF, "rceil": 0x3FFFFF, "even": 0x200000},
    "e4m3": {"floor": 0, "ceil": 0x7FFFFF, "rceil": 0x1FFFFF, "even": 0x080000},
}
DEFAULT_MODE = {"e2m1": "even", "e4m3": "rceil"}
FRONTS = ("none", "silu", "swigluoai", "rmsnorm")


@triton.jit
def encode_e4m3(y, NATIVE: tl.constexpr):
    """fp32 -> e4m3 bytes: nearest, ties to even, saturating at 448, NaN kept. NATIVE: the hardware has a conversion.

    Without: |y| plus a power of two 2^20 above it has an ulp of just one code, as in `formats.e2m1.encode`.
    """
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if NATIVE:
        largest = tl.full(y.shape, 448.0, tl.float32)
        limited = tl.minimum(tl.maximum(y, -largest), largest)
        code = limited.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        clamped = tl.minimum(magnitude, 0x43E00000)  # 448
        shift = tl.maximum(clamped & 0x7F800000, 121 << 23) + (20 << 23)
        total = clamped.to(tl.float32, bitcast=True) + shift.to(tl.float32, bitcast=True)
        code = total.to(tl.uint32, bitcast=True) - shift + ((shift - (141 << 23)) >> 20)
        code = (code | (bits >> 24 & 0x80)).to(tl.uint8)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def encode_e2m1(y):
    """fp32 -> e2m1 codes: nearest, ties to even, saturating at 6, which NaN becomes too."""
    bits = y.to(tl.uint32, bitcast=True)
    clamped = tl.minimum(bits & 0x7FFFFFFF, 0x40C00000)
    shift = tl.maximum(clamped & 0x7F800000, 127 << 23) + (22 << 23)
    total = clamped.to(tl.float32, bitcast=True) + shift.to(tl.float32, bitcast=True)
    code = total.to(tl.uint32, bitcast=True) - shift + ((shift - (149 << 23)) >> 22)
    return (code | (bits >> 28 & 8)).to(tl.uint8)


@triton.jit
def scale_byte(largest, CARRY: tl.constexpr, EMAX: tl.constexpr):
    """Bits of the largest magnitude -> e8m0 byte; 255 for NaN."""
    byte = tl.maximum(((largest + CARRY) >> 23).to(tl.int32) - EMAX, 0)
    return tl.where(largest > 0x7F800000, 255, byte)


@triton.jit
def power_of_two(byte):
    """2^(byte - 127) as fp32; 0 is a subnormal, 255 NaN."""
    bits = tl.maximum(byte << 23, 1 << 22)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def largest_bits(values, axis: tl.constexpr):
    """Bits of the largest magnitude along an axis; a NaN's are larger than any number's."""
    return tl.max((values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis).to(tl.uint32)


@triton.jit
def rounded_to(values, scale, ELEMENT: tl.constexpr, NATIVE: tl.constexpr):
    """Values after a round trip through `ELEMENT` under `scale`, the byte of their block."""
    small = values * power_of_two((254 - scale) & 0xFF)
    if ELEMENT == "e4m3":
        code = encode_e4m3(small, NATIVE).to(tl.uint32)
        # Where fp16 keeps sign, exponent and mantissa these bits are 2^-8 times the value.
        half = ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.uint16).to(tl.float16, bitcast=True)
        kept = tl.where(code & 0x7F == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        code = encode_e2m1(small).to(tl.uint32)
        half = ((code & 8) << 12 | (code & 7) << 9).to(tl.uint16).to(tl.float16, bitcast=True)
        kept = half.to(tl.float32) * 16384.0
    return kept * power_of_two(scale)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr, alpha, limit, beta):
    """silu(gate) up, or gpt-oss's swiglu, in fp32; `limit` clamps gate from above and up from both sides."""
    if CLAMP:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "swigluoai":
        return gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["M"])
def quant_mx_kernel(
    x, norm, data, scales, row_factors, M, K, alpha, limit, beta, epsilon,
    FRONT: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr, ELEMENT: tl.constexpr, OUT: tl.constexpr,
    CARRY: tl.constexpr, EMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr,
    HALF: tl.constexpr, OVERLAP: tl.constexpr = False, BESIDE: tl.constexpr = False,
):  # fmt: skip
    """BLOCK_M rows, BLOCK_K columns; see `quant_mx`. OUT: `mx`, `bf16` or `row`; ELEMENT `none`: no MX round trip.
    HALF: what comes out of a front is rounded to fp16, else to bf16."""
    MODEL: tl.constexpr = tl.float16 if HALF else tl.bfloat16
    begin_after_previous(OVERLAP and not BESIDE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if FRONT == "silu" or FRONT == "swigluoai":
        if INTERLEAVED:
            both = tl.program_id(1) * BLOCK_K * 2 + tl.arange(0, 2 * BLOCK_K)
            mask = (rows < M)[:, None] & (both < 2 * K)[None, :]
            pairs = tl.load(x + wide * (2 * K) + both[None, :], mask=mask, other=0.0)
            gate, up = tl.split(pairs.reshape(BLOCK_M, BLOCK_K, 2))
        else:
            gate = tl.load(x + wide * (2 * K) + columns[None, :], mask=inside, other=0.0)
            up = tl.load(x + wide * (2 * K) + K + columns[None, :], mask=inside, other=0.0)
        values = activate(gate.to(tl.float32), up.to(tl.float32), FRONT, CLAMP, alpha, limit, beta)
        values = values.to(MODEL).to(tl.float32)
    else:
        values = tl.load(x + wide * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if FRONT == "rmsnorm":
            inverse = tl.rsqrt(tl.sum(values * values, 1) / K + epsilon)
            weight = tl.load(norm + columns, mask=columns < K, other=0.0).to(tl.float32)
            values = (values * inverse[:, None] * weight[None, :]).to(MODEL).to(tl.float32)
    if ELEMENT != "none":
        blocks = values.reshape(BLOCK_M, BLOCK_K // 32, 32)
        scale = scale_byte(largest_bits(blocks, 2), CARRY, EMAX)
        if OUT == "mx":
            places = wide * (K // 32) + (tl.program_id(1) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32))[None, :]
            whole = (rows < M)[:, None]
            whole &= (tl.program_id(1) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32) < K // 32)[None, :]
            tl.store(scales + places, scale.to(tl.uint8), mask=whole)
            small = (blocks * power_of_two((254 - scale) & 0xFF)[:, :, None]).reshape(BLOCK_M, BLOCK_K)
            if ELEMENT == "e4m3":
                tl.store(data + wide * K + columns[None, :], encode_e4m3(small, NATIVE), mask=inside)
            else:
                low, high = tl.split(encode_e2m1(small).reshape(BLOCK_M, BLOCK_K // 2, 2))
                half = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
                mask = (rows < M)[:, None] & (half < K // 2)[None, :]
                tl.store(data + wide * (K // 2) + half[None, :], low | high << 4, mask=mask)
        else:
            values = rounded_to(blocks, scale[:, :, None], ELEMENT, NATIVE).reshape(BLOCK_M, BLOCK_K)
    if OUT == "bf16":
        tl.store(data + wide * K + columns[None, :], values.to(data.dtype.element_ty), mask=inside)
    if OUT == "row":
        scale = scale_byte(largest_bits(values, 1), 0x1FFFFF, 8)
        tl.store(row_factors + rows, power_of_two(scale), mask=rows < M)
        code = encode_e4m3(values * power_of_two((254 - scale) & 0xFF)[:, None], NATIVE)
        tl.store(data + wide * K + columns[None, :], code, mask=inside)
    begin_after_previous(OVERLAP and BESIDE)


@dataclass(frozen=True)
class Front:
    """What happens before quantizing.

    Attributes:
        kind: `none`, `silu`, `swigluoai` (both halve the columns) or `rmsnorm`.
        interleaved: gate and up columns alternate; else all gates come first.
        limit, alpha, beta: as `ops.activation.Activation` has them.
        weight, epsilon: of RMSNorm.
    """

    kind: str = "none"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.702
    beta: float = 1.0
    weight: torch.Tensor | None = None
    epsilon: float = 1e-6

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The twin in plain torch: x[M, K or 2 K] -> [M, K] in x's dtype, computed in fp32, or fp64 for fp64."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "none":
            return x
        if self.kind == "rmsnorm":
            assert self.weight is not None
            inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            return (wide * inverse * self.weight.to(wide.dtype)).to(x.dtype)
        gate, up = (wide[:, 0::2], wide[:, 1::2]) if self.interleaved else wide.chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.kind == "swigluoai":
            return (gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)).to(x.dtype)
        return (gate * torch.sigmoid(gate) * up).to(x.dtype)


NO_FRONT = Front()


def quant_mx(
    x: torch.Tensor, element: str | None, out: str = "mx", mode: str | None = None, front: Front = NO_FRONT,
    native: bool = False, dtype: torch.dtype | None = None, beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Quantize rows of x. No host read of device data.

    Args:
        x: [M, K] bf16 or fp16, [M, 2 K] for an activation in front, of a GEMM's sums fp32; contiguous; K a multiple of
            32. fp16 is not rounded to bf16 first.
        element: `e4m3` or `e2m1`; None with `out` `bf16` or `row`: no MX round trip.
        out: `mx`: codes and e8m0 scales. `bf16`: the values that these stand for. `row`: the values as e4m3 under one
            power of two a row, RCEIL; those below 2^-14 of the row's largest lose bits, at most 2^-17 of it.
        mode: scale rounding, `floor`, `rceil`, `ceil`, `even`; None: `even` for e2m1, `rceil` for e4m3.
        front: what happens before.
        native: the device converts fp32 to e4m3 (gfx950, sm_90).
        dtype: bf16 or fp16, which the result of a front is rounded to; None: x's.
        beside: at the same time as the launch right in front where launches overlap (`overlap.py`): that one wrote
            neither x nor anything whose memory may be free again by now.

    Returns:
        data and scales: e4m3 [M, K] or uint8 [M, K/2], and uint8 [M, K/32] (`mx`); bf16 [M, K] and None; e4m3 [M, K]
        and fp32 [M] (`row`).

    Raises:
        ValueError: what it does not take, of all of the above.
    """
    gated = front.kind in ("silu", "swigluoai")
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    model = dtype or x.dtype
    lossy = model != torch.bfloat16 and (out, element) == ("bf16", None)
    read = model == x.dtype or (gated and x.dtype == torch.float32)
    known = read and model in (torch.bfloat16, torch.float16) and front.kind in FRONTS and not lossy
    if k % 32 or not known or (out == "mx" and element is None):
        raise ValueError(
            f"quantizing {x.dtype} {list(x.shape)} to {element}, {out}, after {front.kind}: takes bf16 and fp16 (fp32 "
            f"before an activation), whole blocks of 32, a format for mx and for fp16 as bf16, and {', '.join(FRONTS)} "
            "in front; use formats.quantize_mx"
        )
    device = x.device
    shape = (m, k // 2) if (out, element) == ("mx", "e2m1") else (m, k)
    data = torch.empty(shape, dtype=torch.bfloat16 if out == "bf16" else torch.uint8, device=device)
    scales = torch.empty(m, k // 32, dtype=torch.uint8, device=device) if out == "mx" else None
    factors = torch.empty(m, dtype=torch.float32, device=device) if out == "row" else None
    if m:
        block_m, block_k, warps = tile(k, out == "row" or front.kind == "rmsnorm")
        constants = constants_of(element, out, mode, front, block_m, block_k, native)
        quant_mx_kernel[(triton.cdiv(m, block_m), triton.cdiv(k, block_k))](
            x, front.weight, data, scales, factors, m, k, front.alpha, front.limit or 0.0, front.beta, front.epsilon,
            HALF=model == torch.float16, BESIDE=beside, **constants, num_warps=warps, **overlap(x),
        )  # fmt: skip
    if out != "bf16" and shape == (m, k):
        data = data.view(torch.float8_e4m3fn)
    return data, factors if out == "row" else scales


def tile(k: int, whole_row: bool) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_K, num_warps): 32 elements a thread, whole rows where a row has something in common."""
    if whole_row:
        block = triton.next_power_of_2(k)
        return max(1, 2048 // block), block, max(2, min(16, block // 1024))
    if k % 512 and k > 1024:  # measured: 91 % of copy bandwidth instead of 85 at K 2880
        return 2, 1024, 4
    block = min(triton.next_power_of_2(k), 512)
    return 4096 // block, block, 4


def constants_of(
    element: str | None, out: str, mode: str | None, front: Front, block_m: int, block_k: int, native: bool
) -> dict[str, object]:
    """The kernel's constexpr arguments."""
    return {
        "FRONT": front.kind,
        "INTERLEAVED": front.interleaved,
        "CLAMP": front.limit is not None,
        "ELEMENT": element or "none",
        "OUT": out,
        "CARRY": CARRY[element][mode or DEFAULT_MODE[element]] if element else 0,
        "EMAX": 2 if element == "e2m1" else 8,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "NATIVE": native,
    }


def quant_mx_torch(
    x: torch.Tensor, element: str | None, out: str = "mx", mode: str | None = None, front: Front = NO_FRONT,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The twin of `quant_mx` in plain torch, with the same result bit for bit where `front` gives the same."""
    values = front(x).to(dtype or x.dtype)
    data: torch.Tensor = values
    scales = None
    if element:
        data, scales = _quantize(values.float(), element, CARRY[element][mode or DEFAULT_MODE[element]])
        if out == "mx":
            return data, scales
        values = _dequantize(data, scales, element)
    if out == "bf16":
        return values.to(torch.bfloat16), None
    return _quantize_rows(values.float())


def _power(byte: torch.Tensor) -> torch.Tensor:
    return torch.exp2(byte.double() - 127).masked_fill(byte == 255, torch.nan)


def _bytes(largest: torch.Tensor, carry: int, emax: int) -> torch.Tensor:
    byte = ((largest.contiguous().view(torch.int32) + carry >> 23) - emax).clamp(min=0)
    return byte.masked_fill(largest.isnan(), 255)


def _quantize(values: torch.Tensor, element: str, carry: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = values.unflatten(-1, (-1, 32))
    byte = _bytes(blocks.abs().amax(-1, keepdim=True), carry, 2 if element == "e2m1" else 8)
    small = (blocks.double() / _power(byte)).flatten(-2)
    if element == "e4m3":
        return small.clamp(-448, 448).float().to(torch.float8_e4m3fn), byte.squeeze(-1).to(torch.uint8)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64, device=values.device)
    code = torch.bucketize(small.abs(), middles) + (small.abs()[..., None] == middles[1::2]).any(-1)
    code = torch.where(small.isnan(), 7, code) | small.signbit().long() << 3
    pairs = code.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, byte.squeeze(-1).to(torch.uint8)


def _dequantize(data: torch.Tensor, scales: torch.Tensor, element: str) -> torch.Tensor:
    if element == "e2m1":
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=data.device)
        table = torch.cat([table, -table])
        wide = torch.stack([table[(data & 15).long()], table[(data >> 4).long()]], -1).flatten(-2)
    else:
        wide = data.double()
    return (wide.unflatten(-1, (-1, 32)) * _power(scales)[..., None]).flatten(-2)


def _quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    byte = _bytes(values.abs().amax(-1), 0x1FFFFF, 8)
    small = (values.double() / _power(byte)[:, None]).clamp(-448, 448).float()
    return small.to(torch.float8_e4m3fn), _power(byte).float()
