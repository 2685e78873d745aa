"""What the emulator raises. Every message is one line that says what, where and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .findings import Finding


class EmulatorError(Exception):
    """Base class of everything raised here on purpose."""


class CodeObjectError(EmulatorError):
    """The file is no AMDGPU code object this emulator understands, or has no such kernel."""


class UnknownInstruction(EmulatorError):
    """An instruction that the tables do not cover was about to be decoded or executed."""

    def __init__(self, arch: str, address: int, text: str, reason: str):
        super().__init__(f"{arch}: unknown instruction at {address:#x}: {text!r} ({reason})")
        self.arch, self.address, self.text = arch, address, text


class LaunchError(EmulatorError):
    """The launch contradicts the kernel's metadata or the architecture's limits."""


class InstructionLimit(EmulatorError):
    """A wave ran for longer than the caller allowed: an endless loop, or a wait for a block that never runs."""


class KernelFault(EmulatorError):
    """One or more checks failed while the kernel ran; `.findings` lists them."""

    def __init__(self, kernel: str, findings: Sequence[Finding]):
        lines = "\n  ".join(str(finding) for finding in findings)
        super().__init__(f"{kernel}: {len(findings)} finding(s)\n  {lines}")
        self.findings = list(findings)
