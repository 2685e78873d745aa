"""Attention of the CPU platform: SGLang's torch_native, and what that one lacks: sinks and soft-capped logits.

SGLang 0.5.23's torch_native has no parameter for sinks, so gpt-oss cannot run on it, and ignores a layer's `logit_cap`,
so Gemma 2 would run wrongly. Every other layer is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

SCORES_AT_ONCE = 1 << 24
"""Scores held together, 64 MB as fp32: a long prompt is attended to in pieces of its queries."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    first: int,
    causal: bool = True,
    window: int = -1,
    sinks: Tensor | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Attention of one sequence, in fp32, rounded once.

    Args:
        q: [Tq, Hq, D].
        k, v: [Tk, Hk, D] and [Tk, Hk, Dv]; Hq is a multiple of Hk, and query heads of a group lie together.
        scale: of q times k.
        first: position of the first query among the keys.
        causal: a query sees no later keys.
        window: if not negative, nor keys more than this far before it.
        sinks: [Hq] logits of a key whose value is zero: they take their share of the softmax (gpt-oss).
        cap: if positive, a score s becomes cap * tanh(s / cap) (Gemma 2).

    Returns:
        [Tq, Hq, Dv] in q's dtype.
    """
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)  # [Hk, D, Tk], [Hk, Tk, Dv]
    out = q.new_empty(*q.shape[:2], v.shape[2])
    step = max(1, SCORES_AT_ONCE // (q.shape[1] * k.shape[0]))
    for start in range(0, q.shape[0], step):
        part = q[start : start + step].float()
        scores = part.unflatten(1, (heads, groups)).permute(1, 2, 0, 3).flatten(1, 2) @ keys
        scores = scores.unflatten(1, (groups, -1)).mul_(scale)  # [Hk, G, T, Tk]
        if cap > 0:
            scores = cap * (scores / cap).tanh()
        seen = _seen(first + start, part.shape[0], k.shape[0], causal, window, q.device)
        scores.masked_fill_(~seen, -torch.inf)
        if sinks is not None:
            column = sinks.float().view(heads, groups, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[0]].flatten(1, 2)
        mixed = (weights @ values).unflatten(1, (groups, -1))  # [Hk, G, T, Dv]
        out[start : start + step] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
    return out


def _seen(first: int, queries: int, keys: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """bool [queries, keys]."""
    at = torch.arange(first, first + queries, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    seen = (key <= at) if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    return seen & (key >= at - window) if window >= 0 else seen


class CpuAttention(TorchNativeAttnBackend):
    """SGLang calls `forward_*`, which write the KV cache and then the two `_run_*` methods that are exchanged here."""

    _sinks: Tensor | None = None
    _cap: float = 0.0

    def forward_extend(self, *args: Any, sinks: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As SGLang's, with sinks [Hq] of this rank."""
        return self._with(super().forward_extend, sinks, *args, **kwargs)

    def forward_decode(self, *args: Any, sinks: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As SGLang's, with sinks [Hq] of this rank."""
        return self._with(super().forward_decode, sinks, *args, **kwargs)

    def _with(self, run: Callable[..., Tensor], sinks: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        layer = kwargs["layer"] if "layer" in kwargs else args[3]
        self._sinks, self._cap = sinks, layer.logit_cap or 0.0
        try:
            return run(*args, **kwargs)
        finally:
            self._sinks, self._cap = None, 0.0

    @property
    def _plain(self) -> bool:
        return self._sinks is None and self._cap <= 0

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        caches = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if self._plain:
            return super()._run_sdpa_forward_extend(
                query, output, *caches, extend_prefix_lens, extend_seq_lens, encoder_lens, **how
            )
        return self._run(query, output, *caches, extend_seq_lens.tolist(), **how)

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **how: Any,
    ) -> Tensor:
        caches = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if self._plain:
            return super()._run_sdpa_forward_decode(query, output, *caches, encoder_lens, **how)
        return self._run(query, output, *caches, [1] * len(seq_lens), **how | {"causal": True})

    def _run(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        new: list[int],
        *,
        scaling: float,
        causal: bool,
        sliding_window_size: int | None = None,
        **unused: Any,
    ) -> Tensor:
        """query, output [sum(new), Hq, D]: `new` tokens at the end of each sequence of `seq_lens` cached ones."""
        window = -1 if sliding_window_size is None else sliding_window_size
        begin = 0
        for request, length, count in zip(req_pool_indices.tolist(), seq_lens.tolist(), new, strict=True):
            slots, mine = req_to_token[request, :length], slice(begin, begin + count)
            output[mine] = attend(
                query[mine],
                k_cache[slots],
                v_cache[slots],
                scaling,
                first=length - count,
                causal=causal,
                window=window,
                sinks=self._sinks,
                cap=self._cap,
            )
            begin += count
        return output


NAMES = ("torch_native", "triton")
"""Values of `--attention-backend` that mean `CpuAttention` on the CPU platform. SGLang chooses `triton` for gpt-oss and
refuses `torch_native` there; Triton itself cannot run on a CPU."""


def register() -> None:
    """Put `CpuAttention` behind `NAMES` in this process."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS.update(dict.fromkeys(NAMES, CpuAttention))
