"""How `kernels/hip/decode_gemm.hip` is launched on sm_90, by a plan (`decode_plans.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip.manifest import QUANTIZED_SCHEMES
from sglang_amd_quant.runtime.decode_plans import DecodePlan, entry_point, lds_of, plans, prepared_bytes
from sglang_amd_quant.runtime.decode_wanted import RESIDENT
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import MX_BLOCK
from sglang_amd_quant.selection.hopper_decode import EARLY_PREPARED, TILE_K, TILE_ROWS, early_sums_fit, early_tiles

OUTS = {"bf16": 0, "fp16": 1, "fp32": 2}
ACTIVATIONS = {None: 0, "silu": 1, "swigluoai": 2}
INTERLEAVED = 4
"""Numbers of `enum Out` and `enum Activation` in include/decode.h."""


@dataclass(frozen=True)
class Epilogue:
    """What happens to sums before they are stored.

    Attributes:
        bias: [N] or [E, N] bf16, in the order before packing, or None.
        residual: bf16 of y's shape and strides, added last, or None.
        activation: `silu`, `swigluoai` or None; halves N.
        interleaved: gate and up rows alternated before packing; else all gates came first.
        alpha, limit: of the activation; limit None = no clamp.
        row_weights: fp32, one for each row of y, multiplied before the residual, or None.
    """

    bias: Any = None
    residual: Any = None
    activation: str | None = None
    interleaved: bool = False
    alpha: float = 1.702
    limit: float | None = None
    row_weights: Any = None


NOTHING = Epilogue()


def decode_gemm(
    x: Any,
    data: Any,
    scales: Any,
    factors: Any,
    y: Any,
    *,
    scheme: str,
    n: int,
    cu_count: int,
    carry: int = 0,
    x_scale: Any = None,
    epilogue: Epilogue = NOTHING,
    plan: DecodePlan | None = None,
    prepared: Any = None,
) -> tuple[LaunchDescription, ...]:
    """Describe y = x w^T on sm_90: launches that follow each other.

    Args:
        x: [M, K] bf16, for schemes of fp16 activations fp16; rows 16-byte aligned, last dimension contiguous.
        data, scales, factors: weights packed as `hopper_e4m3` (of quantized activations; scales None for e4m3) or
            `hopper_bf16`, in `mma_tile` + `mma_scale` (w8a16; factors None), or in `mma_int4` + `tile_group` with words
            for scales (int4; factors None).
        y: [M, N], or [M, N / 2] after an activation; bf16, fp16 or fp32, last dimension contiguous.
        scheme: one of the manifest's `DECODE_SCHEMES`, or `INT4_SCHEMES` by group (`int4_w4a16_g128`).
        n: rows of the weights.
        cu_count: multiprocessors.
        carry: rounds the activations' scales (`formats.mx.Element.carry`).
        x_scale: fp32 scalar on the device, the scale of static fp8 activations.
        epilogue: what is fused behind.
        plan: instead of the first of `plans`.
        prepared: room for `prepared_bytes`, 16-byte aligned, whatever is in it.

    Raises:
        ShapeError: shapes, strides or dtypes that do not fit each other or the kernel.
    """
    check_operands(x, y, n, 1, epilogue, scheme)
    m, k = y.shape[0], x.shape[1]
    if plan is None:
        plan = plans(scheme, m, n, k, cu_count, epilogue.activation is not None)[0]
    if plan.one_group and plan.groups * plan.row_tiles * TILE_ROWS < n:
        raise ShapeError(f"N={n}", f"{plan} has one row group a block", "take a plan for this N")
    if plan.early:
        if early_tiles(plan.rows, plan.depth, plan.chunk) * plan.waves_k * plan.split * TILE_K < k:
            raise ShapeError(f"K={k}", f"{plan} holds less", "take a plan for this K")
        if not early_sums_fit(plan.rows, plan.split, plan.waves_k, plan.depth, plan.chunk):
            raise ShapeError(f"{plan.rows} rows of x", f"{plan} has no room for their sums", "take deeper rings")
        if plan.rows >= EARLY_PREPARED and plan.share != RESIDENT:
            raise ShapeError(f"{plan.rows} rows of x", f"{plan} quantizes them in every block", "have them prepared")
    if plan.share <= 0 and (need := lds_of(scheme, plan, k)) > plan.lds:
        raise ShapeError(f"K={k}", f"{plan} needs {need} bytes of shared memory", "take a plan for this K")
    streamed, launches = plan.share > 0, []
    held = prepared if plan.share == RESIDENT else None
    if plan.share:
        _check_prepared(scheme, plan, prepared, m, k)
        launches.append(_prepare(x, prepared, scheme, x_scale, carry, m, k, plan.rows, cu_count))
    gemm = LaunchDescription(
        kernel=entry_point(scheme, plan),
        grid=-(-m // plan.rows) * plan.groups * plan.split,
        block=(plan.waves + plan.x_waves) * 32,
        lds=plan.lds,
        args=(
            prepared if streamed else x, data, scales, factors, epilogue.bias, x_scale, epilogue.residual, y, None,
            None, epilogue.row_weights, held, x.stride(0), y.stride(0), m, n, k, 1, plan.split,
            plan.waves_k, plan.waves_n, plan.groups, plan.depth, plan.chunk, carry, out_code(y),
            ACTIVATIONS[epilogue.activation] | (INTERLEAVED if epilogue.interleaved else 0),
            epilogue.alpha, epilogue.limit or 0.0,
        ),
        cluster=plan.cluster,
        overlap=True,
    )  # fmt: skip
    return (*launches, gemm)


def _check_prepared(scheme: str, plan: DecodePlan, prepared: Any, m: int, k: int) -> None:
    have = 0 if prepared is None else prepared.numel() * prepared.element_size()
    if have < (need := prepared_bytes(scheme, plan, m, k)):
        raise ShapeError(f"room for {have} bytes of a prepared x", f"{plan} leaves {need}", "make room")


PREPARING_WAVES, HELD_PIECES = 8, 4
"""Waves of a block that prepares x: eight rows of an MX block each, or of quantized ones a row or part of it together;
pieces of eight values that a thread holds."""


def _prepare(
    x: Any, prepared: Any, scheme: str, x_scale: Any, carry: int, m: int, k: int, rows: int, cu_count: int
) -> LaunchDescription:
    tiles, threads = -(-k // TILE_K), PREPARING_WAVES * 32
    if scheme in QUANTIZED_SCHEMES:  # no block quantizes as much as its threads hold, where others are idle
        grid = m * max(1, min(cu_count // m, 1 + tiles * TILE_K // (8 * HELD_PIECES * threads)))
    else:
        grid = -(-(-(-m // 8) * tiles * (TILE_K // MX_BLOCK)) // PREPARING_WAVES)
    return LaunchDescription(
        kernel=f"prepare_{scheme}",
        grid=grid,
        block=threads,
        args=(x, x_scale, prepared, x.stride(0), m, k, rows, carry),
        overlap=True,
    )


def check_operands(x: Any, y: Any, n: int, top_k: int, epilogue: Epilogue, scheme: str) -> None:
    """What every target asks of x and y.

    Raises:
        ShapeError: shapes, strides or a dtype of x that do not fit each other or the kernel.
    """
    wanted = "float16" if "_fp16" in scheme else "bfloat16"
    if (name := str(x.dtype).removeprefix("torch.")) != wanted:
        raise ShapeError(f"x {tuple(x.shape)} of {name}", f"{scheme} takes {wanted}", "convert x, or take its scheme")
    columns = n // 2 if epilogue.activation else n
    if y.shape[1] != columns or x.shape[0] * top_k != y.shape[0] or (epilogue.activation and n % TILE_ROWS):
        want = f"want [M / top_k, K] and [M, {columns}], N in 16s with an activation"
        raise ShapeError(_shapes(x, y, n), want, "check the layer")
    if x.stride(1) != 1 or x.stride(0) % 8 or y.stride(1) != 1:
        strides = f"{_shapes(x, y, n)}, strides {x.stride()}, {y.stride()}"
        raise ShapeError(strides, "rows must be 16-byte aligned", "make x contiguous")
    if x.stride(0) >= 1 << 31:
        raise ShapeError(f"{_shapes(x, y, n)}, strides {x.stride()}", "rows of x 4 GiB apart", "make x contiguous")


def _shapes(x: Any, y: Any, n: int) -> str:
    return f"x {tuple(x.shape)}, y {tuple(y.shape)}, N {n}"


def out_code(y: Any) -> int:
    """The kernel's number of y's dtype.

    Raises:
        ShapeError: a dtype that it does not store.
    """
    name = str(y.dtype).removeprefix("torch.")
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    if name not in known:
        raise ShapeError(f"y of {name}", "the kernel stores bf16, fp16 or fp32", "pass one of those")
    return OUTS[known[name]]
