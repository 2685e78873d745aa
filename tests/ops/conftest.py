"""Devices that are not there: the emulator, and the Triton kernels' twins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS, find

from sglang_amd_quant.ops import hip, layout, linear, moe, operand, packed, quantize, routing
from sglang_amd_quant.runtime.arch import arch_facts
from sglang_amd_quant.runtime.code_objects import CODE_OBJECT_DIR, code_object
from sglang_amd_quant.runtime.launch import LaunchDescription
from sglang_amd_quant.selection import kernels, shipped
from sglang_amd_quant.toolchain.build import build
from sglang_amd_quant.toolchain.compilers import find_compiler

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "emulator"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


class EmulatedDevice:
    """A GPU of some arch in the emulator. Tensors lie on the CPU and are read and written in place.

    Attributes:
        launched: names of the kernels that ran.
    """

    cu_count = 4

    def __init__(self, arch_name: str, root: Path) -> None:
        self.arch_name, self._root, self.launched = arch_name, root, []  # type: ignore[var-annotated]

    def load(self, *names: str) -> None:
        for name in names:
            holder, _ = find(name, self.arch_name)  # KeyError: another arch's
            assert code_object(name, self.arch_name, self._root).stem == holder.name

    def start(self, description: LaunchDescription) -> None:
        from emulator.launch import launch

        self.launched.append(description.kernel)
        launch(
            code_object(description.kernel, self.arch_name, self._root),
            description.kernel,
            (description.grid,),
            (description.block,),
            [_array(a) if isinstance(a, torch.Tensor) else a for a in description.args],
            lds_bytes=description.lds,
        )


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, from its first element on, as bytes; the launch describes strides."""
    storage = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage[tensor.storage_offset() * tensor.element_size() :].numpy()


@cache
def built(arch: str) -> Path:
    """The folder of code objects, the arch's up to date. Test processes take turns: the first one compiles."""
    locks = Path(__file__).parents[2] / ".cache"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / f"code_objects_{arch}.lock"):
        build([arch])
    return CODE_OBJECT_DIR


@pytest.fixture(params=AMD_ARCHS)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """Each AMD arch in turn: ops for it launch into the emulator."""
    if find_compiler(arch_facts(request.param)) is None:
        pytest.skip("no HIP compiler")
    pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
    device = EmulatedDevice(request.param, built(request.param))
    monkeypatch.setattr(hip, "device_of", lambda x: device)
    only(monkeypatch, "gemv_mxfp4")
    return device


@pytest.fixture
def device(emulated: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The emulated device, which can launch all kernels; helpers run as kernels too."""
    for module in (layout, operand, packed):
        monkeypatch.setattr(module, "current_arch", lambda: emulated.arch_name)
    for module in (quantize, routing):
        monkeypatch.setattr(module, "has_triton", lambda x: True)
    monkeypatch.setattr(hip, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(hip, "_workspaces", {})
    monkeypatch.setattr(hip, "_spares", {})
    only(monkeypatch, *shipped())
    return emulated


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """These kernels, and no others, can be launched."""
    for module in (layout, linear, moe):
        monkeypatch.setattr(module, "launchable", lambda arch: frozenset(names))
    forget()


def forget() -> None:
    """Drop what ops remember of layers."""
    linear.bound.cache_clear()
    moe.bound.cache_clear()


@pytest.fixture
def triton_twins(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Triton kernels run as their torch twins; gives the calls, each as its keyword arguments."""
    pytest.importorskip("triton")
    from sglang_amd_quant.kernels.triton import mx_gemm
    from triton_twin import mx_gemm_twin

    calls: list[dict[str, Any]] = []

    def twin(x, x_scales, w, w_scales, y, config, arch, **options):  # type: ignore[no-untyped-def]
        for tensor in (x, x_scales, w, w_scales, y, *options.values()):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()
        assert mx_gemm.element_of(x) in ("bf16", "e4m3", "e2m1")
        calls.append({"x": x, "y": y, "config": config, "arch": arch, **options})
        if options.get("row_ids") is not None:
            assert options["row_ids"].numel() == options["block_experts"].numel() * config.block_m
            y.fill_(torch.nan)  # rows that stand nowhere in row_ids would stay so
            written = options["row_ids"].long()
            y[written[written < y.shape[0]]] = 0
        result = mx_gemm_twin(x, x_scales, w, w_scales, y.shape[1], **options)
        y.copy_(result + 0 * y if options.get("row_ids") is not None else result)
        return y

    monkeypatch.setattr(mx_gemm, "mx_gemm", twin)
    only(monkeypatch, "triton_mx_gemm", "triton_mx_moe")
    return calls


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    forget()
    yield
    forget()


@pytest.fixture
def moe_twins(triton_twins: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As `triton_twins`, with the MoE GEMM that has epilogues as well."""
    from sglang_amd_quant.kernels.triton import moe_gemm, mx_gemm, tiles
    from triton_twin import strided

    def twin(x, x_scales, w, w_scales, y, y_scales, routing, config, arch, layout=tiles.STRIDED, **options):  # type: ignore[no-untyped-def]
        for tensor in (x, x_scales, w, w_scales, y, y_scales, *options.values()):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()
        assert config.block_m == routing.block_m
        triton_twins.append({"y": y, "config": config, "arch": arch, "layout": layout, **options})
        e = options["epilogue"]
        if layout != tiles.STRIDED:
            paired = e.activation != "none"
            n = y.shape[1] * (2 if e.out == "e2m1" else 1) * (2 if paired else 1)
            k = x.shape[1] * (2 if mx_gemm.element_of(x) == "e2m1" else 1)
            pairs = None if not paired else "interleaved" if e.interleaved else "halves"
            w, w_scales = strided(w, w_scales, n, k, layout, pairs)
        values, scales = moe_gemm.moe_gemm_torch(x, x_scales, w, w_scales, routing, **options)
        written = routing.row_ids.long()
        written = written[written < routing.rows]
        if y_scales is None:
            y.fill_(torch.nan)
            y[written] = values.to(y.dtype)[written]
        else:
            y.fill_(0xFF), y_scales.fill_(255)  # NaN, or -6 times NaN
            y[written], y_scales[written] = values.view(torch.uint8)[written], scales[written]
        return y

    monkeypatch.setattr(moe_gemm, "moe_gemm", twin)
    only(monkeypatch, "triton_moe", "triton_mx_moe")
    return triton_twins


@pytest.fixture
def served(
    emulated: EmulatedDevice, moe_twins: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[moe.QuantizedMoe], moe.QuantizedMoe]:
    """Lays an MoE out for the emulated device, which can launch the grouped decode kernels and `triton_moe`."""
    for module in (layout, operand, packed):
        monkeypatch.setattr(module, "current_arch", lambda: emulated.arch_name)
    monkeypatch.setattr(hip, "WORKSPACE_BYTES", 1 << 20)
    monkeypatch.setattr(hip, "_workspaces", {})
    monkeypatch.setattr(hip, "_spares", {})
    only(monkeypatch, "triton_moe", *(name for name in kernels() if name.startswith("hip_moe_decode_")))

    def serve(layer: moe.QuantizedMoe) -> moe.QuantizedMoe:
        w13, w2 = layout.lay_out_experts(layer.w13, layer.w2, layer.gate_up, layer.down)  # type: ignore[arg-type]
        return replace(layer, w13=w13, w2=w2)

    return serve


@pytest.fixture
def hopper_twins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Hopper kernels run as what they stand for, on weights that "packing" leaves as they are; gives the calls."""
    pytest.importorskip("triton.experimental.gluon")
    from sglang_amd_quant.kernels.triton import hopper, hopper_pack, quant_mx

    from sglang_amd_quant import formats
    from sglang_amd_quant.ops.activation import Activation
    from sglang_amd_quant.ops.routing import route_torch

    calls: list[str] = []

    def pack(w, scales, x_format="bf16", pairs=None):  # type: ignore[no-untyped-def]
        assert pairs is None or w.shape[-2] % 16 == 0
        w_format = "e4m3" if w.dtype == torch.float8_e4m3fn else "e2m1"
        n, k = w.shape[-2], scales.shape[-1] * 32
        one = torch.ones(w.shape[0], n)
        moved = torch.tensor(3)
        return hopper_pack.HopperWeights(w, scales, one, w_format, x_format, n, k, pairs, len(w), rounded=moved)

    def activations(x, element, mode, x_format, ordered=False, beside=False, inside=False):  # type: ignore[no-untyped-def]
        out = "bf16" if x_format == "bf16" else "row"
        if element is None or (inside and x_format == "e4m3" and (element, mode) == ("e4m3", None)):
            return x, None
        return quant_mx.quant_mx_torch(x, element, out, mode, ordered=ordered)

    def gemm(x, factors, w, y, routing, config, *, overlapping=None, top_k=1, bias=None, row_weights=None,
             activation="none", **f):  # type: ignore[no-untyped-def]  # fmt: skip
        if routing is None:  # dense
            assert len(w.data) == 1
            routing = route_torch(torch.zeros(len(y), 1, dtype=torch.int32), 1, config.block_m)
        if isinstance(routing, hopper.Alone):
            assert routing.block_experts.numel() == len(y)
            routing = route_torch(routing.block_experts.view(-1, 1), len(w.data), routing.block_m)
        if w.x_format == "e4m3" and factors is None:  # by the kernel itself
            x, factors = quant_mx.quant_mx_torch(x, None, "row")
        elif w.orders_x:
            assert x.shape[1] == -(-w.k // 64) * 64
            x = x[:, hopper_pack.x_order(w.k).argsort()[: w.k]]
        assert x.shape[1] == w.k
        assert (factors is not None) == (w.x_format == "e4m3")
        assert (x.dtype, config.block_m) == (
            {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}[w.x_format],
            routing.block_m,
        )
        assert (w.pairs is not None) == (activation != "none")
        calls.append(w.x_format)
        values = formats.dequantize_mx(w.data, w.scales, w.w_format, torch.float32)
        left = x.float() if factors is None else x.float() * factors[:, None]
        y.fill_(torch.nan)
        for block, expert in enumerate(routing.block_experts.tolist()):
            rows = routing.row_ids[block * config.block_m : (block + 1) * config.block_m].long()
            rows = rows[rows < routing.rows]
            if expert >= 0:
                out = left[rows // top_k] @ values[expert].T + (0 if bias is None else bias[expert])
                if activation != "none":
                    out = Activation(activation, interleaved=w.pairs == "interleaved", **f)(out)
                y[rows] = (out if row_weights is None else out * row_weights[rows, None]).to(y.dtype)
        return y

    monkeypatch.setattr(hopper_pack, "pack_hopper", pack)
    monkeypatch.setattr(hopper, "activations", activations)
    monkeypatch.setattr(hopper, "hopper_gemm", gemm)
    for module in (layout, operand):
        monkeypatch.setattr(module, "current_arch", lambda: "sm_90")
    only(monkeypatch, "triton_mx_moe", "triton_mx_gemm", "triton_hopper_bf16", "triton_hopper_e4m3")
    return calls
