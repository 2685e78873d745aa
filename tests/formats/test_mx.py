"""Shapes, strides, dtypes, corners, errors, and what `quantize_mx` promises about memory and compilation."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.formats import dequantize_mx, fake_quantize_mx, pieces, quantize_mx
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, ScaleMode

ELEMENTS = {"e2m1": 2, "e4m3": 1}  # -> elements per stored item


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("shape", [(32,), (0, 64), (5, 0), (3, 0, 32), (1, 1, 1, 32), (2, 3, 5, 96)], ids=str)
def test_shapes(element: str, shape: tuple[int, ...]):
    x = randn(*shape)
    data, scales = quantize_mx(x, element)
    assert data.shape == (*shape[:-1], shape[-1] // ELEMENTS[element])
    assert scales.shape == (*shape[:-1], shape[-1] // 32)
    assert data.dtype == {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn}[element]
    assert scales.dtype == torch.uint8
    assert data.is_contiguous()
    assert scales.is_contiguous()
    assert dequantize_mx(data, scales, element).shape == x.shape


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT,
        lambda x: x[:, ::2],
        lambda x: x[..., 32:96],
        lambda x: x.flip(-1)[..., ::2],
        lambda x: x.permute(1, 0, 2),
        lambda x: x[:1].expand(7, -1, -1),
    ],
    ids=["transposed", "every other row", "columns", "every other column", "permuted", "expanded"],
)
def test_strides_do_not_matter(element: str, view):
    x = view(randn(4, 128, 128, dtype=torch.bfloat16))
    assert not x.is_contiguous()
    data, scales = quantize_mx(x, element)
    expected, expected_scales = quantize_mx(x.contiguous(), element)
    assert equal(data, expected)
    assert equal(scales, expected_scales)
    back = dequantize_mx(data.mT.contiguous().mT, scales.mT.contiguous().mT, element)
    assert equal(back, dequantize_mx(data, scales, element))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_dtypes_go_through_fp32(element: str, dtype: torch.dtype):
    x = randn(8, 64, dtype=dtype)
    kept = x.clone()
    for a, b in zip(quantize_mx(x, element), quantize_mx(x.float(), element), strict=True):
        assert equal(a, b)
    assert equal(x, kept), "the input was written to"
    assert fake_quantize_mx(x, element).dtype == dtype
    assert equal(fake_quantize_mx(x, element), fake_quantize_mx(x.float(), element).to(dtype))


@pytest.mark.parametrize("element", ELEMENTS)
def test_parameters_that_require_grad(element: str):
    x = torch.nn.Parameter(randn(4, 64))
    assert not fake_quantize_mx(x, element).requires_grad
    assert equal(fake_quantize_mx(x, element), fake_quantize_mx(x.data, element))


@pytest.mark.parametrize("element", ELEMENTS)
def test_default_modes_and_names_of_modes(element: str):
    x = randn(16, 64)
    default = DEFAULT_SCALE_MODE[element]
    for mode in (default, default.value):
        assert equal(quantize_mx(x, element, mode)[1], quantize_mx(x, element)[1])


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", ELEMENTS)
def test_nan_marks_its_block_only(element: str, mode: ScaleMode):
    x = randn(2, 96)
    x[0, 40] = torch.nan
    x[1, 64] = -torch.nan
    data, scales = quantize_mx(x, element, mode)
    assert (scales == 255).nonzero().tolist() == [[0, 1], [1, 2]]
    nan = dequantize_mx(data, scales, element).isnan().reshape(2, 3, 32)
    assert torch.equal(nan, (scales == 255).unsqueeze(-1).expand_as(nan))


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_inf_stays_inf_and_its_neighbours_keep_their_values(element: str, mode: ScaleMode, sign: int):
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([sign * torch.inf, 2.0**127, -(2.0**126), 1.0])
    back = fake_quantize_mx(x, element, mode)
    assert back[0, :4].tolist() == [sign * torch.inf, 2.0**127, -(2.0**126), 0]


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", ELEMENTS)
def test_zeros_keep_their_sign(element: str, mode: ScaleMode):
    x = torch.tensor([0.0, -0.0]).repeat(1, 16)
    data, scales = quantize_mx(x, element, mode)
    assert scales.item() == 0
    back = dequantize_mx(data, scales, element)
    assert not back.any()
    assert torch.equal(back.signbit(), x.signbit())


@pytest.mark.parametrize("mode", ScaleMode)
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_smallest_blocks_use_the_scale_2_to_the_minus_127_exactly(element: str, mode: ScaleMode):
    smallest = {"e2m1": 2.0**-1, "e4m3": 2.0**-9}[element]
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([1, -2, 3]) * smallest * 2.0**-127
    data, scales = quantize_mx(x, element, mode)
    assert scales.item() == 0
    assert torch.equal(dequantize_mx(data, scales, element), x)


@pytest.mark.parametrize("element", ELEMENTS)
def test_fp64_results_do_not_overflow_at_the_largest_scale(element: str):
    data = torch.full((1, 16), 0x77, dtype=torch.uint8)  # all 6, the largest e2m1
    if element == "e4m3":
        data = torch.full((1, 32), 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((1, 1), 254, dtype=torch.uint8)
    largest = {"e2m1": 6.0, "e4m3": 448.0}[element]
    assert dequantize_mx(data, scales, element, torch.float64)[0, 0].item() == largest * 2.0**127
    assert dequantize_mx(data, scales, element, torch.float32).isinf().all()


BAD = {
    "K": (lambda: quantize_mx(randn(4, 33), "e2m1"), ShapeError, r"tensor \[4, 33\]: K is not a multiple of 32"),
    "scalar": (lambda: quantize_mx(torch.tensor(1.0), "e4m3"), ShapeError, r"tensor \[\]"),
    "element": (lambda: quantize_mx(randn(1, 32), "e3m2"), SchemeError, "element 'e3m2'.*e2m1, e4m3"),
    "mode": (lambda: quantize_mx(randn(1, 32), "e2m1", "up"), SchemeError, "scale mode 'up'.*floor, rceil, ceil, even"),
    "integers": (lambda: quantize_mx(torch.ones(1, 32, dtype=torch.int8), "e2m1"), SchemeError, "torch.int8"),
    "scales of another tensor": (
        lambda: dequantize_mx(quantize_mx(randn(4, 64), "e2m1")[0], torch.ones(4, 1, dtype=torch.uint8), "e2m1"),
        ShapeError,
        r"e2m1 data \[4, 32\] with scales \[4, 1\]",
    ),
    "rows": (
        lambda: dequantize_mx(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.uint8), "e2m1"),
        ShapeError,
        r"\[4, 16\] with scales \[3, 1\]",
    ),
    "bytes for e4m3": (
        lambda: dequantize_mx(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8), "e4m3"),
        SchemeError,
        "torch.float8_e4m3fn",
    ),
    "float scales": (
        lambda: dequantize_mx(torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1), "e2m1"),
        SchemeError,
        "torch.float32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(case: str):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            fresh = isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs
            if fresh and func is not torch.ops.aten.empty.memory_format:  # those are the results
                self.nbytes = max(self.nbytes, t.nbytes)
        return out


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_temporaries_do_not_grow_with_the_tensor(element: str, transposed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "PER_THREAD", 1 << 12)
    x = randn(3, 64, 640, dtype=torch.bfloat16)
    x = x.mT if transposed else x
    with Largest() as largest:
        data, scales = quantize_mx(x, element)
        back = dequantize_mx(data, scales, element, torch.bfloat16)
    assert 0 < largest.nbytes <= 4 * (1 << 12)  # fp32 of one piece, one thread
    monkeypatch.undo()
    whole, whole_scales = quantize_mx(x, element)
    assert equal(data, whole)
    assert equal(scales, whole_scales)
    assert equal(back, dequantize_mx(whole, whole_scales, element, torch.bfloat16))


def test_pieces_of_a_single_long_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "PER_THREAD", 64)
    x = randn(1, 1, 1024)
    assert all(p.numel() <= 64 for (p,) in pieces.pieces(x.unflatten(-1, (32, 32))))
    with Largest() as largest:
        sliced = quantize_mx(x, "e2m1")
    assert largest.nbytes <= 64 * 4
    monkeypatch.undo()
    assert all(equal(a, b) for a, b in zip(sliced, quantize_mx(x, "e2m1"), strict=True))


@pytest.mark.parametrize("element", ELEMENTS)
def test_no_value_is_read_by_the_host(element: str):
    """On the meta device there are none."""
    data, scales = quantize_mx(torch.empty(4, 64, device="meta", dtype=torch.bfloat16), element)
    assert dequantize_mx(data, scales, element, torch.bfloat16).shape == (4, 64)


@pytest.mark.parametrize("element", ELEMENTS)
def test_compiles_whole(element: str):
    x = randn(4, 256, dtype=torch.bfloat16)
    compiled = torch.compile(fake_quantize_mx, backend="aot_eager", fullgraph=True)
    assert equal(compiled(x, element), fake_quantize_mx(x, element))
