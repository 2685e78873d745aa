"""Architectures: from a config.json to the layers SGLang builds for it, unsharded.

Each function reads the keys of its family and composes the pieces below; which projections are fused, replicated or
built without a quantization config follows SGLang 0.5.23's model of the same name (`sglang/srt/models`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_amd_quant.shapes.facts import Config
from sglang_amd_quant.shapes.layers import Dim, Experts, Layer, Linear, Split

Family = Callable[[Config], tuple[str, list[Layer]]]


def _all(c: Config) -> tuple[int, ...]:
    return tuple(range(c.int("num_hidden_layers")))


def attention(c: Config, layers: Sequence[int], *, gate: bool = False, index: Sequence[Dim] = ()) -> list[Layer]:
    """Fused q, k, v (and index) projections, and o. With `gate`, q carries an output gate of its own size."""
    h, heads = c.int("hidden_size"), c.int("num_attention_heads")
    kv = c.int("num_key_value_heads", default=heads)
    d = c.int("head_dim", default=h // heads)
    parts = (
        Dim(heads, d * (2 if gate else 1), Split.EVEN, "attention heads", "self_attn.q_proj"),
        Dim(kv, d, Split.KV, "KV heads", "self_attn.k_proj"),
        Dim(kv, d, Split.KV, "KV heads", "self_attn.v_proj"),
        *index,
    )
    return [
        Linear("self_attn.qkv_proj", parts, Dim(h), tuple(layers)),
        Linear(
            "self_attn.o_proj",
            (Dim(h, module="self_attn.o_proj"),),
            Dim(heads, d, Split.EVEN, "attention heads"),
            tuple(layers),
        ),
    ]


def mlp(c: Config, name: str, intermediate: int, layers: Sequence[int], *, shared: bool = False) -> list[Layer]:
    """Fused gate and up, and down."""
    h = c.int("hidden_size")
    parts = tuple(Dim(intermediate, 1, Split.EVEN, "intermediate elements", f"{name}.{p}_proj") for p in ("gate", "up"))
    down = (Dim(h, module=f"{name}.down_proj"),)
    k = Dim(intermediate, 1, Split.EVEN, "intermediate elements")
    return [
        Linear(f"{name}.gate_up_proj", parts, Dim(h), tuple(layers), shared_expert=shared),
        Linear(f"{name}.down_proj", down, k, tuple(layers), shared_expert=shared),
    ]


def replicated(name: str, n: int, k: int, layers: Sequence[int], *, bf16: bool = False, shared: bool = False) -> Linear:
    """A projection every rank holds whole."""
    return Linear(name, (Dim(n, module=name),), Dim(k), tuple(layers), bf16=bf16, shared_expert=shared)


def lm_head(c: Config) -> Linear:
    rows = Dim(c.int("vocab_size"), 1, Split.WHOLE, "tokens", "lm_head")
    return Linear("lm_head", (rows,), Dim(c.int("hidden_size")), bf16=True, pad_vocab=True)


def dense(c: Config) -> tuple[str, list[Layer]]:
    layers = _all(c)
    return "model.layers.{}.", [*attention(c, layers), *mlp(c, "mlp", c.int("intermediate_size"), layers), lm_head(c)]


def gpt_oss(c: Config) -> tuple[str, list[Layer]]:
    layers, h, e = _all(c), c.int("hidden_size"), c.int("num_local_experts", "num_experts")
    experts = Experts(
        "mlp.experts", h, c.int("intermediate_size"), e, c.int("num_experts_per_tok"), layers,
        ("mlp.experts.gate_up_proj",), "mlp.experts.down_proj",
    )  # fmt: skip
    return "model.layers.{}.", [
        *attention(c, layers),
        replicated("mlp.router", e, h, layers, bf16=True),
        experts,
        lm_head(c),
    ]


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": dense,
    "GptOssForCausalLM": gpt_oss,
}
"""Architecture name in a config.json -> its family."""
