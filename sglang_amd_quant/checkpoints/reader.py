"""What every checkpoint format must tell: which names mean what, how its bytes become ours, and its config's recipe.

A format is a subclass of `Reader`, one file each. Renaming, checking and counting of tensors happens once, in `Ledger`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from sglang_amd_quant.checkpoints.ledger import Ledger, Named
from sglang_amd_quant.checkpoints.naming import Part, Role
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe, Rule
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, SCHEMES, ScaleMode

CONFIG = "config.json quantization_config"
"""How messages call the place that readers are configured from."""

FP8_STATIC = "fp8_static"
_SCHEME_OF = {(s.weight, s.act): s.name for s in SCHEMES.values()} | {("e2m1", FP8_STATIC): "w4a8"}


@dataclass(frozen=True)
class Reader(ABC):
    """One checkpoint format, configured by one checkpoint's `quantization_config`.

    Attributes:
        recipe: checkpoint module name -> scheme, or bf16.
        scale_mode: how activations' scales are rounded, by element format.
        static: modules whose activations are quantized with one static fp8 scale that the checkpoint stores: the first
            rule that matches says `fp8_static` or not.
        symmetric: whether int4 groups have no zero points of their own, or only 8.
        check_patterns: whether a pattern of the recipe that matches no layer of the model is a user's mistake (and not
            just one of the checkpoint's own excludes).
    """

    recipe: Recipe
    scale_mode: Mapping[str, ScaleMode] = field(default_factory=lambda: dict(DEFAULT_SCALE_MODE))
    static: tuple[Rule, ...] = ()
    symmetric: bool = True
    check_patterns: bool = False

    name: ClassVar[str]
    """What users call the format."""
    suffixes: ClassVar[Mapping[str, Role]]
    """End of a tensor's name -> what it is; the rest of the name is the module. First match wins."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], model: Mapping[str, Any]) -> Self:
        """Build from a `quantization_config` and the config.json around it (both parsed JSON).

        Raises:
            CheckpointError: the config asks for something this reader does not cover.
        """

    def static_input(self, module: str) -> bool:
        """Whether the module's activations are quantized with one static fp8 scale that the checkpoint stores."""
        return next((rule.scheme == FP8_STATIC for rule in self.static if rule.matches(module)), False)

    def part(self, name: str) -> Part | None:
        """Which module's tensor this is, or None where it is none of the format's own."""
        return next(
            (Part(name.removesuffix(end), role) for end, role in self.suffixes.items() if name.endswith(end)), None
        )

    def called(self, role: Role) -> str:
        """What the format calls such tensors."""
        return next((end.removeprefix(".") for end, known in self.suffixes.items() if known is role), str(role))

    def data(self, name: str, tensor: torch.Tensor, element: str) -> torch.Tensor:
        """The format's weight bytes, which are to be such elements, in canonical layout."""
        return tensor

    def scales(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The format's scales as e8m0 bytes [..., N, K/32]; for int4 floats [..., N, K/group], or words."""
        return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor

    def zeros(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The format's int4 zero points as uint8 [N, K/group], for formats that store such."""
        return tensor

    def canonical(self, stream: Iterable[Named]) -> Iterator[Named]:
        """Rename and re-lay a checkpoint's tensors to the form of `naming`, in the order they come, holding back as
        little as the format allows.

        Raises:
            CheckpointError: at once on a wrong shape, dtype or NaN scale; at the end of the stream on tensors left
                over and on partners that never came.
        """

        def fail(error: CheckpointError) -> None:
            raise error

        return self.walk(stream, fail)

    def walk(self, stream: Iterable[Named], report: Callable[[CheckpointError], None]) -> Iterator[Named]:
        """`canonical`, but problems go to `report`; a tensor with a problem is left out.

        Tensors may lie on the meta device: then all but their values is checked.
        """
        ledger = Ledger(self)
        for name, tensor in stream:
            try:
                item = ledger.enter(name, tensor)
            except CheckpointError as error:
                report(error)
                continue
            if item is not None:
                yield item
        for problem in ledger.close():
            report(problem)


def scheme_named(weight: str, act: str, where: str) -> str:
    """The scheme that multiplies these weights and activations.

    Args:
        weight: element format of the weights.
        act: element format of the activations, `bf16` or `fp8_static`.
        where: the config entry that asks for it.

    Raises:
        CheckpointError: no scheme does.
    """
    try:
        return _SCHEME_OF[weight, act]
    except KeyError:
        pairs = ", ".join(f"{w} x {a}" for w, a in _SCHEME_OF)
        raise unsupported(where, f"no scheme multiplies {weight} weights and {act} activations (but {pairs})") from None


def unsupported(where: str, reason: str) -> CheckpointError:
    """A checkpoint's config asks for what no kernel of ours does."""
    return CheckpointError(f"{CONFIG} {where}", reason, "quantize the bf16 original with `amd-mx quantize`")


def prefix_pattern(pattern: str) -> str:
    """A recipe pattern for a regular expression that has to match at the start of a name only."""
    return f"re:(?:{pattern}).*"


def below(module: str) -> tuple[str, str]:
    """Recipe patterns for a module, or glob over modules, and all below it."""
    return module, f"{module}.*"
