"""What a config.json says about shapes, and where to find one. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_amd_quant.errors import CheckpointError, ShapeError
from sglang_amd_quant.json_file import read_json
from sglang_amd_quant.shapes.layers import Layer

MOST = {"num_hidden_layers": 10_000}
"""Key -> the most that is believed; of any other, what fits 31 bits, as kernels' sizes must."""


class Config:
    """A config.json's language model: lookups that name what is missing.

    Multimodal configs keep it in `text_config`, whose keys win over the outer ones.
    """

    def __init__(self, data: Mapping[str, Any], name: str, architecture: str) -> None:
        self.architecture, self.where = architecture, f"{name} ({architecture})"
        self.data = dict(data)
        self.data |= self.object("text_config")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of `keys` that is there, a whole number of at least `least` and at most what `MOST` says.

        Raises:
            ShapeError: none is there and no default is given, or it is no such number.
        """
        found = next(((key, self.data[key]) for key in keys if self.data.get(key) is not None), None)
        if found is None:
            if default is None:
                raise ShapeError(self.where, f"{' / '.join(keys)} is missing", "add it to the config")
            return default
        key, value = found
        most = MOST.get(key, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ShapeError(self.where, f"{key} is {value!r}", f"write a whole number of at least {least}")
        if value > most:
            raise ShapeError(self.where, f"{key} is {value:.3g}", f"write a whole number of at most {most}")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty where the config has none. Raises ShapeError if it is something else."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise ShapeError(self.where, f"{key} is no object", "mend the config")
        return value

    def indices(self, key: str) -> list[int]:
        """A list of decoder blocks, empty where the config has none. Raises ShapeError if it is something else."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
            raise ShapeError(self.where, f"{key} is no list of block indices", "mend the config")
        return value

    def per_block(self, key: str) -> list[Any] | None:
        """A list with an entry a decoder block, or None where the config has none.

        Raises:
            ShapeError: it is no list, or shorter than the model is deep.
        """
        value, depth = self.data.get(key), self.whole("num_hidden_layers")
        if value is not None and (not isinstance(value, list) or len(value) < depth):
            raise ShapeError(self.where, f"{key} is no list of {depth} entries", "write one entry a layer")
        return value


@dataclass(frozen=True)
class ModelFacts:
    """A model, unsharded: what every GEMM's shape follows from.

    Attributes:
        name: the card's name, or the folder or file of the config.json.
        architecture: `architectures[0]`.
        block: format of a decoder block's prefix, as `model.layers.{}.`, in SGLang's module tree.
        layers: every kind of GEMM layer, unsharded.
        source: where the facts come from.
        unconfirmed: keys that could not be confirmed in a public source.
        quantization: `quantization_config` as JSON text, where the checkpoint is quantized.
    """

    name: str
    architecture: str
    block: str
    layers: tuple[Layer, ...]
    source: str = ""
    unconfirmed: tuple[str, ...] = ()
    quantization: str | None = None

    @classmethod
    def from_config(cls, data: Mapping[str, Any], name: str = "config.json") -> ModelFacts:
        """Read a config.json, or a card, which is one with `source` and `unconfirmed` added.

        Raises:
            ShapeError: an architecture this planner does not know, or a fact that is missing or impossible.
        """
        from sglang_amd_quant.shapes.families import FAMILIES

        names = data.get("architectures")
        if not isinstance(names, list) or not names:
            raise ShapeError(name, "no architectures", 'add "architectures": ["..."] to the config')
        architecture = str(names[0])
        family = FAMILIES.get(architecture)
        if family is None:
            raise ShapeError(
                f"{name}: architecture {architecture}", "not known here", f"known are {', '.join(sorted(FAMILIES))}"
            )
        config = Config(data, name, architecture)
        quantization, unconfirmed = config.object("quantization_config"), data.get("unconfirmed")
        return cls(
            name,
            architecture,
            family.block,
            layers=tuple(layer for layer in family.layers(config) if layer.blocks != ()),
            source=str(data.get("source", name)),
            unconfirmed=tuple(map(str, unconfirmed)) if isinstance(unconfirmed, list) else (),
            quantization=json.dumps(quantization) if quantization else None,
        )


def cards() -> dict[str, Path]:
    """Shipped model cards: name -> file."""
    folder = Path(str(resources.files("sglang_amd_quant.configs"))) / "models"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def load(model: str | Path) -> ModelFacts:
    """A checkpoint folder, a config.json, or a shipped card's name or a beginning that only one has, in any case.

    Raises:
        CheckpointError: no such file or card, or no JSON.
        ShapeError: see `ModelFacts.from_config`.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = _card(str(model))
    data = read_json(path, "name a checkpoint folder")
    if not isinstance(data, dict):
        raise CheckpointError(str(path), "no JSON object", "name a config.json")
    return ModelFacts.from_config(data, path.parent.name if path.name == "config.json" else path.stem)


def _card(name: str) -> Path:
    known = cards()
    exact = [card for card in known if card.lower() == name.lower()]
    found = exact or [card for card in known if card.lower().startswith(name.lower())]
    if len(found) != 1:
        reason = f"fits {len(found)} model cards" if found else "no folder, config.json or model card"
        raise CheckpointError(name, reason, f"cards are {', '.join(found or known)}")
    return known[found[0]]
