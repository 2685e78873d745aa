"""Device memory of one launch: numpy arrays in place, under device addresses that expose stray accesses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

from .native import Buffer, library

SLOT_BITS, SLOT_START = 36, 0xFFFFF000  # machine.h


@dataclass(frozen=True)
class Uninitialised:
    """Marks an array argument whose contents the kernel must not read before it has written them."""

    array: np.ndarray


def uninitialised(array: np.ndarray) -> Uninitialised:
    """The array as an argument of `launch`: a load of a byte that the kernel has not stored is a finding."""
    return Uninitialised(array)


@dataclass(eq=False)
class Region:
    """One buffer: its host memory, its device address, and what was seen of it."""

    names: list[str]
    host: int
    size: int
    base: int
    keep: object  # owner of the memory
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def describe(self, address: int) -> str:
        offset = address - self.base
        where = f"byte {offset}" if offset >= 0 else f"{-offset} bytes before"
        return f"{where} of {' = '.join(self.names)} ({self.size} bytes)"


class Memory:
    """Regions by number; number n has device addresses from (n << SLOT_BITS) + SLOT_START."""

    def __init__(self) -> None:
        self.regions: list[Region | None] = [None]  # number 0 would make null a valid address

    def add(self, name: str, host: int, size: int, keep: object) -> Region:
        base = (len(self.regions) << SLOT_BITS) + SLOT_START
        region = Region([name], host, size, base, keep)
        self.regions.append(region)
        return region

    def add_bytes(self, name: str, data: bytes) -> Region:
        array = np.frombuffer(bytearray(data or b"\0"), np.uint8)
        return self.add(name, array.ctypes.data, array.nbytes, array)

    def next_base(self) -> int:
        """The address that the next region will get."""
        return (len(self.regions) << SLOT_BITS) + SLOT_START

    def add_arrays(self, arrays: dict[int, tuple[str, np.ndarray]]) -> dict[int, tuple[Region, int]]:
        """Regions for arrays (key -> name, array), as key -> region, device address of the array.

        Arrays that share memory share a region.
        """
        spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes, key) for key, (_, a) in arrays.items())
        placed: dict[int, tuple[Region, int]] = {}
        region, end = None, -1
        for start, stop, key in spans:
            name, array = arrays[key]
            if region is None or start >= end:
                region = self.add(name, start, stop - start, array)
                end = stop
            else:
                region.names.append(name)
                end = max(end, stop)
                region.size = end - region.host
            placed[key] = region, region.base + start - region.host
        return placed

    def table(self, record: bool, uninitialised: list[Region]) -> ctypes.Array[Buffer]:
        """The buffers for the interpreter, with bit maps as asked for."""
        table = (Buffer * len(self.regions))()
        for entry, region in zip(table, self.regions, strict=True):
            if region is None:
                continue
            entry.host, entry.base, entry.size = region.host, region.base, region.size
            wanted = ["loaded", "stored"] if record else []
            if region in uninitialised:
                wanted.append("initialised")
            for name in wanted:
                region.maps[name] = np.zeros(region.size // 8 + 8, np.uint8)  # read by the 32-bit word
                setattr(entry, name, region.maps[name].ctypes.data)
        return table


def set_bits(bits: np.ndarray) -> int:
    """Number of bits set in a bit map."""
    return int(library().count_bits(bits.ctypes.data, bits.nbytes))
