"""Weights in the order in which `hopper_moe.py` multiplies them, made once after loading.

Rows go in groups of 16, K in tiles of 64, padded with zeros. A thread of a warp, lane = 4 g + t, holds rows g and
g + 8 of its group; wgmma wants, of every 32 bytes along K, bytes 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3 from it.
Packed so that a thread's share of a tile is 16 bytes (twice for e4m3) and a warp's is contiguous:

    e4m3:         [E, N/16, K/64, block, g, t, h, r, e]  byte of row 8 r + g, k = 32 block + 16 h + 4 t + e
    e2m1 x e4m3:  [E, N/16, K/64, g, t, h, r] words      eight codes, of k = 16 t + 8 s + 4 h + e
      its scales: [E, N/16, K/64, g, block]              bytes: four bits of row g, four of row g + 8
    e2m1 x bf16:  [E, N/16, K/64, g, t, h, r] words      eight codes, of k = 32 block + 16 s + 8 h + 2 t + e
      its scales: [E, N/16, K/64, g, r, block]           bytes

Bits of a word are where two or three instructions take them from; see `_word_e4m3` and `_word_bf16`.

Which k wgmma multiplies at a place does not matter as long as x has it there too. Of e2m1 x e4m3 all that a thread has
of a row's tile is of one block, so that one table gives it; x comes in `x_order`.

Scales become relative to the row's largest, which `factors` keeps: a kernel multiplies its sum by it at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OCTAVES = 12
"""Scales of one row that differ by less than this leave e2m1 x e4m3 exact."""


@dataclass(frozen=True)
class HopperWeights:
    """Packed weights of one GEMM.

    Attributes:
        data: uint16 or uint8, see above.
        scales: int32 [E, N/16, K/64, 8], or, four bits a block, [E, N/16, K/64, 4], see above; None for e4m3. Of int4
            words, as `tile_group` has them.
        factors: fp32 [E, N/16 * 16], power of two of each row; NaN where a scale was NaN. None for int4.
        w_format: `e2m1`, `e4m3` or `int4`.
        x_format: `bf16`, `e4m3` or, of int4, `fp16`: what it can be multiplied with.
        n, k: logical shape.
        pairs: None, or `halves` or `interleaved`: which rows were gate and up before packing.
        experts: E; 1 for dense.
        group: elements of a row that share a scale.
        rounded: how many blocks (e2m1) or elements (e4m3) one factor a row could not hold exactly, int64 scalar; None
            where nobody counted.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    factors: torch.Tensor | None
    w_format: str
    x_format: str
    n: int
    k: int
    pairs: str | None
    experts: int
    group: int = 32
    rounded: torch.Tensor | None = None

    @property
    def orders_x(self) -> bool:
        """Whether it is multiplied with rows of x in `x_order`."""
        return self.w_format == "e2m1" and self.x_format == "e4m3"


def pack_hopper(
    w: torch.Tensor, scales: torch.Tensor, x_format: str = "bf16", pairs: str | None = None
) -> HopperWeights:
    """Pack weights for `hopper_moe_kernel`.

    Error: with e2m1 x bf16 none. With e2m1 x e4m3, in blocks whose scale is under the row's largest by 2^-12 or more,
    of which there are `rounded`, an element moves by at most 2^-13 of the row's largest scale. With e4m3, an element
    moves by at most 2^-10 of it, and only those below 2^-6 of it.

    Args:
        w: [E, N, K/2] uint8 (e2m1) or [E, N, K] float8_e4m3fn.
        scales: [E, N, K/32] uint8 e8m0.
        x_format: `bf16` or `e4m3`; e4m3 weights go with e4m3 only.
        pairs: how gate and up rows alternate where the GEMM has an activation behind it: `halves` or `interleaved`.
    """
    experts, n, blocks = scales.shape
    k = blocks * 32
    groups, tiles = -(-n // 16), -(-k // 64)
    w_format = "e4m3" if w.dtype == torch.float8_e4m3fn else "e2m1"
    if w_format == "e4m3" and x_format != "e4m3":
        raise ValueError(f"e4m3 weights with {x_format} activations: no such kernel; use x_format='e4m3'")
    if pairs and n % 16:
        raise ValueError(f"gate and up with N {n}: pairs go in groups of 16 rows; pad the intermediate size to 8")
    device = w.device
    order = row_order(n, pairs).to(device)
    wide = x_format == "bf16"
    parts = 2 if w_format == "e4m3" else 1
    words = torch.empty(experts, groups, tiles, parts, 8, 4, 2, 2, 4, dtype=torch.uint8, device=device)
    packed_scales = None
    if w_format == "e2m1":
        packed_scales = torch.empty(experts, groups, tiles, 32 if wide else 16, dtype=torch.uint8, device=device)
    factors = torch.empty(experts, groups * 16, dtype=torch.float32, device=device)
    rounded = torch.zeros((), dtype=torch.int64, device=device)
    for expert in range(experts):  # one at a time: temporaries are 8 times an expert's weights
        rows, s = w[expert].view(torch.uint8)[order], scales[expert][order].int()
        codes = rows if w_format == "e4m3" else torch.stack([rows & 15, rows >> 4], -1).flatten(-2)
        codes = torch.nn.functional.pad(codes, (0, tiles * 64 - k, 0, groups * 16 - n))
        s = torch.nn.functional.pad(s, (0, tiles * 2 - blocks, 0, groups * 16 - n))
        codes = codes.view(groups * 16, tiles * 2, 32)
        used = (codes & (0x7F if w_format == "e4m3" else 7)).ne(0).any(-1)
        largest = torch.where(used, s, 0).amax(-1, keepdim=True)
        below = torch.where(used, s - largest, 0)
        if w_format == "e4m3":
            codes, moved = _shift_e4m3(codes, below)
            step, shift = below, 0
            rounded += moved.sum()
        elif wide:
            step, shift = (253 + below).clamp_(min=1), 0
        else:
            step, shift = below + OCTAVES - 1, -6
            rounded += (step < 0).sum()
            codes = torch.where((step < 0)[..., None], _shift_e2m1(codes, step), codes)
            step = step.clamp_(min=0)
        factor = torch.exp2(largest[:, 0].double() - 127 + shift).float()
        factors[expert] = factor.masked_fill((largest[:, 0] == 255) | (s == 255).any(-1), torch.nan)
        if packed_scales is not None:
            packed_scales[expert] = _scales(step.view(groups, 2, 8, tiles, 2), wide)
        words[expert] = _words(codes.view(groups, 2, 8, tiles, 2, 32), w_format, wide)
    data = words.flatten()
    return HopperWeights(
        data.view(torch.uint16) if wide else data,
        None if packed_scales is None else packed_scales.view(torch.int32),
        factors, w_format, x_format, n, k, pairs, experts, rounded=rounded,
    )  # fmt: skip


def row_order(n: int, pairs: str | None) -> torch.Tensor:
    """Row of the unpacked weights at each place: with `pairs`, 8 gates and then their 8 ups in each group of 16."""
    if pairs is None:
        return torch.arange(n)
    out = torch.arange(n // 2).view(-1, 1, 8)
    second = torch.tensor([0, 1]).view(1, 2, 1)
    return (out * 2 + second if pairs == "interleaved" else out + second * (n // 2)).flatten()


def x_columns(k: int) -> int:
    """Of rows of x in `x_order`: K rounded up to 64."""
    return -(-k // 64) * 64


def x_order(k: int) -> torch.Tensor:
    """Which element of a row of x is at each place, for weights that want it (`HopperWeights.orders_x`): of
    `x_columns`, those from K on are zeros. Of every 64, place 16 (2 s + h) + 4 t + e has k = 16 t + 8 s + 4 h + e."""
    return torch.arange(x_columns(k)).view(-1, 4, 4, 4).transpose(1, 2).flatten()


def in_x_order(rows: torch.Tensor) -> torch.Tensor:
    """Rows of x, e4m3 [M, K], in `x_order`: [M, `x_columns`]; such rows in the order of K again. No host read of
    device data."""
    padded = torch.nn.functional.pad(rows.view(torch.uint8), (0, x_columns(rows.shape[1]) - rows.shape[1]))
    words = padded.view(torch.int32).unflatten(1, (-1, 4, 4)).transpose(2, 3)
    return words.flatten(1).view(rows.dtype)


def _scales(step: torch.Tensor, wide: bool) -> torch.Tensor:
    """[groups, r, g, tiles, block] -> [groups, tiles, bytes]."""
    groups, _, _, tiles, _ = step.shape
    if wide:
        return step.permute(0, 3, 2, 1, 4).reshape(groups, tiles, 32).to(torch.uint8)
    return (step[:, 0] | step[:, 1] << 4).permute(0, 2, 1, 3).reshape(groups, tiles, 16).to(torch.uint8)


def _words(codes: torch.Tensor, w_format: str, wide: bool) -> torch.Tensor:
    """[groups, r, g, tiles, block, 32] codes -> [groups, tiles, 1 or 2, g, t, h, r, 4] bytes."""
    groups, _, _, tiles = codes.shape[:4]
    if w_format == "e4m3":
        return codes.view(groups, 2, 8, tiles, 2, 2, 4, 4).permute(0, 3, 4, 2, 6, 5, 1, 7)
    if wide:  # block and 32 = s, h, t, e
        parts = codes.view(groups, 2, 8, tiles, 4, 2, 4, 2).permute(0, 3, 2, 6, 5, 1, 4, 7)
        return _word_bf16(parts.int())[:, :, None]
    parts = codes.view(groups, 2, 8, tiles, 4, 2, 2, 4).permute(0, 3, 2, 4, 6, 1, 5, 7)
    return _word_e4m3(parts.int())[:, :, None]


def _word_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """[..., s, e] codes -> [..., 4] bytes.

    The three magnitude bits are the selectors of two byte permutes, four to each; a selector's fourth bit is free, and
    signs lie so that those of the first four already are the top bits of four bytes.
    """
    place = 4 * torch.arange(4, dtype=torch.int32, device=codes.device)
    magnitude, sign = codes & 7, codes >> 3
    low = (magnitude[..., 0, :] << place) | (sign[..., 0, :] << (2 * place + 7))
    high = (magnitude[..., 1, :] << (place + 16)) | (sign[..., 1, :] << (2 * place + 3))
    return _sum_bits(low | high)


def _word_bf16(codes: torch.Tensor) -> torch.Tensor:
    """[..., step, e] codes -> [..., 4] bytes: e is the half of the word, each with one code of four steps of 16.

    A bf16 wants the sign in bit 15 and the magnitude in bits 8..6. Step 0 lies there; step 2 is 6 bits lower; of 1 and
    3 the sign moves by another distance than the magnitude.
    """
    magnitude_at = torch.tensor([6, 3, 0, 10], dtype=torch.int32, device=codes.device)[:, None]
    sign_at = torch.tensor([15, 13, 9, 14], dtype=torch.int32, device=codes.device)[:, None]
    half = ((codes & 7) << magnitude_at | (codes >> 3) << sign_at).sum(-2)
    return _sum_bits(half.int() << torch.tensor([0, 16], dtype=torch.int32, device=codes.device))


def _sum_bits(parts: torch.Tensor) -> torch.Tensor:
    """[..., e] int32 whose bits are disjoint -> [..., 4] bytes of their union."""
    return parts.sum(-1, dtype=torch.int32)[..., None].view(torch.uint8)


def _shift_e2m1(codes: torch.Tensor, octaves: torch.Tensor) -> torch.Tensor:
    """Codes times 2^octaves (negative), to nearest, ties to even code; [R, B, 32] and [R, B]."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)[(codes & 7).long()]
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=codes.device)
    scaled = values * torch.exp2(octaves.clamp(max=0).float())[..., None]
    nearest = torch.bucketize(scaled, middles)
    even_above = (scaled[..., None] == middles[1::2]).any(-1)
    return ((nearest + even_above).to(torch.uint8)) | (codes & 8)


def _shift_e4m3(codes: torch.Tensor, octaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 bytes times 2^octaves (<= 0), to nearest even, and which of them that changed; [R, B, 32] and [R, B]."""
    values = codes.view(torch.float8_e4m3fn).float()
    scaled = values * torch.exp2(octaves.float())[..., None]
    result = scaled.to(torch.float8_e4m3fn)
    return result.view(torch.uint8), result.float() != scaled
