"""Which variants of the Triton kernels are compiled ahead of time, for what, and what their machine code must show.

Triton versions: 3.6.0 is what the tests run with; see docs/toolchain.md for newer ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .amd_gemm import LAYOUTS
from .group_gemm import GroupGemmConfig, kernel_of, word_of
from .mx_gemm import MxGemmConfig, mx_gemm_kernel
from .tiles import STRIDED, layout_constants

TRITON_ARCHS = ("gfx950", "gfx942", "gfx1100", "sm_90")

_ELEMENT = {"e2m1": "*u8", "e4m3": "*fp8e4nv", "bf16": "*bf16", "fp16": "*fp16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WORDS = {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
_ROUTING = {"row_ids": "*i32", "block_experts": "*i32", "row_weights": "*fp32"}
_SIZES = {"M": "i32", "N": "i32", "K": "i32", "tiles_m": "i32"}


@dataclass(frozen=True)
class Variant:
    """One specialization of `mx_gemm_kernel` or, with a `GroupGemmConfig`, of what `kernel_of` says.

    Attributes:
        name: how the report calls it.
        arch: target.
        x_format, w_format: element formats.
        config: tile and launch options.
        grouped: over experts, with row weights and bias; else dense.
        even_k: steps end where K does.
        claims: as in `kernels/hip/manifest.py`.
        layout: of values and of scales of the weights.
        group: elements of K that share a scale.
        activated: gpt-oss's swiglu of pairs of rows, by `amd_gemm_kernel`.
    """

    name: str
    arch: str
    x_format: str
    w_format: str
    config: MxGemmConfig | GroupGemmConfig
    grouped: bool
    even_k: bool
    claims: tuple[str, ...]
    layout: tuple[str, str] = STRIDED
    group: int = 32
    activated: bool = False

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        grouped = isinstance(self.config, GroupGemmConfig)
        return (
            kernel_of(self.w_format, self.layout[0], self.arch, _DTYPES[self.x_format]) if grouped else mx_gemm_kernel
        )

    @property
    def signature(self) -> dict[str, str]:
        """Triton type of each argument that is no constexpr; pointers that are None are left out."""
        grouped = isinstance(self.config, GroupGemmConfig)
        words = {self.w_format: _WORDS[word_of(self.w_format, self.kernel)]} if grouped else {}
        scales = {"x_scales": "*u8"} if self.x_format in ("e2m1", "e4m3") else {}
        pointers = {"x": _ELEMENT[self.x_format], **scales, "w": (_ELEMENT | words)[self.w_format]}
        pointers |= {"w_scales": "*i32" if self.w_format == "int4" else "*u8"}
        pointers |= {"bias": "*bf16"} if self.grouped else {}
        pointers |= {"y": "*fp16" if self.x_format == "fp16" else "*bf16"}
        return pointers | (_ROUTING if self.grouped else {}) | _SIZES

    @property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments, among them the pointers that are None."""
        step, top_k = max(self.config.block_k, self.group), 2 if self.grouped else 1
        k = step if self.even_k else step + self.group
        if isinstance(self.config, GroupGemmConfig):
            given = self.config.constants(
                self.w_format, self.group, top_k, k, self.arch, _DTYPES[self.x_format], self.layout
            )
        else:
            given = self.config.constants(self.x_format, self.w_format, top_k, k, self.arch)
            given |= layout_constants(self.layout)
        optional = (n for n in ("x_scale", "x_scales", "bias", *_ROUTING) if n in self.kernel.arg_names)
        absent = dict.fromkeys(n for n in optional if n not in self.signature)
        return absent | given | (_ACTIVATED if self.activated else {})

    @property
    def divisible(self) -> tuple[str, ...]:
        """Arguments promised to be multiples of 16. N and K are in every model; M is not, and promising it would let
        masked rows be read out of bounds."""
        return (*self.short, "N", "K")

    @property
    def short(self) -> tuple[str, ...]:
        """Pointers promised to be to less than 2 GiB."""
        return tuple(n for n, t in self.signature.items() if t.startswith("*"))

    @property
    def options(self) -> dict[str, int]:
        """Compile options."""
        if isinstance(self.config, GroupGemmConfig):
            return self.config.options_of(self.kernel, self.arch)
        return self.config.options(self.arch)


_ACTIVATED = {"PAIRS": "interleaved", "ACTIVATION": "swigluoai", "LIMIT": 7.0, "ALPHA": 1.702, "BETA": 1.0}

_TILES = {
    # arch: tiles for few rows and for many
    "gfx950": (MxGemmConfig(16, 64, 256, nonkdim=16), MxGemmConfig(64, 128, 256)),
    "gfx942": (MxGemmConfig(16, 32, 64, nonkdim=16), MxGemmConfig(64, 64, 64)),  # more than that spills a few scalars
    "gfx1100": (MxGemmConfig(16, 32, 64, num_stages=1), MxGemmConfig(32, 64, 64, num_stages=1)),
    "sm_90": (MxGemmConfig(16, 64, 128, num_stages=3), MxGemmConfig(64, 128, 128, num_warps=8, num_stages=3)),
}

SCHEMES = {"mxfp8": ("e4m3", "e4m3"), "w4a8": ("e4m3", "e2m1"), "mxfp4": ("e2m1", "e2m1"), "w4a16": ("bf16", "e2m1")}
_GROUPED = {"mxfp8": False, "w4a8": True, "mxfp4": False, "w4a16": True}


def mx_variants() -> Iterator[Variant]:
    """What is compiled: on gfx950 every scheme grouped, with small tiles and a tail of K, and dense, with large ones;
    on the other archs, where all schemes share the dequantizing path, every scheme in one of the two ways."""
    for arch in TRITON_ARCHS:
        for scheme, (x_format, w_format) in SCHEMES.items():
            for config, grouped in zip(_TILES[arch], (True, False), strict=True):
                if arch != "gfx950" and grouped != _GROUPED[scheme]:
                    continue
                tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
                name = f"mx_gemm_{scheme}_{'grouped' if grouped else 'dense'}_{tile}"
                claims = ("matrix",) if x_format == "bf16" else ("matrix", "scaled_mfma")
                yield Variant(name, arch, x_format, w_format, config, grouped, not grouped, claims)


_GROUP_TILES = {
    "gfx950": (GroupGemmConfig(16, 64, 128, nonkdim=16), GroupGemmConfig(128, 128, 128, num_warps=8, nonkdim=16)),
    "gfx942": (GroupGemmConfig(16, 64, 128, nonkdim=16), GroupGemmConfig(128, 128, 128, num_warps=8, nonkdim=16)),
    "gfx1100": (GroupGemmConfig(16, 64, 64, num_stages=1), GroupGemmConfig(64, 64, 64, num_stages=1)),
    "sm_90": (GroupGemmConfig(16, 64, 128, num_stages=3), GroupGemmConfig(128, 64, 64, num_warps=8, num_stages=3)),
}


def group_variants() -> Iterator[Variant]:
    """What is compiled: of int4, with small tiles, grouped, strided weights in groups of 32, and a tail of K; with
    large ones, dense, on AMD what decode kernels read, in groups of 128 and a model in fp16. Of MX formats, which are
    for models in fp16, strided weights both ways."""
    for arch in TRITON_ARCHS:
        few, many = _GROUP_TILES[arch]
        plain = replace(many, block_k=64)  # strided MX weights need more registers
        own = LAYOUTS.get(("gfx11" if arch.startswith("gfx11") else arch, "int4"))
        int4 = replace(many, num_warps=4) if own else many
        decode, matrix = (own, "tile_group") if own else STRIDED, ("matrix",)
        yield Variant("group_gemm_int4_grouped", arch, "bf16", "int4", few, True, False, matrix)
        yield Variant("group_gemm_int4_dense", arch, "fp16", "int4", int4, False, True, matrix, decode, 128)
        yield Variant("group_gemm_e2m1_grouped", arch, "fp16", "e2m1", few, True, False, matrix)
        yield Variant("group_gemm_e2m1_dense", arch, "fp16", "e2m1", plain, False, True, matrix)
        yield Variant("group_gemm_e4m3_grouped", arch, "fp16", "e4m3", few, True, True, matrix)
        yield Variant("group_gemm_e4m3_dense", arch, "fp16", "e4m3", plain, False, False, matrix)


def variants() -> Iterator[Variant]:
    """All that is compiled ahead of time."""
    yield from mx_variants()
    yield from group_variants()
