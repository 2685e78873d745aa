"""The activation value against formulas written out here."""

from __future__ import annotations

import pytest
import torch

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.ops.activation import Activation

X = torch.linspace(-12, 12, 64, dtype=torch.float64).reshape(4, 16)
GATE, UP = X[:, :8], X[:, 8:]
SIGMOID = lambda x: 1 / (1 + torch.exp(-x))


@pytest.mark.parametrize(
    ("activation", "want"),
    [
        (Activation("silu"), GATE * SIGMOID(GATE) * UP),
        (Activation("silu", limit=2.0), GATE.clamp(max=2) * SIGMOID(GATE.clamp(max=2)) * UP.clamp(-2, 2)),
        (
            Activation("silu", limit=2.0, clamp="after_silu"),
            (GATE * SIGMOID(GATE)).clamp(max=2) * UP.clamp(-2, 2),
        ),
        (
            Activation("swigluoai", limit=7.0),
            GATE.clamp(max=7) * SIGMOID(1.702 * GATE.clamp(max=7)) * (UP.clamp(-7, 7) + 1),
        ),
        (
            Activation("swigluoai", limit=None, alpha=1.0, beta=0.0, interleaved=True),
            X[:, 0::2] * SIGMOID(X[:, 0::2]) * X[:, 1::2],
        ),
        (Activation("gelu"), GATE * (1 + torch.erf(GATE / 2**0.5)) / 2 * UP),
        (
            Activation("gelu_tanh"),
            GATE * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (GATE + 0.044715 * GATE**3))) / 2 * UP,
        ),
        (Activation("relu2", gated=False), X.clamp(min=0) ** 2),
    ],
    ids=lambda v: f"{v.kind}-{v.clamp}-{v.limit}" if isinstance(v, Activation) else "",
)
def test_formulas(activation, want):
    got = activation(X)
    assert got.shape[-1] == activation.columns(X.shape[-1])
    # fp64 on both sides: some dozen roundings of 2^-53 apiece, the same but for their order
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["situ", "", "SILU"])
def test_unknown_kind(kind):
    with pytest.raises(UnsupportedError, match="supported are silu, swigluoai"):
        Activation(kind)
