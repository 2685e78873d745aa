"""Launchers of the HIP kernels, and the GPU that a tensor lies on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from sglang_amd_quant.formats.mx import ELEMENTS
from sglang_amd_quant.kernels.hip import manifest
from sglang_amd_quant.ops.packed import PackedWeight, as_mx
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.device import Gpu, gpu
from sglang_amd_quant.runtime.gemv_mxfp4 import gemv_mxfp4
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE
from sglang_amd_quant.selection import kernel
from sglang_amd_quant.selection.amd_decode import WORKSPACE_BYTES, WORKSPACE_COUNTERS, decode_scheme

if TYPE_CHECKING:
    from sglang_amd_quant.ops.activation import Activation
    from sglang_amd_quant.ops.linear import LinearCall
    from sglang_amd_quant.runtime.decode_gemm import Epilogue

ROW_ALIGNMENT = 16
"""Bytes that rows of activations must be aligned to: kernels load them 16 bytes at a time."""


class Device(Protocol):
    """Somewhere that a launch can go: a GPU, or in tests the emulator."""

    arch_name: str
    cu_count: int

    def load(self, *names: str) -> None:
        """Load entry points."""

    def start(self, description: LaunchDescription) -> None:
        """Launch on the current stream."""


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda ordinal: 0)
"""The handle of torch's current stream on a device, of CUDA and of HIP alike, without making a Stream object of it:
what Triton and inductor ask too. A torch for CPUs has none."""


class GpuDevice:
    """A GPU, launched on torch's current stream."""

    def __init__(self, loaded: Gpu) -> None:
        self._gpu, self.arch_name, self.cu_count = loaded, loaded.arch_name, loaded.cu_count

    def load(self, *names: str) -> None:
        """Load entry points. Raises as `Gpu.kernel`."""
        self._gpu.load(*names)

    def start(self, description: LaunchDescription) -> None:
        """Launch. Raises as `Gpu.launch`."""
        self._gpu.launch(description, current_stream(self._gpu.ordinal))


_devices: dict[int, GpuDevice] = {}


def device_of(x: torch.Tensor) -> Device:
    """The GPU that x lies on.

    Raises:
        UnsupportedError: no GPU driver here.
    """
    ordinal = x.get_device()
    if ordinal not in _devices:
        _devices[ordinal] = GpuDevice(gpu(ordinal))
    return _devices[ordinal]


def preload(kernels: Iterable[str], x: torch.Tensor) -> None:
    """Load everything that these kernels launch on x's device: a graph capture must not be the first to need it."""
    code_objects = {name for k in kernels for name in kernel(k).code_objects}
    if not code_objects:
        return
    device = device_of(x)
    mine = (c for c in manifest.CODE_OBJECTS if c.name in code_objects and device.arch_name in c.archs)
    device.load(*(e.name for c in mine for e in c.entry_points))
    if device.arch_name.startswith("gfx"):
        prepare_workspaces(x)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] with contiguous rows that start at multiples of `ROW_ALIGNMENT` bytes: itself, or a copy."""
    whole = ROW_ALIGNMENT // x.element_size()
    if x.stride(-1) == 1 and x.stride(0) % whole == 0 and x.data_ptr() % ROW_ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def run_decode(call: LinearCall) -> None:
    """`kernels/hip/decode_gemm.hip`, dense: quantizes x itself."""
    from sglang_amd_quant.runtime.decode_gemm import decode_gemm
    from sglang_amd_quant.runtime.decode_plans import plans, prepared_bytes

    device, problem = device_of(call.x), call.problem
    data, scales, factors = *call.weight.tensors[:2], None
    if isinstance(call.weight, PackedWeight):
        data, factors, scales = (*call.weight.tensors, None)[:3]
    scheme, m = decode_scheme(problem), call.x.shape[0]
    plan = plans(scheme, m, problem.n, problem.k, device.cu_count, call.activation is not None)[0]
    room = prepared_bytes(scheme, plan, m, problem.k)
    prepared = call.x.new_empty(room, dtype=torch.uint8) if room else None
    for launch in decode_gemm(
        aligned(call.x), data, scales, factors, call.y, scheme=scheme, n=problem.n,
        cu_count=device.cu_count, carry=carry(call.act), x_scale=call.act.scale,
        epilogue=epilogue(call.bias, call.activation), plan=plan, prepared=prepared,
    ):  # fmt: skip
        device.start(launch)


_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}
"""Device and stream -> its workspace."""
_spares: dict[torch.device, torch.Tensor] = {}
"""For a stream that is first seen while a graph is captured, when what is zeroed is zeroed by the graph alone."""


def workspace(x: torch.Tensor) -> torch.Tensor:
    """Memory on x's device for one launch of the current stream at a time, the same each time: it was zeroed once, and
    kernels leave its counters zero. Launches of one stream follow each other; those of two may not, and would count
    each other's blocks.

    Where graphs are captured of more streams than `prepare_workspaces` has provided for, each launch gets memory of the
    graph's own, whose counters the graph zeroes.
    """
    key = x.device, current_stream(x.get_device())
    if key not in _workspaces:
        if not capturing(x):
            _workspaces[key] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
        elif x.device in _spares:
            _workspaces[key] = _spares.pop(x.device)
        else:
            fresh = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
            fresh[: 4 * WORKSPACE_COUNTERS].zero_()
            return fresh
    return _workspaces[key]


def capturing(x: torch.Tensor) -> bool:
    """Whether x's device captures a graph of the current stream."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def prepare_workspaces(x: torch.Tensor) -> None:
    """Make those of the current stream and of one to come, ahead of graph captures."""
    workspace(x)
    if x.device not in _spares:
        _spares[x.device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)


def run_decode_amd(call: LinearCall) -> None:
    """`kernels/hip/decode_gemm.hip` on AMD, dense: quantizes x itself."""
    from sglang_amd_quant.runtime.decode_gemm_amd import decode_gemm_amd

    device, problem, (data, scales) = device_of(call.x), call.problem, call.weight.tensors
    device.start(
        decode_gemm_amd(
            aligned(call.x), data, scales, call.y, arch=device.arch_name, scheme=decode_scheme(problem), n=problem.n,
            cu_count=device.cu_count, carry=carry(call.act), x_scale=call.act.scale,
            epilogue=epilogue(call.bias, call.activation), workspace=workspace(call.x),
        )
    )  # fmt: skip


def epilogue(bias: torch.Tensor | None, f: Activation | None) -> Epilogue:
    """A bias and an activation as the decode kernels take them."""
    from sglang_amd_quant.runtime.decode_gemm import Epilogue

    if f is None:
        return Epilogue(bias=bias)
    return Epilogue(bias=bias, activation=f.kind, interleaved=f.interleaved, alpha=f.alpha, limit=f.limit)


def carry(act: ActQuant) -> int:
    """What rounds the scales of activations that a kernel quantizes; 0 where there are none."""
    element = ELEMENTS.get(act.scheme.act)
    if act.scale is not None or element is None:
        return 0
    return element.carry(act.mode or DEFAULT_SCALE_MODE[act.scheme.act])


def run_gemv_mxfp4(call: LinearCall) -> None:
    """`kernels/hip/gemv_mxfp4.hip`: MXFP4 x bf16, M of 1 to 4."""
    device, w = device_of(call.x), as_mx(call.weight)
    device.start(
        gemv_mxfp4(
            aligned(call.x), w.data, w.scales, call.y,
            arch=device.arch_name, cu_count=device.cu_count, bias=call.bias,
        )
    )  # fmt: skip
