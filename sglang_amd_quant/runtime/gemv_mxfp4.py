"""How `kernels/hip/gemv_mxfp4.hip` is launched: the split of a problem over waves, LDS and the grid.

The tile sizes repeat those of `MxDot` in `kernels/hip/include/mx_dot.h`; tests/kernels/test_gemv_mxfp4.py holds the two
together by running every arch's plan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache, cached_property
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

    @cached_property
    def kernels(self) -> dict[int, str]:
        """Entry points by the bytes of an element of y."""
        return {size: f"gemv_mxfp4_{out}_m{self.kernel_m}" for size, out in ((2, "bf16"), (4, "f32"))}


def tile(arch: Arch, kernel_m: int) -> tuple[int, int]:
    """Rows and MX blocks that one wave takes in one step (MxDot::ROWS, MxDot::BLOCKS)."""
    if arch.vendor == "nvidia":
        return 16, 8 if kernel_m == 1 else 4
    return (8, arch.wave // 4) if kernel_m == 4 else (4, arch.wave // 2)


@dataclass(frozen=True)
class _Cost:
    """What a launch is modelled with. Instructions are counted in machine code; the rest is from data sheets,
    unmeasured but for sm_90.

    Attributes:
        step: instructions a wave spends on one wave-step, by `kernel_m`.
        stage: on normalizing 8 activations.
        tile: on summing up and storing one tile.
        issue: cycles that a wave's instruction occupies its SIMD.
        alone: cycles an instruction takes when its wave is alone on the SIMD.
        bandwidth: bytes a cycle that memory delivers to each CU when all of them ask.
        latency: cycles from a load to its data when memory is busy.
        waves: waves a block may have.
        resident: blocks a CU that registers allow.
    """

    step: dict[int, int]
    stage: int
    tile: int
    issue: float
    alone: float
    bandwidth: float
    latency: int
    waves: tuple[int, ...]
    resident: int


_CDNA = {"stage": 80, "tile": 120, "issue": 4, "alone": 4, "latency": 2000, "waves": (4, 8), "resident": 4}
_RDNA = {"stage": 80, "tile": 120, "issue": 1, "alone": 2, "latency": 1500, "waves": (8, 16), "resident": 4}
_COSTS = {
    "gfx950": _Cost(step={1: 120, 2: 180, 4: 300}, bandwidth=13.0, **_CDNA),  # type: ignore[arg-type]
    "gfx942": _Cost(step={1: 190, 2: 250, 4: 370}, bandwidth=8.3, **_CDNA),  # type: ignore[arg-type]
    "gfx1100": _Cost(step={1: 190, 2: 250, 4: 370}, bandwidth=4.2, **_RDNA),  # type: ignore[arg-type]
    "gfx1151": _Cost(step={1: 190, 2: 250, 4: 370}, bandwidth=2.2, **_RDNA),  # type: ignore[arg-type]
    "sm_90": _Cost({1: 376, 2: 232, 4: 290}, 80, 150, 1, 2, 17.5, 1800, waves=(8, 12), resident=3),
}


def lds_bytes(arch: Arch, kernel_m: int, slab: int, waves: int) -> int:
    """LDS of a block (GemvLds): zeros, activations and their exponents, two sets of partial sums."""
    return 64 + kernel_m * slab * (64 + 4) + 2 * waves * tile(arch, kernel_m)[0] * kernel_m * 4


@cache
def plans(m: int, n: int, k: int, arch: str, cu_count: int) -> tuple[GemvPlan, ...]:
    """Every legal split of [m, k] x [n, k] over waves, blocks and slabs, best first by the model's cost.

    The model takes the longer of two times on the busiest CU. Issue: each block stages the activations once, or once a
    tile where they do not fit in LDS as a whole, and takes its share of the tiles. Memory: the weights of those
    tiles, at full bandwidth if as many bytes are under way as the latency asks for.

    Raises:
        ShapeError: m outside 1..4, or k no positive multiple of 32, or n < 1.
    """
    if not 1 <= m <= MAX_M or n < 1 or k < MX_BLOCK or k % MX_BLOCK:
        raise ShapeError(f"GEMV M={m} N={n} K={k}", "needs M of 1 to 4, N >= 1, K a multiple of 32", "use the GEMM")
    facts, cost = arch_facts(arch), _COSTS[arch]
    kernel_m = m if m < 3 else 4
    rows, blocks_a_step = tile(facts, kernel_m)
    blocks = k // MX_BLOCK
    steps = -(-blocks // blocks_a_step)
    found: dict[GemvPlan, tuple[float, float]] = {}
    for waves, resident in itertools.product(cost.waves, range(1, cost.resident + 1)):
        for waves_k in range(1, min(waves, steps) + 1):
            waves_n = waves // waves_k
            step, count = waves_k * blocks_a_step, waves_k * waves_n
            room = facts.lds_bytes // resident - lds_bytes(facts, kernel_m, 0, count)
            slab = min(-(-blocks // step), room // (kernel_m * 68) // step) * step
            if slab < step:
                continue
            tiles = -(-n // (rows * waves_n))
            grid = min(tiles, cu_count * resident)
            rounds = -(-tiles // grid)
            stagings = 1 if slab >= blocks else rounds
            staging = -(-kernel_m * blocks * 4 // (count * facts.wave)) * cost.stage
            instructions = stagings * staging + rounds * (-(-steps // waves_k) * cost.step[kernel_m] + cost.tile)
            busiest = -(-grid // cu_count)  # blocks
            issue = instructions * max(busiest * count / facts.simds * cost.issue, cost.alone)
            moved = busiest * rounds * waves_n * rows * blocks * 17
            under_way = busiest * count * rows * blocks_a_step * 16
            memory = moved / cost.bandwidth * max(1.0, cost.bandwidth * cost.latency / under_way)
            p = GemvPlan(
                kernel_m, slab, waves_k, waves_n, grid, count * facts.wave, lds_bytes(facts, kernel_m, slab, count)
            )
            found[p] = max(issue, memory), issue
    return tuple(sorted(found, key=lambda p: found[p]))


@cache
def plan(m: int, n: int, k: int, arch: str, cu_count: int) -> GemvPlan:
    """The first of `plans`. Raises ShapeError as it does."""
    return plans(m, n, k, arch, cu_count)[0]


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
    x_stride, y_stride = _row_stride(x), _row_stride(y)
    if w.shape != (n, k // 2) or scales.shape != (n, k // MX_BLOCK) or y.shape != (m, n) or x_stride % 8:
        shapes = f"x {tuple(x.shape)}, w {tuple(w.shape)}, scales {tuple(scales.shape)}, y {tuple(y.shape)}"
        want = "want [M, K], [N, K/2], [N, K/32] and [M, N], and rows of x a multiple of 8 elements apart"
        raise ShapeError(f"{shapes}, stride of x {x_stride}", want, "check the layer's layout, make x contiguous")
    p = chosen or plan(m, n, k, arch, cu_count)
    return LaunchDescription(
        kernel=p.kernels[y.itemsize],
        grid=p.grid,
        block=p.threads,
        lds=p.lds,
        args=(x, w, scales, bias, y, x_stride, y_stride, m, n, k, p.slab, p.waves_k, p.waves_n, p.grid),
    )


def _row_stride(matrix: Any) -> int:
    """Elements between rows of a torch tensor or a numpy array."""
    try:
        return matrix.stride(0)  # type: ignore[no-any-return]
    except AttributeError:
        return int(matrix.strides[0] // matrix.itemsize)
