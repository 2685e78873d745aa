"""Values equal to transformers' own conversion of gpt-oss checkpoints, for every byte under every scale."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.formats import dequantize_mx


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dequantizes_as_transformers(dtype: torch.dtype):
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).expand(2, 255, 16).contiguous()
    theirs = convert(blocks, scales, dtype=dtype)  # [E, K, N]
    ours = dequantize_mx(blocks.flatten(-2), scales, "e2m1", dtype)
    assert torch.equal(ours.mT, theirs)
    assert torch.equal(ours.mT.signbit(), theirs.signbit())


def test_nan_scale_is_nan():
    """transformers reads byte 255 as 2^128; OCP says NaN, and so do we."""
    nan = dequantize_mx(torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 255, dtype=torch.uint8), "e2m1")
    assert nan.isnan().all()
