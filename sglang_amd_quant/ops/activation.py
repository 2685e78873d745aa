"""The activation behind a gate and up GEMM, as a value: it is part of the op, never a flag beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.selection.problem import ACTIVATIONS, CLAMPS, Epilogue

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Activation:
    """f(gate) * up, or f(x) where the model has no gate.

    Attributes:
        kind: `silu`: gate * sigmoid(gate); `swigluoai`: gate * sigmoid(alpha * gate), times (up + beta) (gpt-oss,
            MiniMax-M3); `gelu` (exact), `gelu_tanh`; `relu2`: max(x, 0)^2.
        gated: the GEMM's N holds gate and up; otherwise only one of them.
        interleaved: columns alternate gate, up (gpt-oss checkpoints); else all gates come first.
        limit: clamps gate to (-inf, limit] and up to [-limit, limit]. None: no clamp.
        clamp: whether the gate is clamped `before` its function (gpt-oss, DeepSeek-V4) or `after_silu`.
        alpha: slope of swigluoai's sigmoid.
        beta: what swigluoai adds to up.
    """

    kind: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    clamp: str = "before"
    alpha: float = 1.702
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS or self.clamp not in CLAMPS:
            raise UnsupportedError(
                f"activation {self.kind!r} (clamp {self.clamp!r})",
                "no kernel or reference knows it",
                f"supported are {', '.join(ACTIVATIONS)}; keep the layer bf16 with a recipe",
            )

    @property
    def fused(self) -> bool:
        """Whether the kernels that have an activation before or after another thing have this one."""
        return self.gated and self.kind in ("silu", "swigluoai") and (self.limit is None or self.clamp == "before")

    @classmethod
    def of(cls, e: Epilogue) -> Activation | None:
        """That of a GEMM's epilogue, None where it has none."""
        if e.activation is None:
            return None
        usual = {name: value for name, value in (("alpha", e.alpha), ("beta", e.beta)) if value is not None}
        return cls(e.activation, e.gated, e.interleaved, e.limit, e.clamp, **usual)

    def columns(self, n: int) -> int:
        """Output columns for a GEMM of N columns."""
        return n // 2 if self.gated else n

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to x[..., N], in x's dtype (pass fp32). Returns [..., columns(N)]."""
        gate, up = self._split(x)
        if self.limit is not None and self.clamp == "before":
            gate = gate.clamp(max=self.limit)
        gate = self._function(gate)
        if self.limit is not None and self.clamp == "after_silu":
            gate = gate.clamp(max=self.limit)
        if up is None:
            return gate
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return gate * (up + self.beta if self.kind == "swigluoai" else up)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.gated:
            return x, None
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        gate, up = x.chunk(2, dim=-1)
        return gate, up

    def _function(self, x: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        match self.kind:
            case "silu":
                return functional.silu(x)
            case "swigluoai":
                return x * (x * self.alpha).sigmoid()
            case "gelu":
                return functional.gelu(x)
            case "gelu_tanh":
                return functional.gelu(x, approximate="tanh")
            case _:
                return functional.relu(x).square()
