"""What the toolchain and the launch plans need to know of each GPU architecture.

Sources: LLVM's AMDGPUUsage (register files, granularity, waves a SIMD), the CDNA3, CDNA4 and RDNA3 ISA guides (LDS),
    the CUDA programming guide's table of compute capabilities (sm_90).
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_amd_quant.errors import UnsupportedError


@dataclass(frozen=True)
class Arch:
    """One architecture.

    Attributes:
        name: as the compilers call it.
        vendor: `amd` or `nvidia`.
        wave: lanes a wave (warp).
        lds_bytes: the most LDS (shared memory) one block of threads may use; on AMD also what a CU has.
        simds: SIMDs (sub-partitions) a CU (multiprocessor; RDNA: CU, of which two make a WGP).
        registers: 32-bit vector registers of one lane that the waves of a SIMD share.
        register_granule: registers are given out in multiples of this.
        max_registers: the most one wave can use.
        waves_per_simd: the most waves a SIMD holds.
    """

    name: str
    vendor: str
    wave: int
    lds_bytes: int
    simds: int
    registers: int
    register_granule: int
    max_registers: int
    waves_per_simd: int

    @property
    def suffix(self) -> str:
        """Extension of a code object's file."""
        return "hsaco" if self.vendor == "amd" else "cubin"

    def occupancy(self, registers: int, lds: int, waves_per_block: int) -> int:
        """Waves a SIMD can hold, given one wave's registers and one block's LDS (bytes) and waves."""
        granules = -(-max(registers, 1) // self.register_granule) * self.register_granule
        by_registers = min(self.waves_per_simd, self.registers // granules)
        if not lds:
            return by_registers
        return min(by_registers, max(1, self.lds_bytes // lds * waves_per_block // self.simds))


_CDNA = {"vendor": "amd", "wave": 64, "simds": 4, "registers": 512, "register_granule": 8, "max_registers": 512}
_RDNA3 = {"vendor": "amd", "wave": 32, "simds": 2, "registers": 1536, "register_granule": 24, "max_registers": 256}

ARCH_FACTS = {
    a.name: a
    for a in (
        Arch("gfx950", lds_bytes=160 << 10, waves_per_simd=8, **_CDNA),  # type: ignore[arg-type]
        Arch("gfx942", lds_bytes=64 << 10, waves_per_simd=8, **_CDNA),  # type: ignore[arg-type]
        Arch("gfx1100", lds_bytes=64 << 10, waves_per_simd=16, **_RDNA3),  # type: ignore[arg-type]
        Arch("gfx1151", lds_bytes=64 << 10, waves_per_simd=16, **_RDNA3),  # type: ignore[arg-type]
        Arch("sm_90", "nvidia", 32, 227 << 10, 4, 512, 8, 255, 16),
    )
}


def arch_facts(name: str) -> Arch:
    """Look an architecture up.

    Raises:
        UnsupportedError: it is none of those in `ARCH_FACTS`.
    """
    try:
        return ARCH_FACTS[name]
    except KeyError:
        raise UnsupportedError(f"architecture {name!r}", "unknown", f"use one of {', '.join(ARCH_FACTS)}") from None
