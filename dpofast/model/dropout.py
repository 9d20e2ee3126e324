"""Every dropout of a model, whether it is a layer or a number."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Attributes that set random factors on the input of a mixture of experts' routers. Such noise
# makes a training step random, as dropout does.
ROUTER_NOISES = ("jitter_noise", "input_jitter_noise")


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Finds every dropout above 0, and every noise above 0 on the routers of a mixture of experts.

    Yields:
        (module, name of the attribute that holds the rate).
    """
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = (
                name == "p"
                if isinstance(module, nn.modules.dropout._DropoutNd)
                else ("drop" in name or name in ROUTER_NOISES)
            )
            if is_rate and isinstance(value, float) and value > 0.0:
                yield module, name


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, LoRA's included; the model's config keeps its values."""
    for module, name in list(dropouts(model)):
        setattr(module, name, 0.0)
