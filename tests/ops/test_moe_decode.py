"""The fused-MoE op on AMD's grouped decode kernels: their machine code in the emulator, Triton's GEMM as its twin."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from op_layers import MX, as_served_on_a_cpu, make_moe, tokens
from sglang_amd_quant.kernels.triton.hopper_pack import row_order
from test_moe import GPT_OSS, close

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.moe import bound
from sglang_amd_quant.selection.arch import canonical
from sglang_amd_quant.selection.shipped_kernels import AMD_MOE_DECODE_LAYOUTS
from sglang_amd_quant.selection.specs import kernel

E, H, INTER, TOP_K = 6, 160, 96, 2  # 160: the last tile of K is not whole
HALVES = Activation("swigluoai", limit=2.0, alpha=1.5)


def reads(arch: str, scheme: str) -> bool:
    """Whether what the arch's decode kernels read of the scheme's weights `triton_moe` reads too."""
    weight = "e4m3" if scheme == "mxfp8" else "e2m1"
    return AMD_MOE_DECODE_LAYOUTS[canonical(arch), weight] in kernel("triton_moe").layouts


def launched(device) -> list[str]:
    """What ran since it was last asked."""
    found, device.launched[:] = list(device.launched), []
    return found


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, HALVES], ids=["silu", "gpt-oss", "halves"])
def test_both_gemms_one_or_none(served, emulated, moe_twins, scheme, activation):
    """4 routed rows: both by the decode kernel; 14: gate_up alone; 40: neither, on the same copy of the weights."""
    biases = activation is not HALVES
    plain = make_moe(scheme, E, H, INTER, TOP_K, emulated.arch_name, activation, biases=biases, scale=1.5)
    if biases:
        plain = replace(plain, b13=plain.b13.bfloat16(), b2=plain.b2.bfloat16())
    layer = served(plain)
    if not reads(emulated.arch_name, scheme):
        assert layer.w13.layout.name == layer.w2.layout.name == "strided"
        return
    layer.prepare()
    for m, expected, by_triton in ((2, [4, 4], 0), (7, [16], 1), (20, [], 2)):
        given = tokens(m, H, E, TOP_K, dropped=0.2)
        out = layer(*given)
        close(out, as_served_on_a_cpu(plain)(*given), scheme)
        assert launched(emulated) == [f"moe_decode_{scheme}_m{rows}" for rows in expected]
        assert len(moe_twins) == by_triton
        assert all(call["layout"][1] == "tile_scale" for call in moe_twins)
        moe_twins.clear()


@pytest.mark.parametrize(
    "options",
    [{"static": True}, {"combine": False}, {"combine": False, "weight_output": False}, {"weight_on_input": True}],
    ids="-".join,
)
def test_what_sglang_asks(served, emulated, options):
    top_k = 1 if "weight_on_input" in options else TOP_K
    plain = make_moe("w4a8", E, H, INTER, top_k, emulated.arch_name, **options)
    layer, given = served(plain), tokens(3, H, E, top_k, dropped=0.25)
    close(layer(*given), as_served_on_a_cpu(plain)(*given), "w4a8", "static" in options)
    assert launched(emulated) == [f"moe_decode_w4a8{'_static' if 'static' in options else ''}_m4"] * 2


def test_random_layers(served, emulated):
    """Any sizes, experts and top_k that both GEMMs' rules hold for, some ids dropped; every other one interleaved."""
    rng = random.Random(emulated.arch_name)
    for seed in range(8):
        scheme = rng.choice([s for s in MX if reads(emulated.arch_name, s)])
        experts, hidden, inter = rng.randint(1, 9), 32 * rng.randint(1, 9), rng.choice((96, 128, 160))
        top_k = rng.randint(1, min(experts, 8))
        m, activation = rng.randint(1, 8 // top_k), Activation(interleaved=bool(seed % 2))
        plain = make_moe(scheme, experts, hidden, inter, top_k, emulated.arch_name, activation, scale=rng.random())
        layer, given = served(plain), tokens(m, hidden, experts, top_k, dropped=rng.choice((0, 0.3)))
        close(layer(*given), as_served_on_a_cpu(plain)(*given), scheme)
        assert launched(emulated) == [f"moe_decode_{scheme}_m4"] * 2


def test_the_sum_over_slots_does_not_depend_on_grouping(served, emulated):
    """Same input, same bits, whatever else is in the batch; and nothing routed here gives zeros."""
    layer = served(make_moe("w4a16", E, H, INTER, TOP_K, emulated.arch_name))
    x, ids, weights = tokens(4, H, E, TOP_K)
    together = layer(x, ids, weights)
    assert torch.equal(layer(x, ids, weights), together)
    assert torch.equal(layer(x[1:2], ids[1:2], weights[1:2]), layer(x[1:2], ids[1:2], weights[1:2]))
    assert not layer(x, torch.full_like(ids, -1), weights).any()


def test_an_activation_that_it_has_not_is_tritons(served, emulated, moe_twins):
    """Then down, whose kernel it still is, takes Triton's blocks."""
    plain = make_moe("mxfp4", E, H, INTER, TOP_K, emulated.arch_name, Activation("swigluoai", limit=7.0, beta=0.5))
    layer, given = served(plain), tokens(2, H, E, TOP_K)
    reasons = bound(layer.text).pair(2, torch.bfloat16).gate_up.reasons
    assert any("adds 1.0 to up, not 0.5" in reason for reason in reasons), reasons
    close(layer(*given), as_served_on_a_cpu(plain)(*given), "mxfp4")
    assert launched(emulated) == ["moe_decode_mxfp4_m16"]
    assert len(moe_twins) == 1


def test_a_model_in_fp16_is_tritons_refused_or_laid_out_otherwise(served, emulated, moe_twins):
    """Quantized activations are read by Triton where the weights lie; others only as no kernel here reads them."""
    given = tokens(2, H, E, TOP_K, dtype=torch.float16)
    plain = make_moe("mxfp4", E, H, INTER, TOP_K, emulated.arch_name)
    close(served(plain)(*given), as_served_on_a_cpu(plain)(*given), "mxfp4")
    assert [call["layout"][1] for call in moe_twins] == ["tile_scale"] * 2
    assert launched(emulated) == []
    plain = make_moe("w4a16", E, H, INTER, TOP_K, emulated.arch_name)
    with pytest.raises(UnsupportedError, match="their kernel does not run this call.*fp16"):
        served(plain)(*given)
    gemms = {side: replace(getattr(plain, side), out_dtype="fp16") for side in ("gate_up", "down")}
    assert served(replace(plain, **gemms)).w13.layout.name == "strided"


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_rows_in_pairs(pairs):
    order = row_order(64, pairs)
    assert sorted(order.tolist()) == list(range(64))
    gates = order.view(-1, 2, 8)[:, 0].flatten()
    assert gates.tolist() == (list(range(0, 64, 2)) if pairs == "interleaved" else list(range(32)))
    assert torch.equal(order.view(-1, 2, 8)[:, 1].flatten(), gates + (1 if pairs == "interleaved" else 32))
