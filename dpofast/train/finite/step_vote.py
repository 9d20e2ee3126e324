"""What the ranks tell each other in every step: whether a number isn't finite, or a signal came.

Ranks that save or stop at different steps would wait for each other for ever, so they must agree.
One small exchange between the ranks, after the backward pass, serves all questions, and its result
is the only value of a step that the host waits for here. The losses of the micro-batches stay on
the device until then.

The vote comes before the optimizer's step, with one exception: DeepSpeed's engine steps inside
`accelerator.backward`. It leaves out a step whose gradient isn't finite by itself, and reports an
infinite norm; the vote after that ends the run.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import NonFiniteError, one_line
from dpofast.model.finite import non_finite_names, trained_weights
from dpofast.options.config import DPOConfig
from dpofast.train.data.dataset import PairPreparer, RunDataset
from dpofast.train.data.stream import RunStream
from dpofast.train.exchange import exchange
from dpofast.train.finite.non_finite import (
    NAMED_TENSORS,
    Facts,
    Pass,
    StepPasses,
    last_checkpoint,
    step_message,
)
from dpofast.zero.overflow import discarded_gradients, watch_overflows
from dpofast_kernels import PairLossOutput, PreferenceLoss

# Steps in a row that a loss scaler may leave out. Each halves the scale: from 65536 to 1/256, at
# which only a gradient that is useless in float16 still overflows.
MOST_SKIPPED = 24


class VotesOnSteps(Trainer):
    """Makes the ranks agree, before each optimizer step, on whether the run goes on.

    Attributes:
        received_signal: a signal that this rank has received and that stops the run; None so far.
        stopping_signal: the signal that stops the run after this step, the same on all ranks; None
            so far.
        step_loss: gives the loss of the step.
        step_sums: gives the [k] fp64 numbers of this rank that are added up in the exchange.
        take_step_sums: gets their sums over the ranks.
    """

    args: DPOConfig
    data: PairPreparer
    step_loss: Callable[[], PreferenceLoss]
    step_sums: Callable[[], Tensor]
    take_step_sums: Callable[[list[float]], None]
    run_id: str | None
    received_signal: signal.Signals | None = None
    stopping_signal: signal.Signals | None = None
    _passes = StepPasses()
    _skipped = 0  # steps in a row that a loss scaler has left out

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as before.

        Raises:
            NonFiniteError: a loss, a gradient or a weight isn't finite; the same on all ranks.
        """
        self._skipped = 0
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            # PyTorch's optimizers compute the size of a step on the host, and convert it there.
            is_step = isinstance(error, RuntimeError) and "without overflow" in str(error)
            # DeepSpeed's loss scaler gives up at its smallest scale.
            if not is_step and "loss scale already at minimum" not in str(error):
                raise
            remedy = (
                f"lower learning_rate, which is {self.args.learning_rate:g}"
                if is_step
                else "set bf16: true, or load the model in float32"
            )
            last = last_checkpoint(str(self.args.output_dir), self.run_id)
            raise NonFiniteError(
                f"Step {self.state.global_step + 1}: {one_line(error)}: {remedy}. {last}"
            ) from error

    def begin_vote(self, step: StepBatch) -> None:
        """Note the step whose micro-batches are run next."""
        self._passes = StepPasses(step)
        watch_overflows(self.model_wrapped, NAMED_TENSORS + 1)

    def note_pass(self, batch: PackedPairs, loss: Tensor, output: PairLossOutput | None) -> None:
        """Keep what the vote needs of a micro-batch.

        Args:
            batch: the micro-batch.
            loss: [], its mean loss.
            output: output of its forward pass; None if a subclass has another loss.
        """
        logps = None if output is None else output.logps.detach()
        pair_weights = None if output is None else output.pair_weights
        self._passes.passes.append(Pass(batch, loss.detach(), logps, pair_weights))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._vote(norm)
        return norm

    def _vote(self, norm: Any) -> None:
        device = self.args.device
        # A subclass may have a training_step of its own, which notes nothing.
        passes, self._passes = self._passes, StepPasses()
        is_bad, is_bad_norm = passes.is_bad(device), _is_bad_norm(norm, device)
        is_skipped = torch.zeros((), dtype=torch.bool, device=device)
        if self.args.fp16:  # its loss scaler skips such a step, and tries a smaller scale
            is_skipped = is_bad_norm
        else:
            is_bad = is_bad | is_bad_norm
        own = 0 if self.received_signal is None else int(self.received_signal)
        flags = torch.stack([is_bad.to(device), is_skipped]).double()
        received = torch.tensor([float(own)], dtype=flags.dtype, device=device)
        votes = torch.cat([flags, received, self.step_sums().to(device)])  # [3 + k]
        gathered = self.accelerator.gather(votes.unsqueeze(0)).T.tolist()  # [3 + k][R]
        bad, skipped, signals, *sums = gathered
        if any(bad):
            self._refuse(norm, passes)
        self._skipped = self._skipped + 1 if any(skipped) else 0
        if self._skipped >= MOST_SKIPPED:
            self._refuse_scaler()
        if any(signals):
            self.stopping_signal = signal.Signals(int(max(signals)))
        self.take_step_sums([math.fsum(each) for each in sums])

    def _refuse(self, norm: Any, passes: StepPasses) -> None:
        """Stop the run. All ranks call this together.

        Raises:
            NonFiniteError: always; with the same message on all ranks.
        """
        weights = trained_weights(self.model)
        gradients = [(name, p.grad) for name, p in weights if p.grad is not None]
        discarded = discarded_gradients(self.model_wrapped)
        source, rows = self._rows_of(passes.bad_pairs(self.step_loss()))
        facts = Facts(
            rank=self.args.process_index,
            is_loss=bool(passes.is_bad(self.args.device)),
            rows=rows,
            source=source,
            weights=tuple(non_finite_names(weights)),
            gradients=(*discarded, *non_finite_names(gradients)),
            last=last_checkpoint(str(self.args.output_dir), self.run_id),
        )
        raise NonFiniteError(step_message(self.state.global_step + 1, norm, exchange(facts)))

    def _refuse_scaler(self) -> None:
        last = last_checkpoint(str(self.args.output_dir), self.run_id)
        raise NonFiniteError(
            f"Step {self.state.global_step + 1}: the loss scaler of fp16 has left out "
            f"{self._skipped} steps in a row, as the gradient overflows at every scale that it "
            "tried, so the run trains nothing: set bf16: true, or load the model in float32. "
            f"{last}"
        )

    def _rows_of(self, pairs: list[int]) -> tuple[str, tuple[int, ...]]:
        """The rows that pairs of the training set were read from, and what they are counted in."""
        dataset: Any = self.data.known(self.train_dataset, RunDataset)
        stream = self.data.known(self.train_dataset, RunStream)
        if stream is not None:
            dataset = stream.window(max(0, stream.next_step - 1)).dataset
        if dataset is None or "row" not in dataset.pairs.column_names:
            return "the training set", tuple(pairs)
        return dataset.name, tuple(dataset.pairs[pairs]["row"]) if pairs else ()


def _is_bad_norm(norm: Any, device: torch.device) -> Any:
    """Whether a gradient norm is none: NaN, infinite, or DeepSpeed's -1 for both."""
    if norm is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    if isinstance(norm, Tensor):
        return (norm.isfinite() & (norm >= 0)).logical_not().to(device)
    return torch.tensor(not math.isfinite(norm) or norm < 0, device=device)
