"""One quantized GEMM of a layer without its tensors: as text it passes through a custom op's schema."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.ops.packed import PackedForm, Weight
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.detect import CPU, current_arch
from sglang_amd_quant.schemes import ScaleMode
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.selection import GemmProblem
from sglang_amd_quant.selection.arch import member
from sglang_amd_quant.tensor import MxForm, MxTensor, PadPlan

DTYPES: dict[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Dtypes of a model -> names in `GemmProblem.out_dtype`."""


@dataclass(frozen=True)
class Operand:
    """A layer's GEMM at any M, and how its weights and input are stored.

    Attributes:
        problem: m is 0, the layout that of the weights.
        arch: the architecture as the driver reports it, where `problem.arch` is the family.
        pad: of the weights.
        mode: how scales of its input are rounded; None = the format's default.
    """

    problem: GemmProblem
    arch: str
    pad: PadPlan
    mode: ScaleMode | None = None

    @classmethod
    def of(cls, problem: GemmProblem, weight: Weight, act: ActQuant) -> Operand:
        """The operand that a layer's weights are, on this device if that is of the problem's family.

        Raises:
            ShapeError: the weights have not the problem's sizes, or not as kernels on a GPU index them.
            SchemeError: nor its scheme, group or activation format; or int4 without words (`MxTensor.with_words`).
        """
        lead = (problem.e_local,) if problem.moe else ()
        if weight.shape != (*lead, problem.n, problem.k):
            raise ShapeError(f"weights {list(weight.shape)}", f"the layer is {problem.label()}", "pass its own weights")
        padded = isinstance(weight, MxTensor) and (weight.pad.n, weight.pad.k) != (problem.n, problem.k)
        if current_arch() != CPU and (padded or not all(t.is_contiguous() for t in weight.tensors)):
            what = f"weights {list(weight.shape)} in storage of {[list(t.shape) for t in weight.tensors]}"
            raise ShapeError(what, "kernels find rows by N and K alone", "pass contiguous weights without padding")
        act_format = "fp8_static" if act.scale is not None else act.scheme.act
        if weight.scheme.name != problem.scheme or act_format != problem.act:
            what = f"{weight.scheme.name} weights with {act_format} activations"
            raise SchemeError(
                what, f"the layer is {problem.scheme} with {problem.act}", "build the layer from its scheme"
            )
        if weight.scheme.block != problem.group:
            what = f"{weight.scheme.name} weights {list(weight.shape)} in groups of {weight.scheme.block}"
            raise SchemeError(what, f"the layer's are of {problem.group}", "build the problem with the weights' group")
        if weight.scheme.weight == "int4" and weight.tensors[1].dtype != torch.int32:
            what = f"int4 weights {list(weight.shape)} with scales of {weight.tensors[1].dtype}"
            raise SchemeError(what, "ops take words of scale and zero point", "lay them out, or pass `with_words()`")
        arch = member(current_arch(), problem.arch)
        return cls(replace(problem, m=0, layout=weight.layout.name), arch, weight.pad, act.mode)

    @cached_property
    def form(self) -> MxForm | PackedForm:
        """What the op binds the weight's tensors to."""
        p = self.problem
        shape = (p.e_local, p.n, p.k) if p.moe else (p.n, p.k)
        scheme = replace(scheme_named(p.scheme), block=p.group)
        layout = TensorLayout.parse(p.layout or "strided")
        return PackedForm(scheme, shape, layout) if layout.packed else MxForm(scheme, shape, layout, self.pad)

    def act(self, scale: torch.Tensor | None) -> ActQuant:
        """How the input is quantized; `scale` is that of static fp8."""
        return ActQuant(self.form.scheme, self.mode, scale)

    def problem_of(self, dtype: str, m: int = 0) -> GemmProblem:
        """The problem at an M for a model of this dtype, which is what the op hands on."""
        return replace(self.problem, m=m, out_dtype=dtype)

    @cached_property
    def text(self) -> str:
        """`to_json` on one line."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return {
            "problem": self.problem.to_json(),
            "arch": self.arch,
            "pad": [self.pad.n, self.pad.k],
            "mode": self.mode,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Operand:
        """Read `to_json`'s form. Raises ShapeError where the problem cannot be read."""
        mode = None if data["mode"] is None else ScaleMode(data["mode"])
        return cls(GemmProblem.from_json(data["problem"]), data["arch"], PadPlan(*data["pad"]), mode)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a model's dtype.

    Raises:
        SchemeError: no op takes it.
    """
    if dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise SchemeError(f"activations of {dtype}", "no op takes them", f"use one of {known}")
    return DTYPES[dtype]
