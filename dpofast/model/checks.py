"""Short checks of a model before a run: a model that would be trained wrongly stops the run."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs, TokenIds
from dpofast.data.packing.collate import Layout
from dpofast.data.packing.padded_rows import collate_padded
from dpofast.errors import ConfigError, DPOFastError, ModelError
from dpofast.model.attention import LayerAttention, any_dtype_attention, recorded_calls
from dpofast.model.context import context_of
from dpofast.model.forward import evaluating, micro_batch, run_batch, run_body
from dpofast.model.head import head_options
from dpofast.model.head_check import check_head_backend
from dpofast.model.liger import has_liger, own_layers, runs_liger
from dpofast.model.parts import causal_lm, is_placed, num_attention_layers
from dpofast.model.quantised import computing_dtype
from dpofast.model.recurrent import describe_recurrence, needs_device, runs_kernel
from dpofast.model.recurrent_probe import probed
from dpofast.model.rope import check_rope
from dpofast.model.vocabulary import vocabulary_of
from dpofast.options.liger import OPTION as LIGER
from dpofast_kernels.attention import AttentionOptions, WrongBackendError, probe
from dpofast_kernels.head.naive import naive_logits
from dpofast_kernels.rounding import product_precision

# Largest difference between packed and padded hidden states that rounding explains, relative to
# the norm of the padded ones. The bound for float64 is not tighter because the normalisation layers
# of transformers' models compute in float32, whatever the model's dtype.
STATES_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

# Tokens of the longer row in `check_rows`.
LONG_ROW = 24

# Largest relative difference between the model's own logits and ours that rounding explains. The
# same bounds hold for the auxiliary loss of the routers.
HEAD_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def check_model(
    model: nn.Module,
    layout: Layout,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    head_backend: str = "auto",
) -> tuple[str, ...]:
    """Runs all checks that a model must pass before it trains or scores.

    Args:
        model: policy or reference.
        layout: layout of its micro-batches.
        device: device that it will run on; it may still be elsewhere.
        autocast_dtype: dtype of the forward pass under autocast; None without autocast.
        head_backend: the head's back end, as in HeadOptions.

    Returns:
        Lines for the log: the attention backends of its packed rows, and how its layers with a
        state run them. None for padded rows, which run the model's own layers.

    Raises:
        ModelError: the model does something to its logits that dpofast doesn't know, or its
            log-probs would depend on the other rows of a batch.
        ConfigError: packed rows would be wrong for this model, our attention or our head is wrong
            or fails on this device, or Liger's layers are wrong for this model.
    """
    check_rope(model)
    lm = causal_lm(model)
    with any_dtype_attention(lm.config), where_kernels_run(model, device):
        check_liger(model)
        with own_layers(model):
            check_head(model)
        check_head_backend(model, device, autocast_dtype, head_backend)
        if not layout.is_packed:
            check_rows(model)
            return ()
        calls = check_layout(layout, model)
    attention = check_attention(calls, device, autocast_dtype) if calls else None
    found = {"Attention": attention, "Layers with a state": describe_recurrence(lm, device)}
    return tuple(f"{name}: {words}" for name, words in found.items() if words is not None)


@contextlib.contextmanager
def where_kernels_run(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the `with` block, a model whose kernels are to be compared is where they run.

    These are Liger's, and those of layers with a state or a convolution: where such kernels are
    installed, transformers calls them on the CPU as well, where they fail. Other models stay where
    they are: they need no memory of the device until they run.

    Raises:
        ConfigError: a model with a state or a convolution fails in the block.
    """
    home = next(model.parameters()).device
    has_kernels = needs_device(causal_lm(model), device)
    needs = has_kernels or has_liger(model, device)
    moves = home.type != device.type and needs and not is_placed(model)
    if moves:
        model.to(device)
    try:
        yield
    except (DPOFastError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # compilers and kernel packages can raise anything
        if not has_kernels:
            raise
        raise ConfigError(
            f"{type(causal_lm(model)).__name__} doesn't run on {device} ({_reason(error)}), where "
            "kernels of other packages run its layers with a state or a convolution; install other "
            "versions of these packages, or none."
        ) from error
    finally:
        if moves:
            model.to(home)


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def sample_sequences(model: nn.Module) -> list[tuple[TokenIds, TokenIds]]:
    """The sequences of two pairs, as (prompt ids, answer ids), within any model's vocabulary.

    The answers of the second pair begin alike, so its shared prefix goes beyond the prompt.
    """
    vocab_size = vocabulary_of(model).size
    ids = [(7 * index + 1) % vocab_size for index in range(14)]
    return [
        (ids[:5], ids[5:9]),
        (ids[:5], ids[9:12]),
        (ids[2:4], ids[6:12]),
        (ids[2:4], [*ids[6:8], *ids[1:4]]),
    ]


def check_layout(layout: Layout, model: nn.Module) -> list[LayerAttention]:
    """Compares a packed row's hidden states with those of padded rows, on a few tokens.

    In layers that pass something on from token to token, the functions that do so are compared as
    well, with inputs that show what is passed on. Our attention runs its plain backend here.
    `check_attention` then compares the backend that the run will use.

    Args:
        layout: shared or unshared.
        model: policy or reference.

    Returns:
        The calls of our attention, one or more per layer.

    Raises:
        ConfigError: the hidden states or the functions differ, or a layer didn't call our
            attention.
        ModelError: a layer with a state didn't call what keeps sequences apart.
    """
    lm = causal_lm(model)
    sequences = sample_sequences(model)
    with recorded_calls() as calls, probed() as probe:
        packed = _scored_states(model, layout.collate(sequences))
    padded = _scored_states(model, collate_padded(sequences))
    error = ((packed - padded).norm() / padded.norm().clamp_min(1e-12)).item()
    dtype = _precision(model, packed.device)
    is_right = error <= STATES_TOLERANCE[dtype]  # NaN is an error, too
    if len(calls) < num_attention_layers(lm) or not is_right:
        raise ConfigError(
            f"layout: {layout.name} rows give {type(lm).__name__} other hidden "
            f"states than padded ones (by {error:.1%}); use layout: padded, and please report "
            "this model type."
        )
    for name, error in probe.errors.items():
        if not error <= STATES_TOLERANCE[dtype]:  # NaN is an error, too
            raise ConfigError(
                f"layout: in {layout.name} rows of {type(lm).__name__}, {name} gives other outputs "
                f"than for separate sequences (by {error:.1%}), so it mixes them; use layout: "
                "padded, and please report this."
            )
    return calls


def check_rows(model: nn.Module) -> None:
    """Compares the hidden states of a short padded row beside a longer one with those alone.

    Models that aren't causal fail here, because they look at the padding behind a short sequence.

    Raises:
        ModelError: the hidden states differ.
    """
    lm = causal_lm(model)
    vocab_size = vocabulary_of(lm).size
    context = context_of(model)
    hard_limit = context.length if context is not None and context.is_hard else LONG_ROW
    length = min(LONG_ROW, hard_limit)
    ids = [(7 * index + 1) % vocab_size for index in range(length)]
    short, long = (ids[1:3], ids[3:7]), (ids[:5], ids[5:])
    alone = _scored_states(model, collate_padded([short]))
    # The long row comes first: where tokens compete for places, the later ones lose.
    beside = _scored_states(model, collate_padded([long, short]))[-len(alone) :]
    error = ((beside - alone).norm() / alone.norm().clamp_min(1e-12)).item()
    dtype = _precision(model, alone.device)
    if not error <= STATES_TOLERANCE[dtype]:  # NaN is an error, too
        raise ModelError(
            f"{type(lm).__name__} gives a sequence other hidden states beside a longer one than "
            f"alone (by {error:.1%}), so its log-probs would depend on the other sequences of a "
            "batch. Only causal models can be trained; if it is one, please report this model type."
        )


def _precision(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype whose precision the products in a model's body have on a device."""
    dtype = product_precision(computing_dtype(model), device)
    if dtype == torch.float32 and runs_kernel(causal_lm(model), device):
        return torch.float16  # the products of Triton kernels are in TF32, whatever PyTorch's are
    return dtype


def check_liger(model: nn.Module) -> None:
    """Compares hidden states from Liger's layers with those from the model's own, on a few tokens.

    Nothing is compared while the model is on a CPU, where Liger's layers don't run.

    Raises:
        ConfigError: they differ by more than rounding, or fail.
    """
    if not runs_liger(model):
        return
    rows = collate_padded(sample_sequences(model))
    try:
        ligers = _scored_states(model, rows)
    except Exception as cause:  # compilers and kernel packages can raise anything
        raise ConfigError(
            f"{LIGER}: Liger's layers fail in {type(causal_lm(model)).__name__} "
            f"({_reason(cause)}); leave the option out, or switch kinds of layers off in "
            "liger_kernel_config."
        ) from cause
    with own_layers(model):
        expected = _scored_states(model, rows)
    # The median over tokens, as rounding can send single tokens to other experts.
    errors = (ligers - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)
    error = errors.median().item() if errors.isfinite().all() else math.inf
    dtype = product_precision(computing_dtype(model), expected.device)
    if error > STATES_TOLERANCE[dtype]:
        raise ConfigError(
            f"{LIGER}: Liger's layers give {type(causal_lm(model)).__name__} other hidden states "
            f"than its own (by {error:.1%}); leave the option out, or switch kinds of layers off "
            "in liger_kernel_config, and please report this to Liger."
        )


def _scored_states(model: nn.Module, batch: PackedPairs) -> Tensor:
    """[N, H] float32 hidden states at the scored positions."""
    batch = batch.to(next(model.parameters()).device)
    with evaluating(model), micro_batch(model, batch):
        hidden_states = run_body(model, batch)
    return hidden_states.flatten(0, 1).index_select(0, batch.scored_positions).float()


def check_attention(
    calls: list[LayerAttention], device: torch.device, autocast_dtype: torch.dtype | None
) -> str:
    """Compares the attention that will run with its naive twin, once for each kind of layer.

    Args:
        calls: calls of the model's layers, from `check_layout`.
        device: device that the model will run on.
        autocast_dtype: dtype of the forward pass under autocast; None without autocast.

    Returns:
        The backend of each kind of layer, in words for the log.

    Raises:
        ConfigError: the attention is wrong on this device, or fails there.
    """
    remedy = "use layout: padded, and please report this"
    # Layers that call attention alike are one kind; a dict keeps the kinds in the layers' order.
    kinds = dict.fromkeys(_under_autocast(call, autocast_dtype) for call in calls)
    try:
        found = dict.fromkeys(_describe(probed_backend(device, kind), kind) for kind in kinds)
    except WrongBackendError as error:
        raise ConfigError(f"layout: {error}; {remedy}.") from error
    except Exception as error:  # compilers and kernel packages can raise anything
        raise ConfigError(
            f"layout: packed rows' attention doesn't run on {device} ({_reason(error)}); {remedy}."
        ) from error
    return f"{', '.join(found)}; compared with its naive twin on {device}"


def _under_autocast(call: LayerAttention, autocast_dtype: torch.dtype | None) -> LayerAttention:
    """The call in the dtype that autocast gives it in the run."""
    if autocast_dtype is None or call.dtype == torch.float64:  # autocast doesn't touch float64
        return call
    return replace(call, dtype=autocast_dtype)


@functools.cache
def probed_backend(device: torch.device, call: LayerAttention) -> str:
    """The name of the backend that runs a call on a device, once it has passed its probe.

    The result is cached: policy and reference, and later trainers of the process, share a probe.

    Raises:
        WrongBackendError: the backend differs from its naive twin by more than rounding.
    """
    options = AttentionOptions(
        scale=call.scale,
        window=call.window,
        chunk=call.chunk,
        softcap=call.softcap,
        sinks=torch.zeros(call.num_heads) if call.has_sinks else None,
    )
    heads = (call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim)
    return probe(device, call.dtype, *heads, options)


def _describe(backend: str, call: LayerAttention) -> str:
    """A backend and the kind of layer that gets it, such as "sdpa (float32, 4 heads of 8)"."""
    traits = [str(call.dtype).removeprefix("torch."), f"{call.num_heads} heads of {call.head_dim}"]
    for name, value in (("window", call.window), ("chunk", call.chunk), ("softcap", call.softcap)):
        if value is not None:
            traits.append(f"{name} {value:g}")
    if call.has_sinks:
        traits.append("sinks")
    return f"{backend} ({', '.join(traits)})"


def check_head(model: nn.Module) -> None:
    """Compares the logits of body, head and `head_options` with the model's own, on a few tokens.

    Raises:
        ModelError: they differ. The family does something to its hidden states or logits that
            `head_options` doesn't know, so training it would be wrong.
    """
    lm = causal_lm(model)
    vocab_size = vocabulary_of(lm).size
    device = next(lm.parameters()).device
    input_ids = torch.arange(8, device=device)[None] * 7 % vocab_size  # [1, 8]
    # This batch is made by hand so that every position is scored. A layout's `collate` would score
    # only the positions that predict an answer.
    batch = PackedPairs(
        input_ids=input_ids,
        position_ids=None,
        scored_positions=torch.arange(8, device=device),
        labels=input_ids[0],
        bounds=torch.tensor([0, 8]),
        ref_logps=None,
        num_tokens=8,
        sequence_tokens=8,
        uses=torch.ones_like(input_ids),
    )
    options = head_options(lm.config)
    with evaluating(model):
        stock = model(input_ids=input_ids, use_cache=False)
        with micro_batch(model, batch):
            ours = run_batch(model, batch, _LogitsTask(options))
    expected = stock.logits[0].float()  # [8, V]
    error = ((ours.float() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    dtype = product_precision(computing_dtype(model), device)
    if not error <= HEAD_TOLERANCE[dtype]:  # NaN is an error, too
        raise ModelError(
            f"{type(lm).__name__} does something to its logits that dpofast doesn't know "
            f"(they differ by {error:.1%} from body and head alone), so its log-probs would be "
            "wrong; please report this model type."
        )


class _LogitsTask:
    """A head task that returns the logits themselves, for `check_head` only."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def __call__(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return naive_logits(hidden_states, weight, replace(self.options, bias=bias))
