"""Properties of the planner: nothing is lost between ranks, what cannot be divided is explained, recipes are obeyed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant import shapes
from sglang_amd_quant.errors import RecipeError, ShapeError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.layers import VOCAB_PAD, Dim, Experts, Split
from sglang_amd_quant.shapes.planner import share, weight_bytes

both = partial(zip, strict=True)
WORLD = [(tp, ep) for tp in (1, 2, 4, 8) for ep in (1, 2, 4, 8)]


@given(size=st.integers(1, 5000), ranks=st.integers(1, 16), block=st.sampled_from([1, 32, 128]))
def test_share_deals_whole_blocks_and_loses_nothing(size: int, ranks: int, block: int) -> None:
    size *= block
    stored, used = zip(*(share(size, ranks, rank, block) for rank in range(ranks)), strict=True)
    assert sum(used) == size
    assert len(set(stored)) == 1
    assert all(u % block == 0 and u <= stored[0] for u in used)
    assert stored[0] % block == 0
    assert stored[0] - block < size / ranks, "one block less a rank would not do"
    assert list(used) == sorted(used, reverse=True), "the remainder is the last ranks'"


@given(units=st.integers(1, 64), size=st.sampled_from([1, 64, 128]), tp=st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
def test_heads_are_divided_or_replicated_or_refused(units: int, size: int, tp: int) -> None:
    for split in (Split.EVEN, Split.KV, Split.WHOLE):
        dim = Dim(units, size, split, "heads")
        divides, replicates = units % tp == 0, split is Split.KV and tp % units == 0
        if split is Split.WHOLE:
            assert dim.local(tp, "x") == units * size
        elif divides or replicates:
            assert dim.local(tp, "x") == max(1, units // tp) * size
        else:
            with pytest.raises(ShapeError, match=f"x at TP {tp}: {units} heads"):
                dim.local(tp, "x")


@given(vocab=st.integers(1, 300_000), tp=st.sampled_from([1, 2, 3, 4, 6, 8, 64, 128]))
def test_vocabulary_is_padded_as_sglang_does(vocab: int, tp: int) -> None:
    local = Dim(vocab, 1, Split.VOCAB).local(tp, "lm_head")
    assert 0 <= local * tp - vocab < VOCAB_PAD * tp
    assert local * tp % VOCAB_PAD == 0


def possible(facts: ModelFacts, tp: int, ep: int) -> bool:
    """Whether a shipped card can be divided so."""
    routed = any(isinstance(x, Experts) for x in facts.layers)
    return tp % ep == 0 and (ep == 1 or routed) and (facts.name, tp) != ("gemma-3-270m", 8)


@settings(max_examples=150)
@given(
    card=st.sampled_from(list(shapes.cards())),
    world=st.sampled_from(WORLD),
    scheme=st.sampled_from(["bf16", *SCHEMES]),
    fuse=st.sampled_from([None, False]),
    mtp=st.booleans(),
)
def test_ranks_together_hold_the_model(
    card: str, world: tuple[int, int], scheme: str, fuse: bool | None, mtp: bool
) -> None:
    facts, (tp, ep) = shapes.load(card), world
    if not possible(facts, tp, ep):
        return
    ranks = [shapes.plan(facts, tp, ep, scheme, fuse_shared=fuse, rank=r, mtp=mtp) for r in range(tp)]
    one = {(g.layer, g.blocks): g for g in shapes.plan(facts, 1, 1, scheme, fuse_shared=fuse, mtp=mtp)}
    for kinds in both(*ranks):
        g = kinds[0]
        assert len({replace(k, N_used=g.N_used, K_used=g.K_used) for k in kinds}) == 1, "storage is the same"
        unsharded = one.get((g.layer, g.blocks))
        if unsharded is None or g.shared != unsharded.shared:  # M3 fuses without EP only
            continue
        assert g.count == unsharded.count
        assert g.bytes == weight_bytes(g.scheme, g.E_local, g.N, g.K, block=g.block)
        if g.op != "linear":
            assert (g.E_local - g.shared) * ep == g.E_total - g.shared
            used = sum((k.E_local - k.shared) * k.N_used * k.K_used for k in kinds)
            assert used == (unsharded.E_local - g.shared) * unsharded.N * unsharded.K
        elif g.layer != "lm_head":  # a vocabulary is padded
            copies = [
                tp * local * g.K / (rows * unsharded.K) for (_, local), (_, rows) in both(g.parts, unsharded.parts)
            ]
            assert all(n in (1, 2, 4, 8) for n in copies), "each part is divided, or held by several ranks"


@pytest.mark.parametrize(
    ("card", "world", "groups"),
    [
        ("gpt-oss-120b", (1, 1), {"moe_gate_up": 64, "moe_down": 64}),
        ("gpt-oss-120b", (8, 1), {"moe_gate_up": 64, "moe_down": 64}),  # 384 columns a rank in groups of 32 as of 64
        ("Qwen3-30B-A3B", (2, 1), {"linear": 128, "moe_gate_up": 128, "moe_down": 128}),
        ("Qwen3-30B-A3B", (4, 1), {"linear": 128, "moe_gate_up": 64, "moe_down": 64}),  # 192, and not 256, columns
        ("Qwen3-30B-A3B", (4, 4), {"linear": 128, "moe_gate_up": 128, "moe_down": 128}),  # whole experts
    ],
)
def test_int4_gets_the_group_that_k_allows(card: str, world: tuple[int, int], groups: dict[str, int]) -> None:
    gemms = [g for g in shapes.plan(shapes.load(card), *world, "int4_w4a16") if g.scheme != "bf16"]
    assert {g.op: g.block for g in gemms if g.op in groups} == groups
    explicit = Recipe.uniform("int4_w4a16", group=32)
    assert {g.block for g in shapes.plan(shapes.load(card), *world, explicit) if g.scheme != "bf16"} == {32}


def test_an_int4_group_that_was_asked_for_is_not_changed() -> None:
    with pytest.raises(ShapeError, match=r"K is not whole 128-blocks, as int4_w4a16 needs; .* or group"):
        shapes.plan(shapes.load("gpt-oss-120b"), 1, 1, Recipe.uniform("int4_w4a16", group=128))


@pytest.mark.parametrize("card", shapes.cards())
def test_every_card_plans_or_is_explained(card: str) -> None:
    facts = shapes.load(card)
    for tp, ep in WORLD:
        for scheme in ("bf16", *SCHEMES):
            if possible(facts, tp, ep):
                gemms = shapes.plan(facts, tp, ep, scheme)
                assert all(g.N > 0 and g.K > 0 and g.bytes > 0 and g.count > 0 for g in gemms)
                names = [(g.layer, g.blocks) for g in gemms]
                assert len(set(names)) == len(names)
            else:
                with pytest.raises(ShapeError, match=f"^{card}[: ].*; "):
                    shapes.plan(facts, tp, ep, scheme)


@pytest.mark.parametrize(
    ("tp", "ep", "rank", "message"),
    [
        (4, 8, 0, "TP 4, EP 8: EP groups are made of the TP ranks"),
        (3, 1, 0, "64 attention heads do not divide by it"),
        (1, 1, 1, "rank 1: no such rank"),
        (0, 1, 0, "no such rank"),
        (16, 16, 0, None),
        (256, 256, 0, "128 experts do not divide by it"),
    ],
)
def test_impossible_parallelism_is_one_line(tp: int, ep: int, rank: int, message: str | None) -> None:
    facts = shapes.load("gpt-oss-120b")
    if message is None:
        assert shapes.plan(facts, tp, ep, "w4a8", rank=rank)
        return
    with pytest.raises(ShapeError) as caught:
        shapes.plan(facts, tp, ep, "w4a8", rank=rank)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def tiny(**changes: object) -> ModelFacts:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 96, "num_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 512,
    }  # fmt: skip
    return ModelFacts.from_config({**config, **changes}, "tiny")


def test_columns_that_fusedmoe_refuses_are_refused_here() -> None:
    with pytest.raises(ShapeError, match="96 columns do not divide by 64"):
        shapes.plan(tiny(num_attention_heads=64, moe_intermediate_size=96), 64, 1, "w4a8")


def test_half_a_block_along_k_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"tiny: self_attn.o_proj \[256, 16\] at TP 16: K is not whole 32-blocks"):
        shapes.plan(tiny(num_attention_heads=16, head_dim=16, moe_intermediate_size=512), 16, 1, "mxfp8")
    with pytest.raises(ShapeError, match=r"mlp.experts \[256, 80\]"):
        shapes.plan(tiny(moe_intermediate_size=80), 1, 1, "mxfp8")
    assert shapes.plan(tiny(moe_intermediate_size=80), 1, 1, "bf16")


def test_more_ranks_than_blocks_leaves_the_last_ones_padding() -> None:
    """As the runtime stores it: 3 blocks over 4 ranks are one each, and none on the last."""
    down = [g for r in range(4) for g in shapes.plan(tiny(), 4, 1, "w4a8", rank=r) if g.op == "moe_down"]
    assert [(g.K, g.K_used) for g in down] == [(32, 32), (32, 32), (32, 32), (32, 0)]
    assert "last rank uses none of 32" in shapes.limits(down[0], down[3])


def test_a_recipe_splits_blocks_by_scheme() -> None:
    rules = {"*.experts.*": "w4a8", "model.layers.0.*": "bf16", "re:.*[.][23][.].*[.]o_proj": "mxfp4"}
    gemms = shapes.plan(tiny(), 2, 1, Recipe.from_dict({"default": "mxfp8", "rules": rules}))
    found = {(g.layer, g.scheme): g.blocks for g in gemms}
    assert found == {
        ("self_attn.qkv_proj", "bf16"): (0,),
        ("self_attn.qkv_proj", "mxfp8"): (1, 2, 3),
        ("self_attn.o_proj", "bf16"): (0,),
        ("self_attn.o_proj", "mxfp8"): (1,),
        ("self_attn.o_proj", "mxfp4"): (2, 3),
        ("mlp.gate", "bf16"): (0, 1, 2, 3),
        ("mlp.experts.gate_up_proj", "w4a8"): (0, 1, 2, 3),
        ("mlp.experts.down_proj", "w4a8"): (0, 1, 2, 3),
        ("lm_head", "bf16"): (),
    }
    with pytest.raises(RecipeError, match="run as one fused layer"):
        shapes.plan(tiny(), 2, 1, Recipe.from_dict({"default": "mxfp8", "rules": {"*.q_proj": "bf16"}}))


def test_shared_experts_fuse_where_sglang_does_and_schemes_agree() -> None:
    def fused(card: str, ep: int, scheme: str | Recipe, asked: bool | None = None) -> int:
        return max(g.shared for g in shapes.plan(shapes.load(card), 8, ep, scheme, fuse_shared=asked))

    experts_only = Recipe.from_dict({"default": "mxfp8", "rules": {"*.experts.*": "w4a8"}})
    assert [fused("DeepSeek-V3", ep, "mxfp8") for ep in (1, 2)] == [1, 1]
    assert [fused("GLM-4.7", ep, "mxfp8") for ep in (1, 2)] == [1, 1]
    assert [fused("MiniMax-M3", ep, "mxfp8") for ep in (1, 2)] == [1, 0]
    assert [fused(card, 1, "mxfp8") for card in ("Kimi-K2", "DeepSeek-V4-Pro", "Qwen3-Next-80B-A3B")] == [0, 0, 0]
    assert fused("Kimi-K2", 2, "mxfp8", True) == 1
    assert fused("DeepSeek-V3", 1, experts_only) == 0
    with pytest.raises(RecipeError, match="mlp.experts and its shared experts: get different schemes"):
        fused("DeepSeek-V3", 1, experts_only, True)
    with pytest.raises(ShapeError, match="no shared experts to fuse"):
        fused("gpt-oss-120b", 1, "mxfp8", True)
    beside = [g.layer for g in shapes.plan(shapes.load("DeepSeek-V3"), 8, 1, "mxfp8", fuse_shared=False)]
    assert "mlp.shared_experts.down_proj" in beside


def test_packages_start_without_torch() -> None:
    code = "import sys, sglang_amd_quant.shapes, sglang_amd_quant.cli.shapes; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "sglang", "transformers"} & set(loaded)
