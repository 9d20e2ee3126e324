"""Options of WPO, which weights pairs by how likely the policy is to write their answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpofast.errors import ConfigError
from dpofast.options.beta_fields import BetaFields
from dpofast_kernels import PairLoss, PairWeighting, PreferenceLoss


# kw_only keeps the positional order of TrainingArguments and of DPOConfig's own options.
@dataclass(kw_only=True)
class WeightingFields(BetaFields):
    """The fields; docs/losses.md has the formula.

    Attributes:
        use_weighting: multiply the loss of each pair with WPO's weight, the larger the likelier the
            policy is to write both answers.
        weighting_clamp: largest weight of a pair, above 0; None for no limit. WPO's authors use 1.
    """

    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs by the policy's probabilities, as WPO does."}
    )
    weighting_clamp: float | None = field(
        default=None, metadata={"help": "Largest weight that use_weighting gives to a pair."}
    )

    def weighting(self) -> PairWeighting | None:
        """WPO's weights; None without them.

        Raises:
            ConfigError: a value can't be used.
        """
        clamp = self.weighting_clamp
        if not isinstance(self.use_weighting, bool):
            raise ConfigError(f"use_weighting: got {self.use_weighting!r}, expected true or false.")
        try:
            weighting = PairWeighting(clamp)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"weighting_clamp: got {clamp!r}, expected a finite number above 0."
            ) from error
        return weighting if self.use_weighting else None


def refuse_weighting_of_coupled(loss: PreferenceLoss, weighting: PairWeighting | None) -> None:
    """Check that the pairs have losses of their own, if they are weighted.

    Raises:
        ConfigError: the loss couples pairs.
    """
    if weighting is not None and not isinstance(loss, PairLoss):
        raise ConfigError(
            f"use_weighting: the {' + '.join(loss.names)} loss couples pairs, so no pair has a "
            "loss of its own that could be weighted; leave it out, or choose another loss."
        )


def unused_weighting_options(config: Any) -> list[str]:
    """A remark if there is a clamp, but nothing to clamp."""
    if config.use_weighting or config.weighting_clamp is None:
        return []
    return [f"weighting_clamp={config.weighting_clamp!r} (only use_weighting has it)"]


def weighting_facts(config: Any) -> dict[str, Any]:
    """The options as far as they have an effect; None for those without."""
    return {
        "use_weighting": True if config.use_weighting else None,
        "weighting_clamp": config.weighting_clamp if config.use_weighting else None,
    }
