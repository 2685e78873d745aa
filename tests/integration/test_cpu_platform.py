"""When the CPU platform steps in, and when it stays out."""

from __future__ import annotations

import importlib.metadata
import os
from types import SimpleNamespace

import pytest
import torch

from sglang_amd_quant.integration import cpu_platform


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    return monkeypatch


def others(monkeypatch, *activators):
    points = [SimpleNamespace(name=f"other{i}", load=lambda a=a: a) for i, a in enumerate(activators)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)


def test_steps_in_on_a_bare_cpu(clean):
    assert cpu_platform.activate() == cpu_platform.PLATFORM


def test_stays_out_beside_an_accelerator(clean):
    clean.setattr(torch.accelerator, "is_available", lambda: True)
    assert cpu_platform.activate() is None


def test_stays_out_beside_sglangs_own_cpu_engine(clean):
    clean.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu_platform.activate() is None


def test_stays_out_where_another_platform_activates(clean):
    others(clean, lambda: None, lambda: "vendor.Platform")
    assert cpu_platform.activate() is None


def test_steps_in_beside_platforms_that_do_not_activate(clean, caplog):
    others(clean, lambda: None, lambda: 1 / 0)
    assert cpu_platform.activate() == cpu_platform.PLATFORM
    assert "other1 cannot activate" in caplog.text


def test_can_be_forced(clean):
    clean.setattr(torch.accelerator, "is_available", lambda: True)
    clean.setenv("SGLANG_PLATFORM", "amd_mx_cpu")
    assert cpu_platform.activate() == cpu_platform.PLATFORM


def test_entry_point_is_a_distribution_of_its_own():
    """SGLang drops the plugins of every distribution whose platform is not the chosen one: amd_mx must survive that."""
    from sglang.srt.plugins import _get_excluded_dists

    (point,) = importlib.metadata.entry_points(group=cpu_platform.GROUP, name=cpu_platform.ENTRY_POINT)
    (ours,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="amd_mx")
    assert point.dist.name != ours.dist.name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "some_vendor")
        assert ours.dist.name not in _get_excluded_dists()


def test_sglang_uses_it(sglang_context):
    from sglang.srt.platforms import current_platform

    assert current_platform.device_name == "amd_mx_cpu"
    assert current_platform.get_default_attention_backend() == "torch_native"


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"), [({0, 1}, 2, ["0", "1"]), ({0, 1, 2, 3}, 2, ["0,1", "2,3"]), ({5}, 2, ["5", "5"])]
)
def test_cores_are_dealt_to_ranks(monkeypatch, sglang_context, cores, ranks, shares):
    from sglang_amd_quant.integration import cpu_platform_class

    monkeypatch.setattr(cpu_platform_class.os, "sched_getaffinity", lambda pid: cores)
    assert cpu_platform_class._core_shares(ranks) == shares


@pytest.fixture
def defaults(monkeypatch, sglang_context):
    """What the platform makes of server arguments: `defaults(tp_size=2)`; changes to the environment are undone."""
    from sglang.srt.platforms import current_platform

    names = ("OMP_WAIT_POLICY", "SGLANG_CPU_OMP_THREADS_BIND")
    for name in names:  # a variable that was set is restored, and one that was not is removed
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def apply(**given):
        args = SimpleNamespace(
            **{"max_total_tokens": None, "mem_fraction_static": None, "tp_size": 1, "pp_size": 1} | given
        )
        current_platform.apply_server_args_defaults(args)
        return args

    return apply


def test_defaults(defaults, monkeypatch):
    args = defaults()
    assert args.max_total_tokens == 32768
    assert args.disable_hybrid_swa_memory
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ
    assert defaults(mem_fraction_static=0.5).max_total_tokens is None
    assert defaults(max_total_tokens=100).max_total_tokens == 100
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    defaults(tp_size=2)
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
