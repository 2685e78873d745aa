"""Bit for bit amd-quark's MXFP4 and MXFP8 quantizers, as its checkpoints are made; where not, why.

Quark has three `scale_calculation_mode`s. MXFP4 is quantized for real (`scale`, packed codes); for MXFP8 Quark 0.13 has
a fake quantizer in those modes, and a real one with a rounded-up scale for its A8W4 linear.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sglang_amd_quant.formats import dequantize_mx, fake_quantize_mx, nibbles, quantize_mx
from sglang_amd_quant.schemes import ScaleMode

QUARK_MODES = (ScaleMode.EVEN, ScaleMode.FLOOR, ScaleMode.CEIL)


def quantizer(spec_name: str, mode: ScaleMode):
    from quark.torch.quantization import config
    from quark.torch.quantization.tensor_quantize import FakeQuantizeBase

    spec_class = getattr(config.config, spec_name)
    spec = spec_class(ch_axis=-1, is_dynamic=False, scale_calculation_mode=mode.value).to_quantization_spec()
    fake = FakeQuantizeBase.get_fake_quantize(spec)
    fake.enable_observer()
    return spec, fake


def mxfp4(x: torch.Tensor, mode: ScaleMode) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed data, scale bytes and fake-quantized values, by the steps of Quark's own export."""
    from quark.torch.export.nn.modules.realquantizer import get_real_quantizer

    spec, fake = quantizer("OCP_MXFP4Spec", mode)
    values = fake(x)
    real = get_real_quantizer(
        spec, fake, reorder=False, real_quantized=True, float_dtype=x.dtype, device=torch.device("cpu")
    )
    data = real.to_real_quantize_params(x)
    real.maybe_convert_and_transpose_scale()
    return data, real.scale, values


def unsigned_zeros(packed: torch.Tensor) -> torch.Tensor:
    codes = nibbles.unpack(packed)
    return codes.masked_fill(codes == 8, 0)


def in_range(x: torch.Tensor) -> torch.Tensor:
    """fp32 of blocks that Quark's log2 gets right, whose scale byte is above 1 in every mode, and whose amax does not
    round up to infinity in EVEN (Quark then jumps to byte 254, torchao and we go on to 253)."""
    amax = x.float().reshape(-1, 32).abs().amax(-1)
    log2 = amax.double().log2()
    exact = (amax.log2().floor() == log2.floor()) & (amax.log2().ceil() == log2.ceil())
    return x.float().reshape(-1, 32)[exact & (amax > 2.0**-110) & (amax < 1.75 * 2.0**127)]


@pytest.mark.parametrize("mode", QUARK_MODES)
def test_mxfp4_is_the_same(quark: ModuleType, sample: torch.Tensor, mode: ScaleMode):
    """In `even`, Quark's default, bf16 and fp32; in the other two, fp32. But for the sign of what rounds to zero."""
    x = in_range(sample)
    if mode is ScaleMode.EVEN:
        x = x.to(sample.dtype)
    data, scales, values = mxfp4(x, mode)
    our_data, our_scales = quantize_mx(x, "e2m1", mode)
    assert torch.equal(our_scales, scales)
    assert torch.equal(unsigned_zeros(our_data), nibbles.unpack(data))
    assert torch.equal(dequantize_mx(our_data, our_scales, "e2m1", x.dtype), values)


@pytest.mark.parametrize("mode", QUARK_MODES)
def test_mxfp8_has_the_same_values(quark: ModuleType, sample: torch.Tensor, mode: ScaleMode):
    x = in_range(sample)
    _, fake = quantizer("OCP_MXFP8E4M3Spec", mode)
    assert torch.equal(fake_quantize_mx(x, "e4m3", mode), fake(x))


def test_mxfp8_with_rounded_up_scales_is_the_same(quark: ModuleType, sample: torch.Tensor):
    from quark.torch.quantization.nn.modules.flydsl_a8w4_inference_linear import _quantize_mxfp8_1x32_eager

    x = sample.reshape(-1, 32)
    x = x[x.float().abs().amax(-1) > 2.0**-90]  # Quark holds amax at 1e-30
    data, scales = _quantize_mxfp8_1x32_eager(x)
    our_data, our_scales = quantize_mx(x, "e4m3", ScaleMode.RCEIL)
    assert torch.equal(our_scales, scales)
    assert torch.equal(our_data.view(torch.uint8), data)


def test_quark_gpu_kernels_round_half_away_from_zero(quark: ModuleType):
    """`downcast_to_mxfp` (Quark's Triton kernel, here its torch twin) parts from OCP's ties to even at every second
    midpoint: bytes made by it differ there, and only there."""
    from quark.torch.kernel.mx.triton import downcast_to_mxfp_torch

    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1:8], x[0, 8:15] = 6, midpoints, -midpoints
    theirs = dequantize_mx(*downcast_to_mxfp_torch(x, torch.uint8, -1), "e2m1")
    ours = fake_quantize_mx(x, "e2m1", ScaleMode.RCEIL)
    assert ours[0, 1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert theirs[0, 1:8].tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]


def test_quark_floor_and_ceil_of_bf16_round_log2_to_bf16(quark: ModuleType):
    """log2 of 2^-5 * 0.99 is -5.01, in bf16 -5.0: Quark's FLOOR takes the next power of two. Ours is of the number."""
    x = torch.full((1, 32), 2.0**-5 * 0.9921875, dtype=torch.bfloat16)
    _, theirs, _ = mxfp4(x, ScaleMode.FLOOR)
    _, ours = quantize_mx(x, "e2m1", ScaleMode.FLOOR)
    assert (int(theirs) - 127, int(ours) - 127) == (-5 - 2, -6 - 2)


def test_zero_blocks_have_other_scale_bytes_and_no_other_value(quark: ModuleType):
    x = torch.zeros(1, 32)
    for mode, byte in zip(QUARK_MODES, (1, 104, 104), strict=True):
        data, scales, _ = mxfp4(x, mode)
        assert scales.item() == byte
        assert quantize_mx(x, "e2m1", mode)[1].item() == 0
        assert not dequantize_mx(data, scales, "e2m1").any()
