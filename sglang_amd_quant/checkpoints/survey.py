"""What a checkpoint holds, and what is wrong with it, from headers and scales alone: weights are never read."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.checkpoints.ledger import Named
from sglang_amd_quant.checkpoints.naming import Role, some
from sglang_amd_quant.checkpoints.native import NativeReader
from sglang_amd_quant.checkpoints.reader import Reader
from sglang_amd_quant.errors import AmdMxError, CheckpointError
from sglang_amd_quant.formats.mx import ELEMENTS
from sglang_amd_quant.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_PACK = {element.dtype: element.pack for element in ELEMENTS.values()}
_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_CANONICAL = NativeReader(Recipe())


@dataclass(frozen=True)
class Group:
    """Modules alike but for the numbers in their names.

    Attributes:
        name: with the numbers collapsed, like `model.layers.{0..17}.self_attn.q_proj`.
        scheme: of the weights and activations, or the dtype of unquantized weights.
        shape: logical [..., N, K] of each.
        count: how many modules.
        nbytes: weights and scales of all of them, in canonical form: int4 with a word a group.
        quantized: whether the weights are.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    count: int
    nbytes: int
    quantized: bool

    @property
    def elements(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / max(1, self.elements)


@dataclass
class Survey:
    """What `amd-mx inspect` tells."""

    path: Path
    format: str
    files: int
    tensors: int
    nbytes: int
    groups: list[Group] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def bits(self, quantized_only: bool = False) -> float | None:
        """Mean bits per weight, scales included; None where there is no such weight."""
        groups = [g for g in self.groups if g.quantized or not quantized_only]
        elements = sum(g.elements for g in groups)
        return 8 * sum(g.nbytes for g in groups) / elements if elements else None


@dataclass
class _Module:
    """Bytes of one module's weight and scales, and the weight's logical shape."""

    nbytes: int = 0
    shape: tuple[int, ...] = ()
    scheme: str = ""
    quantized: bool = False


Watch = Callable[[Iterable[Named], int], Iterable[Named]]
"""Wraps the stream of a checkpoint's tensors, given how many there are: for a progress bar."""


def survey(path: str | Path, watch: Watch = lambda stream, count: stream) -> Survey:
    """Look a checkpoint folder through.

    Raises:
        CheckpointError: there is no folder, or no config.json or index that can be read.
    """
    problems: list[str] = []
    folder = Folder.survey(path, lambda error: problems.append(str(error)))
    infos = folder.tensors.values()
    files, nbytes = len({info.file for info in infos}), sum(info.nbytes for info in infos)
    found = Survey(folder.path, "", files, len(infos), nbytes, problems=problems)
    try:
        reader = folder.reader()
    except AmdMxError as error:
        problems.append(str(error))
        found.format = f"unknown ({(folder.quantization_config or {}).get('quant_method')})"
        return found
    modules = _modules(folder, reader, problems, watch) if reader else _plain_modules(folder, problems)
    found.groups = _grouped(modules)
    found.format = reader.name if reader else "not quantized"
    return found


def _plain_modules(folder: Folder, problems: list[str]) -> dict[str, _Module]:
    raw = [name for name, info in folder.tensors.items() if info.dtype in _PACK]
    if raw:
        error = CheckpointError(
            some(raw), "quantized, though config.json has no quantization_config", "mend config.json"
        )
        problems.append(str(error))
    return {
        name.removesuffix(".weight"): _Module(info.nbytes, info.shape, _dtype(info.dtype))
        for name, info in folder.tensors.items()
        if len(info.shape) > 1 and not name.endswith("_bias")
    }


def _modules(folder: Folder, reader: Reader, problems: list[str], watch: Watch) -> dict[str, _Module]:
    def is_scale(name: str) -> bool:
        part = reader.part(name)
        return part is not None and part.role is not Role.DATA

    modules: dict[str, _Module] = defaultdict(_Module)
    stream = watch(folder.stream(real=is_scale), len(folder.tensors))
    for name, tensor in reader.walk(stream, lambda error: problems.append(str(error))):
        if tensor.dim() < 2 or name.endswith("_bias"):
            continue
        part = _CANONICAL.part(name)
        module = modules[part.module if part else name]
        module.nbytes += tensor.nbytes
        if part is not None and part.role is Role.SCALE:
            continue
        scheme = reader.recipe.scheme_for(part.module) if part and tensor.dtype in _PACK else None
        if part is None or scheme is None:
            module.shape, module.scheme = tuple(tensor.shape), _dtype(tensor.dtype)
            continue
        module.shape = (*tensor.shape[:-1], tensor.shape[-1] * _PACK[tensor.dtype])
        module.scheme = scheme.name + (f", group {scheme.block}" if scheme.weight == "int4" else "")
        module.scheme += ", static input" if reader.static_input(part.module) else ""
        module.quantized = True
    if not problems and not reader.check_patterns and not any(module.quantized for module in modules.values()):
        error = CheckpointError(str(folder.path), f"{reader.name}, but holds no quantized layer", "mend config.json")
        problems.append(str(error))
    return {name: module for name, module in modules.items() if module.shape}


def _dtype(dtype: torch.dtype) -> str:
    return _FLOATS.get(dtype, str(dtype).removeprefix("torch."))


def _grouped(modules: dict[str, _Module]) -> list[Group]:
    """Modules of one scheme and shape whose names differ in numbers only, like beside like."""
    alike: dict[tuple[str, str, tuple[int, ...], bool], list[str]] = defaultdict(list)
    for name, module in modules.items():
        alike[_NUMBER.sub("{}", name), module.scheme, module.shape, module.quantized].append(name)
    return [
        Group(_collapsed(template, names), scheme, shape, len(names), sum(modules[n].nbytes for n in names), quantized)
        for (template, scheme, shape, quantized), names in sorted(alike.items())
    ]


def _collapsed(template: str, names: Iterable[str]) -> str:
    """`a.{}.b.{}` and names of that form -> `a.{0..17}.b.{0,2}`."""
    for column in zip(*([int(n) for n in _NUMBER.findall(name)] for name in names), strict=True):
        template = template.replace("{}", _ranges(set(column)), 1)
    return template


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> `{0..2,5}`; a single number stays bare."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}..{b}" if b > a else f"{a}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
