"""`choose`: the kernel for a problem, from the first legal candidate of the lookup order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from sglang_amd_quant.selection import trace
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.legality import layout_of, legal, unfused
from sglang_amd_quant.selection.lookup import Candidate, candidates
from sglang_amd_quant.selection.packs import Packs, installed_packs
from sglang_amd_quant.selection.problem import Config, GemmProblem, KernelChoice, Refused
from sglang_amd_quant.selection.specs import PUBLISHED, kernel, kernels, shipped

REFERENCE = "reference"

NO_BINARY = "published mechanism, no kernel binary in this build"


class Selector:
    """Chooses among some kernels with some packs, and remembers.

    Args:
        packs: the tuned entries; None = those installed.
        available: names of the kernels that may be chosen, `reference` always among them; None = every registered
            one, published ones included: a plan, not what would run here (`KernelChoice.in_build` tells).
        recording: log misses and write the trace, as a serving process does.
    """

    def __init__(
        self,
        packs: Packs | None = None,
        available: Iterable[str] | None = None,
        recording: bool = False,
    ) -> None:
        self.packs = installed_packs() if packs is None else packs
        self.available = frozenset(kernels() if available is None else available) | {REFERENCE}
        self._recording = recording
        self._chosen: dict[GemmProblem, KernelChoice] = {}

    def __call__(self, problem: GemmProblem) -> KernelChoice:
        """The choice for a problem; the same object each time."""
        choice = self._chosen.get(problem)
        if choice is None:
            choice = self._chosen[problem] = self.decide(problem)
            if self._recording:
                trace.record(problem, choice, self.tunable(problem))
        return choice

    def tunable(self, problem: GemmProblem) -> bool:
        """Whether there is any kernel to tune for it: the reference has nothing to tune."""
        return any(name != REFERENCE and kernels()[name].covers(problem) for name in self.available)

    def decide(self, problem: GemmProblem) -> KernelChoice:
        """The choice, worked out afresh. Never raises: what no kernel covers is the reference's, with reasons."""
        refused: list[Refused] = []
        if problem.m == 0:
            return _reference(problem, ("no rows: there is nothing to launch",), refused)
        for candidate in candidates(problem, self.packs):
            against, overruled = self._against(problem, candidate)
            if not against:
                return _choice(problem, candidate, overruled, refused)
            refused.append(Refused(candidate.source, candidate.kernel, candidate.config or Config(), against))
        if problem.arch not in ARCHES:
            why = f"no kernel is known for {problem.arch}"
        elif not refused:
            why = f"no kernel is known for {problem.scheme} {problem.op} on {problem.arch}"
        else:
            why = "every candidate was refused"
        return _reference(problem, (why,), refused)

    def _against(self, problem: GemmProblem, candidate: Candidate) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Reasons that refuse a candidate, and estimates against it that its measurement overrules."""
        if candidate.out:
            return candidate.out, ()
        assert candidate.config is not None
        spec = kernel(candidate.kernel)
        found = legal(laid_out(problem, candidate), spec, candidate.config)
        overruled = tuple(r.text for r in found if r.estimate and candidate.measured)
        reasons = [r.text for r in found if not (r.estimate and candidate.measured)]
        if candidate.kernel not in self.available:
            reasons.append(NO_BINARY if spec.status == PUBLISHED else "not available on this device")
        return tuple(reasons), overruled


def laid_out(problem: GemmProblem, candidate: Candidate) -> GemmProblem:
    """The problem with the layout that the candidate is for, where the weights have none yet."""
    if problem.layout is not None or candidate.layout is None:
        return problem
    return replace(problem, layout=candidate.layout)


def _choice(
    problem: GemmProblem, candidate: Candidate, overruled: tuple[str, ...], refused: list[Refused]
) -> KernelChoice:
    spec = kernel(candidate.kernel)
    assert candidate.config is not None
    here = laid_out(problem, candidate)
    why = list(candidate.why)
    why += [f"{text}, but the entry was measured so" for text in overruled]
    rest = unfused(problem, spec)
    if rest:
        why.append(f"{' and '.join(rest)} not fused: the op runs {'it' if len(rest) == 1 else 'them'} after")
    if spec.status == PUBLISHED:
        why.append(f"{NO_BINARY} ({spec.origin})")
    return KernelChoice(
        spec.name, candidate.config, layout_of(here, spec), candidate.source, tuple(why), tuple(refused),
        spec.status != PUBLISHED, rest, candidate.us,
    )  # fmt: skip


def _reference(problem: GemmProblem, why: tuple[str, ...], refused: list[Refused]) -> KernelChoice:
    return KernelChoice(REFERENCE, Config(), problem.layout or "strided", REFERENCE, why, tuple(refused))


@lru_cache(maxsize=32)
def process_selector(available: frozenset[str] | None = None) -> Selector:
    """The one recording selector of this process for a set of available kernels (None: all shipped)."""
    return Selector(available=shipped() if available is None else available, recording=True)


def choose(problem: GemmProblem, available: frozenset[str] | None = None) -> KernelChoice:
    """What runs this problem in this process: cached, with the installed packs; misses and choices are recorded.

    Args:
        problem: one GEMM.
        available: names of the kernels that the device can launch, as the runtime loader finds them; None = all that
            this package ships. Published mechanisms without a binary are never chosen unless named here.
    """
    return process_selector(available)(problem)


class BoundChoices(dict[int, KernelChoice]):
    """The choices of one layer by M: `bound[m]` costs one dict look-up once M was seen.

    Args:
        problem: the layer's GEMM at any M.
        available: as for `choose`.
    """

    def __init__(self, problem: GemmProblem, available: frozenset[str] | None = None) -> None:
        super().__init__()
        self._problem, self._available = problem, available

    def __missing__(self, m: int) -> KernelChoice:
        choice = self[m] = choose(replace(self._problem, m=m), self._available)
        return choice
