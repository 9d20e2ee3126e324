"""Models that bitsandbytes has quantised: which can be trained, and how they stay differentiable.

What bitsandbytes' layers compute depends on their mode:

- On a CPU, an 8-bit layer rounds its input to int8 in eval mode only. A reference scored in eval
  mode would be another function than the policy in training. `evaluating` therefore leaves
  quantised layers in training mode, which is exact, as they have no dropout.
- On a CPU with AVX512-BF16, a 4-bit layer in eval mode repacks its weight for good. That rounds its
  scales, and no gradient passes it any more. `keep_differentiable` switches this off, also for the
  user's own calls of the model between steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from dpofast.errors import ConfigError, ModelError
from dpofast.model.parts import causal_lm, is_peft_model
from dpofast.reference.identity.quantised import FLOATING_PRODUCTS, is_quantised, quantised_weight

BITSANDBYTES = "bitsandbytes"
# Folders of peft's kinds of adapters that have been compared on quantised and dequantised layers.
# Others fail, or take the stored integers for the weight.
ADAPTERS = (
    *("lora", "adalora", "boft", "fourierft", "ia3", "miss", "oft", "randlora", "road", "shira"),
    *("vera", "waveft"),
)


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that have a weight quantised by bitsandbytes, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(map(is_quantised, module._parameters.values()))
    }


def keep_differentiable(model: nn.Module) -> None:
    """Checks a model's quantised layers, and keeps bitsandbytes from repacking them.

    Models without such layers are left as they are.

    Raises:
        ModelError: the model is quantised by another tool, or a layer isn't quantised yet, or it
            has been repacked.
    """
    method = _other_method(causal_lm(model))
    if method is not None:
        raise ModelError(
            f"The model is quantised by {method}, but only bitsandbytes is supported: load an "
            "unquantised model with a quantization_config of BitsAndBytesConfig, or without one."
        )
    for name, layer in quantised_layers(model).items():
        for parameter in filter(is_quantised, layer._parameters.values()):
            quantised_weight(layer, parameter, name)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_trainable(model: nn.Module, zero_stage: int | None) -> None:
    """Refuses runs that can't train a quantised model.

    Args:
        model: the policy, with its adapter if it has one.
        zero_stage: stage of DeepSpeed's ZeRO; None without DeepSpeed.

    Raises:
        ModelError: the model has no adapter, as its own weights can't be trained.
        ConfigError: the weights would be sharded, or peft can't train this kind of adapter.
    """
    layers = quantised_layers(model)
    if not layers:
        return
    # transformers' own add_adapter puts the adapter inside, without a PeftModel around it.
    if not is_peft_model(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "The model is quantised, and an optimizer can't update quantised weights: train an "
            "adapter (peft_config=LoraConfig(...) in Python, use_peft: true on the command line), "
            "or load the model without quantisation."
        )
    if zero_stage == 3:
        raise ConfigError(
            "deepspeed: ZeRO-3 would shard the quantised weights without their scales; use zero2."
        )
    quantised = set(layers.values())
    for module in model.modules():
        if module._modules.get("base_layer") in quantised:
            _check_adapter(module)


def _check_adapter(layer: Any) -> None:
    """Raise ConfigError if peft can't compute this adapter's layer around a quantised one."""
    home = type(layer).__module__.split(".")  # such as peft.tuners.lora.bnb
    if home[:2] == ["peft", "tuners"] and home[2] not in ADAPTERS:
        raise ConfigError(
            f"peft_config: adapters of peft.tuners.{home[2]} aren't supported on quantised layers, "
            "whose weights not every kind of adapter can read; use LoRA, or load the model without "
            "quantisation."
        )
    if _is_int8(layer.base_layer, ["cpu"]) and len(getattr(layer, "lora_magnitude_vector", ())):
        raise ConfigError(
            "peft_config: DoRA on 8-bit layers fails on a CPU, as peft loses their scales when "
            "it dequantises them; use load_in_4bit, or LoRA without DoRA."
        )


def computing_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that a model computes in without autocast, by which tolerances go.

    That is the head's, or the compute dtype of quantised layers. 8-bit layers on a GPU count as
    bfloat16, since they round their inputs to int8.
    """
    lm = causal_lm(model)
    dtypes: list[torch.dtype] = [lm.get_output_embeddings().weight.dtype]
    for layer in quantised_layers(lm).values():
        dtypes.append(getattr(layer, "compute_dtype", None) or dtypes[0])
        if _is_int8(layer) and not _is_int8(layer, FLOATING_PRODUCTS):
            dtypes.append(torch.bfloat16)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _is_int8(layer: nn.Module, devices: Collection[str] = ()) -> bool:
    """Whether a layer has an 8-bit weight; on one of these kinds of device, if any is given."""
    weight: Any = next(filter(is_quantised, layer._parameters.values()))
    is_there = not devices or weight.device.type in devices
    return type(weight).__name__ == "Int8Params" and is_there


def _other_method(lm: Any) -> str | None:
    """The name of the tool that has quantised a model; None for bitsandbytes, or for no tool."""
    if not getattr(lm, "is_quantized", False):
        return None
    config = getattr(lm.config, "quantization_config", None)
    own = config.get("quant_method") if isinstance(config, dict) else None
    method = own or getattr(config, "quant_method", None)
    name = str(getattr(method, "value", method))
    return None if BITSANDBYTES in name else name
