"""How the bytes lie: named, invertible layouts that travel with the tensor.

The names and what they demand of a shape (`names.py`) need no torch and are imported here. The classes that move bytes
do, and load on first use of one of their names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sglang_amd_quant.layouts.names import (
    SCALE_LAYOUTS,
    SOURCE_LAYOUTS,
    STRIDED,
    VALUE_LAYOUTS,
    LayoutSpec,
    Role,
    TensorLayout,
)

if TYPE_CHECKING:
    from sglang_amd_quant.layouts.awq import AutoAwq
    from sglang_amd_quant.layouts.base import Layout, SourceLayout
    from sglang_amd_quant.layouts.cdna4_scale import Cdna4Scale
    from sglang_amd_quant.layouts.exllama import ExLlama
    from sglang_amd_quant.layouts.gptq import Gptq
    from sglang_amd_quant.layouts.mxfp8_lane import Mxfp8Lane
    from sglang_amd_quant.layouts.preshuffle import Preshuffle
    from sglang_amd_quant.layouts.registry import scale_layout, source_layout, value_layout
    from sglang_amd_quant.layouts.strided import Strided

_TORCH: dict[str, str] = {
    "Layout": "base",
    "Strided": "strided",
    "Cdna4Scale": "cdna4_scale",
    "Preshuffle": "preshuffle",
    "Mxfp8Lane": "mxfp8_lane",
    "ExLlama": "exllama",
    "AutoAwq": "awq",
    "Gptq": "gptq",
    "SourceLayout": "base",
    "source_layout": "registry",
    "value_layout": "registry",
    "scale_layout": "registry",
}
"""Name -> the module here that defines it."""

__all__ = [
    "SCALE_LAYOUTS",
    "SOURCE_LAYOUTS",
    "STRIDED",
    "VALUE_LAYOUTS",
    "AutoAwq",
    "Cdna4Scale",
    "ExLlama",
    "Gptq",
    "Layout",
    "LayoutSpec",
    "Mxfp8Lane",
    "Preshuffle",
    "Role",
    "SourceLayout",
    "Strided",
    "TensorLayout",
    "scale_layout",
    "source_layout",
    "value_layout",
]


def __getattr__(name: str) -> Any:
    if name not in _TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_TORCH[name]}"), name)
