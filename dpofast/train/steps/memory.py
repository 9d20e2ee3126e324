"""Computes how many tokens a packed row can have in the memory that training leaves free."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from dpofast.data.packing.collate import Layout
from dpofast.model.forward import evaluating, micro_batch, run_body
from dpofast.model.parts import body_of, causal_lm, num_bytes, num_layers, numel, shape
from dpofast.model.recurrent import recurrent_family
from dpofast.options.checkpointing import EVERY, checkpointing_options
from dpofast.options.config import DPOConfig
from dpofast.zero.blocks import runnable
from dpofast_kernels.head.workspace import DEVICE_WORKSPACE_BYTES

logger = logging.getLogger(__name__)

# Share of the free memory that rows may use. The allocator loses some of the rest to fragments, and
# the backward holds the gradients of one layer's activations.
USED_SHARE = 0.8


class Probe(NamedTuple):
    """What is run to measure memory: two rows that repeat a pair.

    Attributes:
        num_pairs: numbers of pairs in the rows.
        pair: the pair, as (prompt ids, answer ids) of both sequences.
    """

    num_pairs: tuple[int, int]
    pair: tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]


# The pair is short because some models know few positions. Recurrences get longer ones in rows of
# about as many tokens: they pad each part of a row to chunks, of 64 tokens or more, and would count
# little else than this padding. Of the parts of the long pair they pad a third, as of real ones.
SHORT_PARTS = Probe((8, 24), (([1] * 8, [2] * 4), ([1] * 8, [3] * 4)))
LONG_PARTS = Probe((1, 3), (([1] * 96, [2] * 48), ([1] * 96, [3] * 48)))
# Most and fewest tokens in a row, and the number that its length is a multiple of. Longer rows
# would be no faster. Shorter rows would be slow, and few pairs have fewer tokens anyway.
LARGEST_ROW, SMALLEST_ROW, STEP = 2**16, 2**9, 2**8
MOMENTS = 2  # states of Adam per parameter


def row_tokens_on_all_ranks(trainer: Any, checkpointed: int | None = None) -> int:
    """The most tokens of a packed row that fit the GPU of every rank.

    All ranks call this together.

    Args:
        trainer: a DPOTrainer whose model isn't trained yet.
        checkpointed: layers that will be checkpointed; None for those that the options name.
    """
    with runnable(trainer):  # ZeRO-3 has no engine for the model yet
        free = free_device_bytes(trainer.args.device)
        autocast = trainer.accelerator.autocast
        model, layout, config = trainer.model, trainer.layout, trainer.args
        tokens = tokens_that_fit(model, layout, config, autocast, free, checkpointed)
    own = torch.tensor([tokens], device=trainer.args.device)
    return int(trainer.accelerator.gather(own).min())


def tokens_that_fit(
    model: nn.Module,
    layout: Layout,
    config: DPOConfig,
    autocast: Callable[[], Any],
    free_bytes: int,
    checkpointed: int | None = None,
) -> int:
    """The most tokens of a packed row with which a training step fits a device's memory.

    Args:
        model: the policy, on the device that it will be trained on, or still on the CPU.
        layout: shared or unshared.
        config: options of the run, which say whether layers are checkpointed and DeepSpeed shards.
        autocast: returns the context manager of a forward pass.
        free_bytes: free bytes of the device, with the model where it is now.
        checkpointed: layers that will be checkpointed; None for those that the options name.

    Returns:
        A multiple of 256 from 512 to 65,536, even if less or more is free.
    """
    cost = row_bytes(model, layout, config, autocast, checkpointed)
    left = bytes_for_rows(model, config, free_bytes) - cost.fixed
    tokens = int(USED_SHARE * left / cost.per_token)
    tokens -= tokens % STEP
    if tokens < SMALLEST_ROW:
        logger.warning(
            "Parameters, gradients and optimizer states leave %.1f GB for activations, too little "
            "for rows of %d tokens: training may run out of memory; train an adapter, take a "
            "higher stage of ZeRO, or offload its optimizer.",
            left / 1e9,
            SMALLEST_ROW,
        )
    return min(max(tokens, SMALLEST_ROW), LARGEST_ROW)


def bytes_for_rows(model: nn.Module, config: DPOConfig, free_bytes: int) -> int:
    """Bytes that parameters, gradients, optimizer states and the head's op leave for a row.

    The arguments are those of `tokens_that_fit`.
    """
    # `training_bytes` counts the parameters again, so those already on the device are added to what
    # is free. ZeRO-3 keeps this rank's part of a parameter in ds_tensor.
    held: list[Tensor] = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    placed = sum(part.nbytes for part in held if part.device.type != "cpu")
    left = free_bytes + placed - training_bytes(model, config)
    return left - _head_bytes(causal_lm(model))


def free_device_bytes(device: torch.device) -> int:
    """Bytes that PyTorch can still allocate on a CUDA or ROCm device, cached blocks included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def training_bytes(model: nn.Module, config: DPOConfig) -> int:
    """Bytes of parameters, gradients and optimizer states on one rank's device.

    For ZeRO these are DeepSpeed's own estimates. Without ZeRO, the optimizer is assumed to be AdamW
    with its states in the dtype of the parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen_bytes = sum(num_bytes(p) for p in model.parameters() if not p.requires_grad)
    trained_bytes = sum(map(num_bytes, trained))
    stage, offloads = zero_stage(config)
    if stage == 0:
        buckets = config.world_size > 1  # DDP reduces in buckets, as large as all gradients
        return frozen_bytes + (2 + buckets + MOMENTS) * trained_bytes
    count = sum(numel(p) for p in trained)
    # All ranks are counted as one node: an estimate for a GPU depends only on the total number.
    ranks: dict[str, Any] = {"num_gpus_per_node": config.world_size, "cpu_offload": offloads}
    if stage < 3:
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

        return frozen_bytes + int(estimate_zero2_model_states_mem_needs(count, **ranks)[1])
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    largest = max(sum(map(numel, module.parameters(recurse=False))) for module in model.modules())
    estimate = estimate_zero3_model_states_mem_needs(
        count, largest, **ranks, cpu_offload_params=False
    )
    return frozen_bytes // config.world_size + int(estimate[1])


def zero_stage(config: DPOConfig) -> tuple[int, bool]:
    """The stage of ZeRO, 0 without DeepSpeed, and whether it keeps optimizer states on the CPU."""
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is None:
        return 0, False
    zero = plugin.hf_ds_config.config.get("zero_optimization", {})
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return int(zero.get("stage", 0)), device != "none"


class RowBytes(NamedTuple):
    """Bytes of a row in addition to the parameters.

    Attributes:
        per_token: bytes for each token of the row.
        fixed: bytes that a row takes whatever its length.
    """

    per_token: float
    fixed: float


class BodyBytes(NamedTuple):
    """Bytes that the body and the head's input keep for the backward.

    Attributes:
        layers: bytes of a token inside of each decoder layer.
        state: bytes of one token's hidden state.
        outside: bytes of a token outside of the layers.
        fixed: bytes that a row takes whatever its length.
    """

    layers: list[float]
    state: int
    outside: float
    fixed: float

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def of_row(self, checkpointed: int) -> RowBytes:
        """The bytes of a row, of whose layers the first ones are checkpointed."""
        # A checkpointed layer keeps only its input; the inside of one at a time is computed again.
        inside = sum(self.layers[checkpointed:])
        inside += (checkpointed > 0) * max(self.layers)
        return RowBytes(inside + checkpointed * self.state + self.outside, self.fixed)


def row_bytes(
    model: nn.Module,
    layout: Layout,
    config: DPOConfig,
    autocast: Callable[[], Any],
    checkpointed: int | None = None,
) -> RowBytes:
    """Bytes that a row keeps for its backward.

    Args:
        model, layout, config, autocast, checkpointed: as for `tokens_that_fit`.
    """
    body = body_bytes(model, layout, autocast)
    if checkpointed is None:
        checkpointed = _checkpointed_layers(config, body.num_layers)
    return body.of_row(checkpointed)


def body_bytes(model: nn.Module, layout: Layout, autocast: Callable[[], Any]) -> BodyBytes:
    """Bytes that the body keeps for its backward, layer by layer.

    The body runs over two short rows, and the difference gives the bytes of a token. The rest, the
    same for both rows, is autocast's copies of the weights. They live until the forward pass ends,
    even if layers are checkpointed.
    """
    lm = causal_lm(model)
    hidden_size = shape(lm.get_output_embeddings().weight)[1]
    probe = SHORT_PARTS if recurrent_family(lm) is None else LONG_PARTS
    small, large = (_kept_by_body(lm, layout, probe, count, autocast) for count in probe.num_pairs)
    tokens = large.tokens - small.tokens
    slope = (large.kept - small.kept) / tokens
    layers = [(more - less) / tokens for more, less in zip(large.layers, small.layers, strict=True)]
    layers = layers or [slope / num_layers(lm)] * num_layers(lm)
    # Every token counts as scored: its hidden state is gathered, and has a gradient in fp32.
    scored = large.state + hidden_size * torch.float32.itemsize
    fixed = max(small.kept - slope * small.tokens, 0.0)
    return BodyBytes(layers, large.state, slope - sum(layers) + scored, fixed)


class _Pass(NamedTuple):
    """One forward pass of the body over a row.

    Attributes:
        tokens: tokens of the row.
        kept: bytes that the pass keeps for its backward.
        state: bytes of one token's hidden state.
        layers: bytes that are kept inside of each layer, if its class can be checkpointed.
    """

    tokens: int
    kept: int
    state: int
    layers: list[int]


def _checkpointed_layers(config: DPOConfig, num_layers: int) -> int:
    # transformers 5.23 renamed the option.
    if not getattr(config, "activation_checkpointing", config.gradient_checkpointing):
        return 0
    return -(-num_layers // int(checkpointing_options(config).get(EVERY, 1)))


def _kept_by_body(
    lm: Any, layout: Layout, probe: Probe, num_pairs: int, autocast: Callable[[], Any]
) -> _Pass:
    """Runs the body over a row of pairs, and counts the bytes that it keeps."""
    batch = layout.collate(probe.pair * num_pairs).to(next(lm.parameters()).device)
    # Tensors are kept by address, because several of them can share memory. They are kept alive,
    # because a later tensor could otherwise get the address of an earlier one.
    kept: dict[int, Tensor] = {}
    layers: list[int] = []

    def keep(tensor: Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        # Weights aren't part of a row's cost. They also must not be kept alive here: ZeRO-3 gathers
        # the weights of one layer at a time, and these would add up to the whole model.
        if all(address != p.untyped_storage().data_ptr() for p in lm.parameters()):
            kept.setdefault(address, tensor)

    with (
        _each_layer(body_of(lm), lambda: layers.append(_num_bytes(kept))),
        evaluating(lm),  # layers are checkpointed in training mode only
        micro_batch(lm, batch),
        autocast(),
        torch.enable_grad(),
        saved_tensors_hooks(keep, lambda nothing: nothing),  # there is no backward
    ):
        hidden_states = run_body(lm, batch)
    state = hidden_states.shape[-1] * hidden_states.element_size()
    # What was kept before and after each layer, in turn.
    inside = [after - before for before, after in zip(layers[::2], layers[1::2], strict=True)]
    return _Pass(batch.num_body_tokens, _num_bytes(kept), state, inside)


def _num_bytes(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@contextlib.contextmanager
def _each_layer(body: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Calls a function before and after each layer that is run inside of the block.

    Layers are what transformers can checkpoint. A layer inside of another isn't one.
    """

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        if isinstance(module, GradientCheckpointingLayer):
            yield module
            return
        for child in module.children():
            yield from outermost(child)

    with contextlib.ExitStack() as hooks:
        for layer in dict.fromkeys(outermost(body)):
            for hook in (layer.register_forward_pre_hook, layer.register_forward_hook):
                hooks.callback(hook(lambda *_: call()).remove)
        yield


def _head_bytes(lm: Any) -> int:
    """Bytes that the head holds during its op, beyond the gradients of its inputs.

    Beside the workspace it holds the gradient of its weight in fp32.
    """
    weight = lm.get_output_embeddings().weight
    return DEVICE_WORKSPACE_BYTES + torch.float32.itemsize * weight.requires_grad * numel(weight)
