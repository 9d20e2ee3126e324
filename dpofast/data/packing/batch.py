"""What one forward pass gets: some sequences laid out, and where their answers stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dpofast_kernels.attention import SharedLayout

TokenIds = Sequence[int]


@dataclass(frozen=True)
class PackedPairs:
    """Sequences of one micro-batch, chosen_0, rejected_0, chosen_1, ..., ready for the model.

    None needs a mask: a packed row has its `shared_layout`, and padding stands behind all tokens.
    `scored_positions` index the hidden states flattened to [B*L, H]: the hidden state there predicts
    the label beside it. Prompt positions are never among them, so they never reach the head.

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64, or None where the model's own counting is right.
        scored_positions: [N] int64, one per scored token.
        labels: [N] int64.
        bounds: [S+1] int64 on the CPU, the scored tokens of sequence s are bounds[s]:bounds[s+1].
        ref_logps: [S] fp64, summed reference log-probs in nats; None while those are made.
        num_tokens: tokens that are not padding, over all sequences.
        uses: [B, L] int64, how many sequences a position belongs to; 0 on padding.
        shared_layout: what attends to what in a packed row [1, L]; None where each sequence has a
            row of its own.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    scored_positions: Tensor
    labels: Tensor
    bounds: Tensor
    ref_logps: Tensor | None
    num_tokens: int
    uses: Tensor
    shared_layout: SharedLayout | None = None

    @property
    def num_pairs(self) -> int:
        return (len(self.bounds) - 1) // 2

    @property
    def num_body_tokens(self) -> int:
        """Positions that the model's body runs over, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """A copy on `device`; the bounds stay on the CPU, where the head's chunks are cut."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        layout = self.shared_layout
        return moved if layout is None else replace(moved, shared_layout=layout.to(device))

    def pin_memory(self) -> PackedPairs:
        """A copy in page-locked memory; PyTorch's DataLoader calls this where it was asked to."""
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
class StepBatch:
    """What one rank runs in one optimizer step: its micro-batches, and the pairs of all ranks."""

    micro_batches: list[PackedPairs]
    num_pairs: int  # of the global step: what the loss is divided by

    def pin_memory(self) -> StepBatch:
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


def collate_padded(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    ref_logps: Sequence[float] | None = None,
    pad_token_id: int = 0,
) -> PackedPairs:
    """Lay out (prompt ids, answer ids) sequences one per row, padded on the right.

    Right for every causal model, and without a mask: a token never looks at what stands behind it,
    and nothing that stands on padding is scored. Attention is faster so. No sequences give one row
    of one padding token with nothing scored, for a rank that has no pairs in a step.

    Args:
        sequences: S sequences; both parts of each have at least one token.
        ref_logps: one summed reference log-prob per sequence, in nats.
        pad_token_id: fills the rows' ends; any id of the vocabulary will do.
    """
    ids = [[*prompt, *answer] for prompt, answer in sequences]
    num_rows, width = padded_shape(sequences)
    input_ids = torch.full((num_rows, width), pad_token_id)  # [S, L]
    uses = torch.zeros_like(input_ids)
    uses[:, 0] = 1  # a token that runs along alone counts, as nothing else would
    scored, labels = [], []
    for index, (sequence, (prompt, answer)) in enumerate(zip(ids, sequences, strict=True)):
        input_ids[index, : len(sequence)] = torch.tensor(sequence)
        uses[index, : len(sequence)] = 1
        first = index * width + len(prompt) - 1  # the prompt's last token predicts the first label
        scored.append(torch.arange(first, first + len(answer)))
        labels.append(torch.tensor(answer))
    empty = torch.empty(0, dtype=torch.int64)
    bounds = list(accumulate((len(answer) for _, answer in sequences), initial=0))
    return PackedPairs(
        input_ids=input_ids,
        position_ids=None,
        scored_positions=torch.cat(scored) if scored else empty,
        labels=torch.cat(labels) if labels else empty.clone(),
        bounds=torch.tensor(bounds),
        ref_logps=None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
        num_tokens=sum(map(len, ids)),
        uses=uses,
    )


def padded_shape(sequences: Sequence[tuple[TokenIds, TokenIds]]) -> tuple[int, int]:
    """Rows and columns of what `collate_padded` makes of some sequences."""
    width = max((len(prompt) + len(answer) for prompt, answer in sequences), default=1)
    return max(len(sequences), 1), width
