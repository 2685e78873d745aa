"""Moving nibbles about within int32 words, many words at a time."""

from __future__ import annotations

import torch

PAIRED = ((0x00F000F0, 4), (0x0000FF00, 8))
"""Exchanges that take a word's nibbles from the order 0..7 to 0, 2, 4, 6, 1, 3, 5, 7; in reverse they take them back.

The first swaps nibbles 1 with 2 and 5 with 6, the second swaps the two middle bytes.
"""

TRANSPOSED = ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F))
"""Steps of an 8 x 8 transpose by halves: distance in words, and the nibbles that leave the upper word's low places."""


def as_words(octets: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 4 W] as int32 [..., W], little-endian; a view where memory allows it."""
    if not octets.is_contiguous() or octets.storage_offset() % 4:
        octets = octets.clone(memory_format=torch.contiguous_format)
    return octets.view(-1).view(torch.int32).view(*octets.shape[:-1], octets.shape[-1] // 4)


def as_octets(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_words`."""
    return words.contiguous().view(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def exchange(words: torch.Tensor, mask: int, distance: int) -> torch.Tensor:
    """Swap the bits under `mask` with those `distance` bits above them, in place; its own inverse."""
    differing = (words >> distance).bitwise_xor_(words).bitwise_and_(mask)
    words ^= differing
    words ^= differing << distance
    return words


def pair(words: torch.Tensor) -> torch.Tensor:
    """Nibbles 0..7 of each int32 word -> 0, 2, 4, 6, 1, 3, 5, 7, as a new tensor."""
    words = words.clone(memory_format=torch.contiguous_format)
    for mask, distance in PAIRED:
        exchange(words, mask, distance)
    return words


def unpair(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pair`."""
    words = words.clone(memory_format=torch.contiguous_format)
    for mask, distance in reversed(PAIRED):
        exchange(words, mask, distance)
    return words


def transpose(words: torch.Tensor) -> torch.Tensor:
    """int32 [8, ...]: nibble i of word j becomes nibble j of word i, as a new tensor; its own inverse."""
    words = words.clone(memory_format=torch.contiguous_format)
    for distance, mask in TRANSPOSED:
        low, high = words.unflatten(0, (-1, 2, distance)).unbind(1)
        shift = 4 * distance
        differing = (low >> shift).bitwise_xor_(high).bitwise_and_(mask)
        high ^= differing
        low ^= differing << shift
    return words


def spread(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., W] -> uint8 [..., 8 W], one nibble to a byte, lowest first."""
    octets = as_octets(words)
    return torch.stack((octets & 0x0F, octets >> 4), dim=-1).flatten(-2)


def gather(nibbles: torch.Tensor) -> torch.Tensor:
    """uint8 nibbles [..., 8 W] -> int32 words [..., W]; the inverse of `spread`."""
    return as_words(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)
