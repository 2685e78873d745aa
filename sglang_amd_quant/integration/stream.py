"""A checkpoint's tensors on their way to SGLang's loaders: from whole files, in canonical form, as layers have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from sglang_amd_quant.checkpoints import Reader
from sglang_amd_quant.checkpoints.folder import INDEX, Folder
from sglang_amd_quant.checkpoints.naming import is_fused
from sglang_amd_quant.errors import CheckpointError, UnsupportedError
from sglang_amd_quant.json_file import read_json
from sglang_amd_quant.schemes import BF16

Tensors = Iterable[tuple[str, torch.Tensor]]

EXPERTS_TRANSPOSED = {"gpt_oss"}
"""model_type whose SGLang loader transposes fused expert tensors itself, so they are handed over as [E, K, N]."""


def canonical(
    weights: Tensors, reader: Reader | None, model_type: str, unasked: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a reader makes of a checkpoint's tensors, or bf16 ones as they are.

    Args:
        weights: as SGLang reads them.
        reader: of the checkpoint's format; None where its config.json names none.
        model_type: of config.json.
        unasked: modules of layers that SGLang gives no method -> SGLang's names of these.

    Raises:
        CheckpointError: as the reader says, a file is broken, or weights are quantized unannounced.
        UnsupportedError: weights of an `unasked` layer are quantized.
    """
    whole = _from_whole_files(weights)
    if reader is None:
        return _unquantized(whole)
    stream: Tensors = reader.canonical(whole)
    stream = _without_unasked(stream, unasked) if unasked else stream
    return _transposed_experts(stream) if model_type in EXPERTS_TRANSPOSED else iter(stream)


def _from_whole_files(weights: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, from files that hold what the folder's index names; SGLang reads what there is.

    Raises:
        CheckpointError: they do not, or a file is broken: safetensors does not know its name.
    """
    from sglang_amd_quant.integration.update import folder_read

    folder = folder_read()
    check_index(folder)
    try:
        yield from weights
    except SafetensorError:
        if folder.is_dir():
            Folder.open(folder)
        raise


def check_index(folder: Path) -> None:
    """Look for the tensors of a local folder's index, if it has one.

    Raises:
        CheckpointError: some are in no file, so would be served as whatever memory holds.
    """
    if not (folder / INDEX).is_file():
        return
    problems: list[CheckpointError] = []
    held = Folder.survey(folder, problems.append).tensors
    if any(name not in held for name in read_json(folder / INDEX, "fetch the index again")["weight_map"]):
        raise problems[0]


def _unquantized(weights: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """The same, from a checkpoint whose config.json says that it is not quantized.

    Raises:
        CheckpointError: a weight is, in a way that nothing tells.
    """
    for name, tensor in weights:
        if tensor.element_size() == 1 and (name.endswith(".weight") or is_fused(name)):
            raise CheckpointError(
                f"{name} {list(tensor.shape)} {tensor.dtype}",
                "quantized, though config.json has no quantization_config",
                "mend config.json; where hf_quant_config.json has it, `amd-mx quantize SRC DST --scheme keep` does so",
            )
        yield name, tensor


def _transposed_experts(stream: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        quantized = tensor.element_size() == 1 or tensor.dtype == torch.int32
        fused = ".experts." in name and tensor.dim() == 3 and quantized
        yield name, tensor.transpose(-2, -1) if fused else tensor


def _without_unasked(stream: Tensors, unasked: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same. Raises UnsupportedError at a quantized weight of an unasked layer."""
    for name, tensor in stream:
        module = name.removesuffix(".weight")
        if module in unasked and tensor.element_size() == 1:
            raise UnsupportedError(
                f"layer {unasked[module]}: {name} {list(tensor.shape)}",
                "quantized in the checkpoint, and SGLang builds the layer without asking for a method",
                f'quantize the bf16 original with the recipe rule "{module}": "{BF16}"',
            )
        yield name, tensor
