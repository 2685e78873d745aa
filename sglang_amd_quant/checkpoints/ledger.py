"""The books of one walk over a checkpoint: each tensor is checked as it comes, what is missing is told at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.checkpoints.naming import Part, Role, is_fused, some
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.formats.mx import ELEMENTS, dequantize_mx
from sglang_amd_quant.recipe import always_bf16
from sglang_amd_quant.schemes import MX_BLOCK, Scheme

if TYPE_CHECKING:
    from sglang_amd_quant.checkpoints.reader import Reader

Named = tuple[str, torch.Tensor]

E8M0_NAN = 255
_ELEMENT_OF = {element.dtype: element.name for element in ELEMENTS.values()}
_RAW_DTYPES = frozenset({torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
_KV_CACHE = re.compile(r".*\.(k_scale|v_scale|[kv]_proj\.output_scale)")
_QUANTIZERS_OWN = re.compile(
    r".*(\.|_)(input_scale|weight_scale|weight_scale_2|scales|scale_inv|blocks|packed|zero_points?|qweight|qzeros|g_idx)"
)
_LINEARS_OWN = frozenset({"weight", "bias"})


@dataclass
class _Module:
    """What has been seen of one quantized module: source names, and the blocks [..., N, K/32] each implies."""

    names: dict[Role, str] = field(default_factory=dict)
    blocks: dict[Role, tuple[int, ...]] = field(default_factory=dict)
    unpaired: dict[Role, torch.Tensor] = field(default_factory=dict)
    broken: bool = False


class Ledger:
    """Names and shapes seen so far, so that what is missing or left over can be told at the end."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._names: set[str] = set()
        self._modules: dict[str, _Module] = {}
        self._schemes: dict[str, Scheme | None] = {}
        self._floats: set[str] = set()
        self._left_over: set[str] = set()

    def enter(self, name: str, tensor: torch.Tensor) -> Named | None:
        """Canonical (name, tensor), or None where nothing is to be passed on yet.

        Raises:
            CheckpointError: wrong shape or dtype, a NaN scale, a second tensor of this name.
        """
        if name in self._names:
            raise CheckpointError(name, "stored twice", "delete one of the two copies")
        self._names.add(name)
        part = self._reader.part(name)
        if part is None or (part.role is Role.DATA and tensor.dtype not in _RAW_DTYPES):
            return self._passed(name, tensor)
        module = self._modules.setdefault(part.module, _Module())
        if part.role in module.names:
            raise CheckpointError(name, f"says what {module.names[part.role]} says already", "delete one of the two")
        module.names[part.role] = name
        try:
            tensor = self._checked(name, part, tensor, module)
        except CheckpointError:
            module.broken = True
            raise
        if self._scheme(part.module) is None:
            return self._dequantized(part, tensor, module)
        return part.name, tensor

    def _scheme(self, module: str) -> Scheme | None:
        if module not in self._schemes:
            self._schemes[module] = self._reader.recipe.scheme_for(module)
        return self._schemes[module]

    def _passed(self, name: str, tensor: torch.Tensor) -> Named | None:
        """Norms, embeddings, biases, unquantized layers; not what only a quantizer can have written."""
        if (tensor.dtype in _RAW_DTYPES or _QUANTIZERS_OWN.fullmatch(name)) and not _KV_CACHE.fullmatch(name):
            self._left_over.add(name)
            return None
        if tensor.dim() >= 2:
            self._floats.add(name.removesuffix(".weight"))
        return name, tensor

    def _checked(self, name: str, part: Part, tensor: torch.Tensor, module: _Module) -> torch.Tensor:
        fused = is_fused(part.module)
        if part.role is Role.INPUT_SCALE:
            return _checked_input_scale(name, tensor, fused)
        rank = 3 if fused else 2
        if part.role is Role.DATA:
            tensor = self._reader.data(tensor)
            module.blocks[Role.DATA] = _checked_data(name, tensor, self._element(name, part.module, tensor), rank)
        else:
            tensor = self._reader.scales(tensor)
            module.blocks[Role.SCALE] = _checked_scales(name, tensor, rank)
        if len(set(module.blocks.values())) > 1:
            weight, scale = module.blocks[Role.DATA], module.blocks[Role.SCALE]
            raise CheckpointError(
                f"{module.names[Role.SCALE]} {list(scale)}",
                f"the weight has {list(weight)} blocks of {MX_BLOCK}",
                "the file was cut or mixed up: fetch it again",
            )
        return tensor

    def _element(self, name: str, module: str, tensor: torch.Tensor) -> str:
        """What a weight's elements must be: as its scheme says; as stored, where it is only to be dequantized."""
        scheme = self._scheme(module)
        if scheme is not None:
            return scheme.weight
        if tensor.dtype in _ELEMENT_OF and always_bf16(module):
            return _ELEMENT_OF[tensor.dtype]
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            "quantized, but the checkpoint's config says bf16",
            "mend the exclude list in config.json",
        )

    def _dequantized(self, part: Part, tensor: torch.Tensor, module: _Module) -> Named | None:
        """A layer that must run in bf16 (MLA's kv_b_proj, lm_head) but is stored quantized: exact in bf16, since
        an element has at most 4 significant bits and bf16 has fp32's exponents. Waits for its partner."""
        module.unpaired[part.role] = tensor
        if not {Role.DATA, Role.SCALE} <= set(module.unpaired):
            return None
        data, scales = module.unpaired.pop(Role.DATA), module.unpaired.pop(Role.SCALE)
        name = Part(part.module, Role.DATA).name
        if data.is_meta or scales.is_meta:
            shape = (*scales.shape[:-1], scales.shape[-1] * MX_BLOCK)
            return name, torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return name, dequantize_mx(data, scales, _ELEMENT_OF[data.dtype], torch.bfloat16)

    def close(self) -> Iterator[CheckpointError]:
        """Problems that only the end of the stream can tell."""
        self._left_over.update(filter(self._is_strange, self._names))
        if self._left_over:
            yield CheckpointError(
                f"{len(self._left_over)} tensors left over: {some(self._left_over)}",
                f"no part of the {self._reader.name} format",
                "the checkpoint is of another format or newer than this reader: check config.json's quant_method",
            )
        for name, module in self._modules.items():
            wanted = {Role.DATA, Role.SCALE} | ({Role.INPUT_SCALE} if self._reader.static_input(name) else set())
            missing = wanted - set(module.names)
            if missing and not module.broken:
                yield CheckpointError(
                    f"{name}: {', '.join(sorted(missing))}",
                    f"missing, though {some(module.names.values())} is there",
                    "fetch the shard that holds it again",
                )
        yield from self._unevenly_quantized()

    def _is_strange(self, name: str) -> bool:
        """Whether a tensor lies in a quantized module without being known there."""
        module, _, leaf = name.rpartition(".")
        return (
            module in self._modules
            and leaf not in _LINEARS_OWN
            and self._reader.part(name) is None
            and not _KV_CACHE.fullmatch(name)
        )

    def _unevenly_quantized(self) -> Iterator[CheckpointError]:
        """Modules stored in bf16 whose likes are quantized, where the config makes no such difference."""
        leaves = {module.rpartition(".")[2] for module in self._modules}
        plain = [m for m in self._floats if m.rpartition(".")[2] in leaves and self._scheme(m) is not None]
        if plain:
            yield CheckpointError(
                some(plain),
                "stored unquantized, but the checkpoint's config says quantized",
                "add them to the exclude list in config.json",
            )


def _checked_data(name: str, tensor: torch.Tensor, element: str, rank: int) -> tuple[int, ...]:
    """Blocks [..., N, K/32] of a canonical weight."""
    kind = ELEMENTS[element]
    if tensor.dtype != kind.dtype:
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            f"the config says {element} weights, which are {kind.dtype}",
            "mend the scheme in config.json's quantization_config",
        )
    stored = MX_BLOCK // kind.pack
    if tensor.dim() != rank or tensor.numel() == 0 or tensor.shape[-1] % stored:
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"a stored {element} weight is [{'E, ' * (rank - 2)}N, K/{kind.pack}] with K a multiple of {MX_BLOCK}",
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
        raise CheckpointError(
            f"{name} {list(tensor.shape)}",
            f"{int((tensor == E8M0_NAN).sum())} scale bytes are 255, e8m0's NaN",
            "quantize the source again: its weights held NaN or Inf, or padding was written",
        )
    return tuple(tensor.shape)


def _checked_input_scale(name: str, tensor: torch.Tensor, fused: bool) -> torch.Tensor:
    """Static activation scales as float32: a scalar, or [E] where experts are fused."""
    if not tensor.is_floating_point() or (tensor.dim() != 1 if fused else tensor.numel() != 1):
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}", "an input scale is one float", "calibrate the source again"
        )
    scale = tensor.to(torch.float32) if fused else tensor.reshape(()).to(torch.float32)
    if not scale.is_meta and not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"{name} = {scale.tolist()}", "no positive finite scale", "calibrate the source again")
    return scale
