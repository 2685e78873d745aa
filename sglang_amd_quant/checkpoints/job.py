"""One conversion of a checkpoint folder: atomic, resumable, one at a time.

Everything is written to `DST.partial`, config.json last, and that folder is renamed to DST at the end. A run that was
killed leaves a folder that nothing loads, and the same command goes on with the first shard that is not whole.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_amd_quant.checkpoints.folder import INDEX, Folder
from sglang_amd_quant.checkpoints.plan import Plan
from sglang_amd_quant.checkpoints.shards import Shard, ShardWriter, write_index
from sglang_amd_quant.errors import CheckpointError

Progress = Callable[[int], None]
"""Called with the number of source bytes just done."""

MANIFEST = "amd-mx-quantize.json"
_NOT_CARRIED = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp", ".partial",
})  # fmt: skip
_NOT_CARRIED_NAMES = frozenset({"config.json", "hf_quant_config.json", INDEX, "pytorch_model.bin.index.json", MANIFEST})
_NOT_CARRIED_FOLDERS = frozenset({"original", "metal", "onnx", ".git", ".cache", "__pycache__"})


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
        if self.target.exists() and not self.target.is_dir():
            raise CheckpointError(str(self.target), "a file", "name a folder")
        if self.target.is_symlink() or self.target.name in ("", ".."):
            raise CheckpointError(str(self.target), "stands for another folder", "name that folder itself")
        source, target = self.source.path.resolve(), self.target.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise CheckpointError(str(self.target), f"lies in the source {source}, or holds it", "name another folder")
        for folder, mark in ((self.target, "config.json"), (self.partial, MANIFEST)):
            _check_ours(folder, mark)
        for path in _carried(self.source.path):
            _check_copyable(path, frozenset({source}))
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
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
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


def _check_ours(folder: Path, mark: str) -> None:
    """--force replaces checkpoints, whole, begun or half deleted, and no folder of somebody's other work.

    Raises:
        CheckpointError: there is something in the folder, but not the file that marks it, and no shard.
    """
    found = list(folder.iterdir()) if folder.is_dir() else []
    if found and not any(path.name == mark or path.suffix == ".safetensors" for path in found):
        raise CheckpointError(str(folder), f"holds files, but no {mark}", "name another folder, or delete this one")


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
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return {}


def _fingerprint(source: Folder) -> dict[str, list[int]]:
    """Size and time of change of every file that tensors are read from."""
    stats = {file.name: file.stat() for file in {info.file for info in source.tensors.values()}}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())}


def _carried(source: Path) -> list[Path]:
    """All that is neither weights nor config: tokenizer, generation_config, chat template, code, licence."""

    def is_carried(path: Path) -> bool:
        if path.is_dir():
            return path.name not in _NOT_CARRIED_FOLDERS and not path.name.endswith(".partial")
        return path.suffix not in _NOT_CARRIED and path.name not in _NOT_CARRIED_NAMES

    return sorted(filter(is_carried, source.iterdir()))


def _check_copyable(path: Path, above: frozenset[Path]) -> None:
    """See to it that a file, or a folder and all below, can be copied once the weights are done.

    Args:
        path: what is to be copied; links are followed.
        above: the real paths of all folders that it was found through.

    Raises:
        CheckpointError: a link that points to nothing or to a folder that holds it; what is neither file nor folder.
    """
    if path.is_dir():
        real = path.resolve()
        if real in above:
            raise CheckpointError(str(path), "points to a folder that holds it", "delete the link")
        for below in sorted(path.iterdir()):
            if not below.name.endswith(tuple(_NOT_CARRIED)):
                _check_copyable(below, above | {real})
    elif path.is_symlink() and not path.exists():
        raise CheckpointError(str(path), "points to nothing", "fetch the file, or delete the link")
    elif not path.is_file():
        raise CheckpointError(str(path), "neither file nor folder", "move it elsewhere")


def _carry_over(source: Path, target: Path) -> None:
    ignored = shutil.ignore_patterns(*(f"*{suffix}" for suffix in _NOT_CARRIED))
    for path in _carried(source):
        if path.is_dir():
            shutil.copytree(path, target / path.name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(path, target / path.name)
