"""Every GEMM of a rank: unsharded layers divided by tensor and expert parallelism. No torch.

SGLang's semantics: `--tp T --ep P` deals the experts to P groups of T/P ranks; attention, dense MLPs and shared experts
that are not fused are divided by T. A quantized expert's intermediate size is divided in whole blocks (see `share`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from sglang_amd_quant.errors import RecipeError, ShapeError
from sglang_amd_quant.layouts.names import round_up
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import BF16, MX_BLOCK, SCHEMES, Scheme
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.layers import Experts, Fuse, Linear


@dataclass(frozen=True)
class Gemm:
    """One kind of GEMM of one rank: out[M, N] = x[M, K] @ W[N, K].T, the experts' with W [E_local, N, K].

    Attributes:
        op: `linear`, `moe_gate_up` or `moe_down`.
        layer: SGLang's module, relative to the decoder block; `blocks` tells those of equal name apart.
        N, K: as stored on a rank, the same on every rank.
        E_local: experts on the rank, fused shared ones included (1 for `linear`).
        E_total: experts of the model, fused shared ones included (1 for `linear`).
        top_k: experts a token, fused shared ones included (1 for `linear`).
        count: how many decoder blocks have it.
        scheme: name of the scheme, or `bf16`.
        block: elements of K that share a scale; of bf16 1.
        bytes: weight data and scales of one of them, all local experts.
        N_used, K_used: how much of N and K holds weights on this rank; the rest, on the last ranks, is zero padding.
        shared: fused shared experts among E_local.
        blocks: indices of the decoder blocks; empty for one outside of them.
        parts: fused outputs, as (checkpoint module, rows).
        activated: of `linear`, SGLang leaves silu behind it to the GEMM where that can.
    """

    op: str
    layer: str
    N: int
    K: int
    E_local: int
    E_total: int
    top_k: int
    count: int
    scheme: str
    block: int
    bytes: int
    N_used: int
    K_used: int
    shared: int = 0
    blocks: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    activated: bool = False

    @property
    def elements(self) -> int:
        """E_local * N * K."""
        return self.E_local * self.N * self.K

    @property
    def data_bytes(self) -> int:
        """Bytes of the weights without scales: what offsets into the weight must reach."""
        return data_bytes(self.scheme, self.elements)

    def padded(self, multiple: int) -> tuple[int, int]:
        """(N, K) rounded up to a multiple; gate and up are two matrices, each rounded by itself."""
        halves = 2 if self.op == "moe_gate_up" else 1
        return halves * round_up(self.N // halves, multiple), round_up(self.K, multiple)


def data_bytes(scheme: str, elements: int) -> int:
    """Bytes that weight elements take in a scheme, without scales."""
    return elements * (SCHEMES[scheme].weight_bits if scheme in SCHEMES else 16) // 8


def weight_bytes(scheme: str, *shape: int, block: int = MX_BLOCK) -> int:
    """Bytes of a weight [..., N, K] and its scales (`Scheme.scale_bytes` a block)."""
    data = data_bytes(scheme, prod(shape))
    if scheme not in SCHEMES:
        return data
    return data + prod(shape[:-1]) * -(-shape[-1] // block) * SCHEMES[scheme].scale_bytes


def share(size: int, ranks: int, rank: int, block: int) -> tuple[int, int]:
    """How an experts' intermediate size of `size` columns is dealt out in whole blocks.

    Every rank stores ceil(size/block / ranks) blocks, since a scale's elements cannot be parted; the last ranks use
    fewer. As loaders of gpt-oss do (`models/gpt_oss.py` in vLLM and in SGLang): 2880 columns in blocks of 32 over 4
    ranks are 736 stored on each, 672 used on the last.

    Returns:
        Columns stored, the same for every rank, and columns used on this one.
    """
    stored = round_up(-(-size // ranks), block)
    return stored, min(stored, max(0, size - rank * stored))


def plan(
    facts: ModelFacts,
    tp: int = 1,
    ep: int = 1,
    scheme: str | Recipe = BF16,
    *,
    fuse_shared: bool | None = None,
    rank: int = 0,
    mtp: bool = False,
) -> list[Gemm]:
    """Every GEMM of one rank.

    Args:
        facts: the model.
        tp: SGLang's `--tp`: all ranks of the model.
        ep: SGLang's `--ep`: groups that the experts are dealt to; within a group their TP is tp/ep.
        scheme: a scheme's name for every layer that can be quantized, `bf16`, or a recipe.
        fuse_shared: run shared experts inside the grouped GEMM (E+1, top_k+1). None: as SGLang does for the
            architecture on gfx950, provided that the recipe gives both the same scheme.
        rank: which rank; ranks differ only where the blocks leave a remainder.
        mtp: add the GEMMs of the multi-token-prediction (draft) block.

    Raises:
        ShapeError: the model cannot be divided so; one line says why.
        SchemeError: no such scheme.
        RecipeError: parts of a fused layer are given different schemes.
    """
    if isinstance(scheme, str):
        scheme = Recipe(source=BF16) if scheme == BF16 else Recipe.uniform(scheme_named(scheme).name)
    return list(_plan(facts, tp, ep, scheme, fuse_shared, rank, mtp))


@lru_cache(maxsize=256)
def _plan(
    facts: ModelFacts, tp: int, ep: int, recipe: Recipe, fuse_shared: bool | None, rank: int, mtp: bool
) -> tuple[Gemm, ...]:
    layers = [layer for layer in facts.layers if mtp or not layer.mtp]
    _check_parallelism(facts, tp, ep, rank, [layer for layer in layers if isinstance(layer, Experts)])
    fused = {
        layer.blocks for layer in layers if isinstance(layer, Experts) and _fuses(facts, layer, recipe, ep, fuse_shared)
    }
    if fuse_shared and not fused:
        raise ShapeError(facts.name, "it has no shared experts to fuse", "leave --fuse-shared to its default")
    gemms: list[Gemm] = []
    for layer in layers:
        if isinstance(layer, Experts):
            shared = layer.shared if layer.blocks in fused else 0
            gemms += _experts(facts, layer, tp // ep, ep, recipe, shared, rank % (tp // ep))
        elif not (layer.shared_expert and layer.blocks in fused):
            gemms += _linear(facts, layer, tp, recipe)
    return tuple(gemms)


def _check_parallelism(facts: ModelFacts, tp: int, ep: int, rank: int, experts: list[Experts]) -> None:
    if tp < 1 or ep < 1 or not 0 <= rank < tp:
        raise ShapeError(
            f"{facts.name} at TP {tp}, EP {ep}, rank {rank}", "no such rank", "use tp >= 1, ep >= 1, 0 <= rank < tp"
        )
    if ep > 1 and not experts:
        raise ShapeError(f"{facts.name} at EP {ep}", "it has no experts", "use --ep 1")
    if tp % ep:
        raise ShapeError(
            f"{facts.name} at TP {tp}, EP {ep}",
            "EP groups are made of the TP ranks, TP/EP each",
            "use an --ep that divides --tp",
        )
    for e in experts:
        if e.experts % ep:
            raise ShapeError(
                f"{facts.name} at EP {ep}", f"{e.experts} experts do not divide by it", "choose another --ep"
            )
        if e.intermediate % (tp // ep):
            raise ShapeError(
                f"{facts.name} at TP {tp}, EP {ep}",
                f"the experts' {e.intermediate} columns do not divide by {tp // ep}, as SGLang's FusedMoE demands",
                "choose another --tp or --ep",
            )


def _fuses(facts: ModelFacts, layer: Experts, recipe: Recipe, ep: int, asked: bool | None) -> bool:
    """Whether shared experts run inside this layer's grouped GEMM: they need one scheme with the routed ones."""
    by_default = layer.fuse is Fuse.ALWAYS or (layer.fuse is Fuse.WITHOUT_EP and ep == 1)
    if not layer.shared or not (by_default if asked is None else asked):
        return False
    beside = (x for x in facts.layers if isinstance(x, Linear) and x.shared_expert and x.blocks == layer.blocks)
    own, theirs = (
        _by_scheme(facts, layer.blocks, modules, recipe)
        for modules in ((*layer.gate_up, layer.down), [part.module for x in beside for part in x.parts])
    )
    if own != theirs and asked:
        raise RecipeError(
            f"{recipe.source}: {layer.name} and its shared experts", "get different schemes", "give them one to fuse"
        )
    return own == theirs


def _by_scheme(
    facts: ModelFacts, blocks: tuple[int, ...] | None, modules: tuple[str, ...] | list[str], recipe: Recipe
) -> dict[Scheme | None, tuple[int, ...]]:
    """Decoder blocks by the scheme that the recipe gives to modules in them."""
    if blocks is None:
        return {recipe.scheme_for(*modules): ()}
    if not recipe.rules:  # the default is the same for every block
        return {recipe.scheme_for(*(facts.block.format(blocks[0]) + m for m in modules)): blocks}
    groups: dict[Scheme | None, tuple[int, ...]] = {}
    for i in blocks:
        scheme = recipe.scheme_for(*(facts.block.format(i) + m for m in modules))
        groups[scheme] = (*groups.get(scheme, ()), i)
    return groups


def _linear(facts: ModelFacts, layer: Linear, tp: int, recipe: Recipe) -> Iterator[Gemm]:
    of = f"{facts.name}: {layer.name}"
    rows = [part.local(tp, of) for part in layer.parts]
    n, k = sum(rows), layer.k.local(tp, of)
    modules = tuple(part.module for part in layer.parts)
    groups = {None: layer.blocks or ()} if layer.bf16 else _by_scheme(facts, layer.blocks, modules, recipe)
    for asked, blocks in groups.items():
        scheme = asked and recipe.fitted(asked, k)
        _check_k(of, n, k, scheme, tp)
        name, block = (scheme.name, scheme.block) if scheme else (BF16, 1)
        yield Gemm(
            "linear",
            layer.name,
            N=n,
            K=k,
            E_local=1,
            E_total=1,
            top_k=1,
            count=max(1, len(blocks)),
            scheme=name,
            block=block,
            bytes=weight_bytes(name, n, k, block=block),
            N_used=n,
            K_used=k,
            blocks=blocks,
            parts=tuple(zip(modules, rows, strict=True)),
            activated=layer.activated,
        )


def _experts(
    facts: ModelFacts, layer: Experts, moe_tp: int, ep: int, recipe: Recipe, shared: int, moe_rank: int
) -> Iterator[Gemm]:
    e_local = layer.experts // ep + shared
    modules = (*layer.gate_up, layer.down)
    for asked, blocks in _by_scheme(facts, layer.blocks, modules, recipe).items():
        scheme = asked and recipe.fitted(asked, layer.hidden, dealt=layer.intermediate, ranks=moe_tp)
        name, block = (scheme.name, scheme.block) if scheme else (BF16, 1)
        for n, k in ((2 * layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)):
            _check_k(f"{facts.name}: {layer.name}", n, k, scheme, 1)
        stored, used = share(layer.intermediate, moe_tp, moe_rank, block)
        half = 2 * stored // len(layer.gate_up)
        for op, n, k, n_used, k_used, parts in (
            ("moe_gate_up", 2 * stored, layer.hidden, 2 * used, layer.hidden, layer.gate_up),
            ("moe_down", layer.hidden, stored, layer.hidden, used, (layer.down,)),
        ):
            yield Gemm(
                op,
                f"{layer.name}.{op.removeprefix('moe_')}_proj",
                N=n,
                K=k,
                E_local=e_local,
                E_total=layer.experts + shared,
                top_k=layer.top_k + shared,
                count=len(blocks),
                scheme=name,
                block=block,
                bytes=weight_bytes(name, e_local, n, k, block=block),
                N_used=n_used,
                K_used=k_used,
                shared=shared,
                blocks=blocks,
                parts=tuple((m, half if op == "moe_gate_up" else n) for m in parts),
            )


def _check_k(name: str, n: int, k: int, scheme: Scheme | None, tp: int) -> None:
    if scheme and k % scheme.block:
        raise ShapeError(
            f"{name} [{n}, {k}] at TP {tp}",
            f"K is not whole {scheme.block}-blocks, as {scheme.name} needs",
            "keep it bf16 in a recipe, or use a smaller --tp" + (" or group" if scheme.divisible else ""),
        )
