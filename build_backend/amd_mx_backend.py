"""setuptools' build backend, with the compiler of the HIP kernels as one more requirement of wheels.

Only of wheels: an editable install compiles nothing (`amd-mx build` does), so it need not fetch 100 MB of compiler.
"""

import tomllib
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def get_requires_for_build_wheel(config_settings=None):
    """setuptools' own, and the extra `build`, where the compiler's version is pinned."""
    extra = tomllib.loads(_PROJECT.read_text())["project"]["optional-dependencies"]["build"]
    return [*build_meta.get_requires_for_build_wheel(config_settings), *extra]
