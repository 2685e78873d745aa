"""What the checks report, in words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from . import native
from .decode import Program
from .instruction import EXEC, FIRST_AGPR, LOWER_HALVES, M0, VCC, VGPRS
from .memory import Memory


class Checks(IntFlag):
    """What a launch looks for; the numbers are those of machine.h."""

    NONE = 0
    BOUNDS = 1
    UNINITIALISED = 2
    WAITS = 4
    BARRIERS = 8
    OPERANDS = 16
    ALL = 31


class FindingKind(IntEnum):
    OUT_OF_BOUNDS = 0
    UNINITIALISED = 1
    MISSING_WAIT = 2
    LDS_RACE = 3
    DMA_NOT_WAITED = 4
    NOT_REPLICATED = 5


_LDS, _SCRATCH = -1, -2


@dataclass(frozen=True)
class Finding:
    """The first of `count` equal findings at one instruction."""

    kind: FindingKind
    text: str  # the instruction
    address: int  # of the instruction, within the code object's image
    block: tuple[int, int, int]
    wave: int
    lane: int
    detail: str
    count: int

    def __str__(self) -> str:
        name = self.kind.name.lower().replace("_", " ")
        times = f", {self.count} times" if self.count > 1 else ""
        return (
            f"{name}: {self.detail}; at {self.address:#x} `{self.text}`, block {self.block}, wave {self.wave}, "
            f"lane {self.lane}{times}"
        )


def register_name(bit: int) -> str:
    """Name of a register by its number in a set of registers (instruction.REGISTER_WORDS)."""
    if bit >= LOWER_HALVES:
        number = (bit - LOWER_HALVES) % VGPRS
        return f"v{number}" if number < FIRST_AGPR else f"a{number - FIRST_AGPR}"
    named = {VCC: "vcc_lo", VCC + 1: "vcc_hi", M0: "m0", EXEC: "exec_lo", EXEC + 1: "exec_hi"}
    return named.get(bit, f"s{bit}")


def describe(raw: native.Finding, program: Program, memory: Memory) -> Finding:
    """The interpreter's record in words."""
    kind = FindingKind(raw.kind)

    def at(number: int) -> str:
        line = program.lines[number]
        return f"{line.address:#x} `{line.text}`"

    place = {_LDS: "LDS", _SCRATCH: "scratch"}.get(raw.other)
    if place is None and kind in (FindingKind.OUT_OF_BOUNDS, FindingKind.UNINITIALISED):
        region = memory.regions[raw.other]
        place = region.describe(raw.address) if region else "no buffer"
    elif place:
        place = f"{place} at byte {raw.address}"
    detail = {
        FindingKind.OUT_OF_BOUNDS: lambda: f"{raw.bytes}-byte access at {raw.address:#x}, {place}",
        FindingKind.UNINITIALISED: lambda: f"{raw.bytes}-byte load of bytes never written, {place}",
        FindingKind.MISSING_WAIT: lambda: f"{register_name(raw.address)} is still being loaded by {at(raw.other)}",
        FindingKind.LDS_RACE: lambda: (
            f"LDS byte {raw.address} was accessed by wave {raw.other_wave} at {at(raw.other)} with no barrier between"
        ),
        FindingKind.DMA_NOT_WAITED: lambda: f"LDS byte {raw.address} is still being loaded by {at(raw.other)}",
        FindingKind.NOT_REPLICATED: lambda: (
            f"register v{raw.address} differs between lanes {raw.lane - 16} and {raw.lane}"
        ),
    }[kind]()
    line = program.lines[raw.instruction]
    return Finding(kind, line.text, line.address, tuple(raw.block), raw.wave, raw.lane, detail, raw.count)
