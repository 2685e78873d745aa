"""Number formats in torch, on any device: the reference for every kernel.

MX blocks of e2m1 and e4m3 under e8m0 scales, int4 groups, static per-tensor fp8, and e4m3's two kinds. No Python loop
over blocks, no host read of device data but by `find_nan`; `docs/formats.md` defines every corner.
"""

from sglang_amd_quant.formats.e4m3 import find_nan, fn_to_fnuz, mx_fn_to_fnuz, quantize_fp8_static
from sglang_amd_quant.formats.int4 import dequantize_int4, group_words, quantize_int4, split_words
from sglang_amd_quant.formats.mx import dequantize_mx, fake_quantize_mx, quantize_mx

__all__ = [
    "dequantize_int4",
    "dequantize_mx",
    "fake_quantize_mx",
    "find_nan",
    "fn_to_fnuz",
    "group_words",
    "mx_fn_to_fnuz",
    "quantize_fp8_static",
    "quantize_int4",
    "quantize_mx",
    "split_words",
]
