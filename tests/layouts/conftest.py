"""Where each element of a matrix lies in storage, written down a second time: from the published closed forms.

The formulas are those of aiter (shuffle_weight, e8m0_shuffle), triton_kernels (CDNA4_SCALE), SGLang 0.5.23
(shuffle_mxfp8_weight), vLLM's ExLlama order, AutoAWQ and AutoGPTQ, and of mma's fragments (PTX ISA); none is derived
from the code under test.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

BYTE_OFFSETS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "strided": lambda n, k, cols: n * cols + k,
    "cdna4_scale": lambda n, k, cols: (
        (n // 32) * 32 * cols + (k // 8) * 256 + (k % 4) * 64 + (n % 16) * 4 + ((k % 8) // 4) * 2 + (n % 32) // 16
    ),
    "preshuffle": lambda n, k, cols: (
        (n // 16) * 16 * cols + (k // 32) * 512 + ((k % 32) // 16) * 256 + (n % 16) * 16 + k % 16
    ),
    "mxfp8_lane": lambda n, k, cols: (
        (n // 16) * 16 * cols
        + (k // 128) * 2048
        + ((k // 32) % 2) * 1024
        + ((k // 16) % 2) * 512
        + (n % 16) * 32
        + ((k // 64) % 2) * 16
        + k % 16
    ),
    "mma_tile": lambda n, k, cols: (
        (n // 16) * 16 * cols
        + (k // 64) * 1024
        + (n % 16 // 8) * 512
        + (n % 8) * 64
        + (k % 32 // 8) * 16
        + (k % 64 // 32) * 8
        + k % 8
    ),
    "cdna3_e2m1": lambda n, k, cols: (
        (n // 16) * 16 * cols + (k // 64) * 1024 + (k % 16 // 4) * 256 + (n % 16) * 16 + (k % 64 // 16) * 4 + k % 4
    ),
    "cdna3_e4m3": lambda n, k, cols: (
        (n // 16) * 16 * cols + (k // 64) * 1024 + (k % 32 // 8) * 256 + (n % 16) * 16 + (k % 64 // 32) * 8 + k % 8
    ),
    "tile_scale": lambda n, k, cols: (n // 16) * 16 * cols + (k // 4) * 64 + (n % 16) * 4 + k % 4,
    "tile_group": lambda n, k, cols: (n // 16) * 16 * cols + k * 16 + n % 16,
    "rdna_int4": lambda n, k, cols: (n // 16) * 16 * cols + (k // 16) * 256 + (n % 16) * 16 + k % 16,
    "mma_int4": lambda n, k, cols: (
        (n // 16) * 16 * cols
        + (k // 32) * 512
        + (n % 8) * 64
        + (k % 4) * 16
        + (k % 32 // 16) * 8
        + (n % 16 // 8) * 4
        + k % 16 // 4
    ),
    "mma_scale": lambda n, k, cols: (n // 16) * 16 * cols + (k // 2) * 32 + (n % 8) * 4 + (n % 16 // 8) * 2 + k % 2,
}
"""Byte that holds (n, column) of a matrix whose rows have been padded to `cols` columns."""
BYTE_OFFSETS["cdna4_scale_256"] = BYTE_OFFSETS["cdna4_scale"]
BYTE_OFFSETS["cdna_int4"] = BYTE_OFFSETS["cdna3_e2m1"]

NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Element held by nibble slot 0..7 of an ExLlama or AutoAWQ word."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For all tests here."""


@pytest.fixture(scope="session")
def byte_offsets():
    return BYTE_OFFSETS


@pytest.fixture(scope="session")
def pack_words():
    """Nibbles uint8 [..., 8 * W] -> int32 [..., W] by the shifts of AutoAWQ's and AutoGPTQ's `pack`."""

    def pack(nibbles: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
        words = np.zeros((*nibbles.shape[:-1], nibbles.shape[-1] // 8), dtype=np.uint32)
        for slot, element in enumerate(order):
            words |= nibbles.numpy()[..., element::8].astype(np.uint32) << np.uint32(4 * slot)
        return torch.from_numpy(words.view(np.int32))

    return pack


@pytest.fixture(scope="session")
def nibble_order():
    return NIBBLE_ORDER
