"""A fused MoE in Triton on weights as checkpoints have them: routing, quantization, two grouped GEMMs, combine.

For Hopper, `hopper.py` has the same on packed weights, and is much faster there.
"""

from __future__ import annotations

import torch

from .combine import combine, combine_torch
from .moe_gemm import Epilogue, moe_gemm, moe_gemm_torch
from .mx_gemm import MxGemmConfig
from .quant_mx import quant_mx, quant_mx_torch
from .routing import route, route_torch

ACTIVATIONS = {"w4a16": None, "mxfp4": "e2m1", "w4a8": "e4m3", "mxfp8": "e4m3"}
"""Scheme -> MX format of both GEMMs' inputs; None: bf16."""


def fused_moe_triton(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    *,
    scheme: str,
    arch: str,
    config: tuple[MxGemmConfig, MxGemmConfig] | None = None,
    mode: str | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.702,
    beta: float = 1.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """x[M, H] -> [M, H]: the experts of each token, weighted and summed in the order of its slots.

    No host read of device data: may be captured in a graph and replayed with other routings.

    Args:
        x: [M, H] bf16, or fp16 where it is quantized; contiguous, like all that follow.
        topk_ids: [M, top_k] int32 or int64: local expert ids; any other id drops its slot.
        topk_weights: [M, top_k] fp32.
        w13: [E, 2 I, H] float8_e4m3fn or [E, 2 I, H/2] uint8 (e2m1); I a multiple of 32.
        w13_scales: [E, 2 I, H/32] uint8 e8m0.
        w2, w2_scales: [E, H, I] and [E, H, I/32] likewise.
        scheme: `w4a16`, `w4a8`, `mxfp4` or `mxfp8`: how both GEMMs' inputs are quantized.
        arch: what it is compiled for.
        config: of gate_up and down, one block_m; None: `default_configs`.
        mode: scale rounding of activations; None: the format's default.
        b13, b2: biases [E, 2 I], [E, H].
        activation: `silu` or `swigluoai`; with interleaved, limit, alpha, beta as in `ops.activation.Activation`.
        scale: `routed_scaling_factor`, of the combined sum.
    """
    m, top_k = topk_ids.shape
    experts, rows = w13.shape[0], topk_ids.numel()
    inter = w13.shape[1] // 2
    first, second = config or default_configs(m, top_k, experts, arch)
    routing = route(topk_ids, experts, first.block_m)
    element = ACTIVATIONS[scheme]
    left, left_scales = (x, None) if element is None else quant_mx(x, element, "mx", mode, arch=arch)
    epilogue = Epilogue(activation, interleaved, limit, alpha, beta, element, mode, x.dtype == torch.float16)
    hidden, hidden_scales = _hidden(rows, inter, element, x)
    moe_gemm(
        left, left_scales, w13, w13_scales, hidden, hidden_scales, routing, first, arch,
        top_k=top_k, bias=b13, epilogue=epilogue,
    )  # fmt: skip
    hidden = hidden.view(torch.float8_e4m3fn) if element == "e4m3" else hidden
    routed = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    moe_gemm(
        hidden, hidden_scales, w2, w2_scales, routed, None, routing, second, arch, bias=b2, row_weights=topk_weights
    )  # fmt: skip
    return combine(routed, topk_ids, experts, torch.empty_like(x), scale)


def _hidden(rows: int, inter: int, element: str | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if element is None:
        return torch.empty(rows, inter, dtype=x.dtype, device=x.device), None
    data = torch.empty(rows, inter // (2 if element == "e2m1" else 1), dtype=torch.uint8, device=x.device)
    return data, torch.empty(rows, inter // 32, dtype=torch.uint8, device=x.device)


def default_configs(m: int, top_k: int, experts: int, arch: str) -> tuple[MxGemmConfig, MxGemmConfig]:
    """Configs for a shape that nobody tuned: block_m by the rows of an expert, tiles that compile without spills.

    On gfx950 aiter #3580's conservative tile; a pair of accumulators halves gate_up's columns.
    """
    rows = max(1, m * top_k // experts)
    block_m = min(max(16, 1 << (rows - 1).bit_length()), 128 if arch == "gfx950" else 64)
    if arch == "gfx950":
        return (
            MxGemmConfig(block_m, 64, 256, 4, 2, nonkdim=16),
            MxGemmConfig(block_m, 128, 256, 4, 2, nonkdim=16),
        )
    if arch == "gfx942":
        return MxGemmConfig(block_m, 32, 64, 4, 2, nonkdim=16), MxGemmConfig(block_m, 64, 64, 4, 1, nonkdim=16)
    if arch.startswith("gfx11"):
        block_m = min(block_m, 32)
        return MxGemmConfig(block_m, 32, 64, 4, 1), MxGemmConfig(block_m, 32, 64, 4, 1)
    return MxGemmConfig(block_m, 64, 64, 4, 3), MxGemmConfig(block_m, 64, 64, 4, 3)


def fused_moe_torch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    *,
    scheme: str,
    mode: str | None = None,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    epilogue: Epilogue,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The twin of `fused_moe_triton` in plain torch; sums in `dtype`, the same roundings in between."""
    element, experts = ACTIVATIONS[scheme], w13.shape[0]
    routing = route_torch(topk_ids, experts, 16)
    left, left_scales = (x, None) if element is None else quant_mx_torch(x, element, "mx", mode)
    hidden, hidden_scales = moe_gemm_torch(
        left, left_scales, w13, w13_scales, routing, top_k=topk_ids.shape[1], bias=b13, epilogue=epilogue, dtype=dtype
    )
    if element is None:
        hidden = hidden.to(x.dtype)
    routed, _ = moe_gemm_torch(
        hidden, hidden_scales, w2, w2_scales, routing, bias=b2, row_weights=topk_weights.reshape(-1), dtype=dtype
    )
    return combine_torch(routed.to(x.dtype), topk_ids, experts, scale).to(x.dtype)
