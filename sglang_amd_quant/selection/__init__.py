"""Which kernel runs a GEMM problem, and why. No torch, no triton."""

from sglang_amd_quant.selection.choose import BoundChoices, Selector, choose
from sglang_amd_quant.selection.layout_choice import LayoutChoice, choose_layout
from sglang_amd_quant.selection.legality import legal
from sglang_amd_quant.selection.problem import SOURCES, Config, Epilogue, GemmProblem, KernelChoice, Refusal
from sglang_amd_quant.selection.specs import KernelSpec, kernel, kernels, register, shipped

__all__ = [
    "SOURCES",
    "BoundChoices",
    "Config",
    "Epilogue",
    "GemmProblem",
    "KernelChoice",
    "KernelSpec",
    "LayoutChoice",
    "Refusal",
    "Selector",
    "choose",
    "choose_layout",
    "kernel",
    "kernels",
    "legal",
    "register",
    "shipped",
]
