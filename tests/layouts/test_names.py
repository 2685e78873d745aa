import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_amd_quant import layouts
from sglang_amd_quant.errors import SchemeError
from sglang_amd_quant.layouts import SCALE_LAYOUTS, SOURCE_LAYOUTS, VALUE_LAYOUTS, TensorLayout, registry
from sglang_amd_quant.schemes import SCHEMES, scheme

LAYOUTS = st.builds(TensorLayout, st.sampled_from(list(VALUE_LAYOUTS)), st.sampled_from(list(SCALE_LAYOUTS)))


def test_names_and_constraints_need_no_torch():
    code = "import sys, sglang_amd_quant.layouts as l; l.TensorLayout.parse('exllama'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_every_public_name_resolves():
    for name in layouts.__all__:
        assert getattr(layouts, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = layouts.nonsense


@pytest.mark.parametrize(
    ("specs", "classes"),
    [(VALUE_LAYOUTS, registry.VALUES), (SCALE_LAYOUTS, registry.SCALES), (SOURCE_LAYOUTS, registry.SOURCES)],
)
def test_each_name_has_its_class(specs, classes):
    assert {name: layout.spec for name, layout in classes.items()} == dict(specs)
    assert all(layout.__doc__ and layout == type(layout)(**vars(layout)) for layout in classes.values())


@pytest.mark.parametrize("find", [registry.value_layout, registry.scale_layout, registry.source_layout])
def test_an_unknown_name_lists_those_there_are(find):
    with pytest.raises(SchemeError, match="layout 'zigzag': unknown; use one of .*"):
        find("zigzag")


@given(LAYOUTS)
def test_a_name_reads_back_to_its_layout(layout):
    assert TensorLayout.parse(layout.name) == layout


@pytest.mark.parametrize("name", ["", "zigzag", "preshuffle+preshuffle", "preshuffle+mxfp8_lane", "strided+", "awq"])
def test_names_that_are_none(name):
    with pytest.raises(SchemeError, match="is unknown or said twice"):
        TensorLayout.parse(name)


@pytest.mark.parametrize("arguments", [("zigzag", "strided"), ("strided", "preshuffle")])
def test_parts_that_are_none(arguments):
    with pytest.raises(SchemeError, match="unknown"):
        TensorLayout(*arguments)


@pytest.mark.parametrize(
    ("layout", "scheme_name", "n", "k", "part"),
    [
        ("strided", "mxfp4", 32, 48, "whole blocks of 32, got K=48"),
        ("strided", "mxfp8", 0, 32, "at least 1, got N=0"),
        ("mxfp8_lane", "mxfp4", 32, 128, "mxfp8_lane holds e4m3, not e2m1"),
        ("preshuffle", "int4_w4a16", 32, 128, "preshuffle holds e2m1 or e4m3, not int4"),
        ("cdna4_scale", "int4_w4a16", 32, 128, "cdna4_scale holds e2m1 or e4m3, not int4"),
        ("exllama", "w4a8", 32, 128, "exllama holds int4, not e2m1"),
    ],
)
def test_why_a_shape_cannot_have_a_layout(layout, scheme_name, n, k, part):
    assert any(part in reason for reason in TensorLayout.parse(layout).reasons(n, k, scheme(scheme_name)))


@pytest.mark.parametrize(
    ("name", "n", "k", "part"),
    [
        ("awq", 12, 64, "awq needs N % 8 == 0 and K % 8 == 0, got N=12"),
        ("gptq", 12, 64, "gptq needs N % 8 == 0 and K % 8 == 0"),
        ("gptq_v2", 8, 60, "whole blocks of 32"),
    ],
)
def test_why_a_shape_cannot_come_from_a_source(name, n, k, part):
    assert any(part in reason for reason in SOURCE_LAYOUTS[name].reasons(n, k, scheme("int4_w4a16")))


@pytest.mark.parametrize(
    ("layout", "scheme_name", "n", "k"),
    [
        # gpt-oss-120b at TP8: the last rank of down has K = 192, others 384; layouts pad, kernels look at min_block.
        ("cdna4_scale", "mxfp4", 2880, 192),
        ("cdna4_scale_256", "mxfp4", 2880, 384),
        ("preshuffle+cdna4_scale", "w4a8", 736, 2880),
        ("mxfp8_lane", "mxfp8", 33, 96),
        ("exllama", "int4_w4a16", 1, 32),
        ("strided", "mxfp4", 1, 32),
    ],
)
def test_shapes_that_any_rank_may_have_are_no_trouble(layout, scheme_name, n, k):
    assert TensorLayout.parse(layout).reasons(n, k, scheme(scheme_name)) == []


@pytest.mark.parametrize(
    ("layout", "scheme_name", "block"),
    [
        ("strided", "mxfp4", (1, 32)),
        ("cdna4_scale", "w4a8", (32, 256)),
        ("cdna4_scale_256", "mxfp8", (32, 256)),
        ("preshuffle", "mxfp4", (16, 64)),
        ("preshuffle", "mxfp8", (16, 32)),
        ("preshuffle+cdna4_scale", "mxfp4", (32, 256)),
        ("mxfp8_lane", "mxfp8", (16, 128)),
        ("exllama", "int4_w4a16", (1, 32)),
    ],
)
def test_the_least_block_a_kernel_can_read(layout, scheme_name, block):
    assert TensorLayout.parse(layout).min_block(SCHEMES[scheme_name]) == block
