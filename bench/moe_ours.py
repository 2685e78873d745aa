"""Our Hopper MoE on one set of weights, and each of its stages against fp64 of the same quantized operands."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from functools import partial

import torch
from sglang_amd_quant.kernels.triton.combine import combine, combine_torch
from sglang_amd_quant.kernels.triton.hopper import (
    Alone,
    HopperConfig,
    Overlap,
    activations,
    alone,
    fused_moe_hopper,
    hopper_gemm,
    routed_hopper,
)
from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights, in_x_order, pack_hopper
from sglang_amd_quant.kernels.triton.quant_mx import quant_mx_torch
from sglang_amd_quant.kernels.triton.routing import Routing, route

from bench.moe_problem import Shape, Weights, grouped, random_routing, random_weights, relative, whole
from sglang_amd_quant.ops.moe import decide
from sglang_amd_quant.ops.triton_hopper import tile_of
from sglang_amd_quant.selection import GemmProblem, choose
from sglang_amd_quant.selection.problem import Epilogue

# scheme -> (elements of weights and of activations, what the kernel multiplies activations as)
SCHEMES = {
    "w4a16": ("e2m1", None, "bf16"),
    "w4a8": ("e2m1", "e4m3", "e4m3"),
    "mxfp4": ("e2m1", "e2m1", "e4m3"),
    "mxfp8": ("e4m3", "e4m3", "e4m3"),
}

Configs = tuple[HopperConfig, HopperConfig]


def selected(shape: Shape, scheme: str, m: int) -> tuple[Configs, str]:
    """The configs that selection gives to a layer of this shape, and where they come from (docs/selection.md)."""
    a, x_format = shape.activation, SCHEMES[scheme][2]
    epilogue = Epilogue(shape.bias, a.kind, interleaved=a.interleaved, limit=a.limit)

    def problem(op: str, n: int, k: int, epilogue: Epilogue) -> GemmProblem:
        return GemmProblem(
            op, scheme, "sm_90", m, n, k, 132, shape.experts, shape.experts, shape.top_k,
            shape.tp, epilogue=epilogue, layout=f"hopper_{x_format}",
        )  # fmt: skip

    pair = decide(
        problem("moe_gate_up", 2 * shape.inter, shape.hidden, epilogue),
        problem("moe_down", shape.hidden, shape.inter, Epilogue(shape.bias)),
        frozenset({f"triton_hopper_{x_format}"}),
        choose,
    )
    assert pair.gate_up.kernel != "reference", pair.gate_up.reasons
    sources = dict.fromkeys((pair.gate_up.source, pair.down.source))
    return (tile_of(pair.gate_up.config), tile_of(pair.down.config)), ", ".join(sources)


class Ours:
    """The Hopper kernels on one set of weights."""

    def __init__(self, shape: Shape, weights: Weights, scheme: str) -> None:
        _, self.element, x_format = SCHEMES[scheme]
        a = shape.activation
        pairs = "interleaved" if a.interleaved else "halves"
        self.shape, self.weights = shape, weights
        self.w13: HopperWeights = pack_hopper(weights.w13, weights.s13, x_format, pairs)
        self.w2: HopperWeights = pack_hopper(weights.w2, weights.s2, x_format)
        self.activation = {"activation": a.kind, "limit": a.limit, "alpha": a.alpha, "beta": a.beta}

    def place(self, ids: torch.Tensor, block_m: int) -> Routing | Alone:
        """Routing as `fused_moe_hopper` does it."""
        experts = self.w13.experts
        return alone(ids, experts, block_m) or route(ids, experts, block_m)

    def whole(self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, configs: Configs) -> torch.Tensor:
        """Everything."""
        return fused_moe_hopper(
            x, ids, topk_weights, self.w13, self.w2, *configs, element=self.element, b13=self.weights.b13,
            b2=self.weights.b2, **self.activation,
        )  # fmt: skip

    def gemms(
        self, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, configs: Configs, routing: Routing | Alone
    ) -> torch.Tensor:
        """Everything but routing."""
        quantize = partial(activations, element=self.element, mode=None)
        routed = routed_hopper(
            x, routing, ids.shape[1], self.w13, self.w2, *configs, quantize, quantize, b13=self.weights.b13,
            b2=self.weights.b2, row_weights=topk_weights, **self.activation,
        )  # fmt: skip
        return combine(routed, ids, self.w13.experts, torch.empty_like(x))

    def gate_up(self, left, factors, hidden, routing, config: HopperConfig) -> torch.Tensor:
        """The first GEMM, as it is launched in the whole."""
        plain = self.element is None
        return hopper_gemm(
            left, factors, self.w13, hidden, routing, config, overlapping=Overlap(ahead=not plain, late=plain),
            top_k=self.shape.top_k, bias=self.weights.b13, **self.activation,
        )  # fmt: skip

    def down(self, left, factors, routed, routing, config: HopperConfig, topk_weights) -> torch.Tensor:
        """The second GEMM, likewise."""
        return hopper_gemm(left, factors, self.w2, routed, routing, config, overlapping=Overlap(ahead=True),
                           bias=self.weights.b2, row_weights=topk_weights)  # fmt: skip


def check(shape: Shape, scheme: str, m: int, seed: int, config: HopperConfig | None = None) -> dict[str, float]:
    """Relative error of each stage against fp64 of its own operands. Raises AssertionError beyond the bound.

    config: of both GEMMs; None: what selection gives.

    A bf16 result is off by 2^-9 of itself at most, so the norm of all errors is within 2^-9 of the norm; fp32 sums add
    K 2^-24 at the worst. Hopper adds fp8 products in steps of 32 and keeps 13 bits below the largest term of a step: on
    random data some 2^-13 of a typical sum a step, growing as the root of K / 32 steps of either sign, so under 2^-9
    again for K up to 8192; the bound for fp8 is the sum. Activations and combine are exact: equal to their twins. With
    e4m3 weights, packing moves an element by at most 2^-10 of its row's scale, a 2^-18th of the row's largest.
    """
    experts = min(shape.experts, 16)
    small = Shape(experts, min(shape.top_k, experts), shape.hidden, shape.inter, shape.activation, shape.bias,
                  shape.element)  # fmt: skip
    weights = random_weights(small, seed, experts)
    ours = Ours(small, weights, scheme)
    x = torch.randn(m, shape.hidden, device="cuda").bfloat16()
    ids, topk_weights = random_routing(m, small, seed, drop=0.15)
    here = ids.reshape(-1) >= 0
    configs = selected(small, scheme, m)[0] if config is None else (config, config)
    routing = ours.place(ids, configs[0].block_m)
    errors, bound = {}, 2.0**-9 * (1.02 if ours.w13.x_format == "bf16" else 2)
    hidden = torch.full((ids.numel(), shape.inter), torch.nan, dtype=x.dtype, device="cuda")
    left, factors = quantized(x, ours.w13, ours.element, "gate_up input")
    ours.gate_up(left, factors, hidden, routing, configs[0])
    values = values_of(left, factors, ours.w13)
    exact = shape.activation(grouped(values, ids, weights, 0, small.top_k, experts))
    errors["gate_up"] = relative(hidden[here], exact[here])
    assert hidden[~here].isnan().all(), "a dropped row was written"
    hidden[~here] = 0
    routed = torch.full((ids.numel(), shape.hidden), torch.nan, dtype=x.dtype, device="cuda")
    left, factors = quantized(hidden, ours.w2, ours.element, "down input")
    ours.down(left, factors, routed, routing, configs[1], topk_weights)
    values = values_of(left, factors, ours.w2)
    exact = grouped(values, ids, weights, 1, 1, experts) * topk_weights.double().view(-1, 1)
    errors["down"] = relative(routed[here], exact[here])
    y = combine(routed, ids, experts, torch.full_like(x, torch.nan))
    assert torch.equal(y, combine_torch(routed, ids, experts).to(y.dtype)), "combine differs from its twin"
    together = ours.whole(x, ids, topk_weights, configs)
    assert torch.equal(together, y), "the whole differs from its stages"
    errors["whole"] = relative(together, whole(x, ids, topk_weights, weights, small))
    # An activation squeezes or stretches errors of its input by a bounded factor; swiglu and silu by up to 1.1 and 2.
    for stage, factor in (("gate_up", 2), ("down", 1)):
        assert errors[stage] <= bound * factor, (shape, scheme, m, stage, errors[stage], bound)
    return errors


def quantized(
    x: torch.Tensor, w: HopperWeights, element: str | None, what: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernel multiplies with w, after comparing it bit for bit with the twin."""
    left, factors = activations(x, element, None, w.x_format, w.orders_x)
    if element is not None:
        out = "bf16" if w.x_format == "bf16" else "row"
        direct = element == "e4m3" and out == "row"
        twin, twin_factors = quant_mx_torch(x, None if direct else element, out, ordered=w.orders_x)
        assert torch.equal(left.view(torch.uint8), twin.view(torch.uint8)), f"{what} differs from its twin"
        assert factors is None or torch.equal(factors, twin_factors), f"{what}: factors differ from the twin's"
    return left, factors


def values_of(left: torch.Tensor, factors: torch.Tensor | None, w: HopperWeights) -> torch.Tensor:
    """fp64 [M, K] in the order of K: what the kernel takes for x."""
    if w.orders_x:
        left = in_x_order(left)[:, : w.k]
    return left.double() * (1 if factors is None else factors.double()[:, None])
