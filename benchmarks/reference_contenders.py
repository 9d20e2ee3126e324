"""Contenders of the race of reference log-probs: our builder, TRL's precompute, plain PyTorch.

All score the same pairs with the same model. The clock of a contender's `Meter` starts when model
and pairs are loaded and the model has run on a few tokens. It stops when all log-probs are
computed. Each contender returns [2n] fp64: chosen and rejected log-prob of each pair in turn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.train_cases import Work
from benchmarks.train_contenders import (
    Entry,
    Meter,
    count_trl_rows,
    naive_batch,
    naive_logps,
    packed_attention_of,
    token_trainer,
    trainer_options,
)


def _warm(model: Any) -> None:
    """Run the model on a few tokens: the first forward pass of a process takes longer."""
    with torch.no_grad():
        model(input_ids=torch.ones(1, 8, dtype=torch.int64, device=model.device))


def _ours(work: Work, meter: Meter) -> np.ndarray:
    """Let the trainer find the missing rows, score and commit them, and read them back.

    The clock starts after the model's identity is computed and the checks at the start of a run are
    done. TRL's clock, too, starts only after TRL has hashed the model.
    """
    from dpofast import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        work.model(),
        args=DPOConfig(
            **trainer_options(work, "ours"),
            layout="shared",
            max_tokens_per_microbatch=work.case.max_tokens,
            precompute_ref_log_probs=False,  # a temporary store, which the next round won't find
        ),
        train_dataset=work.timed_pairs,
        processing_class=work.tokenizer,
    )
    trainer.loaders.settle()
    _warm(trainer.model)
    meter.watch(trainer.model)
    meter.attention = packed_attention_of(work)
    meter.step_ends()
    train_set = trainer.data.prepare(trainer.train_dataset, "train")
    trainer.loaders.score(train_set)
    meter.step_ends()
    assert train_set.ref_logps is not None
    return train_set.ref_logps.reshape(-1)


def _trl(work: Work, meter: Meter) -> np.ndarray:
    """Let TRL's trainer precompute, which its constructor does after hashing the model."""
    import trl

    count_trl_rows(meter)

    class TimedTrainer(token_trainer()):  # type: ignore[misc]
        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            _warm(self.model)
            meter.watch(self.model, head=False)
            meter.step_ends()
            dataset = super()._precompute_ref_logps(*arguments, **named)
            meter.step_ends()
            return dataset

    meter.attention = work.attention
    trainer = TimedTrainer(
        work.model(),
        args=trl.DPOConfig(
            **trainer_options(work, "trl"),
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=work.batch_size,
        ),
        train_dataset=_uncached(work),
        processing_class=work.tokenizer,
    )
    sides = ("ref_chosen_logps", "ref_rejected_logps")
    return np.array([trainer.train_dataset[side] for side in sides]).T.reshape(-1)


def _uncached(work: Work) -> Any:
    """Copy the pairs: TRL would find an earlier round's log-probs in the cache of the original."""
    from datasets import Dataset

    return Dataset.from_list(work.timed_pairs.to_list())


def _naive(work: Work, meter: Meter) -> np.ndarray:
    """Score padded batches with all of their logits."""
    model, pairs = work.model().eval(), work.timed_pairs.to_list()
    _warm(model)
    meter.watch(model)
    meter.attention = work.attention
    meter.step_ends()
    found = []
    for start in range(0, len(pairs), work.batch_size):
        batch = pairs[start : start + work.batch_size]
        with torch.no_grad():
            logps = naive_logps(
                model, *naive_batch(batch, work.tokenizer.pad_token_id, work.device)
            )
        found.append(logps.cpu().numpy().reshape(2, -1).T)
    meter.step_ends()
    return np.concatenate(found).reshape(-1)


ENTRIES: dict[str, Entry] = {
    "ours": Entry(_ours, "ours: packed rows, each prompt once, kept in a store", "shared"),
    "trl": Entry(_trl, "TRL's precompute, kept beside the dataset"),
    "naive": Entry(_naive, "plain PyTorch: padded rows, all logits"),
}
OURS, TRUTH = "ours", "naive"
