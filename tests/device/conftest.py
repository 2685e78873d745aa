"""Tests here run on the accelerator that torch sees, and say so where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

HELPERS = str(Path(__file__).parents[1] / "ops")
if HELPERS not in sys.path:
    sys.path.insert(0, HELPERS)

WHY_NOT = "needs an accelerator that torch sees"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder, and skip it on a machine without accelerator."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture
def arch() -> str:
    """The device's architecture, as the driver reports it."""
    from sglang_amd_quant.runtime.detect import current_arch

    return current_arch()


@pytest.fixture
def needs(arch: str) -> Callable[[str], None]:
    """`needs(kernel)` skips where this installation cannot launch it, with the reason that `amd-mx doctor` gives."""
    from sglang_amd_quant.runtime.detect import launchable, missing

    def check(kernel: str) -> None:
        if kernel not in launchable(arch):
            pytest.skip(f"{kernel}: {missing(arch).get(kernel, f'not made for {arch}')}")

    return check


@pytest.fixture
def captured() -> Callable[[Callable[[], torch.Tensor]], tuple[torch.cuda.CUDAGraph, torch.Tensor]]:
    """`captured(run)` -> a graph of it, after one warm-up on a side stream, and the tensor that replays fill."""

    def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph, result

    return capture


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    from sglang_amd_quant.ops import linear, moe

    torch.manual_seed(0)
    linear.bound.cache_clear()
    moe.bound.cache_clear()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a fault of a kernel shows in the test that launched it


def on_device(layer):  # type: ignore[no-untyped-def]
    """A linear or MoE layer with its tensors on the accelerator."""
    from sglang_amd_quant.ops.linear import QuantizedLinear

    def act(a):  # type: ignore[no-untyped-def]
        return replace(a, scale=None if a.scale is None else a.scale.cuda())

    if isinstance(layer, QuantizedLinear):
        return replace(layer, weight=layer.weight.to("cuda"), act=act(layer.act))
    problem = replace(layer.problem, act13=act(layer.problem.act13), act2=act(layer.problem.act2))
    biases = {name: None if b is None else b.cuda() for name, b in (("b13", layer.b13), ("b2", layer.b2))}
    return replace(layer, problem=problem, w13=layer.w13.to("cuda"), w2=layer.w2.to("cuda"), **biases)


@pytest.fixture
def device_linear(arch: str) -> Callable[..., object]:
    """`device_linear(scheme, n, k, ...)`: as `op_layers.make_linear`, on the accelerator."""
    from op_layers import make_linear

    return lambda scheme, n, k, **options: on_device(make_linear(scheme, n, k, arch, **options))


@pytest.fixture
def device_moe(arch: str) -> Callable[..., object]:
    """`device_moe(scheme, experts, hidden, inter, top_k, ...)`: as `op_layers.make_moe`, on the accelerator."""
    from op_layers import make_moe

    return lambda scheme, e, h, i, top_k, **options: on_device(make_moe(scheme, e, h, i, top_k, arch, **options))
