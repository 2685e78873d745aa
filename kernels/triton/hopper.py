"""Launches the Hopper kernels: grouped GEMM, and a fused MoE from routing to combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .combine import combine
from .hopper_moe import hopper_moe_kernel
from .hopper_pack import HopperWeights
from .overlap import overlap
from .quant_mx import quant_mx
from .routing import Routing, route


@dataclass(frozen=True)
class HopperConfig:
    """Tile and launch options.

    Attributes:
        block_m: tokens, 16 to 256.
        block_n: weight rows, a multiple of 16 * num_warps.
        block_k: 64 or 128.
        num_warps: 4 or 8.
        num_stages: of shared memory, at least 3: all but two are on their way.
        group_m: blocks of tokens that are taken together, for the sake of L2.
        run: tiles of weight rows that a program takes one after another.
    """

    block_m: int
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 8
    run: int = 1

    def shared_bytes(self, x_format: str, w_format: str) -> int:
        """Shared memory of the pipeline, and of the store where the pipeline goes on meanwhile."""
        x = self.block_m * (2 if x_format == "bf16" else 1)
        w = self.block_n if w_format == "e4m3" else self.block_n * 17 / 32
        store = 2 * self.block_m * (self.block_n + 8) if self.run > 1 else 0
        return int(self.num_stages * self.block_k * (x + w)) + store


def hopper_gemm(
    x: torch.Tensor,
    x_factors: torch.Tensor | None,
    w: HopperWeights,
    y: torch.Tensor,
    routing: Routing | None,
    config: HopperConfig,
    *,
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
        x: [R / top_k, K] bf16, or float8_e4m3fn with `x_factors`; contiguous, like all that follow.
        x_factors: [R / top_k] fp32, powers of two.
        w: packed for x's format; with `pairs` if there is an activation.
        y: [R, N] bf16 or fp32; [R, N / 2] after an activation.
        routing: of `config.block_m`; None: dense, E is 1 and every row is taken.
        config: tile and launch options.
        top_k: routed rows a row of x.
        bias: [E, N], in the order before packing.
        row_weights: [R] fp32, the routing weights.
        activation: `none`, `silu` or `swigluoai`; with limit, alpha, beta as in `ops.activation.Activation`.
    """
    rows, k_tiles, groups = y.shape[0], triton.cdiv(w.k, 64), triton.cdiv(w.n, 16)
    fits = w.factors.shape[0] == 1 if routing is None else routing.block_m == config.block_m
    if not fits or (activation != "none") != (w.pairs is not None):
        made = "no routing" if routing is None else f"blocks of {routing.block_m} rows"
        raise ValueError(
            f"{made} for {w.factors.shape[0]} experts with {config}, activation {activation} with pairs {w.pairs}: "
            "routing and packing must be made for the launch; route and pack again"
        )
    row_ids, experts = (None, None) if routing is None else (routing.row_ids, routing.block_experts)
    tiles_m = triton.cdiv(rows, config.block_m) if experts is None else experts.numel()
    if tiles_m:
        grid = (tiles_m * triton.cdiv(w.n, config.block_n * config.run),)
        # Behind the short launch that quantizes x. Behind another GEMM, blocks that come early gather where it has
        # finished first, and the load is no longer even: gpt-oss-120b with one token lost 5 us.
        early = {} if x_factors is None else overlap(x)
        hopper_moe_kernel[grid](
            x, x_factors, w.data, w.scales, w.factors, bias, y, row_ids, experts, row_weights,
            rows, w.n, w.k, k_tiles, groups, tiles_m, alpha, limit or 0.0, beta,
            w.x_format, w.w_format, top_k, activation, w.pairs == "interleaved", limit is not None,
            config.block_m, config.block_n, config.block_k, config.num_stages, config.group_m,
            config.run, num_warps=config.num_warps, **early,
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
    m, top_k = topk_ids.shape
    experts = w13.factors.shape[0]
    routing = route(topk_ids, experts, config13.block_m)
    hidden = torch.empty(m * top_k, w13.n // 2, dtype=x.dtype, device=x.device)
    left, factors = activations(x, element, mode, w13.x_format)
    hopper_gemm(
        left, factors, w13, hidden, routing, config13,
        top_k=top_k, bias=b13, activation=activation, limit=limit, alpha=alpha, beta=beta,
    )  # fmt: skip
    left, factors = activations(hidden, element, mode, w2.x_format)
    routed = torch.empty(m * top_k, w2.n, dtype=x.dtype, device=x.device)
    hopper_gemm(left, factors, w2, routed, routing, config2, bias=b2, row_weights=topk_weights)
    return combine(routed, topk_ids, experts, torch.empty_like(x), scale)


def linear_hopper(
    x: torch.Tensor,
    w: HopperWeights,
    *,
    element: str | None,
    mode: str | None = None,
    bias: torch.Tensor | None = None,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """x[M, K] -> [M, N] bf16: a dense layer, its weights packed with E = 1.

    Args:
        x: [M, K] bf16, contiguous.
        w: packed without pairs.
        element, mode: as in `fused_moe_hopper`.
        bias: [N].
        config: None: `dense_config`.
    """
    left, factors = activations(x, element, mode, w.x_format)
    y = torch.empty(x.shape[0], w.n, dtype=x.dtype, device=x.device)
    return hopper_gemm(left, factors, w, y, None, config or dense_config(x.shape[0]), bias=bias)


def dense_config(m: int) -> HopperConfig:
    """A config for a dense layer that nobody tuned. On 8192 -> 28672 at M 1024 the largest tile was the fastest."""
    if m <= 64:
        return HopperConfig(max(16, triton.next_power_of_2(m)), 128, 64, 4, 6)
    return HopperConfig(128, 128, 64, 4, 4) if m <= 512 else HopperConfig(256, 128, 64, 8, 4, group_m=4)


def activations(
    x: torch.Tensor, element: str | None, mode: str | None, x_format: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernel multiplies: x as quantized to `element`, in bf16, or as e4m3 under one factor a row.

    Under one factor a row, MXFP8 with RCEIL scales is what e4m3 gives anyway, but for elements that are small against
    the row, and needs no blocks in between.
    """
    if x_format == "bf16":
        return (x, None) if element is None else quant_mx(x, element, "bf16", mode, native=True)
    direct = element == "e4m3" and mode in (None, "rceil")
    return quant_mx(x, None if direct else element, "row", mode, native=True)


def default_configs(
    m: int, top_k: int, experts: int, x_format: str, w_format: str
) -> tuple[HopperConfig, HopperConfig]:
    """Configs for a shape that nobody tuned, of gate_up and down: block_m holds the rows that an expert gets."""
    rows = max(1, m * top_k // experts)
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if rows <= 64 else 128)
    narrow = x_format == "e4m3"
    if block_m == 16:
        config = HopperConfig(16, 64, 128, 4, 6) if narrow else HopperConfig(16, 128, 64, 4, 6)
    elif block_m == 32:
        config = HopperConfig(32, 128, 128, 4, 4) if narrow else HopperConfig(32, 128, 64, 4, 6)
    else:
        config = HopperConfig(block_m, 128, 64, 4, 6 if narrow and block_m == 64 else 4)
    return config, config
