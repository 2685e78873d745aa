import dataclasses
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import dequantize_mx, quantize_mx
from sglang_amd_quant.layouts import SCALE_LAYOUTS, VALUE_LAYOUTS, TensorLayout, source_layout
from sglang_amd_quant.schemes import SCHEMES, ScaleMode, scheme
from sglang_amd_quant.tensor import MxTensor, PadPlan

INT4 = scheme("int4_w4a16")
quick = settings(max_examples=40)


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def fitting_layouts(sch):
    layouts = (TensorLayout(value, scale) for value in VALUE_LAYOUTS for scale in SCALE_LAYOUTS)
    return [layout for layout in layouts if not layout.reasons(32, 256, sch)]


def octets(tensor):
    """Bytes; a copy, since a single element may have any stride."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(one, other):
    return (
        torch.equal(octets(one.data), octets(other.data))
        and torch.equal(octets(one.scales), octets(other.scales))
        and (one.zeros is None) == (other.zeros is None)
        and (one.zeros is None or torch.equal(one.zeros, other.zeros))
    )


@st.composite
def tensors(draw):
    """A small quantized tensor of any scheme and of any group, with or without experts."""
    sch = draw(st.sampled_from(list(SCHEMES.values())))
    if sch.weight == "int4":
        sch = dataclasses.replace(sch, block=draw(st.sampled_from([32, 64, 128])))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    n, blocks = draw(st.integers(1, 70)), draw(st.integers(1, 12))
    shape = (*lead, n, blocks * sch.block)
    symmetric = draw(st.booleans())
    return MxTensor.quantize(weights(*shape, seed=draw(st.integers(0, 999))), sch, symmetric=symmetric)


@given(tensor=tensors(), data=st.data())
@quick
def test_no_layout_and_no_padding_changes_a_bit(tensor, data):
    layouts = st.sampled_from(fitting_layouts(tensor.scheme))
    plans = st.builds(
        PadPlan,
        st.integers(tensor.n, tensor.n + 40),
        st.integers(0, 9).map(lambda extra: tensor.k + extra * tensor.scheme.block),
    )
    there = tensor.to_layout(data.draw(layouts), data.draw(plans))
    on = there.to_layout(data.draw(layouts).name, data.draw(plans))
    back = on.to_layout("strided", PadPlan())
    assert same_bits(back, tensor)
    assert back.pad == PadPlan(tensor.n, tensor.k)
    expected = tensor.dequantize()
    assert expected.shape == tensor.shape
    for other in (there, on):
        assert other.shape == tensor.shape
        assert torch.equal(other.dequantize(), expected)


@given(tensor=tensors(), data=st.data())
@quick
def test_nbytes_is_what_the_plan_without_torch_says(tensor, data):
    layout = data.draw(st.sampled_from(fitting_layouts(tensor.scheme)))
    served = tensor.with_words() if tensor.scheme.weight == "int4" else tensor  # a plan is of what kernels read
    laid = served.to_layout(layout, tensor.padded_to(n=16, k=256))
    experts = tensor.data.numel() // (tensor.n * tensor.k // tensor.scheme.pack)
    assert laid.nbytes == experts * layout.nbytes(laid.pad.n, laid.pad.k, tensor.scheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["strided", "cdna_int4+tile_group", "rdna_int4+tile_group", "mma_int4+tile_group"])
def test_words_of_int4_stand_for_the_same_values(layout, symmetric):
    tensor = MxTensor.quantize(weights(2, 20, 192), dataclasses.replace(INT4, block=64), symmetric=symmetric)
    words = tensor.with_words().to_layout(layout)
    assert (words.scales.dtype, words.zeros) == (torch.int32, None)
    assert words.with_words() is words
    assert torch.equal(words.dequantize(), tensor.dequantize())
    assert torch.equal(words.expert(1).dequantize(), tensor.dequantize()[1])


def test_words_are_for_int4_and_have_zeros_in_them():
    with pytest.raises(SchemeError, match="no zero points to put into words"):
        MxTensor.quantize(weights(8, 64), scheme("mxfp4")).with_words()
    tensor = MxTensor.quantize(weights(8, 64), INT4, symmetric=False)
    with pytest.raises(SchemeError, match="leave zeros out"):
        dataclasses.replace(tensor, scales=tensor.with_words().scales)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "int4_w4a16"])
def test_padding_is_zero_data_and_neutral_scales(name):
    tensor = MxTensor.quantize(weights(2, 33, 96), scheme(name), symmetric=False)
    padded = tensor.to_layout("strided", tensor.padded_to(n=64, k=256))
    assert padded.pad == PadPlan(64, 256)
    data, scales = padded.data.view(torch.uint8), padded.scales
    cols = 96 // tensor.scheme.pack
    neutral = 0 if name == "int4_w4a16" else 0x7F
    assert not data[:, 33:].any()
    assert not data[:, :, cols:].any()
    assert (scales[:, 33:] == neutral).all()
    assert (scales[:, :, 3:] == neutral).all()
    # As if a kernel read the padding too: it adds nothing.
    whole = dataclasses.replace(padded, shape=(2, 64, 256)).dequantize()
    assert torch.equal(whole[:, :33, :96], tensor.dequantize())
    assert not whole[:, 33:].any()
    assert not whole[:, :, 96:].any()


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
@pytest.mark.parametrize("mode", [None, *ScaleMode])
def test_quantize_is_that_of_the_formats(element, mode):
    w = weights(2, 5, 64)
    tensor = MxTensor.quantize(w, scheme("mxfp4" if element == "e2m1" else "mxfp8"), mode=mode, layout="cdna4_scale")
    assert tensor.layout.name == "cdna4_scale"
    assert torch.equal(tensor.dequantize(), dequantize_mx(*quantize_mx(w, element, mode), element))
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_canonical_wraps_what_checkpoints_deliver():
    data, scales = quantize_mx(weights(4, 7, 96), "e2m1")
    tensor = MxTensor.canonical(data, scales, scheme("w4a8"))
    assert tensor.shape == (4, 7, 96)
    assert (tensor.n, tensor.k, tensor.layout.name) == (7, 96, "strided")
    assert tensor.data is data  # no copy
    assert tensor.nbytes == data.nbytes + scales.nbytes


def test_an_expert_is_a_view_of_its_weights():
    tensor = MxTensor.quantize(weights(3, 33, 96), scheme("mxfp8"), layout="mxfp8_lane+cdna4_scale")
    one = tensor.expert(2)
    assert one.shape == (33, 96)
    assert torch.equal(one.dequantize(), tensor.dequantize()[2])
    assert one.data.data_ptr() == tensor.data[2].data_ptr()


def test_fnuz_for_gfx942_has_the_same_values():
    tensor = MxTensor.quantize(weights(40, 96), scheme("mxfp8"), layout="mxfp8_lane")
    tensor = tensor.to_layout("mxfp8_lane+cdna4_scale", tensor.padded_to(k=256))
    fnuz = tensor.to_fnuz()
    assert fnuz.data.dtype == torch.float8_e4m3fnuz
    assert (fnuz.layout, fnuz.pad) == (tensor.layout, tensor.pad)
    assert torch.equal(fnuz.dequantize(), tensor.dequantize())
    with pytest.raises(SchemeError, match="has no fnuz form"):
        fnuz.to_fnuz()


def test_moving_moves_everything():
    tensor = MxTensor.quantize(weights(8, 64), INT4, symmetric=False, layout="exllama")
    moved = tensor.to("meta")
    assert {moved.data.device.type, moved.scales.device.type, moved.zeros.device.type} == {"meta"}
    assert (moved.layout, moved.shape, moved.pad) == (tensor.layout, tensor.shape, tensor.pad)
    assert moved.to_layout("strided").data.shape == (8, 32)


def test_an_unchanged_layout_is_no_copy():
    tensor = MxTensor.quantize(weights(8, 64), scheme("mxfp4"))
    assert tensor.to_layout("strided") is tensor


@pytest.mark.parametrize("source", ["awq", "gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_from_source(source, symmetric, lead):
    wanted = MxTensor.quantize(weights(*lead, 24, 256), dataclasses.replace(INT4, block=64), symmetric=symmetric)
    layout = source_layout(source)
    zeros = torch.full((*lead, 24, 4), 8, dtype=torch.uint8) if wanted.zeros is None else wanted.zeros
    # Checkpoints hold [K/group, N] scales.
    given = (layout.pack(wanted.data), layout.pack_zeros(zeros), wanted.scales.mT.contiguous())
    tensor = MxTensor.from_source(source, *given, INT4)
    assert same_bits(tensor, wanted)
    assert tensor.scheme.block == 64
    assert torch.equal(tensor.to_layout("exllama").dequantize(), wanted.dequantize())
    qweight, qzeros, scales = given
    for wrong in (
        (qweight, qzeros[..., :-1], scales),
        (qweight, qzeros, scales[..., :-8]),
        (qweight, qzeros, scales[..., :1, :]),  # one group for all of K = 256
        (qweight, qzeros, scales[..., :0, :]),
        (qweight, qzeros, scales[..., 0].flatten()),
    ):
        with pytest.raises(ShapeError):
            MxTensor.from_source(source, *wrong, INT4)


def mx(data, scales, shape, name="mxfp4", **more):
    return MxTensor(data, scales, scheme(name), shape, **more)


FP8 = torch.float8_e4m3fn
BYTES = torch.zeros(8, 32, dtype=torch.uint8)
SCALES = torch.zeros(8, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mx(BYTES, SCALES, (8, 128)), ShapeError, "data [8, 32] of mxfp4 weights [8, 128]: layout strided"),
        (lambda: mx(BYTES, SCALES[:, :1], (8, 64)), ShapeError, "scales [8, 1] of mxfp4 weights [8, 64]"),
        (lambda: mx(BYTES, SCALES, (2, 4, 64)), ShapeError, "data [8, 32] of mxfp4 weights [2, 4, 64]"),
        (lambda: mx(BYTES, SCALES, (64,)), ShapeError, "weights [64]: fewer than two dimensions"),
        (lambda: mx(BYTES, SCALES, (8, 48)), ShapeError, "needs K in whole blocks of 32, got K=48"),
        (
            lambda: mx(BYTES, SCALES, (8, 64), layout=TensorLayout(scale="cdna4_scale")),
            ShapeError,
            "scales [8, 2] of mxfp4 weights [8, 64]: layout cdna4_scale keeps them as [1, 256]",
        ),
        (
            lambda: mx(BYTES, SCALES, (8, 64), layout=TensorLayout("exllama")),
            ShapeError,
            "exllama holds int4, not e2m1",
        ),
        (lambda: mx(BYTES, SCALES, (8, 64), pad=PadPlan(4, 64)), ShapeError, "a pad plan of N=4, K=64 is smaller"),
        (lambda: mx(BYTES, SCALES, (8, 64), pad=PadPlan(8, 80)), ShapeError, "no whole blocks of 32"),
        (lambda: mx(BYTES, SCALES, (8, 64), pad=PadPlan(16)), ShapeError, "keeps them as [16, 32]"),
        (lambda: mx(BYTES.to(torch.int8), SCALES, (8, 64)), SchemeError, "torch.int8, not torch.uint8"),
        (lambda: mx(BYTES, SCALES.float(), (8, 64)), SchemeError, "torch.float32, not torch.uint8"),
        (lambda: mx(BYTES.view(FP8), SCALES, (8, 32), "mxfp8"), ShapeError, "scales [8, 2] of mxfp8 weights [8, 32]"),
        (lambda: mx(BYTES, SCALES[:, :1], (8, 32), "mxfp8"), SchemeError, "torch.uint8, not torch.float8_e4m3fn or"),
        (lambda: mx(BYTES, SCALES.to("meta"), (8, 64)), SchemeError, "on meta, data on cpu"),
        (lambda: mx(BYTES, SCALES, (8, 64), zeros=SCALES), SchemeError, "e2m1 has no zero points"),
        (
            lambda: mx(BYTES.int(), SCALES.bfloat16(), (8, 64), "int4_w4a16"),
            SchemeError,
            "torch.int32, not torch.uint8",
        ),
        (
            lambda: mx(BYTES, SCALES.bfloat16(), (8, 64), "int4_w4a16", zeros=SCALES[:, :1]),
            ShapeError,
            "zeros [8, 1] of int4_w4a16 weights [8, 64]",
        ),
        (lambda: mx(BYTES, SCALES, (8, 64)).to_layout("zigzag"), SchemeError, "layout 'zigzag'"),
        (lambda: mx(BYTES, SCALES, (8, 64)).to_layout("mxfp8_lane"), ShapeError, "mxfp8_lane holds e4m3, not e2m1"),
        (lambda: mx(BYTES, SCALES, (8, 64)).to_layout("strided", PadPlan(8, 32)), ShapeError, "pad plan"),
        (lambda: MxTensor.quantize(weights(4, 40), scheme("mxfp4")), ShapeError, "needs [..., N, K], K % 32 == 0"),
        (lambda: MxTensor.quantize(weights(64), scheme("mxfp4")), ShapeError, "weights [64]"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)
