"""Direct Preference Optimization with fused kernels and stored reference log-probs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpofast.no_download import keep_from_downloading

if TYPE_CHECKING:
    from dpofast.options.config import DPOConfig
    from dpofast.options.kto import KTOConfig
    from dpofast.options.reference_free import CPOConfig, ORPOConfig
    from dpofast.train.hooks.predictions import PairPredictions
    from dpofast.train.kto import KTOTrainer
    from dpofast.train.own.metrics import PairOutputs
    from dpofast.train.reference_free import CPOTrainer, ORPOTrainer
    from dpofast.train.trainer import DPOTrainer
    from dpofast_kernels import CoupledFunction

__version__ = "0.1.0"
__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "CoupledFunction",
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PairOutputs",
    "PairPredictions",
    "__version__",
]

HOMES = {
    "CPOConfig": "dpofast.options.reference_free",
    "CPOTrainer": "dpofast.train.reference_free",
    "CoupledFunction": "dpofast_kernels.preference.coupled",
    "DPOConfig": "dpofast.options.config",
    "DPOTrainer": "dpofast.train.trainer",
    "KTOConfig": "dpofast.options.kto",
    "KTOTrainer": "dpofast.train.kto",
    "ORPOConfig": "dpofast.options.reference_free",
    "ORPOTrainer": "dpofast.train.reference_free",
    "PairOutputs": "dpofast.train.own.metrics",
    "PairPredictions": "dpofast.train.hooks.predictions",
}

keep_from_downloading()


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used: the command line's help needs no torch."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
