"""Which M an entry stands for: aiter's padded lookup (#3974) and MoE tiers, and routing's tile height (#3580)."""

from __future__ import annotations

from sglang_amd_quant.selection.problem import GemmProblem

FINE = ((256, 16), (1024, 32), (4096, 64))
"""Granularity 0: M up to the first number is rounded up to the second; above all to 128 (`getPaddedM`, gl=0)."""

FINE_LAST = 128
COARSE_CAP_M, COARSE_CAP_N = 8192, 4096
"""Granularity 1: M above 8192 counts as 8192 where N > 4096; else the next power of two (`getPaddedM`, gl=1)."""

MOE_TIERS = (131_072, 32_768)
"""A fused MoE's M counts as the largest of these it reaches; below them as the next power of two."""

TUNING_MS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
"""Ms worth an entry (#3974): multiples of the granularities. 16384 and 32768 would never be looked up for N > 4096."""


def next_pow2(value: int) -> int:
    """The smallest power of two that is at least `value` (1 for 0)."""
    return 1 << max(0, value - 1).bit_length()


def padded_m(m: int, n: int, granularity: int) -> int:
    """aiter's `getPaddedM(M, N, K, gl)` for gl 0 (fine) and 1 (coarse)."""
    if granularity:
        return COARSE_CAP_M if m > COARSE_CAP_M and n > COARSE_CAP_N else next_pow2(m)
    step = next((step for limit, step in FINE if m <= limit), FINE_LAST)
    return -(-m // step) * step


def moe_m(m: int) -> int:
    """aiter's `get_padded_M` of the fused MoE."""
    return next((tier for tier in MOE_TIERS if m >= tier), next_pow2(m))


def padded_ms(problem: GemmProblem) -> tuple[int, ...]:
    """The Ms under which an entry for this problem may stand, in the order in which they are looked up."""
    if problem.moe:
        return (moe_m(problem.m),)
    return padded_m(problem.m, problem.n, 0), padded_m(problem.m, problem.n, 1)


def tuning_m(problem: GemmProblem) -> int:
    """The M at which to tune for this problem: the coarsest one that its lookup reaches."""
    return padded_ms(problem)[-1]


def block_bound(rows: int, experts: int, block_m: int) -> int:
    """The most blocks that `rows` routed rows can need: known without reading the routing.

    With fewer rows than experts each row may have a block of its own; else every expert may waste all but one row of
    its last block (aiter #3580's `n_blocks`).
    """
    return rows if rows <= experts else -(-(rows - experts + 1) // block_m) + experts - 1


def routed_block_m(problem: GemmProblem) -> int:
    """BLOCK_M that routing gives: next_pow2(tokens per expert), clamped to 16...128 (aiter #3580).

    Tokens per expert are M * top_k // E over *all* experts of the model: with expert parallelism a rank sees every
    token and keeps E_local / E_total of them. For a linear, E is 1.
    """
    if problem.block_m:
        return problem.block_m
    tokens = max(1, problem.rows // problem.e_total)
    return min(max(next_pow2(tokens), 16), 128)
