"""Assembler operands and modifiers, as LLVM prints them, to values."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache

from .instruction import EXEC, FIRST_AGPR, LOWER_HALVES, M0, SCC, TTMP0, UPPER_HALVES, VCC, Kind, Select, Width

_REGISTER = re.compile(r"(v|s|a|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])(?:\.([lh]))?")
_NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
    "scc": (SCC, 1),
    "src_scc": (SCC, 1),
    "flat_scratch": (102, 2),
    "flat_scratch_lo": (102, 1),
    "flat_scratch_hi": (103, 1),
    "xnack_mask": (104, 2),
}
_NOTHING = ("off", "null")
# Upper halves of the addresses that flat instructions send to LDS and to scratch: machine.h.
_APERTURES = {"src_shared_base": 0x00010000 << 32, "src_private_base": 0x00020000 << 32}
_COMMA = re.compile(r",(?![^\[(]*[\])])")  # outside brackets
_WRAPPED = re.compile(r"(abs|neg|sext|lit|lit64)\((.*)\)")


@dataclass(frozen=True)
class Operand:
    """One operand: a register range, a constant, or nothing (`off`, `null`)."""

    kind: Kind = Kind.NONE
    index: int = 0
    count: int = 1
    text: str = ""  # of a constant
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False
    select: Select = Select.DWORD

    @property
    def registers(self) -> int:
        """The registers it names, a set as instruction.py says."""
        bits = ((1 << self.count) - 1) << self.index
        if self.kind in (Kind.SGPR, Kind.MASK):
            return bits & ((1 << LOWER_HALVES) - 1)
        if self.kind != Kind.VGPR:
            return 0
        lower = 0 if self.select == Select.WORD_1 else bits << LOWER_HALVES
        return lower | (0 if self.select == Select.WORD_0 else bits << UPPER_HALVES)

    def value(self, width: Width, is_float: bool) -> int:
        """Bits of a constant for an operand of this width. CDNA3 ISA, "Inline constants" and "Literals"."""
        text = self.text
        if text in _APERTURES:
            return _APERTURES[text] if width == Width.B64 else _APERTURES[text] >> 32
        if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
            form = {Width.B16: "<e", Width.B32: "<f", Width.B64: "<d"}[width]
            return int.from_bytes(struct.pack(form, float(text)), "little")
        number = int(text, 0)
        if width == Width.B64:
            # A literal has 32 bits: the upper half of a double, all of an integer.
            return number << 32 if is_float and text.startswith("0x") else number & (1 << 64) - 1
        return number & (0xFFFF if width == Width.B16 else 0xFFFFFFFF)


@cache
def parse_operand(text: str) -> Operand:
    """Raises ValueError on an operand that is none of the known forms."""
    negate = absolute = sign_extend = False
    while True:
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped:
            absolute |= wrapped[1] == "abs"
            negate ^= wrapped[1] == "neg"
            sign_extend |= wrapped[1] == "sext"
            text = wrapped[2]
        elif text.startswith("|") and text.endswith("|"):
            absolute = True
            text = text[1:-1]
        elif text.startswith("-") and not text[1:2].isdigit():
            negate ^= True
            text = text[1:]
        else:
            break
    modifiers = {"negate": negate, "absolute": absolute, "sign_extend": sign_extend}
    register = _REGISTER.fullmatch(text)
    if register:
        file, single, first, last, half = register.groups()
        index = int(single or first)
        count = int(last) - index + 1 if last else 1
        kind = Kind.VGPR if file in "va" else Kind.SGPR
        index += {"v": 0, "s": 0, "a": FIRST_AGPR, "ttmp": TTMP0}[file]
        select = {None: Select.DWORD, "l": Select.WORD_0, "h": Select.WORD_1}[half]
        return Operand(kind, index, count, select=select, **modifiers)
    if text in _NAMED:
        return Operand(Kind.SGPR, *_NAMED[text], **modifiers)
    if text in _NOTHING:
        return Operand(**modifiers)
    if text not in _APERTURES:
        int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else float(text)
    return Operand(Kind.CONST, text=text, **modifiers)


def split(text: str) -> tuple[str, list[str], dict[str, str]]:
    """Mnemonic, operand texts, and modifiers (name -> value, "" for flags) of one line of assembly."""
    mnemonic, _, rest = text.partition(" ")
    chunks = [chunk.strip() for chunk in _COMMA.split(rest)] if rest else []
    operands, modifiers = [], {}
    for chunk in chunks:
        words = chunk.split(" ")
        operands.append(words[0])
        for word in words[1:]:
            name, _, value = word.partition(":")
            modifiers[name] = value
    return mnemonic, operands, modifiers


@cache
def bits_of(value: str) -> int:
    """`[1,0,1]` as a number, first element in bit 0."""
    return sum(int(bit) << n for n, bit in enumerate(value.strip("[]").split(",")))
