"""The option that chooses how the head and its loss are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.run_fields import RunFields

# Those of HeadOptions that never make all logits at once.
HEAD_BACKENDS = ("auto", "triton_fused", "triton", "torch")


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class HeadFields(RunFields):
    """The field; docs/kernels.md says what each back end is.

    Attributes:
        head_backend: how log-probs and the loss are computed, in training and for the reference:
            "triton_fused", "triton" or "torch". "auto" takes the one that should be the fastest on
            the device. The choice changes speed and memory, not what is trained.
    """

    head_backend: str = field(
        default="auto", metadata={"help": f"Kernels of the head: {', '.join(HEAD_BACKENDS)}."}
    )


def check_head_backend_name(config: Any) -> None:
    """Check the name; whether the back end runs on the device is checked with the model.

    Raises:
        ConfigError: there is no such back end.
    """
    if config.head_backend not in HEAD_BACKENDS:
        names = ", ".join(HEAD_BACKENDS)
        raise ConfigError(f"head_backend: got {config.head_backend!r}, expected one of {names}.")
