"""On an accelerator: the bits of the CPU, also from a captured graph, which no host read would survive."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.formats import (
    dequantize_int4,
    dequantize_mx,
    find_nan,
    mx_fn_to_fnuz,
    quantize_fp8_static,
    quantize_int4,
    quantize_mx,
)
from sglang_amd_quant.schemes import ScaleMode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator that torch sees")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_same_bits_as_on_the_cpu(sample: torch.Tensor, element: str, mode: ScaleMode):
    data, scales = quantize_mx(sample, element, mode)
    gpu_data, gpu_scales = quantize_mx(sample.cuda(), element, mode)
    assert same_bits(gpu_scales, scales)
    assert same_bits(gpu_data, data)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        back = dequantize_mx(gpu_data, gpu_scales, element, dtype)
        assert same_bits(back, dequantize_mx(data, scales, element, dtype))


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_every_code_decodes_as_on_the_cpu(element: str):
    data = torch.arange(256, dtype=torch.uint8).reshape(1, 256).expand(256, 256).contiguous()
    data = data if element == "e2m1" else data.view(torch.float8_e4m3fn)
    per_row = {"e2m1": 16, "e4m3": 8}[element]
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1).expand(256, per_row).contiguous()
    cpu = dequantize_mx(data, scales, element)
    gpu = dequantize_mx(data.cuda(), scales.cuda(), element).cpu()
    assert torch.equal(gpu.isnan(), cpu.isnan())
    assert torch.equal(gpu.nan_to_num(), cpu.nan_to_num())


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_and_fp8(symmetric: bool):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    out, gpu = quantize_int4(x, 64, symmetric), quantize_int4(x.cuda(), 64, symmetric)
    assert all(same_bits(a, b) for a, b in zip(gpu, out, strict=True))
    assert same_bits(dequantize_int4(*gpu), dequantize_int4(*out))
    scale = torch.tensor(0.03)
    assert same_bits(quantize_fp8_static(x.cuda(), scale.cuda()), quantize_fp8_static(x, scale))
    fnuz = mx_fn_to_fnuz(*quantize_mx(x, "e4m3"))
    assert all(same_bits(a, b) for a, b in zip(mx_fn_to_fnuz(*quantize_mx(x.cuda(), "e4m3")), fnuz, strict=True))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_find_nan(code: int):
    """In weights larger than what is reduced at once."""
    data = torch.full((3, 1 << 11, 1 << 11), 0x7E, dtype=torch.uint8, device="cuda")
    assert find_nan(data.view(torch.float8_e4m3fn)) is None
    data[2, 1000, 7] = code
    assert find_nan(data.view(torch.float8_e4m3fn)) == (2, 1000, 7)


@pytest.mark.parametrize("element", ["e2m1", "e4m3"])
def test_a_captured_graph_replays_on_new_values(element: str):
    """Larger than one piece, so the cuts are captured too."""
    x = torch.randn(5, 1024, 512, dtype=torch.bfloat16, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        data, scales = quantize_mx(x, element)
        return data, scales, dequantize_mx(data, scales, element, torch.bfloat16), quantize_fp8_static(x, scale)

    scale = torch.tensor(0.03, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.normal_(0, 3)
    graph.replay()
    assert all(same_bits(a, b) for a, b in zip(captured, run(), strict=True))
