"""Options of the trainers without a reference: CPOConfig and ORPOConfig."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpofast.errors import ConfigError
from dpofast.options.config import DPOConfig
from dpofast_kernels import unknown_loss

# TRL's names of the losses of its CPOTrainer, and ours, in which a reference is told from none.
CPO_LOSSES = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}
CPO_NAMES = (*CPO_LOSSES.values(), "simpo", "alphapo")


@dataclass
class CPOConfig(DPOConfig):
    """Options of CPOTrainer: those of DPOConfig, with the defaults of TRL's CPOConfig.

    Attributes:
        loss_type: TRL's names sigmoid, hinge, ipo and simpo; or cpo, cpo_hinge, cpo_ipo and
            alphapo, as DPOConfig calls the losses without a reference. simpo with an alpha other
            than 0 is alphapo.
        cpo_alpha: weight of the likelihood of chosen answers; 0 for the losses of SimPO's and
            AlphaPO's papers.

    Raises:
        ConfigError: as DPOConfig; or the loss is none of CPOTrainer's.
    """

    loss_type: list[str] | str = field(
        default="sigmoid",
        metadata={"help": f"The loss: {', '.join((*CPO_LOSSES, 'simpo', 'alphapo'))}."},
    )
    cpo_alpha: float | None = field(
        default=1.0, kw_only=True, metadata={"help": "Weight of the likelihood of chosen answers."}
    )

    def _settle(self) -> list[str]:
        given = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
            raise ConfigError(f"loss_type: got {given!r}, expected a name or a list of names.")
        names = [CPO_LOSSES.get(name, name) for name in given]
        unknown = [name for name in names if name not in CPO_NAMES]
        if unknown:
            known = (*CPO_LOSSES, *CPO_NAMES)
            raise ConfigError(
                f"loss_type: {unknown_loss(unknown[0], known)} These are CPOTrainer's; DPOTrainer "
                "has others."
            )
        if self.alpha:
            if set(names) - {"simpo", "alphapo"}:
                raise ConfigError(
                    f"alpha: AlphaPO bends the rewards of simpo, not those of {given[0]}; set "
                    "loss_type: simpo, or leave alpha out."
                )
            names = ["alphapo"] * len(names)
        self.loss_type = names
        return super()._settle()


@dataclass
class ORPOConfig(DPOConfig):
    """Options of ORPOTrainer: those of DPOConfig, with the loss orpo.

    Attributes:
        loss_type: orpo.
        beta: weight of the odds ratio part, which the paper calls lambda.

    Raises:
        ConfigError: as DPOConfig; or the loss is another one.
    """

    loss_type: list[str] | str = field(default="orpo", metadata={"help": "The loss: orpo."})

    def _settle(self) -> list[str]:
        if self.loss_type not in ("orpo", ["orpo"], ("orpo",)):
            raise ConfigError(
                f"loss_type: ORPOTrainer trains the loss orpo only, but got {self.loss_type!r}; "
                "leave it out, or use DPOTrainer."
            )
        return super()._settle()
