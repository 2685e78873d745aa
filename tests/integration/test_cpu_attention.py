"""The CPU platform's attention against transformers' own, whose gpt-oss has sinks and whose Gemma 2 caps logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

HEADS, KV_HEADS, DIM, TOKENS = 6, 2, 32, 40


@pytest.fixture(scope="module")
def cpu_attention(sglang_context):
    from sglang_amd_quant.integration import cpu_attention

    return cpu_attention


@pytest.fixture
def tensors():
    q, k, v = (torch.randn(TOKENS, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def mask(window=None):
    """Additive [1, 1, T, T] as transformers makes it."""
    at = torch.arange(TOKENS)
    seen = at[None, :] <= at[:, None]
    if window is not None:
        seen &= at[None, :] >= at[:, None] - window
    return torch.zeros(TOKENS, TOKENS).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def theirs(module_name, tensors, window=None, **attributes):
    import importlib

    eager = importlib.import_module(f"transformers.models.{module_name}").eager_attention_forward
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False, head_dim=DIM, **attributes)
    softcap = {"softcap": attributes["softcap"]} if "softcap" in attributes else {}
    q, k, v = (t.transpose(0, 1)[None] for t in tensors)
    return eager(module, q, k, v, mask(window), scaling=DIM**-0.5, **softcap)[0][0]


# fp32 on both sides, over at most 41 keys and 32 dimensions: sums of ~2^5 terms, each rounded to 2^-24 of values of
# about 1, so differences stay below 2^-18; attention averages values, which does not widen them.
TOLERANCE = {"rtol": 0, "atol": 2.0**-18}


@pytest.mark.parametrize("window", [None, 7])
def test_sinks_are_those_of_transformers(cpu_attention, tensors, window):
    sinks = torch.randn(HEADS)
    want = theirs("gpt_oss.modeling_gpt_oss", tensors, window, sinks=sinks)
    got = cpu_attention.attend(*tensors, DIM**-0.5, first=0, sinks=sinks, window=-1 if window is None else window)
    torch.testing.assert_close(got, want, **TOLERANCE)
    without = cpu_attention.attend(*tensors, DIM**-0.5, first=0)
    assert (without - want).abs().max() > 0.01


def test_soft_cap_is_that_of_transformers(cpu_attention, tensors):
    scaled = tensors[0] * 4, *tensors[1:]
    want = theirs("gemma2.modeling_gemma2", scaled, softcap=2.0)
    torch.testing.assert_close(cpu_attention.attend(*scaled, DIM**-0.5, first=0, cap=2.0), want, **TOLERANCE)


def test_pieces_of_the_queries_give_the_same(cpu_attention, tensors, monkeypatch):
    sinks = torch.randn(HEADS)
    q, k, v = tensors
    whole = cpu_attention.attend(q, k, v, 0.2, first=0, sinks=sinks, window=9)
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", 3 * HEADS * TOKENS)
    torch.testing.assert_close(cpu_attention.attend(q, k, v, 0.2, first=0, sinks=sinks, window=9), whole, **TOLERANCE)
    late = cpu_attention.attend(q[30:], k, v, 0.2, first=30, sinks=sinks, window=9)
    torch.testing.assert_close(late, whole[30:], **TOLERANCE)


class Pool:
    """A KV cache whose tokens lie in scattered slots."""

    def __init__(self, lengths):
        self.keys, self.values = (torch.zeros(256, KV_HEADS, DIM) for _ in range(2))
        self.req_to_token = torch.randperm(256)[: sum(lengths)].split(lengths)

    def set_kv_buffer(self, layer, where, k, v):
        self.keys[where.loc], self.values[where.loc] = k, v

    def get_key_buffer(self, layer_id):
        return self.keys

    def get_value_buffer(self, layer_id):
        return self.values


@pytest.mark.parametrize("with_sinks", [True, False], ids=["sinks", "plain"])
def test_a_batch_through_the_cache(cpu_attention, with_sinks):
    """Prefill two requests but for their last token, then decode that: rows equal attention over the whole."""
    lengths = [11, 17]
    pool = Pool(lengths)
    table = torch.zeros(2, 32, dtype=torch.int64)
    for row, slots in zip(table, pool.req_to_token, strict=True):
        row[: len(slots)] = slots
    backend = cpu_attention.CpuAttention(
        SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    )
    layer = SimpleNamespace(
        tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, qk_head_dim=DIM, v_head_dim=DIM, layer_id=0, scaling=0.2,
        is_cross_attention=False, attn_type=None, sliding_window_size=5, logit_cap=0.0,
    )  # fmt: skip
    sinks = {"sinks": torch.randn(HEADS)} if with_sinks else {}
    requests = [[torch.randn(n, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)] for n in lengths]
    want = [
        cpu_attention.attend(*request, 0.2, first=0, window=5, sinks=sinks.get("sinks")).flatten(1)
        for request in requests
    ]

    def step(forward, part, seq_lens, **more):
        q, k, v = (torch.cat([request[i][part] for request in requests]) for i in range(3))
        batch = SimpleNamespace(
            out_cache_loc=torch.cat([slots[part] for slots in pool.req_to_token]), encoder_lens=None,
            req_pool_indices=torch.tensor([0, 1]), seq_lens=torch.tensor(seq_lens), **more,
        )  # fmt: skip
        return forward(q.flatten(1), k, v, layer, batch, **sinks)

    before = [n - 1 for n in lengths]
    starts = {"extend_prefix_lens": torch.zeros(2, dtype=torch.int64), "extend_seq_lens": torch.tensor(before)}
    extended = step(backend.forward_extend, slice(0, -1), before, **starts)
    torch.testing.assert_close(extended, torch.cat([w[:-1] for w in want]), **TOLERANCE)
    decoded = step(backend.forward_decode, slice(-1, None), lengths)
    torch.testing.assert_close(decoded, torch.cat([w[-1:] for w in want]), **TOLERANCE)


def test_the_platform_registers_it(cpu_attention):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.platforms import current_platform

    current_platform.init_backend()
    assert all(ATTENTION_BACKENDS[name] is cpu_attention.CpuAttention for name in ("torch_native", "triton"))
