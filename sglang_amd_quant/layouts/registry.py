"""Layouts by name. The names are those of `names.py`; a test sees that both agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from sglang_amd_quant.errors import SchemeError
from sglang_amd_quant.layouts.awq import AutoAwq
from sglang_amd_quant.layouts.base import Layout, SourceLayout
from sglang_amd_quant.layouts.cdna3_tile import Cdna3E2m1, Cdna3E4m3, TileScale
from sglang_amd_quant.layouts.cdna4_scale import Cdna4Scale
from sglang_amd_quant.layouts.exllama import ExLlama
from sglang_amd_quant.layouts.gptq import Gptq
from sglang_amd_quant.layouts.int4_tile import CdnaInt4, MmaInt4, RdnaInt4, TileGroup
from sglang_amd_quant.layouts.mma_tile import MmaScale, MmaTile
from sglang_amd_quant.layouts.mxfp8_lane import Mxfp8Lane
from sglang_amd_quant.layouts.names import Role
from sglang_amd_quant.layouts.preshuffle import Preshuffle
from sglang_amd_quant.layouts.strided import Strided

L = TypeVar("L", bound=Layout)

VALUES: Mapping[str, Layout] = {
    item.name: item
    for item in (
        Strided(), Preshuffle(), Mxfp8Lane(), MmaTile(), Cdna3E2m1(), Cdna3E4m3(), ExLlama(), CdnaInt4(), RdnaInt4(),
        MmaInt4(),
    )
}  # fmt: skip
SCALES: Mapping[str, Layout] = {
    item.name: item
    for item in (Strided(Role.SCALE), Cdna4Scale(rows=32), Cdna4Scale(rows=256), MmaScale(), TileScale(), TileGroup())
}
SOURCES: Mapping[str, SourceLayout] = {item.name: item for item in (AutoAwq(), Gptq(version=1), Gptq(version=2))}


def _find(layouts: Mapping[str, L], name: str, role: Role) -> L:
    if name not in layouts:
        raise SchemeError(f"{role} layout {name!r}", "unknown", f"use one of {', '.join(layouts)}")
    return layouts[name]


def value_layout(name: str) -> Layout:
    """The layout of values of that name.

    Raises:
        SchemeError: there is none.
    """
    return _find(VALUES, name, Role.VALUE)


def scale_layout(name: str) -> Layout:
    """The layout of scales of that name.

    Raises:
        SchemeError: there is none.
    """
    return _find(SCALES, name, Role.SCALE)


def source_layout(name: str) -> SourceLayout:
    """The checkpoint layout of that name.

    Raises:
        SchemeError: there is none.
    """
    return _find(SOURCES, name, Role.SOURCE)
