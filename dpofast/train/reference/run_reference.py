"""The reference that a run is trained against; it stays the same through every resume."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from dpofast.columns import REF_COLUMNS
from dpofast.data.packing.batch import TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.errors import DataError, ReferenceStoreError
from dpofast.model.checks import check_model, where_kernels_run
from dpofast.model.dropout import dropouts
from dpofast.model.liger import liger_names, use_liger
from dpofast.model.packable import why_not_packed
from dpofast.model.parts import causal_lm, is_placed
from dpofast.model.quantised import computing_dtype, keep_differentiable
from dpofast.model.randomness import random_modules
from dpofast.model.rope import depends_on_length
from dpofast.model.router import RouterLoss, check_router_loss
from dpofast.model.scorer import SequenceScorer
from dpofast.options.config import DPOConfig
from dpofast.options.liger import liger_kinds
from dpofast.reference.build.answers import PairAnswers, read_answers
from dpofast.reference.build.batches import Batches, BatchesOfAnswers, BatchesOfTokens
from dpofast.reference.build.builder import Scored
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.model import current_identity, differ_by_rounding, model_identity
from dpofast.reference.store.row_detail import RowDetail
from dpofast.train.checkpoint.run_state import RunState
from dpofast.train.data.dataset import RunDataset
from dpofast.train.exchange import exchange
from dpofast.train.finite.start import check_own_logps, check_weights
from dpofast.train.reference.former_policy import FormerPolicy
from dpofast.train.reference.origin import Origin
from dpofast.train.reference.run_store import RunStore, Scoring
from dpofast.zero.blocks import in_blocks
from dpofast.zero.weights import cast_weights, gathered, spread
from dpofast_kernels import HEAD_VERSION

logger = logging.getLogger(__name__)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class RunReference:
    """The reference of a run: the reference model that was given, or the policy before step 1.

    A policy that has been trained since step 1 is never used as the reference. Answers that are
    missing then are scored with the policy as it was, if `FormerPolicy` finds it again.

    Args:
        policy: the model that is trained.
        ref_model: the reference model; None if the policy before step 1 is the reference.
        store: store of the log-probs.
        accelerator: knows the device and the autocast of a forward pass.
        layout: layout of the answers that are scored.
        config: options of the run.
        router_loss: auxiliary loss that the policy is trained with, if any; it is only checked.

    Attributes:
        is_gone: whether the reference isn't at hand any more: it was the policy before step 1, or a
            checkpoint names another one.
        disables_dropout: whether the policy is meant to be without noise.
        random_modules: modules of the policy that are random in training mode though its dropouts
            are 0, by name; known once `settle` was called.
    """

    is_none: ClassVar[bool] = False  # whether the loss has no reference

    def __init__(
        self,
        policy: nn.Module,
        ref_model: nn.Module | None,
        store: RunStore,
        accelerator: Accelerator,
        layout: Layout,
        config: DPOConfig,
        router_loss: RouterLoss | None = None,
    ) -> None:
        self.policy, self.ref_model, self.store = policy, ref_model, store
        self.accelerator, self.layout, self.router_loss = accelerator, layout, router_loss
        num_pairs = config.precompute_ref_batch_size or config.per_device_train_batch_size
        self.num_answers = 2 * num_pairs  # in a forward pass, if no limit in tokens is given
        self.disables_dropout = config.disable_dropout
        self._liger, self.head_backend = liger_kinds(config), config.head_backend
        self.is_gone = False
        self.random_modules: dict[str, nn.Module] = {}
        self._identity: ReferenceIdentity | None = None
        self._believed: set[str] = set()  # names of datasets that bring their own log-probs
        self._scored: set[str] = set()  # names of datasets that don't
        self._home = next(self._model.parameters()).device
        self._former = FormerPolicy(
            policy,
            Origin.of(policy, config),
            identify=self._identify,
            prepare=self._prepare,
            check=self._check,
            exchange=exchange,
        )
        for model in self._models():
            self._prepare(model)

    def settle(self) -> ReferenceIdentity:
        """Check the models and identify the reference; later calls return the same identity.

        Raises:
            ModelError, ConfigError: a model can't be trained or scored exactly.
            NonFiniteError: a weight of a model is NaN or infinite.
            ReferenceStoreError: the store can't be opened.
        """
        if self._identity is None:
            self._check_models()
            self._fix(self._identify(self._model))
        return self.identity

    @property
    def identity(self) -> ReferenceIdentity:
        """The identity of the run's reference, once `settle` was called."""
        assert self._identity is not None, "settle() comes first"
        return self._identity

    @property
    def is_settled(self) -> bool:
        return self._identity is not None

    def score(
        self, dataset: RunDataset, row_tokens: int | None = None, rescore: bool = False
    ) -> None:
        """Give a dataset its reference log-probs; answers that the store is missing are scored.

        A dataset's own log-probs, in ref_chosen_logps and ref_rejected_logps, are used unchecked.
        A dataset that this reference has scored already is left as it is.

        Args:
            dataset: dataset whose `ref_logps` are set.
            row_tokens: most tokens of a packed row; None to score `num_answers` answers in each
                forward pass, as padded rows always do.
            rescore: score answers again if the store has less detail than the options ask for.

        Raises:
            ReferenceStoreError: log-probs are missing, and the reference is gone and isn't found
                again.
            DataError: the dataset's own log-probs aren't finite numbers, or some datasets of the
                run have their own and others don't.
        """
        identity = self.settle()
        if dataset.brings_ref_logps:
            if dataset.ref_logps is None:
                dataset.ref_logps = self._own_logps(dataset)
            return
        if dataset.scored_by == identity.digest and not rescore:
            return
        if self._believed:
            raise DataError(
                f"{dataset.name} lacks {' and '.join(REF_COLUMNS)}, which "
                f"{', '.join(self._believed)} brings: the two would be compared with different "
                "references; give these columns to all datasets, or to none."
            )
        self._scored.add(dataset.name)
        dataset.ref_logps = self._stored_logps(dataset, row_tokens, rescore)
        dataset.scored_by = identity.digest

    def policy_starts_as_reference(self) -> bool:
        """Whether the policy, as it is now, has the reference's identity."""
        if self._believed:
            return False
        if self.ref_model is None:
            return not self.is_gone
        return self._identify(self.policy).digest == self.identity.digest

    def policy_moves(self, is_needed: bool = False) -> None:
        """Note that the policy is about to be trained: it can't be the reference any more.

        Args:
            is_needed: answers will be scored while it is trained, as those of a stream are.
        """
        if self.ref_model is None and not self.is_gone:
            self._former.remember(self.identity, is_needed)
            self.is_gone = True

    def run_state(self, kept: bool, row_tokens: int | None) -> RunState:
        """The facts about the reference and the rows that a checkpoint records.

        Args:
            kept: whether the store outlives the run.
            row_tokens: most tokens of a packed row; None where rows are padded.
        """
        store = str(self.store.folder) if kept else None
        origin = self._former.origin
        return RunState(
            self.identity.digest,
            self.identity.description,
            store,
            row_tokens,
            reference_name=(self.ref_model is None and origin.name) or None,
            reference_revision=origin.revision if self.ref_model is None else None,
        )

    def restore(self, recorded: RunState, checkpoint: str) -> None:
        """Use the reference that the resumed run started with, whatever policy is given now.

        Args:
            recorded: what the checkpoint says.
            checkpoint: folder of the checkpoint, named in errors.

        Raises:
            ReferenceStoreError: the checkpoint was trained against a reference other than the
                given ref_model.
        """
        if self.settle().digest == recorded.reference_digest:
            return
        start = ReferenceIdentity(recorded.reference_digest, recorded.reference_description)
        now = current_identity(start, depends_on_length(self._model))
        if now != start:
            logger.warning(
                "%s was trained on reference log-probs that depended on their batch, as the "
                "model's RoPE depends on the length of a sequence. They aren't used any more.",
                checkpoint,
            )
        if now.digest == self.identity.digest:
            return
        if self.ref_model is not None:
            if differ_by_rounding(now, self.identity):
                logger.warning("The ref_model has other layers or attention; it scores again.")
                return
            raise ReferenceStoreError(
                f"The ref_model is not the reference that {checkpoint!r} was trained against "
                f"({self.identity.digest[:12]}, not {now.digest[:12]}): give the "
                "one of that run, or start a new run from the checkpoint without resuming."
            )
        # The stored log-probs of that reference can be read. The model at hand is another one, so
        # missing ones need the reference that the checkpoint names.
        self._fix(now)
        self.is_gone = True
        if recorded.reference_name is not None:
            self._former.origin = self._former.origin.moved_to(
                recorded.reference_name, recorded.reference_revision
            )

    def dtype(self) -> torch.dtype:
        """The dtype in which a forward pass computes."""
        return self._autocast_dtype or computing_dtype(self.policy)

    @property
    def _model(self) -> nn.Module:
        return self.policy if self.ref_model is None else self.ref_model

    def _models(self) -> list[nn.Module]:
        """Policy and reference, which may be one object."""
        return [self.policy] if self.ref_model is None else [self.policy, self.ref_model]

    def _fix(self, identity: ReferenceIdentity) -> None:
        self._identity = identity
        self.store.open(identity)

    def _check_models(self) -> None:
        """Run the start-up checks of every model, and log which kernels they chose."""
        for line in sorted({line for model in self._models() for line in self._check(model)}):
            logger.info("%s.", line)
        with in_blocks(self.policy), where_kernels_run(self.policy, self.accelerator.device):
            if self.router_loss is not None:
                check_router_loss(self.router_loss, self.policy)
            if next(dropouts(self.policy), None) is None:
                self.random_modules = random_modules(self.policy)

    def _check(self, model: nn.Module) -> tuple[str, ...]:
        """Run the start-up checks of a model; returns lines about the kernels that they chose."""
        device = self.accelerator.device
        check_weights(model, "The policy" if model is self.policy else "The reference")
        with in_blocks(model):
            layout = self._layout_of(model)
            return check_model(model, layout, device, self._autocast_dtype, self.head_backend)

    def _prepare(self, model: nn.Module) -> None:
        """Make a model ready to be identified and scored."""
        keep_differentiable(model)
        use_liger(model, self._liger)
        if self._is_under_deepspeed:
            cast_weights(model, self.accelerator.deepspeed_plugin.deepspeed_config)

    def _stored_logps(
        self, dataset: RunDataset, row_tokens: int | None, rescore: bool
    ) -> np.ndarray:
        answers = read_answers(dataset.answer_pairs(), dataset.answer_index)
        if not self.is_gone:
            logps = self._filled(self._model, dataset, answers, row_tokens, rescore)
            if self.ref_model is not None and not is_placed(self.ref_model):
                self.ref_model.to(self._home)  # its place on the device is free for training again
            return logps
        # Ranks can see different rows, but must look for the reference together.
        if not any(exchange(self.store.num_missing(answers))):
            return self.store.read(answers, dataset.name, goes_on=dataset.is_window)
        with contextlib.ExitStack() as stack:
            model, reasons = self._former.find(self.identity, stack, dataset.is_window)
            if model is None:
                return self.store.read(answers, dataset.name, reasons, dataset.is_window)
            return self._filled(model, dataset, answers, row_tokens, rescore=False)

    def _filled(
        self,
        model: nn.Module,
        dataset: RunDataset,
        answers: PairAnswers,
        row_tokens: int | None,
        rescore: bool,
    ) -> np.ndarray:
        """Read a dataset's log-probs, after `model` has scored the answers that are missing."""
        scoring = Scoring(
            partial(self._score, model),
            self._batches(model, row_tokens),
            self._sum_over_ranks,
            exchange if spread(model.parameters()) else None,
        )
        with in_blocks(model):
            return self.store.fill(answers, dataset.name, scoring, rescore, dataset.is_window)

    def _own_logps(self, dataset: RunDataset) -> np.ndarray:
        """The reference log-probs in the dataset's own columns: [n, 2] fp64.

        Raises:
            DataError: a log-prob isn't finite or is above 0, or the run also has a ref_model, or
                datasets without such columns.
        """
        columns = [np.asarray(dataset.pairs[column], dtype=float) for column in REF_COLUMNS]
        values = np.stack(columns, 1)
        check_own_logps(dataset, values)
        if self.ref_model is not None or self._scored:
            other = "a ref_model" if self.ref_model is not None else ", ".join(self._scored)
            raise DataError(
                f"{dataset.name} brings {' and '.join(REF_COLUMNS)}, beside {other} without: leave "
                "these columns out to have them computed, or rely on them alone."
            )
        self._believed.add(dataset.name)
        logger.info("%s brings its own reference log-probs; they aren't checked.", dataset.name)
        return values

    def _score(self, model: nn.Module, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> Scored:
        """Start a call of the reference, which is moved to the device with the first call.

        A run that finds everything in the store never needs the memory for it.
        """
        if not is_placed(model):
            model.to(self.accelerator.device)
        return self._scorer(model).launch(sequences)

    def _scorer(self, model: nn.Module) -> SequenceScorer:
        return SequenceScorer(
            *(model, self.accelerator.autocast, self._layout_of(model)),
            *(self.store.detail >= RowDetail.LOGSUMEXPS, self.head_backend),
        )

    def _batches(self, model: nn.Module, row_tokens: int | None) -> Batches:
        scorer = self._scorer(model)
        if row_tokens is None or not scorer.layout.is_packed:
            return BatchesOfAnswers(self.num_answers, scorer.num_tokens)
        return BatchesOfTokens(row_tokens, scorer.num_tokens)

    def _layout_of(self, model: nn.Module) -> Layout:
        """The run's layout; padded for a reference of a model type that can't be packed."""
        if model is not self.policy and self.layout.is_packed and why_not_packed(model):
            return replace(self.layout, name="padded")
        return self.layout

    def _identify(self, model: nn.Module) -> ReferenceIdentity:
        return model_identity(
            model,
            autocast_dtype=self._autocast_dtype,
            attention=causal_lm(model).config._attn_implementation,
            head_version=HEAD_VERSION,
            rope_depends_on_length=depends_on_length(model),
            layers=liger_names(model),
            gather=gathered if self._is_under_deepspeed else None,
        )

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, or None. Under DeepSpeed the weights are cast instead."""
        if self._is_under_deepspeed:
            return None
        return AUTOCAST_DTYPES.get(self.accelerator.mixed_precision)

    @property
    def _is_under_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def _sum_over_ranks(self, counts: list[int]) -> list[int]:
        vector = torch.tensor(counts, device=self.accelerator.device)
        return self.accelerator.reduce(vector, reduction="sum").tolist()
