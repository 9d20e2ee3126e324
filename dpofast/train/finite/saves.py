"""Refuses to save weights, or an optimizer's state, that hold a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from dpofast.errors import NonFiniteError
from dpofast.model.finite import non_finite_flags, non_finite_names, trained_weights
from dpofast.options.config import DPOConfig
from dpofast.train.exchange import exchange
from dpofast.train.finite.non_finite import last_checkpoint, saving_message
from dpofast.zero.weights import spread


class SavesOnlyFinite(Trainer):
    """Makes a transformers Trainer refuse a checkpoint or an export that no run could go on from.

    It comes before the class that saves among a trainer's bases. The weights of a model that isn't
    trained are as they were loaded, and aren't looked at.
    """

    args: DPOConfig
    run_id: str | None

    def check_finite(self, what: str) -> None:
        """Look at the trained weights of all ranks, which must call this together.

        Args:
            what: what comes of them, as the subject of a sentence.

        Raises:
            NonFiniteError: some aren't finite; the same on all ranks.
        """
        self._refuse_non_finite(what, trained_weights(self.model), is_shared=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as before, if the trained weights are finite.

        Raises:
            NonFiniteError: they aren't. No file is touched.
        """
        if not _internal_call:
            self._check_export()
        super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and upload as before, if the trained weights are finite.

        Raises:
            NonFiniteError: they aren't. No file is touched.
        """
        self._check_export()  # before transformers saves, which calls this internal
        return super().push_to_hub(*args, **kwargs)

    def _check_export(self) -> None:
        # A script may export on rank 0 only, unless ZeRO-3 has sharded the weights.
        is_shared = bool(spread(self.model.parameters()))
        self._refuse_non_finite("The model", trained_weights(self.model), is_shared=is_shared)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        what = f"checkpoint-{self.state.global_step}"
        tensors = [*trained_weights(self.model), *optimizer_tensors(self.model, self.optimizer)]
        self._refuse_non_finite(what, tensors, is_shared=True)
        super()._save_checkpoint(model, trial)

    def _refuse_non_finite(
        self, what: str, tensors: Sequence[tuple[str, Tensor]], *, is_shared: bool
    ) -> None:
        """Raise NonFiniteError if one of these tensors, on any of the ranks, isn't finite.

        Args:
            what: what isn't saved, as the subject of a sentence.
            tensors: tensors by name; with ZeRO-3, this rank's parts are looked at.
            is_shared: whether all ranks call this together.
        """
        device = self.args.device
        is_bad = non_finite_flags((tensor for _, tensor in tensors), device).any()
        if is_shared:
            is_bad = self.accelerator.gather(is_bad.float().view(1)).any()
        if not bool(is_bad):
            return
        own = non_finite_names(tensors)
        found = exchange(own) if is_shared else [own]
        names = list(dict.fromkeys(name for names in found for name in names))
        last = last_checkpoint(str(self.args.output_dir), self.run_id)
        raise NonFiniteError(saving_message(what, names, last, self.state.global_step))


def optimizer_tensors(model: nn.Module, optimizer: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an optimizer's state by name, and the copies of the weights that it updates.

    Args:
        model: the model whose parameters it trains.
        optimizer: the optimizer, wrapped by accelerate and DeepSpeed or not.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    if optimizer is None:
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[tuple[str, Tensor]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # DeepSpeed's optimizers update flat copies, which hold several parameters.
            name = names.get(id(parameter))
            if name is None:
                found.append(("the optimizer's copy of the weights", parameter))
            state = optimizer.state.get(parameter, {})
            found += _state_of(state, f" of {name}" if name else "")
    return found


def _state_of(state: dict[str, Any], of: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"the optimizer's {key}{of}", value
