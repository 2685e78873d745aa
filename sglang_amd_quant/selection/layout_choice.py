"""Which layout to give weights at load time: swizzled or strided is a tuned choice, made before any M is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.selection.choose import REFERENCE, Selector, process_selector
from sglang_amd_quant.selection.lookup import entry_shapes
from sglang_amd_quant.selection.packs import Packs
from sglang_amd_quant.selection.problem import GemmProblem
from sglang_amd_quant.selection.rules import LAYOUT_RULES
from sglang_amd_quant.selection.specs import kernels

STRIDED = "strided"

SAMPLE_MS = (1, 4, 16, 64, 256, 1024, 8192)
"""Ms for which a layout must have kernels: what serving meets between single-user decode and prefill."""


@dataclass(frozen=True)
class LayoutChoice:
    """A layout for one layer's weights.

    Attributes:
        layout: its name.
        source: `exact` (entries measured both ways), `rule`, or `default`.
        reasons: why, and each layout refused with the reason.
    """

    layout: str
    source: str
    reasons: tuple[str, ...]


def choose_layout(problem: GemmProblem, selector: Selector | None = None) -> LayoutChoice:
    """The layout that serves a layer best over all M.

    Order: where entries measured the same Ms in several layouts, the one with the least time; else the first rule that
    holds; else strided. A layout is taken only if the weights can have it and kernels for it cover as many of
    `SAMPLE_MS` as strided ones do, so that no weight is swizzled for kernels that are not there.

    Args:
        problem: the layer's GEMM; `m` and `layout` do not matter.
        selector: what may be chosen from; None = what this installation ships.
    """
    selector = selector or process_selector()
    reasons: list[str] = []
    ruled = _ruled(problem, selector, reasons)
    for layout, source, why in (*_measured(problem, selector.packs), *ruled, *_readable(problem)):
        against = _against(problem, selector, layout)
        if not against:
            return LayoutChoice(layout, source, (why, *reasons))
        reasons += (f"{layout} refused ({why}): {reason}" for reason in against)
    return LayoutChoice(STRIDED, "default", ("the order of the checkpoint, which the reference reads", *reasons))


def fuses_activation(problem: GemmProblem, layout: str, selector: Selector) -> bool:
    """Whether kernels do the activation of a linear's epilogue at every M of `SAMPLE_MS`, its weights in `layout`.

    Only from weights that were packed for it: there 8 gates and their 8 ups lie by turns.
    """
    if problem.epilogue.activation is None or not TensorLayout.parse(layout).packed:
        return False
    choices = (selector.decide(replace(problem, layout=layout, m=m)) for m in SAMPLE_MS)
    return all(choice.kernel != REFERENCE and "activation" not in choice.unfused for choice in choices)


Preference = tuple[str, str, str]
"""Layout, source, why."""


def _measured(problem: GemmProblem, packs: Packs) -> Iterable[Preference]:
    rows = [row for shape in entry_shapes(problem) for rows in packs.shape(shape).values() for row in rows]
    times: dict[str, dict[tuple[object, ...], float]] = {}
    for row in rows:
        if row.layout and row.us is not None and row.e in (None, problem.e_local):
            at = (row.cu_num, row.e, *row.at)
            cell = times.setdefault(row.layout, {})
            cell[at] = min(row.us, cell.get(at, row.us))
    common = set.intersection(*map(set, times.values())) if len(times) > 1 else set()
    if not common:
        return []
    totals = sorted((sum(cells[at] for at in common), layout) for layout, cells in times.items())
    told = ", ".join(f"{layout} {total:.1f} us" for total, layout in totals)
    return [(layout, "exact", f"measured over {len(common)} common entries: {told}") for _, layout in totals]


def _ruled(problem: GemmProblem, selector: Selector, reasons: list[str]) -> Iterable[Preference]:
    """The first rule that holds, as a list; what those before it lack goes to `reasons`."""
    for rule in (rule for rule in LAYOUT_RULES if rule.holds(problem)):
        if not rule.kernel or rule.kernel in selector.available:
            return [(rule.layout, "rule", rule.origin)]
        reasons.append(f"{rule.layout} refused ({rule.origin}): no available kernel {rule.kernel}")
    return []


def _readable(problem: GemmProblem) -> Iterable[Preference]:
    """Strided, then whatever else some kernel for this problem reads."""
    names = dict.fromkeys((STRIDED, *(n for s in kernels().values() if s.covers(problem) for n in s.layouts)))
    return [(name, "default", "the first that kernels read") for name in names]


def _against(problem: GemmProblem, selector: Selector, layout: str) -> list[str]:
    reasons = TensorLayout.parse(layout).reasons(problem.n, problem.k, scheme_named(problem.scheme))
    if reasons:
        return reasons
    covered, plain = _covered(problem, selector, layout), _covered(problem, selector, STRIDED)
    if not covered:
        return ["no available kernel reads it for this problem"]
    if covered < plain:
        return [f"kernels cover {covered} of {len(SAMPLE_MS)} sample Ms, {plain} when strided"]
    return []


def _covered(problem: GemmProblem, selector: Selector, layout: str) -> int:
    choices = (selector.decide(replace(problem, m=m, layout=layout)) for m in SAMPLE_MS)
    return sum(choice.source != REFERENCE for choice in choices)
