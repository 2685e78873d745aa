"""Architectures: from a config.json to the layers that SGLang builds for it, unsharded.

A family reads the keys of its config and composes the pieces of `parts.py`; SGLang's model of the same name (0.5.23,
`sglang/srt/models`) says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.shapes import parts
from sglang_amd_quant.shapes.facts import Config
from sglang_amd_quant.shapes.layers import Dim, Fuse, Layer, Linear, Split
from sglang_amd_quant.shapes.parts import Blocks, every_block


@dataclass(frozen=True)
class Family:
    """One architecture: `layers` reads a config; `block` is the format of a decoder block's prefix."""

    layers: Callable[[Config], Sequence[Layer]]
    block: str = "model.layers.{}."


def dense(c: Config, *, activated: bool = True) -> list[Layer]:
    """Llama, Mistral, Qwen2 and Qwen3."""
    blocks = every_block(c)
    mlp = parts.mlp(c, "mlp", c.whole("intermediate_size"), blocks, activated=activated)
    return [*parts.attention(c, blocks), *mlp, parts.lm_head(c)]


GEMMA3_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
"""Gemma-3's config.json leaves out what equals transformers' `Gemma3TextConfig` defaults."""


def gemma3(c: Config) -> list[Layer]:
    """Its tied output projection is a plain embedding in SGLang: whole on every rank, not padded."""
    c.data = {**GEMMA3_DEFAULTS, **c.data}
    *layers, head = dense(c, activated=False)
    if c.get("tie_word_embeddings", True):
        head = parts.replicated("lm_head", c.whole("vocab_size"), c.whole("hidden_size"), None, bf16=True)
    return [*layers, head]


def gpt_oss(c: Config) -> list[Layer]:
    """Experts of the model's own intermediate size, stored fused."""
    blocks, n = every_block(c), c.whole("num_local_experts", "num_experts")
    moe = parts.experts(c, blocks, c.whole("intermediate_size"), n, router="router", stored=parts.FUSED)
    return [*parts.attention(c, blocks, head_dim=c.whole("head_dim", default=64)), *moe, parts.lm_head(c)]


def mixtral(c: Config) -> list[Layer]:
    """Mixtral and MiniMax-M2: experts of `intermediate_size` in every block."""
    blocks, n = every_block(c), c.whole("num_local_experts")
    moe = parts.experts(c, blocks, c.whole("intermediate_size"), n, at="block_sparse_moe", stored=parts.MIXTRAL)
    return [*parts.attention(c, blocks), *moe, parts.lm_head(c)]


def _sparse_dense(c: Config) -> tuple[Blocks, Blocks]:
    """Blocks with experts and blocks with a dense MLP, in the ways that configs say it."""
    blocks = every_block(c)
    kinds, freq = c.per_block("mlp_layer_types"), c.get("moe_layer_freq", 1)
    if kinds is not None:
        sparse = tuple(i for i in blocks if kinds[i] != "dense")
    elif isinstance(freq, list):
        flags = c.per_block("moe_layer_freq") or []
        sparse = tuple(i for i in blocks if flags[i])
    else:
        first, step = c.whole("first_k_dense_replace", default=0, least=0), c.whole("moe_layer_freq", default=1)
        sparse = tuple(i for i in blocks if i >= first and i % step == 0)
    return sparse, tuple(i for i in blocks if i not in set(sparse))


def _qwen_moe_block(c: Config, sparse: Blocks) -> list[Layer]:
    """Router, experts, and a gated shared expert if there is one; SGLang fuses it only under aiter."""
    inter, shared = c.whole("moe_intermediate_size"), c.whole("shared_expert_intermediate_size", default=0, least=0)
    n = c.whole("num_experts", "num_local_experts")
    layers = parts.experts(c, sparse, inter, n, shared=int(shared == inter))
    if shared:
        layers += parts.mlp(c, "mlp.shared_expert", shared, sparse, shared_expert=True)
        layers.append(parts.replicated("mlp.shared_expert_gate", 1, c.whole("hidden_size"), sparse, bf16=True))
    return layers


def qwen_moe(c: Config) -> list[Layer]:
    """Qwen2-MoE and Qwen3-MoE, with experts in every block: SGLang builds no other."""
    if c.indices("mlp_only_layers") or c.whole("decoder_sparse_step", default=1) != 1:
        raise ShapeError(c.where, "blocks without experts, which SGLang does not build", "serve it elsewhere")
    blocks = every_block(c)
    return [*parts.attention(c, blocks), *_qwen_moe_block(c, blocks), parts.lm_head(c)]


def qwen_hybrid(c: Config, qkvz: Sequence[str], ba: Sequence[str], mtp: str | None = None) -> list[Layer]:
    """Qwen3-Next and Qwen3.5/3.6: three blocks of gated delta net, one of gated attention; experts or a dense MLP."""
    blocks, kinds = every_block(c), c.per_block("layer_types")
    every = c.whole("full_attention_interval", default=4)
    full = tuple(i for i in blocks if (kinds[i] == "full_attention" if kinds else (i + 1) % every == 0))
    linear = tuple(i for i in blocks if i not in set(full))
    gate = bool(c.get("attn_output_gate", True))

    def middle(which: Blocks) -> list[Layer]:
        if c.get("num_experts") is None:
            return parts.mlp(c, "mlp", c.whole("intermediate_size"), which)
        return _qwen_moe_block(c, which)

    draft: list[Layer] = []
    if mtp and c.whole(mtp, default=0, least=0):
        last = (len(blocks),)
        draft = parts.as_mtp([*parts.attention(c, last, gate=gate), *middle(last)], c, "fc")
    return [
        *parts.attention(c, full, gate=gate),
        *parts.gated_delta_net(c, linear, qkvz, ba),
        *middle(blocks),
        parts.lm_head(c),
        *draft,
    ]


def glm4_moe(c: Config) -> list[Layer]:
    """GLM-4.5 to 4.7."""
    sparse, plain = _sparse_dense(c)
    return [
        *parts.attention(c, every_block(c)),
        *_deepseek_moe(c, sparse, plain, Fuse.ALWAYS),
        parts.lm_head(c),
        *_nextn(c, lambda last: [*parts.attention(c, last), *_deepseek_moe(c, last, (), Fuse.ALWAYS)]),
    ]


def _deepseek_moe(c: Config, sparse: Blocks, plain: Blocks, fuse: Fuse) -> list[Layer]:
    inter, shared = c.whole("moe_intermediate_size"), c.whole("n_shared_experts", default=0, least=0)
    layers = parts.experts(c, sparse, inter, c.whole("n_routed_experts"), shared=shared, fuse=fuse)
    if shared:
        layers += parts.mlp(c, "mlp.shared_experts", inter * shared, sparse, shared_expert=True)
    if plain:
        layers += parts.mlp(c, "mlp", c.whole("intermediate_size"), plain)
    return layers


def _nextn(c: Config, block: Callable[[Blocks], list[Layer]]) -> list[Layer]:
    """The draft block of models with `num_nextn_predict_layers`."""
    if not c.whole("num_nextn_predict_layers", default=0, least=0):
        return []
    return parts.as_mtp(block((c.whole("num_hidden_layers"),)), c, "eh_proj")


def deepseek(c: Config) -> list[Layer]:
    """DeepSeek-V2/V3/R1/V3.2, Kimi-K2 and GLM-5: MLA, a few dense blocks, then experts."""
    sparse, plain = _sparse_dense(c)
    blocks, indexed = every_block(c), _indexed(c)
    # 384 experts fuse in SGLang for Quark checkpoints only (deepseek_v2.py, 0.5.23).
    fusable = c.get("n_routed_experts") == 256 and c.get("n_shared_experts") == 1
    own = c.architecture in ("DeepseekV3ForCausalLM", "GlmMoeDsaForCausalLM")
    fuse = Fuse.ALWAYS if fusable and own else Fuse.ASKED
    return [
        *parts.mla(c, blocks, indexed=indexed),
        *_deepseek_moe(c, sparse, plain, fuse),
        parts.lm_head(c),
        *_nextn(c, lambda last: [*parts.mla(c, last, indexed=indexed and last), *_deepseek_moe(c, last, (), fuse)]),
    ]


def _indexed(c: Config) -> Blocks:
    """Blocks that run the sparse-attention indexer: all of them, unless some share the top-k of an earlier one."""
    if c.get("index_topk") is None:
        return ()
    blocks, kinds, pattern = every_block(c), c.per_block("indexer_types"), c.get("index_topk_pattern")
    if kinds is not None:
        return tuple(i for i in blocks if kinds[i] != "shared")
    if pattern is not None:
        return tuple(i for i in blocks if str(pattern)[i : i + 1] != "S")
    every, skip = c.whole("index_topk_freq", default=1), c.whole("index_skip_topk_offset", default=2)
    return tuple(i for i in blocks if max(i - skip + 1, 0) % every == 0)


def deepseek_v4(c: Config) -> list[Layer]:
    """DeepSeek-V4: one latent KV head, grouped low-rank o, compressors (ratio 4 with an indexer, or 128), all experts.

    wo_a is a batch of `o_groups` GEMMs [o_lora_rank, heads * head_dim / o_groups]; its N here is all groups of a rank.
    """
    h, n, d, at = c.whole("hidden_size"), c.whole("num_attention_heads"), c.whole("head_dim"), "self_attn."
    q_rank, o_rank, groups = c.whole("q_lora_rank"), c.whole("o_lora_rank"), c.whole("o_groups")
    ih, di = c.whole("index_n_heads"), c.whole("index_head_dim")
    blocks, ratios = every_block(c), c.per_block("compress_ratios")
    if ratios is None or n * d % groups:
        raise ShapeError(c.where, "compress_ratios or whole o_groups are missing", "add them to the config")
    csa, hca = (tuple(i for i in blocks if ratios[i] == ratio) for ratio in (4, 128))
    qkv_a = (Dim(q_rank, module=f"{at}wq_a"), Dim(d, module=f"{at}wkv"))
    wo_a = Dim(groups, o_rank, Split.EVEN, "output groups", f"{at}wo_a")
    return [
        Linear(f"{at}wqkv_a", qkv_a, Dim(h), blocks),
        Linear(f"{at}wq_b", (parts.heads(n, d, f"{at}wq_b"),), Dim(q_rank), blocks),
        Linear(f"{at}wo_a", (wo_a,), Dim(n * d // groups), blocks, bf16=True),
        parts.row_parallel(f"{at}wo_b", h, Dim(groups, o_rank, Split.EVEN, "output groups"), blocks),
        # A ratio-4 compressor looks at two overlapping windows, so it is twice as wide.
        parts.replicated(f"{at}compressor.wkv_gate", 4 * d, h, csa, bf16=True),
        parts.replicated(f"{at}compressor.wkv_gate", 2 * d, h, hca, bf16=True),
        parts.replicated(f"{at}indexer.wq_b", ih * di, q_rank, csa),
        parts.replicated(f"{at}indexer.weights_proj", ih, h, csa, bf16=True),
        parts.replicated(f"{at}indexer.compressor.wkv_gate", 4 * di, h, csa, bf16=True),
        *_deepseek_moe(c, blocks, (), Fuse.ASKED),
        parts.lm_head(c),
    ]


def minimax_m3(c: Config) -> list[Layer]:
    """MiniMax-M3: sparse-attention blocks add index heads (one index key head) to the fused qkv projection.

    SGLang concatenates the two weights after loading (`fused_qkv_index_proj`).
    """
    c.data = {**c.data, **c.object("sparse_attention_config")}
    flags, blocks = c.per_block("layer_types") or c.per_block("sparse_attention_freq"), every_block(c)
    indexed = tuple(i for i in blocks if flags and flags[i] not in (0, "full_attention"))
    qkv, o = parts.attention(c, blocks)
    assert isinstance(qkv, Linear)
    layers: list[Layer] = [replace(qkv, blocks=tuple(i for i in blocks if i not in set(indexed)))]
    if indexed:
        heads, d = c.whole("index_n_heads", "sparse_num_index_heads"), c.whole("index_head_dim", "sparse_index_dim")
        index = (
            parts.kv_heads(heads, d, "self_attn.index_q_proj", "index heads"),
            Dim(d, module="self_attn.index_k_proj"),
        )
        layers.append(replace(qkv, name="self_attn.fused_qkv_index_proj", parts=(*qkv.parts, *index), blocks=indexed))
    sparse, plain = _sparse_dense(c)
    inter, shared = c.whole("intermediate_size"), c.whole("n_shared_experts", default=1, least=0)
    n = c.whole("num_local_experts")
    moe = parts.experts(c, sparse, inter, n, stored=parts.MIXTRAL, shared=shared, fuse=Fuse.WITHOUT_EP)
    if shared:
        moe += parts.mlp(c, "mlp.shared_experts", inter * shared, sparse, shared_expert=True)
    if plain:
        moe += parts.mlp(c, "mlp", c.whole("dense_intermediate_size"), plain)
    return [*layers, o, *moe, parts.lm_head(c)]


def llama4(c: Config) -> list[Layer]:
    """Llama 4: every n-th block has experts and a shared expert of the same size, which SGLang does not fuse."""
    blocks, step = every_block(c), c.whole("interleave_moe_layer_step", default=1)
    named = c.indices("moe_layers")
    sparse = tuple(i for i in blocks if (i in named if named else (i + 1) % step == 0))
    inter = c.whole("intermediate_size")
    n = c.whole("num_local_experts")
    moe = parts.experts(c, sparse, inter, n, at="feed_forward", router="router", stored=parts.FUSED, shared=1)
    plain = tuple(i for i in blocks if i not in set(sparse))
    if plain:
        moe += parts.mlp(c, "feed_forward", c.whole("intermediate_size_mlp"), plain, activated=True)
    shared = parts.mlp(c, "feed_forward.shared_expert", inter, sparse, shared_expert=True, activated=True)
    return [*parts.attention(c, blocks), *moe, *shared, parts.lm_head(c)]


_next = partial(qwen_hybrid, qkvz=("in_proj_qkvz",) * 4, ba=("in_proj_ba",) * 2)
_qwen3_5 = partial(
    qwen_hybrid,
    qkvz=("in_proj_qkv", "in_proj_qkv", "in_proj_qkv", "in_proj_z"),
    ba=("in_proj_b", "in_proj_a"),
    mtp="mtp_num_hidden_layers",
)
_WRAPPED = "language_model.model.layers.{}."

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(dense),
    "MistralForCausalLM": Family(dense),
    "Qwen2ForCausalLM": Family(dense),
    "Qwen3ForCausalLM": Family(dense),
    "Gemma3ForCausalLM": Family(gemma3),
    "Gemma3ForConditionalGeneration": Family(gemma3, _WRAPPED),
    "MixtralForCausalLM": Family(mixtral),
    "Qwen2MoeForCausalLM": Family(qwen_moe),
    "Qwen3MoeForCausalLM": Family(qwen_moe),
    "Qwen3VLMoeForConditionalGeneration": Family(qwen_moe),
    "Qwen3NextForCausalLM": Family(_next),
    "Qwen3_5MoeForCausalLM": Family(_qwen3_5),
    "Qwen3_5ForCausalLM": Family(_qwen3_5),
    "Qwen3_5MoeForConditionalGeneration": Family(_qwen3_5),
    "Qwen3_5ForConditionalGeneration": Family(_qwen3_5),
    "GptOssForCausalLM": Family(gpt_oss),
    "DeepseekV2ForCausalLM": Family(deepseek),
    "DeepseekV3ForCausalLM": Family(deepseek),
    "DeepseekV32ForCausalLM": Family(deepseek),
    "GlmMoeDsaForCausalLM": Family(deepseek),
    "KimiK25ForConditionalGeneration": Family(deepseek),
    "DeepseekV4ForCausalLM": Family(deepseek_v4),
    "Glm4MoeForCausalLM": Family(glm4_moe),
    "MiniMaxM2ForCausalLM": Family(mixtral),
    "MiniMaxM3SparseForCausalLM": Family(minimax_m3),
    "MiniMaxM3SparseForConditionalGeneration": Family(minimax_m3, _WRAPPED),
    "Llama4ForCausalLM": Family(llama4),
    "Llama4ForConditionalGeneration": Family(llama4, _WRAPPED),
}
"""Architecture name in a config.json -> its family."""
