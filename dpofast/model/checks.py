"""Short checks of a model before a run: what would train it wrongly stops the run instead."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs, TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ConfigError, ModelError
from dpofast.model.attention import AttentionCall, any_dtype_attention, recorded_calls
from dpofast.model.forward import evaluating, micro_batch, run_batch, run_body
from dpofast.model.head import head_options
from dpofast.model.parts import causal_lm, num_layers, shape
from dpofast_kernels.attention import AttentionOptions, WrongBackendError, probe
from dpofast_kernels.head.naive import naive_logits
from dpofast_kernels.rounding import product_precision

# Packed and padded hidden states may differ by this much of their size, by rounding alone. Models
# of transformers compute their norms in float32, whatever their dtype.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


# A part of the model may differ from stock by this much of the logits' size, by rounding alone.
HEAD_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def check_model(
    model: nn.Module, layout: Layout, device: torch.device, autocast_dtype: torch.dtype | None
) -> str | None:
    """All checks that a model must pass before it trains, or scores.

    Args:
        model: policy or reference.
        layout: of its micro-batches.
        device: where it is to run.
        autocast_dtype: of its forward pass; None without autocast.

    Returns:
        Which attention it runs on, in words; None where that is its own.

    Raises:
        ModelError: its head does what we don't know.
        ConfigError: packed rows would be wrong for it, or attention is on this device.
    """
    with any_dtype_attention(causal_lm(model).config):
        check_head(model)
        if not layout.is_packed:
            return None
        calls = check_layout(layout, model)
    return check_attention(calls, device, autocast_dtype)


def some_sequences(model: nn.Module) -> list[tuple[TokenIds, TokenIds]]:
    """Two pairs of (prompt ids, answer ids) that any model knows; the second's begin alike."""
    vocab_size = shape(causal_lm(model).get_input_embeddings().weight)[0]
    ids = [(7 * index + 1) % vocab_size for index in range(14)]
    return [
        (ids[:5], ids[5:9]),
        (ids[:5], ids[9:12]),
        (ids[2:4], ids[6:12]),
        (ids[2:4], [*ids[6:8], *ids[1:4]]),
    ]


def check_layout(layout: Layout, model: nn.Module) -> list[AttentionCall]:
    """Compare a packed row's hidden states with those of padded rows, on a few tokens.

    Attention runs the plain way here, whatever the device: `check_attention` looks at the other.

    Returns:
        What the model's layers asked of our attention.

    Raises:
        ConfigError: they differ, or a layer doesn't call our attention.
    """
    lm = causal_lm(model)
    sequences = some_sequences(model)
    with recorded_calls() as calls:
        packed = _scored_states(model, layout.collate(sequences))
    padded = _scored_states(model, collate_padded(sequences))
    error = ((packed - padded).norm() / padded.norm().clamp_min(1e-12)).item()
    dtype = product_precision(lm.get_output_embeddings().weight.dtype, packed.device)
    if len(calls) < num_layers(lm) or not error <= TOLERANCE[dtype]:
        raise ConfigError(
            f"layout: {layout.name} rows give {type(lm).__name__} other hidden "
            f"states than padded ones (by {error:.1%}); use layout: padded, and please report "
            "this model type."
        )
    return calls


@torch.no_grad()
def _scored_states(model: nn.Module, batch: PackedPairs) -> Tensor:
    """[N, H] float32 hidden states that predict the labels."""
    batch = batch.to(next(model.parameters()).device)
    with evaluating(model), micro_batch(model, batch):
        hidden_states = run_body(model, batch)
    return hidden_states.flatten(0, 1).index_select(0, batch.scored_positions).float()


def check_attention(
    calls: list[AttentionCall], device: torch.device, autocast_dtype: torch.dtype | None
) -> str:
    """Compare the attention that will run with its naive twin, for each kind of layer.

    Args:
        calls: what the layers ask for.
        device: where they run.
        autocast_dtype: in which they run, where not in their tensors' own.

    Returns:
        Which it is, in words.

    Raises:
        ConfigError: it is wrong on this device, or doesn't run there.
    """
    remedy = "use layout: padded, and please report this"
    kinds = dict.fromkeys(_as_run(call, autocast_dtype) for call in calls)
    try:
        found = dict.fromkeys(_words(_probed(device, kind), kind) for kind in kinds)
    except WrongBackendError as error:
        raise ConfigError(f"layout: {error}; {remedy}.") from error
    except Exception as error:  # compilers and packages of kernels raise anything
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(
            f"layout: packed rows' attention doesn't run on {device} ({reason}); {remedy}."
        ) from error
    return f"{', '.join(found)}; compared with its naive twin on {device}"


def _as_run(call: AttentionCall, autocast_dtype: torch.dtype | None) -> AttentionCall:
    """Autocast leaves float64 alone."""
    if autocast_dtype is None or call.dtype == torch.float64:
        return call
    return replace(call, dtype=autocast_dtype)


@functools.cache
def _probed(device: torch.device, call: AttentionCall) -> str:
    """The name of the backend that a layer gets, found right; once in a process."""
    options = AttentionOptions(
        scale=call.scale,
        window=call.window,
        softcap=call.softcap,
        sinks=torch.zeros(call.num_heads) if call.has_sinks else None,
    )
    heads = (call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim)
    return probe(device, call.dtype, *heads, options)


def _words(backend: str, call: AttentionCall) -> str:
    """One kind of layer, and the backend that it gets."""
    asked = {"window": call.window, "softcap": call.softcap, "sinks": call.has_sinks or None}
    more = "".join(
        f", {name}" if value is True else f", {name} {value:g}"
        for name, value in asked.items()
        if value is not None
    )
    dtype = str(call.dtype).removeprefix("torch.")
    return f"{backend} ({dtype}, {call.num_heads} heads of {call.head_dim}{more})"


def check_head(model: nn.Module) -> None:
    """Compare body, head and what follows it with the model's own forward, on a few tokens.

    Raises:
        ModelError: they differ, so the family does something to its hidden states or logits that
            `head_options` doesn't know; training on it would be wrong.
    """
    lm = causal_lm(model)
    vocab_size = shape(lm.get_input_embeddings().weight)[0]
    device = next(lm.parameters()).device
    input_ids = torch.arange(8, device=device)[None] * 7 % vocab_size  # [1, 8]
    batch = PackedPairs(
        input_ids=input_ids,
        position_ids=None,
        scored_positions=torch.arange(8, device=device),
        labels=input_ids[0],
        bounds=torch.tensor([0, 8]),
        ref_logps=None,
        num_tokens=8,
        uses=torch.ones_like(input_ids),
    )
    options = head_options(lm.config)
    with evaluating(model):
        stock = model(input_ids=input_ids, use_cache=False)
        with micro_batch(model, batch):
            ours = run_batch(model, batch, _LogitsTask(options))
    expected = stock.logits[0].float()  # [8, V]
    error = ((ours.float() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    dtype = product_precision(lm.get_output_embeddings().weight.dtype, device)
    if not error <= HEAD_TOLERANCE[dtype]:
        raise ModelError(
            f"{type(lm).__name__} does something to its logits that dpofast doesn't know "
            f"(they differ by {error:.1%} from body and head alone), so its log-probs would be "
            "wrong; please report this model type."
        )


class _LogitsTask:
    """A head task that gives the logits themselves; for `check_head` alone."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def __call__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return naive_logits(hidden_states, weight, replace(self.options, bias=bias))
