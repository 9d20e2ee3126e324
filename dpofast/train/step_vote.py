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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dpofast.data.packing.batch import PackedPairs, StepBatch
from dpofast.errors import NonFiniteError
from dpofast.model.finite import non_finite_names, trained_weights
from dpofast.options.config import DPOConfig
from dpofast.train.dataset import PairPreparer, RunDataset
from dpofast.train.exchange import exchange
from dpofast.train.non_finite import Facts, Pass, StepPasses, step_message
from dpofast.train.stream import RunStream
from dpofast_kernels import PairLoss, PairLossOutput


class VotesOnSteps(Trainer):
    """Makes the ranks agree, before each optimizer step, on whether the run goes on.

    Attributes:
        received_signal: a signal that this rank has received and that stops the run; None so far.
        stopping_signal: the signal that stops the run after this step, the same on all ranks; None
            so far.
    """

    args: DPOConfig
    data: PairPreparer
    pair_loss: PairLoss
    received_signal: signal.Signals | None = None
    stopping_signal: signal.Signals | None = None
    _passes = StepPasses()

    def begin_vote(self, step: StepBatch) -> None:
        """Note the step whose micro-batches are run next."""
        self._passes = StepPasses(step)

    def note_pass(self, batch: PackedPairs, loss: Tensor, output: PairLossOutput | None) -> None:
        """Keep what the vote needs of a micro-batch.

        Args:
            batch: the micro-batch.
            loss: [], its mean loss.
            output: output of its forward pass; None if a subclass has another loss.
        """
        logps = None if output is None else output.logps.detach()
        self._passes.passes.append(Pass(batch, loss.detach(), logps))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._vote(norm)
        return norm

    def _vote(self, norm: Any) -> None:
        device = self.args.device
        # A subclass may have a training_step of its own, which notes nothing.
        passes, self._passes = self._passes, StepPasses()
        is_bad = passes.is_bad(device)
        if norm is not None and not self.args.fp16:  # its scaler skips steps without a norm
            is_bad = is_bad | _is_bad_norm(norm, device)
        own = 0 if self.received_signal is None else int(self.received_signal)
        votes = torch.stack([is_bad.to(device).double(), torch.tensor(float(own)).to(device)])
        bad, signals = self.accelerator.gather(votes.unsqueeze(0)).T.tolist()  # [R, 2]
        if any(bad):
            self._refuse(norm, passes)
        if any(signals):
            self.stopping_signal = signal.Signals(int(max(signals)))

    def _refuse(self, norm: Any, passes: StepPasses) -> None:
        """Stop the run. All ranks call this together.

        Raises:
            NonFiniteError: always; with the same message on all ranks.
        """
        weights = trained_weights(self.model)
        gradients = [(name, p.grad) for name, p in weights if p.grad is not None]
        source, rows = self._rows_of(passes.bad_pairs(self.pair_loss))
        facts = Facts(
            rank=self.args.process_index,
            is_loss=bool(passes.is_bad(self.args.device)),
            rows=rows,
            source=source,
            weights=tuple(non_finite_names(weights)),
            gradients=tuple(non_finite_names(gradients)),
        )
        step = self.state.global_step + 1
        raise NonFiniteError(step_message(step, norm, exchange(facts), str(self.args.output_dir)))

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
    if isinstance(norm, Tensor):
        return (norm.isfinite() & (norm >= 0)).logical_not().to(device)
    return torch.tensor(not math.isfinite(norm) or norm < 0, device=device)
