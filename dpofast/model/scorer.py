"""Log-probs of answers under a fixed model, such as the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from dpofast.data.packing.batch import TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.packed_row import runs_of_prompts
from dpofast.model.forward import evaluating, micro_batch, run_batch
from dpofast.model.head import ScoreTask, head_options
from dpofast.model.parts import causal_lm


class SequenceScorer:
    """Computes log-probs of answers under a fixed model, by the kernel that training uses.

    Args:
        model: causal LM or PeftModel, already on the device that will run it.
        autocast: returns the context manager of a forward pass.
        layout: layout of the answers.
        with_logsumexps: also return the log-sum-exps of the logits.
    """

    def __init__(
        self, model: nn.Module, autocast: Any, layout: Layout, with_logsumexps: bool = False
    ) -> None:
        self.model, self.autocast, self.layout = model, autocast, layout
        self.with_logsumexps = with_logsumexps
        self.options = head_options(causal_lm(model).config)

    def __call__(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[np.ndarray]:
        """Runs one forward pass over some sequences.

        Args:
            sequences: (prompt ids, answer ids); answers to the same prompt share it if they are
                neighbours.

        Returns:
            One array per answer: [num_tokens] fp64, its per-token log-probs in nats. With
            log-sum-exps it is [2, num_tokens], the log-probs first.
        """
        batch = self.layout.collate(sequences, group_sizes=runs_of_prompts(sequences))
        batch = batch.to(next(self.model.parameters()).device)
        with evaluating(self.model), micro_batch(self.model, batch), self.autocast():
            task = ScoreTask(batch.labels, self.options, self.with_logsumexps)
            scores = run_batch(self.model, batch, task)  # [N] or [2, N]
        # float64 before anything is summed, whatever precision the head has.
        return np.split(scores.double().cpu().numpy(), batch.bounds[1:-1].numpy(), axis=-1)

    def num_tokens(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> int:
        """Positions that the body runs over in a call with these sequences, padding included."""
        return self.layout.num_tokens(sequences, runs_of_prompts(sequences))
