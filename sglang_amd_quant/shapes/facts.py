"""What a config.json says about shapes, and where to find one. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import CheckpointError, ShapeError
from sglang_amd_quant.shapes.layers import Layer


class Config:
    """A config.json's text part: lookups that name what is missing.

    Multimodal configs keep the language model's facts in `text_config`; its keys win over the outer ones.
    """

    def __init__(self, data: Mapping[str, Any], architecture: str) -> None:
        self.data = {**data, **(data.get("text_config") or {})}
        self.architecture = architecture
        self.wrapped = bool(data.get("text_config"))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def int(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there, a positive int.

        Raises:
            ShapeError: none is there and no default is given, or it is no positive int.
        """
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ShapeError(f"config.json of {self.architecture}", f"{key} is {value!r}", "write a whole number")
            return value
        if default is not None:
            return default
        raise ShapeError(f"config.json of {self.architecture}", f"{' / '.join(keys)} is missing", "add it")


@dataclass(frozen=True)
class ModelFacts:
    """A model, unsharded: what every GEMM's shape follows from.

    Attributes:
        name: the card's name, or where the config.json was.
        architecture: `architectures[0]`.
        block: format of a decoder block's prefix in the checkpoint, as `model.layers.{}.`.
        layers: every kind of GEMM layer, unsharded.
        source: where the facts come from.
        unconfirmed: keys that could not be confirmed in a public source.
    """

    name: str
    architecture: str
    block: str
    layers: tuple[Layer, ...]
    source: str = "config.json"
    unconfirmed: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, data: Mapping[str, Any], name: str = "config.json") -> ModelFacts:
        """Read a config.json (or a card, which is one with `source` and `unconfirmed` added).

        Raises:
            ShapeError: an architecture this planner does not know, or a fact that is missing.
        """
        from sglang_amd_quant.shapes.families import FAMILIES

        names = data.get("architectures") or [str(data.get("model_type"))]
        architecture = str(names[0])
        family = FAMILIES.get(architecture)
        if family is None:
            raise ShapeError(f"{name}: architecture {architecture}", "unknown", f"use one of {', '.join(FAMILIES)}")
        config = Config(data, architecture)
        block, layers = family(config)
        return cls(
            name, architecture, block, tuple(layers), str(data.get("source", name)), tuple(data.get("unconfirmed", ()))
        )


def cards() -> dict[str, Path]:
    """Shipped model cards: name -> file."""
    folder = resources.files("sglang_amd_quant.configs") / "models"
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if str(f).endswith(".json")}


def load(model: str | Path) -> ModelFacts:
    """A checkpoint folder, a config.json, or a shipped card's name.

    Raises:
        CheckpointError: no such file or card, or no JSON.
        ShapeError: see `ModelFacts.from_config`.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        known = {name.lower(): file for name, file in cards().items()}
        if str(model).lower() not in known:
            raise CheckpointError(str(model), "no folder, config.json or model card", f"cards are {', '.join(cards())}")
        path = known[str(model).lower()]
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(str(path), error.strerror or "cannot be read", "name a checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}:{error.lineno}", f"no JSON ({error.msg})", "mend the file") from None
    if not isinstance(data, dict):
        raise CheckpointError(str(path), "no JSON object", "name a config.json")
    return ModelFacts.from_config(data, path.parent.name if path.name == "config.json" else path.stem)
