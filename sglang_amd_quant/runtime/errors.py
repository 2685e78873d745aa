"""Driver status codes as exceptions.

CUDA's CUresult and HIP's hipError_t share their numbers where they mean the same (cuda.h, hip_runtime_api.h), so one
table serves both. A code that is not in the table raises `DriverError` itself, with the name that the driver gives
it.
"""

from __future__ import annotations

from sglang_amd_quant.errors import AmdMxError


class DriverError(AmdMxError, RuntimeError):
    """The GPU driver refused a call.

    Attributes:
        code: the driver's status code.
        name: the driver's name for it, such as `CUDA_ERROR_ILLEGAL_ADDRESS` or `hipErrorNoBinaryForGpu`.
    """

    code = 0
    name = ""


class InvalidValueError(DriverError):
    """A grid, block, LDS size or handle outside what the device takes."""


class OutOfMemoryError(DriverError):
    """No device memory left, for a module as well as for data."""


class NotInitializedError(DriverError):
    """The driver was not, or is no longer, initialized in this process; forked children must start their own."""


class NoDeviceError(DriverError):
    """No such device, or none at all."""


class InvalidImageError(DriverError):
    """The code object is damaged or no code object."""


class InvalidContextError(DriverError):
    """The device's context is gone or belongs to another device than the stream."""


class WrongArchError(DriverError):
    """The code object was compiled for another GPU."""


class InvalidHandleError(DriverError):
    """A stream or function handle that is not, or no longer, valid."""


class KernelNotFoundError(DriverError):
    """The code object has no entry point of that name."""


class EccError(DriverError):
    """The device's memory or links are failing."""


class IllegalAddressError(DriverError):
    """A kernel touched memory that is not its own; everything after it on this device fails too."""


class LaunchResourcesError(DriverError):
    """A block needs more registers, LDS or threads than the device has."""


class LaunchTimeoutError(DriverError):
    """A kernel ran longer than the system allows."""


class LaunchFailedError(DriverError):
    """A kernel trapped, asserted or hit an illegal instruction; everything after it on this device fails too."""


class DriverNotSupportedError(DriverError):
    """The driver, its version or its settings do not offer this call."""


class StreamCaptureError(DriverError):
    """Not allowed while a graph is being captured; load kernels (`Gpu.load`) before the capture."""


_FAMILIES: tuple[tuple[type[DriverError], tuple[int, ...], str], ...] = (
    (InvalidValueError, (1, 9), "check grid, block and LDS against the device's limits"),
    (OutOfMemoryError, (2,), "free device memory"),
    (NotInitializedError, (3, 4), "start GPU work in the process that uses it, after fork"),
    (NoDeviceError, (100, 101, 46), "check HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES"),
    (InvalidImageError, (200, 218, 300), "rebuild with `amd-mx build --force`"),
    (InvalidContextError, (201, 709), "use one process a device, and its own streams"),
    (WrongArchError, (209, 98), "run `amd-mx build --arch` with this GPU's architecture"),
    (InvalidHandleError, (400,), "pass a live stream of this device"),
    (KernelNotFoundError, (500, 302), "rebuild with `amd-mx build --force`"),
    (EccError, (214, 220), "take the device out of service"),
    (IllegalAddressError, (700, 716, 717), "restart the process; run the launch in the emulator to find the access"),
    (LaunchResourcesError, (701, 720), "launch smaller blocks or less LDS"),
    (LaunchTimeoutError, (702,), "split the work"),
    (LaunchFailedError, (719, 710, 714, 715, 718), "restart the process; run the launch in the emulator"),
    (DriverNotSupportedError, (801, 36, 35, 803), "update the driver"),
    (StreamCaptureError, tuple(range(900, 909)), "load kernels and allocate before the capture begins"),
)

CLASSES: dict[int, tuple[type[DriverError], str]] = {c: (cls, fix) for cls, codes, fix in _FAMILIES for c in codes}
"""Status code -> exception class and remedy."""


def driver_error(code: int, name: str, text: str, call: str) -> DriverError:
    """The exception for a status code.

    Args:
        code: what the call returned.
        name: the driver's name for it.
        text: the driver's sentence about it.
        call: the function that was called, and on what.
    """
    cls, remedy = CLASSES.get(code, (DriverError, "look the code up in the driver's documentation"))
    error = cls(call, f"{name} ({code}), {text}", remedy)
    error.code, error.name = code, name
    return error
