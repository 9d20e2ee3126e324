"""Direct Preference Optimization with fused kernels and stored reference log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpofast.no_download import keep_from_downloading

if TYPE_CHECKING:
    from dpofast.options.config import DPOConfig
    from dpofast.train.trainer import DPOTrainer

__version__ = "0.1.0"
__all__ = ["DPOConfig", "DPOTrainer", "__version__"]

keep_from_downloading()


def __getattr__(name: str) -> Any:
    """Import the trainer when it is first used, so that the command line's help needs no torch."""
    if name == "DPOConfig":
        from dpofast.options.config import DPOConfig

        return DPOConfig
    if name == "DPOTrainer":
        from dpofast.train.trainer import DPOTrainer

        return DPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
