"""Executes AMDGPU code objects (gfx950, gfx942, gfx1100, gfx1151) on the CPU, and checks what they do.

    from emulator import launch, uninitialised
    counters = launch("kernel.hsaco", "scale", grid=(4,), block=(256,), args=[x, uninitialised(y), 1024])

See README.md beside this package.
"""

from .code_object import CodeObject
from .counters import Counters, Traffic
from .errors import CodeObjectError, EmulatorError, InstructionLimit, KernelFault, LaunchError, UnknownInstruction
from .findings import Checks, Finding, FindingKind
from .launch import IN_ORDER, LDS_BANKS, LDS_BYTES, REVERSED, Schedule, launch, random_schedule
from .memory import Uninitialised, uninitialised

__all__ = [
    "IN_ORDER",
    "LDS_BANKS",
    "LDS_BYTES",
    "REVERSED",
    "Checks",
    "CodeObject",
    "CodeObjectError",
    "Counters",
    "EmulatorError",
    "Finding",
    "FindingKind",
    "InstructionLimit",
    "KernelFault",
    "LaunchError",
    "Schedule",
    "Traffic",
    "Uninitialised",
    "UnknownInstruction",
    "launch",
    "random_schedule",
    "uninitialised",
]
