"""The policy as it was before step 1, found again after it has been trained."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from dpofast.errors import DPOFastError, ModelError
from dpofast.model.dropout import disable_dropout
from dpofast.model.parts import is_peft_model
from dpofast.reference.build.ranks import Exchange, on_all_ranks
from dpofast.reference.identity.description import ReferenceIdentity
from dpofast.reference.identity.readable import differences
from dpofast.train.reference.first_weights import FirstWeights
from dpofast.train.reference.origin import Origin
from dpofast.zero.weights import spread

logger = logging.getLogger(__name__)

MOST_DIFFERENCES = 2  # that a reason names


class FormerPolicy:
    """Finds a model that equals the policy before step 1, by its identity.

    It is the model below an adapter, if that was fresh when training began and only the adapter is
    trained. With any other adapter, and where answers are scored while the policy is trained, it is
    the policy with the trained weights that it began with, which are kept on the CPU. Otherwise, in
    a resumed run and under ZeRO-3 the model is loaded again from where it came.

    Args:
        policy: the model that is trained.
        origin: where the policy was loaded from.
        identify: makes the identity of a model as the run's reference has it.
        prepare: makes a model that was just loaded ready to be identified and scored.
        check: runs the start-up checks on a model; raises DPOFastError.
        exchange: exchanges objects between all ranks of the run.
    """

    def __init__(
        self,
        policy: nn.Module,
        origin: Origin,
        *,
        identify: Callable[[nn.Module], ReferenceIdentity],
        prepare: Callable[[nn.Module], None],
        check: Callable[[nn.Module], Any],
        exchange: Exchange,
    ) -> None:
        self.policy, self.origin = policy, origin
        self.identify, self.prepare, self.check = identify, prepare, check
        self.exchange = exchange
        self._first_weights: FirstWeights | None = None
        self._enter_found: Callable[[contextlib.ExitStack], nn.Module] | None = None

    def remember(self, identity: ReferenceIdentity, is_needed: bool) -> None:
        """Keep what is needed of the policy, which is the reference and about to be trained.

        Args:
            identity: identity of the reference.
            is_needed: answers will be scored while the policy is trained.
        """
        sharded = spread(self.policy.parameters())
        below_adapter = is_peft_model(self.policy) and identity.description["adapter"] is None
        reason = "" if below_adapter else self._why_not_loaded(identity)
        if is_needed and sharded and reason:
            logger.warning(
                "Rows that are read later need log-probs from the store: the policy before step 1 "
                "can't be run then, and %s. Run `dpofast ref build` first, or pass a ref_model.",
                reason,
            )
        if is_peft_model(self.policy):
            self._first_weights = FirstWeights.of(self.policy, identity)
        elif is_needed and not sharded:
            self._first_weights = FirstWeights(self.policy)
            logger.info(
                "The policy's first weights are kept in the memory of the CPU (%.1f GB on each "
                "rank), to score rows that are read later.",
                self._first_weights.num_bytes / 1e9,
            )

    def find(
        self, identity: ReferenceIdentity, stack: contextlib.ExitStack, keep: bool = False
    ) -> tuple[nn.Module | None, str]:
        """Find the model with an identity. All ranks must call this at the same time.

        Args:
            identity: identity of the run's reference.
            stack: gets what must be undone once the model has been used.
            keep: the model will be needed again. It is kept, and not identified once more.

        Returns:
            The model, or None; and the reasons why there is none, as the rest of a sentence.
        """
        if self._enter_found is not None:
            return self._enter_found(stack), ""
        reasons = []
        if is_peft_model(self.policy) or self._first_weights is not None:
            reason = self._undo_training(identity, stack)
            if reason is None:
                if keep:
                    self._enter_found = self._enter_first
                return self.policy, ""
            reasons.append(reason)
        model, reason = self._load_again(identity)
        if model is not None:
            logger.info("The reference was loaded again from %s.", self.origin.name)
            if keep:
                self._enter_found = partial(_enter_loaded, model)
                return self._enter_found(stack), ""
            return model, ""
        return None, "; ".join([*reasons, reason])

    def _enter_first(self, stack: contextlib.ExitStack) -> nn.Module:
        """Turn the policy into what it was before step 1, until `stack` ends."""
        first = self._first_weights
        stack.enter_context(adapter_off(self.policy) if first is None else first.put_back())
        return self.policy

    def _undo_training(
        self, identity: ReferenceIdentity, stack: contextlib.ExitStack
    ) -> str | None:
        """Turn the policy into the reference until `stack` ends, if that is possible.

        Returns:
            None, or the reason why it isn't.
        """
        first = self._first_weights
        with contextlib.ExitStack() as attempt:
            self._enter_first(attempt)
            try:
                found = self.identify(self.policy)
            except ModelError as error:
                return f"its adapter can't be switched off ({str(error).rstrip('.')})"
            if found.digest == identity.digest:
                stack.push(attempt.pop_all())
                where = "below the adapter" if first is None else "with the weights it began with"
                logger.info("The reference is the model %s.", where)
                return None
        if first is None and identity.description["adapter"] is not None:
            return "its adapter belongs to the reference, as it wasn't a fresh LoRA"
        return f"below its adapter is another model now ({_difference(identity, found)})"

    def _why_not_loaded(self, identity: ReferenceIdentity) -> str:
        """Why nothing could load the reference again; empty if it is worth a try."""
        name = self.origin.name
        if not name:
            return "it can't be loaded again, as it wasn't loaded by a name"
        if identity.description["adapter"] is not None:
            return f"it can't be loaded again, as {name!r} doesn't have its adapter"
        return ""

    def _load_again(self, identity: ReferenceIdentity) -> tuple[nn.Module | None, str]:
        """Load the model again; without one, say why."""
        name, reason = self.origin.name, self._why_not_loaded(identity)
        if reason:
            return None, reason
        for dtype in self.origin.dtypes(identity):
            try:
                load = partial(self.origin.load, identity, dtype)
                model = on_all_ranks(load, self.exchange)
            except DPOFastError as error:
                return None, f"it can't be loaded again ({str(error).rstrip('.')})"
            self.prepare(model)
            disable_dropout(model)
            found = self.identify(model)
            if found.digest == identity.digest:
                self.check(model)
                return model, ""
            reason = reason or f"{name!r} is another model now ({_difference(identity, found)})"
            del model  # before the next one takes its memory
        return None, reason


def _enter_loaded(model: nn.Module, stack: contextlib.ExitStack) -> nn.Module:
    """A model that leaves the device, where training needs the memory, when `stack` ends."""
    if not spread(model.parameters()):
        stack.callback(model.to, "cpu")
    return model


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Inside the `with` block, the adapters of a PeftModel are off.

    Afterwards the same parameters are trained as before. PEFT itself would train every parameter of
    the active adapters, also those that were frozen by hand.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trained biases stay on; the identity tells
        try:
            with model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


def _difference(wanted: ReferenceIdentity, found: ReferenceIdentity) -> str:
    """What differs between the reference and the model that was found."""
    named = differences(wanted.description, found.description)
    more = len(named) - MOST_DIFFERENCES
    return "; ".join(named[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
