"""What is asked of selection (`GemmProblem`) and what it answers (`KernelChoice`)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NamedTuple

from sglang_amd_quant.errors import SchemeError, ShapeError
from sglang_amd_quant.layouts.names import TensorLayout, round_up
from sglang_amd_quant.schemes import INT4_GROUPS, Scheme
from sglang_amd_quant.schemes import scheme as scheme_named
from sglang_amd_quant.selection.arch import ARCHES, canonical

OPS = ("linear", "moe_gate_up", "moe_down")
OUT_DTYPES = ("bf16", "fp16", "fp32", "mxfp8", "mxfp4", "fp8_static")
MX_OUT = ("mxfp8", "mxfp4")
FLOATS = ("bf16", "fp16", "fp32")

ACT_BITS = {"e2m1": 4, "e4m3": 8, "fp8_static": 8, "bf16": 16}

ACTIVATIONS = ("silu", "swigluoai", "gelu", "gelu_tanh", "relu2")
CLAMPS = ("before", "after_silu")
"""Kinds of `ops.activation.Activation`, and where it clamps."""

SOURCES = ("exact", "padded_m", "nearest_e", "borrowed", "rule", "heuristic", "default", "reference")
"""Where a choice can come from, in the order in which they are tried."""

TUNED = ("exact", "padded_m", "nearest_e")
"""Sources that are an entry tuned for this GEMM. A choice from any other is a miss: a tuner could do better."""

_parse_layout = lru_cache(maxsize=64)(TensorLayout.parse)


@dataclass(frozen=True)
class Epilogue:
    """What happens to the product before it is stored.

    Attributes:
        bias: a bias [N] is added.
        activation: one of `ACTIVATIONS`, None for none.
        gated: the activation takes gate and up and halves N; meaningless without one.
        interleaved: columns alternate gate, up (gpt-oss); otherwise all gates come first.
        limit, alpha: clamp and slope of the activation, None where it has none.
        clamp: whether the gate is clamped `before` its function or `after_silu`: `CLAMPS`.
        beta: what the activation adds to up, None where it adds nothing, or what is usual (1).
    """

    bias: bool = False
    activation: str | None = None
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    alpha: float | None = None
    clamp: str = "before"
    beta: float | None = None


NO_EPILOGUE = Epilogue()

MOST = 2**31 - 1
"""Sizes are 32-bit arguments of every kernel."""


class Config(NamedTuple):
    """A kernel's compile- and launch-time parameters; None = not stated, the kernel's default applies.

    `params` holds what only some kernels have, as sorted (name, value) pairs.
    """

    block_m: int | None = None
    block_n: int | None = None
    block_k: int | None = None
    split_k: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    waves_per_eu: int | None = None
    nonkdim: int | None = None
    params: tuple[tuple[str, int], ...] = ()

    def over(self, base: Config) -> Config:
        """These values, and those of `base` where this has none."""
        params = tuple(sorted({**dict(base.params), **dict(self.params)}.items()))
        merged = (b if a is None else a for a, b in zip(self[:-1], base[:-1], strict=True))
        return Config._make((*merged, params))

    @property
    def tile(self) -> tuple[int, int, int]:
        """BLOCK_M, BLOCK_N, BLOCK_K; 0 where one is not stated."""
        return self.block_m or 0, self.block_n or 0, self.block_k or 0

    def items(self) -> list[tuple[str, int]]:
        """The values that are stated, by name."""
        stated = [(name, value) for name, value in zip(self._fields[:-1], self[:-1], strict=True) if value is not None]
        return [*stated, *self.params]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.items()) or "(kernel's own)"


@dataclass(frozen=True, eq=False)
class GemmProblem:
    """One GEMM of one rank: out[M, N] = x[M, K] @ w[N, K]^T, or the same grouped by expert.

    Attributes:
        op: `linear`; `moe_gate_up` (row r of the output reads x[r // top_k]); `moe_down` (reads x[r]).
        scheme: name of the scheme.
        arch: architecture, as the driver reports it or by family name.
        m: tokens M; 0 is allowed (a rank that got none).
        n, k: output and input elements on this rank, without padding.
        cu_count: compute units of the device; 0 = those of the family's usual one.
        e_local, e_total: experts on this rank and in the model; 1 for `linear`.
        top_k: experts a token; 1 for `linear`.
        tp, ep: the model's parallelism.
        epilogue: bias and activation.
        out_dtype: what the *op* hands on; `mxfp8` and `mxfp4` are quantized for the next GEMM.
        layout: name of the layout the weights have; None while they have none yet.
        group: elements of K that share a scale; 0 = the scheme's.
        act: activation format, if it is not the scheme's (`fp8_static` where a checkpoint says so).
        block_m: rows of a tile as routing has already fixed them; 0 = free.
        weighted: the routing weight is multiplied in here.

    Raises:
        ShapeError: dimensions that no GEMM has, or K that is not whole scale groups.
        SchemeError: unknown op, scheme, layout, activation, activation format or output dtype.
    """

    op: str
    scheme: str
    arch: str
    m: int
    n: int
    k: int
    cu_count: int = 0
    e_local: int = 1
    e_total: int = 1
    top_k: int = 1
    tp: int = 1
    ep: int = 1
    epilogue: Epilogue = NO_EPILOGUE
    out_dtype: str = "bf16"
    layout: str | None = None
    group: int = 0
    act: str = ""
    block_m: int = 0
    weighted: bool = False
    _key: tuple[object, ...] = field(init=False, repr=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scheme = scheme_named(self.scheme)
        fill = object.__setattr__
        fill(self, "arch", canonical(self.arch))
        if not self.cu_count and self.arch in ARCHES:
            fill(self, "cu_count", ARCHES[self.arch].cu_count)
        if not self.group:
            fill(self, "group", scheme.block)
        if not self.act:
            fill(self, "act", scheme.act)
        self._check(scheme)
        key = tuple(getattr(self, name) for name in PROBLEM_FIELDS)
        fill(self, "_key", key)
        fill(self, "_hash", hash(key))

    def _check(self, scheme: Scheme) -> None:
        for what, value, known in (
            ("op", self.op, OPS),
            ("out_dtype", self.out_dtype, OUT_DTYPES),
            ("act", self.act, tuple(ACT_BITS)),
            ("activation", self.epilogue.activation, (None, *ACTIVATIONS)),
            ("clamp", self.epilogue.clamp, CLAMPS),
        ):
            if value not in known:
                raise SchemeError(f"{what} {value!r}", "unknown", f"use one of {', '.join(filter(None, known))}")
        if self.layout is not None:
            _parse_layout(self.layout)
        what = f"{self.op} M={self.m} N={self.n} K={self.k} E={self.e_local}/{self.e_total} top_k={self.top_k}"
        positive = (self.n, self.k, self.e_local, self.top_k, self.tp, self.ep)
        if self.m < 0 or min(positive) < 1 or self.cu_count < 0 or self.block_m < 0:
            raise ShapeError(what, "a dimension is below its least value", "give M >= 0 and all others >= 1")
        if max(self.m, self.rows, *positive, self.cu_count, self.block_m) > MOST:
            raise ShapeError(what, f"a dimension is above {MOST}", "give sizes that a model has")
        if self.op == "linear" and (self.e_local, self.e_total, self.top_k) != (1, 1, 1):
            raise ShapeError(what, "a linear has no experts", "use op moe_gate_up or moe_down")
        if self.e_local > self.e_total or self.top_k > self.e_total:
            raise ShapeError(what, "more local experts or top_k than experts", "give e_total >= e_local and top_k")
        if self.epilogue.activation and self.epilogue.gated and self.n % 2:
            raise ShapeError(f"{what} {self.epilogue.activation}", "gates and ups are as many", "give an even N")
        groups = INT4_GROUPS if scheme.weight == "int4" else (scheme.block,)
        if self.group not in groups:
            remedy = f"use one of {', '.join(map(str, groups))}"
            raise ShapeError(f"scheme {self.scheme} group {self.group}", "no scale group of it", remedy)
        if self.k % self.group:
            raise ShapeError(
                f"{what} scheme {self.scheme} group {self.group}",
                f"K must be whole groups of {self.group}",
                "pad K, or keep the layer bf16 in a recipe",
            )

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, GemmProblem) and self._key == other._key)

    @property
    def rows(self) -> int:
        """M_routed: rows of the output, M times top_k. Host-known under EP too, where some of them are dropped."""
        return self.m * self.top_k

    @property
    def a_div(self) -> int:
        """Output row r reads input row r // a_div."""
        return self.top_k if self.op == "moe_gate_up" else 1

    @property
    def moe(self) -> bool:
        return self.op != "linear"

    @property
    def moe_tp(self) -> int:
        """Ranks that share one copy of this weight: TP, or TP/EP for experts."""
        return max(1, self.tp // self.ep) if self.moe else self.tp

    @property
    def weight_bits(self) -> int:
        return scheme_named(self.scheme).weight_bits

    @property
    def act_bits(self) -> int:
        return ACT_BITS[self.act]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights without scales, all local experts."""
        return self.e_local * self.n * self.k * self.weight_bits // 8

    def padded(self, multiple: int) -> tuple[int, int]:
        """(N, K) rounded up to a multiple; gate and up are two matrices, each rounded by itself."""
        halves = 2 if self.op == "moe_gate_up" else 1
        return halves * round_up(-(-self.n // halves), multiple), round_up(self.k, multiple)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults; `from_json` reads them back."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.init and (f.name in _REQUIRED or value != f.default):
                out[f.name] = value if f.name != "epilogue" else _stated(value)
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GemmProblem:
        """Read `to_json`'s form.

        Raises:
            ShapeError: a field that is unknown, missing or of another type.
        """
        epilogue = data.get("epilogue", {}) if isinstance(data, dict) else None
        if not isinstance(epilogue, dict):
            raise ShapeError(f"problem {data}", "not an object of fields", "see docs/selection.md")
        data = {name: value for name, value in data.items() if name != "epilogue"}
        wrong = sorted(set(data) - set(PROBLEM_FIELDS)) + sorted(set(epilogue) - {f.name for f in fields(Epilogue)})
        wrong += sorted(_REQUIRED - set(data))
        wrong += [name for name, value in data.items() if name in PROBLEM_FIELDS and not _typed(name, value)]
        if wrong:
            raise ShapeError(f"problem {data}", f"wrong or missing: {', '.join(wrong)}", "see docs/selection.md")
        return cls(**data, epilogue=Epilogue(**epilogue))

    @property
    def of_dtype(self) -> str:
        """What labels add where the op hands on something else than bf16."""
        return "" if self.out_dtype == "bf16" else f" {self.out_dtype}"

    def label(self) -> str:
        """One line for people."""
        experts = f" E={self.e_local}/{self.e_total} top_k={self.top_k} tp={self.tp} ep={self.ep}" if self.moe else ""
        group = f" group={self.group}" if scheme_named(self.scheme).weight == "int4" else ""
        return f"{self.op} {self.scheme} {self.arch} M={self.m} N={self.n} K={self.k}{group}{experts}{self.of_dtype}"


PROBLEM_FIELDS = tuple(f.name for f in fields(GemmProblem) if f.init)
_REQUIRED = frozenset(("op", "scheme", "arch", "m", "n", "k"))
_TEXT = frozenset(("op", "scheme", "arch", "out_dtype", "layout", "act"))


def _typed(name: str, value: object) -> bool:
    if name == "weighted":
        return isinstance(value, bool)
    kind = str if name in _TEXT else int
    return isinstance(value, kind) and not isinstance(value, bool)


def _stated(epilogue: Epilogue) -> dict[str, Any]:
    return {f.name: getattr(epilogue, f.name) for f in fields(epilogue) if getattr(epilogue, f.name) != f.default}


class Refusal(NamedTuple):
    """One reason why a kernel cannot run a problem with a config.

    `estimate` marks a judgement that a measurement may overrule (the LDS estimate); all others are correctness.
    """

    rule: str
    text: str
    estimate: bool = False


class Refused(NamedTuple):
    """A candidate that was looked at and not taken."""

    source: str
    kernel: str
    config: Config
    why: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {self.kernel} [{self.config}] refused: {'; '.join(self.why)}"


@dataclass(frozen=True)
class KernelChoice:
    """What runs, and why.

    Attributes:
        kernel: its name; `reference` where no kernel covers the problem.
        config: its parameters.
        layout: the weight layout it reads.
        source: one of `SOURCES`.
        why: where the choice comes from and what to know about it.
        refused: candidates looked at before it, in order.
        in_build: False where the kernel's mechanism is published but this installation has no binary of it.
        unfused: parts of the epilogue that the kernel leaves to the op (`bias`, `activation`, `quantize`), in order.
        us: time that the pack states for its entry, on the device named in `why`; None if none.
    """

    kernel: str
    config: Config
    layout: str
    source: str
    why: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    in_build: bool = True
    unfused: tuple[str, ...] = ()
    us: float | None = None

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every reason as one line each: those for the choice, then each candidate refused."""
        return (*self.why, *map(str, self.refused))

    @property
    def tuned(self) -> bool:
        """Whether an entry tuned for this GEMM decided."""
        return self.source in TUNED

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KernelChoice:
        """Read `to_json`'s form, or a miss, which states a source alone.

        Raises:
            ShapeError: the source is unknown.
        """
        if data["source"] not in SOURCES:
            raise ShapeError(f"source {data['source']!r}", "unknown", f"use one of {', '.join(SOURCES)}")
        stated = dict(data.get("config", {}))
        own = {name: stated.pop(name) for name in list(stated) if name in Config._fields}
        return cls(
            data.get("kernel", ""), Config(**own, params=tuple(sorted(stated.items()))), data.get("layout", ""),
            data["source"], tuple(data.get("why", ())), (), data.get("in_build", True),
            tuple(data.get("unfused", ())), data.get("us"),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "config": dict(self.config.items()),
            "layout": self.layout,
            "source": self.source,
            "in_build": self.in_build,
            "unfused": list(self.unfused),
            "us": self.us,
            "why": list(self.why),
            "refused": [
                {"source": r.source, "kernel": r.kernel, "config": dict(r.config.items()), "why": list(r.why)}
                for r in self.refused
            ],
        }
