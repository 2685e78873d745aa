"""How `kernels/hip/decode_gemm.hip` is launched on sm_90, by a plan (`decode_plans.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.decode_plans import TILE_K, TILE_ROWS, DecodePlan, grouped_plan, plans
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import MX_BLOCK

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
    row_ids: Any = None,
    block_experts: Any = None,
    block_m: int = 0,
    top_k: int = 1,
    plan: DecodePlan | None = None,
    prepared: Any = None,
) -> tuple[LaunchDescription, ...]:
    """Describe y = x w^T, dense or grouped by expert, on sm_90: launches that follow each other.

    Args:
        x: [M / top_k, K] bf16, for schemes of fp16 activations fp16; rows 16-byte aligned, last dimension contiguous.
        data, scales, factors: weights in `mma_tile` + `mma_scale` (e4m3; factors None), packed as `hopper_bf16`, or in
            `mma_int4` + `tile_group` with words for scales (int4; factors None).
        y: [M, N], or [M, N / 2] after an activation; bf16, fp16 or fp32, last dimension contiguous.
        scheme: one of the manifest's `DECODE_SCHEMES`, or `INT4_SCHEMES` by group (`int4_w4a16_g128`).
        n: rows of the weights (of one expert).
        cu_count: multiprocessors.
        carry: rounds the activations' scales (`formats.mx.Element.carry`).
        x_scale: fp32 scalar on the device, the scale of static fp8 activations.
        epilogue: what is fused behind.
        row_ids, block_experts, block_m: routing (`ops/routing.py`); None and 0: dense.
        top_k: rows of y that share a row of x.
        plan: instead of the first of `plans`.
        prepared: room for `plan.prepared_values` of bf16, 16-byte aligned, whatever they are.

    Raises:
        ShapeError: shapes, strides or dtypes that do not fit each other or the kernel.
    """
    check_operands(x, y, n, top_k, epilogue, scheme)
    m, k = y.shape[0], x.shape[1]
    grouped = row_ids is not None
    pairs = epilogue.activation is not None
    if plan is None and grouped:
        plan = grouped_plan(scheme, block_m, len(block_experts), n, k, cu_count)
    elif plan is None:
        plan = plans(scheme, m, n, k, cu_count, pairs)[0]
    row_blocks = len(block_experts) if grouped else -(-m // plan.rows)
    family = "moe_decode" if grouped else "decode_prepared" if plan.share else "decode"
    launches = []
    if plan.share:
        _check_prepared(plan, prepared, m, n, k)
        launches.append(_prepare(x, prepared, scheme, x_scale, carry, m, k, plan.rows))
    gemm = LaunchDescription(
        kernel=f"{family}_{scheme}_m{plan.rows}",
        grid=row_blocks * plan.groups * plan.split,
        block=plan.waves * 32,
        lds=plan.lds,
        args=(
            prepared if plan.share else x, data, scales, factors, epilogue.bias, x_scale, epilogue.residual, y, row_ids,
            block_experts, epilogue.row_weights, None, x.stride(0), y.stride(0), m, n, k, top_k, plan.split,
            plan.waves_k, plan.waves_n, plan.groups, plan.depth, plan.chunk, carry, out_code(y),
            ACTIVATIONS[epilogue.activation] | (INTERLEAVED if epilogue.interleaved else 0),
            epilogue.alpha, epilogue.limit or 0.0,
        ),
        cluster=plan.split * max(1, plan.share),
        overlap=True,
    )  # fmt: skip
    return (*launches, gemm)


def _check_prepared(plan: DecodePlan, prepared: Any, m: int, n: int, k: int) -> None:
    have, need = 0 if prepared is None else prepared.numel(), plan.prepared_values(m, k)
    if have < need:
        raise ShapeError(f"room for {have} values of a prepared x", f"{plan} leaves {need}", "make room")
    if plan.groups * plan.waves_n * TILE_ROWS < n:
        raise ShapeError(f"N={n}", f"{plan} has one row group a block", "take a plan for this N")


PREPARING_WAVES = 8
"""Waves of a block that prepares x; each takes eight rows of an MX block."""


def _prepare(
    x: Any, prepared: Any, scheme: str, x_scale: Any, carry: int, m: int, k: int, rows: int
) -> LaunchDescription:
    units = -(-m // 8) * -(-k // TILE_K) * (TILE_K // MX_BLOCK)
    return LaunchDescription(
        kernel=f"prepare_{scheme}",
        grid=-(-units // PREPARING_WAVES),
        block=PREPARING_WAVES * 32,
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
