"""CPOTrainer and ORPOTrainer: TRL's names for training without a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from dpofast.options.config import DPOConfig
from dpofast.options.reference_free import CPOConfig, ORPOConfig
from dpofast.options.trl import refuse
from dpofast.train.trainer import DPOTrainer


class CPOTrainer(DPOTrainer):
    """Contrastive preference optimization (arXiv:2401.08417), SimPO (arXiv:2405.14734) and others.

    A DPOTrainer whose loss has no reference. The signature is that of TRL's CPOTrainer; further
    keyword arguments are those of DPOTrainer.

    Args:
        args: a CPOConfig.
        model, train_dataset, eval_dataset, processing_class, callbacks, optimizers, peft_config,
            compute_metrics: as for DPOTrainer.
        data_collator, model_init, preprocess_logits_for_metrics: must be None.
        options: further arguments of DPOTrainer.

    Raises:
        ConfigError, DataError, ModelError: all ValueErrors, with the remedy.
    """

    config_class: ClassVar[type[DPOConfig]] = CPOConfig

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: Any = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        **options: Any,
    ) -> None:
        refuse("model_init", model_init, "pass the model")
        refuse(
            "preprocess_logits_for_metrics",
            preprocess_logits_for_metrics,
            "no logits exist; compute_metrics gets log-probs and rewards",
        )
        super().__init__(
            model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            **options,
        )


class ORPOTrainer(CPOTrainer):
    """Odds ratio preference optimization (arXiv:2403.07691).

    The signature is that of TRL's ORPOTrainer, and of CPOTrainer; `args` is an ORPOConfig.
    """

    config_class: ClassVar[type[DPOConfig]] = ORPOConfig
