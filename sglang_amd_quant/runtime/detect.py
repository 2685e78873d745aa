"""Which architecture serves here, and which kernels this installation can launch on an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from sglang_amd_quant.runtime.arch import ARCH_FACTS, arch_facts
from sglang_amd_quant.runtime.code_objects import CODE_OBJECT_DIR, code_object_path
from sglang_amd_quant.selection import KernelSpec, kernels, shipped
from sglang_amd_quant.selection.arch import canonical

CPU = "cpu"


@lru_cache(maxsize=1)
def current_arch() -> str:
    """`gfx950`, `gfx942`, `gfx1100`, ... on ROCm; `sm_90`, ... on CUDA; `cpu` where torch sees no accelerator."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=1)
def cu_count() -> int:
    """Compute units (SMs) of the current device; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


@lru_cache(maxsize=64)
def launchable(arch: str, root: Path = CODE_OBJECT_DIR) -> frozenset[str]:
    """Names of the kernels that this installation can launch on an architecture: what selection may choose from.

    Args:
        arch: as the driver reports it (`gfx1151`), or a family (`gfx11`: what can be launched on all its members).
        root: where compiled code objects lie.
    """
    return frozenset(spec.name for spec in _made_for(arch)).difference(missing(arch, root))


@lru_cache(maxsize=64)
def missing(arch: str, root: Path = CODE_OBJECT_DIR) -> Mapping[str, str]:
    """Kernels of this package that are made for an architecture and cannot be launched on it here, with the reason.

    A kernel that is not made for it is in neither list: legality refuses that one by its envelope.
    """
    return {spec.name: why for spec in _made_for(arch) if (why := _lacking(spec, arch, root))}


def _made_for(arch: str) -> list[KernelSpec]:
    specs = [kernels()[name] for name in sorted(shipped())]
    return [spec for spec in specs if not spec.archs or canonical(arch) in spec.archs]


def _lacking(spec: KernelSpec, arch: str, root: Path) -> str:
    """What keeps a kernel from being launched on an arch; empty if nothing does."""
    if spec.triton and find_spec("triton") is None:
        return "triton is not installed; install the build that belongs to torch"
    members = [arch] if arch in ARCH_FACTS else [name for name in ARCH_FACTS if canonical(name) == arch]
    if spec.code_objects and not members:
        return f"nothing is compiled for {arch}; supported are {', '.join(ARCH_FACTS)}"
    for member in members:
        for name in spec.code_objects:
            if not code_object_path(name, arch_facts(member), root).exists():
                return f"code object {name} for {member} was not built; run `amd-mx build --arch {member}`"
    return ""
