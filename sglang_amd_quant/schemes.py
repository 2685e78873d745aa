"""What the numbers are: a scheme is a weight format times an activation format. No torch here.

Formats are named as in the OCP Microscaling Formats (MX) v1.0 specification: `e2m1` (fp4), `e4m3` (fp8), both with one
e8m0 scale per 32 elements along K; `int4` has one scale and one zero point per group of 32, 64 or 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sglang_amd_quant.errors import SchemeError

MX_BLOCK = 32
"""Elements that share one e8m0 scale, along K (OCP MX v1.0, section 5.1)."""

INT4_GROUPS = (32, 64, 128)
"""Elements that may share one int4 scale, along K."""

WORD_BYTES = 4
"""Bytes of a word, which holds the scale and the zero point of one int4 group (`formats.group_words`)."""

INT4_GROUP = INT4_GROUPS[-1]
"""The group that int4 weights get where nothing says otherwise and it divides their K; see `Scheme.served_block`."""


class ScaleMode(StrEnum):
    """How a block's e8m0 exponent follows from its largest magnitude `amax`.

    With `emax` the element's largest exponent (e2m1: 2, e4m3: 8) and `max` its largest value (6, 448):

    - `FLOOR`: floor(log2(amax)) - emax. OCP MX v1.0 section 6.3; the top of the range saturates.
    - `RCEIL`: ceil(log2(amax / max)). Never saturates (aiter #3783, cuBLAS).
    - `CEIL`:  ceil(log2(amax)) - emax.
    - `EVEN`:  FLOOR after rounding amax to the element's mantissa width (AMD Quark's `even`).
    """

    FLOOR = "floor"
    RCEIL = "rceil"
    CEIL = "ceil"
    EVEN = "even"


@dataclass(frozen=True)
class Scheme:
    """Weights x activations.

    Attributes:
        name: how users and packs call it.
        weight: element format of the weights: `e2m1`, `e4m3` or `int4`.
        act: what activations are quantized to before the matmul: `e2m1`, `e4m3`, `bf16` (not quantized), or
            `fp8_static` (per-tensor e4m3 with a scale from the checkpoint).
        weight_bits: bits per weight element, without scales.
        block: elements along K that share a scale.
    """

    name: str
    weight: str
    act: str
    weight_bits: int
    block: int = MX_BLOCK

    def served_block(self, *ks: int, dealt: int = INT4_GROUP, ranks: int = 1) -> int:
        """`block` where no recipe or checkpoint says otherwise: of int4 the largest group that divides every K.

        Args:
            ks: every K that it must divide, as a rank has it.
            dealt: columns that `ranks` ranks are dealt in whole blocks, as an expert's intermediate size: of the groups
                that divide it, the one in which a rank stores the fewest bytes, since a large one may pad much.
            ranks: how many.

        Returns:
            The smallest group where none divides: whoever checks K then says so.
        """
        if self.weight != "int4":
            return self.block
        fit = [group for group in INT4_GROUPS if not any(k % group for k in (*ks, dealt))]

        def row_bytes(group: int) -> int:
            return -(-dealt // (group * ranks)) * (group // self.pack + self.scale_bytes)

        return min(fit or INT4_GROUPS[:1], key=row_bytes)

    @property
    def pack(self) -> int:
        """Weight elements per stored byte along K (e4m3: 1, e2m1 and int4: 2)."""
        return 8 // self.weight_bits

    @property
    def scale_bytes(self) -> int:
        """Bytes of what a block's elements share, as checkpoints of ours store it and kernels read it."""
        return WORD_BYTES if self.weight == "int4" else 1

    @property
    def divisible(self) -> bool:
        """Whether there is a smaller block."""
        return self.weight == "int4" and self.block > INT4_GROUPS[0]

    @property
    def block_name(self) -> str:
        """What messages call the elements that share a scale."""
        return "int4 group" if self.weight == "int4" else "MX block"


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("mxfp4", weight="e2m1", act="e2m1", weight_bits=4),
        Scheme("mxfp8", weight="e4m3", act="e4m3", weight_bits=8),
        Scheme("w4a8", weight="e2m1", act="e4m3", weight_bits=4),
        Scheme("w4a16", weight="e2m1", act="bf16", weight_bits=4),
        Scheme("int4_w4a16", weight="int4", act="bf16", weight_bits=4),
    )
}

BF16 = "bf16"
"""The word a recipe uses for "leave this layer unquantized"."""

DEFAULT_SCALE_MODE: dict[str, ScaleMode] = {"e2m1": ScaleMode.EVEN, "e4m3": ScaleMode.RCEIL}
"""Used when nothing else says: Quark's mode for e2m1, the saturation-free one of aiter #3783 for e4m3."""


def scheme(name: str) -> Scheme:
    """Look a scheme up by name.

    Raises:
        SchemeError: no such scheme; the message lists those there are.
    """
    try:
        return SCHEMES[name]
    except KeyError:
        raise SchemeError(f"scheme {name!r}", "unknown", f"use one of {', '.join(SCHEMES)}") from None
