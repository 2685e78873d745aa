"""A quantized linear layer: asks selection which kernel runs at this M, and runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from sglang_amd_quant.errors import ShapeError, UnsupportedError
from sglang_amd_quant.ops import hip, reference, triton_group, triton_hopper, triton_moe, triton_mx
from sglang_amd_quant.ops.activation import Activation
from sglang_amd_quant.ops.operand import Operand, dtype_name
from sglang_amd_quant.ops.packed import PackedWeight, Weight, unpacked
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.detect import launchable
from sglang_amd_quant.selection import Config, GemmProblem, KernelChoice, choose
from sglang_amd_quant.selection.amd_decode import AMD_DECODE_LAYOUTS
from sglang_amd_quant.selection.choose import REFERENCE
from sglang_amd_quant.selection.specs import kernel


@dataclass(frozen=True, eq=False)
class LinearCall:
    """What a launcher gets.

    Attributes:
        x: [M, K], M >= 1, in the model's dtype, any strides.
        weight: [N, K] in a layout that its spec reads.
        bias: [N] of one of the launcher's `bias_dtypes`, or None.
        y: [M, N], or [M, N / 2] after an activation, contiguous, to be filled; of a dtype that its spec stores.
        act: how x is quantized, by the kernel or by `quantize_activation`.
        config: its parameters.
        problem: the GEMM at this M.
        activation: what the kernel does with its sums, or None.
    """

    x: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None
    y: torch.Tensor
    act: ActQuant
    config: Config
    problem: GemmProblem
    activation: Activation | None = None


@dataclass(frozen=True)
class LinearKernel:
    """How a kernel is launched.

    Attributes:
        run: fills `y`.
        bias_dtypes: of biases that it adds itself. Others are added to its fp32 result.
    """

    run: Callable[[LinearCall], None]
    bias_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


ANY_FLOAT = (torch.bfloat16, torch.float16, torch.float32)

KERNELS: dict[str, LinearKernel] = {
    "gemv_mxfp4": LinearKernel(hip.run_gemv_mxfp4),
    "triton_mx_gemm": LinearKernel(triton_mx.run_mx_gemm, ANY_FLOAT),
    "triton_gated_e2m1_gemm": LinearKernel(triton_moe.run_gated_gemm, ANY_FLOAT),
    "triton_gated_e4m3_gemm": LinearKernel(triton_moe.run_gated_gemm, ANY_FLOAT),
    "triton_e2m1_gemm": LinearKernel(triton_group.run_registers_gemm, ANY_FLOAT),
    "triton_e2m1_bf16_gemm": LinearKernel(triton_group.run_registers_gemm, ANY_FLOAT),
    "triton_e2m1_fp16_gemm": LinearKernel(triton_group.run_registers_gemm, ANY_FLOAT),
    "triton_e4m3_gemm": LinearKernel(triton_group.run_registers_gemm, ANY_FLOAT),
    "triton_int4_gemm": LinearKernel(triton_group.run_group_gemm, ANY_FLOAT),
    "triton_fp16_gemm": LinearKernel(triton_group.run_group_gemm, ANY_FLOAT),
    "triton_hopper_bf16": LinearKernel(triton_hopper.run_hopper_gemm, ANY_FLOAT),
    "triton_hopper_e4m3": LinearKernel(triton_hopper.run_hopper_gemm, ANY_FLOAT),
    "triton_hopper_int4": LinearKernel(triton_hopper.run_hopper_gemm, ANY_FLOAT),
    "hip_decode": LinearKernel(hip.run_decode),
    "hip_decode_e4m3": LinearKernel(hip.run_decode),
    "hip_decode_int4": LinearKernel(hip.run_decode),
    **{f"hip_decode_{arch}_{w}": LinearKernel(hip.run_decode_amd) for arch, w in AMD_DECODE_LAYOUTS},
}
"""Kernel name in selection -> its launcher. Selection chooses only among these and the reference."""


class Plan(NamedTuple):
    """What a layer does at one M, for a model of one dtype.

    Attributes:
        problem: the GEMM.
        choice: selection's.
        launcher: its kernel's; None for the reference.
        fused_biases: dtypes of biases that the kernel adds.
        unfused_dtype: what the kernel stores where the op is to add another bias, or to activate.
        activates: whether the kernel does.
    """

    problem: GemmProblem
    choice: KernelChoice
    launcher: LinearKernel | None
    fused_biases: tuple[torch.dtype, ...]
    unfused_dtype: torch.dtype
    activates: bool


class BoundLinear:
    """A layer's operand with its choices: what the custom op looks up by the layer's text."""

    def __init__(self, operand: Operand) -> None:
        self.operand, self.activation = operand, Activation.of(operand.problem.epilogue)
        self.columns = operand.problem.n if self.activation is None else self.activation.columns(operand.problem.n)
        self.available = launchable(operand.arch).intersection(KERNELS) | {REFERENCE}
        self._plans: dict[tuple[int, torch.dtype], Plan] = {}

    def plan(self, m: int, dtype: torch.dtype) -> Plan:
        """What runs at this M for a model of this dtype. Raises SchemeError where no model has it."""
        found = self._plans.get((m, dtype))
        if found is None:
            problem = self.operand.problem_of(dtype_name(dtype), m)
            choice = choose(problem, self.available)
            launcher, spec = KERNELS.get(choice.kernel), kernel(choice.kernel)
            biases = launcher.bias_dtypes if launcher is not None and "bias" in spec.fuses else ()
            wide = torch.float32 if "fp32" in spec.out_dtypes else dtype
            activates = self.activation is not None and "activation" not in choice.unfused
            found = self._plans[m, dtype] = Plan(problem, choice, launcher, biases, wide, activates)
        return found

    def run(self, x: torch.Tensor, weight: Weight, act: ActQuant, bias: torch.Tensor | None) -> torch.Tensor:
        """x[M, K] -> [M, N] in x's dtype, or [M, N / 2] after an activation.

        Raises:
            UnsupportedError: packed weights are left to the reference, or to a kernel that lacks part of the epilogue.
        """
        m, f = x.shape[0], self.activation
        if not m:
            return x.new_zeros(0, self.columns)
        plan = self.plan(m, x.dtype)
        bias = None if bias is None else bias.contiguous()  # as kernels index it
        if plan.launcher is None:
            return reference.linear(x, unpacked(weight, plan.choice).dequantize(), act, bias, f)
        biased = bias is None or bias.dtype in plan.fused_biases
        whole = biased and (f is None or plan.activates)
        if not whole and f is not None and isinstance(weight, PackedWeight):  # its rows alternate gates and ups
            raise UnsupportedError(
                f"{plan.problem.label()} with a bias of {None if bias is None else bias.dtype}",
                f"{plan.choice.kernel} cannot do all of its epilogue",
                "have the bias in bf16",
            )
        columns, dtype = (self.columns, x.dtype) if whole else (weight.n, plan.unfused_dtype)
        y = torch.empty(m, columns, dtype=dtype, device=x.device)
        plan.launcher.run(
            LinearCall(
                x, weight, bias if biased else None, y, act, plan.choice.config, plan.problem, f if whole else None
            )
        )
        if whole:
            return y
        y = y if biased or bias is None else y + bias
        return (y if f is None else f(y.float())).to(x.dtype)


@cache  # one entry a kind of layer; a process serves one model
def bound(layer: str) -> BoundLinear:
    """The operand that a text stands for (`Operand.text`)."""
    return BoundLinear(Operand.from_json(json.loads(layer)))


_LIBRARY = torch.library.Library("amd_mx", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor? act_scale, str layer) -> Tensor"
)  # fmt: skip


@torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    layer: str,
) -> torch.Tensor:
    run, operand = bound(layer).run, bound(layer).operand
    _check(x, operand.problem)
    y = run(x.reshape(-1, x.shape[-1]), operand.form.bind(*weight), operand.act(act_scale), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.library.register_fake("amd_mx::linear", lib=_LIBRARY)
def _linear_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    act_scale: torch.Tensor | None,
    layer: str,
) -> torch.Tensor:
    _check(x, bound(layer).operand.problem)
    return x.new_empty((*x.shape[:-1], bound(layer).columns))


def _check(x: torch.Tensor, problem: GemmProblem) -> None:
    if x.dim() < 1 or x.shape[-1] != problem.k:
        raise ShapeError(f"x {tuple(x.shape)}", f"the layer's K is {problem.k}", "pass x[..., K]")


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """One layer on one rank.

    Attributes:
        problem: its GEMM, at any M.
        weight: [N, K]; its layout is the problem's.
        act: how its input is quantized.
        values: gives kept fp32 values [N, K] where the reference serves every M (a CPU), so that they are not
            dequantized at each call; None elsewhere.
    """

    problem: GemmProblem
    weight: Weight
    act: ActQuant
    values: Callable[[], torch.Tensor] | None = None
    text: str = field(init=False, repr=False)
    """The operand as the custom op is passed it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", Operand.of(self.problem, self.weight, self.act).text)

    def prepare(self) -> None:
        """Load what its kernels launch, ahead of graph captures."""
        hip.preload(bound(self.text).available, self.weight.tensors[0])

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x[..., K] -> [..., N] in x's dtype, [..., N / 2] after an activation."""
        if self.values is not None:
            _check(x, self.problem)
            bound(self.text).plan(x.shape[:-1].numel(), x.dtype)  # for its trace: only the reference is here
            return reference.linear(x, self.values(), self.act, bias, bound(self.text).activation)
        return torch.ops.amd_mx.linear(  # type: ignore[no-any-return]
            x, self.weight.tensors, bias, self.act.scale, self.text
        )
