"""A transformers causal LM during a step: its body runs once, then its head is called once.

`micro_batch` prepares a model for this, and `run_batch` runs it. Outside `micro_batch` the model is
stock: `generate`, a plain forward and `save_pretrained` behave as they always do.
"""

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
from dpofast.model.head import HeadTask, head_forwards
from dpofast.model.liger import liger_layers
from dpofast.model.parts import body_of, causal_lm, num_attention_layers
from dpofast.model.quantised import quantised_layers
from dpofast.model.recurrent import packed_recurrence
from dpofast.model.replace import replaced_forwards
from dpofast.model.rope import rope_of_each_row
from dpofast_kernels.attention import SharedLayout


class BodyTask(Protocol):
    """Computes one more tensor from the body's outputs, in addition to the head's result."""

    def __call__(
        self,
        outputs: Any,
        uses: Tensor,  # [B, L], as in PackedPairs
    ) -> Tensor: ...


@contextlib.contextmanager
def micro_batch(model: nn.Module, batch: PackedPairs) -> Iterator[None]:
    """Prepares a model for one micro-batch: its forward and its backward belong inside the block.

    Gradient checkpointing runs the layers again in the backward, where they must attend as they
    did in the forward.

    Args:
        model: causal LM or PeftModel. Inside the block call `run_batch` with this model or with
            whatever wraps it (DDP, DeepSpeed's engine).
        batch: the micro-batch. In a packed row each token attends as its layout says, and layers
            with a state keep the sequences apart. Padded rows keep the model's own layers, and each
            gets the RoPE that it would have alone.
    """
    lm = causal_lm(model)
    with (
        liger_layers(lm, batch.input_ids.device),
        packed_attention(lm.config, batch.shared_layout),
        packed_recurrence(lm, batch.shared_layout),
        rope_of_each_row(lm, batch),
        pair_step(model),
    ):
        yield


def run_batch(
    wrapped: nn.Module,
    batch: PackedPairs,
    head_task: HeadTask,
    body_task: BodyTask | None = None,
) -> Any:
    """Runs one forward pass, inside `micro_batch`.

    Args:
        wrapped: the model, or whatever wraps it.
        batch: the micro-batch, on the model's device.
        head_task: runs inside the head, on the hidden states of the scored positions.
        body_task: computes one more tensor from the body's outputs, if given.

    Returns:
        The result of `head_task`. With a `body_task` this is a tuple, and the task's tensor is
        appended to it.
    """
    return wrapped(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        shared_layout=batch.shared_layout,
        scored_positions=batch.scored_positions,
        head_task=head_task,
        body_task=None if body_task is None else partial(body_task, uses=batch.uses),
    )


def run_body(model: nn.Module, batch: PackedPairs) -> Tensor:
    """Runs one forward pass of the body only, inside `micro_batch`.

    Args:
        model: causal LM or PeftModel, not wrapped by DDP or DeepSpeed.
        batch: the micro-batch, on the model's device.

    Returns:
        [B, L, H] hidden states that the head would get.
    """
    lm = causal_lm(model)
    outputs = _call_body(lm, batch.input_ids, batch.position_ids, batch.shared_layout)
    hidden_states: Tensor = outputs[0]
    return hidden_states


def _call_body(
    lm: Any,
    input_ids: Tensor,  # [B, L]
    position_ids: Tensor | None,  # [B, L]
    shared_layout: SharedLayout | None,
    **more: Any,
) -> Any:
    # In padded rows both are None, and the body is called exactly as transformers calls it.
    packed = {"position_ids": position_ids, "shared_layout": shared_layout}
    given = {name: value for name, value in packed.items() if value is not None}
    return body_of(lm)(input_ids=input_ids, use_cache=False, **given, **more)


def _pair_forward(
    model: Any,
    input_ids: Tensor | None = None,  # [B, L]
    scored_positions: Tensor | None = None,  # [N]
    head_task: HeadTask | None = None,
    position_ids: Tensor | None = None,  # [B, L]
    shared_layout: SharedLayout | None = None,
    body_task: Callable[[Any], Tensor] | None = None,
    **_unused: Any,  # PEFT adds arguments of its own, all None here
) -> Any:
    """The causal LM's forward during a step; see `run_batch`.

    Raises:
        ModelError: the body ran a packed row through an attention other than ours, or the model was
            called otherwise than by `run_batch`.
    """
    if input_ids is None or scored_positions is None or head_task is None:
        raise ModelError(
            f"{type(model).__name__}: the model's own forward can't run inside compute_loss, where "
            "its attention and head are made for rows of several sequences; call "
            "super().compute_loss(model, inputs), or see docs/extending.md."
        )
    calls_before = attention_calls.count
    more = {} if body_task is None else {"output_router_logits": True}
    outputs = _call_body(model, input_ids, position_ids, shared_layout, **more)
    # Every layer with attention must have called ours. Some families ignore its name without an
    # error. Layers with a state check by themselves that they call what keeps sequences apart.
    num_calls = attention_calls.count - calls_before
    if shared_layout is not None and num_calls < num_attention_layers(model):
        raise ModelError(
            f"{type(model).__name__} ran a packed row through an attention that would mix its "
            "sequences; set layout: padded."
        )
    # Only scored positions reach the head: prompts and padding never cost logits.
    scored = outputs[0].flatten(0, 1).index_select(0, scored_positions)  # [N, H]
    result = model.get_output_embeddings()(scored, head_task)
    return result if body_task is None else (*result, body_task(outputs))


@contextlib.contextmanager
def pair_step(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a model and its head run our forward functions, not their own.

    `micro_batch` enters this together with the attention for packed rows.

    Args:
        model: causal LM or PeftModel; wrappers around it are called as usual.
    """
    lm = causal_lm(model)
    with replaced_forwards([(lm, _pair_forward), *head_forwards(lm.get_output_embeddings())]):
        yield


@contextlib.contextmanager
def kept_activations(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a forward keeps its activations: nothing is checkpointed.

    A backward that runs outside `micro_batch` couldn't compute them again as they were.
    """
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, a model runs without gradients and without dropout.

    Afterwards every module gets its own mode back, because the modes within a PeftModel can differ.
    Quantised layers run in training mode, in which they compute what they compute in a step.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for layer in quantised_layers(model).values():
        layer.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
