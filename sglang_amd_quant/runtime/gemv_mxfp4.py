"""How `kernels/hip/gemv_mxfp4.hip` is launched: the split of a problem over waves, LDS and the grid.

The tile sizes repeat those of `MxDot` in `kernels/hip/include/mx_dot.h`; tests/kernels/test_gemv_mxfp4.py holds the two
together by running every arch's plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import MX_BLOCK

MAX_M = 4


@dataclass(frozen=True)
class GemvPlan:
    """A launch of the GEMV, but for its pointers.

    Attributes:
        kernel_m: activation rows the kernel is instantiated for (1, 2 or 4; M = 3 runs as 4).
        slab: MX blocks of activations held in LDS at a time.
        waves_k: waves of a block that share a row along K.
        waves_n: waves of a block that take rows of their own.
        grid: blocks of threads.
        threads: threads a block.
        lds: bytes of LDS a block.
    """

    kernel_m: int
    slab: int
    waves_k: int
    waves_n: int
    grid: int
    threads: int
    lds: int


def tile(arch: Arch, kernel_m: int) -> tuple[int, int]:
    """Rows and MX blocks that one wave takes in one step (MxDot::ROWS, MxDot::BLOCKS)."""
    if arch.vendor == "nvidia":
        return 16, 8 if kernel_m == 1 else 4
    return (8, arch.wave // 4) if kernel_m == 4 else (4, arch.wave // 2)


def plan(
    m: int,
    n: int,
    k: int,
    arch: str,
    cu_count: int,
    *,
    waves: tuple[int, int] | None = None,
    blocks_per_cu: int | None = None,
) -> GemvPlan:
    """Choose the split for [m, k] x [n, k].

    Waves go to K first, as far as K divides into whole steps: that shortens what a single tile takes, which is what
    counts when there are fewer tiles than places to run them. The activations of a whole K stay in LDS if so many
    blocks of threads still find room on a CU that they hide each other's latency; else K goes through LDS in slabs.

    Args:
        waves: (waves_k, waves_n) instead of the rule's choice.
        blocks_per_cu: blocks of threads a CU instead of the rule's choice.

    Raises:
        ShapeError: m outside 1..4, or k no positive multiple of 32, or n < 1.
    """
    if not 1 <= m <= MAX_M or n < 1 or k < MX_BLOCK or k % MX_BLOCK:
        raise ShapeError(
            f"GEMV M={m} N={n} K={k}", "needs M of 1 to 4, N >= 1, K a multiple of 32", "use the GEMM instead"
        )
    facts = arch_facts(arch)
    kernel_m = m if m < 3 else 4
    rows, blocks_a_step = tile(facts, kernel_m)
    blocks = k // MX_BLOCK
    steps = -(-blocks // blocks_a_step)
    tiles = -(-n // rows)

    most_waves = (12 if facts.vendor == "nvidia" else 512 // facts.wave) if tiles <= cu_count else 256 // facts.wave
    rounds = -(-steps // most_waves)
    waves_k = -(-steps // rounds)
    waves_n = most_waves // waves_k if tiles > cu_count else 1
    if waves is not None:
        waves_k, waves_n = waves
    step = waves_k * blocks_a_step

    def lds(slab: int) -> int:  # GemvLds
        return 64 + kernel_m * slab * (64 + 4) + 2 * waves_k * waves_n * rows * kernel_m * 4

    whole = -(-blocks // step) * step
    most = blocks_per_cu or (3 if facts.vendor == "nvidia" else 4)
    resident = next((b for b in range(most, 0, -1) if lds(whole) <= facts.lds_bytes // b), 0)
    slab = whole
    if resident == 0:
        slab = max(step, (facts.lds_bytes // 2 - lds(0)) // (kernel_m * 68) // step * step)
        resident = 2
    grid = min(-(-tiles // waves_n), cu_count * resident)
    return GemvPlan(kernel_m, slab, waves_k, waves_n, grid, waves_k * waves_n * facts.wave, lds(slab))


def gemv_mxfp4(
    x: Any, w: Any, scales: Any, y: Any, *, arch: str, cu_count: int, bias: Any = None, chosen: GemvPlan | None = None
) -> LaunchDescription:
    """Describe y = x w^T + bias for a few rows of x.

    Args:
        x: [M, K] bf16, rows 16-byte aligned, last dimension contiguous.
        w: [N, K/2] uint8, two e2m1 codes a byte, contiguous.
        scales: [N, K/32] uint8 e8m0, contiguous.
        y: [M, N] bf16 or fp32, last dimension contiguous.
        bias: [N] bf16, or None.
        arch: `gfx950`, `gfx942`, `gfx1100`, `gfx1151` or `sm_90`.
        cu_count: compute units (multiprocessors) of the device.
        chosen: a plan to use instead of `plan`'s.

    Raises:
        ShapeError: shapes that do not fit each other or the kernel.
    """
    (m, k), n = x.shape, w.shape[0]
    shapes = f"x {tuple(x.shape)}, w {tuple(w.shape)}, scales {tuple(scales.shape)}, y {tuple(y.shape)}"
    if tuple(w.shape) != (n, k // 2) or tuple(scales.shape) != (n, k // MX_BLOCK) or tuple(y.shape) != (m, n):
        raise ShapeError(shapes, "want [M, K], [N, K/2], [N, K/32] and [M, N]", "check the layer's layout")
    x_stride, y_stride = _row_stride(x), _row_stride(y)
    if x_stride % 8:
        raise ShapeError(shapes, f"rows of x are {x_stride} elements apart, not a multiple of 8", "make x contiguous")
    p = chosen or plan(m, n, k, arch, cu_count)
    out = {2: "bf16", 4: "f32"}[y.itemsize if hasattr(y, "itemsize") else y.element_size()]
    return LaunchDescription(
        kernel=f"gemv_mxfp4_{out}_m{p.kernel_m}",
        grid=p.grid,
        block=p.threads,
        lds=p.lds,
        args=(x, w, scales, bias, y, x_stride, y_stride, m, n, k, p.slab, p.waves_k, p.waves_n, p.grid),
    )


def _row_stride(matrix: Any) -> int:
    """Elements between rows of a torch tensor or a numpy array."""
    if callable(getattr(matrix, "stride", None)):
        return int(matrix.stride(0))
    return int(matrix.strides[0] // matrix.itemsize)
