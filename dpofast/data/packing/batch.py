"""The micro-batches of an optimizer step, as the model takes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dpofast.data.packing.no_dict import NoDict
from dpofast_kernels.attention import SharedLayout

TokenIds = Sequence[int]
PromptAnswer = tuple[TokenIds, TokenIds]  # one sequence: prompt ids and answer ids


@dataclass(frozen=True)
class PackedPairs(NoDict):
    """One micro-batch, ready for the model: P pairs of S sequences, which are prompt and answer.

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
            Scored prompts, if any, are sequences after all answers.
        ref_logps: [2P] fp64, summed reference log-probs in nats, of chosen_0, rejected_0,
            chosen_1, ...; None while they are being made.
        num_tokens: tokens in the sequences of all pairs, padding excluded. A sequence that several
            pairs have counts once for each.
        sequence_tokens: tokens in all sequences, each counted once, padding excluded.
        uses: [B, L] int64, how often the sequences of the pairs contain the position; 0 for
            padding.
        shared_layout: attention layout of a packed row [1, L]; None for padded rows.
        weights: [P] fp64, factors of the pairs' losses; None if all are 1.
        label_confidence: [P] fp64, probability that the chosen answer is the better one; None if
            the options say it for all pairs.
        sets: [P] int64, number of each pair's dataset in `set_names`; None if there is only one.
        set_names: names of the datasets in a mixture, the same on all ranks.
        pairs: [P, 2] int64 on the CPU, sequences of chosen and rejected of each pair. A sequence
            can be in several pairs. None for (0, 1), (2, 3), ...
        prompts: [P] int64 on the CPU, the sequence that is each pair's prompt, or -1 if the prompt
            has one token, which nothing predicts; None if prompts aren't scored.
        coefficients: [S] fp64, what each nat of a sequence's log-prob adds to the summed loss; None
            if the loss has no likelihood term.
        likelihood: what each nat of a chosen answer and of its prompt adds to the summed loss, if
            their pair has the weight 1; None if the loss has no likelihood term.
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
    sequence_tokens: int
    uses: Tensor
    shared_layout: SharedLayout | None = None
    weights: Tensor | None = None
    label_confidence: Tensor | None = None
    sets: Tensor | None = None
    set_names: tuple[str, ...] = ()
    pairs: Tensor | None = None
    prompts: Tensor | None = None
    coefficients: Tensor | None = None
    likelihood: tuple[float, float] | None = None
    token_weights: Tensor | None = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[PromptAnswer],
        ref_logps: Sequence[float] | None,
        *,
        input_ids: Tensor,
        position_ids: Tensor | None,
        scored_positions: Sequence[np.ndarray],
        uses: Tensor,
        counts: Sequence[int] | None = None,
        shared_layout: SharedLayout | None = None,
    ) -> PackedPairs:
        """Make a micro-batch from the fields that a layout decides, and compute the other fields.

        Args:
            sequences: S sequences, in the order of the batch.
            ref_logps: one summed reference log-prob per sequence, in nats.
            scored_positions: one int64 array per sequence, with a position per answer token.
            counts: how often the pairs have each sequence; None for once.
            input_ids, position_ids, uses, shared_layout: as in the class.
        """
        empty = np.empty(0, np.int64)  # np.concatenate refuses an empty list
        answers = [answer for _, answer in sequences]
        lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
        num_tokens = sum(map(operator.mul, lengths, counts or [1] * len(lengths)))
        return cls(
            input_ids=input_ids,
            position_ids=position_ids,
            scored_positions=int64_tensor(np.concatenate([empty, *scored_positions])),
            labels=int64_tensor(list(chain.from_iterable(answers))),
            bounds=int64_tensor([0, *accumulate(map(len, answers))]),
            ref_logps=None if ref_logps is None else torch.tensor(ref_logps, dtype=torch.float64),
            num_tokens=num_tokens,
            sequence_tokens=sum(lengths),
            uses=uses,
            shared_layout=shared_layout,
        )

    def with_prompts(self, prompts: Sequence[tuple[TokenIds, np.ndarray]]) -> PackedPairs:
        """The batch with sequences more, after all answers: prompts that are scored.

        Args:
            prompts: token ids of a prompt, and the int64 positions of all of them but the last one,
                in the hidden states flattened. If they are those of the pairs, `prompts` is right.
        """
        if not prompts:
            return self
        # A prompt of one token has nothing to score, and is no sequence.
        scored = [(ids, torch.from_numpy(positions)) for ids, positions in prompts if len(ids) > 1]
        is_scored = torch.tensor([len(ids) > 1 for ids, _ in prompts])
        numbers = len(self.bounds) - 2 + is_scored.cumsum(0)
        lengths = torch.tensor([len(positions) for _, positions in scored], dtype=torch.int64)
        pairs = self.pairs
        if pairs is None:
            pairs = torch.arange(2 * self.num_pairs).view(-1, 2)
        return replace(
            self,
            scored_positions=torch.cat([self.scored_positions, *(each for _, each in scored)]),
            labels=torch.cat([self.labels, *(int64_tensor(ids[1:]) for ids, _ in scored)]),
            bounds=torch.cat([self.bounds, self.bounds[-1] + lengths.cumsum(0)]),
            pairs=pairs,
            prompts=torch.where(is_scored, numbers, -1),
        )

    def of_each_slot(self) -> PackedPairs:
        """The batch with a sequence for each answer of each pair; the body runs none twice.

        Pairs need that if they don't agree on a sequence's weights or on its reference log-prob.
        """
        if self.pairs is None:
            return self
        lengths = self.bounds.diff().tolist()
        num_answers = len(lengths) if self.prompts is None else int(self.pairs.max()) + 1
        order = [*self.pairs.flatten().tolist(), *range(num_answers, len(lengths))]
        positions, labels = (
            _picked(each, self.bounds.tolist(), order)
            for each in (self.scored_positions, self.labels)
        )
        more = self.pairs.numel() - num_answers  # sequences
        prompts = self.prompts
        if prompts is not None:
            prompts = torch.where(prompts < 0, prompts, prompts + more)
        return replace(
            self,
            scored_positions=positions,
            labels=labels,
            bounds=torch.tensor([0, *accumulate(lengths[sequence] for sequence in order)]),
            pairs=None if prompts is None else torch.arange(self.pairs.numel()).view(-1, 2),
            prompts=prompts,
        )

    @property
    def num_pairs(self) -> int:
        return (len(self.bounds) - 1) // 2 if self.pairs is None else len(self.pairs)

    @property
    def lengths(self) -> Tensor:
        """[P, 2] int64 on the CPU, scored tokens of chosen and rejected."""
        return self.of_pairs(self.bounds.diff()).view(-1, 2)

    def of_pairs(
        self,
        per_sequence: Tensor,  # [..., S]
    ) -> Tensor:
        """[..., 2P]: the numbers of chosen_0, rejected_0, chosen_1, ..."""
        if self.pairs is None:
            return per_sequence
        return per_sequence[..., _copied(self.pairs.flatten(), per_sequence.device)]

    def ref_of_sequences(self) -> Tensor:
        """[S] fp64: the reference's log-prob of each sequence; 0 for a prompt.

        All pairs that have a sequence have the same for it.
        """
        assert self.ref_logps is not None
        if self.pairs is None:
            return self.ref_logps
        found = self.ref_logps.new_zeros(len(self.bounds) - 1)
        # On a GPU, several equal numbers are written to one place in any order.
        found[_copied(self.pairs.flatten(), found.device)] = self.ref_logps
        return found

    def with_likelihood(self, of_answer: float, of_prompt: float) -> PackedPairs:
        """The batch with coefficients of its chosen answers and prompts, times their weights."""
        weights = torch.ones(self.num_pairs, dtype=torch.float64)
        if self.weights is not None:
            weights = self.weights
        coefficients = torch.zeros(len(self.bounds) - 1, dtype=torch.float64)  # [S]
        chosen = self.of_pairs(torch.arange(len(coefficients)))[0::2]  # [P]
        coefficients.index_add_(0, chosen, of_answer * weights)
        if self.prompts is not None:
            has_prompt = self.prompts >= 0
            of_prompts = of_prompt * weights[has_prompt]
            coefficients.index_add_(0, self.prompts[has_prompt], of_prompts)
        return replace(self, coefficients=coefficients, likelihood=(of_answer, of_prompt))

    def likelihood_of_pairs(
        self,
        logps: Tensor,  # [S]
    ) -> Tensor:
        """[P] fp64: what the likelihood terms of each pair add to the summed loss.

        Args:
            logps: summed log-probs of all sequences, on the device of the batch.
        """
        assert self.likelihood is not None
        of_answer, of_prompt = self.likelihood
        logps = logps.detach()
        terms = of_answer * self.of_pairs(logps)[0::2]  # [P]
        if self.prompts is not None:
            prompts = _copied(self.prompts, logps.device)
            terms = terms + of_prompt * torch.where(prompts >= 0, logps[prompts], 0.0)
        return terms if self.weights is None else terms * self.weights

    @property
    def num_body_tokens(self) -> int:
        """Positions that the model's body computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """Copy to `device`, except what the head cuts its chunks by, on the CPU."""
        moved = self._map(lambda tensor: _copied(tensor, device))
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
            if field.name not in ("bounds", "pairs", "prompts")
            and isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def int64_tensor(numbers: Sequence[int] | np.ndarray) -> Tensor:
    """Numbers as an int64 tensor. torch.tensor takes several times as long for a list."""
    return torch.from_numpy(np.asarray(numbers, np.int64))


def _copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    # With non_blocking, the host doesn't wait until the device has done all that it was given.
    return tensor.to(device, non_blocking=True)


def _picked(
    rows: Tensor,  # [N]
    bounds: Sequence[int],
    sequences: Sequence[int],
) -> Tensor:
    """The rows of some sequences, in their order."""
    parts = [rows[bounds[index] : bounds[index + 1]] for index in sequences]
    return torch.cat([rows[:0], *parts])


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
