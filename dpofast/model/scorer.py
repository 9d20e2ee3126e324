"""Log-probs of answers under a fixed model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from dpofast.data.packing.batch import TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.model.forward import evaluating, micro_batch, run_batch
from dpofast.model.head import ScoreTask, head_options
from dpofast.model.parts import causal_lm


class SequenceScorer:
    """Log-probs of answers under a fixed model, by the kernel that the training steps use.

    Args:
        model: causal LM or PeftModel, on the device where it is to run.
        autocast: makes the context of a forward pass.
        layout: how answers are laid out; those of one prompt should be neighbours.
        with_logsumexps: give the log-sum-exps of the logits, too.
    """

    def __init__(
        self, model: nn.Module, autocast: Any, layout: Layout, with_logsumexps: bool = False
    ) -> None:
        self.model, self.autocast, self.layout = model, autocast, layout
        self.with_logsumexps = with_logsumexps
        self.options = head_options(causal_lm(model).config)

    def __call__(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[np.ndarray]:
        """One forward pass over (prompt ids, answer ids).

        Returns:
            Of each answer [num_tokens] fp64, its per-token log-probs in nats; or [2, num_tokens],
            the log-sum-exps below them.
        """
        batch = self.layout.collate(sequences, by_prompt=True)
        batch = batch.to(next(self.model.parameters()).device)
        with evaluating(self.model), micro_batch(self.model, batch), self.autocast():
            task = ScoreTask(batch.labels, self.options, self.with_logsumexps)
            scores = run_batch(self.model, batch, task)  # [N] or [2, N]
        # float64, so that what is summed later is what the head gave, whatever its precision
        return np.split(scores.double().cpu().numpy(), batch.bounds[1:-1].numpy(), axis=-1)

    def num_tokens(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> int:
        """Positions that the body runs over in a call with these, padding included."""
        return self.layout.num_tokens(sequences, by_prompt=True)
