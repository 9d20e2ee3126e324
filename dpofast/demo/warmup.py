"""A short supervised warm-up. Without it, DPO would start from a model that can't answer at all."""

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
    """Options of AdamW and its schedule, which rises linearly and falls along a cosine.

    Attributes:
        epochs: passes over the texts.
        batch_size: texts in a step.
        learning_rate: highest learning rate.
        warmup_steps: steps until the learning rate is at its highest.
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
    """Train a model by next-token cross-entropy on the answers; prompts aren't learnt.

    Args:
        model: causal LM in float32; changed in place.
        tokenizer: tokenizer with a chat template and a pad token.
        texts: (prompt, answer) pairs.
        options: options of the optimizer; by default WarmupOptions().
        on_step: called with (step, number of steps, loss) after each step.
    """
    options = options or WarmupOptions()
    turns = [encode_turn(tokenizer, *text) for text in texts]
    batches = list(_batches(turns, options, tokenizer.pad_token_id))
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
    """Tokenise one exchange.

    Returns:
        Token ids of the prompt, and of the answer up to and including its end-of-turn token.
    """
    messages = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    tail = tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"]
    return ids, tail


def _schedule(options: WarmupOptions, num_steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step, as LambdaLR takes it."""

    def factor(step: int) -> float:
        if step < options.warmup_steps:
            return (step + 1) / options.warmup_steps
        done = (step - options.warmup_steps) / max(1, num_steps - options.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))  # ends at 5 % of the highest

    return factor


def _batches(
    turns: list[tuple[list[int], list[int]]], options: WarmupOptions, pad_token_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of all epochs, shuffled, with turns of similar length in each batch."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.epochs):
        order = torch.randperm(len(turns), generator=generator).tolist()
        for drawn in _chunks(order, 4 * options.batch_size):
            # Sorting four batches at a time saves padding and keeps most of the randomness.
            near = sorted((turns[i] for i in drawn), key=lambda turn: len(turn[0] + turn[1]))
            for batch in _chunks(near, options.batch_size):
                yield _padded(batch, pad_token_id)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _padded(turns: list[tuple[list[int], list[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad turns on the right.

    Returns:
        input_ids and labels, [B, L] each; labels are -100 on prompts and padding.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in turns)
    input_ids = torch.full((len(turns), width), pad_token_id)
    labels = torch.full((len(turns), width), -100)
    for index, (prompt, answer) in enumerate(turns):
        length = len(prompt) + len(answer)
        input_ids[index, :length] = torch.tensor([*prompt, *answer])
        labels[index, len(prompt) : length] = torch.tensor(answer)
    return input_ids, labels
