"""Every GEMM of a rank: unsharded layers divided by tensor and expert parallelism. No torch.

SGLang's semantics: `--tp T --ep P` puts experts on P groups of T/P ranks; attention, dense MLPs and shared experts that
are not fused divide by T. Experts' intermediate size is divided in whole MX blocks (`ceil(I/32 / ranks) * 32` a rank,
the last rank gets the rest): an e8m0 scale belongs to 32 elements of K and cannot be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import BF16, SCHEMES, Scheme
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.shapes.facts import ModelFacts
from sglang_amd_quant.shapes.layers import Experts, Linear

VOCAB_PAD = 64
"""SGLang pads a vocabulary to this, times TP if need be (`vocab_parallel_embedding.py`)."""

BYTE_OFFSET_LIMIT = 2**31
"""Byte offsets of a raw-buffer load are signed 32 bit: a weight this large needs 64-bit addressing (aiter #3783)."""


@dataclass(frozen=True)
class Gemm:
    """One GEMM of one rank, `count` times a forward pass. Weight [E_local, N, K].

    Attributes:
        op: `linear`, `moe_gate_up` or `moe_down`.
        layer: SGLang's module, relative to the decoder block; with `layers` it names one kind of layer.
        N, K: output and input elements this rank holds; a divided intermediate size comes in whole scale blocks.
        E_local: experts on this rank, fused shared ones included (1 for `linear`).
        E_total: experts of the model, fused shared ones included (1 for `linear`).
        top_k: experts a token, fused shared ones included (1 for `linear`).
        count: how many decoder blocks have it.
        scheme: name of the scheme, or `bf16`.
        bytes: weight data and scales of one of them, all local experts.
        N_last, K_last: N and K on the last rank, which gets the remainder of the blocks.
        shared: fused shared experts among E_local.
        layers: indices of the decoder blocks; empty for one outside of the blocks.
        parts: fused outputs, as (checkpoint module relative to the block, rows).
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
    bytes: int
    N_last: int
    K_last: int
    shared: int = 0
    layers: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def elements(self) -> int:
        """E_local * N * K."""
        return self.E_local * self.N * self.K

    @property
    def data_bytes(self) -> int:
        """Bytes of the weights without scales: what an offset into the weight tensor must reach."""
        bits = SCHEMES[self.scheme].weight_bits if self.scheme in SCHEMES else 16
        return self.elements * bits // 8

    def padded(self, multiple: int) -> tuple[int, int]:
        """(N, K) rounded up to a multiple; gate and up are two matrices, each rounded by itself."""
        halves = 2 if self.op == "moe_gate_up" else 1
        return halves * _up(self.N // halves, multiple), _up(self.K, multiple)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def weight_bytes(scheme: str, *shape: int) -> int:
    """Bytes of a weight [..., N, K] with its scales (one byte a block for MX, bf16 for int4)."""
    elements = prod(shape)
    if scheme == BF16:
        return 2 * elements
    s = scheme_named(scheme)
    scale_bytes = 2 if s.weight == "int4" else 1
    return elements // s.pack + prod(shape[:-1]) * ceil(shape[-1] / s.block) * scale_bytes


def split_blocks(size: int, ranks: int, rank: int, block: int) -> int:
    """Elements of `size` on one rank when they are dealt out in whole blocks: ceil(blocks/ranks) each, the rest last.

    As gpt-oss loaders do (vLLM and SGLang `models/gpt_oss.py`): 2880 among 4 ranks in 32-blocks is 736, 736, 736, 672.

    Raises:
        ShapeError: `size` is no whole number of blocks, or a rank would get none.
    """
    if size % block:
        raise ShapeError(f"intermediate size {size}", f"not whole {block}-blocks", "use scheme bf16 for the experts")
    blocks = size // block
    share = ceil(blocks / ranks)
    if share * (ranks - 1) >= blocks:
        raise ShapeError(
            f"intermediate size {size} over {ranks} ranks",
            f"{blocks} blocks of {block} leave the last rank none",
            "use a smaller --tp or a larger --ep",
        )
    return min(share, blocks - rank * share) * block


def plan(
    facts: ModelFacts,
    tp: int = 1,
    ep: int = 1,
    scheme: str | Recipe = BF16,
    *,
    fuse_shared: bool | None = None,
    rank: int = 0,
) -> list[Gemm]:
    """Every GEMM of one rank.

    Args:
        facts: the model.
        tp: SGLang's `--tp`: all ranks of the model.
        ep: SGLang's `--ep`: groups the experts are dealt to; the experts' own TP is tp/ep.
        scheme: a scheme's name for every quantizable layer, `bf16`, or a recipe.
        fuse_shared: fuse shared experts into the grouped GEMM (E+1, top_k+1); None = as SGLang does.
        rank: which rank; they differ only where blocks leave the last one a remainder.

    Raises:
        ShapeError: the model cannot be divided so; one line says why.
        SchemeError, RecipeError: no such scheme; fused parts given different ones.
    """
    if isinstance(scheme, str):
        scheme = Recipe(source=BF16) if scheme == BF16 else Recipe.uniform(scheme_named(scheme).name)
    return list(_plan(facts, tp, ep, scheme, fuse_shared, rank))


@lru_cache(maxsize=256)
def _plan(facts: ModelFacts, tp: int, ep: int, recipe: Recipe, fuse_shared: bool | None, rank: int) -> tuple[Gemm, ...]:
    if tp < 1 or ep < 1 or not 0 <= rank < tp:
        raise ShapeError(f"TP {tp}, EP {ep}, rank {rank}", "no such rank", "use tp >= 1, ep >= 1, 0 <= rank < tp")
    if tp % ep:
        raise ShapeError(
            f"TP {tp} with EP {ep}",
            "experts are dealt to EP groups of TP/EP ranks",
            "choose an --ep that divides --tp",
        )
    experts = [layer for layer in facts.layers if isinstance(layer, Experts)]
    if ep > 1 and not experts:
        raise ShapeError(f"{facts.name} with EP {ep}", "it has no experts", "use --ep 1")
    if fuse_shared and not any(e.shared for e in experts):
        raise ShapeError(facts.name, "it has no shared experts to fuse", "leave shared experts to the default")

    fused = {e.layers for e in experts if e.shared and (e.fuses if fuse_shared is None else fuse_shared)}
    gemms: list[Gemm] = []
    for layer in facts.layers:
        if isinstance(layer, Experts):
            gemms += _experts(facts, layer, tp // ep, ep, recipe, layer.layers in fused, rank % (tp // ep))
        elif not (layer.shared_expert and layer.layers in fused):
            gemms += _linear(facts, layer, tp, recipe)
    return tuple(gemms)


def _by_scheme(
    facts: ModelFacts, layers: tuple[int, ...], modules: tuple[str, ...], recipe: Recipe
) -> Iterator[tuple[Scheme | None, tuple[int, ...]]]:
    """Group decoder blocks by the scheme that the recipe gives to modules in them."""
    if not layers:
        yield recipe.scheme_for(*modules), ()
        return
    # Rules may tell blocks apart; the default and ALWAYS_BF16 cannot.
    probes = layers if recipe.rules else layers[:1]
    groups: dict[Scheme | None, list[int]] = {}
    for i in probes:
        names = (facts.block.format(i) + m for m in modules)
        groups.setdefault(recipe.scheme_for(*names), []).append(i)
    for scheme, indices in groups.items():
        yield scheme, tuple(indices) if recipe.rules else layers


def _linear(facts: ModelFacts, layer: Linear, tp: int, recipe: Recipe) -> Iterator[Gemm]:
    rows = [part.local(tp) for part in layer.parts]
    if layer.pad_vocab:
        vocab = layer.parts[0].units
        pad = VOCAB_PAD if _up(vocab, VOCAB_PAD) % tp == 0 else VOCAB_PAD * tp
        rows = [_up(vocab, pad) // tp]
    n, k = sum(rows), layer.k.local(tp)
    modules = tuple(part.module for part in layer.parts)
    groups = [(None, layer.layers)] if layer.bf16 else _by_scheme(facts, layer.layers, modules, recipe)
    for scheme, indices in groups:
        if scheme and k % scheme.block:
            raise ShapeError(
                f"{layer.name} [{n}, {k}] at TP {tp}",
                f"K is not whole {scheme.block}-blocks of {scheme.name}",
                "give it bf16 in a recipe, or use a smaller --tp",
            )
        name = scheme.name if scheme else BF16
        yield Gemm(
            "linear", layer.name, n, k, 1, 1, 1, max(1, len(indices)), name, weight_bytes(name, n, k), n, k,
            layers=indices, parts=tuple(zip(modules, rows, strict=True)),
        )  # fmt: skip


def _experts(
    facts: ModelFacts, layer: Experts, moe_tp: int, ep: int, recipe: Recipe, fuse: bool, moe_rank: int
) -> Iterator[Gemm]:
    if layer.experts % ep:
        raise ShapeError(f"EP {ep}", f"{layer.experts} experts do not divide by it", "choose another --ep")
    if layer.intermediate % moe_tp:
        raise ShapeError(
            f"experts' TP {moe_tp}",
            f"their intermediate size {layer.intermediate} does not divide by it, which SGLang's FusedMoE demands",
            "choose another --tp or --ep",
        )
    shared = layer.shared if fuse else 0
    e_local, e_total, top_k = layer.experts // ep + shared, layer.experts + shared, layer.top_k + shared
    h = layer.hidden
    for op, modules in (("moe_gate_up", layer.gate_up), ("moe_down", (layer.down,))):
        for scheme, indices in _by_scheme(facts, layer.layers, modules, recipe):
            name = scheme.name if scheme else BF16
            if scheme:
                here, last = (split_blocks(layer.intermediate, moe_tp, r, scheme.block) for r in (moe_rank, moe_tp - 1))
            else:
                here = last = layer.intermediate // moe_tp
            gate_up = op == "moe_gate_up"
            n, k = (2 * here, h) if gate_up else (h, here)
            if scheme and k % scheme.block:
                raise ShapeError(f"{layer.name} K {k}", f"not whole {scheme.block}-blocks", "use scheme bf16")
            yield Gemm(
                op, f"{layer.name}.{'gate_up_proj' if gate_up else 'down_proj'}", n, k, e_local, e_total, top_k,
                len(indices), name, weight_bytes(name, e_local, n, k),
                2 * last if gate_up else h, h if gate_up else last, shared, indices,
                tuple((m, n // len(modules)) for m in modules),
            )  # fmt: skip
