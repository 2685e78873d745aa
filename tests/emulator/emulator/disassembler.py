"""AMDGPU machine code to text, by the LLVM-C disassembler inside the `rocm-llvm-python` wheel.

Only the decoding of instruction *encodings* is LLVM's; what the instructions do is this package's own (see `isa/`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .errors import EmulatorError, UnknownInstruction

_VOP3 = (0x33, 0x34, 0x35)  # top 6 bits of a 64-bit VOP3 / VOP3P / VOP3-DPP encoding on gfx11
_UNUSED_SOURCES = (0x1FF << 18, 0x3FFFF << 9)  # src2; src1 and src2


class Line(NamedTuple):
    address: int
    size: int
    text: str


@cache
def _llvm() -> ctypes.CDLL:
    spec = importlib.util.find_spec("rocm")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    library = next((p for root in roots if (p := Path(root, "llvm", "librocmllvm.so")).exists()), None)
    if library is None:
        raise EmulatorError(
            "the emulator needs LLVM's AMDGPU decoder: pip install --no-deps rocm-llvm-python==7.2.2.562.46"
        )
    llvm = ctypes.CDLL(str(library))
    for part in ("TargetInfo", "Target", "TargetMC", "Disassembler"):
        getattr(llvm, f"LLVMInitializeAMDGPU{part}")()
    llvm.LLVMCreateDisasmCPUFeatures.restype = ctypes.c_void_p
    llvm.LLVMCreateDisasmCPUFeatures.argtypes = [
        *[ctypes.c_char_p] * 3,
        ctypes.c_void_p,
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
    ]
    llvm.LLVMDisasmInstruction.restype = ctypes.c_size_t
    llvm.LLVMDisasmInstruction.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return llvm


@cache
def _context(arch: str, wave_size: int) -> int:
    features = b"+wavefrontsize32" if wave_size == 32 else b"+wavefrontsize64"
    if arch.startswith("gfx9"):
        features = b""
    context = _llvm().LLVMCreateDisasmCPUFeatures(b"amdgcn-amd-amdhsa", arch.encode(), features, None, 0, None, None)
    if not context:
        raise EmulatorError(f"LLVM has no AMDGPU disassembler for {arch}")
    return context


def disassemble(code: bytes, address: int, arch: str, wave_size: int) -> Iterator[Line]:
    """The instructions of `code`, which lies at `address`. Raises UnknownInstruction where the bytes are none."""
    context, text = _context(arch, wave_size), ctypes.create_string_buffer(1024)
    at = 0
    while at < len(code):
        window = code[at : at + 32]
        size = _llvm().LLVMDisasmInstruction(context, window, len(window), address + at, text, len(text))
        for variant in () if size else _older_encodings(window, arch):
            size = _llvm().LLVMDisasmInstruction(context, variant, len(variant), address + at, text, len(text))
            if size:
                break
        if not size:
            raise UnknownInstruction(arch, address + at, window[:8].hex(), "LLVM cannot decode these bytes")
        yield Line(address + at, size, text.value.decode().strip())
        at += size


def _older_encodings(window: bytes, arch: str) -> Iterator[bytes]:
    """Newer LLVMs write 0x80 into unused source fields of VOP3 on gfx11; this decoder wants zeros there."""
    if not arch.startswith("gfx11") or len(window) < 8:
        return
    low, high = struct.unpack_from("<II", window)
    if low >> 26 in _VOP3:
        for unused in _UNUSED_SOURCES:
            yield struct.pack("<II", low, high & ~unused & 0xFFFFFFFF) + window[8:]
