"""The vocabulary that a model's architecture is told in: what a weight's dimensions are made of. No torch.

A family (`families.py`) turns a config.json into `Linear` and `Experts`, unsharded; the planner divides them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.layouts.names import round_up


class Split(StrEnum):
    """How a dimension meets tensor parallelism.

    - `EVEN`: units divided by the ranks, no remainder allowed (query heads, an MLP's intermediate size).
    - `KV`: as `EVEN`, but where ranks outnumber units each unit is held by ranks/units of them (KV heads, index heads).
    - `WHOLE`: every rank holds all of it.
    - `VOCAB`: padded to 64 rows, or 64 x TP where that does not divide, then divided (SGLang's
      `layers/vocab_parallel_embedding.py`).
    """

    EVEN = "even"
    KV = "kv"
    WHOLE = "whole"
    VOCAB = "vocab"


VOCAB_PAD = 64


@dataclass(frozen=True)
class Dim:
    """One dimension of a weight, or one fused part of it.

    Attributes:
        units: things that are never cut (heads, or single elements).
        size: elements a unit.
        split: how the units meet tensor parallelism.
        what: what a unit is, in the plural, for messages.
        module: checkpoint module, relative to the decoder block, that holds this part. Empty for an input dimension.
    """

    units: int
    size: int = 1
    split: Split = Split.WHOLE
    what: str = "elements"
    module: str = ""

    def local(self, tp: int, of: str) -> int:
        """Elements one rank of `tp` holds.

        Args:
            tp: ranks.
            of: the model and layer, for messages.

        Raises:
            ShapeError: the units do not divide among the ranks.
        """
        if self.split is Split.WHOLE:
            return self.units * self.size
        if self.split is Split.VOCAB:
            padded = round_up(self.units, VOCAB_PAD)
            return (padded if padded % tp == 0 else round_up(self.units, VOCAB_PAD * tp)) // tp
        if self.units % tp == 0:
            return self.units // tp * self.size
        if self.split is Split.KV and tp % self.units == 0:
            return self.size
        rule = "neither divide by it nor divide it" if self.split is Split.KV else "do not divide by it"
        raise ShapeError(f"{of} at TP {tp}", f"{self.units} {self.what} {rule}", "choose another --tp")


@dataclass(frozen=True)
class Linear:
    """A dense projection as SGLang runs it: fused parts along N, one K.

    Attributes:
        name: SGLang's module, relative to the decoder block.
        parts: the fused outputs, in the order of the rows.
        k: the input dimension.
        blocks: indices of the decoder blocks that have it; None for one outside of the blocks.
        bf16: SGLang builds it without a quantization config, whatever the recipe says.
        shared_expert: it belongs to a shared expert, and goes when that is fused into the routed ones.
        mtp: it belongs to the multi-token-prediction (draft) block.
        activated: SGLang leaves silu behind it to its GEMM where that can (`DualGemm` of LlamaMLP and Qwen2MLP).
    """

    name: str
    parts: tuple[Dim, ...]
    k: Dim
    blocks: tuple[int, ...] | None
    bf16: bool = False
    shared_expert: bool = False
    mtp: bool = False
    activated: bool = False


class Fuse(StrEnum):
    """When SGLang runs shared experts inside the routed experts' grouped GEMM (E+1, top_k+1).

    From `shared_experts_fusion_disable_reason` of its model classes (0.5.23), as it answers on gfx950 without aiter.
    """

    ALWAYS = "always"
    WITHOUT_EP = "without EP"
    ASKED = "only when asked"


@dataclass(frozen=True)
class Experts:
    """The routed experts of some decoder blocks: gate_up [E, 2I, H] and down [E, H, I].

    Attributes:
        name: SGLang's module, relative to the decoder block.
        hidden: H.
        intermediate: I, unsharded.
        experts: routed experts E.
        top_k: routed experts a token.
        blocks: indices of the decoder blocks that have them.
        gate_up: checkpoint modules, relative to the block, of gate and up; one if the checkpoint stores them fused.
        down: checkpoint module of down.
        shared: shared experts that are as large as routed ones, so that they could be fused with them.
        fuse: when SGLang does fuse them.
        mtp: they belong to the multi-token-prediction (draft) block.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    blocks: tuple[int, ...]
    gate_up: tuple[str, ...]
    down: str
    shared: int = 0
    fuse: Fuse = Fuse.ASKED
    mtp: bool = False


Layer = Linear | Experts
