import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_amd_quant.selection import GemmProblem
from sglang_amd_quant.selection.buckets import TUNING_MS, moe_m, padded_m, padded_ms, tuning_m


@pytest.mark.parametrize(
    ("m", "n", "fine", "coarse"),
    [
        (1, 512, 16, 1),
        (3, 512, 16, 4),
        (17, 512, 32, 32),
        (256, 512, 256, 256),
        (257, 512, 288, 512),
        (1025, 512, 1088, 2048),
        (4097, 512, 4224, 8192),
        (8193, 4096, 8320, 16384),
        (8193, 4097, 8320, 8192),
        (32800, 8192, 32896, 8192),
    ],
)
def test_padded_m_at_both_granularities(m, n, fine, coarse):
    assert (padded_m(m, n, 0), padded_m(m, n, 1)) == (fine, coarse)


@given(m=st.integers(1, 40_000), n=st.integers(1, 20_000))
def test_padded_m_never_shrinks_but_for_the_cap(m, n):
    assert padded_m(m, n, 0) >= m
    coarse = padded_m(m, n, 1)
    assert coarse >= m or (coarse == 8192 and n > 4096)
    assert padded_m(padded_m(m, n, 0), n, 0) == padded_m(m, n, 0)


def test_moe_tiers():
    assert [moe_m(m) for m in (1, 3, 32_767, 32_768, 40_000, 131_072, 999_999)] == [
        1, 4, 32_768, 32_768, 32_768, 131_072, 131_072,
    ]  # fmt: skip


def test_tuning_ms_are_all_reached_by_their_own_lookup():
    for m in TUNING_MS:
        assert m in (padded_m(m, 8192, 0), padded_m(m, 8192, 1))


def test_a_tuned_bucket_is_found_again():
    for m in (1, 5, 100, 3000, 20_000):
        problem = GemmProblem("linear", "mxfp8", "gfx950", m, 6144, 6144)
        assert tuning_m(problem) in padded_ms(problem)
