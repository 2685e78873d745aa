"""A checkpoint folder: its config, the headers of its safetensors files, and reads of single tensors.

Files are read with plain reads at known offsets, not mapped: what was read and dropped again is no longer in memory, so
a conversion needs no more of it than what it holds. Format: https://github.com/huggingface/safetensors (8 bytes of
header length, JSON of name -> dtype, shape, data_offsets, then the data).
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sglang_amd_quant.checkpoints import reader_for
from sglang_amd_quant.checkpoints.naming import some
from sglang_amd_quant.checkpoints.reader import Reader
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.json_file import read_json, without_contradiction

Report = Callable[[CheckpointError], None]

INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' dtype names."""

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # safetensors' own limit
_MOST = 2**63 - 1  # torch's sizes and strides
_FETCH = "fetch the file again"
_FILE_NAME = re.compile(r"[^/\0]+\.safetensors")
_SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `file`, from byte `start`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> torch.Tensor:
        """The tensor.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        return self.read_bytes(0, self.nbytes).view(self.dtype).reshape(self.shape)

    def read_rows(self, first: int, count: int) -> torch.Tensor:
        """`count` rows of the tensor seen as [rows, last dimension], from row `first` on.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        row = self.shape[-1] * self.dtype.itemsize
        return self.read_bytes(first * row, count * row).view(self.dtype).reshape(count, self.shape[-1])

    def read_bytes(self, first: int, count: int) -> torch.Tensor:
        """`count` of the tensor's bytes as uint8, from byte `first` on.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        data = torch.empty(count, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first)
            view, got = memoryview(data.numpy()), 0
            while got < count:
                step = file.readinto(view[got:])
                if not step:
                    raise _truncated(self.file, self.start + first + count)
                got += step
        return data


@dataclass(frozen=True)
class Folder:
    """An opened checkpoint folder.

    Attributes:
        path: the folder.
        config: its config.json.
        tensors: name -> where it lies, in the order of the files.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Read config and headers.

        Raises:
            CheckpointError: the first problem met: no such folder, no safetensors, a truncated file, an index that
                names what is not there, a tensor stored twice.
        """

        def fail(error: CheckpointError) -> None:
            raise error

        return cls.survey(path, fail)

    @classmethod
    def survey(cls, path: str | Path, report: Report) -> Folder:
        """`open`, but problems go to `report` and what is readable is returned.

        Raises:
            CheckpointError: there is no folder or no config.json to speak of.
        """
        bare = cls.without_tensors(path)
        return replace(bare, tensors=_tensors(bare.path, report))

    @classmethod
    def without_tensors(cls, path: str | Path) -> Folder:
        """Read config.json alone.

        Raises:
            CheckpointError: there is no folder or no config.json to speak of.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(str(path), "no such folder", "name a folder with config.json and *.safetensors")
        return cls(path, _json(path / "config.json"))

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """As in config.json, at its top or in its text_config, or else hf_quant_config.json; None if unquantized.

        Raises:
            CheckpointError: it is no object.
        """
        text = self.config.get("text_config")
        inner = text.get("quantization_config") if isinstance(text, Mapping) else None
        for found in (self.config.get("quantization_config"), inner):
            if not isinstance(found, Mapping | None):
                where = f"{self.path}/config.json: quantization_config"
                raise CheckpointError(where, "no JSON object", "mend config.json")
            if found:
                return found
        beside = self.path / "hf_quant_config.json"
        return _json(beside) if beside.is_file() else None

    def reader(self) -> Reader | None:
        """The reader of its format, or None where it is unquantized.

        Raises:
            CheckpointError: no reader knows the format.
        """
        config = self.quantization_config
        return None if config is None else reader_for(config, self.config)

    def stream(self, real: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one by one; on the meta device those that `real` does not ask for."""
        for name, info in self.tensors.items():
            yield name, info.read() if real(name) else info.meta()


def _json(path: Path) -> dict[str, Any]:
    data = read_json(path, "name a folder of a whole checkpoint")
    if not isinstance(data, dict):
        raise CheckpointError(str(path), "no JSON object", _FETCH)
    return data


def _tensors(path: Path, report: Report) -> dict[str, TensorInfo]:
    """name -> info over all files; what contradicts the index is reported."""
    indexed: dict[str, str] | None = None
    if (path / INDEX).is_file():
        indexed = _json(path / INDEX).get("weight_map")
        if not isinstance(indexed, dict) or not all(
            isinstance(f, str) and _FILE_NAME.fullmatch(f) for f in indexed.values()
        ):
            raise CheckpointError(str(path / INDEX), "no weight_map of tensor names to *.safetensors beside it", _FETCH)
    files = _files(path, indexed)
    tensors: dict[str, TensorInfo] = {}
    readable = set()
    for file in files:
        try:
            infos = _header(file)
        except CheckpointError as error:
            report(error)
            continue
        readable.add(file.name)
        for info in infos:
            if info.name in tensors:
                other = tensors[info.name].file.name
                report(CheckpointError(f"{file}: {info.name}", f"stored in {other} as well", "delete one of the two"))
            tensors.setdefault(info.name, info)
    if indexed is not None:
        _check_index(path / INDEX, indexed, tensors, readable, report)
    else:
        _check_numbers(files, report)
        _check_one_set(files, report)
    if not tensors and len(readable) == len(files):
        report(CheckpointError(str(path), "holds no tensors", "fetch the checkpoint again"))
    return tensors


def _files(path: Path, indexed: Mapping[str, str] | None) -> list[Path]:
    if indexed is not None:
        return [path / name for name in sorted(set(indexed.values()))]
    single = path / _SINGLE
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        other = next((p.name for pattern in ("*.bin", "*.gguf", "*.pt") for p in path.glob(pattern)), None)
        found = f"no *.safetensors (but {other})" if other else "no *.safetensors"
        raise CheckpointError(str(path), found, "convert the checkpoint to safetensors first")
    return files


def _check_index(
    index: Path, indexed: Mapping[str, str], tensors: Mapping[str, TensorInfo], readable: set[str], report: Report
) -> None:
    absent = [
        n for n, file in indexed.items() if file in readable and (n not in tensors or tensors[n].file.name != file)
    ]
    if absent:
        report(CheckpointError(f"{index}: {some(absent)}", "not in the file it names", "fetch index and shards again"))
    extra = tensors.keys() - indexed.keys()
    if extra:
        report(CheckpointError(f"{index}: {some(extra)}", "stored, but not in the index", "fetch the index again"))


def _check_numbers(files: list[Path], report: Report) -> None:
    """Without an index only the names (`model-00001-of-00003`) tell of a shard that is not there."""
    numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            numbers[match[1], int(match[3])].add(int(match[2]))
    for (stem, count), found in numbers.items():
        if len(found) != count:
            what = f"{files[0].parent / stem}*-of-{count}"
            report(CheckpointError(what, f"{len(found)} of {count} shards are there", "fetch the others, or the index"))


def _check_one_set(files: list[Path], report: Report) -> None:
    """Without an index nothing tells whether a model is its one file or the numbered ones."""
    if [file.name for file in files] != [_SINGLE]:
        return
    names = sorted(file.name for file in files[0].parent.glob("model-*.safetensors"))
    numbered = next(filter(None, map(_NUMBERED.fullmatch, names)), None)
    if numbered:
        also = f"also holds {numbered[1]}*-of-{int(numbered[3])} and no index"
        report(CheckpointError(str(files[0].parent), also, "delete one set, or fetch the index"))


def _truncated(file: Path, wanted: int) -> CheckpointError:
    has = file.stat().st_size
    return CheckpointError(str(file), f"truncated: {has} bytes where its header tells of {wanted}", _FETCH)


def _header(path: Path) -> list[TensorInfo]:
    """A safetensors file's tensors, in the order of their data.

    Raises:
        CheckpointError: missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > _MAX_HEADER:
                raise CheckpointError(str(path), f"no safetensors file (header of {length} bytes in {size})", _FETCH)
            if _LENGTH_BYTES + length > size:
                raise _truncated(path, _LENGTH_BYTES + length)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(str(path), error.strerror or "cannot be read", _FETCH) from None
    try:
        header = json.loads(raw, object_pairs_hook=without_contradiction)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        entries.sort(key=lambda item: item[1]["data_offsets"])
        infos = [_info(path, name, entry, _LENGTH_BYTES + length) for name, entry in entries]
    except CheckpointError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(str(path), f"no safetensors header ({error})", _FETCH) from None
    end = _LENGTH_BYTES + length
    for info in infos:
        if info.start != end:
            raise CheckpointError(f"{path}: {info.name}", "does not start where the tensor before it ends", _FETCH)
        end += info.nbytes
    if end > size:
        raise _truncated(path, end)
    if end < size:
        raise CheckpointError(str(path), f"{size} bytes where its header tells of {end}", _FETCH)
    return infos


def _info(path: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    what = f"{path}: {name} {list(shape)} {entry['dtype']}"
    if not name.isprintable():  # it would break the lines that name it
        raise CheckpointError(f"{path}: {name!r}", "no name of a tensor", _FETCH)
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(what, "unknown dtype", f"use one of {', '.join(DTYPES)}")
    info = TensorInfo(name, path, DTYPES[entry["dtype"]], shape, base + begin)
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)) or info.nbytes != end - begin:
        raise CheckpointError(what, f"its shape needs {info.nbytes} bytes, its offsets hold {end - begin}", _FETCH)
    if math.prod(n for n in shape if n) > _MOST:
        raise CheckpointError(what, "no tensor is so large, not even where another dimension is 0", _FETCH)
    return info
