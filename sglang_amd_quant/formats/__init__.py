"""The numbers: quantize and dequantize in torch, on any device."""

from sglang_amd_quant.formats.mx import dequantize_mx, fake_quantize_mx, quantize_mx

__all__ = ["dequantize_mx", "fake_quantize_mx", "quantize_mx"]
