"""Weights laid out, once after loading, as the kernels that will run them read them."""

from __future__ import annotations

from dataclasses import replace

from sglang_amd_quant.layouts.names import STRIDED, TensorLayout
from sglang_amd_quant.ops import linear, moe
from sglang_amd_quant.ops.packed import Weight, pack
from sglang_amd_quant.runtime.detect import current_arch, launchable
from sglang_amd_quant.selection import GemmProblem, KernelChoice, Selector, choose_layout, layout_choice
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS
from sglang_amd_quant.selection.arch import member
from sglang_amd_quant.selection.choose import REFERENCE, process_selector
from sglang_amd_quant.tensor import MxTensor


def linear_layout(problem: GemmProblem, here: frozenset[str]) -> TensorLayout:
    """The layout that serves a linear layer best over all M.

    Args:
        problem: the layer's GEMM; its M does not matter.
        here: names of the kernels that can be launched (`runtime.detect.launchable`).
    """
    mine = here.intersection(linear.KERNELS) | {REFERENCE}
    return TensorLayout.parse(choose_layout(problem, process_selector(mine)).layout)


def fuses_activation(problem: GemmProblem) -> bool:
    """Whether kernels of this device do the activation of a linear layer's epilogue, at every M."""
    here = launchable(current_arch()).intersection(linear.KERNELS) | {REFERENCE}
    return layout_choice.fuses_activation(problem, linear_layout(problem, here).name, Selector(available=here))


def expert_layouts(gate_up: GemmProblem, down: GemmProblem, here: frozenset[str]) -> tuple[TensorLayout, TensorLayout]:
    """The same for an MoE's two GEMMs. One launcher runs both, so layouts that no pair of kernels reads at every M are
    not taken: then both stay strided."""
    first, second = (
        TensorLayout.parse(choose_layout(problem, process_selector(names)).layout)
        for problem, names in zip((gate_up, down), moe.sides(here), strict=True)
    )
    if (first, second) != (STRIDED, STRIDED) and not _paired(gate_up, down, [first, second], here):
        return STRIDED, STRIDED
    return first, second


def lay_out(weight: MxTensor, problem: GemmProblem) -> Weight:
    """A linear layer's weight in the layout that selection picks for all M, among what this device can launch.

    On a CPU, and wherever no kernel is for a problem, that is the order of a checkpoint: the tensor itself. int4 gets
    words of scale and zero point in any case (`MxTensor.with_words`).
    """
    return _laid_out(weight, linear_layout(problem, launchable(current_arch())), problem)


def lay_out_experts(w13: MxTensor, w2: MxTensor, gate_up: GemmProblem, down: GemmProblem) -> tuple[Weight, Weight]:
    """The same for an MoE's two weights (`expert_layouts`)."""
    first, second = expert_layouts(gate_up, down, launchable(current_arch()))
    return _laid_out(w13, first, gate_up), _laid_out(w2, second, down)


def _paired(gate_up: GemmProblem, down: GemmProblem, layouts: list[TensorLayout], here: frozenset[str]) -> bool:
    """Whether kernels for both GEMMs are a pair at every sample M. Nothing is recorded: no call is made."""

    def choose(problem: GemmProblem, available: frozenset[str]) -> KernelChoice:
        return Selector(available=available).decide(problem)

    first, second = (replace(p, layout=layout.name) for p, layout in zip((gate_up, down), layouts, strict=True))
    pairs = (moe.decide(replace(first, m=m), replace(second, m=m), here, choose) for m in layout_choice.SAMPLE_MS)
    return all(pair.kernels in moe.KERNELS for pair in pairs)


def _laid_out(weight: MxTensor, layout: TensorLayout, problem: GemmProblem) -> Weight:
    if weight.scheme.weight == "int4":
        weight = weight.with_words()
    if layout.name == AMD_DECODE_LAYOUTS.get((problem.arch, weight.scheme.weight)):
        from sglang_amd_quant.ops.decode_weights import decode_weights

        return decode_weights(weight, member(current_arch(), problem.arch))
    return pack(weight, layout, problem) if layout.packed else weight.to_layout(layout)
