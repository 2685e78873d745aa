"""The config space of the Hopper MoE GEMMs and a search through it, for `bench.moe --tune`.

    for i in $(seq 0 13); do python -m bench.moe_tune --part $i --parts 14 --shapes ... & done; wait

fills Triton's cache with all kernels of a search beforehand, on as many cores.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sglang_amd_quant.kernels.triton.hopper import HopperConfig, activations
from sglang_amd_quant.kernels.triton.routing import route

from bench.timing import graph_us

SHARED_MEMORY = 227 << 10

timings: list[dict[str, Any]] = []
"""What the last search timed: gemm, us and the config's fields."""


# What searches of all tiles, depths and stages have chosen at least once, and neighbours of these: block_n, block_k,
# num_warps, num_stages, run.
SPACE = {
    16: ((64, 128, 4, 6, 1), (128, 64, 4, 4, 1), (128, 64, 4, 6, 1), (128, 64, 4, 6, 2), (128, 64, 4, 6, 4)),
    32: ((128, 64, 4, 6, 1), (128, 128, 4, 4, 1), (128, 64, 4, 6, 2)),
    64: ((128, 64, 4, 4, 1), (128, 64, 4, 6, 1), (128, 128, 8, 4, 1), (256, 64, 8, 4, 1), (128, 64, 4, 6, 2)),
    128: ((128, 64, 4, 4, 1), (128, 128, 8, 4, 1), (256, 64, 8, 4, 1), (256, 64, 8, 6, 1)),
    256: ((128, 64, 8, 4, 1),),
}


def everything(x_format: str, w_format: str) -> list[HopperConfig]:
    """All configs that fit into shared memory."""
    configs = [
        HopperConfig(block_m, n, k, warps, stages, run=run)
        for block_m, tiles in SPACE.items()
        for n, k, warps, stages, run in tiles
    ]
    return [c for c in configs if c.shared_bytes(x_format, w_format) + 4096 <= SHARED_MEMORY]


def candidates(m: int, top_k: int, experts: int, x_format: str, w_format: str) -> dict[int, list[HopperConfig]]:
    """block_m -> configs that fit into shared memory, for the block_m's near the number of rows an expert gets."""
    rows = m * top_k / experts
    space: dict[int, list[HopperConfig]] = {}
    for config in everything(x_format, w_format):
        if min(64, rows / 3) <= config.block_m <= max(16, 4 * rows):
            space.setdefault(config.block_m, []).append(config)
    return space


def tune(
    ours: Any,
    x: torch.Tensor,
    routings: Sequence[tuple[torch.Tensor, torch.Tensor]],
    space: dict[int, list[HopperConfig]],
) -> tuple[HopperConfig, HopperConfig]:
    """The fastest pair of configs of one block_m: each GEMM is timed alone with each config."""
    xf, rows = ours.w13.x_format, routings[0][0].numel()
    hidden = torch.empty(rows, ours.shape.inter, dtype=x.dtype, device=x.device)
    routed = torch.empty(rows, ours.shape.hidden, dtype=x.dtype, device=x.device)
    left13 = activations(x, ours.element, None, xf)
    left2 = activations(torch.randn_like(hidden), ours.element, None, xf)
    best: tuple[float, HopperConfig, HopperConfig] | None = None
    timings.clear()
    for block_m, configs in space.items():
        placed = [(route(i, ours.shape.experts, block_m), w) for i, w in routings]
        first, second = [], []
        for n, c in enumerate(configs):
            first.append((graph_us([partial(ours.gate_up, *left13, hidden, r, c) for r, _ in placed], 5), n, c))
            second.append((graph_us([partial(ours.down, *left2, routed, r, c, w) for r, w in placed], 5), n, c))
        for gemm, timed in (("gate_up", first), ("down", second)):
            timings.extend({"gemm": gemm, "us": us, **vars(c)} for us, _, c in timed)
        (us13, _, c13), (us2, _, c2) = min(first), min(second)
        if best is None or us13 + us2 < best[0]:
            best = (us13 + us2, c13, c2)
    assert best is not None
    return best[1], best[2]


def compile_part(shapes: list[str], schemes: list[str], ms: list[int], part: int, parts: int) -> int:
    """Launch every `parts`-th config of a search once on two experts. Returns how many."""
    from bench.moe import SCHEMES, Ours
    from bench.moe_problem import SHAPES, Shape, random_routing, random_weights

    done = 0
    for name in shapes:
        s = SHAPES[name]
        small = Shape(2, 2, s.hidden, s.inter, s.activation, s.bias, s.element)
        for scheme in schemes:
            if SCHEMES[scheme][0] != s.element:
                continue
            ours = Ours(small, random_weights(small, 0), scheme)
            ours.shape = Shape(2, s.top_k, s.hidden, s.inter, s.activation, s.bias, s.element)
            xf, wf = ours.w13.x_format, ours.w13.w_format
            configs = {c for m in ms for cs in candidates(m, s.top_k, s.experts, xf, wf).values() for c in cs}
            for config in sorted(configs, key=str)[part::parts]:
                ids, weights = random_routing(4, small, 0)
                ids, weights = ids.repeat(1, s.top_k // 2).contiguous(), weights.repeat(1, s.top_k // 2).contiguous()
                ours.whole(torch.randn(4, s.hidden, device="cuda").bfloat16(), ids, weights, (config, config))
                done += 1
    torch.cuda.synchronize()
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--schemes", required=True)
    parser.add_argument("--m", required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    a = parser.parse_args()
    rows = [int(m) for m in a.m.split(",")]
    print(compile_part(a.shapes.split(","), a.schemes.split(","), rows, a.part, a.parts), "configs compiled")
