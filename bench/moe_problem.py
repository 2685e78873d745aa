"""The shapes that `bench.moe` measures, random weights and routing for them, and fp64 references."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sglang_amd_quant.formats import dequantize_mx
from sglang_amd_quant.ops.activation import Activation


@dataclass(frozen=True)
class Shape:
    """One model's experts on one rank.

    Attributes:
        experts, top_k, hidden, inter: E, top_k, H and the intermediate size.
        activation: between the GEMMs.
        bias: whether both GEMMs have one.
        element: of the weights.
        tp: the tensor parallelism it comes from.
    """

    experts: int
    top_k: int
    hidden: int
    inter: int
    activation: Activation
    bias: bool = False
    element: str = "e2m1"
    tp: int = 1

    @property
    def weight_bytes(self) -> int:
        """Data and scales of one expert."""
        elements = 3 * self.hidden * self.inter
        return elements * (17 if self.element == "e2m1" else 33) // 32

    @property
    def flops(self) -> int:
        """Of one routed row."""
        return 6 * self.hidden * self.inter


_OAI = Activation("swigluoai", interleaved=True, limit=7.0)
SHAPES = {
    "gpt-oss-120b-tp1": Shape(128, 4, 2880, 2880, _OAI, bias=True),
    "gpt-oss-120b-tp8": Shape(128, 4, 2880, 384, _OAI, bias=True, tp=8),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768, Activation("silu")),
    "minimax-m3-tp4": Shape(128, 4, 6144, 768, _OAI, element="e4m3", tp=4),
}


@dataclass(frozen=True)
class Weights:
    """w13 [E, 2 I, H], w2 [E, H, I]: codes and e8m0 scales, and biases, on the GPU."""

    w13: torch.Tensor
    s13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    element: str

    def dense(self, which: int, expert: int) -> torch.Tensor:
        """fp64 values of one expert's first or second matrix."""
        data, scales = ((self.w13, self.s13), (self.w2, self.s2))[which]
        return dequantize_mx(data[expert], scales[expert], self.element, torch.float64)


def random_weights(shape: Shape, seed: int, experts: int | None = None) -> Weights:
    """Fresh random codes; scales such that values are of the size of a model's and differ by 7 octaves."""
    e, g = experts or shape.experts, torch.Generator("cuda").manual_seed(seed)

    def matrix(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if shape.element == "e2m1":
            data = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, device="cuda", generator=g)
        else:
            data = torch.empty(e, n, k, dtype=torch.float8_e4m3fn, device="cuda")
            for expert in range(e):
                data[expert] = (torch.randn(n, k, device="cuda", generator=g) * 100).clamp(-448, 448)
        low = 114 if shape.element == "e2m1" else 107
        scales = torch.randint(low, low + 7, (e, n, k // 32), dtype=torch.uint8, device="cuda", generator=g)
        return data, scales

    w13, s13 = matrix(2 * shape.inter, shape.hidden)
    w2, s2 = matrix(shape.hidden, shape.inter)
    b13 = torch.randn(e, 2 * shape.inter, device="cuda", generator=g).bfloat16() if shape.bias else None
    b2 = torch.randn(e, shape.hidden, device="cuda", generator=g).bfloat16() if shape.bias else None
    return Weights(w13, s13, w2, s2, b13, b2, shape.element)


def random_routing(m: int, shape: Shape, seed: int, drop: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids [M, top_k] int32, distinct and uniform, and weights that sum to 1; a share `drop` of the ids is -1."""
    g = torch.Generator("cuda").manual_seed(seed)
    scores = torch.rand(m, shape.experts, device="cuda", generator=g)
    weights, ids = scores.topk(shape.top_k, dim=1)
    ids = ids.int()
    if drop:
        ids[torch.rand(ids.shape, device="cuda", generator=g) < drop] = -1
    return ids.contiguous(), (weights / weights.sum(1, keepdim=True)).contiguous()


def expert_rows(ids: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, its routed rows) for each expert that has some."""
    flat = ids.reshape(-1).long()
    for expert in range(experts):
        rows = torch.nonzero(flat == expert)[:, 0]
        if rows.numel():
            yield expert, rows


def grouped(
    x: torch.Tensor, ids: torch.Tensor, weights: Weights, which: int, divide: int, experts: int
) -> torch.Tensor:
    """fp64 [M * top_k, N]: row r of x // divide times its expert's matrix, plus bias; rows of dropped ids are zero."""
    n = (weights.w13, weights.w2)[which].shape[1]
    bias = (weights.b13, weights.b2)[which]
    y = torch.zeros(ids.numel(), n, dtype=torch.float64, device=x.device)
    for expert, rows in expert_rows(ids, experts):
        y[rows] = x[rows // divide].double() @ weights.dense(which, expert).T
        if bias is not None:
            y[rows] += bias[expert].double()
    return y


def whole(
    x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor, weights: Weights, shape: Shape
) -> torch.Tensor:
    """fp64 [M, H] of the whole MoE on x as it is, without rounding or quantizing anything between."""
    m = x.shape[0]
    hidden = shape.activation(grouped(x, ids, weights, 0, shape.top_k, shape.experts))
    routed = grouped(hidden, ids, weights, 1, 1, shape.experts).view(m, shape.top_k, -1)
    here = ((ids >= 0) & (ids < shape.experts)).unsqueeze(-1)
    return (torch.where(here, routed, 0) * topk_weights.double().unsqueeze(-1)).sum(1)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    """|y - exact| / |exact|; NaN if y has one."""
    return ((y.double() - exact).norm() / exact.norm()).item()
