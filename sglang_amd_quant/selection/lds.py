"""How much LDS a software-pipelined Triton GEMM needs: the estimate of aiter's `pick_gemm_num_stages` (#3580).

It is an estimate: a padded async copy often needs less, so an entry that was *measured* may exceed it.
"""

from __future__ import annotations

from sglang_amd_quant.selection.arch import ARCHES

_BANKS = 32
"""LDS banks: rows are padded so that consecutive ones start on other banks."""


def _bank_padded(n: int) -> int:
    """n elements with 4 after every 32 of them, none after the last."""
    return n + 4 * (n // _BANKS) - (0 if n % _BANKS else 4)


def _row_padded(n: int, row: int) -> int:
    """n elements with 8 after every row, none after the last."""
    return n + 8 * (n // row) - (0 if n % row else 8)


def lds_bytes(
    block_m: int, block_n: int, block_k: int, bits_a: int, bits_b: int, num_stages: int, async_copy: bool
) -> int:
    """Estimated LDS of a tile, in bytes.

    Args:
        block_m, block_n, block_k: tile in elements.
        bits_a, bits_b: bits per element of activations and weights.
        num_stages: tiles in flight.
        async_copy: the copy into LDS is asynchronous: every stage is held, with padding; otherwise one stage is in
            registers (or, with a single stage, A and B share the space).
    """
    a, b = block_m * block_k, block_n * block_k
    if async_copy:
        a, b = (max(_bank_padded(n), _row_padded(n, block_k)) for n in (a, b))
        return num_stages * (a * bits_a + b * bits_b) // 8
    a, b = a * bits_a // 8, b * bits_b // 8
    return (a + b) * (num_stages - 1) if num_stages > 1 else max(a, b)


def fitting_stages(
    arch: str, block_m: int, block_n: int, block_k: int, bits_a: int, bits_b: int, at_most: int = 2
) -> int:
    """The most stages, up to `at_most`, whose estimate fits the LDS of an arch; 0 if not even one does.

    An arch without LDS figures gets `at_most`: nothing is known against it.
    """
    facts = ARCHES.get(arch)
    if facts is None or not facts.lds_bytes:
        return at_most
    for stages in range(at_most, 0, -1):
        need = lds_bytes(block_m, block_n, block_k, bits_a, bits_b, stages, facts.async_copy)
        if need <= facts.lds_bytes:
            return stages
    return 0
