"""Log-probs of answers under a fixed model, such as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
        head_backend: the head's back end, as in HeadOptions.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: Any,
        layout: Layout,
        with_logsumexps: bool = False,
        head_backend: str = "auto",
    ) -> None:
        self.model, self.autocast, self.layout = model, autocast, layout
        self.with_logsumexps = with_logsumexps
        self.options = head_options(causal_lm(model).config, head_backend)

    def __call__(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> list[np.ndarray]:
        """Runs one forward pass over some sequences.

        Args:
            sequences: (prompt ids, answer ids); answers to the same prompt share it if they are
                neighbours.

        Returns:
            One array per answer: [num_tokens] fp64, its per-token log-probs in nats. With
            log-sum-exps it is [2, num_tokens], the log-probs first.
        """
        scored = self.launch(sequences)
        return scored() if callable(scored) else scored

    def launch(
        self, sequences: Sequence[tuple[TokenIds, TokenIds]]
    ) -> list[np.ndarray] | Callable[[], list[np.ndarray]]:
        """Starts one forward pass. On CUDA, the host can start the next one before this one ends.

        Args:
            sequences: as in `__call__`.

        Returns:
            What `__call__` returns, or on CUDA a function that waits for it and returns it.
        """
        batch = self.layout.collate(sequences, group_sizes=runs_of_prompts(sequences))
        bounds = batch.bounds[1:-1].numpy()
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            # From other memory, the copy of a long row would wait for the pass before.
            batch = batch.pin_memory()
        batch = batch.to(device)
        with evaluating(self.model), micro_batch(self.model, batch), self.autocast():
            task = ScoreTask(batch.labels, self.options, self.with_logsumexps)
            scores = run_batch(self.model, batch, task)  # [N] or [2, N]
        # float64 before anything is summed, whatever precision the head has.
        scores = scores.double()
        if not scores.is_cuda:
            return np.split(scores.cpu().numpy(), bounds, axis=-1)
        fetch = _copied_later(scores)
        return lambda: np.split(fetch().numpy(), bounds, axis=-1)

    def num_tokens(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> int:
        """Positions that the body runs over in a call with these sequences, padding included."""
        return self.layout.num_tokens(sequences, runs_of_prompts(sequences))


def _copied_later(scores: Tensor) -> Callable[[], Tensor]:
    """Starts a copy of a CUDA tensor to the CPU; the function waits for it and returns the copy."""
    host = torch.empty_like(scores, device="cpu", pin_memory=True)
    host.copy_(scores, non_blocking=True)
    done = torch.cuda.current_stream(scores.device).record_event()

    def copied() -> Tensor:
        done.synchronize()
        return host

    return copied
