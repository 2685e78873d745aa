"""Fused MoE of SGLang in every scheme: loading per expert and fused, TP and EP, activations, combine variants."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from sglang_amd_quant.errors import CheckpointError, ShapeError, UnsupportedError
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, fake_quantize_mx, quantize_int4, quantize_mx
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, SCHEMES
from sglang_amd_quant.tensor import quantized

E, TOP_K, H, INTER, M = 8, 2, 64, 96, 7
GROUP = 32


def recipe(scheme):
    """All layers in a scheme, int4 in the smallest group."""
    return Recipe(default=scheme.name, group=GROUP)


def build(config, **options):
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    defaults = {
        "num_experts": E,
        "hidden_size": H,
        "intermediate_size": INTER,
        "layer_id": 0,
        "top_k": TOP_K,
        "params_dtype": torch.bfloat16,
        "quant_config": config,
        "prefix": "model.layers.0.mlp.experts",
    }
    return FusedMoE(**(defaults | options))


def weights(gated=True, intermediate=INTER):
    torch.manual_seed(1)
    names = ("w1", "w3", "w2") if gated else ("w1", "w2")
    shape = {"w1": (intermediate, H), "w3": (intermediate, H), "w2": (H, intermediate)}
    return [{name: torch.randn(shape[name]) / 8 for name in names} for _ in range(E)]


def fill(layer, experts):
    for expert, tensors in enumerate(experts):
        for shard, tensor in tensors.items():
            param = layer.w2_weight if shard == "w2" else layer.w13_weight
            param.weight_loader(param, tensor, f"experts.{'w2' if shard == 'w2' else 'w13'}_weight", shard, expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def run(layer, x, ids, probs):
    topk = SimpleNamespace(topk_ids=ids, topk_weights=probs)
    dispatched = SimpleNamespace(hidden_states=x, topk_output=topk)
    return layer.quant_method.apply(layer, dispatched).hidden_states


def inputs(top_k=TOP_K, dtype=torch.float32):
    torch.manual_seed(2)
    ids = torch.stack([torch.randperm(E)[:top_k] for _ in range(M)]).int()
    return torch.randn(M, H, dtype=dtype), ids, torch.rand(M, top_k)


def silu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def swigluoai(gate, up, alpha=1.702, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


def oracle(x, ids, probs, experts, scheme, act=silu, biases=None, on_input=False, keep=None):
    """Token by token, expert by expert, in fp64 from the quantized operands. keep: the slots to compute."""
    if scheme.weight == "int4":
        deq = lambda w: dequantize_int4(*quantize_int4(w, GROUP)).double()
    else:
        deq = lambda w: dequantize_mx(
            *quantize_mx(w, scheme.weight, DEFAULT_SCALE_MODE[scheme.weight]), scheme.weight
        ).double()
    quant = lambda v: (
        v if scheme.act == "bf16" else fake_quantize_mx(v, scheme.act, DEFAULT_SCALE_MODE[scheme.act])
    ).double()
    out = torch.zeros(*ids.shape, H, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(len(ids)), torch.arange(ids.shape[1])).tolist():
        e = int(ids[token, slot])
        if e < 0 or (keep is not None and not keep(e)):
            continue
        row = x[token] * probs[token, slot] if on_input else x[token]
        gate = deq(experts[e]["w1"]) @ quant(row)
        up = deq(experts[e]["w3"]) @ quant(row) if "w3" in experts[e] else None
        if biases:
            gate, up = gate + biases[e]["gate"].double(), up + biases[e]["up"].double()
        hidden = (gate.clamp(min=0) ** 2 if up is None else act(gate, up)).to(x.dtype)
        value = deq(experts[e]["w2"]) @ quant(hidden)
        if biases:
            value = value + biases[e]["w2"].double()
        out[token, slot] = value if on_input else value * probs[token, slot].double()
    return out


def close(got, want, scheme):
    """fp32 sums of <= 96 products: K * 2^-24 < 2^-17 of the magnitudes. Where activations are quantized again after
    the first GEMM, that error can move a value across a rounding boundary, by one step of the format on one of I
    terms: 2^-1 (e2m1) or 2^-3 (e4m3) of a term whose share of the output is about 1/sqrt(I)."""
    step = {"bf16": 0.0, "e4m3": 2**-3, "e2m1": 2**-1}[scheme.act] / math.sqrt(INTER)
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= want.abs().max() * (2**-15 + step)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_every_scheme(make_config, rank, scheme):
    with rank():
        layer = fill(build(make_config(recipe(scheme))), weights())
    x, ids, probs = inputs()
    close(run(layer, x, ids, probs), oracle(x, ids, probs, weights(), scheme).sum(1), scheme)


@pytest.mark.parametrize(("tp", "ep"), [(1, 2), (1, 4), (3, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("scheme", [SCHEMES["w4a16"], SCHEMES["int4_w4a16"]], ids=lambda s: s.name)
def test_ranks_sum_to_the_whole(make_config, rank, scheme, tp, ep):
    """96 columns are 3 blocks: TP2 holds 64 + 32, TP4 holds 32 three times and one rank of padding only."""
    x, ids, probs = inputs()
    total = torch.zeros(M, H)
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            with rank(tp=(tp_rank, tp), ep=(ep_rank, ep)):
                layer = fill(build(make_config(recipe(scheme))), weights())
            local = E // ep
            mine = torch.where(ids // local == ep_rank, ids % local, -1)
            assert layer.num_local_experts == local
            total += run(layer, x, mine, probs)
    close(total, oracle(x, ids, probs, weights(), scheme).sum(1), scheme)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("scheme", [SCHEMES["w4a16"], SCHEMES["int4_w4a16"]], ids=lambda s: s.name)
def test_fused_checkpoint_with_biases_and_swigluoai(make_config, rank, scheme, tp, ep, interleaved):
    """gpt-oss: experts in one tensor, gate and up interleaved or halved, biases, clamp."""
    experts = weights()
    biases = [{"gate": torch.randn(INTER), "up": torch.randn(INTER), "w2": torch.randn(H)} for _ in range(E)]
    join = (lambda g, u: torch.stack([g, u], 1).flatten(0, 1)) if interleaved else (lambda g, u: torch.cat([g, u]))
    w13 = torch.stack([join(w["w1"], w["w3"]) for w in experts])
    b13 = torch.stack([join(b["gate"], b["up"]) for b in biases])
    x, ids, probs = inputs()
    total = torch.zeros(M, H)
    for index, ep_rank in product(range(tp), range(ep)):
        with rank(tp=(index, tp), ep=(ep_rank, ep)):
            layer = build(
                make_config(recipe(scheme)), with_bias=True, use_weight_loader_fused=True, gemm1_alpha=1.702,
                gemm1_clamp_limit=7.0, gate_up_interleaved=interleaved,
            )  # fmt: skip
        down_bias = torch.stack([b["w2"] for b in biases])
        for name, tensor, shard in (
            ("w13_weight", w13, "w13"),
            ("w13_weight_bias", b13, "w13"),
            ("w2_weight", torch.stack([w["w2"] for w in experts]), "w2"),
            ("w2_weight_bias", down_bias if index == 0 else torch.zeros_like(down_bias), "w2"),
        ):
            param = getattr(layer, name)
            param.weight_loader(param, tensor, f"experts.{name}", shard_id=shard)
        layer.quant_method.process_weights_after_loading(layer)
        local = E // ep
        total += run(layer, x, torch.where(ids // local == ep_rank, ids % local, -1), probs)
    close(total, oracle(x, ids, probs, experts, scheme, swigluoai, biases).sum(1), scheme)


def test_gelu(make_config, rank):
    with rank():
        layer = fill(build(make_config("w4a16"), activation="gelu"), weights())
    x, ids, probs = inputs()
    gelu = lambda gate, up: gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up
    close(run(layer, x, ids, probs), oracle(x, ids, probs, weights(), SCHEMES["w4a16"], gelu).sum(1), SCHEMES["w4a16"])


def test_without_gate(make_config, rank):
    with rank():
        layer = fill(build(make_config("w4a16"), activation="relu2", is_gated=False), weights(gated=False))
    x, ids, probs = inputs()
    want = oracle(x, ids, probs, weights(gated=False), SCHEMES["w4a16"]).sum(1)
    close(run(layer, x, ids, probs), want, SCHEMES["w4a16"])


def test_routed_scaling_factor(make_config, rank):
    with rank():
        layer = fill(build(make_config("w4a16"), routed_scaling_factor=2.5), weights())
    x, ids, probs = inputs()
    close(run(layer, x, ids, probs), 2.5 * oracle(x, ids, probs, weights(), SCHEMES["w4a16"]).sum(1), SCHEMES["w4a16"])


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_router_weight_on_input(make_config, rank, scheme):
    with rank():
        layer = fill(build(make_config(scheme), top_k=1, apply_router_weight_on_input=True), weights())
    x, ids, probs = inputs(top_k=1)
    want = oracle(x, ids, probs, weights(), SCHEMES[scheme], on_input=True).sum(1)
    close(run(layer, x, ids, probs), want, SCHEMES[scheme])


def test_router_weight_on_input_needs_top_1(make_config, rank):
    with rank(), pytest.raises(UnsupportedError, match="top_k=2"):
        build(make_config("w4a16"), apply_router_weight_on_input=True)


def test_no_combine_keeps_slots_apart(make_config, rank):
    with rank():
        layer = fill(build(make_config("w4a16"), no_combine=True, inplace=False), weights())
    x, ids, probs = inputs()
    ones = torch.ones_like(probs)
    close(run(layer, x, ids, probs), oracle(x, ids, ones, weights(), SCHEMES["w4a16"]), SCHEMES["w4a16"])


def test_fused_shared_expert(make_config, rank):
    """The shared expert is expert E, picked by every token in an extra slot."""
    with rank():
        layer = build(make_config("w4a16"), num_experts=E, num_fused_shared_experts=1, top_k=TOP_K)
    assert layer.num_local_experts == E
    experts = weights()
    fill(layer, experts)
    x, ids, probs = inputs()
    ids = torch.cat([ids % (E - 1), torch.full((M, 1), E - 1, dtype=torch.int32)], 1)
    probs = torch.cat([probs, torch.ones(M, 1)], 1)
    close(run(layer, x, ids, probs), oracle(x, ids, probs, experts, SCHEMES["w4a16"]).sum(1), SCHEMES["w4a16"])


@pytest.mark.parametrize("ids", [torch.full((M, TOP_K), -1), torch.zeros(0, TOP_K)], ids=["all dropped", "no tokens"])
def test_nothing_to_do(make_config, rank, ids):
    with rank():
        layer = fill(build(make_config("mxfp4")), weights())
    out = run(layer, torch.randn(len(ids), H), ids.int(), torch.rand(len(ids), TOP_K))
    assert out.shape == (len(ids), H)
    assert not out.any()


def test_unknown_activation(make_config, rank):
    with rank(), pytest.raises(UnsupportedError, match="situ.*recipe"):
        build(make_config("w4a16"), activation="situ")


@pytest.mark.parametrize(
    ("scheme", "size", "message"),
    [
        ("w4a16", 80, "intermediate size K=80"),
        ("int4_w4a16", 80, "intermediate size K=80"),
        (Recipe.uniform("int4_w4a16", group=128), 128, "hidden size K=64: not a multiple of 128"),
    ],
)
def test_sizes_must_be_whole_blocks(make_config, rank, scheme, size, message):
    with rank(), pytest.raises(ShapeError, match=rf"layers\.0\.mlp\.experts: {message}"):
        build(make_config(scheme), intermediate_size=size)


@pytest.mark.parametrize(
    ("hidden", "size", "ranks", "group", "stored"),
    [
        (256, 768, 1, 128, 768),
        (256, 768, 4, 64, 192),  # groups of 128 would be 256 columns a rank
        (64, 768, 1, 64, 768),
        (2880, 2880, 4, 64, 768),  # as are 736 in groups of 32, whose scales take more
    ],
)
def test_int4_gets_the_group_of_the_fewest_bytes(make_config, rank, hidden, size, ranks, group, stored):
    with rank(tp=(0, ranks)):
        layer = build(make_config("int4_w4a16"), hidden_size=hidden, intermediate_size=size)
    assert layer.w2_weight.shape == (E, hidden, stored // 2)
    assert layer.w2_weight_scale.shape == (E, hidden, stored // group)
    assert layer.w13_weight_scale.shape == (E, 2 * stored, hidden // group)


def test_wrong_shape_names_the_layer(make_config, rank):
    with rank():
        layer = build(make_config("w4a16"))
    with pytest.raises(ShapeError, match=r"mlp\.experts: w1 \(64, 64\).*N=96, K=64"):
        fill(layer, [{"w1": torch.zeros(64, 64)}])


def test_what_sglang_widens_on_a_cpu_names_tp(make_config, rank):
    """160 columns do not make two multiples of 32, so at --tp 2 SGLang has 192 built."""
    with rank(tp=(0, 2)):
        layer = build(make_config("w4a16"), intermediate_size=192)
        with pytest.raises(ShapeError, match=r"w1 \(160, 64\).*N=192, K=64; lower --tp 2: on a CPU SGLang widens"):
            fill(layer, [{"w1": torch.zeros(160, H)}])


def test_missing_expert(make_config, rank):
    with rank():
        layer = build(make_config("w4a16"))
    with pytest.raises(CheckpointError, match="never loaded"):
        fill(layer, weights()[:-1])


@pytest.mark.parametrize("scheme", [SCHEMES["mxfp8"], SCHEMES["int4_w4a16"]], ids=lambda s: s.name)
def test_stored_and_online_weights_are_the_same_bits(make_config, rank, scheme):
    with rank(tp=(1, 2)):
        layer = build(make_config(recipe(scheme)))
        reference = fill(build(make_config(recipe(scheme))), weights())
    for expert, tensors in enumerate(weights()):
        for shard, tensor in tensors.items():
            which = "w2" if shard == "w2" else "w13"
            made = quantized(tensor, replace(scheme, block=GROUP), DEFAULT_SCALE_MODE.get(scheme.weight))
            parts = zip(("weight", "weight_scale"), made, strict=True)
            for part, value in parts:
                param = getattr(layer, f"{which}_{part}")
                param.weight_loader(param, value, f"experts.{which}_{part}", shard, expert)
    for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
        got, want = getattr(layer, name), getattr(reference, name)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_on_a_gpu_the_layer_calls_its_kernels(make_config, rank, as_gpu, scheme, dtype):
    with rank():
        layer = fill(build(make_config(recipe(scheme)), params_dtype=dtype), weights())
    assert layer.amd_mx.values is None
    x, ids, probs = inputs(dtype=dtype)
    ids[0] = -1
    got = run(layer, x, ids, probs)
    assert as_gpu.calls == ["gfx950", "gfx950"]
    want = oracle(x, ids, probs, weights(), scheme).sum(1)
    # besides the quantization step: the result is rounded, to bf16 by 2^-8 of its value, to fp16 by 2^-11; and next to
    # the middle of two such numbers, which are a step apart, hidden values may go the other way, one in I
    step = {"bf16": 0.0, "e4m3": 2**-3, "e2m1": 2**-1}[scheme.act] / math.sqrt(INTER)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11 * (1 + 2 / math.sqrt(INTER))
    assert (got.double() - want).abs().max() <= want.abs().max() * (rounding + step)


@pytest.mark.parametrize(("scheme", "name"), [("w4a8", "cdna4_scale"), ("int4_w4a16", "cdna_int4+tile_group")])
def test_packed_experts_are_restored_for_new_ones(make_config, rank, as_gpu, monkeypatch, scheme, name):
    from sglang_amd_quant.ops import layout
    from sglang_amd_quant.selection import LayoutChoice

    monkeypatch.setattr(layout, "choose_layout", lambda *_: LayoutChoice(name, "rule", ("test",)))
    monkeypatch.setattr(layout, "_paired", lambda *_: True)
    config = recipe(SCHEMES[scheme])
    with rank():
        layer, plain = build(make_config(config)), build(make_config(config))
    fill(layer, weights())
    assert (layer.amd_mx.w13.layout.name, layer.amd_mx.w2.layout.name) == (name, name)
    assert layer.w13_weight_scale.shape != plain.w13_weight_scale.shape
    x, ids, probs = inputs(dtype=torch.bfloat16)
    first = run(layer, x, ids, probs)
    assert as_gpu.calls == ([] if scheme == "w4a8" else ["gfx950"] * 2)  # what no kernel here reads the reference does
    layer.quant_method.restore_weights_before_loading(layer)
    assert torch.equal(run(fill(layer, weights()), x, ids, probs), first)


def moe_block(name):
    """An MoE block whose class SGLang would have in the module of this name, with a grouped top-k."""
    from sglang.srt.layers.moe.topk import TopK

    block = type("Block", (torch.nn.Module,), {"__module__": f"sglang.srt.models.{name}"})()
    bias = torch.nn.Parameter(torch.zeros(E))
    grouped = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, "correction_bias": bias}
    block.topk = TopK(TOP_K, layer_id=0, **grouped)
    return block


@pytest.mark.parametrize(
    ("device", "outside"),
    [
        ("cuda", {"deepseek_v2": False, "glm4_moe": False, "bailing_moe": False}),
        ("aiter", {"deepseek_v2": True, "glm4_moe": True, "bailing_moe": True}),
        ("cpu", {"deepseek_v2": True, "glm4_moe": True, "bailing_moe": False}),
    ],
)
def test_who_scales_the_routed_experts(make_config, rank, monkeypatch, device, outside):
    """Once, on every platform: by the model, by top-k, or by the experts."""
    from sglang.srt import utils
    from sglang.srt.layers.moe import topk

    from sglang_amd_quant.integration.built import look_over

    monkeypatch.setattr(utils, "is_cuda", lambda: device == "cuda")
    monkeypatch.setattr(topk, "_use_aiter", device == "aiter")
    for name, scaled in outside.items():
        config = make_config("w4a16")
        with rank():
            block = moe_block(name)
            block.experts = build(config, routed_scaling_factor=2.5)
        look_over(torch.nn.ModuleList([block]), config)
        assert fill(block.experts, weights()).amd_mx.problem.scale == (1.0 if scaled else 2.5), name
