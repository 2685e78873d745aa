"""The LDS estimate against the figures of aiter #3580, computed by hand from its formula (facts, not our output)."""

import pytest

from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.lds import fitting_stages, lds_bytes


@pytest.mark.parametrize(
    ("block_m", "block_n", "block_k", "bits_a", "bits_b", "expected", "stages"),
    [
        pytest.param(128, 256, 256, 8, 4, 147_444, 2, id="a8w4 bm128 bn256"),
        pytest.param(32, 512, 256, 8, 4, 165_876, 1, id="a8w4 bm32 bn512"),
        pytest.param(64, 256, 256, 8, 4, 110_580, 2, id="a8w4 bm64 bn256"),
        pytest.param(128, 256, 256, 8, 8, 221_168, 1, id="a8w8 bm128 bn256"),
        pytest.param(16, 256, 512, 8, 4, 165_876, 1, id="bm16_n1024_k7168, the donor"),
        pytest.param(32, 256, 512, 8, 4, 184_308, 1, id="bm32_n1024_k7168, the borrower"),
    ],
)
def test_two_stages_with_async_padding_on_gfx950(block_m, block_n, block_k, bits_a, bits_b, expected, stages):
    assert lds_bytes(block_m, block_n, block_k, bits_a, bits_b, 2, async_copy=True) == expected
    assert fitting_stages("gfx950", block_m, block_n, block_k, bits_a, bits_b) == stages


def test_without_async_copy_one_stage_is_in_registers():
    a, b = 128 * 256, 128 * 256 // 2
    assert lds_bytes(128, 128, 256, 8, 4, 2, async_copy=False) == a + b
    assert lds_bytes(128, 128, 256, 8, 4, 3, async_copy=False) == 2 * (a + b)
    assert lds_bytes(128, 128, 256, 8, 4, 1, async_copy=False) == max(a, b)


def test_caps():
    assert {n: ARCHES[n].lds_bytes for n in ("gfx1250", "gfx950", "gfx942")} == {
        "gfx1250": 327_680,
        "gfx950": 163_840,
        "gfx942": 65_536,
    }


def test_nothing_fits_is_zero_and_an_arch_without_figures_has_no_limit():
    assert fitting_stages("gfx942", 256, 512, 1024, 16, 8) == 0
    assert fitting_stages("gfx90a", 256, 512, 1024, 16, 8) == 2
    assert fitting_stages("gfx1250", 128, 256, 256, 8, 8, at_most=4) == 2
