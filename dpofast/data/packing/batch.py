"""The micro-batches of an optimizer step, as the model takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpofast.data.packing.no_dict import NoDict
from dpofast_kernels.attention import SharedLayout

TokenIds = Sequence[int]
PromptAnswer = tuple[TokenIds, TokenIds]  # one sequence: prompt ids and answer ids


@dataclass(frozen=True)
class PackedPairs(NoDict):
    """One micro-batch, ready for the model; its sequences are chosen_0, rejected_0, chosen_1, ...

    The model needs no attention mask. In a packed row, `shared_layout` says which tokens attend to
    which. In padded rows, padding comes after all tokens, where a causal model never looks.
    Prompt tokens are not scored: only the prompt's last position reaches the head, because it
    predicts the answer's first token.

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64; None if the model's own counting is right.
        scored_positions: [N] int64, indices into the hidden states flattened to [B*L, H]. The
            hidden state at scored_positions[n] predicts labels[n].
        labels: [N] int64, the answers' tokens.
        bounds: [S+1] int64 on the CPU; the scored tokens of sequence s are bounds[s]:bounds[s+1].
        ref_logps: [S] fp64, summed reference log-probs in nats; None while they are being made.
        num_tokens: tokens in all sequences, padding excluded.
        uses: [B, L] int64, number of sequences that contain the position; 0 for padding.
        shared_layout: attention layout of a packed row [1, L]; None for padded rows.
        token_weights: [N] fp64, factor of each token's log-prob in the sum of its sequence;
            `ref_logps` are weighted in the same way. None if all are 1.
    """

    WHAT: ClassVar[str] = (
        "It holds rows of several sequences and their reference log-probs: call "
        "super().compute_loss(model, inputs) for its loss, and give a loss or metrics of your own "
        "as loss_fn and metrics_fn; see docs/extending.md."
    )

    input_ids: Tensor
    position_ids: Tensor | None
    scored_positions: Tensor
    labels: Tensor
    bounds: Tensor
    ref_logps: Tensor | None
    num_tokens: int
    uses: Tensor
    shared_layout: SharedLayout | None = None
    token_weights: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[PromptAnswer],
        ref_logps: Sequence[float] | None,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None,
        scored_positions: list[Tensor],
        uses: Tensor,
        shared_layout: SharedLayout | None = None,
    ) -> PackedPairs:
        """Make a micro-batch from the fields that a layout decides, and compute the other fields.

        Args:
            sequences: S sequences, in the order of the batch.
            ref_logps: one summed reference log-prob per sequence, in nats.
            scored_positions: one tensor per sequence, with a position per answer token.
            input_ids, position_ids, uses, shared_layout: as in the class.
        """
        empty = torch.empty(0, dtype=torch.int64)  # torch.cat refuses an empty list
        labels = [torch.tensor(answer) for _, answer in sequences]
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            scored_positions=torch.cat([empty, *scored_positions]),
            labels=torch.cat([empty, *labels]),
            bounds=torch.tensor([0, *accumulate(len(answer) for _, answer in sequences)]),
            ref_logps=None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
            num_tokens=sum(len(prompt) + len(answer) for prompt, answer in sequences),
            uses=uses,
            shared_layout=shared_layout,
        )

    @property
    def num_pairs(self) -> int:
        return (len(self.bounds) - 1) // 2

    @property
    def num_body_tokens(self) -> int:
        """Positions that the model's body computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """Copy to `device`, except the bounds: the head cuts its chunks by them on the CPU."""
        # With non_blocking, a copy from pinned memory overlaps with computation.
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        layout = self.shared_layout
        return moved if layout is None else replace(moved, shared_layout=layout.to(device))

    def pin_memory(self) -> PackedPairs:
        """Copy to page-locked memory; PyTorch's DataLoader calls this if `pin_memory` is set."""
        pinned = self._map(Tensor.pin_memory)
        layout = self.shared_layout
        return pinned if layout is None else replace(pinned, shared_layout=layout.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> PackedPairs:
        moved: dict[str, Any] = {
            field.name: function(value)
            for field in fields(self)
            if field.name != "bounds" and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StepBatch(NoDict):
    """The part of one optimizer step that one rank runs.

    Attributes:
        micro_batches: this rank's micro-batches.
        num_pairs: pairs in the step on all ranks, by which the loss is divided.
        indices: the pairs of each micro-batch, counted in the dataset.
    """

    WHAT: ClassVar[str] = (
        "An item of a data loader is a whole optimizer step; its micro_batches hold rows of "
        "several sequences: call trainer.compute_loss(model, batch) for its loss; see "
        "docs/extending.md."
    )

    micro_batches: list[PackedPairs]
    num_pairs: int
    indices: tuple[list[int], ...] = ()

    def pin_memory(self) -> StepBatch:
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])
