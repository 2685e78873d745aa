"""Converting a checkpoint's tensors, chunk by chunk: bf16 to MX or int4, or a foreign format to ours bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sglang_amd_quant.checkpoints import checks
from sglang_amd_quant.checkpoints.folder import Folder, TensorInfo
from sglang_amd_quant.checkpoints.job import Job, Progress
from sglang_amd_quant.checkpoints.naming import STORED
from sglang_amd_quant.checkpoints.native import quantization_config
from sglang_amd_quant.checkpoints.plan import Output, Piece, plan_conversion
from sglang_amd_quant.checkpoints.shards import ShardWriter, plan_shards
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, ScaleMode
from sglang_amd_quant.tensor import quantized

CHUNK_BYTES = 16 << 20
"""Source bytes that one thread handles at a time; it needs about twice as much."""
MAX_WORKERS = 8
"""Chunks in work at a time: more would not be read and written any faster."""

_DATA_DTYPES = frozenset(data for data, _ in STORED.values())
_LARGEST = 2.0**127
"""What every format has. MX has it exactly, so that nothing below rounds past it, and int4 rounds to 8/7 of it at most;
beyond, the nearest may be 2^128, which is Inf in fp32 and bf16."""


@dataclass(frozen=True)
class Chunk:
    """A part of a piece that is handled at once.

    Attributes:
        piece: what it is a part of.
        first: the first row of the outputs that it makes; the first byte where it copies.
        read: gives its rows, [rows, K], or its bytes.
    """

    piece: Piece
    first: int
    read: Callable[[], torch.Tensor]


def quantize_job(
    source: Folder,
    target: Path,
    recipe: Recipe,
    scale_mode: Mapping[str, ScaleMode] = DEFAULT_SCALE_MODE,
    max_shard_bytes: int = 5 * 10**9,
    tp: int = 1,
) -> Job:
    """Plan the quantization of an unquantized checkpoint; `recipe` and `tp` as `plan_conversion` takes them.

    Raises:
        AmdMxError: as `plan_conversion` says.
    """
    plan = plan_conversion(source, recipe, tp)
    shards = plan_shards((piece.outputs for piece in plan.pieces), max_bytes=max_shard_bytes)
    shard_of = {name: shard for shard in shards for name in shard.starts}

    def run(folder: Path, progress: Progress) -> None:
        by_shard: dict[str, list[Piece]] = {}
        for piece in plan.pieces:
            by_shard.setdefault(shard_of[piece.outputs[0].name].file, []).append(piece)
        for shard in shards:
            pieces, writer = by_shard.get(shard.file, []), ShardWriter(folder, shard)
            if writer.is_done:
                progress(sum(_share(piece) for piece in pieces))
                continue
            with writer:
                _make_all(pieces, writer, scale_mode, progress)

    config = quantization_config(plan.recipe, scale_mode, checked=True)
    total = sum(_share(piece) for piece in plan.pieces)
    return Job(source, target, config, shards, run, total, sum(s.nbytes for s in shards), plan)


def keep_job(source: Folder, target: Path, max_shard_bytes: int = 5 * 10**9) -> Job:
    """Plan the rewriting of a quantized checkpoint in our own format, bit for bit. A killed run starts anew.

    Raises:
        CheckpointError: the source is not quantized, whatever its config says; in no known format; or broken.
    """
    reader = source.reader()
    if reader is None:
        raise CheckpointError(str(source.path), "not quantized, so there is nothing to keep", "give a --scheme")
    outputs = [Output(n, t.dtype, tuple(t.shape)) for n, t in reader.canonical(source.stream(real=lambda name: False))]
    if not any(output.dtype in _DATA_DTYPES for output in outputs):
        raise CheckpointError(
            f"{source.path}: quant_method {reader.name!r}",
            "stores nothing quantized, so there is nothing to keep",
            "take quantization_config out of config.json, then give a --scheme",
        )
    shards = plan_shards(((output,) for output in outputs), max_shard_bytes)

    def run(folder: Path, progress: Progress) -> None:
        tensors = reader.canonical(_counted(source, progress))
        for shard in shards:
            with ShardWriter(folder, shard) as writer:
                for _ in shard.starts:
                    name, tensor = next(tensors)
                    checks.codes(name, tensor)
                    writer.write(name, tensor)
        for name, _ in tensors:  # runs the stream to its end, where what is missing is told
            raise CheckpointError(name, "came although its header was not there", "do not change files meanwhile")

    config = quantization_config(reader.recipe, reader.scale_mode, reader.static, checked=True)
    total = sum(info.nbytes for info in source.tensors.values())
    return Job(source, target, config, shards, run, total, sum(s.nbytes for s in shards))


def _counted(source: Folder, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in source.stream():
        yield name, tensor
        progress(tensor.nbytes)


def _share(piece: Piece) -> int:
    """Source bytes of a piece."""
    if piece.expert is None:
        return piece.source.nbytes
    experts, *matrix = piece.source.shape
    rows = matrix[1] if piece.transposed else matrix[0]
    return piece.source.nbytes // experts * len(piece.rows) // rows


def _chunks(piece: Piece) -> Iterator[Chunk]:
    """What a piece is made of: some rows or bytes at a time, one expert at a time where the source is transposed."""
    source = piece.source
    if piece.scheme is None:
        for first in range(0, source.nbytes, CHUNK_BYTES):
            yield Chunk(piece, first, partial(source.read_bytes, first, min(CHUNK_BYTES, source.nbytes - first)))
        return
    *lead, height, width = source.shape
    step = max(1, CHUNK_BYTES // (width * source.dtype.itemsize))
    experts = range(math.prod(lead)) if piece.expert is None else [piece.expert]
    done = 0
    for expert in experts:
        if piece.transposed:
            yield Chunk(piece, done, partial(_transposed, source, expert * height, height, piece.rows))
        else:
            for first in range(piece.rows.start, piece.rows.stop, step):
                count = min(step, piece.rows.stop - first)
                row = done + first - piece.rows.start
                yield Chunk(piece, row, partial(source.read_rows, expert * height + first, count))
        done += len(piece.rows)


def _transposed(source: TensorInfo, first: int, height: int, rows: range) -> torch.Tensor:
    """Rows of N of one [K, N] matrix, as [rows, K]."""
    return source.read_rows(first, height).T.contiguous()[rows.start : rows.stop]


def _make(chunk: Chunk, writer: ShardWriter, scale_mode: Mapping[str, ScaleMode]) -> int:
    """Read, convert and write a chunk; source bytes done."""
    piece, tensor = chunk.piece, chunk.read()
    if piece.scheme is None:
        writer.write(piece.outputs[0].name, tensor, chunk.first)
        return tensor.nbytes
    largest = tensor.abs().amax().item()  # amax passes NaN on; isfinite of all takes 8 x as long
    if not largest <= _LARGEST:
        module = piece.source.name.removesuffix(".weight")
        held = f"{largest:.3g}, beyond the 2^127 that every format has" if math.isfinite(largest) else "NaN or Inf"
        raise CheckpointError(
            f"{piece.source.name} {list(piece.source.shape)}",
            f"holds {held}",
            f'mend the source, or keep the layer in bf16 with a recipe rule "{module}": "bf16"',
        )
    made = quantized(tensor, piece.scheme, scale_mode.get(piece.scheme.weight))
    for output, part in zip(piece.outputs, made, strict=True):
        writer.write(output.name, part, chunk.first * output.shape[-1] * output.dtype.itemsize)
    return tensor.nbytes


def _make_all(
    pieces: list[Piece], writer: ShardWriter, scale_mode: Mapping[str, ScaleMode], progress: Progress
) -> None:
    """All chunks of a shard, side by side: one thread for each costs less than torch's many threads for each step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(min(threads, MAX_WORKERS)) as pool:
        try:
            futures = [pool.submit(_make, c, writer, scale_mode) for piece in pieces for c in _chunks(piece)]
            for future in as_completed(futures):
                progress(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
