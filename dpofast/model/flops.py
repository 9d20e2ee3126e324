"""Floating-point operations of a training step, and the most that devices can do in a second.

Only matrix products count, with two operations for a multiplication and its addition. Work that
gradient checkpointing does a second time counts once. A recurrence counts as it is defined, token
by token: what kernels do in addition, to run it in chunks, doesn't count.

Source: the model FLOPs of the PaLM paper, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.model.layer_sizes import (
    attention_sizes,
    experts_per_token,
    num_experts,
    state_sizes,
)
from dpofast.model.parts import body_of, causal_lm, numel, shape
from dpofast.model.unreached import reached_modules

# Operations per second in dense bf16 and fp16 products, from the makers' data sheets. A key is a
# part of the name that PyTorch reports for the device.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250X": 383e12,
}
HALVES = (torch.bfloat16, torch.float16)
# Products per weight: one in the forward, one for the gradient of the input, and, if the weight is
# trained, one for its own gradient.
PASSES_FROZEN, PASSES_TRAINED = 2, 3
ADAPTERS_OF_LAYERS = "_adapter_list."  # part of the names of adapters for one layer each


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak operations per second of a CUDA or ROCm device; None if they aren't known."""
    if device.type != "cuda" or dtype not in HALVES:
        return None
    name = torch.cuda.get_device_name(device)
    known = sorted(PEAK_FLOPS, key=len, reverse=True)  # "H100 PCIe" before "H100"
    return next((PEAK_FLOPS[part] for part in known if part in name), None)


class TrainingFlops:
    """Counts the operations of a micro-batch, forward and backward.

    Args:
        model: the policy. Its parameters are counted here, before anything shards them.

    Attributes:
        per_token: operations of the body's products and of its states for one token.
        per_scored: operations of the head's product for one scored token.
        per_score: operations of attention for one query and one key, summed over all layers whose
            attention has the same window and the same chunks. The keys are these two; None for no
            window or no chunks.

    Raises:
        UnknownSizesError: the sizes of the model's layers can't be told.
    """

    def __init__(self, model: nn.Module) -> None:
        lm = causal_lm(model)
        config = lm.config.get_text_config()
        self.per_token = _product_flops(body_of(lm), config)
        for states in state_sizes(config):
            size = states.num_heads * states.key_dim * states.value_dim
            self.per_token += 2 * PASSES_TRAINED * states.products * size
        self.per_scored = _product_flops(lm.get_output_embeddings(), config)
        self.per_score: dict[tuple[int | None, int | None], float] = {}
        for layer in attention_sizes(config):
            # One product for the scores and one for the values, each forward and backward.
            flops = 2 * PASSES_TRAINED * layer.num_heads * (layer.key_dim + layer.value_dim)
            limits = layer.window, layer.chunk
            self.per_score[limits] = self.per_score.get(limits, 0) + flops

    def of(self, batch: PackedPairs) -> float:
        """Operations of one micro-batch, padding excluded."""
        layout = batch.shared_layout
        if layout is not None:
            num_tokens = layout.num_tokens
            segments = list(zip(layout.query_lengths, layout.key_lengths, strict=True))
        else:
            # The lengths of padded rows are on the device; their mean is close enough.
            num_tokens, num_rows = batch.sequence_tokens, len(batch.input_ids)
            segments = [(num_tokens // num_rows,) * 2] * num_rows
        attention = sum(
            flops * sum(causal_scores(*segment, *limits) for segment in segments)
            for limits, flops in self.per_score.items()
        )
        return self.per_token * num_tokens + self.per_scored * len(batch.labels) + attention


def _product_flops(module: nn.Module, config: Any) -> float:
    """Operations of all matrices of a module for one token of text, forward and backward."""
    total = 0.0
    counted = set()
    for name, submodule in reached_modules(module):
        if isinstance(submodule, nn.Embedding):  # looked up, not multiplied
            continue
        is_convolution = isinstance(submodule, nn.modules.conv._ConvNd)
        for own_name, parameter in submodule.named_parameters(recurse=False):
            if parameter.dim() < 2 or own_name.endswith("bias"):
                continue
            # The block that holds Zamba2's adapters runs in several layers, each adapter in one.
            if ADAPTERS_OF_LAYERS in name and id(parameter) in counted:
                continue
            counted.add(id(parameter))
            share = 1.0 if is_convolution else _active_share(name, shape(parameter), config)
            passes = PASSES_TRAINED if parameter.requires_grad else PASSES_FROZEN
            total += 2 * passes * share * numel(parameter)
    return total


def _active_share(module_name: str, size: Sequence[int], config: Any) -> float:
    """Share of a weight that a token is multiplied with; below 1 for a mixture's experts.

    A weight with three dimensions holds all experts of a layer. Otherwise an expert is a module of
    its own, in a list that is called `experts`.
    """
    if len(size) == 3:
        return experts_per_token(config) / size[0]
    if re.search(r"\bexperts\.\d+\b", module_name):
        return experts_per_token(config) / num_experts(config)
    return 1.0


def causal_scores(
    num_queries: int, num_keys: int, window: int | None = None, chunk: int | None = None
) -> int:
    """Number of (query, key) pairs in a causal segment in which the query sees the key.

    Args:
        num_queries: queries of the segment, which are its last tokens.
        num_keys: keys of the segment, which begin with the first token of a sequence.
        window: most keys that a query sees, its own included; None for all before it.
        chunk: number of keys in a chunk; a query sees those of its own chunk. None for no chunks.
    """
    before = num_keys - num_queries
    return _scores_of_start(num_keys, window, chunk) - _scores_of_start(before, window, chunk)


def _scores_of_start(length: int, window: int | None, chunk: int | None) -> int:
    """The pairs among the first `length` tokens of a sequence."""
    if chunk is not None:
        num_chunks, rest = divmod(length, chunk)
        return num_chunks * causal_scores(chunk, chunk, window) + causal_scores(rest, rest, window)
    growing = length if window is None else min(window, length)  # queries that see all before them
    return growing * (growing + 1) // 2 + (length - growing) * growing
