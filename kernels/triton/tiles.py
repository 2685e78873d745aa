"""What the Triton GEMMs share: which tile a program has, where weights lie, and how a launch is configured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def tile_of_program(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr, XCDS: tl.constexpr):
    """(tile along M, tile along N): neighbours on a die share weights, GROUP_M tiles along M at a time.

    Programs are dealt to the XCDs (dies, each with an L2 of its own) round robin; undo that, so that each XCD gets a
    run of consecutive tiles.
    """
    if XCDS > 1:
        tiles = tiles_m * tiles_n
        xcd = pid % XCDS
        pid = xcd * (tiles // XCDS) + tl.minimum(xcd, tiles % XCDS) + pid // XCDS
    group = GROUP_M * tiles_n
    first = pid // group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % group % height, pid % group // height


@triton.jit
def row_offsets(n, COLS, LAYOUT: tl.constexpr):
    """What row n adds to the place in storage of each of its columns; rows are padded to COLS of them.

    A column is a byte of values, or a scale. The closed forms of docs/layouts.md, which are
    sums of a part of the row's and a part of the column's. n is int64.
    """
    tile = n // 16 * 16 * COLS
    row = n.to(tl.int32)
    if LAYOUT == "strided":
        at = n * COLS
    elif LAYOUT == "mxfp8_lane":
        at = tile + row % 16 * 32
    elif LAYOUT == "mma_tile":
        at = tile + row % 16 // 8 * 512 + row % 8 * 64
    elif LAYOUT == "tile_scale":
        at = tile + row % 16 * 4
    elif LAYOUT == "mma_scale":
        at = tile + row % 8 * 4 + row % 16 // 8 * 2
    elif LAYOUT == "tile_group":
        at = tile + row % 16
    else:
        tl.static_assert(LAYOUT == "preshuffle" or LAYOUT == "cdna3_e2m1", "no such layout")
        at = tile + row % 16 * 16
    return at


@triton.jit
def column_offsets(c, LAYOUT: tl.constexpr):
    """What column c of a row adds. Divided first, then the remainder taken: so Triton sees which bytes lie
    together, and loads them so."""
    if LAYOUT == "preshuffle":
        at = c // 32 * 512 + c // 16 % 2 * 256 + c % 16
    elif LAYOUT == "mxfp8_lane":
        at = c // 128 * 2048 + c // 32 % 2 * 1024 + c // 16 % 2 * 512 + c // 64 % 2 * 16 + c % 16
    elif LAYOUT == "cdna3_e2m1":
        at = c // 64 * 1024 + c // 4 % 4 * 256 + c // 16 % 4 * 4 + c % 4
    elif LAYOUT == "mma_tile":
        at = c // 64 * 1024 + c // 8 % 4 * 16 + c // 32 % 2 * 8 + c % 8
    elif LAYOUT == "tile_scale":
        at = c // 4 * 64 + c % 4
    elif LAYOUT == "mma_scale":
        at = c // 2 * 32 + c % 2
    elif LAYOUT == "tile_group":
        at = c * 16
    else:
        at = c
    return at


STRIDED = ("strided", "strided")
PADS = {
    "strided": 1, "preshuffle": 32, "mxfp8_lane": 128, "cdna3_e2m1": 64, "cdna3_e4m3": 64, "mma_tile": 64,
    "tile_scale": 4, "mma_scale": 2, "cdna_int4": 16, "rdna_int4": 4, "tile_group": 1,
}  # fmt: skip
"""What layouts pad rows to: columns of values (of int4 words of eight), or of scales."""


def layout_constants(layout: tuple[str, str] = STRIDED) -> dict[str, object]:
    """The kernel's constexpr arguments for the names of the weights' layouts, of values and of scales."""
    values, scales = layout
    return {"VALUES": values, "SCALES": scales, "PAD": PADS[values], "SCALE_PAD": PADS[scales]}


@dataclass(frozen=True)
class TileConfig:
    """Tile and launch options; what is legal is `selection`'s to say.

    Attributes:
        block_m, block_n, block_k: the tile.
        num_warps, num_stages: of the launch.
        nonkdim: side of the matrix instruction on AMD, 16 or 32, or 0 for Triton's choice.
        group_m: tiles along M that are taken together, for the sake of L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2
    nonkdim: int = 0
    group_m: int = 4

    def tile_constants(self, arch: str) -> dict[str, object]:
        """The constexpr arguments that all kernels have for it."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "XCDS": 8 if arch in ("gfx942", "gfx950") else 1,
        }

    def grid(self, m: int, n: int, row_ids: torch.Tensor | None) -> tuple[int, tuple[int]]:
        """Tiles along M of y [m, n], which `row_ids` [tiles * block_m] says where it is grouped; and programs."""
        tiles_m = triton.cdiv(m, self.block_m) if row_ids is None else row_ids.numel() // self.block_m
        return tiles_m, (tiles_m * triton.cdiv(n, self.block_n),)

    def options(self, arch: str) -> dict[str, int]:
        """Triton's compile options on an arch."""
        amd = {"matrix_instr_nonkdim": self.nonkdim} if self.nonkdim and arch.startswith("gfx9") else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **amd}


def gemm_torch(
    left: torch.Tensor,
    right: torch.Tensor,
    bias: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    block_experts: torch.Tensor | None,
    row_weights: torch.Tensor | None,
) -> torch.Tensor:
    """The twin of a GEMM in plain torch once both sides are values, in their dtype: [M, K], and [N, K] or [E, N, K]."""
    dtype, device = left.dtype, left.device
    offset = torch.zeros(right.shape[:-1], dtype=dtype, device=device) if bias is None else bias.to(dtype)
    if row_ids is None or block_experts is None:
        y = left @ right.T + offset
    else:
        y = torch.zeros(left.shape[0], right.shape[-2], dtype=dtype, device=device)
        block = row_ids.numel() // block_experts.numel()
        for b, expert in enumerate(block_experts.tolist()):
            rows = row_ids[b * block : (b + 1) * block].long()
            rows = rows[rows < left.shape[0]]
            if expert >= 0:
                y[rows] = left[rows] @ right[expert].T + offset[expert]
    return y if row_weights is None else y * row_weights.to(dtype)[:, None]
