"""How far a server's greedy token ids agree with a reference model, and how far they must.

Two right implementations of one network round to its dtype at different places (SGLang adds the residual inside the
norm in fp32, transformers before it in bf16; ranks add partial sums that are rounded already), so their logits differ a
little, and greedy ids may part where two tokens are nearly tied. How nearly is measured on the reference itself: run it
once more with the output of every norm moved by up to one ulp of its dtype, which is what such a difference comes to,
and see by how much the margin between the first two tokens changes. With s the root mean square of those changes,

    bound = SIGMAS * s + ulp(top logit)

where the second term is the rounding of the two logits themselves, half an ulp each.

With experts there is a second reason: where a router is nearly tied, an ulp picks another expert, and the logits jump.
A parting above the bound is therefore looked at again under `RETRIES` more such movements of the reference: if the
server's token comes within the bound of the best one under any of them, the reference itself goes either way there.

Each position is judged on the server's own prefix (one forward pass over prompt + ids), so a parting hides nothing that
follows it; where no position parts, the reference's greedy ids are the server's, by induction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SIGMAS = 5.0
"""A change of the margin beyond 5 s has a chance below 1e-6 a position if changes are normal; there are 256."""

RETRIES = 16


@dataclass(frozen=True)
class Parting:
    """A position where the reference would have taken another token.

    Attributes:
        prompt, position: which prompt, and which of its generated tokens.
        token, wanted: the server's id and the reference's.
        margin: by how much the reference's logit of `wanted` exceeds that of `token`.
        bound: what the margin may be at most.
    """

    prompt: int
    position: int
    token: int
    wanted: int
    margin: float
    bound: float


@dataclass(frozen=True)
class Agreement:
    """Positions compared, the partings among them, s, and the median of the reference's top-2 margins."""

    positions: int
    partings: tuple[Parting, ...]
    noise: float
    median_margin: float

    @property
    def broken(self) -> list[Parting]:
        """Partings that rounding does not explain."""
        return [p for p in self.partings if p.margin > p.bound]

    def __str__(self) -> str:
        worst = max((p.margin for p in self.partings), default=0.0)
        bound = max((p.bound for p in self.partings), default=SIGMAS * self.noise)
        return (
            f"{self.positions} positions, {len(self.partings)} partings, largest margin {worst:.3f} "
            f"(bound {bound:.3f}; median top-2 margin {self.median_margin:.2f}), {len(self.broken)} unexplained"
        )


def logits(model: Any, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """fp32 logits [len(output), V] from which each of `output` was to be chosen."""
    return _logits_of(model, [(prompt, output)])[0]


@torch.inference_mode()
def _logits_of(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Those of every pair; together, since a head in fp32 takes longer to make than to use."""
    rows = functional.linear(_hidden(model, pairs), model.get_output_embeddings().weight.float())
    return list(rows.split([len(output) for _, output in pairs]))


@torch.inference_mode()
def _hidden(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """fp32 states [positions of all pairs, hidden] that the head makes logits of."""
    hidden = []
    for prompt, output in pairs:
        ids = torch.tensor([[*prompt, *output[:-1]]])
        hidden.append(model.base_model(ids).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(hidden).float()


@contextmanager
def moved_by_an_ulp(model: Any, seed: int = 0) -> Iterator[None]:
    """While open, every norm's output is moved by -1, 0 or 1 ulp of the model's dtype at random."""
    generator, ulp = torch.Generator().manual_seed(seed), torch.finfo(model.dtype).eps

    def move(module: Any, inputs: Any, output: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, output.shape, generator=generator)
        return (output.float() * (1 + steps * ulp / 2)).to(output.dtype)  # half to one ulp, rounded to one

    norms = [m for name, m in model.named_modules() if name.endswith("norm")]
    handles = [norm.register_forward_hook(move) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(model: Any, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> Agreement:
    """Judge generated ids against the reference model.

    Args:
        model: a transformers causal LM in the server's dtype.
        prompts: token ids.
        outputs: the ids that the server generated greedily after each prompt.
    """
    pairs = list(zip(prompts, outputs, strict=True))
    rows, margins, noise = _measure(model, pairs)
    partings = [
        parting
        for i, (row, output) in enumerate(zip(rows, outputs, strict=True))
        for parting in _partings(i, row, torch.tensor(output), noise, torch.finfo(model.dtype).eps)
    ]
    partings = [p if p.margin <= p.bound else _closest(model, pairs[p.prompt], p) for p in partings]
    return Agreement(sum(map(len, outputs)), tuple(partings), noise, margins.median().item())


def compare_pair(
    model: Any, prompts: Sequence[Sequence[int]], first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]
) -> Agreement:
    """Judge two servers' ids against each other: where they part, the reference must find both tokens nearly tied.

    Positions after a prompt's first parting have different prefixes and are not compared.
    """
    pairs = list(zip(prompts, first, strict=True))
    rows, margins, noise = _measure(model, pairs)
    positions, partings = 0, []
    for i, (row, one, two) in enumerate(zip(rows, first, second, strict=True)):
        at = next((j for j, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), None)
        positions += len(one) if at is None else at + 1
        if at is not None:
            margin = abs(float(row[at, one[at]] - row[at, two[at]]))
            bound = SIGMAS * noise + _ulp_of(float(row[at].max()), torch.finfo(model.dtype).eps)
            partings.append(Parting(i, at, two[at], one[at], margin, bound))
    return Agreement(positions, tuple(partings), noise, margins.median().item())


@torch.inference_mode()
def _measure(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[Tensor], Tensor, float]:
    """Logits of each pair, the top-2 margins of all positions, and s."""
    rows = _logits_of(model, pairs)
    top = torch.cat(rows).topk(2, dim=-1)
    margins = top.values[:, 0] - top.values[:, 1]
    with moved_by_an_ulp(model):
        moved = _hidden(model, pairs)
    again = torch.einsum("ph,pth->pt", moved, model.get_output_embeddings().weight[top.indices].float())
    changes = again[:, 0] - again[:, 1] - margins
    return rows, margins, changes.square().mean().sqrt().item()


def _closest(model: Any, pair: tuple[Sequence[int], Sequence[int]], parting: Parting) -> Parting:
    """The parting with the least margin that the reference shows under further movements by an ulp."""
    prompt, output = pair
    margin = parting.margin
    for seed in range(1, RETRIES + 1):
        with moved_by_an_ulp(model, seed):
            row = logits(model, prompt, output[: parting.position + 1])[-1]
        margin = min(margin, float(row.max() - row[parting.token]))
    return replace(parting, margin=margin)


def _partings(prompt: int, row: Tensor, output: Tensor, noise: float, eps: float) -> Iterator[Parting]:
    best = row.max(dim=-1)
    for position in (best.indices != output).nonzero().flatten().tolist():
        token, top = int(output[position]), float(best.values[position])
        margin = top - float(row[position, token])
        bound = SIGMAS * noise + _ulp_of(top, eps)
        yield Parting(prompt, position, token, int(best.indices[position]), margin, bound)


def _ulp_of(value: float, eps: float) -> float:
    """Spacing of a dtype's numbers at `value`; eps is that at 1."""
    return eps * 2.0 ** torch.tensor(value).abs().log2().floor().item()
