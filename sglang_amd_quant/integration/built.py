"""What can be seen only once SGLang has built a model: who scales the experts' output, and which layers it asked no
method for."""

from __future__ import annotations

from typing import Any

import torch

from sglang_amd_quant.integration.moe import AmdMxMoEMethod

SCALING_MODELS = ("deepseek_v2", "glm4_moe", "glm4_moe_lite")
"""SGLang's modules whose MoE blocks multiply by `routed_scaling_factor` themselves, except on CUDA."""


def look_over(model: torch.nn.Module, config: Any) -> None:
    """Tell the methods of a model, just built with `config`, what its other parts do."""
    from sglang_amd_quant.integration.config import AmdMxConfig

    if not isinstance(config, AmdMxConfig):
        return
    for block in model.modules():
        for layer in block.children():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, AmdMxMoEMethod):
                method.scaled_outside = scaled_outside(block)
    config.note_unasked(model)
    if config.reader is None:  # its recipe is checked though it quantizes nothing, and no method tells of it
        model.amd_mx_config = config  # type: ignore[assignment]


def scaled_outside(block: torch.nn.Module) -> bool:
    """Whether something else than the experts of an MoE block multiplies their output by `routed_scaling_factor`.

    In SGLang 0.5.23 it is one of these (its own experts skip the factor in the same places, or should):

        MoE block                                            CUDA     ROCm with AITER         ROCm without, CPU
        DeepSeek-V2's, of many models (`deepseek_v2.py`)     experts  top-k [1], else model   model
        GLM-4's (`glm4_moe.py`, `glm4_moe_lite.py`)          experts  top-k [1]               model
        Bailing's, Kimi Linear's, Nemotron-H's and others    experts  top-k [1], else experts experts

    [1]: AITER's grouped top-k with a correction bias, as all of GLM-4 is. Models that scale everywhere by themselves,
    or let top-k do so (Step 3.5, LongCat, LFM2, MiniMax-M3), give their experts no factor. No method of ours declares
    `fuse_routed_scaling_factor_in_topk`: DeepSeek-V2's block would multiply on ROCm and CPUs all the same, and SGLang's
    top-k for CPUs refuses to.
    """
    from sglang.srt.layers.moe.topk import is_routed_scaling_factor_fused_in_topk
    from sglang.srt.utils import is_cuda

    topk = getattr(getattr(block, "topk", None), "topk_config", None)
    if topk is not None and is_routed_scaling_factor_fused_in_topk(topk):
        return True
    modules = {kind.__module__.rpartition(".")[2] for kind in type(block).__mro__}
    return not is_cuda() and not modules.isdisjoint(SCALING_MODELS)
