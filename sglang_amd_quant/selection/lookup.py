"""What to try for a problem, in the order of the contract. Nothing here judges: `choose` applies `legal` to each."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import NamedTuple

from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.buckets import padded_ms
from sglang_amd_quant.selection.families import routed_block_m
from sglang_amd_quant.selection.heuristics import default_tiles, heuristic_tiles, restage
from sglang_amd_quant.selection.packs import PUBLISHED, PackRow, Packs
from sglang_amd_quant.selection.problem import Config, GemmProblem
from sglang_amd_quant.selection.rules import e_thresholds, rules_for
from sglang_amd_quant.selection.specs import KernelSpec, kernels

PADDED_TO = 256
"""Engines pad MXFP4 weights to this for a grouped GEMM, so entries stand under the padded shape (#3580)."""

PROXY_BLOCK_M = (16, 32, 64, 128)
"""Order in which an entry keyed by BLOCK_M lends itself to another BLOCK_M (#3580)."""

DONORS = 8
"""Entries that are tried as donors; the order is by nearness, and further ones would only be worse."""


DONOR_M_LOG2 = 2.0
"""How far a donor's M may be, in powers of two: the best tile moves with M."""


class Candidate(NamedTuple):
    """One thing to try.

    Attributes:
        source: one of `SOURCES`.
        kernel: its name, known or not.
        config: None if the candidate is out already.
        layout: the layout it is for; None = whatever the problem has, or the kernel prefers.
        measured: it ran, as it stands, at this BLOCK_M: the LDS estimate does not bind.
        why: where it comes from.
        out: reasons against it that were found on the way.
        us: the time its entry states.
    """

    source: str
    kernel: str
    config: Config | None
    layout: str | None
    measured: bool
    why: tuple[str, ...]
    out: tuple[str, ...] = ()
    us: float | None = None


def candidates(problem: GemmProblem, packs: Packs) -> Iterator[Candidate]:
    """Everything to try but the reference: entries, rules, heuristics, defaults."""
    yield from _entries(problem, packs)
    yield from _rules(problem)
    covering = [spec for spec in kernels().values() if spec.triton and spec.covers(problem)]
    for source, tiles in (("heuristic", heuristic_tiles), ("default", default_tiles)):
        for spec in covering:
            for tile in tiles(problem, spec):
                yield Candidate(source, spec.name, tile.config, None, False, (tile.why,))


class _Match(NamedTuple):
    """How an entry relates to a problem: its step of the lookup, and its place within that step."""

    source: str
    order: tuple[float, ...]
    row: PackRow


def _entries(problem: GemmProblem, packs: Packs) -> Iterator[Candidate]:
    rows = packs.shape(problem.arch, problem.op, problem.scheme, problem.n, problem.k)
    padded = problem.padded(PADDED_TO)
    if padded != (problem.n, problem.k):
        rows = rows + packs.shape(problem.arch, problem.op, problem.scheme, *padded)
    if not rows:
        return
    matches: dict[str, list[_Match]] = {"exact": [], "padded_m": [], "nearest_e": [], "borrowed": []}
    for place, row in enumerate(rows):
        match = _match(problem, row, place)
        if match:
            matches[match.source].append(match)
    for source, found in matches.items():
        found.sort()
        for match in found if source != "borrowed" else found[:DONORS]:
            yield _candidate(problem, source, match.row)


def _match(problem: GemmProblem, row: PackRow, place: int) -> _Match | None:
    if row.group not in (None, problem.group):
        return None
    m_rank = _m_rank(problem, row)
    e_log = 0.0 if row.e is None else abs(log2(row.e / problem.e_local))
    same_routing = row.top_k in (None, problem.top_k)
    soft = (float(row.cu_num not in (None, problem.cu_count)), float(row.e is None), float(place))
    for_layout = row.layout is None or problem.layout in (None, row.layout)
    if m_rank is not None and for_layout:
        if not e_log and same_routing:
            return _Match("exact" if m_rank == 0 else "padded_m", (m_rank, *soft), row)
        if _same_side(problem, row.e):
            return _Match("nearest_e", (e_log, m_rank, *soft), row)
    if not _may_lend(problem, row):
        return None
    far_e = float(not _same_side(problem, row.e))
    return _Match("borrowed", (far_e, _m_distance(problem, row), e_log, *soft), row)


def _m_rank(problem: GemmProblem, row: PackRow) -> float | None:
    """0 where the entry is for this very M, 1 and 2 for the padded Ms, None for another M."""
    if row.m is None and row.m_routed is None:
        return 0.0 if row.config.block_m == routed_block_m(problem) else None
    for rank, m in enumerate((problem.m, *padded_ms(problem))):
        if m == row.m or (row.m_routed is not None and m * problem.top_k == row.m_routed):
            return float(rank)
    return None


def _may_lend(problem: GemmProblem, row: PackRow) -> bool:
    """An entry for another M must be near, and on the same side of every bound that a rule sets on M."""
    rows = row.m_routed or (row.m or 0) * problem.top_k
    if not rows:
        return True
    if _m_distance(problem, row) > DONOR_M_LOG2:
        return False
    return all(
        rule.holds_at(problem.m, problem.rows) == rule.holds_at(rows / problem.top_k, rows)
        for rule in rules_for(problem.arch, problem.op, problem.scheme)
    )


def _m_distance(problem: GemmProblem, row: PackRow) -> float:
    rows = row.m_routed or (row.m or 0) * problem.top_k
    if rows:
        return abs(log2(rows / problem.rows))
    block_m = row.config.block_m
    return float(PROXY_BLOCK_M.index(block_m)) if block_m in PROXY_BLOCK_M else float(len(PROXY_BLOCK_M))


def _same_side(problem: GemmProblem, e: int | None) -> bool:
    if e is None:
        return True
    thresholds = e_thresholds(problem.arch, problem.op, problem.scheme)
    return all((e >= t) == (problem.e_local >= t) for t in thresholds)


def _candidate(problem: GemmProblem, source: str, row: PackRow) -> Candidate:
    spec = kernels().get(row.kernel)
    why = _provenance(problem, source, row)
    if spec is None:
        stale = "no such kernel in this version (stale entry)"
        return Candidate(source, row.kernel, None, row.layout, False, why, (stale,))
    layout = row.layout if problem.layout is None else None
    config = row.config.over(_defaults(spec, problem))
    if source == "borrowed":
        donor = config
        config = restage(problem, spec, config)
        changed = [f"{n}={v}" for n, v in config.items() if dict(donor.items()).get(n) != v]
        why += (f"re-staged: {' '.join(changed)}",) if changed else ()
        return Candidate(source, row.kernel, config, layout, False, why)
    return Candidate(source, row.kernel, config, layout, True, why, us=row.us)


def _defaults(spec: KernelSpec, problem: GemmProblem) -> Config:
    """The kernel's defaults; none where it does not even have this op."""
    return spec.configure(problem) if spec.covers(problem) else Config()


def _provenance(problem: GemmProblem, source: str, row: PackRow) -> tuple[str, ...]:
    at = f"M={row.m}" if row.m else f"M_routed={row.m_routed}" if row.m_routed else f"BLOCK_M={row.config.block_m}"
    experts = f", E={row.e or 'any'}" if problem.moe else ""
    out = [f"{row.source} entry {_short(row.file)}:{row.line} for {at}{experts}"]
    if row.source == PUBLISHED:
        out[0] += f" ({row.note})"
    if (row.n, row.k) != (problem.n, problem.k):
        out.append(f"the entry stands under the shape padded to {PADDED_TO}: {row.n} x {row.k}")
    if row.cu_num not in (None, problem.cu_count):
        out.append(f"tuned on {row.cu_num} compute units, this device has {problem.cu_count}")
    if source in ("nearest_e", "borrowed") and row.e not in (None, problem.e_local):
        out.append(f"E={row.e} stands in for E={problem.e_local}")
    if source == "borrowed" and row.layout is not None and problem.layout not in (None, row.layout):
        out.append(f"tuned for layout {row.layout}")
    return tuple(out)


def _short(file: str) -> str:
    return "/".join(file.split("/")[-3:])


def _rules(problem: GemmProblem) -> Iterator[Candidate]:
    for rule in rules_for(problem.arch, problem.op, problem.scheme):
        spec = kernels()[rule.kernel]
        misses = rule.misses(problem)
        config = None if misses else spec.configure(problem)
        out = tuple(f"outside of the rule of {rule.origin}: {miss}" for miss in misses)
        yield Candidate("rule", rule.kernel, config, None, False, (f"rule of {rule.origin}",), out)


def known_arch(problem: GemmProblem) -> bool:
    """Whether selection has any facts of the problem's arch."""
    return problem.arch in ARCHES
