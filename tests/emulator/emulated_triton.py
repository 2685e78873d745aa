"""Triton kernels on CPU tensors: inside `emulated_triton(arch)`, `kernel[grid](...)` compiles for that architecture and
runs in the emulator. What Triton's interpreter is for, but it is the machine code that runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from emulator import CodeObject, Counters, launch
from triton.runtime.jit import JITFunction

from sglang_amd_quant.toolchain.triton_aot import Call, Compiled, call, compile_variant


@dataclass(frozen=True)
class Launch:
    """One launch that was made: what was compiled for it, and what it did (None if it was only compiled)."""

    compiled: Compiled
    counters: Counters | None


@contextmanager
def emulated_triton(arch: str, **options: Any) -> Iterator[list[Launch]]:
    """Launches of Triton kernels go to the emulator; for sm_90 they are only compiled, and leave their outputs alone.

    options: of `emulator.launch`. Yields the launches made so far.
    """
    made: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        variant, passed = call(self, arch, *args, **kwargs)
        compiled = _compiled(pickle.dumps(variant))
        if not arch.startswith("gfx"):
            made.append(Launch(compiled, None))
            return
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        blocks = grid(bound) if callable(grid) else grid
        code = CodeObject(compiled.code)
        explicit = sum(not a.kind.startswith("hidden") for a in code.kernel(compiled.kernel).arguments)
        values = [_memory(v) if isinstance(v, torch.Tensor) else v for v in passed]
        values += [None] * (explicit - len(values))  # Triton's scratch pointers
        shape = tuple(map(int, blocks))
        counters = launch(code, compiled.kernel, shape, (compiled.threads,), values, lds_bytes=compiled.lds, **options)
        made.append(Launch(compiled, counters))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield made
    finally:
        JITFunction.run = original


@cache
def _compiled(variant: bytes) -> Compiled:
    loaded: Call = pickle.loads(variant)
    return compile_variant(loaded)


def _memory(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes, from its first element to its last, in place."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = (last + 1) * tensor.itemsize if tensor.numel() else 0
    start = tensor.storage_offset() * tensor.itemsize
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())[start : start + nbytes].numpy()
