"""Operand values for the tests of single instructions, and their comparison.

In the tests' tables A, B, C are vector sources and D the result (which holds a fourth random value before); P, Q, R are
scalar sources and S the scalar result. A row has a text for gfx950 and one for gfx1100, SAME if they are equal, None if
the architecture lacks the instruction.
"""

import numpy as np
from assembling import Wave, run_instructions, wave_size

ARCHES = ("gfx950", "gfx942", "gfx1100", "gfx1151")
NEW_IN_GFX950 = ("v_bitop3", "v_permlane16_swap", "v_permlane32_swap")
SCALARS = {}  # P, Q, R of the running test
U32, U64 = np.uint32, np.uint64
SPECIAL_F32 = [0, -0.0, 1, -1, 2, 0.5, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, -3.4e38, 1e-30, 65504, 1.5, 2.5]
SAME = object()


def integers():
    rng = np.random.default_rng(1)
    operands = rng.integers(0, 1 << 32, (64, 4, 4), dtype=U32)
    edges = np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], U32)
    for lane in range(32):
        operands[lane, lane % 3, lane // 3 % 2] = edges[lane % 8]
    operands[40:44, 1] = operands[40:44, 0]  # equal operands
    scalars = rng.integers(0, 1 << 32, 16, dtype=U32)
    return operands, scalars


def floats():
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((64, 4, 4)) * 2.0 ** rng.integers(-8, 9, (64, 4, 4))).astype(np.float32)
    for lane in range(34):
        values[lane, lane % 2, 0] = SPECIAL_F32[lane // 2]
    values[40:42, 1] = values[40:42, 0]
    scalars = rng.standard_normal(16).astype(np.float32).view(U32)
    return values.view(U32), scalars


def doubles():
    rng = np.random.default_rng(3)
    values = rng.standard_normal((64, 4, 2)) * 2.0 ** rng.integers(-30, 31, (64, 4, 2))
    values[:6, 0, 0] = [0, np.inf, -np.inf, np.nan, 1e-310, -0.0]
    return np.ascontiguousarray(values).view(U32), np.zeros(16, U32)


def halves():
    rng = np.random.default_rng(4)
    values = (rng.standard_normal((64, 4, 8)) * 2.0 ** rng.integers(-6, 7, (64, 4, 8))).astype(np.float16)
    values[:8, 0, 0] = [0, np.inf, -np.inf, np.nan, 6e-8, -0.0, 65504, 1e-5]
    return np.ascontiguousarray(values).view(U32), np.zeros(16, U32)


def is_gfx9(arch):
    return arch.startswith("gfx9")


def cases(table, arch):
    """The rows that the architecture has."""
    rows = [row for row in table if row[0 if is_gfx9(arch) else 1]]
    return [row for row in rows if arch != "gfx942" or not row[0].startswith(NEW_IN_GFX950)]


def text_of(row, arch):
    return row[0] if is_gfx9(arch) or row[1] is SAME else row[1]


def evaluate(arch, data, texts):
    operands, scalars = data()
    operands = np.ascontiguousarray(operands[: wave_size(arch)])
    SCALARS.update(P=scalars[:4], Q=scalars[4:8], R=scalars[8:12])
    inputs = [Wave(operands[:, k]) for k in range(4)]
    return inputs, run_instructions(arch, texts, operands, scalars)


def same(result, expected):
    """Bit for bit, any NaN being as good as another."""
    expected = np.asarray(expected)
    if expected.dtype.kind == "f":
        return np.array_equal(result, expected, equal_nan=True) and np.array_equal(
            np.signbit(result[~np.isnan(expected)]), np.signbit(expected[~np.isnan(expected)])
        )
    return np.array_equal(result, expected)


def kind(name):
    return f"{name[0]}{int(name[1:]) // 8}"


def expand(mask, count):
    return np.array([int(mask) >> n & 1 for n in range(count)], bool)
