"""Whether a kernel may run a problem with a config: one pure function for every candidate, exact hits included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from sglang_amd_quant.layouts.names import TensorLayout
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.lds import lds_bytes
from sglang_amd_quant.selection.problem import ACT_BITS, FLOATS, MX_OUT, Config, GemmProblem, Refusal
from sglang_amd_quant.selection.specs import KernelSpec

MX_OUT_COLUMNS = 32
"""Output columns that one block must hold to emit MX: a whole scale block."""

OFFSET_LIMIT = 2**31 - 1
"""A raw-buffer load's byte offset is a signed int32; beyond it the GPU faults, uncatchably (aiter #3783)."""

WORKGROUP_LANES = 1024
"""Lanes of one workgroup, on every arch."""

REGISTERS_BESIDE_SUMS = 48
"""Registers a thread that operands and addresses take at the least: with fewer, ptxas spills or refuses."""

MMA_BLOCK_K = {16: 128, 32: 64}
"""Least BLOCK_K at which Triton issues scaled MFMA, by nonkdim (16x16x128, 32x32x64); below, it silently does not."""


def legal(problem: GemmProblem, kernel: KernelSpec, config: Config) -> list[Refusal]:
    """Every reason why `kernel` cannot run `problem` with `config`; empty if it can.

    Args:
        problem: its `layout`, if not None, is what the weights have; otherwise the kernel's preferred one is meant.
        kernel: any registered kernel.
        config: complete, as `KernelSpec.configure` and `Config.over` give it.
    """
    if not kernel.covers(problem):
        return [Refusal("covers", f"{kernel.name} is {_coverage(kernel)}, not {_asked(problem)}")]
    found = [r for check in _PROBLEM_CHECKS for r in check(problem, kernel)]
    malformed = list(_parameters(kernel, config))
    return found + (malformed or [r for check in _CONFIG_CHECKS for r in check(problem, kernel, config)])


def layout_of(problem: GemmProblem, kernel: KernelSpec) -> str:
    """The layout in question: the weights', or where they have none yet the one that the kernel prefers."""
    return problem.layout or next(iter(kernel.layouts), "strided")


def unfused(problem: GemmProblem, kernel: KernelSpec) -> tuple[str, ...]:
    """Parts of the epilogue that the op must run after this kernel, in order.

    From the first part that the kernel does not do, all later ones are the op's too.
    """
    parts = [
        part
        for part, asked in (
            ("bias", problem.epilogue.bias),
            ("activation", problem.epilogue.activation is not None),
            ("quantize", problem.out_dtype in MX_OUT or problem.out_dtype == "fp8_static"),
        )
        if asked
    ]
    fused = set(kernel.fuses) - (set() if activates(problem, kernel) else {"activation"})
    done = next((i for i, part in enumerate(parts) if part not in fused), len(parts))
    if parts[done:] == [] and problem.out_dtype not in kernel.out_dtypes and "quantize" in parts:
        done = parts.index("quantize")
    return tuple(parts[done:])


def activates(problem: GemmProblem, kernel: KernelSpec) -> bool:
    """Whether the kernel has activations, for weights that lie as the problem's."""
    readable = not kernel.activates_in or layout_of(problem, kernel) in kernel.activates_in
    return "activation" in kernel.fuses and readable


def operand_bits(problem: GemmProblem, kernel: KernelSpec) -> tuple[int, int]:
    """Bits of an activation and of a weight as the kernel holds them in LDS."""
    arch = ARCHES.get(problem.arch)
    if kernel.dequantizes and arch is not None and not arch.scaled_mma:
        return 16, 16
    return problem.act_bits, problem.weight_bits


def lds_need(problem: GemmProblem, kernel: KernelSpec, config: Config) -> int:
    """LDS bytes of a Triton kernel's tile: by the kernel's own formula, else as `lds_bytes` estimates."""
    if kernel.lds is not None:
        return kernel.lds(problem, config)
    arch = ARCHES[problem.arch]
    return lds_bytes(*config.tile, *operand_bits(problem, kernel), config.num_stages or 1, arch.async_copy)


Found = Iterator[Refusal]


def _coverage(kernel: KernelSpec) -> str:
    return " ".join("/".join(v) for v in (kernel.schemes, kernel.ops, kernel.archs) if v)


def _asked(problem: GemmProblem) -> str:
    return f"{problem.scheme} {problem.op} {problem.arch}"


def _formats(p: GemmProblem, kernel: KernelSpec) -> Found:
    acts = kernel.acts or ((scheme_named(p.scheme).act,) if kernel.schemes else ())
    if acts and p.act not in acts:
        yield Refusal("act", f"takes {'/'.join(acts)} activations, not {p.act}")
    if kernel.groups and p.group not in kernel.groups:
        yield Refusal("group", f"takes scale groups of {'/'.join(map(str, kernel.groups))}, not {p.group}")
    if p.out_dtype not in kernel.out_dtypes and "quantize" not in unfused(p, kernel):
        yield Refusal("out_dtype", f"stores {'/'.join(kernel.out_dtypes)}, not {p.out_dtype}")
    unquantized = p.act == "bf16" or "quantize_input" in kernel.fuses
    if kernel.x_dtypes and unquantized and p.out_dtype in FLOATS and p.out_dtype not in kernel.x_dtypes:
        yield Refusal("x_dtype", f"reads {'/'.join(kernel.x_dtypes)} activations, the model's are {p.out_dtype}")


def _layout(p: GemmProblem, kernel: KernelSpec) -> Found:
    name = layout_of(p, kernel)
    if kernel.layouts and name not in kernel.layouts:
        yield Refusal("layout", f"reads {'/'.join(kernel.layouts)} weights, these are {name}")
    if p.arch not in kernel.layout_archs.get(name, (p.arch,)):
        yield Refusal("layout", f"reads {name} weights on {'/'.join(kernel.layout_archs[name])}, not on {p.arch}")
    for reason in _layout_reasons(name, p.n, p.k, p.scheme):
        yield Refusal("layout", reason)


@lru_cache(maxsize=4096)
def _layout_reasons(name: str, n: int, k: int, scheme: str) -> tuple[str, ...]:
    return tuple(TensorLayout.parse(name).reasons(n, k, scheme_named(scheme)))


def _activation(p: GemmProblem, kernel: KernelSpec) -> Found:
    e = p.epilogue
    if not kernel.activations or e.activation is None or not activates(p, kernel):
        return
    if e.activation not in kernel.activations or not e.gated or (e.limit is not None and e.clamp != "before"):
        asked = f"{e.activation}{'' if e.gated else ' without gate'}{'' if e.limit is None else f', clamped {e.clamp}'}"
        yield Refusal("activation", f"fuses gated {'/'.join(kernel.activations)}, clamped before, not {asked}")
    if p.n % 16 and TensorLayout.parse(layout_of(p, kernel)).packed:
        yield Refusal("n", f"8 gates and 8 ups by turns are rows in 16s, not N={p.n}")
    if e.limit is not None and not kernel.clamps:
        yield Refusal("activation", "its clamp would make a number of NaN")
    if kernel.betas and e.beta not in kernel.betas:
        yield Refusal("activation", f"adds {' or '.join(str(b) for b in kernel.betas if b)} to up, not {e.beta}")


def _dimensions(p: GemmProblem, kernel: KernelSpec) -> Found:
    if kernel.m_max and p.m > kernel.m_max:
        yield Refusal("m", f"M={p.m} is above {kernel.m_max}")
    if kernel.m_values and p.m not in kernel.m_values:
        yield Refusal("m", f"M={p.m} is none of {', '.join(map(str, kernel.m_values))}")
    if p.k % kernel.k_multiple and p.k not in kernel.k_also:
        also = f" nor {'/'.join(map(str, kernel.k_also))}" if kernel.k_also else ""
        yield Refusal("k", f"K={p.k} is no multiple of {kernel.k_multiple}{also}")
    if p.n % kernel.n_multiple:
        yield Refusal("n", f"N={p.n} is no multiple of {kernel.n_multiple}")
    if kernel.a_divs and p.a_div not in kernel.a_divs:
        yield Refusal("a_div", f"a_div={p.a_div} is none of {', '.join(map(str, kernel.a_divs))}")
    if p.block_m % kernel.block_m_multiple:
        yield Refusal("block_m", f"routing's BLOCK_M={p.block_m} is no multiple of {kernel.block_m_multiple}")


def _index_width(p: GemmProblem, kernel: KernelSpec) -> Found:
    if kernel.index_bits > 32:
        return
    activations = (p.rows if p.op == "moe_down" else p.m) * p.k * p.act_bits // 8
    for what, size in (("weights", p.weight_bytes), ("activations", activations)):
        if size > OFFSET_LIMIT:
            yield Refusal("index", f"{what} of {size:,} bytes are beyond 32-bit offsets ({OFFSET_LIMIT:,})")


def _parameters(kernel: KernelSpec, config: Config) -> Found:
    """Every parameter is one that the kernel has, with a value that it may have; and none is missing."""
    stated = dict(config.items())
    for name, value in stated.items():
        if name not in kernel.space:
            yield Refusal("config", f"{kernel.name} has no parameter {name}")
        elif value not in kernel.space[name]:
            yield Refusal("config", f"{name}={value} is none of {', '.join(map(str, kernel.space[name]))}")
    for name in kernel.required:
        if name not in stated:
            yield Refusal("config", f"{name} is not stated")


def _routing(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    if p.block_m and c.block_m is not None and c.block_m != p.block_m:
        yield Refusal("block_m", f"BLOCK_M={c.block_m}, but routing has fixed {p.block_m}")
    if c.block_m is not None and c.block_m % kernel.block_m_multiple:
        yield Refusal("block_m", f"BLOCK_M={c.block_m} is no multiple of {kernel.block_m_multiple}")


def _tile_n(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    if c.block_n is None:
        return
    if kernel.n_whole and p.n % c.block_n:
        yield Refusal("n", f"N={p.n} is no multiple of BLOCK_N={c.block_n}")
    wanted = dict(kernel.block_n_for).get(p.a_div)
    if wanted and c.block_n != wanted:
        yield Refusal("block_n", f"a_div={p.a_div} goes with BLOCK_N={wanted}, not {c.block_n}")
    if p.out_dtype in MX_OUT and "quantize" not in unfused(p, kernel):
        halved = p.epilogue.activation is not None and p.epilogue.gated
        columns = c.block_n // 2 if halved else c.block_n
        if columns < MX_OUT_COLUMNS:
            yield Refusal("mx_out", f"BLOCK_N={c.block_n} leaves {columns} output columns, MX needs {MX_OUT_COLUMNS}")


def _layout_block(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    if not kernel.triton:
        return  # a hand-written kernel states the layouts that it reads with its own blocks
    name = layout_of(p, kernel)
    block_n, block_k = _min_block(name, p.scheme, kernel.gathers)
    if c.block_k is not None and c.block_k < block_k:
        yield Refusal("layout_block", f"layout {name} needs BLOCK_K >= {block_k}, this has {c.block_k}")
    if c.block_n is not None and c.block_n < block_n:
        yield Refusal("layout_block", f"layout {name} needs BLOCK_N >= {block_n}, this has {c.block_n}")


@lru_cache(maxsize=256)
def _min_block(name: str, scheme: str, gathers: tuple[str, ...]) -> tuple[int, int]:
    """The least BLOCK_N and BLOCK_K for those parts of a layout that are not gathered."""
    parts = zip(("values", "scales"), TensorLayout.parse(name).specs, strict=True)
    least = [spec.min_block(scheme_named(scheme)) for part, spec in parts if part not in gathers]
    return max((n for n, _ in least), default=1), max((k for _, k in least), default=1)


def _waves(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    arch = ARCHES.get(p.arch)
    if arch is None or c.num_warps is None:
        return
    if c.num_warps * arch.wave > WORKGROUP_LANES:
        yield Refusal("waves", f"{c.num_warps} waves of {arch.wave} are above {WORKGROUP_LANES} lanes")
    if kernel.triton and arch.scaled_mma and ACT_BITS[p.act] < 16:
        if c.num_warps < 2:
            yield Refusal("scaled_mma", "num_warps=1 never gets scaled MFMA from Triton")
        least = MMA_BLOCK_K.get(c.nonkdim or 16, 128)
        if c.block_k is not None and c.block_k < least:
            yield Refusal("scaled_mma", f"nonkdim={c.nonkdim or 16} needs BLOCK_K >= {least}, this has {c.block_k}")


def _registers(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    most = dict(c.params).get("max_registers", 0)
    if not most or not c.num_warps or not all(c.tile):
        return
    least = c.tile[0] * c.tile[1] // (32 * c.num_warps) + REGISTERS_BESIDE_SUMS
    if most < least:
        yield Refusal("registers", f"max_registers={most}: sums and what goes with them take {least} at this tile")


def _split_k(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    steps = p.k // kernel.k_multiple
    if c.split_k and c.split_k > 1 and steps % c.split_k:
        yield Refusal("split_k", f"split_k={c.split_k} does not divide the {steps} steps of K")


def _lds(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    arch = ARCHES.get(p.arch)
    if not (kernel.triton or kernel.lds) or arch is None or not arch.lds_bytes:
        return
    need = lds_need(p, kernel, c)
    if need > arch.lds_bytes:
        text = f"LDS estimate {need:,} B at BLOCK_M={c.block_m}, {c.num_stages} stages is above {arch.lds_bytes:,} B"
        yield Refusal("lds", text, estimate=True)


def _launch(p: GemmProblem, kernel: KernelSpec, c: Config) -> Found:
    if kernel.refuses is not None and p.m and (why := kernel.refuses(p, c)):
        yield Refusal("launch", why)


_PROBLEM_CHECKS: tuple[Callable[[GemmProblem, KernelSpec], Found], ...] = (
    _formats,
    _layout,
    _activation,
    _dimensions,
    _index_width,
)
_CONFIG_CHECKS: tuple[Callable[[GemmProblem, KernelSpec, Config], Found], ...] = (
    _routing,
    _tile_n,
    _layout_block,
    _waves,
    _registers,
    _split_k,
    _lds,
    _launch,
)
