"""Wait states that assembly inside a Triton kernel owes CDNA: LLVM sees to them only where it knows an instruction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from emulator import CodeObject
from emulator.disassembler import disassemble

from sglang_amd_quant.toolchain.triton_aot import Compiled


def written(instruction: str) -> set[int]:
    """Vector registers that an instruction other than a matrix instruction writes."""
    return registers(operands(instruction)[0]) if re.match(r"v_(?!mfma|cmp)", instruction) else set()


def operands(instruction: str) -> list[str]:
    return (instruction.split(None, 1)[1:] or [""])[0].split(", ")


def registers(operand: str) -> set[int]:
    """Vector registers that an operand names."""
    found = re.match(r"v(?:\[(\d+):(\d+)\]|(\d+))", operand)
    return set(range(int(found[1] or found[3]), int(found[2] or found[3]) + 1)) if found else set()


def within(instructions: Iterable[str], states: int) -> Iterator[str]:
    """Those that are issued before so many wait states have passed."""
    for instruction in instructions:
        if states <= 0:
            return
        yield instruction
        states -= int(instruction.split()[1]) + 1 if instruction.startswith("s_nop") else 1


def check_wait_states(compiled: Compiled, arch: str) -> None:
    """Nothing writes what a matrix instruction is to read, two before, or sums that it begins with, three after."""
    kernel = CodeObject(compiled.code).kernel(compiled.kernel)
    lines = [line.text for line in disassemble(kernel.code, kernel.address, arch, 64)]
    found = [i for i, line in enumerate(lines) if line.startswith("v_mfma")]
    for i in found:
        sums, *read = (registers(operand) for operand in operands(lines[i])[:4])
        assert not any(written(line) & set().union(*read) for line in within(reversed(lines[:i]), 2)), lines[i]
        begun = read[2] if read[2] != sums else set()
        assert not any(written(line) & begun for line in within(lines[i + 1 :], 3)), lines[i]
    assert found


def check_parts_of_registers(compiled: Compiled, arch: str) -> None:
    """gfx950: what converts into part of a register is a wait state away from what reads it, or writes another part."""
    kernel = CodeObject(compiled.code).kernel(compiled.kernel)
    lines = [line.text for line in disassemble(kernel.code, kernel.address, arch, 64)]
    found = [i for i, line in enumerate(lines) if line.startswith(("v_cvt_pk_fp8_f32", "v_cvt_scalef32_pk_fp4_f32"))]
    for i in found:
        part = registers(operands(lines[i])[0])
        for line in within(lines[i + 1 :], 1):
            touched = set().union(*map(registers, operands(line))) if line.startswith("v_") else set()
            assert not touched & part, (lines[i], line)
    assert found
