"""Quantization on a Hopper GPU, whose conversions no emulator runs: bit for bit what the twin in torch gives."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sglang_amd_quant.kernels.triton.mx_codes import e2m1_of_halves
from sglang_amd_quant.kernels.triton.quant_mx import Front, quant_mx, quant_mx_torch

from tests.kernels.sm90 import GPU

OUTS = [
    ("e4m3", "mx"),
    ("e2m1", "mx"),
    (None, "row"),
    ("e2m1", "row"),
    ("e4m3", "row"),
    ("e4m3", "bf16"),
    ("e2m1", "bf16"),
]


def same(made: torch.Tensor | None, want: torch.Tensor | None, nothing: torch.Tensor) -> None:
    """Equal but where `nothing` has a value."""
    if made is None or want is None:
        assert made is want
        return
    kept = ~nothing.expand(made.shape[0], -1).repeat_interleave(made.shape[1] // nothing.shape[1], 1)
    assert torch.equal(
        made.view(torch.uint8).view(*made.shape, -1)[kept], want.view(torch.uint8).view(*made.shape, -1)[kept]
    )


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 32), (7, 160), (5, 2880), (64, 6144), (700, 2880), (520, 4096), (515, 7168)])
@pytest.mark.parametrize(("element", "out"), OUTS)
def test_codes_are_the_twins(element: str | None, out: str, m: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(k + m)
    steps = torch.randint(-12, 9, (m, k // 32, 1), generator=g, device="cuda")
    x = (torch.randn(m, k // 32, 32, generator=g, device="cuda") * torch.exp2(steps)).flatten(1)
    x[:, ::5] = torch.randint(-12, 13, x[:, ::5].shape, generator=g, device="cuda") / 4  # many of them in the middle
    x = x.clamp(-6e4, 6e4).to(dtype)
    if m > 1:
        x[1, 3], x[0, :32] = torch.nan, 0
    made, want = quant_mx(x, element, out, arch="sm_90"), quant_mx_torch(x, element, out)
    blocks = x.unflatten(1, (-1, 32)).isnan().any(-1)
    nothing = blocks.any(1, keepdim=True) if out == "row" else blocks
    same(made[0], want[0], nothing)
    if made[1] is not None:
        torch.testing.assert_close(made[1], want[1], rtol=0, atol=0, equal_nan=True)


@GPU
@pytest.mark.parametrize(("m", "k"), [(1, 32), (7, 160), (5, 2880), (64, 6144), (700, 2880), (520, 4096), (515, 7168)])
@pytest.mark.parametrize("element", [None, "e2m1"])
def test_rows_are_in_the_order_of_weights(element: str | None, m: int, k: int) -> None:
    """And what fills them up to 64 elements is zero, whatever the memory held before."""
    before = torch.full((m, -(-k // 64) * 64), 0xFF, dtype=torch.uint8, device="cuda")
    del before
    x = torch.randn(m, k, generator=torch.Generator("cuda").manual_seed(k), device="cuda").bfloat16()
    made, want = (quant_mx(x, element, "row", arch="sm_90", ordered=True),
                  quant_mx_torch(x, element, "row", ordered=True))  # fmt: skip
    assert torch.equal(made[0].view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(made[1], want[1])


@GPU
def test_halves_are_rounded_as_twins_round_them() -> None:
    """Every finite fp16 up to 8, both ways: none of them may go to another code."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(low, high, codes, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(codes + at, e2m1_of_halves(tl.load(low + at), tl.load(high + at)))

    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16).cuda().float()
    halves = halves.where(halves.abs() <= 8, 0.0)
    codes = torch.empty(1 << 16, dtype=torch.uint8, device="cuda")
    kernel[(1,)](halves, halves.flip(0), codes, 1 << 16, num_warps=16)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device="cuda")
    size = halves.abs()
    want = torch.bucketize(size, middles) + (size[:, None] == middles[1::2]).any(1) | halves.signbit().long() << 3
    assert torch.equal(codes.long(), want | want.flip(0) << 4)


@GPU
@pytest.mark.parametrize("kind", ["silu", "swigluoai", "rmsnorm"])
@pytest.mark.parametrize(("element", "out"), OUTS)
@pytest.mark.parametrize("m", [9, 600])
def test_fronts(kind: str, element: str | None, out: str, m: int) -> None:
    """exp and rsqrt are good to a few ulps of fp32 on either side, so hardly a value is rounded the other way."""
    k = 2880
    weight = torch.rand(k, device="cuda").bfloat16() if kind == "rmsnorm" else None
    front = Front(kind, kind == "swigluoai", 7.0 if kind == "swigluoai" else None, weight=weight)
    x = torch.randn(m, k if kind == "rmsnorm" else 2 * k, device="cuda").bfloat16()
    made, want = quant_mx(x, element, out, front=front, arch="sm_90"), quant_mx_torch(x, element, out, front=front)
    differ = made[0].view(torch.uint8) != want[0].view(torch.uint8)
    assert differ.float().mean() < 0.01
