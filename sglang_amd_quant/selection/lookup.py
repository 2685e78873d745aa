"""What to try for a problem, in the order of the contract. Nothing here judges: `choose` applies `legal` to each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from math import log2
from typing import NamedTuple

from sglang_amd_quant.selection.buckets import padded_ms, routed_block_m
from sglang_amd_quant.selection.heuristics import default_tiles, heuristic_tiles, restage
from sglang_amd_quant.selection.pack_csv import PUBLISHED, At, PackRow, Shape
from sglang_amd_quant.selection.packs import Packs
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


def entry_shapes(problem: GemmProblem) -> list[Shape]:
    """Under which shapes entries may stand: the problem's own, and padded."""
    kind = (problem.arch, problem.op, problem.scheme)
    return [(*kind, n, k) for n, k in dict.fromkeys(((problem.n, problem.k), problem.padded(PADDED_TO)))]


def _entries(problem: GemmProblem, packs: Packs) -> Iterator[Candidate]:
    by_at = [found for shape in entry_shapes(problem) if (found := packs.shape(shape))]
    if not by_at:
        return
    wanted = _wanted(problem)
    steps: dict[str, list[tuple[tuple[float, ...], PackRow]]] = {"exact": [], "padded_m": [], "nearest_e": []}
    for at, rank in wanted.items():
        for row in (row for found in by_at for row in found.get(at, ())):
            if not _fits_layout(problem, row):
                continue
            distance = _e_distance(problem, row)
            if not distance and row.top_k in (None, problem.top_k):
                steps["padded_m" if rank else "exact"].append(((rank, *_soft(problem, row)), row))
            elif _same_side(problem, row.e):
                steps["nearest_e"].append(((distance, rank, *_soft(problem, row)), row))
    taken = set()
    for source, matches in steps.items():
        matches.sort(key=lambda match: match[0])  # stable: what is left is precedence
        for _, row in matches:
            taken.add(id(row))
            yield _candidate(problem, source, row)
    for row in islice((row for row in _donors(problem, by_at) if id(row) not in taken), DONORS):
        yield _candidate(problem, "borrowed", row)


def _wanted(problem: GemmProblem) -> dict[At, float]:
    """What an entry's M may be, with its rank: 0 for this very M, 1 and 2 for the padded ones."""
    ranks: dict[At, float] = {("block_m", routed_block_m(problem)): 0.0}
    for rank, m in enumerate((problem.m, *padded_ms(problem))):
        ranks.setdefault(("M", m), float(rank))
        ranks.setdefault(("M_routed", m * problem.top_k), float(rank))
    return ranks


def _fits_layout(problem: GemmProblem, row: PackRow) -> bool:
    group = row.group in (None, problem.group)
    return group and (row.layout is None or problem.layout in (None, row.layout))


def _e_distance(problem: GemmProblem, row: PackRow) -> float:
    return 0.0 if row.e in (None, problem.e_local) else abs(log2((row.e or 1) / problem.e_local))


def _soft(problem: GemmProblem, row: PackRow) -> tuple[bool, bool]:
    """Keys that prefer but do not exclude: another cu_num, and no E where others state it, come later."""
    return row.cu_num not in (None, problem.cu_count), row.e is None


def _donors(problem: GemmProblem, by_at: list[Mapping[At, list[PackRow]]]) -> Iterator[PackRow]:
    """Entries for another M, E or layout, the nearest M first; those beyond an E threshold after all others."""
    ats = {at: _m_distance(problem, at) for found in by_at for at in found if _may_lend(problem, at)}
    beyond: list[PackRow] = []
    for at in sorted(ats, key=lambda at: (ats[at], at)):
        rows = [row for found in by_at for row in found.get(at, ()) if row.group in (None, problem.group)]
        rows.sort(key=lambda row: (_e_distance(problem, row), *_soft(problem, row)))
        beyond += (row for row in rows if not _same_side(problem, row.e))
        yield from (row for row in rows if _same_side(problem, row.e))
    yield from beyond


def _may_lend(problem: GemmProblem, at: At) -> bool:
    """An entry for another M must be near, and on the same side of every bound that a rule sets on M."""
    rows = _rows_at(problem, at)
    if not rows:
        return True
    if _m_distance(problem, at) > DONOR_M_LOG2:
        return False
    return all(
        rule.holds_at(problem.m, problem.rows) == rule.holds_at(rows / problem.top_k, rows)
        for rule in rules_for(problem.arch, problem.op, problem.scheme)
    )


def _m_distance(problem: GemmProblem, at: At) -> float:
    rows = _rows_at(problem, at)
    if rows:
        return abs(log2(rows / problem.rows))
    block_m = at[1]
    return float(PROXY_BLOCK_M.index(block_m)) if block_m in PROXY_BLOCK_M else float(len(PROXY_BLOCK_M))


def _rows_at(problem: GemmProblem, at: At) -> int:
    """M_routed of an entry; 0 for one that is keyed by BLOCK_M and says nothing of M."""
    kind, value = at
    return {"M": value * problem.top_k, "M_routed": value, "block_m": 0}[kind]


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
