"""Importing this makes an uninstalled checkout usable: `kernels/` and `configs/` become subpackages of
sglang_amd_quant.

An installed package has them by setuptools' package-dir. For bare machines: `python -m bench.gemv`, or
`python -m pytest -p bench.source_tree tests/kernels`.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sglang_amd_quant  # noqa: E402

if importlib.util.find_spec("sglang_amd_quant.kernels") is None:
    sglang_amd_quant.__path__.append(str(ROOT))
