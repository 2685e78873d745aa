"""Every entry point of `kernels/hip/`, as data: what is compiled for what, how it is called, what it promises.

The build compiles each `CodeObject` once an arch, the report checks each `EntryPoint`'s claims against the machine
code, the runtime finds by name the file that holds an entry point and how its arguments are packed. Plain data: no
imports but the standard library's.
"""

from __future__ import annotations

from dataclasses import dataclass

AMD_ARCHS = ("gfx950", "gfx942", "gfx1100", "gfx1151")
ARCHS = (*AMD_ARCHS, "sm_90")


@dataclass(frozen=True)
class EntryPoint:
    """A kernel function.

    Attributes:
        name: its symbol.
        params: `name:type` of each parameter in order; types are `ptr`, `i32`, `i64` and `f32`.
        claims: what its machine code must show, by the names in `sglang_amd_quant.toolchain.report.CLAIMS`. A claim
            says nothing about archs that have no such instruction.
    """

    name: str
    params: tuple[str, ...]
    claims: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        """Type of each parameter."""
        return tuple(p.partition(":")[2] for p in self.params)


@dataclass(frozen=True)
class CodeObject:
    """One source file, compiled to one code object an arch.

    Attributes:
        name: stem of the files, `<name>.hsaco` or `<name>.cubin`.
        source: file under `kernels/hip/`.
        entry_points: the kernels it holds; the build fails if the code object holds others, or fewer.
        archs: what it is compiled for.
        defines: `NAME=VALUE` macros.
    """

    name: str
    source: str
    entry_points: tuple[EntryPoint, ...]
    archs: tuple[str, ...] = ARCHS
    defines: tuple[str, ...] = ()


_GEMV = ("x:ptr", "w:ptr", "scales:ptr", "bias:ptr", "y:ptr", "x_stride:i64", "y_stride:i64", "m:i32", "n:i32", "k:i32")
_GEMV += ("slab:i32", "waves_k:i32", "waves_n:i32", "grid:i32")

_DECODE = (
    "x:ptr",
    "w:ptr",
    "scales:ptr",
    "factors:ptr",
    "bias:ptr",
    "x_scale:ptr",
    "residual:ptr",
    "y:ptr",
    "row_ids:ptr",
)
_DECODE += ("block_experts:ptr", "row_weights:ptr", "workspace:ptr", "x_stride:i64", "y_stride:i64", "m:i32", "n:i32")
_DECODE += ("k:i32", "top_k:i32", "split:i32", "waves_k:i32", "waves_n:i32", "groups:i32", "depth:i32", "chunk:i32")
_DECODE += ("carry:i32", "out:i32", "activation:i32", "alpha:f32", "limit:f32")

_PREPARE = ("x:ptr", "x_scale:ptr", "prepared:ptr", "x_stride:i64", "m:i32", "k:i32", "room:i32", "carry:i32")

E4M3_SCHEMES, E2M1_SCHEMES = ("mxfp8", "mxfp8_static"), ("w4a8", "mxfp4", "w4a8_static")
QUANTIZED_SCHEMES = E4M3_SCHEMES + E2M1_SCHEMES
BF16_SCHEMES = ("w4a16", "w8a16")
DECODE_SCHEMES = (*QUANTIZED_SCHEMES, *BF16_SCHEMES)
"""MX weights, by what becomes of activations."""
INT4_SCHEMES = ("int4_w4a16", "int4_w4a16_fp16")
INT4_GROUPS = (32, 64, 128)
"""int4 with bf16 or fp16 activations: a scheme's entry points for groups of 128 are those of `int4_w4a16_g128`."""
FEW_M, MANY_M, PREPARED_M = (2, 4, 8), (16, 32), (16, 32, 64)
DECODE_M = FEW_M + PREPARED_M
QUANTIZED_M, PAIRED_M, ALONE_M = (8, *PREPARED_M), (64,), (8,)
"""Rows of activations that the decode kernels are instantiated for on sm_90: few of bf16 and fp16, more that blocks
hold, those of an x that a launch has prepared and that streams; all of bf16 and fp16, and all of quantized ones, with
waves for x while weights come too; of quantized ones with e2m1 weights, in blocks that are pairs, and in those that
have a multiprocessor's registers for themselves, as from 16 rows on all have ..."""
AMD_DECODE_M = (4, 16, 32)
AMD_MOE_DECODE_M = (4, 16)
"""... and on AMD, whose matrix units take sixteen rows at a time; grouped by expert only there (`hopper_moe.py`)."""


def _decode(
    scheme: str,
    archs: tuple[str, ...],
    dense: tuple[int, ...],
    grouped: tuple[int, ...] = (),
    prepared: tuple[int, ...] = (),
    early: tuple[int, ...] = (),
    paired: tuple[int, ...] = (),
    alone: tuple[int, ...] = (),
    groups: tuple[int, ...] = (),
) -> CodeObject:
    names = tuple(f"{scheme}_g{group}" for group in groups) or (scheme,)
    claims: tuple[str, ...] = ()
    if archs == AMD_ARCHS:
        claims = ("wide_loads", "matrix") if "a16" in scheme else ("wide_loads", "matrix", "scaled_mfma")
    return CodeObject(
        name=f"decode_{scheme}",
        source="decode_gemm.hip",
        entry_points=tuple(
            EntryPoint(f"{kind}_{name}_m{m}", _DECODE, claims)
            for name in names
            for kind, sizes in (
                ("decode", dense),
                ("decode_alone", alone),
                ("moe_decode", grouped),
                ("decode_prepared", prepared),
                ("decode_own", prepared),
                ("decode_early", early),
                ("decode_paired", paired),
            )
            for m in sizes
        )
        + tuple(EntryPoint(f"prepare_{name}", _PREPARE) for name in names if prepared),
        archs=archs,
        defines=(f"DECODE_{scheme.upper()}=1",),
    )


CODE_OBJECTS = (
    CodeObject(
        name="gemv_mxfp4",
        source="gemv_mxfp4.hip",
        entry_points=tuple(
            EntryPoint(f"gemv_mxfp4_{out}_m{m}", _GEMV, claims=("wide_loads", "dot_units"))
            for out in ("bf16", "f32")
            for m in (1, 2, 4)
        ),
    ),
    *(
        _decode(scheme, ("sm_90",), (8, *MANY_M), prepared=PREPARED_M, early=QUANTIZED_M, paired=paired, alone=alone)
        for schemes, paired, alone in ((E4M3_SCHEMES, (), ()), (E2M1_SCHEMES, PAIRED_M, ALONE_M))
        for scheme in schemes
    ),
    *(_decode(scheme, ("sm_90",), FEW_M + MANY_M, prepared=PREPARED_M) for scheme in BF16_SCHEMES),
    *(_decode(scheme, ("sm_90",), FEW_M + MANY_M, prepared=PREPARED_M, groups=INT4_GROUPS) for scheme in INT4_SCHEMES),
    *(_decode(scheme, AMD_ARCHS, AMD_DECODE_M, AMD_MOE_DECODE_M) for scheme in DECODE_SCHEMES),
    *(_decode(scheme, AMD_ARCHS, AMD_DECODE_M, AMD_MOE_DECODE_M, groups=INT4_GROUPS) for scheme in INT4_SCHEMES),
)
"""Code objects of one name are one kernel for several targets."""


def find(entry_point: str, arch: str | None = None) -> tuple[CodeObject, EntryPoint]:
    """The code object that holds an entry point, and the entry point.

    Args:
        arch: for which target; None: any.

    Raises:
        KeyError: there is none of that name.
    """
    for code_object in CODE_OBJECTS:
        if arch is not None and arch not in code_object.archs:
            continue
        for candidate in code_object.entry_points:
            if candidate.name == entry_point:
                return code_object, candidate
    raise KeyError(entry_point)
