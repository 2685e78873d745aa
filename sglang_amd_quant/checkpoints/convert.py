"""Converting a checkpoint folder, piece by piece: bf16 to MX, or a foreign MX format to ours without requantizing.

Everything is written to `DST.partial`, config.json last, and that folder is renamed to DST at the end. A run that was
killed leaves a folder that nothing loads, and the same command goes on with the first shard that is not whole.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sglang_amd_quant.checkpoints.folder import INDEX, Folder, TensorInfo
from sglang_amd_quant.checkpoints.native import quantization_config
from sglang_amd_quant.checkpoints.plan import Output, Piece, Plan, plan_conversion
from sglang_amd_quant.checkpoints.shards import Shard, ShardWriter, plan_shards, write_index
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.formats import quantize_mx
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, ScaleMode

Progress = Callable[[int], None]
"""Called with the number of source bytes just done."""

CHUNK_BYTES = 16 << 20
"""Source bytes that one thread handles at a time; it needs about twice as much."""
MAX_WORKERS = 8
"""Chunks in work at a time: more would not be read and written any faster."""

MANIFEST = "amd-mx-quantize.json"
_NOT_CARRIED = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp", ".partial",
})  # fmt: skip
_NOT_CARRIED_NAMES = frozenset({"config.json", "hf_quant_config.json", INDEX, "pytorch_model.bin.index.json", MANIFEST})
_NOT_CARRIED_FOLDERS = frozenset({"original", "metal", "onnx", ".git", ".cache", "__pycache__"})


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


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        source: the opened source.
        target: the folder to be made.
        config: `quantization_config` to write.
        shards: all files of the target.
        run: makes and writes every output of the shards that an earlier run did not finish.
        source_bytes: what `run` will report as done, all in all.
        output_bytes: size of all shards.
        plan: what happens to each tensor, where the source is not quantized.
    """

    source: Folder
    target: Path
    config: Mapping[str, Any]
    shards: list[Shard]
    run: Callable[[Path, Progress], None]
    source_bytes: int
    output_bytes: int
    plan: Plan | None = None

    @property
    def partial(self) -> Path:
        """Where it is written until it is whole."""
        return self.target.with_name(self.target.name + ".partial")

    def execute(self, progress: Progress, force: bool = False) -> None:
        """Do it, or what is left of it.

        Args:
            progress: told of every part done.
            force: replace an existing target, and a partial one begun with other arguments.

        Raises:
            CheckpointError: the target exists, was begun otherwise, or does not fit the disk; the source is broken.
        """
        if self.target.exists() and not force:
            raise CheckpointError(str(self.target), "exists", "name another folder, or replace it with --force")
        source, target = self.source.path.resolve(), self.target.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise CheckpointError(
                str(self.target), f"and the source {source} lie in one another", "name another folder"
            )
        with _locked(self.partial):
            self._begin(force)
            self.run(self.partial, progress)
            write_index(self.partial, self.shards)
            _carry_over(self.source.path, self.partial)
            (self.partial / "config.json").write_text(json.dumps(self._target_config(), indent=2) + "\n")
            if self.target.exists():
                shutil.rmtree(self.target)
            self.partial.rename(self.target)
            (self.target / MANIFEST).unlink()

    def _target_config(self) -> dict[str, Any]:
        config = dict(self.source.config)
        if "text_config" in config:
            config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
        return config | {"quantization_config": dict(self.config)}

    def _begin(self, force: bool) -> None:
        """Check or make the manifest of a partial target: what it was begun with."""
        manifest = self.partial / MANIFEST
        wanted = {
            "source": str(self.source.path.resolve()),
            "files": _fingerprint(self.source),
            "quantization_config": dict(self.config),
            "shards": {shard.file: shard.nbytes for shard in self.shards},
        }
        begun = _read_manifest(manifest)
        if any(self.partial.iterdir()) and begun != wanted:
            if not force:
                other = ", ".join(key for key in wanted if begun.get(key) != wanted[key])
                raise CheckpointError(
                    str(self.partial),
                    f"begun by another run, which differs in {other}",
                    "repeat that run's arguments, or begin anew with --force",
                )
            shutil.rmtree(self.partial)
            self.partial.mkdir()
        left = sum(s.nbytes for s in self.shards if not ShardWriter(self.partial, s).is_done)
        free = shutil.disk_usage(self.partial).free
        if left > free:
            raise CheckpointError(
                str(self.partial),
                f"{left / 1e9:.1f} GB to write, {free / 1e9:.1f} GB free",
                "make room or go elsewhere",
            )
        manifest.write_text(json.dumps(wanted, indent=2) + "\n")


def quantize_job(
    source: Folder,
    target: Path,
    recipe: Recipe,
    scale_mode: Mapping[str, ScaleMode] = DEFAULT_SCALE_MODE,
    max_shard_bytes: int = 5 * 10**9,
) -> Job:
    """Plan the quantization of an unquantized checkpoint.

    Raises:
        AmdMxError: as `plan_conversion` says.
    """
    plan = plan_conversion(source, recipe)
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
        CheckpointError: the source is not quantized, in no known format, or broken.
    """
    reader = source.reader()
    if reader is None:
        raise CheckpointError(str(source.path), "not quantized, so there is nothing to keep", "give a --scheme")
    outputs = [Output(n, t.dtype, tuple(t.shape)) for n, t in reader.canonical(source.stream(real=lambda name: False))]
    shards = plan_shards(((output,) for output in outputs), max_shard_bytes)

    def run(folder: Path, progress: Progress) -> None:
        tensors = reader.canonical(_counted(source, progress))
        for shard in shards:
            with ShardWriter(folder, shard) as writer:
                for _ in shard.starts:
                    name, tensor = next(tensors)
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
    if not bool(torch.isfinite(tensor.abs().amax())):  # amax passes NaN on; isfinite of all takes 8 x as long
        raise CheckpointError(
            f"{piece.source.name} {list(piece.source.shape)}",
            "holds NaN or Inf",
            f'mend the source, or keep the layer in bf16 with a recipe rule "{piece.source.name}": "bf16"',
        )
    element = piece.scheme.weight
    for output, part in zip(piece.outputs, quantize_mx(tensor, element, scale_mode[element]), strict=True):
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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two runs from writing one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(folder.name + ".lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(str(folder), "another run is writing it", "wait for it, or stop it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    """What a partial target was begun with; nothing known where the manifest is missing or was cut."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _fingerprint(source: Folder) -> dict[str, list[int]]:
    """Size and time of change of every file that tensors are read from."""
    stats = {file.name: file.stat() for file in {info.file for info in source.tensors.values()}}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}


def _carry_over(source: Path, target: Path) -> None:
    """Copy all that is neither weights nor config: tokenizer, generation_config, chat template, code, licence."""
    for path in sorted(source.iterdir()):
        if path.is_dir():
            if path.name not in _NOT_CARRIED_FOLDERS and not path.name.endswith(".partial"):
                ignored = shutil.ignore_patterns(*(f"*{suffix}" for suffix in _NOT_CARRIED))
                shutil.copytree(path, target / path.name, ignore=ignored, dirs_exist_ok=True)
        elif path.suffix not in _NOT_CARRIED and path.name not in _NOT_CARRIED_NAMES:
            shutil.copy2(path, target / path.name)
