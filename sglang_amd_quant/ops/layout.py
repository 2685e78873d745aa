"""Weights laid out, once after loading, as the kernels that will run them read them."""

from __future__ import annotations

from sglang_amd_quant.runtime.detect import current_arch, launchable
from sglang_amd_quant.selection import GemmProblem, choose_layout
from sglang_amd_quant.selection.choose import process_selector
from sglang_amd_quant.tensor import MxTensor


def lay_out(weight: MxTensor, problem: GemmProblem) -> MxTensor:
    """The weight in the layout that selection picks for all M, among the kernels that this device can launch.

    On a CPU, and wherever no kernel is for a problem, that is the order of a checkpoint: the tensor itself.
    """
    return weight.to_layout(choose_layout(problem, process_selector(launchable(current_arch()))).layout)
