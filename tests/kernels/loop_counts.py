"""What steps of a GEMM's loop take, as the emulator counts it: a longer run less a shorter one."""

from __future__ import annotations

from emulated_triton import Launch


def more(few: Launch, many: Launch) -> dict[str, int]:
    """Instructions by name that the longer run has beyond the shorter one, which is no bank conflicts."""
    assert few.counters is not None
    assert many.counters is not None
    assert many.counters.lds_bank_conflicts == few.counters.lds_bank_conflicts
    return {name: n - few.counters.by_mnemonic.get(name, 0) for name, n in many.counters.by_mnemonic.items()}


def vector_a_matrix(few: Launch, many: Launch) -> float:
    """Vector instructions a matrix instruction, the matrix unit's own not counted."""
    vector = {name: n for name, n in more(few, many).items() if name.startswith("v_")}
    matrix = sum(n for name, n in vector.items() if name.startswith(("v_mfma", "v_wmma")))
    return (sum(vector.values()) - matrix) / matrix
