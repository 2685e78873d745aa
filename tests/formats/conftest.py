"""Blocks to quantize, and the libraries that the formats are compared with."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

try:
    importlib.import_module("torchvision")
except ImportError:
    pass  # nothing here needs it
except (
    RuntimeError
):  # its CUDA build, from PyPI, beside a CPU torch: importing it fails, and with it transformers and Quark
    for _op in ("nms", "qnms"):  # a schema without a kernel is enough
        if not hasattr(torch.ops.torchvision, _op):
            torch.library.define(f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For all tests here."""


def float32(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def random_blocks(rows: int, seed: int = 0, exponents: tuple[int, int] = (-110, 110)) -> torch.Tensor:
    """fp32 [rows, 256]: normal numbers, each block at another power of two, some elements much smaller than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 8, 32)) * np.exp2(rng.integers(*exponents, (rows, 8, 1)))
    x *= np.exp2(-rng.integers(0, 14, x.shape) * (rng.random(x.shape) < 0.3))
    return torch.from_numpy(x.astype(np.float32).reshape(rows, 256))


def boundary_blocks() -> torch.Tensor:
    """fp32 [n, 32]: amax on and one ulp about every mantissa at which a mode's exponent steps, at all normal exponents.

    The other elements lie on and one ulp about the midpoints and values of e2m1, and two midpoints of e4m3.
    """
    mantissas = np.array([0, 1, 2, 3]) << 21  # 1, 1.25, 1.5, 1.75: all of 1/max, EVEN and FLOOR steps for e2m1
    mantissas = np.concatenate([mantissas, [0x700000, 0x780000]])  # 1.875; 1.9375: EVEN for e4m3
    exponents = np.arange(12, 254)
    base = (exponents[:, None] << 23) + mantissas
    amax = np.concatenate([base - 1, base, base + 1], axis=1).reshape(-1)
    amax = amax[amax < 0x7F800000]
    inner = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 0.2890625, 0.00390625], np.float32)
    scale = float32((amax >> 23) - 2 << 23)
    values = scale[:, None] * torch.from_numpy(inner)
    bits = values.numpy().view(np.int32)
    others = np.concatenate([bits - 1, bits, bits + 1], axis=1)[:, :31]
    sign = np.random.default_rng(1).integers(0, 2, (amax.size, 32), dtype=np.int64) << 31
    return float32(np.concatenate([amax[:, None], others], axis=1).astype(np.int64) | sign)


def every_bf16_amax() -> torch.Tensor:
    """bf16 [n, 32]: each positive finite bf16 number once as the amax, over fractions of it."""
    amax = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    fractions = torch.linspace(-1, 1, 31, dtype=torch.bfloat16)
    return torch.cat([amax[:, None], amax[:, None] * fractions], dim=1)


SAMPLES = {
    "random bf16": lambda: random_blocks(256).to(torch.bfloat16),
    "random fp32": lambda: random_blocks(256, seed=1),
    "weights bf16": lambda: random_blocks(256, seed=2, exponents=(-7, -4)).to(torch.bfloat16),
    "boundary fp32": boundary_blocks,
    "boundary bf16": lambda: boundary_blocks().to(torch.bfloat16),
    "every bf16 amax": every_bf16_amax,
}


@pytest.fixture(scope="session", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> torch.Tensor:
    """[rows, K] bf16 or fp32, K a multiple of 32."""
    return SAMPLES[request.param]()


@pytest.fixture(scope="session")
def boundaries() -> torch.Tensor:
    return boundary_blocks()


@pytest.fixture(scope="session")
def quark_module() -> ModuleType:
    """amd-quark, imported without its scan of the source of every transformers model (15 s)."""
    pytest.importorskip("quark", reason="amd-quark is not installed")
    with mock.patch.object(Path, "rglob", return_value=()):
        return importlib.import_module("quark.torch")


@pytest.fixture
def quark(quark_module: ModuleType) -> Iterator[ModuleType]:
    """amd-quark, run eagerly: it compiles its quantizers on their first call otherwise (5 s)."""
    with torch.compiler.set_stance("force_eager"):
        yield quark_module
