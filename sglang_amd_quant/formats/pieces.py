"""Cut tensors into pieces that stay in cache, so that temporaries are fast and do not grow with the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PER_THREAD = 1 << 18
"""Elements a CPU thread works on at a time: 1 MiB as fp32, which the L2 and L3 of a server core hold."""

MOST = 1 << 21
"""Elements of a piece at most, on any device: 8 MiB as fp32, of which no format keeps more than six alive at once."""


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching slices of `tensors`, which agree in every dimension but the last; that one is never cut.

    Slices are views, so writing to them writes to `tensors`. While torch.compile traces, everything is one piece: the
    compiler fuses, and has no temporaries to bound. The cuts depend on shapes only, so a graph can be captured.
    """
    if torch.compiler.is_compiling():
        yield tensors
        return
    threads = torch.get_num_threads() if tensors[0].device.type == "cpu" else MOST
    yield from _cut(tensors, min(MOST, PER_THREAD * threads))


def _cut(tensors: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    size = max(t.numel() for t in tensors)
    if size <= limit or tensors[0].dim() == 1:
        yield tensors
    elif rows := limit // (size // tensors[0].shape[0]):
        yield from zip(*(t.split(rows) for t in tensors), strict=True)
    else:
        for slices in zip(*(t.unbind() for t in tensors), strict=True):
            yield from _cut(slices, limit)
