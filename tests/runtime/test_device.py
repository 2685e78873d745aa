"""The runtime over a fake driver library: what reaches the driver, what its errors become, what is loaded how often."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_amd_quant.kernels.hip import manifest

from sglang_amd_quant.errors import AmdMxError, ShapeError, UnsupportedError
from sglang_amd_quant.runtime import errors
from sglang_amd_quant.runtime.device import Gpu
from sglang_amd_quant.runtime.driver import CudaDriver, Driver, HipDriver
from sglang_amd_quant.runtime.launch import ArgumentPacker, LaunchDescription, address, offsets

KERNEL = "gemv_mxfp4_bf16_m1"
ARGS = (0x11, 0x22, 0x33, None, 0x55, 1 << 40, -2, 1, 2, 3, 4, 5, 6, 7)
PACKED = struct.pack("<5Q2q7i", 0x11, 0x22, 0x33, 0, 0x55, 1 << 40, -2, 1, 2, 3, 4, 5, 6, 7)


class Launch(ctypes.Structure):
    """struct launch of fake_driver.c."""

    _fields_ = [
        ("size", ctypes.c_uint32 * 7),
        ("function", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.c_uint8 * 256),
        ("bytes", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("device", ctypes.c_int),
        ("cluster", ctypes.c_uint32),
        ("overlap", ctypes.c_uint32),
    ]


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake driver, compiled by whatever C compiler is there."""
    file = tmp_path_factory.mktemp("fake") / "libfake.so"
    compiler = [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        pytest.importorskip("ziglang")
        compiler = [sys.executable, "-m", "ziglang", "cc"]
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run([*compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
    return file


@pytest.fixture(params=["cuda", "hip"])
def fake(request: pytest.FixtureRequest, library_file: Path, tmp_path: Path) -> SimpleNamespace:
    """A driver over a fresh copy of the fake library, and code objects for its architecture."""
    copy = tmp_path / "driver.so"
    shutil.copy(library_file, copy)  # its own copy, so its own state
    library = ctypes.CDLL(str(copy))
    library.fake_last.restype = ctypes.POINTER(Launch)
    arch, suffix = {"cuda": ("sm_90", "cubin"), "hip": ("gfx950", "hsaco")}[request.param]
    folder = tmp_path / "code_objects" / arch
    folder.mkdir(parents=True)
    for code_object in manifest.CODE_OBJECTS:
        (folder / f"{code_object.name}.{suffix}").write_bytes(b"\x7fELF and so on")
    cls: type[Driver] = CudaDriver if request.param == "cuda" else HipDriver
    names = {n: n for n in ("Init", "ModuleLoadData", "ModuleGetFunction")}
    prefix = "cu" if request.param == "cuda" else "hip"
    launch_name = "cuLaunchKernelEx" if request.param == "cuda" else "hipModuleLaunchKernel"
    calls = {k: prefix + v for k, v in names.items()} | {"LaunchKernel": launch_name}
    return SimpleNamespace(
        api=request.param,
        library=library,
        driver=cls(library),
        code_objects=tmp_path / "code_objects",
        calls=calls,
        fail=lambda call, code: library.fake_fail(calls[call].encode(), code),
        cls=cls,
        last=lambda: library.fake_last().contents,
    )


def gpu(fake: SimpleNamespace, ordinal: int = 0) -> Gpu:
    """A device of the fake driver."""
    return Gpu(ordinal, fake.driver, fake.code_objects)


def test_device_facts(fake: SimpleNamespace) -> None:
    device = gpu(fake)
    assert (device.arch_name, device.cu_count) == {"cuda": ("sm_90", 132), "hip": ("gfx950", 256)}[fake.api]
    assert device.arch.name == device.arch_name


def test_a_launch_reaches_the_driver_as_described(fake: SimpleNamespace) -> None:
    gpu(fake).launch(LaunchDescription(KERNEL, grid=7, block=192, args=ARGS, lds=4096), stream=0xABC)
    last = fake.last()
    assert list(last.size) == [7, 1, 1, 192, 1, 1, 4096]
    assert last.stream == 0xABC
    assert bytes(last.arguments[: last.bytes]) == PACKED
    assert last.end == {"cuda": 0, "hip": 3}[fake.api]  # CU_LAUNCH_PARAM_END, HIP_LAUNCH_PARAM_END


@pytest.mark.parametrize(("cluster", "overlap"), [(4, False), (1, True), (2, True)])
def test_clusters_and_overlap_reach_cuda_and_mean_nothing_to_hip(
    fake: SimpleNamespace, cluster: int, overlap: bool
) -> None:
    gpu(fake).launch(LaunchDescription(KERNEL, 8, 64, ARGS, lds=5, cluster=cluster, overlap=overlap), stream=0xABC)
    last = fake.last()
    assert list(last.size) == [8, 1, 1, 64, 1, 1, 5]
    assert last.stream == 0xABC
    assert last.count == 1
    if fake.api == "cuda":
        assert (last.cluster, last.overlap) == (cluster, overlap)


def test_dynamic_lds_beyond_the_default_is_allowed_once_per_function(fake: SimpleNamespace) -> None:
    gpu(fake).load(KERNEL)
    attributes = {i: value for i in range(16) if (value := fake.library.fake_attribute(i))}
    assert attributes == {"cuda": {8: 232448 - 1024, 9: 100}, "hip": {}}[fake.api]


def test_each_device_loads_a_code_object_once(fake: SimpleNamespace) -> None:
    first, second = gpu(fake, 0), gpu(fake, 1)
    for device in (first, second, first):
        for name in (KERNEL, "gemv_mxfp4_f32_m4"):
            device.launch(LaunchDescription(name, 1, 64, ARGS), 0)
            assert fake.last().device == device.ordinal
            assert fake.library.fake_current() == 0  # as it was before
    assert fake.library.fake_loads() == 2
    assert fake.last().count == 6


def test_threads_share_kernels_and_do_not_mix_arguments(fake: SimpleNamespace) -> None:
    device, wrong = gpu(fake), []

    def work(seed: int) -> None:
        for i in range(200):
            device.kernel(KERNEL).launch(1, 64, 0, seed, (seed * 1000 + i, *ARGS[1:]))

    def failing(seed: int) -> None:
        try:
            work(seed)
        except Exception as error:  # a thread's exception must fail the test
            wrong.append(error)

    threads = [threading.Thread(target=failing, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert fake.library.fake_loads() == 1
    assert fake.last().count == 800


def test_a_thread_without_a_context_gets_one(fake: SimpleNamespace) -> None:
    if fake.api == "hip":
        pytest.skip("HIP threads always have a device")
    fake.library.fake_set_current(-1)
    gpu(fake).launch(LaunchDescription(KERNEL, 1, 64, ARGS), 0)
    assert fake.library.fake_current() == 0


@pytest.mark.parametrize("code", sorted(errors.CLASSES))
def test_every_known_status_has_its_own_exception(fake: SimpleNamespace, code: int) -> None:
    device = gpu(fake)
    device.load(KERNEL)
    fake.fail("LaunchKernel", code)
    cls, remedy = errors.CLASSES[code]
    with pytest.raises(cls, match=re.escape(remedy)) as raised:
        device.launch(LaunchDescription(KERNEL, 3, 64, ARGS, lds=5), 0)
    assert raised.value.code == code
    assert str(code) in raised.value.name
    assert KERNEL in str(raised.value)
    assert "grid 3, block 64, LDS 5" in str(raised.value)
    assert fake.library.fake_current() == 0


def test_an_unknown_status_keeps_the_drivers_name(fake: SimpleNamespace) -> None:
    device = gpu(fake)
    device.load(KERNEL)
    fake.fail("LaunchKernel", 12345)
    with pytest.raises(errors.DriverError, match="12345") as raised:
        device.launch(LaunchDescription(KERNEL, 1, 64, ARGS), 0)
    assert type(raised.value) is errors.DriverError


@pytest.mark.parametrize(
    ("call", "code", "cls"),
    [
        ("ModuleLoadData", 209, errors.WrongArchError),
        ("ModuleLoadData", 2, errors.OutOfMemoryError),
        ("ModuleGetFunction", 500, errors.KernelNotFoundError),
        ("ModuleLoadData", 900, errors.StreamCaptureError),
    ],
)
def test_loading_fails_by_name_and_can_be_tried_again(fake: SimpleNamespace, call: str, code: int, cls: type) -> None:
    device = gpu(fake)
    fake.fail(call, code)
    with pytest.raises(cls):
        device.kernel(KERNEL)
    fake.library.fake_fail(b"nothing", 0)
    device.launch(LaunchDescription(KERNEL, 1, 64, ARGS), 0)


def test_no_such_device_and_failing_init(fake: SimpleNamespace) -> None:
    with pytest.raises(errors.NoDeviceError):
        gpu(fake, 2)
    fake.fail("Init", 100)
    with pytest.raises(errors.NoDeviceError, match="Init"):
        fake.cls(fake.library)


def test_unknown_kernels_and_missing_code_objects(fake: SimpleNamespace) -> None:
    device = gpu(fake)
    with pytest.raises(UnsupportedError, match="not in the manifest"):
        device.kernel("no_such_kernel")
    file = next(fake.code_objects.rglob("gemv_mxfp4.*"))
    file.write_bytes(b"")
    with pytest.raises(AmdMxError, match="no ELF file"):
        device.kernel(KERNEL)
    file.unlink()
    with pytest.raises(UnsupportedError, match=f"amd-mx build --arch {device.arch_name}"):
        device.kernel(KERNEL)


@pytest.mark.parametrize("args", [ARGS[:-1], (*ARGS, 0), (*ARGS[:-1], 1 << 31), (*ARGS[:-1], "x"), ("x", *ARGS[1:])])
def test_arguments_that_do_not_fit_never_reach_the_driver(fake: SimpleNamespace, args: tuple[Any, ...]) -> None:
    device = gpu(fake)
    with pytest.raises(ShapeError, match="takes 14"):
        device.launch(LaunchDescription(KERNEL, 1, 64, args), 0)
    assert fake.last().count == 0


def test_arguments_are_laid_out_as_c_does() -> None:
    types = ("i32", "ptr", "f32", "i64", "i32")
    assert offsets(types) == [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4)]
    packed = ArgumentPacker("k", types).pack((1, 2, 1.0, 3, 4))
    assert packed == struct.pack("<i4xQf4xqi", 1, 2, 1.0, 3, 4)


def test_pointers_are_taken_from_tensors_arrays_and_addresses() -> None:
    import numpy as np
    import torch

    array, tensor = np.zeros(3), torch.zeros(3)
    assert address(array) == array.ctypes.data
    assert address(tensor) == tensor.data_ptr()
    assert address(None) == 0
    with pytest.raises(TypeError, match="tensor, an array"):
        address(1.5)


def test_status_codes_are_those_of_the_headers() -> None:
    """CUDA's and HIP's numbers agree where this package uses one class for both."""
    triton = pytest.importorskip("triton")
    header = Path(triton.__file__).parent / "backends/amd/include/hip/hip_runtime_api.h"
    if not header.exists():
        pytest.skip("this Triton brings no HIP header")
    hip = {int(code): name for name, code in re.findall(r"(hipError\w+) = (\d+)", header.read_text())}
    expected = {
        errors.InvalidValueError: "hipErrorInvalid(Value|Configuration)",
        errors.OutOfMemoryError: "hipError(OutOfMemory|Mem)",
        errors.NoDeviceError: "hipError(No|Invalid)Device",
        errors.WrongArchError: "hipError(NoBinary|InvalidDeviceF)",
        errors.IllegalAddressError: "hipErrorIllegalAddress",
        errors.StreamCaptureError: "hipError(StreamC|CapturedE)",
        errors.KernelNotFoundError: "hipError(NotFound|SharedObjectSymbolNotFound)",
        errors.LaunchResourcesError: "hipError(LaunchOutOf|Cooperative)",
        errors.LaunchTimeoutError: "hipErrorLaunchTimeOut",
        errors.LaunchFailedError: "hipError(LaunchFailure|Assert)",
        errors.InvalidImageError: "hipErrorInvalid(Im|Ke|So)",
        errors.InvalidHandleError: "hipErrorInvalid(ResourceH|H)andle",
        errors.EccError: "hipErrorECC",
        errors.InvalidContextError: "hipError(InvalidContext|ContextIsDestroyed)",
        errors.NotInitializedError: "hipError(Deinit|Not?Init|Init)",
        errors.DriverNotSupportedError: "hipError(NotS|Insuff)",
    }
    checked = 0
    for code, (cls, _) in errors.CLASSES.items():
        if code in hip:
            assert re.match(expected[cls], hip[code]), (code, cls, hip[code])
            checked += 1
    assert checked > 25
