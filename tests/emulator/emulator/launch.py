"""Launching a kernel of a code object on the CPU."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import native
from .code_object import Argument, CodeObject, Kernel
from .counters import Counters, collect
from .decode import Program, decode
from .errors import InstructionLimit, KernelFault, LaunchError
from .findings import Checks, describe
from .memory import Memory, Region, Uninitialised

LDS_BYTES = {"gfx950": 160 * 1024, "gfx942": 64 * 1024, "gfx1100": 64 * 1024, "gfx1151": 64 * 1024}
LDS_BANKS = {"gfx950": 64, "gfx942": 32, "gfx1100": 32, "gfx1151": 32}
MAX_THREADS = 1024
DEFAULT_LIMIT = 1 << 40  # instructions of one block
_PRELOAD_PROLOGUE = 256  # bytes that hardware with kernarg preloading skips at the entry
_DONE, _LIMIT_REACHED = 0, 1


@dataclass(frozen=True)
class Schedule:
    """In which order blocks, and waves between barriers, run. A correct kernel gives the same result under each.

    `in_order` and `reversed` run every wave up to its next barrier; a random schedule shuffles blocks and waves and
    switches waves every 1 to 64 instructions.
    """

    order: int
    seed: int = 0


IN_ORDER, REVERSED = Schedule(0), Schedule(1)


def random_schedule(seed: int) -> Schedule:
    """A schedule fully determined by `seed`."""
    return Schedule(2, seed)


def launch(
    code_object: CodeObject | bytes | str | Path,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[Any],
    *,
    lds_bytes: int = 0,
    schedule: Schedule = IN_ORDER,
    checks: Checks = Checks.ALL,
    record: bool = True,
    limit: int = DEFAULT_LIMIT,
) -> Counters:
    """Run `kernel` to its end and return what it did; array arguments are read and written in place.

    grid: blocks along x, y, z; block: threads. args, in the kernel's order: C-contiguous numpy arrays (or
    `uninitialised(array)`) and None (null) for pointers, numbers for scalars, bytes for structs. lds_bytes: dynamic
    LDS on top of the kernel's static LDS. record: bit maps for the distinct-byte counters and LDS bank conflicts.
    limit: instructions a block may execute.

    Raises LaunchError, CodeObjectError, UnknownInstruction, InstructionLimit, and KernelFault with every finding of
    `checks` (the arrays then hold what the kernel left in them).
    """
    if isinstance(code_object, str | Path):
        code_object = Path(code_object).read_bytes()
    module = code_object if isinstance(code_object, CodeObject) else _loaded(code_object)
    return _Launch(module, module.kernel(kernel), grid, block, args, lds_bytes).run(schedule, checks, record, limit)


_loaded = lru_cache(maxsize=32)(CodeObject)


def _three(sizes: Sequence[int], what: str) -> tuple[int, int, int]:
    if not 1 <= len(sizes) <= 3 or any(int(n) < 1 for n in sizes):
        raise LaunchError(f"{what} {tuple(sizes)}: one to three sizes of at least 1")
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


class _Launch:
    def __init__(
        self,
        module: CodeObject,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        lds_bytes: int,
    ):
        self.kernel = kernel
        self.grid, self.block = _three(grid, "grid"), _three(block, "block")
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.lds_bytes = kernel.descriptor.lds_bytes + lds_bytes
        self.dynamic_lds = lds_bytes
        self._check_limits()
        self.memory = Memory()
        self.code = self.memory.add_bytes("<code>", module.relocated(self.memory.next_base()))
        packet = struct.pack(
            "<6H5I",
            0,
            3,
            *self.block,
            0,
            *(g * b for g, b in zip(self.grid, self.block, strict=True)),
            0,
            self.lds_bytes,
        )
        self.packet = self.memory.add_bytes("<dispatch packet>", packet.ljust(64, b"\0"))
        self.uninitialised: list[Region] = []
        self.regions: list[Region | None] = []  # of each argument
        self.kernarg = self._kernarg(args)
        self.kernarg_region = self.memory.add_bytes("<kernel arguments>", self.kernarg)

    def _check_limits(self) -> None:
        kernel = self.kernel
        most = min(kernel.max_flat_workgroup_size, MAX_THREADS)
        if self.threads > most:
            raise LaunchError(f"{kernel.name}: {self.threads} threads per block, compiled for at most {most}")
        if self.lds_bytes > LDS_BYTES[kernel.arch]:
            raise LaunchError(
                f"{kernel.name}: {self.lds_bytes} bytes of LDS, {kernel.arch} has {LDS_BYTES[kernel.arch]} per block"
            )
        if kernel.wave_size != (64 if kernel.arch.startswith("gfx9") else 32):
            raise LaunchError(f"{kernel.name}: wave{kernel.wave_size} code is not supported on {kernel.arch}")
        denormals = kernel.descriptor.rsrc1 >> 16 & 3
        if denormals != 3:
            raise LaunchError(f"{kernel.name}: fp32 denormal mode {denormals} is not supported, only 3 (keep)")

    # ---- kernel arguments ----

    def _kernarg(self, args: Sequence[Any]) -> bytes:
        explicit = [a for a in self.kernel.arguments if not a.kind.startswith("hidden_")]
        if len(args) != len(explicit):
            kinds = ", ".join(a.name or a.kind for a in explicit)
            raise LaunchError(f"{self.kernel.name} takes {len(explicit)} arguments ({kinds}), {len(args)} given")
        arrays: dict[int, tuple[str, np.ndarray]] = {}
        for number, (argument, value) in enumerate(zip(explicit, args, strict=True)):
            array = value.array if isinstance(value, Uninitialised) else value
            if isinstance(array, np.ndarray):
                self._check_array(argument, array)
                if array.nbytes:
                    arrays[number] = f"argument {number}" + (f" ({argument.name})" if argument.name else ""), array
        placed = self.memory.add_arrays(arrays)
        self.regions = [placed[n][0] if n in placed else None for n in range(len(args))]
        self.uninitialised = [placed[n][0] for n in placed if isinstance(args[n], Uninitialised)]
        size = max([self.kernel.descriptor.kernarg_bytes, *(a.offset + a.size for a in self.kernel.arguments)])
        kernarg = bytearray(-(-size // 64) * 64 + 64)  # scalar loads may fetch more than they use
        for number, (argument, value) in enumerate(zip(explicit, args, strict=True)):
            if isinstance(value, np.ndarray | Uninitialised) or value is None:
                data = (placed[number][1] if number in placed else 0).to_bytes(8, "little")
            else:
                data = self._pack(argument, value)
            kernarg[argument.offset : argument.offset + argument.size] = data
        for argument in self.kernel.arguments:
            if argument.kind.startswith("hidden_"):
                data = self._hidden(argument.kind).to_bytes(8, "little")[: argument.size]
                kernarg[argument.offset : argument.offset + argument.size] = data
        return bytes(kernarg)

    def _where(self, argument: Argument) -> str:
        return f"{self.kernel.name}: argument {argument.name or f'at byte {argument.offset}'}"

    def _check_array(self, argument: Argument, array: np.ndarray) -> None:
        where = self._where(argument)
        if argument.kind not in ("global_buffer", "dynamic_shared_pointer") and argument.size != 8:
            raise LaunchError(f"{where} is a {argument.size}-byte scalar, an array was given")
        if not array.flags.c_contiguous:
            raise LaunchError(f"{where}: the array is not C-contiguous (pass numpy.ascontiguousarray of it)")

    def _pack(self, argument: Argument, value: Any) -> bytes:
        where = self._where(argument)
        if isinstance(value, bytes):
            data = value
        elif isinstance(value, np.generic):
            data = value.tobytes()
        elif isinstance(value, float):
            data = struct.pack({2: "<e", 4: "<f"}.get(argument.size, "<d"), value)
        elif isinstance(value, int):
            low, high = -(1 << 8 * argument.size - 1), 1 << 8 * argument.size
            if not low <= value < high:
                raise LaunchError(f"{where}: {value} does not fit {argument.size} bytes")
            data = (value % high).to_bytes(argument.size, "little")
        else:
            raise LaunchError(f"{where}: {type(value).__name__} is neither an array, None, a number nor bytes")
        if argument.kind == "global_buffer" and value != 0:
            raise LaunchError(f"{where} is a pointer, {value!r} was given")
        if len(data) != argument.size:
            raise LaunchError(f"{where}: {len(data)} bytes given, the kernel takes {argument.size}")
        return data

    def _hidden(self, kind: str) -> int:
        axis = "xyz".find(kind[-1])
        if kind.startswith("hidden_block_count_"):
            return self.grid[axis]
        if kind.startswith("hidden_group_size_"):
            return self.block[axis]
        if kind == "hidden_grid_dims":
            return 3
        if kind == "hidden_dynamic_lds_size":
            return self.dynamic_lds
        return 0  # offsets, remainders, host services: none

    # ---- running ----

    def _entry(self, program: Program) -> int:
        start = self.kernel.address
        if self.kernel.descriptor.preload_length and self.kernel.arch in ("gfx942", "gfx950"):
            start += _PRELOAD_PROLOGUE
        return program.index[start]

    def _user_sgprs(self) -> list[int]:
        """LLVM AMDGPU guide, "Initial Kernel Execution State"."""
        descriptor, values = self.kernel.descriptor, []

        def pair(address: int) -> list[int]:
            return [address & 0xFFFFFFFF, address >> 32]

        enabled = [descriptor.properties >> bit & 1 for bit in range(7)]
        blocks = [
            [0] * 4,  # private segment buffer
            pair(self.packet.base),
            [0] * 2,  # queue
            pair(self.kernarg_region.base),
            [0] * 2,  # dispatch id
            [0] * 2,  # flat scratch init
            [descriptor.scratch_bytes],
        ]
        for on, words in zip(enabled, blocks, strict=True):
            values += words if on else []
        for n in range(descriptor.preload_length):
            values.append(struct.unpack_from("<I", self.kernarg, 4 * (descriptor.preload_offset + n))[0])
        count = descriptor.rsrc2 >> 1 & 31
        return (values + [0] * count)[:count]

    def run(self, schedule: Schedule, checks: Checks, record: bool, limit: int) -> Counters:
        interpreter, kernel = native.library(), self.kernel
        program = decode(kernel.code, kernel.address, kernel.arch, kernel.wave_size)
        buffers = self.memory.table(record, self.uninitialised if checks & Checks.UNINITIALISED else [])
        executed = np.zeros(len(program.lines), np.uint64)
        waves = -(-self.threads // kernel.wave_size)
        scratch_bytes = kernel.descriptor.scratch_bytes
        words, kept_words = _records(self.lds_bytes // 4 + 16)
        bytes_, kept_bytes = _records(self.lds_bytes + 64) if program.narrow_lds else (native.Records(), ())
        lds = np.zeros(self.lds_bytes + 16, np.uint8)
        scratch = np.zeros(waves * kernel.wave_size * scratch_bytes + 16, np.uint8)
        wave_memory = np.empty(waves * interpreter.wave_bytes(), np.uint8)
        user = self._user_sgprs()
        machine = native.Machine(
            program=program.records.ctypes.data,
            executed=executed.ctypes.data,
            instructions=len(program.lines),
            entry=self._entry(program),
            gfx=int(kernel.arch[3:]),
            wave_size=kernel.wave_size,
            code_base=self.code.base,
            buffers=buffers,
            buffer_count=len(buffers),
            lds_bytes=self.lds_bytes,
            scratch_bytes=scratch_bytes,
            lds_banks=LDS_BANKS[kernel.arch],
            vgprs=program.vgprs_used,
            lds=lds.ctypes.data,
            words=words,
            bytes=bytes_,
            scratch=scratch.ctypes.data,
            waves=wave_memory.ctypes.data,
            grid=(ctypes.c_uint32 * 3)(*self.grid),
            block_size=(ctypes.c_uint32 * 3)(*self.block),
            wave_count=waves,
            user_sgprs=len(user),
            user_sgpr=(ctypes.c_uint32 * 32)(*user),
            workgroup_id_mask=kernel.descriptor.rsrc2 >> 7 & 7,
            checks=int(checks),
            order=schedule.order,
            record=int(record),
            seed=schedule.seed,
            limit=limit,
        )
        status = interpreter.run_grid(ctypes.byref(machine))
        del kept_words, kept_bytes
        if machine.finding_count:
            found = [describe(machine.finding[n], program, self.memory) for n in range(machine.finding_count)]
            raise KernelFault(kernel.name, found)
        if status == _LIMIT_REACHED:
            raise InstructionLimit(
                f"{kernel.name}: block {tuple(machine.block)} executed more than {limit} instructions"
            )
        assert status == _DONE, status
        return collect(machine, buffers, executed, program, self.memory, self.regions)


def _records(count: int) -> tuple[native.Records, tuple[np.ndarray, ...]]:
    """Records of `count` words or bytes of LDS, and the arrays that they point to."""
    arrays = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.uint32)
    return native.Records(*(array.ctypes.data for array in arrays)), arrays
