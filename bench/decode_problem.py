"""What `bench.decode` multiplies: weights and activations of a scheme, and how far from fp64 a result may be."""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
from collections.abc import Callable
from dataclasses import replace

import torch
from sglang_amd_quant.kernels.hip.manifest import INT4_GROUPS, INT4_SCHEMES
from sglang_amd_quant.kernels.triton.hopper_pack import pack_hopper

from sglang_amd_quant import formats
from sglang_amd_quant.schemes import SCHEMES, Scheme
from sglang_amd_quant.tensor import MxTensor

NAMES: dict[str, tuple[Scheme, torch.dtype]] = {
    name: (SCHEMES[name], torch.bfloat16) for name in ("mxfp8", "w4a8", "mxfp4", "w4a16")
} | {
    f"{scheme}_g{group}": (
        replace(SCHEMES["int4_w4a16"], block=group),
        torch.float16 if scheme.endswith("_fp16") else torch.bfloat16,
    )
    for scheme in INT4_SCHEMES
    for group in INT4_GROUPS
}
"""Schemes as decode kernels name them, int4 by the dtype of activations and the group -> formats, and that dtype."""

Packed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def x_format(scheme: Scheme) -> str:
    """What MX weights are packed to be multiplied with."""
    return "bf16" if scheme.act == "bf16" else "e4m3"


def pack(w: MxTensor) -> Packed:
    """Data, scales and factors as the decode kernels read them (`runtime.decode_gemm`)."""
    if w.scheme.weight == "int4":
        return (*w.with_words().to_layout("mma_int4+tile_group").tensors, None)
    made = pack_hopper(w.data[None], w.scales[None], x_format(w.scheme))
    return made.data, made.scales, made.factors


class Problem:
    """Weights for one (scheme, N, K), in several sets: as many as exceed the L2, or `sets`.

    Attributes:
        name: of `NAMES`.
        scheme, dtype: what that stands for.
        weights: of each set, as formats have them.
        packed: of each set, see `pack`.
        bytes: of a set, with scales, as a checkpoint has them; layouts may pack scales tighter.
    """

    def __init__(
        self, name: str, k: int, n: int, seed: int, sets: int = 0, device: str = "cuda", symmetric: bool = False
    ) -> None:
        self.name, self.k, self.n = name, k, n
        self.scheme, self.dtype = NAMES[name]
        columns = k // self.scheme.pack
        self.sets = sets or max(2, min(40, -(-(1 << 28) // (n * columns))))
        self.bytes = n * columns + n * k // self.scheme.block * self.scheme.scale_bytes
        self.weights = self._random(torch.Generator(device).manual_seed(seed), symmetric)
        self.packed = [pack(w) for w in self.weights]

    def _random(self, generator: torch.Generator, symmetric: bool) -> list[MxTensor]:
        random = {"generator": generator, "device": generator.device}
        columns, groups = ((self.sets, self.n, self.k // per) for per in (self.scheme.pack, self.scheme.block))
        codes, zeros = torch.randint(0, 256, columns, dtype=torch.uint8, **random), [None] * self.sets
        if self.scheme.weight == "int4":
            # held by bf16 and by fp16: peers take scales in the dtype of activations
            exponents = torch.randint(-10, -3, groups, **random)
            scales = ((1 + torch.rand(groups, **random)) * exponents.exp2()).bfloat16()
            zeros = zeros if symmetric else torch.randint(0, 16, groups, dtype=torch.uint8, **random)
        else:
            scales = torch.randint(110, 126, groups, dtype=torch.uint8, **random)
        if self.scheme.weight == "e4m3":
            codes = torch.where(codes & 0x7F == 0x7F, 0x31, codes).to(torch.uint8).view(torch.float8_e4m3fn)
        return [MxTensor.canonical(c, s, self.scheme, z) for c, s, z in zip(codes, scales, zeros, strict=True)]

    def values(self, i: int) -> torch.Tensor:
        """Weights of a set, fp32 [N, K]."""
        return self.weights[i].dequantize()

    def activations(self, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, K], and what the scheme makes of it, fp64."""
        device = self.weights[0].device
        x = torch.randn(m, self.k, device=device, generator=torch.Generator(device).manual_seed(seed)).to(self.dtype)
        exact = x.float() if self.scheme.act == "bf16" else formats.fake_quantize_mx(x.float(), self.scheme.act)
        return x, exact.double()


RELATIVE_ERROR = 1e-3
"""Of a whole result, by norm, that a kernel may have against fp64 of the same quantized operands."""


def bound(p: Problem, exact: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How far each element of a kernel's result may be from fp64 of `exact` [M, K] and the values [N, K] of set 0.

    With activations that are not quantized products are exact: a code, of int4 less its zero point, fits into the dtype
    of x. The matrix unit truncates its sums to fp32, and whatever the order, a product goes through fewer than K
    additions, and of int4 through two multiplications by what its group shares; each costs at most an ulp of the sum so
    far, which |x| |w|^T bounds.

    Quantized ones are e4m3, whose products the matrix unit adds in groups of 32 and the sum before, all cut off 13 bits
    below the largest (DeepSeek-V3 Technical Report, 3.3.2): 33 x 2^-13 of the running sum a group, 24 groups (12 tiles
    of 64) before sums are added as floats. Elements under a row's one scale are off by half of e4m3's least, 2^-10: of
    x, whose largest is at least 2^7 (e2m1: 2) of that, and of w. x in e4m3 is rounded once, under that scale, where
    `exact` was under its block's: if that is another, half of its least, which is half as much or less, comes on top.
    Blocks that send each other halves, of 32 or 64 rows, add 2^-11 of the running sum, too little to count here.
    """
    absolute = exact.abs() @ values.abs().T
    if p.scheme.act == "bf16":
        return (p.k + 2) * 2.0**-23 * absolute + 1e-30
    least_x = exact.abs().amax(1, keepdim=True) * (1.5 * 2.0**-17 if p.scheme.act == "e4m3" else 2.0**-11)
    least_w = torch.exp2(p.weights[0].scales.amax(1).double() - 137)
    operands = least_x * values.abs().sum(1) + exact.abs().sum(1, keepdim=True) * least_w
    return 24 * 33 * 2.0**-13 * absolute + operands + 1e-40


class Reference:
    """fp64 of the quantized operands, and how far from it a result may be: `bound`, and `RELATIVE_ERROR` as a whole."""

    def __init__(self, p: Problem, m: int, seed: int) -> None:
        self.label = f"{p.name} M={m} N={p.n} K={p.k}"
        self.x, exact = p.activations(m, seed)
        values = p.values(0).double()
        self.want = exact @ values.T
        self.bound = bound(p, exact, values)

    def check(self, run: Callable[[torch.Tensor, torch.Tensor], object], what: object) -> float:
        """Relative error of what `run(x, y)` leaves in y, with set 0. Raises AssertionError beyond the bounds."""
        y = torch.full_like(self.want, torch.nan, dtype=torch.float32)
        run(self.x, y)
        error, label = (y.double() - self.want).abs(), f"{self.label} {what}"
        assert y.isfinite().all(), f"{label}: not every output is finite"
        assert (error <= self.bound).all(), f"{label}: {(error / self.bound).max():.2f} x bound"
        relative = float(error.norm() / self.want.norm())
        assert relative <= RELATIVE_ERROR, f"{label}: relative error {relative:.1e}"
        return relative
