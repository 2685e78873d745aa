"""The books of one walk over a checkpoint: each tensor is checked as it comes, what is missing is told at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from sglang_amd_quant.checkpoints import checks
from sglang_amd_quant.checkpoints.naming import INT4_ROLES, LINEARS, Part, Role, is_fused, some
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.formats import dequantize_int4, dequantize_mx, group_words, split_words
from sglang_amd_quant.formats.mx import ELEMENTS
from sglang_amd_quant.recipe import always_bf16, in_tower
from sglang_amd_quant.schemes import INT4_GROUP, MX_BLOCK, Scheme

if TYPE_CHECKING:
    from sglang_amd_quant.checkpoints.reader import Reader

Named = tuple[str, torch.Tensor]

_ELEMENT_OF = {element.dtype: element.name for element in ELEMENTS.values()}
INT4 = "int4"
_RAW_DTYPES = frozenset({torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})
_KV_CACHE = re.compile(r".*\.(k_scale|v_scale|[kv]_proj\.output_scale)")
_QUANTIZERS_OWN = re.compile(
    r".*(\.|_)(input_scale|weight_scale|weight_scale_2|scales|scale_inv|blocks|packed|zero_points?|qweight|qzeros|g_idx)"
)
_LINEARS_OWN = frozenset({"weight", "bias"})


@dataclass
class _Module:
    """What has been seen of one quantized module.

    Attributes:
        names: source names.
        blocks: [..., N, K/block] that each implies.
        unpaired: int4 scales or zero points that wait for one another.
        dequantized: data or scales that wait for one another to be dequantized.
        is_int4: whether a tensor said so.
        dtype: what it is dequantized to, where that has to be.
        broken: whether a problem has been told already.
    """

    names: dict[Role, str] = field(default_factory=dict)
    blocks: dict[Role, tuple[int, ...]] = field(default_factory=dict)
    unpaired: dict[Role, torch.Tensor] = field(default_factory=dict)
    dequantized: dict[Role, torch.Tensor] = field(default_factory=dict)
    is_int4: bool = False
    dtype: torch.dtype = torch.bfloat16
    broken: bool = False


class Ledger:
    """Names and shapes seen so far, so that what is missing or left over can be told at the end."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._group = reader.recipe.group or INT4_GROUP  # as stored
        words = {torch.int32} if INT4 in reader.recipe.weights else set()
        self._stored = _RAW_DTYPES | words  # dtypes of weights that are quantized
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
        if part is None or (part.role is Role.DATA and tensor.dtype not in self._stored):
            return self._passed(name, tensor)
        scheme = self._scheme(part.module)
        if part.role in INT4_ROLES and scheme is not None and scheme.weight != INT4:
            self._left_over.add(name)
            return None
        module = self._modules.setdefault(part.module, _Module())
        if part.role in module.names:
            raise CheckpointError(name, f"says what {module.names[part.role]} says already", "delete one of the two")
        module.names[part.role] = name
        try:
            checked = self._checked(name, part, tensor, module)
        except CheckpointError:
            module.broken = True
            raise
        if checked is None:
            return None
        part = replace(part, role=Role.SCALE) if part.role is Role.ZEROS else part
        if scheme is None:
            return self._dequantized(part, checked, module)
        return part.name, checked

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

    def _checked(self, name: str, part: Part, tensor: torch.Tensor, module: _Module) -> torch.Tensor | None:
        """The tensor in canonical form, or None where it is dropped or waits; int4 scales as words."""
        rank = 3 if is_fused(part.module) else 2
        match part.role:
            case Role.DATA:
                element = self._element(name, part.module, tensor)
                module.is_int4 = element == INT4
                tensor = self._reader.data(name, tensor, element)
                module.blocks[part.role] = checks.data(name, tensor, element, self._block(module), rank)
            case Role.SCALE:
                tensor, scheme = self._reader.scales(name, tensor), self._scheme(part.module)
                module.is_int4 = tensor.dtype != torch.uint8 if scheme is None else scheme.weight == INT4
                check = checks.groups if module.is_int4 else checks.scales
                module.blocks[part.role] = check(name, tensor, rank)
            case Role.SHAPE:
                module.blocks |= checks.shape(name, tensor, self._group)
            case Role.ZEROS:
                module.is_int4 = True
                tensor = checks.zeros(name, self._reader.zeros(name, tensor), self._reader.symmetric)
            case Role.ORDER:
                checks.order(name, tensor, self._group)
            case Role.INPUT_SCALE:
                return checks.input_scale(name, tensor, rank == 3)
        self._check_blocks(module)
        if part.role in (Role.SHAPE, Role.ORDER):
            return None
        waits = part.role is Role.ZEROS or (part.role is Role.SCALE and tensor.is_floating_point())
        return self._words(part, tensor, module) if waits else tensor

    def _block(self, module: _Module) -> int:
        return self._group if module.is_int4 else MX_BLOCK

    def _check_blocks(self, module: _Module) -> None:
        """All that has come must be of one weight."""
        seen = sorted(module.blocks.items(), key=lambda item: item[0] is not Role.DATA)
        for role, blocks in seen[1:]:
            first, wanted = seen[0]
            if blocks != wanted:
                what = "weight" if first is Role.DATA else module.names[first]
                raise CheckpointError(
                    f"{module.names[role]} {list(blocks)}",
                    f"the {what} has {list(wanted)} blocks of {self._block(module)}",
                    "the file was cut or mixed up: fetch it again",
                )

    def _words(self, part: Part, tensor: torch.Tensor, module: _Module) -> torch.Tensor | None:
        """int4 scales and zero points as words (`formats.group_words`), as soon as both are here; where the config
        says symmetric, scales wait for nothing and zero points, which are 8, are dropped."""
        if self._reader.symmetric:
            scales, zeros = tensor, None
            if part.role is Role.ZEROS:
                return None
        else:
            module.unpaired[part.role] = tensor
            if len(module.unpaired) < 2:
                return None
            scales, zeros = module.unpaired.pop(Role.SCALE), module.unpaired.pop(Role.ZEROS)
            zeros = checks.paired_zeros(module.names[Role.ZEROS], zeros, scales)
        module.dtype = scales.dtype
        return group_words(scales, zeros)

    def _element(self, name: str, module: str, tensor: torch.Tensor) -> str:
        """What a weight's elements must be: as its scheme says; as stored, where it is only to be dequantized."""
        scheme = self._scheme(module)
        if scheme is not None:
            return scheme.weight
        if always_bf16(module):
            if tensor.dtype == torch.int32:  # eight to a word: only int4 is stored so
                return INT4
            if tensor.dtype in _ELEMENT_OF:
                return _ELEMENT_OF[tensor.dtype]
        raise CheckpointError(
            f"{name} {list(tensor.shape)} {tensor.dtype}",
            "quantized, but the checkpoint's config says bf16",
            "mend the exclude list in config.json",
        )

    def _dequantized(self, part: Part, tensor: torch.Tensor, module: _Module) -> Named | None:
        """A layer that must run in bf16 (MLA's kv_b_proj, lm_head) but is stored quantized. MX is exact in bf16, since
        an element has at most 4 significant bits and bf16 has fp32's exponents; int4 is rounded to the dtype of its
        scales, as the tools that write it do. Waits for its partner."""
        module.dequantized[part.role] = tensor
        if not {Role.DATA, Role.SCALE} <= set(module.dequantized):
            return None
        data, scales = module.dequantized.pop(Role.DATA), module.dequantized.pop(Role.SCALE)
        name = Part(part.module, Role.DATA).name
        if data.is_meta or scales.is_meta:
            shape = (*scales.shape[:-1], scales.shape[-1] * self._block(module))
            return name, torch.empty(shape, dtype=module.dtype, device="meta")
        checks.codes(module.names[Role.DATA], data)
        if module.is_int4:
            return name, dequantize_int4(data, *split_words(scales), dtype=module.dtype)
        return name, dequantize_mx(data, scales, _ELEMENT_OF[data.dtype], module.dtype)

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
            wanted = {Role.DATA, Role.SCALE}
            wanted |= {Role.INPUT_SCALE} if self._reader.static_input(name) else set()
            wanted |= {Role.ZEROS} if module.is_int4 and not self._reader.symmetric else set()
            missing = wanted - set(module.names)
            if missing and not module.broken:
                yield CheckpointError(
                    f"{name}: {', '.join(sorted(map(self._reader.called, missing)))}",
                    f"missing, though {some(module.names.values())} is there",
                    "fetch the shard that holds it again",
                )
        yield from self._unquantized()

    def _is_strange(self, name: str) -> bool:
        """Whether a tensor lies in a quantized module without being known there."""
        module, _, leaf = name.rpartition(".")
        return (
            module in self._modules
            and leaf not in _LINEARS_OWN
            and self._reader.part(name) is None
            and not _KV_CACHE.fullmatch(name)
        )

    def _unquantized(self) -> Iterator[CheckpointError]:
        """Modules stored in bf16 that the config says are quantized: of known names or alike to what is, or any where
        none is.

        A recipe that a user wrote into the config.json of a bf16 checkpoint (`check_patterns`) is for quantizing it.
        """
        leaves = {module.rpartition(".")[2] for module in self._modules}
        none_is = not self._modules and not self._reader.check_patterns

        def is_linear(module: str) -> bool:
            leaf = module.rpartition(".")[2]
            known = leaf in LINEARS and f"{module}.weight" in self._names  # without: experts in one, perhaps unserved
            return leaf in leaves or (bool(leaves) and known and not in_tower(module))  # SGLang has towers in bf16

        plain = [m for m in self._floats if (none_is or is_linear(m)) and self._scheme(m) is not None]
        if plain:
            yield CheckpointError(
                some(plain),
                f"stored unquantized, but the checkpoint's config says quantized{' and nothing is' if none_is else ''}",
                f"{'take quantization_config out of' if none_is else 'add them to the exclude list in'} config.json",
            )
