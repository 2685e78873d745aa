"""What is installed, what would serve here and why, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sglang_amd_quant import __version__
from sglang_amd_quant.cli.arguments import device_arch
from sglang_amd_quant.errors import AmdMxError
from sglang_amd_quant.recipe import RECIPE_ENV, Recipe, default_recipe
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import GemmProblem, KernelChoice, choose
from sglang_amd_quant.selection.choose import REFERENCE

DESCRIPTION = "Say what is installed, which architecture and kernels would serve here and why, and what is missing."
EXAMPLE = "amd-mx doctor\namd-mx doctor --arch gfx950"

PACKAGES = ("torch", "sglang", "triton", "transformers", "safetensors", "flashinfer-python", "aiter", "ziglang")

ATTENTION = {"gfx9": "aiter or triton", "gfx1": "triton", "sm_": "flashinfer or triton", "cpu": "torch_native"}
"""Prefix of an arch -> values of SGLang's --attention-backend that go with this package there."""

LINEAR: dict[str, Any] = {"op": "linear", "n": 4096, "k": 4096}
EXPERTS: dict[str, Any] = {"e_local": 128, "e_total": 128, "top_k": 8}
GATE_UP: dict[str, Any] = {"op": "moe_gate_up", "n": 1536, "k": 2048, **EXPERTS}
DOWN: dict[str, Any] = {"op": "moe_down", "n": 2048, "k": 768, **EXPERTS}
"""GEMMs of ordinary size to ask selection about (experts: Qwen3-30B-A3B's)."""

SAMPLE_MS = (1, 64, 2048)


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        versions: distribution -> version, None where it is absent.
        arch: architecture that would serve, None where torch is absent.
        device: its name.
        plugins: SGLang entry points of this package that this environment offers.
        kernels: scheme, op, M, and the kernel that selection gives them, with its source and first reason.
        not_launched: kernels of this package for the arch that cannot be launched here -> why, and the remedy.
        problems: (what, remedy) of everything that keeps this environment from serving.
        notes: what is worth knowing and no problem.
    """

    versions: dict[str, str | None]
    arch: str | None = None
    device: str = ""
    plugins: list[str] = field(default_factory=list)
    default: str = ""
    attention: str = ""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    not_launched: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", type=device_arch, help="ask about another architecture, such as gfx950 (default: this machine's)"
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 where a server could start, 1 where something is missing."""
    found = diagnose(args.arch)
    print(json.dumps(asdict(found), indent=1) if args.json else _text(found))
    return 1 if found.problems else 0


def diagnose(arch: str | None = None) -> Diagnosis:
    """Look at this environment, for its own device or for an arch. Never raises for what is missing, but tells it."""
    found = Diagnosis({name: _version(name) for name in PACKAGES})
    _check_versions(found)
    _check_plugins(found)
    if arch is None:
        _check_device(found)
    elif found.versions["torch"] is not None:
        found.arch, found.device, found.attention = arch, "asked for", _attention(arch)
    for look in (_check_recipe, _ask_selection):
        try:
            look(found)
        except AmdMxError as error:
            found.problems.append((f"{error.what}: {error.reason}", error.remedy))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_versions(found: Diagnosis) -> None:
    from sglang_amd_quant.integration.versions import OVERRIDE, SUPPORTED_SGLANG, sglang_version

    version = sglang_version()
    if version is None:
        found.problems.append(("sglang is not installed", f"install sglang{SUPPORTED_SGLANG}"))
    elif version not in SUPPORTED_SGLANG:
        text = f"sglang {version} was not tested, only {SUPPORTED_SGLANG}"
        if os.environ.get(OVERRIDE) == "1":
            found.notes.append(f"{text}; {OVERRIDE}=1 lets it through")
        else:
            found.problems.append((text, f"install one of these, or set {OVERRIDE}=1"))
    if found.versions["torch"] is None:
        found.problems.append(("torch is not installed", "install the build for this machine"))
    if found.versions["triton"] is None:
        found.problems.append(("triton is not installed", "install it: SGLang imports it on every machine"))


def _check_plugins(found: Diagnosis) -> None:
    for group, name in (("sglang.srt.plugins", "amd_mx"), ("sglang.srt.platforms", "amd_mx_cpu")):
        for point in importlib.metadata.entry_points(group=group, name=name):
            found.plugins.append(f"{group}: {name} ({point.dist.name if point.dist else 'unknown distribution'})")
    if not any("sglang.srt.plugins" in plugin for plugin in found.plugins):
        found.problems.append(("SGLang cannot see the plugin amd_mx", "reinstall sglang-amd-quant with pip"))
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed is not None and "amd_mx" not in [name.strip() for name in allowed.split(",")]:
        found.problems.append((f"SGLANG_PLUGINS={allowed} leaves out amd_mx", f"set SGLANG_PLUGINS={allowed},amd_mx"))


def _check_device(found: Diagnosis) -> None:
    if found.versions["torch"] is None:
        return
    import torch

    from sglang_amd_quant.runtime.detect import CPU, current_arch

    found.arch = current_arch()
    found.attention = _attention(found.arch)
    if found.arch != CPU:
        found.device = torch.cuda.get_device_name()
        return
    found.device = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    found.notes.append("weights are dequantized on the CPU; copies are kept while SGLANG_AMD_MX_CPU_COPIES_GB lasts")
    platforms = importlib.metadata.entry_points(group="sglang.srt.platforms", name="amd_mx_cpu")
    chosen = os.environ.get("SGLANG_PLATFORM") or os.environ.get("SGLANG_USE_CPU_ENGINE")
    if not platforms and not chosen:
        found.problems.append(
            ("torch sees no accelerator, and no CPU platform is installed", "pip install sglang-amd-quant-cpu")
        )


def _check_recipe(found: Diagnosis) -> None:
    path = os.environ.get(RECIPE_ENV)
    if path:
        found.notes.append(f"{RECIPE_ENV}={path} is what --quantization amd_mx follows")
        Recipe.load(path)


def _attention(arch: str) -> str:
    return next((name for prefix, name in ATTENTION.items() if arch.startswith(prefix)), "triton")


def _ask_selection(found: Diagnosis) -> None:
    arch = found.arch
    if arch is None:
        return
    from sglang_amd_quant.ops import layout, linear, moe
    from sglang_amd_quant.runtime.detect import launchable, missing

    found.default = str(default_recipe(arch).to_dict())
    found.not_launched = dict(missing(arch))
    here = launchable(arch)
    for scheme, known in SCHEMES.items():
        dense, gate_up, down = (
            GemmProblem(scheme=scheme, arch=arch, m=0, group=known.served_block(shape["k"]), **shape)
            for shape in (LINEAR, GATE_UP, DOWN)
        )
        layouts = (layout.linear_layout(dense, here), *layout.expert_layouts(gate_up, down, here))
        for m in SAMPLE_MS:
            dense, gate_up, down = (
                replace(problem, m=m, layout=laid.name)
                for problem, laid in zip((dense, gate_up, down), layouts, strict=True)
            )
            pair = moe.decide(gate_up, down, here, choose)
            choices = {"linear": choose(dense, here.intersection(linear.KERNELS) | {REFERENCE})}
            choices |= {"experts gate_up": pair.gate_up, "experts down": pair.down}
            found.kernels += [_row(scheme, label, m, choice) for label, choice in choices.items()]


def _row(scheme: str, label: str, m: int, choice: KernelChoice) -> dict[str, Any]:
    asked = {"scheme": scheme, "op": label, "M": m}
    return asked | {"kernel": choice.kernel, "source": choice.source, "reason": "; ".join(choice.reasons[:1])}


def _text(found: Diagnosis) -> str:
    lines = [f"sglang-amd-quant {__version__}, Python {platform.python_version()}", "", "installed"]
    lines += [f"  {name:<18} {version or '-'}" for name, version in found.versions.items()]
    lines += ["", "seen by SGLang", *(f"  {plugin}" for plugin in found.plugins or ["nothing"])]
    if found.arch is not None:
        lines += ["", f"serves on {found.arch} ({found.device})"]
        lines += [f"  --quantization amd_mx on bf16 weights: {found.default}"]
        lines += [f"  --attention-backend {found.attention}", "", "kernels for GEMMs of ordinary size"]
        lines += _kernel_lines(found.kernels)
        if found.not_launched:
            lines += ["", "kernels that cannot be launched here"]
            lines += [f"  {name}: {why}" for name, why in found.not_launched.items()]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"PROBLEM: {what}; {remedy}" for what, remedy in found.problems] or ["", "no problems found"]
    return "\n".join(lines)


def _kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line a kernel, its source and op: which schemes it serves at which M; and below it why."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["source"], row["op"]), []).append(row)
    lines = []
    for (kernel, source, op), mine in groups.items():
        ms: dict[str, list[str]] = {}
        for row in mine:
            ms.setdefault(row["scheme"], []).append(str(row["M"]))
        schemes: dict[str, list[str]] = {}
        for scheme, at in ms.items():
            schemes.setdefault(", ".join(at), []).append(scheme)
        served = "; ".join(f"{', '.join(names)} at M {at}" for at, names in schemes.items())
        lines += [f"  {op}: {kernel} ({source}): {served}", f"    because {mine[0]['reason']}"]
    return lines
