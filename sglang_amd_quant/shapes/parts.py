"""Pieces that architectures are composed of: attention, MLP, MLA, gated delta net, experts. Unsharded, no torch.

Which projections are fused, replicated or built without a quantization config follows SGLang 0.5.23
(`sglang/srt/models`, `sglang/srt/layers/attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sglang_amd_quant.shapes.facts import Config
from sglang_amd_quant.shapes.layers import Dim, Experts, Fuse, Layer, Linear, Split

Blocks = tuple[int, ...]


def every_block(c: Config) -> Blocks:
    return tuple(range(c.whole("num_hidden_layers")))


def heads(n: int, size: int, module: str = "") -> Dim:
    return Dim(n, size, Split.EVEN, "attention heads", module)


def kv_heads(n: int, size: int, module: str, what: str = "KV heads") -> Dim:
    return Dim(n, size, Split.KV, what, module)


def replicated(name: str, n: int, k: int, blocks: Blocks | None, *, bf16: bool = False) -> Linear:
    """A projection that every rank holds whole."""
    return Linear(name, (Dim(n, module=name),), Dim(k), blocks, bf16=bf16)


def row_parallel(name: str, n: int, k: Dim, blocks: Blocks) -> Linear:
    """A projection divided along K, as those that end a block are."""
    return Linear(name, (Dim(n, module=name),), k, blocks)


def attention(c: Config, blocks: Blocks, *, gate: bool = False, head_dim: int | None = None) -> list[Layer]:
    """Fused q, k, v and o. With `gate`, q carries an output gate of its own size.

    Args:
        c: the config.
        blocks: decoder blocks that have it.
        gate: double q's rows.
        head_dim: where it is no `head_dim` and not hidden_size / heads either.
    """
    h, n = c.whole("hidden_size"), c.whole("num_attention_heads")
    kv, d = c.whole("num_key_value_heads", default=n), head_dim or c.whole("head_dim", default=h // n)
    parts = (
        heads(n, d * (2 if gate else 1), "self_attn.q_proj"),
        kv_heads(kv, d, "self_attn.k_proj"),
        kv_heads(kv, d, "self_attn.v_proj"),
    )
    return [
        Linear("self_attn.qkv_proj", parts, Dim(h), blocks),
        row_parallel("self_attn.o_proj", h, heads(n, d), blocks),
    ]


def mla(c: Config, blocks: Blocks, *, indexed: Blocks = ()) -> list[Layer]:
    """Multi-head latent attention, with the sparse indexer (DSA) on `indexed` blocks.

    The low-rank projections are replicated; kv_b is absorbed into attention at decode and stays bf16 (`ALWAYS_BF16`).
    """
    h, n = c.whole("hidden_size"), c.whole("num_attention_heads")
    nope, rope, v = c.whole("qk_nope_head_dim"), c.whole("qk_rope_head_dim", least=0), c.whole("v_head_dim")
    q_rank, kv_rank = c.whole("q_lora_rank", default=None if indexed else 0), c.whole("kv_lora_rank")
    at = "self_attn."
    kv_a = Dim(kv_rank + rope, module=f"{at}kv_a_proj_with_mqa")
    if q_rank:
        layers: list[Layer] = [
            Linear(f"{at}fused_qkv_a_proj_with_mqa", (Dim(q_rank, module=f"{at}q_a_proj"), kv_a), Dim(h), blocks),
            Linear(f"{at}q_b_proj", (heads(n, nope + rope, f"{at}q_b_proj"),), Dim(q_rank), blocks),
        ]
    else:
        layers = [
            Linear(f"{at}q_proj", (heads(n, nope + rope, f"{at}q_proj"),), Dim(h), blocks),
            Linear(f"{at}kv_a_proj_with_mqa", (kv_a,), Dim(h), blocks),
        ]
    if indexed:
        ih, d = c.whole("index_n_heads"), c.whole("index_head_dim")
        layers += [
            replicated(f"{at}indexer.wq_b", ih * d, q_rank, indexed),
            replicated(f"{at}indexer.wk", d, h, indexed),
            replicated(f"{at}indexer.weights_proj", ih, h, indexed, bf16=True),
        ]
    return [
        *layers,
        Linear(f"{at}kv_b_proj", (heads(n, nope + v, f"{at}kv_b_proj"),), Dim(kv_rank), blocks),
        row_parallel(f"{at}o_proj", h, heads(n, v), blocks),
    ]


def gated_delta_net(c: Config, blocks: Blocks, qkvz: Sequence[str], ba: Sequence[str]) -> list[Layer]:
    """Linear attention of Qwen3-Next and Qwen3.5: fused q, k, v, z; fused b, a; out.

    Args:
        c: the config.
        blocks: decoder blocks that have it.
        qkvz: checkpoint modules of q, k, v and z below `linear_attn`; ba: those of b and a.
    """
    h, at = c.whole("hidden_size"), "linear_attn."
    nk, dk = c.whole("linear_num_key_heads"), c.whole("linear_key_head_dim")
    nv, dv = c.whole("linear_num_value_heads"), c.whole("linear_value_head_dim")
    sizes = ((nk, dk), (nk, dk), (nv, dv), (nv, dv))
    fused = tuple(
        Dim(n, d, Split.EVEN, "linear-attention heads", at + m) for (n, d), m in zip(sizes, qkvz, strict=True)
    )
    gates = tuple(Dim(nv, 1, Split.EVEN, "linear-attention heads", at + m) for m in ba)
    return [
        Linear(f"{at}in_proj_qkvz", fused, Dim(h), blocks),
        Linear(f"{at}in_proj_ba", gates, Dim(h), blocks),
        row_parallel(f"{at}out_proj", h, Dim(nv, dv, Split.EVEN, "linear-attention heads"), blocks),
    ]


def mlp(
    c: Config, name: str, intermediate: int, blocks: Blocks, *, shared_expert: bool = False, activated: bool = False
) -> list[Layer]:
    """Fused gate and up, and down."""
    h, what = c.whole("hidden_size"), "intermediate columns"
    parts = tuple(Dim(intermediate, 1, Split.EVEN, what, f"{name}.{p}_proj") for p in ("gate", "up"))
    layers = (
        Linear(f"{name}.gate_up_proj", parts, Dim(h), blocks, activated=activated),
        row_parallel(f"{name}.down_proj", h, Dim(intermediate, 1, Split.EVEN, what), blocks),
    )
    return [replace(layer, shared_expert=shared_expert) for layer in layers]


PER_EXPERT = ("0.gate_proj", "0.up_proj", "0.down_proj")
MIXTRAL = ("0.w1", "0.w3", "0.w2")
FUSED = ("gate_up_proj", "down_proj")
"""How checkpoints store gate, up and down of the experts, below `experts.`; expert 0 stands for all."""


def experts(
    c: Config,
    blocks: Blocks,
    intermediate: int,
    n: int,
    *,
    at: str = "mlp",
    router: str = "gate",
    stored: tuple[str, ...] = PER_EXPERT,
    shared: int = 0,
    fuse: Fuse = Fuse.ASKED,
) -> list[Layer]:
    """Router and routed experts.

    Args:
        c: the config.
        blocks: decoder blocks that have them.
        intermediate: intermediate size of one expert.
        n: routed experts.
        at: SGLang's module that holds router and experts.
        router: the router's name in it.
        stored: checkpoint modules of gate, up and down.
        shared: shared experts that are as large as routed ones.
        fuse: when SGLang fuses them.
    """
    h, name = c.whole("hidden_size"), f"{at}.experts"
    *gate_up, down = (f"{name}.{module}" for module in stored)
    top_k = c.whole("num_experts_per_tok")
    return [
        replicated(f"{at}.{router}", n, h, blocks, bf16=True),
        Experts(name, h, intermediate, n, top_k, blocks, tuple(gate_up), down, shared, fuse),
    ]


def lm_head(c: Config, default_vocab: int | None = None) -> Linear:
    """The output projection; with tied embeddings the same GEMM on the embedding's weight."""
    rows = Dim(c.whole("vocab_size", default=default_vocab), 1, Split.VOCAB, "tokens", "lm_head")
    return Linear("lm_head", (rows,), Dim(c.whole("hidden_size")), None, bf16=True)


def as_mtp(layers: Sequence[Layer], c: Config, projection: str) -> list[Layer]:
    """Layers of a draft block, plus what joins hidden state and embedding before it: [H, 2H], bf16 in SGLang."""
    h = c.whole("hidden_size")
    blocks = (c.whole("num_hidden_layers"),)
    joined = replicated(projection, h, 2 * h, blocks, bf16=True)
    return [replace(layer, name=f"mtp.{layer.name}", mtp=True) for layer in (joined, *layers)]
