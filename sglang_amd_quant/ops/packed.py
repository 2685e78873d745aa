"""Weights in a form of some kernel's own: values and scales made into other tensors, once, after loading."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.layouts.names import PACKED_LAYOUTS, TensorLayout
from sglang_amd_quant.runtime.detect import current_arch
from sglang_amd_quant.schemes import Scheme
from sglang_amd_quant.selection import GemmProblem, KernelChoice
from sglang_amd_quant.selection.arch import member
from sglang_amd_quant.tensor import MxTensor, PadPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedForm:
    """All of a `PackedWeight` but its tensors."""

    scheme: Scheme
    shape: tuple[int, ...]
    layout: TensorLayout

    def bind(self, *tensors: torch.Tensor) -> PackedWeight:
        """The weight again, from its tensors."""
        return PackedWeight(list(tensors), self)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """What a kernel packed. It cannot be read back: layers that have it are served by that kernel at every M.

    Attributes:
        tensors: as the kernel's launcher knows them.
        form: scheme, logical shape [..., N, K], and the packed layout.
    """

    tensors: list[torch.Tensor]
    form: PackedForm

    pad = PadPlan()
    zeros = None

    @property
    def scheme(self) -> Scheme:
        return self.form.scheme

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    @property
    def layout(self) -> TensorLayout:
        return self.form.layout

    @property
    def n(self) -> int:
        return self.shape[-2]

    @property
    def k(self) -> int:
        return self.shape[-1]


Weight = MxTensor | PackedWeight


def unpacked(weight: Weight, choice: KernelChoice) -> MxTensor:
    """The weight for the reference to read, which a choice fell to.

    Raises:
        UnsupportedError: a kernel packed it.
    """
    if isinstance(weight, PackedWeight):
        raise UnsupportedError(
            f"{weight.scheme.name} weights {list(weight.shape)} packed as {weight.layout.name}",
            f"their kernel does not run this call ({'; '.join(choice.reasons[:2])})",
            "run the model in the dtype that it was loaded for",
        )
    return weight


def as_mx(weight: Weight) -> MxTensor:
    """The weight for a launcher whose spec reads no packed layout: legality has seen to it."""
    assert isinstance(weight, MxTensor), weight.layout.name
    return weight


def pack(weight: MxTensor, layout: TensorLayout, problem: GemmProblem) -> PackedWeight:
    """Pack strided weights as the kernel that owns a packed layout reads them.

    Args:
        weight: strided.
        layout: one of `PACKED_LAYOUTS`.
        problem: its GEMM: what is fused after it may change the order of rows.
    """
    return PackedWeight(PACKERS[layout.name](weight, problem), PackedForm(weight.scheme, weight.shape, layout))


def pairs_of(problem: GemmProblem) -> str | None:
    """How gate and up rows alternate in a weight whose GEMM ends in a gated activation; None where none does."""
    e = problem.epilogue
    return None if e.activation is None or not e.gated else "interleaved" if e.interleaved else "halves"


def _hopper(x_format: str) -> Callable[[MxTensor, GemmProblem], list[torch.Tensor]]:
    def run(weight: MxTensor, problem: GemmProblem) -> list[torch.Tensor]:
        """Data, row factors, and for e2m1 scales."""
        from sglang_amd_quant.kernels.triton.hopper_pack import pack_hopper

        data, scales = (t if t.dim() == 3 else t.unsqueeze(0) for t in weight.tensors)  # a linear is one expert
        made = pack_hopper(data, scales, x_format, pairs_of(problem))
        if rounded := int(made.rounded or 0):
            what = "blocks" if made.w_format == "e2m1" else "elements"
            logger.info(
                "amd_mx: %d %s of %s weights lose bits under one scale a row", rounded, what, list(weight.shape)
            )
        return [made.data, made.factors, *([] if made.scales is None else [made.scales])]

    return run


def _by_turns(weight: MxTensor, problem: GemmProblem) -> MxTensor:
    """The weight with 8 gates and their 8 ups by turns, where a gated activation follows."""
    from sglang_amd_quant.kernels.triton.hopper_pack import row_order

    pairs = pairs_of(problem)
    if pairs is None:
        return weight
    order = row_order(weight.n, pairs).to(weight.device)
    data = weight.data.view(torch.uint8).index_select(-2, order).view(weight.data.dtype)
    return replace(weight, data=data, scales=weight.scales.index_select(-2, order))


def _decode(weight: MxTensor, problem: GemmProblem) -> list[torch.Tensor]:
    """Data and scales as AMD's grouped decode kernels read them."""
    from sglang_amd_quant.ops.decode_weights import decode_weights

    return decode_weights(_by_turns(weight, problem), member(current_arch(), problem.arch)).tensors


def _mma_int4(weight: MxTensor, problem: GemmProblem) -> list[torch.Tensor]:
    """Data and words of groups."""
    return _by_turns(weight, problem).to_layout("mma_int4+tile_group").tensors


PACKERS: dict[str, Callable[[MxTensor, GemmProblem], list[torch.Tensor]]] = {
    "hopper_bf16": _hopper("bf16"),
    "hopper_e4m3": _hopper("e4m3"),
    **dict.fromkeys((name for name in PACKED_LAYOUTS if name.startswith("decode_")), _decode),
    "decode_mma_int4": _mma_int4,
}
"""Packed layout -> what gives the tensors."""
