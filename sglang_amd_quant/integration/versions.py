"""Which SGLang this package plugs into, checked before anything is registered."""

from __future__ import annotations

import importlib.metadata
import os

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sglang_amd_quant.errors import UnsupportedError

SUPPORTED_SGLANG = SpecifierSet("==0.5.23.*")
"""Versions whose seams (hooks, registries, loaders) this package was tested with."""

OVERRIDE = "SGLANG_AMD_MX_ANY_SGLANG"
"""Environment variable: 1 tries an untested SGLang instead of refusing it."""


def sglang_version() -> Version | None:
    """Version of the installed SGLang, or None."""
    try:
        return Version(importlib.metadata.version("sglang"))
    except importlib.metadata.PackageNotFoundError:
        return None


def check_sglang() -> None:
    """Refuse an SGLang whose seams were not tested.

    Raises:
        UnsupportedError: SGLang is absent or of another version, and the override is not set.
    """
    version = sglang_version()
    if version is not None and (version in SUPPORTED_SGLANG or os.environ.get(OVERRIDE) == "1"):
        return
    raise UnsupportedError(
        f"sglang {version or '(not installed)'}",
        f"sglang-amd-quant is tested with sglang {SUPPORTED_SGLANG} only",
        f"install one of these, or set {OVERRIDE}=1 to try this one",
    )
