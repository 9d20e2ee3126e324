"""Floating-point operations that a training step needs, and what devices can do at most.

Products alone are counted, two operations per multiplication and addition; what is computed a
second time, as under gradient checkpointing, counts once (the PaLM paper's model FLOPs,
arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.model.parts import body_of, causal_lm, numel

# Dense bf16 and fp16 products, in operations per second, from the makers' data sheets; by a part of
# the device's name, the longer ones first.
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
# Forward, and the gradient of a product's input; that of a weight comes on top where it is trained.
PASSES_FROZEN, PASSES_TRAINED = 2, 3


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a CUDA or ROCm device at most; None where they aren't known."""
    if device.type != "cuda" or dtype not in HALVES:
        return None
    name = torch.cuda.get_device_name(device)
    known = sorted(PEAK_FLOPS, key=len, reverse=True)
    return next((PEAK_FLOPS[part] for part in known if part in name), None)


class TrainingFlops:
    """Counts the operations of a micro-batch: forward and backward of body, attention and head.

    Args:
        model: whose parameters are counted, before anything shards them.
    """

    def __init__(self, model: nn.Module) -> None:
        lm = causal_lm(model)
        self._config = lm.config.get_text_config()
        head = lm.get_output_embeddings()
        self._per_token = _product_flops(body_of(lm), self._config)
        self._per_scored = _product_flops(head, self._config)
        self._windows = _windows(self._config)
        heads = getattr(self._config, "num_attention_heads", 0)
        size = getattr(self._config, "head_dim", None)
        if size is None and heads:
            size = self._config.hidden_size // heads
        # scores and weighted values, each of one head's size
        self._per_score = 2 * PASSES_TRAINED * 2 * heads * (size or 0)

    def of(self, batch: PackedPairs) -> float:
        """Operations of one micro-batch; padding is no work."""
        layout = batch.shared_layout
        if layout is not None:
            num_tokens = layout.num_tokens
            segments = list(zip(layout.query_lengths, layout.key_lengths, strict=True))
        else:  # rows of their mean length
            num_tokens, num_rows = batch.num_tokens, len(batch.input_ids)
            segments = [(num_tokens // num_rows,) * 2] * num_rows
        scores = sum(
            count * sum(_scores(*segment, window) for segment in segments)
            for window, count in self._windows.items()
        )
        return (
            self._per_token * num_tokens
            + self._per_scored * len(batch.labels)
            + self._per_score * scores
        )


def _product_flops(module: nn.Module, config: Any) -> float:
    """Of all matrices of a module for one token, forward and backward."""
    embeddings = {
        id(parameter)
        for each in module.modules()
        if isinstance(each, nn.Embedding)
        for parameter in each.parameters()
    }
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings:
            continue
        passes = PASSES_TRAINED if parameter.requires_grad else PASSES_FROZEN
        total += 2 * passes * _active_share(name, config) * numel(parameter)
    return total


def _active_share(name: str, config: Any) -> float:
    """Of a mixture's experts that a token goes through."""
    if ".experts." not in name:
        return 1.0
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for key in names if (value := getattr(config, key, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / count if count and used else 1.0


def _windows(config: Any) -> dict[int | None, int]:
    """How many layers attend within which window; None is no window."""
    num_layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return {window: num_layers}
    sliding = sum(each == "sliding_attention" for each in types)
    full = sum(each == "full_attention" for each in types)
    return {None: full} if window is None else {None: full, window: sliding}


def _scores(num_queries: int, num_keys: int, window: int | None) -> int:
    """Scores of a causal segment whose queries are the last of its keys."""
    first = num_keys - num_queries + 1  # keys that the first query sees
    if window is None or window >= num_keys:
        return num_queries * (first + num_keys) // 2
    growing = max(window - first, 0)  # queries that see fewer than the window
    return growing * (first + window - 1) // 2 + (num_queries - growing) * window
