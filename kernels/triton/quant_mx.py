"""Quantize bf16 or fp16 along K to MXFP8 or MXFP4 in one pass, with an activation or RMSNorm in front.

Bit for bit what `sglang_amd_quant.formats.quantize_mx` gives. Besides codes and scales it can emit what kernels without
MX hardware multiply: the quantized values as bf16, or as e4m3 under one power of two a row (`hopper_moe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .hopper_pack import in_x_order, x_columns
from .mx_codes import largest_bits, over_scale, power_of_two, rounded_to, scale_byte, store_codes, store_ordered
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
def activate(gate, up, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr, alpha, limit, beta):
    """silu(gate) up, or gpt-oss's swiglu, in fp32; `limit` clamps gate from above and up from both sides."""
    if CLAMP:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "swigluoai":
        return gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def to_model(values, HALF: tl.constexpr, ARCH: tl.constexpr):
    """fp32 rounded to the model's dtype: fp16 (HALF) or bf16."""
    if HALF:
        rounded = values.to(tl.float16)
    elif ARCH == "sm_90":  # two an instruction, where Triton takes one
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = values.to(tl.bfloat16)
    return rounded


@triton.jit
def values_at(x, wide, first, inside_m, K, alpha, limit, beta, FRONT: tl.constexpr, INTERLEAVED: tl.constexpr,
              CLAMP: tl.constexpr, HALF: tl.constexpr, ARCH: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_K: tl.constexpr):  # fmt: skip
    """BLOCK_K columns from `first` on of rows `wide`, behind an activation if there is one, in the model's dtype."""
    columns = first + tl.arange(0, BLOCK_K)
    inside = inside_m & (columns < K)[None, :]
    if FRONT == "silu" or FRONT == "swigluoai":
        if INTERLEAVED:
            both = 2 * first + tl.arange(0, 2 * BLOCK_K)
            pairs = tl.load(x + wide * (2 * K) + both[None, :], mask=inside_m & (both < 2 * K)[None, :], other=0.0)
            gate, up = tl.split(pairs.reshape(BLOCK_M, BLOCK_K, 2))
        else:
            gate = tl.load(x + wide * (2 * K) + columns[None, :], mask=inside, other=0.0)
            up = tl.load(x + wide * (2 * K) + K + columns[None, :], mask=inside, other=0.0)
        values = activate(gate.to(tl.float32), up.to(tl.float32), FRONT, CLAMP, alpha, limit, beta)
        values = to_model(values, HALF, ARCH)
    else:
        values = tl.load(x + wide * K + columns[None, :], mask=inside, other=0.0)
    return values


@triton.jit(do_not_specialize=["M"])
def quant_mx_kernel(
    x, norm, data, scales, row_factors, M, K, alpha, limit, beta, epsilon,
    FRONT: tl.constexpr, INTERLEAVED: tl.constexpr, CLAMP: tl.constexpr, ELEMENT: tl.constexpr, OUT: tl.constexpr,
    CARRY: tl.constexpr, EMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    ARCH: tl.constexpr, HALF: tl.constexpr, ORDERED: tl.constexpr = False, OVERLAP: tl.constexpr = False,
    BESIDE: tl.constexpr = False,
):  # fmt: skip
    """BLOCK_M rows, CHUNKS times BLOCK_K columns; see `quant_mx`. OUT: `mx`, `bf16` or `row`; ELEMENT `none`: no MX
    round trip. HALF: what comes out of a front is rounded to fp16, else to bf16. ORDERED: see `store_ordered`."""
    begin_after_previous(OVERLAP and not BESIDE)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = (rows < M)[:, None]
    wide = rows.to(tl.int64)[:, None]
    first = tl.program_id(1) * CHUNKS * BLOCK_K
    chunks = ()
    for i in tl.static_range(CHUNKS):  # all of a row, before anything that a row has in common
        chunks = chunks + (values_at(x, wide, first + i * BLOCK_K, inside_m, K, alpha, limit, beta, FRONT, INTERLEAVED,
                                     CLAMP, HALF, ARCH, BLOCK_M, BLOCK_K),)  # fmt: skip
    if FRONT == "rmsnorm":
        squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(CHUNKS):
            squares += chunks[i].to(tl.float32) * chunks[i].to(tl.float32)
        inverse = tl.rsqrt(tl.sum(squares, 1) / K + epsilon)[:, None]
        normed = ()
        for i in tl.static_range(CHUNKS):
            columns = first + i * BLOCK_K + tl.arange(0, BLOCK_K)
            weight = tl.load(norm + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
            normed = normed + (to_model(chunks[i].to(tl.float32) * inverse * weight, HALF, ARCH),)
        chunks = normed
    kept = ()
    for i in tl.static_range(CHUNKS):
        columns = first + i * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = inside_m & (columns < K)[None, :]
        values = chunks[i]
        if ELEMENT != "none":
            of_block = largest_bits(values.reshape(BLOCK_M, BLOCK_K // 32, 32), 2)
            scale = scale_byte(of_block, CARRY, EMAX)
            small = values.to(tl.float32).reshape(BLOCK_M, BLOCK_K // 32, 32)
            small *= over_scale(of_block, CARRY, EMAX)[:, :, None]
            if OUT == "mx":
                groups = first // 32 + i * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
                whole = inside_m & (groups < K // 32)[None, :]
                tl.store(scales + wide * (K // 32) + groups[None, :], scale.to(tl.uint8), mask=whole)
                store_codes(data, wide, first + i * BLOCK_K, K, inside_m, small.reshape(BLOCK_M, BLOCK_K), ELEMENT,
                            BLOCK_M, BLOCK_K, ARCH)  # fmt: skip
            else:
                values = rounded_to(small, scale[:, :, None], ELEMENT, ARCH).reshape(BLOCK_M, BLOCK_K)
        if OUT == "bf16":
            tl.store(data + wide * K + columns[None, :], values.to(data.dtype.element_ty), mask=inside)
        kept = kept + (values,)
    if OUT == "row":
        largest = tl.zeros((BLOCK_M,), tl.uint32)
        for i in tl.static_range(CHUNKS):
            largest = tl.maximum(largest, largest_bits(kept[i], 1))
        scale = scale_byte(largest, 0x1FFFFF, 8)
        tl.store(row_factors + rows, power_of_two(scale), mask=rows < M)
        inverse = over_scale(largest, 0x1FFFFF, 8)[:, None]
        for i in tl.static_range(CHUNKS):
            small = kept[i].to(tl.float32) * inverse
            if ORDERED:
                store_ordered(data, wide, first + i * BLOCK_K, K, inside_m, small, BLOCK_M, BLOCK_K, ARCH)
            else:
                store_codes(data, wide, first + i * BLOCK_K, K, inside_m, small, "e4m3", BLOCK_M, BLOCK_K, ARCH)
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
    arch: str = "", dtype: torch.dtype | None = None, beside: bool = False, ordered: bool = False,
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
        arch: whose conversions there are (`mx_codes.py`): `sm_90` or `gfx950`; others are all the same.
        dtype: bf16 or fp16, which the result of a front is rounded to; None: x's.
        beside: at the same time as the launch right in front where launches overlap (`overlap.py`): that one wrote
            neither x nor anything whose memory may be free again by now.
        ordered: with `row`: codes in `hopper_pack.x_order`, K of them rounded up to 64 with zeros.

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
    if k % 32 or not known or (out == "mx" and element is None) or (ordered and out != "row"):
        raise ValueError(
            f"quantizing {x.dtype} {list(x.shape)} to {element}, {out}, after {front.kind}: takes bf16 and fp16 (fp32 "
            f"before an activation), whole blocks of 32, a format for mx and for fp16 as bf16, order for row, and "
            f"{', '.join(FRONTS)} in front; use formats.quantize_mx"
        )
    device = x.device
    width = x_columns(k) if ordered else k
    shape = (m, k // 2) if (out, element) == ("mx", "e2m1") else (m, width)
    data = torch.empty(shape, dtype=torch.bfloat16 if out == "bf16" else torch.uint8, device=device)
    scales = torch.empty(m, k // 32, dtype=torch.uint8, device=device) if out == "mx" else None
    factors = torch.empty(m, dtype=torch.float32, device=device) if out == "row" else None
    if m:
        tile = tile_for(m, width, out == "row" or front.kind == "rmsnorm", gated)
        grid = (triton.cdiv(m, tile.block_m), triton.cdiv(width, tile.chunks * tile.block_k))
        quant_mx_kernel[grid](
            x, front.weight, data, scales, factors, m, k, front.alpha, front.limit or 0.0, front.beta, front.epsilon,
            HALF=model == torch.float16, ORDERED=ordered, BESIDE=beside,
            **constants_of(element, out, mode, front, tile, arch), num_warps=tile.num_warps, **overlap(x),
        )  # fmt: skip
    if out != "bf16" and shape == (m, width):
        data = data.view(torch.float8_e4m3fn)
    return data, factors if out == "row" else scales


class Tile(NamedTuple):
    """What a program takes: block_m rows of `chunks` times block_k columns."""

    block_m: int
    block_k: int
    chunks: int
    num_warps: int


MANY = 512
"""Rows from which on there are enough of them to fill a GPU with a warp or two each."""


def tile_for(m: int, k: int, whole_row: bool, gated: bool) -> Tile:
    """16 bytes a thread at once; whole rows where a row has something in common."""
    room = triton.next_power_of_2(k)
    if whole_row and m >= MANY and k > 256 and not gated:  # of gate and up it lost a third where K is a power of two
        warps = max(1, min(4, room // 2048))  # of a row
        return Tile(4 // warps, 256 * warps, triton.cdiv(k, 256 * warps), 4)
    if whole_row:
        warps = max(2, min(16, room // 1024))
        block = min(room, 256 * warps)
        return Tile(max(1, 2048 // room), block, triton.cdiv(k, block), warps)
    block = min(512, max(64, k & -k))  # what divides K leaves no thread idle
    return Tile(4096 // block, block, 1, 4)


def constants_of(
    element: str | None, out: str, mode: str | None, front: Front, tile: Tile, arch: str
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
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "CHUNKS": tile.chunks,
        "ARCH": arch if arch in ("sm_90", "gfx950") else "",
    }


def quant_mx_torch(
    x: torch.Tensor, element: str | None, out: str = "mx", mode: str | None = None, front: Front = NO_FRONT,
    dtype: torch.dtype | None = None, ordered: bool = False,
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
    codes, factors = _quantize_rows(values.float())
    return in_x_order(codes) if ordered else codes, factors


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
