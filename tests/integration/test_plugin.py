"""Registration with SGLang, and the three places where it has a closed list instead of a seam."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_amd_quant.errors import CheckpointError, UnsupportedError
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
    override = offered["amd_mx"].override_quantization_method
    assert override({"quant_method": "modelopt_fp4"}, None) is None
    with pytest.raises(UnsupportedError, match="failed to register"):
        override({"quant_method": "modelopt_fp4"}, "amd_mx")


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


class TestAskedByName:
    """What a user asks for by name is what serves, though SGLang's own ModelOpt classes claim their checkpoints."""

    @pytest.fixture
    def verify(self, sglang_context):
        from sglang.srt.configs.model_config import ModelConfig

        def run(asked, quantization_config):
            parsed = ModelConfig._parse_modelopt_quant_config(None, {"quantization": quantization_config}) or {}
            config = SimpleNamespace(
                quantization=asked,
                is_draft_model=False,
                _parse_quant_hf_config=lambda: quantization_config | parsed,
                _find_quant_modelslim_config=lambda: None,
            )
            ModelConfig._verify_quantization(config)
            return config.quantization

        return run

    @pytest.mark.parametrize("algo", ["FP8", "NVFP4", "W4A8_MXFP4_FP8"])
    @pytest.mark.parametrize("asked", ["amd_mx", "amd_mxfp4"])
    def test_modelopt_formats_that_no_reader_knows(self, verify, asked, algo):
        with pytest.raises(CheckpointError, match=rf"quant_algo of '\*': {algo}, not one of MXFP8; quantize the bf16"):
            verify(asked, {"quant_method": "modelopt", "quant_algo": algo})

    @pytest.mark.parametrize(("algo", "name"), [("NVFP4", "modelopt_fp4"), ("FP8", "modelopt_fp8")])
    def test_others_still_detect_their_own(self, verify, algo, name):
        assert verify(None, {"quant_method": "modelopt", "quant_algo": algo}) == name

    def test_mixed_with_bf16(self, verify):
        """SGLang calls it w4afp8, whatever its layers are."""
        layers = {"a.q_proj": {"quant_algo": "MXFP8"}}
        config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        assert verify("amd_mx", config) == "amd_mx"

    def test_mixed_with_what_no_reader_knows(self, verify):
        layers = {"a.q_proj": {"quant_algo": "NVFP4"}}
        config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        with pytest.raises(CheckpointError, match=r"quant_algo of 'a\.q_proj': NVFP4"):
            verify("amd_mx", config)


def test_mixtral_keeps_its_fused_moe(sglang_context):
    from sglang.srt.model_loader import utils

    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["MixtralForCausalLM"]), quantization="amd_mx", model_impl="auto"
    )
    assert utils.get_model_architecture(config)[0].__name__ == "MixtralForCausalLM"
    assert config.quantization == "amd_mx"
    config.quantization = "w8a8_int8"
    assert utils.get_model_architecture(config)[0].__name__ == "QuantMixtralForCausalLM"
