"""Checkpoint formats, one file each: read, validate, stream and write.

`reader_for(quantization_config)` gives the `Reader` of a checkpoint, whose `canonical(stream)` renames and re-lays its
tensors to the one form the rest of the package knows (see `naming.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sglang_amd_quant.checkpoints.awq import AwqReader
from sglang_amd_quant.checkpoints.compressed_tensors import CompressedTensorsReader
from sglang_amd_quant.checkpoints.gpt_oss import GptOssReader
from sglang_amd_quant.checkpoints.gptq import GptqReader
from sglang_amd_quant.checkpoints.modelopt import ModelOptReader
from sglang_amd_quant.checkpoints.mxfp8 import Mxfp8Reader
from sglang_amd_quant.checkpoints.native import NativeReader
from sglang_amd_quant.checkpoints.quark import QuarkReader
from sglang_amd_quant.checkpoints.reader import CONFIG, Reader
from sglang_amd_quant.errors import AmdMxError, CheckpointError

READERS: dict[str, type[Reader]] = {
    "amd_mx": NativeReader,
    "quark": QuarkReader,
    "mxfp4": GptOssReader,
    "compressed-tensors": CompressedTensorsReader,
    "modelopt": ModelOptReader,
    "mxfp8": Mxfp8Reader,
    "gptq": GptqReader,
    "awq": AwqReader,
}
"""`quant_method` of a quantization_config -> its reader."""

_SGLANGS_MODELOPT = ("modelopt_fp8", "modelopt_fp4", "modelopt_mixed", "w4afp8")
"""What SGLang calls ModelOpt's checkpoints before it hands over their config."""

_NO_MODEL: Mapping[str, Any] = MappingProxyType({})


def reader_for(quantization_config: Mapping[str, Any], model_config: Mapping[str, Any] = _NO_MODEL) -> Reader:
    """The reader of a checkpoint.

    Args:
        quantization_config: parsed JSON: of config.json, or all of ModelOpt's hf_quant_config.json.
        model_config: the config.json around it. Quark's gpt-oss needs its `model_type` and `num_local_experts`.

    Raises:
        CheckpointError: no reader knows the format, or the format's reader does not cover what the config asks for.
    """
    method = quantization_config.get("quant_method")
    if method is None and "producer" in quantization_config:  # hf_quant_config.json
        producer = quantization_config["producer"]
        method = producer.get("name") if isinstance(producer, Mapping) else producer
    if method in _SGLANGS_MODELOPT and "quant_algo" in quantization_config:
        method = "modelopt"
    if not isinstance(method, str) or method not in READERS:
        raise CheckpointError(
            f"quantization_config: quant_method {method!r}",
            "no reader for this format",
            f"give a bf16 checkpoint or one of {', '.join(READERS)}",
        )
    try:
        return READERS[method].from_config(quantization_config, model_config)
    except AmdMxError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{CONFIG}, quant_method {method!r}", f"not as that format writes it ({error!r})", "mend config.json"
        ) from error


__all__ = ["READERS", "Reader", "reader_for"]
