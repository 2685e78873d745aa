"""Checkpoint formats, one file each: read, validate, stream and write.

`reader_for(quantization_config)` gives the `Reader` of a checkpoint, whose `canonical(stream)` renames and re-lays its
tensors to the one form the rest of the package knows (see `reader.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_amd_quant.checkpoints.native import NativeReader
from sglang_amd_quant.checkpoints.reader import Reader
from sglang_amd_quant.errors import CheckpointError

READERS: dict[str, type[Reader]] = {
    "amd_mx": NativeReader,
}
"""`quant_method` of a quantization_config -> its reader."""


def reader_for(quantization_config: Mapping[str, Any]) -> Reader:
    """The reader of a checkpoint, configured by its `quantization_config` (parsed JSON).

    Raises:
        CheckpointError: no reader knows the format, or the format's reader does not cover what the config asks for.
    """
    method = quantization_config.get("quant_method")
    if method not in READERS:
        raise CheckpointError(
            f"quantization_config: quant_method {method!r}",
            "no reader for this format",
            f"give a bf16 checkpoint or one of {', '.join(READERS)}",
        )
    return READERS[method].from_config(quantization_config)


__all__ = ["READERS", "Reader", "reader_for"]
