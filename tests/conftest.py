"""Which tests share something expensive, so that one test process runs them all (`--dist loadgroup`); and an end to
what test processes start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUPS = {
    "integration": "SGLang",
    "shapes/test_sglang.py": "SGLang's models",
    "checkpoints/test_quark.py": "amd-quark",
    "formats/test_quark.py": "amd-quark",
    "packaging": "wheel",
}
"""Folder or file -> what is imported or built once for its tests, in tens of seconds."""


def pytest_configure(config: pytest.Config) -> None:
    """How long hypothesis takes for an example says how busy the machine is, and nothing about the product."""
    if config.pluginmanager.hasplugin("hypothesispytest"):  # tests of a device do without it
        from hypothesis import HealthCheck, settings

        settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    # the longest first, so that none is left alone at the end
    items.sort(key=lambda item: here / "serving" not in item.path.parents)
    for item in items:
        place = item.path.relative_to(here)
        for path in (place, *place.parents):
            if group := GROUPS.get(path.as_posix()):
                item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported until now stays: the garbage collector need not look at it again and again.

    Groups are pytest-xdist's to mark in node ids; where it cannot, tests would only become slow, and nobody knew."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    if session.config.getoption("loadgroup", False):
        lost = [i.nodeid for i in session.items if i.get_closest_marker("xdist_group") and "@" not in i.nodeid]
        assert not lost, f"pytest-xdist lost the group of {lost[0]}: see pytest's version in pyproject.toml"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch works with one thread: for tests of many short steps, in which threads mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_sessionfinish() -> None:
    """End the compilers' processes: xdist's own end without what they registered with `atexit`."""
    if aot := sys.modules.get("sglang_amd_quant.toolchain.triton_aot"):
        aot._end_workers()
