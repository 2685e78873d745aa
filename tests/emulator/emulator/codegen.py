"""C from the tables: one function per row that has an expression, and the table of all rows for the interpreter.

Functions with the same text (v_add_u32 and v_add_nc_u32, say) are generated once.
"""

from __future__ import annotations

import re

from .semantics import TYPES, Row, atomics, rows

_VARIABLES = "abcef"
_ASSIGNS = re.compile(r"\bd =(?!=)|&d\b")  # the expression sets d itself


def generate() -> str:
    """The text of the generated C file; needs `instruction.h`, `machine.h` and `helpers.h`."""
    functions: dict[str, str] = {}  # text without name -> name
    table, declared = [], set()
    for row in rows().values():
        if row.function:
            declared.add(row.function)
            table.append(f'  {{"{row.name}", {row.function}, NULL}},')
            continue
        scalar = row.table == "salu"
        text = _scalar(row) if scalar else _vector(row)
        symbol = functions.setdefault(text, "op_" + row.name.replace(".", "_"))
        executor = "execute_packed" if row.packed else "execute_vector"
        table.append(f'  {{"{row.name}", ' + (f"{symbol}, NULL}}," if scalar else f"{executor}, {symbol}}},"))
    lines = ["/* Generated from isa/ by codegen.py. */", '#include "helpers.h"', ""]
    lines += [f"void {name}(Wave *w, const Instr *i);" for name in sorted(declared)]
    lines += [text.replace("@", symbol) for text, symbol in functions.items()]
    lines += [_atomic(number, a.type, a.expression) for number, a in enumerate(atomics())]
    lines += ["u64 (*const ATOMICS[])(u64, u64, u64) = {"]
    lines += [f"  atomic_{number}," for number in range(len(atomics()))]
    lines += ["};", "const Semantics SEMANTICS[] = {", *table, "};", ""]
    return "\n".join(lines)


def _vector(row: Row) -> str:
    """A body: all lanes of a row at once, written so that the compiler vectorises it."""
    result = row.result
    assert result is not None, row
    lines = ["static void @(u32 *D, u32 *C, const u32 *const S[SOURCES], const Instr *i, const Wave *w) {"]
    lines += ["  (void)C; (void)S; (void)i; (void)w;", "#pragma GCC ivdep", "  for (u32 l = 0; l < LANES; l++) {"]
    if "lane" in row.expression:
        lines.append("    u32 lane = l;")
    position = 0
    for source in row.sources:
        if source == "old":
            lines.append(f"    {TYPES[result].ctype} old = {TYPES[result].load.format(p='S[4]')};")
            continue
        kind = TYPES[source.removesuffix("x2")]
        name = "e" if source == "vcc" else _VARIABLES[position]
        lines.append(f"    {kind.ctype} {name} = {kind.load.format(p=f'S[{position}]')}; (void){name};")
        position += 1
    body = row.expression if _ASSIGNS.search(row.expression) else f"d = ({row.expression})"
    carry = "carry" in row.results
    lines.append(f"    {TYPES[result].ctype} d;" + (" u32 carry;" if carry else ""))
    lines.append(f"    {body};")
    lines += [f"    D[l{' + LANES' * n}] = {value};" for n, value in enumerate(TYPES[result].store)]
    if carry:
        lines.append("    C[l] = carry;")
    return "\n".join([*lines, "  }", "}"])


def _scalar(row: Row) -> str:
    """A whole scalar instruction."""
    lines = ["static void @(Wave *w, const Instr *i) {", "  (void)w; (void)i;"]
    if "scc" in row.results or "scc" in row.expression:
        lines.append("  u32 scc = w->s[REG_SCC];")
    result, position = row.result, 0
    for source in row.sources:
        if source in ("target", "none", "ignored"):
            continue
        if source == "old":
            kind, operand = result, "i->dst"
        else:
            kind, operand = source, f"i->src[{position}]"
        wide = TYPES[kind].bits == 64
        name = "old" if source == "old" else _VARIABLES[position]
        value = f"scalar{64 if wide else 32}(w, &{operand})"
        if kind == "f32":
            value = f"as_f32({value})"
        elif kind in ("i16", "u16"):
            value = f"({kind})({value})"
        lines.append(f"  {TYPES[kind].ctype} {name} = ({TYPES[kind].ctype})({value}); (void){name};")
        position += source != "old"
    expression = row.expression.rstrip(";")
    if result is None:
        lines.append(f"  {expression};")
    else:
        assigns = _ASSIGNS.search(expression)
        lines.append(f"  {TYPES[result].ctype} d;")
        lines.append(f"  {expression};" if assigns else f"  d = ({expression});")
    if "scc" in row.results:
        lines.append("  w->s[REG_SCC] = (scc) != 0;")
    if result is not None:
        wide = TYPES[result].bits == 64
        value = "as_u32(d)" if result == "f32" else f"(u{64 if wide else 32})d"
        lines.append(f"  set{64 if wide else 32}(w, &i->dst, {value});")
    return "\n".join([*lines, "}"])


def _atomic(number: int, kind: str, expression: str) -> str:
    """u64 f(memory, data, comparand), each in the low bits."""
    ctype = TYPES[kind].ctype
    floats = {"f32": ("as_f32((u32){})", "as_u32(d)"), "f64": ("as_f64({})", "as_u64(d)")}
    load, store = floats.get(kind, (f"({ctype}){{}}", f"(u{TYPES[kind].bits})d"))
    names = [f"{ctype} {v} = {load.format(x)}; (void){v};" for v, x in zip("abc", "xyz", strict=True)]
    head = f"static u64 atomic_{number}(u64 x, u64 y, u64 z) {{ (void)y; (void)z; "
    return head + " ".join(names) + f" {ctype} d = ({expression}); return {store}; }}"
