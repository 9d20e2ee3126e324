"""A transformers causal LM during our steps: its body, then one call of its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpofast.data.packing.batch import PackedPairs
from dpofast.errors import ModelError
from dpofast.model.attention import attention_calls, packed_attention
from dpofast.model.head import HeadTask, bind, head_forwards
from dpofast.model.parts import body_of, causal_lm, num_layers
from dpofast_kernels.attention import SharedLayout


class BodyTask(Protocol):
    """What else is made of the body's outputs than the head does: a tensor."""

    def __call__(
        self,
        outputs: Any,
        uses: Tensor,  # [B, L], those of PackedPairs
    ) -> Tensor: ...


def _pair_forward(
    model: Any,
    input_ids: Tensor,  # [B, L]
    scored_positions: Tensor,  # [N]
    head_task: HeadTask,
    position_ids: Tensor | None = None,  # [B, L]
    shared_layout: SharedLayout | None = None,
    body_task: Callable[[Any], Tensor] | None = None,
    **_unused: Any,  # PEFT adds arguments of its own, all None here
) -> Any:
    """The causal LM's forward during a step."""
    calls_before = attention_calls.count
    more = {} if body_task is None else {"output_router_logits": True}
    outputs = _call_body(model, input_ids, position_ids, shared_layout, **more)
    if shared_layout is not None and attention_calls.count - calls_before < num_layers(model):
        raise ModelError(
            f"{type(model).__name__} ran a packed row through an attention that would mix its "
            "sequences; set layout: padded."
        )
    scored = outputs[0].flatten(0, 1).index_select(0, scored_positions)  # [N, H]
    result = model.get_output_embeddings()(scored, head_task)
    return result if body_task is None else (*result, body_task(outputs))


def _call_body(
    lm: Any,
    input_ids: Tensor,  # [B, L]
    position_ids: Tensor | None,  # [B, L]
    shared_layout: SharedLayout | None,
    **more: Any,
) -> Any:
    # Padded rows have neither, and call the body as stock code does.
    packed = {"position_ids": position_ids, "shared_layout": shared_layout}
    given = {name: value for name, value in packed.items() if value is not None}
    return body_of(lm)(input_ids=input_ids, use_cache=False, **given, **more)


def run_body(model: nn.Module, batch: PackedPairs) -> Tensor:
    """One forward pass of the body only, inside `micro_batch`.

    Args:
        model: causal LM or PeftModel; not wrapped by DDP or DeepSpeed.
        batch: on the model's device.

    Returns:
        [B, L, H] hidden states.
    """
    outputs = _call_body(causal_lm(model), batch.input_ids, batch.position_ids, batch.shared_layout)
    hidden_states: Tensor = outputs[0]
    return hidden_states


@contextlib.contextmanager
def micro_batch(model: nn.Module, batch: PackedPairs) -> Iterator[None]:
    """Everything that a model needs around the forward and the backward of one micro-batch.

    The backward belongs inside as well: gradient checkpointing runs the layers again there, and
    they must attend as they did in the forward.

    Args:
        model: causal LM or PeftModel. Inside, call `run_batch` with it, or with whatever wraps it.
        batch: the micro-batch; a packed row is attended to as its layout says.
    """
    with packed_attention(causal_lm(model).config, batch.shared_layout), pair_step(model):
        yield


@contextlib.contextmanager
def pair_step(model: nn.Module) -> Iterator[None]:
    """Inside, a call of the model runs its body and a `head_task`; outside, the model is stock.

    Call whatever wraps the model (DDP, DeepSpeed's engine, a PeftModel) with `run_batch`.
    """
    lm = causal_lm(model)
    replaced = [(lm, _pair_forward), *head_forwards(lm.get_output_embeddings())]
    # accelerate keeps an autocasting forward of its own on the instance
    kept = [(module, module.__dict__.get("forward")) for module, _ in replaced]
    for module, function in replaced:
        bind(module, function)
    try:
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def run_batch(
    wrapped: nn.Module,
    batch: PackedPairs,
    head_task: HeadTask,
    body_task: BodyTask | None = None,
) -> Any:
    """One forward pass inside `pair_step`, and for a packed row `packed_attention`.

    Returns:
        What the head's task returns: where there is a `body_task`, too, a tuple, and behind it what
        that one returns.
    """
    return wrapped(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        shared_layout=batch.shared_layout,
        scored_positions=batch.scored_positions,
        head_task=head_task,
        body_task=None if body_task is None else partial(body_task, uses=batch.uses),
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
