"""A stand-in for Gemma 3n's vision tower, which can't be made without the package timm."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModel
from transformers.models.gemma3n import modeling_gemma3n


class _Towers:
    """AutoModel, but for vision towers, which text doesn't reach: any weights do."""

    @staticmethod
    def from_config(config: Any, **options: Any) -> nn.Module:
        if config.model_type == "gemma3n_vision":
            return nn.Linear(4, 4)
        model: nn.Module = AutoModel.from_config(config, **options)
        return model


def stand_in_for_its_tower() -> None:
    """Let the process make, save and load Gemma 3n without timm from here on."""
    modeling_gemma3n.AutoModel = _Towers
