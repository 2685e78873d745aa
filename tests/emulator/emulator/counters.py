"""What a launch did: instructions by class and by mnemonic, bytes moved, LDS bank conflicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import native
from .decode import Program
from .memory import Memory, Region, set_bits
from .semantics import rows


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that the kernel loaded and stored. Total above distinct means re-reading or re-writing.

    The distinct figures are -1 if the launch did not record them.
    """

    size: int
    loaded: int
    loaded_distinct: int
    stored: int
    stored_distinct: int


@dataclass(frozen=True)
class Counters:
    """Static and exact for the machine code, except `lds_bank_conflicts`, which is modelled (see README.md)."""

    waves: int
    wave_instructions: int
    by_class: Mapping[str, int]  # salu, valu, compare, packed, dot, mfma, wmma, smem, load, store, lds, wait, ...
    by_mnemonic: Mapping[str, int]
    traffic: tuple[Traffic | None, ...]  # by argument; None where the argument is no array
    loaded: int  # bytes, of all arguments together
    stored: int
    lds_loaded: int  # bytes
    lds_stored: int
    lds_accesses: int  # instructions, counting each half of a ds_read2
    lds_bank_conflicts: int  # extra cycles

    @property
    def matrix(self) -> int:
        """Matrix instructions, MFMA or WMMA."""
        return self.by_class.get("mfma", 0) + self.by_class.get("wmma", 0)


def collect(
    machine: native.Machine,
    buffers: Sequence[native.Buffer],
    executed: np.ndarray,
    program: Program,
    memory: Memory,
    arguments: Sequence[Region | None],
) -> Counters:
    """Counters of a finished launch. `arguments`: the region of each kernel argument."""
    classes: Counter[str] = Counter()
    mnemonics: Counter[str] = Counter()
    every = list(rows().values())
    of_row = np.zeros(len(every), np.uint64)
    np.add.at(of_row, program.records["op"], executed)
    for number in np.flatnonzero(of_row):
        count = int(of_row[number])
        classes[every[number].category] += count
        mnemonics[every[number].name] += count
    traffic = []
    for region in arguments:
        if region is None:
            traffic.append(None)
            continue
        entry = buffers[memory.regions.index(region)]
        distinct = {kind: set_bits(bits) for kind, bits in region.maps.items()}
        loaded, stored = distinct.get("loaded", -1), distinct.get("stored", -1)
        traffic.append(Traffic(region.size, entry.loaded_bytes, loaded, entry.stored_bytes, stored))
    arrays = [buffers[number] for number, region in enumerate(memory.regions) if region in arguments and region]
    return Counters(
        machine.grid[0] * machine.grid[1] * machine.grid[2] * machine.wave_count,
        machine.wave_instructions,
        dict(classes),
        dict(mnemonics),
        tuple(traffic),
        sum(entry.loaded_bytes for entry in arrays),
        sum(entry.stored_bytes for entry in arrays),
        machine.lds_loaded,
        machine.lds_stored,
        machine.lds_accesses,
        machine.bank_conflicts,
    )
