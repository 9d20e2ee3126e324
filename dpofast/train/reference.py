"""Which reference a run is trained against, from its start to its last resume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn

from dpofast.columns import REF_COLUMNS
from dpofast.data.packing.batch import TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.errors import DataError, ReferenceStoreError
from dpofast.model.checks import check_model
from dpofast.model.packable import why_not_packed
from dpofast.model.parts import causal_lm
from dpofast.model.router import RouterLoss, check_router_loss
from dpofast.model.scorer import SequenceScorer
from dpofast.reference.build.batches import Batches, BatchesOfAnswers, BatchesOfTokens
from dpofast.reference.build.provider import ReferenceProvider
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.model import model_identity
from dpofast.reference.store.row_detail import Detail
from dpofast.train.checkpoint.run_state import RunState
from dpofast.zero.blocks import in_blocks
from dpofast.zero.weights import cast_weights, gathered, spread
from dpofast_kernels import HEAD_VERSION

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RunReference:
    """A given reference model, or the policy as it stands before step 1; never one that moved.

    Args:
        policy: the model that is trained.
        ref_model: a reference model; None for the policy's start.
        provider: of the stored log-probs.
        accelerator: knows the device and the autocast of a forward pass.
        layout: of the answers that are scored.
        num_answers: in a forward pass, where their tokens don't decide.
        router_loss: that the policy's training adds, if any; for the check alone.
    """

    def __init__(
        self,
        policy: nn.Module,
        ref_model: nn.Module | None,
        provider: ReferenceProvider,
        accelerator: Accelerator,
        layout: Layout,
        num_answers: int,
        router_loss: RouterLoss | None = None,
    ) -> None:
        self.policy, self.ref_model, self.provider = policy, ref_model, provider
        self.accelerator, self.layout, self.router_loss = accelerator, layout, router_loss
        self.num_answers = num_answers
        self.is_gone = False
        self._believed: set[str] = set()  # datasets with log-probs of their own
        self._scored: set[str] = set()  # datasets without
        self._home = next(self._model.parameters()).device
        if self._is_under_deepspeed:
            for model in {id(m): m for m in (policy, self._model)}.values():
                cast_weights(model, accelerator.deepspeed_plugin.deepspeed_config)

    @property
    def identity(self) -> ReferenceIdentity:
        """Settled at the first call, for the whole run."""
        if self.provider.identity is None:
            device, autocast_dtype = self.accelerator.device, self._autocast_dtype
            found: set[str | None] = set()
            for model in {id(m): m for m in (self.policy, self._model)}.values():
                with in_blocks(model):
                    found.add(check_model(model, self._layout_of(model), device, autocast_dtype))
            for attention in sorted(filter(None, found)):
                logger.info("Attention: %s.", attention)
            if self.router_loss is not None:
                with in_blocks(self.policy):
                    check_router_loss(self.router_loss, self.policy)
            self.provider.fix(self._identity(self._model))
        assert self.provider.identity is not None
        return self.provider.identity

    def logps(self, pairs: Any, name: str, row_tokens: int | None = None) -> np.ndarray:
        """Summed log-probs [n, 2] fp64 of a tokenised dataset, scored where the store lacks them.

        A dataset that brings its own, in ref_chosen_logps and ref_rejected_logps, is believed.

        Args:
            pairs: tokenised.
            name: of the dataset, for messages.
            row_tokens: most tokens of a packed row; None for `num_answers` in each forward pass, as
                always where rows are padded.

        Raises:
            ReferenceStoreError: they are missing and the reference is gone.
            DataError: its own aren't finite numbers.
        """
        _ = self.identity
        if set(REF_COLUMNS) <= set(pairs.column_names):
            return self._own_logps(pairs, name)
        if self._believed:
            raise DataError(
                f"{name} lacks {' and '.join(REF_COLUMNS)}, which {', '.join(self._believed)} "
                "brings: the two would be compared with different references; give these columns "
                "to all datasets, or to none."
            )
        self._scored.add(name)
        batches = self._batches(row_tokens)
        if self.is_gone:
            return self.provider.logps(pairs, name, None, batches)
        exchange = _exchange if spread(self._model.parameters()) else None
        with in_blocks(self._model):
            logps = self.provider.logps(
                pairs, name, self._score, batches, self._sum_over_ranks, exchange
            )
        if self.ref_model is not None and not _is_placed(self.ref_model):
            self.ref_model.to(self._home)  # its memory is what the store saves
        return logps

    def policy_starts_as_reference(self) -> bool:
        """Whether the policy, as it stands, has the reference's identity."""
        if self._believed:
            return False
        if self.ref_model is None:
            return not self.is_gone
        return self._identity(self.policy).digest == self.identity.digest

    def policy_moves(self) -> None:
        """From here on the policy can't stand for the reference."""
        self.is_gone = self.ref_model is None

    def run_state(self, kept: bool) -> RunState:
        """What a checkpoint has to say of the reference; `kept`: the store outlives the run."""
        store = str(self.provider.folder) if kept else None
        return RunState(self.identity.digest, self.identity.description, store)

    def restore(self, recorded: RunState, checkpoint: str) -> bool:
        """Keep the reference of the run's start, also where another model was given.

        Args:
            recorded: what the checkpoint says.
            checkpoint: its folder, to be named in errors.

        Returns:
            Whether the reference is another one than before this call.

        Raises:
            ReferenceStoreError: it was trained against another reference than the ref_model given.
        """
        if self.identity.digest == recorded.reference_digest:
            return False
        if self.ref_model is not None:
            raise ReferenceStoreError(
                f"The ref_model is not the reference that {checkpoint!r} was trained against "
                f"({self.identity.digest[:12]}, not {recorded.reference_digest[:12]}): give the "
                "one of that run, or start a new run from the checkpoint without resuming."
            )
        # its rows can be read where they are stored, and not made
        self.provider.fix_recorded(recorded.reference_digest, recorded.reference_description)
        self.is_gone = True
        return True

    def dtype(self) -> torch.dtype:
        """In which the forward pass computes."""
        return self._autocast_dtype or causal_lm(self.policy).dtype

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        """DeepSpeed gives the weights themselves their precision: nothing is cast on the way."""
        if self._is_under_deepspeed:
            return None
        return AUTOCAST_DTYPES.get(self.accelerator.mixed_precision)

    def _sum_over_ranks(self, counts: list[int]) -> list[int]:
        vector = torch.tensor(counts, device=self.accelerator.device)
        return self.accelerator.reduce(vector, reduction="sum").tolist()

    def _own_logps(self, pairs: Any, name: str) -> np.ndarray:
        values = np.stack([np.asarray(pairs[column], dtype=float) for column in REF_COLUMNS], 1)
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if bad.size:
            raise DataError(
                f"{name}: {' or '.join(REF_COLUMNS)} of pair {bad[0]} is not a finite number; "
                "leave both columns out to have them computed."
            )
        if self.ref_model is not None or self._scored:
            other = "a ref_model" if self.ref_model is not None else ", ".join(self._scored)
            raise DataError(
                f"{name} brings {' and '.join(REF_COLUMNS)}, beside {other} without: leave these "
                "columns out to have them computed, or rely on them alone."
            )
        self._believed.add(name)
        logger.info("%s brings its own reference log-probs; they aren't checked.", name)
        return values

    @property
    def _model(self) -> nn.Module:
        return self.policy if self.ref_model is None else self.ref_model

    def _score(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[np.ndarray]:
        """A Scorer that takes the reference to the device only when there is something to score."""
        model = self._model
        if not _is_placed(model):
            model.to(self.accelerator.device)
        return self._scorer()(sequences)

    def _scorer(self) -> SequenceScorer:
        return SequenceScorer(
            self._model,
            self.accelerator.autocast,
            self._layout_of(self._model),
            with_logsumexps=self.provider.detail >= Detail.LOGSUMEXPS,
        )

    def _batches(self, row_tokens: int | None) -> Batches:
        scorer = self._scorer()
        if row_tokens is None or not scorer.layout.is_packed:
            return BatchesOfAnswers(self.num_answers, scorer.num_tokens)
        return BatchesOfTokens(row_tokens, scorer.num_tokens)

    def _layout_of(self, model: nn.Module) -> Layout:
        """A given reference is of another model type, perhaps, that can't be packed."""
        if model is not self.policy and self.layout.is_packed and why_not_packed(model):
            return replace(self.layout, name="padded")
        return self.layout

    def _identity(self, model: nn.Module) -> ReferenceIdentity:
        return model_identity(
            model,
            autocast_dtype=self._autocast_dtype,
            attention=causal_lm(model).config._attn_implementation,
            head_version=HEAD_VERSION,
            gather=gathered if self._is_under_deepspeed else None,
        )

    @property
    def _is_under_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)


def _exchange(word: Any) -> list[Any]:
    words: list[Any] = gather_object([word])
    return words


def _is_placed(model: nn.Module) -> bool:
    """Whether its parts were spread over devices by from_pretrained."""
    return hasattr(causal_lm(model), "hf_device_map")
