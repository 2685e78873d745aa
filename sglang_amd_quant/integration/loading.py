"""What the linear and the MoE method share: quantizing tensors as they arrive, and dequantized copies on a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from sglang_amd_quant.checkpoints import checks
from sglang_amd_quant.checkpoints.naming import STORED
from sglang_amd_quant.errors import CheckpointError, ShapeError, UnsupportedError
from sglang_amd_quant.formats import group_words, split_words
from sglang_amd_quant.layouts.names import STRIDED
from sglang_amd_quant.ops.packed import Weight
from sglang_amd_quant.runtime.detect import CPU, current_arch
from sglang_amd_quant.schemes import ScaleMode, Scheme
from sglang_amd_quant.tensor import MxTensor
from sglang_amd_quant.tensor import quantized as quantized_tensors

logger = logging.getLogger(__name__)

UNLOADED_SCALE: dict[torch.dtype, int] = {torch.uint8: 255, torch.int32: 0x7FC00000}
"""NaN as e8m0 and as a word of int4: what scales hold until the checkpoint fills them, so that a hole can never pass
for a weight."""

DUMMY_SCALE = 2.0**-8

COPIES_ENV = "SGLANG_AMD_MX_CPU_COPIES_GB"


def misfit() -> str:
    """Remedy where a tensor does not fit the model, which SGLang makes of config.json."""
    from sglang.srt.runtime_context import get_parallel

    ranks = get_parallel().tp_size
    if current_arch() == CPU and ranks > 1:
        return f"lower --tp {ranks}: on a CPU SGLang widens layers that it does not divide into multiples of 32"
    return "compare config.json and --tp with the checkpoint (`amd-mx inspect`)"


def check_blocks(layer: str, scheme: Scheme, what: str, k: int, parts: int = 1) -> None:
    """Scales cover blocks along K, so every rank needs whole blocks.

    Raises:
        ShapeError: K does not divide.
    """
    if k % scheme.block:
        smaller = "quantize with a smaller group, " if scheme.divisible else ""
        raise ShapeError(
            f"layer {layer}: {what} K={k * parts}" + (f" over {parts} ranks = {k}" if parts > 1 else ""),
            f"not a multiple of {scheme.block} elements a rank, the {scheme.block_name}",
            f'lower --tp, {smaller}or keep the layer bf16 with the recipe rule "{layer}": "bf16"',
        )


def new_storage(scheme: Scheme, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty weight and unloaded scales for logical [..., N, K], on torch's current device."""
    *lead, k = shape
    data_dtype, scale_dtype = STORED[scheme.weight]
    data = torch.zeros(*lead, k // scheme.pack, dtype=torch.uint8).view(data_dtype)
    return data, torch.full((*lead, k // scheme.block), UNLOADED_SCALE[scale_dtype], dtype=scale_dtype)


def quantized(
    layer: str, tensor: torch.Tensor, scheme: Scheme, mode: ScaleMode | None, device: torch.device
) -> list[torch.Tensor]:
    """A checkpoint tensor as [data] if it is quantized already, else quantized on `device` to [data, scales].

    Raises:
        CheckpointError: it holds NaN, or Inf, which would saturate and be served as a number.
    """
    if tensor.element_size() == 1:
        return [tensor]
    with one_thread(device):
        tensor = tensor.to(device)
        if tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            raise CheckpointError(
                f"layer {layer}: weight {list(tensor.shape)}",
                "holds NaN or Inf",
                "mend the checkpoint, or keep the layer in bf16 with a recipe",
            )
        return quantized_tensors(tensor, scheme, mode)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """While open, torch works with one thread, if `device` is a CPU.

    Formats run some twenty short steps over a tensor, after each of which torch's threads wait for each other. Where
    another process keeps a core busy they mostly wait: 2 threads on 2 such cores took 50 times as long as one.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loading(layer: str, tensor: torch.Tensor, load: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call one of SGLang's loaders; its assertions name no layer, so say which one and what shape came.

    Raises:
        CheckpointError: the loader refused the tensor.
    """
    try:
        load(*args, **kwargs)
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        detail = str(error).strip().splitlines()
        raise CheckpointError(
            f"layer {layer}: tensor {tuple(tensor.shape)} of {tensor.dtype}",
            "does not fit the model's parameter" + (f" ({detail[0]})" if detail else ""),
            misfit(),
        ) from error


def restored(weight: Weight) -> list[torch.Tensor]:
    """Data and scales in a checkpoint's order again; unloaded where a kernel packed them: all of it must come anew."""
    if isinstance(weight, MxTensor):
        return weight.to_layout(STRIDED).tensors
    with weight.tensors[0].device:
        return list(new_storage(weight.scheme, *weight.shape))


def check_loaded(layer: str, data: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Every scale and bias must have come, and neither they nor weights may be NaN.

    Weights are looked through here and not as they come, since here a rank has only its own, and on its device.

    Raises:
        CheckpointError: there are NaN scales or biases (in the checkpoint, or because a tensor never came), or NaN
            weights.
    """
    nan = split_words(scales)[0].isnan() if scales.dtype == torch.int32 else scales == UNLOADED_SCALE[scales.dtype]
    holes = {"weight scales": nan} | ({} if bias is None else {"biases": bias.isnan()})
    for what, where in holes.items():
        missing = int(torch.count_nonzero(where))  # sum() would widen all of them to int64
        if missing:
            raise CheckpointError(
                f"layer {layer}: {missing} of {where.numel()} {what}",
                "are NaN or were never loaded",
                "check the checkpoint with `amd-mx inspect`",
            )
    checks.codes(f"layer {layer}: this rank's weight", data)


def static_scale(layer: str, scales: torch.Tensor | None) -> torch.Tensor | None:
    """The one scale of a layer's static fp8 activations: one input feeds all parts of a fused layer, so the largest.

    Raises:
        CheckpointError: a scale never came, or is not positive and finite.
    """
    if scales is None:
        return None
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise CheckpointError(
            f"layer {layer}: input_scale {scales.flatten().tolist()[:4]}",
            "missing, or not positive and finite",
            "check the checkpoint with `amd-mx inspect`",
        )
    return scales.data.float().max()


def fill_dummy(data: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """`--load-format dummy`: random codes at scales that keep activations small, and no biases."""
    data.view(torch.uint8).random_(0, 0x70).bitwise_and_(0x77)  # no e4m3 NaN (0x7f); e2m1 and int4 codes 0..7
    scale = torch.tensor(DUMMY_SCALE)
    scales.fill_(int(group_words(scale) if scales.dtype == torch.int32 else 127 + scale.log2()))
    if bias is not None:
        bias.zero_()


def is_dummy_load() -> bool:
    """Whether this server was told to invent its weights."""
    from sglang.srt.runtime_context import get_server_args

    return str(getattr(get_server_args(), "load_format", "")).endswith("dummy")


class CopyBudget:
    """How many bytes of dequantized fp32 copies a CPU process may keep: by default a quarter of the free memory."""

    def __init__(self) -> None:
        self._left: float | None = None

    def take(self, size: int) -> bool:
        """Whether `size` more bytes may be kept."""
        if self._left is None:
            self._left = self._given()
            logger.info(
                "amd_mx keeps up to %.1f GB of dequantized weights on the CPU (%s)", self._left / 1e9, COPIES_ENV
            )
        if size > self._left:
            return False
        self._left -= size
        return True

    def _given(self) -> float:
        text = os.environ.get(COPIES_ENV)
        if not text:
            return psutil.virtual_memory().available / 4
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
        if not gigabytes >= 0:
            raise UnsupportedError(f"{COPIES_ENV}={text}", "no number of gigabytes", "write one, as 8, or unset it")
        return gigabytes * 1e9


BUDGET = CopyBudget()


class Dequantized:
    """fp32 values of a quantized weight; on a CPU they are kept while the budget lasts, for speed."""

    def __init__(self, weight: MxTensor) -> None:
        self._weight = weight
        self._kept: dict[int | None, torch.Tensor] = {}

    def __call__(self, expert: int | None = None) -> torch.Tensor:
        """[N, K] in fp32, of one expert where the weight is [E, N, K]."""
        if expert in self._kept:
            return self._kept[expert]
        weight = self._weight if expert is None else self._weight.expert(expert)
        with one_thread(weight.device):
            values = weight.dequantize()
        if values.device.type == "cpu" and BUDGET.take(values.numel() * 4):
            self._kept[expert] = values
        return values
