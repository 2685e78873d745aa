"""Properties that hold for every layout, over odd shapes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.layouts import Cdna4Scale, Gptq, Strided
from sglang_amd_quant.layouts.registry import SCALES, SOURCES, VALUES

PAIRED = [layout for name, layout in VALUES.items() if name.endswith("_int4")]
BYTE_LAYOUTS = [layout for layout in (*VALUES.values(), *SCALES.values()) if layout.storage_dtype is None]
LEADING = st.lists(st.integers(1, 3), max_size=2).map(tuple)
quick = settings(max_examples=40)


def identify(layout):
    return f"{layout.name}-{layout.spec.role}"


def random_bytes(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8))


@pytest.mark.parametrize("layout", [*VALUES.values(), *SCALES.values()], ids=identify)
@given(lead=LEADING, n=st.integers(1, 300), cols=st.integers(1, 140), seed=st.integers(0, 2**32 - 1))
@quick
def test_round_trip(layout, lead, n, cols, seed):
    matrix = random_bytes((*lead, n, cols), seed)
    original = matrix.clone()
    storage = layout.pack(matrix)
    assert storage.shape == (*lead, *layout.storage_shape(n, cols))
    assert storage.is_contiguous()
    assert torch.equal(layout.unpack(storage, n, cols), original)
    assert torch.equal(matrix, original)


@pytest.mark.parametrize("layout", SOURCES.values(), ids=identify)
@given(lead=LEADING, n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@quick
def test_source_round_trip(layout, lead, n, k, seed):
    matrix, zeros = random_bytes((*lead, 8 * n, 4 * k), seed), random_bytes((*lead, 8 * n, k), seed) & 15
    original = matrix.clone()
    storage = layout.pack(matrix)
    stored = storage.clone()
    assert storage.dtype == torch.int32
    assert storage.shape == (*lead, *layout.storage_shape(8 * n, 4 * k))
    assert torch.equal(layout.unpack(storage, 8 * n, 4 * k), original)
    assert torch.equal(storage, stored)
    assert torch.equal(matrix, original)
    assert torch.equal(layout.unpack_zeros(layout.pack_zeros(zeros)), zeros)


@pytest.mark.parametrize("layout", BYTE_LAYOUTS, ids=identify)
@given(lead=LEADING, n=st.integers(1, 300), cols=st.integers(1, 140))
@quick
def test_every_element_is_stored_once_and_all_else_is_padding(layout, lead, n, cols):
    count = math.prod((*lead, n, cols))
    ids = torch.arange(count).view(*lead, n, cols)
    # A byte cannot tell all elements apart, so each byte of an id is packed by itself, and one more plane of a
    # constant shows where elements are: what does not hold it must be padding.
    mark = 0x55
    stored = sum(layout.pack(((ids >> shift) & 0xFF).to(torch.uint8)).long() << shift for shift in (0, 8, 16))
    is_element = layout.pack(torch.full_like(ids, mark, dtype=torch.uint8)) == mark
    assert torch.equal(stored[is_element].sort().values, ids.flatten())
    pad = layout.spec.pad_byte
    assert (stored[~is_element] == pad * 0x010101).all()


@pytest.mark.parametrize("layout", BYTE_LAYOUTS, ids=identify)
@given(n=st.integers(1, 300), cols=st.integers(1, 140), seed=st.integers(0, 2**32 - 1))
@quick
def test_each_byte_lies_where_the_closed_form_says(layout, n, cols, seed, byte_offsets):
    matrix = random_bytes((n, cols), seed)
    storage = layout.pack(matrix).flatten().numpy()
    padded_cols = storage.size // layout.spec.padded(n, cols)[0]
    where = byte_offsets[layout.name](np.arange(n)[:, None], np.arange(cols)[None, :], padded_cols)
    assert np.array_equal(storage[where], matrix.numpy())


@pytest.mark.parametrize(
    ("layout", "shape", "storage", "pad"),
    [
        (SCALES["strided"], (33, 9), (33, 9), None),
        (SCALES["cdna4_scale"], (33, 9), (2, 32 * 16), 0x7F),
        (SCALES["cdna4_scale_256"], (33, 9), (8, 32 * 16), 0x7F),
        (SCALES["cdna4_scale_256"], (257, 8), (16, 32 * 8), 0x7F),
        (VALUES["preshuffle"], (33, 48), (3, 16 * 64), 0),
        (VALUES["mxfp8_lane"], (33, 160), (3, 2, 2048), 0),
        (VALUES["exllama"], (33, 18), (33, 5), 0),
        (SOURCES["awq"], (24, 16), (32, 3), None),
        (SOURCES["gptq"], (24, 16), (4, 24), None),
        (SOURCES["gptq_v2"], (24, 16), (4, 24), None),
    ],
    ids=str,
)
def test_storage_shape_and_padding(layout, shape, storage, pad):
    assert layout.storage_shape(*shape) == storage
    packed = layout.pack(torch.full(shape, 0x55, dtype=torch.uint8))
    assert packed.shape == storage
    octets = packed.flatten().view(torch.uint8)
    assert octets.unique().tolist() == sorted({0x55} if pad is None else {0x55, pad})
    assert (octets == 0x55).sum() == math.prod(shape)


@given(n=st.integers(1, 9), cols=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
@quick
def test_exllama_words_hold_even_elements_low_and_odd_ones_high(n, cols, seed, pack_words, nibble_order):
    matrix = random_bytes((n, cols), seed)
    nibbles = torch.zeros(n, -(-cols // 4) * 8, dtype=torch.uint8)
    nibbles[:, 0 : 2 * cols : 2], nibbles[:, 1 : 2 * cols : 2] = matrix & 15, matrix >> 4
    assert torch.equal(VALUES["exllama"].pack(matrix), pack_words(nibbles, nibble_order))


@pytest.mark.parametrize("layout", PAIRED, ids=identify)
@given(n=st.integers(1, 60), words=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
@quick
def test_tiles_of_int4_are_exllama_words_of_the_bytes_that_the_closed_form_says(layout, n, words, seed, byte_offsets):
    matrix = random_bytes((n, 4 * words), seed)
    stored = layout.pack(matrix)
    assert stored.dtype == torch.int32
    padded = layout.spec.padded(n, 4 * words)
    placed = np.zeros(math.prod(padded), np.uint8)  # all else is padding
    placed[byte_offsets[layout.name](np.arange(n)[:, None], np.arange(4 * words), padded[1])] = matrix.numpy()
    assert torch.equal(stored.flatten(), VALUES["exllama"].pack(torch.from_numpy(placed)[None]).flatten())


def test_exllama_gives_two_bf16_values_in_one_and_or():
    matrix = random_bytes((1, 4), 0)
    word = VALUES["exllama"].pack(matrix)
    for pair in range(4):
        both = ((word >> 4 * pair) & 0x000F000F) | 0x43004300
        nibbles = torch.tensor([int(matrix[0, pair]) & 15, int(matrix[0, pair]) >> 4])
        assert torch.equal(both.view(torch.bfloat16)[0].float(), 128.0 + nibbles)


@pytest.mark.parametrize("layout", SOURCES.values(), ids=identify)
@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@quick
def test_source_words_are_as_published(layout, n, k, seed, pack_words, nibble_order):
    values, zeros = random_bytes((8 * n, 8 * k), seed) & 15, random_bytes((8 * n, k), seed + 1) & 15
    matrix = values[:, 0::2] | values[:, 1::2] << 4
    if layout.name == "awq":
        qweight, qzeros = pack_words(values.mT, nibble_order), pack_words(zeros.mT, nibble_order)
    else:
        stored = (zeros + 15) % 16 if layout.name == "gptq" else zeros
        qweight, qzeros = pack_words(values).mT, pack_words(stored.mT)
    assert torch.equal(layout.pack(matrix), qweight)
    assert torch.equal(layout.unpack(qweight, 8 * n, 4 * k), matrix)
    assert torch.equal(layout.pack_zeros(zeros), qzeros)
    assert torch.equal(layout.unpack_zeros(qzeros), zeros)


def test_gptq_v1_stores_the_symmetric_zero_point_8_as_7():
    assert Gptq(version=1).pack_zeros(torch.full((8, 1), 8, dtype=torch.uint8)).item() == 0x77777777


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("name", ["strided", "preshuffle", "mxfp8_lane"])
def test_fp8_keeps_its_dtype_and_every_bit(name, dtype):
    matrix = random_bytes((2, 40, 96), 1).view(dtype)  # holds NaN and -0 encodings too
    storage = VALUES[name].pack(matrix)
    assert storage.dtype == dtype
    assert torch.equal(VALUES[name].unpack(storage, 40, 96).view(torch.uint8), matrix.view(torch.uint8))


@pytest.mark.parametrize("layout", [*VALUES.values(), *SCALES.values(), *SOURCES.values()], ids=identify)
def test_views_need_not_be_contiguous(layout):
    wide = random_bytes((64, 64), 2)
    view = wide.mT[8:40, 16:]
    storage = layout.pack(view)
    assert torch.equal(layout.unpack(storage, 32, 48), view)
    spread = torch.stack((storage, storage), dim=-1)[..., 0]
    assert torch.equal(layout.unpack(spread, 32, 48), view)
    # Nor aligned: a tensor cut out of a file's bytes may start anywhere.
    cut = torch.cat((torch.zeros(3, dtype=torch.uint8), view.flatten()))[3:].view(view.shape)
    assert torch.equal(layout.pack(cut), storage)


@pytest.mark.parametrize("layout", [*VALUES.values(), *SCALES.values(), *SOURCES.values()], ids=identify)
def test_storage_of_another_shape_is_refused(layout):
    storage = layout.pack(random_bytes((32, 64), 3))
    with pytest.raises(ShapeError, match=r"storage \[.*\]: layout .* keeps a matrix of 320 x 64 as \[.*\]; .*"):
        layout.unpack(storage, 320, 64)
    with pytest.raises(ShapeError):
        layout.unpack(storage.flatten()[0], 32, 64)


@pytest.mark.parametrize("layout", SOURCES.values(), ids=identify)
def test_sources_refuse_what_is_not_whole_words(layout):
    with pytest.raises(ShapeError, match=r"int4 weights \[12, 64\]: layout .* needs N % 8 == 0"):
        layout.pack(random_bytes((12, 32), 4))


def test_parameters_that_no_variant_has():
    with pytest.raises(SchemeError, match="rows padded to 64"):
        Cdna4Scale(rows=64)
    with pytest.raises(SchemeError, match="gptq version 3"):
        Gptq(version=3)


def test_layouts_are_values():
    assert Cdna4Scale(rows=256) == SCALES["cdna4_scale_256"] != Cdna4Scale()
    assert len({Strided(), Strided(), VALUES["strided"]}) == 1


@pytest.mark.parametrize("words", [15, 16, 17, 35])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_awq_in_pieces(monkeypatch, lead, words):
    """Pieces of 16 words, the least there are, and what remains."""
    monkeypatch.setattr("sglang_amd_quant.layouts.awq.PIECE_BYTES", 1)
    matrix = random_bytes((*lead, 8 * words, 12), words)
    layout = SOURCES["awq"]
    assert torch.equal(layout.unpack(layout.pack(matrix), 8 * words, 12), matrix)
