"""Kernels on a GPU: one code object loaded a device, one call a launch."""

from __future__ import annotations

import ctypes
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.runtime.code_objects import CODE_OBJECT_DIR, code_object
from sglang_amd_quant.runtime.driver import Driver, open_driver
from sglang_amd_quant.runtime.launch import ArgumentPacker, LaunchDescription, packer


class Kernel:
    """One entry point, loaded on one device.

    Args:
        gpu: the device.
        name: entry point.
        function: the driver's handle, from `Driver.function`.
        arguments: packs its arguments.
    """

    def __init__(self, gpu: Gpu, name: str, function: ctypes.c_void_p, arguments: ArgumentPacker) -> None:
        self.gpu, self.name, self._function = gpu, name, function
        self._pack_into, self._driver, self._ordinal = arguments.pack_into, gpu.driver, gpu.ordinal
        self._buffer = ctypes.create_string_buffer(arguments.size)
        self._size = ctypes.c_size_t(arguments.size)
        self._extra = gpu.driver.extra(self._buffer, self._size)
        self._lock = threading.Lock()  # the driver reads the buffer before the call returns, so one buffer is enough

    def launch(
        self,
        grid: int,
        block: int,
        lds: int,
        stream: int,
        args: tuple[Any, ...],
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Start the kernel on a stream; returns as soon as it is queued.

        Args:
            grid: blocks of threads.
            block: threads a block.
            lds: bytes of dynamic LDS a block.
            stream: the stream's handle, such as `ops.hip.current_stream(ordinal)`; 0 is the default stream.
            args, cluster, overlap: as in `LaunchDescription`.

        Raises:
            ShapeError: arguments that do not fit the signature.
            DriverError: what the driver refuses. Faults of a running kernel show at a later call.
        """
        driver = self._driver
        with self._lock:
            self._pack_into(self._buffer, args)
            previous = driver.enter(self._ordinal)
            try:
                status = driver.launch(self._function, grid, block, lds, stream, self._extra, cluster, overlap)
            finally:
                if previous is not None:
                    driver.leave(previous)
        if status:
            what = f"launching {self.name}, grid {grid}, block {block}, LDS {lds}, cluster {cluster}"
            driver.check(status, what)


class Gpu:
    """A device and the kernels loaded on it.

    Args:
        ordinal: its number, as torch counts.
        driver: the API to reach it by.
        code_objects: folder of the compiled code objects.
    """

    def __init__(self, ordinal: int, driver: Driver, code_objects: Path = CODE_OBJECT_DIR) -> None:
        self.ordinal, self.driver = ordinal, driver
        self.arch_name = driver.arch_name(ordinal)
        self.cu_count = driver.cu_count(ordinal)
        self._code_objects = code_objects
        self._modules: dict[Path, int] = {}
        self._kernels: dict[str, Kernel] = {}
        self._lock = threading.Lock()

    @property
    def arch(self) -> Arch:
        """What is known of the device's architecture. Raises UnsupportedError if it is none of ours."""
        return arch_facts(self.arch_name)

    def kernel(self, name: str) -> Kernel:
        """An entry point, loaded if it was not yet.

        Raises:
            UnsupportedError: it is not in the manifest, or was not built for this architecture.
            DriverError: the code object cannot be loaded.
        """
        found = self._kernels.get(name)
        return found if found is not None else self._load(name)

    def load(self, *names: str) -> None:
        """Load entry points ahead of a graph capture, in which nothing may be loaded. Raises as `kernel`."""
        for name in names:
            self.kernel(name)

    def launch(self, description: LaunchDescription, stream: int) -> None:
        """Start what a description describes. Raises as `kernel` and `Kernel.launch`."""
        d = description
        self.kernel(d.kernel).launch(d.grid, d.block, d.lds, stream, d.args, d.cluster, d.overlap)

    def _load(self, name: str) -> Kernel:
        path = code_object(name, self.arch_name, self._code_objects)
        with self._lock:
            if name in self._kernels:
                return self._kernels[name]
            previous = self.driver.enter(self.ordinal)
            try:
                if path not in self._modules:
                    self._modules[path] = self.driver.load(_read(path), str(path))
                function = self.driver.function(self._modules[path], name)
                self.driver.allow_lds(function, self.ordinal)
            finally:
                self.driver.leave(previous)
            kernel = self._kernels[name] = Kernel(self, name, function, packer(name))
            return kernel


@cache
def gpu(ordinal: int) -> Gpu:
    """The device of that number, once a process.

    Raises:
        UnsupportedError: no GPU driver on this machine.
        DriverError: no such device.
    """
    return Gpu(ordinal, _driver())


@lru_cache(maxsize=1)
def _driver() -> Driver:
    return open_driver()


def _read(path: Path) -> bytes:
    image = path.read_bytes()
    if image[:4] != b"\x7fELF":
        raise AmdMxError(str(path), "is no ELF file", "rebuild with `amd-mx build --force`")
    return image
