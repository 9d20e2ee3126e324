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
            Scored prompts, if any, are sequences after those of all pairs.
        ref_logps: [2P] fp64, summed reference log-probs in nats; None while they are being made.
        num_tokens: tokens in all sequences, padding excluded.
        uses: [B, L] int64, number of sequences that contain the position; 0 for padding.
        shared_layout: attention layout of a packed row [1, L]; None for padded rows.
        weights: [P] fp64, factors of the pairs' losses; None if all are 1.
        label_confidence: [P] fp64, probability that the chosen answer is the better one; None if
            the options say it for all pairs.
        sets: [P] int64, number of each pair's dataset in `set_names`; None if there is only one.
        set_names: names of the datasets in a mixture, the same on all ranks.
        prompts: [R] int64 on the CPU, the pair of each scored prompt; None if prompts aren't
            scored.
        coefficients: [S] fp64, what each nat of a sequence's log-prob adds to the summed loss; None
            if the loss has no likelihood term.
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
    weights: Tensor | None = None
    label_confidence: Tensor | None = None
    sets: Tensor | None = None
    set_names: tuple[str, ...] = ()
    prompts: Tensor | None = None
    coefficients: Tensor | None = None
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
        prompt_positions: list[Tensor] | None = None,
    ) -> PackedPairs:
        """Make a micro-batch from the fields that a layout decides, and compute the other fields.

        Args:
            sequences: S sequences, in the order of the batch.
            ref_logps: one summed reference log-prob per sequence, in nats.
            scored_positions: one tensor per sequence, with a position per answer token.
            input_ids, position_ids, uses, shared_layout: as in the class.
            prompt_positions: one tensor per pair, with a position per prompt token but the last;
                None to score no prompts.
        """
        empty = torch.empty(0, dtype=torch.int64)  # torch.cat refuses an empty list
        labels = [torch.tensor(answer) for _, answer in sequences]
        num_tokens = sum(len(prompt) + len(answer) for prompt, answer in sequences)
        prompts = None
        if prompt_positions is not None:
            # A prompt of one token has nothing to score, and is no sequence.
            scored = [pair for pair, positions in enumerate(prompt_positions) if len(positions)]
            prompts = torch.tensor(scored, dtype=torch.int64)
            labels += [torch.tensor(sequences[2 * pair][0][1:]) for pair in scored]
            scored_positions = [*scored_positions, *(prompt_positions[pair] for pair in scored)]
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            scored_positions=torch.cat([empty, *scored_positions]),
            labels=torch.cat([empty, *labels]),
            bounds=torch.tensor([0, *accumulate(map(len, labels))]),
            ref_logps=None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
            num_tokens=num_tokens,
            uses=uses,
            shared_layout=shared_layout,
            prompts=prompts,
        )

    @property
    def num_pairs(self) -> int:
        return (len(self.bounds) - 1 - (0 if self.prompts is None else len(self.prompts))) // 2

    @property
    def lengths(self) -> Tensor:
        """[P, 2] int64 on the CPU, scored tokens of chosen and rejected."""
        return self.bounds[: 2 * self.num_pairs + 1].diff().view(-1, 2)

    def with_likelihood(self, of_answer: float, of_prompt: float) -> PackedPairs:
        """The batch with coefficients of its chosen answers and prompts, times their weights."""
        weights = torch.ones(self.num_pairs, dtype=torch.float64)
        if self.weights is not None:
            weights = self.weights
        coefficients = torch.zeros(len(self.bounds) - 1, dtype=torch.float64)  # [S]
        end = 2 * self.num_pairs
        coefficients[0:end:2] = of_answer * weights
        if self.prompts is not None:
            coefficients[end:] = of_prompt * weights[self.prompts]
        return replace(self, coefficients=coefficients)

    def likelihood_of_pairs(
        self,
        logps: Tensor,  # [S]
    ) -> Tensor:
        """[P] fp64: what the likelihood terms of each pair add to the summed loss.

        Args:
            logps: summed log-probs of all sequences, on the device of the batch.
        """
        assert self.coefficients is not None
        terms, end = self.coefficients * logps.detach(), 2 * self.num_pairs
        of_pairs = terms[0:end:2].clone()
        if self.prompts is not None:
            of_pairs.index_add_(0, self.prompts.to(terms.device), terms[end:])
        return of_pairs

    @property
    def num_body_tokens(self) -> int:
        """Positions that the model's body computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """Copy to `device`, except what the head cuts its chunks by, on the CPU."""
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
            if field.name not in ("bounds", "prompts")
            and isinstance(value := getattr(self, field.name), Tensor)
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
