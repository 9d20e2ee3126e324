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
from dpofast.model.attention import Calls
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
    inputs = {
        "position_ids": position_ids,
        "shared_layout": shared_layout,
        "output_router_logits": None if body_task is None else True,
    }
    given = {name: value for name, value in inputs.items() if value is not None}
    calls = Calls.count
    outputs = body_of(model)(input_ids=input_ids, use_cache=False, **given)
    if shared_layout is not None and Calls.count - calls < num_layers(model):
        raise ModelError(
            f"{type(model).__name__} ran a packed row through an attention that would mix its "
            "sequences; set layout: padded."
        )
    scored = outputs[0].flatten(0, 1).index_select(0, scored_positions)  # [N, H]
    result = model.get_output_embeddings()(scored, head_task)
    return result if body_task is None else (*result, body_task(outputs))


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
