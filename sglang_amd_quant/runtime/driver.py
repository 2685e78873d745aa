"""The few functions of the CUDA driver and of HIP that loading and launching take, through ctypes. No torch, no C
extension.

Both drivers take a kernel's arguments as one packed buffer (`extra`), so a launch costs one call whatever the
signature. The functions that a launch calls declare no argument types: ctypes passes ints as they are, and converting
eleven arguments by their declared types costs as much again as the call. Whatever has 64 bits goes in a `c_void_p`.
"""

from __future__ import annotations

import ctypes
import re
import struct
from abc import ABC, abstractmethod
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.runtime.errors import driver_error


class Driver(ABC):
    """One GPU API of this process.

    Args:
        library: the loaded driver library.
    """

    launch_name: str
    module: str
    end_of_extra: int

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._launch = self._function(self.launch_name)
        self._load = self._function(f"{self.module}LoadData", [POINTER(c_void_p), c_char_p])
        self._find = self._function(f"{self.module}GetFunction", [POINTER(c_void_p), c_void_p, c_char_p])

    @abstractmethod
    def arch_name(self, device: int) -> str:
        """Architecture of a device, `gfx950` or `sm_90`."""

    @abstractmethod
    def cu_count(self, device: int) -> int:
        """Compute units (multiprocessors) of a device."""

    @abstractmethod
    def enter(self, device: int) -> Any:
        """Make a device current for this thread. Returns what `leave` takes to undo it, None if it was current."""

    @abstractmethod
    def leave(self, previous: Any) -> None:
        """Undo `enter`."""

    @abstractmethod
    def describe(self, code: int) -> tuple[str, str]:
        """The driver's name and sentence for a status code."""

    def allow_lds(self, function: c_void_p, device: int) -> None:  # noqa: B027
        """Let a function take as much dynamic LDS as the device has, beside others; HIP needs no leave for that."""

    def load(self, image: bytes, what: str) -> int:
        """Load a code object on the current device. Returns the module. Raises DriverError."""
        module = c_void_p()
        self.check(self._load(byref(module), image), f"loading {what}")
        return int(module.value or 0)

    def function(self, module: int, name: str) -> c_void_p:
        """An entry point of a module. Raises DriverError."""
        function = c_void_p()
        self.check(self._find(byref(function), module, name.encode()), f"kernel {name}")
        return function

    @abstractmethod
    def launch(
        self, function: c_void_p, grid: int, block: int, lds: int, stream: int, extra: Any, cluster: int, overlap: bool
    ) -> int:
        """Start a kernel; `extra` is the packed arguments' description (see `extra`). Returns the driver's status.

        `cluster` and `overlap` are as in `LaunchDescription`; AMD has neither, and runs without.
        """

    def extra(self, buffer: Any, size: Any) -> Any:
        """The `extra` argument that points to packed arguments and their size."""
        return (c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), self.end_of_extra)

    def check(self, status: int, call: str) -> None:
        """Raise the exception of a status that is not success."""
        if status:
            raise driver_error(status, *self.describe(status), call)

    def _function(self, name: str, argtypes: list[Any] | None = None, restype: Any = c_int) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.restype = argtypes, restype
        return function


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, and a union of 64 bytes."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_uint * 16))


_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9

_LAUNCH_CONFIG = struct.Struct("@7IPPI0P")
"""CUlaunchConfig: grid, block, LDS; stream; attributes and their number."""


@cache
def _attributes(cluster: int, overlap: bool) -> tuple[Any, int, int]:
    """Launch attributes that never change once made: what keeps them alive, their address, how many they are."""
    if cluster == 1 and not overlap:
        return None, 0, 0
    attributes = (_LaunchAttribute * 2)()
    attributes[0].id, attributes[0].value[0:3] = _CLUSTER_DIMENSION, (cluster, 1, 1)
    attributes[1].id, attributes[1].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
    return attributes, ctypes.addressof(attributes), 2 if overlap else 1


class CudaDriver(Driver):
    """The CUDA driver API. Modules live in the devices' primary contexts, the ones that torch uses."""

    launch_name, module, end_of_extra = "cuLaunchKernelEx", "cuModule", 0

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._contexts: dict[int, int] = {}
        self._get_current = self._function("cuCtxGetCurrent")
        self._set_current = self._function("cuCtxSetCurrent", [c_void_p])
        self._retain = self._function("cuDevicePrimaryCtxRetain", [POINTER(c_void_p), c_int])
        self._attribute = self._function("cuDeviceGetAttribute", [POINTER(c_int), c_int, c_int])
        self._set_function = self._function("cuFuncSetAttribute", [c_void_p, c_int, c_int])
        self._get_function = self._function("cuFuncGetAttribute", [POINTER(c_int), c_int, c_void_p])
        self._name = self._function("cuGetErrorName", [c_int, POINTER(c_char_p)])
        self._text = self._function("cuGetErrorString", [c_int, POINTER(c_char_p)])
        self.check(self._function("cuInit", [c_uint])(0), "cuInit")

    def launch(
        self, function: c_void_p, grid: int, block: int, lds: int, stream: int, extra: Any, cluster: int, overlap: bool
    ) -> int:
        """cuLaunchKernelEx, which knows clusters of blocks and programmatic dependent launch."""
        _, attributes, count = _attributes(cluster, overlap)
        config = _LAUNCH_CONFIG.pack(grid, 1, 1, block, 1, 1, lds, stream, attributes, count)
        return self._launch(config, function, None, extra)  # type: ignore[no-any-return]

    def arch_name(self, device: int) -> str:
        """`sm_` and the compute capability."""
        return f"sm_{self._device_attribute(device, 75)}{self._device_attribute(device, 76)}"

    def cu_count(self, device: int) -> int:
        """Multiprocessors."""
        return self._device_attribute(device, 16)

    def enter(self, device: int) -> Any:
        """Make the device's primary context current."""
        context = self._contexts.get(device)
        if context is None:
            retained = c_void_p()
            self.check(self._retain(byref(retained), device), f"device {device}")
            context = self._contexts[device] = int(retained.value or 0)
        current = c_void_p()
        status = self._get_current(byref(current))
        if current.value == context:
            return None
        self.check(status, "cuCtxGetCurrent")
        self.check(self._set_current(context), f"device {device}")
        return current

    def leave(self, previous: Any) -> None:
        """Make the former context current; None (there was none) stays with the device's."""
        if previous is not None and previous.value:
            self.check(self._set_current(previous), "cuCtxSetCurrent")

    def allow_lds(self, function: c_void_p, device: int) -> None:
        """Beyond 48 KiB a function must be allowed its dynamic shared memory.

        And a multiprocessor's memory stays divided into cache and shared memory as its first block wanted it until none
        runs there any more: blocks that want little would keep those of the next launch out, which want nearly all.
        """
        static = c_int()
        self.check(self._get_function(byref(static), 1, function), "cuFuncGetAttribute")
        most = self._device_attribute(device, 97)  # MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        for attribute, value in (
            (_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - static.value),
            (_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # percent
        ):
            self.check(self._set_function(function, attribute, value), "cuFuncSetAttribute")

    def describe(self, code: int) -> tuple[str, str]:
        """From cuGetErrorName and cuGetErrorString."""
        name, text = c_char_p(), c_char_p()
        known = self._name(code, byref(name)) == 0 and self._text(code, byref(text)) == 0
        return (
            ((name.value or b"").decode(), (text.value or b"").decode())
            if known
            else ("CUDA_ERROR", "unknown to the driver")
        )

    def _device_attribute(self, device: int, attribute: int) -> int:
        value = c_int()
        self.check(self._attribute(byref(value), attribute, device), f"device {device}")
        return value.value


class HipDriver(Driver):
    """HIP's runtime, whose module functions are its driver API."""

    launch_name, module, end_of_extra = "hipModuleLaunchKernel", "hipModule", 3

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._get_device = self._function("hipGetDevice")
        self._set_device = self._function("hipSetDevice", [c_int])
        self._properties = self._function("hipGetDevicePropertiesR0600", [c_void_p, c_int])
        self._attribute = self._function("hipDeviceGetAttribute", [POINTER(c_int), c_int, c_int])
        self._name = self._function("hipGetErrorName", [c_int], c_char_p)
        self._text = self._function("hipGetErrorString", [c_int], c_char_p)
        self.check(self._function("hipInit", [c_uint])(0), "hipInit")

    def launch(
        self, function: c_void_p, grid: int, block: int, lds: int, stream: int, extra: Any, cluster: int, overlap: bool
    ) -> int:
        """hipModuleLaunchKernel."""
        handle = c_void_p(stream)
        return self._launch(function, grid, 1, 1, block, 1, 1, lds, handle, None, extra)  # type: ignore[no-any-return]

    def arch_name(self, device: int) -> str:
        """The first `gfx...` in the device's properties: gcnArchName, wherever this version of the struct has it."""
        properties = ctypes.create_string_buffer(1 << 13)  # the struct is 1472 bytes in HIP 6 and 7
        self.check(self._properties(properties, device), f"device {device}")
        found = re.search(rb"gfx[0-9a-f]+", properties.raw)
        return found[0].decode() if found else "unknown"

    def cu_count(self, device: int) -> int:
        """Compute units."""
        value = c_int()
        self.check(self._attribute(byref(value), 63, device), f"device {device}")  # MultiprocessorCount
        return value.value

    def enter(self, device: int) -> Any:
        """hipSetDevice, if need be."""
        current = c_int(-1)
        status = self._get_device(byref(current))
        if current.value == device:
            return None
        self.check(status, "hipGetDevice")
        self.check(self._set_device(device), f"device {device}")
        return current.value

    def leave(self, previous: Any) -> None:
        """hipSetDevice back."""
        if previous is not None:
            self.check(self._set_device(previous), "hipSetDevice")

    def describe(self, code: int) -> tuple[str, str]:
        """From hipGetErrorName and hipGetErrorString."""
        return (self._name(code) or b"hipError").decode(), (self._text(code) or b"unknown to the driver").decode()


def open_driver() -> Driver:
    """The driver of this machine: HIP if torch or another library has loaded it, else CUDA, else HIP.

    A ROCm build of torch brings its own libamdhip64, and a second copy would be a second runtime: the one already in
    the process is taken, wherever it lies.

    Raises:
        UnsupportedError: neither library is there.
    """
    mapped = _mapped("libamdhip64")
    candidates: list[tuple[type[Driver], list[str]]] = [
        (HipDriver, mapped),
        (CudaDriver, ["libcuda.so.1", "libcuda.so"]),
        (HipDriver, ["libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"]),
    ]
    for cls, names in candidates:
        for name in names:
            try:
                library = ctypes.CDLL(name)
            except OSError:
                continue
            return cls(library)
    raise UnsupportedError("GPU driver", "neither libcuda nor libamdhip64 can be loaded", "install the GPU's driver")


def _mapped(stem: str) -> list[str]:
    """Files of a shared library that this process has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # no procfs
        return []
    return list(dict.fromkeys(re.findall(rf"\S*/{stem}\.so\S*", maps)))
