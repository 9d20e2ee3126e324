"""What decides the log-probs of a weight that bitsandbytes has quantised to 4 or 8 bits.

bitsandbytes keeps the scales of a weight outside the model's parameters, in attributes that it
creates and moves when a layer first runs. Here they are read wherever they are at the moment, so
that a model has the same parts before and after its first forward pass. All classes are recognised
by their attributes, so that bitsandbytes needn't be installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.errors import ModelError

CLASSES = ("Params4bit", "Int8Params")
# Devices on which an 8-bit layer multiplies by its weight in floating point while it is in training
# mode, which is how dpofast runs it. Elsewhere it rounds its input to int8 as well.
FLOATING_PRODUCTS = ("cpu", "xpu")
NOT_YET = (
    "this layer isn't quantised yet; load the model with from_pretrained and a "
    "quantization_config, or move it to its device first."
)
REPACKED = (
    "bitsandbytes has repacked this 4-bit weight for inference on a CPU, as the model ran in eval "
    "mode. That has rounded its scales to bfloat16, and no gradient passes it any more. Load the "
    "model again, and give it to DPOTrainer first: from then on its weights stay as they are."
)


@dataclass(frozen=True)
class QuantisedWeight:
    """A weight as bitsandbytes keeps it.

    Attributes:
        kind: how the weight is quantised and multiplied, in words.
        origin: dtype and shape of the weight before; empty where `parts` tells.
        parts: its tensors by name: the weight itself, named "", and everything that scales it.
    """

    kind: str
    origin: str
    parts: dict[str, Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as descriptions do: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def is_quantised(tensor: Any) -> bool:
    """Whether a parameter belongs to a layer that bitsandbytes quantises."""
    return type(tensor).__name__ in CLASSES


def quantised_weight(module: nn.Module, weight: Any, name: str) -> QuantisedWeight:
    """Read a quantised weight and its scales.

    Args:
        module: layer that the weight belongs to.
        weight: a parameter for which `is_quantised` holds.
        name: the weight's name, for errors.

    Raises:
        ModelError: the weight isn't quantised yet, or its scales were rounded by inference.
    """
    if type(weight).__name__ == "Int8Params":
        return _int8(module, weight, name)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(module, "quant_state", None)  # where the parameter has lost it
    if state is None:
        raise ModelError(f"{name}: {NOT_YET}")
    scales = four_bit_state(state, name)
    compute_dtype = getattr(module, "compute_dtype", None)
    computed = "its input's dtype" if compute_dtype is None else dtype_name(compute_dtype)
    return QuantisedWeight(
        f"{scales.kind}, computed in {computed}",
        scales.origin,
        {"": weight.data.reshape(-1).view(torch.uint8), **scales.parts},
    )


def four_bit_state(state: Any, name: str) -> QuantisedWeight:
    """Read bitsandbytes' QuantState: all about a weight but the weight itself.

    Raises:
        ModelError: the scales were rounded by inference.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(f"{name}: {REPACKED}")
    parts = {"absmax": state.absmax, "code": state.code}
    kind = f"4-bit {state.quant_type} in blocks of {state.blocksize}"
    if state.nested:
        nested = state.state2
        parts |= {"offset": state.offset, "absmax2": nested.absmax, "code2": nested.code}
        kind += f" with quantised scales in blocks of {nested.blocksize}"
    return QuantisedWeight(kind, f"{dtype_name(state.dtype)} {list(state.shape or ())}", parts)


def rounded_bias(module: nn.Module, bias: Tensor, autocast_dtype: torch.dtype | None) -> Tensor:
    """A quantised layer's bias as the layer adds it, in float32.

    The layer casts its bias in place when it first runs: a 4-bit layer to its compute dtype, an
    8-bit layer to the dtype of its input. The result is the same before and after that.
    """
    dtype = getattr(module, "compute_dtype", None) or autocast_dtype or bias.dtype
    return bias.detach().to(dtype).float()


def _int8(module: nn.Module, weight: Any, name: str) -> QuantisedWeight:
    state = getattr(module, "state", None)
    products = "floating-point" if weight.device.type in FLOATING_PRODUCTS else "int8"
    kind = f"{products} products and outliers above {getattr(state, 'threshold', None)}"
    if getattr(weight, "has_fp16_weights", False):
        return QuantisedWeight(f"8-bit in each pass with {kind}", "", {"": weight.data})
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(state, "SCB", None)  # where it is from the first forward pass on
    if scale is None or weight.dtype != torch.int8:
        raise ModelError(f"{name}: {NOT_YET}")
    return QuantisedWeight(f"8-bit with {kind}", "", {"": weight.data, "SCB": scale})
