"""What a kernel can do, said without loading it. Every kernel of the project registers one `KernelSpec`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.selection.problem import Config, GemmProblem

SHIPPED, PUBLISHED = "shipped", "published"

SPEC_MODULES = ["sglang_amd_quant.selection.families", "sglang_amd_quant.selection.shipped_kernels"]
"""Modules that register specs when imported. A part of the package that ships kernels adds its own here."""


TRITON_REQUIRED = ("block_m", "block_n", "block_k", "num_warps", "num_stages")


def _no_config(problem: GemmProblem) -> Config:
    return Config()


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One kernel family: where it runs, on what, and with which parameters.

    Attributes:
        name: unique.
        status: `shipped`: this package brings it. `published`: others described and measured it; nothing here runs
            it, so it shows in plans (`explain`, `coverage`) and is never chosen at run time.
        origin: where envelope and figures come from.
        archs, schemes, ops: what it covers; empty = any.
        layouts: names of the weight layouts it reads, preferred first; empty = any.
        layout_archs: of layouts that it does not read everywhere, the archs where it does.
        space: its config parameters and the values that each may take. A parameter not listed here it does not have.
        configure: its default config for a problem.
        triton: a Triton kernel: its LDS use is estimated, and scaled MFMA needs `num_warps >= 2` and a deep BLOCK_K.
        acts: activation formats, where fewer than the schemes'; empty = the schemes' own.
        groups: elements per scale; empty = any.
        out_dtypes: what it can store without another pass.
        fuses: what it does itself: of the epilogue `bias`, `activation` and `quantize` (of its output), and before it
            `quantize_input`: activations come in the model's dtype. Otherwise the op quantizes them first.
        activations: kinds of activation that it fuses, gated and clamped before; one that fuses them refuses others.
        activates_in: layouts in which it finds gates and ups for these; empty = all that it reads.
        clamps: whether its activations may be clamped, and NaN stay NaN.
        betas: what its activations may add to up (`Epilogue.beta`); empty = any.
        x_dtypes: dtypes of activations that reach it unquantized (scheme with bf16 activations, or `quantize_input`);
            empty = any. A model's dtype is what the op hands on, `GemmProblem.out_dtype`.
        gathers: `values`, `scales`: what it finds every byte of by a layout's closed form, so that the least block of a
            layout does not bind its tile.
        dequantizes: both operands are dequantized to bf16 where the matrix unit takes no scales: they fill LDS so.
        lds: LDS bytes of a problem's tile, for a Triton kernel that lays its pipeline out itself; None = the estimate.
        refuses: why no launch for a problem has place on its arch, empty if one has, for a kernel that plans launches.
        code_objects: the code objects of `kernels/hip/manifest.py` that it launches; none for Triton and torch.
        m_max, m_values: largest M, and the only Ms, that it takes; 0 and empty = any.
        k_multiple, k_also: K must be a multiple of the first or one of the second.
        n_multiple: N must be a multiple of it.
        n_whole: N must be whole BLOCK_Ns (tails are not masked).
        a_divs: values of `GemmProblem.a_div` it takes; empty = any.
        block_n_for: BLOCK_N that goes with an `a_div`, as pairs; empty = any.
        block_m_multiple: routing's BLOCK_M must be a multiple of it.
        index_bits: width of byte offsets into weights and activations.
    """

    name: str
    status: str
    origin: str
    archs: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("strided",)
    layout_archs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    space: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    configure: Callable[[GemmProblem], Config] = _no_config
    triton: bool = False
    acts: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    out_dtypes: tuple[str, ...] = ("bf16",)
    fuses: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    activates_in: tuple[str, ...] = ()
    clamps: bool = True
    betas: tuple[float | None, ...] = ()
    x_dtypes: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    dequantizes: bool = False
    lds: Callable[[GemmProblem, Config], int] | None = None
    refuses: Callable[[GemmProblem, Config], str] | None = None
    code_objects: tuple[str, ...] = ()
    m_max: int = 0
    m_values: tuple[int, ...] = ()
    k_multiple: int = 1
    k_also: tuple[int, ...] = ()
    n_multiple: int = 1
    n_whole: bool = False
    a_divs: tuple[int, ...] = ()
    block_n_for: tuple[tuple[int, int], ...] = ()
    block_m_multiple: int = 1
    index_bits: int = 64

    def __post_init__(self) -> None:
        if self.status not in (SHIPPED, PUBLISHED):
            raise UnsupportedError(f"kernel {self.name} status {self.status!r}", "unknown", "say shipped or published")

    @property
    def required(self) -> tuple[str, ...]:
        """Parameters that a complete config states."""
        return TRITON_REQUIRED if self.triton else tuple(self.space)

    def facts(self) -> dict[str, object]:
        """All fields by name: two specs are the same kernel iff these are equal."""
        return vars(self)

    def covers(self, problem: GemmProblem) -> bool:
        """Whether op, scheme and arch are its own: what is needed to be a candidate at all."""
        return (
            (not self.ops or problem.op in self.ops)
            and (not self.schemes or problem.scheme in self.schemes)
            and (not self.archs or problem.arch in self.archs)
        )


_SPECS: dict[str, KernelSpec] = {}
_loaded: set[str] = set()


def register(spec: KernelSpec) -> KernelSpec:
    """Make a kernel known. Registering the same spec again does nothing.

    Raises:
        UnsupportedError: another spec has this name. Replacing it would make choices depend on import order.
    """
    known = _SPECS.setdefault(spec.name, spec)
    if known is not spec and known.facts() != spec.facts():
        differing = [name for name, value in spec.facts().items() if known.facts()[name] != value]
        raise UnsupportedError(
            f"kernel {spec.name!r}",
            f"registered twice with different {', '.join(differing)}",
            "give the second kernel a name of its own",
        )
    return known


def kernels() -> Mapping[str, KernelSpec]:
    """All registered kernels by name, in the order of registration; loads `SPEC_MODULES` on first use."""
    for module in SPEC_MODULES:
        if module not in _loaded:
            importlib.import_module(module)
            _loaded.add(module)
    return _SPECS


def kernel(name: str) -> KernelSpec:
    """Look a kernel up.

    Raises:
        UnsupportedError: no such kernel; the message offers similar names.
    """
    known = kernels()
    if name not in known:
        similar = get_close_matches(name, known, n=3) or list(known)
        raise UnsupportedError(f"kernel {name!r}", "no such kernel", f"did you mean {', '.join(similar)}?")
    return known[name]


def shipped() -> frozenset[str]:
    """Names of the kernels that this package brings: what run time may choose from."""
    return frozenset(name for name, spec in kernels().items() if spec.status == SHIPPED)
