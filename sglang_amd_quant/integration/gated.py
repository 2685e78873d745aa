"""Gate and up projections whose GEMM does the activation behind them.

SGLang has a seam for that: before a dense MLP calls its gate_up_proj, it asks a `DualGemm` whether that one runs the
projection together with silu (LlamaMLP and Qwen2MLP, and so Llama, Mistral, Qwen2, Qwen3 and others). It chooses among
kernels of its own; two hooks let ours be chosen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sglang_amd_quant.ops.layout import fuses_activation
from sglang_amd_quant.selection import GemmProblem


class ByGemm:
    """`DualGemm.mode` where a layer of ours is to activate."""


def select_mode(original: Callable[..., Any], dual: Any, gate_up_proj: Any, hidden_size: int) -> Any:
    """Hook around `DualGemm._select_mode`, which a layer is made with, before its weights come."""
    from sglang_amd_quant.integration.linear import AmdMxLinearMethod

    method = gate_up_proj.quant_method
    if not isinstance(method, AmdMxLinearMethod):
        return original(dual, gate_up_proj, hidden_size)
    if _wants_products():
        return None
    method.dual, dual.max_tokens = dual, sys.maxsize
    return ByGemm()


def run(original: Callable[..., Any], dual: Any, x: torch.Tensor, gate_up_proj: Any) -> Any:
    """Hook around `DualGemm.__call__`: x[..., K] -> [..., N / 2]."""
    return gate_up_proj.amd_mx(x) if isinstance(dual.mode, ByGemm) else original(dual, x, gate_up_proj)


def activated(problem: GemmProblem, dual: Any) -> GemmProblem:
    """The problem as it is when weights have come: with silu, if `dual` was left to us and kernels here do it at every
    M; else `dual` is told not to ask."""
    if dual is None or not isinstance(dual.mode, ByGemm):
        return problem
    with_silu = replace(problem, epilogue=replace(problem.epilogue, activation="silu"))
    if not problem.epilogue.bias and fuses_activation(with_silu):
        return with_silu
    dual.mode = None
    return problem


def _wants_products() -> bool:
    """Whether something in this server works on products before the activation: LoRA adds to them, and with sequences
    sharded the projection gathers its input, which `DualGemm` leaves to it."""
    from sglang.srt.runtime_context import get_flags, get_server_args

    try:
        args = get_server_args()
    except ValueError:  # no server in this process: tools and tests
        return False
    return bool(args.enable_lora or args.lora_paths or get_flags().sp.enabled)
