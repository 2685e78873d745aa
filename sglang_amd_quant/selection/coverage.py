"""What a model's GEMMs would run on, GEMM by GEMM and M by M, and which shapes are untuned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import BF16
from sglang_amd_quant.selection.choose import Selector
from sglang_amd_quant.selection.layout_choice import LayoutChoice, choose_layout, fuses_activation
from sglang_amd_quant.selection.problem import SOURCES, TUNED, Epilogue, GemmProblem, KernelChoice
from sglang_amd_quant.shapes import Gemm, ModelFacts, plan

DEFAULT_MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

_SILU = Epilogue(activation="silu")


@dataclass(frozen=True)
class Row:
    """One GEMM over all M.

    Attributes:
        problem: the GEMM; its M does not matter.
        layers: modules that run it, and how many times a forward pass in all.
        layout: what load time would give its weights.
        choices: by M; a trace need not have all.
    """

    problem: GemmProblem
    layers: tuple[str, ...]
    count: int
    layout: LayoutChoice
    choices: dict[int, KernelChoice]

    @property
    def label(self) -> str:
        p = self.problem
        experts = f" E={p.e_local}" if p.moe else ""
        activation = f" + {p.epilogue.activation}" if p.op == "linear" and p.epilogue.activation else ""
        return f"{p.op} {p.scheme} {p.n}x{p.k}{experts}{p.of_dtype}{activation}"


@dataclass(frozen=True)
class Report:
    """Coverage of a model, or of what a trace recorded.

    Attributes:
        title: model, arch and parallelism.
        ms: columns.
        rows: one a distinct GEMM.
        bf16: modules that are not quantized: the engine runs them, not this package.
        recorded: the choices were read from a trace, not planned.
    """

    title: str
    ms: tuple[int, ...]
    rows: tuple[Row, ...]
    bf16: tuple[str, ...] = ()
    recorded: bool = False

    @property
    def choices(self) -> list[KernelChoice]:
        return [choice for row in self.rows for choice in row.choices.values()]

    def totals(self) -> dict[str, int]:
        """Cells per source, every source named."""
        counts = Counter(choice.source for choice in self.choices)
        return {source: counts[source] for source in SOURCES}

    @property
    def tuned_percent(self) -> float:
        """Share of cells whose choice is an entry tuned for that GEMM (`TUNED`); 100 if there are no cells."""
        cells = self.choices
        return 100.0 * sum(choice.tuned for choice in cells) / len(cells) if cells else 100.0

    @property
    def without_binary(self) -> int:
        """Cells whose kernel this build does not have: the reference would run there."""
        return sum(not choice.in_build for choice in self.choices)

    def misses(self) -> list[tuple[GemmProblem, str]]:
        """Problems that no entry is tuned for, each with the source that decided."""
        return [
            (replace(row.problem, m=m), choice.source)
            for row in self.rows
            for m, choice in row.choices.items()
            if choice.source not in TUNED
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "recorded": self.recorded,
            "m": list(self.ms),
            "totals": self.totals(),
            "tuned_percent": round(self.tuned_percent, 2),
            "cells": len(self.choices),
            "cells_without_binary": self.without_binary,
            "bf16": list(self.bf16),
            "gemms": [
                {
                    "problem": {k: v for k, v in row.problem.to_json().items() if k != "m"},
                    "layers": list(row.layers),
                    "count": row.count,
                    "layout": {"layout": row.layout.layout, "why": list(row.layout.reasons)},
                    "choices": {str(m): choice.to_json() for m, choice in row.choices.items()},
                }
                for row in self.rows
            ],
        }

    def to_csv_rows(self) -> Iterable[list[object]]:
        """A header, then one row a cell."""
        yield [
            "op", "scheme", "arch", "out_dtype", "N", "K", "E_local", "E_total", "top_k", "count", "M", "source",
            "kernel", "layout", "config", "in_build", "activation", "layers",
        ]  # fmt: skip
        for row in self.rows:
            p = row.problem
            for m, choice in row.choices.items():
                yield [
                    p.op, p.scheme, p.arch, p.out_dtype, p.n, p.k, p.e_local, p.e_total, p.top_k, row.count, m,
                    choice.source, choice.kernel, choice.layout, choice.config, choice.in_build,
                    p.epilogue.activation or "", " ".join(row.layers),
                ]  # fmt: skip


def problem_of(
    gemm: Gemm, arch: str, m: int, tp: int, ep: int, cu_count: int = 0, out_dtype: str = "bf16"
) -> GemmProblem:
    """The problem that a planned GEMM is at M tokens. gate_up carries a gated activation, a dense one where SGLang
    leaves it to the GEMM; down the routing weight."""
    return GemmProblem(
        gemm.op, gemm.scheme, arch, m, gemm.N, gemm.K, cu_count, gemm.E_local, gemm.E_total, gemm.top_k, tp, ep,
        epilogue=_SILU if gemm.op == "moe_gate_up" or gemm.activated else Epilogue(), weighted=gemm.op == "moe_down",
        out_dtype=out_dtype, group=gemm.block,
    )  # fmt: skip


def coverage(
    facts: ModelFacts,
    arch: str,
    tp: int,
    ep: int,
    recipe: Recipe | str,
    ms: Sequence[int] = DEFAULT_MS,
    selector: Selector | None = None,
    cu_count: int = 0,
    out_dtype: str = "bf16",
) -> Report:
    """Plan every quantized GEMM of a model at every M.

    Args:
        facts: the model.
        arch, cu_count: the device.
        tp, ep: SGLang's parallelism.
        recipe: scheme name or recipe.
        ms: tokens.
        selector: what may be chosen; None = all kernels known, published ones included, with the installed packs.
        out_dtype: the model's dtype.

    Raises:
        ShapeError: the model cannot be divided so; one line says why.
    """
    selector = selector or Selector()
    groups: dict[GemmProblem, list[Gemm]] = {}
    bf16 = []
    for gemm in plan(facts, tp, ep, recipe):
        if gemm.scheme == BF16:
            bf16.append(gemm.layer)
        else:
            groups.setdefault(problem_of(gemm, arch, 1, tp, ep, cu_count, out_dtype), []).append(gemm)
    rows = []
    for problem, gemms in groups.items():
        layout, here = _as_run(problem, selector)
        layers = tuple(dict.fromkeys(gemm.layer for gemm in gemms))
        choices = {m: selector(replace(here, m=m)) for m in ms}
        rows.append(Row(here, layers, sum(gemm.count for gemm in gemms), layout, choices))
    title = f"{facts.name} in {out_dtype} on {arch}, TP {tp} EP {ep}, "
    title += recipe if isinstance(recipe, str) else recipe.source
    return Report(title, tuple(ms), tuple(rows), tuple(dict.fromkeys(bf16)))


def _as_run(problem: GemmProblem, selector: Selector) -> tuple[LayoutChoice, GemmProblem]:
    """The layout of a layer's weights, and the problem in it, a linear's activation left to a launch of its own where
    kernels do not do it."""
    layout = choose_layout(problem, selector)
    activated = problem.op == "linear" and problem.epilogue.activation
    if activated and not fuses_activation(problem, layout.layout, selector):
        return _as_run(replace(problem, epilogue=Epilogue()), selector)
    return layout, replace(problem, layout=layout.layout)


def recorded(choices: Iterable[tuple[GemmProblem, KernelChoice]], title: str) -> Report:
    """The report of what a trace recorded.

    Raises:
        ShapeError: nothing was recorded.
    """
    rows: dict[GemmProblem, dict[int, KernelChoice]] = {}
    for problem, choice in choices:
        rows.setdefault(replace(problem, m=1), {})[problem.m] = choice
    if not rows:
        raise ShapeError(title, "holds no choices", "give a trace with at least one")
    ms = tuple(sorted({m for found in rows.values() for m in found}))
    return Report(
        title,
        ms,
        tuple(
            Row(p, (), 1, LayoutChoice(p.layout or "", "recorded", ("as recorded",)), dict(sorted(found.items())))
            for p, found in rows.items()
        ),
        recorded=True,
    )
