"""A quantized fused MoE: asks selection which kernels run its two GEMMs at this M, and runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.ops import hip, hip_moe, reference, triton_group, triton_hopper, triton_moe, triton_mx
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.operand import Operand, dtype_name
from sglang_amd_quant.ops.packed import Weight, unpacked
from sglang_amd_quant.ops.reference import MoeProblem
from sglang_amd_quant.runtime.detect import launchable
from sglang_amd_quant.selection import Config, GemmProblem, KernelChoice, choose
from sglang_amd_quant.selection.amd_decode import AMD_MOE_DECODE_LAYOUTS
from sglang_amd_quant.selection.choose import REFERENCE


@dataclass(frozen=True, eq=False)
class MoeCall:
    """What a launcher gets.

    Attributes:
        x: [M, H], M >= 1, in the model's dtype.
        topk_ids, topk_weights: [M, top_k]; ids outside [0, E) are dropped and contribute nothing.
        w13, w2: [E, N, H] and [E, H, I] in layouts that the kernels' specs read.
        b13, b2: biases [E, N] and [E, H] of any float dtype, or None.
        problem: what is computed besides.
        config13, config2: parameters of the two kernels; the same block_m.
        gate_up, down: the GEMMs at this M.
    """

    x: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    w13: Weight
    w2: Weight
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    problem: MoeProblem
    config13: Config
    config2: Config
    gate_up: GemmProblem
    down: GemmProblem


Chooser = Callable[[GemmProblem, frozenset[str]], KernelChoice]

MoeKernel = Callable[[MoeCall], torch.Tensor]
"""Gives [M, H], or [M, top_k, H] where nothing is combined, in x's dtype."""

KERNELS: dict[tuple[str, str], MoeKernel] = {
    ("triton_moe", "triton_moe"): triton_moe.run_moe,
    ("triton_mx_moe", "triton_moe"): triton_moe.run_mx_then_moe,
    ("triton_mx_moe", "triton_mx_moe"): triton_mx.run_mx_moe,
    ("triton_e2m1_moe", "triton_e2m1_moe"): triton_group.run_registers_moe,
    ("triton_e2m1_bf16_moe", "triton_e2m1_bf16_moe"): triton_group.run_registers_moe,
    ("triton_e2m1_fp16_moe", "triton_e2m1_fp16_moe"): triton_group.run_registers_moe,
    ("triton_e4m3_moe", "triton_e4m3_moe"): triton_group.run_registers_moe,
    ("triton_int4_moe", "triton_int4_moe"): triton_group.run_group_moe,
    ("triton_fp16_moe", "triton_fp16_moe"): triton_group.run_group_moe,
    ("triton_hopper_bf16", "triton_hopper_bf16"): triton_hopper.run_hopper_moe,
    ("triton_hopper_e4m3", "triton_hopper_e4m3"): triton_hopper.run_hopper_moe,
    ("triton_hopper_int4", "triton_hopper_int4"): triton_hopper.run_hopper_moe,
}
_LDS, _INT4 = (triton_moe.gate_up, triton_moe.down), (triton_group.gate_up, triton_group.down)
_REGISTERS = (triton_group.registers_gate_up, triton_group.registers_down)
_BESIDE = {
    "e2m1": {"triton_moe": _LDS, "triton_e2m1_moe": _REGISTERS, "triton_e2m1_bf16_moe": _REGISTERS},
    "e4m3": {"triton_moe": _LDS, "triton_e4m3_moe": _REGISTERS},
    "int4": {"triton_int4_moe": _INT4},
}
"""Weight format -> kernels for more rows that read what decode kernels read: either GEMM may be of either."""
for _arch, _weight in AMD_MOE_DECODE_LAYOUTS:
    _decode = f"hip_moe_decode_{_arch}_{_weight}"
    KERNELS[_decode, _decode] = hip_moe.run_decode
    for _other, (_gate_up, _down) in _BESIDE[_weight].items():
        KERNELS |= {(_decode, _other): hip_moe.then(_down), (_other, _decode): hip_moe.after(_gate_up)}
"""Kernel names of gate_up and down -> what launches the pair. Selection chooses only among these and the reference."""
_BF16_BIASES = frozenset(f"hip_moe_decode_{arch}_{weight}" for arch, weight in AMD_MOE_DECODE_LAYOUTS)
"""Kernels that add biases in bf16 alone."""


class Pair(NamedTuple):
    """The choices for both GEMMs: a pair in `KERNELS`, or both the reference. And the GEMMs that they are for."""

    gate_up: KernelChoice
    down: KernelChoice
    problems: tuple[GemmProblem, GemmProblem]

    @property
    def kernels(self) -> tuple[str, str]:
        return self.gate_up.kernel, self.down.kernel


def sides(launchable: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the kernels that gate_up, and down, may be given."""
    gate_up, down = (frozenset(pair[side] for pair in KERNELS) & launchable | {REFERENCE} for side in (0, 1))
    return gate_up, down


def decide(gate_up: GemmProblem, down: GemmProblem, launchable: frozenset[str], choose: Chooser) -> Pair:
    """The choices for two problems of one M. The down GEMM takes the blocks that gate_up routed.

    One launcher runs both: where either GEMM has none, the other is the reference's too, and the trace says so.
    """
    mine = sides(launchable)
    for _ in range(2):
        first = choose(gate_up, mine[0])
        second = choose(replace(down, block_m=first.config.block_m or 0), mine[1])
        if (first.kernel, second.kernel) in KERNELS:
            return Pair(first, second, (gate_up, down))
        mine = mine[0] - {first.kernel} | {REFERENCE}, mine[1]  # whose blocks no kernel for down takes
    first, second = (choose(problem, frozenset({REFERENCE})) for problem in (gate_up, down))
    return Pair(first, second, (gate_up, down))


class BoundMoe:
    """A layer's two operands with their choices: what the custom op looks up by the layer's text."""

    def __init__(self, gate_up: Operand, down: Operand, plain: MoeProblem) -> None:
        self.gate_up, self.down, self._plain = gate_up, down, plain
        self._launchable = launchable(gate_up.arch)
        self._pairs: dict[tuple[int, torch.dtype, bool], Pair] = {}

    @property
    def available(self) -> frozenset[str]:
        """Names of the kernels that may be chosen."""
        return frozenset[str]().union(*sides(self._launchable))

    def pair(self, m: int, dtype: torch.dtype, wide_bias: bool = False) -> Pair:
        """What runs at this M for a model of this dtype. Raises SchemeError where no model has it.

        wide_bias: a bias is not in bf16, which is all that decode kernels read.
        """
        key = m, dtype, wide_bias
        found = self._pairs.get(key)
        if found is None:
            gate_up, down = (operand.problem_of(dtype_name(dtype), m) for operand in (self.gate_up, self.down))
            usable = self._launchable - _BF16_BIASES if wide_bias else self._launchable
            found = self._pairs[key] = decide(gate_up, down, usable, choose)
        return found

    def problem(self, scale13: torch.Tensor | None, scale2: torch.Tensor | None) -> MoeProblem:
        """What is computed, with the scales of static fp8 inputs."""
        return replace(self._plain, act13=self.gate_up.act(scale13), act2=self.down.act(scale2))


def describe(gate_up: Operand, down: Operand, problem: MoeProblem) -> str:
    """Both operands and all of `problem` but its tensors, on one line."""
    plain = {name: getattr(problem, name) for name in _PLAIN} | {"activation": asdict(problem.activation)}
    parts = {"gate_up": gate_up.to_json(), "down": down.to_json(), "moe": plain}
    return json.dumps(parts, separators=(",", ":"))


_PLAIN = ("num_experts", "weight_on_input", "combine", "weight_output", "scale")


@cache  # one entry a kind of layer; a process serves one model
def bound(layer: str) -> BoundMoe:
    """The operands that a text stands for (`describe`)."""
    parts = json.loads(layer)
    gate_up, down = (Operand.from_json(parts[side]) for side in ("gate_up", "down"))
    plain: dict[str, Any] = parts["moe"] | {"activation": Activation(**parts["moe"]["activation"])}
    return BoundMoe(gate_up, down, MoeProblem(act13=gate_up.act(None), act2=down.act(None), **plain))


_LIBRARY = torch.library.Library("amd_mx", "FRAGMENT")
_LIBRARY.define(
    "fused_moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor[] w13, Tensor[] w2, "
    "Tensor? b13, Tensor? b2, Tensor? act13_scale, Tensor? act2_scale, str layer) -> Tensor"
)


@torch.library.impl(_LIBRARY, "fused_moe", "CompositeExplicitAutograd")
def _fused_moe(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    act13_scale: torch.Tensor | None,
    act2_scale: torch.Tensor | None,
    layer: str,
) -> torch.Tensor:
    this = bound(layer)
    _check(x, topk_ids, topk_weights, this.gate_up.problem)
    gate_up, down = this.gate_up.form.bind(*w13), this.down.form.bind(*w2)
    problem, m = this.problem(act13_scale, act2_scale), x.shape[0]
    if not m:
        return x.new_zeros(0, down.n) if problem.combine else x.new_zeros(0, topk_ids.shape[1], down.n)
    pair = this.pair(m, x.dtype, any(b is not None and b.dtype != torch.bfloat16 for b in (b13, b2)))
    if pair.kernels == (REFERENCE, REFERENCE):
        kept = unpacked(gate_up, pair.gate_up), unpacked(down, pair.down)
        values13, values2 = (lambda e, w=w: w.expert(e).dequantize() for w in kept)
        return reference.fused_moe(x, topk_ids, topk_weights, problem, values13, values2, b13, b2)
    b13, b2 = (None if b is None else b.contiguous() for b in (b13, b2))  # as kernels index them
    call = MoeCall(
        x, topk_ids, topk_weights, gate_up, down, b13, b2, problem, pair.gate_up.config, pair.down.config,
        *pair.problems,
    )  # fmt: skip
    return KERNELS[pair.kernels](call)


@torch.library.register_fake("amd_mx::fused_moe", lib=_LIBRARY)
def _fused_moe_fake(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    w13: list[torch.Tensor],
    w2: list[torch.Tensor],
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    act13_scale: torch.Tensor | None,
    act2_scale: torch.Tensor | None,
    layer: str,
) -> torch.Tensor:
    this = bound(layer)
    _check(x, topk_ids, topk_weights, this.gate_up.problem)
    combined = this.problem(None, None).combine
    lead = topk_ids.shape[:1] if combined else topk_ids.shape
    return x.new_empty((*lead, this.down.problem.n))


def _check(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, gate_up: GemmProblem) -> None:
    if x.dim() != 2 or x.shape[1] != gate_up.k:
        raise ShapeError(f"x {tuple(x.shape)}", f"the layer's hidden size is {gate_up.k}", "pass x[M, H]")
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        what = f"topk_ids {tuple(topk_ids.shape)}, topk_weights {tuple(topk_weights.shape)}, x {tuple(x.shape)}"
        raise ShapeError(what, "not [M, top_k] twice and [M, H]", "pass what SGLang dispatched")


@dataclass(frozen=True, eq=False)
class QuantizedMoe:
    """The experts of one layer on one rank.

    Attributes:
        gate_up, down: its GEMMs, at any M.
        problem: everything else that it computes.
        w13, w2: [E, N, H] and [E, H, I]; their layouts are the problems'.
        b13, b2: biases [E, N] and [E, H], or None.
        values: where the reference serves every M (a CPU), what gives kept fp32 values [N, K] of an expert of w13 and
            of w2; None elsewhere.
    """

    gate_up: GemmProblem
    down: GemmProblem
    problem: MoeProblem
    w13: Weight
    w2: Weight
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    values: tuple[Callable[[int], torch.Tensor], Callable[[int], torch.Tensor]] | None = None
    text: str = field(init=False, repr=False)
    """The operands as the custom op is passed them."""

    def __post_init__(self) -> None:
        gate_up = Operand.of(self.gate_up, self.w13, self.problem.act13)
        down = Operand.of(self.down, self.w2, self.problem.act2)
        object.__setattr__(self, "text", describe(gate_up, down, self.problem))

    def prepare(self) -> None:
        """Load what its kernels launch, ahead of graph captures."""
        hip.preload(bound(self.text).available, self.w13.tensors[0])

    def __call__(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x[M, H], local ids and weights [M, top_k] -> [M, H], or [M, top_k, H] where nothing is combined."""
        if self.values is not None:
            _check(x, topk_ids, topk_weights, self.gate_up)
            bound(self.text).pair(x.shape[0], x.dtype)  # for its trace: only the reference is here
            return reference.fused_moe(x, topk_ids, topk_weights, self.problem, *self.values, self.b13, self.b2)
        return torch.ops.amd_mx.fused_moe(  # type: ignore[no-any-return]
            x, topk_ids, topk_weights, self.w13.tensors, self.w2.tensors, self.b13, self.b2,
            self.problem.act13.scale, self.problem.act2.scale, self.text,
        )  # fmt: skip
