"""The kinds of rules that `rules.py` tabulates: what was measured to hold for a range of problems, not one shape."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.selection.problem import GemmProblem

Range = tuple[int, int | None]
"""Both ends included; None = no upper end."""


@dataclass(frozen=True)
class Rule:
    """`kernel` wins for every problem within these bounds.

    Attributes:
        kernel, arch, op, scheme: what runs where.
        origin: who measured it.
        m, rows, n, k: ranges of M, M_routed, N and K; None = any.
        a_div: output rows that share an input row; None = any.
        weighted: whether the routing weight is multiplied in; None = either.
        e_min: least E_local. More experts mean more padding rows, on which a tiled kernel wastes more than a GEMV.
    """

    kernel: str
    arch: str
    op: str
    scheme: str
    origin: str
    m: Range | None = None
    rows: Range | None = None
    n: Range | None = None
    k: Range | None = None
    a_div: int | None = None
    weighted: bool | None = None
    e_min: int = 0

    def holds_at(self, m: float, rows: float) -> bool:
        """Whether M and M_routed alone are within the bounds."""
        return _within(m, self.m) and _within(rows, self.rows)

    def misses(self, problem: GemmProblem) -> tuple[str, ...]:
        """Why the problem is outside of the bounds; empty if it is inside."""
        out = [
            f"{what}={value} is outside of {_show(bounds)}"  # type: ignore[arg-type]
            for what, value, bounds in (
                ("M", problem.m, self.m),
                ("M_routed", problem.rows, self.rows),
                ("N", problem.n, self.n),
                ("K", problem.k, self.k),
            )
            if not _within(value, bounds)
        ]
        if self.a_div not in (None, problem.a_div):
            out.append(f"a_div={problem.a_div} is not {self.a_div}")
        if self.weighted not in (None, problem.weighted):
            out.append(f"weighted={problem.weighted}")
        if problem.e_local < self.e_min:
            out.append(f"E={problem.e_local} is below {self.e_min}")
        return tuple(out)


def _within(value: float, bounds: Range | None) -> bool:
    return bounds is None or (bounds[0] <= value and (bounds[1] is None or value <= bounds[1]))


def _show(bounds: Range) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}...{'' if high is None else high}"


@dataclass(frozen=True)
class LayoutRule:
    """`layout` wins for weights shared by at most `moe_tp_max` ranks, where `kernel`, if any, may be chosen; if
    `activated`, if an activation is part of the GEMM."""

    arch: str
    scheme: str
    ops: tuple[str, ...]
    layout: str
    origin: str
    moe_tp_max: int | None = None
    kernel: str = ""
    activated: bool = False

    def holds(self, problem: GemmProblem) -> bool:
        kind = (self.arch, self.scheme) == (problem.arch, problem.scheme) and problem.op in self.ops
        within = self.moe_tp_max is None or problem.moe_tp <= self.moe_tp_max
        return kind and within and (not self.activated or problem.epilogue.activation is not None)


@dataclass(frozen=True)
class TileRule:
    """An arch's heuristic for one BLOCK_M of one Triton kernel.

    Attributes:
        block_m: the tile's height.
        routed: the rule is for problems to which routing gives this BLOCK_M; otherwise it sets BLOCK_M itself.
        n_ladder: BLOCK_N by N: the first whose bound (None = any) N does not exceed.
        block_k, num_warps: the rest of the tile.
        num_stages: fixed, or None for as many (up to 2) as fit the LDS.
        n_pow2_max: BLOCK_N = next_pow2(N) up to this instead of the ladder.
        shrink: (b, g): while BLOCK_N >= b and the grid has fewer than g workgroups (0 = one a CU), BLOCK_N halves.
        rows: bounds of M_routed; None = any.
        k_min: least K.
        ops: empty = any.
    """

    kernel: str
    arch: str
    origin: str
    block_m: int
    n_ladder: tuple[tuple[int | None, int], ...] = ((None, 128),)
    block_k: int = 256
    num_warps: int = 4
    num_stages: int | None = None
    n_pow2_max: int = 0
    shrink: tuple[int, int] | None = None
    rows: Range | None = None
    k_min: int = 0
    ops: tuple[str, ...] = ()
    routed: bool = False

    def holds(self, problem: GemmProblem, block_m: int) -> bool:
        """Whether it speaks of a problem to which routing gives `block_m`."""
        return (
            (not self.routed or self.block_m == block_m)
            and (not self.ops or problem.op in self.ops)
            and problem.k >= self.k_min
            and _within(problem.rows, self.rows)
            and any(bound is None or problem.n <= bound for bound, _ in self.n_ladder)
        )
