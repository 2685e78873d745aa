"""Where the compiled code objects lie: in the wheel, or in the source tree after `amd-mx build`."""

from __future__ import annotations

from pathlib import Path

import sglang_amd_quant.kernels as kernels
from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.kernels.hip import manifest
from sglang_amd_quant.runtime.arch import Arch, arch_facts

CODE_OBJECT_DIR = Path(str(kernels.__file__)).parent / "code_objects"


def code_object_path(name: str, arch: Arch, root: Path = CODE_OBJECT_DIR) -> Path:
    """File of a code object (it need not exist)."""
    return root / arch.name / f"{name}.{arch.suffix}"


def code_object(entry_point: str, arch: str, root: Path = CODE_OBJECT_DIR) -> Path:
    """The file that holds an entry point for an arch.

    Raises:
        UnsupportedError: no such entry point, or it was not built for this arch.
    """
    facts = arch_facts(arch)
    try:
        try:
            holder, _ = manifest.find(entry_point, arch)
        except KeyError:
            holder, _ = manifest.find(entry_point)
    except KeyError:
        raise UnsupportedError(
            f"kernel {entry_point!r}", "not in the manifest", "see kernels/hip/manifest.py"
        ) from None
    path = code_object_path(holder.name, facts, root)
    if not path.exists():
        remedy = (
            f"run `amd-mx build --arch {arch}`" if arch in holder.archs else f"use one of {', '.join(holder.archs)}"
        )
        raise UnsupportedError(f"kernel {entry_point} for {arch}", f"{path} does not exist", remedy)
    return path
