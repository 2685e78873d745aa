"""The tables of `isa/`: what each instruction is, as rows of data.

A row names an instruction, its operands and either a C expression (from which `codegen` makes a function) or a
hand-written C function with parameters. See README.md, "Adding an instruction", for the syntax.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ISA = Path(__file__).parent / "isa"
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Type:
    """An operand type of the lane-wise and scalar tables: how registers become the C value of an expression."""

    ctype: str
    bits: int
    load: str  # from row {p} at lane {l}
    store: tuple[str, ...]  # values of the result's rows, from variable d


TYPES = {
    "b32": Type("u32", 32, "{p}[l]", ("d",)),
    "u32": Type("u32", 32, "{p}[l]", ("d",)),
    "i32": Type("i32", 32, "(i32){p}[l]", ("(u32)d",)),
    "f32": Type("f32", 32, "as_f32({p}[l])", ("as_u32(d)",)),
    "b16": Type("u32", 16, "{p}[l] & 0xFFFF", ("d & 0xFFFF",)),
    "u16": Type("u32", 16, "{p}[l] & 0xFFFF", ("d & 0xFFFF",)),
    "i16": Type("i32", 16, "(i16){p}[l]", ("(u32)d & 0xFFFF",)),
    "f16": Type("f32", 16, "f16_to_f32({p}[l] & 0xFFFF)", ("f32_to_f16(d)",)),
    "bf16": Type("f32", 16, "bf16_to_f32({p}[l] & 0xFFFF)", ("f32_to_bf16(d)",)),
    "b64": Type("u64", 64, "join({p}[l], {p}[l + LANES])", ("(u32)d", "(u32)(d >> 32)")),
    "u64": Type("u64", 64, "join({p}[l], {p}[l + LANES])", ("(u32)d", "(u32)(d >> 32)")),
    "i64": Type("i64", 64, "(i64)join({p}[l], {p}[l + LANES])", ("(u32)d", "(u32)(d >> 32)")),
    "f64": Type("f64", 64, "as_f64(join({p}[l], {p}[l + LANES]))", ("(u32)as_u64(d)", "(u32)(as_u64(d) >> 32)")),
    "mask": Type("u32", 1, "{p}[l]", ("d",)),
    "vcc": Type("u32", 1, "{p}[l]", ("d",)),
}


@dataclass(frozen=True)
class Row:
    """One instruction. `results` and `sources` are type names, or operand words for hand-written functions."""

    name: str
    table: str  # name of the file
    category: str  # what the counters call it
    results: tuple[str, ...]
    sources: tuple[str, ...]
    expression: str  # C; empty if `function` is set
    function: str = ""
    parameters: dict[str, str] = field(default_factory=dict)

    @cached_property
    def keeps_upper_half(self) -> bool:
        return any(r.endswith(".keep") for r in self.results)

    @cached_property
    def result(self) -> str | None:
        """Type of the main result, without `.keep` and `x2`; None if there is none or it is not typed."""
        plain = [r.removesuffix(".keep").removesuffix("x2") for r in self.results]
        return next((r for r in plain if r in TYPES), None)

    @cached_property
    def packed(self) -> bool:
        return any(r.endswith("x2") for r in self.results)

    @cached_property
    def reads_op_sel(self) -> bool:
        return "OP_SEL" in self.expression or "mix(" in self.expression

    @cached_property
    def source_types(self) -> tuple[str, ...]:
        """Types of the operands the assembler writes as sources (`old` and `vcc` are not among them)."""
        return tuple(s.removesuffix("x2") for s in self.sources if s not in ("old", "vcc"))


def _expand(line: str) -> list[str]:
    """`{x,y}` in the first column makes one line per choice; $1, $2 ... stand for the choices elsewhere."""
    names, *rest = line.split("|", 1)
    choices = [m.split(",") for m in _BRACES.findall(names)]
    lines = []
    for chosen in itertools.product(*choices):
        picks = iter(chosen)
        expanded = _BRACES.sub(lambda _, picks=picks: next(picks), names)
        columns = "".join("|" + column for column in rest)
        for number, pick in enumerate(chosen, 1):
            columns = columns.replace(f"${number}", pick)
        lines.append(expanded + columns)
    return lines


def _row(table: str, category: str, line: str) -> Row:
    name, operands, body = (column.strip() for column in line.split("|", 2))
    results, equals, sources = operands.partition("=")
    if not equals:
        results, sources = "", operands
    function, parameters = "", {}
    if body.startswith("@"):
        function, *words = body[1:].split()
        parameters = dict(word.split("=") for word in words)
        body = ""
    return Row(name, table, category, tuple(results.split()), tuple(sources.split()), body, function, parameters)


@dataclass(frozen=True)
class Atomic:
    """One row of atomic.isa."""

    global_names: tuple[str, ...]
    lds_names: tuple[str, ...]
    type: str
    expression: str


@cache
def atomics() -> tuple[Atomic, ...]:
    found = []
    for line in _lines("atomic"):
        vector, lds, kind, expression = (column.strip() for column in line.split("|", 3))
        found.append(Atomic(tuple(vector.split()), tuple(lds.split()), kind, expression))
    return tuple(found)


def _atomic_rows() -> list[Row]:
    rows = []
    for number, atomic in enumerate(atomics()):
        bits = TYPES[atomic.type].bits
        swaps = "c" in re.findall(r"\b[abc]\b", atomic.expression)
        shared = {"bytes": str(bits // 8), "atomic": str(number), "flag": str(int(swaps))}
        for space, name in itertools.product(("global", "flat", "buffer"), atomic.global_names):
            address = ("resource", "soffset") if space == "buffer" else ("saddr",)
            operands = ("vdata", "vaddr", *address) if space == "buffer" else ("vaddr", "vdata", *address)
            rows.append(
                Row(
                    f"{space}_atomic_{name}",
                    "atomic",
                    "atomic",
                    (),
                    operands,
                    "",
                    "atomic_memory",
                    shared | {"space": space},
                )
            )
        for name in atomic.lds_names:
            data = ("vdata1", "vdata2") if swaps else ("vdata1",)
            stem, _, kind = name.rpartition("_")
            returning = f"ds_{stem}_rtn_{kind}"
            rows.append(Row(f"ds_{name}", "atomic", "lds", (), ("vaddr", *data), "", "ds_atomic", shared))
            rows.append(
                Row(
                    returning, "atomic", "lds", (), ("vdst", "vaddr", *data), "", "ds_atomic", shared | {"returns": "1"}
                )
            )
    return rows


def _lines(table: str) -> list[str]:
    text = (ISA / f"{table}.isa").read_text()
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@cache
def rows() -> dict[str, Row]:
    """Every instruction by its mnemonic (without encoding suffixes such as _e32). Raises ValueError on a duplicate."""
    found: list[Row] = []
    for table in ("salu", "valu", "float", "memory", "matrix"):
        category = table
        for line in _lines(table):
            if line.startswith("class ="):
                category = line.split("=")[1].strip()
                continue
            found += [_row(table, category, one) for one in _expand(line)]
    found += _atomic_rows()
    by_name = {row.name: row for row in found}
    if len(by_name) != len(found):
        names = [row.name for row in found]
        raise ValueError(f"instructions with two rows: {sorted({n for n in names if names.count(n) > 1})}")
    return by_name
