"""Every dropout of a model, whatever form it has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every dropout above 0: (module, attribute), whether a layer or a number.

    The noise that a mixture of experts puts on what its routers see counts as one.
    """
    noises = ("jitter_noise", "input_jitter_noise")
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = (
                name == "p"
                if isinstance(module, nn.modules.dropout._DropoutNd)
                else ("drop" in name or name in noises)
            )
            if is_rate and isinstance(value, float) and value > 0.0:
                yield module, name


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, LoRA's included; the model's config keeps what it says."""
    for module, name in list(dropouts(model)):
        setattr(module, name, 0.0)
