"""Targets that a kernel can be run on: four AMD architectures in the emulator, sm_90 where such a GPU is present."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sglang_amd_quant.kernels.hip.manifest import AMD_ARCHS

from sglang_amd_quant.runtime.arch import Arch, arch_facts
from sglang_amd_quant.runtime.launch import ArgumentPacker, LaunchDescription
from sglang_amd_quant.toolchain.compilers import find_compiler

for _folder in (Path(__file__).parents[1] / "emulator", Path(__file__).parent):
    sys.path.insert(0, str(_folder))

NARROW = Path(__file__).parents[2] / "kernels" / "hip" / "include"


@dataclass
class Target:
    """Somewhere to run code objects."""

    arch: Arch

    def build(self, source: Path, work: Path, defines: tuple[str, ...] = ()) -> bytes:
        """Compile a source with the project's headers."""
        compiler = find_compiler(self.arch)
        assert compiler is not None
        work.mkdir(parents=True, exist_ok=True)
        return compiler.compile(source, self.arch, NARROW, defines, work).binary

    def run(self, code: bytes | Path, description: LaunchDescription, **options: Any) -> Any:
        """Launch; arrays in the description are read and written in place. Returns the emulator's counters, or None."""
        raise NotImplementedError


class Emulated(Target):
    """The emulator, with all its checks on unless `checks` says otherwise."""

    def run(self, code: bytes | Path, description: LaunchDescription, **options: Any) -> Any:
        from emulator.launch import launch

        return launch(
            code,
            description.kernel,
            (description.grid,),
            (description.block,),
            [np.int64(a) if isinstance(a, _I64) else a for a in description.args],
            lds_bytes=description.lds,
            **options,
        )


class _I64(int):
    pass


class Real(Target):
    """The first GPU, through the runtime's driver."""

    def run(self, code: bytes | Path, description: LaunchDescription, **options: Any) -> Any:
        import torch

        from sglang_amd_quant.runtime.device import Gpu, Kernel, gpu

        device: Gpu = gpu(0)
        image = code.read_bytes() if isinstance(code, Path) else code
        tensors = [
            torch.from_numpy(a.view(np.uint8).reshape(-1)).cuda() if isinstance(a, np.ndarray) else a
            for a in description.args
        ]
        types = tuple(
            "ptr" if a is None or isinstance(a, torch.Tensor) else "i64" if isinstance(a, _I64) else "i32"
            for a in tensors
        )
        previous = device.driver.enter(0)
        try:
            function = device.driver.function(device.driver.load(image, description.kernel), description.kernel)
            device.driver.allow_lds(function, 0)
        finally:
            device.driver.leave(previous)
        kernel = Kernel(device, description.kernel, function, ArgumentPacker(description.kernel, types))
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(description.grid, description.block, description.lds, stream, tuple(tensors))
        torch.cuda.synchronize()
        for array, tensor in zip(description.args, tensors, strict=True):
            if isinstance(array, np.ndarray):
                array.view(np.uint8).reshape(-1)[:] = tensor.cpu().numpy()


@pytest.fixture(params=[*AMD_ARCHS, "sm_90"])
def target(request: pytest.FixtureRequest) -> Target:
    """Each architecture in turn."""
    from sm90 import is_here

    arch = arch_facts(request.param)
    if arch.vendor == "nvidia":
        if not is_here():
            pytest.skip("no sm_90 GPU")
        return Real(arch)
    if find_compiler(arch) is None:
        pytest.skip("no HIP compiler")
    pytest.importorskip("rocm.llvm", reason="the emulator's disassembler")
    return Emulated(arch)
