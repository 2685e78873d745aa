"""The platform itself. Imported by SGLang after `activate()`: only then may sglang's platform modules be imported."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

KV_TOKENS = 32768
"""KV-cache tokens by default: SGLang would otherwise take most of the machine's memory for it."""


class AmdMxCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch operators on the CPU: no sgl-kernel, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "amd_mx_cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = KV_TOKENS

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        return torch.profiler.ProfilerActivity.CPU
