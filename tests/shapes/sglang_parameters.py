"""Builds tiny SGLang models as ranks of TP x EP would, on the meta device, and prints their parameters' shapes as JSON.

Run as a script, in a process of its own: SGLang keeps its context in module globals. No weights, no process groups: a
layer's shape depends on rank and size only, which the context states.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BASE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 250,  # not a multiple of 64, so that its padding shows
    "max_position_embeddings": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 192,  # 6 blocks of 32: 2 a rank at TP4, none on the last
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
DEEPSEEK = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
            "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1,
            "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_scaling": YARN}  # fmt: skip
HYBRID = {"num_hidden_layers": 4, "num_experts": 8, "shared_expert_intermediate_size": 192,
          "full_attention_interval": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}  # fmt: skip
SPARSE = {"sparse_num_index_heads": 2, "sparse_index_dim": 32, "sparse_attention_freq": [0, 1],
          "sparse_disable_index_value": [0, 1], "sparse_topk_blocks": 4, "sparse_block_size": 64,
          "sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "sliding_window": 128, "query_pre_attn_scalar": 32,
                          "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
                          "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_experts": 8, "decoder_sparse_step": 1},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 8},
    # 18 blocks of 32: 5 a rank at TP4, 3 on the last
    "GptOssForCausalLM": {"model_type": "gpt_oss", "intermediate_size": 576, "num_local_experts": 8,
                          "attention_bias": True, "sliding_window": 128,
                          "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 7.0},
    "DeepseekV3ForCausalLM": {"model_type": "deepseek_v3", **DEEPSEEK},
    "GlmMoeDsaForCausalLM": {"model_type": "glm_moe_dsa", **DEEPSEEK, "index_n_heads": 4, "index_head_dim": 128,
                             "index_topk": 64, "indexer_types": ["full", "shared"]},
    "DeepseekV4ForCausalLM": {"model_type": "deepseek_v4", **DEEPSEEK, "num_key_value_heads": 1, "head_dim": 64,
                              "o_lora_rank": 32, "o_groups": 4, "index_n_heads": 4, "index_head_dim": 128,
                              "index_topk": 64, "compress_ratios": [4, 128], "num_hash_layers": 1, "hc_mult": 4,
                              "hc_eps": 1e-6,
                              "scoring_func": "sqrtsoftplus", "compress_rope_theta": 40000, "sliding_window": 128,
                              "hc_sinkhorn_iters": 20, "swiglu_limit": 10.0},
    "Glm4MoeForCausalLM": {"model_type": "glm4_moe", **DEEPSEEK, "partial_rotary_factor": 0.5},
    "Qwen3NextForCausalLM": {"model_type": "qwen3_next", **HYBRID},
    "Qwen3_5MoeForCausalLM": {"model_type": "qwen3_5_moe_text", **HYBRID, "rope_parameters": {
                                  "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "Llama4ForCausalLM": {"model_type": "llama4_text", "num_local_experts": 8, "num_experts_per_tok": 1,
                          "intermediate_size_mlp": 512, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
    "MiniMaxM2ForCausalLM": {"model_type": "minimax_m2", "num_local_experts": 8, "rotary_dim": 32,
                             "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
    "MiniMaxM3SparseForCausalLM": {"model_type": "minimax_m3", "num_local_experts": 8, "n_shared_experts": 1,
                                   "dense_intermediate_size": 512, "moe_layer_freq": [0, 1], "rotary_dim": 32,
                                   "scoring_func": "sigmoid", "qk_norm_type": "per_head", "swiglu_alpha": 1.702,
                                   "swiglu_limit": 7.0, "hidden_act": "swigluoai",
                                   "sparse_attention_config": SPARSE},
}  # fmt: skip
"""Architecture -> a tiny config of it, on top of `BASE`."""

VARIANTS = {
    "w4a8": ("GptOssForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"),
    "int4_w4a16": ("GptOssForCausalLM", "Qwen3MoeForCausalLM"),
    "fused": ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "MiniMaxM3SparseForCausalLM"),
}
"""Built besides bf16: with `--quantization amd_mx` (packed, whole blocks a rank), and with shared experts fused."""

PARALLELISM = ((1, 1), (2, 1), (4, 1), (4, 2), (4, 4))
DENSE = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")


def cases() -> list[tuple[str, str, int, int]]:
    """(architecture, variant, TP, EP) to build."""
    return [
        (architecture, variant, tp, ep)
        for architecture in CONFIGS
        for variant in ("bf16", *(v for v, names in VARIANTS.items() if architecture in names))
        for tp, ep in PARALLELISM
        if ep == 1 or architecture not in DENSE
    ]


def config_of(architecture: str) -> dict[str, Any]:
    return {**BASE, **CONFIGS[architecture], "architectures": [architecture]}


@contextmanager
def _as_last_rank(tp: int, ep: int) -> Iterator[None]:
    """SGLang's parallel state as the last rank of TP x EP sees it."""
    from sglang.srt.runtime_context import get_parallel

    def group(rank: int, size: int) -> SimpleNamespace:
        return SimpleNamespace(rank_in_group=rank, world_size=size, cpu_group=None, is_first_rank=True,
                               is_last_rank=True)  # fmt: skip

    moe_tp, rank = tp // ep, tp - 1
    sizes = {"tp": (rank, tp), "attn_tp": (rank, tp), "moe_tp": (rank % moe_tp, moe_tp), "moe_ep": (rank // moe_tp, ep),
             "pp": (0, 1), "moe_dp": (0, 1), "attn_dp": (0, 1), "attn_cp": (0, 1)}  # fmt: skip
    state: dict[str, Any] = {"attn_dcp_size": 1}
    for name, (index, size) in sizes.items():
        state |= {f"{name}_rank": index, f"{name}_size": size}
        if name in ("tp", "attn_tp", "moe_tp", "moe_ep", "pp"):
            state[f"{name}_group"] = group(index, size)
    with get_parallel().override(**state):
        yield


def _start(folder: Path) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    (folder / "config.json").write_text(json.dumps(config_of("LlamaForCausalLM")))
    args = ServerArgs(model_path=str(folder), skip_tokenizer_init=True)
    args.resolve_once()
    runtime_context._CONTEXT.set_server_args(args)


def _hf_config(folder: Path, architecture: str) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_config
    from transformers import PretrainedConfig

    config = config_of(architecture)
    if config["model_type"] == "minimax_m3":  # transformers knows it inside of a multimodal config only
        return PretrainedConfig(**config)
    own = folder / architecture  # SGLang caches configs by path
    own.mkdir()
    (own / "config.json").write_text(json.dumps(config))
    return get_config(str(own), trust_remote_code=False)


def main() -> None:
    """Write {"architecture variant TP EP": {parameter: shape}} to the file named as first argument, and those modules
    whose GEMM may do silu as well, as {"activated": {architecture: modules}}."""
    import torch
    from sglang.srt.configs.shared_experts import SharedExpertsConfig
    from sglang.srt.model_loader.loader import set_default_torch_dtype
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.runtime_context import get_model

    from sglang_amd_quant.integration.config import AmdMxConfig
    from sglang_amd_quant.recipe import Recipe
    from sglang_amd_quant.schemes import SCHEMES

    built: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _start(folder)
        configs = {architecture: _hf_config(folder, architecture) for architecture in CONFIGS}
        for architecture, variant, tp, ep in cases():
            model_class, _ = ModelRegistry.resolve_model_cls([architecture])
            hf_config = configs[architecture]
            shared = SharedExpertsConfig(num_fused_shared_experts=int(variant == "fused"))
            with (
                _as_last_rank(tp, ep),
                get_model().override(shared_experts=shared),
                torch.device("meta"),
                set_default_torch_dtype(torch.bfloat16),
            ):
                recipe = Recipe.uniform(variant) if variant in SCHEMES else None
                quant = AmdMxConfig(recipe, None, hf_config) if recipe else None
                model = model_class(hf_config, quant)
            built[f"{architecture} {variant} {tp} {ep}"] = {n: list(p.shape) for n, p in model.named_parameters()}
            asking = [f"{n}.gate_up_proj" for n, m in model.named_modules() if hasattr(m, "dual_gemm")]
            built.setdefault("activated", {})[architecture] = asking
    Path(sys.argv[1]).write_text(json.dumps(built))


if __name__ == "__main__":
    os.environ |= {"SGLANG_PLATFORM": "amd_mx_cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    main()
