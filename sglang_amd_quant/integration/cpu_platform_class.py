"""The platform itself. Imported by SGLang after `activate()`: only then may sglang's platform modules be imported."""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_amd_quant.integration import fast_start

KV_TOKENS = 32768
"""KV-cache tokens by default: SGLang would otherwise take most of the machine's memory for it."""


class AmdMxCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch operators on the CPU: no sgl-kernel, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    device_name = "amd_mx_cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        if fast_start.requested():
            fast_start.register()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        # Read by the scheduler, which this process starts, when it loads OpenMP. Threads would otherwise spin while
        # they wait for each other; where other work keeps the cores busy, on the very cores that they wait for.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = KV_TOKENS
        # torch_native reads every layer's cache at the slots of the full one.
        server_args.disable_hybrid_swa_memory = True
        ranks = server_args.tp_size * server_args.pp_size
        if ranks > 1:  # SGLang gives each rank a NUMA node unless told, and refuses more ranks than nodes
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(_core_shares(ranks)))

    def init_backend(self) -> None:
        from sglang_amd_quant.integration import cpu_attention

        cpu_attention.register()

    def get_device(self, device_id: int = 0) -> Any:
        return "cpu"  # SGLang splits this at ":", which a torch.device cannot

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> Any:
        return torch.profiler.ProfilerActivity.CPU


def _core_shares(ranks: int) -> list[str]:
    """The cores of this process, dealt out evenly; ranks share cores where there are fewer."""
    cores = sorted(os.sched_getaffinity(0))
    per_rank = max(1, len(cores) // ranks)
    shares = [[cores[(rank * per_rank + i) % len(cores)] for i in range(per_rank)] for rank in range(ranks)]
    return [",".join(map(str, share)) for share in shares]
