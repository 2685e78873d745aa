"""The layouts by name, with what each demands of a shape. No torch: shapes and selection reason with these.

A tensor's layout is a pair: how the bytes of the values lie, and how the bytes of the scales lie. Its name is what the
`layout` column of a pack holds: `strided`, `cdna4_scale`, `preshuffle+cdna4_scale_256`, ... The classes that move the
bytes (`strided.py`, `preshuffle.py`, `int4_tile.py`, ...) take their padding from here, so that a plan made without
torch and the tensor that is stored agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from sglang_amd_quant.errors import SchemeError
from sglang_amd_quant.schemes import Scheme


class Role(StrEnum):
    """What a layout arranges."""

    VALUE = "value"
    SCALE = "scale"
    SOURCE = "source"
    """A checkpoint's own order: read and written, never served from."""
    PACKED = "packed"
    """A kernel's own form of values and scales together: made after loading, read by that kernel alone, not undone."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class LayoutSpec:
    """One layout of values or of scales, as a shape sees it.

    A *column* is what is stored along K: a byte of values (1 e4m3, 2 e2m1 or int4), or one scale (of a block).

    Attributes:
        name: unique among all layouts but for `strided`, which both values and scales can have.
        role: what it arranges.
        elements: the weight formats it can hold (for a scale layout: whose scales).
        tile_n, tile_cols: rows and columns of one tile; storage is padded to whole tiles.
        pads: False where a shape that is not whole tiles is refused instead.
        pad_byte: what padding holds: 0 in values, 0x7F (2^0) in e8m0 scales; 0xFF would be NaN.
        block_n, block_cols: the least a kernel must read in one step, in rows and columns: it cannot address less.
        about: one line.
    """

    name: str
    role: Role
    elements: tuple[str, ...]
    tile_n: int = 1
    tile_cols: int = 1
    pads: bool = True
    pad_byte: int = 0
    block_n: int = 1
    block_cols: int = 1
    about: str = ""

    def column_elements(self, scheme: Scheme) -> int:
        """Elements of K that one stored column stands for."""
        return scheme.block if self.role is Role.SCALE else scheme.pack

    def padded(self, n: int, cols: int) -> tuple[int, int]:
        """Rows and columns held in storage for a matrix [n, cols]."""
        return round_up(n, self.tile_n), round_up(cols, self.tile_cols)

    def min_block(self, scheme: Scheme) -> tuple[int, int]:
        """The least (BLOCK_N, BLOCK_K), in elements, with which a kernel can read this layout."""
        return self.block_n, self.block_cols * self.column_elements(scheme)

    def reasons(self, n: int, k: int, scheme: Scheme) -> list[str]:
        """Why weights [n, k] (elements) of `scheme` cannot have this layout; empty if they can."""
        found = []
        if n < 1 or k < 1:
            found.append(f"{self.name} needs N and K of at least 1, got N={n}, K={k}")
        if scheme.weight not in self.elements:
            found.append(f"{self.name} holds {' or '.join(self.elements)}, not {scheme.weight}")
        if k % scheme.block:
            found.append(f"{self.name} needs K in whole blocks of {scheme.block}, got K={k}")
        if not self.pads:
            tile_k = self.tile_cols * self.column_elements(scheme)
            if n % self.tile_n or k % tile_k:
                found.append(f"{self.name} needs N % {self.tile_n} == 0 and K % {tile_k} == 0, got N={n}, K={k}")
        return found


_MX, _ALL = ("e2m1", "e4m3"), ("e2m1", "e4m3", "int4")

VALUE_LAYOUTS: Mapping[str, LayoutSpec] = {
    spec.name: spec
    for spec in (
        LayoutSpec("strided", Role.VALUE, _ALL, about="rows one after the other, as in a checkpoint"),
        LayoutSpec(
            "preshuffle",
            Role.VALUE,
            _MX,
            tile_n=16,
            tile_cols=32,
            block_n=16,
            block_cols=32,
            about="tiles of 16 rows x 16 bytes one after the other: aiter's shuffle_weight (16, 16)",
        ),
        LayoutSpec(
            "mxfp8_lane",
            Role.VALUE,
            ("e4m3",),
            tile_n=16,
            tile_cols=128,
            block_n=16,
            block_cols=128,
            about="the 32 bytes that a lane of the 16x16x128 scaled MFMA takes, together: SGLang's gfx950 MXFP8",
        ),
        LayoutSpec(
            "mma_tile",
            Role.VALUE,
            ("e4m3",),
            tile_n=16,
            tile_cols=64,
            block_n=16,
            block_cols=64,
            about="1 KiB tiles of what the lanes of Hopper's 16x8x16 mma take, together",
        ),
        *(
            LayoutSpec(
                name,
                Role.VALUE,
                (element,),
                tile_n=16,
                tile_cols=64,
                block_n=16,
                block_cols=64,
                about="16 rows x 64 bytes in which a lane has 8 codes of every MX block: gfx942's decode kernels",
            )
            for name, element in (("cdna3_e2m1", "e2m1"), ("cdna3_e4m3", "e4m3"))
        ),
        LayoutSpec(
            "exllama",
            Role.VALUE,
            ("int4",),
            tile_cols=4,
            block_cols=4,
            about="int32 words of 8 nibbles, even elements in the low half and odd ones in the high half",
        ),
        *(
            LayoutSpec(
                name,
                Role.VALUE,
                ("int4",),
                tile_n=16,
                tile_cols=cols,
                block_n=16,
                block_cols=cols,
                about=f"tiles of exllama's words: decode kernels on {who}",
            )
            for name, cols, who in (("cdna_int4", 64, "CDNA"), ("rdna_int4", 16, "RDNA"), ("mma_int4", 32, "Hopper"))
        ),
    )
}

SCALE_LAYOUTS: Mapping[str, LayoutSpec] = {
    spec.name: spec
    for spec in (
        LayoutSpec("strided", Role.SCALE, _ALL, pad_byte=0x7F, about="rows one after the other"),
        LayoutSpec(
            "mma_scale",
            Role.SCALE,
            ("e4m3",),
            tile_n=16,
            tile_cols=2,
            pad_byte=0x7F,
            block_n=16,
            block_cols=2,
            about="scales of the tiles of mma_tile",
        ),
        LayoutSpec(
            "tile_scale",
            Role.SCALE,
            _MX,
            tile_n=16,
            tile_cols=4,
            pad_byte=0x7F,
            block_n=16,
            block_cols=4,
            about="a word of four scales for each of 16 rows: decode kernels on AMD",
        ),
        LayoutSpec(
            "tile_group",
            Role.SCALE,
            ("int4",),
            tile_n=16,
            block_n=16,
            about="a group's words of scale and zero point for 16 rows together: decode kernels",
        ),
        *(
            LayoutSpec(
                name,
                Role.SCALE,
                _MX,
                tile_n=rows,
                tile_cols=8,
                pad_byte=0x7F,
                block_n=32,
                block_cols=8,
                about=f"a dword of four scales for each lane of the scaled MFMA; rows padded to {rows}",
            )
            for name, rows in (("cdna4_scale", 32), ("cdna4_scale_256", 256))
        ),
    )
}

SOURCE_LAYOUTS: Mapping[str, LayoutSpec] = {
    spec.name: spec
    for spec in (
        LayoutSpec(
            "awq", Role.SOURCE, ("int4",), tile_n=8, tile_cols=4, pads=False, about="AutoAWQ: 8 rows of N in an int32"
        ),
        LayoutSpec(
            "gptq", Role.SOURCE, ("int4",), tile_n=8, tile_cols=4, pads=False, about="GPTQ v1: zeros stored minus one"
        ),
        LayoutSpec(
            "gptq_v2", Role.SOURCE, ("int4",), tile_n=8, tile_cols=4, pads=False, about="GPTQ v2: zeros as they are"
        ),
    )
}

PACKED_LAYOUTS: Mapping[str, LayoutSpec] = {
    spec.name: spec
    for spec in (
        LayoutSpec(
            "hopper_bf16", Role.PACKED, ("e2m1",), about="wgmma fragments of bf16: kernels/triton/hopper_pack.py"
        ),
        LayoutSpec("hopper_e4m3", Role.PACKED, _MX, about="wgmma fragments of e4m3: kernels/triton/hopper_pack.py"),
        *(
            LayoutSpec(
                f"decode_{values}",
                Role.PACKED,
                VALUE_LAYOUTS[values].elements,
                tile_n=16,
                pads=False,
                block_n=16,
                block_cols=VALUE_LAYOUTS[values].block_cols,
                about=f"{values}+{scales}, of a gated gate_up with 8 gates and 8 ups by turns: grouped decode",
            )
            for scales, of in (
                ("tile_scale", ("preshuffle", "mxfp8_lane", "cdna3_e2m1", "cdna3_e4m3")),
                ("tile_group", ("cdna_int4", "rdna_int4", "mma_int4")),
            )
            for values in of
        ),
    )
}
"""What `ops/packed.py` makes. Such a name is a whole `TensorLayout`: it goes with no other."""


@dataclass(frozen=True)
class TensorLayout:
    """How a quantized tensor lies: the name of its value layout and of its scale layout, or one of a packed layout.

    Raises:
        SchemeError: no layout has such a name.
    """

    value: str = "strided"
    scale: str = "strided"

    def __post_init__(self) -> None:
        if self.packed and self.scale == self.value:
            return
        for name, known in ((self.value, VALUE_LAYOUTS), (self.scale, SCALE_LAYOUTS)):
            if name not in known:
                raise SchemeError(f"layout {name!r}", "unknown", f"use one of {', '.join(known)}")

    @classmethod
    def parse(cls, name: str) -> TensorLayout:
        """Read a name such as `strided`, `cdna4_scale`, `preshuffle` or `preshuffle+cdna4_scale_256`."""
        if name in PACKED_LAYOUTS:
            return cls(name, name)
        value, scale = "strided", "strided"
        for part in name.split("+"):
            if part in VALUE_LAYOUTS and value == "strided":
                value = part
            elif part in SCALE_LAYOUTS and scale == "strided":
                scale = part
            else:
                known = ", ".join(dict.fromkeys((*VALUE_LAYOUTS, *SCALE_LAYOUTS)))
                raise SchemeError(f"layout {name!r}", f"{part!r} is unknown or said twice", f"join by + any of {known}")
        return cls(value, scale)

    @property
    def packed(self) -> bool:
        """Whether a kernel packed values and scales together: such a weight is no `MxTensor`."""
        return self.value in PACKED_LAYOUTS

    @property
    def name(self) -> str:
        """The shortest name that `parse` reads back to this layout."""
        if self.packed:
            return self.value
        return "+".join(part for part in (self.value, self.scale) if part != "strided") or "strided"

    @property
    def specs(self) -> tuple[LayoutSpec, LayoutSpec]:
        """The value layout and the scale layout."""
        if self.packed:
            return PACKED_LAYOUTS[self.value], PACKED_LAYOUTS[self.value]
        return VALUE_LAYOUTS[self.value], SCALE_LAYOUTS[self.scale]

    def min_block(self, scheme: Scheme) -> tuple[int, int]:
        """The least (BLOCK_N, BLOCK_K), in elements, with which a kernel can read this layout."""
        (n_value, k_value), (n_scale, k_scale) = (spec.min_block(scheme) for spec in self.specs)
        return max(n_value, n_scale), max(k_value, k_scale)

    def reasons(self, n: int, k: int, scheme: Scheme) -> list[str]:
        """Why weights [n, k] (elements) of `scheme` cannot lie so; empty if they can."""
        return list(dict.fromkeys(reason for spec in self.specs for reason in spec.reasons(n, k, scheme)))

    def nbytes(self, n: int, k: int, scheme: Scheme) -> int:
        """Bytes of weights [n, k] with their scales (int4: words of scale and zero point) and all padding."""
        value, scale = self.specs
        data_rows, data_cols = value.padded(n, k // scheme.pack)
        scale_rows, scale_cols = scale.padded(n, k // scheme.block)
        return data_rows * data_cols + scale_rows * scale_cols * scheme.scale_bytes


STRIDED = TensorLayout()
