"""A kernel launch as a value: the same description runs on a GPU (`runtime.device`) and in the emulator
(tests/emulator)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.kernels.hip import manifest

STRUCT_CODES = {"ptr": "P", "i32": "i", "i64": "q", "f32": "f"}
"""Parameter types of the manifest as `struct` codes. Native alignment is the kernel argument layout of CUDA and of
the AMD code object ABI alike; the build compares it with the offsets that the code object states."""


@dataclass(slots=True)  # not frozen, which would cost a microsecond a launch; nobody changes one
class LaunchDescription:
    """One launch of one entry point.

    Attributes:
        kernel: name of the entry point, as in `kernels/hip/manifest.py`.
        grid: blocks of threads.
        block: threads a block.
        args: one value a parameter, in order: for a pointer a tensor, an array, an address or None (null), else a
            number.
        lds: bytes of dynamic LDS (shared memory) a block.
        cluster: blocks that run together and read each other's shared memory (sm_90); divides `grid`.
        overlap: may start before the launch in front of it has ended, because the kernel itself waits for that one
            before it reads or writes anything that others write (sm_90: programmatic dependent launch).
    """

    kernel: str
    grid: int
    block: int
    args: tuple[Any, ...]
    lds: int = 0
    cluster: int = 1
    overlap: bool = False


def address(value: Any) -> int:
    """The device (or, for arrays, host) address that a pointer argument stands for.

    Raises:
        TypeError: it is no tensor, array, address or None.
    """
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    if hasattr(value, "ctypes"):
        return int(value.ctypes.data)
    kind = type(value).__name__
    raise TypeError(f"a pointer argument must be a tensor, an array, an int or None, not {kind}")


class ArgumentPacker:
    """Packs the arguments of one signature into the bytes that the kernel reads.

    Args:
        kernel: name, for messages.
        types: type of each parameter, from `STRUCT_CODES`.
    """

    def __init__(self, kernel: str, types: tuple[str, ...]) -> None:
        self.kernel = kernel
        self._layout = struct.Struct("@" + "".join(STRUCT_CODES[t] for t in types))
        self._pointers = tuple(i for i, t in enumerate(types) if t == "ptr")
        self._count = len(types)

    @property
    def size(self) -> int:
        """Bytes of the packed arguments."""
        return self._layout.size

    def pack(self, args: tuple[Any, ...]) -> bytes:
        """The packed arguments. Raises ShapeError as `pack_into`."""
        buffer = bytearray(self.size)
        self.pack_into(buffer, args)
        return bytes(buffer)

    def pack_into(self, buffer: Any, args: tuple[Any, ...]) -> None:
        """Pack into a writable buffer of `size` bytes.

        Raises:
            ShapeError: the number of arguments, or a value's type or range, does not fit the signature.
        """
        values = list(args)
        try:
            for i in self._pointers:
                value = values[i]
                if value is None:
                    values[i] = 0
                    continue
                try:  # a tensor is the case that must be quick
                    values[i] = value.data_ptr()
                except AttributeError:
                    values[i] = address(value)
            self._layout.pack_into(buffer, 0, *values)
        except (struct.error, IndexError, TypeError) as error:
            raise ShapeError(
                f"{self.kernel} with {len(args)} arguments",
                f"takes {self._count} ({error})",
                "pass them as kernels/hip/manifest.py lists them",
            ) from None


@cache
def packer(kernel: str) -> ArgumentPacker:
    """The packer of an entry point of the manifest.

    Raises:
        KeyError: the manifest has no such entry point.
    """
    return ArgumentPacker(kernel, manifest.find(kernel)[1].types)


def offsets(types: tuple[str, ...]) -> list[tuple[int, int]]:
    """(offset, size) of each argument in its packed form."""
    result = []
    for i, t in enumerate(types):
        size = struct.calcsize(STRUCT_CODES[t])
        end = struct.calcsize("@" + "".join(STRUCT_CODES[u] for u in types[: i + 1]))
        result.append((end - size, size))
    return result
