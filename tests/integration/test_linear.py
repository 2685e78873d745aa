"""Linear layers of SGLang in every scheme: what they hold, and what they compute, whole and sharded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_amd_quant.errors import CheckpointError, ShapeError
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, fake_quantize_mx, quantize_int4, quantize_mx
from sglang_amd_quant.ops.linear import bound
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, SCHEMES
from sglang_amd_quant.tensor import quantized

GROUP = 32


def recipe(scheme):
    """All layers in a scheme, int4 in the smallest group."""
    return Recipe(default=scheme.name, group=GROUP)


def stored(weight, scheme):
    """Data and scales as a checkpoint hands them over."""
    return quantized(weight, replace(scheme, block=GROUP), DEFAULT_SCALE_MODE.get(scheme.weight))


def expected(x: torch.Tensor, weight: torch.Tensor, scheme, bias=None) -> torch.Tensor:
    """fp64 product of the quantized operands."""
    if scheme.weight == "int4":
        w = dequantize_int4(*quantize_int4(weight, GROUP)).double()
    else:
        mode = DEFAULT_SCALE_MODE[scheme.weight]
        w = dequantize_mx(*quantize_mx(weight, scheme.weight, mode), scheme.weight).double()
    xq = x if scheme.act == "bf16" else fake_quantize_mx(x, scheme.act, DEFAULT_SCALE_MODE[scheme.act])
    out = xq.double() @ w.T
    return out if bias is None else out + bias.double()


def close(got: torch.Tensor, want: torch.Tensor, k: int, bits: int = 8) -> None:
    """fp32 accumulation of K products errs by at most K * 2^-24 of the sum of magnitudes, then one rounding to bf16,
    of 8 bits, adds 2^-9 of the value, to fp16, of 11, 2^-12; with K <= 256 and operands of similar size both are below
    2^-bits of the largest output."""
    assert torch.isfinite(got).all()
    assert (got.double() - want).abs().max() <= want.abs().max() * 2**-bits


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("bias", [False, True])
def test_column_linear_from_bf16(make_config, rank, scheme, bias):
    from sglang.srt.layers.linear import ColumnParallelLinear

    weight, b = torch.randn(48, 128).bfloat16(), torch.randn(48).bfloat16()
    with rank():
        layer = ColumnParallelLinear(
            128, 48, bias=bias, params_dtype=torch.bfloat16, quant_config=make_config(recipe(scheme)), prefix="a.q_proj"
        )
    layer.weight.weight_loader(layer.weight, weight)
    if bias:
        layer.bias.weight_loader(layer.bias, b)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.dtype.itemsize == 1
    x = torch.randn(5, 128).bfloat16()
    out, _ = layer(x)
    close(out, expected(x, weight, scheme, b if bias else None), 128)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_row_parallel_ranks_sum_to_the_whole(make_config, rank, scheme, ranks):
    from sglang.srt.layers.linear import RowParallelLinear

    weight, x = torch.randn(64, 128).bfloat16(), torch.randn(3, 128).bfloat16()
    total = torch.zeros(3, 64, dtype=torch.float64)
    scales = []
    for index in range(ranks):
        with rank(tp=(index, ranks)):
            layer = RowParallelLinear(
                128, 64, bias=False, params_dtype=torch.bfloat16, reduce_results=False,
                quant_config=make_config(recipe(scheme)), prefix="a.o_proj",
            )  # fmt: skip
            layer.weight.weight_loader(layer.weight, weight)
            layer.quant_method.process_weights_after_loading(layer)
            share = x[:, index * 128 // ranks : (index + 1) * 128 // ranks]
            total += layer.quant_method.apply(layer, share.float()).double()
            scales.append(layer.weight_scale)
    want = expected(x.float(), weight, scheme)
    assert torch.equal(torch.cat(list(scales), 1), stored(weight, scheme)[1])
    close(total, want, 128)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("loads_stored", [False, True], ids=["bf16", "quantized"])
@pytest.mark.parametrize("scheme", [SCHEMES["mxfp4"], SCHEMES["int4_w4a16"]], ids=lambda s: s.name)
def test_qkv_with_replicated_kv_heads(make_config, rank, ranks, scheme, loads_stored):
    """4 query heads, 2 KV heads: at TP4 each KV head lies on two ranks."""
    from sglang.srt.layers.linear import QKVParallelLinear

    weights = {"q": torch.randn(128, 64), "k": torch.randn(64, 64), "v": torch.randn(64, 64)}
    for index in range(ranks):
        with rank(tp=(index, ranks)):
            layer = QKVParallelLinear(
                64,
                32,
                4,
                2,
                bias=False,
                params_dtype=torch.bfloat16,
                quant_config=make_config(recipe(scheme)),
                prefix="a.qkv_proj",
            )
            for shard, weight in weights.items():
                if loads_stored:
                    data, scale = stored(weight, scheme)
                    layer.weight.weight_loader(layer.weight, data, shard)
                    layer.weight_scale.weight_loader(layer.weight_scale, scale, shard)
                else:
                    layer.weight.weight_loader(layer.weight, weight, shard)
            layer.quant_method.process_weights_after_loading(layer)
        heads = 4 // ranks
        kv = (
            slice(index * 64 // ranks, (index + 1) * 64 // ranks)
            if ranks <= 2
            else slice(index // 2 * 32, index // 2 * 32 + 32)
        )
        mine = torch.cat(
            [weights["q"][index * heads * 32 : (index + 1) * heads * 32], weights["k"][kv], weights["v"][kv]]
        )
        x = torch.randn(2, 64)
        close(layer.quant_method.apply(layer, x), expected(x, mine, scheme), 64)


def test_merged_gate_up_loads_each_half(make_config, rank):
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    gate, up = torch.randn(96, 64), torch.randn(96, 64)
    for index in range(2):
        with rank(tp=(index, 2)):
            layer = MergedColumnParallelLinear(
                64,
                [96, 96],
                bias=False,
                params_dtype=torch.bfloat16,
                quant_config=make_config("mxfp8"),
                prefix="a.gate_up_proj",
            )
            layer.weight.weight_loader(layer.weight, gate, 0)
            layer.weight.weight_loader(layer.weight, up, 1)
            layer.quant_method.process_weights_after_loading(layer)
        mine = torch.cat([gate[index * 48 : index * 48 + 48], up[index * 48 : index * 48 + 48]])
        x = torch.randn(2, 64)
        close(layer.quant_method.apply(layer, x), expected(x, mine, SCHEMES["mxfp8"]), 64)


@pytest.mark.parametrize(
    ("scheme", "k", "ranks", "message"),
    [
        ("mxfp4", 96, 4, r"K=96 over 4 ranks = 24: not a multiple of 32 elements a rank, the MX block; lower --tp, or"),
        (
            Recipe.uniform("int4_w4a16", group=128),
            128,
            2,
            r"K=128 over 2 ranks = 64: not a multiple of 128 .*, the int4 group; .* with a smaller group",
        ),
        (Recipe.uniform("int4_w4a16", group=128), 96, 1, r"N=64, K=96: not a multiple of 128"),
        ("int4_w4a16", 96, 2, r"over 2 ranks = 48: not a multiple of 32 .*, the int4 group; lower --tp, or keep"),
    ],
)
def test_k_must_be_whole_blocks_on_every_rank(make_config, rank, scheme, k, ranks, message):
    from sglang.srt.layers.linear import RowParallelLinear

    with rank(tp=(0, ranks)), pytest.raises(ShapeError, match=rf"layer model\.o_proj: .*{message}"):
        RowParallelLinear(k, 64, bias=False, quant_config=make_config(scheme), prefix="model.o_proj")


@pytest.mark.parametrize(("k", "ranks", "group"), [(256, 2, 128), (128, 2, 64), (128, 4, 32), (2880, 1, 64)])
def test_int4_gets_the_largest_group_that_divides_a_ranks_k(make_config, rank, caplog, k, ranks, group):
    from sglang.srt.layers.linear import RowParallelLinear

    config, caplog.handler.level = make_config("int4_w4a16"), 0
    with rank(tp=(0, ranks)), caplog.at_level("INFO"):
        for name in ("a.o_proj", "b.o_proj"):
            layer = RowParallelLinear(k, 64, bias=False, quant_config=config, prefix=name)
    assert layer.weight_scale.shape == (64, k // ranks // group)
    told = [record.getMessage() for record in caplog.records if "int4 in groups" in record.getMessage()]
    text = f"amd_mx: int4 in groups of {group} where a rank's K is no multiple of 128, first in layer a.o_proj"
    assert told == ([] if group == 128 else [text])


class TestBadTensors:
    @pytest.fixture
    def layer(self, make_config, rank):
        from sglang.srt.layers.linear import ColumnParallelLinear

        with rank():
            return ColumnParallelLinear(
                64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=make_config("mxfp4"), prefix="m.up_proj"
            )

    @pytest.mark.parametrize(
        ("tensor", "match"),
        [
            (torch.zeros(32, 96), r"m\.up_proj: weight \(32, 96\).*K is 64"),
            (torch.zeros(32, 16, dtype=torch.uint8), r"weight \(32, 16\).*K is 64"),
            (torch.zeros(64), r"weight \(64,\)"),
        ],
    )
    def test_wrong_k(self, layer, tensor, match):
        with pytest.raises(ShapeError, match=match):
            layer.weight.weight_loader(layer.weight, tensor)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_no_format_holds(self, layer, value):
        weight = torch.randn(32, 64).bfloat16()
        weight[3, 5] = value
        with pytest.raises(CheckpointError, match=r"m\.up_proj: weight \[32, 64\]: holds NaN or Inf"):
            layer.weight.weight_loader(layer.weight, weight)

    def test_wrong_n(self, layer):
        with pytest.raises(CheckpointError, match=r"m\.up_proj: tensor \(16, 64\).*amd-mx inspect"):
            layer.weight.weight_loader(layer.weight, torch.zeros(16, 64))

    def test_never_loaded_int4(self, make_config, rank):
        from sglang.srt.layers.linear import MergedColumnParallelLinear

        config = make_config(recipe(SCHEMES["int4_w4a16"]))
        with rank():
            layer = MergedColumnParallelLinear(
                64, [32, 32], bias=False, params_dtype=torch.float16, quant_config=config, prefix="m.gate_up_proj"
            )
        layer.weight.weight_loader(layer.weight, torch.randn(32, 64), 1)
        with pytest.raises(CheckpointError, match=r"m\.gate_up_proj: 64 of 128 weight scales"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_never_loaded(self, layer):
        with pytest.raises(CheckpointError, match=r"m\.up_proj: 64 of 64 weight scales"):
            layer.quant_method.process_weights_after_loading(layer)

    def test_nan_scale(self, layer):
        data, scales = quantize_mx(torch.randn(32, 64), "e2m1")
        scales[3, 1] = 255
        layer.weight.weight_loader(layer.weight, data)
        layer.weight_scale.weight_loader(layer.weight_scale, scales)
        with pytest.raises(CheckpointError, match="1 of 64 weight scales"):
            layer.quant_method.process_weights_after_loading(layer)

    @pytest.mark.parametrize("code", [0x7F, 0xFF])
    def test_nan_weight(self, make_config, rank, code):
        """Stored e4m3 is looked through as the rank has it: row 21 is row 5 of the second rank."""
        from sglang.srt.layers.linear import ColumnParallelLinear

        with rank(tp=(1, 2)):
            layer = ColumnParallelLinear(
                64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=make_config("mxfp8"), prefix="m.up_proj"
            )
            data, scales = quantize_mx(torch.randn(32, 64), "e4m3")
            data.view(torch.uint8)[21, 9] = code
            layer.weight.weight_loader(layer.weight, data)
            layer.weight_scale.weight_loader(layer.weight_scale, scales)
            message = r"m\.up_proj: this rank's weight \[16, 64\]: holds NaN .*, as at \[5, 9\]; quantize the source"
            with pytest.raises(CheckpointError, match=message):
                layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("scheme", [SCHEMES["w4a16"], SCHEMES["int4_w4a16"]], ids=lambda s: s.name)
def test_reload_replaces_kept_copies(make_config, rank, scheme):
    from sglang.srt.layers.linear import ReplicatedLinear

    with rank():
        layer = ReplicatedLinear(
            64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=make_config(recipe(scheme)), prefix="m.q_proj"
        )
    x = torch.randn(1, 64)
    for weight in (torch.randn(32, 64), torch.randn(32, 64)):
        layer.weight.weight_loader(layer.weight, weight)
        layer.quant_method.process_weights_after_loading(layer)
        close(layer.quant_method.apply(layer, x), expected(x, weight, scheme), 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_the_layer_calls_its_kernel_on_packed_weights(make_config, rank, as_gpu, dtype):
    """No kept copies, weights in the layout that selection picked, kernels loaded; Triton's run as their twins."""
    from sglang.srt.layers.linear import ColumnParallelLinear

    for scheme in SCHEMES.values():
        with rank():
            layer = ColumnParallelLinear(
                128,
                48,
                bias=True,
                params_dtype=dtype,
                quant_config=make_config(recipe(scheme)),
                prefix="a.q_proj",
            )
        weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((48, 128), (48,), (5, 128)))
        layer.weight.weight_loader(layer.weight, weight)
        layer.bias.weight_loader(layer.bias, bias)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.amd_mx.values is None
        assert layer.amd_mx.problem.arch == "gfx950"
        assert layer.amd_mx.weight.data.data_ptr() == layer.weight.data.data_ptr()
        as_gpu.calls.clear()
        close(layer(x)[0], expected(x, weight, scheme, bias), 128, 8 if dtype == torch.bfloat16 else 11)
        assert as_gpu.calls == ["gfx950"]
        assert scheme.weight != "int4" or layer.amd_mx.weight.layout.name == "cdna_int4+tile_group"
        kernel = bound(layer.amd_mx.text).plan(5, dtype).choice.kernel
        assert (kernel == "triton_e2m1_fp16_gemm") == (scheme.name == "w4a16" and dtype == torch.float16)
    assert as_gpu.loaded >= {"gemv_mxfp4_bf16_m1", "gemv_mxfp4_f32_m4"}


@pytest.mark.parametrize(("scheme", "name"), [("w4a8", "cdna4_scale"), ("int4_w4a16", "cdna_int4+tile_group")])
def test_packed_weights_are_restored_for_new_ones(make_config, rank, as_gpu, monkeypatch, scheme, name):
    from sglang.srt.layers.linear import ReplicatedLinear

    from sglang_amd_quant.ops import layout
    from sglang_amd_quant.selection import LayoutChoice

    monkeypatch.setattr(layout, "choose_layout", lambda *_: LayoutChoice(name, "rule", ("test",)))
    config = make_config(recipe(SCHEMES[scheme]))
    with rank():
        layer = ReplicatedLinear(
            64, 48, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="m.q_proj"
        )
    x = torch.randn(3, 64).bfloat16()
    for weight in (torch.randn(48, 64), torch.randn(48, 64)):
        layer.weight.weight_loader(layer.weight, weight)
        strided = layer.weight_scale.data.clone()
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.amd_mx.weight.layout.name == name
        assert layer.weight_scale.data.shape == layer.amd_mx.weight.scales.shape != strided.shape
        as_gpu.calls.clear()
        close(layer(x)[0], expected(x, weight, SCHEMES[scheme]), 64)
        assert as_gpu.calls == ([] if scheme == "w4a8" else ["gfx950"])  # what no kernel here reads the reference does
        layer.quant_method.restore_weights_before_loading(layer)
        assert torch.equal(layer.weight_scale.data, strided)


def test_weights_that_a_kernel_packs(make_config, rank, as_gpu, monkeypatch):
    """On sm_90 e2m1 weights become wgmma fragments: the parameters hold them, and new weights find fresh storage."""
    from sglang.srt.layers.linear import ReplicatedLinear

    from sglang_amd_quant.integration import linear as linear_method
    from sglang_amd_quant.ops import layout, linear, operand

    for module in (linear_method, layout, operand):
        monkeypatch.setattr(module, "current_arch", lambda: "sm_90")
    for module in (layout, linear):
        monkeypatch.setattr(module, "launchable", lambda arch: frozenset({"hip_decode_e4m3", "triton_hopper_e4m3"}))
    linear.bound.cache_clear()
    with rank():
        layer = ReplicatedLinear(
            128, 64, bias=False, params_dtype=torch.bfloat16, quant_config=make_config("w4a8"), prefix="m.q_proj"
        )
    for weight in (torch.randn(64, 128), torch.randn(64, 128)):
        layer.weight.weight_loader(layer.weight, weight)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.amd_mx.weight.layout.name == "hopper_e4m3"
        assert [p.data_ptr() for p in (layer.weight, layer.weight_scale)] == [
            t.data_ptr() for t in layer.amd_mx.weight.tensors[:2]
        ]
        layer.quant_method.restore_weights_before_loading(layer)
        assert (layer.weight.shape, layer.weight_scale.shape) == ((64, 64), (64, 4))
        assert (layer.weight_scale == 255).all()
    with pytest.raises(CheckpointError, match="256 of 256 weight scales"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_dummy_weights_are_finite_and_small(make_config, rank, monkeypatch, scheme):
    """`--load-format dummy`: no tensor comes, and the layer computes."""
    from sglang.srt.layers.linear import ReplicatedLinear

    from sglang_amd_quant.integration import loading

    monkeypatch.setattr(loading, "is_dummy_load", lambda: True)
    with rank():
        layer = ReplicatedLinear(
            64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=make_config(recipe(scheme)), prefix="m.q_proj"
        )
    layer.quant_method.process_weights_after_loading(layer)
    values = layer.amd_mx.values()
    assert torch.isfinite(values).all()
    assert 0 < values.abs().max() <= 2**-8 * (240 if scheme.weight == "e4m3" else 8)  # e4m3 0x77 is 240
