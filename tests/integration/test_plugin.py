"""Registration with SGLang, and the three places where it has a closed list instead of a seam."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_amd_quant.errors import UnsupportedError
from sglang_amd_quant.integration import plugin, versions


def test_every_method_is_registered_once(sglang_context):
    from sglang.srt.layers import quantization
    from sglang.srt.server_args import QUANTIZATION_CHOICES

    plugin.register()
    for name in plugin.METHODS:
        assert QUANTIZATION_CHOICES.count(name) == 1
        assert quantization.QUANTIZATION_METHODS[name].NAME == name
        assert quantization.get_quantization_config(name).NAME == name


def test_every_hook_is_in_place(sglang_context, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugin.check_hooks()
    monkeypatch.setattr(HookRegistry, "_patched", set())
    with pytest.raises(UnsupportedError, match="_verify_quantization.*not applied"):
        plugin.check_hooks()


@pytest.mark.parametrize(
    ("version", "good"), [("0.5.23", True), ("0.5.23.post1", True), ("0.5.17", False), (None, False)]
)
def test_sglang_versions(monkeypatch, version, good):
    monkeypatch.setattr(versions, "sglang_version", lambda: versions.Version(version) if version else None)
    monkeypatch.delenv(versions.OVERRIDE, raising=False)
    if good:
        return versions.check_sglang()
    with pytest.raises(UnsupportedError, match=rf"sglang .*{versions.OVERRIDE}=1"):
        versions.check_sglang()
    monkeypatch.setenv(versions.OVERRIDE, "1")
    if version:
        versions.check_sglang()
    return None


def test_failed_registration_refuses_to_serve_with_its_reason(sglang_context, monkeypatch):
    """SGLang swallows what register() raises, so the method itself must carry the reason."""
    offered = {}
    monkeypatch.setattr(plugin, "_offer", offered.update)
    monkeypatch.setattr(plugin, "_hook", lambda: 1 / 0)
    plugin.register()
    assert set(offered) == set(plugin.METHODS)
    for use in (offered["amd_mx"], lambda: offered["amd_mx"].from_config({})):
        with pytest.raises(UnsupportedError, match=r"failed to register \(ZeroDivisionError.*amd-mx doctor"):
            use()


class TestRocmAllowList:
    """`rocm_supported_quantization` is a local of ModelConfig._verify_quantization; is_hip() is mocked."""

    @pytest.fixture
    def verify(self, sglang_context, monkeypatch):
        from sglang.srt.configs import model_config

        monkeypatch.setattr(model_config, "is_hip", lambda: True)

        def run(name, quantization_config=None):
            config = SimpleNamespace(
                quantization=name,
                is_draft_model=False,
                _parse_quant_hf_config=lambda: quantization_config,
                _find_quant_modelslim_config=lambda: None,
            )
            model_config.ModelConfig._verify_quantization(config)
            return config.quantization

        return run

    @pytest.mark.parametrize("name", plugin.METHODS)
    def test_ours_pass(self, verify, name):
        assert verify(name) == name

    def test_detected_from_the_checkpoint(self, verify):
        assert verify(None, {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp4"}}) == "amd_mx"

    def test_others_are_still_refused(self, verify):
        with pytest.raises(ValueError, match="not supported in ROCm"):
            verify("w4afp8")

    def test_mismatch_is_still_refused(self, verify):
        with pytest.raises(ValueError, match="does not match"):
            verify("fp8", {"quant_method": "amd_mx", "version": 1, "recipe": {"default": "mxfp4"}})


def test_mixtral_keeps_its_fused_moe(sglang_context):
    from sglang.srt.model_loader import utils

    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["MixtralForCausalLM"]), quantization="amd_mx", model_impl="auto"
    )
    assert utils.get_model_architecture(config)[0].__name__ == "MixtralForCausalLM"
    assert config.quantization == "amd_mx"
    config.quantization = "w8a8_int8"
    assert utils.get_model_architecture(config)[0].__name__ == "QuantMixtralForCausalLM"
