"""Agreement, bit for bit, with the code of others that packs or unpacks the same layouts.

SGLang and compressed-tensors are installed for the tests anyway. triton_kernels comes in a wheel of 371 MB only, so its
test runs where somebody put the package on the path: docs/layouts.md says how.
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_amd_quant.layouts import AutoAwq, Cdna4Scale, ExLlama, Gptq, Mxfp8Lane, Preshuffle

quick = settings(max_examples=20)
SEEDS = st.integers(0, 2**32 - 1)


def random_bytes(shape, seed):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def sglang_module():
    """Import one of SGLang's modules. Without SGLang the tests are skipped; a module that moved fails them."""
    pytest.importorskip("sglang")
    return lambda name: importlib.import_module(f"sglang.{name}")


@given(n=st.integers(1, 3), blocks=st.integers(1, 13), seed=SEEDS)
@quick
def test_sglang_mxfp8_lane(n, blocks, seed, sglang_module):
    native = sglang_module("kernels.ops.gemm.mxfp8_native_amd_gfx95")
    # Its preparation of a weight pads a tail of K to 128, as ours does.
    weight = random_bytes((32 * n, 32 * blocks), seed).view(torch.float8_e4m3fn)
    theirs, _ = native.prepare_mxfp8_native_weight(weight, torch.ones(n, blocks), (32, 32))
    assert torch.equal(Mxfp8Lane().pack(weight).view(torch.uint8), theirs)


@given(n=st.integers(1, 5), tiles=st.integers(1, 5), experts=st.integers(1, 3), seed=SEEDS)
@quick
def test_sglang_undoes_our_preshuffle(n, tiles, experts, seed, sglang_module):
    unshuffle = sglang_module("srt.layers.quantization.fp8_utils").unshuffle_aiter_fp8_weight
    matrix = random_bytes((experts, 16 * n, 32 * tiles), seed)
    assert torch.equal(unshuffle(Preshuffle().pack(matrix).view(matrix.shape)), matrix)


@given(n=st.integers(1, 300), blocks=st.integers(1, 20), seed=SEEDS)
@quick
def test_sglang_scale_swizzle_and_its_padding_to_256_rows(n, blocks, seed, sglang_module):
    quark = sglang_module("srt.layers.quantization.quark.schemes.quark_w4a4_mxfp4")
    scales = random_bytes((n, blocks), seed)
    theirs = quark._shuffle_asm_fp4_act_scale(scales)
    assert torch.equal(Cdna4Scale(rows=256).pack(scales).flatten(), theirs.view(torch.uint8).flatten())
    whole = random_bytes((32 * n, 8 * blocks), seed)
    assert torch.equal(Cdna4Scale().pack(whole).flatten(), quark._swizzle_asm_fp4_scale(whole).flatten())


@given(experts=st.integers(1, 3), n=st.integers(1, 100), blocks=st.integers(1, 40), seed=SEEDS)
@quick
def test_triton_kernels_cdna4_scale(experts, n, blocks, seed):
    theirs = pytest.importorskip("triton_kernels.tensor_details.layout_details.cdna4_scale")
    ours = Cdna4Scale()
    scales = random_bytes((experts, n, blocks), seed)
    # It takes [..., K/32, N] and pads with 0, so both are given the same padding to compare every byte.
    rows, columns = ours.spec.padded(n, blocks)
    padded = torch.full((experts, rows, columns), ours.spec.pad_byte, dtype=torch.uint8)
    padded[:, :n, :blocks] = scales
    transformation = theirs.CDNA4MXScaleLayout().make_transformation([experts, columns, rows], is_fp4=False)
    assert torch.equal(transformation.swizzle_data(padded.mT.contiguous()).mT, ours.pack(scales))
    # And it reads what we packed, whatever the padding holds.
    reader = theirs.CDNA4MXScaleLayout().make_transformation([experts, blocks, n], is_fp4=False)
    assert torch.equal(reader.unswizzle_data(ours.pack(scales).mT).mT, scales)


@pytest.fixture(scope="session")
def compressed_tensors(sglang_module):
    """The two modules of compressed-tensors that pack int4 words."""
    pytest.importorskip("compressed_tensors")
    awq = importlib.import_module("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    pack = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    return awq, pack


@given(n=st.integers(1, 5), k=st.integers(1, 9), seed=SEEDS)
@quick
def test_compressed_tensors_reads_our_awq(n, k, seed, compressed_tensors):
    awq, _ = compressed_tensors
    values, zeros = random_bytes((8 * n, 8 * k), seed) & 15, random_bytes((8 * n, k), seed + 1) & 15
    layout = AutoAwq()
    qweight = layout.pack(values[:, 0::2] | values[:, 1::2] << 4)
    theirs = awq.reverse_awq_order(*awq.unpack_awq(qweight, layout.pack_zeros(zeros), 4), 4)
    assert torch.equal(theirs[0].mT & 15, values)
    assert torch.equal(theirs[1].mT & 15, zeros)


@given(n=st.integers(1, 5), k=st.integers(1, 5), seed=SEEDS)
@quick
def test_compressed_tensors_packs_gptq_words(n, k, seed, compressed_tensors):
    _, pack = compressed_tensors
    values, zeros = random_bytes((8 * n, 8 * k), seed) & 15, random_bytes((8 * n, k), seed + 1) & 15

    def signed(nibbles):  # it adds 8 to what it packs
        return nibbles.to(torch.int8) - 8

    matrix = values[:, 0::2] | values[:, 1::2] << 4
    assert torch.equal(Gptq(version=2).pack(matrix), pack(signed(values.mT), 4, packed_dim=0))
    assert torch.equal(Gptq(version=2).pack_zeros(zeros), pack(signed(zeros.mT), 4, packed_dim=1))
    assert torch.equal(Gptq(version=1).pack_zeros(zeros), pack(signed((zeros.mT + 15) % 16), 4, packed_dim=1))
    # ExLlama orders the same words otherwise: its slot s holds the element that AutoAWQ's slot s holds.
    reordered = values.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2)
    assert torch.equal(ExLlama().pack(matrix), pack(signed(reordered), 4, packed_dim=1))
