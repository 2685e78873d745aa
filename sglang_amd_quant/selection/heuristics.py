"""Untuned tiles: the arch's `TileRule` turned into a config, and the conservative default, both made to fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.buckets import block_bound, next_pow2, routed_block_m
from sglang_amd_quant.selection.lds import fitting_stages
from sglang_amd_quant.selection.legality import MX_OUT_COLUMNS, lds_need, operand_bits
from sglang_amd_quant.selection.problem import MX_OUT, Config, GemmProblem
from sglang_amd_quant.selection.rule_types import TileRule
from sglang_amd_quant.selection.rules import TILE_RULES
from sglang_amd_quant.selection.specs import KernelSpec


def block_n_floor(problem: GemmProblem) -> int:
    """Least BLOCK_N: 64 where MX output needs 32 columns of what a gated activation halves (#3580), else 32."""
    return MX_OUT_COLUMNS * (2 if problem.out_dtype in MX_OUT else 1)


class Tile(NamedTuple):
    """A config and where it comes from."""

    config: Config
    why: str


def heuristic_tiles(problem: GemmProblem, kernel: KernelSpec) -> Iterator[Tile]:
    """What the arch's rules say for this problem, best first; each made to fit by `fit`."""
    block_m = routed_block_m(problem)
    for rule in TILE_RULES:
        if rule.kernel == kernel.name and rule.arch == problem.arch and rule.holds(problem, block_m):
            yield from fit(problem, kernel, _config(problem, kernel, rule), rule.origin)


def default_tiles(problem: GemmProblem, kernel: KernelSpec) -> Iterator[Tile]:
    """The kernel's own default, made to fit."""
    yield from fit(problem, kernel, kernel.configure(problem), "the kernel's conservative default")


def restage(problem: GemmProblem, kernel: KernelSpec, config: Config) -> Config:
    """A borrowed config at the BLOCK_M that routing gives here, with as many of its stages as fit there.

    The hole of #3580's proxy: it took the donor's stages along, tuned at another BLOCK_M, with no new look at LDS. Nor
    does a limit of registers go along, which sums of more rows would not leave room for.
    """
    if "block_m" in kernel.space and problem.moe:
        block_m = kernel.configure(problem).block_m or routed_block_m(problem)
        if block_m != config.block_m:
            params = tuple(p for p in config.params if p[0] != "max_registers")
            config = config._replace(block_m=block_m, params=params)
    if not kernel.triton or not config.num_stages or not all(config.tile):
        return config  # nothing to stage, or a malformed entry: `legal` says so
    return config._replace(num_stages=_stages(problem, kernel, config, config.num_stages) or 1)


def fit(problem: GemmProblem, kernel: KernelSpec, config: Config, why: str) -> Iterator[Tile]:
    """The config with fewer stages, then smaller BLOCK_N and BLOCK_K, until the LDS estimate is within the arch's."""
    if not kernel.triton:
        yield Tile(config, why)
        return
    asked = config
    stages = _stages(problem, kernel, config, config.num_stages or 2)
    while not stages:
        _, block_n, block_k = config.tile
        if block_n > block_n_floor(problem):
            config = config._replace(block_n=block_n // 2)
        elif block_k > min(kernel.space["block_k"]):
            config = config._replace(block_k=block_k // 2)
        else:
            return
        stages = _stages(problem, kernel, config, config.num_stages or 2)
    config = config._replace(num_stages=stages)
    yield Tile(config, why if config == asked else f"{why}, made to fit the LDS")


def _stages(problem: GemmProblem, kernel: KernelSpec, config: Config, at_most: int) -> int:
    arch = ARCHES.get(problem.arch)
    if kernel.lds is not None and arch is not None:
        tried = (config._replace(num_stages=stages) for stages in range(at_most, 0, -1))
        fits = (c for c in tried if c.num_stages in kernel.space["num_stages"])
        return next((c.num_stages or 0 for c in fits if lds_need(problem, kernel, c) <= arch.lds_bytes), 0)
    return fitting_stages(problem.arch, *config.tile, *operand_bits(problem, kernel), at_most)


def _config(problem: GemmProblem, kernel: KernelSpec, rule: TileRule) -> Config:
    block_n = next(bn for bound, bn in rule.n_ladder if bound is None or problem.n <= bound)
    if rule.n_pow2_max:
        block_n = min(max(next_pow2(problem.n), block_n_floor(problem)), rule.n_pow2_max)
    if rule.shrink:
        least, grid = rule.shrink[0], rule.shrink[1] or problem.cu_count
        rows = block_bound(problem.rows, problem.e_local, rule.block_m)
        while block_n >= least and block_n > block_n_floor(problem) and rows * -(-problem.n // block_n) < grid:
            block_n //= 2
    config = Config(rule.block_m, block_n, rule.block_k, num_warps=rule.num_warps, num_stages=rule.num_stages or 2)
    return config.over(kernel.configure(problem))
