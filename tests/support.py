"""Shared by several tests: tiny models, a tokenizer, pairs, and plain DPO to compare with."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from dpofast import DPOConfig, DPOTrainer

VOCAB_SIZE = 259  # 256 bytes and three special tokens
BETA = 0.5
LEARNING_RATE = 5e-3
TINY_FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    vocab = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama of two layers with random weights; `overrides` are fields of its config."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_FIELDS, **overrides}))


def tiny_mixtral(seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """A mixture of four experts, two for each token."""
    torch.manual_seed(seed)
    config = MixtralConfig(**{**TINY_FIELDS, "num_local_experts": 4, **overrides})
    return MixtralForCausalLM(config)


def token_pairs(num_pairs: int = 12, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Dataset:
    """Tokenised pairs of random ids and uneven lengths."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(rng.randint(low, high))]

    return Dataset.from_list(
        [
            {"prompt_ids": ids(1, 12), "chosen_ids": ids(1, 14), "rejected_ids": ids(1, 14)}
            for _ in range(num_pairs)
        ]
    )


def answer_logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[] fp64: log-prob of an answer in nats, from all logits of its sequence."""
    input_ids = torch.tensor([prompt + answer])
    logits = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    per_token = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return per_token.double().sum()


def naive_margin(model: Any, reference: Any, pair: dict[str, list[int]]) -> torch.Tensor:
    """[] fp64: chosen log-ratio - rejected log-ratio of one pair."""
    logratios = []
    for answer in (pair["chosen_ids"], pair["rejected_ids"]):
        with torch.no_grad():
            ref_logps = answer_logps(reference, pair["prompt_ids"], answer)
        logratios.append(answer_logps(model, pair["prompt_ids"], answer) - ref_logps)
    return logratios[0] - logratios[1]


def clip_exactly(parameters: Iterable[Any], max_norm: float) -> torch.Tensor:
    """Clip by a norm in float64: PyTorch's own is off by 1e-4 for 4 million elements."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.stack([p.grad.double().norm() for p in parameters]).norm()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class PlainDPO:
    """Textbook DPO: two models, one sequence at a time, AdamW at a constant learning rate."""

    def __init__(self, model: Any, beta: float, learning_rate: float, max_norm: float = 1.0):
        self.model, self.reference = model, copy.deepcopy(model).eval()
        self.beta, self.max_norm = beta, max_norm
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)

    def loss(self, pair: dict[str, list[int]]) -> torch.Tensor:
        """[] fp64: the loss of a pair."""
        return -F.logsigmoid(self.beta * naive_margin(self.model, self.reference, pair))

    def step(self, pairs: list[dict[str, list[int]]]) -> tuple[float, float]:
        """Take an optimizer step over these pairs: (loss, gradient norm before clipping)."""
        self.model.train()
        total = 0.0
        for pair in pairs:
            loss = self.loss(pair) / len(pairs)
            loss.backward()
            total += loss.item()
        norm = clip_exactly(self.model.parameters(), self.max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def train(self, pairs: Dataset, batch_size: int, steps: int, seed: int) -> list[tuple]:
        """Train in the order of transformers' Trainer, which permutes the pairs in every epoch.

        Returns:
            (loss, gradient norm) of each step.
        """
        history, epoch = [], 0
        while len(history) < steps:
            generator = torch.Generator().manual_seed(seed + epoch)
            order = torch.randperm(len(pairs), generator=generator).tolist()
            for start in range(0, len(order), batch_size):
                batch = [pairs[index] for index in order[start : start + batch_size]]
                history.append(self.step(batch))
            epoch += 1
        return history[:steps]


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Keep everything in float64, also where transformers casts to float32.

    It casts norms and softmax by the name `torch.float32`, which means float64 in here.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


Config = TypeVar("Config", bound=DPOConfig)


def run_config(folder: Path, config_class: type[Config], options: dict[str, Any] | None) -> Config:
    """The options of six steps of four examples, with the run and its store below `folder`."""
    return config_class(
        **{
            "output_dir": str(folder / "run"),
            "reference_store": str(folder / "store"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "beta": BETA,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "overwrite_output_dir": True,  # a test may go back to an older checkpoint
            "report_to": [],
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **(options or {}),
        }
    )


def make_trainer(
    folder: Path,
    model: Any = None,
    pairs: Any = None,
    *,
    options: dict[str, Any] | None = None,
    trainer_class: type[DPOTrainer] = DPOTrainer,
    **arguments: Any,
) -> DPOTrainer:
    """Make a trainer for six steps of four pairs, with its run and its store below `folder`."""
    config = run_config(folder, DPOConfig, options)
    return trainer_class(
        tiny_llama() if model is None else model,
        args=config,
        train_dataset=token_pairs(10) if pairs is None else pairs,
        **{"processing_class": byte_tokenizer(), **arguments},
    )


def history(trainer: DPOTrainer) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, including steps before a resume."""
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [(log["loss"], log["grad_norm"]) for log in logs]


def train(trainer: DPOTrainer) -> list[tuple[float, float]]:
    """Train, and return (loss, gradient norm) of every step."""
    trainer.train()
    return history(trainer)
