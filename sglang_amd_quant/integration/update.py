"""`/update_weights_from_disk` that fails and leaves the server as it was.

SGLang 0.5.23 notes the new path before it loads anything, so that its way back from a failed update loads the same bad
files again and ends the server. Here the path is put back as soon as loading fails. What an update does not bring is
found, as it is when a server starts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.integration.linear import AmdMxLinearMethod
from sglang_amd_quant.integration.loading import UNLOADED_SCALE
from sglang_amd_quant.integration.moe import AmdMxMoEMethod

_served: list[tuple[Any, str]] = []
"""While weights are updated: the model's config, and the path of the weights that it serves."""


def update(original: Callable[..., tuple[bool, str]], updater: Any, model_path: str, *args: Any, **kwargs: Any) -> Any:
    """Around `WeightUpdater.update_weights_from_disk`, which returns whether it succeeded, and a message."""
    from sglang_amd_quant.integration.config import config_of
    from sglang_amd_quant.integration.stream import check_index

    partial = kwargs.get("weight_name_filter") is not None  # of elastic EP, which fetches the experts it lost
    if partial or config_of(updater.get_model()) is None:
        return original(updater, model_path, *args, **kwargs)
    try:
        check_index(Path(model_path))
    except CheckpointError as error:
        return False, f"Failed to update weights: {error}."
    _served.append((updater.model_config, updater.model_config.model_path))
    done = False
    try:
        done, message = original(updater, model_path, *args, **kwargs)
        return done, message
    finally:
        if not done:
            _put_back()
        _served.pop()


def load(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around `DefaultModelLoader.load_weights_and_postprocess`, which an update calls, and again on its way back."""
    if _served:
        _unload(model)
    try:
        original(model, *args, **kwargs)
    except Exception:
        _put_back()
        raise


def folder_read() -> Path:
    """Where the tensors come from that are loaded now."""
    from sglang.srt.runtime_context import get_server_args

    return Path(_served[-1][0].model_path if _served else get_server_args().model_path)


def _unload(model: torch.nn.Module) -> None:
    """Let our layers' scales and biases be NaN again, as in layers just built."""
    for layer in model.modules():
        if not isinstance(getattr(layer, "quant_method", None), AmdMxLinearMethod | AmdMxMoEMethod):
            continue
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("weight_scale"):
                parameter.data.fill_(UNLOADED_SCALE[parameter.dtype])
            elif name.endswith(("weight_bias", "input_scale")):
                parameter.data.fill_(torch.nan)


def _put_back() -> None:
    for config, path in _served:
        config.model_path = path
