"""Writing safetensors shards whose tensors are all known before any is made: each part goes to its place at once, so
that no more than that part is ever held, and whole shards of a run that was killed are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from sglang_amd_quant.checkpoints.folder import DTYPES, INDEX
from sglang_amd_quant.checkpoints.plan import Output

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8


@dataclass(frozen=True)
class Shard:
    """One file to be: name, header bytes, and where each tensor starts."""

    file: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int

    @classmethod
    def of(cls, file: str, outputs: Iterable[Output]) -> Shard:
        """Lay tensors out by falling item size, which aligns each to its own (as safetensors' writer does)."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        offsets: dict[str, int] = {}
        for output in sorted(outputs, key=lambda output: -output.dtype.itemsize):
            offsets[output.name], end = end, end + output.nbytes
            header[output.name] = {
                "dtype": _NAMES[output.dtype],
                "shape": output.shape,
                "data_offsets": [offsets[output.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGN)
        raw = len(text).to_bytes(8, "little") + text
        return cls(file, raw, {name: len(raw) + start for name, start in offsets.items()}, len(raw) + end)


def plan_shards(groups: Iterable[tuple[Output, ...]], max_bytes: int) -> list[Shard]:
    """Fill shards in order; the outputs of one group share a shard."""
    shards: list[list[Output]] = [[]]
    size = 0
    for group in groups:
        nbytes = sum(output.nbytes for output in group)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(group)
        size += nbytes
    return [Shard.of(f"model-{i:05d}-of-{len(shards):05d}.safetensors", s) for i, s in enumerate(shards, 1)]


def write_index(folder: Path, shards: list[Shard]) -> None:
    """model.safetensors.index.json over finished shards."""
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.file for shard in shards for name in shard.starts}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class ShardWriter:
    """Writes one shard under a temporary name; leaving the `with` block without an error gives it its own."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path, self._shard = folder / shard.file, shard
        self._temporary = self._path.with_suffix(".tmp")
        self._file: BinaryIO

    @property
    def is_done(self) -> bool:
        """Whether an earlier run finished this shard."""
        if not self._path.is_file() or self._path.stat().st_size != self._shard.nbytes:
            return False
        with self._path.open("rb") as file:
            return file.read(len(self._shard.header)) == self._shard.header

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        self._file.write(self._shard.header)
        self._file.truncate(self._shard.nbytes)
        self._file.flush()
        return self

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Write a tensor, or the part of it that starts at its byte `first`. Several threads may."""
        left = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        at = self._shard.starts[name] + first
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, at)
                left, at = left[done:], at + done
        except OSError as error:  # which does not know the file's name
            raise OSError(error.errno, error.strerror, str(self._temporary)) from None

    def __exit__(self, failed: object, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        if failed is None:
            self._temporary.rename(self._path)
