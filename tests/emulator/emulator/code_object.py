"""AMDGPU code objects (ELF): segments, symbols, relocations, kernel metadata and kernel descriptors.

Source of the formats: LLVM's "User Guide for AMDGPU Backend", sections Code Object, ELF Header (`EF_AMDGPU_MACH`),
Note Records (`NT_AMDGPU_METADATA`) and Kernel Descriptor (`amdhsa`, code object V3 to V6).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import msgpack
from .errors import CodeObjectError

ARCH_OF_MACH = {0x4C: "gfx942", 0x4F: "gfx950", 0x41: "gfx1100", 0x4A: "gfx1151"}

_PT_LOAD = 1
_SHT_SYMTAB, _SHT_RELA, _SHT_NOTE, _SHT_DYNSYM = 2, 4, 7, 11
_NT_AMDGPU_METADATA = 32
_R_ABS64, _R_RELATIVE64 = 3, 13


@dataclass(frozen=True)
class Argument:
    """One kernel argument as the metadata states it (name "" if it has none): `kind` is `.value_kind`."""

    name: str
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class KernelDescriptor:
    """The 64 bytes that tell the hardware how to start a wave."""

    lds_bytes: int
    scratch_bytes: int  # per lane
    kernarg_bytes: int
    entry: int  # address of the first instruction
    rsrc1: int
    rsrc2: int
    properties: int
    preload_length: int  # kernarg dwords loaded into SGPRs before the wave starts
    preload_offset: int

    @property
    def wave32(self) -> bool:
        return bool(self.properties >> 10 & 1)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a code object: its metadata, its descriptor and the bytes of its code."""

    name: str
    arch: str
    arguments: tuple[Argument, ...]
    descriptor: KernelDescriptor
    max_flat_workgroup_size: int
    metadata: dict[str, Any]
    address: int  # of `code`, within the loaded image
    code: bytes

    @property
    def wave_size(self) -> int:
        return 32 if self.descriptor.wave32 else 64


class CodeObject:
    """A loaded code object: `.arch`, `.kernels` (name -> Kernel) and `.image`, the bytes as they lie in memory.

    Addresses inside are relative to the image; `relocated(base)` gives the image as loaded at `base`.
    """

    def __init__(self, source: bytes | str | Path):
        self.data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if self.data[:6] != b"\x7fELF\x02\x01" or self._u16(18) != 224:
            raise CodeObjectError("not a 64-bit little-endian AMDGPU ELF file")
        mach = self._u32(48) & 0xFF
        if mach not in ARCH_OF_MACH:
            raise CodeObjectError(f"EF_AMDGPU_MACH {mach:#x} is not one of {sorted(ARCH_OF_MACH.values())}")
        self.arch = ARCH_OF_MACH[mach]
        header = struct.Struct("<IIQQQQIIQQ")
        start, count = self._u64(40), self._u16(60)
        self._sections = [header.unpack_from(self.data, start + 64 * i) for i in range(count)]
        self._note = self._metadata()

    def _u16(self, at: int) -> int:
        return struct.unpack_from("<H", self.data, at)[0]

    def _u32(self, at: int) -> int:
        return struct.unpack_from("<I", self.data, at)[0]

    def _u64(self, at: int) -> int:
        return struct.unpack_from("<Q", self.data, at)[0]

    def _metadata(self) -> dict[str, Any]:
        for _, kind, _, _, offset, size, *_ in self._sections:
            if kind != _SHT_NOTE:
                continue
            at = offset
            while at < offset + size:
                name_size, payload, note = struct.unpack_from("<III", self.data, at)
                body = at + 12 + (name_size + 3 & ~3)
                if note == _NT_AMDGPU_METADATA:
                    return msgpack.unpack(self.data[body : body + payload])
                at = body + (payload + 3 & ~3)
        raise CodeObjectError("no NT_AMDGPU_METADATA note: not a code object V3 or later")

    @cached_property
    def image(self) -> bytes:
        """The loadable segments at their addresses, before relocation."""
        start, count = self._u64(32), self._u16(56)
        headers = [struct.unpack_from("<IIQQQQQQ", self.data, start + 56 * i) for i in range(count)]
        loads = [h for h in headers if h[0] == _PT_LOAD]
        image = bytearray(max(address + memory for _, _, _, address, _, _, memory, _ in loads))
        for _, _, offset, address, _, stored, _, _ in loads:
            image[address : address + stored] = self.data[offset : offset + stored]
        return bytes(image)

    def relocated(self, base: int) -> bytes:
        """The image with its dynamic relocations applied for a load address of `base`."""
        image = bytearray(self.image)
        for section in self._sections:
            if section[1] != _SHT_RELA:
                continue
            dynsym = self._sections[section[6]]
            for at in range(section[4], section[4] + section[5], 24):
                offset, info, addend = struct.unpack_from("<QQq", self.data, at)
                kind, symbol = info & 0xFFFFFFFF, info >> 32
                if kind not in (_R_ABS64, _R_RELATIVE64):
                    raise CodeObjectError(f"relocation type {kind} at {offset:#x} is not supported")
                value = self._u64(dynsym[4] + 24 * symbol + 8) if kind == _R_ABS64 else 0
                struct.pack_into("<Q", image, offset, base + value + addend)
        return bytes(image)

    @cached_property
    def symbols(self) -> dict[str, tuple[int, int]]:
        """name -> (address, size)."""
        found = {}
        for _, kind, _, _, offset, size, link, *_ in self._sections:
            if kind not in (_SHT_SYMTAB, _SHT_DYNSYM):
                continue
            strings = self._sections[link][4]
            for at in range(offset, offset + size, 24):
                name, _, _, _, value, length = struct.unpack_from("<IBBHQQ", self.data, at)
                end = self.data.index(b"\0", strings + name)
                found[self.data[strings + name : end].decode()] = (value, length)
        return found

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        return {entry[".name"]: self._kernel(entry) for entry in self._note["amdhsa.kernels"]}

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            raise CodeObjectError(f"no kernel {name!r}; this code object has {', '.join(sorted(self.kernels))}")
        return self.kernels[name]

    def _kernel(self, entry: dict[str, Any]) -> Kernel:
        address, _ = self.symbols[entry[".symbol"]]
        lds, scratch, kernarg, _, offset = struct.unpack_from("<IIIIq", self.image, address)
        _, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", self.image, address + 44)
        start = address + offset
        size = next((length for value, length in self.symbols.values() if value == start and length), 0)
        if not size:  # hand-written assembly without .size: everything up to the end of the section
            size = next(s[3] + s[5] - start for s in self._sections if s[2] & 4 and s[3] <= start < s[3] + s[5])
        descriptor = KernelDescriptor(
            lds, scratch, kernarg, start, rsrc1, rsrc2, properties, preload & 0x7F, preload >> 7
        )
        arguments = tuple(
            Argument(a.get(".name", ""), a[".value_kind"], a[".offset"], a[".size"]) for a in entry.get(".args", ())
        )
        return Kernel(
            entry[".name"],
            self.arch,
            arguments,
            descriptor,
            entry.get(".max_flat_workgroup_size", 1024),
            entry,
            start,
            self.image[start : start + size],
        )
