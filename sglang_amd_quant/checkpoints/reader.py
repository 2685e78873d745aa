"""What every checkpoint format must tell, and the one walk that renames, checks and counts its tensors.

A format is a subclass of `Reader`: which names mean what (`suffixes`, or `part` where a table is not enough), how its
bytes become ours (`data`, `scales`), and the `Recipe` its config spells. Everything else happens once, here.

Canonical form, which is also what our own format stores (N, K logical; E experts; e2m1 packs two elements a byte):

    <module>.weight        uint8 [N, K/2] (e2m1) or float8_e4m3fn [N, K] (e4m3)
    <module>.weight_scale  uint8 [N, K/32], e8m0
    <module>.input_scale   float32 [], only where activations are static per-tensor fp8
    <module>.bias          as stored
    ...experts.gate_up_proj, ...experts.gate_up_proj_scale, ...experts.gate_up_proj_bias    with a leading E where
    ...experts.down_proj,    ...experts.down_proj_scale,    ...experts.down_proj_bias       experts are stored fused
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, MX_BLOCK, ScaleMode, Scheme

Named = tuple[str, torch.Tensor]
FUSED_EXPERTS = re.compile(r"(?P<module>.*\.experts\.(?:gate_up_proj|down_proj))(?P<suffix>.*)")
"""Modules whose tensors hold all experts of a layer: [E, N, K]."""

E8M0_NAN = 255
_QUANTIZED_DTYPES = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn}
_RAW_DTYPES = frozenset({torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
_KV_CACHE = re.compile(r".*\.(k_scale|v_scale|[kv]_proj\.output_scale)")
_QUANTIZER_LEAF = re.compile(
    r".*(_scales?|_scale_inv|_scale_2|_blocks|_packed|_zero_point|_zero_points|_g_idx|qweight|qzeros|g_idx|_amax)"
)
_MANY = 6


class Role(StrEnum):
    """What a tensor is to its module."""

    DATA = "weight"
    SCALE = "weight_scale"
    INPUT_SCALE = "input_scale"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Part:
    """One tensor of one quantized module, under canonical naming."""

    module: str
    role: Role

    @property
    def name(self) -> str:
        """Canonical tensor name."""
        if not is_fused(self.module):
            return f"{self.module}.{self.role}"
        return self.module if self.role is Role.DATA else f"{self.module}_{self.role.removeprefix('weight_')}"


def is_fused(module: str) -> bool:
    """Whether a module's tensors hold all experts of a layer."""
    match = FUSED_EXPERTS.fullmatch(module)
    return match is not None and not match["suffix"]


def some(names: Iterable[str]) -> str:
    """At most six names in one line, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more


@dataclass(frozen=True)
class Reader(ABC):
    """One checkpoint format, configured by one checkpoint's `quantization_config`.

    Attributes:
        recipe: checkpoint module name -> scheme, or bf16.
        scale_mode: how activations' scales are rounded, by element format.
    """

    recipe: Recipe
    scale_mode: Mapping[str, ScaleMode] = field(default_factory=lambda: dict(DEFAULT_SCALE_MODE))

    name: ClassVar[str]
    """What users call the format."""
    suffixes: ClassVar[Mapping[str, Role]] = {}
    """End of a tensor's name -> what it is; the rest of the name is the module. First match wins."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from a `quantization_config`.

        Raises:
            CheckpointError: the config asks for something this reader does not cover.
        """

    def static_input(self, module: str) -> bool:
        """Whether the module's activations are quantized with one static fp8 scale that the checkpoint stores."""
        return False

    def part(self, name: str) -> Part | None:
        """Which module's tensor this is, or None where it is none of the format's own."""
        return next(
            (Part(name.removesuffix(end), role) for end, role in self.suffixes.items() if name.endswith(end)), None
        )

    def rename(self, name: str) -> str:
        """Canonical name of a tensor that is none of the format's own."""
        return name

    def data(self, tensor: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """The format's weight bytes in canonical layout."""
        return tensor

    def scales(self, tensor: torch.Tensor) -> torch.Tensor:
        """The format's scales as e8m0 bytes [..., N, K/32]."""
        return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor

    def canonical(self, stream: Iterable[Named]) -> Iterator[Named]:
        """Rename and re-lay a checkpoint's tensors, in the order they come, holding none back.

        Raises:
            CheckpointError: at once on a wrong shape, dtype or NaN scale; at the end of the stream on tensors left
                over and on partners that never came.
        """

        def fail(error: CheckpointError) -> None:
            raise error

        return self.walk(stream, fail)

    def walk(self, stream: Iterable[Named], report: Callable[[CheckpointError], None]) -> Iterator[Named]:
        """`canonical`, but problems go to `report`; a tensor with a problem is left out.

        Tensors may lie on the meta device: then all but their values is checked.
        """
        ledger = _Ledger(self)
        for name, tensor in stream:
            try:
                item = ledger.enter(name, tensor)
            except CheckpointError as error:
                report(error)
                continue
            if item is not None:
                yield item
        for problem in ledger.close():
            report(problem)


@dataclass
class _Module:
    """What has been seen of one quantized module: source names, and the logical [..., N, K] each of them implies."""

    names: dict[Role, str] = field(default_factory=dict)
    blocks: dict[Role, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class _Ledger:
    """Names and shapes seen so far, so that what is missing or left over can be told at the end."""

    reader: Reader
    modules: dict[str, _Module] = field(default_factory=dict)
    schemes: dict[str, Scheme | None] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    left_over: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    def enter(self, name: str, tensor: torch.Tensor) -> Named | None:
        """Canonical (name, tensor), or None where nothing is to be passed on."""
        if name in self.names:
            raise CheckpointError(name, "stored twice", "delete one of the two copies")
        self.names.add(name)
        part = self.reader.part(name)
        if part is None or (part.role is Role.DATA and self._plain(part.module, tensor)):
            return self._pass_through(name, tensor)
        if part.role is Role.IGNORED:
            return None
        try:
            return part.name, self._quantized(name, part, tensor)
        except CheckpointError:
            self.broken.add(part.module)
            raise

    def _scheme(self, module: str) -> Scheme | None:
        if module not in self.schemes:
            self.schemes[module] = self.reader.recipe.scheme_for(module)
        return self.schemes[module]

    def _plain(self, module: str, tensor: torch.Tensor) -> bool:
        """An unquantized weight: norms, embeddings and excluded layers share the name `weight` with quantized ones."""
        return tensor.dtype not in _RAW_DTYPES and (self._scheme(module) is None or tensor.dtype != torch.int32)

    def _pass_through(self, name: str, tensor: torch.Tensor) -> Named | None:
        suspicious = tensor.dtype in _RAW_DTYPES or _QUANTIZER_LEAF.fullmatch(name)
        if suspicious and not _KV_CACHE.fullmatch(name):
            self.left_over.append(name)
            return None
        if tensor.dim() >= 2 and tensor.is_floating_point():
            self.floats.add(name.removesuffix(".weight"))
        return self.reader.rename(name), tensor

    def _quantized(self, name: str, part: Part, tensor: torch.Tensor) -> torch.Tensor:
        scheme = self._scheme(part.module)
        if scheme is None:
            raise CheckpointError(
                f"{name} {list(tensor.shape)} {tensor.dtype}",
                "quantized, but the checkpoint's config says bf16",
                "mend the exclude list in config.json",
            )
        module = self.modules.setdefault(part.module, _Module())
        module.names[part.role] = name
        if part.role is Role.INPUT_SCALE:
            return _checked_input_scale(name, tensor)
        rank = 3 if is_fused(part.module) else 2
        if part.role is Role.DATA:
            tensor = self.reader.data(tensor, scheme)
            blocks = _checked_data(name, tensor, scheme, rank)
        else:
            tensor = self.reader.scales(tensor)
            blocks = _checked_scales(name, tensor, rank)
        module.blocks[part.role] = blocks
        if len(set(module.blocks.values())) > 1:
            weight, scale = module.blocks[Role.DATA], module.blocks[Role.SCALE]
            raise CheckpointError(
                f"{module.names[Role.SCALE]} {list(scale)}",
                f"the weight has {list(weight)} blocks of {MX_BLOCK}",
                "the file was cut or mixed up: fetch it again",
            )
        return tensor

    def close(self) -> Iterator[CheckpointError]:
        """Problems that only the end of the stream can tell."""
        known = {"weight", "bias", *(role.value for role in Role)}
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            if owner in self.modules and leaf not in known and self.reader.part(name) is None:
                self.left_over.append(name)
        if self.left_over:
            yield CheckpointError(
                f"{len(set(self.left_over))} tensors left over: {some(set(self.left_over))}",
                f"no part of the {self.reader.name} format",
                "the checkpoint is of another format or newer than this reader: check config.json's quant_method",
            )
        for name, module in self.modules.items():
            wanted = {Role.DATA, Role.SCALE} | ({Role.INPUT_SCALE} if self.reader.static_input(name) else set())
            missing = wanted - set(module.names)
            if missing and name not in self.broken:
                yield CheckpointError(
                    f"{name}: {', '.join(sorted(missing))}",
                    f"missing, though {some(module.names.values())} is there",
                    "fetch the shard that holds it again",
                )
        yield from self._unevenly_quantized()

    def _unevenly_quantized(self) -> Iterator[CheckpointError]:
        """Modules stored in bf16 whose likes are quantized, where the config makes no such difference."""
        leaves = {module.rpartition(".")[2] for module in self.modules}
        plain = [m for m in self.floats if m.rpartition(".")[2] in leaves and self._scheme(m) is not None]
        if plain:
            yield CheckpointError(
                some(plain),
                "stored unquantized, but the checkpoint's config says quantized",
                "add them to the exclude list in config.json",
            )


def _checked_data(name: str, tensor: torch.Tensor, scheme: Scheme, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/32] of a canonical weight."""
    dtype = _QUANTIZED_DTYPES[scheme.weight]
    if tensor.dtype != dtype:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"{scheme.name} weights are {dtype}",
            "mend the scheme in config.json's quantization_config",
        )
    stored = MX_BLOCK // scheme.pack
    if tensor.dim() != rank or tensor.numel() == 0 or tensor.shape[-1] % stored:
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"a {scheme.weight} weight is [{'E, ' * (rank - 2)}N, K/{scheme.pack}] with K a multiple of {MX_BLOCK}",
            "fetch the checkpoint again, or mend the scheme in config.json",
        )
    return (*tensor.shape[:-1], tensor.shape[-1] // stored)


def _checked_scales(name: str, tensor: torch.Tensor, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/32] of canonical scales."""
    if tensor.dtype != torch.uint8 or tensor.dim() != rank:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"block scales are e8m0 bytes (uint8) [{'E, ' * (rank - 2)}N, K/{MX_BLOCK}]",
            "the checkpoint is of another format: check config.json's quant_method",
        )
    if not tensor.is_meta and tensor.numel() and int(tensor.max()) == E8M0_NAN:
        count = int((tensor == E8M0_NAN).sum())
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"{count} scale bytes are 255, e8m0's NaN",
            "quantize the source again: its weights held NaN or Inf, or padding was written",
        )
    return tuple(tensor.shape)


def _checked_input_scale(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A static activation scale as a float32 scalar."""
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}", "an input scale is one float", "calibrate the source again"
        )
    scale = tensor.reshape(()).to(torch.float32)
    if not scale.is_meta and not (0 < float(scale) < float("inf")):
        raise CheckpointError(f"{name} = {float(scale)}", "no positive finite scale", "calibrate the source again")
    return scale
