"""Why a problem gets the kernel it gets: what is planned, what would run in this build, and everything refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.choose import REFERENCE, Selector
from sglang_amd_quant.selection.layout_choice import LayoutChoice, choose_layout
from sglang_amd_quant.selection.legality import legal
from sglang_amd_quant.selection.lookup import candidates
from sglang_amd_quant.selection.problem import GemmProblem, KernelChoice, Refused
from sglang_amd_quant.selection.specs import kernels, shipped


@dataclass(frozen=True)
class View:
    """A layout and the choice on it, as one set of kernels gives them."""

    layout: LayoutChoice
    choice: KernelChoice


@dataclass(frozen=True)
class Explanation:
    """One problem, explained.

    Attributes:
        problem: as asked.
        planned: with every kernel that selection knows, published mechanisms included.
        here: with the kernels of this build: what would run.
        others: kernels for this op and scheme that were never candidates of the plan, each with the reason.
        lacking: kernels of this package that this installation cannot launch on the arch, each with the reason.
    """

    problem: GemmProblem
    planned: View
    here: View
    others: tuple[Refused, ...]
    lacking: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        def view(v: View) -> dict[str, Any]:
            layout = {"layout": v.layout.layout, "source": v.layout.source, "why": list(v.layout.reasons)}
            return {"layout": layout, **v.choice.to_json(), "layout_read": v.choice.layout}

        others = [{"kernel": other.kernel, "why": list(other.why)} for other in self.others]
        return {
            "problem": self.problem.to_json(),
            "planned": view(self.planned),
            "here": view(self.here),
            "others": others,
            "lacking": dict(self.lacking),
        }

    def text(self) -> str:
        """For people: a few aligned lines."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        p = self.problem
        arch = ARCHES.get(p.arch)
        yield p.label()
        routed = f"{p.rows} routed rows, " if p.moe else ""
        yield f"  {routed}{arch.device if arch else 'unknown device'} with {p.cu_count} compute units"
        yield ""
        yield from _show("planned", self.planned)
        if self.planned.choice.in_build and self.here.choice == self.planned.choice:
            yield "here     the same: this build has the kernel"
        else:
            planned, here = self.planned.choice, self.here.choice
            because = "" if planned.in_build else f": no kernel binary of {planned.kernel} in this build"
            yield f"here     {here.kernel} would run ({here.source}){because}"
            if here.config.items():
                yield f"         {here.config}"
            yield from (f"         {why}" for why in here.why)
            if self.here.layout.layout != self.planned.layout.layout:
                yield f"         on {self.here.layout.layout} weights: {self.here.layout.reasons[0]}"
        yield from (f"         {name} cannot be launched here: {why}" for name, why in self.lacking.items())
        yield ""
        yield from _refused("refused on the way to the plan, in the order of the lookup", self.planned.choice.refused)
        yield from _refused("never candidates", self.others)


def explain(
    problem: GemmProblem,
    plan: Selector | None = None,
    here: Selector | None = None,
    lacking: Mapping[str, str] | None = None,
) -> Explanation:
    """Explain one problem. A problem without a layout gets the one that `choose_layout` gives.

    Args:
        problem: what to explain.
        plan: what to plan with; None = all kernels known, installed packs.
        here: what would run; None = all kernels of this package, installed packs.
        lacking: kernels of this package that cannot be launched, with reasons (`runtime.detect.missing`); those for
            another op or scheme are left out of the explanation.
    """
    plan, here = plan or Selector(), here or Selector(available=shipped())
    planned = view(problem, plan)
    seen = {planned.choice.kernel, *(r.kernel for r in planned.choice.refused), REFERENCE}
    spoken = {candidate.kernel for candidate in candidates(problem, plan.packs)} if problem.m else set()
    others = [
        Refused(
            "none",
            spec.name,
            config,
            tuple(r.text for r in legal(laid, spec, config)) or (_LATER if spec.name in spoken else _UNSPOKEN,),
        )
        for spec in kernels().values()
        if spec.name not in seen and problem.op in spec.ops and problem.scheme in spec.schemes
        for laid in (replace(problem, layout=planned.layout.layout),)
        for config in (spec.configure(problem),)
    ]
    mine = {name: why for name, why in (lacking or {}).items() if kernels()[name].covers(problem)}
    return Explanation(problem, planned, view(problem, here), tuple(others), mine)


_LATER = "legal here, but the lookup took an earlier candidate"
_UNSPOKEN = "legal here, but no entry, rule or heuristic speaks for it"


def view(problem: GemmProblem, selector: Selector) -> View:
    """The layout that load time would give the weights, and the choice on it."""
    if problem.layout is None:
        layout = choose_layout(problem, selector)
        problem = replace(problem, layout=layout.layout)
    else:
        layout = LayoutChoice(problem.layout, "given", ("given",))
    return View(layout, selector(problem))


def _show(title: str, v: View) -> Iterator[str]:
    yield f"{title:8} {v.choice.kernel}   source: {v.choice.source}"
    if v.choice.config.items():
        yield f"         {v.choice.config}"
    yield from (f"         {why}" for why in v.choice.why)
    if v.choice.us is not None:
        yield f"         {v.choice.us:g} us, as its entry states"
    yield f"         weights {v.layout.layout} ({v.layout.source}): {v.layout.reasons[0]}"
    yield from (f"           {reason}" for reason in v.layout.reasons[1:])


def _refused(title: str, refused: tuple[Refused, ...]) -> Iterator[str]:
    if not refused:
        return
    yield title
    width = max(len(r.kernel) for r in refused)
    for r in refused:
        source = "" if r.source == "none" else f"{r.source:10} "
        yield f"  {source}{r.kernel:{width}}  {r.why[0]}"
        yield from (f"  {'':{len(source) + width}}  {why}" for why in r.why[1:])
