"""The config space of the Hopper MoE GEMMs and a search through it, for `bench.moe --tune`.

    for i in $(seq 0 14); do python -m bench.moe_tune --part $i --parts 15 --shapes ... & done; wait

compares every config of a search with fp64, on few tokens and a small layer, and thereby fills Triton's cache with all
its kernels beforehand, on as many cores.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sglang_amd_quant.kernels.triton.hopper import HopperConfig

from bench.arguments import names
from bench.moe_ours import SCHEMES, Configs, check
from bench.moe_problem import SHAPES, Shape
from sglang_amd_quant.cli.arguments import whole, wholes

# What searches of all tiles, depths and stages have chosen at least once, and neighbours of these: block_n, block_k,
# num_warps, num_stages, max_registers.
FEW = (
    (64, 128, 4, 4, 0), (64, 128, 4, 6, 0), (128, 64, 4, 4, 0), (128, 64, 4, 4, 64), (128, 64, 4, 4, 80),
    (128, 64, 4, 6, 0), (128, 64, 4, 6, 64), (128, 64, 4, 8, 0), (128, 128, 4, 4, 0), (128, 128, 4, 6, 0),
)  # fmt: skip
SPACE = {
    8: FEW,
    16: FEW,
    32: ((64, 128, 4, 6, 0), (128, 64, 4, 4, 0), (128, 64, 4, 6, 0), (128, 64, 4, 8, 0), (128, 128, 4, 4, 0)),
    64: ((128, 64, 4, 4, 0), (128, 64, 4, 6, 0), (128, 128, 4, 4, 0), (128, 128, 8, 4, 0), (256, 64, 8, 4, 0)),
    128: ((128, 64, 4, 4, 0), (128, 128, 8, 4, 0), (256, 64, 8, 4, 0), (256, 64, 8, 6, 0)),
    256: ((128, 64, 8, 4, 0),),
}  # fmt: skip


def everything(x_format: str, w_format: str) -> list[HopperConfig]:
    """All configs that fit into shared memory."""
    configs = [
        HopperConfig(block_m, n, k, warps, stages, max_registers=registers)
        for block_m, tiles in SPACE.items()
        for n, k, warps, stages, registers in tiles
    ]
    return [c for c in configs if c.fits(x_format, w_format)]


def candidates(m: int, top_k: int, experts: int, x_format: str, w_format: str) -> dict[int, list[HopperConfig]]:
    """block_m -> configs that fit into shared memory, for the block_m's near the number of rows an expert gets."""
    rows = m * top_k / experts
    space: dict[int, list[HopperConfig]] = {}
    for config in everything(x_format, w_format):
        if min(64, rows / 3) <= config.block_m <= max(8, 4 * rows):
            space.setdefault(config.block_m, []).append(config)
    return space


class Found(NamedTuple):
    """What a search came to: the pair of configs, and how many pairs it timed."""

    configs: Configs
    timed: int


def tune(time: Callable[[Configs], float], space: dict[int, list[HopperConfig]], start: Configs) -> Found:
    """The fastest pair of configs of one block_m, by the time of the *whole* MoE: gate_up's first, then down's.

    A GEMM timed by itself, launch after launch, never waits for what is in front of it, and chooses as if launches
    cost nothing.
    """
    best: tuple[float, Configs] | None = None
    timed: dict[Configs, float] = {}

    def of(pair: Configs) -> float:
        if pair not in timed:
            timed[pair] = time(pair)
        return timed[pair]

    for block_m, configs in space.items():
        first, second = start if block_m == start[0].block_m else (configs[0], configs[0])
        first = min((first, *configs), key=lambda c: of((c, second)))
        second = min((second, *configs), key=lambda c: of((first, c)))
        pair = (first, second)
        if best is None or of(pair) < best[0]:
            best = (of(pair), pair)
    assert best is not None
    return Found(best[1], len(timed))


def checked_configs(shapes: list[str], schemes: list[str], ms: Sequence[int], part: int, parts: int) -> int:
    """Compare every `parts`-th config of a search with fp64, as one token alone and as many. Returns how many."""
    done = 0
    for name in shapes:
        s = SHAPES[name]
        small = Shape(max(8, s.top_k), s.top_k, s.hidden, s.inter, s.activation, s.bias, s.element)  # K is compiled in
        for scheme in schemes:
            element, _, x_format = SCHEMES[scheme]
            if element != s.element:
                continue
            configs = {
                c for m in ms for cs in candidates(m, s.top_k, s.experts, x_format, element).values() for c in cs
            }
            for config in sorted(configs, key=str)[part::parts]:
                for m in (1, 61) if config.block_m <= 16 else (61,):
                    check(small, scheme, m, 17, config)
                done += 1
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names(SHAPES), required=True, help="of " + ", ".join(SHAPES))
    parser.add_argument("--schemes", type=names(SCHEMES), required=True, help="of " + ", ".join(SCHEMES))
    parser.add_argument("--m", type=wholes, required=True, help="tokens, comma-separated")
    parser.add_argument("--part", type=int, default=0, help="which part of the configs, from 0 on")
    parser.add_argument("--parts", type=whole, default=1, help="into how many parts they are dealt, a process each")
    a = parser.parse_args()
    if not 0 <= a.part < a.parts:
        parser.error(f"--part {a.part}: write a number from 0 to {a.parts - 1}, below --parts")
    count = checked_configs(a.shapes, a.schemes, a.m, a.part, a.parts)
    print(count, "configs agree with fp64")
