"""Options of KTOTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpofast.options.config import DPOConfig


@dataclass
class KTOConfig(DPOConfig):
    """Options of KTOTrainer: those of DPOConfig, with the loss kto.

    Attributes:
        loss_type: kto or apo_zero_unpaired.

    Raises:
        ConfigError: as DPOConfig.
    """

    loss_type: list[str] | str = field(
        default="kto", metadata={"help": "The loss: kto or apo_zero_unpaired."}
    )
