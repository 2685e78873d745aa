"""Which variants of the Triton kernels are compiled ahead of time, for what, and what their machine code must show.

Triton versions: 3.6.0 is what the tests run with; see docs/toolchain.md for newer ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .mx_gemm import MxGemmConfig, mx_gemm_kernel
from .tiles import STRIDED, layout_constants

TRITON_ARCHS = ("gfx950", "gfx942", "gfx1100", "sm_90")

_ELEMENT = {"e2m1": "*u8", "e4m3": "*fp8e4nv", "bf16": "*bf16"}


@dataclass(frozen=True)
class Variant:
    """One specialization of `mx_gemm_kernel`.

    Attributes:
        name: how the report calls it.
        arch: target.
        x_format, w_format: element formats.
        config: tile and launch options.
        grouped: over experts, with row weights and bias; else dense.
        even_k: BLOCK_K divides K.
        claims: as in `kernels/hip/manifest.py`.
        layout: of values and of scales of the weights.
    """

    name: str
    arch: str
    x_format: str
    w_format: str
    config: MxGemmConfig
    grouped: bool
    even_k: bool
    claims: tuple[str, ...]
    layout: tuple[str, str] = STRIDED

    @property
    def kernel(self) -> Any:
        """The `triton.jit` function."""
        return mx_gemm_kernel

    @property
    def signature(self) -> dict[str, str]:
        """Triton type of each argument that is no constexpr; pointers that are None are left out."""
        scales = {} if self.x_format == "bf16" else {"x_scales": "*u8"}
        routing = {"row_ids": "*i32", "block_experts": "*i32", "row_weights": "*fp32"} if self.grouped else {}
        pointers = {"x": _ELEMENT[self.x_format], **scales, "w": _ELEMENT[self.w_format], "w_scales": "*u8"}
        pointers |= {"bias": "*bf16"} if self.grouped else {}
        return pointers | {"y": "*bf16"} | routing | {"M": "i32", "N": "i32", "K": "i32", "tiles_m": "i32"}

    @property
    def constants(self) -> dict[str, object]:
        """The constexpr arguments, among them the pointers that are None."""
        k = self.config.block_k * (1 if self.even_k else 2) - (0 if self.even_k else 32)
        given = self.config.constants(self.x_format, self.w_format, 2 if self.grouped else 1, k, self.arch)
        optional = ("x_scales", "bias", "row_ids", "block_experts", "row_weights")
        return {name: None for name in optional if name not in self.signature} | given | layout_constants(self.layout)

    @property
    def divisible(self) -> tuple[str, ...]:
        """Arguments promised to be multiples of 16. N and K are in every model; M is not, and promising it would let
        masked rows be read out of bounds."""
        return tuple(n for n, t in self.signature.items() if t.startswith("*") or n in ("N", "K"))

    @property
    def short(self) -> tuple[str, ...]:
        """Pointers promised to be to less than 2 GiB."""
        return tuple(n for n, t in self.signature.items() if t.startswith("*"))

    @property
    def options(self) -> dict[str, int]:
        """Compile options."""
        return self.config.options(self.arch)


_TILES = {
    # arch: tiles for few rows and for many
    "gfx950": (MxGemmConfig(16, 64, 256, nonkdim=16), MxGemmConfig(64, 128, 256)),
    "gfx942": (MxGemmConfig(16, 32, 64, nonkdim=16), MxGemmConfig(64, 64, 64)),  # more than that spills a few scalars
    "gfx1100": (MxGemmConfig(16, 32, 64, num_stages=1), MxGemmConfig(32, 64, 64, num_stages=1)),
    "sm_90": (MxGemmConfig(16, 64, 128, num_stages=3), MxGemmConfig(64, 128, 128, num_warps=8, num_stages=3)),
}

SCHEMES = {"mxfp8": ("e4m3", "e4m3"), "w4a8": ("e4m3", "e2m1"), "mxfp4": ("e2m1", "e2m1"), "w4a16": ("bf16", "e2m1")}
_GROUPED = {"mxfp8": False, "w4a8": True, "mxfp4": False, "w4a16": True}


def variants() -> Iterator[Variant]:
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
