"""Dense MLPs of SGLang whose gate_up_proj is activated by our GEMM, through SGLang's own seam for that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.integration import gated
from sglang_amd_quant.recipe import Recipe

HIDDEN, INTER = 64, 128


def mlp_of(kind: str):
    from sglang.srt.models.llama import LlamaMLP
    from sglang.srt.models.qwen2 import Qwen2MLP

    return {"llama": LlamaMLP, "qwen2": Qwen2MLP}[kind]


@pytest.fixture
def make_mlp(make_config, rank):
    """`make_mlp(kind, scheme)` -> an MLP with loaded weights, the same each time."""

    from sglang.srt.model_loader.utils import set_default_torch_dtype

    def make(kind: str, scheme: str = "w4a8", index: int = 0, ranks: int = 1):
        g = torch.Generator().manual_seed(5)
        gate, up, down = (
            torch.randn(n, k, generator=g).bfloat16() for n, k in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
        )
        with rank(tp=(index, ranks)), set_default_torch_dtype(torch.bfloat16):
            mlp = mlp_of(kind)(
                HIDDEN, INTER, "silu", quant_config=make_config(Recipe(default=scheme)), prefix="a.mlp",
                reduce_results=False,
            )  # fmt: skip
            layer = mlp.gate_up_proj
            layer.weight.weight_loader(layer.weight, gate, 0)
            layer.weight.weight_loader(layer.weight, up, 1)
            mlp.down_proj.weight.weight_loader(mlp.down_proj.weight, down)
            for part in (layer, mlp.down_proj):
                part.quant_method.process_weights_after_loading(part)
        return mlp

    return make


@pytest.fixture
def one_rank(sglang_context):
    """A group of one rank, for layers to ask about."""
    group = SimpleNamespace(rank_in_group=0, world_size=1)
    with sglang_context.get_parallel().override(tp_group=group):
        yield


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8", "w4a16"])
def test_the_gemm_activates_where_kernels_do(make_mlp, one_rank, monkeypatch, kind, scheme):
    plain = make_mlp(kind, scheme)
    assert plain.dual_gemm.mode is None  # no kernel of this CPU does
    assert plain.gate_up_proj.amd_mx.problem.epilogue.activation is None
    monkeypatch.setattr(gated, "fuses_activation", lambda problem: True)
    fused = make_mlp(kind, scheme)
    assert fused.gate_up_proj.amd_mx.problem.epilogue.activation == "silu"
    x = torch.randn(5, HIDDEN).bfloat16()
    hidden = fused.dual_gemm(x, fused.gate_up_proj)
    want = plain.act_fn.forward_native(plain.gate_up_proj(x)[0])
    # rounded once instead of three times to bf16: 2^-9 each, of gate, up and the result
    assert (hidden.double() - want.double()).abs().max() <= 3 * 2.0**-8 * want.abs().max()
    out, expected = fused(x), plain(x)
    assert (out - expected).norm() <= 0.05 * expected.norm()  # quantized again in between
    assert fused(x[:0]).shape == (0, HIDDEN)
    with pytest.raises(UnsupportedError, match=r"a\.mlp\.gate_up_proj.*calls it without"):
        fused.gate_up_proj(x)


@pytest.mark.parametrize("index", [0, 1])
def test_a_rank_activates_its_own_columns(make_mlp, monkeypatch, index):
    monkeypatch.setattr(gated, "fuses_activation", lambda problem: True)
    x, whole = torch.randn(3, HIDDEN).bfloat16(), make_mlp("llama")
    mine = make_mlp("llama", index=index, ranks=2)
    half = INTER // 2
    part = whole.gate_up_proj.amd_mx(x)[:, index * half : (index + 1) * half]
    assert torch.equal(mine.gate_up_proj.amd_mx(x), part)


@pytest.mark.parametrize("why", ["enable_lora", "lora_paths", "sp"])
def test_products_are_left_alone_where_something_wants_them(make_mlp, monkeypatch, sglang_context, why):
    monkeypatch.setattr(gated, "fuses_activation", lambda problem: True)
    args = SimpleNamespace(enable_lora=why == "enable_lora", lora_paths=["a"] if why == "lora_paths" else None)
    monkeypatch.setattr(sglang_context, "get_server_args", lambda: args)
    monkeypatch.setattr(sglang_context, "get_flags", lambda: SimpleNamespace(sp=SimpleNamespace(enabled=why == "sp")))
    mlp = make_mlp("llama")
    assert mlp.dual_gemm.mode is None
    assert mlp.gate_up_proj.amd_mx.problem.epilogue.activation is None


def test_a_model_that_takes_the_seam_back_keeps_its_activation(make_mlp, monkeypatch):
    """As Inkling's MLP does, which is LlamaMLP with another activation."""
    monkeypatch.setattr(gated, "fuses_activation", lambda problem: True)
    dual = SimpleNamespace(mode=None)
    problem = make_mlp("llama").gate_up_proj.amd_mx.problem
    assert gated.activated(problem, dual) is problem
    assert gated.activated(problem, None) is problem
