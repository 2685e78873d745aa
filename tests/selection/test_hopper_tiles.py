"""Which linears of up to 64 rows sm_90 gives to tiles, and how deep these are: docs/decode.md has the measurements."""

from __future__ import annotations

import pytest

from sglang_amd_quant.selection import GemmProblem, KernelChoice, Selector

TILES, DECODE = "triton_hopper_e4m3", "hip_decode_e4m3"


def chosen(scheme: str, k: int, n: int, m: int, cu_count: int = 132) -> KernelChoice:
    problem = GemmProblem("linear", scheme, "sm_90", m, n, k, cu_count, layout="hopper_e4m3")
    return Selector(available=frozenset({TILES, DECODE})).decide(problem)


@pytest.mark.parametrize(
    ("scheme", "k", "n", "m", "stages"),
    [
        ("mxfp8", 2048, 6144, 64, 8), ("mxfp8", 1536, 6144, 33, 8), ("mxfp8", 4096, 6144, 32, 8),
        ("mxfp8", 4096, 4096, 64, 8), ("mxfp8", 3072, 8192, 64, 8), ("mxfp8", 4096, 24576, 32, 6),
        ("w4a8", 2048, 6144, 64, 10), ("w4a8", 1536, 8192, 48, 10), ("mxfp4", 3072, 8192, 64, 10),
        ("w4a8", 3072, 6144, 64, 10), ("w4a8", 4096, 24576, 4, 6), ("w4a8", 2048, 24576, 32, 6),
    ],
)  # fmt: skip
def test_tiles_have_the_stages_that_measured_best(scheme: str, k: int, n: int, m: int, stages: int) -> None:
    choice = chosen(scheme, k, n, m)
    assert choice.kernel == TILES
    assert (choice.config.block_n, choice.config.num_stages) == (64, stages)


@pytest.mark.parametrize(
    ("scheme", "k", "n", "m"),
    [
        ("w4a8", 4096, 6144, 64), ("w4a8", 4096, 4096, 64), ("w4a8", 3072, 8192, 32), ("w4a8", 2048, 6144, 32),
        ("w4a8", 6144, 2304, 64), ("w4a8", 8192, 28672, 64), ("mxfp8", 6144, 2304, 64), ("mxfp8", 2048, 6144, 16),
        ("w4a8", 1536, 6144, 48), ("w4a8", 3072, 4096, 64), ("w4a8", 2048, 5120, 64), ("mxfp8", 1536, 8192, 32),
        ("mxfp8", 2048, 4096, 64), ("mxfp8", 1024, 6144, 17),
    ],
)  # fmt: skip
def test_decode_kernels_keep_what_they_measured_best(scheme: str, k: int, n: int, m: int) -> None:
    assert chosen(scheme, k, n, m).kernel == DECODE


@pytest.mark.parametrize(
    ("k", "n", "most"), [(6144, 1536, 64), (2048, 6144, 64), (4096, 24576, 64), (1536, 6144, 32), (1536, 12288, 16),
                         (1536, 28672, 8), (8192, 28672, 8)],
)  # fmt: skip
def test_bf16_activations_have_decode_kernels_up_to_so_many_rows(k: int, n: int, most: int) -> None:
    """`_SM90_DECODE`: layers of 2048 of K and more up to 64, others, and the widest of 8192, up to fewer."""
    selector = Selector(available=frozenset({"hip_decode", "triton_hopper_bf16"}))
    kernels = [
        selector.decide(GemmProblem("linear", "w4a16", "sm_90", m, n, k, 132, layout="hopper_bf16")).kernel
        for m in range(1, 101)
    ]
    assert kernels == ["hip_decode"] * most + ["triton_hopper_bf16"] * (100 - most)


def test_deep_tiles_are_for_as_many_blocks_as_multiprocessors() -> None:
    """Of more blocks two find a place on one, which stages of this depth leave none."""
    assert chosen("mxfp8", 2048, 64 * 132, 64).config.num_stages == 8
    assert chosen("mxfp8", 2048, 64 * 132 + 64, 64).config.num_stages == 6
    assert chosen("mxfp8", 2048, 64 * 114, 64, cu_count=114).config.num_stages == 8
    assert chosen("mxfp8", 2048, 64 * 115, 64, cu_count=114).config.num_stages == 6
