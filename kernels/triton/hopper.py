"""Launches the Hopper kernels: grouped GEMM, and a fused MoE from routing to combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from .combine import combine
from .hopper_moe import hopper_moe_kernel
from .hopper_pack import HopperWeights, x_columns
from .overlap import overlap
from .quant_mx import quant_mx
from .routing import Routing, route

Quantize = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

FEW = 8
"""`Alone` up to one routed row for so many experts: of 16 rows and 128 experts, about one shares another's expert."""

AT_ONCE = 4 * 132
"""Programs that are on the card at the same time. So many of rows alone quantize x themselves; more lose to a launch
that does it once (measured on an H200)."""

SHORT = 8 * 1024
"""Elements of a block's rows up to which down quantizes its input itself; more take longer than a launch (likewise)."""

SHARED_MEMORY = 223 << 10
"""Bytes of it that stages and rows of x may take, of the 227 KB that a program has."""


@dataclass(frozen=True)
class HopperConfig:
    """Tile and launch options.

    Attributes:
        block_m: tokens, 8 to 256.
        block_n: weight rows, a multiple of 16 * num_warps.
        block_k: 64 or 128.
        num_warps: 4 or 8.
        num_stages: of shared memory, at least 3: all but two are on their way.
        group_m: blocks of tokens that are taken together, for the sake of L2.
        max_registers: of a thread, so that more blocks fit onto a multiprocessor; 0: as many as the compiler takes.
    """

    block_m: int
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 8
    max_registers: int = 0

    def fits(self, x_format: str, w_format: str, whole_k: int = 0) -> bool:
        """Whether shared memory holds the pipeline, of MX weights; with whole rows of x, of that length, if not 0."""
        x, scale = self.block_m * (2 if x_format == "bf16" else 1), 1 / 32 if x_format == "bf16" else 1 / 64
        w = self.block_n * (1 if w_format == "e4m3" else 1 / 2 + scale)
        stages = self.num_stages * self.block_k
        # Rows that stay are longer by at most a chunk: `hopper_rows.chunk_of`.
        rows = whole_k + 256 * self.num_warps if whole_k else stages
        return stages * w + x * rows <= SHARED_MEMORY


@dataclass(frozen=True)
class Alone:
    """A routing that takes no launch: each routed row has a block of its own, at its first place.

    Right for so few rows that hardly two are of one expert: that one's weights are read once for each.

    Attributes:
        block_experts: [M * top_k] int32 or int64: topk_ids; those outside [0, E) are no work.
        block_m: places of a block.
    """

    block_experts: torch.Tensor
    block_m: int


@dataclass(frozen=True)
class Overlap:
    """How a GEMM overlaps with the launches around it, where launches can (`overlap.py`).

    Attributes:
        ahead: the launch right in front wrote nothing that this one reads but x and its factors, and began its own
            work only once all before it had ended. So routing is there when this one begins, and it asks for its
            first weights before it waits.
        late: the next launch begins when this one's sums are done, not at once. For another GEMM behind it, whose
            blocks would else gather where this one's finish first, and the load would no longer be even.
    """

    ahead: bool = False
    late: bool = False


def hopper_gemm(
    x: torch.Tensor,
    x_factors: torch.Tensor | None,
    w: HopperWeights,
    y: torch.Tensor,
    routing: Routing | Alone | None,
    config: HopperConfig,
    *,
    overlapping: Overlap | None = None,
    top_k: int = 1,
    bias: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.702,
    beta: float = 1.0,
) -> torch.Tensor:
    """y[r] = x[r // top_k] w[expert of r]^T (+ bias), activated or weighted, for each routed row r that has a place.

    No host read of device data: may be captured in a graph. Rows that are dropped are not written.

    Args:
        x: [R / top_k, K] bf16 or fp16, or float8_e4m3fn with `x_factors`; contiguous, like all that follow. bf16 for
            weights that are multiplied with e4m3: quantized by the kernel, as `quant_mx` does for `row`. float8_e4m3fn
            for weights that order x: in `x_order`, [R / top_k, K rounded up to 64].
        x_factors: [R / top_k] fp32, powers of two.
        w: packed for x's format; with `pairs` if there is an activation.
        y: [R, N] bf16, fp16 or fp32; [R, N / 2] after an activation.
        routing: of `config.block_m`; None: dense, E is 1 and every row is taken.
        config: tile and launch options.
        overlapping: None: it begins when all launches before it have ended.
        top_k: routed rows a row of x.
        bias: [E, N], in the order before packing.
        row_weights: [R] fp32, the routing weights.
        activation: `none`, `silu` or `swigluoai`; with limit, alpha, beta as in `ops.activation.Activation`.
    """
    rows, groups = y.shape[0], triton.cdiv(w.n, 16)
    fits = w.experts == 1 if routing is None else routing.block_m == config.block_m
    if not fits or (activation != "none") != (w.pairs is not None):
        made = "no routing" if routing is None else f"blocks of {routing.block_m} rows"
        raise ValueError(
            f"{made} for {w.experts} experts with {config}, activation {activation} with pairs {w.pairs}: "
            "routing and packing must be made for the launch; route and pack again"
        )
    if x_factors is None and w.x_format == "e4m3" and x.dtype != torch.bfloat16:
        raise ValueError(f"{x.dtype} without factors for weights of e4m3: the kernel quantizes bf16; quantize x before")
    ordered = w.orders_x and x_factors is not None
    columns = x_columns(w.k) if ordered else w.k
    if x.shape[1] != columns:
        how = " in x_order" if ordered else ""
        raise ValueError(f"x {list(x.shape)} for weights with K {w.k}: takes {columns} columns{how}; use activations")
    row_ids = None if routing is None or isinstance(routing, Alone) else routing.row_ids
    experts = None if routing is None else routing.block_experts
    tiles_m = triton.cdiv(rows, config.block_m) if experts is None else experts.numel()
    if tiles_m:
        grid = (tiles_m * triton.cdiv(w.n, config.block_n),)
        early: dict[str, bool] = {} if overlapping is None else overlap(x)
        if early and overlapping is not None:
            early |= {"AHEAD": overlapping.ahead, "LATE": overlapping.late}
        hopper_moe_kernel[grid](
            x, x_factors, w.data, w.scales, w.factors, bias, y, row_ids, experts, row_weights,
            rows, w.n, groups, tiles_m, w.experts, alpha, limit or 0.0, beta,
            w.k, w.x_format, w.w_format, w.group, top_k, activation, w.pairs == "interleaved", limit is not None,
            groups * 16 < config.block_n, config.block_m, config.block_n, config.block_k, config.num_stages,
            config.group_m, num_warps=config.num_warps, maxnreg=config.max_registers or None, **early,
        )  # fmt: skip
    return y


def fused_moe_hopper(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: HopperWeights,
    w2: HopperWeights,
    config13: HopperConfig,
    config2: HopperConfig,
    *,
    element: str | None,
    mode: str | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = 1.702,
    beta: float = 1.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """Gate_up, activation, down and combine: x[M, H] -> [M, H], bf16.

    Args:
        x: [M, H] bf16, contiguous.
        topk_ids: [M, top_k] int32 or int64: local ids; others are dropped.
        topk_weights: [M, top_k] fp32.
        w13, w2: packed for the same x_format; w13 with pairs.
        config13, config2: of one block_m.
        element: MX format of the activations, `e4m3` or `e2m1`; None: bf16.
        mode: scale rounding of that; None: the format's default.
        b13, b2: biases [E, N], [E, H].
        activation, limit, alpha, beta: between the GEMMs.
        scale: of the combined sum.
    """
    experts = w13.experts
    routing = alone(topk_ids, experts, config13.block_m) or route(topk_ids, experts, config13.block_m)
    routed = routed_hopper(
        x, routing, topk_ids.shape[1], w13, w2, config13, config2,
        partial(activations, element=element, mode=mode), partial(activations, element=element, mode=mode), beside=True,
        b13=b13, b2=b2, row_weights=topk_weights, activation=activation, limit=limit, alpha=alpha, beta=beta,
    )  # fmt: skip
    return combine(routed, topk_ids, experts, torch.empty_like(x), scale)


def alone(topk_ids: torch.Tensor, experts: int, block_m: int) -> Alone | None:
    """`Alone` for one token, whose experts are distinct, and where rows are few against experts; else None."""
    if topk_ids.shape[0] > 1 and topk_ids.numel() * FEW > experts:
        return None
    return Alone(topk_ids.contiguous().view(-1), block_m)


def routed_hopper(
    x: torch.Tensor,
    routing: Routing | Alone,
    top_k: int,
    w13: HopperWeights,
    w2: HopperWeights,
    config13: HopperConfig,
    config2: HopperConfig,
    quantize13: Quantize,
    quantize2: Quantize,
    *,
    beside: bool = False,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    **activation: Any,
) -> torch.Tensor:
    """Both GEMMs, each behind the quantization of its input: x[M, H] -> [M * top_k, H], dropped rows unwritten.

    The result is bf16; of fp16 models fp32, as that of an expert may be beyond 65504 where the sum of all is not.

    Args:
        routing: of the configs' block_m.
        quantize13, quantize2: (x, x_format=..., ordered=..., beside=..., inside=...) -> what a GEMM multiplies, as
            `activations` gives it.
        beside: what launched `routing`, if anything, is the launch right in front, and x was there before it: x is
            quantized while rows are sorted.
        row_weights: [M * top_k] fp32, or None.
        activation: `activation`, `limit`, `alpha`, `beta` of `hopper_gemm`.
        The rest as in `fused_moe_hopper`.
    """
    rows = x.shape[0] * top_k
    hidden = torch.empty(rows, w13.n // 2, dtype=x.dtype, device=x.device)
    routed = torch.empty(rows, w2.n, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype, device=x.device)
    single = isinstance(routing, Alone)
    at_once = single and rows * triton.cdiv(w13.n, config13.block_n) <= AT_ONCE
    left, factors = quantize13(
        x, x_format=w13.x_format, ordered=w13.orders_x, beside=beside and not single,
        inside=at_once and config13.fits(w13.x_format, w13.w_format, w13.k),
    )  # fmt: skip
    behind = Overlap(ahead=left is not x, late=w13.x_format != "e4m3" and left is x)
    hopper_gemm(left, factors, w13, hidden, routing, config13, overlapping=behind, top_k=top_k, bias=b13, **activation)
    few = single or config2.block_m * w2.k <= SHORT
    left, factors = quantize2(
        hidden, x_format=w2.x_format, ordered=w2.orders_x,
        inside=few and config2.fits(w2.x_format, w2.w_format, w2.k),
    )  # fmt: skip
    hopper_gemm(left, factors, w2, routed, routing, config2, overlapping=Overlap(ahead=True), bias=b2,
                row_weights=row_weights)  # fmt: skip
    return routed


def linear_hopper(
    x: torch.Tensor,
    w: HopperWeights,
    config: HopperConfig,
    *,
    element: str | None,
    mode: str | None = None,
    bias: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    overlapping: bool = True,
) -> torch.Tensor:
    """x[M, K] -> [M, N]: a dense layer, its weights packed with E = 1.

    Args:
        x: [M, K] bf16, contiguous.
        w: packed without pairs.
        config: tile and launch options.
        element, mode: as in `fused_moe_hopper`.
        bias: [N].
        y: what to fill, in any dtype of `hopper_gemm`'s; None: a new one of x's.
        overlapping: whether the GEMM may begin before x is quantized.
    """
    left, factors = activations(x, element, mode, w.x_format, w.orders_x)
    if y is None:
        y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device)
    ahead = Overlap(ahead=True) if overlapping and left is not x else None
    return hopper_gemm(left, factors, w, y, None, config, overlapping=ahead, bias=bias)


def activations(
    x: torch.Tensor, element: str | None, mode: str | None, x_format: str, ordered: bool = False, beside: bool = False,
    inside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """What the kernel multiplies: x as quantized to `element`, in bf16, or as e4m3 under one factor a row.

    Under one factor a row, MXFP8 with RCEIL scales is what e4m3 gives anyway, but for elements that are small against
    the row, and needs no blocks in between.

    Args:
        ordered: whether the weights order x (`HopperWeights.orders_x`): as in `quant_mx`.
        beside: as in `quant_mx`.
        inside: where the kernel can do it, leave it to it: x as it is, and no factors.
    """
    if x_format != "e4m3":
        return (x, None) if element is None else quant_mx(x, element, "bf16", mode, arch="sm_90", beside=beside)
    direct = element == "e4m3" and mode in (None, "rceil")
    if inside and direct and x.dtype == torch.bfloat16:
        return x, None
    return quant_mx(x, None if direct else element, "row", mode, arch="sm_90", beside=beside, ordered=ordered)
