"""Canonical tensor names, which are also what our own format stores (N, K logical; E experts; e2m1 and int4 pack two
a byte, the even index in the low nibble).

    <module>.weight        uint8 [N, K/2] (e2m1, int4) or float8_e4m3fn [N, K] (e4m3)
    <module>.weight_scale  uint8 [N, K/32], e8m0; for int4 int32 [N, K/group], words of scale and zero point
    <module>.input_scale   float32 [], only where activations are static per-tensor fp8
    <module>.bias          as stored

Experts that a checkpoint stores fused keep their names, with a leading E (and no `.weight`):

    ...experts.gate_up_proj   ...experts.gate_up_proj_scale   ...experts.gate_up_proj_bias
    ...experts.down_proj      ...experts.down_proj_scale      ...experts.down_proj_bias
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch

FUSED_EXPERTS = re.compile(r"(?P<module>.*\.experts\.(?:gate_up_proj|down_proj))(?P<suffix>.*)")
"""Tensors that hold all experts of a layer: the module, and what the tensor is to it (`_scale`, `_blocks`, ...)."""

LINEARS = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
    "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "w1", "w2", "w3", "wq", "wk", "wv", "wo",
    "fc1", "fc2", "dense", "query_key_value", "dense_h_to_4h", "dense_4h_to_h",
})  # fmt: skip
"""Last parts of module names that SGLang loads as linear layers."""

STORED: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "e2m1": (torch.uint8, torch.uint8),
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "int4": (torch.uint8, torch.int32),
}
"""Element format -> dtypes of canonical data and scales."""

_MANY = 6


class Role(StrEnum):
    """What a tensor is to its module: one of `CANONICAL_ROLES`; or of `INT4_ROLES`, which are checked and then become
    part of the scales (zero points) or are dropped."""

    DATA = "weight"
    SCALE = "weight_scale"
    INPUT_SCALE = "input_scale"
    ZEROS = "weight_zero_point"
    ORDER = "g_idx"
    SHAPE = "weight_shape"


CANONICAL_ROLES = (Role.DATA, Role.SCALE, Role.INPUT_SCALE)
INT4_ROLES = (Role.ZEROS, Role.ORDER, Role.SHAPE)


@dataclass(frozen=True)
class Part:
    """One tensor of one quantized module."""

    module: str
    role: Role

    @property
    def name(self) -> str:
        """Canonical tensor name."""
        if not is_fused(self.module):
            return f"{self.module}.{self.role}"
        return self.module if self.role is Role.DATA else f"{self.module}_{self.role.removeprefix('weight_')}"


def is_fused(module: str) -> bool:
    """Whether a module's tensors hold all experts of a layer."""
    match = FUSED_EXPERTS.fullmatch(module)
    return match is not None and not match["suffix"]


def some(names: Iterable[str]) -> str:
    """At most six names in one line, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more
