"""A short supervised warm-up, so that DPO starts from a model that can answer at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class WarmupOptions:
    """Plain AdamW with a linear rise and a cosine fall.

    Attributes:
        epochs: passes over the texts.
        batch_size: texts per step.
        learning_rate: at its highest.
        warmup_steps: steps until then.
    """

    epochs: int = 9
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 40


def warm_up(
    model: Any,
    tokenizer: Any,
    texts: list[tuple[str, str]],
    options: WarmupOptions | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train on answers alone, by next-token cross-entropy.

    Args:
        model: causal LM in float32; changed in place.
        tokenizer: with a chat template and a pad token.
        texts: (prompt, answer).
        on_step: called with (step, number of steps, loss) after each.
    """
    options = options or WarmupOptions()
    rows = [encode_turn(tokenizer, *text) for text in texts]
    batches = list(_batches(rows, options, tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(options, len(batches)))
    model.train()
    for step, (input_ids, labels) in enumerate(batches, start=1):
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if on_step:
            on_step(step, len(batches), loss.item())


def encode_turn(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of one exchange, split where the answer begins; the answer ends its turn."""
    messages = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    tail = tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"]
    return ids, tail


def _schedule(options: WarmupOptions, num_steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        done = (step - options.warmup_steps) / max(1, num_steps - options.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _batches(
    rows: list[tuple[list[int], list[int]]], options: WarmupOptions, pad_token_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of every epoch in random order; neighbours are sorted by length, to pad little."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for drawn in _chunks(order, 4 * options.batch_size):
            near = sorted((rows[index] for index in drawn), key=lambda row: len(row[0] + row[1]))
            for batch in _chunks(near, options.batch_size):
                yield _padded(batch, pad_token_id)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _padded(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """-> input_ids and labels, [B, L] each; -100 where nothing is learnt."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for index, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        input_ids[index, :length] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) : length] = torch.tensor(answer)
    return input_ids, labels
