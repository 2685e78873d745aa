"""Entry point of the group `sglang.srt.plugins`: SGLang calls `register()` in every process that loads plugins.

SGLang logs and forgets an exception raised here, so a failure is kept and raised again by every `amd_mx*` method that
somebody asks for: a server never starts on a half-registered one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from sglang_amd_quant.errors import AmdMxError, UnsupportedError

logger = logging.getLogger(__name__)

METHODS = ("amd_mx", "amd_mxfp4", "amd_mxfp8", "amd_w4a8", "amd_w4a16", "amd_int4_w4a16")
"""Values of `--quantization`: `amd_mx` chooses by checkpoint, recipe or arch; the others force one scheme."""


def register() -> None:
    """Register the methods of `METHODS` with SGLang, and the hooks they need where SGLang has no seam."""
    from sglang_amd_quant.integration.versions import check_sglang

    try:
        check_sglang()
        from sglang_amd_quant.integration.config import CONFIGS

        _hook()
        configs: dict[str, type] = dict(CONFIGS)
    except Exception as error:
        logger.exception("sglang-amd-quant cannot serve here")
        configs = _refusing(error)
    _offer(configs)


def _offer(configs: dict[str, type]) -> None:
    from sglang.srt.layers import quantization
    from sglang.srt.server_args import QUANTIZATION_CHOICES, add_quantization_method_choices

    add_quantization_method_choices([name for name in configs if name not in QUANTIZATION_CHOICES])
    # ModelConfig and others imported these very dicts, so they are changed in place; SGLang has no register function.
    for registry in ("BASE_QUANTIZATION_METHODS", "QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS"):
        _put_first(getattr(quantization, registry), configs)


def _put_first(registry: dict[str, type], configs: dict[str, type]) -> None:
    """SGLang asks methods in this order whether they take a checkpoint; its own ModelOpt classes do so even where a
    user asked for another method by name."""
    others = {name: method for name, method in registry.items() if name not in configs}
    registry.clear()
    registry.update(configs | others)


def _refusing(error: Exception) -> dict[str, type]:
    """Stand-ins that raise the reason why registration failed as soon as anybody uses them."""
    known = isinstance(error, AmdMxError)
    reason = (
        error
        if known
        else UnsupportedError(
            "sglang-amd-quant",
            f"its plugin failed to register ({type(error).__name__}: {error})",
            "run `amd-mx doctor`",
        )
    )

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise reason

    def override(cls: type, checkpoint: Any, asked: str | None) -> None:
        if asked in METHODS:
            refuse()

    members = {
        "__init__": refuse,
        "from_config": classmethod(refuse),
        "get_config_filenames": staticmethod(list),
        "override_quantization_method": classmethod(override),
    }
    return {name: type(f"Refused_{name}", (), members) for name in METHODS}


# ---- hooks: the places where SGLang 0.5.23 has a closed list instead of a seam ----


def _verify_quantization(original: Callable[[Any], None], model_config: Any) -> None:
    """Let our names pass ROCm's allow-list, a local of `ModelConfig._verify_quantization` and its last check."""
    try:
        original(model_config)
    except ValueError as error:
        if model_config.quantization not in METHODS or "not supported in ROCm" not in str(error).replace("\n", " "):
            raise


def _get_model_architecture(original: Callable[[Any], Any], model_config: Any) -> Any:
    """Keep Mixtral on its FusedMoE model: SGLang sends quantizations it does not list to one without."""
    mixtral = "MixtralForCausalLM" in (getattr(model_config.hf_config, "architectures", None) or [])
    if not mixtral or model_config.quantization not in METHODS:
        return original(model_config)
    name, model_config.quantization = model_config.quantization, None
    try:
        return original(model_config)
    finally:
        model_config.quantization = name


def _load_weights_only(
    original: Callable[..., None], model: Any, weights: Iterable[tuple[str, Any]], target_device: Any
) -> None:
    """Bring the checkpoint's tensors into canonical form on their way to the model."""
    from sglang_amd_quant.integration.config import config_of

    config = config_of(model)
    original(model, weights if config is None else config.prepare_weights(model, weights), target_device)


def _initialize_model(
    original: Callable[..., Any], model_config: Any, load_config: Any, quant_config: Any = None
) -> Any:
    """Look over a model as soon as it is built (`built.py`)."""
    from sglang_amd_quant.integration.built import look_over

    model = original(model_config, load_config, quant_config)
    look_over(model, quant_config)
    return model


def _load_weights_and_postprocess(*args: Any, **kwargs: Any) -> None:
    from sglang_amd_quant.integration.update import load

    load(*args, **kwargs)


def _update_weights_from_disk(*args: Any, **kwargs: Any) -> Any:
    """Let a failed update go back to the weights that were served (`update.py`)."""
    from sglang_amd_quant.integration.update import update

    return update(*args, **kwargs)


def _select_mode(*args: Any) -> Any:
    """Let a dense MLP's gate_up_proj be run with its activation (`gated.py`)."""
    from sglang_amd_quant.integration.gated import select_mode

    return select_mode(*args)


def _run_dual_gemm(*args: Any) -> Any:
    from sglang_amd_quant.integration.gated import run

    return run(*args)


_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.configs.model_config.ModelConfig._verify_quantization": _verify_quantization,
    "sglang.srt.model_loader.utils.get_model_architecture": _get_model_architecture,
    "sglang.srt.model_loader.loader._initialize_model": _initialize_model,
    "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only": _load_weights_only,
    "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_and_postprocess": _load_weights_and_postprocess,
    f"{_UPDATER}.update_weights_from_disk": _update_weights_from_disk,
    "sglang.srt.layers.dual_gemm.DualGemm._select_mode": _select_mode,
    "sglang.srt.layers.dual_gemm.DualGemm.__call__": _run_dual_gemm,
}
"""Target -> AROUND hook."""


def _hook() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in HOOKS.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def check_hooks() -> None:
    """SGLang only logs a hook that it could not apply.

    Raises:
        UnsupportedError: one of `HOOKS` is not in place.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in HOOKS if target not in HookRegistry._patched]
    if missing:
        raise UnsupportedError(
            f"hook {', '.join(missing)}",
            "not applied by SGLang's plugin loader",
            "see the server's log; run `amd-mx doctor`",
        )
