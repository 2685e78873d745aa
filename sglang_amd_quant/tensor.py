"""`MxTensor`: quantized weights that know how they lie."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from sglang_amd_quant import formats
from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import e8m0
from sglang_amd_quant.layouts.base import Layout, padded_matrix
from sglang_amd_quant.layouts.names import SCALE_LAYOUTS, STRIDED, TensorLayout, round_up
from sglang_amd_quant.layouts.registry import scale_layout, source_layout, value_layout
from sglang_amd_quant.schemes import INT4_GROUPS, ScaleMode, Scheme

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "e2m1": (torch.uint8,),
    "e4m3": (torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    "int4": (torch.uint8,),
}
_SCALE_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "e2m1": (torch.uint8,),
    "e4m3": (torch.uint8,),
    "int4": (torch.bfloat16, torch.float16, torch.float32, torch.int32),
}


@dataclass(frozen=True)
class PadPlan:
    """The N and K, in elements, that values and scales alike are padded to before a layout pads them to its tiles.

    0 stands for "as the shape"; a tensor's own plan always holds the sizes.
    """

    n: int = 0
    k: int = 0


@dataclass(frozen=True)
class MxForm:
    """All of an `MxTensor` but its tensors: what a custom op, which is passed bare tensors, must know besides.

    Attributes:
        scheme, shape, layout, pad: as there.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    layout: TensorLayout
    pad: PadPlan

    def bind(self, data: torch.Tensor, scales: torch.Tensor) -> MxTensor:
        """The tensor again, from the data and scales that this form was taken from (`MxTensor.tensors`).

        Unchecked, because it is made at every call of an op: pass what an `MxTensor` of this form held.
        """
        tensor = object.__new__(MxTensor)
        tensor.__dict__.update(vars(self), data=data, scales=scales, zeros=None)
        return tensor


@dataclass(frozen=True, eq=False)
class MxTensor:
    """Quantized weights [..., N, K] with their scales, scheme, layout and padding. A kernel asks this, and no flag.

    Padding never changes a result: padded values are 0, padded scales 0x7F (2^0), for int4 a scale of 0.

    Attributes:
        data: values as `layout.value` keeps them. Strided: e2m1 and int4 uint8 [..., N, K/2], low nibble = even
            index; e4m3 float8_e4m3fn [..., N, K] (or float8_e4m3fnuz, once converted for gfx942).
        scales: as `layout.scale` keeps them. Strided: uint8 e8m0 [..., N, K/32]; for int4 floats [..., N, K/group], or
            int32 words of scale and zero point (`with_words`), as kernels read them.
        scheme: what the numbers are; `scheme.block` is the group of int4.
        shape: the logical [..., N, K], in elements, without padding.
        layout: how values and scales lie.
        pad: what N and K are padded to; the logical sizes where nothing is said.
        zeros: int4 zero points, uint8 [..., N, K/group], where they are not all 8.

    Raises:
        ShapeError: a tensor's shape, or the padding, is not what shape and layout demand.
        SchemeError: a tensor's dtype does not fit the scheme, or tensors are on different devices.
    """

    data: torch.Tensor = field(repr=False)
    scales: torch.Tensor = field(repr=False)
    scheme: Scheme
    shape: tuple[int, ...]
    layout: TensorLayout = STRIDED
    pad: PadPlan = PadPlan()
    zeros: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if len(self.shape) < 2:
            raise ShapeError(f"weights {list(self.shape)}", "fewer than two dimensions", "give [..., N, K]")
        if reasons := self.layout.reasons(self.n, self.k, self.scheme):
            raise ShapeError(self._what, "; ".join(reasons), "choose another layout, or pad K to whole blocks")
        object.__setattr__(self, "pad", self._sizes(self.pad))
        repacked, weight = self._value.storage_dtype, self.scheme.weight
        data_shape, scales_shape = (
            self._value.storage_shape(*self._data_size),
            self._scale.storage_shape(*self._scales_size),
        )
        self._check("data", self.data, data_shape, (repacked,) if repacked else _DTYPES[weight])
        self._check("scales", self.scales, scales_shape, _SCALE_DTYPES[weight])
        if self.zeros is not None:
            if weight != "int4":
                raise SchemeError(self._what, f"{weight} has no zero points", "leave zeros out")
            if self.scales.dtype == torch.int32:
                raise SchemeError(self._what, "words of scale and zero point have zeros in them", "leave zeros out")
            self._check("zeros", self.zeros, self._scales_size, (torch.uint8,))

    def _sizes(self, pad: PadPlan) -> PadPlan:
        """`pad` with its zeros filled in; raises ShapeError where it does not hold the shape in whole blocks."""
        sizes = PadPlan(pad.n or self.n, pad.k or self.k)
        if sizes.n < self.n or sizes.k < self.k or sizes.k % self.scheme.block:
            raise ShapeError(
                self._what,
                f"a pad plan of N={sizes.n}, K={sizes.k} is smaller, or no whole blocks of {self.scheme.block}",
                "give at least N and K, and K in whole blocks",
            )
        return sizes

    def _check(self, name: str, given: torch.Tensor, matrix: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        wanted = (*self.shape[:-2], *matrix)
        if tuple(given.shape) != wanted:
            raise ShapeError(
                f"{name} {list(given.shape)} of {self._what}",
                f"layout {self.layout.name} keeps them as {list(wanted)}",
                "pass the tensor that this layout packed",
            )
        if given.dtype not in dtypes:
            wanted_types = " or ".join(str(dtype) for dtype in dtypes)
            raise SchemeError(
                f"{name} of {self._what}", f"{given.dtype}, not {wanted_types}", "view or convert it first"
            )
        if given.device != self.data.device:
            raise SchemeError(f"{name} of {self._what}", f"on {given.device}, data on {self.data.device}", "move it")

    @property
    def _what(self) -> str:
        return f"{self.scheme.name} weights {list(self.shape)}"

    @property
    def n(self) -> int:
        """Logical rows: output features."""
        return self.shape[-2]

    @property
    def k(self) -> int:
        """Logical columns: input features, in elements."""
        return self.shape[-1]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Data and scales, as an op is passed them."""
        return [self.data, self.scales]

    @property
    def form(self) -> MxForm:
        """Everything but the tensors."""
        return MxForm(self.scheme, self.shape, self.layout, self.pad)

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes held: values, scales and zero points, padding included."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)

    @property
    def _value(self) -> Layout:
        return value_layout(self.layout.value)

    @property
    def _scale(self) -> Layout:
        return scale_layout(self.layout.scale)

    @property
    def _data_size(self) -> tuple[int, int]:
        return self.pad.n, self.pad.k // self.scheme.pack

    @property
    def _scales_size(self) -> tuple[int, int]:
        return self.pad.n, self.pad.k // self.scheme.block

    @classmethod
    def quantize(
        cls,
        weights: torch.Tensor,
        scheme: Scheme,
        *,
        mode: ScaleMode | None = None,
        symmetric: bool = True,
        layout: TensorLayout | str = STRIDED,
        pad: PadPlan = PadPlan(),
    ) -> MxTensor:
        """Quantize float weights [..., N, K] and lay them out.

        Args:
            weights: any float dtype, any device; K in whole blocks of `scheme.block`.
            scheme: its weight format and block (for int4 the group) are used.
            mode: how e8m0 exponents are chosen; None = the format's default. Not for int4.
            symmetric: int4 only: zero point 8 everywhere, or one for each group.

        Raises:
            ShapeError: `weights` is not [..., N, K] with K in whole blocks.
        """
        if weights.ndim < 2 or weights.shape[-1] % scheme.block:
            raise ShapeError(
                f"weights {list(weights.shape)}", f"{scheme.name} needs [..., N, K], K % {scheme.block} == 0", "pad K"
            )
        zeros = None
        if scheme.weight == "int4":
            data, scales, *rest = formats.quantize_int4(weights, scheme.block, symmetric=symmetric)
            zeros = rest[0] if rest else None
        else:
            data, scales = formats.quantize_mx(weights, scheme.weight, mode)
        return cls(data, scales, scheme, tuple(weights.shape), zeros=zeros).to_layout(layout, pad)

    @classmethod
    def canonical(
        cls, data: torch.Tensor, scales: torch.Tensor, scheme: Scheme, zeros: torch.Tensor | None = None
    ) -> MxTensor:
        """Wrap strided tensors as checkpoints deliver them: data [..., N, K/pack], scales [..., N, K/block]."""
        return cls(data, scales, scheme, (*data.shape[:-1], data.shape[-1] * scheme.pack), zeros=zeros)

    @classmethod
    def from_source(
        cls, source: str, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, scheme: Scheme
    ) -> MxTensor:
        """Unpack int4 weights of an AutoAWQ or GPTQ checkpoint. Reads the zero points: on a GPU it waits for them.

        Args:
            source: "awq", "gptq" or "gptq_v2" (see `layouts/awq.py`, `layouts/gptq.py`).
            qweight: int32, awq [..., K, N/8], gptq [..., K/8, N]; not in activation order.
            qzeros: int32 [..., K/group, N/8].
            scales: floats [..., K/group, N].
            scheme: int4; its block becomes K / (number of groups).

        Raises:
            ShapeError: the three do not belong together, or the group is not 32, 64 or 128.
        """
        layout = source_layout(source)
        if scales.ndim < 2 or not scales.numel():
            raise ShapeError(f"scales {list(scales.shape)}", "not [..., K/group, N]", "pass those of the checkpoint")
        groups, n = scales.shape[-2:]
        k = qweight.numel() * 8 * groups // scales.numel()
        if k % groups or k // groups not in INT4_GROUPS:
            known = ", ".join(map(str, INT4_GROUPS))
            raise ShapeError(f"qweight {list(qweight.shape)}", f"{groups} groups in K={k}", f"use groups of {known}")
        zeros = layout.unpack_zeros(qzeros)
        tensor = cls(
            layout.unpack(qweight, n, k // 2),
            scales.mT.contiguous(),
            replace(scheme, block=k // groups),
            (*scales.shape[:-2], n, k),
            zeros=zeros,
        )
        return replace(tensor, zeros=None) if torch.all(zeros == 8) else tensor

    def to_layout(self, layout: TensorLayout | str, pad: PadPlan | None = None) -> MxTensor:
        """The same weights in another layout and, where given, another padding.

        Args:
            layout: a `TensorLayout` or its name, e.g. "cdna4_scale" or "preshuffle+cdna4_scale_256".
            pad: None keeps the present padding.

        Raises:
            SchemeError: no such layout.
            ShapeError: the layout cannot hold this shape or scheme, or `pad` is less than the shape.
        """
        layout = TensorLayout.parse(layout) if isinstance(layout, str) else layout
        plan = self.pad if pad is None else self._sizes(pad)
        if layout == self.layout and plan == self.pad:
            return self
        if reasons := layout.reasons(self.n, self.k, self.scheme):
            raise ShapeError(self._what, "; ".join(reasons), "choose another layout")
        data, scales, zeros = self._matrices(plan)
        return MxTensor(
            value_layout(layout.value).pack(data),
            scale_layout(layout.scale).pack(scales),
            self.scheme,
            self.shape,
            layout,
            plan,
            zeros,
        )

    def _matrices(self, plan: PadPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Strided data, scales and zeros, padded to `plan`."""
        return (
            self._repad(self._value.unpack(self.data, *self._data_size), plan, self.scheme.pack, 0),
            self._repad(self._scale.unpack(self.scales, *self._scales_size), plan, self.scheme.block, self._pad_scale),
            None if self.zeros is None else self._repad(self.zeros, plan, self.scheme.block, 0),
        )

    def _repad(self, matrix: torch.Tensor, plan: PadPlan, elements: int, fill: int) -> torch.Tensor:
        if plan == self.pad:
            return matrix
        bare = matrix[..., : self.n, : self.k // elements]
        octets = bare.view(torch.uint8) if bare.element_size() == 1 else bare
        return padded_matrix(octets, plan.n, plan.k // elements, fill).view(matrix.dtype)

    @property
    def _pad_scale(self) -> int:
        return 0 if self.scheme.weight == "int4" else SCALE_LAYOUTS["strided"].pad_byte

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values that these bits stand for: [..., N, K] without padding, in `dtype`."""
        data, scales, zeros = self._matrices(PadPlan(self.n, self.k))
        if self.scheme.weight == "int4":
            if scales.dtype == torch.int32:
                scales, zeros = formats.split_words(scales)
            return formats.dequantize_int4(data, scales, zeros, dtype=dtype)
        if data.dtype == torch.float8_e4m3fnuz:  # no checkpoint format, so `formats` does not read it back
            blocks = data.to(torch.float32).unflatten(-1, (-1, self.scheme.block))
            return (blocks * e8m0.decode(scales).unsqueeze(-1)).flatten(-2).to(dtype)
        return formats.dequantize_mx(data, scales, self.scheme.weight, dtype)

    def to(self, device: torch.device | str) -> MxTensor:
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, data=self.data.to(device), scales=self.scales.to(device), zeros=zeros)

    def with_words(self) -> MxTensor:
        """int4 with a word of scale and zero point a group in place of both (`formats.group_words`), which is what
        kernels and ops take; itself if it has them.

        Raises:
            SchemeError: no int4.
        """
        if self.scheme.weight != "int4":
            raise SchemeError(self._what, "no zero points to put into words", "pass int4 weights")
        if self.scales.dtype == torch.int32:
            return self
        return replace(self, scales=formats.group_words(self.scales, self.zeros), zeros=None)

    def to_fnuz(self) -> MxTensor:
        """MXFP8 as gfx942 takes it, in the same layout: float8_e4m3fnuz bytes under doubled scales, equal values.

        Raises:
            SchemeError: the values are no float8_e4m3fn.
        """
        if self.data.dtype != torch.float8_e4m3fn:
            raise SchemeError(self._what, f"{self.data.dtype} has no fnuz form", "convert float8_e4m3fn only")
        data, scales = formats.mx_fn_to_fnuz(*self._matrices(PadPlan(self.n, self.k))[:2])
        return MxTensor(data, scales, self.scheme, self.shape).to_layout(self.layout, self.pad)

    def padded_to(self, n: int = 1, k: int = 1) -> PadPlan:
        """The plan that pads N and K up to multiples of `n` and `k`."""
        return PadPlan(round_up(self.n, n), round_up(self.k, k))

    def expert(self, index: int) -> MxTensor:
        """The weights of one leading index (an expert), without a copy."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, data=self.data[index], scales=self.scales[index], zeros=zeros, shape=self.shape[1:])


def quantized(weights: torch.Tensor, scheme: Scheme, mode: ScaleMode | None = None) -> list[torch.Tensor]:
    """Float weights [..., N, K] as our checkpoints store them and loaders take them: data and scales, int4's as words.

    Args:
        weights: any float dtype; K in whole blocks of `scheme.block`.
        scheme, mode: as `MxTensor.quantize` takes them.

    Raises:
        ShapeError: as there.
    """
    made = MxTensor.quantize(weights, scheme, mode=mode)
    return (made.with_words() if scheme.weight == "int4" else made).tensors
