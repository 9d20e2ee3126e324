"""In place of the reference of a run whose loss has none: nothing is scored, stored or read."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from torch import nn

from dpofast.columns import REF_COLUMNS
from dpofast.data.packing.collate import Layout
from dpofast.model.router import RouterLoss
from dpofast.options.config import DPOConfig
from dpofast.reference.identity.description import ReferenceIdentity, no_reference
from dpofast.train.checkpoint.run_state import RunState
from dpofast.train.data.dataset import RunDataset
from dpofast.train.reference.run_reference import RunReference
from dpofast.train.reference.run_store import RunStore

logger = logging.getLogger(__name__)

NONE = no_reference()
REFERENCE_OPTIONS = (
    *("ref_model_init_kwargs", "precompute_ref_log_probs", "precompute_ref_batch_size"),
    *("reference_store", "reference_store_detail"),
)


class NoReference(RunReference):
    """Gives every dataset log-probs of 0 in place of those of a reference.

    The "log-ratios" of a loss without a reference are log-probs of the policy.

    Args:
        policy, accelerator, layout, config, router_loss: as for RunReference.
    """

    is_none: ClassVar[bool] = True

    def __init__(
        self,
        policy: nn.Module,
        accelerator: Accelerator,
        layout: Layout,
        config: DPOConfig,
        router_loss: RouterLoss | None = None,
    ) -> None:
        store = RunStore.of(config, accelerator.wait_for_everyone)  # is never opened
        super().__init__(policy, None, store, accelerator, layout, config, router_loss)
        self.is_gone = True  # the policy isn't the reference

    def settle(self) -> ReferenceIdentity:
        """Check the policy; the identity is that of no reference at all.

        Raises:
            ModelError, ConfigError, NonFiniteError: as in RunReference.
        """
        if self._identity is None:
            self._check_models()
            self._identity = NONE
        return NONE

    def score(
        self, dataset: RunDataset, row_tokens: int | None = None, rescore: bool = False
    ) -> None:
        """Give a dataset log-probs of 0; no model runs."""
        if dataset.ref_logps is None and dataset.brings_ref_logps and not dataset.is_window:
            logger.warning(
                "%s: %s aren't used, because the loss has no reference.",
                dataset.name,
                " and ".join(REF_COLUMNS),
            )
        if dataset.ref_logps is None:
            dataset.ref_logps = np.zeros((len(dataset), 2))
        dataset.scored_by = self.settle().digest

    def policy_starts_as_reference(self) -> bool:
        return False

    def policy_moves(self, is_needed: bool = False) -> None:
        """There is nothing to keep."""

    def run_state(self, kept: bool, row_tokens: int | None) -> RunState:
        return RunState(NONE.digest, NONE.description, None, row_tokens)

    def restore(self, recorded: RunState, checkpoint: str) -> None:
        """There is nothing to restore: whatever the checkpoint's reference was, it isn't needed."""
        self.settle()


def make_reference(
    policy: nn.Module,
    ref_model: nn.Module | None,
    accelerator: Accelerator,
    layout: Layout,
    config: DPOConfig,
    router_loss: RouterLoss | None,
    *,
    is_used: bool,
) -> RunReference:
    """The reference of a run; NoReference if the loss has none.

    Args:
        policy, ref_model, accelerator, layout, config, router_loss: as for RunReference.
        is_used: whether the loss has a reference.
    """
    if not is_used:
        return NoReference(policy, accelerator, layout, config, router_loss)
    store = RunStore.of(config, accelerator.wait_for_everyone)
    return RunReference(policy, ref_model, store, accelerator, layout, config, router_loss)


def without_reference(ref_model: Any, config: DPOConfig) -> None:
    """Log which of the given options a loss without a reference doesn't use.

    Args:
        ref_model: the reference that was given; None for none.
        config: options of the run.
    """
    defaults = {item.name: item.default for item in fields(DPOConfig)}
    unused = [name for name in REFERENCE_OPTIONS if getattr(config, name) != defaults[name]]
    if ref_model is not None:
        unused.insert(0, "ref_model")
    if unused and config.should_log:
        logger.warning(
            "The loss %s has no reference, so these aren't used: %s.",
            " + ".join(config.loss_type),
            ", ".join(unused),
        )
