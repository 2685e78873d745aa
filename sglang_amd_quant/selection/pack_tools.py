"""What a set of packs must hold to, and how packs are compared and joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.legality import legal
from sglang_amd_quant.selection.lookup import PADDED_TO
from sglang_amd_quant.selection.pack_csv import MEASURED, PackError, PackRow, load_file
from sglang_amd_quant.selection.packs import Packs, pack_files
from sglang_amd_quant.selection.problem import GemmProblem
from sglang_amd_quant.selection.specs import kernels
from sglang_amd_quant.shapes import cards, load, plan

PARALLEL = (1, 2, 4, 8)
"""TP and EP for which the planner is asked."""

Shape = tuple[str, int, int]
"""op, N, K."""


class Finding(NamedTuple):
    """One thing wrong: `kind` is unreadable, duplicate, illegal, stale, unplanned or misfiled."""

    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.text}"


def lint(places: Iterable[str | Path]) -> tuple[list[Finding], int]:
    """Everything wrong with the packs in these files and folders, taken as one set, and how many entries were read.

    Raises:
        PackError: a place that does not exist.
    """
    findings, rows = [], []
    for path in dict.fromkeys(pack_files(places)):
        try:
            rows += load_file(path)
        except PackError as error:
            findings.append(Finding("unreadable", error.what, error.reason))
    for owners in Packs(rows).duplicates():
        first, *others = owners
        findings += (Finding("duplicate", other.place, f"this shape is owned by {first.place}") for other in others)
    for row in rows:
        findings += _lint_row(row)
    return findings, len(rows)


def _lint_row(row: PackRow) -> Iterator[Finding]:
    folders = Path(row.file).parts[:-1]
    for what, value, known in (("arch", row.arch, ARCHES), ("scheme", row.scheme, SCHEMES)):
        named = {folder for folder in folders[-2:] if folder in known}
        if named and value not in named:
            yield Finding("misfiled", row.place, f"{what} {value} in a folder named {', '.join(sorted(named))}")
    if row.kernel not in kernels():
        yield Finding("stale", row.place, f"no kernel is named {row.kernel} in this version")
    else:
        yield from (Finding("illegal", row.place, text) for text in illegal(row))
    if (row.op, row.n, row.k) not in planned_shapes(row.scheme):
        shape = f"{row.op} {row.scheme} N={row.n} K={row.k}"
        yield Finding("unplanned", row.place, f"no model card at TP, EP of {PARALLEL} has {shape}, padded or not")


def illegal(row: PackRow) -> list[str]:
    """Why an entry can never run, whatever it measured; empty if it can."""
    spec = kernels()[row.kernel]
    try:
        problem = problem_of_row(row)
    except AmdMxError as error:
        return [f"no such problem: {error.reason}"]
    if not spec.covers(problem):
        return [reason.text for reason in legal(problem, spec, row.config)]
    unknown = {"a_div", "block_n"} if row.top_k is None else set()
    found = legal(problem, spec, row.config.over(spec.configure(problem)))
    return [reason.text for reason in found if not reason.estimate and reason.rule not in unknown]


def problem_of_row(row: PackRow) -> GemmProblem:
    """A problem that the entry is for; dimensions that it leaves open take their least value.

    Raises:
        ShapeError: there is no such problem.
    """
    top_k = row.top_k or 1
    experts = row.e or 1
    keyed = row.config.block_m or 0 if row.m is None and row.m_routed is None else 0
    m = row.m or -(-(row.m_routed or keyed) // top_k)
    return GemmProblem(
        row.op, row.scheme, row.arch, m, row.n, row.k, row.cu_num or 0, experts, max(experts * (row.ep or 1), top_k),
        top_k, row.tp or 1, row.ep or 1, layout=row.layout, group=row.group or 0, block_m=keyed,
    )  # fmt: skip


@lru_cache(maxsize=16)
def planned_shapes(scheme: str) -> frozenset[Shape]:
    """Every (op, N, K) that the planner gives for any model card at any TP and EP, as it is and padded to 256."""
    found: set[Shape] = set()
    for name in cards():
        facts = load(name)
        for tp in PARALLEL:
            for ep in PARALLEL:
                for fuse_shared in (None, False):
                    try:
                        gemms = plan(facts, tp, ep, scheme, fuse_shared=fuse_shared, mtp=True)
                    except AmdMxError:
                        continue  # this model cannot be divided so: it asks for no shape
                    for gemm in gemms:
                        found |= {(gemm.op, gemm.N, gemm.K), (gemm.op, *gemm.padded(PADDED_TO))}
    return frozenset(found)


class Change(NamedTuple):
    """A key whose entry differs between two packs; None = not there."""

    before: PackRow | None
    after: PackRow | None

    @property
    def kind(self) -> str:
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    @property
    def row(self) -> PackRow:
        """The entry as it is after, or was before if it is gone."""
        row = self.after or self.before
        assert row is not None
        return row

    def __str__(self) -> str:
        what = f"{self.kind:8} {describe(self.row)}"
        if self.before is None or self.after is None:
            return f"{what}: {self.row.kernel} [{self.row.config}]"
        differing = [
            f"{name} {getattr(self.before, name)} -> {getattr(self.after, name)}"
            for name in ("kernel", "config", "us", "err", "peer_us", "source")
            if getattr(self.before, name) != getattr(self.after, name)
        ]
        if self.before.us and self.after.us:
            differing.append(f"{100 * (self.after.us / self.before.us - 1):+.1f} % time")
        return f"{what}: {', '.join(differing)}"


_COMPARED = tuple(name for name in PackRow._fields if name not in ("file", "line", "date", "tp", "ep", "note"))


def diff(before: Sequence[PackRow], after: Sequence[PackRow]) -> list[Change]:
    """What differs between two packs, by key; file, line, date, note, tp and ep do not count."""
    a, b = _owners(before), _owners(after)
    changes = [Change(a.get(key), b.get(key)) for key in dict.fromkeys((*a, *b))]
    return [c for c in changes if not (c.before and c.after) or _compared(c.before) != _compared(c.after)]


def _owners(rows: Sequence[PackRow]) -> dict[tuple[object, ...], PackRow]:
    """The first entry of each key."""
    owners: dict[tuple[object, ...], PackRow] = {}
    for row in rows:
        owners.setdefault(row.key, row)
    return owners


def _compared(row: PackRow) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in _COMPARED)


def merge(packs: Sequence[Sequence[PackRow]], prefer: str = "") -> tuple[list[PackRow], list[list[PackRow]]]:
    """Join packs, one owner a key, sorted by key.

    A measured entry replaces a published one. Of several measured, or several published, `prefer` decides: `first`,
    `last`, or `faster` (the least us, among entries of one device); without it they are left out and returned.

    Returns:
        The entries, and the keys that stay in conflict, each as its rows.
    """
    groups: dict[tuple[object, ...], list[PackRow]] = {}
    for rows in packs:
        for row in rows:
            groups.setdefault(row.key, []).append(row)
    merged, conflicts = [], []
    for rows in groups.values():
        best = [row for row in rows if row.source == MEASURED] or rows
        if len({_compared(row) for row in best}) == 1:
            merged.append(best[0])
        elif prefer == "faster" and len({row.device for row in best}) == 1 and all(row.us for row in best):
            merged.append(min(best, key=lambda row: row.us or 0.0))
        elif prefer in ("first", "last"):
            merged.append(best[0 if prefer == "first" else -1])
        else:
            conflicts.append(best)
    merged.sort(key=lambda row: tuple((value is not None, value) for value in row.key))
    return merged, conflicts


def describe(row: PackRow) -> str:
    """An entry's key in words."""
    stated = [
        f"{name}={value}"
        for name, value in (
            ("E", row.e), ("top_k", row.top_k), ("M", row.m), ("M_routed", row.m_routed), ("layout", row.layout),
            ("cu_num", row.cu_num), ("group", row.group),
        )
        if value is not None
    ]  # fmt: skip
    if row.m is None and row.m_routed is None:
        stated.append(f"BLOCK_M={row.config.block_m}")
    return f"{row.arch} {row.op} {row.scheme} {row.n}x{row.k} {' '.join(stated)}"
