"""What becomes of each tensor of a bf16 checkpoint: quantized (and to which names), or kept.

Only what SGLang runs as a linear layer or as experts is quantized. That is decided by names and by config.json's
`model_type`, never guessed from shapes; what is not known stays bf16 and is told in the summary, unless a rule of the
recipe names it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sglang_amd_quant.checkpoints.folder import Folder, TensorInfo
from sglang_amd_quant.checkpoints.int4 import SCHEME as INT4
from sglang_amd_quant.checkpoints.naming import LINEARS, STORED, Part, Role, is_fused
from sglang_amd_quant.errors import CheckpointError, RecipeError, ShapeError
from sglang_amd_quant.recipe import Recipe, Rule, in_tower
from sglang_amd_quant.schemes import BF16, INT4_GROUPS, SCHEMES, Scheme

FUSED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""What SGLang runs as one matmul must be of one scheme."""


@dataclass(frozen=True)
class FusedExperts:
    """How a model type stores all experts of a layer in one tensor.

    Attributes:
        transposed: [E, K, N] instead of [E, N, K].
        split: gate and up lie one behind the other along N, and SGLang's loader also takes experts one by one: written
            so. Otherwise (gate and up interleaved) the experts stay fused.
    """

    transposed: bool
    split: bool


FUSED_EXPERTS: dict[str, FusedExperts] = {
    "gpt_oss": FusedExperts(transposed=True, split=False),
    "llama4": FusedExperts(transposed=True, split=True),
    "llama4_text": FusedExperts(transposed=True, split=True),
    "qwen3_vl_moe": FusedExperts(transposed=True, split=True),
    "qwen3_5_moe": FusedExperts(transposed=False, split=True),
    "qwen3_5_moe_text": FusedExperts(transposed=False, split=True),
}
"""model_type -> layout of `...experts.gate_up_proj` and `...experts.down_proj`, as transformers 5.19 saves them
(`models/*/modeling_*.py`, `conversion_mapping.py`). Qwen3-MoE, Mixtral, DeepSeek and more save expert by expert."""

ROW_PARALLEL = frozenset({"o_proj", "down_proj", "wo", "w2", "fc2", "dense", "dense_4h_to_h"})
"""Linears whose K SGLang divides by --tp. Experts are not among them: their columns are dealt in whole blocks."""

BF16_IN_SGLANG: dict[str, tuple[str, ...]] = {"gpt_oss": ("*.self_attn.*",), "stablelm": ("*.self_attn.*",)}
"""model_type -> linears that SGLang 0.5.23 gives no quantization method: written quantized, they could not load."""

_WEIGHT = ".weight"
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu})


@dataclass(frozen=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A source tensor, or a part of one, and the outputs it makes: the smallest unit of work and of sharding.

    Attributes:
        source: where it is read.
        outputs: data and scales where quantized, else the copy.
        scheme: what it is quantized to; None copies.
        transposed: the source stores [.., K, N].
        expert: which slice of the leading dimension, or None for all there are.
        rows: which rows of the logical N.
        k: K of one rank, where quantized.
    """

    source: TensorInfo
    outputs: tuple[Output, ...]
    scheme: Scheme | None = None
    transposed: bool = False
    expert: int | None = None
    rows: range = range(0)
    k: int = 0


@dataclass
class Plan:
    """All pieces, the recipe that the written config.json will hold, for which --tp, and what the summary tells."""

    pieces: list[Piece] = field(default_factory=list)
    recipe: Recipe = field(default_factory=Recipe)
    tp: int = 1
    quantized: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    in_doubt: list[str] = field(default_factory=list)

    @property
    def int4_group(self) -> int | None:
        """The group of all int4 weights, if there are any."""
        return next((p.scheme.block for p in self.pieces if p.scheme and p.scheme.weight == "int4"), None)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for piece in self.pieces for output in piece.outputs)


def plan_conversion(folder: Folder, recipe: Recipe, tp: int = 1) -> Plan:
    """Decide for every tensor of an unquantized checkpoint.

    Args:
        folder: the checkpoint.
        recipe: which layer gets which scheme. Where it names no int4 group, all int4 layers get the largest that
            divides each of their K, since a checkpoint has one; the plan's recipe names it.
        tp: ranks that every K of a row-parallel linear must divide among, in whole blocks.

    Raises:
        CheckpointError: the checkpoint is quantized already.
        RecipeError: a pattern matches nothing, parts of a fused layer get different schemes, or nothing is quantized.
        ShapeError: K is not whole blocks, or a layer is empty.
    """
    if folder.quantization_config is not None:
        raise _quantized_already(folder, folder.quantization_config)
    model_type = str(folder.config.get("model_type"))
    layout = FUSED_EXPERTS.get(model_type)
    unserved = BF16_IN_SGLANG.get(model_type, ())
    recipe = replace(recipe, rules=(*(Rule(p, BF16) for p in unserved), *recipe.rules))
    if recipe.group is None and "int4" in recipe.weights:
        tried = _planned(folder, replace(recipe, group=INT4_GROUPS[0]), layout, tp, unserved)
        ks = (piece.k for piece in tried.pieces if piece.scheme and piece.scheme.weight == "int4")
        recipe = replace(recipe, group=SCHEMES[INT4].served_block(*ks))
    return _planned(folder, recipe, layout, tp, unserved)


def _quantized_already(folder: Folder, config: Mapping[str, Any]) -> CheckpointError:
    what = f"{folder.path}: quant_method {config.get('quant_method', 'modelopt')!r}"
    if all(info.dtype.is_floating_point and info.dtype not in _FP8 for info in folder.tensors.values()):
        reason = "quantized already, as config.json has it, though no tensor is"
        return CheckpointError(what, reason, "take quantization_config out of config.json")
    remedy = "give the bf16 original, or --scheme keep to rewrite it in our own format as it is"
    return CheckpointError(what, "quantized already", remedy)


def _planned(folder: Folder, recipe: Recipe, layout: FusedExperts | None, tp: int, unserved: Collection[str]) -> Plan:
    plan, modules = Plan(tp=tp), []
    for info in folder.tensors.values():
        for module, piece in _pieces(info, recipe, layout, plan):
            modules.append(module)
            plan.pieces.append(piece)
            if piece.scheme:
                plan.quantized[piece.scheme.name] += 1
    _check_names(plan.pieces)
    _check_recipe(recipe, modules, unserved)
    if not plan.quantized:
        some_kept = plan.in_doubt or modules
        raise RecipeError(
            recipe.source,
            f"quantizes none of {len(modules)} modules",
            f"name layers in a recipe's rules; they are named like {', '.join(some_kept[:2])}",
        )
    kept = dict.fromkeys(_generalized(module) for module in plan.in_doubt)
    plan.recipe = replace(recipe, rules=(*(Rule(p, BF16) for p in kept), *recipe.rules))
    return plan


def _pieces(info: TensorInfo, recipe: Recipe, layout: FusedExperts | None, plan: Plan) -> Iterator[tuple[str, Piece]]:
    """(module, piece) of one source tensor."""
    module = info.name.removesuffix(_WEIGHT)
    fused = is_fused(info.name) and len(info.shape) == 3
    linear = info.name.endswith(_WEIGHT) and len(info.shape) == 2
    copy = Piece(info, (Output(info.name, info.dtype, info.shape),))
    matrices = linear or fused
    if info.dtype in _FP8 or (matrices and not info.dtype.is_floating_point and recipe.scheme_for(module) is not None):
        raise CheckpointError(
            f"{info.name} {list(info.shape)} {info.dtype}",
            "quantized, though config.json has no quantization_config",
            "give the bf16 original, or mend config.json",
        )
    if not (info.dtype.is_floating_point and matrices):
        stacked = info.name.endswith(_WEIGHT) and len(info.shape) == 3  # experts of a layer, or a convolution
        if info.dtype.is_floating_point and stacked and recipe.scheme_for(module) is not None:
            plan.in_doubt.append(module)
        yield module, copy
    elif linear:
        scheme = recipe.scheme_for(module)
        if scheme is not None and not _is_linear(module, recipe):
            plan.in_doubt.append(module)
            scheme = None
        n, k = info.shape
        ranks = plan.tp if module.rpartition(".")[2] in ROW_PARALLEL and ".experts." not in module else 1
        yield module, _quantized(info, module, (n, k), scheme, rows=range(n), ranks=ranks) if scheme else copy
    elif layout is None:
        if recipe.scheme_for(module) is not None:
            plan.in_doubt.append(module)
        yield module, copy
    else:
        yield from _fused_pieces(info, recipe, layout, copy)


def _is_linear(module: str, recipe: Recipe) -> bool:
    if any(rule.matches(module) for rule in recipe.rules):
        return True
    return module.rpartition(".")[2] in LINEARS and not in_tower(module)


def _fused_pieces(info: TensorInfo, recipe: Recipe, layout: FusedExperts, copy: Piece) -> Iterator[tuple[str, Piece]]:
    experts, *matrix = info.shape
    k, n = matrix if layout.transposed else reversed(matrix)
    if not layout.split:
        scheme = recipe.scheme_for(info.name)
        piece = (
            _quantized(info, info.name, (experts, n, k), scheme, layout.transposed, rows=range(n)) if scheme else copy
        )
        yield info.name, piece
        return
    stem, _, leaf = info.name.rpartition(".")
    halves = {"gate_proj": range(n // 2), "up_proj": range(n // 2, n)} if leaf == "gate_up_proj" else {leaf: range(n)}
    if all(recipe.scheme_for(f"{stem}.{e}.{part}") is None for e in range(experts) for part in halves):
        yield info.name, copy
        return
    if n % len(halves):
        raise ShapeError(
            f"layer {info.name} {list(info.shape)}",
            f"N={n} is odd, so that gate and up are no halves of it",
            f'fetch the checkpoint again, or keep it in bf16 with a recipe rule "{stem}.*": "bf16"',
        )
    for expert in range(experts):
        for part, rows in halves.items():
            module = f"{stem}.{expert}.{part}"
            scheme = recipe.scheme_for(module)
            if scheme is None:
                raise RecipeError(module, "bf16, while other experts of its layer are not", "give a layer one scheme")
            yield module, _quantized(info, module, (len(rows), k), scheme, layout.transposed, expert, rows)


def _quantized(
    info: TensorInfo,
    module: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    transposed: bool = False,
    expert: int | None = None,
    rows: range = range(0),
    ranks: int = 1,
) -> Piece:
    *lead, k = shape
    if not math.prod(shape):
        raise ShapeError(
            f"layer {module} {list(shape)}",
            "holds no weights",
            f'fetch the checkpoint again, or keep the layer in bf16 with a recipe rule "{module}": "bf16"',
        )
    if k % (scheme.block * ranks):
        lower = "lower --tp, or " if ranks > 1 else ""
        smaller = "take a smaller --group, or " if scheme.divisible else ""
        raise ShapeError(
            f"layer {module} {list(shape)}",
            f"K={k}{f' over {ranks} ranks' if ranks > 1 else ''} is not a multiple of {scheme.block}, the"
            f" {scheme.block_name}",
            f'{lower}{smaller}keep it in bf16 with a recipe rule "{module}": "bf16"',
        )
    data_dtype, scale_dtype = STORED[scheme.weight]
    data = Output(Part(module, Role.DATA).name, data_dtype, (*lead, k // scheme.pack))
    scales = Output(Part(module, Role.SCALE).name, scale_dtype, (*lead, k // scheme.block))
    return Piece(info, (data, scales), scheme, transposed, expert, rows, k // ranks)


def _check_names(pieces: Iterable[Piece]) -> None:
    """A safetensors file whose header says a name twice holds bytes that nothing reads."""
    names: set[str] = set()
    for output in (output for piece in pieces for output in piece.outputs):
        if output.name in names:
            raise CheckpointError(
                output.name,
                "is what a quantized layer's output is called, but the source holds it too",
                "drop it from the source",
            )
        names.add(output.name)


def _check_recipe(recipe: Recipe, modules: Iterable[str], unserved: Collection[str]) -> None:
    """Raise where a rule has no effect (but for `unserved` patterns, which no user wrote) or a fused layer gets several
    schemes."""
    modules = list(dict.fromkeys(modules))
    unmatched = [pattern for pattern in recipe.unmatched(modules) if pattern not in unserved]
    if unmatched:
        likely = next((m for m in modules if m.rpartition(".")[2] in LINEARS), modules[0] if modules else "")
        raise RecipeError(
            f"{recipe.source}: {', '.join(map(repr, unmatched))}",
            "matches no module of the checkpoint",
            f"modules are named like {likely}",
        )
    if idle := recipe.idle(modules, modules):
        rule, named = idle
        raise RecipeError(
            f"{recipe.source}: {rule.pattern!r} -> {rule.scheme!r}",
            f"matches only what always stays bf16, as {named}",
            "drop the rule",
        )
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module in modules:
        stem, _, leaf = module.rpartition(".")
        experts = re.match(r"(.*\.experts)\.", module)
        if experts:
            groups[experts[1],].append(module)
        for parts in FUSED_LINEARS:
            if leaf in parts and not experts:
                groups[stem, *parts].append(module)
    for members in groups.values():
        recipe.scheme_for(*members)


def _generalized(module: str) -> str:
    """A pattern over a module's name with any numbers: what is in doubt in one layer is so in all."""
    return "re:" + re.sub(r"(?<=\\\.)\d+(?=\\\.|$)", r"\\d+", re.escape(module))
