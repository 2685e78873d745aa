"""The decoded instruction: one record layout, shared by the Python decoder and the C interpreter.

The C structs are generated from the field lists below, so that the two sides cannot drift apart.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

LANES = 64  # rows of the vector register file are always this long; a wave32 leaves the upper half idle
SOURCES = 5
VGPRS = 512  # v0..v255, then a0..a255
FIRST_AGPR = 256

# Numbers of the scalar register file, as the hardware encodes them where it does (SCC has no number in hardware
# that would be the same on every architecture, nor has M0: 124 on gfx9, 125 on gfx11).
VCC, TTMP0, M0, EXEC, SCC = 106, 108, 124, 126, 128
SGPRS = 136
# A set of registers, one bit each: SGPR 0..127, then the lower 16 bits of all VGPRs, then their upper 16 bits.
LOWER_HALVES, UPPER_HALVES = 128, 128 + VGPRS
REGISTER_WORDS = (UPPER_HALVES + VGPRS) // 64


class Kind(IntEnum):
    """Where an operand lives."""

    NONE = 0
    CONST = 1
    SGPR = 2
    VGPR = 3
    MASK = 4  # one bit per lane, in an SGPR (wave32) or a pair of them (wave64)


class Width(IntEnum):
    """How wide an operand is: decides which bit neg/abs act on and how many 32-bit rows it has."""

    B16 = 0
    B32 = 1
    B64 = 2


class Select(IntEnum):
    """Which part of a 32-bit register is read or written (SDWA, op_sel, `.l` and `.h`)."""

    DWORD = 0
    BYTE_0 = 1
    BYTE_1 = 2
    BYTE_2 = 3
    BYTE_3 = 4
    WORD_0 = 5
    WORD_1 = 6


class Space(IntEnum):
    """Address space of a memory instruction."""

    GLOBAL = 0
    FLAT = 1
    SCRATCH = 2
    BUFFER = 3


class Element(IntEnum):
    """Element types of the matrix instructions."""

    F64 = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    FP8 = 4  # e4m3: OCP, or FNUZ on gfx942
    BF8 = 5  # e5m2: OCP, or FNUZ on gfx942
    FP6 = 6  # e2m3
    BF6 = 7  # e3m2
    FP4 = 8  # e2m1
    I8 = 9
    U8 = 10
    I4 = 11
    U4 = 12
    I32 = 13


# fmt: off
OPERAND_FIELDS = [
    ("kind", "u1"), ("width", "u1"), ("select", "u1"), ("negate", "u1"),
    ("absolute", "u1"), ("sign_extend", "u1"), ("preserve", "u1"),  # preserve the bits outside select
    ("modified", "u1"),  # any of select, negate, absolute, sign_extend is set
    ("index", "u4"), ("count", "u4"),  # first register and number of registers
    ("value", "u8"),  # of a constant
]
OPERAND = np.dtype(OPERAND_FIELDS, align=True)

INSTRUCTION_FIELDS = [
    ("op", "u4"),  # index into the generated table of semantics
    ("address", "u4"),  # relative to the code object's image
    ("next_address", "u4"),
    ("target", "u4"),  # of a branch: index of an instruction
    ("imm", "u4"),
    ("offset", "i4"), ("offset2", "i4"),
    ("dst", OPERAND), ("dst2", OPERAND), ("src", OPERAND, SOURCES),
    # VOP3, VOP3P, SDWA, DPP
    ("op_sel", "u1"), ("op_sel_hi", "u1"), ("neg_lo", "u1"), ("neg_hi", "u1"), ("clamp", "u1"), ("omod", "u1"),
    ("dual", "u1"),  # first half of a VOPD pair: the next record is the second half
    ("dpp", "u1"), ("bound_ctrl", "u1"), ("fetch_inactive", "u1"), ("row_mask", "u1"), ("bank_mask", "u1"),
    ("dpp_ctrl", "u4"),
    # memory
    ("bytes", "u1"), ("is_signed", "u1"), ("half", "u1"),  # half: 0 whole register, 1 low, 2 high 16 bits
    ("space", "u1"), ("offen", "u1"), ("idxen", "u1"), ("to_lds", "u1"), ("atomic", "u1"), ("returns", "u1"),
    ("stride", "u1"), ("flag", "u1"),  # stride: unit of the two offsets of ds_read2; flag: meaning stated by its rows
    # matrix
    ("m", "u1"), ("k", "u1"), ("blocks", "u1"), ("a_type", "u1"), ("b_type", "u1"), ("d_type", "u1"), ("scaled", "u1"),
    # s_waitcnt: the largest count to wait for, 255 where the instruction does not wait on that counter
    ("wait_load", "u1"), ("wait_lds", "u1"), ("wait_store", "u1"),
    ("touches", "u8", REGISTER_WORDS),  # registers read or written, without the one a load fills
    ("fills", "u8", REGISTER_WORDS),  # registers a load fills when it completes
]
# fmt: on
INSTRUCTION = np.dtype(INSTRUCTION_FIELDS, align=True)

_C_TYPE = {"u1": "u8", "u4": "u32", "i4": "i32", "u8": "u64"}


def c_header() -> str:
    """The C declarations of `Operand`, `Instr` and the constants above."""
    lines = ["/* Generated from instruction.py. */", "#pragma once", '#include "types.h"', ""]
    numbers = {
        "LANES": LANES,
        "SOURCES": SOURCES,
        "VGPRS": VGPRS,
        "REG_VCC": VCC,
        "REG_TTMP0": TTMP0,
        "REG_M0": M0,
        "REG_EXEC": EXEC,
        "REG_SCC": SCC,
        "SGPRS": SGPRS,
        "REGISTER_WORDS": REGISTER_WORDS,
    }
    lines += [f"#define {name} {value}" for name, value in numbers.items()]
    for enum in (Kind, Width, Select, Space, Element):
        lines += [f"#define {enum.__name__.upper()}_{item.name} {item.value}" for item in enum]
    for name, fields in (("Operand", OPERAND_FIELDS), ("Instr", INSTRUCTION_FIELDS)):
        lines += ["", "typedef struct {"]
        for field, kind, *count in fields:
            ctype = "Operand" if kind is OPERAND else _C_TYPE[kind]
            lines.append(f"  {ctype} {field}{f'[{count[0]}]' if count else ''};")
        lines.append(f"}} {name};")
    return "\n".join(lines) + "\n"
